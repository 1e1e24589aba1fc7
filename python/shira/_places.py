"""Where an adapter's weights are in a live model: the rules of `shira._fit`, and those of memory that is written to."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from shira import _fit, _granules, _live, _model, _shards, _text
from shira._fit import Wanted
from shira._live import Weight
from shira._model import Slot
from shira._text import AdapterError

WHERE = "the model"


class Place:
    """A slot of a model, as the rules of `_fit` see it (`_fit.Found`). Its content is read at most once."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self._fingerprint: int | None = None

    @property
    def name(self) -> str:
        return self.slot.name

    @property
    def shape(self) -> tuple[int, ...]:
        return () if isinstance(self.slot.weight, UninitializedParameter) else tuple(self.slot.weight.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.slot.weight.dtype

    @property
    def one(self) -> object:
        return _model.memory(self.slot.weight)

    @property
    def foreign(self) -> str | None:
        weight = self.slot.weight
        if isinstance(weight, UninitializedParameter):
            return "has no shape yet; run the model once first"
        try:
            _shards.box(weight)
        except ValueError as error:
            return str(error)
        return _model.foreign(_shards.local(weight))

    @property
    def obstacle(self) -> str | None:
        here = _shards.local(self.slot.weight)
        absent = _model.absent(self.slot, ", or use an Overlay, which writes to no weight")
        if absent is not None:
            return absent
        if not here.is_contiguous():
            if _shards.is_dtensor(self.slot.weight):
                return (
                    "is a DTensor whose local tensor is not contiguous, and only contiguous memory can be written; "
                    "distribute a weight of which every rank has its own copy of its part"
                )
            return f"must be contiguous; {_model.stride_advice(self.name, self.slot.weight)}"
        return restless(self.slot)

    def fingerprint(self) -> int:
        if self._fingerprint is None:
            self._fingerprint = _granules.fingerprint(self.slot.weight)
        return self._fingerprint

    def equal(self, other: Place) -> bool:
        return self.fingerprint() == other.fingerprint()


class _Model:
    """A model's slots as a base."""

    def __init__(self, slots: Mapping[str, Slot]) -> None:
        self._slots = slots

    def get(self, name: str) -> Place | None:
        slot = self._slots.get(name)
        return None if slot is None else Place(slot)

    def names(self) -> Iterable[str]:
        return self._slots


def find(
    who: str, weights: Mapping[str, Wanted], slots: Mapping[str, Slot], rename: _text.Rename
) -> dict[str, tuple[Place, ...]]:
    """Find the places of an adapter's weights, by the adapter's names. One error lists everything that does not fit.

    A weight that is tied in the adapter and not in the model has several places; whether their content is the same is
    for the caller to check. Nothing is read.
    """
    here = _fit.renamed(weights, rename)
    advice = (lambda rule: f"rename={rule!r}") if rename is None else None
    found = _fit.places(who, here, _Model(slots), where=WHERE, kind="model", advice=advice)
    problem = overlap([place.slot for places in found.values() for place in places])
    if problem is not None:
        raise AdapterError(f"{who} does not fit the model: {problem}")
    return dict(zip(weights, found.values(), strict=True))


def watched(who: str, found: Iterable[Sequence[Place]], slots: Mapping[str, Slot]) -> list[list[tuple[Slot, ...]]]:
    """For each place all slots of the model that hold its weight, under any name; the place's own slot comes first."""
    listed = [list(places) for places in found]
    shared: dict[object, list[Slot]] = {place.one: [] for places in listed for place in places}
    for slot in slots.values():
        if not isinstance(slot.weight, UninitializedParameter) and _model.foreign(_shards.local(slot.weight)) is None:
            there = shared.get(_model.memory(slot.weight))
            if there is not None:
                there.append(slot)
                problem = restless(slot)
                if problem is not None:
                    raise AdapterError(f"{who} does not fit the model: {slot.name!r} {problem}")
    return [
        [(place.slot, *(slot for slot in shared[place.one] if slot.name != place.name)) for place in places]
        for places in listed
    ]


def places(
    who: str, weights: Mapping[str, Wanted], slots: Mapping[str, Slot], rename: _text.Rename
) -> dict[str, list[tuple[Slot, ...]]]:
    """`find` for weights that are written to, with every slot of each weight (`watched`)."""
    found = find(who, weights, slots, rename)
    problem = sealed([place.slot for there in found.values() for place in there])
    if problem is not None:
        raise AdapterError(f"{who} does not fit the model: {problem}")
    return dict(zip(found, watched(who, found.values(), slots), strict=True))


def misfit(slot: Slot, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why an entry for this shape and dtype cannot be applied to this slot: the rest of a sentence, or None."""
    return _fit.misfit(Place(slot), shape, dtype)


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


def sealed(slots: Iterable[Slot]) -> str | None:
    """Which weight cannot be written to."""
    found = _model.read_only(slots)
    return f"{found[0].name!r} {_model.read_only_advice(found[0])}" if found else None


def restless(slot: Slot) -> str | None:
    """Why the module itself would change its weight: the rest of a sentence, or None."""
    if isinstance(slot.module, (nn.Embedding, nn.EmbeddingBag)) and slot.module.max_norm is not None:
        return (
            f"is changed by its own forward (max_norm={slot.module.max_norm:g}), so there would be no way back to the "
            f"base; leave it out of the adapter, or set the module's max_norm to None"
        )
    return None
