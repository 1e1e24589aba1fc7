"""Accuracy beside switch time and file size, as data: ``benchmarks/results/quality.json``, drawn by the speed report.

One point for every mask, granule and density of experiment 2 that was run on most tasks of its family, and LoRA beside
them at equal parameters. ``python -m benchmarks.quality.report`` writes it. As on the page, seconds are those of a
4096 x 4096 bfloat16 layer, measured for random masks and scaled by how many cache lines the trained mask touches.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from benchmarks.quality.experiments import single
from benchmarks.quality.findings import FAMILIES_SHOWN, Grid, Results, is_accuracy, mean, share_of
from benchmarks.quality.lab import Setting
from benchmarks.quality.methods import Lora, Shira
from benchmarks.quality.task import ROOT
from benchmarks.quality.words import label, percent

PATH = ROOT / "benchmarks" / "results" / "quality.json"


def points(results: Results, families: Iterable[str] = FAMILIES_SHOWN) -> list[dict[str, Any]]:
    """The points of each family whose scores are accuracies; none where no switch times were measured."""
    found: list[dict[str, Any]] = []
    for family in families:
        if results.has(family) and is_accuracy(family) and results.switching:
            found += of_family(results, family)
    return found


def of_family(results: Results, family: str) -> list[dict[str, Any]]:
    grid = Grid(results, family)
    methods = grid.methods(grid.names) if grid.names else []
    if not methods:
        return []
    task = f"{family}, tasks: {len(grid.names)}"
    return [
        point(
            task,
            name(method),
            mean(grid.score(one, method) for one in grid.names),
            grid.milliseconds(method),
            grid.cost(method, "bytes"),
        )
        for method in methods
    ] + lora(results, family, task, grid.names)


def lora(results: Results, family: str, task: str, names: list[str]) -> list[dict[str, Any]]:
    """LoRA on the same tasks, where a LoRA of about as many parameters was timed."""
    method = Lora(single.rank(family))
    studies = [results.study(Setting(one, method)) for one in names]
    records = [one for study in studies if study for one in study]
    if not all(studies) or any(one["test"] is None for one in records):
        return []
    share, trained = share_of(records), records[0]["trainable"]
    fused = [density for density, granule in results.switching if granule == 0]
    density = min(fused, key=lambda one: abs(one - share))
    if abs(density / share - 1) > 0.25:
        return []
    score = mean(one["test"] for one in records)
    return [point(task, label(method), score, results.switching[density, 0], 2 * trained)]


def name(method: Shira) -> str:
    """For example ``Rand 1 %, granule 16``."""
    mask, comma, rest = label(method).removeprefix("SHiRA-").partition(",")
    return f"{mask} {percent(method.density or 0)}{comma}{rest}"


def point(task: str, name: str, accuracy: float, milliseconds: float, size: float) -> dict[str, Any]:
    return {
        "name": name,
        "task": task,
        "accuracy": round(accuracy, 4),
        "switch_seconds": round(milliseconds / 1e3, 8),
        "file_bytes": round(size),
    }


def text(results: Results) -> str:
    """The file, one point per line."""
    lines = ",\n ".join(json.dumps(one) for one in points(results))
    return f'{{"front": [\n {lines}\n]}}\n'


def write(results: Results) -> None:
    PATH.write_text(text(results))
