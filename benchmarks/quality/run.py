"""Run the experiments: ``python -m benchmarks.quality.run``. Finished runs are kept, and never done again.

Runs are done one after the other on one thread (the models are small; two processes on two families do not disturb
each other), the most important first. ``docs/quality.md`` and the pages of its folder are made of the results by
`benchmarks.quality.report`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.quality.experiments import EXPERIMENTS, fusion
from benchmarks.quality.lab import COSTLY, Job, Lab, Stop
from benchmarks.quality.store import RESULTS
from benchmarks.quality.tasks import FAMILIES


def plan(families: Sequence[str], experiments: Sequence[str], seeds: int) -> list[Job]:
    """All jobs, the most important first."""
    jobs = [
        job
        for family in families
        for experiment in experiments
        if experiment in asked(family)
        for job in EXPERIMENTS[experiment](family, seeds)
    ]
    return sorted(jobs, key=lambda job: job.rank)


def asked(family: str) -> Sequence[str]:
    """The experiments that are about a family."""
    if family == "style":
        return ("style",)
    if family in COSTLY:
        return ("single", "cost", "dora", *(["fusion"] if family in fusion.CHOSEN else []))
    return tuple(EXPERIMENTS)


def run(jobs: Sequence[Job], lab: Lab, console: Console) -> bool:
    """Do the jobs; False if the time ran out first."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar, done = progress.add_task("runs", total=sum(job.runs for job in jobs)), 0
        lab.tick = lambda what: progress.update(bar, advance=1, description=what)
        for job in jobs:
            try:
                job.do(lab)
            except Stop:
                console.print("The time is up. The same command goes on from here.")
                return False
            done += job.runs
            # A job may need fewer runs than expected, or share some with another job.
            progress.update(bar, completed=done)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.run", description=(__doc__ or "").split(":")[0])
    families, experiments = list(FAMILIES), list(EXPERIMENTS)
    parser.add_argument("--family", action="append", choices=families, help="repeatable (default: all)")
    parser.add_argument("--experiment", action="append", choices=experiments, help="repeatable (default: all)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many minutes, between two runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=5, help="seeds for every figure (default: 5)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as fast as several, for matrices of this size
    lab = Lab(folder=given.results, seeds=range(given.seeds), until=time.time() + 60 * given.minutes)
    jobs = plan(given.family or families, given.experiment or experiments, given.seeds)
    run(jobs, lab, Console())


if __name__ == "__main__":
    main()
