"""Which backend serves each op, decided in this one place.

The compiled kernels register themselves when `shira_ops._C` is loaded. An op without one gets the Triton kernel on a
GPU, if triton is installed, and otherwise the plain-torch reference.
`SHIRA_BACKEND` overrides: `cuda` (compiled kernels, without Triton), `triton` (without compiled CUDA kernels) or
`reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, reference, triton
from ._choice import WANTED
from ._ops import add_op_namespace_prefix
from ._ops import ops as _shira

# Kernels live as long as the Library that registered them.
_library = torch.library.Library(_shira.name, "IMPL")
_served: dict[str, dict[str, Backend]] = {}


class Backend(NamedTuple):
    """Who serves an op on a device: "compiled", "triton", "reference" or "none", and why."""

    name: str
    why: str


def _choose(op: str, key: str) -> Backend:
    """Who serves an op on the device of this dispatch key."""
    if WANTED == "reference":
        return Backend("reference", "SHIRA_BACKEND=reference")
    # With `triton`, the compiled CUDA kernels have not registered themselves: see csrc/checks.h.
    if torch._C._dispatch_has_kernel_for_dispatch_key(add_op_namespace_prefix(op), key):
        return Backend("compiled", "a kernel of this build")
    if key == "CPU":
        return Backend("reference", "this build has no CPU kernel for it")
    if WANTED == "triton":
        why = "SHIRA_BACKEND=triton"
    elif not _shira._build_info.default() & 1:
        why = "this build was compiled without CUDA"
    else:
        why = "this build has no CUDA kernel for it"
    if WANTED == "cuda":
        return Backend("reference", why)
    if not triton.installed():
        return Backend("reference", f"{why}, and triton is not installed")
    return Backend("triton", why)


def _below_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """References write in place with torch's own ops, which must not meet autograd a second time."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return function(*args, **kwargs)

    return kernel


def _triton(op: str) -> Callable[..., Any]:
    """The Triton kernel, imported when it is first called: importing triton takes longer than everything else here."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return triton.find(op)(*args, **kwargs)

    return kernel


def _without_kernel(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Serves the tensors for which there is no kernel: it refuses them. Calls without any tensor come here too, since
    they name no device; those `function` answers."""
    own = checks.overload(op)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        checks.no_kernel(checks.title(own), checks.named(own, args, kwargs))
        return function(*args, **kwargs)

    return kernel


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """`_select_random`, by way of `select_random`: its first argument is there for its device."""

    def kernel(like: Tensor, numel: int, k: int, seed: int, granule: int) -> Any:
        return function(numel, k, seed, device=like.device, granule=granule)

    return kernel


def register() -> None:
    """Registers Triton kernels and references where no kernel is. Called once, after the compiled module is loaded."""
    for op, function in reference.OPS.items():
        # An op without a tensor argument has no device to be dispatched by: it calls another one, with a tensor.
        asked = "_select_random" if op == "select_random" else op
        served = {key: _choose(asked, key) for key in ("CPU", "CUDA")}
        for key, backend in served.items():
            if backend.name != "compiled":
                kernel = _triton(op) if backend.name == "triton" else function
                _library.impl(asked, _below_autograd(_on_device(kernel) if asked != op else kernel), key)
        if op == asked:
            refusing = _below_autograd(_without_kernel(op, function))
            for key in ("CompositeExplicitAutograd", "NestedTensorCPU", "NestedTensorCUDA", "AutogradNestedTensor"):
                _library.impl(op, refusing, key)
        if not torch.backends.cuda.is_built():
            served["CUDA"] = Backend("none", "this torch was built without CUDA")
        _served[op] = {key.lower(): backend for key, backend in served.items()}


def backends() -> dict[str, dict[str, Backend]]:
    """Which backend serves each op on each device, and why.

    Returns a new dictionary of dictionaries: by op, then by device (``"cpu"``, ``"cuda"``), a `Backend(name, why)`.
    Overloads have keys of their own, such as ``"adamw_.tensor"``. The names are ``"compiled"`` (C++ or CUDA),
    ``"triton"`` (compiled on the first call, so call an op once before you capture it in a CUDA graph), ``"reference"``
    (plain torch: correct, slow, and on CUDA it makes the host wait) and ``"none"``.

    For example::

        >>> shira_ops.backends()["swap_"]["cpu"].name
        'compiled'
    """
    return {op: dict(devices) for op, devices in _served.items()}
