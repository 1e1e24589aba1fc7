"""`Adapter.from_difference`: exact by bits, what `density` keeps and loses, and what does not match."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shira_ops
from shira import Adapter, AdapterError, Switcher, _codec
from shira.adapter import difference as difference_module
from shira.adapter.difference import difference

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int64, torch.float8_e4m3fn]


@pytest.fixture(autouse=True, params=["one chunk", "many chunks"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many chunks":
        for size in ("_CHUNK", "_SCORED"):
            monkeypatch.setattr(difference_module, size, 512)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def put_on(base: dict[str, torch.Tensor], adapter: Adapter) -> dict[str, torch.Tensor]:
    """The base with the adapter's entries written, by plain indexing."""
    out = {name: tensor.clone() for name, tensor in base.items()}
    for name, entry in adapter.weights.items():
        words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[entry.dtype.itemsize]
        for known in (name, *entry.aliases):
            flat = out[known].view(-1).view(words).view(-1, entry.granule)
            flat[entry.indices.long()] = entry.values.view(words).view(-1, entry.granule)
    return out


def changed(tensor: torch.Tensor, share: float, seed: int = 0) -> torch.Tensor:
    """A copy with other bits in about this share of the entries."""
    generator = torch.Generator().manual_seed(seed)
    out = tensor.clone()
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    flat = out.view(-1).view(words)
    flat[torch.rand(flat.shape, generator=generator) < share] ^= 1
    return out


def pair(dtype: torch.dtype = torch.bfloat16, share: float = 0.02) -> tuple[dict, dict]:
    torch.manual_seed(0)
    base = {
        "a.weight": (torch.randn(48, 64) * 8).to(dtype),
        "a.bias": (torch.randn(48) * 8).to(dtype),
        "b.weight": (torch.randn(40, 96) * 8).to(dtype),
        "scale": torch.tensor(3.0).to(dtype),
        "empty": torch.empty(0, 8, dtype=dtype),
    }
    tuned = {name: changed(tensor, share, seed) for seed, (name, tensor) in enumerate(base.items())}
    tuned["b.weight"] = base["b.weight"].clone()
    return base, tuned


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(bits(one[name]), bits(two[name])) for name in one)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact(dtype: torch.dtype, share: float) -> None:
    base, tuned = pair(dtype, share)
    adapter = Adapter.from_difference(base, tuned)
    assert same(put_on(base, adapter), tuned)
    assert adapter.report.exact
    for name, entry in adapter.weights.items():
        differs = int((bits(base[name]) != bits(tuned[name])).view(-1, dtype.itemsize).any(1).sum())
        assert adapter.report.weights[name].changed == differs > 0
        assert adapter.report.weights[name].kept == entry.nnz
        assert entry.fingerprint == int(shira_ops.fingerprint(base[name])) % 2**64
    assert "b.weight" not in adapter.weights


def test_signs_of_zero_and_payloads_of_nan_count() -> None:
    words = torch.tensor([0x0000, 0x8000 - 2**16, 0x7FC0, 0x7FC1, 0x3F80, 0x7F80], dtype=torch.int16).repeat(16)
    base = {"w": words.view(torch.bfloat16).view(2, 48)}
    other = words.clone()
    other[0], other[1], other[2], other[9] = -(2**15), 0, 0x7FC5, 0x7FC0  # 0 to -0, -0 to 0, NaN to NaN, NaN to NaN
    tuned = {"w": other.view(torch.bfloat16).view(2, 48)}
    adapter = Adapter.from_difference(base, tuned)
    assert adapter.weights["w"].indices.tolist() == [0, 1, 2, 9]
    assert same(put_on(base, adapter), tuned)


@pytest.mark.parametrize("granule", [2, 3, 16])
def test_granules_complete_what_changed(granule: int) -> None:
    torch.manual_seed(1)
    base = {"w": torch.randn(30, 48)}
    tuned = {"w": changed(base["w"], 0.01)}
    adapter = Adapter.from_difference(base, tuned, granule=granule)
    entry = adapter.weights["w"]
    expected = (base["w"] != tuned["w"]).view(-1, granule).any(1).nonzero().squeeze(1)
    assert torch.equal(entry.indices.long(), expected)
    assert same(put_on(base, adapter), tuned)


def test_whole_where_that_is_smaller() -> None:
    base, tuned = pair(torch.bfloat16, 1.0)
    adapter = Adapter.from_difference(base, tuned)
    assert all(entry.whole for entry in adapter.weights.values())
    sparse, _ = pair()
    tuned = {**sparse, "a.weight": changed(sparse["a.weight"], 0.4)}  # 3 bytes per entry: sparse below two thirds
    assert not Adapter.from_difference(sparse, tuned).weights["a.weight"].whole
    tuned = {**sparse, "a.weight": changed(sparse["a.weight"], 0.9)}
    assert Adapter.from_difference(sparse, tuned).weights["a.weight"].whole


def test_values_are_nobody_elses() -> None:
    base, tuned = pair(share=1.0)
    adapter = Adapter.from_difference(base, tuned)
    before = {name: entry.values.clone() for name, entry in adapter.weights.items()}
    for tensor in (*base.values(), *tuned.values()):
        tensor.zero_()
    assert all(torch.equal(bits(before[name]), bits(entry.values)) for name, entry in adapter.weights.items())


def top(base: torch.Tensor, tuned: torch.Tensor, count: int, granule: int) -> torch.Tensor:
    """The plain way: a stable sort of all scores."""
    scores = (tuned.double() - base.double()).float().abs().view(-1, granule).sum(1)
    scores = torch.where(scores.isnan(), torch.inf, scores)
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


@pytest.mark.parametrize("granule", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int8], ids=str)
@pytest.mark.parametrize("density", [0.01, 0.3])
def test_density_keeps_the_largest(dtype: torch.dtype, density: float, granule: int) -> None:
    torch.manual_seed(2)
    base = {"w": (torch.randn(64, 80) * 20).to(dtype)}
    # Few distinct steps, so that there are many ties.
    tuned = {"w": (base["w"].double() + torch.randint(-3, 4, (64, 80)).double()).to(dtype)}
    adapter = Adapter.from_difference(base, tuned, density=density, granule=granule)
    entry = adapter.weights["w"]
    count = round(density * 64 * 80 / granule)
    assert torch.equal(entry.indices.long(), top(base["w"], tuned["w"], count, granule))
    assert torch.equal(entry.values, tuned["w"].view(-1, granule)[entry.indices.long()].view(-1))

    squared = (tuned["w"].double() - base["w"].double()).square()
    kept = squared.view(-1, granule)[entry.indices.long()].sum()
    lost = adapter.report.weights["w"]
    assert lost.changed == int((base["w"] != tuned["w"]).sum())
    assert lost.kept == count * granule
    assert lost.lost == pytest.approx(float(1 - kept / squared.sum()), rel=1e-6)
    assert adapter.report.lost == pytest.approx(lost.lost)
    assert "lost" in str(adapter.report)


def test_density_that_holds_everything_is_exact() -> None:
    base, tuned = pair(share=0.02)
    adapter = Adapter.from_difference(base, tuned, density=0.5)
    assert same(put_on(base, adapter), tuned)
    assert adapter.report.lost == 0.0


def test_what_is_no_number_is_kept_first() -> None:
    base = {"w": torch.zeros(8, 16)}
    tuned = {"w": torch.arange(128.0).view(8, 16)}
    tuned["w"][3, 3], tuned["w"][5, 5] = torch.nan, -torch.inf
    adapter = Adapter.from_difference(base, tuned, density=2 / 128)
    assert adapter.weights["w"].indices.tolist() == [51, 85]


def test_what_changes_no_value_is_lost_all_the_same() -> None:
    base = {"w": torch.zeros(8, 16)}
    report = Adapter.from_difference(base, {"w": -base["w"]}, density=0.25).report
    assert (report.changed, report.kept, report.lost, report.exact) == (128, 32, 0.0, False)
    assert "0.000% of the squared difference lost" in str(report)


def test_losses_add_up_over_weights() -> None:
    torch.manual_seed(3)
    base = {"a": torch.randn(16, 32), "b": torch.randn(16, 32)}
    tuned = {"a": base["a"] + torch.randn(16, 32), "b": base["b"].clone()}
    tuned["b"].view(-1)[5] += 40  # exact within its budget, and most of the squared difference
    report = Adapter.from_difference(base, tuned, density=0.1).report
    squared = float((tuned["a"] - base["a"]).square().sum()), float((tuned["b"] - base["b"]).square().sum())
    assert report.weights["b"].lost == 0
    assert report.lost == pytest.approx(report.weights["a"].lost * squared[0] / sum(squared), rel=1e-5)


def test_files_shards_and_modules_give_the_same(tmp_path) -> None:
    base, tuned = pair()
    save_file(base, tmp_path / "base.safetensors")
    folder = tmp_path / "tuned"
    folder.mkdir()
    names = list(tuned)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for shard, held in shards.items():
        save_file({name: tuned[name] for name in held}, folder / shard)
    where = {name: shard for shard, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    single = tmp_path / "single"
    single.mkdir()
    save_file(tuned, single / "model.safetensors")

    expected = Adapter.from_difference(base, tuned)
    for given in (folder, str(single)):
        adapter = Adapter.from_difference(tmp_path / "base.safetensors", given)
        assert adapter.weights.keys() == expected.weights.keys()
        for name, entry in adapter.weights.items():
            assert torch.equal(entry.indices, expected.weights[name].indices)
            assert torch.equal(entry.values, expected.weights[name].values)
            assert entry.fingerprint == expected.weights[name].fingerprint


def test_it_goes_onto_the_model() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = {name: changed(tensor, 0.05) for name, tensor in before.items()}
    adapter = Adapter.from_difference(model, tuned)
    switcher = Switcher(model)
    switcher.add("tuned", adapter)
    switcher.activate("tuned")
    assert same(dict(model.state_dict()), tuned)
    switcher.deactivate()
    assert same(dict(model.state_dict()), before)


def test_tied_weights_are_aliases() -> None:
    weight = torch.randn(24, 16)
    base = {"embed.weight": weight, "head.weight": weight}
    new = changed(weight, 0.1)
    adapter = Adapter.from_difference(base, {"embed.weight": new, "head.weight": new.clone()})
    assert list(adapter.weights) == ["embed.weight"]
    assert adapter.weights["embed.weight"].aliases == ("head.weight",)
    with pytest.raises(AdapterError, match=r"'embed.weight' and 'head.weight' are one \(tied\) weight in the base"):
        Adapter.from_difference(base, {"embed.weight": new, "head.weight": changed(new, 0.1)})


def test_all_that_does_not_match_is_one_error() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(2), "d": torch.zeros(1)}
    tuned = {"a": torch.zeros(3, 2), "b": torch.zeros(4).half(), "c": torch.zeros(2), "e": torch.zeros(1)}
    with pytest.raises(AdapterError) as error:
        Adapter.from_difference(base, tuned)
    for part in (
        r"'a' has shape [2, 3] in the base and [3, 2] in the tuned one",
        "'b' is float32 in the base and float16 in the tuned one",
        "'d' is only in the base checkpoint",
        "'e' is only in the tuned checkpoint",
    ):
        assert part in str(error.value)


def test_refusals(tmp_path) -> None:
    base, tuned = pair()
    with pytest.raises(ValueError, match="density must be above 0"):
        Adapter.from_difference(base, tuned, density=0.0)
    with pytest.raises(ValueError, match="granule must be a whole number"):
        Adapter.from_difference(base, tuned, granule=0)
    base, tuned = pair(share=1.0)
    with pytest.raises(AdapterError, match=r"granule 32 must divide .* not so for 2: a.bias \[48\], scale \[\]"):
        Adapter.from_difference(base, tuned, granule=32)
    with pytest.raises(AdapterError, match="'flag' changed, and an adapter cannot hold entries of bool"):
        Adapter.from_difference({"flag": torch.tensor([True])}, {"flag": torch.tensor([False])})
    with pytest.raises(TypeError, match=r"base must be a path, a state dict or a torch.nn.Module, got int"):
        Adapter.from_difference(3, tuned)
    with pytest.raises(AdapterError, match="meta device"):
        Adapter.from_difference({"a": torch.empty(2, device="meta")}, {"a": torch.empty(2)})
    with pytest.raises(AdapterError, match=r"0 .safetensors files"):
        Adapter.from_difference(tmp_path, tuned)
    with pytest.raises(FileNotFoundError):
        Adapter.from_difference(tmp_path / "nothing.safetensors", tuned)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "not in its folder"),
        ({"weight_map": {"a": "gone.safetensors"}}, "missing"),
        ({"weight_map": {"b": "s.safetensors"}}, "holds 'b', and it does not"),
        ({"weight_map": [1]}, "the index cannot be read"),
        ({}, "the index cannot be read"),
    ],
)
def test_wrong_indices(tmp_path, index: dict, says: str) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "s.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AdapterError, match=says):
        Adapter.from_difference(tmp_path, {"a": torch.zeros(2)})


def test_progress() -> None:
    base, tuned = pair()
    seen = []
    difference(base, tuned, progress=lambda name, done, total: seen.append((name, done, total)))
    total = sum(tensor.nbytes for tensor in base.values())
    assert [name for name, _, _ in seen] == list(base)
    assert seen[-1][1:] == (total, total)


@pytest.mark.parametrize("width", _codec.widths())
@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_differing_on_every_width(share: float, itemsize: int, width: str) -> None:
    rng = np.random.default_rng(itemsize)
    one = rng.integers(0, 256, 3000 * itemsize + 5, dtype=np.uint8)[5:]  # at no address in particular
    two = one.copy()
    entries = np.flatnonzero(rng.random(3000) < share)
    two[entries * itemsize + rng.integers(0, itemsize, len(entries))] ^= 0x80  # any one byte of an entry
    for begin, end in ((0, 3000), (7, 2990), (64, 128), (5, 5), (2999, 3000)):
        expected = entries[(entries >= begin) & (entries < end)] - begin
        found = _codec.differing(one, two, itemsize, begin, end, width=width)
        assert found.dtype == np.int32
        assert found.tolist() == expected.tolist()
        assert _codec.count_differing(one, two, itemsize, begin, end) == len(expected)


@pytest.mark.parametrize("width", _codec.widths())
def test_shares_of_a_fingerprint_add_up(width: str) -> None:
    data = np.arange(1003, dtype=np.uint32).view(np.uint8)[:-1]  # the last word is not whole
    whole = int(shira_ops.fingerprint(torch.from_numpy(data)))
    cuts = [0, 1, 8, 100, 101, 502]
    shares = [_codec.fingerprint(data, begin, end, width=width) for begin, end in itertools.pairwise(cuts)]
    assert (sum(shares) - whole) % 2**64 == 0
    assert _codec.fingerprint(data, 101, width=width) == shares[-1]


@pytest.mark.parametrize("width", [1, 2, 4, 6, 8, 64])
def test_take(width: int) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (50, width), dtype=np.uint8)
    indices = np.array([0, 3, 3, 49, 7], np.int32)
    assert np.array_equal(_codec.take(rows, width, indices), rows[indices].reshape(-1))
    assert _codec.take(rows, width, indices[:0]).size == 0


def test_refusals_of_the_module() -> None:
    data = np.zeros(16, np.uint8)
    dtypes = "dtype must be float16, bfloat16, float32 or float64"
    for call, says in (
        (lambda: _codec.count_ranks(data, data, "int8", 1, 0, 0), dtypes),
        (lambda: _codec.differing(data, data[:8], 1, 0, 8), "both must have the same bytes, got 16 and 8"),
        (lambda: _codec.differing(data, data, 3, 0, 1), "itemsize must be 1, 2, 4 or 8, got 3"),
        (lambda: _codec.differing(data, data, 4, 0, 5), "entries of the 4 in order, got 0 and 5"),
        (lambda: _codec.differing(data, data, 4, -1, 2), "in order, got -1 and 2"),
        (lambda: _codec.count_differing(data, data, 4, 3, 2), "in order, got 3 and 2"),
        (lambda: _codec.differing(data[::2], data[::2], 1, 0, 8), "one must be contiguous"),
        (lambda: _codec.count_ranks(data, data, "float32", 3, 0, 0), "granule must divide the entries of 16 bytes"),
        (
            lambda: _codec.count_ranks(data, data, "float32", 1, 32, 0),
            "a multiple of 16 below 32, got 32",
        ),
        (lambda: _codec.take_ranks(data, data[:8], "float32", 1, 0), "both must have the same bytes, got 16 and 8"),
        (
            lambda: _codec.squared_difference(data[:2], data[:2], "float32"),
            "granule must divide the entries of 2 bytes",
        ),
        (lambda: _codec.take(data, 3, np.zeros(1, np.int32)), "width must divide 16 bytes, got 3"),
        (lambda: _codec.take(data, 4, np.array([0, 4], np.int32)), r"must be in \[0, 4\), got 4 at position 1"),
        (lambda: _codec.take(data, 4, np.array([-1], np.int32)), "got -1 at position 0"),
        (lambda: _codec.fingerprint(data, 0, 3), "words of the 2 in order, got 0 and 3"),
        (lambda: _codec.fingerprint(data, -1), "got -1 and 2"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
