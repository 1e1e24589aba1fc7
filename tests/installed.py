"""Run in an environment that has torch, numpy and an installed wheel, and nothing else of this project:

    python tests/installed.py

Every op is served by its compiled kernel, and an adapter is trained, saved, switched in and taken back, bit for bit.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ["PATH"] = ""  # nothing here may need a compiler

import torch
from torch import Tensor, nn

import shira
import shira_ops


def check_ops() -> None:
    for op, devices in shira_ops.backends().items():
        assert devices["cpu"].name == "compiled", f"{op} is served by {devices['cpu']}"
    weight, indices = torch.arange(12.0).view(3, 4), torch.tensor([1, 5], dtype=torch.int32)
    values = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    shira_ops.swap_(weight, indices, values, granule=2)
    assert weight.flatten().tolist() == [0, 1, -1, -2, 4, 5, 6, 7, 8, 9, -3, -4]
    assert values.tolist() == [2, 3, 10, 11]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(model: nn.Module, wanted: dict[str, Tensor]) -> bool:
    return all(torch.equal(parameter, wanted[name]) for name, parameter in model.named_parameters())


def check_round(folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    inputs, targets = torch.randn(64, 32), torch.randn(64, 32)
    base = bits(model)

    tuner = shira.SparseTuner(model, shira.masks.Rand(density=0.25, granule=4))
    optimizer = shira.AdamW(tuner, lr=0.01)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    tuner.adapter().save(folder / "adapter.safetensors")
    with torch.no_grad():
        tuned = model(inputs)
    tuner.detach()
    assert same(model, base)

    switcher = shira.Switcher(model)
    switcher.add("tuned", folder / "adapter.safetensors")
    switcher.activate("tuned")
    with torch.no_grad():
        assert torch.equal(model(inputs), tuned)
    switcher.deactivate()
    assert same(model, base)


if __name__ == "__main__":
    for package in (shira, shira_ops):
        assert Path(package.__file__).resolve().is_relative_to(Path(sys.prefix).resolve()), package.__file__
    check_ops()
    with tempfile.TemporaryDirectory() as folder:
        check_round(Path(folder))
    print(f"shira-ops works here: Python {sys.version.split()[0]}, torch {torch.__version__}")
