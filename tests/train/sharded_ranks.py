"""What every rank does in `test_sharded`: a program for ``ranks.py``."""

from __future__ import annotations

import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import shira
from shira import SparseTuner, masks

RAND = masks.Rand(density=0.1, granule=4)
LINEAR = "up|down|head"
IDS = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


def net(**options: bool) -> Net:
    torch.manual_seed(0)
    return Net(**options)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def shard(model: Any, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def parallel(model: Any, mesh: DeviceMesh, sequence: bool = False) -> nn.Module:
    inside = Shard(1) if sequence else Replicate()
    for block in model.blocks:
        plan: dict[str, Any] = {
            "up": ColwiseParallel(input_layouts=inside),
            "down": RowwiseParallel(output_layouts=inside, use_local_output=not sequence),
        }
        if sequence:
            plan["norm"] = SequenceParallel()
        parallelize_module(block, mesh, plan)
        if sequence:
            into = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1))
            out = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())
            for style in (into, out):
                parallelize_module(block, mesh, style)
    return model


Make = Callable[[Any], torch.optim.Optimizer]
# AdamW divides by the gradient's size: with its own eps the rounding of a tiny gradient would become a whole step.
OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda tuner: shira.AdamW(tuner, lr=0.01, eps=1e-4, decay_towards="base"),
    "SGD": lambda tuner: shira.SGD(tuner, lr=0.1, momentum=0.9, weight_decay=0.1),
    "torch": lambda tuner: torch.optim.AdamW(tuner.parameters(), lr=0.01, eps=1e-4),
}


def fit(
    model: nn.Module, tuner: SparseTuner, ids: Tensor, optimizer: str, parts: int = 1, clip: float = 0.05
) -> tuple[Tensor, list[float]]:
    """Three steps of ``parts`` microbatches each; the losses, and the norms of the gradients."""
    made, losses, norms = OPTIMIZERS[optimizer](tuner), [], []
    for _ in range(3):
        total = torch.zeros(())
        for part in ids.chunk(parts):
            loss = loss_of(model, part) / parts
            loss.backward()
            total += loss.detach()
        norm: Any = torch.nn.utils.clip_grad_norm_(tuner.parameters(), clip)
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        made.step()
        made.zero_grad()
        losses.append(total)
        model.eval()
        with torch.no_grad():  # leaves the root gathered
            model(ids[:1])
        model.train()
    return torch.stack(losses), norms


def one_process(mask: masks.Mask, targets: str, optimizer: str) -> tuple[Tensor, list[float], shira.Adapter]:
    model = net()
    tuner = SparseTuner(model, mask, targets)
    losses, norms = fit(model, tuner, IDS, optimizer)
    return losses, norms, tuner.adapter()


def same(got: shira.Adapter, wanted: shira.Adapter, exact: bool = False) -> None:
    assert got.weights.keys() == wanted.weights.keys()
    for name, entry in wanted.weights.items():
        other = got.weights[name]
        assert torch.equal(other.indices, entry.indices), name
        assert (other.shape, other.granule, other.seed) == (entry.shape, entry.granule, entry.seed), name
        assert other.fingerprint == entry.fingerprint, name
        if exact:
            assert torch.equal(other.values, entry.values), name
        else:
            torch.testing.assert_close(other.values, entry.values, rtol=1e-6, atol=1e-7)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def base_is_back(model: nn.Module) -> None:
    for name, wanted in net().state_dict().items():
        assert torch.equal(full(model.state_dict()[name]), wanted), name
    assert not any(hasattr(module, "_shira_sites") for module in model.modules())


def my(mesh: DeviceMesh) -> Tensor:
    return IDS.chunk(mesh.size())[mesh.get_local_rank()]


def like_one_process(
    model: nn.Module, tuner: SparseTuner, ids: Tensor, mask: masks.Mask, targets: str, optimizer: str, **options: int
) -> None:
    losses, norms, adapter = one_process(mask, targets, optimizer)
    got, got_norms = fit(model, tuner, ids, optimizer, **options)
    if ids.shape != IDS.shape:  # data parallel
        dist.all_reduce(got)
        got /= dist.get_world_size()
    torch.testing.assert_close(got, losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(got_norms), torch.tensor(norms), rtol=1e-5, atol=0)
    same(tuner.adapter(), adapter)
    tuner.verify()


# ---- what is checked -----------------------------------------------------------------------------------------


def fsdp(mesh: DeviceMesh, both: DeviceMesh) -> None:
    magnitude = masks.WeightMagnitude(density=0.1)
    for mask, targets, optimizer, options in (
        (RAND, LINEAR, "AdamW", {}),
        (masks.Struct(density=0.2), LINEAR, "SGD", {"reshard_after_forward": False}),
        (magnitude, f"{LINEAR}|embed", "torch", {"shard_placement_fn": lambda p: Shard(p.dim() - 1) if p.shape[-1] % 4 == 0 else None}),
    ):  # fmt: skip
        model = shard(net(), mesh, **options)
        tuner = SparseTuner(model, mask, targets)
        like_one_process(model, tuner, my(mesh), mask, targets, optimizer)
        tuner.detach()
        base_is_back(model)


def attached_before(mesh: DeviceMesh, both: DeviceMesh) -> None:
    model = net(checkpointed=True)
    gone = weakref.ref(model.blocks[0].up.weight)
    tuner = SparseTuner(model, RAND, LINEAR)
    shard(model, mesh)
    trained = list(tuner.parameters())
    assert all(isinstance(values, DTensor) for values in trained)
    assert gone() is None  # nothing keeps a whole weight
    like_one_process(model, tuner, my(mesh), RAND, LINEAR, "AdamW")
    assert [*map(id, trained)] == [*map(id, tuner.parameters())]
    tuner.detach()
    base_is_back(model)
    # Before the tuner knows, a forward is refused.
    model = net()
    tuner = SparseTuner(model, RAND, LINEAR)
    shard(model, mesh)
    with refused(
        RuntimeError, r"was replaced .* make the optimizer from tuner\.parameters\(\), or to call tuner\.sync"
    ):
        model(my(mesh))


def tensor_parallel(mesh: DeviceMesh, both: DeviceMesh) -> None:
    for mask, optimizer, sequence in (
        (RAND, "AdamW", False),
        (masks.WeightMagnitude(density=0.1, granule=2), "torch", True),
        (masks.Rand(density=0.2, granule=16), "SGD", False),  # four ranks cut the granules of `down` in two
    ):
        model = parallel(net(), mesh, sequence)
        tuner = SparseTuner(model, mask, "up|down")
        like_one_process(model, tuner, IDS, mask, "up|down", optimizer)
        tuner.detach()
        base_is_back(model)


def fsdp_and_tensor_parallel(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """Both divide the rows of ``up``; two microbatches each."""
    for mask, optimizer, sequence in ((RAND, "AdamW", True), (masks.WeightMagnitude(density=0.1), "torch", False)):
        model = shard(parallel(net(), both["tp"], sequence), both["dp"])
        tuner = SparseTuner(model, mask, "up|down")
        like_one_process(model, tuner, my(both["dp"]), mask, "up|down", optimizer, parts=2)
        with tuner.disabled():
            trained = full(model.blocks[0].up.weight)
            assert torch.equal(trained, net().blocks[0].up.weight)
        tuner.verify()
        tuner.detach()
        base_is_back(model)


def hybrid(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """Two replicas of two shards each, and values that are divided between all four."""
    model = shard(net(), both)
    tuner = SparseTuner(model, RAND, LINEAR)
    like_one_process(model, tuner, my(mesh), RAND, LINEAR, "AdamW", parts=1)
    assert all(values.to_local().numel() <= -(-values.numel() // 4) for values in tuner.parameters())
    tuner.detach()
    base_is_back(model)


CHECKS = (fsdp, attached_before, tensor_parallel, fsdp_and_tensor_parallel, hybrid)


@contextmanager
def refused(kind: type[Exception], says: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert re.search(says, str(error)), error
    else:
        raise AssertionError(f"nothing was refused; it should say {says}")


def main() -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    chosen = sys.argv[2:]
    for check in CHECKS:
        if not chosen or check.__name__ in chosen:
            check(mesh, both)
            Path(sys.argv[1], f"{check.__name__}.{dist.get_rank()}").touch()


if __name__ == "__main__":
    main()
