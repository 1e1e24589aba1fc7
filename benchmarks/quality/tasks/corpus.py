"""Text that comes with every Python: its standard library and documentation, its C headers, Unicode's names.

Unicode's names are those of version 3.2, which every Python carries: the same text everywhere. The rest is that of the
Python that runs, so results hold a task's `provenance`, which shows whether two machines had the same data.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import sysconfig
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

Row = TypeVar("Row")
SPLITS = {"test": 0.25, "validation": 0.15, "train": 0.6}

# Left out, so that Pythons differ less: what distributions package on their own, what newer versions have dropped, what
# is generated for one machine; and tables of characters, whose names are a task of their own.
_OMITTED = {
    "__pycache__", "distutils", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3", "pydoc_data",
    "site-packages", "dist-packages", "test", "tests", "tkinter", "turtledemo",
}  # fmt: skip


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def provenance(texts: Iterable[str]) -> dict[str, str]:
    """The Python whose text it is, and a hash that is the same for the same texts in the same order."""
    total = hashlib.sha256()
    for text in texts:
        total.update(digest(text).encode())
    return {"python": platform.python_version(), "sha256": total.hexdigest()[:16]}


def _read(root: Path, pattern: str, keep: Callable[[Path], bool] = lambda _: True) -> dict[str, str]:
    """Files below a folder: text by relative path, in the order of the paths."""
    paths = sorted(path.relative_to(root) for path in root.rglob(pattern))
    texts = {}
    for path in filter(keep, paths):
        try:
            texts[path.as_posix()] = (root / path).read_text("utf-8")
        except UnicodeDecodeError:
            continue
    return texts


@functools.cache
def library() -> dict[str, str]:
    """The standard library's Python sources."""

    def keep(path: Path) -> bool:
        return not (_OMITTED & set(path.parts) or path.parts[0].startswith(("config-", "_sysconfigdata")))

    return _read(Path(sysconfig.get_path("stdlib")), "*.py", keep)


@functools.cache
def documentation() -> dict[str, str]:
    """The language reference, as ``help()`` shows it: plain text by topic."""
    from pydoc_data.topics import topics

    return dict(sorted(topics.items()))


@functools.cache
def headers() -> dict[str, str]:
    """Python's C headers, without the one that is written for each machine."""
    return _read(Path(sysconfig.get_path("include")), "*.h", lambda path: path.name != "pyconfig.h")


@functools.cache
def characters() -> list[tuple[int, str, str]]:
    """Code point, name and category of the characters of Unicode 3.2 that have a name of their own."""
    frozen, found = unicodedata.ucd_3_2_0, []
    for code in range(0x1D800):
        name = frozen.name(chr(code), "")
        # The names of the others are their numbers, or follow a rule.
        if name and not any(series in name for series in ("IDEOGRAPH", "HANGUL SYLLABLE", "YI SYLLABLE")):
            found.append((code, name, frozen.category(chr(code))))
    return found


def divided(
    documents: Mapping[str, list[Row]],
    kind: Callable[[Row], str] = lambda _: "",
    same: Callable[[Row], Hashable] = lambda row: row,
) -> dict[str, list[Row]]:
    """Rows by split, whole documents at a time, in an order that depends only on the documents' names.

    Documents are divided kind by kind (a document's kind is that of most of its rows), so that every split has some of
    each. Of rows that are the ``same`` only the first is kept, so none is in two splits.
    """
    seen: set[Hashable] = set()
    unique: dict[str, list[Row]] = {}
    for name in sorted(documents, key=digest):
        first: dict[Hashable, Row] = {}
        for row in documents[name]:
            first.setdefault(same(row), row)
        unique[name] = [row for known, row in first.items() if known not in seen]
        seen.update(first)
    groups: dict[str, list[str]] = {}
    for name, rows in unique.items():
        if rows:
            kinds = [kind(row) for row in rows]
            groups.setdefault(max(sorted(set(kinds)), key=kinds.count), []).append(name)
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for names in groups.values():
        total, done = sum(len(unique[name]) for name in names), 0
        for name in names:
            reached, within = 0.0, "train"
            for split, share in SPLITS.items():
                reached += share
                if done < reached * total:
                    within = split
                    break
            splits[within] += unique[name]
            done += len(unique[name])
    return splits
