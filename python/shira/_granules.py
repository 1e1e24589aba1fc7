"""Arithmetic that the whole library shares: 64-bit words, fingerprints, index dtypes, granules of other sizes.

A granule is a run of consecutive entries of the flat weight; an index selects one granule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

import shira_ops
from shira._text import dtype_name as dtype_name
from shira_ops import reference
from shira_ops._ops import add_op_namespace_prefix, ops
from shira_ops.checks import index_dtype as index_dtype

WORD = 2**64 - 1
"""The largest 64-bit word; ``number & WORD`` is the number modulo 2^64, as fingerprints are added."""

WORD_BYTES = 8


def splitmix64(x: int) -> int:
    """The mixer of 64-bit words that the ops use too."""
    z = (x + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def fnv1a64(text: str) -> int:
    """FNV-1a of the text's UTF-8 bytes, 64 bits."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & WORD
    return value


def signed(word: int) -> int:
    """A 64-bit word as the int64 that an op's argument holds."""
    return word - 2**64 if word >= 2**63 else word


def fingerprint(weight: Tensor) -> int:
    """`shira_ops.fingerprint` as an unsigned Python number."""
    return int(shira_ops.fingerprint(weight.detach())) & WORD


def fingerprint_at(weight: Tensor, indices: Tensor, granule: int) -> int:
    """`shira_ops.fingerprint_at` as an unsigned Python number."""
    return int(shira_ops.fingerprint_at(weight.detach(), indices, granule=granule)) & WORD


@cache
def _has_kernel() -> bool:
    """Whether this build's CPU kernels are in use, among them those that `swap_` and `share` take."""
    name = add_op_namespace_prefix("_foreach_swap_fingerprint_")
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"))


def swap_(weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], granule: int) -> Tensor:
    """`shira_ops.foreach_swap_`, and by how much it changes each weight's fingerprint: int64, mod 2^64, on the device.

    On the CPU in one pass: a word that was read is still at hand when the swap has changed it. No tensor may require
    grad, and the list must not be empty.
    """
    if weights[0].device.type == "cpu" and _has_kernel():
        changes: Tensor = ops._foreach_swap_fingerprint_.default(weights, indices, values, granule)
        torch._C._increment_version([tensor for tensor in (*weights, *values) if not tensor.is_inference()])
        return changes

    def shares() -> Tensor:
        each = zip(weights, indices, strict=True)
        return torch.stack([shira_ops.fingerprint_at(one, at, granule=granule) for one, at in each])

    before = shares()
    shira_ops.foreach_swap_(weights, indices, values, granule=granule)
    return shares() - before


def share(words: Tensor, positions: Tensor) -> Tensor:
    """What 64-bit words at these positions of a weight add to its fingerprint: int64, without dimensions."""
    if words.device.type == "cpu" and _has_kernel():
        found: Tensor = ops._fingerprint_words.default(words, positions)
        return found
    return reference.words_hash(words, positions)


def refine(indices: Tensor, granule: int, finer: int, numel: int) -> Tensor:
    """The same entries as finer granules: ``finer`` divides ``granule``, and the weight has ``numel`` entries."""
    parts = granule // finer
    if parts == 1:
        return indices
    dtype = index_dtype(numel // finer)
    steps = torch.arange(parts, dtype=dtype, device=indices.device)
    return (indices.to(dtype).unsqueeze(1) * parts + steps).view(-1)


def overlay_(
    entries: Tensor, indices: Tensor, granule: int, others: Tensor, values: Tensor, other_granule: int, numel: int
) -> Tensor:
    """Of the entries at some granules of a weight, replace those that are also at other granules by their values."""
    if not others.numel() or not indices.numel():
        return entries
    common = math.gcd(granule, other_granule)
    mine, theirs = refine(indices, granule, common, numel), refine(others, other_granule, common, numel)
    if mine.dtype != theirs.dtype:
        mine, theirs = mine.to(torch.int64), theirs.to(torch.int64)
    at = torch.searchsorted(theirs, mine).clamp_(max=theirs.numel() - 1)
    both = (theirs[at] == mine).nonzero().view(-1)
    shira_ops.scatter_(entries, both, shira_ops.gather(values, at[both], granule=common), granule=common)
    return entries


def regranule(indices: Tensor, granule: int, wanted: int) -> Tensor:
    """The granules of ``wanted`` entries that hold any entry of the given ones: int64, and some may appear twice."""
    first = indices.to(torch.int64) * granule
    last = (first + granule - 1) // wanted
    first = first // wanted
    if granule == 1 or indices.numel() == 0:
        return first
    within = first[:, None] + torch.arange(int((last - first).max()) + 1, device=indices.device)
    return within[within <= last[:, None]]
