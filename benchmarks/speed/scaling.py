"""The cost of a switch as a sum over what it moves, fitted to measured points.

    seconds = calls + min(scattered * lines touched, runs * lines of the weight) + streamed * bytes + entries * entries

A cache line that is touched alone waits for memory; where most lines of a weight are touched the processor fetches them
in runs, and the whole weight streams by. Errors are taken relative to each point, so that a small weight counts as much
as a large one, and no term can be negative. Needs numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

LINE = 64
TERMS = ("calls", "scattered", "runs", "streamed", "entries")


@dataclass(frozen=True)
class Work:
    """What one call has to do."""

    lines: float  # cache lines that the call reads and writes
    weight_lines: float  # all cache lines of the weight
    streamed: float  # bytes of indices, values and base entries
    entries: float

    @classmethod
    def of(cls, point: dict[str, Any]) -> Work:
        return cls(point["lines"], point["weight_bytes"] / LINE, point["streamed"], point["entries"])

    @classmethod
    def random(cls, numel: int, itemsize: int, density: float) -> Work:
        """A switch by a random mask of single entries, with int32 indices."""
        entries, a_line = density * numel, LINE // itemsize
        lines = numel / a_line * (1 - (1 - density) ** a_line)
        return cls(lines, numel / a_line, entries * (4 + 2 * itemsize), entries)


@dataclass(frozen=True)
class Model:
    """Seconds per term: a call, a line by itself, a line in a run, a streamed byte, an entry. 0: no extra cost."""

    calls: float
    scattered: float
    runs: float
    streamed: float
    entries: float
    typical: float  # the median and the largest relative error of the points it was fitted to
    largest: float

    def in_runs(self, work: Work) -> bool:
        return 0 < self.runs * work.weight_lines < self.scattered * work.lines

    def seconds(self, work: Work) -> float:
        lines = self.runs * work.weight_lines if self.in_runs(work) else self.scattered * work.lines
        return self.calls + lines + self.streamed * work.streamed + self.entries * work.entries

    def bandwidth(self, term: str) -> float:
        """Bytes per second of `scattered`, of `runs` (both in and out) or of `streamed`."""
        cost = getattr(self, term) / (1 if term == "streamed" else 2 * LINE)
        return 1 / cost if cost else float("inf")


def fit(points: list[dict[str, Any]], memory: Model | None = None) -> Model:
    """Least squares of relative errors. With `memory`, a model of the machine, only calls and entries are fitted."""
    works = [Work.of(point) for point in points]
    seconds = np.array([point["seconds"]["median"] for point in points])
    if memory is not None:
        bare = Model(0, memory.scattered, memory.runs, memory.streamed, 0, 0, 0)
        rest = seconds - np.array([bare.seconds(work) for work in works])
        calls, entries = _positive(np.array([[1.0, work.entries] for work in works]), rest, seconds)
        return _with_errors((calls, bare.scattered, bare.runs, bare.streamed, entries), works, seconds)
    runs = [work.lines > 0.6 * work.weight_lines for work in works]
    for _ in range(20):
        rows = [
            [1.0, work.lines * (not run), work.weight_lines * run, work.streamed, work.entries]
            for work, run in zip(works, runs, strict=True)
        ]
        model = _with_errors(tuple(_positive(np.array(rows), seconds, seconds)), works, seconds)
        before, runs = runs, [model.in_runs(work) for work in works]
        if runs == before:
            break
    return model


def _positive(rows: np.ndarray, wanted: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The best terms that are not negative: the most negative one is left out until none is."""
    scaled, goal = rows / scale[:, None], wanted / scale
    sizes = np.abs(scaled).max(axis=0)
    kept = [at for at in range(rows.shape[1]) if sizes[at] > 0]
    terms = np.zeros(rows.shape[1])
    while kept:
        found = np.linalg.lstsq(scaled[:, kept] / sizes[kept], goal, rcond=None)[0]
        if (found >= 0).all():
            terms[kept] = found / sizes[kept]
            break
        kept.pop(int(found.argmin()))
    return terms


def _with_errors(terms: tuple[float, ...], works: list[Work], seconds: np.ndarray) -> Model:
    bare = Model(*map(float, terms), 0, 0)
    errors = np.abs(np.array([bare.seconds(work) for work in works]) / seconds - 1)
    return Model(*map(float, terms), float(np.median(errors)), float(errors.max()))
