"""The gradient family: the weight gradient of a linear layer at the selected entries alone."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import cases
from cases import FLOAT_DTYPES, GRANULES, TOLERANCE, Backend, Case, assert_same, build, run
from test_switch import id_of


def integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Small and not zero: sums are exact and no -0.0 arises, so any order of the sum gives the same bits."""
    return torch.from_numpy(rng.integers(1, 5, shape) * rng.choice((-1, 1), shape)).to(dtype)


def exact(case: Case, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    for name in ("grad_output", "input"):
        t = case.args[name]
        case.args[name] = integers(rng, t.shape, t.dtype)
    return case


@pytest.mark.subset
@pytest.mark.parametrize("granule", GRANULES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_exact_sums(backend: Backend, dtype: torch.dtype, granule: int | str) -> None:
    for i, setup in enumerate(cases.setups((0, 1, 7, 33, 64, 65), granule, dtype=dtype)):
        setup = replace(setup, index=cases.INDEX_DTYPES[i % 2])
        if setup.limit == 0:
            continue  # no weight: DESIGN has no layer without entries but the one below
        case = exact(build("sampled_grad", setup), i)
        assert_same(run(backend, case, offset=i % 3), run(cases.ORACLE, case))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_against_the_dense_gradient(backend: Backend, dtype: torch.dtype) -> None:
    """grad_output^T input at the indices, in fp64, within the rounding of a sum of 33 terms."""
    rng = np.random.default_rng(2)
    for rows, columns, granule in ((7, 24, 1), (16, 32, 8), (5, 9, 3)):
        grad_output, input = (cases.random_numbers(rng, 33 * n, dtype).view(33, n) for n in (rows, columns))
        limit = rows * columns // granule
        indices = cases.random_indices(rng, limit, limit // 2, torch.int64)
        args = {"grad_output": grad_output, "input": input, "indices": indices, "granule": granule}
        given = run(backend, Case("sampled_grad", args))["result"]
        wide = (grad_output.double().T @ input.double()).view(limit, granule)[indices].view(-1)
        size = (grad_output.double().abs().T @ input.double().abs()).view(limit, granule)[indices].view(-1)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        assert given.dtype == compute
        assert bool(((given.double() - wide).abs() <= TOLERANCE["sampled_grad", compute] * size).all())


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_leading_dimensions(backend: Backend, leading: tuple[int, ...]) -> None:
    """Any number of them; without a single row the gradient is zero."""
    rng = np.random.default_rng(3)
    grad_output, input = (integers(rng, (*leading, n), torch.bfloat16) for n in (6, 8))
    indices = torch.tensor([0, 1, 5])
    case = Case("sampled_grad", {"grad_output": grad_output, "input": input, "indices": indices, "granule": 8})
    given = run(backend, case)["result"]
    assert_same(given, run(cases.ORACLE, case)["result"])
    if 0 in leading:
        assert_same(given, torch.zeros(24))


def test_a_granule_may_span_rows(backend: Backend) -> None:
    """The granule divides the weight's entries, not necessarily a row's."""
    rng = np.random.default_rng(4)
    grad_output, input = (integers(rng, (9, n), torch.float32) for n in (4, 6))
    for granule in (8, 12, 24):
        indices = torch.arange(24 // granule)
        args = {"grad_output": grad_output, "input": input, "indices": indices, "granule": granule}
        assert_same(run(backend, Case("sampled_grad", args))["result"], (grad_output.T @ input).view(-1))


def test_not_finite_numbers_reach_the_result(backend: Backend) -> None:
    grad_output = torch.tensor([[1.0, float("inf"), float("nan"), 0.0]])
    input = torch.tensor([[2.0, 0.0]])
    args = {"grad_output": grad_output, "input": input, "indices": torch.arange(8)}
    given = run(backend, Case("sampled_grad", args))["result"]
    wanted = torch.tensor([2.0, 0.0, float("inf"), float("nan"), float("nan"), float("nan"), 0.0, 0.0])
    assert torch.equal(given.isnan(), wanted.isnan())
    assert torch.equal(given.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=id_of)
def test_sums_of_narrow_dtypes_are_kept_in_float32(backend: Backend, dtype: torch.dtype) -> None:
    """4096 ones: 4096 in fp32; a bf16 sum stops at 256, an fp16 sum at 2048."""
    ones = torch.ones(4096, 1, dtype=dtype)
    args = {"grad_output": ones, "input": ones, "indices": torch.tensor([0])}
    assert run(backend, Case("sampled_grad", args))["result"].tolist() == [4096.0]


@pytest.mark.usefixtures("threads")
def test_larger_than_a_block(backend: Backend) -> None:
    """Exact sums over shapes that blocks and vectors do not divide."""
    rng = np.random.default_rng(6)
    for tokens, rows, columns, granule in itertools.product((1, 65), (33, 100), (31, 129), (1,)):
        grad_output, input = (integers(rng, (tokens, n), torch.float32) for n in (rows, columns))
        indices = cases.random_indices(rng, rows * columns, rows * columns // 9, torch.int32)
        args = {"grad_output": grad_output, "input": input, "indices": indices, "granule": granule}
        assert_same(run(backend, Case("sampled_grad", args)), run(cases.ORACLE, Case("sampled_grad", args)))
