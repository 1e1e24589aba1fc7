"""The optimize family: masked-gradient steps, bit for bit as defined and close to torch.optim."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import cases
from cases import FLOAT_DTYPES, GRANULES, TOLERANCE, Backend, Case, Setup, assert_same, build, run
from test_switch import against_oracle, id_of, values_dtypes

STEPS = ("adamw_", "adamw_.tensor", "sgd_", "sgd_.tensor")
SGD = {
    "plain": {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "momentum_buffer": None},
    "decay": {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.1, "nesterov": False, "momentum_buffer": None},
    "momentum": {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False},
    "dampening": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "nesterov": False},
    "nesterov": {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": True},
}
ADAMW = {
    "first": {"step": 1, "weight_decay": 0.0},
    "decay": {"step": 2, "weight_decay": 0.1},
    "late": {"step": 100_000, "lr": 1e-4},
    "betas": {"step": 7, "beta1": 0.0, "beta2": 0.5, "eps": 1e-3},
    "no lr": {"step": 5, "lr": 0.0},
}


def with_tensors(op: str, args: dict[str, Any], compute: torch.dtype = torch.float64) -> dict[str, Any]:
    """step and lr as the `.tensor` overloads take them."""
    if op.endswith(".tensor"):
        args = dict(args)
        if "step" in args:
            args["step"] = torch.tensor(args["step"])
        if "lr" in args:
            args["lr"] = torch.tensor(args["lr"], dtype=compute)
    return args


def variants(op: str) -> dict[str, dict[str, Any]]:
    return ADAMW if "adamw" in op else SGD


@pytest.mark.subset
@pytest.mark.parametrize("granule", GRANULES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
@pytest.mark.parametrize("op", STEPS)
def test_step(backend: Backend, op: str, dtype: torch.dtype, granule: int | str) -> None:
    changes = itertools.cycle(variants(op).values())
    for i, setup in enumerate(cases.setups((0, 1, 7, 33, 64, 65), granule, dtype=dtype)):
        for values in values_dtypes(dtype):
            setup = replace(setup, values=values, index=cases.INDEX_DTYPES[i % 2])
            against_oracle(backend, build(op, setup, **with_tensors(op, next(changes))), offset=i % 3)


@pytest.mark.parametrize("variant", range(5))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
@pytest.mark.parametrize("op", STEPS)
def test_variants_and_special_numbers(backend: Backend, op: str, dtype: torch.dtype, variant: int) -> None:
    changes = with_tensors(op, list(variants(op).values())[variant])
    for specials in (False, True):
        against_oracle(backend, build(op, Setup(dtype=dtype, limit=200, count=131, specials=specials), **changes))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
@pytest.mark.parametrize("op", ["adamw_", "sgd_"])
def test_past_the_grain(backend: Backend, op: str, dtype: torch.dtype) -> None:
    for size, granule in ((8191, 1), (8193, 1), (100_003, 1), (30_001, 3)):
        count = size // granule
        against_oracle(backend, build(op, Setup(dtype=dtype, granule=granule, limit=2 * count, count=count)), offset=1)


@pytest.mark.subset
@pytest.mark.parametrize("granule", [1, 8])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
@pytest.mark.parametrize("op", STEPS)
def test_dense_gradient(backend: Backend, op: str, dtype: torch.dtype, granule: int) -> None:
    """It has the weight's shape and is read only at the indices, so what is elsewhere does not matter."""
    for values in values_dtypes(dtype):
        case = build(op, Setup(dtype=dtype, values=values, granule=granule, limit=70, count=33))
        weight, indices, grad = (case.args[name] for name in ("weight", "indices", "grad"))
        dense = torch.full((70, granule), float("nan"), dtype=grad.dtype)
        dense[indices] = grad.view(-1, granule)
        sparse = run(backend, case)
        case.args["grad"] = dense.view(weight.shape)
        given = run(backend, case)
        assert_same({k: v for k, v in given.items() if k != "grad"}, {k: v for k, v in sparse.items() if k != "grad"})


@pytest.mark.parametrize("op", ["adamw_", "sgd_"])
def test_a_shape_that_is_both_means_the_selected_entries(backend: Backend, op: str) -> None:
    """A 1-D weight of which every entry is selected: the two readings agree. A weight [nnz] of which not
    every entry is selected cannot be."""
    case = build(op, Setup(limit=40, count=40, shape=(40,)))
    against_oracle(backend, case)


@pytest.mark.parametrize("op", ["foreach_adamw_", "foreach_adamw_.tensor", "foreach_sgd_", "foreach_sgd_.tensor"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_lists(backend: Backend, op: str, dtype: torch.dtype) -> None:
    for i, (granule, changes) in enumerate(itertools.product((1, 8), variants(op).values())):
        changes = {("momentum_buffers" if k == "momentum_buffer" else k): v for k, v in changes.items()}
        case = build(op, Setup(dtype=dtype, granule=granule, seed=i), **with_tensors(op, changes))
        against_oracle(backend, case, offset=i % 3)


def test_lists_of_several_dtypes(backend: Backend) -> None:
    """A model in bf16 with fp32 norms and an fp64 head; sparse and dense gradients in one call."""
    for single in ("adamw_", "sgd_"):
        members = [build(single, Setup(dtype=dtype, seed=i, limit=50 + i)) for i, dtype in enumerate(FLOAT_DTYPES)]
        members[1].args["grad"] = torch.ones_like(members[1].args["weight"])
        against_oracle(backend, cases.foreach(f"foreach_{single}", members))


@pytest.mark.parametrize("step", [torch.int64, torch.float32], ids=id_of)
@pytest.mark.parametrize("lr", [torch.float32, torch.float64], ids=id_of)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_tensor_overloads_equal_the_scalar_ones(
    backend: Backend, shape: tuple[int, ...], lr: torch.dtype, step: torch.dtype
) -> None:
    for op, dtype in itertools.product(("adamw_", "sgd_"), FLOAT_DTYPES):
        case = build(op, Setup(dtype=dtype))
        rate = torch.full(shape, 1e-2, dtype=lr)
        scalar = run(backend, Case(op, {**case.args, "lr": float(rate)}))
        changes = {"lr": rate}
        if op == "adamw_":
            changes["step"] = torch.full(shape, case.args["step"], dtype=step)
        given = run(backend, Case(f"{op}.tensor", {**case.args, **changes}))
        assert_same(
            {k: v for k, v in given.items() if k not in changes}, {k: v for k, v in scalar.items() if k not in changes}
        )


# Against torch.optim: the same values, every entry selected or some


def compare_with_torch(
    backend: Backend, op: str, optimizer: Any, options: dict[str, Any], dtype: torch.dtype, steps: int = 100
) -> None:
    rng = np.random.default_rng(7)
    case = build(op, Setup(dtype=dtype, limit=60, count=40, granule=2))
    weight = case.args["weight"]
    indices = case.args["indices"]
    selected = weight.view(-1, 2)[indices].view(-1)
    theirs = torch.nn.Parameter(selected.clone())
    optimizer = optimizer(
        [theirs], **{k: v for k, v in options.items() if k in ("lr", "weight_decay")}, **extra(op, options)
    )
    state: dict[str, Any] = {"weight": weight, "indices": indices, "master": selected.clone(), "granule": 2}
    if op == "adamw_":
        state |= {"exp_avg": torch.zeros_like(selected), "exp_avg_sq": torch.zeros_like(selected)}
    else:
        state |= {"momentum_buffer": torch.zeros_like(selected) if options["momentum"] else None}
    for step in range(1, steps + 1):
        grad = torch.from_numpy(rng.standard_normal(len(selected))).to(dtype)
        theirs.grad = grad.clone()
        optimizer.step()
        if op == "sgd_" and step == 1 and options["momentum"]:
            # torch's first step takes the gradient as the buffer, undampened: start from there.
            first = grad + options["weight_decay"] * state["master"]
            state["momentum_buffer"] = (first - (1 - options["dampening"]) * first) / options["momentum"]
        scalars = {**options, "step": step} if op == "adamw_" else options
        state = {**run(backend, Case(op, {**state, "grad": grad, **scalars}))}
        del state["result"]
        state = {k: v for k, v in state.items() if k not in scalars and k != "grad"}
    assert_same(state["weight"].view(-1, 2)[indices].view(-1), state["master"])
    scale = theirs.detach().abs().max()
    worst = (state["master"] - theirs.detach()).abs().max() / scale
    assert worst <= TOLERANCE["optim", dtype], f"{worst:.3g} of the largest entry"
    untouched = torch.ones(60, dtype=torch.bool)
    untouched[indices] = False
    assert_same(state["weight"].view(-1, 2)[untouched], weight.view(-1, 2)[untouched])


def extra(op: str, options: dict[str, Any]) -> dict[str, Any]:
    if op == "adamw_":
        return {"betas": (options["beta1"], options["beta2"]), "eps": options["eps"], "foreach": False}
    return {k: options[k] for k in ("momentum", "dampening", "nesterov")} | {"foreach": False}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=id_of)
def test_adamw_is_torchs(backend: Backend, dtype: torch.dtype, weight_decay: float) -> None:
    options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": weight_decay}
    compare_with_torch(backend, "adamw_", torch.optim.AdamW, options, dtype)


@pytest.mark.parametrize("variant", SGD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=id_of)
def test_sgd_is_torchs(backend: Backend, dtype: torch.dtype, variant: str) -> None:
    options = {"lr": 1e-2, **{k: v for k, v in SGD[variant].items() if k != "momentum_buffer"}}
    compare_with_torch(backend, "sgd_", torch.optim.SGD, options, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=id_of)
def test_small_steps_are_not_lost_in_narrow_weights(backend: Backend, dtype: torch.dtype) -> None:
    """The master moves by less than the weight can show, and after enough steps the weight moves too."""
    one, at = torch.ones(1), torch.tensor([0])
    state: dict[str, Any] = {"weight": one.to(dtype), "indices": at, "master": one.clone(), "momentum_buffer": None}
    options = {"lr": 2.0**-14, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
    seen = set()
    for _ in range(128):
        state |= {k: v for k, v in run(backend, Case("sgd_", {**state, "grad": one, **options})).items() if k in state}
        seen.add(float(state["weight"]))
    assert float(state["master"]) == 1 - 2.0**-7
    assert float(state["weight"]) == 1 - 2.0**-7
    assert 1.0 in seen
    assert len(seen) > 2
