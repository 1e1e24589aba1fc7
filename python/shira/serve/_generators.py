"""Generators that open a `with` block, and wait at a yield while other code runs.

A context variable belongs to a thread or task. What a generator sets there stays set while it waits: two generators
that take turns, each inside a block of its own, would both see the block that was opened last.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from types import FrameType

_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_CONTEXTS = contextlib.contextmanager.__code__.co_filename


def innermost() -> int | None:
    """The innermost generator that the caller runs in, as a number for `is_running`; None outside of generators.

    Generators that were made into context managers don't count: what they open is for the code in their ``with`` block.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        back = frame.f_back
        if frame.f_code.co_flags & _GENERATORS and (back is None or back.f_code.co_filename != _CONTEXTS):
            # A number keeps nothing alive. The frame lives as long as its generator, and that as long as the block.
            return id(frame)
        frame = back
    return None


def is_running(generator: int) -> bool:
    """Whether the caller runs in this generator."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if id(frame) == generator:
            return True
        frame = frame.f_back
    return False
