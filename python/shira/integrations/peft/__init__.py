"""PEFT: its files read and written, its sparse layers on our ops, and a method of our own among PEFT's.

- `from_peft` and `to_peft` read and write PEFT's folders. They do not need PEFT.
- `accelerate` lets the SHiRA and Super-Tuning layers of a PEFT model run on the ops, and `restore` takes it back.
- `SparseConfig` is a PEFT method: ``peft.get_peft_model(model, SparseConfig(density=0.01))``. Importing this module
  registers it, also for ``peft.PeftModel.from_pretrained`` on a folder of it.
"""

from __future__ import annotations

from typing import NoReturn

from shira.adapter.adapter import Adapter

__all__ = ["SparseConfig", "SparseModel", "accelerate", "from_peft", "restore", "to_peft"]

from_peft = Adapter.from_peft
"""`Adapter.from_peft`, as a function."""

to_peft = Adapter.to_peft
"""`Adapter.to_peft`, as a function whose first argument is the adapter."""

try:
    from shira.integrations.peft._accelerate import accelerate, restore
    from shira.integrations.peft._method import SparseConfig, SparseModel
except ImportError as error:
    _missing = error

    def __getattr__(name: str) -> NoReturn:
        if name in __all__:
            raise ImportError(
                f"shira.integrations.peft.{name} needs peft 0.21 or newer ({_missing}); install it with: "
                f"pip install 'peft>=0.21'"
            ) from _missing
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
