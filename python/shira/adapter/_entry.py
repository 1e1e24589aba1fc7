"""`Entry`: what an adapter changes in one weight. `Report`: what was left out when the adapter was made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import shira_ops
from shira._granules import dtype_name
from shira._text import AdapterError
from shira.adapter import _file


def check_finite(where: str, values: Tensor) -> None:
    """Refuse values that contain NaN or infinity. `where` begins the sentence. Integers are always finite."""
    if not values.is_floating_point() or not values.numel():
        return
    values = values.detach()
    if values.itemsize == 1:  # 8-bit floats have few operations of their own, and float32 holds them exactly
        values = values.to(torch.float32)
    # Minimum and maximum are NaN if anything is. This is one pass; isfinite would take three and extra memory.
    if all(map(math.isfinite, torch.stack(values.aminmax()).tolist())):
        return
    nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
    found = " and ".join(f"{count:,} {what}" for count, what in ((nan, "NaN"), (infinite, "infinite")) if count)
    raise AdapterError(
        f"{where}: {nan + infinite:,} of its {values.numel():,} values are not finite ({found}); "
        f"check_finite=False (--allow-nonfinite) lets them through"
    )


def _own(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own, if it is only a part of something larger, such as a mapped file."""
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.detach().clone()


@dataclass(frozen=True, eq=False)
class Entry:
    """What an adapter changes in one weight.

    ``indices`` are granule numbers, ``values`` the ``len(indices) * granule`` entries they become (or, for a
    ``delta`` adapter, what is added to them). A granule is ``granule`` consecutive entries of the flat weight.
    ``shape`` and ``dtype`` are the weight's. ``fingerprint`` is that of the base weight it was made for
    (`shira_ops.fingerprint` as an unsigned number). ``seed`` is the seed that the indices were drawn with, if they
    were. ``aliases`` are further names of the same (tied) weight. A whole parameter is a single granule of all its
    entries, with indices ``[0]``.
    """

    indices: Tensor
    values: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    granule: int = 1
    fingerprint: int | None = None
    seed: int | None = None
    aliases: tuple[str, ...] = ()
    # Whether the indices are known to be valid; decoding proves it.
    checked: bool = False

    def __repr__(self) -> str:
        """What it is of, without its tensors: an adapter's `weights` print on one screen."""
        kind = "whole" if self.whole else f"granule {self.granule}"
        return f"Entry(shape {list(self.shape)}, {dtype_name(self.dtype)}, {self.nnz:,} entries, {kind})"

    @property
    def numel(self) -> int:
        """Entries of the weight."""
        return math.prod(self.shape)

    @property
    def nnz(self) -> int:
        """Entries that change."""
        return self.values.numel()

    @property
    def whole(self) -> bool:
        """Whether the entry replaces the parameter as a whole."""
        return self.granule == self.numel and self.indices.numel() == 1

    def check(self, where: str, *, differences: bool = False) -> None:
        """Refuse shapes, dtypes and counts that contradict each other. `check_indices` checks the indices.

        With `differences`, values may be whole numbers of the size of the weight's floats: see `_difference`.
        """
        if self.granule < 1 or self.numel % self.granule or self.granule > max(self.numel, 1):
            raise AdapterError(f"{where}: granule must divide its {self.numel} entries, got {self.granule}")
        if dtype_name(self.dtype) not in _file.DTYPES:
            raise AdapterError(f"{where}: dtype must be one of {', '.join(_file.DTYPES)}, got {dtype_name(self.dtype)}")
        if self.indices.dtype not in (torch.int32, torch.int64) or self.indices.dim() != 1:
            raise AdapterError(
                f"{where}: indices must be 1-D and int32 or int64, "
                f"got shape {list(self.indices.shape)} of {dtype_name(self.indices.dtype)}"
            )
        nnz = self.indices.numel() * self.granule
        if self.values.dim() != 1 or self.values.numel() != nnz:
            raise AdapterError(
                f"{where}: values must have {nnz} entries ({self.indices.numel()} indices of granule {self.granule}), "
                f"got shape {list(self.values.shape)}"
            )
        if nnz > self.numel:
            raise AdapterError(f"{where}: values must be at most its {self.numel} entries, got {nnz}")
        full = dtype_name(self.dtype) in _file.ARITHMETIC and self.values.dtype == torch.float32
        whole = differences and dtype_name(self.values.dtype) == _file.DIFFERENCES.get(dtype_name(self.dtype))
        if self.values.dtype != self.dtype and not full and not whole:
            raise AdapterError(
                f"{where}: values must have the weight's dtype {dtype_name(self.dtype)} or, for floats, float32, "
                f"got {dtype_name(self.values.dtype)}"
            )

    def check_indices(self, where: str) -> None:
        """Refuse indices that are not strictly increasing below the weight's number of granules."""
        if self.checked:
            return
        try:
            shira_ops.check_indices(self.indices, self.numel, granule=self.granule)
        except RuntimeError as error:
            raise AdapterError(f"{where}: {error}") from error

    def check_finite(self, where: str) -> None:
        """Refuse NaN and infinity among the values, and say how many there are. `where` begins the sentence."""
        check_finite(where, self.values)

    # The values of a loaded adapter are views of its file, and pickling a view would pickle the whole file.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "indices": _own(self.indices), "values": _own(self.values)}


@dataclass(frozen=True)
class Lost:
    """One weight of a `Report`.

    ``entries``: how many the weight has. ``changed``: how many of them differ. ``kept``: how many the adapter holds
    (more than changed, where granules bring their neighbours along). ``lost``: the share of the squared difference, in
    [0, 1], that the adapter leaves out.
    """

    entries: int
    changed: int
    kept: int
    lost: float
    # The sum of the squared differences, so that shares add up over weights.
    squared: float = 0.0


@dataclass(frozen=True)
class Report:
    """What was left out when an adapter was made, for each weight and in total.

    ``notes`` say how the names of two checkpoints were brought together.
    """

    weights: Mapping[str, Lost]
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> int:
        """Entries that differ, over all weights."""
        return sum(weight.changed for weight in self.weights.values())

    @property
    def kept(self) -> int:
        """Entries in the adapter, over all weights."""
        return sum(weight.kept for weight in self.weights.values())

    @property
    def lost(self) -> float:
        """Share of the squared difference of all weights that the adapter leaves out, in [0, 1]."""
        whole = math.fsum(weight.squared for weight in self.weights.values())
        return math.fsum(weight.lost * weight.squared for weight in self.weights.values()) / whole if whole else 0.0

    @property
    def exact(self) -> bool:
        """Whether the adapter holds every changed entry."""
        return self.lost == 0.0 and all(weight.kept >= weight.changed for weight in self.weights.values())

    def __str__(self) -> str:
        text = f"{self.changed:,} entries changed in {len(self.weights)} weights, {self.kept:,} kept"
        lost = "nothing lost" if self.exact else f"{self.lost:.3%} of the squared difference lost"
        return "; ".join([f"{text}, {lost}", *self.notes])


class Made(NamedTuple):
    """The arguments that `Adapter` is made with, by name; so that what computes them need not know `Adapter`."""

    weights: Mapping[str, Entry]
    mask: Mapping[str, Any]
    report: Report | None
    delta: bool = False
    provenance: Mapping[str, Any] | None = None
