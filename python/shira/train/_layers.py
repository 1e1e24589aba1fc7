"""Layers whose weight gradient is computed at the mask alone: the rule for each kind, `Attach`, which all share, and
`lay` for weights that are not written.

A layer is recognised by its ``forward``: a subclass with a forward of its own may use its weight in another way
(scaled, normalised), and there only autograd knows the gradient. `rule_of` returns the rule for a weight, or None for a
weight whose dense gradient is made by autograd and gathered (see `shira.train.tuner`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

import shira_ops
from shira._linears import CONV1D, EMBEDDING, LINEAR, forward_of, is_linear, is_replaced, kind_of

__all__ = ["Attach", "owned", "rule_of", "runs"]

RULES = {LINEAR: "linear", CONV1D: "transposed", EMBEDDING: "embedding"}
_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLUTION_GRADIENTS = (conv1d_weight, conv2d_weight, conv3d_weight)


def owned(module: nn.Module) -> tuple[str, ...] | None:
    """The weights that the name of a module stands for; None for modules of unknown kinds."""
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return (*(name for name in names if getattr(module, name) is not None), "out_proj.weight")
    if is_linear(module) or isinstance(module, (*_CONVOLUTIONS, nn.modules.conv._ConvTransposeNd, nn.Embedding)):
        return ("weight",)
    return None


def rule_of(module: nn.Module, attribute: str, granule: int) -> str | None:
    """``linear``, ``transposed``, ``conv`` or ``embedding``; None if only autograd knows the gradient."""
    if attribute != "weight":
        return None
    kind = kind_of(module)
    if kind in (LINEAR, CONV1D):
        return RULES[kind]
    if kind == EMBEDDING and isinstance(module, nn.Embedding):
        whole_rows = module.embedding_dim % granule == 0
        return "embedding" if whole_rows and not module.scale_grad_by_freq else None
    forward = forward_of(module)
    for convolution in _CONVOLUTIONS:
        if forward is convolution and not is_replaced(module):
            own = type(module)._conv_forward is not convolution._conv_forward  # type: ignore[attr-defined]
            return None if own or "_conv_forward" in vars(module) else "conv"
    return None


def runs(module: nn.Module) -> tuple[type, bool]:
    """The class whose forward the module runs, and whether it runs another in its place."""
    return forward_of(module), is_replaced(module)


SETTINGS = {"conv": "_conv_forward", "embedding": "scale_grad_by_freq or max_norm"}


def settings(rule: str, module: Any) -> tuple[Any, ...]:
    """What a rule stands and falls with, besides the forward that the module runs: `SETTINGS`."""
    if rule == "conv":
        return ("_conv_forward" in module.__dict__,)
    if rule == "embedding":
        return getattr(module, "scale_grad_by_freq", None), getattr(module, "max_norm", None)
    return ()


def options(rule: str, module: Any) -> tuple[Any, ...]:
    """What a rule needs to know about the layer, as plain numbers, which are constants for a compiler."""
    if rule == "conv":
        pads, mode, padding = (), "zeros", module.padding
        if module.padding_mode != "zeros" or isinstance(padding, str):
            # "same" may pad one side more than the other, which the convolution itself cannot do.
            pads, mode, padding = tuple(module._reversed_padding_repeated_twice), module.padding_mode, (0,)
            padding = padding * len(module.kernel_size)
        return tuple(module.weight.shape), module.stride, padding, module.dilation, module.groups, pads, mode
    if rule == "embedding":
        return module.num_embeddings, module.padding_idx
    return ()


def _convolution(grad_output: Tensor, input: Tensor, indices: Tensor, granule: int, options: tuple[Any, ...]) -> Tensor:
    """The gradient at the indices, gathered from the dense gradient of this layer, which is freed at once."""
    shape, stride, padding, dilation, groups, pads, mode = options
    if input.dim() < len(shape):
        grad_output, input = grad_output.unsqueeze(0), input.unsqueeze(0)
    if pads:
        input = F.pad(input, pads, mode="constant" if mode == "zeros" else mode)
    gradient = _CONVOLUTION_GRADIENTS[len(shape) - 3]
    dense = gradient(input, shape, grad_output, stride, padding, dilation, groups)  # type: ignore[no-untyped-call]
    return shira_ops.gather(dense.contiguous(), indices, granule=granule)


def _embedding(grad_output: Tensor, input: Tensor, indices: Tensor, granule: int, options: tuple[Any, ...]) -> Tensor:
    """Sums the tokens of each used row, then reads the mask's entries: tokens x width, not rows x width, in memory."""
    rows, padding = options
    width, tokens = grad_output.shape[-1], input.reshape(-1)
    compute = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    if tokens.numel() == 0:
        return torch.zeros(indices.numel() * granule, dtype=compute, device=indices.device)
    place = _places(tokens, rows)
    summed = torch.zeros(tokens.numel(), width, dtype=compute, device=tokens.device)
    used, each = place[tokens], grad_output.reshape(-1, width).to(compute)
    if each.is_cuda:
        summed.index_put_((used,), each, accumulate=True)  # sorts; index_add_ sums in any order there
    else:
        summed.index_add_(0, used, each)
    if padding is not None:
        place[padding] = -1
    at, columns = _cells(place, indices, granule, width)
    entries = summed[at.clamp(min=0)[:, None], columns]
    return torch.where((at >= 0)[:, None], entries, 0).view(-1)


def gradient(
    rule: str, grad_output: Tensor, input: Tensor, indices: Tensor, granule: int, options: tuple[Any, ...]
) -> Tensor:
    """The gradient of a layer's weight at the indices, float32 (float64 for float64)."""
    if rule == "conv":
        return _convolution(grad_output, input, indices, granule, options)
    if rule == "embedding":
        return _embedding(grad_output, input, indices, granule, options)
    # Gradients come expanded (after sum()) and inputs strided.
    rows, columns = grad_output.contiguous(), input.contiguous()
    if rule == "transposed":
        rows, columns = columns, rows
    return shira_ops.sampled_grad(rows, columns, indices, granule=granule)


def refuse_second_derivative() -> None:
    """In the backward of a sampled gradient."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "SparseTuner: a sampled gradient cannot be differentiated again (create_graph=True): what flows "
            'through the weight itself would be missing; use SparseTuner(..., gradient="dense")'
        )


def _places(tokens: Tensor, rows: int) -> Tensor:
    """For each row that is used one of its tokens, whichever, and -1 for the others: no more places than tokens."""
    place = torch.full((rows,), -1, dtype=torch.int64, device=tokens.device)
    place[tokens] = torch.arange(tokens.numel(), device=tokens.device)
    return place


def _cells(place: Tensor, indices: Tensor, granule: int, width: int) -> tuple[Tensor, Tensor]:
    """The place (-1: none) and the columns of every granule."""
    first = indices.to(torch.int64) * granule
    return place[first // width], (first % width)[:, None] + torch.arange(granule, device=indices.device)


class Attach(torch.autograd.Function):
    """An identity on a layer's output whose backward also gives ``values`` the weight's gradient at the indices.

    ``Attach.apply(output, values, input, indices, granule, rule, options)`` with a rule of `rule_of`. The gradient is
    float32 (float64 for float64). A second derivative would miss what flows through the frozen weight, so a backward
    with ``create_graph=True`` is refused.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        values: Tensor,
        input: Tensor,
        indices: Tensor,
        granule: int,
        rule: str,
        options: tuple[Any, ...],
    ) -> Tensor:
        if input.is_floating_point() and input.dtype != output.dtype:
            # Autocast gave the layer a cast input; that one is the smaller to keep.
            input = input.to(output.dtype)
        ctx.save_for_backward(input, indices)
        ctx.granule, ctx.rule, ctx.options, ctx.dtype = granule, rule, options, values.dtype
        # A detached alias: no copy, and not a view to autograd, so an in-place op may follow (ReLU(inplace=True)).
        # mark_dirty would allow that too, but counts as a write, and breaks layers that saved their own output.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        input, indices = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return grad_output, None, None, None, None, None, None
        grad_values = gradient(ctx.rule, grad_output, input, indices, ctx.granule, ctx.options)
        return grad_output, grad_values.to(ctx.dtype), None, None, None, None, None


def attach(
    rule: str, module: nn.Module, output: Tensor, values: Tensor, input: Tensor, indices: Tensor, granule: int
) -> Tensor:
    """The layer's output, with the values' gradient attached."""
    # Compiled autograd cannot add up a gradient that is None.
    arguments = (output, values, input.detach(), indices, granule, rule, options(rule, module))
    return Attach.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


# ---- over a weight that is not written -----------------------------------------------------------------------


def lay(
    rule: str, module: nn.Module, output: Tensor, values: Tensor, input: Tensor, indices: Tensor, granule: int
) -> Tensor:
    """The layer's output, and what a delta of its weight, the values at the indices, adds to it.

    By the rules ``linear``, ``transposed`` and ``embedding``. Differentiable in output, values and input.
    """
    if rule == "embedding":
        rows = _rows(values, input, indices, granule, output.shape[-1], options(rule, module))
        return output + rows.to(output.dtype)
    # Autocast gave the layer a cast input, and inputs come strided.
    input, width = input.to(output.dtype).contiguous(), output.shape[-1]
    return output + shira_ops.sparse_linear(
        input, indices, values, width, transposed=rule == "transposed", granule=granule
    )


def _rows(values: Tensor, input: Tensor, indices: Tensor, granule: int, width: int, options: tuple[Any, ...]) -> Tensor:
    """The delta's rows that the tokens select: ``[..., width]``, and tokens x width in memory."""
    rows, padding = options
    tokens, count = input.reshape(-1), input.numel()
    place = _places(tokens, rows)
    at, columns = _cells(place, indices, granule, width)
    # The last row takes what no token uses.
    dense = values.new_zeros(count + 1, width)
    dense = dense.index_put((at.remainder(count + 1)[:, None], columns), values.view(-1, granule))
    found = dense[place[tokens]]
    if padding is not None:  # as in nn.Embedding, this row does not learn
        found = torch.where((tokens == padding)[:, None], found.detach(), found)
    return found.view(*input.shape, width)
