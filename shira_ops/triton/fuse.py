"""The fuse family: several adapters in one pass over their union.

`fuse_plan` is torch's own sort, which no kernel of ours would beat by much.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .arithmetic import convert, narrow, widen
from .launch import bits, bits_dtype, checked, compute, content, dtype, launch, lines, walk

_FIELDS = tl.constexpr(3)  # of an adapter in the table: where its values are, how many granules, whether deltas
_ADAPTERS = 8  # that one launch writes


@triton.jit
def put(table, adapter, values, granules, delta):
    tl.store(table + adapter * _FIELDS + 0, values.to(tl.int64))
    tl.store(table + adapter * _FIELDS + 1, granules.to(tl.int64))
    tl.store(table + adapter * _FIELDS + 2, delta.to(tl.int64))


@triton.jit(do_not_specialize=[f"{field}{k}" for field in "vnd" for k in range(_ADAPTERS)])
def table_kernel(
    table,
    v0, n0, d0, v1, n1, d1, v2, n2, d2, v3, n3, d3, v4, n4, d4, v5, n5, d5, v6, n6, d6, v7, n7, d7,
):  # fmt: skip
    """The numbers travel as a kernel's arguments: a copy from the host would wait, and not be captured."""
    put(table, 0, v0, n0, d0)
    put(table, 1, v1, n1, d1)
    put(table, 2, v2, n2, d2)
    put(table, 3, v3, n3, d3)
    put(table, 4, v4, n4, d4)
    put(table, 5, v5, n5, d5)
    put(table, 6, v6, n6, d6)
    put(table, 7, v7, n7, d7)


@triton.jit
def fuse_kernel(
    weight,
    saved,
    offsets,
    sources,
    total,
    table,
    alphas,
    adapters,
    indices,
    n,
    granules,
    granule,
    REFUSE: tl.constexpr,
    BITS: tl.constexpr,
    W: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """weight[i] = saved[i] + sum_k alpha_k * d_k[i], in the plan's order. `exact` is what an entry becomes without a
    sum: its base where nothing with a strength contributes, an adapter's own value where that alone overwrites."""
    row, column, index, known = lines(indices, n, granules, granule, ROWS, COLUMNS)
    inside = known[:, None] & (column < granule)[None, :]
    position = row[:, None] * granule + column[None, :]
    entry = index[:, None] * granule + column[None, :]
    if REFUSE:
        exact = tl.load(saved + position, mask=inside, other=0)
    else:
        exact = tl.load(weight + entry, mask=inside, other=0)
        tl.store(saved + position, exact, mask=inside)
    base = widen(exact, W, C)
    fused = base
    contributions = tl.zeros([ROWS], tl.int32)
    overwrites = tl.zeros([ROWS], tl.int32)
    at = tl.maximum(tl.load(offsets + row, mask=known, other=0).to(tl.int64), 0)
    end = tl.minimum(tl.load(offsets + row + 1, mask=known, other=0).to(tl.int64), total)
    while tl.max(end - at) > 0:
        source = tl.load(sources + at, mask=at < end, other=-1)
        adapter, own = source >> 48, source & 0xFFFFFFFFFFFF
        here = (adapter >= 0) & (adapter < adapters)
        about = table + adapter * _FIELDS
        here &= own < tl.load(about + 1, mask=here, other=0)
        alpha = tl.load(alphas + adapter, mask=here, other=0)
        here &= alpha != 0
        delta = tl.load(about + 2, mask=here, other=0) != 0
        values = tl.load(about, mask=here, other=0).to(tl.pointer_type(BITS))
        value = tl.load(values[:, None] + (own[:, None] * granule + column[None, :]), mask=here[:, None] & inside)
        wide = widen(value, V, C)
        change = tl.where(delta[:, None], wide, wide - base)
        fused = tl.where(here[:, None], fused + alpha[:, None] * change, fused)
        overwrite = here & (alpha == 1) & (delta == 0)
        exact = tl.where(overwrite[:, None], convert(value, V, W, C), exact)
        contributions += here.to(tl.int32)
        overwrites += overwrite.to(tl.int32)
        at += 1
    keeps = (contributions == 0) | ((contributions == 1) & (overwrites == 1))
    tl.store(weight + entry, tl.where(keeps[:, None], exact, narrow(fused, W)), mask=inside)


def _table(values: Sequence[Tensor], delta: Sequence[bool], granule: int) -> Tensor:
    filled = triton.cdiv(len(values), _ADAPTERS) * _ADAPTERS  # the last adapter again: no source names it
    table = torch.empty((filled, _FIELDS.value), dtype=torch.int64, device=values[0].device)
    for begin in range(0, filled, _ADAPTERS):
        numbers: list[int] = []
        for k in range(begin, begin + _ADAPTERS):
            last = min(k, len(values) - 1)
            numbers += values[last].data_ptr(), values[last].numel() // granule, int(delta[last])
        launch(table_kernel, 1, table[begin], *numbers)
    return table


@checked
def fuse_(
    weight: Tensor,
    saved: Tensor,
    indices: Tensor,
    offsets: Tensor,
    sources: Tensor,
    values: Sequence[Tensor],
    alphas: Tensor,
    delta: Sequence[bool],
    refuse: bool,
    granule: int,
) -> None:
    constants = {
        "REFUSE": refuse,
        "BITS": bits_dtype(values[0]),
        "W": dtype(weight),
        "V": dtype(values[0]),
        "C": compute(weight),
    }
    table = _table(values, delta, granule)
    args = (bits(weight), bits(saved), offsets, sources, sources.numel(), table, alphas, len(values))
    walk(fuse_kernel, indices, weight.numel(), granule, *args, entries=256, **constants)


@checked
def fuse_plan(indices: Sequence[Tensor], granule: int) -> tuple[Tensor, Tensor, Tensor]:
    for k, own in enumerate(indices):
        content("fuse_plan", f"indices[{k}]", own, None)
    dtype = torch.int32 if all(own.dtype == torch.int32 for own in indices) else torch.int64
    device = indices[0].device
    sources = torch.cat([(k << 48) | torch.arange(own.numel(), device=device) for k, own in enumerate(indices)])
    # A stable sort keeps the adapters' order within an entry.
    entries, order = torch.cat([own.to(dtype) for own in indices]).sort(stable=True)
    first = torch.ones_like(entries, dtype=torch.bool)
    torch.ne(entries[1:], entries[:-1], out=first[1:])
    begins = first.nonzero().view(-1)
    offsets = torch.cat([begins, begins.new_full((1,), entries.numel())])
    return entries[begins], offsets.to(checks.index_dtype(entries.numel())), sources[order]
