"""What a switch costs, as a sum: a call, the cache lines read and written, the bytes streamed, the entries moved.

Fitted to the measured points of one thread count, with errors relative to each, so that a small weight counts as much
as a large one. No term can be negative. Needs numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

LINE = 64
TERMS = ("calls", "lines", "streamed", "entries")


@dataclass(frozen=True)
class Model:
    """Seconds of each term: a call, a cache line in and out, a streamed byte, an entry."""

    calls: float
    lines: float
    streamed: float
    entries: float
    typical: float  # the median and the largest relative error of the points it was fitted to
    largest: float

    def seconds(self, lines: float, streamed: float, entries: float, calls: float = 1) -> float:
        return self.calls * calls + self.lines * lines + self.streamed * streamed + self.entries * entries

    @property
    def line_bandwidth(self) -> float:
        """Bytes a second of scattered lines, in and out; infinite where the fit found no cost for them."""
        return 2 * LINE / self.lines if self.lines else float("inf")

    @property
    def stream_bandwidth(self) -> float:
        return 1 / self.streamed if self.streamed else float("inf")


def fit(points: list[dict[str, Any]]) -> Model:
    """Least squares of relative errors, none of the terms below zero."""
    seconds = np.array([point["seconds"]["median"] for point in points])
    rows = np.array([[1.0, point["lines"], point["streamed"], point["entries"]] for point in points])
    scaled = rows / seconds[:, None]
    scale = scaled.max(axis=0)
    kept = list(range(len(TERMS)))
    while True:
        found = np.linalg.lstsq(scaled[:, kept] / scale[kept], np.ones(len(points)), rcond=None)[0]
        if (found >= 0).all() or len(kept) == 1:
            break
        kept.pop(int(found.argmin()))
    terms = np.zeros(len(TERMS))
    terms[kept] = np.maximum(found, 0) / scale[kept]
    errors = np.abs(rows @ terms / seconds - 1)
    return Model(*map(float, terms), float(np.median(errors)), float(errors.max()))


def expected_lines(numel: int, itemsize: int, density: float) -> float:
    """Cache lines of a weight that a random mask of single entries touches."""
    a_line = LINE // itemsize
    return numel / a_line * (1 - (1 - density) ** a_line)


def predict(model: Model, shapes: list[tuple[int, int]], density: float, itemsize: int = 2) -> float:
    """Seconds to switch one adapter of a random mask onto weights of these shapes."""
    total = 0.0
    for m, n in shapes:
        entries = density * m * n
        total += model.seconds(expected_lines(m * n, itemsize, density), entries * (4 + 2 * itemsize), entries)
    return total
