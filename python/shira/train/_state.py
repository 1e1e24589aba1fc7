"""What a checkpoint holds besides the values: random states, states of optimizers, and what else training may change.

States that come from a file are checked before anything takes them.
"""

from __future__ import annotations

import numbers
import random
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shira.train.tuner import SparseTuner

# ---- random states -------------------------------------------------------------------------------------------


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
    """The state of every random generator: those of torch, numpy and Python, and those of the data loaders."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - data sets draw from the global one
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
        "generators": [generator.get_state() for generator in _generators(datas)],
    }


def _numpy_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    kind, keys, *rest = state["numpy"]
    return kind, keys.numpy().astype(np.uint32), *rest


def _python_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    version, words, gauss = state["python"]
    return version, tuple(words), gauss


def check_random_state(state: Any, *datas: Any) -> None:
    """Refuse what is not a `random_state`, or belongs to other data; nothing is set."""
    generators = _generators(datas)
    try:
        if len(generators) != len(state["generators"]):
            raise ValueError(
                f"the checkpoint has {len(state['generators'])} generators of data, here are {len(generators)}"
            )
        torch.Generator().set_state(state["torch"])
        for saved in state["cuda"]:
            if not isinstance(saved, Tensor) or saved.dtype != torch.uint8:
                raise TypeError("a state of CUDA's must be bytes")
        np.random.RandomState().set_state(_numpy_state(state))
        random.Random().setstate(_python_state(state))
        for generator, saved in zip(generators, state["generators"], strict=True):
            torch.Generator(generator.device).set_state(saved)
    except ValueError:
        raise
    except Exception as error:  # whatever the broken part of a state brings up
        raise ValueError(f"the checkpoint's random states are broken: {error}") from error


def set_random_state(state: Mapping[str, Any], *datas: Any) -> None:
    """Go back to a `random_state` that has been checked."""
    torch.set_rng_state(state["torch"])
    # Nothing draws from the generators of devices that this machine does not have.
    for device, saved in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(saved, device)
    np.random.set_state(_numpy_state(state))  # noqa: NPY002
    random.setstate(_python_state(state))
    for generator, saved in zip(_generators(datas), state["generators"], strict=True):
        generator.set_state(saved)


# ---- what else training may change ---------------------------------------------------------------------------


def others(tuner: SparseTuner) -> dict[str, Tensor]:
    """What training may change besides the values: persistent buffers, and parameters that were unfrozen by hand."""
    model, ours = tuner.model, {id(p) for p in tuner._trained()}
    persistent = model.state_dict(keep_vars=True)
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in persistent}
    return buffers | {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours}


def check_others(mine: Mapping[str, Tensor], theirs: Any) -> None:
    """Refuse the `others` of a different model."""
    if not isinstance(theirs, dict) or theirs.keys() != mine.keys():
        raise ValueError("the checkpoint is of a model with other buffers or other unfrozen parameters")
    for name, tensor in mine.items():
        if not isinstance(theirs[name], Tensor):
            raise ValueError(f"the checkpoint's {name} must be a tensor, got {type(theirs[name]).__name__}")
        check_form(tensor, theirs[name], name)


# ---- states of optimizers and schedulers ---------------------------------------------------------------------

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


def plain(value: Any, where: str) -> Any:
    """The state with Python's numbers in place of numpy's, which ``torch.load(weights_only=True)`` does not read.

    Refuses what it would not read either, before anything is written. A schedule goes on with Python's numbers as with
    numpy's, except for float32, which is refused: with more digits it would give other learning rates.
    """
    if isinstance(value, Tensor) or type(value) in _PLAIN:
        return value
    if isinstance(value, (np.float64, np.integer, np.bool_)):
        return value.item()
    if type(value) in (dict, OrderedDict, Counter, defaultdict):
        items = {plain(key, where): plain(inner, f"{where}[{key!r:.40}]") for key, inner in value.items()}
        return items if type(value) in (dict, defaultdict) else type(value)(items)
    if type(value) in (list, tuple, set):
        return type(value)(plain(inner, f"{where}[{at}]") for at, inner in enumerate(value))
    advice = (
        "give it Python's numbers, as float(...)"
        if isinstance(value, np.generic)
        else ("its state_dict() must be made of numbers, strings, tensors, lists and dicts")
    )
    kind = type(value)
    raise ValueError(
        f"Trainer: {where} is a {kind.__module__}.{kind.__qualname__}, which no checkpoint holds; {advice}"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Number) and not isinstance(value, bool)


def check_form(mine: Any, theirs: Any, where: str) -> None:
    """Refuse a loaded state whose form differs from that of the state it will replace; numbers and texts may differ."""
    wrong = None
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            wrong = f"must be {list(mine.shape)} of {mine.dtype}, got {list(theirs.shape)} of {theirs.dtype}"
    elif isinstance(mine, Counter):
        if not isinstance(theirs, Counter) or not all(map(_is_number, [*theirs, *theirs.values()])):
            wrong = f"must count numbers, got {type(theirs).__name__}"
    elif isinstance(mine, dict) and isinstance(theirs, dict):
        if mine.keys() != theirs.keys():
            wrong = f"must have {sorted(map(str, mine))}, got {sorted(map(str, theirs))}"
        else:
            for key, inner in mine.items():
                check_form(inner, theirs[key], f"{where}[{key!r}]")
    elif isinstance(mine, (list, tuple)) and isinstance(theirs, (list, tuple)):
        if len(mine) != len(theirs):
            wrong = f"must have {len(mine)} entries, got {len(theirs)}"
        else:
            for at, (one, two) in enumerate(zip(mine, theirs, strict=True)):
                check_form(one, two, f"{where}[{at}]")
    elif mine is None or isinstance(mine, bool):
        # Options that are True, False or None (torch decides), and what has no value yet.
        if not (theirs is None or isinstance(theirs, bool) or (mine is None and isinstance(theirs, (int, float, str)))):
            wrong = f"must be {mine!r} or the like, got {type(theirs).__name__}"
    elif _is_number(mine) or isinstance(mine, Tensor):
        if not (_is_number(theirs) or (isinstance(theirs, Tensor) and theirs.dim() == 0)) or (
            isinstance(mine, Tensor) and mine.dim()
        ):
            wrong = f"must be a number, got {type(theirs).__name__}"
    elif type(mine) is not type(theirs):
        wrong = f"must be a {type(mine).__name__}, got {type(theirs).__name__}"
    if wrong is not None:
        raise ValueError(f"the checkpoint's {where} {wrong:.400}")


# The entries of an optimizer's state that have the parameter's shape, by the names that most optimizers give them.
_OF_PARAMETERS_SIZE = frozenset(
    [
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "exp_inf",
        "square_avg",
        "grad_avg",
        "acc_delta",
        "momentum_buffer",
        "sum",
    ]
)
# Options of an optimizer's groups that are True, False or None (torch decides).
_FLAGS = frozenset(["foreach", "fused", "capturable", "differentiable", "maximize", "nesterov", "amsgrad"])
_ADAM = frozenset(["step", "exp_avg", "exp_avg_sq"])


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Refuse a state that is not a state of this optimizer; ``load_state_dict`` itself would take it."""
    mine = optimizer.state_dict()
    if not isinstance(state, dict) or state.keys() != mine.keys():
        raise ValueError("the checkpoint's optimizer has no state and param_groups")
    groups, states = state["param_groups"], state["state"]
    if not isinstance(groups, list) or len(groups) != len(mine["param_groups"]):
        raise ValueError("the checkpoint's optimizer has a different number of parameter groups")
    for at, (group, other) in enumerate(zip(mine["param_groups"], groups, strict=True)):
        check_form(group, other, f"optimizer's group {at}")
        for option in _FLAGS & other.keys():
            if other[option] is not None and not isinstance(other[option], bool):
                raise ValueError(f"the checkpoint's optimizer's group {at}: {option} must be True, False or None")
        if group["params"] != other["params"]:
            raise ValueError(f"the checkpoint's optimizer's group {at} is of other parameters")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not isinstance(states, dict) or not all(type(key) is int and 0 <= key < len(parameters) for key in states):
        raise ValueError("the checkpoint's optimizer's state must map the parameters' numbers to their states")
    names: set[frozenset[Any]] = set()
    for key, entries in states.items():
        where, shape = f"the checkpoint's optimizer's state of parameter {key}", parameters[key].shape
        if not isinstance(entries, dict):
            raise ValueError(f"{where} must be a dict, got {type(entries).__name__}")
        if entries:
            names.add(frozenset(entries))
        for name, value in entries.items():
            if name in _OF_PARAMETERS_SIZE and not (value is None and name == "momentum_buffer"):
                if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
                    raise ValueError(f"{where}: {name} must be floats of shape {list(shape)}")
            elif name == "step" and not (_is_number(value) or (isinstance(value, Tensor) and value.numel() == 1)):
                raise ValueError(f"{where}: step must be a number")
    if len(names) > 1:
        raise ValueError("the checkpoint's optimizer's states differ in what they hold")
    kind = type(optimizer)
    if names and kind.__name__ in ("Adam", "AdamW") and kind.__module__.startswith(("torch.optim", "shira.")):
        missing = sorted(_ADAM - next(iter(names)))
        if missing or not all(isinstance(one["step"], Tensor) for one in states.values() if one):
            raise ValueError(f"the checkpoint's optimizer's state lacks {', '.join(missing) or 'a tensor step'}")
