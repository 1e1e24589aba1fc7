"""Which weights a tuner trains: from names and patterns to weights; weights that cannot train are refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from shira import _fit, _linears, _live, _model, _places, _shards
from shira._granules import dtype_name
from shira._model import VALUES_SUFFIX
from shira._text import AdapterError, Rename
from shira.adapter.adapter import Adapter
from shira.train import _layers, _ranks

ALL_LINEAR = "all-linear"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Wanted = str | Sequence[str] | None


class Names:
    """The modules and parameters of a model under all their names, as patterns see them.

    With ``overlay`` the targets are layers that something is laid over, and not weights that are written. With
    ``meta`` weights need no content.
    """

    def __init__(self, model: nn.Module, overlay: bool = False, meta: bool = False) -> None:
        self.meta = meta
        # A second tuner may be added to a model; the values of the first one are not targets.
        self.slots = {name: slot for name, slot in _model.slots(model).items() if not name.endswith(VALUES_SUFFIX)}
        self.layers = _linears.find(model) if overlay else None
        for name, layer in (self.layers or {}).items():
            if name not in self.slots:  # its codes have other names
                codes = cast("nn.Parameter", layer.stored()[0])
                self.slots[name] = _model.Slot(name, layer.module, layer.attribute, codes)
        named = model.named_modules(remove_duplicate=False)
        self.modules = {_model.clean(f"{name}.")[:-1]: module for name, module in named}
        self.holders: dict[object, list[_model.Slot]] = {}
        self._aliases: dict[object, list[str]] = {}
        for name, slot in self.slots.items():
            self._aliases.setdefault(_model.memory(slot.weight), []).append(name)
            group = self.holders.setdefault(_model.memory(slot.weight), [])
            if not any(slot.module is other.module and slot.attribute == other.attribute for other in group):
                group.append(slot)

    def of(self, slot: _model.Slot) -> list[_model.Slot]:
        """Every place that holds this slot's weight (a tied weight has several), in the model's order."""
        return self.holders[_model.memory(slot.weight)]

    def targets(self, wanted: Wanted, exclude: Wanted = None) -> dict[str, list[_model.Slot]]:
        """The weights to train sparsely, by first name, each with every place that holds it."""
        _check_wanted("targets", wanted)
        if wanted is None or wanted == ALL_LINEAR:
            names = self._all_linear()
        elif isinstance(wanted, str):
            names = self._matched("targets", wanted)
        else:
            names = [name for one in wanted for name in self._named(one)]
        if exclude is not None:
            names, before = self._without(names, exclude), names
            if before and not names:
                raise ValueError(f"SparseTuner: exclude leaves none of the targets {_model.some(before)}")
        return self._chosen(names)

    def heads(self) -> dict[str, nn.Module]:
        """The model's output head, as far as the model itself tells which module that is."""
        told: list[object] = []
        for module in self.modules.values():
            for method in ("get_output_embeddings", "get_classifier"):  # transformers, timm
                told += _told(module, method)
        root = self.modules[""]
        if hasattr(root, "get_output_embeddings"):
            # The names that transformers' classification models use, and PEFT expects.
            told += [root._modules.get(name) for name in ("score", "classifier")]
        heads = {id(head) for head in told if isinstance(head, nn.Module)}
        return {name: module for name, module in self.modules.items() if id(module) in heads}

    def added(self) -> dict[str, nn.Module]:
        """The linear layers that PEFT has added beside the model's own, such as LoRA's A and B."""
        added: set[int] = set()
        for module in self.modules.values():
            # By PEFT's convention, its modules name those of their children that belong to an adapter.
            names = getattr(type(module), "adapter_layer_names", None)
            for child in map(module._modules.get, names if isinstance(names, tuple) else ()):
                added |= set() if child is None else {id(inner) for inner in child.modules()}
        found = ((name, module) for name, module in self.modules.items() if id(module) in added)
        return {name: module for name, module in found if _linears.is_linear(module)}

    def _all_linear(self) -> list[str]:
        """Linear layers except for the output head's and PEFT's, and 3-D weights of experts."""
        heads, added = self.heads(), self.added()
        inside = {id(module) for head in heads.values() for module in head.modules()}
        layers = {name for name, layer in (self.layers or {}).items() if layer.kind != _linears.EMBEDDING}
        linear = {
            _join(name, "weight"): module
            for name, module in self.modules.items()
            if name not in added and (_linears.is_linear(module) or _join(name, "weight") in layers)
        }
        names = [name for name, module in linear.items() if id(module) not in inside]
        names += self.experts() if self.layers is None else []
        if not names and linear:
            raise ValueError(
                f"SparseTuner: the model's only linear layer is its output head ({_model.some(heads)}), which is left "
                f"out unless it is named: name weights with targets=, or train the head as a whole with targets=[] and "
                f"whole="
            )
        if not names:
            raise ValueError("SparseTuner: the model has no nn.Linear; name other weights with targets=")
        return names

    def experts(self) -> list[str]:
        """The 3-D weights of experts."""
        return [slot.name for slot in self.slots.values() if _is_experts(slot)]

    def _without(self, names: Sequence[str], wanted: str | Sequence[str]) -> list[str]:
        """The names that are not excluded: by their own name, by a module they are in, or by a weight they are tied
        to."""
        _check_wanted("exclude", wanted)
        found: dict[str, Callable[[str], object]] = (
            {wanted: _compiled("exclude", wanted).search}
            if isinstance(wanted, str)
            else {one: partial(_is, wanted=one) for one in wanted}
        )
        for one, is_meant in found.items():
            if not any(is_meant(name) for name in (*self.modules, *self.slots, *names) if name):
                raise ValueError(f"SparseTuner: exclude {one!r} names nothing; the model has {self._some()}")

        def excluded(name: str) -> bool:
            parts = name.split(".")
            above = [".".join(parts[: n + 1]) for n in range(len(parts))]
            return any(is_meant(prefix) for is_meant in found.values() for prefix in above)

        def ties(name: str) -> list[str]:
            weight = self.slots[name].weight if name in self.slots else None
            return [name] if weight is None else self._aliases[_model.memory(weight)]

        return [name for name in names if not any(map(excluded, ties(name)))]

    def whole(self, wanted: Wanted) -> dict[str, list[_model.Slot]]:
        """The parameters to train as a whole."""
        _check_wanted("whole", wanted)
        if wanted is None:
            return {}
        if isinstance(wanted, str):
            pattern = _compiled("whole", wanted)
            names = [name for name in self.slots if pattern.search(name)]
            if not names:
                raise ValueError(f"SparseTuner: whole {wanted!r} matches no parameter; the model has {self._some()}")
        else:
            names = []
            for one in wanted:
                inside = [name for name in self.slots if name.startswith(f"{one}.")]
                found = [name for name in self.slots if _is(name, one)] or inside
                if not found:
                    raise ValueError(f"SparseTuner: whole {one!r} names no parameter; the model has {self._some()}")
                names += found
        return self._chosen(names)

    def _some(self) -> str:
        weights = [name for name, slot in self.slots.items() if slot.weight.dim() > 1]
        return _model.some(weights or self.slots)

    def _own(self, module_name: str) -> list[str]:
        """The weights that a module's name stands for; for a module of an unknown kind these are its own matrices."""
        module = self.modules[module_name]
        known = _layers.owned(module)
        if self.layers is not None and _join(module_name, "weight") in self.layers:
            known = ("weight",)
        if known is None:
            matrices = (attribute for attribute, p in module._parameters.items() if p is not None and p.dim() > 1)
            known = tuple(matrices)
        return [_join(module_name, attribute) for attribute in known]

    def _matched(self, argument: str, text: str) -> list[str]:
        pattern = _compiled(argument, text)
        # A pattern that matches a module's name mostly matches the names of its parameters too. It means the module's
        # weights then, and not its biases.
        found: dict[str, None] = {}
        for name in self.modules:
            if name and pattern.search(name):
                found.update(dict.fromkeys(self._own(name)))
        for name in self.slots:
            module = name.rpartition(".")[0]
            if pattern.search(name) and not (module and pattern.search(module)):
                found[name] = None
        if not found:
            raise ValueError(
                f"SparseTuner: {argument} {text!r} matches no module with weights and no parameter; "
                f"the model has {self._some()}"
            )
        return list(found)

    def _named(self, wanted: str) -> list[str]:
        names = [name for name in self.slots if _is(name, wanted)]
        modules = [name for name in self.modules if name and _is(name, wanted)]
        for name in modules:
            names += self._own(name)
        if not names:
            what = f"is a {type(self.modules[modules[0]]).__name__} and " if modules else ""
            raise ValueError(f"SparseTuner: target {wanted!r} {what}names no weight; the model has {self._some()}")
        return names

    def check_apart(self, chosen: Container[str]) -> None:
        """Refuse targets, given by first name, that share a part of their memory with another weight of the model, or
        that cannot be written to."""
        sealed = _model.read_only(slot for name, slot in self.slots.items() if name in chosen)
        if sealed:
            raise ValueError(f"SparseTuner: {sealed[0].name} {_model.read_only_advice(sealed[0])}")
        for one, other in _model.overlaps(self.slots.values()):
            if any(self.of(slot)[0].name in chosen for slot in (one, other)):
                raise ValueError(
                    f"SparseTuner: {one.name} and {other.name} are different weights in overlapping memory (views of "
                    f"one tensor?), so training one would change the other; leave both out, or give one its own memory"
                )

    def check(self, name: str, group: Sequence[_model.Slot]) -> None:
        """Refuse a weight that cannot be trained in this way, and say why."""
        if self.layers is None:
            check_trainable(name, group, self.meta)
        else:
            _check_layers(name, group, self.layers)

    def _chosen(self, names: Iterable[str]) -> dict[str, list[_model.Slot]]:
        chosen: dict[str, list[_model.Slot]] = {}
        for name in names:
            if name not in self.slots:
                module = name.rpartition(".")[0]
                inside = [other for other in self.slots if other.startswith(f"{module}.")] if module else []
                has = f", or name what it is made of (the module has {_model.some(inside)})" if inside else ""
                raise ValueError(
                    f"SparseTuner: {name} is not a parameter of its module (parametrized, quantized or packed?); "
                    f"leave it out with exclude={has}"
                )
            group = self.of(self.slots[name])
            self.check(name, group)
            chosen.setdefault(group[0].name, group)
        if self.layers is None:
            self.check_apart(chosen)
        return {name: chosen[name] for name in self.slots if name in chosen}


def _check_free(name: str, group: Sequence[_model.Slot]) -> None:
    if any(hasattr(slot.module, slot.attribute + VALUES_SUFFIX) for slot in group):
        raise ValueError(
            f"SparseTuner: {name} is already trained by a tuner; detach that one first (shira.detach(model))"
        )


def _check_places(name: str, group: Sequence[_model.Slot]) -> None:
    """Refuse modules whose forward runs no hooks, and embeddings that write to their own weight."""
    for slot in group:
        if _is_script(slot.module):
            raise ValueError(
                f"SparseTuner: {slot.name} is in a module made by torch.jit.script or torch.jit.trace, whose forward "
                f"runs no hooks; leave it out, or use the module that was made from"
            )
        if slot.weight is not group[0].weight:
            raise ValueError(
                f"SparseTuner: {name} and {slot.name} are two parameters in one memory; tie them by one nn.Parameter"
            )
        if isinstance(slot.module, (nn.Embedding, nn.EmbeddingBag)) and slot.module.max_norm is not None:
            raise ValueError(
                f"SparseTuner: {name} is changed by its own forward (max_norm={slot.module.max_norm:g}), which would "
                f"move entries that no adapter holds; leave it out with targets="
            )


def _check_layers(name: str, group: Sequence[_model.Slot], layers: _linears.Layers) -> None:
    """Refuse what nothing can be laid over, or would not learn there."""
    _check_free(name, group)
    for slot in group:
        layer = layers.get(slot.name)
        if layer is None:
            raise ValueError(f"SparseTuner: {_linears.unknown(slot.name, slot.module)}; leave it out with exclude=")
        if layer.obstacle is not None:
            raise ValueError(f"SparseTuner: {slot.name} {layer.obstacle}; leave it out, or load it first")
        if layer.blind is not None:
            raise ValueError(f"SparseTuner: {slot.name} {layer.blind}")
        if getattr(slot.module, "scale_grad_by_freq", False):
            raise ValueError(
                f"SparseTuner: {slot.name} scales its gradient by frequency (scale_grad_by_freq), which an overlay "
                f"does not; leave it out with exclude="
            )
    _check_places(name, group)


def check_trainable(name: str, group: Sequence[_model.Slot], meta: bool = False) -> None:
    """Refuse a weight that cannot be trained, and say why."""
    weight = group[0].weight
    _check_free(name, group)
    foreign = None if _shards.is_dtensor(weight) else _model.foreign(weight)
    if foreign is not None:
        advice = "; or train a delta beside it with overlay=True" if _linears.is_quantized(weight) else ""
        raise ValueError(f"SparseTuner: {name} {foreign}{advice}")
    if weight.is_meta and not meta:
        if any(_model.offloaded(slot.module, slot.attribute) is not None for slot in group):
            raise ValueError(
                f"SparseTuner: {name} is offloaded: accelerate keeps it elsewhere while its layer does not run, so its "
                f"entries cannot be written; load the model without offloading, or leave it out with targets="
            )
        raise ValueError(f"SparseTuner: {name} is on the meta device; give it its weights first")
    if weight.dtype not in _FLOATS:
        codes = "" if weight.dtype.is_floating_point else ": the codes of a quantized weight have no gradient"
        kind = "" if type(weight) is nn.Parameter else f" ({type(weight).__name__})"
        layer = _linears.of(name, group[0].module)
        advice = ", or train a delta beside it with overlay=True" if layer is not None and layer.quantized else ""
        raise ValueError(
            f"SparseTuner: {name} must be float16, bfloat16, float32 or float64 to train, "
            f"got {dtype_name(weight.dtype)}{kind}{codes}; leave it out with targets={advice}"
        )
    if weight.is_inference():
        raise ValueError(
            f"SparseTuner: {name} was made under torch.inference_mode and cannot train; load or clone it outside"
        )
    if not weight.is_contiguous():
        raise ValueError(f"SparseTuner: {name} must be contiguous; {_model.stride_advice(name, weight)}")
    if weight.grad is not None:
        raise ValueError(f"SparseTuner: {name} still has a gradient of earlier training; call model.zero_grad() first")
    _check_places(name, group)


def check_model(model: nn.Module) -> None:
    """Refuse a model that can have no tuner: by its wrappers, those of modules in it, and its parameters."""
    if _is_script(model):
        raise TypeError(
            f"SparseTuner: model is a {type(model).__name__}, made by torch.jit.script or torch.jit.trace, whose "
            f"forward runs no hooks; attach the tuner to the model it was made from"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            where = _model.clean(f"{name}.")[:-1] or "model"
            raise ValueError(
                f"SparseTuner: {where} is already in DistributedDataParallel, which would not synchronise the values "
                f"between its processes; attach the tuner to the module first, and wrap it then"
            )
        _model.unwrap(module)
    for name, weight in model.named_parameters():
        if _ranks.engine_of(weight) is not None:
            raise ValueError(
                f"SparseTuner: {_model.clean(name)} is already in a DeepSpeed engine, which would not train the "
                f"tuner's values; attach the tuner to the model first, and call deepspeed.initialize then, with an "
                f"optimizer over tuner.parameters()"
            )
        if isinstance(weight, UninitializedParameter):  # it cannot even be frozen
            raise ValueError(f"SparseTuner: {_model.clean(name)} has no shape yet; run the model once first")


def laid(group: Sequence[_model.Slot]) -> list[_linears.Layer]:
    """The layers that hold the weight."""
    return [layer for slot in group if (layer := _linears.of(slot.name, slot.module)) is not None]


def rules(group: Sequence[_model.Slot], granule: int) -> list[str | None]:
    """How the gradient is taken in each place that holds the weight: at the mask in all of them, or in none (None)."""
    found = [_layers.rule_of(slot.module, slot.attribute, granule) for slot in group]
    return found if all(found) else [None] * len(found)


def _is_script(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def _told(module: nn.Module, method: str) -> list[object]:
    """The head that a method of a model returns: a module, several, or None."""
    tell = getattr(module, method, None)
    if not callable(tell):
        return []
    try:
        told = tell()
    except (NotImplementedError, AttributeError, TypeError):
        return []  # the method of a base class, or one with another meaning
    return list(told) if isinstance(told, (tuple, list)) else [told]


def _is_experts(slot: _model.Slot) -> bool:
    """Whether the weight is a stack of experts' matrices, as in transformers' mixtures of experts."""
    stack = slot.weight.dim() == 3 and _layers.owned(slot.module) is None
    return stack and "expert" in f"{slot.name} {type(slot.module).__name__}".lower()


def _is(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _join(module: str, attribute: str) -> str:
    return f"{module}.{attribute}" if module else attribute


def _check_wanted(argument: str, wanted: Wanted) -> None:
    listed = isinstance(wanted, Collection) and all(isinstance(one, str) for one in wanted)
    if wanted is not None and not listed:
        got = repr(wanted) if isinstance(wanted, Collection) else type(wanted).__name__
        raise ValueError(f"SparseTuner: {argument} must be a pattern or a list of names, got {got}")


def _compiled(argument: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"SparseTuner: {argument} {text!r} is not a regular expression: {error}") from error


def layers_of_adapter(who: str, adapter: Adapter, layers: _linears.Layers, rename: Rename) -> dict[str, _linears.Layer]:
    """The layers that the adapter's weights belong to, by the adapter's names; refuses another base."""
    weights = _fit.renamed(adapter.weights, rename)
    advice = (lambda rule: f"rename={rule!r}") if rename is None else None
    found = _fit.places(who, weights, layers, where=_places.WHERE, kind="model", advice=advice)
    for (name, entry), several in zip(weights.items(), found.values(), strict=True):
        if len(several) > 1:
            both = _fit.one_in_adapter(several[1].name, several[0].name)
            raise AdapterError(f"{both} two in the model, which training would let drift apart; tie them first")
        if entry.shape[-1] % entry.granule:
            raise AdapterError(
                f"{who}: {name!r} has granules of {entry.granule} entries, which do not divide its rows of "
                f"{entry.shape[-1]}, so an overlay cannot train it"
            )
    _fit.check_content(who, weights, found, where=_places.WHERE, kind="model")
    return {name: several[0] for name, several in zip(adapter.weights, found.values(), strict=True)}


def of_adapter(who: str, adapter: Adapter, model: nn.Module, rename: Rename) -> dict[str, _places.Place]:
    """Where the adapter's weights are in the model, by the adapter's names; refuses what cannot go on training.

    The content of weights that ranks hold together is for the caller to compare.
    """
    with _live.LOCK:
        found = _places.find(who, adapter.weights, _model.slots(model, buffers=True), rename)
        for places in found.values():
            if len(places) > 1:
                both = _fit.one_in_adapter(places[1].name, places[0].name)
                raise AdapterError(f"{both} two in the model, which training would let drift apart; tie them first")
            if not isinstance(places[0].slot.weight, nn.Parameter):
                raise AdapterError(f"{places[0].name} is a buffer, not a parameter, so it cannot be trained")
        anything = _fit.indifferent(adapter.weights, adapter.delta, 1.0)
        here = {name: places for name, places in found.items() if not _shards.is_dtensor(places[0].slot.weight)}
        _fit.check_content(who, adapter.weights, here, where=_places.WHERE, kind="model", anything=anything)
    return {name: places[0] for name, places in found.items()}
