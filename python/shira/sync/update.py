"""`Update`: the entries of a model's weights that differ between two of its versions, and the way to send them."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import shira_ops
from shira import _granules
from shira._granules import WORD, dtype_name, fnv1a64, refine, splitmix64
from shira._text import AdapterError, hex_word, named, shown
from shira.adapter import _difference, _file
from shira.adapter._entry import Entry
from shira.adapter._file import Header
from shira.adapter.adapter import Adapter, read_entries, write_entries

__all__ = ["SyncError", "Update", "compose"]

_KEY = "shira.sync"


class SyncError(RuntimeError):
    """An update that is refused, or a switch to it that failed. The message says why; no weight has changed."""


# Names come again with every update.
_name_word = lru_cache(maxsize=1 << 16)(fnv1a64)


def term(name: str, fingerprint: int) -> int:
    """What one weight adds to a version."""
    return splitmix64(_name_word(name) ^ splitmix64(fingerprint))


def version_of(fingerprints: Mapping[str, int]) -> int:
    """The version of a model: the sum mod 2^64 of what its weights add, so that it follows a change in O(changed)."""
    return sum(term(name, fingerprint) for name, fingerprint in fingerprints.items()) & WORD


def shown_version(version: int) -> str:
    """A version as messages and files have it."""
    return f"{version:016x}"


def bits_of(itemsize: int) -> torch.dtype:
    """The integers of so many bytes."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[itemsize]


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, for which NaNs are equal to themselves and 0.0 is not -0.0."""
    return tensor.view(bits_of(tensor.element_size()))


@dataclass(frozen=True, eq=False)
class Update:
    """What changed in a model's weights from one version to another: an overwriting adapter that knows its place.

    Args:
        weights: parameter name to `shira.Entry`: the granules that changed, and the weight's entries there. The entry's
            fingerprint is that of the weight before.
        after: the fingerprint of each of these weights afterwards.
        start: the version it starts from: a 64-bit number that follows from the fingerprints of all weights.
        step: how many updates the publisher has made, this one included. For people; versions are what is compared.
        before: of weights of which they are known, the entries before. A Publisher knows them. A file then has the
            differences, which take a few bits an entry; what is read from it has differences for values (`relative`).
        prints: of weights whose values are differences, the fingerprint of the values themselves; None where it is not
            known, as after `compose`: then the weight is compared as a whole before differences are added.
    """

    weights: Mapping[str, Entry]
    after: Mapping[str, int]
    start: int
    step: int
    before: Mapping[str, Tensor] = field(default_factory=dict)
    prints: Mapping[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weights.keys() != self.after.keys():
            raise AdapterError("Update: after must have a fingerprint for each of the weights, and for no other")
        for what, word in {
            "start": self.start,
            **{f"after {named(name)}": one for name, one in self.after.items()},
            **{f"the print of {named(name)}": one for name, one in self.prints.items() if one is not None},
        }.items():
            if type(word) is not int or not 0 <= word <= WORD:
                raise AdapterError(f"Update: {what} must be a whole number below 2^64, got {shown(word)}")
        if type(self.step) is not int or not 0 <= self.step < 2**63:
            raise AdapterError(f"Update: step must be a whole number from 0, got {shown(self.step)}")
        for name, entry in self.weights.items():
            entry.check(f"Update: weight {named(name)}", differences=name in self.prints)
            if entry.fingerprint is None:
                raise AdapterError(f"Update: weight {named(name)} must have a fingerprint, that of the weight before")
            if entry.values.dtype != entry.dtype and name not in self.prints:
                raise AdapterError(
                    f"Update: weight {named(name)}: values must have the weight's dtype {dtype_name(entry.dtype)}, got "
                    f"{dtype_name(entry.values.dtype)}"
                )
            known = self.before.get(name)
            if known is not None and (known.dtype != entry.dtype or known.shape != entry.values.shape):
                raise AdapterError(
                    f"Update: weight {named(name)}: before must have {entry.nnz} entries of {dtype_name(entry.dtype)}, "
                    f"got shape {list(known.shape)} of {dtype_name(known.dtype)}"
                )
        for what, names in {"before": self.before, "prints": self.prints}.items():
            if names.keys() - self.weights.keys():
                raise AdapterError(f"Update: {what} must be of weights of the update alone")
        for own in ("weights", "after", "before", "prints"):
            object.__setattr__(self, own, MappingProxyType(dict(getattr(self, own))))

    @property
    def relative(self) -> bool:
        """Whether values are differences from the entries that they replace, as in a file; `decode` has the values."""
        return bool(self.prints)

    @property
    def end(self) -> int:
        """The version it leads to."""
        change = sum(
            term(name, self.after[name]) - term(name, entry.fingerprint or 0) for name, entry in self.weights.items()
        )
        return (self.start + change) & WORD

    @property
    def nnz(self) -> int:
        """Entries that it writes, over all weights."""
        return sum(entry.nnz for entry in self.weights.values())

    @property
    def nbytes(self) -> int:
        """Bytes of its indices and values in memory, and of the entries before."""
        own = sum(entry.indices.nbytes + entry.values.nbytes for entry in self.weights.values())
        return own + sum(entries.nbytes for entries in self.before.values())

    def __len__(self) -> int:
        return len(self.weights)

    def __repr__(self) -> str:
        numel = sum(entry.numel for entry in self.weights.values())
        share = f" ({self.nnz / numel:.3%} of theirs)" if numel else ""
        plural = "" if len(self) == 1 else "s"
        return (
            f"Update(step {self.step}: {shown_version(self.start)} to {shown_version(self.end)}, {len(self)} "
            f"weight{plural}, {self.nnz:,} entries{share})"
        )

    # A mapping that cannot be written to cannot be pickled either.
    def __getstate__(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, MappingProxyType(value) if isinstance(value, dict) else value)

    def adapter(self) -> Adapter:
        """The same as an `Adapter`, to inspect, to extract from, or for a `Switcher`."""
        self.refuse_relative("adapter")
        return Adapter(self.weights, provenance={_KEY: self._about()})

    def _about(self) -> dict[str, Any]:
        return {
            "start": shown_version(self.start),
            "end": shown_version(self.end),
            "step": self.step,
            "after": {name: shown_version(fingerprint) for name, fingerprint in self.after.items()},
        }

    def refuse_relative(self, what: str) -> None:
        """Refuse, for a call that needs values, an update that has differences."""
        if self.relative:
            raise SyncError(
                f"{what}: the values of the update of step {self.step} are differences from the weights it starts "
                f"from; decode(weights) gives the values (and Receiver.stage takes it as it is)"
            )

    def decode(self, weights: Mapping[str, Tensor]) -> Update:
        """The same update with its values, not differences: itself, if it has them already.

        Args:
            weights: the tensors by name, such as a state dict, at the version that this update starts from; only read.

        Raises `SyncError` for a weight that is missing or holds other entries than the update starts from.
        """

        def entries(name: str, entry: Entry) -> tuple[Tensor, None]:
            tensor = self._find("decode", weights, name)
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise SyncError(f"Update.decode: {named(name)} has another shape or dtype than in the update")
            with torch.no_grad():
                return shira_ops.gather(tensor, entry.indices.to(tensor.device), granule=entry.granule), None

        def starts(name: str, entry: Entry) -> bool:
            return _granules.fingerprint(self._find("decode", weights, name)) == entry.fingerprint

        return self.decoded("Update.decode", entries, starts)

    def decoded(
        self,
        who: str,
        entries: Callable[[str, Entry], tuple[Tensor, Tensor | None]],
        starts: Callable[[str, Entry], bool],
    ) -> Update:
        """`decode`, where a function gathers the entries before, and says which of them it has (None: all).

        Another one compares a weight as a whole with what the update starts from, where the print is not known.
        """
        if not self.relative:
            return self
        found, before = dict(self.weights), dict(self.before)
        for name, printed in self.prints.items():
            entry = self.weights[name]
            if printed is None and not starts(name, entry):
                raise SyncError(
                    f"{who}: {named(name)} is not what the update of step {self.step} starts from, so its differences "
                    f"cannot be added (by fingerprint of the weight)"
                )
            was, here = entries(name, entry)
            values = _difference.add(was, entry.values.to(was.device))
            if here is not None and not bool(here.all()):
                indices = refine(entry.indices.to(was.device), entry.granule, 1, entry.numel)[here]
                before[name] = was[here]
                found[name] = replace(entry, indices=indices, values=values[here], granule=1, checked=True)
                continue
            before[name] = was
            if printed is not None and _granules.fingerprint(values) != printed:
                raise SyncError(
                    f"{who}: {named(name)} does not hold the entries that the update of step {self.step} starts from, "
                    f"so its differences cannot be added (by fingerprint of the result)"
                )
            found[name] = replace(entry, values=values)
        return replace(self, weights=found, before=before, prints={})

    def _find(self, what: str, weights: Mapping[str, Tensor], name: str) -> Tensor:
        tensor = next((weights[one] for one in (name, *self.weights[name].aliases) if one in weights), None)
        if tensor is None:
            raise SyncError(f"Update.{what}: weights must have {named(name)}, which the update changes")
        return tensor

    @classmethod
    def from_adapter(cls, adapter: Adapter) -> Update:
        """The update that `adapter` was made of; refuses others, and fingerprints that contradict the versions."""
        return cls._made(adapter, adapter.weights, {})

    @classmethod
    def _made(cls, said: Adapter | Header, weights: Mapping[str, Entry], prints: Mapping[str, int | None]) -> Update:
        about = said.provenance.get(_KEY)
        if not isinstance(about, Mapping) or said.delta or said.alpha != 1:
            raise AdapterError("this is an adapter, but not an update: a Publisher makes those (Adapter.load reads it)")
        after, step = about.get("after"), about.get("step")
        if isinstance(said, Header) and after is None:
            after = {name: hex_word(weight.after) for name, weight in said.weights.items()}
        if not isinstance(after, Mapping):
            raise AdapterError(f"the update must have the fingerprints after it, got {shown(about)}")
        words = {name: _word(f"weight {named(name)}: after", word) for name, word in after.items()}
        start = _word("start", about.get("start"))
        update = cls(weights, words, start, step, prints=prints)  # type: ignore[arg-type]
        if update.end != _word("end", about.get("end")):
            raise AdapterError(
                f"the update says that it leads to version {about.get('end')}, and its fingerprints lead to "
                f"{shown_version(update.end)}"
            )
        return update

    def save(self, path: str | os.PathLike[str], *, differences: bool = True) -> None:
        """Write it as an adapter file (docs/format.md), whole or not at all; an existing file is replaced.

        Where the entries before are known, floats are written as differences from them (version 2 of the file), which
        only a model at the version that the update starts from can decode. Without `differences` they are written as
        they are.
        """
        with _file.replacing(path) as temporary:
            self._write(temporary, differences)

    def _write(self, path: Path, wanted: bool) -> None:
        differences: dict[str, tuple[Tensor, int | None]] = {}
        if not wanted:
            self.refuse_relative("save")
        for name, entry in self.weights.items():
            known = self.before.get(name)
            if name in self.prints:
                differences[name] = entry.values, self.prints[name]
            elif wanted and known is not None and _difference.has_differences(entry.dtype):
                differences[name] = self._differences(name), _granules.fingerprint(entry.values)
        numel = sum(entry.numel for entry in self.weights.values())
        about = {
            "alpha": 1.0,
            "delta": False,
            "mask": None,
            "density": self.nnz / numel if numel else 0.0,
            # The fingerprints afterwards are beside the others.
            "provenance": {_KEY: {key: said for key, said in self._about().items() if key != "after"}},
        }
        write_entries(path, self.weights, about, version=2, differences=differences, after=self.after)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Update:
        """Read a file of `save`: every index, length and checksum is checked, nothing is executed.

        Its values may be differences then (`relative`); `decode` has the values, and `Receiver.stage` takes either.
        Raises `AdapterError` with the file and what is wrong.
        """
        header, entries = read_entries(path)
        try:
            prints = {name: weight.print for name, weight in header.weights.items() if weight.difference}
            return cls._made(header, entries, prints)
        except AdapterError as error:
            raise AdapterError(f"{os.fspath(path)}: {error}") from error

    def to_bytes(self, *, differences: bool = True) -> bytes:
        """The bytes of the file of `save`, to send by whatever carries bytes."""
        with _in_memory() as path:
            self._write(path, differences)
            return path.read_bytes()

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Update:
        """Read what `to_bytes` made, with the checks of `load`."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"Update.from_bytes: data must be bytes, got {type(data).__name__}")
        with _in_memory() as path:
            path.write_bytes(data)
            try:
                return cls.load(path)
            except AdapterError as error:
                text = str(error).removeprefix(f"{path}: ")
                raise AdapterError(f"the {len(data):,} bytes of an update: {text}") from error

    def _differences(self, name: str) -> Tensor:
        """A weight's values as differences. `SyncError` where neither these nor the entries before are known."""
        entry, known = self.weights[name], self.before.get(name)
        if name in self.prints:
            return entry.values
        if known is None or not _difference.has_differences(entry.dtype):
            raise SyncError(
                f"compose: the update of step {self.step} has the values of {named(name)} and not the entries before, "
                f"and the other one has differences, which cannot be put together; decode(weights) gives the values"
            )
        return _difference.difference(known.to(entry.values.device), entry.values)

    def invert(self, weights: Mapping[str, Tensor] | None = None) -> Update:
        """The update that leads back.

        Args:
            weights: the tensors by name, such as a state dict, at the version that this update starts from; only read.
                Not needed where the entries `before` are known, nor for differences, which lead back as differences.
        """
        if self.relative and weights is not None:
            return self.decode(weights).invert(weights)
        back: dict[str, Entry] = {}
        for name, entry in self.weights.items():
            if name in self.prints:
                back[name] = replace(entry, values=-entry.values, fingerprint=self.after[name])
                continue
            if weights is None and name in self.before:
                back[name] = replace(entry, values=self.before[name], fingerprint=self.after[name])
                continue
            tensor = self._find("invert", weights or {}, name)
            before = _granules.fingerprint(tensor)
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype or before != entry.fingerprint:
                raise SyncError(f"Update.invert: {named(name)} is not what the update starts from (by fingerprint)")
            with torch.no_grad():
                values = shira_ops.gather(tensor, entry.indices.to(tensor.device), granule=entry.granule)
            back[name] = replace(entry, values=values, fingerprint=self.after[name])
        after = {name: entry.fingerprint or 0 for name, entry in self.weights.items()}
        before_that = {name: entry.values for name, entry in self.weights.items() if name not in self.prints}
        return Update(back, after, self.end, self.step, before_that, dict.fromkeys(self.prints))


def compose(first: Update, second: Update) -> Update:
    """The one update that does what `first` and then `second` do; a later value of an entry replaces an earlier one.

    Of a weight of which one of them has differences, as from a file, the result has differences too: their sums. The
    other one must have differences then, or know the entries before. O(entries of both), without any weights. Raises
    `SyncError` where they do not follow one another, or differences would have to be added to values.
    """
    if second.start != first.end:
        raise SyncError(
            f"compose: the second update must start where the first one ends, at version {shown_version(first.end)} "
            f"(step {first.step}), got one that starts at {shown_version(second.start)} (step {second.step})"
        )
    weights, after = dict(first.weights), dict(first.after) | dict(second.after)
    before, prints = dict(first.before), dict(first.prints)
    for name, entry in second.weights.items():
        earlier = weights.get(name)
        if earlier is None:
            weights[name] = entry
            before |= {name: second.before[name]} if name in second.before else {}
            prints |= {name: second.prints[name]} if name in second.prints else {}
            continue
        if (earlier.shape, earlier.dtype) != (entry.shape, entry.dtype) or first.after[name] != entry.fingerprint:
            raise SyncError(f"compose: {named(name)} is another weight in the second update (shape, dtype or content)")
        if name in first.prints or name in second.prints:
            one, other = (replace(update.weights[name], values=update._differences(name)) for update in (first, second))
            weights[name] = _merged(one, other, add=True)
            before.pop(name, None)
            # Where the second one writes every entry, in the same order, its values are those of both.
            every = weights[name].nnz == entry.nnz and weights[name].granule == entry.granule
            known = second.prints[name] if name in second.prints else _granules.fingerprint(entry.values)
            prints[name] = known if every else None
            continue
        weights[name] = _merged(earlier, entry)
        if name in before and name in second.before:
            # Of what both write, the entries before the first one.
            was, later = (
                replace(one, values=known) for one, known in ((earlier, before[name]), (entry, second.before[name]))
            )
            before[name] = _merged(later, was).values
        else:
            before.pop(name, None)
    return Update(weights, after, first.start, second.step, before, prints)


def _merged(first: Entry, second: Entry, *, add: bool = False) -> Entry:
    """The entries of both; where both have one, that of the second, or the sum (whole numbers, mod 2^bits)."""
    granule = math.gcd(first.granule, second.granule)
    device = second.values.device
    indices = torch.cat(
        [
            refine(entry.indices.to(device), entry.granule, granule, entry.numel).to(torch.int64)
            for entry in (second, first)
        ]
    )
    # A stable sort leaves those of the second before those of the first.
    indices, order = torch.sort(indices, stable=True)
    new = torch.ones_like(indices, dtype=torch.bool)
    new[1:] = indices[1:] != indices[:-1]
    rows = torch.cat([second.values, first.values.to(device)]).view(-1, granule)
    values = rows[order[new]]
    if add:
        # Those that are not new are the first one's, each after the second one's of the same index.
        values[new.cumsum(0)[~new] - 1] += rows[order[~new]]
    values = values.view(-1)
    kept = indices[new].to(refine(second.indices[:0], second.granule, granule, second.numel).dtype)
    aliases = tuple(dict.fromkeys((*first.aliases, *second.aliases)))
    return Entry(kept, values, first.shape, first.dtype, granule, first.fingerprint, None, aliases, checked=True)


def _word(what: str, text: Any) -> int:
    if not isinstance(text, str) or not re.fullmatch("[0-9a-f]{16}", text):
        raise AdapterError(f"{what} must be 16 hex digits, got {shown(text)}")
    return int(text, 16)


@contextmanager
def _in_memory() -> Iterator[Path]:
    """The path of a file that is nobody else's, in memory where the system can."""
    if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        descriptor = os.memfd_create("shira-update")
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "update")
            path.touch()
            yield path
