"""The order of work on GPUs: adapters come over side streams, and callers' streams wait for them without the host.

On a CPU all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

Events = dict[torch.device, torch.cuda.Event]
"""An event for each GPU that takes part."""


@dataclass(eq=False)
class Streams:
    """The side streams over which adapters come, one for each GPU: transfers run beside the model's computation."""

    _side: dict[torch.device, torch.cuda.Stream] = field(default_factory=dict)

    @contextmanager
    def staging(self, devices: Iterable[torch.device]) -> Iterator[Events]:
        """What is done inside the block runs on side streams, after all work that the caller's streams had before.

        Yields a dictionary. When the block ends it is filled with the events that whoever uses the results must wait
        for.
        """
        ready: Events = {}
        gpus = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
        with ExitStack() as stack:
            for device in gpus:
                side = self._side.setdefault(device, torch.cuda.Stream(device))
                side.wait_stream(torch.cuda.current_stream(device))
                stack.enter_context(torch.cuda.stream(side))
            yield ready
            for device in gpus:
                ready[device] = self._side[device].record_event()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a weight's device; to a GPU it is copied from pinned memory, on the current stream."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def wait(ready: Events) -> None:
    """Let the caller's streams continue only after these events; the host does not wait."""
    for device, event in ready.items():
        torch.cuda.current_stream(device).wait_event(event)


def mark(devices: Iterable[torch.device]) -> Events:
    """Events that happen when the caller's streams have done all work that they have now."""
    gpus = dict.fromkeys(device for device in devices if device.type == "cuda")
    return {device: torch.cuda.current_stream(device).record_event() for device in gpus}
