"""What each op means, in numpy and plain Python: independent of torch's arithmetic and of shira_ops.

Functions are named as the references and change their arguments in place. numpy rounds every operation on its own,
so fp32 arrays give the contract's bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CANONICAL_NAN = {
    torch.float16: np.uint16(0x7E00),
    torch.bfloat16: np.uint16(0x7FC0),
    torch.float32: np.uint32(0x7FC00000),
    torch.float64: np.uint64(0x7FF8000000000000),
}


def _cells(t: torch.Tensor) -> np.ndarray:
    """The tensor's memory as flat unsigned integers: writing there writes the tensor."""
    return t.view(_INTEGER[t.element_size()]).view(-1).numpy().view(f"u{t.element_size()}")


def _compute(dtype: torch.dtype) -> type[np.floating[Any]]:
    return np.float64 if dtype == torch.float64 else np.float32


def _load(cells: np.ndarray, dtype: torch.dtype, to: type[np.floating[Any]]) -> np.ndarray:
    if dtype == torch.bfloat16:
        native = (cells.astype(np.uint32) << 16).view(np.float32)
    else:
        native = cells.view({2: np.float16, 4: np.float32, 8: np.float64}[cells.itemsize])
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return native.astype(to)


def _store(numbers: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if dtype == torch.bfloat16:
            u = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32).astype(np.uint64)
            cells = ((u + 0x7FFF + ((u >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
        else:
            to = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}[dtype]
            cells = numbers.astype(to).view(f"u{dtype.itemsize}")
    return np.where(np.isnan(numbers), _CANONICAL_NAN[dtype], cells)


def _numbers(t: torch.Tensor, to: type[np.floating[Any]]) -> np.ndarray:
    return _load(_cells(t), t.dtype, to)


def _entries(indices: torch.Tensor, granule: int) -> np.ndarray:
    """The entries that granules cover, in order."""
    return (indices.numpy().astype(np.int64)[:, None] * granule + np.arange(granule)).reshape(-1)


def _quiet() -> Any:
    return np.errstate(all="ignore")


# switch


def gather(weight: torch.Tensor, indices: torch.Tensor, granule: int = 1) -> torch.Tensor:
    cells = _cells(weight)[_entries(indices, granule)]
    return torch.from_numpy(cells.view(f"i{cells.itemsize}").copy()).view(weight.dtype)


def scatter_(weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, granule: int = 1) -> None:
    _cells(weight)[_entries(indices, granule)] = _cells(values)


def swap_(weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, granule: int = 1) -> None:
    old = gather(weight, indices, granule)
    scatter_(weight, indices, values, granule)
    _cells(values)[:] = _cells(old)


def _mix(
    base: np.ndarray, dtype: torch.dtype, values: np.ndarray, values_dtype: torch.dtype, alpha: float, delta: bool
) -> np.ndarray:
    compute = _compute(dtype)
    with _quiet():
        a = compute(alpha)
        if a == 0:
            return base
        if a == 1 and not delta:
            return values if values_dtype == dtype else _store(_load(values, values_dtype, compute), dtype)
        b, v = _load(base, dtype, compute), _load(values, values_dtype, compute)
        return _store(b + a * (v if delta else v - b), dtype)


def apply_(
    weight: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    saved: torch.Tensor,
    *,
    alpha: float = 1.0,
    delta: bool = False,
    granule: int = 1,
) -> None:
    entries, cells = _entries(indices, granule), _cells(weight)
    base = cells[entries]
    _cells(saved)[:] = base
    cells[entries] = _mix(base, weight.dtype, _cells(values), values.dtype, alpha, delta)


def switch_(
    weight: torch.Tensor,
    indices_out: torch.Tensor,
    saved_out: torch.Tensor,
    indices_in: torch.Tensor,
    values: torch.Tensor,
    saved_in: torch.Tensor,
    *,
    alpha: float = 1.0,
    delta: bool = False,
    granule: int = 1,
) -> None:
    scatter_(weight, indices_out, saved_out, granule)
    apply_(weight, indices_in, values, saved_in, alpha=alpha, delta=delta, granule=granule)


def scatter_add_(
    weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, *, alpha: float = 1.0, granule: int = 1
) -> None:
    entries, cells = _entries(indices, granule), _cells(weight)
    cells[entries] = _mix(cells[entries], weight.dtype, _cells(values), values.dtype, alpha, True)


def foreach_gather(weights: list[torch.Tensor], indices: list[torch.Tensor], granule: int = 1) -> list[torch.Tensor]:
    return [gather(w, i, granule) for w, i in zip(weights, indices, strict=True)]


def foreach_scatter_(
    weights: list[torch.Tensor], indices: list[torch.Tensor], values: list[torch.Tensor], granule: int = 1
) -> None:
    for args in zip(weights, indices, values, strict=True):
        scatter_(*args, granule)


def foreach_swap_(
    weights: list[torch.Tensor], indices: list[torch.Tensor], values: list[torch.Tensor], granule: int = 1
) -> None:
    for args in zip(weights, indices, values, strict=True):
        swap_(*args, granule)


def foreach_apply_(
    weights: list[torch.Tensor],
    indices: list[torch.Tensor],
    values: list[torch.Tensor],
    saved: list[torch.Tensor],
    **scalars: Any,
) -> None:
    for args in zip(weights, indices, values, saved, strict=True):
        apply_(*args, **scalars)


def foreach_switch_(
    weights: list[torch.Tensor],
    indices_out: list[torch.Tensor],
    saved_out: list[torch.Tensor],
    indices_in: list[torch.Tensor],
    values: list[torch.Tensor],
    saved_in: list[torch.Tensor],
    **scalars: Any,
) -> None:
    for args in zip(weights, indices_out, saved_out, indices_in, values, saved_in, strict=True):
        switch_(*args, **scalars)


def check_indices(indices: torch.Tensor, limit: int, granule: int = 1) -> None:
    assert all(0 <= i < limit // granule for i in indices.tolist())
    assert all(a < b for a, b in zip(indices.tolist(), indices.tolist()[1:], strict=False))


# fuse


def fuse_plan(indices: list[torch.Tensor], granule: int = 1) -> tuple[torch.Tensor, ...]:
    sources: dict[int, list[int]] = {}
    for adapter, list_ in enumerate(indices):
        for position, index in enumerate(list_.tolist()):
            sources.setdefault(index, []).append(adapter << 48 | position)
    union = sorted(sources)
    offsets, firsts, members = [0], [], []
    for begin in range(0, len(union), 64):
        bits: dict[int, int] = {}
        first: dict[int, int] = {}
        for bit, index in enumerate(union[begin : begin + 64]):
            for source in sources[index]:
                bits[source >> 48] = bits.get(source >> 48, 0) + 2**bit
                first.setdefault(source >> 48, source)
        for adapter in sorted(bits):
            firsts.append(first[adapter])
            members.append(bits[adapter] - (2**64 if bits[adapter] >= 2**63 else 0))
        offsets.append(len(firsts))
    narrow = all(list_.dtype == torch.int32 for list_ in indices)
    return (
        torch.tensor(union, dtype=torch.int32 if narrow else torch.int64),
        torch.tensor(offsets, dtype=torch.int32),
        torch.tensor(firsts, dtype=torch.int64),
        torch.tensor(members, dtype=torch.int64),
    )


def fuse_(
    weight: torch.Tensor,
    saved: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    sources: torch.Tensor,
    members: torch.Tensor,
    values: list[torch.Tensor],
    alphas: torch.Tensor,
    *,
    delta: list[bool],
    refuse: bool = False,
    granule: int = 1,
) -> None:
    compute, g = _compute(weight.dtype), granule
    entries, cells = _entries(indices, g), _cells(weight)
    if not refuse:
        _cells(saved)[:] = cells[entries]
    base_cells = _cells(saved)
    strengths = alphas.numpy()
    for u in range(len(indices)):
        here = slice(u * g, (u + 1) * g)
        parts = []
        group = slice(offsets[u // 64], offsets[u // 64 + 1])
        for source, bits in zip(sources[group].tolist(), members[group].tolist(), strict=True):
            before = [bits >> bit & 1 for bit in range(u % 64)]
            adapter, position = source >> 48, (source & ((1 << 48) - 1)) + sum(before)
            if bits >> (u % 64) & 1 and strengths[adapter] != 0:
                parts.append((adapter, _cells(values[adapter])[position * g : (position + 1) * g]))
        if not parts:
            cells[entries[here]] = base_cells[here]
        elif len(parts) == 1 and strengths[parts[0][0]] == 1 and not delta[parts[0][0]]:
            adapter, new = parts[0]
            cells[entries[here]] = _mix(base_cells[here], weight.dtype, new, values[adapter].dtype, 1.0, False)
        else:
            base = _load(base_cells[here], weight.dtype, compute)
            total = base.copy()
            with _quiet():
                for adapter, new in parts:
                    v = _load(new, values[adapter].dtype, compute)
                    total = total + compute(strengths[adapter]) * (v if delta[adapter] else v - base)
            cells[entries[here]] = _store(total, weight.dtype)


# gradient


def sampled_grad(
    grad_output: torch.Tensor, input: torch.Tensor, indices: torch.Tensor, granule: int = 1
) -> torch.Tensor:
    """In fp64 and then rounded: exact where every product and sum is."""
    n = input.shape[-1]
    a = _numbers(grad_output, np.float64).reshape(-1, grad_output.shape[-1])
    b = _numbers(input, np.float64).reshape(-1, n)
    entries = _entries(indices, granule)
    with _quiet():
        total = (a[:, entries // n] * b[:, entries % n]).sum(0) if n else np.empty(0)
    return torch.from_numpy(total).to(torch.float64 if input.dtype == torch.float64 else torch.float32)


# optimize


def _power(base: float, exponent: int) -> float:
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def _sparse_grad(grad: torch.Tensor, master: torch.Tensor, entries: np.ndarray, to: Any) -> np.ndarray:
    numbers = _numbers(grad, to)
    return numbers if grad.shape == master.shape else numbers[entries]


def adamw_(
    weight: torch.Tensor,
    indices: torch.Tensor,
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad: torch.Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    granule: int = 1,
) -> None:
    c = _compute(weight.dtype)
    entries = _entries(indices, granule)
    g = _sparse_grad(grad, master, entries, c)
    p, m, v = (_numbers(t, c) for t in (master, exp_avg, exp_avg_sq))
    step_size = lr / (1 - _power(beta1, step))
    bias2_sqrt = math.sqrt(1 - _power(beta2, step))
    with _quiet():
        p = p * c(1 - lr * weight_decay)
        m = m + (g - m) * c(1 - beta1)
        v = v * c(beta2) + (g * g) * c(1 - beta2)
        denominator = np.sqrt(v) / c(bias2_sqrt) + c(eps)
        p = p - c(step_size) * (m / denominator)
    for state, numbers in ((master, p), (exp_avg, m), (exp_avg_sq, v)):
        _cells(state)[:] = _store(numbers, state.dtype)
    _cells(weight)[entries] = _store(p, weight.dtype)


def adamw_tensor_(*args: Any, step: torch.Tensor, lr: torch.Tensor, **rest: Any) -> None:
    adamw_(*args, step=int(step.item()), lr=float(lr.item()), **rest)


def sgd_(
    weight: torch.Tensor,
    indices: torch.Tensor,
    master: torch.Tensor,
    momentum_buffer: torch.Tensor | None,
    grad: torch.Tensor,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    granule: int = 1,
) -> None:
    c = _compute(weight.dtype)
    entries = _entries(indices, granule)
    g, p = _sparse_grad(grad, master, entries, c), _numbers(master, c)
    with _quiet():
        if weight_decay != 0:
            g = g + c(weight_decay) * p
        if momentum_buffer is not None:
            buffer = c(momentum) * _numbers(momentum_buffer, c) + c(1 - dampening) * g
            _cells(momentum_buffer)[:] = _store(buffer, momentum_buffer.dtype)
            g = g + c(momentum) * buffer if nesterov else buffer
        p = p - c(lr) * g
    _cells(master)[:] = _store(p, master.dtype)
    _cells(weight)[entries] = _store(p, weight.dtype)


def sgd_tensor_(*args: Any, lr: torch.Tensor, **rest: Any) -> None:
    sgd_(*args, lr=float(lr.item()), **rest)


def foreach_adamw_(
    weights: list[torch.Tensor],
    indices: list[torch.Tensor],
    masters: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    grads: list[torch.Tensor],
    **scalars: Any,
) -> None:
    for args in zip(weights, indices, masters, exp_avgs, exp_avg_sqs, grads, strict=True):
        adamw_(*args, **scalars)


def foreach_adamw_tensor_(*args: Any, step: torch.Tensor, lr: torch.Tensor, **rest: Any) -> None:
    foreach_adamw_(*args, step=int(step.item()), lr=float(lr.item()), **rest)


def foreach_sgd_(
    weights: list[torch.Tensor],
    indices: list[torch.Tensor],
    masters: list[torch.Tensor],
    momentum_buffers: list[torch.Tensor] | None,
    grads: list[torch.Tensor],
    **scalars: Any,
) -> None:
    buffers = momentum_buffers if momentum_buffers is not None else [None] * len(weights)
    for args in zip(weights, indices, masters, buffers, grads, strict=True):
        sgd_(*args, **scalars)


def foreach_sgd_tensor_(*args: Any, lr: torch.Tensor, **rest: Any) -> None:
    foreach_sgd_(*args, lr=float(lr.item()), **rest)


# select


def select_top(
    weight: torch.Tensor, grad: torch.Tensor | None, k: int, *, score: str, granule: int = 1
) -> torch.Tensor:
    c = _compute(weight.dtype)
    with _quiet():
        if score == "magnitude":
            scores = np.abs(_numbers(weight, c))
        elif score == "grad":
            scores = np.abs(_numbers(grad, c))
        else:
            scores = np.abs(_numbers(weight, c) * _numbers(grad, c))
        rows = scores.reshape(-1, granule)
        total = rows[:, 0].copy()
        for column in range(1, granule):
            total = total + rows[:, column]
    order = sorted(range(len(total)), key=lambda i: (math.isnan(total[i]), -total[i], i))
    return torch.tensor(sorted(order[:k]), dtype=torch.int32)


def splitmix64(x: int) -> int:
    z = (x + _GOLDEN) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def select_random(numel: int, k: int, seed: int, *, device: Any = None, granule: int = 1) -> torch.Tensor:
    domain = numel // granule
    bits = max(2, (domain - 1).bit_length())
    low = bits // 2
    high = bits - low
    keys = [splitmix64((seed + (r + 1) * _GOLDEN) & _MASK64) for r in range(8)]

    def permute(x: int) -> int:
        left, right = x >> low, x & ((1 << low) - 1)
        for r in range(8):
            if r % 2 == 0:
                left ^= splitmix64(right ^ keys[r]) >> (64 - high)
            else:
                right ^= splitmix64(left ^ keys[r]) >> (64 - low)
        return left << low | right

    chosen = []
    for i in range(k):
        y = permute(i)
        while y >= domain:
            y = permute(y)
        chosen.append(y)
    return torch.tensor(sorted(chosen), dtype=torch.int32 if domain < 1 << 31 else torch.int64)


# fingerprint


def _signed(x: int) -> torch.Tensor:
    x &= _MASK64
    return torch.tensor(x - (1 << 64) if x >> 63 else x, dtype=torch.int64)


def _word_sum(data: bytes, words: set[int]) -> torch.Tensor:
    total = 0
    for p in words:
        word = int.from_bytes(data[8 * p : 8 * p + 8], "little")  # a short tail reads as if zero-padded
        total += splitmix64(word ^ ((p * _GOLDEN) & _MASK64))
    return _signed(total)


def fingerprint(weight: torch.Tensor, granule: int = 1) -> torch.Tensor:
    data = _cells(weight).tobytes()
    return _word_sum(data, set(range((len(data) + 7) // 8)))


def fingerprint_part(weight: torch.Tensor, first: int, run: int, stride: int, granule: int = 1) -> torch.Tensor:
    data = _cells(weight).tobytes()
    total = 0
    for p in range((len(data) + 7) // 8):
        position = first + p // run * stride + p % run
        total += splitmix64(int.from_bytes(data[8 * p : 8 * p + 8], "little") ^ ((position * _GOLDEN) & _MASK64))
    return _signed(total)


def fingerprint_at(weight: torch.Tensor, indices: torch.Tensor, granule: int = 1) -> torch.Tensor:
    size = granule * weight.element_size()
    touched = {byte // 8 for i in indices.tolist() for byte in range(i * size, (i + 1) * size)}
    return _word_sum(_cells(weight).tobytes(), touched)


def diff_(snapshot: torch.Tensor, weight: torch.Tensor, granule: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    size = granule * weight.element_size()
    raw = [t.view(-1).view(torch.uint8).numpy().reshape(-1, size) for t in (snapshot, weight)]
    changed = [g for g in range(len(raw[0])) if raw[0][g].tobytes() != raw[1][g].tobytes()]
    values = torch.from_numpy(raw[1][changed].copy()).view(-1).view(weight.dtype)
    raw[0][:] = raw[1]
    return torch.tensor(changed, dtype=torch.int32), values


def foreach_diff_(
    snapshots: list[torch.Tensor], weights: list[torch.Tensor], granule: int = 1
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    found = [diff_(snapshot, weight, granule) for snapshot, weight in zip(snapshots, weights, strict=True)]
    return [indices for indices, _ in found], [values for _, values in found]


# overlay


def _dense(
    indices: torch.Tensor, values: torch.Tensor, shape: tuple[int, int], transposed: bool, granule: int
) -> np.ndarray:
    """The sparse matrix as it is multiplied: [out_features, features], in double precision."""
    dense = np.zeros(shape[0] * shape[1])
    dense[_entries(indices, granule)] = _numbers(values, np.float64)
    return dense.reshape(shape).T if transposed else dense.reshape(shape)


def _stored(numbers: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    cells = _store(numbers.astype(_compute(like.dtype)), like.dtype)
    return torch.from_numpy(cells.view(f"i{cells.itemsize}").copy()).view(like.dtype)


def sparse_linear(
    input: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    out_features: int,
    transposed: bool = False,
    granule: int = 1,
) -> torch.Tensor:
    """With sums in double precision, for numbers whose sums are exact."""
    *lead, features = input.shape
    shape = (features, out_features) if transposed else (out_features, features)
    dense = _dense(indices, values, shape, transposed, granule)
    given = _numbers(input, np.float64).reshape(math.prod(lead), features)
    return _stored(given @ dense.T, input).view(*lead, out_features)


def sparse_linear_add_(
    output: torch.Tensor,
    input: torch.Tensor,
    indices: list[torch.Tensor],
    values: list[torch.Tensor],
    adapters: torch.Tensor,
    alphas: torch.Tensor,
    transposed: bool = False,
    granule: int = 1,
) -> None:
    rows, given = output.view(len(adapters), -1), input.view(len(adapters), -1)
    shape = (given.shape[1], rows.shape[1]) if transposed else (rows.shape[1], given.shape[1])
    for t, k in enumerate(adapters.tolist()):
        if k >= 0 and float(alphas[k]) != 0:
            dense = _dense(indices[k], values[k], shape, transposed, granule)
            product = dense @ _numbers(given[t], np.float64)
            rows[t] = _stored(_numbers(rows[t], np.float64) + float(alphas[k]) * product, output)
