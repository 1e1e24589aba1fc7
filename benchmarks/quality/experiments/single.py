"""Experiment 1, one adapter: SHiRA with each mask against LoRA, DoRA and full fine-tuning, at equal parameters.

SHiRA trains as many entries of every weight as LoRA of the same rank has parameters; DoRA has a magnitude for every row
in addition; full fine-tuning trains everything. On the farthest tasks also: four times as many steps, masks that have
seen more or fewer batches, and how far a mask's entries crowd into few rows and columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.lab import BETWEEN, COSTLY, RATES, Job, Lab, Setting, bases, study
from benchmarks.quality.methods import LATER, MASKS, Dora, Full, Lora, Method, Shira, is_whole
from benchmarks.quality.tasks import task, tasks
from shira._granules import refine

RANKS = {"digits-mlp": 2, "digits-vit": 1, "minilm": 4, "rl": 1}
REPEATED = ("smollm2-more",)
"""Families of more tasks, which show whether what the first ones say of the best methods holds."""
KIN = ("smollm2-kin",)
"""Families whose tasks are there to be fused (`fusion.WHOLE_TASK` has their rates)."""

ORDER = [
    ("rand", 16), ("lora", 1), ("rand", 1), ("wm", 1), ("full", 1), ("dora", 1), ("snip", 1), ("principal", 1),
    ("grad", 1), ("struct", 1), ("wm", 16), ("snip", 16), ("principal", 16), ("grad", 16), ("struct", 16),
]  # fmt: skip
"""The most telling comparisons first, where a run takes long."""
BOARD = {"smollm2": 10, "smollm2-more": 6, "rl": 5}
"""So many of these are the board; the rest wait until all seeds of the board are done."""
TELLING = {
    "smollm2": ("python3", "pirate", "records", "names"),
    "smollm2-more": ("units", "sums", "describe", "letters"),
    "rl": ("last",),
}
"""The tasks in the order in which they are run, where a run takes long: first those that tell most for their time."""


def rank(family: str) -> int:
    return RANKS.get(family, 4)


def methods(family: str) -> list[Method]:
    r = rank(family)
    if family in REPEATED:
        return [*close(r)[:2], Shira("wm", r=r), Lora(r), Dora(r), Full()]
    granules = [Shira(mask, r=r, granule=16) for mask in ((*MASKS, *LATER) if family in COSTLY else ("rand", "wm"))]
    return [*(Shira(mask, r=r) for mask in (*MASKS, *LATER)), *granules, Lora(r), Dora(r), Full()]


def jobs(family: str, seeds: int) -> list[Job]:
    names = list(tasks(family))
    # Task by task, so that what was done before a stop still compares methods.
    settings = [Setting(name, method) for name in names for method in methods(family)]
    found: list[Job] = [*bases(0, names)]
    if family in KIN:
        return found
    r = rank(family)
    first = (Shira("rand", r=r), Shira("wm", r=r), Lora(r))
    second = (Shira("rand", r=r, granule=16), Full())

    def rank_of(method: Method) -> float:
        return 0 if method in first else 0.1 if method in second else 0.2

    if family in COSTLY:
        found += [job for setting in settings for job in one_by_one(setting, seeds)]
        for seed in range(min(seeds, COSTLY[family])):
            for setting in longer(family) if family in LONG else ():
                found.append(Job(0.15 + 0.01 * seed, 1, lambda lab, one=setting, seed=seed: longer_run(lab, one, seed)))  # type: ignore[misc]
            for setting in closely(family):
                found.append(Job(0.15 + 0.01 * seed, 1, lambda lab, one=setting, seed=seed: spared_run(lab, one, seed)))  # type: ignore[misc]
                found.append(
                    Job(0.16 + 0.01 * seed, 1, lambda lab, one=setting, seed=seed: refined_run(lab, one, seed))
                )  # type: ignore[misc]
        if family in STEADY:
            found += [Job(0.17, 6, lambda lab, one=setting: steady_runs(lab, one)) for setting in settings]  # type: ignore[misc]
        return found
    found += [study(rank_of(setting.method), setting, seeds) for setting in settings]
    found += [study(0.8, setting, seeds) for setting in longer(family)]
    found += [study(0.9, setting, seeds) for setting in calibrated(family)]
    for setting in settings:
        if isinstance(setting.method, Shira):
            found.append(Job(0.5, 1, lambda lab, setting=setting: crowding(lab, setting)))  # type: ignore[misc]
    return found


def one_by_one(setting: Setting, seeds: int) -> list[Job]:
    """The runs of a setting, placed so that whatever was done before a stop compares the methods fairly.

    First the rates of all methods on one task, with the first seed, then on the next task; then the second seed of all,
    and so on.
    """
    method, (family, name) = setting.method, setting.task.split("/")
    place = ORDER.index((getattr(method, "mask", method.kind), getattr(method, "granule", 1)))
    at = 0.2 * (place >= BOARD[family]) + 0.01 * TELLING[family].index(name) + 1e-4 * place
    found = [Job(at, 4, lambda lab: lab.tuned(setting))]
    for seed in range(1, min(seeds, COSTLY[family])):
        found.append(Job(at + 0.05 * seed, 1, lambda lab, seed=seed: lab.train(setting, lab.tuned(setting), seed)))  # type: ignore[misc]
    return found


def far(family: str) -> list[str]:
    return list(tasks(family))[-2:]


def longer(family: str) -> list[Setting]:
    """Four times the steps: does a method only need more time?"""
    r = rank(family)
    if family in LONG:
        return [Setting(LONG[family], method, steps=4 * task(LONG[family]).steps) for method in tied(r)]
    several = (Shira("rand", r=r), Shira("wm", r=r), Shira("snip", r=r), Lora(r), Full())
    return [Setting(name, method, steps=4 * task(name).steps) for name in far(family) for method in several]


LONG = {"smollm2": "smollm2/names"}
"""Where a run takes long: the one task with longer runs, that on which the methods are closest beside their spread."""


def tied(r: int) -> tuple[Method, ...]:
    return Shira("rand", r=r, granule=16), Lora(r)


def longer_run(lab: Lab, setting: Setting, seed: int) -> dict[str, Any]:
    """A run with more steps, at the rate of the shorter ones."""
    return lab.train(setting, lab.tuned(replace(setting, steps=None)), seed)


def closely(family: str) -> list[Setting]:
    """What is compared at two more rates: the lowest that is as good as the best one, for what is forgotten there, and
    the best of a finer search."""
    found = [Setting(name, method) for name in tasks(family) for method in close(rank(family))]
    return found if family in (*LONG, *REPEATED) else []


def close(r: int) -> tuple[Method, ...]:
    return Shira("rand", r=r), Shira("rand", r=r, granule=16), Lora(r)


def spared_run(lab: Lab, setting: Setting, seed: int) -> dict[str, Any]:
    return lab.train(setting, lab.spared(setting), seed)


STEADY = ("rl",)
"""Families whose seeds differ so much that the first one cannot choose the rate: every seed of every method is trained
at the best rate and at the two beside it, and all of them choose."""


def steady_runs(lab: Lab, setting: Setting) -> None:
    best = RATES.index(lab.searched(setting))
    for rate in (RATES[best], *BETWEEN[max(0, best - 1) : best + 1]):
        for seed in lab.seeds_of(setting.task):
            lab.train(setting, rate, seed)


def refined_run(lab: Lab, setting: Setting, seed: int) -> dict[str, Any]:
    return lab.train(setting, lab.refined(setting), seed)


CALIBRATIONS = (1, 8, 31)


def calibrated(family: str) -> list[Setting]:
    """Masks chosen by gradients over other numbers of batches than the usual 8."""
    several = [Shira(mask, r=rank(family), calibration=n) for mask in ("grad", "snip") for n in CALIBRATIONS if n != 8]
    return [Setting(name, method) for name in far(family) for method in several]


def crowding(lab: Lab, setting: Setting) -> dict[str, Any]:
    """The share of rows and columns that have an entry, and the share of entries in the fullest tenth of the rows (of
    the columns): means over the weights."""
    seed = lab.seeds[0]
    run = {"do": "crowding", "task": setting.task, "method": setting.method.describe(), "seed": seed}

    def do() -> dict[str, Any]:
        one = task(setting.task)
        with setting.method.attached(one.base(), one, 1e-3, seed) as attached:
            adapter = attached.adapter()
        numbers: dict[str, list[float]] = {"rows": [], "columns": [], "top_rows": [], "top_columns": []}
        for name, entry in adapter.weights.items():
            if not is_whole(one, name):
                m, n = entry.shape[0], entry.numel // entry.shape[0]
                at = refine(entry.indices.long(), entry.granule, 1, entry.numel)
                for which, lines in (
                    ("rows", torch.bincount(at // n, minlength=m)),
                    ("columns", torch.bincount(at % n, minlength=n)),
                ):
                    numbers[which].append(float((lines > 0).double().mean()))
                    numbers[f"top_{which}"].append(fullest(lines))
        return {which: sum(values) / len(values) for which, values in numbers.items()}

    return lab.done(run, do)


def fullest(counts: Tensor) -> float:
    """The share of all entries that lie in the fullest tenth of the rows (or columns)."""
    most = counts.sort(descending=True).values[: max(1, len(counts) // 10)]
    return float(most.sum() / counts.sum())
