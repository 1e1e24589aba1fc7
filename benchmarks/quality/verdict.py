"""The tables of the page's verdict: what the long tables below it say, in few rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

from benchmarks.quality import tasks
from benchmarks.quality.experiments import fusion, single
from benchmarks.quality.findings import Coarse, Fused, Grid, Results, coarse, gains, mean, standard_error
from benchmarks.quality.lab import COSTLY, Setting
from benchmarks.quality.methods import MASKS, Dora, Full, Lora, Method, Shira
from benchmarks.quality.tables import affordable
from benchmarks.quality.words import NAMES, difference, fusion_name, number, share, spread, table, what


def means_table(results: Results, *families: str) -> str:
    """Each method's mean over the tasks of a base, at equal parameters."""
    rows = []
    for family in filter(results.has, families):
        r, names = single.rank(family), list(tasks.tasks(family))
        bases = [score for name in names if (score := results.base(name)) is not None]
        methods: list[Method] = [*(Shira(mask, r=r) for mask in MASKS), Lora(r), Dora(r), Full()]
        cells = []
        for method in methods:
            scores = [results.scores(Setting(name, method)) for name in names]
            cells.append(
                f"{number(family, mean(mean(one or ()) for one in scores))}{fewest(family, scores)}"
                if all(scores)
                else ""
            )
        if any(cells):
            untouched = number(family, mean(bases)) if len(bases) == len(names) else ""
            rows.append([family, untouched, *cells])
    heading = ["base", "untouched", *(NAMES[mask] for mask in MASKS), "LoRA", "DoRA", "full fine-tuning"]
    return table(heading, rows) if rows else ""


def fewest(family: str, scores: Iterable[list[float] | None]) -> str:
    """How many seeds every task has at least, where runs take long and that may be one."""
    return f" ({min(len(one or ()) for one in scores)})" if family in COSTLY else ""


def gaps_table(results: Results, *families: str) -> str:
    """By how much SHiRA is ahead of LoRA, task by task: pairs of runs with one seed, mean and standard error."""
    rows = []
    for family in filter(results.has, families):
        rand = Shira("rand", r=single.rank(family))
        for name, task in tasks.tasks(family).items():
            by, base, best = ahead(results, name, rand), results.base(name), best_mask(results, name)
            if by and base is not None:
                others = [NAMES[best.mask], ahead(results, name, best)] if best else ["", ""]
                longer = ahead(results, name, rand, 4 * task.steps)
                rows.append([family, what(name), number(family, base), by, *others, longer])
    ahead_by = ["Rand ahead of LoRA by", "best mask", "that ahead by", "Rand ahead by, with 4 x the steps"]
    return table(["base", "task", "untouched", *ahead_by], rows) if rows else ""


def ahead(results: Results, name: str, mask: Shira, steps: int | None = None) -> str:
    """The difference of a mask's scores and LoRA's on a task."""
    family = name.partition("/")[0]
    ours, lora = (results.scores(Setting(name, method, steps)) for method in (mask, Lora(single.rank(family))))
    return difference(family, gains(ours, lora)) if ours and lora else ""


def best_mask(results: Results, name: str) -> Shira | None:
    """The mask of single entries with the best validation score on a task, where all of them were run."""
    methods = [Shira(mask, r=single.rank(name.partition("/")[0])) for mask in MASKS]
    found = {method: results.study(Setting(name, method)) for method in methods}
    if not all(found.values()):
        return None
    return max(methods, key=lambda method: mean(one["validation"] for one in found[method] or ()))


def rates_table(results: Results, *families: str) -> str:
    """From where to where the tuned learning rates of experiment 1 lie, over the tasks of a base."""
    rows = []
    for family in filter(results.has, families):
        r, names = single.rank(family), list(tasks.tasks(family))
        methods: list[Method] = [*(Shira(mask, r=r) for mask in MASKS), Lora(r), Dora(r), Full()]
        found = {method: [results.rate(Setting(name, method)) for name in names] for method in methods}
        cells = [reach(rate for rate in rates if rate) for rates in found.values()]
        if any(cells):
            pairs = zip(found[Shira("rand", r=r)], found[Lora(r)], strict=True)
            rows.append([family, *cells, reach(round(rand / lora) for rand, lora in pairs if rand and lora)])
    heading = ["base", *(NAMES[mask] for mask in MASKS), "LoRA", "DoRA", "full fine-tuning", "Rand / LoRA on a task"]
    return table(heading, rows) if rows else ""


def reach(values: Iterable[float]) -> str:
    """From the lowest to the highest."""
    found = sorted(set(values))
    return " to ".join(f"{value:g}" for value in dict.fromkeys((found[0], found[-1]))) if found else ""


KINDS: dict[str, Callable[[Coarse], bool]] = {
    "digits": lambda one: one.where.startswith("digits") and "inverted" not in one.where,
    "digits, inverted ink": lambda one: "inverted" in one.where,
    "GPT": lambda one: one.where.startswith("gpt"),
    "MiniLM": lambda one: one.where == "minilm",
}
GRANULES = (5, 10, 20, 50, 100, 200, 400, 1000, math.inf)


def granules_table(results: Results) -> str:
    """What granules lose of what single entries gain, by how many of them a weight has: bases of one kind together."""
    every = coarse(results)
    kinds = {kind: [one for one in every if of(one)] for kind, of in KINDS.items()}
    kinds = {kind: found for kind, found in kinds.items() if found}
    rows = []
    for low, high in itertools.pairwise(GRANULES):
        lost = [[share for one in some if low <= one.granules < high for share in one.lost] for some in kinds.values()]
        if any(lost):
            cells = [f"{100 * mean(one):.1f} ± {100 * standard_error(one):.1f}" if one else "" for one in lost]
            rows.append([f"{low} and more" if high == math.inf else f"{low} to {high}", *cells])
    return table(["granules in a weight", *kinds], rows) if rows else ""


def switch_table(results: Results, *families: str) -> str:
    """The best granules and the best single entries that switch in a given time."""
    rows = []
    budgets = (0.8, 3.2)
    for family in filter(results.has, families):
        found = Grid(results, family)
        if results.switching and found.names:
            cells = [
                affordable(found, "switch", budget, granules=granules)
                for budget in budgets
                for granules in (True, False)
            ]
            rows.append([family, *cells])
    heading = [f"{kind}, {budget:g} ms" for budget in budgets for kind in ("granules", "single entries")]
    return table(["base", *heading], rows) if rows else ""


def fused_table(results: Results, *families: str) -> str:
    """For each group of tasks the best LoRA and the best SHiRA: the rate, the strength and the mask that validation
    prefers, the mean score of the tasks there, and the share of what the adapters gain alone that is left."""
    rows = []
    for family in filter(results.has, families):
        fused = Fused(results, family)
        for group in fused.groups():
            cells = []
            for lora in (True, False):
                keys = [key for key in fused.runs if key[0] == group and key[1].startswith("lora") is lora]
                cells += told(fused, family, preferred(fused, keys)) if keys else ["", ""]
            rows.append([family, " + ".join(map(what, group)), *cells])
    heading = ["base", "tasks", "LoRA", "LoRA keeps, %", "SHiRA", "SHiRA keeps, %"]
    return table(heading, rows) if rows else ""


Key = tuple[tuple[str, ...], str]


def validation(fused: Fused, key: Key) -> float:
    alpha = fused.alpha(key)
    return mean(mean(run["together"]["sum"][alpha]["validation"]) for run in fused.runs[key])


def preferred(fused: Fused, keys: Iterable[Key]) -> Key:
    """The way of training with the best validation score; of those with the most seeds."""
    return max(keys, key=lambda key: (len(fused.runs[key]), validation(fused, key)))


def told(fused: Fused, family: str, key: Key) -> list[str]:
    alpha = fused.alpha(key)
    scores = [mean(run["together"]["sum"][alpha]["test"]) for run in fused.runs[key]]
    name = fusion_name(key[1]).removeprefix("SHiRA-").removeprefix("LoRA").removeprefix(", ")
    how = ", ".join(filter(None, [name, f"strength {alpha}"]))
    return [f"{spread(family, scores)} ({how})", share(fused.kept(key, "sum", alpha))]


def gentle_table(results: Results, *families: str) -> str:
    """The share kept at strength 1 and at the best strength, by the learning rate: the first two tasks of each base."""
    columns = {}
    for family in filter(results.has, families):
        fused = Fused(results, family)
        if fused.groups():
            columns[family] = fused, fused.groups()[0]
    rows = []
    for variant in ("lora", "rand, one mask"):
        for slower in ("", *fusion.SLOWER):
            name = f"{variant}, {slower}" if slower else variant
            cells = []
            for fused, group in columns.values():
                key = (group, name)
                if key in fused.runs:
                    alpha = fused.alpha(key)
                    alone = mean(mean(run["single"]["test"]) for run in fused.runs[key])
                    kept = [share(fused.kept(key, "sum", one)) for one in ("1", alpha)]
                    cells.append(f"{number(fused.family, alone)}; {kept[0]}; {kept[1]} at {alpha}")
                else:
                    cells.append("")
            if any(cells):
                rows.append([fusion_name(name), *cells])
    heading = [f"{family}, {' + '.join(map(what, group))}" for family, (_, group) in columns.items()]
    return table(["adapters", *heading], rows) if rows else ""


VERDICT: dict[str, Callable[..., str]] = {
    "verdict-means": means_table,
    "verdict-gaps": gaps_table,
    "verdict-rates": rates_table,
    "verdict-granules": granules_table,
    "verdict-switch": switch_table,
    "verdict-fused": fused_table,
    "verdict-gentle": gentle_table,
}
