"""The paper's style transfer: adapters of each style alone and of two at once, over a range of strengths.

SHiRA with each of the paper's masks against LoRA, with as many parameters of every weight. The learning rate of each
method and style is searched with one budget, by what the adapter draws on the seed of validation. Then each adapter is
switched on at every strength, alone and together with the one of the other style, all by `shira.Switcher`; LoRA's are
the dense changes of its weights, so two of them together are the sum of both products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.quality import tasks
from benchmarks.quality.lab import RATES, Job, Lab, Setting
from benchmarks.quality.methods import MASKS, Lora, Method, Shira
from shira import Switcher

FAMILY = "style"
R = 2
"""LoRA's rank; SHiRA trains as many entries of every weight: 1.6 % of all that are adapted."""
ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.2)
BUDGET = 4  # runs of the search for a rate
SEEDS = 3
SLOWER = {"the best rate": 0, "a third of the rate": 1}
"""Gentler training for what is to be fused: how many steps of `RATES` below the best rate."""


def methods() -> list[Method]:
    return [*(Shira(mask, r=R) for mask in MASKS), Shira("rand", r=R, granule=16), Lora(R)]


def setting(style: str, method: Method) -> Setting:
    return Setting(f"{FAMILY}/{style}", method, budget=BUDGET)


def styles() -> tuple[str, ...]:
    return tuple(name.partition("/")[2] for name in tasks.tasks(FAMILY))


def seeds(lab: Lab) -> Sequence[int]:
    return lab.seeds[:SEEDS]


def rate(lab: Lab, of: Setting, slower: int) -> float:
    return RATES[max(0, RATES.index(lab.searched(of)) - slower)]


def jobs(family: str, count: int) -> list[Job]:
    """The main methods first, then the other masks; what is trained more gently last."""
    if family != FAMILY:
        return []
    found = [Job(0, 1, judge), Job(0, 1, untouched)]
    first = (Shira("rand", r=R), Lora(R))
    for slower in SLOWER.values():
        for number, method in enumerate(sorted(methods(), key=lambda one: one not in first)):

            def do(lab: Lab, method: Method = method, slower: int = slower) -> None:
                for seed in seeds(lab):
                    for style in styles():
                        alone(lab, style, method, seed, slower)
                    fused(lab, method, seed, slower)

            runs = (BUDGET + 2 * SEEDS) * len(styles()) + SEEDS
            found.append(Job(slower + 0.1 * number, runs, do))
    return found


def judge(lab: Lab) -> dict[str, Any]:
    """How well the judge knows real pictures that it has not seen, in each combination of styles."""

    def do() -> dict[str, Any]:
        from benchmarks.quality.tasks import style

        count = style.DRAWN["test"]
        return {
            "+".join(some) or "none": style.judged(style.real(some, "test", count), some, "test")
            for some in style.COMBINATIONS
        }

    return lab.done({"do": "judge", "task": f"{FAMILY}/{styles()[0]}"}, do)


def untouched(lab: Lab) -> dict[str, Any]:
    """What the base draws without an adapter: how often it is the digit that was asked for."""

    def do() -> dict[str, Any]:
        from benchmarks.quality.tasks import style

        pictures = style.draw(style.base(), style.asked(style.DRAWN["test"]), style.SEEDS["test"])
        return {"+".join(some) or "none": style.judged(pictures, some, "test") for some in style.COMBINATIONS}

    return lab.done({"do": "untouched", "task": f"{FAMILY}/{styles()[0]}"}, do)


def alone(lab: Lab, style: str, method: Method, seed: int, slower: int = 0) -> dict[str, Any]:
    """One adapter at every strength: what `tasks.style.judged` says, by strength."""
    return swept(lab, (style,), method, seed, slower)


def fused(lab: Lab, method: Method, seed: int, slower: int = 0) -> dict[str, Any]:
    """The adapters of all styles at once, each at the same strength."""
    return swept(lab, styles(), method, seed, slower)


def swept(lab: Lab, some: tuple[str, ...], method: Method, seed: int, slower: int) -> dict[str, Any]:
    settings = [setting(style, method) for style in some]
    rates = [rate(lab, one, slower) for one in settings]
    run = {
        "do": "alphas", "task": settings[0].task, "with": [one.task for one in settings[1:]],
        "method": method.describe(), "lrs": rates, "seed": seed,
    }  # fmt: skip

    def do() -> dict[str, Any]:
        from benchmarks.quality.tasks import style

        model = style.base()
        switcher = Switcher(model)
        for one, lr in zip(settings, rates, strict=True):
            lab.train(one, lr, seed)
            switcher.add(one.task, lab.adapter(one, lr, seed))
        found = {}
        for alpha in ALPHAS:
            switcher.activate({one.task: alpha for one in settings})
            found[f"{alpha:g}"] = style.drawn(model, some)
        return found

    return lab.done(run, do)
