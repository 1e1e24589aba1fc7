"""What the library knows of layers: what they compute, and what their base weight is, quantized or not."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from quantized import KINDS, Int8Linear
from shira import _granules, _linears
from shira._text import AdapterError


class Scaled(nn.Linear):
    """Uses its weight in another way than nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Plain(nn.Linear):
    """A subclass with nn.Linear's forward."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        torch.manual_seed(0)
        self.embedding, self.conv1d = nn.Embedding(12, 8), conv1d(6, 8)
        self.linear, self.plain, self.own = nn.Linear(8, 4), Plain(8, 8), Int8Linear(nn.Linear(8, 16))
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.scaled, self.norm, self.attention = Scaled(8, 4), nn.LayerNorm(8), nn.MultiheadAttention(8, 2)
        self.replaced, self.bilinear = nn.Linear(8, 8), nn.Bilinear(8, 8, 4)
        self.replaced.forward = lambda input: input  # type: ignore[method-assign]
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))


def test_what_is_found() -> None:
    layers = _linears.find(Model())
    found = {name: (one.kind, one.shape, one.in_features, one.out_features) for name, one in layers.items()}
    assert found == {
        "embedding.weight": ("embedding", (12, 8), 12, 8),
        "conv1d.weight": ("conv1d", (8, 6), 8, 6),
        "linear.weight": ("linear", (4, 8), 8, 4),
        "plain.weight": ("linear", (8, 8), 8, 8),
        "own.weight": ("linear", (16, 8), 8, 16),
        "head.weight": ("linear", (12, 8), 8, 12),
    }
    assert [one.transposed for one in layers.values()] == [True, True, False, False, False, False]
    assert [one.quantized for one in layers.values()] == [False] * 4 + [True, False]
    assert layers["embedding.weight"].one == layers["head.weight"].one != layers["linear.weight"].one


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("scaled", "scaled.weight belongs to a Scaled, and it is not known how that computes with it"),
        ("replaced", "replaced.weight belongs to a Linear, and it is not known how that computes with it"),
        ("attention.out_proj", "attention.out_proj.weight belongs to a NonDynamicallyQuantizableLinear, and it is not"),
        ("bilinear", "bilinear.weight belongs to a Bilinear"),
        ("norm", "norm.weight belongs to a LayerNorm"),
    ],
)
def test_what_is_not_found_is_named(name: str, says: str) -> None:
    model = Model()
    assert _linears.unknown(f"{name}.weight", model.get_submodule(name)).startswith(says)
    lazy = nn.Sequential(nn.LazyLinear(4))
    assert not _linears.find(lazy)
    assert "has no shape yet: run the model once first" in _linears.unknown("0.weight", lazy[0])
    assert _linears.unknown("linear.bias", model.linear).startswith("linear.bias is not the weight of the Linear")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_a_plain_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 8).to(dtype)
    linear = nn.Linear(8, 6, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    layer = _linears.find(nn.Sequential(linear))["0.weight"]
    assert (layer.dtype, layer.device.type, layer.foreign, layer.obstacle) == (dtype, "cpu", None, None)
    assert layer.dense().data_ptr() == linear.weight.data_ptr() == layer.stored()[0].data_ptr()
    assert layer.fingerprint() == _granules.fingerprint(weight)
    entries = layer.entries(torch.tensor([1, 5], dtype=torch.int32), 4)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(entries, torch.cat([weight.view(-1)[4:8], weight.view(-1)[20:24]]).to(compute))
    linear.weight = nn.Parameter(weight.t().contiguous().t(), requires_grad=False)  # the same numbers in another order
    assert layer.fingerprint() == _granules.fingerprint(weight)
    assert torch.equal(layer.entries(torch.tensor([1, 5], dtype=torch.int32), 4), entries)


def made(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, nn.Module, _linears.Layer]:
    torch.manual_seed(0)
    before = nn.Linear(128, 64).to(dtype)
    model = nn.Sequential(KINDS[kind](before))
    return before, model, _linears.find(model)["0.weight"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_weight(kind: str, dtype: torch.dtype) -> None:
    before, model, layer = made(kind, dtype)
    assert (layer.kind, layer.shape, layer.quantized) == ("linear", (64, 128), True)
    assert (layer.in_features, layer.out_features, layer.dtype, layer.device.type) == (128, 64, dtype, "cpu")
    dense = layer.dense()
    assert tuple(dense.shape) == (64, 128)
    error = (dense.float() - before.weight.float()).abs().max()
    assert 0 < error < 0.02
    # It is what the layer itself computes with.
    x = torch.randn(3, 128).to(dtype)
    wanted = x.float() @ dense.float().T + before.bias.float()
    torch.testing.assert_close(model(x).float(), wanted, rtol=0.02, atol=0.02)
    indices = torch.tensor([0, 3, 100, 511], dtype=torch.int32)
    assert torch.equal(layer.entries(indices, 16), dense.reshape(-1, 16)[indices.long()].reshape(-1).float())
    assert torch.equal(layer.entries(torch.tensor([5]), 1), dense.reshape(-1)[5:6].float())
    assert tuple(layer.stand_in().shape) == (64, 128)
    assert layer.stand_in().untyped_storage().nbytes() == dtype.itemsize


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_of_a_quantized_base_is_what_it_stores(kind: str) -> None:
    _, model, layer = made(kind)
    known = layer.fingerprint()
    assert known == made(kind)[2].fingerprint()
    bias: Any = model[0].bias  # type: ignore[index]
    with torch.no_grad():
        bias.add_(1)
    assert layer.fingerprint() == known
    seen = set()
    for tensor in layer.stored():
        content = tensor.view(-1).view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
        with torch.no_grad():
            content[0] ^= 1
        seen.add(layer.fingerprint())
        with torch.no_grad():
            content[0] ^= 1
    assert len(seen) == len(layer.stored())
    assert known not in seen
    assert layer.fingerprint() == known


def test_layers_are_copied_with_their_model() -> None:
    model = Model()
    del model.replaced.forward
    layers = _linears.find(model)
    other = copy.deepcopy(layers["own.weight"])
    assert other.module is not model.own
    assert other.fingerprint() == layers["own.weight"].fingerprint()
    assert pickle.loads(pickle.dumps(other)).shape == (16, 8)


def test_dequantize_that_returns_something_else() -> None:
    own = Int8Linear(nn.Linear(8, 16))
    own.dequantize = lambda: own.codes  # type: ignore[method-assign]
    layer = _linears.of("own.weight", own)
    assert layer is not None
    with pytest.raises(AdapterError, match=r"own\.weight: dequantize\(\) of Int8Linear must return floats of shape"):
        layer.dense()


def test_a_layer_of_ones_own_needs_codes_of_its_own() -> None:
    own = Int8Linear(nn.Linear(8, 16))
    own.register_buffer("cache", torch.zeros(3), persistent=False)
    layer = _linears.of("own.weight", own)
    assert layer is not None
    assert [tensor.data_ptr() for tensor in layer.stored()] == [own.codes.data_ptr(), own.scales.data_ptr()]
    del own.codes, own.scales
    assert _linears.of("own.weight", own) is None
    assert "without parameters or buffers of its own" in _linears.unknown("own.weight", own)


def test_4_bits_that_are_packed_keep_their_identity() -> None:
    """On CPUs with bfloat16 bitsandbytes packs the codes and rounds the scales in the first forward in eval()."""

    def pack(model: Any) -> None:
        weight, functional = model[0].weight, pytest.importorskip("bitsandbytes").functional
        weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)

    _, model, layer = made("bitsandbytes nf4")
    known, dense = layer.fingerprint(), layer.dense()
    pack(model)
    assert layer.fingerprint() == known
    assert layer.dtype == torch.float32
    torch.testing.assert_close(layer.dense(), dense, rtol=2**-8, atol=0)
    _, model, layer = made("bitsandbytes nf4")
    pack(model)
    with pytest.raises(AdapterError, match="bitsandbytes has packed it for this CPU"):
        layer.fingerprint()


def test_what_is_not_quantized_yet() -> None:
    bnb, quanto = pytest.importorskip("bitsandbytes"), pytest.importorskip("optimum.quanto")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64), nn.Linear(64, 64))
    quanto.quantize(model[1:], weights=quanto.qint8)
    assert "0.weight" not in _linears.find(model)
    assert "is not quantized yet: move the model to its device" in _linears.unknown("0.weight", model[0])
    model[1] = quanto.nn.QLinear.from_module(nn.Linear(64, 64), weights=quanto.qint8)
    assert "call optimum.quanto.freeze(model)" in _linears.unknown("1.weight", model[1])


@pytest.mark.parametrize("permuted", [False, True])
def test_transformers_gguf(permuted: bool) -> None:
    """Of blocks that stay as they are in a file; its forward needs a GPU."""
    gguf = pytest.importorskip("transformers.integrations.gguf.utils")
    module = gguf.GgufLinear(64, 32, 8)  # Q8_0: a scale in float16, then 32 codes
    scales, codes = torch.rand(32, 2).half() + 0.5, torch.randint(-127, 128, (32, 2, 32), dtype=torch.int8)
    blocks = torch.cat([scales.view(32, 2, 1).view(torch.uint8), codes.view(torch.uint8)], 2)
    module.weight.data.copy_(blocks.view(32, -1))
    wanted = (scales.float()[:, :, None] * codes).view(32, 64)
    if permuted:
        module.input_permutation = torch.randperm(64)
        x = torch.randn(3, 64, dtype=torch.float64)
        sums = x[:, module.input_permutation] @ wanted.double().T
    layer = _linears.find(nn.Sequential(module, nn.Linear(4, 4, dtype=torch.bfloat16)))["0.weight"]
    assert (layer.shape, layer.quantized, layer.dtype) == ((32, 64), True, torch.bfloat16)
    if permuted:
        torch.testing.assert_close(x @ layer.dense().double().T, sums)
    else:
        assert torch.equal(layer.dense(), wanted)
        assert torch.equal(layer.entries(torch.tensor([3, 7]), 16), wanted.view(-1, 16)[[3, 7]].view(-1))


@pytest.mark.parametrize("block", [None, (32, 48)])
def test_transformers_fp8(block: tuple[int, int] | None) -> None:
    """Its forward needs a GPU; what it stores does not."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    module = fp8.FP8Linear(128, 64, block_size=block)
    with torch.no_grad():
        module.weight.copy_(torch.randn(64, 128).to(torch.float8_e4m3fn))
        module.weight_scale_inv.uniform_(0.5, 1.5)
    layer = _linears.find(nn.Sequential(module, nn.Linear(4, 4, dtype=torch.bfloat16)))["0.weight"]
    assert (layer.shape, layer.quantized, layer.dtype) == ((64, 128), True, torch.bfloat16)
    scales = module.weight_scale_inv.detach()
    for i, j in ((0, 0), (31, 47), (32, 48), (63, 127)):
        scale = scales if block is None else scales[i // 32, j // 48]
        assert layer.dense()[i, j] == module.weight[i, j].float() * scale
