"""`Plan`: where a server keeps the entries of a checkpoint's weights, whose layout is not the server's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shira import _model
from shira._granules import fingerprint, index_dtype, refine
from shira._text import AdapterError, named
from shira.adapter._entry import Entry
from shira.adapter.adapter import Adapter
from shira.sync._boxes import Box, Layout, layout_of
from shira.sync._record import recorded
from shira.sync._weights import Weight
from shira.sync.update import SyncError, Update, bits, version_of

__all__ = ["Box", "Plan"]


@dataclass(frozen=True, eq=False)
class Plan:
    """Where a model keeps the entries of a checkpoint's weights.

    A server's layout is its own: q, k and v in one weight, slices for tensor parallelism, transposed or padded weights,
    experts in a stack. A plan is recorded once, by running the server's own loader, and leads from the one to the other
    from then on, with work for the entries that change alone::

        plan = Plan.record(model, model.load_weights, shapes)
        receiver = Receiver(model, plan=plan)             # takes the trainer's updates
        switcher.add("style", plan.map(adapter))          # an adapter for the checkpoint, on the server's model

    It holds no tensors and can be pickled. With several ranks, each records its own.

    Attributes:
        boxes: for each weight of the checkpoint, where its entries are: as few `Box` es as there are.
        nowhere: weights of the checkpoint of which this model has nothing, as its loader leaves them out: another
            rank's experts, say. Changes of these are left out too.
        problems: weights whose entries cannot be followed, and why: those that the loader scales or quantizes. An
            update or adapter that changes one of them is refused.
        weights: what the checkpoint's weights look like.
        layout: what the model's own look like.
        whole: weights of the checkpoint that the model has every entry of, with the checkpoint's dtype.
        shared: for weights that lie on top of others (tied in the model, and not in the checkpoint), the others.
        exclude: what was left out of the model.
    """

    boxes: Mapping[str, tuple[Box, ...]]
    nowhere: tuple[str, ...]
    problems: Mapping[str, str]
    weights: Mapping[str, Layout]
    layout: Mapping[str, Layout]
    whole: frozenset[str]
    shared: Mapping[str, frozenset[str]]
    exclude: str | None = None

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if isinstance(value, dict):
                object.__setattr__(self, name, MappingProxyType(dict(value)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, MappingProxyType(value) if isinstance(value, dict) else value)

    def __repr__(self) -> str:
        count = sum(map(len, self.boxes.values()))
        text = f"{len(self.boxes)} weights of the checkpoint in {count} boxes of {len(self.layout)} of the model"
        more = [f"{len(self.nowhere)} nowhere"] if self.nowhere else []
        more += (
            [f"{len(self.problems)} that cannot be followed ({_model.some(self.problems)})"] if self.problems else []
        )
        return f"Plan({', '.join([text, *more])})"

    @classmethod
    def record(
        cls,
        model: nn.Module,
        load_weights: Callable[[Iterable[tuple[str, Tensor]]], object],
        shapes: Mapping[str, Tensor | Sequence[int]],
        *,
        dtype: torch.dtype | None = None,
        exclude: str | None = None,
        device: str | torch.device = "cpu",
    ) -> Plan:
        """Run the model's loader on weights whose entries say where they come from, and see where they go.

        The loader may do whatever moves values: slice, transpose, fuse, stack, pad, write through NumPy or from other
        threads that it starts. What computes with them (a scale, a quantizer, ``1 + weight``) is found out, and told
        in `problems` weight by weight. Values are cast as ``copy_`` does where dtypes differ.

        Some weights at a time are given to the loader, together as large as the largest one, three to nine times. What
        it writes over is kept and put back: afterwards the model has the bits that it had. Weights of which nothing
        arrives, as the loader waits for others that belong to them, are tried again together with their neighbours:
        with the weights of their module, of their layer, and so on. In the end other values are loaded, NaN and
        infinity among them, and compared with what the boxes say.

        Memory, beside the model: some ten times the largest weight, or the weights that the loader takes together.

        Args:
            model: the module that is served, with content; on any devices. Nobody may use it meanwhile.
            load_weights: the model's own loader, called as ``load_weights(iterable of (name, tensor))``.
            shapes: the checkpoint's weights by name, in its order: tensors, of which shape and dtype are looked at (on
                the meta device, say), or their shapes alone.
            dtype: of weights whose shape alone is given; that of the model's first parameter unless given.
            exclude: a regular expression: the model's weights whose names it is found in are not looked at.
            device: where the tensors lie that the loader gets.

        Raises `SyncError` where the loader takes nothing at all, or replaces the model's weights by others, or writes
        in a way that cannot be seen (a kernel of its own). In the last case what it wrote to is lost, and is named.
        """
        found = recorded(model, load_weights, shapes, dtype, exclude, torch.device(device))
        return cls(*found, exclude)

    def map(self, adapter: Adapter | Update) -> Adapter:
        """The same changes in the model's own layout: for a `Switcher` on the model, say. O(entries).

        Of an `Update`, this is the adapter that overwrites the same entries. Its versions stay where they are, since
        they tell of the checkpoint's weights: `Receiver` maps by itself. Fingerprints go, since they are of weights in
        another layout. Values of a weight that the model has in another dtype are rounded to that, as its loader does.

        Raises `AdapterError` for weights that are not in the plan, have another shape or dtype, or are among its
        `problems`; and where the model has one weight for two that would differ afterwards.
        """
        if isinstance(adapter, Update):
            adapter.refuse_relative("Plan.map")
            return Adapter(self.entries(adapter.weights))
        if not isinstance(adapter, Adapter):
            raise TypeError(f"Plan.map: adapter must be an Adapter or an Update, got {type(adapter).__name__}")
        entries = self.entries(adapter.weights, delta=adapter.delta)
        return Adapter(
            entries, alpha=adapter.alpha, delta=adapter.delta, mask=adapter.mask, provenance=adapter.provenance
        )

    def entries(self, weights: Mapping[str, Entry], *, delta: bool = False) -> dict[str, Entry]:
        """`map` for entries by name."""
        self.check_entries(weights)
        found: dict[str, list[_Part]] = {}
        for name, entry in weights.items():
            names = self._known(name, entry)
            self._refuse_shared(names, weights)
            for part in self._parts(names, entry, delta):
                found.setdefault(part.weight, []).append(part)
        return {name: self._joined(name, found[name]) for name in self.layout if name in found}

    def check_entries(self, weights: Mapping[str, Entry]) -> None:
        """Refuse what the plan does not know, or cannot follow; O(entries)."""
        for name, entry in weights.items():
            self._known(name, entry)
            entry.check_indices(f"weight {named(name)}")

    def check(self, who: str, weights: Mapping[str, Weight]) -> None:
        """Refuse a model whose layout is not the one that was recorded."""
        used = {box.weight for boxes in self.boxes.values() for box in boxes}
        for name, layout in self.layout.items():
            weight = weights.get(name)
            if weight is None:
                problem = "is not among the model's weights, or is another weight's second name, and was not then"
            else:
                now = layout_of(weight)
                if now == layout:
                    continue
                problem = f"has {now} and the further names {list(now.aliases)}, and had {layout} and "
                problem += f"{list(layout.aliases)} then"
            if name in used:
                raise SyncError(
                    f"{who}: the plan was recorded on another layout: {name} {problem}; record it again with this model"
                )

    def read(self, name: str, weights: Mapping[str, Weight]) -> Tensor:
        """A weight of the checkpoint that is here as a `whole`, out of the model's own: flat, on its device."""
        flats = {box.weight: weights[box.weight].tensor.view(-1) for box in self.boxes[name]}
        first = next(iter(flats.values()), None)
        device = torch.device("cpu") if first is None else first.device
        whole = torch.empty(self.weights[name].numel, dtype=self.weights[name].dtype, device=device)
        for box in self.boxes[name]:
            box.sources(whole).copy_(box.targets(flats[box.weight]))
        return whole

    def versions(self, weights: Mapping[str, Weight]) -> tuple[int, ...]:
        """The checkpoint's version, if the model has all of its weights whole; it reads them all.

        Two where weights lie on top of each other: the first if the Publisher has one (tied) weight for them, which it
        counts once under its first name, and the second if it has several.
        """
        if not self.whole >= self.weights.keys():
            return ()
        every = {name: fingerprint(self.read(name, weights)) for name in self.weights}
        once: dict[str, int] = {}
        for name, one in every.items():
            if not self.shared.get(name, frozenset()) & once.keys():
                once[name] = one
        return tuple(dict.fromkeys((version_of(once), version_of(every))))

    def granule(self, boxes: Iterable[Box], granule: int) -> int:
        """The largest granule, at most this one, whose granules are whole in the boxes and in the model's weights."""
        return math.gcd(*(math.gcd(box.granule(granule), self.layout[box.weight].numel) for box in boxes))

    def find(self, name: str, indices: Tensor, granule: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Where the model has these granules (int64, rising): weight, positions among `indices`, indices there."""
        for box in self.boxes[name]:
            where, found = box.coarse(granule).find(indices)
            if where.numel():
                yield box.weight, where, found

    # ---- how ---------------------------------------------------------------------------------------------------

    def _known(self, name: str, entry: Entry) -> list[str]:
        names = [one for one in (name, *entry.aliases) if one in self.weights]
        if not names:
            raise AdapterError(f"{named(name)} is not among the weights that the plan was recorded with")
        for one in names:
            layout = self.weights[one]
            if (layout.shape, layout.dtype) != (entry.shape, entry.dtype):
                raise AdapterError(
                    f"{named(one)} must have {layout}, as the plan was recorded with, got "
                    f"{Layout(entry.shape, entry.dtype)}"
                )
            if one in self.problems:
                raise AdapterError(f"{named(one)} cannot be changed here: {self.problems[one]}")
        return names

    def _refuse_shared(self, names: list[str], weights: Mapping[str, Entry]) -> None:
        for one in names:
            for other in self.shared.get(one, frozenset()) - set(names):
                entry, partner = weights.get(one), weights.get(other)
                same = (
                    entry is not None
                    and partner is not None
                    and entry.granule == partner.granule
                    and entry.values.dtype == partner.values.dtype
                    and torch.equal(entry.indices, partner.indices)
                    and torch.equal(bits(entry.values), bits(partner.values))
                )
                if not same:
                    raise AdapterError(
                        f"{named(one)} and {named(other)} lie on top of each other in the model, and they would not "
                        f"change in the same way"
                    )

    def _parts(self, names: Sequence[str], entry: Entry, delta: bool) -> Iterator[_Part]:
        boxes = dict.fromkeys(box for one in names for box in self.boxes.get(one, ()))
        if not boxes:
            return
        granule = self.granule(boxes, entry.granule)
        indices = refine(entry.indices, entry.granule, granule, entry.numel).to(torch.int64)
        values = entry.values.view(-1, granule)
        for box in boxes:
            where, found = box.coarse(granule).find(indices)
            if not where.numel():
                continue
            chosen = values[where]
            dtype = self.layout[box.weight].dtype
            if values.dtype == entry.dtype != dtype:
                chosen = chosen.to(torch.float32 if delta else dtype)
            yield _Part(box.weight, granule, found, chosen)

    def _joined(self, name: str, parts: list[_Part]) -> Entry:
        layout = self.layout[name]
        granule = math.gcd(*(part.granule for part in parts))
        indices = torch.cat([refine(part.indices, part.granule, granule, layout.numel) for part in parts])
        values = torch.cat([part.values.view(-1, granule) for part in parts])
        if not bool((indices[1:] > indices[:-1]).all()):
            indices, order = torch.sort(indices, stable=True)
            values = values[order]
            again = indices[1:] == indices[:-1]
            if bool(again.any()):
                if not torch.equal(bits(values[1:][again]), bits(values[:-1][again])):
                    raise AdapterError(
                        f"two weights that the model has in one place, in {named(name)}, would differ: they are tied "
                        f"in the model"
                    )
                new = torch.cat([again.new_ones(1), ~again])
                indices, values = indices[new], values[new]
        kind = index_dtype(layout.numel // granule)
        return Entry(
            indices.to(kind), values.reshape(-1), layout.shape, layout.dtype, granule, aliases=layout.aliases,
            checked=True,
        )  # fmt: skip


class _Part(NamedTuple):
    """Changes of one weight of the model, from one box."""

    weight: str
    granule: int
    indices: Tensor
    values: Tensor
