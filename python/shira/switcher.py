"""`Switcher`: adapters on and off on the live model, in place, exactly."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import shira_ops
from shira import _model
from shira.adapter import Adapter, AdapterError, Entry, dtype_name
from shira.mask import refine

__all__ = ["Switcher"]

_WORD = 2**64 - 1


@dataclass(eq=False)
class _Batch:
    """The weights of an adapter that one call walks: those of one device and one granule."""

    device: torch.device
    granule: int
    weights: list[Tensor] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    saved: list[Tensor] = field(default_factory=list)

    def same_weights(self, other: _Batch) -> bool:
        return (
            self.granule == other.granule
            and len(self.weights) == len(other.weights)
            and all(one is two for one, two in zip(self.weights, other.weights, strict=True))
        )


@dataclass(eq=False)
class _Loaded:
    """An adapter laid out for this model: tensors on the weights' devices, room for the base's entries."""

    adapter: Adapter
    places: dict[str, _model.Slot]
    batches: list[_Batch]


@dataclass(eq=False)
class _Merge:
    """One weight under several adapters."""

    weight: Tensor
    indices: Tensor
    offsets: Tensor
    sources: Tensor
    values: list[Tensor]
    delta: list[bool]
    adapters: tuple[str, ...]
    granule: int
    saved: Tensor

    def fuse(self, strengths: Mapping[str, float], refuse: bool) -> None:
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        alphas = torch.tensor([strengths[name] for name in self.adapters], dtype=dtype, device=self.weight.device)
        shira_ops.fuse_(
            self.weight,
            self.saved,
            self.indices,
            self.offsets,
            self.sources,
            self.values,
            alphas,
            delta=self.delta,
            refuse=refuse,
            granule=self.granule,
        )


class Switcher:
    """Put adapters on a model's weights and take them off again, in place.

    Activation overwrites the adapter's entries and keeps the base's; deactivation writes those back, so the base
    returns bit for bit. Storage pointers never change, so compiled models and captured graphs keep working. Several
    adapters at once are summed onto the base in the order they were added. Every check comes before the first write.
    Calls may come from several threads, but not while the model computes.

    The weights must be at the base when an adapter is added for the first time; nothing else should write to them while
    one is active.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = _model.unwrap(model)
        self._slots = _model.slots(self.model)
        self._loaded: dict[str, _Loaded] = {}
        self._fingerprints: dict[object, int] = {}
        self._merges: dict[tuple[str, ...], list[_Merge]] = {}
        self._active: dict[str, float] = {}
        self._lock = threading.RLock()

    @property
    def active(self) -> dict[str, float]:
        """The active adapters and their strengths; empty when the model is the base."""
        return dict(self._active)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The added adapters by name, in the order they were added."""
        return {name: loaded.adapter for name, loaded in self._loaded.items()}

    def add(self, name: str, adapter: str | os.PathLike[str] | Adapter, *, verify: bool = True) -> None:
        """Make an adapter ready under a name; refuses one that was made for another base.

        Args:
            name: what to call it.
            adapter: an `Adapter`, or the path of its file.
            verify: compare the base's content by fingerprint. The first adapter on a weight costs one read of it; the
                result is kept.
        """
        with self._lock:
            if name in self._loaded:
                raise AdapterError(f"an adapter {name!r} was already added; remove it first")
            if isinstance(adapter, Adapter):
                where = f"adapter {name!r}"
            else:
                where = os.fspath(adapter)
                adapter = Adapter.load(adapter)
            places = self._places(where, adapter)
            if verify:
                self._verify(where, adapter, places)
            self._loaded[name] = _Loaded(adapter, places, _batches(where, adapter, places))

    def remove(self, name: str) -> None:
        """Forget an adapter. If it is active, alone or with others, the base is put back first."""
        with self._lock:
            self._known(name)
            if name in self._active:
                self._move({})
            del self._loaded[name]
            self._merges = {names: merge for names, merge in self._merges.items() if name not in names}

    def activate(self, which: str | Mapping[str, float], alpha: float | None = None) -> None:
        """Put one adapter on, or several at once; what was active goes off.

        Args:
            which: a name, or names with their strengths, which are fused.
            alpha: the strength of a single adapter; its own unless given.
        """
        with self._lock:
            self._move(self._strengths(which, alpha))

    def deactivate(self) -> None:
        """Put the base back, bit for bit."""
        with self._lock:
            self._move({})

    @contextmanager
    def using(self, which: str | Mapping[str, float], alpha: float | None = None) -> Iterator[Switcher]:
        """Activate within a ``with`` block; afterwards what was active before is active again."""
        with self._lock:
            before = dict(self._active)
            self.activate(which, alpha)
        try:
            yield self
        finally:
            with self._lock:
                self._move(before)

    def __repr__(self) -> str:
        return f"Switcher(adapters={list(self._loaded)}, active={self._active})"

    # ---- adding ----------------------------------------------------------------------------------------------

    def _places(self, where: str, adapter: Adapter) -> dict[str, _model.Slot]:
        """Find each of the adapter's weights in the model; all that does not fit is said in one error."""
        problems: list[str] = []
        places: dict[str, _model.Slot] = {}
        owner: dict[object, str] = {}
        for name, entry in adapter.weights.items():
            known = [known for known in (name, *entry.aliases) if known in self._slots]
            if not known:
                problems.append(f"weight {name!r} is not in the model")
                continue
            slot = self._slots[known[0]]
            problem = _misfit(slot, entry)
            key = _model.memory(slot.weight)
            if problem is None and key in owner:
                problem = f"is the same (tied) weight as {owner[key]!r}"
            if problem is not None:
                problems.append(f"weight {name!r} {problem}")
            owner.setdefault(key, name)
            places[name] = slot
        if problems:
            more = f" ({len(problems)} problems in all)" if len(problems) > 5 else ""
            raise AdapterError(f"{where} does not fit the model: {'; '.join(problems[:5])}{more}")
        return places

    def _verify(self, where: str, adapter: Adapter, places: Mapping[str, _model.Slot]) -> None:
        """Compare the content of the base with that the adapter was made for."""
        wanted = {name: entry.fingerprint for name, entry in adapter.weights.items() if entry.fingerprint is not None}
        unread = [name for name in wanted if _model.memory(places[name].weight) not in self._fingerprints]
        if unread:
            # A base is read at the base.
            before = dict(self._active)
            self._move({})
            for name in unread:
                weight = places[name].weight
                self._fingerprints[_model.memory(weight)] = int(shira_ops.fingerprint(weight.detach())) & _WORD
            self._move(before)
        wrong = [name for name in wanted if self._fingerprints[_model.memory(places[name].weight)] != wanted[name]]
        if wrong:
            raise AdapterError(
                f"{where} was made for another base: the content of {len(wrong)} of {len(wanted)} weights differs "
                f"(by fingerprint): {_model.some(wrong)}"
            )

    # ---- switching -------------------------------------------------------------------------------------------

    def _known(self, name: str) -> _Loaded:
        if name not in self._loaded:
            raise AdapterError(f"no adapter {name!r} was added; there are: {_model.some(self._loaded)}")
        return self._loaded[name]

    def _strengths(self, which: str | Mapping[str, float], alpha: float | None) -> dict[str, float]:
        if isinstance(which, str):
            strengths = {which: self._known(which).adapter.alpha if alpha is None else alpha}
        else:
            if alpha is not None:
                raise ValueError("alpha is for a single adapter; give each of several its strength in the mapping")
            if not which:
                raise ValueError("name at least one adapter; deactivate() puts the base back")
            for name in which:
                self._known(name)
            # In the order they were added, whatever the mapping's: the sum is then always the same bits.
            strengths = {name: which[name] for name in self._loaded if name in which}
        for name, strength in strengths.items():
            if not isinstance(strength, (int, float)) or not math.isfinite(strength):
                raise ValueError(f"the strength of {name!r} must be a finite number, got {strength!r}")
        return {name: float(strength) for name, strength in strengths.items()}

    def _move(self, strengths: dict[str, float]) -> None:
        """Go from what is active to these strengths, or raise with nothing changed."""
        if strengths == self._active:
            return
        for name in {**self._active, **strengths}:
            for slot in self._loaded[name].places.values():
                if not slot.holds():
                    raise RuntimeError(
                        f"{slot.name} is no longer the parameter it was when {name!r} was added; make a new Switcher"
                    )
        before = self._active
        with torch.no_grad():
            if len(strengths) > 1 and list(strengths) == list(before):
                self._merge(strengths, refuse=True)
            elif len(strengths) == 1 and len(before) == 1 and self._exchange(before, strengths):
                pass
            else:
                merges = self._plan(strengths) if len(strengths) > 1 else []
                self._revert(before)
                self._active = {}
                try:
                    self._apply(strengths, merges)
                except RuntimeError:
                    # The ops refuse before they write, so the model is at the base: go back to where we came from.
                    self._apply(before, self._merges.get(tuple(before), []))
                    self._active = before
                    raise
        self._active = dict(strengths)

    def _apply(self, strengths: Mapping[str, float], merges: list[_Merge]) -> None:
        """From the base to these strengths."""
        if merges:
            self._merge(strengths, refuse=False)
            return
        for name, alpha in strengths.items():
            loaded = self._loaded[name]
            done: list[_Batch] = []
            try:
                for batch in loaded.batches:
                    shira_ops.foreach_apply_(
                        batch.weights,
                        batch.indices,
                        batch.values,
                        batch.saved,
                        alpha=alpha,
                        delta=loaded.adapter.delta,
                        granule=batch.granule,
                    )
                    done.append(batch)
            except RuntimeError:
                _put_back(done)
                raise

    def _revert(self, strengths: Mapping[str, float]) -> None:
        """From these strengths to the base."""
        if len(strengths) > 1:
            self._unmerge(self._merges[tuple(strengths)])
        for name in strengths if len(strengths) == 1 else ():
            _put_back(self._loaded[name].batches)

    def _exchange(self, before: Mapping[str, float], after: Mapping[str, float]) -> bool:
        """One adapter for another in one walk, where both touch the same weights with the same granule."""
        ((old, _),), ((new, alpha),) = before.items(), after.items()
        outgoing, incoming = self._loaded[old], self._loaded[new]
        if old == new or len(outgoing.batches) != 1 or len(incoming.batches) != 1:
            return False
        out, into = outgoing.batches[0], incoming.batches[0]
        if not out.same_weights(into):
            return False
        shira_ops.foreach_switch_(
            out.weights,
            out.indices,
            out.saved,
            into.indices,
            into.values,
            into.saved,
            alpha=alpha,
            delta=incoming.adapter.delta,
            granule=out.granule,
        )
        return True

    # ---- several at once -------------------------------------------------------------------------------------

    def _plan(self, strengths: Mapping[str, float]) -> list[_Merge]:
        """The unions of the adapters' entries, weight by weight; made once for each set of adapters."""
        names = tuple(strengths)
        if names in self._merges:
            return self._merges[names]
        touched: dict[object, list[tuple[str, Tensor, _Batch, int]]] = {}
        for name in names:
            for batch in self._loaded[name].batches:
                for position, weight in enumerate(batch.weights):
                    touched.setdefault(_model.memory(weight), []).append((name, weight, batch, position))
        merges = []
        for parts in touched.values():
            weight = parts[0][1]
            granule = math.gcd(*(batch.granule for _, _, batch, _ in parts))
            refined = [refine(batch.indices[at], batch.granule, granule, weight.numel()) for _, _, batch, at in parts]
            indices, offsets, sources = shira_ops.fuse_plan(refined, granule=granule)
            values = [batch.values[at] for _, _, batch, at in parts]
            if len({value.dtype for value in values}) > 1:
                # fuse_ takes values of one dtype; float32 holds the narrow ones exactly.
                values = [value.to(torch.float32) for value in values]
            merges.append(
                _Merge(
                    weight,
                    indices,
                    offsets,
                    sources,
                    values,
                    [self._loaded[name].adapter.delta for name, _, _, _ in parts],
                    tuple(name for name, _, _, _ in parts),
                    granule,
                    torch.empty(indices.numel() * granule, dtype=weight.dtype, device=weight.device),
                )
            )
        self._merges[names] = merges
        return merges

    def _merge(self, strengths: Mapping[str, float], *, refuse: bool) -> None:
        """Sum the adapters onto the base; with ``refuse`` the base comes from what an earlier sum saved."""
        done: list[_Merge] = []
        try:
            for merge in self._merges[tuple(strengths)]:
                merge.fuse(strengths, refuse)
                done.append(merge)
        except RuntimeError:
            if refuse:
                for merge in done:
                    merge.fuse(self._active, True)
            else:
                self._unmerge(done)
            raise

    @staticmethod
    def _unmerge(merges: list[_Merge]) -> None:
        groups: dict[tuple[torch.device, int], list[_Merge]] = {}
        for merge in merges:
            groups.setdefault((merge.weight.device, merge.granule), []).append(merge)
        for (_, granule), group in groups.items():
            shira_ops.foreach_scatter_(
                [merge.weight for merge in group],
                [merge.indices for merge in group],
                [merge.saved for merge in group],
                granule=granule,
            )


def _misfit(slot: _model.Slot, entry: Entry) -> str | None:
    """Why an entry cannot go onto a weight, or None."""
    weight = slot.weight
    if tuple(weight.shape) != entry.shape:
        return f"must have shape {list(entry.shape)}, got {list(weight.shape)}"
    if weight.dtype != entry.dtype:
        return f"must have dtype {dtype_name(entry.dtype)}, got {dtype_name(weight.dtype)}"
    if weight.is_meta:
        return "is on the meta device"
    if not weight.is_contiguous():
        return f"must be contiguous; {_model.stride_advice(slot.name)}"
    return None


def _batches(where: str, adapter: Adapter, places: Mapping[str, _model.Slot]) -> list[_Batch]:
    found: dict[tuple[torch.device, int], _Batch] = {}
    for name, entry in adapter.weights.items():
        entry.check_indices(f"{where}: weight {name!r}")
        weight = places[name].weight
        batch = found.setdefault((weight.device, entry.granule), _Batch(weight.device, entry.granule))
        batch.weights.append(weight)
        batch.indices.append(entry.indices.to(weight.device))
        batch.values.append(entry.values.detach().to(weight.device))
        batch.saved.append(torch.empty(entry.nnz, dtype=weight.dtype, device=weight.device))
    return list(found.values())


def _put_back(batches: list[_Batch]) -> None:
    for batch in batches:
        shira_ops.foreach_scatter_(batch.weights, batch.indices, batch.saved, granule=batch.granule)
