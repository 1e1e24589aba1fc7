"""The optimize family: masked-gradient steps, state in fp32 (fp64 for fp64) beside the weight's own dtype.

Formulas and the order of their roundings are those of csrc/core/optimize.h. What is one number a call is computed in
double by the kernel itself, so that `step` and `lr` may be tensors that nobody waits for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .arithmetic import narrow, number, widen
from .launch import bits, checked, compute, dtype, launch, number_bits, tile, walk


@triton.jit
def given(x, IS_TENSOR: tl.constexpr):
    """A number of double precision: an argument's bits, or read where it lies."""
    if IS_TENSOR:
        return tl.load(x).to(tl.float64)
    else:
        return number(x, tl.float64)


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
    numbers, step, lr, beta1, beta2, eps, weight_decay, STEP_IS_TENSOR: tl.constexpr, LR_IS_TENSOR: tl.constexpr
):
    """What adamw_kernel reads: decay, rest1, beta2, rest2, root, eps, step_size, each rounded once."""
    if STEP_IS_TENSOR:
        t = tl.load(step).to(tl.int64)
    else:
        t = step.to(tl.int64)
    rate = given(lr, LR_IS_TENSOR)
    first, second = number(beta1, tl.float64), number(beta2, tl.float64)
    C: tl.constexpr = numbers.dtype.element_ty
    tl.store(numbers + 0, (1 - rate * number(weight_decay, tl.float64)).to(C))
    tl.store(numbers + 1, (1 - first).to(C))
    tl.store(numbers + 2, second.to(C))
    tl.store(numbers + 3, (1 - second).to(C))
    tl.store(numbers + 4, tl.sqrt(1 - power(second, t)).to(C))
    tl.store(numbers + 5, number(eps, tl.float64).to(C))
    tl.store(numbers + 6, (rate / (1 - power(first, t))).to(C))


@triton.jit
def load_gradient(grad, position, entry, inside, G: tl.constexpr, C: tl.constexpr, DENSE: tl.constexpr):
    if DENSE:
        return widen(tl.load(grad + entry, mask=inside), G, C)
    else:
        return widen(tl.load(grad + position, mask=inside), G, C)


@triton.jit
def adamw_kernel(
    weight,
    master,
    exp_avg,
    exp_avg_sq,
    grad,
    numbers,
    indices,
    n,
    granules,
    granule,
    DENSE: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    position, entry, _, inside = tile(indices, n, granules, granule, ROWS, COLUMNS)
    decay, rest1 = tl.load(numbers + 0), tl.load(numbers + 1)
    beta2, rest2 = tl.load(numbers + 2), tl.load(numbers + 3)
    root, eps, step_size = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6)
    g = load_gradient(grad, position, entry, inside, G, C, DENSE)
    p = widen(tl.load(master + position, mask=inside), C, C)
    m = widen(tl.load(exp_avg + position, mask=inside), C, C)
    v = widen(tl.load(exp_avg_sq + position, mask=inside), C, C)
    m = m + (g - m) * rest1
    v = v * beta2 + (g * g) * rest2
    p = p * decay - step_size * divide(m, divide(square_root(v), root) + eps)
    tl.store(exp_avg + position, narrow(m, C), mask=inside)
    tl.store(exp_avg_sq + position, narrow(v, C), mask=inside)
    tl.store(master + position, narrow(p, C), mask=inside)
    tl.store(weight + entry, narrow(p, W), mask=inside)


@triton.jit(do_not_specialize=["lr", "momentum", "rest", "decay"])
def sgd_kernel(
    weight,
    master,
    buffer,
    grad,
    lr,
    momentum,
    rest,
    decay,
    indices,
    n,
    granules,
    granule,
    LR_IS_TENSOR: tl.constexpr,
    BUFFER: tl.constexpr,
    DECAYS: tl.constexpr,
    NESTEROV: tl.constexpr,
    DENSE: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    position, entry, _, inside = tile(indices, n, granules, granule, ROWS, COLUMNS)
    g = load_gradient(grad, position, entry, inside, G, C, DENSE)
    p = widen(tl.load(master + position, mask=inside), C, C)
    if DECAYS:
        g = g + number(decay, C) * p
    if BUFFER:
        b = widen(tl.load(buffer + position, mask=inside), C, C)
        b = number(momentum, C) * b + number(rest, C) * g
        tl.store(buffer + position, narrow(b, C), mask=inside)
        if NESTEROV:
            g = g + number(momentum, C) * b
        else:
            g = b
    p = p - given(lr, LR_IS_TENSOR).to(C) * g
    tl.store(master + position, narrow(p, C), mask=inside)
    tl.store(weight + entry, narrow(p, W), mask=inside)


def _number(x: float | Tensor) -> int | Tensor:
    return x if isinstance(x, Tensor) else number_bits(x, tl.float64)


def _numbers(
    weight: Tensor,
    step: int | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> Tensor:
    numbers = torch.empty(7, dtype=checks.compute_dtype(weight.dtype), device=weight.device)
    constants = {"STEP_IS_TENSOR": isinstance(step, Tensor), "LR_IS_TENSOR": isinstance(lr, Tensor)}
    others = (_number(x) for x in (lr, beta1, beta2, eps, weight_decay))
    launch(adamw_numbers_kernel, 1, numbers, step, *others, **constants)
    return numbers


def _adamw(
    weight: Tensor,
    indices: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    numbers: Tensor,
    granule: int,
) -> None:
    constants = {
        "DENSE": checks.is_dense(grad, weight, indices.numel() * granule),
        "W": dtype(weight),
        "G": dtype(grad),
        "C": compute(weight),
    }
    args = (bits(weight), bits(master), bits(exp_avg), bits(exp_avg_sq), bits(grad), numbers)
    walk(adamw_kernel, indices, weight.numel(), granule, *args, entries=512, **constants)


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
    numbers = _numbers(weight, step, lr, beta1, beta2, eps, weight_decay)
    _adamw(weight, indices, master, exp_avg, exp_avg_sq, grad, numbers, granule)


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
    # Once a compute dtype: a list may hold fp64 weights beside others.
    numbers: dict[torch.dtype, Tensor] = {}
    for t, weight in enumerate(weights):
        wide = checks.compute_dtype(weight.dtype)
        if wide not in numbers:
            numbers[wide] = _numbers(weight, step, lr, beta1, beta2, eps, weight_decay)
        _adamw(weight, indices[t], masters[t], exp_avgs[t], exp_avg_sqs[t], grads[t], numbers[wide], granule)


foreach_adamw_tensor_ = foreach_adamw_


def _sgd(
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
    wide = compute(weight)
    constants = {
        "LR_IS_TENSOR": isinstance(lr, Tensor),
        "BUFFER": momentum_buffer is not None,
        "DECAYS": weight_decay != 0,
        "NESTEROV": nesterov,
        "DENSE": checks.is_dense(grad, weight, indices.numel() * granule),
        "W": dtype(weight),
        "G": dtype(grad),
        "C": wide,
    }
    # Without a buffer the kernel never looks at what stands in its place.
    buffer = bits(master if momentum_buffer is None else momentum_buffer)
    scalars = (number_bits(x, wide) for x in (momentum, 1 - dampening, weight_decay))
    args = (bits(weight), bits(master), buffer, bits(grad), _number(lr), *scalars)
    walk(sgd_kernel, indices, weight.numel(), granule, *args, entries=512, **constants)


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
    state = (master, momentum_buffer, grad)
    _sgd(weight, indices, *state, lr, momentum, dampening, weight_decay, nesterov, granule)


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
    for t, weight in enumerate(weights):
        state = (masters[t], None if momentum_buffers is None else momentum_buffers[t], grads[t])
        _sgd(weight, indices[t], *state, lr, momentum, dampening, weight_decay, nesterov, granule)


foreach_sgd_tensor_ = foreach_sgd_
