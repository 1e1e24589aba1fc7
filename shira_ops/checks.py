"""What an op refuses, and the sentences it says: op, argument, requirement, what was given.

The same checks in the same order and words as csrc/checks.h, for the references, the fakes and Triton.
One function per op looks at what a fake tensor has too (shapes, dtypes, devices, strides, scalars);
`memory`, `overlap` and `content` look at memory and run on real tensors only, before the first write.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
SCORES = ("magnitude", "grad", "snip")
MAX_ADAPTERS = 32767  # the adapter number has 15 bits of a source, above the position's 48

_PLURALS = {
    "weight": "weights",
    "master": "masters",
    "exp_avg": "exp_avgs",
    "exp_avg_sq": "exp_avg_sqs",
    "grad": "grads",
    "momentum_buffer": "momentum_buffers",
    "snapshot": "snapshots",
}


class Call(NamedTuple):
    """The op that is checking and, for the foreach_ forms, which member of the lists: it names arguments."""

    op: str
    member: int | None = None

    def name(self, word: str) -> str:
        return word if self.member is None else f"{_PLURALS.get(word, word)}[{self.member}]"


def tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of one argument: a tensor, a list of them, or neither."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for member, tensor in enumerate(value):
            if isinstance(tensor, Tensor):
                yield f"{name}[{member}]", tensor


def named(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Every tensor of a call with its name, in the order of the schema. Refuses None for a tensor, which the
    dispatcher lets pass."""
    found: list[tuple[str, Tensor]] = []
    values = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
    for argument in op._schema.arguments:
        value = values.get(argument.name, argument.default_value)
        if value is None and str(argument.type) == "Tensor":
            raise RuntimeError(f"{title(op)}: {argument.name} must be a tensor, got None")
        found += tensors(argument.name, value)
    return found


def title(op: OpOverload) -> str:
    """Its name as refusals have it."""
    return op._schema.name.removeprefix("shira::")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def index_dtype(granules: int) -> torch.dtype:
    """The dtype of indices below `granules` that an op makes itself."""
    return torch.int32 if granules < 2**31 else torch.int64


def is_dense(tensor: Tensor, weight: Tensor, nnz: int) -> bool:
    """Whether a gradient has the weight's shape; a shape that is [nnz] too means [nnz]."""
    return tensor.shape != (nnz,) and tensor.shape == weight.shape


def _require(condition: bool | torch.SymBool, op: str, argument: str, requirement: str, got: object) -> None:
    # torch._check also takes conditions on sizes that are only known at run time.
    torch._check(condition, lambda: f"{op}: {argument} {requirement}, got {got}")


def _shape(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)}"


# ---- one argument ------------------------------------------------------------------------------------------


def _granule(op: str, granule: int) -> None:
    _require(granule >= 1, op, "granule", "must be at least 1", granule)


def _granule_fits(op: str, granule: int, numel: int, whole: str) -> None:
    """A granule is no longer than what it is a part of: `numel` entries, as `whole` says it."""
    if granule > 1:  # at most max(numel, 1); this way, nothing is asked of a size that only the run knows
        torch._check(
            granule <= numel, lambda: f"{op}: granule must be at most {max(numel, 1)} for {whole}, got {granule}"
        )


def _granule_divides(op: str, granule: int, numel: int, whole: str) -> None:
    _granule_fits(op, granule, numel, whole)
    _require(numel % granule == 0, op, "granule", f"must divide {whole}", granule)


def _contiguous(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        got = f"{_shape(tensor)} with strides {list(tensor.stride())}"
        _require(False, op, name, "must be contiguous", got)


def _device(op: str, name: str, tensor: Tensor, owner: str, lead: Tensor) -> None:
    _require(tensor.device == lead.device, op, name, f"must be on {owner}'s device {lead.device}", tensor.device)


def _one_of(op: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    names = [dtype_name(dtype) for dtype in dtypes]
    text = " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    _require(tensor.dtype in dtypes, op, name, f"must be {text}", dtype_name(tensor.dtype))


def _own_dtype(op: str, name: str, tensor: Tensor, owner: str, dtype: torch.dtype, fp32_too: bool) -> None:
    fp32_too = fp32_too and dtype in FLOATS and dtype != torch.float32
    allowed = tensor.dtype == dtype or (fp32_too and tensor.dtype == torch.float32)
    text = f"must have {owner}'s dtype {dtype_name(dtype)}{' or float32' if fp32_too else ''}"
    _require(allowed, op, name, text, dtype_name(tensor.dtype))


def _one_dimensional(op: str, name: str, tensor: Tensor) -> None:
    _require(tensor.dim() == 1, op, name, "must be 1-D", _shape(tensor))


def _nnz_entries(op: str, name: str, tensor: Tensor, indices: Tensor, granule: int) -> None:
    _one_dimensional(op, name, tensor)
    n, nnz = indices.numel(), indices.numel() * granule
    text = f"must have {nnz} entries ({n} indices of granule {granule})"
    _require(tensor.numel() == nnz, op, name, text, tensor.numel())


def _weight(call: Call, weight: Tensor, granule: int, arithmetic: bool = False) -> None:
    op, name = call.op, call.name("weight")
    _contiguous(op, name, weight)
    if arithmetic:
        _one_of(op, name, weight, FLOATS)
    else:
        allowed = weight.element_size() in (1, 2, 4, 8)
        _require(allowed, op, name, "must have entries of 1, 2, 4 or 8 bytes", dtype_name(weight.dtype))
    _granule_divides(op, granule, weight.numel(), f"{name}'s {weight.numel()} entries")


def _weights(op: str, weights: Sequence[Tensor], granule: int, arithmetic: bool = False) -> None:
    for member, weight in enumerate(weights):
        _weight(Call(op, member), weight, granule, arithmetic)
        text = f"must be on the device of weights[0] {weights[0].device}"
        _require(weight.device == weights[0].device, op, f"weights[{member}]", text, weight.device)


def _lengths(op: str, count: int, **lists: Sequence[Tensor]) -> None:
    for name, tensors in lists.items():
        text = f"must have one tensor for each of the {count} weights"
        _require(len(tensors) == count, op, name, text, len(tensors))


def _indices(call: Call, word: str, indices: Tensor, weight: Tensor) -> None:
    op, name = call.op, call.name(word)
    _device(op, name, indices, call.name("weight"), weight)
    _index_list(op, name, indices)


def _index_list(op: str, name: str, indices: Tensor) -> None:
    _one_of(op, name, indices, INDEX_DTYPES)
    _one_dimensional(op, name, indices)
    _contiguous(op, name, indices)


def _values(
    call: Call, word: str, values: Tensor, weight: Tensor, indices: Tensor, granule: int, fp32_too: bool = False
) -> None:
    op, name, owner = call.op, call.name(word), call.name("weight")
    _device(op, name, values, owner, weight)
    _own_dtype(op, name, values, owner, weight.dtype, fp32_too)
    _nnz_entries(op, name, values, indices, granule)
    _contiguous(op, name, values)


def _alpha(op: str, weight: Tensor, alpha: float, delta: bool) -> None:
    text = f"must be 1 and delta False for weights of dtype {dtype_name(weight.dtype)}"
    # %g, as a C++ stream prints it
    got = f"alpha {alpha:g}, delta {delta}"
    _require(weight.dtype in FLOATS or (alpha == 1 and not delta), op, "alpha", text, got)


# ---- kinds of tensors --------------------------------------------------------------------------------------


def no_kernel(op: str, arguments: Sequence[tuple[str, Tensor]]) -> None:
    """Refuses tensors for which no backend has a kernel. Without any tensor there is nothing to refuse."""
    kind = ""
    for name, tensor in arguments:
        if tensor.is_quantized:
            kind = "a quantized one"
        elif tensor.is_nested:
            kind = "a nested one"
        elif tensor.layout != torch.strided:
            kind = f"one of layout {str(tensor.layout).removeprefix('torch.')}"
        elif tensor.device.type not in ("cpu", "cuda"):
            kind = f"one on {tensor.device}"
        if kind:
            raise RuntimeError(f"{op}: {name} must be a dense tensor on a CPU or a CUDA device, got {kind}")


def lazy(op: str, arguments: Sequence[tuple[str, Tensor]]) -> None:
    """Refuses tensors that are conjugated or negated only when they are read: a write would miss that."""
    for name, tensor in arguments:
        for is_lazy, how, resolve in (
            (tensor.is_conj(), "conjugated", "resolve_conj"),
            (tensor.is_neg(), "negated", "resolve_neg"),
        ):
            if is_lazy:
                text = f"must hold its own numbers, got a lazily {how} view (pass {resolve}() of it)"
                raise RuntimeError(f"{op}: {name} {text}")


# ---- memory and content: real tensors only -----------------------------------------------------------------


def memory(op: str, arguments: Sequence[tuple[str, Tensor]]) -> None:
    """Refuses tensors whose storage was freed or shrunk under them, which still have their shapes; tensors made for
    tracing, which have nothing else; and memory of others that starts between two entries.

    `arguments` are (name, tensor) in the order of the schema.
    """
    for name, tensor in arguments:
        if tensor.numel() == 0:
            continue
        if isinstance(tensor, FakeTensor):
            raise RuntimeError(f"{op}: {name} must have memory, got a tensor without any (a FakeTensor?)")
        end = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
        held = tensor.untyped_storage().nbytes()
        text = f"must lie within its storage, up to byte {end}"
        _require(end <= held, op, name, text, f"a storage of {held} bytes")
        size = tensor.element_size()
        past = tensor.data_ptr() % size
        text = f"must start at a multiple of its entries' {size} bytes"
        _require(past == 0, op, name, text, f"{past} more (its clone() is aligned)")


def overlap(op: str, arguments: Sequence[tuple[str, Tensor, bool]]) -> None:
    """Refuses what `memory` refuses, and a mutated argument that shares memory with any other.

    `arguments` are (name, tensor, mutated) in the order of the schema.
    """
    memory(op, [(name, tensor) for name, tensor, _ in arguments])
    ranges: list[tuple[int, int, int, str, bool]] = []
    for order, (name, tensor, mutated) in enumerate(arguments):
        size = tensor.numel() * tensor.element_size()
        if size > 0:
            begin = tensor.data_ptr()
            ranges.append((begin, begin + size, order, name, mutated))
    # By address, a clash is always with the range that ends furthest. Mutated and read-only ranges are kept
    # apart, since read-only ones may coincide (a mask that several weights share).
    ranges.sort(key=lambda r: r[0])
    furthest: tuple[int, int, int, str, bool] | None = None
    furthest_mutated = furthest
    for r in ranges:
        for other, matters in ((furthest, r[4]), (furthest_mutated, True)):
            if matters and other is not None and r[0] < other[1]:
                earlier, later = sorted((r, other), key=lambda x: x[2])
                raise RuntimeError(f"{op}: {later[3]} must not overlap {earlier[3]} in memory")
        if furthest is None or r[1] > furthest[1]:
            furthest = r
        if r[4] and (furthest_mutated is None or r[1] > furthest_mutated[1]):
            furthest_mutated = r


def content(op: str, name: str, indices: Tensor, granules: int | None) -> None:
    """Refuses indices that are not strictly increasing in [0, granules); None: only not negative.

    Synchronises.
    """
    wide = indices.to(torch.int64)  # int32 cannot be compared with a bound past 2^31
    outside = wide < 0
    if granules is not None:
        outside |= wide >= granules
    bad = outside.clone()
    bad[1:] |= wide[1:] <= wide[:-1]
    if not bool(bad.any()):
        return
    position = int(bad.nonzero()[0])
    span = "and at least 0" if granules is None else f"in [0, {granules})"
    after = "" if bool(outside[position]) else f" after {int(wide[position - 1])}"
    got = f"{int(wide[position])}{after} at position {position}"
    _require(False, op, name, f"must be strictly increasing {span}", got)


# ---- switch ------------------------------------------------------------------------------------------------


def gather(weight: Tensor, indices: Tensor, granule: int) -> None:
    call = Call("gather")
    _granule(call.op, granule)
    _weight(call, weight, granule)
    _indices(call, "indices", indices, weight)


def _move(call: Call, weight: Tensor, indices: Tensor, values: Tensor, granule: int) -> None:
    _indices(call, "indices", indices, weight)
    _values(call, "values", values, weight, indices, granule)


def scatter_(weight: Tensor, indices: Tensor, values: Tensor, granule: int) -> None:
    call = Call("scatter_")
    _granule(call.op, granule)
    _weight(call, weight, granule)
    _move(call, weight, indices, values, granule)


def swap_(weight: Tensor, indices: Tensor, values: Tensor, granule: int) -> None:
    call = Call("swap_")
    _granule(call.op, granule)
    _weight(call, weight, granule)
    _move(call, weight, indices, values, granule)


def _apply(call: Call, weight: Tensor, indices: Tensor, values: Tensor, saved: Tensor, granule: int) -> None:
    _indices(call, "indices", indices, weight)
    _values(call, "values", values, weight, indices, granule, fp32_too=True)
    _values(call, "saved", saved, weight, indices, granule)


def apply_(
    weight: Tensor, indices: Tensor, values: Tensor, saved: Tensor, alpha: float, delta: bool, granule: int
) -> None:
    call = Call("apply_")
    _granule(call.op, granule)
    _weight(call, weight, granule)
    _apply(call, weight, indices, values, saved, granule)
    _alpha(call.op, weight, alpha, delta)


def _switch(
    call: Call,
    weight: Tensor,
    indices_out: Tensor,
    saved_out: Tensor,
    indices_in: Tensor,
    values: Tensor,
    saved_in: Tensor,
    granule: int,
) -> None:
    _indices(call, "indices_out", indices_out, weight)
    _values(call, "saved_out", saved_out, weight, indices_out, granule)
    _indices(call, "indices_in", indices_in, weight)
    _values(call, "values", values, weight, indices_in, granule, fp32_too=True)
    _values(call, "saved_in", saved_in, weight, indices_in, granule)


def switch_(
    weight: Tensor,
    indices_out: Tensor,
    saved_out: Tensor,
    indices_in: Tensor,
    values: Tensor,
    saved_in: Tensor,
    alpha: float,
    delta: bool,
    granule: int,
) -> None:
    call = Call("switch_")
    _granule(call.op, granule)
    _weight(call, weight, granule)
    _switch(call, weight, indices_out, saved_out, indices_in, values, saved_in, granule)
    _alpha(call.op, weight, alpha, delta)


def scatter_add_(weight: Tensor, indices: Tensor, values: Tensor, granule: int) -> None:
    call = Call("scatter_add_")
    _granule(call.op, granule)
    _weight(call, weight, granule, arithmetic=True)
    _indices(call, "indices", indices, weight)
    _values(call, "values", values, weight, indices, granule, fp32_too=True)


def foreach_gather(weights: Sequence[Tensor], indices: Sequence[Tensor], granule: int) -> None:
    op = "foreach_gather"
    _granule(op, granule)
    _lengths(op, len(weights), indices=indices)
    _weights(op, weights, granule)
    for t, weight in enumerate(weights):
        _indices(Call(op, t), "indices", indices[t], weight)


def _foreach_move(
    op: str, weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], granule: int
) -> None:
    _granule(op, granule)
    _lengths(op, len(weights), indices=indices, values=values)
    _weights(op, weights, granule)
    for t, weight in enumerate(weights):
        _move(Call(op, t), weight, indices[t], values[t], granule)


def foreach_scatter_(
    weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], granule: int
) -> None:
    _foreach_move("foreach_scatter_", weights, indices, values, granule)


def foreach_swap_(weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], granule: int) -> None:
    _foreach_move("foreach_swap_", weights, indices, values, granule)


def foreach_apply_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    saved: Sequence[Tensor],
    alpha: float,
    delta: bool,
    granule: int,
) -> None:
    op = "foreach_apply_"
    _granule(op, granule)
    _lengths(op, len(weights), indices=indices, values=values, saved=saved)
    _weights(op, weights, granule)
    for t, weight in enumerate(weights):
        _apply(Call(op, t), weight, indices[t], values[t], saved[t], granule)
    for weight in weights:
        _alpha(op, weight, alpha, delta)


def foreach_switch_(
    weights: Sequence[Tensor],
    indices_out: Sequence[Tensor],
    saved_out: Sequence[Tensor],
    indices_in: Sequence[Tensor],
    values: Sequence[Tensor],
    saved_in: Sequence[Tensor],
    alpha: float,
    delta: bool,
    granule: int,
) -> None:
    op = "foreach_switch_"
    _granule(op, granule)
    _lengths(
        op,
        len(weights),
        indices_out=indices_out,
        saved_out=saved_out,
        indices_in=indices_in,
        values=values,
        saved_in=saved_in,
    )
    _weights(op, weights, granule)
    for t, weight in enumerate(weights):
        _switch(Call(op, t), weight, indices_out[t], saved_out[t], indices_in[t], values[t], saved_in[t], granule)
    for weight in weights:
        _alpha(op, weight, alpha, delta)


def check_indices(indices: Tensor, limit: int, granule: int) -> None:
    op = "check_indices"
    _granule(op, granule)
    _index_list(op, "indices", indices)
    _limit(op, limit, granule)


def _limit(op: str, limit: int, granule: int) -> None:
    text = f"must be a multiple of granule {granule} and not negative"
    _require(limit >= 0 and limit % granule == 0, op, "limit", text, limit)
    _granule_fits(op, granule, limit, f"limit {limit}")


# ---- fuse --------------------------------------------------------------------------------------------------


def _adapters(op: str, name: str, count: int) -> None:
    _require(1 <= count <= MAX_ADAPTERS, op, name, f"must have 1 to {MAX_ADAPTERS} tensors", count)


def fuse_plan(indices: Sequence[Tensor], granule: int) -> None:
    op = "fuse_plan"
    _granule(op, granule)
    _adapters(op, "indices", len(indices))
    first = indices[0].device
    for k, tensor in enumerate(indices):
        name = f"indices[{k}]"
        _require(tensor.device == first, op, name, f"must be on the device of indices[0] {first}", tensor.device)
        _index_list(op, name, tensor)


def fuse_(
    weight: Tensor,
    saved: Tensor,
    indices: Tensor,
    offsets: Tensor,
    sources: Tensor,
    values: Sequence[Tensor],
    alphas: Tensor,
    delta: Sequence[bool],
    granule: int,
) -> None:
    op, call = "fuse_", Call("fuse_")
    _granule(op, granule)
    _adapters(op, "values", len(values))
    text = f"must have one bool for each of the {len(values)} values"
    _require(len(delta) == len(values), op, "delta", text, len(delta))
    _weight(call, weight, granule, arithmetic=True)

    _device(op, "saved", saved, "weight", weight)
    _own_dtype(op, "saved", saved, "weight", weight.dtype, fp32_too=False)
    _nnz_entries(op, "saved", saved, indices, granule)
    _contiguous(op, "saved", saved)
    _indices(call, "indices", indices, weight)

    _indices(call, "offsets", offsets, weight)
    text = f"must have {indices.numel() + 1} entries (one more than the {indices.numel()} indices)"
    _require(offsets.numel() == indices.numel() + 1, op, "offsets", text, offsets.numel())
    _device(op, "sources", sources, "weight", weight)
    _one_of(op, "sources", sources, (torch.int64,))
    _one_dimensional(op, "sources", sources)
    _contiguous(op, "sources", sources)

    for k, tensor in enumerate(values):
        name = f"values[{k}]"
        _device(op, name, tensor, "weight", weight)
        _own_dtype(op, name, tensor, "weight", weight.dtype, fp32_too=True)
        text = f"must have the dtype of values[0] {dtype_name(values[0].dtype)}"
        _require(tensor.dtype == values[0].dtype, op, name, text, dtype_name(tensor.dtype))
        _one_dimensional(op, name, tensor)
        text = f"must have a multiple of granule {granule} entries"
        _require(tensor.numel() % granule == 0, op, name, text, tensor.numel())
        _contiguous(op, name, tensor)

    _device(op, "alphas", alphas, "weight", weight)
    _one_of(op, "alphas", alphas, (compute_dtype(weight.dtype),))
    _one_dimensional(op, "alphas", alphas)
    text = f"must have one entry for each of the {len(values)} values"
    _require(alphas.numel() == len(values), op, "alphas", text, alphas.numel())
    _contiguous(op, "alphas", alphas)


# ---- gradient ----------------------------------------------------------------------------------------------


def _leads(op: str, name: str, tensor: Tensor, lead: Tensor) -> None:
    """One token of the one for each of the other."""
    text = f"must have shape {list(lead.shape[:-1])} before its last dimension"
    _require(tensor.dim() == lead.dim(), op, name, text, _shape(tensor))
    for size, wanted in zip(tensor.shape[:-1], lead.shape[:-1], strict=True):
        _require(size == wanted, op, name, text, _shape(tensor))


def sampled_grad(grad_output: Tensor, input: Tensor, indices: Tensor, granule: int) -> None:
    op = "sampled_grad"
    _granule(op, granule)
    _one_of(op, "grad_output", grad_output, FLOATS)
    _require(grad_output.dim() >= 1, op, "grad_output", "must have at least one dimension", _shape(grad_output))
    _contiguous(op, "grad_output", grad_output)

    _device(op, "input", input, "grad_output", grad_output)
    _own_dtype(op, "input", input, "grad_output", grad_output.dtype, fp32_too=False)
    _leads(op, "input", input, grad_output)
    _contiguous(op, "input", input)

    _device(op, "indices", indices, "grad_output", grad_output)
    _index_list(op, "indices", indices)
    entries = grad_output.shape[-1] * input.shape[-1]
    if isinstance(entries, int):
        shape = [grad_output.shape[-1], input.shape[-1]]
        _require(entries < 2**63, op, "weight", "must have fewer than 2^63 entries", f"shape {shape}")
    _granule_divides(op, granule, entries, f"weight's {entries} entries")


# ---- overlay -----------------------------------------------------------------------------------------------


def _activations(op: str, name: str, tensor: Tensor) -> None:
    _one_of(op, name, tensor, FLOATS)
    _require(tensor.dim() >= 1, op, name, "must have at least one dimension", _shape(tensor))
    _contiguous(op, name, tensor)


def _sparse_matrix(op: str, features: int, out_features: int, transposed: bool, granule: int) -> None:
    """The sparse matrix, which refusals call the weight."""
    rows, columns = (features, out_features) if transposed else (out_features, features)
    entries = rows * columns
    if isinstance(entries, int):
        _require(entries < 2**63, op, "weight", "must have fewer than 2^63 entries", f"shape {[rows, columns]}")
    _granule_divides(op, granule, entries, f"weight's {entries} entries")


def _sparse_entries(
    op: str, member: str, indices: Tensor, values: Tensor, owner: str, lead: Tensor, granule: int
) -> None:
    _device(op, f"indices{member}", indices, owner, lead)
    _index_list(op, f"indices{member}", indices)
    _device(op, f"values{member}", values, owner, lead)
    _own_dtype(op, f"values{member}", values, owner, lead.dtype, fp32_too=True)
    _nnz_entries(op, f"values{member}", values, indices, granule)
    _contiguous(op, f"values{member}", values)


def sparse_linear(
    input: Tensor, indices: Tensor, values: Tensor, out_features: int, transposed: bool, granule: int
) -> None:
    op = "sparse_linear"
    _granule(op, granule)
    _activations(op, "input", input)
    _require(out_features >= 0, op, "out_features", "must be at least 0", out_features)
    _sparse_matrix(op, input.shape[-1], out_features, transposed, granule)
    _sparse_entries(op, "", indices, values, "input", input, granule)


def sparse_linear_add_(
    output: Tensor,
    input: Tensor,
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    adapters: Tensor,
    alphas: Tensor,
    transposed: bool,
    granule: int,
) -> None:
    op = "sparse_linear_add_"
    _granule(op, granule)
    _adapters(op, "indices", len(indices))
    text = f"must have one tensor for each of the {len(indices)} indices"
    _require(len(values) == len(indices), op, "values", text, len(values))
    _activations(op, "output", output)
    _device(op, "input", input, "output", output)
    _own_dtype(op, "input", input, "output", output.dtype, fp32_too=False)
    _leads(op, "input", input, output)
    _contiguous(op, "input", input)
    _sparse_matrix(op, input.shape[-1], output.shape[-1], transposed, granule)
    for k, (index, own) in enumerate(zip(indices, values, strict=True)):
        _sparse_entries(op, f"[{k}]", index, own, "output", output, granule)
        text = f"must have the dtype of values[0] {dtype_name(values[0].dtype)}"
        _require(own.dtype == values[0].dtype, op, f"values[{k}]", text, dtype_name(own.dtype))

    tokens = math.prod(output.shape[:-1])
    _device(op, "adapters", adapters, "output", output)
    _one_of(op, "adapters", adapters, (torch.int32,))
    _one_dimensional(op, "adapters", adapters)
    text = f"must have one entry for each of the {tokens} tokens"
    _require(adapters.numel() == tokens, op, "adapters", text, adapters.numel())
    _contiguous(op, "adapters", adapters)
    _device(op, "alphas", alphas, "output", output)
    _one_of(op, "alphas", alphas, (compute_dtype(output.dtype),))
    _one_dimensional(op, "alphas", alphas)
    text = f"must have one entry for each of the {len(indices)} indices"
    _require(alphas.numel() == len(indices), op, "alphas", text, alphas.numel())
    _contiguous(op, "alphas", alphas)


def adapter_numbers(op: str, adapters: Tensor, count: int) -> None:
    """Refuses a token that names an adapter that is not there. Synchronises."""
    bad = (adapters < -1) | (adapters >= count)
    if bool(bad.any()):
        position = int(bad.nonzero()[0])
        text = f"must be -1 or the number of one of the {count} indices"
        _require(False, op, "adapters", text, f"{int(adapters[position])} at position {position}")


# ---- optimize ----------------------------------------------------------------------------------------------


def _state(call: Call, word: str, state: Tensor, weight: Tensor, indices: Tensor, granule: int) -> None:
    op, name = call.op, call.name(word)
    _device(op, name, state, call.name("weight"), weight)
    _one_of(op, name, state, (compute_dtype(weight.dtype),))
    _nnz_entries(op, name, state, indices, granule)
    _contiguous(op, name, state)


def _grad(call: Call, grad: Tensor, weight: Tensor, indices: Tensor, granule: int) -> None:
    op, name, owner = call.op, call.name("grad"), call.name("weight")
    _device(op, name, grad, owner, weight)
    _own_dtype(op, name, grad, owner, weight.dtype, fp32_too=True)
    n, nnz = indices.numel(), indices.numel() * granule
    text = f"must have {nnz} entries ({n} indices of granule {granule}) or {owner}'s shape {list(weight.shape)}"
    _require(grad.shape == (nnz,) or grad.shape == weight.shape, op, name, text, _shape(grad))
    _contiguous(op, name, grad)


def _scalar_tensor(op: str, name: str, scalar: Tensor, owner: str, lead: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    _device(op, name, scalar, owner, lead)
    _one_of(op, name, scalar, dtypes)
    _require(scalar.numel() == 1, op, name, "must have 1 entry", _shape(scalar))


def _step(op: str, step: int | Tensor, owner: str, lead: Tensor | None) -> None:
    if isinstance(step, Tensor):
        if lead is not None:
            _scalar_tensor(op, "step", step, owner, lead, (torch.int64, torch.float32))
    else:
        _require(step >= 1, op, "step", "must be at least 1", step)


def _lr(op: str, lr: float | Tensor, owner: str, lead: Tensor | None) -> None:
    if isinstance(lr, Tensor):
        if lead is not None:
            _scalar_tensor(op, "lr", lr, owner, lead, (torch.float32, torch.float64))
    else:
        _finite(op, lr=lr)


def _finite(op: str, **numbers: float) -> None:
    for name, number in numbers.items():
        _require(math.isfinite(number), op, name, "must be finite", f"{number:g}")


def _adamw_numbers(op: str, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    # With all of a running average kept, the correction of its start divides by zero.
    for name, kept in (("beta1", beta1), ("beta2", beta2)):
        _require(0 <= kept < 1, op, name, "must be in [0, 1)", f"{kept:g}")
    _finite(op, eps=eps)
    _require(eps >= 0, op, "eps", "must be at least 0", f"{eps:g}")
    _finite(op, weight_decay=weight_decay)


def _adamw(
    call: Call,
    weight: Tensor,
    indices: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    granule: int,
) -> None:
    _indices(call, "indices", indices, weight)
    _state(call, "master", master, weight, indices, granule)
    _state(call, "exp_avg", exp_avg, weight, indices, granule)
    _state(call, "exp_avg_sq", exp_avg_sq, weight, indices, granule)
    _grad(call, grad, weight, indices, granule)


def adamw_(
    weight: Tensor,
    indices: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    step: int | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    granule: int,
) -> None:
    op, call = "adamw_", Call("adamw_")
    _granule(op, granule)
    _weight(call, weight, granule, arithmetic=True)
    _adamw(call, weight, indices, master, exp_avg, exp_avg_sq, grad, granule)
    _step(op, step, "weight", weight)
    _lr(op, lr, "weight", weight)
    _adamw_numbers(op, beta1, beta2, eps, weight_decay)


def foreach_adamw_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    step: int | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    granule: int,
) -> None:
    op = "foreach_adamw_"
    _granule(op, granule)
    _lengths(
        op,
        len(weights),
        indices=indices,
        masters=masters,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        grads=grads,
    )
    _weights(op, weights, granule, arithmetic=True)
    for t, weight in enumerate(weights):
        _adamw(Call(op, t), weight, indices[t], masters[t], exp_avgs[t], exp_avg_sqs[t], grads[t], granule)
    lead = weights[0] if weights else None
    _step(op, step, "weights[0]", lead)
    _lr(op, lr, "weights[0]", lead)
    _adamw_numbers(op, beta1, beta2, eps, weight_decay)


def _sgd(
    call: Call,
    weight: Tensor,
    indices: Tensor,
    master: Tensor,
    momentum_buffer: Tensor | None,
    grad: Tensor,
    granule: int,
) -> None:
    _indices(call, "indices", indices, weight)
    _state(call, "master", master, weight, indices, granule)
    if momentum_buffer is not None:
        _state(call, "momentum_buffer", momentum_buffer, weight, indices, granule)
    _grad(call, grad, weight, indices, granule)


def _momentum(op: str, name: str, given: bool, momentum: float, dampening: float, nesterov: bool) -> None:
    if momentum != 0:
        _require(given, op, name, f"must be given for momentum {momentum:g}", None)
    else:
        _require(not given, op, name, "must be None for momentum 0", "one" if name == "momentum_buffer" else "a list")
    if nesterov:
        allowed = momentum > 0 and dampening == 0
        got = f"momentum {momentum:g}, dampening {dampening:g}"
        _require(allowed, op, "nesterov", "must come with momentum above 0 and dampening 0", got)


def sgd_(
    weight: Tensor,
    indices: Tensor,
    master: Tensor,
    momentum_buffer: Tensor | None,
    grad: Tensor,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    granule: int,
) -> None:
    op, call = "sgd_", Call("sgd_")
    _granule(op, granule)
    _weight(call, weight, granule, arithmetic=True)
    _sgd(call, weight, indices, master, momentum_buffer, grad, granule)
    _lr(op, lr, "weight", weight)
    _finite(op, momentum=momentum, dampening=dampening, weight_decay=weight_decay)
    _momentum(op, "momentum_buffer", momentum_buffer is not None, momentum, dampening, nesterov)


def foreach_sgd_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    masters: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    granule: int,
) -> None:
    op = "foreach_sgd_"
    _granule(op, granule)
    _lengths(op, len(weights), indices=indices, masters=masters)
    if momentum_buffers is not None:
        _lengths(op, len(weights), momentum_buffers=momentum_buffers)
    _lengths(op, len(weights), grads=grads)
    _weights(op, weights, granule, arithmetic=True)
    for t, weight in enumerate(weights):
        buffer = None if momentum_buffers is None else momentum_buffers[t]
        _sgd(Call(op, t), weight, indices[t], masters[t], buffer, grads[t], granule)
    _lr(op, lr, "weights[0]", weights[0] if weights else None)
    _finite(op, momentum=momentum, dampening=dampening, weight_decay=weight_decay)
    _momentum(op, "momentum_buffers", momentum_buffers is not None, momentum, dampening, nesterov)


# ---- select ------------------------------------------------------------------------------------------------


def select_top(weight: Tensor, grad: Tensor | None, k: int, score: str, granule: int) -> None:
    op, call = "select_top", Call("select_top")
    _granule(op, granule)
    _weight(call, weight, granule, arithmetic=True)
    if grad is not None and score != "magnitude":  # magnitude does not read it
        _device(op, "grad", grad, "weight", weight)
        _own_dtype(op, "grad", grad, "weight", weight.dtype, fp32_too=True)
        text = f"must have weight's shape {list(weight.shape)}"
        _require(grad.shape == weight.shape, op, "grad", text, _shape(grad))
        _contiguous(op, "grad", grad)
    _require(score in SCORES, op, "score", "must be magnitude, grad or snip", f'"{score}"')
    granules = weight.numel() // granule
    _require(k >= 0, op, "k", f"must be in [0, {granules}]", k)
    _require(k <= granules, op, "k", f"must be in [0, {granules}]", k)
    _require(grad is not None or score == "magnitude", op, "grad", f"must be given for score {score}", None)


def select_random(numel: int, k: int, granule: int) -> None:
    op = "select_random"
    _granule(op, granule)
    _require(numel >= 0, op, "numel", "must be at least 0", numel)
    _granule_divides(op, granule, numel, f"numel {numel}")
    granules = numel // granule
    _require(0 <= k <= granules, op, "k", f"must be in [0, {granules}]", k)


# ---- codec -------------------------------------------------------------------------------------------------


def encode_indices(indices: Tensor, granule: int) -> None:
    op = "encode_indices"
    _granule(op, granule)
    _index_list(op, "indices", indices)


def decode_indices(code: Tensor, count: int, limit: int, dtype: torch.dtype, granule: int) -> None:
    op = "decode_indices"
    _granule(op, granule)
    _one_of(op, "code", code, (torch.uint8,))
    _one_dimensional(op, "code", code)
    _contiguous(op, "code", code)
    _require(count >= 0, op, "count", "must be at least 0", count)
    _limit(op, limit, granule)
    _require(dtype in INDEX_DTYPES, op, "dtype", "must be int32 or int64", dtype_name(dtype))


# ---- fingerprint -------------------------------------------------------------------------------------------


def fingerprint(weight: Tensor, granule: int) -> None:
    op = "fingerprint"
    _granule(op, granule)
    _contiguous(op, "weight", weight)
    allowed = weight.element_size() in (1, 2, 4, 8)
    _require(allowed, op, "weight", "must have entries of 1, 2, 4 or 8 bytes", dtype_name(weight.dtype))
    _granule_fits(op, granule, weight.numel(), f"weight's {weight.numel()} entries")


def fingerprint_at(weight: Tensor, indices: Tensor, granule: int) -> None:
    call = Call("fingerprint_at")
    _granule(call.op, granule)
    _weight(call, weight, granule)
    _indices(call, "indices", indices, weight)


# ---- diff --------------------------------------------------------------------------------------------------


def _snapshot(call: Call, snapshot: Tensor, weight: Tensor) -> None:
    op, name, owner = call.op, call.name("snapshot"), call.name("weight")
    _device(op, name, snapshot, owner, weight)
    _own_dtype(op, name, snapshot, owner, weight.dtype, fp32_too=False)
    text = f"must have {owner}'s shape {list(weight.shape)}"
    _require(snapshot.shape == weight.shape, op, name, text, _shape(snapshot))
    _contiguous(op, name, snapshot)


def diff_(snapshot: Tensor, weight: Tensor, granule: int) -> None:
    call = Call("diff_")
    _granule(call.op, granule)
    _weight(call, weight, granule)
    _snapshot(call, snapshot, weight)


def foreach_diff_(snapshots: Sequence[Tensor], weights: Sequence[Tensor], granule: int) -> None:
    op = "foreach_diff_"
    _granule(op, granule)
    _lengths(op, len(weights), snapshots=snapshots)
    _weights(op, weights, granule)
    for t, weight in enumerate(weights):
        _snapshot(Call(op, t), snapshots[t], weight)
