"""Every family of tasks, and the module that makes it (imported on use, since each needs packages of its own)."""

from __future__ import annotations

import functools
import importlib

from benchmarks.quality.task import Task

FAMILIES = {
    "digits-mlp": "digits",
    "digits-vit": "digits",
    "digits-mlp-128": "digits",
    "digits-mlp-1024": "digits",
    "minilm": "minilm",
    "smollm2": "smollm2",
    "smollm2-more": "smollm2",
    "smollm2-kin": "smollm2",
    "style": "style",
    "gpt-s": "gpt",
    "gpt-m": "gpt",
    "gpt-l": "gpt",
    "rl": "rl",
}


@functools.cache
def tasks(family: str) -> dict[str, Task]:
    """The tasks of a family by name, from near to far; each module has ``tasks(family) -> list[Task]``."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    module = importlib.import_module(f"{__name__}.{FAMILIES[family]}")
    return {task.name: task for task in module.tasks(family)}


def task(name: str) -> Task:
    """The task of this name, ``family/what``."""
    found = tasks(name.partition("/")[0])
    if name not in found:
        raise ValueError(f"task must be one of {', '.join(found)}, got {name!r}")
    return found[name]
