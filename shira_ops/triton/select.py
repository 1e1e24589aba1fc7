"""The select family: masks.

`select_top` finds the k-th largest score digit by digit, from the highest on: a pass over the weight counts, by their
next digit, the granules that agree with the digits found so far, and one program picks the digit. Scores are computed
again in each pass and never stored; the host does not wait for a count.

`select_random` draws as csrc/core/select.h does, and torch sorts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .arithmetic import narrow, widen
from .launch import TILE, bits, checked, compute, dtype, launch
from .splitmix import GOLDEN, splitmix64

DIGIT = 8  # bits
BINS = tl.constexpr(2**DIGIT)
ROWS = 1024  # granules that a program looks at together
PROGRAMS = 1024  # that count; each adds its result once to the same few numbers


class Rule(NamedTuple):
    score: str
    weight: tl.dtype
    grad: tl.dtype
    wide: tl.dtype  # of the arithmetic
    single: bool  # granules of one entry


def key_bits(rule: Rule) -> int:
    """The bits of a key. A single 16-bit number is its own key: widened, it would end in zeros."""
    looked_at = rule.grad if rule.score == "grad" else rule.weight
    alone = rule.single and rule.score != "snip"
    return 16 if alone and looked_at.primitive_bitwidth == 16 else rule.wide.primitive_bitwidth


@triton.jit
def term_of(weight, grad, entry, given, RULE: tl.constexpr):
    if RULE.score == "grad":
        term = widen(tl.load(grad + entry, mask=given, other=0), RULE.grad, RULE.wide)
    else:
        term = widen(tl.load(weight + entry, mask=given, other=0), RULE.weight, RULE.wide)
        if RULE.score == "snip":
            term = term * widen(tl.load(grad + entry, mask=given, other=0), RULE.grad, RULE.wide)
    return tl.abs(term)


@triton.jit
def score_keys(weight, grad, row, given, granule, RULE: tl.constexpr, KEY: tl.constexpr):
    """Scores as integers in the same order, with NaN lowest: a sum of magnitudes is never negative."""
    if RULE.single:
        total = term_of(weight, grad, row, given, RULE)
    else:
        total = tl.zeros(row.shape, RULE.wide)
        column = tl.zeros((), tl.int64)
        while column < granule:
            total += term_of(weight, grad, row * granule + column, given, RULE)
            column += 1
    if KEY == 64:
        bits = total.to(tl.int64, bitcast=True)
    elif KEY == 32:
        bits = total.to(tl.int32, bitcast=True)
    elif RULE.score == "grad":
        bits = narrow(total, RULE.grad).to(tl.int32)
    else:
        bits = narrow(total, RULE.weight).to(tl.int32)
    return tl.where(total != total, 0, bits + 1)


@triton.jit
def count_tile(weight, grad, state, row, given, granule, shift, RULE: tl.constexpr, KEY: tl.constexpr):
    key = score_keys(weight, grad, row, given, granule, RULE, KEY)
    agrees = given & ((key >> shift >> 8) == tl.load(state).to(key.dtype))
    return tl.histogram(((key >> shift) & 255).to(tl.int32), BINS, mask=agrees).to(tl.int64)


@triton.jit(do_not_specialize=["granules", "granule", "shift"])
def count_kernel(
    weight, grad, counts, state, granules: tl.int64, granule, shift, RULE: tl.constexpr, KEY: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    found = tl.full([BINS], 0, tl.int64)
    begin = tl.program_id(0).to(tl.int64) * ROWS
    lane = tl.arange(0, ROWS)
    while begin + ROWS <= granules:
        every = tl.full([ROWS], True, tl.int1)
        found += count_tile(weight, grad, state, begin + lane, every, granule, shift, RULE, KEY)
        begin += tl.num_programs(0).to(tl.int64) * ROWS
    if begin < granules:
        row = begin + lane
        found += count_tile(weight, grad, state, row, row < granules, granule, shift, RULE, KEY)
    tl.atomic_add(counts + tl.arange(0, BINS), found, mask=found != 0, sem="relaxed")


@triton.jit
def digit_kernel(counts, state):
    """`state`: the digits so far, and how many of the granules that agree with them are wanted."""
    bins = tl.arange(0, BINS)
    number = tl.load(counts + bins)
    wanted = tl.load(state + 1)
    above = tl.sum(number) - tl.cumsum(number)  # granules with a higher digit
    digit = tl.max(tl.where(above + number >= wanted, bins, 0))
    tl.store(state, tl.load(state) * 256 + digit)
    tl.store(state + 1, wanted - tl.sum(tl.where(bins > digit, number, 0)))
    tl.store(counts + bins, tl.full([BINS], 0, tl.int64))


@triton.jit
def tally_tile(weight, grad, tallies, state, row, given, granule, RULE: tl.constexpr, KEY: tl.constexpr):
    key = score_keys(weight, grad, row, given, granule, RULE, KEY).to(tl.int64)
    least = tl.load(state)
    at = tallies + tl.program_id(0)
    tl.store(at, tl.sum((given & (key > least)).to(tl.int64)))
    tl.store(at + tl.num_programs(0), tl.sum((given & (key == least)).to(tl.int64)))


@triton.jit(do_not_specialize=["granules", "granule"])
def tally_kernel(
    weight, grad, tallies, state, granules: tl.int64, granule, RULE: tl.constexpr, KEY: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """How many granules of each program lie above the k-th score, and how many are equal to it."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if (tl.program_id(0).to(tl.int64) + 1) * ROWS <= granules:
        tally_tile(weight, grad, tallies, state, row, tl.full([ROWS], True, tl.int1), granule, RULE, KEY)
    else:
        tally_tile(weight, grad, tallies, state, row, row < granules, granule, RULE, KEY)


@triton.jit
def write_tile(weight, grad, before, state, out, k, row, given, granule, RULE: tl.constexpr, KEY: tl.constexpr):
    key = score_keys(weight, grad, row, given, granule, RULE, KEY).to(tl.int64)
    least, ties = tl.load(state), tl.load(state + 1)
    above = (given & (key > least)).to(tl.int64)
    equal = (given & (key == least)).to(tl.int64)
    at, equals = before + tl.program_id(0), before + tl.num_programs(0)
    above_before = tl.load(at)
    equal_before = tl.load(equals + tl.program_id(0)) - tl.load(equals)
    rank = equal_before + tl.cumsum(equal) - equal
    chosen = (above != 0) | ((equal != 0) & (rank < ties))
    place = above_before + tl.cumsum(above) - above + tl.minimum(rank, ties)
    # Where another stream writes to the weight, against the rules, the passes do not agree.
    tl.store(out + place, row.to(out.dtype.element_ty), mask=chosen & (place < k))


@triton.jit(do_not_specialize=["k", "granules", "granule"])
def write_kernel(
    weight, grad, before, state, out, k: tl.int64, granules: tl.int64, granule, RULE: tl.constexpr, KEY: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Writes every granule above the k-th score, and the first few of those equal to it. `before` is a running
    count: of those above, program by program, and then of those that are equal."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if (tl.program_id(0).to(tl.int64) + 1) * ROWS <= granules:
        write_tile(weight, grad, before, state, out, k, row, tl.full([ROWS], True, tl.int1), granule, RULE, KEY)
    else:
        write_tile(weight, grad, before, state, out, k, row, row < granules, granule, RULE, KEY)


@checked
def select_top(weight: Tensor, grad: Tensor | None, k: int, score: str, granule: int) -> Tensor:
    granules = weight.numel() // granule
    out = torch.empty(k, dtype=checks.index_dtype(granules), device=weight.device)
    if k == 0:
        return out
    second = weight if grad is None or score == "magnitude" else grad
    rule = Rule(score, dtype(weight), dtype(second), compute(weight), granule == 1)
    width = key_bits(rule)
    constants = {"RULE": rule, "KEY": width, "ROWS": ROWS}
    args, sizes = (bits(weight), bits(second)), (granules, granule)
    programs = triton.cdiv(granules, ROWS)
    counts = torch.zeros(BINS.value, dtype=torch.int64, device=weight.device)
    state = torch.zeros(2, dtype=torch.int64, device=weight.device)
    state[1:].fill_(k)
    for shift in range(width - DIGIT, -1, -DIGIT):
        launch(count_kernel, min(programs, PROGRAMS), *args, counts, state, *sizes, shift, **constants)
        launch(digit_kernel, 1, counts, state)
    # One scan of a flat list is many times faster than two scans of rows.
    tallies = torch.empty(2 * programs, dtype=torch.int64, device=weight.device)
    launch(tally_kernel, programs, *args, tallies, state, *sizes, **constants)
    before = tallies.cumsum(0) - tallies
    launch(write_kernel, programs, *args, before, state, out, k, *sizes, **constants)
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
    """The images of 0 .. k-1; an image outside the domain is permuted again."""
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
