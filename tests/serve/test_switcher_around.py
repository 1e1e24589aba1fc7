"""Switcher: what users, other libraries and other processes do around it is done right, or refused in one sentence."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shira_ops
from shira import Adapter, AdapterError, Entry, SparseTuner, Switcher, SwitchError, _live, _model, masks
from shira.serve import _shelf
from shira.sync import Publisher, Receiver, SyncError
from switcher_walk import adapter_of, bits, differing, model_of, restore


def print_of(weight: Tensor) -> int:
    return int(shira_ops.fingerprint(weight.detach())) % 2**64


def entry_of(weight: Tensor, indices: list[int], values: Any, granule: int = 1, **fields: Any) -> Entry:
    """Overwriting entries for a weight as it is now."""
    numbers = torch.as_tensor(values, dtype=fields.pop("values_dtype", weight.dtype)).flatten()
    rows = torch.tensor(indices, dtype=torch.int32)
    given = {"fingerprint": print_of(weight), **fields}
    return Entry(rows, numbers, tuple(weight.shape), weight.dtype, granule, **given)


def linear(rows: int = 4, columns: int = 4, dtype: torch.dtype = torch.float32) -> nn.Linear:
    module = nn.Linear(columns, rows, bias=False, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(torch.arange(rows * columns).view(rows, columns))
    return module


def one_of(model: nn.Module, name: str = "weight", value: float = 100, **fields: Any) -> Adapter:
    """The first entry of a weight becomes a value."""
    return Adapter({name: entry_of(model.get_parameter(name), [0], [value], **fields)})


# ---- the weights under a switch ------------------------------------------------------------------------------


def test_a_cast_that_autocast_keeps_is_not_used_after_a_switch() -> None:
    model, x = linear(), torch.ones(1, 4)
    one = Switcher(model)
    one.add("a", one_of(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.weight.requires_grad
        assert model(x)[0, 0] == 6  # 0 + 1 + 2 + 3
        one.activate("a")
        assert model(x)[0, 0] == 106
        one.activate("a", 0.5)
        assert model(x)[0, 0] == 56
        with one.disabled():
            assert model(x)[0, 0] == 6
        assert model(x)[0, 0] == 56
        model.weight.data = model.weight.data.clone()
        one.deactivate(verify=False)
        assert model(x)[0, 0] == 6


def test_what_is_active_already_is_looked_at_all_the_same() -> None:
    model = model_of(torch.bfloat16)
    one, base = Switcher(model), copy.deepcopy(model.state_dict())
    one.add("a", adapter_of(model, "a"))
    one.activate("a")
    wanted = bits(model)
    one.activate("a")
    model.load_state_dict(base)
    for call in (lambda: one.activate("a"), lambda: one.using("a").__enter__()):
        with pytest.raises(SwitchError, match=r"0\.weight was changed by someone else .* active is 'a' at 1"):
            call()
    assert one._blocks == []
    one.deactivate(verify=False)
    one.activate("a")
    assert differing(bits(model), wanted) == 0
    with pytest.raises(SwitchError, match="changed by someone else"), one.using("a"):
        model.load_state_dict(base)
    one.deactivate(verify=False)
    one.verify(full=True)


def test_overlapping_weights_are_refused() -> None:
    """A fused projection, and its parts as parameters of their own."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Parameter(torch.arange(12.0).view(6, 2))
            self.q, self.k = nn.Parameter(self.qkv.data[:2]), nn.Parameter(self.qkv.data[2:4])

    model = Fused()
    both = Adapter({name: entry_of(model.get_parameter(name), [1], [9]) for name in ("qkv", "k")})
    says = r"qkv and k are different weights in overlapping memory"
    with pytest.raises(AdapterError, match=says):
        Switcher(model).add("both", both)
    one = Switcher(model)
    one.add("qkv", one_of(model, "qkv"))
    with pytest.raises(AdapterError, match=says):
        one.add("k", one_of(model, "k"))
    another = Switcher(model)
    with pytest.raises(AdapterError, match=says):
        another.add("k", one_of(model, "k"))
    one.remove("qkv")
    another.add("k", one_of(model, "k"))
    another.add("q", one_of(model, "q"))  # side by side
    another.activate({"k": 1.0, "q": 1.0})
    assert model.qkv.flatten().tolist() == [100, 1, 2, 3, 100, *range(5, 12)]
    another.deactivate()
    with pytest.raises(ValueError, match="q and qkv are different weights in overlapping memory"):
        SparseTuner(model, masks.Rand(density=0.5, granule=1), ["qkv", "q"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what memory may be written to")
def test_memory_that_may_only_be_read_is_refused(tmp_path: Path) -> None:
    """A write there would end the process."""
    model = linear()
    base, adapter = bits(model), one_of(model, "weight")
    np.save(tmp_path / "w.npy", model.weight.detach().numpy())
    before = (tmp_path / "w.npy").read_bytes()

    def mapped(mode: Any) -> nn.Parameter:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that the array is not writable
            return nn.Parameter(torch.from_numpy(np.load(tmp_path / "w.npy", mmap_mode=mode)))

    says = r"'?weight'? lies in memory that this process may only read, .*model\.get_parameter\('weight'\)\.data = "
    late = Switcher(model)
    late.add("a", adapter)
    model.weight = mapped("r")
    with pytest.raises(SwitchError, match=says):
        late.rebind()
    one = Switcher(model)
    with pytest.raises(AdapterError, match=says):
        one.add("a", adapter)
    with pytest.raises(SyncError, match=says):
        Receiver(model)
    Publisher(model)  # only reads
    with pytest.raises(ValueError, match=says):
        SparseTuner(model, masks.Rand(density=0.5, granule=1), ["weight"])
    with pytest.raises(ValueError, match=says):
        SparseTuner.from_adapter(model, adapter)
    model.get_parameter("weight").data = model.get_parameter("weight").data.clone()
    one.add("a", adapter)
    one.activate("a")
    one.deactivate()
    assert differing(bits(model), base) == 0
    # A private copy of each page that is written.
    model.weight = mapped("c")
    private = Switcher(model)
    private.add("a", adapter)
    private.activate("a")
    assert model.weight.flatten()[0].item() == 100
    assert (tmp_path / "w.npy").read_bytes() == before


def test_offloaded_weights_are_refused_with_the_way_out() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = linear()
    adapter = one_of(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(AdapterError, match=r"'weight' is offloaded: .* without offloading, or use an Overlay"):
        Switcher(model).add("a", adapter)


def test_a_weight_that_is_tied_in_the_adapter_alone() -> None:
    """On a model that keeps two copies, both are written, if they are copies."""
    model = nn.ModuleDict({"wte": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    with torch.no_grad():
        model["head"].weight.copy_(model["wte"].weight)
    base = bits(model)
    entry = entry_of(model["wte"].weight, [1, 5], [7, 8], aliases=("head.weight",))
    one = Switcher(model)
    one.add("a", Adapter({"wte.weight": entry}))
    one.add("b", Adapter({"head.weight": entry_of(model["wte"].weight, [2], [9])}))
    one.activate("a")
    assert torch.equal(model["wte"].weight, model["head"].weight)
    assert model["wte"].weight.flatten()[[1, 5]].tolist() == [7, 8]
    one.activate({"a": 1.0, "b": 1.0})
    assert (model["head"].weight[0, 2], model["wte"].weight.flatten()[2] != 9) == (9, True)
    one.verify(full=True)
    one.deactivate()
    assert differing(bits(model), base) == 0
    with pytest.raises(AdapterError, match=r"'head\.weight' and 'wte\.weight' are one \(tied\) weight in the adapter"):
        SparseTuner.from_adapter(model, Adapter({"wte.weight": entry}))
    one.activate("b")  # at the base they are still the same
    one.add("again", Adapter({"wte.weight": entry}))
    one.deactivate()
    with pytest.raises(AdapterError, match=r"rename: 'wte\.weight' and 'head\.weight' both become 'wte\.weight'"):
        one.add("one", Adapter({"wte.weight": entry}), rename=lambda name: "wte.weight")
    says = r"'head\.weight' and 'wte\.weight' are one \(tied\) weight in the adapter, and two that differ in the"
    for verify in (True, False):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other["head"].weight[0, 0] += 1
        with pytest.raises(AdapterError, match=says):
            Switcher(other).add("a", Adapter({"wte.weight": entry}), verify=verify)
    other["head"] = nn.Linear(3, 5)
    with pytest.raises(AdapterError, match=says):
        Switcher(other).add("a", Adapter({"wte.weight": entry}))


def test_a_place_of_a_tied_weight_that_is_replaced_is_noticed() -> None:
    model = nn.Sequential(linear(), linear())
    model[1].weight = model[0].weight
    one = Switcher(model)
    one.add("a", one_of(model, "0.weight"))
    model[1].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(SwitchError, match=r"1\.weight is no longer the parameter it was"):
        one.activate("a")
    with pytest.raises(SwitchError, match=r"0\.weight and 1\.weight were one \(tied\) weight and are two now"):
        one.rebind()


def test_float64_values_stay_float64_beside_others() -> None:
    model = linear(dtype=torch.float64)
    model.weight.requires_grad_(False).fill_(0)
    fine, coarse = 1 / 3, 0.25
    one = Switcher(model)
    one.add("fine", Adapter({"weight": entry_of(model.weight, [0, 1], [fine, fine])}))
    one.add("coarse", Adapter({"weight": entry_of(model.weight, [1, 2], [coarse] * 2, values_dtype=torch.float32)}))
    one.activate({"fine": 1.0, "coarse": 1.0})
    assert model.weight.flatten()[:4].tolist() == [fine, fine + coarse, coarse, 0]


# ---- whole parameters and buffers ----------------------------------------------------------------------------


def test_a_fresh_head_needs_no_base_at_strength_one() -> None:
    """A classifier that each process draws anew."""
    model = nn.Sequential(linear(), linear(2, 4))
    head = Adapter(
        {"0.weight": entry_of(model[0].weight, [3], [50]), "1.weight": entry_of(model[1].weight, [0], range(8), 8)}
    )
    with torch.no_grad():
        model[1].weight.normal_()
    base = bits(model)
    one = Switcher(model)
    one.add("head", head)
    one.add("part", one_of(model, "1.weight"))
    for strengths in ({"head": 1.0}, {"head": 1.0, "part": 0.0}):
        one.activate(strengths)
        assert model[1].weight.flatten().tolist() == list(range(8))
        assert model[0].weight[0, 3] == 50
    one.verify(full=True)
    one.deactivate()
    assert differing(bits(model), base) == 0
    says = r"'head' replaces 1\.weight as a whole, .* so it cannot be summed with 'part', which changes it too"
    with pytest.raises(AdapterError, match=says):
        one.activate({"part": 0.5, "head": 1.0})
    one.activate({"part": 0.5, "head": 0.0})
    one.deactivate()
    assert differing(bits(model), base) == 0
    says = r"'head' replaces 1\.weight as a whole, and was made where the content there was another .* got 0\.5"
    for strengths in ({"head": 0.5}, {"part": 1.0, "head": 0.5}):
        with pytest.raises(AdapterError, match=says):
            one.activate(strengths)
    assert (one.active, differing(bits(model), base)) == ({}, 0)
    entries = {**head.weights, "1.weight": entry_of(model[1].weight, [0, 1], range(8), 4, fingerprint=1)}
    with pytest.raises(AdapterError, match=r"another base: the content of 1 of 2 weights differs .*1\.weight"):
        one.add("parts", Adapter(entries))  # all of it too, and not as a whole
    with pytest.raises(AdapterError, match="another base"):
        one.add("delta", Adapter({"1.weight": entry_of(model[1].weight, [0], range(8), 8, fingerprint=1)}, delta=True))


def test_running_statistics_are_switched_and_come_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.register_buffer("passing", torch.zeros(2), persistent=False)
    tuned = copy.deepcopy(model)
    for _ in range(3):
        tuned(torch.randn(8, 4) * 3 + 1)
    with torch.no_grad():
        tuned[0].weight[1, 1] += 1
    entries = {name: entry_of(model.state_dict()[name], [0], value, max(value.numel(), 1))
               for name, value in tuned.state_dict().items() if not name.startswith("0")}  # fmt: skip
    entries["0.weight"] = entry_of(model[0].weight, [5], [tuned[0].weight[1, 1].item()])
    assert entries["1.num_batches_tracked"].shape == ()
    base = copy.deepcopy(model.state_dict())
    one = Switcher(model)
    one.add("tuned", Adapter(entries))
    one.add("other", one_of(model, "0.weight"))

    def equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        return all(torch.equal(state[name], other[name]) for name in state)

    one.activate("tuned")
    assert equal(model.state_dict(), tuned.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(model.eval()(x), tuned.eval()(x))
    one.activate({"tuned": 1.0, "other": 0.5})  # a counter cannot be summed, and need not be
    assert model[1].num_batches_tracked == 3
    assert torch.equal(model[1].running_mean, tuned[1].running_mean)
    one.activate({"tuned": 1.0, "other": 1.0})
    one.verify(full=True)
    one.deactivate("other")
    assert equal(model.state_dict(), tuned.state_dict())
    one.deactivate()
    assert equal(model.state_dict(), base)
    with pytest.raises(AdapterError, match=r"num_batches_tracked, which is int64 and takes no strength other than 1"):
        one.activate("tuned", 0.5)
    one.activate("tuned")
    model.train()(x)
    with pytest.raises(SwitchError, match=r"1\.\w+ was changed by someone else"):
        one.deactivate()
    one.deactivate(verify=False)
    assert equal(model.state_dict(), base)
    with pytest.raises(AdapterError, match=r"1\.\w+ is a buffer, not a parameter, so it cannot be trained"):
        SparseTuner.from_adapter(model, Adapter(entries))
    with pytest.raises(AdapterError, match=r"'passing' is not in the model"):
        one.add("passing", Adapter({"passing": entry_of(torch.zeros(2), [0], [1])}))


# ---- files ---------------------------------------------------------------------------------------------------


def test_a_file_is_read_once_and_never_half_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = linear(), tmp_path / "a.safetensors"
    one_of(model, value=100).save(file)
    one = Switcher(model)
    one.add("a", file)
    content = file.read_bytes()
    file.write_bytes(b"")  # cut short under a reader: reading a map of it would end the process
    one.activate("a")
    assert model.weight[0, 0] == 100
    file.write_bytes(content)
    assert one.adapters["a"].weights["weight"].values.tolist() == [100]
    one.deactivate()
    one.remove("a")
    one.add("a", Adapter.load(file))
    file.write_bytes(b"")
    one.activate("a")
    assert model.weight[0, 0] == 100
    file.write_bytes(content)
    one.deactivate()
    one.remove("a")

    # One that left comes back from the same file only: another's content, or another in its place, is refused.
    stamp = file.stat()
    budget = Switcher(model, budget=12)
    budget.add("a", file)
    budget.add("b", one_of(model, value=3))
    assert budget.memory()["a"].device == 0
    other = tmp_path / "other"
    one_of(model, value=77).save(other)
    os.utime(other, ns=(stamp.st_mtime_ns, stamp.st_mtime_ns))
    assert other.stat().st_size == stamp.st_size
    os.replace(other, file)
    with pytest.raises(AdapterError, match=r"a\.safetensors has changed since 'a' was added"):
        budget.activate("a")
    file.unlink()
    with pytest.raises(AdapterError, match=r"a\.safetensors, the file of 'a', is gone"):
        budget.activate("a")
    assert model.weight[0, 0] == 0

    load = Adapter.load

    def slowly(path: Any) -> Adapter:
        adapter = load(path)
        one_of(model, value=5, aliases=("more",)).save(path)
        return adapter

    one_of(model).save(file)
    monkeypatch.setattr(Adapter, "load", slowly)
    with pytest.raises(AdapterError, match="was written to while it was read"):
        one.add("a", file)
    assert list(one.adapters) == []


def test_values_that_are_not_finite_are_refused_unless_allowed() -> None:
    model = linear()
    nan, inf = float("nan"), float("inf")
    adapter = Adapter({"weight": entry_of(model.weight, [0, 1, 2, 3], [1, nan, nan, -inf])})
    one = Switcher(model)
    with pytest.raises(AdapterError, match=r"weight 'weight'.*2 NaN and 1 inf.*check_finite=False"):
        one.add("a", adapter)
    assert one.adapters == {}
    one.add("a", adapter, check_finite=False)
    one.activate("a")
    assert str(model.weight[0].tolist()) == "[1.0, nan, nan, -inf]"
    one.deactivate()
    one.verify(full=True)
    for dtype in (torch.float8_e5m2, torch.float8_e4m3fn):
        small = nn.ParameterDict({"w": nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)})
        for values, fine in (([1, nan], False), ([1, 2], True)):
            given = Adapter({"w": entry_of(small["w"], [0, 1], torch.tensor(values, dtype=torch.float32).to(dtype))})
            if fine:
                Switcher(small).add("a", given)
            else:
                with pytest.raises(AdapterError, match="1 NaN"):
                    Switcher(small).add("a", given)


@pytest.mark.parametrize("alpha", [1e39, -1e308, float("nan")])
def test_strengths_that_are_not_finite(alpha: float) -> None:
    model = linear()
    one = Switcher(model)
    adapter = one_of(model)
    for call in (lambda: one.activate("a", alpha), lambda: one.activate({"a": 1.0, "b": alpha}),
                 lambda: one.using("a", alpha).__enter__()):  # fmt: skip
        if not one.adapters:
            one.add("a", adapter)
            one.add("b", adapter)
        with pytest.raises(AdapterError, match="must be a finite number"):
            call()
    adapter.alpha = alpha
    with pytest.raises(AdapterError, match="alpha must be a finite number"):
        one.add("c", adapter)
    assert one.active == {}


def test_names_of_another_wrapper() -> None:
    inner = nn.Sequential(linear(), linear(2, 4))
    model = nn.ModuleDict({"model": inner, "score": linear(1, 4)})
    given = Adapter({f"base.{name}": entry_of(weight, [0], [60]) for name, weight in inner.named_parameters()})
    one = Switcher(model)
    with pytest.raises(AdapterError, match=r"'base\.0\.weight' is not in the model.* all of its names fit") as caught:
        one.add("a", given)
    rename = eval(str(caught.value).split("rename=")[1].split(" all of")[0])
    one.add("a", given, rename=rename)
    one.add("b", given, rename=lambda name: name.replace("base", "model"))
    for name in "ab":
        one.activate(name)
        assert (inner[0].weight[0, 0], inner[1].weight[0, 0], model["score"].weight[0, 0]) == (60, 60, 0)
        one.deactivate()
    plain = Adapter(dict(zip(("0.weight", "1.weight"), given.weights.values(), strict=True)))
    with pytest.raises(AdapterError, match=r"with rename=\{'\^': 'model\.'\} all of its names fit"):
        one.add("c", plain)
    with pytest.raises(AdapterError, match=r"with rename=\{'\^model\\\\\.': ''\} all of its names fit"):
        Switcher(inner).add("c", Adapter({f"model.{name}": entry for name, entry in plain.weights.items()}))
    # Nothing is said where it is not certain, or not enough.
    twins = nn.ModuleDict({"x": linear(), "y": linear()})
    with pytest.raises(AdapterError) as caught:
        Switcher(twins).add("c", Adapter({"z.weight": entry_of(twins["x"].weight, [0], [1])}))
    assert str(caught.value) == "adapter 'c' does not fit the model: 'z.weight' is not in the model"
    twice = Adapter(dict.fromkeys(("x.weight", "y.weight"), entry_of(twins["x"].weight, [0], [1])))
    with pytest.raises(AdapterError, match=r"rename: 'x\.weight' and 'y\.weight' both become 'x\.weight'"):
        Switcher(twins).add("d", twice, rename={"^.": "x"})


class Wrapped(nn.Module):
    """As PEFT wraps a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.lora_A = layer, nn.Linear(4, 1)


@pytest.mark.parametrize("wrapped", ["q", "qv", "qvo"])
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_names_of_layers_that_peft_has_wrapped(wrapped: str, prefix: str) -> None:
    layers = {kind: linear() for kind in "qvo"}
    given = Adapter({f"h.{kind}.weight": entry_of(layer.weight, [0], [60]) for kind, layer in layers.items()})
    inside = nn.ModuleDict({kind: Wrapped(one) if kind in wrapped else one for kind, one in layers.items()})
    model = nn.ModuleDict({"h": inside})
    for name in reversed(prefix.split(".")[:-1]):
        model = nn.ModuleDict({name: model})
    one = Switcher(model)
    with pytest.raises(AdapterError, match="all of its names fit") as caught:
        one.add("a", given)
    rename = eval(str(caught.value).split("rename=")[1].split(" all of")[0])
    assert isinstance(rename, dict)
    one.add("a", given, rename=rename)
    with one.using("a"):
        assert [layer.weight[0, 0] for layer in layers.values()] == [60, 60, 60]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, torch.ones(1, 4))])
def test_a_torchscript_model_itself(make: Any) -> None:
    plain = nn.Sequential(linear(), nn.BatchNorm1d(4)).eval()
    x, script = torch.ones(1, 4), make(plain)
    base = script(x)
    one = Switcher(script)
    weight, mean = plain[0].weight, plain[1].running_mean
    one.add("a", Adapter({"0.weight": entry_of(weight, [1], [60]), "1.running_mean": entry_of(mean, [0], [3])}))
    for _ in range(2):
        with one.using("a"):
            assert torch.equal(script(x), plain(x))
            assert not torch.equal(script(x), base)
        assert torch.equal(script(x), base)
    one.activate("a")
    one.verify(full=True)
    next(iter(script.children())).weight = nn.Parameter(plain[0].weight.detach().clone())
    with pytest.raises(SwitchError, match="no longer the parameter it was"):
        one.deactivate()


# ---- memory that moves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("move", ["share", "data", "replaced", "cast"])
def test_there_is_a_way_back_from_other_memory(move: str) -> None:
    model = model_of(torch.bfloat16)
    one, base = Switcher(model), bits(model)
    for name in "abc":
        one.add(name, adapter_of(model, name))
    one.activate({"a": 1.0, "b": 0.5})
    one.activate("b")
    one.activate({"a": 1.0, "b": 0.5})
    state = bits(model)

    def moved() -> None:
        if move == "share":
            model.to(torch.bfloat16).share_memory() if not model[0].weight.is_shared() else moved_data()
        elif move == "data":
            moved_data()
        elif move == "cast":
            model.to(torch.float32).to(torch.bfloat16)
        else:
            model.load_state_dict({name: p.detach().clone() for name, p in model.named_parameters()}, assign=True)

    def moved_data() -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()

    moved()
    for call in (lambda: one.activate("c"), one.deactivate, one.verify, lambda: one.deactivate("a", verify=False)):
        with pytest.raises(SwitchError, match=r"rebind\(\) goes on with what is there now"):
            call()
    one.rebind()
    one.verify(full=True)
    assert (one.active, differing(bits(model), state)) == ({"a": 1.0, "b": 0.5}, 0)
    one.activate({"a": 1.0, "b": 0.25})
    one.activate("c")
    one.activate({"a": 1.0, "b": 0.5})
    assert differing(bits(model), state) == 0

    moved()
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    with pytest.raises(SwitchError, match=r"1 weight\(s\) do not hold the base plus what is active where they are now"):
        one.rebind()
    with torch.no_grad():
        model[1].weight.copy_(state.view(torch.bfloat16)[108:252].view(12, 12))
    one.deactivate(verify=False)
    assert (one.active, differing(bits(model), base)) == ({}, 0)
    for call in (lambda: one.activate("a"), lambda: one.add("d", adapter_of(model_of(torch.bfloat16), "d"))):
        with pytest.raises(SwitchError, match="rebind"):
            call()
    one.rebind()
    one.activate({"a": 1.0, "b": 0.5})
    assert differing(bits(model), state) == 0
    one.deactivate()
    assert differing(bits(model), base) == 0
    one.verify(full=True)


def test_other_memory_at_the_same_address() -> None:
    """As a cast and the cast back may leave it, which lose digits: the address is given again, and no version tells."""
    model, memory = nn.Linear(8, 8, bias=False), bytearray(256)

    def of_this_memory() -> Tensor:
        return torch.frombuffer(memory, dtype=torch.float32).view(8, 8)

    model.weight.data = of_this_memory()
    address, one = model.weight.data_ptr(), Switcher(model)
    one.add("a", one_of(model))
    model.weight.data = torch.empty(0)  # what was there is gone
    memory[:] = b"?" * 256
    model.weight.data = of_this_memory()
    assert model.weight.data_ptr() == address
    with pytest.raises(SwitchError, match=r"was moved or cast .* in other memory"):
        one.activate("a")
    assert memory == b"?" * 256
    memory[:] = bytes(256)
    one.rebind()
    one.activate("a")
    one.verify(full=True)
    one.deactivate()


def test_what_no_way_leads_back_from_is_said() -> None:
    model = linear()
    one = Switcher(model)
    one.add("a", one_of(model))
    one.activate("a")
    model.to(torch.bfloat16)
    with pytest.raises(SwitchError, match="it is bfloat16 on cpu, in other memory; cast it back and call rebind"):
        one.deactivate()
    for call in (one.rebind, lambda: one.deactivate(verify=False)):
        with pytest.raises(SwitchError, match="weight must have dtype float32, got bfloat16"):
            call()
    model.to(torch.float32)
    model.weight.data = model.weight.data[:2]
    with pytest.raises(
        SwitchError, match=r"weight had shape \[4, 4\] when an adapter for it was added, and has shape \[2, 4\]"
    ):
        one.deactivate()
    for call in (one.rebind, lambda: one.deactivate(verify=False)):
        with pytest.raises(SwitchError, match=r"weight must have shape \[4, 4\], got \[2, 4\]"):
            call()
    del model.weight
    for call in (one.rebind, lambda: one.deactivate(verify=False)):
        with pytest.raises(SwitchError, match="weight is no longer in the model"):
            call()
    assert one.active == {"a": 1.0}


def test_nothing_is_kept_of_weights_that_no_adapter_is_for() -> None:
    model, twin = linear(), linear()
    one = Switcher(model)
    one.add("a", one_of(model))
    one.activate("a")
    one.remove("a")
    torch.utils.swap_tensors(model.weight, twin.weight)
    one.add("a", one_of(model))
    del one
    torch.utils.swap_tensors(model.weight, twin.weight)
    assert not any(weight.tensor is model.weight for weight in _live.known([model.weight]))
    memory, key = model.weight.untyped_storage()._weak_ref(), _model.memory(model.weight)
    one = Switcher(model)
    one.add("a", one_of(model))
    one.activate("a")
    del one
    assert key in _live._abandoned
    del model
    gc.collect()
    assert torch.UntypedStorage._expired(memory)
    other = linear()
    Switcher(other).add("a", one_of(other))
    assert key not in _live._abandoned
    torch.UntypedStorage._free_weak_ref(memory)


def test_a_new_model_where_an_old_one_was_is_read_anew() -> None:
    """Often at the same address, with the same identity and version, after a model went with an adapter on."""
    for value in range(8):
        model = linear(256, 256)
        with torch.no_grad():
            model.weight.fill_(value)
        one = Switcher(model)
        one.add("a", one_of(model))
        one.activate("a", 1 + value)
        assert one.fingerprint("weight") == print_of(model.weight)
        del one, model


def test_an_embedding_that_changes_itself_is_refused_at_once() -> None:
    model = nn.Sequential(nn.Embedding(4, 3, max_norm=1.0), linear(4, 3))
    says = r"'0\.weight' is changed by its own forward \(max_norm=1\)"
    with pytest.raises(AdapterError, match=says):
        Switcher(model).add("a", one_of(model, "0.weight"))
    model[1].weight = model[0].weight
    with pytest.raises(AdapterError, match=says):
        Switcher(model).add("a", one_of(model, "1.weight"))


# ---- two of them ---------------------------------------------------------------------------------------------


def test_a_second_switcher_never_takes_over_what_the_first_holds() -> None:
    model = linear()
    base = bits(model)
    one, two = Switcher(model), Switcher(model)
    one.add("a", one_of(model))
    adapter = one_of(model, value=7)
    one.activate("a")
    with torch.no_grad():
        model.weight.add_(0)  # a version moves
    with pytest.raises(SwitchError, match="weight has adapters of another Switcher"):
        two.add("b", adapter, verify=False)
    one.deactivate()
    two.add("b", adapter)
    two.activate("b")
    with pytest.raises(SwitchError, match="weight has adapters of another Switcher"):
        one.activate("a")
    two.deactivate()
    one.activate("a")
    one.deactivate()
    assert differing(bits(model), base) == 0


def test_two_models_over_one_memory_take_turns() -> None:
    model, twin = linear(), linear()
    twin.weight = nn.Parameter(model.weight.data)
    base = bits(model)
    one, two = Switcher(model), Switcher(twin)
    one.add("a", one_of(model))
    two.add("b", one_of(model, value=7))
    one.activate("a")
    with pytest.raises(SwitchError, match="weight has adapters of another Switcher"):
        two.activate("b")
    one.deactivate()
    two.activate("b")
    assert model.weight[0, 0] == 7
    with pytest.raises(SwitchError, match="weight has adapters of another Switcher"):
        one.activate("a")
    del two  # with its adapter on
    gc.collect()
    with pytest.raises(SwitchError, match="a Switcher that no longer exists; load the base again"):
        one.activate("a")
    fresh = Switcher(twin)
    with pytest.raises(SwitchError, match="a Switcher that no longer exists; load the base again"):
        fresh.add("b", one_of(linear(), value=7), verify=False)
    restore(model, base)
    fresh.add("b", one_of(linear(), value=7))
    fresh.activate("b")
    fresh.deactivate()
    one.activate("a")
    one.deactivate()
    assert differing(bits(model), base) == 0


def test_writes_without_a_version_are_found_where_it_is_promised() -> None:
    model = linear()
    one = Switcher(model)
    one.add("a", one_of(model))
    one.activate("a")
    for place in (0, 3):
        before = model.weight.detach().clone()
        model.weight.data.view(-1)[place] += 1
        if place == 0:
            with pytest.raises(SwitchError, match="do not hold the base plus what is active: weight"):
                one.verify()
        else:
            one.verify()
        with pytest.raises(SwitchError, match="do not hold the base plus what is active: weight"):
            one.verify(full=True)
        model.weight.data.copy_(before)
    one.verify(full=True)


# ---- budgets and blocks --------------------------------------------------------------------------------------


def test_all_that_is_kept_counts_against_the_budget() -> None:
    """Indices in another granule, and a second place for the base's entries."""
    model = linear(64, 64)
    torch.manual_seed(0)
    base = bits(model)
    given = {
        name: Adapter(
            {"weight": entry_of(model.weight, list(range(0, 64 * 64 // granule, 2)), torch.randn(2048), granule)}
        )
        for name, granule in (("fine", 1), ("wide", 16), ("also", 8))
    }
    free = Switcher(model)
    for name, adapter in given.items():
        free.add(name, adapter)
    walk: list[tuple[str, float]] = [("fine", 1.0), ("wide", 1.0), ("wide", 0.5), ("also", 1.0), ("fine", 0.5),
                                     ("fine", 0.25), ("also", 0.5), ("wide", 0.5)]  # fmt: skip
    states = []
    for name, alpha in walk:
        free.activate(name, alpha)
        states.append(bits(model))
    free.deactivate()
    one_size = max(adapter.nbytes + 4 * adapter.nnz for adapter in given.values())
    assert sum(memory.device for memory in free.memory().values()) > 3 * one_size
    for budget in (2 * one_size, 3 * one_size):
        tight = Switcher(model, budget=budget)
        for name, adapter in given.items():
            tight.add(name, adapter)
        for (name, alpha), state in zip(walk, states, strict=True):
            tight.activate(name, alpha)
            assert sum(memory.device for memory in tight.memory().values()) <= budget
            assert differing(bits(model), state) == 0
        tight.verify(full=True)
        tight.deactivate()
        assert differing(bits(model), base) == 0


def test_a_spill_that_fails_has_added_nothing(tmp_path: Path) -> None:
    model = linear()
    (tmp_path / "file").write_text("")
    one = Switcher(model, budget=12, spill=tmp_path / "file" / "folder")
    one.add("a", one_of(model))
    one.activate("a")
    with pytest.raises(
        SwitchError, match=r"'b' has to leave the device, and cannot be written to .*active is 'a' at 1"
    ):
        one.add("b", one_of(linear(), value=5))
    assert (list(one.adapters), one.active) == (["a"], {"a": 1.0})
    one.deactivate()
    with pytest.raises(SwitchError, match="'a' has to leave the device, and cannot be written to"):
        one.add("b", one_of(linear(), value=5))
    assert (list(one.adapters), one.memory()["a"].device > 0) == (["a"], True)


def test_spilled_files_do_not_stay(tmp_path: Path) -> None:
    model = linear()

    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    node, token = _shelf.node(), "0" * 16
    stays = [f"shira-spilled-{node}-{os.getpid()}-{token}.safetensors",
             f"shira-spilled-elsewhere-{ended.pid}-{token}.safetensors",
             f"shira-spilled-{node}-{ended.pid}-mine.safetensors", "adapter.safetensors"]  # fmt: skip
    for name in (*stays, f"shira-spilled-{node}-{ended.pid}-{token}.safetensors"):
        (tmp_path / name).write_text("")
    one = Switcher(model, budget=12, spill=tmp_path)
    assert names() == sorted(stays)
    one.add("a", one_of(model))
    one.add("b", one_of(model, value=3))
    assert len(names()) == len(stays) + 1
    one.activate("a")
    one.deactivate()
    del one
    assert names() == sorted(stays)


def test_blocks_of_other_threads_and_tasks() -> None:
    model = linear()
    one = Switcher(model)
    for name in "ab":
        one.add(name, one_of(model, value=ord(name)))
    says = "a using.* block of another thread, task or generator is open, .* active is 'a' at 1"
    errors: list[str] = []

    def elsewhere() -> None:
        for call in (lambda: one.activate("b"), one.deactivate, lambda: one.using("b").__enter__(),
                     lambda: one.remove("a"), lambda: one.disabled().__enter__()):  # fmt: skip
            try:
                call()
            except SwitchError as error:
                errors.append(str(error))
        one.verify(full=True)

    def thread() -> None:
        worker = threading.Thread(target=elsewhere)
        worker.start()
        worker.join()

    with one.using("a"):
        thread()
        assert model.weight[0, 0] == ord("a")
        with one.disabled():
            assert model.weight[0, 0] == 0
            with one.using({"b": 1.0}):
                assert one.active == {"b": 1.0}
            with one.using({}):
                assert one.active == {}
        assert model.weight[0, 0] == ord("a")
    assert len(errors) == 5
    for error in errors:
        with pytest.raises(SwitchError, match=says):
            raise SwitchError(error)
    assert one.active == {}

    async def task(name: str, first: asyncio.Event, second: asyncio.Event) -> int:
        await first.wait()
        with one.using(name):
            second.set()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return int(model.weight[0, 0])

    async def main() -> list[Any]:
        start, then, end = asyncio.Event(), asyncio.Event(), asyncio.Event()
        start.set()
        return await asyncio.gather(task("a", start, then), task("b", then, end), return_exceptions=True)

    first, second = asyncio.run(main())
    assert first == ord("a")
    assert isinstance(second, SwitchError)
    assert one.active == {}

    # Ended in another order than they began in: the inner one still ends where the outer one began.
    outer, inner = one.using("a"), one.using("b")
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert one.active == {"b": 1.0}
    inner.__exit__(None, None, None)
    assert (one.active, one._blocks) == ({}, [])
    with pytest.raises(ValueError, match="name at least one adapter"):
        one.activate({})


def test_a_reference_is_computed_before_the_policy() -> None:
    model, x = linear(), torch.ones(1, 4)
    one = Switcher(model)
    one.add("a", one_of(model))
    one.activate("a")
    with one.disabled(), torch.no_grad():
        reference = model(x)
    policy = model(x)
    (policy - reference).sum().backward()
    assert policy[0, 0] - reference[0, 0] == 100
    assert torch.equal(model.weight.grad, torch.ones(4, 4))
    loss = model(torch.ones(1, 4, requires_grad=True)).sum()
    with one.disabled():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- models --------------------------------------------------------------------------------------------------


class Tagged(nn.Parameter):
    """Merely a name on a parameter, with memory of its own."""


class Wrapping(Tensor):
    """Two tensors that look like one, as quantized weights do."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapping:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Wrapping:
        return cls(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(str(func))


def test_weights_that_wrap_others_are_refused_and_the_rest_is_not() -> None:
    model = nn.Sequential(linear(), linear())
    adapter = Adapter({name: entry_of(weight, [0], [9]) for name, weight in model.named_parameters()})
    model[1].weight = nn.Parameter(Wrapping(model[1].weight.detach()), requires_grad=False)
    one = Switcher(model)
    with pytest.raises(AdapterError, match=r"model: '1\.weight' is a Wrapping, a tensor that wraps others"):
        one.add("a", adapter)
    one.add("a", Adapter({"0.weight": adapter.weights["0.weight"]}))
    one.activate("a")
    assert model[0].weight[0, 0] == 9
    tagged = linear()
    tagged.weight = Tagged(tagged.weight.detach())
    with _added(tagged).using("a"):
        assert tagged.weight[0, 0] == 100


def _added(model: nn.Module) -> Switcher:
    one = Switcher(model)
    one.add("a", one_of(_model.unwrap(model)))
    return one


def test_wrapped_models(tmp_path: Path) -> None:
    x = torch.ones(1, 4)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for wrap in (nn.parallel.DistributedDataParallel, nn.DataParallel,
                     lambda m: torch.compile(nn.parallel.DistributedDataParallel(m), backend="eager")):  # fmt: skip
            model = linear()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wrapped = wrap(model)
                one = _added(wrapped)
                assert one.model is model
                with torch.no_grad():
                    assert wrapped(x)[0, 0] == 6
                    with one.using("a"):
                        assert wrapped(x)[0, 0] == 106
                    assert wrapped(x)[0, 0] == 6
    finally:
        torch.distributed.destroy_process_group()


def test_a_copy_of_a_model_with_an_adapter_on_is_another_base() -> None:
    model = linear()
    one = _added(model)
    adapter = one.adapters["a"]
    one.activate("a")
    twin = copy.deepcopy(model)
    other = Switcher(twin)
    with pytest.raises(AdapterError, match="another base"):
        other.add("a", adapter)
    one.deactivate()
    assert (model.weight[0, 0], twin.weight[0, 0]) == (0, 100)
    with torch.no_grad():
        twin.load_state_dict(model.state_dict())
    other.add("a", adapter)


def test_lazy_weights_are_refused() -> None:
    model = nn.LazyLinear(4, bias=False)
    with pytest.raises(AdapterError, match="'weight' has no shape yet; run the model once first"):
        Switcher(model).add("a", one_of(linear()))


def test_blocks_of_generators_that_take_turns() -> None:
    """The weights have one state: a second generator is refused while the first waits, and code in between may nest."""
    model = linear()
    one = Switcher(model)
    for name in "ab":
        one.add(name, one_of(model, value=ord(name)))

    def answer(which: str) -> Iterator[float]:
        with one.using(which):
            for _ in range(3):
                yield float(model.weight[0, 0].detach())

    first = answer("a")
    assert next(first) == ord("a")
    with pytest.raises(SwitchError, match=r"block of another thread, task or generator is open, .* active is 'a' at 1"):
        next(answer("b"))
    with one.using("b"):
        assert one.active == {"b": 1.0}
    assert next(first) == ord("a")
    first.close()
    assert list(answer("b")) == [float(ord("b"))] * 3
    assert one.active == {}
