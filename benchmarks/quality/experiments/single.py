"""Experiment 1: one adapter. SHiRA with each mask against LoRA, DoRA and full fine-tuning, at equal parameters.

SHiRA has as many entries of every weight as LoRA of the same rank has parameters; DoRA has a magnitude for every row
more; full fine-tuning trains everything.
"""

from __future__ import annotations

from benchmarks.quality.lab import Job, Setting, bases, study
from benchmarks.quality.methods import MASKS, Dora, Full, Lora, Method, Shira
from benchmarks.quality.tasks import tasks

RANKS = {"digits-mlp": 2, "digits-vit": 1, "minilm": 4}


def rank(family: str) -> int:
    return RANKS.get(family, 4)


def methods(family: str) -> list[Method]:
    r = rank(family)
    return [*(Shira(mask, r=r) for mask in MASKS), Lora(r), Dora(r), Full()]


def jobs(family: str, seeds: int) -> list[Job]:
    names = list(tasks(family))
    # Task by task, so that what was stopped early compares methods.
    settings = [Setting(name, method) for name in names for method in methods(family)]
    return [*bases(0, names), *(study(0, setting, seeds) for setting in settings)]
