"""AdamW on 1 % of layers of 4096 x 4096, in place: beside plain torch on the values alone, and on whole weights.

stock   torch.optim.AdamW(fused=True) over the values of all layers, then a cast and index_copy_ or put_
dense   torch.optim.AdamW(fused=True) over the weights, after each dense gradient was multiplied by its mask: masked
        training as the paper describes it
masked  the step of that alone, with gradients that were masked beforehand
touch   reads and writes each needed cache line of the weights once: see bench_switch.py. State and gradient are not
        in it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import shira_ops.reference
from benchmarks.speed import common
from benchmarks.speed.bench_switch import TOUCH, about, touch
from benchmarks.speed.common import BF16, FP32, LINE, Layer, Report, compare, layers, settings, sweep

shira = torch.ops.shira
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP32], ids=common.dtype_name)
# No decay: in the dense way it would change the whole weight, and the three ways could not be compared.
OPTIONS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
TORCH = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "fused": True}


@dataclass
class State:
    """What the optimizer keeps of one layer: fp32, [nnz]."""

    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    grad: torch.Tensor

    @classmethod
    def of(cls, layer: Layer) -> State:
        master = layer.weight.view(-1)[layer.indices64].float()
        return cls(master, torch.zeros_like(master), torch.zeros_like(master), layer.values.float())


def arguments(some: list[Layer]) -> list[tuple[torch.Tensor, ...]]:
    states = [State.of(one) for one in some]
    return [
        (one.weight, one.indices, its.master, its.exp_avg, its.exp_avg_sq, its.grad)
        for one, its in zip(some, states, strict=True)
    ]


def adamw(*tensors: torch.Tensor) -> None:
    shira.adamw_(*tensors, step=1, **OPTIONS)


def stock(some: list[Layer], write: str) -> Callable[[], None]:
    parameters = []
    for one in some:
        state = State.of(one)
        state.master.requires_grad_().grad = state.grad
        parameters.append(state.master)
    optimizer = torch.optim.AdamW(parameters, **TORCH)

    def run() -> None:
        optimizer.step()
        for one, values in zip(some, parameters, strict=True):
            flat, new = one.weight.view(-1), values.detach().to(one.weight.dtype)
            if write == "put_":
                flat.put_(one.indices64, new)
            else:
                flat.index_copy_(0, one.indices64, new)

    return run


def dense(some: list[Layer], *, masks: bool) -> Callable[[], None]:
    """With `masks`, the gradients are dense when the step begins, and the step masks them."""
    gradients, factors, parameters = [], [], []
    for one in some:
        factors.append(torch.zeros_like(one.weight))
        factors[-1].view(-1)[one.indices64] = 1
        gradients.append(torch.ones_like(one.weight) if masks else torch.zeros_like(one.weight))
        gradients[-1].view(-1)[one.indices64] = one.values
        parameters.append(one.weight.view_as(one.weight).requires_grad_())
        parameters[-1].grad = gradients[-1]
    optimizer = torch.optim.AdamW(parameters, **TORCH)
    if not masks:
        return optimizer.step

    def run() -> None:
        for gradient, factor in zip(gradients, factors, strict=True):
            gradient.mul_(factor)
        optimizer.step()

    return run


def clones(some: list[Layer]) -> list[Layer]:
    return [Layer(**{**vars(one), "weight": one.weight.clone()}) for one in some]


def prove(some: list[Layer]) -> None:
    """The first step of all ways: ours gives the reference's bits, and torch's agree with it."""
    ours, same, theirs, put, whole, masked = (clones(some[:1]) for _ in range(6))
    ((weight, *given),) = arguments(ours)
    adamw(weight, *given)
    ((_, *wanted),) = arguments(same)
    shira_ops.reference.adamw_(same[0].weight, *wanted, step=1, **OPTIONS)
    for a, b in zip((weight, *given), (same[0].weight, *wanted), strict=True):
        assert torch.equal(a, b)
    stock(theirs, "index_copy_")()
    stock(put, "put_")()
    dense(whole, masks=True)()
    dense(masked, masks=False)()
    for layer in (theirs, put, whole, masked):
        # A step of 1e-3 shows in a narrow weight only to its own precision.
        torch.testing.assert_close(layer[0].weight, weight, atol=1e-3 * 2.0**-5, rtol=2.0**-8)
    untouched = torch.ones(weight.numel(), dtype=torch.bool).index_fill_(0, some[0].indices64, False)
    for layer in (ours, theirs, put, whole, masked):
        assert torch.equal(layer[0].weight.view(-1)[untouched], some[0].weight.view(-1)[untouched])


def stepped_bytes(some: list[Layer]) -> int:
    """Touched cache lines and state are read and written, gradient and indices are read."""
    return sum(2 * LINE * len(one.lines) + one.values.numel() * (2 * 3 * 4 + 4 + 4) for one in some)


@DTYPES
def bench_adamw(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype) -> None:
    some = layers(dtype)
    prove(some)
    some = clones(some)
    run = sweep(adamw, arguments(some))
    plain = {f"stock, {write}": stock(some, write) for write in ("index_copy_", "put_")}
    timing = compare(benchmark, ("adamw_", run), {**touch(some), **plain})
    timing.best("touch", list(TOUCH))
    timing.best("stock", list(plain))
    report = Report(benchmark, threads, **about(some))
    report.seconds(timing, len(some))
    report.bandwidth(timing, "adamw_", stepped_bytes(some))
    name = common.dtype_name(dtype)
    report.ratio(f"adamw_ over stock {name}", "", timing, "stock")
    report.ratio(f"adamw_ of touch {name}", "", timing, "touch")


@DTYPES
def bench_dense(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype) -> None:
    """Few layers, since the dense way holds a gradient and two averages of each."""
    some = layers(dtype)[:3]
    prove(some)
    some = clones(some)
    ways = {"dense": dense(some, masks=True), "masked": dense(some, masks=False)}
    run = sweep(adamw, arguments(some))
    timing = compare(benchmark, ("adamw_", run), ways, rounds=settings.few(9))
    report = Report(benchmark, threads, **about(some))
    report.seconds(timing, len(some))
    name = common.dtype_name(dtype)
    report.ratio(f"adamw_ over dense {name}", "", timing, "dense")
    report.ratio(f"adamw_ over masked {name}", "", timing, "masked")
