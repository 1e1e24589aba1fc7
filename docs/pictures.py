"""The pictures of the site, drawn while it is built: `![...](pictures/NAME.svg)` in a page shows what NAME draws."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mkdocs.structure.files import File, Files

BASE, CHANGED, LINE, INK = "#e8eaf6", "#3949ab", "#90a4ae", "#263238"
# Text stays text, and the same page gives the same bytes.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "shira", "font.size": 10, "font.family": "sans-serif"}


def grid(axes: Axes, rows: int, columns: int, changed: set[tuple[int, int]]) -> None:
    """Squares, one for each entry."""
    rectangle = matplotlib.patches.Rectangle
    axes.add_patch(rectangle((0, 0), columns, rows, color=BASE))
    for row, column in sorted(changed):
        axes.add_patch(rectangle((column, row), 1, 1, color=CHANGED))
    axes.hlines(range(rows + 1), 0, columns, color="white", linewidth=1.2)
    axes.vlines(range(columns + 1), 0, rows, color="white", linewidth=1.2)
    axes.set(xlim=(-0.3, columns + 0.3), ylim=(rows + 0.3, -0.3), aspect="equal")
    axes.axis("off")


def adapter() -> Figure:
    """A weight, and the two lists that are an adapter for it."""
    rows, columns = 8, 16
    flat = np.sort(np.random.default_rng(3).choice(rows * columns, 8, replace=False))
    values = np.random.default_rng(4).normal(size=len(flat)).round(2)
    figure = Figure(figsize=(8, 2.9))
    left, right = figure.subplots(1, 2, width_ratios=(2, 1.35))
    grid(left, rows, columns, {divmod(int(at), columns) for at in flat})
    for at in flat:
        row, column = divmod(int(at), columns)
        left.text(column + 0.5, row + 0.53, str(at), color="white", ha="center", va="center", fontsize=7)
    left.set_title("weight [8, 16]: entries are numbered row by row", fontsize=10, color=INK)
    right.axis("off")
    table = right.table(
        [[str(at), f"{value:+.2f}"] for at, value in zip(flat, values, strict=True)],
        colLabels=["indices", "values"],
        cellLoc="center",
        loc="center",
    )
    table.scale(0.85, 1.15)
    right.set_title("the adapter", fontsize=10, color=INK)
    return figure


def granule() -> Figure:
    """As many entries, single and in runs: the lines of the cache that a switch touches."""
    lines, line, entries = 16, 32, 32
    single = {divmod(int(at), line) for at in np.random.default_rng(0).choice(lines * line, entries, replace=False)}
    starts = np.random.default_rng(5).choice(lines * 2, entries // 16, replace=False) * 16
    runs = {divmod(int(start) + k, line) for start in starts for k in range(16)}
    figure = Figure(figsize=(8, 3.1))
    for axes, changed, name in zip(
        figure.subplots(1, 2), (single, runs), ("32 single entries", "2 granules of 16"), strict=True
    ):
        grid(axes, lines, line, changed)
        touched = {row for row, _ in changed}
        for row in touched:
            axes.add_patch(matplotlib.patches.Rectangle((-0.1, row), line + 0.2, 1, fill=False, edgecolor="#d81b60"))
        some = "lines" if len(touched) > 1 else "line"
        axes.set_title(f"{name}: {len(touched)} {some} of memory touched", fontsize=10, color=INK)
    return figure


def fingerprint() -> Figure:
    """A sum over words and their places, and what a change does to it."""
    figure = Figure(figsize=(8, 2.4))
    axes = figure.subplots()
    axes.set(xlim=(-1.8, 8.4), ylim=(0, 4))
    axes.axis("off")
    for place in range(6):
        color, ink = (CHANGED, "white") if place == 3 else (BASE, INK)
        axes.add_patch(matplotlib.patches.Rectangle((place * 1.15, 2.9), 1, 0.8, color=color))
        axes.text(place * 1.15 + 0.5, 3.3, f"word {place}", color=ink, ha="center", va="center", fontsize=9)
        axes.annotate("", (place * 1.15 + 0.5, 1.95), (place * 1.15 + 0.5, 2.85), arrowprops={"arrowstyle": "->"})
        axes.add_patch(matplotlib.patches.Rectangle((place * 1.15, 1.2), 1, 0.7, fill=False, edgecolor=LINE))
        axes.text(place * 1.15 + 0.5, 1.55, f"mix(., {place})", color=INK, ha="center", va="center", fontsize=9)
        if place < 5:
            axes.text(place * 1.15 + 1.075, 1.55, "+", ha="center", va="center", fontsize=11, color=INK)
    axes.text(-0.15, 3.3, "weight", ha="right", va="center", color=INK)
    axes.text(-0.15, 1.55, "terms", ha="right", va="center", color=INK)
    axes.text(7.0, 1.55, "= fingerprint", va="center", color=INK, weight="bold")
    axes.text(3.4, 0.35, "new = old - mix(old word, 3) + mix(new word, 3)", ha="center", color=CHANGED, fontsize=11)
    return figure


def exactness() -> Figure:
    """Drift of a weight in bfloat16 that is added to and subtracted from, measured here and now."""

    def rounded(x: np.ndarray) -> np.ndarray:
        bits = x.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)

    random = np.random.default_rng(0)
    base = rounded(random.normal(size=20_000) * 0.02)
    weight, wrong = base.copy(), [0.0]
    for _ in range(100):
        change = rounded(random.normal(size=base.size) * 0.02)
        weight = rounded(rounded(weight + change) - change)
        wrong.append(100 * float(np.mean(weight != base)))
    figure = Figure(figsize=(7, 2.8))
    axes = figure.subplots()
    axes.plot(wrong, color="#d81b60", label="added, then subtracted")
    axes.plot([0.0] * len(wrong), color=CHANGED, linewidth=2.5, label="kept, then written back")
    axes.set(xlabel="adapters switched on and off", ylabel="entries with other bits, %", ylim=(-4, 104), xlim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    return figure


def walk() -> Figure:
    """The layers, from the library to the kernels."""
    layers = (
        ("shira", "adapters, masks, tuner, switcher, updates (Python)"),
        ("shira_ops", "public functions, fakes, autograd rules, reference, Triton"),
        ("torch.ops.shira", "the contract: csrc/schemas.h"),
        ("csrc/ops", "arguments of each family, checked once for CPU and CUDA"),
        ("csrc/cpu   csrc/cuda", "kernels, which walk memory"),
        ("csrc/core", "arithmetic and formats, without torch: once for every device"),
    )
    figure = Figure(figsize=(8, 3.6))
    axes = figure.subplots()
    axes.set(xlim=(0, 10), ylim=(-len(layers) * 1.25 + 0.2, 1.05))
    axes.axis("off")
    for number, (name, said) in enumerate(layers):
        top = -number * 1.25
        axes.add_patch(matplotlib.patches.Rectangle((0.1, top), 9.8, 0.9, color=BASE))
        axes.text(0.35, top + 0.45, name, va="center", color=CHANGED, weight="bold")
        axes.text(3.0, top + 0.45, said, va="center", color=INK)
        if number:
            axes.annotate("", (1.3, top + 0.9), (1.3, top + 1.25), arrowprops={"arrowstyle": "->"})
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    one.__name__: one for one in (adapter, granule, fingerprint, exactness, walk)
}


def drawn(name: str) -> str:
    """The picture as SVG, on a white ground, so that it can be read on a dark page too."""
    with matplotlib.rc_context(STYLE):
        figure, file = PICTURES[name](), io.StringIO()
        figure.savefig(file, format="svg", bbox_inches="tight", facecolor="white", metadata={"Date": None})
    return re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """MkDocs asks for this: the pictures join the files of the site."""
    for name in PICTURES:
        files.append(File.generated(config, f"pictures/{name}.svg", content=drawn(name)))
    return files
