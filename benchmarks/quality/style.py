"""What style transfer has shown, for the page: `told` makes its tables from the kept results.

``python -m benchmarks.quality.style`` draws the pictures in ``docs/quality``; it takes the adapters that
``python -m benchmarks.quality.run --family style`` left under ``build/``, and trains those that are missing again.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality import tasks
from benchmarks.quality.experiments import style as experiment
from benchmarks.quality.experiments.style import ALPHAS, BEST, FAMILY, Training
from benchmarks.quality.findings import Reader, Results, standard_error
from benchmarks.quality.lab import Lab, Stop
from benchmarks.quality.methods import Lora, Method, Shira
from benchmarks.quality.task import ROOT
from benchmarks.quality.words import label, table

PICTURES = ROOT / "docs" / "quality"

Swept = list[dict[str, dict[str, float]]]
"""For each seed: what the judge says, by strength."""


def swept(lab: Lab, some: Sequence[str], method: Method, training: Training = BEST) -> Swept | None:
    """The results of all seeds, or None while some are missing."""
    try:
        if len(some) == 1:
            return [
                experiment.alone(lab, some[0], method, seed, training)
                for seed in experiment.seeds(lab, method, training)
            ]
        return [experiment.fused(lab, method, seed, training) for seed in experiment.seeds(lab, method, training)]
    except Stop:
        return None


def percent(values: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def at(found: Swept, alpha: float, what: str = "score") -> list[float]:
    return [one[f"{alpha:g}"][what] for one in found]


def scores_table(lab: Lab, some: Sequence[str], training: Training = BEST) -> str:
    """The score by method and strength."""
    rows = []
    for method in experiment.methods():
        found = swept(lab, some, method, training)
        if found:
            rows.append([label(method), *(percent(at(found, alpha)) for alpha in ALPHAS)])
    return table(["method", *(f"α {alpha:g}" for alpha in ALPHAS)], rows) if rows else ""


PARTS = {
    "concept": "the digit asked for", "style": "the style", "taught": "score, digits 0 to 5", "new": "score, 6 to 9",
    "distance": "distance",
}  # fmt: skip


def parts_table(lab: Lab, some: Sequence[str], training: Training = BEST) -> str:
    """What the score at full strength is made of."""
    rows = []
    for method in experiment.methods():
        found = swept(lab, some, method, training)
        if found:
            rows.append([label(method), *(percent(at(found, 1.0, what)) for what in PARTS)])
    return table(["method", *PARTS.values()], rows) if rows else ""


def ahead_table(lab: Lab) -> str:
    """By how much each method is ahead of LoRA: pairs of one seed, mean and standard error."""
    columns = [*(((style,), 1.0) for style in experiment.styles()), *((experiment.styles(), alpha) for alpha in ALPHAS)]
    rows = []
    for method in experiment.methods():
        cells = []
        for some, alpha in columns:
            ours, theirs = (swept(lab, some, one) for one in (method, Lora(experiment.R)))
            # Some methods have fewer seeds.
            pairs = zip(at(ours, alpha), at(theirs, alpha), strict=False) if ours and theirs else ()
            gains = [a - b for a, b in pairs]
            cells.append(f"{100 * statistics.fmean(gains):+.1f} ± {100 * standard_error(gains):.1f}" if gains else "")
        if any(cells) and method != Lora(experiment.R):
            rows.append([label(method), *cells])
    heading = [f"{' + '.join(some)}, α {alpha:g}" for some, alpha in columns]
    return table(["ahead of LoRA by", *heading], rows) if rows else ""


def trainings_table(lab: Lab) -> str:
    """Every way of training: the size of the change and the scores alone (means over the styles), and fused."""
    rows = []
    for training, methods in experiment.trainings().items():
        for method in methods:
            alone = [swept(lab, [style], method, training) or [] for style in experiment.styles()]
            both = swept(lab, experiment.styles(), method, training)
            if not both or not all(alone):
                continue
            try:
                sizes = experiment.sizes(lab, method, training)
            except Stop:
                continue
            cells = [percent([statistics.fmean(one["norm"]) for one in sizes])]
            for alpha in (0.5, 1.0):
                cells.append(
                    percent([statistics.fmean(one) for one in zip(*(at(a, alpha) for a in alone), strict=True)])
                )
            cells += [percent(at(both, alpha)) for alpha in ALPHAS if alpha > 0.5]
            cells += [percent(at(both, ALPHAS[-1], what)) for what in ("concept", "style")]
            rows.append([training.name, label(method), *cells])
    heading = ["training", "method", "change", "alone, α 0.5", "alone, α 1"]
    heading += [f"fused, α {alpha:g}" for alpha in ALPHAS if alpha > 0.5]
    return table([*heading, *(f"{what} there" for what in ("the digit", "the styles"))], rows) if rows else ""


def sizes_table(lab: Lab) -> str:
    """How large the change is, how it lies, and the fused score, from the best on."""
    rows = []
    for method in experiment.methods():
        both = swept(lab, experiment.styles(), method)
        if not both:
            continue
        try:
            found = experiment.sizes(lab, method)
        except Stop:
            continue
        norms = [percent([one["norm"][number] for one in found]) for number in range(len(experiment.styles()))]
        rank = statistics.fmean(value for one in found for value in one["rank"])
        cosine = statistics.fmean(one["cosine"] for one in found)
        score = at(both, 1.0)
        rows.append((-statistics.fmean(score), [label(method), *norms, f"{rank:.1f}", f"{cosine:.2f}", percent(score)]))
    heading = ["method", *(f"change, {style}" for style in experiment.styles())]
    heading += ["stable rank", "cosine of the two", "fused, α 1"]
    return table(heading, [row for _, row in sorted(rows)]) if rows else ""


def rates_table(lab: Lab) -> str:
    rows = []
    for method in experiment.methods():
        try:
            rates = [lab.searched(experiment.setting(style, method)) for style in experiment.styles()]
            rows.append([label(method), *(f"{rate:g}" for rate in rates)])
        except Stop:
            continue
    return table(["method", *experiment.styles()], rows) if rows else ""


def judged(lab: Lab) -> str:
    """How many real digits the judge knows, in percent: the mean over the combinations of styles."""
    try:
        found = experiment.judge(lab)
    except Stop:
        return ""
    return f"{100 * statistics.fmean(one['concept'] for name, one in found.items() if name != 'seconds'):.1f}"


MAKERS: dict[str, Callable[[Lab], str]] = {
    "ahead": ahead_table,
    "rates": rates_table,
    "judge": judged,
    **{f"{style} scores": lambda lab, style=style: scores_table(lab, [style]) for style in ("bluefire", "brick")},
    **{f"{style} parts": lambda lab, style=style: parts_table(lab, [style]) for style in ("bluefire", "brick")},
    "fused scores": lambda lab: scores_table(lab, experiment.styles()),
    "fused parts": lambda lab: parts_table(lab, experiment.styles()),
    "trainings": trainings_table,
    "sizes": sizes_table,
}


def told(results: Results, *name: str) -> str:
    """A table of the page about style transfer (or the judge's score), by its name in `MAKERS`."""
    return MAKERS[" ".join(name)](results.lab) if results.has(FAMILY) else ""


# ---- pictures ------------------------------------------------------------------------------------------------

SHOWN = (2, 5, 7, 9)
"""Two digits that the training pictures show, and two that they do not."""
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.2)
SIDE_BY_SIDE = (Lora(experiment.R), Shira("grad", r=experiment.R), Shira("rand", r=experiment.R))


def grid(lab: Lab, some: Sequence[str], method: Method) -> Any:
    """Digits by strength, ``[3, height, width]``, from the same noise at every strength."""
    import torch

    from benchmarks.quality.tasks import style
    from shira import Switcher

    model = style.base()
    switcher = Switcher(model)
    for one in some:
        lr = experiment.rate(lab, one, method, BEST)
        switcher.add(one, lab.adapter(experiment.setting(one, method), lr, lab.seeds[0]))
    columns = []
    for alpha in STRENGTHS:
        switcher.activate(dict.fromkeys(some, alpha))
        drawn = style.draw(model, style.asked(style.DIGITS), style.SEEDS["test"])
        columns.append(torch.cat([drawn[digit] for digit in SHOWN], 1))
    return torch.cat(columns, 2)


def draw(lab: Lab, folder: Path) -> list[Path]:
    """LoRA and SHiRA side by side: a picture for each style, and one for both at once."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 8})
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    several = {**{style: (style,) for style in experiment.styles()}, "fused": experiment.styles()}
    for name, some in several.items():
        methods = [method for method in SIDE_BY_SIDE if swept(lab, some, method)]
        if not methods:
            continue
        figure, axes = pyplot.subplots(
            1, len(methods), figsize=(3.1 * len(methods), 2.5), squeeze=False, layout="constrained"
        )
        for axis, method in zip(axes[0], methods, strict=True):
            picture = grid(lab, some, method)
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            side = picture.shape[2] // len(STRENGTHS)
            axis.set_xticks([side * (number + 0.5) for number in range(len(STRENGTHS))], [f"{a:g}" for a in STRENGTHS])
            axis.set_yticks([])
            axis.tick_params(length=0)
            axis.set_title(label(method))
            axis.set_xlabel("strength")
        path = folder / f"style-{name}.png"
        figure.savefig(path, dpi=100, bbox_inches="tight", metadata={"Software": None})
        pyplot.close(figure)
        made.append(path)
    return made


def main() -> None:
    import torch

    torch.set_num_threads(1)
    tasks.tasks(FAMILY)
    for path in draw(Reader(), PICTURES):
        print(path)


if __name__ == "__main__":
    main()
