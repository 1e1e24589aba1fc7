"""Hooks of optimizers: every step of any optimizer is checked, and afterwards the weights follow their values.

They are torch's global hooks, which see the steps of all optimizers, and are there as long as a tuner is attached.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from shira import _live, _model
from shira.train import _ranks
from shira.train._sites import Group, Site, Target, check_reached, groups, known, refuse_replaced, trained_as, write

# What a module's parameters required before tuners froze them, by attribute, and how many tuners did. On the module
# itself, so that the base can be given back in a copied model as well.
KEPT = "_shira_kept"

_handles: list[RemovableHandle] = []
_LOCK = threading.Lock()
# Attached tuners whose values are made of other parameters: their `before_step` and `after_step` are called, too.
makers: weakref.WeakSet[Any] = weakref.WeakSet()
_UNKNOWN = object()
# What the parameters of an optimizer train, from the beginning of a step to its end; see `trained_by`.
_steps: weakref.WeakKeyDictionary[Optimizer, dict[int, Target | None]] = weakref.WeakKeyDictionary()


def watch_optimizers() -> None:
    """After a tuner was attached: put the hooks on, if they are not."""
    _steps.clear()
    with _LOCK:
        if not _handles:
            _handles.append(register_optimizer_step_pre_hook(_before))
            _handles.append(register_optimizer_step_post_hook(_after))


def stop_watching() -> None:
    """After a tuner was detached: take the hooks off, if no other is attached.

    Not beside other threads: a step of any optimizer walks over the hooks, and fails if one is taken off meanwhile.
    """
    _steps.clear()  # a step may be under way, since hooks and closures may detach
    with _LOCK:
        if threading.active_count() == 1 and all(target is None for target in known.values()):
            for handle in _handles:
                handle.remove()
            _handles.clear()


# ---- what an optimizer trains --------------------------------------------------------------------------------


def trained_by(optimizer: Optimizer) -> Mapping[int, Target | None]:
    """What the optimizer's parameters train, by their ids: None for the values of a tuner that is detached.

    Parameters that are not values are left out. Within a step the registry is asked once.
    """
    found = _steps.get(optimizer)
    return _ask(optimizer) if found is None else found


def _ask(optimizer: Optimizer) -> dict[int, Target | None]:
    found: dict[int, Target | None] = {}
    for group in optimizer.param_groups if len(known) else ():
        for parameter in group["params"]:
            target = known.get(parameter, _UNKNOWN)
            if target is not _UNKNOWN:
                found[id(parameter)] = target
    return found


def forget_step(optimizer: Optimizer) -> None:
    """Ask the registry again: a closure was called, which may do anything."""
    _steps.pop(optimizer, None)


def _targets(optimizer: Optimizer, found: Mapping[int, Target | None]) -> list[tuple[Tensor, Target]]:
    """The values that the optimizer has, and what each trains."""
    if not found:
        return []
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [(values, target) for values in parameters if (target := found.get(id(values))) is not None]


# ---- the hooks -----------------------------------------------------------------------------------------------


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The closure of a step, with which the gradients come only during the step."""
    return args[1] if len(args) > 1 else kwargs.get("closure")  # the first argument is the optimizer


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _before_step(optimizer, args, kwargs)
    for tuner in _live.alive(makers):
        tuner.before_step(optimizer, args, kwargs)


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _after_step(optimizer, args, kwargs)
    for tuner in _live.alive(makers):
        tuner.after_step(optimizer)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    found = _steps[optimizer] = _ask(optimizer)
    targets = _targets(optimizer, found)
    for values, target in targets:
        refuse_other(target, values)
        if target.site.group.off:
            raise RuntimeError(
                "SparseTuner: an optimizer cannot step inside `with tuner.disabled()`, where the model is the base"
            )
        if in_backward() and getattr(optimizer, "writes_weights", False):
            raise RuntimeError(
                f"shira.{type(optimizer).__name__} writes the weights, which the rest of the backward pass still "
                f"needs; to step inside backward use one of torch.optim, whose values are written at its end"
            )
    for group in {id(target.site.group): target.site.group for _, target in targets}.values():
        model = None if group.model is None else group.model()
        if model is not None:
            _live.refuse_active(model)
    _compare_ranks([(values, target) for values, target in targets if not target.site.compared])
    if closure_of(args, kwargs) is None:
        _check_made_after(optimizer)
        _check_reached(targets)


def refuse_other(target: Target, values: Tensor) -> None:
    """Refuse a step where the module has another weight, or other values, than the tuner put on it."""
    site, module = target.site, target.module()
    for name, wanted in ((site.values_name, values), (site.attribute, site.own_weight)):
        held = module._parameters.get(name)
        elsewhere = name == site.attribute and (site.overlay or (site.shard and site.shard.is_holder_of(held)))
        if held is not wanted and not elsewhere:
            refuse_replaced(site.name + name.removeprefix(site.attribute))


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if closure_of(args, kwargs) is not None:
        forget_step(optimizer)
    targets = _targets(optimizer, trained_by(optimizer))
    forget_step(optimizer)
    _check_made_after(optimizer)  # with a closure the gradients have come only now
    if not targets:
        return
    _check_reached(targets)
    if getattr(optimizer, "writes_weights", False):  # but not into parts of weights, whose values other ranks have
        targets = [(values, target) for values, target in targets if target.site.shard is not None]
    if not targets:
        return
    if in_backward():
        # What is left of the pass needs the weights as they were in the forward.
        torch.autograd.Variable._execution_engine.queue_callback(partial(_write_targets, targets))
    else:
        _write_targets(targets)


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, as a hook of a gradient is."""
    return torch._C._current_graph_task_id() != -1


def _write_targets(targets: Sequence[tuple[Tensor, Target]]) -> None:
    write((target.site, *target.tensors()) for _, target in targets if not target.site.overlay)


# ---- what a step is refused for ------------------------------------------------------------------------------


def _check_made_after(optimizer: Optimizer) -> None:
    """Refuse an optimizer of parameters that a tuner froze, where no optimizer has the tuner's values: it was made
    before the tuner."""
    for group in [one for one in _live.alive(groups) if not one.served and not one.off]:
        held = {id(p): p for of_group in optimizer.param_groups for p in of_group["params"]}
        trained = [site for site in group.sites if id(site.own_weight) in held]
        idle = not any(p.requires_grad for p in held.values())
        if not (trained or (idle and _froze(group, held))) or not any(map(_has_gradient, group.sites)):
            continue
        values = {id(site.own_values) for site in group.sites}
        # Nothing else knows all optimizers. This search happens once for a tuner: what it finds is remembered.
        for other in (one for one in gc.get_objects() if issubclass(type(one), Optimizer)):
            # One whose constructor has failed has no groups.
            of_groups = getattr(other, "param_groups", ())
            group.served |= any(id(p) in values for of_group in of_groups for p in of_group["params"])
        if not group.served:
            raise RuntimeError(
                f"SparseTuner: this {type(optimizer).__name__} has parameters that the tuner froze "
                f"({_model.some(site.name for site in trained or group.sites)}), and no optimizer has the tuner's "
                f"values, so nothing would train; make the optimizer after the tuner, over tuner.parameters()"
            )


def _froze(group: Group, held: Mapping[int, Tensor]) -> bool:
    """Whether a tuner froze some of these parameters, which required grad before."""
    model = None if group.model is None else group.model()
    slots: Iterable[_model.Slot] = () if model is None else _model.slots(model).values()
    kept = [slot.module.__dict__.get(KEPT, {}).get(slot.attribute) for slot in slots if id(slot.weight) in held]
    return any(one is not None and one[1] for one in kept)


def _has_gradient(site: Site) -> bool:
    return any(one is not None and one.grad is not None for one in (site.own_values, site.own_weight))


def _compare_ranks(targets: Sequence[tuple[Tensor, Target]]) -> None:
    """At the first step, refuse ranks that differ. A collective call: all ranks of a model come here together."""
    _ranks.compare([
        trained_as(target.site, target.module(), values)
        for values, target in targets
        if target.site.shard is None  # the ranks have compared the others already
    ])  # fmt: skip
    for _, target in targets:
        target.site.compared = target.site.group.served = True


def _check_reached(targets: Sequence[tuple[Tensor, Target]]) -> None:
    """At the first step, refuse values that no gradient has reached."""
    if not in_backward():
        check_reached(target.site for _, target in targets)
        return
    for values, target in targets:
        target.site.note(values)
        # A gradient that is missing now may come later in the pass; the next forward looks again.
        target.site.group.early = True
