"""A training step, forward + backward + optimizer: shira's tuner beside PEFT's LoRA and PEFT's SHiRA.

All train as many parameters, r * (m + n) a layer, on the same frozen weights: four linear layers of 4096 x 4096, and a
Llama of four layers, 2048 wide, with LoRA's usual targets. Ours steps with `shira.AdamW`, PEFT's with the fused AdamW
of torch. Time is of interleaved steps on warm caches: a step moves more than any cache holds. Memory is the largest
resident size from before the model was made to the end of its third step.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

import common
from common import BF16, FP32, Report, compare, settings

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
shira = pytest.importorskip("shira")

TOKENS = 128
TARGETS = {
    "linear": r"layers\.\d+",
    "llama": r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
}
OURS, LORA, SHIRA = "shira", "PEFT LoRA", "PEFT SHiRA"


def rank(model: str) -> int:
    return common.lora_rank() if model == "linear" else 16 if not settings.quick else 1


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(settings.side, settings.side, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def llama() -> nn.Module:
    wide = 64 if settings.quick else 2048
    config = transformers.LlamaConfig(
        vocab_size=256 if settings.quick else 8192,
        hidden_size=wide,
        intermediate_size=wide * 11 // 4,
        num_hidden_layers=4,
        num_attention_heads=max(1, wide // 128),
        num_key_value_heads=max(1, wide // 128),
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def base(model: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return (Linears() if model == "linear" else llama()).to(dtype)


class Trained:
    """A model with a way to train it: `step` does all of one step and returns the loss."""

    def __init__(self, way: str, model: str, dtype: torch.dtype) -> None:
        made, r, targets = base(model, dtype), rank(model), TARGETS[model]
        self.optimizer: torch.optim.Optimizer
        if way == OURS:
            self.tuner = shira.SparseTuner(made, shira.masks.Rand(r=r), targets=targets)
            self.optimizer = shira.AdamW(self.tuner, lr=1e-4)
        else:
            kind = peft.LoraConfig if way == LORA else peft.ShiraConfig
            options: dict[str, Any] = {"random_seed": 1} if way == SHIRA else {}
            made = peft.get_peft_model(made, kind(r=r, target_modules=targets, **options))
            trained = [one for one in made.parameters() if one.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.model = made
        self.parameters = [one for one in made.parameters() if one.requires_grad]
        generator = torch.Generator().manual_seed(1)
        if model == "linear":
            x = torch.randn(1, TOKENS, settings.side, generator=generator).to(dtype)
            self.loss: Callable[[], torch.Tensor] = lambda: self.model(x).float().square().mean()
        else:
            ids = torch.randint(0, 256, (1, TOKENS), generator=generator)
            self.loss = lambda: self.model(input_ids=ids, labels=ids).loss

    def step(self) -> float:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak(way: str, model: str, dtype: torch.dtype) -> int:
    """Bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    trained = Trained(way, model, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    for _ in range(3):
        trained.step()
    return resident("VmHWM") - before


def prove(ours: Trained, others: list[Trained]) -> None:
    """The same number of parameters, the same loss at first, and the dense gradient at our indices."""
    count = sum(one.numel() for one in ours.parameters)
    for other in others:
        assert count == sum(one.numel() for one in other.parameters)
        torch.testing.assert_close(ours.loss(), other.loss())
    module = next(one for one in ours.model.modules() if hasattr(one, "weight_shira_values"))
    module.weight.requires_grad_(True)
    ours.loss().backward()
    sampled, dense = module.weight_shira_values.grad, module.weight.grad
    wanted = dense.view(-1)[module.weight_shira_indices.long()].float()
    scale = 2**-7 if dense.dtype == BF16 else 1e-4  # torch rounds the dense gradient to its dtype
    assert (sampled - wanted).abs().max() <= scale * wanted.abs().max()
    module.weight.requires_grad_(False)
    module.weight.grad = None
    ours.optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=common.dtype_name)
@pytest.mark.parametrize("model", ["linear", "llama"])
def bench_training(benchmark: BenchmarkFixture, threads: int, model: str, dtype: torch.dtype) -> None:
    memory = {way: peak(way, model, dtype) for way in (OURS, LORA, SHIRA)}
    trained = {way: Trained(way, model, dtype) for way in (OURS, LORA, SHIRA)}
    prove(trained[OURS], [trained[LORA], trained[SHIRA]])
    others: dict[str, Callable[[], object]] = {way: trained[way].step for way in (LORA, SHIRA)}
    timing = compare(
        benchmark, (OURS, trained[OURS].step), others, cold=False, rounds=3 if settings.quick else settings.rounds // 3
    )
    name = common.dtype_name(dtype)
    report = Report(benchmark, threads, dtype=name, model=model, rank=rank(model), tokens=TOKENS, peak_bytes=memory)
    report.seconds(timing)
    for other, word in ((LORA, "LoRA"), (SHIRA, "SHiRA")):
        best = min(timing.of(OURS)) / min(timing.of(other))
        report.result(f"training over {word}", f"{model} {name}", [1 / one for one in timing.ratios(other)], best)
        share = memory[OURS] / memory[other]
        report.result(f"training memory over {word}", f"{model} {name}", [share], share)
