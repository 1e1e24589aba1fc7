"""Language, from scratch: a small GPT over bytes learns the standard library's Python, then other kinds of text.

Three widths show the trend with the size of the model: ``gpt-s``, ``gpt-m``, ``gpt-l``. The score is minus the mean
loss in nats per byte; ``exp`` of its negative is the perplexity per byte.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.task import CACHE, Task, cached
from benchmarks.quality.tasks import corpus

WIDTHS = {"gpt-s": 64, "gpt-m": 128, "gpt-l": 256}
LAYERS, HEADS, WINDOW, BATCH = 2, 4, 64, 16
PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_LR, SAVED_EVERY = 1600, 32, 3e-3, 200
HELD_OUT = {"test": 256, "validation": 128}  # windows


def paragraphs(text: str) -> list[str]:
    """The parts between blank lines, each with the blank line that ends it."""
    return [part + "\n\n" for part in text.split("\n\n") if part.strip()]


def documents(kind: str) -> dict[str, list[str]]:
    """The documents of a kind of text, in pieces. No piece is in two splits, although topics quote each other."""
    if kind == "documentation":
        return {name: paragraphs(text) for name, text in corpus.documentation().items()}
    if kind == "headers":
        return {name: paragraphs(text) for name, text in corpus.headers().items()}
    if kind != "characters":
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    blocks: dict[str, list[str]] = {}
    for code, name, category in corpus.characters():
        blocks.setdefault(f"{code >> 6:x}", []).append(f"{code:04X};{name};{category}\n")
    return blocks


# From near to far.
KINDS = ("headers", "documentation", "characters")


@functools.cache
def texts(kind: str) -> dict[str, str]:
    """The text of each split."""
    return {split: "".join(pieces) for split, pieces in corpus.divided(documents(kind)).items()}


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


@functools.cache
def data(kind: str, split: str) -> Tensor:
    return as_bytes(texts(kind)[split])


@functools.cache
def source() -> Tensor:
    """What the base is trained on."""
    return as_bytes("\n".join(corpus.library().values()))


def windows(text: Tensor, starts: Tensor) -> Tensor:
    return text[starts[:, None] + torch.arange(WINDOW + 1)].long()


def held_out(kind: str, split: str) -> Tensor:
    """Evenly spaced windows, from the beginning to the end."""
    text, count = data(kind, split), HELD_OUT[split]
    return windows(text, torch.linspace(0, len(text) - WINDOW - 2, count, dtype=torch.float64).long())


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def make(width: int) -> nn.Module:
    """The model: a Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=WINDOW, tie_word_embeddings=True, initializer_range=0.05,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def pretrain(model: nn.Module, name: str, steps: int) -> None:
    """Trains with AdamW, the rate following a cosine; goes on where it was interrupted, with the same bits."""
    text, saved = source(), CACHE / f"{name}.part"
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LR, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PRETRAIN_LR, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    first = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        first = state["step"]
        for part, kept in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(state[kept])
    model.train()
    for step in range(first, steps):
        if step > first and step % SAVED_EVERY == 0:
            CACHE.mkdir(parents=True, exist_ok=True)
            state = {"step": step, "model": model.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save(state, beside := saved.with_name(f"{saved.name}.{os.getpid()}"))
            beside.replace(saved)
        draw = torch.Generator().manual_seed(step)
        loss = loss_of(model, windows(text, torch.randint(len(text) - WINDOW - 1, (PRETRAIN_BATCH,), generator=draw)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{name}: step {step} of {steps}, {loss.item():.3f} nats a byte", flush=True)
    saved.unlink(missing_ok=True)


@dataclass(frozen=True)
class Text:
    """A kind of text, for a base of some width."""

    family: str
    kind: str
    targets: str = r"(q|k|v|o|gate|up|down)_proj$"
    whole: str | None = None
    whole_lr: float = 0.0
    steps: int = 100

    @property
    def name(self) -> str:
        return f"{self.family}/{self.kind}"

    def provenance(self) -> dict[str, str]:
        """The origin of the task's data and of what the base was trained on."""
        return corpus.provenance([*texts(self.kind).values(), *corpus.library().values()])

    def base(self) -> nn.Module:
        name = f"{self.family}-{corpus.provenance(corpus.library().values())['sha256'][:8]}"
        return cached(name, lambda: make(WIDTHS[self.family]), lambda model: pretrain(model, name, PRETRAIN_STEPS))

    def batches(self, seed: int, steps: int, fraction: float = 1.0) -> Iterator[Tensor]:
        text = data(self.kind, "train")
        count = max(WINDOW + 2, round(fraction * len(text)))
        draw = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield windows(text, torch.randint(count - WINDOW - 1, (BATCH,), generator=draw))

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return loss_of(model, batch)

    @torch.no_grad()
    def score(self, model: nn.Module, split: str = "test") -> float:
        losses = [loss_of(model, part).double() * len(part) for part in held_out(self.kind, split).split(64)]
        return -(sum(losses) / HELD_OUT[split]).item()  # type: ignore[union-attr]

    def inputs(self) -> list[dict[str, Any]]:
        return [{"input_ids": held_out(self.kind, "validation")[:32, :-1], "use_cache": False}]


def tasks(family: str) -> list[Task]:
    return [Text(family, kind) for kind in KINDS]
