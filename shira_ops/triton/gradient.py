"""The gradient family: the weight gradient of a linear layer at `indices` alone.

There are two ways. Sampled: each entry is a dot product over the tokens, of two columns that are made contiguous first.
Dense: the matrix product that torch runs on tensor cores, a block of rows at a time in a small scratch buffer, from
which the entries are taken; in float32 it follows `torch.set_float32_matmul_precision`, as a dense backward does.
Both give the same bits on every run on one device.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .launch import TILE, checked, compute, launch

# Below this density of selected entries the sampled way is taken. Predicted, not measured: at 2048 tokens of a
# 4096 x 4096 layer an H100's tensor cores need about 100 us for the dense product, and in that time its L2 cache
# delivers the columns of some 0.3 % of the entries (float32) to 0.6 % (bfloat16).
DENSE_FROM = 0.003
SCRATCH = 2**22  # entries of the dense gradient that exist at a time: 16 MB, which stay in the L2 cache
ENTRIES, TOKENS = 8, 128


@triton.jit
def sampled_kernel(
    left,
    right,
    out,
    tokens,
    columns,
    indices,
    nnz,
    limit,
    granule,
    C: tl.constexpr,
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    index = tl.load(indices + position // granule, mask=position < nnz, other=-1).to(tl.int64)
    entry = index * granule + position % granule
    inside = (index >= 0) & (index < limit // granule)
    x = left + (entry // columns * tokens)[:, None]
    y = right + (entry % columns * tokens)[:, None]
    token = tl.arange(0, TOKENS).to(tl.int64)
    total = tl.zeros([ENTRIES, TOKENS], C)
    begin = tl.zeros((), tl.int64)
    while begin < tokens:
        at = (begin + token)[None, :]
        mask = inside[:, None] & (at < tokens)
        total += tl.load(x + at, mask=mask, other=0).to(C) * tl.load(y + at, mask=mask, other=0).to(C)
        begin += TOKENS
    tl.store(out + position, tl.sum(total, 1), mask=position < nnz)


@triton.jit(do_not_specialize=["block", "begin", "end", "granule"])
def take_kernel(
    dense,
    out,
    bounds,
    block,
    begin: tl.int64,
    end: tl.int64,
    indices,
    granule,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Takes the entries in [begin, end) of the weight, which `dense` holds: those of the indices from bounds[block] to
    bounds[block + 1], and of the one before, since that granule may begin in the previous block."""
    first = tl.maximum(tl.load(bounds + block) - 1, 0) + tl.program_id(0).to(tl.int64) * ROWS
    last = tl.load(bounds + block + 1)
    while first < last:
        row = first + tl.arange(0, ROWS)
        index = tl.load(indices + row, mask=row < last, other=-1).to(tl.int64)
        part = tl.zeros((), tl.int64)
        while part < granule:
            column = part + tl.arange(0, COLUMNS)
            entry = index[:, None] * granule + column[None, :]
            here = ((row < last) & (index >= 0))[:, None] & (column < granule)[None, :]
            here = here & (entry >= begin) & (entry < end)
            value = tl.load(dense + (entry - begin), mask=here)
            tl.store(out + row[:, None] * granule + column[None, :], value, mask=here)
            part += COLUMNS
        first += tl.num_programs(0).to(tl.int64) * ROWS


def _sampled(left: Tensor, right: Tensor, indices: Tensor, out: Tensor, granule: int) -> None:
    tokens, columns = right.shape
    programs = triton.cdiv(out.numel(), ENTRIES)
    args = (left.t().contiguous(), right.t().contiguous(), out, tokens, columns, indices, out.numel())
    constants = {"C": compute(left), "ENTRIES": ENTRIES, "TOKENS": TOKENS}
    launch(sampled_kernel, programs, *args, left.shape[1] * columns, granule, **constants)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Uses the forms of mm that autocast leaves alone."""
    if left.dtype != dtype and left.is_cuda and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=dtype)  # float16 and bfloat16 with the sums in float32
    out = torch.empty(left.shape[0], right.shape[1], dtype=dtype, device=left.device)
    return torch.mm(left.to(dtype), right.to(dtype), out=out)


def _dense(left: Tensor, right: Tensor, indices: Tensor, out: Tensor, granule: int) -> None:
    rows, columns = left.shape[1], right.shape[1]
    # Tensor cores need matrices that start at multiples of 16 bytes.
    block = max(256, SCRATCH // columns // 256 * 256)
    begins = range(0, rows, block)
    # Where each block's indices start. A granule belongs to the block in which it begins, and may reach into the next.
    before = (torch.arange(len(begins) + 1, device=indices.device) * (block * columns) - 1) // granule
    before = before.clamp_(max=torch.iinfo(indices.dtype).max).to(indices.dtype)
    bounds = torch.searchsorted(indices, before, right=True)
    width = min(triton.next_power_of_2(granule), TILE)
    size = TILE // width
    programs = 1 + triton.cdiv(indices.numel(), size * len(begins))  # as many as an even share needs
    for number, row in enumerate(begins):
        dense = _product(left[:, row : row + block].t(), right, out.dtype)
        begin = row * columns
        share = (number, begin, begin + dense.numel(), indices, granule)
        launch(take_kernel, programs, dense, out, bounds, *share, ROWS=size, COLUMNS=width)


@checked
def sampled_grad(grad_output: Tensor, input: Tensor, indices: Tensor, granule: int) -> Tensor:
    rows, columns, tokens = grad_output.shape[-1], input.shape[-1], math.prod(input.shape[:-1])
    dtype = checks.compute_dtype(grad_output.dtype)
    # Zero where an index is out of range, and everywhere without tokens.
    out = torch.zeros(indices.numel() * granule, dtype=dtype, device=grad_output.device)
    if out.numel() == 0 or rows * columns * tokens == 0:
        return out
    way = _dense if out.numel() >= DENSE_FROM * rows * columns else _sampled
    way(grad_output.view(tokens, rows), input.view(tokens, columns), indices, out, granule)
    return out
