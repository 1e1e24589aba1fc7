"""The overlay family: products with sparse matrices beside a weight that is never written."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import cases
import shira_ops
from cases import FLOAT_DTYPES, GRANULES, TOLERANCE, Backend, Case, assert_same, build, integers, run
from shira import _codec
from test_switch import id_of

# torch's own: what it decomposes for forward mode, and what it imports to compile, is scripted on first use.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

ADD, LINEAR = "sparse_linear_add_", "sparse_linear"


def of_width(width: str) -> Callable[[str], Callable[..., torch.Tensor]]:
    def sparse_linear(
        input: torch.Tensor,
        indices: torch.Tensor,
        values: torch.Tensor,
        out_features: int,
        transposed: bool = False,
        granule: int = 1,
    ) -> torch.Tensor:
        op = torch.ops.shira._sparse_linear.default
        return op(input, indices, values, out_features, transposed, granule, width)

    return lambda op: sparse_linear


WIDTHS = [Backend(width, "cpu", of_width(width), has=LINEAR.__eq__) for width in _codec.widths()]


@pytest.fixture(params=[*cases.BACKENDS, *WIDTHS], ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend, and the CPU kernel in every vector width of this processor."""
    return request.param


@pytest.fixture(params=WIDTHS, ids=lambda backend: backend.name)
def width(request: pytest.FixtureRequest) -> Backend:
    return request.param


def case_of(
    rng: np.random.Generator,
    tokens: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    granule: int = 1,
    transposed: bool = False,
    exact: bool = True,
    share: int = 4,
) -> Case:
    """Tokens times a matrix of this shape, as it is multiplied, of which one granule in `share` is there."""
    out_features, features = shape
    numbers = integers if exact else lambda rng, n, dtype: cases.random_numbers(rng, math.prod(n), dtype).view(n)
    limit = out_features * features // granule
    indices = cases.random_indices(rng, limit, limit // share, torch.int32)
    return Case(
        LINEAR,
        {
            "input": numbers(rng, (tokens, features), dtype),
            "indices": indices,
            "values": numbers(rng, (len(indices) * granule,), dtype),
            "out_features": out_features,
            "transposed": transposed,
            "granule": granule,
        },
    )


# One matrix


@pytest.mark.subset
@pytest.mark.parametrize("granule", GRANULES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_exact_sums(backend: Backend, dtype: torch.dtype, granule: int | str) -> None:
    for i, setup in enumerate(cases.setups((0, 1, 7, 33, 64), granule, dtype=dtype)):
        setup = replace(setup, index=cases.INDEX_DTYPES[i % 2], values=torch.float32 if i % 3 else dtype)
        case = build(LINEAR, setup)
        assert_same(run(backend, case, offset=i % 3), run(cases.ORACLE, case))


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=id_of)
def test_any_number_of_tokens(backend: Backend, dtype: torch.dtype, transposed: bool) -> None:
    """Alone, few and packed, in whole registers and beyond; with granules that fill registers and others."""
    rng = np.random.default_rng(0)
    for tokens, granule in itertools.product((1, 2, 4, 5, 9, 17), (1, 3, 16)):
        case = case_of(rng, tokens, (48, 96) if granule == 16 else (70, 33), dtype, granule, transposed)
        assert_same(run(backend, case), run(cases.ORACLE, case))


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_blocks_of_tokens_and_rows(width: Backend, transposed: bool) -> None:
    """Shapes around every size at which a loop ends, in every number of registers side by side."""
    rng = np.random.default_rng(1)
    shapes = [(tokens, 35, 50) for tokens in (15, 16, 31, 33, 64, 65, 127, 128, 129, 300)]
    shapes += [(3, 1, 1), (3, 1, 700), (3, 700, 1), (2, 63, 64), (2, 64, 65), (2, 65, 129), (1, 200, 300)]
    for tokens, out_features, features in shapes:
        for dtype in (torch.float32, torch.float64):
            case = case_of(rng, tokens, (out_features, features), dtype, transposed=transposed)
            assert_same(run(width, case), run(cases.ORACLE, case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=id_of)
def test_granules_by_column(width: Backend, dtype: torch.dtype) -> None:
    """Columns are packed in whole granules and whole registers, as far as both fit; rows end within a group of them."""
    rng = np.random.default_rng(18)
    for granule, tokens in ((8, 5), (16, 33), (24, 40), (40, 17), (80, 9), (240, 7)):
        case = case_of(rng, tokens, (150, 240), dtype, granule)
        assert_same(run(width, case), run(cases.ORACLE, case))


def test_pairs_of_tokens(width: Backend) -> None:
    """Two tokens of bfloat16 share 32 bits: every bit of each arrives, in every number of registers."""
    rng = np.random.default_rng(19)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    for tokens in (17, 32, 40, 64, 100, 130):
        some = torch.from_numpy(rng.permutation(1 << 16)[: tokens * 37].astype(np.int64))
        input = every[some].view(tokens, 37).clone()
        indices = torch.arange(0, 37 * 37, 38, dtype=torch.int32)  # the identity
        args = {"input": input, "indices": indices, "values": torch.ones(37, dtype=torch.bfloat16), "out_features": 37}
        wanted = torch.where(input.isnan(), torch.tensor(float("nan"), dtype=torch.bfloat16), input + 0.0)
        assert_same(run(width, Case(LINEAR, args))["result"], wanted)


def within(case: Case, given: torch.Tensor) -> bool:
    """The product in fp64, within the rounding of the sum and the one of the result."""
    a = case.args
    shape = (a["out_features"], a["input"].shape[-1])
    dense = torch.zeros(math.prod(shape), dtype=torch.float64).view(-1, a["granule"])
    dense[a["indices"].long()] = a["values"].double().view(-1, a["granule"])
    dense = dense.view(shape[::-1]).T if a["transposed"] else dense.view(shape)
    wanted, size = (x.double() @ d.T for x, d in ((a["input"], dense), (a["input"].abs(), dense.abs())))
    dtype = given.dtype
    sums = TOLERANCE[LINEAR, torch.float64 if dtype == torch.float64 else torch.float32] * size
    return bool(((given.double() - wanted).abs() <= sums + torch.finfo(dtype).eps / 2 * (wanted.abs() + sums)).all())


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=id_of)
def test_rounding(backend: Backend, dtype: torch.dtype, transposed: bool) -> None:
    """Sums of narrow dtypes are kept in fp32, and rounded once."""
    rng = np.random.default_rng(2)
    for tokens, granule in ((1, 1), (1, 16), (20, 1), (9, 16)):
        case = case_of(rng, tokens, (32, 64), dtype, granule, transposed, exact=False)
        assert within(case, run(backend, case)["result"])


def test_the_measure_of_rounding_can_fail() -> None:
    case = case_of(np.random.default_rng(3), 5, (16, 32), torch.float32, exact=False)
    given = run(cases.DISPATCHER, case)["result"]
    assert within(case, given)
    assert not within(case, given * (1 + 2.0**-9))
    case.args["values"] = case.args["values"].clone()
    case.args["values"][7] = 0
    assert not within(case, given)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0)], ids=str)
def test_leading_dimensions(backend: Backend, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(4)
    case = case_of(rng, math.prod(shape), (6, 8), torch.bfloat16, granule=2)
    case.args["input"] = case.args["input"].view(*shape, 8)
    given = run(backend, case)["result"]
    assert given.shape == (*shape, 6)
    assert_same(given, run(cases.ORACLE, case)["result"])


def test_nothing_in_and_nothing_out(backend: Backend) -> None:
    """A layer without inputs gives zeros; one without outputs nothing; and so does an empty mask."""
    none = torch.zeros(0, dtype=torch.int64)
    for input, out_features in ((torch.ones(3, 0), 4), (torch.ones(3, 4), 0), (torch.ones(20, 5), 7)):
        args = {"input": input, "indices": none, "values": torch.zeros(0), "out_features": out_features}
        for transposed in (False, True):
            given = run(backend, Case(LINEAR, {**args, "transposed": transposed}))["result"]
            assert_same(given, torch.zeros(len(input), out_features))


def test_a_granule_may_span_rows(backend: Backend) -> None:
    """The granule divides the matrix's entries, not necessarily a row's."""
    rng = np.random.default_rng(5)
    for granule, transposed, tokens in itertools.product((8, 12, 24, 48), (False, True), (1, 9)):
        case = case_of(rng, tokens, (8, 6), torch.float32, granule, transposed, share=2)
        assert_same(run(backend, case), run(cases.ORACLE, case))


def test_more_entries_than_32_bits_count(backend: Backend) -> None:
    """Of the matrix, which nothing holds."""
    rows, columns = 2**11 + 1, 2**20
    input = torch.arange(columns).remainder(7).half()[None]
    args = {
        "input": input,
        "indices": torch.tensor([1, 2**31 - 1, 2**31 + 5]),
        "values": torch.tensor([1.0, 2.0, 3.0]).half(),
        "out_features": rows,
        "transposed": False,
        "granule": 1,
    }
    wanted = torch.zeros(1, rows).half()
    wanted[0, 0], wanted[0, -2], wanted[0, -1] = input[0, 1], 2 * input[0, -1], 3 * input[0, 5]
    assert_same(backend("sparse_linear", **args), wanted)


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_what_is_not_there_is_not_multiplied(backend: Backend, tokens: int) -> None:
    """An infinity meets the entries of its column alone; NaN comes out as the canonical one."""
    input = torch.ones(tokens, 16)
    input[0, 3] = float("inf")
    input[0, 5] = torch.tensor(0x7FC12345, dtype=torch.int32).view(torch.float32)
    indices = torch.tensor([0, 16 + 3, 32 + 5])  # in rows 0, 1 and 2
    args = {"input": input, "indices": indices, "values": torch.tensor([2.0, 0.5, 1.0]), "out_features": 4}
    given = run(backend, Case(LINEAR, args))["result"]
    nan = torch.tensor(0x7FC00000, dtype=torch.int32).view(torch.float32)
    assert_same(given[0], torch.stack([torch.tensor(2.0), torch.tensor(float("inf")), nan, torch.tensor(0.0)]))
    assert_same(given[1:], torch.tensor([2.0, 0.5, 1.0, 0.0]).expand(tokens - 1, 4).contiguous())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("granule", [1, 16])
def test_any_number_of_threads_gives_the_same_bits(width: Backend, granule: int, transposed: bool) -> None:
    """For numbers whose sums depend on the order."""
    rng = np.random.default_rng(6)
    for tokens in (1, 3, 5, 200):
        case = case_of(rng, tokens, (160, 1024), torch.float32, granule, transposed, exact=False)
        torch.set_num_threads(1)
        wanted = run(width, case)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert_same(run(width, case), wanted)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("granule", [1, 3])
def test_a_token_does_not_depend_on_the_others(width: Backend, granule: int, transposed: bool) -> None:
    """With granules that do not fill registers, the same bits alone or in any company; with single entries in any
    company of at least five, since up to four tokens are summed across lanes."""
    case = case_of(np.random.default_rng(7), 150, (60, 96), torch.bfloat16, granule, transposed, exact=False)
    together = run(width, case)["result"]
    for begin, end in ((0, 1), (149, 150), (3, 5), (3, 8), (20, 90)):
        if granule == 1 and not transposed and end - begin < 5:
            continue
        part = Case(LINEAR, {**case.args, "input": case.args["input"][begin:end].clone()})
        assert_same(run(width, part)["result"], together[begin:end])


@pytest.mark.parametrize("index", cases.INDEX_DTYPES, ids=id_of)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_single_entries_across_lanes(width: Backend, dtype: torch.dtype, index: torch.dtype) -> None:
    """Rows of every length around those of registers, empty ones, and entries that end with their tensors; what lies
    beside a row's entries, in registers, is not multiplied."""
    rng = np.random.default_rng(17)
    lists = [[0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 0, 0], [3], [40] * 9, [0] * 9 + [16], [1] * 20, [0, 0], [16] * 10]
    for lengths in (
        *lists,
        [*range(9, 35)],
        [*range(35, 9, -1), 0],
        *(rng.integers(0, most, 90).tolist() for most in (40, 9, 4, 2)),
    ):
        columns = 40
        chosen = [row * columns + np.sort(rng.permutation(columns)[:n]) for row, n in enumerate(lengths)]
        indices = torch.from_numpy(np.concatenate(chosen).astype(np.int64)).to(index)
        values = integers(rng, (len(indices),), dtype)
        if len(indices) > 1 and lengths[-1] > 0:
            values[-1] = float("inf")
        args = {"indices": indices, "values": values, "out_features": len(lengths)}
        for tokens in (1, 4):
            case = Case(LINEAR, {"input": integers(rng, (tokens, columns), dtype).abs() + 1, **args})
            assert_same(run(width, case), run(cases.ORACLE, case))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("index", cases.INDEX_DTYPES, ids=id_of)
def test_few_tokens_find_every_index_out_of_order(width: Backend, index: torch.dtype) -> None:
    """With few tokens, single entries are checked while they are multiplied: by registers and one by one."""
    rng = np.random.default_rng(18)
    for rows, columns, count, step, threads in ((9, 40, 70, 3, 1), (3, 7, 9, 1, 1), (100, 1000, 40_000, 9999, 2)):
        torch.set_num_threads(threads)
        limit = rows * columns
        indices = cases.random_indices(rng, limit, count, index)
        args = {"values": integers(rng, (count,), torch.float32), "out_features": rows}
        case = Case(LINEAR, {"input": integers(rng, (1, columns), torch.float32), "indices": indices, **args})
        assert_same(run(width, case), run(cases.ORACLE, case))
        for at in {*range(0, count, step), count // 2, count - 1}:
            own, before, after = (int(indices[min(max(0, k), count - 1)]) for k in (at, at - 1, at + 1))
            others = [-1, limit, limit - 1, before - 1, after + 1, own + columns, own - columns, 2**31 - 1, -(2**31)]
            others += [own + 2**32, own - 2**32] if index == torch.int64 else []
            for other in (before, after, *others):
                bad = indices.clone()
                bad[at] = other
                if bad.min() >= 0 and bad.max() < limit and bool((bad.diff() > 0).all()):
                    continue
                with pytest.raises(RuntimeError, match="sparse_linear: indices must be strictly increasing"):
                    run(width, Case(LINEAR, {**case.args, "indices": bad}))


def test_widths_are_named() -> None:
    with pytest.raises(RuntimeError, match="_sparse_linear: width must be one that this processor has, got wide"):
        of_width("wide")(LINEAR)(torch.ones(1, 1), torch.tensor([0]), torch.ones(1), 1)


def test_the_default_is_the_widest() -> None:
    case = case_of(np.random.default_rng(8), 1, (32, 512), torch.float32, 16, exact=False)
    assert_same(run(cases.DISPATCHER, case), run(WIDTHS[-1], case))


# Many adapters


def adapters_of(
    rng: np.random.Generator,
    named: list[int],
    shape: tuple[int, int],
    dtype: torch.dtype,
    granule: int = 1,
    transposed: bool = False,
    count: int = 3,
) -> Case:
    """As many tokens as are named, and `count` adapters of a matrix of this shape."""
    some = [case_of(rng, 1, shape, dtype, granule, transposed, share=3 + k % 3).args for k in range(count)]
    return Case(
        ADD,
        {
            "output": integers(rng, (len(named), shape[0]), dtype),
            "input": integers(rng, (len(named), shape[1]), dtype),
            "indices": [one["indices"].long() if k % 2 else one["indices"] for k, one in enumerate(some)],
            "values": [one["values"] for one in some],
            "adapters": torch.tensor(named, dtype=torch.int32),
            "alphas": torch.tensor([(0.5, -2.0, 1.0)[k % 3] for k in range(count)]).to(
                torch.float64 if dtype == torch.float64 else torch.float32
            ),
            "transposed": transposed,
            "granule": granule,
        },
    )


@pytest.mark.subset
@pytest.mark.parametrize("granule", GRANULES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_exact_overlays(backend: Backend, dtype: torch.dtype, granule: int | str) -> None:
    for i, setup in enumerate(cases.setups((0, 1, 7, 33), granule, dtype=dtype)):
        setup = replace(setup, index=cases.INDEX_DTYPES[i % 2], values=torch.float32 if i % 3 else dtype)
        case = build(ADD, setup)
        assert_same(run(backend, case, offset=i % 3), run(cases.ORACLE, case))


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("granule", [1, 16])
def test_tokens_name_their_adapters(backend: Backend, granule: int, transposed: bool) -> None:
    """In runs, scattered, one each, none at all; few in a call, and many."""
    rng = np.random.default_rng(9)
    rows: list[list[int]] = [
        *([0], [-1], [2, 2, 2], [0, 1, 2], [-1, -1, 0], [2, 0, 2, 0, 2, -1, 1]),
        *([0] * 9 + [1] * 9, [1] * 30, rng.integers(-1, 3, 40).tolist()),
    ]
    for named in rows:
        case = adapters_of(rng, named, (32, 48), torch.bfloat16, granule, transposed)
        assert_same(run(backend, case), run(cases.ORACLE, case))


@pytest.mark.parametrize("count", [1, 65, 150])
def test_any_number_of_adapters(backend: Backend, count: int) -> None:
    """More than a launch has room for."""
    rng = np.random.default_rng(10)
    case = adapters_of(rng, rng.integers(-1, count, 12).tolist(), (8, 9), torch.float32, count=count)
    assert_same(run(backend, case), run(cases.ORACLE, case))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_what_has_no_strength_keeps_its_bits(backend: Backend, dtype: torch.dtype) -> None:
    """Without an adapter, or with alpha 0 or -0, whatever the numbers are."""
    rng = np.random.default_rng(11)
    case = adapters_of(rng, [-1, 1, 0, 2] * 5, (16, 32), dtype)
    case.args["output"] = cases.random_bits(rng, 20 * 16, dtype).view(20, 16)
    case.args["input"][:, 0] = float("nan")
    case.args["alphas"] = torch.tensor([0.0, 1.0, -0.0], dtype=case.args["alphas"].dtype)
    given = run(backend, case)["output"]
    kept = case.args["adapters"] != 1
    assert_same(given[kept], case.args["output"][kept])
    assert not torch.equal(cases.bits(given[~kept]), cases.bits(case.args["output"][~kept]))


def test_output_plus_the_sum_is_rounded_once(backend: Backend) -> None:
    """256 + 1 + 1 in bf16: the 2 are added as one."""
    ones = torch.ones(1, 2, dtype=torch.bfloat16)
    args = {
        "output": torch.tensor([[256.0]], dtype=torch.bfloat16),
        "input": ones,
        "indices": [torch.tensor([0, 1])],
        "values": [ones[0]],
        "adapters": torch.tensor([0], dtype=torch.int32),
        "alphas": torch.ones(1),
    }
    assert run(backend, Case(ADD, args))["output"].item() == 258


def test_what_selects_adapters_is_read_once() -> None:
    """Another thread that changes strengths or numbers during a call: either is right, and nothing in between."""
    count = 1 << 17  # a call takes long enough to be met by a change
    indices, values = torch.arange(count, dtype=torch.int32), torch.ones(count)
    adapters, alphas, done = torch.zeros(2, dtype=torch.int32), torch.zeros(1), threading.Event()

    def change() -> None:
        while not done.is_set():
            alphas.fill_(1.0)
            adapters.fill_(-1)
            alphas.zero_()
            adapters.zero_()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for at in range(1000):
            scale = 1.0 + at % 2  # what an earlier call has left in memory is another sum
            output = torch.zeros(2, 8)
            torch.ops.shira.sparse_linear_add_(
                output, torch.full((2, count), scale), [indices], [values], adapters, alphas
            )
            assert set(output[:, 0].tolist()) <= {0.0, count * scale}
            assert not output[:, 1:].any()
    finally:
        done.set()
        thread.join()


def test_indices_of_adapters_that_nobody_names(backend: Backend) -> None:
    """They are not looked at: a server keeps more adapters than a batch has."""
    case = adapters_of(np.random.default_rng(12), [0, 2, -1, 0], (8, 9), torch.float32)
    wanted = run(cases.ORACLE, case)["output"]
    case.args["indices"][1] = torch.full_like(case.args["indices"][1], 2**40)
    assert_same(run(backend, case)["output"], wanted)


@pytest.mark.parametrize("granule", [1, 8])
def test_a_gpu_skips_what_is_out_of_range(backend: Backend, granule: int) -> None:
    """No index reaches memory outside; what is in range counts."""
    if backend.checks_content:
        pytest.skip("CPU ops refuse")
    rng = np.random.default_rng(13)
    for tokens, transposed in itertools.product((1, 10), (False, True)):
        case = case_of(rng, tokens, (16, 24), torch.float32, granule, transposed)
        limit = 16 * 24 // granule
        good = case.args["indices"].long()
        case.args["indices"] = torch.cat([good, torch.tensor([limit, limit + 5, 2**40])])
        case.args["values"] = torch.cat([case.args["values"], torch.ones(3 * granule)])
        given = run(backend, case)["result"]
        part = {"indices": good, "values": case.args["values"][: -3 * granule]}
        assert_same(given, run(cases.ORACLE, Case(LINEAR, {**case.args, **part}))["result"])
        n = len(good) + 3
        for bad in (
            torch.from_numpy(rng.integers(-(2**62), 2**62, n)),
            torch.from_numpy(rng.integers(-3, limit + 3, n)),
            torch.full((n,), limit - 1),
            torch.arange(n).flip(0),
        ):  # not sorted: any numbers, but no other memory
            run(backend, Case(LINEAR, {**case.args, "indices": bad}))


# Autograd


def differentiable(granule: int, transposed: bool, leading: tuple[int, ...] = (3,)) -> Case:
    case = case_of(np.random.default_rng(14), math.prod(leading), (6, 8), torch.float64, granule, transposed, False)
    case.args["input"] = case.args["input"].view(*leading, 8)
    return case


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("granule", [1, 4])
@pytest.mark.parametrize("leading", [(), (3,), (2, 2)], ids=str)
def test_gradients(leading: tuple[int, ...], granule: int, transposed: bool) -> None:
    """In input and values, twice, and in forward mode."""
    case = differentiable(granule, transposed, leading)
    input, values = (case.args[name].requires_grad_() for name in ("input", "values"))

    def function(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return cases.DISPATCHER(LINEAR, **{**case.args, "input": x, "values": v})

    assert gradcheck(function, (input, values), check_forward_ad=True)
    assert gradgradcheck(function, (input, values))
    for x, v in ((input.detach(), values), (input, values.detach())):
        assert gradcheck(function, (x, v))


@pytest.mark.parametrize("values", [torch.bfloat16, torch.float32], ids=id_of)
def test_gradients_keep_the_dtype(values: torch.dtype) -> None:
    """The input's is the op itself, transposed; the values' is `sampled_grad`, in their dtype."""
    case = case_of(np.random.default_rng(15), 20, (16, 32), torch.bfloat16, 4)
    a = case.args
    x, v = a["input"].requires_grad_(), a["values"].to(values).requires_grad_()
    incoming = integers(np.random.default_rng(16), (20, 16), torch.bfloat16)
    shira_ops.sparse_linear(x, a["indices"], v, 16, granule=4).backward(incoming)
    wanted = shira_ops.sparse_linear(incoming, a["indices"], v.detach(), 32, transposed=True, granule=4)
    assert_same(x.grad, wanted)
    assert_same(v.grad, shira_ops.sampled_grad(incoming, x.detach(), a["indices"], 4).to(values))
    x.grad = None
    shira_ops.sparse_linear(x, a["indices"], v, 16, granule=4).sum().backward()  # an expanded gradient
    assert x.grad is not None


def test_only_what_needs_a_gradient_has_one() -> None:
    case = differentiable(1, False)
    assert not cases.DISPATCHER(LINEAR, **case.args).requires_grad
    case.args["values"].requires_grad_()
    (grad,) = torch.autograd.grad(cases.DISPATCHER(LINEAR, **case.args).sum(), case.args["values"])
    assert grad.shape == case.args["values"].shape
    with torch.no_grad():
        assert not cases.DISPATCHER(LINEAR, **case.args).requires_grad


def test_functional_transforms_are_refused() -> None:
    case = differentiable(1, False)

    def loss(v: torch.Tensor) -> torch.Tensor:
        return cases.DISPATCHER(LINEAR, **{**case.args, "values": v}).sum()

    with pytest.raises(RuntimeError, match=r"sparse_linear: has no rule for torch\.func's gradients"):
        torch.func.grad(loss)(case.args["values"])


def test_what_a_backward_keeps_is_kept_by_version() -> None:
    case = differentiable(1, False)
    case.args["input"].requires_grad_()
    loss = cases.DISPATCHER(LINEAR, **case.args).sum()
    case.args["values"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_gradients(backend: str) -> None:
    """Without a break in the graph, beside a layer."""
    case = case_of(np.random.default_rng(17), 5, (6, 8), torch.float32)
    a = case.args
    weight = torch.ones(6, 8)

    def loss(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, weight) + torch.ops.shira.sparse_linear(x, a["indices"], v, 6)
        return (y**2).sum()

    inputs = a["input"].requires_grad_(), a["values"].requires_grad_()
    wanted = torch.autograd.grad(loss(*inputs), inputs)
    given = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*inputs), inputs)
    assert_same(list(given), list(wanted))


def test_dynamic_tokens() -> None:
    """One graph for any number of tokens and any adapters."""
    rng = np.random.default_rng(18)

    def layer(args: dict[str, Any]) -> torch.Tensor:
        output = args["input"] @ args["weight"].T
        torch.ops.shira.sparse_linear_add_(
            output, args["input"], args["indices"], args["values"], args["adapters"], args["alphas"]
        )
        return output

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    weight, first = integers(rng, (6, 8), torch.float32), adapters_of(rng, [0], (6, 8), torch.float32).args
    for i, named in enumerate(([0, 1, -1, 2], [2, 2, 1], [0] * 9 + [1] * 11)):
        args = adapters_of(rng, named, (6, 8), torch.float32).args
        args |= {"weight": weight, "indices": first["indices"], "values": first["values"]}
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_same(compiled(args), layer(args))


def test_public_functions() -> None:
    case = adapters_of(np.random.default_rng(19), [0, -1, 2], (8, 9), torch.float32)
    wanted = run(cases.ORACLE, case)["output"]
    version = case.args["output"]._version
    shira_ops.sparse_linear_add_(**case.args)
    assert_same(case.args["output"], wanted)
    assert case.args["output"]._version > version
