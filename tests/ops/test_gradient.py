"""The gradient family: the weight gradient of a linear layer at the selected entries alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import cases
import emul
from cases import FLOAT_DTYPES, GRANULES, TOLERANCE, Backend, Case, assert_same, build, integers, run
from shira import _codec
from test_switch import id_of


def of_width(width: str) -> Callable[[str], Callable[..., torch.Tensor]]:
    def sampled_grad(
        grad_output: torch.Tensor, input: torch.Tensor, indices: torch.Tensor, granule: int = 1
    ) -> torch.Tensor:
        return torch.ops.shira._sampled_grad.default(grad_output, input, indices, granule, width)

    return lambda op: sampled_grad


def sampled(**args: Any) -> torch.Tensor:
    """Triton's sampled way, otherwise taken only for masks sparser than those of these tests."""
    gradient = import_module("shira_ops.triton.gradient")
    with mock.patch.object(gradient, "DENSE_FROM", math.inf):
        return gradient.sampled_grad(**args)


WIDTHS = [Backend(width, "cpu", of_width(width), has="sampled_grad".__eq__) for width in _codec.widths()]


def compiled_sampled(backend: Backend) -> Callable[[str], Callable[..., torch.Tensor]]:
    """CUDA's sampled way, otherwise taken only for masks sparser than those of these tests."""

    def sampled_grad(
        grad_output: torch.Tensor, input: torch.Tensor, indices: torch.Tensor, granule: int = 1
    ) -> torch.Tensor:
        if backend is cases.EMULATOR:
            emul.library()
        namespace = torch.ops.shira_emul if backend is cases.EMULATOR else torch.ops.shira
        return namespace._sampled_grad.default(grad_output, input, indices, granule, "sampled")

    return lambda op: sampled_grad


def ways() -> Iterator[Backend]:
    for b in cases.BACKENDS:
        here = replace(b, name=f"{b.name}-sampled", has="sampled_grad".__eq__)
        if b.name == "triton":
            yield replace(here, find=lambda op: sampled)
        elif b is cases.EMULATOR or (
            b.name == "cuda" and torch._C._dispatch_has_kernel_for_dispatch_key("shira::_sampled_grad", "CUDA")
        ):
            yield replace(here, find=compiled_sampled(b))


WAYS = list(ways())


@pytest.fixture(params=[*cases.BACKENDS, *WAYS, *WIDTHS], ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend, and the CPU kernel in every vector width of this processor."""
    return request.param


def exact(case: Case, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    for name in ("grad_output", "input"):
        t = case.args[name]
        case.args[name] = integers(rng, t.shape, t.dtype)
    return case


def within(case: Case, given: torch.Tensor) -> bool:
    """The result is the dense gradient's entries in fp64, within the rounding of a sum of 33 terms."""
    x, y = case.args["grad_output"].double(), case.args["input"].double()
    places, granule = case.args["indices"].long(), case.args["granule"]
    wanted, size = (dense.view(-1, granule)[places].view(-1) for dense in (x.T @ y, x.abs().T @ y.abs()))
    return bool(((given.double() - wanted).abs() <= TOLERANCE["sampled_grad", given.dtype] * size).all())


@pytest.mark.subset
@pytest.mark.parametrize("granule", GRANULES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_exact_sums(backend: Backend, dtype: torch.dtype, granule: int | str) -> None:
    for i, setup in enumerate(cases.setups((0, 1, 7, 33, 64, 65), granule, dtype=dtype)):
        setup = replace(setup, index=cases.INDEX_DTYPES[i % 2])
        if setup.limit == 0:
            continue  # no weight: the only layer without entries is tested below
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
        case = Case("sampled_grad", args)
        given = run(backend, case)["result"]
        assert given.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert within(case, given)


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


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_more_tokens_than_are_turned_at_a_time(dtype: torch.dtype, way: Backend) -> None:
    """CUDA's sampled way takes 4096 tokens after another, and adds up the sums."""
    rng = np.random.default_rng(12)
    for tokens in (4097, 8192, 9001):
        grad_output, input = (integers(rng, (tokens, n), dtype) for n in (3, 4))
        args = {"grad_output": grad_output, "input": input, "indices": torch.tensor([0, 2, 5, 7, 11]), "granule": 1}
        assert_same(run(way, Case("sampled_grad", args)), run(cases.ORACLE, Case("sampled_grad", args)))


# CUDA's two ways


def emulated(how: str, *args: torch.Tensor) -> torch.Tensor:
    emul.library()
    return torch.ops.shira_emul._sampled_grad(*args, 1, how)


@pytest.mark.parametrize(
    ("dtype", "tokens", "least"),
    [(torch.bfloat16, 999, 9), (torch.bfloat16, 100, 20), (torch.float32, 999, 38), (torch.float32, 20, 22)],
    ids=str,
)
def test_the_density_decides(dtype: torch.dtype, tokens: int, least: int) -> None:
    """And the number of tokens: with few, the dense way still writes all its sums. Numbers whose sum depends on the
    order show which way was taken."""
    rng = np.random.default_rng(13)
    x, y = (cases.random_numbers(rng, tokens * n, dtype).view(tokens, n) for n in (40, 50))
    for count, how in ((least - 1, "sampled"), (least, "dense")):
        indices = cases.random_indices(rng, 2000, count, torch.int64)
        given = cases.EMULATOR("sampled_grad", grad_output=x, input=y, indices=indices)
        assert_same(given, emulated(how, x, y, indices))
        other = emulated("sampled" if how == "dense" else "dense", x, y, indices)
        assert not torch.equal(given, other)


def test_a_dense_product_comes_in_blocks_of_rows() -> None:
    """2^24 entries at a time, the last block smaller."""
    rng = np.random.default_rng(14)
    rows, columns = 9001, 4099
    x, y = integers(rng, (1, rows), torch.float32), integers(rng, (1, columns), torch.float32)
    indices = cases.random_indices(rng, rows * columns, 700, torch.int32)
    assert_same(emulated("dense", x, y, indices), (x[0][indices // columns] * y[0][indices % columns]))


def test_ways_are_named() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(RuntimeError, match="_sampled_grad: how must be sampled or dense, got fast"):
        emulated("fast", one, one, torch.tensor([0]))


# The CPU kernel


@pytest.fixture(params=WIDTHS, ids=lambda backend: backend.name)
def width(request: pytest.FixtureRequest) -> Backend:
    return request.param


def random_case(rng: np.random.Generator, shape: tuple[int, int, int], dtype: torch.dtype, granule: int = 1) -> Case:
    """Numbers of any size, at a third of the granules of (tokens, rows, columns)."""
    tokens, rows, columns = shape
    grad_output, input = (cases.random_numbers(rng, tokens * n, dtype).view(tokens, n) for n in (rows, columns))
    limit = rows * columns // granule
    indices = cases.random_indices(rng, limit, limit // 3, torch.int32)
    return Case("sampled_grad", {"grad_output": grad_output, "input": input, "indices": indices, "granule": granule})


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_blocks_of_tokens_rows_and_columns(width: Backend, dtype: torch.dtype) -> None:
    """Shapes around every size at which a loop ends: registers, packed blocks, tiles; sums of integers are exact."""
    rng = np.random.default_rng(7)
    shapes = [(tokens, 35, 50) for tokens in (1, 15, 16, 17, 31, 47, 300)]
    shapes += [(3, rows, columns) for rows, columns in ((1, 1), (1, 700), (700, 1), (4099, 9), (9, 4099), (15, 33))]
    shapes += [(129, 2049, 20), (33, 300, 8193)]  # several blocks of tokens deep; of rows; of columns
    for tokens, rows, columns in shapes:
        case = random_case(rng, (tokens, rows, columns), dtype, granule=next(g for g in (7, 3, 1) if columns % g == 0))
        case = exact(case, tokens)
        assert_same(run(width, case), run(cases.ORACLE, case))


@pytest.mark.parametrize("tokens", [1, 33, 200])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_rounding(width: Backend, dtype: torch.dtype, tokens: int) -> None:
    case = random_case(np.random.default_rng(8), (tokens, 40, 48), dtype, granule=4)
    assert within(case, run(width, case)["result"])


def test_the_measure_of_rounding_can_fail(width: Backend) -> None:
    """A sum that loses its last token, or one bit of bf16, is outside the bound."""
    case = random_case(np.random.default_rng(8), (33, 40, 48), torch.float32)
    given = run(width, case)["result"]
    assert not within(case, given * (1 + 2.0**-9))
    case.args["input"] = torch.cat([case.args["input"][:-1], torch.zeros(1, 48)])
    assert not within(case, given)


def test_subnormal_numbers_count(width: Backend) -> None:
    """Neither what goes in nor what comes out is flushed to zero."""
    for dtype, tiny in ((torch.float16, 2.0**-24), (torch.bfloat16, 2.0**-133), (torch.float32, 2.0**-149)):
        ones = torch.ones(3, 2, dtype=dtype)
        for x, y in ((ones * tiny, ones), (ones, ones * tiny)):
            args = {"grad_output": x, "input": y, "indices": torch.arange(4), "granule": 1}
            assert run(width, Case("sampled_grad", args))["result"].tolist() == [3 * tiny] * 4


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_bits_of_an_entry_depend_on_its_columns_alone(width: Backend, dtype: torch.dtype) -> None:
    """Not on the threads, the rest of the mask or the granule."""
    rng = np.random.default_rng(9)
    case = random_case(rng, (300, 136, 520), dtype)
    args = case.args
    everything = {**args, "indices": torch.arange(136 * 520 // 8), "granule": 8}
    torch.set_num_threads(1)
    dense = run(width, Case("sampled_grad", everything))["result"]
    wanted = {1: dense[args["indices"].long()], 8: dense.view(-1, 8)[::7].reshape(-1)}
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert_same(run(width, Case("sampled_grad", everything))["result"], dense)
        assert_same(run(width, case)["result"], wanted[1])
        eighth = {**everything, "indices": torch.arange(0, 136 * 520 // 8, 7, dtype=torch.int32)}
        assert_same(run(width, Case("sampled_grad", eighth))["result"], wanted[8])


@pytest.mark.usefixtures("threads")
def test_masks_that_crowd(width: Backend) -> None:
    """Rows, columns, a diagonal, one corner: threads divide by entries, and rows without one are skipped."""
    rng = np.random.default_rng(10)
    rows, columns = 300, 160
    place = torch.arange(rows * columns).view(rows, columns)
    masks = (place[7::100], place[:, 3::100], place.diagonal(), place[:2, :2], place[-1:, -1:], place[150:152])
    for mask in masks:
        case = exact(random_case(rng, (65, rows, columns), torch.bfloat16), 0)
        case.args["indices"] = mask.reshape(-1)
        assert_same(run(width, case), run(cases.ORACLE, case))


def test_widths_are_named() -> None:
    with pytest.raises(RuntimeError, match="_sampled_grad: width must be one that this processor has, got wide"):
        of_width("wide")("sampled_grad")(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([0]), 1)


def test_the_default_is_the_widest() -> None:
    case = random_case(np.random.default_rng(11), (100, 30, 40), torch.float32)
    assert_same(run(cases.DISPATCHER, case), run(WIDTHS[-1], case))
