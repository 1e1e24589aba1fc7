"""Every op in plain torch: the executable specification, slow and obvious.

One function per op, named as the op, in the order of csrc/schemas.h. Its arguments are checked before it is called, by
`checks.checked`, so only the formulas are here. The arithmetic is fp32 (fp64 for fp64): one torch operation per
rounding, then one rounding to the weight's dtype, and NaN stored as the canonical quiet NaN. Backends are tested
against these functions bit for bit; they serve where a build has no kernel of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import checks, plan

_U64 = npt.NDArray[np.uint64]
_F = TypeVar("_F", bound=Callable[..., Any])

OPS: dict[str, Callable[..., Any]] = {}  # the reference of each op; overloads by names such as `adamw_.tensor`


def _op(function: _F) -> _F:
    """The reference of the op of this name: called once every argument has been checked, and the indices read."""
    reference = checks.checked(function.__name__, content=True)(function)
    OPS[function.__name__] = reference
    return reference


# Moves copy the bits of an entry, whatever number they mean.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_QUIET_NAN = {
    torch.float16: 0x7E00,
    torch.bfloat16: 0x7FC0,
    torch.float32: 0x7FC00000,
    torch.float64: 0x7FF8000000000000,
}


def _granules(tensor: Tensor, granule: int) -> Tensor:
    """The tensor's own memory as [granules, granule]."""
    return tensor.view(-1).view(tensor.numel() // granule, granule)


def _bits(tensor: Tensor, granule: int = 1) -> Tensor:
    """The bits of the tensor's own memory as [granules, granule]."""
    return _granules(tensor, granule).view(_BITS[tensor.element_size()])


def _compute(tensor: Tensor, weight: Tensor) -> Tensor:
    """Exact: float16, bfloat16 and float32 all widen."""
    return tensor.to(checks.compute_dtype(weight.dtype))


def _scalar(value: float, like: Tensor) -> Tensor:
    """A number rounded to the compute dtype. A tensor, since torch divides by a plain number by its reciprocal."""
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def _round(result: Tensor, dtype: torch.dtype) -> Tensor:
    """One rounding to nearest even; every NaN becomes the canonical one."""
    rounded = result.to(dtype, copy=True)
    rounded.view(_BITS[rounded.element_size()]).masked_fill_(rounded.isnan(), _QUIET_NAN[dtype])
    return rounded


def _convert(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as entries of a weight: their own bits where the dtypes agree, one rounding where not."""
    return values if values.dtype == dtype else _round(values.to(checks.compute_dtype(dtype)), dtype)


def _put(weight: Tensor, indices: Tensor, entries: Tensor, granule: int) -> None:
    _bits(weight, granule).index_copy_(0, indices.to(torch.int64), _bits(entries, granule))


def _take(weight: Tensor, indices: Tensor, granule: int) -> Tensor:
    bits = _bits(weight, granule).index_select(0, indices)
    return bits.view(weight.dtype).view(-1)


# ---- switch ------------------------------------------------------------------------------------------------


@_op
def gather(weight: Tensor, indices: Tensor, granule: int = 1) -> Tensor:
    return _take(weight, indices, granule)


@_op
def scatter_(weight: Tensor, indices: Tensor, values: Tensor, granule: int = 1) -> None:
    _put(weight, indices, values, granule)


def _swap(weight: Tensor, indices: Tensor, values: Tensor, granule: int) -> None:
    old = _take(weight, indices, granule)
    _put(weight, indices, values, granule)
    _bits(values).copy_(_bits(old))


@_op
def swap_(weight: Tensor, indices: Tensor, values: Tensor, granule: int = 1) -> None:
    _swap(weight, indices, values, granule)


def _mix(
    weight: Tensor, indices: Tensor, base: Tensor, values: Tensor, alpha: float, delta: bool, granule: int
) -> None:
    """weight[i] = base + alpha*values (delta) or base + alpha*(values - base); alpha rounds first."""
    if weight.dtype in checks.FLOATS:
        wide_base, wide_values = _compute(base, weight), _compute(values, weight)
        strength = _scalar(alpha, wide_base)
        if float(strength) == 0:
            return
        if delta:
            _put(weight, indices, _round(wide_base + strength * wide_values, weight.dtype), granule)
            return
        if float(strength) != 1:
            _put(weight, indices, _round(wide_base + strength * (wide_values - wide_base), weight.dtype), granule)
            return
    _put(weight, indices, _convert(values, weight.dtype), granule)


def _apply(
    weight: Tensor, indices: Tensor, values: Tensor, saved: Tensor, alpha: float, delta: bool, granule: int
) -> None:
    base = _take(weight, indices, granule)
    _bits(saved).copy_(_bits(base))
    _mix(weight, indices, base, values, alpha, delta, granule)


@_op
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
    _apply(weight, indices, values, saved, alpha, delta, granule)


@_op
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
    _put(weight, indices_out, saved_out, granule)
    _apply(weight, indices_in, values, saved_in, alpha, delta, granule)


@_op
def scatter_add_(weight: Tensor, indices: Tensor, values: Tensor, *, alpha: float = 1.0, granule: int = 1) -> None:
    base = _take(weight, indices, granule)
    _mix(weight, indices, base, values, alpha, True, granule)


@_op
def foreach_gather(weights: Sequence[Tensor], indices: Sequence[Tensor], granule: int = 1) -> list[Tensor]:
    return [_take(weight, index, granule) for weight, index in zip(weights, indices, strict=True)]


@_op
def foreach_scatter_(
    weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], granule: int = 1
) -> None:
    for arguments in zip(weights, indices, values, strict=True):
        _put(*arguments, granule)


@_op
def foreach_swap_(
    weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], granule: int = 1
) -> None:
    for arguments in zip(weights, indices, values, strict=True):
        _swap(*arguments, granule)


@_op
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
    for arguments in zip(weights, indices, values, saved, strict=True):
        _apply(*arguments, alpha, delta, granule)


@_op
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
    for t, weight in enumerate(weights):
        _put(weight, indices_out[t], saved_out[t], granule)
        _apply(weight, indices_in[t], values[t], saved_in[t], alpha, delta, granule)


@_op
def check_indices(indices: Tensor, limit: int, granule: int = 1) -> None:
    """The check of its content is all that it does."""


# ---- fuse --------------------------------------------------------------------------------------------------


@_op
def fuse_plan(indices: Sequence[Tensor], granule: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return plan.make(indices)


@_op
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
    if not refuse:
        _bits(saved).copy_(_bits(_take(weight, indices, granule)))
    base = _compute(_granules(saved, granule), weight)
    total = base.clone()
    # The entries as they are stored when the sum is not needed: the base, or one adapter's own values.
    exact = _granules(saved, granule).clone()
    contributions = torch.zeros_like(indices, dtype=torch.int64)
    exact_ones = torch.zeros_like(contributions)

    entries, adapters, positions = plan.contributions(offsets, sources, members)
    order = entries.argsort(stable=True)
    counts = entries.bincount(minlength=indices.numel())
    begins = counts.cumsum(0) - counts
    for rank in range(int(counts.max()) if counts.numel() > 0 else 0):  # each entry's contribution number `rank`
        at = order[(begins + rank)[counts > rank]]
        for k, tensor in enumerate(values):
            here = at[adapters[at] == k]
            if here.numel() == 0 or float(alphas[k]) == 0:
                continue
            entry = entries[here]
            own = _granules(tensor, granule)[positions[here]]
            wide = _compute(own, weight)
            change = wide if delta[k] else wide - base[entry]
            total[entry] = total[entry] + alphas[k] * change
            contributions[entry] += 1
            if not delta[k] and float(alphas[k]) == 1:
                exact_ones[entry] += 1
                _bits(exact, granule)[entry] = _bits(_convert(own, weight.dtype).contiguous(), granule)
    keeps_bits = (contributions == 0) | ((contributions == 1) & (exact_ones == 1))
    fused = _round(total, weight.dtype)
    bits = torch.where(keeps_bits[:, None], _bits(exact, granule), _bits(fused, granule))
    _put(weight, indices, bits.view(weight.dtype).view(-1), granule)


# ---- gradient ----------------------------------------------------------------------------------------------


@_op
def sampled_grad(grad_output: Tensor, input: Tensor, indices: Tensor, granule: int = 1) -> Tensor:
    rows, columns = grad_output.shape[-1], input.shape[-1]
    dtype = checks.compute_dtype(grad_output.dtype)
    left = grad_output.view(-1, rows) if rows else grad_output.new_zeros(0, 0)
    right = input.view(-1, columns).to(dtype) if columns else input.new_zeros(0, 0)
    entries = (indices.to(torch.int64)[:, None] * granule + torch.arange(granule, device=indices.device)).view(-1)
    result = torch.zeros(entries.numel(), dtype=dtype, device=indices.device)
    if entries.numel() == 0:
        return result
    # A block of rows of the dense gradient at a time: it is never in memory as a whole.
    block = max(1, 2**22 // columns)
    for row in range(0, rows, block):
        bounds = torch.tensor([row * columns, min(row + block, rows) * columns], device=indices.device)
        begin, end = (int(bound) for bound in torch.searchsorted(entries, bounds))
        if begin < end:
            dense = left[:, row : row + block].to(dtype).t() @ right
            result[begin:end] = dense.view(-1)[entries[begin:end] - row * columns]
    return result


# ---- optimize ----------------------------------------------------------------------------------------------


def ipow(base: float, exponent: int) -> float:
    """base ** exponent by repeated squaring in double: the same multiplications on every device."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def _divide(a: float, b: float) -> float:
    with np.errstate(all="ignore"):  # IEEE division: a step of 0 gives infinities on every backend
        return float(np.float64(a) / np.float64(b))


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded, as IEEE 754 requires: torch's own CPU kernel with AVX-512 is an ulp off in one of five."""
    if x.is_cpu:
        with np.errstate(invalid="ignore"):  # the root of a negative number is NaN
            return torch.from_numpy(np.sqrt(x.numpy()))
    return x.sqrt()


def _entries_of(grad: Tensor, weight: Tensor, indices: Tensor, granule: int) -> Tensor:
    """The gradient at the indices, in the compute dtype."""
    dense = checks.is_dense(grad, weight, indices.numel() * granule)
    return _compute(_take(grad, indices, granule) if dense else grad, weight)


def _write_master(weight: Tensor, indices: Tensor, master: Tensor, result: Tensor, granule: int) -> None:
    master.copy_(_round(result, master.dtype))
    _put(weight, indices, _round(result, weight.dtype), granule)


def _adamw(
    weight: Tensor,
    indices: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    granule: int,
) -> None:
    # What all entries share is computed in double and rounded once.
    bias1, bias2 = 1 - ipow(beta1, step), 1 - ipow(beta2, step)
    bias2_sqrt = math.sqrt(bias2) if bias2 >= 0 else math.nan
    decay, step_size = _scalar(1 - lr * weight_decay, master), _scalar(_divide(lr, bias1), master)
    rest1, rest2, beta2_, root = (_scalar(x, master) for x in (1 - beta1, 1 - beta2, beta2, bias2_sqrt))
    g = _entries_of(grad, weight, indices, granule)
    p = master * decay
    m = exp_avg + (g - exp_avg) * rest1
    v = exp_avg_sq * beta2_ + (g * g) * rest2
    denominator = _sqrt(v) / root + _scalar(eps, master)
    p = p - step_size * (m / denominator)
    exp_avg.copy_(_round(m, m.dtype))
    exp_avg_sq.copy_(_round(v, v.dtype))
    _write_master(weight, indices, master, p, granule)


@_op
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
    _adamw(
        weight,
        indices,
        master,
        exp_avg,
        exp_avg_sq,
        grad,
        step=int(step),
        lr=float(lr),
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        granule=granule,
    )


OPS["adamw_.tensor"] = adamw_tensor_ = adamw_


@_op
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
    for arguments in zip(weights, indices, masters, exp_avgs, exp_avg_sqs, grads, strict=True):
        _adamw(
            *arguments,
            step=int(step),
            lr=float(lr),
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            granule=granule,
        )


OPS["foreach_adamw_.tensor"] = foreach_adamw_tensor_ = foreach_adamw_


def _sgd(
    weight: Tensor,
    indices: Tensor,
    master: Tensor,
    momentum_buffer: Tensor | None,
    grad: Tensor,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    granule: int,
) -> None:
    g = _entries_of(grad, weight, indices, granule)
    if weight_decay != 0:
        g = g + _scalar(weight_decay, master) * master
    if momentum_buffer is not None:
        factor = _scalar(momentum, master)
        buffer = factor * momentum_buffer + _scalar(1 - dampening, master) * g
        momentum_buffer.copy_(_round(buffer, buffer.dtype))
        g = g + factor * buffer if nesterov else buffer
    _write_master(weight, indices, master, master - _scalar(lr, master) * g, granule)


@_op
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
    _sgd(
        weight,
        indices,
        master,
        momentum_buffer,
        grad,
        lr=float(lr),
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        granule=granule,
    )


OPS["sgd_.tensor"] = sgd_tensor_ = sgd_


@_op
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
    for t, weight in enumerate(weights):
        _sgd(
            weight,
            indices[t],
            masters[t],
            None if momentum_buffers is None else momentum_buffers[t],
            grads[t],
            lr=float(lr),
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            granule=granule,
        )


OPS["foreach_sgd_.tensor"] = foreach_sgd_tensor_ = foreach_sgd_


# ---- select ------------------------------------------------------------------------------------------------


def granule_scores(weight: Tensor, grad: Tensor | None, score: str, granule: int) -> Tensor:
    """What `select_top` orders granules by: fp32 (fp64 for fp64 weights), -1 for NaN."""
    entries = _compute(_granules(weight, granule), weight)
    if score != "magnitude" and grad is not None:
        gradient = _compute(_granules(grad, granule), weight)
        entries = entries * gradient if score == "snip" else gradient
    entries = entries.abs()
    total = entries[:, 0]
    for column in range(1, granule):  # in entry order: a sum in any other order has other bits
        total = total + entries[:, column]
    return total.where(~total.isnan(), -1)  # scores are never negative, so NaN comes last


@_op
def select_top(weight: Tensor, grad: Tensor | None, k: int, *, score: str, granule: int = 1) -> Tensor:
    total = granule_scores(weight, grad, score, granule)
    dtype = checks.index_dtype(total.numel())
    if k == 0:
        return torch.empty(0, dtype=dtype, device=weight.device)
    least = total.topk(k, sorted=False).values.min()
    above = (total > least).nonzero().view(-1)
    ties = (total == least).nonzero().view(-1)[: k - above.numel()]
    return torch.cat([above, ties]).sort().values.to(dtype)


def _mix64(x: _U64) -> _U64:
    """splitmix64's output for the state x."""
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _permute(x: _U64, keys: _U64, bits: int) -> _U64:
    """A keyed Feistel permutation of [0, 2**bits): eight rounds over a high and a low half."""
    low, high = bits // 2, bits - bits // 2
    right, left = x & np.uint64((1 << low) - 1), x >> np.uint64(low)
    for r, key in enumerate(keys):
        if r % 2 == 0:
            left = left ^ (_mix64(right ^ key) >> np.uint64(64 - high))
        else:
            right = right ^ (_mix64(left ^ key) >> np.uint64(64 - low))
    return (left << np.uint64(low)) | right


@_op
def select_random(numel: int, k: int, seed: int, *, device: torch.device | None = None, granule: int = 1) -> Tensor:
    domain = numel // granule
    dtype = checks.index_dtype(domain)
    if k == 0:
        return torch.empty(0, dtype=dtype, device=device)
    states = [(seed + (r + 1) * 0x9E3779B97F4A7C15) % 2**64 for r in range(8)]
    keys = _mix64(np.array(states, dtype=np.uint64))
    bits = max(2, (domain - 1).bit_length())
    chosen = _permute(np.arange(k, dtype=np.uint64), keys, bits)
    # Cycle walking: the permutation covers a power of two, and an image outside the domain is permuted again.
    while (outside := np.flatnonzero(chosen >= domain)).size:
        chosen[outside] = _permute(chosen[outside], keys, bits)
    chosen.sort()
    return torch.from_numpy(chosen.astype(np.int64)).to(device=device, dtype=dtype)


# ---- codec -------------------------------------------------------------------------------------------------

BLOCK = 4096
_ANCHOR = 16  # bytes: the block's first index, then mode << 56 | where its payload starts
_RICE = 3  # the mode of the Rice code without low bits; 3 + k has k of them
_MOST_LOW = 24


def _escaped(gaps: _U64, unit: type[np.unsignedinteger[Any]]) -> bytes:
    """Gaps as little-endian units: a unit of all ones adds its value and the gap goes on; any other unit ends it."""
    most = int(np.iinfo(unit).max)
    ends = np.cumsum(gaps // np.uint64(most) + np.uint64(1), dtype=np.uint64) - np.uint64(1)
    units = np.full(int(ends[-1]) + 1 if ends.size else 0, most, dtype=unit)
    units[ends] = (gaps % np.uint64(most)).astype(unit)
    return units.astype(np.dtype(unit).newbyteorder("<")).tobytes()


def _units(gaps: _U64, most: int) -> int:
    return int((gaps // np.uint64(most)).sum(dtype=np.uint64)) + gaps.size


def _low_bits(numbers: _U64, width: int) -> npt.NDArray[np.uint8]:
    """The low `width` bits of each number, from the lowest one on."""
    places = np.arange(width, dtype=np.uint64)
    return (numbers[:, None] >> places & np.uint64(1)).astype(np.uint8).reshape(-1)


def _packed(bits: npt.NDArray[np.uint8]) -> bytes:
    return np.packbits(bits, bitorder="little").tobytes()


def _rice(gaps: _U64) -> tuple[int, bytes]:
    """How many low bits make the Rice code the shortest, and that code."""
    lengths = [gaps.size * (1 + low) + int((gaps >> np.uint64(low)).sum()) for low in range(_MOST_LOW + 1)]
    low = lengths.index(min(lengths))
    ones = np.zeros(lengths[low] - gaps.size * low, dtype=np.uint8)
    ones[((gaps >> np.uint64(low)) + np.uint64(1)).cumsum().astype(np.int64) - 1] = 1
    return low, _packed(_low_bits(gaps, low)) + _packed(ones)


@_op
def encode_indices(indices: Tensor, granule: int = 1, *, version: int = 1) -> Tensor:
    numbers = indices.to(torch.int64).cpu().numpy().astype(np.uint64)
    anchors, payloads, start = [], [], 0
    for begin in range(0, numbers.size, BLOCK):
        block = numbers[begin : begin + BLOCK]
        gaps = np.diff(block) - np.uint64(1)
        if _units(gaps, 255) <= 2 * block.size:
            mode, payload = 0, _escaped(gaps, np.uint8)
        elif 2 * _units(gaps, 65535) <= 8 * block.size:
            mode, payload = 1, _escaped(gaps, np.uint16)
        else:
            mode, payload = 2, gaps.astype("<u8").tobytes()
        if version == 2 and gaps.size and int(gaps.max()) < 2**32:
            low, shorter = _rice(gaps)
            if len(shorter) < len(payload):
                mode, payload = _RICE + low, shorter
        anchors += [int(block[0]), mode << 56 | start]
        payloads.append(payload)
        start += len(payload)
    code = np.array(anchors, dtype="<u8").tobytes() + b"".join(payloads)
    return torch.from_numpy(np.frombuffer(code, dtype=np.uint8).copy()).to(indices.device)


def _gaps(payload: bytes, mode: int) -> tuple[_U64, npt.NDArray[np.int64], int]:
    """The complete gaps of a payload, the byte at which each begins, and the byte after the last."""
    unit = np.dtype(("u1", "<u2", "<u8")[mode])
    units = np.frombuffer(payload, dtype=unit, count=len(payload) // unit.itemsize).astype(np.uint64)
    most = np.uint64(256**unit.itemsize - 1)
    ends = np.arange(units.size) if mode == 2 else np.flatnonzero(units != most)
    begins = np.concatenate([np.zeros(1, dtype=np.int64), ends + 1])
    escapes = (ends - begins[:-1]).astype(np.uint64)
    return escapes * most + units[ends], begins[:-1] * unit.itemsize, int(begins[-1]) * unit.itemsize


def _rice_gaps(payload: bytes, count: int, low: int) -> tuple[_U64, npt.NDArray[np.int64], int, str]:
    """The complete gaps of a payload that has their low bits, at most `count`; the byte at which each ends, the byte
    after the last, and how much is left after that gap."""
    bits = np.unpackbits(np.frombuffer(payload, dtype=np.uint8), bitorder="little")
    lows = bits[: count * low].reshape(count, low).astype(np.uint64) << np.arange(low, dtype=np.uint64)
    begin = -(-count * low // 8)
    bits = bits[8 * begin :]
    ones = np.flatnonzero(bits)[:count].astype(np.int64)
    zeros = np.diff(ones, prepend=-1).astype(np.uint64) - np.uint64(1)
    gaps = (zeros << np.uint64(low)) + lows[: ones.size].sum(axis=1, dtype=np.uint64)
    # After the last gap there are zeros up to the next byte, and nothing else.
    after = int(ones[-1]) + 1 if ones.size else 0
    end = -(-after // 8)
    stop = end - 1 if bits[after : 8 * end].any() else end
    return gaps, begin + ones // 8, begin + stop, f"{bits.size - after} bits"


def _fewest(gaps: int, mode: int) -> int:
    """The fewest bytes of a payload."""
    low = mode - _RICE
    return -(-gaps * low // 8) + -(-gaps // 8) if 0 <= low <= _MOST_LOW else gaps


def _decode_block(data: bytes, block: int, count: int, granules: int, dtype: torch.dtype) -> _U64:
    """The indices of one block, or a refusal that says what is wrong and at which byte."""

    def refuse(what: str) -> NoReturn:
        raise RuntimeError(f"decode_indices: code must {what}")

    def place(number: int) -> tuple[int, int, int]:
        first, word = np.frombuffer(data, dtype="<u8", count=2, offset=number * _ANCHOR).tolist()
        return first, word >> 56, word & (2**56 - 1)

    blocks = -(-count // BLOCK)
    last, n, anchor, anchors = block + 1 == blocks, min(BLOCK, count - block * BLOCK), block * _ANCHOR, blocks * _ANCHOR
    payload = len(data) - anchors
    first, mode, start = place(block)
    next_first, _, end = (0, 0, payload) if last else place(block + 1)
    if block == 0 and start != 0:
        refuse(f"have its first payload at offset 0, got {start} in block 0 (byte 8)")
    if end > payload or start > end or (start == end and not last):
        refuse(
            f"have increasing payload offsets within its {payload} payload bytes, got {end} after {start} "
            f"in block {block + 1} (byte {anchor + _ANCHOR + 8})"
        )
    if mode > _RICE + _MOST_LOW:
        refuse(f"have modes from 0 to {_RICE + _MOST_LOW}, got {mode} in block {block} (byte {anchor + 15})")

    most = torch.iinfo(dtype).max

    def refuse_outside(index: int, what: str, byte: int) -> NoReturn:
        if index >= granules:
            refuse(f"be strictly increasing in [0, {granules}), got {what} in block {block} (byte {byte})")
        refuse(f"have indices that fit {checks.dtype_name(dtype)}, got {what} in block {block} (byte {byte})")

    bound = min(granules, most + 1)
    if first >= bound:
        refuse_outside(first, f"first index {first}", anchor)
    body = data[anchors + start : anchors + end]
    if mode >= _RICE:
        low = mode - _RICE
        if len(body) < _fewest(n - 1, mode):
            refuse(
                f"have at least {_fewest(n - 1, mode)} bytes in a payload of {n} indices in mode {mode}, "
                f"got {len(body)} in block {block} (byte {anchors + start})"
            )
        lows = -(-(n - 1) * low // 8)
        if np.unpackbits(np.frombuffer(body, dtype=np.uint8, count=lows), bitorder="little")[(n - 1) * low :].any():
            where = f"in block {block} (byte {anchors + start + lows - 1})"
            refuse(f"have zeros where a payload's low bits are padded, got a one {where}")
        gaps, begins, stop, left = _rice_gaps(body, n - 1, low)
    else:
        gaps, begins, stop = _gaps(body, mode)
        stop = int(begins[n - 1]) if gaps.size > n - 1 else stop
        left = f"{len(body) - stop} bytes"
    complete, gaps = gaps.size, gaps[: n - 1]
    # Sums wrap around only after the first index that is out of range, and nothing after that one is read.
    indices = np.uint64(first) + np.concatenate([np.zeros(1, dtype=np.uint64), (gaps + np.uint64(1)).cumsum()])
    outside = np.flatnonzero((gaps >= 2**63) | (indices[1:] >= bound))
    if outside.size:
        k = int(outside[0])
        before, gap = int(indices[k]), int(gaps[k])
        refuse_outside(before + gap + 1, f"a gap of {gap} after index {before}", anchors + start + int(begins[k]))
    if complete < n - 1:
        refuse(
            f"have {n - 1} gaps in each payload of {n} indices, got {complete} by its end "
            f"in block {block} (byte {anchors + end})"
        )
    if stop != len(body):
        refuse(
            f"have {n - 1} gaps in each payload of {n} indices, got {left} after them "
            f"in block {block} (byte {anchors + start + stop})"
        )
    if not last and next_first <= int(indices[-1]):
        refuse(
            f"be strictly increasing in [0, {granules}), got first index {next_first} after {int(indices[-1])} "
            f"in block {block + 1} (byte {anchor + _ANCHOR})"
        )
    return indices


@_op
def decode_indices(code: Tensor, count: int, limit: int, dtype: torch.dtype, granule: int = 1) -> Tensor:
    data = code.cpu().numpy().tobytes()
    blocks = -(-count // BLOCK)
    # Checked before anything is allocated: every index takes at least a byte of code, or a bit, as its anchor tells.
    fewest = count + (_ANCHOR - 1) * blocks
    if blocks * _ANCHOR <= len(data) < fewest:
        lengths = (min(BLOCK, count - begin) - 1 for begin in range(0, count, BLOCK))
        fewest = blocks * _ANCHOR + sum(
            _fewest(gaps, data[number * _ANCHOR + 15]) for number, gaps in enumerate(lengths)
        )
    if len(data) != 0 if count == 0 else len(data) < fewest:
        least = "at least " if count else ""
        raise RuntimeError(f"decode_indices: code must have {least}{fewest} bytes for {count} indices, got {len(data)}")
    indices = np.empty(count, dtype=np.int64)
    for block in range(blocks):
        decoded = _decode_block(data, block, count, limit // granule, dtype)
        indices[block * BLOCK : block * BLOCK + decoded.size] = decoded
    return torch.from_numpy(indices).to(device=code.device, dtype=dtype)


# ---- fingerprint -------------------------------------------------------------------------------------------


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


_GOLDEN, _FACTOR1, _FACTOR2 = (_signed(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shifted(x: Tensor, n: int) -> Tensor:
    """x >> n on 64 bits without a sign: int64's own shift would copy the sign."""
    return torch.bitwise_and(x >> n, 2 ** (64 - n) - 1)


def _splitmix64(x: Tensor) -> Tensor:
    """splitmix64 of every entry; int64 arithmetic wraps, so its bits are those of uint64."""
    z = x + _GOLDEN
    z = (z ^ _shifted(z, 30)) * _FACTOR1
    z = (z ^ _shifted(z, 27)) * _FACTOR2
    return z ^ _shifted(z, 31)


def _words(weight: Tensor, begin: int, end: int) -> Tensor:
    """The little-endian 64-bit words [begin, end) of the weight's bytes, the last one padded with zeros."""
    data = weight.view(-1).view(torch.uint8)[8 * begin : 8 * end]
    padded = data.new_zeros(8 * (end - begin))
    padded[: data.numel()] = data
    return padded.view(torch.int64)


def words_hash(words: Tensor, positions: Tensor) -> Tensor:
    """What 64-bit words at these positions of a weight add to its fingerprint."""
    return _splitmix64(words ^ (positions * _GOLDEN)).sum()


@_op
def fingerprint(weight: Tensor, granule: int = 1) -> Tensor:
    count, chunk = -(-weight.numel() * weight.element_size() // 8), 2**22
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for begin in range(0, count, chunk):
        end = min(begin + chunk, count)
        total += words_hash(_words(weight, begin, end), torch.arange(begin, end, device=weight.device))
    return total


@_op
def fingerprint_part(weight: Tensor, first: int, run: int, stride: int, granule: int = 1) -> Tensor:
    count, chunk = -(-weight.numel() * weight.element_size() // 8), 2**22
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for begin in range(0, count, chunk):
        at = torch.arange(begin, min(begin + chunk, count), device=weight.device)
        total += words_hash(_words(weight, begin, begin + at.numel()), first + at // run * stride + at % run)
    return total


@_op
def fingerprint_at(weight: Tensor, indices: Tensor, granule: int = 1) -> Tensor:
    if indices.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=weight.device)
    size = granule * weight.element_size()
    count = -(-weight.numel() * weight.element_size() // 8)
    begins = indices.to(torch.int64) * size
    first, last = begins // 8, (begins + size - 1) // 8
    # Granules that share a word count it once.
    touched = first[:, None] + torch.arange((size + 6) // 8 + 1, device=weight.device)
    positions = touched[touched <= last[:, None]].unique_consecutive()
    return words_hash(_words(weight, 0, count)[positions], positions)


# ---- diff --------------------------------------------------------------------------------------------------


def _diff(snapshot: Tensor, weight: Tensor, granule: int, before: bool) -> tuple[Tensor, Tensor]:
    changed = (_bits(snapshot, granule) != _bits(weight, granule)).any(1)
    indices = changed.nonzero().view(-1).to(checks.index_dtype(weight.numel() // granule))
    values = _take(snapshot if before else weight, indices, granule)
    _bits(snapshot).copy_(_bits(weight))
    return indices, values


@_op
def diff_(snapshot: Tensor, weight: Tensor, granule: int = 1, *, before: bool = False) -> tuple[Tensor, Tensor]:
    return _diff(snapshot, weight, granule, before)


@_op
def foreach_diff_(
    snapshots: Sequence[Tensor], weights: Sequence[Tensor], granule: int = 1, *, before: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    found = [_diff(snapshot, weight, granule, before) for snapshot, weight in zip(snapshots, weights, strict=True)]
    return [indices for indices, _ in found], [values for _, values in found]


# ---- overlay -----------------------------------------------------------------------------------------------


def _sparse_product(
    input: Tensor, indices: Tensor, values: Tensor, out_features: int, transposed: bool, granule: int
) -> Tensor:
    """`input` [tokens, K] times the sparse matrix, in the compute dtype: one entry after the other, in their order."""
    columns = out_features if transposed else input.shape[-1]
    entries = (indices.to(torch.int64)[:, None] * granule + torch.arange(granule, device=indices.device)).view(-1)
    sums = torch.zeros(out_features, input.shape[0], dtype=checks.compute_dtype(input.dtype), device=input.device)
    wide_input, wide_values = _compute(input, input).t(), _compute(values, input)
    for begin in range(0, entries.numel(), 2**14):
        part = entries[begin : begin + 2**14]
        row, column = part // columns, part % columns
        to, of = (column, row) if transposed else (row, column)
        sums.index_add_(0, to, wide_values[begin : begin + 2**14, None] * wide_input[of])
    return sums.t().contiguous()


@_op
def sparse_linear(
    input: Tensor, indices: Tensor, values: Tensor, out_features: int, *, transposed: bool = False, granule: int = 1
) -> Tensor:
    *lead, features = input.shape
    tokens = input.view(math.prod(lead), features)
    product = _sparse_product(tokens, indices, values, out_features, transposed, granule)
    return _round(product, input.dtype).view(*lead, out_features)


@_op
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
    out_features, tokens = output.shape[-1], adapters.numel()
    rows, given = output.view(tokens, out_features), input.view(tokens, input.shape[-1])
    for k in adapters.unique().tolist():
        if k < 0 or float(alphas[k]) == 0:
            continue
        at = (adapters == k).nonzero().view(-1)
        product = _sparse_product(given[at], indices[k], values[k], out_features, transposed, granule)
        rows[at] = _round(_compute(rows[at], output) + alphas[k] * product, output.dtype)
