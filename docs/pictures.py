"""The pictures of docs/concepts.md, drawn while the site is built, from the library itself."""

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
    lines = (
        f"before   {before % 2**64:016x}     its three words add   {at_before % 2**64:016x}",
        f"after      {after % 2**64:016x}     its three words add   {at_after % 2**64:016x}",
        "after = before - (what the words added) + (what they add now)",
    )
    for y, text in enumerate(lines):
        axes.text(0, -0.7 - 0.75 * y, text, color=LINE, fontsize=11)
    axes.set_xlim(0, 24)
    axes.set_ylim(-2.7, 1)
    axes.axis("off")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "granules": granules,
    "switching": switching,
    "fingerprints": fingerprints,
}


def on_files(files: Files, *, config: Any) -> Files:
    """mkdocs calls this when it has found the pages."""
    for name, draw in PICTURES.items():
        files.append(File.generated(config, f"pictures/{name}.svg", content=_svg(draw())))
    return files
