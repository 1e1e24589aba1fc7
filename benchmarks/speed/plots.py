"""The plots of a run, as PNG files. Nothing is measured; a plot whose benchmarks are not in the results is left out."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.speed import scaling, summary, texts

OURS, PLAIN, LORA, PEFT, BOUND = "#00796b", "#5c6bc0", "#ef6c00", "#9e9e9e", "#c62828"
ITEM = {"bf16": 2, "fp32": 4}
COLOURS = {1: OURS, 2: PLAIN, 4: LORA, 8: PEFT}
GROUPS = (("PEFT", PEFT), ("addmm_", LORA), ("W += s", LORA))
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "figure.constrained_layout.use": True,
}


def colour(way: str) -> str:
    return next((shade for start, shade in GROUPS if way.startswith(start)), PLAIN)


def whiskers(results: list[dict[str, float]]) -> list[list[float]]:
    """The distances from the medians down and up to the quartiles."""
    return [[one["median"] - one["low"] for one in results], [one["high"] - one["median"] for one in results]]


def bars(axes: Axes, names: list[str], found: list[dict[str, float]], shades: list[str]) -> None:
    """Horizontal bars on a logarithmic axis."""
    axes.barh(names, [one["median"] for one in found], xerr=whiskers(found), color=shades, ecolor="#444", height=0.7)
    axes.set_xscale("log")
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


# Plots: each takes the figures and returns a drawing, or None where nothing was measured.


def ways(f: texts.Figures) -> Figure | None:
    """Milliseconds per layer for every way to put an adapter in, beside touch."""
    infos = {info["dtype"]: info for info in f.info("bench_ways[1thread")}
    if not infos:
        return None
    figure, panels = plt.subplots(1, len(infos), figsize=(4.6 * len(infos), 4.2), squeeze=False)
    for axes, (dtype, info) in zip(panels[0], infos.items(), strict=True):
        measured = {
            name: {key: 1e3 * value for key, value in found.items()}
            for name, found in info["seconds"].items()
            if name == "swap_" or (f"swap_ over ways {dtype}", name, 1) in f.all
        }
        names = sorted(measured, key=lambda one: measured[one]["median"])
        shades = [OURS if name == "swap_" else colour(name) for name in names]
        bars(axes, ["shira swap_" if name == "swap_" else name for name in names], [measured[n] for n in names], shades)
        for at, name in enumerate(names):
            axes.text(measured[name]["high"] * 1.12, at, f"{measured[name]['median']:.3g}", va="center", fontsize=7.5)
        axes.set_xlim(right=max(one["high"] for one in measured.values()) * 3)
        limit = 1e3 * info["seconds"][info["fastest"]["touch"]]["median"]
        axes.axvline(limit, color=BOUND, linestyle="--", linewidth=1)
        axes.set_xlim(left=0.6 * min(limit, *(one["low"] for one in measured.values())))
        axes.text(0.99, 0.97, "- - touch: memory's limit", color=BOUND, fontsize=7.5, ha="right",
                  transform=axes.transAxes)  # fmt: skip
        axes.set_title(f"{dtype}, one thread")
        axes.set_xlabel("ms a layer of 4096 x 4096, 1 %")
    figure.suptitle("Switching one adapter on, every way")
    return figure


def ratios(f: texts.Figures) -> Figure | None:
    """The lines with a target that are ratios, with quartiles and targets."""
    rows = []
    for line, kind in summary.LINES.items():
        if kind.target is None or kind.unit != "x" or not kind.at_least:
            continue
        rows += [(kind, variant, found) for (name, variant, n), found in f.all.items() if name == line and n == 1]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(9, 0.24 * len(rows) + 1))
    names = [kind.text + (f" ({variant})" if variant else "") for kind, variant, _ in rows]
    found = [one for *_, one in rows]
    bars(axes, names, found, [OURS if kind.met(one["median"]) else LORA for kind, _, one in rows])
    targets = [float(kind.target or 0) for kind, *_ in rows]
    axes.scatter(targets, range(len(rows)), color=BOUND, marker="|", s=90, zorder=3, label="wanted")
    axes.set_xlabel("times as fast; whiskers: quartiles")
    axes.legend(loc="lower right")
    return figure


def shares(f: texts.Figures) -> Figure | None:
    """Bytes per second of every op whose bytes are known, beside the machine's limits."""
    limits = {line.removeprefix("limit, "): one["median"] for (line, _, n), one in f.all.items()
              if line in ("limit, touch", "limit, copy", "limit, read") and n == 1}  # fmt: skip
    rates: dict[str, dict[str, float]] = {}
    for one in f.benchmarks:
        info = one["extra_info"]
        if info["threads"] != 1:
            continue
        for name, rate in info.get("gigabytes_per_second", {}).items():
            if name not in ("copy", "read"):
                family, _, case = one["name"].removeprefix("bench_").partition("[1thread")
                found = info["seconds"][name]
                ends = {"low": rate * found["median"] / found["high"], "high": rate * found["median"] / found["low"]}
                rates[f"{family}: {name} {case.strip('-]')}".strip()] = {"median": rate, **ends}
    if not limits or not rates:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.22 * len(rates) + 1))
    names = sorted(rates, key=lambda name: -rates[name]["median"])
    bars(axes, names, [rates[name] for name in names], [OURS] * len(names))
    axes.set_xscale("linear")
    axes.set_xlim(left=0)
    for name, limit in limits.items():
        axes.axvline(limit, color=BOUND, linestyle="--", linewidth=1)
        axes.text(limit, 0.02, f" {name}", color=BOUND, fontsize=8, rotation=90, transform=axes.get_xaxis_transform())
    axes.set_xlabel("GB/s of what has to be moved, one thread")
    return figure


def roofline(f: texts.Figures) -> Figure | None:
    """Ops that do arithmetic, beside what memory and arithmetic allow. Those that only move bits are in `shares`."""
    limits = {line: one["median"] for (line, _, n), one in f.all.items() if line.startswith("limit, ") and n == 1}
    points = []  # name, dtype, floating-point operations, bytes that have to move, seconds with their quartiles
    for info in f.info("bench_swap[1thread"):
        (m, n), rank, size = info["shape"], info["lora_rank"], ITEM[info["dtype"]]
        moved = size * (2 * m * n + rank * (m + n))
        points.append(("LoRA fuse, addmm_", info["dtype"], 2 * m * n * rank, moved, info["seconds"]["fuse"]))
    for info in f.info("bench_sampled_grad[1thread"):
        tokens, size, seconds = info["tokens"], ITEM[info["dtype"]], info["seconds"]
        rows, columns = (info.get(name, info.get("side")) for name in ("rows", "columns"))  # earlier runs say side
        inputs = tokens * (rows + columns) * size
        for name, key, entries, written in (
            ("sampled_grad", "sampled_grad", info["nnz"], 8 * info["nnz"]),
            ("dense gradient", "dense", rows * columns, rows * columns * size),
        ):
            work = 2 * tokens * entries
            points.append((f"{name}, {tokens} tokens", info["dtype"], work, inputs + written, seconds[key]))
    if not points or "limit, copy" not in limits:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axes, dtype in zip(panels, ITEM, strict=True):
        flat, slope = limits[f"limit, GEMM {dtype}"], limits["limit, copy"]
        xs = [2**-2, flat / slope, 2**11]
        roof = [min(flat, x * slope) for x in xs]
        axes.plot(xs, roof, color=BOUND, linewidth=1, label="copy bandwidth, GEMM")
        for at, (name, kind, work, moved, seconds) in enumerate(points):
            if kind == dtype:
                marker = "o" if name.startswith("sampled") else "^" if name.startswith("dense") else "s"
                rate, least, most = (work / seconds[end] / 1e9 for end in ("median", "high", "low"))
                axes.errorbar(work / moved, rate, yerr=[[rate - least], [most - rate]], fmt=marker, label=name,
                              color=f"C{at % 10}", ecolor="#444", capsize=3)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(f"{dtype}, one thread")
        axes.set_xlabel("operations a byte that has to move")
        axes.legend(fontsize=7)
    panels[0].set_ylabel("GFLOP/s")
    return figure


def growth(f: texts.Figures) -> Figure | None:
    """The measured points of every axis, and the fitted costs as lines."""
    infos = f.info("bench_scaling[")
    if not infos:
        return None
    axes_names = list(dict.fromkeys(info["axis"] for info in infos))
    fitted = {op: texts.models(f, op) for op in ("swap_", "fuse_")}
    columns = min(3, len(axes_names))
    rows = math.ceil(len(axes_names) / columns)
    figure, panels = plt.subplots(rows, columns, figsize=(3.6 * columns, 3 * rows), squeeze=False)
    for axes in panels.flat[len(axes_names) :]:
        axes.axis("off")
    for axes, name in zip(panels.flat, axes_names, strict=False):
        for info in (one for one in infos if one["axis"] == name):
            threads, points = info["threads"], info["points"]
            found = [{key: 1e3 * value for key, value in point["seconds"].items()} for point in points]
            shade = COLOURS.get(threads, "#444")
            xs = [point["x"] for point in points]
            axes.errorbar(xs, [one["median"] for one in found], yerr=whiskers(found), fmt="o", ms=4, color=shade,
                          label=f"{threads} thread{'s' * (threads > 1)}")  # fmt: skip
            model = fitted[info["op"]][threads]
            said = [1e3 * model.seconds(scaling.Work.of(point)) for point in points]
            axes.plot(xs, said, color=shade, linewidth=1)
        axes.set_xscale("log", base=2 if name not in ("density", "density fp32") else 10)
        axes.set_yscale("log")
        axes.set_title(f"{infos[0]['op'] if name != 'adapters' else 'fuse_'}: {name}")
        axes.set_ylabel("ms a layer")
    panels.flat[0].legend()
    figure.suptitle("Points: measured. Lines: a sum of what is moved, fitted to the points of all axes at once")
    return figure


def paper(f: texts.Figures) -> Figure | None:
    """The paper's Fig. 7: fuse over switch, by the size of the weight."""
    found: dict[tuple[str, str], list[tuple[int, dict[str, float]]]] = {}
    for (line, variant, threads), one in f.all.items():
        if line.startswith("fig. 7") and threads == 1:
            side, *rest = variant.split(", ")
            found.setdefault((line, ", ".join(rest)), []).append((int(side), one))
    if not found:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4))
    for axes, line in zip(panels, ("fig. 7, the paper's pair", "fig. 7, the fast pair"), strict=True):
        for (name, case), points in found.items():
            if name == line:
                points.sort(key=lambda point: point[0])
                every = [one for _, one in points]
                axes.errorbar([side for side, _ in points], [one["median"] for one in every], yerr=whiskers(every),
                              marker="o", ms=4, label=case)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(summary.LINES[line].text)
        axes.set_xlabel("rows and columns of the weight")
    panels[0].axhspan(13, 16, color=BOUND, alpha=0.2, label="the paper: 13x to 16x")
    panels[0].legend(fontsize=7)
    panels[1].legend(fontsize=7)
    return figure


def best(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The front, from the fastest on: the points that none beats in accuracy without switching more slowly."""
    found: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda one: (one["switch_seconds"], -one["accuracy"])):
        if not found or point["accuracy"] > found[-1]["accuracy"]:
            found.append(point)
    return found


def front(points: list[dict[str, Any]]) -> Figure | None:
    """Accuracy beside switch time, a panel for each task. A point's area is its file's size; the best are numbered."""
    if not points:
        return None
    tasks = list(dict.fromkeys(point["task"] for point in points))
    figure, panels = plt.subplots(1, len(tasks), figsize=(max(6.4, 5.2 * len(tasks)), 5.4), squeeze=False)
    for axes, task in zip(panels[0], tasks, strict=True):
        here = [{**point, "x": 1e3 * point["switch_seconds"], "y": 100 * point["accuracy"]}
                for point in points if point["task"] == task]  # fmt: skip
        largest = max(point["file_bytes"] for point in here)
        for point in here:
            shade = LORA if "LoRA" in point["name"] else OURS if "granule" in point["name"] else PLAIN
            axes.scatter(point["x"], point["y"], s=8 + 150 * point["file_bytes"] / largest, color=shade, alpha=0.6)
        for text, shade in (("granules", OURS), ("single entries", PLAIN), ("LoRA, folded in by addmm_", LORA)):
            axes.scatter([], [], color=shade, label=text, s=20)
        shown = best(here)
        axes.plot([one["x"] for one in shown], [one["y"] for one in shown], color=OURS, lw=1, ds="steps-post", zorder=1)
        for number, one in enumerate(shown, 1):
            axes.annotate(str(number), (one["x"], one["y"]), fontsize=7, ha="center", va="center")
            axes.scatter([], [], color="none", label=f"{number}  {one['name']}: {one['y']:.1f} %")
        axes.legend(
            fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, handletextpad=0.2, frameon=False
        )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_title(task)
        axes.set_xlabel("ms to switch a 4096 x 4096 layer (area: bytes of the file)")
        axes.set_ylabel("test accuracy, %")
    return figure


PLOTS: dict[str, tuple[str, Callable[[texts.Figures], Figure | None]]] = {
    "ways": ("Every way to switch an adapter on", ways),
    "ratios": ("The promises", ratios),
    "limits": ("Beside the machine's limits", shares),
    "roofline": ("The roofline of what does arithmetic", roofline),
    "scaling": ("How the cost grows", growth),
    "fig7": ("The paper's Fig. 7", paper),
}


def digest(found: dict[str, Any]) -> str:
    """A hash of the results that the README's plot shows."""
    shown = [one for one in found["benchmarks"] if one["name"].startswith("bench_ways[1thread")]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def readme_plot(found: dict[str, Any], path: Path) -> None:
    """The README's picture. Its metadata says which results it was drawn from."""
    with plt.rc_context(STYLE):
        figure = ways(texts.Figures(found))
        if figure is None:
            raise ValueError("the results have no bench_ways")
        figure.savefig(path, dpi=100, metadata={"Software": None, "Source": digest(found)})
        plt.close(figure)


def draw(found: dict[str, Any], out: Path, quality: Path) -> dict[str, Path]:
    """Draws every plot for which there are results; returns the PNG files by title."""
    f = texts.Figures(found)
    drawn = {}
    with plt.rc_context(STYLE):
        makers: dict[str, tuple[str, Callable[[], Figure | None]]] = {
            name: (title, lambda make=make: make(f)) for name, (title, make) in PLOTS.items()
        }
        if quality.exists():
            points = json.loads(quality.read_text()).get("front", [])
            makers["front"] = ("Accuracy, switch time, file size", lambda: front(points))
        for name, (title, make) in makers.items():
            figure = make()
            if figure is None:
                continue
            drawn[title] = out / f"{name}.png"
            figure.savefig(drawn[title], dpi=110, metadata={"Software": None})
            plt.close(figure)
    return drawn
