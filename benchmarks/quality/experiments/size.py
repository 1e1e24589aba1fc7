"""The open questions: how much data a density needs, whether an adapter serves a related task, how models grow."""

from __future__ import annotations

from typing import Any

from benchmarks.quality import tasks
from benchmarks.quality.experiments.single import rank
from benchmarks.quality.lab import Job, Lab, Setting, bases, study
from benchmarks.quality.methods import Full, Lora, Method, Shira
from shira import Switcher

FRACTIONS = (0.05, 0.15, 0.4, 1.0)
DENSITIES = (0.0025, 0.01, 0.04, 0.16)


def jobs(family: str, seeds: int) -> list[Job]:
    names = list(tasks.tasks(family))
    middle = names[len(names) // 2]
    found = []
    # Data: on the task in the middle.
    for fraction in FRACTIONS:
        for mask in ("rand", "wm"):
            for density in DENSITIES:
                method = Shira(mask, density=density)
                found.append(study(2.6, Setting(middle, method, fraction=fraction, budget=5), seeds))
        found.append(study(2.6, Setting(middle, Lora(rank(family)), fraction=fraction), seeds))
        found.append(study(2.6, Setting(middle, Full(), fraction=fraction), seeds))
    # Transfer: every adapter on every task of the family.
    for method in transferring(family):

        def do(lab: Lab, method: Any = method) -> None:
            for name in names:
                for seed in lab.seeds:
                    transfer(lab, Setting(name, method), names, seed)

        found.append(Job(2.2, seeds * len(names), do))
    found += bases(2.0, names)
    for name in dict.fromkeys((middle, names[-1])):
        found += [study(2.1, Setting(name, method), seeds) for method in growing(family)]
    return found


def transferring(family: str) -> list[Method]:
    r = rank(family)
    return [Shira("wm", r=r), Shira("rand", r=r), Lora(r)]


def growing(family: str) -> list[Method]:
    """Growth: the same density in every size, of single entries and of granules (a small weight has few of them); and
    beside LoRA as many entries as it has parameters."""
    r = rank(family)
    granules = Shira("rand", density=0.01, granule=16)
    return [Shira("rand", density=0.01), granules, Shira("wm", density=0.01), Shira("rand", r=r), Lora(r), Full()]


def transfer(lab: Lab, setting: Setting, names: list[str], seed: int) -> dict[str, Any]:
    """One adapter's scores on the tasks of its family; where tasks have parameters of their own, on its task alone."""
    lr = lab.tuned(setting)
    run = {**setting.run(lr, seed), "do": "transfer"}

    def do() -> dict[str, Any]:
        adapter = lab.adapter(setting, lr, seed)
        scores = {}
        for name in names:
            task = tasks.task(name)
            if task.whole is None or name == setting.task:
                model = task.base()
                switcher = Switcher(model)
                switcher.add("it", adapter)
                switcher.activate("it")
                scores[name] = task.score(model, "test")
        return {"test": scores}

    return lab.done(run, do)
