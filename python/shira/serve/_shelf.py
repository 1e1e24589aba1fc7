"""The shelf of a `Switcher`: its adapters by name, and where each one is: on the devices, in host memory, in a file.

What an `Overlay` needs of it stands here too: adapters as they are given, and their files.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from shira import _granules, _model, _text
from shira._granules import dtype_name
from shira._live import SwitchError, Weight
from shira._text import AdapterError
from shira.adapter import _file
from shira.adapter._entry import Entry
from shira.adapter.adapter import Adapter
from shira.serve import _layout
from shira.serve._layout import EMPTY, Layout, Way
from shira.serve._ledger import Ledger
from shira.serve._streams import Streams, wait

# How many layouts of several adapters, and how many ways between layouts, are kept at most.
_MOST_UNIONS, _MOST_WAYS = 16, 64

Names = tuple[str, ...]
"""The names of the adapters of a layout, in the order in which they were added."""


_S = TypeVar("_S", bound="Stored")


class Memory(NamedTuple):
    """Where an adapter is, in bytes."""

    device: int
    """On the weights' devices, ready to switch: indices, values, the base's entries they replace, what saves time."""
    host: int
    """In the host's memory besides: the adapter itself, where the device does not use its tensors."""
    disk: int
    """In its file."""


@dataclass(eq=False, kw_only=True)
class Stored:
    """An adapter that was added under a name: in memory, or only in its file."""

    name: str
    alpha: float
    # None where it is only in its file.
    adapter: Adapter | None
    file: Path | None = None
    stamp: Stamp | None = None
    # Names of the weights that it replaces as a whole, and was made for where they had other content.
    elsewhere: tuple[str, ...] = ()

    @property
    def weight_names(self) -> list[str]:
        """What the model calls the weights that it changes."""
        raise NotImplementedError

    def read(self, *, own: bool = True) -> Adapter:
        """The adapter; from its file, if it is not in memory. Then its values are in memory of their own, or without
        `own` in the mapped file."""
        if self.adapter is not None:
            return self.adapter
        assert self.file is not None
        try:
            same = stamp_of(self.file) == self.stamp
        except OSError as error:
            raise AdapterError(f"{self.file}, the file of {self.name!r}, is gone: {error}") from error
        if not same:
            raise AdapterError(f"{self.file} has changed since {self.name!r} was added; remove it and add it again")
        return load(self.file, self.stamp, own=own)

    def allow(self, alpha: float, others: Iterable[Stored]) -> None:
        """Refuse a strength, or other adapters beside it, with which the result is not what it was made for."""
        if self.elsewhere and alpha not in (0, 1):
            raise AdapterError(
                f"{self.name!r} replaces {_model.some(self.elsewhere)} as a whole, and was made where the content "
                f"there was another (by fingerprint); only at strength 1 is the result the same for both, got {alpha:g}"
            )
        for other in others if self.elsewhere and alpha else ():
            common = [name for name in other.weight_names if name in self.elsewhere]
            if other is not self and common:
                raise AdapterError(
                    f"{self.name!r} replaces {_model.some(common)} as a whole, and was made where the content there "
                    f"was another (by fingerprint), so it cannot be summed with {other.name!r}, which changes it too"
                )

    @property
    def on_disk(self) -> int:
        """The bytes of its file, if it has one."""
        return self.file.stat().st_size if self.file is not None and self.file.exists() else 0


def allow(added: Mapping[str, Stored], strengths: Mapping[str, float]) -> None:
    """Refuse strengths with which the result is not what the adapters were made for; see `Stored.allow`."""
    beside = [added[name] for name, alpha in strengths.items() if alpha]
    for name, alpha in strengths.items():
        added[name].allow(alpha, beside)


def known(added: Mapping[str, _S], name: str) -> _S:
    """The adapter of this name; refuses a name that was not added."""
    if name not in added:
        raise AdapterError(f"no adapter {name!r} was added; there are: {_model.some(added)}")
    return added[name]


def strengths(
    added: Mapping[str, Stored], which: str | Mapping[str, float], alpha: float | None = None
) -> dict[str, float]:
    """A name, or names with their strengths, as a user gives them: in the order in which the adapters were added.

    That order, not the mapping's, is the order of sums, so a sum always has the same bits.
    """
    if isinstance(which, str):
        given = {which: known(added, which).alpha if alpha is None else alpha}
    else:
        if not isinstance(which, Mapping):
            raise TypeError(f"give an adapter's name, or a mapping of names to strengths, got {type(which).__name__}")
        if alpha is not None:
            raise ValueError("alpha is for a single adapter; give each of several its strength in the mapping")
        for name in which:
            known(added, name)
        given = {name: which[name] for name in added if name in which}
    return {name: _text.strength(f"the strength of {name!r}", value) for name, value in given.items()}


@dataclass(eq=False, kw_only=True)
class Added(Stored):
    """An adapter for the weights of a `Switcher`, wherever it is now."""

    # What its layout needs on the devices.
    nbytes: int
    # The weights, and what the adapter calls each; a weight that is tied in the adapter may be several here.
    weights: dict[Weight, str]
    # Whether its values are added.
    delta: bool
    # On a sharded model, this rank's entries, where they are in memory: all that is kept of the adapter.
    parts: dict[Weight, Entry] | None = None
    # Whether the file is one that we wrote to make room. On a sharded model it has this rank's entries alone, under the
    # model's names.
    spilled: bool = False
    # A weight whose entries are codes or counts, which have no strength other than 1.
    codes: Weight | None = None

    @classmethod
    def of(cls, stored: Given, name: str, weights: dict[Weight, str], elsewhere: tuple[str, ...]) -> Added:
        """An adapter that fits these weights of a model."""
        added = cls(
            name=name,
            alpha=stored.alpha,
            adapter=stored.adapter,
            file=stored.file,
            stamp=stored.stamp,
            elsewhere=elsewhere,
            nbytes=0,
            weights=weights,
            delta=stored.adapter.delta,
            codes=next((weight for weight in weights if dtype_name(weight.dtype) not in _file.ARITHMETIC), None),
        )
        if added.is_sharded:
            added.parts, added.adapter = added.entries(), None
            refuse_written(added.file, added.stamp)
        entries = added.entries().values()
        added.nbytes = sum(entry.indices.nbytes + entry.values.nbytes for entry in entries)
        added.nbytes += sum(entry.nnz * entry.dtype.itemsize for entry in entries)
        return added

    @property
    def is_sharded(self) -> bool:
        """Whether the ranks hold its weights together."""
        return any(weight.box is not None for weight in self.weights)

    def entries(self, adapter: Adapter | None = None) -> dict[Weight, Entry]:
        """What it changes in each weight, or in this rank's part of it; ``adapter`` is what `read` gives, if known."""
        if self.parts is not None:
            return self.parts
        if adapter is None:
            adapter = self.read(own=not self.is_sharded)
        if self.spilled and self.is_sharded:
            there = adapter.weights
            return {weight: there[weight.name] for weight in self.weights if weight.name in there}
        found = {weight: _part(weight, adapter.weights[name]) for weight, name in self.weights.items()}
        return {weight: entry for weight, entry in found.items() if weight.box is None or entry.nnz}

    def whole(self) -> Adapter:
        """The adapter as it was given."""
        if self.is_sharded and (self.file is None or self.spilled):
            raise SwitchError(
                f"Switcher: of {self.name!r} each rank has kept its own entries alone; add it from a file to have it "
                f"among adapters, or keep the one that was given"
            )
        return self.read()

    @property
    def weight_names(self) -> list[str]:
        return [weight.name for weight in self.weights]

    def allow(self, alpha: float, others: Iterable[Stored]) -> None:
        super().allow(alpha, others)
        if self.codes is not None and alpha != 1:
            raise AdapterError(
                f"{self.name!r} has entries of {self.codes.name}, which is {dtype_name(self.codes.dtype)} and takes no "
                f"strength other than 1, got {alpha:g}"
            )


class Shelf:
    """The adapters that were added, and their layouts on the devices, within a budget of bytes.

    What is active stays on the devices. When there is no room, the least recently used adapters leave.

    Args:
        ledger: tells what is active, and examines weights before their entries are read.
        folder: where adapters without a file are written when they have to leave, or None: they stay in host memory.
    """

    def __init__(self, ledger: Ledger, folder: Path | None) -> None:
        self.ledger, self.folder = ledger, folder
        # The bytes that layouts may keep on the devices, or None.
        self.budget: int | None = None
        self.added: dict[str, Added] = {}
        # Layouts of one adapter and of several together, the least recently used first.
        self.layouts: OrderedDict[Names, Layout] = OrderedDict()
        self._ways: OrderedDict[tuple[Layout, Layout], Way] = OrderedDict()
        # The files that we wrote, and must delete.
        self.files: set[Path] = set()
        self.streams = Streams()
        if folder is not None:
            sweep(folder)

    def known(self, name: str) -> Added:
        """The adapter of this name; refuses a name that was not added."""
        return known(self.added, name)

    def place(self, where: str, added: Added) -> Layout | None:
        """Bring an adapter that is about to be added to the devices; None where there is no room now, so that it left.

        Refuses one that is larger than the budget.
        """
        if self.budget is not None and added.nbytes > self.budget:
            raise AdapterError(f"{where} needs {added.nbytes:,} bytes, more than the budget of {self.budget:,}")
        if self._make_room(added.nbytes, keep=[self.ledger.state.names]):
            layout = _layout.of_adapter(added.name, added.entries(), added.delta, self.ledger.state.layout)
            if added.file is not None:
                added.parts = None  # they can be read again
            return layout
        self._leave(added)
        return None

    def put(self, added: Added, layout: Layout | None) -> None:
        """Add an adapter, with its layout if it is on the devices."""
        self.ledger.keep(added.weights)
        self.added[added.name] = added
        if layout is not None:
            self.layouts[added.name,] = layout

    def remove(self, name: str) -> None:
        """Forget an adapter that is not active."""
        self._drop(name)
        added = self.added.pop(name)
        self.ledger.keep_only({weight for other in self.added.values() for weight in other.weights})
        if added.spilled and added.file is not None:
            with suppress(OSError):  # then it goes when the Switcher does
                added.file.unlink(missing_ok=True)
                self.files.discard(added.file)

    def memory(self) -> dict[str, Memory]:
        """See `Switcher.memory`."""
        found: dict[str, Memory] = {}
        for name, added in self.added.items():
            layout = self.layouts.get((name,))
            on_cpu = layout is not None and all(device.type == "cpu" for device in layout.devices)
            host = 0 if added.adapter is None or on_cpu else added.adapter.nbytes
            if added.parts is not None and not on_cpu:
                host = sum(entry.indices.nbytes + entry.values.nbytes for entry in added.parts.values())
            found[name] = Memory(0 if layout is None else layout.nbytes, host, added.on_disk)
        for names, layout in self.layouts.items():
            if len(names) > 1:
                found[" + ".join(names)] = Memory(layout.nbytes, 0, 0)
        return found

    # ---- layouts and ways ------------------------------------------------------------------------------------

    def way(self, names: Names) -> Way:
        """The way from what is active to these adapters. Brings them to the devices if they have left."""
        before, after = self.ledger.state.layout, self._layout_of(names)
        key = (before, after)
        if key not in self._ways:
            way = _layout.way(before, after)
            # It may have made its layouts larger: indices in another granule, a second tensor for the base's entries.
            if self._excess() > 0:
                self._trim()  # first what other ways have made
                way = _layout.way(before, after)
                if self._excess() > 0:
                    self._trim()
                    way = _layout.way(before, after, frugal=True)
            self._ways[key] = way
            if len(self._ways) > _MOST_WAYS:
                self._ways.popitem(last=False)
        self._ways.move_to_end(key)
        return self._ways[key]

    def _layout_of(self, names: Names, beside: Names = ()) -> Layout:
        """The layout of these adapters, made if it is not there; the layouts of ``beside`` stay while it is made."""
        if not names:
            return EMPTY
        if names in self.layouts:
            for used in (*((name,) for name in names), names):  # who uses several uses each of them
                self.layouts.move_to_end(used)
            return self.layouts[names]
        keep = [self.ledger.state.names, names, beside]
        layout = self._bring(names[0], keep) if len(names) == 1 else self._unite(names, keep)
        self.layouts[names] = layout
        return layout

    def _bring(self, name: str, keep: list[Names]) -> Layout:
        """Bring an adapter that has left back to the devices."""
        added = self.added[name]
        adapter = None if added.is_sharded else added.read()
        entries = added.entries(adapter)
        self._need(added.nbytes, keep, (name,))
        weights = list(added.weights)
        self.ledger.examine(weights)
        with self.streams.staging(weight.device for weight in weights) as ready:
            layout = _layout.of_adapter(name, entries, added.delta, self.ledger.state.layout)
        layout.ready, added.adapter = ready, adapter
        return layout

    def _unite(self, names: Names, keep: list[Names]) -> Layout:
        """Make the layout of several adapters."""
        members = [self._layout_of((name,), beside=names) for name in names]
        for member in members:
            wait(member.ready)
            self.ledger.examine([weight for weight, part in member.parts.items() if not part.has_base])
        with self.streams.staging(device for member in members for device in member.devices) as ready:
            layout = _layout.together(members, self.ledger.state.layout)
        layout.ready = ready
        self._need(layout.nbytes, keep, names)
        unions = [known for known in self.layouts if len(known) > 1]
        for oldest in [known for known in unions if known not in keep][: max(0, len(unions) + 1 - _MOST_UNIONS)]:
            self._forget(oldest)
        return layout

    def rebind(self) -> None:
        """Follow the weights to where they are now. Layouts that are not active are forgotten, and made again when they
        are needed."""
        active = self.ledger.state.names
        kept = {active, *((name,) for name in active)}
        for names in [names for names in self.layouts if names not in kept]:
            self._forget(names)
        self._ways.clear()
        moved: dict[Tensor, Tensor] = {}
        for layout in self.layouts.values():
            layout.rebind(moved)

    def rebase(self, changed: Container[object]) -> None:
        """Weights, by their memory, hold another base now: save its entries in place of the old one's."""
        for layout in self.layouts.values():
            wait(layout.ready)
            for weight, part in layout.parts.items():
                if weight.key in changed:
                    part.rebase()

    # ---- room ------------------------------------------------------------------------------------------------

    def _excess(self) -> int:
        """Bytes above the budget."""
        return 0 if self.budget is None else sum(layout.nbytes for layout in self.layouts.values()) - self.budget

    def _need(self, nbytes: int, keep: Iterable[Names], names: Names) -> None:
        """Make room for this many more bytes, or refuse."""
        if not self._make_room(nbytes, keep):
            raise SwitchError(
                f"Switcher: {' + '.join(names)} would need {nbytes:,} bytes on the device beside what is active, and "
                f"the budget is {self.budget:,}: set switcher.budget to more; {self.ledger.state.told()}"
            )

    def _make_room(self, nbytes: int, keep: Iterable[Names]) -> bool:
        """Make room for this many more bytes: the least recently used leave, but not the layouts in ``keep``; and
        where that is not enough, what only saves time. Returns whether there is room; if not, nothing has left."""
        if self.budget is None:
            return True
        kept = {*keep, *((name,) for names in keep for name in names)}

        def sized() -> tuple[dict[Names, int], int]:
            sizes = {names: layout.nbytes for names, layout in self.layouts.items()}
            return sizes, sum(size for names, size in sizes.items() if names not in kept)

        sizes, free = sized()
        if self._excess() + nbytes > free:
            self._trim()
            sizes, free = sized()
        excess = self._excess() + nbytes
        if excess > free:
            return False
        for names in list(self.layouts):
            if excess <= 0:
                break
            if names in kept or names not in self.layouts:
                continue
            gone = [known for known in self.layouts if known == names or (len(names) == 1 and names[0] in known)]
            excess -= sum(sizes[known] for known in gone)
            if len(names) == 1:
                self._leave(self.added[names[0]])
            else:
                self._forget(names)
        return True

    def _trim(self) -> None:
        """Free what only saves time."""
        self._ways.clear()
        for layout in self.layouts.values():
            for part in layout.parts.values():
                part.trim()

    def _leave(self, added: Added) -> None:
        """Take an adapter off the devices: it is in its file, or goes to a file in the folder, or to host memory."""
        adapter = self._to_spill(added)
        if added.file is None and self.folder is not None and adapter is not None:
            file = spilled(self.folder)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                adapter.save(file)
                stamp = stamp_of(file)
            except OSError as error:
                raise SwitchError(
                    f"Switcher: {added.name!r} has to leave the device, and cannot be written to {file}: {error}; "
                    f"{self.ledger.state.told()}"
                ) from error
            self.files.add(file)
            added.file, added.stamp, added.spilled = file, stamp, True
        if added.file is not None:
            added.adapter = added.parts = None
        self._drop(added.name)

    @staticmethod
    def _to_spill(added: Added) -> Adapter | None:
        """What a file is written of."""
        if added.parts is None:
            return added.adapter
        parts = {weight.name: entry for weight, entry in added.parts.items()}
        return Adapter(parts, alpha=added.alpha, delta=added.delta) if parts else None

    def _drop(self, name: str) -> None:
        """Free all layouts that an adapter is in."""
        for names in [names for names in self.layouts if name in names]:
            self._forget(names)

    def _forget(self, names: Names) -> None:
        layout = self.layouts.pop(names)
        self._ways = OrderedDict((key, way) for key, way in self._ways.items() if layout not in key)
        layout.freeing()


# ---- files -----------------------------------------------------------------------------------------------------

Stamp = tuple[int, int, int, int]

_SPILLED = "shira-spilled-"


class Given(NamedTuple):
    """An adapter as it was given to ``add``, in memory of its own, checked as far as it can be without a model."""

    where: str  # names it in messages
    adapter: Adapter
    alpha: float
    file: Path | None
    stamp: Stamp | None


def given(name: str, adapter: str | os.PathLike[str] | Adapter, *, check_finite: bool, own: bool = True) -> Given:
    """Take an adapter, or read its file; refuses indices that are not valid and, with `check_finite`, NaN.

    Without `own` its values may stay where they are, for a caller that copies what it needs of them.
    """
    if not isinstance(name, str):
        raise TypeError(f"add: name must be a string, got {type(name).__name__} {name!r}")
    file = stamp = None
    if isinstance(adapter, Adapter):
        where, adapter = f"adapter {name!r}" if name else "the adapter", _owned(adapter) if own else adapter
    else:
        where = _text.path("add: adapter", adapter)
        file = Path(where).absolute()
        stamp = stamp_of(file)
        adapter = load(file, stamp, own=own)
    alpha = _text.strength(f"{where}: alpha", adapter.alpha)
    for weight_name, entry in adapter.weights.items():
        entry.check_indices(f"{where}: weight {weight_name!r}")
        if check_finite:
            entry.check_finite(f"{where}: weight {weight_name!r}")
    return Given(where, adapter, alpha, file, stamp)


def stamp_of(file: Path) -> Stamp:
    """Changes when a file is written again, or when another one takes its name."""
    found = file.stat()
    return found.st_mtime_ns, found.st_size, found.st_dev, found.st_ino


def content(adapter: Adapter, names: Iterable[str]) -> str:
    """Tells what an adapter holds and for which weights, so that ranks can compare theirs. Reads all of it."""
    words = (
        (name, entry.shape, entry.granule, entry.values.dtype,
         *(_granules.fingerprint(tensor) for tensor in (entry.indices.to(torch.int64), entry.values)))
        for name, entry in adapter.weights.items()
    )  # fmt: skip
    told = repr((list(words), adapter.delta, adapter.alpha, list(names))).encode()
    return (
        f"an adapter of {len(adapter.weights)} weights and {adapter.nnz:,} entries, strength {adapter.alpha:g}, "
        f"content {hashlib.blake2b(told, digest_size=8).hexdigest()}"
    )


def _owned(adapter: Adapter) -> Adapter:
    """The adapter with values in memory of their own; those of a loaded one are in its mapped file."""
    for entry in adapter.weights.values():
        storage = entry.values.untyped_storage()
        # Memory that torch did not allocate itself cannot be resized.
        if storage.nbytes() != entry.values.nbytes or not storage.resizable():
            return _copied(adapter)
    return adapter


def load(file: Path, stamp: Stamp | None, *, own: bool = True) -> Adapter:
    """An adapter in memory of its own: a mapped file would show what is written to it later, or could be cut off.

    Without `own` its values stay in the mapped file: for a caller that copies some of them at once.
    """
    adapter = Adapter.load(file)
    if own:
        adapter = _copied(adapter)
    refuse_written(file, stamp)
    return adapter


def refuse_written(file: Path | None, stamp: Stamp | None) -> None:
    """Refuse what was read from a file if the file was written to since."""
    if file is not None and stamp_of(file) != stamp:
        raise AdapterError(f"{file} was written to while it was read; try again when that is done")


def _part(weight: Weight, entry: Entry) -> Entry:
    """What an adapter changes in this rank's part of a sharded weight, in memory of its own."""
    if weight.box is None:
        return entry
    part = weight.box.take(entry.indices, entry.granule)
    return replace(
        entry,
        indices=part.indices,
        values=part.of(entry.values.detach()),
        shape=weight.box.local_shape,
        granule=part.granule,
        fingerprint=None,
        seed=None,
        aliases=(),
        checked=True,
    )


def _copied(adapter: Adapter) -> Adapter:
    weights = {name: replace(entry, values=entry.values.detach().clone()) for name, entry in adapter.weights.items()}
    return Adapter(
        weights,
        alpha=adapter.alpha,
        delta=adapter.delta,
        mask=adapter.mask,
        provenance=adapter.provenance,
        report=adapter.report,
    )


def node() -> str:
    """This machine's name, as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9]", "", platform.node())


def spilled(folder: Path) -> Path:
    """A file for an adapter that has to leave; its name tells which machine and process wrote it."""
    return folder.absolute() / f"{_SPILLED}{node()}-{os.getpid()}-{secrets.token_hex(8)}.safetensors"


def sweep(folder: Path) -> None:
    """Delete what processes of this machine left in the folder when they were killed."""
    if os.name != "posix":
        return  # on Windows, the question whether a process lives would end it
    for file in folder.glob(f"{_SPILLED}{node()}-*.safetensors"):
        process = re.fullmatch(rf"{_SPILLED}{node()}-(\d+)-[0-9a-f]{{16}}\.safetensors", file.name)
        if process is not None and not _file.lives(int(process[1])):
            with suppress(OSError):
                file.unlink()
