"""What each op returns without computing it, for tracing: shapes, dtypes, and the same refusals.

Content and memory are not looked at: a fake tensor has neither. In the order of csrc/schemas.h; an op that is not
here returns nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from . import checks, plan, reference
from ._ops import add_op_namespace_prefix
from ._ops import ops as _shira


def _index_dtype(granules: int) -> torch.dtype:
    """As `checks.index_dtype`; a size that is known only at run time is taken for a small one."""
    return torch.int64 if guard_or_false(granules >= 2**31) else torch.int32


def gather(weight: Tensor, indices: Tensor, granule: int) -> Tensor:
    return weight.new_empty(indices.numel() * granule)


def foreach_gather(weights: Sequence[Tensor], indices: Sequence[Tensor], granule: int) -> list[Tensor]:
    return [gather(weight, index, granule) for weight, index in zip(weights, indices, strict=True)]


def fuse_plan(indices: Sequence[Tensor], granule: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = sum(tensor.numel() for tensor in indices)
    union, sources = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    narrow = all(tensor.dtype == torch.int32 for tensor in indices)
    return (
        indices[0].new_empty(union, dtype=torch.int32 if narrow else torch.int64),
        indices[0].new_empty(plan.groups(union) + 1, dtype=_index_dtype(total)),
        indices[0].new_empty(sources, dtype=torch.int64),
        indices[0].new_empty(sources, dtype=torch.int64),
    )


def sampled_grad(grad_output: Tensor, input: Tensor, indices: Tensor, granule: int) -> Tensor:
    return grad_output.new_empty(indices.numel() * granule, dtype=checks.compute_dtype(grad_output.dtype))


def select_top(weight: Tensor, grad: Tensor | None, k: int, score: str, granule: int) -> Tensor:
    return weight.new_empty(k, dtype=_index_dtype(weight.numel() // granule))


def select_random(numel: int, k: int, seed: int, device: torch.device | None, granule: int) -> Tensor:
    return torch.empty(k, dtype=checks.index_dtype(numel // granule), device="cpu" if device is None else device)


def encode_indices(indices: Tensor, granule: int, version: int) -> Tensor:
    return indices.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


def decode_indices(code: Tensor, count: int, limit: int, dtype: torch.dtype, granule: int) -> Tensor:
    return code.new_empty(count, dtype=dtype)


def fingerprint(weight: Tensor, granule: int) -> Tensor:
    return weight.new_empty((), dtype=torch.int64)


def fingerprint_at(weight: Tensor, indices: Tensor, granule: int) -> Tensor:
    return weight.new_empty((), dtype=torch.int64)


def fingerprint_part(weight: Tensor, first: int, run: int, stride: int, granule: int) -> Tensor:
    return weight.new_empty((), dtype=torch.int64)


def diff_(snapshot: Tensor, weight: Tensor, granule: int, before: bool) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    indices = weight.new_empty(count, dtype=_index_dtype(weight.numel() // granule))
    return indices, weight.new_empty(count * granule)


def foreach_diff_(
    snapshots: Sequence[Tensor], weights: Sequence[Tensor], granule: int, before: bool
) -> tuple[list[Tensor], list[Tensor]]:
    found = [diff_(snapshot, weight, granule, before) for snapshot, weight in zip(snapshots, weights, strict=True)]
    return [indices for indices, _ in found], [values for _, values in found]


def sparse_linear(
    input: Tensor, indices: Tensor, values: Tensor, out_features: int, transposed: bool, granule: int
) -> Tensor:
    return input.new_empty(*input.shape[:-1], out_features)


def _nothing(**_: Any) -> None:
    pass


_RESULTS: tuple[Callable[..., Any], ...] = (
    *(gather, foreach_gather, fuse_plan, sampled_grad, select_top, select_random),
    *(encode_indices, decode_indices, fingerprint, fingerprint_at, fingerprint_part),
    *(diff_, foreach_diff_, sparse_linear),
)


def register() -> None:
    results = {function.__name__: function for function in _RESULTS}
    for op in reference.OPS:
        returns = checks.overload(op)._schema.returns
        function = results[op] if returns else _nothing
        torch.library.register_fake(add_op_namespace_prefix(op), checks.checked(op, memory=False)(function))
    # It has no result and changes nothing: a compiler would drop the check.
    torch.fx.node.has_side_effect(_shira.check_indices.default)
