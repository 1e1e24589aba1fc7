"""Experiment 5, other masks: what others have proposed since, and a mask that moves, at experiment 1's budget.

Each is compared with a random mask: on the same tasks, with as many entries, and with its rate searched in the same
way. A mask becomes the default if it beats Rand by more than the spread on most bases.
"""

from __future__ import annotations

from benchmarks.quality.experiments.single import rank
from benchmarks.quality.lab import Job, Setting, study
from benchmarks.quality.methods import TRIED, Method, Moving, Shira
from benchmarks.quality.tasks import tasks


def methods(family: str) -> list[Method]:
    r = rank(family)
    moving = [Moving(r=r), Moving(r=r, rows=True), Moving(r=r, rows=True, share=0.2)]
    return [*moving, *(Shira(mask, r=r) for mask in TRIED)]


def jobs(family: str, seeds: int) -> list[Job]:
    # Method by method, each on all tasks.
    every = [Setting(name, method) for method in methods(family) for name in tasks(family)]
    return [study(0.3 + 0.001 * place, setting, seeds) for place, setting in enumerate(every)]
