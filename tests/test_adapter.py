"""Adapter and its file: round trips, and every kind of wrong file refused with a sentence."""

import copy
import json
import pickle
import struct

import pytest
import torch
from torch import nn

import shira
import shira_ops
from shira import Adapter, AdapterError, Entry, SparseTuner, Switcher, masks


def model_of(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)).to(dtype)


def adapter_of(mask=None, dtype=torch.bfloat16):
    with SparseTuner(model_of(dtype), mask or masks.Rand(density=0.1)) as tuner:
        with torch.no_grad():
            for values in tuner.parameters():
                values.add_(torch.randn_like(values))
        return tuner.adapter(alpha=0.5, provenance={"data": "made up", "steps": 3})


def same(one, two):
    assert one.alpha == two.alpha
    assert one.delta == two.delta
    assert one.mask == two.mask
    assert one.provenance == two.provenance
    assert one.weights.keys() == two.weights.keys()
    for name, a in one.weights.items():
        b = two.weights[name]
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.values, b.values)
        assert (a.shape, a.dtype, a.granule, a.fingerprint, a.aliases) == (
            b.shape, b.dtype, b.granule, b.fingerprint, b.aliases)  # fmt: skip


def test_copies_and_pickles_are_the_same_adapter():
    adapter = adapter_of()
    for other in (copy.copy(adapter), copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        same(adapter, other)
        with pytest.raises(TypeError, match="does not support item assignment"):
            other.weights["w"] = None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mask", [masks.Rand(density=0.1), masks.Rand(density=0.2, granule=8),
                                  masks.WeightMagnitude(density=0.05), masks.Struct(density=0.3)])  # fmt: skip
def test_round_trip(tmp_path, mask, dtype):
    adapter = adapter_of(mask, dtype)
    adapter.save(tmp_path / "a.safetensors")
    same(adapter, Adapter.load(tmp_path / "a.safetensors"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]  # no temporary left


def test_seeds_leave_the_indices_out(tmp_path):
    adapter = adapter_of()
    adapter.save(tmp_path / "code.safetensors")
    adapter.save(tmp_path / "seed.safetensors", seeds=True)
    same(adapter, Adapter.load(tmp_path / "seed.safetensors"))
    saved = (tmp_path / "code.safetensors").stat().st_size - (tmp_path / "seed.safetensors").stat().st_size
    assert saved >= adapter.nnz - 64


def test_whole_parameter_and_delta(tmp_path):
    head = torch.randn(3, 5)
    entry = Entry(torch.zeros(1, dtype=torch.int32), head.view(-1), (3, 5), torch.float32, granule=15)
    sparse = Entry(torch.tensor([1, 4]), torch.randn(2), (2, 3), torch.bfloat16)  # fp32 deltas on a bf16 weight
    adapter = Adapter({"head.weight": entry, "w": sparse}, delta=True)
    adapter.save(tmp_path / "a.safetensors")
    loaded = Adapter.load(tmp_path / "a.safetensors")
    assert loaded.weights["head.weight"].whole
    assert loaded.delta
    assert torch.equal(loaded.weights["head.weight"].values, head.view(-1))
    assert loaded.weights["w"].values.dtype == torch.float32


def test_size(tmp_path):
    indices = shira_ops.select_random(4096 * 1024, 41943, 1)
    values = torch.randn(41943).bfloat16()
    Adapter({"w": Entry(indices, values, (4096, 1024), torch.bfloat16)}).save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size / 41943 < 3.15


def test_reads_with_the_stock_library(tmp_path):
    from safetensors.torch import load_file

    adapter = adapter_of()
    adapter.save(tmp_path / "a.safetensors")
    stock = load_file(tmp_path / "a.safetensors")
    assert torch.equal(stock["0.weight.values"], adapter.weights["0.weight"].values)
    assert stock["0.weight.indices"].dtype == torch.uint8


@pytest.mark.parametrize("spaces", [1, 2, 4])
def test_tensors_at_any_address(tmp_path, spaces):
    """Other writers may not align them."""
    adapter, path = adapter_of(), tmp_path / "a.safetensors"
    adapter.save(path)
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    path.write_bytes(struct.pack("<Q", length + spaces) + raw[8 : 8 + length] + b" " * spaces + raw[8 + length :])
    for name, entry in Adapter.load(path).weights.items():
        assert entry.values.data_ptr() % entry.values.itemsize == 0
        assert torch.equal(entry.values, adapter.weights[name].values)
        assert torch.equal(entry.indices, adapter.weights[name].indices)


def rewritten(path, change):
    """The file with its JSON header changed by `change(header, weights, about)`."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    meta = header["__metadata__"]
    weights, about = json.loads(meta["shira.weights"]), json.loads(meta["shira.adapter"])
    body = bytearray(raw[8 + length :])
    change(header, weights, about, body)
    if "shira.weights" in meta:
        meta["shira.weights"] = json.dumps(weights)
    if "shira.adapter" in meta:
        meta["shira.adapter"] = json.dumps(about)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(body))
    return path


def weight(key, value):
    return lambda h, w, a, b: w["0.weight"].update({key: value})


def flip(h, w, a, b):
    start = h["0.weight.indices"]["data_offsets"][0]
    b[start + 16 : start + 400] = bytes([255]) * 384  # escapes: fewer gaps than the count says


def anchor(h, w, a, b):
    start = h["0.weight.indices"]["data_offsets"][0]
    b[start : start + 8] = (2**40).to_bytes(8, "little")


WRONG = {
    "version": (lambda h, w, a, b: h["__metadata__"].update({"shira.version": "2"}), "version '2' is not known"),
    "no version": (lambda h, w, a, b: h["__metadata__"].pop("shira.version"), "this is no SHiRA adapter"),
    "no weights": (lambda h, w, a, b: h["__metadata__"].pop("shira.weights"), "has no shira.weights"),
    "alpha": (lambda h, w, a, b: a.update(alpha="x"), "alpha must be a finite number"),
    "delta": (lambda h, w, a, b: a.update(delta=1), "delta must be true or false"),
    "small shape": (weight("shape", [32, 64]), "do not decode"),
    "tiny shape": (weight("shape", [4, 4]), "count must be at most its 16 granules"),
    "negative shape": (weight("shape", [-64, -64]), "0.weight"),
    "huge shape": (weight("shape", [2**40, 2**40]), "0.weight"),
    "dtype": (weight("dtype", "float32"), "0.weight"),
    "unknown dtype": (weight("dtype", "object"), "dtype"),
    "granule": (weight("granule", 3), "granule"),
    "granule 0": (weight("granule", 0), "granule"),
    "count": (weight("count", 12), "0.weight"),
    "absurd count": (weight("count", 2**62), "0.weight"),
    "bool count": (weight("count", True), "count must be a whole number"),
    "kind": (weight("indices", "pickle"), "indices must be code, seed or whole"),
    "seed null": (weight("indices", "seed"), "."),
    "alias": (weight("aliases", ["1.weight"]), "alias"),
    "missing weight": (lambda h, w, a, b: w.pop("0.weight"), "belong to no weight"),
    "extra weight": (lambda h, w, a, b: w.update({"2.weight": w["0.weight"]}), "2.weight"),
    "gaps": (flip, "do not decode"),
    "out of range": (anchor, "do not decode"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_files_are_refused(tmp_path, what):
    change, says = WRONG[what]
    path = tmp_path / "wrong.safetensors"
    adapter_of(masks.WeightMagnitude(density=0.1)).save(path)
    with pytest.raises(AdapterError, match=says) as error:
        Adapter.load(rewritten(path, change))
    assert "wrong.safetensors" in str(error.value)


def test_truncated_at_every_kind_of_place(tmp_path):
    path = tmp_path / "a.safetensors"
    adapter_of().save(path)
    raw = path.read_bytes()
    for cut in (0, 4, 8, 100, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:cut])
        with pytest.raises(AdapterError, match=r"a\.safetensors"):
            Adapter.load(path)


def test_other_things_are_refused(tmp_path):
    with pytest.raises(AdapterError, match="folder"):
        Adapter.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Adapter.load(tmp_path / "nothing.safetensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle.safetensors")
    with pytest.raises(AdapterError, match="no whole safetensors file"):
        Adapter.load(tmp_path / "pickle.safetensors")


def test_adapters_that_contradict_themselves():
    values = torch.zeros(2)
    cases = [
        (Entry(torch.tensor([0, 1]), torch.zeros(3), (4,), torch.float32), "values must have 2 entries"),
        (Entry(torch.tensor([0.0, 1.0]), values, (4,), torch.float32), "int32 or int64"),
        (Entry(torch.tensor([0, 1]), values, (4,), torch.float16, granule=3), "granule must divide"),
        (Entry(torch.tensor([0, 1]), values.half(), (4,), torch.float32), "values must have the weight's dtype"),
    ]
    for entry, says in cases:
        with pytest.raises(AdapterError, match=says):
            Adapter({"w": entry})
    with pytest.raises(AdapterError, match="alpha must be finite"):
        Adapter({}, alpha=float("nan"))


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    adapter_of().save(path)
    before = path.read_bytes()
    bad = Adapter({"w": Entry(torch.tensor([3, 1]), torch.zeros(2), (4,), torch.float32)})
    with pytest.raises(AdapterError, match="strictly increasing"):
        bad.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# Sizes: bytes an entry of the whole file.

LAYER = 2048


def size_of(path, density, granule=1, seeds=False, layers=4):
    weights = {}
    for number in range(layers):
        seed = masks.Rand(density, granule=granule).seed_for(f"layers.{number}")
        numel = LAYER * LAYER
        count = round(density * numel / granule)
        indices = shira_ops.select_random(numel, count, seed - 2**64 if seed >= 2**63 else seed, granule=granule)
        values = torch.zeros(count * granule, dtype=torch.bfloat16)
        name = f"model.layers.{number}.self_attn.q_proj.weight"
        weights[name] = Entry(indices, values, (LAYER, LAYER), torch.bfloat16, granule, 2**64 - 1, seed)
    adapter = Adapter(weights, mask=masks.Rand(density, granule=granule).describe())
    adapter.save(path, seeds=seeds)
    return path.stat().st_size / adapter.nnz


@pytest.mark.parametrize(
    ("density", "granule", "seeds", "most"),
    [(0.01, 1, False, 3.1), (0.02, 1, False, 3.05), (0.01, 1, True, 2.02), (0.01, 16, False, 2.2)],
)
def test_sizes(tmp_path, density, granule, seeds, most):
    assert size_of(tmp_path / "a.safetensors", density, granule, seeds) <= most


def test_saving_says_the_same_bytes(tmp_path):
    adapter = adapter_of()
    adapter.save(tmp_path / "a.safetensors")
    adapter.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_saving_over_the_file_it_was_read_from(tmp_path):
    path = tmp_path / "a.safetensors"
    adapter = adapter_of()
    adapter.save(path)
    loaded = Adapter.load(path)  # its values are the mapped file
    loaded.save(path)
    same(adapter, Adapter.load(path))


# Deltas and fused adapters


def base_and_adapter(dtype, granule=1, seed=0):
    torch.manual_seed(seed)
    base = {"w": torch.randn(32, 48).to(dtype), "b": torch.randn(48).to(dtype)}
    indices = shira_ops.select_random(32 * 48, 60, seed, granule=granule)
    fingerprints = {name: int(shira_ops.fingerprint(weight)) & (2**64 - 1) for name, weight in base.items()}
    entries = {
        "w": Entry(indices, torch.randn(60 * granule).to(dtype), (32, 48), dtype, granule, fingerprints["w"]),
        "b": Entry(torch.zeros(1, dtype=torch.int32), torch.randn(48).to(dtype), (48,), dtype, 48, fingerprints["b"]),
    }
    return base, Adapter(entries)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_to_delta(tmp_path, dtype):
    base, adapter = base_and_adapter(dtype, granule=2)
    delta = adapter.to_delta(base)
    assert delta.delta
    for name, entry in delta.weights.items():
        one, two = base[name].clone(), base[name].clone()
        old = adapter.weights[name]
        assert entry.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        kept = torch.empty_like(old.values)
        shira_ops.apply_(one, entry.indices, entry.values, kept, delta=True, granule=entry.granule)
        shira_ops.scatter_(two, old.indices, old.values, granule=old.granule)
        # In fp32 the difference has all the digits of narrow ones; wide ones round it once.
        close = {torch.float32: 1e-6, torch.float64: 1e-15}.get(dtype, 0)
        torch.testing.assert_close(one, two, rtol=close, atol=close)
    assert delta.to_delta(base) is delta
    delta.save(tmp_path / "delta.safetensors")
    same(delta, Adapter.load(tmp_path / "delta.safetensors"))
    with pytest.raises(AdapterError, match=r"'w' has other content \(by fingerprint\)"):
        adapter.to_delta({**base, "w": base["w"] + 1})
    with pytest.raises(AdapterError, match="'b' is not in the base"):
        adapter.to_delta({"w": base["w"]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_as_the_switcher_fuses(dtype):
    torch.manual_seed(3)
    model = nn.Module()
    base, one = base_and_adapter(dtype, granule=4)
    model.w, model.b = nn.Parameter(base["w"].clone()), nn.Parameter(base["b"].clone())
    two = base_and_adapter(dtype, granule=2)[1].to_delta(base)
    indices = shira_ops.select_random(32 * 48, 100, 9)
    three = Adapter({"w": Entry(indices, torch.randn(100).to(dtype), (32, 48), dtype)}, alpha=0.25)
    strengths = {"one": 0.7, "two": -0.5, "three": 1.0}
    switcher = Switcher(model)
    for name, adapter in (("one", one), ("two", two), ("three", three)):
        switcher.add(name, adapter)
    switcher.activate(strengths)
    fused = Adapter.fuse([(one, 0.7), (two, -0.5), (three, 1.0)], base)
    assert fused.weights["w"].granule == 1
    assert fused.weights["b"].whole
    for name, entry in fused.weights.items():
        weight = base[name].clone()
        shira_ops.scatter_(weight, entry.indices, entry.values, granule=entry.granule)
        assert torch.equal(weight, model.get_parameter(name).detach())
        assert entry.fingerprint == int(shira_ops.fingerprint(base[name])) & (2**64 - 1)


def test_whatever_torchs_default_device_and_dtype_are(tmp_path):
    """What the library makes for itself it makes where, and of what, it needs it."""
    torch.manual_seed(0)
    x = torch.randn(4, 16)

    def everything():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Linear(16, 16, device="cpu", dtype=torch.float32), nn.Linear(16, 4, device="cpu", dtype=torch.float32)
        )
        base = copy.deepcopy(model)
        adapters = []
        for mask in (masks.Rand(density=0.2), masks.Struct(density=0.4), masks.WeightMagnitude(density=0.2)):
            with SparseTuner(model, mask, "0", whole=r"1\.weight") as tuner:
                model(x).square().sum().backward()
                shira.AdamW(tuner, lr=0.1).step()
                adapters.append(tuner.adapter())
        one, two = adapters[:2]
        one.save(tmp_path / "one.safetensors")
        loaded = Adapter.load(tmp_path / "one.safetensors")
        switcher = shira.Switcher(model)
        for name, adapter in (("one", loaded), ("two", two)):
            switcher.add(name, adapter)
        switcher.activate({"one": 0.5, "two": 0.5})
        mixed = [p.detach().clone() for p in model.parameters()]
        made = Adapter.from_difference(base, model)
        switcher.deactivate()
        found = shira.metrics.matrix({"one": loaded, "two": two}, "awor", base)
        found = [found, shira.metrics.matrix({"one": loaded, "two": two}, "awom", base)]
        entries = made.to_delta(base).weights.values()
        return [*mixed, *found, *(t for entry in entries for t in (entry.indices, entry.values))]

    expected, before = everything(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            given = everything()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(given, expected, strict=True))
