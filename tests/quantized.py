"""Quantized linear layers of every kind that runs on a CPU, made from an ordinary one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Int8Linear(nn.Module):
    """A layer as users write it: int8 codes and a scale for each row, which the library knows by `dequantize` alone."""

    codes: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scales = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (layer.weight.detach() / scales).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scales", scales)
        self.bias = layer.bias

    def dequantize(self) -> Tensor:
        return self.codes * self.scales

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.dequantize().to(input.dtype), self.bias)


def _bitsandbytes(kind: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        made = getattr(pytest.importorskip("bitsandbytes").nn, kind)(layer.in_features, layer.out_features, **options)
        made.load_state_dict(layer.state_dict())
        quantized: nn.Module = made.to(layer.weight.dtype).to("cpu")
        return quantized

    return make


def _torchao(config: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization")
        model = nn.Sequential(copy.deepcopy(layer))
        quantization.quantize_(model, getattr(quantization, config)(**options))
        return model[0]

    return make


def _quanto(weights: str) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        quanto = pytest.importorskip("optimum.quanto")
        model = nn.Sequential(copy.deepcopy(layer))
        quanto.quantize(model, weights=getattr(quanto, weights))
        quanto.freeze(model)
        return model[0]

    return make


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "own int8": Int8Linear,
    "bitsandbytes nf4": _bitsandbytes("Linear4bit", quant_type="nf4"),
    "bitsandbytes fp4, scales in fp32": _bitsandbytes("Linear4bit", quant_type="fp4", compress_statistics=False),
    "bitsandbytes int8": _bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "torchao int8": _torchao("Int8WeightOnlyConfig"),
    "torchao float8": _torchao("Float8WeightOnlyConfig"),
    "torchao intx": _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "quanto int8": _quanto("qint8"),
    "quanto int4": _quanto("qint4"),
    "quanto float8": _quanto("qfloat8"),
}
