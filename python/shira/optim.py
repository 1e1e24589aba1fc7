"""Optimizers over a tuner's values that do the step and the write of the weights in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import shira_ops
from shira.tuner import SparseTuner, Target, mark_written, target_of

__all__ = ["AdamW"]


class AdamW(Optimizer):
    """AdamW over the values of a `SparseTuner`, with the formulas, defaults and state of ``torch.optim.AdamW``.

    Steps the values and writes the weights in one op call. Weight decay pulls the trained entries towards zero, as in
    torch. Its ``state_dict`` has torch's layout. Parameters that no tuner trains (a dense head) are refused: give those
    to an optimizer of their own.

    Args:
        params: a `SparseTuner`, or what ``torch.optim`` takes: parameters, or groups of them.
        lr: learning rate.
        betas: decay of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
    """

    # Tells the tuner's post-step hook that there is nothing left to write.
    writes_weights = True

    def __init__(
        self,
        params: SparseTuner | Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        given = params.named_parameters() if isinstance(params, SparseTuner) else params
        super().__init__(given, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except ValueError:
            # A refused group must not stay.
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure`` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        # One call takes one device, granule and step count; most models give a single call.
        calls: dict[tuple[torch.device, int, int], list[tuple[Target, Tensor]]] = {}
        for values in group["params"]:
            if values.grad is None:
                continue
            if values.grad.is_sparse:
                raise RuntimeError("shira.AdamW: gradients must be dense tensors")
            target = target_of(values)
            if target is None:
                raise RuntimeError("shira.AdamW: the tuner of these parameters is detached")
            state = self.state[values]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(values, memory_format=torch.contiguous_format)
                state["exp_avg_sq"] = torch.zeros_like(values, memory_format=torch.contiguous_format)
            step = int(state["step"]) + 1
            calls.setdefault((values.device, target.site.granule, step), []).append((target, values))
        for (_, granule, step), items in calls.items():
            tensors = [target.tensors() for target, _ in items]
            states = [self.state[values] for _, values in items]
            shira_ops.foreach_adamw_(
                [weight for weight, _, _ in tensors],
                [indices for _, indices, _ in tensors],
                [values for _, _, values in tensors],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [values.grad for _, values in items if values.grad is not None],
                step=step,
                lr=float(group["lr"]),
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                granule=granule,
            )
            for (target, values), state in zip(items, states, strict=True):
                state["step"] += 1
                mark_written(target.site, values)


def _check_group(group: dict[str, Any]) -> None:
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if isinstance(lr, Tensor):
        raise ValueError("shira.AdamW: lr must be a number; a tensor is not taken yet")
    if not lr >= 0:
        raise ValueError(f"shira.AdamW: lr must be at least 0, got {lr}")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"shira.AdamW: betas must be in [0, 1), got {group['betas']}")
    if not group["eps"] >= 0:
        raise ValueError(f"shira.AdamW: eps must be at least 0, got {group['eps']}")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"shira.AdamW: weight_decay must be at least 0, got {group['weight_decay']}")
    others = [list(p.shape) for p in group["params"] if target_of(p) is None]
    if others:
        raise ValueError(
            f"shira.AdamW: every parameter must be the values of an attached SparseTuner, got {len(others)} other(s), "
            f"the first of shape {others[0]}; give those to an optimizer of their own"
        )
