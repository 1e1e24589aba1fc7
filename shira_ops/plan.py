"""Plans of several adapters over one weight in plain PyTorch: how `fuse_plan` makes one, and how to read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

GROUP = 64  # granules of the union that are planned together: as many as members have bits
POSITION_BITS = 48  # of a source; the adapter's number is above them
_OCTET = 8

Size = TypeVar("Size", int, torch.SymInt)


def groups(granules: Size) -> Size:
    """How many groups the plan of a union of `granules` has. A size that is traced is a torch.SymInt."""
    count: Size = (granules + GROUP - 1) // GROUP
    return count


def parts(sources: Tensor) -> tuple[Tensor, Tensor]:
    """The adapters that the sources name, and the positions in their lists."""
    return sources >> POSITION_BITS, sources & ((1 << POSITION_BITS) - 1)


def unpacked(members: Tensor) -> Tensor:
    """The bits of `members` as bools `[sources, GROUP]`."""
    if members.device.type == "cpu":  # a twentieth of the time
        flat = np.unpackbits(members.numpy().view(np.uint8), bitorder="little")
        return torch.from_numpy(flat).view(torch.bool).view(-1, GROUP)
    octets = members.view(torch.uint8).view(-1, GROUP // _OCTET, 1)  # the lowest first
    bits = torch.arange(_OCTET, dtype=torch.uint8, device=members.device)
    return ((octets >> bits) & 1).bool().view(-1, GROUP)


def places(bits: Tensor) -> Tensor:
    """Where bools `[n]` are True, ascending: int64."""
    if bits.device.type == "cpu":  # a third of the time
        return torch.from_numpy(np.flatnonzero(bits.numpy()))
    return bits.nonzero().view(-1)


def group_of(offsets: Tensor) -> Tensor:
    """Each source's group."""
    return torch.arange(offsets.numel() - 1, device=offsets.device).repeat_interleave(offsets.diff().to(torch.int64))


def rows(offsets: Tensor, sources: Tensor, members: Tensor, adapters: int) -> Iterator[Tensor]:
    """For each adapter of a plan that `fuse_plan` made, where its granules lie in the union, in the order of its list:
    int64."""
    count = offsets.numel() - 1
    own = members.new_zeros(adapters * count)
    own.index_copy_(0, (sources >> POSITION_BITS).mul_(count).add_(group_of(offsets)), members)
    return (places(unpacked(bits).view(-1)) for bits in own.view(adapters, count))


def contributions(offsets: Tensor, sources: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each contribution's granule in the union, adapter, and position in the adapter's list: three int64 `[n]`, in the
    plan's order within a granule."""
    bits = unpacked(members)
    flat = places(bits.view(-1))
    source = flat // GROUP
    counts = bits.sum(1)
    adapter, first = parts(sources)
    rank = torch.arange(flat.numel(), device=flat.device) - (counts.cumsum(0) - counts)[source]
    return group_of(offsets)[source] * GROUP + flat % GROUP, adapter[source], first[source] + rank


def make(indices: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `fuse_plan` returns."""
    narrow = all(own.dtype == torch.int32 for own in indices)
    dtype, device = torch.int32 if narrow else torch.int64, indices[0].device
    entries = torch.cat([own.to(dtype) for own in indices])
    union, place = entries.unique(return_inverse=True)  # sorted; the place of each adapter's granules in it
    total, count = entries.numel(), groups(union.numel())
    adapter = torch.arange(len(indices), device=device).repeat_interleave(
        torch.tensor([own.numel() for own in indices], device=device)
    )
    position = torch.cat([torch.arange(own.numel(), device=device) for own in indices])

    # A source begins where the adapter or the group changes. Its members are different bits, so a sum joins them.
    key = place // GROUP * len(indices) + adapter
    begins = torch.ones(total, dtype=torch.bool, device=device)
    torch.ne(key[1:], key[:-1], out=begins[1:])
    first = places(begins)
    bits = torch.ones((), dtype=torch.int64, device=device) << place % GROUP
    members = torch.zeros_like(first).index_add_(0, begins.cumsum(0) - 1, bits)
    sources = (adapter << POSITION_BITS | position)[first]
    order = key[first].argsort()  # group by group: all keys differ

    offsets = torch.zeros(count + 1, dtype=torch.int64, device=device)
    offsets[1:] = torch.bincount(key[first] // len(indices), minlength=count).cumsum(0)
    offsets = offsets.to(torch.int32 if total < 2**31 else torch.int64)
    return union, offsets, sources[order], members[order]
