"""Shards: which entries of a weight a rank holds, and where an adapter's entries are among them.

A DTensor's local tensor is a box of the weight: of each dimension some runs of coordinates, mostly one (`Box`). An
adapter is global, and each rank takes the entries that are in its box (`Box.take`). Everything here is arithmetic on
shapes, in O(entries of the adapter) time and memory, except for `fingerprint`; nothing here communicates.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

import shira_ops
from shira._granules import WORD, index_dtype, refine

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Runs of coordinates of one dimension, ascending: (start, length) each.
Spans = tuple[tuple[int, int], ...]


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor; without importing torch.distributed, which whoever made one has done."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """A DTensor's local tensor, in the same memory and without gradients; any other tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        found = tensor.to_local()
    return found.wait() if hasattr(found, "wait") else found


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called for, whose weights FSDP2 gathers while they compute."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def fsdp_groups(module: Any) -> list[Any]:
    """FSDP's groups of parameters of such a module, each gathered at once."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return [state._fsdp_param_group] if groups is None else list(groups)


def reshard(modules: Iterable[Any]) -> None:
    """Have FSDP drop what it gathered, so that these modules (`fsdp_modules`) hold their shards."""
    for module in modules:
        for group in fsdp_groups(module):
            if group is not None and group._all_gather_result is not None:
                group.wait_for_unshard()  # one that was begun, by unshard(async_op=True), would bring the old entries
        module.reshard()
        for group in fsdp_groups(module):  # which after a forward that has failed does nothing
            if group is not None and group.is_unsharded:
                group._to_sharded()


def gathered(modules: Iterable[Any]) -> dict[int, Any]:
    """FSDP's own entry for each of its sharded parameters, by the parameter's id."""
    groups = [group for module in modules for group in fsdp_groups(module) if group is not None]
    return {id(found.sharded_param): found for group in groups for found in group.fsdp_params}


# By the codes and scales of quantized weights: the tensor that wraps them.
_around: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def wrapped(tensor: Tensor, around: Tensor) -> None:
    """From now on what is written to a tensor through the one around it moves its version, too."""
    if around is not tensor and not around.is_inference():
        _around[tensor] = weakref.ref(around)


def version(tensor: Tensor) -> int:
    """A number that moves when a tensor is written to: its version; of a DTensor, also that of the local tensor; of one
    that was `wrapped`, also that of the one around it.

    Operations of the outer tensor move the one, and of the inner tensor the other.
    """
    if is_dtensor(tensor):
        return tensor._version + tensor._local_tensor._version
    around = _around[tensor]() if len(_around) and tensor in _around else None
    return tensor._version + (0 if around is None else around._version)


class Part(NamedTuple):
    """An adapter's entries in one box.

    ``indices``: granules of the local tensor, strictly increasing. ``granule``: their size; it divides that of the
    adapter. ``positions``: int64, for each of them where it is in the adapter's values:
    ``values.view(-1, granule)[positions]`` are the local tensor's entries, in the order of ``indices``.
    """

    indices: Tensor
    granule: int
    positions: Tensor

    def of(self, values: Tensor) -> Tensor:
        """This part of the adapter's values."""
        return values.view(-1, self.granule)[self.positions].view(-1)

    def into(self, entries: Tensor, count: int) -> Tensor:
        """``count`` values of the adapter: this part's entries where they belong, and zeros."""
        values = entries.new_zeros(count)
        values.view(-1, self.granule)[self.positions] = entries.view(-1, self.granule)
        return values


@dataclass(frozen=True)
class Box:
    """The part of a weight of ``shape`` that a rank holds: of each dimension the coordinates in its ``spans``."""

    shape: tuple[int, ...]
    spans: tuple[Spans, ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> Box:
        return Box(tuple(shape), tuple(((0, size),) if size else () for size in shape))

    @staticmethod
    def of(weight: DTensor) -> Box:
        """The box of this rank.

        Raises:
            ValueError: this rank is not in the weight's mesh, or the weight is not divided in a way that a box can
                describe; the message is the rest of a sentence after the weight's name.
        """
        mesh = weight.device_mesh
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise ValueError("is sharded over a device mesh that this rank is not in")
        box = box_of(tuple(weight.shape), tuple(mesh.shape), coordinate, weight.placements)
        held = tuple(local(weight).shape)
        if held != box.local_shape and not (math.prod(held) == 0 == box.local_numel):
            raise ValueError(
                f"is a DTensor with placements {tuple(weight.placements)} on a mesh of {tuple(mesh.shape)}, of which "
                f"this rank should hold {list(box.local_shape)}, but holds {list(held)}"
            )
        return box

    @cached_property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(sum(length for _, length in spans) for spans in self.spans)

    @cached_property
    def numel(self) -> int:
        """The entries of the whole weight."""
        return math.prod(self.shape)

    @cached_property
    def local_numel(self) -> int:
        return math.prod(self.local_shape)

    @cached_property
    def _cut(self) -> tuple[int, ...]:
        """The dimensions that the box has only a part of."""
        return tuple(
            d for d, (spans, size) in enumerate(zip(self.spans, self.shape, strict=True)) if spans != ((0, size),)
        )

    @property
    def is_whole(self) -> bool:
        return not self._cut

    def granule(self, granule: int) -> int:
        """The size of the pieces, all equal, into which granules must be divided so that the box splits none."""
        if not self._cut or not self.local_numel:
            return granule
        last = self._cut[-1]
        inner = math.prod(self.shape[last + 1 :])
        edges = [self.shape[last], *(number for span in self.spans[last] for number in span)]
        return math.gcd(granule, *(edge * inner for edge in edges))

    def take(self, indices: Tensor, granule: int) -> Part:
        """The entries of an adapter that are in the box.

        Args:
            indices: granules of the whole weight, strictly increasing.
            granule: their size.
        """
        finer = self.granule(granule)
        dtype = index_dtype(max(1, self.local_numel // finer))
        if not self.local_numel:
            nothing = torch.empty(0, dtype=torch.int64, device=indices.device)
            return Part(nothing.to(dtype), granule, nothing)
        if self._cut in ((), (0,)) and finer == granule and all(len(spans) <= 1 for spans in self.spans[:1]):
            # Whole rows: one run of granules.
            start = self.spans[0][0][0] * (self.numel // self.shape[0]) // granule if self._cut else 0
            ends = torch.tensor([start, start + self.local_numel // granule], device=indices.device)
            begin, end = torch.searchsorted(indices, ends.to(indices.dtype)).tolist()
            positions = torch.arange(begin, end, device=indices.device)
            return Part((indices[begin:end].to(torch.int64) - start).to(dtype), granule, positions)
        fine = refine(indices, granule, finer, self.numel).to(torch.int64)
        rest, inside, flat, stride = fine * finer, None, torch.zeros_like(fine), 1
        for size, spans, held in zip(self.shape[::-1], self.spans[::-1], self.local_shape[::-1], strict=True):
            coordinate = rest % size
            rest = rest // size
            if spans != ((0, size),):
                coordinate, found = _moved(coordinate, spans, _packed(spans))
                inside = found if inside is None else inside & found
            flat += coordinate * stride
            stride *= held
        if inside is None:
            return Part((flat // finer).to(dtype), finer, torch.arange(fine.numel(), device=fine.device))
        return Part((flat[inside] // finer).to(dtype), finer, inside.nonzero().view(-1))

    def cut(self, held: Tensor, box: Box) -> Tensor:
        """This box of a tensor that holds a larger one, ``box``."""
        for dim, (ours, theirs) in enumerate(zip(self.spans, box.spans, strict=True)):
            if ours != theirs:
                coordinates = [torch.arange(begin, begin + length) for begin, length in ours]
                at = torch.cat([*coordinates, torch.empty(0, dtype=torch.int64)])
                held = held.index_select(dim, _moved(at, theirs, _packed(theirs))[0].to(held.device))
        return held

    def globally(self, indices: Tensor, granule: int) -> Tensor:
        """The numbers in the whole weight of granules of the local tensor: int64, in the same order.

        The granule must be one that the box does not split (``box.granule(granule) == granule``).
        """
        if not self.local_numel:
            return indices.to(torch.int64)
        rest, flat, stride = indices.to(torch.int64) * granule, torch.zeros_like(indices, dtype=torch.int64), 1
        for size, spans, held in zip(self.shape[::-1], self.spans[::-1], self.local_shape[::-1], strict=True):
            coordinate = rest % held
            rest = rest // held
            if spans != ((0, size),):
                coordinate, _ = _moved(coordinate, _packed(spans), spans)
            flat += coordinate * stride
            stride *= size
        return flat // granule


def box(weight: Tensor) -> Box | None:
    """The box of this rank; None for a tensor that is not sharded. Raises as `Box.of`."""
    return Box.of(weight) if is_dtensor(weight) else None


def box_of(shape: tuple[int, ...], mesh: tuple[int, ...], coordinate: Sequence[int], placements: Sequence[Any]) -> Box:
    """The box of the rank at a coordinate of the mesh, for a weight with these placements.

    Raises:
        ValueError: the placements are other than Replicate, Shard and _StridedShard, or the weight is divided so
            unevenly that torch's own functions disagree about who holds what.
    """
    cuts: dict[int, list[_Cut]] = {}
    for size, at, placement in zip(mesh, coordinate, placements, strict=True):
        if placement.is_replicate():
            continue
        if placement.is_partial() or not hasattr(placement, "dim"):
            raise ValueError(f"is a DTensor with the placement {placement}, which no single entry can be read from")
        cuts.setdefault(placement.dim % len(shape), []).append(
            _Cut(size, at, int(getattr(placement, "split_factor", 1)))
        )
    spans = list(Box.whole(shape).spans)
    for dim, several in cuts.items():
        _check_even(shape[dim], several, placements)
        spans[dim] = _inwards(spans[dim], several)
    return Box(shape, tuple(spans))


def aligned(grad_output: Any, input: Any, mesh: Any, placements: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """The parts of a linear layer's gradient and input that make the gradient of this rank's part of its weight, which
    is divided so while the layer computes; None if another rank has made the same."""
    from torch.distributed.tensor import Replicate, Shard

    rows, columns, mine = [], [], True
    last = grad_output.dim() - 1
    coordinate = mesh.get_coordinate() or ()
    for at, placement in enumerate(placements):
        ours, theirs = grad_output.placements[at], input.placements[at]
        if placement.is_shard():
            out = placement.dim == 0
            rows.append(Shard(last) if out else Replicate())
            columns.append(Replicate() if out else Shard(last))
        elif ours == theirs and ours.is_shard() and ours.dim < last:
            rows.append(ours)  # each rank has its own tokens
            columns.append(theirs)
        else:
            rows.append(Replicate())
            columns.append(Replicate())
            mine = mine and coordinate[at] == 0
    found = [local(one.redistribute(mesh, to)) for one, to in ((grad_output, rows), (input, columns))]
    return (found[0], found[1]) if mine else None


def is_first(weight: DTensor) -> bool:
    """Whether this rank is the first of those that hold the same box."""
    coordinate = weight.device_mesh.get_coordinate() or ()
    return not any(at for at, placement in zip(coordinate, weight.placements, strict=True) if placement.is_replicate())


def fingerprint(local: Tensor, box: Box) -> int | None:
    """What a box adds to the fingerprint of the weight: the boxes' numbers add up to it, modulo 2^64.

    None if this box splits a 64-bit word, whose parts cannot be added up. That may be so on one rank and not on
    another, so the ranks must tell each other.
    """
    local = local.detach()
    if box.is_whole:
        return int(shira_ops.fingerprint(local)) & WORD
    entries = 8 // local.element_size()  # of a word
    if box._cut == (0,) and len(box.spans[0]) == 1:
        # One run, which may end within the last word of the weight.
        first, count = (number * (box.numel // box.shape[0]) for number in box.spans[0][0])
        if first % entries == 0 and (count % entries == 0 or first + count == box.numel):
            run = -(-count // entries)
            return int(shira_ops.fingerprint_part(local, first // entries, run, run)) & WORD
    if box.granule(entries) != entries:
        return None
    if not box.local_numel:
        return 0
    # Runs of words that lie one after the other in the whole weight too; those that are equally far apart at once.
    run = box.granule(0) // entries
    words = local.reshape(-1, run * entries)
    starts = box.globally(torch.arange(words.shape[0]), run * entries) * run
    steps = starts.diff()
    ends = [*((steps[1:] != steps[:-1]).nonzero().view(-1) + 1).tolist(), steps.numel()]  # where steps change
    begin, total = 0, 0
    for end in ends:
        if end >= begin:
            stride = int(steps[begin]) if begin < steps.numel() else run
            first = int(starts[begin])
            total += int(shira_ops.fingerprint_part(words[begin : end + 1], first, run, stride))
            begin = end + 1
    return total & WORD


# ---- runs of coordinates -------------------------------------------------------------------------------------


class _Cut(NamedTuple):
    """One mesh dimension that divides a tensor dimension: into how many, which of them is ours, split factor."""

    parts: int
    which: int
    factor: int


def _inwards(spans: Spans, cuts: Sequence[_Cut]) -> Spans:
    """The runs that are left after all cuts.

    torch reads placements from left to right. Only FSDP cuts what tensor parallelism to its right has cut before, and
    marks that with a split factor: the number of pieces that it found.
    """
    if not cuts:
        return spans
    first, rest = cuts[0], cuts[1:]
    plain = all(cut.factor == 1 for cut in rest)
    if plain and first.factor > 1 and first.factor == math.prod(cut.parts for cut in rest):
        return _chunk(_inwards(spans, rest), first.parts, first.which)
    return _inwards(_strided(spans, first), rest)


def _leftwards(spans: Spans, cuts: Sequence[_Cut]) -> Spans:
    """The same as torch's own functions compute it, which is another result where a dimension is divided unevenly."""
    for cut in cuts:
        spans = _strided(spans, cut)
    return spans


def _check_even(size: int, cuts: Sequence[_Cut], placements: Sequence[Any]) -> None:
    parts = math.prod(cut.parts for cut in cuts)
    if len(cuts) < 2 or size % parts == 0 or all(cut.factor == 1 for cut in cuts):
        return
    whole: Spans = ((0, size),) if size else ()
    for number in range(parts):
        at = []
        for cut in cuts:
            number, which = divmod(number, cut.parts)
            at.append(cut._replace(which=which))
        if _inwards(whole, at) != _leftwards(whole, at):
            raise ValueError(
                f"is a DTensor with placements {tuple(placements)} that divide {size} into {parts} uneven parts, on "
                f"which FSDP and DTensor do not agree; make that dimension a multiple of {parts}"
            )


def _strided(spans: Spans, cut: _Cut) -> Spans:
    """Of each of ``factor`` pieces the part that is ours, one after the other."""
    if cut.factor == 1:
        return _chunk(spans, cut.parts, cut.which)
    pieces = (_chunk(spans, cut.factor, piece) for piece in range(cut.factor))
    return _joined([span for piece in pieces for span in _chunk(piece, cut.parts, cut.which)])


def _chunk(spans: Spans, parts: int, which: int) -> Spans:
    """One of the parts as ``torch.chunk`` makes them: equal ones, then a smaller one, then empty ones."""
    size = sum(length for _, length in spans)
    most = -(-size // parts)
    begin, end = which * most, min((which + 1) * most, size)
    found, at = [], 0
    for start, length in spans:
        low, high = max(begin, at), min(end, at + length)
        if low < high:
            found.append((start + low - at, high - low))
        at += length
    return _joined(found)


def _joined(spans: Sequence[tuple[int, int]]) -> Spans:
    joined: list[tuple[int, int]] = []
    for start, length in spans:
        if joined and sum(joined[-1]) == start:
            joined[-1] = joined[-1][0], joined[-1][1] + length
        else:
            joined.append((start, length))
    return tuple(joined)


def _packed(spans: Spans) -> Spans:
    """The same runs one after the other, as in the local tensor."""
    packed, at = [], 0
    for _, length in spans:
        packed.append((at, length))
        at += length
    return tuple(packed)


def _moved(coordinate: Tensor, source: Spans, target: Spans) -> tuple[Tensor, Tensor]:
    """Coordinates in ``source`` moved to the same place of ``target``, and which of them are in ``source``."""
    if len(source) == 1:
        (start, length), (to, _) = source[0], target[0]
        return coordinate - (start - to), (coordinate >= start) & (coordinate < start + length)
    device = coordinate.device
    starts = torch.tensor([start for start, _ in source], device=device)
    ends = torch.tensor([start + length for start, length in source], device=device)
    moves = torch.tensor([to - start for (start, _), (to, _) in zip(source, target, strict=True)], device=device)
    span = (torch.searchsorted(starts, coordinate, right=True) - 1).clamp(min=0)
    return coordinate + moves[span], (coordinate >= starts[span]) & (coordinate < ends[span])
