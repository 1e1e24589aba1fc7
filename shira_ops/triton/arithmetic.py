"""csrc/core/arithmetic.h in Triton: numbers as bits, fp32 (fp64 for fp64) arithmetic, one rounding to the weight's
dtype, NaN stored as the canonical quiet NaN. Entries travel as integers, so that loads and stores keep their bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def number(bits, C: tl.constexpr):
    """A scalar argument of dtype C, given as its bits: Triton would round a Python float to float32."""
    if tl.float64 == C:
        return bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def widen(bits, DTYPE: tl.constexpr, C: tl.constexpr):
    """Exact: every float dtype is within the compute dtype C."""
    if tl.bfloat16 == DTYPE:
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(C)
    else:
        return bits.to(DTYPE, bitcast=True).to(C)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """The bits of x rounded to nearest even."""
    if tl.bfloat16 == DTYPE:
        # By hand: the hardware turns a NaN into a different one than ours.
        u = x.to(tl.uint32, bitcast=True)
        return tl.where(x != x, 0x7FC0, (u + 0x7FFF + ((u >> 16) & 1)) >> 16).to(tl.int16)
    elif tl.float16 == DTYPE:
        return tl.where(x != x, 0x7E00, x.to(tl.float16).to(tl.int16, bitcast=True)).to(tl.int16)
    elif tl.float32 == DTYPE:
        return tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))
    else:
        return tl.where(x != x, 0x7FF8000000000000, x.to(tl.int64, bitcast=True))


@triton.jit
def convert(bits, V: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    """A value of dtype V as an entry of dtype W: its own bits if the dtypes agree, else rounded once."""
    if V == W:
        return bits
    else:
        return narrow(widen(bits, V, C), W)
