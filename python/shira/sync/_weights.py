"""The weights of a live model that updates are about: each once, whatever names it has."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from shira import _granules, _model
from shira._granules import dtype_name
from shira._model import INDICES_SUFFIX, VALUES_SUFFIX
from shira.adapter import _file
from shira.sync.update import SyncError


@dataclass(eq=False)
class Weight:
    """A weight, and what is known about it."""

    slots: tuple[_model.Slot, ...]
    pointer: int
    # The fingerprint of the content that it is known to have, and its version counter then (None: inference tensors).
    fingerprint: int
    version: int | None
    # Its shape, strides and dtype.
    form: tuple[object, ...]

    @property
    def name(self) -> str:
        return self.slots[0].name

    @property
    def aliases(self) -> tuple[str, ...]:
        return tuple(slot.name for slot in self.slots[1:])

    @property
    def tensor(self) -> Tensor:
        """What its place holds now."""
        return self.slots[0].weight.detach()

    def note(self) -> None:
        """The content is what the fingerprint says."""
        self.version = _counter(self.slots[0].weight)

    def touched(self) -> bool:
        """Whether somebody wrote to it since, as far as versions tell."""
        now = _counter(self.slots[0].weight)
        return now is None or now != self.version

    def moved(self) -> str | None:
        """Why it is not the weight it was any more, as the rest of a sentence after its name; or None."""
        for slot in self.slots:
            if not slot.holds():
                return "is no longer the parameter it was"
        if self.slots[0].weight.data_ptr() != self.pointer:
            return "lies in other memory than it did (moved or cast, by .to(), say)"
        if _form(self.slots[0].weight) != self.form:
            return "has another shape, dtype or order of its entries than it had"
        return None


def _form(weight: Tensor) -> tuple[object, ...]:
    return weight.shape, weight.stride(), weight.dtype


def _counter(weight: Tensor) -> int | None:
    """Its version counter; inference tensors have none."""
    return None if weight.is_inference() else weight._version


def _followed(who: str, model: nn.Module, exclude: str | None) -> Iterator[_model.Slot]:
    """The places of parameters and persistent buffers that updates are about: all but a tuner's own, and `exclude`."""
    try:
        pattern = None if exclude is None else re.compile(exclude)
    except re.error as error:
        raise ValueError(f"{who}: exclude must be a regular expression, got {exclude!r}: {error}") from error
    for name, slot in _model.slots(model, buffers=True).items():
        if not name.endswith((VALUES_SUFFIX, INDICES_SUFFIX)) and (pattern is None or not pattern.search(name)):
            yield slot


def weights_of(who: str, model: nn.Module, exclude: str | None) -> dict[str, Weight]:
    """The model's parameters and persistent buffers by their first names; refuses what cannot be followed in place.

    A tuner's values and indices are not weights. Those whose names `exclude` is found in are left out.
    """
    groups: dict[object, list[_model.Slot]] = {}
    for slot in _followed(who, model, exclude):
        groups.setdefault(_model.memory(slot.weight), []).append(slot)
    for first, second in _model.overlaps([slots[0] for slots in groups.values()]):
        raise SyncError(
            f"{who}: {first.name} and {second.name} are different weights in overlapping memory; leave one out with "
            f"exclude="
        )
    found: dict[str, Weight] = {}
    for slots in groups.values():
        weight = slots[0].weight
        problem = _problem(slots, weight)
        if problem is not None:
            raise SyncError(f"{who}: {slots[0].name} {problem}; leave it out with exclude= if it does not change")
        found[slots[0].name] = Weight(
            tuple(slots), weight.data_ptr(), _granules.fingerprint(weight), _counter(weight), _form(weight)
        )
    if not found:
        raise SyncError(f"{who}: the model must have a parameter or persistent buffer, and has none that counts")
    return found


def _problem(slots: list[_model.Slot], weight: Tensor) -> str | None:
    if isinstance(weight, UninitializedParameter):
        return "has no shape yet; run the model once first"
    absent = _model.absent(slots[0])
    if absent is not None:
        return absent
    foreign = _model.foreign(weight)
    if foreign is not None:
        return foreign
    for slot in slots:
        if (slot.weight.shape, slot.weight.dtype) != (weight.shape, weight.dtype):
            return f"has the memory of {slot.name}, in another shape or dtype"
    if not weight.is_contiguous():
        return f"must be contiguous; {_model.stride_advice(slots[0].name, weight)}"
    if dtype_name(weight.dtype) not in _file.DTYPES:
        return f"must be one of {', '.join(_file.DTYPES)}, got {dtype_name(weight.dtype)}"
    return None


def by_call(weights: Iterable[tuple[Weight, int]]) -> Iterator[tuple[list[Weight], int]]:
    """Weights and granules, in groups that one foreach op takes: one device, one granule."""

    def key(item: tuple[Weight, int]) -> tuple[str, int]:
        return str(item[0].tensor.device), item[1]

    for (_, granule), group in groupby(sorted(weights, key=key), key):
        yield [weight for weight, _ in group], granule


def refuse_moved(who: str, model: nn.Module, weights: Collection[Weight], advice: str) -> None:
    gone = _model.gone(model, (slot for weight in weights for slot in weight.slots))
    if gone:
        raise SyncError(
            f"{who}: the module of {_model.some(gone)} was replaced, and is not in the model any more; {advice}"
        )
    for weight in weights:
        problem = weight.moved()
        if problem is not None:
            raise SyncError(f"{who}: {weight.name} {problem}; {advice}")


def refuse_added(who: str, model: nn.Module, exclude: str | None, weights: Collection[Weight], advice: str) -> None:
    """Refuse a model with weights that it did not have, which nobody would hear of."""
    known = {id(slot.weight) for weight in weights for slot in weight.slots}
    added = [slot.name for slot in _followed(who, model, exclude) if id(slot.weight) not in known]
    if added:
        raise SyncError(
            f"{who}: {_model.some(added)} came into the model after the {who} was made, and is not published; leave it "
            f"out with exclude=, or {advice}"
        )


def fingerprints(weights: Mapping[str, Weight]) -> dict[str, int]:
    return {name: weight.fingerprint for name, weight in weights.items()}
