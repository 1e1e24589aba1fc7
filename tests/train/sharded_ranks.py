"""What every rank does in `test_sharded`: a program for ``ranks.py``."""

from __future__ import annotations

import copy
import resource
import sys
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import shira
from sharding import Block, parallel, shard
from shira import SparseTuner, _shards, masks
from shira.train import _sharded

RAND = masks.Rand(density=0.1, granule=4)
LINEAR = "up|down|head"
IDS = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(1))


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
    """Two steps of ``parts`` microbatches each; the losses, and the norms of the gradients."""
    made, losses, norms = OPTIMIZERS[optimizer](tuner), [], []
    for _ in range(2):
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


def my(mesh: DeviceMesh, batch: Tensor = IDS) -> Tensor:
    return batch.chunk(mesh.size())[mesh.get_local_rank()]


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


def boxes(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """What a rank holds of torch's own tensors: uneven, padded, empty, divided twice."""
    several = [
        distribute_tensor(torch.randn(*shape, generator=torch.Generator().manual_seed(5)), where, placements)
        for where, shape, placements in (
            (mesh, (6, 8), [Shard(0)]),
            (mesh, (2, 8), [Shard(0)]),
            (mesh, (3, 10), [Shard(1)]),
            (both, (5, 6, 8), [Shard(2), Shard(0)]),
            (both, (7, 8), [Shard(0), Shard(0)]),
            (both, (5, 8), [Replicate(), Shard(0)]),
        )
    ]
    odd = nn.Sequential(nn.Linear(10, 7), nn.Linear(7, 10))
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    several += fully_shard(parallelize_module(odd, both["tp"], plan), mesh=both["dp"]).parameters()
    for weight in several:
        box, local = _shards.Box.of(weight), _shards.local(weight)
        at = box.globally(torch.arange(local.numel()), 1)
        whole = weight.detach().full_tensor()
        assert torch.equal(local.flatten(), whole.flatten()[at])
        first = torch.tensor([_shards.is_first(weight) * local.numel()])
        dist.all_reduce(first)
        assert first == whole.numel()


def fsdp(mesh: DeviceMesh, both: DeviceMesh) -> None:
    by_columns = {"shard_placement_fn": lambda p: Shard(p.dim() - 1) if p.shape[-1] % 4 == 0 else None}
    gathered = {"reshard_after_forward": False}
    for mask, targets, optimizer, options in (
        (RAND, LINEAR, "AdamW", {}),
        (masks.Struct(density=0.2), LINEAR, "SGD", gathered),
        (masks.WeightMagnitude(density=0.1), f"{LINEAR}|embed", "torch", by_columns),
    ):
        model: Any = shard(net(), mesh, **options)
        model.set_reshard_after_backward(not options)  # what FSDP keeps gathered must follow a step too
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
    # Without a word to the tuner it goes on at the next forward; an optimizer that was made before is refused.
    model = net()
    tuner = SparseTuner(model, RAND, LINEAR)
    early = torch.optim.AdamW(tuner.parameters(), lr=0.01)
    shard(model, mesh)
    loss_of(model, my(mesh)).backward()
    with pytest.raises(RuntimeError, match=r"was replaced .* if the optimizer is made from tuner\.parameters\(\) then"):
        early.step()
    for values in tuner.parameters():
        values.grad = None
    like_one_process(model, tuner, my(mesh), RAND, LINEAR, "AdamW")
    tuner.detach()
    base_is_back(model)


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


def masks_by_gradients(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """Batches of several ranks, and layers that several ranks compute: the mask of one process on all batches."""
    batches = [IDS[i : i + 1].roll(turn, 1) for i in range(4) for turn in (0, 1)]
    rank, half = dist.get_rank(), both["dp"].get_local_rank()
    every, own = batches, batches[2 * rank :][:2]
    two, four, of_half = batches[:2], batches[:4], batches[2 * half :][:2]
    skip = masks.WeightMagnitude(density=0.05, skip=masks.Grad(density=0.05))
    for mask, make, whole, given in (
        (masks.Snip(density=0.1), lambda: shard(net(), mesh), every, own),
        (masks.Grad(density=0.1, granule=4, balanced=True), lambda: shard(net(), both), every, own),
        (masks.Rand(density=0.1, skip=masks.Grad(density=0.1)), lambda: shard(net(), mesh), every, own),
        (masks.Grad(density=0.1, granule=16), lambda: parallel(net(), mesh, sequence=True), two, two),
        (masks.Snip(density=0.1, balanced=True, skip=skip), lambda: parallel(net(), mesh), two, two),
        (masks.Grad(density=0.1), lambda: shard(parallel(net(), both["tp"]), both["dp"]), four, of_half),
        (
            masks.Snip(density=0.1, granule=2),
            lambda: shard(parallel(net(checkpointed=True), both["tp"], True), both["dp"]), four, of_half,
        ),
    ):  # fmt: skip
        alone, model = net(), make()
        wanted = SparseTuner(alone, mask, "up|down", calibration=whole, loss=loss_of)
        tuner = SparseTuner(model, mask, "up|down", calibration=given, loss=loss_of)
        same(tuner.adapter(), wanted.adapter(), exact=True)
        tuner.detach()
        base_is_back(model)
    model = shard(net(), mesh)
    with pytest.raises(ValueError, match=r"calibration: the ranks have different numbers of batches, this one 1"):
        SparseTuner(model, masks.Grad(density=0.1), LINEAR, calibration=batches[: 1 + (rank == 1)], loss=loss_of)
    base_is_back(model)


def masks_of_whole_weights(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """Masks for which a weight is gathered."""
    makes: tuple[Callable[[], nn.Module], ...] = (
        lambda: parallel(net(), mesh),
        lambda: shard(parallel(net(), both["tp"]), both["dp"]),
        lambda: shard(net(), mesh),
    )
    several = (
        masks.Principal(density=0.1, rank=4),
        masks.WeightMagnitude(density=0.1, balanced=True),
        masks.Rand(density=0.1, skip=masks.WeightMagnitude(density=0.1)),
        masks.Given(lambda name, weight: weight > weight.mean()),
        masks.Struct(density=0.3, skip=SparseTuner(net(), RAND, LINEAR).adapter()),
    )
    for mask, make in zip(several, makes + makes, strict=False):
        wanted, model = SparseTuner(net(), mask, "up|down").adapter(), make()
        with SparseTuner(model, mask, "up|down") as tuner:
            same(tuner.adapter(), wanted, exact=True)
        base_is_back(model)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(7)) / 4)

    def forward(self, x: Tensor) -> Tensor:
        """Of tokens for each expert, in a row."""
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        return torch.bmm(x, weight)


def dense_gradients(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """Whole parameters, masks of dense gradients, and layers whose gradient only torch knows."""
    paper: dict[str, Any] = {"gradient": "dense", "whole": r"norm|0\.up\.bias"}
    head: dict[str, Any] = {"whole": ["head", "blocks.1.norm"]}
    table: Any = {"embed": RowwiseParallel(input_layouts=Replicate())}
    for make, later, targets, options, parts, ids in (
        (lambda: shard(net(), mesh), None, "up|embed", head, 1, my(mesh)),
        (lambda: shard(net(), both, reshard_after_forward=False), None, "up|down", paper, 1, my(mesh)),
        (lambda: parallel(net(), mesh, True), None, "up|down", paper, 1, IDS),
        (lambda: shard(parallel(net(), both["tp"], True), both["dp"]), None, "up|down", paper, 2, my(both["dp"])),
        (lambda: parallelize_module(net(), mesh, table), None, "embed", {}, 1, IDS),
        # The tuner comes first.
        (net, lambda model: shard(model, mesh), "up|embed", head, 1, my(mesh)),
        (net, lambda model: shard(model, mesh, reshard_after_forward=False), "up|down", paper, 1, my(mesh)),
    ):  # fmt: skip
        alone, model = net(), make()
        wanted = SparseTuner(alone, RAND, targets, **options)
        tuner = SparseTuner(model, RAND, targets, **options)
        if later is not None:
            later(model)
            loss_of(model, ids).backward()  # at this forward the tuner goes on
            for values in tuner.parameters():
                values.grad = None
        losses, norms = fit(alone, wanted, IDS, "AdamW", parts)
        got, got_norms = fit(model, tuner, ids, "AdamW", parts)
        if ids.shape != IDS.shape:
            dist.all_reduce(got)
            got /= dist.get_world_size()
        torch.testing.assert_close(got, losses, rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.tensor(got_norms), torch.tensor(norms), rtol=1e-5, atol=0)
        same(tuner.adapter(), wanted.adapter())
        assert not any(weight.grad is not None for weight in model.parameters() if weight.shape == (32, 16))
        with tuner.disabled():
            assert_same_output(model, net())
            assert not model.get_parameter("embed.weight").requires_grad
        tuner.verify()
        tuner.detach()
        base_is_back(model)


def experts(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """Stacks of weights: divided by FSDP in any of their dimensions, and one expert on each rank."""
    x = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(8))

    def trained(model: nn.Module, given: Tensor, tokens: int) -> shira.Adapter:
        tuner = SparseTuner(model, RAND, "weight")
        optimizer = shira.SGD(tuner, lr=0.1)
        for _ in range(2):
            (model(given).square().sum() / tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        adapter = tuner.adapter()
        tuner.detach()
        assert torch.equal(full(model.weight), Experts().weight)
        return adapter

    wanted = trained(Experts(), x, 32)
    for dim in range(3):
        model = fully_shard(Experts(), mesh=mesh, shard_placement_fn=lambda _, dim=dim: Shard(dim))
        same(trained(model, x.chunk(4, 1)[dist.get_rank()], 8), wanted)
    model = Experts()
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
    same(trained(model, x[dist.get_rank()][None], 32), wanted)


def few_entries(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """Fewer than there are ranks; and what FSDP keeps on a smaller mesh after a forward pass."""
    mask = masks.Rand(density=1e-9)
    model = shard(net(), mesh, reshard_after_forward=2)
    tuner = SparseTuner(model, mask, LINEAR)
    like_one_process(model, tuner, my(mesh), mask, LINEAR, "AdamW")
    assert [values.to_local().numel() for values in tuner.parameters()] == [int(dist.get_rank() == 0)] * 5
    tuner.detach()
    base_is_back(model)


def convolution(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """Also over two backward passes, of which FSDP would reduce the second one alone."""

    def layers() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv1d(8, 8, 3), nn.ReLU(), nn.Conv1d(8, 16, 3))

    x = torch.randn(4, 8, 9, generator=torch.Generator().manual_seed(0))
    alone, model = layers(), fully_shard(layers(), mesh=mesh)
    tuner, wanted = (SparseTuner(one, masks.WeightMagnitude(density=0.1), "0|2") for one in (model, alone))
    for last in (False, True):
        model.set_requires_gradient_sync(last)
        model(my(mesh, x)).square().mean().backward()
        alone(x).square().mean().backward()
    for values, other in zip(tuner.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(full(values.grad), other.grad, rtol=1e-5, atol=1e-7)


def hybrid(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """Two replicas of two shards each, and values that are divided between all four."""
    model = shard(net(), both)
    tuner = SparseTuner(model, RAND, LINEAR)
    before, _sharded._BUCKET = _sharded._BUCKET, 60  # several collectives
    like_one_process(model, tuner, my(mesh), RAND, LINEAR, "AdamW")
    _sharded._BUCKET = before
    assert all(values.to_local().numel() <= -(-values.numel() // 4) for values in tuner.parameters())
    assert tuner.summary().endswith("the values are divided between 4 ranks")
    tuner.detach()
    base_is_back(model)


def tied(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """An embedding and the head that shares it, with their gradients from two layers."""

    def model_of() -> Net:
        model = net()
        model.head.weight = model.embed.weight
        return model

    alone, model = model_of(), shard(model_of(), mesh)
    wanted = SparseTuner(alone, RAND, "head")
    losses, _ = fit(alone, wanted, IDS, "SGD")
    tuner = SparseTuner(model, RAND, "head")
    got, _ = fit(model, tuner, my(mesh), "SGD")
    dist.all_reduce(got)
    torch.testing.assert_close(got / 4, losses, rtol=1e-6, atol=0)
    same(tuner.adapter(), wanted.adapter())
    assert tuner.adapter().weights["embed.weight"].aliases == ("head.weight",)


def by_hand(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """DTensors without a style of torch's: a weight that every rank has, for the same tokens or for a part of them
    each; and a weight whose rows and columns are divided."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
    alone = nn.Linear(16, 32)
    wanted = SparseTuner(alone, RAND)
    alone(x).square().sum().backward()
    tiled = [Shard(0), Shard(1)]
    for where, placements, of_weight in (
        (mesh, [Replicate()], [Replicate()]),
        (mesh, [Shard(0)], [Replicate()]),
        (both, [Replicate(), Replicate()], tiled),
        (both, [Shard(0), Shard(1)], tiled),
    ):
        layer = nn.Linear(16, 32)
        layer.load_state_dict({"weight": full(wanted.model.weight), "bias": alone.bias}, strict=False)
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), where, of_weight))
        distribute_module(layer, where)
        tuner = SparseTuner(layer, RAND)
        layer(distribute_tensor(x, where, placements)).square().sum().backward()
        [values], [other] = tuner.parameters(), wanted.parameters()
        torch.testing.assert_close(full(values.grad), other.grad)


def offloaded(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """Right where the weights stay on the device that computes, refused where they do not."""
    model = shard(net(), mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceMesh, "device_type", "cuda")
        with pytest.raises(ValueError, match=r"weight is kept on cpu by a CPUOffloadPolicy and computed with on cuda"):
            SparseTuner(model, RAND, LINEAR)
    base_is_back(model)
    tuner = SparseTuner(model, RAND, LINEAR)
    like_one_process(model, tuner, my(mesh), RAND, LINEAR, "AdamW")
    tuner.detach()
    base_is_back(model)


def edits_and_states(mesh: DeviceMesh, both: DeviceMesh) -> None:
    model, alone = shard(net(), mesh), net()
    tuner, other = SparseTuner(model, RAND, LINEAR), SparseTuner(alone, RAND, LINEAR)
    for one in (tuner, other):
        with torch.no_grad():
            for values in one.parameters():
                values.mul_(1.5)
    for _ in range(2):  # the second one is gathered already
        assert_same_output(model, alone)
        with torch.no_grad():
            for one in (tuner, other):
                for values in one.parameters():
                    values.add_(0.25)
    same(tuner.adapter(), other.adapter(), exact=True)
    state, saved = tuner.state_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {name: entry["values"].tolist() for name, entry in state["weights"].items()} == {
        name: entry["values"].tolist() for name, entry in other.state_dict()["weights"].items()
    }
    fit(model, tuner, my(mesh), "SGD")
    tuner.load_state_dict(other.state_dict())
    same(tuner.adapter(), other.adapter(), exact=True)
    fit(model, tuner, my(mesh), "SGD")
    model.load_state_dict(saved)
    same(tuner.adapter(), other.adapter(), exact=True)
    other.load_state_dict(state)
    with tuner.disabled():
        assert_same_output(model, net())
    assert_same_output(model, alone)
    failing = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # FSDP keeps what it has gathered until then
        model(IDS)
    failing.remove()
    with tuner.disabled():
        assert_same_output(model, net())
    assert_same_output(model, alone)


def assert_same_output(model: nn.Module, alone: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), alone(IDS), rtol=1e-6, atol=1e-6)


def mixed_precision(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """bf16 while it computes; values, moments and what is added up stay fp32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model, alone = shard(net(), mesh, mp_policy=policy), net()
    tuner, other = SparseTuner(model, RAND, LINEAR), SparseTuner(alone, RAND, LINEAR)
    loss_of(model, my(mesh)).backward()
    loss_of(alone, IDS).backward()
    for values, wanted in zip(tuner.parameters(), other.parameters(), strict=True):
        assert values.grad is not None
        assert values.grad.dtype == torch.float32
        assert wanted.grad is not None
        distance = (full(values.grad) - wanted.grad).norm() / wanted.grad.norm()
        assert distance < 0.02
    optimizer = shira.AdamW(tuner, lr=0.01)
    optimizer.step()
    up = model.blocks[0].up
    entries = full(up.weight).view(-1, 4)[up.weight_shira_indices].view(-1)
    assert torch.equal(entries, full(up.weight_shira_values))
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}
    half = shard(net().bfloat16(), mesh)
    tuner = SparseTuner(half, RAND, LINEAR)
    fit(half, tuner, my(mesh), "AdamW")
    assert {entry.values.dtype for entry in tuner.adapter().weights.values()} == {torch.bfloat16}
    tuner.verify()
    # A factor of one's own, instead of the mean over the ranks.
    other.model.zero_grad()
    model = shard(net(), mesh)
    for module in (model, *model.blocks):
        module.set_gradient_divide_factor(2.0)
    tuner = SparseTuner(model, RAND, LINEAR)
    loss_of(model, my(mesh)).backward()
    loss_of(alone, IDS).backward()
    for values, wanted in zip(tuner.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(full(values.grad), 2 * wanted.grad, rtol=1e-5, atol=1e-8)


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends or receives for values and gradients, in all and at most in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            frame: Any = sys._getframe()
            while frame is not None and frame.f_globals.get("__name__") != "shira.train._sharded":
                frame = frame.f_back
            if frame is not None:
                tensors = [one for one in tree_leaves(args) if isinstance(one, Tensor)]
                self.bytes += max(one.nbytes for one in tensors)
                self.most = max(self.most, *(one.nbytes for one in tensors))
        return func(*args, **(kwargs or {}))


class Dense(TorchDispatchMode):
    """Counts what is computed of a shape, that of a weight: its dense gradient."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        moved = func.is_view or func.namespace in ("c10d", "fsdp")  # weights, as FSDP gathers them
        tensors = [one for one in tree_leaves(found) if isinstance(one, Tensor)]
        self.count += sum(not moved and tuple(one.shape) == self.shape for one in tensors)
        return found


def budget(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """Bytes a rank, and bytes a step, for a mask of which one rank has nearly all entries."""
    torch.manual_seed(0)
    layers = [nn.Linear(128, 128, bias=False) for _ in range(2)]
    with torch.no_grad():
        layers[0].weight[:32] *= 100
    model = fully_shard(nn.Sequential(*layers), mesh=mesh)
    tuner = SparseTuner(model, masks.WeightMagnitude(density=0.1))
    optimizer = shira.AdamW(tuner, lr=0.01)
    requires = []
    layers[1].register_forward_hook(lambda module, *_: requires.append(module.weight.requires_grad))
    traffic, dense, control = Traffic(), Dense(128, 128), Dense(128, 128)
    for step in range(2):
        with traffic if step else nullcontext():
            loss = model(torch.ones(4, 128)).sum()
            with dense:
                loss.backward()
            optimizer.step()
    loss = nn.Linear(128, 128)(torch.ones(4, 128)).sum()
    with control:
        loss.backward()
    assert (dense.count, control.count > 0) == (0, True)
    assert requires == [False, False]  # so autograd makes no gradient of it
    assert all(module.weight.grad is None for module in layers)
    assert 0 < traffic.bytes <= 3 * 4 * tuner.nnz, (traffic.bytes, tuner.nnz)
    held = [one for state in optimizer.state.values() for one in state.values() if isinstance(one, DTensor)]
    held += list(tuner.parameters())
    own = sum(one.to_local().nbytes for one in held)
    assert own <= 1.1 * 3 * 4 * tuner.nnz / 4, (own, tuner.nnz)


def files(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """The first rank writes the file of one process, one weight at a time; and says to the others if it cannot."""
    rank = dist.get_rank()
    for make, options, dtype in (
        (lambda: shard(net(), mesh), {}, torch.float32),
        (lambda: shard(parallel(net().bfloat16(), both["tp"]), both["dp"]), {"seeds": True}, torch.bfloat16),
        (lambda: shard(net().bfloat16(), both), {"version": 2}, torch.bfloat16),
    ):
        model, alone = make(), net().to(dtype)
        tuner, other = (SparseTuner(one, masks.Rand(density=0.1), "up|down") for one in (model, alone))
        for one in (tuner, other):
            with torch.no_grad():
                for values in one.parameters():
                    values.mul_(1.5)
        other.save(f"alone.{rank}.safetensors", alpha=0.5, provenance={"data": "none"}, **options)
        before, _sharded._BUCKET = _sharded._BUCKET, 1
        with Traffic() as traffic:
            tuner.save("together.safetensors", alpha=0.5, provenance={"data": "none"}, **options)
        _sharded._BUCKET = before
        largest = max(values.numel() for values in tuner.parameters()) * dtype.itemsize
        assert traffic.most <= largest + 4 * dtype.itemsize, (traffic.most, largest)
        assert Path("together.safetensors").read_bytes() == Path(f"alone.{rank}.safetensors").read_bytes()
        dist.barrier()  # before the file is written anew
        with pytest.raises(FileNotFoundError if rank == 0 else RuntimeError, match=r"the folder 'gone' to write 'a'"):
            tuner.save("gone/a")
    before_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before_limit[1]))
    with pytest.raises(OSError if rank == 0 else RuntimeError, match=r"File too large"):  # while it is written
        tuner.save("together.safetensors")
    resource.setrlimit(resource.RLIMIT_FSIZE, before_limit)
    assert Path("together.safetensors").read_bytes() == Path(f"alone.{rank}.safetensors").read_bytes()


def checkpoint_to_resume(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """For `resume_ranks`, which goes on with other ranks."""
    model = shard(net(), mesh)
    dcp.save(model.state_dict(), checkpoint_id="base")
    tuner = SparseTuner(model, RAND, LINEAR)
    optimizer = OPTIMIZERS["AdamW"](tuner)
    for step in range(3):
        if step == 2:
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"weights": weights, "moments": moments}, checkpoint_id="checkpoint")
        loss_of(model, my(mesh)).backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter = tuner.adapter()
        if dist.get_rank() == 0:
            adapter.save(f"{step}.safetensors")


def continued(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """An adapter of one process goes on training, as new entries and as what is added."""
    _, _, overwrites = one_process(RAND, "up|down", "SGD")
    for adapter in (overwrites, overwrites.to_delta(net().state_dict())):
        alone = net()
        wanted = SparseTuner.from_adapter(alone, adapter)
        fit(alone, wanted, IDS, "AdamW")
        for model, ids in ((shard(net(), mesh), my(mesh)), (parallel(net(), both["tp"]), IDS)):
            tuner = SparseTuner.from_adapter(model, adapter)
            start = SparseTuner.from_adapter(net(), adapter)
            same(tuner.adapter(), start.adapter(), exact=True)
            for name, weight in start.model.state_dict().items():
                if "shira" not in name:
                    assert torch.equal(full(model.state_dict()[name]), weight), name
            fit(model, tuner, ids, "AdamW")
            same(tuner.adapter(), wanted.adapter())
            tuner.detach()
            base_is_back(model)
    model = shard(net(), mesh)
    other = SparseTuner(net(), masks.Rand(density=0.1, granule=4, seed=dist.get_rank()), "up").adapter()
    with pytest.raises(ValueError, match="the ranks have different adapters; give every rank the same file"):
        SparseTuner.from_adapter(model, other)
    with torch.no_grad():
        model.blocks[0].up.weight.add_(1)
    with pytest.raises(
        shira.AdapterError, match=r"another base: .* 1 of 4 weights differs .*: 'blocks\.0\.up\.weight'"
    ):
        SparseTuner.from_adapter(model, overwrites)


def refusals(mesh: DeviceMesh, both: DeviceMesh) -> None:
    rank = dist.get_rank()
    model = shard(net(), mesh)
    before = [*map(id, model.parameters())]
    with pytest.raises(ValueError, match=r"the ranks have different masks, this one Rand\(.*seed="):
        SparseTuner(model, masks.Rand(density=0.1, seed=rank), LINEAR)
    with pytest.raises(ValueError, match=r"the ranks train different weights, this one"):
        SparseTuner(model, RAND, "up" if rank else "down")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sharded, "_version", lambda: f"0.{rank}")
        with pytest.raises(ValueError, match=rf"run different versions of shira, this one 0\.{rank}; install"):
            SparseTuner(model, RAND, LINEAR)
    marked = {"head.weight": (torch.arange(11 * 16).view(11, 16) % 5 == rank)}
    with pytest.raises(ValueError, match=r"the ranks have different masks, this one Given"):
        SparseTuner(model, marked)
    same_mask = masks.Given({"head.weight": torch.arange(11 * 16).view(11, 16) % 5 == 0})
    with SparseTuner(model, same_mask) as tuner:
        same(tuner.adapter(), SparseTuner(net(), same_mask).adapter(), exact=True)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.up\.weight is a DTensor in a Linear, which nothing can be laid ov"
    ):
        SparseTuner(model, RAND, "up", overlay=True)
    without_names = nn.Linear(16, 32)
    distribute_module(without_names, init_device_mesh("cpu", (2, 2)))
    with pytest.raises(ValueError, match=r"weight is on a device mesh of several dimensions without names"):
        SparseTuner(without_names, RAND)
    column = nn.Linear(16, 32, bias=False)
    local = column.weight.detach().t().contiguous().t()
    column.weight = nn.Parameter(DTensor.from_local(local, mesh, [Replicate()]))
    with pytest.raises(
        ValueError, match=r"SparseTuner: weight (must be contiguous|is a DTensor whose local tensor is)"
    ):
        SparseTuner(column, RAND)
    ignoring = net()
    fully_shard(ignoring, mesh=mesh, ignored_params={ignoring.head.weight})
    with pytest.raises(ValueError, match=r"head\.weight is not sharded, and nothing would average its gradient"):
        SparseTuner(ignoring, RAND, "head")
    with pytest.raises(ValueError, match=r"head\.weight is not sharded, and nothing would average its gradient"):
        SparseTuner(ignoring, RAND, "head", overlay=True)
    with pytest.raises(ValueError, match=r"Snip: needs calibration batches: SparseTuner"):
        SparseTuner(model, masks.Snip(density=0.1), LINEAR)
    with pytest.raises(ValueError, match=r"calibration: embed\.weight is sharded"):
        SparseTuner(model, masks.Grad(density=0.1), "embed", calibration=[my(mesh)], loss=loss_of)
    part = parallel(net(), mesh)
    with pytest.raises(
        ValueError, match=r"head\.weight is not sharded, but blocks\.0\.up\.weight is, and nothing says"
    ):
        SparseTuner(part, RAND, LINEAR)
    both_meshes = parallel(net(), mesh)
    parallelize_module(both_meshes, both["tp"], {"head": ColwiseParallel()})
    with pytest.raises(
        ValueError, match=r"blocks\.0\.up\.weight is on the device mesh .* a tuner trains weights of one mesh"
    ):
        SparseTuner(both_meshes, RAND, LINEAR)
    assert before == [*map(id, model.parameters())]
    base_is_back(model)
    with (
        SparseTuner(part, RAND, "up"),
        pytest.raises(TypeError, match=r"sharded weights cannot be copied or pickled while a tune"),
    ):
        copy.deepcopy(part)
    dense = net()
    tuner = SparseTuner(dense, RAND, LINEAR, gradient="dense")
    shard(dense, both)
    tuner.parameters()
    with pytest.raises(RuntimeError, match=r"was replaced by another parameter after the tuner was attached"):
        dense(my(mesh))
    in_part = net()
    tuner = SparseTuner(in_part, RAND, LINEAR)
    for block in in_part.blocks:
        fully_shard(block, mesh=mesh)
    for call in (lambda: in_part(my(mesh)), tuner.adapter):
        with pytest.raises(RuntimeError, match=r"up\.weight was replaced by .* After fully_shard of the whole model"):
            call()
    for seed, more, what in ((rank, 0, "masks"), (0, rank, "base weights")):
        differ = net()
        with torch.no_grad():
            differ.blocks[0].up.weight[0, 0] += more
        tuner = SparseTuner(differ, masks.Rand(density=0.1, seed=seed), "0.up")
        shard(differ, mesh)
        tuner.sync()
        with pytest.raises(ValueError, match=rf"the ranks have different {what} for blocks\.0\.up\.weight; "):
            loss_of(differ, my(mesh)).backward()
    other_ranks(mesh, both)


def other_ranks(mesh: DeviceMesh, both: DeviceMesh) -> None:
    """States of another number of ranks, as one would load them without a checkpoint that divides them anew."""
    model = shard(net(), mesh)
    tuner = SparseTuner(model, RAND, LINEAR)
    fit(model, tuner, my(mesh), "AdamW")
    optimizer = shira.AdamW(tuner)
    before = tuner.adapter()

    def divided(tensor: Tensor) -> Tensor:
        two = [Shard(0), Replicate()]
        return distribute_tensor(tensor, both, two)

    state = optimizer.state_dict()
    for number, values in enumerate(tuner.parameters()):
        whole = torch.ones(values.shape)
        state["state"][number] = {"step": torch.tensor(1.0), "exp_avg": divided(whole), "exp_avg_sq": divided(whole)}
    with pytest.raises(
        ValueError, match=r"shira\.AdamW: exp_avg of parameter 0 .* is divided between other ranks; torch"
    ):
        optimizer.load_state_dict(state)
    assert not optimizer.state
    with pytest.raises(RuntimeError):
        model.load_state_dict({name: divided(full(tensor)) for name, tensor in model.state_dict().items()})
    same(tuner.adapter(), before, exact=True)


CHECKS = (
    boxes, fsdp, attached_before, tensor_parallel, fsdp_and_tensor_parallel, masks_by_gradients, masks_of_whole_weights,
    dense_gradients, experts, few_entries, convolution, hybrid, tied, by_hand, offloaded, edits_and_states,
    mixed_precision, budget, files, continued, refusals,
    checkpoint_to_resume,
)  # fmt: skip


def main() -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for check in CHECKS:
        check(mesh, both)
    Path(f"done.{dist.get_rank()}").touch()


if __name__ == "__main__":
    main()
