"""Merging adapters so that they disturb each other less: TIES and DARE.

A plain sum of adapters is what ``Switcher.activate({"a": 0.7, "b": 0.5})`` gives. These two make a new adapter out of
several, once; it adds to the base (a delta) and then switches and mixes like any other::

    merged = shira.merging.ties([style, edges], model, density=0.5)
    switcher.add("merged", merged)
    switcher.activate("merged", alpha=0.8)          # the papers' lambda

A task vector is what an adapter adds: ``tau = values - base`` at its entries, 0 elsewhere. Arithmetic is fp32 (fp64 for
fp64 weights), contributions are added in the adapters' order, and ties have a rule: the same adapters always merge to
the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import shira_ops
from shira._checkpoint import Source
from shira.adapter import Adapter, Entry
from shira.mask import fnv1a64, refine, splitmix64

__all__ = ["dare", "ties"]

_WORD = 2**64 - 1


def ties(
    adapters: Sequence[Adapter],
    base: Source,
    weights: Sequence[float] | None = None,
    *,
    density: float = 0.2,
    alpha: float = 1.0,
) -> Adapter:
    """TIES-Merging (Yadav et al., arXiv 2306.01708, algorithm 1): trim, elect signs, merge what agrees.

    1. Trim: of each task vector ``tau_t`` the share ``density`` of its entries with the largest magnitude stays, over
       all weights together: ``max(1, round(density * nnz))`` (ties to the first in order).
    2. Elect: ``gamma = sgn(sum_t w_t tau_t)`` for each entry.
    3. Disjoint merge: ``tau = mean of w_t tau_t over the t with sgn(w_t tau_t) = gamma``. An entry whose signs cancel
       (``gamma = 0``) stays the base's.

    The paper has ``w_t = 1``, and counts ``density`` in all entries of dense task vectors; an adapter's are its own.

    Args:
        adapters: at least one; those of new values become deltas first (`Adapter.to_delta`).
        base: the model they were made for, as it is without adapters: a module, a state dict or a path. Another base is
            refused.
        weights: ``w_t``, each adapter's own alpha unless given.
        density: share that trimming keeps, in (0, 1].
        alpha: the merged adapter's strength, the paper's lambda.

    Returns a delta adapter with fp32 values (fp64 for fp64 weights). Raises `AdapterError` if an adapter does not fit
    the base, and `ValueError` for numbers out of range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"ties: density must be above 0 and at most 1, got {density!r}")
    deltas, factors = _deltas("ties", adapters, base, weights)
    trimmed = [_trimmed(delta, density) for delta in deltas]
    return _merged(trimmed, factors, _agreeing, alpha, {"method": "ties", "density": density, "weights": factors})


def dare(
    adapters: Sequence[Adapter],
    base: Source,
    weights: Sequence[float] | None = None,
    *,
    drop: float = 0.9,
    seed: int = 0,
    elect: bool = False,
    alpha: float = 1.0,
) -> Adapter:
    """DARE (Yu et al., arXiv 2311.03099, equations 1 to 3): drop entries at random, rescale the rest, add.

    ``m_t ~ Bernoulli(drop)`` for each entry; ``tau_t = (1 - m_t) * tau_t / (1 - drop)``; ``tau = sum_t w_t tau_t``.
    With ``elect`` the sum is TIES's: elected signs and the mean of what agrees.

    Which entries drop follows from `seed`, the adapter's place in the list, the weight's name and the entry alone: the
    same on every machine.

    Args:
        drop: the probability with which an entry is dropped, in [0, 1).
        seed: a number that stands for the draw.
        adapters, base, weights, alpha: as in `ties`.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"dare: drop must be at least 0 and below 1, got {drop!r}")
    deltas, factors = _deltas("dare", adapters, base, weights)
    kept = [_dropped(delta, drop, seed, number) for number, delta in enumerate(deltas)]
    about = {"method": "dare", "drop": drop, "seed": seed, "elect": elect, "weights": factors}
    return _merged(kept, factors, _agreeing if elect else _sum, alpha, about)


def _deltas(
    name: str, adapters: Sequence[Adapter], base: Source, weights: Sequence[float] | None
) -> tuple[list[Adapter], list[float]]:
    if not adapters:
        raise ValueError(f"{name}: give at least one adapter")
    factors = [adapter.alpha for adapter in adapters] if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(adapters) or not all(map(math.isfinite, factors)):
        raise ValueError(f"{name}: weights must be {len(adapters)} finite numbers, one for each adapter, got {weights}")
    return [adapter.to_delta(base) for adapter in adapters], factors


def _trimmed(delta: Adapter, density: float) -> Adapter:
    """The entries of the largest magnitude; the others are zero."""
    values = [entry.values.detach().cpu() for entry in delta.weights.values()]
    sizes = torch.cat([value.abs().to(torch.float64) for value in values])
    # A stable sort: among equals, the first stay.
    order = torch.argsort(sizes, descending=True, stable=True)[: max(1, round(density * len(sizes)))]
    keep = torch.zeros(len(sizes), dtype=torch.bool, device="cpu")
    keep[order] = True
    kept = [value.where(mask, 0) for value, mask in zip(values, keep.split(list(map(len, values))), strict=True)]
    return _with_values(delta, kept)


def _dropped(delta: Adapter, drop: float, seed: int, number: int) -> Adapter:
    """Each entry is zero with the probability `drop`, the others grow by as much as that takes away."""
    kept = []
    for name, entry in delta.weights.items():
        entries = refine(entry.indices.cpu(), entry.granule, 1, entry.numel).numpy().astype(np.uint64)
        key = splitmix64(splitmix64((seed & _WORD) ^ fnv1a64(name)) ^ (number + 1))
        keep = torch.from_numpy(_uniform(key, entries) >= drop)
        kept.append((entry.values.detach().cpu() / (1 - drop)).where(keep, 0))
    return _with_values(delta, kept)


def _uniform(key: int, counters: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """The numbers of these counters in [0, 1): the outputs of a SplitMix64 generator that started at `key`."""
    z = (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _with_values(delta: Adapter, values: Sequence[Tensor]) -> Adapter:
    entries = zip(delta.weights.items(), values, strict=True)
    return Adapter({name: replace(entry, values=value) for (name, entry), value in entries}, delta=True)


@dataclass(eq=False)
class _Meeting:
    """The adapters' entries of one weight."""

    name: str
    parts: list[tuple[float, Entry]]

    def rows(self) -> tuple[int, Tensor, Tensor]:
        """The common granule, the union of the indices, and a row of values for each adapter, 0 where it has none."""
        granule = math.gcd(*(entry.granule for _, entry in self.parts))
        lists = [refine(entry.indices.cpu(), entry.granule, granule, entry.numel) for _, entry in self.parts]
        indices, offsets, sources = shira_ops.fuse_plan(lists, granule=granule)
        union = torch.arange(indices.numel(), device="cpu").repeat_interleave(offsets.diff().to(torch.int64))
        dtype = torch.float64 if self.parts[0][1].dtype == torch.float64 else torch.float32
        rows = torch.zeros(len(self.parts), indices.numel(), granule, dtype=dtype, device="cpu")
        for number, (factor, entry) in enumerate(self.parts):
            mine = sources >> 48 == number
            values = entry.values.detach().cpu().to(dtype).view(-1, granule)
            rows[number, union[mine]] = values[sources[mine] & (2**48 - 1)] * factor
        return granule, indices, rows


def _sum(rows: Tensor) -> Tensor:
    total = torch.zeros_like(rows[0])
    for row in rows:  # in the adapters' order, which a reduction does not promise
        total += row
    return total


def _agreeing(rows: Tensor) -> Tensor:
    """The mean of what has the elected sign."""
    agrees = rows.sign() == _sum(rows).sign()
    return _sum(rows.where(agrees, 0)) / agrees.sum(0).clamp_(min=1)


def _merged(
    deltas: Sequence[Adapter],
    factors: Sequence[float],
    merge: Callable[[Tensor], Tensor],
    alpha: float,
    about: Mapping[str, object],
) -> Adapter:
    meetings: list[_Meeting] = []
    under: dict[str, _Meeting] = {}  # by every name a tied weight has
    for factor, delta in zip(factors, deltas, strict=True):
        for name, entry in delta.weights.items():
            names = (name, *entry.aliases)
            meeting = next((under[one] for one in names if one in under), None)
            if meeting is None:
                meeting = _Meeting(name, [])
                meetings.append(meeting)
            under.update(dict.fromkeys(names, meeting))
            meeting.parts.append((factor, entry))
    entries: dict[str, Entry] = {}
    for meeting in meetings:
        granule, indices, rows = meeting.rows()
        values = merge(rows)
        changes = (values != 0).any(1)  # NaN counts
        first = meeting.parts[0][1]
        aliases = dict.fromkeys(name for name, one in under.items() if one is meeting and name != meeting.name)
        if bool(changes.any()):
            entries[meeting.name] = Entry(
                indices[changes].contiguous(),
                values[changes].view(-1),
                first.shape,
                first.dtype,
                granule,
                next((entry.fingerprint for _, entry in meeting.parts if entry.fingerprint is not None), None),
                None,
                tuple(aliases),
                checked=True,
            )
    return Adapter(entries, alpha=alpha, delta=True, provenance={"merge": dict(about)})
