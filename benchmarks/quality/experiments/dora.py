"""Experiment 7, SHiRA-DoRA: does a DoRA behind a mask learn more than the mask's entries themselves?

On the same tasks, with as many entries that change as in experiment 1, and with the rate searched in the same way. It
trains about six times as many parameters for them, as the paper does.
"""

from __future__ import annotations

from benchmarks.quality.experiments.single import rank
from benchmarks.quality.lab import Job, Setting, study
from benchmarks.quality.methods import ShiraDora
from benchmarks.quality.tasks import tasks

CHOSEN = {"digits-mlp": None, "smollm2": ("smollm2/python3", "smollm2/pirate")}
"""A base where methods differ much, with all its tasks, and the tasks of the language model that differ most."""


def chosen(family: str) -> list[tuple[str, ShiraDora]]:
    """Each task and mask."""
    if family not in CHOSEN:
        return []
    names = CHOSEN[family] or tuple(tasks(family))
    return [(name, ShiraDora(mask, r=rank(family))) for mask in ("rand", "wm") for name in names]


def jobs(family: str, seeds: int) -> list[Job]:
    return [study(0.35, Setting(*one), seeds) for one in chosen(family)]
