"""Experiments: each module has ``jobs(family, seeds) -> list[Job]``, for any family."""

from benchmarks.quality.experiments import cost, dora, fusion, masks, single, size, style, trials

EXPERIMENTS = {
    "single": single.jobs,
    "masks": masks.jobs,
    "fusion": fusion.jobs,
    "size": size.jobs,
    "cost": cost.jobs,
    "trials": trials.jobs,
    "dora": dora.jobs,
    "style": style.jobs,
}
