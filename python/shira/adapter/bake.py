"""A merged checkpoint: the base's files written anew with an adapter put on, tensor by tensor.

Nothing but one tensor is in memory, shards stay shards, and the result takes its place only when all of it is written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import shira_ops
from shira import _text
from shira._granules import dtype_name
from shira._text import AdapterError
from shira.adapter import _file, _output
from shira.adapter._checkpoint import (
    Checkpoint,
    Shard,
    Stored,
    companions,
    fit,
    open_checkpoint,
    renamed,
    whole_overwrites,
)
from shira.adapter._entry import Entry
from shira.adapter.adapter import Adapter

Progress = Callable[[str, int, int], None]

_PIECE = 64 << 20


@dataclass(frozen=True)
class Merged:
    """What `merge` has written."""

    nbytes: int  # of tensors
    entries: int  # that the adapter changes
    tensors: tuple[str, ...]  # the names of those that were changed
    added: tuple[str, ...]  # whole parameters that the base did not have


def _put_on(stored: Stored, entry: Entry, alpha: float, delta: bool, check_finite: bool) -> Any:
    """The tensor's bytes with the adapter on."""
    weight = stored.tensor().clone()
    indices, values = entry.indices.cpu(), entry.values.detach().cpu()
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
    """Refuse what became infinite: values may be finite and their sum beyond what the dtype holds."""
    lost = int((before.isfinite() & ~now.isfinite()).sum())
    if lost:
        raise AdapterError(
            f"{name!r}: {lost:,} entries would become inf or NaN in {dtype_name(now.dtype)} at strength {alpha:g}; "
            f"use a smaller strength, or check_finite=False (--allow-nonfinite)"
        )


def _new(name: str, entry: Entry, check_finite: bool) -> Any:
    """A whole parameter's bytes."""
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
    """One shard's tensors in its own order, and what comes to them."""

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
    # A copy under an added name that the index maps to no shard goes: no reader knew it.
    for name, entry in added.items():
        dtype = _file.DTYPES[dtype_name(entry.dtype)][0]
        parts[name] = part(
            name, dtype, entry.shape, entry.numel * entry.dtype.itemsize, partial(_new, name, entry, check_finite)
        )
    return parts


def merge(
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
    """Write the base with the adapter on.

    A base that is one file becomes one file; a folder becomes a folder with the same shards and index, and the small
    files beside the weights (configuration, tokenizer) are copied. The target appears whole or not at all. A whole
    parameter at strength 1 (a fresh classifier head) goes onto any content, and is added where the base has none: to
    the file, or to the last shard. A tied weight of which the base holds equal copies is written in all of them.

    Args:
        adapter: refused with `AdapterError` if it was made for another base.
        base: a ``.safetensors`` file or a checkpoint's folder.
        out: where to write; a link is followed. What is there already is refused, unless ``overwrite``, and then unless
            it is what an earlier merge wrote and nothing else. Never an input, nor a folder that contains one.
        alpha: the strength; None: the adapter's.
        rename: from the adapter's names to the base's: patterns (`re.sub`) to replacements, or a function.
        check_finite: refuse an adapter with NaN or inf, and entries that would become so.
        inputs: what else was read, never to be overwritten: the adapter's file.
        progress: called with a tensor's name, the bytes done and the bytes in all.
    """
    source = open_checkpoint(os.fspath(base), "base")
    target = _output.destination(
        out,
        overwrite,
        (base, *inputs),
        _output.no_merged_file if source.folder is None else _output.no_merged_folder,
        "say that it may be overwritten (--overwrite)",
    )
    strength = _text.strength("alpha", adapter.alpha if alpha is None else alpha)
    weights = renamed(adapter.weights, rename)
    places = _fitting(adapter, weights, source, strength, check_finite)
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
                _file.write_safetensors(temporary, shards[last.path], {**last.metadata, _output.MARK_KEY: "1"})
        else:
            with _output.replacing_folder(target, overwrite) as folder:
                for shard in source.shards:
                    path = folder / os.path.basename(shard.path)
                    _file.write_safetensors(path, shards[shard.path], shard.metadata)
                _write_rest(source, folder, added)
    return Merged(done, adapter.nnz, tuple(stored.name for stored in changes), tuple(new))


def _write_rest(source: Checkpoint, folder: Path, added: Mapping[str, Entry]) -> None:
    """What a folder holds beside its shards: the index, the small files, and the mark that it is ours."""
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
    adapter: Adapter, weights: Mapping[str, Entry], source: Checkpoint, alpha: float, check_finite: bool
) -> dict[str, tuple[Stored, ...]]:
    """The base's tensors that each weight is; refuses before anything is written."""
    places, problems = fit(
        {
            name: (entry.shape, dtype_name(entry.dtype), entry.fingerprint, entry.aliases)
            for name, entry in weights.items()
        },
        source,
        whole_overwrites(weights, adapter.delta, alpha),
    )
    for name, entry in weights.items():
        entry.check_indices(f"weight {name!r}")
        exact = alpha == 1 and not adapter.delta and entry.values.dtype == entry.dtype
        if not exact and dtype_name(entry.dtype) not in _file.ARITHMETIC:
            problems.append(f"{name!r} is {dtype_name(entry.dtype)}, which takes no strength other than 1")
    if problems:
        from shira import _model

        raise AdapterError(f"the adapter does not fit {source.where}: {_model.some(problems)}")
    if check_finite:
        for name, entry in weights.items():
            entry.check_finite(f"weight {name!r}")
    return places
