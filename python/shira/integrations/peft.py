"""PEFT's adapters: its SHiRA read and written, its LoRA read as the largest entries of ``B @ A``. Without PEFT."""

from __future__ import annotations

from shira.adapter.adapter import Adapter

__all__ = ["from_peft", "to_peft"]

from_peft = Adapter.from_peft
"""`Adapter.from_peft`, as a function."""

to_peft = Adapter.to_peft
"""`Adapter.to_peft`, as a function whose first argument is the adapter."""
