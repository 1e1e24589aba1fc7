"""PEFT's own sparse layers on our ops: `accelerate` and `restore`.

A layer's class becomes a subclass of PEFT's with another forward, in place. So it stays the same object, with the same
parameters, hooks and state dict; isinstance, copies and pickles work, and PEFT's functions find what they look for. A
forward put on the object instead would be lost in a copy, and would hide the forward that accelerate's hooks put there.

PEFT keeps an adapter's entries as rows and columns, or as flat positions in any order. The ops want them ascending.
`_Plan` is that order, made once for each layer and adapter, and made anew when PEFT replaces or loads the entries. The
values stay where and as they are: they are brought into the plan's order on their way to the op, and autograd brings
their gradient back into PEFT's.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.shira import layer as shira_layer
from peft.tuners.shira import model as shira_model
from peft.tuners.supertuning import layer as super_layer
from peft.tuners.supertuning import model as super_model
from torch import Tensor, nn

from shira._granules import index_dtype
from shira.integrations.peft import _mixed, _overlay
from shira.integrations.peft._overlay import Part

__all__ = ["accelerate", "restore"]

_M = TypeVar("_M", bound=nn.Module)


# ---- the entries of an adapter in ascending order ------------------------------------------------------------


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class _Plan:
    """Where an adapter's entries are in the flat weight, ascending, and the order that brings its values there."""

    def __init__(self, where: str, shape: tuple[int, int], source: Tensor, device: torch.device) -> None:
        self.source, self.version = source, _version(source)
        rows, columns = shape
        given = source.detach().to(device=device, dtype=torch.int64)
        if given.dim() == 2 and given.shape[0] == 2:
            inside = (given >= 0) & (given < given.new_tensor(shape)[:, None])
            flat = given[0] * columns + given[1]
        elif given.dim() == 1:
            inside, flat = (given >= 0) & (given < rows * columns), given
        else:
            raise ValueError(f"{where}: its indices must be 2 x n or n numbers, got shape {list(given.shape)}")
        if not bool(inside.all()):
            raise ValueError(f"{where}: its indices name an entry outside of the weight's {list(shape)}")
        self.order: Tensor | None = None
        if not bool((flat[1:] > flat[:-1]).all()):
            flat, self.order = flat.sort()
            if bool((flat[1:] == flat[:-1]).any()):
                raise ValueError(f"{where}: its indices name an entry twice")
        self.indices = flat.to(index_dtype(rows * columns))

    def of(self, source: Tensor, device: torch.device) -> bool:
        """Whether it was made of these indices as they are now, for this device."""
        return self.source is source and self.version == _version(source) and self.indices.device == device


class _Plans:
    """The plans of a layer's adapters."""

    def __init__(self, layer: Any, where: str) -> None:
        self.shape, self.where = (layer.out_features, layer.in_features), where
        self.made: dict[str, _Plan] = {}

    def make(self, name: str, source: Tensor, device: torch.device) -> _Plan | None:
        """Refuses indices that cannot be right, and then changes nothing. Those on meta are yet to be loaded."""
        if source.is_meta or device.type == "meta":
            self.made.pop(name, None)
            return None
        plan = self.made[name] = _Plan(f"{self.where}, adapter {name!r}", self.shape, source, device)
        return plan

    def part(self, name: str, source: Tensor, values: Tensor, scale: float) -> Part:
        plan = self.made.get(name)
        # A compiled graph cannot sort and compare. What PEFT does to indices makes the plan anew when it happens; only
        # who writes into them by hand, or moves them around the module, has to run the model once before.
        if not torch.compiler.is_compiling() and (plan is None or not plan.of(source, values.device)):
            plan = self.make(name, source, values.device)
        if plan is None:
            raise RuntimeError(f"{self.where}: adapter {name!r} has no indices yet; load its weights")
        return Part(plan.indices, values if plan.order is None else values.index_select(0, plan.order), scale, 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "made": {}}


class _Indices(UserDict):  # type: ignore[type-arg]
    """Takes the place of the dict in which PEFT's SHiRA keeps indices, rows and columns, by the adapter's name."""

    def __init__(self, layer: Any, where: str) -> None:
        super().__init__()
        self.plans = _Plans(layer, where)
        self.values_of = layer.shira_weight
        self.update(layer.shira_indices)

    def __setitem__(self, name: str, indices: Tensor) -> None:
        if self.data.get(name) is not indices:
            # PEFT leaves them where they are when the model moves.
            self.plans.make(name, indices, self.values_of.get(name, indices).device)
            self.data[name] = indices

    def __delitem__(self, name: str) -> None:
        del self.data[name]
        self.plans.made.pop(name, None)

    def refresh(self) -> None:
        for name, indices in self.data.items():
            self.plans.make(name, indices, self.values_of.get(name, indices).device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.refresh()


class _Buffers(BufferDict):  # type: ignore[misc]
    """What the module becomes in which PEFT's Super-Tuning keeps indices, flat, by the adapter's name."""

    # No attribute may have a name that an adapter could have, which PEFT would refuse.
    _shira_plans: _Plans

    def _shira_refresh(self) -> None:
        for name, indices in self.items():
            self._shira_plans.make(name, indices, indices.device)

    def __setitem__(self, name: str, indices: Tensor) -> None:
        self._shira_plans.make(name, indices, indices.device)
        super().__setitem__(name, indices)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._shira_plans.made.pop(name, None)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._shira_refresh()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._shira_refresh()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._shira_refresh()


# ---- layers --------------------------------------------------------------------------------------------------


class _Layer(nn.Module):
    """The forward of both layers. A subclass says where the adapters' parts are."""

    def _names(self) -> Iterable[str]:
        """The adapters that this layer has."""
        raise NotImplementedError

    def _part(self, name: str) -> Part:
        raise NotImplementedError

    def _ours(self, names: Iterable[str]) -> bool:
        """Whether these adapters are sparse, and nothing else."""
        return True

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        peft: Any = self
        if adapter_names is not None:
            _mixed.check_samples(self, x, adapter_names)
        if peft.disable_adapters or peft.merged:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        there = self._names()
        if adapter_names is not None:
            named = [name for name in dict.fromkeys(adapter_names) if name in there]
            if not self._ours(named):
                raise ValueError("adapter_names: Super-Tuning with a LoRA beside it (r=) cannot be mixed in a batch")
            result = peft.base_layer(x, *args, **kwargs)
            parts = {name: self._part(name) for name in named}
            return _overlay.add_by_row(result, x, adapter_names, parts) if parts else result
        active = [name for name in peft.active_adapters if name in there]
        if not self._ours(active):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        return _overlay.add(peft.base_layer(x, *args, **kwargs), x, [self._part(name) for name in active])


class ShiraLinear(_Layer, shira_layer.Linear):  # type: ignore[misc]
    """PEFT's SHiRA layer on `shira_ops.sparse_linear`."""

    shira_indices: _Indices
    shira_weight: nn.ParameterDict
    scaling: dict[str, float]

    def _names(self) -> Iterable[str]:
        return self.shira_weight

    def _part(self, name: str) -> Part:
        source = self.shira_indices.data.get(name)
        if source is None:
            raise RuntimeError(f"{self.shira_indices.plans.where}: adapter {name!r} has no indices; load its weights")
        return self.shira_indices.plans.part(name, source, self.shira_weight[name], self.scaling[name])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.shira_indices.refresh()
        return self


class SupertuningLinear(_Layer, super_layer.Linear):  # type: ignore[misc]
    """PEFT's Super-Tuning layer on `shira_ops.sparse_linear`. With a LoRA beside it, PEFT's own forward runs."""

    supertuning_indices: _Buffers
    supertuning_values: nn.ParameterDict
    supertuning_rank: dict[str, int]

    def _names(self) -> Iterable[str]:
        return self.supertuning_values

    def _part(self, name: str) -> Part:
        indices = self.supertuning_indices
        return indices._shira_plans.part(name, indices[name], self.supertuning_values[name], 1.0)

    def _ours(self, names: Iterable[str]) -> bool:
        return all(self.supertuning_rank[name] == 0 for name in names)


# ---- tuners --------------------------------------------------------------------------------------------------


class _Tuner(_mixed.MixedBatches, nn.Module):
    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        # For an adapter that is added later, on layers that had none.
        super()._replace_module(parent, child_name, new_module, child)  # type: ignore[misc]
        if type(new_module) in _CLASSES:
            _enter(new_module, child_name)


class ShiraModel(_Tuner, shira_model.ShiraModel):  # type: ignore[misc]
    """PEFT's SHiRA model, whose layers are and become `ShiraLinear`."""


class SupertuningModel(_Tuner, super_model.SupertuningModel):  # type: ignore[misc]
    """PEFT's Super-Tuning model, whose layers are and become `SupertuningLinear`."""


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    shira_layer.Linear: ShiraLinear,
    super_layer.Linear: SupertuningLinear,
    shira_model.ShiraModel: ShiraModel,
    super_model.SupertuningModel: SupertuningModel,
}
_OURS = {ours: theirs for theirs, ours in _CLASSES.items()}


def _enter(module: Any, name: str) -> None:
    """All that can be refused is refused before the module changes."""
    if isinstance(module, shira_layer.Linear):
        module.shira_indices = _Indices(module, name)
    elif isinstance(module, super_layer.Linear):
        plans, indices = _Plans(module, name), module.supertuning_indices
        for adapter, one in indices.items():
            plans.make(adapter, one, one.device)
        indices.__class__, indices._shira_plans = _Buffers, plans
    module.__class__ = _CLASSES[type(module)]


def _leave(module: Any) -> None:
    module.__class__ = _OURS[type(module)]
    if isinstance(module, shira_layer.Linear):
        module.shira_indices = module.shira_indices.data
    elif isinstance(module, super_layer.Linear):
        module.supertuning_indices.__class__ = BufferDict
        del module.supertuning_indices._shira_plans


def accelerate(model: _M) -> _M:
    """Let a PEFT model's own SHiRA and Super-Tuning layers run on our ops: faster, and without a dense copy.

    PEFT copies each weight in each forward, adds the adapter, and in training computes the gradient of the whole
    weight. From now on a layer computes ``base_layer(x)`` and adds `shira_ops.sparse_linear` of the entries alone.
    Outputs are the same within rounding (in bf16 nearer to the exact ones: the sum of weight and adapter is not
    rounded). All else is PEFT's, and stays as it is: the parameters, their order and names, the state dict, the files,
    ``set_adapter``, ``disable_adapter``, merging, ``load_adapter`` and ``delete_adapter``. Adapters that are added or
    loaded later are followed, and so are ``.to()``, copies and pickles (which need this module to be read).

    Beyond PEFT: ``adapter_names=`` gives each sample of a batch its own adapter, in forward and in ``generate``, as
    with LoRA; without this call PEFT ignores it here. Hooks of the base layers run. Quantized base weights are not
    dequantized. ``torch.compile(fullgraph=True)`` works.

    Super-Tuning adapters with a LoRA beside them (``r=``) keep PEFT's forward.

    Args:
        model: a ``PeftModel``, or any module with such layers inside. Changed in place; calling it again does nothing.

    Returns:
        The model.

    Raises:
        ValueError: there are no such layers, one cannot be changed, or indices are not those of its weight. Then
            nothing has been changed.
        TypeError: it is not a module.
    """
    found = _modules(model, "accelerate")
    theirs = [(name, module) for name, module in found if type(module) in _CLASSES]
    layers = [name for name, module in found if isinstance(module, (shira_layer.Linear, super_layer.Linear))]
    if not layers:
        raise ValueError(
            "accelerate: the model has no linear layers of PEFT's SHiRA or Super-Tuning; make them with "
            "peft.get_peft_model(model, peft.ShiraConfig(...)). Those of SparseConfig run on the ops already"
        )
    for name, module in found:
        if isinstance(module, tuple(_CLASSES)) and not (type(module) in _CLASSES or isinstance(module, tuple(_OURS))):
            raise ValueError(f"accelerate: {name} is a {type(module).__qualname__}, a subclass of PEFT's own class")
        if type(module) in _CLASSES and "forward" in vars(module):
            raise ValueError(
                f"accelerate: the forward of {name} was replaced on the object, by a hook of the accelerate library, "
                f"say; remove it first (accelerate.hooks.remove_hook_from_module) and add it again afterwards"
            )
    entered: list[nn.Module] = []
    try:
        for name, module in theirs:
            _enter(module, name)
            entered.append(module)
    except ValueError as error:
        for module in entered:
            _leave(module)
        raise ValueError(f"accelerate: {error}") from error
    return model


def restore(model: _M) -> _M:
    """Undo `accelerate`: every layer is PEFT's own again and computes the same bits as before.

    Args:
        model: the model. Changed in place. One that was not accelerated stays as it is.

    Returns:
        The model.

    Raises:
        ValueError: somebody has changed the class of a layer since, as ``fully_shard`` does. Nothing has been changed.
        TypeError: it is not a module.
    """
    ours = [(name, module) for name, module in _modules(model, "restore") if isinstance(module, tuple(_OURS))]
    for name, module in ours:
        if type(module) not in _OURS:
            raise ValueError(
                f"restore: {name} is a {type(module).__qualname__} now, a class that was made of ours (by fully_shard "
                f"or a parametrization?); take that off first"
            )
    for _, module in ours:
        _leave(module)
    return model


def _modules(model: object, function: str) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: takes a module, got {type(model).__name__}")
    return list(model.named_modules())
