"""What every rank does in `test_sharded_serving`: a program for ``ranks.py``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    parallelize_module,
)  # fmt: skip

import sharding
import shira
from sharding import shard
from shira import Adapter, AdapterError, Entry, Overlay, Switcher, _granules, _shards
from shira.serve import _layout

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


def parallel(model: Any, mesh: DeviceMesh, sequence: bool = False) -> nn.Module:
    sharding.parallel(model, mesh, sequence)
    weight = model.experts.weight
    model.experts.weight = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
    return model


STATES: list[dict[str, float]] = [
    {"a": 1.0}, {"b": 0.5}, {"a": 0.3}, {"a": 0.7}, {"a": 0.5, "b": 1.0, "c": -0.5}, {"b": 1.0, "c": 0.25}, {},
    {"c": 1.0},
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
    for strengths in STATES if dist.get_world_size() == 2 else STATES[1::2]:
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
    walk(shard(net(), mesh), net())
    walk(shard(net(torch.bfloat16), mesh, reshard_after_forward=False), net(torch.bfloat16))


def costs(mesh: DeviceMesh) -> None:
    """Each entry is kept by one rank, and a switch takes one exchange of 32 bytes."""
    base = net()
    given, switcher = adapter(base, 1), Switcher(shard(net(), mesh))
    switcher.add("a", given)
    switcher.add("b", adapter(base, 2))
    kept = torch.tensor(switcher.memory()["a"].device)
    assert kept < 0.6 * given.nbytes * 2
    dist.all_reduce(kept)
    assert kept == sum(entry.indices.nbytes + 2 * entry.values.nbytes for entry in given.weights.values())
    sent: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("allgather", "_allgather_base", "allreduce", "broadcast", "barrier"):
            method = getattr(dist.ProcessGroup, name)

            def counted(group: Any, *args: Any, method: Any = method, **kwargs: Any) -> Any:
                sent.append(sum(one.nbytes for one in args[-1] if isinstance(one, Tensor)))
                return method(group, *args, **kwargs)

            patch.setattr(dist.ProcessGroup, name, counted)
        for strengths in ("a", "b", {"a": 1.0, "b": 0.5}, {"b": 0.5}):
            switcher.activate(strengths)
        switcher.deactivate()
        assert sent == [32] * 5
        switcher.add("again", given)  # for weights whose fingerprints are known
        assert sent[5:] == [32, 8 * 16, 32]


def tensor_parallel(mesh: DeviceMesh) -> None:
    walk(parallel(net(), mesh), net())


def everywhere(text: str) -> str:
    """What every rank says, which must be the same."""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, text)
    assert len(set(said)) == 1, said
    return text


def says(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, text


def refused(call: Callable[[], object], kind: type[Exception] = shira.SwitchError) -> str:
    """The error of a call, the same on every rank."""
    with pytest.raises(kind) as caught:
        call()
    return everywhere(str(caught.value))


def stop_in_writes(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Have the next switch fail when it has written to the weights."""
    written = _layout.Way._go

    def stop(way: Any, strengths: Any) -> None:
        written(way, strengths)
        patch.undo()
        raise error

    patch.setattr(_layout.Way, "_go", stop)


def all_or_nothing(mesh: DeviceMesh) -> None:
    """A failure on one rank takes everything back on all."""
    rank, base = dist.get_rank(), net()
    model = shard(net(), mesh)
    switcher = Switcher(model)
    switcher.add("a", adapter(base, 1))
    switcher.add("b", adapter(base, 2))
    switcher.activate("a")
    before = state(model)

    def unchanged() -> None:
        assert switcher.active == {"a": 0.75}
        assert [name for name in switcher.memory() if "+" not in name] == ["a", "b"]
        for name, tensor in state(model).items():
            assert torch.equal(tensor, before[name]), name
        switcher.verify(full=True)

    taken_back = "failed on rank 1 of 2, and nothing has changed on any: active is 'a' at 0.75. Rank 1: "
    # A bad file on one rank, and other content.
    file = Path(f"c{rank}.safetensors")
    adapter(base, 3).save(file)
    if rank == 1:
        file.write_bytes(file.read_bytes()[:-5])
    said = refused(lambda: switcher.add("c", file), AdapterError)
    says(said, f"Switcher: add('c', verify=True) {taken_back}", "c1.safetensors: this is not a whole safetensors file")
    said = refused(lambda: switcher.add("c", adapter(base, 3 + rank)))
    says(said, "the ranks did not agree on what to do, and nothing has changed on any: active is 'a' at 0.75. rank 0: ",
         "rank 1: an adapter of 16 weights and", "Give every rank the same adapter")  # fmt: skip
    unchanged()
    # The same error everywhere stays what it is.
    said = refused(lambda: switcher.add("a", adapter(base, 1)), AdapterError)
    assert said == "an adapter 'a' was already added; remove it first"
    assert refused(lambda: switcher.activate("c"), AdapterError) == "no adapter 'c' was added; there are: a, b"
    # Different calls.
    said = refused(lambda: switcher.activate("ab"[rank]))
    says(said, "rank 0: activate('a'), rank 1: activate('b'). Make the same calls in the same order on every rank")
    unchanged()
    # The same call of two Switchers.
    other = Switcher(shard(net(), mesh))
    other.add("b", adapter(base, 2))
    said = refused(lambda: (switcher, other)[rank].activate("b"))
    says(said, "the ranks did not agree on what to do, and nothing has changed on any: each has what it had before. "
               "rank 0: Switcher number ", "They are numbered as they were made for these ranks")  # fmt: skip
    unchanged()
    # Too little room on one rank.
    switcher.budget = 8000 if rank == 1 else None
    said = refused(lambda: switcher.activate({"a": 1.0, "b": 1.0}))
    says(said, taken_back, "and the budget is 8,000")
    switcher.budget = None
    unchanged()
    # An error and an interrupt after the writes of one rank.
    for error in (RuntimeError("out of memory"), KeyboardInterrupt()):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                stop_in_writes(patch, error)
            mine = KeyboardInterrupt if rank == 1 and isinstance(error, KeyboardInterrupt) else shira.SwitchError
            with pytest.raises(mine) as caught:
                switcher.activate("b")
        if mine is shira.SwitchError:
            says(str(caught.value), f"Switcher: activate('b') {taken_back}", str(error))
        unchanged()
    # Someone else writes to the part of one rank.
    weight = model.blocks[0].up.weight
    if rank == 1:
        _shards.local(weight)[0].add_(1)
    said = refused(lambda: switcher.activate("b"))
    says(said, taken_back, "Rank 1: Switcher: blocks.0.up.weight was changed by someone else")
    if rank == 1:
        _shards.local(weight)[0].sub_(1)
        _shards.local(weight).copy_(before["blocks.0.up.weight"].chunk(2)[1])
    switcher.activate("b")
    switcher.deactivate()
    same(model, base)
    # Another base on one rank is another base for all.
    if rank == 0:
        _shards.local(model.head.weight)[0].add_(1)
    other = Switcher(model)
    said = refused(lambda: other.add("a", adapter(base, 1)), AdapterError)
    says(said, "adapter 'a' was made for another base: the content of 1 of 16 weights differs", "head.weight")
    assert "rank" not in said


def blocks_and_room(mesh: DeviceMesh) -> None:
    """`using`, budgets with and without a folder, and what is kept."""
    base, model = net(), parallel(net(), mesh)
    alone = Switcher(base)
    given = {name: adapter(base, seed) for seed, name in enumerate("abc")}
    if dist.get_rank() == 0:
        given["a"].save("room.safetensors")
    dist.barrier()
    room = None
    for spill in (None, None, "spilled"):
        switcher = Switcher(model, spill=spill, budget=room)
        for name, one in given.items():
            if room is None:
                alone.add(name, one)
            switcher.add(name, "room.safetensors" if name == "a" else one)
        if room is None:
            kept = switcher.memory()
            for name, memory in alone.memory().items():  # norms, embedding and head are on both ranks
                assert kept[name].device < 0.75 * memory.device
                assert kept[name].host == 0
            room = int(2.5 * kept["a"].device)
            continue
        for name in "abcab":
            switcher.activate(name)
            alone.activate(name)
            same(model, base)
            there = switcher.memory().values()
            assert sum(memory.device for memory in there) <= room
            assert any(not memory.device for memory in there)
        assert bool(switcher.memory()["c"].disk) == (spill is not None)
        with switcher.using("c"), alone.using("c"):
            same(model, base)
            with switcher.disabled(), alone.disabled():
                same(model, base)
        same(model, base)
        assert switcher.active == {"b": 0.75}
        text = refused(lambda each=switcher: each.adapters)  # type: ignore[misc]
        says(text, "Switcher: of 'b' each rank has kept its own entries alone")
        switcher.remove("b")
        switcher.remove("c")
        alone.deactivate()
        same(model, base)
        assert torch.equal(switcher.adapters["a"].weights["head.bias"].values, given["a"].weights["head.bias"].values)


def gathered_weights(mesh: DeviceMesh) -> None:
    """What FSDP has gathered, or is about to, never serves old entries; nor does a backward pass."""
    base = net()
    alone = Switcher(base)
    alone.add("a", adapter(base, 1))
    model: Any = shard(net(), mesh, reshard_after_forward=False)
    model.unshard()
    switcher = Switcher(model)
    switcher.add("a", adapter(base, 1))
    for before in (model.unshard, lambda: model.unshard(async_op=True), lambda: model(IDS)):
        with torch.no_grad():
            for activate in (True, False):
                before()
                for each in (alone, switcher):
                    each.activate("a") if activate else each.deactivate()
                same(model, base)
                torch.testing.assert_close(model(IDS), base(IDS), rtol=1e-4, atol=1e-4)
    for each, where in ((switcher, model), (Switcher(parallel(net(), mesh)), None)):
        if where is None:
            where = each.model
            each.add("a", adapter(base, 1))
        out = where(IDS).sum()
        each.activate("a")
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()
        each.deactivate()
        where.zero_grad()


def other_memory(mesh: DeviceMesh) -> None:
    """Weights that were replaced, and those that are divided in another way."""
    base, model = net(), parallel(net(), mesh)
    switcher = Switcher(model)
    switcher.add("a", adapter(base, 1))
    switcher.activate("a")
    up = model.blocks[0].up
    up.weight = nn.Parameter(up.weight.detach().clone())
    assert "blocks.0.up.weight is no longer the parameter it was" in refused(switcher.deactivate)
    switcher.rebind()
    switcher.deactivate()
    same(model, base)
    switcher.activate("a")
    up.weight = nn.Parameter(up.weight.detach().clone())
    switcher.deactivate(verify=False)
    same(model, base)
    switcher.rebind()
    switcher.activate("a")
    columns = distribute_tensor(full(up.weight.detach()), mesh, [Shard(1)])
    rows, up.weight = up.weight, nn.Parameter(columns)
    for call in (switcher.rebind, lambda: switcher.deactivate(verify=False)):
        assert "blocks.0.up.weight is divided between ranks in another way" in refused(call)
    up.weight = rows
    switcher.deactivate()
    same(model, base)


def stages(mesh: DeviceMesh) -> None:
    """A pipeline: each rank has a block of its own, on a mesh of its own, and takes its part of the adapter."""
    rank, base = dist.get_rank(), net()
    groups = [dist.new_group([each]) for each in range(2)]
    model, whole = net().blocks[rank], adapter(base, 1)
    fully_shard(model, mesh=DeviceMesh.from_group(groups[rank], "cpu"))
    prefix = f"blocks.{rank}."
    part = Adapter({name: entry for name, entry in whole.weights.items() if name.startswith(prefix)}, alpha=whole.alpha)
    switcher, alone = Switcher(model), Switcher(base)
    switcher.add("a", part, rename={f"^{prefix}": ""})
    alone.add("a", whole)
    for _ in range(1 + rank):  # a stage does not wait for the other one
        for each in (switcher, alone):
            each.activate("a")
        same(model, base.blocks[rank])
        for each in (switcher, alone):
            each.deactivate()
        same(model, net().blocks[rank])


def other_stacks(mesh: DeviceMesh) -> None:
    """Columns by `shard_placement_fn`, weights kept on CPUs, a compiled model, and state dicts."""
    base = net()
    alone = Switcher(base)
    alone.add("a", adapter(base, 1))
    ways: list[dict[str, Any]] = [
        {"shard_placement_fn": lambda weight: Shard(weight.dim() - 1)},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {},
    ]
    for options in ways:
        model: Any = shard(net(), mesh, **options)
        called = model if options else torch.compile(model, backend="eager")
        switcher = Switcher(model)
        switcher.add("a", adapter(net(), 1))
        for names in ({"a": 0.5}, {}, {"a": 1.0}):
            for each in (alone, switcher):
                each.activate(names) if names else each.deactivate()
            same(model, base)
            with torch.no_grad():
                torch.testing.assert_close(called(IDS), base(IDS), rtol=1e-3, atol=1e-3)
    # The base comes back while a checkpoint is written, which has what was active.
    pending = dcp.async_save(model.state_dict(), checkpoint_id="written", process_group=dist.new_group())
    switcher.deactivate()
    pending.result()
    same(model, net())
    loaded = shard(net(), mesh)
    found = loaded.state_dict()
    dcp.load(found, checkpoint_id="written")
    loaded.load_state_dict(found)
    same(loaded, base)
    # A state dict of what is active, loaded again, changes nothing; that of the base is someone else's write.
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    switcher.activate({"a": 1.0})
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    switcher.activate({"a": 1.0})
    model.load_state_dict(kept)
    says(refused(switcher.deactivate), "embed.weight was changed by someone else", "deactivate(verify=False) puts the")
    switcher.deactivate(verify=False)
    same(model, net())


def linear_only(base: nn.Module, seed: int, delta: bool = False, whole: str = "") -> Adapter:
    """Entries of what an overlay can be laid over."""
    made = adapter(base, seed, 8, delta, whole)
    return Adapter({name: entry for name, entry in made.weights.items() if "norm" not in name and "exp" not in name},
                   alpha=0.75, delta=delta)  # fmt: skip


def lay(model: nn.Module, base: Net, exact: bool) -> None:
    """The same outputs as in one process, for all samples alike and for each its own."""
    alone, overlay = Overlay(base), Overlay(model)
    switched = net(base.head.weight.dtype)
    switcher = Switcher(switched)
    for seed, name in enumerate("abc"):
        given = linear_only(base, seed, name == "b", "head" if name == "c" else "")
        alone.add(name, given)
        overlay.add(name, given)
        switcher.add(name, given)
    wanted = base(IDS)
    torch.testing.assert_close(model(IDS), wanted, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-4)
    for which in ("a", {"a": 0.5, "b": 1.0, "c": 0.25}, ["c", None, "a", {"b": 0.5, "a": 1.0}]):
        with alone.using(which), overlay.using(which):
            got, wanted = model(IDS), base(IDS)
            torch.testing.assert_close(got, wanted, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-3)
        if not isinstance(which, list):
            with switcher.using(which):
                torch.testing.assert_close(got, switched(IDS), rtol=1e-4, atol=1e-3)
    overlay.verify()
    same(model, net(base.head.weight.dtype))


def overlays(mesh: DeviceMesh) -> None:
    with torch.no_grad():
        lay(shard(net(), mesh), net(), exact=True)
        for sequence in (False, True):
            lay(parallel(net(), mesh, sequence), net(), exact=False)
        overlays_apart(mesh)
        overlays_refused(mesh)


def overlays_apart(mesh: DeviceMesh) -> None:
    """With FSDP each rank selects for its own batch; and beside a Switcher, also where FSDP holds gathered weights."""
    base, model = net(), shard(net(), mesh, reshard_after_forward=False)
    model(IDS)
    alone, overlay, switchers = Overlay(base), Overlay(model), (Switcher(base), Switcher(model))
    for each in switchers:
        each.add("s", adapter(base, 7) if each.model is base else adapter(net(), 7))
        each.activate("s")
    for seed, name in enumerate("ab"):
        given = linear_only(net(), seed)
        for each in (alone, overlay):
            each.add(name, given)
    mine = "ab"[dist.get_rank()]
    with alone.using(mine), overlay.using(mine):
        torch.testing.assert_close(model(IDS), base(IDS), rtol=0, atol=0)
    for each in switchers:
        each.deactivate()
    same(model, base)
    with alone.using("a"), overlay.using("a"):
        torch.testing.assert_close(model(IDS), base(IDS), rtol=0, atol=0)
    overlay.verify()
    if dist.get_rank() == 1:
        _shards.local(model.head.weight)[0].add_(1)
    says(
        refused(overlay.verify), "failed on rank 1 of 2", "1 weight(s) are not what they were when adapters", "head.wei"
    )


def overlays_refused(mesh: DeviceMesh) -> None:
    rank, base, model = dist.get_rank(), net(), parallel(net(), mesh)
    overlay = Overlay(model)
    overlay.add("a", linear_only(base, 1))
    overlay.add("b", linear_only(base, 2))
    says(refused(lambda: overlay.add("a", adapter(base, 1)), AdapterError), "an adapter 'a' was already added")
    says(refused(lambda: overlay.add("c", linear_only(base, rank))), "Overlay: the ranks did not agree on what to do")
    says(refused(lambda: overlay.activate("ab"[rank])), "rank 0: activate('a'), rank 1: activate('b')")
    with pytest.raises(shira.SwitchError, match="the ranks did not agree"), overlay.using(["a", "b"][rank]):
        pass
    assert overlay.active == {}
    assert list(overlay.memory()) == ["a", "b"]
    with torch.enable_grad(), overlay.using("a"), pytest.raises(
        shira.SwitchError, match=r"blocks\.0\.up\.weight is divided between ranks, where an Overlay has no gradients"
    ):  # fmt: skip
        model(IDS)
    overlay.activate("a")
    up = model.blocks[0].up
    up.weight = nn.Parameter(distribute_tensor(full(up.weight), mesh, [Replicate()]))
    with pytest.raises(shira.SwitchError, match=r"blocks\.0\.up\.weight is divided between ranks in another way"):
        model.blocks[0].up(torch.ones(2, 16))
    room = Overlay(parallel(net(), mesh), budget=10**9)
    says(refused(lambda: room.add("a", linear_only(base, 1)), AdapterError), "there an Overlay takes no budget")
    table = parallelize_module(net(), mesh, {"embed": ColwiseParallel()})
    says(refused(lambda: Overlay(table).add("a", linear_only(base, 1)), AdapterError),
         "'embed.weight' is divided by tensor parallelism in an embedding, which nothing can be laid over")  # fmt: skip
    torch.manual_seed(0)
    by_hand = nn.Linear(16, 32)
    alone = linear_only(by_hand, 1)
    by_hand.weight = nn.Parameter(distribute_tensor(by_hand.weight.detach(), mesh, [Shard(0)]))
    by_hand.bias = nn.Parameter(distribute_tensor(by_hand.bias.detach(), mesh, [Shard(0)]))
    other = Overlay(by_hand)
    other.add("a", alone)
    other.activate("a")
    with pytest.raises(shira.SwitchError, match=r"output with \(.*\), and it is not known which part of the sums"):
        by_hand(distribute_tensor(torch.ones(2, 16), mesh, [Shard(0)]))


def death(mesh: DeviceMesh) -> None:
    """A rank dies in the middle of a switch: the last check of a run."""
    rank, base = dist.get_rank(), net()
    model = shard(net(), mesh)
    switcher = Switcher(model)
    for seed, name in enumerate("ab"):
        switcher.add(name, adapter(base, seed))
    switcher.activate("a")
    before = {name: _shards.local(weight).clone() for name, weight in model.named_parameters()}
    dist.barrier()
    if rank == 1:
        Path("done.1").touch()
        _layout.Way._go = lambda *_: os._exit(0)  # type: ignore[method-assign]
    for name in ("b", "a"):
        with pytest.raises(shira.SwitchError) as caught:
            switcher.activate(name)
        says(str(caught.value), f"Switcher: activate('{name}'): the ranks could not agree, since one has died",
             "On this rank it is as it was before the call: active is 'a' at 0.75; what the others hold is not known",
             "Cause: ", "Connection ")  # fmt: skip
        for other, weight in model.named_parameters():
            assert torch.equal(_shards.local(weight), before[other]), other


# ---- on four ranks -------------------------------------------------------------------------------------------


def fsdp_and_tensor_parallel(mesh: DeviceMesh) -> None:
    """Both divide the rows of ``up``; norms, embedding and head are on meshes of two of the four ranks."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    walk(shard(parallel(net(), both["tp"]), both["dp"]), net())
    with torch.no_grad():
        lay(shard(parallel(net(), both["tp"]), both["dp"]), net(), exact=False)


def hybrid(mesh: DeviceMesh) -> None:
    """Two replicas of two shards each; and shards of columns, uneven and empty ones."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "shards"))
    walk(shard(net(torch.bfloat16), both), net(torch.bfloat16))
    model, base = net(), net()
    for name, where, placements in (
        ("experts.weight", both, [Shard(2), Shard(0)]),
        ("blocks.0.up.weight", both, [Replicate(), Shard(1)]),
        ("blocks.0.down.weight", both, [Shard(0), Shard(0)]),
        ("blocks.1.up.weight", mesh, [Shard(1)]),
        ("head.weight", mesh, [Shard(0)]),
        ("head.bias", both, [Shard(0), Replicate()]),
        ("blocks.0.norm.bias", mesh, [Replicate()]),
    ):
        module, _, attribute = name.rpartition(".")
        weight = distribute_tensor(model.get_parameter(name).detach(), where, placements)
        setattr(model.get_submodule(module), attribute, nn.Parameter(weight))
    walk(model, base, outputs=False)


def odd_shapes(mesh: DeviceMesh) -> None:
    """Words of a fingerprint that cuts go through, ranks without entries, and one weight that is two in the model."""
    base, model = nn.Module(), nn.Module()
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, 10, generator=generator)
    for name, tensor in (("columns", first), ("again", first), ("rows", torch.randn(2, 6, generator=generator))):
        base.register_parameter(name, nn.Parameter(tensor.clone()))
        placements = [Shard(1 if name == "columns" else 0)]
        model.register_parameter(name, nn.Parameter(distribute_tensor(tensor, mesh, placements)))
    entry = Entry(torch.tensor([1, 2, 13], dtype=torch.int32), torch.randn(6, generator=generator), (3, 10),
                  torch.float32, 2, fingerprint=_granules.fingerprint(first), aliases=("again",))  # fmt: skip
    given = Adapter({"columns": entry, "rows": adapter(base, 5).weights["rows"]})
    alone, switcher = Switcher(base), Switcher(model)
    for each in (alone, switcher):
        each.add("a", given)
        each.activate("a", 0.5)
    same(model, base)
    for name in ("columns", "again", "rows"):
        assert switcher.fingerprint(name) == alone.fingerprint(name) == _granules.fingerprint(base.get_parameter(name))
    for each in (alone, switcher):
        each.deactivate()
    same(model, base)
    with torch.no_grad():
        _shards.local(model.again).add_(1)
    text = refused(lambda: Switcher(model).add("a", given, verify=False), AdapterError)
    says(text, "'again' and 'columns' are one (tied) weight in the adapter, and two that differ in the model")


Checks = tuple[Callable[[DeviceMesh], None], ...]
OF_TWO: Checks = (
    fsdp,
    costs,
    tensor_parallel,
    all_or_nothing,
    blocks_and_room,
    gathered_weights,
    other_memory,
    stages,
    other_stacks,
    overlays,
    death,
)
OF_FOUR: Checks = (fsdp_and_tensor_parallel, hybrid, odd_shapes)


def main() -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("all",))
    for check in OF_TWO if mesh.size() == 2 else OF_FOUR:
        check(mesh)
    Path(f"done.{dist.get_rank()}").touch()


if __name__ == "__main__":
    main()
