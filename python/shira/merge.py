"""A merged checkpoint: the base's files written anew with an adapter put on, tensor by tensor.

Nothing but one tensor is in memory, shards stay shards, and the result takes its place only when all of it is written.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

import shira_ops
from shira import _file
from shira._checkpoint import Checkpoint, Shard, Stored, companions, misfits, open_checkpoint
from shira._file import AdapterError
from shira.adapter import Adapter, Entry, dtype_name

Progress = Callable[[str, int, int], None]

# safetensors' names of what torch can hold, and of what is only copied.
_NAMES = {torch_name: name for torch_name, (name, _) in _file.DTYPES.items()}
_PIECE = 64 << 20


@contextmanager
def replacing_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a fresh folder beside ``target``; on success it takes its place, whole, and on failure it goes."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    old = temporary.with_suffix(".old")
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            assert overwrite
            os.replace(target, old)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists():
            if target.exists():
                shutil.rmtree(old)
            else:  # the last step failed: what was there comes back
                os.replace(old, target)


def _put_on(stored: Stored, entry: Entry, alpha: float, delta: bool) -> Any:
    """The tensor's bytes with the adapter on."""
    weight = stored.tensor().clone()
    indices, values = entry.indices.cpu(), entry.values.detach().cpu()
    if alpha == 1 and not delta and values.dtype == weight.dtype:
        shira_ops.scatter_(weight, indices, values, granule=entry.granule)
    else:
        saved = torch.empty(entry.nnz, dtype=weight.dtype, device="cpu")
        shira_ops.apply_(weight, indices, values, saved, alpha=alpha, delta=delta, granule=entry.granule)
    return weight.view(torch.uint8).numpy() if weight.numel() else b""


def _write(shard: Shard, path: Path, changes: dict[str, Callable[[], Any]], tell: Callable[[Stored], None]) -> None:
    """One shard in its own order, with its own metadata."""

    def pieces(stored: Stored) -> Iterator[Any]:
        data = changes[stored.name]() if stored.name in changes else stored.bytes()
        for start in range(0, len(data), _PIECE):
            yield data[start : start + _PIECE]
        tell(stored)

    parts = {
        stored.name: _file.Part(
            _NAMES.get(stored.dtype, stored.dtype.upper()), stored.shape, stored.nbytes, partial(pieces, stored)
        )
        for stored in shard.tensors.values()
    }
    with _file.replacing(path) as temporary:
        _file.write_safetensors(temporary, parts, shard.metadata)


def merge(
    adapter: Adapter,
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write the base with the adapter on; returns the bytes of tensors written.

    A base that is one file becomes one file; a folder becomes a folder with the same shards and index, and the small
    files beside the weights (configuration, tokenizer) are copied. The target appears whole or not at all.

    Args:
        adapter: refused with `AdapterError` if it was made for another base.
        base: a ``.safetensors`` file or a checkpoint's folder.
        out: what must not exist, unless ``overwrite``.
        alpha: the strength; None: the adapter's.
        progress: called with a tensor's name, the bytes done and the bytes in all.
    """
    source = open_checkpoint(os.fspath(base), "base")
    target = Path(out)
    strength = adapter.alpha if alpha is None else float(alpha)
    _check(adapter, source, target, overwrite, strength)
    changes: dict[str, Callable[[], Any]] = {}
    for name, entry in adapter.weights.items():
        for known in (name, *entry.aliases):
            if known in source.tensors:
                stored = source.tensors[known]
                changes[known] = partial(_put_on, stored, entry, strength, adapter.delta)
    total, done = sum(stored.nbytes for shard in source.shards for stored in shard.tensors.values()), 0

    def tell(stored: Stored) -> None:
        nonlocal done
        done += stored.nbytes
        if progress is not None:
            progress(stored.name, done, total)

    if source.folder is None:
        _write(source.shards[0], target, changes, tell)
        return done
    with replacing_folder(target, overwrite) as folder:
        for shard in source.shards:
            _write(shard, folder / os.path.basename(shard.path), changes, tell)
        if source.index_name is not None:
            shutil.copyfile(Path(source.folder) / source.index_name, folder / source.index_name)
        for path in companions(source.folder):
            shutil.copyfile(path, folder / path.name)
    return done


def _check(adapter: Adapter, source: Checkpoint, target: Path, overwrite: bool, alpha: float) -> None:
    """Refuse before anything is written."""
    if target.exists() and not overwrite:
        raise AdapterError(f"{target} is there already; give another name, or say that it may be overwritten")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder {str(target.parent)!r} to write {target.name!r} into does not exist")
    origin = Path(source.folder or source.shards[0].path)
    if target.exists() and (target.samefile(origin) or origin.resolve() in target.resolve().parents):
        raise AdapterError(f"{target} is the base itself; write the merged one elsewhere")
    if target.exists() and target.is_dir() != (source.folder is not None):
        kinds = ("a folder", "a file") if target.is_dir() else ("a file", "a folder")
        raise AdapterError(f"{target} is {kinds[0]}, and the merged checkpoint is {kinds[1]}")
    problems = misfits(
        {
            name: (entry.shape, dtype_name(entry.dtype), entry.fingerprint, entry.aliases)
            for name, entry in adapter.weights.items()
        },
        source,
    )
    for name, entry in adapter.weights.items():
        entry.check_indices(f"weight {name!r}")
        exact = alpha == 1 and not adapter.delta and entry.values.dtype == entry.dtype
        if not exact and dtype_name(entry.dtype) not in _file.ARITHMETIC:
            problems.append(f"{name!r} is {dtype_name(entry.dtype)}, which takes no strength other than 1")
    if problems:
        from shira import _model

        raise AdapterError(f"the adapter does not fit {source.where}: {_model.some(problems)}")
