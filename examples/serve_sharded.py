"""Switch adapters on a model that tensor parallelism divides between ranks.

    torchrun --nproc-per-node=2 examples/serve_sharded.py

Each rank reads the files and keeps the entries of its own part of the weights. All ranks switch, or none does. The same
works after fully_shard. Runs offline on CPUs in a few seconds; on GPUs set DEVICE to "cuda".
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import shira

DEVICE = "cpu"


def make_adapter(base: nn.Module, seed: int, path: str) -> None:
    """A file whose values are drawn instead of learned."""
    with shira.SparseTuner(base, shira.masks.Rand(density=0.02, seed=seed)) as tuner, torch.no_grad():
        for values in tuner.parameters():
            values.add_(0.2 * torch.randn(values.shape))
        tuner.adapter().save(path)


def main() -> None:
    if "WORLD_SIZE" not in os.environ:
        raise SystemExit(f"Start it with torchrun.\n\n{__doc__}")
    mesh = init_device_mesh(DEVICE, (int(os.environ["WORLD_SIZE"]),))
    torch.manual_seed(0)  # the same base on every rank
    base = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    before, x = {name: tensor.clone() for name, tensor in base.state_dict().items()}, torch.randn(8, 64).to(DEVICE)
    if dist.get_rank() == 0:
        for seed, name in enumerate(("formal", "brief")):
            make_adapter(base, seed, f"{name}.safetensors")
    dist.barrier()
    model = parallelize_module(base.to(DEVICE), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})

    switcher = shira.Switcher(model)
    for name in ("formal", "brief"):
        switcher.add(name, f"{name}.safetensors")
    with torch.no_grad():
        for wanted in ({"formal": 1.0}, {"brief": 0.5}, {"formal": 0.7, "brief": 0.7}, {}):
            with switcher.using(wanted):
                outputs = model(x)
            if dist.get_rank() == 0:
                print(f"{' + '.join(wanted) or 'base':<15} {outputs.norm():.4f}")
    restored = all(torch.equal(weight.full_tensor(), before[name]) for name, weight in model.state_dict().items())
    if dist.get_rank() == 0:
        print(f"the base is back, bit for bit: {restored}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
