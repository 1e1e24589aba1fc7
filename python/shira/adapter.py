"""`Adapter`: the changed entries of a model's weights, and the file that keeps them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import shira_ops
from shira import _file
from shira._file import AdapterError
from shira.mask import index_dtype, signed

if TYPE_CHECKING:
    from shira._checkpoint import Source
    from shira.difference import Progress, Report

__all__ = ["Adapter", "AdapterError", "Entry"]


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name of a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, eq=False)
class Entry:
    """What an adapter changes of one weight.

    ``indices`` are granule numbers, ``values`` the ``len(indices) * granule`` entries they become (or, for a
    ``delta`` adapter, what is added to them). ``shape`` and ``dtype`` are the weight's; ``fingerprint`` is that of the
    base it was made for (`shira_ops.fingerprint` as an unsigned number); ``seed`` stands for the indices of a drawn
    mask; ``aliases`` are further names of the same (tied) weight. A whole parameter is one granule of all its entries,
    indices ``[0]``.
    """

    indices: Tensor
    values: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    granule: int = 1
    fingerprint: int | None = None
    seed: int | None = None
    aliases: tuple[str, ...] = ()
    # Whether the content of the indices is known to be good, as decoding proves it.
    checked: bool = field(default=False, repr=False)

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

    def check(self, where: str) -> None:
        """Refuse what contradicts itself: shapes, dtypes, counts. The indices' content is `check_indices`' affair."""
        if self.granule < 1 or self.numel % self.granule:
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
        if self.values.dtype != self.dtype and not full:
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


class Adapter:
    """The changed entries of a model's weights: sparse, exact, independent of the model they came from.

    Made by `SparseTuner.adapter`, read by `Adapter.load`, or put together from `Entry` objects. It is not changed after
    it is made, and its tensors should not be either.

    Args:
        weights: parameter name, as in ``model.named_parameters()``, to `Entry`.
        alpha: the strength to use unless ``activate(alpha=)`` gives another.
        delta: whether values are added to the base; otherwise they replace it, which is exact.
        mask: what made the mask, in JSON's types (`Mask.describe`), or None.
        provenance: anything worth keeping, in JSON's types: data, hyper-parameters, versions.
        report: what making it left out, where it was made from something larger; not saved.
    """

    def __init__(
        self,
        weights: Mapping[str, Entry],
        *,
        alpha: float = 1.0,
        delta: bool = False,
        mask: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        report: Report | None = None,
    ) -> None:
        if not math.isfinite(alpha):
            raise AdapterError(f"alpha must be finite, got {alpha}")
        for name, entry in weights.items():
            if not name:
                raise AdapterError("a weight's name must not be empty")
            entry.check(f"weight {name!r}")
        _file.check_aliases("", {name: entry.aliases for name, entry in weights.items()})
        self.weights: Mapping[str, Entry] = MappingProxyType(dict(weights))
        self.alpha = float(alpha)
        self.delta = bool(delta)
        self.mask = None if mask is None else dict(mask)
        self.provenance = dict(provenance or {})
        self.report = report

    @property
    def nnz(self) -> int:
        """Entries that change, over all weights."""
        return sum(entry.nnz for entry in self.weights.values())

    @property
    def density(self) -> float:
        """Share of the entries of the weights it touches that it changes."""
        numel = sum(entry.numel for entry in self.weights.values())
        return self.nnz / numel if numel else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of its indices and values in memory."""
        return sum(entry.indices.nbytes + entry.values.nbytes for entry in self.weights.values())

    def __len__(self) -> int:
        return len(self.weights)

    def __repr__(self) -> str:
        kind = "delta, " if self.delta else ""
        plural = "" if len(self) == 1 else "s"
        return (
            f"Adapter({len(self)} weight{plural}, {self.nnz:,} entries ({self.density:.2%}), {kind}"
            f"alpha {self.alpha:g}, {self.nbytes / 1e6:.2f} MB)"
        )

    def save(self, path: str | os.PathLike[str], *, seeds: bool = False) -> None:
        """Write the adapter as one safetensors file (see the module `shira._file` for what stands where).

        The file is written beside its final place and renamed, so that a reader never sees half of one.

        Args:
            path: where to write; an existing file is replaced.
            seeds: leave out indices that follow from a seed (those of `masks.Rand`): the file is smaller, and reading
                it draws the mask again.
        """
        tensors: dict[str, Tensor] = {}
        weights: dict[str, Any] = {}
        for name, entry in self.weights.items():
            where = f"weight {name!r}"
            entry.check_indices(where)
            # A clone where needed: safetensors refuses tensors that share memory, as two entries of one draw may.
            tensors[f"{name}.values"] = entry.values.detach().cpu().clone(memory_format=torch.contiguous_format)
            if entry.whole:
                kind = "whole"
            elif seeds and entry.seed is not None:
                kind = "seed"
                drawn = _drawn(entry.numel, entry.indices.numel(), entry.seed, entry.granule)
                if not torch.equal(drawn, entry.indices.cpu().to(drawn.dtype)):
                    raise AdapterError(f"{where}: its indices are not those its seed draws; save it without seeds=True")
            else:
                kind = "code"
                tensors[f"{name}.indices"] = shira_ops.encode_indices(entry.indices.cpu())
            weights[name] = {
                "shape": list(entry.shape),
                "dtype": dtype_name(entry.dtype),
                "granule": entry.granule,
                "count": entry.indices.numel(),
                "indices": kind,
                "seed": _file.hex_word(entry.seed),
                "fingerprint": _file.hex_word(entry.fingerprint),
                "aliases": list(entry.aliases),
            }
        about = {
            "alpha": self.alpha,
            "delta": self.delta,
            "mask": self.mask,
            "density": self.density,
            "provenance": self.provenance,
        }
        try:
            metadata = {
                "format": "pt",
                _file.VERSION_KEY: str(_file.VERSION),
                _file.ADAPTER_KEY: json.dumps(about, allow_nan=False),
                _file.WEIGHTS_KEY: json.dumps(weights, allow_nan=False),
            }
        except (TypeError, ValueError) as error:
            raise AdapterError(f"mask and provenance must be made of JSON's types: {error}") from error
        folder = os.path.dirname(os.fspath(path)) or "."
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"the folder {folder!r} to write {os.path.basename(path)!r} into does not exist")
        with _file.replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Adapter:
        """Read a file: map it, check all of it, execute nothing.

        The values stay in the mapped file, so loading costs the decoding of the indices. Raises `AdapterError` with the
        file, the weight and what is wrong.
        """
        with _file.open_adapter(path, "pt") as (file, header):
            entries: dict[str, Entry] = {}
            for name, weight in header.weights.items():
                values = file.get_tensor(f"{name}.values")
                if values.data_ptr() % values.itemsize:
                    # Other writers may not align tensors in the file; ops need whole entries at whole addresses.
                    values = values.clone()
                if weight.indices == "code":
                    try:
                        indices = shira_ops.decode_indices(
                            file.get_tensor(f"{name}.indices"),
                            weight.count,
                            weight.numel,
                            index_dtype(weight.numel // weight.granule),
                            granule=weight.granule,
                        )
                    except RuntimeError as error:
                        where = f"{os.fspath(path)}: weight {name!r}"
                        raise AdapterError(f"{where}: its indices do not decode: {error}") from error
                elif weight.indices == "seed":
                    assert weight.seed is not None
                    indices = _drawn(weight.numel, weight.count, weight.seed, weight.granule)
                else:
                    indices = torch.zeros(1, dtype=torch.int32)
                entries[name] = Entry(
                    indices,
                    values,
                    weight.shape,
                    getattr(torch, weight.dtype),
                    weight.granule,
                    weight.fingerprint,
                    weight.seed,
                    weight.aliases,
                    checked=True,
                )
        return cls(entries, alpha=header.alpha, delta=header.delta, mask=header.mask, provenance=header.provenance)

    @classmethod
    def from_difference(
        cls,
        base: Source,
        tuned: Source,
        *,
        density: float | None = None,
        granule: int = 1,
        alpha: float = 1.0,
        provenance: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> Adapter:
        """What fine-tuning changed, as an adapter of new entries.

        Without ``density`` it is exact: put on the base, it gives the tuned weights bit for bit, NaNs and the sign of
        zero included. A weight that changed nearly everywhere is kept whole, where that is smaller. Files are mapped and
        compared in chunks, so that neither model is in memory; values of whole weights stay in the tuned file, which
        must not be written to while the adapter is in use.

        Args:
            base, tuned: each a path (a ``.safetensors`` file, or a folder with one or with shards and their index), a
                state dict, or a module. The same names, shapes and dtypes; tied tensors of ``base`` become aliases.
            density: keep at most ``max(1, round(density * numel / granule))`` granules of each weight, those with the
                largest sum of ``|tuned - base|`` (ties to the lower index; what is no number first).
            granule: entries an index stands for; divides the last dimension of every weight that changed.
            alpha, provenance: as in `Adapter`.
            progress: called with a weight's name, the bytes of the base done so far, and the bytes in all.

        The adapter's ``report`` says, for each weight and in all, how many entries changed and were kept, and what share
        of the squared difference was lost. Raises `AdapterError` with every name, shape or dtype that does not match.
        """
        from shira.difference import difference

        return difference(
            base, tuned, density=density, granule=granule, alpha=alpha, provenance=provenance, progress=progress
        )


def _drawn(numel: int, count: int, seed: int, granule: int) -> Tensor:
    """The indices that a seed stands for."""
    return shira_ops.select_random(numel, count, signed(seed), device=torch.device("cpu"), granule=granule)
