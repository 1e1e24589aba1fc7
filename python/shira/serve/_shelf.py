"""The files of adapters that a `Switcher` does not keep in memory: its own, and those it writes for want of room."""

from __future__ import annotations

import os
import platform
import re
import secrets
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from shira._text import AdapterError
from shira.adapter import _file
from shira.adapter.adapter import Adapter

Stamp = tuple[int, int, int, int]

_SPILLED = "shira-spilled-"


def stamp_of(file: Path) -> Stamp:
    """What tells that a file was written again, or that another has its name."""
    found = file.stat()
    return found.st_mtime_ns, found.st_size, found.st_dev, found.st_ino


def own(adapter: Adapter) -> Adapter:
    """The adapter with values in memory of their own; those of a loaded one are in its mapped file."""
    for entry in adapter.weights.values():
        storage = entry.values.untyped_storage()
        # Memory that torch did not allocate itself cannot be resized.
        if storage.nbytes() != entry.values.nbytes or not storage.resizable():
            return _copied(adapter)
    return adapter


def load(file: Path, stamp: Stamp | None) -> Adapter:
    """An adapter in memory of its own: a mapped file would show what is written to it later, or end under us."""
    adapter = _copied(Adapter.load(file))
    if stamp_of(file) != stamp:
        raise AdapterError(f"{file} was written to while it was read; try again when that is done")
    return adapter


def _copied(adapter: Adapter) -> Adapter:
    weights = {name: replace(entry, values=entry.values.detach().clone()) for name, entry in adapter.weights.items()}
    return Adapter(
        weights,
        alpha=adapter.alpha,
        delta=adapter.delta,
        mask=adapter.mask,
        provenance=adapter.provenance,
        report=adapter.report,
    )


def node() -> str:
    """This machine's name, as a part of a file's."""
    return re.sub(r"[^A-Za-z0-9]", "", platform.node())


def spilled(folder: Path) -> Path:
    """A name for an adapter that leaves; it tells whose it is."""
    return folder.absolute() / f"{_SPILLED}{node()}-{os.getpid()}-{secrets.token_hex(8)}.safetensors"


def sweep(folder: Path) -> None:
    """Delete what processes of this machine left in the folder when they were killed."""
    if os.name != "posix":
        return  # there, asking whether a process lives would end it
    for file in folder.glob(f"{_SPILLED}{node()}-*.safetensors"):
        process = re.fullmatch(rf"{_SPILLED}{node()}-(\d+)-[0-9a-f]{{16}}\.safetensors", file.name)
        if process is not None and not _file.lives(int(process[1])):
            with suppress(OSError):
                file.unlink()
