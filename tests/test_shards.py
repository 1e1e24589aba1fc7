"""Boxes of sharded weights: what every rank holds, against torch's own division of a tensor; in one process."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import shira_ops
from shira import _granules, _shards

Ranks = list[tuple[_shards.Box, Tensor]]


def split(weight: Tensor, mesh: Sequence[int], at: Sequence[int], placements: Sequence[Any]) -> Tensor:
    """What the rank at a coordinate holds, by torch's own functions."""
    for size, which, placement in zip(mesh, at, placements, strict=True):
        if not placement.is_replicate():
            pieces, _ = placement._split_tensor(weight, size, with_padding=False)
            weight = pieces[which]
    return weight.contiguous()


def ranks(weight: Tensor, mesh: Sequence[int], placements: Sequence[Any]) -> Ranks:
    shape = tuple(weight.shape)
    return [
        (_shards.box_of(shape, tuple(mesh), at, placements), split(weight, mesh, at, placements))
        for at in itertools.product(*map(range, mesh))
    ]


def numbers(shape: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.arange(1, math.prod(shape) + 1).view(*shape).to(dtype)


def check(weight: Tensor, found: Ranks, granule: int, indices: Tensor, holders: int = 1) -> None:
    """Every rank takes what it holds of an adapter, and all together take all of it."""
    values = weight.reshape(-1, granule)[indices].view(-1)
    taken = torch.zeros(values.numel(), dtype=torch.int64)
    for box, local in found:
        assert box.local_shape == tuple(local.shape) or 0 == box.local_numel == local.numel()
        part = box.take(indices, granule)
        assert part.granule == granule or granule % part.granule == 0
        shira_ops.check_indices(part.indices, max(1, local.numel()), granule=part.granule if local.numel() else 1)
        held = local.view(-1, part.granule)[part.indices].view(-1)
        assert torch.equal(part.of(values), held)
        taken += part.into(torch.ones_like(held, dtype=torch.int64), values.numel())
        back = part.into(held, values.numel())
        assert torch.equal(back[back != 0], held)
        entries = box.globally(part.indices, part.granule)
        assert torch.equal(weight.view(-1, part.granule)[entries].view(-1), held)
    assert torch.equal(taken, torch.full_like(taken, holders))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], list[Any]]:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    dims = st.integers(0, len(shape) - 1)
    kinds = st.one_of(
        st.just(Replicate()), st.builds(Shard, dims), st.builds(_StridedShard, dims, split_factor=st.just(2))
    )
    return shape, mesh, [draw(kinds) for _ in mesh]


@given(layouts(), st.data())
def test_every_rank_takes_what_it_holds(layout: Any, data: st.DataObject) -> None:
    shape, mesh, placements = layout
    weight = numbers(shape)
    granule = data.draw(st.sampled_from([g for g in range(1, weight.numel() + 1) if weight.numel() % g == 0]))
    chosen = data.draw(st.sets(st.integers(0, weight.numel() // granule - 1)))
    indices = torch.tensor(sorted(chosen), dtype=torch.int32)
    try:
        found = ranks(weight, mesh, placements)
    except ValueError:  # uneven parts, on which FSDP and DTensor do not agree
        assert any(one.is_shard() is False and not one.is_replicate() for one in placements)
        return
    holders = math.prod(size for size, one in zip(mesh, placements, strict=True) if one.is_replicate())
    check(weight, found, granule, indices, holders)


def fsdp_and_tp(weight: Tensor, dim: int, dp: int, tp: int) -> Iterator[Tensor]:
    """What FSDP leaves of what tensor parallelism has left."""

    def chunks(tensor: Tensor, parts: int, dim: int) -> list[Tensor]:
        several = list(tensor.chunk(parts, dim))
        return several + [tensor.narrow(dim, 0, 0)] * (parts - len(several))

    for shard, column in itertools.product(range(dp), range(tp)):
        yield chunks(chunks(weight, tp, dim)[column], dp, 0)[shard].contiguous()


@pytest.mark.parametrize(("dp", "tp"), [(2, 2), (2, 3), (3, 2), (4, 2)])
def test_fsdp_after_tensor_parallelism(dp: int, tp: int) -> None:
    """A dimension that both divide; where torch cannot put such a weight together again, it is refused."""
    refused = []
    for rows in range(1, 4 * dp * tp):
        for dim, placements in ((0, [_StridedShard(0, split_factor=tp), Shard(0)]), (1, [Shard(0), Shard(1)])):
            weight = numbers((rows, 12))
            ats = itertools.product(range(dp), range(tp))
            try:
                boxes = [_shards.box_of((rows, 12), (dp, tp), at, placements) for at in ats]
            except ValueError:
                refused.append(rows)
                continue
            found = list(zip(boxes, fsdp_and_tp(weight, dim, dp, tp), strict=True))
            check(weight, found, 4, torch.arange(0, rows * 3, 2, dtype=torch.int32))
    assert not any(rows % (dp * tp) == 0 for rows in refused)
    assert refused or (dp, tp) in ((2, 2), (2, 3))


def test_a_granule_that_a_cut_splits_is_divided_on_that_rank_alone() -> None:
    weight = numbers((2, 24))
    (left, _), (right, _) = ranks(weight, (2,), [Shard(1)])  # 12 columns each
    indices = torch.arange(6, dtype=torch.int32)
    assert left.take(indices, 8).granule == right.take(indices, 8).granule == 4
    assert left.take(indices, 8).indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert right.take(indices, 8).positions.tolist() == [3, 4, 5, 9, 10, 11]
    wide = numbers((1, 40))
    (first, _), (second, _), (third, _) = ranks(wide, (3,), [Shard(1)])  # 14, 14 and 12 columns
    granules = [box.take(torch.arange(5), 8).granule for box in (first, second, third)]
    assert granules == [2, 2, 4]
    check(wide, ranks(wide, (3,), [Shard(1)]), 8, torch.tensor([0, 1, 3]))


def test_experts_and_whole_rows() -> None:
    weight = numbers((4, 6, 8))
    for dim, several in ((0, 2), (1, 3), (2, 2), (0, 3), (1, 4)):
        check(weight, ranks(weight, (several,), [Shard(dim)]), 8, torch.tensor([0, 3, 5, 6, 7, 17, 23]))
    (box, _), *_ = ranks(weight, (2,), [Shard(0)])
    assert box.take(torch.tensor([0, 11, 12], dtype=torch.int64), 8).indices.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int8])
def test_fingerprints_add_up(dtype: torch.dtype) -> None:
    weight = numbers((6, 16), dtype)
    wanted = _granules.fingerprint(weight)
    for mesh, placements in (
        ((2,), [Shard(0)]),
        ((4,), [Shard(0)]),
        ((2,), [Shard(1)]),
        ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
        ((2, 2), [Shard(0), Shard(1)]),
    ):
        parts = [_shards.fingerprint(local, box) for box, local in ranks(weight, mesh, placements)]
        assert sum(part for part in parts if part is not None) & _granules.WORD == wanted
        assert None not in parts
    assert [_shards.fingerprint(local, box) for box, local in ranks(weight, (1,), [Shard(0)])] == [wanted]
    # Many words at a time, of runs that are shorter and longer than that; and memory that begins within a word.
    large = numbers((6, 2**19 // weight.element_size()), dtype)
    for placements in ([Shard(0)], [Shard(1)], [_StridedShard(1, split_factor=2)]):
        parts = [_shards.fingerprint(local, box) for box, local in ranks(large, (2,), placements)]
        assert sum(part or 0 for part in parts) & _granules.WORD == _granules.fingerprint(large)
    (first, _), (second, _) = ranks(weight, (2,), [Shard(0)])
    shifted = torch.cat([weight.flatten()[:1], weight.flatten()])[1:].view_as(weight)
    halves = [_shards.fingerprint(shifted[:3], first), _shards.fingerprint(shifted[3:], second)]
    assert sum(half or 0 for half in halves) & _granules.WORD == wanted


def test_a_part_that_ends_within_the_last_word() -> None:
    for rows, several in ((7, 2), (13, 4), (5, 3)):
        weight = numbers((rows,), torch.bfloat16 if rows == 13 else torch.int32)
        parts = [_shards.fingerprint(local, box) for box, local in ranks(weight, (several,), [Shard(0)])]
        assert sum(part or 0 for part in parts) & _granules.WORD == _granules.fingerprint(weight)
        assert None not in parts


def test_a_word_that_a_cut_splits() -> None:
    parts = [_shards.fingerprint(local, box) for box, local in ranks(numbers((3, 6)), (2,), [Shard(1)])]
    assert parts == [None, None]  # 3 columns of 4 bytes
    uneven = [_shards.fingerprint(local, box) for box, local in ranks(numbers((2, 8)), (3,), [Shard(1)])]
    assert uneven[:2] == [None, None]  # 3, 3 and 2 columns
    assert uneven[2] is not None


def test_placements_that_no_box_describes() -> None:
    with pytest.raises(ValueError, match=r"is a DTensor with the placement P.*\(sum\), which no single entry"):
        _shards.box_of((4, 4), (2,), (0,), [Partial()])
    with pytest.raises(ValueError, match="that divide 7 into 6 uneven parts, on which FSDP and DTensor do not agree"):
        _shards.box_of((7, 4), (3, 2), (0, 0), [_StridedShard(0, split_factor=2), Shard(0)])
