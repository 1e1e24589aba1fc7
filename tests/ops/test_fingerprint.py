"""The fingerprint family: frozen sums that every device gives."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import cases
import oracles
import shira_ops
from cases import GRANULES, MOVE_DTYPES, Backend, Case, Setup, assert_same, build, run
from shira import _granules
from test_switch import against_oracle, id_of


@pytest.mark.subset
@pytest.mark.parametrize("dtype", MOVE_DTYPES, ids=id_of)
def test_fingerprint(backend: Backend, dtype: torch.dtype) -> None:
    """Every length of the tail, and every alignment of the first word."""
    for i, limit in enumerate((0, 1, 2, 3, 5, 7, 8, 9, 63, 64, 65, 1001)):
        setup = Setup(dtype=dtype, limit=limit, count=0, seed=i)
        case = build("fingerprint", setup, granule=1 + i % min(3, limit or 1))
        against_oracle(backend, case, offset=i % 8)


@pytest.mark.subset
@pytest.mark.parametrize("granule", GRANULES)
@pytest.mark.parametrize("dtype", MOVE_DTYPES, ids=id_of)
def test_fingerprint_at(backend: Backend, dtype: torch.dtype, granule: int | str) -> None:
    """Granules smaller than a word share words, and each word counts once."""
    for i, setup in enumerate(cases.setups((0, 1, 7, 63, 65), granule, dtype=dtype)):
        setup = replace(setup, index=cases.INDEX_DTYPES[i % 2])
        against_oracle(backend, build("fingerprint_at", setup), offset=i % 8)


@pytest.mark.subset
@pytest.mark.parametrize("dtype", MOVE_DTYPES, ids=id_of)
def test_fingerprint_part(backend: Backend, dtype: torch.dtype) -> None:
    """Runs of one word, of several and of all; every length of the tail, and every alignment of the first word."""
    for i, limit in enumerate((0, 1, 2, 3, 5, 7, 8, 9, 63, 64, 65, 1001)):
        setup = Setup(dtype=dtype, limit=limit, count=0, seed=i)
        for together, stride in ((1, 1), (1, 7), (5, 5), (9, 40), (2**40, 2**62)):
            case = build("fingerprint_part", setup, first=2**40 * i + i, run=together, stride=stride)
            against_oracle(backend, case, offset=i % 8)


def test_parts_add_up_to_the_whole(backend: Backend) -> None:
    """Rows and columns of a weight, in chunks of equal sizes; and a last part that ends within a word."""
    weight = cases.random_bits(np.random.default_rng(2), 12 * 32, torch.bfloat16).view(12, 32)
    whole = run(backend, Case("fingerprint", {"weight": weight}))["result"]
    for dim, parts in ((0, 4), (1, 4), (1, 2)):
        total = torch.zeros((), dtype=torch.int64)
        for number, part in enumerate(weight.chunk(parts, dim)):
            words = part.numel() // 4
            place = (number * words, words, words) if dim == 0 else (number * words // 12, words // 12, 8)
            args = {"weight": part.contiguous(), **dict(zip(("first", "run", "stride"), place, strict=True))}
            total += run(backend, Case("fingerprint_part", args))["result"]
        assert_same(total, whole)
    odd = weight.flatten()[:-3]
    whole = run(backend, Case("fingerprint", {"weight": odd}))["result"]
    for cut in (4, 200):
        for at, part in ((0, odd[:cut]), (cut // 4, odd[cut:])):
            args = {"weight": part, "first": at, "run": 7, "stride": 7}
            whole = whole - run(backend, Case("fingerprint_part", args))["result"]
        assert_same(whole, torch.tensor(0))
        whole = run(backend, Case("fingerprint", {"weight": odd}))["result"]


def test_parts_that_are_refused(backend: Backend) -> None:
    weight = torch.zeros(8, dtype=torch.bfloat16)
    for given, says in (
        ({"first": -1}, "first must be at least 0, got -1"),
        ({"run": 0}, "run must be at least 1, got 0"),
        ({"run": 3, "stride": 2}, "stride must be at least run 3, got 2"),
    ):
        args = {"weight": weight, "first": 0, "run": 1, "stride": 1, **given}
        with pytest.raises(RuntimeError, match=f"fingerprint_part: {re.escape(says)}"):
            run(backend, Case("fingerprint_part", args))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64], ids=id_of)
def test_past_the_grain(backend: Backend, dtype: torch.dtype) -> None:
    setup = Setup(dtype=dtype, limit=100_003, count=20_001)
    for op in ("fingerprint", "fingerprint_at", "fingerprint_part"):
        against_oracle(backend, build(op, setup), offset=1)


def test_frozen(backend: Backend) -> None:
    """Numbers that files hold: they may never change."""
    frozen = {
        (torch.float32, 0): 0,
        (torch.uint8, 1): FROZEN_BYTE,
        (torch.int64, 3): FROZEN_WORDS,
        (torch.bfloat16, 7): FROZEN_BF16,
    }
    for (dtype, n), wanted in frozen.items():
        given = run(backend, Case("fingerprint", {"weight": torch.arange(n).to(dtype)}))["result"]
        assert_same(given, torch.tensor(wanted, dtype=torch.int64))


# From the definition, by hand: splitmix64(0) = 0xE220A8397B1DCDAF is word 0 of a byte that is 0.
FROZEN_BYTE = 0xE220A8397B1DCDAF - (1 << 64)
FROZEN_WORDS = -7163622699724625531
FROZEN_BF16 = -4355009913464607989


@pytest.mark.parametrize("granule", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64], ids=id_of)
def test_kept_current_by_what_changed(backend: Backend, dtype: torch.dtype, granule: int) -> None:
    """new = old - at(before) + at(after)."""
    case = build("swap_", Setup(dtype=dtype, granule=granule, limit=100, count=37))
    weight, indices = case.args["weight"], case.args["indices"]
    at = {"indices": indices, "granule": granule}
    old = run(backend, Case("fingerprint", {"weight": weight}))["result"]
    before = run(backend, Case("fingerprint_at", {"weight": weight, **at}))["result"]
    changed = run(backend, case)["weight"]
    after = run(backend, Case("fingerprint_at", {"weight": changed, **at}))["result"]
    assert_same(run(backend, Case("fingerprint", {"weight": changed}))["result"], old - before + after)


def test_all_granules_give_the_whole(backend: Backend) -> None:
    weight = cases.random_bits(np.random.default_rng(0), 48, torch.bfloat16)
    whole = run(backend, Case("fingerprint", {"weight": weight}))["result"]
    for granule in (1, 3, 16, 48):
        args = {"weight": weight, "indices": torch.arange(48 // granule), "granule": granule}
        assert_same(run(backend, Case("fingerprint_at", args))["result"], whole)


def test_every_bit_and_every_position_counts(backend: Backend) -> None:
    weight = torch.zeros(24, dtype=torch.uint8)
    seen = {int(run(backend, Case("fingerprint", {"weight": weight}))["result"])}
    for bit in range(24 * 8):
        changed = weight.clone()
        changed[bit // 8] = 1 << bit % 8
        seen.add(int(run(backend, Case("fingerprint", {"weight": changed}))["result"]))
    assert len(seen) == 1 + 24 * 8


def test_shape_does_not_count_but_length_does(backend: Backend) -> None:
    weight = cases.random_bits(np.random.default_rng(1), 12, torch.float32)
    prints = [
        int(run(backend, Case("fingerprint", {"weight": w}))["result"])
        for w in (weight, weight.view(3, 4), weight.view(2, 6))
    ]
    assert len(set(prints)) == 1
    # A tail of zeros in the last word is the padding itself; a whole further word is not.
    zeros = [torch.zeros(n, dtype=torch.uint8) for n in (1, 8, 9)]
    one, word, more = (int(run(backend, Case("fingerprint", {"weight": z}))["result"]) for z in zeros)
    assert one == word == FROZEN_BYTE
    assert more != word


def test_oracle_words() -> None:
    """splitmix64's published first output for the seed 0."""
    assert oracles.splitmix64(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kernel", [True, False], ids=["in one pass", "op by op"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64], ids=id_of)
def test_a_swap_tells_by_how_much_it_changes_the_fingerprint(
    dtype: torch.dtype, kernel: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Granules that share words with their neighbours, that reach over words, and in the padded last word."""
    if not kernel:
        monkeypatch.setattr(_granules, "_has_kernel", lambda: False)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    before_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for granule, numel in ((1, 999), (1, 20_011), (2, 1000), (3, 20_001), (8, 4000), (33, 3300)):
            weights, indices, values = [], [], []
            for share, kind in ((0.02, torch.int32), (0.4, torch.int64), (1.0, torch.int32), (0.0, torch.int64)):
                # At every alignment that the dtype allows.
                weights.append(cases.random_bits(rng, numel + 1, dtype)[len(weights) % 2 :][:numel])
                chosen = torch.rand(numel // granule, generator=generator) < share
                indices.append(chosen.nonzero().view(-1).to(kind))
                values.append(cases.random_bits(rng, indices[-1].numel() * granule, dtype))
            swapped, kept = [one.clone() for one in weights], [one.clone() for one in values]
            for each in zip(swapped, indices, kept, strict=True):
                torch.ops.shira.swap_(*each, granule)
            prints = [_granules.fingerprint(one) for one in weights]
            versions = [one._version for one in (*weights, *values)]
            changes = _granules.swap_(weights, indices, values, granule)
            assert [one._version for one in (*weights, *values)] == [version + 1 for version in versions]
            for one, other in zip((*weights, *values), (*swapped, *kept), strict=True):
                assert_same(one, other)
            for one, old, change in zip(weights, prints, changes.tolist(), strict=True):
                assert _granules.fingerprint(one) == (old + change) & _granules.WORD
    finally:
        torch.set_num_threads(before_threads)


def test_a_swap_that_is_refused_has_swapped_nothing() -> None:
    weights, values = [torch.zeros(8), torch.zeros(8)], [torch.ones(2), torch.ones(2)]
    indices = [torch.tensor([1, 2]), torch.tensor([2, 1])]
    with pytest.raises(RuntimeError, match=r"foreach_swap_: indices\[1\] must be strictly increasing"):
        _granules.swap_(weights, indices, values, 1)
    assert not any(one.any() for one in weights)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 100_001])
def test_words_that_were_read(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    words = cases.random_bits(np.random.default_rng(0), count, torch.int64)
    positions = torch.arange(count).flip(0) * 3
    found = _granules.share(words, positions)
    monkeypatch.setattr(_granules, "_has_kernel", lambda: False)
    assert_same(found, _granules.share(words, positions))
    with pytest.raises(RuntimeError, match="_fingerprint_words: words and positions must be int64, 1-D and as many"):
        torch.ops.shira._fingerprint_words(words, torch.arange(count + 1))


def test_many_narrow_granules() -> None:
    """Eight words at a time, where neighbours share words and the last one is padded."""
    rng = np.random.default_rng(0)
    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.float64):
        weight = cases.random_bits(rng, 5003, dtype)
        for share in (0.01, 0.3, 1.0):
            indices = torch.from_numpy(np.flatnonzero(rng.random(5003) < share))
            assert_same(shira_ops.fingerprint_at(weight, indices), oracles.fingerprint_at(weight, indices))
            assert_same(shira_ops.fingerprint_at(weight, indices.int()), oracles.fingerprint_at(weight, indices))
