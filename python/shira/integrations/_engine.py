"""What engines share: how a trainer tells what it publishes, and the Receiver that an engine makes of that."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from shira._granules import dtype_name
from shira.adapter import _file
from shira.sync import Plan, Publisher, Receiver, SyncError
from shira.sync.update import shown_version


def described(publisher: Publisher, exclude: str | None) -> str:
    """The version and the weights of a Publisher, and what to leave out of the engine's model, as JSON."""
    weights = {name: [dtype_name(one.dtype), list(one.shape)] for name, one in publisher.shapes.items()}
    return json.dumps({"version": shown_version(publisher.version), "weights": weights, "exclude": exclude})


def receiver(who: str, model: nn.Module, description: str) -> Receiver:
    """A Receiver for the engine's own layout, at the version of the Publisher that was `described`."""
    try:
        about = json.loads(description)
        version, exclude = int(about["version"], 16), about["exclude"]
        shapes = {name: _shape(dtype, shape) for name, (dtype, shape) in about["weights"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SyncError(f"{who}: the description of the trainer's weights is not one: {error!r}") from error
    load_weights: Any = getattr(model, "load_weights", None)
    if load_weights is None:
        raise SyncError(
            f"{who}: a plan is recorded with the model's own load_weights, which {type(model).__name__} does not have"
        )
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    plan = Plan.record(model, load_weights, shapes, exclude=exclude, device=device)
    return Receiver(model, plan=plan, version=version)


def _shape(dtype: str, shape: list[int]) -> torch.Tensor:
    if dtype not in _file.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_file.DTYPES)}, got {dtype!r}")
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
