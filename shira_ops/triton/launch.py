"""How kernels are started: the checks before them, and the device."""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_INTEGERS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
TILE = 1024  # entries per program, where a kernel does not need many registers per entry


def bits(tensor: Tensor) -> Tensor:
    """The tensor's entries as integers."""
    return tensor.view(_BITS[tensor.element_size()])


def dtype_of(dtype: torch.dtype) -> tl.dtype:
    """The Triton dtype of what `bits` holds; for a dtype without arithmetic, that of the integers."""
    return _DTYPES.get(dtype) or _INTEGERS[dtype.itemsize]


def dtype(tensor: Tensor) -> tl.dtype:
    """`dtype_of` a tensor."""
    return dtype_of(tensor.dtype)


def bits_dtype(tensor: Tensor) -> tl.dtype:
    """The Triton dtype of `bits`."""
    return _INTEGERS[tensor.element_size()]


def compute(weight: Tensor) -> tl.dtype:
    return _DTYPES[checks.compute_dtype(weight.dtype)]


def rounded(value: float, dtype: tl.dtype) -> float:
    """A number in double precision, rounded to the compute dtype."""
    return value if dtype == tl.float64 else ctypes.c_float(value).value


def number_bits(value: float, dtype: tl.dtype) -> int:
    """A number, rounded to the dtype, as `arithmetic.number` takes it."""
    number = ctypes.c_double(value) if dtype == tl.float64 else ctypes.c_float(value)
    return int.from_bytes(number, sys.byteorder, signed=True)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The op of this name: first every backend's checks, then the function, on the device of its arguments.

    The content of indices is not checked: that would synchronise. Kernels guard each access.
    """

    @checks.checked(function.__name__)
    @functools.wraps(function)
    def kernel(**given: Any) -> Any:
        lists = (value if isinstance(value, (list, tuple)) else (value,) for value in given.values())
        devices = (value.device for value in itertools.chain.from_iterable(lists) if isinstance(value, Tensor))
        device = next(devices, given.get("device"))
        with torch.cuda.device(device) if device is not None and device.type == "cuda" else nullcontext():
            return function(**given)

    return kernel


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Runs a kernel without contraction: fused multiply-adds give different bits."""
    if programs > 0:
        kernel[(programs,)](*args, **constants, enable_fp_fusion=False)


@triton.jit(do_not_specialize=["n", "granules"])
def check_kernel(indices, first, n, granules, LIMITED: tl.constexpr, BLOCK: tl.constexpr):
    """`first` becomes the first position that is refused."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + at, mask=at < n, other=0).to(tl.int64)
    before = tl.load(indices + at - 1, mask=(at < n) & (at > 0), other=-1).to(tl.int64)
    bad = (index < 0) | (index <= before)
    if LIMITED:
        bad |= index >= granules
    position = tl.min(tl.where(bad & (at < n), at, n), 0)
    if position < n:
        tl.atomic_min(first, position, sem="relaxed")


def content(op: str, name: str, indices: Tensor, granules: int | None) -> None:
    """Like `checks.content`, which it calls to say what is wrong. Synchronises."""
    n = indices.numel()
    first = torch.full((), n, dtype=torch.int64, device=indices.device)
    constants = {"LIMITED": granules is not None, "BLOCK": TILE}
    launch(check_kernel, triton.cdiv(n, TILE), indices, first, n, granules or 0, **constants)
    if int(first) < n:
        checks.content(op, name, indices, granules)
