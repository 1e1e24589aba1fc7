"""The fuse family: several adapters in one pass over their union.

`fuse_plan` is plain PyTorch: most of it is a sort, which no kernel of ours would beat by much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import plan
from .arithmetic import convert, narrow, widen
from .launch import checked, compute, content, dtype
from .walk import deal, granule_of, keep, lines, memory, put, walk

_FIELDS = tl.constexpr(3)  # per adapter in the table: the address of its values, their granules, whether it is a delta


_GROUP = tl.constexpr(plan.GROUP)
_POSITION_BITS = tl.constexpr(plan.POSITION_BITS)
_POSITION = tl.constexpr((1 << plan.POSITION_BITS) - 1)


class Rule(NamedTuple):
    refuse: bool
    stream: tl.dtype  # of the values
    wide: tl.dtype  # of the arithmetic


@triton.jit
def count_of(members):
    """How many bits are set, in numbers whose highest bit is not."""
    members -= (members >> 1) & 0x5555555555555555
    members = (members & 0x3333333333333333) + ((members >> 2) & 0x3333333333333333)
    return (((members + (members >> 4)) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101) >> 56


@triton.jit
def fuse_tile(pointers, place, settings, WHOLE: tl.constexpr, DEAL: tl.constexpr, RULE: tl.constexpr):
    """weight[i] = saved[i] + sum_k alpha_k * d_k[i], in the plan's order. `exact` is what an entry becomes without a
    sum: its base if no adapter with a strength contributes, an adapter's own value if only that one overwrites."""
    weight, indices, saved, offsets = pointers
    sources, members, total, table, alphas, adapters = settings
    W: tl.constexpr = DEAL.types[0]
    V: tl.constexpr = RULE.stream
    C: tl.constexpr = RULE.wide
    row, there, index, known, column = lines(indices, place, WHOLE, DEAL)
    granule = granule_of(place, DEAL)
    within = (column < granule)[None, :]
    inside = known[:, None] & within
    position = row[:, None] * granule + column[None, :]
    entry = index[:, None] * granule + column[None, :]
    if RULE.refuse:
        exact = tl.load(saved + position, mask=there[:, None] & within, other=0)
    else:
        exact = tl.load(weight + entry, mask=inside, other=0)
        keep(saved + position, exact, there[:, None] & within, inside)
    base = widen(exact, W, C)
    fused = base
    contributions = tl.full([DEAL.rows], 0, tl.int32)
    overwrites = tl.full([DEAL.rows], 0, tl.int32)
    group, mine = row // _GROUP, tl.full([DEAL.rows], 1, tl.int64) << (row % _GROUP)
    at = tl.maximum(tl.load(offsets + group, mask=known, other=0).to(tl.int64), 0)
    end = tl.minimum(tl.load(offsets + group + 1, mask=known, other=0).to(tl.int64), total)
    while tl.max(end - at) > 0:
        which = tl.load(members + at, mask=at < end, other=0)
        here = (which & mine) != 0
        source = tl.load(sources + at, mask=here, other=-1)
        adapter, first = source >> _POSITION_BITS, source & _POSITION
        own = first + count_of(which & (mine - 1))
        here &= (adapter >= 0) & (adapter < adapters)
        about = table + adapter * _FIELDS
        here &= own < tl.load(about + 1, mask=here, other=0)
        alpha = tl.load(alphas + adapter, mask=here, other=0)
        here &= alpha != 0
        delta = tl.load(about + 2, mask=here, other=0) != 0
        values = memory(tl.load(about, mask=here, other=0), V, False)
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
    tl.debug_barrier()  # one thread may read an entry that another writes
    tl.store(weight + entry, tl.where(keeps[:, None], exact, narrow(fused, W)), mask=inside)


@triton.jit(do_not_specialize=["members", "granule", "total", "adapters"])
def fuse_kernel(
    jobs,
    members,
    granule,
    sources,
    members_of,
    total: tl.int64,
    table,
    alphas,
    adapters,
    DEAL: tl.constexpr,
    RULE: tl.constexpr,
):
    walk(fuse_tile, jobs, members, granule, (sources, members_of, total, table, alphas, adapters), DEAL, RULE)


@checked
def fuse_(
    weight: Tensor,
    saved: Tensor,
    indices: Tensor,
    offsets: Tensor,
    sources: Tensor,
    members: Tensor,
    values: Sequence[Tensor],
    alphas: Tensor,
    delta: Sequence[bool],
    refuse: bool,
    granule: int,
) -> None:
    about = [
        number
        for tensor, is_delta in zip(values, delta, strict=True)
        for number in (tensor.data_ptr(), tensor.numel() // granule, int(is_delta))
    ]
    args = (sources, members, sources.numel(), put(about, weight.device), alphas, len(values))
    rule = Rule(refuse, dtype(values[0]), compute(weight))
    deal(fuse_kernel, [(weight, indices, saved, offsets)], granule, lambda *_: (args, rule), entries=256)


@checked
def fuse_plan(indices: Sequence[Tensor], granule: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    for k, own in enumerate(indices):
        content("fuse_plan", f"indices[{k}]", own, None)
    return plan.make(indices)
