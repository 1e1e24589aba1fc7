"""How the cost of a switch grows with density, granule, weight, dtype, number of adapters and threads.

Every point of an axis is a sweep over layers, and the points take turns in every round. What each point has to move is
kept beside its seconds: cache lines, which are read and written, and indices, values and base entries, which stream.
The model in scaling.py is fitted to all points of a number of threads at once, and plots.py draws it beside them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.speed import common
from benchmarks.speed.common import BF16, FP32, Report, compare, line_numbers, settings, sweep

shira = torch.ops.shira
ENOUGH = 128 << 20  # bytes of weights in a point's sweep, more than caches hold: one weight of 8192 x 8192 in bf16


@dataclass
class Point:
    """A place on an axis: layers of one kind, and what one call has to move."""

    x: float
    run: Callable[[], None]
    calls: int
    about: dict[str, float]


@functools.cache
def arena(size: int) -> torch.Tensor:
    """The memory that the weights of all points share, so that no axis is luckier with its pages than another."""
    return normal(size // 2, BF16, 0)


def weights_of(side: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """As many weights as the arena holds."""
    size = side * side * dtype.itemsize
    whole = arena(2 * size if settings.quick else ENOUGH).view(torch.uint8)
    return [one.view(dtype).view(side, side) for one in whole.split(size) if len(one) == size]


def normal(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """bf16 values, or pairs of them as fp32 values, since the same memory is read as either."""
    wide = dtype.itemsize // BF16.itemsize
    made = torch.empty(count * wide, dtype=BF16).normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
    return made.view(dtype)


def swap_point(x: float, weights: list[torch.Tensor], density: float, granule: int = 1) -> Point:
    limit = weights[0].numel() // granule
    count = max(1, round(density * limit))
    indices = [shira.select_random(limit, count, seed) for seed in range(len(weights))]
    values = [normal(count * granule, weights[0].dtype, seed) for seed in range(len(weights))]
    prove_swap(weights[0], indices[0], values[0], granule)
    about = {
        "lines": len(line_numbers(indices[0], granule, weights[0].itemsize)),
        "streamed": indices[0].nbytes + 2 * values[0].nbytes,  # values are read, and written with the base's
        "entries": count * granule,
        "weight_bytes": weights[0].nbytes,
    }
    arguments = [(*three, granule) for three in zip(weights, indices, values, strict=True)]
    return Point(x, sweep(shira.swap_, arguments), len(weights), about)


def prove_swap(weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, granule: int) -> None:
    rows, new = weight.view(-1, granule), values.view(-1, granule)
    wanted, old = rows.index_copy(0, indices.long(), new), rows[indices.long()]
    before = values.clone()
    shira.swap_(weight, indices, values, granule)
    assert torch.equal(rows, wanted)
    assert torch.equal(values.view(-1, granule), old)
    shira.swap_(weight, indices, values, granule)
    assert torch.equal(values, before)


def fuse_point(adapters: int, weights: list[torch.Tensor], density: float) -> Point:
    numel, dtype = weights[0].numel(), weights[0].dtype
    count = max(1, round(density * numel))
    stacks, about = [], {}
    for i, weight in enumerate(weights):
        indices = [shira.select_random(numel, count, 100 * i + k) for k in range(adapters)]
        values = [normal(count, dtype, 100 * i + k) for k in range(adapters)]
        plan = shira.fuse_plan(indices)
        saved, alphas = torch.empty(len(plan[0]), dtype=dtype), torch.linspace(0.2, 0.9, adapters)
        stacks.append((weight, saved, plan, values, alphas))
        about = {
            "lines": len(line_numbers(plan[0], 1, dtype.itemsize)),
            "streamed": sum(one.nbytes for one in (*plan, *values, saved)),
            "entries": count * adapters,
            "weight_bytes": weight.nbytes,
        }

    def fuse(weight: torch.Tensor, saved: torch.Tensor, plan: tuple, values: list, alphas: torch.Tensor) -> None:
        shira.fuse_(weight, saved, *plan, values, alphas, delta=[False] * adapters)

    weight, saved, plan, values, alphas = stacks[0]
    base, wanted = weight.clone(), weight.float().view(-1)
    sums = torch.zeros_like(wanted)
    for k, alpha in enumerate(alphas.tolist()):
        at = shira.select_random(numel, count, k).long()
        sums[at] += alpha * (values[k].float() - wanted[at])
    fuse(*stacks[0])
    torch.testing.assert_close(weight.view(-1).float(), wanted + sums, rtol=2e-2, atol=1e-3)
    assert torch.equal(saved, base.view(-1)[plan[0].long()])
    weight.copy_(base)
    return Point(adapters, sweep(fuse, stacks), len(weights), about)


DENSITIES = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1]


def density_axis(dtype: torch.dtype) -> list[Point]:
    weights = weights_of(settings.side, dtype)
    return [swap_point(density, weights, density) for density in DENSITIES]


def granule_axis() -> list[Point]:
    weights = weights_of(settings.side, BF16)
    return [swap_point(granule, weights, 0.01, granule) for granule in (1, 2, 4, 8, 16, 32, 64)]


def weight_axis() -> list[Point]:
    sides = (32, 64, 128) if settings.quick else (512, 1024, 2048, 4096, 8192)
    return [swap_point(side, weights_of(side, BF16), 0.01) for side in sides]


def adapters_axis() -> list[Point]:
    weights = weights_of(settings.side, BF16)
    return [fuse_point(adapters, weights, 0.01) for adapters in (1, 2, 4, 8)]


AXES: dict[str, Callable[[], list[Point]]] = {
    "density": functools.partial(density_axis, BF16),
    "density fp32": functools.partial(density_axis, FP32),
    "granule": granule_axis,
    "weight": weight_axis,
    "adapters": adapters_axis,
}


@pytest.mark.every_thread_count
@pytest.mark.parametrize("axis", list(AXES))
def bench_scaling(benchmark: BenchmarkFixture, threads: int, axis: str) -> None:
    points = AXES[axis]()
    names = [f"{axis} {point.x:g}" for point in points]
    runs = {name: point.run for name, point in zip(names, points, strict=True)}
    subject = names[-1]
    timing = compare(benchmark, (subject, runs.pop(subject)), runs, rounds=settings.few(11))
    report = Report(benchmark, threads, axis=axis, op="fuse_" if axis == "adapters" else "swap_")
    for name, point in zip(names, points, strict=True):
        timing.samples[name] = [sample / point.calls for sample in timing.samples[name]]
    report.seconds(timing)
    report.info["points"] = [
        {"x": point.x, "seconds": report.info["seconds"][name], **point.about}
        for name, point in zip(names, points, strict=True)
    ]
    # What a unit of memory costs at the end of the axis, as a share of its middle: 1 where the cost is in proportion.
    a, b = (points[at].about["lines"] * 2 * common.LINE + points[at].about["streamed"] for at in (len(points) // 2, -1))
    ratios = [one * a / b for one in timing.ratios(subject, of=names[len(points) // 2])]
    report.result("scaling", axis, ratios, min(ratios))
