"""The examples run as a newcomer runs them: offline, in their own process, and do what they say.

Those of several ranks run in `train.test_sharded`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shira import Adapter

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str, folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_loop(tmp_path: Path) -> None:
    out = run("train_loop.py", folder=tmp_path)
    assert "base restored bit for bit: True" in out
    shares = [float(word.strip("%,\n")) for word in out.split("quarters")[-1].split() if "%" in word]
    assert shares[-1] > 90
    assert Adapter.load(tmp_path / "adapter.safetensors").weights["4.bias"].whole


def test_train_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    out = run("train_transformers.py", "--out", "a.safetensors", "--steps", "40", folder=tmp_path)
    losses = [line for line in out.splitlines() if line.startswith("loss ")]
    before, after = (float(word) for word in losses[0].replace(",", "").split() if word[0].isdigit())
    assert after < before - 1
    assert losses[1].split()[1] == f"{before:.3f}"  # on the base again
    assert Adapter.load(tmp_path / "a.safetensors").nnz > 1000


def test_serve_adapters(tmp_path: Path) -> None:
    out = run("serve_adapters.py", folder=tmp_path)
    assert out.splitlines()[-1] == "the base is back, bit for bit: True"
    assert "formal + brief" in out
    assert list(tmp_path.iterdir()) == []


def test_follow_trainer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    lines = run("follow_trainer.py", folder=tmp_path).splitlines()
    shares = [int(line.split()[2].rstrip("%")) for line in lines if "digits are right" in line]
    assert shares[0] < 30
    assert shares[-1] > 50
    assert any("the engine is gone" in line for line in lines)
    assert "a new engine caught up over 24 updates in one commit" in lines
    sparse, dense = (int(line.split(":")[1].split()[0].replace(",", "")) for line in lines if " bytes, " in line)
    assert sparse < dense / 20
    assert lines[-1] == "the engine ends with the trainer's version"
    assert list(tmp_path.iterdir()) == []
