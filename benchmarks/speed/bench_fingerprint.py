"""The fingerprint of weights in memory, beside the fastest plain loop that reads them."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import shira_ops.reference
from benchmarks.speed import common
from benchmarks.speed.common import BF16, FP32, Report, compare, settings, sweep, weights

shira, machine = torch.ops.shira, torch.ops.shira_bench
READ = {"read, plain": False, "read, fetching ahead": True}


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=common.dtype_name)
def bench_fingerprint(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype) -> None:
    some = weights(dtype, settings.side, settings.working_set)
    part = some[0][:64]  # the reference is slow, so a part of a weight, with a tail that is not a whole word
    for one in (part, part.reshape(-1)[: part.numel() - 3]):
        assert torch.equal(shira.fingerprint(one), shira_ops.reference.fingerprint(one))
    for ahead in READ.values():
        assert machine.read(some[0], ahead) == some[0].view(torch.int64).sum().item()

    reads = {name: sweep(machine.read, [(one, ahead) for one in some]) for name, ahead in READ.items()}
    timing = compare(benchmark, ("fingerprint", sweep(shira.fingerprint, [(one,) for one in some])), reads)
    timing.best("read", list(READ))
    report = Report(benchmark, threads, dtype=common.dtype_name(dtype), layers=len(some))
    report.seconds(timing, len(some))
    moved = sum(one.nbytes for one in some)
    report.bandwidth(timing, "fingerprint", moved)
    report.bandwidth(timing, "read", moved)
    report.ratio("fingerprint", common.dtype_name(dtype), timing, "read")
