"""`Switcher`: one model, many adapters, on and off in place, exactly."""

from __future__ import annotations

import os
import secrets
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import shira_ops
from shira import _file, _layout, _live, _model
from shira._layout import EMPTY, Alphas, Layout, Part, Way
from shira._live import LOCK, SwitchError, Weight
from shira.adapter import Adapter, AdapterError, Entry, dtype_name

__all__ = ["Memory", "SwitchError", "Switcher"]

# Of the last so many: unions of adapters, lists of calls, and differences of fingerprints for strengths.
_MIXES, _WAYS, _DIFFERENCES = 16, 64, 64


class Memory(NamedTuple):
    """Where an adapter is, in bytes."""

    device: int
    """On the weights' devices, ready to switch: indices, values, and the base's entries they replace."""
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
    weights: dict[str, Weight]
    adapter: Adapter | None
    file: Path | None = None
    stamp: tuple[int, int] | None = None
    spilled: bool = False

    def read(self) -> Adapter:
        """The adapter, from its file if it is not in memory."""
        if self.adapter is not None:
            return self.adapter
        assert self.file is not None
        if _stamp(self.file) != self.stamp:
            raise AdapterError(f"{self.file} has changed since {self.name!r} was added; remove it and add it again")
        return Adapter.load(self.file)


class Switcher:
    """What a server holds: one model in memory and many adapters, switched and mixed in place.

    - **Exact.** Whatever was done before, ``activate`` leaves the bits that a fresh activation on the base would, and
      ``deactivate`` the base's. Several adapters are summed onto the base in the order they were added (SHiRA,
      arXiv 2406.13175, section 4: ``W + alpha_1 S_1 + alpha_2 S_2``; see `shira_ops.fuse_`).
    - **Atomic.** Everything is decoded, checked and brought to the device first. An error before the weights change
      changes nothing; one in between is taken back. `SwitchError` says which adapters are active now.
    - **In place.** Storage never moves: compiled models, captured graphs and hooks stay as they are.
    - **Safe.** Refused are: a base the adapter was not made for (by fingerprint), weights that someone else changed (by
      their versions, and then by fingerprint; inference tensors have no version, see `verify`), weights that were moved
      or cast, that a `SparseTuner` trains, or that have adapters of another Switcher on them. Two Switchers may share a
      model if only one at a time has adapters on a weight.
    - From one adapter to another is one walk over the entries of both (`shira_ops.foreach_switch_`); new strengths
      for what is active are one pass too.
    - Calls may come from several threads, but the weights change while a call runs: not while the model computes on
      them. On GPUs the change is ordered by the caller's current streams; adapters come from pinned memory on side
      streams.

    Args:
        model: any module; compiled and spread over devices if you like. Its weights are changed, never replaced.
        budget: bytes that adapters may keep on the weights' devices (`memory`). When more is needed, those not used for
            longest leave, to their files or to host memory, and come back by themselves when activated.
        spill: a folder for adapters that leave and have no file. Without one they stay in host memory.
    """

    def __init__(
        self, model: nn.Module, *, budget: int | None = None, spill: str | os.PathLike[str] | None = None
    ) -> None:
        self.model = _model.unwrap(model)
        if budget is not None and budget < 0:
            raise ValueError(f"Switcher: budget must be a number of bytes or None, got {budget}")
        self.budget = budget
        self._spill = None if spill is None else Path(spill)
        self._slots = _model.slots(self.model)
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
        self._self: weakref.ref[object] = weakref.ref(self)

    @property
    def active(self) -> dict[str, float]:
        """The active adapters and their strengths; empty when the model is the base."""
        return dict(self._active)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The added adapters by name, in the order they were added; read again from their files where they left."""
        with LOCK:
            return {name: added.read() for name, added in self._added.items()}

    def add(self, name: str, adapter: str | os.PathLike[str] | Adapter, *, verify: bool = True) -> None:
        """Make an adapter ready under a name; refuses one that was made for another base. Only reads the weights.

        Args:
            name: what to call it.
            adapter: an `Adapter`, or the path of its file. The file must stay as it is while it is in use.
            verify: compare the base's content by fingerprint. The first adapter on a weight costs one read of it; the
                result is kept. Without it, only names, shapes and dtypes must fit.

        Raises `AdapterError` if it does not fit the model, and `SwitchError` if the weights are not to be trusted:
        changed by someone else, tuned, or another Switcher's. Nothing is added then.
        """
        file = stamp = None
        if isinstance(adapter, Adapter):
            where = f"adapter {name!r}"
        else:
            file = Path(adapter).absolute()
            where, stamp = os.fspath(adapter), _stamp(file)
            adapter = Adapter.load(file)
        for weight_name, entry in adapter.weights.items():
            entry.check_indices(f"{where}: weight {weight_name!r}")
        with LOCK, _quiet():
            if name in self._added:
                raise AdapterError(f"an adapter {name!r} was already added; remove it first")
            self._heal()
            _live.wait(self._written)
            places = self._places(where, adapter)
            devices = [slot.weight.device for slot in places.values()]
            with self._streams.staging(devices) as ready:
                taken = {weight_name: self._take(slot, verify) for weight_name, slot in places.items()}
                if verify:
                    self._verify_base(where, adapter, taken)
                nbytes = sum(entry.indices.nbytes + entry.values.nbytes for entry in adapter.weights.values())
                nbytes += sum(entry.nnz * entry.dtype.itemsize for entry in adapter.weights.values())
                if self.budget is not None and nbytes > self.budget:
                    raise AdapterError(f"{where} needs {nbytes:,} bytes, more than the budget of {self.budget:,}")
                added = _Added(name, adapter.alpha, nbytes, taken, adapter, file, stamp)
                layout = None
                if self._room(nbytes, keep=[self._names()]):
                    layout = _layout.of_adapter(name, adapter, taken, self._on())
            self._added[name] = added
            self._weights.update((_model.memory(weight.tensor), weight) for weight in taken.values())
            if layout is None:
                self._leave(added)
            else:
                layout.ready = ready
                self._layouts[name,] = layout

    def remove(self, name: str) -> None:
        """Forget an adapter. If it is active it is taken off first; others that are active with it stay."""
        with LOCK:
            added = self._known(name)
            if name in self._active:
                self._move({other: alpha for other, alpha in self._active.items() if other != name})
            self._drop(name)
            if added.spilled and added.file is not None:
                added.file.unlink(missing_ok=True)
            del self._added[name]
            used = {weight for other in self._added.values() for weight in other.weights.values()}
            self._weights = {key: weight for key, weight in self._weights.items() if weight in used}

    def activate(self, which: str | Mapping[str, float], alpha: float | None = None) -> None:
        """Put one adapter on, or several at once; what was active goes off.

        Args:
            which: a name, or names with their strengths, which are summed onto the base.
            alpha: the strength of a single adapter; its own unless given.
        """
        with LOCK:
            self._move(self._strengths(which, alpha))

    def deactivate(self, name: str | None = None, *, verify: bool = True) -> None:
        """Put the base back, bit for bit, or take one of several adapters off as if it had never been on.

        Args:
            name: an active adapter; all of them unless given.
            verify: refuse if someone else changed the weights meanwhile. Without it, the base's entries are written
                back whatever stands there now; what was changed elsewhere stays changed.
        """
        with LOCK:
            if name is None:
                self._move({}, verify=verify)
                return
            self._known(name)
            if name not in self._active:
                raise AdapterError(f"adapter {name!r} is not active; active are: {_model.some(self._active)}")
            self._move({other: alpha for other, alpha in self._active.items() if other != name}, verify=verify)

    @contextmanager
    def using(self, which: str | Mapping[str, float], alpha: float | None = None) -> Iterator[Switcher]:
        """Activate within a ``with`` block; afterwards what was active before is active again."""
        with LOCK:
            before = dict(self._active)
            self.activate(which, alpha)
        try:
            yield self
        finally:
            with LOCK:
                self._move({name: alpha for name, alpha in before.items() if name in self._added})

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
            if self._torn is not None:
                raise SwitchError("Switcher: the last switch failed half way; deactivate() puts the base back")
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
                what = "the base plus what is active" if self._active else "the base"
                raise SwitchError(f"Switcher: {len(wrong)} weight(s) do not hold {what}: {_model.some(wrong)}")
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

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy would share what is known of the first one's weights, and write into them.
        raise TypeError("Switcher: a switcher cannot be copied or pickled; make another one for a copy of the base")

    def __repr__(self) -> str:
        return f"Switcher(adapters={list(self._added)}, active={self._active})"

    # ---- adding ----------------------------------------------------------------------------------------------

    def _places(self, where: str, adapter: Adapter) -> dict[str, _model.Slot]:
        """Find each of the adapter's weights in the model; all that does not fit is said in one error."""
        self._slots = slots = _model.slots(self.model)  # parameters may have been replaced since
        problems: list[str] = []
        places: dict[str, _model.Slot] = {}
        owner: dict[object, str] = {}
        for name, entry in adapter.weights.items():
            known = [known for known in (name, *entry.aliases) if known in slots]
            if not known:
                problems.append(f"weight {name!r} is not in the model")
                continue
            slot = slots[known[0]]
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

    def _take(self, slot: _model.Slot, verify: bool) -> Weight:
        """The weight in this place, as we know it to be."""
        weight = self._weights.get(_model.memory(slot.weight))
        if weight is None:
            weight = Weight.of(slot, self, verify)
        _live.refuse_first([weight], Weight.place)
        _live.refuse_first([weight], lambda one: one.held(self))
        self._recheck([weight])
        if verify and weight.ledger.base is None:
            self._learn(weight)
        return weight

    def _verify_base(self, where: str, adapter: Adapter, weights: Mapping[str, Weight]) -> None:
        """Compare the content of the base with that the adapter was made for."""
        wanted = {name: entry.fingerprint for name, entry in adapter.weights.items() if entry.fingerprint is not None}
        wrong = [name for name, fingerprint in wanted.items() if weights[name].ledger.base != fingerprint]
        if wrong:
            raise AdapterError(
                f"{where} was made for another base: the content of {len(wrong)} of {len(wanted)} weights differs "
                f"(by fingerprint): {_model.some(wrong)}"
            )

    # ---- what is known of the weights ------------------------------------------------------------------------

    def _names(self) -> tuple[str, ...]:
        return tuple(self._active)

    def _on(self) -> Layout:
        """The active layout."""
        return self._layouts[self._names()] if self._active else EMPTY

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
        entries = shira_ops.gather(part.weight.tensor.detach(), part.indices, granule=part.granule)
        return torch.equal(entries.view(torch.uint8), expected.view(torch.uint8))

    def _recheck(self, weights: Iterable[Weight]) -> None:
        """Refuse weights that someone else changed. Where a version moved, the content decides."""
        for weight in weights:
            if weight.changed():
                if weight.ledger.base is None or not self._right(weight):
                    raise self._foreign(weight)
                weight.note()

    def _foreign(self, weight: Weight) -> SwitchError:
        return SwitchError(
            f"Switcher: {weight.name} was changed by someone else since the Switcher last wrote or read it; "
            f"{_told(self._active)}. deactivate(verify=False) puts the base's entries back all the same"
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
            weights = list(added.weights.values())
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

    def _room(self, nbytes: int, keep: Iterable[tuple[str, ...]]) -> bool:
        """Whether there is room for so many bytes more; makes it of what was not used for longest."""
        if self.budget is None:
            return True
        kept = {*keep, *((name,) for names in keep for name in names)}
        sizes = {names: layout.nbytes for names, layout in self._layouts.items()}
        excess = sum(sizes.values()) + nbytes - self.budget
        if excess > sum(size for names, size in sizes.items() if names not in kept):
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

    def _make_room(self, nbytes: int, keep: Iterable[tuple[str, ...]], names: tuple[str, ...]) -> None:
        if not self._room(nbytes, keep):
            raise SwitchError(
                f"Switcher: {' + '.join(names)} would need {nbytes:,} bytes on the device beside what is active, and "
                f"the budget is {self.budget:,}; {_told(self._active)}"
            )

    def _leave(self, added: _Added) -> None:
        """Take an adapter off the device: to its file, or to a file in `spill`, or to host memory."""
        if added.file is None and self._spill is not None:
            self._spill.mkdir(parents=True, exist_ok=True)
            file = self._spill / f"{secrets.token_hex(8)}.safetensors"
            added.read().save(file)
            added.file, added.stamp, added.spilled = file.absolute(), _stamp(file), True
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
        return {name: _file.strength(f"the strength of {name!r}", value) for name, value in strengths.items()}

    def _way(self, before: Layout, after: Layout) -> Way:
        key = (before, after)
        if key not in self._ways:
            self._ways[key] = _layout.way(before, after)
            if len(self._ways) > _WAYS:
                self._ways.popitem(last=False)
        self._ways.move_to_end(key)
        return self._ways[key]

    def _move(self, strengths: dict[str, float], *, verify: bool = True) -> None:
        """Go from what is active to these strengths, or raise with nothing changed."""
        with _quiet():
            self._heal()
            if strengths == self._active:
                return
            before = self._on()
            _live.wait(self._written)
            try:
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
            weight.ledger.version = -1  # no version: what another wrote stays his, until its content is right again
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
            raise SwitchError(
                f"Switcher: a switch failed, and so did the way back to {_listed(active) or 'the base'}: the weights "
                f"are in between; the next call that succeeds, such as deactivate(), puts the base back. Cause: {error}"
            ) from error
        self._torn, self._active = None, active

    def _base_back(self, way: Way) -> None:
        for layout in (way.after, way.before):
            _layout.way(layout, EMPTY).go({})

    def _heal(self) -> None:
        """After a way back that failed: put the base back."""
        if self._torn is not None:
            self._base_back(self._torn)
            self._settle(self._torn, EMPTY)
            self._torn = None

    def _failed(self, wanted: Mapping[str, float], error: Exception) -> SwitchError:
        what = f"activating {_listed(wanted)}" if wanted else "deactivating"
        return SwitchError(f"Switcher: {what} failed and nothing has changed: {_told(self._active)}. Cause: {error}")


def fitted(model: nn.Module, adapter: str | os.PathLike[str] | Adapter) -> tuple[Adapter, dict[str, _model.Slot]]:
    """An adapter, and where its weights are in the model: with every check of `Switcher.add`, for who needs no more."""
    switcher = Switcher(model)
    switcher.add("given", adapter)
    added = switcher._added["given"]
    return added.read(), {name: weight.slot for name, weight in added.weights.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Weights that require grad may be changed, and what is made is no inference tensor, wherever we are called."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _listed(strengths: Mapping[str, float]) -> str:
    return ", ".join(f"{name!r} at {alpha:g}" for name, alpha in strengths.items())


def _told(active: Mapping[str, float]) -> str:
    return f"active is {_listed(active)}" if active else "no adapter is active"


def _stamp(file: Path) -> tuple[int, int]:
    """What tells that a file was written again."""
    found = file.stat()
    return found.st_mtime_ns, found.st_size


def _misfit(slot: _model.Slot, entry: Entry) -> str | None:
    """Why an entry cannot go onto a weight, or None."""
    weight: torch.Tensor = slot.weight
    if tuple(weight.shape) != entry.shape:
        return f"must have shape {list(entry.shape)}, got {list(weight.shape)}"
    if weight.dtype != entry.dtype:
        return f"must have dtype {dtype_name(entry.dtype)}, got {dtype_name(weight.dtype)}"
    if weight.is_meta:
        return "is on the meta device"
    foreign = _model.foreign(weight)
    if foreign is not None:
        return foreign
    if not weight.is_contiguous():
        return f"must be contiguous; {_model.stride_advice(slot.name, weight)}"
    return None
