"""Train a sparse adapter of a model that tensor parallelism divides between ranks.

    torchrun --nproc-per-node=2 examples/tensor_parallel.py --out adapter.safetensors

Each rank computes with its own columns and rows of the weights, all of them on the same batch. What each of them needs
for the adapter is there already: a gradient is computed on the rank that holds the entry. Runs offline on CPUs in a few
seconds; on GPUs set DEVICE to "cuda".
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

import shira

DEVICE = "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("adapter.safetensors"), help="where to save the adapter")
    args = parser.parse_args()

    if "WORLD_SIZE" not in os.environ:
        raise SystemExit(f"Start it with torchrun.\n\n{__doc__}")
    mesh = init_device_mesh(DEVICE, (int(os.environ["WORLD_SIZE"]),))
    torch.manual_seed(0)  # the same base on every rank
    model = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 4)).to(DEVICE)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})

    tuner = shira.SparseTuner(model, shira.masks.Rand(density=0.5))
    optimizer = shira.AdamW(tuner, lr=2e-2)
    for step in range(60):
        points = torch.randn(256, 2, generator=torch.Generator().manual_seed(step)).to(DEVICE)  # on every rank the same
        loss = F.cross_entropy(model(points), (points[:, 0] > 0).long() + 2 * (points[:, 1] > 0).long())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and (step % 20 == 0 or step == 59):
            print(f"step {step:3}  loss {loss.item():.3f}")
    tuner.save(args.out)  # all ranks together; the first one writes
    entries = tuner.nnz
    tuner.detach()
    restored = all(torch.equal(one.full_tensor(), base[name]) for name, one in model.state_dict().items())
    if dist.get_rank() == 0:
        print(f"{entries} entries in {args.out}, base restored bit for bit: {restored}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
