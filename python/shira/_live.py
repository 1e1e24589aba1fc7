"""The weights of a live model: what every `Switcher` on it must know of them before it writes.

A weight has one ledger in the whole process, however many Switchers reach it: who has adapters on it, the version that
was last written by a Switcher, and the fingerprint of its base.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

import shira_ops
from shira import _model
from shira._targets import VALUES_SUFFIX
from shira.adapter import dtype_name

LOCK = threading.RLock()
"""Held by every call that reads or writes weights or ledgers: two Switchers may share a model."""

_WORD = 2**64 - 1


class SwitchError(RuntimeError):
    """A switch that is refused or failed. The message says why, and what is active now."""


@dataclass(eq=False)
class Ledger:
    """What is known of a weight. It holds no reference to the weight, so that this may be freed."""

    # The base's fingerprint, once it was read.
    base: int | None = None
    # The Switcher whose adapters are on it. A dead reference: they are still on it, and nobody can take them off.
    holder: weakref.ref[object] | None = None
    # The weight's version and address when a Switcher last wrote or verified it.
    version: int | None = None
    pointer: int | None = None


_ledgers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(eq=False)
class Weight:
    """A weight of the model as it was when it was found: where it is, its memory, its ledger."""

    slot: _model.Slot
    ledger: Ledger
    pointer: int
    device: torch.device
    dtype: torch.dtype
    # Inference tensors have no version: what others write to them only `Switcher.verify` finds.
    versioned: bool

    @classmethod
    def of(cls, slot: _model.Slot, switcher: object, verify: bool) -> Weight:
        """A weight of the model, free for this Switcher; reads it all for its fingerprint, unless that is known."""
        tensor = slot.weight
        found: Ledger | None = _ledgers.get(tensor)
        weight = cls(slot, found or Ledger(), tensor.data_ptr(), tensor.device, tensor.dtype, not tensor.is_inference())
        known = found is not None and found.pointer == weight.pointer and not weight.changed()
        if known:
            refuse_first([weight], lambda one: one.held(switcher))
        if not known or not weight.versioned:
            base = weight.fingerprint() if verify else None
            if found is None or found.holder is not None or base is None or base != found.base:
                # Another base than the one that was known. Whoever knew that one finds it gone: its ledger is old.
                weight.ledger = _ledgers[tensor] = Ledger(base)
            weight.note()
        return weight

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

    def place(self) -> str | None:
        """Why this is not the weight it was, or None."""
        weight = self.tensor
        if not self.slot.holds():
            return f"{self.name} is no longer the parameter it was when an adapter for it was added"
        if weight.device != self.device or weight.dtype != self.dtype or weight.data_ptr() != self.pointer:
            return (
                f"{self.name} was moved or cast (by .to(), say) since an adapter for it was added: it was "
                f"{dtype_name(self.dtype)} on {self.device}, it is {dtype_name(weight.dtype)} on {weight.device}, "
                f"{'in the same' if weight.data_ptr() == self.pointer else 'in other'} memory; move it before adapters "
                f"are added, and make a new Switcher"
            )
        if self.slot.attribute + VALUES_SUFFIX in self.slot.module._parameters:
            return f"{self.name} is being tuned by a SparseTuner; detach it first"
        return None

    def held(self, switcher: object) -> str | None:
        """Why this Switcher may not have adapters on the weight, or None."""
        holder = self.ledger.holder
        if holder is None or holder() is switcher:
            return None
        whose = "another Switcher: deactivate them there" if holder() else "a Switcher that no longer exists"
        return f"{self.name} has adapters of {whose}"


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
    for slot in _model.slots(model).values():
        found: Ledger | None = _ledgers.get(slot.weight)
        if found is None or found.holder is None or found.pointer != slot.weight.data_ptr():
            continue
        if slot.weight.is_inference() or found.version == slot.weight._version:
            whose = "a Switcher" if found.holder() else "a Switcher that no longer exists, so load the base again"
            raise RuntimeError(
                f"SparseTuner: {slot.name} has an active adapter of {whose}: what is trained on top of it would fit no "
                f"base; switcher.deactivate() first (SparseTuner.from_adapter goes on training an adapter)"
            )


class Watch:
    """Several weights, looked at together: tells in a fraction of a microsecond each that nothing happened to them."""

    def __init__(self, weights: Iterable[Weight]) -> None:
        self.weights = list(weights)
        self._pointers = [weight.pointer for weight in self.weights]
        self._places = [(weight.slot.module, weight.slot.attribute) for weight in self.weights]
        self._tuned = [weight.slot.attribute + VALUES_SUFFIX for weight in self.weights]
        self._tensors = [weight.tensor for weight in self.weights]
        self._ledgers = [weight.ledger for weight in self.weights]
        self._versioned = [(weight.tensor, weight.ledger) for weight in self.weights if weight.versioned]

    def undisturbed(self, switcher: weakref.ref[object]) -> bool:
        """Whether all weights are in place, not trained, not another Switcher's, and as they were last left."""
        homes = [module._parameters for module, _ in self._places]
        return (
            all(home.get(place[1]) is one for home, place, one in zip(homes, self._places, self._tensors, strict=True))
            and not any(tuned in home for home, tuned in zip(homes, self._tuned, strict=True))
            and [tensor.data_ptr() for tensor in self._tensors] == self._pointers
            and all(tensor._version == ledger.version for tensor, ledger in self._versioned)
            and all(ledger.holder is None or ledger.holder is switcher for ledger in self._ledgers)
        )

    def left(self, switcher: weakref.ref[object], on: Container[Weight]) -> None:
        """Note that we leave the weights as they are, with adapters on some of them."""
        for weight, ledger in zip(self.weights, self._ledgers, strict=True):
            ledger.holder = switcher if weight in on else None
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
