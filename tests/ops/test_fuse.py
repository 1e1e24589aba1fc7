"""The fuse family: the plan of several adapters, and the pass that follows it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import cases
import oracles
from cases import FLOAT_DTYPES, Backend, Case, Setup, assert_same, build, run
from shira_ops.plan import rows as plan_rows
from test_switch import id_of, values_dtypes


def against_oracle(backend: Backend, case: Case, offset: int = 0) -> None:
    assert_same(run(backend, case, offset=offset), run(cases.ORACLE, case))


# fuse_plan


@pytest.mark.subset
@pytest.mark.parametrize("index", cases.INDEX_DTYPES, ids=id_of)
@pytest.mark.parametrize("counts", [(0,), (5,), (0, 0), (1, 1, 1), (7, 64, 65), (61, 61), (17, 0, 30, 61, 2)], ids=str)
def test_plan(backend: Backend, counts: tuple[int, ...], index: torch.dtype) -> None:
    rng = np.random.default_rng(sum(counts))
    adapters = [cases.random_indices(rng, 66, count, index) for count in counts]
    against_oracle(backend, Case("fuse_plan", {"indices": adapters, "granule": 3}))


@pytest.mark.usefixtures("threads")
def test_plan_of_many_entries_and_of_many_adapters(backend: Backend) -> None:
    rng = np.random.default_rng(1)
    for limit, counts in ((50_000, (8191, 8192, 8193)), (300, [20] * 65)):
        adapters = [cases.random_indices(rng, limit, count, torch.int32) for count in counts]
        against_oracle(backend, Case("fuse_plan", {"indices": adapters}))


def test_plan_of_wide_and_mixed_indices(backend: Backend) -> None:
    """int32 only where every list is; int64 numbers beyond 32 bits keep their order."""
    narrow, wide = torch.tensor([1, 5], dtype=torch.int32), torch.tensor([5, 2**31, 2**40])
    for adapters in ([narrow, wide], [wide, narrow], [wide], [narrow, narrow]):
        against_oracle(backend, Case("fuse_plan", {"indices": adapters}))


def test_plan_names_adapter_and_position(backend: Backend) -> None:
    adapters = [torch.tensor([2, 4], dtype=torch.int32), torch.tensor([1, 4, 9], dtype=torch.int32)]
    plan = run(backend, Case("fuse_plan", {"indices": adapters}))["result"]
    assert [t.tolist() for t in plan] == [[1, 2, 4, 9], [0, 2], [0, 1 << 48], [0b0110, 0b1101]]
    assert [t.dtype for t in plan] == [torch.int32, torch.int32, torch.int64, torch.int64]


def test_plan_goes_on_in_the_next_group(backend: Backend) -> None:
    """A source names the first granule that its adapter has in the group; bit 63 is the sign of an int64."""
    adapters = [torch.arange(63, 130), torch.arange(0, 130, 2), torch.arange(1, 63, 2)]
    plan = run(backend, Case("fuse_plan", {"indices": adapters}))["result"]
    even, odd = (sum(1 << bit for bit in range(first, 63, 2)) for first in (0, 1))
    groups = [
        {0: -(2**63), 1 << 48: even, 2 << 48: odd},
        {1: -1, 1 << 48 | 32: even},
        {65: 0b11, 1 << 48 | 64: 0b01},
    ]
    assert plan[1].tolist() == [0, 3, 5, 7]
    assert plan[2].tolist() == [source for group in groups for source in group]
    assert plan[3].tolist() == [members for group in groups for members in group.values()]


def test_rows_of_a_plan(backend: Backend) -> None:
    """Where each adapter's granules lie in the union: also of an adapter without any, and in bit 63 of a group."""
    rng = np.random.default_rng(2)
    for limit, counts in ((66, (17, 0, 30, 61, 2)), (5000, (200, 1300)), (130, (130,)), (9, (0, 0))):
        adapters = [cases.random_indices(rng, limit, count, torch.int32) for count in counts]
        union, *rest = run(backend, Case("fuse_plan", {"indices": adapters}))["result"]
        for own, rows in zip(adapters, plan_rows(*rest, len(adapters)), strict=True):
            assert_same(rows, torch.isin(union, own).nonzero().view(-1))


# fuse_

PLAN = ("indices", "offsets", "sources", "members")


def fuse_case(setup: Setup, strengths: list[float], delta: list[bool], refuse: bool) -> Case:
    """As many adapters as strengths, over one plan; some entries belong to one, to several, to none."""
    rng = np.random.default_rng(setup.seed)
    compute = torch.float64 if setup.dtype == torch.float64 else torch.float32
    counts = [max(0, setup.count - 3 * k) for k in range(len(strengths))]
    adapters = [cases.random_indices(rng, setup.limit, count, setup.index) for count in counts]
    plan = dict(zip(PLAN, oracles.fuse_plan(adapters, setup.granule), strict=True))
    g = setup.granule

    def numbers(n: int, dtype: torch.dtype) -> torch.Tensor:
        return cases.random_numbers(rng, n, dtype, setup.specials)

    return Case(
        "fuse_",
        {
            "weight": numbers(setup.numel, setup.dtype).view(cases.shape_of(setup.numel)),
            "saved": numbers(len(plan["indices"]) * g, setup.dtype),
            **plan,
            "values": [numbers(count * g, setup.values or setup.dtype) for count in counts],
            "alphas": torch.tensor(strengths, dtype=compute),
            "delta": delta,
            "refuse": refuse,
            "granule": g,
        },
    )


STRENGTHS: list[tuple[list[float], list[bool]]] = [
    ([1.0], [False]),
    ([1.0], [True]),
    ([0.3], [False]),
    ([0.0, -0.0], [False, True]),  # bits stay
    ([0.0, 1.0, 0.0], [True, False, False]),  # one contribution left, and it overwrites
    ([0.0, 1.0], [False, True]),
    ([1.0, 1.0], [False, False]),
    ([0.7, 0.5, -2.5], [False, True, False]),
    ([float("nan"), 1.0], [False, False]),
    ([float("inf"), float("-inf")], [True, True]),
]


@pytest.mark.subset
@pytest.mark.parametrize("granule", [1, 3, 8, 16, 32])
@pytest.mark.parametrize("refuse", [False, True], ids=("first", "refuse"))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_fuse(backend: Backend, dtype: torch.dtype, refuse: bool, granule: int) -> None:
    for i, ((strengths, delta), specials) in enumerate(itertools.product(STRENGTHS, (False, True))):
        values = values_dtypes(dtype)[i % len(values_dtypes(dtype))]
        setup = Setup(dtype=dtype, values=values, granule=granule, specials=specials, seed=i, limit=40, count=20)
        setup = replace(setup, index=cases.INDEX_DTYPES[i % 2])
        against_oracle(backend, fuse_case(setup, strengths, delta, refuse), offset=i % 3)


@pytest.mark.parametrize(("limit", "count"), [(0, 0), (1, 0), (1, 1), (9, 9)], ids=str)
def test_fuse_small(backend: Backend, limit: int, count: int) -> None:
    for refuse in (False, True):
        against_oracle(backend, fuse_case(Setup(limit=limit, count=count), [0.5, 0.25], [False, False], refuse))


@pytest.mark.usefixtures("threads")
def test_fuse_past_the_grain(backend: Backend) -> None:
    for dtype, granule in ((torch.bfloat16, 1), (torch.float32, 1), (torch.bfloat16, 16)):
        setup = Setup(dtype=dtype, granule=granule, limit=20_001 // granule, count=8193 // granule, specials=True)
        against_oracle(backend, fuse_case(setup, [0.7, 1.0, 0.0, -0.5], [False, True, False, False], False))


@pytest.mark.parametrize("granule", [1, 8])
@pytest.mark.parametrize("refuse", [False, True], ids=("first", "refuse"))
def test_entries_without_sources_keep_their_bits(backend: Backend, refuse: bool, granule: int) -> None:
    """A plan that a caller has cut: some entries have no sources left, including the last ones."""
    setup = Setup(dtype=torch.bfloat16, granule=granule, limit=600, count=400, specials=True)
    case = fuse_case(setup, [0.7, 1.0, -0.5], [False, False, True], refuse)
    offsets, sources, members = (case.args[name] for name in PLAN[1:])
    members &= ~0x1084210842108421  # every fifth entry has no source any more; what follows moves up
    kept = torch.arange(len(sources)) % 4 != 1
    kept[-2:] = False
    case.args["offsets"] = torch.cat([kept.new_zeros(1), kept.cumsum(0)])[offsets].to(offsets.dtype)
    case.args |= {"sources": sources[kept], "members": members[kept]}
    against_oracle(backend, case)


def test_masks_that_coincide(backend: Backend) -> None:
    """Every entry has as many sources as there are adapters."""
    at = cases.random_indices(np.random.default_rng(3), 2000, 1001, torch.int32)
    plan = dict(zip(PLAN, oracles.fuse_plan([at] * 5), strict=True))
    for dtype in FLOAT_DTYPES:
        case = fuse_case(Setup(dtype=dtype, limit=2000, count=1001, specials=True), [0.5], [False], False)
        case.args |= plan
        case.args["values"] = [torch.roll(case.args["values"][0], k) for k in range(5)]
        case.args["alphas"] = torch.tensor([0.5, 0.0, 1.0, -0.25, 3.0], dtype=case.args["alphas"].dtype)
        case.args["delta"] = [False, True, False, True, False]
        against_oracle(backend, case, offset=1)


@pytest.mark.subset
@pytest.mark.parametrize("granule", [1, 8])
@pytest.mark.parametrize("delta", [False, True], ids=("overwrite", "delta"))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_one_adapter_equals_apply(backend: Backend, dtype: torch.dtype, delta: bool, granule: int) -> None:
    for values, alpha in itertools.product(values_dtypes(dtype), (0.0, 1.0, 0.3, -2.5, float("nan"))):
        setup = Setup(dtype=dtype, values=values, granule=granule, limit=70, count=33, specials=True)
        case = fuse_case(setup, [alpha], [delta], False)
        a = case.args
        fused = run(backend, case)
        # fp32 strengths are what apply_ rounds its own to
        strength = float(a["alphas"][0])
        args = {"weight": a["weight"], "indices": a["indices"], "values": a["values"][0], "saved": a["saved"]}
        applied = run(backend, Case("apply_", {**args, "alpha": strength, "delta": delta, "granule": granule}))
        assert_same([fused["weight"], fused["saved"]], [applied["weight"], applied["saved"]])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_refuse_never_accumulates(backend: Backend, dtype: torch.dtype) -> None:
    """New strengths over the same plan give what a fresh fuse gives, and the base stays in `saved`."""
    setup = Setup(dtype=dtype, limit=50, count=30)
    case = fuse_case(setup, [0.7, -0.3], [False, True], False)
    state: dict[str, Any] = {k: v for k, v in run(backend, case).items() if k != "result"}
    for strengths in ([1.0, 0.0], [0.2, 0.9], [0.0, 0.0]):
        alphas = torch.tensor(strengths, dtype=case.args["alphas"].dtype)
        state = dict(run(backend, Case("fuse_", {**state, "alphas": alphas, "refuse": True})).items())
        del state["result"]
        fresh = run(backend, Case("fuse_", {**case.args, "alphas": alphas}))
        assert_same([state["weight"], state["saved"]], [fresh["weight"], fresh["saved"]])
    assert_same(state["weight"], case.args["weight"])


def test_contributions_sum_in_the_order_of_the_adapters(backend: Backend) -> None:
    """fp32 sums depend on the order: 2^24 + 1 + 1 is not 1 + 1 + 2^24."""
    at = torch.tensor([0])
    big, one = torch.tensor([2.0**24]), torch.tensor([1.0])
    for values in ([big, one, one], [one, one, big]):
        args = {"weight": torch.zeros(1), "saved": torch.zeros(1)}
        args |= dict(zip(PLAN, oracles.fuse_plan([at, at, at]), strict=True))
        args |= {"values": values, "alphas": torch.ones(3), "delta": [True] * 3}
        total = float(run(backend, Case("fuse_", args))["weight"])
        assert total == (2.0**24 if values[0] is big else 2.0**24 + 2)


def test_adapters_may_share_values(backend: Backend) -> None:
    """Read-only arguments may be one tensor."""
    at = torch.tensor([1, 3])
    shared = torch.tensor([1.0, 2.0])
    args = {"weight": torch.zeros(5), "saved": torch.zeros(2)}
    args |= dict(zip(PLAN, oracles.fuse_plan([at, at]), strict=True))
    args |= {"values": [shared, shared], "alphas": torch.tensor([1.0, 0.5]), "delta": [True, True]}
    args = cases.map_tensors(lambda t: t.to(backend.device), args)
    args["values"] = [args["values"][0]] * 2
    backend("fuse_", **args)
    assert args["weight"].tolist() == [0, 1.5, 0, 3, 0]


def test_the_plan_of_the_op_drives_the_pass(backend: Backend) -> None:
    """fuse_plan and fuse_ together, as a caller uses them."""
    for granule in (1, 8):
        case = build("fuse_", Setup(dtype=torch.bfloat16, granule=granule))
        rng = np.random.default_rng(0)
        adapters = [cases.random_indices(rng, 61, 17, torch.int64) for _ in range(3)]
        plan = run(backend, Case("fuse_plan", {"indices": adapters, "granule": granule}))["result"]
        case.args |= dict(zip(PLAN, plan, strict=True))
        case.args["saved"] = torch.zeros(len(plan[0]) * granule, dtype=torch.bfloat16)
        against_oracle(backend, case)
