"""The diff family: programs count the granules that differ, so that each then knows where to write its own.

Granules are compared in the widest units that every address and their size allow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .launch import checked, launch

ROWS = 256  # granules per program: a scan takes registers
_UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def differing(snapshot, weight, row, granules, units):
    """Which of the granules `row` differ, of `units` units each."""
    given = row < granules
    found = tl.zeros(row.shape, tl.int1)
    unit = tl.zeros((), tl.int64)
    while unit < units:
        at = row * units + unit
        found |= tl.load(snapshot + at, mask=given, other=0) != tl.load(weight + at, mask=given, other=0)
        unit += 1
    return found


@triton.jit
def tally_kernel(snapshot, weight, tallies, granules, units, ROWS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    tl.store(tallies + program, tl.sum(differing(snapshot, weight, row, granules, units).to(tl.int64)))


@triton.jit
def write_kernel(snapshot, weight, starts, indices, values, granules, units, BEFORE: tl.constexpr, ROWS: tl.constexpr):
    """Each program writes from its start on, which is how many granules those before it write, and refreshes its share
    of the snapshot; with BEFORE, it writes what the snapshot had."""
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    found = differing(snapshot, weight, row, granules, units)
    count = found.to(tl.int64)
    at = tl.load(starts + program) + tl.cumsum(count) - count
    tl.store(indices + at, row.to(indices.dtype.element_ty), mask=found)
    unit = tl.zeros((), tl.int64)
    while unit < units:
        entry = tl.load(weight + row * units + unit, mask=found, other=0)
        kept = tl.load(snapshot + row * units + unit, mask=found, other=0) if BEFORE else entry
        tl.store(values + at * units + unit, kept, mask=found)
        if BEFORE:
            tl.debug_barrier()  # one thread may read an entry that another writes
        tl.store(snapshot + row * units + unit, entry, mask=found)
        unit += 1


def _diffs(
    snapshots: Sequence[Tensor], weights: Sequence[Tensor], granule: int, before: bool
) -> tuple[list[Tensor], list[Tensor]]:
    device = weights[0].device if weights else None
    shares = [triton.cdiv(weight.numel() // granule, ROWS) for weight in weights]
    tallies = torch.empty(sum(shares), dtype=torch.int64, device=device)
    jobs = []
    for snapshot, weight, own in zip(snapshots, weights, tallies.split(shares), strict=True):
        size = granule * weight.element_size()
        unit = _UNITS[math.gcd(size, snapshot.data_ptr(), weight.data_ptr(), 8)]
        one, two = (tensor.view(-1).view(torch.uint8).view(unit) for tensor in (snapshot, weight))
        jobs.append((one, two, own, weight.numel() // granule, size // unit.itemsize))
        launch(tally_kernel, len(own), *jobs[-1], ROWS=ROWS)
    ends = torch.cat([tallies.new_zeros(1), tallies.cumsum(0)])
    last = [0, *itertools.accumulate(shares)]
    # One read from the device for all of them.
    totals = ends[torch.tensor(last, device=device)].cpu().tolist()
    indices, values = [], []
    for job, weight, behind, after, first in zip(jobs, weights, totals, totals[1:], last, strict=False):
        one, two, own, granules, units = job
        indices.append(torch.empty(after - behind, dtype=checks.index_dtype(granules), device=device))
        values.append(weight.new_empty((after - behind) * granule))
        places = ends[first : first + len(own)] - behind
        flat = values[-1].view(torch.uint8).view(two.dtype)
        launch(
            *(write_kernel, len(own), one, two, places, indices[-1], flat, granules, units), BEFORE=before, ROWS=ROWS
        )
    return indices, values


@checked
def diff_(snapshot: Tensor, weight: Tensor, granule: int, before: bool) -> tuple[Tensor, Tensor]:
    indices, values = _diffs([snapshot], [weight], granule, before)
    return indices[0], values[0]


@checked
def foreach_diff_(
    snapshots: Sequence[Tensor], weights: Sequence[Tensor], granule: int, before: bool
) -> tuple[list[Tensor], list[Tensor]]:
    return _diffs(snapshots, weights, granule, before)
