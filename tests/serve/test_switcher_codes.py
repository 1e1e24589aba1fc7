"""A Switcher on quantized storage: codes and scales are moved as they are, and put back bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shira
from quantized import KINDS
from shira import _linears

# The scales of bitsandbytes' nested 4 bits are partly a text.
NAMES = [kind for kind in KINDS if kind != "bitsandbytes nf4"]


def plain(tuned: bool = False) -> list[nn.Linear]:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 128), nn.Linear(128, 64)]
    if tuned:
        with torch.no_grad():
            for layer in layers:
                layer.weight.view(-1)[torch.randperm(8192)[:200]] *= 0.7
                layer.weight.view(-1)[0] = 0.3  # so that one scale changes, too
    return layers


def quantized(kind: str, tuned: bool = False) -> nn.Module:
    one, two = (KINDS[kind](layer) for layer in plain(tuned))
    return nn.Sequential(one, nn.Tanh(), two)


def content(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for layer in _linears.find(model).values() for tensor in layer.stored()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", NAMES)
def test_codes_and_scales_are_switched_exactly(kind: str, tmp_path: Path) -> None:
    base, tuned, x = quantized(kind), quantized(kind, tuned=True), torch.randn(3, 64)
    before, wanted = content(base), content(tuned)
    assert not same(before, wanted)
    outputs = base(x), tuned(x)
    adapter = shira.Adapter.from_difference(base.state_dict(), tuned.state_dict())
    adapter.save(tmp_path / "codes.safetensors")
    pointers = [tensor.data_ptr() for layer in _linears.find(base).values() for tensor in layer.stored()]
    switcher = shira.Switcher(base)
    switcher.add("tuned", tmp_path / "codes.safetensors")
    for _ in range(2):
        switcher.activate("tuned")
        assert same(content(base), wanted)
        assert torch.equal(base(x), outputs[1])
        switcher.verify(full=True)
        switcher.deactivate()
        assert same(content(base), before)
        assert torch.equal(base(x), outputs[0])
    assert pointers == [tensor.data_ptr() for layer in _linears.find(base).values() for tensor in layer.stored()]


@pytest.mark.parametrize("kind", NAMES)
def test_codes_cannot_be_scaled_mixed_or_written_over_another_base(kind: str) -> None:
    base, tuned = quantized(kind), quantized(kind, tuned=True)
    adapter = shira.Adapter.from_difference(base.state_dict(), tuned.state_dict())
    switcher, before = shira.Switcher(base), content(base)
    switcher.add("tuned", adapter)
    for refused in ({"name": "tuned", "alpha": 0.5}, {"name": {"tuned": 0.5}}):
        options: dict[str, Any] = dict(refused)
        with pytest.raises((shira.AdapterError, RuntimeError), match=r"int8|uint8|float8"):
            switcher.activate(options.pop("name"), **options)
        assert same(content(base), before)
    other = shira.Switcher(tuned)
    with pytest.raises(shira.AdapterError, match="was made for another base"):
        other.add("tuned", adapter)


@pytest.mark.parametrize("kind", NAMES)
def test_codes_under_an_overlay_are_not_written(kind: str) -> None:
    base, tuned = quantized(kind), quantized(kind, tuned=True)
    adapter = shira.Adapter.from_difference(base.state_dict(), tuned.state_dict())
    switcher, before = shira.Switcher(base), content(base)
    switcher.add("tuned", adapter)
    with shira.SparseTuner(base, shira.masks.Rand(density=0.1), overlay=True):
        with pytest.raises(RuntimeError, match="is being tuned by a SparseTuner"):
            switcher.activate("tuned")
        assert same(content(base), before)
    switcher.activate("tuned")
    with pytest.raises(RuntimeError, match="has an active adapter of a Switcher"):
        shira.SparseTuner(base, shira.masks.Rand(density=0.1), overlay=True)


def test_fp8_parameters() -> None:
    """As in checkpoints of float8 layers: codes and scales are parameters."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    base = nn.Sequential(fp8.FP8Linear(128, 64, block_size=(32, 32)))
    torch.manual_seed(0)
    with torch.no_grad():
        base[0].weight.copy_(torch.randn(64, 128).to(torch.float8_e4m3fn))
        base[0].weight_scale_inv.uniform_(0.5, 1.5)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight.view(torch.uint8).view(-1)[::97] ^= 3
        tuned[0].weight_scale_inv.view(-1)[3] *= 2
    adapter = shira.Adapter.from_difference(base.state_dict(), tuned.state_dict(), granule=4)
    assert {name: str(entry.dtype) for name, entry in adapter.weights.items()} == {
        "0.weight": "torch.float8_e4m3fn", "0.weight_scale_inv": "torch.float32",
    }  # fmt: skip
    switcher, before = shira.Switcher(base), content(base)
    switcher.add("tuned", adapter)
    with switcher.using("tuned"):
        assert same(content(base), content(tuned))
    assert same(content(base), before)


def test_an_adapter_for_dequantized_weights_is_refused() -> None:
    layers = plain()
    with shira.SparseTuner(nn.Sequential(layers[0], nn.Tanh(), layers[1]), shira.masks.Rand(density=0.1)) as tuner:
        adapter = tuner.adapter()
    for kind, says in (("own int8", "'0.weight' is not in the model"), ("quanto int8", "is a WeightQBytesTensor")):
        if kind.startswith("quanto"):
            pytest.importorskip("optimum.quanto")
        switcher = shira.Switcher(quantized(kind))
        with pytest.raises(shira.AdapterError, match=says):
            switcher.add("a", adapter)


def test_scales_that_a_tuner_trains_are_not_written() -> None:
    base, tuned = quantized("own int8"), quantized("own int8", tuned=True)
    adapter = shira.Adapter.from_difference(base.state_dict(), tuned.state_dict())
    for module in (base[0], base[2]):  # type: ignore[index]
        scales = module._buffers.pop("scales")
        module.register_parameter("scales", nn.Parameter(scales))
    switcher = shira.Switcher(base)
    switcher.add("tuned", adapter)
    tuner = shira.SparseTuner(base, shira.masks.Rand(density=0.5), r"0\.scales")
    with pytest.raises(RuntimeError, match=r"0\.scales is being tuned by a SparseTuner"):
        switcher.activate("tuned")
    tuner.detach()
    with switcher.using("tuned"):
        assert same(content(base), content(tuned))


@pytest.mark.parametrize("kind", [kind for kind in NAMES if not kind.startswith("bitsandbytes")])
def test_codes_that_are_loaded_over_are_noticed(kind: str) -> None:
    """Also where they are written through the tensor that wraps them. bitsandbytes' layers do not load codes."""
    torch.manual_seed(1)
    base, tuned, other = quantized(kind), quantized(kind, tuned=True), nn.Sequential(KINDS[kind](nn.Linear(64, 128)))
    before = content(base)
    switcher = shira.Switcher(base)
    switcher.add("tuned", shira.Adapter.from_difference(base.state_dict(), tuned.state_dict()))
    switcher.activate("tuned")
    base[0].load_state_dict({**other[0].state_dict(), "bias": base[0].bias.detach().clone()})
    with pytest.raises(
        shira.SwitchError, match=r"0\.(weight|codes|scales)\S* (was changed by someone else|is no longer)"
    ):
        switcher.deactivate()
    assert not same(content(base), before)
