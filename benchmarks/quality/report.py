"""The page of the results: ``python -m benchmarks.quality.report`` writes ``docs/quality.md``, its plots, and the table
in the README.

The prose is in ``page.md``; a line ``{{single digits-mlp}}`` there becomes that table. Numbers come from the kept
results alone: a setting is in a table once its learning rate is tuned and all its seeds are done, and not before.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.quality import tasks
from benchmarks.quality.experiments import fusion, masks, single, size
from benchmarks.quality.lab import Lab, Setting, Stop
from benchmarks.quality.methods import MASKS, Dora, Full, Lora, Method, Shira, from_description
from benchmarks.quality.store import RESULTS
from benchmarks.quality.task import ROOT

HERE = Path(__file__).parent
PAGE, PLOTS = ROOT / "docs" / "quality.md", ROOT / "docs" / "quality"
NAMES = {"rand": "Rand", "struct": "Struct", "wm": "WM", "grad": "Grad", "snip": "Snip"}


MIXED = {"first": "more in the first weights", "last": "more in the last", "magnitude": "by magnitude over all weights"}
FAMILIES_SHOWN = ("digits-mlp", "digits-vit", "minilm", "gpt-m")
"""Those with plots of their own: the other sizes are in the tables of growth alone."""


# ---- numbers -------------------------------------------------------------------------------------------------


class Results:
    """What is known, read as the experiments wrote it."""

    def __init__(self, folder: Path = RESULTS, seeds: int = 5) -> None:
        # Without time nothing is run: what is missing ends in Stop.
        self.lab = Lab(folder=folder, seeds=range(seeds), until=0)
        self.folder, self.seeds = folder, seeds

    def study(self, setting: Setting) -> list[dict[str, Any]] | None:
        try:
            return self.lab.study(setting)
        except Stop:
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
        """A result for each seed."""
        try:
            return [fusion.fused(self.lab, group, variant, seed) for seed in self.lab.seeds]
        except Stop:
            return None

    def transferred(self, setting: Setting, names: list[str]) -> list[dict[str, float]] | None:
        """Test scores on the tasks of the family, for each seed."""
        try:
            return [size.transfer(self.lab, setting, names, seed)["test"] for seed in self.lab.seeds]
        except Stop:
            return None

    @functools.cached_property
    def switching(self) -> dict[tuple[float, int], float]:
        """Milliseconds a layer by density and granule, measured; granule 0 is the LoRA fuse."""
        path = self.folder / "switching.json"
        if not path.exists():
            return {}
        measured = json.loads(path.read_text())["measured"]
        return {(one["density"], one.get("granule", 0)): one["ms"] for one in measured}


def is_accuracy(family: str) -> bool:
    """Scores are accuracies, or minus the loss of a language model."""
    return not family.startswith("gpt")


def number(family: str, score: float) -> str:
    """A mean, as the tables show it: accuracy in percent, or the loss in nats."""
    if not math.isfinite(score):
        return "diverged"
    return f"{100 * score:.1f}" if is_accuracy(family) else f"{-score:.3f}"


def spread(family: str, scores: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    if not all(map(math.isfinite, scores)):
        return "diverged"
    deviation = statistics.stdev(scores) if len(scores) > 1 else 0.0
    digits = f"{100 * deviation:.1f}" if is_accuracy(family) else f"{deviation:.3f}"
    return f"{number(family, statistics.fmean(scores))} ± {digits}"


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def difference(family: str, values: Sequence[float]) -> str:
    """The mean of differences, in points (or nats), and its standard error."""
    factor = 100 if is_accuracy(family) else 1
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    digits = 1 if is_accuracy(family) else 3
    return f"{factor * mean(values):+.{digits}f} ± {factor * error:.{digits}f}"


def label(method: Method) -> str:
    """A method as the tables call it."""
    if not isinstance(method, Shira):
        return {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning"}[method.kind]
    parts = [f"SHiRA-{NAMES[method.mask]}"]
    if method.granule > 1:
        parts.append(f"granule {method.granule}")
    if method.balanced:
        parts.append("balanced")
    if method.mixed:
        parts.append(MIXED[method.mixed])
    return ", ".join(parts)


def percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def what(task: str) -> str:
    return task.partition("/")[2]


# ---- tables --------------------------------------------------------------------------------------------------


def single_table(results: Results, family: str) -> str:
    """Experiment 1: methods by tasks."""
    names = list(tasks.tasks(family))
    rows = []
    bases = [results.base(name) for name in names]
    if all(score is not None for score in bases):
        known = [score for score in bases if score is not None]
        rows.append(["base, untouched", "", *(number(family, score) for score in known), number(family, mean(known))])
    for method in single.methods(family):
        found = {name: results.study(Setting(name, method)) for name in names}
        done = {name: results.scores(Setting(name, method)) for name in names}
        if not any(done.values()):
            continue
        count = next(one[0]["trainable"] for one in found.values() if one)
        cells = [spread(family, scores) if scores else "" for scores in done.values()]
        complete = [mean(scores) for scores in done.values() if scores]
        total = number(family, mean(complete)) if len(complete) == len(names) else ""
        rows.append([label(method), f"{count:,}", *cells, total])
    return table(["method", "trained", *map(what, names), "mean"], rows) if rows else ""


def rates_table(results: Results, family: str) -> str:
    """The learning rates that the search of experiment 1 ended at."""
    names = list(tasks.tasks(family))
    rows = []
    for method in single.methods(family):
        found = [results.rate(Setting(name, method)) for name in names]
        if any(found):
            rows.append([label(method), *(f"{rate:g}" if rate else "" for rate in found)])
    return table(["method", *map(what, names)], rows) if rows else ""


def steps_table(results: Results, family: str) -> str:
    """Experiment 1 on the farthest tasks, with the steps it has and with four times as many."""
    rows = []
    for setting in single.longer(family):
        short, long = results.scores(replace(setting, steps=None)), results.scores(setting)
        if short and long:
            steps = tasks.task(setting.task).steps
            rows.append([what(setting.task), label(setting.method), spread(family, short), spread(family, long)])
    return table(["task", "method", f"{steps} steps", f"{4 * steps} steps"], rows) if rows else ""


def calibration_table(results: Results, family: str) -> str:
    """Masks by gradients, by the number of batches that they have seen."""
    rows = []
    for name, mask in itertools.product(single.far(family), ("grad", "snip")):
        methods = [Shira(mask, r=single.rank(family), calibration=n) for n in single.CALIBRATIONS]
        cells = [results.scores(Setting(name, method)) for method in methods]
        if any(cells):
            rows.append([what(name), label(methods[0]), *(spread(family, one) if one else "" for one in cells)])
    return table(["task", "mask", *(f"{n} batches" for n in single.CALIBRATIONS)], rows) if rows else ""


def density_rates_table(results: Results, family: str) -> str:
    """The learning rates that experiment 2 ended at: the geometric mean over its tasks."""
    found = Grid(results, family)
    densities = [d for d in masks.DENSITIES if any(method.density == d for _, method in found.records)]
    rows = []
    for mask, granule in itertools.product(MASKS, masks.GRANULES):
        cells = []
        for density in densities:
            method = Shira(mask, density=density, granule=granule)
            rates = [
                results.rate(Setting(name, method, budget=5)) for name in found.names if (name, method) in found.records
            ]
            known = [math.log(rate) for rate in rates if rate]
            cells.append(f"{math.exp(mean(known)):.2g}" if known else "")
        if any(cells):
            rows.append([f"{NAMES[mask]}, granule {granule}", *cells])
    return table(["mask", *map(percent, densities)], rows) if rows else ""


def crowding_table(results: Results, family: str) -> str:
    """Where the masks of experiment 1 lie: means over the tasks."""
    found: dict[str, list[dict[str, float]]] = {}
    for run, result in results.lab.store(family):
        if run["do"] == "crowding":
            found.setdefault(label(from_description(run["method"])), []).append(result)
    rows = [
        [name, *(percent(round(mean(one[which] for one in several), 3)) for which in CROWDING)]
        for name, several in found.items()
    ]
    heading = ["mask", "rows with an entry", "entries in a tenth of the rows", "columns", "in a tenth of the columns"]
    return table(heading, rows) if rows else ""


CROWDING = ("rows", "top_rows", "columns", "top_columns")


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
            # Struct's diagonal alone may have more granules than a narrow weight's budget: that is no equal density.
            if found and all(
                one["test"] is not None and one["nnz"] < 1.2 * method.density * one["targets"] for one in found
            ):
                self.records[name, method] = found
        done = {name: sum(task == name for task, _ in self.records) for name in tasks.tasks(family)}
        self.names = [name for name, count in done.items() if count and count >= 0.5 * max(done.values())]
        """The tasks that most was run on: tables are of the masks that were run on all of them."""

    def score(self, name: str, method: Shira) -> float:
        return mean(one["test"] for one in self.records[name, method])

    def cost(self, method: Shira, which: str) -> float:
        return mean(one[which] for (_, other), found in self.records.items() if other == method for one in found)

    def methods(self, names: Sequence[str]) -> list[Shira]:
        """Masks that are done on all of these tasks."""
        every = dict.fromkeys(method for _, method in self.records)
        return [method for method in every if all((name, method) in self.records for name in names)]

    def milliseconds(self, method: Shira) -> float:
        """A switch of a 4096 x 4096 bfloat16 layer: measured for random masks of this density and granule, times the
        share of lines that this mask touches of what a random one does."""
        assert method.density is not None
        random = 1 - (1 - method.density) ** (32 / method.granule)
        return self.results.switching[method.density, method.granule] * self.cost(method, "lines") / random


def density_table(results: Results, family: str) -> str:
    """Masks and granules by density: the mean over the tasks that every one of them was done on."""
    found = Grid(results, family)
    names = found.names
    if not names:
        return ""
    methods = found.methods(names)
    densities = [d for d in masks.DENSITIES if any(method.density == d for method in methods)]
    rows = []
    for mask, granule in itertools.product(MASKS, masks.GRANULES):
        line = [Shira(mask, density=density, granule=granule) for density in densities]
        if any(method in methods for method in line):
            cells = [
                number(family, mean(found.score(name, method) for name in names)) if method in methods else ""
                for method in line
            ]
            rows.append([f"{NAMES[mask]}, granule {granule}", *cells])
    return f"Mean over {', '.join(map(what, names))}.\n\n" + table(["mask", *map(percent, densities)], rows)


def paired(
    family: str, found: Grid, one: Callable[[Shira], bool], to: Callable[[Shira], Shira]
) -> dict[Shira, list[float]]:
    """For every mask of ``one``, by how much it is better than its counterpart: for every task and seed both have."""
    gains: dict[Shira, list[float]] = {}
    for name, method in found.records:
        if one(method) and (name, to(method)) in found.records:
            pairs = zip(found.records[name, method], found.records[name, to(method)], strict=True)
            gains.setdefault(method, []).extend(one["test"] - other["test"] for one, other in pairs)
    return gains


def compared(results: Results, family: str, kind: str) -> str:
    """What a granule, or balance, costs or wins at equal density: paired differences over tasks and seeds."""
    found = Grid(results, family)
    if kind == "granules":
        gains = paired(family, found, lambda m: m.granule > 1 and not m.balanced, lambda m: replace(m, granule=1))
    else:
        gains = paired(family, found, lambda m: m.balanced, lambda m: replace(m, balanced=False))
    densities = [d for d in masks.DENSITIES if any(method.density == d for method in gains)]
    rows = []
    for mask, granule in itertools.product(MASKS, masks.GRANULES):
        cells = []
        for density in densities:
            method = Shira(mask, density=density, granule=granule, balanced=kind == "balanced")
            cells.append(difference(family, gains[method]) if method in gains else "")
        if any(cells):
            rows.append([f"{NAMES[mask]}, granule {granule}", *cells])
    return table(["mask", *map(percent, densities)], rows) if rows else ""


def best_granules_table(results: Results, family: str) -> str:
    """Granules at 1 %, chosen in every way that there is, against single entries: on the tasks that all were run on."""
    ways: dict[str, dict[str, Any]] = {"as they are": {}, "balanced": {"balanced": True}}
    ways |= {MIXED[mixed]: {"mixed": mixed} for mixed in masks.MIXED}
    every = list(itertools.product(("rand", "wm"), masks.coarse(), ways))

    def scores(name: str, method: Shira) -> list[float] | None:
        return results.scores(Setting(name, method, budget=5))

    def method(mask: str, granule: int, way: str) -> Shira:
        return Shira(mask, density=0.01, granule=granule, **ways[way])

    names = [name for name in tasks.tasks(family) if all(scores(name, method(*one)) for one in every)]
    rows = []
    for mask, granule in itertools.product(("rand", "wm"), masks.coarse()):
        cells = []
        for way in ways:
            single = [score for name in names for score in scores(name, Shira(mask, density=0.01)) or []]
            ours = [score for name in names for score in scores(name, method(mask, granule, way)) or []]
            gains = [a - b for a, b in zip(ours, single, strict=True)]
            cells.append(difference(family, gains) if gains else "")
        rows.append([f"{NAMES[mask]}, granule {granule}", *cells])
    return f"Over {', '.join(map(what, names))}.\n\n" + table(["mask", *ways], rows) if names else ""


WEIGHTS = {
    **dict.fromkeys(("digits-mlp", "digits-mlp-128", "digits-mlp-1024"), 3), "digits-vit": 12, "minilm": 36,
    **dict.fromkeys(("gpt-s", "gpt-m", "gpt-l"), 14),
}  # fmt: skip
"""How many weights of each family are adapted."""


HARDEST = ("digits-mlp/inverted", "digits-vit/inverted")
"""Tasks that granules lose far more on than on their neighbours: told apart."""


@dataclass
class Coarse:
    """What the granules of one mask lose, over tasks and seeds, in shares of what its single entries gain."""

    where: str
    """The family, or one of its hardest tasks."""
    method: Shira
    granules: float
    """In a weight, the mean over the weights."""
    lost: list[float]


def coarse(results: Results) -> list[Coarse]:
    """All masks of granules that were run beside single entries: of every family, Rand and WM (masks that crowd into
    few rows have other troubles)."""
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


def coarse_table(results: Results) -> str:
    """What granules lose by how many of them a weight has: means over all masks that have about as many."""
    every = coarse(results)
    several = sorted({one.where for one in every}, key=[one.where for one in every].index)
    places: dict[int, dict[str, list[Coarse]]] = {}
    for one in every:
        places.setdefault(math.floor(math.log2(one.granules)), {}).setdefault(one.where, []).append(one)
    rows = []
    for place, there in sorted(places.items()):
        cells = []
        for where in several:
            shares = [share for one in there.get(where, ()) for share in one.lost]
            error = statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else 0.0
            cells.append(f"{100 * mean(shares):.1f} ± {100 * error:.1f}" if shares else "")
        rows.append([f"{2**place} to {2 ** (place + 1) - 1}", *cells])
    return table(["granules in a weight", *several], rows) if rows else ""


BUDGETS = {
    "switch": ("ms", (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)),
    "bytes": ("% of the targets' bytes", (0.5, 1, 2, 4, 8, 16)),
}


def front_table(results: Results, family: str, axis: str) -> str:
    """The best mask within a budget, of single entries and of granules."""
    found = Grid(results, family)
    names = found.names
    if not results.switching or not names:
        return ""
    methods = found.methods(names)
    unit, budgets = BUDGETS[axis]

    def price(method: Shira) -> float:
        if axis == "switch":
            return found.milliseconds(method)
        total = mean(one["targets"] for (_, m), records in found.records.items() if m == method for one in records)
        return 100 * found.cost(method, "bytes") / (2 * total)

    def score(method: Shira) -> float:
        return mean(found.score(name, method) for name in names)

    rows = []
    for budget in budgets:
        cells = []
        for fits in (lambda m: m.granule == 1, lambda m: m.granule > 1):
            within = [method for method in methods if fits(method) and price(method) <= budget]
            if within:
                best = max(within, key=score)
                cells.append(f"{number(family, score(best))} ({label(best)[6:]}, {percent(best.density or 0)})")
            else:
                cells.append("none")
        rows.append([f"{budget:g} {unit}", *cells])
    heading = ["at most", "best of single entries", "best of granules"]
    return f"Mean over {', '.join(map(what, names))}.\n\n" + table(heading, rows)


class Fused:
    """Experiment 3 of one family: for every group of tasks and variant, the runs of all seeds."""

    def __init__(self, results: Results, family: str) -> None:
        self.family, self.results = family, results
        self.runs: dict[tuple[tuple[str, ...], str], list[dict[str, Any]]] = {}
        for group in fusion.groups(family):
            for variant in fusion.variants(family, len(group)):
                if found := results.fused(group, variant):
                    self.runs[group, variant.name] = found

    def alpha(self, key: tuple[tuple[str, ...], str], merge: str = "sum") -> str:
        """The strength with the best validation, over all seeds and tasks."""
        found = self.runs[key]
        return max(
            found[0]["together"][merge], key=lambda a: mean(mean(r["together"][merge][a]["validation"]) for r in found)
        )

    def kept(self, key: tuple[tuple[str, ...], str], merge: str, alpha: str) -> list[float]:
        """Of what the adapters gain alone over the base, all tasks together, the share that is left: for each seed."""
        bases = [self.results.base(name) or 0.0 for name in key[0]]
        shares = []
        for result in self.runs[key]:
            together, alone = result["together"][merge][alpha]["test"], result["single"]["test"]
            shares.append((sum(together) - sum(bases)) / (sum(alone) - sum(bases)))
        return shares

    def variants(self) -> list[str]:
        return list(dict.fromkeys(variant for _, variant in self.runs))

    def groups(self) -> list[tuple[str, ...]]:
        return list(dict.fromkeys(group for group, _ in self.runs))


def fusion_name(variant: str) -> str:
    first, comma, rest = variant.partition(",")
    name, _, granule = first.partition(" ")
    text = "LoRA" if name == "lora" else f"SHiRA-{NAMES[name]}" + (f" granule {granule}" if granule else "")
    return text + comma + rest


def share(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * mean(values):.0f} ± {100 * deviation:.0f}"


def fusion_table(results: Results, family: str) -> str:
    """Variants by groups of tasks: share of the gain kept, at strength 1 and at the best one, and the score there."""
    fused = Fused(results, family)
    if not fused.runs:
        return ""
    groups = fused.groups()
    rows = []
    for variant in fused.variants():
        cells = []
        for group in groups:
            key = (group, variant)
            if key not in fused.runs:
                cells.append("")
                continue
            alpha = fused.alpha(key)
            full, best = share(fused.kept(key, "sum", "1")), share(fused.kept(key, "sum", alpha))
            scores = [mean(result["together"]["sum"][alpha]["test"]) for result in fused.runs[key]]
            cells.append(f"{full}; {best} at {alpha}: {spread(family, scores)}")
        rows.append([fusion_name(variant), *cells])
    return table(["adapters", *(" + ".join(map(what, group)) for group in groups)], rows)


def merges_table(results: Results, family: str) -> str:
    """Scores of the adapters alone, and of their sum, TIES and DARE at the best strength: means over the groups of
    tasks that most variants are done on."""
    fused = Fused(results, family)
    if not fused.runs:
        return ""
    count = {group: sum(key[0] == group for key in fused.runs) for group in fused.groups()}
    groups = [group for group in fused.groups() if count[group] == max(count.values())]
    merges = list(next(iter(fused.runs.values()))[0]["together"])

    def score(variant: str, of: Callable[[tuple[tuple[str, ...], str], dict[str, Any]], list[float]]) -> str:
        keys = [(group, variant) for group in groups]
        return number(family, mean(mean(of(key, result)) for key in keys for result in fused.runs[key]))

    rows = []
    for variant in fused.variants():
        if all((group, variant) in fused.runs for group in groups):
            cells = [
                score(variant, lambda _, result: result["single"]["test"]),
                score(variant, lambda _, result: result["together"]["sum"]["1"]["test"]),
            ]
            for merge in merges:
                best = functools.partial(at_best, fused, merge)
                cells.append(score(variant, best))
            rows.append([fusion_name(variant), *cells])
    names = {"sum": "sum, best strength", "ties": "TIES", "dare": "DARE"}
    heading = ["adapters", "alone", "sum at 1", *(names[merge] for merge in merges)]
    over = "; ".join(" + ".join(map(what, group)) for group in groups)
    return f"Over {over}.\n\n" + table(heading, rows)


def at_best(fused: Fused, merge: str, key: tuple[tuple[str, ...], str], result: dict[str, Any]) -> list[float]:
    """The test scores of a run at the strength that is best on validation."""
    scores: list[float] = result["together"][merge][fused.alpha(key, merge)]["test"]
    return scores


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
    """The correlation of ranks; None where one of them is constant."""

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


def metrics_table(results: Results, family: str) -> str:
    """How well each metric orders what is lost: over all pairs, within one variant, and within one pair of tasks."""
    every = points(results, family)
    if not every:
        return ""
    sparse = [point for point in every if not point["variant"].startswith("lora")]

    def within(key: str, metric: str, some: list[dict[str, Any]]) -> str:
        groups: dict[Any, list[dict[str, Any]]] = {}
        for point in some:
            groups.setdefault(point[key], []).append(point)
        found = [
            value
            for group in groups.values()
            if (value := spearman([p[metric] for p in group], [p["lost"] for p in group])) is not None
        ]
        return f"{mean(found):+.2f}" if found else "constant"

    def over(metric: str, some: list[dict[str, Any]]) -> str:
        value = spearman([p[metric] for p in some], [p["lost"] for p in some])
        return "constant" if value is None else f"{value:+.2f}"

    names = {"awor": "AWOR", "awom": "AWOM", "awom_relative": "AWOM / (norm of each)"}
    rows = [
        [
            names.get(metric, metric),
            over(metric, every),
            over(metric, sparse),
            within("variant", metric, every),
            within("group", metric, every),
        ]
        for metric in METRICS
    ]
    return table(["metric", "all", "SHiRA alone", "within one variant", "within one pair of tasks"], rows)


def data_table(results: Results, family: str) -> str:
    """Density by the share of the training data."""
    names = list(tasks.tasks(family))
    name = names[len(names) // 2]
    methods: list[Method] = [Shira(mask, density=d) for mask in ("rand", "wm") for d in size.DENSITIES]
    rows = []
    for method in [*methods, Lora(single.rank(family)), Full()]:
        budget = 5 if isinstance(method, Shira) else 6
        cells = [results.scores(Setting(name, method, fraction=fraction, budget=budget)) for fraction in size.FRACTIONS]
        if any(cells):
            share_ = f", {percent(method.density or 0)}" if isinstance(method, Shira) else ""
            rows.append([label(method) + share_, *(spread(family, one) if one else "" for one in cells)])
    heading = [f"{what(name)}", *(f"{percent(fraction)} of the data" for fraction in size.FRACTIONS)]
    return table(heading, rows) if rows else ""


def transfer_table(results: Results, family: str) -> str:
    """An adapter's score on every task of its family: the mean over seeds; rows are what it was trained for."""
    names = list(tasks.tasks(family))
    bases = [results.base(name) for name in names]
    rows = [["base", "", *("" if score is None else number(family, score) for score in bases)]]
    for method, name in itertools.product(size.transferring(family), names):
        if scores := results.transferred(Setting(name, method), names):
            cells = [spread(family, [one[other] for one in scores]) if other in scores[0] else "" for other in names]
            rows.append([label(method), what(name), *cells])
    return table(["method", "trained for", *map(what, names)], rows) if len(rows) > 1 else ""


def growth_table(results: Results, *families: str) -> str:
    """The same density, and the same rank, in models of several sizes."""
    rows = []
    for family in filter(results.has, families):
        names = list(tasks.tasks(family))
        for name in dict.fromkeys((names[len(names) // 2], names[-1])):
            found = [results.scores(Setting(name, method)) for method in size.growing(family)]
            if any(found):
                r = single.rank(family)
                lora = results.study(Setting(name, Lora(r)))
                trained = f"r = {r}, {percent(round(share_of(lora), 3))}" if lora else ""
                cells = [spread(family, scores) if scores else "" for scores in found]
                base = results.base(name)
                untouched = "" if base is None else number(family, base)
                rows.append([family, what(name), untouched, *cells[:3], trained, *cells[3:]])
    several = ["base", "Rand 1 %", "Rand 1 %, granule 16", "WM 1 %", "at equal parameters", "Rand", "LoRA", "full"]
    return table(["model", "task", *several], rows) if rows else ""


def share_of(runs: list[dict[str, Any]]) -> float:
    """What a LoRA trains, in shares of the weights that it adapts."""
    share: float = runs[0]["trainable"] / runs[0]["targets"]
    return share


def switching_table(results: Results) -> str:
    """Milliseconds a layer by density and granule, and the LoRA fuse."""
    if not results.switching:
        return ""
    rows = [
        [
            f"granule {granule}" if granule else "LoRA fuse",
            *(f"{results.switching[density, granule]:.2f}" for density in masks.DENSITIES),
        ]
        for granule in (*masks.GRANULES, 0)
    ]
    return table(["", *map(percent, masks.DENSITIES)], rows)


def plot(results: Results, *about: str) -> str:
    """A plot, of a family or of all, where there was something to draw."""
    name = "-".join(reversed(about))
    return f"![{', '.join(reversed(about))}](quality/{name}.png)" if (PLOTS / f"{name}.png").exists() else ""


TABLES: dict[str, Callable[..., str]] = {
    "single": single_table,
    "rates": rates_table,
    "steps": steps_table,
    "calibration": calibration_table,
    "density-rates": density_rates_table,
    "crowding": crowding_table,
    "density": density_table,
    "compared": compared,
    "best-granules": best_granules_table,
    "coarse": coarse_table,
    "front": front_table,
    "fusion": fusion_table,
    "merges": merges_table,
    "metrics": metrics_table,
    "data": data_table,
    "transfer": transfer_table,
    "growth": growth_table,
    "switching": switching_table,
    "plot": plot,
}


SHORT = {
    "minilm": "MiniLM, three tasks of text", "digits-vit": "digits, a small transformer, five shifts",
    "digits-mlp": "digits, an MLP, five shifts",
}  # fmt: skip
README = ROOT / "README.md"
MARKS = "<!-- quality: benchmarks/quality/report.py writes from here -->\n", "<!-- quality: to here -->"


def readme(text: str, results: Results) -> str:
    """The README with experiment 1 in short: means over the tasks, of the families where all of it is done."""
    rows = []
    for family, said in SHORT.items():
        r, names = single.rank(family), list(tasks.tasks(family))
        methods = (Shira("rand", r=r), Lora(r), Dora(r), Full())
        cells = [[results.scores(Setting(name, method)) for name in names] for method in methods]
        if all(all(cell) for cell in cells):
            rows.append([said, *(f"{number(family, mean(mean(one or ()) for one in cell))} %" for cell in cells)])
    heading = ["test accuracy, mean over the tasks", "SHiRA (`Rand`)", "LoRA", "DoRA", "full fine-tuning"]
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return before + MARKS[0] + table(heading, rows) + "\n" + MARKS[1] + after


def page(template: str, results: Results) -> str:
    """The template with its tables filled in; one of which nothing is known yet says so."""

    def filled(match: re.Match[str]) -> str:
        name, *arguments = match.group(1).split()
        families = [argument for argument in arguments if argument in tasks.FAMILIES]
        if families and not any(map(results.has, families)):
            return "*Not yet run.*"
        return TABLES[name](results, *arguments) or "*Not yet run.*"

    return re.sub(r"^\{\{(.+?)\}\}$", filled, template, flags=re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> None:
    from benchmarks.quality import front, plots

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.report", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--out", type=Path, default=PAGE, help=f"the page (default: {PAGE.relative_to(ROOT)})")
    given = parser.parse_args(arguments)
    results = Results(given.results)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    plots.draw(results, given.out.parent / "quality")  # the page shows those there are
    given.out.write_text(page((HERE / "page.md").read_text(encoding="utf-8"), results), encoding="utf-8")
    if given.out == PAGE:
        README.write_text(readme(README.read_text(encoding="utf-8"), results), encoding="utf-8")
        front.write(results)


if __name__ == "__main__":
    main()
