"""Values as differences from the entries that they replace, which fine-tuning leaves small.

A float's bits as a whole number in the order of the floats: what is next to each other there differs by 1, 0.0 and -0.0
too. The difference of two such numbers, mod 2^bits, is exact for any bits, NaNs included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shira import _codec
from shira._granules import dtype_name
from shira.adapter import _file


def has_differences(dtype: torch.dtype) -> bool:
    """Whether values of a weight of this dtype can be differences: floats can."""
    return dtype_name(dtype) in _file.DIFFERENCES


def _ordered(numbers: Tensor) -> Tensor:
    """From a float's bits to its place in the order of floats, and back."""
    return numbers ^ ((numbers >> (8 * numbers.element_size() - 1)) & torch.iinfo(numbers.dtype).max)


def difference(before: Tensor, after: Tensor) -> Tensor:
    """What leads from some entries to others, as whole numbers of their size."""
    kind = getattr(torch, _file.DIFFERENCES[dtype_name(after.dtype)])
    return _ordered(after.detach().view(kind)) - _ordered(before.detach().view(kind))


def add(before: Tensor, differences: Tensor) -> Tensor:
    """Where differences lead from some entries."""
    return _ordered(_ordered(before.view(differences.dtype)) + differences).view(before.dtype)


def encode(differences: Tensor) -> Tensor:
    """The code of differences, on the CPU."""
    return torch.from_numpy(_codec.encode_numbers(differences.cpu().contiguous().numpy()))


def decode(code: Any, count: int, dtype: torch.dtype) -> Tensor:
    """The differences of a code. ValueError where it is not whole."""
    return torch.from_numpy(_codec.decode_numbers(code, count, np.dtype(dtype_name(dtype))))
