"""The tables about a language model that answers: exact answers, what is forgotten, what training costs; and all masks
side by side on every base."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.quality import tasks
from benchmarks.quality.experiments import cost, dora, fusion, single, trials
from benchmarks.quality.findings import Fused, Results, gains, mean
from benchmarks.quality.lab import Setting
from benchmarks.quality.methods import LATER, MASKS, Dora, Lora, Method, Shira, from_description
from benchmarks.quality.rules import multiples_table, rules_table
from benchmarks.quality.words import NAMES, difference, fusion_name, label, number, overall, share, spread, table, what


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
        by = []
        for name in names:
            ours, theirs = (results.scores(Setting(name, one)) for one in (method, lora))
            by.append(gains(ours, theirs) if ours and theirs else [])
        if method != lora and any(by):
            cells = [difference(family, some) if some else "" for some in by]
            every = overall(family, by) if all(by) else ""
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
    told = f"{mean(values):+.2f}"
    return f"{told} ± {statistics.stdev(values):.2f}" if len(values) > 1 else told


def matched_table(results: Results, family: str) -> str:
    """What each method forgets where it has learned as much as LoRA at LoRA's best rate (`Results.matched`). In each
    cell are the rate, the loss on the task, and how much the loss on the two kinds of other texts rises."""
    rows = []
    for method in single.methods(family):
        cells, rises = [], []
        for name in tasks.tasks(family):
            found = results.matched(Setting(name, method), Setting(name, Lora(single.rank(family))))
            if found:
                rate, runs = found
                rises.append(forgotten(results, name, runs))
                told = "; ".join(f"{one:+.2f}" for one in rises[-1])
                cells.append(f"{rate:g}: {number(family, mean(one['test'] for one in runs))}; {told}")
            else:
                cells.append("")
        if rises:
            whole = [f"{mean(some):+.2f}" for some in zip(*rises, strict=True)] if len(rises) == len(cells) else []
            rows.append([label(method), *cells, "; ".join(whole)])
    return table(["method", *map(what, tasks.tasks(family)), "mean"], rows) if rows else ""


def forgotten(results: Results, name: str, runs: list[dict[str, Any]]) -> list[float]:
    """By how much the loss on the other texts rises, of each kind; the mean over the runs."""
    base = results.lab.base(name)
    return [mean(one[which] for one in runs) - base[which] for which in FORGOTTEN]


def refined_table(results: Results, family: str) -> str:
    """The finer search: the rate and the loss, in brackets by how much the method is ahead of LoRA."""
    r, rows = single.rank(family), []
    for method in single.close(r):
        cells, by = [], []
        for name in tasks.tasks(family):
            ours, theirs = (results.refined(Setting(name, one)) for one in (method, Lora(r)))
            if not ours:
                cells.append("")
                continue
            scores = [one["test"] for one in ours]
            told = f"{results.lab.refined(Setting(name, method)):g}: {spread(family, scores)}"
            if theirs and method != Lora(r):
                by.append(gains(scores, [one["test"] for one in theirs]))
                told += f" ({difference(family, by[-1])})"
            cells.append(told)
        if any(cells):
            rows.append([label(method), *cells, overall(family, by) if len(by) == len(cells) else ""])
    return table(["method", *map(what, tasks.tasks(family)), "ahead of LoRA, all"], rows) if rows else ""


def together_table(results: Results, *families: str) -> str:
    """By how much each method is ahead of LoRA in the mean over the tasks of each family, and of all of them together;
    and the latter again with rates in half steps, where both were searched in that way."""
    rows = []
    for method in single.methods(families[-1]):
        if method != Lora(single.rank(families[0])):
            cells = [beside_all(results, method, family) for family in families]
            cells += [beside_all(results, method, *families, refined=finer) for finer in (False, True)]
            if any(cells):
                rows.append([label(method), *cells])
    return table(["ahead of LoRA by", *families, "all tasks", "the same, rates in half steps"], rows) if rows else ""


def beside_all(results: Results, method: Method, *families: str, refined: bool = False) -> str:
    """By how much a method is ahead of LoRA in the mean over all tasks of some families; nothing unless both were run
    on every one. ``refined``: at the rates of the finer search."""
    by, lora = [], Lora(single.rank(families[0]))
    for name in (name for family in families for name in tasks.tasks(family)):
        settings = Setting(name, method), Setting(name, lora)
        if refined:
            both = [[run["test"] for run in results.refined(one) or ()] for one in settings]
        else:
            both = [results.scores(one) or [] for one in settings]
        if not all(both):
            return ""
        by.append(gains(*both))
    return overall(families[0], by)


def steady_table(results: Results, family: str) -> str:
    """The rate that all seeds choose, the score there, and by how much it is ahead of LoRA's."""
    rows, lora = [], Lora(single.rank(family))
    for name in tasks.tasks(family):
        theirs = results.steady(Setting(name, lora))
        for method in single.methods(family):
            if ours := results.steady(Setting(name, method)):
                scores, other = ([one["test"] for one in found[1]] if found else [] for found in (ours, theirs))
                by = difference(family, gains(scores, other)) if other and method != lora else ""
                rows.append([label(method), f"{ours[0]:g}", spread(family, scores), by])
    return table(["method", "rate", "score", "ahead of LoRA by"], rows) if rows else ""


def by_rate_table(results: Results, family: str) -> str:
    """The loss on each task by the rate (first seed), and the rise of the loss on the reference beside it."""
    names = list(tasks.tasks(family))
    found: dict[tuple[str, float], dict[str, str]] = {}
    order = [label(method) for method in (*single.close(single.rank(family)), Dora(single.rank(family)))]
    for run, result in results.lab.store(family):
        if run["do"] == "train" and run["seed"] == 0 and "steps" not in run and "fraction" not in run:
            key = label(from_description(run["method"])), run["lr"]
            base = results.lab.base(run["task"])
            if key[0] in order:
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
    rows = [
        [
            name,
            f"{runs[name]['trainable']:,}",
            f"{runs[name]['step']:.2f}",
            f"{1 / runs[name]['step']:.2f}",
            f"{runs[name]['memory'] / 2**20:.0f}",
            # PEFT's own SHiRA writes more than its values.
            "" if method.kind == "peft-shira" else f"{runs[name]['file'] / 1e6:.2f}",
        ]
        for name, method in ((label(method), method) for method in cost.methods(family))
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
            cells = [
                against(results, family, Shira(mask, r=single.rank(family), granule=granule)) for family in families
            ]
            if any(cells):
                rows.append([f"{NAMES[mask]}, granule {granule}", *cells])
    return table(["ahead of Rand by", *families], rows) if rows else ""


def trials_table(results: Results, *families: str) -> str:
    """The same for the masks that the library does not have, and for masks that move."""
    rows: dict[str, list[str]] = {}
    for place, family in enumerate(families):
        for method in trials.methods(family):
            rows.setdefault(label(method), [""] * len(families))[place] = against(results, family, method)
    told = [[name, *cells] for name, cells in rows.items() if any(cells)]
    return table(["ahead of Rand by", *families], told) if told else ""


def against(results: Results, family: str, method: Shira) -> str:
    """One cell of the board; empty unless both masks were run on every task."""
    rand, pairs = Shira("rand", r=method.r, granule=method.granule), []
    for name in tasks.tasks(family) if results.has(family) else ():
        ours, theirs = (results.scores(Setting(name, one)) for one in (method, rand))
        if not ours or not theirs:
            return ""
        pairs.append(gains(ours, theirs))
    if not pairs:
        return ""
    told = overall(family, pairs, between=False)
    if any(len(some) < 2 for some in pairs):
        return told
    return f"{told} ({sum(mean(some) > statistics.stdev(some) for some in pairs)} of {len(pairs)})"


def dora_table(results: Results, *families: str) -> str:
    """DoRA behind a mask, beside the same mask's entries trained themselves, and DoRA that changes every entry."""
    rows = []
    for family in filter(results.has, families):
        for name, method in dora.chosen(family):
            several = (Shira(method.mask, r=method.r), method, Dora(single.rank(family)))
            without, behind, whole = (results.scores(Setting(name, one)) for one in several)
            if without and behind:
                told = [spread(family, scores) if scores else "" for scores in (without, behind, whole)]
                by = difference(family, gains(behind, without))
                rate = f"{results.rate(Setting(name, method)):g}"
                rows.append([family, what(name), NAMES[method.mask], told[0], told[1], rate, by, told[2]])
    heading = ["base", "task", "mask", "its entries", "DoRA behind it", "rate", "ahead by", "DoRA without a mask"]
    return table(heading, rows) if rows else ""


def longer_table(results: Results, family: str) -> str:
    """Four times the steps, at the rate of the shorter runs: the loss, and what is forgotten."""
    rows, more = [], False
    for setting in single.longer(family):
        short = replace(setting, steps=None)
        rate, base = results.rate(short), results.lab.base(setting.task) if results.base(setting.task) else None
        if rate is None or base is None:
            continue
        for one in (short, setting):
            runs = results.trained(one, rate)
            if runs:
                more |= one.steps is not None
                steps = one.steps or tasks.task(one.task).steps
                cells = [spread(family, [run["test"] for run in runs]), share([run["exact"] for run in runs])]
                cells += [rise([run[which] - base[which] for run in runs]) for which in FORGOTTEN]
                rows.append([label(one.method), f"{steps}", f"{rate:g}", f"{len(runs)}", *cells])
    heading = ["method", "steps", "rate", "seeds", "loss", "exact, %", *FORGOTTEN.values()]
    return table(heading, rows) if more else ""


KIN = ("lora", "rand, one mask", "rand 16, one mask", "wm, one mask")
RATES_OF_KIN = ("", f", {fusion.SPARED}", *(f", {slower}" for slower in fusion.SLOWER))


def kin_variants(family: str) -> list[str]:
    """What the table shows: every rate where there are few ways to train, the best one where there are many."""
    if family not in fusion.CHOSEN:
        return list(KIN)
    given = [f"rand 16, one mask, {name}" for several in fusion.GIVEN.values() for name in several]
    return [*(f"{name}{rate}" for name in KIN for rate in RATES_OF_KIN), f"rand 16, disjoint, {fusion.SPARED}", *given]


def kin_table(results: Results, *families: str) -> str:
    """What is left of several adapters on one model, from unrelated tasks to related ones, and what the metrics say."""
    rows, weighed = [], any(family in fusion.CHOSEN for family in families)
    for family in filter(results.has, families):
        fused = Fused(results, family)
        for group in fused.groups():
            for variant in filter(fused.variants().__contains__, kin_variants(family)):
                if runs := fused.runs.get((group, variant)):
                    alpha = fused.alpha((group, variant))
                    alone = [mean(run["single"]["test"]) for run in runs]
                    together = [[mean(run["together"]["sum"][one]["test"]) for run in runs] for one in ("1", alpha)]
                    kept = [share(fused.kept((group, variant), "sum", one)) for one in ("1", alpha)]
                    numbers = [[value for run in runs for value in run[name]] for name in ("overlap", "awor", "awom")]
                    disturbed = mean(one["is"] for run in runs for one in run["interference"])
                    rows.append([
                        " + ".join(map(what, group)), fusion_name(variant), f"{len(runs)}", spread(family, alone),
                        *(f"{spread(family, scores)} ({left} %)" for scores, left in zip(together, kept, strict=True)),
                        alpha, *([own_strengths(fused, (group, variant))] if weighed else []),
                        *(f"{mean(one):.3g}" for one in numbers), f"{disturbed:.2f}",
                    ])  # fmt: skip
    heading = ["tasks", "adapters", "seeds", "alone", "all on at strength 1", "at the best strength", "which is"]
    heading += ["each at its own"] if weighed else []
    return table([*heading, "overlap", "AWOR", "AWOM", "interference"], rows) if rows else ""


def own_strengths(fused: Fused, key: tuple[tuple[str, ...], str]) -> str:
    """The loss with every adapter at a strength of its own, what is left, and these strengths for each seed."""
    found = fused.balanced.get(key)
    if found is None:
        return ""
    scores = spread(fused.family, [mean(one["test"]) for one in found])
    # Each seed beside its own adapters alone; there may be fewer than were fused at one strength.
    left = share([
        fused.left(key[0], one["test"], run["single"]["test"])
        for one, run in zip(found, fused.runs[key], strict=False)
    ])  # fmt: skip
    strengths = "; ".join(", ".join(f"{at:g}" for at in one["strengths"]) for one in found)
    return f"{scores} ({left} %) at {strengths}"


def unseen_table(results: Results, *families: str) -> str:
    """The loss of an adapter on the tasks that it was not trained for, beside the base's."""
    rows = []
    for family in filter(results.has, families):
        fused = Fused(results, family)
        for (group, variant), runs in fused.runs.items():
            bases = [results.base(name) for name in group]
            own = [mean(run["single"]["test"]) for run in runs]
            others = [
                score for run in runs for at, row in enumerate(run["elsewhere"]) for by, score in enumerate(row)
                if at != by
            ]  # fmt: skip
            if all(score is not None for score in bases):
                cells = [mean(score or 0 for score in bases), mean(others), mean(own)]
                told = [number(family, score) for score in cells]
                rows.append([", ".join(map(what, group)), fusion_name(variant), *told])
    heading = ["tasks", "adapters", "base, untouched", "on the tasks of the others", "on its own task"]
    return table(heading, rows) if rows else ""


LANGUAGE: dict[str, Callable[..., str]] = {
    "ahead": ahead_table,
    "exact": exact_table,
    "forgotten": forgotten_table,
    "matched": matched_table,
    "refined": refined_table,
    "together": together_table,
    "by-rate": by_rate_table,
    "steady": steady_table,
    "cost": cost_table,
    "board": board_table,
    "trials": trials_table,
    "longer": longer_table,
    "dora": dora_table,
    "kin": kin_table,
    "unseen": unseen_table,
    "rules": rules_table,
    "multiples": multiples_table,
}
