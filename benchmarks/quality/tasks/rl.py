"""Reinforcement learning with answers that can be verified: the GPT of `gpt.py` learns from rewards alone.

The model is shown an expression and says, byte by byte, what it equals. A right answer is rewarded with 1, any other
with 0; no right answer is ever shown. `Verified.loss` is the policy gradient (REINFORCE): every prompt is answered
`SAMPLES` times, and the advantage of an answer is its reward minus the mean of its prompt's (as in GRPO, without the
division by the spread). So the same methods are trained by the same loop as everywhere else.

The score is the expected reward on prompts that were not trained on, the probability of the right answer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.task import Task
from benchmarks.quality.tasks import corpus, gpt

BASE = "gpt-m"
PROMPTS, SAMPLES = 16, 8  # in a batch; answers to each

Row = tuple[str, str]
"""A prompt and its right answer; in a task all have the same length."""


def largest() -> Iterator[Row]:
    for numbers in itertools.permutations(range(10), 3):
        yield "max({}, {}, {}) == ".format(*numbers), str(max(numbers))


def ordered() -> Iterator[Row]:
    for numbers in itertools.permutations(range(10), 2):
        for name in "abcdefgh":
            yield "{} = sorted([{}, {}]) == [".format(name, *numbers), "{}, {}]".format(*sorted(numbers))


KINDS: dict[str, Callable[[], Iterator[Row]]] = {"largest": largest, "ordered": ordered}

Batch = tuple[Tensor, Tensor, int]
"""Prompts, their right answers (bytes), and the seed of the samples."""


def encoded(rows: list[Row]) -> tuple[Tensor, Tensor]:
    prompts, answers = (torch.stack([gpt.as_bytes(row[at]).long() for row in rows]) for at in (0, 1))
    return prompts, answers


@functools.cache
def data(kind: str, split: str) -> tuple[Tensor, Tensor]:
    """Rows that ask the same thing of the same numbers, in whatever order, are in one split."""
    documents: dict[str, list[Row]] = {}
    for prompt, answer in KINDS[kind]():
        documents.setdefault("".join(sorted(filter(str.isdigit, prompt))), []).append((prompt, answer))
    return encoded(sorted(corpus.divided(documents)[split], key=lambda row: corpus.digest(row[0])))


def logits(model: nn.Module, texts: Tensor, given: int) -> Tensor:
    """The logits of every byte after the first ``given`` ones."""
    found: Tensor = model(input_ids=texts[:, :-1], use_cache=False).logits
    return found[:, given - 1 :].float()


@torch.no_grad()
def sampled(model: nn.Module, prompts: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The prompts, each with ``count`` bytes that the model says."""
    texts = prompts
    for _ in range(count):
        last = model(input_ids=texts, use_cache=False).logits[:, -1].float()
        texts = torch.cat([texts, torch.multinomial(last.softmax(1), 1, generator=generator)], 1)
    return texts


@dataclass(frozen=True)
class Verified:
    """One kind of expression."""

    family: str
    kind: str
    targets: str = r"(q|k|v|o|gate|up|down)_proj$"
    whole: str | None = None
    whole_lr: float = 0.0
    steps: int = 150

    @property
    def name(self) -> str:
        return f"{self.family}/{self.kind}"

    def base(self) -> nn.Module:
        return gpt.Text(BASE, "documentation").base()

    def batches(self, seed: int, steps: int, fraction: float = 1.0) -> Iterator[Batch]:
        prompts, answers = data(self.kind, "train")
        count = max(1, round(fraction * len(prompts)))
        draw = torch.Generator().manual_seed(seed)
        for step in range(steps):
            at = torch.randint(count, (PROMPTS,), generator=draw)
            yield prompts[at], answers[at], (seed << 20) + step

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        prompts, answers = (part.repeat_interleave(SAMPLES, 0) for part in batch[:2])
        generator = torch.Generator().manual_seed(batch[2])
        texts = sampled(model, prompts, answers.shape[1], generator)
        said = texts[:, prompts.shape[1] :]
        rewards = (said == answers).all(1).float().view(-1, SAMPLES)
        advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
        chosen = logits(model, texts, prompts.shape[1]).log_softmax(2).gather(2, said[:, :, None]).sum((1, 2))
        return -(advantages * chosen).mean()

    @torch.no_grad()
    def score(self, model: nn.Module, split: str = "test") -> float:
        prompts, answers = data(self.kind, split)
        found = logits(model, torch.cat([prompts, answers], 1), prompts.shape[1]).double().log_softmax(2)
        return found.gather(2, answers[:, :, None]).sum((1, 2)).exp().mean().item()

    def inputs(self) -> list[dict[str, Any]]:
        return [{"input_ids": data(self.kind, "validation")[0][:32], "use_cache": False}]


def tasks(family: str) -> list[Task]:
    return [Verified(family, kind) for kind in KINDS]
