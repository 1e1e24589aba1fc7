"""Eight adapters of 1 % each at once on layers of 4096 x 4096: one pass over their union, and the plan it follows.

touch   reads and writes each cache line of the union once: see bench_switch.py. The plan's 8 MB are not in it
bytes   what every fuse_ has to move: the plan read once to check it before the first write and once to follow it, the
        values read, `saved` written, the union touched
eight   scatter_add_ for one adapter after the other
rows    where the granules of each adapter lie in the union, read from the plan: what a Switcher's first union needs
torch   the union and its counts by torch.cat and torch.unique: less than a plan holds, but the closest in plain torch
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import shira_ops.reference
from benchmarks.speed import common
from benchmarks.speed.bench_switch import TOUCH
from benchmarks.speed.common import (
    BF16,
    FP32,
    LINE,
    Report,
    compare,
    line_numbers,
    random_indices,
    settings,
    sweep,
    weights,
)
from shira_ops.plan import contributions, rows

shira, machine = torch.ops.shira, torch.ops.shira_bench
ADAPTERS, LAYERS = 8, 4
BYTES = {"bytes, plain": 0, "bytes, fetched ahead": 96}
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP32], ids=common.dtype_name)


@dataclass
class Stack:
    """A weight, its adapters, their plan."""

    weight: torch.Tensor
    indices: list[torch.Tensor]
    values: list[torch.Tensor]
    alphas: torch.Tensor
    granule: int = 1
    plan: tuple[torch.Tensor, ...] = field(init=False)
    saved: torch.Tensor = field(init=False)
    lines: torch.Tensor = field(init=False)
    saved_lines: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.plan = shira.fuse_plan(self.indices, self.granule)
        self.saved = torch.zeros(len(self.plan[0]) * self.granule, dtype=self.weight.dtype)
        self.lines = line_numbers(self.plan[0], self.granule, self.weight.itemsize)
        self.saved_lines = torch.arange(len(common.whole_lines(self.saved)) // LINE, dtype=torch.int32)

    def fuse(self, refuse: bool = False, ops: object = shira) -> None:
        delta = [True] * len(self.values)
        strengths, options = (self.values, self.alphas), {"refuse": refuse, "granule": self.granule}
        ops.fuse_(self.weight, self.saved, *self.plan, *strengths, delta=delta, **options)

    def add(self) -> None:
        for index, value, alpha in zip(self.indices, self.values, self.alphas.tolist(), strict=True):
            shira.scatter_add_(self.weight, index, value, alpha=alpha, granule=self.granule)

    def bytes_alone(self, ahead: int) -> None:
        for part in (*self.plan, *self.plan, *self.values):
            machine.read(common.whole_lines(part), ahead != 0)
        machine.touch_(common.whole_lines(self.saved), self.saved_lines, ahead)
        machine.touch_(self.weight, self.lines, ahead)

    def moved(self) -> int:
        parts = (self.saved, *self.plan, *self.values)
        return 2 * LINE * len(self.lines) + sum(t.numel() * t.element_size() for t in parts)


@functools.lru_cache(maxsize=2)
def masks(side: int, granule: int = 1) -> list[list[torch.Tensor]]:
    rng = np.random.default_rng(0)
    limit = side * side // granule
    return [[random_indices(rng, limit, round(0.01 * limit)) for _ in range(ADAPTERS)] for _ in range(LAYERS)]


def stacks(dtype: torch.dtype, granule: int = 1) -> list[Stack]:
    generator = torch.Generator().manual_seed(0)
    made = []
    given = weights(dtype, settings.side, settings.working_set)
    for weight, indices in zip(given, masks(settings.side, granule), strict=False):
        values = [torch.empty(len(one) * granule, dtype=dtype).normal_(0, 1e-3, generator=generator) for one in indices]
        made.append(Stack(weight.clone(), indices, values, torch.linspace(0.2, 0.9, ADAPTERS), granule))
    return made


def prove(stack: Stack) -> None:
    """The reference's bits, both times; eight passes agree up to their roundings; touch changes nothing."""
    base = stack.weight.clone()
    stack.fuse()
    fused = stack.weight.clone()
    stack.fuse(refuse=True)
    assert torch.equal(stack.weight, fused)
    saved = stack.saved.clone()
    stack.weight.copy_(base)
    stack.fuse(ops=shira_ops.reference)
    assert torch.equal(stack.weight, fused)
    assert torch.equal(stack.saved, saved)
    stack.weight.copy_(base)
    stack.add()
    torch.testing.assert_close(stack.weight, fused, atol=2.0**-10, rtol=2.0**-6)
    stack.weight.copy_(base)
    for ahead in TOUCH.values():
        machine.touch_(stack.weight, stack.lines, ahead)
    for ahead in BYTES.values():
        stack.bytes_alone(ahead)
    assert torch.equal(stack.weight, base)
    assert torch.equal(stack.saved, saved)


@DTYPES
def bench_fuse(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype) -> None:
    some = stacks(dtype)
    prove(some[0])
    touch = {
        name: sweep(machine.touch_, [(one.weight, one.lines, ahead) for one in some]) for name, ahead in TOUCH.items()
    }
    ways = {
        "refuse": sweep(Stack.fuse, [(one, True) for one in some]),
        "eight": sweep(Stack.add, [(one,) for one in some]),
    }
    alone = {name: sweep(Stack.bytes_alone, [(one, ahead) for one in some]) for name, ahead in BYTES.items()}
    timing = compare(benchmark, ("fuse_", sweep(Stack.fuse, [(one,) for one in some])), {**ways, **touch, **alone})
    timing.best("touch", list(TOUCH))
    timing.best("bytes", list(BYTES))
    name = common.dtype_name(dtype)
    report = Report(benchmark, threads, dtype=name, adapters=ADAPTERS, layers=len(some), union=len(some[0].saved))
    report.seconds(timing, len(some))
    report.bandwidth(timing, "fuse_", sum(one.moved() for one in some))
    report.ratio(f"fuse_ in touches {name}", "", timing, "fuse_", of="touch")
    report.ratio(f"fuse_ bytes in touches {name}", "", timing, "bytes", of="touch")
    report.ratio(f"fuse_ of bytes {name}", "", timing, "bytes")
    report.ratio(f"fuse_ over scatter_add_ {name}", "", timing, "eight")
    report.ratio(f"refuse over fuse_ {name}", "", timing, "fuse_", of="refuse")


def bench_fuse_granules(benchmark: BenchmarkFixture, threads: int) -> None:
    """bf16, granules of 16, which are half a cache line."""
    some = stacks(BF16, 16)
    prove(some[0])
    touch = {
        name: sweep(machine.touch_, [(one.weight, one.lines, ahead) for one in some]) for name, ahead in TOUCH.items()
    }
    ways = {"eight": sweep(Stack.add, [(one,) for one in some]), **touch}
    timing = compare(benchmark, ("fuse_", sweep(Stack.fuse, [(one,) for one in some])), ways)
    timing.best("touch", list(TOUCH))
    report = Report(benchmark, threads, dtype="bf16", granule=16, adapters=ADAPTERS, layers=len(some))
    report.seconds(timing, len(some))
    report.bandwidth(timing, "fuse_", sum(one.moved() for one in some))
    report.ratio("fuse_ in touches, granule 16", "", timing, "fuse_", of="touch")
    report.ratio("fuse_ over scatter_add_, granule 16", "", timing, "eight")


def bench_plan(benchmark: BenchmarkFixture, threads: int) -> None:
    some = masks(settings.side)
    for one in some[:1]:
        union, counts = torch.cat(one).unique(return_counts=True)
        indices, *sources = shira.fuse_plan(one)
        assert torch.equal(indices, union)
        assert torch.equal(contributions(*sources)[0].bincount(), counts)
        for own, places in zip(one, rows(*sources, ADAPTERS), strict=True):
            assert torch.equal(indices[places], own)

    def union_and_counts(lists: list[torch.Tensor]) -> None:
        torch.cat(lists).unique(return_counts=True)

    def all_rows(*sources: torch.Tensor) -> None:
        for _ in rows(*sources, ADAPTERS):
            pass

    torch_way = sweep(union_and_counts, [(one,) for one in some])
    timing = compare(
        benchmark,
        ("fuse_plan", sweep(shira.fuse_plan, [(one,) for one in some])),
        {"torch": torch_way, "rows": sweep(all_rows, [shira.fuse_plan(one)[1:] for one in some])},
        rounds=settings.few(9),
    )
    report = Report(benchmark, threads, adapters=ADAPTERS, layers=len(some))
    report.seconds(timing, len(some))
    report.ratio("fuse_plan", "", timing, "torch")
    report.ratio("rows of fuse_plan", "", timing, "rows", of="fuse_plan")
