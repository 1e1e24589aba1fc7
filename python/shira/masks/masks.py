"""Masks: which entries of a weight an adapter may change. The five masks of arXiv 2406.13175 (section 3.1, appendix B),
`Principal` after another paper, and `Given` for a rule of your own.

A mask is called with a weight's name and the weight, and returns the ``indices`` of granules, strictly increasing. A
granule is a run of consecutive entries of the flat weight (``granule`` of them), and an index selects one. The budget
is either ``density`` (share of the weight's entries, in (0, 1]) or ``r`` (PEFT's budget: ``r * (m + n)`` entries of an
``m x n`` weight). A weight of ``numel`` entries gives

    k = max(1, round(density * numel / granule))        granules of `granule` consecutive entries,

or ``k = max(1, round(r * (m + n) / granule))``, but never more granules than the weight has. A weight of more than two
dimensions counts as ``m = shape[0]`` rows of ``n = numel / m`` entries.

Masks take

- ``density`` and ``r`` as a number, or by name, ``{"q_proj": 0.02, ".*": 0.01}``: regular expressions that are searched
  in the weight's name. The first that matches counts; a weight that none of them matches is refused;
- ``granule`` as a number, which must divide the last dimension of every weight, or ``"auto"``: for each weight the
  largest of 16, 8, 4, 2 and 1 that divides its last dimension;
- ``balanced`` (masks that score entries): the same number of granules from every row, instead of the best of the whole
  weight;
- ``skip``: one or several adapters or masks whose entries are left out, so that the new mask does not overlap them (the
  paper's non-overlapping variants). A granule that holds any such entry is left out as a whole, and the mask takes its
  ``k`` granules from the others.

A mask of your own does not need a class: `Given` takes 0/1 tensors by name, or a function that makes them.
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
from shira._granules import WORD, fnv1a64, index_dtype, regranule, signed, splitmix64
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
    "Principal",
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
# What a mask by gradients selects of a weight: mask, name, weight, gradient.
Choose: TypeAlias = Callable[["_Scored", str, Tensor, Tensor], Tensor]
Skip: TypeAlias = Union["Mask", "Adapter", Sequence[Union["Mask", "Adapter"]]]

DEFAULT_SEED = 0
"""The seed of random masks, unless another is given, so that a mask is the same wherever it is made."""

AUTO_GRANULE = 16
"""The largest granule that ``granule="auto"`` takes, a power of two."""

_N = TypeVar("_N", float, int)


def rows_and_columns(weight: Tensor) -> tuple[int, int]:
    """``m`` and ``n`` of a weight; dimensions after the first are folded into the columns."""
    if weight.dim() == 0:
        return 1, 1
    rows = weight.shape[0]
    return rows, weight.numel() // rows if rows else 0


def _is_number(value: object) -> bool:
    """Whether it is a real number of Python or numpy; True is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _last(weight: Tensor) -> int:
    """The size of the last dimension."""
    return weight.shape[-1] if weight.dim() else 1


def _numbers(kind: str, what: str, given: Any) -> tuple[Any, ...]:
    """The numbers in an argument that is a number, None, or a mapping of patterns to numbers."""
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
    """The number for a name: that of the first pattern that matches."""
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
    """The adapter's entry for a weight, under any of its names."""
    for first, entry in adapter.weights.items():
        if name == first or name in entry.aliases:
            return entry
    return None


class Mask:
    """What all masks share: budget, granule, entries to leave out, description. Subclasses define ``select``."""

    by_shape = False
    """Whether the mask depends on nothing of a weight but its name, shape and device, so that a quantized one need not
    be dequantized for it, and no device need hold the whole of a sharded one."""

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
        """The arguments that a mask without a budget has, too."""
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
        """The density for the weight of this name; None if the budget is ``r``, or if no pattern matches."""
        return _by_name(self.density, name)

    def r_of(self, name: str) -> int | None:
        """``r`` for the weight of this name; None if the budget is ``density``, or if no pattern matches."""
        return _by_name(self.r, name)

    def count(self, name: str, weight: Tensor) -> int:
        """``k``, the number of granules that this mask takes from the weight."""
        density, granule = self.density_of(name), self.granule_of(weight)
        if density is not None:
            entries = density * weight.numel()
        else:
            r = self.r_of(name)
            assert r is not None
            entries = r * sum(rows_and_columns(weight))
        return min(max(1, round(entries / granule)), weight.numel() // granule)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse the weights that this mask cannot be used for, all of them in one error."""
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
        *,
        choose: Choose | None = None,
    ) -> None:
        """Called once before ``select``: masks that need gradients collect them here.

        Args:
            model: the model that has the weights. It is unchanged afterwards.
            weights: a weight's name to every place that holds it, as (module, attribute).
            calibration: batches, for a mask that needs them or that skips one that does; otherwise None.
            loss: see `shira.masks.calibration.stream`.
            choose: for weights that ranks hold together, what a mask by gradients selects of one.
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
            weight = _calibration.dense(name, *weights[name][0])
            for mask in needing:  # those that are skipped come first
                mask._selected[name] = (choose or _chosen)(mask, name, weight, gradient)

        _calibration.stream(model, weights, calibration, loss, visit)

    @property
    def reads_weights(self) -> bool:
        """Whether this mask, or one that it skips, depends on what a weight holds."""
        return not all(mask.by_shape for mask in self._with_skipped())

    @property
    def _is_calibrated(self) -> bool:
        """Whether this mask, or one that it skips, needs gradients over calibration batches."""
        return any(isinstance(mask, _Calibrated) for mask in self._with_skipped())

    def _with_skipped(self) -> Iterator[Mask]:
        """The masks that this one skips, each after those that it skips itself; this one comes last."""
        for other in self.skip:
            if isinstance(other, Mask):
                yield from other._with_skipped()
        yield self

    def select(self, name: str, weight: Tensor) -> Tensor:
        """The indices for one weight that ``check`` has accepted."""
        raise NotImplementedError

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        self.check({name: weight})
        with torch.no_grad():
            return self.select(name, weight)

    def taken(self, name: str, weight: Tensor) -> Tensor | None:
        """The granules (of this mask's size) that hold an entry of ``skip``: ascending, int64; None if none do."""
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
        """The seed with which ``shira_ops.select_random`` draws this weight's indices, if it does."""
        return None

    def describe(self) -> dict[str, Any]:
        """A description of the mask in JSON's types: for an adapter's metadata, for comparison, for ``repr``.

        `from_description` makes the mask again. An adapter in ``skip`` is described by the number of its entries and a
        digest of its indices.
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


def _chosen(mask: _Scored, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
    return mask._choose(name, weight, gradient)


def _about_adapter(adapter: Adapter) -> dict[str, Any]:
    lines = [
        f"{name} {entry.granule} {int(shira_ops.fingerprint(entry.indices.to(torch.int64))):x}"
        for name, entry in sorted(adapter.weights.items())
    ]
    return {"name": "Adapter", "nnz": adapter.nnz, "indices": f"{fnv1a64(chr(10).join(lines)):016x}"}


def from_description(description: Mapping[str, Any]) -> Mask:
    """The mask of a `Mask.describe`; not a `Given`, or one that skips adapters, whose entries are not in it."""
    about = dict(description)
    name = about.pop("name", None)
    if name == "Given":
        raise ValueError("a description of a Given mask does not hold its entries; give them again: masks.Given(...)")
    kind = {mask.__name__: mask for mask in (Struct, Rand, WeightMagnitude, Principal, Grad, Snip)}.get(name)
    if kind is None:
        raise ValueError(f"a mask's description must name one of shira.masks, got {dict(description)!r}")
    about["skip"] = [from_description(one) for one in about.get("skip", ())]
    mask: Mask = kind(**about)
    return mask


class Rand(Mask):
    """Granules drawn at random, exactly ``k`` from each weight.

    A weight's granules are drawn by ``shira_ops.select_random`` with the seed ``splitmix64(seed ^ fnv1a64(name))``:
    different for every weight, and the same on every machine, so that a file can hold the seed instead of the indices.
    With ``skip`` the draw is among the remaining granules, and a file holds the indices.

    Two masks with the same seed and budget are the same mask: adapters trained with them change the same entries, and
    disturb each other everywhere when they are fused. With different seeds only a share of ``density`` of the entries
    coincides. Give adapters that will be used together different seeds, or ``seed=None``, or ``skip`` the entries of
    the first.

    Args:
        density, r, granule, skip: as for every mask.
        seed: an integer; None draws one from torch's random numbers (so that ``torch.manual_seed`` repeats it), which
            is then in ``mask.seed`` and `describe`.
    """

    by_shape = True

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
        self.seed = seed & WORD

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
        # The j-th free granule is j plus the number of taken granules before it: those that have at most j free ones
        # before them.
        free_before = taken - torch.arange(taken.numel(), device=taken.device)
        moved = drawn + torch.searchsorted(free_before, drawn.to(torch.int64), right=True)
        return moved.to(index_dtype(granules))

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "seed": self.seed}


def default() -> Rand:
    """The mask to start with: ``Rand(density=0.01, granule="auto")``, granules of 16 entries where those fit.

    Measurements (docs/quality.md): a random mask learns as well as any other on tasks near the base and better on tasks
    far from it, and needs no calibration. Granules of 16 entries switch several times as fast as single entries. They
    cost nothing measurable where the mask takes 200 granules or more from a weight (at 1 %: from about 600 x 600
    entries), a twentieth of what is learned at 60, and more below that: for small weights take a smaller granule or a
    higher density. A weight whose last dimension 16 does not divide gets granules of 8, 4, 2 or 1;
    `SparseTuner.summary` lists these.

    It is the same mask every time, so two adapters trained with it change the same entries: see `Rand`.
    """
    return Rand(density=0.01, granule="auto")


class _Scored(Mask):
    """A mask of the granules with the best scores: of the whole weight, or (``balanced``) as many from every row."""

    score: Literal["magnitude", "grad", "snip"]

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
        self._selected: dict[str, Tensor] = {}  # what `prepare` chose, for a calibrated mask

    def _choose(self, name: str, weight: Tensor, gradient: Tensor | None, scored: Tensor | None = None) -> Tensor:
        """The indices for a weight, by its score; or by that of ``scored``, a tensor of the same shape."""
        choose = self._by_rows if self.balanced else self._top
        return choose(name, weight if scored is None else scored, gradient, self.taken(name, weight))

    def _top(self, name: str, weight: Tensor, gradient: Tensor | None, taken: Tensor | None) -> Tensor:
        """The ``k`` best granules among those that are not taken."""
        k, score = self.count(name, weight), self.score
        granule = self.granule_of(weight)
        if taken is None:
            return shira_ops.select_top(weight, gradient, k, score=score, granule=granule)
        granules = weight.numel() // granule
        self._enough(name, k, granules - taken.numel())
        # With as many more as are taken, at least k are free, and the k best free ones are among them.
        best = shira_ops.select_top(weight, gradient, k + taken.numel(), score=score, granule=granule)
        free = best[~torch.isin(best, taken, assume_unique=True)]
        if free.numel() == k:
            return free
        few = shira_ops.gather(weight, free, granule=granule)
        few_gradient = None if gradient is None else shira_ops.gather(gradient, free, granule=granule)
        return free[shira_ops.select_top(few, few_gradient, k, score=score, granule=granule)]

    def _by_rows(self, name: str, weight: Tensor, gradient: Tensor | None, taken: Tensor | None) -> Tensor:
        """The best granule of every row, the second best of every row, and so on up to ``k``.

        In the last round only the rows with the highest next score get one more. A row with too few free granules drops
        out of a round. Needs memory for the scores of this one weight, which `select_top` does not.
        """
        k = self.count(name, weight)
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
        # Of equal scores the lower index is taken.
        several = (ties.sum(1) > wanted).nonzero().view(-1)
        ties[several] &= ties[several].cumsum(1) <= wanted[several, None]
        return (chosen | ties).view(-1).nonzero().view(-1).to(index_dtype(scores.numel()))

    def describe(self) -> dict[str, Any]:
        about = super().describe()
        return {**about, "balanced": True} if self.balanced else about


class WeightMagnitude(_Scored):
    """The granules of largest magnitude (the paper's WM): the top ``k`` by the sum of ``|w|``.

    Of equal ones the lower index is taken. ``balanced=True`` takes the same number from every row.
    """

    score = "magnitude"

    def select(self, name: str, weight: Tensor) -> Tensor:
        return self._choose(name, weight.detach(), None)


class Principal(_Scored):
    """The largest entries of the weight's approximation of low rank (LIFT's principal weights, arXiv 2506.00772).

    A weight of ``m`` rows and ``n`` columns is approximated by its ``rank`` largest singular values and their vectors,
    ``U[:, :rank] @ diag(S[:rank]) @ V[:, :rank].T``. The mask takes the top ``k`` granules by the sum of the magnitudes
    there; of equal ones, the lower index. With a ``rank`` of ``min(m, n)`` or more that is `WeightMagnitude`, but for
    rounding. Needs no data.

    The singular vectors are found by ``torch.svd_lowrank`` (8 vectors more than ``rank``, 4 rounds) in fp32 (fp64 for
    fp64 weights), which starts from random numbers of ``seed``; torch's own random numbers do not move. So the same
    weight gives the same mask again on the same machine with the same number of threads. Elsewhere the sums may be
    rounded differently, and of two entries that are almost equal the other one may be taken: a file holds the indices.
    Takes a few products of the weight with a matrix of ``rank + 8`` columns, and memory for one approximation.

    Args:
        density, r, granule, skip: as for every mask.
        rank: how many singular values the approximation has; LIFT takes about the rank of a LoRA.
        balanced: the same number of granules from every row, as for `WeightMagnitude`.
        seed: of the random numbers that the approximation starts from.

    Raises:
        ValueError: a weight has an entry that is not finite.
    """

    score = "magnitude"

    def __init__(
        self,
        density: Density | None = None,
        *,
        r: Rank | None = None,
        granule: Granule = 1,
        rank: int = 32,
        balanced: bool = False,
        seed: int = DEFAULT_SEED,
        skip: Skip = (),
    ) -> None:
        super().__init__(density, r=r, granule=granule, balanced=balanced, skip=skip)
        if type(rank) is not int or rank < 1:
            raise ValueError(f"Principal: rank must be a whole number of at least 1, got {rank!r}")
        if type(seed) is not int:
            raise ValueError(f"Principal: seed must be a whole number, got {seed!r}")
        self.rank = rank
        self.seed = seed & WORD

    def approximation(self, name: str, weight: Tensor) -> Tensor:
        """The weight's approximation, in its shape; fp32, or fp64 for an fp64 weight."""
        matrix = weight.detach().reshape(rows_and_columns(weight))
        matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
        if not bool(matrix.isfinite().all()):
            raise ValueError(f"Principal: every entry of a weight must be finite; not so for {name}")
        rank = min(self.rank, *matrix.shape)
        # Squares of the entries must be finite, and not zero: far from 1, they are scaled by a power of two.
        least = math.frexp(torch.finfo(matrix.dtype).tiny)[1]
        power = max(least, int(torch.frexp(matrix.abs().max()).exponent))
        matrix = matrix if abs(power) <= 32 else torch.ldexp(matrix, torch.tensor(-power, device=matrix.device))
        # svd_lowrank draws from its device's own generator; and under autocast its products would be in half precision.
        generator = torch.cuda.default_generators[weight.get_device()] if weight.is_cuda else torch.default_generator
        kept = torch.random.fork_rng([weight.device] if weight.is_cuda else [])
        with kept, torch.autocast(weight.device.type, enabled=False):
            generator.manual_seed(signed(self.seed))
            u, s, v = torch.svd_lowrank(matrix, min(rank + 8, *matrix.shape), niter=4)
            found = ((u[:, :rank] * s[:rank]) @ v[:, :rank].T).view(weight.shape)
        return found if abs(power) <= 32 else torch.ldexp(found, torch.tensor(power, device=found.device))

    def select(self, name: str, weight: Tensor) -> Tensor:
        return self._choose(name, weight, None, self.approximation(name, weight))

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "rank": self.rank, "seed": self.seed}


class _Calibrated(_Scored):
    """A mask that needs gradients over calibration batches; `prepare` runs them."""

    def select(self, name: str, weight: Tensor) -> Tensor:
        if name not in self._selected:
            raise ValueError(
                f"{type(self).__name__}: has no gradient of {name}: SparseTuner(model, mask, calibration=batches) "
                f"collects it"
            )
        return self._selected[name]


class Grad(_Calibrated):
    """The granules of largest gradient: the top ``k`` by the sum of ``|g|``; of equal ones, the lower index.

    ``g`` is the gradient of the loss summed over all calibration batches, signed, in fp32 (fp64 for fp64 weights):
    ``SparseTuner(model, masks.Grad(density=0.01), calibration=batches)``; `shira.masks.calibration` says how.

    ``balanced=True`` takes the same number of granules from every row. In the whole weight the largest gradients belong
    to the few outputs that are most wrong, so that on tasks far from the base most of the layer would stay untrained
    (docs/quality.md).
    """

    score = "grad"


class Snip(_Calibrated):
    """The granules whose removal would change the loss most, to first order: the top ``k`` by the sum of ``|w * g|``.

    The paper's SNIP, its overall recommendation. Of equal ones the lower index is taken. ``g`` is the gradient of the
    loss summed over all calibration batches, signed, in fp32 (fp64 for fp64 weights):
    ``SparseTuner(model, masks.Snip(density=0.01), calibration=batches)``; `shira.masks.calibration` says how.
    ``balanced=True`` takes the same number from every row, for the reason given at `Grad`.
    """

    score = "snip"


class Struct(Mask):
    """Every f-th row (or column) and the diagonal: rank 1 plus a sparse part of high rank.

    Of an ``m x n`` weight (more dimensions folded into the columns) the mask takes

    - the diagonal: the entries ``(j * m // n, j)`` for every column ``j``, ``n`` of them;
    - ``lines="rows"``: every row ``i`` with ``i % f == offset % f``;
      ``lines="columns"``: every column ``j`` with ``j % f == offset % f``;

    and for each of these entries takes the whole granule it is in. ``f`` is the smallest number in ``1 .. m``
    (``1 .. n`` for columns) whose mask has at most ``k`` granules, so the budget is kept. If even one line and the
    diagonal have more, ``f`` is ``m`` (``n``), and the mask is that line and the diagonal. `SparseTuner.summary` shows
    how many entries were taken.
    """

    by_shape = True

    def __init__(
        self,
        density: Density | None = None,
        *,
        r: Rank | None = None,
        granule: Granule = 1,
        lines: Literal["rows", "columns"] = "rows",
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
        """``f``, the selected lines (bool, for each row or column of granules), and the diagonal's granules."""
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

        # A smaller f is not possible: its lines alone have more granules than the budget.
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
    """The entries that a 0/1 tensor marks. The tensors are given by name, or made by a function.

    ``Given({"layers.0.q_proj.weight": mask})``, or ``Given(lambda name, weight: weight.abs() > 0.1)``. A mask has the
    weight's shape, and is bool or has only 0 and 1 in any dtype. With a ``granule`` above 1 the whole granule of every
    marked entry is taken. `SparseTuner` also takes the mapping or the function itself as its mask.

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
        self.by_shape = isinstance(given, Mapping)
        self.by_shape = isinstance(given, Mapping)
        self._set(granule, skip)

    @classmethod
    def of(cls, mask: object) -> Mask:
        """A mask from a mask, from 0/1 tensors by name, or from a function of a name and a weight."""
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
        *,
        choose: Choose | None = None,
    ) -> None:
        unused = [name for name in self.names or () if name not in weights]
        if unused:
            raise ValueError(f"Given: has masks for {_model.some(unused)}, which are not targets: leave them out")
        super().prepare(model, weights, calibration, loss, choose=choose)

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
        """Holds a digest of masks by name, or the name of a function."""
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
