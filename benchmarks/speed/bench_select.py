"""Masks: select_top beside stock topk, select_random beside randperm, and Snip's calibration beside plain training."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import common
from common import BF16, FP32, Report, compare, settings, sweep, weights

shira = torch.ops.shira


@pytest.mark.parametrize("score", ["magnitude", "snip"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=common.dtype_name)
def bench_select_top(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype, score: str) -> None:
    """1 % of a layer. Stock topk leaves its answer unsorted, which is no slower, and costs a tensor of scores."""
    weight, grad = weights(dtype, settings.side, settings.working_set)[:2]
    k = weight.numel() // 100

    def ours() -> torch.Tensor:
        return shira.select_top(weight, grad, k, score=score)

    def topk(sort: bool = False) -> torch.Tensor:
        scores = (weight if score == "magnitude" else weight.float() * grad.float()).abs()
        return scores.view(-1).topk(k, sorted=sort).indices

    chosen, stock = ours(), topk()
    scores = (weight.float() if score == "magnitude" else weight.float() * grad.float()).abs().view(-1)
    for one in (chosen, stock):  # which of equal scores stock takes is its own affair
        assert torch.equal(scores[one.long()].sort().values, scores.topk(k).values.flip(0))
    baselines = {"topk": topk, "topk, sorted": lambda: topk(True)}
    timing = compare(benchmark, ("select_top", ours), baselines, rounds=max(3, settings.rounds // 3))
    timing.best("stock", list(baselines))
    report = Report(benchmark, threads, dtype=common.dtype_name(dtype), score=score)
    report.seconds(timing)
    report.bandwidth(timing, "select_top", weight.nbytes * (1 + (score == "snip")))
    report.ratio(f"select_top {score} {common.dtype_name(dtype)}", "", timing, "stock")


def bench_select_random(benchmark: BenchmarkFixture, threads: int) -> None:
    n = settings.side**2
    k = n // 100
    drawn = shira.select_random(n, k, 1)
    assert len(drawn) == k
    assert bool((drawn[1:] > drawn[:-1]).all())
    run = sweep(shira.select_random, [(n, k, seed) for seed in range(4)])
    baselines = {"randperm": sweep(lambda: torch.randperm(n)[:k].sort(), [()])}
    timing = compare(benchmark, ("select_random", run), baselines, rounds=max(3, settings.rounds // 3))
    timing.samples["select_random"] = [sample / 4 for sample in timing.samples["select_random"]]
    report = Report(benchmark, threads)
    report.seconds(timing)
    report.ratio("select_random", "", timing, "randperm")
