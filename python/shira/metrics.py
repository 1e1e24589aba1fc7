"""How strongly two adapters interact: by their changes, by their masks, and by what they do to a model.

The first two metrics are the paper's (arXiv 2406.13175, section 4.2). With ``A1`` and ``A2`` the changes two adapters
make to a weight of ``m`` rows and ``n`` columns (``new - base``, zero outside the mask, at strength 1; more than two
dimensions are folded into the columns), their product is ``A1^T A2``, ``n x n``::

    AWOM = || A1^T A2 ||_2                       the largest singular value: 0 where no direction is shared
    AWOR = 1 - nnz(A1^T A2) / n^2                the share of the product's entries that are zero

AWOR cannot tell whether masks overlap: an entry of the product is non-zero if any row has an entry of each adapter, so
two random masks of density ``p`` have about ``(1 - p^2)^m``, whether they share entries or not. `overlap` counts shared
entries, and `interference` measures their effect on activations.

`matrix` computes a metric for every two of several adapters, `heat_map` draws it, and `mask_map` draws where an
adapter's entries are. Drawing needs matplotlib (``pip install 'shira-ops[demo]'``).

All of them take adapters of the same base. An adapter that holds new values says nothing about the change: give
``base``, or call `Adapter.to_delta` first. Products are in float64. A metric of two adapters is the mean over the
weights that both of them change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from shira import _model, _text
from shira._granules import refine
from shira._text import AdapterError
from shira.adapter._checkpoint import Source
from shira.adapter._entry import Entry
from shira.adapter.adapter import Adapter, check_adapter
from shira.serve.switcher import Switcher

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["awom", "awor", "heat_map", "interference", "mask_map", "matrix", "overlap"]

Metric = str | Callable[[Adapter, Adapter], float]

# How many entries of the product are computed at a time.
_CHUNK = 1 << 22
# The most Lanczos steps, and the relative error of the squared norm at which they stop.
_STEPS, _ERROR = 300, 1e-12


def awom(first: Adapter, second: Adapter, base: Source | None = None) -> float:
    """The orthogonality magnitude ``|| A1^T A2 ||_2``: the mean over the weights both change; 0 if they share none.

    The product is never made: its largest singular value comes from a Lanczos iteration (Golub and Kahan) over the
    entries alone, with a fixed start, so the same adapters always give the same number.

    Args:
        first, second: the adapters; their strengths do not matter.
        base: the checkpoint they were made for, as in `Adapter.from_difference`; needed unless both are deltas.
    """
    return _mean([_norm(one, two) for one, two in _changes("awom", first, second, base)], 0.0)


def awor(first: Adapter, second: Adapter, base: Source | None = None) -> float:
    """The orthogonality ratio ``1 - nnz(A1^T A2) / n^2``: the mean over the weights both change; 1 if they share none.

    Entries that an adapter holds but does not change count as zeros. The module's docstring says what this cannot tell.

    Args:
        first, second: the adapters; their strengths do not matter.
        base: the checkpoint they were made for, as in `Adapter.from_difference`; needed unless both are deltas.
    """
    return _mean([_zeros(one, two) for one, two in _changes("awor", first, second, base)], 1.0)


def overlap(first: Adapter, second: Adapter) -> float:
    """The share of the smaller adapter's entries that the other one has, too.

    It is 0 for disjoint masks, and 1 for a mask inside the other. Counts entries over all weights. Values, granules,
    and whether an adapter is a delta do not matter.
    """
    first, second = _two("overlap", first, second)
    shared = 0
    for one, two in _pairs(first, second):
        granule = math.gcd(one.granule, two.granule)
        a, b = (refine(entry.indices.cpu(), entry.granule, granule, entry.numel) for entry in (one, two))
        shared += int(torch.isin(a, b, assume_unique=True).sum()) * granule
    smaller = min(first.nnz, second.nnz)
    return shared / smaller if smaller else 0.0


def interference(
    model: nn.Module,
    first: Adapter,
    second: Adapter,
    data: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> float:
    """How far the second adapter disturbs what the first one does, on the first one's data.

    Let ``h(S)`` be the outputs of all modules that hold a weight of either adapter, over all batches, as one vector::

        || h(first + second) - h(first) || / || h(first) - h(base) ||

    0 means that the first adapter's activations are the same as without the second; 1 that the second moves them as far
    as the first itself did. Each adapter has its own alpha. The result is not symmetric: for the other direction swap
    the adapters and give the other's data.

    Args:
        model: the base of both, without an adapter. It runs in ``eval()`` without gradients, and is unchanged
            afterwards.
        first, second: the adapters.
        data: batches, iterated once: a mapping is passed as ``model(**batch)``, a tuple or list as ``model(*batch)``,
            anything else as ``model(batch)``.
        forward: ``forward(model, batch)`` to run a batch in another way.

    Raises `AdapterError` for adapters that do not fit the model, `ValueError` if there are no batches or none of these
    modules runs, or if the first adapter changes no activation of theirs.
    """
    first, second = _two("interference", first, second)
    _text.function("interference: forward", forward)
    if not isinstance(data, Iterable):
        raise TypeError(f"interference: data must be several batches, got {type(data).__name__}")
    switcher = Switcher(model)
    switcher.add("first", first)
    switcher.add("second", second)
    slots = _model.slots(switcher.model)
    modules: dict[nn.Module, None] = {}
    for adapter in (first, second):
        for name, entry in adapter.weights.items():
            # A tied weight is in several modules, and all of them run.
            modules.update((slots[known].module, None) for known in (name, *entry.aliases) if known in slots)
    run = _forward if forward is None else forward
    own = moved = 0.0
    with _evaluated(model), _outputs(modules) as outputs:

        def activations(batch: Any) -> list[Tensor]:
            outputs.clear()
            run(model, batch)
            return [output.to(torch.float64) for output in outputs]

        try:
            for batch in data:
                switcher.deactivate()
                base = activations(batch)
                if not base:
                    raise ValueError("interference: none of the modules that hold the adapters' weights ran")
                switcher.activate("first")
                alone = activations(batch)
                switcher.activate({"first": first.alpha, "second": second.alpha})
                own += sum(float((a - b).square().sum()) for a, b in zip(alone, base, strict=True))
                moved += sum(float((a - b).square().sum()) for a, b in zip(activations(batch), alone, strict=True))
        finally:
            switcher.deactivate()
    if not own > 0:
        raise ValueError("interference: there were no batches, or the first adapter changes no activation on them")
    return math.sqrt(moved / own)


def matrix(adapters: Mapping[str, Adapter], metric: Metric = "overlap", base: Source | None = None) -> Tensor:
    """A metric for every two adapters, and for each with itself: float64, ``[len(adapters), len(adapters)]``.

    Args:
        adapters: name to adapter, of one base.
        metric: ``"overlap"``, ``"awor"`` or ``"awom"``, which are symmetric and computed once for a pair; or a
            function ``metric(first, second)``, called for every ordered pair: row ``first``, column ``second``.
        base: as for `awor` and `awom`.
    """
    if not isinstance(adapters, Mapping):
        raise TypeError(f"matrix: adapters must map names to them, got {type(adapters).__name__}")
    several = [check_adapter(f"matrix: {_text.named(name)}", adapter) for name, adapter in adapters.items()]
    if not several:
        raise ValueError("matrix: give at least one adapter")
    result = torch.zeros(len(several), len(several), dtype=torch.float64, device="cpu")
    if callable(metric):
        for i, first in enumerate(several):
            for j, second in enumerate(several):
                result[i, j] = metric(first, second)
        return result
    known: dict[str, Callable[[Adapter, Adapter], float]] = {
        "overlap": overlap,
        "awor": lambda first, second: awor(first, second, base),
        "awom": lambda first, second: awom(first, second, base),
    }
    if not isinstance(metric, str) or metric not in known:
        raise ValueError(f"matrix: metric must be {', '.join(map(repr, known))} or a function, got {metric!r}")
    for i, first in enumerate(several):
        for j in range(i + 1):
            result[i, j] = result[j, i] = known[metric](first, several[j])
    return result


def heat_map(adapters: Mapping[str, Adapter], metric: Metric = "overlap", base: Source | None = None) -> Figure:
    """Draws `matrix`: a square for every two adapters with its number, the darker the larger.

    A picture of AWOR says nothing about shared entries (see the module's docstring); draw `overlap` beside it.

    Returns a matplotlib figure: ``heat_map(adapters, "awom", base).savefig("awom.png")``. Raises `ImportError` without
    matplotlib.
    """
    figure = _figure("heat_map")
    numbers = matrix(adapters, metric, base)
    names, title = list(adapters), metric if isinstance(metric, str) else getattr(metric, "__name__", "")
    side = 1.6 + 0.7 * len(names)
    figure.set_size_inches(side + 0.8, side)
    axes = figure.add_subplot()
    image = axes.imshow(numbers.numpy(), cmap="Blues")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(title)
    low, high = image.get_clim()
    for i, row in enumerate(numbers.tolist()):
        for j, number in enumerate(row):
            dark = number > (low + high) / 2
            axes.text(j, i, f"{number:.3g}", ha="center", va="center", color="white" if dark else "black")
    figure.colorbar(image, ax=axes)
    return figure


def mask_map(adapter: Adapter, names: Sequence[str] | None = None, *, cells: int = 128) -> Figure:
    """Draws where the entries of an adapter are: a panel for each weight, dark where many entries change.

    A weight of more than ``cells`` rows or columns is drawn with ``cells`` of them, each as dark as the share of its
    entries that the adapter has. Dimensions after the first are folded into the columns.

    Args:
        adapter: the adapter.
        names: which weights; None: all but those that are replaced as a whole.
        cells: the maximal number of rows and of columns of a panel.

    Returns a matplotlib figure. Raises `ValueError` for a name the adapter does not have, or if there is nothing to
    draw, and `ImportError` without matplotlib.
    """
    check_adapter("mask_map: adapter", adapter)
    _text.whole("mask_map: cells", cells, 1)
    if names is None:
        names = [name for name, entry in adapter.weights.items() if not entry.whole]
    elif isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"mask_map: names must be a list of them, got {_text.shown(names)}")
    unknown = [_text.shown(name) for name in names if not isinstance(name, str) or name not in adapter.weights]
    if unknown:
        raise ValueError(f"mask_map: the adapter has no weight {', '.join(unknown)}")
    if not names:
        raise ValueError("mask_map: the adapter has no weight to draw")
    figure = _figure("mask_map")
    columns = math.ceil(math.sqrt(len(names)))
    rows = -(-len(names) // columns)
    figure.set_size_inches(3 * columns, 3 * rows)
    for place, name in enumerate(names, 1):
        shares = _shares(adapter.weights[name], cells)
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(shares.numpy(), cmap="Blues", vmin=0, interpolation="nearest", aspect="auto")
        entry = adapter.weights[name]
        axes.set_title(f"{name}\n{entry.nnz / max(entry.numel, 1):.2%} of {list(entry.shape)}", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def _shares(entry: Entry, cells: int) -> Tensor:
    """The share of entries that an adapter has in each cell of a weight, float64."""
    m, n = _sides(entry)
    rows, columns = min(m, cells), min(n, cells)
    at = refine(entry.indices.cpu().to(torch.int64), entry.granule, 1, entry.numel)
    cell = (at // n) * rows // m * columns + (at % n) * columns // n
    found = torch.bincount(cell, minlength=rows * columns).to(torch.float64).view(rows, columns)
    height = torch.bincount(torch.arange(m, device="cpu") * rows // m, minlength=rows)
    width = torch.bincount(torch.arange(n, device="cpu") * columns // n, minlength=columns)
    return found / (height[:, None] * width)


def _figure(name: str) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{name}: drawing needs matplotlib ({error}): pip install 'shira-ops[demo]'") from error
    # Not through pyplot: so nothing is registered, no window opens, and the caller's backend stays.
    return Figure(layout="constrained")


def _sides(entry: Entry) -> tuple[int, int]:
    """Rows and columns of a weight; dimensions after the first are folded into the columns."""
    m = entry.shape[0] if entry.shape else 1
    return m, entry.numel // m if m else 0


def _mean(values: list[float], none: float) -> float:
    return math.fsum(values) / len(values) if values else none


def _two(metric: str, first: object, second: object) -> tuple[Adapter, Adapter]:
    """The two adapters of a metric, which are adapters."""
    return check_adapter(f"{metric}: first", first), check_adapter(f"{metric}: second", second)


def _pairs(first: Adapter, second: Adapter) -> Iterator[tuple[Entry, Entry]]:
    """The weights that both adapters have, under any of their names."""
    known = {name: entry for own, entry in second.weights.items() for name in (own, *entry.aliases)}
    for name, one in first.weights.items():
        two = next((known[other] for other in (name, *one.aliases) if other in known), None)
        if two is not None:
            if one.shape != two.shape:
                raise AdapterError(
                    f"weight {name!r} has shape {list(one.shape)} in the first adapter and {list(two.shape)} in the "
                    f"second: they are not of one base"
                )
            yield one, two


@dataclass(frozen=True)
class _Change:
    """The change of a weight as its non-zero entries: their rows, columns and values, float64."""

    shape: tuple[int, int]
    rows: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def of(cls, entry: Entry) -> _Change:
        m, n = _sides(entry)
        at = refine(entry.indices.cpu().to(torch.int64), entry.granule, 1, entry.numel).to(torch.int64)
        values = entry.values.detach().cpu().to(torch.float64)
        kept = values != 0
        at, values = at[kept], values[kept]
        return cls((m, n), at // max(n, 1), at % max(n, 1), values)

    def times(self, x: Tensor) -> Tensor:
        """``A x``."""
        return x.new_zeros(self.shape[0]).index_add_(0, self.rows, self.values * x[self.columns])

    def transposed_times(self, x: Tensor) -> Tensor:
        """``A^T x``."""
        return x.new_zeros(self.shape[1]).index_add_(0, self.columns, self.values * x[self.rows])


def _changes(metric: str, first: Adapter, second: Adapter, base: Source | None) -> Iterator[tuple[_Change, _Change]]:
    first, second = _two(metric, first, second)
    if base is None and not (first.delta and second.delta):
        raise ValueError(f"{metric}: an adapter of new values has no changes without its base; give base=")
    if base is not None:
        first, second = first.to_delta(base), second.to_delta(base)
    for one, two in _pairs(first, second):
        changes = _Change.of(one), _Change.of(two)
        if not all(bool(change.values.isfinite().all()) for change in changes):
            raise AdapterError(f"{metric}: changes of a weight of shape {list(one.shape)} are NaN or infinite")
        yield changes


def _norm(one: _Change, two: _Change) -> float:
    """The largest singular value of ``M = one^T two``: the root of the largest eigenvalue of ``M^T M``, by Lanczos.

    Every new direction is made orthogonal to all earlier ones. The last component of the eigenvector bounds the error.
    """
    columns = torch.unique(two.columns)
    if not one.values.numel() or not columns.numel():
        return 0.0
    # The start must not be orthogonal to the eigenvector: random numbers, where M^T M is not zero.
    x = torch.zeros(two.shape[1], dtype=torch.float64, device="cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    x[columns] = torch.randn(len(columns), dtype=torch.float64, device="cpu", generator=generator)
    basis = [x / x.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(_STEPS, len(columns))):
        x = two.transposed_times(one.times(one.transposed_times(two.times(basis[-1]))))
        diagonal.append(float(x @ basis[-1]))
        known = torch.stack(basis)
        for _ in range(2):  # a single pass leaves rounding errors behind
            x = x - known.t() @ (known @ x)
        left = float(x.norm())
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
        matrix += torch.diag(torch.tensor(beside, dtype=torch.float64, device="cpu"), -1)
        found, vectors = torch.linalg.eigh(matrix)  # reads the lower triangle
        largest = float(found[-1])
        if left * abs(float(vectors[-1, -1])) <= _ERROR * largest:
            break
        beside.append(left)
        basis.append(x / left)
    return math.sqrt(max(0.0, largest))


def _zeros(one: _Change, two: _Change) -> float:
    """The share of zeros in ``one^T two``, some rows at a time. Every pair of entries in a row is a summand."""
    n = one.shape[1]
    if n == 0:
        return 1.0
    # The entries of `two` are sorted by row; those of `one` are sorted by column here, which are the product's rows.
    starts = torch.searchsorted(two.rows, torch.arange(two.shape[0] + 1, device="cpu"))
    order = torch.argsort(one.columns, stable=True)
    rows, columns, values = one.rows[order], one.columns[order], one.values[order]
    found, step = 0, max(1, _CHUNK // n)
    for begin in range(0, n, step):
        count = min(step, n - begin)
        first, last = torch.searchsorted(columns, torch.tensor([begin, begin + count], device="cpu")).tolist()
        lengths = (starts[1:] - starts[:-1])[rows[first:last]]
        mine = torch.arange(first, last, device="cpu").repeat_interleave(lengths)
        within = torch.arange(len(mine), device="cpu") - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        theirs = starts[rows[mine]] + within
        part = torch.zeros(count * n, dtype=torch.float64, device="cpu")
        part.index_add_(0, (columns[mine] - begin) * n + two.columns[theirs], values[mine] * two.values[theirs])
        found += int(part.count_nonzero())
    return 1.0 - found / n**2


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _outputs(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects the floating-point outputs of the modules, in the order in which they run."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        # A copy, since later operations may write in place.
        leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
        found.extend(leaf.clone() for leaf in leaves)

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
