"""What an op refuses, and the sentences it says: op, argument, requirement, what was given.

The same checks as in csrc/checks.h and csrc/ops/, in the same order and words. `checked` puts them in front of a
function, so that references, fakes and Triton share them. There are three, and all come before the first write:

- `arguments`: shapes, dtypes, devices, strides and numbers, which fake tensors have too;
- `memory`: storage that is missing or misaligned, and written tensors that overlap others; for real tensors only;
- `content`: indices out of range or not strictly increasing. They are read for that, which on a GPU synchronises.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from . import plan
from ._ops import ops

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
SCORES = ("magnitude", "grad", "snip")
MAX_ADAPTERS = 32767  # the adapter number has 15 bits of a source, above the position's 48

Given = Mapping[str, Any]  # the arguments of a call by their names in the schema

_F = TypeVar("_F", bound=Callable[..., Any])


# ---- shared with the other modules -------------------------------------------------------------------------


def overload(op: str) -> OpOverload:
    """The op of a name such as `adamw_` or `adamw_.tensor`."""
    packet, _, name = op.partition(".")
    return cast(OpOverload, getattr(getattr(ops, packet), name or "default"))


def title(op: OpOverload) -> str:
    """The op's name in refusals, without its overload."""
    return op._schema.name.partition("::")[2]


def named(op: OpOverload, args: Sequence[Any], kwargs: Given) -> list[tuple[str, Tensor]]:
    """Every tensor of a call with its name, in the order of the schema. Refuses None for a tensor, which the
    dispatcher lets pass."""
    found: list[tuple[str, Tensor]] = []
    values = {**dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)), **kwargs}
    for argument in op._schema.arguments:
        value = values.get(argument.name, argument.default_value)
        if value is None and str(argument.type) == "Tensor":
            _given(Call(title(op)), argument.name, None)
        found += [(_name(argument.name, member), tensor) for member, tensor in _tensors(value)]
    return found


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def index_dtype(granules: int) -> torch.dtype:
    """The dtype of indices below `granules` that an op makes itself."""
    return torch.int32 if granules < 2**31 else torch.int64


def is_dense(grad: Tensor, weight: Tensor, nnz: int) -> bool:
    """Whether a gradient has the weight's shape; where that is `[nnz]` too, it is not dense."""
    return grad.shape != (nnz,) and grad.shape == weight.shape


# ---- checked -----------------------------------------------------------------------------------------------


def checked(op: str, *, memory: bool = True, content: bool = False) -> Callable[[_F], _F]:
    """A decorator: checks the arguments of a call, then passes all of them to the function by name, defaults too.

    `memory=False` is for fakes, which have no memory. `content=True` reads the indices, which on a GPU synchronises.
    """
    checks = _checks(op)

    def decorate(function: _F) -> _F:
        @functools.wraps(function)
        def kernel(*args: Any, **kwargs: Any) -> Any:
            given = checks.bind(args, kwargs)
            checks.arguments(given)
            if memory:
                checks.memory(given)
            if content:
                checks.content(given)
            return function(**given)

        return cast(_F, kernel)

    return decorate


class _Checks:
    """What one op refuses, worked out once from its schema."""

    def __init__(self, op: str) -> None:
        own = overload(op)
        arguments = own._schema.arguments
        self.op = title(own)
        self.names = [a.name for a in arguments]
        self.defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
        written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
        self.written = [name in written for name in self.names]
        single = self.op.removeprefix("foreach_")
        if single in _BESIDE:
            self.arguments, self.content = _over_weights(self.op, self.names)
        else:
            self.arguments = _with_names(_ARGUMENTS[single])
            self.content = _with_names(_CONTENT[single]) if single in _CONTENT else lambda given: None

    def bind(self, args: Sequence[Any], kwargs: Given) -> dict[str, Any]:
        """The arguments of a call by name, defaults too."""
        given = self.defaults.copy()
        given.update(zip(self.names, args, strict=False))
        given.update(kwargs)
        twice = args and not kwargs.keys().isdisjoint(self.names[: len(args)])
        if len(given) != len(self.names) or len(args) > len(self.names) or twice:
            got = f"{len(args)} by position and {', '.join(kwargs) or 'none'} by name"
            raise TypeError(f"{self.op}: takes {', '.join(self.names)}, got {got}")
        return given

    def memory(self, given: Given) -> None:
        found = []
        for word, written in zip(self.names, self.written, strict=True):
            if word == "grad" and given.get("score") == "magnitude":  # select_top does not read it
                continue
            found += [(word, member, tensor, written) for member, tensor in _tensors(given[word])]
        _memory(self.op, found)


_checks = functools.cache(_Checks)


def _with_names(check: Callable[..., None]) -> Callable[[Given], None]:
    """A check that takes some of the op's arguments, by their names."""
    names = list(inspect.signature(check).parameters)
    return lambda given: check(**{name: given[name] for name in names})


def _tensors(value: Any) -> Iterator[tuple[int | None, Tensor]]:
    """The tensors of one argument, each with its place in the list (None for a tensor alone)."""
    if isinstance(value, Tensor):
        yield None, value
    elif isinstance(value, (list, tuple)):
        for member, tensor in enumerate(value):
            if isinstance(tensor, Tensor):
                yield member, tensor


def _name(word: str, member: int | None) -> str:
    return word if member is None else f"{word}[{member}]"


class Call(NamedTuple):
    """The op that is checking; the tensor that the others must agree with; for lists, the place in them."""

    op: str
    owner: str = "weight"
    member: int | None = None

    def require(self, condition: bool | torch.SymBool, word: str, requirement: str, *fill: object, got: object) -> None:
        """Refuses the argument `word` unless the condition holds. The sentence is put together only when it is needed:
        `fill` goes into the places {} of the requirement."""
        if condition is not True:
            # Takes conditions on sizes that are known only at run time, too. It costs 2 us, so not where they hold.
            torch._check(
                condition,
                lambda: (
                    f"{self.op}: {_name(word, self.member)} {requirement.format(*map(_text, fill))}, got {_text(got)}"
                ),
            )


def _text(value: object) -> str:
    """A value as refusals print it."""
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, torch.Size):
        return f"shape {list(value)}"
    return f"{value:g}" if isinstance(value, float) else str(value)  # as a C++ stream prints it


# ---- one argument ------------------------------------------------------------------------------------------


def _given(call: Call, word: str, tensor: Tensor | None) -> None:
    call.require(tensor is not None, word, "must be a tensor", got=None)


def _granule(op: str, granule: int) -> None:
    Call(op).require(granule >= 1, "granule", "must be at least 1", got=granule)


def _granule_fits(op: str, granule: int, numel: int, whole: str) -> None:
    """A granule is at most as long as the whole, of `numel` entries. `whole` names it, with a {} for the number."""
    if granule > 1:  # asked first, so that granule 1 needs no guard on a size that is known only at run time
        fits = granule <= numel
        if fits is not True:
            most = "must be at most {} for " + whole
            torch._check(fits, lambda: f"{op}: granule {most.format(max(numel, 1), numel)}, got {granule}")


def _granule_divides(op: str, granule: int, numel: int, whole: str) -> None:
    _granule_fits(op, granule, numel, whole)
    Call(op).require(numel % granule == 0, "granule", "must divide " + whole, numel, got=granule)


def _contiguous(call: Call, word: str, tensor: Tensor) -> None:
    _given(call, word, tensor)
    if not tensor.is_contiguous():
        got = f"{_text(tensor.shape)} with strides {list(tensor.stride())}"
        call.require(False, word, "must be contiguous", got=got)


def _device(call: Call, word: str, tensor: Tensor, lead: Tensor) -> None:
    _given(call, word, tensor)
    same = tensor.device == lead.device
    call.require(same, word, "must be on {}'s device {}", call.owner, lead.device, got=tensor.device)


def _one_of(call: Call, word: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        *others, last = map(dtype_name, dtypes)
        text = f"{', '.join(others)} or {last}" if others else last
        call.require(False, word, "must be {}", text, got=tensor.dtype)


def _dtype(call: Call, word: str, tensor: Tensor, lead: Tensor, fp32_too: bool = False) -> None:
    own = lead.dtype
    if tensor.dtype != own:
        fp32_too = fp32_too and own in FLOATS and own != torch.float32
        text = "must have {}'s dtype {} or float32" if fp32_too else "must have {}'s dtype {}"
        allowed = fp32_too and tensor.dtype == torch.float32
        call.require(allowed, word, text, call.owner, own, got=tensor.dtype)


def _one_dimensional(call: Call, word: str, tensor: Tensor) -> None:
    call.require(tensor.dim() == 1, word, "must be 1-D", got=tensor.shape)


def _selected(call: Call, word: str, tensor: Tensor, indices: Tensor, granule: int) -> None:
    """One entry for each that the indices select."""
    _one_dimensional(call, word, tensor)
    n, size = indices.numel(), tensor.numel()
    text = "must have {} entries ({} indices of granule {})"
    call.require(size == n * granule, word, text, n * granule, n, granule, got=size)


def _index_list(call: Call, word: str, indices: Tensor) -> None:
    _given(call, word, indices)
    _one_of(call, word, indices, *INDEX_DTYPES)
    _one_dimensional(call, word, indices)
    _contiguous(call, word, indices)


def _entries(call: Call, word: str, tensor: Tensor) -> None:
    """Entries of a size that can be moved."""
    known = tensor.element_size() in (1, 2, 4, 8)
    call.require(known, word, "must have entries of 1, 2, 4 or 8 bytes", got=tensor.dtype)


def _weight(call: Call, word: str, weight: Tensor, granule: int, arithmetic: bool) -> None:
    _contiguous(call, word, weight)
    if arithmetic:
        _one_of(call, word, weight, *FLOATS)
    else:
        _entries(call, word, weight)
    _granule_divides(call.op, granule, weight.numel(), call.owner + "'s {} entries")


def _limit(op: str, limit: int, granule: int) -> None:
    text = "must be a multiple of granule {} and not negative"
    Call(op).require(limit >= 0 and limit % granule == 0, "limit", text, granule, got=limit)
    _granule_fits(op, granule, limit, "limit {}")


# ---- tensors beside a weight -------------------------------------------------------------------------------
# All have the form `check(call, word, tensor, weight, indices, granule)`, where `indices` are the last ones before the
# tensor in the schema.


def _indices(call: Call, word: str, indices: Tensor, weight: Tensor, *_: Any) -> None:
    _device(call, word, indices, weight)
    _index_list(call, word, indices)


def _own(call: Call, word: str, values: Tensor, weight: Tensor, indices: Tensor, granule: int) -> None:
    """Entries of the weight, in its dtype."""
    _device(call, word, values, weight)
    _dtype(call, word, values, weight)
    _selected(call, word, values, indices, granule)
    _contiguous(call, word, values)


def _values(call: Call, word: str, values: Tensor, weight: Tensor, indices: Tensor, granule: int) -> None:
    """What arithmetic reads: in the weight's dtype or float32."""
    _device(call, word, values, weight)
    _dtype(call, word, values, weight, fp32_too=True)
    _selected(call, word, values, indices, granule)
    _contiguous(call, word, values)


def _state(call: Call, word: str, state: Tensor, weight: Tensor, indices: Tensor, granule: int) -> None:
    """What an optimizer keeps for each entry, in the dtype of the arithmetic."""
    _device(call, word, state, weight)
    _one_of(call, word, state, compute_dtype(weight.dtype))
    _selected(call, word, state, indices, granule)
    _contiguous(call, word, state)


def _grad(call: Call, word: str, grad: Tensor, weight: Tensor, indices: Tensor, granule: int) -> None:
    _device(call, word, grad, weight)
    _dtype(call, word, grad, weight, fp32_too=True)
    n = indices.numel()
    text = "must have {} entries ({} indices of granule {}) or {}'s {}"
    right = grad.shape == (n * granule,) or grad.shape == weight.shape
    call.require(right, word, text, n * granule, n, granule, call.owner, weight.shape, got=grad.shape)
    _contiguous(call, word, grad)


def _copy(call: Call, word: str, tensor: Tensor, weight: Tensor, *_: Any, fp32_too: bool = False) -> None:
    """A tensor of the weight's shape."""
    _device(call, word, tensor, weight)
    _dtype(call, word, tensor, weight, fp32_too)
    call.require(tensor.shape == weight.shape, word, "must have {}'s {}", call.owner, weight.shape, got=tensor.shape)
    _contiguous(call, word, tensor)


# ---- numbers -----------------------------------------------------------------------------------------------
# `call` has the first weight for its owner; `weights` are all of them.


def _alpha(call: Call, weights: Sequence[Tensor], given: Given) -> None:
    for weight in weights:
        if weight.dtype not in FLOATS:  # otherwise alpha is not looked at: it may be known only at run time
            alpha, delta = given["alpha"], given["delta"]
            text = "must be 1 and delta False for weights of dtype {}"
            got = f"alpha {alpha:g}, delta {delta}"
            call.require(alpha == 1 and not delta, "alpha", text, weight.dtype, got=got)


def _finite(call: Call, given: Given, *words: str) -> None:
    for word in words:
        call.require(math.isfinite(given[word]), word, "must be finite", got=given[word])


def _scalar_tensor(call: Call, word: str, scalar: Any, weights: Sequence[Tensor], *dtypes: torch.dtype) -> None:
    if weights:
        _device(call, word, scalar, weights[0])
        _one_of(call, word, scalar, *dtypes)
        call.require(scalar.numel() == 1, word, "must have 1 entry", got=scalar.shape)


def _lr(call: Call, weights: Sequence[Tensor], given: Given) -> None:
    if given["lr"] is None or isinstance(given["lr"], Tensor):
        _scalar_tensor(call, "lr", given["lr"], weights, torch.float32, torch.float64)
    else:
        _finite(call, given, "lr")


def _adamw_numbers(call: Call, weights: Sequence[Tensor], given: Given) -> None:
    step = given["step"]
    if step is None or isinstance(step, Tensor):
        _scalar_tensor(call, "step", step, weights, torch.int64, torch.float32)
    else:
        call.require(step >= 1, "step", "must be at least 1", got=step)
    _lr(call, weights, given)
    for word in ("beta1", "beta2"):  # at 1 the bias correction would divide by zero
        call.require(0 <= given[word] < 1, word, "must be in [0, 1)", got=given[word])
    _finite(call, given, "eps")
    call.require(given["eps"] >= 0, "eps", "must be at least 0", got=given["eps"])
    _finite(call, given, "weight_decay")


def _sgd_numbers(call: Call, weights: Sequence[Tensor], given: Given) -> None:
    _lr(call, weights, given)
    _finite(call, given, "momentum", "dampening", "weight_decay")
    momentum, dampening = given["momentum"], given["dampening"]
    word, what = ("momentum_buffers", "a list") if "momentum_buffers" in given else ("momentum_buffer", "one")
    if momentum != 0:
        call.require(given[word] is not None, word, "must be given for momentum {}", momentum, got=None)
    else:
        call.require(given[word] is None, word, "must be None for momentum 0", got=what)
    if given["nesterov"]:
        got = f"momentum {momentum:g}, dampening {dampening:g}"
        allowed = momentum > 0 and dampening == 0
        call.require(allowed, "nesterov", "must come with momentum above 0 and dampening 0", got=got)


# ---- ops over a weight, and over lists of them -------------------------------------------------------------

# What stands beside the weight, in the order of the schema. The foreach_ form of an op has a list of each.
_BESIDE: dict[str, dict[str, Callable[..., None]]] = {
    "gather": {"indices": _indices},
    "scatter_": {"indices": _indices, "values": _own},
    "swap_": {"indices": _indices, "values": _own},
    "apply_": {"indices": _indices, "values": _values, "saved": _own},
    "switch_": {
        "indices_out": _indices,
        "saved_out": _own,
        "indices_in": _indices,
        "values": _values,
        "saved_in": _own,
    },
    "scatter_add_": {"indices": _indices, "values": _values},
    "adamw_": {"indices": _indices, "master": _state, "exp_avg": _state, "exp_avg_sq": _state, "grad": _grad},
    "sgd_": {"indices": _indices, "master": _state, "momentum_buffer": _state, "grad": _grad},
    "fingerprint_at": {"indices": _indices},
    "diff_": {"snapshot": _copy},
}
_ARITHMETIC = ("scatter_add_", "adamw_", "sgd_")
_NUMBERS = {"apply_": _alpha, "switch_": _alpha, "adamw_": _adamw_numbers, "sgd_": _sgd_numbers}


def _over_weights(op: str, names: Sequence[str]) -> tuple[Callable[[Given], None], Callable[[Given], None]]:
    """The checks of arguments and of content, of an op over one weight as of its foreach_ form: one weight is a list of
    one. They differ in names (`weight`, `weights[0]`)."""
    single = op.removeprefix("foreach_")
    listed = op != single
    schema = overload(single)._schema.arguments
    words = dict(zip((argument.name for argument in schema), names, strict=True))
    optional = {argument.name for argument in schema if "Optional" in str(argument.type)}
    beside = [(words[word], check, word in optional) for word, check in _BESIDE[single].items()]
    arithmetic, numbers = single in _ARITHMETIC, _NUMBERS.get(single)

    def column(given: Given, word: str, may_be_none: bool = False) -> Sequence[Any] | None:
        value = given[word]
        return value if listed or (may_be_none and value is None) else (value,)

    def arguments(given: Given) -> None:
        granule = given["granule"]
        _granule(op, granule)
        weights = column(given, words["weight"]) or ()
        columns = [(word, check, column(given, word, may_be_none)) for word, check, may_be_none in beside]
        calls = [Call(op, f"weights[{t}]", t) for t in range(len(weights))] if listed else [Call(op)]
        for word, _, tensors in columns:
            if tensors is not None:
                same = len(tensors) == len(weights)
                text = "must have one tensor for each of the {} weights"
                Call(op).require(same, word, text, len(weights), got=len(tensors))
        for call, weight in zip(calls, weights, strict=True):
            _weight(call, words["weight"], weight, granule, arithmetic)
            first = weights[0].device
            text = "must be on the device of weights[0] {}"
            call.require(weight.device == first, words["weight"], text, first, got=weight.device)
        for t, (call, weight) in enumerate(zip(calls, weights, strict=True)):
            indices = None
            for word, check, tensors in columns:
                if tensors is not None:
                    check(call, word, tensors[t], weight, indices, granule)
                    indices = tensors[t] if check is _indices else indices
        if numbers is not None:
            numbers(Call(op, "weights[0]" if listed else "weight"), weights, given)

    def contents(given: Given) -> None:
        weights = column(given, words["weight"]) or ()
        lists = [(word, column(given, word) or ()) for word, check, _ in beside if check is _indices]
        for t, weight in enumerate(weights):
            for word, indices in lists:
                name = _name(word, t if listed else None)
                content(op, name, indices[t], weight.numel() // given["granule"])

    return arguments, contents


# ---- the other ops: functions of their arguments -----------------------------------------------------------


def _check_indices(indices: Tensor, limit: int, granule: int) -> None:
    call = Call("check_indices")
    _granule(call.op, granule)
    _index_list(call, "indices", indices)
    _limit(call.op, limit, granule)


def _check_indices_content(indices: Tensor, limit: int, granule: int) -> None:
    content("check_indices", "indices", indices, limit // granule)


def _adapters(op: str, word: str, count: int) -> None:
    text = "must have 1 to {} tensors"
    Call(op).require(1 <= count <= MAX_ADAPTERS, word, text, MAX_ADAPTERS, got=count)


def _fuse_plan(indices: Sequence[Tensor], granule: int) -> None:
    _granule("fuse_plan", granule)
    _adapters("fuse_plan", "indices", len(indices))
    for k, own in enumerate(indices):
        call = Call("fuse_plan", member=k)
        _given(call, "indices", own)
        first = indices[0].device
        text = "must be on the device of indices[0] {}"
        call.require(own.device == first, "indices", text, first, got=own.device)
        _index_list(call, "indices", own)


def _fuse_plan_content(indices: Sequence[Tensor]) -> None:
    for k, own in enumerate(indices):
        content("fuse_plan", f"indices[{k}]", own, None)


def _fuse_(
    weight: Tensor,
    saved: Tensor,
    indices: Tensor,
    offsets: Tensor,
    sources: Tensor,
    members: Tensor,
    values: Sequence[Tensor],
    alphas: Tensor,
    delta: Sequence[bool],
    granule: int,
) -> None:
    call = Call("fuse_")
    _granule(call.op, granule)
    _adapters(call.op, "values", len(values))
    text = "must have one bool for each of the {} values"
    call.require(len(delta) == len(values), "delta", text, len(values), got=len(delta))
    _weight(call, "weight", weight, granule, arithmetic=True)
    _given(call, "indices", indices)
    _own(call, "saved", saved, weight, indices, granule)
    _indices(call, "indices", indices, weight)

    _indices(call, "offsets", offsets, weight)
    n, size = indices.numel(), offsets.numel()
    text = "must have {} entries (one for each 64 of the {} indices, and one more)"
    call.require(size == plan.groups(n) + 1, "offsets", text, plan.groups(n) + 1, n, got=size)
    for word, own in (("sources", sources), ("members", members)):
        _device(call, word, own, weight)
        _one_of(call, word, own, torch.int64)
        _one_dimensional(call, word, own)
        _contiguous(call, word, own)
    size = sources.numel()
    text = "must have one entry for each of the {} sources"
    call.require(members.numel() == size, "members", text, size, got=members.numel())

    for k, own in enumerate(values):
        member = Call("fuse_", member=k)
        _device(member, "values", own, weight)
        _dtype(member, "values", own, weight, fp32_too=True)
        first = values[0].dtype
        member.require(own.dtype == first, "values", "must have the dtype of values[0] {}", first, got=own.dtype)
        _one_dimensional(member, "values", own)
        whole = own.numel() % granule == 0
        member.require(whole, "values", "must have a multiple of granule {} entries", granule, got=own.numel())
        _contiguous(member, "values", own)

    _device(call, "alphas", alphas, weight)
    _one_of(call, "alphas", alphas, compute_dtype(weight.dtype))
    _one_dimensional(call, "alphas", alphas)
    text = "must have one entry for each of the {} values"
    call.require(alphas.numel() == len(values), "alphas", text, len(values), got=alphas.numel())
    _contiguous(call, "alphas", alphas)


def _fuse_content(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    sources: Tensor,
    members: Tensor,
    values: Sequence[Tensor],
    granule: int,
) -> None:
    content("fuse_", "indices", indices, weight.numel() // granule)
    total = sources.numel()
    bad = torch.ones_like(offsets, dtype=torch.bool)
    bad[0] = offsets[0] != 0
    bad[1:] = (offsets[1:] < offsets[:-1]) | (offsets[1:] > total)
    bad[-1] |= offsets[-1] != total
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        got = f"{int(offsets[at])} at position {at}"
        Call("fuse_").require(False, "offsets", "must rise from 0 to the {} sources", total, got=got)
    bits = plan.unpacked(members)
    n, room = indices.numel(), indices.numel() % plan.GROUP
    last = int(offsets[-2]) if room > 0 else total
    beyond = bits[last:, room:].nonzero()
    if beyond.numel() > 0:
        at, entry = beyond[0].tolist()
        got = f"entry {n + entry} at position {last + at}"
        Call("fuse_").require(False, "members", "must name entries of the {} indices", n, got=got)
    (adapter, position), count = plan.parts(sources), bits.sum(1)
    sizes = torch.tensor([own.numel() // granule for own in values], device=sources.device)
    known = (adapter >= 0) & (adapter < len(values))
    bad = ~known | (position + count > sizes[adapter.where(known, 0)])
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        text = "must name one of the {} values and granules of it"
        got = f"adapter {int(adapter[at])}, granule {int(position[at])} with {int(count[at])} members at position {at}"
        Call("fuse_").require(False, "sources", text, len(values), got=got)


def _activations(call: Call, word: str, tensor: Tensor) -> None:
    _given(call, word, tensor)
    _one_of(call, word, tensor, *FLOATS)
    call.require(tensor.dim() >= 1, word, "must have at least one dimension", got=tensor.shape)
    _contiguous(call, word, tensor)


def _tokens(call: Call, word: str, tensor: Tensor, lead: Tensor) -> None:
    """Refuses a tensor without exactly one token for each of `lead`."""
    sizes, text = lead.shape[:-1], "must have {} before its last dimension"
    call.require(tensor.dim() == lead.dim(), word, text, sizes, got=tensor.shape)
    for size, wanted in zip(tensor.shape[:-1], sizes, strict=True):
        call.require(size == wanted, word, text, sizes, got=tensor.shape)


def _matrix(call: Call, rows: int, columns: int, granule: int) -> None:
    """The weight of a linear layer, for ops that are given only input and output."""
    entries = rows * columns
    if isinstance(entries, int):
        shape = torch.Size([rows, columns])
        call.require(entries < 2**63, "weight", "must have fewer than 2^63 entries", got=shape)
    _granule_divides(call.op, granule, entries, "weight's {} entries")


def _sampled_grad(grad_output: Tensor, input: Tensor, indices: Tensor, granule: int) -> None:
    call = Call("sampled_grad", "grad_output")
    _granule(call.op, granule)
    _activations(call, "grad_output", grad_output)

    _device(call, "input", input, grad_output)
    _dtype(call, "input", input, grad_output)
    _tokens(call, "input", input, grad_output)
    _contiguous(call, "input", input)

    _device(call, "indices", indices, grad_output)
    _index_list(call, "indices", indices)
    _matrix(call, grad_output.shape[-1], input.shape[-1], granule)


def _sampled_grad_content(grad_output: Tensor, input: Tensor, indices: Tensor, granule: int) -> None:
    content("sampled_grad", "indices", indices, grad_output.shape[-1] * input.shape[-1] // granule)


def _select_top(weight: Tensor, grad: Tensor | None, k: int, score: str, granule: int) -> None:
    call = Call("select_top")
    _granule(call.op, granule)
    _weight(call, "weight", weight, granule, arithmetic=True)
    if grad is not None and score != "magnitude":  # magnitude does not read it
        _copy(call, "grad", grad, weight, fp32_too=True)
    call.require(score in SCORES, "score", "must be magnitude, grad or snip", got=f'"{score}"')
    _count(call, k, weight.numel() // granule)
    call.require(grad is not None or score == "magnitude", "grad", "must be given for score {}", score, got=None)


def _select_random(numel: int, k: int, granule: int) -> None:
    call = Call("select_random")
    _granule(call.op, granule)
    call.require(numel >= 0, "numel", "must be at least 0", got=numel)
    _granule_divides(call.op, granule, numel, "numel {}")
    _count(call, k, numel // granule)


def _count(call: Call, k: int, granules: int) -> None:
    # Not `0 <= k <= granules`: that would ask now for the value of a size that is known only at run time.
    call.require(k >= 0, "k", "must be in [0, {}]", granules, got=k)
    call.require(k <= granules, "k", "must be in [0, {}]", granules, got=k)


def _encode_indices(indices: Tensor, granule: int, version: int) -> None:
    call = Call("encode_indices")
    _granule(call.op, granule)
    _index_list(call, "indices", indices)
    call.require(version in (1, 2), "version", "must be 1 or 2", got=version)


def _encode_indices_content(indices: Tensor) -> None:
    content("encode_indices", "indices", indices, None)


def _decode_indices(code: Tensor, count: int, limit: int, dtype: torch.dtype, granule: int) -> None:
    call = Call("decode_indices")
    _granule(call.op, granule)
    _given(call, "code", code)
    _one_of(call, "code", code, torch.uint8)
    _one_dimensional(call, "code", code)
    _contiguous(call, "code", code)
    call.require(count >= 0, "count", "must be at least 0", got=count)
    _limit(call.op, limit, granule)
    call.require(dtype in INDEX_DTYPES, "dtype", "must be int32 or int64", got=dtype)


def _fingerprint(weight: Tensor, granule: int) -> None:
    call = Call("fingerprint")
    _granule(call.op, granule)
    _contiguous(call, "weight", weight)
    _entries(call, "weight", weight)
    _granule_fits(call.op, granule, weight.numel(), "weight's {} entries")


def _fingerprint_part(weight: Tensor, first: int, run: int, stride: int, granule: int) -> None:
    call = Call("fingerprint_part")
    _granule(call.op, granule)
    _contiguous(call, "weight", weight)
    _entries(call, "weight", weight)
    _granule_fits(call.op, granule, weight.numel(), "weight's {} entries")
    call.require(first >= 0, "first", "must be at least 0", got=first)
    call.require(run >= 1, "run", "must be at least 1", got=run)
    call.require(stride >= run, "stride", "must be at least run {}", run, got=stride)


def _sparse_linear(
    input: Tensor, indices: Tensor, values: Tensor, out_features: int, transposed: bool, granule: int
) -> None:
    call = Call("sparse_linear", "input")
    _granule(call.op, granule)
    _activations(call, "input", input)
    call.require(out_features >= 0, "out_features", "must be at least 0", got=out_features)
    sizes = (input.shape[-1], out_features)
    _matrix(call, *(sizes if transposed else sizes[::-1]), granule)
    _indices(call, "indices", indices, input)
    _values(call, "values", values, input, indices, granule)


def _sparse_linear_content(input: Tensor, indices: Tensor, out_features: int, granule: int) -> None:
    content("sparse_linear", "indices", indices, input.shape[-1] * out_features // granule)


def _table(call: Call, word: str, tensor: Tensor, lead: Tensor, dtype: torch.dtype, count: int, others: str) -> None:
    """A tensor with one entry for each of `count` others."""
    _device(call, word, tensor, lead)
    _one_of(call, word, tensor, dtype)
    _one_dimensional(call, word, tensor)
    text = "must have one entry for each of the {} {}"
    call.require(tensor.numel() == count, word, text, count, others, got=tensor.numel())
    _contiguous(call, word, tensor)


def _sparse_linear_add_(
    output: Tensor,
    input: Tensor,
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    adapters: Tensor,
    alphas: Tensor,
    transposed: bool,
    granule: int,
) -> None:
    call, count = Call("sparse_linear_add_", "output"), len(indices)
    _granule(call.op, granule)
    _adapters(call.op, "indices", count)
    text = "must have one tensor for each of the {} indices"
    call.require(len(values) == count, "values", text, count, got=len(values))
    _activations(call, "output", output)
    _device(call, "input", input, output)
    _dtype(call, "input", input, output)
    _tokens(call, "input", input, output)
    _contiguous(call, "input", input)
    sizes = (input.shape[-1], output.shape[-1])
    _matrix(call, *(sizes if transposed else sizes[::-1]), granule)
    for k, (index, own) in enumerate(zip(indices, values, strict=True)):
        member = Call(call.op, "output", k)
        _indices(member, "indices", index, output)
        _values(member, "values", own, output, index, granule)
        first = values[0].dtype
        member.require(own.dtype == first, "values", "must have the dtype of values[0] {}", first, got=own.dtype)
    _table(call, "adapters", adapters, output, torch.int32, math.prod(output.shape[:-1]), "tokens")
    _table(call, "alphas", alphas, output, compute_dtype(output.dtype), count, "indices")


def _sparse_linear_add_content(
    output: Tensor, input: Tensor, indices: Sequence[Tensor], adapters: Tensor, granule: int
) -> None:
    """Checks only the adapters that a token names."""
    bad = (adapters < -1) | (adapters >= len(indices))
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        text, got = "must be -1 or the number of one of the {} indices", f"{int(adapters[at])} at position {at}"
        Call("sparse_linear_add_").require(False, "adapters", text, len(indices), got=got)
    for k in adapters.unique().tolist():
        if k >= 0:
            granules = input.shape[-1] * output.shape[-1] // granule
            content("sparse_linear_add_", f"indices[{k}]", indices[k], granules)


_ARGUMENTS: dict[str, Callable[..., None]] = {
    "check_indices": _check_indices,
    "fuse_plan": _fuse_plan,
    "fuse_": _fuse_,
    "sampled_grad": _sampled_grad,
    "select_top": _select_top,
    "select_random": _select_random,
    "encode_indices": _encode_indices,
    "decode_indices": _decode_indices,
    "fingerprint": _fingerprint,
    "fingerprint_part": _fingerprint_part,
    "sparse_linear": _sparse_linear,
    "sparse_linear_add_": _sparse_linear_add_,
}
_CONTENT: dict[str, Callable[..., None]] = {
    "check_indices": _check_indices_content,
    "fuse_plan": _fuse_plan_content,
    "fuse_": _fuse_content,
    "sampled_grad": _sampled_grad_content,
    "encode_indices": _encode_indices_content,
    "sparse_linear": _sparse_linear_content,
    "sparse_linear_add_": _sparse_linear_add_content,
}


# ---- kinds of tensors --------------------------------------------------------------------------------------


def no_kernel(op: str, arguments: Sequence[tuple[str, Tensor]]) -> None:
    """Refuses tensors for which no backend has a kernel."""
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


def _memory(op: str, arguments: Sequence[tuple[str, int | None, Tensor, bool]]) -> None:
    """Refuses tensors whose memory is missing or misaligned, and arguments that overlap one that is written.

    A tensor whose storage was freed or shrunk still has its shape, and a tensor made for tracing has nothing else.
    Memory that other libraries lay out may start between two entries. `arguments` are (word, place in its list, tensor,
    whether it is written), in the order of the schema.
    """
    ranges: list[tuple[int, int, int, bool]] = []  # begin, end, which argument, written
    any_written = False
    for order, (word, member, tensor, written) in enumerate(arguments):
        numel = tensor.numel()
        if numel == 0:
            continue
        call = Call(op, member=member)
        if isinstance(tensor, FakeTensor):
            call.require(False, word, "must have memory", got="a tensor without any (a FakeTensor?)")
        size = tensor.element_size()
        end = (tensor.storage_offset() + numel) * size
        held = tensor.untyped_storage().nbytes()
        if end > held:
            call.require(
                False, word, "must lie within its storage, up to byte {}", end, got=f"a storage of {held} bytes"
            )
        begin = tensor.data_ptr()
        if begin % size:
            text, got = (
                "must start at a multiple of its entries' {} bytes",
                f"{begin % size} more (its clone() is aligned)",
            )
            call.require(False, word, text, size, got=got)
        ranges.append((begin, begin + numel * size, order, written))
        any_written |= written
    if not any_written:
        return
    # In the order of addresses, a clash is always with the range that reaches furthest. Written and read-only ranges
    # are kept apart, since read-only ones may coincide (a mask that several weights share).
    ranges.sort()
    nowhere = (0, 0, 0, False)
    furthest = furthest_written = nowhere
    for r in ranges:
        for other, matters in ((furthest, r[3]), (furthest_written, True)):
            if matters and r[0] < other[1]:
                earlier, later = (_name(*arguments[order][:2]) for order in sorted((r[2], other[2])))
                raise RuntimeError(f"{op}: {later} must not overlap {earlier} in memory")
        if r[1] > furthest[1]:
            furthest = r
        if r[3] and r[1] > furthest_written[1]:
            furthest_written = r


def content(op: str, name: str, indices: Tensor, granules: int | None) -> None:
    """Refuses indices that are not strictly increasing in [0, granules), or from 0 on if that is None.

    Synchronises.
    """
    wide = indices.to(torch.int64)  # int32 cannot be compared with a bound past 2^31
    if indices.numel() == 0 or (
        bool((wide[1:] > wide[:-1]).all()) and int(wide[0]) >= 0 and (granules is None or int(wide[-1]) < granules)
    ):
        return
    outside = wide < 0
    if granules is not None:
        outside |= wide >= granules
    bad = outside.clone()
    bad[1:] |= wide[1:] <= wide[:-1]
    position = int(bad.nonzero()[0])
    span = "and at least 0" if granules is None else f"in [0, {granules})"
    after = "" if bool(outside[position]) else f" after {int(wide[position - 1])}"
    got = f"{int(wide[position])}{after} at position {position}"
    Call(op).require(False, name, "must be strictly increasing " + span, got=got)
