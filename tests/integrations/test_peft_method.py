"""Our method among PEFT's: what PEFT's own functions do with it."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import shira
import shira_ops
from shira import Adapter, AdapterError, Switcher, masks
from tuning import bits, same_bits

peft = pytest.importorskip("peft", minversion="0.21")

from shira.integrations.peft import SparseConfig, SparseModel  # noqa: E402
from shira.integrations.peft._method import Linear  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*was active which is now deleted",
    "ignore:Already following adapters",
    "ignore:Already found a `peft_config`",
    "ignore:.*is_gradient_checkpointing",
    "ignore:.*find a config file",
)

TARGETS = ["first", "second"]
INPUT = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 48, dtype=dtype)
        self.second = nn.Linear(48, 16, bias=False, dtype=dtype)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        output = self.second(torch.relu(self.first(x)))
        return output if labels is None else {"loss": (output - labels).square().mean()}


def config(**options: Any) -> SparseConfig:
    own = {} if isinstance(options.get("mask"), masks.Mask) else {"density": 0.1, "granule": 8}
    return SparseConfig(**{"target_modules": TARGETS, "init_weights": False, **own, **options})


def made(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(3)
    return peft.get_peft_model(Net(dtype), config(**options))


def layers(model: nn.Module) -> list[Linear]:
    return [one for one in model.modules() if isinstance(one, Linear)]


def dense(model: Any, name: str = "default") -> Net:
    """A plain model with the adapter added to its weights, from the parameters alone."""
    net = Net().double()
    for part in TARGETS:
        layer = model.get_submodule(f"base_model.model.{part}")
        weight, granule = getattr(net, part).weight, layer.granule[name]
        flat = layer.shira_ops_indices[name].long()[:, None] * granule + torch.arange(granule)
        weight.data.view(-1)[flat.view(-1)] += layer.shira_ops_values[name].detach().double() * layer.scaling[name]
    return net


# ---- what it computes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({}, masks.Rand(density=0.1, granule=8)),
        ({"mask": "rand", "seed": 7, "granule": "auto"}, masks.Rand(density=0.1, granule="auto", seed=7)),
        ({"mask": "rand", "r": 2, "density": None}, masks.Rand(r=2, granule=8)),
        ({"mask": "struct"}, masks.Struct(density=0.1, granule=8)),
        ({"mask": "wm", "granule": 1}, masks.WeightMagnitude(density=0.1)),
        ({"mask": masks.WeightMagnitude(density=0.2, granule=4, balanced=True)},
         masks.WeightMagnitude(density=0.2, granule=4, balanced=True)),
        ({"mask": masks.Given(lambda name, weight: weight > 0.1)}, masks.Given(lambda name, weight: weight > 0.1)),
    ],
    ids=["default", "seed", "r", "struct", "wm", "balanced", "given"],
)  # fmt: skip
def test_masks_outputs_and_gradients(options: dict[str, Any], mask: masks.Mask) -> None:
    model = made(**options)
    assert type(model.base_model) is SparseModel
    for part in TARGETS:
        layer = model.get_submodule(f"base_model.model.{part}")
        # Those of a SparseTuner with this mask on the plain model.
        assert torch.equal(layer.shira_ops_indices["default"], mask(f"{part}.weight", getattr(Net(), part).weight))
    plain = dense(model).requires_grad_(True)
    torch.testing.assert_close(model(INPUT), plain(INPUT.double()).float(), rtol=1e-4, atol=1e-4)
    model(INPUT).square().sum().backward()
    plain(INPUT.double()).square().sum().backward()
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained == {f"base_model.model.{part}.shira_ops_values.default" for part in TARGETS}
    for part in TARGETS:
        layer = model.get_submodule(f"base_model.model.{part}")
        gradient = getattr(plain, part).weight.grad.float()
        wanted = shira_ops.gather(gradient, layer.shira_ops_indices["default"], granule=layer.granule["default"])
        torch.testing.assert_close(layer.shira_ops_values["default"].grad, wanted, rtol=1e-4, atol=1e-3)
        assert layer.base_layer.weight.grad is None


def test_it_starts_as_the_base_and_has_the_size_that_was_asked_for() -> None:
    base = Net()
    before = bits(base)
    model = peft.get_peft_model(base, SparseConfig(target_modules=TARGETS, density=0.05, granule=16))
    assert torch.equal(model(INPUT), Net()(INPUT))
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == sum(16 * max(1, round(0.05 * size / 16)) for size in (32 * 48, 48 * 16))
    assert same_bits(model.unload(), before)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_the_dtype_of_what_is_trained_is_pefts(autocast_adapter_dtype: bool) -> None:
    model = peft.get_peft_model(Net(torch.bfloat16), config(), autocast_adapter_dtype=autocast_adapter_dtype)
    wanted = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {one.dtype for one in model.parameters() if one.requires_grad} == {wanted}
    output = model(INPUT.bfloat16())
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    exact = copy.deepcopy(model).double()(INPUT.double())
    assert (output.double() - exact).norm() < 2**-6 * exact.norm()


def test_compiled_and_copied_and_pickled() -> None:
    model = made()
    wanted = model(INPUT)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(INPUT), wanted)
    compiled(INPUT).sum().backward()
    assert all(one.grad is not None for one in model.parameters() if one.requires_grad)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(INPUT), wanted)
        twin.merge_adapter()
        assert torch.equal(model(INPUT), wanted)


def test_other_linear_layers() -> None:
    """transformers' Conv1D, whose weight is turned, and a layer of codes that PEFT has never heard of."""
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D

    class Codes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 48, 16
            self.register_buffer("codes", torch.randint(-9, 9, (16, 48), dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.codes.to(x.dtype).T

    torch.manual_seed(0)
    net = nn.Sequential(conv1d(48, 32), Codes())
    x = INPUT.double()
    base = copy.deepcopy(net).double()
    model = peft.get_peft_model(net, config(target_modules=["0", "1"])).double()
    delta0, delta1 = (layer.get_delta_weight("default") for layer in layers(model))
    assert delta0.shape == (32, 48)
    hidden = base[0](x) + x @ delta0
    torch.testing.assert_close(model(x), base[1](hidden) + hidden @ delta1.T)
    mixed = model.eval()(x, adapter_names=["default", "__base__", "default"])
    assert torch.equal(mixed[1], base(x)[1])
    torch.testing.assert_close(mixed[0], model(x)[0])
    layers(model)[0].merge()
    torch.testing.assert_close(model(x), base[1](hidden) + hidden @ delta1.T)
    with pytest.raises(
        ValueError, match=r"1: an adapter can be merged into the whole float weight of .* got a .*Codes"
    ):
        layers(model)[1].merge()
    layers(model)[0].unmerge()
    assert torch.equal(layers(model)[0].base_layer.weight, base[0].weight)
    with pytest.raises(ValueError, match="the weight of 1 cannot be read; take mask='rand'"):
        peft.get_peft_model(nn.Sequential(nn.ReLU(), Codes()), config(mask="wm", target_modules=["1"]))
    Codes.dequantize = lambda self: self.codes.float()  # type: ignore[attr-defined]
    codes = Codes()
    model = peft.get_peft_model(nn.Sequential(nn.ReLU(), codes), config(mask="wm", target_modules=["1"]))
    wanted = masks.WeightMagnitude(density=0.1, granule=8)("1.weight", codes.codes.float())
    assert torch.equal(layers(model)[0].shira_ops_indices["default"], wanted)

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = peft.get_peft_model(nn.Sequential(nn.ReLU(), Doubled(48, 16)), config(target_modules=["1"]))
    base = Doubled(48, 16)
    base.load_state_dict(layers(model)[0].base_layer.state_dict())
    delta = layers(model)[0].get_delta_weight("default")
    x = torch.rand(4, 48)
    torch.testing.assert_close(model(x), base(x) + x @ delta.T)
    with pytest.raises(ValueError, match=r"got a .*Doubled \(codes would .* another forward may use its weight"):
        model.merge_adapter()


# ---- what PEFT does with it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("mask", ["wm", "given"])
def test_saved_and_loaded(tmp_path: Path, mask: str, trainable: bool, low_cpu_mem_usage: bool) -> None:
    model = made(mask=masks.Given(lambda name, weight: weight > 0.1, granule=8) if mask == "given" else mask)
    wanted = model(INPUT)
    model.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert set(tensors) == {f"base_model.model.{part}.shira_ops_{what}" for part in TARGETS
                            for what in ("values", "indices")}  # fmt: skip
    # The base has changed since: its largest entries are others, and the file's indices hold.
    base = Net()
    with torch.no_grad():
        base.second.weight[0] *= 100
        model.base_model.model.second.base_layer.weight.copy_(base.second.weight)
    again = peft.PeftModel.from_pretrained(
        base, str(tmp_path), is_trainable=trainable, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(again(INPUT), model(INPUT))
    assert not torch.equal(wanted, model(INPUT))
    for one, other in zip(layers(again), layers(model), strict=True):
        assert torch.equal(one.shira_ops_indices["default"], other.shira_ops_indices["default"])
        assert one.granule == other.granule == {"default": 8}
    assert any(one.requires_grad for one in again.parameters()) == trainable
    # Over an adapter of another size, and beside it.
    more = made(density=0.3, granule=4, seed=5)
    more.load_adapter(str(tmp_path), "other", low_cpu_mem_usage=low_cpu_mem_usage)
    more.load_adapter(str(tmp_path), "default")
    for name in ("other", "default"):
        more.set_adapter(name)
        assert torch.equal(more(INPUT), wanted)


def test_without_a_peft_model() -> None:
    """In a model that others own, as in transformers."""
    net, other = Net(), Net()
    peft.inject_adapter_in_model(config(), net)
    state = peft.get_peft_model_state_dict(net)
    assert set(state) == {f"{part}.shira_ops_{what}" for part in TARGETS for what in ("values", "indices")}
    peft.inject_adapter_in_model(config(seed=9, density=0.3, granule=4), other)
    found = peft.set_peft_model_state_dict(other, state)
    assert not found.unexpected_keys
    assert torch.equal(other(INPUT), net(INPUT))


def test_pefts_own_reports() -> None:
    model = made()
    model.add_adapter("other", config(target_modules=["first"]))
    status = model.get_model_status()
    assert (status.adapter_model_type, status.num_adapter_layers) == ("SparseModel", 2)
    assert status.available_adapters == ["default", "other"]
    assert {layer.name: layer.available_adapters for layer in model.get_layer_status()} == {
        "model.first": ["default", "other"], "model.second": ["default"],
    }  # fmt: skip


def test_inside_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")

    def llama() -> Any:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2,
            )
        )  # fmt: skip

    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21", raising=False)
    ids = torch.tensor([[3, 4, 5]])
    model = llama()
    model.add_adapter(config(target_modules=["q_proj", "down_proj"]))
    wanted = model(ids).logits
    assert not torch.equal(wanted, llama()(ids).logits)
    model.save_pretrained(tmp_path)
    again = llama()
    again.load_adapter(str(tmp_path))
    assert torch.equal(again(ids).logits, wanted)


def test_several_adapters() -> None:
    model = made()
    model.add_adapter("other", config(mask="struct", granule=1, target_modules=["first"]))
    base, one = Net()(INPUT), model(INPUT)
    model.set_adapter("other")
    other = model(INPUT)
    assert not torch.equal(one, other)
    with model.disable_adapter():
        assert torch.equal(model(INPUT), base)
    assert torch.equal(model(INPUT), other)
    model.base_model.set_adapter(["default", "other"])
    plain = dense(model)
    layer = layers(model)[0]
    plain.first.weight.data += layer.get_delta_weight("other").double()
    torch.testing.assert_close(model(INPUT), plain(INPUT.double()).float(), rtol=1e-4, atol=1e-4)
    # A sample each, with two granules in one layer.
    model.eval()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = model(INPUT, adapter_names=["other", "__base__", "default"])
        torch.testing.assert_close(found[0], other[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[2], one[2], rtol=1e-5, atol=1e-5)
        assert torch.equal(found[1], base[1])
    model.delete_adapter("default")
    assert torch.equal(model(INPUT), other)
    assert layers(model)[0].granule == {"other": 1}
    layer.set_scale("other", 0.0)
    assert torch.equal(model(INPUT), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_and_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = made(dtype)
    model.add_adapter("other", config(seed=1, density=0.4, granule=2))
    x, before = INPUT.to(dtype), bits(model)
    unmerged = model(x)
    for _ in range(3):
        model.merge_adapter()
        model.merge_adapter(["other"])  # on top, at overlapping entries
        layers(model)[0].set_scale("other", 3.0)  # too late to matter
        with torch.no_grad():
            layers(model)[1].shira_ops_values["default"].mul_(2).div_(2)
        model.unmerge_adapter()
        assert same_bits(model, before)
    model.merge_adapter()
    torch.testing.assert_close(model(x), unmerged, rtol=2e-2, atol=2e-2)
    # The weight is the base's where the mask has nothing, and apply_'s elsewhere.
    layer, wanted = layers(model)[0], Net(dtype).first.weight.detach()
    values, indices = layer.shira_ops_values["default"].detach(), layer.shira_ops_indices["default"]
    shira_ops.apply_(wanted, indices, values, wanted.new_empty(len(values)), delta=True, granule=8)
    assert torch.equal(layer.base_layer.weight, wanted)
    with model.disable_adapter():
        assert torch.equal(model(x), Net(dtype)(x))
    assert same_bits(model, before)
    merged = model.merge_and_unload()
    assert torch.equal(merged.first.weight, wanted)
    assert type(merged.first) is nn.Linear


def test_merged_and_cast_and_unmerged() -> None:
    model = made()
    model.merge_adapter()
    model.half().unmerge_adapter()
    assert torch.equal(layers(model)[0].base_layer.weight, Net().first.weight.half())


def test_merged_and_loaded_over_and_unmerged(tmp_path: Path) -> None:
    made(seed=5, density=0.3, granule=4).save_pretrained(str(tmp_path))
    model = made()
    before = bits(model.base_model.model.first.base_layer)
    model.merge_adapter()
    model.load_adapter(str(tmp_path), "default")  # other entries, and more of them
    model.unmerge_adapter()
    assert same_bits(model.base_model.model.first.base_layer, before)
    assert torch.equal(model(INPUT), peft.PeftModel.from_pretrained(Net(), str(tmp_path))(INPUT))


def test_a_base_that_two_models_share() -> None:
    net = Net()
    one = peft.get_peft_model(net, config())
    other = peft.get_peft_model(copy.deepcopy(Net()), config(seed=1, density=0.4))
    for part in TARGETS:
        other.get_submodule(f"base_model.model.{part}.base_layer").weight = getattr(net, part).base_layer.weight
    wanted, before = other(INPUT), bits(net)
    assert torch.equal(one(INPUT), made()(INPUT))
    assert torch.equal(other(INPUT), wanted)
    one.merge_adapter()
    other.merge_adapter()
    with pytest.raises(ValueError, match=r"first: its weight was changed since adapter 'default' was merged"):
        one.unmerge_adapter()
    other.unmerge_adapter()
    one.unmerge_adapter()
    assert same_bits(net, before)


def test_safe_merge_and_what_is_merged_twice() -> None:
    model = made()
    before = bits(model.base_model.model.first.base_layer)
    with torch.no_grad():
        layers(model)[0].shira_ops_values["default"][0] = float("inf")
    with pytest.raises(ValueError, match=r"first: with adapter 'default' its weight would not be finite"):
        model.merge_adapter(safe_merge=True)
    assert same_bits(model.base_model.model.first.base_layer, before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layers(model)[0].unmerge()
    layers(model)[1].merge()
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        layers(model)[1].merge()
    assert layers(model)[1].merged_adapters == ["default"]
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")


@pytest.fixture
def quiet() -> Iterator[Any]:
    transformers, accelerate = pytest.importorskip("transformers"), pytest.importorskip("accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and the trainer themselves
        yield transformers
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def test_a_trainer_saves_and_goes_on(quiet: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [
        {"x": torch.randn(32, generator=generator), "labels": torch.randn(16, generator=generator)} for _ in range(16)
    ]

    def run(folder: str, steps: int, resume: bool) -> Any:
        torch.manual_seed(0)
        model = made(init_weights=True)
        options = quiet.TrainingArguments(
            str(tmp_path / folder), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=4,
            max_steps=steps, save_steps=2, logging_strategy="no", learning_rate=0.1, lr_scheduler_type="constant",
        )  # fmt: skip
        quiet.Trainer(model, options, train_dataset=rows).train(resume_from_checkpoint=resume or None)
        return model

    wanted = bits(run("whole", 4, False))
    run("halves", 2, False)
    model = run("halves", 4, True)
    assert same_bits(model, wanted)
    assert layers(model)[0].shira_ops_values["default"].all()
    kept = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "halves" / "checkpoint-4"))
    assert torch.equal(kept(INPUT), model(INPUT))


# ---- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_our_own_adapter_from_its_files(tmp_path: Path, dtype: torch.dtype) -> None:
    model = made(dtype)
    model.save_pretrained(str(tmp_path))
    adapter = Adapter.from_peft(tmp_path, base=Net(dtype))
    assert adapter.delta
    entry = adapter.weights["first.weight"]
    assert entry.granule == 8
    assert torch.equal(entry.indices, layers(model)[0].shira_ops_indices["default"])
    assert torch.equal(entry.values, layers(model)[0].shira_ops_values["default"])
    base = Net(dtype)
    switcher = Switcher(base)
    switcher.add("it", adapter)
    switcher.activate("it")
    merged = model.merge_and_unload()
    assert torch.equal(base.first.weight, merged.first.weight)
    assert torch.equal(base.second.weight, merged.second.weight)
    with pytest.raises(AdapterError, match="SHIRA_OPS is sparse already: density and granule are for LoRA"):
        Adapter.from_peft(tmp_path, base=Net(dtype), density=0.1)


def spoiled(tmp_path: Path, key: str, value: Tensor | None) -> None:
    made().save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = f"base_model.model.second.shira_ops_{key}"
    tensors["base_model.model.first.shira_ops_indices"] = torch.arange(4, dtype=torch.int32)  # of another size
    tensors["base_model.model.first.shira_ops_values"] = torch.zeros(8)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("key", "value", "says", "ours"),
    [
        ("indices", None, "second: what is loaded has shira_ops_indices or shira_ops_values, but not both",
         "module 'second' has no shira_ops_indices"),
        ("indices", torch.arange(7, dtype=torch.int32), r"must be shira_ops_indices times a granule, got .*\[7\]",
         r"a granule for each of .* \[7\] of int32"),
        ("indices", torch.arange(10, dtype=torch.int32).flip(0), "strictly increasing", "strictly increasing"),
        ("indices", torch.arange(90, 100, dtype=torch.int32), r"must .*96", r"must .*96"),
        ("indices", torch.arange(10.0), "must be int32 or int64 and number granules of 8 entries", "whole numbers"),
        ("values", torch.zeros(10 * 7), "granules of 7 entries of a weight of 768, got int32", "768 entries"),
        ("values", torch.zeros(8, 10), "times a granule", "1-D"),
    ],
)  # fmt: skip
def test_files_that_are_broken(tmp_path: Path, key: str, value: Tensor | None, says: str, ours: str) -> None:
    spoiled(tmp_path, key, value)
    model = made()
    before = bits(model)
    with pytest.raises(ValueError, match=says):
        model.load_adapter(str(tmp_path), "default")
    assert same_bits(model, before)
    with pytest.raises(AdapterError, match=ours):
        Adapter.from_peft(tmp_path, base=Net())


def test_a_mask_that_no_file_can_hold(tmp_path: Path) -> None:
    given = masks.Given({f"{part}.weight": getattr(Net(), part).weight > 0.1 for part in TARGETS})
    made(mask=given).save_pretrained(str(tmp_path))
    kept = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert type(kept) is SparseConfig
    assert json.loads((tmp_path / "adapter_config.json").read_text())["mask"]["name"] == "Given"
    kept.inference_mode = False
    fresh = peft.get_peft_model(Net(), kept)  # without the weights
    with pytest.raises(
        RuntimeError, match=r"first: adapter 'default' has no entries yet: its mask was given as tensors"
    ):
        fresh(INPUT)


# ---- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mask": "snip"}, "mask 'snip' needs calibration batches, which PEFT has no place for"),
        ({"mask": "magnitude"}, 'mask must be "rand", "struct", "wm" or one of shira.masks, got \'magnitude\''),
        ({"mask": ["rand"]}, "mask must be"),
        ({"density": 1.5}, "density must be above 0 and at most 1, got 1.5"),
        ({"density": 0.1, "r": 4}, "give density or r, one of the two"),
        ({"granule": 0}, "granule must be a whole number of at least 1"),
        ({"seed": "x"}, "seed must be a whole number or None"),
        (
            {"mask": masks.Rand(density=0.1), "density": 0.5},
            "has density, r and granule of its own, got .* density 0.5",
        ),
    ],
)
def test_configurations_that_cannot_be_meant(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SparseConfig(target_modules=TARGETS, **options)


def test_layers_that_cannot_be_adapted() -> None:
    attention = nn.ModuleDict({"it": nn.MultiheadAttention(16, 2), "conv": nn.Conv1d(4, 4, 1), "act": nn.ReLU()})
    for target, error, says in (
        ("out_proj", ValueError, "it.out_proj belongs to a MultiheadAttention"),
        ("conv", TypeError, "conv is a Conv1d; only linear layers can be adapted"),
        ("act", TypeError, "act is a ReLU; only linear layers"),
    ):
        with pytest.raises(error, match=says):
            peft.get_peft_model(attention, config(target_modules=[target]))
    with pytest.raises(ValueError, match=r"granule 5 must divide the last dimension of every weight"):
        made(granule=5)
    lora = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["first"])).base_model.model
    with pytest.raises(
        ValueError, match=r"first has adapters of another method already \(Linear\); unload those first"
    ):
        SparseModel(lora, {"default": config()}, "default")
    with pytest.raises(ValueError, match="there is no adapter 'x'"):
        made().eval()(INPUT, adapter_names=["x", "default", "default"])


def test_sharded_after_it_and_not_before(tmp_path: Path) -> None:
    """With fully_shard, of one rank."""
    from torch.distributed.fsdp import fully_shard

    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        plain, model, net = made(), made(), Net()
        for module in (*layers(model), model, net.first):
            fully_shard(module, mesh=mesh)
        assert torch.equal(model(INPUT), plain(INPUT))
        for one in (model, plain):
            one(INPUT).square().sum().backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert ours.requires_grad == theirs.requires_grad
            assert not ours.requires_grad or torch.equal(ours.grad.full_tensor(), theirs.grad)
        with pytest.raises(ValueError, match=r"first: .* got a sharded Linear"):
            model.merge_adapter()
        with pytest.raises(ValueError, match=r"the weight of first is sharded .* call get_peft_model first and shard"):
            peft.get_peft_model(net, config())
    finally:
        distributed.destroy_process_group()


def test_a_drawn_seed_is_in_the_configuration(tmp_path: Path) -> None:
    torch.manual_seed(0)
    drawn = config(seed=None)
    assert type(drawn.seed) is int
    drawn.save_pretrained(str(tmp_path))
    again = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert (again.seed, again.made()) == (drawn.seed, drawn.made())
    assert again.peft_type == "SHIRA_OPS"
    assert again.peft_type in list(peft.PeftType)
    assert peft.PeftType("SHIRA_OPS") is peft.PeftType.SHIRA_OPS is pickle.loads(pickle.dumps(again)).peft_type


# ---- without PEFT --------------------------------------------------------------------------------------------


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    import shira.integrations.peft as package

    for name in [name for name in sys.modules if name.startswith("shira.integrations.peft")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    monkeypatch.setattr("shira.integrations.peft", package)  # which the import replaces, and which is put back
    again = importlib.import_module("shira.integrations.peft")
    assert again is not package
    assert again.from_peft == Adapter.from_peft
    assert again.to_peft is Adapter.to_peft
    for name in ("accelerate", "restore", "SparseConfig", "SparseModel"):
        with pytest.raises(
            ImportError,
            match=rf"peft\.{name} needs peft 0\.21 or newer \(.*\); install it with: pip install 'peft>=0\.21'",
        ):
            getattr(again, name)
    with pytest.raises(AttributeError, match="no attribute 'else'"):
        getattr(again, "else")


def test_the_library_does_not_import_peft() -> None:
    """Not when it is imported; only this integration may."""
    folder = Path(shira.__file__).parent
    found = {
        str(path.relative_to(folder))
        for path in folder.rglob("*.py")
        if re.search(r"^(import|from) (peft|transformers)\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert found == {f"integrations/peft/_{name}.py" for name in ("accelerate", "method", "mixed")}
