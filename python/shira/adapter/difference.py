"""An adapter from two checkpoints: what fine-tuning changed, and how much of that was left out.

Both checkpoints are mapped and compared in chunks that stay in the caches. Neither model is ever in memory; of a
checkpoint of ``torch.distributed.checkpoint``, whose tensors are in pieces, one weight at a time is. The bits are
compared, so that another payload of a NaN or another sign of a zero counts as a change.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shira import _codec, _model, _text
from shira._granules import WORD
from shira._text import AdapterError
from shira.adapter import _file
from shira.adapter._align import Aligned, align
from shira.adapter._checkpoint import Bytes, Progress, Source, Stored, equal_bytes, open_checkpoint
from shira.adapter._entry import Entry, Lost, Made, Report

__all__ = ["Lost", "Progress", "Report", "difference"]

# Bytes of one checkpoint for a call. What is compared is read again for the fingerprint, so it must stay in a core's
# own cache; scores are counted in half a megabyte for each call, which larger chunks share.
_CHUNK, _SCORED = 1 << 20, 4 << 20
_T = TypeVar("_T")
_R = TypeVar("_R")


def _in_order(pool: Executor, ahead: int, function: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """``map`` over threads, in order, with at most ``ahead`` results waiting."""
    waiting: deque[Future[_R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@dataclass(frozen=True)
class _Pair:
    """One weight in both checkpoints, as bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    base: Bytes
    tuned: Bytes
    granule: int
    aliases: tuple[str, ...]
    on_disk: bool  # whether the tuned one is a file's

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return _file.DTYPES[self.dtype][1]

    def chunks(self, size: int) -> list[tuple[int, int]]:
        """Ranges of entries: whole granules, whole words, about ``size`` bytes each."""
        step = math.lcm(self.granule, 8)
        step *= max(1, size // (step * self.itemsize))
        return [(begin, min(begin + step, self.numel)) for begin in range(0, self.numel, step)]

    def mark(self, chunk: tuple[int, int]) -> int:
        """What the chunk contributes to the base's fingerprint."""
        begin, end = chunk
        return _codec.fingerprint(self.base, begin * self.itemsize // 8, -(-end * self.itemsize // 8))

    def count(self, chunk: tuple[int, int]) -> int:
        """Entries of a chunk that changed."""
        return _codec.count_differing(self.base, self.tuned, self.itemsize, *chunk)

    def changed(self, chunk: tuple[int, int]) -> tuple[int, npt.NDArray[np.int32], Bytes]:
        """How many entries of a chunk changed, their granules (numbered within the chunk), and what these hold now."""
        begin, end = chunk
        found = _codec.differing(self.base, self.tuned, self.itemsize, begin, end)
        granules = found
        if self.granule > 1:
            granules = found // np.int32(self.granule)
            granules = granules[np.flatnonzero(np.diff(granules, prepend=-1))]
        width = self.granule * self.itemsize
        part = self.tuned[begin * self.itemsize : end * self.itemsize]
        return len(found), granules, _codec.take(part, width, granules)


class _Sparse:
    """The granules of a weight that changed, collected chunk by chunk; dropped if there are more than ``most``."""

    def __init__(self, pair: _Pair, most: int) -> None:
        self.pair = pair
        self.most = most
        self.dtype: np.dtype[Any] = np.dtype(np.int32 if pair.numel // pair.granule < 2**31 else np.int64)
        self.changed = self.granules = self.mark = 0
        self.indices: list[npt.NDArray[Any]] = []
        self.values: list[Bytes] = []

    @property
    def dropped(self) -> bool:
        return self.granules > self.most

    def look(self, chunk: tuple[int, int]) -> tuple[int, int, int, npt.NDArray[Any] | None, Bytes | None]:
        """Compares a chunk, on any thread. Once too many granules have changed, entries are only counted."""
        if self.dropped:
            return self.pair.mark(chunk), self.pair.count(chunk), 0, None, None
        count, granules, values = self.pair.changed(chunk)
        indices = granules.astype(self.dtype, copy=False) + self.dtype.type(chunk[0] // self.pair.granule)
        return self.pair.mark(chunk), count, len(granules), indices, values

    def add(
        self, mark: int, changed: int, granules: int, indices: npt.NDArray[Any] | None, values: Bytes | None
    ) -> None:
        """Takes the results of `look`, in the order of the chunks."""
        self.mark += mark
        self.changed += changed
        self.granules += granules
        if self.dropped:
            self.indices.clear()
            self.values.clear()
        elif indices is not None and values is not None and granules:
            self.indices.append(indices)
            self.values.append(values)


def _whole_from(pair: _Pair) -> int:
    """From how many granules on the whole parameter is smaller, since an index costs at least a byte."""
    width = pair.granule * pair.itemsize
    return max(1, -(-len(pair.base) // (width + 1)))


def _flat(data: Bytes, dtype: str) -> Tensor:
    if data.ctypes.data % getattr(torch, dtype).itemsize:
        data = data.copy()
    return torch.from_numpy(data).view(getattr(torch, dtype))


def _compute(pair: _Pair) -> str:
    return "float64" if pair.dtype in ("float64", "int32", "int64") else "float32"


def _floats(pair: _Pair, base: Bytes, tuned: Bytes) -> tuple[Bytes, Bytes, str]:
    """Parts of the two weights as floats, and the dtype; unchanged where the compiled module knows their dtype."""
    if pair.dtype in _file.ARITHMETIC:
        return base, tuned, pair.dtype
    compute = _compute(pair)
    one, two = (_flat(data, pair.dtype).to(getattr(torch, compute)).numpy() for data in (base, tuned))
    return one, two, compute


def _part(pair: _Pair, chunk: tuple[int, int]) -> tuple[Bytes, Bytes, str]:
    begin, end = (entry * pair.itemsize for entry in chunk)
    return _floats(pair, pair.base[begin:end], pair.tuned[begin:end])


def _squared(pair: _Pair, pool: Executor, ahead: int) -> float:
    """The squared difference of the whole weight."""
    sums = _in_order(pool, ahead, lambda chunk: _codec.squared_difference(*_part(pair, chunk)), pair.chunks(_SCORED))
    return math.fsum(sums)


def _top(pair: _Pair, count: int, pool: Executor, ahead: int) -> Tensor:
    """The ``count`` granules of highest score, the sum of |difference|, ties to the lower index.

    A radix selection: each walk settles 16 bits of the score of the last granule that is in, the final one takes what
    lies above and the first of those equal to it. So the scores of the whole weight are never in memory. NaN counts as
    infinite: such a granule is kept first.
    """
    bits = 64 if _compute(pair) == "float64" else 32
    chunks = pair.chunks(_SCORED)
    # The leading bits of the rank of the last granule that is in, and how many more to take among those with them.
    last, missing = 0, count
    for shift in range(bits - 16, -1, -16):

        def counted(chunk: tuple[int, int], shift: int = shift, last: int = last) -> npt.NDArray[np.int64]:
            return _codec.count_ranks(*_part(pair, chunk), pair.granule, shift, last)

        histogram = np.zeros(1 << 16, np.int64)
        for part in _in_order(pool, ahead, counted, chunks):
            histogram += part
        from_here = histogram[::-1].cumsum()[::-1]
        digit = int(np.flatnonzero(from_here >= missing)[-1])
        missing -= int(from_here[digit] - histogram[digit])
        last = last << 16 | digit

    def taken(chunk: tuple[int, int]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        return _codec.take_ranks(*_part(pair, chunk), pair.granule, last)

    dtype = np.int32 if pair.numel // pair.granule < 2**31 else np.int64
    parts = []
    for chunk, (above, level) in zip(chunks, _in_order(pool, ahead, taken, chunks), strict=True):
        level = level[:missing]
        missing -= len(level)
        found = np.sort(np.concatenate([above, level])).astype(np.int64) + chunk[0] // pair.granule
        parts.append(found.astype(dtype))
    return torch.from_numpy(np.concatenate(parts))


def _rows(data: Bytes, pair: _Pair, indices: Tensor) -> Tensor:
    """What these granules of a mapped weight hold."""
    return _flat(data, pair.dtype).view(-1, pair.granule)[indices].view(-1)


def _entry(pair: _Pair, density: float | None, pool: Executor, ahead: int) -> tuple[Entry, Lost] | None:
    """What changed in one weight, or None."""
    granules = pair.numel // pair.granule
    budget = granules if density is None else min(max(1, round(density * pair.numel / pair.granule)), granules)
    whole_from = _whole_from(pair)
    sparse = _Sparse(pair, min(budget, whole_from - 1))
    for found in _in_order(pool, ahead, sparse.look, pair.chunks(_CHUNK)):
        sparse.add(*found)
    if not sparse.changed:
        return None
    total = lost = 0.0
    granule = pair.granule
    if not sparse.dropped:
        indices = torch.from_numpy(np.concatenate(sparse.indices))
        kept = _flat(np.concatenate(sparse.values), pair.dtype)
    elif budget >= whole_from:
        granule = pair.numel
        indices, kept = torch.zeros(1, dtype=torch.int32, device="cpu"), _flat(pair.tuned, pair.dtype)
        if not pair.on_disk:  # the tensor is the caller's, who may go on training it
            kept = kept.clone()
        if density is not None:
            total = _squared(pair, pool, ahead)
    else:
        indices, total = _top(pair, budget, pool, ahead), _squared(pair, pool, ahead)
        kept = _rows(pair.tuned, pair, indices)
    if density is not None and granule == pair.granule:
        old, new = (rows.view(torch.uint8).numpy() for rows in (_rows(pair.base, pair, indices), kept))
        held = _codec.squared_difference(*_floats(pair, old, new))
        total = total or held
        lost = min(1.0, max(0.0, 1.0 - held / total)) if total else 0.0
    dtype, fingerprint = getattr(torch, pair.dtype), sparse.mark & WORD
    entry = Entry(indices, kept, pair.shape, dtype, granule, fingerprint, None, pair.aliases, checked=True)
    return entry, Lost(pair.numel, sparse.changed, kept.numel(), lost, total)


def _matched(aligned: Aligned, added: bool) -> list[tuple[str, Stored, Stored, tuple[str, ...]]]:
    """The weights of both checkpoints by name, with their aliases. One error lists everything that does not match."""
    groups: dict[str, list[str]] = {}
    for name, first in aligned.first.items():
        groups.setdefault(first, []).append(name)
    only_tuned = [] if added else aligned.tuned.keys() - aligned.first.keys()
    problems = [f"{name!r} is only in the tuned checkpoint" for name in only_tuned]
    pairs = []
    for name, names in groups.items():
        one = aligned.base[name]
        found = {known: aligned.tuned[known] for known in names if known in aligned.tuned}
        if not found:
            problems.append(f"{name!r} is only in the base checkpoint")
            continue
        first, two = next(iter(found.items()))
        foreign = one.foreign or two.foreign
        if foreign is not None:
            problems.append(f"{name!r} {foreign}")
        elif one.shape != two.shape:
            problems.append(f"{name!r} has shape {list(one.shape)} in the base and {list(two.shape)} in the tuned one")
        elif one.dtype != two.dtype:
            problems.append(f"{name!r} is {one.dtype} in the base and {two.dtype} in the tuned one")
        else:
            pairs.append((name, one, two, tuple(known for known in names if known != name)))
            for other, copy in found.items():
                if copy.one != two.one and not two.equal(copy):
                    problems.append(f"{first!r} and {other!r} are one (tied) weight in the base, and two in the other")
    if problems:
        more = f" ({len(problems)} problems in all)" if len(problems) > 5 else ""
        advice = ""
        if any("is only in" in one for one in problems):
            advice = "; rename= (--rename) brings names together, added=True (--added) carries new tensors along"
        raise AdapterError(f"the checkpoints do not match: {'; '.join(sorted(problems)[:5])}{more}{advice}")
    changed = {name: one.dtype for name, one, two, _ in pairs if not one.supported and not one.equal(two)}
    if changed:
        dtypes = ", ".join(sorted(set(changed.values())))
        listed = _model.some(map(repr, changed))
        raise AdapterError(f"{listed} changed, and an adapter cannot hold entries of {dtypes}")
    return [pair for pair in pairs if pair[1].supported]


def _new(aligned: Aligned) -> dict[str, Entry]:
    """The tensors that only the tuned checkpoint has, as whole parameters."""
    entries: dict[str, Entry] = {}
    first = {stored.one: name for name, stored in reversed(aligned.tuned.items())}
    for name in [name for name in aligned.tuned if name not in aligned.first]:
        stored = aligned.tuned[name]
        if stored.foreign is not None or not stored.supported:
            raise AdapterError(f"{name!r} {stored.foreign or f'is {stored.dtype}, which an adapter cannot hold'}")
        if not stored.nbytes:
            raise AdapterError(f"{name!r} is only in the tuned checkpoint, and empty: an adapter cannot hold it")
        if first[stored.one] != name:
            continue  # another name of a tensor that is new as well
        aliases = tuple(other for other, one in aligned.tuned.items() if other != name and one.one == stored.one)
        values = stored.tensor() if stored.on_disk else stored.tensor().clone()
        indices, dtype = torch.zeros(1, dtype=torch.int32), getattr(torch, stored.dtype)
        entries[name] = Entry(indices, values, stored.shape, dtype, stored.numel, None, None, aliases, checked=True)
    return entries


def difference(
    base: Source,
    tuned: Source,
    *,
    density: float | None = None,
    granule: int = 1,
    rename: _text.Rename = None,
    added: bool = False,
    progress: Progress | None = None,
) -> Made:
    """The parts of an adapter of the difference; `Adapter.from_difference` describes the arguments."""
    density = None if density is None else _text.share("from_difference: density", density)
    _text.whole("from_difference: granule", granule, 1)
    _text.function("from_difference: progress", progress)
    aligned = align(open_checkpoint(base, "base"), open_checkpoint(tuned, "tuned"), rename)
    matched = _matched(aligned, added)
    total, done = sum(one.nbytes for _, one, _, _ in matched), 0
    entries: dict[str, Entry] = {}
    report: dict[str, Lost] = {}
    uneven: list[str] = []
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        for name, one, two, aliases in matched:
            pair = _Pair(name, one.dtype, one.shape, one.bytes(), two.bytes(), granule, aliases, two.on_disk)
            if pair.numel and (pair.shape[-1] if pair.shape else 1) % granule:
                # Only a weight that changed needs granules.
                if not equal_bytes(pair.base, pair.tuned):
                    uneven.append(f"{pair.name} {list(pair.shape)}")
            elif not uneven and (made := _entry(pair, density, pool, 2 * threads)) is not None:
                entries[pair.name], report[pair.name] = made
            del pair  # before the next one is read
            done += one.nbytes
            if progress is not None:
                progress(name, done, total)
    if uneven:
        raise AdapterError(
            f"granule {granule} must divide the last dimension of every weight that changed; "
            f"not so for {len(uneven)}: {_model.some(uneven)}"
        )
    if added:
        for name, entry in _new(aligned).items():
            entries[name] = entry
            report[name] = Lost(entry.numel, entry.numel, entry.numel, 0.0)
    mask = {"name": "Difference", "density": density, "granule": granule}
    return Made(entries, mask, Report(report, tuple(aligned.notes)))
