"""The states of a model, and the ways from one to another as calls of the list ops.

A `Layout` is what one adapter, or several together, put on the model, weight by weight (`Part`). Each part keeps the
base's entries at its indices: on a GPU from the moment the part is made, on the CPU from the moment the weight first
changes there (`Part.has_base` tells). So the base can be put back from every state, and a way that stopped somewhere
can be undone without knowing how far it came.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

import shira_ops
from shira._granules import dtype_name, overlay_, refine
from shira._live import Weight
from shira.adapter._entry import Entry
from shira.adapter._file import ARITHMETIC
from shira.serve._streams import Events, send, wait
from shira.serve._watch import Watch
from shira_ops import plan


@dataclass(eq=False)
class Part:
    """What a layout puts on one weight: indices, and the values of each of its adapters that has entries there."""

    weight: Weight
    adapters: tuple[str, ...]
    indices: Tensor
    granule: int
    values: list[Tensor]
    delta: list[bool]
    # The base's entries at the indices; or memory for them, that nothing has filled yet.
    saved: Tensor
    # While `saved` is not filled: the bits of its first granule, which are the complement of the base's there. The op
    # that fills `saved` therefore changes them, which is how `has_base` knows. None once it is filled.
    unfilled: Tensor | None = None
    # For several adapters: the offsets, sources and members of `fuse_plan`.
    plan: tuple[Tensor, Tensor, Tensor] | None = None
    # Whether the values are those of the adapters' own layouts, which count their bytes.
    borrowed: bool = False
    # What the part adds to the weight's fingerprint, by the strengths of its adapters.
    differences: dict[tuple[float, ...], int] = field(default_factory=dict)
    _finer: dict[int, Tensor] = field(default_factory=dict)
    _spare: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether it replaces all entries of the weight."""
        return self.saved.numel() == self.weight.tensor.numel() == self.granule

    @property
    def has_base(self) -> bool:
        """Whether `saved` holds the base's entries. If it does not, the part was never on its weight.

        To gather them costs as much as to switch, since it touches the same cache lines; and the op that first puts the
        part on the weight saves them anyway. That op saves all of them or none. But an interrupt may come before the
        caller can note that it ran, so `saved` itself is asked.
        """
        if self.unfilled is not None and not torch.equal(_bits(self.saved[: self.granule]), self.unfilled):
            self.unfilled = None
        return self.unfilled is None

    def save_base(self, active: Part | None) -> None:
        """Read the base's entries, if the part was never on its weight. Only reads the weight."""
        if not self.has_base:
            # In place: ways refer to the tensor.
            self.saved.copy_(base_entries(self.weight, self.indices, self.granule, active))
            self.unfilled = None

    def rebase(self) -> None:
        """The weight holds another base now: save its entries in place of the old one's, if those were saved."""
        filled = self.has_base
        count = self.indices.numel() if filled else 1
        entries = shira_ops.gather(self.weight.tensor.detach(), self.indices[:count], granule=self.granule)
        if not filled:
            entries = _bits(entries).bitwise_not_().view(entries.dtype)
            self.unfilled = _bits(entries)
        self.saved[: entries.numel()].copy_(entries)  # in place: ways refer to the tensor
        self.differences.clear()

    def finer(self, granule: int) -> Tensor:
        """The indices of the same entries in a granule that divides the part's; made once."""
        if granule == self.granule:
            return self.indices
        if granule not in self._finer:
            self._finer[granule] = refine(self.indices, self.granule, granule, self.weight.tensor.numel())
        return self._finer[granule]

    def spare(self) -> Tensor:
        """A second tensor like `saved`: from one strength to another, the op reads one and writes the other."""
        if self._spare is None:
            self._spare = torch.empty_like(self.saved)
        return self._spare

    def trim(self) -> None:
        """Free what only saves time."""
        self._finer, self._spare = {}, None

    def to(self, device: torch.device, moved: dict[Tensor, Tensor]) -> None:
        """Move its tensors to the device where the weight is now; ``moved`` has those that other parts have moved."""

        def move(tensor: Tensor) -> Tensor:
            if tensor not in moved:
                moved[tensor] = tensor.to(device)
            return moved[tensor]

        self.trim()
        self.indices, self.saved = move(self.indices), move(self.saved)
        self.values = [move(value) for value in self.values]
        self.unfilled = None if self.unfilled is None else move(self.unfilled)
        self.plan = None if self.plan is None else (move(self.plan[0]), move(self.plan[1]), move(self.plan[2]))

    @property
    def nbytes(self) -> int:
        """The bytes of memory that it keeps."""
        values = [] if self.borrowed else self.values
        tensors = [self.indices, *values, self.saved, *(self.plan or ()), *self._finer.values()]
        spare = [] if self._spare is None else [self._spare]
        total: int = sum(tensor.nbytes for tensor in [*tensors, *spare])
        return total

    def put(self, target: Tensor, indices: Tensor, saved: Tensor, alphas: Tensor | float) -> None:
        """Put the part's entries at these strengths onto the base: on the weight, or on a copy of the entries alone."""
        if self.plan is not None:
            assert isinstance(alphas, Tensor)
            shira_ops.fuse_(
                target,
                saved,
                indices,
                *self.plan,
                self.values,
                alphas,
                delta=self.delta,
                refuse=True,  # take the base from `saved`: the result is the same whatever the target holds
                granule=self.granule,
            )
        else:
            assert isinstance(alphas, float)
            shira_ops.apply_(
                target, indices, self.values[0], saved, alpha=alphas, delta=self.delta[0], granule=self.granule
            )

    def put_on(self, base: Tensor, indices: Tensor, alphas: Tensor | float) -> None:
        """Put the part's entries onto a copy of the base."""
        self.put(base, indices, self.saved if self.plan is not None else torch.empty_like(self.saved), alphas)

    def expected(self, alphas: Tensor | float) -> Tensor:
        """What the weight holds at the indices when the part is on it at these strengths."""
        entries = self.saved.clone()
        self.put_on(entries, torch.arange(self.indices.numel(), device=entries.device), alphas)
        return entries

    def base_copy(self) -> Tensor:
        """A copy of the whole weight with the base's entries put back: the base, if nobody else wrote to the weight."""
        copy = self.weight.tensor.detach().clone()
        shira_ops.scatter_(copy, self.indices, self.saved, granule=self.granule)
        return copy


@dataclass(eq=False)
class Layout:
    """All parts of one adapter, or of several together in the order they were added."""

    names: tuple[str, ...]
    parts: dict[Weight, Part]
    # On GPUs: what whoever uses its tensors must wait for, and what must have happened before they are freed.
    ready: Events = field(default_factory=dict)
    used: Events = field(default_factory=dict)

    @cached_property
    def devices(self) -> list[torch.device]:
        return list(dict.fromkeys(weight.device for weight in self.parts))

    @cached_property
    def watch(self) -> Watch:
        return Watch(self.parts)

    def rebind(self, moved: dict[Tensor, Tensor]) -> None:
        """Follow its weights to where they are now; ``moved`` as for `Part.to`."""
        self.freeing()
        wait(self.ready)
        self.ready.clear()
        for weight, part in self.parts.items():
            part.to(weight.device, moved)
        for cached in ("devices", "watch"):
            self.__dict__.pop(cached, None)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it keeps."""
        return sum(part.nbytes for part in self.parts.values())

    def freeing(self) -> None:
        """Wait until no GPU reads its tensors any more."""
        for event in self.used.values():
            event.synchronize()
        self.used.clear()


EMPTY = Layout((), {})
"""What is on a model that holds the base."""


@dataclass(frozen=True, eq=False)
class State:
    """What is on the model: a layout, and the strength of each of its adapters, in the layout's order."""

    layout: Layout
    strengths: dict[str, float]

    @property
    def names(self) -> tuple[str, ...]:
        return self.layout.names

    def part(self, weight: Weight) -> Part | None:
        """What is on a weight."""
        return self.layout.parts.get(weight)

    def expected(self, part: Part) -> Tensor:
        """What a weight holds at the indices of a part that is on it."""
        return part.expected(Alphas(self.strengths).of(part))

    def told(self) -> str:
        """The end of a message."""
        return f"active is {listed(self.strengths)}" if self.strengths else "no adapter is active"

    def content(self) -> str:
        """What the weights should hold, for a message."""
        return "the base plus what is active" if self.strengths else "the base"


BASE = State(EMPTY, {})


def listed(strengths: Mapping[str, float]) -> str:
    """Adapters and their strengths, for a message."""
    return ", ".join(f"{name!r} at {alpha:g}" for name, alpha in strengths.items())


def base_entries(weight: Weight, indices: Tensor, granule: int, active: Part | None) -> Tensor:
    """The base's entries at these indices, also those that an active part has replaced. Only reads the weight."""
    entries = shira_ops.gather(weight.tensor.detach(), indices, granule=granule)
    if active is None:
        return entries
    numel = weight.tensor.numel()
    return overlay_(entries, indices, granule, active.indices, active.saved, active.granule, numel)


def of_adapter(name: str, entries: Mapping[Weight, Entry], delta: bool, active: Layout) -> Layout:
    """The layout of one adapter, on the devices of its weights.

    On GPUs the base's entries that it will replace are gathered here, on the CPU there is only memory for them.
    """
    parts: dict[Weight, Part] = {}
    for weight, entry in entries.items():
        indices = send(entry.indices, weight.device)
        values = send(entry.values.detach(), weight.device)
        # A GPU gathers beside the model's computation, on a side stream; so the switch itself is as short as it can be.
        later = weight.device.type == "cpu" and indices.numel() > 1
        some = indices[:1] if later else indices
        saved, unfilled = base_entries(weight, some, entry.granule, active.parts.get(weight)), None
        if later:
            unfilled = _bits(saved).bitwise_not_()
            saved = saved.new_empty(entry.nnz)
            _bits(saved[: entry.granule]).copy_(unfilled)
        parts[weight] = Part(weight, (name,), indices, entry.granule, [values], [delta], saved, unfilled)
    return Layout((name,), parts)


def together(layouts: list[Layout], active: Layout) -> Layout:
    """The layout of several adapters at once: the unions of their entries, and the base's entries there, taken from
    what each adapter's own layout has saved."""
    on: dict[Weight, list[Part]] = {}
    for layout in layouts:
        for weight, part in layout.parts.items():
            part.save_base(active.parts.get(weight))
            on.setdefault(weight, []).append(part)
    return Layout(
        tuple(name for layout in layouts for name in layout.names),
        {weight: _union(weight, parts) for weight, parts in on.items()},
    )


def _union(weight: Weight, parts: list[Part]) -> Part:
    if len(parts) == 1 and dtype_name(weight.dtype) not in ARITHMETIC:
        # Codes and counts cannot be summed, and here there is nothing to sum.
        (part,) = parts
        saved = part.saved.clone()
        return Part(weight, part.adapters, part.indices, part.granule, part.values, part.delta, saved, borrowed=True)
    granule = math.gcd(*(part.granule for part in parts))
    lists = [refine(part.indices, part.granule, granule, weight.tensor.numel()) for part in parts]
    indices, offsets, sources, members = shira_ops.fuse_plan(lists, granule=granule)
    saved = parts[0].saved.new_empty(indices.numel() * granule)
    rows = _bits(saved).view(-1, granule * weight.dtype.itemsize)
    for part, here in zip(parts, plan.rows(offsets, sources, members, len(parts)), strict=True):
        rows[here] = _bits(part.saved).view(-1, rows.shape[1])  # where adapters meet, all of them saved the same base
    values = [part.values[0] for part in parts]
    borrowed = len({value.dtype for value in values}) == 1
    if not borrowed:
        # fuse_ takes values of one dtype; this one holds all of them exactly.
        values = [value.to(torch.float64 if weight.dtype == torch.float64 else torch.float32) for value in values]
    return Part(
        weight,
        tuple(part.adapters[0] for part in parts),
        indices,
        granule,
        values,
        [part.delta[0] for part in parts],
        saved,
        plan=(offsets, sources, members),
        borrowed=borrowed,
    )


def _bits(entries: Tensor) -> Tensor:
    return entries.view(torch.uint8)


# ---- the ways between them ---------------------------------------------------------------------------------


@dataclass(eq=False)
class Call:
    """One call of a list op: the part of a way that is on one device and in one granule. Columns are the op's lists."""

    op: str
    granule: int
    columns: list[list[Tensor]]


@dataclass(eq=False)
class Way:
    """From one layout to another: first reverts, then switches and applies, then fused parts weight by weight."""

    before: Layout
    after: Layout
    calls: list[Call]
    fused: list[Part]
    watch: Watch

    def go(self, strengths: Mapping[str, float]) -> None:
        """Change the weights."""
        try:
            self._go(strengths)
        finally:
            # autocast keeps casts of weights, and does not notice that a weight was written to.
            torch.clear_autocast_cache()

    def _go(self, strengths: Mapping[str, float]) -> None:
        delta = bool(self.after.parts) and next(iter(self.after.parts.values())).delta[0]
        for call in self.calls:
            if call.op == "scatter":
                weights, indices, saved = call.columns
                shira_ops.foreach_scatter_(weights, indices, saved, granule=call.granule)
                continue
            op = shira_ops.foreach_switch_ if call.op == "switch" else shira_ops.foreach_apply_
            op(*call.columns, alpha=strengths[self.after.names[0]], delta=delta, granule=call.granule)
        alphas = Alphas(strengths)
        for part in self.fused:
            part.put(part.weight.tensor, part.indices, part.saved, alphas.of(part))
        for part in self.after.parts.values():
            part.unfilled = None


class Alphas:
    """Strengths as ops take them: a number for one adapter, for `fuse_` a tensor, made once for each device, dtype and
    set of adapters."""

    def __init__(self, strengths: Mapping[str, float]) -> None:
        self._strengths = strengths
        self._made: dict[object, Tensor] = {}

    def of(self, part: Part) -> Tensor | float:
        if part.plan is None:
            return self._strengths[part.adapters[0]]
        dtype = torch.float64 if part.weight.dtype == torch.float64 else torch.float32
        key = (part.weight.device, dtype, part.adapters)
        if key not in self._made:
            numbers = [self._strengths[name] for name in part.adapters]
            self._made[key] = torch.tensor(numbers, dtype=dtype, device=part.weight.device)
        return self._made[key]


def way(before: Layout, after: Layout, *, frugal: bool = False) -> Way:
    """The calls from one layout to another.

    From one adapter to another each weight is walked over once, also where only one of them has entries, and where
    their granules differ: then both are walked in the greatest common divisor. Only a weight that one of them replaces
    as a whole is reverted and then written. From several adapters to one it is the same, with their union as what goes
    off. To several adapters: a weight whose entries so far are all in the new union needs no revert, since `fuse_`
    writes each entry from the base.
    A frugal way keeps nothing for the next time: where one walk would need indices in another granule, or a second
    tensor for the base's entries, it reverts and writes instead.
    """
    groups: dict[tuple[str, torch.device, int], list[tuple[Tensor, ...]]] = {}
    fused: list[Part] = []

    def add(op: str, granule: int, part: Part, *row: Tensor) -> None:
        groups.setdefault((op, part.weight.device, granule), []).append((part.weight.tensor, *row))

    def leave(part: Part) -> None:
        if part.has_base:
            add("scatter", part.granule, part, part.indices, part.saved)

    for weight, part in before.parts.items():
        if weight not in after.parts:
            leave(part)
    for weight, into in after.parts.items():
        out = before.parts.get(weight)
        if len(after.names) > 1:
            if out is not None and (into.plan is None or not set(out.adapters) <= set(into.adapters)):
                leave(out)
            fused.append(into)
        elif (
            out is None
            or (out.granule != into.granule and (frugal or out.whole or into.whole))
            or (into is out and frugal)
        ):
            if out is not None:
                leave(out)
            add("apply", into.granule, into, into.indices, into.values[0], into.saved)
        else:
            granule = math.gcd(out.granule, into.granule)
            saved = into.spare() if into is out else into.saved
            add("switch", granule, into, out.finer(granule), out.saved, into.finer(granule), into.values[0], saved)

    order = {"scatter": 0, "switch": 1, "apply": 2}
    calls = [
        Call(op, granule, [list(column) for column in zip(*rows, strict=True)])
        for (op, _, granule), rows in sorted(groups.items(), key=lambda group: order[group[0][0]])
    ]
    return Way(before, after, calls, fused, Watch({**before.parts, **after.parts}))
