"""Adapter and its file: round trips, and every kind of wrong file refused with a sentence."""

import copy
import errno
import io
import json
import os
import pickle
import struct
import subprocess
import sys
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import shira
import shira_ops
from shira import Adapter, AdapterError, Entry, SparseTuner, Switcher, masks
from shira.adapter import _file
from shira.adapter._checkpoint import map_file


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


def test_an_adapter_prints_in_a_line_and_its_entries_do():
    """Their tensors have thousands of numbers."""
    entry = Entry(torch.tensor([1, 3]), torch.zeros(8), (4, 8), torch.float32, granule=4)
    whole = Entry(torch.tensor([0]), torch.zeros(4).bfloat16(), (4,), torch.bfloat16, granule=4)
    adapter = Adapter({"w": entry, "b": whole})
    assert repr(adapter) == "Adapter(2 weights, 12 entries (33.33%), alpha 1, 64 bytes)"
    assert repr(dict(adapter.weights)) == (
        "{'w': Entry(shape [4, 8], float32, 8 entries, granule 4), 'b': Entry(shape [4], bfloat16, 4 entries, whole)}"
    )


@pytest.mark.parametrize("by", ["pickle", "deepcopy", "torch.save", "multiprocessing"])
def test_a_copy_has_its_values_alone(tmp_path, by):
    """Not the file they are mapped from, nor, once per weight, the memory they are a part of."""
    numel, layers = 4096, 20
    memory = torch.randn(layers * numel)
    indices = torch.arange(0, 2 * numel, 2)
    entries = {
        f"{i}.weight": Entry(indices, memory[i * numel : (i + 1) * numel], (2 * numel,), torch.float32)
        for i in range(layers)
    }
    views = Adapter(entries)
    views.save(tmp_path / "a.safetensors")
    for adapter in (views, Adapter.load(tmp_path / "a.safetensors")):
        if by == "deepcopy":
            copied = copy.deepcopy(adapter)
            size = sum(entry.values.untyped_storage().nbytes() for entry in copied.weights.values())
            size += sum(entry.indices.untyped_storage().nbytes() for entry in copied.weights.values())
        elif by == "torch.save":
            torch.save(adapter, stream := io.BytesIO())
            size = stream.tell()
            copied = torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
        else:
            data = bytes(pickle.dumps(adapter) if by == "pickle" else ForkingPickler.dumps(adapter))
            copied, size = pickle.loads(data), len(data)
        assert size < 1.1 * adapter.nbytes
        same(adapter, copied)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mask", [masks.Rand(density=0.1), masks.Rand(density=0.2, granule=8),
                                  masks.WeightMagnitude(density=0.05), masks.Struct(density=0.3)])  # fmt: skip
def test_round_trip(tmp_path, mask, dtype):
    adapter = adapter_of(mask, dtype)
    adapter.save(tmp_path / "a.safetensors")
    same(adapter, Adapter.load(tmp_path / "a.safetensors"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]  # no temporary file is left


def test_seeds_leave_the_indices_out(tmp_path):
    adapter = adapter_of()
    adapter.save(tmp_path / "code.safetensors", version=1)
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
    """Other writers may leave them unaligned."""
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
    "version": (lambda h, w, a, b: h["__metadata__"].update({"shira.version": "3"}), "version '3' is not known"),
    "no version": (lambda h, w, a, b: h["__metadata__"].pop("shira.version"), "this is not a SHiRA adapter"),
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
    adapter_of(masks.WeightMagnitude(density=0.1)).save(path, version=1)
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
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
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
    with pytest.raises(AdapterError, match=r"alpha must be a finite number \(of float32\), got nan"):
        Adapter({}, alpha=float("nan"))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e39, True, "1", None, pytest.param(10**5000, id="int")])
def test_strengths_that_are_none(alpha):
    with pytest.raises(AdapterError, match=r"alpha must be a finite number \(of float32\), got .") as error:
        Adapter({}, alpha=alpha)
    assert len(str(error.value)) < 200


def nested(deep):
    return {"a": nested(deep - 1)} if deep else 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"loss": float("nan")}, "Out of range float values are not JSON compliant"),
        ({"a": [1, {"b": -float("inf")}]}, "Out of range float values are not JSON compliant"),
        ({"data": "\ud800"}, "surrogates not allowed"),
        ({"\udfff": 1}, "surrogates not allowed"),
        ({1: "one", "1": "uno"}, "'1' stands there twice"),
        ({"weight": torch.zeros(1)}, "Tensor is not JSON serializable"),
        ({"n": 10**5000}, "4300"),
        (nested(65), "nested at most 64 deep"),
        (nested(900), "."),
        ([1], r"a JSON object, got \[1\]"),
    ],
)
def test_what_no_file_can_say_is_refused_at_once(given, says):
    for key in ("provenance", "mask"):
        with pytest.raises(AdapterError, match=f"{key} must be .*{says}") as error:
            Adapter({}, **{key: given})
        assert len(str(error.value)) < 300


def test_what_is_said_is_as_it_comes_back(tmp_path):
    given = {"betas": (0.9, 0.999), 7: [True, None, 1.5], "text": "\N{SNOWMAN} \N{GRINNING FACE}", "deep": nested(62)}
    adapter = Adapter({}, provenance=given, mask={"shape": (1, 2)})
    given["betas"] = None
    adapter.save(tmp_path / "a.safetensors")
    loaded = Adapter.load(tmp_path / "a.safetensors")
    assert adapter.provenance == loaded.provenance
    assert loaded.provenance["betas"] == [0.9, 0.999]
    assert loaded.provenance["7"] == [True, None, 1.5]
    assert loaded.provenance["text"] == "\N{SNOWMAN} \N{GRINNING FACE}"
    assert adapter.mask == loaded.mask == {"shape": [1, 2]}


def test_names_that_no_file_can_hold():
    entry = Entry(torch.tensor([0]), torch.zeros(1), (4,), torch.float32)
    for name, says in (
        ("\ud800", r"weight '\\ud800': UTF-8 cannot write this name"),
        ("", "the name is empty"),
        (3, "the name of a weight must be text, got 3"),
        ("x" * 10**6 + "\ud800", r"\(1,000,001 characters\): UTF-8 cannot"),
    ):
        with pytest.raises(AdapterError, match=says) as error:
            Adapter({name: entry})
        assert len(str(error.value)) < 400
        with pytest.raises(AdapterError, match=says if name else "."):
            Adapter({"w": replace(entry, aliases=(name,))})


def test_long_names_make_no_long_messages():
    entry = Entry(torch.tensor([3, 1]), torch.zeros(2), (4,), torch.float32)
    names = [str(number) + "x" * 10**6 for number in range(9)]
    adapter = Adapter(dict.fromkeys(names, entry))
    for call, says in (
        (lambda: adapter.to_delta({}), r"'0xx.*\.\.\..*; '4x.* \(9 problems in all\)"),
        (lambda: Adapter.fuse([(adapter, 1.0)], {name: torch.zeros(4) for name in names}), "strictly increasing"),
        (lambda: Adapter({names[0]: replace(entry, granule=3)}), "granule must divide"),
        (lambda: Adapter({names[0]: entry, "b": replace(entry, aliases=(names[0],))}), "is also a name of"),
    ):
        with pytest.raises(AdapterError, match=says) as error:
            call()
        assert len(str(error.value)) < 2500


def test_values_that_are_not_finite_are_named():
    nan, inf = float("nan"), float("inf")
    good = Entry(torch.arange(4), torch.tensor([1, -0.0, 3e38, 1e-45]), (9,), torch.float32)
    wholes = Entry(torch.arange(4), torch.arange(4), (9,), torch.int64)
    Adapter(
        {"good": good, "wholes": wholes, "none": Entry(good.indices[:0], good.values[:0], (9,), torch.float32)}
    ).check_finite()
    for values, dtype, says in (
        (
            torch.tensor([nan, 1, inf, -inf]),
            torch.float32,
            r"3 of its 4 values are not finite \(1 NaN and 2 infinite\)",
        ),
        (torch.tensor([1, 2, 3, inf]), torch.float16, r"1 of its 4 values are not finite \(1 infinite\)"),
        (torch.tensor([1, nan, nan, 3]), torch.float8_e4m3fn, r"2 of its 4 values are not finite \(2 NaN\)"),
        (torch.tensor([1, inf, nan, 3]), torch.float8_e5m2, r"2 of its 4 .* \(1 NaN and 1 infinite\)"),
    ):
        bad = Entry(torch.arange(4), values.to(dtype), (9,), dtype)
        with pytest.raises(AdapterError, match=rf"^weight 'bad': {says}; check_finite=False \(--allow"):
            Adapter({"good": good, "bad": bad}).check_finite()
        with pytest.raises(AdapterError, match=f"^merge: {says}"):
            bad.check_finite("merge")


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    adapter_of().save(path)
    before = path.read_bytes()
    bad = Adapter({"w": Entry(torch.tensor([3, 1]), torch.zeros(2), (4,), torch.float32)})
    with pytest.raises(AdapterError, match="strictly increasing"):
        bad.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# Sizes: bytes per entry, of the whole file.

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
    with pytest.raises(AdapterError, match=r"another base: .* 1 of 2 weights differs \(by fingerprint\): 'w'"):
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


def test_fusing_with_a_whole_head_where_the_base_s_is_another():
    """As the Switcher does: at strength 1 it replaces whatever is there, if nothing else changes it."""
    torch.manual_seed(4)
    model = nn.Linear(3, 2)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    head = Entry(torch.zeros(1, dtype=torch.int32), torch.randn(6), (2, 3), torch.float32, 6, fingerprint=8)
    bias = Entry(torch.tensor([1], dtype=torch.int32), torch.randn(1), (2,), torch.float32)
    fresh, other = Adapter({"weight": head, "bias": bias}), Adapter({"bias": bias})
    switcher = Switcher(model)
    switcher.add("fresh", fresh)
    switcher.add("other", other)
    for strengths in ((1.0, 0.5), (0.0, 0.5)):
        switcher.activate(dict(zip(("fresh", "other"), strengths, strict=True)))
        fused = Adapter.fuse(zip((fresh, other), strengths, strict=True), base)
        for name, entry in fused.weights.items():
            weight = base[name].clone()
            shira_ops.scatter_(weight, entry.indices, entry.values, granule=entry.granule)
            assert torch.equal(weight, model.get_parameter(name).detach())
            assert entry.fingerprint == int(shira_ops.fingerprint(base[name])) & (2**64 - 1)
    with pytest.raises(AdapterError, match=r"another base: the content of 1 of 1 weights differs .*'weight'"):
        Adapter.fuse([(fresh, 0.5)], base)
    with pytest.raises(
        AdapterError, match=r"fuse: an adapter replaces 'weight' as a whole, .* cannot be summed with an"
    ):
        Adapter.fuse([(fresh, 1.0), (Adapter({"weight": replace(head, fingerprint=None)}), 0.5)], base)
    with pytest.raises(AdapterError, match="another base"):
        Adapter.fuse([(Adapter(fresh.weights, delta=True), 1.0)], base)


@pytest.mark.parametrize("delta", [False, True])
def test_fusing_keeps_the_digits_of_float64(delta):
    """Also beside an adapter whose values are float32."""
    base = {"w": torch.zeros(8, dtype=torch.float64)}
    fine = torch.tensor([1 / 3, 1e-9 + 1], dtype=torch.float64)
    one = Adapter({"w": Entry(torch.tensor([1, 2]), fine, (8,), torch.float64)}, delta=delta)
    two = Adapter({"w": Entry(torch.tensor([3]), torch.tensor([0.5]), (8,), torch.float64)}, delta=True)
    entry = Adapter.fuse([(one, 1.0), (two, 1.0)], base).weights["w"]
    assert entry.indices.tolist() == [1, 2, 3]
    assert torch.equal(entry.values, torch.cat([fine, torch.tensor([0.5], dtype=torch.float64)]))


def test_fusing_adapters_that_know_a_tied_weight_by_different_names() -> None:
    """One weight of a base that ties it; of copies, the adapters do not agree on what they are."""
    model = torch.nn.ModuleDict({"e": torch.nn.Linear(4, 2, bias=False), "h": torch.nn.Linear(4, 2, bias=False)})
    model["h"].weight = model["e"].weight
    base = model["e"].weight.detach().clone()

    def adapter(name: str, at: int, *aliases: str) -> Adapter:
        entry = Entry(torch.tensor([at], dtype=torch.int32), torch.tensor([9.0]), (2, 4), torch.float32)
        return Adapter({name: replace(entry, aliases=aliases)})

    for one in (adapter("e.weight", 1), adapter("e.weight", 1, "h.weight")):
        pairs = [(one, 1.0), (adapter("h.weight", 5), 1.0)]
        fused = Adapter.fuse(pairs, model)
        assert list(fused.weights) == ["e.weight"]
        entry = fused.weights["e.weight"]
        assert (entry.indices.tolist(), entry.values.tolist(), entry.aliases) == ([1, 5], [9, 9], ("h.weight",))
    with pytest.raises(AdapterError, match=r"are one \(tied\) weight in one adapter and two in another"):
        Adapter.fuse(pairs, {"e.weight": base, "h.weight": base.clone()})


def test_fusing_refuses_what_is_not_finite():
    base, adapter = base_and_adapter(torch.float16)
    for strength in (float("nan"), 1e39):
        with pytest.raises(AdapterError, match="fuse: the strength of adapter 2 must be a finite number"):
            Adapter.fuse([(adapter, 1.0), (adapter, strength)], base)
    values = adapter.weights["w"].values.clone()
    values[5] = float("nan")
    bad = Adapter({**adapter.weights, "w": replace(adapter.weights["w"], values=values)})
    with pytest.raises(AdapterError, match=r"fuse: weight 'w' of adapter 2: 1 of its 60 values are not .* \(1 NaN\)"):
        Adapter.fuse([(adapter, 0.5), (bad, 0.5)], base)
    assert Adapter.fuse([(bad, 1.0)], base, check_finite=False).weights["w"].values.isnan().sum() == 1
    with pytest.raises(AdapterError, match=r"fuse: weight '.', fused: .* infinite\)"):
        Adapter.fuse([(adapter, 1e6)], base)


# Other dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("given", ["module", "state dict", "path"])
def test_cast_adapters_give_the_cast_model(tmp_path, dtype, given):
    from safetensors.torch import save_file

    model = model_of(torch.float32)
    with SparseTuner(model, masks.Rand(density=0.1)) as tuner:
        with torch.no_grad():
            for values in tuner.parameters():
                values.add_(torch.randn_like(values))
        tuner.sync()
        tuned = {name: model.get_parameter(name).detach().to(dtype) for name in ("0.weight", "1.weight")}
        adapter = tuner.adapter(provenance={"steps": 3})
    model.to(dtype)
    save_file(dict(model.state_dict()), tmp_path / "base.safetensors")
    base = {"module": model, "state dict": model.state_dict(), "path": tmp_path / "base.safetensors"}[given]
    cast = adapter.to(dtype, base)
    name = str(dtype).removeprefix("torch.")
    assert cast.provenance == {
        "steps": 3, "casts": [{"from": ["float32"], "to": [name], "fingerprints": "new"}]}  # fmt: skip
    cast.save(tmp_path / "a.safetensors")
    switcher = Switcher(model)
    with pytest.raises(AdapterError, match=f"float32, got {name}"):
        switcher.add("before", adapter)
    switcher.add("style", tmp_path / "a.safetensors")
    switcher.activate("style")
    for key, expected in tuned.items():
        assert torch.equal(model.get_parameter(key).detach(), expected)
    switcher.deactivate()
    again = cast.to(torch.float32)
    assert again.provenance["casts"][1] == {"from": [name], "to": ["float32"], "fingerprints": "dropped"}
    assert all(entry.fingerprint is None for entry in again.weights.values())
    assert all(entry.values.dtype == entry.dtype == torch.float32 for entry in again.weights.values())
    assert cast.to(None, base).provenance == cast.provenance  # each weight's own: nothing to cast


def test_casting_deltas_wholes_and_what_cannot_be_cast():
    entries = {
        "w": Entry(torch.tensor([1, 4]), torch.tensor([1 + 2**-20, 3.0]), (6,), torch.float32, fingerprint=7),
        "steps": Entry(torch.tensor([1]), torch.tensor([5]), (2,), torch.int64, fingerprint=8),
    }
    delta = Adapter(entries, delta=True).to(torch.bfloat16)
    assert delta.delta
    assert delta.weights["w"].dtype == torch.bfloat16
    assert torch.equal(delta.weights["w"].values, entries["w"].values)  # float32 still
    assert delta.weights["steps"] is entries["steps"]
    fine = Entry(torch.tensor([1]), torch.tensor([1 / 3], dtype=torch.float64), (6,), torch.float64)
    assert Adapter({"w": fine}, delta=True).to(torch.float16).weights["w"].values.dtype == torch.float32
    base = {"w": torch.zeros(6), "steps": torch.tensor([1, 2])}
    half = Entry(torch.tensor([1]), torch.tensor([1e6]), (6,), torch.float32)
    float8 = Entry(torch.tensor([1]), torch.tensor([1.0]).to(torch.float8_e5m2), (6,), torch.float8_e5m2)
    for call, says in (
        (lambda: Adapter({"w": half}).to(torch.float16), "to: weight 'w': 1 of its values are beyond float16"),
        (lambda: Adapter({"w": float8}).to(torch.float16), "to: weight 'w': float8_e5m2 entries depend on scales"),
        (lambda: Adapter(entries).to(torch.int8), "to: dtype must be one of float16, .* got torch.int8"),
        (lambda: Adapter(entries).to("bfloat16"), "to: dtype must be one of float16, .* got 'bfloat16'"),
        (lambda: Adapter(entries).to(None), "to: give a dtype, or a base"),
        (lambda: Adapter(entries).to(torch.float16, base), "fit this base: 'w' must have dtype float16, got float32"),
        (
            lambda: Adapter(entries).to(torch.float16, {"w": base["w"].half(), "steps": base["steps"]}),
            r"the content of 1 of 1 weights differs \(by fingerprint\): 'steps'",
        ),
        (
            lambda: Adapter(entries).to(torch.float16, {"w": torch.zeros(5).half()}),
            r"'w' must have shape \[6\], got \[5\]",
        ),
    ):
        with pytest.raises(AdapterError, match=says):
            call()


def test_each_weight_in_the_dtype_of_the_base():
    entry = Entry(torch.tensor([1]), torch.tensor([1 / 3]), (6,), torch.float32, fingerprint=7)
    base = {"norm": torch.ones(6), "w": torch.ones(6).bfloat16()}
    printed = {name: int(shira_ops.fingerprint(weight)) & (2**64 - 1) for name, weight in base.items()}
    cast = Adapter({"norm": replace(entry, fingerprint=printed["norm"]), "w": entry}).to(None, base)
    assert {name: (one.dtype, one.fingerprint) for name, one in cast.weights.items()} == {
        "norm": (torch.float32, printed["norm"]), "w": (torch.bfloat16, printed["w"])}  # fmt: skip


def test_a_new_head_needs_nothing_of_the_base():
    entry = Entry(torch.tensor([1]), torch.tensor([1 / 3]), (6,), torch.float32, fingerprint=7)
    head = Entry(torch.zeros(1, dtype=torch.int32), torch.full((6,), 1 / 3), (6,), torch.float32, 6, fingerprint=8)
    adapter = Adapter({"w": entry, "head": head})
    base = {"w": torch.ones(6).half()}
    cast = adapter.to(torch.float16, base)
    assert cast.weights["head"].fingerprint is None
    assert torch.equal(cast.weights["head"].values, torch.full((6,), 1 / 3).half())
    other = torch.randn(6).half()
    assert cast.to(torch.float16, {**base, "head": other}).weights["head"].fingerprint == (
        int(shira_ops.fingerprint(other)) & (2**64 - 1)
    )
    with pytest.raises(AdapterError, match="'w' is not in the base"):
        adapter.to(torch.float16, {"head": other})
    with pytest.raises(AdapterError, match="'head' must have dtype float16, got float32"):
        adapter.to(torch.float16, {**base, "head": other.float()})
    with pytest.raises(AdapterError, match="'head' is not in the base"):
        Adapter(adapter.weights, delta=True).to(torch.float16, base)


# Files as they are opened and mapped


def test_a_file_replaced_while_it_is_read(tmp_path, monkeypatch):
    """What was opened is what is read: never the header of one file with the values of another."""
    path, other = tmp_path / "a.safetensors", tmp_path / "other.safetensors"
    adapter = adapter_of()
    adapter.save(path)
    Adapter({"x": Entry(torch.arange(9), torch.ones(9), (9,), torch.float32)}).save(other)
    read = _file._header

    def replaced(*arguments):
        os.replace(other, path)
        return read(*arguments)

    monkeypatch.setattr(_file, "_header", replaced)
    same(adapter, Adapter.load(path))
    monkeypatch.undo()
    assert list(Adapter.load(path).weights) == ["x"]


def test_a_file_cut_while_it_is_opened(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    adapter_of().save(path)
    read = _file._header

    def cut(*arguments):
        os.truncate(path, path.stat().st_size // 2)
        return read(*arguments)

    monkeypatch.setattr(_file, "_header", cut)
    with pytest.raises(AdapterError, match=r"a\.safetensors: the file was shortened while it was read"):
        Adapter.load(path)


def test_writing_to_loaded_values_reaches_no_file(tmp_path):
    path = tmp_path / "a.safetensors"
    adapter_of().save(path)
    before = path.read_bytes()
    loaded = Adapter.load(path)
    for entry in loaded.weights.values():
        entry.values.zero_()
    assert path.read_bytes() == before
    assert all((entry.values == 0).all() for entry in loaded.weights.values())
    same(adapter_of(), Adapter.load(path))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loaded_adapters_hold_no_descriptors_and_go_with_their_values(tmp_path):
    path = tmp_path / "a.safetensors"
    adapter_of().save(path)

    def maps():
        return Path("/proc/self/maps").read_text().count(str(path))

    before = len(os.listdir("/proc/self/fd"))
    loaded = [Adapter.load(path) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert maps() == 5
    values = loaded[0].weights["0.weight"].values[3:]
    expected = values.clone()
    del loaded
    assert maps() == 1
    assert torch.equal(values, expected)
    del values
    assert maps() == 0


def sparse_file(path, size):
    """A safetensors file of one tensor of zeros that takes no room on the disk."""
    text = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + size)


def test_a_checkpoint_larger_than_memory(tmp_path):
    path = tmp_path / "base.safetensors"
    size = 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sparse_file(path, size)
    stored = map_file(str(path)).tensors["a"]
    assert stored.nbytes == size
    tensor = stored.tensor()
    assert tensor[-3:].tolist() == [0, 0, 0]
    tensor[-1] = 1  # on a page of its own
    assert stored.tensor()[-1] == 1
    path.unlink()


LIMITED = """
import ctypes, mmap, resource, sys
import numpy
from shira.adapter import _file
resource.setrlimit(resource.RLIMIT_DATA, (512 << 20,) * 2)
with _file.opened(sys.argv[1]) as file:
    assert file.map(unchanged=True)[-1] == 0
    try:
        file.map()
    except OSError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own memory")
def test_a_system_that_sets_memory_aside(tmp_path):
    path = tmp_path / "base.safetensors"
    sparse_file(path, 1 << 30)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, env=environment)
    size = f"{path.stat().st_size:,}"
    assert done.stdout == f"[Errno 12] mapping its {size} bytes failed: Cannot allocate memory: {str(path)!r}\n", done


def test_arrays_mapped_for_reading_alone(tmp_path):
    """torch takes them without a warning (warnings are errors here)."""
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)) * 100)
    with open(path, "rb") as file:
        array = np.asarray(_file._Mapping(file.fileno(), 25600, writable=False))
    tensor = torch.from_numpy(array[256:])
    assert torch.equal(tensor, torch.arange(256, dtype=torch.uint8).repeat(99))


# Files as they are written


def leftover(folder, name, process, ending="tmp", old=True):
    path = folder / f".{name}.{process}.0123abcd.{ending}"
    if ending == "old":
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"1")
    else:
        path.write_bytes(b"1")
    if old:
        os.utime(path, (1, 1))
    return path


def test_what_killed_runs_left_is_cleaned(tmp_path):
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    path = tmp_path / "a.safetensors"
    ours = [leftover(tmp_path, path.name, gone.pid), leftover(tmp_path, path.name, gone.pid, "old")]
    others = [
        leftover(tmp_path, "b.safetensors", gone.pid),
        leftover(tmp_path, path.name, os.getpid()),  # runs
        leftover(tmp_path, "xa.safetensors", gone.pid),
    ]
    stranger = tmp_path / f".{path.name}.notes.tmp"
    stranger.write_bytes(b"1")
    adapter_of().save(path)
    assert [one.exists() for one in ours] == [False, True]  # the .old might have been all there was
    adapter_of().save(path)
    assert not ours[1].exists()
    assert all(one.exists() for one in (*others, stranger))
    fresh = leftover(tmp_path, path.name, gone.pid, old=False)
    adapter_of().save(path)
    assert fresh.exists()  # a process of another machine may be at it


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch, code):
    """Network shares cannot sync; the file is in its place by then. A broken disk is a different matter."""
    sync, synced = os.fsync, []

    def failing(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        synced.append(descriptor)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    adapter = adapter_of()
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            adapter.save(tmp_path / "a.safetensors")
    else:
        adapter.save(tmp_path / "a.safetensors")
    assert len(synced) == 1
    same(adapter, Adapter.load(tmp_path / "a.safetensors"))
    assert [one.name for one in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_file, "write_safetensors", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.safetensors'"):
        adapter_of().save(tmp_path / "a.safetensors")


def test_devices_and_folders_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, says in (("pipe", "pipe: this is a pipe or a device"), ("folder", "folder: this is a folder")):
        with pytest.raises(AdapterError, match=says):
            adapter_of().save(tmp_path / name)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["folder", "pipe"]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    link, file = tmp_path / "latest.safetensors", tmp_path / "there" / "a.safetensors"
    link.symlink_to(file)
    for alpha in (0.5, 0.25):  # first to nothing, then to a file
        Adapter({}, alpha=alpha).save(link)
        assert link.is_symlink()
        assert Adapter.load(file).alpha == alpha
    assert [one.name for one in (tmp_path / "there").iterdir()] == ["a.safetensors"]


def test_whatever_torchs_default_device_and_dtype_are(tmp_path):
    """Tensors of the library's own get the device and dtype that it needs, whatever the defaults are."""
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
