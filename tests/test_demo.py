"""The demo runs, learns and restores, and the command line reads what it wrote."""

import json
import subprocess
import sys

import pytest


def test_demo_learns_and_restores(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    from shira import demo

    for name, value in {"PRETRAIN_EPOCHS": 8, "ADAPT_EPOCHS": 8, "WIDE": 256, "WIDE_LAYERS": 2, "ROUNDS": 1}.items():
        monkeypatch.setattr(demo, name, value)
    said = demo.run(tmp_path)
    assert said["restored"]
    accuracy = said["accuracy"]
    assert accuracy["base"] == accuracy["base again"]
    assert accuracy["base"]["upright"] > 0.6
    for task in ("rotated", "inverted"):
        assert accuracy[f"adapter: {task}"][task] > accuracy["base"][task] + 0.2
        assert (tmp_path / f"{task}.safetensors").exists()
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")

    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "shira.cli", "inspect", "--json", tmp_path / "rotated.safetensors"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    about = json.loads(shown.stdout)
    assert about["mask"]["name"] == "Rand"
    assert about["nnz"] == said["trainable"]
    assert "| torch\n" not in shown.stderr


@pytest.mark.parametrize("what", ["missing.safetensors", "wrong.safetensors"])
def test_inspect_says_what_is_wrong(tmp_path, what):
    (tmp_path / "wrong.safetensors").write_bytes(b"nonsense")
    run = subprocess.run(
        [sys.executable, "-m", "shira.cli", "inspect", tmp_path / what], capture_output=True, text=True
    )
    assert run.returncode != 0
    assert run.stderr.count("\n") == 1
    assert what in run.stderr
