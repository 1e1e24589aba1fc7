"""A quick look at many weights at once: has anything happened to them?"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable
from typing import Any

from torch import nn

from shira import _shards
from shira._live import Record, Weight
from shira._model import Slot


class Watch:
    """Several weights, looked at together, which takes a fraction of a microsecond for each.

    The lists are what the look compares; they are made once, so that a look only walks through them.
    """

    def __init__(self, weights: Iterable[Weight]) -> None:
        self.weights = list(weights)
        places = [place for weight in self.weights for place in weight.places]
        self._parameters = [place for place in places if _is_plain(place)]
        self._others = [place for place in places if not _is_plain(place)]
        self._tuned = [place.values_names[0] for place in self._parameters]
        whole = [weight for weight in self.weights if weight.box is None]
        self._pointers = [weight.pointer for weight in whole]
        self._tensors = [weight.tensor for weight in whole]
        self._numels = [weight.shape.numel() for weight in whole]
        self._records = [weight.record for weight in self.weights]
        self._holds = [weight.hold for weight in self.weights]
        versioned = [weight for weight in whole if weight.versioned]
        self._versioned = [(one.tensor, one.record) for one in versioned if type(one.slot) is Slot]
        # Parts of quantized weights, which may be written to through the tensor around them.
        self._versioned_codes = [(one.tensor, one.record) for one in versioned if type(one.slot) is not Slot]
        sharded = [weight for weight in self.weights if weight.box is not None]
        # For weights that ranks hold together: the parameter, where this rank's part was, and what is known about it.
        self._parts: list[tuple[Any, int, Record]] = [(one.slot.weight, one.pointer, one.record) for one in sharded]
        self._versioned_parts = [
            (part, record) for weight, (part, _, record) in zip(sharded, self._parts, strict=True) if weight.versioned
        ]

    def undisturbed(self, me: weakref.ref[object]) -> bool:
        """Whether every weight is in its place and memory, is not trained, has no adapters of another Switcher than
        ``me``, and has the version that was last noted."""
        homes = [place.module._parameters for place in self._parameters]
        return (
            all(home.get(place.attribute) is place.weight for home, place in zip(homes, self._parameters, strict=True))
            and not any(tuned in home for home, tuned in zip(homes, self._tuned, strict=True))
            and all(place.holds() for place in self._others)
            and not any(place.tuned for place in self._others)
            and [tensor.data_ptr() for tensor in self._tensors] == self._pointers
            and not any(hold.storage.expired() for hold in self._holds)
            and [tensor.numel() for tensor in self._tensors] == self._numels
            and all(tensor._version == record.version for tensor, record in self._versioned)
            and all(_shards.version(tensor) == record.version for tensor, record in self._versioned_codes)
            and all(hold.holder is None or hold.holder is me for hold in self._holds)
            and all(part._local_tensor.data_ptr() == pointer for part, pointer, _ in self._parts)
            and all(
                part._version + part._local_tensor._version == record.version for part, record in self._versioned_parts
            )
        )

    def left(self, me: weakref.ref[object], on: Container[Weight]) -> None:
        """Note how ``me`` leaves the weights: their versions, and which of them have its adapters on them."""
        for weight, record, hold in zip(self.weights, self._records, self._holds, strict=True):
            hold.holder = me if weight in on else None
            record.pointer = weight.pointer
        for tensor, record in self._versioned:
            record.version = tensor._version
        for tensor, record in self._versioned_codes:
            record.version = _shards.version(tensor)
        for part, record in self._versioned_parts:
            record.version = part._version + part._local_tensor._version


def _is_plain(place: Slot) -> bool:
    """Whether it is a parameter in a dictionary, as almost all are: not a buffer, of a quantized layer, nor of a
    TorchScript module."""
    return type(place) is Slot and isinstance(place.weight, nn.Parameter) and isinstance(place.module._parameters, dict)
