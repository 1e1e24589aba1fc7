"""The weights and biases that an `Overlay` lays adapters over: where they are, their base, what is added to them.

Of a sharded model: a layer of FSDP2 computes with whole weights, which FSDP gathers, so there each rank has the whole
adapter. A layer of tensor parallelism computes with this rank's part of its weight, and each rank has the adapter's
entries in that part. The base's entries that an adapter replaces are put together from all ranks once, when it is added
(`know`, `base_entries`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shira import _granules, _linears, _live, _model, _places, _shards
from shira._granules import dtype_name
from shira._live import SwitchError
from shira._text import AdapterError
from shira.adapter._entry import Entry
from shira.adapter.adapter import Adapter
from shira.serve._laying import Delta, Division, RowDelta
from shira.serve._streams import send

if TYPE_CHECKING:
    from shira.serve._agreement import Step

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
        away = self._away()
        return self.stored()[0].device if away is None else away[1]

    @property
    def one(self) -> object:
        held = self.parameter()
        return self.layer.one if held is None else _model.memory(held)

    @property
    def foreign(self) -> str | None:
        return None

    @property
    def obstacle(self) -> str | None:
        if self._obstacle is not None:
            return self._obstacle
        away = self._away()
        if away is not None and away[0] is not self.parameter():
            return (
                "is offloaded to disk, where it is not known which weights are one (tied): add adapters before the "
                "model is offloaded, or keep this weight in memory"
            )
        return "is on the meta device: load the model first" if self.device.type == "meta" else None

    def _away(self) -> tuple[Tensor, torch.device] | None:
        """Its content and its layer's device, where it is offloaded."""
        held = self._held() if self.plain else None
        return _model.offloaded(*self._home) if held is not None and held.is_meta else None

    @cached_property
    def place(self) -> Place:
        return self.layer.module, self.is_bias

    @property
    def attribute(self) -> str:
        return self.layer.attribute if self._slot is None else self._slot.attribute

    @property
    def division(self) -> Division | None:
        """How it is divided between ranks while its layer computes; None: not at all."""
        return None

    def signature(self) -> tuple[object, ...]:
        """Changes when someone writes to it in a way that moves a version counter, or puts it elsewhere."""
        stored = self.stored()
        # A tensor that wraps others is written to through itself: theirs stay at the version they have.
        around = self.layer.weight if stored and not self.plain else None
        versioned = stored if around is None else (*stored, around)
        return (
            *(tensor.data_ptr() for tensor in stored),
            *(None if tensor.is_inference() else tensor._version for tensor in versioned),
        )

    def parameter(self) -> Tensor | None:
        """The parameter that a Switcher may know, or the tensor that has its content while it is offloaded."""
        if not self.plain:
            return None
        held = self._held()
        if held is None or not held.is_meta:
            return held
        away = self._away()
        return held if away is None else away[0]

    def _held(self) -> Tensor | None:
        return self._slot.now() if self._slot is not None else _model.held(self.layer.module, self.layer.attribute)

    @property
    def _home(self) -> tuple[nn.Module, str]:
        return self.layer.module if self._slot is None else self._slot.module, self.attribute

    def fingerprint(self) -> int:
        """The base's fingerprint, read once."""
        if self.known is None:
            self.known = self.base()
        return self.known

    def own(self) -> int:
        """The fingerprint by which a change is found: the base's, or that of this rank's part of it."""
        return self.fingerprint()

    def base(self) -> int:
        """What `own` would be now, read if no Switcher knows it."""
        tensor = self.parameter()
        if tensor is None:
            return self.layer.fingerprint()
        if not tensor.is_contiguous():
            return _granules.fingerprint(self.stored()[0].contiguous())
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
        elif tensor is None:
            found = self.layer.entries(indices, granule)
        else:
            there = self.stored()[0].contiguous().view(-1, granule)
            found = there[indices.to(there.device, torch.int64)].view(-1).to(indices.device)
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


class SharedSpot(Spot):
    """A weight or bias of a layer that is a DTensor, also while FSDP has it gathered.

    Its fingerprint is that of the whole base, which the ranks must have added up (`know`); `base` and `read` tell this
    rank's part, by which a change is found.

    Args:
        entry: FSDP's own entry for it, if it has one.
    """

    def __init__(
        self, name: str, layer: _linears.Layer, slot: _model.Slot | None, obstacle: str | None, entry: Any
    ) -> None:
        super().__init__(name, layer, slot, obstacle)
        self.entry = entry
        self.whole: int | None = None

    def parameter(self) -> Tensor | None:
        held, entry = super().parameter(), self.entry
        if entry is not None and held is not None:
            names = ("_unsharded_param", "_sharded_post_forward_param")
            if any(held is getattr(entry, name, None) for name in names):
                found: Tensor = entry.sharded_param
                return found
        return held

    def _stored(self) -> Any:
        found = self.parameter()
        assert found is not None
        return found

    def stored(self) -> tuple[Tensor, ...]:
        now = self.parameter()
        return () if now is None else (now.detach(),)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._stored().shape)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self._stored().dtype
        return found

    @property
    def one(self) -> object:
        return _model.memory(self._stored())

    @property
    def foreign(self) -> str | None:
        if not _shards.is_dtensor(self.parameter()):
            return None  # it was replaced since; the content decides
        try:
            _shards.Box.of(self._stored())
        except ValueError as error:
            return str(error)
        return None

    @property
    def obstacle(self) -> str | None:
        if self._obstacle is None and self.division is not None and self.layer.kind == _linears.EMBEDDING:
            return (
                "is divided by tensor parallelism in an embedding, which nothing can be laid over; leave it out of the "
                "adapter, or use a Switcher"
            )
        return super().obstacle

    def signature(self) -> tuple[object, ...]:
        now = self.parameter()
        return () if now is None else (_shards.local(now).data_ptr(), _shards.version(now))

    @property
    def division(self) -> Division | None:
        if self.entry is None:
            weight = self._stored()
            return weight.device_mesh, tuple(weight.placements)
        spec = getattr(self.entry, "_unsharded_dtensor_spec", None) or getattr(self.entry, "_tp_spec", None)
        return None if spec is None else (spec.mesh, tuple(spec.placements))

    def content(self) -> Tensor:
        """The base's entries in this rank's part, under what a Switcher may have put there."""
        here = _shards.local(self._stored())
        holder = self._holder(self._stored())
        if holder is None:
            return here
        everything = torch.arange(here.numel(), device=here.device)
        found: Tensor = holder.base_entries(self._stored(), everything, 1)
        return found.view(here.shape)

    def fingerprint(self) -> int:
        assert self.whole is not None
        return self.whole

    def own(self) -> int:
        return self.base()

    def base(self) -> int:
        return _granules.fingerprint(self.content())

    def read(self) -> int:
        return self.base()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of deltas and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Spots:
    """A model as the rules of `_fit` see it: every weight, with what stands against laying something over it."""

    def __init__(self, model: nn.Module, watched: Mapping[Place, Watched]) -> None:
        self._watched = watched
        fsdp = _shards.fsdp_modules(model)
        _shards.reshard(fsdp)
        self._gathered = _shards.gathered(fsdp)
        self.slots = _model.slots(model, buffers=True)
        self.layers = _linears.find(model, sharded=True)
        self._of_module = {layer.module: layer for layer in reversed(self.layers.values())}

    def get(self, name: str) -> Spot | None:
        layer, slot = self.layers.get(name), self.slots.get(name)
        if layer is not None:
            return self._known(self._spot(name, layer, None, None if slot is None else _places.restless(slot)))
        if slot is None:
            return None
        owner = self._of_module.get(slot.module)
        if owner is not None and slot.attribute == "bias" and owner.kind != _linears.EMBEDDING:
            return self._known(self._spot(name, owner, slot, None))
        return Spot(name, None, slot, _linears.unknown(name, slot.module).removeprefix(f"{name} "))

    def _spot(self, name: str, layer: _linears.Layer, slot: _model.Slot | None, obstacle: str | None) -> Spot:
        held = layer.weight if slot is None else slot.weight
        if not _shards.is_dtensor(held):
            return Spot(name, layer, slot, obstacle)
        return SharedSpot(name, layer, slot, obstacle, self._gathered.get(id(held)))

    def _known(self, spot: Spot) -> Spot:
        watched = self._watched.get(spot.place)
        if watched is not None and not watched.changed():
            spot.known = watched.fingerprint
            if isinstance(spot, SharedSpot):
                spot.whole = watched.whole
        return spot

    def names(self) -> Iterable[str]:
        return dict.fromkeys((*self.layers, *self.slots))

    @cached_property
    def _tied(self) -> dict[object, list[str]]:
        """The names of every parameter and buffer, by its memory."""
        found: dict[object, list[str]] = {}
        for name, slot in self.slots.items():
            away = _model.offloaded(slot.module, slot.attribute) if slot.weight.is_meta else None
            found.setdefault(_model.memory(slot.weight if away is None else away[0]), []).append(name)
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
        # Of a weight that ranks hold together, that of the whole.
        self.whole = spot.whole if isinstance(spot, SharedSpot) else None
        self.dtype = spot.dtype
        self.note()

    def note(self) -> None:
        """Remember its memory and version: it holds what we believe it to hold."""
        self._trusted = True
        self._tensor = self.spot.parameter()
        self._shared = _shards.is_dtensor(self._tensor)
        self._signature = self._now()

    def distrust(self) -> None:
        """From now on trust it only once its content has been compared."""
        self._trusted = False

    def _now(self) -> object:
        tensor = self._tensor
        if tensor is None or self._shared:
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
        if spot.stored() and spot.device.type == "meta":
            raise SwitchError(
                f"Overlay: {spot.name} is on the meta device now, so that it is not known whether it is still the base "
                f"that adapters were added for; bring it back"
            )
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


def deltas_of(
    adapter: Adapter, spots: Mapping[str, list[Spot]], bases: Mapping[Spot, Tensor]
) -> dict[nn.Module, dict[bool, Delta]]:
    """What an adapter adds to the weights, on their devices, or to this rank's parts of them.

    Reads the base's entries where it replaces them; ``bases`` has those of weights that ranks hold together.
    """
    found: dict[nn.Module, dict[bool, Delta]] = {}
    for name, places in spots.items():
        made: dict[tuple[torch.device, Division | None, bool], Delta] = {}
        for spot in places:
            rows = not spot.is_bias and spot.layer.kind == _linears.EMBEDDING
            where = spot.device, spot.division, rows
            if where not in made:
                delta = made.get((spot.device, spot.division, not rows))
                if delta is None:
                    delta = part_of(_delta(adapter.weights[name], adapter.delta, spot, bases.get(spot)), spot)
                made[where] = RowDelta.of(delta, *spot.shape) if rows else delta
            found.setdefault(spot.layer.module, {})[spot.is_bias] = made[where]
    return found


def _delta(entry: Entry, is_delta: bool, spot: Spot, base: Tensor | None) -> Delta:
    compute = compute_dtype(spot.dtype)
    indices, granule = send(entry.indices, spot.device), entry.granule
    values = send(entry.values.detach(), spot.device).to(compute)
    if not is_delta:
        values = values - (spot.entries(indices, granule) if base is None else base)
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


def part_of(delta: Delta, spot: Spot) -> Delta:
    """What this rank's part of a layer adds, of what the whole layer would add."""
    division = spot.division
    if division is None:
        return delta
    mesh, placements = division
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise SwitchError(f"Overlay: {spot.name} is divided over a device mesh that this rank is not in")
    box = _shards.box_of(tuple(spot.shape), tuple(mesh.shape), coordinate, placements)
    if spot.is_bias:
        at = box.globally(torch.arange(box.local_numel, device=delta.values.device), 1)
        return Delta(delta.indices, delta.values[at], 0)
    part = box.take(delta.indices, delta.granule)
    granule = math.gcd(part.granule, box.local_shape[-1]) if box.local_numel else part.granule
    indices = _granules.refine(part.indices, part.granule, granule, max(1, box.local_numel))
    return Delta(indices, part.of(delta.values), granule)


# ---- what ranks put together --------------------------------------------------------------------------------------


def know(spots: Sequence[Spot], about: str, step: Step) -> None:
    """Add up the fingerprints of the whole bases, where they are not known, once the ranks agree on what they add an
    adapter for (``about``). All ranks call together."""
    step.agree(about)
    shared = [spot for spot in spots if isinstance(spot, SharedSpot)]
    found = step.ranks.known_fingerprints(
        [spot.stored()[0] for spot in shared],
        [spot.whole for spot in shared],
        lambda: [spot.content() for spot in shared],
        step,
    )
    for spot, whole in zip(shared, found, strict=True):
        spot.whole = whole


def base_entries(adapter: Adapter, spots: Mapping[str, list[Spot]], step: Step) -> dict[Spot, Tensor]:
    """The base's entries that an adapter replaces in weights that ranks hold together, in the dtype of deltas.

    All ranks call together.
    """
    summands: dict[SharedSpot, Tensor] = {}
    replaced = ((spot, adapter.weights[name]) for name, places in spots.items() for spot in places)
    for spot, entry in replaced:
        if adapter.delta or not isinstance(spot, SharedSpot):
            continue
        weight, content = spot._stored(), spot.content()
        part = _shards.Box.of(weight).take(entry.indices.to(content.device), entry.granule)
        own = content.view(-1, part.granule)[part.indices.to(torch.int64)].to(compute_dtype(spot.dtype))
        whole = part.into(own if _shards.is_first(weight) else torch.zeros_like(own), entry.nnz)
        summands[spot] = whole.view(torch.int64 if whole.dtype == torch.float64 else torch.int32)
    step.agree(step.about)  # every rank has read its part
    for spot, words in summands.items():
        step.add(words, spot._stored().device_mesh)
    return {spot: words.view(compute_dtype(spot.dtype)) for spot, words in summands.items()}
