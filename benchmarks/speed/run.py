"""A real training run: a small transformer learns to write Python from the standard library's own files.

The model's weights are bfloat16, as servers have them; AdamW steps on float32 masters, and what changes in the weights
after a step is what an update sends.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.speed.common import BF16, settings

LENGTH, BATCH = 128, 4


@dataclass(frozen=True)
class Run:
    """How long and how fast is learned: at first from nothing, and then with a small rate, as one tunes."""

    rate: float
    width: int = 1024
    layers: int = 2
    before: int = 40
    steps: int = 100
    first_rate: float = 1e-3


def run(rate: float) -> Run:
    return Run(rate, width=32, layers=1, before=2, steps=3) if settings.quick else Run(rate)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        here = self.attention_norm(x)
        heads = [one(here).unflatten(-1, (-1, 32)).transpose(1, 2) for one in (self.q, self.k, self.v)]
        seen = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))


class Writer(nn.Module):
    """Byte after byte."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList([Block(width) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.places(torch.arange(text.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def text() -> Tensor:
    """The files of the standard library, one after the other."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def training(of: Run) -> Iterator[Writer]:
    """The model, once when it has learned at first, and then after every step."""
    torch.manual_seed(0)
    model, data = Writer(of.width, of.layers).to(BF16), text()
    masters = [parameter.detach().float() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=of.first_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for step in range(of.before + of.steps):
        if step == of.before:
            optimizer.param_groups[0]["lr"] = of.rate
        starts = torch.randint(len(data) - LENGTH - 1, (BATCH, 1), generator=generator)
        batch = data[starts + torch.arange(LENGTH + 1)].long()
        loss = functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
        if step >= of.before - 1:
            yield model
