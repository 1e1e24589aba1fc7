"""PEFT's adapters, with the real PEFT: what it saves is read to the same outputs, and it opens what is written."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import shira_ops
from shira import Adapter, AdapterError, Entry, SparseTuner, Switcher, masks

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks", "ignore:.*find a config file", "ignore:.*is_gradient_checkpointing"
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(24, 16)
        self.v_proj = nn.Linear(16, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v_proj(torch.relu(self.q_proj(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 24)
        self.layers = nn.ModuleList([Block()])
        self.q_proj = nn.Linear(32, 4)  # a name that ends like another's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(self.layers[0](self.embed(x)))


INPUT = torch.arange(8)


def model_of(dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype).requires_grad_(False)


def peft_model(dtype: torch.dtype, config: object) -> nn.Module:
    """With adapter weights that are not zero."""
    made = peft.get_peft_model(model_of(dtype), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "shira_weight" in name or "lora_" in name:
                parameter.normal_(0, 0.3)
    return made.eval()


def output_with(adapter: Adapter, dtype: torch.dtype) -> torch.Tensor:
    model = model_of(dtype)
    switcher = Switcher(model)
    switcher.add("it", adapter)
    switcher.activate("it")
    return model(INPUT)


@DTYPES
@pytest.mark.parametrize("name", ["default", "style"])
def test_shira_is_read(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    config = peft.ShiraConfig(r=3, target_modules=["layers.0.q_proj", "v_proj"], random_seed=5)
    made = peft.get_peft_model(model_of(dtype), config, adapter_name=name)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "shira_weight" in key:
                parameter.normal_(0, 0.3)
    made.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    adapter = Adapter.from_peft(folder, model_of(dtype))
    assert adapter.delta
    assert set(adapter.weights) == {"layers.0.q_proj.weight", "layers.0.v_proj.weight"}
    assert adapter.weights["layers.0.q_proj.weight"].nnz == 3 * (16 + 24)
    assert torch.equal(output_with(adapter, dtype), made(INPUT))
    assert adapter.provenance["peft_version"] == peft.__version__

    adapter.save(tmp_path / "ours.safetensors")
    assert torch.equal(output_with(Adapter.load(tmp_path / "ours.safetensors"), dtype), made(INPUT))


@DTYPES
@pytest.mark.parametrize("granule", [1, 4])
@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_peft_opens_what_is_written(tmp_path: Path, dtype: torch.dtype, granule: int, alpha: float) -> None:
    """An overwrite adapter of the tuner, with its strength and granules."""
    model = model_of(dtype)
    with SparseTuner(model, masks.Rand(density=0.1, granule=granule), r"layers.*(q|v)_proj$") as tuner:
        with torch.no_grad():
            for values in tuner.parameters():
                values.add_(torch.randn_like(values) * 0.3)
        adapter = tuner.adapter(alpha=alpha)
    adapter.to_peft(tmp_path / "out", model)
    opened = peft.PeftModel.from_pretrained(model_of(dtype), str(tmp_path / "out")).eval()
    tuned = [
        name for name, module in opened.named_modules() if type(module).__name__ == "Linear" and hasattr(module, "r")
    ]
    assert tuned == [f"base_model.model.layers.0.{name}_proj" for name in "qv"]
    assert torch.equal(opened(INPUT), output_with(adapter.to_delta(model), dtype))
    torch.testing.assert_close(opened(INPUT), output_with(adapter, dtype), rtol=1e-2, atol=1e-2)
    assert not torch.equal(opened(INPUT), model_of(dtype)(INPUT))

    merged = opened.merge_and_unload()
    back = Adapter.from_peft(tmp_path / "out", model)
    torch.testing.assert_close(merged(INPUT), output_with(back, dtype), rtol=0, atol=0)


def test_and_back_again_says_the_same(tmp_path: Path) -> None:
    made = peft_model(torch.float32, peft.ShiraConfig(r=2, target_modules=["v_proj"], random_seed=2))
    made.save_pretrained(tmp_path / "theirs")
    adapter = Adapter.from_peft(tmp_path / "theirs", model_of(torch.float32))
    adapter.to_peft(tmp_path / "ours")  # a delta needs no base
    one = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    two = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert two[key].dtype == tensor.dtype
        assert two[key].shape == tensor.shape
        if key.endswith("shira_weight"):  # the same pairs, in order of the entries
            places = one[key.replace("weight", "indices")]
            order = (places[0].long() * 16 + places[1]).argsort()
            assert torch.equal(two[key], tensor[order])


@DTYPES
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_at_full_density_is_all_of_it(tmp_path: Path, dtype: torch.dtype, rslora: bool) -> None:
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["v_proj", "layers.0.q_proj"], alpha_pattern={"v_proj": 11}, use_rslora=rslora
    )
    made = peft_model(dtype, config)
    made.save_pretrained(tmp_path)
    adapter = Adapter.from_peft(tmp_path, model_of(dtype), density=1.0)
    assert adapter.report.lost == 0
    merged = made.merge_and_unload()
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(output_with(adapter, dtype), merged(INPUT), **close)


@pytest.mark.parametrize("granule", [1, 8])
def test_lora_is_cut_to_its_largest_entries(tmp_path: Path, granule: int) -> None:
    made = peft_model(torch.float32, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj"]))
    made.save_pretrained(tmp_path)
    adapter = Adapter.from_peft(tmp_path, model_of(torch.float32), density=0.125, granule=granule)
    parts = load_file(tmp_path / "adapter_model.safetensors")
    dense = 2 * (
        parts["base_model.model.layers.0.v_proj.lora_B.weight"]
        @ parts["base_model.model.layers.0.v_proj.lora_A.weight"]
    )
    scores = dense.abs().view(-1, granule).sum(1)
    expected = scores.topk(64 // granule).indices.sort().values
    entry = adapter.weights["layers.0.v_proj.weight"]
    assert torch.equal(entry.indices.long(), expected)
    torch.testing.assert_close(entry.values, dense.view(-1, granule)[expected].view(-1))
    lost = 1 - float(entry.values.double().square().sum() / dense.double().square().sum())
    assert adapter.report.lost == pytest.approx(lost, rel=1e-4)
    assert 0 < lost < 1


def shira_folder(folder: Path) -> Path:
    peft_model(torch.float32, peft.ShiraConfig(r=2, target_modules=["v_proj"], random_seed=2)).save_pretrained(folder)
    return folder


def rewritten(folder: Path, change) -> Path:
    path = folder / "adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors, "base_model.model.layers.0.v_proj.")
    save_file(tensors, path)
    return folder


WRONG = {
    "outside": (lambda t, p: t[p + "shira_indices"][0].fill_(32), r" \(32, \d+\) is outside the base's \[32, 16\]"),
    "negative": (lambda t, p: t[p + "shira_indices"][1].fill_(-1), "is outside"),
    "twice": (lambda t, p: t[p + "shira_indices"].fill_(3), "stands there twice"),
    "too few": (lambda t, p: t.update({p + "shira_weight": torch.zeros(3)}), "must be 1-D floats and shira_indices"),
    "no indices": (lambda t, p: t.pop(p + "shira_indices"), "has no shira_indices"),
    "nothing": (lambda t, p: t.clear(), "it holds no weights"),
    "other module": (
        lambda t, p: t.update({k.replace("v_proj", "k_proj"): t.pop(k) for k in list(t)}),
        "the base has no weight 'layers.0.k_proj.weight'",
    ),
    "whole module": (lambda t, p: t.update({"base_model.model.q_proj.weight": torch.zeros(4, 32)}), "no sparse form"),
    "two adapters": (
        lambda t, p: t.update({f"{k}.other": t[k].clone() for k in list(t)}), "it holds several adapters",
    ),
    "not a matrix": (
        lambda t, p: t.update({k.replace("v_proj", "odd"): t.pop(k) for k in list(t)}), "must be a float matrix",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_files(tmp_path: Path, what: str) -> None:
    change, says = WRONG[what]
    rewritten(shira_folder(tmp_path), change)
    base = {**model_of(torch.float32).state_dict(), "layers.0.odd.weight": torch.zeros(4)}
    with pytest.raises(AdapterError, match=says):
        Adapter.from_peft(tmp_path, base)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    base = model_of(torch.float32)
    folder = shira_folder(tmp_path / "shira")
    with pytest.raises(AdapterError, match="the base is needed: give base="):
        Adapter.from_peft(folder)
    with pytest.raises(AdapterError, match="density and granule are for LoRA"):
        Adapter.from_peft(folder, base, density=0.1)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="its weights are a pickle"):
        Adapter.from_peft(folder, base)

    def lora(**options: object) -> Path:
        peft_model(torch.float32, peft.LoraConfig(r=2, target_modules=["v_proj"], **options)).save_pretrained(tmp_path)
        return tmp_path

    with pytest.raises(AdapterError, match="a LoRA is dense: give density="):
        Adapter.from_peft(lora(), base)
    with pytest.raises(AdapterError, match="only plain LORA can be read, and this one has use_dora"):
        Adapter.from_peft(lora(use_dora=True), base, density=0.1)
    other = model_of(torch.float32)
    other.q_proj.weight[0, 0] += 1
    with pytest.raises(AdapterError, match="no sparse form"):
        Adapter.from_peft(lora(modules_to_save=["q_proj"]), other, density=0.1)
    with pytest.raises(AdapterError, match="granule 3 must divide"):
        Adapter.from_peft(lora(), base, density=0.1, granule=3)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(AdapterError, match="only SHIRA, LORA and SHIRA_OPS can be read, got 'IA3'"):
        Adapter.from_peft(tmp_path, base)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="cannot be read"):
        Adapter.from_peft(tmp_path, base)


def test_the_base_that_the_adapter_names(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file(model_of(torch.float32).state_dict(), base / "model.safetensors")
    folder = shira_folder(tmp_path / "shira")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    adapter = Adapter.from_peft(folder)
    weight = model_of(torch.float32).layers[0].v_proj.weight
    assert adapter.weights["layers.0.v_proj.weight"].fingerprint == int(shira_ops.fingerprint(weight)) % 2**64


def entry(shape: tuple[int, ...] = (8, 8), count: int = 4, **options: object) -> Entry:
    indices = torch.arange(count, dtype=torch.int32)
    return Entry(indices, torch.ones(count * options.get("granule", 1)), shape, torch.float32, **options)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"a.bias": entry((8,), 1, granule=8)}, "a whole parameter"),
        ({"conv.weight": entry((2, 2, 4, 4))}, r"of shape \[2, 2, 4, 4\] is not a linear layer's weight"),
        ({"a.scale": entry()}, "is not a linear layer's weight"),
        ({"a.weight": entry(aliases=("b.weight",))}, "is tied to 'b.weight'"),
        ({"a.weight": entry(), "b.weight": entry((16, 16), 200)}, "'a.weight' has 64 entries, and 112 are needed"),
        ({}, "an adapter without weights"),
    ],
)  # fmt: skip
def test_what_cannot_be_written(tmp_path: Path, weights: dict[str, Entry], says: str) -> None:
    with pytest.raises(AdapterError, match=says):
        Adapter(weights, delta=True).to_peft(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_modules_and_bases_that_do_not_fit(tmp_path: Path) -> None:
    model = model_of(torch.float32)
    with pytest.raises(AdapterError, match="is the weight of Embedding, not of Linear"):
        Adapter({"embed.weight": entry((8, 24))}, delta=True).to_peft(tmp_path / "out", model)
    with pytest.raises(AdapterError, match="this adapter replaces entries: give base="):
        Adapter({"a.weight": entry()}).to_peft(tmp_path / "out")


# ---- against PEFT's own merge, bit for bit -------------------------------------------------------------------


def llama(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=40, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=8))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=40,
        max_position_embeddings=8,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40))


class Mixed(nn.Module):
    """Square matrices of both kinds, and others whose kind shows."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.one, self.two, self.wide = Conv1D(16, 16), nn.Linear(16, 16), Conv1D(24, 16)
        self.head = nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.wide(self.two(self.one(x))))


def made(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return build().to(dtype).eval().requires_grad_(False)


def trained(build: Callable[[], nn.Module], config: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A PEFT model whose adapter is no longer what it started with, saved."""
    model = peft.get_peft_model(made(build, dtype), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shira_weight" in name or "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(folder)
    return model


def check_against_peft(
    build: Callable[[], nn.Module], folder: Path, adapter: Adapter, dtype: torch.dtype = torch.float32, **options: Any
) -> None:
    """The adapter on the base holds the bits of PEFT's merge of the folder."""
    merged = peft.PeftModel.from_pretrained(made(build, dtype), str(folder), **options).merge_and_unload()
    wanted, model = merged.state_dict(), made(build, dtype)
    switcher = Switcher(model)
    switcher.add("it", adapter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    switcher.activate("it")
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert {name for name in wanted if not torch.equal(found[name], before[name])} == set(adapter.weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kind", ["SHIRA", "LORA"])
def test_the_bits_of_pefts_merge(tmp_path: Path, kind: str, dtype: torch.dtype, autocast: bool) -> None:
    """In float32, or with what is added rounded to the base's dtype first: PEFT does either."""
    make = peft.ShiraConfig if kind == "SHIRA" else peft.LoraConfig
    trained(llama, make(r=2, target_modules=["q_proj", "up_proj"]), tmp_path, dtype)
    options: dict[str, Any] = {"density": 1.0} if kind == "LORA" else {}
    adapter = Adapter.from_peft(tmp_path, made(llama, dtype), autocast_adapter_dtype=autocast, **options)
    check_against_peft(llama, tmp_path, adapter, dtype, autocast_adapter_dtype=autocast)


LORAS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "bert": (bert, {"target_modules": ["query", "dense"], "bias": "none"}),
    "t5": (t5, {"target_modules": ["q", "v", "wi"]}),
    "a rank and a strength a module": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 3, "down_proj": 1},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, r".*\.(v_proj|o_proj)": 20},
        },
    ),
    "rslora": (llama, {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 5}),
    "some layers": (llama, {"target_modules": ["o_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "orthogonal": (llama, {"target_modules": ["o_proj"], "init_lora_weights": "orthogonal"}),
    "mica": (llama, {"target_modules": ["o_proj"], "init_lora_weights": "mica"}),
    "squares of both kinds": (Mixed, {"target_modules": ["one", "two", "wide"]}),
    "squares of both kinds, the other last": (Mixed, {"target_modules": ["wide", "one", "two", "head"]}),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("what", LORAS)
def test_loras_of_all_kinds_are_what_peft_merges(tmp_path: Path, what: str) -> None:
    build, options = LORAS[what]
    trained(build, peft.LoraConfig(**{"r": 2, **options}), tmp_path)
    check_against_peft(build, tmp_path, Adapter.from_peft(tmp_path, made(build), density=1.0))


@pytest.mark.parametrize("build", [llama, bert, t5])
def test_shiras_of_transformers_models_both_ways(tmp_path: Path, build: Callable[[], nn.Module]) -> None:
    targets = {llama: ["q_proj", "down_proj"], bert: ["query", "dense"], t5: ["q", "wo"]}[build]
    trained(build, peft.ShiraConfig(r=1, target_modules=targets), tmp_path / "theirs")
    adapter = Adapter.from_peft(tmp_path / "theirs", made(build))
    check_against_peft(build, tmp_path / "theirs", adapter)
    adapter.to_peft(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(made(build), str(tmp_path / "ours")).merge_and_unload().state_dict()
    theirs = peft.PeftModel.from_pretrained(made(build), str(tmp_path / "theirs")).merge_and_unload().state_dict()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_squares_that_cannot_be_told(tmp_path: Path) -> None:
    """A file does not name classes: the matrices with a bias show which way round the others are, if all agree."""
    trained(Mixed, peft.LoraConfig(r=2, target_modules=["one", "two"]), tmp_path / "mixed")
    with pytest.raises(AdapterError, match=r"whether 'one\.weight' is a Linear's .* give the model itself as base="):
        Adapter.from_peft(tmp_path / "mixed", made(Mixed).state_dict(), density=0.5)
    trained(gpt2, peft.LoraConfig(r=2, target_modules=["attn.c_proj"]), tmp_path / "gpt2")
    adapter = Adapter.from_peft(tmp_path / "gpt2", made(gpt2).state_dict(), density=1.0)
    check_against_peft(gpt2, tmp_path / "gpt2", adapter)
    changed(tmp_path / "gpt2", fan_in_fan_out=False)  # as where a Linear came last
    with pytest.raises(AdapterError, match="cannot be told from its shape"):
        Adapter.from_peft(tmp_path / "gpt2", made(gpt2).state_dict(), density=0.5)
    for build in (llama, bert):  # no bias at all, and all one way round
        targets = ["q_proj", "o_proj"] if build is llama else ["query", "key"]
        trained(build, peft.LoraConfig(r=2, target_modules=targets), tmp_path / build.__name__)
        adapter = Adapter.from_peft(tmp_path / build.__name__, made(build).state_dict(), density=1.0)
        check_against_peft(build, tmp_path / build.__name__, adapter)


def changed(folder: Path, **settings: Any) -> Path:
    """The folder with other settings in its configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def lora_folder(folder: Path, **options: Any) -> Path:
    trained(Model, peft.LoraConfig(**{"r": 2, "target_modules": ["v_proj"], **options}), folder)
    return folder


STARTS = ["pissa", "PiSSA_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "something_new", 3, ["pissa"]]


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_loras_that_start_by_changing_the_base_are_refused(tmp_path: Path, start: Any) -> None:
    folder = changed(lora_folder(tmp_path), init_lora_weights=start)
    with pytest.raises(AdapterError, match=r"PEFT changes the base before .* Adapter\.from_difference") as error:
        Adapter.from_peft(folder, made(Model), density=1.0)
    assert ("path_initial_model_for_weight_conversion" in str(error.value)) == (start in [*STARTS[:5], "lora_ga"])


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_pissa_converted_by_peft_is_a_plain_lora(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights="pissa")
    model = peft.get_peft_model(made(llama), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(AdapterError, match="init_lora_weights='pissa'"):
        Adapter.from_peft(tmp_path / "raw", made(llama), density=1.0)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    adapter = Adapter.from_peft(tmp_path / "plain", made(llama), density=1.0)
    check_against_peft(llama, tmp_path / "plain", adapter)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("kind", ["SHIRA", "LORA"])
def test_a_tied_head_is_refused(tmp_path: Path, kind: str) -> None:
    make = peft.ShiraConfig if kind == "SHIRA" else peft.LoraConfig
    trained(lambda: llama(tied=True), make(r=1, target_modules=["lm_head"]), tmp_path)
    options: dict[str, Any] = {"density": 1.0} if kind == "LORA" else {}
    base = made(lambda: llama(tied=True))
    with pytest.raises(AdapterError, match=r"'lm_head\.weight' is tied to 'model\.embed_tokens\.weight' in the base"):
        Adapter.from_peft(tmp_path, base, **options)
    saved = {name: tensor for name, tensor in base.state_dict().items() if name != "lm_head.weight"}
    with pytest.raises(
        AdapterError, match=r"no weight 'lm_head\.weight' \(a checkpoint leaves out a head that is tied"
    ):
        Adapter.from_peft(tmp_path, saved, **options)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_copies_of_the_base_in_pefts_folder(tmp_path: Path) -> None:
    trained(llama, peft.LoraConfig(r=1, target_modules=["lm_head", "q_proj"]), tmp_path)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "adapter_model.safetensors")
    check_against_peft(llama, tmp_path, Adapter.from_peft(tmp_path, made(llama), density=1.0))
    Adapter.from_peft(tmp_path, made(llama, torch.float64), density=1.0)  # the same numbers
    other = made(llama)
    other.lm_head.weight[0, 0] += 1
    with pytest.raises(AdapterError, match=r"copies of the base's weights differ .*lm_head\.base_layer\.weight; give"):
        Adapter.from_peft(tmp_path, other, density=1.0)


def test_a_vocabulary_that_has_grown(tmp_path: Path) -> None:
    """PEFT saves the embedding then, under the base's own name."""
    larger = made(Model)
    larger.embed = nn.Embedding(10, 24).requires_grad_(False)
    saved = {"base_model.model.embed.weight": larger.embed.weight.clone()}
    folder = rewritten(lora_folder(tmp_path), lambda tensors, prefix: tensors.update(saved))
    with pytest.raises(
        AdapterError, match=r"differ from the base: .*embed\.weight; give .*\(with a larger vocabulary\?\)"
    ):
        Adapter.from_peft(folder, made(Model), density=1.0)
    assert set(Adapter.from_peft(folder, larger, density=1.0).weights) == {"layers.0.v_proj.weight"}


def test_what_says_what_the_base_says_is_no_change(tmp_path: Path) -> None:
    folder = lora_folder(tmp_path, bias="all")
    assert "base_model.model.q_proj.bias" in load_file(folder / "adapter_model.safetensors")
    assert set(Adapter.from_peft(folder, made(Model), density=1.0).weights) == {"layers.0.v_proj.weight"}
    rewritten(folder, lambda tensors, prefix: [tensors.pop(key) for key in list(tensors) if "lora_" in key])
    with pytest.raises(AdapterError, match="it holds no weights"):
        Adapter.from_peft(folder, made(Model), density=1.0)
    other = made(Model)
    other.layers[0].q_proj.bias[0] += 1
    with pytest.raises(AdapterError, match=r"biases and DoRA have no sparse form\): .*q_proj\.bias"):
        Adapter.from_peft(folder, other, density=1.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"trainable_token_indices": {"embed": [1, 2]}}, "this one has trainable_token_indices"),
        ({"target_modules": ["embed", "v_proj"]}, r"no sparse form\): .*lora_embedding_A"),
        ({"lora_bias": True, "target_modules": ["layers.0.q_proj"]}, "this one has lora_bias"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Adapter .default.. 1 LoRA tensor")
def test_what_is_more_than_a_lora_on_linear_layers(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(AdapterError, match=says):
        Adapter.from_peft(lora_folder(tmp_path, **options), made(Model), density=1.0)


def test_a_lora_on_a_convolution_is_refused(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten())

    trained(build, peft.LoraConfig(r=2, target_modules=["0"]), tmp_path)
    with pytest.raises(AdapterError, match=r"'0\.weight' must be a float matrix in the base, got shape \[8, 4, 3, 3\]"):
        Adapter.from_peft(tmp_path, made(build), density=1.0)


# ---- folders from strangers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"alpha_pattern": ["v_proj"]}, r"alpha_pattern must map patterns to numbers, got \['v_proj'\]"),
        ({"alpha_pattern": {"v_proj(": 3}}, r"alpha_pattern's 'v_proj\(' cannot be used: a \( has no \)"),
        ({"alpha_pattern": {"v_proj": "much"}}, "lora_alpha must be a finite number .*, got 'much'"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number .*, got an int of 1,329 bits"),
        ({"lora_alpha": 1e40}, "lora_alpha must be a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number"),
        ({"lora_alpha": 1e38}, r"its B @ A is not finite"),
    ],
)  # fmt: skip
def test_settings_of_strangers(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    folder = lora_folder(tmp_path)
    rewritten(folder, lambda tensors, prefix: tensors[prefix + "lora_B.weight"].fill_(100.0))
    with pytest.raises(AdapterError, match=says):
        Adapter.from_peft(changed(folder, **settings), made(Model), density=1.0)


def test_a_regex_that_explodes_is_no_trouble(tmp_path: Path) -> None:
    folder = changed(lora_folder(tmp_path), alpha_pattern={r"(.*)*(.*)*x|(\w+)+\d": 9}, target_modules="(a|a)*" * 99)
    assert len(Adapter.from_peft(folder, made(Model), density=1.0)) == 1


FACTORS: dict[str, tuple[Callable[[Any, str], Any], str]] = {
    "rank 0": (
        lambda t, p: t.update({p + "lora_A.weight": torch.zeros(0, 16), p + "lora_B.weight": torch.zeros(32, 0)}),
        r"must be float matrices that multiply, got \[0, 16\] of float32, \[32, 0\]",
    ),
    "a scalar": (lambda t, p: t.update({p + "lora_A.weight": torch.ones(())}), r"got \[\] of float32"),
    "integers": (lambda t, p: t.update({p + "lora_A.weight": torch.ones(2, 16, dtype=torch.int8)}), "of int8"),
    "a product of any size": (
        lambda t, p: t.update({p + "lora_A.weight": torch.ones(1, 2**20), p + "lora_B.weight": torch.ones(2**20, 1)}),
        r"B @ A has shape \[1048576, 1048576\], and the base's weight \[32, 16\]",
    ),
    "nan": (lambda t, p: t[p + "lora_A.weight"].fill_(float("nan")), "B @ A is not finite"),
    "twice": (
        lambda t, p: t.update({k.removeprefix("base_model.model."): t[k].clone() for k in list(t)}),
        "module 'layers.0.v_proj' has lora_[AB] twice",
    ),
}


@pytest.mark.parametrize("what", FACTORS)
def test_factors_of_strangers(tmp_path: Path, what: str) -> None:
    change, says = FACTORS[what]
    with pytest.raises(AdapterError, match=says):
        Adapter.from_peft(rewritten(lora_folder(tmp_path), change), made(Model), density=1.0)


def test_shira_places_that_are_no_places(tmp_path: Path) -> None:
    for number, says in ((0.5, r"its entry \(0\.5, \d"), (float("nan"), r"its entry \(nan, "), (1e30, "is outside")):
        folder = shira_folder(tmp_path)
        places = load_file(folder / "adapter_model.safetensors")["base_model.model.layers.0.v_proj.shira_indices"]
        places = places.to(torch.float32)
        places[0, 0] = number
        rewritten(folder, lambda t, p, new=places: t.update({p + "shira_indices": new}))
        with pytest.raises(AdapterError, match=says):
            Adapter.from_peft(folder, made(Model))


def test_bases_and_files_of_strangers(tmp_path: Path) -> None:
    folder = lora_folder(tmp_path / "lora")
    base = tmp_path / "base"
    base.mkdir()
    save_file(made(Model).state_dict(), base / "1")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"layers.0.v_proj.weight": 1}}))
    with pytest.raises(AdapterError, match="weight_map must map names to names of files"):
        Adapter.from_peft(folder, base, density=1.0)
    os.unlink(folder / "adapter_config.json")
    os.mkfifo(folder / "adapter_config.json")
    with pytest.raises(AdapterError, match="this is a pipe or a device"):
        Adapter.from_peft(folder, made(Model), density=1.0)


def test_what_cannot_be_written_again_is_left_out(tmp_path: Path) -> None:
    odd = {"base_model_name_or_path": "\ud800", "task_type": {"a": 1}, "peft_version": 3, "r": float("nan")}
    adapter = Adapter.from_peft(changed(lora_folder(tmp_path), **odd), made(Model), density=0.5)
    assert (adapter.provenance, adapter.mask["r"]) == ({}, None)
    adapter.save(tmp_path / "ours.safetensors")


ODD: list[Any] = [
    None, True, 0, -1, 1, 2**63, 10**400, -0.0, 1e-320, 1e308, float("nan"), float("inf"), "", "a", "(", "(a+)+$",
    "\ud800", "x" * 5000, [], [[]], [1], ["v_proj"], {}, {"": 1}, {"(": 1}, {"v_proj": None}, {"v_proj": {}},
    {"a": 10**400},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["SHIRA", "LORA"])
def test_broken_folders_bring_up_nothing_but_refusals(tmp_path: Path, kind: str) -> None:
    """Settings of any type and value, tensors of any name, dtype and shape: an adapter comes out, or one sentence."""
    folder = (shira_folder if kind == "SHIRA" else lora_folder)(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    base, chance, read = made(Model), random.Random(kind), 0
    longest = 0
    options = {"density": 0.5} if kind == "LORA" else {}
    names = [
        *tensors,
        "",
        ".",
        "a.lora_A.weight",
        "base_model.model.embed.weight",
        "lora_A.weight",
        "x.lora_B.\nweight",
    ]
    dtypes = [torch.float32, torch.float16, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64]
    for _ in range(60):
        settings = dict(config)
        for key in chance.sample(sorted(config), chance.randrange(3)):
            settings[key] = chance.choice(ODD)
        settings["peft_type"] = kind
        parts = dict(tensors)
        for name in chance.sample(names, chance.randrange(3)):
            shape = chance.choice([(), (0,), (1,), (64,), (2, 0), (2, 64), (96, 1), (1, 16), (32, 2), (1, 2, 3)])
            made_of = torch.full(shape, chance.choice([0, 1, -1, 31]), dtype=torch.float32)
            parts[name] = made_of.to(chance.choice(dtypes))
        for name in chance.sample(sorted(tensors), chance.random() < 0.1):
            parts.pop(name)
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        save_file(parts, folder / "adapter_model.safetensors")
        try:
            adapter = Adapter.from_peft(folder, base, **options)
        except AdapterError as error:
            longest = max(longest, len(str(error)))
        else:
            read += 1
            adapter.save(tmp_path / "ours.safetensors")
    assert 5 < read < 55
    assert longest < 2000
    text = json.dumps(config)
    for _ in range(30):
        at = chance.randrange(len(text))
        (folder / "adapter_config.json").write_text(
            text[:at] + chance.choice(["", "{", "]", '"', "9", ","]) + text[at + 1 :]
        )
        save_file(tensors, folder / "adapter_model.safetensors")
        with suppress(AdapterError):
            Adapter.from_peft(folder, base, **options)


# ---- writing -------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_an_adapter_is_written_over_on_request_alone(tmp_path: Path) -> None:
    folder = shira_folder(tmp_path)
    (folder / "notes.txt").write_text("keep")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    adapter = Adapter({"a.weight": entry()}, delta=True)
    with pytest.raises(FileExistsError, match=r"holds an adapter already .* overwrite=True"):
        adapter.to_peft(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    adapter.to_peft(folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "keep"
    assert Adapter.from_peft(folder, {"a.weight": torch.zeros(8, 8)}).weights["a.weight"].nnz == 16
    assert {path.name for path in folder.iterdir()} == set(before)


@pytest.mark.parametrize("fresh", [True, False])
def test_whoever_reads_while_it_is_written_finds_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    """Everything that touches the folder fails once: what is there then is the old adapter, the new one or none."""
    base = {"a.weight": torch.zeros(8, 8), "b.weight": torch.zeros(16, 4)}
    old, new = (Adapter({name: entry(tuple(base[name].shape))}, delta=True) for name in base)
    found = []
    for fails in range(12):
        folder = tmp_path / str(fails)
        if not fresh:
            old.to_peft(folder)
        calls = iter(range(100))

        def failing(real: Callable[..., Any], fails: int = fails, calls: Iterator[int] = calls) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                if next(calls) == fails:
                    raise OSError("killed")
                return real(*args, **options)

            return call

        with monkeypatch.context() as patch, suppress(OSError):
            for name in ("fsync", "replace", "unlink"):
                patch.setattr(os, name, failing(getattr(os, name)))
            new.to_peft(folder, overwrite=True)
        if not folder.exists():
            assert fresh
            found.append("none")
        elif not (folder / "adapter_config.json").exists():
            found.append("none")
        else:
            found.append(",".join(Adapter.from_peft(folder, base).weights))
    assert set(found) == ({"none", "b.weight"} if fresh else {"a.weight", "none", "b.weight"})
    assert found[-1] == "b.weight"


def test_how_exact_pefts_folder_is(tmp_path: Path) -> None:
    """As `Adapter.to_peft` says: the largest distances from the adapter's own entries, over base and new ones."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64, bias=False)

    for dtype, close in ((torch.bfloat16, 2**-7), (torch.float16, 2**-10), (torch.float32, 0.0)):
        base = made(One, dtype)
        before = base.layer.weight.clone()
        new = torch.randn(1000).mul(0.1).to(dtype)  # of the base's size and far smaller
        old = before.view(-1)[::4][:1000]
        new = torch.where(new.abs() * 2**12 < old.abs(), old, new)
        indices = torch.arange(0, 4000, 4, dtype=torch.int32)
        Adapter({"layer.weight": Entry(indices, new, (64, 64), dtype)}).to_peft(
            tmp_path / str(dtype), {"layer.weight": before}
        )
        larger = torch.maximum(old.abs(), new.abs()).double()
        for options in ({}, {"autocast_adapter_dtype": False}):
            opened = peft.PeftModel.from_pretrained(made(One, dtype), str(tmp_path / str(dtype)), **options)
            got = opened.merge_and_unload().layer.weight.view(-1)[::4][:1000]
            off = ((got.double() - new.double()).abs() / larger.clamp(min=1e-30)).max()
            if dtype == torch.float32:
                assert 0 < off <= 2**-23
            elif options:
                assert 0 < off <= close
            else:
                assert torch.equal(got, new)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_a_base_with_other_names(tmp_path: Path) -> None:
    """A checkpoint of the model without its head, as GPT-2's on the Hub."""
    trained(gpt2, peft.LoraConfig(r=2, target_modules=["c_attn"], bias="all"), tmp_path)
    base = made(gpt2).transformer.state_dict()
    with pytest.raises(AdapterError, match=r"no weight 'transformer\.h\.0\.attn\.c_attn\.weight'; .* give rename="):
        Adapter.from_peft(tmp_path, base, density=1.0)
    adapter = Adapter.from_peft(tmp_path, base, density=1.0, rename={r"^transformer\.": ""})
    assert set(adapter.weights) == {f"h.{layer}.attn.c_attn.weight" for layer in (0, 1)}
    wanted = Adapter.from_peft(tmp_path, made(gpt2), density=1.0)
    for name, entry in adapter.weights.items():
        assert torch.equal(entry.values, wanted.weights[f"transformer.{name}"].values)
    with pytest.raises(AdapterError, match="rename= gives two modules one weight"):
        Adapter.from_peft(tmp_path, base, density=1.0, rename={r"^transformer\.h\.\d": "h.0"})


def test_a_tuner_leaves_the_layers_of_a_lora_alone() -> None:
    """Unless they are named: by default it trains the layers that the model had before."""
    model = peft_model(torch.float32, peft.LoraConfig(r=2, target_modules=["v_proj"]))
    block, base = "base_model.model.layers.0", {name: p.detach().clone() for name, p in model.named_parameters()}
    lora = [f"{block}.v_proj.lora_{which}.default" for which in "AB"]
    with SparseTuner(model, masks.Rand(density=0.5)) as tuner:
        wanted = [f"{block}.q_proj", f"{block}.v_proj.base_layer", "base_model.model.q_proj"]
        assert list(tuner.adapter().weights) == [f"{name}.weight" for name in wanted]
        told = f"left out: {', '.join(lora)}, which PEFT added to the model's own layers"
        assert tuner.summary().splitlines()[-1] == told
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        model(INPUT).square().sum().backward()
        optimizer.step()
        trained = dict(model.named_parameters())
        assert all(torch.equal(trained[f"{name}.weight"], base[f"{name}.weight"]) for name in lora)
        assert not any(torch.equal(trained[f"{name}.weight"], base[f"{name}.weight"]) for name in wanted)
    with SparseTuner(model, masks.Rand(density=0.5), targets="lora_A") as tuner:
        assert list(tuner.adapter().weights) == [f"{lora[0]}.weight"]
        assert "left out" not in tuner.summary()
