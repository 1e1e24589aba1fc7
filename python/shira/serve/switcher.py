"""`Switcher`: one model, many adapters, on and off in place, exactly."""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import shira_ops
from shira import _fit, _live, _model, _text
from shira._granules import dtype_name
from shira._live import LOCK, SwitchError, Weight
from shira._text import AdapterError
from shira.adapter import _file
from shira.adapter.adapter import Adapter
from shira.serve import _layout, _shelf
from shira.serve._layout import EMPTY, Alphas, Layout, Part, Way

__all__ = ["Memory", "SwitchError", "Switcher"]

# Of the last so many: unions of adapters, lists of calls, and differences of fingerprints for strengths.
_MIXES, _WAYS, _DIFFERENCES = 16, 64, 64


class Memory(NamedTuple):
    """Where an adapter is, in bytes."""

    device: int
    """On the weights' devices, ready to switch: indices, values, the base's entries they replace, what saves time."""
    host: int
    """In the host's memory besides: the adapter itself, where the device does not use its tensors."""
    disk: int
    """In its file."""


@dataclass(eq=False)
class _Added:
    """An adapter by name, wherever it is now."""

    name: str
    alpha: float
    nbytes: int
    # Each weight, and what the adapter calls it; a tied weight of the adapter may be several here.
    weights: dict[Weight, str]
    adapter: Adapter | None
    file: Path | None = None
    stamp: _shelf.Stamp | None = None
    spilled: bool = False
    # Weights that it replaces as a whole, made where their content was another.
    elsewhere: tuple[str, ...] = ()
    # A weight whose entries are codes or counts, which only strength 1 is for.
    codes: Weight | None = None

    def read(self) -> Adapter:
        """The adapter, from its file if it is not in memory."""
        if self.adapter is not None:
            return self.adapter
        assert self.file is not None
        try:
            same = _shelf.stamp_of(self.file) == self.stamp
        except OSError as error:
            raise AdapterError(f"{self.file}, the file of {self.name!r}, is gone: {error}") from error
        if not same:
            raise AdapterError(f"{self.file} has changed since {self.name!r} was added; remove it and add it again")
        return _shelf.load(self.file, self.stamp)

    def allow(self, alpha: float, others: Iterable[_Added]) -> None:
        """Refuse a strength, and others beside it, with which the result is not what the adapter was made for."""
        if self.elsewhere and alpha not in (0, 1):
            raise AdapterError(
                f"{self.name!r} replaces {_model.some(self.elsewhere)} as a whole, and was made where the content "
                f"there was another (by fingerprint); only at strength 1 is the result the same for both, got {alpha:g}"
            )
        for other in others if self.elsewhere and alpha else ():
            common = [weight.name for weight in other.weights if weight.name in self.elsewhere]
            if other is not self and common:
                raise AdapterError(
                    f"{self.name!r} replaces {_model.some(common)} as a whole, and was made where the content there "
                    f"was another (by fingerprint), so it cannot be summed with {other.name!r}, which changes it too"
                )
        if self.codes is not None and alpha != 1:
            raise AdapterError(
                f"{self.name!r} has entries of {self.codes.name}, which is {dtype_name(self.codes.dtype)} and takes no "
                f"strength other than 1, got {alpha:g}"
            )


@dataclass(eq=False)
class _Block:
    """A ``with`` block of `Switcher.using`, and what was active before it; None until it was entered."""

    before: dict[str, float] | None = None


# The blocks that the code which runs is in: threads and tasks each have their own. A block lives as long as its frame.
_INSIDE: ContextVar[tuple[weakref.ref[_Block], ...]] = ContextVar("shira.using", default=())


class Switcher:
    """What a server holds: one model in memory and many adapters, switched and mixed in place.

    - **Exact.** Whatever was done before, ``activate`` leaves the bits that a fresh activation on the base would, and
      ``deactivate`` the base's. Several adapters are summed onto the base in the order they were added (SHiRA,
      arXiv 2406.13175, section 4: ``W + alpha_1 S_1 + alpha_2 S_2``; see `shira_ops.fuse_`).
    - **Atomic.** Everything is decoded, checked and brought to the device first. An error before the weights change
      changes nothing; one in between is taken back. `SwitchError` says which adapters are active now.
    - **In place.** Storage never moves: compiled models, captured graphs and hooks stay as they are.
    - **Safe.** Refused are: a base the adapter was not made for (by fingerprint), weights that someone else changed,
      weights that were moved or cast (`rebind`), that overlap in memory, that a `SparseTuner` trains, or that have
      adapters of another Switcher on them. Two Switchers may share a model, and two models their memory, if only one
      at a time has adapters on a weight.
    - **What is noticed.** Every call looks at the versions of the weights it is about, which any in-place operation of
      torch moves, and reads the content where one has moved. Writes that move no version are not seen by it: to
      ``weight.data``, to a numpy view, through another parameter over the same memory, by another process, to inference
      tensors. `verify` finds them at the entries of what is active, ``verify(full=True)`` everywhere.
    - From one adapter to another is one walk over the entries of both (`shira_ops.foreach_switch_`); new strengths
      for what is active are one pass too.
    - Calls may come from several threads, but the weights change while a call runs: not while the model computes on
      them, nor between a forward and its backward (torch refuses that backward). On GPUs the change is ordered by the
      caller's current streams; adapters come from pinned memory on side streams.

    Args:
        model: any module; compiled and spread over devices if you like. Its weights are changed, never replaced.
        budget: bytes that adapters may keep on the weights' devices (`memory`). When more is needed, those not used for
            longest leave, to their files or to host memory, and come back by themselves when activated.
        spill: a folder for adapters that leave and have no file. Without one they stay in host memory. The files go
            with the Switcher; what a process that was killed left in the folder goes when the next Switcher starts.
    """

    def __init__(
        self, model: nn.Module, *, budget: int | None = None, spill: str | os.PathLike[str] | None = None
    ) -> None:
        self.model = _model.unwrap(model)
        if budget is not None and budget < 0:
            raise ValueError(f"Switcher: budget must be a number of bytes or None, got {budget}")
        self.budget = budget
        self._spill = None if spill is None else Path(spill)
        if self._spill is not None:
            _shelf.sweep(self._spill)
        self._slots = _model.slots(self.model, buffers=True)
        self._added: dict[str, _Added] = {}
        self._weights: dict[object, Weight] = {}
        # By names, the least recently used first: one adapter, or several together.
        self._layouts: OrderedDict[tuple[str, ...], Layout] = OrderedDict()
        self._ways: OrderedDict[tuple[Layout, Layout], Way] = OrderedDict()
        self._active: dict[str, float] = {}
        # The way on which the weights are, if going back on it failed.
        self._torn: Way | None = None
        self._streams = _live.Streams()
        # GPUs: when the last change of the weights is done. Every call waits for it in its caller's streams.
        self._written: dict[torch.device, torch.cuda.Event] = {}
        # The open blocks of `using`, the innermost last.
        self._blocks: list[weakref.ref[_Block]] = []
        self._spilled: set[Path] = set()
        self._self: weakref.ref[object] = weakref.ref(self)
        _live.switchers.add(self)
        weakref.finalize(self, _gone, os.getpid(), self._weights, self._self, self._spilled)

    @property
    def active(self) -> dict[str, float]:
        """The active adapters and their strengths; empty when the model is the base."""
        return dict(self._active)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The added adapters by name, in the order they were added; read again from their files where they left."""
        with LOCK:
            return {name: added.read() for name, added in self._added.items()}

    def add(
        self,
        name: str,
        adapter: str | os.PathLike[str] | Adapter,
        *,
        verify: bool = True,
        check_finite: bool = True,
        rename: _text.Rename = None,
    ) -> None:
        """Make an adapter ready under a name; refuses one that was made for another base. Only reads the weights.

        Persistent buffers count as weights, such as the running statistics of a BatchNorm. A parameter that is replaced
        as a whole may have any content before: at strength 1 it does not depend on it.

        Args:
            name: what to call it.
            adapter: an `Adapter`, whose tensors must stay as they are while it is in use, or the path of its file. This
                is read now, and again if the adapter has left for want of room: then it must be the same file still.
            verify: compare the base's content by fingerprint. The first adapter on a weight costs one read of it; the
                result is kept. Without it, only names, shapes and dtypes must fit.
            check_finite: refuse values with NaN or infinity among them.
            rename: what the model calls the adapter's weights: regular expressions and their replacements, such as
                ``{"^": "model."}``, or a function from name to name.

        Raises `AdapterError` if it does not fit the model, and `SwitchError` if the weights are not to be trusted:
        changed by someone else, tuned, or another Switcher's. Nothing is added then.
        """
        file = stamp = None
        if isinstance(adapter, Adapter):
            where, adapter = f"adapter {name!r}" if name else "the adapter", _shelf.own(adapter)
        else:
            file = Path(adapter).absolute()
            where, stamp = os.fspath(adapter), _shelf.stamp_of(file)
            adapter = _shelf.load(file, stamp)
        alpha = _text.strength(f"{where}: alpha", adapter.alpha)
        for weight_name, entry in adapter.weights.items():
            entry.check_indices(f"{where}: weight {weight_name!r}")
            if check_finite:
                entry.check_finite(f"{where}: weight {weight_name!r}")
        with LOCK, _quiet():
            if name in self._added:
                raise AdapterError(f"an adapter {name!r} was already added; remove it first")
            self._heal()
            _live.wait(self._written)
            # Parameters may have been replaced since.
            self._slots = _model.slots(self.model, buffers=True)
            places = _fit.places(where, adapter, self._slots, rename)
            self._refuse_moved(group for groups in places.values() for group in groups)
            devices = [group[0].weight.device for groups in places.values() for group in groups]
            with self._streams.staging(devices) as ready:
                taken: dict[Weight, str] = {}
                for weight_name, groups in places.items():
                    found = [self._take(group, verify) for group in groups]
                    self._same(where, found)
                    taken.update(dict.fromkeys(found, weight_name))
                elsewhere = self._verify_base(where, adapter, taken) if verify else ()
                entries = [adapter.weights[weight_name] for weight_name in taken.values()]
                nbytes = sum(entry.indices.nbytes + entry.values.nbytes for entry in entries)
                nbytes += sum(entry.nnz * entry.dtype.itemsize for entry in entries)
                if self.budget is not None and nbytes > self.budget:
                    raise AdapterError(f"{where} needs {nbytes:,} bytes, more than the budget of {self.budget:,}")
                codes = next((weight for weight in taken if dtype_name(weight.dtype) not in _file.ARITHMETIC), None)
                added = _Added(name, alpha, nbytes, taken, adapter, file, stamp, elsewhere=elsewhere, codes=codes)
                layout = None
                if self._room(nbytes, keep=[self._names()]):
                    layout = _layout.of_adapter(name, adapter, taken, self._on())
                    layout.ready = ready
                else:
                    self._leave(added)
            self._weights.update((_model.memory(weight.tensor), weight) for weight in taken)
            self._added[name] = added
            if layout is not None:
                self._layouts[name,] = layout

    def remove(self, name: str) -> None:
        """Forget an adapter. If it is active it is taken off first; others that are active with it stay."""
        with LOCK:
            added = self._known(name)
            if name in self._active:
                self._refuse_outsiders()
                self._move({other: alpha for other, alpha in self._active.items() if other != name})
            self._drop(name)
            del self._added[name]
            used = {weight for other in self._added.values() for weight in other.weights}
            for key in [key for key, weight in self._weights.items() if weight not in used]:
                del self._weights[key]
            if added.spilled and added.file is not None:
                with suppress(OSError):  # then it goes when the Switcher does
                    added.file.unlink(missing_ok=True)
                    self._spilled.discard(added.file)

    def activate(self, which: str | Mapping[str, float], alpha: float | None = None) -> None:
        """Put one adapter on, or several at once; what was active goes off.

        Args:
            which: a name, or names with their strengths, which are summed onto the base.
            alpha: the strength of a single adapter; its own unless given.
        """
        with LOCK:
            self._refuse_outsiders()
            self._move(self._strengths(which, alpha))

    def deactivate(self, name: str | None = None, *, verify: bool = True) -> None:
        """Put the base back, bit for bit, or take one of several adapters off as if it had never been on.

        Args:
            name: an active adapter; all of them unless given.
            verify: refuse if someone else changed the weights meanwhile. Without it, the base's entries are written
                back whatever stands there now, and wherever the weights now are; what was changed elsewhere stays
                changed. Weights that were moved take part again after `rebind`.
        """
        with LOCK:
            self._refuse_outsiders()
            if name is None:
                self._move({}, verify=verify)
                return
            self._known(name)
            if name not in self._active:
                raise AdapterError(f"adapter {name!r} is not active; active are: {_model.some(self._active)}")
            self._move({other: alpha for other, alpha in self._active.items() if other != name}, verify=verify)

    @contextmanager
    def using(self, which: str | Mapping[str, float], alpha: float | None = None) -> Iterator[Switcher]:
        """Activate within a ``with`` block; afterwards what was active before is active again.

        An empty mapping is the base, as in `disabled`. Blocks nest. While one is open, other threads and tasks cannot
        change what is active (`SwitchError`).
        """
        block = _Block()
        entered = weakref.ref(block)
        try:
            with LOCK:
                self._refuse_outsiders()
                base = isinstance(which, Mapping) and not which and alpha is None
                strengths = {} if base else self._strengths(which, alpha)
                block.before = dict(self._active)
                self._move(strengths)
                self._blocks.append(entered)
            _INSIDE.set((*_INSIDE.get(), entered))
            yield self
        finally:
            _INSIDE.set(tuple(other for other in _INSIDE.get() if other is not entered))
            with LOCK:
                self._end(block)

    def disabled(self) -> AbstractContextManager[Switcher]:
        """The base within a ``with`` block, for a reference's outputs, say; afterwards what was active is active again.

        The weights are written to, so a graph that was recorded before the block has no backward after it (torch
        refuses it): compute the reference first, then the forward that is trained.
        """
        return self.using({})

    def rebind(self) -> None:
        """Go on with the memory that the weights have now, where they were moved or replaced since they were found.

        After ``model.share_memory()``, ``.to(device)`` or ``weight.data = ...`` the content must still be the base plus
        what is active; it is read whole. Raises `SwitchError`, naming the weights, if it is not, or if shapes or dtypes
        are others; nothing has changed then.
        """
        with LOCK, _quiet():
            self._refuse_torn()
            _live.wait(self._written)
            self._slots = _model.slots(self.model, buffers=True)
            moved = [weight for weight in self._weights.values() if weight.moved() is not None]
            if not moved:
                return
            _live.refuse_first(moved, lambda one: one.held(self))
            found = {weight: self._found(weight) for weight in moved}
            there: dict[object, str] = {}
            for weight in self._weights.values():
                name = there.setdefault(_model.memory(found.get(weight, weight).tensor), weight.name)
                if name != weight.name:
                    raise SwitchError(f"Switcher: {weight.name} and {name} were two weights, and are one now")
            overlap = _fit.overlap([fresh.slot for fresh in found.values()], besides=set(moved))
            if overlap is not None:
                raise SwitchError(f"Switcher: {overlap}")
            wrong = [weight.name for weight, fresh in found.items() if not self._carried(weight, fresh)]
            if wrong:
                raise SwitchError(
                    f"Switcher: {len(wrong)} weight(s) do not hold {self._what()} where they are now: "
                    f"{_model.some(wrong)}"
                )
            kept = {self._names(), *((name,) for name in self._active)}
            for names in [names for names in self._layouts if names not in kept]:
                self._forget(names)
            self._ways.clear()
            for weight, fresh in found.items():
                weight.rebind(fresh)
            same: dict[Tensor, Tensor] = {}
            for layout in self._layouts.values():
                layout.rebind(same)
            weights = list(self._weights.values())
            self._weights.clear()
            self._weights.update((_model.memory(weight.tensor), weight) for weight in weights)

    def fingerprint(self, name: str) -> int:
        """The fingerprint that the weight should have as it is now, as an unsigned number (`shira_ops.fingerprint`).

        Known without reading the weight: the base's, plus the difference that the active adapters make, which is worked
        out on a copy when it is first asked for, and kept for each strength. What the memory really holds, `verify`
        reads.
        """
        with LOCK:
            if name not in self._slots:
                raise KeyError(f"the model has no weight {name!r}")
            slot = self._slots[name]
            foreign = _model.foreign(slot.weight)
            if foreign is not None:
                raise SwitchError(f"Switcher: {name} {foreign}")
            weight = self._weights.get(_model.memory(slot.weight))
            if weight is None:
                with _quiet():
                    return _live.fingerprint(slot.weight)
            _live.refuse_first([weight], Weight.place)
            _live.wait(self._written)
            return self._fingerprint(weight)

    def verify(self, *, full: bool = False) -> None:
        """Raise `SwitchError`, naming the weights, unless they are the base plus what is active.

        Args:
            full: hash all memory of the weights that adapters are for, which finds any other change. Otherwise only the
                entries are compared: the active adapters', or with none active those of every adapter on the device.
                Weights on the CPU for which one of these was never active are then read whole, as its entries of the
                base are not known yet.
        """
        with LOCK, _quiet():
            self._refuse_torn()
            _live.refuse_first(self._weights.values(), Weight.place)
            _live.wait(self._written)
            # Weights with adapters of another Switcher are its to judge.
            others = {weight for weight in self._weights.values() if weight.held(self) is not None}
            wrong: dict[str, None] = {}
            read = dict.fromkeys(self._weights.values() if full else ())
            for layout in [self._on()] if self._active else list(self._layouts.values()):
                _live.wait(layout.ready)
                for weight, part in layout.parts.items():
                    if not part.known:
                        read[weight] = None
                    elif weight not in others and not self._holds(part):
                        wrong[weight.name] = None
            read = {weight: None for weight in read if weight not in others}
            for weight in read:
                if weight.ledger.base is None:
                    self._learn(weight)
                if not self._right(weight):
                    wrong[weight.name] = None
            if wrong:
                raise SwitchError(f"Switcher: {len(wrong)} weight(s) do not hold {self._what()}: {_model.some(wrong)}")
            for weight in read:
                weight.note()

    def memory(self) -> dict[str, Memory]:
        """Bytes that each adapter keeps, by name; under ``"a + b"`` those of adapters made ready to act together."""
        with LOCK:
            found: dict[str, Memory] = {}
            for name, added in self._added.items():
                layout = self._layouts.get((name,))
                on_cpu = layout is not None and all(device.type == "cpu" for device in layout.devices)
                host = 0 if added.adapter is None or on_cpu else added.adapter.nbytes
                disk = added.file.stat().st_size if added.file is not None and added.file.exists() else 0
                found[name] = Memory(0 if layout is None else layout.nbytes, host, disk)
            for names, layout in self._layouts.items():
                if len(names) > 1:
                    found[" + ".join(names)] = Memory(layout.nbytes, 0, 0)
            return found

    def knows(self, tensors: Iterable[Tensor]) -> bool:
        """Whether adapters were added that change any of these weights."""
        with LOCK:
            return not self._weights.keys().isdisjoint(map(_model.memory, tensors))

    def rebase(self, bases: Mapping[Tensor, int]) -> None:
        """Take what these weights hold now for the base, as after a `shira.sync.Receiver` wrote an update into them.

        The adapters stay as they are: an overwriting one replaces the same entries, a delta is added to the new ones,
        and taking them off gives the new base.

        Args:
            bases: the weights, as the model holds them, and the fingerprint of what each holds now (not compared).

        Raises `SwitchError` where an adapter is active, with nothing changed.
        """
        with LOCK, _quiet():
            self._heal()
            if self._active:
                raise SwitchError(f"Switcher: deactivate() before the base is changed; {_told(self._active)}")
            _live.wait(self._written)
            fresh = {_model.memory(tensor): fingerprint for tensor, fingerprint in bases.items()}
            for key, weight in self._weights.items():
                if key in fresh:
                    _live.refuse_first([weight], Weight.place)
                    weight.ledger.base = fresh[key]
                    weight.note()
            for layout in self._layouts.values():
                _live.wait(layout.ready)
                for weight, part in layout.parts.items():
                    if _model.memory(weight.tensor) in fresh:
                        part.rebase()
            self._written = _live.mark(tensor.device for tensor in bases)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy would share what is known of the first one's weights, and write into them.
        raise TypeError("Switcher: a switcher cannot be copied or pickled; make another one for a copy of the base")

    def __repr__(self) -> str:
        return f"Switcher(adapters={list(self._added)}, active={self._active})"

    # ---- adding ----------------------------------------------------------------------------------------------

    def _refuse_moved(self, groups: Iterable[tuple[_model.Slot, ...]]) -> None:
        """Refuse places whose weight is known as it was elsewhere."""
        known = {
            (place.module, place.attribute): weight for weight in self._weights.values() for place in weight.places
        }
        found = [known.get((place.module, place.attribute)) for group in groups for place in group]
        _live.refuse_first([weight for weight in found if weight is not None], Weight.moved)

    def _same(self, where: str, weights: list[Weight]) -> None:
        """Refuse weights that are one in the adapter, unless they have the same content."""
        if len(weights) > 1:
            for weight in weights:
                if weight.ledger.base is None:
                    self._learn(weight)
            for weight in weights[1:]:
                if weight.ledger.base != weights[0].ledger.base:
                    both = _fit.one_in_adapter(weight.name, weights[0].name)
                    raise AdapterError(f"{where} does not fit the model: {both} two that differ in the model")

    def _take(self, places: tuple[_model.Slot, ...], verify: bool) -> Weight:
        """The weight in these places, as we know it to be."""
        weight = self._weights.get(_model.memory(places[0].weight))
        if weight is None:
            weight = Weight.of(places, self, verify)
        _live.refuse_first([weight], Weight.place)
        _live.refuse_first([weight], lambda one: one.held(self))
        self._recheck([weight])
        if verify and weight.ledger.base is None:
            self._learn(weight)
        return weight

    def _verify_base(self, where: str, adapter: Adapter, weights: Mapping[Weight, str]) -> tuple[str, ...]:
        """Compare the content of the base with that the adapter was made for.

        Returns the weights where it is another and need not be the same, since all of it is replaced.
        """
        fingerprints = {weight: adapter.weights[name].fingerprint for weight, name in weights.items()}
        wanted = {weight: fingerprint for weight, fingerprint in fingerprints.items() if fingerprint is not None}
        other = [weight for weight, fingerprint in wanted.items() if weight.ledger.base != fingerprint]
        wrong = [weight.name for weight in other if adapter.delta or not adapter.weights[weights[weight]].whole]
        if wrong:
            raise AdapterError(
                f"{where} was made for another base: the content of {len(wrong)} of {len(wanted)} weights differs "
                f"(by fingerprint): {_model.some(wrong)}"
            )
        return tuple(weight.name for weight in other)

    # ---- weights that were moved -----------------------------------------------------------------------------

    def _found(self, weight: Weight) -> Weight:
        """What is in the weight's places now; refuses what cannot stand for it."""
        places = weight.now()
        for place in places:
            if _model.memory(place.weight) != _model.memory(places[0].weight):
                raise SwitchError(
                    f"Switcher: {places[0].name} and {place.name} were one (tied) weight and are two now; tie them"
                )
        _live.refuse_first([weight], Weight.tuned)
        problem = _fit.misfit(places[0], weight.shape, weight.dtype)
        if problem is not None:
            raise SwitchError(f"Switcher: {weight.name} {problem}")
        return Weight.of(places, self, False)

    def _carried(self, weight: Weight, fresh: Weight) -> bool:
        """Whether the content of a weight is what it was, where it is now."""
        part, now = self._on().parts.get(weight), fresh.tensor.detach()
        if part is None:
            return weight.ledger.base in (None, _live.fingerprint(now))
        indices = part.indices.to(now.device)
        entries = shira_ops.gather(now, indices, granule=part.granule)
        if not _equal(entries, part.expected(Alphas(self._active).of(part)).to(now.device)):
            return False
        base = now.clone()
        shira_ops.scatter_(base, indices, part.saved.to(now.device), granule=part.granule)
        return weight.ledger.base in (None, _live.fingerprint(base))

    def _write_back(self, layout: Layout) -> None:
        """Put the base's entries to where the weights are now."""
        targets: list[tuple[Tensor, Part]] = []
        _live.refuse_first(layout.parts, Weight.tuned)
        for weight, part in layout.parts.items():
            places = {id(place.weight): place for place in weight.now() if part.known}
            for place in places.values():
                problem = _fit.misfit(place, weight.shape, weight.dtype)
                if problem is not None:
                    raise SwitchError(f"Switcher: {place.name} {problem}; {_told(self._active)}")
                targets.append((place.weight, part))
        _live.wait(layout.ready)
        try:
            for tensor, part in targets:
                saved, indices = part.saved.to(tensor.device), part.indices.to(tensor.device)
                shira_ops.scatter_(tensor, indices, saved, granule=part.granule)
        except Exception as error:
            raise SwitchError(
                f"Switcher: putting the base's entries back failed, and some may be back already; the same call again "
                f"puts all of them back; {_told(self._active)}. Cause: {error}"
            ) from error
        finally:
            torch.clear_autocast_cache()
        for weight in layout.parts:
            weight.hold.holder = None
            weight.distrust()
        self._active = {}
        self._written = _live.mark(tensor.device for tensor, _ in targets)

    # ---- what is known of the weights ------------------------------------------------------------------------

    def _names(self) -> tuple[str, ...]:
        return tuple(self._active)

    def _on(self) -> Layout:
        """The active layout."""
        return self._layouts[self._names()] if self._active else EMPTY

    def _what(self) -> str:
        return "the base plus what is active" if self._active else "the base"

    def _learn(self, weight: Weight) -> None:
        """Read the base's fingerprint, from a copy where adapters are on it."""
        part = self._on().parts.get(weight)
        with _quiet():
            weight.ledger.base = _live.fingerprint(weight.tensor if part is None else part.base_copy())

    def _fingerprint(self, weight: Weight) -> int:
        """What the weight should have now."""
        if weight.ledger.base is None:
            self._learn(weight)
        assert weight.ledger.base is not None
        part = self._on().parts.get(weight)
        if part is None:
            return weight.ledger.base
        strengths = tuple(self._active[name] for name in part.adapters)
        if strengths not in part.differences:
            if len(part.differences) >= _DIFFERENCES:
                part.differences.clear()
            with _quiet():
                part.differences[strengths] = self._difference(weight, part)
        return _live.word(weight.ledger.base + part.differences[strengths])

    def _difference(self, weight: Weight, part: Part) -> int:
        """What an active part adds to the base's fingerprint. Worked out on a copy that is proved to be the base, so
        that what others may have done to the weight never counts."""
        copy = part.base_copy()
        if _live.fingerprint(copy) != weight.ledger.base:
            raise self._foreign(weight)
        before = _live.fingerprint_at(copy, part.indices, part.granule)
        part.put_on(copy, part.indices, Alphas(self._active).of(part))
        return _live.word(_live.fingerprint_at(copy, part.indices, part.granule) - before)

    def _right(self, weight: Weight) -> bool:
        """Whether the memory holds the base plus what is active, all of it."""
        part = self._on().parts.get(weight)
        if part is None:
            return weight.fingerprint() == weight.ledger.base
        return _live.fingerprint(part.base_copy()) == weight.ledger.base and self._holds(part)

    def _holds(self, part: Part) -> bool:
        """Whether the weight has the entries of an active part, bit for bit; or, of one that is not, the base's."""
        active = self._on().parts.get(part.weight) is part
        expected = part.expected(Alphas(self._active).of(part)) if active else part.saved
        return _equal(shira_ops.gather(part.weight.tensor.detach(), part.indices, granule=part.granule), expected)

    def _recheck(self, weights: Iterable[Weight]) -> None:
        """Refuse weights that someone else changed. Where a version moved, the content decides."""
        for weight in weights:
            if weight.changed():
                if weight.ledger.base is None or not self._right(weight):
                    raise self._foreign(weight)
                weight.note()

    def _foreign(self, weight: Weight) -> SwitchError:
        advice = (
            "deactivate(verify=False) puts the base's entries back all the same"
            if self._active
            else "load the base again, or remove the adapters and add those of the new base"
        )
        return SwitchError(
            f"Switcher: {weight.name} was changed by someone else since the Switcher last wrote or read it; "
            f"{_told(self._active)}. {advice}"
        )

    # ---- keeping adapters ------------------------------------------------------------------------------------

    def _known(self, name: str) -> _Added:
        if name not in self._added:
            raise AdapterError(f"no adapter {name!r} was added; there are: {_model.some(self._added)}")
        return self._added[name]

    def _ready(self, names: tuple[str, ...], beside: tuple[str, ...] = ()) -> Layout:
        """The layout of these adapters on the device; brings them back if they left. `beside` must not leave for it."""
        if not names:
            return EMPTY
        if names in self._layouts:
            for used in (*((name,) for name in names), names):  # of several, each is used too
                self._layouts.move_to_end(used)
            return self._layouts[names]
        keep = [self._names(), names, beside]
        if len(names) == 1:
            added = self._added[names[0]]
            adapter = added.read()
            self._make_room(added.nbytes, keep, names)
            weights = list(added.weights)
            self._disturbed(weights)
            with self._streams.staging(weight.device for weight in weights) as ready:
                layout = _layout.of_adapter(names[0], adapter, added.weights, self._on())
            added.adapter = adapter
        else:
            members = [self._ready((name,), names) for name in names]
            for member in members:
                _live.wait(member.ready)
                self._disturbed([weight for weight, part in member.parts.items() if not part.known])
            with self._streams.staging(device for member in members for device in member.devices) as ready:
                layout = _layout.together(members, self._on())
            self._make_room(layout.nbytes, keep, names)
            mixes = [known for known in self._layouts if len(known) > 1]
            for oldest in [known for known in mixes if known not in keep][: max(0, len(mixes) + 1 - _MIXES)]:
                self._forget(oldest)
        layout.ready = ready
        self._layouts[names] = layout
        return layout

    def _excess(self) -> int:
        """Bytes above the budget."""
        return 0 if self.budget is None else sum(layout.nbytes for layout in self._layouts.values()) - self.budget

    def _room(self, nbytes: int, keep: Iterable[tuple[str, ...]]) -> bool:
        """Whether there is room for so many bytes more; makes it of what was not used for longest, and of what only
        saves time where that is not enough."""
        if self.budget is None:
            return True
        kept = {*keep, *((name,) for names in keep for name in names)}

        def sized() -> tuple[dict[tuple[str, ...], int], int]:
            sizes = {names: layout.nbytes for names, layout in self._layouts.items()}
            return sizes, sum(size for names, size in sizes.items() if names not in kept)

        sizes, free = sized()
        if self._excess() + nbytes > free:
            self._trim()
            sizes, free = sized()
        excess = self._excess() + nbytes
        if excess > free:
            return False
        for names in list(self._layouts):
            if excess <= 0:
                break
            if names in kept or names not in self._layouts:
                continue
            gone = [known for known in self._layouts if known == names or (len(names) == 1 and names[0] in known)]
            excess -= sum(sizes[known] for known in gone)
            if len(names) == 1:
                self._leave(self._added[names[0]])
            else:
                self._forget(names)
        return True

    def _trim(self) -> None:
        """Let go of what only saves time."""
        self._ways.clear()
        for layout in self._layouts.values():
            for part in layout.parts.values():
                part.trim()

    def _make_room(self, nbytes: int, keep: Iterable[tuple[str, ...]], names: tuple[str, ...]) -> None:
        if not self._room(nbytes, keep):
            raise SwitchError(
                f"Switcher: {' + '.join(names)} would need {nbytes:,} bytes on the device beside what is active, and "
                f"the budget is {self.budget:,}; {_told(self._active)}"
            )

    def _leave(self, added: _Added) -> None:
        """Take an adapter off the device: to its file, or to a file in `spill`, or to host memory."""
        if added.file is None and self._spill is not None:
            file = _shelf.spilled(self._spill)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                added.read().save(file)
                stamp = _shelf.stamp_of(file)
            except OSError as error:
                raise SwitchError(
                    f"Switcher: {added.name!r} has to leave the device, and cannot be written to {file}: {error}; "
                    f"{_told(self._active)}"
                ) from error
            self._spilled.add(file)
            added.file, added.stamp, added.spilled = file, stamp, True
        if added.file is not None:
            added.adapter = None
        self._drop(added.name)

    def _drop(self, name: str) -> None:
        """Let go of all layouts with an adapter."""
        for names in [names for names in self._layouts if name in names]:
            self._forget(names)

    def _forget(self, names: tuple[str, ...]) -> None:
        layout = self._layouts.pop(names)
        self._ways = OrderedDict((key, way) for key, way in self._ways.items() if layout not in key)
        layout.freeing()

    # ---- switching -------------------------------------------------------------------------------------------

    def _refuse_outsiders(self) -> None:
        """While a block of `using` is open, only what runs inside it may change what is active."""
        self._blocks = [block for block in self._blocks if block() is not None]
        if self._blocks and self._blocks[-1] not in _INSIDE.get():
            raise SwitchError(
                f"Switcher: a using() or disabled() block of another thread or task is open, and would lose its "
                f"adapters; switch when it has ended; {_told(self._active)}"
            )

    def _end(self, block: _Block) -> None:
        """Put back what was active before a block; if one that began inside it is still open, that one will."""
        if block.before is None:
            return
        open_blocks = [other for other in (known() for known in self._blocks) if other is not None]
        at = open_blocks.index(block) if block in open_blocks else len(open_blocks)
        self._blocks = [known for known in self._blocks if known() is not block]
        if at + 1 < len(open_blocks):
            open_blocks[at + 1].before = block.before
        else:
            self._move({name: alpha for name, alpha in block.before.items() if name in self._added})

    def _strengths(self, which: str | Mapping[str, float], alpha: float | None) -> dict[str, float]:
        if isinstance(which, str):
            strengths = {which: self._known(which).alpha if alpha is None else alpha}
        else:
            if not isinstance(which, Mapping):
                raise TypeError(
                    f"give an adapter's name, or a mapping of names to strengths, got {type(which).__name__}"
                )
            if alpha is not None:
                raise ValueError("alpha is for a single adapter; give each of several its strength in the mapping")
            if not which:
                raise ValueError("name at least one adapter; deactivate() puts the base back")
            for name in which:
                self._known(name)
            # In the order they were added, whatever the mapping's: the sum is then always the same bits.
            strengths = {name: which[name] for name in self._added if name in which}
        return {name: _text.strength(f"the strength of {name!r}", value) for name, value in strengths.items()}

    def _way(self, before: Layout, after: Layout) -> Way:
        key = (before, after)
        if key not in self._ways:
            way = _layout.way(before, after)
            # It may have made more of a layout: indices in another granule, a second place for the base's entries.
            if self._excess() > 0:
                self._trim()  # others' first
                way = _layout.way(before, after)
                if self._excess() > 0:
                    self._trim()
                    way = _layout.way(before, after, frugal=True)
            self._ways[key] = way
            if len(self._ways) > _WAYS:
                self._ways.popitem(last=False)
        self._ways.move_to_end(key)
        return self._ways[key]

    def _move(self, strengths: dict[str, float], *, verify: bool = True) -> None:
        """Go from what is active to these strengths, or raise with nothing changed."""
        with _quiet():
            self._heal()
            before = self._on()
            if strengths == self._active:
                # Others may have written over it, as load_state_dict() does.
                if not before.watch.undisturbed(self._self):
                    self._disturbed(before.watch.weights, verify)
                return
            for name, alpha in strengths.items():
                self._added[name].allow(alpha, (self._added[other] for other in strengths if strengths[other]))
            _live.wait(self._written)
            try:
                if not (verify or strengths) and any(weight.moved() for weight in before.parts):
                    self._write_back(before)
                    return
                after = self._ready(tuple(strengths))
                way = self._way(before, after)
                changed = [] if way.watch.undisturbed(self._self) else self._disturbed(way.watch.weights, verify)
                _live.wait(after.ready)
            except (AdapterError, SwitchError):
                raise
            except Exception as error:
                raise self._failed(strengths, error) from error
            # From here on the weights change.
            try:
                way.go(strengths)
                self._settle(way, after, changed)
                self._active = strengths
            except BaseException as error:
                if self._active is not strengths:
                    self._take_back(way, changed)
                if isinstance(error, Exception):
                    raise self._failed(strengths, error) from error
                raise

    def _disturbed(self, weights: list[Weight], verify: bool = True) -> list[Weight]:
        """Refuse what happened to the weights; without `verify`, return those that someone else changed."""
        _live.refuse_first(weights, Weight.place)
        _live.refuse_first(weights, lambda weight: weight.held(self))
        if verify:
            self._recheck(weights)
        return [weight for weight in weights if weight.changed()]

    def _settle(self, way: Way, now: Layout, changed: Iterable[Weight] = ()) -> None:
        """Note which layout the weights of a way have on them now."""
        way.watch.left(self._self, now.parts)
        for weight in changed:
            weight.distrust()  # what another wrote stays his, until its content is right again
        self._written = _live.mark([*way.before.devices, *way.after.devices])
        for layout in (way.before, way.after):
            layout.used.update(self._written)

    def _take_back(self, way: Way, changed: Iterable[Weight]) -> None:
        """However much was written: put the base back, and on it what was active."""
        active, self._active, self._torn = self._active, {}, way
        try:
            self._base_back(way)
            _layout.way(EMPTY, way.before).go(active)
            self._settle(way, way.before, changed)
        except BaseException as error:
            for weight in way.watch.weights:
                weight.hold.holder = self._self
            raise SwitchError(
                f"Switcher: a switch failed, and so did the way back to {_listed(active) or 'the base'}: the weights "
                f"are in between; the next call that succeeds, such as deactivate(), puts the base back. Cause: {error}"
            ) from error
        self._torn, self._active = None, active

    def _base_back(self, way: Way) -> None:
        for layout in (way.after, way.before):
            _layout.way(layout, EMPTY).go({})

    def _refuse_torn(self) -> None:
        if self._torn is not None:
            raise SwitchError("Switcher: the last switch failed half way; deactivate() puts the base back")

    def _heal(self) -> None:
        """After a way back that failed: put the base back."""
        torn = self._torn
        if torn is not None:
            if any(weight.moved() for weight in torn.watch.weights):
                for layout in (torn.after, torn.before):
                    self._write_back(layout)
            else:
                self._base_back(torn)
                self._settle(torn, EMPTY)
            self._torn = None

    def _failed(self, wanted: Mapping[str, float], error: Exception) -> SwitchError:
        what = f"activating {_listed(wanted)}" if wanted else "deactivating"
        return SwitchError(f"Switcher: {what} failed and nothing has changed: {_told(self._active)}. Cause: {error}")


def fitted(
    model: nn.Module, adapter: str | os.PathLike[str] | Adapter, check_finite: bool, rename: _text.Rename
) -> tuple[Adapter, dict[str, _model.Slot]]:
    """An adapter, and where its weights are in the model: with every check of `Switcher.add`, for who needs no more."""
    switcher = Switcher(model)
    switcher.add("", adapter, check_finite=check_finite, rename=rename)
    added = switcher._added[""]
    places: dict[str, _model.Slot] = {}
    for weight, name in added.weights.items():
        if name in places:
            both = _fit.one_in_adapter(weight.name, places[name].name)
            raise AdapterError(f"{both} two in the model, which training would let drift apart; tie them first")
        if not isinstance(weight.slot.weight, nn.Parameter):
            raise AdapterError(f"{weight.name} is a buffer, not a parameter, so it cannot be trained")
        places[name] = weight.slot
    return added.read(), places


@contextmanager
def _quiet() -> Iterator[None]:
    """Weights that require grad may be changed, and what is made is no inference tensor, wherever we are called."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _listed(strengths: Mapping[str, float]) -> str:
    return ", ".join(f"{name!r} at {alpha:g}" for name, alpha in strengths.items())


def _told(active: Mapping[str, float]) -> str:
    return f"active is {_listed(active)}" if active else "no adapter is active"


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether all bits are the same."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _gone(
    process: int, weights: Mapping[object, Weight], switcher: weakref.ref[object], spilled: Iterable[Path]
) -> None:
    """What a Switcher leaves behind when it goes."""
    _live.abandon(weights, switcher)
    if os.getpid() == process:  # a fork's are its parent's
        for file in spilled:
            with suppress(OSError):
                file.unlink()
