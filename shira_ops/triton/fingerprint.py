"""The fingerprint family: sums mod 2^64 over words, so that programs may add in any order.

csrc/core/fingerprint.h has the definition. Words are put together from the widest units that every address and the
length allow: one load per word, except for views at odd addresses and for odd lengths.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import TILE, checked, launch
from .splitmix import GOLDEN, splitmix64

_UNITS = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}


@triton.jit
def add_words(total, data, at, positions, mask, bytes, UNIT: tl.constexpr):
    """Adds the share of the words `at`, which count at `positions`, to `total`; past the last byte zeros are read."""
    each: tl.constexpr = 64 // UNIT.primitive_bitwidth  # units per word
    units = data.to(tl.pointer_type(UNIT), bitcast=True)
    word = tl.zeros(at.shape, tl.uint64)
    for i in tl.static_range(each):
        unit = at * each + i
        part = tl.load(units + unit, mask=mask & (unit * (8 // each) < bytes), other=0)
        word |= part.to(tl.uint64) << (i * UNIT.primitive_bitwidth)
    mixed = splitmix64(word ^ (positions.to(tl.uint64) * GOLDEN))
    tl.atomic_add(total, tl.sum(tl.where(mask, mixed, 0).to(tl.int64, bitcast=True)), sem="relaxed")


@triton.jit
def fingerprint_kernel(total, data, bytes, UNIT: tl.constexpr, WORDS: tl.constexpr):
    positions = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    add_words(total, data, positions, positions, positions * 8 < bytes, bytes, UNIT)


@triton.jit
def placed_kernel(total, data, bytes, first, run, stride, UNIT: tl.constexpr, WORDS: tl.constexpr):
    """The words of a part of a larger tensor, whose runs of `run` words lie `stride` words apart there."""
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    add_words(total, data, at, first + at // run * stride + at % run, at * 8 < bytes, bytes, UNIT)


@triton.jit
def last_word(index, size):
    """The last word that a granule touches; -1 for none, before every word."""
    return tl.where(index < 0, -1, ((index + 1) * size - 1) // 8)


@triton.jit
def touched_kernel(
    total,
    data,
    indices,
    n,
    granules,
    size,
    words,
    bytes,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The words of granules of `size` bytes, at most `words` each, less those that the granule before touches too."""
    program = tl.program_id(0)
    parts = tl.cdiv(words, COLUMNS)
    row = (program // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % parts).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    index = tl.load(indices + row, mask=row < n, other=-1).to(tl.int64)
    before = tl.load(indices + row - 1, mask=(row < n) & (row > 0), other=-1).to(tl.int64)
    first = tl.maximum(index * size // 8, last_word(before, size) + 1)
    positions = (index * size // 8)[:, None] + column[None, :]
    inside = ((index >= 0) & (index < granules))[:, None]
    mask = inside & (positions >= first[:, None]) & (positions <= last_word(index, size)[:, None])
    add_words(total, data, positions, positions, mask, bytes, UNIT)


def _of(weight: Tensor) -> tuple[Tensor, Tensor, int, tl.dtype]:
    """A sum of 0, the weight's bytes, their number, and the unit in which they can be read."""
    data = weight.view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    return total, data, data.numel(), _UNITS[math.gcd(data.data_ptr(), data.numel(), 8)]


@checked
def fingerprint(weight: Tensor, granule: int) -> Tensor:
    total, data, bytes, unit = _of(weight)
    launch(fingerprint_kernel, triton.cdiv(bytes, 8 * TILE), total, data, bytes, UNIT=unit, WORDS=TILE)
    return total


@checked
def fingerprint_part(weight: Tensor, first: int, run: int, stride: int, granule: int) -> Tensor:
    total, data, bytes, unit = _of(weight)
    programs = triton.cdiv(bytes, 8 * TILE)
    launch(placed_kernel, programs, total, data, bytes, first, run, stride, UNIT=unit, WORDS=TILE)
    return total


@checked
def fingerprint_at(weight: Tensor, indices: Tensor, granule: int) -> Tensor:
    total, data, bytes, unit = _of(weight)
    size = granule * weight.element_size()
    words = (size + 6) // 8 + 1
    columns = min(triton.next_power_of_2(words), TILE)
    rows = TILE // columns
    programs = triton.cdiv(indices.numel(), rows) * triton.cdiv(words, columns)
    sizes = indices.numel(), weight.numel() // granule, size, words, bytes
    launch(touched_kernel, programs, total, data, indices, *sizes, UNIT=unit, ROWS=rows, COLUMNS=columns)
    return total
