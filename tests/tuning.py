"""What the tests of the tuner, its optimizers and its trainer share: bits of a model, and autograd's own gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from shira import SparseTuner

VALUES, INDICES = "_shira_values", "_shira_indices"


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, byte by byte."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.detach().clone().contiguous().view(-1).view(torch.uint8) for name, t in state.items()}


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = bits(model)
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives all weights values other than zero, at which many models start some of theirs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def dense_gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Autograd's gradient of every parameter, in a twin, under each of its names."""
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.requires_grad_(True)
        p.grad = None
    loss(twin).backward()
    named = twin.named_parameters(remove_duplicate=False)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for name, p in named}


def at_mask(dense: Tensor, indices: Tensor, nnz: int) -> Tensor:
    return dense.reshape(-1, nnz // indices.numel())[indices.long()].view(-1)


def indices_of(model: nn.Module, values_name: str) -> Tensor:
    return model.get_buffer(values_name.removesuffix(VALUES) + INDICES)


def check_gradients(
    tuner: SparseTuner, wanted: dict[str, Tensor], times: int = 1, rtol: float = 1e-10, atol: float = 1e-10
) -> None:
    """The values' gradients are the dense ones at the mask, and no dense gradient is left anywhere."""
    for name, values in tuner.named_parameters():
        assert values.grad is not None, name
        expected = at_mask(wanted[name.removesuffix(VALUES)], indices_of(tuner.model, name), values.numel())
        torch.testing.assert_close(values.grad, times * expected.to(values.dtype), rtol=rtol, atol=atol, msg=name)
    for name, p in tuner.model.named_parameters():
        assert name.endswith(VALUES) or p.grad is None, f"{name} kept a dense gradient"
