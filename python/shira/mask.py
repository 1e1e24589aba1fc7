"""Masks: which entries of a weight an adapter may change.

A mask is called with a weight's name and the weight and gives the ``indices`` of its granules, strictly increasing.
The budget is either ``density`` (share of the weight's entries, in (0, 1]) or ``r`` (PEFT's budget: ``r * (m + n)``
entries of an ``m x n`` weight). A weight of ``numel`` entries gives

    k = max(1, round(density * numel / granule))        granules of `granule` consecutive entries,

or ``k = max(1, round(r * (m + n) / granule))``, and never more granules than it has. A weight of more than two
dimensions counts as ``m = shape[0]`` rows of ``n = numel / m`` entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import shira_ops

__all__ = ["DEFAULT_SEED", "Mask", "Rand", "Struct", "WeightMagnitude", "fnv1a64", "splitmix64"]

DEFAULT_SEED = 0
"""Seed of masks that draw, unless one is given: a mask is the same wherever it is made."""

_WORD = 2**64 - 1


def splitmix64(x: int) -> int:
    """The mixer of 64-bit words that the ops use too."""
    z = (x + 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


def fnv1a64(text: str) -> int:
    """FNV-1a of the text's UTF-8 bytes, 64 bits."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & _WORD
    return value


def signed(word: int) -> int:
    """A 64-bit word as the int64 that an op's argument holds."""
    return word - 2**64 if word >= 2**63 else word


def index_dtype(granules: int) -> torch.dtype:
    """int32 while every granule number fits, else int64."""
    return torch.int32 if granules < 2**31 else torch.int64


def refine(indices: Tensor, granule: int, finer: int, numel: int) -> Tensor:
    """The same entries of a weight of ``numel`` as granules of a divisor of the granule."""
    parts = granule // finer
    if parts == 1:
        return indices
    dtype = index_dtype(numel // finer)
    steps = torch.arange(parts, dtype=dtype, device=indices.device)
    return (indices.to(dtype).unsqueeze(1) * parts + steps).view(-1)


def rows_and_columns(weight: Tensor) -> tuple[int, int]:
    """``m`` and ``n`` of a weight, more than two dimensions folded into the columns."""
    if weight.dim() == 0:
        return 1, 1
    rows = weight.shape[0]
    return rows, weight.numel() // rows if rows else 0


class Mask:
    """What every mask shares: the budget, the granule, the description. Subclasses give ``select``."""

    def __init__(self, density: float | None = None, *, r: int | None = None, granule: int = 1) -> None:
        kind = type(self).__name__
        if (density is None) == (r is None):
            raise ValueError(f"{kind}: give density or r, one of the two, got density {density!r} and r {r!r}")
        if density is not None and not 0 < density <= 1:
            raise ValueError(f"{kind}: density must be above 0 and at most 1, got {density!r}")
        if r is not None and (type(r) is not int or r < 1):
            raise ValueError(f"{kind}: r must be a whole number of at least 1, got {r!r}")
        if type(granule) is not int or granule < 1:
            raise ValueError(f"{kind}: granule must be a whole number of at least 1, got {granule!r}")
        self.density = None if density is None else float(density)
        self.r = r
        self.granule = granule

    def count(self, weight: Tensor) -> int:
        """``k``, the number of granules this mask may take of the weight."""
        if self.density is not None:
            entries = self.density * weight.numel()
        else:
            assert self.r is not None
            entries = self.r * sum(rows_and_columns(weight))
        return min(max(1, round(entries / self.granule)), weight.numel() // self.granule)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse weights this mask cannot serve, all of them in one error."""
        offending = [
            f"{name} {list(weight.shape)}"
            for name, weight in weights.items()
            if weight.numel() == 0 or (weight.shape[-1] if weight.dim() else 1) % self.granule
        ]
        if offending:
            raise ValueError(
                f"{type(self).__name__}: granule {self.granule} must divide the last dimension of every weight, "
                f"and none may be empty; not so for {len(offending)} of {len(weights)}: {', '.join(offending)}"
            )

    def select(self, name: str, weight: Tensor) -> Tensor:
        """The indices for one weight that ``check`` has passed."""
        raise NotImplementedError

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        self.check({name: weight})
        with torch.no_grad():
            return self.select(name, weight)

    def seed_for(self, name: str) -> int | None:
        """The seed that stands for this weight's indices (``shira_ops.select_random``), if one does."""
        return None

    def describe(self) -> dict[str, Any]:
        """What the mask is, in JSON's types: for an adapter's metadata, for equality, for ``repr``."""
        budget = {"density": self.density} if self.r is None else {"r": self.r}
        return {"name": type(self).__name__, **budget, "granule": self.granule}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.describe() == other.describe()

    def __hash__(self) -> int:
        return hash(tuple(self.describe().items()))

    def __repr__(self) -> str:
        inside = ", ".join(f"{key}={value!r}" for key, value in self.describe().items() if key != "name")
        return f"{type(self).__name__}({inside})"


class Rand(Mask):
    """Granules drawn at random, exactly ``k`` of each weight.

    The draw of a weight is ``shira_ops.select_random`` with the seed ``splitmix64(seed ^ fnv1a64(name))``: different
    for every weight, and the same on every machine, so that a file can hold the seed in place of the indices.
    """

    def __init__(
        self, density: float | None = None, *, r: int | None = None, granule: int = 1, seed: int = DEFAULT_SEED
    ) -> None:
        super().__init__(density, r=r, granule=granule)
        if type(seed) is not int:
            raise ValueError(f"Rand: seed must be a whole number, got {seed!r}")
        self.seed = seed & _WORD

    def seed_for(self, name: str) -> int:
        return splitmix64(self.seed ^ fnv1a64(name))

    def select(self, name: str, weight: Tensor) -> Tensor:
        return shira_ops.select_random(
            weight.numel(), self.count(weight), signed(self.seed_for(name)), device=weight.device, granule=self.granule
        )

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "seed": self.seed}


class WeightMagnitude(Mask):
    """The granules of largest magnitude (the paper's WM): top ``k`` by the sum of ``|w|``, ties to the lower index."""

    def select(self, name: str, weight: Tensor) -> Tensor:
        return shira_ops.select_top(weight.detach(), None, self.count(weight), score="magnitude", granule=self.granule)


class Struct(Mask):
    """Every f-th row (or column) and the diagonal: rank 1 plus a sparse part of high rank.

    Of an ``m x n`` weight (more dimensions folded into the columns) the mask takes

    - the diagonal: the entries ``(j * m // n, j)`` for every column ``j``, ``n`` of them;
    - ``lines="rows"``: every row ``i`` with ``i % f == 0``;
      ``lines="columns"``: every column ``j`` with ``j % f == 0``;

    and completes each of these entries to the granule it lies in. ``f`` is the smallest number in ``1 .. m``
    (``1 .. n`` for columns) whose mask has at most ``k`` granules, so the budget is kept; where even one line and the
    diagonal have more, ``f`` is ``m`` (``n``) and the mask is that line and the diagonal. `SparseTuner.summary` shows
    what was taken.
    """

    def __init__(
        self, density: float | None = None, *, r: int | None = None, granule: int = 1, lines: str = "rows"
    ) -> None:
        super().__init__(density, r=r, granule=granule)
        if lines not in ("rows", "columns"):
            raise ValueError(f'Struct: lines must be "rows" or "columns", got {lines!r}')
        self.lines = lines

    def check(self, weights: Mapping[str, Tensor]) -> None:
        super().check(weights)
        flat = [f"{name} {list(weight.shape)}" for name, weight in weights.items() if weight.dim() < 2]
        if flat:
            raise ValueError(f"Struct: every weight must have rows and columns; not so for {', '.join(flat)}")

    def _plan(self, weight: Tensor) -> tuple[int, Tensor, Tensor]:
        """f, the selected lines (bool; rows, or columns of granules) and the diagonal's granules."""
        m, n = rows_and_columns(weight)
        width = n // self.granule
        column = torch.arange(n, dtype=torch.int64)
        diagonal = torch.unique(column * m // n * width + column // self.granule)
        rows = self.lines == "rows"
        most, across = (m, width) if rows else (n, m)
        of_diagonal = diagonal // width if rows else diagonal % width
        budget = self.count(weight)

        def lines(f: int) -> Tensor:
            chosen = torch.zeros(m if rows else width, dtype=torch.bool)
            chosen[torch.arange(0, most, f) // (1 if rows else self.granule)] = True
            return chosen

        # No smaller f can do: its lines alone have more granules than the budget.
        first = max(1, -(-most // max(1, budget // across)))
        if not rows and self.granule > 1:
            first = 1 if first <= self.granule else first
        for f in range(first, most + 1):
            chosen = lines(f)
            if int(chosen.sum()) * across + int((~chosen[of_diagonal]).sum()) <= budget:
                return f, chosen, diagonal
        return most, lines(most), diagonal

    def step(self, weight: Tensor) -> int:
        """``f`` for this weight."""
        return self._plan(weight)[0]

    def select(self, name: str, weight: Tensor) -> Tensor:
        _, chosen, diagonal = self._plan(weight)
        m, n = rows_and_columns(weight)
        width = n // self.granule
        taken = torch.zeros(m, width, dtype=torch.bool)
        if self.lines == "rows":
            taken[chosen] = True
        else:
            taken[:, chosen] = True
        flat = taken.view(-1)
        flat[diagonal] = True
        return flat.nonzero().squeeze(1).to(device=weight.device, dtype=index_dtype(m * width))

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "lines": self.lines}
