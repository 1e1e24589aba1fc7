"""Checkpoints of torch.distributed.checkpoint as a base or as the tuned model. Those of several ranks:
`tests/train/test_sharded.py`."""

from __future__ import annotations

import os
import pickle
import resource
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from shira import Adapter
from shira._text import AdapterError
from shira.adapter.bake import bake


def base() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "up.weight": torch.randn(8, 6, generator=generator).bfloat16(),
        "down.weight": torch.randn(6, 8, generator=generator),
        "few": torch.randn(3, generator=generator).to(torch.float8_e4m3fn),
        "count": torch.tensor(7),
    }


def tuned() -> dict[str, Tensor]:
    tensors = base()
    tensors["up.weight"][2, 3:5] = torch.tensor([float("nan"), -0.0])
    tensors["down.weight"] += 1
    return tensors


def save(tensors: dict[str, Any], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    return folder


def same(one: Adapter, two: Adapter) -> None:
    assert one.weights.keys() == two.weights.keys()
    for name, entry in two.weights.items():
        other = one.weights[name]
        assert (other.shape, other.dtype, other.granule) == (entry.shape, entry.dtype, entry.granule)
        assert other.fingerprint == entry.fingerprint
        assert torch.equal(other.indices, entry.indices)
        assert torch.equal(other.values.view(torch.uint8), entry.values.view(torch.uint8))


def test_either_side_may_be_one(tmp_path: Path) -> None:
    nested = {"model": tuned(), "optimizer": {"state": {"up.weight": {"exp_avg": torch.ones(8, 6)}}}, "step": 3}
    save(base(), tmp_path / "base")
    save(nested, tmp_path / "tuned")
    save_file(base(), tmp_path / "base.safetensors")
    wanted = Adapter.from_difference(base(), tuned())
    for one in (base(), tmp_path / "base", tmp_path / "base.safetensors"):
        for two in (tuned(), tmp_path / "tuned"):
            same(Adapter.from_difference(one, two), wanted)
    few = Adapter.from_difference(tmp_path / "base", tmp_path / "tuned", density=0.1, granule=2)
    same(few, Adapter.from_difference(base(), tuned(), density=0.1, granule=2))
    same(wanted.to_delta(tmp_path / "base"), wanted.to_delta(base()))
    with pytest.raises(AdapterError, match=r"base is a checkpoint of torch\.distributed\.checkpoint, and the merged"):
        bake(wanted, tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def changed(folder: Path, change: Callable[[Any], None]) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def no_pieces(metadata: Any) -> None:
    metadata.state_dict_metadata["up.weight"].chunks.clear()


def twice(metadata: Any) -> None:
    """One half of a weight, two times."""
    (chunk,) = metadata.state_dict_metadata["up.weight"].chunks
    halved = torch.Size([chunk.sizes[0] // 2, *chunk.sizes[1:]])
    metadata.state_dict_metadata["up.weight"].chunks[:] = [replace(chunk, sizes=halved)] * 2


def another_dtype(metadata: Any) -> None:
    metadata.state_dict_metadata["up.weight"].properties.dtype = "bfloat17"


def without_files(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        del info.relative_path


def beside(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../" + info.relative_path


def elsewhere(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "gone"


def shifted(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.offset += 5


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def hostile(metadata: Any) -> None:
    metadata.planner_data = Hostile()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (no_pieces, r"the pieces of up\.weight are not the whole tensor"),
        (twice, r"the pieces of up\.weight are not the whole tensor"),
        (another_dtype, r"the metadata cannot be read: TypeError: a dtype must be one of torch's, got 'bfloat17'"),
        (without_files, r"the metadata cannot be read: AttributeError: .*relative_path"),
        (beside, r"names the file '\.\./__0_0\.distcp', which is not in its folder"),
        (elsewhere, r"names the file 'gone', which is missing"),
        (shifted, r"'\S+' cannot be read: "),
        (hostile, r"the metadata cannot be read: UnpicklingError: builtins\.print is not a part of such a file"),
    ],
)
def test_broken_ones_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Any], None], says: str
) -> None:
    save(tuned(), tmp_path / "tuned")
    changed(tmp_path / "tuned", change)
    with pytest.raises(AdapterError, match=says):
        Adapter.from_difference(base(), tmp_path / "tuned")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "asks",
    [b"r" + (2**32 - 1).to_bytes(4, "little"), b"\x96" + (2**36).to_bytes(8, "little")],
    ids=["a table", "an array"],
)
def test_memory_that_a_few_bytes_ask_for(tmp_path: Path, asks: bytes) -> None:
    """64 GB, of which nothing is taken."""
    path = save(tuned(), tmp_path / "tuned") / ".metadata"
    path.write_bytes(b"\x80\x05N" + asks + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterError, match="the metadata cannot be read"):
        Adapter.from_difference(base(), tmp_path / "tuned")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_a_pipe_in_place_of_a_file(tmp_path: Path) -> None:
    """To open one would wait for whoever writes to it."""
    path = save(tuned(), tmp_path / "tuned") / "__0_0.distcp"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(AdapterError, match=r"__0_0\.distcp: this is a pipe or a device, not a file"):
        Adapter.from_difference(base(), tmp_path / "tuned")


def test_which_model_must_be_clear(tmp_path: Path) -> None:
    save({"student": base(), "teacher": tuned()}, tmp_path / "two")
    with pytest.raises(AdapterError, match=r"must hold one model, .* got tensors under student, teacher; save"):
        Adapter.from_difference(base(), tmp_path / "two")
