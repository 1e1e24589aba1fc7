"""What a layer computes, by its in and out features, and what its base weight is: for adapters beside the weight.

An overlay never writes the weight: it adds ``delta @ input`` to the layer's output. For that it must know that the
layer's output is linear in its weight, and nothing of how the weight is stored. `find` gives every layer of a model of
which that is known.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

import shira_ops
from shira import _granules, _model, _shards
from shira._model import VALUES_SUFFIX
from shira._text import AdapterError, dtype_name

LINEAR, CONV1D, EMBEDDING = "linear", "conv1d", "embedding"

# transformers' linear layer of GPT-2, whose weight is [in, out]. Known by name, so that transformers is not imported.
_TRANSPOSED = ("transformers.pytorch_utils", "Conv1D")


# ---- recognising layers --------------------------------------------------------------------------------------


def is_linear(module: nn.Module) -> bool:
    """``nn.Linear`` and subclasses, and transformers' ``Conv1D``: the layers that a tuner trains by default."""
    return isinstance(module, nn.Linear) or any(_name(kind) == _TRANSPOSED for kind in type(module).__mro__)


def kind_of(module: nn.Module) -> str | None:
    """``linear``, ``conv1d`` or ``embedding``, by the ``forward`` that the module runs; None for any other.

    A subclass with a forward of its own may use its weight in another way (scaled, normalised).
    """
    if is_replaced(module):
        return None
    forward = forward_of(module)
    if forward is nn.Linear:
        # nn.MultiheadAttention's out_proj: its forward never runs.
        return None if isinstance(module, NonDynamicallyQuantizableLinear) else LINEAR
    if _name(forward) == _TRANSPOSED:
        return CONV1D
    return EMBEDDING if forward is nn.Embedding else None


def forward_of(module: nn.Module) -> type:
    """The class whose ``forward`` the module runs."""
    return next(kind for kind in type(module).__mro__ if "forward" in vars(kind))


def is_replaced(module: nn.Module) -> bool:
    """Whether the module's forward was replaced, so that it may compute something else."""
    # accelerate does so to run its hooks.
    return "forward" in vars(module) and not hasattr(module, "_hf_hook")


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


# ---- layers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer whose output is linear in its weight: the weight's name and place, its features, and what it stores.

    ``kind`` is ``linear`` (the weight is ``[out, in]``), ``conv1d`` (``[in, out]``) or ``embedding`` (``[in, out]``,
    where an index stands for the row that it selects). A layer is a `shira._fit.Found`, and `Layers` a base.
    """

    name: str
    module: nn.Module
    attribute: str
    kind: str
    # The dtype of the model's other weights, for layers that do not say which floats their codes stand for.
    floats: torch.dtype = torch.float32

    quantized: ClassVar[bool] = False

    @property
    def weight(self) -> Tensor | None:
        """What the module holds now under the weight's name: the weight or its codes; None where it is elsewhere."""
        return _model.held(self.module, self.attribute)

    @property
    def transposed(self) -> bool:
        """Whether the weight is ``[in, out]``, as `shira_ops.sparse_linear` means it."""
        return self.kind != LINEAR

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, dequantized."""
        return tuple(self.stored()[0].shape)

    @property
    def in_features(self) -> int:
        return self.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        return self.shape[1 if self.transposed else 0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight, dequantized."""
        return self.stored()[0].dtype

    @property
    def device(self) -> torch.device:
        return self.stored()[0].device

    def dense(self) -> Tensor:
        """The weight, dequantized: float32 or the layer's dtype. Of a plain layer the weight itself: not to be written
        to."""
        return self.stored()[0]

    def stand_in(self) -> Tensor:
        """A tensor of the weight's shape, dtype and device without content, for what depends on nothing else."""
        return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)

    def entries(self, indices: Tensor, granule: int) -> Tensor:
        """The weight's entries at the indices, in float32 (float64 for float64)."""
        found = shira_ops.gather(self.dense().contiguous(), indices, granule=granule)
        return found if found.dtype == torch.float64 else found.float()

    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that the weight is stored in: itself, or codes and scales."""
        weight = self.weight
        assert weight is not None
        return (weight.detach(),)

    def fingerprint(self) -> int:
        """What identifies the base: `shira_ops.fingerprint` of the weight, or one over codes and scales."""
        return _granules.fingerprint(self.dense().contiguous())

    def parts(self) -> dict[str, tuple[str, ...]]:
        """The tensors besides the parameter of its name that a quantized weight is made of: their names in the state
        dict of the module, and the places where the module may have them."""
        return {}

    def keep(self) -> Kept | None:
        """Have the module store its weight as it does now until the result is removed; None where it does so anyway."""
        return None

    @property
    def blind(self) -> str | None:
        """Why no gradient comes back through the layer: the rest of a sentence, or None."""
        return None

    # As the rules of `shira._fit` see it.

    @property
    def one(self) -> object:
        return _model.memory(self.stored()[0])

    @property
    def foreign(self) -> str | None:
        return None

    @property
    def obstacle(self) -> str | None:
        return "is on the meta device" if self.device.type == "meta" else None

    def equal(self, other: Layer) -> bool:
        return self.fingerprint() == other.fingerprint()


@dataclass(eq=False)
class Kept:
    """An attribute of a module that has another value until this is removed."""

    module: nn.Module
    attribute: str
    before: Any

    def remove(self) -> None:
        setattr(self.module, self.attribute, self.before)


class _Quantized(Layer):
    """A linear layer that stores codes and scales."""

    quantized = True

    @property
    def shape(self) -> tuple[int, ...]:
        module: Any = self.module
        return module.out_features, module.in_features

    @property
    def dtype(self) -> torch.dtype:
        bias = _model.held(self.module, "bias")
        return self.floats if bias is None or not bias.is_floating_point() else bias.dtype

    def fingerprint(self) -> int:
        word = 0
        for tensor in self.stored():
            content = tensor.detach().contiguous().view(-1).view(torch.uint8)
            word = _granules.splitmix64(word ^ _granules.fingerprint(content))
        return word

    @property
    def one(self) -> object:
        return id(self.module)


class _Wrapped(_Quantized):
    """A weight that is a tensor around others, as torchao and optimum-quanto make it."""

    @property
    def _wrapper(self) -> Any:
        return self.weight

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._wrapper.shape)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self._wrapper.dtype
        return found

    def dense(self) -> Tensor:
        found: Tensor = self._wrapper.detach().dequantize()
        return found

    def stored(self) -> tuple[Tensor, ...]:
        return tuple(inner(self._wrapper.detach(), "").values())

    def parts(self) -> dict[str, tuple[str, ...]]:
        return {name: (name,) for name in inner(self._wrapper, self.attribute)}


def inner(wrapper: Any, name: str) -> dict[str, Tensor]:
    """The plain tensors in a wrapper, at any depth, by their names below that of the wrapper; of any other tensor, the
    tensor."""
    wraps: bool = is_traceable_wrapper_subclass(wrapper)
    if not wraps:
        return {name: wrapper}
    found: dict[str, Tensor] = {}
    for attribute in wrapper.__tensor_flatten__()[0]:
        found |= inner(getattr(wrapper, attribute), f"{name}.{attribute}")
    return found


def is_quantized(weight: Any) -> bool:
    """Whether it is a tensor that wraps codes and scales."""
    wraps: bool = is_traceable_wrapper_subclass(weight)
    return wraps and type(weight).dequantize is not Tensor.dequantize


# The fingerprints of 4-bit weights as they were before bitsandbytes packed them; see `_FourBit`.
_unpacked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class _FourBit(_Quantized):
    """bitsandbytes' ``Linear4bit``: two codes in a byte, and a scale for each block, which may itself be in codes.

    On CPUs that multiply in bfloat16 its first forward in ``eval()`` packs the codes in another order and rounds the
    scales. Then the weight has no longer the bytes that identify it.
    """

    @property
    def _state(self) -> Any:
        return self.weight.quant_state  # type: ignore[union-attr]

    @property
    def _is_packed(self) -> bool:
        return bool(getattr(self._state, "packing_format_for_cpu", False))

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self._state.original_dtype if self._is_packed else self._state.dtype
        return found

    def dense(self) -> Tensor:
        functional, (codes, *_), state = sys.modules["bitsandbytes"].functional, self.stored(), self._state
        if self._is_packed:
            scales, state = state.absmax.T.float().reshape(-1), copy.copy(state)
            state.original_nested = False
            codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
            state.absmax, state.dtype = scales, self.dtype
        found: Tensor = functional.dequantize_4bit(codes, state)
        return found

    def stored(self) -> tuple[Tensor, ...]:
        weight, state = self.weight, self._state
        assert weight is not None
        nested = (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
        return weight.detach(), state.absmax, state.code, *nested

    def keep(self) -> Kept | None:
        packs = getattr(self.module, _PACKS, None)
        if packs is None:
            return None
        setattr(self.module, _PACKS, False)
        return Kept(self.module, _PACKS, packs)

    @property
    def blind(self) -> str | None:
        if not self._is_packed:
            return None
        return (
            "was packed for this CPU by bitsandbytes, in a forward in eval(), and computes no gradients any more: load "
            "the model again"
        )

    def parts(self) -> dict[str, tuple[str, ...]]:
        nested = {"nested_absmax": "state2.absmax", "nested_quant_map": "state2.code"} if self._state.nested else {}
        parts = {"absmax": "absmax", "quant_map": "code", **nested}
        return {f"{self.attribute}.{name}": (f"{self.attribute}.quant_state.{path}",) for name, path in parts.items()}

    def fingerprint(self) -> int:
        weight = self.weight
        if not self._is_packed:
            found = _unpacked[weight] = super().fingerprint()
            return found
        if weight not in _unpacked:
            raise AdapterError(
                f"{self.name} cannot be compared with another base any more: bitsandbytes has packed it for this CPU, "
                f"in a forward in eval(), and has rounded its scales; do this before the first such forward, or load "
                f"the model again"
            )
        known: int = _unpacked[weight]
        return known


_PACKS = "support_avx512bf16_for_cpu"


class _EightBit(_Quantized):
    """bitsandbytes' ``Linear8bitLt``: int8, and a scale for each row."""

    def dense(self) -> Tensor:
        codes, scales = self.stored()
        return codes * scales.view(-1, 1) * _EIGHT_BIT_UNIT

    def entries(self, indices: Tensor, granule: int) -> Tensor:
        codes, scales = self.stored()
        rows = indices.to(torch.int64) * granule // self.in_features
        found = shira_ops.gather(codes, indices, granule=granule).view(-1, granule)
        return (found * scales[rows, None] * _EIGHT_BIT_UNIT).view(-1)

    def stored(self) -> tuple[Tensor, ...]:
        weight: Any = self.weight
        state: Any = self.module.state
        return weight.detach(), state.SCB if weight.SCB is None else weight.SCB

    def parts(self) -> dict[str, tuple[str, ...]]:
        return {"SCB": (f"{self.attribute}.SCB", "state.SCB")}  # the first forward moves it


_EIGHT_BIT_UNIT = 1 / 127  # float32(1 / 127), with which bitsandbytes multiplies too


class _Blocks(_Quantized):
    """transformers' ``FP8Linear``: float8, and a scale for the whole weight or for each block."""

    def dense(self) -> Tensor:
        codes, scales = self.stored()
        if scales.dim() != 2:
            return codes.float() * scales.float()
        rows, columns = self._block()
        spread = scales.float().repeat_interleave(rows, 0)[: codes.shape[0]]
        return codes.float() * spread.repeat_interleave(columns, 1)[:, : codes.shape[1]]

    def parts(self) -> dict[str, tuple[str, ...]]:
        return {"weight_scale_inv": ("weight_scale_inv",)}

    def _block(self) -> tuple[int, int]:
        module: Any = self.module
        rows, columns = module.block_size
        return rows, columns

    def stored(self) -> tuple[Tensor, ...]:
        weight, module = self.weight, self.module
        assert weight is not None
        scales: Any = module.weight_scale_inv
        return weight.detach(), scales.detach()


class _Gguf(_Quantized):
    """transformers' ``GgufLinear``: rows of blocks as they are in a GGUF file."""

    @property
    def dtype(self) -> torch.dtype:
        return self.floats  # the bias is float32 whatever the model computes in

    def dense(self) -> Tensor:
        (blocks,), module = self.stored(), self.module
        dequantize = sys.modules["transformers.integrations.gguf.dequant"].dequantize
        found: Tensor = dequantize(blocks, module.ggml_type).view(self.shape)
        order: Any = module.input_permutation
        return found if order is None else torch.empty_like(found).index_copy_(1, order, found)


class _Own(_Quantized):
    """Any other module that has ``in_features``, ``out_features`` and ``dequantize()``.

    It stores all of its own parameters and persistent buffers except for the bias.
    """

    def dense(self) -> Tensor:
        module: Any = self.module
        found: Tensor = module.dequantize()
        if not isinstance(found, Tensor) or tuple(found.shape) != self.shape or not found.is_floating_point():
            got = f"{list(found.shape)} of {dtype_name(found.dtype)}" if isinstance(found, Tensor) else type(found)
            raise AdapterError(
                f"{self.name}: dequantize() of {type(module).__name__} must return floats of shape "
                f"{list(self.shape)}, [out_features, in_features], got {got}"
            )
        return found.detach()

    def stored(self) -> tuple[Tensor, ...]:
        return tuple(tensor.detach() for tensor in self._held().values())

    def parts(self) -> dict[str, tuple[str, ...]]:
        return {name: (name,) for name in self._held()}

    def _held(self) -> dict[str, Tensor]:
        held, passing = {**self.module._parameters, **self.module._buffers}, self.module._non_persistent_buffers_set
        return {
            name: tensor
            for name, tensor in sorted(held.items())
            if tensor is not None and name != "bias" and name not in passing and not name.endswith(VALUES_SUFFIX)
        }


# By the class whose forward runs; by name, so that nothing is imported.
_BY_FORWARD: dict[tuple[str, str], type[_Quantized]] = {
    ("bitsandbytes.nn.modules", "Linear4bit"): _FourBit,
    ("bitsandbytes.nn.modules", "Linear8bitLt"): _EightBit,
    ("optimum.quanto.nn.qlinear", "QLinear"): _Wrapped,
    ("transformers.integrations.finegrained_fp8", "FP8Linear"): _Blocks,
    ("transformers.integrations.gguf.utils", "GgufLinear"): _Gguf,
}


# ---- finding them --------------------------------------------------------------------------------------------


class Layers(dict[str, Layer]):
    """Layers by their weights' names: a base, for the rules of `shira._fit`."""

    def names(self) -> Iterable[str]:
        return self.keys()


def find(model: nn.Module, *, sharded: bool = False) -> Layers:
    """Every layer of the model of which it is known what it computes, by its weight's name, in the model's order.

    A module under several names is there under each of them. `unknown` says why a module is not among them. Those whose
    weight is a DTensor are among them only if ``sharded``.
    """
    found, floats = Layers(), _floats(model)
    for prefix, module in model.named_modules(remove_duplicate=False):
        name = _model.clean(f"{prefix}.weight" if prefix else "weight")
        layer = of(name, module, floats)
        if layer is None and sharded and _shards.is_dtensor(weight := _model.held(module, "weight")):
            kind = kind_of(module)
            layer = None if kind is None or weight.dim() != 2 else Layer(name, module, "weight", kind, floats)
        if layer is not None:
            found[name] = layer
    return found


def of(name: str, module: nn.Module, floats: torch.dtype = torch.float32) -> Layer | None:
    """The layer that a module is, if it is known what it computes."""
    found = _recognised(name, module, floats)
    return found if isinstance(found, Layer) else None


@dataclass(frozen=True)
class Part(_model.Slot):
    """A tensor of a quantized weight, at the first of these paths that the module has."""

    paths: tuple[str, ...] = ()
    layer: str = "weight"

    @property
    def values_names(self) -> tuple[str, ...]:
        return self.attribute + VALUES_SUFFIX, self.layer + VALUES_SUFFIX

    def now(self) -> Tensor | None:
        for path in self.paths:
            found: Any = self.module
            for attribute in path.split("."):
                found = getattr(found, attribute, None)
            if isinstance(found, Tensor):
                return found
        return None


def slots(model: nn.Module) -> dict[str, _model.Slot]:
    """Every tensor of the model's state dict under every one of its names: parameters, persistent buffers, and what
    quantized weights are made of."""
    found = _model.slots(model, buffers=True)
    for layer in find(model).values():
        prefix = layer.name.removesuffix(layer.attribute)
        for name, paths in layer.parts().items():
            part = Part(prefix + name, layer.module, name, cast("nn.Parameter", None), paths, layer.attribute)
            tensor = part.now()
            if tensor is not None:
                if isinstance(layer, _Wrapped):
                    _shards.wrapped(tensor, layer._wrapper)
                found[prefix + name] = replace(part, weight=cast("nn.Parameter", tensor))
    return found


def unknown(name: str, module: nn.Module) -> str:
    """Why nothing can be laid over a weight that is not among `find`, as a sentence that begins with its name."""
    found = _recognised(name, module, torch.float32)
    if isinstance(found, Layer):
        found = f"is not the weight of the {type(module).__name__} that has it, so nothing can be laid over it"
    return f"{name} {found}"


def _recognised(name: str, module: Any, floats: torch.dtype) -> Layer | str:
    """The layer, or why it is not known, as the rest of a sentence after the weight's name."""
    weight: Any = _model.held(module, "weight")
    called, own = type(module).__name__, not is_replaced(module)
    storage, kind = _BY_FORWARD.get(_name(forward_of(module))) if own else None, kind_of(module)
    if isinstance(weight, UninitializedParameter):
        return f"is in a {called} that has no shape yet: run the model once first"
    wraps: bool = is_traceable_wrapper_subclass(weight)
    if wraps:
        known = kind == LINEAR or (storage is _Wrapped and module.activation_qtype is None)
        if known and weight.dim() == 2 and is_quantized(weight):
            return _Wrapped(name, module, "weight", LINEAR, floats)
        why = "which nothing can be laid over"
        if _shards.is_dtensor(weight) and not own:
            why = (
                "whose forward was replaced, as transformers does with tp_plan=, so that it is not known which part of "
                "the output a rank computes: use a Switcher or a SparseTuner, which write the weight itself, or divide "
                "the model with parallelize_module"
            )
        return f"is a {type(weight).__name__} in a {called}, {why}"
    if storage is not None and weight is not None:
        # Before it is quantized, such a layer computes with whatever it will make of its weight.
        if storage is _Wrapped:
            return f"is in a {called} that is not quantized yet: call optimum.quanto.freeze(model) first"
        if storage is _FourBit and getattr(weight, "quant_state", None) is None:
            return f"is in a {called} that is not quantized yet: move the model to its device first"
        if storage is _FourBit and tuple(weight.quant_state.shape) != (module.out_features, module.in_features):
            return f"is in a {called} whose weight was quantized as [in, out]: quantize it as [out, in]"
        if storage is _FourBit or weight.itemsize == 1:
            return storage(name, module, "weight", LINEAR, floats)
        kind = LINEAR
    if kind is not None and weight is not None and weight.dim() == 2 and weight.layout == torch.strided:
        return Layer(name, module, "weight", kind, floats)
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if own and callable(getattr(module, "dequantize", None)) and all(type(size) is int for size in sizes):
        layer = _Own(name, module, "weight", LINEAR, floats)
        return layer if layer.stored() else f"is in a {called} without parameters or buffers of its own, its codes"
    return (
        f"belongs to a {called}, and it is not known how that computes with it: nn.Linear, transformers' Conv1D and "
        f"nn.Embedding are, with their own forward; quantized linear layers of bitsandbytes, torchao, optimum-quanto "
        f"and transformers (FP8Linear, GgufLinear); and any module with in_features, out_features and dequantize()"
    )


def _floats(model: nn.Module) -> torch.dtype:
    """The dtype of the model's weights that are not quantized."""
    for name, parameter in model.named_parameters():
        plain = parameter.dtype in _FLOATS and _model.foreign(parameter) is None
        if plain and name.rpartition(".")[2] in ("weight", "bias"):
            return parameter.dtype
    return torch.float32


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
