"""Sparse weight deltas for PyTorch: the ops. `import shira_ops` registers torch.ops.shira.*.

The functions here are the ops, typed and documented (`shira_ops.ops` has the words they share); `backends()` says
what serves each. The library that trains, saves and switches adapters with them is `shira`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import NoReturn

try:
    import torch
except ModuleNotFoundError as error:
    raise ImportError(
        "shira_ops needs PyTorch 2.11 or newer, and there is none in this environment. Install it first:\n\n"
        "    pip install 'torch>=2.11'\n"
    ) from error

from . import backend  # first: a misspelt SHIRA_BACKEND is an error before anything registers

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise ImportError(
        f"shira_ops needs PyTorch 2.11 or newer; this environment has {torch.__version__}. Upgrade it, then build "
        "shira_ops again:\n\n"
        "    pip install -U 'torch>=2.11'\n"
        "    pip install --no-build-isolation .\n"
    )

_here = Path(__file__).parent


def _hidden_by_this() -> Path | None:
    """Another shira_ops on the path, one that was built, where this one is the bare sources and comes first."""
    others = (Path(entry).absolute() / "shira_ops" for entry in sys.path)
    return next((other for other in others if other != _here and any(other.glob("_C.*"))), None)


def _refuse_sources(installed: Path) -> NoReturn:
    raise ImportError(
        f"This shira_ops is the source folder {_here}, which has no compiled module, and it hides the installed one "
        f"in {installed}, since Python looks here first. Start Python in another folder; or, to work on the sources, "
        "run\n\n    pip install --no-build-isolation -e .\n"
    )


try:
    _compiled = Path(import_module("shira_ops._C").__file__ or "").parent
    if _compiled != _here:  # of an editable install elsewhere: two versions would be mixed
        _refuse_sources(_compiled)
except ModuleNotFoundError as error:
    if error.name != "shira_ops._C":
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

from . import autograd, fake, ops  # noqa: E402
from .backend import Backend, backends  # noqa: E402
from .ops import *  # noqa: E402, F403

fake.register()
autograd.register()
backend.register()

__all__ = ["Backend", "backends", *ops.__all__]
