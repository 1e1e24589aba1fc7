"""Every op on a device: its results and all that it changed, compared bit for bit with the references on the CPU.

Small enough to run under compute-sanitizer, and without pytest. gpu.py proves this first.

python -m benchmarks.speed.gpu_ops --device cuda
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

import shira_ops.reference as reference
from benchmarks.speed.gpu_proofs import Proof, prove

ADAMW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
SGD = {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.05, "nesterov": False}
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Arguments = dict[str, Any]


def op(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(",")[0].partition(".")
    return getattr(getattr(torch.ops.shira, packet), overload or "default")


def calls(dtype: torch.dtype, granule: int, rows: int, columns: int) -> dict[str, Arguments]:
    """A valid call of every op, on the CPU. Further calls of an op have a comma in their name, and what is special."""
    random = torch.Generator().manual_seed(granule)

    def numbers(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    def small(*shape: int) -> torch.Tensor:
        return torch.randint(-4, 5, shape, generator=random).to(dtype)  # sums of products are exact, in any order

    limit = rows * columns // granule

    def mask() -> torch.Tensor:
        return (torch.rand(limit, generator=random) < 0.1).nonzero().view(-1).to(torch.int32)

    weight, a, b, c = numbers(rows, columns), mask(), mask(), mask()
    entries = {id(one): len(one) * granule for one in (a, b, c)}

    def of(indices: torch.Tensor, dtype: torch.dtype = dtype) -> torch.Tensor:
        return numbers(entries[id(indices)], dtype=dtype)

    # One block of the code for each of its modes.
    scales = torch.tensor([40, 5000, 2**40]).repeat_interleave(4096)[: 2 * 4096 + 500]
    coded = (torch.rand(len(scales), generator=random, dtype=torch.float64) * scales).long().add(1).cumsum(0)
    fp32 = torch.float32
    here: Arguments = {"weight": weight, "indices": a}
    state: Arguments = {"master": of(a, fp32), "exp_avg": of(a, fp32), "exp_avg_sq": of(a, fp32).abs()}
    momentum: Arguments = {"master": of(a, fp32), "momentum_buffer": of(a, fp32)}
    tensor_lr = {"lr": torch.tensor(1e-2, dtype=torch.float64)}
    change: Arguments = {"values": of(a), "saved": of(a), "alpha": 0.7, "delta": False}
    switch: Arguments = {"indices_out": a, "saved_out": of(a), "indices_in": b, "values": of(b), "saved_in": of(b)}
    plan = dict(zip(("indices", "offsets", "sources", "members"), reference.fuse_plan([a, b, c], granule), strict=True))
    single: dict[str, Arguments] = {
        "gather": here,
        "scatter_": {**here, "values": of(a)},
        "swap_": {**here, "values": of(a)},
        "apply_": {**here, **change},
        "switch_": {"weight": weight, **switch, "alpha": 0.7, "delta": True},
        "scatter_add_": {**here, "values": of(a, fp32), "alpha": 0.3},
        "adamw_": {**here, **state, "grad": of(a, fp32), "step": 3, **ADAMW},
        "adamw_.tensor": {**here, **state, "grad": of(a, fp32), "step": torch.tensor(3), **ADAMW, **tensor_lr},
        "sgd_": {**here, **momentum, "grad": of(a, fp32), **SGD},
        "sgd_.tensor": {**here, **momentum, "grad": of(a, fp32), **SGD, **tensor_lr},
        "check_indices": {"indices": a, "limit": rows * columns},
        "fuse_plan": {"indices": [a, b, c]},
        "fuse_": {
            "weight": weight,
            "saved": numbers(len(plan["indices"]) * granule),
            **plan,
            "values": [of(a), of(b), of(c)],
            "alphas": torch.tensor([0.7, 1.0, -0.25]),
            "delta": [False, True, False],
            "refuse": False,
        },
        "sampled_grad": {"grad_output": small(33, rows), "input": small(33, columns), "indices": a},
        "select_top": {"weight": weight, "grad": numbers(rows, columns), "k": limit // 10, "score": "snip"},
        "select_random": {"numel": rows * columns, "k": limit // 10, "seed": 7, "device": None},
        "encode_indices": {"indices": coded, "version": 1},
        "decode_indices": {
            "code": reference.encode_indices(coded, granule),
            "count": len(coded),
            "limit": (int(coded[-1]) + 1) * granule,
            "dtype": torch.int64,
        },
        "fingerprint": {"weight": weight},
        "fingerprint_at": here,
        "fingerprint_part": {"weight": weight, "first": 3, "run": 5, "stride": 11},
        "diff_": {"snapshot": torch.where(numbers(rows, columns) > 1, 0, weight), "weight": weight, "before": False},
        "sparse_linear": {
            "input": small(33, columns),
            "indices": a,
            "values": small(entries[id(a)]),
            "out_features": rows,
            "transposed": False,
        },
        "sparse_linear_add_": {
            "output": small(33, rows),
            "input": small(33, columns),
            "indices": [a, b, c],
            "values": [small(entries[id(one)]) for one in (a, b, c)],
            "adapters": torch.arange(33, dtype=torch.int32) % 4 - 1,
            "alphas": torch.tensor([0.5, -2.0, 1.0]),
            "transposed": False,
        },
    }
    found = {}
    for name, schema in ((name, op(name)._schema) for name in reference.OPS):
        if not name.startswith("foreach_"):
            found[name] = single[name]
            continue
        # Lists of two: the call itself, and the same on another weight.
        one = single[name.removeprefix("foreach_")]
        given = [a for a in schema.arguments if a.name != "granule"]
        found[name] = {
            a.name: [value, value.clone() if value.dtype.is_floating_point else value]
            if isinstance(value, torch.Tensor) and a.name not in ("step", "lr")
            else value
            for a, value in zip(given, one.values(), strict=True)
        }
    found["encode_indices, version 2"] = {"indices": coded, "version": 2}
    code = reference.encode_indices(coded, granule, version=2)
    found["decode_indices, version 2"] = {**single["decode_indices"], "code": code}
    # So sparse that the entries are sampled; with a number of tokens that suits wide accesses, and one that does not.
    sparse = torch.arange(0, 300 * 1040 // granule, 600)
    for tokens in (40, 33):
        given = {"grad_output": small(tokens, 300), "input": small(tokens, 1040), "indices": sparse}
        found[f"sampled_grad, {tokens} tokens"] = given
    return {name: {**given, "granule": granule} for name, given in found.items()}


def copied(value: Any, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone().to(device)
    return [copied(one, device) for one in value] if isinstance(value, (list, tuple)) else value


def placed(given: Arguments, device: str) -> Arguments:
    """Copies of the arguments, on a device."""
    own = {name: copied(value, device) for name, value in given.items()}
    return {**own, "device": torch.device(device)} if "device" in own else own


def tensors(own: Arguments) -> Iterator[torch.Tensor]:
    for value in own.values():
        yield from (one for one in (value if isinstance(value, (list, tuple)) else [value]) if torch.is_tensor(one))


def left(result: Any, own: Arguments) -> list[torch.Tensor]:
    """The results, and then every tensor argument as the call left it."""
    tensors: list[torch.Tensor] = []
    for value in (result, *own.values()):
        tensors += [one for one in (value if isinstance(value, (list, tuple)) else [value]) if torch.is_tensor(one)]
    return [one.detach().cpu() for one in tensors]


def run(function: Callable[..., Any], given: Arguments, device: str) -> list[torch.Tensor]:
    own = placed(given, device)
    return left(function(**own), own)


def same(given: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if given.dtype != wanted.dtype or given.shape != wanted.shape:
        return False
    integer = INTEGERS[given.element_size()]
    return torch.equal(given.contiguous().view(integer), wanted.contiguous().view(integer))


def against_reference(name: str, given: Arguments, device: str) -> None:
    """Raises unless the op gives the reference's bits."""
    with torch.no_grad():
        ours, wanted = run(op(name), given, device), run(reference.OPS[name.partition(",")[0]], given, "cpu")
    bad = [i for i, pair in enumerate(zip(ours, wanted, strict=True)) if not same(*pair)]
    if bad:
        first = ours[bad[0]].reshape(-1), wanted[bad[0]].reshape(-1)
        count = int((first[0] != first[1]).sum()) if len(first[0]) == len(first[1]) else "all"
        raise AssertionError(f"{name}: tensor {bad[0]} differs from the reference in {count} entries")


def proofs(device: str, once: bool) -> Iterator[Proof]:
    """Once: one small call of each op."""
    dtypes = [torch.bfloat16] if once else [torch.bfloat16, torch.float32]
    for rows, columns in [(24, 80)] if once else [(24, 80), (300, 1040)]:
        for dtype, granule in itertools.product(dtypes, (1, 16)):
            for name, given in calls(dtype, granule, rows, columns).items():
                proof = functools.partial(against_reference, name, given, device)
                yield f"{name}, {dtype}, granule {granule}, {rows} x {columns}", proof


if __name__ == "__main__":
    prove(__doc__, proofs)
