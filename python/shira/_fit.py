"""Where an adapter's weights are in a model, and why they do not fit."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from shira import _live, _model, _text
from shira._granules import dtype_name
from shira._live import Weight
from shira._model import Slot
from shira._text import AdapterError
from shira.adapter import _checkpoint
from shira.adapter.adapter import Adapter


def places(
    where: str, adapter: Adapter, slots: Mapping[str, Slot], rename: _text.Rename
) -> dict[str, list[tuple[Slot, ...]]]:
    """Find each of the adapter's weights in the model; all that does not fit is said in one error.

    Gives the places of one weight for each; of several, where one that is tied in the adapter is not in the model.
    """
    _checkpoint.renamed(adapter.weights, rename)  # refuses two under one name
    renamed = _text.renamer(rename)
    problems: list[str] = []
    absent = False
    firsts: dict[str, list[Slot]] = {}
    owner: dict[object, str] = {}
    for name, entry in adapter.weights.items():
        known = [slots[other] for other in map(renamed, (name, *entry.aliases)) if other in slots]
        what = f"weight {name!r}"
        problem = misfit(known[0], entry.shape, entry.dtype) if known else "is not in the model"
        absent |= not known
        if problem is None:
            weights: dict[object, Slot] = {}
            for slot in known:
                weight = slot.weight
                if weight is not known[0].weight and (weight.shape, weight.dtype) != (entry.shape, entry.dtype):
                    what, problem = one_in_adapter(slot.name, known[0].name), "two that differ in the model"
                    break
                problem = misfit(slot, entry.shape, entry.dtype)
                if problem is not None:
                    what = f"weight {slot.name!r}"
                    break
                weights.setdefault(_model.memory(weight), slot)
            for key in weights:
                if owner.setdefault(key, name) != name:
                    problem = problem or f"is the same (tied) weight as {owner[key]!r}"
            firsts[name] = list(weights.values())
        if problem is not None:
            problems.append(f"{what} {problem}")
    if problems:
        more = f" ({len(problems)} problems in all)" if len(problems) > 5 else ""
        rule = _renaming(adapter, slots) if absent and rename is None else None
        advice = "" if rule is None else f"; with rename={rule!r} all of its names fit"
        raise AdapterError(f"{where} does not fit the model: {'; '.join(problems[:5])}{more}{advice}")
    problem = overlap([slot for found in firsts.values() for slot in found])
    if problem is not None:
        raise AdapterError(f"{where} does not fit the model: {problem}")
    # Of a tied weight every place is watched, whatever names the adapter has for it.
    shared: dict[object, list[Slot]] = {key: [] for key in owner}
    for slot in slots.values():
        if not isinstance(slot.weight, UninitializedParameter) and _model.foreign(slot.weight) is None:
            found = shared.get(_model.memory(slot.weight))
            if found is not None:
                found.append(slot)
                problem = _restless(slot)
                if problem is not None:
                    raise AdapterError(f"{where} does not fit the model: weight {slot.name!r} {problem}")

    def watched(first: Slot) -> tuple[Slot, ...]:
        return (first, *(slot for slot in shared[_model.memory(first.weight)] if slot.name != first.name))

    return {name: [watched(slot) for slot in found] for name, found in firsts.items()}


def overlap(slots: list[Slot], besides: Container[Weight] = ()) -> str | None:
    """Which weights share only a part of their memory, with each other or with those of any other adapters."""
    mine = set(map(id, slots))
    others = [weight.slot for weight in _live.known(slot.weight for slot in slots) if weight not in besides]
    for one, other in _model.overlaps([*slots, *others]):
        if id(one) in mine or id(other) in mine:
            return (
                f"{one.name} and {other.name} are different weights in overlapping memory (views of one tensor?), so "
                f"an adapter on one would change the other; use an adapter for only one of them"
            )
    return None


def one_in_adapter(alias: str, name: str) -> str:
    """The beginning of a sentence that goes on with what they are in the model."""
    return f"{alias} and {name} are one (tied) weight in the adapter, and"


def misfit(slot: Slot, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """Why entries of a weight of this shape and dtype cannot go onto the one in this place, or None."""
    weight: Tensor = slot.weight
    if isinstance(weight, UninitializedParameter):
        return "has no shape yet; run the model once first"
    if tuple(weight.shape) != tuple(shape):
        return f"must have shape {list(shape)}, got {list(weight.shape)}"
    if weight.dtype != dtype:
        return f"must have dtype {dtype_name(dtype)}, got {dtype_name(weight.dtype)}"
    if weight.is_meta:
        return "is on the meta device"
    foreign = _model.foreign(weight)
    if foreign is not None:
        return foreign
    if not weight.is_contiguous():
        return f"must be contiguous; {_model.stride_advice(slot.name, weight)}"
    return _restless(slot)


def _restless(slot: Slot) -> str | None:
    """That the module writes to its weight by itself, or None."""
    if isinstance(slot.module, (nn.Embedding, nn.EmbeddingBag)) and slot.module.max_norm is not None:
        return (
            f"is changed by its own forward (max_norm={slot.module.max_norm:g}), so there would be no way back to the "
            f"base; leave it out of the adapter, or set the module's max_norm to None"
        )
    return None


_WRAPPED = ".base_layer."


def _into_wrapped(rule: dict[str, str], adapter: Adapter, bare: Mapping[str, str]) -> list[dict[str, str]]:
    """The rule, and with it whatever leads to the wrapped layers among those it leads to: all, or some kinds."""
    rename = _text.renamer(rule)
    there = [name for name in map(rename, adapter.weights) if name in bare]
    kinds: tuple[set[str], set[str]] = set(), set()  # as they are, and wrapped
    for name in there:
        kinds[_WRAPPED in bare[name]].add(name.rpartition(".")[0].rpartition(".")[2])
    if not kinds[True]:
        return [rule]
    if not kinds[False]:
        return [{**rule, r"\.(\w+)$": r".base_layer.\1"}]
    named = "|".join(map(re.escape, sorted(kinds[True])))
    return [{**rule, rf"(\.(?:{named}))\.(\w+)$": r"\1.base_layer.\2"}]


def _renaming(adapter: Adapter, slots: Mapping[str, Slot]) -> dict[str, str] | None:
    """The one change of the beginnings of names with which all of them fit the model, if there is one.

    And of their ends, in a model whose layers PEFT has wrapped: there it calls the layer itself ``base_layer``.
    """
    bare = {name.replace(_WRAPPED, "."): name for name in slots}
    absent = (
        name for name, entry in adapter.weights.items() if not any(one in slots for one in (name, *entry.aliases))
    )
    first = next(absent).split(".")
    rules: dict[tuple[str, str], int] = {}
    for known in bare:
        parts = known.split(".")
        common = 0
        while common < min(len(first), len(parts)) and first[-1 - common] == parts[-1 - common]:
            common += 1
        if common:
            old, new = (".".join((*names[: len(names) - common], "")) for names in (first, parts))
            rules[old, new] = common
    longest = max(rules.values(), default=0)

    def fits(rule: dict[str, str]) -> bool:
        rename = _text.renamer(rule)
        for name, entry in adapter.weights.items():
            found = next((other for other in map(rename, (name, *entry.aliases)) if other in slots), None)
            if found is None or misfit(slots[found], entry.shape, entry.dtype) is not None:
                return False
        return True

    longest_rules = [names for names, common in rules.items() if common == longest]
    candidates = [{f"^{re.escape(old)}": new} if old or new else {} for old, new in longest_rules]
    if len(bare) == len(slots) and any(bare[name] != name for name in bare):
        candidates = [into for rule in candidates for into in _into_wrapped(rule, adapter, bare)]
    fitting = [rule for rule in candidates if fits(rule)]
    return fitting[0] if len(fitting) == 1 else None
