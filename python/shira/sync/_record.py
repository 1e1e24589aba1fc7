"""How a `Plan` is recorded: a loader is run on weights whose entries say where they come from.

Entries are numbered, and the numbers written in digits that every dtype holds exactly, however few bits it has: one run
of the loader for each digit. One more run has the lowest digit's complement, which a constant that the loader writes
(padding) cannot have beside that digit, and the last one has random values. What the loader writes to is seen below
autograd, where every op says which tensors it writes to (`TorchDispatchMode`): the part is kept, and marked, before the
first write.
"""

from __future__ import annotations

import bisect
import itertools
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shira import _granules, _live, _model
from shira._granules import dtype_name, fnv1a64
from shira.sync._boxes import Box, Layout, layout_of
from shira.sync._weights import Weight, weights_of
from shira.sync.update import SyncError, bits

_Load = Callable[[Iterable[tuple[str, Tensor]]], object]

# Entries that are worked on at once: as many as are in a core's own cache.
_CHUNK = 2**18
# Boxes of one weight. A real layout has a few; shuffled rows would have one each, which no longer is O(entries).
_BOXES = 1024

# Digits are whole numbers from 1, of which a dtype holds so many exactly. Powers of two.
_DIGITS = {torch.float8_e4m3fn: 16, torch.float8_e5m2: 8, torch.int8: 64}
_MOST = 128

# What is known about an entry of the model, where it is not the number of an entry of the checkpoint: nobody wrote to
# it; something else was written; another part tells.
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
        except BaseException as error:
            _refuse_lost(recording.lost(), error)
            raise
        _refuse_lost(recording.lost())
        if not recording.found and recording.problems:
            name, problem = next(iter(recording.problems.items()))
            raise SyncError(f"Plan.record: not one weight can be followed. {name} {problem}")
        if not recording.found and any(layout.numel for layout in wanted.values()):
            raise SyncError(
                f"Plan.record: the loader writes nothing to the model for {_model.some(wanted)}; give the model that "
                f"it loads, and the names of the checkpoint that it takes"
            )
        return recording.result()


def _refuse_lost(lost: Sequence[str], cause: BaseException | None = None) -> None:
    if lost:
        raise SyncError(
            f"Plan.record: the loader wrote to {_model.some(lost)} in a way that torch does not show (a kernel of its "
            f"own, NumPy, or a thread that was there before), so what was there is lost; load the model's weights "
            f"again, and record with a loader that writes through torch"
        ) from cause


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

    def places(self, device: torch.device) -> Tensor:
        """Where its entries are in the flat weight, int64."""
        found = torch.full((1,), self.offset, device=device)
        for size, stride in zip(self.sizes, self.strides, strict=True):
            found = (found[:, None] + torch.arange(0, size * stride, stride, device=device)).view(-1)
        return found

    @property
    def end(self) -> int:
        return self.offset + 1 + sum((size - 1) * step for size, step in zip(self.sizes, self.strides, strict=True))

    def covers(self, other: _Span) -> bool:
        dense = math.prod(self.sizes) == self.end - self.offset
        return other == self or (dense and self.offset <= other.offset and other.end <= self.end)


def _whole(weight: str, flat: Tensor) -> _Span:
    return _Span(weight, 0, (flat.numel(),), (1,))


def _span(weight: str, flat: Tensor, tensor: Tensor) -> _Span | None:
    """The part of the flat weight that a tensor in its storage is; the whole weight if it is not such a part."""
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
        *begins, self.total = itertools.accumulate((layout.numel for layout in layouts.values()), initial=0)
        self.begins = list(begins)
        self.base = min(_DIGITS.get(layout.dtype, _MOST) for layout in layouts.values())
        self.digits = 1
        while self.base**self.digits < self.total:
            self.digits += 1
        # Twice the largest number of so many digits must fit: see `_numbered`.
        self.kind = torch.int32 if self.base**self.digits <= 2**30 else torch.int64

    def owner(self, number: int) -> int:
        """Which of the weights, in their order, an entry is of."""
        return bisect.bisect_right(self.begins, number) - 1

    def span(self, owner: int) -> tuple[int, int]:
        """The numbers of a weight's entries, from the first to the one after the last."""
        return self.begins[owner], [*self.begins, self.total][owner + 1]

    def each(self, made: Callable[[str, int, int, torch.dtype], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The weights, one after the other, with entries that `made` makes: of a name, from the first to the last."""
        for (name, layout), begin in zip(self.layouts.items(), self.begins, strict=True):
            flat = torch.empty(layout.numel, dtype=layout.dtype, device=self.device)
            for at in range(0, layout.numel, _CHUNK):
                end = min(at + _CHUNK, layout.numel)
                flat[at:end] = made(name, begin + at, begin + end, layout.dtype)
            yield name, flat.view(layout.shape)

    def digit(self, place: int) -> Iterator[tuple[str, Tensor]]:
        bits = self.base.bit_length() - 1

        def made(name: str, begin: int, end: int, dtype: torch.dtype) -> Tensor:
            numbers = torch.arange(begin, end, dtype=self.kind, device=self.device)
            return (numbers >> bits * place).bitwise_and_(self.base - 1).add_(1)

        return self.each(made)

    def complement(self) -> Iterator[tuple[str, Tensor]]:
        def made(name: str, begin: int, end: int, dtype: torch.dtype) -> Tensor:
            numbers = torch.arange(begin, end, dtype=self.kind, device=self.device)
            return self.base - numbers.bitwise_and_(self.base - 1)

        return self.each(made)

    def random(self) -> Iterator[tuple[str, Tensor]]:
        """The same values for a weight at every call."""
        generators: dict[str, torch.Generator] = {}

        def made(name: str, begin: int, end: int, dtype: torch.dtype) -> Tensor:
            if name not in generators:
                generators[name] = torch.Generator().manual_seed(fnv1a64(name) >> 1)
            generator = generators[name]
            if dtype.is_floating_point:
                # Random bits are numbers of every size: a loader may clamp the largest ones. Those that are not finite
                # are left out, as a cast may give them other bits from place to place.
                size = ((end - begin) * dtype.itemsize,)
                drawn = torch.randint(256, size, generator=generator, dtype=torch.uint8).view(dtype)
                wide = drawn.to(torch.float64 if dtype == torch.float64 else torch.float32)
                return wide.nan_to_num_(0.5, 0.5, -0.5)
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
    # Which of the entries are _OTHER, and what they were in a run of the loader; None: none.
    other: Tensor | None = None
    constants: Tensor | None = None


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
            # One of several may have been written over by the next, or suffer from what another one does.
            if len(group) > 1 and (len(left) < len(group) or any(left.values())):
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
            for group in scopes.values():
                if len(group) > 1 and tuple(group) not in tried:
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
                    landings = {span: _landed(span, part, group) for span, part in parts.items()}
                    if not landings:
                        return {}
                _refuse_elsewhere(landings, parts)
                for span, landing in landings.items():
                    _add_digit(landing.numbers, parts[span].now, group, place)
        with self._loaded(group.complement()) as parts:
            _refuse_elsewhere(landings, parts)
            for span, landing in landings.items():
                _numbered(landing.numbers, parts[span], group)
                other = landing.numbers == _OTHER
                if bool(other.any()):
                    landings[span] = landing._replace(other=other, constants=parts[span].now[other])
        boxes: dict[str, list[Box]] = {}
        names = list(group.layouts)
        for landing in landings.values():
            for owner, box in _boxes(landing, group):
                boxes.setdefault(names[owner], []).append(box)
        self._proven(group, landings, boxes)
        self.whole |= {name for name in boxes if self._is_whole(self.wanted[name], boxes[name])}
        return boxes

    def _is_whole(self, layout: Layout, boxes: Sequence[Box]) -> bool:
        seen = torch.zeros(layout.numel, dtype=torch.bool)
        for box in boxes:
            box.sources(seen).fill_(True)
        return bool(seen.all()) and all(self.flats[box.weight].dtype == layout.dtype for box in boxes)

    def _proven(
        self,
        group: _Group,
        landings: Mapping[_Span, _Landing],
        boxes: Mapping[str, Sequence[Box]],
    ) -> None:
        """Random values must arrive where the boxes say, with the bits of a copy."""
        with self._loaded(group.random()) as parts:
            _refuse_elsewhere(landings, parts)
            # In the model itself, or in what has taken its place.
            homes = self.flats | {
                span.weight: parts[span].now for span in parts if span.sizes == self.flats[span.weight].shape
            }
            for name, given in group.random():
                flat = given.view(-1)
                for box in boxes.get(name, ()):
                    there = box.targets(homes[box.weight]).contiguous()
                    if not torch.equal(bits(box.sources(flat).to(there).contiguous()), bits(there)):
                        raise _Cannot(_COMPUTED)
            for span, landing in landings.items():
                if landing.other is None or landing.constants is None:
                    continue
                now, before = parts[span].now[landing.other], parts[span].before[landing.other]
                if not torch.equal(bits(now), bits(landing.constants)):
                    raise _Cannot(_COMPUTED)
                # Padding is one value, or what was there; anything else may be of a weight that came before.
                new = bits(now)[bits(now) != bits(before)]
                if bool((new != new[:1]).any()):
                    raise _Cannot(
                        "arrives together with values that are neither its own nor one constant: the loader keeps "
                        "something from earlier calls, or computes"
                    )

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
                    is_parameter: bool = isinstance(slot.weight, nn.Parameter)
                    homes: list[dict[str, Any]] = [slot.module._buffers, slot.module._parameters]
                    homes[not is_parameter].pop(slot.attribute, None)
                    homes[is_parameter][slot.attribute] = slot.weight
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
            ends = sorted((box.target, box.end) for _, box in all_)
            if all(one[1] <= other[0] for one, other in itertools.pairwise(ends)):
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
_SHUFFLE = f"lies in more than {_BOXES:,} pieces, the most that a plan takes: its order is a shuffle, and not a layout"
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
    if tensors[0].dim():
        rows = max(1, _CHUNK * tensors[0].shape[0] // max(tensors[0].numel(), 1))
        yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    else:
        yield tensors


def _landed(span: _Span, part: _Part, group: _Group) -> _Landing:
    return _Landing(span, torch.zeros(part.now.shape, dtype=group.kind, device=part.now.device))


def _add_digit(numbers: Tensor, part: Tensor, group: _Group, place: int) -> None:
    """What is not a digit makes some number too; `_numbered` finds it out."""
    for value, number in _pieces(part, numbers):
        number.add_(value.to(group.kind) - 1, alpha=group.base**place)


def _numbered(numbers: Tensor, part: _Part, group: _Group) -> None:
    """From sums of digits to numbers of entries, or what they are instead."""
    mark = _mark(part.now.dtype)
    # Below 0, or above every number.
    untouched = sum((mark - 1) * group.base**place for place in range(group.digits))
    for value, number in _pieces(part.now, numbers):
        digit = value.to(group.kind)
        right = (number >= 0) & (number < group.total) & (digit == group.base - (number & (group.base - 1)))
        free = (number == untouched) & (digit == mark)
        number.masked_fill_(~(right | free), _OTHER).masked_fill_(free, _UNTOUCHED)
    if part.new is not None:
        numbers.masked_fill_(~part.new, _ELSEWHERE)


# ---- boxes ----------------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """Entries in the order of the model, all of which have numbers, and where they are."""

    numbers: Tensor
    # None: one after the other, from `begin` on.
    places: Tensor | None
    begin: int

    def place(self, at: int) -> int:
        return self.begin + at if self.places is None else int(self.places[at])

    def of(self, some: Tensor) -> _Row:
        """Some of the entries."""
        at = some.nonzero().view(-1)
        return _Row(self.numbers[at], at + self.begin if self.places is None else self.places[at], 0)

    def alike(self, at: int, ahead: int, step: int, forward: int, end: int) -> int:
        """How many entries from here on have one so far ahead whose number, below `end`, and place are so much more."""
        count, size = 0, 1024
        while True:
            here = slice(at + count, min(at + count + size, len(self.numbers) - ahead))
            there = slice(here.start + ahead, here.stop + ahead)
            if here.start >= here.stop:
                return count
            right = (self.numbers[there] - self.numbers[here] == step) & (self.numbers[there] < end)
            if self.places is not None:
                right &= self.places[there] - self.places[here] == forward
            if not bool(right.all()):
                return count + int((~right).nonzero()[0])
            count, size = count + len(right), min(4 * size, _CHUNK)


def _boxes(landing: _Landing, group: _Group) -> list[tuple[int, Box]]:
    """The boxes of all entries that have a number, each with its weight's place in the group."""
    span, numbers = landing.span, landing.numbers.reshape(-1)
    row = _Row(numbers, None if span.strides == (1,) else span.places(numbers.device), span.offset)
    there = numbers >= 0
    if not bool(there.all()):
        row = row.of(there)
    found = _walked(span.weight, row, group)
    if found is None and len(group.layouts) > 1:
        # Entries of several weights may take turns.
        found = []
        for owner in range(len(group.layouts)):
            begin, end = group.span(owner)
            more = _walked(span.weight, row.of((row.numbers >= begin) & (row.numbers < end)), group)
            if more is None:
                raise _Cannot(_SHUFFLE)
            found += more
    if found is None:
        raise _Cannot(_SHUFFLE)
    return found


def _walked(weight: str, row: _Row, group: _Group) -> list[tuple[int, Box]] | None:
    """One box after the other, each as large as it can be; None where there are too many."""
    found: list[tuple[int, Box]] = []
    at = 0
    while at < len(row.numbers):
        first = int(row.numbers[at])
        owner = group.owner(first)
        begin, end = group.span(owner)
        # (source stride, target stride, size), from the inside out: each repeats all that is inside of it.
        dims: list[tuple[int, int, int]] = []
        block = 1
        while at + block < len(row.numbers):
            step, forward = int(row.numbers[at + block]) - first, row.place(at + block) - row.place(at)
            count = 1 + row.alike(at, block, step, forward, end) // block if step > 0 else 1
            if count == 1:
                break
            dims.append((step, forward, count))
            block *= count
        found.append((owner, _box(weight, row.place(at), first - begin, dims)))
        if len(found) > _BOXES * len(group.layouts):
            return None
        at += block
    return found


def _box(weight: str, target: int, source: int, dims: Sequence[tuple[int, int, int]]) -> Box:
    joined: list[tuple[int, int, int]] = []
    for step, forward, size in sorted(dims, reverse=True):
        if joined and joined[-1][:2] == (step * size, forward * size):
            size *= joined.pop()[2]
        joined.append((step, forward, size))
    reach = 0
    for step, _, size in reversed(joined):
        if reach >= step:
            raise _Cannot("is repeated in the model in a way that has no boxes")
        reach += (size - 1) * step
    steps, forwards, sizes = zip(*joined, strict=True) if joined else ((1,), (1,), (1,))
    return Box(weight, tuple(sizes), source, tuple(steps), target, tuple(forwards))
