"""What a training run needs besides its loop: a loss, random states, batches on a device, a display of progress."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def loss_of_model(model: nn.Module, batch: Any) -> Tensor:
    """The loss the model itself gives: ``output.loss`` or ``output["loss"]``, or its output if that is a tensor.

    The model is called with a mapping as ``model(**batch)``, a tuple or list as ``model(*batch)``, a tensor as
    ``model(batch)``.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, (tuple, list)):
        output = model(*batch)
    elif isinstance(batch, Tensor):
        output = model(batch)
    else:
        raise ValueError(
            f"a batch must be a mapping, a tuple, a list or a tensor, got {type(batch).__name__}; for any other give "
            f"loss=, a function of (model, batch)"
        )
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "loss", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("loss")
    if found is None:
        raise ValueError(
            f"the model's output, {type(output).__name__}, has no loss; give the batches their labels, or loss=, a "
            f"function of (model, batch)"
        )
    return found  # type: ignore[no-any-return]


def scalar(loss: Any, what: str) -> Tensor:
    """The loss, if it is a tensor of one number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{what} must be a scalar tensor, got {given}")
    return loss


def _generators(datas: tuple[Any, ...]) -> list[torch.Generator]:
    """The generators of data loaders and their samplers, each once."""
    found: dict[int, torch.Generator] = {}
    for data in datas:
        within = getattr(getattr(data, "batch_sampler", None), "sampler", None)
        for part in (data, getattr(data, "sampler", None), within):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def random_state(*datas: Any) -> dict[str, Any]:
    """The state of every source of chance: torch, numpy's and Python's global ones, and the data's own."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - others draw from the global one
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
        "generators": [generator.get_state() for generator in _generators(datas)],
    }


def set_random_state(state: Mapping[str, Any], *datas: Any) -> None:
    """Go back to a `random_state`."""
    generators = _generators(datas)
    if len(generators) != len(state["generators"]):
        raise ValueError(
            f"the checkpoint has {len(state['generators'])} generators of data, here are {len(generators)}"
        )
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    for generator, saved in zip(generators, state["generators"], strict=True):
        generator.set_state(saved)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the model's device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


@contextmanager
def progress(show: bool, done: int, total: int | None, every: int) -> Iterator[Callable[[int, float, float], None]]:
    """Something to tell step, loss and learning rate to."""
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
