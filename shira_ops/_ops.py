"""Loads the compiled module and gives the ops that it registers: `ops` is torch.ops.shira.

Nothing else in this package names the namespace. Hugging Face's kernel builder, which gives every build a namespace of
its own, writes another module in the place of this one, with the same two names (docs/kernel-builder.md).
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

_here = Path(__file__).parent


def _hidden_by_this() -> Path | None:
    """A built shira_ops elsewhere on the path, if this one is the bare sources and comes first."""
    others = (Path(entry).absolute() / "shira_ops" for entry in sys.path)
    return next((other for other in others if other != _here and any(other.glob("_C.*"))), None)


def _refuse_sources(installed: Path) -> NoReturn:
    raise ImportError(
        f"This shira_ops is the source folder {_here}, which has no compiled module, and it hides the installed one "
        f"in {installed}, since Python looks here first. Start Python in another folder; or, to work on the sources, "
        "run\n\n    pip install --no-build-isolation -e .\n"
    )


try:
    _compiled = Path(import_module("._C", __package__).__file__ or "").parent
    if _compiled != _here:  # from an editable install elsewhere: two versions would be mixed
        _refuse_sources(_compiled)
except ModuleNotFoundError as error:
    if error.name != f"{__package__}._C":
        raise
    if _installed := _hidden_by_this():
        _refuse_sources(_installed)
    raise ImportError(
        "shira_ops is here, but its compiled module shira_ops._C has not been built yet. In the repository, run\n\n"
        "    make setup\n\n"
        "or, in an environment that has torch already,\n\n"
        "    pip install --no-build-isolation -e .\n"
    ) from error
except ImportError as error:
    raise ImportError(
        f"shira_ops._C is built but does not load with this PyTorch ({torch.__version__}): {error}\n"
        "Most likely it was built in another environment or is out of date. Build it again here:\n\n"
        "    pip install --no-build-isolation -e .    # in the repository; or: make build\n"
    ) from error

ops: Any = torch.ops.shira


def add_op_namespace_prefix(op: str) -> str:
    """The full name of an op, as torch.library takes it: "swap_" is "shira::swap_"."""
    return f"{ops.name}::{op}"
