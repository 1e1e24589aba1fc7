"""Two checkpoints of one model whose names are not all the same: what is mapped, what is said, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shira import Adapter, AdapterError, SparseTuner, Switcher, masks
from shira.adapter.bake import merge


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(6, 4)
        self.h = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


class Head(nn.Module):
    """As GPT-2 with its head: the body under a prefix, the head tied to the embedding."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.transformer = Body()
        self.lm_head = nn.Linear(4, 6, bias=False)
        if tied:
            self.lm_head.weight = self.transformer.wte.weight


def body(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(tensor.shape) for name, tensor in Body().state_dict().items()}


def tuned_of(base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {name: tensor.clone() for name, tensor in base.items()}
    out["wte.weight"][1, 2] += 1
    out["h.1.weight"][0, 0] += 1
    return out


def folder(path: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


CHANGED = {"wte.weight": [6], "h.1.weight": [0]}


def entries(adapter: Adapter) -> dict[str, list[int]]:
    return {name: entry.indices.tolist() for name, entry in adapter.weights.items()}


@pytest.mark.parametrize("prefix", ["transformer.", "0.auto_model.", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_prefix_more_or_less(tmp_path: Path, prefix: str) -> None:
    base = body()
    tuned = tuned_of(base)
    longer = Adapter.from_difference(base, prefixed(prefix, tuned))
    assert entries(longer) == CHANGED
    path = folder(tmp_path / "base", prefixed(prefix, base))
    shorter = Adapter.from_difference(path, tuned)
    wrapped = "module" in prefix or "_orig" in prefix
    assert entries(shorter) == {(name if wrapped else prefix + name): at for name, at in CHANGED.items()}
    merge(shorter, path, tmp_path / "out")
    found = Adapter.from_difference(tmp_path / "out", prefixed(prefix, tuned))
    assert not found.weights
    if not wrapped:
        assert f"read without their prefix '{prefix}'" in str(longer.report)
        assert f"read with the base's prefix '{prefix}'" in str(shorter.report)


def test_a_module_and_the_folder_of_its_body(tmp_path: Path) -> None:
    base = body()
    path = folder(tmp_path / "base", base)
    model = Head()
    model.transformer.load_state_dict(tuned_of(base))
    adapter = Adapter.from_difference(path, model)
    assert entries(adapter) == CHANGED
    assert adapter.weights["wte.weight"].aliases == ("lm_head.weight",)
    assert "'lm_head.weight' is only in the tuned checkpoint, which ties it to 'wte.weight'" in adapter.report.notes
    merge(adapter, path, tmp_path / "out")
    assert not Adapter.from_difference(tmp_path / "out", model).weights

    model.transformer.load_state_dict(base)
    adapter = Adapter.from_difference(model, folder(tmp_path / "tuned", tuned_of(base)))
    assert entries(adapter) == {"transformer." + name: at for name, at in CHANGED.items()}
    assert adapter.weights["transformer.wte.weight"].aliases == ("lm_head.weight",)
    switcher = Switcher(model)
    switcher.add("tuned", adapter)
    switcher.activate("tuned")
    assert torch.equal(model.lm_head.weight, tuned_of(base)["wte.weight"])

    with pytest.raises(AdapterError, match=r"'lm_head.weight' is only in the tuned checkpoint; rename= \(--rename\)"):
        Adapter.from_difference(path, Head(tied=False))


@pytest.mark.parametrize(
    ("config", "mapped"),
    [({"tie_word_embeddings": True}, True), ({}, True), ({"tie_word_embeddings": False}, False),
     ({"text_config": {"tie_word_embeddings": False}}, False)],
)  # fmt: skip
def test_ties_by_configuration(tmp_path: Path, config: dict, mapped: bool) -> None:
    base = body()
    tuned = tuned_of(base)
    both = {**tuned, "lm_head.weight": tuned["wte.weight"].clone()}
    path = folder(tmp_path / "base", base, **config)
    if not mapped:
        with pytest.raises(AdapterError, match=r"'lm_head.weight' is only in the tuned checkpoint"):
            Adapter.from_difference(path, both)
        return
    adapter = Adapter.from_difference(path, both)
    assert entries(adapter) == CHANGED
    both["lm_head.weight"][0, 0] += 1
    with pytest.raises(AdapterError, match=r"'lm_head.weight' is only in the tuned checkpoint"):
        Adapter.from_difference(path, both)

    # The other way: the base holds both, and the tuned one says that it ties them.
    base["lm_head.weight"] = base["wte.weight"].clone()
    adapter = Adapter.from_difference(base, folder(tmp_path / "tuned", tuned, **config))
    assert entries(adapter) == CHANGED
    assert adapter.weights["wte.weight"].aliases == ("lm_head.weight",)


def test_rename(tmp_path: Path) -> None:
    base, tuned = body(), tuned_of(body())
    other = {name.replace("h.", "blocks.").replace("wte", "embed"): tensor for name, tensor in tuned.items()}
    with pytest.raises(AdapterError, match=r"'blocks.0.bias' is only in the tuned checkpoint"):
        Adapter.from_difference(base, other)
    rules = {r"^blocks\.": "h.", "embed": "wte"}
    assert entries(Adapter.from_difference(base, other, rename=rules)) == CHANGED
    with pytest.raises(AdapterError, match=r"rename: 'blocks.0.bias' and 'blocks.0.weight' both become 'x'"):
        Adapter.from_difference(base, dict(sorted(other.items())), rename=lambda name: "x")


def test_two_prefixes_that_are_as_good_are_not_guessed() -> None:
    one = {"weight": torch.zeros(2)}
    two = {"a.weight": torch.zeros(2), "b.weight": torch.zeros(2)}
    with pytest.raises(AdapterError) as error:
        Adapter.from_difference(one, two)
    for part in ("'a.weight' is only in the tuned", "'b.weight' is only in the tuned", "'weight' is only in the base"):
        assert part in str(error.value)


def test_what_a_tuner_keeps_beside_the_weights_is_left_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuner = SparseTuner(model, masks.Rand(density=0.25), targets=r"^0$")
    with torch.no_grad():
        for values in tuner.parameters():
            values += 1
    tuner.sync()
    adapter = Adapter.from_difference(base, dict(model.state_dict()))
    assert entries(adapter) == {"0.weight": tuner.adapter().weights["0.weight"].indices.tolist()}
    assert "left out of the tuned checkpoint, since they are not weights: 0.weight_shira_values" in str(adapter.report)


def test_averages_and_lazy_modules() -> None:
    model = nn.Linear(4, 4)
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        average.module.weight[0, 3] += 1
    for tuned in (average, average.state_dict()):
        adapter = Adapter.from_difference(model, tuned)
        assert entries(adapter) == {"weight": [3]}
        assert "since they are not weights: n_averaged" in str(adapter.report)
    with pytest.raises(TypeError, match="names must be strings, got 1"):
        Adapter.from_difference({1: torch.zeros(1)}, model)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_module_has_nothing_to_compare() -> None:
    with pytest.raises(AdapterError, match="base: 'weight' has no shape yet; run the model once first"):
        Adapter.from_difference(nn.LazyLinear(4), nn.Linear(2, 4))


@pytest.mark.parametrize(
    ("rename", "says"),
    [({"(": "x"}, "is not a regular expression"), ({"a": r"\9"}, "invalid group reference"),
     ({"a": 3}, "must be a string, got 3"), ({"^a$": ""}, "must make a name of 'a', got ''"),
     (lambda name: None, "must make a name of 'a', got None"), (["a"], "must map patterns")],
)  # fmt: skip
def test_wrong_renames(rename: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Adapter.from_difference({"a": torch.zeros(3)}, {"a": torch.zeros(3)}, rename=rename)


def test_constants_that_newer_versions_do_not_save() -> None:
    base = body() | {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    adapter = Adapter.from_difference(base, tuned_of(body()))
    assert entries(adapter) == CHANGED
    assert "constants that only one checkpoint has were left out: h.0.attn.bias" in str(adapter.report)
    with pytest.raises(AdapterError, match=r"'h.0.attn.bias' is only in the base"):
        Adapter.from_difference(base | {"h.0.attn.bias": torch.ones(4)}, tuned_of(body()))


OTHERS = {
    "c": torch.tensor([1 + 2j, 3j]),
    "u16": torch.tensor([1, 60000], dtype=torch.uint16),
    "u32": torch.tensor([1, 2], dtype=torch.uint32),
    "u64": torch.tensor([1, 2], dtype=torch.uint64),
    "e8": torch.tensor([1, 2], dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "e4z": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fnuz),
    "e5z": torch.tensor([1.0, 2.0]).to(torch.float8_e5m2fnuz),
    "fp4": torch.tensor([[1, 2]], dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
}


def test_dtypes_that_no_adapter_holds(tmp_path: Path) -> None:
    base = {**OTHERS, "a": torch.zeros(4)}
    tuned = {**OTHERS, "a": torch.tensor([0.0, 0.0, 1.0, 0.0])}
    save_file(base, tmp_path / "base.safetensors")
    for one in (base, tmp_path / "base.safetensors"):
        assert entries(Adapter.from_difference(one, tuned)) == {"a": [2]}
    adapter = Adapter.from_difference(tmp_path / "base.safetensors", tuned)
    merge(adapter, tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    assert not Adapter.from_difference(tmp_path / "out.safetensors", tuned).weights

    changed = {name: tensor.clone() for name, tensor in OTHERS.items()}
    for tensor in changed.values():
        tensor.view(torch.uint8).view(-1)[0] ^= 1
    with pytest.raises(AdapterError) as error:
        Adapter.from_difference(tmp_path / "base.safetensors", {**changed, "a": base["a"]})
    assert "(8 in all) changed, and an adapter cannot hold entries of complex64, float4_e2m1fn_x2" in str(error.value)
    assert Adapter.from_difference({"c": OTHERS["c"].conj()}, {"c": OTHERS["c"].conj().resolve_conj()}).nnz == 0


class Wrapped(torch.Tensor):
    """A tensor that wraps others, as quantized ones do."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict, context: None, size: object, stride: object) -> Wrapped:
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(str(function))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_that_wrap_others_are_refused() -> None:
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    for one, two in ((base, {**base, "b": Wrapped(torch.zeros(2))}), ({**base, "b": Wrapped(torch.zeros(2))}, base)):
        with pytest.raises(AdapterError, match=r"'b' is a Wrapped, a tensor that wraps others \(quantized\?\)"):
            Adapter.from_difference(one, two)
    scaled = torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)
    with pytest.raises(AdapterError, match=r"'b' is torch.qint8, whose entries share a scale"):
        Adapter.from_difference(base, {**base, "b": scaled})


def test_running_statistics_are_carried_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].num_batches_tracked.fill_(2**53)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(before, tmp_path / "base.safetensors")
    model(torch.randn(8, 4))
    assert int(model[1].num_batches_tracked) == 2**53 + 1  # beyond what float64 can count exactly
    adapter = Adapter.from_difference(before, model)
    assert set(adapter.weights) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    merge(adapter, tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    assert not Adapter.from_difference(tmp_path / "out.safetensors", model).weights


def test_new_tensors_are_taken_along_when_asked(tmp_path: Path) -> None:
    base = body()
    path = folder(tmp_path / "base", base)
    tuned = prefixed("transformer.", tuned_of(base)) | {"score.weight": torch.randn(2, 4), "score.bias": torch.randn(2)}
    with pytest.raises(AdapterError, match=r"'score.weight' is only in the tuned checkpoint; .*added=True \(--added\)"):
        Adapter.from_difference(path, tuned)
    adapter = Adapter.from_difference(path, tuned, added=True)
    assert entries(adapter) == CHANGED | {"score.weight": [0], "score.bias": [0]}
    assert adapter.weights["score.weight"].whole
    merge(adapter, path, tmp_path / "out")
    assert not Adapter.from_difference(tmp_path / "out", tuned).weights
    with pytest.raises(AdapterError, match="is bool, which an adapter cannot hold"):
        Adapter.from_difference(path, tuned | {"flag": torch.tensor(True)}, added=True)
