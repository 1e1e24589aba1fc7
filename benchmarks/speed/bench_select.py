"""Masks: select_top beside topk, select_random beside randperm and numpy, Snip's calibration beside plain training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

import shira_ops
from benchmarks.speed import common
from benchmarks.speed.common import BF16, FP32, Report, compare, settings, sweep, weights
from shira import masks

shira = torch.ops.shira


@pytest.mark.parametrize("score", ["magnitude", "snip"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=common.dtype_name)
def bench_select_top(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype, score: str) -> None:
    """1 % of a layer. topk's answer is left unsorted, which makes it no slower; it needs a tensor of scores."""
    weight, grad = weights(dtype, settings.side, settings.working_set)[:2]
    k = weight.numel() // 100

    def ours() -> torch.Tensor:
        return shira.select_top(weight, grad, k, score=score)

    def topk(sort: bool = False) -> torch.Tensor:
        scores = weight.abs() if score == "magnitude" else (weight.float() * grad).abs_()
        return scores.view(-1).topk(k, sorted=sort).indices

    chosen, stock = ours(), topk()
    scores = (weight.float() if score == "magnitude" else weight.float() * grad.float()).abs().view(-1)
    for one in (chosen, stock):  # topk may take any of equal scores
        assert torch.equal(scores[one.long()].sort().values, scores.topk(k).values.flip(0))
    baselines = {"topk": topk, "topk, sorted": lambda: topk(True)}
    timing = compare(benchmark, ("select_top", ours), baselines, rounds=settings.few(7))
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
    generator = np.random.default_rng(0)

    def choice() -> torch.Tensor:
        return torch.from_numpy(np.sort(generator.choice(n, k, replace=False, shuffle=False)))

    assert len(choice().unique()) == k
    baselines = {"randperm": sweep(lambda: torch.randperm(n)[:k].sort(), [()]), "choice": choice}
    timing = compare(benchmark, ("select_random", run), baselines, rounds=settings.few(7))
    timing.samples["select_random"] = [sample / 4 for sample in timing.samples["select_random"]]
    report = Report(benchmark, threads)
    report.seconds(timing)
    report.ratio("select_random", "", timing, "randperm")
    report.ratio("select_random over numpy", "", timing, "choice")


class Block(nn.Module):
    """Llama's decoder layer, without rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, width * 11 // 4, bias=False) for _ in range(2))
        self.down = nn.Linear(width * 11 // 4, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))


@pytest.mark.parametrize(
    ("layers", "tokens"), [(4, 128), pytest.param(1, 1280, marks=pytest.mark.full)], ids=["kept", "accumulated"]
)
@pytest.mark.parametrize("dtype", [BF16, pytest.param(FP32, marks=pytest.mark.full)], ids=common.dtype_name)
def bench_snip_calibration(
    benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype, layers: int, tokens: int
) -> None:
    """Snip over two batches, including the selection, beside two plain forward and backward passes of the same model.

    With 128 tokens the activations are kept until the last batch; with 1280 they would be larger than the gradient, so
    gradients are added up.
    """
    width = 64 if settings.quick else 2048
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width, 16) for _ in range(layers))).to(dtype)
    batches = [torch.randn(1, tokens, width).to(dtype) for _ in range(2)]
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    places = {f"{name}.weight": [(module, "weight")] for name, module in linear.items()}

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).float().square().mean()

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        for batch in batches:
            loss(model, batch).backward()

    def snip() -> masks.Snip:
        mask = masks.Snip(density=0.01)
        mask.prepare(model, places, batches, loss)
        return mask

    plain()
    mask = snip()
    shared = total = 0
    for name, module in linear.items():
        indices, k = mask(f"{name}.weight", module.weight), max(1, round(0.01 * module.weight.numel()))
        wanted = shira_ops.select_top(module.weight.detach(), module.weight.grad, k, score="snip")
        assert len(indices) == k
        shared += int(torch.isin(indices, wanted).sum())
        total += k
    # Sums in another order change a few entries at the edge; in bfloat16 autograd rounds every gradient to 8 bits.
    assert shared >= (0.999 if dtype == FP32 else 0.97) * total
    timing = compare(benchmark, ("snip", snip), {"plain": plain}, cold=False, rounds=settings.few(5))
    report = Report(benchmark, threads, dtype=common.dtype_name(dtype), layers=layers, tokens=tokens)
    report.seconds(timing)
    samples = [1 / ratio for ratio in timing.ratios("plain")]
    best = min(timing.of("snip")) / min(timing.of("plain"))
    report.result(f"snip calibration {common.dtype_name(dtype)}", f"{layers} x {tokens} tokens", samples, best)
