"""What engines share: how a trainer tells what it publishes, and the Receiver that an engine makes of that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shira import _model
from shira._granules import dtype_name, fnv1a64
from shira.adapter import _file
from shira.sync import Plan, Publisher, Receiver, SyncError
from shira.sync.update import bits, bits_of, shown_version

# Entries of a weight whose values are told at the start. An engine that has changed its weights after loading, into an
# order for its kernels, say, has others where its loader would put them.
_SAMPLES = 16


def described(publisher: Publisher, exclude: str | None) -> str:
    """The version and the weights of a Publisher, and what to leave out of the engine's model, as JSON."""
    publisher.verify()
    slots = _model.slots(publisher.model, buffers=True)
    weights = {}
    for name, one in publisher.shapes.items():
        flat = slots[name].weight.detach().view(-1)
        samples = bits(flat[_sampled(name, flat.numel()).to(flat.device)]).tolist()
        weights[name] = [dtype_name(one.dtype), list(one.shape), samples]
    return json.dumps({"version": shown_version(publisher.version), "weights": weights, "exclude": exclude})


def receiver(who: str, model: nn.Module, description: str) -> Receiver:
    """A Receiver for the engine's own layout, at the version of the Publisher that was `described`."""
    try:
        about = json.loads(description)
        version, exclude = int(about["version"], 16), about["exclude"]
        shapes = {name: _shape(dtype, shape) for name, (dtype, shape, _) in about["weights"].items()}
        samples = {name: _values(shapes[name], numbers) for name, (_, _, numbers) in about["weights"].items()}
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
    slots = _model.slots(model, buffers=True)
    _refuse_other_values(who, plan, samples, {name: slot.weight for name, slot in slots.items()})
    return Receiver(model, plan=plan, version=version)


def _refuse_other_values(who: str, plan: Plan, samples: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    other = []
    for name in plan.boxes:
        for weight, where, indices in plan.find(name, _sampled(name, plan.weights[name].numel), 1):
            here = weights[weight].detach().view(-1)[indices.to(weights[weight].device)].cpu()
            if not torch.equal(bits(here), bits(samples[name][where].to(here.dtype))):
                other.append(name)
    if other:
        raise SyncError(
            f"{who}: the model does not hold the trainer's weights where its loader would put them: "
            f"{_model.some(dict.fromkeys(other))}. Either it was loaded with others, or the engine has changed their "
            f"order or their values after loading, and a plan cannot follow that"
        )


def _sampled(name: str, numel: int) -> Tensor:
    """Places of some entries of a weight, always the same, rising."""
    generator = torch.Generator().manual_seed(fnv1a64(name) >> 1)
    places: Tensor = torch.randint(max(numel, 1), (min(numel, _SAMPLES),), generator=generator).unique()
    return places


def _values(shape: Tensor, numbers: list[int]) -> Tensor:
    values: Tensor = torch.tensor(numbers, dtype=bits_of(shape.itemsize)).view(shape.dtype)
    return values


def _shape(dtype: str, shape: list[int]) -> torch.Tensor:
    if dtype not in _file.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_file.DTYPES)}, got {dtype!r}")
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
