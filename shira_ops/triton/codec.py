"""The codec family: indices to bytes and back, in the format of csrc/core/codec.h.

Both directions check content, and the size of a code is known only once it is made, so both synchronise. A program
handles a block of the code, a step at a time: to decode, it adds up how far each unit advances the index and how many
gaps have ended before it; to encode, how many units the earlier gaps take. The reference explains what is wrong, and
encodes version 2, on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .launch import checked, content, launch

BLOCK = tl.constexpr(reference.BLOCK)
ANCHOR = tl.constexpr(16)  # bytes
START = tl.constexpr((1 << 56) - 1)  # the bits of an anchor's second word that say where its payload starts
RICE = tl.constexpr(3)  # mode 3 + k has the low k bits of all gaps, then a bitmap
MOST_LOW = tl.constexpr(24)
STEP = 1024  # units, or indices, or bits


@triton.jit
def read(at, mask, SIZE: tl.constexpr):
    """Little-endian unsigned numbers of SIZE bytes, at addresses of any alignment; 0 where masked."""
    value = tl.load(at, mask=mask, other=0).to(tl.uint64)
    for byte in tl.static_range(1, SIZE):
        value |= tl.load(at + byte, mask=mask, other=0).to(tl.uint64) << (8 * byte)
    return value


@triton.jit
def decode_payload(payload, units, n, first, out, SIZE: tl.constexpr, STEP: tl.constexpr):
    """Decodes units of SIZE bytes into out[1 .. n). Returns whether they are n - 1 gaps, the last of which ends with
    them, the last index, and the highest number met, which is out of range before a sum can wrap."""
    lane = tl.arange(0, STEP)
    index = first
    highest = first
    gaps = tl.zeros((), tl.int64)
    ended = tl.full((), 1, tl.int32)
    begin = tl.zeros((), tl.int64)
    while begin < units:
        at = begin + lane
        here = at < units
        unit = read(payload + at * SIZE, here, SIZE)
        if SIZE < 8:
            last = here & (unit != (1 << (8 * SIZE)) - 1)
        else:
            last = here
        steps = unit + last.to(tl.uint64)
        reach = index + tl.cumsum(steps, 0)
        number = gaps + tl.cumsum(last.to(tl.int64), 0)
        tl.store(out + number, reach.to(out.dtype.element_ty), mask=last & (number < n))
        index += tl.sum(steps, 0)
        if SIZE < 8:  # too small to wrap
            highest = index
        else:
            highest = tl.maximum(highest, tl.max(tl.where(here, tl.maximum(reach, unit), 0), 0))
        gaps += tl.sum(last.to(tl.int64), 0)
        ended = tl.max(tl.where(at == units - 1, last.to(tl.int32), 0), 0)
        begin += STEP
    return (gaps == n - 1) & (ended != 0), index, highest


@triton.jit
def decode_rice(payload, size, low, n, first, out, STEP: tl.constexpr):
    """Gaps of mode 3 + `low` to out[1 .. n), as `decode_payload` does: a zero of the bitmap reaches 2^low further, a
    one by the low bits of its gap and 1."""
    lane = tl.arange(0, STEP)
    lows = ((n - 1) * low + 7) // 8
    bits = (size - lows) * 8
    mask = (tl.full((), 1, tl.uint64) << low.to(tl.uint64)) - 1
    index = first
    highest = first
    gaps = tl.zeros((), tl.int64)
    begin = tl.zeros((), tl.int64)
    while begin < bits:
        at = begin + lane
        here = at < bits
        byte = tl.load(payload + lows + at // 8, mask=here, other=0).to(tl.int32)
        one = here & (((byte >> (at % 8).to(tl.int32)) & 1) != 0)
        number = gaps + tl.cumsum(one.to(tl.int64), 0)
        own = one & (number < n)
        bit = (number - 1) * low
        value = tl.zeros((STEP,), tl.uint64)
        for k in tl.static_range(4):
            inside = own & (bit // 8 + k < lows)
            value |= tl.load(payload + bit // 8 + k, mask=inside, other=0).to(tl.uint64) << (8 * k)
        value = (value >> (bit % 8).to(tl.uint64)) & mask
        steps = tl.where(here, tl.where(one, value, mask) + 1, 0)
        reach = index + tl.cumsum(steps, 0)
        tl.store(out + number, reach.to(out.dtype.element_ty), mask=own)
        highest = tl.maximum(highest, tl.max(tl.where(one, reach, 0), 0))  # not of the zeros after the last one
        index += tl.sum(steps, 0)
        gaps += tl.sum(one.to(tl.int64), 0)
        begin += STEP
    padding = tl.load(payload + lows - 1, mask=lows > 0, other=0).to(tl.int64) >> (((n - 1) * low + 7) % 8 + 1)
    ended = tl.load(payload + size - 1, mask=size > 0, other=0) != 0
    return (gaps == n - 1) & (padding == 0) & (ended | (n == 1)) & ((size > 0) | (n == 1)), highest


@triton.jit(do_not_specialize=["bytes", "count", "bound", "blocks"])
def decode_kernel(code, out, refused, bytes, count, bound, blocks, STEP: tl.constexpr):
    """`refused` becomes the first block that is wrong."""
    block = tl.program_id(0).to(tl.int64)
    inner = block + 1 < blocks
    anchor = code + block * ANCHOR
    first, place = read(anchor, block >= 0, 8), read(anchor + 8, block >= 0, 8)
    following, end = read(anchor + ANCHOR, inner, 8), read(anchor + ANCHOR + 8, inner, 8).to(tl.int64) & START
    start, mode = place.to(tl.int64) & START, (place >> 56).to(tl.int32)
    payloads = bytes - blocks.to(tl.int64) * ANCHOR
    limit = bound.to(tl.uint64)
    end = tl.where(inner, end, payloads)
    n = tl.minimum(count - block * BLOCK, BLOCK)
    good = (end <= payloads) & (start <= end) & ((start < end) | (block + 1 == blocks)) & ((block > 0) | (start == 0))
    low = mode.to(tl.int64) - RICE
    good = good & (low <= MOST_LOW) & (first < limit)
    if good & (low >= 0):
        # Long enough for any gaps, and not so long that a sum could wrap.
        size = end - start
        good = (size >= ((n - 1) * low + 7) // 8 + (n - 1 + 7) // 8) & (size < (1 << 36))
    if good:
        own = out + block * BLOCK
        tl.store(own, first.to(out.dtype.element_ty))
        payload, size = code + blocks.to(tl.int64) * ANCHOR + start, end - start
        if mode == 0:
            whole, index, highest = decode_payload(payload, size, n, first, own, 1, STEP)
        elif mode == 1:
            whole, index, highest = decode_payload(payload, size // 2, n, first, own, 2, STEP)
            whole = whole & (size % 2 == 0)
        elif mode > 2:
            whole, highest = decode_rice(payload, size, low, n, first, own, STEP)
            index = highest
        else:
            whole, index, highest = decode_payload(payload, size // 8, n, first, own, 8, STEP)
            whole = whole & (size % 8 == 0)
        good = whole & (highest < limit) & ((index < following) | (block + 1 == blocks))
    if not good:
        tl.atomic_min(refused, block, sem="relaxed")


def is_long_enough(code: Tensor, count: int, blocks: int) -> bool:
    """Asked before anything is allocated."""
    size = code.numel()
    if size >= count + (ANCHOR.value - 1) * blocks or size < ANCHOR.value * blocks:
        return bool(size >= ANCHOR.value * blocks)
    # Blocks of mode 3 + k may have less than a byte an index.
    low = code[15 : blocks * ANCHOR.value : ANCHOR.value].to(torch.int64) - RICE.value
    gaps = torch.full_like(low, BLOCK.value - 1)
    gaps[-1] = count - (blocks - 1) * BLOCK.value - 1
    rice = (low >= 0) & (low <= MOST_LOW.value)
    payloads = torch.where(rice, (gaps * low + 7) // 8 + (gaps + 7) // 8, gaps).sum()
    return bool(int(payloads) <= size - blocks * ANCHOR.value)


@checked
def decode_indices(code: Tensor, count: int, limit: int, dtype: torch.dtype, granule: int) -> Tensor:
    blocks = triton.cdiv(count, BLOCK.value)
    if count == 0 or not is_long_enough(code, count, blocks):
        return reference.decode_indices(code, count, limit, dtype, granule)
    out = torch.empty(count, dtype=dtype, device=code.device)
    refused = torch.full((), blocks, dtype=torch.int64, device=code.device)
    bound = min(limit // granule, torch.iinfo(dtype).max + 1)
    launch(decode_kernel, blocks, code, out, refused, code.numel(), count, bound, blocks, STEP=STEP, num_warps=8)
    if int(refused) < blocks:
        return reference.decode_indices(code, count, limit, dtype, granule)  # which says what is wrong
    return out


@triton.jit
def write(at, value, mask, SIZE: tl.constexpr):
    """The inverse of `read`."""
    for byte in tl.static_range(SIZE):
        tl.store(at + byte, (value >> (8 * byte)).to(tl.uint8), mask=mask)


@triton.jit
def gaps_of(indices, at, n):
    """The gaps before indices[at], and which of them exist."""
    here = at < n
    index = tl.load(indices + at, mask=here, other=0).to(tl.int64)
    before = tl.load(indices + at - 1, mask=here, other=0).to(tl.int64)
    return (index - before - 1).to(tl.uint64), here


@triton.jit
def units_of(gap, here, SIZE: tl.constexpr):
    """How many units of SIZE bytes each gap takes; 0 where there is no gap."""
    if SIZE < 8:
        units = tl.where(here, (gap // ((1 << (8 * SIZE)) - 1) + 1).to(tl.int64), 0)
    else:
        units = here.to(tl.int64)
    return units


@triton.jit(do_not_specialize=["count"])
def measure_kernel(indices, places, count, STEP: tl.constexpr):
    """The mode of each block and the size of its payload: `mode << 56 | bytes`."""
    block = tl.program_id(0).to(tl.int64)
    n = tl.minimum(count - block * BLOCK, BLOCK)
    own = indices + block * BLOCK
    bytes = tl.zeros((), tl.int64)
    shorts = tl.zeros((), tl.int64)
    begin = tl.full((), 1, tl.int64)
    while begin < n:
        gap, here = gaps_of(own, begin + tl.arange(0, STEP), n)
        bytes += tl.sum(units_of(gap, here, 1), 0)
        shorts += tl.sum(units_of(gap, here, 2), 0)
        begin += STEP
    place = tl.where(shorts <= 4 * n, (1 << 56) + 2 * shorts, (2 << 56) + 8 * (n - 1))
    tl.store(places + block, tl.where(bytes <= 2 * n, bytes, place))


@triton.jit
def encode_payload(indices, n, payload, SIZE: tl.constexpr, STEP: tl.constexpr):
    """Writes, for each gap before indices[1 .. n), the unit that ends it."""
    written = tl.zeros((), tl.int64)
    begin = tl.full((), 1, tl.int64)
    while begin < n:
        gap, here = gaps_of(indices, begin + tl.arange(0, STEP), n)
        units = units_of(gap, here, SIZE)
        end = written + tl.cumsum(units, 0)
        if SIZE < 8:  # what its escapes leave over
            gap -= (units - 1).to(tl.uint64) * ((1 << (8 * SIZE)) - 1)
        write(payload + (end - 1) * SIZE, gap, here, SIZE)
        written += tl.sum(units, 0)
        begin += STEP


@triton.jit(do_not_specialize=["count", "blocks"])
def encode_kernel(indices, places, code, count, blocks, STEP: tl.constexpr):
    """Writes everything except the escapes, with which `code` is filled already."""
    block = tl.program_id(0).to(tl.int64)
    n = tl.minimum(count - block * BLOCK, BLOCK)
    own = indices + block * BLOCK
    place = tl.load(places + block)
    anchor = code + block * ANCHOR
    write(anchor, tl.load(own).to(tl.int64), block >= 0, 8)
    write(anchor + 8, place, block >= 0, 8)
    payload, mode = code + blocks.to(tl.int64) * ANCHOR + (place & START), place >> 56
    if mode == 0:
        encode_payload(own, n, payload, 1, STEP)
    elif mode == 1:
        encode_payload(own, n, payload, 2, STEP)
    else:
        encode_payload(own, n, payload, 8, STEP)


@checked
def encode_indices(indices: Tensor, granule: int, version: int) -> Tensor:
    content("encode_indices", "indices", indices, None)
    if version == 2:
        return reference.encode_indices(indices, granule, version=version)
    count = indices.numel()
    blocks = triton.cdiv(count, BLOCK.value)
    if blocks == 0:
        return torch.empty(0, dtype=torch.uint8, device=indices.device)
    places = torch.empty(blocks, dtype=torch.int64, device=indices.device)
    launch(measure_kernel, blocks, indices, places, count, STEP=STEP)
    sizes = places & START.value
    ends = sizes.cumsum(0)
    places += ends - 2 * sizes  # turns `mode << 56 | size` into `mode << 56 | start`
    escape = 255
    code = torch.full((blocks * ANCHOR.value + int(ends[-1]),), escape, dtype=torch.uint8, device=indices.device)
    launch(encode_kernel, blocks, indices, places, code, count, blocks, STEP=STEP, num_warps=8)
    return code
