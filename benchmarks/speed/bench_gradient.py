"""The weight gradient of a linear layer at a mask's entries, packing included; 4096 x 4096 where no shape is named.

dense   the whole gradient, grad_output.T @ input by torch's own GEMM in the same dtype, and then its entries
rows    the same in blocks of rows, so that the dense gradient is never in memory as a whole
rand    sampled_grad itself with a random mask of as many entries: masks of other kinds should not take longer
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.speed import common
from benchmarks.speed.common import BF16, FP32, Report, compare, random_indices, settings

shira = torch.ops.shira
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16], ids=common.dtype_name)
BLOCK = 512  # rows of a block: the fastest of 128, 256, 512 and 1024


class Problem:
    """Activations and their gradients, small integers: their products add up exactly, in any order."""

    def __init__(self, tokens: int, dtype: torch.dtype, shape: tuple[int, int] | None = None) -> None:
        generator = torch.Generator().manual_seed(tokens)
        self.shape = shape or (settings.side, settings.side)
        self.grad_output, self.input = (
            torch.randint(-4, 5, (tokens, n), generator=generator).to(dtype) for n in self.shape
        )

    def random_mask(self, density: float, granule: int = 1) -> torch.Tensor:
        limit = math.prod(self.shape) // granule
        return random_indices(np.random.default_rng(0), limit, max(1, round(density * limit)))

    def sampled(self, indices: torch.Tensor, granule: int = 1) -> Callable[[], torch.Tensor]:
        return lambda: shira.sampled_grad(self.grad_output, self.input, indices, granule)

    def dense(self, entries: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: (self.grad_output.T @ self.input).view(-1).index_select(0, entries)

    def rows(self, entries: torch.Tensor) -> Callable[[], torch.Tensor]:
        rows, columns = self.shape
        cuts = torch.searchsorted(entries, torch.arange(0, rows + BLOCK, BLOCK) * columns).tolist()
        parts = [entries[a:b] - i * BLOCK * columns for i, (a, b) in enumerate(itertools.pairwise(cuts))]

        def run() -> torch.Tensor:
            blocks = self.grad_output.T.split(BLOCK)
            return torch.cat(
                [(b @ self.input).view(-1).index_select(0, part) for b, part in zip(blocks, parts, strict=False)]
            )

        return run

    def prove(self, given: torch.Tensor, entries: torch.Tensor) -> None:
        """Some of the entries, compared with the exact sums in fp64."""
        some = torch.linspace(0, len(entries) - 1, min(len(entries), 1000)).long()
        rows, columns = entries[some] // self.shape[1], entries[some] % self.shape[1]
        wanted = (self.grad_output[:, rows].double() * self.input[:, columns].double()).sum(0)
        assert torch.equal(given[some], wanted.to(given.dtype))


def entries_of(indices: torch.Tensor, granule: int = 1) -> torch.Tensor:
    return (indices.long()[:, None] * granule + torch.arange(granule)).view(-1)


def struct_mask(rows: bool) -> torch.Tensor:
    """Every hundredth row or column, and the diagonal."""
    side = settings.side
    mask = torch.zeros(side, side, dtype=torch.bool)
    (mask if rows else mask.T)[::100] = True
    mask.fill_diagonal_(True)
    return mask.view(-1).nonzero().view(-1).to(torch.int32)


def beside_dense(
    benchmark: BenchmarkFixture, threads: int, problem: Problem, variant: str, rounds: int | None = None
) -> None:
    """A random 1 %, beside the dense gradient and a gather."""
    indices, dtype = problem.random_mask(0.01), common.dtype_name(problem.input.dtype)
    entries, tokens, (rows, columns) = entries_of(indices), len(problem.input), problem.shape
    op, dense = problem.sampled(indices), problem.dense(entries)
    problem.prove(op(), entries)
    torch.testing.assert_close(dense().float(), op(), rtol=2**-8, atol=0)  # bf16 rounds the dense gradient
    timing = compare(benchmark, ("sampled_grad", op), {"dense": dense}, rounds=rounds)
    report = Report(benchmark, threads, dtype=dtype, tokens=tokens, rows=rows, columns=columns, nnz=len(entries))
    report.seconds(timing)
    report.ratio(f"sampled_grad {dtype}", variant, timing, "dense")


@pytest.mark.parametrize("tokens", [512, 128])
@DTYPES
def bench_sampled_grad(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype, tokens: int) -> None:
    beside_dense(benchmark, threads, Problem(tokens, dtype), f"{tokens} tokens")


@pytest.mark.parametrize("shape", [(4096, 14336), (8192, 3072)], ids="{0[0]}x{0[1]}".format)
@DTYPES
def bench_widths(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Widths that are not powers of two: a down projection, and layers of a model that is 3072 wide."""
    rows, columns = (n * settings.side // 4096 for n in shape)
    problem = Problem(512, dtype, (rows, columns))
    beside_dense(benchmark, threads, problem, f"{shape[0]} x {shape[1]}, 512 tokens", settings.few(7))


@pytest.mark.parametrize("mask", ["granule 8", "granule 16", "granule 32", "rows", "columns"])
@DTYPES
def bench_masks(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype, mask: str) -> None:
    problem = Problem(512, dtype)
    granule = int(mask.partition(" ")[2] or 1)
    indices = problem.random_mask(0.01, granule) if granule > 1 else struct_mask(mask == "rows")
    entries = entries_of(indices, granule)
    op = problem.sampled(indices, granule)
    problem.prove(op(), entries)
    rand = problem.sampled(problem.random_mask(len(entries) / settings.side**2))
    timing = compare(benchmark, ("sampled_grad", op), {"rand": rand})
    report = Report(benchmark, threads, dtype=common.dtype_name(dtype), mask=mask, nnz=len(entries))
    report.seconds(timing)
    report.ratio(f"sampled_grad masks {common.dtype_name(dtype)}", mask, timing, "rand")


@pytest.mark.parametrize(
    "density", [0.01, 0.1, *(pytest.param(one, marks=pytest.mark.full) for one in (0.02, 0.05, 0.5))]
)
@DTYPES
def bench_density(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype, density: float) -> None:
    """At which density the dense product becomes faster."""
    problem = Problem(512, dtype)
    indices = problem.random_mask(density)
    entries = entries_of(indices)
    op, rows = problem.sampled(indices), problem.rows(entries)
    problem.prove(op(), entries)
    torch.testing.assert_close(rows().float(), op(), rtol=2**-8, atol=0)
    timing = compare(benchmark, ("sampled_grad", op), {"rows": rows})
    report = Report(benchmark, threads, dtype=common.dtype_name(dtype), density=density)
    report.seconds(timing)
    report.ratio(f"sampled_grad density {common.dtype_name(dtype)}", f"{density:.0%}", timing, "rows")
