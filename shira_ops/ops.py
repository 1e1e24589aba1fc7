"""The public functions: one for each op of torch.ops.shira, in the order of csrc/schemas.h.

Words used throughout:

- `weight`: the dense tensor: any shape, contiguous. It is changed in place; its storage pointer stays the same.
- `indices`: 1-D int32 or int64, strictly increasing granule numbers of the flat (row-major) weight.
- `granule`: how many consecutive entries an index selects; it divides `weight.numel()`.
- `nnz` = `len(indices) * granule`: how many entries are selected. `values`, and every other tensor of that size, is
  aligned with `indices`.
- float dtypes: float16, bfloat16, float32, float64. Arithmetic is in fp32 (fp64 for fp64): each operation is rounded
  once, and the result once more to the weight's dtype. NaN is stored as the canonical quiet NaN.

Rules every function keeps:

- **Errors** are `RuntimeError`, with one text on every backend: op, argument, requirement, what was given. Wrong
  shapes, dtypes, devices, strides and overlapping memory are refused, never repaired, and a refused call has changed
  nothing. On the CPU, indices are checked before the first write. CUDA kernels do not synchronise for that; they skip
  what is out of range. So check indices once with `check_indices`.
- **Autograd**: a function that ends in `_` bumps the version of what it changes, and refuses a tensor that requires
  grad while grad mode is on, or that carries a forward-mode tangent.
- **Kinds of tensors**: tensors without memory or without a kernel (fake, sparse, nested, quantized, or memory that
  starts between two entries) are refused too; a function that ends in `_` refuses lazily conjugated and negated views.
  A `granule` is at most as long as the weight; for a weight without entries it is 1.
- **Determinism**: the same bits on every device, vector width and thread count, unless said otherwise.
- They work on real tensors, under `torch.compile(fullgraph=True)` and in inference mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ._ops import ops as _shira

__all__ = [
    "adamw_",
    "apply_",
    "check_indices",
    "decode_indices",
    "diff_",
    "encode_indices",
    "fingerprint",
    "fingerprint_at",
    "fingerprint_part",
    "foreach_adamw_",
    "foreach_apply_",
    "foreach_diff_",
    "foreach_gather",
    "foreach_scatter_",
    "foreach_sgd_",
    "foreach_swap_",
    "foreach_switch_",
    "fuse_",
    "fuse_plan",
    "gather",
    "sampled_grad",
    "scatter_",
    "scatter_add_",
    "select_random",
    "select_top",
    "sgd_",
    "sparse_linear",
    "sparse_linear_add_",
    "swap_",
    "switch_",
]

# Looked up once: a call goes straight to the dispatcher.
_gather = _shira.gather.default
_scatter_ = _shira.scatter_.default
_swap_ = _shira.swap_.default
_apply_ = _shira.apply_.default
_switch_ = _shira.switch_.default
_scatter_add_ = _shira.scatter_add_.default
_foreach_gather = _shira.foreach_gather.default
_foreach_scatter_ = _shira.foreach_scatter_.default
_foreach_swap_ = _shira.foreach_swap_.default
_foreach_apply_ = _shira.foreach_apply_.default
_foreach_switch_ = _shira.foreach_switch_.default
_check_indices = _shira.check_indices.default
_fuse_plan = _shira.fuse_plan.default
_fuse_ = _shira.fuse_.default
_sampled_grad = _shira.sampled_grad.default
_adamw_ = _shira.adamw_.default
_adamw_tensor_ = _shira.adamw_.tensor
_sgd_ = _shira.sgd_.default
_sgd_tensor_ = _shira.sgd_.tensor
_foreach_adamw_ = _shira.foreach_adamw_.default
_foreach_adamw_tensor_ = _shira.foreach_adamw_.tensor
_foreach_sgd_ = _shira.foreach_sgd_.default
_foreach_sgd_tensor_ = _shira.foreach_sgd_.tensor
_select_top = _shira.select_top.default
_select_random = _shira.select_random.default
_encode_indices = _shira.encode_indices.default
_decode_indices = _shira.decode_indices.default
_fingerprint = _shira.fingerprint.default
_fingerprint_at = _shira.fingerprint_at.default
_fingerprint_part = _shira.fingerprint_part.default
_diff_ = _shira.diff_.default
_foreach_diff_ = _shira.foreach_diff_.default
_sparse_linear = _shira.sparse_linear.default
_sparse_linear_add_ = _shira.sparse_linear_add_.default


# ---- switch ------------------------------------------------------------------------------------------------


def gather(weight: Tensor, indices: Tensor, granule: int = 1) -> Tensor:
    """The entries that `indices` select: a 1-D tensor `[nnz]` of the weight's dtype.

    `weight` may have any dtype of 1, 2, 4 or 8 bytes per entry. Differentiable in `weight` (any number of times, and
    in forward mode); the backward makes a dense gradient of the weight's shape.

    The same in plain PyTorch::

        weight.view(-1, granule)[indices].view(-1)
    """
    return _gather(weight, indices, granule)  # type: ignore[no-any-return]


def scatter_(weight: Tensor, indices: Tensor, values: Tensor, granule: int = 1) -> None:
    """Overwrites the entries that `indices` select. This also takes an adapter out again.

    `values`: `[nnz]`, the weight's dtype, any of 1, 2, 4 or 8 bytes per entry. Bits are moved; nothing is computed.

    The same in plain PyTorch::

        weight.view(-1, granule)[indices] = values.view(-1, granule)
    """
    _scatter_(weight, indices, values, granule)


def swap_(weight: Tensor, indices: Tensor, values: Tensor, granule: int = 1) -> None:
    """Exchanges the selected entries with `values`, both in place; a second call restores both.

    `values`: `[nnz]`, the weight's dtype, any of 1, 2, 4 or 8 bytes per entry. Bits are moved; nothing is computed.

    The same in plain PyTorch::

        flat = weight.view(-1, granule)
        old = flat[indices]
        flat[indices] = values.view(-1, granule)
        values.copy_(old.view(-1))
    """
    _swap_(weight, indices, values, granule)


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
    """Puts an adapter in at strength `alpha` and keeps what was there in `saved`.

    SHiRA's W + alpha*S (arXiv 2406.13175, section 3). `values` are the new weights, or with `delta` what is added.
    `scatter_(weight, indices, saved)` takes it back bit for bit.

    - `values`: `[nnz]`, the weight's dtype or float32. `saved`: `[nnz]`, the weight's dtype, written.
    - `alpha` rounds to float32 (float64 for float64 weights) first. At 0 the weight keeps its bits. At 1 without
      `delta` the weight becomes `values` exactly, and every dtype of 1, 2, 4 or 8 bytes is allowed; anything else
      needs a float dtype.

    The same in plain PyTorch, for `compute = torch.float32` (float64 for float64)::

        flat = weight.view(-1, granule)
        saved.copy_(flat[indices].view(-1))
        base, v = saved.to(compute), values.to(compute)
        new = base + alpha * v if delta else base + alpha * (v - base)
        flat[indices] = new.to(weight.dtype).view(-1, granule)
    """
    _apply_(weight, indices, values, saved, alpha=alpha, delta=delta, granule=granule)


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
    """Takes one adapter out and puts the next in, in one walk over the weight.

    `indices_out` and `saved_out` belong to the adapter that is in now (`saved_out` is only read); the other arguments
    are as in `apply_`. The two lists of indices may differ in length and overlap in any way.

    The same in two calls::

        scatter_(weight, indices_out, saved_out, granule)
        apply_(weight, indices_in, values, saved_in, alpha=alpha, delta=delta, granule=granule)
    """
    _switch_(weight, indices_out, saved_out, indices_in, values, saved_in, alpha=alpha, delta=delta, granule=granule)


def scatter_add_(weight: Tensor, indices: Tensor, values: Tensor, *, alpha: float = 1.0, granule: int = 1) -> None:
    """Adds `alpha * values` to the selected entries.

    `weight` has a float dtype; `values`: `[nnz]`, the weight's dtype or float32. `alpha` rounds to the compute
    dtype first, and at 0 the weight keeps its bits. Adding and subtracting again does not restore the base: keep
    it with `apply_` where that matters.

    The same in plain PyTorch, for `compute = torch.float32` (float64 for float64)::

        flat = weight.view(-1, granule)
        base, v = flat[indices].to(compute), values.to(compute).view(-1, granule)
        flat[indices] = (base + alpha * v).to(weight.dtype)
    """
    _scatter_add_(weight, indices, values, alpha=alpha, granule=granule)


def foreach_gather(weights: Sequence[Tensor], indices: Sequence[Tensor], granule: int = 1) -> list[Tensor]:
    """`gather` over lists, in one call: a whole model's entries. Differentiable in every weight.

    All tensors on one device. The same as::

        [gather(w, i, granule) for w, i in zip(weights, indices)]
    """
    return _foreach_gather(weights, indices, granule)  # type: ignore[no-any-return]


def foreach_scatter_(
    weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], granule: int = 1
) -> None:
    """`scatter_` over lists, in one call.

    All tensors on one device; everything is checked before the first write. A weight must not overlap any other
    tensor of the call; `indices` and `values` may be shared.
    """
    _foreach_scatter_(weights, indices, values, granule)


def foreach_swap_(
    weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], granule: int = 1
) -> None:
    """`swap_` over lists, in one call.

    All tensors on one device; everything is checked before the first write. Weights and values must not overlap any
    other tensor of the call; `indices` may be shared.
    """
    _foreach_swap_(weights, indices, values, granule)


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
    """`apply_` over lists with one `alpha` and `delta`, in one call: an adapter onto a whole model.

    All tensors on one device; everything is checked before the first write. Weights and saved must not overlap any
    other tensor of the call.
    """
    _foreach_apply_(weights, indices, values, saved, alpha=alpha, delta=delta, granule=granule)


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
    """`switch_` over lists with one `alpha` and `delta`, in one call: from one adapter to the next on a whole model.

    All tensors on one device; everything is checked before the first write. Weights and saved_in must not overlap
    any other tensor of the call.
    """
    _foreach_switch_(
        weights, indices_out, saved_out, indices_in, values, saved_in, alpha=alpha, delta=delta, granule=granule
    )


def check_indices(indices: Tensor, limit: int, granule: int = 1) -> None:
    """Raises unless `indices` are strictly increasing in `[0, limit // granule)`; may synchronise.

    `limit` counts the entries of the weight and is a multiple of `granule`. Once checked, indices need no further
    check on any device: CUDA kernels then have nothing to skip.

    The same in plain PyTorch::

        ok = (indices[1:] > indices[:-1]).all() and indices[0] >= 0 and indices[-1] < limit // granule
    """
    _check_indices(indices, limit, granule)


# ---- fuse --------------------------------------------------------------------------------------------------


def fuse_plan(indices: Sequence[Tensor], granule: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where several adapters meet in one weight: `(indices, offsets, sources, members)` for `fuse_`. Made once; may
    synchronise.

    `indices`: the adapters' lists, 1 to 32767 of them, in the order in which their contributions are to be summed.

    - returned `indices` `[U]`: the sorted union, int32 if all lists are, else int64;
    - `offsets` `[ceil(U / 64) + 1]`: the union is planned in groups of 64 granules, and group `g` has the sources
      `offsets[g]` to `offsets[g + 1]`; int32 (int64 if the lists have 2^31 granules or more together);
    - `sources` `[S]` int64: one for each adapter that has granules in the group, in the order of the adapters:
      `adapter << 48 | position in its list` of the first of them;
    - `members` `[S]` int64: which granules of the group they are, as bits. The first one is bit 0.

    That is 4 bytes for each granule of the union, and 16 for each source: about 6 bytes a granule for 8 adapters.

    The union alone, in plain PyTorch: `torch.cat(indices).unique()`.
    """
    return _fuse_plan(indices, granule)  # type: ignore[no-any-return]


def fuse_(
    weight: Tensor,
    saved: Tensor,
    indices: Tensor,
    offsets: Tensor,
    sources: Tensor,
    members: Tensor,
    values: Sequence[Tensor],
    alphas: Tensor,
    *,
    delta: Sequence[bool],
    refuse: bool = False,
    granule: int = 1,
) -> None:
    """Puts several adapters in at once: `weight[i] = base[i] + sum_k alpha_k * d_k[i]`, one pass.

    SHiRA's W + alpha1*S1 + alpha2*S2 (arXiv 2406.13175, section 4). `d_k` is `values_k` where `delta[k]`, else
    `values_k - base`; contributions sum in the order of the plan.

    - `indices`, `offsets`, `sources`, `members`: from `fuse_plan`. `saved`: `[nnz]` of its union, the weight's dtype.
    - `values`: one 1-D tensor for each adapter, all of the weight's dtype or all float32. `weight`: a float dtype.
    - `alphas`: one for each adapter, float32 (float64 for float64 weights), on the weight's device, so that a
      captured CUDA graph can change them.
    - Without `refuse` the base is the weight and is kept in `saved`. With `refuse` it comes from `saved`, which is
      only read: new strengths cost one pass and never accumulate.

    An entry whose contributions all have alpha 0 keeps the base's bits. One overwriting contribution at alpha 1
    stores its value exactly, so one adapter fused is the same as `apply_`.

    In plain PyTorch, for disjoint or overlapping adapters alike::

        base = saved.to(compute)
        total = base.clone()
        for k, (at, v) in enumerate(zip(positions, values)):  # where adapter k's granules lie in the union
            total[at] += alphas[k] * (v if delta[k] else v - base[at])
        weight.view(-1, granule)[indices] = total.to(weight.dtype)
    """
    plan = (indices, offsets, sources, members)
    _fuse_(weight, saved, *plan, values, alphas, delta=delta, refuse=refuse, granule=granule)


# ---- gradient ----------------------------------------------------------------------------------------------


def sampled_grad(grad_output: Tensor, input: Tensor, indices: Tensor, granule: int = 1) -> Tensor:
    """The weight gradient of a linear layer at `indices` alone (SDDMM): `[nnz]`, float32 (float64 for float64).

    For `output = input @ weight.T` with `weight` `[m, n]`: `grad_output` is `[..., m]`, `input` `[..., n]` with the
    same leading dimensions and float dtype, both contiguous, and `granule` divides `m * n`. The dense gradient is never
    in memory as a whole: where the mask is dense enough, a GPU computes at most 64 MB of it at a time and takes the
    entries; in float32 that product follows `torch.set_float32_matmul_precision`. Differentiable in `grad_output` and
    `input`.

    Deterministic on one device and vector width for any thread count; other devices sum in another order.

    The same in plain PyTorch::

        dense = grad_output.view(-1, m).T.to(compute) @ input.view(-1, n).to(compute)
        dense.view(-1, granule)[indices].view(-1)
    """
    return _sampled_grad(grad_output, input, indices, granule)  # type: ignore[no-any-return]


# ---- optimize ----------------------------------------------------------------------------------------------


def _as_tensors(op: str, step: int | Tensor, lr: float | Tensor) -> bool:
    """Whether the `.tensor` overload is meant."""
    tensors = isinstance(step, Tensor)
    if tensors != isinstance(lr, Tensor):
        raise RuntimeError(
            f"{op}: step and lr must both be numbers or both be tensors, got {type(step).__name__} and "
            f"{type(lr).__name__}"
        )
    return tensors


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
    """One AdamW step on the selected entries, and the weight written with it.

    The formulas of `torch.optim.AdamW` (Loshchilov and Hutter, arXiv 1711.05101), on `[nnz]` entries only.

    - `weight`: a float dtype. `master`, `exp_avg`, `exp_avg_sq`: `[nnz]`, float32 (float64 for float64), updated;
      `master` holds the selected entries before they are rounded to the weight's dtype.
    - `grad`: `[nnz]`, or the weight's shape and then read at `indices` only; the weight's dtype or float32.
    - `step`: which step this is, counted from 1. `step` and `lr` are both numbers, or both tensors of one entry on the
      weight's device (int64 or float32; float32 or float64). Under `torch.compile` a number that changes makes torch
      compile again, and a captured CUDA graph keeps the one it was captured with: pass tensors there.

    For each entry, every operation rounded; what all entries share is computed in double and rounded once::

        p = p * (1 - lr * weight_decay)
        m = m + (g - m) * (1 - beta1)
        v = v * beta2 + (g * g) * (1 - beta2)
        denominator = sqrt(v) / sqrt(1 - beta2**step) + eps
        p = p - lr / (1 - beta1**step) * (m / denominator)
        weight = p
    """
    op = _adamw_tensor_ if _as_tensors("adamw_", step, lr) else _adamw_
    op(
        weight,
        indices,
        master,
        exp_avg,
        exp_avg_sq,
        grad,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        granule=granule,
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
    """One SGD step on the selected entries, and the weight written with it.

    The formulas of `torch.optim.SGD`. `momentum_buffer` is given exactly when `momentum` is not 0, and starts as
    zeros (torch starts it as the first gradient: the same unless `dampening` is not 0). `nesterov` needs momentum
    above 0 and no dampening. `lr`: a number, or a tensor of one entry on the weight's device. The other arguments
    are as in `adamw_`.

    For each entry, every operation rounded::

        g = g + weight_decay * p                                # if weight_decay != 0
        buffer = momentum * buffer + (1 - dampening) * g        # if momentum != 0
        g = g + momentum * buffer if nesterov else buffer       # if momentum != 0
        p = p - lr * g
        weight = p
    """
    op = _sgd_tensor_ if isinstance(lr, Tensor) else _sgd_
    op(
        weight,
        indices,
        master,
        momentum_buffer,
        grad,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        granule=granule,
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
    """`adamw_` over lists with one `step` and one set of hyper-parameters, in one call: a whole model's step.

    All tensors on one device; everything is checked before the first write. Weights and state must not overlap any
    other tensor of the call.
    """
    op = _foreach_adamw_tensor_ if _as_tensors("foreach_adamw_", step, lr) else _foreach_adamw_
    op(
        weights,
        indices,
        masters,
        exp_avgs,
        exp_avg_sqs,
        grads,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        granule=granule,
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
    """`sgd_` over lists with one set of hyper-parameters, in one call: a whole model's step.

    `momentum_buffers`: one for each weight, or None where `momentum` is 0. All tensors on one device; everything is
    checked before the first write. Weights and state must not overlap any other tensor of the call.
    """
    op = _foreach_sgd_tensor_ if isinstance(lr, Tensor) else _foreach_sgd_
    op(
        weights,
        indices,
        masters,
        momentum_buffers,
        grads,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        granule=granule,
    )


# ---- select ------------------------------------------------------------------------------------------------


def select_top(
    weight: Tensor, grad: Tensor | None, k: int, *, score: Literal["magnitude", "grad", "snip"], granule: int = 1
) -> Tensor:
    """The `k` granules with the highest score, exact, as indices in ascending order: `[k]`.

    The masks WM, Grad and SNIP of arXiv 2406.13175, section 3.1. int32 if there are fewer than 2^31 granules, else
    int64.

    - `score`: "magnitude" |w|, "grad" |g| or "snip" |w * g|, in fp32 (fp64), summed over a granule in entry order.
      Ties go to the lower index and NaN scores come last.
    - `weight`: a float dtype. `grad`: the weight's shape, its dtype or float32; "magnitude" ignores it.
    - `k`: 0 to the number of granules.

    The same indices on every device and for any number of threads. Scores are never in memory as a whole: the CPU
    kernel keeps at most about `4 * k + 65536` candidates, of 8 bytes (12 for float64).

    For granule 1 and no ties, in plain PyTorch::

        weight.float().abs().view(-1).topk(k).indices.sort().values
    """
    return _select_top(weight, grad, k, score=score, granule=granule)  # type: ignore[no-any-return]


def select_random(
    numel: int, k: int, seed: int, *, device: torch.device | str | None = None, granule: int = 1
) -> Tensor:
    """`k` distinct granules of `numel // granule`, chosen by `seed`, as indices in ascending order: `[k]`.

    The mask Rand of arXiv 2406.13175, section 3.1. The choice is a function of `numel // granule`, `k` and
    `seed` (mod 2^64) alone: the same on every device, and frozen, since a file may keep the seed in place of the
    mask. It costs time and memory in the order of `k`. int32 if there are fewer than 2^31 granules, else int64.
    `device` None is the CPU.

    Method: the images of 0 to k-1 under a keyed Feistel permutation of eight splitmix64 rounds on the smallest power
    of two that holds the domain; an image outside the domain is permuted again until it lies inside.

    A similar choice (not the same one) in plain PyTorch::

        torch.randperm(numel // granule)[:k].sort().values
    """
    return _select_random(numel, k, seed, device=device, granule=granule)  # type: ignore[no-any-return]


# ---- codec -------------------------------------------------------------------------------------------------


def encode_indices(indices: Tensor, granule: int = 1, *, version: int = 1) -> Tensor:
    """Indices as bytes: a 1-D uint8 tensor, on the same device.

    The code of the file format (docs/format.md): blocks of 4096 indices, each an anchor and its gaps. Version 1 takes
    about a byte an index at 1 %, and 16 bits at 0.1 % and below. Version 2 has one kind of block more, for where that
    is shorter: within 2 % of the entropy of a random mask. `decode_indices` reads both, but that of a version of this
    library that knows version 1 alone refuses the other. `granule` is only validated: a code holds granule numbers.
    Refuses indices that are not strictly increasing and at least 0; may synchronise.
    """
    return _encode_indices(indices, granule, version=version)  # type: ignore[no-any-return]


def decode_indices(code: Tensor, count: int, limit: int, dtype: torch.dtype, granule: int = 1) -> Tensor:
    """The `count` indices that `code` holds: `[count]`, int32 or int64, on the code's device.

    The code may come from anywhere: refuses, naming the byte, anything but exactly `count` indices strictly
    increasing below `limit // granule` that fit `dtype`. `limit` counts the entries of the weight and is a multiple
    of `granule`. May synchronise.
    """
    return _decode_indices(code, count, limit, dtype, granule)  # type: ignore[no-any-return]


# ---- fingerprint -------------------------------------------------------------------------------------------


def fingerprint(weight: Tensor, granule: int = 1) -> Tensor:
    """A 64-bit hash of the weight's bits: an int64 scalar tensor on the weight's device.

    The sum mod 2^64 of splitmix64(word_p ^ (p * 0x9E3779B97F4A7C15)) over the little-endian 64-bit words, the last
    one padded with zeros. Any dtype of 1, 2, 4 or 8 bytes; 0 for an empty weight. It tells a wrong base from the right
    one, but does not protect against a forged one. `granule` is only validated.
    """
    return _fingerprint(weight, granule)  # type: ignore[no-any-return]


def fingerprint_at(weight: Tensor, indices: Tensor, granule: int = 1) -> Tensor:
    """`fingerprint`'s sum over the words that the selected granules touch, each once: an int64 scalar tensor.

    It keeps a fingerprint current without reading the whole weight (int64 arithmetic wraps)::

        before = fingerprint_at(weight, indices)
        swap_(weight, indices, values)
        new = old - before + fingerprint_at(weight, indices)
    """
    return _fingerprint_at(weight, indices, granule)  # type: ignore[no-any-return]


def fingerprint_part(weight: Tensor, first: int, run: int, stride: int, granule: int = 1) -> Tensor:
    """What a part of a larger weight adds to `fingerprint` of the whole: an int64 scalar tensor on the part's device.

    The sums of all parts add up to the fingerprint (int64 arithmetic wraps). Word p of the part is word
    ``first + p // run * stride + p % run`` of the whole: for some rows, ``first`` is the first row's first word and one
    run holds all; for some columns, ``run`` is their words in a row and ``stride`` the words of a whole row::

        total = sum(fingerprint_part(part, rank * words, words, words) for rank, part in enumerate(weight.chunk(4)))

    Args:
        weight: contiguous, of any dtype of 1, 2, 4 or 8 bytes. Each part begins with a word of the whole; the last one
            may end within one, which is padded with zeros.
        first, run, stride: in 64-bit words; ``stride`` is at least ``run``.
        granule: is only validated.
    """
    return _fingerprint_part(weight, first, run, stride, granule)  # type: ignore[no-any-return]


# ---- diff --------------------------------------------------------------------------------------------------


def diff_(snapshot: Tensor, weight: Tensor, granule: int = 1, *, before: bool = False) -> tuple[Tensor, Tensor]:
    """What has changed in `weight` since `snapshot`, which becomes `weight` in the same pass.

    `snapshot` has the weight's shape, dtype (any of 1, 2, 4 or 8 bytes) and device. Returns `indices`, the granules
    whose bits differ (int32, int64 from 2^31 granules on), and `values`, the weight's entries there: what `scatter_`
    takes to bring a copy of the old snapshot up to date; with `before`, what the snapshot had there. Bits are compared,
    not numbers: NaNs with other payloads differ, and so do 0.0 and -0.0. Synchronises on a GPU, since the sizes of the
    results depend on the content.

    The same in plain PyTorch, for a two-byte dtype::

        new, old = weight.view(torch.int16).view(-1, granule), snapshot.view(torch.int16).view(-1, granule)
        indices = (new != old).any(1).nonzero().view(-1).int()
        values = (snapshot if before else weight).view(-1, granule)[indices].view(-1)
        snapshot.copy_(weight)
    """
    return _diff_(snapshot, weight, granule, before=before)  # type: ignore[no-any-return]


def foreach_diff_(
    snapshots: Sequence[Tensor], weights: Sequence[Tensor], granule: int = 1, *, before: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """`diff_` over lists, in one call: two lists of tensors, `indices` and `values`.

    All tensors on one device; everything is checked before the first write. A snapshot must not overlap any other
    tensor of the call. Not for a compiled graph: torch cannot trace an op that writes its arguments and returns lists;
    there, call `diff_`.
    """
    return _foreach_diff_(snapshots, weights, granule, before=before)  # type: ignore[no-any-return]


# ---- overlay -----------------------------------------------------------------------------------------------


def sparse_linear(
    input: Tensor, indices: Tensor, values: Tensor, out_features: int, *, transposed: bool = False, granule: int = 1
) -> Tensor:
    """A linear layer whose weight is zero except for `values` at `indices`: `[..., K] -> [..., out_features]`.

    - `input`: `[..., K]`, a float dtype; the result has its dtype.
    - `values`: `[nnz]`, input's dtype or float32. The indices number granules of the weight `[out_features, K]`, or,
      with `transposed`, of `[K, out_features]`, which is then used as it lies: `input @ weight`.

    Sums are made in float32 (float64 for float64) and rounded once. Entries that the mask leaves out are not zeros
    but nothing: an infinity that meets none of them does no harm. Differentiable in `input` (the same op, transposed)
    and `values` (`sampled_grad`), any number of times and in forward mode.

    Deterministic on one device and vector width for any thread count. The order of a sum depends on the shapes, so
    also on how many tokens there are. A CUDA op skips indices that are out of range.

    The same in plain PyTorch::

        weight = torch.zeros(out_features, K, dtype=compute)
        weight.view(-1, granule)[indices] = values.to(compute).view(-1, granule)
        (input.to(compute) @ weight.T).to(input.dtype)
    """
    return _sparse_linear(  # type: ignore[no-any-return]
        input, indices, values, out_features, transposed=transposed, granule=granule
    )


def sparse_linear_add_(
    output: Tensor,
    input: Tensor,
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    adapters: Tensor,
    alphas: Tensor,
    granule: int = 1,
    *,
    transposed: bool = False,
) -> None:
    """Lays adapters over a layer that is never written: adds to each token's output what its adapter's delta gives.

    `output[t] += alphas[k] * (weight_k @ input[t])` for each token t and `k = adapters[t]`, where `weight_k` is zero
    except for `values[k]` at `indices[k]`, as in `sparse_linear`.

    - `output`: `[..., m]`, a float dtype, changed in place. `input`: `[..., n]`, the same dtype and leading dimensions.
    - `indices`, `values`: a tensor for each adapter, 1 to 32767 of them; all values have output's dtype or all float32.
    - `adapters`: int32, one number for each token (the leading dimensions, flat); -1: no adapter, and the token's
      output keeps its bits, as it does where the adapter's alpha is 0.
    - `alphas`: one for each adapter, float32 (float64 for float64). `adapters` and `alphas` are tensors, so that a
      captured CUDA graph can change them.

    The sum of a token is made in float32 (float64 for float64); `output + alpha * sum` is rounded once to output's
    dtype. A CPU op refuses a number that names no adapter, and checks the indices of the adapters that are named; a
    CUDA op, one launch for all adapters, leaves such tokens as they are and skips indices that are out of range.

    Deterministic on one device and vector width for any thread count. The order of a sum depends on the shapes, so
    also on how many tokens and adapters a call has.

    The same in plain PyTorch::

        for k, (at, own) in enumerate(zip(indices, values)):
            weight = torch.zeros(m, n, dtype=compute)
            weight.view(-1, granule)[at] = own.to(compute).view(-1, granule)
            rows = adapters == k
            sums = input.view(-1, n)[rows].to(compute) @ weight.T
            output.view(-1, m)[rows] = (output.view(-1, m)[rows].to(compute) + alphas[k] * sums).to(output.dtype)
    """
    _sparse_linear_add_(output, input, indices, values, adapters, alphas, granule=granule, transposed=transposed)
