"""Modules under their names of version 0.1, so that old imports and pickles still find them; and under public ones."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

NAMES = {
    "shira.combine": "shira.adapter.combine",  # as `shira.combine` is
    "shira.calibration": "shira.masks.calibration",
    "shira.difference": "shira.adapter.difference",
    "shira.hub": "shira.adapter.hub",
    "shira.mask": "shira.masks.masks",
    "shira.merge": "shira.adapter.bake",
    "shira.merging": "shira.adapter.combine",
    "shira.optim": "shira.train.optim",
    "shira.peft": "shira.integrations.peft",
    "shira.switcher": "shira.serve.switcher",
    "shira.trainer": "shira.train.trainer",
    "shira.tuner": "shira.train.tuner",
}


class Moved(MetaPathFinder, Loader):
    """Finds the module of today for a name in `NAMES`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in NAMES else None

    def exec_module(self, module: ModuleType) -> None:
        now = import_module(NAMES[module.__name__])
        if module.__name__ == "shira.difference":
            # In version 0.1 the function `difference` returned an adapter; today's returns the parts of one.
            module.__dict__.update({name: getattr(now, name) for name in ("Lost", "Progress", "Report")})
            module.__dict__["difference"] = import_module("shira.adapter.adapter").Adapter.from_difference
        else:
            sys.modules[module.__name__] = now
