"""Checkpoints of Lightning's ``Trainer`` that hold the adapter and not the model.

::

    trainer = lightning.Trainer(callbacks=[AdapterCheckpoint(tuner), ModelCheckpoint(...)])
    trainer.fit(module, data, ckpt_path="last")
"""

from __future__ import annotations

from typing import Any

from torch import nn

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError(
            "shira.integrations.lightning needs Lightning; install it with: pip install lightning"
        ) from error

from shira.integrations import _checkpoint
from shira.train.tuner import SparseTuner

__all__ = ["AdapterCheckpoint"]

_KEY = "shira"


class AdapterCheckpoint(Callback):  # type: ignore[misc]
    """Keep the tuner's state in every checkpoint, and the base out of it.

    What ``ModelCheckpoint`` and ``save_checkpoint`` write then holds the values, buffers, other parameters that are
    trained, and what Lightning adds: optimizers, schedulers, loops. ``fit(ckpt_path=...)`` goes on from it with the
    same bits as a run that was not interrupted, as far as Lightning itself does. A checkpoint of another adapter or
    base is refused. Loading is not strict from then on (``strict_loading``), since the checkpoint does not hold the
    base. For the same reason a module's ``load_from_checkpoint`` cannot use such a file: save ``tuner.adapter()`` for
    that.

    Args:
        tuner: the tuner, attached to the module or to a part of it.
    """

    def __init__(self, tuner: SparseTuner) -> None:
        self.tuner = tuner

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.strict_loading = False

    def on_save_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        parameters = {id(p): p for p in pl_module.parameters()}
        ours = {id(p) for p in self.tuner._trained()}
        kept = {
            name
            for name, tensor in pl_module.state_dict(keep_vars=True).items()
            if id(tensor) not in parameters or (tensor.requires_grad and id(tensor) not in ours)
        }
        checkpoint["state_dict"] = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name in kept}
        checkpoint[_KEY] = _checkpoint.state_of(self.tuner)

    def on_load_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        if _KEY not in checkpoint:
            raise ValueError(
                "AdapterCheckpoint: the checkpoint holds no tuner's state; it was written without this callback"
            )
        _checkpoint.take(self.tuner, checkpoint[_KEY], "AdapterCheckpoint: the checkpoint")
