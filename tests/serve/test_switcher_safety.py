"""Switcher: all or nothing whatever fails, and every way in which the weights may not be what it thinks they are."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import shira_ops
from shira import Adapter, AdapterError, Entry, SparseTuner, Switcher, SwitchError, _model, masks
from shira._live import Weight
from shira.serve import _layout, _streams
from shira_ops import reference
from switcher_walk import NAMES, PLANS, adapter_of, bits, differing, model_of, restore

OPS = ("foreach_scatter_", "foreach_switch_", "foreach_apply_", "fuse_", "fuse_plan", "gather", "scatter_",
       "check_indices", "fingerprint", "fingerprint_at", "apply_", "decode_indices")  # fmt: skip


def switcher_of(dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[nn.Module, Switcher]:
    model = model_of(dtype)
    switcher = Switcher(model, **options)
    for name in NAMES:
        switcher.add(name, adapter_of(model, name))
    return model, switcher


class Calls:
    """Counts the calls of every op, and fails one of them, before or after it did its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.fail_at: range = range(0)
        self.after = False
        self.error: BaseException = RuntimeError("injected")
        for name in OPS:
            monkeypatch.setattr(shira_ops, name, self.counted(name, getattr(shira_ops, name)))

    def counted(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number = len(self.seen)
            self.seen.append(name)
            if number in self.fail_at and not self.after:
                raise self.error
            result = op(*args, **kwargs)
            if number in self.fail_at:
                raise self.error
            return result

        return call

    def start(self, fail_at: range = range(0), after: bool = False) -> None:
        self.seen, self.fail_at, self.after = [], fail_at, after


STATES: list[dict[str, float]] = [{}, {"a": 1.0}, {"a": 0.5}, {"b": 1.0}, {"c": -0.25}, {"a": 0.5, "b": 1.0},
                                  {"a": 1.0, "b": 0.25}, {"b": 1.0, "c": 0.5, "d": 1.0}]  # fmt: skip


def go(switcher: Switcher, state: dict[str, float]) -> None:
    switcher.activate(state) if state else switcher.deactivate()


# ---- atomic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt("injected")], ids=["error", "interrupt"])
def test_an_error_at_any_op_leaves_the_old_state(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    model, switcher = switcher_of()
    calls = Calls(monkeypatch)
    calls.error = error
    injected = 0
    for before, after in itertools.permutations(STATES, 2):
        go(switcher, after)  # everything is staged now: what is left are the calls of the way itself
        go(switcher, before)
        calls.start()
        go(switcher, after)
        count, wanted = len(calls.seen), bits(model)
        assert count > 0
        go(switcher, before)
        state = bits(model)
        for number, late in itertools.product(range(count), (False, True)):
            calls.start(range(number, number + 1), late)
            says = "injected" if isinstance(error, KeyboardInterrupt) else "failed and nothing has changed: .*injected"
            with pytest.raises((SwitchError, KeyboardInterrupt), match=says):
                go(switcher, after)
            injected += 1
            calls.start()
            assert switcher.active == before
            assert differing(bits(model), state) == 0, (before, after, number, late, calls.seen)
            switcher.verify(full=True)
        go(switcher, after)
        assert differing(bits(model), wanted) == 0
    assert injected > 200


def test_an_error_while_staging_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model, switcher = switcher_of()
    adapter_of(model_of(torch.bfloat16), "a").save(tmp_path / "more.safetensors")
    switcher.activate("b")
    state = bits(model)
    calls = Calls(monkeypatch)
    calls.start()
    switcher.add("more", tmp_path / "more.safetensors")
    count = len(calls.seen)
    assert {"gather", "decode_indices"} <= set(calls.seen)
    switcher.remove("more")
    for number in range(count):
        calls.start(range(number, number + 1))
        with pytest.raises((RuntimeError, AdapterError), match="injected"):
            switcher.add("more", tmp_path / "more.safetensors")
        assert "more" not in switcher.adapters
        assert switcher.active == {"b": 1.0}
        assert differing(bits(model), state) == 0
    union = {"more": 1.0, "c": 1.0}  # of adapters that were never on: the base's entries, the plans, and the way itself
    switcher.remove("c")

    def add() -> None:
        switcher.add("more", tmp_path / "more.safetensors")
        switcher.add("c", adapter_of(model_of(torch.bfloat16), "c"))

    def remove() -> None:
        switcher.activate("b")
        switcher.remove("more")
        switcher.remove("c")

    calls.start()
    add()
    calls.start()
    switcher.activate(union)
    assert {"gather", "fuse_plan", "fuse_"} <= set(calls.seen)
    for number in range(len(calls.seen)):
        calls.start()
        remove()
        add()
        calls.start(range(number, number + 1))
        with pytest.raises(
            SwitchError, match=r"activating 'more' at 1, 'c' at 1 failed and nothing has changed: active"
        ):
            switcher.activate(union)
        assert switcher.active == {"b": 1.0}
        assert differing(bits(model), state) == 0


def test_a_way_back_that_fails_too_ends_at_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    model, switcher = switcher_of()
    base = bits(model)
    switcher.activate({"a": 1.0, "b": 1.0})
    calls = Calls(monkeypatch)
    calls.start(range(1, 1000))
    with pytest.raises(SwitchError, match="so did the way back to 'a' at 1, 'b' at 1: the weights are in between"):
        switcher.activate("d")
    with pytest.raises(RuntimeError, match="injected"):
        switcher.deactivate()
    calls.start()
    with pytest.raises(SwitchError, match="failed half way"):
        switcher.verify()
    assert switcher.active == {}
    switcher.deactivate()
    assert differing(bits(model), base) == 0
    switcher.verify(full=True)
    switcher.activate("d")


def test_an_error_at_any_op_of_a_block_and_of_a_way_back_from_other_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    before, moved = {"a": 0.5, "b": 1.0}, False

    def block(switcher: Switcher) -> None:
        with switcher.using("c"):
            assert switcher.active == {"c": 0.5}

    def elsewhere(switcher: Switcher) -> None:
        switcher.deactivate(verify=False)

    for run in (block, Switcher.rebind, elsewhere):
        moved, injected = run is not block, 0
        for number, late in ((step // 2, bool(step % 2)) for step in itertools.count()):
            calls.start()
            model, switcher = switcher_of()
            base = bits(model)
            switcher.activate(before)
            for parameter in model.parameters() if moved else ():
                parameter.data = parameter.data.clone()
            calls.start(range(number, number + 1), late)
            with contextlib.suppress(RuntimeError):
                run(switcher)
            if number >= len(calls.seen):
                break
            injected += 1
            calls.start()
            assert switcher.active in (before, {"c": 0.5})
            if run is elsewhere:
                switcher.deactivate(verify=False)
            switcher.rebind()
            assert differing(bits(model), fresh(switcher.active)) == 0, (run, number, late)
            switcher.verify(full=True)
            switcher.activate("d")
            switcher.deactivate()
            assert differing(bits(model), base) == 0
        assert injected >= 4


# ---- the base's entries of what was never on -----------------------------------------------------------------


def test_adding_does_not_read_the_base_s_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    gather = shira_ops.gather
    monkeypatch.setattr(
        shira_ops, "gather", lambda weight, indices, **k: read.append(len(indices)) or gather(weight, indices, **k)
    )
    model, switcher = switcher_of()
    assert len(read) == sum(map(len, PLANS.values()))
    assert set(read) == {1}
    base = bits(model)
    for name in NAMES:
        parts = switcher._shelf.layouts[name,].parts
        # A whole parameter is a single granule.
        assert {weight.name: part.has_base for weight, part in parts.items()} == {
            weight: weight == "2.bias" and name == "c" for weight, _, _ in PLANS[name]
        }
        switcher.activate(name)
        assert all(part.has_base for part in parts.values())
        switcher.remove(name)
        assert differing(bits(model), base) == 0
    assert set(read) == {1}


FIRST: list[tuple[dict[str, float], dict[str, float]]] = [
    ({}, {"a": 1.0}), ({}, {"b": 0.5}), ({}, {"c": 1.0}), ({}, {"d": 0.0}), ({}, {"a": 0.5, "b": 1.0, "c": 1.0}),
    ({"a": 0.5}, {"e": 1.0}), ({"a": 1.0}, {"b": 0.0}), ({"c": 1.0}, {"d": -0.25}), ({"b": 1.0}, {"d": 1.0}),
    ({"a": 1.0}, {"a": 1.0, "d": 0.5}), ({"a": 1.0, "b": 0.5}, {"d": 1.0}), ({"d": 1.0}, {"a": 0.5, "c": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt("injected")], ids=["error", "interrupt"])
def test_an_error_at_any_op_of_a_first_activation(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, inference: bool
) -> None:
    """Between an op and the next line of ours too: whether it read the base's entries must be found out."""
    calls = Calls(monkeypatch)
    calls.error = error
    injected = 0
    for before, after in FIRST:
        for number, late in ((step // 2, bool(step % 2)) for step in itertools.count()):
            calls.start()
            with torch.inference_mode(inference):
                model, switcher = switcher_of()
            base = bits(model)
            go(switcher, before)
            state = bits(model)
            calls.start(range(number, number + 1), late)
            with contextlib.suppress(SwitchError, KeyboardInterrupt):
                go(switcher, after)
            if number >= len(calls.seen):
                break
            injected += 1
            calls.start()
            assert switcher.active == before
            assert differing(bits(model), state) == 0, (before, after, number, late)
            switcher.verify(full=True)
            go(switcher, after)
            assert differing(bits(model), fresh(after)) == 0, (before, after, number, late)
            for layout in switcher._shelf.layouts.values():
                for weight, part in layout.parts.items():
                    if part.has_base:
                        entries = dict(model_of(torch.bfloat16).named_parameters())[weight.name].detach()
                        assert torch.equal(part.saved, shira_ops.gather(entries, part.indices, granule=part.granule))
            go(switcher, {})
            assert differing(bits(model), base) == 0, (before, after, number, late)
            switcher.verify(full=True)
    assert injected > 60


def test_an_interrupt_within_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops in Python, as other backends have, may be interrupted at any of their lines."""
    for name in ("foreach_scatter_", "foreach_switch_", "foreach_apply_"):
        monkeypatch.setattr(shira_ops, name, getattr(reference, name))
    left = 0

    def traced(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != reference.__file__:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return traced

    for lines in itertools.count():
        model, switcher = switcher_of()
        base = bits(model)
        switcher.activate("c")
        state, left = bits(model), lines
        try:
            sys.settrace(traced)
            switcher.activate("d")
        except KeyboardInterrupt:
            assert switcher.active == {"c": 0.5}
        finally:
            sys.settrace(None)
        if switcher.active == {"d": 1.0}:
            break
        assert differing(bits(model), state) == 0, lines
        go(switcher, {"d": 1.0} if lines % 2 else {})
        go(switcher, {})
        assert differing(bits(model), base) == 0, lines
        switcher.verify(full=True)
    assert lines > 100


@functools.cache
def _fresh(state: tuple[tuple[str, float], ...]) -> torch.Tensor:
    model, switcher = switcher_of()
    for name, _ in state:  # known before they are mixed
        switcher.activate(name)
    go(switcher, dict(state))
    return bits(model)


def fresh(state: dict[str, float]) -> torch.Tensor:
    """The weights in a state that was not entered in a hurry."""
    return _fresh(tuple(state.items()))


@pytest.mark.parametrize("count", [1, 2])
def test_adapters_added_while_others_are_on_the_same_weights(count: int) -> None:
    for *active, added in itertools.permutations(NAMES, count + 1):
        for state in ({added: 0.5}, dict.fromkeys((*active, added), 1.0), {}):
            model = model_of(torch.bfloat16)
            base = bits(model)
            switcher = Switcher(model)
            for name in active:
                switcher.add(name, adapter_of(model, name))
            switcher.activate(dict.fromkeys(active, 1.0))
            switcher.add(added, adapter_of(model_of(torch.bfloat16), added))
            switcher.verify()
            go(switcher, state)
            for name in active if len(state) > 1 else ():  # what was added is left alone at the end
                switcher.deactivate(name)
            assert differing(bits(model), fresh(switcher.active)) == 0
            switcher.verify(full=True)
            switcher.deactivate()
            assert differing(bits(model), base) == 0
            switcher.verify(full=True)


def test_what_others_did_before_an_adapter_was_first_on() -> None:
    model, switcher = switcher_of()
    base = bits(model)
    other = Switcher(model)
    other.add("c", adapter_of(model, "c"))

    def refused(says: str) -> None:
        state = bits(model)
        for wanted in ({"a": 1.0}, {"a": 1.0, "e": 1.0}, {"a": 1.0, "b": 0.5}):
            with pytest.raises(SwitchError, match=says):
                switcher.activate(wanted)
            assert differing(bits(model), state) == 0
        assert not any(part.has_base for part in switcher._shelf.layouts["a",].parts.values())

    with torch.no_grad():
        model[1].weight.add_(1)
    refused(r"1\.weight was changed by someone else")
    restore(model, base)
    other.activate("c")
    refused(r"1\.weight has adapters of another Switcher")
    other.deactivate()
    tuner = SparseTuner(model, masks.Rand(density=0.1))
    refused(r"0\.weight is being tuned")
    tuner.detach()
    with torch.no_grad():
        before = model[0].weight.detach().clone()
        for place in range(8):
            model[0].weight.data.view(-1)[place] += 1  # .data: no version moves
            with pytest.raises(SwitchError, match=r"do not hold the base: 0\.weight"):
                switcher.verify()
            model[0].weight.data.copy_(before)
    switcher.verify()
    assert not any(part.has_base for part in switcher._shelf.layouts["a",].parts.values())
    switcher.activate({"a": 1.0, "b": 0.5})
    assert differing(bits(model), fresh({"a": 1.0, "b": 0.5})) == 0
    switcher.deactivate()
    assert differing(bits(model), base) == 0


def test_adapters_that_were_never_on_leave_and_come_back() -> None:
    model, switcher = switcher_of(budget=1_000)
    base = bits(model)
    gone = [name for name, memory in switcher.memory().items() if not memory.device]
    assert gone
    for name in NAMES:
        switcher.activate(name)
        assert differing(bits(model), fresh({name: adapter_of(model_of(torch.bfloat16), name).alpha})) == 0
        switcher.verify(full=True)
    switcher.deactivate()
    assert differing(bits(model), base) == 0


# ---- one walk ----------------------------------------------------------------------------------------------


def test_from_one_to_another_each_weight_is_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    _, switcher = switcher_of()
    walks: dict[str, list[tuple[int, list[int]]]] = {}
    for name in OPS:
        op = getattr(shira_ops, name)

        def counted(first: Any, *args: Any, _op: Any = op, _name: str = name, granule: int = 1, **kwargs: Any) -> Any:
            members = first if isinstance(first, (list, tuple)) else [first]
            walks.setdefault(_name, []).append((granule, [member.data_ptr() for member in members]))
            return _op(first, *args, granule=granule, **kwargs)

        monkeypatch.setattr(shira_ops, name, counted)
    pointer = {name: parameter.data_ptr() for name, parameter in switcher.model.named_parameters()}

    def walked(before: str, after: str) -> dict[str, list[tuple[int, set[str]]]]:
        switcher.activate(before)
        walks.clear()
        switcher.activate(after)
        return {op: [(granule, {n for n, p in pointer.items() if p in members}) for granule, members in found]
                for op, found in walks.items()}  # fmt: skip

    # The same weights and granules; other granules, some weights only here or there; a divisor that neither has.
    assert walked("a", "e") == {"foreach_switch_": [(1, {"0.weight", "1.weight"})]}
    assert walked("a", "b") == {
        "foreach_scatter_": [(1, {"1.weight"})],
        "foreach_switch_": [(1, {"0.weight"})],
        "foreach_apply_": [(1, {"2.weight"})],
    }
    # A bias replaced as a whole and one entered by entries: a plain revert and apply.
    assert walked("c", "d") == {
        "foreach_scatter_": [(5, {"2.bias"})],
        "foreach_switch_": [(2, {"1.weight"})],
        "foreach_apply_": [(1, {"0.weight", "2.bias"}), (2, {"2.weight"})],
    }
    # From several to one of them, and to more.
    switcher.activate({"a": 1.0, "e": 1.0})
    walks.clear()
    switcher.activate("a")
    assert [len(found[1]) for found in walks.pop("foreach_switch_")] == [2]
    assert not walks
    switcher.activate({"a": 1.0, "e": 0.5, "b": 1.0})
    assert "foreach_scatter_" not in walks
    walks.clear()
    switcher.activate({"a": 0.5, "e": 1.0, "b": 0.25})
    assert {op: len(found) for op, found in walks.items()} == {"fuse_": 3}


def test_calls_are_grouped_by_device_and_granule() -> None:
    """Meta tensors stand for a second device: nothing is run."""

    def part(number: int, device: str, granule: int, adapter: str) -> tuple[Weight, _layout.Part]:
        parameter = weights.setdefault(number, nn.Parameter(torch.zeros(8, 8, device=device)))
        holder = nn.ParameterDict({"w": parameter})
        slot = next(iter(_model.slots(holder).values()))
        weight = found.setdefault(number, Weight.of((slot,), weakref.ref(holder), False))
        indices = torch.tensor([1, 3], dtype=torch.int32, device=device)
        entries = torch.zeros(2 * granule, device=device)
        return weight, _layout.Part(weight, (adapter,), indices, granule, [entries], [False], entries.clone())

    weights: dict[int, nn.Parameter] = {}
    found: dict[int, Weight] = {}
    places = [(0, "cpu", 1), (1, "meta", 1), (2, "cpu", 1), (3, "meta", 4), (4, "meta", 1)]
    one = _layout.Layout(("one",), dict(part(*place, "one") for place in places))
    two = _layout.Layout(("two",), dict(part(*place, "two") for place in places[1:]))
    way = _layout.way(one, two)
    shapes = [(call.op, call.columns[0][0].device.type, call.granule, len(call.columns[0])) for call in way.calls]
    assert sorted(shapes) == [("scatter", "cpu", 1, 1), ("switch", "cpu", 1, 1), ("switch", "meta", 1, 2),
                              ("switch", "meta", 4, 1)]  # fmt: skip
    assert all(len({tensor.device for column in call.columns for tensor in column}) == 1 for call in way.calls)
    assert {device.type for device in one.devices} == {"cpu", "meta"}


# ---- what others do to the weights -------------------------------------------------------------------------


def test_changes_by_others_are_refused_and_the_same_content_is_not() -> None:
    model, switcher = switcher_of()
    base = bits(model)
    switcher.activate("a")
    state = bits(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    for call in (switcher.deactivate, lambda: switcher.activate("b"), lambda: switcher.activate({"a": 0.5, "b": 0.5})):
        with pytest.raises(SwitchError, match=r"0\.weight was changed by someone else .* active is 'a' at 1"):
            call()
    with pytest.raises(SwitchError, match=r"1 weight\(s\) do not hold the base plus what is active: 0\.weight"):
        switcher.verify()
    restore(model, state)
    switcher.activate("b")  # the version moved, the content is right
    switcher.deactivate()
    assert differing(bits(model), base) == 0
    # A weight that the next adapter does not touch does not matter.
    switcher.activate("a")
    with torch.no_grad():
        model[2].bias.zero_()
    switcher.activate("e")
    with pytest.raises(SwitchError, match=r"2\.bias was changed"):
        switcher.activate("c")
    assert switcher.active == {"e": 1.0}


def test_the_base_s_entries_can_be_written_back_all_the_same() -> None:
    model, switcher = switcher_of()
    base = model[0].weight.detach().clone()
    switcher.activate("a")
    entries = switcher.adapters["a"].weights["0.weight"].indices.long()
    with torch.no_grad():
        model[0].weight.fill_(7)
    switcher.deactivate(verify=False)
    expected = torch.full_like(base, 7).flatten()
    expected[entries] = base.flatten()[entries]
    assert torch.equal(model[0].weight.detach().flatten(), expected)
    with pytest.raises(SwitchError, match="changed by someone else"):  # and it is not taken for the base
        switcher.activate("a")
    with torch.no_grad():
        model[0].weight.copy_(base)
    switcher.activate("a")
    switcher.verify(full=True)


def test_weights_that_were_trained_on_are_another_base() -> None:
    model, switcher = switcher_of()
    for name in NAMES:
        switcher.remove(name)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(AdapterError, match="another base"):
        switcher.add("a", adapter_of(model_of(torch.bfloat16), "a"))
    switcher.add("a", adapter_of(model, "a"))
    switcher.activate("a")
    switcher.verify(full=True)


def test_verify_finds_what_versions_do_not_tell() -> None:
    model, switcher = switcher_of()
    for name in NAMES:
        switcher.activate(name)
    for active in ({}, {"a": 1.0}, {"a": 0.5, "b": 1.0}):
        go(switcher, active)
        switcher.verify()
        switcher.verify(full=True)
        touched = torch.zeros(96, dtype=torch.bool)
        for name in active or ("a", "b", "c", "d", "e"):
            entry = switcher.adapters[name].weights.get("0.weight")
            if entry is not None:
                touched.view(-1, entry.granule)[entry.indices.long()] = True
        for place, quick in ((int(touched.nonzero()[0]), True), (int((~touched).nonzero()[0]), False)):
            before = model[0].weight.detach().clone()
            model[0].weight.data.view(-1)[place] += 1  # .data: no version moves
            if quick:
                with pytest.raises(SwitchError, match=r"do not hold .*: 0\.weight"):
                    switcher.verify()
            else:
                switcher.verify()
            with pytest.raises(SwitchError, match=r"do not hold .*: 0\.weight"):
                switcher.verify(full=True)
            model[0].weight.data.copy_(before)
            go(switcher, {"c": 1.0})
            go(switcher, active)
    go(switcher, {})


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_inference_tensors(inside: bool) -> None:
    with torch.inference_mode():
        model = model_of(torch.bfloat16)
    assert model[0].weight.is_inference()
    base = bits(model)
    with torch.inference_mode(inside):
        switcher = Switcher(model)
        for name in NAMES:
            switcher.add(name, adapter_of(model, name))
        for state in STATES[1:]:
            switcher.activate(state)
            switcher.verify(full=True)
            switcher.fingerprint("0.weight")
    with torch.inference_mode():
        switcher.activate("a")
        before = model[0].weight.clone()
        model[0].weight.view(-1)[switcher.adapters["a"].weights["0.weight"].indices[0]] += 1
    with pytest.raises(SwitchError, match=r"0\.weight"):
        switcher.verify()
    with torch.inference_mode():
        model[0].weight.copy_(before)
    switcher.deactivate()
    assert differing(bits(model), base) == 0


def test_weights_that_moved_are_refused() -> None:
    model, switcher = switcher_of()
    switcher.activate("a")
    model.to(torch.float32)
    says = r"0\.weight was moved or cast .* bfloat16 on cpu, it is float32 on cpu, in other memory; cast it back"
    for call in (switcher.deactivate, lambda: switcher.activate("b"), switcher.verify):
        with pytest.raises(SwitchError, match=says):
            call()
    assert switcher.active == {"a": 1.0}
    # Made new, on a model that has its base again.
    model.load_state_dict(model_of(torch.float32).state_dict())
    fresh = Switcher(model)
    fresh.add("a", adapter_of(model, "a"))
    fresh.activate("a")
    fresh.verify(full=True)


def test_a_tuner_and_a_switcher_take_turns() -> None:
    model, switcher = switcher_of()
    switcher.activate("a")
    switcher.deactivate()
    tuner = SparseTuner(model, masks.Rand(density=0.1))
    with pytest.raises(SwitchError, match=r"0\.weight is being tuned by a SparseTuner; detach it first"):
        switcher.activate("a")
    with torch.no_grad():
        next(tuner.parameters()).add_(1)
    trained = tuner.adapter()
    with pytest.raises(SwitchError, match="is being tuned"):
        switcher.add("trained", trained)
    tuner.detach()
    switcher.add("trained", trained)  # versions moved, the base is back
    switcher.activate({"trained": 1.0, "a": 0.5})
    switcher.deactivate()
    switcher.verify(full=True)


def test_two_switchers_on_one_model() -> None:
    model, one = switcher_of()
    two = Switcher(model)
    two.add("a", adapter_of(model, "a"))
    base = bits(model)
    one.activate("b")
    with pytest.raises(SwitchError, match=r"0\.weight has adapters of another Switcher: deactivate them there"):
        two.activate("a")
    with pytest.raises(SwitchError, match=r"has adapters of another Switcher"):
        two.add("d", adapter_of(model_of(torch.bfloat16), "d"))
    one.verify(full=True)
    two.verify(full=True)  # of the weights that are its own to judge
    one.deactivate()
    two.activate("a")
    with pytest.raises(SwitchError, match=r"another Switcher"):
        one.activate("e")
    two.deactivate()
    one.activate("e")
    one.deactivate()
    assert differing(bits(model), base) == 0
    two.activate("a")
    del two
    gc.collect()
    with pytest.raises(SwitchError, match="a Switcher that no longer exists"):
        one.activate("e")
    restore(model, base)
    three = Switcher(model)
    three.add("a", adapter_of(model, "a"))
    three.activate("a")
    three.verify(full=True)


def test_threads_take_turns() -> None:
    model, switcher = switcher_of()
    base, errors = bits(model), []
    barrier = threading.Barrier(4)

    def work(name: str) -> None:
        try:
            barrier.wait()
            for turn in range(60):
                switcher.activate(name, alpha=0.5) if turn % 3 else switcher.activate({name: 1.0, "e": 0.5})
                switcher.verify()
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    switcher.verify(full=True)
    switcher.deactivate()
    assert differing(bits(model), base) == 0


def test_names_and_numbers_that_do_not_fit() -> None:
    _, switcher = switcher_of()
    for call, kind, says in (
        (lambda: switcher.deactivate("a"), AdapterError, "'a' is not active; active are: none"),
        (lambda: switcher.activate("a", 1e39), ValueError, "must be a finite number"),
        (lambda: switcher.activate(["a", "b"]), TypeError, "a mapping of names to strengths, got list"),  # type: ignore[arg-type]
        (lambda: copy.deepcopy(switcher), TypeError, "cannot be copied or pickled"),
        (lambda: pickle.dumps(switcher), TypeError, "cannot be copied or pickled"),
        (lambda: switcher.fingerprint("nothing"), KeyError, "no weight 'nothing'"),
        (lambda: switcher.add(3, "a.safetensors"), TypeError, "add: name must be a string, got int 3"),  # type: ignore[arg-type]
        (lambda: switcher.add("a", {}), TypeError, r"add: adapter must be a path \(.*\), got dict"),  # type: ignore[arg-type]
        (lambda: Switcher(nn.Linear(1, 1), budget=-1), ValueError, "budget"),
    ):
        with pytest.raises(kind, match=says):
            call()
    whole = Adapter({"weight": Entry(torch.tensor([0]), torch.ones(1, dtype=torch.int8), (2, 2), torch.int8)})
    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False))
    quantized = Switcher(model)
    quantized.add("a", whole)
    quantized.add("b", whole)
    quantized.activate("a")
    with pytest.raises(SwitchError, match=r"nothing has changed: active is .a. at 1\. Cause: fuse_"):
        quantized.activate({"a": 1.0, "b": 1.0})
    assert model.weight.tolist() == [[1, 0], [0, 0]]


def test_streams_are_ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins record what would be asked of a GPU, in order: no GPU is needed, and none is used."""
    told: list[str] = []

    class Event:
        def __init__(self, of: str) -> None:
            self.of = of

        def synchronize(self) -> None:
            told.append(f"host waits for {self.of}")

    class Stream:
        def __init__(self, device: torch.device, name: str = "side") -> None:
            self.name = f"{name} {device.index}"

        def wait_stream(self, other: Stream) -> None:
            told.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: Event) -> None:
            told.append(f"{self.name} waits for {event.of}")

        def record_event(self) -> Event:
            told.append(f"{self.name} marks")
            return Event(self.name)

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        told.append(f"on {stream.name}")
        yield
        told.append(f"off {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, "caller"))
    one, two, cpu = torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cpu")
    streams = _streams.Streams()
    with streams.staging([one, cpu, two, one]) as ready:
        told.append("staged")
    assert told == ["side 0 waits for caller 0", "on side 0", "side 1 waits for caller 1", "on side 1", "staged",
                    "side 0 marks", "side 1 marks", "off side 1", "off side 0"]  # fmt: skip
    told.clear()
    _streams.wait(ready)  # a commit
    layout = _layout.Layout(("a",), {}, ready, _streams.mark([one, cpu, two]))
    layout.freeing()
    layout.freeing()
    assert told == ["caller 0 waits for side 0", "caller 1 waits for side 1", "caller 0 marks", "caller 1 marks",
                    "host waits for caller 0", "host waits for caller 1"]  # fmt: skip


def test_a_module_that_was_replaced_is_found() -> None:
    """By `verify` and `rebind`, which may walk over the model: what is written into the old module has no effect."""
    model, switcher = switcher_of()
    switcher.activate("a")
    parent, old = model, model[0]
    parent[0] = copy.deepcopy(old)
    for call in (switcher.verify, switcher.rebind):
        with pytest.raises(
            SwitchError, match=r"the module of 0\.weight.* is no longer a part of the model: .*active is 'a'"
        ):
            call()
    parent[0] = old
    switcher.verify(full=True)
    switcher.rebind()
    # A module that is wrapped is still there.
    parent[0] = nn.Sequential(old)
    switcher.verify(full=True)
