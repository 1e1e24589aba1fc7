"""Training a delta beside weights that are not written: `SparseTuner(..., overlay=True)`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import shira
from quantized import KINDS, Int8Linear
from shira import SparseTuner, masks
from shira.sync import Publisher
from tuning import bits, indices_of, randomize, same_bits

MASK = masks.Rand(density=0.2, granule=4)


class Net(nn.Module):
    """Every kind of layer that something can be laid over, and a tied head."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        self.embedding, self.conv1d = nn.Embedding(20, 8, padding_idx=0), conv1d(12, 8)
        self.linear, self.head = nn.Linear(12, 8), nn.Linear(8, 20, bias=False)
        self.to(dtype)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.linear(torch.tanh(self.conv1d(self.embedding(tokens))))
        return self.head(hidden)


TOKENS = torch.tensor([[1, 4, 4, 0, 19], [7, 0, 3, 4, 11]])


def loss_of(model: nn.Module) -> Tensor:
    output: Tensor = model(TOKENS).float()
    return (output - 0.1).square().mean()


def train(tuner: SparseTuner, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def fill(tuner: SparseTuner, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in tuner.parameters():
            values.copy_(torch.randn(values.shape, generator=generator, dtype=torch.float64) * 0.1)


def fused(model: nn.Module, tuner: SparseTuner) -> nn.Module:
    """A twin of the base whose weights are the base plus the tuner's deltas, and require grad."""
    twin = copy.deepcopy(model)
    shira.detach(twin)
    with torch.no_grad():
        for name, values in tuner.named_parameters():
            weight, indices = twin.get_parameter(name.removesuffix("_shira_values")), indices_of(model, name)
            granules = weight.view(-1, values.numel() // indices.numel())
            granules[indices.long()] += values.view(len(indices), -1).to(weight.dtype)
    return twin.requires_grad_(True)


# ---- what it computes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("granule", [1, 4])
def test_outputs_and_gradients_are_those_of_a_dense_delta(granule: int) -> None:
    model = randomize(Net())
    before = bits(model)
    targets = ["embedding", "conv1d", "linear"]
    with SparseTuner(model, masks.Rand(density=0.3, granule=granule), targets, overlay=True) as tuner:
        assert [values.dtype for values in tuner.parameters()] == [torch.float64] * 3
        assert all(not values.any() for values in tuner.parameters())
        fill(tuner)
        twin = fused(model, tuner)
        torch.testing.assert_close(model(TOKENS), twin(TOKENS), rtol=1e-12, atol=1e-12)
        loss_of(model).backward()
        loss_of(twin).backward()
        for name, values in tuner.named_parameters():
            dense = twin.get_parameter(name.removesuffix("_shira_values")).grad
            assert dense is not None
            wanted = dense.view(-1, granule)[indices_of(model, name).long()].view(-1)
            torch.testing.assert_close(values.grad, wanted, rtol=1e-10, atol=1e-12)
    assert same_bits(model, before)


def test_new_values_leave_every_bit_of_the_output() -> None:
    model = randomize(Net(torch.bfloat16))
    before = model(TOKENS)
    with SparseTuner(model, MASK, ["embedding", "conv1d", "linear"], overlay=True):
        assert torch.equal(model(TOKENS), before)


def test_nothing_is_written_and_nothing_stays() -> None:
    model = randomize(Net())
    before, state = bits(model), {name: weight._version for name, weight in model.named_parameters()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    tuner = SparseTuner(model, MASK, overlay=True)
    train(tuner, shira.AdamW(tuner, lr=0.1), lambda: loss_of(model), 2)
    tuner.verify()
    assert {name: model.get_parameter(name)._version for name in state} == state
    tuner.detach()
    assert same_bits(model, before)
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert not any(name.startswith("_shira") for module in model.modules() for name in vars(module))


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (lambda p: shira.AdamW(p, lr=0.02), lambda p: torch.optim.AdamW(p, lr=0.02)),
        (lambda p: shira.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (
            lambda p: shira.AdamW(p, lr=0.02, weight_decay=0.1, decay_towards="base"),
            lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
        ),
    ],
)
def test_optimizers(ours: Callable[[Any], Any], torchs: Callable[[Any], Any]) -> None:
    found = []
    for make in (ours, torchs):
        model = randomize(Net())
        tuner = SparseTuner(model, MASK, overlay=True)
        losses = train(tuner, make(list(tuner.parameters())), lambda model=model: loss_of(model), 4)  # type: ignore[misc]
        assert losses[-1] < losses[0]
        found.append([values.detach().clone() for values in tuner.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_base_is_where_decay_leads() -> None:
    model = randomize(Net())
    tuner = SparseTuner(model, MASK, overlay=True)
    fill(tuner)
    before = [values.detach().clone() for values in tuner.parameters()]
    optimizer = shira.AdamW(tuner, lr=0.5, weight_decay=1.0, decay_towards="base")
    for values in tuner.parameters():
        values.grad = torch.zeros_like(values)
    optimizer.step()
    for values, start in zip(tuner.parameters(), before, strict=True):
        assert torch.equal(values, start * 0.5)


def test_compiled_into_one_graph() -> None:
    model = randomize(Net(torch.float32))
    tuner = SparseTuner(model, MASK, ["embedding", "conv1d", "linear"], overlay=True)
    fill(tuner)
    wanted = model(TOKENS)
    wanted.square().sum().backward()
    gradients = [values.grad for values in tuner.parameters()]
    tuner_free = torch.compile(model, fullgraph=True, backend="aot_eager")
    for values in tuner.parameters():
        values.grad = None
    found = tuner_free(TOKENS)
    found.square().sum().backward()
    torch.testing.assert_close(found, wanted)
    for values, gradient in zip(tuner.parameters(), gradients, strict=True):
        torch.testing.assert_close(values.grad, gradient)
    with torch.no_grad():
        for values in tuner.parameters():
            values.zero_()
    assert not torch.allclose(tuner_free(TOKENS), wanted)
    with tuner.disabled():
        torch.testing.assert_close(tuner_free(TOKENS), model(TOKENS))


def test_autocast() -> None:
    model = randomize(Net(torch.float32))
    tuner = SparseTuner(model, MASK, ["conv1d", "linear"], overlay=True)
    fill(tuner)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(TOKENS)
    assert output.dtype == torch.bfloat16
    twin = fused(model, tuner)
    torch.testing.assert_close(output.float(), twin(TOKENS), rtol=0.05, atol=0.05)
    output.float().sum().backward()
    assert all(values.grad is not None and values.grad.dtype == torch.float32 for values in tuner.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = randomize(Net())
    tuner = SparseTuner(model, MASK, ["conv1d", "linear"], overlay=True)
    fill(tuner)
    loss_of(model).backward()
    wanted = [values.grad for values in tuner.parameters()]
    for values in tuner.parameters():
        values.grad = None
    hidden = model.embedding(TOKENS).requires_grad_(reentrant)  # the reentrant kind needs an input that requires grad
    hidden = checkpoint(lambda x: model.linear(torch.tanh(model.conv1d(x))), hidden, use_reentrant=reentrant)
    (model.head(hidden).float() - 0.1).square().mean().backward()
    for values, gradient in zip(tuner.parameters(), wanted, strict=True):
        assert torch.equal(values.grad, gradient)  # type: ignore[arg-type]


def test_accumulation_clipping_and_the_trainer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    batches = [torch.randn(4, 16) for _ in range(4)]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - 1).square().mean()

    def fit(tuner: SparseTuner, epochs: int, resume: bool) -> list[Tensor]:
        optimizer = shira.AdamW(tuner, lr=0.01)
        trainer = shira.Trainer(
            tuner, batches, loss=loss, optimizer=optimizer, accumulate=2, clip=0.1, progress=False,
            checkpoint=tmp_path / "run.pt",
        )  # fmt: skip
        trainer = trainer.resume(tmp_path / "run.pt") if resume else trainer
        trainer.fit(epochs=epochs)
        return [values.detach().clone() for values in tuner.parameters()]

    with SparseTuner(model, MASK, overlay=True) as tuner:
        whole = fit(tuner, 4, resume=False)
    with SparseTuner(model, MASK, overlay=True) as tuner:
        fit(tuner, 2, resume=False)
    with SparseTuner(model, MASK, overlay=True) as tuner:
        assert all(map(torch.equal, fit(tuner, 4, resume=True), whole))


def test_disabled_is_the_base() -> None:
    model = randomize(Net())
    base = model(TOKENS)
    tuner = SparseTuner(model, MASK, overlay=True)
    fill(tuner)
    trained = model(TOKENS)
    with tuner.disabled():
        assert torch.equal(model(TOKENS), base)
    assert torch.equal(model(TOKENS), trained)
    assert not torch.equal(trained, base)


def test_a_copy_computes_the_same() -> None:
    model = randomize(Net())
    base = model(TOKENS)
    tuner = SparseTuner(model, MASK, overlay=True)
    fill(tuner)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(TOKENS), model(TOKENS))
    shira.detach(twin)
    assert torch.equal(twin(TOKENS), base)
    assert not torch.equal(model(TOKENS), base)


# ---- the adapter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_is_a_delta_for_this_base(tmp_path: Path, dtype: torch.dtype) -> None:
    model = randomize(Net(dtype))
    with SparseTuner(model, MASK, overlay=True) as tuner:
        fill(tuner)
        adapter, trained = tuner.adapter(provenance={"a": 1}), model(TOKENS)
        values = {name.removesuffix("_shira_values"): one.detach().clone() for name, one in tuner.named_parameters()}
    adapter.save(tmp_path / "delta.safetensors")
    loaded = shira.Adapter.load(tmp_path / "delta.safetensors")
    assert loaded.delta
    for name, entry in loaded.weights.items():
        assert entry.dtype == dtype
        assert torch.equal(entry.values, values[name])
    for server in (shira.Switcher(model), shira.Overlay(model)):
        server.add("delta", loaded)
        with server.using("delta"):
            torch.testing.assert_close(model(TOKENS), trained, rtol=2**-5, atol=2**-5)
    with torch.no_grad():
        model.linear.weight.view(-1)[0] += 1
    with pytest.raises(shira.AdapterError, match="was made for another base"):
        SparseTuner.from_adapter(model, loaded, overlay=True)


@pytest.mark.parametrize("overlay", [True, False])
def test_training_goes_on_from_either_kind(overlay: bool) -> None:
    """From an overlay's adapter in place, and from an overwriting one as an overlay."""
    model = randomize(Net())
    before = bits(model)
    with SparseTuner(model, MASK, overlay=overlay) as tuner:
        train(tuner, shira.AdamW(tuner, lr=0.05), lambda: loss_of(model), 2)
        adapter, trained = tuner.adapter(alpha=0.5), model(TOKENS)
    for again in (overlay, not overlay):
        with SparseTuner.from_adapter(model, adapter, overlay=again) as tuner:
            torch.testing.assert_close(model(TOKENS), trained, rtol=1e-12, atol=1e-12)
            assert tuner.adapter().delta == again
            assert tuner.adapter().alpha == 0.5
            train(tuner, shira.AdamW(tuner, lr=0.05), lambda: loss_of(model), 1)
        assert same_bits(model, before)


def test_states_of_the_two_kinds_are_not_mixed() -> None:
    model = randomize(Net())
    states = []
    for overlay in (True, False):
        with SparseTuner(model, MASK, overlay=overlay) as tuner:
            fill(tuner)
            states.append(tuner.state_dict())
            tuner.load_state_dict(states[-1])
    for overlay, state in zip((False, True), states, strict=True):
        with SparseTuner(model, MASK, overlay=overlay) as tuner, pytest.raises(ValueError, match="another kind"):
            tuner.load_state_dict(state)


# ---- quantized bases -----------------------------------------------------------------------------------------


def quantized(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(64, 128), nn.Linear(128, 64))
    one, two = (KINDS[kind](layer.to(dtype)) for layer in layers)
    return nn.Sequential(one, nn.Tanh(), two)


def plain_twin(model: nn.Module) -> nn.Module:
    """The same with ordinary layers, of the dequantized weights."""
    twin = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    layers = shira._linears.find(model)
    with torch.no_grad():
        for name, layer in layers.items():
            twin.get_parameter(name).copy_(layer.dense())
            twin.get_parameter(name.replace("weight", "bias")).copy_(layer.module.bias)  # type: ignore[arg-type]
    return twin


@pytest.mark.parametrize("kind", KINDS)
def test_over_quantized_layers(kind: str, tmp_path: Path) -> None:
    model = quantized(kind)
    twin, x = plain_twin(model), torch.randn(5, 64)
    base, layers = model(x), shira._linears.find(model)
    stored = [[tensor.clone() for tensor in layer.stored()] for layer in layers.values()]
    with SparseTuner(model, MASK, overlay=True) as tuner, SparseTuner(twin, MASK, overlay=True) as other:
        assert torch.equal(model(x), base)
        fill(tuner)
        fill(other)
        for one in (model, twin):
            one(x).square().mean().backward()
        tolerance = 0.05 if kind == "bitsandbytes int8" else 1e-4  # its inputs are rounded to int8, too
        torch.testing.assert_close(model(x), twin(x), rtol=tolerance, atol=tolerance)
        for values, wanted in zip(tuner.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(values.grad, wanted.grad, rtol=tolerance, atol=tolerance)
        optimizer = shira.AdamW(tuner, lr=0.01)
        losses = train(tuner, optimizer, lambda: (model(x) - 1).square().mean(), 3)
        model.eval()
        with torch.no_grad():  # on some CPUs bitsandbytes would pack its codes here, and give no gradient any more
            model(x)
        model.train()
        losses += train(tuner, optimizer, lambda: (model(x) - 1).square().mean(), 2)
        assert losses == sorted(losses, reverse=True)
        kept = {name: values.detach().clone() for name, values in tuner.named_parameters()}
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in kept}
        fill(tuner)
        model.load_state_dict(saved, strict=False)
        assert all(torch.equal(values, kept[name]) for name, values in tuner.named_parameters())
        tuner.adapter().save(tmp_path / "delta.safetensors")
        trained = model(x)
        tuner.verify()
    for layer, before in zip(layers.values(), stored, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(layer.stored(), before, strict=True))
    assert torch.equal(model(x), base)
    with SparseTuner.from_adapter(model, tmp_path / "delta.safetensors", overlay=True):
        assert torch.equal(model(x), trained)
    overlay = shira.Overlay(model)
    overlay.add("delta", tmp_path / "delta.safetensors")
    with overlay.using("delta"):
        torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(x), base)
    overlay.detach()
    # Another base, by one bit of a code.
    codes = layers["0.weight"].stored()[0].view(-1).view(torch.uint8)
    with torch.no_grad():
        codes[0] ^= 1
    with pytest.raises(shira.AdapterError, match=r"made for another base: the content of 1 of 2 weights differs"):
        SparseTuner.from_adapter(model, tmp_path / "delta.safetensors", overlay=True)


def test_packed_4_bits_compute_no_gradient() -> None:
    model = quantized("bitsandbytes nf4")
    with SparseTuner(model, MASK, overlay=True):
        assert model[0].support_avx512bf16_for_cpu is False  # type: ignore[index]
    weight, functional = model[0].weight, pytest.importorskip("bitsandbytes").functional  # type: ignore[index]
    assert model[0].support_avx512bf16_for_cpu == functional.has_avx512bf16()  # type: ignore[index]
    weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(ValueError, match=r"0\.weight was packed for this CPU by bitsandbytes"):
        SparseTuner(model, MASK, overlay=True)


def test_bases_that_torch_moves_by_swapping_tensors() -> None:
    """It refuses tensors with weak references."""
    model = nn.Sequential(nn.Linear(64, 64))
    x = torch.randn(5, 64)
    with SparseTuner(model, MASK, overlay=True) as tuner:
        fill(tuner)
        before = model(x)
        torch.utils.swap_tensors(model[0].weight, nn.Parameter(model[0].weight.detach().clone(), requires_grad=False))
        assert torch.equal(model(x), before)
        tuner.verify()


@pytest.mark.parametrize("kind", ["bitsandbytes nf4", "torchao int8", "torchao float8", "quanto int8"])
def test_a_quantized_model_may_be_moved_while_it_trains(kind: str) -> None:
    model, x = quantized(kind), torch.randn(5, 64)
    with SparseTuner(model, MASK, overlay=True) as tuner:
        fill(tuner)
        before = model(x).detach()
        model.to("cpu")
        assert torch.equal(model(x), before)
        optimizer = shira.AdamW(tuner, lr=0.05)
        model(x).square().mean().backward()
        optimizer.step()
        assert not torch.equal(model(x), before)
        tuner.verify()


@pytest.mark.parametrize("kind", ["bitsandbytes nf4", "bitsandbytes int8", "torchao int8", "quanto int8"])
def test_a_tuner_that_writes_names_the_overlay(kind: str) -> None:
    with pytest.raises(ValueError, match=r"0\.weight .*train a delta beside it with overlay=True"):
        SparseTuner(quantized(kind), MASK)


def test_transformers_trainer_takes_a_quantized_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    integration = pytest.importorskip("shira.integrations.transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model.is_quantized = True
    kind = type("Trainer", (integration.AdapterCheckpoints, transformers.Trainer), {})
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with SparseTuner(model, MASK) as tuner, pytest.raises(ValueError, match="purely quantized"):
        kind(model, arguments, tuner=tuner)
    with SparseTuner(model, MASK, overlay=True) as tuner:
        kind(model, arguments, tuner=tuner)
    assert "_hf_peft_config_loaded" not in vars(model)


def by_name(name: str, weight: Tensor) -> Tensor:
    return weight.abs() > weight.abs().mean()


@pytest.mark.parametrize("kind", ["own int8", "bitsandbytes nf4", "torchao int8", "quanto int8"])
@pytest.mark.parametrize(
    "mask",
    [
        masks.Struct(density=0.1),
        masks.WeightMagnitude(density=0.1, granule=4),
        masks.WeightMagnitude(density=0.1, balanced=True),
        masks.Grad(density=0.1),
        masks.Snip(density=0.1, granule=2),
        masks.Rand(density=0.1, skip=masks.WeightMagnitude(density=0.1)),
        by_name,
    ],
    ids=["Struct", "WM", "WM balanced", "Grad", "Snip", "skip", "function"],
)
def test_masks_over_quantized_layers_are_those_of_the_dequantized(kind: str, mask: Any) -> None:
    model, x = quantized(kind), torch.randn(5, 64)
    twin = plain_twin(model)
    options: dict[str, Any] = {}
    if isinstance(mask, (masks.Grad, masks.Snip)):
        options = {"calibration": [x], "loss": lambda model, batch: model(batch).square().sum()}
    with SparseTuner(model, mask, overlay=True, **options) as tuner, SparseTuner(twin, mask, **options) as other:
        for name, _ in tuner.named_parameters():
            assert torch.equal(indices_of(model, name), indices_of(twin, name))
        assert tuner.nnz == other.nnz


def test_one_layer_at_a_time_is_dequantized() -> None:
    model = quantized("own int8")
    live: list[str] = []

    for name, module in model.named_children():
        if isinstance(module, Int8Linear):
            real = module.dequantize

            def counted(real: Callable[[], Tensor] = real, name: str = name) -> Tensor:
                live.append(name)
                return real()

            module.dequantize = counted  # type: ignore[method-assign]
    with SparseTuner(model, masks.Rand(density=0.1), overlay=True):
        assert live == []
    with SparseTuner(model, masks.WeightMagnitude(density=0.1), overlay=True):
        assert live == ["0", "2"]


def test_a_layer_that_gives_its_input_no_gradient_is_refused() -> None:
    class Blind(Int8Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.detach())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Blind(nn.Linear(8, 8)))
    SparseTuner(model, MASK, overlay=True)
    with pytest.raises(RuntimeError, match=r"the Blind of 1\.weight computes no gradient of its input"):
        model(torch.randn(2, 8))
    with torch.no_grad():
        model(torch.randn(2, 8))


def test_compiled_over_a_quantized_layer() -> None:
    model, x = quantized("own int8"), torch.randn(5, 64)
    tuner = SparseTuner(model, MASK, overlay=True)
    fill(tuner)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


# ---- what is refused -----------------------------------------------------------------------------------------


class Odd(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"targets": ["conv"]}, r"conv\.weight belongs to a Conv1d, and it is not known how that computes with it"),
        ({"targets": ["odd"]}, r"odd\.weight belongs to a Odd, and it is not known .*; leave it out with exclude="),
        ({"targets": r"linear\.bias"}, r"linear\.bias is not the weight of the Linear that has it"),
        ({"targets": ["counts"]}, r"counts\.weight scales its gradient by frequency"),
        ({"targets": ["normed"]}, r"normed\.weight is changed by its own forward \(max_norm=1\)"),
        ({"targets": ["linear"], "whole": ["odd"]}, "an overlay writes none: train them with a second tuner"),
        ({"targets": ["linear"], "gradient": "dense"}, 'an overlay has no gradient="dense"'),
        ({}, r"odd\.weight belongs to a Odd"),
    ],
)  # fmt: skip
def test_refusals(options: dict[str, Any], says: str) -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(8, 8), "odd": Odd(8, 8), "conv": nn.Conv1d(4, 4, 4),
            "counts": nn.Embedding(4, 8, scale_grad_by_freq=True), "normed": nn.Embedding(4, 8, max_norm=1.0),
        }
    )  # fmt: skip
    before = bits(model)
    with pytest.raises(ValueError, match=says):
        SparseTuner(model, MASK, overlay=True, **options)
    assert same_bits(model, before)
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_that_no_overlay_can_train() -> None:
    model = randomize(Net())
    with SparseTuner(model, MASK, ["linear"], whole=["head"]) as tuner:
        adapter = tuner.adapter()
    with pytest.raises(shira.AdapterError, match="has granules of 160 entries, which do not divide its rows of 8"):
        SparseTuner.from_adapter(model, adapter, overlay=True)
    other = nn.Sequential(nn.Linear(8, 8))
    with SparseTuner(other, MASK) as tuner:
        adapter = tuner.adapter()
    with pytest.raises(shira.AdapterError, match=r"'0\.weight' is not in the model"):
        SparseTuner.from_adapter(model, adapter, overlay=True)


def test_two_tuners_on_one_model() -> None:
    """A head in place, and the layers below as an overlay."""
    model = randomize(Net())
    before = bits(model)
    tuners = SparseTuner(model, MASK, ["conv1d"], overlay=True), SparseTuner(model, MASK, ["linear"])
    with pytest.raises(ValueError, match=r"conv1d\.weight is already trained by a tuner"):
        SparseTuner(model, MASK, ["conv1d"], overlay=True)
    loss_of(model).backward()
    assert all(values.grad is not None for tuner in tuners for values in tuner.parameters())
    tuners[0].detach()
    tuners[1].detach()
    assert same_bits(model, before)


def test_a_publisher_has_nothing_to_send() -> None:
    tuner = SparseTuner(randomize(Net()), MASK, overlay=True)
    with pytest.raises(ValueError, match="writes no weights, so there is nothing to publish"):
        Publisher(tuner)


def test_a_cast_of_the_values_is_refused() -> None:
    model = randomize(Net(torch.float32))
    SparseTuner(model, MASK, ["linear"], overlay=True)
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="must stay float32, got bfloat16"):
        model(TOKENS)
