"""Several ranks that train one adapter: what DistributedDataParallel (DDP) must know about a tuner.

DDP averages the gradients of the parameters that the model had when DDP was made, so values that are added later would
drift apart. And it overwrites every rank's buffers with those of the first rank, which would replace a tuner's indices
without its notice. So the indices, and the weights of dense targets, are on DDP's list of what it leaves alone, and at
the first step the ranks compare their indices.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import shira_ops
from shira import _model

# Where DDP looks for the names of what it leaves to others, by its own convention.
_IGNORES = "_ddp_params_and_buffers_to_ignore"
# Which of these names a tuner added. On the model, so that a copied model has them too.
_OURS = "_shira_ignored"


def ignore(model: nn.Module, tensors: Iterable[Tensor]) -> list[str]:
    """Have DDP leave parameters and buffers of the model alone; returns the names for `unignore`."""
    wanted = {id(tensor) for tensor in tensors}
    names = list(_names(model, wanted))
    if names:
        for listed in (_IGNORES, _OURS):
            setattr(model, listed, [*getattr(model, listed, []), *names])
    return names


def unignore(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Take names off the list again (None: all that tuners added), and remove the list when it is empty."""
    dropped = set(model.__dict__.get(_OURS, ()) if names is None else names)
    for listed in (_IGNORES, _OURS):
        if dropped and listed in model.__dict__:
            kept = [name for name in model.__dict__[listed] if name not in dropped]
            setattr(model, listed, kept) if kept else delattr(model, listed)


def _names(model: nn.Module, wanted: set[int]) -> Iterator[str]:
    """The names under which DDP looks for them: all of them, since DDP leaves a tied weight alone under all or none."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for held in (module._parameters, module._buffers):
            for attribute, tensor in held.items():
                if id(tensor) in wanted:
                    name = f"{prefix}.{attribute}" if prefix else attribute
                    yield name
                    yield f"_orig_mod.{name}"  # if the model is compiled before it is wrapped
                    if not prefix:
                        yield f".{attribute}"  # as DDP composes the name of the root's own


class Trained(NamedTuple):
    """One weight that trains: its name, the module that holds it, and what the ranks must have in common.

    ``dense`` is the weight itself if its dense gradient is made, which DDP must not average.
    """

    name: str
    owner: nn.Module
    granule: int
    indices: Tensor
    values: Tensor
    saved: Tensor
    dense: Tensor | None


def engine_of(values: Tensor | None) -> Any:
    """The process group over which a DeepSpeed engine of ZeRO-1 or ZeRO-2 trains a parameter; None if none does.

    DeepSpeed notes it on each parameter that it trains.
    """
    return None if values is None else values.__dict__.get("_dp_group")


def compare_in_engine(weights: Sequence[Trained]) -> None:
    """Refuse what would let the ranks of a DeepSpeed engine drift apart. All of its ranks must call it together."""
    group = engine_of(weights[0].values)
    if distributed.get_world_size(group) > 1:
        _compare_in(group, weights)


def compare(weights: Sequence[Trained]) -> None:
    """Refuse what would let the ranks drift apart. All ranks of the model's DDP must call it together.

    Does nothing unless several ranks train the model through DDP.
    """
    if not (weights and distributed.is_available() and distributed.is_initialized()):
        return
    if distributed.get_world_size() == 1:
        return
    wrappers = _wrappers(weights)
    knowing = [wrapper for wrapper in wrappers if _knows(wrapper, weights)]
    if wrappers and not knowing:
        del wrappers
        gc.collect()  # one that is not used any more may still be in a reference cycle
        if _wrappers(weights):
            raise RuntimeError(
                f"SparseTuner: the model was wrapped in DistributedDataParallel before the tuner was attached, so that "
                f"nothing synchronises the values of {_model.some(one.name for one in weights)} between ranks; attach "
                f"the tuner to the module first, and wrap it then"
            )
    if knowing:
        _check_ignored(knowing[-1], weights)
        _compare_in(knowing[-1].process_group, weights)


def _wrappers(weights: Sequence[Trained]) -> list[DistributedDataParallel]:
    """The DDPs around the weights. A module does not know its wrappers, so all objects are searched, once."""
    owners = {id(one.owner) for one in weights}
    found = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    several = [one for one in found if distributed.get_world_size(one.process_group) > 1]
    return [one for one in several if any(id(module) in owners for module in one.modules())]


def _knows(wrapper: DistributedDataParallel, weights: Sequence[Trained]) -> bool:
    known = {id(parameter) for parameter in wrapper._module_parameters}
    return all(id(one.values) in known for one in weights)


def _check_ignored(wrapper: DistributedDataParallel, weights: Sequence[Trained]) -> None:
    known = {id(parameter) for parameter in wrapper._module_parameters}
    names = [one.name for one in weights if id(one.dense) in known]
    if names:
        raise RuntimeError(
            f"SparseTuner: DistributedDataParallel is around another module than the tuner is attached to, so that it "
            f"would average and keep the dense gradients of {_model.some(names)}; attach the tuner to the module that "
            f"is wrapped ({type(wrapper.module).__name__})"
        )


def _compare_in(group: distributed.ProcessGroup, weights: Sequence[Trained]) -> None:
    device = weights[0].values.device
    masks = [shira_ops.fingerprint(one.indices.to(torch.int64)) * one.granule for one in weights]
    # If the model was moved, the saved entries are still on the first device.
    bases = [shira_ops.fingerprint(one.saved) for one in weights]
    words = torch.stack([word.to(device) for word in (*masks, *bases)])
    every = [torch.empty_like(words) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(every, words, group=group)
    differ = (torch.stack(every) != words).any(0).view(2, -1).tolist()
    advices = (
        ("masks", "give every rank the same mask: the same seed, or the same calibration batches"),
        ("base weights", "load the same base on every rank before the tuner is attached"),
    )
    for (what, advice), which in zip(advices, differ, strict=True):
        names = [one.name for one, other in zip(weights, which, strict=True) if other]
        if names:
            raise RuntimeError(f"SparseTuner: the ranks have different {what} for {_model.some(names)}; {advice}")
