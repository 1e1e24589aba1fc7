"""Experiment 3, fusion: what two or three adapters keep of their tasks when they are switched on together.

Every adapter was trained for its own task alone, with the learning rate that experiment 1 found. All are switched on at
the same strength, for a range of strengths; the one that a method is judged by is chosen on validation. A new head
belongs to one task: it is on at full strength where that task is scored, and is not fused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.quality import tasks
from benchmarks.quality.experiments.single import rank
from benchmarks.quality.lab import RATES, Job, Lab, Setting, family_of
from benchmarks.quality.methods import Lora, Method, Shira, is_whole
from benchmarks.quality.task import Task
from shira import Adapter, Entry, Switcher, metrics
from shira.adapter import combine as merging

LARGE = ("minilm", "smollm2", "smollm2-kin")
"""Families that take longer to score than to train: they get fewer groups, variants and strengths, and no merges."""
CHOSEN = {
    "smollm2": (("records", "python3", "pirate"), ("records", "python3")),
    "smollm2-kin": (
        ("idioms-1", "idioms-2", "idioms-3"), ("idioms-12", "idioms-23", "idioms-31"), ("idioms-1", "idioms-2"),
        ("idioms-12", "idioms-23"),
    ),
}  # fmt: skip
"""The groups of the largest: from tasks that have nothing in common to parts of one task, without and with a common
half."""
WHOLE_TASK = {"smollm2-kin": "smollm2/python3"}
"""The task whose best rate the adapters of a family are trained with, since theirs are parts of it."""
SAMPLE = 25
"""In these families the products of two adapters are computed for every so many-th weight."""

ALPHAS = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5)
FEW_ALPHAS = (0.3, 0.5, 0.7, 1.0)


def groups(family: str) -> list[tuple[str, ...]]:
    """Pairs of neighbouring tasks, the nearest with the farthest, and three in a row from the middle."""
    names = list(tasks.tasks(family))
    if family in CHOSEN:
        return [tuple(f"{family}/{what}" for what in group) for group in CHOSEN[family]]
    pairs: list[tuple[str, ...]] = [*itertools.pairwise(names)]
    if len(names) > 2 and family not in LARGE:
        middle = (len(names) - 3) // 2
        pairs += [(names[0], names[-1]), tuple(names[middle : middle + 3])]
    return pairs


STRENGTHS = (0.2, 0.3, 0.5, 0.7, 1.0, 1.4)
"""Of each adapter by itself, where every one has its own (`balanced`)."""

SLOWER = {"a third of the rate": 1, "a tenth of the rate": 2}
"""Gentler training, so that adapters move less far from the base: how many steps of `RATES` below the best rate."""
SPARED = "the lowest good rate"
"""Training at the lowest rate that is as good as the best one for the task alone (`Lab.spared`)."""


GIVEN = {
    ("smollm2", 3): {
        "as much learned as with LoRA": (0.01, 0.01, 0.02),
        "python3 at three times its rate": (0.01, 0.03, 0.03),
    },
}  # fmt: skip
"""Rates that no search found, for random granules of a family and a number of tasks: those at which they have learned
about as much as LoRA at its best (`findings.Results.matched`); and a stronger adapter for the task that gives way."""


@dataclass(frozen=True)
class Variant:
    """Adapters that are to be fused: a method for each, and how far below its best learning rate it is trained."""

    name: str
    methods: tuple[Method, ...]
    slower: int = 0
    spared: bool = False
    rates: tuple[float, ...] = ()
    """In place of the rates of a search."""


def variants(family: str, count: int) -> list[Variant]:
    """Every compared way to train ``count`` adapters."""
    r = rank(family)
    if family in CHOSEN:
        granules = Shira("rand", r=r, granule=16)
        chosen = {
            "lora": Lora(r), "rand 16, one mask": granules, "rand, one mask": Shira("rand", r=r),
            "wm, one mask": Shira("wm", r=r),
        }  # fmt: skip
        gentler = next(iter(SLOWER))
        own = tuple(replace(granules, part=part) for part in range(count))
        given = GIVEN.get((family, count), {})
        return [
            *(Variant(name, (method,) * count) for name, method in chosen.items()),
            *(Variant(f"{name}, {SPARED}", (method,) * count, spared=True) for name, method in chosen.items()),
            *(Variant(f"{name}, {gentler}", (method,) * count, SLOWER[gentler]) for name, method in chosen.items()),
            Variant(f"rand 16, disjoint, {SPARED}", own, spared=True),
            *(Variant(f"rand 16, one mask, {name}", (granules,) * count, rates=rates) for name, rates in given.items()),
        ]
    several = {"lora": Lora(r), "rand, one mask": Shira("rand", r=r)}
    if family in LARGE:
        several["snip, own masks"] = Shira("snip", r=r)
    else:
        several["wm, one mask"] = Shira("wm", r=r)
    found = [Variant(name, (method,) * count) for name, method in several.items()]
    for text, slower in SLOWER.items():
        found += [Variant(f"{name}, {text}", (method,) * count, slower) for name, method in several.items()]

    def disjoint(name: str, **options: Any) -> Variant:
        return Variant(f"{name}, disjoint", tuple(Shira(r=r, part=part, **options) for part in range(count)))

    if family in LARGE:
        return [*found, disjoint("rand", mask="rand")]
    for name, kind in (("struct, one mask", "struct"), ("snip, own masks", "snip"), ("grad, own masks", "grad")):
        found.append(Variant(name, (Shira(kind, r=r),) * count))
    found += [disjoint("rand", mask="rand"), disjoint("wm", mask="wm")]
    granules = Shira("rand", r=r, granule=16)
    return [*found, Variant("rand 16, one mask", (granules,) * count), disjoint("rand 16", mask="rand", granule=16)]


def jobs(family: str, seeds: int) -> list[Job]:
    found = []
    for number, group in enumerate(groups(family)):
        for variant in variants(family, len(group)):

            def do(lab: Lab, group: tuple[str, ...] = group, variant: Variant = variant) -> None:
                for seed in lab.seeds_of(group[0]):
                    fused(lab, group, variant, seed)

            found.append(Job(1.2 + number * 0.1, seeds, do))
            if family in CHOSEN:

                def weigh(lab: Lab, group: tuple[str, ...] = group, variant: Variant = variant) -> None:
                    for seed in lab.seeds_of(group[0]):
                        balanced(lab, group, variant, seed)

                found.append(Job(1.25 + number * 0.1, seeds, weigh))
    return found


def fused(lab: Lab, group: Sequence[str], variant: Variant, seed: int) -> dict[str, Any]:
    """Train (or load) the adapters of these tasks, and score them together."""
    run, settings = described(lab, group, variant, seed, "fusion")

    def do() -> dict[str, Any]:
        return measure(group, trained(lab, settings, run))

    return lab.done(run, do)


def described(
    lab: Lab, group: Sequence[str], variant: Variant, seed: int, what: str
) -> tuple[dict[str, Any], list[Setting]]:
    """The description of a run about these adapters, and their settings."""
    settings = [Setting(task, method) for task, method in zip(group, variant.methods, strict=True)]
    rates = list(variant.rates)
    if not rates:
        # The rate of the plain method: a disjoint part is the same kind of mask.
        best = [(lab.spared if variant.spared else lab.tuned)(_searched(setting)) for setting in settings]
        rates = [RATES[max(0, RATES.index(rate) - variant.slower)] for rate in best]
    methods = [method.describe() for method in variant.methods]
    run = {"do": what, "task": group[0], "with": list(group[1:]), "methods": methods, "lrs": rates, "seed": seed}
    return run, settings


def trained(lab: Lab, settings: Sequence[Setting], run: dict[str, Any]) -> list[Adapter]:
    return [lab.adapter(setting, lr, run["seed"]) for setting, lr in zip(settings, run["lrs"], strict=True)]


def balanced(lab: Lab, group: Sequence[str], variant: Variant, seed: int) -> dict[str, Any]:
    """The adapters together, each at a strength of its own.

    From the best common strength on, one adapter after the other is made stronger or weaker by a step of `STRENGTHS`
    as long as the mean validation score of the tasks rises. For families whose tasks have no parameters of their own.
    """
    together = fused(lab, group, variant, seed)["together"]["sum"]
    start = max(together, key=lambda alpha: sum(together[alpha]["validation"]))
    run, settings = described(lab, group, variant, seed, "strengths")

    def do() -> dict[str, Any]:
        model = tasks.task(group[0]).base()
        switcher = Switcher(model)
        for name, adapter in zip(group, trained(lab, settings, run), strict=True):
            switcher.add(name, adapter)

        def scores(places: Sequence[int], split: str) -> list[float]:
            switcher.activate({name: STRENGTHS[at] for name, at in zip(group, places, strict=True)})
            return [tasks.task(name).score(model, split) for name in group]

        best, tried = climbed([STRENGTHS.index(float(start))] * len(group), lambda at: sum(scores(at, "validation")))
        found = {split: scores(best, split) for split in ("validation", "test")}
        return {"strengths": [STRENGTHS[at] for at in best], "tried": tried, **found}

    return lab.done(run, do)


def climbed(start: Sequence[int], score: Callable[[Sequence[int]], float]) -> tuple[list[int], int]:
    """From these places of `STRENGTHS`, one step of one place at a time while the score rises: where it ends, and how
    many were tried."""
    scores = {tuple(start): score(start)}
    best, before = tuple(start), None
    while best != before:
        before = best
        for number, step in itertools.product(range(len(start)), (1, -1)):
            at = (*best[:number], best[number] + step, *best[number + 1 :])
            if at[number] in range(len(STRENGTHS)) and at not in scores:
                scores[at] = score(at)
                best = max(best, at, key=scores.__getitem__)
    return list(best), len(scores)


def _searched(setting: Setting) -> Setting:
    """The setting whose rate is taken."""
    name = WHOLE_TASK.get(family_of(setting.task), setting.task)
    return replace(setting, task=name, method=_plain(setting.method))


def _plain(method: Method) -> Method:
    return Shira(method.mask, r=method.r, granule=method.granule) if isinstance(method, Shira) else method


def measure(group: Sequence[str], adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Scores of each task with its own adapter alone and with all of them, and what the metrics say of every pair.

    ``elsewhere`` has the score of each task (the outer list) with each adapter alone.
    """
    parts = [split(task, adapter) for task, adapter in zip(group, adapters, strict=True)]
    bodies = [body for body, _ in parts]
    first = tasks.task(group[0])
    large = first.family in LARGE
    alphas, merged = FEW_ALPHAS if large else ALPHAS, {}
    if not large:
        model = first.base()
        merged = {
            "ties": merging.ties(bodies, model, density=0.5),
            "dare": merging.dare(bodies, model, drop=0.5),
        }
    single: list[dict[str, float]] = []
    elsewhere: list[list[float]] = []
    together: dict[str, dict[str, dict[str, list[float]]]] = {
        merge: {f"{alpha:g}": {"validation": [], "test": []} for alpha in alphas} for merge in ("sum", *merged)
    }
    for number, (name, (_, head)) in enumerate(zip(group, parts, strict=True)):
        task = tasks.task(name)
        model = task.base()
        switcher = Switcher(model)
        always = {"head": 1.0} if head.weights else {}
        if always:
            switcher.add("head", head)
        for other, body in enumerate(bodies):
            switcher.add(str(other), body)
        for merge, adapter in merged.items():
            switcher.add(merge, adapter)

        def scores(model: torch.nn.Module = model, task: Task = task) -> dict[str, float]:
            return {which: task.score(model, which) for which in ("validation", "test")}

        switcher.activate({str(number): 1.0, **always})
        single.append(scores())
        if first.family in CHOSEN:
            elsewhere.append([])
            for other in range(len(bodies)):
                switcher.activate(str(other))
                elsewhere[-1].append(single[-1]["test"] if other == number else task.score(model, "test"))
        for merge in together:
            for alpha in alphas:
                on = {merge: alpha} if merge != "sum" else {str(other): alpha for other in range(len(bodies))}
                switcher.activate({**on, **always})
                for which, score in scores().items():
                    together[merge][f"{alpha:g}"][which].append(score)
    return {
        "single": {which: [one[which] for one in single] for which in ("validation", "test")},
        "together": together,
        **({"elsewhere": elsewhere} if elsewhere else {}),
        **pairs(group, bodies),
    }


def split(task: str, adapter: Adapter) -> tuple[Adapter, Adapter]:
    """The part of an adapter that is fused, and the parameters that belong to the task."""
    mine = {name for name in adapter.weights if is_whole(tasks.task(task), name)}

    def part(keep: bool) -> Adapter:
        weights = {name: entry for name, entry in adapter.weights.items() if (name in mine) is keep}
        return Adapter(weights, delta=adapter.delta)

    return part(False), part(True)


def pairs(group: Sequence[str], bodies: Sequence[Adapter]) -> dict[str, list[Any]]:
    """The metrics of every pair, and for every ordered pair the interference of the second on the first's data."""
    base = tasks.task(group[0]).base()
    found: dict[str, list[Any]] = {"overlap": [], "awor": [], "awom": [], "awom_relative": [], "interference": []}
    for one, two in itertools.combinations(range(len(group)), 2):
        a, b = bodies[one], bodies[two]
        found["overlap"].append(metrics.overlap(a, b))
        family = tasks.task(group[0]).family
        if family in CHOSEN:
            a, b = (sample(one) for one in (a, b))
        if family not in LARGE or family in CHOSEN:
            numbers = products(a, b) if a.delta else sparse_products(a, b, base)
            for name, number in numbers.items():
                found[name].append(number)
        for first, second in ((one, two), (two, one)):
            task = tasks.task(group[first])
            value = metrics.interference(task.base(), bodies[first], bodies[second], task.inputs())
            found["interference"].append({"of": second, "on": first, "is": value})
    return found


def sample(adapter: Adapter) -> Adapter:
    """Every `SAMPLE`-th of its weights."""
    names = sorted(adapter.weights)[::SAMPLE]
    return Adapter({name: adapter.weights[name] for name in names}, delta=adapter.delta)


def sparse_products(a: Adapter, b: Adapter, base: torch.nn.Module) -> dict[str, float]:
    awom = metrics.awom(a, b, base)
    own = metrics.awom(a, a, base) * metrics.awom(b, b, base)
    return {"awor": metrics.awor(a, b, base), "awom": awom, "awom_relative": awom / own**0.5 if own else 0.0}


def products(a: Adapter, b: Adapter) -> dict[str, float]:
    """The same numbers for dense changes, for which the dense product is quickest."""

    def dense(weights: Mapping[str, Entry], name: str) -> torch.Tensor:
        entry = weights[name]
        return entry.values.detach().double().view(entry.shape[0], -1)

    shared = [name for name in a.weights if name in b.weights]
    sums = {"awor": 0.0, "awom": 0.0, "aa": 0.0, "bb": 0.0}
    for name in shared:
        first, second = dense(a.weights, name), dense(b.weights, name)
        product = first.t() @ second
        sums["awor"] += 1 - int(product.count_nonzero()) / product.numel()
        sums["awom"] += float(torch.linalg.matrix_norm(product, 2))
        sums["aa"] += float(torch.linalg.matrix_norm(first, 2)) ** 2
        sums["bb"] += float(torch.linalg.matrix_norm(second, 2)) ** 2
    own = (sums["aa"] * sums["bb"]) ** 0.5
    count = len(shared)
    return {
        "awor": sums["awor"] / count,
        "awom": sums["awom"] / count,
        "awom_relative": sums["awom"] / own if own else 0.0,
    }
