"""What is kept of a tuner in the checkpoints of other trainers: all that training changes, and nothing of the base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shira import _shards
from shira.adapter import _file
from shira.adapter.hub import FILE
from shira.train import _state
from shira.train.tuner import SparseTuner

STATE = "shira_tuner.pt"


def state_of(tuner: SparseTuner) -> dict[str, Any]:
    """The values, and what else training may change: persistent buffers, and parameters that were unfrozen by hand.

    Of a sharded model they are whole on every rank, and all ranks must call it together.
    """
    others = {name: _whole(tensor.detach()).clone() for name, tensor in _state.others(tuner).items()}
    return {"version": 1, "tuner": tuner.state_dict(), "others": others}


def take(tuner: SparseTuner, state: Any, where: str) -> None:
    """Go back to a `state_of`. One of another adapter, base or model is refused, with nothing changed."""
    try:
        if not isinstance(state, Mapping) or state.keys() != {"version", "tuner", "others"}:
            raise ValueError("this is not a state of a tuner in a checkpoint")
        others, theirs = _state.others(tuner), state["others"]
        _state.check_others(others, theirs)
        tuner.check_state_dict(state["tuner"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    tuner.load_state_dict(state["tuner"])
    with torch.no_grad():
        for name, tensor in others.items():
            tensor.copy_(_divided_as(tensor, theirs[name]))


def _whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if _shards.is_dtensor(tensor) else tensor
    return found


def _divided_as(tensor: Any, whole: Tensor) -> Tensor:
    if not _shards.is_dtensor(tensor):
        return whole
    from torch.distributed.tensor import distribute_tensor

    device = _shards.local(tensor).device
    return distribute_tensor(whole.to(device), tensor.device_mesh, tensor.placements, src_data_rank=None)


def write(tuner: SparseTuner, folder: str | os.PathLike[str], keep: bool = True) -> None:
    """Write the adapter as it is now, which is for use, and the state from which training can go on.

    The ranks of a sharded model call it together; the first one writes the adapter (`SparseTuner.save`), and those that
    ``keep`` write the state.
    """
    if not (keep or tuner.sharded):
        return
    target = Path(folder)
    if keep:
        target.mkdir(parents=True, exist_ok=True)
    tuner.save(target / FILE)
    state = state_of(tuner)
    if not keep:
        return
    with _file.replacing(target / STATE) as temporary:
        torch.save(state, temporary)


def read(tuner: SparseTuner, folder: str | os.PathLike[str]) -> None:
    """Go back to the state that `write` wrote."""
    path = os.path.join(folder, STATE)
    with open(path, "rb") as file:
        try:
            state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch may raise anything for a broken file
            raise ValueError(f"{path}: this is not a whole state of a tuner: {error}") from error
    take(tuner, state, path)
