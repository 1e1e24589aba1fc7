"""Names and weights of a model: what the tuner and the switcher both need to know of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

COMPILED = "_orig_mod."


def unwrap(model: nn.Module) -> nn.Module:
    """The module under ``torch.compile``'s wrapper, whose parameters have the names that files use."""
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return inner


@dataclass(frozen=True)
class Slot:
    """One place of a model that holds a weight."""

    name: str
    module: nn.Module
    attribute: str
    weight: nn.Parameter

    def holds(self) -> bool:
        """Whether the place still holds the parameter it held when it was found."""
        return self.module._parameters.get(self.attribute) is self.weight


def slots(model: nn.Module) -> dict[str, Slot]:
    """Every parameter of the model under every one of its names, in the model's order."""
    found: dict[str, Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, weight in module._parameters.items():
            if weight is not None:
                name = (f"{prefix}.{attribute}" if prefix else attribute).replace(COMPILED, "")
                found[name] = Slot(name, module, attribute, weight)
    return found


def memory(weight: Tensor) -> object:
    """A key that is equal for two weights when they are one: by identity, or by the memory they share."""
    if isinstance(weight, UninitializedParameter) or not weight.data_ptr():
        return id(weight)
    return weight.device, weight.data_ptr(), weight.numel()


def some(names: Iterable[str], most: int = 6) -> str:
    """A few of the names, for a message."""
    listed = list(names)
    more = f", ... ({len(listed)} in all)" if len(listed) > most else ""
    return (", ".join(listed[:most]) + more) if listed else "none"


def stride_advice(name: str) -> str:
    """What to do with a weight whose memory is not in row-major order."""
    get = f"model.get_parameter({name!r})"
    return f"make it so with {get}.data = {get}.data.contiguous()"
