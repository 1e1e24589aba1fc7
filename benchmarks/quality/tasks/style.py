"""Styles for a small diffusion transformer that draws digits: what the paper does with Stable Diffusion, at a size that
one core trains.

The base is `diffusers.DiTTransformer2DModel`, trained here by flow matching on pictures that come with packages:
scikit-learn's handwritten digits, in dark ink on light paper, and pieces of scikit-image's photographs. A class is a
concept: ten digits, and one for each photograph. A style is a rule that renders digits in another way; an adapter
learns it from a few rendered pictures of the digits 0 to 5, and is asked for all ten.

What it draws is scored by a judge, a small convolutional network trained on real digits in every style: does a picture
show the digit that was asked for, and does it have the style? The judge also knows pictures that show no digit.
"""

from __future__ import annotations

import colorsys
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality import task as task_module
from benchmarks.quality.task import Task, cached
from benchmarks.quality.tasks.digits import digits

SIDE, DIGITS = 24, 10
PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "cat", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
    "immunohistochemistry", "moon", "rocket",
)  # fmt: skip
CLASSES = DIGITS + len(PHOTOGRAPHS)

WIDTH, HEADS, LAYERS, PATCH = 192, 6, 4, 4
NO_CLASS = CLASSES
"""What the model is told instead of a class in a tenth of training, so that drawing can be guided."""
PRETRAIN_STEPS, PRETRAIN_LR, PRETRAIN_BATCH, PRETRAIN_DIGITS = 1500, 1e-3, 32, 26
DECLINE = 3000  # steps over which the rate would fall to 0; the average of the weights needs no more of it
KEPT_EVERY = 250  # steps of pretraining between two checkpoints
SHIFT = 3.0
"""More of the noisy times, in training and in drawing: the digits are three times as large as their detail, so it takes
more noise to hide them."""
EULER_STEPS, GUIDANCE = 4, 2.0

JUDGE_STEPS, JUDGE_LR, JUDGE_BATCH = 800, 2e-3, 64

TAUGHT = range(6)
"""The digits that a style's training pictures show."""
EXAMPLES = 20  # of each of them
DRAWN = {"validation": 50, "test": 100}
"""How many pictures are drawn for a score, as many of each digit."""
SEEDS = {"validation": 11, "test": 12}

# ---- pictures ------------------------------------------------------------------------------------------------
# Channels first, in [0, 1]; the model works in [-1, 1].


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


@functools.cache
def photograph(name: str) -> Tensor:
    """``[3, height, width]``, its shorter side 96."""
    from skimage import data

    raw = torch.from_numpy(getattr(data, name)()).float() / 255
    picture = raw.permute(2, 0, 1)[:3] if raw.dim() == 3 else raw.expand(3, *raw.shape)
    height, width = picture.shape[1:]
    scale = 96 / min(height, width)
    shape = (round(height * scale), round(width * scale))
    return F.interpolate(picture[None], shape, mode="area")[0].contiguous()


def pieces(pictures: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """A piece of each, of any place; half of them mirrored."""
    found = []
    for picture in pictures:
        top, left = (int(torch.randint(size - SIDE + 1, (), generator=generator)) for size in picture.shape[1:])
        piece = picture[:, top : top + SIDE, left : left + SIDE]
        found.append(piece.flip(-1) if float(torch.rand((), generator=generator)) < 0.5 else piece)
    return torch.stack(found)


def strokes(images: Tensor, generator: torch.Generator) -> Tensor:
    """Digits of 8 x 8 as shares of ink, ``[count, 1, SIDE, SIDE]``: turned, moved and scaled by a little."""
    count = len(images)
    angle, scale = uniform(generator, -0.12, 0.12, count), uniform(generator, 1.05, 1.25, count)
    move = uniform(generator, -0.1, 0.1, count, 2)
    rows = torch.stack([angle.cos() * scale, -angle.sin() * scale, move[:, 0]], 1)
    columns = torch.stack([angle.sin() * scale, angle.cos() * scale, move[:, 1]], 1)
    large = F.interpolate(images[:, None], (SIDE, SIDE), mode="bicubic", align_corners=False)
    grid = F.affine_grid(torch.stack([rows, columns], 1), [count, 1, SIDE, SIDE], align_corners=False)
    return torch.sigmoid(12 * (F.grid_sample(large, grid, align_corners=False) - 0.45))


def blurred(images: Tensor, width: float) -> Tensor:
    at = torch.arange(-4, 5, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (at / width) ** 2)
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    rows = F.conv2d(images, kernel.view(1, 1, 9, 1).repeat(channels, 1, 1, 1), padding=(4, 0), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, 1, 9).repeat(channels, 1, 1, 1), padding=(0, 4), groups=channels)


BLUEFIRE, BRICK = "bluefire", "brick"
STYLES = (BLUEFIRE, BRICK)


def rendered(images: Tensor, styles: Sequence[str], generator: torch.Generator) -> Tensor:
    """Digits of 8 x 8 in all of these styles at once; in none of them it is dark ink on light paper.

    ``brick``: the paper is a wall, a piece of scikit-image's photograph of bricks, in red. ``bluefire``: it is dusk,
    and the ink burns with blue flames that rise from it.
    """
    ink, count = strokes(images, generator), len(images)
    hues = uniform(generator, 0, 1, count, 3).tolist()
    dark = [colorsys.hsv_to_rgb(hue, 0.9 * saturation, 0.05 + 0.25 * value) for hue, saturation, value in hues]
    light = uniform(generator, 0.82, 0.98, count, 1) + uniform(generator, -0.02, 0.02, count, 3)
    paper = light[:, :, None, None].expand(count, 3, SIDE, SIDE)
    if BRICK in styles:
        wall = pieces([photograph("brick").transpose(1, 2)] * count, generator)[:, :1]
        shade = ((wall - 0.25) / 0.35).clamp(0, 1)
        low, high = (torch.tensor(color).view(3, 1, 1) for color in ([0.62, 0.26, 0.18], [1.0, 0.80, 0.66]))
        paper = (1 - shade) * low + shade * high
    if BLUEFIRE not in styles:
        return (1 - ink) * paper + ink * torch.tensor(dark)[:, :, None, None]
    flame = ink
    for rise in range(1, 6):  # each pixel of ink burns upwards, some higher than others
        height = blurred(uniform(generator, 0, 1.6, count, 1, SIDE, SIDE), 1.0)
        up = F.pad(ink, (0, 0, 0, rise))[:, :, rise:]
        flame = torch.maximum(flame, up * (height - 0.12 * rise).clamp(0, 1))
    flame, core = blurred(flame, 0.7).clamp(0, 1), blurred(ink, 0.7)
    dusk = paper * torch.tensor([0.75, 0.80, 0.97]).view(3, 1, 1)
    outer, inner = (torch.tensor(color).view(3, 1, 1) for color in ([0.40, 0.72, 1.0], [0.0, 0.10, 0.80]))
    heat = (core**1.5).clamp(0, 1)
    share = (1.3 * flame).clamp(0, 1)
    return ((1 - share) * dusk + share * ((1 - heat) * outer + heat * inner)).clamp(0, 1)


def of_class(split: str, digit: int, count: int) -> Tensor:
    """``count`` images of 8 x 8 of one digit, the first ones of a split again and again."""
    images, labels = digits()[split]
    return images[labels == digit][torch.arange(count) % int((labels == digit).sum())]


# ---- the model -----------------------------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Pictures in [-1, 1], their classes (or `NO_CLASS`), noise of the same shape, times in (0, 1): at 1 all is noise."""


def noised(pictures: Tensor, classes: Tensor, generator: torch.Generator) -> Batch:
    noise = torch.randn(pictures.shape, generator=generator)
    times = torch.sigmoid(torch.randn(len(pictures), generator=generator))
    told = torch.where(torch.rand(len(pictures), generator=generator) < 0.1, NO_CLASS, classes)
    return 2 * pictures - 1, told, noise, SHIFT * times / (1 + (SHIFT - 1) * times)


def flow_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Flow matching: from a mixture of picture and noise, the way from the one to the other."""
    pictures, classes, noise, times = batch
    share = times[:, None, None, None]
    mixed = (1 - share) * pictures + share * noise
    found = model(mixed, timestep=1000 * times, class_labels=classes).sample
    return F.mse_loss(found, noise - pictures)


@torch.no_grad()
def draw(model: nn.Module, classes: Tensor, seed: int) -> Tensor:
    """Pictures of these classes, in [0, 1], with classifier-free guidance: the same noise for the same seed."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(EULER_STEPS)
    pictures = torch.randn(len(classes), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([classes, torch.full_like(classes, NO_CLASS)])
    for time in scheduler.timesteps:
        flows = model(pictures.repeat(2, 1, 1, 1), timestep=time.expand(len(both)), class_labels=both).sample
        told, untold = flows.chunk(2)
        pictures = scheduler.step(untold + GUIDANCE * (told - untold), time, pictures).prev_sample
    return ((pictures + 1) / 2).clamp(0, 1)


def untrained() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model: nn.Module = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=3, out_channels=3, num_layers=LAYERS,
        sample_size=SIDE, patch_size=PATCH, num_embeds_ada_norm=CLASSES, norm_num_groups=1,
    )  # fmt: skip
    return model.eval()  # no classes are dropped


def pretraining(seed: int) -> Batch:
    """One batch of digits and photographs."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = digits()["train"]
    some = torch.randint(len(labels), (PRETRAIN_DIGITS,), generator=generator)
    kinds = torch.randint(len(PHOTOGRAPHS), (PRETRAIN_BATCH - PRETRAIN_DIGITS,), generator=generator)
    photographs = pieces([photograph(PHOTOGRAPHS[kind]) for kind in kinds.tolist()], generator)
    pictures = torch.cat([rendered(images[some], (), generator), photographs])
    return noised(pictures, torch.cat([labels[some], DIGITS + kinds]), generator)


@torch.enable_grad()
def pretrain(model: nn.Module) -> None:
    """Leaves the model with the moving average of its weights. Goes on from where it was stopped."""
    average = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LR, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PRETRAIN_LR, total_steps=DECLINE, pct_start=0.05, cycle_momentum=False
    )
    path, start = task_module.CACHE / "style.partial.pt", 0
    if path.exists():
        kept = torch.load(path, weights_only=True)
        for part, name in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(kept[name])
        average, start = kept["average"], kept["step"]
    for step in range(start, PRETRAIN_STEPS):
        optimizer.zero_grad()
        loss = flow_loss(model, pretraining(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        share = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, weight in model.state_dict().items():
                if weight.is_floating_point():
                    average[name].lerp_(weight, 1 - share)
        if (step + 1) % KEPT_EVERY == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f"{path.name}.{os.getpid()}")
            states = {"model": model, "optimizer": optimizer, "schedule": schedule}
            kept = {name: part.state_dict() for name, part in states.items()}
            torch.save({**kept, "average": average, "step": step + 1}, beside)
            beside.replace(path)
    model.load_state_dict(average)
    path.unlink(missing_ok=True)


def base() -> nn.Module:
    return cached("style", untrained, pretrain)


# ---- the judge -----------------------------------------------------------------------------------------------

NOTHING = DIGITS
"""The judge's class of pictures that show no digit."""


class Judge(nn.Module):
    """What a picture shows: features, logits of the digits and of no digit, logits of each style by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.GELU(), nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(64 * (SIDE // 4) ** 2, 128), nn.GELU(),
        )  # fmt: skip
        self.digit, self.style = nn.Linear(128, DIGITS + 1), nn.Linear(128, len(STYLES))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.body(2 * pictures - 1)
        return features, self.digit(features), self.style(features)


COMBINATIONS: tuple[tuple[str, ...], ...] = ((), (BLUEFIRE,), (BRICK,), STYLES)


def spoiled(images: Tensor, labels: Tensor, styles: Sequence[str], generator: torch.Generator) -> Tensor:
    """Pictures that show no digit, or no single one: two digits in one, pieces in another order, photographs."""
    half = len(images) // 2
    others = images.roll(1, 0)
    both = torch.where((labels == labels.roll(1, 0))[:, None, None], images.flip(1), torch.maximum(images, others))
    two = rendered(both[:half], styles, generator)
    size, across = SIDE // 3, 3
    parts = rendered(images[half:], styles, generator).unfold(2, size, size).unfold(3, size, size).flatten(2, 3)
    parts = parts[:, :, torch.randperm(across**2, generator=generator)].unflatten(2, (across, across))
    mixed = parts.permute(0, 1, 2, 4, 3, 5).reshape(len(images) - half, 3, SIDE, SIDE)
    names = torch.randint(len(PHOTOGRAPHS), (half,), generator=generator).tolist()
    return torch.cat([two, mixed, pieces([photograph(PHOTOGRAPHS[name]) for name in names], generator)])


def lessons(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures for the judge, their digits (or `NOTHING`), and which styles they have; some blurred, some noisy."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = (torch.cat(both) for both in zip(digits()["train"], digits()["validation"], strict=True))
    pictures, shown, having = [], [], []
    each = JUDGE_BATCH // len(COMBINATIONS)
    for styles in COMBINATIONS:
        some = torch.randint(len(labels), (each,), generator=generator)
        good, bad = some[: each - 4], some[each - 4 :]
        nothing = spoiled(images[bad], labels[bad], styles, generator)
        pictures += [rendered(images[good], styles, generator), nothing]
        shown += [labels[good], torch.full((len(nothing),), NOTHING)]
        having += [torch.tensor([float(style in styles) for style in STYLES]).expand(len(good) + len(nothing), -1)]
    every = torch.cat(pictures)
    count = len(every)
    soft = blurred(every, 0.6)
    every = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.3, soft, every)
    every = every + uniform(generator, 0, 0.06, count, 1, 1, 1) * torch.randn(every.shape, generator=generator)
    return every.clamp(0, 1), torch.cat(shown), torch.cat(having)


@torch.enable_grad()  # it may be needed first where gradients are not
def taught_judge(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=JUDGE_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, JUDGE_LR, total_steps=JUDGE_STEPS)
    for step in range(JUDGE_STEPS):
        pictures, shown, having = lessons(step)
        _, digit, style = model(pictures)
        known = (shown != NOTHING)[:, None].float()
        styled = F.binary_cross_entropy_with_logits(style, having, weight=known)
        optimizer.zero_grad()
        (F.cross_entropy(digit, shown) + styled).backward()
        optimizer.step()
        schedule.step()


def judge() -> nn.Module:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Judge()

    return cached("style-judge", make, taught_judge)


def asked(count: int) -> Tensor:
    """The digits that are asked for: every one equally often."""
    return torch.arange(count) % DIGITS


def real(styles: Sequence[str], split: str, count: int) -> Tensor:
    """Real digits in these styles, in the order of `asked`."""
    generator = torch.Generator().manual_seed(SEEDS[split])
    each = {digit: of_class(split, digit, count) for digit in range(DIGITS)}
    images = torch.stack([each[digit][number // DIGITS] for number, digit in enumerate(asked(count).tolist())])
    return rendered(images, styles, generator)


def energy_distance(one: Tensor, other: Tensor) -> float:
    """Of two sets of features: 0 only where they are the same set."""

    def apart(a: Tensor, b: Tensor) -> float:
        return float(torch.cdist(a.double(), b.double()).mean())

    return 2 * apart(one, other) - apart(one, one) - apart(other, other)


@functools.cache
@torch.no_grad()
def references(styles: tuple[str, ...], split: str, count: int) -> tuple[Tensor, float]:
    """The features of real pictures in these styles, and how far from them those of real pictures in no style are."""
    features, plain = (judge()(real(some, split, count))[0] for some in (styles, ()))
    return features, energy_distance(features, plain)


@torch.no_grad()
def judged(pictures: Tensor, styles: Sequence[str], split: str) -> dict[str, float]:
    """What the judge says of pictures of the digits of `asked` that should have these styles.

    ``score``: the probability that a picture shows its digit and has every style (the product of the single ones), the
    mean over the pictures. ``concept``: the share that shows its digit rather than another or none. ``style``: the mean
    probability of the styles (of several the mean of their product). ``taught`` and ``new``: the score of the digits
    that the styles' training pictures show, and of the others. ``distance``: that of the features from those of real
    pictures in these styles (`energy_distance`), as a share of what it is for real pictures in no style (without
    styles, as it is).
    """
    digit, (features, shown, having) = asked(len(pictures)), judge()(pictures)
    probability = shown.softmax(1)[torch.arange(len(digit)), digit]
    styled = having.sigmoid()[:, [STYLES.index(style) for style in styles]].prod(1)
    there, plain = references(tuple(styles), split, len(pictures))
    each, taught = (probability * styled).double(), torch.isin(digit, torch.tensor(list(TAUGHT)))
    return {
        "score": each.mean().item(),
        "concept": (shown.argmax(1) == digit).double().mean().item(),
        "style": styled.double().mean().item(),
        "taught": each[taught].mean().item(),
        "new": each[~taught].mean().item(),
        "distance": energy_distance(features, there) / (plain or 1.0),
    }


def drawn(model: nn.Module, styles: Sequence[str], split: str = "test") -> dict[str, float]:
    """`judged` for pictures that the model draws now."""
    return judged(draw(model, asked(DRAWN[split]), SEEDS[split]), styles, split)


# ---- the tasks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """One style, to be learned from a few pictures."""

    style: str
    family: str = "style"
    targets: str = r"(attn1\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))$"
    whole: str | None = None
    whole_lr: float = 0.0
    steps: int = 100
    batch: int = 16

    @property
    def name(self) -> str:
        return f"{self.family}/{self.style}"

    def base(self) -> nn.Module:
        return base()

    def pictures(self) -> tuple[Tensor, Tensor]:
        """The training pictures and their digits: the same ones in every run."""
        generator = torch.Generator().manual_seed(STYLES.index(self.style))
        images = torch.cat([of_class("train", digit, EXAMPLES) for digit in TAUGHT])
        return rendered(images, (self.style,), generator), torch.arange(len(TAUGHT)).repeat_interleave(EXAMPLES)

    def batches(self, seed: int, steps: int, fraction: float = 1.0) -> Iterator[Batch]:
        pictures, classes = self.pictures()
        generator, made = torch.Generator().manual_seed(seed), 0
        order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
        some = order[: max(1, round(fraction * len(classes)))]
        while True:
            for part in some[torch.randperm(len(some), generator=generator)].split(self.batch):
                if made == steps:
                    return
                made += 1
                yield noised(pictures[part], classes[part], generator)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return flow_loss(model, batch)

    def score(self, model: nn.Module, split: str = "test") -> float:
        return drawn(model, (self.style,), split)["score"]

    def measures(self, model: nn.Module) -> dict[str, float]:
        test = drawn(model, (self.style,))
        return {"validation": self.score(model, "validation"), "test": test.pop("score"), **test}

    def inputs(self) -> list[dict[str, Any]]:
        pictures, classes, noise, times = noised(*self.pictures(), torch.Generator().manual_seed(SEEDS["validation"]))
        share = times[:, None, None, None]
        mixed = (1 - share) * pictures + share * noise
        return [{"hidden_states": mixed, "timestep": 1000 * times, "class_labels": classes}]


def tasks(family: str) -> list[Task]:
    return [Style(style, family) for style in STYLES]
