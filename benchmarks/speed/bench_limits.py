"""What the machine can do at best, on torch's own threads: the other benchmarks report shares of these limits.

touch   reads and writes the cache lines that a random 1 % of bf16 entries lies in: see bench_switch.py
read    reads whole weights; copy also writes them, through the caches or past them, whichever is faster
GEMM    torch's product of two square matrices: what a LoRA fuse and a dense gradient consist of
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.speed import common
from benchmarks.speed.bench_fingerprint import READ
from benchmarks.speed.bench_switch import COPY, TOUCH, copy, touch
from benchmarks.speed.common import BF16, FP32, LINE, Report, compare, layers, settings, sweep

machine = torch.ops.shira_bench


@pytest.mark.every_thread_count
def bench_limits(benchmark: BenchmarkFixture, threads: int) -> None:
    some = layers(BF16)
    before = some[0].weight.clone()
    for ahead in TOUCH.values():
        machine.touch_(some[0].weight, some[0].lines, ahead)
    assert torch.equal(some[0].weight, before)
    side = 64 if settings.quick else 1024
    square = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((square @ square).double(), square.double() @ square.double(), rtol=1e-4, atol=1e-2)
    products = {
        f"GEMM {common.dtype_name(dtype)}": sweep(torch.matmul, [(square.to(dtype), square.to(dtype))])
        for dtype in (BF16, FP32)
    }
    touches, copies = touch(some), copy(some)
    first, run = touches.popitem()
    reads = {name: sweep(machine.read, [(one.weight, ahead) for one in some]) for name, ahead in READ.items()}
    timing = compare(benchmark, (first, run), {**touches, **copies, **reads, **products})
    for name, ways in (("touch", TOUCH), ("copy", COPY), ("read", READ)):
        timing.best(name, list(ways))
    report = Report(benchmark, threads)
    report.seconds(timing)
    weights = sum(one.weight.nbytes for one in some)
    lines = sum(2 * LINE * len(one.lines) + one.lines.nbytes for one in some)
    work = {"touch": lines, "read": weights, "copy": 2 * weights, **dict.fromkeys(products, 2 * side**3)}
    for name, amount in work.items():
        rates = [amount / sample / 1e9 for sample in timing.of(name)]
        report.result(f"limit, {name}", "", rates, max(rates))
