"""Checkpoints of ``transformers.Trainer`` and its subclasses (TRL's too) that hold the adapter and not the model.

And `weight_loader`, which tells `shira.sync.Plan` how ``from_pretrained`` lays a checkpoint out.

A checkpoint of `AdapterCheckpoints` holds ``shira_adapter.safetensors``, which ``Adapter.from_pretrained(folder)``
reads, ``shira_tuner.pt`` with the values in full precision, and what the trainer itself keeps: optimizer, scheduler,
random states. ``train(resume_from_checkpoint=...)`` goes on from it with the same bits as a run that was not
interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "shira.integrations.transformers needs transformers; install it with: pip install transformers"
    ) from error

from shira.integrations import _checkpoint
from shira.train.tuner import SparseTuner

__all__ = ["AdapterCallback", "AdapterCheckpoints", "weight_loader"]


def weight_loader(model: Any) -> Callable[[Iterable[tuple[str, torch.Tensor]]], None]:
    """What ``from_pretrained`` does with the tensors of a checkpoint, for tensors in memory: to record a plan.

    ::

        plan = shira.sync.Plan.record(model, weight_loader(model), shapes)

    From version 5 on, ``transformers`` converts weights on the way: a checkpoint's experts are stacked, their gates
    fused, names changed. So a model may be laid out in another way than the checkpoint that a trainer publishes.

    Args:
        model: a ``transformers.PreTrainedModel``, on one device and not quantized.

    Returns a function that puts tensors, by the names of the checkpoint, in place of the model's parameters. It raises
    RuntimeError for what does not fit.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError(
            "weight_loader needs transformers 5, whose loaders convert weights; before that, names and layouts were "
            "those of the checkpoint, and a plan is not needed"
        ) from error

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        conversions = getattr(model, "_weight_conversions", None)
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            config = LoadStateDictConfig(
                device_map={"": model.device}, dtype=model.dtype, weight_mapping=get_model_conversion_mapping(model)
            )
            info, _ = convert_and_load_state_dict_in_model(model, dict(weights), config)
        finally:
            # It is set to the conversions that were needed, for the model to be saved as it was loaded.
            model._weight_conversions = conversions
            if shown:
                logging.enable_progress_bar()
        wrong = {**info.conversion_errors, **{name: shapes for name, *shapes in info.mismatched_keys}}
        if wrong:
            name, problem = next(iter(wrong.items()))
            raise RuntimeError(f"{name} cannot be made of these weights: {problem}")

    return load


@contextmanager
def _adapters_told(tuner: SparseTuner) -> Iterator[None]:
    """A Trainer refuses a quantized model unless adapters are on it, and it looks for PEFT's alone."""
    model: Any = tuner.model
    name = "_hf_peft_config_loaded"
    if not tuner.overlay or getattr(model, name, False):
        yield
        return
    before = vars(model).get(name)
    setattr(model, name, True)
    try:
        yield
    finally:
        vars(model).pop(name) if before is None else setattr(model, name, before)


class AdapterCallback(TrainerCallback):  # type: ignore[misc]
    """Put the adapter and the tuner's state into every checkpoint, beside the whole model that the trainer saves.

    For a trainer that cannot be subclassed; where it can, `AdapterCheckpoints` leaves the model out, and can resume.

    Args:
        tuner: the tuner, attached to the trainer's model.
    """

    def __init__(self, tuner: SparseTuner) -> None:
        self.tuner = tuner

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        _checkpoint.write(self.tuner, folder, keep=args.should_save)


class AdapterCheckpoints:
    """The first base class of a trainer whose checkpoints, and what ``save_model`` writes, hold only the adapter.

    ::

        class Trainer(AdapterCheckpoints, transformers.Trainer): ...

        trainer = Trainer(model, arguments, train_dataset=data, tuner=tuner)
        trainer.train(resume_from_checkpoint=True)

    ``load_best_model_at_end`` works too. Checkpoints that hold a whole model are read as before. Buffers, and
    parameters that were unfrozen by hand, are kept with the values. With FSDP2 the trainer shards the model after the
    tuner was attached, checkpoints hold the same two files, and the optimizer's state as the trainer saves it there;
    the trainer makes the optimizer. FSDP1 and DeepSpeed are refused.

    Args:
        tuner: the tuner, attached to the trainer's model before the trainer is made.
    """

    def __init__(self, *args: Any, tuner: SparseTuner, **options: Any) -> None:
        self.tuner = tuner
        with _adapters_told(tuner):
            super().__init__(*args, **options)
        if getattr(self, "is_deepspeed_enabled", False):
            raise ValueError(
                "AdapterCheckpoints: DeepSpeed saves and loads in its own way; leave it out, or use DDP or FSDP2"
            )
        if getattr(self, "is_fsdp_enabled", False) and not self.accelerator.is_fsdp2:  # type: ignore[attr-defined]
            raise ValueError("AdapterCheckpoints: FSDP1 flattens weights; take FSDP2, with fsdp_config={'version': 2}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in the trainer, but FSDP2 need not gather the model for it."""
        if not getattr(self, "is_fsdp_enabled", False):
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        self._save(output_dir)
        arguments: Any = self.args  # type: ignore[attr-defined]
        if arguments.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=arguments.hub_revision)  # type: ignore[attr-defined]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        arguments: Any = self.args  # type: ignore[attr-defined]
        folder = arguments.output_dir if output_dir is None else output_dir
        _checkpoint.write(self.tuner, folder, keep=arguments.should_save)
        if not arguments.should_save:
            return
        configuration: Any = getattr(self.tuner.model, "config", None)
        processing: Any = getattr(self, "processing_class", None)
        if processing is None:
            processing = getattr(getattr(self, "data_collator", None), "tokenizer", None)
        for part in (configuration, processing):
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(folder)
        torch.save(arguments, os.path.join(folder, "training_args.bin"))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As in the trainer, but with FSDP2 without the model, which it saves beside the optimizer."""
        if not getattr(self, "is_fsdp_enabled", False):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        from accelerate.utils import save_fsdp_optimizer
        from transformers.trainer import SCHEDULER_NAME

        trainer: Any = self
        plugin = trainer.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, trainer.accelerator, trainer.optimizer, trainer.model, output_dir)
        if trainer.args.should_save:
            torch.save(trainer.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if os.path.exists(os.path.join(resume_from_checkpoint, _checkpoint.STATE)):
            _checkpoint.read(self.tuner, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint  # type: ignore[attr-defined]
        if best is not None and os.path.exists(os.path.join(best, _checkpoint.STATE)):
            _checkpoint.read(self.tuner, best)
        else:
            super()._load_best_model()  # type: ignore[misc]
