"""`Switcher`: many adapters for one model, put on and taken off in place, exactly.

Its work is in three rooms: the adapters stand on the shelf (`_shelf`), what is known about the model's weights is in
the ledger (`_ledger`), and here are the public calls and the moves from one state of the weights to another
(`Switcher._move`).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shira import _granules, _linears, _live, _model, _places, _shards, _text
from shira._live import LOCK, SwitchError, Weight
from shira._text import AdapterError
from shira.adapter.adapter import Adapter
from shira.serve import _agreement, _generators, _layout, _shelf
from shira.serve._agreement import Caller, Step
from shira.serve._layout import BASE, EMPTY, State, Way, listed
from shira.serve._ledger import Ledger, quiet
from shira.serve._shelf import Added, Memory, Shelf
from shira.serve._streams import mark, wait

__all__ = ["Memory", "SwitchError", "Switcher"]


@dataclass(eq=False)
class _Block:
    """A ``with`` block of `Switcher.using`, what was active before it (None until it is entered), and the generator
    that opened it, if one did."""

    before: dict[str, float] | None = None
    generator: int | None = None


# What is around a call on a model that is not sharded.
_ALONE: AbstractContextManager[None] = nullcontext()

# The blocks around the code that runs now; every thread and task has its own. A block lives as long as its frame.
_INSIDE: ContextVar[tuple[weakref.ref[_Block], ...]] = ContextVar("shira.using", default=())


class Switcher:
    """One model in memory and many adapters for it, switched and mixed in place.

    - **Exact.** Whatever was done before, ``activate`` leaves the same bits as activating on a freshly loaded base, and
      ``deactivate`` leaves the base's bits. Several adapters are summed onto the base in the order in which they were
      added (SHiRA, arXiv 2406.13175, section 4: ``W + alpha_1 S_1 + alpha_2 S_2``; see `shira_ops.fuse_`).
    - **Atomic.** Adapters are decoded, checked and brought to the device before a weight changes. An error up to then
      changes nothing, and an error during the change is undone. `SwitchError` says which adapters are active now.
    - **In place.** Storage never moves: compiled models, captured graphs and hooks stay as they are.
    - **Safe.** It refuses a base that the adapter was not made for (by fingerprint), weights that someone else changed,
      weights that were moved or cast (`rebind`), that overlap in memory, that a `SparseTuner` trains, or that have
      adapters of another Switcher on them. Two Switchers may share a model, and two models their memory, if only one
      Switcher at a time has adapters on a weight.
    - **What it notices.** Every call looks at the version counters of the weights it is about, which all in-place
      operations of torch increase, and reads the content where a counter has moved. It cannot see writes that move no
      counter: to ``weight.data``, to a numpy view, through another parameter over the same memory, by another process,
      to inference tensors. `verify` finds those among the entries of what is active, ``verify(full=True)`` everywhere.
    - **Sharded models** (DTensors of ``fully_shard``, tensor parallelism or by hand): each rank keeps and writes the
      entries of its own part of the weights. All ranks must make the same calls together, from making the Switcher on;
      `memory` and `budget` alone are a rank's own. A call succeeds on all ranks or on none: where it fails on one, or
      the ranks differ in what they ask for, all take it back and raise the same error, which names the rank. It takes
      one small collective a switch. If a rank dies, the others raise `SwitchError` within the process group's time-out
      and hold what was active before. What FSDP has gathered is dropped before a switch.
    - Going from one adapter to another is one walk over the entries of both (`shira_ops.foreach_switch_`); so is a new
      strength for what is active.
    - Calls may come from several threads. But the weights change while a call runs, so it must not run while the model
      computes, nor between a forward pass and its backward pass (torch refuses that backward pass). On GPUs the change
      is ordered by the caller's current streams; adapters come from pinned memory on side streams.

    Args:
        model: any module; it may be compiled, and spread over devices. Its weights are changed, never replaced.
        budget: bytes that adapters may keep on the weights' devices (`memory`). When more is needed, the least
            recently used adapters leave, to their files or to host memory; they come back when they are activated.
        spill: a folder for adapters that leave and have no file. Without one they stay in host memory. The files are
            deleted with the Switcher; those of a process that was killed when the next Switcher uses the folder.
    """

    def __init__(
        self, model: nn.Module, *, budget: int | None = None, spill: str | os.PathLike[str] | None = None
    ) -> None:
        self.model = _model.unwrap(model)
        me: weakref.ref[object] = weakref.ref(self)
        self._ledger, self._caller = Ledger(me), Caller("Switcher")
        self._find()
        self._shelf = Shelf(self._ledger, None if spill is None else Path(spill))
        self.budget = budget
        # The way on which a move stopped, if going back failed too: the weights are in between.
        self._torn: Way | None = None
        # The open blocks of `using`, the innermost last.
        self._blocks: list[weakref.ref[_Block]] = []
        _live.switchers.add(self)
        weakref.finalize(self, _gone, os.getpid(), self._ledger.weights, me, self._shelf.files)

    @property
    def budget(self) -> int | None:
        """The bytes that adapters may keep on the weights' devices, or None. A change counts from the next call."""
        return self._shelf.budget

    @budget.setter
    def budget(self, budget: int | None) -> None:
        if budget is not None and budget < 0:
            raise ValueError(f"Switcher: budget must be a number of bytes or None, got {budget}")
        self._shelf.budget = budget

    @property
    def active(self) -> dict[str, float]:
        """The active adapters and their strengths; empty when the model is the base."""
        return dict(self._ledger.state.strengths)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The added adapters by name, in the order in which they were added; those that left are read again.

        On a sharded model those that have a file; `SwitchError` where one was given as an `Adapter`.
        """
        with LOCK:
            return {name: added.whole() for name, added in self._shelf.added.items()}

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
        as a whole may have any content before, since at strength 1 the result does not depend on it.

        Args:
            name: what to call it.
            adapter: an `Adapter`, whose tensors must not change while it is in use, or the path of its file. The file
                is read now, and again if the adapter had to leave for lack of room; then it must still be the same.
            verify: compare the base's content by fingerprint. The first adapter for a weight costs one read of that
                weight; the result is kept. Without it, only names, shapes and dtypes must fit.
            check_finite: refuse values with NaN or infinity among them.
            rename: what the model calls the adapter's weights: regular expressions and their replacements, such as
                ``{"^": "model."}``, or a function from name to name.

        Raises `AdapterError` if it does not fit the model, and `SwitchError` if the weights cannot be trusted: someone
        else changed them, a tuner trains them, or another Switcher has adapters on them. Nothing is added then.

        On a sharded model the adapter is global, every rank must give the same one, and each keeps its own part.
        """
        with self._together("add", name, verify=verify) as step:
            given = _shelf.given(name, adapter, check_finite=check_finite, own=step is None)
            with LOCK, quiet():
                self._add(name, given, verify, rename, step)

    def _add(self, name: str, given: _shelf.Given, verify: bool, rename: _text.Rename, step: Step | None) -> None:
        ledger, shelf, where, adapter = self._ledger, self._shelf, given.where, given.adapter
        if name in shelf.added:
            raise AdapterError(f"an adapter {name!r} was already added; remove it first")
        self._heal()
        ledger.wait()
        # Parameters may have been replaced since.
        self._find()
        places = _places.places(where, adapter.weights, self._slots, rename)
        devices = [group[0].weight.device for groups in places.values() for group in groups]
        with shelf.streams.staging(devices) as ready:
            weights = ledger.take(places, verify=verify)
            tied = [found for name in places if len(found := [w for w in weights if weights[w] == name]) > 1]
            about = "" if step is None else _shelf.content(adapter, (weight.name for weight in weights))
            ledger.know(list(weights) if verify else [weight for found in tied for weight in found], about, step)
            for found in tied:
                ledger.refuse_different(where, found)
            elsewhere = ledger.compare_base(where, adapter, weights) if verify else ()
            added = Added.of(given, name, weights, elsewhere)
            layout = shelf.place(where, added)
        if layout is not None:
            layout.ready = ready
        shelf.put(added, layout)

    def remove(self, name: str) -> None:
        """Forget an adapter. If it is active it is taken off first; others that are active with it stay."""
        with LOCK:
            with self._together("remove", name):
                self._shelf.known(name)
                if name in self.active:
                    self._refuse_outsiders()
                    self._move(self._without(name))
            self._shelf.remove(name)

    def activate(self, which: str | Mapping[str, float], alpha: float | None = None) -> None:
        """Put one adapter on, or several at once, in place of what was active.

        Args:
            which: a name; or names with their strengths, for adapters that are summed onto the base.
            alpha: the strength of a single adapter; None is the adapter's own.
        """
        with LOCK, self._together("activate", which, alpha=alpha):
            self._refuse_outsiders()
            self._move(self._strengths(which, alpha))

    def deactivate(self, name: str | None = None, *, verify: bool = True) -> None:
        """Put the base back, bit for bit, or take one of several adapters off as if it had never been on.

        Args:
            name: an active adapter; all of them unless given.
            verify: refuse if someone else has changed the weights. Without it, the base's entries are written back
                whatever is there now, and wherever the weights are now; what was changed at other entries stays
                changed. Weights that were moved can be used again after `rebind`.
        """
        with LOCK, self._together("deactivate", name=name, verify=verify):
            self._refuse_outsiders()
            if name is None:
                self._move({}, verify=verify)
                return
            self._shelf.known(name)
            if name not in self.active:
                raise AdapterError(f"adapter {name!r} is not active; active are: {_model.some(self.active)}")
            self._move(self._without(name), verify=verify)

    @contextmanager
    def using(self, which: str | Mapping[str, float], alpha: float | None = None) -> Iterator[Switcher]:
        """Activate within a ``with`` block; afterwards what was active before is active again.

        An empty mapping is the base, as in `disabled`. Blocks nest. While one is open, other threads and tasks cannot
        change what is active (`SwitchError`).
        """
        block = _Block(generator=_generators.innermost())
        entered = weakref.ref(block)
        try:
            with LOCK:
                before = self.active
                with self._together("using", which, alpha=alpha):
                    self._refuse_outsiders()
                    base = isinstance(which, Mapping) and not which and alpha is None
                    self._move({} if base else self._strengths(which, alpha))
                block.before = before
                self._blocks.append(entered)
            _INSIDE.set((*_INSIDE.get(), entered))
            yield self
        finally:
            _INSIDE.set(tuple(other for other in _INSIDE.get() if other is not entered))
            with LOCK:
                self._end(block)

    def disabled(self) -> AbstractContextManager[Switcher]:
        """The base within a ``with`` block, for the outputs of a reference, say; afterwards what was active is active
        again.

        The weights are written to, so torch refuses to run backward through a graph that was recorded before the block:
        compute the reference first, and then the forward pass that is trained.
        """
        return self.using({})

    def rebind(self) -> None:
        """Go on with the memory that the weights have now, where they were moved or replaced since they were found.

        For use after ``model.share_memory()``, ``.to(device)`` or ``weight.data = ...``. The content must still be the
        base plus what is active; all of it is read. Raises `SwitchError`, naming the weights, if it is not, if
        shapes or dtypes differ, or if their modules are not in the model any more; nothing has changed then.
        """
        with LOCK, quiet():
            with self._together("rebind"):
                self._refuse_torn()
                self._ledger.wait()
                self._find()
                self._ledger.refuse_gone(self.model)
                moved = self._ledger.moved()
            if moved:
                self._ledger.rebind(moved)
                self._shelf.rebind()

    def fingerprint(self, name: str) -> int:
        """The fingerprint that the weight should have now, as an unsigned number (`shira_ops.fingerprint`).

        This does not read the weight (`verify` does): it is the base's fingerprint plus the difference that the active
        adapters make. The difference is computed on a copy when it is first needed, and kept for each strength. Of a
        sharded weight each rank computes its share, every time, and they are added up: that of the whole weight.
        """
        with LOCK, self._together("fingerprint", name) as step:
            if name not in self._slots:
                raise KeyError(f"the model has no weight {name!r}")
            slot = self._slots[name]
            foreign = _places.Place(slot).foreign
            if foreign is not None:
                raise SwitchError(f"Switcher: {name} {foreign}")
            weight = self._ledger.weight(slot.weight)
            with quiet():
                if step is not None and _shards.is_dtensor(slot.weight):
                    return self._ledger.whole_fingerprint(slot, weight, step)
                return _granules.fingerprint(slot.weight) if weight is None else self._ledger.fingerprint(weight)

    def verify(self, *, full: bool = False) -> None:
        """Raise `SwitchError`, naming the weights, unless they are the base plus what is active.

        Args:
            full: hash all of the weights that adapters were added for, which finds every change. Otherwise only entries
                are compared: those of the active adapters, or, if none is active, those of every adapter on the device.
                On the CPU, a weight with an adapter that was never active is read whole, since the base's entries there
                have not been saved yet.
        """
        with LOCK, quiet(), self._together("verify", full=full):
            self._refuse_torn()
            self._ledger.refuse_gone(self.model)
            active = self._ledger.state.layout
            self._ledger.verify([active] if active.names else list(self._shelf.layouts.values()), full=full)

    def memory(self) -> dict[str, Memory]:
        """The bytes that each adapter keeps, by name; under ``"a + b"`` those for adapters that are used together.

        On a sharded model, those of this rank.
        """
        with LOCK:
            return self._shelf.memory()

    def knows(self, tensors: Iterable[Tensor]) -> bool:
        """Whether adapters were added that change any of these weights."""
        with LOCK:
            return not self._ledger.weights.keys().isdisjoint(map(_model.memory, tensors))

    def base_fingerprint(self, tensor: Tensor) -> int:
        """The base's fingerprint of a weight that has adapters of this Switcher, as an unsigned number.

        Raises `SwitchError` if someone else has changed the weight.
        """
        with LOCK, quiet():
            return self._ledger.base_fingerprint(self._known_weight(tensor))

    def base_entries(self, tensor: Tensor, indices: Tensor, granule: int) -> Tensor:
        """The base's entries of a weight that has adapters of this Switcher, in the weight's dtype; otherwise as
        `base_fingerprint`."""
        with LOCK, quiet():
            weight = self._known_weight(tensor)
            return _layout.base_entries(weight, indices, granule, self._ledger.state.part(weight))

    def _known_weight(self, tensor: Tensor) -> Weight:
        self._refuse_torn()
        weight = self._ledger.weight(tensor)
        assert weight is not None
        self._ledger.wait()
        self._ledger.examine([weight])
        return weight

    def rebase(self, bases: Mapping[Tensor, int]) -> None:
        """Take what these weights hold now as the base, after a `shira.sync.Receiver` has written an update into them.

        The adapters stay as they are: an overwriting one replaces the same entries, a delta is added to the new
        entries, and taking either off gives the new base.

        Args:
            bases: the weights, as the model holds them, and the fingerprint of what each holds now (it is not checked).

        Raises `SwitchError` where an adapter is active, with nothing changed.
        """
        with LOCK, quiet():
            self._heal()
            if self.active:
                raise SwitchError(f"Switcher: deactivate() before the base is changed; {self._ledger.state.told()}")
            self._ledger.wait()
            fresh = {_model.memory(tensor): fingerprint for tensor, fingerprint in bases.items()}
            self._ledger.rebase(fresh)
            self._shelf.rebase(fresh)
            self._ledger.written = mark(tensor.device for tensor in bases)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy would write into the weights of the first one.
        raise TypeError("Switcher: a switcher cannot be copied or pickled; make another one for a copy of the base")

    def __repr__(self) -> str:
        return f"Switcher(adapters={list(self._shelf.added)}, active={self.active})"

    # ---- sharded models --------------------------------------------------------------------------------------

    def _find(self) -> None:
        """Find the model's weights, and the ranks that hold them, if it is sharded."""
        self._fsdp = _shards.fsdp_modules(self.model)
        _shards.reshard(self._fsdp)
        self._slots = _linears.slots(self.model)
        self._ranks = self._caller.ranks(_agreement.meshes_of(slot.weight for slot in self._slots.values()))
        self._ledger.gathered = _shards.gathered(self._fsdp)

    def _together(self, call: str, *arguments: object, **options: object) -> AbstractContextManager[Step | None]:
        """A call that all ranks of a sharded model make together, or none; nothing for any other model."""
        if self._ranks is None:
            return _ALONE
        before, added = self._ledger.state, set(self._shelf.added)

        def undo() -> None:
            with quiet():
                lasting = any(weight.moved() for weight in before.layout.parts)  # deactivate(verify=False)
                if self.active != before.strengths and not lasting:
                    self._move(before.strengths, verify=False)
                for name in self._shelf.added.keys() - added:
                    self._shelf.remove(name)

        def reshard() -> None:
            # What FSDP has gathered would be computed with after the switch, and modules must hold their shards.
            _shards.reshard(self._fsdp)

        named = _agreement.call(call, arguments, options)
        return self._ranks.together(self._caller, named, reshard, lambda: self._ledger.state.told(), undo)

    # ---- who may switch, and to what -------------------------------------------------------------------------

    def _refuse_outsiders(self) -> None:
        """While a block of `using` is open, only what runs inside it may change what is active."""
        self._blocks = [block for block in self._blocks if block() is not None]
        last = self._blocks[-1]() if self._blocks else None
        if last is None:
            return
        # A generator that waits at a yield would go on with what another one has switched to.
        waits = last.generator is not None and not _generators.is_running(last.generator)
        if self._blocks[-1] not in _INSIDE.get() or (waits and _generators.innermost() is not None):
            raise SwitchError(
                f"Switcher: a using() or disabled() block of another thread, task or generator is open, and would lose "
                f"its adapters; switch when it has ended; {self._ledger.state.told()}"
            )

    def _end(self, block: _Block) -> None:
        """Put back what was active before a block; if one that began inside it is still open, that one will do so."""
        if block.before is None:
            return
        open_blocks = [other for other in (known() for known in self._blocks) if other is not None]
        at = open_blocks.index(block) if block in open_blocks else len(open_blocks)
        self._blocks = [known for known in self._blocks if known() is not block]
        if at + 1 < len(open_blocks):
            open_blocks[at + 1].before = block.before
        else:
            with self._together("leaving using"):
                self._move({name: alpha for name, alpha in block.before.items() if name in self._shelf.added})

    def _without(self, name: str) -> dict[str, float]:
        """What is active, without one of the adapters."""
        return {other: alpha for other, alpha in self.active.items() if other != name}

    def _strengths(self, which: str | Mapping[str, float], alpha: float | None) -> dict[str, float]:
        strengths = _shelf.strengths(self._shelf.added, which, alpha)
        if not strengths:
            raise ValueError("name at least one adapter; deactivate() puts the base back")
        return strengths

    # ---- moves -----------------------------------------------------------------------------------------------

    def _move(self, strengths: dict[str, float], *, verify: bool = True) -> None:
        """Go from what is active to these strengths, or raise with nothing changed."""
        with quiet():
            self._heal()
            ledger = self._ledger
            now = ledger.state.layout
            if strengths == ledger.state.strengths:
                # Others may have written over it, as load_state_dict() does.
                ledger.look(now.watch, verify)
            elif not strengths and not verify and any(weight.moved() for weight in now.parts):
                ledger.wait()
                ledger.write_back(now)
            else:
                way, changed = self._prepare(strengths, verify)
                self._go(way, State(way.after, strengths), changed)

    def _prepare(self, strengths: dict[str, float], verify: bool) -> tuple[Way, list[Weight]]:
        """All that can be refused or can fail before the weights change: the way to these strengths.

        Without `verify`, also the weights on it that someone else has changed.
        """
        _shelf.allow(self._shelf.added, strengths)
        self._ledger.wait()
        try:
            way = self._shelf.way(tuple(strengths))
            changed = self._ledger.look(way.watch, verify)
            wait(way.after.ready)
        except (AdapterError, SwitchError):
            raise
        except Exception as error:
            raise self._failed(strengths, error) from error
        return way, changed

    def _go(self, way: Way, wanted: State, changed: list[Weight]) -> None:
        """Change the weights. If that fails, they are what they were before."""
        try:
            way.go(wanted.strengths)
            self._ledger.settle(way, wanted, changed)
        except BaseException as error:
            if self._ledger.state is not wanted:
                self._take_back(way, changed)
            if isinstance(error, Exception):
                raise self._failed(wanted.strengths, error) from error
            raise

    def _take_back(self, way: Way, changed: list[Weight]) -> None:
        """However much of a way was written: put the base back, and on it what was active."""
        before, self._ledger.state, self._torn = self._ledger.state, BASE, way
        try:
            self._base_back(way)
            _layout.way(EMPTY, before.layout).go(before.strengths)
            self._ledger.settle(way, before, changed)
        except BaseException as error:
            self._ledger.state = BASE
            for weight in way.watch.weights:
                weight.hold.holder = self._ledger.me
            raise SwitchError(
                f"Switcher: a switch failed, and so did the way back to {listed(before.strengths) or 'the base'}: the "
                f"weights are in between; the next call that succeeds, such as deactivate(), puts the base back. "
                f"Cause: {error}"
            ) from error
        self._torn = None

    @staticmethod
    def _base_back(way: Way) -> None:
        for layout in (way.after, way.before):
            _layout.way(layout, EMPTY).go({})

    def _refuse_torn(self) -> None:
        if self._torn is not None:
            raise SwitchError("Switcher: the last switch failed half way; deactivate() puts the base back")

    def _heal(self) -> None:
        """Put the base back if a move has failed and so has the way back."""
        torn = self._torn
        if torn is not None:
            if any(weight.moved() for weight in torn.watch.weights):
                for layout in (torn.after, torn.before):
                    self._ledger.write_back(layout)
            else:
                self._base_back(torn)
                self._ledger.settle(torn, BASE)
            self._torn = None

    def _failed(self, wanted: Mapping[str, float], error: Exception) -> SwitchError:
        what = f"activating {listed(wanted)}" if wanted else "deactivating"
        told = self._ledger.state.told()
        return SwitchError(f"Switcher: {what} failed and nothing has changed: {told}. Cause: {error}")


def _gone(
    process: int, weights: Mapping[object, Weight], switcher: weakref.ref[object], spilled: Iterable[Path]
) -> None:
    """Called when a Switcher is gone: remember where its adapters are, and delete its files."""
    _live.abandon(weights, switcher)
    if os.getpid() == process:  # in a fork they belong to its parent
        for file in spilled:
            with suppress(OSError):
                file.unlink()
