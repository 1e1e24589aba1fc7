"""Updates over torch.distributed: two processes, gloo."""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shira import AdapterError
from shira.integrations import torch_distributed
from shira.integrations.torch_distributed import broadcast, catch_up
from shira.sync import Folder, Publisher, Receiver, SyncError


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).bfloat16()


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::7] += 1


def join(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))


def save(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def follow(folder: Path) -> None:
    """The second process: what `test_two_processes` does, seen from the other side."""
    torch.set_num_threads(1)
    join(1, folder)
    model = model_of()
    receiver = Receiver(model)
    for number in range(2):
        receiver.stage(broadcast(None))
        receiver.commit()
        save(model, folder / f"{number}.pt")
    with pytest.raises(SyncError, match="broadcast: rank 0 had nothing to send: see its own error"):
        broadcast(None)
    with pytest.raises(SyncError, match="rank 0 sent something else; every rank of the group must call broadcast"):
        broadcast(None)
    with pytest.raises(AdapterError, match="the 3 bytes of an update"):
        broadcast(None)
    late = model_of()
    behind = Receiver(late)
    receiver.rollback()
    for one in (receiver, behind):
        updates = catch_up(one.version)
        one.stage(*updates)
        one.commit()
    assert catch_up(behind.version) == []
    assert behind.version == receiver.version
    save(late, folder / "late.pt")
    with pytest.raises(SyncError, match="folder has no update that starts or ends at version 0000000000000007"):
        catch_up(7)
    with pytest.raises(SyncError, match="catch_up: rank 0 had nothing to send"):
        catch_up(7)
    dist.destroy_process_group()


def same(model: nn.Module, path: Path) -> bool:
    state: dict[str, Tensor] = torch.load(path)
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_two_processes(tmp_path: Path) -> None:
    other = multiprocessing.get_context("spawn").Process(target=follow, args=(tmp_path,))
    other.start()
    join(0, tmp_path)
    home = torch.device("cpu")
    try:
        model, folder = model_of(), Folder(tmp_path / "updates")
        publisher = Publisher(model)
        trained = []
        for _ in range(2):
            disturb(model)
            update = publisher.publish()
            assert broadcast(update) is update
            folder.put(update)
            trained.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        with pytest.raises(TypeError, match="update must be an Update at rank 0, got NoneType"):
            broadcast(None)
        dist.broadcast(torch.tensor([5, 8]), 0)
        torch_distributed._send("broadcast", b"abc", 0, None, home)
        for _ in range(2):
            disturb(model)
            folder.put(publisher.publish())
        for _ in range(4):
            assert catch_up(None, folder) == []
        with pytest.raises(TypeError, match="folder must be a Folder at rank 0, got NoneType"):
            catch_up(None)
        other.join()
        assert other.exitcode == 0
        for number, state in enumerate(trained):
            followed = model_of()
            followed.load_state_dict(state)
            assert same(followed, tmp_path / f"{number}.pt")
        assert same(model, tmp_path / "late.pt")
        with pytest.raises(SyncError, match=r"could not go on with rank 1, so no weight has changed\. Where a process"):
            broadcast(None, src=1)
    finally:
        dist.destroy_process_group()
        other.kill()


def test_refused_without_a_group() -> None:
    with pytest.raises(RuntimeError, match=r"broadcast: torch\.distributed\.init_process_group must be called first"):
        broadcast(None)


def test_alone() -> None:
    model, copy = model_of(), model_of()
    publisher = Publisher(model)
    disturb(model)
    update = publisher.publish()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert broadcast(update) is update
    finally:
        dist.destroy_process_group()
    receiver = Receiver(copy)
    receiver.stage(update)
    receiver.commit()
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), copy.parameters(), strict=True))
