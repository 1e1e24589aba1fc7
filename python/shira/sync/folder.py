"""`Folder`: updates as files that anybody who sees the folder can follow."""

from __future__ import annotations

import os
import re
from pathlib import Path

from shira.sync.update import SyncError, Update, shown_version

_NAME = re.compile(r"(\d{12})-([0-9a-f]{16})-([0-9a-f]{16})\.safetensors")


class Folder:
    """Updates in a folder, one file each, named by step and versions: ``000000000012-START-END.safetensors``.

    A file appears whole or not at all, so that readers may look at any time, on a network share too. Nothing is
    deleted: how long updates are kept is for the user to say.

    Args:
        path: the folder; made where it does not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)

    def __repr__(self) -> str:
        return f"Folder({str(self.path)!r})"

    def put(self, update: Update) -> Path:
        """Write an update, and return its file. One that changes nothing is written too: its step counts."""
        if not isinstance(update, Update):
            raise TypeError(f"Folder.put: update must be an Update, got {type(update).__name__}")
        if not 0 <= update.step < 10**12:
            raise SyncError(f"Folder: step must be below 10^12, got {update.step}")
        name = f"{update.step:012}-{shown_version(update.start)}-{shown_version(update.end)}.safetensors"
        update.save(self.path / name)
        return self.path / name

    def since(self, version: int) -> list[Update]:
        """The updates that lead on from a version to the newest one that can be reached, in order; read and checked.

        Empty where no update starts there, be it the newest version or one that the folder does not know (`knows`).
        Of two continuations, as after a trainer that went back to a checkpoint, the one that was written later counts.
        """
        starts: dict[int, tuple[tuple[int, int], int, str]] = {}
        for name, step, start, end in self._names():
            try:
                age = ((self.path / name).stat().st_mtime_ns, step)
            except FileNotFoundError:
                continue  # deleted since it was listed
            if start != end and (start not in starts or age > starts[start][0]):
                starts[start] = (age, end, name)
        way: list[str] = []
        versions, newest = [version], ((-1, -1), version)
        while version in starts:
            age, version, name = starts.pop(version)
            way.append(name)
            versions.append(version)
            newest = max(newest, (age, version))
        # Where it comes back to weights that were there before, the newest version is not the last one of the way.
        return [
            self._read(name, end) for name, end in zip(way[: versions.index(newest[1])], versions[1:], strict=False)
        ]

    def _read(self, name: str, end: int) -> Update:
        update = Update.load(self.path / name)
        if update.end != end:
            raise SyncError(f"Folder: {self.path / name} leads to another version than its name says")
        return update

    def knows(self, version: int) -> bool:
        """Whether an update of the folder starts or ends at this version."""
        return any(version in (start, end) for _, _, start, end in self._names())

    def _names(self) -> list[tuple[str, int, int, int]]:
        matches = (_NAME.fullmatch(name) for name in sorted(os.listdir(self.path)))
        return [(match[0], int(match[1]), int(match[2], 16), int(match[3], 16)) for match in matches if match]
