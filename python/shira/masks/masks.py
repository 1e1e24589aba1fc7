"""Masks: which entries of a weight an adapter may change. The five of arXiv 2406.13175, section 3.1 and appendix B.

A mask is called with a weight's name and the weight and gives the ``indices`` of its granules, strictly increasing.
The budget is either ``density`` (share of the weight's entries, in (0, 1]) or ``r`` (PEFT's budget: ``r * (m + n)``
entries of an ``m x n`` weight). A weight of ``numel`` entries gives

    k = max(1, round(density * numel / granule))        granules of `granule` consecutive entries,

or ``k = max(1, round(r * (m + n) / granule))``, and never more granules than it has. A weight of more than two
dimensions counts as ``m = shape[0]`` rows of ``n = numel / m`` entries.

Masks take

- ``density`` and ``r`` as a number, or by name, ``{"q_proj": 0.02, ".*": 0.01}``: regular expressions searched in the
  weight's name, of which the first that is found counts; a weight that none is found in is refused;
- ``granule`` as a number, which must divide the last dimension of every weight, or ``"auto"``: for each weight the
  largest of 16, 8, 4, 2 and 1 that divides its last dimension;
- ``balanced`` (those that score entries): of every row as many, instead of the best of the whole weight;
- ``skip``: an adapter or a mask, or several, whose entries are left out, so that the new mask does not overlap them
  (the paper's non-overlap variants: the next 1 % beside the first). A granule that holds any such entry is left out as
  a whole, and the mask takes its ``k`` of the others.

A mask of your own needs no class: `Given` takes 0/1 tensors by name, or a function that makes them.
"""

from __future__ import annotations

import bisect
import json
import math
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, Union

import torch
from torch import Tensor, nn

import shira_ops
from shira import _model
from shira._granules import fnv1a64, index_dtype, regranule, signed, splitmix64
from shira.masks import calibration as _calibration
from shira_ops.reference import granule_scores

if TYPE_CHECKING:
    from shira.adapter._entry import Entry
    from shira.adapter.adapter import Adapter

__all__ = [
    "DEFAULT_SEED",
    "Given",
    "Grad",
    "Mask",
    "Rand",
    "Snip",
    "Struct",
    "WeightMagnitude",
    "default",
    "from_description",
]

Density: TypeAlias = float | Mapping[str, float]
Rank: TypeAlias = int | Mapping[str, int]
Granule: TypeAlias = int | Literal["auto"]
Skip: TypeAlias = Union["Mask", "Adapter", Sequence[Union["Mask", "Adapter"]]]

DEFAULT_SEED = 0
"""Seed of masks that draw, unless one is given: a mask is the same wherever it is made."""

AUTO_GRANULE = 16
"""The largest granule that ``granule="auto"`` takes, a power of two."""

_WORD = 2**64 - 1
_N = TypeVar("_N", float, int)


def rows_and_columns(weight: Tensor) -> tuple[int, int]:
    """``m`` and ``n`` of a weight, more than two dimensions folded into the columns."""
    if weight.dim() == 0:
        return 1, 1
    rows = weight.shape[0]
    return rows, weight.numel() // rows if rows else 0


def _is_number(value: object) -> bool:
    """Python's and numpy's real numbers; True is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _last(weight: Tensor) -> int:
    """The size of the last dimension."""
    return weight.shape[-1] if weight.dim() else 1


def _numbers(kind: str, what: str, given: Any) -> tuple[Any, ...]:
    """The numbers of an argument that is one, or None, or has them by name."""
    if not isinstance(given, Mapping):
        return () if given is None else (given,)
    if not given:
        raise ValueError(f"{kind}: {what} must name a pattern, got {given!r}")
    for pattern in given:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"{kind}: {what} {pattern!r} is not a regular expression: {error}") from error
    return tuple(given.values())


def _by_name(given: _N | dict[str, _N] | None, name: str) -> _N | None:
    """The number of the first pattern that is found in the name."""
    if not isinstance(given, dict):
        return given
    return next((number for pattern, number in given.items() if re.search(pattern, name)), None)


def _skipped(kind: str, skip: Skip) -> tuple[Mask | Adapter, ...]:
    several = tuple(skip) if isinstance(skip, Sequence) else (skip,)
    for one in several:
        if not isinstance(one, Mask) and not isinstance(getattr(one, "weights", None), Mapping):
            raise TypeError(f"{kind}: skip must be adapters or masks, got {type(one).__name__}")
    return several


def _entry_of(adapter: Adapter, name: str) -> Entry | None:
    """What an adapter has for a weight, under its own or another name."""
    for first, entry in adapter.weights.items():
        if name == first or name in entry.aliases:
            return entry
    return None


class Mask:
    """What every mask shares: budget, granule, what is left out, description. Subclasses give ``select``."""

    def __init__(
        self, density: Density | None = None, *, r: Rank | None = None, granule: Granule = 1, skip: Skip = ()
    ) -> None:
        kind = type(self).__name__
        if (density is None) == (r is None):
            raise ValueError(f"{kind}: give density or r, one of the two, got density {density!r} and r {r!r}")
        for share in _numbers(kind, "density", density):
            if not (_is_number(share) and 0 < share <= 1):
                raise ValueError(f"{kind}: density must be above 0 and at most 1, got {share!r}")
        for rank in _numbers(kind, "r", r):
            if type(rank) is not int or rank < 1:
                raise ValueError(f"{kind}: r must be a whole number of at least 1, got {rank!r}")
        self.density: float | dict[str, float] | None = None
        if isinstance(density, Mapping):
            self.density = {pattern: float(share) for pattern, share in density.items()}
        elif density is not None:
            self.density = float(density)
        self.r: int | dict[str, int] | None = dict(r) if isinstance(r, Mapping) else r
        self._set(granule, skip)

    def _set(self, granule: Granule, skip: Skip) -> None:
        """What a mask without a budget has too."""
        kind = type(self).__name__
        if granule != "auto" and (type(granule) is not int or granule < 1):
            raise ValueError(f'{kind}: granule must be a whole number of at least 1, or "auto", got {granule!r}')
        self.granule: Granule = granule
        self.skip = _skipped(kind, skip)

    def granule_of(self, weight: Tensor) -> int:
        """The granule for this weight."""
        if self.granule == "auto":
            return math.gcd(_last(weight), AUTO_GRANULE)
        return self.granule

    def density_of(self, name: str) -> float | None:
        """The density for the weight of this name; None where the budget is ``r``, or no pattern is found in it."""
        return _by_name(self.density, name)

    def r_of(self, name: str) -> int | None:
        """``r`` for the weight of this name; None where the budget is ``density``, or no pattern is found in it."""
        return _by_name(self.r, name)

    def count(self, name: str, weight: Tensor) -> int:
        """``k``, the number of granules this mask may take of the weight."""
        density, granule = self.density_of(name), self.granule_of(weight)
        if density is not None:
            entries = density * weight.numel()
        else:
            r = self.r_of(name)
            assert r is not None
            entries = r * sum(rows_and_columns(weight))
        return min(max(1, round(entries / granule)), weight.numel() // granule)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse weights this mask cannot serve, all of them in one error."""
        kind = type(self).__name__
        for name, weight in weights.items():
            foreign = _model.foreign(weight)
            if foreign is not None:
                raise ValueError(f"{kind}: {name} {foreign}")
        empty = [f"{name} {list(weight.shape)}" for name, weight in weights.items() if weight.numel() == 0]
        if empty:
            raise ValueError(f"{kind}: no weight may be empty, got {_model.some(empty)}; leave them out with exclude=")
        offending = [(name, w) for name, w in weights.items() if _last(w) % self.granule_of(w)]
        if offending:
            largest = math.gcd(*(_last(weight) for weight in weights.values()), self.granule_of(offending[0][1]))
            told = _model.some(f"{name} {list(weight.shape)}" for name, weight in offending)
            raise ValueError(
                f"{kind}: granule {self.granule} must divide the last dimension of every weight; "
                f'not so for {len(offending)} of {len(weights)}: {told}; take granule="auto" (of each weight the '
                f"largest up to {AUTO_GRANULE} that divides), or granule={largest}, or leave them out with exclude="
            )
        self._check_budget(weights)
        for other in self.skip:
            if isinstance(other, Mask):
                other.check(weights)
                continue
            for name, weight in weights.items():
                entry = _entry_of(other, name)
                if entry is not None and entry.shape != tuple(weight.shape):
                    raise ValueError(
                        f"{kind}: skip has an adapter for {name} of shape {list(entry.shape)}, "
                        f"and the weight's is {list(weight.shape)}"
                    )

    def _check_budget(self, weights: Mapping[str, Tensor]) -> None:
        unmatched = [name for name in weights if self.density_of(name) is None and self.r_of(name) is None]
        if unmatched:
            what, by_name = ("density", self.density) if self.r is None else ("r", self.r)
            patterns = ", ".join(map(repr, by_name)) if isinstance(by_name, dict) else ""
            raise ValueError(
                f"{type(self).__name__}: {what} has no pattern that is found in {_model.some(unmatched)}; "
                f'it has {patterns}: add a last one, ".*", for all others'
            )

    def prepare(
        self,
        model: nn.Module,
        weights: Mapping[str, Sequence[tuple[nn.Module, str]]],
        calibration: Iterable[Any] | None = None,
        loss: _calibration.Loss | None = None,
    ) -> None:
        """Called once, before the weights are selected from: masks that need gradients collect them here.

        Args:
            model: the model the weights are in; it is as before afterwards.
            weights: a weight's name to every place that holds it, as (module, attribute).
            calibration: batches, for a mask that needs them, or that skips one that does; None for any other.
            loss: see `shira.calibration.stream`.
        """
        needing = [mask for mask in self._with_skipped() if isinstance(mask, _Calibrated)]
        kind = type(self).__name__
        if not needing:
            if calibration is not None or loss is not None:
                given = "calibration batches" if calibration is not None else "loss"
                raise ValueError(f"{kind}: needs no {given}: only Grad and Snip do")
            return
        if calibration is None:
            raise ValueError(f"{kind}: needs calibration batches: SparseTuner(model, mask, calibration=batches)")
        if not weights:
            return
        for mask in needing:
            mask._selected = {}

        def visit(name: str, gradient: Tensor) -> None:
            weight = getattr(*weights[name][0]).detach()
            for mask in needing:  # what is skipped comes first
                mask._selected[name] = mask._choose(name, weight, gradient)

        _calibration.stream(model, weights, calibration, loss, visit)

    def _with_skipped(self) -> Iterator[Mask]:
        """The masks that this one skips, each behind those it skips itself, and then this one."""
        for other in self.skip:
            if isinstance(other, Mask):
                yield from other._with_skipped()
        yield self

    def select(self, name: str, weight: Tensor) -> Tensor:
        """The indices for one weight that ``check`` has passed."""
        raise NotImplementedError

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        self.check({name: weight})
        with torch.no_grad():
            return self.select(name, weight)

    def taken(self, name: str, weight: Tensor) -> Tensor | None:
        """The granules of this mask's size that hold an entry of ``skip``: ascending, int64; None if there are none."""
        found, granule = [], self.granule_of(weight)
        for other in self.skip:
            if isinstance(other, Mask):
                found.append(regranule(other(name, weight), other.granule_of(weight), granule))
            elif (entry := _entry_of(other, name)) is not None:
                entry.check_indices(f"skip, weight {name!r}")
                found.append(regranule(entry.indices.to(weight.device), entry.granule, granule))
        return torch.unique(torch.cat(found)) if found else None

    def _enough(self, name: str, wanted: int, left: int) -> None:
        if left < wanted:
            raise ValueError(
                f"{type(self).__name__}: skip leaves {left} granules of {name}, and the mask takes {wanted}: "
                f"lower the density, or skip less"
            )

    def seed_for(self, name: str) -> int | None:
        """The seed that stands for this weight's indices (``shira_ops.select_random``), if one does."""
        return None

    def describe(self) -> dict[str, Any]:
        """What the mask is, in JSON's types: for an adapter's metadata, for equality, for ``repr``.

        `from_description` makes the mask from it again. An adapter that is skipped is told by the number of its entries
        and a digest of its indices.
        """
        about: dict[str, Any] = {"name": type(self).__name__}
        about |= {"density": self.density} if self.r is None else {"r": self.r}
        about["granule"] = self.granule
        if self.skip:
            about["skip"] = [one.describe() if isinstance(one, Mask) else _about_adapter(one) for one in self.skip]
        return about

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.describe() == other.describe()

    def __hash__(self) -> int:
        return hash(json.dumps(self.describe()))

    def __repr__(self) -> str:
        inside = ", ".join(f"{key}={value!r}" for key, value in self.describe().items() if key != "name")
        return f"{type(self).__name__}({inside})"


def _about_adapter(adapter: Adapter) -> dict[str, Any]:
    lines = [
        f"{name} {entry.granule} {int(shira_ops.fingerprint(entry.indices.to(torch.int64))):x}"
        for name, entry in sorted(adapter.weights.items())
    ]
    return {"name": "Adapter", "nnz": adapter.nnz, "indices": f"{fnv1a64(chr(10).join(lines)):016x}"}


def from_description(description: Mapping[str, Any]) -> Mask:
    """The mask that `Mask.describe` told; not `Given`, nor one that skips adapters: a description holds no entries."""
    about = dict(description)
    name = about.pop("name", None)
    if name == "Given":
        raise ValueError("a description of a Given mask does not hold its entries; give them again: masks.Given(...)")
    kind = {mask.__name__: mask for mask in (Struct, Rand, WeightMagnitude, Grad, Snip)}.get(name)
    if kind is None:
        raise ValueError(f"a mask's description must name one of shira.masks, got {dict(description)!r}")
    about["skip"] = [from_description(one) for one in about.get("skip", ())]
    mask: Mask = kind(**about)
    return mask


class Rand(Mask):
    """Granules drawn at random, exactly ``k`` of each weight.

    The draw of a weight is ``shira_ops.select_random`` with the seed ``splitmix64(seed ^ fnv1a64(name))``: different
    for every weight, and the same on every machine, so that a file can hold the seed in place of the indices. With
    ``skip`` the draw is of the granules that are left, and no seed stands for it.

    Masks of one seed and budget are one mask: two adapters trained with it change the same entries, so that fused they
    get in each other's way everywhere, and of masks of different seeds only a ``density``-th part meets. For adapters
    that are to be used together give each a seed of its own, or ``seed=None``, or ``skip`` the first one's entries.

    Args:
        density, r, granule, skip: as for every mask.
        seed: a whole number; None draws one from torch's random numbers (so ``torch.manual_seed`` repeats it), which
            ``mask.seed`` and `describe` then hold.
    """

    def __init__(
        self,
        density: Density | None = None,
        *,
        r: Rank | None = None,
        granule: Granule = 1,
        seed: int | None = DEFAULT_SEED,
        skip: Skip = (),
    ) -> None:
        super().__init__(density, r=r, granule=granule, skip=skip)
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
        if type(seed) is not int:
            raise ValueError(f"Rand: seed must be a whole number or None, got {seed!r}")
        self.seed = seed & _WORD

    def seed_for(self, name: str) -> int | None:
        return None if self.skip else self._seed(name)

    def _seed(self, name: str) -> int:
        return splitmix64(self.seed ^ fnv1a64(name))

    def select(self, name: str, weight: Tensor) -> Tensor:
        k, taken, granule = self.count(name, weight), self.taken(name, weight), self.granule_of(weight)
        granules = weight.numel() // granule
        free = granules - (0 if taken is None else taken.numel())
        self._enough(name, k, free)
        seed = signed(self._seed(name))
        drawn = shira_ops.select_random(free * granule, k, seed, device=weight.device, granule=granule)
        if taken is None:
            return drawn
        # The j-th free granule is j and as many more as taken ones lie before it: those with at most j free ones
        # before them.
        free_before = taken - torch.arange(taken.numel(), device=taken.device)
        moved = drawn + torch.searchsorted(free_before, drawn.to(torch.int64), right=True)
        return moved.to(index_dtype(granules))

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "seed": self.seed}


def default() -> Rand:
    """The mask to start with: ``Rand(density=0.01, granule="auto")``, granules of 16 entries where those fit.

    Measured (docs/quality.md): a random mask learns as well as any other near the base and better far from it, and
    needs no calibration. Granules of 16 entries switch several times as fast as single entries. They cost nothing that
    could be measured where a weight has 200 granules or more (at 1 %: from about 600 x 600 entries), a twentieth of
    what is learned at 60, and more below: for small weights take a smaller granule or more density. A weight whose last
    dimension 16 does not divide gets granules of 8, 4, 2 or 1; `SparseTuner.summary` tells which.

    The same mask every time, so two adapters trained with it change the same entries: see `Rand`.
    """
    return Rand(density=0.01, granule="auto")


class _Scored(Mask):
    """A mask of the granules that score most: of the whole weight, or ``balanced``, of every row as many."""

    score: str

    def __init__(
        self,
        density: Density | None = None,
        *,
        r: Rank | None = None,
        granule: Granule = 1,
        balanced: bool = False,
        skip: Skip = (),
    ) -> None:
        super().__init__(density, r=r, granule=granule, skip=skip)
        if type(balanced) is not bool:
            raise ValueError(f"{type(self).__name__}: balanced must be True or False, got {balanced!r}")
        self.balanced = balanced
        self._selected: dict[str, Tensor] = {}  # of a calibrated mask, what `prepare` chose

    def _choose(self, name: str, weight: Tensor, gradient: Tensor | None) -> Tensor:
        return self._by_rows(name, weight, gradient) if self.balanced else self._top(name, weight, gradient)

    def _top(self, name: str, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """The top ``k`` granules of those that are not taken."""
        k, taken, score = self.count(name, weight), self.taken(name, weight), self.score
        granule = self.granule_of(weight)
        if taken is None:
            return shira_ops.select_top(weight, gradient, k, score=score, granule=granule)
        granules = weight.numel() // granule
        self._enough(name, k, granules - taken.numel())
        # As many more as are taken: at least k of these are free, and so are the k best of all that are free.
        best = shira_ops.select_top(weight, gradient, k + taken.numel(), score=score, granule=granule)
        free = best[~torch.isin(best, taken, assume_unique=True)]
        if free.numel() == k:
            return free
        few = shira_ops.gather(weight, free, granule=granule)
        few_gradient = None if gradient is None else shira_ops.gather(gradient, free, granule=granule)
        return free[shira_ops.select_top(few, few_gradient, k, score=score, granule=granule)]

    def _by_rows(self, name: str, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """The best granule of every row, the second best of every row, and so on up to ``k``.

        The last round goes to the rows whose next granule scores most; a row that ``skip`` has left too few drops out
        of a round. Takes a score tensor of this one weight, which `select_top` does without.
        """
        k, taken = self.count(name, weight), self.taken(name, weight)
        rows = weight.shape[0] if weight.dim() > 1 else 1
        scores = granule_scores(weight, gradient, self.score, self.granule_of(weight)).view(rows, -1)
        if taken is not None:
            self._enough(name, k, scores.numel() - taken.numel())
            scores.view(-1)[taken] = -math.inf
        free = (scores > -math.inf).sum(1)
        width = scores.shape[1]
        full = bisect.bisect_right(range(width + 1), k, key=lambda rounds: int(free.clamp(max=rounds).sum())) - 1
        counts, best = free.clamp(max=full), scores.topk(min(full + 1, width), dim=1).values
        if full < width:
            following = best[:, full].sort(descending=True, stable=True).indices
            counts[following[: k - int(counts.sum())]] += 1
        least = best.gather(1, (counts - 1).clamp(min=0)[:, None])
        chosen, ties = scores > least, scores == least
        chosen[counts == 0] = False
        wanted = counts - chosen.sum(1)
        # Ties go to the lower index.
        several = (ties.sum(1) > wanted).nonzero().view(-1)
        ties[several] &= ties[several].cumsum(1) <= wanted[several, None]
        return (chosen | ties).view(-1).nonzero().view(-1).to(index_dtype(scores.numel()))

    def describe(self) -> dict[str, Any]:
        about = super().describe()
        return {**about, "balanced": True} if self.balanced else about


class WeightMagnitude(_Scored):
    """The granules of largest magnitude (the paper's WM): top ``k`` by the sum of ``|w|``, ties to the lower index.

    ``balanced=True``: of every row as many.
    """

    score = "magnitude"

    def select(self, name: str, weight: Tensor) -> Tensor:
        return self._choose(name, weight.detach(), None)


class _Calibrated(_Scored):
    """A mask by gradients over calibration batches, which `prepare` runs."""

    def select(self, name: str, weight: Tensor) -> Tensor:
        if name not in self._selected:
            raise ValueError(
                f"{type(self).__name__}: has no gradient of {name}: SparseTuner(model, mask, calibration=batches) "
                f"collects it"
            )
        return self._selected[name]


class Grad(_Calibrated):
    """The granules of largest gradient: top ``k`` by the sum of ``|g|``, ties to the lower index.

    ``g`` is the gradient of the loss summed over all calibration batches, signed, in fp32 (fp64 for fp64 weights):
    ``SparseTuner(model, masks.Grad(density=0.01), calibration=batches)``; `shira.calibration` says how.

    ``balanced=True`` takes as many granules of every row. Of the whole weight the largest gradients are those of the
    few outputs that are most wrong, which far from the base leaves most of the layer untrained (docs/quality.md).
    """

    score = "grad"


class Snip(_Calibrated):
    """The granules whose removal would change the loss most, to first order: top ``k`` by the sum of ``|w * g|``.

    The paper's SNIP, and its overall pick. Ties go to the lower index. ``g`` is the gradient of the loss summed over
    all calibration batches, signed, in fp32 (fp64 for fp64 weights):
    ``SparseTuner(model, masks.Snip(density=0.01), calibration=batches)``; `shira.calibration` says how.
    ``balanced=True``: of every row as many, for the reason that `Grad` has.
    """

    score = "snip"


class Struct(Mask):
    """Every f-th row (or column) and the diagonal: rank 1 plus a sparse part of high rank.

    Of an ``m x n`` weight (more dimensions folded into the columns) the mask takes

    - the diagonal: the entries ``(j * m // n, j)`` for every column ``j``, ``n`` of them;
    - ``lines="rows"``: every row ``i`` with ``i % f == offset % f``;
      ``lines="columns"``: every column ``j`` with ``j % f == offset % f``;

    and completes each of these entries to the granule it lies in. ``f`` is the smallest number in ``1 .. m``
    (``1 .. n`` for columns) whose mask has at most ``k`` granules, so the budget is kept; where even one line and the
    diagonal have more, ``f`` is ``m`` (``n``) and the mask is that line and the diagonal. `SparseTuner.summary` shows
    what was taken.
    """

    def __init__(
        self,
        density: Density | None = None,
        *,
        r: Rank | None = None,
        granule: Granule = 1,
        lines: str = "rows",
        offset: int = 0,
        skip: Skip = (),
    ) -> None:
        super().__init__(density, r=r, granule=granule, skip=skip)
        if lines not in ("rows", "columns"):
            raise ValueError(f'Struct: lines must be "rows" or "columns", got {lines!r}')
        if type(offset) is not int or offset < 0:
            raise ValueError(f"Struct: offset must be a whole number of at least 0, got {offset!r}")
        self.lines = lines
        self.offset = offset

    def check(self, weights: Mapping[str, Tensor]) -> None:
        super().check(weights)
        flat = [f"{name} {list(weight.shape)}" for name, weight in weights.items() if weight.dim() < 2]
        if flat:
            raise ValueError(f"Struct: every weight must have rows and columns; not so for {', '.join(flat)}")

    def _plan(self, name: str, weight: Tensor) -> tuple[int, Tensor, Tensor]:
        """f, the selected lines (bool; rows, or columns of granules) and the diagonal's granules."""
        m, n = rows_and_columns(weight)
        granule = self.granule_of(weight)
        width = n // granule
        column = torch.arange(n, dtype=torch.int64, device="cpu")
        diagonal = torch.unique(column * m // n * width + column // granule)
        rows = self.lines == "rows"
        most, across = (m, width) if rows else (n, m)
        of_diagonal = diagonal // width if rows else diagonal % width
        budget = self.count(name, weight)

        def lines(f: int) -> Tensor:
            chosen = torch.zeros(m if rows else width, dtype=torch.bool, device="cpu")
            chosen[torch.arange(self.offset % f, most, f, device="cpu") // (1 if rows else granule)] = True
            return chosen

        # No smaller f can do: its lines alone have more granules than the budget.
        first = max(1, most // (budget // across + 1) + 1 if self.offset else -(-most // max(1, budget // across)))
        if not rows and granule > 1:
            first = 1 if first <= granule else first
        for f in range(first, most + 1):
            chosen = lines(f)
            if int(chosen.sum()) * across + int((~chosen[of_diagonal]).sum()) <= budget:
                return f, chosen, diagonal
        return most, lines(most), diagonal

    def step(self, name: str, weight: Tensor) -> int:
        """``f`` for this weight."""
        return self._plan(name, weight)[0]

    def select(self, name: str, weight: Tensor) -> Tensor:
        _, chosen, diagonal = self._plan(name, weight)
        m, n = rows_and_columns(weight)
        width = n // self.granule_of(weight)
        taken = torch.zeros(m, width, dtype=torch.bool, device="cpu")
        if self.lines == "rows":
            taken[chosen] = True
        else:
            taken[:, chosen] = True
        flat = taken.view(-1)
        flat[diagonal] = True
        skipped = self.taken(name, weight)
        if skipped is not None:
            flat[skipped.to(flat.device)] = False
            self._enough(name, 1, int(flat.sum()))
        return flat.nonzero().squeeze(1).to(device=weight.device, dtype=index_dtype(m * width))

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "lines": self.lines, "offset": self.offset}


class Given(Mask):
    """The entries that a 0/1 tensor marks: of masks by name, or of a function that makes them.

    ``Given({"layers.0.q_proj.weight": mask})``, or ``Given(lambda name, weight: weight.abs() > 0.1)``. A mask has the
    weight's shape, in bool or in any dtype with nothing but 0 and 1. With a ``granule`` above 1 every marked entry is
    completed to the granule it lies in. `SparseTuner` also takes the mapping or the function itself as its mask.

    Args:
        given: 0/1 tensors by the weights' names, one for each target and no others (a `SparseTuner` without
            ``targets`` trains just these); or a function of a weight's name and the weight. A tied weight goes by its
            first name in the model.
        granule, skip: as for every mask.
    """

    def __init__(
        self,
        given: Mapping[str, Tensor] | Callable[[str, Tensor], Tensor],
        *,
        granule: Granule = 1,
        skip: Skip = (),
    ) -> None:
        if isinstance(given, Mapping):
            if not given:
                raise ValueError("Given: the mapping must have a mask for a weight, got none")
            for name, mask in given.items():
                if not isinstance(name, str) or not isinstance(mask, Tensor):
                    raise TypeError(f"Given: must map names to tensors, got {name!r} to {type(mask).__name__}")
            given = {_model.clean(name): mask for name, mask in given.items()}
        elif not callable(given) or isinstance(given, type):
            what = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
            raise TypeError(f"Given: takes 0/1 tensors by name, or a function of a name and a weight, got {what}")
        self.given, self.density, self.r = given, None, None
        self._set(granule, skip)

    @classmethod
    def of(cls, mask: object) -> Mask:
        """The mask itself, or what stands for one: 0/1 tensors by name, or a function of a name and a weight."""
        if isinstance(mask, Mask):
            return mask
        if isinstance(mask, Mapping) or (callable(mask) and not isinstance(mask, type)):
            return cls(mask)
        got = f"the class {mask.__name__}: call it" if isinstance(mask, type) else type(mask).__name__
        raise TypeError(
            f"SparseTuner: mask must be one of shira.masks, 0/1 tensors by name, or a function of a weight's name and "
            f"the weight, got {got}"
        )

    @property
    def names(self) -> tuple[str, ...] | None:
        """The weights it has masks for; None for a function."""
        return tuple(self.given) if isinstance(self.given, Mapping) else None

    def _check_budget(self, weights: Mapping[str, Tensor]) -> None:
        without = [name for name in weights if isinstance(self.given, Mapping) and name not in self.given]
        if without:
            raise ValueError(
                f"Given: there is no mask for {_model.some(without)}; there are masks for "
                f"{_model.some(self.names or ())}; name just these with targets=, or leave the others out with exclude="
            )

    def prepare(
        self,
        model: nn.Module,
        weights: Mapping[str, Sequence[tuple[nn.Module, str]]],
        calibration: Iterable[Any] | None = None,
        loss: _calibration.Loss | None = None,
    ) -> None:
        unused = [name for name in self.names or () if name not in weights]
        if unused:
            raise ValueError(f"Given: has masks for {_model.some(unused)}, which are not targets: leave them out")
        super().prepare(model, weights, calibration, loss)

    def select(self, name: str, weight: Tensor) -> Tensor:
        mask = self.given[name] if isinstance(self.given, Mapping) else self.given(name, weight)
        if not isinstance(mask, Tensor) or mask.shape != weight.shape:
            got = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"Given: the mask of {name} must be a tensor of shape {list(weight.shape)}, got {got}")
        marked = mask.to(device=weight.device, dtype=torch.bool)
        if mask.dtype != torch.bool and not bool((mask.to(weight.device) == marked).all()):
            raise ValueError(f"Given: the mask of {name} must hold nothing but 0 and 1")
        granule = self.granule_of(weight)
        taken = marked.reshape(-1, granule).any(1)
        skipped = self.taken(name, weight)
        if skipped is not None:
            taken[skipped] = False
        indices = taken.nonzero().squeeze(1).to(index_dtype(taken.numel()))
        if not indices.numel():
            raise ValueError(f"Given: no entry of {name} is left to train; leave it out with exclude=")
        return indices

    def describe(self) -> dict[str, Any]:
        """Of masks by name a digest, of a function its name."""
        about: dict[str, Any] = {"name": "Given", "granule": self.granule}
        if isinstance(self.given, Mapping):
            lines = [
                f"{name} {list(mask.shape)} {int(shira_ops.fingerprint(mask.to(torch.bool).contiguous())):x}"
                for name, mask in sorted(self.given.items())
            ]
            about["entries"] = f"{fnv1a64(chr(10).join(lines)):016x}"
        else:
            about["function"] = getattr(self.given, "__qualname__", type(self.given).__qualname__)
        if self.skip:
            about["skip"] = [one.describe() if isinstance(one, Mask) else _about_adapter(one) for one in self.skip]
        return about

    def __eq__(self, other: object) -> bool:
        if callable(self.given) and not (isinstance(other, Given) and other.given is self.given):
            return False
        return super().__eq__(other)

    __hash__ = Mask.__hash__
