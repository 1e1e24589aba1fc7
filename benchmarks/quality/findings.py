"""What the kept results say: scores and costs by task and method, and what follows from them.

Nothing is run. A setting has scores once its learning rate is tuned and all its seeds are done, and not before.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.quality import tasks
from benchmarks.quality.experiments import fusion, masks, single, size
from benchmarks.quality.lab import COSTLY, UNSTEADY, Lab, Setting, Stop, family_of
from benchmarks.quality.methods import MASKS, Shira
from benchmarks.quality.store import RESULTS

FAMILIES_SHOWN = ("digits-mlp", "digits-vit", "minilm", "gpt-m")
"""The families with plots of their own. The other sizes appear only in the tables about the size of the model."""


@dataclass
class Reader(Lab):
    """A lab in which nothing is run, since it has no time: what is missing ends in `Stop`. So it remembers what it
    has looked up."""

    until: float = 0
    _rates: dict[Setting, float | None] = field(default_factory=dict)

    def tuned(self, setting: Setting) -> float:
        if setting not in self._rates:
            try:
                self._rates[setting] = super().tuned(setting)
            except Stop:
                self._rates[setting] = None
        rate = self._rates[setting]
        if rate is None:
            raise Stop
        return rate


class Results:
    """The kept results, read as the experiments wrote them."""

    def __init__(self, folder: Path = RESULTS, seeds: int = 5) -> None:
        self.lab = Reader(folder=folder, seeds=range(seeds))
        self.folder, self.seeds = folder, seeds

    def study(self, setting: Setting) -> list[dict[str, Any]] | None:
        """The results of every seed; where a run takes long, of the seeds that are done, from the first one on."""
        try:
            lr = self.lab.tuned(setting)
        except Stop:
            return None
        return self.trained(setting, lr)

    def _done(self, task: str, run: Callable[[int], Any]) -> list[Any] | None:
        found = []
        for seed in self.lab.seeds_of(task):
            try:
                found.append(run(seed))
            except Stop:
                if family_of(task) not in COSTLY:
                    return None
                break
        return found or None

    def trained(self, setting: Setting, lr: float) -> list[dict[str, Any]] | None:
        """The same at a rate that was found otherwise."""
        return self._done(setting.task, lambda seed: self.lab.train(setting, lr, seed))

    def longer(self, setting: Setting) -> list[dict[str, Any]] | None:
        """The results of every seed of a longer run, at the rate of the shorter ones."""
        return self._done(setting.task, lambda seed: single.longer_run(self.lab, setting, seed))

    def refined(self, setting: Setting) -> list[dict[str, Any]] | None:
        """The results of every seed at the rate of the finer search."""
        return self._done(setting.task, lambda seed: single.refined_run(self.lab, setting, seed))

    def by_rate(self, setting: Setting) -> dict[float, list[dict[str, Any]]]:
        """The results at every rate that was tried, those that diverged aside, from the lowest on."""
        asked, found = setting.run(0.0, 0), dict[float, list[dict[str, Any]]]()
        for run, result in self.lab.store(family_of(setting.task)):
            if {**run, "lr": 0.0, "seed": 0} == asked and result["test"] is not None:
                found.setdefault(run["lr"], []).append(result)
        return dict(sorted(found.items()))

    def steady(self, setting: Setting) -> tuple[float, list[dict[str, Any]]] | None:
        """The rate with the best mean validation score of those that were run with every seed, and its results."""
        seeds = len(self.lab.seeds_of(setting.task))
        found = {rate: runs for rate, runs in self.by_rate(setting).items() if len(runs) >= seeds}
        return max(found.items(), key=lambda one: mean(run["validation"] for run in one[1]), default=None)

    def matched(self, setting: Setting, other: Setting) -> tuple[float, list[dict[str, Any]]] | None:
        """The lowest rate at which a setting is as good as another one at its best rate, to within `UNSTEADY` of the
        mean validation score, and the results there; of the rates that were run with every seed."""
        goal, seeds = self.study(other), len(self.lab.seeds_of(setting.task))
        for rate, runs in self.by_rate(setting).items() if goal else ():
            scores = [mean(one["validation"] for one in some) for some in (runs, goal or ())]
            if len(runs) >= seeds and scores[0] >= scores[1] - UNSTEADY:
                return rate, runs
        return None

    def rate(self, setting: Setting) -> float | None:
        try:
            return self.lab.tuned(setting)
        except Stop:
            return None

    def scores(self, setting: Setting) -> list[float] | None:
        """A test score for each seed."""
        found = self.study(setting)
        return None if found is None else [-math.inf if one["test"] is None else one["test"] for one in found]

    def base(self, task: str) -> float | None:
        try:
            score: float = self.lab.base(task)["test"]
        except Stop:
            return None
        return score

    def has(self, family: str) -> bool:
        return (self.folder / f"{family}.jsonl").exists()

    def fused(self, group: Sequence[str], variant: fusion.Variant) -> list[dict[str, Any]] | None:
        """The results of a group of adapters switched on together, one for each seed."""
        return self._done(group[0], lambda seed: fusion.fused(self.lab, group, variant, seed))

    def balanced(self, group: Sequence[str], variant: fusion.Variant) -> list[dict[str, Any]] | None:
        """The same, each adapter at a strength of its own."""
        return self._done(group[0], lambda seed: fusion.balanced(self.lab, group, variant, seed))

    def transferred(self, setting: Setting, names: list[str]) -> list[dict[str, float]] | None:
        """Test scores on the tasks of the family, for each seed."""
        try:
            return [size.transfer(self.lab, setting, names, seed)["test"] for seed in self.lab.seeds]
        except Stop:
            return None

    @functools.cached_property
    def switching(self) -> dict[tuple[float, int], float]:
        """Milliseconds per layer by density and granule, measured; granule 0 is the LoRA fuse."""
        path = self.folder / "switching.json"
        if not path.exists():
            return {}
        measured = json.loads(path.read_text())["measured"]
        return {(one["density"], one.get("granule", 0)): one["ms"] for one in measured}


def is_accuracy(family: str) -> bool:
    """Whether scores are accuracies; the others are minus the loss of a language model."""
    return not family.startswith(("gpt", "smollm"))


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def error_over_seeds(by: Sequence[Sequence[float]]) -> float | None:
    """The standard error of the mean of several tasks' means: of these tasks, with other seeds. None where a task has
    one seed."""
    if any(len(some) < 2 for some in by):
        return None
    return math.hypot(*map(standard_error, by)) / len(by)


def gains(ours: Iterable[float], theirs: Iterable[float]) -> list[float]:
    """By how much the first are ahead, of the seeds that both have (each from the first seed on)."""
    return [a - b for a, b in zip(ours, theirs, strict=False)]


def share_of(runs: list[dict[str, Any]]) -> float:
    """The parameters that a LoRA trains, as a share of the weights that it adapts."""
    share: float = runs[0]["trainable"] / runs[0]["targets"]
    return share


def grid(family: str) -> list[tuple[str, Shira]]:
    """Every task and mask of experiment 2."""
    found = []
    for name in tasks.tasks(family):
        for mask, balanced, granule, density in itertools.product(
            MASKS, (False, True), masks.GRANULES, masks.DENSITIES
        ):
            if (mask, balanced) != ("struct", True):
                found.append((name, Shira(mask, density=density, granule=granule, balanced=balanced)))
    return found


class Grid:
    """Experiment 2 of one family: a mean score and costs for every task and mask that is done."""

    def __init__(self, results: Results, family: str) -> None:
        self.family, self.results = family, results
        self.records: dict[tuple[str, Shira], list[dict[str, Any]]] = {}
        for name, method in grid(family):
            found = results.study(Setting(name, method, budget=5))
            # Struct's diagonal alone may have more granules than a narrow weight's budget: its density is then higher.
            if found and all(
                one["test"] is not None and one["nnz"] < 1.2 * method.density * one["targets"] for one in found
            ):
                self.records[name, method] = found
        done = {name: sum(task == name for task, _ in self.records) for name in tasks.tasks(family)}
        self.names = [name for name, count in done.items() if count and count >= 0.5 * max(done.values())]
        """The tasks on which most masks were run; the tables show the masks that were run on all of these."""

    def score(self, name: str, method: Shira) -> float:
        return mean(one["test"] for one in self.records[name, method])

    def cost(self, method: Shira, which: str) -> float:
        return mean(one[which] for (_, other), found in self.records.items() if other == method for one in found)

    def methods(self, names: Sequence[str]) -> list[Shira]:
        """The masks that were run on all of these tasks."""
        every = dict.fromkeys(method for _, method in self.records)
        return [method for method in every if all((name, method) in self.records for name in names)]

    def milliseconds(self, method: Shira) -> float:
        """A switch of a 4096 x 4096 bfloat16 layer: measured for random masks of this density and granule, and
        scaled by how many cache lines this mask touches for each that a random one does."""
        assert method.density is not None
        random = 1 - (1 - method.density) ** (32 / method.granule)
        return self.results.switching[method.density, method.granule] * self.cost(method, "lines") / random

    def price(self, method: Shira, axis: str) -> float:
        """What a mask costs: ``"switch"`` milliseconds, or ``"bytes"`` of its file in percent of the weights' bytes."""
        if axis == "switch":
            return self.milliseconds(method)
        total = mean(one["targets"] for (_, m), records in self.records.items() if m == method for one in records)
        return 100 * self.cost(method, "bytes") / (2 * total)

    def mean_score(self, method: Shira) -> float:
        """The mean over `names`."""
        return mean(self.score(name, method) for name in self.names)

    def best(self, axis: str, budget: float, *, granules: bool) -> Shira | None:
        """The mask with the best mean score that costs no more than the budget: of single entries, or of granules."""
        within = [m for m in self.methods(self.names) if (m.granule > 1) is granules and self.price(m, axis) <= budget]
        return max(within, key=self.mean_score, default=None)


def paired(
    family: str, found: Grid, one: Callable[[Shira], bool], to: Callable[[Shira], Shira]
) -> dict[Shira, list[float]]:
    """For every mask that ``one`` accepts, by how much it is better than its counterpart, on each task and seed."""
    gains: dict[Shira, list[float]] = {}
    for name, method in found.records:
        if one(method) and (name, to(method)) in found.records:
            pairs = zip(found.records[name, method], found.records[name, to(method)], strict=True)
            gains.setdefault(method, []).extend(one["test"] - other["test"] for one, other in pairs)
    return gains


WEIGHTS = {
    **dict.fromkeys(("digits-mlp", "digits-mlp-128", "digits-mlp-1024"), 3), "digits-vit": 12, "minilm": 36,
    **dict.fromkeys(("gpt-s", "gpt-m", "gpt-l"), 14),
}  # fmt: skip
"""How many weights of each family are adapted."""

HARDEST = ("digits-mlp/inverted", "digits-vit/inverted")
"""Tasks on which granules lose far more than on the others of their family; they are shown separately."""


@dataclass
class Coarse:
    """What the granules of one mask lose, as shares of what its single entries gain, for each task and seed."""

    where: str
    """The family, or one of its hardest tasks."""
    method: Shira
    granules: float
    """How many a weight has, the mean over the weights."""
    lost: list[float]


def coarse(results: Results) -> list[Coarse]:
    """All masks of granules that were run beside single entries, of every family. Rand and WM alone: the others crowd
    into few rows, which costs more than granules do."""
    found = []
    for family in filter(results.has, WEIGHTS):
        names, every = list(tasks.tasks(family)), Grid(results, family).records
        r = single.rank(family)
        for name, mask in itertools.product(names, ("rand", "wm")):
            for method in (Shira(mask, r=r), Shira(mask, r=r, granule=16)):
                if records := results.study(Setting(name, method)):
                    every[name, method] = records
            for method in (Shira(mask, density=0.01), Shira(mask, density=0.01, granule=16)):
                if (name, method) not in every and (records := results.study(Setting(name, method))):
                    every[name, method] = records
        lost: dict[tuple[str, Shira], list[float]] = {}
        for name, method in every:
            one, base = replace(method, granule=1), results.base(name)
            plain = method.mask in ("rand", "wm") and not method.balanced and method.granule > 1
            if plain and base is not None and (name, one) in every:
                ours, theirs = ([record["test"] for record in every[name, m]] for m in (method, one))
                where = name.replace("/", ", ") if name in HARDEST else family
                pairs = zip(ours, theirs, strict=True)
                lost.setdefault((where, method), []).extend((b - a) / (mean(theirs) - base) for a, b in pairs)
        for (where, method), shares in lost.items():
            nnz = mean(record["nnz"] for (_, m), records in every.items() if m == method for record in records)
            found.append(Coarse(where, method, nnz / method.granule / WEIGHTS[family], shares))
    return found


class Fused:
    """Experiment 3 of one family: for every group of tasks and variant, the runs of all seeds."""

    def __init__(self, results: Results, family: str) -> None:
        self.family, self.results = family, results
        self.runs: dict[tuple[tuple[str, ...], str], list[dict[str, Any]]] = {}
        self.balanced: dict[tuple[tuple[str, ...], str], list[dict[str, Any]]] = {}
        for group in fusion.groups(family):
            if any(results.base(name) is None for name in group):
                continue  # what is left of the gain could not be told
            for variant in fusion.variants(family, len(group)):
                found = results.fused(group, variant)
                # The lowest good rate may be the best one: these runs are there already.
                if found and not (variant.spared and found in self.runs.values()):
                    self.runs[group, variant.name] = found
                    if family in fusion.CHOSEN and (one := results.balanced(group, variant)):
                        self.balanced[group, variant.name] = one

    def alpha(self, key: tuple[tuple[str, ...], str], merge: str = "sum") -> str:
        """The strength with the best validation score, over all seeds and tasks."""
        found = self.runs[key]
        return max(
            found[0]["together"][merge], key=lambda a: mean(mean(r["together"][merge][a]["validation"]) for r in found)
        )

    def kept(self, key: tuple[tuple[str, ...], str], merge: str, alpha: str) -> list[float]:
        """The share that is left of what the adapters gain alone over the base, all tasks together; for each seed."""
        found = self.runs[key]
        return [self.left(key[0], one["together"][merge][alpha]["test"], one["single"]["test"]) for one in found]

    def left(self, group: tuple[str, ...], together: Sequence[float], alone: Sequence[float]) -> float:
        base = sum(score for name in group if (score := self.results.base(name)) is not None)
        return (sum(together) - base) / (sum(alone) - base)

    def variants(self) -> list[str]:
        return list(dict.fromkeys(variant for _, variant in self.runs))

    def groups(self) -> list[tuple[str, ...]]:
        return list(dict.fromkeys(group for group, _ in self.runs))


METRICS = ("overlap", "awor", "awom", "awom_relative", "interference")


def points(results: Results, family: str) -> list[dict[str, Any]]:
    """For every fused pair: the metrics, and the share of the gain that is lost at strength 1 (summed at half each)."""
    fused = Fused(results, family)
    found = []
    for (group, variant), runs in fused.runs.items():
        if len(group) != 2 or not runs[0]["awom"]:
            continue
        for number_, result in enumerate(runs):
            kept = fused.kept((group, variant), "sum", "1")[number_]
            interference = mean(one["is"] for one in result["interference"])
            numbers = {name: mean(result[name]) for name in METRICS if name != "interference"}
            found.append(
                {"group": group, "variant": variant, "lost": 1 - kept, "interference": interference, **numbers}
            )
    return found


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The rank correlation; None where one of the lists is constant."""

    def ranks(values: Sequence[float]) -> list[float]:
        order = sorted(range(len(values)), key=values.__getitem__)
        found = [0.0] * len(values)
        for _, tied in itertools.groupby(enumerate(order), key=lambda pair: values[pair[1]]):
            some = list(tied)
            for _, index in some:
                found[index] = mean(place for place, _ in some)
        return found

    a, b = ranks(x), ranks(y)
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return statistics.correlation(a, b)
