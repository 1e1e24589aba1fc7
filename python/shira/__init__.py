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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shira import mask as masks
    from shira import merging, metrics
    from shira._file import AdapterError
    from shira.adapter import Adapter, Entry
    from shira.optim import SGD, AdamW
    from shira.switcher import Switcher, SwitchError
    from shira.trainer import Trainer
    from shira.tuner import SparseTuner, detach

__all__ = [
    "SGD",
    "AdamW",
    "Adapter",
    "AdapterError",
    "Entry",
    "SparseTuner",
    "SwitchError",
    "Switcher",
    "Trainer",
    "detach",
    "masks",
    "merging",
    "metrics",
]

# Public name -> the module it lives in, and its name there (None: the module itself).
_HOMES: dict[str, tuple[str, str | None]] = {
    "Adapter": ("shira.adapter", "Adapter"),
    "AdapterError": ("shira._file", "AdapterError"),
    "AdamW": ("shira.optim", "AdamW"),
    "Entry": ("shira.adapter", "Entry"),
    "SGD": ("shira.optim", "SGD"),
    "SparseTuner": ("shira.tuner", "SparseTuner"),
    "SwitchError": ("shira.switcher", "SwitchError"),
    "Switcher": ("shira.switcher", "Switcher"),
    "Trainer": ("shira.trainer", "Trainer"),
    "detach": ("shira.tuner", "detach"),
    "masks": ("shira.mask", None),
    "merging": ("shira.merging", None),
    "metrics": ("shira.metrics", None),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("shira-ops")
    elif name in _HOMES:
        home, member = _HOMES[name]
        module = importlib.import_module(home)
        value = module if member is None else getattr(module, member)
    else:
        raise AttributeError(f"module 'shira' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])
