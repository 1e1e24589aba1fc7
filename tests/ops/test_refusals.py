"""Every refusal: one text from every backend, and a refused call has changed nothing."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cases
import shira_ops.checks
from cases import FLOAT_DTYPES, FOREACH_OPS, MUTATING_OPS, OPS, Backend, Case, Setup, bits, build


@dataclass(frozen=True)
class Role:
    """A tensor argument next to a weight: what its dtype must be, and whose entries it has."""

    name: str
    kind: str  # "index", "own" (weight's dtype), "wide" (weight's dtype or float32), "state", "grad"
    indices: str = "indices"


_INDICES = Role("indices", "index")
_ADAMW = (_INDICES, Role("master", "state"), Role("exp_avg", "state"), Role("exp_avg_sq", "state"))
_SGD = (_INDICES, Role("master", "state"), Role("momentum_buffer", "state"), Role("grad", "grad"))
# The ops that walk one weight with indices, and their foreach_ forms below.
ROLES: dict[str, tuple[Role, ...]] = {
    "gather": (_INDICES,),
    "scatter_": (_INDICES, Role("values", "own")),
    "swap_": (_INDICES, Role("values", "own")),
    "apply_": (_INDICES, Role("values", "wide"), Role("saved", "own")),
    "switch_": (
        *(Role("indices_out", "index"), Role("saved_out", "own", "indices_out")),
        *(Role("indices_in", "index"), Role("values", "wide", "indices_in"), Role("saved_in", "own", "indices_in")),
    ),
    "scatter_add_": (_INDICES, Role("values", "wide")),
    "fuse_": (Role("saved", "own"), _INDICES),
    "adamw_": (*_ADAMW, Role("grad", "grad")),
    "adamw_.tensor": (*_ADAMW, Role("grad", "grad")),
    "sgd_": _SGD,
    "sgd_.tensor": _SGD,
    "fingerprint_at": (_INDICES,),
}
_PLURAL = {"weight", "master", "exp_avg", "exp_avg_sq", "grad", "momentum_buffer"}


def member(word: str) -> str:
    """A tensor of a foreach_ op: the second of its list, so that an error names it."""
    return f"{word}s[1]" if word in _PLURAL else f"{word}[1]"


for _op in (op for op in FOREACH_OPS if op.removeprefix("foreach_") in ROLES):
    ROLES[_op] = tuple(Role(member(r.name), r.kind, member(r.indices)) for r in ROLES[_op.removeprefix("foreach_")])

WEIGHT_OPS = (*ROLES, "select_top", "fingerprint", "fingerprint_part")
ARITHMETIC = {"scatter_add_", "fuse_", "select_top", "sparse_linear", "sparse_linear_add_"}
ARITHMETIC |= {op for op in OPS if "adamw" in op or "sgd" in op}


def weight_of(op: str) -> str:
    return "weights[1]" if op.startswith("foreach_") else "weight"


def title(op: str) -> str:
    return op.partition(".")[0]


def refused(backend: Backend, case: Case, text: str) -> None:
    """The op raises RuntimeError with exactly this text, and every argument keeps its bits."""
    before = [bits(t).clone() for _, t in case.tensors() if not t.is_meta]
    with pytest.raises(RuntimeError) as raised:
        backend(case.op, **case.args)
    assert str(raised.value) == text
    after = [bits(t) for _, t in case.tensors() if not t.is_meta]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), "a refused call changed an argument"


def placed(backend: Backend, case: Case) -> Case:
    """The case on the backend's device."""
    return Case(case.op, cases.map_tensors(lambda t: t.to(backend.device), case.args))


def valid(backend: Backend, op: str, **setup: Any) -> Case:
    return placed(backend, build(op, Setup(**{"dtype": torch.bfloat16, **setup})))


def elsewhere(backend: Backend, t: torch.Tensor) -> torch.Tensor:
    return t.to("meta" if backend.device == "cpu" else "cpu")


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same entries, every other one of a larger tensor."""
    flat = t.reshape(-1)
    return torch.stack([flat, flat], 1)[:, 0]


# Shapes, dtypes, devices, contiguity


@pytest.mark.subset
@pytest.mark.parametrize("granule", [0, -1])
@pytest.mark.parametrize("op", OPS)
def test_granule(backend: Backend, op: str, granule: int) -> None:
    case = valid(backend, op)
    case.args["granule"] = granule
    refused(backend, case, f"{title(op)}: granule must be at least 1, got {granule}")


# What a granule is a part of; the two that are left take indices of any weight.
WHOLES = {
    **{op: weight_of(op).replace("[1]", "[0]") + "'s {} entries" for op in WEIGHT_OPS},
    "sampled_grad": "weight's {} entries",
    "select_random": "numel {}",
    "check_indices": "limit {}",
    "decode_indices": "limit {}",
    "diff_": "weight's {} entries",
    "foreach_diff_": "weights[0]'s {} entries",
    "sparse_linear": "weight's {} entries",
    "sparse_linear_add_": "weight's {} entries",
}
assert {*OPS} - {*WHOLES} == {"fuse_plan", "encode_indices"}


@pytest.mark.subset
@pytest.mark.parametrize("op", WHOLES)
def test_granule_is_no_longer_than_the_whole(backend: Backend, op: str) -> None:
    """Its product with an index or with a size of entries would not fit an int64, and 2^63 - 1 wraps around to 0."""
    limited = op in ("check_indices", "decode_indices")
    for granule in (62, 2**63 - 1):
        case = valid(backend, op)
        case.args["granule"] = granule
        says = f"granule must be at most 61 for {WHOLES[op].format(61)}, got {granule}"
        if limited:
            says = f"limit must be a multiple of granule {granule} and not negative, got 61"
        refused(backend, case, f"{title(op)}: {says}")
    for granule in (2, 2**63 - 1):
        case = valid(backend, op, limit=0, count=0)
        case.args["granule"] = granule
        says = f"granule must be at most 1 for {WHOLES[op].format(0)}, got {granule}"
        refused(backend, case, f"{title(op)}: {says}")
    case = valid(backend, op, limit=0, count=0)  # of nothing there is nothing to take
    backend(op, **case.args)


def test_a_weight_of_more_entries_than_a_number_holds(backend: Backend) -> None:
    """Without tokens the arguments of `sampled_grad` are empty, whatever the shape of the weight."""
    wide = torch.zeros(0, 2**40, device=backend.device)
    at = torch.tensor([0], device=backend.device)
    case = Case("sampled_grad", {"grad_output": wide, "input": wide, "indices": at, "granule": 1})
    says = f"weight must have fewer than 2^63 entries, got shape [{2**40}, {2**40}]"
    refused(backend, case, f"sampled_grad: {says}")
    args = {"input": wide, "indices": at, "values": wide.new_ones(1), "out_features": 2**40, "granule": 1}
    refused(backend, Case("sparse_linear", args), f"sparse_linear: {says}")


@pytest.mark.parametrize("op", [*ROLES, "select_top"])
def test_granule_divides_the_weight(backend: Backend, op: str) -> None:
    case = valid(backend, op)
    case.args["granule"] = 7
    name = weight_of(op).replace("[1]", "[0]")
    refused(backend, case, f"{title(op)}: granule must divide {name}'s 61 entries, got 7")


def test_granule_divides_what_has_no_weight(backend: Backend) -> None:
    args = {"grad_output": torch.ones(2, 3), "input": torch.ones(2, 4), "indices": torch.tensor([0])}
    case = placed(backend, Case("sampled_grad", {**args, "granule": 5}))
    refused(backend, case, "sampled_grad: granule must divide weight's 12 entries, got 5")
    args = {"input": torch.ones(2, 4), "indices": torch.tensor([0]), "values": torch.ones(5), "out_features": 3}
    case = placed(backend, Case("sparse_linear", {**args, "granule": 5}))
    refused(backend, case, "sparse_linear: granule must divide weight's 12 entries, got 5")
    case = Case("select_random", {"numel": 10, "k": 1, "seed": 0, "device": None, "granule": 3})
    refused(backend, case, "select_random: granule must divide numel 10, got 3")
    for op in ("check_indices", "decode_indices"):
        case = valid(backend, op)
        case.args |= {"granule": 3}
        refused(backend, case, f"{op}: limit must be a multiple of granule 3 and not negative, got 61")


@pytest.mark.subset
@pytest.mark.parametrize("op", WEIGHT_OPS)
def test_weight_contiguous(backend: Backend, op: str) -> None:
    name = weight_of(op)
    rows, images, one = (  # on the device before they are views: a copy there would be contiguous
        torch.zeros(shape, dtype=torch.bfloat16, device=backend.device) for shape in ((10, 6), (2, 3, 2, 5), (1,))
    )
    for weight in (
        rows.t(),
        rows[:, :3],
        images.to(memory_format=torch.channels_last),
        one.expand(6),  # one entry in memory
    ):
        case = valid(backend, op)
        case.set(name, weight)
        got = f"shape {list(weight.shape)} with strides {list(weight.stride())}"
        refused(backend, case, f"{title(op)}: {name} must be contiguous, got {got}")


@pytest.mark.subset
@pytest.mark.parametrize("op", WEIGHT_OPS)
def test_weight_dtype(backend: Backend, op: str) -> None:
    name = weight_of(op)
    dtypes = (torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn, torch.complex64)
    for dtype in dtypes if op in ARITHMETIC else (torch.complex128,):
        case = valid(backend, op)
        case.set(name, torch.zeros(case.get(name).shape, dtype=dtype, device=backend.device))
        what = "be float16, bfloat16, float32 or float64" if op in ARITHMETIC else "have entries of 1, 2, 4 or 8 bytes"
        refused(backend, case, f"{title(op)}: {name} must {what}, got {str(dtype).removeprefix('torch.')}")


def roles() -> Iterator[Any]:
    for op, list_ in ROLES.items():
        for role in list_:
            yield pytest.param(op, role, id=f"{op}-{role.name}")


@pytest.mark.subset
@pytest.mark.parametrize(("op", "role"), list(roles()))
def test_device(backend: Backend, op: str, role: Role) -> None:
    case = valid(backend, op)
    there = elsewhere(backend, case.get(role.name))
    weight = case.get(weight_of(op))
    case.set(role.name, there)
    text = f"{role.name} must be on {weight_of(op)}'s device {weight.device}, got {there.device}"
    refused(backend, case, f"{title(op)}: {text}")


@pytest.mark.parametrize("op", FOREACH_OPS)
def test_one_device_a_list(backend: Backend, op: str) -> None:
    case = valid(backend, op)
    there = elsewhere(backend, case.get("weights[1]"))
    here = case.get("weights[0]").device
    case.set("weights[1]", there)
    refused(backend, case, f"{title(op)}: weights[1] must be on the device of weights[0] {here}, got {there.device}")


def dtypes_text(role: Role, weight: str, dtype: torch.dtype) -> tuple[str, set[torch.dtype]]:
    """What a refusal says, and the dtypes it refuses, for weights of this dtype."""
    name = str(dtype).removeprefix("torch.")
    every = {*cases.MOVE_DTYPES, torch.complex128}
    if role.kind == "index":
        return "must be int32 or int64", every - {torch.int32, torch.int64}
    if role.kind == "state":
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        return f"must be {str(compute).removeprefix('torch.')}", every - {compute}
    if role.kind == "own" or dtype not in FLOAT_DTYPES or dtype == torch.float32:
        return f"must have {weight}'s dtype {name}", every - {dtype}
    return f"must have {weight}'s dtype {name} or float32", every - {dtype, torch.float32}


@pytest.mark.subset
@pytest.mark.parametrize(("op", "role"), list(roles()))
def test_dtype(backend: Backend, op: str, role: Role) -> None:
    for dtype in FLOAT_DTYPES if op in ARITHMETIC else (*FLOAT_DTYPES, torch.int8, torch.complex64):
        case = valid(backend, op, dtype=dtype)
        right = case.get(role.name)
        says, wrong = dtypes_text(role, weight_of(op), dtype)
        for other in wrong if dtype == torch.bfloat16 else sorted(wrong, key=str)[:3]:
            case.set(role.name, torch.zeros(right.shape, dtype=other, device=backend.device))
            got = str(other).removeprefix("torch.")
            refused(backend, case, f"{title(op)}: {role.name} {says}, got {got}")


@pytest.mark.subset
@pytest.mark.parametrize(("op", "role"), list(roles()))
def test_shape(backend: Backend, op: str, role: Role) -> None:
    """One dimension; and as many entries as the indices and the granule say."""
    case = valid(backend, op, granule=4, limit=30, count=5)
    right = case.get(role.name)
    weight = case.get(weight_of(op))
    n = (right if role.kind == "index" else case.get(role.indices)).numel()
    enough = f"must have {4 * n} entries ({n} indices of granule 4)"
    if role.kind == "grad":
        enough += f" or {weight_of(op)}'s shape {list(weight.shape)}"
    for shape in ([1, right.numel()], [right.numel(), 1], []):
        if (op, role.kind, shape) == ("fuse_", "index", []):
            continue  # `saved` stands before `indices`, and would have too many entries
        case.set(role.name, right.view(shape) if shape else right[0])
        says = enough if role.kind == "grad" else "must be 1-D"
        refused(backend, case, f"{title(op)}: {role.name} {says}, got shape {shape}")
    if role.kind == "index":
        return
    for wrong in (4 * n - 1, 4 * n + 1, n, 0):
        case.set(role.name, torch.zeros(wrong, dtype=right.dtype, device=backend.device))
        got = f"shape [{wrong}]" if role.kind == "grad" else wrong
        refused(backend, case, f"{title(op)}: {role.name} {enough}, got {got}")


@pytest.mark.subset
@pytest.mark.parametrize(("op", "role"), list(roles()))
def test_contiguous(backend: Backend, op: str, role: Role) -> None:
    case = valid(backend, op)
    t = strided(case.get(role.name))
    case.set(role.name, t)
    refused(backend, case, f"{title(op)}: {role.name} must be contiguous, got shape [{t.numel()}] with strides [2]")


@pytest.mark.parametrize("op", [op for op in OPS if "adamw" in op or "sgd" in op])
def test_dense_gradient(backend: Backend, op: str) -> None:
    name, weight = ("grads[1]", "weights[1]") if op.startswith("foreach_") else ("grad", "weight")
    case = valid(backend, op, shape=None, limit=60)
    shape = list(case.get(weight).shape)
    n = case.get(name).numel()
    case.set(name, torch.zeros(shape[::-1], dtype=torch.bfloat16, device=backend.device))
    says = f"must have {n} entries ({n} indices of granule 1) or {weight}'s shape {shape}"
    refused(backend, case, f"{title(op)}: {name} {says}, got shape {shape[::-1]}")
    transposed = torch.zeros(shape[::-1], dtype=torch.bfloat16, device=backend.device).permute(
        *reversed(range(len(shape)))
    )
    case.set(name, transposed)
    got = f"shape {shape} with strides {list(transposed.stride())}"
    refused(backend, case, f"{title(op)}: {name} must be contiguous, got {got}")


@pytest.mark.parametrize("op", ["check_indices", "encode_indices"])
def test_indices_alone(backend: Backend, op: str) -> None:
    case = valid(backend, op)
    right = case.args["indices"]
    for wrong, says in (
        (right.to(torch.int16), "must be int32 or int64, got int16"),
        (right.to(torch.float32), "must be int32 or int64, got float32"),
        (right[None], "must be 1-D, got shape [1, 17]"),
        (strided(right), "must be contiguous, got shape [17] with strides [2]"),
    ):
        case.args["indices"] = wrong
        refused(backend, case, f"{op}: indices {says}")


def test_limit(backend: Backend) -> None:
    for op in ("check_indices", "decode_indices"):
        case = valid(backend, op)
        case.args["limit"] = -1
        refused(backend, case, f"{op}: limit must be a multiple of granule 1 and not negative, got -1")


def test_decode_arguments(backend: Backend) -> None:
    case = valid(backend, "decode_indices")
    code = case.args["code"]
    for changes, says in (
        ({"code": code.view(torch.int8)}, "code must be uint8, got int8"),
        ({"code": code[None]}, f"code must be 1-D, got shape [1, {code.numel()}]"),
        ({"code": strided(code)}, f"code must be contiguous, got shape [{code.numel()}] with strides [2]"),
        ({"count": -1}, "count must be at least 0, got -1"),
        ({"dtype": torch.int16}, "dtype must be int32 or int64, got int16"),
    ):
        refused(backend, Case("decode_indices", {**case.args, **changes}), f"decode_indices: {says}")


# The fuse family


def test_fuse_plan_arguments(backend: Backend) -> None:
    right = torch.tensor([1, 2], device=backend.device)
    there = elsewhere(backend, right)
    for lists, says in (
        ([], "indices must have 1 to 32767 tensors, got 0"),
        ([right] * 32768, "indices must have 1 to 32767 tensors, got 32768"),
        ([right, there], f"indices[1] must be on the device of indices[0] {right.device}, got {there.device}"),
        ([right, right.float()], "indices[1] must be int32 or int64, got float32"),
        ([right, right[None]], "indices[1] must be 1-D, got shape [1, 2]"),
        ([strided(right)], "indices[0] must be contiguous, got shape [2] with strides [2]"),
    ):
        if not lists and backend.device != "cpu":
            continue  # no tensor, no device: the call goes to the CPU's kernel
        refused(backend, Case("fuse_plan", {"indices": lists, "granule": 1}), f"fuse_plan: {says}")


def test_fuse_arguments(backend: Backend) -> None:
    case = valid(backend, "fuse_", granule=2)
    a = case.args
    n = len(a["indices"])
    weight, values = a["weight"], a["values"]
    there = elsewhere(backend, a["sources"])
    device = f"must be on weight's device {weight.device}, got {there.device}"
    for changes, says in (
        ({"values": []}, "values must have 1 to 32767 tensors, got 0"),
        ({"delta": [False, True]}, "delta must have one bool for each of the 3 values, got 2"),
        ({"offsets": elsewhere(backend, a["offsets"])}, f"offsets {device}"),
        ({"offsets": a["offsets"].float()}, "offsets must be int32 or int64, got float32"),
        ({"offsets": a["offsets"][None]}, "offsets must be 1-D, got shape [1, 2]"),
        (
            {"offsets": a["offsets"][1:].clone()},
            f"offsets must have 2 entries (one for each 64 of the {n} indices, and one more), got 1",
        ),
        ({"offsets": strided(a["offsets"])}, "offsets must be contiguous, got shape [2] with strides [2]"),
        ({"sources": there}, f"sources {device}"),
        ({"sources": a["sources"].int()}, "sources must be int64, got int32"),
        ({"sources": a["sources"][None]}, f"sources must be 1-D, got shape [1, {len(there)}]"),
        ({"sources": strided(a["sources"])}, f"sources must be contiguous, got shape [{len(there)}] with strides [2]"),
        ({"members": there}, f"members {device}"),
        ({"members": a["members"].int()}, "members must be int64, got int32"),
        ({"members": a["members"][None]}, f"members must be 1-D, got shape [1, {len(there)}]"),
        ({"members": strided(a["members"])}, f"members must be contiguous, got shape [{len(there)}] with strides [2]"),
        ({"members": a["members"][1:].clone()}, "members must have one entry for each of the 3 sources, got 2"),
        ({"values": [*values[:2], elsewhere(backend, values[2])]}, f"values[2] {device}"),
        (
            {"values": [*values[:2], values[2].half()]},
            "values[2] must have weight's dtype bfloat16 or float32, got float16",
        ),
        (
            {"values": [*values[:2], values[2].float()]},
            "values[2] must have the dtype of values[0] bfloat16, got float32",
        ),
        ({"values": [values[0], values[1][None], values[2]]}, "values[1] must be 1-D, got shape [1, 34]"),
        (
            {"values": [values[0], values[1][1:], values[2]]},
            "values[1] must have a multiple of granule 2 entries, got 33",
        ),
        (
            {"values": [strided(values[0]), *values[1:]]},
            "values[0] must be contiguous, got shape [34] with strides [2]",
        ),
        ({"alphas": elsewhere(backend, a["alphas"])}, f"alphas {device}"),
        ({"alphas": a["alphas"].double()}, "alphas must be float32, got float64"),
        ({"alphas": a["alphas"].bfloat16()}, "alphas must be float32, got bfloat16"),
        ({"alphas": a["alphas"][None]}, "alphas must be 1-D, got shape [1, 3]"),
        ({"alphas": a["alphas"][:2]}, "alphas must have one entry for each of the 3 values, got 2"),
        ({"alphas": strided(a["alphas"])}, "alphas must be contiguous, got shape [3] with strides [2]"),
    ):
        refused(backend, Case("fuse_", {**a, **changes}), f"fuse_: {says}")
    double = valid(backend, "fuse_", dtype=torch.float64)
    double.args["alphas"] = double.args["alphas"].float()
    refused(backend, double, "fuse_: alphas must be float64, got float32")


def test_fuse_plan_content_in_fuse(backend: Backend) -> None:
    """A plan that does not fit: the CPU reads all of it before the first write."""
    if not backend.checks_content:
        pytest.skip("GPU ops guard each access")
    case = valid(backend, "fuse_", limit=400, count=100)
    a = case.args
    total, n, union = len(a["sources"]), len(a["offsets"]), len(a["indices"])
    assert n == 5
    assert 192 < union < 255

    def changed(name: str, at: int, value: int) -> Case:
        t = a[name].clone()
        t[at] = value
        return Case("fuse_", {**a, name: t})

    rise = f"fuse_: offsets must rise from 0 to the {total} sources"
    refused(backend, changed("offsets", 0, 1), f"{rise}, got 1 at position 0")
    refused(backend, changed("offsets", 3, -1), f"{rise}, got -1 at position 3")
    refused(backend, changed("offsets", 2, total + 1), f"{rise}, got {total + 1} at position 2")
    refused(backend, changed("offsets", n - 1, total - 1), f"{rise}, got {total - 1} at position {n - 1}")
    known = "fuse_: sources must name one of the 3 values and granules of it, got adapter"
    counts = [(members % 2**64).bit_count() for members in a["members"].tolist()]

    def says(adapter: int, granule: int, at: int) -> str:
        return f"{known} {adapter}, granule {granule} with {counts[at]} members at position {at}"

    last, most = total - 1, 100 - counts[-1]  # the third adapter in the last group
    refused(backend, changed("sources", 2, 3 << 48), says(3, 0, 2))
    refused(backend, changed("sources", last, 1 << 48 | most + 1), says(1, most + 1, last))
    refused(backend, changed("sources", 0, (1 << 48) - 1), says(0, 2**48 - 1, 0))
    refused(backend, changed("sources", 1, -1), says(-1, 2**48 - 1, 1))
    at, counts[total - 6] = total - 6, 64
    refused(backend, changed("members", at, -1), says(0, int(a["sources"][at]), at))
    beyond = f"fuse_: members must name entries of the {union} indices, got entry"
    refused(backend, changed("members", last, 1 << union % 64), f"{beyond} {union} at position {last}")
    refused(backend, changed("members", last, -(2**63)), f"{beyond} 255 at position {last}")
    backend("fuse_", **changed("sources", last, 1 << 48 | 100 - counts[-1]).args)  # up to the last granule


# The gradient family


def test_sampled_grad_arguments(backend: Backend) -> None:
    case = placed(backend, Case("sampled_grad", {
        "grad_output": torch.ones(2, 3, 4), "input": torch.ones(2, 3, 5), "indices": torch.tensor([0, 3, 19]),
    }))  # fmt: skip
    a = case.args
    here, there = a["input"].device, elsewhere(backend, a["input"]).device
    device = f"must be on grad_output's device {here}, got {there}"
    floats = "must be float16, bfloat16, float32 or float64"
    for changes, says in (
        ({"grad_output": a["grad_output"].int()}, f"grad_output {floats}, got int32"),
        ({"grad_output": torch.tensor(1.0)}, "grad_output must have at least one dimension, got shape []"),
        (
            {"grad_output": torch.ones(2, 4, 3).to(here).mT},
            "grad_output must be contiguous, got shape [2, 3, 4] with strides [12, 1, 3]",
        ),
        ({"input": elsewhere(backend, a["input"])}, f"input {device}"),
        ({"input": a["input"].half()}, "input must have grad_output's dtype float32, got float16"),
        ({"input": a["input"].view(6, 5)}, "input must have shape [2, 3] before its last dimension, got shape [6, 5]"),
        (
            {"input": a["input"].view(3, 2, 5)},
            "input must have shape [2, 3] before its last dimension, got shape [3, 2, 5]",
        ),
        (
            {"input": torch.ones(2, 5, 3).to(here).mT},
            "input must be contiguous, got shape [2, 3, 5] with strides [15, 1, 3]",
        ),
        ({"indices": elsewhere(backend, a["indices"])}, f"indices {device}"),
        ({"indices": a["indices"].short()}, "indices must be int32 or int64, got int16"),
        ({"indices": a["indices"][None]}, "indices must be 1-D, got shape [1, 3]"),
        ({"indices": strided(a["indices"])}, "indices must be contiguous, got shape [3] with strides [2]"),
    ):
        refused(backend, Case("sampled_grad", {**a, **changes}), f"sampled_grad: {says}")


# The overlay family


def test_sparse_linear_arguments(backend: Backend) -> None:
    case = placed(backend, Case("sparse_linear", {
        "input": torch.ones(2, 3, 4).bfloat16(), "indices": torch.tensor([0, 3, 19]),
        "values": torch.ones(3).bfloat16(), "out_features": 5,
    }))  # fmt: skip
    a = case.args
    here, there = a["input"].device, elsewhere(backend, a["input"]).device
    device = f"must be on input's device {here}, got {there}"
    for changes, says in (
        ({"input": a["input"].int()}, "input must be float16, bfloat16, float32 or float64, got int32"),
        ({"input": a["input"][0, 0, 0]}, "input must have at least one dimension, got shape []"),
        ({"input": a["input"].mT}, "input must be contiguous, got shape [2, 4, 3] with strides [12, 1, 4]"),
        ({"out_features": -1}, "out_features must be at least 0, got -1"),
        ({"indices": elsewhere(backend, a["indices"])}, f"indices {device}"),
        ({"indices": a["indices"].short()}, "indices must be int32 or int64, got int16"),
        ({"indices": a["indices"][None]}, "indices must be 1-D, got shape [1, 3]"),
        ({"indices": strided(a["indices"])}, "indices must be contiguous, got shape [3] with strides [2]"),
        ({"values": elsewhere(backend, a["values"])}, f"values {device}"),
        ({"values": a["values"].half()}, "values must have input's dtype bfloat16 or float32, got float16"),
        ({"values": a["values"][None]}, "values must be 1-D, got shape [1, 3]"),
        ({"values": a["values"][1:]}, "values must have 3 entries (3 indices of granule 1), got 2"),
        ({"values": strided(a["values"])}, "values must be contiguous, got shape [3] with strides [2]"),
    ):
        refused(backend, Case("sparse_linear", {**a, **changes}), f"sparse_linear: {says}")


def test_sparse_linear_add_arguments(backend: Backend) -> None:
    case = valid(backend, "sparse_linear_add_", granule=4, limit=15, count=5)
    a = case.args
    indices, values, shape = a["indices"], a["values"], list(a["input"].shape)
    here, there = a["output"].device, elsewhere(backend, a["output"]).device
    device = f"must be on output's device {here}, got {there}"
    for changes, says in (
        ({"indices": []}, "indices must have 1 to 32767 tensors, got 0"),
        ({"indices": indices * 11000}, "indices must have 1 to 32767 tensors, got 33000"),
        ({"values": values[:2]}, "values must have one tensor for each of the 3 indices, got 2"),
        ({"output": a["output"].int()}, "output must be float16, bfloat16, float32 or float64, got int32"),
        ({"output": a["output"][0, 0, 0]}, "output must have at least one dimension, got shape []"),
        (
            {"output": a["output"].mT.contiguous().mT},
            f"output must be contiguous, got shape {list(a['output'].shape)} with strides [18, 1, 3]",
        ),
        ({"input": elsewhere(backend, a["input"])}, f"input {device}"),
        ({"input": a["input"].half()}, "input must have output's dtype bfloat16, got float16"),
        ({"input": a["input"][0]}, f"input must have shape [2, 3] before its last dimension, got shape {shape[1:]}"),
        (
            {"input": a["input"].mT.contiguous().mT},
            f"input must be contiguous, got shape {shape} with strides [{3 * shape[2]}, 1, 3]",
        ),
        ({"indices": [*indices[:2], elsewhere(backend, indices[2])]}, f"indices[2] {device}"),
        ({"indices": [indices[0].float(), *indices[1:]]}, "indices[0] must be int32 or int64, got float32"),
        ({"values": [values[0], elsewhere(backend, values[1]), values[2]]}, f"values[1] {device}"),
        (
            {"values": [values[0], values[1].half(), values[2]]},
            "values[1] must have output's dtype bfloat16 or float32, got float16",
        ),
        (
            {"values": [values[0], values[1].float(), values[2]]},
            "values[1] must have the dtype of values[0] bfloat16, got float32",
        ),
        (
            {"values": [*values[:2], values[2][4:]]},
            "values[2] must have 20 entries (5 indices of granule 4), got 16",
        ),
        ({"adapters": elsewhere(backend, a["adapters"])}, f"adapters {device}"),
        ({"adapters": a["adapters"].long()}, "adapters must be int32, got int64"),
        ({"adapters": a["adapters"].view(2, 3)}, "adapters must be 1-D, got shape [2, 3]"),
        ({"adapters": a["adapters"][:2]}, "adapters must have one entry for each of the 6 tokens, got 2"),
        ({"adapters": strided(a["adapters"])}, "adapters must be contiguous, got shape [6] with strides [2]"),
        ({"alphas": elsewhere(backend, a["alphas"])}, f"alphas {device}"),
        ({"alphas": a["alphas"].bfloat16()}, "alphas must be float32, got bfloat16"),
        ({"alphas": a["alphas"][:2]}, "alphas must have one entry for each of the 3 indices, got 2"),
        ({"alphas": strided(a["alphas"])}, "alphas must be contiguous, got shape [3] with strides [2]"),
    ):
        refused(backend, Case("sparse_linear_add_", {**a, **changes}), f"sparse_linear_add_: {says}")


def test_adapters_that_are_not_there(backend: Backend) -> None:
    """The CPU names the first; a GPU, which does not look, leaves such tokens as they are."""
    case = valid(backend, "sparse_linear_add_")
    before = case.args["output"].clone()
    for wrong in (3, -2, 2**31 - 1, -(2**31)):
        case.args["adapters"] = torch.tensor([-1, -1, wrong, -1, 7, -1], dtype=torch.int32, device=backend.device)
        if backend.checks_content:
            says = f"adapters must be -1 or the number of one of the 3 indices, got {wrong} at position 2"
            refused(backend, case, f"sparse_linear_add_: {says}")
        else:
            backend(case.op, **case.args)
            cases.assert_same(case.args["output"], before)


# Lists


@pytest.mark.subset
@pytest.mark.parametrize("op", FOREACH_OPS)
def test_list_lengths(backend: Backend, op: str) -> None:
    case = valid(backend, op)
    lists = [name for name, value in case.args.items() if isinstance(value, list) and name != "weights"]
    assert lists
    for name in lists:
        for wrong in (case.args[name][:2], [*case.args[name], case.args[name][0]]):
            text = f"{name} must have one tensor for each of the 3 weights, got {len(wrong)}"
            refused(backend, Case(op, {**case.args, name: wrong}), f"{title(op)}: {text}")


# Scalars


@pytest.mark.parametrize("op", ["apply_", "switch_", "foreach_apply_", "foreach_switch_"])
def test_strengths_need_a_float_dtype(backend: Backend, op: str) -> None:
    for dtype in (torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn, torch.complex64):
        for alpha, delta in ((0.5, False), (1.0, True), (0.0, False), (-2.5, True)):
            case = valid(backend, op, dtype=dtype)
            case.args |= {"alpha": alpha, "delta": delta}
            name = str(dtype).removeprefix("torch.")
            says = f"alpha must be 1 and delta False for weights of dtype {name}, got alpha {alpha:g}, delta {delta}"
            refused(backend, case, f"{op}: {says}")


def scalar_refusals() -> Iterator[Any]:
    infinite, nan = float("inf"), float("nan")
    for prefix, plural in (("", ""), ("foreach_", "s")):
        for step in (0, -3):
            yield f"{prefix}adamw_", {"step": step}, f"step must be at least 1, got {step}"
        for op in ("adamw_", "sgd_"):
            for lr in (infinite, -infinite):
                yield f"{prefix}{op}", {"lr": lr}, f"lr must be finite, got {lr:g}"
            yield f"{prefix}{op}", {"lr": nan}, "lr must be finite, got nan"
            yield f"{prefix}{op}", {"weight_decay": nan}, "weight_decay must be finite, got nan"
        for beta in ("beta1", "beta2"):
            for number in (1.0, -0.5, nan):
                yield f"{prefix}adamw_", {beta: number}, f"{beta} must be in [0, 1), got {number:g}"
        yield f"{prefix}adamw_.tensor", {"eps": infinite}, "eps must be finite, got inf"
        yield f"{prefix}adamw_", {"eps": -1e-8}, "eps must be at least 0, got -1e-08"
        yield f"{prefix}sgd_", {"momentum": nan}, "momentum must be finite, got nan"
        yield f"{prefix}sgd_.tensor", {"dampening": -infinite}, "dampening must be finite, got -inf"
        buffer = f"momentum_buffer{plural}"
        given = "a list" if plural else "one"
        for overload in ("", ".tensor"):
            op = f"{prefix}sgd_{overload}"
            yield op, {"momentum": 0.0, "dampening": 0.0}, f"{buffer} must be None for momentum 0, got {given}"
            yield op, {buffer: None}, f"{buffer} must be given for momentum 0.9, got None"
            nesterov = "nesterov must come with momentum above 0 and dampening 0, got"
            yield op, {"nesterov": True}, f"{nesterov} momentum 0.9, dampening 0.1"
            none = {"nesterov": True, "momentum": 0.0, "dampening": 0.0, buffer: None}
            yield op, none, f"{nesterov} momentum 0, dampening 0"
    yield "select_top", {"score": "foo"}, 'score must be magnitude, grad or snip, got "foo"'
    yield "select_top", {"score": ""}, 'score must be magnitude, grad or snip, got ""'
    yield "select_top", {"k": 62}, "k must be in [0, 61], got 62"
    yield "select_top", {"k": -1}, "k must be in [0, 61], got -1"
    for score in ("grad", "snip"):
        yield "select_top", {"score": score, "grad": None}, f"grad must be given for score {score}, got None"
    yield "select_random", {"k": 62}, "k must be in [0, 61], got 62"
    yield "select_random", {"k": -1}, "k must be in [0, 61], got -1"
    yield "select_random", {"numel": -5}, "numel must be at least 0, got -5"


@pytest.mark.subset
@pytest.mark.parametrize(
    ("op", "changes", "says"), [pytest.param(*r, id=f"{r[0]}-{i}") for i, r in enumerate(scalar_refusals())]
)
def test_scalars(backend: Backend, op: str, changes: dict[str, Any], says: str) -> None:
    case = valid(backend, op)
    case.args |= changes
    refused(backend, case, f"{title(op)}: {says}")


@pytest.mark.parametrize("op", [op for op in OPS if op.endswith(".tensor")])
def test_scalar_tensors(backend: Backend, op: str) -> None:
    case = valid(backend, op)
    weight = weight_of(op).replace("[1]", "[0]")
    here = case.get(weight).device
    for name, allowed in (("step", "int64 or float32"), ("lr", "float32 or float64")):
        if name not in case.args:
            continue
        right = case.args[name]
        there = elsewhere(backend, right)
        for wrong, says in (
            (there, f"must be on {weight}'s device {here}, got {there.device}"),
            (right.to(torch.int32), f"must be {allowed}, got int32"),
            (right.to(torch.float16), f"must be {allowed}, got float16"),
            (right.repeat(2), "must have 1 entry, got shape [2]"),
            (right.repeat(0), "must have 1 entry, got shape [0]"),
        ):
            refused(backend, Case(op, {**case.args, name: wrong}), f"{title(op)}: {name} {says}")


def test_select_top_gradient(backend: Backend) -> None:
    case = valid(backend, "select_top", limit=60)
    a = case.args
    shape, here = list(a["weight"].shape), a["weight"].device
    there = elsewhere(backend, a["grad"])
    flipped = torch.zeros(shape[::-1], dtype=torch.bfloat16, device=here)
    transposed = flipped.permute(*reversed(range(len(shape))))
    for grad, says in (
        (there, f"must be on weight's device {here}, got {there.device}"),
        (a["grad"].half(), "must have weight's dtype bfloat16 or float32, got float16"),
        (flipped, f"must have weight's shape {shape}, got shape {shape[::-1]}"),
        (a["grad"].view(-1), f"must have weight's shape {shape}, got shape [60]"),
        (transposed, f"must be contiguous, got shape {shape} with strides {list(transposed.stride())}"),
    ):
        refused(backend, Case("select_top", {**a, "grad": grad}), f"select_top: grad {says}")


# Memory


def share(backend: Backend, case: Case, first: str, second: str, shift: Callable[[int, int, int], int]) -> None:
    """Moves two tensors into one memory: `second` starts `shift(bytes of first, bytes of second, itemsize)` after."""
    a, b = case.get(first), case.get(second)
    size_a, size_b = a.numel() * a.element_size(), b.numel() * b.element_size()
    grain = max(a.element_size(), b.element_size())
    start = shift(size_a, size_b, grain)
    low = max(0, -start)
    raw = torch.zeros(low + max(size_a, start + size_b) + grain, dtype=torch.uint8, device=backend.device)
    for name, t, at in ((first, a, low), (second, b, low + start)):
        view = raw[at : at + t.numel() * t.element_size()].view(t.dtype).view(t.shape)
        view.copy_(t)
        case.set(name, view)


def start_together(size_a: int, size_b: int, grain: int) -> int:
    return 0


def last_bytes(size_a: int, size_b: int, grain: int) -> int:
    return (size_a - 1) // grain * grain


def first_bytes(size_a: int, size_b: int, grain: int) -> int:
    return -((size_b - 1) // grain * grain)


def just_after(size_a: int, size_b: int, grain: int) -> int:
    return (size_a + grain - 1) // grain * grain


def just_before(size_a: int, size_b: int, grain: int) -> int:
    return -((size_b + grain - 1) // grain * grain)


def pairs(op: str, case: Case) -> Iterator[tuple[str, str]]:
    """Every pair of tensors of which the call writes at least one, in the order of the schema."""
    written = {name for name, _ in case.mutated()}
    names = [name for name, t in case.tensors() if t.numel()]
    order = [a.name for a in cases.schema_of(op).arguments]
    names.sort(key=lambda name: order.index(name.partition("[")[0]))
    for first, second in itertools.combinations(names, 2):
        if first in written or second in written:
            yield first, second


@pytest.mark.subset
@pytest.mark.parametrize("op", MUTATING_OPS)
def test_overlap(backend: Backend, op: str) -> None:
    """Exact, at the last bytes, at the first bytes; the later argument is named first."""
    found = 0
    for first, second in pairs(op, valid(backend, op)):
        for shift in (start_together, last_bytes, first_bytes):
            case = valid(backend, op)
            share(backend, case, first, second, shift)
            refused(backend, case, f"{title(op)}: {second} must not overlap {first} in memory")
            found += 1
    assert found >= 3


@pytest.mark.parametrize("op", MUTATING_OPS)
def test_neighbours_in_memory_are_fine(backend: Backend, op: str) -> None:
    """One tensor may end where the next begins: nothing is refused that can be done."""
    wanted = cases.run(cases.REFERENCE, build(op, Setup(dtype=torch.bfloat16)))
    for first, second in pairs(op, valid(backend, op)):
        for shift in (just_after, just_before):
            case = valid(backend, op)
            share(backend, case, first, second, shift)
            result = backend(op, **case.args)
            cases.assert_same({"result": result, **cases.without_device(case.args)}, wanted)


@pytest.mark.parametrize("dtype", cases.INDEX_DTYPES, ids=str)
def test_a_weight_of_integers_as_its_own_indices(backend: Backend, dtype: torch.dtype) -> None:
    weight = torch.arange(8, dtype=dtype, device=backend.device)
    values = torch.zeros(8, dtype=dtype, device=backend.device)
    for op in ("scatter_", "swap_"):
        case = Case(op, {"weight": weight, "indices": weight, "values": values})
        refused(backend, case, f"{op}: indices must not overlap weight in memory")
        case = Case(op, {"weight": weight, "indices": values[:0], "values": values[:0]})
        backend(op, **case.args)  # nothing selected: nothing to refuse


def test_one_weight_twice_in_a_list(backend: Backend) -> None:
    for op in (op for op in FOREACH_OPS if "weights" in cases.mutated_names(op)):
        case = valid(backend, op, count=17)
        case.set("weights[1]", case.get("weights[0]"))
        case.args["granule"] = 1
        for name in list(case.args):  # the second weight's arguments as the first's, in memory of their own
            if isinstance(case.args[name], list) and name != "weights":
                case.set(f"{name}[1]", case.get(f"{name}[0]").clone())
        refused(backend, case, f"{title(op)}: weights[1] must not overlap weights[0] in memory")


def test_halves_of_one_weight_in_a_list(backend: Backend) -> None:
    """Views of one storage that do not overlap are two weights."""
    whole = torch.zeros(10, device=backend.device)
    at, one = torch.tensor([0, 4], device=backend.device), torch.ones(2, device=backend.device)
    backend("foreach_scatter_", weights=[whole[:5], whole[5:]], indices=[at, at], values=[one, one])
    assert whole.tolist() == [1, 0, 0, 0, 1, 1, 0, 0, 0, 1]
    case = Case("foreach_scatter_", {"weights": [whole[:6], whole[5:]], "indices": [at, at], "values": [one, one]})
    refused(backend, case, "foreach_scatter_: weights[1] must not overlap weights[0] in memory")


# Memory that is not there


@pytest.mark.subset
@pytest.mark.parametrize("left", [0, 1], ids=["freed", "shrunk"])
@pytest.mark.parametrize("op", [op for op in OPS if op != "select_random"])
def test_storage_that_was_freed(backend: Backend, op: str, left: int) -> None:
    """Sharding frees the storage of weights between uses; the tensors keep their shapes."""
    names = [name for name, t in valid(backend, op).tensors() if t.numel()]
    assert names
    for name in names:
        case = valid(backend, op)
        lost = case.get(name).clone()
        case.set(name, lost)
        size = lost.numel() * lost.element_size()
        lost.untyped_storage().resize_(left * (size - 1))
        before = {other: bits(t).clone() for other, t in case.tensors() if t is not lost}
        with pytest.raises(RuntimeError) as raised:
            backend(case.op, **case.args)
        wanted = f"must lie within its storage, up to byte {size}, got a storage of {left * (size - 1)} bytes"
        assert str(raised.value) == f"{title(op)}: {name} {wanted}"
        assert all(torch.equal(bits(t), before[other]) for other, t in case.tensors() if t is not lost)


@pytest.mark.subset
@pytest.mark.parametrize("op", [op for op in OPS if op != "select_random"])
def test_memory_that_starts_between_two_entries(backend: Backend, op: str) -> None:
    """Memory of numpy or of mapped files may; torch itself makes no such tensor."""
    if backend.device != "cpu":
        pytest.skip("torch makes no such tensor on a GPU")
    names = [name for name, t in valid(backend, op).tensors() if t.numel() and t.element_size() > 1]
    for name, past in itertools.product(names, (1, -1)):
        case = valid(backend, op)
        t = case.get(name)
        size = t.element_size()
        raw = np.zeros(t.numel() * size + 32, dtype=np.uint8)
        start = -raw.ctypes.data % 16 + 8 + past
        data = torch.from_numpy(raw[start : start + t.numel() * size]).view(t.dtype).view(t.shape)
        assert data.data_ptr() % size == past % size
        data.copy_(t)
        case.set(name, data)
        says = f"must start at a multiple of its entries' {size} bytes, got {past % size} more (its clone() is aligned)"
        refused(backend, case, f"{title(op)}: {name} {says}")


# Kinds of tensors


def other_kinds(t: torch.Tensor) -> Iterator[tuple[torch.Tensor, str]]:
    if t.dtype in (torch.bfloat16, torch.float32):
        yield t.to_mkldnn(), "one of layout _mkldnn"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of prototypes, and of what torch means to drop
        yield torch.sparse_coo_tensor(size=t.shape, dtype=t.dtype), "one of layout sparse_coo"
        yield torch.nested.nested_tensor([t.view(-1)]), "a nested one"
        yield torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8), "a quantized one"


@pytest.mark.subset
@pytest.mark.parametrize("op", [op for op in OPS if op != "select_random"])
def test_tensors_without_a_kernel(backend: Backend, op: str) -> None:
    """Sparse, nested, mkldnn and quantized ones, in any place: nothing runs, and nothing is written."""
    if not backend.dispatches or backend.device != "cpu":
        pytest.skip("the dispatcher chooses, and a GPU has not all of them")
    for name, right in list(valid(backend, op).tensors()):
        for other, kind in other_kinds(right):
            case = valid(backend, op)
            case.set(name, other)
            before = {at: bits(t).clone() for at, t in case.tensors() if t is not other}
            with pytest.raises(RuntimeError) as raised:
                backend(case.op, **case.args)
            says = f"must be a dense tensor on a CPU or a CUDA device, got {kind}"
            assert str(raised.value) == f"{title(op)}: {name} {says}"
            assert all(torch.equal(bits(t), before[at]) for at, t in case.tensors() if t is not other)


@pytest.mark.subset
@pytest.mark.parametrize("op", [op for op in OPS if op != "select_random"])
def test_none_for_a_tensor(backend: Backend, op: str) -> None:
    """The dispatcher lets None pass as a tensor that is not there."""
    if backend is cases.EMULATOR:
        pytest.skip("the dispatcher lets it pass")
    for name in [a.name for a in cases.schema_of(op).arguments if str(a.type) == "Tensor"]:
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            case = valid(backend, op)
            case.args[name] = None
            with mode():
                refused(backend, case, f"{title(op)}: {name} must be a tensor, got None")


@pytest.mark.subset
@pytest.mark.parametrize("op", MUTATING_OPS)
def test_lazy_views(backend: Backend, op: str) -> None:
    """Conjugated or negated only when they are read: torch would write a copy, and then not find a result."""
    if not backend.dispatches:
        pytest.skip("torch resolves them before a kernel is called")
    for how in ("conjugated", "negated"):
        case = valid(backend, op, dtype=torch.float32 if op in ARITHMETIC else torch.complex64)
        for name, t in list(case.tensors()):
            if how == "conjugated" and not t.is_complex():
                continue
            view = t.conj() if how == "conjugated" else torch._neg_view(t)
            lazy = Case(op, dict(case.args))
            lazy.set(name, view)
            resolve = "resolve_conj" if how == "conjugated" else "resolve_neg"
            says = f"must hold its own numbers, got a lazily {how} view (pass {resolve}() of it)"
            before = {at: bits(t).clone() for at, t in case.tensors()}
            with pytest.raises(RuntimeError) as raised:
                backend(op, **lazy.args)
            assert str(raised.value) == f"{title(op)}: {name} {says}"
            assert all(torch.equal(bits(t), before[at]) for at, t in case.tensors())


def test_lazy_views_are_read_resolved(backend: Backend) -> None:
    """Where nothing is written torch passes copies, as to ops of its own."""
    if not backend.dispatches:
        pytest.skip("torch resolves them before a kernel is called")
    case = valid(backend, "gather", dtype=torch.complex64)
    weight, at = case.args["weight"], case.args["indices"]
    assert torch.equal(backend("gather", weight=weight.conj(), indices=at), weight.view(-1)[at].conj())
    pair = backend("foreach_gather", weights=[weight, torch._neg_view(weight)], indices=[at, at])
    assert torch.equal(pair[1], -weight.view(-1)[at])
    assert backend("fingerprint", weight=weight.conj()) == backend("fingerprint", weight=weight.conj().resolve_conj())


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("op", ["foreach_sgd_", "foreach_sgd_.tensor"])
def test_a_fake_tensor_in_an_optional_list(backend: Backend, op: str, inference: bool) -> None:
    """torch does not look there when it chooses a kernel, and a fake tensor has no memory."""
    with torch.inference_mode(inference):
        case = valid(backend, op)
        case.set("momentum_buffers[1]", FakeTensorMode().from_tensor(case.get("momentum_buffers[1]")))
        before = [bits(t).clone() for name, t in case.tensors() if name != "momentum_buffers[1]"]
        says = "must have memory, got a tensor without any"
        # torch may be the first to notice, each version in its own words.
        theirs = "convert all Tensors to FakeTensors|tls_on_entry"
        with pytest.raises((RuntimeError, AssertionError), match=rf"{says}|{theirs}"):
            backend(op, **case.args)
        after = [bits(t) for name, t in case.tensors() if name != "momentum_buffers[1]"]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


# Content


def index_lists() -> Iterator[Any]:
    for op, list_ in ROLES.items():
        for role in list_:
            if role.kind == "index":
                yield pytest.param(op, role.name, id=f"{op}-{role.name}")
    yield pytest.param("check_indices", "indices")
    yield pytest.param("sampled_grad", "indices")
    yield pytest.param("sparse_linear", "indices")
    yield pytest.param("sparse_linear_add_", "indices[1]")


def offences(n: int, granules: int) -> Iterator[tuple[list[tuple[int, int]], str]]:
    """Changes to arange(n), and what the refusal says was got."""
    yield [(0, -1)], "-1 at position 0"
    yield [(n - 1, granules)], f"{granules} at position {n - 1}"
    yield [(n - 1, n - 2)], f"{n - 2} after {n - 2} at position {n - 1}"
    yield [(1, 0)], "0 after 0 at position 1"
    yield [(5, 3)], "3 after 4 at position 5"
    for at in (7, 8, 15, 16, 31, 32, 63, 64):  # around the lanes of a vector
        if at < n:
            yield [(at, at - 1)], f"{at - 1} after {at - 1} at position {at}"
            yield [(at, -7)], f"-7 at position {at}"
    yield [(4, granules), (2, 1)], "1 after 1 at position 2"  # the first is named
    yield [(4, 3), (2, granules + 5)], f"{granules + 5} at position 2"
    yield [(3, -9)], "-9 at position 3"  # out of range is reported before not increasing
    yield [(3, -(2**31))], f"{-(2**31)} at position 3"
    yield [(3, 2**31 - 1)], f"{2**31 - 1} at position 3"


WIDE = (2**32 + 3, 2**63 - 1, -(2**63), -(2**32) + 3)  # their low 32 bits may look harmless


@pytest.mark.subset
@pytest.mark.parametrize("index", cases.INDEX_DTYPES, ids=str)
@pytest.mark.parametrize(("op", "name"), list(index_lists()))
def test_content(backend: Backend, op: str, name: str, index: torch.dtype) -> None:
    if not backend.checks_content and op != "check_indices":
        pytest.skip("GPU ops guard each access; check_indices looks at the content")
    for granule, count in ((1, 70), (4, 9)):
        case = valid(backend, op, granule=granule, limit=count + 11, count=count, index=index)
        n = case.get(name).numel()
        granules = count + 11 + (2 if op.startswith("foreach_") else 0)
        ordered = torch.arange(n, dtype=index)
        wide = [([(3, x)], f"{x} at position 3") for x in WIDE] if index == torch.int64 else []
        for changes, got in itertools.chain(offences(n, granules), wide):
            bad = ordered.clone()
            for at, value in changes:
                bad[at] = value
            case.set(name, bad.to(backend.device))
            says = f"must be strictly increasing in [0, {granules}), got {got}"
            refused(backend, case, f"{title(op)}: {name} {says}")


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("op", ["gather", "swap_", "apply_", "switch_", "scatter_add_", "check_indices"])
def test_content_of_many_entries(backend: Backend, op: str) -> None:
    """Threads share the check, and the first offence is named all the same."""
    if not backend.checks_content and op != "check_indices":
        pytest.skip("GPU ops guard each access; check_indices looks at the content")
    n = 100_003
    for index, at in itertools.product(cases.INDEX_DTYPES, (8191, 8192, 50_001, n - 1)):
        case = valid(backend, op, limit=2 * n, count=n, index=index)
        name = "indices_in" if op == "switch_" else "indices"
        bad = torch.arange(n, dtype=index)
        bad[at] = at - 1
        bad[min(at + 30_000, n - 1)] = -1 if at < n - 1 else at - 1
        case.set(name, bad.to(backend.device))
        says = f"must be strictly increasing in [0, {2 * n}), got {at - 1} after {at - 1} at position {at}"
        refused(backend, case, f"{op}: {name} {says}")


def test_content_of_fuse_plan_and_encode(backend: Backend) -> None:
    """No weight, no bound: only the order, and nothing below 0."""
    for index in cases.INDEX_DTYPES:
        for bad, got in (
            ([-1, 2, 3], "-1 at position 0"),
            ([0, 2, 2], "2 after 2 at position 2"),
            ([0, 5, 3], "3 after 5 at position 2"),
        ):
            indices = torch.tensor(bad, dtype=index, device=backend.device)
            says = f"must be strictly increasing and at least 0, got {got}"
            refused(backend, Case("encode_indices", {"indices": indices}), f"encode_indices: indices {says}")
            good = torch.tensor([0, 1], dtype=index, device=backend.device)
            refused(backend, Case("fuse_plan", {"indices": [good, indices]}), f"fuse_plan: indices[1] {says}")


def test_check_indices_counts_granules(backend: Backend) -> None:
    """`limit` counts entries: the bound is the number of granules."""
    indices = torch.tensor([0, 5], device=backend.device)
    backend("check_indices", indices=indices, limit=48, granule=8)
    case = Case("check_indices", {"indices": indices, "limit": 40, "granule": 8})
    refused(backend, case, "check_indices: indices must be strictly increasing in [0, 5), got 5 at position 1")
    empty = Case("check_indices", {"indices": indices[:1], "limit": 0, "granule": 1})
    refused(backend, empty, "check_indices: indices must be strictly increasing in [0, 0), got 0 at position 0")


# How the Python checks are called


@pytest.mark.parametrize("op", OPS)
def test_a_call_that_is_not_refused_puts_no_sentence_together(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Checks stand before every call, and sentences cost more than they do."""
    case = build(op, Setup(dtype=torch.bfloat16))
    wanted = cases.REFERENCE(op, **case.clone().args)
    monkeypatch.setattr(shira_ops.checks, "_text", None)
    monkeypatch.setattr(torch, "_check", None)
    cases.assert_same(cases.REFERENCE(op, **case.clone().args), wanted)
    with pytest.raises(TypeError, match="not callable"):
        cases.REFERENCE(op, **{**case.clone().args, "granule": 0})


def test_arguments_are_bound_by_the_schema() -> None:
    """By position, by name, and with the schema's defaults, as the dispatcher does."""
    w, at, v = torch.zeros(4), torch.tensor([1]), torch.ones(1)
    reference = cases.REFERENCE.find("scatter_")
    for call in (lambda: reference(w, at, v), lambda: reference(granule=1, values=v, indices=at, weight=w)):
        w.zero_()
        call()
        assert w.tolist() == [0, 1, 0, 0]
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: reference(w, at), "2 by position and none by name"),
        (lambda: reference(w, at, v, 1, 2), "5 by position and none by name"),
        (lambda: reference(w, at, values=v, alpha=2), "2 by position and values, alpha by name"),
        (lambda: reference(w, at, v, values=v), "3 by position and values by name"),
    ]
    for call, got in wrong:
        with pytest.raises(TypeError) as raised:
            call()
        assert str(raised.value) == f"scatter_: takes weight, indices, values, granule, got {got}"


# Which refusal comes first


def test_order(backend: Backend) -> None:
    """With several offences the earlier check speaks: granule, lists, weight, tensors, scalars, memory, content."""
    case = valid(backend, "apply_", dtype=torch.int8)
    a = case.args
    bad_content = torch.full_like(a["indices"], -1)
    steps: list[tuple[dict[str, Any], str]] = [
        ({"granule": 0}, "granule must be at least 1, got 0"),
        ({"weight": strided(a["weight"])}, "weight must be contiguous, got shape [61] with strides [2]"),
        ({"indices": bad_content.short()}, "indices must be int32 or int64, got int16"),
        ({"values": a["values"].half()}, "values must have weight's dtype int8, got float16"),
        ({"saved": a["saved"][:3]}, "saved must have 17 entries (17 indices of granule 1), got 3"),
        (
            {"alpha": 0.5},
            "alpha must be 1 and delta False for weights of dtype int8, got alpha 0.5, delta False",
        ),
        ({"saved": a["weight"].view(-1)[:17]}, "saved must not overlap weight in memory"),
    ]
    last = {"indices": bad_content}
    for i, (_, says) in enumerate(steps):
        args = {**a, **last}
        for changes, _ in reversed(steps[i:]):
            args |= changes
        refused(backend, Case("apply_", args), f"apply_: {says}")
    says = "indices must be strictly increasing in [0, 61), got -1 at position 0"
    if backend.checks_content:
        refused(backend, Case("apply_", {**a, **last}), f"apply_: {says}")


def test_lists_are_checked_whole_before_the_first_write(backend: Backend) -> None:
    """An offence in the last member leaves the first as it was."""
    for op in (op for op in FOREACH_OPS if op in MUTATING_OPS and op in ROLES and ".tensor" not in op):
        case = valid(backend, op)
        index = "indices_in" if op == "foreach_switch_" else "indices"
        name = f"{index}[1]"
        bad = case.get(name).clone()
        bad[-1] = 63
        if backend.checks_content:
            says = "must be strictly increasing in [0, 63), got 63 at position 17"
            case.set(name, bad)
            refused(backend, case, f"{op}: {name} {says}")


def test_empty_weight(backend: Backend) -> None:
    """Without entries there is nothing an index could select."""
    if not backend.checks_content:
        pytest.skip("GPU ops guard each access")
    empty = torch.zeros(0, 4, device=backend.device)
    at = torch.tensor([0], device=backend.device)
    case = Case("gather", {"weight": empty, "indices": at, "granule": 1})
    refused(backend, case, "gather: indices must be strictly increasing in [0, 0), got 0 at position 0")


def test_a_gpu_skips_what_is_out_of_range(backend: Backend) -> None:
    """No index reaches memory outside the weight, and gather yields 0 there."""
    if backend.checks_content:
        pytest.skip("CPU ops refuse")
    whole = torch.full((32,), 7.0, device=backend.device)
    weight = whole[8:24]
    indices = torch.tensor([-3, 2, 16, 2**40], device=backend.device)
    given = backend("gather", weight=weight, indices=indices)
    assert given.tolist() == [0, 7, 0, 0]
    backend("scatter_", weight=weight, indices=indices, values=torch.arange(4.0, device=backend.device))
    wanted = np.full(32, 7.0)
    wanted[8 + 2] = 1
    assert whole.tolist() == wanted.tolist()
