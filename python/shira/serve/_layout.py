"""States of a model and the ways between them, as calls of the list ops.

A `Layout` is what one adapter, or several together, put on the model, weight by weight (`Part`). Each part keeps the
base's entries at its indices: on a GPU from the moment it is made, on the CPU from the moment the weight first changes
there, and it tells which by itself (`Part.known`). So every state can be left for the base, and any half-done way can
be taken back, without knowing how far it came.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

import shira_ops
from shira import _live
from shira._granules import dtype_name, refine
from shira._live import Watch, Weight
from shira.adapter._file import ARITHMETIC
from shira.adapter.adapter import Adapter


@dataclass(eq=False)
class Part:
    """What a layout puts on one weight: indices, and the values of each adapter that has some there."""

    weight: Weight
    adapters: tuple[str, ...]
    indices: Tensor
    granule: int
    values: list[Tensor]
    delta: list[bool]
    # The base's entries, or room for them.
    saved: Tensor
    # If room: what stands in its first granule, the complement of what will. See `known`.
    blank: Tensor | None = None
    # offsets and sources of `fuse_plan`, for several adapters; whose values are then those of their own layouts.
    plan: tuple[Tensor, Tensor] | None = None
    borrowed: bool = False
    # By the adapters' strengths: what they add to the fingerprint.
    differences: dict[tuple[float, ...], int] = field(default_factory=dict)
    _finer: dict[int, Tensor] = field(default_factory=dict)
    _spare: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether it replaces the weight as a whole."""
        return self.saved.numel() == self.weight.tensor.numel() == self.granule

    @property
    def known(self) -> bool:
        """Whether `saved` holds the base's entries. If not, the part was never on its weight.

        Gathering them costs what switching costs, since it touches the same lines; the op that first puts the part on
        writes them anyway. It writes all of them or none, but an interrupt may come before anyone can note which: so it
        is read off `saved` itself.
        """
        if self.blank is not None and not torch.equal(_bits(self.saved[: self.granule]), self.blank):
            self.blank = None
        return self.blank is None

    def learn(self, active: Part | None) -> None:
        """Read the base's entries, for who needs them of a part that was never on. Only reads the weight."""
        if not self.known:
            # In place: ways have the tensor.
            self.saved.copy_(base_entries(self.weight, self.indices, self.granule, active))
            self.blank = None

    def rebase(self) -> None:
        """Keep the entries of the base that the weight holds now instead of those it held before."""
        known, count = self.known, self.indices.numel() if self.known else 1
        entries = shira_ops.gather(self.weight.tensor.detach(), self.indices[:count], granule=self.granule)
        if not known:
            entries = _bits(entries).bitwise_not_().view(entries.dtype)
            self.blank = _bits(entries)
        self.saved[: entries.numel()].copy_(entries)  # in place: ways have the tensor
        self.differences.clear()

    def finer(self, granule: int) -> Tensor:
        """The indices for a divisor of the granule; made once."""
        if granule == self.granule:
            return self.indices
        if granule not in self._finer:
            self._finer[granule] = refine(self.indices, self.granule, granule, self.weight.tensor.numel())
        return self._finer[granule]

    def spare(self) -> Tensor:
        """Room beside `saved`, for the way from one strength to another."""
        if self._spare is None:
            self._spare = torch.empty_like(self.saved)
        return self._spare

    def trim(self) -> None:
        """Let go of what only saves time."""
        self._finer, self._spare = {}, None

    def to(self, device: torch.device, moved: dict[Tensor, Tensor]) -> None:
        """Bring its tensors to where the weight is now, each once."""

        def send(tensor: Tensor) -> Tensor:
            if tensor not in moved:
                moved[tensor] = tensor.to(device)
            return moved[tensor]

        self.trim()
        self.indices, self.saved = send(self.indices), send(self.saved)
        self.values = [send(value) for value in self.values]
        self.blank = None if self.blank is None else send(self.blank)
        self.plan = None if self.plan is None else (send(self.plan[0]), send(self.plan[1]))

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it keeps."""
        values = [] if self.borrowed else self.values
        tensors = [self.indices, *values, self.saved, *(self.plan or ()), *self._finer.values()]
        spare = [] if self._spare is None else [self._spare]
        total: int = sum(tensor.nbytes for tensor in [*tensors, *spare])
        return total

    def put(self, target: Tensor, indices: Tensor, saved: Tensor, alphas: Tensor | float) -> None:
        """The part's entries at these strengths onto the base: on the weight, or on a copy of the entries alone."""
        if self.plan is not None:
            assert isinstance(alphas, Tensor)
            offsets, sources = self.plan
            shira_ops.fuse_(
                target,
                saved,
                indices,
                offsets,
                sources,
                self.values,
                alphas,
                delta=self.delta,
                refuse=True,  # the base comes from `saved`: whatever the target holds, the result is the same
                granule=self.granule,
            )
        else:
            assert isinstance(alphas, float)
            shira_ops.apply_(
                target, indices, self.values[0], saved, alpha=alphas, delta=self.delta[0], granule=self.granule
            )

    def put_on(self, base: Tensor, indices: Tensor, alphas: Tensor | float) -> None:
        """The part's entries onto the base in a copy."""
        self.put(base, indices, self.saved if self.plan is not None else torch.empty_like(self.saved), alphas)

    def expected(self, alphas: Tensor | float) -> Tensor:
        """What the weight must hold at the indices."""
        entries = self.saved.clone()
        self.put_on(entries, torch.arange(self.indices.numel(), device=entries.device), alphas)
        return entries

    def base_copy(self) -> Tensor:
        """A copy of the whole weight with the base's entries put back: for what must be read at the base."""
        copy = self.weight.tensor.detach().clone()
        shira_ops.scatter_(copy, self.indices, self.saved, granule=self.granule)
        return copy


@dataclass(eq=False)
class Layout:
    """All parts of one adapter, or of several together in the order they were added."""

    names: tuple[str, ...]
    parts: dict[Weight, Part]
    # GPUs: what a commit must wait for, and what freeing must.
    ready: dict[torch.device, torch.cuda.Event] = field(default_factory=dict)
    used: dict[torch.device, torch.cuda.Event] = field(default_factory=dict)

    @cached_property
    def devices(self) -> list[torch.device]:
        return list(dict.fromkeys(weight.device for weight in self.parts))

    @cached_property
    def watch(self) -> Watch:
        return Watch(self.parts)

    def rebind(self, moved: dict[Tensor, Tensor]) -> None:
        """Follow its weights to where they are now."""
        self.freeing()
        _live.wait(self.ready)
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
"""The base."""


def base_entries(weight: Weight, indices: Tensor, granule: int, active: Part | None) -> Tensor:
    """The base's entries, also where an active part hides them. Only reads the weight."""
    entries = shira_ops.gather(weight.tensor.detach(), indices, granule=granule)
    if active is None or not active.indices.numel() or not indices.numel():
        return entries
    common = math.gcd(granule, active.granule)
    numel = weight.tensor.numel()
    mine, theirs = refine(indices, granule, common, numel), refine(active.indices, active.granule, common, numel)
    if mine.dtype != theirs.dtype:
        mine, theirs = mine.to(torch.int64), theirs.to(torch.int64)
    at = torch.searchsorted(theirs, mine).clamp_(max=theirs.numel() - 1)
    both = (theirs[at] == mine).nonzero().view(-1)
    hidden = shira_ops.gather(active.saved, at[both], granule=common)
    shira_ops.scatter_(entries, both, hidden, granule=common)
    return entries


def of_adapter(name: str, adapter: Adapter, weights: Mapping[Weight, str], active: Layout) -> Layout:
    """One adapter on the devices of its weights, each by the adapter's name for it, and the base's entries it will
    hide, or room for them."""
    parts: dict[Weight, Part] = {}
    for weight, weight_name in weights.items():
        entry = adapter.weights[weight_name]
        indices = _live.send(entry.indices, weight.device)
        values = _live.send(entry.values.detach(), weight.device)
        # GPUs gather beside the model's computation, on a side stream; then switching is as short as it can be.
        later = weight.device.type == "cpu" and indices.numel() > 1
        some = indices[:1] if later else indices
        saved, blank = base_entries(weight, some, entry.granule, active.parts.get(weight)), None
        if later:
            blank = _bits(saved).bitwise_not_()
            saved = saved.new_empty(entry.nnz)
            _bits(saved[: entry.granule]).copy_(blank)
        parts[weight] = Part(weight, (name,), indices, entry.granule, [values], [adapter.delta], saved, blank)
    return Layout((name,), parts)


def together(layouts: list[Layout], active: Layout) -> Layout:
    """Several adapters at once: unions of their entries, and the base's entries there from what each one saved."""
    on: dict[Weight, list[Part]] = {}
    for layout in layouts:
        for weight, part in layout.parts.items():
            part.learn(active.parts.get(weight))
            on.setdefault(weight, []).append(part)
    return Layout(
        tuple(name for layout in layouts for name in layout.names),
        {weight: _union(weight, parts) for weight, parts in on.items()},
    )


def _union(weight: Weight, parts: list[Part]) -> Part:
    if len(parts) == 1 and dtype_name(weight.dtype) not in ARITHMETIC:
        # Codes and counters cannot be summed, and need not be.
        (part,) = parts
        saved = part.saved.clone()
        return Part(weight, part.adapters, part.indices, part.granule, part.values, part.delta, saved, borrowed=True)
    granule = math.gcd(*(part.granule for part in parts))
    lists = [refine(part.indices, part.granule, granule, weight.tensor.numel()) for part in parts]
    indices, offsets, sources = shira_ops.fuse_plan(lists, granule=granule)
    # Where each entry's first source lies in all that was saved, end to end.
    first = sources[offsets[:-1].to(torch.int64)]
    counts = torch.tensor([0, *(one.numel() for one in lists[:-1])], device=first.device)
    at = counts.cumsum(0)[first >> 48] + (first & (2**48 - 1))
    saved = torch.cat([_bits(part.saved) for part in parts]).view(-1, granule * weight.dtype.itemsize)
    values = [part.values[0] for part in parts]
    borrowed = len({value.dtype for value in values}) == 1
    if not borrowed:
        # fuse_ takes values of one dtype: one that holds all of them exactly.
        values = [value.to(torch.float64 if weight.dtype == torch.float64 else torch.float32) for value in values]
    return Part(
        weight,
        tuple(part.adapters[0] for part in parts),
        indices,
        granule,
        values,
        [part.delta[0] for part in parts],
        saved[at].view(-1).view(weight.dtype),
        plan=(offsets, sources),
        borrowed=borrowed,
    )


def _bits(entries: Tensor) -> Tensor:
    return entries.view(torch.uint8)


# ---- the ways between them ---------------------------------------------------------------------------------


@dataclass(eq=False)
class Call:
    """One call of a list op: what of a way lies on one device and in one granule. Columns are the op's lists."""

    op: str
    granule: int
    columns: list[list[Tensor]]


@dataclass(eq=False)
class Way:
    """From one layout to another: reverts first, then switches and applies; then what is fused, weight by weight."""

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
            # autocast keeps casts of weights, and asks nobody whether they were written to.
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
            part.blank = None


class Alphas:
    """Strengths as `fuse_` takes them: a tensor for each device, dtype and set of adapters, made once."""

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

    One adapter for another is a single walk over each weight, also where only one of them touches it, and where their
    granules differ: they meet at the greatest common divisor. Only a weight that one of them replaces as a whole is
    left and then entered. From several adapters to one it is the same, with the union as what goes out. To several: a
    weight whose entries so far are all in the new union needs no revert, since `fuse_` writes each from the base.
    A frugal way keeps nothing for the next time: where one walk needs indices in another granule, or a second place for
    the base's entries, it leaves and enters instead.
    """
    groups: dict[tuple[str, torch.device, int], list[tuple[Tensor, ...]]] = {}
    fused: list[Part] = []

    def add(op: str, granule: int, part: Part, *row: Tensor) -> None:
        groups.setdefault((op, part.weight.device, granule), []).append((part.weight.tensor, *row))

    def leave(part: Part) -> None:
        if part.known:
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
