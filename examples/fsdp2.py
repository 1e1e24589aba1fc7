"""Train a sparse adapter of a model that FSDP2 divides between ranks.

    torchrun --nproc-per-node=2 examples/fsdp2.py --out adapter.safetensors

Every rank holds a part of the weights, the values and the optimizer's state, and trains on batches of its own. The
adapter is one ordinary file. Runs offline on CPUs in a few seconds; on GPUs set DEVICE to "cuda".
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
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
    model = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
    for part in (model[0], model[2], model[4], model):
        fully_shard(part, mesh=mesh)
    tuner = shira.SparseTuner(model, shira.masks.WeightMagnitude(density=0.2))
    optimizer = shira.AdamW(tuner, lr=2e-2)
    own = sum(values.to_local().numel() for values in tuner.parameters())
    for step in range(60):
        seed = step * mesh.size() + dist.get_rank()
        points = torch.randn(128, 2, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        loss = F.cross_entropy(model(points), (points[:, 0] > 0).long() + 2 * (points[:, 1] > 0).long())
        loss.backward()
        nn.utils.clip_grad_norm_(tuner.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach())
        if dist.get_rank() == 0 and (step % 20 == 0 or step == 59):
            print(f"step {step:3}  loss {loss.item() / mesh.size():.3f}")
    tuner.save(args.out)  # all ranks together; the first one writes
    if dist.get_rank() == 0:
        print(f"{own} of {tuner.nnz} values on this rank, all of them in {args.out}")
    tuner.detach()  # the base is back, bit for bit
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
