"""Sparse weight deltas for PyTorch: the ops. `import shira_ops` registers torch.ops.shira.*.

The functions here are the ops, typed and documented (`shira_ops.ops` has the words they share); `backends()` says
what serves each. The library that trains, saves and switches adapters with them is `shira`.
"""

from __future__ import annotations

try:
    import torch
except ModuleNotFoundError as error:
    raise ImportError(
        "shira_ops needs PyTorch 2.11 or newer, and there is none in this environment. Install it first:\n\n"
        "    pip install 'torch>=2.11'\n"
    ) from error

from . import _choice  # noqa: F401 (a misspelt SHIRA_BACKEND is an error before anything registers)

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise ImportError(
        f"shira_ops needs PyTorch 2.11 or newer; this environment has {torch.__version__}. Upgrade it, then build "
        "shira_ops again:\n\n"
        "    pip install -U 'torch>=2.11'\n"
        "    pip install --no-build-isolation .\n"
    )

from . import autograd, backend, fake, ops
from .backend import Backend, backends
from .ops import *  # noqa: F403

fake.register()
autograd.register()
backend.register()

__all__ = ["Backend", "backends", *ops.__all__]
