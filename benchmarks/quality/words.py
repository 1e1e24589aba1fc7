"""How the page writes things: numbers, the names of methods and tasks, tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from benchmarks.quality.findings import error_over_seeds, is_accuracy, mean, standard_error
from benchmarks.quality.methods import Method, Moving, Shira, ShiraDora

NAMES = {
    "rand": "Rand", "struct": "Struct", "wm": "WM", "grad": "Grad", "snip": "Snip", "principal": "Principal",
    "activation": "Activation", "top-rows": "Rand in the top rows", "half-snip": "Rand and Snip",
}  # fmt: skip

MIXED = {"first": "more in the first weights", "last": "more in the last", "magnitude": "by magnitude over all weights"}


def number(family: str, score: float) -> str:
    """A mean, as the tables show it: accuracy in percent, or the loss in nats."""
    if not math.isfinite(score):
        return "diverged"
    return f"{100 * score:.1f}" if is_accuracy(family) else f"{-score:.3f}"


def spread(family: str, scores: Sequence[float]) -> str:
    """Mean and standard deviation over seeds; the score alone where there is one seed."""
    if not all(map(math.isfinite, scores)):
        return "diverged"
    told = number(family, statistics.fmean(scores))
    if len(scores) < 2:
        return told
    deviation = statistics.stdev(scores)
    return f"{told} ± {100 * deviation:.1f}" if is_accuracy(family) else f"{told} ± {deviation:.3f}"


def difference(family: str, values: Sequence[float]) -> str:
    """The mean of differences, in points (or nats), and its standard error; a single one alone."""
    factor = 100 if is_accuracy(family) else 1
    digits = 1 if is_accuracy(family) else 3
    told = f"{factor * mean(values):+.{digits}f}"
    return f"{told} ± {factor * standard_error(values):.{digits}f}" if len(values) > 1 else told


def overall(family: str, by: Sequence[Sequence[float]], *, between: bool = True) -> str:
    """The mean of several tasks' mean differences, and its standard error over the seeds; ``between`` adds that over
    the tasks."""
    means, error, factor = [mean(some) for some in by], error_over_seeds(by), 100 if is_accuracy(family) else 1
    digits = 1 if is_accuracy(family) else 3
    told = difference(family, [mean(means)])
    told += "" if error is None else f" ± {factor * error:.{digits}f}"
    return f"{told} (tasks: ± {factor * standard_error(means):.{digits}f})" if between and len(by) > 1 else told


def label(method: Method) -> str:
    """A method as the tables call it."""
    if not isinstance(method, Shira):
        return {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning", "peft-shira": "PEFT's SHiRA"}[method.kind]
    parts = [f"SHiRA-{NAMES[method.mask]}"]
    if method.granule > 1:
        parts.append(f"granule {method.granule}")
    if method.balanced:
        parts.append("balanced")
    if method.mixed:
        parts.append(MIXED[method.mixed])
    if isinstance(method, ShiraDora):
        parts.append("with DoRA")
    if isinstance(method, Moving):
        parts.append(f"{100 * method.share:.0f} % moved{' within rows' if method.rows else ''}")
    return ", ".join(parts)


def percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def share(values: Sequence[float]) -> str:
    told = f"{100 * mean(values):.0f}"
    return f"{told} ± {100 * statistics.stdev(values):.0f}" if len(values) > 1 else told


def what(task: str) -> str:
    return task.partition("/")[2]


def fusion_name(variant: str) -> str:
    first, comma, rest = variant.partition(",")
    name, _, granule = first.partition(" ")
    text = "LoRA" if name == "lora" else f"SHiRA-{NAMES[name]}" + (f" granule {granule}" if granule else "")
    return text + comma + rest


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
