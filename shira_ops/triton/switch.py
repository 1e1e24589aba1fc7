"""The switch family: gather, scatter_, swap_, apply_, switch_, scatter_add_, their foreach_ forms, and check_indices.

An index that is out of range is skipped where it is used (gather gives 0). A list is a launch a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .arithmetic import convert, narrow, number, widen
from .launch import bits, checked, compute, content, dtype, number_bits, rounded, tile, walk


@triton.jit
def gather_kernel(
    weight, out, indices, n, granules, granule, ZERO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Without ZERO, what is out of range is left as it was."""
    position, entry, given, inside = tile(indices, n, granules, granule, ROWS, COLUMNS)
    base = tl.load(weight + entry, mask=inside, other=0)
    if ZERO:
        tl.store(out + position, base, mask=given)
    else:
        tl.store(out + position, base, mask=inside)


@triton.jit
def scatter_kernel(weight, values, indices, n, granules, granule, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    position, entry, _, inside = tile(indices, n, granules, granule, ROWS, COLUMNS)
    tl.store(weight + entry, tl.load(values + position, mask=inside), mask=inside)


@triton.jit
def swap_kernel(weight, values, indices, n, granules, granule, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    position, entry, _, inside = tile(indices, n, granules, granule, ROWS, COLUMNS)
    base = tl.load(weight + entry, mask=inside)
    value = tl.load(values + position, mask=inside)
    tl.store(weight + entry, value, mask=inside)
    tl.store(values + position, base, mask=inside)


@triton.jit(do_not_specialize=["alpha"])
def mix_kernel(
    weight,
    values,
    saved,
    alpha,
    indices,
    n,
    granules,
    granule,
    RULE: tl.constexpr,
    SAVE: tl.constexpr,
    W: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """weight = base + alpha*values (delta), base + alpha*(values - base) (blend) or values (overwrite)."""
    position, entry, _, inside = tile(indices, n, granules, granule, ROWS, COLUMNS)
    base = tl.load(weight + entry, mask=inside)
    value = tl.load(values + position, mask=inside)
    if SAVE:
        tl.store(saved + position, base, mask=inside)
    if RULE == "overwrite":
        mixed = convert(value, V, W, C)
    else:
        b, v, strength = widen(base, W, C), widen(value, V, C), number(alpha, C)
        if RULE == "delta":
            mixed = narrow(b + strength * v, W)
        else:
            mixed = narrow(b + strength * (v - b), W)
    tl.store(weight + entry, mixed, mask=inside)


def _mix(
    weight: Tensor, indices: Tensor, values: Tensor, saved: Tensor | None, alpha: float, delta: bool, granule: int
) -> None:
    base, kept = bits(weight), None if saved is None else bits(saved)
    floats = weight.dtype in checks.FLOATS
    wide = compute(weight) if floats else tl.float32
    strength = rounded(alpha, wide)
    if strength == 0:
        if kept is not None:
            walk(gather_kernel, indices, weight.numel(), granule, base, kept, ZERO=False)
        return
    constants = {
        "RULE": "delta" if delta else "overwrite" if strength == 1 else "blend",
        "SAVE": kept is not None,
        "W": dtype(weight),
        "V": dtype(values),
        "C": wide,
    }
    # A kernel without `saved` never looks at what stands in its place.
    args = (base, bits(values), base if kept is None else kept, number_bits(strength, wide))
    walk(mix_kernel, indices, weight.numel(), granule, *args, **constants)


def _gather(weight: Tensor, indices: Tensor, granule: int) -> Tensor:
    out = torch.empty(indices.numel() * granule, dtype=weight.dtype, device=weight.device)
    walk(gather_kernel, indices, weight.numel(), granule, bits(weight), bits(out), ZERO=True)
    return out


def _scatter(weight: Tensor, indices: Tensor, values: Tensor, granule: int) -> None:
    walk(scatter_kernel, indices, weight.numel(), granule, bits(weight), bits(values))


def _swap(weight: Tensor, indices: Tensor, values: Tensor, granule: int) -> None:
    walk(swap_kernel, indices, weight.numel(), granule, bits(weight), bits(values))


def _switch(
    weight: Tensor,
    indices_out: Tensor,
    saved_out: Tensor,
    indices_in: Tensor,
    values: Tensor,
    saved_in: Tensor,
    alpha: float,
    delta: bool,
    granule: int,
) -> None:
    # One walk would have to look up each entry of one mask in the other, for at most a seventh of the bytes.
    _scatter(weight, indices_out, saved_out, granule)
    _mix(weight, indices_in, values, saved_in, alpha, delta, granule)


@checked
def gather(weight: Tensor, indices: Tensor, granule: int) -> Tensor:
    return _gather(weight, indices, granule)


@checked
def scatter_(weight: Tensor, indices: Tensor, values: Tensor, granule: int) -> None:
    _scatter(weight, indices, values, granule)


@checked
def swap_(weight: Tensor, indices: Tensor, values: Tensor, granule: int) -> None:
    _swap(weight, indices, values, granule)


@checked
def apply_(
    weight: Tensor, indices: Tensor, values: Tensor, saved: Tensor, alpha: float, delta: bool, granule: int
) -> None:
    _mix(weight, indices, values, saved, alpha, delta, granule)


@checked
def switch_(
    weight: Tensor,
    indices_out: Tensor,
    saved_out: Tensor,
    indices_in: Tensor,
    values: Tensor,
    saved_in: Tensor,
    alpha: float,
    delta: bool,
    granule: int,
) -> None:
    _switch(weight, indices_out, saved_out, indices_in, values, saved_in, alpha, delta, granule)


@checked
def scatter_add_(weight: Tensor, indices: Tensor, values: Tensor, alpha: float, granule: int) -> None:
    _mix(weight, indices, values, None, alpha, True, granule)


@checked
def foreach_gather(weights: Sequence[Tensor], indices: Sequence[Tensor], granule: int) -> list[Tensor]:
    return [_gather(weight, index, granule) for weight, index in zip(weights, indices, strict=True)]


@checked
def foreach_scatter_(
    weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], granule: int
) -> None:
    for arguments in zip(weights, indices, values, strict=True):
        _scatter(*arguments, granule)


@checked
def foreach_swap_(weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], granule: int) -> None:
    for arguments in zip(weights, indices, values, strict=True):
        _swap(*arguments, granule)


@checked
def foreach_apply_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    saved: Sequence[Tensor],
    alpha: float,
    delta: bool,
    granule: int,
) -> None:
    for arguments in zip(weights, indices, values, saved, strict=True):
        _mix(*arguments, alpha, delta, granule)


@checked
def foreach_switch_(
    weights: Sequence[Tensor],
    indices_out: Sequence[Tensor],
    saved_out: Sequence[Tensor],
    indices_in: Sequence[Tensor],
    values: Sequence[Tensor],
    saved_in: Sequence[Tensor],
    alpha: float,
    delta: bool,
    granule: int,
) -> None:
    for t, weight in enumerate(weights):
        _switch(weight, indices_out[t], saved_out[t], indices_in[t], values[t], saved_in[t], alpha, delta, granule)


@checked
def check_indices(indices: Tensor, limit: int, granule: int) -> None:
    content("check_indices", "indices", indices, limit // granule)
