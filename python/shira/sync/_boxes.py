"""What a `Plan` is made of: layouts of weights, and boxes from the one to the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shira._granules import dtype_name
from shira.sync._weights import Weight


class Layout(NamedTuple):
    """What a weight looks like, in a checkpoint or in a model."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"shape {list(self.shape)} and dtype {dtype_name(self.dtype)}"


def layout_of(weight: Weight) -> Layout:
    """What a weight of the model looks like now."""
    return Layout(tuple(weight.tensor.shape), weight.tensor.dtype, weight.aliases)


@dataclass(frozen=True)
class Box:
    """Entries of a checkpoint's weight that lie at regular distances in it, and so they do in one weight of the model.

    Entry ``(i, j, ...)`` of a box, with ``0 <= i < sizes[0]`` and so on, is entry
    ``source + i * source_strides[0] + j * source_strides[1] + ...`` of the flat weight of the checkpoint, and entry
    ``target + i * target_strides[0] + j * target_strides[1] + ...`` of the model's flat weight that is called `weight`.
    Dimensions are in the order of falling source strides.
    """

    weight: str
    sizes: tuple[int, ...]
    source: int
    source_strides: tuple[int, ...]
    target: int
    target_strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Entries of the box."""
        return math.prod(self.sizes)

    @property
    def end(self) -> int:
        """One more than the largest index in the model's weight."""
        reach = sum((size - 1) * stride for size, stride in zip(self.sizes, self.target_strides, strict=True))
        return self.target + reach + 1

    def sources(self, flat: Tensor) -> Tensor:
        """The box as a view of the checkpoint's flat weight."""
        return flat.as_strided(self.sizes, self.source_strides, flat.storage_offset() + self.source)

    def targets(self, flat: Tensor) -> Tensor:
        """The box as a view of the model's flat weight."""
        return flat.as_strided(self.sizes, self.target_strides, flat.storage_offset() + self.target)

    def granule(self, granule: int) -> int:
        """The largest granule, at most this one, whose granules are in the box whole and lie in a row on both sides."""
        if not self.sizes or self.source_strides[-1] != 1 or self.target_strides[-1] != 1:
            return 1
        steps = (*self.source_strides[:-1], *self.target_strides[:-1])
        return math.gcd(granule, self.source, self.target, self.sizes[-1], *steps)

    def coarse(self, granule: int) -> Box:
        """The box in granules, of a size that `granule` said fits."""
        if granule == 1:
            return self

        def part(numbers: tuple[int, ...], last: int) -> tuple[int, ...]:
            return (*(number // granule for number in numbers[:-1]), last)

        return Box(
            self.weight,
            (*self.sizes[:-1], self.sizes[-1] // granule),
            self.source // granule,
            part(self.source_strides, 1),
            self.target // granule,
            part(self.target_strides, 1),
        )

    def find(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these entries of the checkpoint's weight (int64, rising) are in the box, and where they are then.

        Returns their positions among `indices`, and the model's indices: both int64, in the order of `indices`.
        """
        reach = sum((size - 1) * stride for size, stride in zip(self.sizes, self.source_strides, strict=True))
        ends = torch.tensor([self.source, self.source + reach + 1], device=indices.device)
        begin, end = torch.searchsorted(indices, ends).tolist()
        left = indices[begin:end] - self.source
        where = torch.arange(begin, end, device=indices.device)
        if self.source_strides == (1,):
            return where, left * self.target_strides[0] + self.target
        found = torch.full_like(left, self.target)
        inside = torch.ones_like(left, dtype=torch.bool)
        for size, stride, step in zip(self.sizes, self.source_strides, self.target_strides, strict=True):
            at = torch.div(left, stride, rounding_mode="floor")
            inside &= at < size
            left = left - at * stride
            found += at * step
        inside &= left == 0
        return where[inside], found[inside]
