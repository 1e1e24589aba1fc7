"""The plots of the page, small PNG files. Like the tables, they are made from the kept results alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.quality import tasks
from benchmarks.quality.experiments import fusion, single
from benchmarks.quality.findings import (
    FAMILIES_SHOWN,
    Fused,
    Grid,
    Results,
    coarse,
    is_accuracy,
    mean,
    points,
    standard_error,
)
from benchmarks.quality.lab import Setting
from benchmarks.quality.methods import Method, from_description
from benchmarks.quality.words import fusion_name, label, what

COLORS = {1: "#4477aa", 4: "#66ccee", 8: "#228833", 16: "#ccbb44", 32: "#ee6677"}
MARKERS = {"rand": "o", "struct": "s", "wm": "^", "grad": "v", "snip": "D"}


def draw(results: Results, folder: Path) -> list[Path]:
    """Draws every plot that has something to show; returns their files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    folder.mkdir(parents=True, exist_ok=True)
    made = []

    def keep(figure: Any, name: str) -> None:
        if figure is not None:
            path = folder / f"{name}.png"
            # No date or version inside: the same results give the same file.
            figure.savefig(path, dpi=90, metadata={"Software": None})
            pyplot.close(figure)
            made.append(path)

    for family in filter(results.has, FAMILIES_SHOWN):
        for name, plot in PLOTS.items():
            keep(plot(results, family, pyplot), f"{name}-{family}")
    keep(granules(results, pyplot), "granules")
    keep(tradeoff(results, "smollm2", pyplot), "tradeoff-smollm2")
    return made


def axis_name(family: str) -> str:
    return "test accuracy, %" if is_accuracy(family) else "test loss, nats"


def shown(family: str, score: float) -> float:
    return 100 * score if is_accuracy(family) else -score


def singles(results: Results, family: str, pyplot: Any) -> Any:
    """Experiment 1: a group of bars for each task."""
    names = list(tasks.tasks(family))
    methods = single.methods(family)
    scores = {m: {n: results.scores(Setting(n, m)) for n in names} for m in methods}
    methods = [method for method in methods if any(scores[method].values())]
    if not methods:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 3), layout="constrained")
    width = 0.8 / len(methods)
    for place, method in enumerate(methods):
        at, heights, errors = [], [], []
        for task, name in enumerate(names):
            if one := scores[method][name]:
                at.append(task + (place - (len(methods) - 1) / 2) * width)
                heights.append(shown(family, mean(one)))
                errors.append(abs(shown(family, statistics.stdev(one))))
        axes.bar(at, heights, width * 0.9, yerr=errors, label=label(method), error_kw={"lw": 0.8})
    axes.set_xticks(range(len(names)), [what(name) for name in names])
    axes.set_ylabel(axis_name(family))
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    return figure


def front(results: Results, family: str, pyplot: Any) -> Any:
    """Experiment 2: score by switch time, and by bytes; one point for each mask, density and granule."""
    found = Grid(results, family)
    names = found.names
    if not names or not results.switching:
        return None
    figure, both = pyplot.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for method in found.methods(names):
        y = shown(family, found.mean_score(method))
        style = {"color": COLORS[method.granule], "marker": MARKERS[method.mask], "s": 14}
        style["facecolors"] = COLORS[method.granule] if not method.balanced else "none"
        both[0].scatter(found.milliseconds(method), y, **style)
        both[1].scatter(found.price(method, "bytes"), y, **style)
    both[0].set_xlabel("ms to switch a 4096 x 4096 bfloat16 layer")
    both[1].set_xlabel("file, % of the weights' bytes")
    both[0].set_ylabel(f"{axis_name(family)}, tasks: {len(names)}")
    for axes, ticks in zip(both, ((0.1, 0.2, 0.5, 1, 2, 4), (0.3, 1, 3, 10, 30)), strict=True):
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    for granule, color in COLORS.items():
        both[0].scatter([], [], color=color, s=14, label=f"granule {granule}")
    for mask, marker in MARKERS.items():
        both[1].scatter([], [], color="gray", marker=marker, s=14, label=mask)
    both[0].legend(frameon=False)
    both[1].legend(frameon=False)
    return figure


def granules(results: Results, pyplot: Any) -> Any:
    """Experiment 2, all families: what granules lose, by how many of them a weight has."""
    every = coarse(results)
    if not every:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
    several = dict.fromkeys(one.where for one in every)
    families = list(dict.fromkeys(where.partition(",")[0] for where in several))
    for where in several:
        some = [one for one in every if one.where == where]
        family, _, hardest = where.partition(",")
        errors = [100 * standard_error(one.lost) for one in some]
        x, y = [one.granules for one in some], [100 * mean(one.lost) for one in some]
        style = {
            "color": f"C{families.index(family)}",
            "fmt": "o",
            "ms": 4,
            "lw": 0.8,
            "mfc": "none" if hardest else None,
        }
        axes.errorbar(x, y, errors, label=where, **style)
    axes.axhline(0, color="gray", lw=0.6)
    axes.set_xscale("log")
    ticks = (5, 10, 20, 50, 100, 200, 500, 1000, 2000)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("granules in a weight, mean")
    axes.set_ylabel("lost of what single entries gain, %")
    axes.legend(frameon=False)
    return figure


def tradeoff(results: Results, family: str, pyplot: Any) -> Any:
    """What is learned and what is forgotten: a point for each rate (first seed), a line for each method."""
    if not results.has(family):
        return None
    from matplotlib import ticker

    points: dict[tuple[str, Method], list[tuple[float, float, float]]] = {}
    for run, result in results.lab.store(family):
        if run["do"] == "train" and run["seed"] == 0 and "steps" not in run and None not in result.values():
            rise = result["docs"] - results.lab.base(run["task"])["docs"]
            key = run["task"], from_description(run["method"])
            points.setdefault(key, []).append((run["lr"], rise, -result["test"]))
    names = list(tasks.tasks(family))
    methods = [method for method in single.methods(family) if any((name, method) in points for name in names)]
    figure, grid = pyplot.subplots(1, len(names), figsize=(9, 2.9), layout="constrained")
    for axes, name in zip(grid, names, strict=True):
        for place, method in enumerate(methods):
            if some := sorted(points.get((name, method), ())):
                style = {"color": "black" if method.kind == "lora" else f"C{place % 10}", "lw": 1, "ms": 3}
                style["ls"] = "--" if getattr(method, "granule", 1) > 1 else "-"
                axes.plot([one[1] for one in some], [one[2] for one in some], marker="o", label=label(method), **style)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlim(left=-0.05)
        axes.set_title(what(name), fontsize=8)
        axes.set_xlabel("rise on other text, nats")
    grid[0].set_ylabel(axis_name(family))
    found = {text: line for axes in grid for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), ncols=4, loc="outside lower center", frameon=False)
    return figure


def strengths(results: Results, family: str, pyplot: Any) -> Any:
    """Experiment 3: the mean score of the tasks by strength, one panel for each group of tasks."""
    fused = Fused(results, family)
    groups = [group for group in fused.groups() if sum(key[0] == group for key in fused.runs) > 1]
    if not groups:
        return None
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(8, 2.3 * rows + 0.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(groups) :]:
        axes.axis("off")
    for axes, group in zip(grid.flat, groups, strict=False):
        plain = [variant for variant in fused.variants() if slowness(variant) == 0]
        for variant in fused.variants():
            if (group, variant) in fused.runs:
                alphas = list(fused.runs[group, variant][0]["together"]["sum"])
                runs = fused.runs[group, variant]
                scores = [mean(mean(run["together"]["sum"][alpha]["test"]) for run in runs) for alpha in alphas]
                y = [shown(family, score) for score in scores]
                lora = variant.startswith("lora")
                place = next((n for n, name in enumerate(plain) if variant.startswith(name)), len(plain))
                style: dict[str, Any] = {"color": "black" if lora else f"C{place % 10}", "lw": 1.8 if lora else 1}
                style["ls"] = ("-", "--", ":")[slowness(variant)]
                axes.plot([float(alpha) for alpha in alphas], y, label=fusion_name(variant), **style)
        axes.set_title(" + ".join(map(what, group)), fontsize=8)
    grid[-1][0].set_xlabel("strength of each")
    grid[0][0].set_ylabel(axis_name(family))
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=3, loc="outside lower center", frameon=False)
    return figure


def slowness(variant: str) -> int:
    """How far below its best learning rate a variant was trained (`fusion.Variant`)."""
    return max((slower for text, slower in fusion.SLOWER.items() if variant.endswith(text)), default=0)


def predictors(results: Results, family: str, pyplot: Any) -> Any:
    """Experiment 3: what is lost, by each metric; a point for each pair, variant and seed."""
    every = points(results, family)
    if not every:
        return None
    names = ("overlap", "awor", "awom_relative", "interference")
    figure, grid = pyplot.subplots(1, len(names), figsize=(9, 2.4), sharey=True, layout="constrained")
    for axes, name in zip(grid, names, strict=True):
        for kind, color in (("shira", "#4477aa"), ("lora", "black")):
            some = [point for point in every if point["variant"].startswith("lora") == (kind == "lora")]
            axes.scatter([p[name] for p in some], [100 * p["lost"] for p in some], s=5, color=color, label=kind)
        axes.set_xlabel(name.replace("_", ", "))
    grid[-1].set_xscale("log")
    grid[-1].set_xticks((0.5, 1, 2, 5, 10), ("0.5", "1", "2", "5", "10"))
    grid[-1].minorticks_off()
    grid[0].set_ylabel("gain lost, %")
    grid[0].set_ylim(-5, 130)
    return figure


PLOTS: dict[str, Callable[[Results, str, Any], Any]] = {
    "single": singles,
    "front": front,
    "fusion": strengths,
    "metrics": predictors,
}
