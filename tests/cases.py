"""What every contract test shares: the backends, random valid cases of every op, bit-exact comparison.

A backend is a way to call the ops. Add one to BACKENDS and every contract test proves it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import emul
import oracles
import shira_ops
import shira_ops.reference
import shira_ops.triton

MOVE_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
ALL = "numel"  # the granule that is the whole weight
GRANULES = (1, 3, 8, 16, 32, ALL)

# Every tolerance of the contract tests. Whatever is not named here is compared bit for bit.
TOLERANCE = {
    # relative: torch.optim folds the same formulas in another order; 100 steps collect a few ulps of 6e-8
    ("optim", torch.float32): 1e-6,
    # relative: the same in fp64, whose ulp is 1.1e-16
    ("optim", torch.float64): 1e-12,
    # of sum |grad_output * input|: the order of the sum is free; at most 33 terms, each rounding by 6e-8
    ("sampled_grad", torch.float32): 33 * 2.0**-24,
    # the same in fp64
    ("sampled_grad", torch.float64): 33 * 2.0**-53,
    # of sum |value * input|, before the one rounding to the dtype: at most 64 terms
    ("sparse_linear", torch.float32): 64 * 2.0**-24,
    ("sparse_linear", torch.float64): 64 * 2.0**-53,
}


# Backends


@dataclass(frozen=True)
class Backend:
    """A way to call the ops: `find` takes an op's name ("adamw_.tensor") and gives its function."""

    name: str
    device: str
    find: Callable[[str], Callable[..., Any]]
    checks_content: bool = True  # CPU ops check every index; GPU ops guard each access
    dispatches: bool = True  # calls are torch.ops.shira's: autograd stands before them
    has: Callable[[str], bool] = lambda op: True

    def __call__(self, op: str, **args: Any) -> Any:
        if not self.has(op):
            pytest.skip(f"{self.name} has no {op}")
        return self.find(op)(**args)


def of_namespace(namespace: str) -> Callable[[str], Callable[..., Any]]:
    def find(op: str) -> Callable[..., Any]:
        packet, _, overload = op.partition(".")
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")

    return find


def of_module(module: Any) -> Callable[[str], Callable[..., Any]]:
    """Functions named as the ops; overload `adamw_.tensor` is the function `adamw_tensor_`."""

    def find(op: str) -> Callable[..., Any]:
        packet, _, overload = op.partition(".")
        return getattr(module, f"{packet}{overload}_" if overload else packet)

    return find


def of_emulator(op: str) -> Callable[..., Any]:
    emul.library()
    return of_namespace("shira_emul")(op)


@cache
def emulator_has(op: str) -> bool:
    emul.library()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"shira_emul::{op}", "CompositeExplicitAutograd")


DISPATCHER = Backend("dispatcher", "cpu", of_namespace("shira"))
REFERENCE = Backend("reference", "cpu", of_module(shira_ops.reference), dispatches=False)
ORACLE = Backend("oracle", "cpu", of_module(oracles), dispatches=False)
# The CUDA kernels, run on the CPU: see tests/emul.
EMULATOR = Backend("emulator", "cpu", of_emulator, checks_content=False, dispatches=False, has=emulator_has)
BACKENDS = [DISPATCHER, REFERENCE, EMULATOR]
if torch.cuda.is_available():
    BACKENDS.append(Backend("cuda", "cuda", of_namespace("shira"), checks_content=False))
if os.environ.get("TRITON_INTERPRET") == "1":  # the kernels on CPU tensors, in a process of its own: test_triton.py
    BACKENDS = [Backend("triton", "cpu", shira_ops.triton.find, checks_content=False)]


# Schemas


@cache
def schema_of(op: str) -> torch.FunctionSchema:
    return of_namespace("shira")(op)._schema


def op_names() -> list[str]:
    """Every public op that is registered, overloads by their own names."""
    names = (name.removeprefix("shira::") for name in torch._C._dispatch_get_all_op_names())
    registered = torch._C._dispatch_get_all_op_names()
    return sorted(
        name for name, full in zip(names, registered, strict=True) if full.startswith("shira::") and name[0] != "_"
    )


def mutated_names(op: str) -> list[str]:
    return [a.name for a in schema_of(op).arguments if a.alias_info is not None and a.alias_info.is_write]


# Bits


_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t: torch.Tensor) -> torch.Tensor:
    """The tensor's entries as integers, so that NaN payloads and -0.0 count."""
    t = t.detach().cpu().contiguous()
    if t.dtype == torch.complex128:
        t = torch.view_as_real(t)
    return t.view(_INTEGER[t.element_size()])


def assert_same(given: Any, wanted: Any, where: str = "result") -> None:
    """Equal in structure, dtype, shape and every bit."""
    if isinstance(wanted, torch.Tensor):
        assert isinstance(given, torch.Tensor), f"{where}: got {type(given).__name__}"
        assert given.dtype == wanted.dtype, f"{where}: dtype {given.dtype}, wanted {wanted.dtype}"
        assert given.shape == wanted.shape, f"{where}: shape {list(given.shape)}, wanted {list(wanted.shape)}"
        a, b = bits(given).view(-1), bits(wanted).view(-1)
        if not torch.equal(a, b):
            at = int((a != b).nonzero()[0])
            mask = (1 << (8 * a.element_size())) - 1
            raise AssertionError(
                f"{where}: {int((a != b).sum())} of {a.numel()} entries differ; first at {at}: "
                f"{given.detach().cpu().reshape(-1)[at].item()} (0x{int(a[at]) & mask:x}), "
                f"wanted {wanted.detach().cpu().reshape(-1)[at].item()} (0x{int(b[at]) & mask:x})"
            )
    elif isinstance(wanted, (list, tuple)):
        assert len(given) == len(wanted), f"{where}: {len(given)} members, wanted {len(wanted)}"
        for i, (a, b) in enumerate(zip(given, wanted, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(wanted, dict):
        assert given.keys() == wanted.keys(), f"{where}: {given.keys()}"
        for key in wanted:
            assert_same(given[key], wanted[key], key)
    else:
        assert given == wanted or (given != given and wanted != wanted), f"{where}: {given!r}, wanted {wanted!r}"


# Cases


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return [map_tensors(function, v) for v in value]
    if isinstance(value, dict):
        return {k: map_tensors(function, v) for k, v in value.items()}
    return value


@dataclass
class Case:
    """One valid call: an op's name and its arguments by name."""

    op: str
    args: dict[str, Any]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor with its name in the refusals: `values`, or `values[1]` within a list."""
        for name, value in self.args.items():
            if isinstance(value, torch.Tensor):
                yield name, value
            elif isinstance(value, (list, tuple)):
                yield from ((f"{name}[{i}]", v) for i, v in enumerate(value) if isinstance(v, torch.Tensor))

    def mutated(self) -> Iterator[tuple[str, torch.Tensor]]:
        names = mutated_names(self.op)
        return ((name, t) for name, t in self.tensors() if name.partition("[")[0] in names)

    def get(self, name: str) -> torch.Tensor:
        return dict(self.tensors())[name]

    def set(self, name: str, value: Any) -> None:
        word, _, member = name.partition("[")
        if member:
            self.args[word] = list(self.args[word])
            self.args[word][int(member[:-1])] = value
        else:
            assert word in self.args
            self.args[word] = value

    def clone(self) -> Case:
        """A copy whose tensors are not views (views share a version counter)."""
        return Case(self.op, map_tensors(lambda t: t.detach().clone(), self.args))

    def split(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword-only arguments, as the schema has them."""
        arguments = [a for a in schema_of(self.op).arguments if a.name in self.args]
        return (
            tuple(self.args[a.name] for a in arguments if not a.kwarg_only),
            {a.name: self.args[a.name] for a in arguments if a.kwarg_only},
        )


_GUARD_BYTES, _GUARD = 64, 0xA5


def place(t: torch.Tensor, device: str, offset: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A copy `offset` entries past an aligned address, between guard bytes, and the memory it lies in."""
    size = t.element_size()
    start, length = _GUARD_BYTES + offset * size, t.numel() * size
    raw = torch.full((start + length + _GUARD_BYTES,), _GUARD, dtype=torch.uint8, device=device)
    placed = raw[start : start + length].view(t.dtype).view(t.shape)
    placed.view(_INTEGER[size]).copy_(t.contiguous().view(_INTEGER[size]))
    return placed, raw, start


def run(backend: Backend, case: Case, *, offset: int = 0) -> dict[str, Any]:
    """Calls the op on copies of the case's tensors: its result, and every argument as it is afterwards, on the CPU.

    The copies lie `offset` entries past an aligned address, and the bytes around them must stay as they were.
    """
    memory = []

    def copy(t: torch.Tensor) -> torch.Tensor:
        placed, raw, start = place(t, backend.device, offset)
        memory.append((raw, start, start + placed.numel() * placed.element_size()))
        return placed

    args = map_tensors(copy, case.args)
    if backend.device != "cpu" and "device" in args:
        args["device"] = torch.device(backend.device)
    pointers = {name: t.data_ptr() for name, t in Case(case.op, args).tensors()}
    result = backend(case.op, **args)
    for raw, start, end in memory:
        around = torch.cat([raw[:start], raw[end:]])
        assert bool((around == _GUARD).all()), f"{case.op} wrote outside a tensor"
    assert pointers == {name: t.data_ptr() for name, t in Case(case.op, args).tensors()}
    found = {"result": list(result) if isinstance(result, (tuple, list)) else result, **without_device(args)}
    return dict(map_tensors(lambda t: t.cpu(), found))


def without_device(args: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in args.items() if k != "device"}


# Random content


# Bit patterns that arithmetic gets wrong first: zeros, infinities, NaNs (quiet and signalling, with payloads and
# signs), the subnormals' ends, the smallest and the largest normals, one.
SPECIAL_BITS = {
    torch.float16: (0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0xFE2A, 0x7D01, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0x3C00),
    torch.bfloat16: (0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0xFFD5, 0x7FA1, 0x0001, 0x807F, 0x0080, 0x7F7F, 0x3F80),
    torch.float32: (
        *(0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x7FA00001),
        *(0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0x3F800000),
    ),
    torch.float64: (
        *(0x0000000000000000, 0x8000000000000000, 0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000000),
        *(0xFFF8000012345678, 0x7FF4000000000001, 0x0000000000000001, 0x800FFFFFFFFFFFFF, 0x0010000000000000),
        *(0x7FEFFFFFFFFFFFFF, 0x3FF0000000000000),
    ),
}


def from_bits(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).view(f"i{array.dtype.itemsize}").copy()).view(dtype)


def random_bits(rng: np.random.Generator, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Any bit pattern of the dtype: what a move must keep."""
    if dtype == torch.bool:
        return torch.from_numpy(rng.integers(0, 2, n, dtype=np.uint8)).view(torch.bool)
    raw = rng.integers(0, 256, n * dtype.itemsize, dtype=np.uint8)
    return from_bits(raw.view(f"u{dtype.itemsize}"), dtype)


def random_numbers(rng: np.random.Generator, n: int, dtype: torch.dtype, specials: bool = False) -> torch.Tensor:
    """Normal numbers; with `specials`, one entry in three is a special bit pattern."""
    numbers = torch.from_numpy(rng.standard_normal(n)).to(dtype)
    if specials and n:
        patterns = from_bits(np.array(SPECIAL_BITS[dtype], dtype=f"u{dtype.itemsize}"), dtype)
        chosen = torch.from_numpy(rng.random(n) < 1 / 3)
        drawn = bits(patterns)[torch.from_numpy(rng.integers(0, len(patterns), n))]
        numbers = torch.where(chosen, drawn, bits(numbers)).view(dtype)
    return numbers


def random_indices(rng: np.random.Generator, limit: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """`count` of `limit` granules, ascending; both ends are among them where they fit."""
    chosen = rng.choice(limit, count, replace=False) if count else np.empty(0)
    if 2 <= count < limit:
        chosen = np.concatenate([[0, limit - 1], 1 + rng.choice(limit - 2, count - 2, replace=False)])
    return torch.from_numpy(np.sort(chosen).astype(np.int64)).to(dtype)


# Builders: a random valid case of every op


@dataclass(frozen=True)
class Setup:
    """What a case looks like: its dtypes, its granule and how many granules there are and are selected."""

    dtype: torch.dtype = torch.float32
    granule: int = 1
    limit: int = 61  # granules in the weight
    count: int = 17  # granules selected
    index: torch.dtype = torch.int64
    values: torch.dtype | None = None  # None: the weight's
    seed: int = 0
    specials: bool = False
    shape: tuple[int, ...] | None = None  # None: two-dimensional where the size allows

    @property
    def numel(self) -> int:
        return self.limit * self.granule


def setups(counts: tuple[int, ...], granule: int | str, **common: Any) -> Iterator[Setup]:
    """One sparse and one full setup for each count of granules; granule ALL: the weight is one granule."""
    for seed, count in enumerate(counts):
        if granule == ALL:
            yield Setup(granule=max(count, 1), limit=1, count=min(count, 1), seed=seed, **common)
        else:
            yield Setup(granule=granule, limit=3 * count + 2, count=count, seed=seed, **common)
            if count or granule == 1:  # no granule is longer than a weight without entries
                yield Setup(granule=granule, limit=count, count=count, seed=seed, **common)


class _Maker:
    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.rng = np.random.default_rng(setup.seed)
        self.compute = torch.float64 if setup.dtype == torch.float64 else torch.float32
        self.nnz = setup.count * setup.granule

    def numbers(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        if dtype in FLOAT_DTYPES:
            return random_numbers(self.rng, n, dtype, self.setup.specials)
        return random_bits(self.rng, n, dtype)

    def weight(self) -> torch.Tensor:
        s = self.setup
        flat = self.numbers(s.numel, s.dtype)
        return flat.view(s.shape if s.shape is not None else shape_of(s.numel))

    def own(self) -> torch.Tensor:
        return self.numbers(self.nnz, self.setup.dtype)

    def values(self) -> torch.Tensor:
        return self.numbers(self.nnz, self.setup.values or self.setup.dtype)

    def state(self) -> torch.Tensor:
        return self.numbers(self.nnz, self.compute)

    def indices(self) -> torch.Tensor:
        return random_indices(self.rng, self.setup.limit, self.setup.count, self.setup.index)


def shape_of(numel: int) -> tuple[int, ...]:
    """Three dimensions where the size has small factors, else fewer."""
    shape: list[int] = []
    rest = numel
    for factor in (2, 3):
        if rest and rest % factor == 0:
            shape.append(factor)
            rest //= factor
    return (*shape, rest)


def _gather(m: _Maker) -> dict[str, Any]:
    return {"weight": m.weight(), "indices": m.indices()}


def _scatter(m: _Maker) -> dict[str, Any]:
    return {"weight": m.weight(), "indices": m.indices(), "values": m.own()}


def _apply(m: _Maker) -> dict[str, Any]:
    return {
        "weight": m.weight(),
        "indices": m.indices(),
        "values": m.values(),
        "saved": m.own(),
        "alpha": 1.0,
        "delta": False,
    }


def _switch(m: _Maker) -> dict[str, Any]:
    return {
        "weight": m.weight(),
        "indices_out": m.indices(),
        "saved_out": m.own(),
        "indices_in": m.indices(),
        "values": m.values(),
        "saved_in": m.own(),
        "alpha": 1.0,
        "delta": False,
    }


def _scatter_add(m: _Maker) -> dict[str, Any]:
    return {"weight": m.weight(), "indices": m.indices(), "values": m.values(), "alpha": 0.3}


def _check_indices(m: _Maker) -> dict[str, Any]:
    return {"indices": m.indices(), "limit": m.setup.numel}


def _adapters(m: _Maker, count: int = 3) -> list[torch.Tensor]:
    return [m.indices() for _ in range(count)]


def _fuse_plan(m: _Maker) -> dict[str, Any]:
    return {"indices": _adapters(m)}


def _fuse(m: _Maker) -> dict[str, Any]:
    s = m.setup
    adapters = _adapters(m)
    indices, offsets, sources, members = oracles.fuse_plan(adapters, s.granule)
    return {
        "weight": m.weight(),
        "saved": m.numbers(len(indices) * s.granule, s.dtype),
        "indices": indices,
        "offsets": offsets,
        "sources": sources,
        "members": members,
        "values": [m.values() for _ in adapters],
        "alphas": torch.tensor([0.7, 1.0, -0.25], dtype=m.compute),
        "delta": [False, True, False],
        "refuse": False,
    }


def _sampled_grad(m: _Maker) -> dict[str, Any]:
    rows, columns = math.prod((shape := shape_of(m.setup.numel))[:-1]), shape[-1]
    return {
        "grad_output": m.numbers(6 * rows, m.setup.dtype).view(2, 3, rows),
        "input": m.numbers(6 * columns, m.setup.dtype).view(2, 3, columns),
        "indices": m.indices(),
    }


_ADAMW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
_SGD = {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.05, "nesterov": False}


def _adamw(m: _Maker) -> dict[str, Any]:
    return {
        "weight": m.weight(),
        "indices": m.indices(),
        "master": m.state(),
        "exp_avg": m.state(),
        "exp_avg_sq": m.state().abs(),
        "grad": m.values(),
        "step": 3,
        **_ADAMW,
    }


def _adamw_tensor(m: _Maker) -> dict[str, Any]:
    args = _adamw(m)
    args["step"] = torch.tensor(args["step"])
    args["lr"] = torch.tensor(args["lr"], dtype=torch.float64)
    return args


def _sgd(m: _Maker) -> dict[str, Any]:
    return {
        "weight": m.weight(),
        "indices": m.indices(),
        "master": m.state(),
        "momentum_buffer": m.state(),
        "grad": m.values(),
        **_SGD,
    }


def _sgd_tensor(m: _Maker) -> dict[str, Any]:
    args = _sgd(m)
    args["lr"] = torch.tensor(args["lr"], dtype=torch.float64)
    return args


def _select_top(m: _Maker) -> dict[str, Any]:
    weight = m.weight()
    grad = m.numbers(weight.numel(), m.setup.values or m.setup.dtype).view(weight.shape)
    return {"weight": weight, "grad": grad, "k": m.setup.count, "score": "snip"}


def _select_random(m: _Maker) -> dict[str, Any]:
    return {"numel": m.setup.numel, "k": m.setup.count, "seed": m.setup.seed, "device": None}


def _encode_indices(m: _Maker) -> dict[str, Any]:
    return {"indices": m.indices()}


def _decode_indices(m: _Maker) -> dict[str, Any]:
    code = torch.ops.shira.encode_indices(m.indices())
    return {"code": code, "count": m.setup.count, "limit": m.setup.numel, "dtype": m.setup.index}


def _fingerprint(m: _Maker) -> dict[str, Any]:
    return {"weight": m.weight()}


def _fingerprint_part(m: _Maker) -> dict[str, Any]:
    words = m.setup.numel * m.setup.dtype.itemsize // 8
    return {"weight": m.weight(), "first": 5, "run": max(1, words // 3), "stride": words + 2}


def _diff(m: _Maker) -> dict[str, Any]:
    weight = m.weight()
    snapshot = weight.clone()
    torch.ops.shira.scatter_(snapshot, m.indices(), m.own(), m.setup.granule)
    return {"snapshot": snapshot, "weight": weight}


def integers(rng: np.random.Generator, shape: int | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Small and not zero: sums are exact and no -0.0 arises, so any order of the sum gives the same bits."""
    return torch.from_numpy(rng.integers(1, 5, shape) * rng.choice((-1, 1), shape)).to(dtype)


def _sparse_linear(m: _Maker) -> dict[str, Any]:
    rows, columns = math.prod((shape := shape_of(m.setup.numel))[:-1]), shape[-1]
    return {
        "input": integers(m.rng, (2, 3, columns), m.setup.dtype),
        "indices": m.indices(),
        "values": integers(m.rng, m.nnz, m.setup.values or m.setup.dtype),
        "out_features": rows,
        "transposed": False,
    }


def _sparse_linear_add(m: _Maker) -> dict[str, Any]:
    rows, columns = math.prod((shape := shape_of(m.setup.numel))[:-1]), shape[-1]
    adapters = _adapters(m)
    return {
        "output": integers(m.rng, (2, 3, rows), m.setup.dtype),
        "input": integers(m.rng, (2, 3, columns), m.setup.dtype),
        "indices": adapters,
        "values": [integers(m.rng, m.nnz, m.setup.values or m.setup.dtype) for _ in adapters],
        "adapters": torch.tensor([1, 0, -1, 2, 1, 1], dtype=torch.int32),
        "alphas": torch.tensor([0.5, -2.0, 1.0], dtype=m.compute),
        "transposed": False,
    }


BUILDERS: dict[str, Callable[[_Maker], dict[str, Any]]] = {
    "gather": _gather,
    "scatter_": _scatter,
    "swap_": _scatter,
    "apply_": _apply,
    "switch_": _switch,
    "scatter_add_": _scatter_add,
    "check_indices": _check_indices,
    "fuse_plan": _fuse_plan,
    "fuse_": _fuse,
    "sampled_grad": _sampled_grad,
    "adamw_": _adamw,
    "adamw_.tensor": _adamw_tensor,
    "sgd_": _sgd,
    "sgd_.tensor": _sgd_tensor,
    "select_top": _select_top,
    "select_random": _select_random,
    "encode_indices": _encode_indices,
    "decode_indices": _decode_indices,
    "fingerprint": _fingerprint,
    "fingerprint_at": _gather,
    "fingerprint_part": _fingerprint_part,
    "diff_": _diff,
    "sparse_linear": _sparse_linear,
    "sparse_linear_add_": _sparse_linear_add,
}
FOREACH_OPS = (
    *("foreach_gather", "foreach_scatter_", "foreach_swap_", "foreach_apply_", "foreach_switch_"),
    *("foreach_adamw_", "foreach_adamw_.tensor", "foreach_sgd_", "foreach_sgd_.tensor"),
    "foreach_diff_",
)
OPS = (*BUILDERS, *FOREACH_OPS)
# They look at the content.
NOT_CAPTURED = ("check_indices", "fuse_plan", "encode_indices", "decode_indices", "diff_", "foreach_diff_")
MUTATING_OPS = tuple(op for op in OPS if op.partition(".")[0].endswith("_"))

_PLURAL = {
    "weight": "weights",
    "master": "masters",
    "exp_avg": "exp_avgs",
    "exp_avg_sq": "exp_avg_sqs",
    "grad": "grads",
    "momentum_buffer": "momentum_buffers",
    "snapshot": "snapshots",
}


def foreach(op: str, members: list[Case]) -> Case:
    """The list op over several cases of its single op; scalars (and step and lr) are the first case's."""
    shared = ("step", "lr")
    args: dict[str, Any] = {}
    for name, value in members[0].args.items():
        if isinstance(value, torch.Tensor) and name not in shared:
            args[_PLURAL.get(name, name)] = [member.args[name] for member in members]
        else:
            args[_PLURAL.get(name, name)] = value
    return Case(op, args)


def build(op: str, setup: Setup | None = None, **changes: Any) -> Case:
    """A random valid case of an op; `changes` replace its arguments."""
    setup = setup if setup is not None else Setup()
    if op in BUILDERS:
        return Case(op, {**BUILDERS[op](_Maker(setup)), "granule": setup.granule, **changes})
    single = op.removeprefix("foreach_")
    members = [
        build(single, setup),
        build(single, replace(setup, limit=setup.limit + 2, count=setup.count + 1, seed=setup.seed + 1)),
        build(single, replace(setup, limit=3, count=0, seed=setup.seed + 2, shape=None)),
    ]
    case = foreach(op, members)
    case.args.update(changes)
    return case
