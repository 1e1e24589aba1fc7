"""What a layer computes, by its in and out features, and what its base weight is: for adapters beside the weight.

An overlay never writes the weight: it adds ``delta @ input`` to the layer's output. For that it must know that the
layer's output is linear in its weight, and nothing of how the weight is stored. `find` gives every layer of a model of
which that is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import shira_ops
from shira import _granules, _model

LINEAR, CONV1D, EMBEDDING = "linear", "conv1d", "embedding"

# transformers' linear layer of GPT-2, whose weight is [in, out]. Known by name, so that transformers is not imported.
_TRANSPOSED = ("transformers.pytorch_utils", "Conv1D")


# ---- recognising layers --------------------------------------------------------------------------------------


def is_linear(module: nn.Module) -> bool:
    """``nn.Linear`` and subclasses, and transformers' ``Conv1D``: the layers that a tuner trains by default."""
    return isinstance(module, nn.Linear) or any(_name(kind) == _TRANSPOSED for kind in type(module).__mro__)


def kind_of(module: nn.Module) -> str | None:
    """``linear``, ``conv1d`` or ``embedding``, by the ``forward`` that the module runs; None for any other.

    A subclass with a forward of its own may use its weight in another way (scaled, normalised).
    """
    if is_replaced(module):
        return None
    forward = forward_of(module)
    if forward is nn.Linear:
        # nn.MultiheadAttention's out_proj: its forward never runs.
        return None if isinstance(module, NonDynamicallyQuantizableLinear) else LINEAR
    if _name(forward) == _TRANSPOSED:
        return CONV1D
    return EMBEDDING if forward is nn.Embedding else None


def forward_of(module: nn.Module) -> type:
    """The class whose ``forward`` the module runs."""
    return next(kind for kind in type(module).__mro__ if "forward" in vars(kind))


def is_replaced(module: nn.Module) -> bool:
    """Whether the module's forward was replaced, so that it may compute something else."""
    # accelerate does so to run its hooks.
    return "forward" in vars(module) and not hasattr(module, "_hf_hook")


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


# ---- layers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer whose output is linear in its weight: the weight's name and place, its features, and what it stores.

    ``kind`` is ``linear`` (the weight is ``[out, in]``), ``conv1d`` (``[in, out]``) or ``embedding`` (``[in, out]``,
    where an index stands for the row that it selects).
    """

    name: str
    module: nn.Module
    attribute: str
    kind: str

    @property
    def weight(self) -> Tensor:
        """What the module holds now under the weight's name: for a quantized layer, its codes."""
        found = _model.held(self.module, self.attribute)
        assert found is not None
        return found

    @property
    def transposed(self) -> bool:
        """Whether the weight is ``[in, out]``, as `shira_ops.sparse_linear` means it."""
        return self.kind != LINEAR

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, dequantized."""
        return tuple(self.weight.shape)

    @property
    def in_features(self) -> int:
        return self.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        return self.shape[1 if self.transposed else 0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight, dequantized."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def dense(self) -> Tensor:
        """The weight, dequantized. Of a layer that is not quantized, the weight itself: not to be written to."""
        return self.weight.detach()

    def entries(self, indices: Tensor, granule: int) -> Tensor:
        """The weight's entries at the indices, in float32 (float64 for float64)."""
        found = shira_ops.gather(self.dense().contiguous(), indices, granule=granule)
        return found if found.dtype == torch.float64 else found.float()

    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that the weight is stored in: itself, or codes and scales."""
        return (self.weight.detach(),)

    def fingerprint(self) -> int:
        """What identifies the base: `shira_ops.fingerprint` of the weight, or one over codes and scales."""
        return _granules.fingerprint(self.weight.contiguous())


def find(model: nn.Module) -> dict[str, Layer]:
    """Every layer of the model of which it is known what it computes, by its weight's name, in the model's order.

    A module under several names is there under each of them.
    """
    found: dict[str, Layer] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        name = _model.clean(f"{prefix}.weight" if prefix else "weight")
        layer = of(name, module)
        if layer is not None:
            found[name] = layer
    return found


def of(name: str, module: nn.Module) -> Layer | None:
    """The layer that a module is, if it is known what it computes."""
    kind, weight = kind_of(module), _model.held(module, "weight")
    if kind is None or weight is None or weight.dim() != 2 or _model.foreign(weight) is not None:
        return None
    return Layer(name, module, "weight", kind)


def unknown(name: str, module: nn.Module) -> str:
    """Why nothing can be laid over a module that is not among `find`, as a sentence that begins with the weight."""
    return (
        f"{name} belongs to a {type(module).__name__}, of which it is not known how it computes with its weight; an "
        f"overlay takes nn.Linear, transformers' Conv1D and nn.Embedding, with their own forward"
    )
