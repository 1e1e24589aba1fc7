"""Live updates where something goes wrong: what was there before is there, or what should be there is."""

from __future__ import annotations

import linecache
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor, nn

import shira
import shira_ops
from shira import Adapter, AdapterError, Entry, SparseTuner, Switcher, masks
from shira.sync import Folder, Publisher, Receiver, SyncError, Update


def model_of(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8, bias=False)).to(dtype)


def disturb(model: nn.Module, by: float = 1.0) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::5].add_(by)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(tensor.view(-1).view(torch.uint8), other[name].view(-1).view(torch.uint8))
        for name, tensor in one.items()
    )


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that is run in a file of `shira.sync`, once."""

    def __init__(self, file: str, at: int) -> None:
        self.file, self.left, self.hit = os.path.join("shira", "sync", file), at, False

    def __enter__(self) -> Interrupt:
        self.before = sys.gettrace()
        sys.settrace(self.calls)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def calls(self, frame: FrameType, event: str, argument: object) -> Callable[..., object] | None:
        return self.lines if frame.f_code.co_filename.endswith(self.file) else None

    def lines(self, frame: FrameType, event: str, argument: object) -> Callable[..., object] | None:
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        # At the line of a lock an interrupt would leave it locked, for which nobody but Python can do anything.
        if event == "line" and not self.hit and "_live.LOCK" not in line:
            self.left -= 1
            if self.left < 0:
                self.hit = True
                raise KeyboardInterrupt
        return self.lines


def overwriting(model: nn.Module) -> Adapter:
    weight = model.state_dict()["0.weight"]
    indices = torch.arange(0, weight.numel(), 3, dtype=torch.int32)
    fingerprint = int(shira_ops.fingerprint(weight)) % 2**64
    entry = Entry(
        indices, torch.ones(len(indices), dtype=weight.dtype), tuple(weight.shape), weight.dtype, 1, fingerprint
    )
    return Adapter({"0.weight": entry})


@pytest.mark.parametrize("verify", [True, False])
def test_an_interrupt_anywhere_in_commit_and_rollback(verify: bool) -> None:
    trained, served = model_of(), model_of()
    publisher, follower, switcher = Publisher(trained), Receiver(served), Switcher(served)
    switcher.add("on", overwriting(served))
    states = {publisher.version: state(trained)}
    disturb(trained)
    update = publisher.publish()
    states[update.end] = state(trained)
    hits, at = 0, 0
    for what in ("commit", "rollback"):
        at = 0
        while True:
            if follower.version == update.start and follower.staged is None:
                follower.stage(update)
            switcher.activate("on")
            before = follower.version
            try:
                with Interrupt("receiver.py", at) as interrupt:
                    follower.commit(verify=verify) if what == "commit" else follower.rollback()
            except KeyboardInterrupt:
                hits += 1
            switcher.deactivate()
            assert same(state(served), states[follower.version])
            follower.verify()
            if not interrupt.hit:
                assert follower.version != before
                break
            if follower.version != before:  # the interrupt came when it was done
                if what == "commit":
                    follower.rollback()
                else:
                    follower.stage(update)
                    follower.commit()
            at += 1
    assert hits > 100


def test_an_interrupt_anywhere_in_publish() -> None:
    trained, served = model_of(), model_of()
    publisher, follower, at, by = Publisher(trained), Receiver(served), 0, 1.0
    while True:
        disturb(trained, by)
        by = -by
        step, update = publisher.step, None
        try:
            with Interrupt("publisher.py", at) as interrupt:
                update = publisher.publish()
        except KeyboardInterrupt:
            disturb(trained, by)
            by = -by
            if publisher.step == step:
                update = publisher.publish()
        if update is None:
            break  # the last line: it was published, and nobody has it
        follower.stage(update)
        follower.commit(verify=False)
        assert same(state(served), state(trained))
        assert follower.version == publisher.version
        if not interrupt.hit:
            break
        at += 1
    assert at > 50
    disturb(trained)
    if update is None:
        with pytest.raises(SyncError, match="is missing"):
            follower.stage(publisher.publish())


def test_of_a_tuner_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, served = model_of(), model_of()
    tuner = SparseTuner(trained, masks.Rand(0.3), targets=r"^0\.weight")
    publisher, follower = Publisher(tuner), Receiver(served)
    for values in tuner.parameters():
        values.data.add_(1)

    def stop(self: Publisher) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Publisher, "_compared_changes", stop)
        with pytest.raises(KeyboardInterrupt):
            publisher.publish()
    update = publisher.publish()
    assert update.nnz == 256  # as a whole
    follower.stage(update.to_bytes())
    follower.commit()
    assert torch.equal(served[0].weight, trained[0].weight)
    for values in tuner.parameters():
        values.data.add_(1)
    update = publisher.publish()
    assert 0 < update.nnz <= 0.3 * 256 + 1
    follower.stage(update)
    follower.commit()
    assert torch.equal(served[0].weight, trained[0].weight)
    publisher.verify()
    with torch.no_grad():
        trained[0].weight.view(-1)[:] = 3
    publisher.publish()
    with pytest.raises(SyncError, match=r"Publisher: 0\.weight changed since the last publish"):
        publisher.verify()


def test_threads_commit_once() -> None:
    trained, served = model_of(), model_of()
    publisher, follower = Publisher(trained), Receiver(served)
    refused: list[str] = []

    def commit() -> None:
        try:
            follower.commit()
        except SyncError as error:
            refused.append(str(error))

    for _ in range(5):
        disturb(trained)
        follower.stage(publisher.publish())
        threads = [threading.Thread(target=commit) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert refused == ["Receiver: nothing is staged; stage an update before commit"] * 15
    assert same(state(served), state(trained))


@pytest.mark.parametrize("inside", ["weights", "stage", "commit", "all"])
def test_inference_mode(inside: str) -> None:
    trained = model_of()
    with torch.inference_mode(inside in ("weights", "all")):
        served = model_of()
        publisher, follower = Publisher(trained), Receiver(served)
        before = state(served)
    for by in (1.0, -2.0):
        disturb(trained, by)
        with torch.inference_mode(inside in ("stage", "all")):
            follower.stage(publisher.publish())
        with torch.inference_mode(inside in ("commit", "all")):
            follower.commit()
        assert same(state(served), state(trained))
    follower.rollback()
    follower.verify()
    assert not same(state(served), before)
    assert not same(state(served), state(trained))


def test_what_wraps_a_model() -> None:
    trained, served = model_of(torch.float32), model_of(torch.float32)
    compiled = torch.compile(served, backend="eager")
    x = torch.randn(3, 16)
    compiled(x)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        publisher = Publisher(nn.parallel.DistributedDataParallel(trained))
        follower = Receiver(compiled)
        assert list(follower._weights) == ["0.weight", "0.bias", "1.weight"]
        disturb(trained)
        follower.stage(publisher.publish())
        follower.commit()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(compiled(x), trained(x))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64, torch.float64], ids=str
)
def test_other_dtypes_and_odd_shapes(dtype: torch.dtype) -> None:
    def model() -> nn.Module:
        made = nn.Module()
        generator = torch.Generator().manual_seed(1)
        content = torch.randint(0, 256, (6 * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        made.register_buffer("b", content.view(dtype).view(2, 3))
        made.register_buffer("empty", torch.empty(0, 3, dtype=dtype))
        made.register_buffer("one", content[: dtype.itemsize].clone().view(dtype).view(()))
        return made

    trained, served = model(), model()
    publisher, follower = Publisher(trained), Receiver(served)
    before = state(served)
    # All bits set: a NaN where there is one.
    trained.b.view(-1)[2:4].view(torch.uint8).fill_(255)
    trained.one.view(1).view(torch.uint8).fill_(255)
    update = publisher.publish()
    assert list(update.weights) == ["b", "one"]
    assert update.nnz <= 3
    follower.stage(update.to_bytes())
    follower.commit()
    assert same(state(served), state(trained))
    follower.rollback()
    assert same(state(served), before)


def test_refused_dtypes_and_arguments() -> None:
    model = nn.Module()
    model.register_buffer("mask", torch.ones(3, dtype=torch.bool))
    with pytest.raises(SyncError, match=r"Receiver: mask must be one of .*, got bool; leave it out with exclude="):
        Receiver(model)
    with pytest.raises(ValueError, match=r"exclude must be a regular expression, got '\('"):
        Receiver(model_of(), exclude="(")
    with pytest.raises(ValueError, match="snapshot must be a device that keeps content, got 'meta'"):
        Publisher(model_of(), snapshot="meta")


def test_two_receivers_and_a_relay() -> None:
    trained, served, third = model_of(), model_of(), model_of()
    publisher, first, second = Publisher(trained), Receiver(served), Receiver(served)
    onward, last = Publisher(served), Receiver(third)
    disturb(trained)
    update = publisher.publish()
    first.stage(update)
    second.stage(update)
    first.commit()
    with pytest.raises(SyncError, match=r"0\.weight was changed by someone else"):
        second.commit()
    last.stage(onward.publish())
    last.commit()
    assert same(state(third), state(trained))
    assert last.version == publisher.version
    first.rollback()
    second.commit()
    assert same(state(served), state(trained))


def test_a_step_or_a_state_between_stage_and_commit() -> None:
    trained, served = model_of(), model_of()
    publisher, follower, base = Publisher(trained), Receiver(served), state(served)
    disturb(trained)
    follower.stage(publisher.publish())
    optimizer = torch.optim.SGD(served.parameters(), lr=1.0)
    served(torch.ones(2, 16, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    changed = state(served)
    with pytest.raises(SyncError, match=r"0\.weight was changed by someone else.*; load the weights again"):
        follower.commit()
    assert same(state(served), changed)
    served.load_state_dict(base)  # the versions move, the content is right
    follower.commit()
    assert same(state(served), state(trained))


def test_a_tuner_that_came_later() -> None:
    trained, served = model_of(), model_of()
    publisher, follower = Publisher(trained), Receiver(served)
    disturb(trained)
    follower.stage(publisher.publish())
    tuner, before = SparseTuner(served, masks.Rand(0.1)), state(served)
    with pytest.raises(SyncError, match=r"commit refused: a SparseTuner trains 0\.weight; detach it first"):
        follower.commit()
    assert same(state(served), before)
    tuner.detach()
    follower.commit()
    assert same(state(served), state(trained))


def test_a_switcher_that_came_later_and_a_block_elsewhere() -> None:
    trained, served = model_of(), model_of()
    publisher, follower = Publisher(trained), Receiver(served)
    adapter = overwriting(served)
    switcher = Switcher(served)
    switcher.add("on", adapter, verify=False)
    disturb(trained)
    follower.stage(publisher.publish())
    opened, close = threading.Event(), threading.Event()

    def hold() -> None:
        with switcher.using("on"):
            opened.set()
            close.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    opened.wait()
    before = state(served)
    try:
        with pytest.raises(SyncError, match=r"commit refused: the adapters on the model cannot be taken off\. .*block"):
            follower.commit()
        assert same(state(served), before)
    finally:
        close.set()
        thread.join()
    with switcher.using("on"):
        follower.commit()
        assert switcher.active == {"on": 1.0}
        on = state(served)["0.weight"].view(-1)
        assert torch.equal(on[::3], torch.ones_like(on[::3]))
    assert same(state(served), state(trained))
    switcher.verify(full=True)


def test_a_switcher_with_a_budget(tmp_path: Path) -> None:
    trained, served = model_of(), model_of()
    publisher, follower = Publisher(trained), Receiver(served)
    switcher = Switcher(served, budget=1500, spill=tmp_path)
    first = overwriting(served)
    second = Adapter({"0.weight": replace(first.weights["0.weight"], values=first.weights["0.weight"].values * 2)})
    for name, adapter in (("a", first), ("b", second), ("c", Adapter(first.weights, delta=True))):
        switcher.add(name, adapter)
    for number, name in enumerate("abcab"):
        switcher.activate(name)
        disturb(trained, number + 1)
        follower.stage(publisher.publish())
        follower.commit()
        assert switcher.active == {name: 1.0}
        fresh = model_of()
        fresh.load_state_dict(trained.state_dict())
        other = Switcher(fresh)
        other.add(name, switcher.adapters[name], verify=False)
        other.activate(name)
        assert same(state(served), state(fresh))
    switcher.deactivate()
    assert same(state(served), state(trained))


def test_adapters_that_cannot_be_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, served = model_of(), model_of()
    publisher, follower, switcher = Publisher(trained), Receiver(served), Switcher(served)
    switcher.add("on", overwriting(served))
    switcher.activate("on")
    disturb(trained)
    update = publisher.publish()
    follower.stage(update)

    def fail(*_: object) -> None:
        raise shira.SwitchError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Switcher, "activate", fail)
        with pytest.raises(SyncError, match="adapters that were active could not be put back: the model has the base"):
            follower.commit()
    assert follower.version == update.end
    assert same(state(served), state(trained))
    switcher.activate("on")
    switcher.deactivate()
    follower.verify()


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"start": -1}, "start must be a whole number below 2"),
        ({"start": "x"}, "start must be a whole number below 2"),
        ({"step": -1}, "step must be a whole number from 0"),
        ({"after": {"weight": 2**64}}, "after 'weight' must be a whole number below 2"),
        ({"after": {"weight": 1.5}}, "after 'weight' must be a whole number below 2"),
        ({"after": {}}, "after must have a fingerprint for each of the weights"),
    ],
)
def test_crafted_updates(changed: dict[str, object], text: str) -> None:
    model = nn.Linear(4, 4, bias=False)
    publisher = Publisher(model)
    with torch.no_grad():
        model.weight.add_(1)
    update = publisher.publish()
    with pytest.raises(AdapterError, match=text):
        replace(update, **changed)  # type: ignore[arg-type]


def test_crafted_files(tmp_path: Path) -> None:
    odd = nn.Module()
    odd.register_parameter("a\nb", nn.Parameter(torch.ones(4)))
    publisher, follower = Publisher(odd), Receiver(odd)
    with torch.no_grad():
        odd.get_parameter("a\nb").add_(1)
    update = publisher.publish()
    assert list(Update.from_bytes(update.to_bytes()).weights) == ["a\nb"]
    follower.stage(update)
    with pytest.raises(SyncError, match=r"commit refused: a\nb was changed by someone else"):
        follower.commit()
    about = update.adapter().provenance["shira.sync"]
    for changed, text in (
        ({"after": {"a\nb": "zz"}}, "must be 16 hex digits, got 'zz'"),
        ({"start": None}, "start must be 16 hex digits"),
        ({"end": "0" * 16}, "and its fingerprints lead to"),
        ({"step": True}, "step must be a whole number"),
        ({"step": 2**80}, "step must be a whole number"),
        ({"after": []}, "must have the fingerprints after it"),
    ):
        path = tmp_path / "crafted.safetensors"
        Adapter(update.weights, provenance={"shira.sync": {**about, **changed}}).save(path)
        with pytest.raises(AdapterError, match=text):
            Update.load(path)


def test_a_folder_with_turns_and_forks(tmp_path: Path) -> None:
    trained, folder = model_of(), Folder(tmp_path)
    publisher = Publisher(trained)
    states, versions = [state(trained)], [publisher.version]

    def put(content: dict[str, Tensor]) -> None:
        trained.load_state_dict(content)
        path = folder.put(publisher.publish())
        os.utime(path, ns=(publisher.step * 10**9, publisher.step * 10**9))
        versions.append(publisher.version)

    def ends(version: int) -> list[int]:
        return [versions.index(update.end) for update in folder.since(version)]

    for _ in range(3):
        disturb(trained)
        states.append(state(trained))
    put(states[1])
    put(states[2])
    assert ends(versions[0]) == [1, 2]
    put(states[1])  # back: the newest version is one that was there before
    assert ends(versions[0]) == [1]
    assert ends(versions[1]) == []
    assert ends(versions[2]) == [1]
    put(states[0])
    assert ends(versions[0]) == []
    assert ends(versions[1]) == [0]
    # The trainer goes back to its first state and counts from 1 again: what is written later counts.
    again = Publisher(trained)
    trained.load_state_dict(states[3])
    path = folder.put(again.publish())
    os.utime(path, ns=(99 * 10**9, 99 * 10**9))
    versions.append(again.version)
    assert folder.since(versions[0])[-1].end == again.version
    assert folder.since(versions[2])[-1].end == again.version


def test_files_that_are_deleted_while_the_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, folder = model_of(), Folder(tmp_path)
    publisher = Publisher(trained)
    versions, paths = [publisher.version], []
    for _ in range(3):
        disturb(trained)
        paths.append(folder.put(publisher.publish()))
        versions.append(publisher.version)
    listed = os.listdir

    def then_deleted(path: Path) -> list[str]:
        names = listed(path)
        paths[0].unlink(missing_ok=True)
        return names

    monkeypatch.setattr("shira.sync.folder.os.listdir", then_deleted)
    assert [update.end for update in folder.since(versions[1])] == versions[2:]
    assert folder.since(versions[0]) == []
    assert not folder.knows(versions[0])


def test_an_overlay_whose_differences_would_be_from_another_base() -> None:
    """Of an adapter that replaces entries, an Overlay lays their differences from the base, which are made anew."""
    trained, served = model_of(torch.float32), model_of(torch.float32)
    publisher, follower = Publisher(trained), Receiver(served)
    overlay = shira.Overlay(served)
    overlay.add("on", overwriting(served))
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    disturb(trained)
    follower.stage(publisher.publish())
    before = state(served)
    with overlay.using("on"), pytest.raises(SyncError, match="an Overlay has 'on' in use, which replaces entries"):
        follower.commit()
    overlay.activate("on")
    with pytest.raises(SyncError, match=r"overlay\.deactivate\(\) first, and activate it again"):
        follower.commit()
    assert same(state(served), before)
    overlay.deactivate()
    follower.commit()
    overlay.activate("on")
    wanted = model_of(torch.float32)
    wanted.load_state_dict(trained.state_dict())
    with torch.no_grad():
        wanted[0].weight.view(-1)[::3] = 1
    torch.testing.assert_close(served(x), wanted(x))
    with pytest.raises(SyncError, match="rollback refused: an Overlay has 'on' in use"):
        follower.rollback()
    overlay.deactivate()
    follower.rollback()
    assert same(state(served), before)
    overlay.activate("on")
    wanted.load_state_dict(model_of(torch.float32).state_dict())
    with torch.no_grad():
        wanted[0].weight.view(-1)[::3] = 1
    torch.testing.assert_close(served(x), wanted(x))


def test_what_a_switcher_has_on_the_model_is_published_unless_it_is_disabled() -> None:
    model = model_of(torch.float32)
    publisher, switcher = Publisher(model), Switcher(model)
    switcher.add("on", overwriting(model))
    switcher.activate("on")
    with switcher.disabled():
        assert len(publisher.publish()) == 0
    update = publisher.publish()
    assert list(update.weights) == ["0.weight"]
    switcher.deactivate()
    assert publisher.publish().end == update.start


def test_an_overlay_of_deltas_goes_on_over_the_new_base() -> None:
    """In use and not, while a Switcher has another one in the weights."""
    trained, served = model_of(torch.float32), model_of(torch.float32)
    publisher, follower = Publisher(trained), Receiver(served)
    entry = Entry(torch.arange(5), torch.ones(5), tuple(served[0].weight.shape), torch.float32)
    overlay, switcher = shira.Overlay(served), Switcher(served)
    overlay.add("adds", Adapter({"0.weight": entry}, delta=True))
    switcher.add("on", overwriting(served))
    switcher.activate("on")
    overlay.activate("adds")
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    for _ in range(2):
        disturb(trained)
        follower.stage(publisher.publish())
        follower.commit()
        wanted = model_of(torch.float32)
        wanted.load_state_dict(trained.state_dict())
        with torch.no_grad():
            wanted[0].weight.view(-1)[::3] = 1
            wanted[0].weight.view(-1)[:5] += 1
        torch.testing.assert_close(served(x), wanted(x))
        overlay.verify()
        with overlay.using(["adds", None, "adds"]):
            torch.testing.assert_close(served(x)[::2], wanted(x)[::2])
    switcher.deactivate()
    served[0].weight.data.add_(1)
    with pytest.raises(shira.SwitchError, match=r"Overlay: 1 weight\(s\) are not what they were .* 0\.weight"):
        overlay.verify()


class Busy(weakref.WeakSet):  # type: ignore[type-arg]
    """A set to which another thread adds whenever somebody walks over it."""

    def __iter__(self) -> Iterator[object]:
        raise RuntimeError("Set changed size during iteration")


def test_switchers_and_tuners_that_other_threads_make(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in (
        ("_live", "switchers"),
        ("_live", "overlays"),
        ("train.tuner", "_held"),
        ("train._hooks", "groups"),
    ):
        monkeypatch.setattr(f"shira.{owner}.{name}", Busy())
    trained, served = model_of(torch.float32), model_of(torch.float32)
    publisher, follower, switcher = Publisher(trained), Receiver(served), Switcher(served)
    switcher.add("on", overwriting(served))
    switcher.activate("on")
    tuner = SparseTuner(trained, masks.Rand(density=0.1))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    trained(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    follower.stage(publisher.publish())
    follower.commit()
    switcher.deactivate()
    assert same(state(served), {name: one for name, one in state(trained).items() if name in state(served)})
    shira.detach(trained)
    assert same(state(trained), state(model_of(torch.float32)))
