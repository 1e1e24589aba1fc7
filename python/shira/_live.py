"""The weights of a live model: what every `Switcher` on it must know of them before it writes.

However many Switchers reach a weight, they share what is known of it: who has adapters on its memory (`Hold`), and the
version and the base's fingerprint that a Switcher last left or found (`Ledger`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import shira_ops
from shira import _model
from shira._granules import dtype_name
from shira._model import VALUES_SUFFIX

LOCK = threading.RLock()
"""Held by every call that reads or writes weights or ledgers: two Switchers may share a model."""

_WORD = 2**64 - 1


class SwitchError(RuntimeError):
    """A switch that is refused or failed. The message says why, and what is active now."""


@dataclass(eq=False)
class Hold:
    """Who has adapters on a piece of memory, through whichever parameters and models it is reached."""

    # Tells whether the memory is gone: its address may then be another's.
    storage: StorageWeakRef
    # The Switcher whose adapters are on it. A dead reference: they are still on it, and nobody can take them off.
    holder: weakref.ref[object] | None = None
    # Of a dead one: the identity of the parameter that it wrote through, the version it left, and the base.
    left: tuple[int, int | None, int | None] | None = None


@dataclass(eq=False)
class Ledger:
    """What is known of a parameter."""

    # The base's fingerprint, once it was read.
    base: int | None = None
    # Its version and address when a Switcher last wrote or verified it.
    version: int | None = None
    pointer: int | None = None


# Both go with the last Switcher that uses them, and refer to no tensor: `torch.utils.swap_tensors` takes none that has
# weak references. By memory, and by the identity of the parameter, which lives as long as its ledger's users.
_holds: weakref.WeakValueDictionary[object, Hold] = weakref.WeakValueDictionary()
_ledgers: weakref.WeakValueDictionary[int, Ledger] = weakref.WeakValueDictionary()
# Those with adapters of Switchers that are gone, as long as there is the memory.
_abandoned: dict[object, Hold] = {}
_neighbours: weakref.WeakValueDictionary[object, Neighbours] = weakref.WeakValueDictionary()


switchers: weakref.WeakSet[Any] = weakref.WeakSet()
"""Every `Switcher` there is."""


def base_of(tensor: Tensor) -> int | None:
    """The fingerprint of a weight that a Switcher left at the base, if nobody has written to it since."""
    ledger, hold = _ledgers.get(id(tensor)), _holds.get(_model.memory(tensor))
    held = hold is None or hold.holder is not None or hold.storage.expired()
    if ledger is None or held or tensor.is_inference() or ledger.version != tensor._version:
        return None
    return ledger.base if ledger.pointer == tensor.data_ptr() else None


def _hold(tensor: Tensor) -> Hold:
    for key, hold in list(_abandoned.items()):
        if hold.holder is None or hold.storage.expired():
            del _abandoned[key]
    key = _model.memory(tensor)
    found = _holds.get(key)
    if found is None or found.storage.expired():
        found = _holds[key] = Hold(StorageWeakRef(tensor.untyped_storage()))
    return found


def abandon(weights: Mapping[object, Weight], switcher: weakref.ref[object]) -> None:
    """A Switcher is gone, with these weights. Where its adapters are on them, that stays known."""
    for key, weight in weights.items():
        if weight.hold.holder is switcher:
            weight.hold.left = id(weight.tensor), weight.ledger.version, weight.ledger.base
            _abandoned[key] = weight.hold


class Neighbours(weakref.WeakSet["Weight"]):
    """The weights in one storage that any Switcher has adapters for."""


def _storage(tensor: Tensor) -> object:
    return tensor.device, tensor.untyped_storage().data_ptr()


def known(tensors: Iterable[Tensor]) -> list[Weight]:
    """The weights that any Switcher has adapters for, in the storages of these."""
    found = (_neighbours.get(storage) for storage in dict.fromkeys(map(_storage, tensors)))
    return [weight for neighbours in found if neighbours is not None for weight in neighbours]


@dataclass(eq=False)
class Weight:
    """A weight of the model as it was when it was found: where it is, its memory, what is known of both."""

    # Every place of the model that holds it (tied weights have several), the one it was found by first.
    places: tuple[_model.Slot, ...]
    ledger: Ledger
    hold: Hold
    pointer: int
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    # Inference tensors have no version: what others write to them only `Switcher.verify` finds.
    versioned: bool
    neighbours: Neighbours | None = None

    @classmethod
    def of(cls, places: tuple[_model.Slot, ...], switcher: object, verify: bool) -> Weight:
        """A weight of the model, free for this Switcher; reads it all for its fingerprint, unless that is known."""
        tensor = places[0].weight
        found = _ledgers.get(id(tensor))
        weight = cls(
            places,
            found or Ledger(),
            _hold(tensor),
            tensor.data_ptr(),
            tensor.device,
            tensor.dtype,
            tensor.shape,
            not tensor.is_inference(),
        )
        refuse_first([weight], lambda one: one.held(switcher))
        seen = found is not None and found.pointer == weight.pointer and not weight.changed()
        if not seen or not weight.versioned:
            base = weight.fingerprint() if verify else None
            if found is None or base is None or base != found.base:
                # Another base than the one that was known. Whoever knew that one finds it gone: its ledger is old.
                weight.ledger = _ledgers[id(tensor)] = Ledger(base)
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
        return self.slot.weight

    def fingerprint(self) -> int:
        """Of what the memory now holds: one read of it."""
        return fingerprint(self.tensor)

    def changed(self) -> bool:
        """Whether someone else wrote since the last time, as far as versions tell."""
        return self.versioned and self.tensor._version != self.ledger.version

    def note(self) -> None:
        """The weight is what we know it to be."""
        self.ledger.version = self.tensor._version if self.versioned else None
        self.ledger.pointer = self.pointer

    def distrust(self) -> None:
        """Whatever stands there now is taken for right only when its content is."""
        self.ledger.version = -1  # no version

    def place(self) -> str | None:
        """Why this is not the weight it was, or None."""
        return self.moved() or self.tuned()

    def moved(self) -> str | None:
        """Why this is not the memory it was, or None."""
        for place in self.places:
            if not place.holds():
                return f"{place.name} is no longer the parameter it was when an adapter for it was added; {_BACK}"
        weight = self.tensor
        if weight.shape != self.shape:
            return (
                f"{self.name} had shape {list(self.shape)} when an adapter for it was added, and has shape "
                f"{list(weight.shape)} now; put it back, or make a new Switcher"
            )
        # New memory may come at the old address: then what was there is gone.
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
        """That a tuner trains it, or None."""
        for place in self.places:
            if place.attribute + VALUES_SUFFIX in place.module._parameters:
                return f"{place.name} is being tuned by a SparseTuner; detach it first (shira.detach(model))"
        return None

    def held(self, switcher: object) -> str | None:
        """Why this Switcher may not have adapters on the weight, or None."""
        holder = self.hold.holder
        if holder is None or holder() is switcher:
            return None
        if holder() is not None:
            return f"{self.name} has adapters of another Switcher: deactivate them there"
        if self._overwritten():
            self.hold.holder = self.hold.left = None
            return None
        return f"{self.name} has adapters of a Switcher that no longer exists; load the base again"

    def _overwritten(self) -> bool:
        """Whether what a Switcher that is gone had on the weight is gone too: written anew, or back at the base."""
        if self.hold.left is None:
            return False
        identity, version, base = self.hold.left
        # Another parameter over the memory has versions of its own.
        if self.versioned and id(self.tensor) == identity and self.tensor._version != version:
            return True
        return base is not None and self.fingerprint() == base

    def now(self) -> tuple[_model.Slot, ...]:
        """Its places with what they hold now."""
        found = []
        for place in self.places:
            tensor = place.now()
            if tensor is None:
                raise SwitchError(f"Switcher: {place.name} is no longer in the model")
            found.append(replace(place, weight=cast("nn.Parameter", tensor)))
        return tuple(found)

    def rebind(self, fresh: Weight) -> None:
        """Be the weight that was found in its places now. Its content is the same, and so is who has adapters on it."""
        base, holder = self.ledger.base, self.hold.holder
        self.hold.holder = None
        self.places, self.hold, self.ledger = fresh.places, fresh.hold, fresh.ledger
        self.pointer, self.device, self.versioned = fresh.pointer, fresh.device, fresh.versioned
        self.ledger.base, self.hold.holder, self.neighbours = base, holder, fresh.neighbours
        if self.neighbours is not None:
            self.neighbours.add(self)
        self.note()


_BACK = (
    "rebind() goes on with what is there now if its content is right, and deactivate(verify=False) writes the base's "
    "entries there whatever it is"
)
_UNCAST = "cast it back and call rebind(), or load the base and make a new Switcher"


def fingerprint(weight: Tensor) -> int:
    return int(shira_ops.fingerprint(weight.detach())) & _WORD


def fingerprint_at(weight: Tensor, indices: Tensor, granule: int) -> int:
    return int(shira_ops.fingerprint_at(weight.detach(), indices, granule=granule)) & _WORD


def word(number: int) -> int:
    """Mod 2^64, as fingerprints are."""
    return number & _WORD


def refuse_first(weights: Iterable[Weight], why: Callable[[Weight], str | None]) -> None:
    """Raise for the first weight that has a reason."""
    for weight in weights:
        reason = why(weight)
        if reason is not None:
            raise SwitchError(f"Switcher: {reason}")


def refuse_active(model: torch.nn.Module) -> None:
    """Refuse to train a model with adapters on it: what is trained there is of a base that nobody has."""
    holds = [reference() for reference in _holds.valuerefs()]
    if all(hold is None or hold.holder is None for hold in holds):
        return  # as it is at almost every step
    with LOCK:
        # Where the weight is in other memory since, the place tells.
        moved = {
            (place.module, place.attribute): weight.hold
            for neighbours in list(_neighbours.values())
            for weight in neighbours
            if weight.hold.holder is not None and weight.moved() is not None
            for place in weight.places
        }
    for slot in _model.slots(model, buffers=True).values():
        hold = _holds.get(_model.memory(slot.weight))
        if hold is None or hold.holder is None or hold.storage.expired():
            hold = moved.get((slot.module, slot.attribute))
        if hold is None:
            continue
        ledger = _ledgers.get(id(slot.weight))
        version = ledger.version if ledger is not None else hold.left and hold.left[1]
        # Where the version moved, as by loading a state, what was on it is not any more.
        if slot.weight.is_inference() or version is None or version == slot.weight._version:
            whose = (
                "a Switcher"
                if hold.holder and hold.holder()
                else "a Switcher that no longer exists, so load the base again"
            )
            raise RuntimeError(
                f"SparseTuner: {slot.name} has an active adapter of {whose}: what is trained on top of it would fit no "
                f"base; switcher.deactivate() first (SparseTuner.from_adapter goes on training an adapter)"
            )


def _is_plain(place: _model.Slot) -> bool:
    """Whether it is a parameter in a dictionary, as almost all are: not a buffer, nor of a TorchScript module."""
    return isinstance(place.weight, nn.Parameter) and isinstance(place.module._parameters, dict)


class Watch:
    """Several weights, looked at together: tells in a fraction of a microsecond each that nothing happened to them."""

    def __init__(self, weights: Iterable[Weight]) -> None:
        self.weights = list(weights)
        places = [place for weight in self.weights for place in weight.places]
        self._parameters = [place for place in places if _is_plain(place)]
        self._others = [place for place in places if not _is_plain(place)]
        self._tuned = [place.attribute + VALUES_SUFFIX for place in self._parameters]
        self._pointers = [weight.pointer for weight in self.weights]
        self._tensors = [weight.tensor for weight in self.weights]
        self._numels = [weight.shape.numel() for weight in self.weights]
        self._ledgers = [weight.ledger for weight in self.weights]
        self._holds = [weight.hold for weight in self.weights]
        self._versioned = [(weight.tensor, weight.ledger) for weight in self.weights if weight.versioned]

    def undisturbed(self, switcher: weakref.ref[object]) -> bool:
        """Whether all weights are in place, not trained, not another Switcher's, and as they were last left."""
        homes = [place.module._parameters for place in self._parameters]
        return (
            all(home.get(place.attribute) is place.weight for home, place in zip(homes, self._parameters, strict=True))
            and not any(tuned in home for home, tuned in zip(homes, self._tuned, strict=True))
            and all(place.holds() for place in self._others)
            and [tensor.data_ptr() for tensor in self._tensors] == self._pointers
            and not any(hold.storage.expired() for hold in self._holds)
            and [tensor.numel() for tensor in self._tensors] == self._numels
            and all(tensor._version == ledger.version for tensor, ledger in self._versioned)
            and all(hold.holder is None or hold.holder is switcher for hold in self._holds)
        )

    def left(self, switcher: weakref.ref[object], on: Container[Weight]) -> None:
        """Note that we leave the weights as they are, with adapters on some of them."""
        for weight, ledger, hold in zip(self.weights, self._ledgers, self._holds, strict=True):
            hold.holder = switcher if weight in on else None
            ledger.pointer = weight.pointer
        for tensor, ledger in self._versioned:
            ledger.version = tensor._version


# ---- GPUs --------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Streams:
    """The side streams that adapters come over, one for each GPU: transfers run beside the model's computation."""

    _side: dict[torch.device, torch.cuda.Stream] = field(default_factory=dict)

    @contextmanager
    def staging(self, devices: Iterable[torch.device]) -> Iterator[dict[torch.device, torch.cuda.Event]]:
        """Work inside runs on side streams, after what the caller's streams were given so far. At the end the yielded
        dictionary has the events that whoever uses the results must wait for."""
        ready: dict[torch.device, torch.cuda.Event] = {}
        gpus = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
        with ExitStack() as stack:
            for device in gpus:
                side = self._side.setdefault(device, torch.cuda.Stream(device))
                side.wait_stream(torch.cuda.current_stream(device))
                stack.enter_context(torch.cuda.stream(side))
            yield ready
            for device in gpus:
                ready[device] = self._side[device].record_event()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a weight's device; on its way there from pinned memory, in the order of the current stream."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def wait(ready: dict[torch.device, torch.cuda.Event]) -> None:
    """The caller's streams go on when these events have happened; the host does not wait."""
    for device, event in ready.items():
        torch.cuda.current_stream(device).wait_event(event)


def mark(devices: Iterable[torch.device]) -> dict[torch.device, torch.cuda.Event]:
    """Events that happen when the caller's streams have done what they were given so far."""
    gpus = dict.fromkeys(device for device in devices if device.type == "cuda")
    return {device: torch.cuda.current_stream(device).record_event() for device in gpus}
