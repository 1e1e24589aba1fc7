"""The loss of a model on a batch, for calibrating a mask and for training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def loss_of_model(model: nn.Module, batch: Any) -> Tensor:
    """The loss the model itself gives: ``output.loss`` or ``output["loss"]``, or its output if that is a tensor.

    The model is called with a mapping as ``model(**batch)``, a tuple or list as ``model(*batch)``, a tensor as
    ``model(batch)``.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, (tuple, list)):
        output = model(*batch)
    elif isinstance(batch, Tensor):
        output = model(batch)
    else:
        raise ValueError(
            f"a batch must be a mapping, a tuple, a list or a tensor, got {type(batch).__name__}; for any other give "
            f"loss=, a function of (model, batch)"
        )
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "loss", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("loss")
    if found is None:
        raise ValueError(
            f"the model's output, {type(output).__name__}, has no loss; give the batches their labels, or loss=, a "
            f"function of (model, batch)"
        )
    return found  # type: ignore[no-any-return]


def scalar(loss: Any, what: str) -> Tensor:
    """The loss, which must be a tensor of one number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{what} must be a scalar tensor, got {given}")
    return loss
