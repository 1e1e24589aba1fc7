"""Optimizers for a tuner's values that take the step and write the weights in one pass.

They behave like those of ``torch.optim``: groups, schedulers, ``state_dict`` (in torch's layout, so that states can be
exchanged), closures, scalers, learning rates as tensors. Parameters that no tuner trains may be in the same groups, and
get torch's own step.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

import shira_ops
from shira import _shards
from shira.train import _hooks
from shira.train._sites import Target, is_detached, mark_written
from shira.train.tuner import SparseTuner

__all__ = ["SGD", "AdamW"]

Parameters = SparseTuner | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
# Values, what they train, their gradient (negated to maximize), their state.
_Item = tuple[Tensor, Target, Tensor, dict[str, Any]]


class _Masked(Optimizer):
    """What both optimizers share: checks of groups, and the division into values of tuners and other parameters."""

    # Tells the tuner's hooks that the step writes the weights itself.
    writes_weights = True

    def __init__(self, params: Parameters, defaults: dict[str, Any]) -> None:
        super().__init__(params.named_parameters() if isinstance(params, SparseTuner) else params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # A state of torch's optimizer lacks the options that only this one has, and an old state of ours lacks
            # those that were added later.
            for key in ("maximize", "decay_towards", "foreach", "fused", "capturable", "differentiable"):
                if key in self.defaults:
                    group.setdefault(key, _ABSENT[key])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group in state_dict["param_groups"]:
            self._check({**self.defaults, **group, "params": []}, new=True)
        self._check_division(state_dict)
        super().load_state_dict(state_dict)

    def _check_division(self, state_dict: dict[str, Any]) -> None:
        """Refuse the state of another number of ranks, of which each rank would have the wrong part."""
        numbers_of = (number for group in state_dict["param_groups"] for number in group["params"])
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for number, parameter in zip(numbers_of, parameters, strict=False):
            if not _shards.is_dtensor(parameter):
                continue
            wanted = _shards.local(parameter).shape
            for key, value in state_dict["state"].get(number, {}).items():
                if not isinstance(value, Tensor) or not value.dim():
                    continue
                held = _shards.local(value).shape
                if not _shards.is_dtensor(value) or held != wanted or value.device_mesh != parameter.device_mesh:
                    raise ValueError(
                        f"shira.{type(self).__name__}: {key} of parameter {number} has {held.numel()} entries on this "
                        f"rank, whose values are {wanted.numel()}: the state is divided between other ranks; "
                        f"torch.distributed.checkpoint saves one that any number of ranks can load"
                    )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1], new=True)
            if any(is_detached(parameter) for parameter in self.param_groups[-1]["params"]):
                raise ValueError(f"shira.{type(self).__name__}: the tuner of these parameters is detached")
        except ValueError:
            # A refused group must not stay.
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any], new: bool = False) -> None:
        """Refuse wrong settings of a group. Numbers on a device are read only if the group is ``new``, since reading
        them waits for the device."""
        what = f"shira.{type(self).__name__}"
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1 or lr.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{what}: lr must be a number or one float32 or float64 entry, got {lr!r}")
            if (new or lr.device.type == "cpu") and not torch.compiler.is_compiling():
                _check_number(what, "lr", float(lr))
        else:
            _check_number(what, "lr", lr)
        _check_number(what, "weight_decay", group["weight_decay"])
        if group["decay_towards"] not in ("zero", "base"):
            raise ValueError(f'{what}: decay_towards must be "zero" or "base", got {group["decay_towards"]!r}')
        if group.get("differentiable"):
            raise ValueError(
                f"{what}: differentiable is not supported: a step is written into the weights, which autograd cannot "
                f"follow"
            )
        if group.get("foreach") and group.get("fused"):
            raise ValueError(f"{what}: foreach and fused cannot be True together")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure`` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            _hooks.forget_step(self)
        trained = _hooks.trained_by(self)
        # All groups are checked before the first one steps, so that a refused step changes nothing. They were checked
        # when they were added, but schedulers and users change their numbers.
        for group in self.param_groups:
            self._check(group)
        for group, items, others in [(group, *self._divide(group, trained)) for group in self.param_groups]:
            if items:
                self._step_values(group, items)
                # autocast may have kept a cast of the weight as it was before.
                torch.clear_autocast_cache()
            if others:
                self._step_others(group, others)
        return loss

    def _divide(self, group: dict[str, Any], trained: Mapping[int, Target | None]) -> tuple[list[_Item], list[Tensor]]:
        """The values of tuners among a group's parameters that have gradients, and all others that have."""
        what = f"shira.{type(self).__name__}"
        items: list[_Item] = []
        others: list[Tensor] = []
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(f"{what}: gradients must be dense tensors, got a sparse one")
            target = trained.get(id(parameter))
            if target is not None and target.site.overlay:
                # There is no weight to write, and the base is where the values are zero.
                others.append(parameter)
            elif target is not None:
                items.append((parameter, target, grad.neg() if group["maximize"] else grad, self.state[parameter]))
            elif id(parameter) in trained:
                raise RuntimeError(f"{what}: the tuner of these parameters is detached")
            elif group["decay_towards"] == "base" and group["weight_decay"]:
                raise RuntimeError(
                    f'{what}: decay_towards="base" is for the values of a SparseTuner, whose base is known; got a '
                    f"parameter of shape {list(parameter.shape)}; give it a group of its own"
                )
            else:
                others.append(parameter)
        return items, others

    def _step_values(self, group: dict[str, Any], items: list[_Item]) -> None:
        raise NotImplementedError

    def _step_others(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        raise NotImplementedError


_CPU = torch.device("cpu")
_COUNTS = (torch.float32, torch.float64)  # dtypes that can count enough steps

# Options of a group that does not have them.
_ABSENT = {
    "maximize": False, "decay_towards": "zero", "foreach": None, "fused": None, "capturable": False,
    "differentiable": False,
}  # fmt: skip


def _check_number(what: str, name: str, value: object) -> None:
    if not isinstance(value, numbers.Real):
        raise ValueError(f"{what}: {name} must be a number, got {value!r}")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{what}: {name} must be at least 0 and finite, got {value}")


def _base(values: Tensor, target: Target) -> Tensor:
    shard = target.site.shard
    base = target.saved if shard is None else shard.base_of_values(target.site)
    return base.to(device=values.device, dtype=values.dtype)


def _written(values: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """The weight that a step of values writes, and its granules, of `_granule` entries.

    Of a weight that ranks hold together each steps its own values, which belong to the parts of other ranks: the tuner
    exchanges them after the step, and what the op writes is thrown away.
    """
    weight, indices, _ = target.tensors()
    if target.site.shard is None:
        return weight, indices
    chunk = _shards.local(values)
    first = torch.zeros(1, dtype=torch.int32, device=chunk.device)  # all values are one granule
    return torch.empty_like(chunk, dtype=weight.dtype), first


def _granule(values: Tensor, target: Target) -> int:
    return target.site.granule if target.site.shard is None else _shards.local(values).numel()


def _is_empty(values: Tensor) -> bool:
    """Whether this rank has none of the values, as the last ones may if there are very few."""
    return not _shards.local(values).numel()


class AdamW(_Masked):
    """AdamW for the values of a `SparseTuner`, with the formulas, defaults and state of ``torch.optim.AdamW``.

    Steps the values and writes the weights in one op call for each device, granule and step count
    (`shira_ops.foreach_adamw_`, which has the formulas). The same bits on every device and thread count.

    Weight decay is decoupled. It pulls the trained entries ``p`` towards zero, as in torch, or towards the base ``b``::

        p = p - lr * weight_decay * p            # decay_towards="zero"
        p = p - lr * weight_decay * (p - b)      # decay_towards="base"

    before the step. With ``"base"`` it is the adapter that decays. The values of a tuner with ``overlay`` are zero at
    the base, so both are the same there.

    Args:
        params: a `SparseTuner`, or what ``torch.optim`` takes: parameters, or groups of them. Parameters that no tuner
            trains, and the values of a tuner with ``overlay``, get torch's own step.
        lr: learning rate; a tensor (float32 or float64, one entry) may be changed in place, also for a captured graph.
        betas: decay of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        amsgrad: refused.
        maximize: maximize the objective instead of minimizing it.
        foreach, fused: for the parameters that no tuner trains, as in torch; the step of values is one call anyway.
        capturable: keep the step counts on the device, so that a captured graph can count; with a tensor as ``lr`` they
            always are there.
        differentiable: refused.
        decay_towards: ``"zero"`` or ``"base"``.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decay_towards: Literal["zero", "base"] = "zero",
    ) -> None:
        defaults = {
            "lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "foreach": foreach, "capturable": capturable, "differentiable": differentiable,
            "fused": fused, "decay_towards": decay_towards,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any], new: bool = False) -> None:
        super()._check(group, new)
        betas = group["betas"]
        if len(betas) != 2 or not all(isinstance(beta, numbers.Real) for beta in betas):
            raise ValueError(f"shira.AdamW: betas must be two numbers (no tensors), got {betas}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"shira.AdamW: betas must be in [0, 1), got {betas}")
        _check_number("shira.AdamW", "eps", group["eps"])
        if group.get("amsgrad"):
            raise ValueError(
                "shira.AdamW: amsgrad is not supported; torch.optim.AdamW(tuner.parameters(), amsgrad=True) trains the "
                "same values with it"
            )
        if group.get("decoupled_weight_decay") is False and group["weight_decay"]:
            raise ValueError("shira.AdamW: the state is of torch.optim.Adam, whose weight decay is another")
        if isinstance(group["lr"], Tensor) and group.get("foreach") and not group.get("capturable"):
            raise ValueError("shira.AdamW: lr as a tensor with foreach=True needs capturable=True, as in torch")

    @staticmethod
    def _begin(parameter: Tensor, state: dict[str, Any], on_device: bool) -> None:
        """Make the first state; and bring the step count to the dtype and device where it is needed."""
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        step, device = state["step"], parameter.device if on_device else _CPU
        if not isinstance(step, Tensor) or step.dtype not in _COUNTS:
            state["step"] = torch.as_tensor(step, dtype=torch.float32, device=device)
        elif step.device != device:
            state["step"] = step.to(device)

    def _step_values(self, group: dict[str, Any], items: list[_Item]) -> None:
        lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
        common = {"beta1": beta1, "beta2": beta2, "eps": group["eps"]}
        towards_base = group["decay_towards"] == "base" and decay != 0
        on_device = group["capturable"] or isinstance(lr, Tensor)
        # One call takes one device, granule and step count; most models give a single call.
        calls: dict[tuple[torch.device, int, int], list[_Item]] = {}
        for item in items:
            values, target, grad, state = item
            self._begin(values, state, on_device)
            if towards_base:
                here = _shards.local(values)
                here.sub_((here - _base(values, target)) * (lr * decay))
            if _is_empty(values):
                _stepped(item)
                continue
            if not on_device:
                calls.setdefault((values.device, _granule(values, target), int(state["step"]) + 1), []).append(item)
                continue
            # Step count and learning rate stay on the device, where a captured graph finds them.
            fixed = not isinstance(lr, Tensor)
            rate = torch.full((), lr, dtype=torch.float64, device=values.device) if fixed else lr.to(values.device)
            weight, indices = _written(values, target)
            master, average, square = map(_shards.local, (values, state["exp_avg"], state["exp_avg_sq"]))
            shira_ops.adamw_(
                weight, indices, master, average, square, _shards.local(grad),
                step=state["step"] + 1, lr=rate, weight_decay=0.0 if towards_base else decay,
                granule=_granule(values, target), **common,
            )  # fmt: skip
            _stepped(item)
        for (_, granule, step), members in calls.items():
            tensors = [_written(values, target) for values, target, _, _ in members]
            shira_ops.foreach_adamw_(
                [weight for weight, _ in tensors],
                [indices for _, indices in tensors],
                [_shards.local(values) for values, *_ in members],
                [_shards.local(state["exp_avg"]) for *_, state in members],
                [_shards.local(state["exp_avg_sq"]) for *_, state in members],
                [_shards.local(grad) for _, _, grad, _ in members],
                step=step,
                lr=float(lr),
                weight_decay=0.0 if towards_base else decay,
                granule=granule,
                **common,
            )
            for item in members:
                _stepped(item)

    def _step_others(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        # On a CPU there is no graph to capture, and torch refuses the option.
        capturable = group["capturable"] and all(parameter.device.type != "cpu" for parameter in parameters)
        for parameter, state in zip(parameters, states, strict=True):
            self._begin(parameter, state, on_device=capturable or bool(group["fused"]))
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=group["foreach"],
            fused=group["fused"],
            capturable=capturable,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )


def _stepped(item: _Item) -> None:
    values, target, _, state = item
    state["step"] += 1
    _mark(values, target)


def _mark(values: Tensor, target: Target) -> None:
    """The step has written the weight."""
    if target.site.shard is None:
        mark_written(target.site, values)


class SGD(_Masked):
    """SGD for the values of a `SparseTuner`, with the formulas, defaults and state of ``torch.optim.SGD``.

    Steps the values and writes the weights in one op call for each device and granule (`shira_ops.foreach_sgd_`, which
    has the formulas). The same bits on every device and thread count.

    Weight decay is part of the gradient, as in torch: it adds ``weight_decay * p`` (``decay_towards="zero"``) or
    ``weight_decay * (p - b)``, with the base's entries ``b`` (``"base"``).

    Args:
        params: a `SparseTuner`, or what ``torch.optim`` takes: parameters, or groups of them. Parameters that no tuner
            trains, and the values of a tuner with ``overlay``, get torch's own step.
        lr: learning rate; a tensor (float32 or float64, one entry) may be changed in place, also for a captured graph.
        momentum: decay of the running sum of gradients; with 0 there is no such sum.
        dampening: a gradient is added to that sum times ``1 - dampening``.
        weight_decay: weight decay.
        nesterov: Nesterov momentum; needs momentum and no dampening.
        maximize: maximize the objective instead of minimizing it.
        foreach, fused: for the parameters that no tuner trains, as in torch; the step of values is one call anyway.
        differentiable: refused.
        decay_towards: ``"zero"`` or ``"base"``.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decay_towards: Literal["zero", "base"] = "zero",
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
            "maximize": maximize, "foreach": foreach, "differentiable": differentiable, "fused": fused,
            "decay_towards": decay_towards,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any], new: bool = False) -> None:
        super()._check(group, new)
        _check_number("shira.SGD", "momentum", group["momentum"])
        if group["nesterov"] and not (group["momentum"] > 0 and group["dampening"] == 0):
            raise ValueError(
                f"shira.SGD: nesterov needs momentum above 0 and dampening 0, got {group['momentum']} and "
                f"{group['dampening']}"
            )

    def _step_values(self, group: dict[str, Any], items: list[_Item]) -> None:
        momentum, decay = group["momentum"], group["weight_decay"]
        towards_base = group["decay_towards"] == "base" and decay != 0
        # torch starts its sum with the whole first gradient; a first step from zeros without dampening does the same.
        calls: dict[tuple[torch.device, int, bool], list[_Item]] = {}
        for values, target, grad, state in items:
            grad = _shards.local(grad)
            if towards_base:
                grad = grad.add(_shards.local(values) - _base(values, target), alpha=decay)
            first = momentum != 0 and state.get("momentum_buffer") is None
            if first:
                state["momentum_buffer"] = torch.zeros_like(values)
            if _is_empty(values):
                continue
            key = values.device, _granule(values, target), first
            calls.setdefault(key, []).append((values, target, grad, state))
        lr = group["lr"]
        for (device, granule, first), members in calls.items():
            tensors = [_written(values, target) for values, target, _, _ in members]
            shira_ops.foreach_sgd_(
                [weight for weight, _ in tensors],
                [indices for _, indices in tensors],
                [_shards.local(values) for values, *_ in members],
                [_shards.local(state["momentum_buffer"]) for *_, state in members] if momentum else None,
                [grad for _, _, grad, _ in members],
                lr=lr.to(device) if isinstance(lr, Tensor) else float(lr),
                momentum=momentum,
                dampening=0.0 if first else group["dampening"],
                weight_decay=0.0 if towards_base else decay,
                nesterov=group["nesterov"],
                granule=granule,
            )
            for values, target, _, _ in members:
                _mark(values, target)

    def _step_others(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        buffers = [self.state[parameter].get("momentum_buffer") for parameter in parameters]
        sgd(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            buffers,
            foreach=group["foreach"],
            fused=group["fused"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if group["momentum"]:
            for parameter, buffer in zip(parameters, buffers, strict=True):
                self.state[parameter]["momentum_buffer"] = buffer
