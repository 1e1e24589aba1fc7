"""Weights that ranks hold together. What the ranks check is in `sharded_ranks` and `resume_ranks`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sharded_ranks import net

from shira import Adapter
from shira_ops import scatter_

TESTS = Path(__file__).parent.parent
EXAMPLES = TESTS.parent / "examples"


def run(count: int, folder: Path, *programs: Path) -> list[str]:
    """What the ranks print."""
    command = [sys.executable, str(TESTS / "ranks.py"), str(count), str(folder), *map(str, programs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which four ranks have run, and left a checkpoint."""
    folder = tmp_path_factory.mktemp("ranks")
    run(4, folder, TESTS / "train/sharded_ranks.py")
    return folder


def test_four_ranks_find_what_one_process_finds(four: Path) -> None:
    assert sorted(path.name for path in four.glob("sharded_ranks/done.*")) == [f"done.{rank}" for rank in range(4)]


def test_differences_of_what_four_ranks_saved(four: Path) -> None:
    """Of a model and its optimizer, in pieces that differ between the ranks."""
    base, folder = net().state_dict(), four / "sharded_ranks"
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for name, entry in Adapter.load(folder / "1.safetensors").weights.items():
        scatter_(tuned[name], entry.indices, entry.values, granule=entry.granule)
    wanted = Adapter.from_difference(base, tuned)
    assert wanted.nnz > 0
    for one in (base, folder / "base"):
        got = Adapter.from_difference(one, folder / "checkpoint")
        assert got.weights.keys() == wanted.weights.keys()
        for name, entry in wanted.weights.items():
            assert got.weights[name].fingerprint == entry.fingerprint
            assert torch.equal(got.weights[name].indices, entry.indices)
            assert torch.equal(got.weights[name].values, entry.values)


def test_two_ranks_go_on_and_run_the_examples(four: Path) -> None:
    lines = run(2, four, TESTS / "train/resume_ranks.py", EXAMPLES / "fsdp2.py", EXAMPLES / "tensor_parallel.py")
    assert sorted(path.name for path in four.glob("resume_ranks/done.*")) == ["done.0", "done.1"]
    losses = [float(line.split()[-1]) for line in lines if line.startswith("step ")]
    assert losses[0] > 1 > 0.2 > losses[3]
    assert losses[4] > 1 > 0.2 > losses[7]
    assert "449 of 896 values on this rank, all of them in adapter.safetensors" in lines
    assert lines[-1] == "192 entries in adapter.safetensors, base restored bit for bit: True"
    assert Adapter.load(four / "fsdp2/adapter.safetensors").nnz == 896
    assert Adapter.load(four / "tensor_parallel/adapter.safetensors").nnz == 192
