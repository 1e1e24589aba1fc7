"""Does an adapter fit a base? One set of rules and sentences, whether the base is a model, a state dict or a file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shira_ops
from shira import Adapter, AdapterError, Entry, SparseTuner, Switcher, _fit, _granules
from shira.adapter._checkpoint import open_checkpoint
from shira.adapter.bake import bake

WORD = 2**64 - 1


def net() -> nn.Module:
    torch.manual_seed(5)
    return nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 3)})


def entry_of(weight: torch.Tensor, **changes: object) -> Entry:
    indices, values = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([5.0, 6.0], dtype=weight.dtype)
    fingerprint = int(shira_ops.fingerprint(weight.detach())) & WORD
    return replace(Entry(indices, values, tuple(weight.shape), weight.dtype, 1, fingerprint), **changes)


def said_everywhere(adapter: Adapter, model: nn.Module, folder: Path) -> list[str]:
    """What each way to use an adapter says of this base, from the name of the adapter on."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    path, out = folder / "base.safetensors", folder / "out.safetensors"
    save_file(state, path)
    ways: list[Callable[[], object]] = [
        lambda: Switcher(copy.deepcopy(model)).add("x", adapter),
        lambda: SparseTuner.from_adapter(copy.deepcopy(model), adapter),
        lambda: adapter.to_delta(state),
        lambda: adapter.to_delta(path),
        lambda: bake(adapter, path, out),
    ]
    found = []
    for way in ways:
        with pytest.raises(AdapterError) as caught:
            way()
        assert not out.exists()
        found.append(str(caught.value))
    return found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shape": (4, 6)}, "'a.weight' must have shape [4, 6], got [6, 4]"),
        ({"dtype": torch.float64, "values": torch.zeros(2).double()},
         "'a.weight' must have dtype float64, got float32"),
        ({"fingerprint": 1}, "made for another base"),
        ({"fingerprint": 1}, "the content of 1 of 2 weights differs (by fingerprint): 'a.weight'"),
        ({"aliases": ("b.weight",)}, "'b.weight' and 'a.weight' are one (tied) weight in the adapter, and two"),
    ],
)  # fmt: skip
def test_one_sentence_for_every_base(change: dict[str, object], says: str, tmp_path: Path) -> None:
    model = net()
    entries = {"a.weight": entry_of(model["a"].weight, **change), "b.bias": entry_of(model["b"].bias)}
    for said in said_everywhere(Adapter(entries), model, tmp_path):
        assert says in said, said


def test_names_that_are_near_are_told_for_every_base(tmp_path: Path) -> None:
    model = nn.ModuleDict({"m": net()})
    entries = {name: entry_of(weight) for name, weight in net().named_parameters()}
    for said in said_everywhere(Adapter(entries), model, tmp_path):
        assert "'a.weight' is not in the " in said
        assert ", which has 'm.a.weight'; 'a.bias' is not in the " in said
        assert ("with rename={'^': 'm.'}" in said) == ("this base" not in said), said  # where names can be changed
    # Where no single rule makes all of them fit, only what is near is told.
    entries["z.weight"] = entry_of(torch.zeros(7))
    said = said_everywhere(Adapter(entries), model, tmp_path)[0]
    assert said.endswith("'z.weight' is not in the model; rename them if they are one")


def test_two_weights_of_an_adapter_that_are_one_in_the_base(tmp_path: Path) -> None:
    model = net()
    model["b"] = nn.Linear(4, 6)
    model["b"].weight = model["a"].weight
    adapter = Adapter({name: entry_of(model["a"].weight) for name in ("a.weight", "b.weight")})
    says = "'b.weight' is the same (tied) weight as 'a.weight'"
    for call in (
        lambda: Switcher(model).add("x", adapter),
        lambda: SparseTuner.from_adapter(model, adapter),
        lambda: adapter.to_delta(model),
        lambda: adapter.to_delta(model.state_dict()),
    ):
        with pytest.raises(AdapterError) as caught:
            call()
        assert says in str(caught.value)


@pytest.mark.parametrize("view", ["flat", "turned"])
def test_an_alias_that_is_another_view_of_the_memory(view: str) -> None:
    """One weight by its memory, but not one that the same indices are right for."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.arange(16.0).view(4, 4))})
    data = model["w"].detach()
    model["v"] = nn.Parameter(data.view(-1) if view == "flat" else data.t())
    adapter = Adapter({"w": entry_of(model["w"], aliases=("v",))})
    says = {"flat": "'v' and 'w' are one (tied) weight in the adapter, and two", "turned": "'v' must be contiguous"}
    for call in (lambda: Switcher(model).add("x", adapter), lambda: SparseTuner.from_adapter(model, adapter)):
        with pytest.raises(AdapterError) as caught:
            call()
        assert says[view] in str(caught.value)


def test_a_whole_parameter_goes_onto_any_content_at_strength_1(tmp_path: Path) -> None:
    model = net()
    bias = model["b"].bias
    whole = replace(entry_of(bias, fingerprint=1), indices=torch.zeros(1, dtype=torch.int32), granule=3)
    adapter = Adapter({"b.bias": replace(whole, values=torch.ones(3))})
    before = bias.detach().clone()
    switcher = Switcher(model)
    switcher.add("x", adapter)
    with switcher.using("x"):
        assert torch.equal(bias, torch.ones(3))
    with SparseTuner.from_adapter(model, adapter) as tuner:
        assert torch.equal(bias, torch.ones(3))
        assert tuner.adapter().weights["b.bias"].fingerprint == int(shira_ops.fingerprint(before)) & WORD
    assert torch.equal(bias, before)
    save_file(dict(model.state_dict()), tmp_path / "base.safetensors")
    bake(adapter, tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    for alpha in (0.5, 2.0):
        with pytest.raises(AdapterError, match="made for another base"):
            bake(adapter, tmp_path / "base.safetensors", tmp_path / "no.safetensors", alpha=alpha)


def test_a_base_that_does_not_fit_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, shapes and dtypes first: a large file is not hashed to say that a name is not in it."""
    base = open_checkpoint({name: weight.detach() for name, weight in net().named_parameters()}, "base")
    weights = {"a.weight": entry_of(base.tensors["a.weight"].data), "z": entry_of(torch.zeros(3))}
    monkeypatch.setattr(type(base.tensors["a.weight"]), "fingerprint", lambda self: pytest.fail("it was read"))
    with pytest.raises(AdapterError, match="'z' is not in the base"):
        _fit.places("x", weights, base, where="this base")


def test_going_on_reads_each_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    adapter = Adapter({name: entry_of(weight) for name, weight in model.named_parameters() if weight.dim() == 2})
    read: list[int] = []
    fingerprint = _granules.fingerprint

    def counted(weight: torch.Tensor) -> int:
        if weight.dim() == 2:  # and not the values
            read.append(weight.data_ptr())
        return fingerprint(weight)

    monkeypatch.setattr(_granules, "fingerprint", counted)
    with SparseTuner.from_adapter(model, adapter) as tuner:
        assert sorted(read) == sorted([model["a"].weight.data_ptr(), model["b"].weight.data_ptr()])
        now = tuner.adapter()
    assert {name: entry.fingerprint for name, entry in now.weights.items()} == {
        name: entry.fingerprint for name, entry in adapter.weights.items()
    }
