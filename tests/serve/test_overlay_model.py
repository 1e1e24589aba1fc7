"""Overlay: the outputs of the fused model, sample by sample, from weights that nobody writes."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import shira
from quantized import KINDS
from shira import Adapter, AdapterError, Entry, Overlay, SparseTuner, Switcher, SwitchError, masks
from shira.serve._laying import EXPERTS

Strengths = Mapping[str, float]
IDS = torch.tensor([[1, 4, 4, 0, 19], [7, 0, 3, 4, 11], [2, 2, 9, 1, 0]])
# A name, a strength of it, several, the base.
SAMPLES = ("a", {"b": 0.5}, {"a": -0.75, "b": 2.0})


class Net(nn.Module):
    """Every kind of layer that something can be laid over, and a tied head."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        self.embedding, self.conv1d = nn.Embedding(20, 8, padding_idx=0), conv1d(12, 8)
        self.linear, self.head = nn.Linear(12, 8), nn.Linear(8, 20, bias=False)
        self.to(dtype).eval()
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.linear(torch.tanh(self.conv1d(self.embedding(tokens)))))


def entry(weight: Tensor, seed: int, granule: int, delta: bool, aliases: tuple[str, ...] = ()) -> Entry:
    """A third of a weight's granules changed; of a bias, all of it."""
    generator = torch.Generator().manual_seed(seed)
    flat = weight.detach().reshape(-1)
    granule = flat.numel() if weight.dim() == 1 else granule
    count = flat.numel() // granule
    indices = torch.randperm(count, generator=generator)[: max(1, count // 3)].sort().values
    change = 0.3 * torch.randn(indices.numel() * granule, generator=generator)
    values = change if delta else flat.view(-1, granule)[indices].view(-1) + change
    fingerprint = int(torch.ops.shira.fingerprint(flat)) & (2**64 - 1)
    shape = tuple(weight.shape)
    return Entry(
        indices.to(torch.int32), values.to(weight.dtype), shape, weight.dtype, granule, fingerprint, None, aliases
    )


def adapter_of(model: nn.Module, seed: int, granule: int = 1, delta: bool = False, names: str = "") -> Adapter:
    tied = {"embedding.weight": ("head.weight",)}
    weights = {
        name: entry(weight, seed + number, granule, delta, tied.get(name, ()))
        for number, (name, weight) in enumerate(model.named_parameters())
        if names in name
    }
    return Adapter(weights, delta=delta)


def fused(model: nn.Module, adapters: Mapping[str, Adapter], which: str | Strengths | None) -> nn.Module:
    """A copy with the adapters in its weights: the definition, in float64 and rounded once."""
    strengths = {} if which is None else {which: adapters[which].alpha} if isinstance(which, str) else which
    made = copy.deepcopy(model)
    named = dict(made.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            total = weight.detach().double().reshape(-1).clone()
            for adapter, alpha in ((adapters[key], alpha) for key, alpha in strengths.items()):
                if name in adapter.weights:
                    one = adapter.weights[name]
                    at = one.indices.long()
                    change = torch.zeros_like(total).view(-1, one.granule)
                    change[at] = one.values.double().view(-1, one.granule)
                    if not adapter.delta:
                        change[at] -= weight.double().reshape(-1, one.granule)[at]
                    total += alpha * change.view(-1)
            named[name].copy_(total.view(weight.shape))
    return made


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    return {"a": adapter_of(model, 1), "b": adapter_of(model, 50, granule=4, delta=True)}


def overlay_of(model: nn.Module, adapters: Mapping[str, Adapter]) -> Overlay:
    overlay = Overlay(model)
    for name, adapter in adapters.items():
        overlay.add(name, adapter)
    return overlay


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: Mapping[str, Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in before)


# ---- the sums --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_the_outputs_of_the_fused_model(mode):
    model = Net()
    before, adapters = bits(model), adapters_of(model)
    overlay = overlay_of(model, adapters)
    with mode():
        base = model(IDS)
        expected = [fused(model, adapters, which)(IDS) for which in SAMPLES]
        for which, wanted in zip(SAMPLES, expected, strict=True):
            with overlay.using(which):
                torch.testing.assert_close(model(IDS), wanted, rtol=1e-12, atol=1e-12)
            assert (wanted - base).abs().max() > 0.1
        with overlay.using([*SAMPLES[:2], None]):
            mixed = model(IDS)
        assert torch.equal(mixed[2], base[2])
        for sample in (0, 1):
            torch.testing.assert_close(mixed[sample], expected[sample][sample], rtol=1e-12, atol=1e-12)
        # One adapter with several strengths, and several for one sample.
        with overlay.using([{"a": 2.0}, {"a": 1.0, "b": 0.0}, SAMPLES[2]]):
            mixed = model(IDS)
        for sample, which in enumerate(({"a": 2.0}, "a", SAMPLES[2])):
            wanted = fused(model, adapters, which)(IDS)
            torch.testing.assert_close(mixed[sample], wanted[sample], rtol=1e-12, atol=1e-12)
        assert torch.equal(model(IDS), base)
    assert same(model, before)
    overlay.verify()


@pytest.mark.parametrize(("dtype", "half"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11), (torch.float32, 0)])
@pytest.mark.parametrize("which", ["a", {"b": 0.5}, {"a": 1.0, "b": -0.5}])
def test_how_far_from_the_exact_sum(dtype, half, which):
    torch.manual_seed(1)
    model = nn.Linear(64, 48).to(dtype)
    adapters = adapters_of(model)
    input = torch.randn(33, 64).to(dtype)
    with torch.no_grad(), overlay_of(model, adapters).using(which):
        found = model(input).double()
    wide = copy.deepcopy(model).double()
    wide._forward_hooks.clear()
    wanted = fused(wide, adapters, which)
    base, exact = wide(input.double()), wanted(input.double())
    magnitude = input.double().abs() @ wanted.weight.abs().T + wanted.bias.abs()
    # Half a unit in the last place of each of the two roundings; at least that of the smallest normal number.
    rounded = half * 1.01 * (base.abs() + exact.abs()) + (2.0**-24 if dtype == torch.float16 else 0)
    assert bool(((found - exact).abs() <= rounded + 1e-5 * magnitude).all())


def test_autocast_computes_as_the_layers_do():
    model = Net(torch.float32)
    adapters = adapters_of(model)
    overlay = overlay_of(model, adapters)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), overlay.using(["a", None, SAMPLES[2]]):
        found = model(IDS)
        base = Net(torch.float32)(IDS)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[1], base[1])
    for sample, which in ((0, "a"), (2, SAMPLES[2])):
        wanted = fused(Net(torch.float32), adapters, which)(IDS)[sample]
        assert (found[sample] - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_layers(kind):
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[kind](nn.Linear(64, 64)), nn.ReLU(), KINDS[kind](nn.Linear(64, 64))).eval()
    layers = shira._linears.find(model)
    weights = {}
    for seed, (name, layer) in enumerate(layers.items()):
        dense = layer.dense().to(layer.dtype)
        made = entry(dense, seed, 16, True)
        weights[name] = Entry(made.indices, made.values, made.shape, layer.dtype, 16, layer.fingerprint())
    overlay = Overlay(model)
    overlay.add("a", Adapter(weights, delta=True))
    input = torch.randn(3, 64, dtype=layer.dtype)
    with torch.no_grad():
        base = model(input)
        with overlay.using(["a", None, {"a": 0.5}]):
            found = model(input)
        expected = []
        for alpha in (1.0, 0.0, 0.5):
            hidden = input.float()
            for layer, one in zip(layers.values(), weights.values(), strict=True):
                delta = torch.zeros(64 * 64).view(-1, 16)
                delta[one.indices.long()] = one.values.float().view(-1, 16)
                hidden = layer.module(hidden.to(layer.dtype)).float() + alpha * hidden @ delta.view(64, 64).T
                hidden = hidden.relu() if layer is next(iter(layers.values())) else hidden
            expected.append(hidden)
    # The layers' hooks ran in `layer.module(...)` too, where nothing was selected.
    assert torch.equal(found[1], base[1])
    for sample in (0, 2):
        torch.testing.assert_close(found[sample].float(), expected[sample][sample], rtol=2e-2, atol=2e-2)
    assert (found[0] - base[0]).abs().max() > 0.2


def test_a_head_that_is_replaced_as_a_whole():
    model = Net()
    model.head.weight = nn.Parameter(torch.randn(20, 8, dtype=torch.float64))
    other = torch.randn(20, 8, dtype=torch.float64)
    whole = Entry(torch.zeros(1, dtype=torch.int32), other.view(-1), (20, 8), torch.float64, 160, 12345)
    overlay = Overlay(model)
    overlay.add("head", Adapter({"head.weight": whole}))
    overlay.add("a", adapter_of(model, 1, names="head"))
    wanted = copy.deepcopy(model)
    wanted.head.weight.data = other
    with overlay.using("head"):
        torch.testing.assert_close(model(IDS), wanted(IDS), rtol=1e-12, atol=1e-12)
    with pytest.raises(AdapterError, match=r"only at strength 1 is the result the same for both, got 0.5"):
        overlay.activate("head", alpha=0.5)
    with pytest.raises(AdapterError, match="so it cannot be summed with 'a'"), overlay.using([{"head": 1.0, "a": 1.0}]):
        pass
    with overlay.using(["head", "a", None]):
        assert model(IDS).shape == (3, 5, 20)


# ---- whose rows ------------------------------------------------------------------------------------------------


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generate(options):
    model = llama()
    adapters = {
        name: adapter_of(model, seed, granule, names="proj") for name, seed, granule in (("a", 1, 1), ("b", 9, 8))
    }
    for adapter in adapters.values():
        assert len(adapter.weights) == 14
    overlay = overlay_of(model, adapters)
    ids, mask = IDS + 3, torch.ones_like(IDS)
    mask[0, :2] = 0  # padded on the left
    given = {"max_new_tokens": 5, "do_sample": False, **options}
    with overlay.using(["a", None, "b"]):
        found = model.generate(ids, attention_mask=mask, **given)
    kept = len(found) // 3
    expected = [
        fused(llama(), adapters, which).generate(ids[at : at + 1], attention_mask=mask[at : at + 1], **given)
        for at, which in enumerate(("a", None, "b"))
    ]
    for at, wanted in enumerate(expected):
        rows = found[at * kept : (at + 1) * kept]
        assert torch.equal(rows[:, : wanted.shape[1]], wanted)
        assert bool((rows[:, wanted.shape[1] :] == 0).all())
    assert not torch.equal(expected[0][:, 5:], expected[1][:, 5:])


def test_continuous_batching():
    """transformers computes it in a thread of its own, with the tokens of all requests in one row."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("this transformers has no continuous batching of this kind")
    model, prompts = llama(), [[1, 5, 9, 11], [1, 7, 3]]
    options = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=39, pad_token_id=0)
    small = transformers.ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=16)

    def batched() -> list[list[int]]:
        found = model.generate_batch(prompts, options, small, warmup=False)
        return [found[key].generated_tokens for key in found]

    def alone(which: str) -> list[list[int]]:
        made = fused(llama(), adapters, which)
        given = [torch.tensor([prompt]) for prompt in prompts]
        return [made.generate(one, generation_config=options)[0, one.shape[1] :].tolist() for one in given]

    adapters = {"a": adapter_of(model, 1, names="proj"), "b": adapter_of(model, 9, granule=8, names="proj")}
    overlay = overlay_of(model, adapters)
    overlay.activate("a")
    assert batched() == alone("a") != alone("b")
    with overlay.using("b"), pytest.warns(UserWarning, match="runs in a thread or task where no using"):
        assert batched() == alone("a")


class Flat(nn.Module):
    """Lays the tokens of all samples side by side, as mixtures of experts do; or only some of them."""

    def __init__(self, some: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.some, self.proj = some, nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, input: Tensor) -> Tensor:
        flat = input.reshape(-1, 6)
        return self.proj(flat[1:] if self.some else flat).view(-1, 6)


def test_tokens_that_lie_flat_are_right_and_some_of_them_are_refused():
    input = torch.randn(3, 4, 6, dtype=torch.float64)
    model = Flat()
    adapters = {"a": adapter_of(model, 1), "b": adapter_of(model, 2)}
    # Nothing else tells that samples come first, which is said once.
    says = r"proj.weight gets the tokens of all samples in one dimension, and no other layer has told yet"
    with overlay_of(model, adapters).using(["a", None, "b"]), pytest.warns(UserWarning, match=says):
        found = model(input).view(3, 4, 6)
    for sample, which in enumerate(("a", None, "b")):
        wanted = fused(model, adapters, which)(input).view(3, 4, 6)[sample]
        torch.testing.assert_close(found[sample], wanted, rtol=1e-12, atol=1e-12)
    overlay = overlay_of(some := Flat(some=True), adapters)
    says = (
        r"Overlay: proj.weight got an input with leading dimensions \[11\] in a batch of 3 samples with 4 tokens each"
    )
    with overlay.using(["a", None, "b"]), pytest.raises(SwitchError, match=says):
        some(input)
    with overlay.using("a"):
        torch.testing.assert_close(some(input), fused(some, adapters, "a")(input), rtol=1e-12, atol=1e-12)


def test_batches_of_another_size():
    model = Net()
    overlay = overlay_of(model, adapters_of(model))
    with overlay.using(["a", "b"]):
        twice = model(tokens=IDS[[0, 0, 1, 1]])
        with pytest.raises(SwitchError, match=r"using\(\) names 2 samples, and Net was called with a batch of 3: name"):
            model(IDS)
        # The batch before is forgotten.
        once = model(IDS[:2])
    torch.testing.assert_close(twice[[0, 2]], once, rtol=1e-12, atol=1e-12)
    with overlay.using(["a"]):
        mine = model(IDS)
    with overlay.using("a"):
        assert torch.equal(model(IDS), mine)


def test_rows_of_which_it_is_not_known_whose_they_are():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2Model(transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    overlay = Overlay(model.eval())
    overlay.add("positions", adapter_of(model, 1, names="wpe"))
    overlay.add("a", adapter_of(model, 1, names="attn.c"))
    with (
        overlay.using(["positions", None, "a"]),
        pytest.raises(SwitchError, match=r"wpe.weight got an input with leading"),
    ):
        model(IDS)
    with overlay.using("positions"):
        assert model(IDS).last_hidden_state.shape == (3, 5, 8)
    with overlay.using(["a", None, "a"]), pytest.raises(SwitchError, match="runs outside the model's own forward"):
        model.h[0].attn.c_attn(torch.randn(3, 5, 8))
    # A part that stands in no list may be called alone, as generate() calls encoders.
    outer = nn.ModuleDict({"encoder": Net()})
    adapters = {"a": Adapter({f"encoder.{name}": one for name, one in adapter_of(Net(), 1).weights.items()})}
    tied = adapters["a"].weights["encoder.embedding.weight"]
    fixed = {**adapters["a"].weights, "encoder.embedding.weight": Entry(*entry_fields(tied), ("encoder.head.weight",))}
    overlay = overlay_of(outer, {"a": Adapter(fixed)})
    with overlay.using(["a", None, None]):
        assert not torch.equal(outer["encoder"](IDS)[0], Net()(IDS)[0])


def entry_fields(one: Entry):
    return one.indices, one.values, one.shape, one.dtype, one.granule, one.fingerprint, one.seed


class Turned(nn.Module):
    """Puts the tokens before the samples inside, and has an embedding of the places of tokens."""

    def __init__(self, at: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.at, self.proj, self.places = at, nn.Linear(6, 6, dtype=torch.float64), nn.Embedding(8, 6).double()

    def forward(self, input: Tensor) -> Tensor:
        if self.at == "proj":
            return self.proj(input.transpose(0, 1)).transpose(0, 1)
        if self.at == "copied":
            return self.proj(input.transpose(0, 1).contiguous()).transpose(0, 1)
        steps = torch.arange(input.shape[1])
        return self.proj(input) + self.places((steps[:, None] - steps).abs()).sum(1)


def test_as_many_samples_as_tokens():
    """Where sizes do not tell which dimension is which, what else is known does, or a warning says so."""
    square, long = torch.randn(3, 3, 6, dtype=torch.float64), torch.randn(3, 4, 6, dtype=torch.float64)
    which = ["a", None, "b"]

    def given(model, names):
        return {"a": adapter_of(model, 1, names=names), "b": adapter_of(model, 2, names=names)}

    for at, names in (("proj", "proj"), ("places", "places")):
        model = Turned(at)
        says = (
            rf"{names}.weight got an input with leading dimensions \[3, 3\] in a batch of 3 samples with 3 tokens each"
        )
        with overlay_of(model, given(model, names)).using(which), pytest.raises(SwitchError, match=says):
            model(square)
    model = Turned("copied")
    overlay = overlay_of(model, given(model, "proj"))
    with overlay.using(which):
        with pytest.warns(UserWarning, match=r"that proj.weight gets has 3 samples and as many tokens, so that"):
            model(square)
        with pytest.raises(SwitchError, match=r"leading dimensions \[4, 3\] in a batch of 3 samples with 4 tokens"):
            model(long)
    # A layer that has got another batch is known, and so are ids that come from the caller.
    model = Turned("none")
    overlay = overlay_of(model, adapters := given(model, "proj"))
    with overlay.using(which):
        model(long)
        found = model(square)
    for sample in (0, 2):
        wanted = fused(model, adapters, which[sample])(square)[sample]
        torch.testing.assert_close(found[sample], wanted, rtol=1e-12, atol=1e-12)
    # One place a token looks like one label a sample, where there are as many.
    words = nn.Sequential(nn.Embedding(20, 8), nn.Tanh())
    outer = nn.ModuleDict({"words": words, "places": nn.Embedding(9, 8)})
    outer.forward = lambda ids: words(ids) + outer["places"](torch.arange(ids.shape[1]))
    overlay = overlay_of(outer, given(outer, "places"))
    with overlay.using(which), pytest.raises(SwitchError, match=r"places.weight got an input with .* \[3\] in a batch"):
        outer(IDS[:, :3])
    labels = nn.ModuleDict({"kinds": nn.Embedding(20, 8)})
    labels.forward = lambda input, kind: input + labels["kinds"](kind)[:, None, None]
    overlay = overlay_of(labels, adapters := given(labels, "kinds"))
    kinds = torch.tensor([4, 7, 9])
    with overlay.using(which), pytest.warns(UserWarning, match="kinds.weight gets has 3 samples and as many tokens"):
        found = labels(torch.zeros(3, 3, 2, 8), kinds)
    with overlay.using(which):
        assert torch.equal(labels(torch.zeros(3, 1, 2, 8), kinds), found[:, :1])
    assert torch.equal(found[0, 0, 0], fused(labels, adapters, "a")["kinds"](kinds[:1])[0])
    words = nn.Sequential(nn.Embedding(20, 8), nn.Tanh())
    overlay = overlay_of(words, adapters := given(words, "0"))
    with overlay.using(which):
        assert torch.equal(words(IDS[:, :3])[0], fused(words, adapters, "a")(IDS[:, :3])[0])


def test_models_whose_rows_are_in_another_order():
    recurrent = nn.ModuleDict({"rnn": nn.LSTM(4, 4), "proj": nn.Linear(4, 4)})
    overlay = overlay_of(recurrent, {"a": adapter_of(recurrent, 1, names="proj")})
    with pytest.raises(SwitchError, match="rnn is a LSTM with batch_first=False"), overlay.using(["a", None]):
        pass
    overlay.activate("a")
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)]), "shared_expert": nn.Linear(4, 4)})
    overlay = overlay_of(experts, {"a": adapter_of(experts, 1), "b": adapter_of(experts, 1, names="shared")})
    with (
        pytest.raises(SwitchError, match=r"'a' changes experts.0.weight, experts.0.bias, which"),
        overlay.using(["a", "b"]),
    ):
        pass
    with overlay.using(["b", None]), pytest.raises(SwitchError, match="runs outside"):
        experts["shared_expert"](torch.randn(2, 4))
    for name in ("local_experts", "expert_0", "mlp.MyExpert", "aggregate_experts"):
        assert EXPERTS.search(f"layers.0.{name}.fc.weight"), name
    for name in ("shared_experts", "shared_expert_gate", "expert_router", "mlp"):
        assert not EXPERTS.search(f"layers.0.{name}.fc.weight"), name


def test_a_batch_in_a_mapping():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
            return self.net(batch["input_ids"])

    model, inner = Outer(), Net()
    adapters = {"a": adapter_of(inner, 1)}
    overlay = Overlay(model)
    overlay.add("a", adapters["a"], rename={"^": "net."})
    with overlay.using([None, "a", None]):
        found = model({"attention_mask": torch.ones(7, 5), "input_ids": IDS})
    base, wanted = inner(IDS), fused(inner, adapters, "a")(IDS)
    assert torch.equal(found[0], base[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-12, atol=1e-12)


# ---- what is refused -------------------------------------------------------------------------------------------


class Others(nn.Module):
    """What nothing can be laid over."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv1d(4, 4, 1), nn.LayerNorm(4), nn.Linear(4, 4)
        self.attention, self.free = nn.MultiheadAttention(4, 2), nn.Parameter(torch.zeros(4, 4))
        self.bounded = nn.Embedding(4, 4, max_norm=1.0)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("conv.weight", "'conv.weight' belongs to a Conv1d, and it is not known how that computes with it"),
        ("norm.bias", "'norm.bias' belongs to a LayerNorm"),
        ("free", "'free' belongs to a Others"),
        ("attention.in_proj_weight", "'attention.in_proj_weight' belongs to a MultiheadAttention"),
        ("attention.out_proj.weight", "belongs to a NonDynamicallyQuantizableLinear"),
        ("bounded.weight", "is changed by its own forward"),
    ],
)
def test_other_kinds_are_refused_by_name(name, says):
    model = Others()
    weights = {one: entry(dict(model.named_parameters())[one], 1, 1, False) for one in ("linear.weight", name)}
    overlay = Overlay(model)
    with pytest.raises(AdapterError, match=says):
        overlay.add("a", Adapter(weights))
    assert not overlay.adapters
    assert not any(module._forward_hooks for module in model.modules())


class Direct(nn.Module):
    """Uses a layer's weight without running the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.run, self.used = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(self.run(input), self.used.weight)


def test_layers_that_do_not_run_are_told():
    model = Direct()
    overlay = overlay_of(model, {"a": adapter_of(model, 1), "b": adapter_of(model, 1, names="run")})
    input = torch.randn(2, 4)
    with overlay.using("b"):
        model(input)
    with overlay.using("a"), pytest.warns(UserWarning, match=r"Overlay: used.weight did not run in this forward pass"):
        model(input)
    with overlay.using(["a", "b"]):
        model(input)  # told once


def test_what_a_captured_graph_reads_is_kept(monkeypatch):
    model = Net()
    overlay = overlay_of(model, adapters_of(model))
    with overlay.using("a"):
        model(IDS)
    assert overlay._current.captured == []
    monkeypatch.setattr(shira.serve._laying, "is_captured", lambda output: True)
    with overlay.using(["a", None, "b"]):
        model(IDS)
    kept = [tensor for _, pairs in overlay._current.captured for pair in pairs for tensor in pair]
    assert len(kept) >= 16
    assert any(torch.equal(rows, torch.tensor([0] * 5 + [-1] * 10, dtype=torch.int32)) for rows in kept)


def test_adapters_that_do_not_fit():
    model = Net()
    overlay = overlay_of(model, adapters_of(model))
    good = adapter_of(model, 1, names="linear")
    with pytest.raises(AdapterError, match="an adapter 'a' was already added"):
        overlay.add("a", good)
    with pytest.raises(AdapterError, match=r"'x.linear.weight' is not in the model.*rename=\{'\^x\\\\.': ''\}"):
        overlay.add("c", Adapter({f"x.{name}": one for name, one in good.weights.items()}))
    overlay.add("c", Adapter({f"x.{name}": one for name, one in good.weights.items()}), rename={r"^x\.": ""})
    with pytest.raises(AdapterError, match=r"linear.weight' must have dtype float32, got float64"):
        overlay.add("d", good.to(torch.float32))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.linear.weight[0, 0] += 1
    with pytest.raises(AdapterError, match=r"adapter 'd' was made for another base.*'linear.weight'"):
        overlay.add("d", adapter_of(other, 1, names="linear.weight"))
    overlay.add("d", adapter_of(other, 1, names="linear.weight"), verify=False)
    bad = entry(model.linear.weight, 1, 1, True)
    bad.values[3] = float("nan")
    with pytest.raises(AdapterError, match=r"1 of its 32 values are not finite \(1 NaN\)"):
        overlay.add("e", Adapter({"linear.weight": bad}, delta=True))
    codes = nn.Linear(4, 4).to(torch.float8_e4m3fn)
    with pytest.raises(AdapterError, match="weight has entries of float8_e4m3fn, which have no difference"):
        Overlay(codes).add(
            "a", Adapter({"weight": Entry(torch.tensor([1]), codes.weight.data[0, :1], (4, 4), codes.weight.dtype)})
        )
    tuned = Net()
    with (
        SparseTuner(tuned, masks.Rand(density=0.1), "linear"),
        pytest.raises(SwitchError, match=r"linear.weight is being tuned"),
    ):
        Overlay(tuned).add("a", good)
    assert list(overlay.adapters) == ["a", "b", "c", "d"]


def test_models_and_inputs_that_no_sum_fits():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    overlay = overlay_of(model, {"a": adapter_of(model, 1)})
    overlay.activate("a")
    ragged = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    with pytest.raises(SwitchError, match=r"0.weight got a nested tensor, in which it is not known which rows"):
        model(ragged)
    model.double()
    with pytest.raises(SwitchError, match=r"0.weight gives float64 now, and adapters for it were added as float32"):
        model(torch.randn(2, 4, dtype=torch.float64))
    with pytest.raises(AdapterError, match=r"'0\.weight' is on the meta device: load the model first"):
        Overlay(nn.Sequential(nn.Linear(4, 4)).to("meta")).add("a", adapter_of(nn.Sequential(nn.Linear(4, 4)), 1))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("bitsandbytes")])
def test_codes_that_are_loaded_over_are_noticed(kind):
    """bitsandbytes' layers do not load codes."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(nn.Sequential(KINDS[kind](nn.Linear(64, 64))))
    model, other = models
    layer = shira._linears.find(model)["0.weight"]
    made = entry(layer.dense().to(layer.dtype), 1, 16, True)
    overlay = Overlay(model)
    one = Entry(made.indices, made.values, made.shape, layer.dtype, 16, layer.fingerprint())
    overlay.add("a", Adapter({"0.weight": one}, delta=True))
    before = copy.deepcopy(model.state_dict()) if "quanto" not in kind else None
    model.load_state_dict(other.state_dict())
    with pytest.raises(SwitchError, match=r"0\.weight was changed by someone else"):
        overlay.activate("a")
    if before is not None:
        model.load_state_dict(before)
        overlay.activate("a")


@pytest.mark.parametrize("first", [True, False])
def test_offloaded_to_host_memory(first, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = Net()
    adapters = adapters_of(model)
    wanted, base = fused(model, adapters, "a")(IDS), model(IDS)
    overlay = overlay_of(model, adapters) if first else None
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.linear.weight.is_meta
    overlay = overlay or overlay_of(model, adapters)
    for _ in range(2):
        with torch.no_grad(), overlay.using(["a", None, "a"]):
            found = model(IDS)
        assert torch.equal(found[1], base[1])
        torch.testing.assert_close(found[::2], wanted[::2], rtol=1e-12, atol=1e-12)
    overlay.verify()
    other = Net()
    with torch.no_grad():
        other.linear.weight.add_(1)
    accelerate.cpu_offload(other, execution_device="cpu")
    with pytest.raises(AdapterError, match=r"made for another base.*'linear\.weight'"):
        Overlay(other).add("a", adapters["a"])


def test_offloaded_to_disk(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = Net()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    adapters = {"a": adapter_of(model, 1, names="linear")}
    wanted = fused(model, adapters, "a")(IDS)
    overlay = overlay_of(model, adapters)
    accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    with torch.no_grad(), overlay.using("a"):
        torch.testing.assert_close(model(IDS), wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(AdapterError, match=r"'linear\.weight' is offloaded to disk, where it is not known"):
        Overlay(model).add("a", adapters["a"])


def test_a_weight_that_is_tied_in_the_adapter_alone():
    """Its two copies in the model must be alike, and each is watched."""
    model = Net()
    adapter = adapter_of(model, 1, names="embedding")
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    overlay = overlay_of(model, {"a": adapter})
    with overlay.using("a"):
        found = model(IDS)
    tied = Net()
    wanted = fused(tied, {"a": adapter}, "a")
    torch.testing.assert_close(found, wanted(IDS), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(SwitchError, match=r"head\.weight was changed by someone else"):
        overlay.activate("a")
    for verify in (True, False):
        says = "'head.weight' and 'embedding.weight' are one .tied. weight in the adapter, and two that differ"
        with pytest.raises(AdapterError, match=says):
            Overlay(model).add("a", adapter, verify=verify)


def test_adapters_that_were_added_without_a_look_at_the_base():
    model = Net()
    adapter = adapter_of(model, 1, names="linear")
    overlay = Overlay(model)
    overlay.add("a", adapter, verify=False)
    with torch.no_grad():
        model.linear.weight.add_(1)
    with pytest.raises(SwitchError, match=r"linear\.weight was changed by someone else"):
        overlay.activate("a")
    # One that fits what is there now does not vouch for the first.
    with pytest.raises(SwitchError, match=r"linear\.weight was changed by someone else"):
        overlay.add("b", adapter_of(model, 1, names="linear"))
    with pytest.raises(SwitchError, match=r"are not what they were .*linear\.weight"):
        overlay.verify()


@pytest.mark.parametrize(
    ("which", "error", "says"),
    [
        ("z", AdapterError, "no adapter 'z' was added; there are: a, b"),
        (["a", "z", None], AdapterError, "no adapter 'z' was added"),
        ({"a": float("inf")}, AdapterError, "the strength of 'a' must be a finite number"),
        ([], ValueError, "an empty list"),
        (5, TypeError, "one for each sample; got int"),
        (["a", 5], TypeError, "give an adapter's name, or a mapping of names to strengths, got int"),
    ],
)
def test_selections_that_are_refused(which, error, says):
    model = Net()
    overlay = overlay_of(model, adapters_of(model))
    overlay.activate("b")
    with pytest.raises(error, match=says), overlay.using(which):
        pass
    assert overlay.active == {"b": 1.0}


def test_a_base_that_someone_changes():
    model = Net()
    before, adapters = bits(model), adapters_of(model)
    overlay = overlay_of(model, adapters)
    with torch.no_grad():
        model.linear.weight[0, 0] += 1
    with pytest.raises(SwitchError, match=r"Overlay: linear.weight was changed by someone else since"):
        overlay.activate("a")
    model.load_state_dict(before)  # another version, the same content
    overlay.activate("a")
    model.linear.weight.data[0, 0] += 1  # moves no version
    overlay.activate("a")
    with pytest.raises(SwitchError, match=r"1 weight\(s\) are not what they were .*: linear.weight"):
        overlay.verify()
    model.load_state_dict(before)
    overlay.verify()
    model.float()
    with pytest.raises(SwitchError, match="was float64 when adapters for it were added, and was cast"):
        overlay.activate("b")
    model = Net()
    overlay = overlay_of(model, adapters)
    model.linear = nn.Linear(12, 8, dtype=torch.float64)
    with pytest.raises(SwitchError, match=r"the module of linear.weight is no longer a part of the model"):
        overlay.activate("a")


# ---- gradients and compilers -----------------------------------------------------------------------------------


def test_gradients():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double().requires_grad_(False)
    adapters = adapters_of(model)
    overlay = overlay_of(model, adapters)
    input = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    with overlay.using(["a", None, SAMPLES[2]]):
        model(input).square().sum().backward()
        assert torch.autograd.gradgradcheck(model, (input.detach()[:, :1].clone().requires_grad_(),))
    for sample, which in enumerate(("a", None, SAMPLES[2])):
        own = input.detach().clone().requires_grad_()
        fused(model, adapters, which)(own).square().sum().backward()
        torch.testing.assert_close(input.grad[sample], own.grad[sample], rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_transforms_of_functions():
    """torch.func and forward mode: the derivatives of the fused model, and nothing of them stays."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    adapters = adapters_of(model)
    overlay, other = overlay_of(model, adapters), fused(model, adapters, {"a": 1.0, "b": 0.5})
    other_hooks = [module for module in other.modules() if module._forward_hooks or module._forward_pre_hooks]
    for module in other_hooks:  # a copy has them, too
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    input = torch.randn(3, 4, 6, dtype=torch.float64)

    def loss(model):
        return lambda one: model(one).square().sum()

    def forward_mode(model):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(input, input.square())
            return torch.autograd.forward_ad.unpack_dual(model(dual)).tangent

    derivatives = [
        lambda model: torch.func.vmap(model)(input),
        lambda model: torch.func.vmap(model, in_dims=1, out_dims=1)(input),
        lambda model: torch.func.vmap(torch.func.grad(loss(model)))(input),
        lambda model: torch.func.jacrev(model)(input[0, 0]),
        lambda model: torch.func.jacfwd(model)(input[0, 0]),
        lambda model: torch.func.hessian(loss(model))(input[0, 0]),
        forward_mode,
    ]
    with overlay.using({"a": 1.0, "b": 0.5}):
        before = model(input)
        for derivative in derivatives:
            torch.testing.assert_close(derivative(model), derivative(other), rtol=1e-10, atol=1e-10)
            with torch.no_grad():
                torch.testing.assert_close(derivative(model), derivative(other), rtol=1e-10, atol=1e-10)
        assert torch.equal(model(input), before)
    words = Net()
    overlay = overlay_of(words, adapters := adapters_of(words))
    with torch.no_grad(), overlay.using("a"):
        found = torch.func.vmap(words)(IDS)
    torch.testing.assert_close(found, fused(words, adapters, "a")(IDS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_refused(reentrant):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    overlay = overlay_of(model, {"a": adapter_of(model, 1)})
    overlay.activate("a")
    output = checkpoint(model, torch.randn(2, 4, requires_grad=True), use_reentrant=reentrant)
    with pytest.raises(SwitchError, match=r"Overlay: 0.weight runs again in the backward pass"):
        output.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiled_model_takes_other_selections_without_being_compiled_again():
    model = Net()
    overlay = overlay_of(model, adapters_of(model))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    def check(which):
        with overlay.using(which):
            torch.testing.assert_close(compiled(IDS), model(IDS), rtol=1e-12, atol=1e-12)
        assert same(model, before)

    before = bits(model)
    check(["a", None, "b"])
    says = r"Overlay: using\(\) names samples, and Net was called with a batch of another: name an adapter"
    with overlay.using(["a", "b"]), pytest.raises(torch._dynamo.exc.Unsupported, match=says):
        compiled(IDS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(["b", "b", None])
        check([{"a": 0.5}, None, {"b": 3.0}])
        check([None, None, None])
    check("a")
    with torch._dynamo.config.patch(error_on_recompile=True):
        check({"b": 0.25})
    # One selection for all threads: another one is refused while a block is open.
    failed = []

    def other():
        try:
            with overlay.using("b"):
                pass
        except SwitchError as error:
            failed.append(str(error))

    with overlay.using("a"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with overlay.using("b"):  # its own may nest
            pass
    assert "a compiled model has one selection for the whole process" in failed[0]


def test_a_compiled_model_has_gradients():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double().requires_grad_(False)
    overlay = overlay_of(model, adapters_of(model))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (model, compiled):
        input = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with overlay.using(["a", "b"]):
            run(input).square().sum().backward()
        grads.append(input.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


# ---- beside others ---------------------------------------------------------------------------------------------


def test_beside_an_active_switcher():
    """base + the Switcher's + the Overlay's, each as if it were alone on the base."""
    model = Net()
    before, adapters = bits(model), adapters_of(model)
    deltas = {name: adapter.to_delta(model) for name, adapter in adapters.items()}
    wanted = fused(model, deltas, {"a": 1.0, "b": 0.5})(IDS)
    overlay = overlay_of(model, {"a": adapters["a"]})
    switcher = Switcher(model)
    switcher.add("b", adapters["b"])
    switcher.add("a", adapters["a"])
    late = Overlay(model)
    with switcher.using({"b": 0.5}):
        with overlay.using("a"):
            torch.testing.assert_close(model(IDS), wanted, rtol=1e-12, atol=1e-12)
        overlay.verify()
        late.add("a", adapters["a"])  # its differences are from the base, not from what is there now
        with late.using([None, "a", None]):
            torch.testing.assert_close(model(IDS)[1], wanted[1], rtol=1e-12, atol=1e-12)
    with switcher.using("a"), late.using("a"):
        twice = model(IDS)
    torch.testing.assert_close(twice, fused(model, deltas, {"a": 2.0})(IDS), rtol=1e-12, atol=1e-12)
    with late.using("a"), overlay.using({"a": -1.0}):  # two overlays
        torch.testing.assert_close(model(IDS), Net()(IDS), rtol=1e-12, atol=1e-12)
    assert same(model, before)
    with switcher.using("b"):
        with torch.no_grad():
            model.linear.weight.add_(1)
        with pytest.raises(SwitchError, match=r"linear.weight was changed by someone else"):
            late.activate("a")
        switcher.deactivate(verify=False)


@pytest.mark.parametrize("when", ["before the block", "inside it", "before it is compiled"])
def test_hooks_that_are_put_before_the_overlays_go_after_them(when):
    """They get what a layer gives with the adapter, as they would with the adapter in its weight."""
    model = Net()
    adapters = adapters_of(model)
    overlay, wanted = overlay_of(model, adapters), fused(model, adapters, "a")

    def tripled(module, args, output):
        return output * 3

    def change():
        for one in (model, wanted):
            one.linear.register_forward_hook(tripled, prepend=True)

    called = torch.compile(model, backend="eager") if when == "before it is compiled" else model
    if when != "inside it":
        change()
    with torch.no_grad(), overlay.using("a"):
        if when == "inside it":
            called(IDS)
            change()
        for _ in range(2):
            torch.testing.assert_close(called(IDS), wanted(IDS), rtol=1e-12, atol=1e-12)


def test_hooks_of_all_modules_are_refused():
    """They come before the overlay's, so what they change would get the adapter of what they were not given."""
    model = Net()
    overlay = overlay_of(model, adapters_of(model))
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: output * 3)
    with torch.no_grad(), overlay.using("a"):
        with pytest.raises(RuntimeError, match=r"Overlay: a forward hook of all modules .* runs before the hook of"):
            model(IDS)
        handle.remove()
        model(IDS)


def test_threads_and_tasks_have_their_own():
    model = Net()
    overlay = overlay_of(model, adapters_of(model))
    selections = ["a", "b", None, ["a", "b", None]]

    def output(which):
        with overlay.using(which), torch.no_grad():
            return model(IDS)

    expected = [output(which) for which in selections]
    found = [None] * len(selections)
    gate = threading.Barrier(len(selections))

    def work(number):
        with overlay.using(selections[number]), torch.no_grad():
            gate.wait()
            for _ in range(5):
                found[number] = model(IDS)
            gate.wait()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(selections))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, found, expected))

    async def task(which):
        with overlay.using(which):
            await asyncio.sleep(0)
            with torch.no_grad():  # all tasks of a thread share it
                return model(IDS)

    async def main():
        return await asyncio.gather(*map(task, selections))

    assert all(map(torch.equal, asyncio.run(main()), expected))
    assert overlay.active == {}


def test_generators_that_take_turns():
    """As servers write answers token by token: each has its own block, whoever runs in between."""
    model = Net()
    overlay = overlay_of(model, adapters_of(model))
    expected = {}
    for which in ("a", "b", None):
        with overlay.using(which), torch.no_grad():
            expected[which] = model(IDS)

    def answer(which):
        with overlay.using(which):
            for _ in range(3):
                yield model(IDS)

    @contextmanager
    def styled(which):
        with overlay.using(which):
            yield

    def wrapped(which):
        with ExitStack() as stack:
            stack.enter_context(styled(which))
            for _ in range(3):
                yield model(IDS)

    async def asynchronous(which):
        with overlay.using(which):
            for _ in range(3):
                yield model(IDS)

    for make in (answer, wrapped):
        several = {which: make(which) for which in ("a", "b", None)}
        for _ in range(3):
            for which, one in several.items():
                assert torch.equal(next(one), expected[which])
        with overlay.using("b"):  # what waits has no part in it
            assert torch.equal(model(IDS), expected["b"])
        with styled("a"), styled("b"):
            assert torch.equal(model(IDS), expected["b"])
        overlay._current._said.clear()
        with pytest.warns(UserWarning, match=r"the adapters of a using\(\) block that was opened by a generator"):
            model(IDS)
        for one in several.values():
            one.close()
        assert torch.equal(model(IDS), expected[None])

    async def main():
        first, second = asynchronous("a"), asynchronous("b")
        for _ in range(3):
            assert torch.equal(await anext(first), expected["a"])
            assert torch.equal(await anext(second), expected["b"])
        await first.aclose()
        await second.aclose()

    asyncio.run(main())
    assert not overlay._current.blocks
    overlay._current.compiled = True  # by torch.compile, to which all blocks are one
    first = answer("a")
    next(first)
    says = "block of another thread, task or generator is open, and the model is compiled"
    with pytest.raises(SwitchError, match=says):
        next(answer("b"))
    with overlay.using("b"):
        assert torch.equal(model(IDS), expected["b"])
    first.close()


def test_a_pass_that_a_block_does_not_reach_is_told():
    model = Net()
    overlay = overlay_of(model, adapters_of(model))
    base = model(IDS)

    def run():  # as a streamer of tokens does
        thread = threading.Thread(target=lambda: found.append(model(IDS)))
        thread.start()
        thread.join()

    found = []
    with overlay.using("a"):
        with pytest.warns(UserWarning, match=r"in a thread or task where no using\(\) block is open, while one is"):
            run()
        run()  # told once
    assert all(torch.equal(one, base) for one in found)

    async def late():
        await asyncio.sleep(0)
        return model(IDS)

    async def main():
        with overlay.using("a"):
            task = asyncio.ensure_future(late())
        return await task

    with pytest.warns(UserWarning, match=r"was started inside a using\(\) block, and that block has ended"):
        assert torch.equal(asyncio.run(main()), base)


def test_copies():
    model = Net()
    overlay = overlay_of(model, adapters_of(model))
    with overlay.using("a"):
        a = model(IDS)
    overlay.activate("a")
    alone = copy.deepcopy(model)
    overlay.deactivate()
    base = model(IDS)
    assert torch.equal(alone(IDS), a)
    # A copy does not keep the model that it was made of.
    gone = weakref.ref(copied := copy.deepcopy(model))
    again = copy.deepcopy(copied)
    del copied
    gc.collect()
    assert gone() is None
    assert again(IDS).shape == base.shape
    other = copy.deepcopy(overlay)
    assert other.model is not model
    assert other.adapters["a"] is overlay.adapters["a"]
    with other.using([None, None, "a"]):
        found = other.model(IDS)
        assert torch.equal(model(IDS), base)
    torch.testing.assert_close(found, torch.cat([base[:2], a[2:]]), rtol=1e-12, atol=1e-12)
    other.verify()
    with torch.no_grad():
        other.model.linear.weight.add_(1)
    with pytest.raises(SwitchError, match=r"linear.weight was changed"):
        other.activate("a")
    other.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.model.modules())
    overlay.activate("a")
    with pytest.raises(TypeError, match=r"an Overlay cannot be pickled; detach\(\) it first"):
        pickle.dumps(model)


# ---- what is active, and where it is ---------------------------------------------------------------------------


def test_what_is_active():
    model = Net()
    base = model(IDS)
    with Overlay(model) as overlay:
        for name, adapter in adapters_of(model).items():
            overlay.add(name, adapter)
        overlay.activate("b", alpha=0.25)
        with overlay.using(["a", None, {"b": 0.5, "a": 1.0}]) as inside:
            assert inside is overlay
            assert overlay.active == [{"a": 1.0}, {}, {"a": 1.0, "b": 0.5}]
            with overlay.using({}):
                assert overlay.active == {}
                assert torch.equal(model(IDS), base)
            overlay.activate("a")  # until the end of the block
            assert overlay.active == {"a": 1.0}
            with pytest.raises(SwitchError, match="'a' is in use by an open using"):
                overlay.remove("a")
        assert overlay.active == {"b": 0.25}
        assert repr(overlay) == "Overlay(adapters=['a', 'b'], active={'b': 0.25})"
        overlay.activate({"b": 1.0, "a": 0.5})
        overlay.remove("b")
        assert overlay.active == {"a": 0.5}
        assert list(overlay.adapters) == ["a"]
        with overlay.using("a", alpha=0.5):
            expected = model(IDS)
        assert torch.equal(model(IDS), expected)
        assert not torch.equal(expected, base)
        overlay.add("late", adapter_of(model, 5))
        assert torch.equal(model(IDS), expected)
    assert torch.equal(model(IDS), base)
    assert not overlay.adapters
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert shira.Overlay is Overlay


def test_a_budget(tmp_path):
    model = Net(torch.bfloat16)
    adapters = adapters_of(model)
    overlay = overlay_of(model, adapters)
    sizes = {name: memory.device for name, memory in overlay.memory().items()}
    outputs = {}
    for name in adapters:
        with overlay.using(name):
            outputs[name] = model(IDS)
    overlay.detach()
    adapters["a"].save(tmp_path / "a.safetensors")
    overlay = Overlay(model, budget=max(sizes.values()) + 100)
    overlay.add("a", tmp_path / "a.safetensors")
    overlay.add("b", adapters["b"])
    assert overlay.memory()["a"] == (0, 0, (tmp_path / "a.safetensors").stat().st_size)
    assert overlay.memory()["b"][0] == sizes["b"]
    for name in ("a", "b", "a"):
        with overlay.using(name):
            assert torch.equal(model(IDS), outputs[name])
            assert overlay.memory()[name].device == sizes[name]
    with pytest.raises(SwitchError, match=r"'b' would need .* beside what is in use, .*: set overlay.budget to more"):
        overlay.activate({"a": 1.0, "b": 1.0})
    overlay.activate("b")
    adapters["b"].save(tmp_path / "a.safetensors")
    overlay.deactivate()
    with pytest.raises(AdapterError, match="has changed since 'a' was added"):
        overlay.activate("a")
    overlay.budget = 100
    with pytest.raises(AdapterError, match=r"adapter 'c' needs [\d,]+ bytes, more than the budget of 100"):
        overlay.add("c", adapters["a"])
    with pytest.raises(ValueError, match="budget must be a number of bytes or None, got -1"):
        Overlay(model, budget=-1)
