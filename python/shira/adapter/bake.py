"""Merged checkpoints: the base's files written again with an adapter applied, tensor by tensor.

Only one tensor at a time is in memory, shards stay shards, and the result appears only when all of it is written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import shira_ops
from shira import _fit, _text
from shira._granules import dtype_name
from shira._text import AdapterError
from shira.adapter import _file, _output
from shira.adapter._checkpoint import Checkpoint, Progress, Shard, Stored, companions, open_checkpoint
from shira.adapter.adapter import Adapter, check_adapter

if TYPE_CHECKING:
    from shira.adapter._entry import Entry

__all__ = ["Merged", "Progress", "bake", "merge"]

_PIECE = 64 << 20


@dataclass(frozen=True)
class Merged:
    """What `bake` has written."""

    nbytes: int  # of tensors
    entries: int  # that the adapter changes
    tensors: tuple[str, ...]  # the names of those that were changed
    added: tuple[str, ...]  # whole parameters that the base did not have


def _put_on(stored: Stored, entry: Entry, alpha: float, delta: bool, check_finite: bool) -> Any:
    """The bytes of the tensor with the adapter applied."""
    weight = stored.tensor().clone()
    indices, values = entry.indices.cpu(), entry.values.detach().cpu().contiguous()
    if alpha == 1 and not delta and values.dtype == weight.dtype:
        shira_ops.scatter_(weight, indices, values, granule=entry.granule)
    else:
        saved = torch.empty(entry.nnz, dtype=weight.dtype, device="cpu")
        shira_ops.apply_(weight, indices, values, saved, alpha=alpha, delta=delta, granule=entry.granule)
        if check_finite:
            now = shira_ops.gather(weight, indices, granule=entry.granule)
            _still_finite(stored.name, saved, now, alpha)
    return weight.view(torch.uint8).numpy() if weight.numel() else b""


def _still_finite(name: str, before: Tensor, now: Tensor, alpha: float) -> None:
    """Refuse entries that became infinite: values may be finite, and the sum too large for the dtype."""
    lost = int((before.isfinite() & ~now.isfinite()).sum())
    if lost:
        raise AdapterError(
            f"{name!r}: {lost:,} entries would become inf or NaN in {dtype_name(now.dtype)} at strength {alpha:g}; "
            f"use a smaller strength, or check_finite=False (--allow-nonfinite)"
        )


def _new(name: str, entry: Entry, check_finite: bool) -> Any:
    """The bytes of a whole parameter."""
    before = entry.values.detach().cpu()
    values = before.to(entry.dtype).contiguous()
    if check_finite and values.dtype != before.dtype:
        _still_finite(name, before, values, 1.0)
    return values.view(torch.uint8).numpy() if values.numel() else b""


def _parts(
    shard: Shard,
    changes: Mapping[Stored, Callable[[], Any]],
    added: Mapping[str, Entry],
    check_finite: bool,
    tell: Callable[[str, int], None],
) -> dict[str, _file.Part]:
    """The tensors of one shard in their order, followed by the added ones."""

    def pieces(name: str, nbytes: int, content: Callable[[], Any]) -> Iterator[Any]:
        data = content()
        for start in range(0, len(data), _PIECE):
            yield data[start : start + _PIECE]
        tell(name, nbytes)

    def part(name: str, dtype: str, shape: tuple[int, ...], nbytes: int, content: Callable[[], Any]) -> _file.Part:
        return _file.Part(dtype, shape, nbytes, partial(pieces, name, nbytes, content))

    parts = {
        name: part(name, stored.file_dtype, stored.shape, stored.nbytes, changes.get(stored, stored.bytes))
        for name, stored in shard.tensors.items()
    }
    # A tensor under an added name that the index does not list is replaced: no reader could find it.
    for name, entry in added.items():
        dtype = _file.DTYPES[dtype_name(entry.dtype)][0]
        parts[name] = part(
            name, dtype, entry.shape, entry.numel * entry.dtype.itemsize, partial(_new, name, entry, check_finite)
        )
    return parts


def bake(
    adapter: Adapter,
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    overwrite: bool = False,
    rename: _text.Rename = None,
    check_finite: bool = True,
    inputs: tuple[str | os.PathLike[str], ...] = (),
    progress: Progress | None = None,
) -> Merged:
    """Write the base with the adapter applied.

    A base that is one file becomes one file; a folder becomes a folder with the same shards and index, and the small
    files beside the weights (configuration, tokenizer) are copied. The target appears whole or not at all. At
    strength 1 a whole parameter (a new classifier head) replaces any content, and is added where the base has none: to
    the file, or to the last shard. If the base holds equal copies of a tied weight, all of them are written.

    Args:
        adapter: refused with `AdapterError` if it was made for another base.
        base: a ``.safetensors`` file or a checkpoint's folder.
        out: where to write; links are followed. Whatever is there already is refused without ``overwrite``, and with it
            too, unless an earlier merge wrote it and nothing was added. Inputs and folders that contain one are always
            refused.
        alpha: the strength; None: the adapter's.
        rename: how the adapter's names become the base's: patterns (`re.sub`) and their replacements, or a function.
        check_finite: refuse an adapter with NaN or inf, and entries that would become NaN or inf.
        inputs: other files that were read and must not be overwritten, such as the adapter's.
        progress: called with a tensor's name, the bytes done and the bytes in all.
    """
    check_adapter("bake: adapter", adapter)
    if isinstance(inputs, (str, os.PathLike)) or not isinstance(inputs, Iterable):
        raise TypeError(f"bake: inputs must be several paths, got {type(inputs).__name__}")
    inputs = tuple(_text.path("bake: inputs", one) for one in inputs)
    _text.path("bake: out", out)
    _text.function("bake: progress", progress)
    source = open_checkpoint(_text.path("bake: base", base), "base")
    if not source.shards:
        raise AdapterError(
            f"{source.where} is a checkpoint of torch.distributed.checkpoint, and the merged one is written in the "
            f"base's own files, which must be .safetensors; convert the base first"
        )
    target = _output.destination(
        out,
        overwrite,
        (base, *inputs),
        _output.no_merged_file if source.folder is None else _output.no_merged_folder,
        "say that it may be overwritten (--overwrite)",
    )
    strength = _text.strength("alpha", adapter.alpha if alpha is None else alpha)
    weights = _fit.renamed(adapter.weights, rename)
    places = _fitting(adapter, weights, source, strength, check_finite, rename is None)
    changes: dict[Stored, Callable[[], Any]] = {
        stored: partial(_put_on, stored, weights[name], strength, adapter.delta, check_finite)
        for name, copies in places.items()
        for stored in copies
    }
    new = [name for name, copies in places.items() if not copies]
    added = {source.prefix + name.removeprefix(source.prefix): weights[name] for name in new}
    done = 0

    def tell(name: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(name, done, total)

    last = source.shards[-1]
    shards = {
        shard.path: _parts(shard, changes, added if shard is last else {}, check_finite, tell)
        for shard in source.shards
    }
    total = sum(part.nbytes for parts in shards.values() for part in parts.values())
    with _output.named(target):
        if source.folder is None:
            with _file.replacing(target) as temporary:
                # Readers that take a file without metadata, such as accelerate, refuse metadata without a format.
                metadata = {"format": "pt", **last.metadata, _output.MARK_KEY: "1"}
                _file.write_safetensors(temporary, shards[last.path], metadata)
        else:
            with _output.replacing_folder(target, overwrite) as folder:
                for shard in source.shards:
                    path = folder / os.path.basename(shard.path)
                    _file.write_safetensors(path, shards[shard.path], shard.metadata)
                _write_rest(source, folder, added)
    return Merged(done, adapter.nnz, tuple(stored.name for stored in changes), tuple(new))


def _write_rest(source: Checkpoint, folder: Path, added: Mapping[str, Entry]) -> None:
    """Write what a folder holds besides its shards: the index, the small files, and the mark that we wrote it."""
    assert source.folder is not None
    if source.index is not None and source.index_name is not None:
        if added:
            text = json.dumps(_index(source, added), indent=2) + "\n"
            (folder / source.index_name).write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(Path(source.folder) / source.index_name, folder / source.index_name)
    for path in companions(source.folder):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(path, folder / path.name)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    (folder / _output.MARK).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def _index(source: Checkpoint, added: Mapping[str, Entry]) -> dict[str, Any]:
    """The index with the added parameters in the last shard."""
    assert source.index is not None
    shard = os.path.basename(source.shards[-1].path)
    index = {**source.index, "weight_map": {**source.index["weight_map"], **dict.fromkeys(added, shard)}}
    metadata = index.get("metadata")
    if isinstance(metadata, dict):
        more = {
            "total_size": sum(entry.numel * entry.dtype.itemsize for entry in added.values()),
            "total_parameters": sum(entry.numel for entry in added.values()),
        }
        known = {key: metadata[key] + count for key, count in more.items() if type(metadata.get(key)) is int}
        index["metadata"] = metadata | known
    return index


def _fitting(
    adapter: Adapter, weights: Mapping[str, Entry], source: Checkpoint, alpha: float, check_finite: bool, renames: bool
) -> dict[str, tuple[Stored, ...]]:
    """The tensors of the base that each weight stands for. Refuses what does not fit before anything is written."""
    who, where = "the adapter", source.where
    whole = _fit.indifferent(weights, adapter.delta, alpha)
    advice = _advice if renames else None
    places = _fit.fit(
        who, weights, source, where=where, than=f" than {where}", new=whole, anything=whole, advice=advice
    )
    codes = []
    for name, entry in weights.items():
        entry.check_indices(f"weight {name!r}")
        exact = alpha == 1 and not adapter.delta and entry.values.dtype == entry.dtype
        if not exact and dtype_name(entry.dtype) not in _file.ARITHMETIC:
            codes.append(f"{name!r} is {dtype_name(entry.dtype)}, which takes no strength other than 1")
    if codes:
        _fit.refuse(f"{who} does not fit {where}", codes)
    if check_finite:
        for name, entry in weights.items():
            entry.check_finite(f"weight {name!r}")
    return places


def _advice(rule: Mapping[str, str]) -> str:
    return f"rename={rule!r} ({_fit.flags(rule)})"


merge = bake  # its name in version 0.1
