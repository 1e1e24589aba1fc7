"""The switch family: moves of bits on every dtype, arithmetic of strengths on the float dtypes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import cases
import shira_ops
from cases import ALL, FLOAT_DTYPES, GRANULES, MOVE_DTYPES, Backend, Case, Setup, assert_same, build, run

# Granules selected: nothing, one, around vector widths; and around the grain of a parallel loop.
SMALL = (0, 1, 7, 31, 63, 64, 65)
LARGE = (8191, 8192, 8193, 100_003)

MOVES = ("gather", "scatter_", "swap_", "apply_", "switch_")
STRENGTHS = ("apply_", "switch_", "scatter_add_")
ALPHAS = (0.0, -0.0, 1.0, 0.3, -2.5, float("inf"), float("-inf"), float("nan"))


def id_of(value: Any) -> str:
    return str(value).removeprefix("torch.")


def values_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return (dtype,) if dtype == torch.float32 else (dtype, torch.float32)


def against_oracle(backend: Backend, case: Case, offset: int = 0) -> None:
    assert_same(run(backend, case, offset=offset), run(cases.ORACLE, case))


@pytest.mark.subset
@pytest.mark.parametrize("granule", GRANULES)
@pytest.mark.parametrize("dtype", MOVE_DTYPES, ids=id_of)
def test_moves_keep_every_bit(backend: Backend, dtype: torch.dtype, granule: int | str) -> None:
    for i, setup in enumerate(cases.setups(SMALL, granule, dtype=dtype)):
        setup = replace(setup, index=cases.INDEX_DTYPES[i % 2])
        for op in MOVES:
            case = build(op, setup)
            for name, t in list(case.tensors()):  # any bit pattern, not only numbers
                if t.dtype == dtype and "indices" not in name:
                    noise = cases.random_bits(np.random.default_rng(i + len(name)), t.numel(), dtype)
                    case.set(name, noise.view(t.shape))
            against_oracle(backend, case, offset=i % 5)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("granule", [1, 8, 32])
@pytest.mark.parametrize("op", [*MOVES, "scatter_add_"])
def test_large(backend: Backend, op: str, granule: int) -> None:
    """Past the grain of a parallel loop, where threads share the work, and not on a multiple of a vector."""
    dtypes = (torch.bfloat16, torch.float32) if op == "scatter_add_" else (torch.uint8, torch.bfloat16, torch.float32)
    for i, (size, dtype) in enumerate(itertools.product(LARGE, dtypes)):
        count = size // granule + (granule > 1)
        setup = Setup(dtype=dtype, granule=granule, limit=2 * count + 1, count=count, index=cases.INDEX_DTYPES[i % 2])
        against_oracle(backend, build(op, setup), offset=i % 3)


@pytest.mark.subset
@pytest.mark.parametrize("granule", GRANULES)
@pytest.mark.parametrize("delta", [False, True], ids=("overwrite", "delta"))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_strengths(backend: Backend, dtype: torch.dtype, delta: bool, granule: int | str) -> None:
    for i, (values, alpha, specials) in enumerate(itertools.product(values_dtypes(dtype), ALPHAS, (False, True))):
        count = (65, 1, 33)[i % 3]
        base = Setup(dtype=dtype, values=values, specials=specials, seed=i, index=cases.INDEX_DTYPES[i % 2])
        if granule == ALL:
            setup = replace(base, granule=count, limit=1, count=1)
        else:
            setup = replace(base, granule=granule, limit=2 * count, count=count)
        for op in STRENGTHS:
            changes = {"alpha": alpha} if op == "scatter_add_" else {"alpha": alpha, "delta": delta}
            against_oracle(backend, build(op, setup, **changes), offset=i % 3)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("op", STRENGTHS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_strengths_past_the_grain(backend: Backend, dtype: torch.dtype, op: str) -> None:
    for i, values in enumerate(values_dtypes(dtype)):
        setup = Setup(dtype=dtype, values=values, limit=210_001, count=100_003, specials=True, index=torch.int32)
        against_oracle(backend, build(op, setup, alpha=0.3), offset=i)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=id_of)
def test_every_pattern_of_16_bits(backend: Backend, dtype: torch.dtype, alpha: float) -> None:
    """Every base with some value and every value with some base, subnormals and NaNs among them."""
    every = np.arange(1 << 16, dtype=np.uint16)
    base = cases.from_bits(every, dtype)
    values = cases.from_bits(np.random.default_rng(0).permutation(every), dtype)
    indices = torch.arange(1 << 16)
    for delta in (False, True):
        args = {"weight": base, "indices": indices, "values": values, "saved": torch.zeros_like(base)}
        against_oracle(backend, Case("apply_", {**args, "alpha": alpha, "delta": delta}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=id_of)
def test_values_in_float32_round_once_to_nearest_even(backend: Backend, dtype: torch.dtype) -> None:
    """Every 16-bit number, the midpoint above it, and the fp32 numbers next to both."""
    exact = cases.from_bits(np.arange(1 << 16, dtype=np.uint16), dtype).float()
    exact = exact[exact.isfinite()]
    spacing = 2.0 ** (exact.abs().double().clamp(min=2.0**-14 if dtype == torch.float16 else 2.0**-126).log2().floor())
    half_ulp = (spacing * (2.0**-11 if dtype == torch.float16 else 2.0**-8)).float()
    middle = exact + half_ulp
    up, down = torch.tensor(float("inf")), torch.tensor(float("-inf"))
    values = torch.cat([v for x in (exact, middle) for v in (x, x.nextafter(up), x.nextafter(down))])
    weight = torch.zeros(values.numel(), dtype=dtype)
    args = {"weight": weight, "indices": torch.arange(values.numel()), "values": values}
    against_oracle(backend, Case("apply_", {**args, "saved": weight.clone()}))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_alpha_is_rounded_before_it_is_looked_at(backend: Backend, dtype: torch.dtype) -> None:
    """In fp32 1e-60 is 0, so bits stay; 1 + 1e-12 is 1, so values are stored exactly. fp64 weights see the number."""
    setup = Setup(dtype=dtype, specials=True, limit=400, count=300)
    for alpha, delta in itertools.product((1e-60, -1e-60, 1 + 1e-12), (False, True)):
        case = build("apply_", setup, alpha=alpha, delta=delta)
        against_oracle(backend, case)
        if dtype != torch.float64 and not delta:
            after = run(backend, case)["weight"]
            wanted = case.args["weight"].clone()
            if alpha > 1:
                wanted.view(-1)[case.args["indices"]] = case.args["values"]
            assert_same(after, wanted)


def test_no_contraction(backend: Backend) -> None:
    """base + alpha*value where a fused multiply-add gives other bits."""
    rng = np.random.default_rng(5)
    base, values = (torch.from_numpy(rng.standard_normal(4096)).float() for _ in range(2))
    args = {"indices": torch.arange(4096), "values": values}
    wanted = base + torch.tensor(0.3) * values
    fused = (base.double() + torch.tensor(0.3).double() * values.double()).float()
    assert not torch.equal(wanted, fused)  # the case tells them apart
    assert_same(run(backend, Case("scatter_add_", {"weight": base, **args, "alpha": 0.3}))["weight"], wanted)


def test_strengths_of_subnormals_are_not_flushed(backend: Backend) -> None:
    tiny = torch.full((64,), 1e-42)
    args = {"weight": torch.zeros(64), "indices": torch.arange(64), "values": tiny, "alpha": 0.5}
    assert_same(run(backend, Case("scatter_add_", args))["weight"], tiny * 0.5)
    assert bool((tiny * 0.5 != 0).all())


# What the ops are for


@pytest.mark.subset
@pytest.mark.parametrize("granule", [1, 8])
@pytest.mark.parametrize("dtype", MOVE_DTYPES, ids=id_of)
def test_twice_swapped_is_the_identity(backend: Backend, dtype: torch.dtype, granule: int) -> None:
    case = build("swap_", Setup(dtype=dtype, granule=granule, limit=100, count=63))
    once = run(backend, case)
    again = run(backend, Case("swap_", {k: once[k] for k in case.args}))
    assert_same({k: again[k] for k in case.args}, case.args)


@pytest.mark.subset
@pytest.mark.parametrize("granule", [1, 16])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_scatter_reverts_apply(backend: Backend, dtype: torch.dtype, granule: int) -> None:
    for alpha, delta in itertools.product((0.0, 1.0, -2.5), (False, True)):
        setup = Setup(dtype=dtype, granule=granule, limit=90, count=64, specials=True)
        case = build("apply_", setup, alpha=alpha, delta=delta)
        after = run(backend, case)
        revert = {"weight": after["weight"], "indices": after["indices"], "values": after["saved"], "granule": granule}
        assert_same(run(backend, Case("scatter_", revert))["weight"], case.args["weight"])


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_switch_is_scatter_then_apply(backend: Backend, alpha: float) -> None:
    """For disjoint, partly shared and equal masks, and masks that are empty on either side."""
    for count_out, count_in in ((40, 40), (0, 40), (40, 0), (61, 61), (61, 5), (1, 61)):
        case = build("switch_", Setup(count=count_in), alpha=alpha)
        other = build("scatter_", Setup(count=count_out, seed=9))
        case.args |= {"indices_out": other.args["indices"], "saved_out": other.args["values"]}
        a = case.args
        out = run(
            backend, Case("scatter_", {"weight": a["weight"], "indices": a["indices_out"], "values": a["saved_out"]})
        )
        step = {"weight": out["weight"], "indices": a["indices_in"], "values": a["values"], "saved": a["saved_in"]}
        wanted = run(backend, Case("apply_", {**step, "alpha": alpha, "delta": False}))
        given = run(backend, case)
        assert_same([given["weight"], given["saved_in"]], [wanted["weight"], wanted["saved"]])


def test_switch_between_two_adapters_of_one_mask(backend: Backend) -> None:
    """Read-only arguments may be one tensor; what goes out is what was saved, so the base comes back."""
    base = cases.random_numbers(np.random.default_rng(0), 96, torch.bfloat16)
    indices = torch.arange(0, 96, 3, device=backend.device)
    a, b = (torch.full((32,), x, dtype=torch.bfloat16, device=backend.device) for x in (1.5, -2.0))
    weight = base.clone().to(backend.device)
    saved_a, saved_b = torch.empty_like(a), torch.empty_like(b)
    backend("apply_", weight=weight, indices=indices, values=a, saved=saved_a)
    common = {"indices_out": indices, "saved_out": saved_a, "indices_in": indices}
    backend("switch_", weight=weight, **common, values=b, saved_in=saved_b)
    assert_same(weight.cpu()[::3], b.cpu())
    assert_same(saved_b, saved_a)
    backend("scatter_", weight=weight, indices=indices, values=saved_b)
    assert_same(weight, base)


@pytest.mark.parametrize("granule", [1, 2])
@pytest.mark.parametrize(("alpha", "delta"), [(1.0, False), (0.5, False), (0.5, True), (0.0, False)])
def test_switch_where_masks_coincide(backend: Backend, alpha: float, delta: bool, granule: int) -> None:
    """In one tensor, in two of any index dtypes, and with a few granules that differ, so that equal parts are apart."""
    setup = Setup(dtype=torch.bfloat16, granule=granule, limit=20_000, count=9_001, index=torch.int32, specials=True)
    case = build("switch_", setup, alpha=alpha, delta=delta)
    mask = case.args["indices_in"]
    few = torch.cat([mask[:70], mask[75:8_500], mask[8_501:]])
    for out, into in ((mask, mask), (mask.clone(), mask), (mask.long(), mask), (few, mask), (mask, few)):
        args = dict(case.args, indices_out=out, indices_in=into)
        args["saved_out"] = args["values"].flip(0)[: len(out) * granule].clone()
        for name in ("values", "saved_in"):
            args[name] = args[name][: len(into) * granule].clone()
        against_oracle(backend, Case("switch_", args))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 5), (0, 4)], ids=str)
@pytest.mark.parametrize("op", [*MOVES, "scatter_add_"])
def test_shapes(backend: Backend, op: str, shape: tuple[int, ...]) -> None:
    """Indices count in the flat weight, whatever its shape; a 0-dim weight has one entry."""
    numel = int(np.prod(shape))
    for count in {0, numel // 2, numel}:
        against_oracle(backend, build(op, Setup(limit=numel, count=count, shape=shape, dtype=torch.float16)))


def test_gather_gives_a_new_tensor(backend: Backend) -> None:
    weight = torch.arange(12.0, device=backend.device).view(3, 4)
    everything = backend("gather", weight=weight, indices=torch.arange(12, device=backend.device))
    assert everything.shape == (12,)
    assert everything.data_ptr() != weight.data_ptr()
    everything.zero_()
    assert weight.sum() == 66


@pytest.mark.parametrize("shape", [(8, 6, 4, 4), (8, 6)], ids=str)
def test_a_view_that_is_contiguous_is_changed_in_place(backend: Backend, shape: tuple[int, ...]) -> None:
    whole = torch.zeros((2, *shape), device=backend.device)
    indices = torch.tensor([0, 5], device=backend.device)
    backend("scatter_", weight=whole[1], indices=indices, values=torch.ones(2, device=backend.device))
    assert whole[0].sum() == 0
    assert whole[1].view(-1)[[0, 5]].tolist() == [1, 1]
    assert whole.sum() == 2


# Lists


FOREACH = ("foreach_gather", "foreach_scatter_", "foreach_swap_", "foreach_apply_", "foreach_switch_")


@pytest.mark.subset
@pytest.mark.parametrize("granule", [1, 8, 32])
@pytest.mark.parametrize("op", FOREACH)
def test_lists(backend: Backend, op: str, granule: int) -> None:
    for i, dtype in enumerate(MOVE_DTYPES):
        against_oracle(backend, build(op, Setup(dtype=dtype, granule=granule, seed=i, limit=65 + i)), offset=i % 4)


@pytest.mark.parametrize("op", ["foreach_apply_", "foreach_switch_"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_strengths_of_lists(backend: Backend, dtype: torch.dtype, op: str) -> None:
    for values, alpha, delta in itertools.product(values_dtypes(dtype), (0.0, 1.0, 0.3, float("nan")), (False, True)):
        setup = Setup(dtype=dtype, values=values, granule=3, specials=True)
        against_oracle(backend, build(op, setup, alpha=alpha, delta=delta))


@pytest.mark.parametrize("op", FOREACH)
def test_lists_of_several_dtypes_and_sizes(backend: Backend, op: str) -> None:
    """One call over a model: tiny and large weights, empty ones, several dtypes, int32 and int64 indices."""
    single = op.removeprefix("foreach_")
    dtypes = (torch.bfloat16, torch.float32, torch.int8, torch.float64, torch.bfloat16, torch.float16)
    for granule, least in ((1, 0), (2, 1)):  # a granule of an empty weight is one entry
        members = []
        for i, dtype in enumerate(dtypes):
            limit, count = ((4096, 1000), (1, 1), (64, 64), (least, 0), (70_001, 9_001), (9, 0))[i]
            index = cases.INDEX_DTYPES[i % 2]
            setup = Setup(dtype=dtype, granule=granule, limit=limit, count=count, seed=i, index=index)
            members.append(build(single, setup))
        against_oracle(backend, cases.foreach(op, members))


@pytest.mark.parametrize("op", FOREACH)
def test_lists_may_share_what_is_only_read(backend: Backend, op: str) -> None:
    """One mask and one set of values for several weights."""
    members = [build(op.removeprefix("foreach_"), Setup(seed=i)) for i in range(3)]
    case = cases.foreach(op, members)
    mutated = cases.mutated_names(op)
    args: dict[str, Any] = {}
    for name, value in case.args.items():
        if isinstance(value, list):
            copies = [v.clone().to(backend.device) for v in value]
            shared = name not in (*mutated, "weights")
            args[name] = [copies[0]] * 3 if shared else copies
        else:
            args[name] = value
    wanted = run(cases.ORACLE, Case(op, args).clone() if backend.device == "cpu" else to_cpu(Case(op, args)))
    result = backend(op, **args)
    assert_same({"result": result, **args}, wanted)


def to_cpu(case: Case) -> Case:
    return Case(case.op, cases.map_tensors(lambda t: t.detach().cpu(), case.args))


@pytest.mark.parametrize("op", FOREACH)
def test_empty_lists(backend: Backend, op: str) -> None:
    """A model without targets: nothing to do."""
    case = build(op)
    case.args = {k: [] if isinstance(v, list) else v for k, v in case.args.items()}
    if backend.name == "cuda":
        pytest.skip("no tensor, no device: the call goes to the CPU's kernel")
    assert backend(op, **case.args) in ([], None)


# check_indices


@pytest.mark.subset
@pytest.mark.parametrize("index", cases.INDEX_DTYPES, ids=id_of)
@pytest.mark.parametrize("granule", [1, 3, 8])
def test_check_indices_accepts(backend: Backend, index: torch.dtype, granule: int) -> None:
    for count in (0, 1, 2, 63, 64, 65, 1000, 8193, 100_003):
        for limit in (count + 1, 3 * count + 1):
            setup = Setup(limit=limit, count=count, granule=granule, index=index)
            assert run(backend, build("check_indices", setup))["result"] is None
    full = torch.arange(1000, dtype=index)
    case = Case("check_indices", {"indices": full, "limit": 1000 * granule, "granule": granule})
    assert run(backend, case)["result"] is None


def test_check_indices_beyond_32_bits(backend: Backend) -> None:
    indices = torch.tensor([0, 2**31 - 1, 2**31, 2**40, 2**62])
    assert run(backend, Case("check_indices", {"indices": indices, "limit": 2**63 - 1}))["result"] is None
    top = torch.tensor([2**63 - 2])
    assert run(backend, Case("check_indices", {"indices": top, "limit": 2**63 - 1}))["result"] is None


def test_public_functions_are_the_ops() -> None:
    """shira_ops.swap_(...) does what torch.ops.shira.swap_(...) does."""
    for op in (*MOVES, *FOREACH, "scatter_add_"):
        case = build(op)
        backend = Backend("public", "cpu", lambda name: getattr(shira_ops, name))
        against_oracle(backend, case)
