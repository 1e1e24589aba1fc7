"""Which backend serves each op, decided in this one place.

The compiled kernels register themselves when `shira_ops._C` is loaded. Where they leave a gap on a GPU, the Triton
kernel is registered, if triton is installed; where a gap is left still, the plain-torch reference.
`SHIRA_BACKEND` overrides: `cuda` (compiled kernels, without Triton), `triton` (without compiled CUDA kernels) or
`reference`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, reference, triton

CHOICES = ("cuda", "triton", "reference")

# Kernels live as long as the Library that registered them.
_library = torch.library.Library("shira", "IMPL")
_served: dict[str, dict[str, Backend]] = {}


class Backend(NamedTuple):
    """Who serves an op on a device: "compiled", "triton", "reference" or "none", and why."""

    name: str
    why: str


def wanted() -> str | None:
    """What SHIRA_BACKEND asks for; None where it is not set."""
    choice = os.environ.get("SHIRA_BACKEND", "")
    if choice and choice not in CHOICES:
        raise ValueError(f"SHIRA_BACKEND must be one of {', '.join(CHOICES)} or not set, got {choice!r}")
    return choice or None


def _below_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """References write in place with torch's own ops: those must not meet autograd a second time."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return function(*args, **kwargs)

    return kernel


def _compiled(op: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"shira::{op}", key))


def _triton(op: str) -> Callable[..., Any]:
    """The Triton kernel, imported when it is first called: importing triton takes longer than everything else here."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return triton.find(op)(*args, **kwargs)

    return kernel


def _without_kernel(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """What serves whatever has no kernel: a refusal of its tensors. Of lists without a tensor, which name no device
    either, `function` knows what to make: nothing, or a refusal."""
    packet, _, overload = op.partition(".")
    own = getattr(getattr(torch.ops.shira, packet), overload or "default")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        checks.no_kernel(packet, checks.named(own, args, kwargs))
        return function(*args, **kwargs)

    return kernel


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """`_select_random` by `select_random`: its first argument tells the device."""

    def kernel(like: Tensor, numel: int, k: int, seed: int, granule: int) -> Any:
        return function(numel, k, seed, device=like.device, granule=granule)

    return kernel


def _why_not_compiled(key: str, choice: str | None) -> str:
    if key == "CPU":
        return "this build has no CPU kernel for it"
    if choice == "triton":
        return "SHIRA_BACKEND=triton"
    if not torch.ops.shira._build_info.default() & 1:
        return "this build was compiled without CUDA"
    return "this build has no CUDA kernel for it"


def _without_compiled(key: str, choice: str | None) -> Backend:
    """Who serves an op that has no compiled kernel."""
    if choice == "reference":
        return Backend("reference", "SHIRA_BACKEND=reference")
    why = _why_not_compiled(key, choice)
    if key == "CPU" or choice == "cuda":
        return Backend("reference", why)
    if not triton.installed():
        return Backend("reference", f"{why}, and triton is not installed")
    return Backend("triton", why)


def register() -> None:
    """Registers Triton kernels and references where no kernel is. Called once, after the compiled module is loaded."""
    choice = wanted()
    for op, function in reference.OPS.items():
        served = _served[op] = {}
        # An op without a tensor argument has no device to be dispatched by: it asks another one, with a tensor.
        asked = "_select_random" if op == "select_random" else op
        keys = {"CPU": "CPU", "CUDA": "CUDA"}
        found = {key: _compiled(asked, key) for key in keys.values()}
        gaps = {key: _without_compiled(key, choice) for key in sorted(found) if not found[key]}
        for key, backend in gaps.items():
            kernel = _triton(op) if backend.name == "triton" else function
            _library.impl(asked, _below_autograd(_on_device(kernel) if asked != op else kernel), key)
        if op == asked:
            refusing = _below_autograd(_without_kernel(op, function))
            for key in ("CompositeExplicitAutograd", "NestedTensorCPU", "NestedTensorCUDA", "AutogradNestedTensor"):
                _library.impl(op, refusing, key)
        for device, key in keys.items():
            if device == "CUDA" and not torch.backends.cuda.is_built():
                backend = Backend("none", "this torch was built without CUDA")
            elif found[key]:
                backend = Backend("compiled", "a kernel of this build")
            else:
                backend = gaps[key]
            served[device.lower()] = backend


def backends() -> dict[str, dict[str, Backend]]:
    """Which backend serves each op on each device, and why.

    Returns a new dictionary, `{op: {"cpu": Backend(name, why), "cuda": Backend(name, why)}}`. Overloads have keys
    of their own, as `"adamw_.tensor"`. The names are `"compiled"` (C++ or CUDA), `"triton"` (compiled on the first
    call, so call an op once before you capture it in a CUDA graph), `"reference"` (plain torch: correct, slow, and on
    CUDA it synchronises) and `"none"`.

    >>> shira_ops.backends()["swap_"]["cpu"].name
    'compiled'
    """
    return {op: dict(devices) for op, devices in _served.items()}
