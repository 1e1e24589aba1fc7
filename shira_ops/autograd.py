"""Autograd is never silently wrong, even for calls that go straight to torch.ops.shira.

Ops that change their arguments have no gradient: a kernel at ADInplaceOrView refuses what requires grad before the
write, and bumps version counters after it, so that torch refuses a backward over stale values. Inference tensors in
inference mode skip that kernel. `gather`, `foreach_gather`, `sampled_grad` and `sparse_linear` have
formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from . import checks, reference
from ._ops import ops as _shira

_AFTER_AUTOGRAD = torch._C._after_autograd_keyset
_AFTER_INPLACE = torch._C._after_ADInplaceOrView_keyset
_dispatch_keys = torch._C._dispatch_keys
_dispatch_tls_local_exclude_set = torch._C._dispatch_tls_local_exclude_set
_strided = torch.strided
_increment_version = torch._C._increment_version
_is_grad_enabled = torch.is_grad_enabled
_requires_grad = attrgetter("requires_grad")  # faster over a list than a loop

# Kernels live as long as the Library that registered them.
_library = torch.library.Library(_shira.name, "IMPL")


# ---- ops that change their arguments -----------------------------------------------------------------------


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def _refuse(op: str, arguments: Sequence[tuple[str, Tensor]]) -> NoReturn:
    for name, tensor in arguments:
        if _is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(
                f"{op}: {name} must not require grad while grad mode is on (run it under torch.no_grad())"
            )
        if _has_tangent(tensor):
            raise RuntimeError(
                f"{op}: {name} must not carry a forward-mode tangent (it would be lost; pass the primal of "
                "torch.autograd.forward_ad.unpack_dual)"
            )
    raise AssertionError(f"{op}: nothing to refuse")


def _is_special(t: Tensor) -> bool:
    """Whether a tensor may have a dispatch key that an ordinary one does not; faster than asking for its keys."""
    return type(t) is not Tensor or t.is_neg() or t.layout is not _strided or t.is_quantized or t.is_nested


def _lazy_kernel(op: OpOverload) -> Callable[..., NoReturn]:
    """Refuses lazy views. Without it torch would resolve them into copies, and the op would write to the copies."""

    def kernel(*args: Any, **kwargs: Any) -> NoReturn:
        checks.lazy(checks.title(op), checks.named(op, args, kwargs))
        raise AssertionError(f"{op}: nothing is lazy")

    return kernel


def _mutating_kernel(op: OpOverload) -> Callable[..., Any]:
    """The kernel runs on every call outside inference mode, so all that the schema tells is worked out here, once."""
    name = checks.title(op)
    arguments = [argument for argument in op._schema.arguments if "Tensor" in str(argument.type)]
    single: list[int] = []  # where the tensors are
    several: list[int] = []  # where the lists of tensors and the optional ones are
    keywords = [argument.name for argument in arguments if argument.kwarg_only]
    positional = [argument for argument in op._schema.arguments if not argument.kwarg_only]
    mutated = []
    for position, argument in enumerate(positional):
        if argument in arguments:
            (single if str(argument.type) == "Tensor" else several).append(position)
        if argument.alias_info is not None and argument.alias_info.is_write:
            mutated.append(position)
    mutated_single = [position for position in mutated if position in single]
    mutated_several = [position for position in mutated if position in several]
    unseen = [i for i, argument in enumerate(positional) if str(argument.type) == "Optional[List[Tensor]]"]
    redispatch = op.redispatch

    def listed(args: Sequence[Any], positions: Sequence[int]) -> Iterator[Sequence[Tensor]]:
        for position in positions:
            value = args[position]
            if value is not None:
                yield (value,) if isinstance(value, Tensor) else value

    def all_tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
        yield from (args[position] for position in single)
        yield from chain.from_iterable(listed(args, several))
        yield from (kwargs[keyword] for keyword in keywords)

    def refuse(args: Sequence[Any], kwargs: dict[str, Any]) -> NoReturn:
        _refuse(name, checks.named(op, args, kwargs))

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        if _is_grad_enabled():
            for position in single:
                tensor = args[position]
                if tensor is None or tensor.requires_grad:
                    refuse(args, kwargs)
            for value in listed(args, several):
                if any(map(_requires_grad, value)):
                    refuse(args, kwargs)
            for keyword in keywords:
                tensor = kwargs[keyword]
                if tensor is None or tensor.requires_grad:
                    refuse(args, kwargs)
        if forward_ad._current_level >= 0 and any(map(_has_tangent, all_tensors(args, kwargs))):
            refuse(args, kwargs)
        for value in listed(args, unseen):
            # Torch chooses the kernel by every tensor except those of an optional list, so fake, lazy and sparse ones
            # among these are found here.
            for tensor in filter(_is_special, value):
                keyset = keyset | (_dispatch_keys(tensor) - _dispatch_tls_local_exclude_set())
        result = redispatch(keyset & _AFTER_INPLACE, *args, **kwargs)
        changed = [args[position] for position in mutated_single]
        for value in listed(args, mutated_several):
            changed += value
        try:
            _increment_version(changed)
        except RuntimeError:
            # Inference tensors have no version counter. Rare, and asking each tensor first costs more than the rest.
            _increment_version([tensor for tensor in changed if not tensor.is_inference()])
        return result

    return kernel


# ---- formulas ----------------------------------------------------------------------------------------------
# Registered at the keys of autograd; each calls its op below them.


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    # Under one transform this would work, but nested ones give zeros without an error.
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{_NAMES[function]}: has no rule for torch.func's gradients (use torch.autograd)")
    return function.apply(*args)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, indices: Tensor, granule: int) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _shira.gather.default(weight, indices, granule)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        weight, indices, granule = inputs
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)
        ctx.shape, ctx.granule = weight.shape, granule

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        return _apply(_Spread, grad, indices, ctx.shape, ctx.granule), None, None

    @staticmethod
    def jvp(ctx: Any, weight: Tensor, *_: None) -> Tensor:
        (indices,) = ctx.saved_tensors
        return _shira.gather.default(weight.contiguous(), indices, ctx.granule)  # type: ignore[no-any-return]


class _Spread(torch.autograd.Function):
    """The transpose of gather: a tensor of zeros with `values` at `indices`."""

    @staticmethod
    def forward(values: Tensor, indices: Tensor, shape: torch.Size, granule: int) -> Tensor:
        dense = values.new_zeros(shape)
        # A gradient may be a view of anything, such as an expanded number after sum().
        with torch._C._AutoDispatchBelowAutograd():
            _shira.scatter_.default(dense, indices, values.contiguous().resolve_conj().resolve_neg(), granule)
        return dense

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, indices, ctx.shape, ctx.granule = inputs
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (indices,) = ctx.saved_tensors
        return _shira.gather.default(grad.contiguous(), indices, ctx.granule), None, None, None

    @staticmethod
    def jvp(ctx: Any, values: Tensor, *_: None) -> Tensor:
        (indices,) = ctx.saved_tensors
        return _apply(_Spread, values, indices, ctx.shape, ctx.granule)  # type: ignore[no-any-return]


class _ForeachGather(torch.autograd.Function):
    @staticmethod
    def forward(granule: int, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_shira.foreach_gather.default(tensors[:count], tensors[count:], granule))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.granule, count, *tensors = inputs
        ctx.shapes = [tensor.shape for tensor in tensors[:count]]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[count:])
        ctx.save_for_forward(*tensors[count:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dense = [
            None if grad is None else _apply(_Spread, grad, indices, shape, ctx.granule)
            for grad, indices, shape in zip(grads, ctx.saved_tensors, ctx.shapes, strict=True)
        ]
        return None, None, *dense, *[None] * len(dense)

    @staticmethod
    def jvp(ctx: Any, granule: None, count: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(
            None if tangent is None else _shira.gather.default(tangent.contiguous(), indices, ctx.granule)
            for tangent, indices in zip(tangents, ctx.saved_tensors, strict=False)
        )


class _SampledGrad(torch.autograd.Function):
    """Linear in each of grad_output and input; with D the dense matrix of the cotangent, input @ D.T and
    grad_output @ D."""

    @staticmethod
    def forward(grad_output: Tensor, input: Tensor, indices: Tensor, granule: int) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _shira.sampled_grad.default(grad_output, input, indices, granule)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.granule = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_output, input, indices = ctx.saved_tensors
        rows, columns = grad_output.shape[-1], input.shape[-1]
        tokens = math.prod(input.shape[:-1])
        dense = _apply(_Spread, grad, indices, (rows, columns), ctx.granule)
        to_output = to_input = None
        if ctx.needs_input_grad[0]:
            product = input.reshape(tokens, columns).to(dense.dtype) @ dense.t()
            to_output = product.to(grad_output.dtype).reshape(grad_output.shape)
        if ctx.needs_input_grad[1]:
            product = grad_output.reshape(tokens, rows).to(dense.dtype) @ dense
            to_input = product.to(input.dtype).reshape(input.shape)
        return to_output, to_input, None, None

    @staticmethod
    def jvp(ctx: Any, output_tangent: Tensor | None, input_tangent: Tensor | None, *_: None) -> Tensor:
        grad_output, input, indices = ctx.saved_tensors
        op, total = _shira.sampled_grad.default, None
        if output_tangent is not None:
            total = op(output_tangent.contiguous(), input, indices, ctx.granule)
        if input_tangent is not None:
            other = op(grad_output, input_tangent.contiguous(), indices, ctx.granule)
            total = other if total is None else total + other
        return total  # type: ignore[return-value]


class _SparseLinear(torch.autograd.Function):
    """Linear in each of input and values."""

    @staticmethod
    def forward(
        input: Tensor, indices: Tensor, values: Tensor, out_features: int, transposed: bool, granule: int
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _shira.sparse_linear.default(  # type: ignore[no-any-return]
                input, indices, values, out_features, transposed=transposed, granule=granule
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.out_features, ctx.transposed, ctx.granule = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None, None]:
        input, indices, values = ctx.saved_tensors
        grad, to_input, to_values = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            to_input = _shira.sparse_linear.default(
                grad, indices, values, input.shape[-1], transposed=not ctx.transposed, granule=ctx.granule
            )
        if ctx.needs_input_grad[2]:
            rows, columns = (input, grad) if ctx.transposed else (grad, input)
            to_values = _shira.sampled_grad.default(rows, columns, indices, ctx.granule).to(values.dtype)
        return to_input, None, to_values, None, None, None

    @staticmethod
    def jvp(ctx: Any, input_tangent: Tensor | None, _: None, values_tangent: Tensor | None, *__: None) -> Tensor:
        input, indices, values = ctx.saved_tensors
        named = {"transposed": ctx.transposed, "granule": ctx.granule}
        op, total = _shira.sparse_linear.default, None
        if input_tangent is not None:
            total = op(input_tangent.contiguous(), indices, values, ctx.out_features, **named)
        if values_tangent is not None:
            other = op(input, indices, values_tangent.contiguous(), ctx.out_features, **named)
            total = other if total is None else total + other
        return total  # type: ignore[return-value]


_NAMES: dict[type[torch.autograd.Function], str] = {
    _Gather: "gather",
    _Spread: "gather",
    _ForeachGather: "foreach_gather",
    _SampledGrad: "sampled_grad",
    _SparseLinear: "sparse_linear",
}


def _wants_gradient(*tensors: Tensor | None) -> bool:
    if forward_ad._current_level >= 0:
        return True
    return _is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _gather(keyset: torch._C.DispatchKeySet, weight: Tensor, indices: Tensor, granule: int = 1) -> Any:
    if _wants_gradient(weight):
        return _apply(_Gather, weight, indices, granule)
    return _shira.gather.default.redispatch(keyset & _AFTER_AUTOGRAD, weight, indices, granule)


def _foreach_gather(
    keyset: torch._C.DispatchKeySet, weights: Sequence[Tensor], indices: Sequence[Tensor], granule: int = 1
) -> Any:
    if _wants_gradient(*weights):
        return list(_apply(_ForeachGather, granule, len(weights), *weights, *indices))
    return _shira.foreach_gather.default.redispatch(keyset & _AFTER_AUTOGRAD, weights, indices, granule)


def _sampled_grad(
    keyset: torch._C.DispatchKeySet, grad_output: Tensor, input: Tensor, indices: Tensor, granule: int = 1
) -> Any:
    if _wants_gradient(grad_output, input):
        return _apply(_SampledGrad, grad_output, input, indices, granule)
    op = _shira.sampled_grad.default
    return op.redispatch(keyset & _AFTER_AUTOGRAD, grad_output, input, indices, granule)


def _sparse_linear(
    keyset: torch._C.DispatchKeySet,
    input: Tensor,
    indices: Tensor,
    values: Tensor,
    out_features: int,
    *,
    transposed: bool = False,
    granule: int = 1,
) -> Any:
    if _wants_gradient(input, values):
        return _apply(_SparseLinear, input, indices, values, out_features, transposed, granule)
    op, named = _shira.sparse_linear.default, {"transposed": transposed, "granule": granule}
    return op.redispatch(keyset & _AFTER_AUTOGRAD, input, indices, values, out_features, **named)


def register() -> None:
    for name in reference.OPS:
        op = checks.overload(name)
        if op._schema.is_mutable:
            _library.impl(name, _mutating_kernel(op), "ADInplaceOrView", with_keyset=True)
            for key in ("Conjugate", "Negative"):
                _library.impl(name, _lazy_kernel(op), key)
    _library.impl("gather", _gather, "Autograd", with_keyset=True)
    _library.impl("foreach_gather", _foreach_gather, "Autograd", with_keyset=True)
    _library.impl("sampled_grad", _sampled_grad, "Autograd", with_keyset=True)
    _library.impl("sparse_linear", _sparse_linear, "Autograd", with_keyset=True)
