"""Vision: scikit-learn's 1,797 handwritten digits, shown in other ways than the base has seen.

The bases, a perceptron and a vision transformer, learn upright digits. A task shows the same digits turned, slanted,
inverted, or with their pixels in another order, from near to far. Training data, validation and test are three sets of
digits for all tasks; the base has seen the training digits alone, upright.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.task import Task, cached

SIDE, CLASSES, PRETRAIN_BATCH = 8, 10, 32
TRAIN, VALIDATION = 1000, 300  # the other 497 are for the test
PRETRAIN_STEPS, PRETRAIN_LR = 1500, 1e-3


class Perceptron(nn.Module):
    """Two hidden layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIDE * SIDE, width), nn.Linear(width, width)
        self.third, self.head = nn.Linear(width, width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        for layer in (self.first, self.second, self.third):
            x = F.relu(layer(x))
        logits: Tensor = self.head(x)
        return logits


class Block(nn.Module):
    """One transformer layer, its projections plain linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_attention(x)
        q, k, v = (
            p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.down_proj(F.gelu(self.up_proj(self.norm_mlp(x))))
        return y


class VisionTransformer(nn.Module):
    """For images of 8 x 8: 16 patches of 2 x 2."""

    def __init__(self, width: int = 96, heads: int = 4, layers: int = 2, patch: int = 2) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch * patch, width)
        self.position = nn.Parameter(torch.randn((SIDE // patch) ** 2, width) * 0.1)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images.unsqueeze(1), self.patch, stride=self.patch).transpose(1, 2)
        x = self.embed(patches) + self.position
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


@functools.cache
def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Images in [0, 1] and labels of each split."""
    raw = load_digits()
    images, labels = torch.tensor(raw.images / 16, dtype=torch.float32), torch.tensor(raw.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order.split([TRAIN, VALIDATION, len(labels) - TRAIN - VALIDATION])
    return {
        name: (images[part], labels[part]) for name, part in zip(("train", "validation", "test"), parts, strict=True)
    }


def turned(images: Tensor, degrees: float) -> Tensor:
    """Bilinear interpolation; what comes from outside the image is blank."""
    angle = math.radians(degrees)
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    shape = [len(images), 1, SIDE, SIDE]
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), shape, align_corners=False)
    return F.grid_sample(images.unsqueeze(1), grid, align_corners=False).squeeze(1)


def permuted(images: Tensor) -> Tensor:
    """All pixels in another order, the same for every image."""
    order = torch.randperm(SIDE * SIDE, generator=torch.Generator().manual_seed(1))
    return images.flatten(1)[:, order].view_as(images)


# From near to far.
SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda images: images,
    "rotated-20": lambda images: turned(images, 20),
    "rotated-45": lambda images: turned(images, 45),
    "rotated-90": lambda images: images.rot90(1, (1, 2)),
    "inverted": lambda images: 1 - images,
    "permuted": permuted,
}


@functools.cache
def shown(shift: str, split: str) -> tuple[Tensor, Tensor]:
    images, labels = digits()[split]
    return SHIFTS[shift](images).contiguous(), labels


def batches_of(images: Tensor, labels: Tensor, size: int, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of epoch after epoch, each shuffled anew."""
    generator, made = torch.Generator().manual_seed(seed), 0
    while True:
        for part in torch.randperm(len(labels), generator=generator).split(size):
            if made == steps:
                return
            made += 1
            yield images[part], labels[part]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


@dataclass(frozen=True)
class Digits:
    """A way to show digits, for one of the bases."""

    family: str
    shift: str
    make: Callable[[], nn.Module]
    targets: str
    batch: int
    steps: int
    whole: str | None = None
    whole_lr: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.family}/{self.shift}"

    def base(self) -> nn.Module:
        def make() -> nn.Module:
            torch.manual_seed(0)
            return self.make()

        def pretrain(model: nn.Module) -> None:
            optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LR, weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PRETRAIN_LR, total_steps=PRETRAIN_STEPS)
            for batch in batches_of(*shown("upright", "train"), PRETRAIN_BATCH, 0, PRETRAIN_STEPS):
                optimizer.zero_grad()
                cross_entropy(model, batch).backward()
                optimizer.step()
                schedule.step()

        return cached(self.family, make, pretrain)

    def batches(self, seed: int, steps: int, fraction: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = shown(self.shift, "train")
        count = max(1, round(fraction * len(labels)))
        return batches_of(images[:count], labels[:count], self.batch, seed, steps)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model, batch)

    @torch.no_grad()
    def score(self, model: nn.Module, split: str = "test") -> float:
        images, labels = shown(self.shift, split)
        share: float = (model(images).argmax(1) == labels).double().mean().item()
        return share

    def inputs(self) -> list[Tensor]:
        return [shown(self.shift, "validation")[0]]


def tasks(family: str) -> list[Task]:
    """All but ``upright``, which the base has learned."""
    if family == "digits-vit":
        make: Callable[[], nn.Module] = VisionTransformer
        targets, batch, steps = "_proj$", 16, 200  # a step costs as much as four of the perceptron's
    else:
        width = int(family.removeprefix("digits-mlp").removeprefix("-") or 512)
        make, targets, batch, steps = functools.partial(Perceptron, width), "^(first|second|third)$", 32, 150
    return [Digits(family, shift, make, targets, batch, steps) for shift in SHIFTS if shift != "upright"]
