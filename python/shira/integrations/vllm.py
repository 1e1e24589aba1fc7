"""Live updates for vLLM: a weight transfer engine that changes the entries that changed, in place, all or none of them.

The engine, which vLLM finds by itself where this library is installed::

    llm = vllm.LLM(model, weight_transfer_config={"backend": "shira"})

and the trainer, with a client of vLLM's (``vllm.distributed.weight_transfer.clients``)::

    sender = Sender(client, shira.sync.Publisher(trained))    # the engine has the same weights
    ...                                                       # some steps of training
    sender.send()

At the start each worker records a `shira.sync.Plan` with its model's own ``load_weights``, so that fused projections,
slices for tensor parallelism and stacked experts are followed. Weights that vLLM quantizes when it loads them are
named, and an update of them is refused. A model whose weights vLLM has changed after loading, such as their order for a
kernel, is refused at the start: some entries of every weight are compared with the trainer's.

An update is staged when it is received, and committed when the weight update is finished. A worker refuses what does
not follow on its own version, so one that missed an update cannot go on from wrong weights. What vLLM has computed with
the old weights (its prefix cache) is vLLM's to forget.

This was written for the interface of vLLM 0.33, and tried with its base class, factory and loaders on a CPU. It has not
run in a server yet.
"""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass
from typing import Any, Protocol

try:
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
except ImportError as error:
    raise ImportError(
        f"shira.integrations.vllm needs a vLLM that has weight transfer engines ({error}); install it with: "
        f"pip install -U vllm"
    ) from error

from shira.integrations import _engine
from shira.sync import Folder, Publisher, Receiver, SyncError, Update

__all__ = ["Engine", "InitInfo", "Sender", "UpdateInfo", "register"]

NAME = "shira"


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """What the trainer tells at the start; `Sender` makes it.

    Args:
        description: the trainer's weights and their version.
        folder: the trainer's `shira.sync.Folder`, if the workers can see it.
    """

    description: str
    folder: str | None = None


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """An update: its bytes (in base64, as they may go over HTTP), or None for what is new in the folder."""

    data: str | None = None


class Engine(WeightTransferEngine):  # type: ignore[misc]
    """The engine that `register` registers as ``shira``; vLLM makes one in each worker."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    receiver: Receiver | None = None
    folder: Folder | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Record where the worker has the trainer's weights. They must be at the trainer's version."""
        self.receiver = _engine.receiver("vLLM", self.model, init_info.description)
        self.folder = None if init_info.folder is None else Folder(init_info.folder)

    def start_weight_update(self) -> None:
        """Forget what was staged by an update that was not finished."""
        self._ready().unstage()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Check an update and make it ready; no weight changes."""
        receiver = self._ready()
        if update_info.data is not None:
            try:
                data = base64.b64decode(update_info.data, validate=True)
            except (binascii.Error, ValueError, TypeError) as error:
                raise SyncError(f"vLLM: the update must be bytes in base64: {error}") from error
            receiver.stage(data)
        elif self.folder is not None:
            at = receiver.version if receiver.staged is None else receiver.staged.end
            if not self.folder.knows(at):
                raise SyncError(
                    f"vLLM: {self.folder.path} has no update that starts or ends at this worker's version; load the "
                    f"trainer's weights"
                )
            receiver.stage(*self.folder.since(at))
        else:
            raise SyncError("vLLM: an update must come with its data, or with a folder at the start")

    def finish_weight_update(self) -> None:
        """Write what is staged: all of it, or an error and nothing."""
        receiver = self._ready()
        if receiver.staged is not None:
            receiver.commit()

    def shutdown(self) -> None:
        """Let the model go."""
        self.receiver = self.folder = None

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Not how this engine is fed: use `Sender`."""
        raise NotImplementedError("the shira engine takes updates and not weights; use shira.integrations.vllm.Sender")

    def _ready(self) -> Receiver:
        if self.receiver is None:
            raise SyncError("vLLM: init_weight_transfer_engine must be called first (shira.integrations.vllm.Sender)")
        return self.receiver


class Client(Protocol):
    """What `Sender` calls: vLLM's clients have it."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> object: ...

    def start_weight_update(self) -> object: ...

    def update_weights(self, update_info: dict[str, Any]) -> object: ...

    def finish_weight_update(self) -> object: ...


class Sender:
    """The trainer's side: publishes, and has the engine take the update over.

    Args:
        client: a client of the engine, such as vLLM's ``HTTPVLLMWeightSyncClient``.
        publisher: the trainer's weights, which the engine was loaded with.
        folder: a folder that the workers see too: updates go through it and not through the client, and whoever missed
            some gets all of them.
        exclude: as for `shira.sync.Plan.record`.
    """

    def __init__(
        self,
        client: Client,
        publisher: Publisher,
        *,
        folder: str | os.PathLike[str] | None = None,
        exclude: str | None = None,
    ) -> None:
        self.client, self.publisher = client, publisher
        self.folder = None if folder is None else Folder(folder)
        # What was published and is not in the folder yet.
        self._unwritten: list[Update] = []
        client.init_weight_transfer_engine(
            {
                "description": _engine.described(publisher, exclude),
                "folder": None if self.folder is None else os.path.abspath(self.folder.path),
            }
        )

    def send(self) -> Update:
        """Publish what has changed, and return it when the engine has it.

        Where the engine fails, it keeps its weights, and the next call sends what comes after this update: which the
        engine takes if there is a folder, and refuses otherwise. Where the folder cannot be written, as on a full disk,
        the next call writes this update too.
        """
        update = self.publisher.publish()
        data = None
        if self.folder is not None:
            self._unwritten.append(update)
            while self._unwritten:
                self.folder.put(self._unwritten[0])
                del self._unwritten[0]
        else:
            data = base64.b64encode(update.to_bytes()).decode()
        self.client.start_weight_update()
        self.client.update_weights({"data": data})
        self.client.finish_weight_update()
        return update


_registered = False


def register() -> None:
    """Make the engine known to vLLM by the name ``shira``. vLLM calls this itself (``vllm.general_plugins``)."""
    global _registered
    if not _registered:
        WeightTransferEngineFactory.register_engine(NAME, __name__, Engine.__name__)
        _registered = True
