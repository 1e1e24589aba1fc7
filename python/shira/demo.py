"""The library at work on real data: ``shira demo``, or ``python -m shira.demo``.

A small transformer learns scikit-learn's handwritten digits. One sparse adapter teaches it digits that are turned by 90
degrees, another digits whose ink is inverted; both also see the upright digits, so as not to forget them. The adapters
are saved, loaded, switched on the live model, fused, and removed again: the base comes back bit for bit.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shira
import shira_ops

try:
    import matplotlib
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
except ImportError as error:
    raise SystemExit(f"The demo needs a few more packages ({error}). Run: pip install 'shira-ops[demo]'") from error

PATCH, SIDE, WIDTH, HEADS, LAYERS, CLASSES = 2, 8, 96, 4, 2, 10
PRETRAIN_EPOCHS, ADAPT_EPOCHS, BATCH = 20, 20, 64
PRETRAIN_LR, ADAPTER_LR = 3e-3, 1e-2
DENSITY, FUSED_ALPHA = 0.02, 0.7
TASKS = ("upright", "rotated", "inverted")
# The layers of the speed comparison: as wide as those of a 7B model, and larger than the caches.
WIDE, WIDE_LAYERS, WIDE_DENSITY, ROUNDS = 4096, 8, 0.01, 7


class Block(nn.Module):
    """One transformer layer with plain linear layers as projections."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_attention(x)
        q, k, v = (p(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.down_proj(F.gelu(self.up_proj(self.norm_mlp(x))))
        return y


class DigitTransformer(nn.Module):
    """A vision transformer for images of 8 x 8: 16 patches of 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Parameter(torch.randn((SIDE // PATCH) ** 2, WIDTH) * 0.1)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images.unsqueeze(1), PATCH, stride=PATCH).transpose(1, 2)
        x = self.embed(patches) + self.position
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


@dataclass
class Digits:
    """Images in [0, 1] and their labels, split once. Each task shows the same digits in its own way."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, seed: int) -> Digits:
        raw = load_digits()
        images, labels = torch.tensor(raw.images / 16, dtype=torch.float32), torch.tensor(raw.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        images, labels, cut = images[order], labels[order], len(labels) * 3 // 4
        return cls(images[:cut], labels[:cut], images[cut:], labels[cut:])


def shifted(task: str, images: Tensor) -> Tensor:
    """The images as a task shows them."""
    if task == "rotated":
        return images.rot90(1, (1, 2))
    return 1 - images if task == "inverted" else images


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    seed: int,
    tick: Callable[[float], None],
) -> None:
    """An ordinary training loop."""
    order = torch.Generator().manual_seed(seed)
    steps, highest = epochs * math.ceil(len(labels) / BATCH), optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, highest, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=order).split(BATCH):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        tick(loss.item())


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread. For matrices as small as here that is as fast as two threads, and on a busy machine a hundred
    times faster, since threads do not wait for each other after every op."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    share: float = (model(images).argmax(1) == labels).float().mean().item()
    return share


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def identical(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether every weight has the same bits as before. Bytes are compared, because of NaN and -0.0."""
    return all(
        torch.equal(tensor.contiguous().view(torch.uint8), before[name].view(torch.uint8))
        for name, tensor in model.state_dict().items()
    )


@dataclass
class Speed:
    """Milliseconds per layer (medians of interleaved rounds), and the granule of the sparse switch."""

    what: str
    milliseconds: float


def switch_speed() -> list[Speed]:
    """Times a switch of wide bf16 layers: sparse swaps, and fusing a LoRA of as many parameters (`addmm_` in place)."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(WIDE, WIDE, generator=generator).bfloat16() for _ in range(WIDE_LAYERS)]
    jobs: dict[str, Callable[[], object]] = {}
    for granule, what in ((1, "SHiRA swap, single entries"), (32, "SHiRA swap, granules of 32")):
        mask = shira.masks.Rand(density=WIDE_DENSITY, granule=granule)
        indices = [mask(f"layer{i}", weight) for i, weight in enumerate(weights)]
        values = [torch.randn(len(index) * granule, generator=generator).bfloat16() for index in indices]

        def swap(indices: list[Tensor] = indices, values: list[Tensor] = values, granule: int = granule) -> None:
            shira_ops.foreach_swap_(weights, indices, values, granule=granule)

        jobs[what] = swap
    rank = round(WIDE_DENSITY * WIDE / 2)  # rank * (rows + columns) parameters
    down = [torch.randn(rank, WIDE, generator=generator).bfloat16() for _ in weights]
    up = [torch.randn(WIDE, rank, generator=generator).bfloat16() for _ in weights]

    def fuse() -> None:
        for weight, b, a in zip(weights, up, down, strict=True):
            weight.addmm_(b, a, alpha=0.5)

    jobs[f"LoRA fuse, addmm_, rank {rank}"] = fuse
    seconds: dict[str, list[float]] = {what: [] for what in jobs}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for what, job in jobs.items():
                start = time.perf_counter()
                job()
                seconds[what].append(time.perf_counter() - start)
    return [Speed(what, statistics.median(times) * 1e3 / WIDE_LAYERS) for what, times in seconds.items()]


def live_switch(switcher: shira.Switcher, names: tuple[str, str]) -> float:
    """Milliseconds to switch from one adapter to the other on the demo's own model."""
    times = []
    for turn in range(50):
        start = time.perf_counter()
        switcher.activate(names[turn % 2])
        times.append(time.perf_counter() - start)
    switcher.deactivate()
    return statistics.median(times) * 1e3


def picture(path: Path, results: dict[str, dict[str, float]], digits: Digits, adapter: shira.Adapter) -> None:
    """Draws the digits of each task, the accuracies, and where an adapter's entries are."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(12, 6.5), layout="constrained")
    grid = figure.add_gridspec(2, 6)
    for row, task in enumerate(TASKS):
        axes = figure.add_subplot(grid[0, row])
        sample = torch.cat([torch.cat(list(shifted(task, digits.test[i : i + 4])), 1) for i in (0, 4, 8, 12)])
        axes.imshow(sample.numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(f"{task} digits")
        axes.axis("off")
    name, entry = next((n, e) for n, e in adapter.weights.items() if n.endswith("q_proj.weight"))
    changed = torch.zeros(entry.numel // entry.granule, entry.granule)
    changed[entry.indices.long()] = 1
    axes = figure.add_subplot(grid[0, 3:])
    axes.imshow(changed.view(entry.shape).numpy(), cmap="Blues", interpolation="nearest")
    axes.set_title(f"entries that change: {adapter.density:.1%} of {name}", fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    axes = figure.add_subplot(grid[1, :])
    width = 0.8 / len(results)
    for number, (state, scores) in enumerate(results.items()):
        at = [task + (number - (len(results) - 1) / 2) * width for task in range(len(TASKS))]
        bars = axes.bar(at, [100 * scores[task] for task in TASKS], width * 0.92, label=state)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(TASKS)), [f"{task} digits" for task in TASKS])
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(0, 108)
    axes.legend(ncols=len(results), loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def learn(
    model: DigitTransformer, digits: Digits, out: Path, seed: int, console: Console
) -> tuple[dict[str, Tensor], dict[str, Path], int]:
    """Pretrain the model and train an adapter for each further task. Returns the base's bits, the adapters' files by
    task, and how many entries an adapter trains."""
    files: dict[str, Path] = {}
    trainable = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with one_thread(), Progress(*columns, TimeElapsedColumn(), console=console) as progress:

        def bar(what: str, epochs: int) -> Callable[[float], None]:
            task = progress.add_task(what, total=epochs, loss="")
            return lambda loss: progress.update(task, advance=1, loss=f"loss {loss:.3f}")

        optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LR)
        tick = bar("pretraining on upright digits", PRETRAIN_EPOCHS)
        fit(model, optimizer, digits.train, digits.train_labels, PRETRAIN_EPOCHS, seed, tick)
        model.zero_grad()  # the dense gradients are no longer needed
        base = bits(model)
        labels = digits.train_labels.repeat(2)
        for number, task in enumerate(TASKS[1:]):
            mask = shira.masks.Rand(density=DENSITY, seed=seed + number)  # two masks that hardly overlap
            with shira.SparseTuner(model, mask, targets=r"_proj$|^embed$|^head$") as tuner:
                trainable = tuner.nnz
                sparse = shira.AdamW(tuner, lr=ADAPTER_LR, weight_decay=0.0)
                tick = bar(f"adapter for {task} digits", ADAPT_EPOCHS)
                both = torch.cat([shifted(task, digits.train), digits.train])
                fit(model, sparse, both, labels, ADAPT_EPOCHS, seed, tick)
                files[task] = out / f"{task}.safetensors"
                about = {"data": f"scikit-learn digits, {task} and upright", "seed": seed}
                tuner.adapter(provenance=about).save(files[task])
            if not identical(model, base):
                raise RuntimeError(f"the base did not come back after training the adapter for {task} digits")
    return base, files, trainable


def accuracies(results: dict[str, dict[str, float]]) -> Table:
    """The test accuracy on each task's digits, in each state of the model."""
    table = Table(title="Test accuracy on 450 real digits, one live model", title_justify="left")
    table.add_column("digits")
    for state in results:
        table.add_column(state, justify="right")
    for task in TASKS:
        table.add_row(task, *(f"{100 * state[task]:.1f} %" for state in results.values()))
    return table


def timings(speeds: list[Speed]) -> Table:
    """What each way to switch takes, beside the last one."""
    table = Table(
        title=f"Switching {WIDE_LAYERS} layers of {WIDE} x {WIDE}, bfloat16, {WIDE_DENSITY:.0%} of the parameters, "
        "one thread",
        title_justify="left",
    )
    for heading in ("", "a layer", "over the LoRA fuse"):
        table.add_column(heading, justify="left" if not heading else "right")
    fuse = speeds[-1].milliseconds
    for speed in speeds:
        table.add_row(speed.what, f"{speed.milliseconds:.3f} ms", f"{fuse / speed.milliseconds:.1f} x")
    return table


def run(out: str | Path = "demo-out", seed: int = 0, console: Console | None = None) -> dict[str, Any]:
    """Run the whole demo. Returns what the tables show."""
    console = console or Console()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    digits, model = Digits.load(seed), DigitTransformer()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    test = {task: shifted(task, digits.test) for task in TASKS}
    base, files, trainable = learn(model, digits, out, seed, console)

    def scores() -> dict[str, float]:
        return {task: accuracy(model, images, digits.test_labels) for task, images in test.items()}

    # From here on it does what a server would do, with files and a live model.
    switcher = shira.Switcher(model)
    for task, file in files.items():
        switcher.add(task, file)
    results = {"base": scores()}
    for task in files:
        switcher.activate(task)
        results[f"adapter: {task}"] = scores()
    switcher.activate(dict.fromkeys(files, FUSED_ALPHA))
    results[f"both fused, {FUSED_ALPHA} each"] = scores()
    switcher.deactivate()
    results["base again"] = scores()
    with one_thread():
        switch_ms = live_switch(switcher, (TASKS[1], TASKS[2]))
    restored = identical(model, base)
    console.print(accuracies(results))

    size = {task: file.stat().st_size for task, file in files.items()}
    facts = Table(title="The adapters", title_justify="left", show_header=False)
    facts.add_row("trainable", f"{trainable:,} of {parameters:,} parameters ({trainable / parameters:.2%})")
    facts.add_row("files", ", ".join(f"{task} {count:,} bytes" for task, count in size.items()))
    facts.add_row("one to the other, this model", f"{switch_ms:.3f} ms")
    facts.add_row("base restored", "identical bits" if restored else "[bold red]bits differ[/]")
    console.print(facts)

    # On one thread: on a busy machine, threads that wait for each other would distort both times.
    with console.status(f"timing {WIDE_LAYERS} layers of {WIDE} x {WIDE} in bfloat16"), one_thread():
        speeds = switch_speed()
    console.print(timings(speeds))

    image = out / "demo.png"
    picture(image, results, digits, switcher.adapters[TASKS[1]])
    console.print(
        f"Adapters and a picture are in {out}{'' if str(out).endswith('/') else '/'}: {image.name}, "
        f"{', '.join(file.name for file in files.values())}"
    )
    if not restored:
        raise RuntimeError("the base did not come back bit for bit")
    return {
        "accuracy": results, "trainable": trainable, "parameters": parameters, "bytes": size,
        "switch_ms": switch_ms, "restored": restored, "speeds": {speed.what: speed.milliseconds for speed in speeds},
        "picture": str(image),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m shira.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="demo-out", help="folder for adapters and the picture (default: demo-out)")
    parser.add_argument("--seed", type=int, default=0, help="seed of split, model and training (default: 0)")
    given = parser.parse_args()
    run(given.out, given.seed)


if __name__ == "__main__":
    main()
