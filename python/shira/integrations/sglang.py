"""Live updates for SGLang: a loader for ``--custom-weight-loader`` that changes the entries that changed, in place.

The server, with the same weights as the trainer::

    python -m sglang.launch_server --model-path ... --custom-weight-loader shira.integrations.sglang.load

and the trainer, by whatever reaches the server's ``update_weights_from_tensor``, here its engine::

    publisher = shira.sync.Publisher(trained)
    engine.update_weights_from_tensor(description(publisher), load_format=LOADER)  # once
    ...                                                                            # some steps of training
    engine.update_weights_from_tensor(message(publisher.publish()), load_format=LOADER)

With the description each worker records a `shira.sync.Plan` with its model's own ``load_weights``, so that fused
projections, slices for tensor parallelism and stacked experts are followed. Weights that SGLang quantizes when it loads
them are named, and an update of them is refused. A model whose weights SGLang has changed after loading, such as their
order for a kernel, is refused at the start: some entries of every weight are compared with the trainer's.

A worker refuses what does not follow on its own version, and every update is written as a whole or not at all. What
SGLang has computed with the old weights (its radix cache) is SGLang's to forget.

This was written for the interface of SGLang 0.5, and tried with the loaders of its layers on a CPU. It has not run in a
server yet.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from shira.integrations import _engine
from shira.sync import Publisher, Receiver, SyncError, Update

__all__ = ["LOADER", "description", "load", "message"]

LOADER = "shira.integrations.sglang.load"
"""What `load` is called by the server's options and by its requests."""

_DESCRIPTION, _UPDATE = "shira.description", "shira.update"
# Where the model keeps its Receiver, which refers to the model: both go together.
_ATTRIBUTE = "_shira_receiver"


def description(publisher: Publisher, *, exclude: str | None = None) -> list[tuple[str, Tensor]]:
    """The first message: what the trainer publishes. The server must have these weights, at this version.

    Args:
        publisher: the trainer's.
        exclude: as for `shira.sync.Plan.record`.
    """
    return [(_DESCRIPTION, _packed(_engine.described(publisher, exclude).encode()))]


def message(*updates: Update) -> list[tuple[str, Tensor]]:
    """Updates in their order, as tensors: they are taken over in one commit."""
    for update in updates:
        if not isinstance(update, Update):
            raise TypeError(f"message: an update must be an Update, got {type(update).__name__}")
    return [(_UPDATE, _packed(update.to_bytes())) for update in updates]


def load(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Take a message over; SGLang calls this in each of its workers.

    Raises `SyncError` or `shira.AdapterError` with the model's weights as they were.
    """
    receiver: Receiver | None = getattr(model, _ATTRIBUTE, None)
    if receiver is not None:
        receiver.unstage()  # of a message that was refused
    for name, tensor in named_tensors:
        data = tensor.cpu().numpy().tobytes()
        if name == _DESCRIPTION:
            receiver = _engine.receiver("SGLang", model, data.decode(errors="replace"))
            setattr(model, _ATTRIBUTE, receiver)
        elif name != _UPDATE:
            raise SyncError(f"SGLang: a message of this loader has {_DESCRIPTION} or {_UPDATE}, got {name!r}")
        elif receiver is None:
            raise SyncError("SGLang: the trainer's description must come first (shira.integrations.sglang.description)")
        else:
            receiver.stage(data)
    if receiver is not None and receiver.staged is not None:
        receiver.commit()


def _packed(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
