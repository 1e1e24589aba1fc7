"""Experiments: each module has ``jobs(family, seeds) -> list[Job]``, for any family."""

from benchmarks.quality.experiments import cost, fusion, masks, single, size, style

EXPERIMENTS = {
    "single": single.jobs,
    "masks": masks.jobs,
    "fusion": fusion.jobs,
    "size": size.jobs,
    "cost": cost.jobs,
    "style": style.jobs,
}
