"""Is there a rule for the learning rate? Rules are fitted to the rates that were found on all bases but one, and tried
on that one. SmolLM2 is never fitted.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.quality import tasks
from benchmarks.quality.experiments import masks, single
from benchmarks.quality.findings import Results
from benchmarks.quality.lab import Setting
from benchmarks.quality.methods import Lora, Shira
from benchmarks.quality.words import table

WIDTHS = {
    "digits-mlp-128": 128, "digits-mlp": 512, "digits-mlp-1024": 1024, "digits-vit": 96, "minilm": 384, "gpt-s": 64,
    "gpt-m": 128, "gpt-l": 256, "smollm2": 576,
}  # fmt: skip
"""The width of each base: the features between its layers."""

UNSEEN = "smollm2"
"""The base that no rule is fitted to."""

RULES = (
    (), ("LoRA's rate",), ("density",), ("width",), ("density", "width"), ("density", "LoRA's rate"),
    ("density", "width", "LoRA's rate"), ("density", "width", "LoRA's rate", "granule"),
)  # fmt: skip
"""What each rule looks at: the rate is a constant times powers of these, all fitted. The first is one rate for all."""

NEAR = 3.5  # a neighbour in `RATES` is up to 3.33 away


@dataclass(frozen=True)
class Found:
    """A rate that the search ended at, and what was known before it."""

    family: str
    rate: float
    known: dict[str, float]


def found(results: Results, families: Iterable[str]) -> list[Found]:
    """Every random mask of these families whose rate was searched, where LoRA's was searched too."""
    every = []
    for family in families:
        r = single.rank(family)
        several = [(Shira("rand", r=r, granule=granule), 6) for granule in (1, 16)]
        several += [
            (Shira("rand", density=density, granule=granule), budget)
            for density, granule, budget in itertools.product(masks.DENSITIES, masks.GRANULES, (5, 6))
        ]
        for name in tasks.tasks(family):
            lora = results.rate(Setting(name, Lora(r)))
            for method, budget in several if lora else ():
                setting = Setting(name, method, budget=budget)
                rate, runs = results.rate(setting), results.study(setting)
                if rate and runs and lora:
                    known = {"density": runs[0]["nnz"] / runs[0]["targets"], "width": WIDTHS[family]}
                    every.append(Found(family, rate, {**known, "LoRA's rate": lora, "granule": method.granule}))
    return every


def row(one: Found, rule: Sequence[str]) -> list[float]:
    return [1.0, *(math.log(one.known[name]) for name in rule)]


def fit(some: Sequence[Found], rule: Sequence[str]) -> np.ndarray:
    """The powers, by least squares of the logarithms; every base counts the same, however often it was tried."""
    count = {one.family: sum(other.family == one.family for other in some) for one in some}
    scale = np.array([count[one.family] ** -0.5 for one in some])
    matrix, rates = np.array([row(one, rule) for one in some]), np.log([one.rate for one in some])
    powers: np.ndarray = np.linalg.lstsq(matrix * scale[:, None], rates * scale, rcond=None)[0]
    return powers


def off(some: Sequence[Found], rule: Sequence[str], powers: np.ndarray) -> list[float]:
    """By which factor the rule misses each rate, always 1 or more."""
    return [math.exp(abs(float(row(one, rule) @ powers) - math.log(one.rate))) for one in some]


def rules_table(results: Results) -> str:
    """For each rule, by which factor it misses (the median) on the base that it was not fitted to."""
    fitted = found(results, [family for family in WIDTHS if family != UNSEEN and results.has(family)])
    new = found(results, [UNSEEN] if results.has(UNSEEN) else [])
    families = list(dict.fromkeys(one.family for one in fitted))
    if len(families) < 2:
        return ""
    rows = []
    for rule in RULES:
        cells, near = [], []
        for family in families:
            some = [one for one in fitted if one.family == family]
            missed = off(some, rule, fit([one for one in fitted if one.family != family], rule))
            cells.append(f"{statistics.median(missed):.1f}")
            near.append(statistics.fmean(factor < NEAR for factor in missed))
        told = off(new, rule, fit(fitted, rule)) if new else []
        last = f"{statistics.median(told):.1f} (worst {max(told):.1f})" if told else ""
        rows.append([", ".join(rule) or "one rate for all", *cells, f"{100 * statistics.fmean(near):.0f} %", last])
    return table(["rule", *families, "within a factor of three", UNSEEN], rows)


MULTIPLES = (1, 3, 10, 30)


def multiples_table(results: Results) -> str:
    """Of the random masks of experiment 1, how many were trained best within one step of the search of so many times
    LoRA's rate on the same task."""
    cells: dict[str, list[list[float]]] = {}
    for family in filter(results.has, WIDTHS):
        r = single.rank(family)
        for name in tasks.tasks(family):
            lora = results.rate(Setting(name, Lora(r)))
            several = (results.rate(Setting(name, Shira("rand", r=r, granule=granule))) for granule in (1, 16))
            cells.setdefault(family, []).append([rate / lora for rate in several if rate and lora])
    ratios = {family: [ratio for some in found for ratio in some] for family, found in cells.items()}
    ratios = {family: found for family, found in ratios.items() if found}
    rows = [
        [f"{times} times", *(f"{within(found, times)} of {len(found)}" for found in ratios.values())]
        for times in MULTIPLES
    ]
    return table(["LoRA's rate", *ratios], rows) if ratios else ""


def within(ratios: Iterable[float], times: float) -> int:
    return sum(times / NEAR < ratio < times * NEAR for ratio in ratios)
