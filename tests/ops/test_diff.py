"""The diff family: what changed since a snapshot, by bits; the snapshot follows."""

from __future__ import annotations

import pytest
import torch

import cases
import oracles
import shira_ops
from cases import ALL, GRANULES, MOVE_DTYPES, Backend, Case, Setup, assert_same, bits, build, run


def against_oracle(backend: Backend, case: Case) -> None:
    assert_same(run(backend, case), run(cases.ORACLE, case))


@pytest.mark.parametrize("granule", GRANULES)
@pytest.mark.parametrize("dtype", MOVE_DTYPES, ids=str)
def test_diff(backend: Backend, dtype: torch.dtype, granule: int | str) -> None:
    for limit, count in ((300, 20), (7, 7), (64, 0), (0, 0)):
        if granule == ALL:
            limit, count = min(limit, 1), min(count, 1)
        if limit == 0 and granule != 1:
            continue
        setup = Setup(dtype=dtype, granule=48 if granule == ALL else granule, limit=limit, count=count)
        against_oracle(backend, build("diff_", setup))


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 4096, 70_003])
def test_sizes(backend: Backend, size: int, before: bool) -> None:
    """Ends of lines, of chunks and of tiles; a change in the first and the last entry."""
    generator = torch.Generator().manual_seed(size)
    weight = torch.randn(size, generator=generator).bfloat16()
    snapshot = weight.clone()
    at = torch.unique(torch.randint(0, size, (size // 50 + 1,), generator=generator))
    at = torch.unique(torch.cat([at, torch.tensor([0, size - 1])]))
    snapshot[at] += 1
    old = snapshot[at]
    indices, values = backend("diff_", snapshot=snapshot, weight=weight, granule=1, before=before)
    assert_same(indices, at.int())
    assert_same(values, old if before else weight[at])
    assert_same(snapshot, weight)
    indices, values = backend("diff_", snapshot=snapshot, weight=weight, granule=1)
    assert len(indices) == len(values) == 0


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("bytes_of_granule", [6, 48, 1024, 3000, 70_000])
def test_granules_that_no_line_holds(backend: Backend, bytes_of_granule: int, before: bool) -> None:
    granule = bytes_of_granule // 2
    weight = torch.arange(granule * 5, dtype=torch.int16)
    snapshot = weight.clone()
    snapshot[2 * granule - 1] ^= 1
    snapshot[4 * granule] ^= 1
    side = snapshot.clone() if before else weight
    indices, values = backend("diff_", snapshot=snapshot, weight=weight, granule=granule, before=before)
    assert_same(indices, torch.tensor([1, 4], dtype=torch.int32))
    assert_same(values, torch.cat([side[granule : 2 * granule], side[4 * granule :]]))
    assert_same(snapshot, weight)


def test_bits_and_not_numbers(backend: Backend) -> None:
    """Zeros of both signs differ, and so do NaNs with different payloads; equal NaNs do not."""
    weight = torch.tensor([0x0000, 0x7FC0, 0x7FC1, 0x3F80], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    snapshot = torch.tensor([-0x8000, 0x7FC0, 0x7FC0, 0x3F80], dtype=torch.int16).view(torch.bfloat16)
    indices, values = backend("diff_", snapshot=snapshot, weight=weight, granule=1)
    assert_same(indices, torch.tensor([0, 2], dtype=torch.int32))
    assert_same(values, weight[[0, 2]])
    assert_same(snapshot, weight)


def test_memory_that_is_not_aligned_to_lines(backend: Backend) -> None:
    for begin in (1, 4):
        weight = torch.randn(1000)[begin:].clone().bfloat16()
        room = torch.zeros(1000, dtype=torch.bfloat16)[begin : begin + len(weight)]
        room.copy_(weight)
        room[5] += 1
        indices, _ = backend("diff_", snapshot=room, weight=weight, granule=1)
        assert_same(indices, torch.tensor([5], dtype=torch.int32))
        assert_same(room, weight)


def test_a_list(backend: Backend) -> None:
    against_oracle(backend, build("foreach_diff_", Setup(dtype=torch.bfloat16, granule=8)))
    found = backend("foreach_diff_", snapshots=[], weights=[], granule=1)
    assert [list(part) for part in found] == [[], []]


def test_scatter_follows(backend: Backend) -> None:
    """The pair turns an old copy into the weight."""
    case = build("diff_", Setup(dtype=torch.float32, granule=16, limit=500, count=40))
    old = case.args["snapshot"].clone()
    indices, values = backend("diff_", **case.args)
    shira_ops.scatter_(old, indices, values, granule=16)
    assert_same(old, case.args["weight"])
    assert 0 < len(indices) <= 40


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"snapshot": torch.zeros(2, 12)}, "snapshot must have weight's shape [2, 3, 4], got shape [2, 12]"),
        ({"snapshot": torch.zeros(2, 3, 4).double()}, "snapshot must have weight's dtype float32, got float64"),
        (
            {"snapshot": torch.zeros(2, 4, 3).mT},
            "snapshot must be contiguous, got shape [2, 3, 4] with strides [12, 1, 3]",
        ),
        ({"granule": 5}, "granule must divide weight's 24 entries, got 5"),
    ],
)
def test_refusals(backend: Backend, change: dict[str, object], says: str) -> None:
    args = {"snapshot": torch.zeros(2, 3, 4), "weight": torch.ones(2, 3, 4), "granule": 1, **change}
    with pytest.raises(RuntimeError) as refused:
        backend("diff_", **args)
    assert str(refused.value).splitlines()[0] == f"diff_: {says}"
    assert not args["snapshot"].any()  # type: ignore[attr-defined]


def test_overlap(backend: Backend) -> None:
    weight = torch.zeros(8)
    with pytest.raises(RuntimeError, match="diff_: weight must not overlap snapshot in memory"):
        backend("diff_", snapshot=weight, weight=weight, granule=1)


def test_threads_agree(threads: None) -> None:
    case = build("diff_", Setup(dtype=torch.bfloat16, limit=400_000, count=9000))
    wanted = oracles.diff_(case.args["snapshot"].clone(), case.args["weight"])
    for number in (1, 2):
        torch.set_num_threads(number)
        given = shira_ops.diff_(case.args["snapshot"].clone(), case.args["weight"])
        assert_same(given, list(wanted))


def test_versions_move() -> None:
    weight, snapshot = torch.ones(4), torch.zeros(4)
    before = snapshot._version, weight._version
    shira_ops.diff_(snapshot, weight)
    assert (snapshot._version, weight._version) == (before[0] + 1, before[1])
    assert bits(snapshot).tolist() == bits(weight).tolist()
