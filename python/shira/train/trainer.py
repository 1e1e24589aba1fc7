"""`Trainer`: an ordinary loop around a `SparseTuner`; a run that was stopped and resumed gives the same bits."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from shira import _loss
from shira.adapter import _file
from shira.train import _state
from shira.train.optim import AdamW
from shira.train.tuner import SparseTuner

__all__ = ["Trainer"]

Loss = Callable[[nn.Module, Any], Tensor]


class Trainer:
    """Train the values of a `SparseTuner` with an ordinary loop.

    One step takes ``accumulate`` batches (fewer at the end of an epoch) and averages their losses, clips, steps the
    optimizer and then the scheduler. The model is put into ``train()`` except for its batch normalisation, whose
    statistics belong to the base. A run that was stopped and resumed gives the same bits as one that was not, as long
    as the data gives the same batches for the same random state (a ``DataLoader`` with torch's samplers does). The same
    holds for `fit` after an interrupt, by Ctrl-C or by an error of the loss or the data: the step that was under way is
    repeated (buffers that its forward pass changed stay changed). Only an interrupt while the optimizer itself steps
    leaves half a step; `fit` and `save` then ask for `resume`.

    Args:
        tuner: the tuner, attached.
        data: batches that can be iterated over more than once: a ``DataLoader``, a list. An epoch is one pass.
        loss: ``loss(model, batch)`` returns a scalar; None takes the model's own: ``model(**batch).loss`` as
            transformers' models return it, or the model's output if that is a scalar.
        optimizer: over ``tuner.parameters()``; None is ``shira.AdamW(tuner)``.
        scheduler: stepped after every step of the optimizer.
        model: what to call in place of ``tuner.model``: the same model, compiled or wrapped.
        accumulate: batches in a step.
        clip: the largest norm of the gradient, or None.
        autocast: dtype of ``torch.autocast``, or None.
        scaler: a ``torch.amp.GradScaler``; for float16 autocast one is made.
        evaluation: batches for `evaluate`, which runs every ``evaluate_every`` steps.
        checkpoint: a file to write every ``checkpoint_every`` steps and at the end of `fit`, whole or not at all.
        callbacks: each is called as ``callback(trainer)`` after every step, and stops training by returning True.
        progress: show progress: a bar on a terminal (needs rich), else a line every ``log_every`` steps.
    """

    def __init__(
        self,
        tuner: SparseTuner,
        data: Iterable[Any],
        *,
        loss: Loss | None = None,
        optimizer: Optimizer | None = None,
        scheduler: Any = None,
        model: nn.Module | None = None,
        accumulate: int = 1,
        clip: float | None = None,
        autocast: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        evaluation: Iterable[Any] | None = None,
        evaluate_every: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 0,
        callbacks: Sequence[Callable[[Trainer], bool | None]] = (),
        progress: bool = True,
        log_every: int = 10,
    ) -> None:
        if not isinstance(data, Iterable):
            raise ValueError(f"Trainer: data must be batches, as a list or a DataLoader, got {type(data).__name__}")
        if isinstance(data, Iterator):
            raise ValueError(f"Trainer: data must be iterable more than once, got the iterator {type(data).__name__}")
        if accumulate < 1 or log_every < 1:
            raise ValueError(f"Trainer: accumulate and log_every must be at least 1, got {accumulate} and {log_every}")
        if clip is not None and not clip > 0:
            raise ValueError(f"Trainer: clip must be above 0, got {clip}")
        self.tuner, self.data, self.evaluation = tuner, data, evaluation
        self.model = tuner.model if model is None else model
        self.optimizer = AdamW(tuner) if optimizer is None else optimizer
        self.scheduler, self.clip, self.autocast, self.accumulate = scheduler, clip, autocast, accumulate
        values = list(tuner.parameters())
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not all(id(p) in trained for p in values):
            raise ValueError("Trainer: the optimizer must train every one of tuner.parameters()")
        self.device = values[0].device
        if scaler is None and autocast == torch.float16:
            scaler = torch.amp.GradScaler(self.device.type)
        self.scaler = scaler
        self._loss_of = _loss.loss_of_model if loss is None else loss
        self.evaluate_every, self.checkpoint_every = evaluate_every, checkpoint_every
        self.checkpoint, self.callbacks = checkpoint, tuple(callbacks)
        self._show, self._log_every = progress, log_every

        self.step, self.epoch = 0, 0  # steps taken and passes completed
        self.loss = math.nan  # of the last step that was shown
        self.evaluations: list[tuple[int, float]] = []  # step and loss of each
        self._position = 0  # batches taken of this epoch
        self._batches: Iterator[Any] | None = None
        self._epoch_random: dict[str, Any] | None = None
        self._stepping = False  # whether the optimizer is in the middle of a step

    def __repr__(self) -> str:
        return f"Trainer({self.tuner!r}, {type(self.optimizer).__name__}, step {self.step}, epoch {self.epoch})"

    # ---- the loop --------------------------------------------------------------------------------------------

    def fit(self, steps: int | None = None, *, epochs: int | None = None) -> Trainer:
        """Train until ``steps`` steps or ``epochs`` epochs are done, including those before a resume."""
        if (steps is None) == (epochs is None):
            raise ValueError(f"Trainer: give steps or epochs, one of the two, got {steps!r} and {epochs!r}")
        self._check_whole("fit")
        if self.checkpoint is not None:
            self._check_one_process("checkpoint=")
            self._plain_states()  # refuse what cannot be saved before the first step
        total = steps
        if epochs is not None and isinstance(self.data, Sized):
            total = epochs * math.ceil(len(self.data) / self.accumulate)
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        stopped = False
        with _progress(self._show, self.step, total, self._log_every) as show:
            while not stopped and (self.epoch < epochs if epochs is not None else self.step < (steps or 0)):
                position, chance = self._position, _state.random_state(self.data, self.evaluation)
                try:
                    group = self._next()
                    loss = self._gradients(group) if group else None
                    self._stepping = loss is not None
                except BaseException:
                    self._start_over(position, chance)
                    raise
                if loss is None:
                    if self._position == 0:
                        raise ValueError("Trainer: data gave no batch")
                    self.epoch, self._position, self._batches, self._epoch_random = self.epoch + 1, 0, None, None
                    continue
                self._update()
                if self.step % self._log_every == 0 or self.step == total:
                    self.loss = float(loss)
                    if not math.isfinite(self.loss) and self.scaler is None:
                        raise FloatingPointError(f"Trainer: the loss of step {self.step} is {self.loss}")
                show(self.step, self.loss, float(self.optimizer.param_groups[0]["lr"]))
                if self.evaluation is not None and self.evaluate_every and self.step % self.evaluate_every == 0:
                    self.evaluations.append((self.step, self.evaluate()))
                stopped = True in [callback(self) for callback in self.callbacks]
                if self.checkpoint is not None and self.checkpoint_every and self.step % self.checkpoint_every == 0:
                    self.save(self.checkpoint)
        if self.checkpoint is not None:
            self.save(self.checkpoint)
        return self

    def _next(self) -> list[Any]:
        """The batches of the next step; none at the end of an epoch."""
        group = list(islice(self._open_epoch(), self.accumulate))
        self._position += len(group)
        return group

    def _open_epoch(self) -> Iterator[Any]:
        if self._batches is not None:
            return self._batches
        self._tell_samplers()
        if not self._position:
            self._epoch_random = _state.random_state(self.data, self.evaluation)
            self._batches = iter(self.data)
            return self._batches
        # The same epoch again, up to the batch that comes next.
        assert self._epoch_random is not None
        now = _state.random_state(self.data, self.evaluation)
        _state.set_random_state(self._epoch_random, self.data, self.evaluation)
        batches = iter(self.data)
        found = sum(1 for _ in islice(batches, self._position))
        if found < self._position:
            raise ValueError(f"the checkpoint is {self._position} batches into an epoch, the data has only {found}")
        _state.set_random_state(now, self.data, self.evaluation)
        self._batches = batches
        return batches

    def _tell_samplers(self) -> None:
        for sampler in (getattr(self.data, name, None) for name in ("sampler", "batch_sampler")):
            if sampler is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)

    def _start_over(self, position: int, chance: Mapping[str, Any]) -> None:
        """After an interrupt before the optimizer's step: go back to where the step began."""
        self._stepping, self._position, self._batches = False, position, None
        self.optimizer.zero_grad(set_to_none=True)
        _state.set_random_state(chance, self.data, self.evaluation)

    def _check_whole(self, what: str) -> None:
        if self._stepping:
            raise RuntimeError(
                f"Trainer: {what} would go on with half a step: the last one was interrupted while the optimizer "
                f"stepped, and some values moved and some did not; go back to a checkpoint with resume(), or start anew"
            )

    def _check_one_process(self, what: str) -> None:
        if self.tuner.sharded:
            raise ValueError(
                f"Trainer: {what} has one file for several ranks, each with a part of the optimizer's state; "
                f"for a sharded model use torch.distributed.checkpoint, on the state dicts of model and optimizer"
            )

    def _gradients(self, group: Sequence[Any]) -> Tensor:
        """Forward and backward over the batches of a step; the loss."""
        total = torch.zeros((), device=self.device)
        for batch in group:
            with self._casting():
                loss = self._loss(batch) / len(group)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            total += loss.detach()
        return total

    def _update(self) -> None:
        """Clip, step, schedule."""
        if self.clip is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.clip)
        taken = True
        if self.scaler is None:
            self.optimizer.step()
        else:
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            taken = self.scaler.get_scale() >= scale
        if self.scheduler is not None and taken:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._stepping = False

    def _loss(self, batch: Any) -> Tensor:
        found = self._loss_of(self.model, _to_device(batch, self.device))
        return _loss.scalar(found, "Trainer: the loss").reshape(())

    def _casting(self) -> Any:
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    @torch.no_grad()
    def evaluate(self, data: Iterable[Any] | None = None) -> float:
        """The mean loss over batches, in ``eval()`` mode; training afterwards is as if it had not happened."""
        data = self.evaluation if data is None else data
        if data is None:
            raise ValueError("Trainer: there is nothing to evaluate on; give evaluation= or evaluate(data)")
        before = _state.random_state(self.data, self.evaluation)
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            total, count = 0.0, 0
            for batch in data:
                with self._casting():
                    total += float(self._loss(batch))
                count += 1
        finally:
            for module, training in modes:
                module.training = training
            _state.set_random_state(before, self.data, self.evaluation)
        if not count:
            raise ValueError("Trainer: there was no batch to evaluate on")
        return total / count

    # ---- stopping and going on -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint: values, optimizer, scheduler, scaler, random states, the place in the data. The file is
        whole, or it is not written.

        Raises `ValueError` for a state that could not be read again (a scheduler's, with types other than numbers,
        strings and tensors), and `OSError` with the file's name if it cannot be written.
        """
        self._check_whole("save")
        self._check_one_process("save")
        state = self._state()
        try:
            with _file.replacing(path) as temporary:
                torch.save(state, temporary)
        except (OSError, RuntimeError) as error:  # on a full disk torch raises a RuntimeError
            says = f"{os.fspath(path)}: the checkpoint cannot be written: {error}"
            number = getattr(error, "errno", None)
            raise (OSError(says) if number is None else OSError(number, says)) from error

    def resume(self, path: str | os.PathLike[str]) -> Trainer:
        """Go on from a checkpoint as if training had never stopped.

        Raises `ValueError`, with the file and what is wrong with it, for a checkpoint that is damaged or belongs to
        another adapter, base or set-up; then nothing of the trainer has changed.
        """
        self._check_one_process("resume")
        where = os.fspath(path)
        with open(where, "rb") as file:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises whatever the broken part of a file brings up
                raise ValueError(f"{where}: this is not a whole checkpoint of shira.Trainer: {error}") from error
        if not isinstance(state, dict) or type(state.get("version")) is not int or state["version"] != 1:
            raise ValueError(f"{where}: this is not a checkpoint of shira.Trainer, version 1")
        before = copy.deepcopy(self._state())
        try:
            self._check(state, before)
        except Exception as error:  # a broken state may raise anything
            raise ValueError(f"{where}: {error}") from error
        progress = self.step, self.epoch, self._position, self._batches, self._epoch_random
        try:
            self._take(state)
        except BaseException as error:
            self._take(before, open_epoch=False)
            self.step, self.epoch, self._position, self._batches, self._epoch_random = progress
            self._tell_samplers()
            if not isinstance(error, Exception):
                raise
            # Other optimizers and schedulers may raise anything.
            raise ValueError(f"{where}: {error}") from error
        self._stepping = False
        # A step that was interrupted half-way has left gradients.
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None:
            self.scaler._per_optimizer_states.clear()
        return self

    def _plain_states(self) -> dict[str, Any]:
        return {
            "optimizer": {
                "kind": type(self.optimizer).__name__,
                "state": _state.plain(self.optimizer.state_dict(), "the optimizer's state"),
            },
            **{
                name: None if part is None else _state.plain(part.state_dict(), f"the {name}'s state")
                for name, part in (("scheduler", self.scheduler), ("scaler", self.scaler))
            },
        }

    def _state(self) -> dict[str, Any]:
        return {
            "version": 1,
            "tuner": self.tuner.state_dict(),
            **self._plain_states(),
            "others": {name: tensor.detach().clone() for name, tensor in _state.others(self.tuner).items()},
            "progress": [self.step, self.epoch, self._position],
            "loss": self.loss,
            "evaluations": self.evaluations,
            "random": _state.random_state(self.data, self.evaluation),
            "epoch_random": self._epoch_random,
        }

    def _check(self, state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another set-up, or a broken one, before anything is taken from it."""
        missing = mine.keys() - state.keys()
        if missing or not isinstance(state["optimizer"], dict) or state["optimizer"].keys() != {"kind", "state"}:
            raise ValueError(f"this is not a whole checkpoint: it has no {', '.join(sorted(missing)) or 'optimizer'}")
        kinds = state["optimizer"]["kind"], mine["optimizer"]["kind"]
        if kinds[0] != kinds[1]:
            raise ValueError(f"the checkpoint's optimizer is {kinds[0]!s:.80}, this one is {kinds[1]}")
        for name in ("scheduler", "scaler"):
            if (state[name] is None) != (mine[name] is None):
                wanted, got = ("none", "one") if state[name] is None else ("one", "none")
                raise ValueError(f"the checkpoint has {wanted} for a {name}, this trainer has {got}")
            _state.check_form(mine[name], state[name], name)
        for name in ("growth_interval", "_growth_tracker"):
            if name in (mine["scaler"] or {}) and type(state["scaler"][name]) is not int:
                raise ValueError(f"the checkpoint's scaler[{name!r}] must be a count")
        _state.check_others(mine["others"], state["others"])
        self.tuner.check_state_dict(state["tuner"])
        _state.check_optimizer_state(self.optimizer, state["optimizer"]["state"])
        progress, evaluations = state["progress"], state["evaluations"]
        if not isinstance(progress, list) or len(progress) != 3 or any(type(n) is not int or n < 0 for n in progress):
            raise ValueError("the checkpoint's progress must be three counts")
        if not isinstance(state["loss"], float) or not isinstance(evaluations, list):
            raise ValueError("the checkpoint's losses must be numbers")
        for pair in evaluations:
            if not (isinstance(pair, tuple) and len(pair) == 2 and type(pair[0]) is int and isinstance(pair[1], float)):
                raise ValueError("the checkpoint's evaluations must be pairs of a step and a loss")
        _state.check_random_state(state["random"], self.data, self.evaluation)
        if progress[2] or state["epoch_random"] is not None:
            _state.check_random_state(state["epoch_random"], self.data, self.evaluation)

    def _take(self, state: Mapping[str, Any], open_epoch: bool = True) -> None:
        self.tuner.load_state_dict(state["tuner"])
        self.optimizer.load_state_dict(state["optimizer"]["state"])
        for name, part in (("scheduler", self.scheduler), ("scaler", self.scaler)):
            if part is not None:
                part.load_state_dict(state[name])
        with torch.no_grad():
            for name, tensor in _state.others(self.tuner).items():
                tensor.copy_(state["others"][name])
        self.step, self.epoch, self._position = state["progress"]
        self.loss, self.evaluations = state["loss"], list(state["evaluations"])
        self._batches, self._epoch_random = None, state["epoch_random"] if self._position else None
        if open_epoch and self._position:
            self._open_epoch()
        _state.set_random_state(state["random"], self.data, self.evaluation)


def _to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the model's device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        return type(batch)(_to_device(value, device) for value in batch)
    return batch


@contextmanager
def _progress(show: bool, done: int, total: int | None, every: int) -> Iterator[Callable[[int, float, float], None]]:
    """Yields a function that shows a step, its loss and its learning rate."""
    if not show:
        yield lambda step, loss, lr: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        terminal = False
    else:
        terminal = (console := Console(stderr=True)).is_terminal
    if not terminal:
        # Another line for every step would fill a log.
        def line(step: int, loss: float, lr: float) -> None:
            if step % every == 0 or step == total:
                print(f"step {step}{'' if total is None else f'/{total}'}  loss {loss:.4f}  lr {lr:.3g}", flush=True)

        yield line
        return
    columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("train", total=total, completed=done, text="")
        yield lambda step, loss, lr: bar.update(task, completed=step, text=f"loss {loss:.4f}  lr {lr:.3g}")
