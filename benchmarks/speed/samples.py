"""The spread of a list of samples. Needs nothing but Python."""

from __future__ import annotations

import statistics


def spread(samples: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(samples) < 2:
        return {"median": samples[0], "low": samples[0], "high": samples[0]}
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}
