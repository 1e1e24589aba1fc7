"""The weights and biases that an `Overlay` lays adapters over: where they are, their base, what is added to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from shira import _granules, _linears, _live, _model, _places
from shira._granules import dtype_name
from shira._live import SwitchError
from shira._text import AdapterError
from shira.adapter._entry import Entry
from shira.adapter.adapter import Adapter
from shira.serve._laying import Delta, RowDelta
from shira.serve._streams import send

Place = tuple[nn.Module, bool]
"""A layer's module, and whether it is about its bias."""


class Spot:
    """A weight or bias of a layer in the model, as the rules of `_fit` see it (`_fit.Found`).

    Its content is the base's, also where a `Switcher` has adapters on it.
    """

    def __init__(self, name: str, layer: _linears.Layer | None, slot: _model.Slot | None, obstacle: str | None) -> None:
        self.name, self._layer, self._slot, self._obstacle = name, layer, slot, obstacle
        # The base's fingerprint, where it is known.
        self.known: int | None = None
        # Whether it is an ordinary parameter, which a Switcher may know.
        self.plain = layer is None or slot is not None or not layer.quantized

    @property
    def layer(self) -> _linears.Layer:
        assert self._layer is not None
        return self._layer

    @property
    def is_bias(self) -> bool:
        return self._slot is not None

    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that hold it; none where the module has lost it."""
        if not self.plain:
            return self.layer.stored()
        now = self.parameter()
        return () if now is None else (now.detach(),)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layer.shape if self._slot is None else tuple(self._slot.weight.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype if self._slot is None else self.stored()[0].dtype

    @property
    def device(self) -> torch.device:
        return self.stored()[0].device

    @property
    def one(self) -> object:
        return self.layer.one if self._slot is None else _model.memory(self._slot.weight)

    @property
    def foreign(self) -> str | None:
        return None

    @property
    def obstacle(self) -> str | None:
        if self._obstacle is None and self.device.type == "meta":
            return "is on the meta device"
        return self._obstacle

    @cached_property
    def place(self) -> Place:
        return self.layer.module, self.is_bias

    @property
    def attribute(self) -> str:
        return self.layer.attribute if self._slot is None else self._slot.attribute

    def signature(self) -> tuple[object, ...]:
        """Changes when someone writes to it in a way that moves a version counter, or puts it elsewhere."""
        return tuple((t.data_ptr(), None if t.is_inference() else t._version) for t in self.stored())

    def parameter(self) -> Tensor | None:
        """The parameter that a Switcher may know."""
        if not self.plain:
            return None
        return self._slot.now() if self._slot is not None else _model.held(self.layer.module, self.layer.attribute)

    def fingerprint(self) -> int:
        """The base's fingerprint, read once."""
        if self.known is None:
            self.known = self.base()
        return self.known

    def base(self) -> int:
        """The base's fingerprint, read if no Switcher knows it."""
        tensor = self.parameter()
        if tensor is None or not tensor.is_contiguous():
            return (
                self.layer.fingerprint() if self._slot is None else _granules.fingerprint(self.stored()[0].contiguous())
            )
        holder = self._holder(tensor)
        if holder is not None:
            found: int = holder.base_fingerprint(tensor)
            return found
        known = _live.base_of(tensor)
        return _granules.fingerprint(tensor) if known is None else known

    def entries(self, indices: Tensor, granule: int) -> Tensor:
        """The base's entries, in the dtype that deltas are computed in."""
        tensor = self.parameter()
        holder = None if tensor is None or not tensor.is_contiguous() else self._holder(tensor)
        if holder is not None:
            found: Tensor = holder.base_entries(tensor, indices, granule)
        elif self._slot is None:
            found = self.layer.entries(indices, granule)
        else:
            found = self.stored()[0].contiguous().view(-1, granule)[indices.to(torch.int64)].view(-1)
        return found.to(compute_dtype(self.dtype))

    def read(self) -> int:
        """The base's fingerprint, from the content alone; raises `SwitchError` if a Switcher finds its weight wrong."""
        tensor = self.parameter()
        holder = None if tensor is None else self._holder(tensor)
        if holder is not None:
            holder.verify(full=True)
        elif tensor is not None:
            return _granules.fingerprint(tensor.detach().contiguous())
        return self.base()

    def _holder(self, tensor: Tensor) -> Any | None:
        try:
            return _live.holder(tensor)
        except SwitchError as error:
            raise SwitchError(f"Overlay: {self.name}: {error}") from error

    def equal(self, other: Spot) -> bool:
        return self.fingerprint() == other.fingerprint()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of deltas and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Spots:
    """A model as the rules of `_fit` see it: every weight, with what stands against laying something over it."""

    def __init__(self, model: nn.Module, watched: Mapping[Place, Watched]) -> None:
        self._watched = watched
        self.slots = _model.slots(model, buffers=True)
        self.layers = _linears.find(model)
        self._of_module = {layer.module: layer for layer in reversed(self.layers.values())}

    def get(self, name: str) -> Spot | None:
        layer, slot = self.layers.get(name), self.slots.get(name)
        if layer is not None:
            return self._known(Spot(name, layer, None, None if slot is None else _places.restless(slot)))
        if slot is None:
            return None
        owner = self._of_module.get(slot.module)
        if owner is not None and slot.attribute == "bias" and owner.kind != _linears.EMBEDDING:
            return self._known(Spot(name, owner, slot, None))
        return Spot(name, None, slot, _linears.unknown(name, slot.module).removeprefix(f"{name} "))

    def _known(self, spot: Spot) -> Spot:
        watched = self._watched.get(spot.place)
        if watched is not None and not watched.changed():
            spot.known = watched.fingerprint
        return spot

    def names(self) -> Iterable[str]:
        return dict.fromkeys((*self.layers, *self.slots))

    @cached_property
    def _tied(self) -> dict[object, list[str]]:
        """The names of every parameter and buffer, by its memory."""
        found: dict[object, list[str]] = {}
        for name, slot in self.slots.items():
            found.setdefault(_model.memory(slot.weight), []).append(name)
        return found

    def sharing(self, spot: Spot) -> list[Spot]:
        """Every spot that holds the same (tied) weight; its own comes first."""
        found = {spot.place: spot}
        for name in self._tied.get(spot.one, ()) if spot.plain else ():
            other = self.get(name)
            assert other is not None
            if other.obstacle is not None:
                raise AdapterError(f"Overlay: {spot.name} is the same (tied) weight as {name}, which {other.obstacle}")
            found.setdefault(other.place, other)
        return list(found.values())


class Watched:
    """A weight or bias as it was when adapters for it were added.

    Args:
        fingerprint: the base's, or None where it was not asked for (`Overlay.add(verify=False)`).
    """

    def __init__(self, spot: Spot, fingerprint: int | None) -> None:
        self.spot, self.fingerprint = spot, fingerprint
        self.dtype = spot.dtype
        self.note()

    def note(self) -> None:
        """Remember its memory and version: it holds what we believe it to hold."""
        self._trusted = True
        self._tensor = self.spot.parameter()
        self._signature = self._now()

    def distrust(self) -> None:
        """From now on trust it only once its content has been compared."""
        self._trusted = False

    def _now(self) -> object:
        tensor = self._tensor
        if tensor is None:
            return self.spot.signature()
        # A quick look at an ordinary parameter: every selection takes one at each.
        return tensor.data_ptr(), tensor._version if not tensor.is_inference() else None

    def changed(self) -> bool:
        """Whether anything has happened to it since `note`, as far as its version tells."""
        return not self._trusted or self.spot.parameter() is not self._tensor or self._now() != self._signature

    def refuse_changed(self) -> bool:
        """Where something has happened, compare the content, and refuse another base than it was.

        Returns whether anything had happened.
        """
        if not self.changed():
            return False
        spot = self.spot
        if not spot.stored() or spot.dtype != self.dtype:
            raise SwitchError(
                f"Overlay: {spot.name} was {dtype_name(self.dtype)} when adapters for it were added, and was cast or "
                f"removed since; cast it back, or add adapters of the new dtype to a new Overlay"
            )
        tensor = spot.parameter()
        record = None if tensor is None else _live.left(tensor)
        if record is not None and (None in (record.base, self.fingerprint) or record.base == self.fingerprint):
            pass  # a Switcher has written to it, and this is the base under its adapters
        elif self.fingerprint is None and not self._trusted:
            pass  # a copy, of which nothing is known
        elif self.fingerprint is None or spot.base() != self.fingerprint:
            raise SwitchError(
                f"Overlay: {spot.name} was changed by someone else since adapters for it were added, and differences "
                f"from the old base do not fit it; load the base again, or remove the adapters and add those of the "
                f"new base"
            )
        self.note()
        return True

    def holds(self) -> bool:
        """Read all of it: whether it is the base still, under what a Switcher may have put on it."""
        spot = self.spot
        if self.fingerprint is None and not self.changed():
            self.fingerprint = spot.base()
        if not spot.stored() or spot.read() != self.fingerprint:
            return False
        self.note()
        return True


# ---- differences ---------------------------------------------------------------------------------------------------


def estimate(adapter: Adapter) -> int:
    """The bytes that an adapter needs on the devices, about."""
    return sum(e.indices.nbytes + e.nnz * compute_dtype(e.dtype).itemsize for e in adapter.weights.values())


def deltas_of(adapter: Adapter, spots: Mapping[str, list[Spot]]) -> dict[nn.Module, dict[bool, Delta]]:
    """What an adapter adds to the weights, on their devices. Reads the base's entries where it replaces them."""
    found: dict[nn.Module, dict[bool, Delta]] = {}
    for name, places in spots.items():
        made: dict[tuple[torch.device, bool], Delta] = {}
        for spot in places:
            rows = not spot.is_bias and spot.layer.kind == _linears.EMBEDDING
            where = spot.device, rows
            if where not in made:
                delta = made.get((spot.device, not rows)) or _delta(adapter.weights[name], adapter.delta, spot)
                made[where] = RowDelta.of(delta, *spot.shape) if rows else delta
            found.setdefault(spot.layer.module, {})[spot.is_bias] = made[where]
    return found


def _delta(entry: Entry, is_delta: bool, spot: Spot) -> Delta:
    compute = compute_dtype(spot.dtype)
    indices, granule = send(entry.indices, spot.device), entry.granule
    values = send(entry.values.detach(), spot.device).to(compute)
    if not is_delta:
        values = values - spot.entries(indices, granule)
    if spot.is_bias:
        dense = torch.zeros(entry.numel, dtype=compute, device=spot.device)
        dense.view(-1, granule)[indices.to(torch.int64)] = values.view(-1, granule)
        return Delta(indices[:0], dense, 0)
    columns = spot.shape[1]
    if columns % granule:
        # A granule over several rows, such as a weight that is replaced as a whole.
        finer = math.gcd(granule, columns)
        indices, granule = _granules.refine(indices, granule, finer, entry.numel), finer
    return Delta(indices, values, granule)
