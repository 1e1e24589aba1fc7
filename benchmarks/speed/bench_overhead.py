"""What a call costs when there is next to nothing to do: 64 entries, everything in the caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import shira_ops
from benchmarks.speed.common import Report, compare, settings

ENTRIES = 64
SIZE = 4096  # entries that a call changes


@pytest.fixture(params=["normal", "inference"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Tensors are made and used as usual, or made and used in inference mode."""
    with torch.inference_mode() if request.param == "inference" else nullcontext():
        yield request.param


def operands(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, indices and values of `count` small adapters; each is a row of one tensor."""
    indices = torch.stack([torch.randperm(SIZE)[:ENTRIES].sort().values for _ in range(count)]).to(torch.int32)
    return torch.randn(count, SIZE), indices, torch.randn(count, ENTRIES)


def many(call: Callable[..., object], *arguments: object) -> Callable[[], None]:
    calls = settings.calls

    def run() -> None:
        for _ in range(calls):
            call(*arguments)

    return run


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(shira_ops.swap_, id="shira_ops.swap_"),
        pytest.param(torch.ops.shira.swap_, id="torch.ops.shira.swap_"),
    ],
)
def bench_call(
    benchmark: BenchmarkFixture, threads: int, mode: str, call: Callable[..., None], request: pytest.FixtureRequest
) -> None:
    """Beside it the same switch in two calls of plain torch."""
    weights, indices, values = operands(1)
    weight, index, value = weights[0], indices[0], values[0]
    long, saved = index.to(torch.int64), torch.empty_like(value)
    expected = weight.clone().index_copy_(0, long, value)
    old = weight[long]
    call(weight, index, value)
    assert torch.equal(weight, expected)
    assert torch.equal(value, old)

    def stock() -> None:
        torch.index_select(weight, 0, long, out=saved)
        weight.index_copy_(0, long, value)

    timing = compare(
        benchmark, ("swap_", many(call, weight, index, value)), {"index_select + index_copy_": many(stock)}, cold=False
    )
    report = Report(benchmark, threads, entries=ENTRIES, mode=mode, calls=settings.calls)
    report.seconds(timing, settings.calls)
    way = "torch.ops.shira.swap_" if call is torch.ops.shira.swap_ else "shira_ops.swap_"
    line = "call, inference tensors" if mode == "inference" else "call"
    micros = [sample / settings.calls * 1e6 for sample in timing.of("swap_")]
    report.result(line, way, micros, min(micros))


@pytest.mark.parametrize("count", [64, 256])
def bench_foreach(benchmark: BenchmarkFixture, threads: int, mode: str, count: int) -> None:
    """A list beside one tensor with the same entries in the same memory: the difference is the list's own cost."""
    weights, indices, values = operands(count)
    lists = [list(one.unbind()) for one in (weights, indices, values)]
    joined = (indices.to(torch.int64) + SIZE * torch.arange(count).unsqueeze(1)).view(-1).to(torch.int32)
    expected_weights, expected_values = weights.clone(), values.clone()
    shira_ops.swap_(expected_weights, joined, expected_values.view(-1))
    shira_ops.foreach_swap_(*lists)
    assert torch.equal(weights, expected_weights)
    assert torch.equal(values, expected_values)

    calls = max(1, settings.calls // count)
    flat = values.view(-1)

    def foreach() -> None:
        for _ in range(calls):
            shira_ops.foreach_swap_(*lists)

    def one() -> None:
        for _ in range(calls):
            shira_ops.swap_(weights, joined, flat)

    timing = compare(benchmark, ("foreach_swap_", foreach), {"swap_ of all": one}, cold=False)
    report = Report(benchmark, threads, entries=ENTRIES, mode=mode, tensors=count, calls=calls)
    report.seconds(timing, calls)
    listed, joint = ([sample / calls / count * 1e6 for sample in timing.of(name)] for name in timing.samples)
    above = [a - b for a, b in zip(listed, joint, strict=True)]
    report.result("foreach_", f"{count} tensors, {mode}", above, min(listed) - min(joint))
