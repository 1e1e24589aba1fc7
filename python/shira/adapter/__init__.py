"""What an adapter is, its file, and what it is made from and turned into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shira._text import AdapterError
    from shira.adapter._entry import Entry
    from shira.adapter.adapter import Adapter

__all__ = ["Adapter", "AdapterError", "Entry"]


def __getattr__(name: str) -> Any:  # on first use: a file is read without torch, by the modules of this folder too
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import shira

    return getattr(shira, name)
