"""What every rank does in `test_sharded`: a program for ``ranks.py``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import shira
from shira import Adapter, Entry, Switcher, _granules

IDS = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(1))


class Experts(nn.Module):
    """Weights of three dimensions that no layer of torch's computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.full_tensor() if isinstance(self.weight, DTensor) else self.weight
        return x + torch.einsum("bti,eoi->bto", x, weight) / 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.experts = Experts()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.experts(x))


def net(dtype: torch.dtype = torch.float32) -> Net:
    model, generator = Net(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def adapter(model: nn.Module, seed: int, granule: int = 4, delta: bool = False, whole: str = "") -> Adapter:
    """Random entries of every weight; those whose name begins with ``whole`` are replaced as a whole."""
    generator, entries = torch.Generator().manual_seed(seed), {}
    for name, weight in model.named_parameters():
        numel = weight.numel()
        size = numel if whole and name.startswith(whole) else next(g for g in (granule, 1) if numel % g == 0)
        count = max(1, numel // size // 3)
        indices = torch.randperm(numel // size, generator=generator)[:count].sort().values.to(torch.int32)
        values = torch.randn(count * size, generator=generator).to(weight.dtype)
        entries[name] = Entry(indices, values, tuple(weight.shape), weight.dtype, size,
                              fingerprint=_granules.fingerprint(weight))  # fmt: skip
    return Adapter(entries, alpha=0.75, delta=delta)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state(model: nn.Module) -> dict[str, Tensor]:
    """All weights, whole; from the modules as they are, whatever FSDP has gathered."""
    return {name: full(tensor).detach().clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, wanted: nn.Module) -> None:
    there = state(model)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(there[name], tensor), name


def shard(model: Any, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def parallel(model: Any, mesh: DeviceMesh) -> nn.Module:
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    weight = model.experts.weight
    model.experts.weight = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
    return model


STATES: list[dict[str, float]] = [
    {"a": 1.0}, {"b": 0.5}, {"a": 0.3}, {"a": 0.7}, {"a": 0.5, "b": 1.0, "c": -0.5}, {"b": 1.0, "c": 0.25}, {}, {"c": 1.0},
]  # fmt: skip


def walk(model: nn.Module, base: Net, outputs: bool = True) -> Switcher:
    """Every state has the same bits as in one process, and so has the base afterwards."""
    alone = Switcher(base)
    switcher = Switcher(model)
    given = {
        "a": adapter(base, 1),
        "b": adapter(base, 2, granule=8, delta=True),
        "c": adapter(base, 3, 16, whole="head"),
    }
    path = Path("a.safetensors")
    if dist.get_rank() == 0:
        given["a"].save(path)
    dist.barrier()
    for name, one in given.items():
        alone.add(name, one)
        switcher.add(name, path if name == "a" else one)
    assert list(switcher.memory()) == list(given)
    for strengths in STATES:
        for each in (alone, switcher):
            if strengths:
                each.activate(strengths)
            else:
                each.deactivate()
        assert switcher.active == alone.active
        same(model, base)
        switcher.verify(full=True)
        if outputs:
            with torch.no_grad():
                got = model(IDS)
                torch.testing.assert_close(got, base(IDS), rtol=1e-3, atol=1e-3)
        for name in ("blocks.0.up.weight", "head.bias", "experts.weight"):
            assert (
                switcher.fingerprint(name) == alone.fingerprint(name) == _granules.fingerprint(base.get_parameter(name))
            )
    for each in (alone, switcher):
        each.deactivate()
    same(model, base)
    return switcher


# ---- what is checked -----------------------------------------------------------------------------------------


def fsdp(mesh: DeviceMesh) -> None:
    for options in ({}, {"reshard_after_forward": False}):
        for dtype in (torch.float32, torch.bfloat16):
            walk(shard(net(dtype), mesh, **options), net(dtype))


def tensor_parallel(mesh: DeviceMesh) -> None:
    walk(parallel(net(), mesh), net())


CHECKS: tuple[Callable[[DeviceMesh], None], ...] = (fsdp, tensor_parallel)


def main() -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("all",))
    for check in CHECKS:
        check(mesh)
    Path(f"done.{dist.get_rank()}").touch()


if __name__ == "__main__":
    main()
