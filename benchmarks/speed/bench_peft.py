"""A training step of PEFT's own sparse layers before and after `accelerate`, and of our method in PEFT, beside LoRA.

Also beside a `SparseTuner` whose adapter lies over the weights, which is what `accelerate` is without PEFT.

The models, the budget and the rest are those of bench_training.py: as many parameters for all, the same frozen weights,
torch's fused AdamW. Unmerged LoRA is what most people train with.

`accelerate` saves what PEFT SHiRA's own layers cost, and nothing of the frozen model's forward and backward pass. That
pass is measured too: no step after `accelerate` is shorter. For a small model in fp32 it alone takes nearly 0.6 of a
step of before, and the values' gradients and the optimizer come on top, so the line of 0.6 is out of reach there.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.speed import common
from benchmarks.speed.bench_training import (
    FAST_SHIRA,
    FAST_SUPER,
    FROZEN,
    LORA,
    METHOD,
    METHOD_16,
    OVERLAY,
    SHIRA,
    SUPER,
    TOKENS,
    Trained,
    peak_alone,
    rank,
)
from benchmarks.speed.common import BF16, FP32, Report, compare, settings

# A way, what it is compared with, and the words of the lines about the two.
PAIRS = (
    (FAST_SHIRA, SHIRA, "accelerate over SHiRA"),
    (FAST_SUPER, SUPER, "accelerate over Super-Tuning"),
    (FAST_SHIRA, OVERLAY, "accelerate over a tuner"),
    (METHOD, LORA, "SparseConfig over LoRA"),
    (METHOD_16, LORA, "SparseConfig, granule 16 over LoRA"),
)


def prove(trained: dict[str, Trained]) -> None:
    """Before and after, the same outputs and the same gradients, in PEFT's order; and the budgets are the same.

    Values that start at zero would prove nothing, so they do not.
    """
    for fast, slow in ((FAST_SHIRA, SHIRA), (FAST_SUPER, SUPER)):
        pairs = list(zip(trained[fast].parameters, trained[slow].parameters, strict=True))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for ours, theirs in pairs:
                theirs.copy_(ours.copy_(torch.randn(ours.shape, generator=generator) * 1e-2))
        ours_loss, theirs_loss = trained[fast].loss(), trained[slow].loss()
        torch.testing.assert_close(ours_loss, theirs_loss, rtol=1e-2, atol=1e-2)
        ours_loss.backward()
        theirs_loss.backward()
        for ours, theirs in pairs:
            assert ours.grad is not None
            assert theirs.grad is not None
            # In bf16, PEFT's weight is rounded, and so is its dense gradient.
            bf16 = ours_loss.dtype == BF16 or next(trained[fast].model.parameters()).dtype == BF16
            assert (ours.grad - theirs.grad).norm() <= (0.05 if bf16 else 1e-3) * theirs.grad.norm()
        for one in (trained[fast], trained[slow]):
            one.optimizer.zero_grad()
    counts = {way: sum(one.numel() for one in made.parameters) for way, made in trained.items()}
    assert all(abs(count / counts[LORA] - 1) < (0.6 if settings.quick else 0.05) for count in counts.values()), counts


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=common.dtype_name)
@pytest.mark.parametrize("model", [pytest.param("linear", marks=pytest.mark.full), "llama"])
def bench_peft(benchmark: BenchmarkFixture, threads: int, model: str, dtype: torch.dtype) -> None:
    ways = list(dict.fromkeys(way for pair in PAIRS for way in pair[:2]))
    memory = {way: peak_alone(way, model, dtype) for way in ways}
    trained = {way: Trained(way, model, dtype) for way in ways}
    prove(trained)
    trained[FROZEN] = Trained(FROZEN, model, dtype)
    others: dict[str, Callable[[], object]] = {way: trained[way].step for way in trained if way != FAST_SHIRA}
    timing = compare(benchmark, (FAST_SHIRA, trained[FAST_SHIRA].step), others, cold=False, rounds=settings.few(5))
    name = common.dtype_name(dtype)
    report = Report(benchmark, threads, dtype=name, model=model, rank=rank(model), tokens=TOKENS, peak_bytes=memory)
    report.seconds(timing)
    for way, other, line in PAIRS:
        report.ratio(line, f"{model} {name}", timing, way, of=other)
        share = memory[way] / memory[other]
        report.result(line.replace(" over", ": memory over"), f"{model} {name}", [share], share)
    report.ratio("accelerate, bound", f"{model} {name}", timing, FROZEN, of=SHIRA)
