"""Masks that were tried beside the library's, to see whether one of them should be added (experiment "masks").

Each is compared with a random mask of the same size on the same board; the page says what came of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.task import Task
from shira import masks
from shira.masks.masks import Mask


def drawn(seed: int, name: str, weight: Tensor) -> Tensor:
    """A random number in [0, 1) for every entry, the same for one seed, name and shape."""
    draw = torch.Generator().manual_seed(masks.Rand(density=1.0, seed=seed)._seed(name) >> 1)
    return torch.rand(weight.shape, generator=draw)


class Activation(masks.WeightMagnitude):
    """The best granules of every row by ``|w| * ||x||``, with the norm of what each column is multiplied with (Wanda's
    score, arXiv 2306.11695)."""

    def __init__(self, *arguments: Any, norms: Mapping[str, Tensor], **options: Any) -> None:
        super().__init__(*arguments, balanced=True, **options)
        self.norms = norms

    def select(self, name: str, weight: Tensor) -> Tensor:
        return self._choose(name, weight, None, weight.detach().float() * self.norms[name])


class TopRows(masks.Grad):
    """Random granules within the half of the rows that have the largest gradients."""

    def __init__(self, *arguments: Any, seed: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seed = seed

    def _choose(self, name: str, weight: Tensor, gradient: Tensor | None, scored: Tensor | None = None) -> Tensor:
        assert gradient is not None
        rows = gradient.abs().sum(tuple(range(1, gradient.dim())))
        last = rows.sort(descending=True).values[(len(rows) - 1) // 2]
        scores = drawn(self.seed, name, weight)
        scores[rows < last] = 0
        return Mask.__call__(masks.WeightMagnitude(self.density, r=self.r, granule=self.granule), name, scores)


class HalfSnip(masks.Snip):
    """One half of the granules by Snip, the same number in every row, and one half random."""

    def __init__(self, *arguments: Any, seed: int, **options: Any) -> None:
        super().__init__(*arguments, balanced=True, **options)
        self.seed = seed

    def _choose(self, name: str, weight: Tensor, gradient: Tensor | None, scored: Tensor | None = None) -> Tensor:
        granule = self.granule_of(weight)
        share = self.count(name, weight) * granule / weight.numel()
        best = masks.Snip(share / 2, granule=granule, balanced=True)._choose(name, weight, gradient)
        scores = drawn(self.seed, name, weight)
        scores.view(-1, granule)[best.long()] = 2
        return masks.WeightMagnitude(share, granule=granule)(name, scores)


@torch.no_grad()
def norms(model: nn.Module, task: Task, names: Iterable[str], batches: Sequence[Any]) -> dict[str, Tensor]:
    """For each weight of a linear layer the norm of every input feature, over the batches."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].detach().float().flatten(0, -2).square().sum(0)
            found[name] = found.get(name, torch.zeros_like(squares)) + squares

        return model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook)

    handles = [watch(name) for name in names]
    for batch in batches:
        task.loss(model, batch)
    for handle in handles:
        handle.remove()
    return {name: squares.sqrt() for name, squares in found.items()}
