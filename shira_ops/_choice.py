"""What SHIRA_BACKEND asks for, read in this one place, before anything registers."""

from __future__ import annotations

import os


def _wanted() -> str:
    choices, choice = ("cuda", "triton", "reference"), os.environ.get("SHIRA_BACKEND", "")
    if choice not in ("", *choices):
        raise ValueError(f"SHIRA_BACKEND must be one of {', '.join(choices)} or not set, got {choice!r}")
    return choice


# Empty where it is not set. The compiled kernels, which register themselves as they are loaded, ask the same in
# csrc/checks.h; what follows from it is decided in backend.py.
WANTED = _wanted()
