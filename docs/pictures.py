"""The pictures of the site, drawn while it is built, from the library itself: `pictures/NAME.svg` in a page."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mkdocs.structure.files import File, Files

import shira
import shira_ops

CHANGED, KEPT, LINE = "#e4572e", "#c9ccd3", "#6b7080"
SIDE = 32


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "shira", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    return text.getvalue()


def adapter() -> Figure:
    """A weight of 8 x 16 entries, and the two lists that are an adapter for it."""
    rows, columns = 8, 16
    weight = torch.zeros(rows, columns)
    indices = shira.masks.Rand(density=1 / 16, granule=1, seed=9)("weight", weight)
    values = torch.randn(8, generator=torch.Generator().manual_seed(0))
    shira_ops.scatter_(weight, indices, torch.ones(8))
    figure = Figure(figsize=(8, 2.9))
    left, right = figure.subplots(1, 2, width_ratios=(2, 1.2))
    for row in range(rows):
        for column in range(columns):
            changed = bool(weight[row, column])
            left.add_patch(Rectangle((column, row), 0.92, 0.92, facecolor=CHANGED if changed else KEPT))
            if changed:
                at = (column + 0.46, row + 0.5)
                left.text(*at, f"{row * columns + column}", color="white", ha="center", va="center", fontsize=7)
    left.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
    left.set_title("a weight [8, 16], its entries numbered row by row", color=LINE, fontsize=10)
    right.set(xlim=(0, 2), ylim=(9, -0.4))
    right.set_title("the adapter", color=LINE, fontsize=10)
    for number, (name, column) in enumerate((("indices", indices.tolist()), ("values", values.tolist()))):
        right.text(number + 0.5, 0, name, ha="center", weight="bold", color=LINE)
        for line, entry in enumerate(column):
            shown = f"{entry:+.2f}" if number else f"{entry}"
            right.text(number + 0.5, line + 1, shown, ha="center", color=LINE)
    for axes in (left, right):
        axes.axis("off")
    return figure


def drift() -> Figure:
    """A weight in bfloat16 that adapters are added to and subtracted from, and one that is put back: measured."""
    random = torch.Generator().manual_seed(0)
    count = 20_000
    base = torch.randn(count, generator=random).bfloat16()
    added, kept = base.clone(), base.clone()
    indices, saved = torch.arange(count, dtype=torch.int32), torch.empty_like(base)
    shares: tuple[list[float], list[float]] = ([0.0], [0.0])
    for _ in range(100):
        values = torch.randn(count, generator=random).bfloat16()
        added.add_(values).sub_(values)
        shira_ops.apply_(kept, indices, values, saved, delta=True)
        shira_ops.scatter_(kept, indices, saved)
        for share, weight in zip(shares, (added, kept), strict=True):
            share.append(100 * float((weight != base).float().mean()))
    figure = Figure(figsize=(8, 2.6))
    axes = figure.add_subplot()
    axes.plot(shares[0], color=CHANGED, label="added, then subtracted")
    axes.plot(shares[1], color=LINE, linewidth=2.5, label="kept, then written back")
    axes.set(xlim=(0, 100), ylim=(-4, 104))
    axes.set_xlabel("adapters switched on and off", color=LINE)
    axes.set_ylabel("entries with other bits, %", color=LINE)
    axes.tick_params(colors=LINE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(LINE)
    axes.legend(frameon=False, loc="center right", labelcolor=LINE)
    return figure


def layers() -> Figure:
    """From the library to the arithmetic: each layer calls the one below."""
    named = (
        ("shira", "masks, tuner, adapters and files, switcher, updates"),
        ("shira_ops", "ops as functions: autograd rules, fakes, reference, Triton"),
        ("torch.ops.shira", "the contract: csrc/schemas.h"),
        ("csrc/ops", "a family's arguments, checked once for all devices"),
        ("csrc/cpu, csrc/cuda", "kernels: they only walk memory"),
        ("csrc/core", "arithmetic and formats, without torch, once for all devices"),
    )
    figure = Figure(figsize=(8, 3.4))
    axes = figure.add_subplot()
    for y, (name, said) in enumerate(named):
        axes.add_patch(Rectangle((0, y), 10, 0.75, facecolor=KEPT))
        axes.text(0.2, y + 0.4, name, va="center", color="#222", weight="bold", fontsize=10)
        axes.text(3.1, y + 0.4, said, va="center", color="#222", fontsize=10)
        if y:
            axes.annotate("", (1, y), (1, y - 0.25), arrowprops={"arrowstyle": "->", "color": LINE})
    axes.set(xlim=(0, 10), ylim=(6, 0))
    axes.axis("off")
    return figure


def granules() -> Figure:
    """One weight and the same share of its entries, as single entries and as granules of 8."""
    figure = Figure(figsize=(8, 4.2))
    for number, granule in enumerate((1, 8)):
        axes = figure.add_subplot(1, 2, number + 1)
        weight = torch.zeros(SIDE, SIDE)
        mask = shira.masks.Rand(density=0.0625, granule=granule, seed=3)
        shira_ops.scatter_(weight, mask("weight", weight), torch.ones(64), granule=granule)
        axes.imshow(weight.numpy(), cmap=mpl.colors.ListedColormap([KEPT, CHANGED]), interpolation="nearest")
        axes.set_xticks([x - 0.5 for x in range(0, SIDE + 1, 8)], labels=[])
        axes.set_yticks([])
        axes.grid(axis="x", color="white", linewidth=1.5)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        lines = int(weight.view(-1, 8).any(1).sum())
        axes.set_title(
            f"granule {granule}: 64 entries, {64 // granule} indices,\n{lines} runs of 8 entries touched",
            color=LINE,
            fontsize=11,
        )
    return figure


def switching() -> Figure:
    """What base, adapter, switch and revert do to a row of twelve entries."""
    figure = Figure(figsize=(8, 3.3))
    axes = figure.add_subplot()
    base = torch.arange(12.0)
    indices, values = torch.tensor([2, 5, 6, 10], dtype=torch.int32), torch.tensor([50.0, 51, 52, 53])
    weight, saved = base.clone(), torch.empty(4)
    rows: list[tuple[str, torch.Tensor]] = [("base", base.clone())]
    shira_ops.apply_(weight, indices, values, saved)
    rows.append(("after apply_", weight.clone()))
    shira_ops.scatter_(weight, indices, saved)
    rows.append(("after the revert", weight.clone()))
    for y, (label, row) in enumerate(rows):
        axes.text(-0.4, -y, label, ha="right", va="center", color=LINE)
        for x, entry in enumerate(row.tolist()):
            new = entry >= 50
            box = Rectangle((x, -y - 0.36), 0.94, 0.72, facecolor=CHANGED if new else KEPT, edgecolor="none")
            axes.add_patch(box)
            axes.text(x + 0.47, -y, f"{entry:g}", ha="center", va="center", color="white" if new else "#222")
    axes.set_xlim(-3.4, 12)
    axes.set_ylim(-2.6, 0.6)
    axes.axis("off")
    return figure


def fingerprints() -> Figure:
    """How many entries of a model an update touches, and that its fingerprint follows without reading the rest."""
    figure = Figure(figsize=(8, 2.6))
    axes = figure.add_subplot()
    weight = torch.arange(24, dtype=torch.int64)
    before = int(shira_ops.fingerprint(weight))
    indices = torch.tensor([3, 11, 19], dtype=torch.int32)
    at_before = int(shira_ops.fingerprint_at(weight, indices))
    shira_ops.scatter_(weight, indices, torch.tensor([7, 7, 7]))
    at_after = int(shira_ops.fingerprint_at(weight, indices))
    after = int(shira_ops.fingerprint(weight))
    assert (before - at_before + at_after - after) % 2**64 == 0
    for x in range(24):
        touched = x in (3, 11, 19)
        axes.add_patch(Rectangle((x, 0), 0.92, 0.9, facecolor=CHANGED if touched else KEPT, edgecolor="none"))
    rows = (
        ("before", before, "its three words add", at_before),
        ("after", after, "its three words add", at_after),
    )
    for y, cells in enumerate(rows):
        for x, cell in zip((0, 2.6, 10.4, 16.6), cells, strict=True):
            text = cell if isinstance(cell, str) else f"{cell % 2**64:016x}"
            axes.text(x, -0.7 - 0.75 * y, text, color=LINE, fontsize=11)
    axes.text(0, -2.2, "after = before - (what the words added) + (what they add now)", color=LINE, fontsize=11)
    axes.set_xlim(0, 24)
    axes.set_ylim(-2.7, 1)
    axes.axis("off")
    return figure


DRAWN = (adapter, granules, switching, drift, fingerprints, layers)
PICTURES: dict[str, Callable[[], Figure]] = {draw.__name__: draw for draw in DRAWN}


def on_files(files: Files, *, config: Any) -> Files:
    """mkdocs calls this when it has found the pages."""
    for name, draw in PICTURES.items():
        files.append(File.generated(config, f"pictures/{name}.svg", content=_svg(draw())))
    return files
