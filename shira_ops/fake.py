"""What each op returns without computing it, for tracing: shapes, dtypes, and the same refusals.

In the order of csrc/schemas.h. Content and memory are not looked at: a fake tensor has neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from . import checks


def _gathered(weight: Tensor, indices: Tensor, granule: int) -> Tensor:
    return weight.new_empty(indices.numel() * granule)


# ---- switch ------------------------------------------------------------------------------------------------


def gather(weight: Tensor, indices: Tensor, granule: int = 1) -> Tensor:
    checks.gather(weight, indices, granule)
    return _gathered(weight, indices, granule)


def scatter_(weight: Tensor, indices: Tensor, values: Tensor, granule: int = 1) -> None:
    checks.scatter_(weight, indices, values, granule)


def swap_(weight: Tensor, indices: Tensor, values: Tensor, granule: int = 1) -> None:
    checks.swap_(weight, indices, values, granule)


def apply_(
    weight: Tensor,
    indices: Tensor,
    values: Tensor,
    saved: Tensor,
    *,
    alpha: float = 1.0,
    delta: bool = False,
    granule: int = 1,
) -> None:
    checks.apply_(weight, indices, values, saved, alpha, delta, granule)


def switch_(
    weight: Tensor,
    indices_out: Tensor,
    saved_out: Tensor,
    indices_in: Tensor,
    values: Tensor,
    saved_in: Tensor,
    *,
    alpha: float = 1.0,
    delta: bool = False,
    granule: int = 1,
) -> None:
    checks.switch_(weight, indices_out, saved_out, indices_in, values, saved_in, alpha, delta, granule)


def scatter_add_(weight: Tensor, indices: Tensor, values: Tensor, *, alpha: float = 1.0, granule: int = 1) -> None:
    checks.scatter_add_(weight, indices, values, granule)


def foreach_gather(weights: Sequence[Tensor], indices: Sequence[Tensor], granule: int = 1) -> list[Tensor]:
    checks.foreach_gather(weights, indices, granule)
    return [_gathered(weight, index, granule) for weight, index in zip(weights, indices, strict=True)]


def foreach_scatter_(
    weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], granule: int = 1
) -> None:
    checks.foreach_scatter_(weights, indices, values, granule)


def foreach_swap_(
    weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], granule: int = 1
) -> None:
    checks.foreach_swap_(weights, indices, values, granule)


def foreach_apply_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    saved: Sequence[Tensor],
    *,
    alpha: float = 1.0,
    delta: bool = False,
    granule: int = 1,
) -> None:
    checks.foreach_apply_(weights, indices, values, saved, alpha, delta, granule)


def foreach_switch_(
    weights: Sequence[Tensor],
    indices_out: Sequence[Tensor],
    saved_out: Sequence[Tensor],
    indices_in: Sequence[Tensor],
    values: Sequence[Tensor],
    saved_in: Sequence[Tensor],
    *,
    alpha: float = 1.0,
    delta: bool = False,
    granule: int = 1,
) -> None:
    checks.foreach_switch_(weights, indices_out, saved_out, indices_in, values, saved_in, alpha, delta, granule)


def check_indices(indices: Tensor, limit: int, granule: int = 1) -> None:
    checks.check_indices(indices, limit, granule)


# ---- fuse --------------------------------------------------------------------------------------------------


def fuse_plan(indices: Sequence[Tensor], granule: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    checks.fuse_plan(indices, granule)
    total = sum(tensor.numel() for tensor in indices)
    union = torch.library.get_ctx().new_dynamic_size()
    narrow = all(tensor.dtype == torch.int32 for tensor in indices)
    wide_offsets = guard_or_false(total >= 2**31)
    return (
        indices[0].new_empty(union, dtype=torch.int32 if narrow else torch.int64),
        indices[0].new_empty(union + 1, dtype=torch.int64 if wide_offsets else torch.int32),
        indices[0].new_empty(total, dtype=torch.int64),
    )


def fuse_(
    weight: Tensor,
    saved: Tensor,
    indices: Tensor,
    offsets: Tensor,
    sources: Tensor,
    values: Sequence[Tensor],
    alphas: Tensor,
    *,
    delta: Sequence[bool],
    refuse: bool = False,
    granule: int = 1,
) -> None:
    checks.fuse_(weight, saved, indices, offsets, sources, values, alphas, delta, granule)


# ---- gradient ----------------------------------------------------------------------------------------------


def sampled_grad(grad_output: Tensor, input: Tensor, indices: Tensor, granule: int = 1) -> Tensor:
    checks.sampled_grad(grad_output, input, indices, granule)
    return grad_output.new_empty(indices.numel() * granule, dtype=checks.compute_dtype(grad_output.dtype))


# ---- optimize ----------------------------------------------------------------------------------------------


def adamw_(
    weight: Tensor,
    indices: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    step: int | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    granule: int = 1,
) -> None:
    checks.adamw_(
        weight, indices, master, exp_avg, exp_avg_sq, grad, step, lr, beta1, beta2, eps, weight_decay, granule
    )


def sgd_(
    weight: Tensor,
    indices: Tensor,
    master: Tensor,
    momentum_buffer: Tensor | None,
    grad: Tensor,
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    granule: int = 1,
) -> None:
    checks.sgd_(
        weight, indices, master, momentum_buffer, grad, lr, momentum, dampening, weight_decay, nesterov, granule
    )


def foreach_adamw_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    step: int | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    granule: int = 1,
) -> None:
    checks.foreach_adamw_(
        weights, indices, masters, exp_avgs, exp_avg_sqs, grads, step, lr, beta1, beta2, eps, weight_decay, granule
    )


def foreach_sgd_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    masters: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    granule: int = 1,
) -> None:
    checks.foreach_sgd_(
        weights, indices, masters, momentum_buffers, grads, lr, momentum, dampening, weight_decay, nesterov, granule
    )


# ---- select ------------------------------------------------------------------------------------------------


def select_top(weight: Tensor, grad: Tensor | None, k: int, *, score: str, granule: int = 1) -> Tensor:
    checks.select_top(weight, grad, k, score, granule)
    narrow = not guard_or_false(weight.numel() // granule >= 2**31)
    return weight.new_empty(k, dtype=torch.int32 if narrow else torch.int64)


def select_random(numel: int, k: int, seed: int, *, device: torch.device | None = None, granule: int = 1) -> Tensor:
    checks.select_random(numel, k, granule)
    return torch.empty(k, dtype=checks.index_dtype(numel // granule), device="cpu" if device is None else device)


# ---- codec -------------------------------------------------------------------------------------------------


def encode_indices(indices: Tensor, granule: int = 1) -> Tensor:
    checks.encode_indices(indices, granule)
    return indices.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


def decode_indices(code: Tensor, count: int, limit: int, dtype: torch.dtype, granule: int = 1) -> Tensor:
    checks.decode_indices(code, count, limit, dtype, granule)
    return code.new_empty(count, dtype=dtype)


# ---- fingerprint -------------------------------------------------------------------------------------------


def fingerprint(weight: Tensor, granule: int = 1) -> Tensor:
    checks.fingerprint(weight, granule)
    return weight.new_empty((), dtype=torch.int64)


def fingerprint_at(weight: Tensor, indices: Tensor, granule: int = 1) -> Tensor:
    checks.fingerprint_at(weight, indices, granule)
    return weight.new_empty((), dtype=torch.int64)


# ---- diff --------------------------------------------------------------------------------------------------


def _differing(weight: Tensor, granule: int) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    narrow = not guard_or_false(weight.numel() // granule >= 2**31)
    return (
        weight.new_empty(count, dtype=torch.int32 if narrow else torch.int64),
        weight.new_empty(count * granule),
    )


def diff_(snapshot: Tensor, weight: Tensor, granule: int = 1) -> tuple[Tensor, Tensor]:
    checks.diff_(snapshot, weight, granule)
    return _differing(weight, granule)


def foreach_diff_(
    snapshots: Sequence[Tensor], weights: Sequence[Tensor], granule: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    checks.foreach_diff_(snapshots, weights, granule)
    found = [_differing(weight, granule) for weight in weights]
    return [indices for indices, _ in found], [values for _, values in found]


# ---- overlay -----------------------------------------------------------------------------------------------


def sparse_linear(
    input: Tensor, indices: Tensor, values: Tensor, out_features: int, *, transposed: bool = False, granule: int = 1
) -> Tensor:
    checks.sparse_linear(input, indices, values, out_features, transposed, granule)
    return input.new_empty(*input.shape[:-1], out_features)


def sparse_linear_add_(
    output: Tensor,
    input: Tensor,
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    adapters: Tensor,
    alphas: Tensor,
    *,
    transposed: bool = False,
    granule: int = 1,
) -> None:
    checks.sparse_linear_add_(output, input, indices, values, adapters, alphas, transposed, granule)


OPS: dict[str, Callable[..., Any]] = {
    "gather": gather,
    "scatter_": scatter_,
    "swap_": swap_,
    "apply_": apply_,
    "switch_": switch_,
    "scatter_add_": scatter_add_,
    "foreach_gather": foreach_gather,
    "foreach_scatter_": foreach_scatter_,
    "foreach_swap_": foreach_swap_,
    "foreach_apply_": foreach_apply_,
    "foreach_switch_": foreach_switch_,
    "check_indices": check_indices,
    "fuse_plan": fuse_plan,
    "fuse_": fuse_,
    "sampled_grad": sampled_grad,
    "adamw_": adamw_,
    "adamw_.tensor": adamw_,
    "sgd_": sgd_,
    "sgd_.tensor": sgd_,
    "foreach_adamw_": foreach_adamw_,
    "foreach_adamw_.tensor": foreach_adamw_,
    "foreach_sgd_": foreach_sgd_,
    "foreach_sgd_.tensor": foreach_sgd_,
    "select_top": select_top,
    "select_random": select_random,
    "encode_indices": encode_indices,
    "decode_indices": decode_indices,
    "fingerprint": fingerprint,
    "fingerprint_at": fingerprint_at,
    "diff_": diff_,
    "foreach_diff_": foreach_diff_,
    "sparse_linear": sparse_linear,
    "sparse_linear_add_": sparse_linear_add_,
}


def register() -> None:
    for op, function in OPS.items():
        torch.library.register_fake(f"shira::{op}", function)
    # It has no result and changes nothing: a compiler would drop the check.
    torch.fx.node.has_side_effect(torch.ops.shira.check_indices.default)
