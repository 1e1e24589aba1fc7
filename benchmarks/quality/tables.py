"""The tables of the page, each made by a function of the results; a table is empty until something it shows was run."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.quality import tasks
from benchmarks.quality.experiments import masks, single, size
from benchmarks.quality.findings import (
    METRICS,
    Coarse,
    Fused,
    Grid,
    Results,
    coarse,
    mean,
    paired,
    points,
    share_of,
    spearman,
    standard_error,
)
from benchmarks.quality.lab import Setting
from benchmarks.quality.methods import MASKS, Full, Lora, Method, Shira, from_description
from benchmarks.quality.words import (
    MIXED,
    NAMES,
    difference,
    fusion_name,
    label,
    number,
    percent,
    share,
    spread,
    table,
    what,
)


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
    """Masks that are chosen by gradients, by the number of batches they have seen."""
    rows = []
    for name, mask in itertools.product(single.far(family), ("grad", "snip")):
        methods = [Shira(mask, r=single.rank(family), calibration=n) for n in single.CALIBRATIONS]
        cells = [results.scores(Setting(name, method)) for method in methods]
        if any(cells):
            rows.append([what(name), label(methods[0]), *(spread(family, one) if one else "" for one in cells)])
    return table(["task", "mask", *(f"{n} batch{'es' * (n > 1)}" for n in single.CALIBRATIONS)], rows) if rows else ""


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


CROWDING = ("rows", "top_rows", "columns", "top_columns")


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


def density_table(results: Results, family: str) -> str:
    """Masks and granules by density: the mean over the tasks on which all of them were run."""
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
    """Granules at 1 %, placed in every way, against single entries, on the tasks on which all of them were run."""
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


def coarse_table(results: Results) -> str:
    """What granules lose, by how many of them a weight has: means over all masks that have about as many."""
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
            cells.append(f"{100 * mean(shares):.1f} ± {100 * standard_error(shares):.1f}" if shares else "")
        rows.append([f"{2**place} to {2 ** (place + 1) - 1}", *cells])
    return table(["granules in a weight", *several], rows) if rows else ""


BUDGETS = {
    "switch": ("ms", (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)),
    "bytes": ("% of the targets' bytes", (0.5, 1, 2, 4, 8, 16)),
}


def front_table(results: Results, family: str, axis: str) -> str:
    """The best mask within a budget, of single entries and of granules."""
    found = Grid(results, family)
    if not results.switching or not found.names:
        return ""
    unit, budgets = BUDGETS[axis]
    rows = [
        [f"{budget:g} {unit}", *(affordable(found, axis, budget, granules=granules) for granules in (False, True))]
        for budget in budgets
    ]
    heading = ["at most", "best of single entries", "best of granules"]
    return f"Mean over {', '.join(map(what, found.names))}.\n\n" + table(heading, rows)


def affordable(found: Grid, axis: str, budget: float, *, granules: bool) -> str:
    """The score of the best mask within a budget, and which it is."""
    best = found.best(axis, budget, granules=granules)
    if best is None:
        return "none"
    return f"{number(found.family, found.mean_score(best))} ({label(best)[6:]}, {percent(best.density or 0)})"


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
    tasks on which most variants were run."""
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


def metrics_table(results: Results, family: str) -> str:
    """How well each metric orders pairs by what they lose: over all, within one variant, within one pair of tasks."""
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
    """Scores by density and by the share of the training data."""
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
    """An adapter's mean score on every task of its family; the rows name the task that it was trained for."""
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


def switching_table(results: Results) -> str:
    """Milliseconds per layer by density and granule, and the LoRA fuse."""
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
}
