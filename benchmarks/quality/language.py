"""The tables about a language model that answers: exact answers, what is forgotten, what training costs; and all masks
side by side on every base."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.quality import tasks
from benchmarks.quality.experiments import cost, single
from benchmarks.quality.findings import Results, mean
from benchmarks.quality.lab import RATES, Setting
from benchmarks.quality.methods import LATER, MASKS, Lora, Method, Shira, from_description
from benchmarks.quality.rules import rules_table
from benchmarks.quality.words import NAMES, difference, label, share, table, what


def exact_table(results: Results, family: str) -> str:
    """The share of answers that are right letter for letter, in percent."""
    rows = []
    for method in single.methods(family):
        found = [results.study(Setting(name, method)) for name in tasks.tasks(family)]
        if any(found):
            cells = [share([one["exact"] for one in runs]) if runs else "" for runs in found]
            whole = [one["exact"] for runs in found if runs for one in runs]
            rows.append([label(method), *cells, f"{100 * mean(whole):.0f}" if all(found) else ""])
    return table(["method", *map(what, tasks.tasks(family)), "mean"], rows) if rows else ""


def ahead_table(results: Results, family: str) -> str:
    """By how much each method is ahead of LoRA: pairs of runs with one seed, mean and standard error."""
    names, lora = list(tasks.tasks(family)), Lora(single.rank(family))
    rows = []
    for method in single.methods(family):
        gains = []
        for name in names:
            ours, theirs = (results.scores(Setting(name, one)) for one in (method, lora))
            gains.append([a - b for a, b in zip(ours, theirs, strict=True)] if ours and theirs else [])
        if method != lora and any(gains):
            cells = [difference(family, some) if some else "" for some in gains]
            every = difference(family, [one for some in gains for one in some]) if all(gains) else ""
            rows.append([label(method), *cells, every])
    return table(["ahead of LoRA by", *map(what, names), "all"], rows) if rows else ""


FORGOTTEN = {"docs": "the reference", "chat": "its own answers"}


def forgotten_table(results: Results, family: str) -> str:
    """By how much the loss on other texts rises, in nats a token, at the rates of experiment 1."""
    names = list(tasks.tasks(family))
    rows = []
    for method in single.methods(family):
        found = [results.study(Setting(name, method)) for name in names]
        if not any(found):
            continue
        cells = []
        for which in FORGOTTEN:
            rises = [
                [one[which] - results.lab.base(name)[which] for one in runs] if runs else None
                for name, runs in zip(names, found, strict=True)
            ]
            cells += [rise(values) if values else "" for values in rises]
            cells.append(f"{mean(mean(values or ()) for values in rises):+.2f}" if all(rises) else "")
        rows.append([label(method), *cells])
    heading = [f"{text}: {name}" for text in FORGOTTEN.values() for name in (*map(what, names), "mean")]
    return table(["method", *heading], rows) if rows else ""


def rise(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):+.2f} ± {deviation:.2f}"


def by_rate_table(results: Results, family: str) -> str:
    """The loss on each task by the rate (first seed), and the rise of the loss on the reference beside it."""
    names = list(tasks.tasks(family))
    found: dict[tuple[str, float], dict[str, str]] = {}
    order = [label(method) for method in single.methods(family)]
    for run, result in results.lab.store(family):
        if run["do"] == "train" and run["seed"] == 0 and "steps" not in run and "fraction" not in run:
            key = label(from_description(run["method"])), run["lr"]
            base = results.lab.base(run["task"])
            if key[0] in order and key[1] in RATES:
                said = f"{-result['test']:.3f}" if result["test"] is not None else "diverged"
                rose = f"{result['docs'] - base['docs']:+.2f}" if result["docs"] is not None else ""
                found.setdefault(key, {})[run["task"]] = f"{said} ({rose})"
    keys = sorted(found, key=lambda key: (order.index(key[0]), key[1]))
    rows = [[key[0], f"{key[1]:g}", *(found[key].get(name, "") for name in names)] for key in keys]
    return table(["method", "rate", *map(what, names)], rows) if rows else ""


def cost_table(results: Results, family: str) -> str:
    """Processor time of a step, memory beyond the base's, bytes of the file."""
    runs = {
        label(from_description(run["method"])): one for run, one in results.lab.store(family) if run["do"] == "cost"
    }
    order = [label(method) for method in cost.methods(family)]
    rows = [
        [
            name,
            f"{runs[name]['trainable']:,}",
            f"{runs[name]['step']:.2f}",
            f"{1 / runs[name]['step']:.2f}",
            f"{runs[name]['memory'] / 2**20:.0f}",
            f"{runs[name]['file'] / 1e6:.2f}",
        ]
        for name in order
        if name in runs
    ]
    heading = ["method", "trained", "seconds a step", "steps a second", "memory beyond the base, MiB", "file, MB"]
    return table(heading, rows) if rows else ""


def board_table(results: Results, *families: str) -> str:
    """Every mask against Rand of the same granule, paired by task and seed: the mean difference and its standard error,
    and on how many of the tasks it is ahead by more than that."""
    rows = []
    for mask in (*MASKS[1:], *LATER):
        for granule in (1, 16):
            cells = [against(results, family, mask, granule) for family in families]
            if any(cells):
                rows.append([f"{NAMES[mask]}, granule {granule}", *cells])
    return table(["ahead of Rand by", *families], rows) if rows else ""


def against(results: Results, family: str, mask: str, granule: int) -> str:
    """One cell of the board; empty unless both masks were run on every task."""
    pairs = []
    for name in tasks.tasks(family) if results.has(family) else ():
        methods: list[Method] = [Shira(one, r=single.rank(family), granule=granule) for one in (mask, "rand")]
        ours, rand = (results.scores(Setting(name, method)) for method in methods)
        if not ours or not rand:
            return ""
        pairs.append([a - b for a, b in zip(ours, rand, strict=True)])
    if not pairs:
        return ""
    ahead = sum(mean(gains) > statistics.stdev(gains) for gains in pairs)
    return f"{difference(family, [gain for gains in pairs for gain in gains])} ({ahead} of {len(pairs)})"


LANGUAGE: dict[str, Callable[..., str]] = {
    "ahead": ahead_table,
    "exact": exact_table,
    "forgotten": forgotten_table,
    "by-rate": by_rate_table,
    "cost": cost_table,
    "board": board_table,
    "rules": rules_table,
}
