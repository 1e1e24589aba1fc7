"""Experiment 2, masks: the five of them by density and granule, with and without the same number of granules in every
row; and granules of which some weights get more than others.

What a run costs (cache lines touched, bytes) is kept beside its scores, so that accuracy can be drawn beside switch
time and file size from the results alone.
"""

from __future__ import annotations

import itertools

from benchmarks.quality.lab import Job, Setting, study
from benchmarks.quality.methods import MASKS, Shira
from benchmarks.quality.tasks import tasks

DENSITIES = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
GRANULES = (1, 4, 8, 16, 32)
COARSE = 16  # granules of at least this many entries are placed in every way that is compared
MIXED = ("first", "last", "magnitude")


def rank(far: int, method: Shira) -> float:
    """The order of the runs: first few densities and granules, on every task, for the two masks that need no data; then
    the same for all five; then the rest for the two."""
    core = method.density in (0.01, 0.04) and method.granule in (1, 16, 32)
    cheap = method.mask in ("rand", "wm") and method.granule in (1, 16, 32)
    if core and cheap and not method.balanced:
        return 1.0 + far * 0.01
    step = (1.7 if core else 4.5) if method.balanced else 1.1 if core else 1.5 if cheap else 4.0
    return step + (far // 2 if core or cheap else far) * 0.7


def coarse() -> list[int]:
    return [granule for granule in GRANULES if granule >= COARSE]


def jobs(family: str, seeds: int) -> list[Job]:
    found = []
    for far, name in enumerate(reversed(list(tasks(family)))):
        for mask, balanced, granule, density in itertools.product(MASKS, (False, True), GRANULES, DENSITIES):
            if (mask, balanced) != ("struct", True):  # Struct is balanced by itself
                method = Shira(mask, density=density, granule=granule, balanced=balanced)
                found.append(study(rank(far, method), Setting(name, method, budget=5), seeds))
        for mask, mixed, granule in itertools.product(("rand", "wm"), MIXED, coarse()):
            method = Shira(mask, density=0.01, granule=granule, mixed=mixed)
            found.append(study(1.6 + far * 0.01, Setting(name, method, budget=5), seeds))
    return found
