"""The optimize family: masked-gradient steps, state in fp32 (fp64 for fp64) beside the weight's own dtype.

The formulas and the order of their roundings are those of csrc/core/optimize.h. Numbers that a whole call shares are
computed in double on the device, so that `step` and `lr` may be tensors without the host waiting for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .arithmetic import narrow, number, widen
from .launch import checked, compute, dtype, launch, number_bits
from .walk import deal, tile, walk


@triton.jit
def given(x, TYPE: tl.constexpr):
    """A number in double precision: from an argument's bits, or read from memory, where it is a TYPE."""
    if TYPE is None:
        return number(x, tl.float64)
    else:
        # To 64 bits first: the interpreter takes a low address for an int32.
        return tl.load(x.to(tl.int64).to(tl.pointer_type(TYPE))).to(tl.float64)


@triton.jit
def power(base, exponent):
    """base ** exponent by repeated squaring: the same multiplications on every device."""
    result = tl.full((), 1, tl.float64)
    while exponent > 0:
        if exponent % 2 == 1:
            result *= base
        base *= base
        exponent //= 2
    return result


@triton.jit
def square_root(x):
    """Correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide(x, y):
    """Correctly rounded."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit(do_not_specialize=["step", "lr", "beta1", "beta2", "eps", "weight_decay"])
def adamw_numbers_kernel(
    numbers,
    step: tl.int64,
    lr: tl.int64,
    beta1: tl.int64,
    beta2: tl.int64,
    eps: tl.int64,
    weight_decay: tl.int64,
    STEP: tl.constexpr,
    LR: tl.constexpr,
):
    """Writes what adamw_tile reads: decay, rest1, beta2, rest2, root, eps, step_size, each rounded once. STEP and LR
    are the types of the tensors if `step` and `lr` are addresses, else None."""
    if STEP is None:
        t = step
    else:
        t = tl.load(step.to(tl.int64).to(tl.pointer_type(STEP))).to(tl.int64)
    rate = given(lr, LR)
    first, second = number(beta1, tl.float64), number(beta2, tl.float64)
    C: tl.constexpr = numbers.dtype.element_ty
    tl.store(numbers + 0, (1 - rate * number(weight_decay, tl.float64)).to(C))
    tl.store(numbers + 1, (1 - first).to(C))
    tl.store(numbers + 2, second.to(C))
    tl.store(numbers + 3, (1 - second).to(C))
    tl.store(numbers + 4, tl.sqrt(1 - power(second, t)).to(C))
    tl.store(numbers + 5, number(eps, tl.float64).to(C))
    tl.store(numbers + 6, (rate / (1 - power(first, t))).to(C))


class Rule(NamedTuple):
    """The form of the gradient, and which parts of sgd are used."""

    dense: bool
    wide: tl.dtype  # of the arithmetic
    buffer: bool = False
    decays: bool = False
    nesterov: bool = False
    lr: tl.dtype | None = None  # of the tensor, if it is one


@triton.jit
def load_gradient(grad, position, entry, given, inside, G: tl.constexpr, RULE: tl.constexpr):
    if RULE.dense:
        return widen(tl.load(grad + entry, mask=inside), G, RULE.wide)
    else:
        return widen(tl.load(grad + position, mask=given), G, RULE.wide)


@triton.jit
def adamw_tile(pointers, place, numbers, WHOLE: tl.constexpr, DEAL: tl.constexpr, RULE: tl.constexpr):
    weight, indices, grad, master, exp_avg, exp_avg_sq = pointers
    C: tl.constexpr = RULE.wide
    position, entry, given, inside = tile(indices, place, WHOLE, DEAL)
    decay, rest1 = tl.load(numbers + 0), tl.load(numbers + 1)
    beta2, rest2 = tl.load(numbers + 2), tl.load(numbers + 3)
    root, eps, step_size = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6)
    g = load_gradient(grad, position, entry, given, inside, DEAL.types[2], RULE)
    old_p = tl.load(master + position, mask=given)
    old_m = tl.load(exp_avg + position, mask=given)
    old_v = tl.load(exp_avg_sq + position, mask=given)
    p, m, v = widen(old_p, C, C), widen(old_m, C, C), widen(old_v, C, C)
    m = m + (g - m) * rest1
    v = v * beta2 + (g * g) * rest2
    p = p * decay - step_size * divide(m, divide(square_root(v), root) + eps)
    tl.store(exp_avg + position, tl.where(inside, narrow(m, C), old_m), mask=given)
    tl.store(exp_avg_sq + position, tl.where(inside, narrow(v, C), old_v), mask=given)
    tl.store(master + position, tl.where(inside, narrow(p, C), old_p), mask=given)
    tl.store(weight + entry, narrow(p, DEAL.types[0]), mask=inside)


@triton.jit(do_not_specialize=["members", "granule"])
def adamw_kernel(jobs, members, granule, numbers, DEAL: tl.constexpr, RULE: tl.constexpr):
    walk(adamw_tile, jobs, members, granule, numbers, DEAL, RULE)


@triton.jit
def sgd_tile(pointers, place, settings, WHOLE: tl.constexpr, DEAL: tl.constexpr, RULE: tl.constexpr):
    weight, indices, grad, master = pointers[0], pointers[1], pointers[2], pointers[3]
    lr, momentum, rest, decay = settings
    C: tl.constexpr = RULE.wide
    position, entry, there, inside = tile(indices, place, WHOLE, DEAL)
    g = load_gradient(grad, position, entry, there, inside, DEAL.types[2], RULE)
    old_p = tl.load(master + position, mask=there)
    p = widen(old_p, C, C)
    if RULE.decays:
        g = g + number(decay, C) * p
    if RULE.buffer:
        old_b = tl.load(pointers[4] + position, mask=there)
        b = number(momentum, C) * widen(old_b, C, C) + number(rest, C) * g
        tl.store(pointers[4] + position, tl.where(inside, narrow(b, C), old_b), mask=there)
        if RULE.nesterov:
            g = g + number(momentum, C) * b
        else:
            g = b
    p = p - given(lr, RULE.lr).to(C) * g
    tl.store(master + position, tl.where(inside, narrow(p, C), old_p), mask=there)
    tl.store(weight + entry, narrow(p, DEAL.types[0]), mask=inside)


@triton.jit(do_not_specialize=["members", "granule", "lr", "momentum", "rest", "decay"])
def sgd_kernel(
    jobs,
    members,
    granule,
    lr: tl.int64,
    momentum: tl.int64,
    rest: tl.int64,
    decay: tl.int64,
    DEAL: tl.constexpr,
    RULE: tl.constexpr,
):
    walk(sgd_tile, jobs, members, granule, (lr, momentum, rest, decay), DEAL, RULE)


def _number(x: float | Tensor) -> int:
    return x.data_ptr() if isinstance(x, Tensor) else number_bits(x, tl.float64)


def _type(x: float | Tensor) -> tl.dtype | None:
    return dtype(x) if isinstance(x, Tensor) else None


def _dense(granule: int) -> Callable[..., bool]:
    """Whether the gradient of a member has the weight's shape."""
    return lambda weight, indices, grad, *_: checks.is_dense(grad, weight, indices.numel() * granule)


def _adamw(
    members: Iterable[tuple[Tensor, ...]],
    step: int | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    granule: int,
) -> None:
    """For members (weight, indices, grad, master, exp_avg, exp_avg_sq)."""
    dense = _dense(granule)

    @cache
    def numbers_of(wide: torch.dtype, device: torch.device) -> Tensor:
        """Made once per compute dtype: a list may hold fp64 weights beside others."""
        numbers = torch.empty(7, dtype=wide, device=device)
        at = step.data_ptr() if isinstance(step, Tensor) else step
        others = (_number(x) for x in (lr, beta1, beta2, eps, weight_decay))
        launch(adamw_numbers_kernel, 1, numbers, at, *others, STEP=_type(step), LR=_type(lr))
        return numbers

    def rule(*member: Tensor) -> tuple[tuple[Tensor], Rule]:
        weight = member[0]
        numbers = numbers_of(checks.compute_dtype(weight.dtype), weight.device)
        return (numbers,), Rule(dense(*member), compute(weight))

    deal(adamw_kernel, members, granule, rule, dense, entries=512)


@checked
def adamw_(
    weight: Tensor,
    indices: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    step: int | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    granule: int,
) -> None:
    members = [(weight, indices, grad, master, exp_avg, exp_avg_sq)]
    _adamw(members, step, lr, beta1, beta2, eps, weight_decay, granule)


adamw_tensor_ = adamw_


@checked
def foreach_adamw_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    step: int | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    granule: int,
) -> None:
    members = zip(weights, indices, grads, masters, exp_avgs, exp_avg_sqs, strict=True)
    _adamw(members, step, lr, beta1, beta2, eps, weight_decay, granule)


foreach_adamw_tensor_ = foreach_adamw_


def _sgd(
    members: Iterable[tuple[Tensor, ...]],
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    granule: int,
) -> None:
    """For members (weight, indices, grad, master) or (weight, indices, grad, master, momentum_buffer)."""
    dense = _dense(granule)

    def rule(*member: Tensor) -> tuple[tuple[int, ...], Rule]:
        wide = compute(member[0])
        numbers = (number_bits(x, wide) for x in (momentum, 1 - dampening, weight_decay))
        return (_number(lr), *numbers), Rule(
            dense(*member), wide, len(member) == 5, weight_decay != 0, nesterov, _type(lr)
        )

    deal(sgd_kernel, members, granule, rule, dense, entries=512)


@checked
def sgd_(
    weight: Tensor,
    indices: Tensor,
    master: Tensor,
    momentum_buffer: Tensor | None,
    grad: Tensor,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    granule: int,
) -> None:
    buffer = () if momentum_buffer is None else (momentum_buffer,)
    _sgd([(weight, indices, grad, master, *buffer)], lr, momentum, dampening, weight_decay, nesterov, granule)


sgd_tensor_ = sgd_


@checked
def foreach_sgd_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    masters: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    granule: int,
) -> None:
    buffers = () if momentum_buffers is None else (momentum_buffers,)
    members = zip(weights, indices, grads, masters, *buffers, strict=True)
    _sgd(members, lr, momentum, dampening, weight_decay, nesterov, granule)


foreach_sgd_tensor_ = foreach_sgd_
