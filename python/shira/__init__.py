"""SHiRA: train 1-2 % of a model's weights, store them small, switch them in place, take them back bit for bit.

Everything here is imported on first use, so ``import shira`` is fast and needs no torch::

    tuner = shira.SparseTuner(model, shira.masks.Rand(density=0.01, granule=16), targets=r"(q|v)_proj$")
    optimizer = shira.AdamW(tuner, lr=5e-4)
    ...                                             # an ordinary training loop
    tuner.adapter().save("style.safetensors")
    tuner.detach()                                  # the base is back, bit for bit

    switcher = shira.Switcher(model)
    switcher.add("style", "style.safetensors")
    switcher.activate("style", alpha=0.8)
    switcher.deactivate()
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from shira import _moved

if TYPE_CHECKING:
    from shira import masks, metrics, sync
    from shira._live import SwitchError
    from shira._text import AdapterError
    from shira.adapter import combine
    from shira.adapter import combine as merging
    from shira.adapter._entry import Entry
    from shira.adapter.adapter import Adapter
    from shira.serve.overlay import Overlay
    from shira.serve.switcher import Switcher
    from shira.train.dora import DoRATuner
    from shira.train.estimate import Estimate, estimate
    from shira.train.optim import SGD, AdamW
    from shira.train.trainer import Trainer
    from shira.train.tuner import SparseTuner, detach

    __version__: str

__all__ = [
    "SGD",
    "AdamW",
    "Adapter",
    "AdapterError",
    "DoRATuner",
    "Entry",
    "Estimate",
    "Overlay",
    "SparseTuner",
    "SwitchError",
    "Switcher",
    "Trainer",
    "combine",
    "detach",
    "estimate",
    "masks",
    "merging",
    "metrics",
    "sync",
]

# Public name -> the module it lives in, and its name there (None: the module itself).
_HOMES: dict[str, tuple[str, str | None]] = {
    "Adapter": ("shira.adapter.adapter", "Adapter"),
    "AdapterError": ("shira._text", "AdapterError"),
    "AdamW": ("shira.train.optim", "AdamW"),
    "DoRATuner": ("shira.train.dora", "DoRATuner"),
    "Entry": ("shira.adapter._entry", "Entry"),
    "Estimate": ("shira.train.estimate", "Estimate"),
    "Overlay": ("shira.serve.overlay", "Overlay"),
    "SGD": ("shira.train.optim", "SGD"),
    "SparseTuner": ("shira.train.tuner", "SparseTuner"),
    "SwitchError": ("shira._live", "SwitchError"),
    "Switcher": ("shira.serve.switcher", "Switcher"),
    "Trainer": ("shira.train.trainer", "Trainer"),
    "combine": ("shira.adapter.combine", None),
    "detach": ("shira.train.tuner", "detach"),
    "estimate": ("shira.train.estimate", "estimate"),
    "masks": ("shira.masks", None),
    "merging": ("shira.adapter.combine", None),  # its name in version 0.1
    "metrics": ("shira.metrics", None),
    "sync": ("shira.sync", None),
}

if not any(isinstance(finder, _moved.Moved) for finder in sys.meta_path):
    sys.meta_path.append(_moved.Moved())


def _imported(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("shira-ops")
    elif name in _HOMES:
        home, member = _HOMES[name]
        module = importlib.import_module(home)
        value = module if member is None else getattr(module, member)
    elif f"shira.{name}" in _moved.NAMES:
        # In version 0.1 these were attributes once anything had imported them, such as the use of `shira.Switcher`.
        value = importlib.import_module(f"shira.{name}")
    else:
        raise AttributeError(f"module 'shira' has no attribute {name!r}")
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # to a type checker, a module with this function has every name, the misspelt ones too
    __getattr__ = _imported


def __dir__() -> list[str]:
    # The public names, and what Python and imports of submodules have put here; not what this file imports for itself.
    here = (name for name in globals() if name.startswith("__") or f"shira.{name}" in sys.modules)
    return sorted({*__all__, "__version__", *here})
