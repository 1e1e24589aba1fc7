"""The overlay family: a program handles some tokens and some rows of their matrices, which it finds in the sorted
indices by bisection, and walks each row's entries.

For the transposed product, the mask is turned first: sorted by column, on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import narrow, widen
from .launch import bits, bits_dtype, checked, compute, dtype, launch

_FIELDS = tl.constexpr(4)  # per adapter in the table: its indices, whether they are int64, their number, its values
_ADAPTERS = 8  # written by one launch
TILE = 128  # sums per program
MOST_TOKENS = 8  # per program


@triton.jit
def put(table, adapter, indices, wide, count, values):
    tl.store(table + adapter * _FIELDS + 0, indices.to(tl.int64))
    tl.store(table + adapter * _FIELDS + 1, wide.to(tl.int64))
    tl.store(table + adapter * _FIELDS + 2, count.to(tl.int64))
    tl.store(table + adapter * _FIELDS + 3, values.to(tl.int64))


@triton.jit(do_not_specialize=[f"{field}{k}" for field in "iwnv" for k in range(_ADAPTERS)])
def table_kernel(
    table,
    i0, w0, n0, v0, i1, w1, n1, v1, i2, w2, n2, v2, i3, w3, n3, v3,
    i4, w4, n4, v4, i5, w5, n5, v5, i6, w6, n6, v6, i7, w7, n7, v7,
):  # fmt: skip
    """The numbers are kernel arguments: a copy from the host would wait, and could not be captured."""
    put(table, 0, i0, w0, n0, v0)
    put(table, 1, i1, w1, n1, v1)
    put(table, 2, i2, w2, n2, v2)
    put(table, 3, i3, w3, n3, v3)
    put(table, 4, i4, w4, n4, v4)
    put(table, 5, i5, w5, n5, v5)
    put(table, 6, i6, w6, n6, v6)
    put(table, 7, i7, w7, n7, v7)


@triton.jit
def index_at(indices, wide, number, mask):
    """Each list is int32 or int64, so it is read as 32-bit words."""
    word = indices + (number << wide)
    low = tl.load(word, mask=mask, other=0).to(tl.int64)
    high = tl.load(word + 1, mask=mask & (wide != 0), other=0).to(tl.int64)
    return tl.where(wide != 0, (high << 32) | (low & 0xFFFFFFFF), low)


@triton.jit
def entry_at(indices, wide, count, place, granule):
    """The first entry of a sorted list at or after `place`."""
    low = place * 0
    high = low + count
    while tl.max(tl.max(high - low, 1), 0) > 0:
        open = low < high
        middle = (low + high) // 2
        below = (index_at(indices, wide, middle, open) + 1) * granule <= place
        low = tl.where(open & below, middle + 1, low)
        high = tl.where(open & ~below, middle, high)
    past = place - index_at(indices, wide, low, low < count) * granule
    return low * granule + tl.where((low < count) & (past > 0) & (past < granule), past, 0)


@triton.jit
def overlay_kernel(
    input,
    output,
    table,
    adapters,
    alphas,
    count,
    tokens,
    features,
    rows,
    granules,
    granule,
    ADDS: tl.constexpr,
    BITS: tl.constexpr,
    W: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    parts = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    row = ((program % parts).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    token = ((program // parts).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[None, :]
    known = token < tokens
    name = token * 0
    alpha = tl.zeros([1, TOKENS], C)
    if ADDS:
        name = tl.load(adapters + token, mask=known, other=-1).to(tl.int64)
        known &= (name >= 0) & (name < count)
        alpha = tl.load(alphas + name, mask=known, other=0)
        known &= alpha != 0
    about = table + name * _FIELDS
    indices = tl.load(about + 0, mask=known, other=0).to(tl.pointer_type(tl.int32))
    wide = tl.load(about + 1, mask=known, other=0)
    entries = tl.load(about + 2, mask=known, other=0)
    values = tl.load(about + 3, mask=known, other=0).to(tl.pointer_type(BITS))
    start = row * features
    at = entry_at(indices, wide, entries, start + token * 0, granule)
    end = entry_at(indices, wide, entries, start + features + token * 0, granule)
    total = tl.zeros([ROWS, TOKENS], C)
    while tl.max(tl.max(end - at, 1), 0) > 0:
        here = (at < end) & known & (row < rows)
        index = index_at(indices, wide, at // granule, here)
        column = index * granule + at % granule - start
        here &= (index >= 0) & (index < granules) & (column >= 0) & (column < features)
        value = widen(tl.load(values + at, mask=here, other=0), V, C)
        number = widen(tl.load(input + token * features + column, mask=here, other=0), W, C)
        total = tl.where(here, total + value * number, total)
        at += 1
    to = output + token * rows + row
    kept = known & (row < rows)
    if ADDS:
        total = widen(tl.load(to, mask=kept, other=0), W, C) + alpha * total
    tl.store(to, narrow(total, W), mask=kept)


def _table(indices: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    filled = triton.cdiv(len(indices), _ADAPTERS) * _ADAPTERS  # the last adapter again: no token names it
    table = torch.empty((filled, _FIELDS.value), dtype=torch.int64, device=values[0].device)
    for begin in range(0, filled, _ADAPTERS):
        numbers: list[int] = []
        for k in range(begin, begin + _ADAPTERS):
            own = indices[min(k, len(indices) - 1)]
            wide = int(own.dtype == torch.int64)
            numbers += own.data_ptr(), wide, own.numel(), values[min(k, len(indices) - 1)].data_ptr()
        launch(table_kernel, 1, table[begin], *numbers)
    return table


def _turned(indices: Tensor, values: Tensor, rows: int, columns: int, granule: int) -> tuple[Tensor, Tensor]:
    """A mask and its values as those of the transposed matrix, in single entries; what is out of range comes last."""
    index = indices.to(torch.int64)
    entry = (index[:, None] * granule + torch.arange(granule, device=index.device)).view(-1)
    outside = ((index < 0) | (index >= rows * columns // granule)).repeat_interleave(granule, output_size=entry.numel())
    keys = (entry % columns * rows + entry // columns).masked_fill(outside, rows * columns)
    keys, order = keys.sort(stable=True)
    return keys, values[order]


def _product(
    output: Tensor,
    input: Tensor,
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    adapters: Tensor | None,
    alphas: Tensor | None,
    transposed: bool,
    granule: int,
) -> None:
    tokens, features, rows = math.prod(output.shape[:-1]), input.shape[-1], output.shape[-1]
    if output.numel() == 0:
        return
    if transposed:
        turned = [_turned(*one, features, rows, granule) for one in zip(indices, values, strict=True)]
        indices, values, granule = [one for one, _ in turned], [own for _, own in turned], 1
    side = min(MOST_TOKENS, triton.next_power_of_2(tokens))
    constants = {
        "ADDS": adapters is not None,
        "BITS": bits_dtype(values[0]),
        "W": dtype(output),
        "V": dtype(values[0]),
        "C": compute(output),
        "ROWS": TILE // side,
        "TOKENS": side,
    }
    table = _table(indices, values)
    programs = triton.cdiv(rows, TILE // side) * triton.cdiv(tokens, side)
    args = (bits(input), bits(output), table, adapters, alphas, len(indices), tokens, features, rows)
    launch(overlay_kernel, programs, *args, rows * features // granule, granule, **constants)


@checked
def sparse_linear(
    input: Tensor, indices: Tensor, values: Tensor, out_features: int, transposed: bool, granule: int
) -> Tensor:
    output = input.new_empty(*input.shape[:-1], out_features)
    _product(output, input, [indices], [values], None, None, transposed, granule)
    return output


@checked
def sparse_linear_add_(
    output: Tensor,
    input: Tensor,
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    adapters: Tensor,
    alphas: Tensor,
    transposed: bool,
    granule: int,
) -> None:
    _product(output, input, indices, values, adapters, alphas, transposed, granule)
