"""What changed since a snapshot, which is brought up to date, on layers of 4096 x 4096.

A share of the layer changes with every call.

read    reads the weight and the snapshot once, as fast as a plain loop can
torch   the same in plain torch: bits compared, `nonzero`, the entries by `index_select`, the snapshot by `index_copy_`
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.speed import common
from benchmarks.speed.common import BF16, FP32, Report, compare, settings, sweep, weights

shira, machine = torch.ops.shira, torch.ops.shira_bench
READ = {"read, plain": False, "read, fetching ahead": True}
BITS = {2: torch.int16, 4: torch.int32}


@dataclass
class Followed:
    """A weight with two states, a snapshot of it, and which state it is in."""

    states: tuple[torch.Tensor, torch.Tensor]
    snapshot: torch.Tensor
    now: int = 0

    def turn(self) -> torch.Tensor:
        """The weight, changed since the snapshot."""
        self.now = 1 - self.now
        return self.states[self.now]

    def diff(self) -> tuple[torch.Tensor, torch.Tensor]:
        return shira.diff_(self.snapshot, self.turn())

    def plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.turn().view(-1)
        new, old = (one.view(-1).view(BITS[weight.itemsize]) for one in (weight, self.snapshot))
        indices = (new != old).nonzero().view(-1)
        values = weight.index_select(0, indices)
        self.snapshot.view(-1).index_copy_(0, indices, values)
        return indices.int(), values

    def read(self, ahead: bool) -> None:
        for one in (self.turn(), self.snapshot):
            machine.read(one, ahead)


def followed(dtype: torch.dtype, density: float) -> list[Followed]:
    made = []
    for number, weight in enumerate(weights(dtype, settings.side, settings.working_set // 3)):
        other = weight.clone()
        indices = shira.select_random(weight.numel(), max(1, round(density * weight.numel())), number)
        shira.scatter_(other, indices, shira.gather(other, indices) + 1)
        made.append(Followed((weight, other), weight.clone()))
    return made


@pytest.mark.parametrize("density", [0.01, 0.001], ids=["1 %", "0.1 %"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=common.dtype_name)
def bench_diff(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype, density: float) -> None:
    some = followed(dtype, density)
    one = some[0]
    for ours, theirs in zip(one.diff(), Followed(one.states, one.states[0].clone()).plain(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(one.snapshot, one.states[one.now])

    calls = [(one,) for one in some]
    reads = {name: sweep(Followed.read, [(one, ahead) for one in some]) for name, ahead in READ.items()}
    timing = compare(
        benchmark, ("diff_", sweep(Followed.diff, calls)), {"torch": sweep(Followed.plain, calls), **reads}
    )
    timing.best("read", list(READ))
    variant = f"{common.dtype_name(dtype)}, {density:g} changed"
    report = Report(benchmark, threads, dtype=common.dtype_name(dtype), density=density, layers=len(some))
    report.seconds(timing, len(some))
    report.bandwidth(timing, "diff_", sum(one.snapshot.nbytes + one.states[0].nbytes for one in some))
    report.ratio("diff_ of read", variant, timing, "read")
    report.ratio("diff_ over torch", variant, timing, "torch")
