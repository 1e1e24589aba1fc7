"""The switch family: gather, scatter_, swap_, apply_, switch_, scatter_add_, their foreach_ forms, and check_indices.

An index that is out of range is skipped where it is used (gather gives 0).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .arithmetic import convert, narrow, number, widen
from .launch import checked, compute, content, number_bits, rounded
from .walk import deal, keep, tile, walk


@triton.jit
def gather_tile(pointers, place, settings, WHOLE: tl.constexpr, DEAL: tl.constexpr, RULE: tl.constexpr):
    weight, indices, out = pointers
    position, entry, given, inside = tile(indices, place, WHOLE, DEAL)
    base = tl.load(weight + entry, mask=inside, other=0)
    if RULE == "zero":
        tl.store(out + position, base, mask=given)
    else:
        keep(out + position, base, given, inside)


@triton.jit(do_not_specialize=["members", "granule"])
def gather_kernel(jobs, members, granule, DEAL: tl.constexpr, RULE: tl.constexpr):
    """RULE "zero": an index out of range gives 0; otherwise its output stays as it was."""
    walk(gather_tile, jobs, members, granule, None, DEAL, RULE)


@triton.jit
def scatter_tile(pointers, place, settings, WHOLE: tl.constexpr, DEAL: tl.constexpr, RULE: tl.constexpr):
    weight, indices, values = pointers
    position, entry, given, inside = tile(indices, place, WHOLE, DEAL)
    tl.store(weight + entry, tl.load(values + position, mask=given), mask=inside)


@triton.jit(do_not_specialize=["members", "granule"])
def scatter_kernel(jobs, members, granule, DEAL: tl.constexpr, RULE: tl.constexpr):
    walk(scatter_tile, jobs, members, granule, None, DEAL, RULE)


@triton.jit
def swap_tile(pointers, place, settings, WHOLE: tl.constexpr, DEAL: tl.constexpr, RULE: tl.constexpr):
    weight, indices, values = pointers
    position, entry, given, inside = tile(indices, place, WHOLE, DEAL)
    base = tl.load(weight + entry, mask=inside)
    value = tl.load(values + position, mask=given)
    tl.debug_barrier()  # one thread may read an entry that another writes
    tl.store(weight + entry, value, mask=inside)
    tl.store(values + position, tl.where(inside, base, value), mask=given)


@triton.jit(do_not_specialize=["members", "granule"])
def swap_kernel(jobs, members, granule, DEAL: tl.constexpr, RULE: tl.constexpr):
    walk(swap_tile, jobs, members, granule, None, DEAL, RULE)


class Mix(NamedTuple):
    """weight = base + alpha*values ("delta"), base + alpha*(values - base) ("blend") or values ("overwrite")."""

    how: str
    saves: bool
    wide: tl.dtype  # of the arithmetic


@triton.jit
def mix_tile(pointers, place, alpha, WHOLE: tl.constexpr, DEAL: tl.constexpr, RULE: tl.constexpr):
    weight, indices, values = pointers[0], pointers[1], pointers[2]
    W: tl.constexpr = DEAL.types[0]
    V: tl.constexpr = DEAL.types[2]
    C: tl.constexpr = RULE.wide
    position, entry, given, inside = tile(indices, place, WHOLE, DEAL)
    base = tl.load(weight + entry, mask=inside)
    value = tl.load(values + position, mask=given)
    if RULE.saves:
        keep(pointers[3] + position, base, given, inside)
    if RULE.how == "overwrite":
        mixed = convert(value, V, W, C)
    else:
        b, v, strength = widen(base, W, C), widen(value, V, C), number(alpha, C)
        if RULE.how == "delta":
            mixed = narrow(b + strength * v, W)
        else:
            mixed = narrow(b + strength * (v - b), W)
    tl.debug_barrier()  # one thread may read an entry that another writes
    tl.store(weight + entry, mixed, mask=inside)


@triton.jit(do_not_specialize=["members", "granule", "alpha"])
def mix_kernel(jobs, members, granule, alpha: tl.int64, DEAL: tl.constexpr, RULE: tl.constexpr):
    walk(mix_tile, jobs, members, granule, alpha, DEAL, RULE)


Members = Iterable[tuple[Tensor, ...]]


def _plain(*member: Tensor) -> tuple[tuple[()], None]:
    return (), None


def _scatter(members: Members, granule: int) -> None:
    deal(scatter_kernel, members, granule, _plain)


def _swap(members: Members, granule: int) -> None:
    deal(swap_kernel, members, granule, _plain)


def _wide(weight: Tensor) -> tl.dtype:
    return compute(weight) if weight.dtype in checks.FLOATS else tl.float32


def _mix(members: Members, alpha: float, delta: bool, granule: int) -> None:
    """For members (weight, indices, values) or (weight, indices, values, saved)."""
    # Alpha may become 0 or 1 when it is rounded, which depends on the weight.
    members = list(members)
    for wide in dict.fromkeys(_wide(weight) for weight, *_ in members):
        own = [member for member in members if _wide(member[0]) == wide]
        strength = rounded(alpha, wide)
        if strength == 0:
            kept = [(weight, indices, *saved) for weight, indices, _, *saved in own if saved]
            deal(gather_kernel, kept, granule, _plain)
        else:
            how = "delta" if delta else "overwrite" if strength == 1 else "blend"
            settings = (number_bits(strength, wide),), Mix(how, len(own[0]) == 4, wide)
            deal(mix_kernel, own, granule, lambda *_, settings=settings: settings)


def _gather(members: Members, granule: int) -> list[Tensor]:
    found = [
        (weight, indices, torch.empty(indices.numel() * granule, dtype=weight.dtype, device=weight.device))
        for weight, indices in members
    ]
    deal(gather_kernel, found, granule, lambda *_: ((), "zero"))
    return [out for _, _, out in found]


@checked
def gather(weight: Tensor, indices: Tensor, granule: int) -> Tensor:
    return _gather([(weight, indices)], granule)[0]


@checked
def scatter_(weight: Tensor, indices: Tensor, values: Tensor, granule: int) -> None:
    _scatter([(weight, indices, values)], granule)


@checked
def swap_(weight: Tensor, indices: Tensor, values: Tensor, granule: int) -> None:
    _swap([(weight, indices, values)], granule)


@checked
def apply_(
    weight: Tensor, indices: Tensor, values: Tensor, saved: Tensor, alpha: float, delta: bool, granule: int
) -> None:
    _mix([(weight, indices, values, saved)], alpha, delta, granule)


@checked
def switch_(
    weight: Tensor,
    indices_out: Tensor,
    saved_out: Tensor,
    indices_in: Tensor,
    values: Tensor,
    saved_in: Tensor,
    alpha: float,
    delta: bool,
    granule: int,
) -> None:
    # One walk would have to look up each entry of one mask in the other, to save at most a seventh of the bytes.
    _scatter([(weight, indices_out, saved_out)], granule)
    _mix([(weight, indices_in, values, saved_in)], alpha, delta, granule)


@checked
def scatter_add_(weight: Tensor, indices: Tensor, values: Tensor, alpha: float, granule: int) -> None:
    _mix([(weight, indices, values)], alpha, True, granule)


@checked
def foreach_gather(weights: Sequence[Tensor], indices: Sequence[Tensor], granule: int) -> list[Tensor]:
    return _gather(zip(weights, indices, strict=True), granule)


@checked
def foreach_scatter_(
    weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], granule: int
) -> None:
    _scatter(zip(weights, indices, values, strict=True), granule)


@checked
def foreach_swap_(weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], granule: int) -> None:
    _swap(zip(weights, indices, values, strict=True), granule)


@checked
def foreach_apply_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    saved: Sequence[Tensor],
    alpha: float,
    delta: bool,
    granule: int,
) -> None:
    _mix(zip(weights, indices, values, saved, strict=True), alpha, delta, granule)


@checked
def foreach_switch_(
    weights: Sequence[Tensor],
    indices_out: Sequence[Tensor],
    saved_out: Sequence[Tensor],
    indices_in: Sequence[Tensor],
    values: Sequence[Tensor],
    saved_in: Sequence[Tensor],
    alpha: float,
    delta: bool,
    granule: int,
) -> None:
    _scatter(zip(weights, indices_out, saved_out, strict=True), granule)
    _mix(zip(weights, indices_in, values, saved_in, strict=True), alpha, delta, granule)


@checked
def check_indices(indices: Tensor, limit: int, granule: int) -> None:
    content("check_indices", "indices", indices, limit // granule)
