"""What adapters add to the output of a layer whose weight is not written: for all rows of a batch, or row by row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import shira_ops


class Part(NamedTuple):
    """What one adapter adds to a layer's weight: ``scale * values`` at ``indices``."""

    indices: Tensor
    values: Tensor
    scale: float
    granule: int


def add(output: Tensor, input: Tensor, parts: Iterable[Part], *, transposed: bool = False) -> Tensor:
    """``output`` and, for each part, ``input @ delta.T`` (with ``transposed``, ``input @ delta``).

    The input is cast to the output's dtype, as the layer itself does under autocast.
    """
    for part in parts:
        input = input.to(output.dtype).contiguous()
        output = output + _product(input, part, output.shape[-1], transposed)
    return output


def add_by_row(
    output: Tensor, input: Tensor, names: Sequence[str], parts: Mapping[str, Part], *, transposed: bool = False
) -> Tensor:
    """As `add`, with the part of ``names[b]`` for sample b; a name that has no part leaves its sample as it is.

    Without gradients all of it is one call for all parts of one granule, into ``output`` itself.
    """
    input = input.to(output.dtype).contiguous()
    differentiable = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (output, input, *(part.values for part in parts.values()))
    )
    if differentiable:
        for name, part in parts.items():
            rows = torch.tensor([at for at, one in enumerate(names) if one == name], device=output.device)
            output = output.index_add(0, rows, _product(input[rows], part, output.shape[-1], transposed))
        return output
    output = output.contiguous()
    tokens = input[0].numel() // input.shape[-1]
    for granule in dict.fromkeys(part.granule for part in parts.values()):
        chosen = {name: part for name, part in parts.items() if part.granule == granule}
        numbers = {name: at for at, name in enumerate(chosen)}
        adapters = torch.tensor([numbers.get(name, -1) for name in names], dtype=torch.int32, device=output.device)
        compute = torch.float64 if output.dtype == torch.float64 else torch.float32
        values = [_values(part, output.dtype) for part in chosen.values()]
        if len({one.dtype for one in values}) > 1:
            values = [one.to(compute) for one in values]
        shira_ops.sparse_linear_add_(
            output,
            input,
            [part.indices for part in chosen.values()],
            values,
            adapters.repeat_interleave(tokens),
            torch.tensor([part.scale for part in chosen.values()], dtype=compute, device=output.device),
            transposed=transposed,
            granule=granule,
        )
    return output


def _product(input: Tensor, part: Part, out_features: int, transposed: bool) -> Tensor:
    values = _values(part, input.dtype)
    # The values are scaled, of which there are fewer than of outputs.
    scaled = values if part.scale == 1.0 else values * part.scale
    return shira_ops.sparse_linear(
        input, part.indices, scaled, out_features, transposed=transposed, granule=part.granule
    )


def _values(part: Part, dtype: torch.dtype) -> Tensor:
    """The values in a dtype that the ops take for an input of this one: the same, or float32."""
    if part.values.dtype in (dtype, torch.float32):
        return part.values
    return part.values.to(dtype if dtype == torch.float64 else torch.float32)
