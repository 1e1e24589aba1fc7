"""How the entries of a list of weights are dealt out to programs: one launch for all that are alike.

A kernel gets its tensors as numbers, their addresses and sizes: those of a single weight as arguments, those of a list
in a table on the device, in which a program finds its own. So one compiled kernel serves weights of any size, and
`Deal` alone says what a kernel may assume about them.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import TILE, dtype_of, launch

MEMBERS = 512  # per launch: a program looks through the first programs of all of them at once
_PUT = 256  # numbers that one launch writes to a table: 2 KB of the 4 KB that kernel arguments may take
_HIDDEN = tl.constexpr(1 << 62)


class Deal(NamedTuple):
    """What a kernel is compiled for. `types` are those of the weight, the indices and the other streams."""

    types: tuple[tl.dtype, ...]
    rows: int  # granules per program
    columns: int  # entries of each, a power of two
    granule: int  # if it equals the columns, so that none is masked; else 0, and known only at the launch
    aligned: bool  # vectors of 16 bytes may be moved
    listed: int  # a power of two that the list's length does not exceed; 0 for one weight


# ---- numbers -----------------------------------------------------------------------------------------------


def hidden(numbers: Iterable[int]) -> tuple[int, ...]:
    """Numbers below 2**59 as elements of a tuple that all look alike: Triton compiles separate kernels for ints of 64
    bits, of 32 bits, for 1, and for multiples of 16, and for elements of a tuple it cannot be told not to."""
    return tuple(_HIDDEN.value + 4 * number + 3 for number in numbers)


@triton.jit
def shown(number):
    return (number - _HIDDEN) >> 2


@triton.jit
def put_kernel(table, numbers):
    for i in tl.static_range(len(numbers)):
        tl.store(table + i, shown(numbers[i]))


def put(numbers: Sequence[int], device: torch.device) -> Tensor:
    """A table of numbers on the device. They are kernel arguments: a copy from the host would wait for the device,
    and a graph would not keep its source."""
    size = min(_PUT, triton.next_power_of_2(len(numbers)))  # few sizes to compile
    filled = [*numbers, *[0] * (-len(numbers) % size)]
    table = torch.empty(len(filled), dtype=torch.int64, device=device)
    for begin in range(0, len(filled), size):
        launch(put_kernel, 1, table[begin:], hidden(filled[begin : begin + size]))
    return table


# ---- on the device -----------------------------------------------------------------------------------------


@triton.jit
def field(jobs, members, member, K: tl.constexpr, DEAL: tl.constexpr):
    """A job has: its first program, its number of indices, the granules in its weight, addresses."""
    if DEAL.listed > 0:
        return tl.load(jobs + K * members + member)
    else:
        return shown(jobs[K])


@triton.jit
def memory(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Entries travel as integers, so that loads and stores keep their bits."""
    if TYPE.primitive_bitwidth == 8:
        pointer = address.to(tl.int64).to(tl.pointer_type(tl.int8))
    elif TYPE.primitive_bitwidth == 16:
        pointer = address.to(tl.int64).to(tl.pointer_type(tl.int16))
    elif TYPE.primitive_bitwidth == 32:
        pointer = address.to(tl.int64).to(tl.pointer_type(tl.int32))
    else:
        pointer = address.to(tl.int64).to(tl.pointer_type(tl.int64))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def walk(TILE: tl.constexpr, jobs, members, granule, settings, DEAL: tl.constexpr, RULE: tl.constexpr):
    """Runs the function TILE on a program's share, with pointers to weight, indices and streams, the share's place
    for `lines` or `tile`, and the kernel's own `settings`. A WHOLE share needs no masks, so its streams move in
    vectors."""
    program = tl.program_id(0)
    member = 0
    if DEAL.listed > 0:
        at = tl.arange(0, DEAL.listed)
        first = tl.load(jobs + at, mask=at < members, other=1 << 62)
        member = tl.sum((first <= program).to(tl.int32)) - 1
        program -= tl.load(jobs + member).to(tl.int32)
    n, granules = field(jobs, members, member, 1, DEAL), field(jobs, members, member, 2, DEAL)
    pointers = ()
    for k in tl.static_range(len(DEAL.types)):
        pointer = memory(field(jobs, members, member, 3 + k, DEAL), DEAL.types[k], DEAL.aligned)
        pointers += (pointer,)  # type: ignore[assignment]
    part = 0
    if DEAL.granule != DEAL.columns:  # a granule may be wider than a tile
        parts = tl.cdiv(granule, DEAL.columns)
        part = program % parts
        program = program // parts
    begin = program.to(tl.int64) * DEAL.rows
    place = (begin, part, n, granules, granule)
    if begin + DEAL.rows <= n:
        TILE(pointers, place, settings, True, DEAL, RULE)
    else:
        TILE(pointers, place, settings, False, DEAL, RULE)


@triton.jit
def granule_of(place, DEAL: tl.constexpr):
    if DEAL.granule > 0:
        return DEAL.granule
    else:
        return place[4]


@triton.jit
def lines(indices, place, WHOLE: tl.constexpr, DEAL: tl.constexpr):
    """A share by rows and columns: [rows] granule numbers in the streams, whether they exist, granules of the weight,
    whether those exist, and [columns] entries within a granule."""
    begin, part, n, granules, _ = place
    row = begin + tl.arange(0, DEAL.rows)
    if WHOLE:
        given = tl.full([DEAL.rows], True, tl.int1)
    else:
        given = row < n
    index = tl.load(indices + row, mask=given, other=-1).to(tl.int64)
    column = part * DEAL.columns + tl.arange(0, DEAL.columns).to(tl.int64)
    return row, given, index, (index >= 0) & (index < granules), column


@triton.jit
def tile(indices, place, WHOLE: tl.constexpr, DEAL: tl.constexpr):
    """A share, [rows, columns]: positions in the streams, entries of the weight, whether a position exists, and
    whether the weight has its entry too."""
    row, given, index, known, column = lines(indices, place, WHOLE, DEAL)
    granule = granule_of(place, DEAL)
    position = row[:, None] * granule + column[None, :]
    entry = index[:, None] * granule + column[None, :]
    given, inside = given[:, None], known[:, None]
    if DEAL.granule == 0:
        narrow = (column < granule)[None, :]
        given, inside = given & narrow, inside & narrow
    return position, entry, given, inside


@triton.jit
def keep(pointer, new, given, inside):
    """Stores what is `inside` with the mask `given`: a mask that depends on the indices would split up vectors. What is
    not inside (never in a list that was checked) stays as it was."""
    old = tl.load(pointer, mask=given & (inside == 0))
    tl.store(pointer, tl.where(inside, new, old), mask=given)


# ---- on the host -------------------------------------------------------------------------------------------


def deal(
    kernel: Any,
    members: Iterable[tuple[Tensor, ...]],
    granule: int,
    rule: Callable[..., tuple[tuple[Any, ...], Any]],
    apart: Callable[..., Hashable] | None = None,
    entries: int = TILE,
) -> None:
    """Runs a kernel over members (weight, indices, streams...), one launch for all that are alike: in dtypes, in
    alignment, and in what `apart` returns for them. Those share one `rule`: the kernel's own arguments and its RULE.
    A program handles `entries` entries, or half as many if these have 8 bytes."""
    looked_at = 0 if granule > 1 else 1  # a weight's scattered entries do not move in vectors
    groups: dict[tuple[Any, ...], list[tuple[tuple[Tensor, ...], tuple[int, ...]]]] = {}
    for member in members:
        n = member[1].numel()
        if n > 0:
            places = [tensor.data_ptr() for tensor in member]
            aligned = reduce(operator.or_, places[looked_at:]) % 16 == 0
            key = (aligned, apart and apart(*member), *[tensor.dtype for tensor in member])
            groups.setdefault(key, []).append((member, (n, member[0].numel() // granule, *places)))
    for (aligned, _, *dtypes), group in groups.items():
        first = group[0][0]
        args, constant = rule(*first)
        for begin in range(0, len(group), MEMBERS):
            jobs = [numbers for _, numbers in group[begin : begin + MEMBERS]]
            share, parts = _share(tuple(dtypes), granule, aligned, entries, len(jobs))
            starts = [0]
            for job in jobs:
                starts.append(starts[-1] - job[0] // -share.rows * parts)
            table: Any = hidden((0, *jobs[0]))
            if share.listed > 0:
                table = put([*starts[:-1], *itertools.chain(*zip(*jobs, strict=True))], first[0].device)
            launch(kernel, starts[-1], table, len(jobs), granule, *args, DEAL=share, RULE=constant)


@functools.lru_cache(maxsize=1024)  # a call on one weight would take longer to work it out than to start its kernel
def _share(
    dtypes: tuple[torch.dtype, ...], granule: int, aligned: bool, entries: int, members: int
) -> tuple[Deal, int]:
    """How a launch is dealt out, and how many programs a granule takes."""
    power = granule if triton.next_power_of_2(granule) == granule else 0
    size = entries // 2 if any(one.itemsize == 8 for one in (dtypes[0], *dtypes[2:])) else entries
    columns = min(triton.next_power_of_2(granule), size)
    listed = triton.next_power_of_2(members) if members > 1 else 0
    types = tuple(map(dtype_of, dtypes))
    return Deal(types, size // columns, columns, power, aligned, listed), triton.cdiv(granule, columns)
