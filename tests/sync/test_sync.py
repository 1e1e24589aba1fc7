"""Live updates: what a receiver's weights hold is, bit for bit, what the publisher's did, or nothing has changed."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shira_ops
from shira import AdamW, Adapter, AdapterError, Entry, SparseTuner, Switcher, _granules, masks
from shira.sync import Folder, Publisher, Receiver, SyncError, Update, compose
from states import bits, same, state
from sync_walk import SyncWalk


def model_of(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Linear(16, 24, bias=False), nn.Linear(24, 8)).to(
        dtype
    )


def disturb(model: nn.Module, generator: torch.Generator, share: float = 0.05) -> None:
    """What a step does: some entries of some weights get other bits, NaNs and zeros of either sign among them."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if torch.rand((), generator=generator) < 0.3:
                continue
            flat = tensor.view(-1)
            where = torch.rand(flat.numel(), generator=generator) < share
            new = torch.randn(flat.numel(), generator=generator) * 100
            new[::7], new[1::7], new[2::7] = -0.0, 0.0, torch.nan
            flat[where] = (
                new.nan_to_num(3).to(flat.dtype)[where] if not flat.is_floating_point() else new.to(flat.dtype)[where]
            )


@pytest.mark.parametrize("granule", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_receiver_follows(dtype: torch.dtype, granule: int, tmp_path: Path) -> None:
    trained, served = model_of(dtype=dtype), model_of(dtype=dtype)
    exclude = "num_batches" if granule > 1 else None
    publisher, follower = Publisher(trained, granule=granule, exclude=exclude), Receiver(served, exclude=exclude)
    assert publisher.version == follower.version
    assert follower.step is None
    pointers = [tensor.data_ptr() for tensor in served.state_dict().values()]
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 6):
        before = state(served)
        disturb(trained, generator)
        if granule > 1:
            trained[1].num_batches_tracked.zero_()
        update = publisher.publish()
        assert update.step == step == publisher.step
        assert update.end == publisher.version
        given = (update, update.to_bytes(), tmp_path / "update.safetensors")[step % 3]
        update.save(tmp_path / "update.safetensors")
        follower.stage(given)
        assert same(state(served), before)
        follower.commit()
        assert same(state(served), state(trained))
        assert (follower.version, follower.step) == (publisher.version, step)
        follower.verify()
    follower.rollback()
    assert same(state(served), before)
    assert follower.step == 4
    follower.stage(update)
    follower.commit(verify=False)
    assert same(state(served), state(trained))
    assert [tensor.data_ptr() for tensor in served.state_dict().values()] == pointers


def test_only_changed_bits_are_sent() -> None:
    model = nn.Linear(8, 4, bias=False)
    publisher = Publisher(model)
    with torch.no_grad():
        model.weight[1, 2], model.weight[3, 7] = 5.0, -0.0
    update = publisher.publish()
    (entry,) = update.weights.values()
    assert entry.indices.tolist() == [10, 31]
    assert entry.values.tolist() == [5.0, 0.0]
    assert torch.signbit(entry.values[1])
    with torch.no_grad():
        model.weight[3, 7] = 0.0
    assert publisher.publish().weights["weight"].indices.tolist() == [31]
    nothing = publisher.publish()
    assert len(nothing) == 0
    assert nothing.start == nothing.end
    assert nothing.step == 3


@pytest.mark.parametrize("granule", [1, 4])
def test_of_a_tuner_the_entries_are_known(granule: int) -> None:
    trained, served = model_of(), model_of()
    tuner = SparseTuner(trained, masks.Rand(density=0.1, granule=granule), targets=r"^[02]\.weight")
    publisher, follower = Publisher(tuner), Receiver(served)
    optimizer = AdamW(tuner, lr=1e-3)
    trained.train()
    for _ in range(4):
        trained(torch.randn(5, 24, dtype=torch.bfloat16)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update = publisher.publish()
        assert {"0.weight", "2.weight", "1.running_mean", "1.num_batches_tracked"} <= update.weights.keys()
        assert update.weights["2.weight"].nnz <= 0.1 * 16 * 24 + 4
        follower.stage(update.to_bytes())
        follower.commit()
        published = {name: one for name, one in state(trained).items() if "_shira_" not in name}
        assert same(state(served), published)
        follower.verify()
    with torch.no_grad():
        trained[3].weight.mul_(2)
    with pytest.raises(SyncError, match=r"3\.weight is frozen, so a Publisher of a tuner keeps no copy of it"):
        publisher.publish()


def test_several_are_staged_and_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, served = model_of(), model_of()
    publisher, follower = Publisher(trained), Receiver(served)
    generator, before, updates = torch.Generator().manual_seed(2), state(served), []
    for _ in range(3):
        disturb(trained, generator)
        updates.append(publisher.publish())
    follower.stage(updates[0])
    follower.stage(*updates[1:])
    assert follower.staged is not None
    assert follower.staged.step == 3
    follower.commit()
    assert same(state(served), state(trained))
    assert follower.step == 3
    follower.rollback()
    assert same(state(served), before)
    assert follower.version == updates[0].start
    with pytest.raises(SyncError, match="there is no commit to roll back"):
        follower.rollback()
    with pytest.raises(SyncError, match="nothing is staged"):
        follower.commit()


def test_granules_of_several_sizes_compose() -> None:
    served, other = nn.Linear(16, 4, bias=False), nn.Linear(16, 4, bias=False)
    other.load_state_dict(served.state_dict())
    fine, coarse = Publisher(served), None
    with torch.no_grad():
        served.weight.view(-1)[[3, 17, 40]] = 1.0
    first = fine.publish()
    coarse = Publisher(served, granule=8)
    with torch.no_grad():
        served.weight.view(-1)[[4, 17]] = 2.0
    second = coarse.publish()
    both = compose(first, second)
    assert both.weights["weight"].indices.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23, 40]
    follower = Receiver(other)
    follower.stage(both)
    follower.commit()
    assert same(state(other), state(served))
    with pytest.raises(SyncError, match="the second update must start where the first one ends"):
        compose(second, first)


def test_the_way_back_as_an_update() -> None:
    trained, served = model_of(), model_of()
    publisher, follower = Publisher(trained), Receiver(served)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    disturb(trained, torch.Generator().manual_seed(3))
    update = publisher.publish()
    back = update.invert(before)
    assert (back.start, back.end) == (update.end, update.start)
    follower.stage(update, back)
    follower.commit()
    assert same(state(served), {name: bits(tensor) for name, tensor in before.items()})
    with pytest.raises(SyncError, match="is not what the update starts from"):
        update.invert(trained.state_dict())
    with pytest.raises(SyncError, match="weights must have"):
        update.invert({})


def test_refused_out_of_order() -> None:
    trained, served = model_of(), model_of()
    publisher, follower = Publisher(trained), Receiver(served)
    generator, updates = torch.Generator().manual_seed(4), []
    for _ in range(4):
        disturb(trained, generator)
        updates.append(publisher.publish())
    with pytest.raises(SyncError, match=r"the model must hold the weights that the Publisher started from$"):
        follower.stage(updates[1])
    follower.stage(updates[0])
    follower.commit()
    before = state(served)
    for update, text in (
        (updates[0], "it is older, or was committed already"),
        (updates[2], "step 2 is missing"),
        (updates[3], "steps 2 to 3 are missing"),
        (replace(updates[1], start=7), "it is of other weights"),
    ):
        with pytest.raises(SyncError, match=text):
            follower.stage(update)
    follower.stage(updates[1])
    with pytest.raises(SyncError, match="what is staged leads to"):
        follower.stage(updates[1])
    assert follower.staged is not None
    assert follower.staged.step == 2
    assert same(state(served), before)
    with pytest.raises(SyncError, match="the model must hold the weights"):
        Receiver(model_of(seed=1)).stage(updates[0])


def test_refused_when_damaged(tmp_path: Path) -> None:
    trained = model_of()
    publisher, follower = Publisher(trained), Receiver(model_of())
    disturb(trained, torch.Generator().manual_seed(5))
    update = publisher.publish()
    data = update.to_bytes()
    generator = np.random.default_rng(0)
    for damaged in (data[:-1], data[: len(data) // 2], b"", data + b"x"):
        with pytest.raises(AdapterError, match="bytes of an update"):
            follower.stage(damaged)
    for at in generator.integers(data.index(b"shira.version"), len(data), 40):  # what is before says nothing here
        broken = bytearray(data)
        broken[at] ^= 1 << int(generator.integers(8))
        with pytest.raises((AdapterError, SyncError)):
            follower.stage(bytes(broken))
    outside = replace(update.weights["0.weight"], indices=update.weights["0.weight"].indices + 24 * 16, checked=False)
    with pytest.raises(AdapterError, match="indices"):
        follower.stage(replace(update, weights={**update.weights, "0.weight": outside}))
    other = {name: entry for name, entry in update.weights.items() if name != "0.weight"}
    with pytest.raises(AdapterError, match=r"after must have a fingerprint for each of the weights"):
        replace(update, weights=other)
    plain = Adapter(dict(update.weights))
    plain.save(tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterError, match=r"adapter\.safetensors: this is an adapter, but not an update"):
        follower.stage(tmp_path / "adapter.safetensors")
    assert follower.staged is None


def test_refused_where_the_models_differ() -> None:
    trained = nn.Linear(4, 4)
    publisher = Publisher(trained)
    with torch.no_grad():
        trained.weight.add_(1)
    update = publisher.publish()
    follower = Receiver(trained)
    start = {"start": follower.version}
    entry, after = update.weights["weight"], update.after["weight"]
    for name, changed, text in (
        ("other", entry, "'other' is not among the weights of the model that are followed"),
        ("weight", replace(entry, shape=(2, 8)), r"'weight' must have shape \[4, 4\] and dtype float32, got \[2, 8\]"),
    ):
        with pytest.raises(AdapterError, match=text):
            follower.stage(Update({name: changed}, {name: after}, step=1, **start))
    with pytest.raises(AdapterError, match="one \\(tied\\) weight at the publisher, and two here"):
        follower.stage(Update({"weight": replace(entry, aliases=("bias",))}, {"weight": after}, step=1, **start))


def test_refused_where_somebody_wrote() -> None:
    trained, served = model_of(), model_of()
    publisher, follower = Publisher(trained), Receiver(served)
    disturb(trained, torch.Generator().manual_seed(6))
    update = publisher.publish()
    follower.stage(update)
    entry = update.weights["0.weight"]
    weight = served[0].weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.view(-1)[5] += 1
    with pytest.raises(SyncError, match=r"commit refused: 0\.weight was changed by someone else"):
        follower.commit()
    weight.data.copy_(kept)  # no version moves
    hidden = int(entry.indices[0])
    weight.data.view(-1)[hidden] += 1
    before = state(served)
    with torch.no_grad():
        weight.mul_(1)  # the version moves
    with pytest.raises(SyncError, match=r"commit refused: 0\.weight was changed by someone else"):
        follower.commit()
    weight.data.copy_(kept)
    follower.verify()
    weight.data.view(-1)[hidden] += 1
    before = state(served)
    with pytest.raises(SyncError, match=r"0\.weight would not become what the update says"):
        follower.commit()
    assert same(state(served), before)
    assert follower.staged is not None
    with pytest.raises(SyncError, match=r"0\.weight changed since the last commit"):
        follower.verify()
    weight.data.copy_(kept)
    follower.commit()
    assert same(state(served), state(trained))
    with torch.no_grad():
        served[3].bias.add_(1)
    with pytest.raises(SyncError, match=r"rollback refused: 3\.bias was changed by someone else"):
        follower.rollback()


def test_refused_where_weights_moved() -> None:
    trained, served = model_of(), model_of()
    publisher, follower = Publisher(trained), Receiver(served)
    disturb(trained, torch.Generator().manual_seed(7))
    follower.stage(publisher.publish())
    served[0].weight = nn.Parameter(served[0].weight.detach().clone())
    with pytest.raises(SyncError, match=r"0\.weight is no longer the parameter it was; make a new Receiver"):
        follower.commit()
    served.float()
    with pytest.raises(SyncError, match="make a new Receiver"):
        follower.verify()
    trained.float()
    with pytest.raises(SyncError, match="make a new Publisher"):
        publisher.publish()


def test_a_commit_that_fails_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, served = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    served.load_state_dict(trained.state_dict())
    publisher, follower = Publisher(trained), Receiver(served)
    with torch.no_grad():
        trained[0].weight.add_(1)
    first = publisher.publish()
    coarse = Publisher(trained, granule=8)
    with torch.no_grad():
        trained[1].weight.add_(1)
    follower.stage(compose(first, coarse.publish()))
    before = state(served)
    for verify, module, name in ((True, _granules, "swap_"), (False, shira_ops, "foreach_swap_")):
        swap, calls = getattr(module, name), []

        def fail(*args: object, _swap: Any = swap, _calls: list[Any] = calls, **kwargs: object) -> Any:
            _calls.append(args)
            if len(_calls) == 2:
                raise RuntimeError("out of memory")
            return _swap(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(SyncError, match=r"commit failed and nothing has changed\. Cause: out of memory"):
                follower.commit(verify=verify)
        assert len(calls) >= 2
        assert same(state(served), before)
    follower.commit()
    assert same(state(served), state(trained))


def test_tied_weights_are_sent_once() -> None:
    def tied() -> nn.Module:
        model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    torch.manual_seed(0)
    trained, served, apart = tied(), tied(), tied()
    for model in (served, apart):
        model.load_state_dict(trained.state_dict())
    publisher, follower = Publisher(trained), Receiver(served)
    with torch.no_grad():
        trained["head"].weight[2, 1] = 9
    update = publisher.publish()
    assert list(update.weights) == ["embed.weight"]
    assert update.weights["embed.weight"].aliases == ("head.weight",)
    follower.stage(update)
    follower.commit()
    assert same(state(served), state(trained))
    apart["head"].weight = nn.Parameter(apart["head"].weight.detach().clone())
    with pytest.raises(SyncError, match="the model must hold the weights"):
        Receiver(apart).stage(update)


def test_weights_that_are_added_later_are_not_left_out_in_silence() -> None:
    trained = model_of()
    served = copy.deepcopy(trained)
    plain, without = Publisher(trained), Publisher(trained, exclude="head")
    trained.add_module("head", nn.Linear(2, 2, bias=False))
    disturb(trained, torch.Generator().manual_seed(1), share=1)
    says = r"Publisher: head\.weight came into the model after the Publisher was made, and is not published"
    with pytest.raises(SyncError, match=says):
        plain.publish()
    assert plain.step == 0
    # Left out on purpose, or another name of a weight that is followed.
    trained.register_parameter("alias", trained[0].weight)
    follower = Receiver(served)
    follower.stage(without.publish())
    follower.commit()
    del trained.head, trained.alias
    assert same(state(served), state(trained))
    plain.publish()
    assert plain.version == follower.version


def test_what_cannot_be_followed() -> None:
    weight = torch.randn(4, 8)
    overlapping = nn.ParameterDict({"all": nn.Parameter(weight), "part": nn.Parameter(weight[:2])})
    with pytest.raises(SyncError, match="different weights in overlapping memory"):
        Publisher(overlapping)
    turned = nn.Linear(4, 8)
    turned.weight = nn.Parameter(weight.t()[:, :4])
    with pytest.raises(SyncError, match=r"Receiver: weight must be contiguous"):
        Receiver(turned)
    with pytest.raises(SyncError, match="is on the meta device"):
        Publisher(nn.Linear(2, 2, device="meta"))
    with pytest.raises(SyncError, match="has no shape yet"):
        Publisher(nn.LazyLinear(2))
    with pytest.raises(SyncError, match="must have a parameter or persistent buffer"):
        Receiver(nn.ReLU())
    with pytest.raises(TypeError, match=r"source must be a torch\.nn\.Module or a SparseTuner, got dict"):
        Publisher({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="granule must divide the 3 entries of bias, got 2"):
        Publisher(nn.Linear(2, 3), granule=2)
    model = nn.Linear(4, 4)
    tuner = SparseTuner(model, masks.Rand(0.5))
    with pytest.raises(SyncError, match="a SparseTuner trains weight; detach it first"):
        Receiver(model)
    tuner.detach()
    assert Receiver(model, exclude="bias").version != Receiver(model).version


def test_a_folder_catches_up(tmp_path: Path) -> None:
    trained, served = model_of(), model_of()
    publisher, folder = Publisher(trained), Folder(tmp_path / "updates")
    generator = torch.Generator().manual_seed(8)
    follower = Receiver(served)
    for _ in range(3):
        disturb(trained, generator)
        folder.put(publisher.publish())
    assert folder.knows(follower.version)
    follower.stage(*folder.since(follower.version))
    follower.commit()
    assert same(state(served), state(trained))
    assert folder.since(follower.version) == []
    (tmp_path / "updates" / "notes.txt").write_text("not an update")
    disturb(trained, generator)
    path = folder.put(publisher.publish())
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        folder.since(follower.version)


def test_in_another_process(tmp_path: Path) -> None:
    model = nn.Linear(6, 6)
    torch.save(model.state_dict(), tmp_path / "base.pt")
    publisher = Publisher(model)
    with torch.no_grad():
        model.weight[2] = 1.5
    (tmp_path / "update").write_bytes(publisher.publish().to_bytes())
    code = (
        "import sys, torch, shira; from pathlib import Path; folder = Path(sys.argv[1]); "
        "model = torch.nn.Linear(6, 6); model.load_state_dict(torch.load(folder / 'base.pt')); "
        "receiver = shira.sync.Receiver(model); "
        "receiver.stage((folder / 'update').read_bytes()); receiver.commit(); print(f'{receiver.version:016x}'); "
        "torch.save(model.state_dict(), folder / 'after.pt')"
    )
    path = ":".join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": path},
    )
    assert done.stdout.strip() == f"{publisher.version:016x}"
    after = torch.load(tmp_path / "after.pt")
    assert torch.equal(after["weight"], model.weight)
    assert torch.equal(after["bias"], model.bias)


def test_an_update_is_an_adapter(tmp_path: Path) -> None:
    trained, served = model_of(), model_of()
    publisher = Publisher(trained)
    with torch.no_grad():
        trained[0].weight[3] = 2
    update = publisher.publish()
    again = pickle.loads(pickle.dumps(update))
    assert again.end == update.end
    assert repr(again) == repr(update)
    assert repr(update).endswith(f"1 weight, {update.nnz} entries (6.250% of theirs))")
    update.save(tmp_path / "as differences.safetensors")
    with pytest.raises(
        AdapterError, match=r"'0\.weight': its values are differences .*: this is an update, which shira\."
    ):
        Adapter.load(tmp_path / "as differences.safetensors")
    update.adapter().save(tmp_path / "update.safetensors")
    switcher, before = Switcher(served), state(served)
    switcher.add("new", tmp_path / "update.safetensors")
    switcher.activate("new")
    assert same(state(served), state(trained))
    switcher.deactivate()
    assert same(state(served), before)


@pytest.mark.parametrize("budget", [None, 12_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_sequence_of_operations(dtype: torch.dtype, budget: int | None) -> None:
    """Ten thousand of these: soak.py."""
    walk = SyncWalk(dtype, seed=1, budget=budget)
    for _ in range(140):
        walk.step()
    walk.finish()
    assert len(walk.counts) == 14


def adapter_for(
    model: nn.Module, names: tuple[str, ...], *, seed: int, delta: bool = False, granule: int = 1
) -> Adapter:
    generator, entries = torch.Generator().manual_seed(seed), {}
    for name in names:
        weight = model.state_dict()[name]
        indices = shira_ops.select_random(weight.numel(), weight.numel() // granule // 4, seed, granule=granule)
        values = torch.randn(indices.numel() * granule, generator=generator).to(weight.dtype)
        fingerprint = int(shira_ops.fingerprint(weight)) % 2**64
        entries[name] = Entry(indices, values, tuple(weight.shape), weight.dtype, granule, fingerprint)
    return Adapter(entries, delta=delta)


@pytest.mark.parametrize(
    "strengths", [{}, {"over": 1.0}, {"over": 0.5, "add": 0.7}, {"coarse": 0.3, "add": 1.0}], ids=str
)
def test_an_update_goes_under_active_adapters(strengths: dict[str, float]) -> None:
    trained, served, base = model_of(), model_of(), model_of()
    publisher = Publisher(trained)
    adapters = {
        "over": adapter_for(base, ("0.weight", "2.weight"), seed=1),
        "add": adapter_for(base, ("0.weight", "3.weight"), seed=2, delta=True),
        "coarse": adapter_for(base, ("2.weight",), seed=3, granule=8),
    }
    switcher, beside = Switcher(served), Switcher(served)
    for name, adapter in adapters.items():
        switcher.add(name, adapter)
    beside.add("over", adapters["over"])
    for known in ({"over": 1.0, "add": 0.5}, {"coarse": 1.0}):  # what the base's entries are kept for
        switcher.activate(known)
    switcher.deactivate()
    beside.activate("over")
    beside.deactivate()
    if strengths:
        switcher.activate(strengths)
    follower = Receiver(served)
    generator = torch.Generator().manual_seed(9)

    def fresh(new: dict[str, float]) -> dict[str, Tensor]:
        """The same adapters on a copy of the new base."""
        copy = model_of()
        copy.load_state_dict(trained.state_dict())
        other = Switcher(copy)
        for name, adapter in adapters.items():
            other.add(name, adapter, verify=False)
        if new:
            other.activate(new)
        return state(copy)

    for _ in range(3):
        disturb(trained, generator)
        follower.stage(publisher.publish())
        follower.commit()
        assert switcher.active == strengths
        assert same(state(served), fresh(strengths))
    for other in ({"add": 1.0}, {"over": 0.2, "coarse": 1.0}):
        switcher.activate(other)
        assert same(state(served), fresh(other))
        switcher.verify(full=True)
    follower.verify()
    switcher.deactivate()
    assert same(state(served), state(trained))
    beside.activate("over", alpha=0.5)
    assert same(state(served), fresh({"over": 0.5}))
    beside.deactivate()
    assert same(state(served), state(trained))
    follower.rollback()
    follower.verify()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_publishers_and_receivers_are_not_copied(duplicate) -> None:
    """A copy would share weights or a snapshot with the first one, and each would not know what the other did."""
    model = model_of()
    with pytest.raises(TypeError, match="Publisher: a publisher cannot be copied or pickled; make another one"):
        duplicate(Publisher(model))
    with pytest.raises(TypeError, match="Receiver: a receiver cannot be copied or pickled; make another one"):
        duplicate(Receiver(model))


def test_a_folder_takes_updates_alone(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    with pytest.raises(TypeError, match=r"Folder\.put: update must be an Update, got str"):
        folder.put("update.safetensors")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    assert repr(folder) == f"Folder({str(tmp_path)!r})"


def test_a_module_that_was_replaced_is_refused() -> None:
    """What is written into the old one, or read from it, would have no effect on the model."""
    trained, served = model_of(), model_of()
    publisher, receiver = Publisher(trained), Receiver(served)
    disturb(trained, torch.Generator().manual_seed(0))
    receiver.stage(publisher.publish())
    for model in (trained, served):
        model[0] = copy.deepcopy(model[0])
    before = state(served)
    with pytest.raises(
        SyncError, match=r"Receiver: the module of 0\.weight, 0\.bias was replaced, and is not in the model"
    ):
        receiver.commit()
    with pytest.raises(SyncError, match="Receiver: the module of"):
        receiver.verify()
    assert same(state(served), before)
    with pytest.raises(
        SyncError, match=r"Publisher: the module of 0\.weight, 0\.bias was replaced, .*make a new Publisher"
    ):
        publisher.publish()
