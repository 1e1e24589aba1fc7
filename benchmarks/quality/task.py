"""What an experiment needs to know about a task: a pretrained base, data it was not trained for, a score.

A task is a dataset with a split into train, validation and test that never changes. Learning rates are chosen on
``validation``; every reported figure is of ``test``. The tasks of a family share one base, so that their adapters
can be fused.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "quality"
"""For what is made on first use and can be made again: pretrained bases, trained adapters."""


class Task(Protocol):
    """One thing to learn. Everything is deterministic: the same arguments give the same bits on one machine."""

    name: str
    """``family/what``: ``digits-vit/rotated-45``."""
    family: str
    """The base: ``digits-vit``. All tasks of a family start from the same weights (but for those of ``whole``)."""
    targets: str
    """Which weights adapters change: a regular expression as `shira.SparseTuner` takes it."""
    whole: str | None
    """Parameters that every method trains as a whole beside its adapter (a new head), or None."""
    whole_lr: float
    """Their learning rate, the same beside every method."""
    steps: int
    """Training steps, unless an experiment says otherwise."""

    def base(self) -> nn.Module:
        """A fresh copy of the pretrained model (see `cached`), in ``eval()`` where it has dropout."""
        ...

    def batches(self, seed: int, steps: int, fraction: float = 1.0) -> Iterator[Any]:
        """``steps`` training batches, drawn with the seed from the first ``fraction`` of the training data."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss to train on, a scalar; masks that calibrate use it too."""
        ...

    def score(self, model: nn.Module, split: str = "test") -> float:
        """On ``"test"`` or ``"validation"``, higher is better: accuracy, or minus the mean loss (nats per token)."""
        ...

    def inputs(self) -> list[Any]:
        """Held-out inputs to compare activations on: batches as `shira.metrics.interference` takes them."""
        ...


_memory: dict[str, nn.Module] = {}


def measured(task: Task, model: nn.Module) -> dict[str, float]:
    """The scores on both splits, and what else a task measures (its ``measures``), if it does."""
    if hasattr(task, "measures"):
        found: dict[str, float] = task.measures(model)
        return found
    return {split: task.score(model, split) for split in ("validation", "test")}


def cached(name: str, make: Callable[[], nn.Module], pretrain: Callable[[nn.Module], None] | None = None) -> nn.Module:
    """A copy of a pretrained model, which ``pretrain`` trains once and ``build/quality/<name>.pt`` keeps.

    ``make`` builds the untrained model; without ``pretrain`` it builds the pretrained one. If either changes, give it
    another name.
    """
    if name not in _memory and pretrain is None:
        _memory[name] = make().eval()
    elif name not in _memory:
        path, model = CACHE / f"{name}.pt", make()
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        else:
            pretrain(model)
            model.zero_grad(set_to_none=True)
            CACHE.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f"{path.name}.{os.getpid()}")
            torch.save(model.state_dict(), beside)
            beside.replace(path)
        _memory[name] = model.eval()
    return copy.deepcopy(_memory[name])
