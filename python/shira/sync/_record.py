"""How a `Plan` is recorded: a loader is run on weights whose entries say where they come from.

An entry's place in the checkpoint is written in digits that every dtype holds exactly, however few bits it has: one run
of the loader for each digit. One more run has the first digit's complement, which a constant that the loader writes
(padding) cannot have, and the last one has random values. What the loader writes to is seen below autograd, where every
op says which tensors it writes to (`TorchDispatchMode`): the part is kept, and marked, before the first write.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shira import _granules, _live, _model
from shira._granules import dtype_name, fnv1a64
from shira.sync._boxes import Box, Layout, layout_of
from shira.sync._weights import Weight, weights_of
from shira.sync.update import SyncError, bits

_Load = Callable[[Iterable[tuple[str, Tensor]]], object]
_Integers = NDArray[np.int64]

# Entries that are decoded at once.
_CHUNK = 2**22
_ROWS = 2**20
# Boxes of one weight. A real layout has a few; shuffled rows would have one each, which no longer is O(entries).
_BOXES = 1024

# Whole numbers from 1 that a dtype holds exactly, an even number of them: with an odd one, a digit could be its own
# complement.
_DIGITS = {torch.float8_e4m3fn: 16, torch.float8_e5m2: 8, torch.int8: 126}
_MOST = 128

# What is known of an entry of the model, where it is not the number of an entry of the checkpoint: nobody wrote to it;
# something else was written; it is told of in another part.
_UNTOUCHED, _OTHER, _ELSEWHERE = -1, -2, -3


class Recorded(NamedTuple):
    """What `Plan` holds, by the same names."""

    boxes: dict[str, tuple[Box, ...]]
    nowhere: tuple[str, ...]
    problems: dict[str, str]
    weights: dict[str, Layout]
    layout: dict[str, Layout]
    whole: frozenset[str]
    shared: dict[str, frozenset[str]]


def recorded(
    model: nn.Module,
    load_weights: _Load,
    shapes: Mapping[str, Tensor | Sequence[int]],
    dtype: torch.dtype | None,
    exclude: str | None,
    device: torch.device,
) -> Recorded:
    """`Plan.record`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"Plan.record: model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(load_weights):
        raise TypeError(f"Plan.record: load_weights must be a function, got {type(load_weights).__name__}")
    model = _model.unwrap(model)
    with _live.LOCK, torch.no_grad():
        weights = weights_of("Plan.record", model, exclude)
        wanted = _wanted(shapes, dtype, weights)
        recording = _Recording(weights, load_weights, wanted, device)
        try:
            recording.run()
        finally:
            lost = recording.lost()
        if lost:
            raise SyncError(
                f"Plan.record: the loader wrote to {_model.some(lost)} in a way that torch does not show (a kernel of "
                f"its own, NumPy, or a thread that was there before), so what was there is lost; load the model's "
                f"weights again, and record with a loader that writes through torch"
            )
        if not recording.found and recording.problems:
            name, problem = next(iter(recording.problems.items()))
            raise SyncError(f"Plan.record: not one weight can be followed. {name} {problem}")
        return recording.result()


def _wanted(
    shapes: Mapping[str, Tensor | Sequence[int]], dtype: torch.dtype | None, weights: Mapping[str, Weight]
) -> dict[str, Layout]:
    if not isinstance(shapes, Mapping):
        raise TypeError(f"Plan.record: shapes must map names to tensors or shapes, got {type(shapes).__name__}")
    floats = (weight.tensor.dtype for weight in weights.values() if weight.tensor.is_floating_point())
    usual = next(floats, torch.float32) if dtype is None else dtype
    wanted: dict[str, Layout] = {}
    for name, given in shapes.items():
        shape = given.shape if isinstance(given, Tensor) else given
        if not isinstance(name, str) or not all(type(size) is int and size >= 0 for size in shape):
            raise TypeError(f"Plan.record: shapes must map names to tensors or shapes, got {name!r}: {given!r}")
        wanted[name] = Layout(tuple(shape), given.dtype if isinstance(given, Tensor) else usual)
    if not wanted:
        raise ValueError("Plan.record: shapes must have at least one weight of the checkpoint")
    return wanted


class _Cannot(Exception):
    """Why some weights cannot be followed, as the rest of a sentence after a weight's name."""


# ---- what is written ------------------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """A part of a flat weight: dimensions in the order of falling strides, as few as there can be."""

    weight: str
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.sizes, self.strides, flat.storage_offset() + self.offset)

    @property
    def end(self) -> int:
        return self.offset + 1 + sum((size - 1) * step for size, step in zip(self.sizes, self.strides, strict=True))

    def covers(self, other: _Span) -> bool:
        dense = math.prod(self.sizes) == self.end - self.offset
        return other == self or (dense and self.offset <= other.offset and other.end <= self.end)


def _whole(weight: str, flat: Tensor) -> _Span:
    return _Span(weight, 0, (flat.numel(),), (1,))


def _span(weight: str, flat: Tensor, tensor: Tensor) -> _Span | None:
    """The part of the flat weight that a tensor in its storage is; the weight as a whole where it is no such part."""
    begin = tensor.data_ptr() - flat.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if begin >= flat.nbytes or begin + (reach + 1) * tensor.element_size() <= 0:
        return None
    offset, rest = divmod(begin, flat.element_size())
    dims = [(stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    joined: list[tuple[int, int]] = []
    for stride, size in sorted(dims, reverse=True):
        if joined and joined[-1][0] == stride * size:
            size *= joined.pop()[1]
        joined.append((stride, size))
    span = _Span(weight, offset, tuple(size for _, size in joined), tuple(stride for stride, _ in joined))
    nested = all(stride > 0 for stride in span.strides)
    if tensor.dtype != flat.dtype or rest or not nested or offset < 0 or span.end > flat.numel():
        return _whole(weight, flat)
    return span


@dataclass(eq=False)
class _Kept:
    """What a part of a weight was before the loader wrote to it."""

    span: _Span
    content: Tensor
    # Where the part was not kept already, as a part of another one; None: nowhere.
    new: Tensor | None


class _Writes:
    """One run of the loader: where it writes to the weights, and what was there."""

    def __init__(self, flats: Mapping[str, Tensor]) -> None:
        self.flats = flats
        self.homes: dict[tuple[torch.device, int], list[str]] = {}
        for name, flat in flats.items():
            self.homes.setdefault((flat.device, flat.untyped_storage().data_ptr()), []).append(name)
        self.kept: dict[str, list[_Kept]] = {}
        self.lock = threading.Lock()
        self.on = True

    def before(self, tensor: Tensor) -> None:
        """A tensor is about to be written to."""
        if tensor.is_meta or not tensor.numel() or tensor.layout != torch.strided:
            return
        for name in self.homes.get((tensor.device, tensor.untyped_storage().data_ptr()), ()):
            span = _span(name, self.flats[name], tensor)
            if span is not None:
                with self.lock:
                    self._keep(span)

    def _keep(self, span: _Span) -> None:
        flat, others = self.flats[span.weight], self.kept.setdefault(span.weight, [])
        if any(other.span.covers(span) for other in others):
            return
        part, new = span.of(flat), None
        if any(other.span.offset < span.end and span.offset < other.span.end for other in others):
            mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
            for other in others:
                other.span.of(mask).fill_(True)
            new = ~span.of(mask)
            if not bool(new.any()):
                return
            new = None if bool(new.all()) else new
        others.append(_Kept(span, part.clone(), new))
        if new is None:
            part.fill_(_mark(flat.dtype))
        else:
            mark = bits(torch.full((), _mark(flat.dtype), dtype=flat.dtype, device=flat.device))
            bits(part).masked_fill_(new, mark)  # floats of 8 bits have no masked_fill_

    def restore(self) -> None:
        for name, others in self.kept.items():
            for kept in reversed(others):  # a later one has some of what the loader had written by then
                kept.span.of(self.flats[name]).copy_(kept.content)
        self.kept.clear()


class _Watch(TorchDispatchMode):
    """Tells of tensors that an op is about to write to."""

    def __init__(self, writes: _Writes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.writes = writes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.writes.on and func._schema.is_mutable:
            for at, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[at] if at < len(args) else kwargs.get(argument.name)
                    for tensor in value if isinstance(value, (list, tuple)) else (value,):
                        if isinstance(tensor, Tensor):
                            self.writes.before(tensor)
        return func(*args, **kwargs)


@contextmanager
def _watched(writes: _Writes) -> Iterator[None]:
    """Watch this thread, and those that begin meanwhile: a mode is one thread's own."""
    outer = threading.getprofile()

    def begin(frame: Any, event: str, argument: Any) -> None:
        # Called before the first line of the new thread.
        sys.setprofile(outer)
        if writes.on:
            _Watch(writes).__enter__()  # type: ignore[no-untyped-call]

    threading.setprofile(begin)
    try:
        with _Watch(writes):
            yield
    finally:
        writes.on = False
        threading.setprofile(outer)


def _mark(dtype: torch.dtype) -> int:
    """What an entry holds that nobody has written to: never a digit."""
    return -1 if dtype.is_signed else 255


# ---- what is loaded -------------------------------------------------------------------------------------------------


class _Group:
    """Weights that are loaded together; their entries are numbered through."""

    def __init__(self, layouts: Mapping[str, Layout], device: torch.device) -> None:
        self.layouts, self.device = layouts, device
        ends = np.cumsum([layout.numel for layout in layouts.values()])
        self.begins = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        self.total = int(ends[-1])
        self.base = min(_DIGITS.get(layout.dtype, _MOST) for layout in layouts.values())
        self.digits = 1
        while self.base**self.digits < self.total:
            self.digits += 1

    def each(self, made: Callable[[str, int, int, torch.dtype], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The weights, one after the other, with entries that `made` makes: of a name, from the first to the last."""
        for (name, layout), begin in zip(self.layouts.items(), self.begins.tolist(), strict=True):
            flat = torch.empty(layout.numel, dtype=layout.dtype, device=self.device)
            for at in range(0, layout.numel, _CHUNK):
                end = min(at + _CHUNK, layout.numel)
                flat[at:end] = made(name, begin + at, begin + end, layout.dtype)
            yield name, flat.view(layout.shape)

    def digit(self, place: int) -> Iterator[tuple[str, Tensor]]:
        def made(name: str, begin: int, end: int, dtype: torch.dtype) -> Tensor:
            digits: Tensor = torch.arange(begin, end, device=self.device) // self.base**place % self.base + 1
            return digits

        return self.each(made)

    def complement(self) -> Iterator[tuple[str, Tensor]]:
        def made(name: str, begin: int, end: int, dtype: torch.dtype) -> Tensor:
            return self.base - torch.arange(begin, end, device=self.device) % self.base

        return self.each(made)

    def random(self) -> Iterator[tuple[str, Tensor]]:
        """The same values for a weight at every call."""
        generators: dict[str, torch.Generator] = {}

        def made(name: str, begin: int, end: int, dtype: torch.dtype) -> Tensor:
            if name not in generators:
                generators[name] = torch.Generator().manual_seed(fnv1a64(name) >> 1)
            generator = generators[name]
            if dtype.is_floating_point:
                return torch.randn(end - begin, generator=generator, dtype=torch.float64)
            bound = torch.iinfo(dtype)
            return torch.randint(bound.min, bound.max, (end - begin,), generator=generator, dtype=torch.int64)

        return self.each(made)


class _Part(NamedTuple):
    """A part of a weight that the loader has written to."""

    now: Tensor
    # Which of its entries are told of here; None: all.
    new: Tensor | None
    before: Tensor


class _Landing(NamedTuple):
    """Entries that have arrived in one part of a weight."""

    span: _Span
    # The number of the checkpoint's entry, or _UNTOUCHED and so on: with the span's dimensions.
    numbers: Tensor


# ---- the recording --------------------------------------------------------------------------------------------------


class _Recording:
    def __init__(
        self, weights: dict[str, Weight], load: _Load, wanted: dict[str, Layout], device: torch.device
    ) -> None:
        self.weights, self.load, self.wanted, self.device = weights, load, wanted, device
        # By .data, whose version counter is not the parameter's: what is put back has not changed.
        self.own = {name: weight.slots[0].weight.data for name, weight in weights.items()}
        self.flats = {name: tensor.view(-1) for name, tensor in self.own.items() if tensor.numel()}
        self.found: dict[str, list[Box]] = {}
        self.whole: set[str] = set()
        self.problems: dict[str, str] = {}

    def run(self) -> None:
        pending: dict[str, str | None] = {}
        alone: list[str] = []
        for group in self._packs():
            left = self._try(group)
            if len(group) > 1:
                alone += left
            else:
                pending |= left
        for name in alone:
            pending |= self._try([name])
        # Those of which nothing has arrived, or nothing that makes sense, may need others.
        tried: set[tuple[str, ...]] = set()
        depth = max((name.count(".") for name in pending), default=0)
        while depth >= 0:
            scopes: dict[str, list[str]] = {}
            for name in pending:
                scopes.setdefault(".".join(name.split(".")[:depth]), []).append(name)
            for scope, group in scopes.items():
                if len(group) > 1 and tuple(group) not in tried and (not depth or scope != group[0]):
                    tried.add(tuple(group))
                    self._together(group, pending)
            depth -= 1
        self.problems |= {name: problem for name, problem in pending.items() if problem}

    def _together(self, group: Sequence[str], pending: dict[str, str | None]) -> None:
        left = self._try(group)
        for name in set(group) - left.keys():
            del pending[name]
        problem = next(filter(None, left.values()), None)
        missing = [name for name in group if name in left and not pending[name]]
        # Nothing of a weight has arrived, and what goes wrong here may be the others' fault alone.
        if problem is not None and missing and self._matter(group, missing):
            pending |= dict.fromkeys(missing, problem)

    def _matter(self, names: Sequence[str], some: Sequence[str]) -> bool:
        """Whether anything that the loader writes for all these weights depends on some of them."""
        group = _Group({name: self.wanted[name] for name in names}, self.device)
        seen = []
        for changed in (False, True):
            given = (
                (name, other if changed and name in some else one)
                for (name, one), (_, other) in zip(group.digit(0), group.complement(), strict=True)
            )
            try:
                with self._loaded(given) as parts:
                    seen.append({span: bits(part.contiguous()).clone() for span, (part, _, _) in parts.items()})
            except _Cannot:
                return False
        first, second = seen
        return first.keys() != second.keys() or any(not torch.equal(first[span], second[span]) for span in first)

    def _packs(self) -> Iterator[list[str]]:
        """Weights in their order, as many at a time as the largest one has entries."""
        most = max(layout.numel for layout in self.wanted.values())
        pack: list[str] = []
        size = 0
        for name, layout in self.wanted.items():
            if not layout.numel:
                continue
            if layout.dtype not in _KINDS:
                self.problems[name] = f"has dtype {dtype_name(layout.dtype)}, in which a plan cannot be recorded"
                continue
            if pack and size + layout.numel > most:
                yield pack
                pack, size = [], 0
            pack.append(name)
            size += layout.numel
        if pack:
            yield pack

    def _try(self, names: Sequence[str]) -> dict[str, str | None]:
        """Load these weights together; returns those of which nothing has arrived, and why if it is known."""
        group = _Group({name: self.wanted[name] for name in names}, self.device)
        try:
            boxes = self._followed(group)
        except _Cannot as error:
            return dict.fromkeys(names, str(error))
        self.found |= boxes
        return {name: None for name in names if name not in boxes}

    def _followed(self, group: _Group) -> dict[str, list[Box]]:
        landings: dict[_Span, _Landing] = {}
        for place in range(group.digits):
            with self._loaded(group.digit(place)) as parts:
                if place == 0:
                    landings = {span: _first(span, part, new, group) for span, (part, new, _) in parts.items()}
                    if not landings:
                        return {}
                _refuse_elsewhere(landings, parts)
                for span, landing in landings.items() if place else ():
                    _next(landing.numbers, parts[span][0], group, place)
        constants: dict[_Span, Tensor] = {}
        with self._loaded(group.complement()) as parts:
            _refuse_elsewhere(landings, parts)
            for span, landing in landings.items():
                part = parts[span][0]
                _complement(landing.numbers, part, group)
                constants[span] = bits(part[landing.numbers == _OTHER].contiguous())
        boxes: dict[str, list[Box]] = {}
        for landing in landings.values():
            for name, box in _boxes(landing, group):
                boxes.setdefault(name, []).append(box)
        for some in boxes.values():
            if len(some) > _BOXES:
                raise _Cannot(
                    f"lies in {len(some):,} pieces, and a plan takes {_BOXES:,} a weight at most: its order is not a "
                    f"layout, but a shuffle"
                )
        self._proven(group, landings, constants, boxes)
        whole = self._whole(group, landings)
        self.whole |= {
            name
            for name in boxes
            if name in whole and all(self.flats[box.weight].dtype == self.wanted[name].dtype for box in boxes[name])
        }
        return boxes

    def _proven(
        self,
        group: _Group,
        landings: Mapping[_Span, _Landing],
        constants: Mapping[_Span, Tensor],
        boxes: Mapping[str, Sequence[Box]],
    ) -> None:
        """Random values must arrive where the boxes say, with the bits of a copy."""
        with self._loaded(group.random()) as parts:
            _refuse_elsewhere(landings, parts)
            # In the model itself, or in what has taken its place.
            homes = self.flats | {
                span.weight: parts[span][0] for span in parts if span.sizes == self.flats[span.weight].shape
            }
            for name, given in group.random():
                flat = given.view(-1)
                for box in boxes.get(name, ()):
                    there = box.targets(homes[box.weight]).contiguous()
                    if not torch.equal(bits(box.sources(flat).to(there).contiguous()), bits(there)):
                        raise _Cannot(_COMPUTED)
            for span, landing in landings.items():
                part, _, before = parts[span]
                other = landing.numbers == _OTHER
                now = bits(part[other].contiguous())
                if not torch.equal(now, constants[span]):
                    raise _Cannot(_COMPUTED)
                # Padding is one value, or what was there; anything else may be of a weight that came before.
                new = now[now != bits(before[other].contiguous())]
                if bool((new != new[:1]).any()):
                    raise _Cannot(
                        "arrives together with values that are neither its own nor one constant: the loader keeps "
                        "something from earlier calls, or computes"
                    )

    def _whole(self, group: _Group, landings: Mapping[_Span, _Landing]) -> set[str]:
        """The weights of which every entry has arrived."""
        seen = torch.zeros(group.total, dtype=torch.bool)
        for landing in landings.values():
            numbers = landing.numbers.view(-1)
            for at in range(0, numbers.numel(), _CHUNK):
                some = numbers[at : at + _CHUNK]
                seen[some[some >= 0].cpu()] = True
        ends = [*group.begins.tolist()[1:], group.total]
        return {
            name
            for name, begin, end in zip(group.layouts, group.begins.tolist(), ends, strict=True)
            if bool(seen[begin:end].all())
        }

    # ---- one run of the loader ---------------------------------------------------------------------------------

    @contextmanager
    def _loaded(self, given: Iterator[tuple[str, Tensor]]) -> Iterator[dict[_Span, _Part]]:
        """What the loader has written, in the block; then all is put back."""
        writes = _Writes(self.flats)
        params = tuple(
            slot.weight for one in self.weights.values() for slot in one.slots if not slot.weight.is_inference()
        )
        with torch.autograd._unsafe_preserve_version_counter(params):  # type: ignore[attr-defined]
            try:
                try:
                    with _watched(writes):
                        self.load(given)
                except Exception as error:
                    raise _Cannot(f"is refused by the loader: {type(error).__name__}: {error}") from error
                parts = {
                    kept.span: _Part(kept.span.of(self.flats[name]), kept.new, kept.content)
                    for name, others in writes.kept.items()
                    for kept in others
                }
                yield parts | self._replaced()
            finally:
                self._put_back()
                writes.restore()

    def _replaced(self) -> dict[_Span, _Part]:
        """What the loader has put in place of weights, instead of writing to them."""
        found: dict[_Span, _Part] = {}
        for name, weight in self.weights.items():
            for slot in weight.slots:
                now = slot.now()
                if now is slot.weight and now.data_ptr() == self.own[name].data_ptr():
                    continue
                own = self.own[name]
                if now is None or now.shape != own.shape or now.dtype != own.dtype or _model.foreign(now) is not None:
                    raise _Cannot(f"is not moved alone: the loader puts another kind of tensor in place of {name}")
                flat = now.detach().contiguous().view(-1)
                found[_whole(name, flat)] = _Part(flat, None, self.flats[name])
        return found

    def _put_back(self) -> None:
        for name, weight in self.weights.items():
            for slot in weight.slots:
                if not slot.holds():
                    home = slot.module._parameters if isinstance(slot.weight, nn.Parameter) else slot.module._buffers
                    home[slot.attribute] = slot.weight
            if weight.slots[0].weight.data_ptr() != self.own[name].data_ptr():
                weight.slots[0].weight.data = self.own[name]

    def lost(self) -> list[str]:
        """The weights that are not what they were."""
        return [
            name for name, weight in self.weights.items() if _granules.fingerprint(weight.tensor) != weight.fingerprint
        ]

    # ---- the result --------------------------------------------------------------------------------------------

    def result(self) -> Recorded:
        boxes = {name: tuple(self.found[name]) for name in self.wanted if name in self.found}
        nowhere = tuple(
            name for name, one in self.wanted.items() if one.numel and name not in boxes and name not in self.problems
        )
        empty: dict[str, tuple[Box, ...]] = {name: () for name, layout in self.wanted.items() if not layout.numel}
        layout = {name: layout_of(weight) for name, weight in self.weights.items()}
        return Recorded(
            boxes | empty,
            nowhere,
            self.problems,
            self.wanted,
            layout,
            frozenset(self.whole | empty.keys()),
            self._shared(boxes),
        )

    def _shared(self, boxes: Mapping[str, Sequence[Box]]) -> dict[str, frozenset[str]]:
        """Weights of the checkpoint that lie on top of each other, by name."""
        there: dict[str, list[tuple[str, Box]]] = {}
        for name, some in boxes.items():
            for box in some:
                there.setdefault(box.weight, []).append((name, box))
        found: dict[str, set[str]] = {}
        for weight, all_ in there.items():
            if len({name for name, _ in all_}) == 1:
                continue
            owner = torch.full((self.flats[weight].numel(),), -1, dtype=torch.int32)
            names = list(dict.fromkeys(name for name, _ in all_))
            for name, box in all_:
                part = box.targets(owner)
                for other in part.unique().tolist():
                    if other >= 0 and names[other] != name:
                        found.setdefault(name, set()).add(names[other])
                        found.setdefault(names[other], set()).add(name)
                part.fill_(names.index(name))
        return {name: frozenset(others) for name, others in found.items()}


_KINDS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
)  # fmt: skip
_COMPUTED = (
    "is not moved alone: the loader computes with its values (scales, quantizes, or rounds them to fewer bits), or "
    "it does not do the same each time"
)


def _refuse_elsewhere(landings: Mapping[_Span, object], parts: Mapping[_Span, object]) -> None:
    if landings.keys() != parts.keys():
        raise _Cannot("does not arrive in the same places each time it is loaded")


# ---- digits ---------------------------------------------------------------------------------------------------------


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, of one shape, in pieces along their first dimension."""
    if not tensors[0].dim():
        yield tuple(tensor.view(1) if tensor.is_contiguous() else tensor.reshape(1) for tensor in tensors)
        return
    rows = max(1, _CHUNK * tensors[0].shape[0] // max(tensors[0].numel(), 1))
    yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _is_digit(value: Tensor, base: int) -> Tensor:
    return (value >= 1) & (value <= base) & (value == value.floor())


def _first(span: _Span, part: Tensor, new: Tensor | None, group: _Group) -> _Landing:
    kind = torch.int32 if group.total < 2**31 else torch.int64
    numbers = torch.empty(part.shape, dtype=kind, device=part.device)
    mark = _mark(part.dtype)
    for value, number in _pieces(part, numbers):
        value = value.to(torch.float64)
        digit = _is_digit(value, group.base)
        number.copy_(torch.where(digit, value - 1, torch.where(value == mark, _UNTOUCHED, _OTHER)))
    if new is not None:
        numbers.masked_fill_(~new, _ELSEWHERE)
    return _Landing(span, numbers)


def _next(numbers: Tensor, part: Tensor, group: _Group, place: int) -> None:
    for value, number in _pieces(part, numbers):
        value = value.to(torch.float64)
        longer = torch.where(_is_digit(value, group.base), number + (value - 1) * group.base**place, _OTHER)
        number.copy_(torch.where(number >= 0, longer, number.to(torch.float64)))


def _complement(numbers: Tensor, part: Tensor, group: _Group) -> None:
    mark = _mark(part.dtype)
    for value, number in _pieces(part, numbers):
        value = value.to(torch.float64)
        right = (number >= 0) & (number < group.total) & (value == group.base - number % group.base)
        right |= (number == _UNTOUCHED) & (value == mark)
        number.masked_fill_(~right & (number != _ELSEWHERE), _OTHER)


# ---- boxes ----------------------------------------------------------------------------------------------------------


class _Runs(NamedTuple):
    """Boxes in the order of their targets: where each begins, and its kind, an index into a list of dimensions."""

    target: _Integers
    source: _Integers
    kind: _Integers


# (size, target stride, source stride), from the innermost one outwards.
_Dims = tuple[tuple[int, int, int], ...]


def _boxes(landing: _Landing, group: _Group) -> Iterator[tuple[str, Box]]:
    kinds: list[_Dims] = [()]
    owners: list[int] = []
    runs = _entries(landing, group, kinds, owners)
    while True:
        count = len(runs.kind)
        if not count:
            return
        runs = _merged(runs, kinds, owners)
        if len(runs.kind) == count:
            break
    names = list(group.layouts)
    for target, source, kind in zip(*(array.tolist() for array in runs), strict=True):
        owner = owners[kind]
        yield names[owner], _box(landing.span.weight, target, source - int(group.begins[owner]), kinds[kind])


def _entries(landing: _Landing, group: _Group, kinds: list[_Dims], owners: list[int]) -> _Runs:
    """Entries in the order of the model, already in rows as far as they lie in a row."""
    kinds[:] = [()] * len(group.layouts)
    owners[:] = range(len(group.layouts))
    span, flat = landing.span, landing.numbers.reshape(-1)
    steps = [math.prod(span.sizes[at + 1 :]) for at in range(len(span.sizes))]
    rows = np.array([_row(layout.shape) for layout in group.layouts.values()])
    found: list[_Runs] = []
    for begin in range(0, flat.numel(), _CHUNK):
        numbers = flat[begin : begin + _CHUNK].to(torch.int64).cpu().numpy()
        at = np.arange(begin, begin + len(numbers))
        target = np.full(len(numbers), span.offset)
        for size, stride, step in zip(span.sizes, span.strides, steps, strict=True):
            target += at // step % size * stride
        there = numbers >= 0
        if not there.all():
            target, numbers = target[there], numbers[there]
        kind = np.searchsorted(group.begins, numbers, side="right") - 1
        # Without this, the last row of one block and the first row of the next one could be one row of twice the
        # length, and no other one like it.
        edges = (numbers - group.begins[kind]) % rows[kind] == 0
        some = _merged(_Runs(target, numbers, kind), kinds, owners, edges)
        if len(edges) and not edges[0] and found:
            some = _joined(found[-1], some, kinds, owners)
        if len(some.kind):
            found.append(some)
    if not found:
        return _Runs(*[np.zeros(0, dtype=np.int64)] * 3)
    if sum(len(one.kind) for one in found) > _CHUNK:
        raise _Cannot("is scattered over the model entry by entry: its order is not a layout, but a shuffle")
    return _Runs(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))


def _row(shape: Sequence[int]) -> int:
    """Entries of a row: of the last dimension, or of several where there would be very many rows."""
    row = 1
    for size in reversed(shape):
        row *= size
        if math.prod(shape) <= row * _ROWS:
            break
    return row


def _joined(before: _Runs, after: _Runs, kinds: list[_Dims], owners: list[int]) -> _Runs:
    """Where the first of these runs goes on with the last one before, that one becomes both; returns what is left."""
    one, other = (
        (int(runs.target[at]), int(runs.source[at]), int(runs.kind[at])) for runs, at in ((before, -1), (after, 0))
    )
    dims, more = kinds[one[2]], kinds[other[2]]
    count = dims[0][0] if dims else 1
    pace = dims or more
    forward, step = pace[0][1:] if pace else (other[0] - one[0], other[1] - one[1])
    goes_on = owners[one[2]] == owners[other[2]] and (not more or more[0][1:] == (forward, step)) and step > 0
    if not goes_on or (one[0] + count * forward, one[1] + count * step) != other[:2]:
        return after
    kinds.append(((count + (more[0][0] if more else 1), forward, step),))
    owners.append(owners[one[2]])
    before.kind[-1] = len(kinds) - 1
    return _Runs(*(array[1:] for array in after))


def _merged(runs: _Runs, kinds: list[_Dims], owners: list[int], edges: NDArray[np.bool_] | None = None) -> _Runs:
    """Neighbours of one kind at regular distances become one; new kinds are added to the lists.

    Where entries follow each other in the source, a run does not go over an edge.
    """
    target, source, kind = runs
    if len(kind) < 2:
        return runs
    ahead, on = np.diff(target), np.diff(source)
    apart = (np.diff(kind) != 0) | (on <= 0)
    if edges is not None:
        apart |= edges[1:] & (on == 1)
    turn = np.zeros(len(ahead), dtype=bool)
    turn[1:] = ~apart[1:] & ~apart[:-1] & ((ahead[1:] != ahead[:-1]) | (on[1:] != on[:-1]))
    # The step from a row to the next one differs from the steps in either: of turns one after the other, every second
    # one is such a step.
    place = np.arange(len(turn))
    since = place - np.maximum.accumulate(np.where(turn, -1, place))
    ends = np.flatnonzero(apart | (turn & (since % 2 == 1)))
    first = np.concatenate([[0], ends + 1])
    count = np.diff(np.concatenate([first, [len(kind)]]))
    long = count > 1
    after = np.minimum(first, len(ahead) - 1)
    row = np.stack([kind[first], count, np.where(long, ahead[after], 0), np.where(long, on[after], 0)], axis=1)
    new, which = np.unique(row, axis=0, return_inverse=True)
    numbers = []
    known = {(dims, owner): at for at, (dims, owner) in enumerate(zip(kinds, owners, strict=True))}
    for old, size, forward, step in new.tolist():
        dims = (*kinds[old], (size, forward, step)) if size > 1 else kinds[old]
        at = known.setdefault((dims, owners[old]), len(kinds))
        if at == len(kinds):
            kinds.append(dims)
            owners.append(owners[old])
        numbers.append(at)
    return _Runs(target[first], source[first], np.asarray(numbers)[which.reshape(-1)])


def _box(weight: str, target: int, source: int, dims: _Dims) -> Box:
    joined: list[tuple[int, int, int]] = []  # (source stride, target stride, size), from the outside in
    for step, forward, size in sorted(((step, forward, size) for size, forward, step in dims), reverse=True):
        if joined and joined[-1][0] == step * size and joined[-1][1] == forward * size:
            size *= joined.pop()[2]
        joined.append((step, forward, size))
    reach = 0
    for step, _, size in reversed(joined):
        if reach >= step:
            raise _Cannot("is repeated in the model in a way that has no boxes")
        reach += (size - 1) * step
    sources, targets, sizes = zip(*joined, strict=True) if joined else ((), (), ())
    return Box(weight, tuple(sizes) or (1,), source, tuple(sources) or (1,), target, tuple(targets) or (1,))
