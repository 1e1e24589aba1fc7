"""A method among PEFT's: sparse deltas with granules, over weights that are not written."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    check_adapters_to_merge,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING,
    PeftType,
    get_quantization_kwargs,
    register_peft_method,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import shira_ops
from shira import _linears, masks
from shira._linears import Layer
from shira._text import dtype_name
from shira.adapter._file import ARITHMETIC
from shira.adapter._peft import METHOD
from shira.integrations.peft import _mixed, _overlay
from shira.integrations.peft._overlay import Part
from shira.masks.masks import Mask

__all__ = ["SparseConfig", "SparseModel"]

VALUES, INDICES = "shira_ops_values", "shira_ops_indices"
_KINDS = {"rand": masks.Rand, "struct": masks.Struct, "wm": masks.WeightMagnitude}


# ---- configuration -------------------------------------------------------------------------------------------


@dataclass
class SparseConfig(PeftConfig):  # type: ignore[misc]
    """A PEFT method that trains few entries of each weight and never writes the weight.

    ::

        model = peft.get_peft_model(model, SparseConfig(density=0.01, target_modules=["q_proj", "v_proj"]))

    Everything else is PEFT's: ``save_pretrained`` and ``from_pretrained``, several adapters, ``set_adapter``,
    ``disable_adapter``, ``adapter_names`` for mixed batches, merging. What is trained is a vector of values for each
    layer, added to the weight at the mask's entries; the layer computes ``base_layer(x)`` and adds
    `shira_ops.sparse_linear`. So it works on quantized layers, too. ``merge_adapter`` writes the entries of float
    weights, and ``unmerge_adapter`` brings back every bit of them. A saved adapter holds its indices: loading does not
    depend on how the mask was made. `Adapter.from_peft` reads it.

    Args:
        mask: ``"rand"`` (`masks.Rand`), ``"struct"`` (`masks.Struct`), ``"wm"`` (`masks.WeightMagnitude`), or a mask of
            `shira.masks`, which then has density, granule and seed of its own. Grad and Snip need calibration batches:
            choose the entries elsewhere and give `masks.Given`.
        density: the share of each weight's entries to train, in (0, 1]. 0.01 if ``r`` is not given either.
        r: PEFT's budget instead: ``r * (m + n)`` entries of an ``m x n`` weight.
        granule: the number of consecutive entries that one index selects, or ``"auto"``, the largest up to 16 that
            divides the weight's last dimension.
        seed: of a random mask; None draws one, which is then in the configuration. Adapters with one seed and budget
            have the same entries.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in PEFT's other
            methods.
        init_weights: start with values of zero. False draws them, for tests.
    """

    mask: Any = field(default="rand", metadata={"help": "rand, struct, wm, or a mask of shira.masks"})
    density: Any = field(default=None, metadata={"help": "the share of each weight's entries to train"})
    r: int | None = field(default=None, metadata={"help": "or r * (m + n) entries of an m x n weight"})
    granule: int | str = field(default="auto", metadata={"help": "consecutive entries that one index selects"})
    seed: int | None = field(default=masks.DEFAULT_SEED, metadata={"help": "the seed of a random mask"})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "names of linear layers, a regular expression, or all-linear"}
    )
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "and those left out"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "numbers of layers"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "the list they are numbers in"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules that are trained whole"})
    init_weights: bool = field(default=True, metadata={"help": "start with values of zero"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[METHOD]
        for what in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, what), list):
                setattr(self, what, set(getattr(self, what)))
        # Not a field: the configuration's file holds the description alone.
        self._given: Mask | None = None
        if isinstance(self.mask, Mask):
            if (self.density, self.r, self.granule) != (None, None, "auto"):
                raise ValueError(
                    f"SparseConfig: a mask of shira.masks has density, r and granule of its own, got {self.mask!r:.80} "
                    f"and density {self.density!r}, r {self.r!r}, granule {self.granule!r}"
                )
            self._given, self.mask = self.mask, self.mask.describe()
        elif isinstance(self.mask, str) and self.mask in ("grad", "snip"):
            raise ValueError(
                f"SparseConfig: mask {self.mask!r} needs calibration batches, which PEFT has no place for; choose the "
                f"entries with a SparseTuner and give them: mask=shira.masks.Given({{name: 0/1 tensor}})"
            )
        elif not isinstance(self.mask, dict) and not (isinstance(self.mask, str) and self.mask in _KINDS):
            raise ValueError(
                f'SparseConfig: mask must be "rand", "struct", "wm" or one of shira.masks, got {self.mask!r:.80}'
            )
        if self.density is None and self.r is None and isinstance(self.mask, str):
            self.density = 0.01
        made = self.made()
        if isinstance(self.mask, str):
            self.seed = getattr(made, "seed", self.seed)

    def made(self) -> Mask | None:
        """The mask; None if it was given as tensors, of which the configuration's file holds nothing."""
        if self._given is not None:
            return self._given
        if isinstance(self.mask, dict):
            again = self.mask.get("name") in [kind.__name__ for kind in _KINDS.values()]
            return masks.from_description(self.mask) if again else None
        options = {"density": self.density, "r": self.r, "granule": self.granule}
        made: Mask = _KINDS[self.mask](**options, **({"seed": self.seed} if self.mask == "rand" else {}))
        return made


# ---- layer ---------------------------------------------------------------------------------------------------


class Linear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer of any kind and the adapters over it.

    For each adapter by name: ``shira_ops_values``, the trainable entries ``[nnz]``; ``shira_ops_indices``, the
    granules that they are in, ascending, in the flat weight of the base layer as it lies; and ``granule``.
    """

    # PEFT reads these: what is trained, and what else there is for each adapter.
    adapter_layer_names = (VALUES,)
    other_param_names = (INDICES, "scaling", "granule")

    base_layer: nn.Module
    quantization_backend: Any
    shira_ops_saved: Any
    set_adapter: Any
    active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, where: str, **options: Any) -> None:
        super().__init__()
        self.base_layer, self.where = base_layer, where
        self.shira_ops_values = nn.ParameterDict({})
        self.shira_ops_indices = BufferDict(persistent=True)
        # Of merged adapters: where they are, whatever is loaded in the meantime, and the weight's entries before and
        # after, [2, nnz]. Buffers, so that a cast or a move of the model does to them what it does to the weight.
        self.shira_ops_merged = BufferDict(persistent=False)
        self.shira_ops_saved = BufferDict(persistent=False)
        self.scaling: dict[str, float] = {}
        self.granule: dict[str, int] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.quantization_backend = resolve_quantization_backend(base_layer, **options)  # for PEFT's reports
        self.transposed = isinstance(base_layer, Conv1D)
        self.in_features, self.out_features = _features(base_layer, where)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight as the base layer has it, or would have it if it were not quantized."""
        shape = (self.out_features, self.in_features)
        return shape[::-1] if self.transposed else shape

    def update_layer(self, adapter_name: str, config: SparseConfig, inference_mode: bool = False) -> None:
        """Add an adapter, with zeros at the entries that the configuration's mask takes."""
        device, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        if device.type == "meta":  # offloaded
            device = torch.device("cpu")
        mask = config.made()
        if mask is None:
            # To be replaced by what is loaded; until then nothing can be computed with it.
            indices, granule = torch.empty(0, dtype=torch.int32, device=device), 1
        else:
            weight = self._scored(mask, device)
            indices, granule = mask(f"{self.where}.weight", weight), mask.granule_of(weight)
        values = torch.zeros(indices.numel() * granule, dtype=dtype, device=device)
        if not config.init_weights:
            nn.init.normal_(values)
        self.shira_ops_values[adapter_name] = nn.Parameter(values)
        self.shira_ops_indices[adapter_name] = indices
        self.scaling[adapter_name], self.granule[adapter_name] = 1.0, granule
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _layer(self) -> Layer | None:
        """What is known about the base layer; None if its class may use the weight in any way."""
        return _linears.of(f"{self.where}.weight", self.base_layer)

    def _scored(self, mask: Mask, device: torch.device) -> Tensor:
        """The weight that the mask is asked about, dequantized; or, if shape and device are enough, no weight."""
        if isinstance(mask, (masks.Rand, masks.Struct)):
            return torch.zeros((), device=device).expand(self.shape)
        layer = self._layer()
        if layer is None or layer.device.type == "meta":
            raise ValueError(f"SparseConfig: the weight of {self.where} cannot be read; take mask='rand'")
        return layer.dense()

    def check(self, adapter_name: str, indices: Tensor, values: Tensor) -> None:
        """Refuse what cannot be an adapter of this layer, from a file."""
        numel = self.in_features * self.out_features
        granule = values.numel() // max(1, indices.numel())
        what = f"{self.where}, adapter {adapter_name!r}"
        if indices.dim() != 1 or values.dim() != 1 or granule * indices.numel() != values.numel() or not granule:
            raise ValueError(
                f"{what}: {VALUES} must be {INDICES} times a granule, got shapes {list(values.shape)} and "
                f"{list(indices.shape)}"
            )
        if indices.dtype not in (torch.int32, torch.int64) or numel % granule:
            raise ValueError(
                f"{what}: {INDICES} must be int32 or int64 and number granules of {granule} entries of a weight of "
                f"{numel}, got {dtype_name(indices.dtype)}"
            )
        try:
            shira_ops.check_indices(indices.contiguous(), numel // granule)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{what}: {error}") from error

    def resize(self, adapter_name: str, indices: Tensor, values: Tensor) -> None:
        """Make room for these, which are loaded next, if they are of another size. A parameter may be a new one."""
        there, own = self.shira_ops_values[adapter_name], self.shira_ops_indices[adapter_name]
        if there.shape != values.shape:
            fresh = torch.empty(values.shape, dtype=there.dtype, device=there.device)
            self.shira_ops_values[adapter_name] = nn.Parameter(fresh, requires_grad=there.requires_grad)
        if own.shape != indices.shape:
            fresh = torch.empty(indices.shape, dtype=indices.dtype, device=own.device)
            self.shira_ops_indices[adapter_name] = fresh
        self.granule[adapter_name] = values.numel() // indices.numel()

    def set_scale(self, adapter: str, scale: float) -> None:
        """The strength of an adapter in this layer, 1 at first; merged adapters keep theirs. Others are ignored."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def _part(self, name: str) -> Part:
        indices = self.shira_ops_indices[name]
        if not indices.numel():
            raise RuntimeError(
                f"{self.where}: adapter {name!r} has no entries yet: its mask was given as tensors, which its "
                f"configuration does not hold; load its weights, or give the mask again"
            )
        return Part(indices, self.shira_ops_values[name], self.scaling[name], self.granule[name])

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            _mixed.check_samples(self, x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        wanted = self.active_adapters if adapter_names is None else dict.fromkeys(adapter_names)
        parts = {name: self._part(name) for name in wanted if name in self.shira_ops_values}
        if adapter_names is None:
            return _overlay.add(result, x, parts.values(), transposed=self.transposed)
        return _overlay.add_by_row(result, x, adapter_names, parts, transposed=self.transposed)

    # Merging writes the adapter's entries alone, and keeps what they were.

    def _writable(self) -> Tensor:
        layer = self._layer()
        if layer is None or layer.quantized or dtype_name(layer.dtype) not in ARITHMETIC:
            sharded = "sharded " if _is_sharded(self.base_layer) else ""
            raise ValueError(
                f"{self.where}: an adapter can be merged into the whole float weight of an nn.Linear or Conv1D alone, "
                f"got a {sharded}{type(self.base_layer).__qualname__} (codes would have to be rounded anew, and "
                f"another forward may use its weight in another way); use it without merging"
            )
        return layer.dense()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the weight, dense, in the values' dtype."""
        part = self._part(adapter)
        delta = torch.zeros(self.shape, dtype=part.values.dtype, device=part.values.device)
        shira_ops.scatter_(delta, part.indices, (part.values * part.scale).detach(), granule=part.granule)
        return delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight.

        Args:
            safe_merge: refuse, before anything is written, if an entry would not be finite.
            adapter_names: which; None for those that are active.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.shira_ops_values:
                continue
            weight, part = self._writable(), self._part(name)
            values, granule = part.values.detach(), part.granule
            if values.dtype not in (weight.dtype, torch.float32):
                values = values.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
            if safe_merge:
                entries = shira_ops.gather(weight, part.indices, granule=granule)
                if not bool(torch.isfinite((entries + part.scale * values).to(weight.dtype)).all()):
                    raise ValueError(f"{self.where}: with adapter {name!r} its weight would not be finite")
            saved = torch.empty(2, values.numel(), dtype=weight.dtype, device=weight.device)
            shira_ops.apply_(weight, part.indices, values, saved[0], alpha=part.scale, delta=True, granule=granule)
            saved[1] = shira_ops.gather(weight, part.indices, granule=granule)
            self.shira_ops_merged[name], self.shira_ops_saved[name] = part.indices.clone(), saved
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Bring back the base weight, bit for bit. Refused if others have changed these entries since."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters[-1]
            weight, indices = self._writable(), self.shira_ops_merged[name]
            before, after = self.shira_ops_saved[name].unbind()
            granule = before.numel() // indices.numel()
            now = shira_ops.gather(weight, indices, granule=granule)
            if not torch.equal(now.view(torch.uint8), after.view(torch.uint8)):
                raise ValueError(
                    f"{self.where}: its weight was changed since adapter {name!r} was merged, by another model that "
                    f"shares it, say; undo that first, or load the base again"
                )
            shira_ops.scatter_(weight, indices, before, granule=granule)
            self.merged_adapters.pop()
            del self.shira_ops_merged[name], self.shira_ops_saved[name]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        # PEFT makes adapters of the weight's dtype; but one of 8 bits is for storage.
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None:
            tensors = [*base_layer.parameters(), *base_layer.buffers()]
            device = tensors[0].device if tensors else torch.device("cpu")
        return device, dtype if dtype is not None and dtype_name(dtype) in ARITHMETIC else torch.float32

    def __repr__(self) -> str:
        return "shira_ops." + super().__repr__()


def _is_sharded(base_layer: nn.Module) -> bool:
    """Whether its weight is a DTensor."""
    return hasattr(getattr(base_layer, "weight", None), "placements")


def _features(base_layer: nn.Module, where: str) -> tuple[int, int]:
    """The features of a linear layer, of any class; other layers are refused, and sharded ones."""
    if _is_sharded(base_layer):
        raise ValueError(
            f"SparseConfig: the weight of {where} is sharded (a DTensor), and a mask is of the whole weight; call "
            f"get_peft_model first and shard the model afterwards"
        )
    features: tuple[int | None, int | None] = (None, None)
    if hasattr(base_layer, "in_features") or hasattr(base_layer, "infeatures") or isinstance(base_layer, Conv1D):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            features = _get_in_out_features(base_layer)
    if not all(isinstance(one, int) for one in features):
        raise TypeError(
            f"SparseConfig: {where} is a {type(base_layer).__qualname__}; only linear layers can be adapted (with in "
            f"and out features); leave it out with exclude_modules="
        )
    return features  # type: ignore[return-value]


# ---- model ---------------------------------------------------------------------------------------------------


class SparseModel(_mixed.MixedBatches, BaseTuner):  # type: ignore[misc]
    """The model that PEFT makes of a `SparseConfig`."""

    prefix = "shira_ops_"
    tuner_layer_cls = Linear
    target_module_mapping = TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: SparseConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **options: Any,
    ) -> None:
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"SparseConfig: {current_key} belongs to a MultiheadAttention, which takes its weight without calling "
                f"it; leave it out with exclude_modules="
            )
        if isinstance(target, Linear):
            target.update_layer(adapter_name, peft_config, peft_config.inference_mode)
            return
        if isinstance(target, BaseTunerLayer):
            raise ValueError(
                f"SparseConfig: {current_key} has adapters of another method already ({type(target).__qualname__}); "
                f"unload those first, or leave it out with exclude_modules="
            )
        layer = Linear(target, current_key, **get_quantization_kwargs(self.model))
        layer._active_adapter = adapter_name  # type: ignore[assignment]
        layer.update_layer(adapter_name, peft_config, peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, Linear):
            setattr(parent, child_name, new_module)  # PEFT would look for parameters, and a quantized layer has none
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SparseConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The mask of what is loaded may have another size than the one that the configuration made."""
        state: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        found = []
        for name, layer in model.named_modules():
            if isinstance(layer, Linear) and adapter_name in layer.shira_ops_values:
                keys = [f"{name}.{what}.{adapter_name}" for what in (INDICES, VALUES)]
                there = [state[key] for key in keys if key in state]
                if len(there) == 1:
                    raise ValueError(f"{layer.where}: what is loaded has {INDICES} or {VALUES}, but not both")
                if there:
                    found.append((layer, there))
        for layer, (indices, values) in found:
            layer.check(adapter_name, indices, values)
        for layer, (indices, values) in found:
            layer.resize(adapter_name, indices, values)
        return state


def _add_to_peft_type(name: str) -> None:
    """PEFT keeps its methods in an enumeration, refuses to register others, and has no way to add one."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.13
        PeftType._hashable_values_.append(name)


_add_to_peft_type(METHOD)
if PeftType[METHOD] not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name=METHOD.lower(), config_cls=SparseConfig, model_cls=SparseModel, prefix=SparseModel.prefix)
