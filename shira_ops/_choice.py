"""What SHIRA_BACKEND asks for, read in this one place, and before anything registers."""

from __future__ import annotations

import os

CHOICES = ("cuda", "triton", "reference")


def wanted() -> str | None:
    """What SHIRA_BACKEND asks for; None where it is not set."""
    choice = os.environ.get("SHIRA_BACKEND", "")
    if choice and choice not in CHOICES:
        raise ValueError(f"SHIRA_BACKEND must be one of {', '.join(CHOICES)} or not set, got {choice!r}")
    return choice or None
