"""Several ranks that train one adapter: what DistributedDataParallel (DDP) must know of a tuner, and must have known.

DDP averages the gradients of the parameters that the model had when DDP was made, so values that came later drift
apart; and it makes every rank's buffers those of the first rank, which a tuner's indices must never become behind its
back. So the indices, like the weights of dense targets, are on DDP's list of what it leaves alone, and at the first
step the ranks compare theirs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import shira_ops
from shira import _model

# Where DDP looks for the names of what it leaves to others, by its own convention.
_IGNORES = "_ddp_params_and_buffers_to_ignore"


def ignore(model: nn.Module, tensors: Iterable[Tensor]) -> list[str]:
    """Have DDP leave parameters and buffers of the model alone; returns the names for `unignore`."""
    wanted = {id(tensor) for tensor in tensors}
    names = list(_names(model, wanted))
    if names:
        setattr(model, _IGNORES, [*getattr(model, _IGNORES, []), *names])
    return names


def unignore(model: nn.Module, names: Iterable[str]) -> None:
    """Take names off the list again, and the list off the model when nothing is left."""
    dropped = set(names)
    if dropped:
        ignored = [name for name in getattr(model, _IGNORES, []) if name not in dropped]
        setattr(model, _IGNORES, ignored) if ignored else delattr(model, _IGNORES)


def _names(model: nn.Module, wanted: set[int]) -> Iterator[str]:
    """The names under which DDP looks for them: every one, for a tied weight is left alone under all or under none."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for held in (module._parameters, module._buffers):
            for attribute, tensor in held.items():
                if id(tensor) in wanted:
                    name = f"{prefix}.{attribute}" if prefix else attribute
                    yield name
                    yield f"_orig_mod.{name}"  # should it be compiled before it is wrapped
                    if not prefix:
                        yield f".{attribute}"  # as DDP composes the name of the root's own


def compare(trained: Sequence[tuple[str, nn.Module, int, Tensor, Tensor, Tensor]]) -> None:
    """Refuse what would let the ranks drift apart; every rank of the model's DDP must call it together.

    Does nothing unless several ranks train the model through DDP.

    Args:
        trained: for each weight its name, the module that holds it, granule, values, indices and the base's entries.
    """
    if not (trained and distributed.is_available() and distributed.is_initialized()):
        return
    if distributed.get_world_size() == 1:
        return
    owners = {id(owner) for _, owner, _, _, _, _ in trained}
    wrappers = _wrappers(owners)
    knowing = [wrapper for wrapper in wrappers if _knows(wrapper, trained)]
    if wrappers and not knowing:
        del wrappers
        gc.collect()  # one that nobody uses any more may linger in a cycle
        if _wrappers(owners):
            raise RuntimeError(
                f"SparseTuner: the model was wrapped in DistributedDataParallel before the tuner was attached, so that "
                f"nothing synchronises the values of {_model.some(name for name, *_ in trained)} between ranks; attach "
                f"the tuner to the module first, and wrap it then"
            )
    if knowing:
        _same(trained, knowing[-1].process_group)


def _wrappers(owners: set[int]) -> list[DistributedDataParallel]:
    """The DDPs around the modules. A module does not know them, so they are looked for among all objects, once."""
    found = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    several = [one for one in found if distributed.get_world_size(one.process_group) > 1]
    return [one for one in several if any(id(module) in owners for module in one.modules())]


def _knows(
    wrapper: DistributedDataParallel, trained: Sequence[tuple[str, nn.Module, int, Tensor, Tensor, Tensor]]
) -> bool:
    known = {id(parameter) for parameter in wrapper._module_parameters}
    return all(id(values) in known for _, _, _, values, _, _ in trained)


def _same(
    trained: Sequence[tuple[str, nn.Module, int, Tensor, Tensor, Tensor]], group: distributed.ProcessGroup
) -> None:
    words = torch.stack(
        [
            torch.stack([shira_ops.fingerprint(indices.to(torch.int64)) * granule, shira_ops.fingerprint(saved)])
            for _, _, granule, _, indices, saved in trained
        ]
    )
    every = [torch.empty_like(words) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(every, words, group=group)
    differ = (torch.stack(every) != every[0]).any(0)
    for column, what, advice in (
        (0, "masks", "give every rank the same mask: the same seed, or the same calibration batches"),
        (1, "base weights", "load the same base on every rank before the tuner is attached"),
    ):
        names = [name for (name, *_), other in zip(trained, differ[:, column].tolist(), strict=True) if other]
        if names:
            raise RuntimeError(f"SparseTuner: the ranks have different {what} for {_model.some(names)}; {advice}")
