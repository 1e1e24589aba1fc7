"""A training step of a Llama in plain torch, random weights: SparseTuner and shira.AdamW beside LoRA.

LoRA is a plain one (a frozen linear layer and two factors, with as many parameters, stepped by torch's fused AdamW),
and where PEFT is installed also PEFT's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shira
from benchmarks.speed.gpu_lab import BF16, DENSITY, Bench, clear

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Sizes:
    """Llama-3.2-1B's, with a smaller vocabulary: the loss is not what is compared."""

    def __init__(self, quick: bool) -> None:
        self.wide, self.inner, self.layers, self.heads, self.groups, self.words, self.tokens = (
            (64, 128, 1, 4, 2, 64, 32) if quick else (2048, 8192, 16, 32, 8, 32000, 4096)
        )


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        wide, head = sizes.wide, sizes.wide // sizes.heads
        self.heads, self.groups, self.head = sizes.heads, sizes.groups, head
        shapes = [(wide, wide), (wide, sizes.groups * head), (wide, sizes.groups * head), (wide, wide)]
        shapes += [(wide, sizes.inner), (wide, sizes.inner), (sizes.inner, wide)]
        for name, (n, m) in zip(PROJECTIONS, shapes, strict=True):
            self.add_module(name, nn.Linear(n, m, bias=False))
        self.attention_norm, self.mlp_norm = nn.RMSNorm(wide), nn.RMSNorm(wide)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        def heads(one: Tensor, count: int) -> Tensor:
            return one.view(*one.shape[:2], count, self.head).transpose(1, 2)

        def turned(one: Tensor) -> Tensor:
            a, b = one.chunk(2, -1)
            return one * turn[0] + torch.cat([-b, a], -1) * turn[1]

        y = self.attention_norm(x)
        q, k = turned(heads(self.q_proj(y), self.heads)), turned(heads(self.k_proj(y), self.groups))
        v = heads(self.v_proj(y), self.groups)
        k, v = (one.repeat_interleave(self.heads // self.groups, 1) for one in (k, v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(seen.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.words, sizes.wide)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm, self.head = nn.RMSNorm(sizes.wide), nn.Linear(sizes.wide, sizes.words, bias=False)
        half = sizes.wide // sizes.heads // 2
        angles = torch.arange(sizes.tokens)[:, None] * 5e5 ** (-torch.arange(half) / half)
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, -1))
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, -1))

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        for block in self.blocks:
            x = block(x, (self.cos, self.sin))
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float()[:-1], words.view(-1)[1:])


class PlainLora(nn.Module):
    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        n, m = base.in_features, base.out_features
        self.a = nn.Parameter(torch.randn(rank, n, dtype=base.weight.dtype, device=base.weight.device) * 0.01)
        self.b = nn.Parameter(torch.zeros(m, rank, dtype=base.weight.dtype, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


def rank_of(layer: nn.Linear) -> int:
    m, n = layer.weight.shape
    return max(1, int(DENSITY * m * n / (m + n)))


def with_shira(model: nn.Module) -> torch.optim.Optimizer:
    tuner = shira.SparseTuner(model, shira.masks.Rand(density=DENSITY), targets=list(PROJECTIONS))
    return shira.AdamW(tuner, lr=1e-4)


def with_plain_lora(model: nn.Module) -> torch.optim.Optimizer:
    model.requires_grad_(False)
    for block in model.blocks:  # type: ignore[union-attr]
        for name in PROJECTIONS:
            layer = getattr(block, name)
            setattr(block, name, PlainLora(layer, rank_of(layer)))
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)


def with_peft(model: nn.Module) -> torch.optim.Optimizer:
    import peft

    ranks = {name: rank_of(layer) for name, layer in model.named_modules() if name.endswith(PROJECTIONS)}
    config = peft.LoraConfig(target_modules=list(PROJECTIONS), rank_pattern=ranks, r=1)
    peft.inject_adapter_in_model(config, model)
    model.to(BF16)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)


@torch.enable_grad()
def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, words: Tensor) -> Tensor:
    loss = model(words)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@torch.enable_grad()
def prove(model: nn.Module, words: Tensor) -> None:
    """The values' gradient is the dense one at the mask, in a layer that the whole backward pass goes through."""
    layer = model.blocks[0].q_proj
    met: dict[str, Tensor] = {}

    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        met["input"] = args[0].detach()
        output.register_hook(lambda grad: met.update(grad_output=grad))

    handle = layer.register_forward_hook(watch)
    model(words).backward()
    handle.remove()
    dense = met["grad_output"].flatten(0, -2).T.float() @ met["input"].flatten(0, -2).float()
    wanted = dense.reshape(-1)[layer.weight_shira_indices.long()]
    if not (layer.weight_shira_values.grad - wanted).abs().max() <= 2**-7 * wanted.abs().max():
        raise AssertionError("the values' gradient is not the dense one at the mask")


def one_way(
    bench: Bench,
    sizes: Sizes,
    way: str,
    attach: Callable[[nn.Module], torch.optim.Optimizer],
    facts: dict[str, Any],
) -> tuple[dict[str, float], float]:
    """The times of a step, and the first loss."""
    torch.manual_seed(0)
    with torch.device(bench.device), torch.enable_grad():
        model = Llama(sizes).to(BF16)
        words = torch.randint(sizes.words, (1, sizes.tokens))
        optimizer = attach(model)

    step = functools.partial(one_step, model, optimizer, words)
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    first_loss = float(step())
    if not any(not torch.equal(p, old) for p, old in zip(trained, before, strict=True)):
        raise AssertionError(f"{way}: a step changed nothing")
    seconds = bench.time({way: step}, 2 if bench.quick else 7)[way]
    facts["trained"][way] = sum(map(torch.numel, trained))
    facts["peak bytes"][way] = torch.cuda.max_memory_allocated() if bench.cuda else None
    facts["steps/s"][way] = 1 / seconds["median"]
    if way == "shira":
        prove(model, words)
    return seconds, first_loss


def measure(bench: Bench) -> tuple[str, dict[str, dict[str, float]], dict[str, Any]]:
    """Each way has a model of its own, one after the other, so that each has its own peak."""
    sizes = Sizes(bench.quick)
    ways: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {"shira": with_shira, "plain LoRA": with_plain_lora}
    if find_spec("peft"):
        ways["PEFT LoRA"] = with_peft
    seconds: dict[str, dict[str, float]] = {}
    facts: dict[str, Any] = {"tokens": sizes.tokens, "trained": {}, "peak bytes": {}, "steps/s": {}}
    first_losses = {}
    for way, attach in ways.items():
        try:
            seconds[way], first_losses[way] = one_way(bench, sizes, way, attach, facts)
        except Exception as error:
            if way != "PEFT LoRA":  # any version of it may be installed
                raise
            facts["left out"] = f"{way}: {type(error).__name__}: {error}"
        clear()
    if max(first_losses.values()) - min(first_losses.values()) > 0.05:
        raise AssertionError(f"the first losses differ: {first_losses}")
    facts["times as long"] = {
        f"{way} / shira": took["median"] / seconds["shira"]["median"] for way, took in seconds.items() if way != "shira"
    }
    return "equal first losses; the dense gradient at the mask", seconds, facts
