"""Touch on a GPU: a Triton kernel that reads and writes each listed piece of memory once, and nothing else.

A piece is a 32-byte sector, or a pair of them. `words` is how many of its 64-bit words are moved: one (the memory moves
the whole sector all the same) or all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["flip"])
def touch_kernel(memory, pieces, n, flip, WIDE: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < n
    piece = tl.load(pieces + lane, mask=inside, other=0).to(tl.int64)
    at = memory + piece[:, None] * WIDE + (tl.arange(0, WORDS) * (WIDE // WORDS))[None, :]
    old = tl.load(at, mask=inside[:, None], other=0)
    # `flip` is zero, which the compiler cannot know: the memory stays as it is, but the store has to happen.
    tl.store(at, old ^ flip, mask=inside[:, None])


def touch(memory: torch.Tensor, pieces: torch.Tensor, size: int, words: int, block: int) -> None:
    """Touches the `pieces` (numbers of pieces of `size` bytes) of `memory`, of any dtype."""
    rows = max(1, block // words)
    grid = (triton.cdiv(pieces.numel(), rows),)
    words64 = memory.view(torch.int64)
    touch_kernel[grid](words64, pieces, pieces.numel(), 0, WIDE=size // 8, WORDS=words, BLOCK=rows, num_warps=4)
