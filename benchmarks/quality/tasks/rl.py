"""Reinforcement learning with answers that can be verified: the GPT of `gpt.py` learns from rewards alone.

The model is shown an expression and says the digit that it equals. A right answer is rewarded with 1, any other byte
with 0; no right answer is ever shown. `Verified.loss` is the policy gradient (REINFORCE): every prompt is answered
`SAMPLES` times, and the advantage of an answer is its reward minus the mean of its prompt's (as in GRPO, without the
division by the spread). So the same methods are trained by the same loop as everywhere else.

The score is the expected reward on prompts that were not trained on: the probability of the right answer.
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
PROMPTS, SAMPLES = 32, 8  # in a batch; answers to each

Row = tuple[str, str]
"""A prompt and its right answer, a digit; in a task all prompts have the same length."""


def last(numbers: tuple[int, ...]) -> Row:
    return "[{}, {}, {}][-1] == ".format(*numbers), str(numbers[-1])


KINDS: dict[str, Callable[[tuple[int, ...]], Row]] = {"last": last}

Batch = tuple[Tensor, Tensor, int]
"""Prompts, the byte that is right after each, and the seed of the samples."""


@functools.cache
def data(kind: str, split: str) -> tuple[Tensor, Tensor]:
    """Prompts of the same three digits, in whatever order, are in one split."""
    documents: dict[str, list[Row]] = {}
    for numbers in itertools.permutations(range(10), 3):
        documents.setdefault("".join(map(str, sorted(numbers))), []).append(KINDS[kind](numbers))
    rows = sorted(corpus.divided(documents)[split], key=lambda row: corpus.digest(row[0]))
    prompts, answers = (torch.stack([gpt.as_bytes(row[at]).long() for row in rows]) for at in (0, 1))
    return prompts, answers[:, 0]


def policy(model: nn.Module, prompts: Tensor) -> Tensor:
    """The logarithms of the probabilities of the next byte."""
    logits: Tensor = model(input_ids=prompts, use_cache=False).logits
    return logits[:, -1].float().log_softmax(1)


@dataclass(frozen=True)
class Verified:
    """One kind of expression."""

    family: str
    kind: str
    targets: str = r"(q|k|v|o|gate|up|down)_proj$"
    whole: str | None = None
    whole_lr: float = 0.0
    steps: int = 300

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
        prompts, answers, seed = batch
        likely = policy(model, prompts)
        draw = torch.Generator().manual_seed(seed)
        said = torch.multinomial(likely.detach().exp(), SAMPLES, replacement=True, generator=draw)
        rewards = (said == answers[:, None]).float()
        advantages = rewards - rewards.mean(1, keepdim=True)
        return -(advantages * likely.gather(1, said)).mean()

    @torch.no_grad()
    def score(self, model: nn.Module, split: str = "test") -> float:
        prompts, answers = data(self.kind, split)
        return policy(model, prompts).double().exp().gather(1, answers[:, None]).mean().item()

    def inputs(self) -> list[dict[str, Any]]:
        return [{"input_ids": data(self.kind, "validation")[0][:32], "use_cache": False}]


def tasks(family: str) -> list[Task]:
    return [Verified(family, kind) for kind in KINDS]
