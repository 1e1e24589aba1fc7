"""The trainers that people use on several ranks. What each rank checks is in `trainer_ranks` and `deepspeed_ranks`."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from shira import Adapter, AdapterError, SparseTuner, Switcher, masks

TESTS = Path(__file__).parent.parent


def run(folder: Path, imports: str, *programs: str, **environment: str) -> None:
    """Two ranks run all of it."""
    command = [sys.executable, str(TESTS / "ranks.py"), "2", str(folder), "--import", imports]
    command += [str(TESTS / "integrations" / program) for program in programs]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=variables)
    assert done.returncode == 0, done.stderr[-6000:]
    for program in programs:
        assert {"done.0", "done.1"} <= {path.name for path in (folder / Path(program).stem).iterdir()}


def test_two_ranks_of_accelerate_transformers_and_torchtitan(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    imports, programs = ["accelerate", "transformers.trainer", "shira.integrations.transformers"], ["trainer_ranks.py"]
    if find_spec("transformers.distributed") is not None:  # it divides models while it loads them
        imports += ["transformers.models.llama.modeling_llama", "transformers.models.qwen3_moe.modeling_qwen3_moe"]
        programs.append("loaded_ranks.py")
    run(tmp_path, ",".join(imports), *programs)


def test_two_ranks_of_deepspeed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    run(tmp_path, "torch", "deepspeed_ranks.py", DS_ACCELERATOR="cpu", LOCAL_SIZE="2")


# ---- without DeepSpeed: what it puts on parameters -----------------------------------------------------------


def partition(weight: Any) -> None:
    """As ``deepspeed.zero.Init`` and an engine of ZeRO-3 do."""
    weight.ds_id, weight.ds_shape, weight.ds_tensor = 0, weight.shape, weight.detach().flatten().clone()
    weight.ds_status = SimpleNamespace(name="NOT_AVAILABLE")
    weight.data = torch.empty(0)


def test_zero_3_is_refused() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with SparseTuner(model, masks.Rand(density=0.2)) as tuner:
        adapter: Adapter = tuner.adapter()
    tuner = SparseTuner(model, masks.Rand(density=0.2))
    says = r"0\.weight'? is partitioned by DeepSpeed's ZeRO-3, which leaves it empty between .* take ZeRO-1 or ZeRO-2"
    partition(model[0].weight)
    with pytest.raises(RuntimeError, match=f"SparseTuner: {says}"):
        model(torch.ones(1, 8))
    other: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    partition(other[0].weight)
    with pytest.raises(ValueError, match=f"SparseTuner: {says}"):
        SparseTuner(other, masks.Rand(density=0.2))
    with pytest.raises(AdapterError, match=says):
        Switcher(other).add("it", adapter)


def test_a_tuner_after_an_engine_is_refused() -> None:
    model: Any = nn.Linear(8, 8)
    model.bias._dp_group = object()  # as an engine of ZeRO-1 or ZeRO-2 does with what it trains
    with pytest.raises(ValueError, match=r"bias is already in a DeepSpeed engine, .* attach the tuner to the model fi"):
        SparseTuner(model, masks.Rand(density=0.2))
