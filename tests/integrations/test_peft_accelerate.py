"""PEFT's own SHiRA and Super-Tuning layers on our ops: what they compute, and everything PEFT does to them."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

peft = pytest.importorskip("peft", minversion="0.21")
from peft.tuners.shira import layer as shira_layer  # noqa: E402
from peft.tuners.supertuning import layer as super_layer  # noqa: E402

from shira.integrations.peft import SparseConfig, accelerate, restore  # noqa: E402
from tuning import bits, same_bits  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks", "ignore:.*was active which is now deleted", "ignore:.*is_gradient_checkpointing"
)

TARGETS = ["first", "second"]
INPUT = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(24, 40, dtype=dtype)
        self.second = nn.Linear(40, 16, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def scattered(base_layer: nn.Linear, r: int, **options: Any) -> Tensor:
    """A mask with other entries for each layer."""
    rows, columns = base_layer.weight.shape
    mask = torch.zeros(rows * columns)
    mask[torch.randperm(rows * columns, generator=torch.Generator().manual_seed(rows))[: r * (rows + columns)]] = 1
    return mask.view(rows, columns)


def config(kind: str, seed: int = 1, **options: Any) -> Any:
    options = {"target_modules": TARGETS, "init_weights": False, **options}
    if kind == "SUPERTUNING":
        return peft.SupertuningConfig(sparsity=0.9, **options)
    return peft.ShiraConfig(r=2, random_seed=seed, **options)


def made(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(3)
    model = peft.get_peft_model(Net(dtype), config(kind), **options)
    if kind == "SHIRA":
        # PEFT's masks come in order; those of a checkpoint need not.
        for layer in layers(model):
            order = torch.randperm(layer.shira_indices["default"].shape[1])
            layer.shira_indices["default"] = layer.shira_indices["default"][:, order]
    return model


def layers(model: nn.Module) -> list[Any]:
    return [one for one in model.modules() if isinstance(one, (shira_layer.Linear, super_layer.Linear))]


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def gradients(model: nn.Module, run: Callable[[nn.Module], Tensor] = lambda model: model(INPUT)) -> dict[str, Tensor]:
    model.zero_grad()
    run(model).square().sum().backward()
    return {name: one.grad.clone() for name, one in trained(model).items() if one.grad is not None}


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    assert one
    return all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-3) for name in one)


KINDS = pytest.mark.parametrize("kind", ["SHIRA", "SUPERTUNING"])


# ---- the same numbers ----------------------------------------------------------------------------------------


@KINDS
def test_the_same_outputs_and_gradients_and_back_bit_for_bit(kind: str) -> None:
    model = made(kind)
    classes = [type(one) for one in model.modules()]
    before, output, wanted = bits(model), model(INPUT), gradients(model)
    keys = list(model.state_dict())
    assert accelerate(model) is model
    accelerate(model)  # again does nothing
    assert all(not torch.equal(values, torch.zeros_like(values)) for values in wanted.values())
    torch.testing.assert_close(model(INPUT), output, rtol=1e-5, atol=1e-5)
    assert close(gradients(model), wanted)
    assert same_bits(model, before)
    assert list(model.state_dict()) == keys
    assert all(isinstance(layer, (shira_layer.ShiraLayer, super_layer.SupertuningLayer)) for layer in layers(model))
    assert restore(model) is model
    assert [type(one) for one in model.modules()] == classes
    assert torch.equal(model(INPUT), output)
    assert all(type(layer.shira_indices) is dict for layer in layers(model) if kind == "SHIRA")
    assert all(torch.equal(one, wanted[name]) for name, one in gradients(model).items())


def test_the_gradient_of_the_values_is_in_pefts_own_order() -> None:
    """Against a dense delta made by hand, in float64."""
    model = accelerate(made("SHIRA")).double()
    layer = layers(model)[0]
    x = INPUT.double()
    rows, columns = layer.shira_indices["default"].long()
    delta = torch.zeros(40, 24, dtype=torch.float64)
    values = layer.shira_weight["default"].detach().clone().requires_grad_()
    dense = delta.index_put((rows, columns), values)
    (wanted,) = torch.autograd.grad(torch.nn.functional.linear(x, dense).square().sum(), values)
    base = layer.base_layer(x).detach()
    (layer(x) - base).square().sum().backward()
    torch.testing.assert_close(layer.shira_weight["default"].grad, wanted)


@KINDS
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_bf16_is_nearer_to_the_truth_than_pefts(kind: str, autocast_adapter_dtype: bool) -> None:
    model = made(kind, torch.bfloat16, autocast_adapter_dtype=autocast_adapter_dtype)
    x = INPUT.bfloat16()
    # The exact output of the first layer: weight and adapter summed in float64.
    layer = layers(model)[0]
    exact = copy.deepcopy(model).double()
    truth = layers(exact)[0](x.double())
    theirs = layer(x)
    accelerate(model)
    ours = layer(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (ours.double() - truth).abs().max() <= 2**-7 * truth.abs().max()
    assert (ours.double() - truth).norm() <= 1.05 * (theirs.double() - truth).norm()
    ours.float().sum().backward()
    values = layer.shira_weight if kind == "SHIRA" else layer.supertuning_values
    assert values["default"].grad.dtype == values["default"].dtype


@KINDS
def test_autocast_and_gradient_checkpointing(kind: str) -> None:
    def autocasted(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(INPUT)
        assert output.dtype == torch.bfloat16
        return output.float()

    def checkpointed(model: nn.Module) -> Tensor:
        inner = model.base_model.model
        hidden = checkpoint(inner.first, INPUT.clone().requires_grad_(), use_reentrant=True)
        return checkpoint(inner.second, torch.relu(hidden), use_reentrant=False)

    model = made(kind)
    output, plain, cast = autocasted(model), gradients(model), gradients(model, autocasted)
    accelerate(model)
    # Two layers, each of which rounds its output to bf16, and PEFT's its weights, too.
    assert (autocasted(model) - output).norm() < 2**-7 * output.norm()
    found = gradients(model, autocasted)
    assert all((found[name] - cast[name]).norm() < 2e-2 * cast[name].norm() for name in cast)
    assert close(gradients(model, checkpointed), plain)


@KINDS
def test_several_active_adapters_and_scales(kind: str) -> None:
    model = made(kind)
    model.add_adapter("other", config(kind, seed=2))
    model.base_model.set_adapter(["default", "other"])
    if kind == "SHIRA":
        layers(model)[0].set_scale("default", 0.5)
        layers(model)[1].set_scale("other", 0.0)
    output, wanted = model(INPUT), gradients(model)
    accelerate(model)
    torch.testing.assert_close(model(INPUT), output, rtol=1e-5, atol=2e-5)
    assert close(gradients(model), wanted)


def test_hooks_of_the_base_layer_run_and_no_dense_copy_is_made() -> None:
    model = accelerate(made("SHIRA"))
    seen: list[tuple[int, ...]] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and "aten.t." not in str(function) and "detach" not in str(function):
                seen.append(tuple(result.shape))
            return result

    called: list[str] = []
    layers(model)[0].base_layer.register_forward_hook(lambda *args: called.append("base"))
    with Sizes():
        model(INPUT).sum().backward()
    assert called == ["base"]
    assert (3, 5, 40) in seen  # the first layer's output
    assert not {(40, 24), (24, 40), (16, 40), (40, 16)} & set(seen)


# ---- what PEFT does to a model -------------------------------------------------------------------------------


@KINDS
def test_disabling_merging_and_switching(kind: str) -> None:
    plain, model = made(kind), accelerate(made(kind))
    for one in (plain, model):
        one.add_adapter("other", config(kind, seed=2))
    for number, layer in enumerate(layers(model)):  # the same values
        for name, values in (layer.shira_weight if kind == "SHIRA" else layer.supertuning_values).items():
            theirs = layers(plain)[number]
            theirs = theirs.shira_weight if kind == "SHIRA" else theirs.supertuning_values
            with torch.no_grad():
                values.copy_(theirs[name])

    def both(check: Callable[[Any], Tensor]) -> None:
        torch.testing.assert_close(check(model), check(plain), rtol=1e-5, atol=2e-5)

    def disabled(one: Any) -> Tensor:
        with one.disable_adapter():
            output = one(INPUT)
        assert torch.equal(output, Net()(INPUT))
        return output

    def switched(one: Any) -> Tensor:
        one.set_adapter("other")
        output = one(INPUT)
        one.set_adapter("default")
        return output

    def merged(one: Any) -> Tensor:
        one.merge_adapter()
        output = one(INPUT)
        assert layers(one)[0].merged
        one.unmerge_adapter()
        return output

    def deleted(one: Any) -> Tensor:
        one.delete_adapter("default")
        assert layers(one)[0].active_adapters == ["other"]
        return one(INPUT)

    for check in (disabled, switched, merged, deleted, lambda one: one.merge_and_unload()(INPUT)):
        both(check)


@KINDS
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_files_go_both_ways(kind: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    plain = made(kind)
    wanted = plain(INPUT)
    plain.save_pretrained(str(tmp_path / "plain"))
    # Into a model that runs on the ops: as another adapter, and in place of one with other entries.
    model = accelerate(peft.get_peft_model(Net(), config(kind, seed=5)))
    model.load_adapter(str(tmp_path / "plain"), "loaded", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("loaded")
    torch.testing.assert_close(model(INPUT), wanted, rtol=1e-5, atol=1e-5)
    model.load_adapter(str(tmp_path / "plain"), "default")
    model.set_adapter("default")
    torch.testing.assert_close(model(INPUT), wanted, rtol=1e-5, atol=1e-5)
    # And out of it.
    model.save_pretrained(str(tmp_path / "ours"), selected_adapters=["default"])
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        ours, theirs = ((tmp_path / one / name).read_bytes() for one in ("ours", "plain"))
        assert ours == theirs or name == "adapter_config.json"
    again = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "ours"))
    assert torch.equal(again(INPUT), wanted)
    assert type(layers(again)[0]) in (shira_layer.Linear, super_layer.Linear)


def test_a_trainer_saves_and_goes_on(tmp_path: Path) -> None:
    transformers, library = pytest.importorskip("transformers"), pytest.importorskip("accelerate")

    class Lossy(Net):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"loss": (super().forward(x) - labels).square().mean()}

    generator = torch.Generator().manual_seed(1)
    rows = [
        {"x": torch.randn(24, generator=generator), "labels": torch.randn(16, generator=generator)} for _ in range(16)
    ]

    def run(folder: str, steps: int, resume: bool = False, seed: int = 1) -> nn.Module:
        model = accelerate(peft.get_peft_model(Lossy(), config("SHIRA", seed)))
        options = transformers.TrainingArguments(
            str(tmp_path / folder), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=4,
            max_steps=steps, save_steps=2, logging_strategy="no", learning_rate=0.1, lr_scheduler_type="constant",
        )  # fmt: skip
        transformers.Trainer(model, options, train_dataset=rows).train(resume_from_checkpoint=resume or None)
        return model

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch and the trainer themselves
            torch.manual_seed(7)
            wanted = bits(run("whole", 4))
            torch.manual_seed(7)
            run("halves", 2)
            # Another mask, until the checkpoint is there.
            assert same_bits(run("halves", 4, resume=True, seed=2), wanted)
    finally:
        library.state.AcceleratorState._reset_state(reset_partial_state=True)
        library.state.GradientState._reset_state()


@KINDS
def test_copies_and_pickles(kind: str) -> None:
    model = accelerate(made(kind))
    wanted = model(INPUT)
    data = pickle.dumps(model)
    twin, read = copy.deepcopy(model), pickle.loads(data)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for one in (twin, read, torch.load(file, weights_only=False)):
        assert torch.equal(one(INPUT), wanted)
        with torch.no_grad():
            for values in trained(one).values():
                values.zero_()
        assert torch.equal(one(INPUT), Net()(INPUT))
    assert torch.equal(model(INPUT), wanted)
    restore(twin)
    assert torch.equal(twin(INPUT), Net()(INPUT))
    # Plans are made again, and not kept in the file.
    assert len(data) < len(pickle.dumps(restore(model))) + 3000


@KINDS
def test_casts_and_moves(kind: str) -> None:
    model = accelerate(made(kind))
    wanted = model(INPUT)
    model.half()
    torch.testing.assert_close(model(INPUT.half()).float(), wanted, rtol=1e-2, atol=1e-1)
    model.double()
    torch.testing.assert_close(model(INPUT.double()).float(), wanted, rtol=1e-2, atol=1e-1)
    model.to("meta")
    with pytest.raises(RuntimeError, match=r"first: adapter 'default' has no indices yet; load its weights"):
        model(INPUT.double().to("meta"))


@KINDS
@pytest.mark.parametrize("way", ["replaced", "written", "loaded"])
def test_other_indices_are_followed(kind: str, way: str) -> None:
    plain, model = made(kind), accelerate(made(kind))
    model(INPUT)
    for one in (plain, model):
        for layer in layers(one):
            kept = layer.shira_indices if kind == "SHIRA" else layer.supertuning_indices
            fresh = kept["default"].flip(-1)
            if way == "replaced":
                kept["default"] = fresh
            elif way == "written" or kind == "SHIRA":
                kept["default"].copy_(fresh)
            else:
                layer.load_state_dict({"supertuning_indices.default": fresh}, strict=False)
    torch.testing.assert_close(model(INPUT), plain(INPUT), rtol=1e-5, atol=1e-5)


@KINDS
def test_layers_that_join_later(kind: str) -> None:
    model = accelerate(peft.get_peft_model(Net(), config(kind, target_modules=["first"])))
    model.add_adapter("plans", config(kind))  # any name
    model.set_adapter("plans")
    assert len({type(layer) for layer in layers(model)}) == 1
    assert len(layers(model)) == 2
    output = model(INPUT)
    torch.testing.assert_close(restore(model)(INPUT), output, rtol=1e-5, atol=1e-5)


def test_peft_models_inside_others_and_without_a_tuner() -> None:
    inner = Net()
    peft.inject_adapter_in_model(config("SHIRA"), inner)
    outer = nn.Sequential(inner)
    wanted = outer(INPUT)
    torch.testing.assert_close(accelerate(outer)(INPUT), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(restore(outer)(INPUT), wanted)


def test_a_model_is_let_go() -> None:
    model = accelerate(made("SHIRA"))
    gone = weakref.ref(layers(model)[0])
    del model
    gc.collect()
    assert gone() is None


@KINDS
def test_compiled_without_a_graph_break(kind: str) -> None:
    model = accelerate(made(kind))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(INPUT), model(INPUT))
    assert close(gradients(model, lambda _: compiled(INPUT)), gradients(model))
    # What changes afterwards is seen.
    model.add_adapter("other", config(kind, seed=2))
    model.set_adapter("other")
    assert torch.equal(compiled(INPUT), model(INPUT))
    for layer in layers(model):
        kept = layer.shira_indices if kind == "SHIRA" else layer.supertuning_indices
        kept["other"] = kept["other"].flip(-1)
    output = compiled(INPUT)  # before anything else has run
    assert torch.equal(output, model(INPUT))
    if kind == "SUPERTUNING":
        state = model.state_dict()
        key = next(key for key in state if key.endswith("first.supertuning_indices.other"))
        model.load_state_dict({key: state[key].flip(-1)}, strict=False)
        assert not torch.equal(compiled(INPUT), output)
        assert torch.equal(compiled(INPUT), model(INPUT))
    with torch.no_grad():
        layers(model)[0].base_layer.weight.zero_()
    assert torch.equal(compiled(INPUT), model(INPUT))


# ---- an adapter for each sample ------------------------------------------------------------------------------


def mixed(kind: str) -> Any:
    model = accelerate(made(kind))
    torch.manual_seed(4)
    model.add_adapter("other", config(kind, seed=2, target_modules=["first"]))
    return model.eval()


def one_by_one(model: Any, names: list[str]) -> Tensor:
    outputs = []
    for name, x in zip(names, INPUT, strict=True):
        if name == "__base__":
            outputs.append(Net()(x))
        else:
            model.set_adapter(name)
            outputs.append(model(x[None])[0])
    model.set_adapter("default")
    return torch.stack(outputs)


@KINDS
@pytest.mark.parametrize("grad", [True, False])
def test_an_adapter_for_each_sample(kind: str, grad: bool) -> None:
    model = mixed(kind)
    names = ["other", "__base__", "default"]
    if kind == "SHIRA":
        layers(model)[0].set_scale("other", 0.5)
    wanted = one_by_one(model, names)
    with torch.set_grad_enabled(grad):
        found = model(INPUT, adapter_names=names)
    assert found.requires_grad == grad
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
    assert torch.equal(found[1], Net()(INPUT)[1])
    # Nothing of it is left.
    assert all(not layer._forward_pre_hooks for layer in layers(model))
    if grad:
        found.square().sum().backward()
        assert trained(model).keys() == {name for name, one in model.named_parameters() if one.grad is not None}


def test_names_that_cannot_be_meant(tmp_path: Path) -> None:
    model = mixed("SHIRA")
    before = bits(model)
    with pytest.raises(ValueError, match=r"there is no adapter 'stlye'; there are 'default', 'other', and '__base__'"):
        model(INPUT, adapter_names=["stlye", "default", "other"])
    with pytest.raises(ValueError, match=r"got 2 names and an input of shape \[3, 5, 24\]"):
        model(INPUT, adapter_names=["other", "default"])
    with pytest.raises(TypeError, match="must be a list of names, one for each sample, got 'other'"):
        model(INPUT, adapter_names="other")
    with pytest.raises(ValueError, match="must be in eval mode"):
        model.train()(INPUT, adapter_names=["other"] * 3)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match=r"are merged into the weights; call model.unmerge_adapter\(\) first"):
        model(INPUT, adapter_names=["other"] * 3)
    assert all(not layer._forward_pre_hooks for layer in layers(model))
    for name, base in (("first", Net().first), ("second", Net().second)):
        layer = model.get_submodule(f"base_model.model.{name}.base_layer")
        with torch.no_grad():
            layer.weight.copy_(base.weight)  # PEFT's unmerge does not bring back the bits
    for layer in layers(model):
        layer.merged_adapters.clear()
    assert same_bits(model, before)


def test_a_lora_beside_super_tuning_keeps_pefts_forward() -> None:
    torch.manual_seed(3)
    model = peft.get_peft_model(Net(), config("SUPERTUNING", r=2))
    wanted = model(INPUT)
    assert torch.equal(accelerate(model)(INPUT), wanted)
    with pytest.raises(ValueError, match="a LoRA beside it"):
        model.eval()(INPUT, adapter_names=["default"] * 3)


@pytest.mark.parametrize("encoder", [False, True])
def test_generating_with_beams(encoder: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    if encoder:  # which sees each sample once
        base = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0,
                pad_token_id=0, eos_token_id=31,
            )
        )  # fmt: skip
    targets = {"target_modules": ["q", "wo"] if encoder else ["q_proj", "down_proj"]}
    model = accelerate(peft.get_peft_model(base, config("SHIRA", **targets)))
    model.add_adapter("other", config("SHIRA", seed=2, **targets))
    model.eval()
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {}):
        options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
        wanted = []
        for name in ("default", "other"):
            model.set_adapter(name)
            wanted.append(model.generate(input_ids=ids, **options))
        found = model.generate(input_ids=ids, adapter_names=["other", "default"], **options)
        each = len(found) // 2
        assert torch.equal(found[:each], wanted[1][:each])
        assert torch.equal(found[each:], wanted[0][each:])


# ---- what is refused -----------------------------------------------------------------------------------------


def test_what_has_no_such_layers_is_refused() -> None:
    for model in (Net(), peft.get_peft_model(Net(), SparseConfig(density=0.1, granule=8, target_modules=TARGETS))):
        with pytest.raises(ValueError, match="no linear layers of PEFT's SHiRA or Super-Tuning"):
            accelerate(model)
    with pytest.raises(TypeError, match="accelerate: takes a module, got dict"):
        accelerate({})  # type: ignore[type-var]
    model = Net()
    assert restore(model) is model


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda indices: indices.index_fill_(1, torch.tensor([1]), 0).index_fill_(1, torch.tensor([2]), 0),
         "second, adapter 'default': its indices name an entry twice"),
        (lambda indices: indices.add_(100), r"an entry outside of the weight's \[16, 40\]"),
        (lambda indices: indices.mul_(-1), r"an entry outside of the weight's \[16, 40\]"),
    ],
)  # fmt: skip
def test_wrong_indices_are_refused_before_anything_is_changed(spoil: Callable[[Tensor], object], says: str) -> None:
    model = made("SHIRA")
    spoil(layers(model)[1].shira_indices["default"])
    classes = [type(one) for one in model.modules()]
    with pytest.raises(ValueError, match=f"accelerate: .*{says}"):
        accelerate(model)
    assert [type(one) for one in model.modules()] == classes
    assert all(type(layer.shira_indices) is dict for layer in layers(model))


def test_wrong_indices_in_a_file_are_refused(tmp_path: Path) -> None:
    broken = made("SHIRA")
    layers(broken)[0].shira_indices["default"][0, 0] = 40
    broken.save_pretrained(str(tmp_path))
    model = accelerate(made("SHIRA"))
    wanted = model(INPUT)
    with pytest.raises(ValueError, match=r"first, adapter 'default': its indices name an entry outside"):
        model.load_adapter(str(tmp_path), "default")
    assert torch.equal(model(INPUT), wanted)


def test_other_peoples_forwards_and_classes_are_refused() -> None:
    model = made("SHIRA")
    layer = layers(model)[1]
    layer.forward = layer.forward
    with pytest.raises(ValueError, match=r"the forward of base_model.model.second was replaced on the object"):
        accelerate(model)
    del layer.forward

    class Special(shira_layer.Linear):  # type: ignore[misc]
        pass

    plain = layer.__class__
    layer.__class__ = Special
    with pytest.raises(ValueError, match=r"is a .*Special, a subclass of PEFT's own class"):
        accelerate(model)
    assert type(layers(model)[0]) is shira_layer.Linear
    # What others make of our class, as fully_shard does.
    layer.__class__ = plain
    accelerate(model)
    layer.__class__ = type("Sharded", (type(layer),), {})
    wanted = model(INPUT)
    assert torch.equal(accelerate(model)(INPUT), wanted)
    with pytest.raises(ValueError, match=r"restore: base_model.model.second is a Sharded now, a class that was made"):
        restore(model)
    assert type(layers(model)[0]) is not shira_layer.Linear


def test_quantized_layers_are_not_dequantized() -> None:
    from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend

    model = made("SHIRA")
    for layer in layers(model):
        layer.quantization_backend = ForwardOnlyQuantizationBackend("codes")  # refuses to give the weight
    wanted = model(INPUT)
    torch.testing.assert_close(accelerate(model)(INPUT), wanted, rtol=1e-5, atol=1e-5)


@KINDS
def test_inputs_of_any_shape(kind: str) -> None:
    plain, model = made(kind), accelerate(made(kind))
    for x in (INPUT[0, 0], INPUT[:0], INPUT.transpose(0, 1), INPUT[:, ::2], INPUT.unsqueeze(1)):
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)


@KINDS
def test_pefts_own_reports(kind: str) -> None:
    plain, model = made(kind), accelerate(made(kind))
    assert model.get_model_status() == plain.get_model_status()
    found, wanted = ([vars(layer) for layer in one.get_layer_status()] for one in (model, plain))
    for ours, theirs in zip(found, wanted, strict=True):
        kinds = ours.pop("module_type"), theirs.pop("module_type")
        assert re.sub("Shira(?=Linear)|Supertuning(?=Linear)", "", kinds[0]) == kinds[1]
        assert ours == theirs
