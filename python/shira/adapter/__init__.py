"""Adapters: what they are, their files, and what they are made from and turned into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shira._text import AdapterError
    from shira.adapter._entry import Entry
    from shira.adapter.adapter import Adapter

__all__ = ["Adapter", "AdapterError", "Entry"]


def __getattr__(name: str) -> Any:  # on first use, since the modules of this folder that read files need no torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from shira.adapter import adapter

    return getattr(adapter, name)
