"""Live updates over ``torch.distributed``: one flat buffer per broadcast, O(changed entries).

::

    update = broadcast(publisher.publish() if rank == 0 else None)
    receiver.stage(update)
    receiver.commit()

A process that dies takes its group with it: torch has no groups with a hole. Make the group again, and let everybody
`catch_up` from the trainer's `shira.sync.Folder`; or, where processes come and go, let each follow the folder alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from shira._granules import signed
from shira.sync import Folder, SyncError, Update
from shira.sync.update import shown_version

__all__ = ["broadcast", "catch_up"]

# The first number of every message, so that another collective's numbers are not taken for a length.
_MARK = 0x7368697261  # "shira"
_FAILED = -1


def broadcast(
    update: Update | None,
    src: int = 0,
    group: dist.ProcessGroup | None = None,
    *,
    device: str | torch.device | None = None,
) -> Update:
    """Send an update from one rank to all others of a group, which call this too.

    Args:
        update: what to send, at `src`; elsewhere it is not looked at, and may be None.
        src: the global rank that sends, as for ``torch.distributed.broadcast``.
        group: the group; the default one unless given. Its timeout is how long it waits for a rank that hangs.
        device: where the buffers lie; unless given, the current accelerator where the group's backend takes no CPU
            tensors (NCCL), otherwise the CPU.

    Returns the update: the same object at `src`, at others one that was checked as `Update.from_bytes` does. The same
    bytes arrive at every rank.

    Raises `SyncError` where a rank is lost or the sender had nothing to send, and `shira.AdapterError` for bytes that
    are not an update. No weight is touched.
    """
    me = _rank("broadcast", group)
    home = _home(group, device)
    if me != src:
        return Update.from_bytes(_receive("broadcast", src, group, home))
    try:
        if not isinstance(update, Update):
            raise TypeError(f"broadcast: update must be an Update at rank {src}, got {type(update).__name__}")
        data = update.to_bytes()
    except BaseException:
        _fail("broadcast", src, group, home)  # or the others would wait for it
        raise
    _send("broadcast", data, src, group, home)
    return update


def catch_up(
    version: int | None,
    folder: Folder | None = None,
    src: int = 0,
    group: dist.ProcessGroup | None = None,
    *,
    device: str | torch.device | None = None,
) -> list[Update]:
    """Ask `src` for the updates that lead from this rank's version to the newest one; every rank calls it.

    What several ranks need is sent once, to all of them.

    Args:
        version: of this rank's weights, such as ``receiver.version``; None where nothing is needed, as at the trainer.
        folder: the trainer's updates, at `src`.
        src, group, device: as for `broadcast`.

    Returns the updates in order, for ``receiver.stage(*updates)``; none where this rank has the newest version.

    Raises `SyncError` at the ranks whose version the folder does not know, when all others have what they need.
    """
    me = _rank("catch_up", group)
    home = _home(group, device)
    asked = torch.tensor([0 if version is None else 1, signed(version or 0)], dtype=torch.int64, device=home)
    answers = [torch.empty_like(asked) for _ in range(dist.get_world_size(group))]
    _call("catch_up", src, lambda: dist.all_gather(answers, asked, group=group))
    wanted = {number % 2**64 for asks, number in (answer.tolist() for answer in answers) if asks}
    updates: dict[int, Update] = {}
    if me == src:
        try:
            if not isinstance(folder, Folder):
                raise TypeError(f"catch_up: folder must be a Folder at rank {src}, got {type(folder).__name__}")
            for one in sorted(wanted):
                updates |= {update.start: update for update in folder.since(one)}
            known = [one for one in sorted(wanted) if one in updates or folder.knows(one)]
            parts = [update.to_bytes() for update in updates.values()]
        except BaseException:
            _fail("catch_up", src, group, home)
            raise
        _send("catch_up", b"".join(one.to_bytes(8, "little") for one in known), src, group, home)
        _send("catch_up", len(parts).to_bytes(8, "little"), src, group, home)
        for part in parts:
            _send("catch_up", part, src, group, home)
    else:
        table = bytes(_receive("catch_up", src, group, home))
        known = [int.from_bytes(table[at : at + 8], "little") for at in range(0, len(table), 8)]
        count = int.from_bytes(bytes(_receive("catch_up", src, group, home)), "little")
        received = [_receive("catch_up", src, group, home) for _ in range(count)]  # all, for the group's sake
        for data in received if version is not None else ():
            update = Update.from_bytes(data)
            updates[update.start] = update
    if version is None:
        return []
    if version not in known:
        raise SyncError(
            f"catch_up: rank {src}'s folder has no update that starts or ends at version {shown_version(version)}; "
            f"load the trainer's weights"
        )
    way = []
    while version in updates:
        way.append(updates.pop(version))
        version = way[-1].end
    return way


def _send(what: str, data: bytes, src: int, group: dist.ProcessGroup | None, home: torch.device) -> None:
    head = torch.tensor([_MARK, len(data)], dtype=torch.int64, device=home)
    _call(what, src, lambda: dist.broadcast(head, src, group=group))
    if data:
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(home)
        _call(what, src, lambda: dist.broadcast(flat, src, group=group))


def _fail(what: str, src: int, group: dist.ProcessGroup | None, home: torch.device) -> None:
    head = torch.tensor([_MARK, _FAILED], dtype=torch.int64, device=home)
    _call(what, src, lambda: dist.broadcast(head, src, group=group))


def _receive(what: str, src: int, group: dist.ProcessGroup | None, home: torch.device) -> memoryview:
    head = torch.zeros(2, dtype=torch.int64, device=home)
    _call(what, src, lambda: dist.broadcast(head, src, group=group))
    mark, length = head.tolist()
    if mark != _MARK or length < _FAILED:
        raise SyncError(f"{what}: rank {src} sent something else; every rank of the group must call {what} here")
    if length == _FAILED:
        raise SyncError(f"{what}: rank {src} had nothing to send: see its own error")
    flat = torch.empty(length, dtype=torch.uint8, device=home)
    if length:
        _call(what, src, lambda: dist.broadcast(flat, src, group=group))
    return memoryview(flat.cpu().numpy())  # type: ignore[arg-type]


def _call(what: str, src: int, collective: Callable[[], object]) -> None:
    try:
        collective()
    except RuntimeError as error:  # which all errors of torch.distributed are
        raise SyncError(
            f"{what}: rank {dist.get_rank()} could not go on with rank {src}, so no weight has changed. Where a "
            f"process has died or hangs, make the group again and catch_up. Cause: {error}"
        ) from error


def _rank(what: str, group: dist.ProcessGroup | None) -> int:
    """This process's global rank, if it is in the group."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(f"{what}: torch.distributed.init_process_group must be called first")
    if dist.get_rank(group) < 0:
        raise ValueError(f"{what}: this process (rank {dist.get_rank()}) is not in the group; only its members call it")
    return dist.get_rank()


def _home(group: dist.ProcessGroup | None, device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if dist.get_backend(group) in ("nccl", "xccl", "hccl"):
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return torch.device("cpu")
