"""Modules under the names they had in version 0.1, so that old imports and pickles still find them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

NAMES = {
    "shira.calibration": "shira.masks.calibration",
    "shira.difference": "shira.adapter.difference",
    "shira.hub": "shira.adapter.hub",
    "shira.mask": "shira.masks.masks",
    "shira.merge": "shira.adapter.bake",
    "shira.merging": "shira.adapter.combine",
    "shira.optim": "shira.train.optim",
    "shira.peft": "shira.adapter._peft",
    "shira.switcher": "shira.serve.switcher",
    "shira.trainer": "shira.train.trainer",
    "shira.tuner": "shira.train.tuner",
}


class Moved(MetaPathFinder, Loader):
    """Gives the module of today for a name of `NAMES`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in NAMES else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(NAMES[module.__name__])
