"""The ops as Triton kernels, for a GPU where the build had no CUDA toolkit.

One module per family, named as in csrc/. Nothing here imports triton: `find` does, when an op is first called. If
TRITON_INTERPRET=1 is set before that, the kernels run on CPU tensors, without a GPU.

A kernel is compiled and loaded when it is first called, which cannot happen while a CUDA graph is captured: call each
op once with the same dtypes, granule and length of lists before the capture, as `torch.cuda.graph` asks for anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

FAMILIES = {
    "switch": (
        *("gather", "scatter_", "swap_", "apply_", "switch_", "scatter_add_"),
        *("foreach_gather", "foreach_scatter_", "foreach_swap_", "foreach_apply_", "foreach_switch_"),
        "check_indices",
    ),
    "fuse": ("fuse_plan", "fuse_"),
    "gradient": ("sampled_grad",),
    "optimize": (
        *("adamw_", "adamw_.tensor", "sgd_", "sgd_.tensor"),
        *("foreach_adamw_", "foreach_adamw_.tensor", "foreach_sgd_", "foreach_sgd_.tensor"),
    ),
    "select": ("select_top", "select_random"),
    "codec": ("encode_indices", "decode_indices"),
    "fingerprint": ("fingerprint", "fingerprint_at", "fingerprint_part"),
    "diff": ("diff_", "foreach_diff_"),
    "overlay": ("sparse_linear", "sparse_linear_add_"),
}
OPS = {op: family for family, ops in FAMILIES.items() for op in ops}


@cache
def installed() -> bool:
    """Whether triton can be imported."""
    try:
        return find_spec("triton") is not None
    except ImportError:  # an import hook that hides it
        return False


@cache
def find(op: str) -> Callable[..., Any]:
    """The function that serves an op: `adamw_.tensor` is `adamw_tensor_` of its family, as in the references."""
    packet, _, overload = op.partition(".")
    family = import_module(f"{__name__}.{OPS[op]}")
    return getattr(family, f"{packet}{overload}_" if overload else packet)  # type: ignore[no-any-return]
