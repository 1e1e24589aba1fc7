"""PEFT's adapters, with the real PEFT: what it saves is read to the same outputs, and it opens what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import shira_ops
from shira import Adapter, AdapterError, Entry, SparseTuner, Switcher, masks

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore:.*find a config file")
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
    "outside": (
        lambda t, p: t[p + "shira_indices"][0].fill_(32),
        r"its entry \(32, \d+\) is outside the base's \[32, 16\]",
    ),
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
    with pytest.raises(AdapterError, match="density and granule are for LORA"):
        Adapter.from_peft(folder, base, density=0.1)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="its weights are a pickle"):
        Adapter.from_peft(folder, base)

    def lora(**options: object) -> Path:
        peft_model(torch.float32, peft.LoraConfig(r=2, target_modules=["v_proj"], **options)).save_pretrained(tmp_path)
        return tmp_path

    with pytest.raises(AdapterError, match="a LORA is dense: give density="):
        Adapter.from_peft(lora(), base)
    with pytest.raises(AdapterError, match="only plain LORA can be read, and this one has use_dora"):
        Adapter.from_peft(lora(use_dora=True), base, density=0.1)
    with pytest.raises(AdapterError, match="no sparse form"):
        Adapter.from_peft(lora(modules_to_save=["q_proj"]), base, density=0.1)
    with pytest.raises(AdapterError, match="granule 3 must divide"):
        Adapter.from_peft(lora(), base, density=0.1, granule=3)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(AdapterError, match="only PEFT's SHIRA and LORA can be read, got 'IA3'"):
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
    return Entry(indices, torch.ones(count), shape, torch.float32, **options)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (
            {"a.bias": Entry(torch.zeros(1, dtype=torch.int32), torch.ones(8), (8,), torch.float32, 8)},
            "a whole parameter",
        ),
        ({"conv.weight": entry((2, 2, 4, 4))}, r"of shape \[2, 2, 4, 4\] is no linear layer's weight"),
        ({"a.scale": entry()}, "is no linear layer's weight"),
        ({"a.weight": entry(aliases=("b.weight",))}, "is tied to 'b.weight'"),
        (
            {"a.weight": entry(), "b.weight": entry((16, 16), 200)},
            "r = 7: 'a.weight' has 64 entries, and 112 are needed",
        ),
        ({}, "an adapter without weights"),
    ],
)  # fmt: skip
def test_what_cannot_be_written(tmp_path: Path, weights: dict[str, Entry], says: str) -> None:
    with pytest.raises(AdapterError, match=says):
        Adapter(weights, delta=True).to_peft(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_modules_and_bases_that_do_not_fit(tmp_path: Path) -> None:
    model = model_of(torch.float32)
    with pytest.raises(AdapterError, match="belongs to a Embedding, not to a Linear"):
        Adapter({"embed.weight": entry((8, 24))}, delta=True).to_peft(tmp_path / "out", model)
    with pytest.raises(AdapterError, match="this adapter replaces entries: give base="):
        Adapter({"a.weight": entry()}).to_peft(tmp_path / "out")
