"""The paper's style transfer: adapters of each style alone and of two at once, over a range of strengths.

SHiRA with each of the paper's masks against LoRA, with as many parameters of every weight. The learning rate of each
method and style is searched with one budget, by what the adapter draws on the seed of validation. Then each adapter is
switched on at every strength, alone and together with the one of the other style, all by `shira.Switcher`; LoRA's are
the dense changes of its weights, so two of them together are the sum of both products.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality import tasks
from benchmarks.quality.lab import RATES, Job, Lab, Setting
from benchmarks.quality.methods import MASKS, Lora, Method, Shira
from shira import Adapter, Switcher

FAMILY = "style"
R = 2
"""LoRA's rank; SHiRA trains as many entries of every weight: 1.6 % of all that are adapted."""
ALPHAS = (0.5, 0.75, 1.0, 1.2)
BUDGET = 4  # runs of the search for a rate
FIRST = (Shira("rand", r=R), Lora(R))
"""The methods that are compared with the most seeds, at the best rate."""
SEEDS, FEW_SEEDS = 3, 2


@dataclass(frozen=True)
class Training:
    """How adapters are trained: how many steps of `RATES` below the best rate."""

    name: str
    slower: int = 0


BEST = Training("the best rate")
STRONG = Training("three times the rate", slower=-1)
GENTLE = Training("a third of the rate", slower=1)
STRONGER = Training("ten times the rate", slower=-2)

CLOSE = ((Shira("grad", r=R), BEST), (Shira("snip", r=R), BEST), (Lora(R), STRONG))
"""What fuses best, with the most seeds too."""


def methods() -> list[Method]:
    return [*(Shira(mask, r=R) for mask in MASKS), Shira("rand", r=R, granule=16), Lora(R)]


def trainings() -> dict[Training, list[Method]]:
    """Every way of training, and the methods that are tried with it; the most telling first."""
    every = sorted(methods(), key=lambda one: one not in FIRST)
    several = [*FIRST, Shira("grad", r=R), Shira("snip", r=R)]
    return {BEST: every, STRONG: several, GENTLE: several, STRONGER: [Lora(R)]}


def setting(style: str, method: Method) -> Setting:
    return Setting(f"{FAMILY}/{style}", method, budget=BUDGET)


def styles() -> tuple[str, ...]:
    return tuple(name.partition("/")[2] for name in tasks.tasks(FAMILY))


def seeds(lab: Lab, method: Method, training: Training = BEST) -> Sequence[int]:
    most = (method in FIRST and training == BEST) or (method, training) in CLOSE
    return lab.seeds[: SEEDS if most else FEW_SEEDS]


def rate(lab: Lab, style: str, method: Method, training: Training) -> float:
    """The rate that the search found, as much higher or lower as the training has it."""
    best = RATES.index(lab.searched(setting(style, method)))
    return RATES[min(max(0, best - training.slower), len(RATES) - 1)]


def jobs(family: str, count: int) -> list[Job]:
    if family != FAMILY:
        return []
    found = [Job(0, 1, judge), Job(0, 1, untouched)]
    for place, (training, several) in enumerate(trainings().items()):
        for number, method in enumerate(several):

            def do(lab: Lab, method: Method = method, training: Training = training) -> None:
                for seed in seeds(lab, method, training):
                    for style in styles():
                        alone(lab, style, method, seed, training)
                    fused(lab, method, seed, training)

                sizes(lab, method, training)

            runs = (BUDGET + 2 * SEEDS) * len(styles()) + SEEDS
            found.append(Job(place + 0.1 * number, runs, do))
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


def alone(lab: Lab, style: str, method: Method, seed: int, training: Training = BEST) -> dict[str, Any]:
    """One adapter at every strength: what `tasks.style.judged` says, by strength."""
    return swept(lab, (style,), method, seed, training)


def fused(lab: Lab, method: Method, seed: int, training: Training = BEST) -> dict[str, Any]:
    """The adapters of all styles at once, each at the same strength."""
    return swept(lab, styles(), method, seed, training)


def swept(lab: Lab, some: tuple[str, ...], method: Method, seed: int, training: Training) -> dict[str, Any]:
    settings = [setting(style, method) for style in some]
    rates = [rate(lab, style, method, training) for style in some]
    run = {
        "do": "alphas", "task": settings[0].task, "with": [one.task for one in settings[1:]],
        "method": method.describe(), "lrs": rates, "seed": seed,
    }  # fmt: skip

    def do() -> dict[str, Any]:
        from benchmarks.quality.tasks import style

        model = style.base()
        switcher = Switcher(model)
        for one, lr in zip(settings, rates, strict=True):
            switcher.add(one.task, lab.adapter(one, lr, seed))
        found = {}
        for alpha in ALPHAS:
            switcher.activate({one.task: alpha for one in settings})
            found[f"{alpha:g}"] = style.drawn(model, some)
        return found

    return lab.done(run, do)


def sizes(lab: Lab, method: Method, training: Training = BEST) -> list[dict[str, Any]]:
    """How much the adapters of every seed change: for each style the norm of the change as a share of that of the
    weights, and its stable rank (the mean over the weights); and the cosine between the changes of the first two."""
    names = [setting(style, method).task for style in styles()]
    rates = [rate(lab, style, method, training) for style in styles()]
    found = []
    for seed in seeds(lab, method, training):
        run = {
            "do": "sizes", "task": names[0], "with": names[1:], "method": method.describe(), "lrs": rates, "seed": seed,
        }  # fmt: skip

        def do(seed: int = seed) -> dict[str, Any]:
            model = tasks.task(names[0]).base()
            several = zip(styles(), rates, strict=True)
            adapters = [lab.adapter(setting(style, method), lr, seed) for style, lr in several]
            changes = [changed(model, adapter) for adapter in adapters]
            weights = {name: model.get_parameter(name) for name in changes[0]}
            whole = norm(weights.values())
            one, other = changes[0], changes[1]
            product = sum(float((one[name] * other[name]).sum()) for name in one)
            return {
                "norm": [norm(change.values()) / whole for change in changes],
                "rank": [sum(map(stable_rank, change.values())) / len(change) for change in changes],
                "cosine": product / (norm(one.values()) * norm(other.values())),
            }

        found.append(lab.done(run, do))
    return found


def changed(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """What an adapter at full strength adds to each weight."""
    before = {name: model.get_parameter(name).detach().clone() for name in adapter.weights}
    switcher = Switcher(model)
    switcher.add("it", adapter)
    switcher.activate("it", alpha=1.0)
    found = {name: model.get_parameter(name).detach() - weight for name, weight in before.items()}
    switcher.deactivate()
    return found


def norm(some: Iterable[Tensor]) -> float:
    return sum(float(one.detach().double().square().sum()) for one in some) ** 0.5


def stable_rank(matrix: Tensor) -> float:
    """The squared Frobenius norm over the squared spectral norm: 1 for a matrix of rank 1."""
    return float(matrix.square().sum() / torch.linalg.matrix_norm(matrix, 2) ** 2)
