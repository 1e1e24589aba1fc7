"""Experiment 2: masks. Five, by density, granule, and with the same number of granules in every row or not.

What a run costs (lines touched, bytes) is kept beside its scores, so the front accuracy / switch time / file size can
be drawn from the results alone.
"""

from __future__ import annotations

from benchmarks.quality.lab import Job, Setting, study
from benchmarks.quality.methods import MASKS, Shira
from benchmarks.quality.tasks import tasks

DENSITIES = (0.01, 0.04, 0.0025, 0.16, 0.02, 0.08, 0.005)  # the first are done first
GRANULES = (1, 16, 32, 4, 8)


def jobs(family: str, seeds: int) -> list[Job]:
    found = []
    for far, name in enumerate(reversed(list(tasks(family)))):
        for balanced in (False, True):
            for place, density in enumerate(DENSITIES):
                for mask in MASKS:
                    if balanced and mask == "struct":
                        continue  # is what it is
                    for granule in GRANULES:
                        method = Shira(mask, density=density, granule=granule, balanced=balanced)
                        # Two densities of the first two tasks, then the rest.
                        rank = 1 + far + place // 2 * 0.5 + balanced * 2
                        found.append(study(rank, Setting(name, method, budget=5), seeds))
    return found
