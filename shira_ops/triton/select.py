"""The select family: masks.

`select_top` finds the k-th largest score digit by digit, from the highest on: a pass over the weight counts the
granules that agree with what is found so far by their next digit, and one program takes the digit. Scores are
computed anew in each pass and never stored; nothing waits for a count.

`select_random` draws as csrc/core/select.h does, and torch sorts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .arithmetic import widen
from .launch import TILE, bits, checked, compute, dtype, launch
from .splitmix import GOLDEN, splitmix64

DIGIT = 8  # bits
BINS = tl.constexpr(2**DIGIT)
ROWS = 512


@triton.jit
def score_keys(
    weight, grad, row, granules, granule, SCORE: tl.constexpr, W: tl.constexpr, G: tl.constexpr, C: tl.constexpr
):
    """Scores as integers in their order, NaN below all: a sum of magnitudes is never negative."""
    mask = row < granules
    entry = row * granule
    total = tl.zeros(row.shape, C)
    column = tl.zeros((), tl.int64)
    while column < granule:
        if SCORE != "grad":
            term = widen(tl.load(weight + entry + column, mask=mask, other=0), W, C)
            if SCORE == "snip":
                term = term * widen(tl.load(grad + entry + column, mask=mask, other=0), G, C)
        else:
            term = widen(tl.load(grad + entry + column, mask=mask, other=0), G, C)
        total += tl.abs(term)
        column += 1
    if tl.float64 == C:
        key = tl.where(total != total, 0, total.to(tl.int64, bitcast=True) + 1)
    else:
        key = tl.where(total != total, 0, total.to(tl.int32, bitcast=True) + 1)
    return key


@triton.jit
def count_kernel(
    weight, grad, counts, state, granules, granule, SHIFT: tl.constexpr, SCORE: tl.constexpr, W: tl.constexpr,
    G: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    key = score_keys(weight, grad, row, granules, granule, SCORE, W, G, C)
    agrees = (row < granules) & ((key >> SHIFT >> 8) == tl.load(state).to(key.dtype))
    digit = ((key >> SHIFT) & 255).to(tl.int32)
    tl.atomic_add(counts + tl.arange(0, BINS), tl.histogram(digit, BINS, mask=agrees).to(tl.int64), sem="relaxed")


@triton.jit
def digit_kernel(counts, state):
    """state: the digits so far, and how many of the granules that agree with them are wanted."""
    bins = tl.arange(0, BINS)
    number = tl.load(counts + bins)
    wanted = tl.load(state + 1)
    above = tl.sum(number) - tl.cumsum(number)  # granules of a higher digit
    digit = tl.max(tl.where(above + number >= wanted, bins, 0))
    tl.store(state, tl.load(state) * 256 + digit)
    tl.store(state + 1, wanted - tl.sum(tl.where(bins > digit, number, 0)))
    tl.store(counts + bins, tl.zeros([BINS], tl.int64))


@triton.jit
def tally_kernel(
    weight, grad, tallies, state, granules, granule, SCORE: tl.constexpr, W: tl.constexpr, G: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """How many granules of each program lie above the k-th score, and how many are equal to it."""
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    key = score_keys(weight, grad, row, granules, granule, SCORE, W, G, C).to(tl.int64)
    least = tl.load(state)
    given = row < granules
    tl.store(tallies + program, tl.sum((given & (key > least)).to(tl.int64)))
    tl.store(tallies + tl.num_programs(0) + program, tl.sum((given & (key == least)).to(tl.int64)))


@triton.jit
def write_kernel(
    weight, grad, tallies, state, out, granules, granule, SCORE: tl.constexpr, W: tl.constexpr, G: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each program knows what stands before it: every granule above, and of the equal ones the first few."""
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    key = score_keys(weight, grad, row, granules, granule, SCORE, W, G, C).to(tl.int64)
    least, ties = tl.load(state), tl.load(state + 1)
    given = row < granules
    above = (given & (key > least)).to(tl.int64)
    equal = (given & (key == least)).to(tl.int64)
    above_before = tl.load(tallies + program)
    equal_before = tl.load(tallies + tl.num_programs(0) + program)
    rank = equal_before + tl.cumsum(equal) - equal
    chosen = (above != 0) | ((equal != 0) & (rank < ties))
    at = above_before + tl.cumsum(above) - above + tl.minimum(rank, ties)
    tl.store(out + at, row.to(out.dtype.element_ty), mask=chosen)


@checked
def select_top(weight: Tensor, grad: Tensor | None, k: int, score: str, granule: int) -> Tensor:
    granules = weight.numel() // granule
    out = torch.empty(k, dtype=checks.index_dtype(granules), device=weight.device)
    if k == 0:
        return out
    second = weight if grad is None or score == "magnitude" else grad
    constants = {"SCORE": score, "W": dtype(weight), "G": dtype(second), "C": compute(weight), "ROWS": ROWS}
    args, sizes = (bits(weight), bits(second)), (granules, granule)
    programs = triton.cdiv(granules, ROWS)
    counts = torch.zeros(BINS.value, dtype=torch.int64, device=weight.device)
    state = torch.zeros(2, dtype=torch.int64, device=weight.device)
    state[1:].fill_(k)
    for shift in range(64 if weight.dtype == torch.float64 else 32, 0, -DIGIT):
        launch(count_kernel, programs, *args, counts, state, *sizes, SHIFT=shift - DIGIT, **constants)
        launch(digit_kernel, 1, counts, state)
    tallies = torch.empty((2, programs), dtype=torch.int64, device=weight.device)
    launch(tally_kernel, programs, *args, tallies, state, *sizes, **constants)
    before = tallies.cumsum(1) - tallies
    launch(write_kernel, programs, *args, before, state, out, *sizes, **constants)
    return out


@triton.jit
def permute(x, seed, low, high):
    """A keyed permutation of the numbers of low + high bits: eight rounds over a high and a low half."""
    right = x & ((tl.full((), 1, tl.uint64) << low) - 1)
    left = x >> low
    state = seed
    for _ in tl.static_range(4):
        state += GOLDEN
        left ^= splitmix64(right ^ splitmix64(state)) >> (64 - high)
        state += GOLDEN
        right ^= splitmix64(left ^ splitmix64(state)) >> (64 - low)
    return (left << low) | right


@triton.jit(do_not_specialize=["k", "domain", "seed", "low", "high"])
def draw_kernel(out, k, domain, seed, low, high, BLOCK: tl.constexpr):
    """The images of 0 .. k-1; one outside the domain is permuted on."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key, end = seed.to(tl.uint64), domain.to(tl.uint64)
    low, high = low.to(tl.uint64), high.to(tl.uint64)
    image = permute(at.to(tl.uint64), key, low, high)
    while tl.max(((image >= end) & (at < k)).to(tl.int32), 0) > 0:
        image = tl.where(image >= end, permute(image, key, low, high), image)
    tl.store(out + at, image.to(out.dtype.element_ty), mask=at < k)


@checked
def select_random(numel: int, k: int, seed: int, device: torch.device | None, granule: int) -> Tensor:
    domain = numel // granule
    out = torch.empty(k, dtype=checks.index_dtype(domain), device=device)
    bits = max(2, (domain - 1).bit_length())
    launch(draw_kernel, triton.cdiv(k, TILE), out, k, domain, seed, bits // 2, bits - bits // 2, BLOCK=TILE)
    return out.sort().values
