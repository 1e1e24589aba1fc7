"""Switching layers of 4096 x 4096 at 1 %: the ops beside touch, stock torch, and a LoRA fuse of equal parameters.

touch   reads and writes each cache line that a switch needs once, in the fastest of a plain loop and loops that
        fetch ahead: what the memory allows
stock   the fastest exact switch of plain torch: index_select keeps the old entries, and the new ones are written by
        index_copy_, put_ or scatter_ (which takes 80 ms in bf16 and is left out there)
fuse    the fastest way to fold a LoRA adapter in: W.addmm_(B, A, alpha=s), of rank r with r * (m + n) <= nnz
copy    a copy of the same weights, through the caches or past them, whichever is faster: the bandwidth
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.speed import common
from benchmarks.speed.common import BF16, FP32, Layer, Report, compare, layers, random_indices, settings, sweep

shira, machine = torch.ops.shira, torch.ops.shira_bench
TOUCH = {"touch, plain": 0, "touch, 64 ahead": 64, "touch, 96 ahead": 96, "touch, 128 ahead": 128,
         "touch, 64 ahead as reads": -64, "touch, 128 ahead as reads": -128}  # fmt: skip
COPY = {"copy, plain": False, "copy, past the caches": True}
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP32], ids=common.dtype_name)


def stock_switch(granules: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, saved: torch.Tensor) -> None:
    torch.index_select(granules, 0, indices, out=saved)
    granules.index_copy_(0, indices, values)


def stock_put(weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, saved: torch.Tensor) -> None:
    torch.index_select(weight, 0, indices, out=saved)
    weight.put_(indices, values)


def stock_scatter(weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, saved: torch.Tensor) -> None:
    torch.index_select(weight, 0, indices, out=saved)
    weight.scatter_(0, indices, values)


def stock_ways(layer: Layer) -> dict[str, Callable[..., None]]:
    ways = {"index_copy_": stock_switch}
    if layer.granule == 1:
        ways["put_"] = stock_put
        if layer.weight.dtype == FP32:
            ways["scatter_"] = stock_scatter
    return ways


def touch(some: list[Layer]) -> dict[str, Callable[[], None]]:
    return {
        name: sweep(machine.touch_, [(one.weight, one.lines, ahead) for one in some]) for name, ahead in TOUCH.items()
    }


def stock(some: list[Layer]) -> dict[str, Callable[[], None]]:
    arguments = [(one.granules, one.indices64, one.shaped(one.values), one.shaped(one.saved)) for one in some]
    return {name: sweep(way, arguments) for name, way in stock_ways(some[0]).items()}


def fuse(some: list[Layer]) -> dict[str, Callable[[], None]]:
    def run() -> None:
        for one in some:
            one.weight.addmm_(one.lora_b, one.lora_a, alpha=0.01)

    return {"fuse": run}


def copy(some: list[Layer]) -> dict[str, Callable[[], None]]:
    spare = torch.empty_like(some[0].weight)
    return {name: sweep(machine.copy_, [(spare, one.weight, past) for one in some]) for name, past in COPY.items()}


def prove(layer: Layer, op: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """`op` (weight, indices, values, saved) changes the weight, and returns the old entries, as plain torch does."""
    weight, values, saved = layer.weight.clone(), layer.values.clone(), layer.saved.clone()
    old = op(weight, layer.indices, values, saved)
    expected, kept = layer.weight.clone(), torch.empty_like(layer.saved)
    rows = expected.view(-1) if layer.granule == 1 else expected.view(-1, layer.granule)
    for stock_way in stock_ways(layer).values():
        rows.copy_(layer.granules)
        stock_way(rows, layer.indices64, layer.shaped(layer.values), layer.shaped(kept))
        assert torch.equal(weight, expected)
        assert torch.equal(old, kept)
    before = weight.clone()
    for ahead in TOUCH.values():
        machine.touch_(weight, layer.lines, ahead)
    assert torch.equal(weight, before)
    rows.view(-1)[:] = 0  # every changed entry lies in a touched line, and every touched line has one
    rows.index_fill_(0, layer.indices64, 1)
    touched = expected.view(-1, common.LINE // expected.element_size()).any(1).nonzero().view(-1)
    assert torch.equal(touched.to(torch.int32), layer.lines)


def prove_fuse(layer: Layer) -> None:
    fused = layer.weight.clone().addmm_(layer.lora_b, layer.lora_a, alpha=0.01)
    expected = layer.weight.float() + 0.01 * (layer.lora_b.float() @ layer.lora_a.float())
    torch.testing.assert_close(fused, expected.to(fused.dtype))


def about(some: list[Layer]) -> dict[str, object]:
    one = some[0]
    return {
        "dtype": common.dtype_name(one.weight.dtype),
        "granule": one.granule,
        "shape": list(one.weight.shape),
        "layers": len(some),
        "working_set_bytes": sum(one.weight.numel() * one.weight.element_size() for one in some),
        "nnz": one.values.numel(),
        "lora_rank": one.lora_b.shape[1],
        "lora_parameters": one.lora_b.numel() + one.lora_a.numel(),
    }


@DTYPES
def bench_swap(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype) -> None:
    some = layers(dtype)

    def swap(weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        shira.swap_(weight, indices, values)
        return values

    prove(some[0], swap)
    prove_fuse(some[0])
    run = sweep(shira.swap_, [(one.weight, one.indices, one.values) for one in some])
    timing = compare(benchmark, ("swap_", run), {**touch(some), **stock(some), **fuse(some), **copy(some)})
    timing.best("touch", list(TOUCH))
    timing.best("stock", list(stock_ways(some[0])))
    timing.best("copy", list(COPY))
    report = Report(benchmark, threads, **about(some))
    report.seconds(timing, len(some))
    moved = common.switched_bytes(some)
    report.bandwidth(timing, "swap_", moved)
    report.bandwidth(timing, "copy", 2 * sum(one.weight.numel() * one.weight.element_size() for one in some))
    name = common.dtype_name(dtype)
    report.ratio(f"swap_ of touch {name}", "", timing, "touch")
    report.ratio(f"swap_ over stock {name}", "", timing, "stock")
    report.ratio(f"swap_ over fuse {name}", f"r={some[0].lora_b.shape[1]}", timing, "fuse")


@pytest.mark.parametrize("rule", ["overwrite", "blend", "delta"])
@DTYPES
def bench_apply(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype, rule: str) -> None:
    """alpha 1 moves bits; alpha 0.5 blends with the base; delta adds."""
    some = layers(dtype)
    options = {"alpha": 1.0 if rule == "overwrite" else 0.5, "delta": rule == "delta"}

    def apply(weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
        shira.apply_(weight, indices, values, saved)
        return saved

    prove(some[0], apply)
    prove_arithmetic(some[0], **options)

    def run() -> None:
        for one in some:
            shira.apply_(one.weight, one.indices, one.values, one.saved, **options)

    timing = compare(benchmark, ("apply_", run), touch(some))
    timing.best("touch", list(TOUCH))
    report = Report(benchmark, threads, **about(some), **options)
    report.seconds(timing, len(some))
    report.bandwidth(timing, "apply_", common.switched_bytes(some))
    name = common.dtype_name(dtype)
    report.ratio(f"apply_ of touch {name}", rule, timing, "touch")


def prove_arithmetic(layer: Layer, alpha: float, delta: bool) -> None:
    weight, saved = layer.weight.clone(), layer.saved.clone()
    shira.apply_(weight, layer.indices, layer.values, saved, alpha=alpha, delta=delta)
    base, values = layer.weight.view(-1)[layer.indices64].float(), layer.values.float()
    mixed = values if alpha == 1 and not delta else base + alpha * (values if delta else values - base)
    expected = layer.weight.clone()
    expected.view(-1)[layer.indices64] = mixed.to(weight.dtype)
    assert torch.equal(weight, expected)


def bench_granule(benchmark: BenchmarkFixture, threads: int) -> None:
    """Runs of 32 consecutive bf16 weights, one cache line each: the same share of weights in far fewer lines."""
    some = layers(BF16, granule=32)

    def swap(weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        shira.swap_(weight, indices, values, 32)
        return values

    prove(some[0], swap)
    prove_fuse(some[0])
    run = sweep(shira.swap_, [(one.weight, one.indices, one.values, 32) for one in some])
    timing = compare(benchmark, ("swap_", run), {**touch(some), **stock(some), **fuse(some)})
    timing.best("touch", list(TOUCH))
    timing.best("stock", list(stock_ways(some[0])))
    report = Report(benchmark, threads, **about(some))
    report.seconds(timing, len(some))
    report.bandwidth(timing, "swap_", common.switched_bytes(some))
    report.ratio("granule 32 over fuse bf16", f"r={some[0].lora_b.shape[1]}", timing, "fuse")
    report.ratio("granule 32 of touch bf16", "", timing, "touch")
    report.ratio("granule 32 over stock bf16", "", timing, "stock")


@DTYPES
def bench_check(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype) -> None:
    """What reading and comparing the indices costs, beside a swap that does it too."""
    some = layers(dtype)
    for bad in (some[0].indices.flip(0), some[0].indices + some[0].weight.numel()):
        with pytest.raises(RuntimeError, match="must be strictly increasing"):
            shira.check_indices(bad, some[0].weight.numel())
    run = sweep(shira.check_indices, [(one.indices, one.weight.numel()) for one in some])
    swaps = sweep(shira.swap_, [(one.weight, one.indices, one.values) for one in some])
    timing = compare(benchmark, ("check_indices", run), {"swap_": swaps})
    report = Report(benchmark, threads, **about(some))
    report.seconds(timing, len(some))
    report.bandwidth(timing, "check_indices", sum(4 * one.indices.numel() for one in some))
    name = common.dtype_name(dtype)
    report.share(f"check share {name}", "", timing, "swap_")


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=common.dtype_name)
def bench_model(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype) -> None:
    """All layers in one foreach_ call, beside one call for each."""
    some = layers(dtype)
    lists = [[getattr(one, name) for one in some] for name in ("weight", "indices", "values")]
    one_by_one = sweep(shira.swap_, [(one.weight, one.indices, one.values) for one in some])
    before = [one.values.clone() for one in some]
    shira.foreach_swap_(*lists)
    one_by_one()
    assert all(torch.equal(a, one.values) for a, one in zip(before, some, strict=True))
    timing = compare(
        benchmark, ("foreach_swap_", lambda: shira.foreach_swap_(*lists)), {"swap_": one_by_one, **touch(some)}
    )
    timing.best("touch", list(TOUCH))
    report = Report(benchmark, threads, **about(some))
    report.seconds(timing, len(some))
    report.bandwidth(timing, "foreach_swap_", common.switched_bytes(some))
    name = common.dtype_name(dtype)
    report.ratio(f"foreach_swap_ of touch {name}", f"{settings.side} x {settings.side}", timing, "touch")


@pytest.mark.parametrize("masks", ["two masks", "one mask"])
@DTYPES
def bench_exchange(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype, masks: str) -> None:
    """One adapter for another: switch_ beside scatter_ (the revert) and apply_ one after the other."""
    some = layers(dtype)
    rng = np.random.default_rng(1)
    others = [
        one.indices if masks == "one mask" else random_indices(rng, one.weight.numel(), len(one.indices))
        for one in some
    ]
    spare = [torch.empty_like(one.saved) for one in some]
    arguments = [
        (one.weight, one.indices, one.saved, other, one.values, kept)
        for one, other, kept in zip(some, others, spare, strict=True)
    ]

    def two(*tensors: torch.Tensor) -> None:
        weight, indices_out, saved_out, indices_in, values, saved_in = tensors
        shira.scatter_(weight, indices_out, saved_out)
        shira.apply_(weight, indices_in, values, saved_in)

    results = []
    for way in (shira.switch_, two):
        weight, *rest, kept = (t.clone() for t in arguments[0])
        way(weight, *rest, kept)
        results.append((weight, kept))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    bound = touch(some) if masks == "one mask" else {}  # no switch_ between them writes fewer lines
    timing = compare(benchmark, ("switch_", sweep(shira.switch_, arguments)), {"two": sweep(two, arguments), **bound})
    report = Report(benchmark, threads, **about(some), masks=masks)
    report.seconds(timing, len(some))
    name = common.dtype_name(dtype)
    if masks == "two masks":
        report.ratio(f"switch_ over two {name}", "", timing, "two")
    else:
        timing.best("touch", list(TOUCH))
        report.ratio("switch_ over two, one mask", name, timing, "two")
        report.ratio("touch over two, one mask", name, timing, "two", of="touch")
        report.ratio("switch_ of touch, one mask", name, timing, "touch")
