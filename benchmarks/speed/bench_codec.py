"""Indices to bytes and back, from memory to memory: billions of indices per second on one core.

Beside it numpy's diff and cumsum on gaps that are stored as raw 16-bit numbers and never checked. Then both versions of
the code from 0.02 % to 5 %: how far they are from the entropy, and how fast they are read."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.speed import common
from benchmarks.speed.common import Report, Steps, compare, random_indices, settings, sweep

shira = torch.ops.shira
DENSITIES = pytest.mark.parametrize("density", [0.01, 0.02], ids=["1%", "2%"])
DTYPES = pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])


@functools.lru_cache(maxsize=1)
def masks(density: float, dtype: torch.dtype, side: int) -> list[torch.Tensor]:
    """Random masks of layers; small ones with `--quick`."""
    rng = np.random.default_rng(0)
    numel = side * side
    return [random_indices(rng, numel, round(density * numel)).to(dtype) for _ in range(12)]


@DTYPES
@DENSITIES
def bench_encode(benchmark: BenchmarkFixture, threads: int, density: float, dtype: torch.dtype) -> None:
    some = masks(density, dtype, settings.side)
    codes = prove(some)
    gaps(some)  # the gaps fit into 16 bits
    raw = sweep(raw_gaps, [(one.numpy(),) for one in some])
    run = sweep(shira.encode_indices, [(one,) for one in some])
    timing = compare(benchmark, ("encode_indices", run), {"diff": raw})
    describe(Report(benchmark, threads, density=density), timing, some, codes, "encode", threads)


@DTYPES
@DENSITIES
def bench_decode(benchmark: BenchmarkFixture, threads: int, density: float, dtype: torch.dtype) -> None:
    some = masks(density, dtype, settings.side)
    codes = prove(some)
    limit = settings.side**2
    run = sweep(shira.decode_indices, [(code, len(one), limit, dtype) for code, one in zip(codes, some, strict=True)])
    raw = sweep(functools.partial(np.cumsum, dtype=some[0].numpy().dtype), [(one,) for one in gaps(some)])
    timing = compare(benchmark, ("decode_indices", run), {"cumsum": raw})
    describe(Report(benchmark, threads, density=density), timing, some, codes, "decode", threads)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("density", [0.0002, 0.001, 0.01, 0.05], ids=["0.02%", "0.1%", "1%", "5%"])
def bench_versions(benchmark: BenchmarkFixture, threads: int, density: float, version: int) -> None:
    # As many indices at every density, so that all are read from the same caches.
    numel = round(0.01 / density * settings.side**2)
    some = [gapped(density, round(density * numel), seed) for seed in range(4)]
    limit = max(int(one[-1]) for one in some) + 1
    codes = [shira.encode_indices(one, version=version) for one in some]
    calls = [(code, len(one), limit, one.dtype) for code, one in zip(codes, some, strict=True)]
    for call, one in zip(calls, some, strict=True):
        assert torch.equal(shira.decode_indices(*call), one)
    encode = sweep(functools.partial(shira.encode_indices, version=version), [(one,) for one in some])
    # What the memory allows: the result alone, written by the fastest plain loop.
    fill = sweep(lambda one: torch.empty_like(one).fill_(1), [(one,) for one in some])
    decode = sweep(shira.decode_indices, calls)
    # The second of two finds everything in the caches.
    warm = Steps({"first": decode, "again": decode})
    ways = {"encode_indices": encode, "filling": fill, "both": warm}
    timing = compare(benchmark, ("decode_indices", decode), ways)
    report = Report(benchmark, threads, density=density, version=version)
    report.seconds(timing, len(some))
    count = sum(map(len, some))
    bits = 8 * sum(code.nbytes for code in codes) / count
    entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) / density
    report.info["bits_an_index"] = bits
    variant = f"{density:.2%}"
    report.result(f"code {version} over entropy", variant, [bits / entropy], bits / entropy)
    for name in ("encode", "decode"):
        rates = [count / sample / threads / 1e9 for sample in timing.of(f"{name}_indices")]
        report.result(f"{name} {version}", variant, rates, max(rates))
    report.ratio(f"decode {version} of filling", variant, timing, "filling")
    rates = [count / sample / threads / 1e9 for sample in timing.of("both: again")]
    report.result(f"decode {version}, warm", variant, rates, max(rates))


def gapped(density: float, count: int, seed: int) -> torch.Tensor:
    """Indices of entries that are chosen independently, without a draw for every entry of a large weight."""
    gaps = np.random.default_rng(seed).geometric(density, count)
    return torch.from_numpy((np.cumsum(gaps) - 1).astype(np.int32))


def raw_gaps(indices: np.ndarray) -> np.ndarray:
    return np.diff(indices, prepend=0).astype(np.uint16)


def gaps(some: list[torch.Tensor]) -> list[np.ndarray]:
    found = [raw_gaps(one.numpy()) for one in some]
    for one, gap in zip(some, found, strict=True):
        assert np.array_equal(np.cumsum(gap, dtype=np.int64), one.numpy())
    return found


def prove(some: list[torch.Tensor]) -> list[torch.Tensor]:
    codes = [shira.encode_indices(one) for one in some]
    for one, code in zip(some, codes, strict=True):
        assert torch.equal(shira.decode_indices(code, len(one), settings.side**2, one.dtype), one)
    return codes


def describe(
    report: Report,
    timing: common.Timing,
    some: list[torch.Tensor],
    codes: list[torch.Tensor],
    line: str,
    threads: int,
) -> None:
    report.seconds(timing, len(some))
    count = sum(map(len, some))
    moved = sum(one.nbytes + code.nbytes for one, code in zip(some, codes, strict=True))
    report.bandwidth(timing, timing.subject, moved)
    report.info["bits_an_index"] = 8 * sum(code.nbytes for code in codes) / count
    dtype = str(some[0].dtype).removeprefix("torch.")
    rates = [count / sample / threads / 1e9 for sample in timing.of(timing.subject)]
    variant = f"{report.info['density']:.0%} {dtype}"
    report.result(line, variant, rates, max(rates))
    other = {"encode": "diff", "decode": "cumsum"}[line]
    report.ratio(f"{line} over {other}", variant, timing, other)
