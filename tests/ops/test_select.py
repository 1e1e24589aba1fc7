"""The select family: exact top-k granules, and the frozen random choice."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

import cases
from cases import FLOAT_DTYPES, GRANULES, Backend, Case, Setup, assert_same, build, run
from test_switch import against_oracle, id_of, values_dtypes

SCORES = ("magnitude", "grad", "snip")


# select_top


@pytest.mark.subset
@pytest.mark.parametrize("granule", GRANULES)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_top(backend: Backend, dtype: torch.dtype, score: str, granule: int | str) -> None:
    for i, setup in enumerate(cases.setups((0, 1, 7, 33, 64, 65), granule, dtype=dtype)):
        for values, specials in itertools.product(values_dtypes(dtype), (False, True)):
            setup = replace(setup, values=values, specials=specials)
            against_oracle(backend, build("select_top", setup, score=score), offset=i % 3)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("score", SCORES)
def test_top_past_the_grain(backend: Backend, score: str) -> None:
    for dtype, granule, count in ((torch.bfloat16, 1, 1000), (torch.float32, 1, 99_000), (torch.float32, 3, 1)):
        setup = Setup(dtype=dtype, granule=granule, limit=150_003 // granule, count=count if granule == 1 else 333)
        against_oracle(backend, build("select_top", setup, score=score), offset=1)


@pytest.mark.parametrize("share", [0.5, 0.999, 1.0])
def test_top_of_mostly_equal_scores(backend: Backend, share: float) -> None:
    """More equal scores than a guess may keep: the cut is among them, or above."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(200_001, generator=generator).abs() + 2
    weight[torch.rand(len(weight), generator=generator) < share] = 1
    weight[7] = torch.nan
    order = weight.nan_to_num(-1).sort(descending=True, stable=True).indices
    above = int((weight > 1).sum())
    for k in {50, max(1, above), above + 3000}:
        given = run(backend, Case("select_top", {"weight": weight, "grad": None, "k": k, "score": "magnitude"}))
        assert_same(given["result"], order[:k].sort().values.int())


def patterns() -> Iterator[tuple[str, torch.Tensor]]:
    """Weights whose scores a sample guesses well, badly or not at all."""
    n = 70_001
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(n, generator=generator)
    inside = torch.rand(n, generator=generator)
    yield "normal", normal
    yield "rising", torch.arange(n, dtype=torch.float32)
    yield "few values", (4 * normal).round()
    yield "mostly zero", normal.where(inside < 0.01, -0.0)
    yield "equal", torch.full((n,), -2.5)
    yield "peaks", normal.where(inside > 0.0002, float("-inf"))
    yield "subnormal", normal * 2.0**-148
    yield "half NaN", normal.where(inside < 0.5, float("nan"))
    yield "all NaN", torch.full((n,), float("nan"))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("name", "weight"), list(patterns()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_top_is_a_full_stable_sort(backend: Backend, name: str, weight: torch.Tensor) -> None:
    score = weight.abs().where(~weight.isnan(), -1)
    order = score.sort(descending=True, stable=True).indices
    n = weight.numel()
    for k in (1, 60, 700, 10_000, n // 2, n - 1, n):
        case = Case("select_top", {"weight": weight, "grad": None, "k": k, "score": "magnitude"})
        assert_same(run(backend, case)["result"], order[:k].sort().values.to(torch.int32), f"{name}, k {k}")


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_top_of_large_weights(backend: Backend, dtype: torch.dtype, score: str) -> None:
    """Past the size from which a sample guesses a threshold; granules of a few entries, and longer than a block."""
    for granule, limit, count in ((1, 40_003, 401), (8, 33_001, 3300), (1500, 70, 7)):
        setup = Setup(dtype=dtype, granule=granule, limit=limit, count=count, specials=granule == 1)
        case = build("select_top", setup, score=score)
        assert_same(run(backend, case), run(cases.REFERENCE, case))


@pytest.mark.parametrize("k", [0, 1, 5, 10, 49, 50])
def test_ties_go_to_the_lower_index(backend: Backend, k: int) -> None:
    """bf16 magnitudes of few values: a stable sort decides."""
    weight = torch.from_numpy(np.random.default_rng(k).integers(-2, 3, 50)).to(torch.bfloat16)
    given = run(backend, Case("select_top", {"weight": weight, "grad": None, "k": k, "score": "magnitude"}))["result"]
    order = weight.abs().float().sort(descending=True, stable=True).indices
    assert_same(given, order[:k].sort().values.to(torch.int32))
    for equal in (torch.zeros(50), torch.full((50,), -0.0), torch.full((50,), float("inf"))):
        case = Case("select_top", {"weight": equal, "grad": None, "k": k, "score": "magnitude"})
        assert run(backend, case)["result"].tolist() == list(range(k))


def test_nan_comes_last(backend: Backend) -> None:
    """Behind zeros; among themselves NaNs are ties, whatever their payload and sign."""
    nan = cases.from_bits(np.array([0x7FC00000, 0xFFC12345, 0x7FA00001], dtype=np.uint32), torch.float32)
    weight = torch.cat([nan[:2], torch.tensor([0.0, float("-inf"), -0.0]), nan[2:], torch.tensor([1.0])])
    for k, wanted in enumerate(([], [3], [3, 6], [2, 3, 6], [2, 3, 4, 6], [0, 2, 3, 4, 6], [0, 1, 2, 3, 4, 6])):
        case = Case("select_top", {"weight": weight, "grad": None, "k": k, "score": "magnitude"})
        assert run(backend, case)["result"].tolist() == wanted


def test_zero_times_infinity_is_nan_and_last(backend: Backend) -> None:
    weight, grad = torch.tensor([0.0, 1e-3, 2.0]), torch.tensor([float("inf"), 1.0, 1e-4])
    case = Case("select_top", {"weight": weight, "grad": grad, "k": 2, "score": "snip"})
    assert run(backend, case)["result"].tolist() == [1, 2]


def test_granules_sum_in_entry_order(backend: Backend) -> None:
    """2^24 + 1 + 1 is 2^24 in fp32, 1 + 1 + 2^24 is not: the second granule is larger."""
    weight = torch.tensor([[2.0**24, 1, 1], [1, 1, 2.0**24], [2.0**24, 1, 0]])
    for k, wanted in ((1, [1]), (2, [0, 1]), (3, [0, 1, 2])):
        case = Case("select_top", {"weight": weight, "grad": None, "k": k, "score": "magnitude", "granule": 3})
        assert run(backend, case)["result"].tolist() == wanted


def test_narrow_dtypes_are_scored_in_float32(backend: Backend) -> None:
    """In bf16 both sums round to 256, in fp16 both products overflow: fp32 tells them apart."""
    sums = torch.tensor([[256.0, 0.0], [256.0, 1.0]], dtype=torch.bfloat16)
    case = Case("select_top", {"weight": sums, "grad": None, "k": 1, "score": "magnitude", "granule": 2})
    assert run(backend, case)["result"].tolist() == [1]
    large = torch.tensor([3e4, 4e4], dtype=torch.float16)
    case = Case("select_top", {"weight": large, "grad": large, "k": 1, "score": "snip"})
    assert run(backend, case)["result"].tolist() == [1]


def test_magnitude_ignores_the_gradient(backend: Backend) -> None:
    weight = torch.tensor([3.0, 1.0, 2.0])
    for grad in (None, torch.tensor([0.0, float("nan"), 9.0])):
        case = Case("select_top", {"weight": weight, "grad": grad, "k": 2, "score": "magnitude"})
        assert run(backend, case)["result"].tolist() == [0, 2]


# select_random


def chosen(backend: Backend, numel: int, k: int, seed: int, granule: int = 1) -> torch.Tensor:
    args = {"numel": numel, "k": k, "seed": seed, "device": None, "granule": granule}
    return run(backend, Case("select_random", args))["result"].cpu()


@pytest.mark.subset
@pytest.mark.parametrize("granule", [1, 3, 32])
@pytest.mark.parametrize("domain", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_random(backend: Backend, domain: int, granule: int) -> None:
    for seed, k in enumerate(sorted({0, 1, domain // 2, domain})):
        for real in (seed, -1 - seed, (1 << 63) - 1 - seed, -(1 << 63) + seed):
            args = {"numel": domain * granule, "k": k, "seed": real, "device": None, "granule": granule}
            given = run(backend, Case("select_random", args))
            assert_same(given, run(cases.ORACLE, Case("select_random", args)))
            found = given["result"].tolist()
            assert len(set(found)) == k
            assert found == sorted(found)
            assert all(0 <= x < domain for x in found)


def test_random_of_nothing(backend: Backend) -> None:
    assert_same(chosen(backend, 0, 0, 3), torch.empty(0, dtype=torch.int32))


def test_random_of_wide_domains(backend: Backend) -> None:
    """int32 while every index fits; past 2^31 int64, and the walk stays within 63 bits."""
    for numel in (2**31 - 1, 2**31, 2**40 + 12345, 2**62 + 1):
        for seed in (0, 99):
            args = {"numel": numel, "k": 20, "seed": seed, "device": None, "granule": 1}
            case = Case("select_random", args)
            assert_same(run(backend, case), run(cases.ORACLE, case))
    granules = {"numel": 2**33, "k": 20, "seed": 5, "device": None, "granule": 8}
    assert run(backend, Case("select_random", granules))["result"].dtype == torch.int32


@pytest.mark.usefixtures("threads")
def test_random_past_the_grain(backend: Backend) -> None:
    # Dense choices, and sparse ones of 32 and 64 bits: each is sorted in its own way.
    for numel, k in ((100_003, 8193), (20_001, 20_001), (2**31 - 1, 5001), (2**40 + 1, 5001)):
        case = Case("select_random", {"numel": numel, "k": k, "seed": 11, "device": None})
        assert_same(run(backend, case), run(cases.ORACLE, case))
    everything = chosen(backend, 65_537, 65_537, 1)
    assert_same(everything, torch.arange(65_537, dtype=torch.int32))


# Frozen: a seed may stand for a mask in a file.
FROZEN: dict[tuple[int, int, int, int], list[int]] = {
    (10, 10, 0, 1): [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    (1000, 12, 0, 1): [12, 101, 180, 349, 419, 522, 564, 665, 726, 885, 921, 979],
    (1000, 12, 1, 1): [38, 151, 190, 208, 226, 295, 487, 608, 636, 694, 736, 918],
    (1000, 12, -1, 1): [20, 72, 125, 144, 171, 206, 335, 453, 612, 620, 636, 848],
    (4096 * 4096, 8, 42, 1): [1648307, 2662260, 6567311, 7827890, 7854578, 9107456, 10948468, 14369260],
    (11008 * 4096, 8, 7, 1): [1384219, 4773329, 7809446, 15522131, 16080679, 26668623, 27164783, 40728905],
    (4096 * 4096, 8, 42, 32): [3843, 73480, 152657, 230739, 396974, 399786, 458765, 496002],
    (2**40, 4, 2**63 - 1, 1): [253135022212, 293691002709, 409022493268, 444415889593],
}


@pytest.mark.parametrize("key", FROZEN, ids=str)
def test_random_is_frozen(backend: Backend, key: tuple[int, int, int, int]) -> None:
    numel, k, seed, granule = key
    assert chosen(backend, numel, k, seed, granule).tolist() == FROZEN[key]


def test_a_whole_mask_is_frozen(backend: Backend) -> None:
    """1 % of a 4096 x 4096 weight: the fingerprint of all of its indices."""
    drawn = chosen(backend, 4096 * 4096, 167_772, 42)
    assert int(torch.ops.shira.fingerprint(drawn)) == -7946875405184105982


def test_random_takes_more_by_adding(backend: Backend) -> None:
    """The images of 0..k-1: a larger k keeps what a smaller one chose."""
    small, large = (set(chosen(backend, 999, k, 4).tolist()) for k in (50, 200))
    assert small < large


def test_random_device(backend: Backend) -> None:
    args = {"numel": 100, "k": 10, "seed": 1, "granule": 1}
    device = torch.device(backend.device)
    placed = backend("select_random", **args, device=device)
    assert placed.device.type == device.type
    assert_same(placed, backend("select_random", **args, device=torch.device("cpu")))


def test_random_beyond_memory() -> None:
    """The error gives torch's own reason, which torch 2.11 and 2.12 do not provide."""
    said = r"select_random: there is no memory for k 2305843009213693952 indices \(.+\)|a call into torch failed"
    with pytest.raises(RuntimeError, match=said):
        torch.ops.shira.select_random(2**62, 2**61, 1)


def test_random_spreads_evenly() -> None:
    """Chi-square over 2000 fixed seeds: every position of 50, and every pair distance, about equally often."""
    seeds, domain, k = 2000, 50, 10
    counts = torch.zeros(domain)
    gaps = torch.zeros(domain)
    for seed in range(seeds):
        found = torch.ops.shira.select_random(domain, k, seed).long()
        counts[found] += 1
        apart = (found[:, None] - found[None, :]) % domain
        gaps += torch.bincount(apart[~torch.eye(k, dtype=torch.bool)], minlength=domain)
    expected = seeds * k / domain
    # Drawing without replacement narrows the variance by (domain - k) / (domain - 1).
    chi = float(((counts - expected) ** 2 / expected).sum()) * (domain - 1) / (domain - k)
    assert chi < 85.4, "49 degrees of freedom: 0.1 % of random choices lie above"
    assert chi > 23.9, "and 0.1 % lie below: too even is not random either"
    expected = seeds * k * (k - 1) / (domain - 1)
    # Distances d and domain - d are the same pairs: half the bins are independent, and each counts twice.
    chi = float(((gaps[1:] - expected) ** 2 / expected).sum()) / 2
    assert chi < 52.6 * 1.25, "24.5 degrees of freedom; pairs of one draw are not quite independent"


def test_random_differs_between_seeds() -> None:
    found = {tuple(torch.ops.shira.select_random(10_000, 20, seed).tolist()) for seed in range(-100, 100)}
    assert len(found) == 200
