"""What the tests of live updates compare: the bits of a model's parameters and buffers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes: equal where every bit is, NaNs and the sign of a zero included."""
    return tensor.detach().clone().contiguous().view(-1).view(torch.uint8)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: bits(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
