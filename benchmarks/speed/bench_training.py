"""A training step, forward + backward + optimizer: shira's tuner beside PEFT's LoRA, DoRA, SHiRA and Super-Tuning.

The paper's Table 7 has LoRA, DoRA and SHiRA. All train as many parameters, r * (m + n) per layer, on the same frozen
weights: four linear layers of 4096 x 4096, and a Llama of two layers, 2048 wide, with LoRA's usual targets. (DoRA also
trains a magnitude for each row, and Super-Tuning the same share of every weight.) shira steps with `shira.AdamW`,
PEFT with torch's fused AdamW. Steps are interleaved and not preceded by other data: a step moves more than any cache
holds. Memory is the largest resident size from before the model was made to the end of its third step.

The bound of all of them is the frozen model: its own forward pass, and its backward pass from the loss to the first
trained layer, without any trained parameters.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from benchmarks.speed import common, heap
from benchmarks.speed.common import BF16, FP32, Report, compare, settings

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
shira = pytest.importorskip("shira")
from benchmarks.speed import peers  # noqa: E402
from shira.integrations.peft import SparseConfig, accelerate  # noqa: E402

TOKENS = 128
TARGETS = {
    "linear": r"layers\.\d+",
    "llama": r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
}
LORA, DORA, SHIRA, SUPER = peers.LORA, peers.DORA, peers.SHIRA, peers.SUPER
OURS, FROZEN = "shira", "the frozen model"
# Measured in bench_peft.py.
FAST_SHIRA, FAST_SUPER = f"{SHIRA}, accelerated", f"{SUPER}, accelerated"
OVERLAY = "shira, overlay"
METHOD, METHOD_16 = "SparseConfig", "SparseConfig, granule 16"
WORDS = {LORA: "LoRA", DORA: "DoRA", SHIRA: "SHiRA", SUPER: "Super-Tuning"}


CONFIGS = {
    LORA: peft.LoraConfig,
    DORA: peft.LoraConfig,
    SHIRA: peft.ShiraConfig,
    SUPER: peft.SupertuningConfig,
    METHOD: SparseConfig,
    METHOD_16: SparseConfig,
}


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
        num_hidden_layers=2,
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
        if way in (OURS, OVERLAY):
            self.tuner = shira.SparseTuner(made, shira.masks.Rand(r=r), targets=targets, overlay=way == OVERLAY)
            self.optimizer = shira.AdamW(self.tuner, lr=1e-4)
        elif way == FROZEN:
            made.requires_grad_(False)
            first = next(one for name, one in made.named_modules() if re.fullmatch(targets, name))
            # So that the gradient has to reach the first trained layer.
            start = nn.Parameter(torch.zeros((), dtype=dtype))
            first.register_forward_hook(lambda module, args, output: output + start)
            first.register_parameter("start", start)
            self.optimizer = torch.optim.SGD([start], lr=0.0)
        else:
            options: dict[str, Any] = {"target_modules": targets}
            kind = {FAST_SHIRA: SHIRA, FAST_SUPER: SUPER}.get(way, way)
            if kind in (METHOD, METHOD_16):
                options |= {"r": r, "granule": 16 if kind == METHOD_16 else 1}
            elif kind == SUPER:
                linear = [one for name, one in made.named_modules() if re.fullmatch(targets, name)]
                trainable = r * sum(sum(one.weight.shape) for one in linear)
                options["sparsity"] = 1 - trainable / sum(one.weight.numel() for one in linear)
            else:
                options |= {"r": r, **{DORA: {"use_dora": True}, SHIRA: {"random_seed": 1}}.get(kind, {})}
            made = peft.get_peft_model(made, CONFIGS[kind](**options))
            if kind != way:
                accelerate(made)
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


def peak(way: str, model: str, dtype: torch.dtype) -> int:
    """Bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = heap.resident("VmRSS")
    trained = Trained(way, model, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is recorded anew
    for _ in range(3):
        trained.step()
    return heap.resident("VmHWM") - before


@functools.cache
def peak_alone(way: str, model: str, dtype: torch.dtype) -> int:
    """Measured in a process of its own: memory that another model has freed stays with the allocator and would not
    count again. It uses all threads: they take next to no memory, so one measurement serves every number of them.
    """
    if settings.quick:
        return peak(way, model, dtype)
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # each process starts with the imports done
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak, way, model, dtype).result()


def prove(ours: Trained, others: dict[str, Trained], plain: nn.Module) -> None:
    """The same number of parameters, the same first loss, and at our indices the gradient of a plain model."""
    count = sum(one.numel() for one in ours.parameters)
    for way, other in others.items():
        theirs = sum(one.numel() for one in other.parameters)
        assert theirs == count if way in (LORA, SHIRA) else abs(theirs / count - 1) < (0.6 if settings.quick else 0.05)
        tolerance = {"rtol": 2e-2, "atol": 1e-2} if way == DORA else {"rtol": None, "atol": None}
        torch.testing.assert_close(ours.loss(), other.loss(), **tolerance)
    ours.loss().backward()
    trained, ours.model = ours.model, plain
    ours.loss().backward()
    ours.model = trained
    name, module = next((name, one) for name, one in trained.named_modules() if hasattr(one, "weight_shira_values"))
    sampled, dense = module.weight_shira_values.grad, plain.get_parameter(f"{name}.weight").grad
    wanted = dense.view(-1)[module.weight_shira_indices.long()].float()
    scale = 2**-7 if dense.dtype == BF16 else 1e-4  # torch rounds the dense gradient to its dtype
    assert (sampled - wanted).abs().max() <= scale * wanted.abs().max()
    ours.optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [pytest.param(FP32, marks=pytest.mark.full), BF16], ids=common.dtype_name)
@pytest.mark.parametrize("model", [pytest.param("linear", marks=pytest.mark.full), "llama"])
def bench_training(benchmark: BenchmarkFixture, threads: int, model: str, dtype: torch.dtype) -> None:
    memory = {way: peak_alone(way, model, dtype) for way in (OURS, *WORDS)}
    trained = {way: Trained(way, model, dtype) for way in (OURS, *WORDS, FROZEN)}
    prove(trained[OURS], {way: trained[way] for way in WORDS}, base(model, dtype))
    others: dict[str, Callable[[], object]] = {way: trained[way].step for way in (*WORDS, FROZEN)}
    timing = compare(benchmark, (OURS, trained[OURS].step), others, cold=False, rounds=settings.few(3))
    name = common.dtype_name(dtype)
    report = Report(benchmark, threads, dtype=name, model=model, rank=rank(model), tokens=TOKENS, peak_bytes=memory)
    report.seconds(timing)
    for other, word in WORDS.items():
        best = min(timing.of(OURS)) / min(timing.of(other))
        report.result(f"training over {word}", f"{model} {name}", [1 / one for one in timing.ratios(other)], best)
        share = memory[OURS] / memory[other]
        report.result(f"training memory over {word}", f"{model} {name}", [share], share)
    report.ratio("training, bound", f"{model} {name}, of shira's", timing, FROZEN)
    report.ratio("training, bound", f"{model} {name}, of PEFT SHiRA's", timing, FROZEN, of=SHIRA)
