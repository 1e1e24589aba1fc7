"""Combining adapters so that they disturb each other less: TIES, DARE and magnitude pruning.

``Switcher.activate({"a": 0.7, "b": 0.5})`` simply adds adapters up. These functions make one new adapter of several. It
is a delta, whose values are added to the base, and can be switched and mixed like any other::

    merged = shira.combine.ties([style, edges], model, density=0.5)
    switcher.add("merged", merged)
    switcher.activate("merged", alpha=0.8)          # the papers' lambda

A task vector is what an adapter adds: ``tau = values - base`` at its entries, 0 elsewhere. Arithmetic is fp32 (fp64 for
fp64 weights), contributions are added in the adapters' order, and equal magnitudes are ordered by a fixed rule: the
same adapters always give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import shira_ops
from shira._granules import WORD, fnv1a64, refine, splitmix64
from shira._text import named, real, share, shown, strength, whole
from shira.adapter._checkpoint import Source
from shira.adapter._entry import Entry
from shira.adapter.adapter import Adapter, check_adapters
from shira_ops import plan

__all__ = ["dare", "magnitude_prune", "ties"]


Style: TypeAlias = Literal["paper", "peft"]
# Merges the adapters' values (0 where one has none) by their weights.
Merge: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def ties(
    adapters: Sequence[Adapter],
    base: Source,
    weights: Sequence[float] | None = None,
    *,
    density: float = 0.2,
    style: Style = "paper",
    alpha: float = 1.0,
    check_finite: bool = True,
) -> Adapter:
    """TIES-Merging (Yadav et al., arXiv 2306.01708, algorithm 1): trim, elect signs, merge what agrees.

    1. Trim: of each task vector ``tau_t`` the share ``density`` of its entries with the largest magnitude stays, over
       all weights together: ``max(1, round(density * nnz))`` entries (of equal ones the first).
    2. Elect: ``gamma = sgn(sum_t w_t tau_t)`` for each entry.
    3. Disjoint merge: ``tau = mean of w_t tau_t over the t with sgn(w_t tau_t) = gamma``. An entry whose signs cancel
       (``gamma = 0``) stays the base's.

    The paper has ``w_t = 1`` and dense task vectors; here ``density`` is a share of the adapter's own entries.
    ``style="peft"`` is the formula of PEFT's ``combination_type="ties"``, which differs:

    ======== ================================================== =================================================
    step     "paper"                                            "peft"
    ======== ================================================== =================================================
    trim     over all weights together                          each weight by itself, ``int(density * nnz)``
    elect    weighted: a negative weight takes an adapter away  unweighted: weights have no say in the sign
    cancel   the entry stays the base's                         counts as positive
    ======== ================================================== =================================================

    Args:
        adapters: at least one. Those that hold new values become deltas first (`Adapter.to_delta`).
        base: the model they were made for, as it is without adapters: a module, a state dict or a path. Another base is
            refused.
        weights: the ``w_t``; by default each adapter's alpha.
        density: the share of entries that trimming keeps, in (0, 1].
        style: ``"paper"`` or ``"peft"``.
        alpha: the merged adapter's strength, the paper's lambda.
        check_finite: refuse NaN and infinity in the adapters and in the result.

    Returns a delta adapter with fp32 values (fp64 for fp64 weights). Raises `AdapterError` if an adapter does not fit
    the base or is not finite, and `ValueError` for numbers out of range.
    """
    density = share("ties: density", density)
    _check_style("ties", style)
    deltas, factors = _deltas("ties", adapters, base, weights, check_finite)
    trimmed = [_trimmed(delta, density, alone=style == "peft") for delta in deltas]
    about = {"method": "ties", "density": density, "style": style, "weights": factors}
    return _merged("ties", trimmed, factors, _AGREEING[style], alpha, about, check_finite)


def dare(
    adapters: Sequence[Adapter],
    base: Source,
    weights: Sequence[float] | None = None,
    *,
    drop: float = 0.9,
    seed: int = 0,
    elect: bool = False,
    style: Style = "paper",
    alpha: float = 1.0,
    check_finite: bool = True,
) -> Adapter:
    """DARE (Yu et al., arXiv 2311.03099, equations 1 to 3): drop entries at random, rescale the rest, and add them up.

    ``m_t ~ Bernoulli(drop)`` for each entry; ``tau_t = (1 - m_t) * tau_t / (1 - drop)``; ``tau = sum_t w_t tau_t``.
    With ``elect`` the sum is that of TIES: signs are elected, and the values that agree are averaged. PEFT calls these
    ``"dare_linear"`` and ``"dare_ties"``, and its ``density`` is ``1 - drop``.

    Which entries are dropped depends only on `seed`, the adapter's place in the list, the weight's name and the entry,
    and so is the same on every machine.

    Args:
        drop: the probability with which an entry is dropped, in [0, 1).
        seed: the seed of the draw.
        style: how ``elect`` elects, as in `ties`; without it both styles are the same.
        adapters, base, weights, alpha, check_finite: as in `ties`.
    """
    probability = real(drop)
    if not 0 <= probability < 1:
        raise ValueError(f"dare: drop must be at least 0 and below 1, got {shown(drop)}")
    whole("dare: seed", seed)
    _check_style("dare", style)
    deltas, factors = _deltas("dare", adapters, base, weights, check_finite)
    kept = [_dropped(delta, probability, seed, number) for number, delta in enumerate(deltas)]
    about = {"method": "dare", "drop": probability, "seed": seed, "elect": bool(elect), "weights": factors}
    if elect:
        about["style"] = style
    return _merged("dare", kept, factors, _AGREEING[style] if elect else _total, alpha, about, check_finite)


def magnitude_prune(
    adapters: Sequence[Adapter],
    base: Source,
    weights: Sequence[float] | None = None,
    *,
    density: float = 0.2,
    alpha: float = 1.0,
    check_finite: bool = True,
) -> Adapter:
    """Magnitude pruning, PEFT's ``"magnitude_prune"``: the sum of each adapter's largest entries of each weight.

    Of each weight the ``int(density * nnz)`` entries of the largest magnitude stay (of equal ones the first), which may
    be none. ``tau = sum_t w_t tau_t``.

    Args:
        density: the share of entries that stays, in (0, 1].
        adapters, base, weights, alpha, check_finite: as in `ties`.
    """
    density = share("magnitude_prune: density", density)
    deltas, factors = _deltas("magnitude_prune", adapters, base, weights, check_finite)
    pruned = [_trimmed(delta, density, alone=True) for delta in deltas]
    about = {"method": "magnitude_prune", "density": density, "weights": factors}
    return _merged("magnitude_prune", pruned, factors, _total, alpha, about, check_finite)


def _check_style(name: str, style: str) -> None:
    if not isinstance(style, str) or style not in _AGREEING:
        raise ValueError(f"{name}: style must be {' or '.join(map(repr, _AGREEING))}, got {shown(style)}")


def _deltas(
    name: str, adapters: Sequence[Adapter], base: Source, weights: Sequence[float] | None, check_finite: bool
) -> tuple[list[Adapter], list[float]]:
    adapters = check_adapters(name, adapters)
    given: Any = [adapter.alpha for adapter in adapters] if weights is None else weights
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping)):
        given = list(given)
    if not isinstance(given, list) or len(given) != len(adapters):
        raise ValueError(f"{name}: weights must be {len(adapters)} numbers, one for each adapter, got {shown(given)}")
    factors = [strength(f"{name}: the weight of adapter {number}", one) for number, one in enumerate(given, 1)]
    deltas = [adapter.to_delta(base) for adapter in adapters]
    if check_finite:
        for number, delta in enumerate(deltas, 1):
            for key, entry in delta.weights.items():
                entry.check_finite(f"{name}: weight {named(key)} of adapter {number}")
    return deltas, factors


def _trimmed(delta: Adapter, density: float, *, alone: bool) -> Adapter:
    """Keeps the largest entries by magnitude, of all weights together or of each `alone`; the others become zero."""
    values = [entry.values.detach().cpu() for entry in delta.weights.values()]
    if alone:
        return _with_values(delta, [value.where(_largest(value, int(density * len(value))), 0) for value in values])
    sizes = torch.cat([value.to(torch.float64) for value in values])
    keep = _largest(sizes, max(1, round(density * len(sizes)))).split(list(map(len, values)))
    return _with_values(delta, [value.where(mask, 0) for value, mask in zip(values, keep, strict=True)])


def _largest(values: Tensor, count: int) -> Tensor:
    """Marks the values of the largest magnitude; of equal ones, the first."""
    keep = torch.zeros(len(values), dtype=torch.bool, device="cpu")
    keep[torch.argsort(values.abs(), descending=True, stable=True)[:count]] = True
    return keep


def _dropped(delta: Adapter, drop: float, seed: int, number: int) -> Adapter:
    """Sets each entry to zero with probability `drop`, and scales the others up by ``1 / (1 - drop)``."""
    kept = []
    for name, entry in delta.weights.items():
        entries = refine(entry.indices.cpu(), entry.granule, 1, entry.numel).numpy().astype(np.uint64)
        key = splitmix64(splitmix64((seed & WORD) ^ fnv1a64(name)) ^ (number + 1))
        keep = torch.from_numpy(_uniform(key, entries) >= drop)
        kept.append((entry.values.detach().cpu() / (1 - drop)).where(keep, 0))
    return _with_values(delta, kept)


def _uniform(key: int, counters: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Random numbers in [0, 1), one for each counter: the outputs of a SplitMix64 generator that started at `key`."""
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

    def rows(self) -> tuple[int, Tensor, Tensor, Tensor]:
        """The common granule, the union of the indices, a row of values for each adapter, 0 where it has none, and the
        adapters' weights."""
        granule = math.gcd(*(entry.granule for _, entry in self.parts))
        lists = [refine(entry.indices.cpu(), entry.granule, granule, entry.numel) for _, entry in self.parts]
        indices, offsets, sources, members = shira_ops.fuse_plan(lists, granule=granule)
        dtype = torch.float64 if self.parts[0][1].dtype == torch.float64 else torch.float32
        rows = torch.zeros(len(self.parts), indices.numel(), granule, dtype=dtype, device="cpu")
        places = plan.rows(offsets, sources, members, len(self.parts))
        for row, place, (_, entry) in zip(rows, places, self.parts, strict=True):
            row[place] = entry.values.detach().cpu().to(dtype).view(-1, granule)
        factors = torch.tensor([factor for factor, _ in self.parts], dtype=dtype, device="cpu").view(-1, 1, 1)
        return granule, indices, rows, factors


def _sum(rows: Tensor) -> Tensor:
    total = torch.zeros_like(rows[0])
    for row in rows:  # in the adapters' order; torch does not promise the order of a reduction
        total += row
    return total


def _total(rows: Tensor, factors: Tensor) -> Tensor:
    return _sum(rows * factors)


def _agreeing(rows: Tensor, factors: Tensor) -> Tensor:
    """The mean of the values that have the elected sign."""
    rows = rows * factors
    return _mean(rows, rows.sign() == _sum(rows).sign())


def _agreeing_unweighted(rows: Tensor, factors: Tensor) -> Tensor:
    """PEFT's way: weights do not count in the election, and a draw is positive."""
    return _mean(rows * factors, rows.sign() == torch.where(_sum(rows) >= 0, 1, -1))


def _mean(rows: Tensor, agrees: Tensor) -> Tensor:
    return _sum(rows.where(agrees, 0)) / agrees.sum(0).clamp_(min=1)


_AGREEING: dict[str, Merge] = {"paper": _agreeing, "peft": _agreeing_unweighted}


def _merged(
    method: str,
    deltas: Sequence[Adapter],
    factors: Sequence[float],
    merge: Merge,
    alpha: float,
    about: Mapping[str, object],
    check_finite: bool,
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
        granule, indices, rows, weights = meeting.rows()
        values = merge(rows, weights)
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
            if check_finite:
                entries[meeting.name].check_finite(f"{method}: weight {named(meeting.name)}, merged")
    return Adapter(entries, alpha=alpha, delta=True, provenance={"merge": dict(about)})
