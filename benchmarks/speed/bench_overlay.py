"""Adapters laid over a layer of 4096 x 4096 that is not written, beside unmerged LoRA of equal parameters; 1 % each.

LoRA     its two products of rank 20, the second fused into the addition: `output.addmm_(input @ a.T, b.T)`
layer    the layer's own product
stream   the indices and values read once, as fast as a plain loop can
call     the op with as good as no entries: what a call costs. No kernel is faster than call and stream together
bound    the multiply-adds of all entries with the packed tokens, and nothing else: no packing, no checks, no output.
         Granules take their columns together, so these stay in registers; single entries have to load each its own.
         `call` with as many tokens is what reading, packing and writing them costs: the rest of an op's time, nearly
mixed    PEFT's LoRA with `adapter_names`: 32 adapters, one token each; its base layer is not computed, here as there
switch   from one adapter to another in the weight: what an overlay saves, and after how many tokens it no longer does

With 128 tokens `call` and `bound` are together nearly the whole op, and longer than LoRA's products may be (1.2 times
these in fp32 with granule 16, 2.2 with single entries). Less would need packing, multiplying and writing at once; but
even on input and output that are in the cache already, the op takes nine tenths of its time. Tried with granule 16, and
no faster: fetching input and output ahead into the second-level cache; writing 16 tokens beside the columns of the next
16; 32 or 64 tokens at a time; all values sorted beforehand; groups of 4, 12, 16 or 24 granules. Single entries load 1.3
million lines of packed tokens from the second-level cache, one in about two cycles: fetching 8, 16 or 32 entries ahead
is slower, 2 or 8 sums for an output and 16 or 128 tokens at a time are no faster; bfloat16 in pairs halves the lines.
In bf16 the layer runs on AMX here: 6 % of its time is what the multiply-adds of 128 tokens take alone.

Of 32 adapters with a token each, `stream` is the bound: with granule 16 in fp32 it alone is longer than `mixed` may be.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.speed import common, heap
from benchmarks.speed.common import BF16, FP32, Report, compare, lora_rank, random_indices, settings

shira, machine = torch.ops.shira, torch.ops.shira_bench
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16], ids=common.dtype_name)
GRANULES = pytest.mark.parametrize("granule", [16, 1])
ADAPTERS, ALPHA = 32, 0.5


class Adapters:
    """Masks with values, and LoRA's factors, of as many parameters each. Small integers: all sums are exact."""

    def __init__(self, dtype: torch.dtype, granule: int, count: int = 1) -> None:
        side, rank = settings.side, lora_rank()
        rng, self.granule = np.random.default_rng(granule), granule
        limit = side * side // granule
        entries = max(32, limit // 100 // 32 * 32)  # whole lines of the cache, which `machine.read` asks for
        self.indices = [random_indices(rng, limit, entries).clone() for _ in range(count)]
        self.random = torch.Generator().manual_seed(granule)
        self.values = [self.numbers(len(one) * granule, dtype=dtype) for one in self.indices]
        self.a = [self.numbers(rank, side, dtype=dtype) for _ in range(count)]
        self.b = [self.numbers(side, rank, dtype=dtype) for _ in range(count)]
        self.alphas = torch.full((count,), ALPHA)

    def numbers(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=self.random).to(dtype)

    def first_granule(self) -> Adapters:
        """The first granule of the first adapter, and nothing else."""
        few = copy.copy(self)
        few.indices = [self.indices[0][:1].clone()]
        few.values = [self.values[0][: self.granule].clone()]
        return few

    def nbytes(self) -> int:
        return sum(one.nbytes for one in (*self.indices, *self.values))

    def lora_nbytes(self) -> int:
        return sum(one.nbytes for one in (*self.a, *self.b))


@dataclass
class Batch:
    """Tokens in and out, and the adapter that each names."""

    input: torch.Tensor
    output: torch.Tensor
    named: torch.Tensor

    @classmethod
    def of(cls, adapters: Adapters, tokens: int, dtype: torch.dtype, named: torch.Tensor) -> Batch:
        input, output = (adapters.numbers(tokens, settings.side, dtype=dtype) for _ in range(2))
        return cls(input, output, named.to(torch.int32))

    def overlay(self, adapters: Adapters) -> None:
        shira.sparse_linear_add_(
            self.output,
            self.input,
            adapters.indices,
            adapters.values,
            self.named,
            adapters.alphas,
            granule=adapters.granule,
        )

    def prove(self, adapters: Adapters) -> None:
        """Exact against dense products in fp64, for some of the outputs."""
        own = copy.deepcopy(self)
        own.overlay(adapters)
        some = torch.arange(0, settings.side, max(1, settings.side // 64))
        for k in self.named.unique().tolist():
            dense = torch.zeros(settings.side**2 // adapters.granule, adapters.granule, dtype=torch.float64)
            dense[adapters.indices[k].long()] = adapters.values[k].double().view(-1, adapters.granule)
            rows, weight = self.named == k, dense.view(settings.side, settings.side)[some]
            wanted = self.output[rows][:, some].double() + ALPHA * (self.input[rows].double() @ weight.T)
            assert torch.equal(own.output[rows][:, some], wanted.to(self.output.dtype))


def multiply_adds(adapters: Adapters, tokens: int) -> Callable[[], None]:
    """The bound of the first adapter."""
    depth, side = 32, settings.side  # as many tokens as `machine.products` takes at a time
    packed, values = torch.ones(side, depth), adapters.values[0].float()
    columns = adapters.indices[0] % side if adapters.granule == 1 else torch.empty(0, dtype=torch.int32)
    return lambda: machine.products(packed, columns, values, tokens // depth)


@pytest.mark.parametrize("tokens", [1, 8, 128, *(pytest.param(one, marks=pytest.mark.full) for one in (16, 64, 512))])
@GRANULES
@DTYPES
def bench_overlay(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype, granule: int, tokens: int) -> None:
    adapters = Adapters(dtype, granule)
    batch = Batch.of(adapters, tokens, dtype, torch.zeros(tokens))
    batch.prove(adapters)
    weight = adapters.numbers(settings.side, settings.side, dtype=dtype)
    layer = torch.empty_like(batch.output)

    def lora() -> None:
        batch.output.addmm_(batch.input @ adapters.a[0].T, adapters.b[0].T, alpha=ALPHA)

    def stream() -> None:
        for one in (adapters.indices[0], adapters.values[0]):
            machine.read(one, False)

    name = common.dtype_name(dtype)
    op = "sparse_linear_add_"
    ways = {"LoRA": lora, "layer": lambda: torch.mm(batch.input, weight.T, out=layer), "stream": stream}
    few = adapters.first_granule()
    ways["call"] = lambda: batch.overlay(few)
    if tokens == 128:
        ways["bound"] = multiply_adds(adapters, tokens)
    # Warm, as a layer's adapter is in the loop over one batch's tokens; LoRA's factors are as large.
    timing = compare(benchmark, (op, lambda: batch.overlay(adapters)), ways, cold=False)
    report = Report(benchmark, threads, dtype=name, tokens=tokens, granule=granule, side=settings.side)
    report.seconds(timing)
    report.bandwidth(timing, op, adapters.nbytes() + batch.input.nbytes + 2 * batch.output.nbytes)
    variant = f"{tokens} tokens"
    if tokens == 128:
        report.ratio(f"overlay of LoRA {name}, granule {granule}", variant, timing, op, "LoRA")
        report.ratio("overlay, bound of LoRA", f"{name}, granule {granule}, {variant}", timing, "bound", "LoRA")
        least = [a + b for a, b in zip(timing.of("call"), timing.of("bound"), strict=True)]
        timing.samples["call and bound"] = least
        report.ratio("overlay, call and bound of LoRA", f"{name}, granule {granule}", timing, "call and bound", "LoRA")
    else:
        report.ratio("overlay of LoRA, other batches", f"{name}, granule {granule}, {variant}", timing, op, "LoRA")
    if tokens == 1:
        report.ratio("overlay of stream", f"{name}, granule {granule}", timing, op, "stream")
        least = [a + b for a, b in zip(timing.of("call"), timing.of("stream"), strict=True)]
        timing.samples["call and stream"] = least
        report.ratio("overlay, bound of stream", f"{name}, granule {granule}", timing, "call and stream", "stream")
    report.share("overlay of layer", f"{name}, granule {granule}, {variant}", timing, "layer")


class Given(torch.nn.Linear):
    """A layer whose output is there already: what adapters cost alone."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.output


def peft_layer(adapters: Adapters, batch: Batch) -> Any:
    """PEFT's layer over `Given`, with LoRA's factors as its adapters."""
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(Given(settings.side, settings.side, bias=False, dtype=batch.input.dtype))
    model[0].output = batch.output.clone()
    config = peft.LoraConfig(r=lora_rank(), lora_alpha=ALPHA * lora_rank(), target_modules=["0"])
    made = peft.get_peft_model(model, config, adapter_name="0", autocast_adapter_dtype=False)
    for k in range(1, len(adapters.indices)):
        made.add_adapter(str(k), config)
    layer = made.base_model.model[0]
    for k in range(len(adapters.indices)):
        layer.lora_A[str(k)].weight = torch.nn.Parameter(adapters.a[k], requires_grad=False)
        layer.lora_B[str(k)].weight = torch.nn.Parameter(adapters.b[k], requires_grad=False)
    return layer.eval()


def peak(way: str, dtype: torch.dtype, granule: int) -> int:
    """Bytes of a way's adapters and of what its calls need at their peak."""
    adapters = Adapters(dtype, granule, ADAPTERS)
    batch = Batch.of(adapters, ADAPTERS, dtype, torch.arange(ADAPTERS))
    layer, names = peft_layer(adapters, batch), [str(k) for k in range(ADAPTERS)]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = heap.resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is recorded anew
    with torch.no_grad():
        for _ in range(3):
            if way == "mixed":
                layer(batch.input, adapter_names=names)
            else:
                batch.overlay(adapters)
    own = adapters.lora_nbytes() if way == "mixed" else adapters.nbytes()
    return own + heap.resident("VmHWM") - before


@functools.cache
def peak_alone(way: str, dtype: torch.dtype, granule: int) -> int:
    """In a process of its own, since memory that others have freed would not count again."""
    if settings.quick:
        return peak(way, dtype, granule)
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        return pool.submit(peak, way, dtype, granule).result()


@GRANULES
@DTYPES
def bench_mixed(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype, granule: int) -> None:
    adapters = Adapters(dtype, granule, ADAPTERS)
    batch = Batch.of(adapters, ADAPTERS, dtype, torch.arange(ADAPTERS))
    batch.prove(adapters)
    layer, names = peft_layer(adapters, batch), [str(k) for k in range(ADAPTERS)]
    factors = ((a.double(), b.double()) for a, b in zip(adapters.a, adapters.b, strict=True))
    wanted = [x.double() @ a.T @ b.T * ALPHA for x, (a, b) in zip(batch.input, factors, strict=True)]
    with torch.no_grad():
        given = layer(batch.input, adapter_names=names)
        torch.testing.assert_close(given.double(), batch.output.double() + torch.stack(wanted), rtol=2**-5, atol=4)

        def mixed() -> None:
            layer(batch.input, adapter_names=names)

        def stream() -> None:
            for one in (*adapters.indices, *adapters.values):
                machine.read(one, False)

        timing = compare(
            benchmark,
            ("sparse_linear_add_", lambda: batch.overlay(adapters)),
            {"mixed": mixed, "stream": stream},
            cold=False,
        )
    name = common.dtype_name(dtype)
    memory = {way: peak_alone(way, dtype, granule) for way in ("sparse_linear_add_", "mixed")}
    about = {"granule": granule, "adapters": ADAPTERS, "side": settings.side, "peak_bytes": memory}
    report = Report(benchmark, threads, dtype=name, **about)
    report.seconds(timing)
    report.bandwidth(timing, "sparse_linear_add_", adapters.nbytes())
    share = memory["sparse_linear_add_"] / memory["mixed"]
    report.result("mixed overlay: memory over mixed", f"{name}, granule {granule}", [share], share)
    report.ratio(f"overlay over mixed, granule {granule}", name, timing, "mixed")
    report.ratio("mixed overlay of stream", f"{name}, granule {granule}", timing, "sparse_linear_add_", "stream")
    report.ratio("mixed overlay, bound", f"{name}, granule {granule}", timing, "mixed", "stream")


@pytest.mark.parametrize("tokens", [1, 64, pytest.param(512, marks=pytest.mark.full)])
@GRANULES
@DTYPES
def bench_break_even(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype, granule: int, tokens: int) -> None:
    adapters = Adapters(dtype, granule, 2)
    batch = Batch.of(adapters, tokens, dtype, torch.zeros(tokens))
    batch.prove(adapters)
    weight = adapters.numbers(settings.side, settings.side, dtype=dtype)
    before, saved = weight.clone(), [torch.empty_like(one) for one in adapters.values]
    shira.apply_(weight, adapters.indices[0], adapters.values[0], saved[0], granule=granule)

    def switch(out: int = 0, into: int = 1) -> None:
        entries = adapters.indices[out], saved[out], adapters.indices[into], adapters.values[into], saved[into]
        shira.switch_(weight, *entries, granule=granule)

    switch()
    switch(1, 0)
    own = weight.clone()
    shira.scatter_(own, adapters.indices[0], saved[0], granule=granule)
    assert torch.equal(own, before)

    turn = [(0, 1), (1, 0)]

    def back_and_forth() -> None:
        switch(*turn[0])
        turn.reverse()

    timing = compare(benchmark, ("sparse_linear_add_", lambda: batch.overlay(adapters)), {"switch": back_and_forth})
    name = common.dtype_name(dtype)
    report = Report(benchmark, threads, dtype=name, tokens=tokens, granule=granule, side=settings.side)
    report.seconds(timing)
    pairs = zip(timing.of("switch"), timing.of("sparse_linear_add_"), strict=True)
    found = [tokens * moved / laid for moved, laid in pairs]
    best = tokens * min(timing.of("switch")) / min(timing.of("sparse_linear_add_"))
    report.result("break-even", f"{name}, granule {granule}, {tokens} at a time", found, best)
