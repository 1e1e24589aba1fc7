"""The weights of a live model, and who has adapters on them.

Everything that writes to a model in place asks here first, whichever wing it belongs to. However many Switchers reach a
weight, they share what they know about it: who has adapters on its memory (`Hold`), and the version and the base's
fingerprint that a Switcher last left or found there (`Record`). Training asks `refuse_active`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from shira import _granules, _linears, _model, _shards
from shira._granules import dtype_name

_T = TypeVar("_T")

LOCK = threading.RLock()
"""Held by every call that reads or writes weights or what is known about them: two Switchers may share a model."""


class SwitchError(RuntimeError):
    """A switch was refused, or it failed: the message says why, and which adapters are active now. Or a layer cannot be
    given what an `Overlay` has for it."""


@dataclass(eq=False)
class Hold:
    """Who has adapters on a piece of memory, through whichever parameters and models it is reached."""

    # Tells whether the memory was freed: then another tensor may have its address.
    storage: StorageWeakRef
    # The Switcher whose adapters are on it. If the reference is dead, the adapters are still on the memory, and nobody
    # can take them off.
    holder: weakref.ref[object] | None = None
    # What a Switcher that no longer exists left: the id of the parameter it wrote through, that parameter's version,
    # and the base's fingerprint.
    left: tuple[int, int | None, int | None] | None = None


@dataclass(eq=False)
class Record:
    """What Switchers know about a parameter."""

    # The base's fingerprint, once it has been read; of a sharded weight, that of this rank's part alone.
    base: int | None = None
    # Of a sharded weight: the fingerprint of the whole base, once the ranks have added it up.
    whole: int | None = None
    # Its version and address when a Switcher last wrote or verified it.
    version: int | None = None
    pointer: int | None = None


# Holds by memory; records by the id of the parameter, which lives as long as a Switcher uses its record. Both go with
# the last Switcher that uses them, and neither refers to a tensor: `torch.utils.swap_tensors` refuses tensors with weak
# references.
_holds: weakref.WeakValueDictionary[object, Hold] = weakref.WeakValueDictionary()
_records: weakref.WeakValueDictionary[int, Record] = weakref.WeakValueDictionary()
# Holds whose adapters belong to a Switcher that no longer exists, kept as long as the memory exists.
_abandoned: dict[object, Hold] = {}
_neighbours: weakref.WeakValueDictionary[object, Neighbours] = weakref.WeakValueDictionary()


switchers: weakref.WeakSet[Any] = weakref.WeakSet()
"""Every `Switcher` that exists."""
overlays: weakref.WeakSet[Any] = weakref.WeakSet()
"""Every `Overlay` that exists."""


def alive(registry: weakref.WeakSet[_T]) -> list[_T]:
    """What is in a registry now, while other threads may add to it."""
    references = list(registry.data)  # type: ignore[attr-defined]  # a single step, which no other thread interrupts
    return [one for reference in references if (one := reference()) is not None]


def base_of(tensor: Tensor) -> int | None:
    """The fingerprint of a weight that a Switcher left at the base, if nobody has written to it since."""
    record, hold = left(tensor), _holds.get(_model.memory(tensor))
    held = hold is None or hold.holder is not None or hold.storage.expired()
    if record is None or held:
        return None
    return record.whole if _shards.is_dtensor(tensor) else record.base


def holder(tensor: Tensor) -> Any | None:
    """The `Switcher` that has adapters on a weight, or None. Refuses one whose Switcher does not exist any more."""
    hold = _holds.get(_model.memory(tensor))
    if hold is None or hold.holder is None or hold.storage.expired():
        return None
    found = hold.holder()
    if found is None:
        raise SwitchError("the weight has adapters of a Switcher that no longer exists; load the base again")
    return found


def left(tensor: Tensor) -> Record | None:
    """What Switchers know about a weight that one of them wrote or examined last, whatever is on it."""
    record = _records.get(id(tensor))
    if record is None or tensor.is_inference() or record.version != _shards.version(tensor):
        return None
    return record if record.pointer == _shards.local(tensor).data_ptr() else None


def _hold(tensor: Tensor) -> Hold:
    for key, hold in list(_abandoned.items()):
        if hold.holder is None or hold.storage.expired():
            del _abandoned[key]
    key = _model.memory(tensor)
    found = _holds.get(key)
    if found is None or found.storage.expired():
        found = _holds[key] = Hold(StorageWeakRef(_shards.local(tensor).untyped_storage()))
    return found


def abandon(weights: Mapping[object, Weight], switcher: weakref.ref[object]) -> None:
    """Called when a Switcher with these weights is gone: remember the weights that still have its adapters on them."""
    for key, weight in weights.items():
        if weight.hold.holder is switcher:
            weight.hold.left = id(weight.slot.weight), weight.record.version, weight.record.base
            _abandoned[key] = weight.hold


class Neighbours(weakref.WeakSet["Weight"]):
    """The weights in one storage for which a Switcher has adapters."""


def _storage(tensor: Tensor) -> object:
    here = _shards.local(tensor)
    return here.device, here.untyped_storage().data_ptr()


def known(tensors: Iterable[Tensor]) -> list[Weight]:
    """The weights for which a Switcher has adapters, in the storages of these tensors."""
    found = (_neighbours.get(storage) for storage in dict.fromkeys(map(_storage, tensors)))
    return [weight for neighbours in found if neighbours is not None for weight in neighbours]


@dataclass(eq=False)
class Weight:
    """A weight of the model as it was when it was found: where it is, its memory, and what is known about both.

    Of a sharded weight (a DTensor), memory and content are those of this rank's part.
    """

    # Every place of the model that holds it (a tied weight has several); first the one by which it was found.
    places: tuple[_model.Slot, ...]
    record: Record
    hold: Hold
    pointer: int
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    # Inference tensors have no version: only `Switcher.verify` finds what others write to them.
    versioned: bool
    # Which part of a sharded weight this rank holds.
    box: _shards.Box | None = None
    neighbours: Neighbours | None = None

    @classmethod
    def of(cls, places: tuple[_model.Slot, ...], me: weakref.ref[object], verify: bool) -> Weight:
        """The weight in these places, for the Switcher ``me``; refuses one that has adapters of another Switcher.

        With `verify`, reads all of it for its fingerprint, unless that is known.
        """
        tensor = places[0].weight
        here = _shards.local(tensor)
        found = _records.get(id(tensor))
        weight = cls(
            places,
            found or Record(),
            _hold(tensor),
            here.data_ptr(),
            here.device,
            tensor.dtype,
            tensor.shape,
            not here.is_inference(),
            _shards.box(tensor),
        )
        refuse_first([weight], lambda one: one.held(me))
        seen = found is not None and found.pointer == weight.pointer and not weight.changed()
        if not seen or not weight.versioned:
            base = weight.fingerprint() if verify else None
            if found is None or base is None or base != found.base:
                # Not the base that was known. A Switcher that knew that one has the old record, and will find the
                # weight changed.
                weight.record = _records[id(tensor)] = Record(base)
            weight.note()
        storage = _storage(tensor)
        weight.neighbours = _neighbours.get(storage)
        if weight.neighbours is None:
            weight.neighbours = _neighbours[storage] = Neighbours()
        weight.neighbours.add(weight)
        return weight

    @property
    def slot(self) -> _model.Slot:
        return self.places[0]

    @property
    def name(self) -> str:
        return self.slot.name

    @property
    def tensor(self) -> Tensor:
        """The memory that is written: the parameter, or its local tensor."""
        return _shards.local(self.slot.weight)

    @property
    def key(self) -> object:
        """Tells its memory (`_model.memory`)."""
        return _model.memory(self.slot.weight)

    @property
    def base(self) -> int | None:
        """The fingerprint of the whole base, if it is known."""
        return self.record.base if self.box is None else self.record.whole

    def fingerprint(self) -> int:
        """The fingerprint of what the memory holds now. Reads all of it."""
        return _granules.fingerprint(self.tensor)

    def version(self) -> int | None:
        return _shards.version(self.slot.weight) if self.versioned else None

    def changed(self) -> bool:
        """Whether someone else has written to it since `note`, as far as its version tells."""
        return self.versioned and self.version() != self.record.version

    def note(self) -> None:
        """Remember the weight's version: it holds what we believe it to hold."""
        self.record.version = self.version()
        self.record.pointer = self.pointer

    def distrust(self) -> None:
        """From now on trust the weight only once its content has been compared."""
        self.record.version = -1  # no tensor has this version

    def place(self) -> str | None:
        """Why this weight cannot be written as it was found, or None."""
        return self.moved() or self.tuned()

    def moved(self) -> str | None:
        """Why the weight is not in the memory in which it was found, or None."""
        for place in self.places:
            if not place.holds():
                return f"{place.name} is no longer the parameter it was when an adapter for it was added; {_BACK}"
        weight = self.tensor
        shape = self.slot.weight.shape
        if shape != self.shape:
            return (
                f"{self.name} had shape {list(self.shape)} when an adapter for it was added, and has shape "
                f"{list(shape)} now; put it back, or make a new Switcher"
            )
        # New memory may have the old address; then the old memory was freed.
        stayed = weight.data_ptr() == self.pointer and not self.hold.storage.expired()
        if stayed and weight.device == self.device and weight.dtype == self.dtype:
            return None
        return (
            f"{self.name} was moved or cast (by .to(), say) since an adapter for it was added: it was "
            f"{dtype_name(self.dtype)} on {self.device}, it is {dtype_name(weight.dtype)} on {weight.device}, "
            f"{'in the same' if stayed else 'in other'} memory; "
            f"{_BACK if weight.dtype == self.dtype else _UNCAST}"
        )

    def tuned(self) -> str | None:
        """The sentence that says that a tuner trains it, or None."""
        for place in self.places:
            if place.tuned:
                return f"{place.name} is being tuned by a SparseTuner; detach it first (shira.detach(model))"
        return None

    def held(self, me: weakref.ref[object]) -> str | None:
        """Why the Switcher ``me`` may not put adapters on the weight, or None."""
        holder = self.hold.holder
        if holder is None or holder is me:
            return None
        if holder() is not None:
            return f"{self.name} has adapters of another Switcher: deactivate them there"
        if self._overwritten():
            self.hold.holder = self.hold.left = None
            return None
        return f"{self.name} has adapters of a Switcher that no longer exists; load the base again"

    def _overwritten(self) -> bool:
        """Whether the adapters of a Switcher that no longer exists are off the weight: it was written anew, or holds
        the base again."""
        if self.hold.left is None:
            return False
        identity, version, base = self.hold.left
        # Another parameter over the same memory has a version counter of its own.
        if self.versioned and id(self.slot.weight) == identity and self.version() != version:
            return True
        return base is not None and self.fingerprint() == base

    def divided(self, place: _model.Slot) -> str | None:
        """Why what a place holds now cannot stand for this rank's part of the weight, or None."""
        if _shards.box(place.weight) == self.box:
            return None
        return (
            f"{place.name} is divided between ranks in another way than when an adapter for it was added; divide it as "
            f"it was, or make a new Switcher"
        )

    def now(self) -> tuple[_model.Slot, ...]:
        """Its places, with the parameters that they hold now."""
        found = []
        for place in self.places:
            tensor = place.now()
            if tensor is None:
                raise SwitchError(f"Switcher: {place.name} is no longer in the model")
            found.append(replace(place, weight=cast("nn.Parameter", tensor)))
        return tuple(found)

    def rebind(self, fresh: Weight) -> None:
        """Become the weight that is in these places now. Its content is the same, and so is who has adapters on it."""
        base, whole, holder = self.record.base, self.record.whole, self.hold.holder
        self.hold.holder = None
        self.places, self.hold, self.record = fresh.places, fresh.hold, fresh.record
        self.pointer, self.device, self.versioned = fresh.pointer, fresh.device, fresh.versioned
        self.record.base, self.record.whole = base, whole
        self.hold.holder, self.neighbours = holder, fresh.neighbours
        if self.neighbours is not None:
            self.neighbours.add(self)
        self.note()


_BACK = (
    "rebind() goes on with what is there now if its content is right, and deactivate(verify=False) writes the base's "
    "entries there whatever it is"
)
_UNCAST = "cast it back and call rebind(), or load the base and make a new Switcher"


def refuse_first(weights: Iterable[Weight], why: Callable[[Weight], str | None]) -> None:
    """Raise `SwitchError` for the first weight for which ``why`` gives a reason."""
    for weight in weights:
        reason = why(weight)
        if reason is not None:
            raise SwitchError(f"Switcher: {reason}")


def refuse_active(model: torch.nn.Module) -> None:
    """Refuse to train a model with adapters on it: the result would belong to a base that nobody has."""
    holds = [reference() for reference in _holds.valuerefs()]
    if all(hold is None or hold.holder is None for hold in holds):
        return  # almost always
    with LOCK:
        # A weight that has moved to other memory since is found by its place.
        moved = {
            (place.module, place.attribute): weight.hold
            for neighbours in list(_neighbours.values())
            for weight in neighbours
            if weight.hold.holder is not None and weight.moved() is not None
            for place in weight.places
        }
    for slot in _linears.slots(model).values():
        hold = _holds.get(_model.memory(slot.weight))
        if hold is None or hold.holder is None or hold.storage.expired():
            hold = moved.get((slot.module, slot.attribute))
        if hold is None:
            continue
        record = _records.get(id(slot.weight))
        version = record.version if record is not None else hold.left and hold.left[1]
        # Where the version has moved, as after loading a state dict, the adapter is not on the weight any more.
        if slot.weight.is_inference() or version is None or version == _shards.version(slot.weight):
            whose = (
                "a Switcher"
                if hold.holder and hold.holder()
                else "a Switcher that no longer exists, so load the base again"
            )
            raise RuntimeError(
                f"SparseTuner: {slot.name} has an active adapter of {whose}: what is trained on top of it would fit no "
                f"base; switcher.deactivate() first (SparseTuner.from_adapter goes on training an adapter)"
            )
