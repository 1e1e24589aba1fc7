"""`SparseTuner`: train a few entries of a model's weights, in place.

The weight itself holds the trained entries, so forward does no added work. The trainable parameters are the ``values``:
one 1-D parameter for each weight, fp32 (fp64 for fp64 weights), registered on the module that owns the weight as
``<weight>_shira_values``. They are the truth and the weight follows: after every optimizer step a hook writes them.
Gradients come from one forward hook, ``output = Attach.apply(output, values, input, ...)``: an identity whose backward
gives the values the gradient of a linear layer at their indices alone.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

import shira_ops
from shira import _model
from shira.adapter import Adapter, Entry, dtype_name
from shira.mask import Mask

__all__ = ["Attach", "SparseTuner"]

VALUES_SUFFIX, INDICES_SUFFIX = "_shira_values", "_shira_indices"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WORD = 2**64 - 1


@dataclass(eq=False)
class Site:
    """How one weight of one module is trained. Plain data, so that a model can be copied and pickled with it."""

    name: str
    attribute: str
    granule: int
    dtype: torch.dtype
    # The values' version counter when the weight was last written: an edit outside an optimizer step shows.
    written: int = -1
    # Whether a gradient has ever reached the values; if not, a step is refused unless that is allowed.
    reached: bool = False
    allow_unused: bool = False

    @property
    def values_name(self) -> str:
        return self.attribute + VALUES_SUFFIX

    @property
    def indices_name(self) -> str:
        return self.attribute + INDICES_SUFFIX


@dataclass(eq=False)
class Target:
    """A site and the module it is on, while that lives."""

    site: Site
    owner: weakref.ref[nn.Module]

    def tensors(self) -> tuple[nn.Parameter, Tensor, nn.Parameter]:
        """weight, indices and values; refuses values that have lost their precision."""
        module = self.owner()
        if module is None:
            raise RuntimeError(f"the module that held {self.site.name} no longer exists")
        values = getattr(module, self.site.values_name)
        _check_master(self.site, values)
        return getattr(module, self.site.attribute), getattr(module, self.site.indices_name), values


# From a values parameter to what it trains. Weak: an optimizer may outlive a tuner, and a model both.
_targets: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_optimizer_hooks: list[RemovableHandle] = []


def target_of(values: Tensor) -> Target | None:
    """What a parameter trains, if it is the values of an attached tuner."""
    found: Target | None = _targets.get(values)
    return found


class Attach(torch.autograd.Function):
    """An identity on a linear layer's output whose backward also gives ``values`` its sampled weight gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, values: Tensor, input: Tensor, indices: Tensor, granule: int) -> Tensor:
        ctx.save_for_backward(input, indices)
        ctx.granule = granule
        # A detached alias: no copy, and not a view to autograd, so an in-place op may follow (ReLU(inplace=True)).
        # mark_dirty would allow that too, but counts as a write, and breaks layers that saved their own output.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        input, indices = ctx.saved_tensors
        grad_values = None
        if ctx.needs_input_grad[1]:
            # Gradients come expanded (after sum()) and inputs strided; and autocast gave the layer a cast input.
            grad_values = shira_ops.sampled_grad(
                grad_output.contiguous(), input.to(grad_output.dtype).contiguous(), indices, granule=ctx.granule
            )
        return grad_output, grad_values, None, None, None


def _check_master(site: Site, values: Tensor) -> None:
    if values.dtype != site.dtype:
        raise RuntimeError(
            f"{site.name}{VALUES_SUFFIX} must stay {dtype_name(site.dtype)}, got {dtype_name(values.dtype)}: the model "
            f"was cast after the tuner was attached; cast it first, or detach the tuner, cast, and attach again"
        )


def _attach(site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
    """The forward hook."""
    values = getattr(module, site.values_name)
    _check_master(site, values)
    if not torch.is_grad_enabled() or not values.requires_grad:
        return None
    input = args[0] if args else kwargs["input"]
    indices = getattr(module, site.indices_name)
    return Attach.apply(output, values, input, indices, site.granule)  # type: ignore[no-untyped-call]


def _follow(site: Site, module: nn.Module, args: tuple[Any, ...]) -> None:
    """The forward pre-hook: write values that were edited outside an optimizer step, such as a loaded state dict."""
    if torch.compiler.is_compiling():
        # A version check would break the graph; there, the optimizer's hook and sync() write.
        return
    values = getattr(module, site.values_name)
    if not values.is_inference() and values._version != site.written:
        _check_master(site, values)
        _write([(site, getattr(module, site.attribute), getattr(module, site.indices_name), values)])


def _write(items: Iterable[tuple[Site, Tensor, Tensor, Tensor]]) -> None:
    """Write values into weights, one call for each device and granule."""
    groups: dict[tuple[torch.device, int], list[tuple[Site, Tensor, Tensor, Tensor]]] = {}
    for item in items:
        groups.setdefault((item[1].device, item[0].granule), []).append(item)
    with torch.no_grad():
        for (_, granule), group in groups.items():
            shira_ops.foreach_scatter_(
                [weight for _, weight, _, _ in group],
                [indices for _, _, indices, _ in group],
                [values.detach().to(weight.dtype) for _, weight, _, values in group],
                granule=granule,
            )
            for site, _, _, values in group:
                mark_written(site, values)


def mark_written(site: Site, values: Tensor) -> None:
    """Note that the weight holds the values as they are now."""
    if not values.is_inference():
        site.written = values._version


def _targets_in(optimizer: Optimizer) -> list[tuple[Tensor, Target]]:
    if not len(_targets):
        return []
    found = ((p, target_of(p)) for group in optimizer.param_groups for p in group["params"])
    return [(values, target) for values, target in found if target is not None]


def _check_reached(targets: Sequence[tuple[Tensor, Target]]) -> None:
    """Refuse the first step if a target got no gradient: it would never train, and nobody would notice."""
    missing = []
    for values, target in targets:
        site = target.site
        site.reached = site.reached or values.grad is not None
        if not site.reached and not site.allow_unused and values.requires_grad:
            missing.append(site.name)
    if missing:
        raise RuntimeError(
            f"SparseTuner: no gradient reached {_model.some(missing)}; either there was no backward pass, or the "
            f"module's own forward does not run (as inside nn.MultiheadAttention): leave it out with targets=, or, if "
            f"it runs only in some steps, pass allow_unused=True"
        )


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # args holds the optimizer itself first; with a closure the gradients are yet to come.
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        _check_reached(_targets_in(optimizer))


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    targets = _targets_in(optimizer)
    if not targets:
        return
    _check_reached(targets)
    if not getattr(optimizer, "writes_weights", False):
        _write((target.site, *target.tensors()) for _, target in targets)


def _watch_optimizers() -> None:
    if not _optimizer_hooks:
        _optimizer_hooks.append(register_optimizer_step_pre_hook(_before_step))
        _optimizer_hooks.append(register_optimizer_step_post_hook(_after_step))


def _stop_watching() -> None:
    if not len(_targets):
        for handle in _optimizer_hooks:
            handle.remove()
        _optimizer_hooks.clear()


@dataclass(eq=False)
class _Tuned:
    """One weight a tuner trains, and all that takes it back."""

    name: str
    target: Target
    slots: list[_model.Slot]
    saved: Tensor
    fingerprint: int
    seed: int | None
    handles: list[RemovableHandle]

    @property
    def values(self) -> nn.Parameter:
        parameter: nn.Parameter = getattr(self.slots[0].module, self.target.site.values_name)
        return parameter


class SparseTuner:
    """Train the entries that a mask selects of a model's linear layers; everything else is frozen.

    From here on ``model.parameters()`` holds, with ``requires_grad``, the values alone; so DDP, clipping, accumulation,
    schedulers and checkpoints find them by themselves, and any optimizer over ``tuner.parameters()`` trains them
    (`shira.AdamW` does step and write in one pass). Unfreeze parameters that should train densely, such as a new head,
    after this. Use it as a context manager to have the base back at the end.

    Args:
        model: the model; its weights are changed in place, their storage stays.
        mask: one of ``shira.masks``.
        targets: a regular expression searched in the modules' names, or a list of names (whole, or their last parts, as
            ``"q_proj"``), or None for every ``nn.Linear``.
        calibration: batches for a mask by gradients (`shira.masks.Grad`, `shira.masks.Snip`): a batch is what the model
            is called with, a mapping, a tuple, a list or a tensor. The model is as before afterwards.
        loss: ``loss(model, batch)`` gives the scalar for calibration; None: the model's own ``output.loss``.
        allow_unused: accept targets that get no gradient in the first step (layers that run only now and then).
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Mask,
        targets: str | Sequence[str] | None = None,
        *,
        calibration: Iterable[Any] | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        allow_unused: bool = False,
    ) -> None:
        if not isinstance(mask, Mask):
            raise TypeError(f"SparseTuner: mask must be one of shira.masks, got {type(mask).__name__}")
        self.model = _model.unwrap(model)
        self.mask = mask
        self._tuned: list[_Tuned] = []
        self._requires_grad: list[tuple[nn.Parameter, bool]] = []

        slots = _model.slots(self.model)
        chosen = _chosen(self.model, slots, targets)
        mask.check({name: group[0].weight for name, group in chosen.items()})
        places = {name: [(slot.module, slot.attribute) for slot in group] for name, group in chosen.items()}
        mask.prepare(self.model, places, calibration, loss)
        prepared = [self._prepare(name, group) for name, group in chosen.items()]

        # Everything is checked: from here on the model changes.
        values_names = tuple(name for name in slots if name.endswith(VALUES_SUFFIX))
        for name, slot in slots.items():
            if name not in values_names:
                self._requires_grad.append((slot.weight, slot.weight.requires_grad))
                slot.weight.requires_grad_(False)
        for name, group, indices, saved, fingerprint in prepared:
            self._tuned.append(self._install(name, group, indices, saved, fingerprint, allow_unused))
        _watch_optimizers()

    def _prepare(self, name: str, group: list[_model.Slot]) -> tuple[str, list[_model.Slot], Tensor, Tensor, int]:
        weight = group[0].weight.detach()
        indices = self.mask(name, weight)
        try:
            shira_ops.check_indices(indices, weight.numel(), granule=self.mask.granule)
        except RuntimeError as error:
            raise ValueError(f"SparseTuner: {self.mask!r} gave {name} bad indices: {error}") from error
        saved = shira_ops.gather(weight, indices, granule=self.mask.granule)
        fingerprint = int(shira_ops.fingerprint(weight)) & _WORD
        return name, group, indices, saved, fingerprint

    def _install(
        self,
        name: str,
        group: list[_model.Slot],
        indices: Tensor,
        saved: Tensor,
        fingerprint: int,
        allow_unused: bool,
    ) -> _Tuned:
        first = group[0]
        dtype = torch.float64 if saved.dtype == torch.float64 else torch.float32
        values = nn.Parameter(saved.to(dtype, copy=True))
        site = Site(name, first.attribute, self.mask.granule, dtype, allow_unused=allow_unused)
        handles: list[RemovableHandle] = []
        for slot in group:
            slot.module.register_parameter(site.values_name, values)
            slot.module.register_buffer(site.indices_name, indices, persistent=False)
            handles.append(slot.module.register_forward_pre_hook(partial(_follow, site)))
            handles.append(slot.module.register_forward_hook(partial(_attach, site), with_kwargs=True))
        mark_written(site, values)
        target = Target(site, weakref.ref(first.module))
        _targets[values] = target
        return _Tuned(name, target, group, saved, fingerprint, self.mask.seed_for(name), handles)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable values, one parameter for each weight."""
        return (tuned.values for tuned in self._attached())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable values under their names in the model, ``<weight>_shira_values``."""
        return ((tuned.name + VALUES_SUFFIX, tuned.values) for tuned in self._attached())

    def sync(self) -> None:
        """Write the values into the weights. Optimizer steps do it by themselves; edits by hand may need it."""
        _write((tuned.target.site, *tuned.target.tensors()) for tuned in self._attached())

    def adapter(self, *, alpha: float = 1.0, provenance: Mapping[str, Any] | None = None) -> Adapter:
        """The trained entries as an `Adapter`: exactly what the weights now hold, in the weights' dtype."""
        self.sync()
        entries: dict[str, Entry] = {}
        for tuned in self._tuned:
            weight, indices, _ = tuned.target.tensors()
            site = tuned.target.site
            with torch.no_grad():
                values = shira_ops.gather(weight, indices, granule=site.granule)
            entries[tuned.name] = Entry(
                indices.clone(),
                values,
                tuple(weight.shape),
                weight.dtype,
                site.granule,
                tuned.fingerprint,
                tuned.seed,
                tuple(slot.name for slot in tuned.slots[1:]),
                checked=True,
            )
        return Adapter(entries, alpha=alpha, mask=self.mask.describe(), provenance=provenance)

    def detach(self) -> None:
        """Give the base back, bit for bit, and remove everything the tuner put on the model. Twice is once."""
        groups: dict[torch.device, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for tuned in self._tuned:
            module, site = tuned.slots[0].module, tuned.target.site
            weight, indices = getattr(module, site.attribute), getattr(module, site.indices_name)
            # The model may have moved, or been cast, since: a cast base has the cast of these entries.
            saved = tuned.saved.to(device=weight.device, dtype=weight.dtype)
            groups.setdefault(weight.device, []).append((weight, indices, saved))
        with torch.no_grad():
            for items in groups.values():
                weights, indices_list, saved_list = (list(column) for column in zip(*items, strict=True))
                shira_ops.foreach_scatter_(weights, indices_list, saved_list, granule=self.mask.granule)
        for tuned in self._tuned:
            site = tuned.target.site
            _targets.pop(tuned.values, None)
            for handle in tuned.handles:
                handle.remove()
            for slot in tuned.slots:
                delattr(slot.module, site.values_name)
                delattr(slot.module, site.indices_name)
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad_(requires_grad)
        self._tuned.clear()
        self._requires_grad.clear()
        _stop_watching()

    def __enter__(self) -> SparseTuner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _attached(self) -> list[_Tuned]:
        if not self._tuned:
            raise RuntimeError("SparseTuner: the tuner is detached")
        return self._tuned

    @property
    def nnz(self) -> int:
        """Trainable entries."""
        return sum(tuned.saved.numel() for tuned in self._tuned)

    @property
    def density(self) -> float:
        """Share of the targeted weights' entries that train."""
        return self.nnz / max(1, sum(tuned.slots[0].weight.numel() for tuned in self._tuned))

    def summary(self) -> str:
        """A table of what trains: name, shape, entries and density of each weight, and the share of the model."""
        rows = [("weight", "shape", "entries", "density")]
        for tuned in self._attached():
            weight = tuned.slots[0].weight
            nnz = tuned.saved.numel()
            rows.append((tuned.name, "x".join(map(str, weight.shape)), f"{nnz:,}", f"{nnz / weight.numel():.2%}"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        base = {id(parameter): parameter.numel() for parameter, _ in self._requires_grad}
        share = self.nnz / max(1, sum(base.values()))
        lines.append(
            f"{self.nnz:,} trainable entries: {self.density:.2%} of {len(self._tuned)} weights, "
            f"{share:.2%} of the model"
        )
        return "\n".join(lines)

    def __repr__(self) -> str:
        if not self._tuned:
            return f"SparseTuner({self.mask!r}, detached)"
        return f"SparseTuner({self.mask!r}, {len(self._tuned)} weights, {self.nnz:,} entries, {self.density:.2%})"


def _chosen(
    model: nn.Module, slots: Mapping[str, _model.Slot], targets: str | Sequence[str] | None
) -> dict[str, list[_model.Slot]]:
    """The targeted weights by first name, each with every place that holds it; refuses what cannot train."""
    named = model.named_modules(remove_duplicate=False)
    modules = {name.replace(_model.COMPILED, ""): module for name, module in named}
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    names = _matching(modules, linear, targets)

    holders: dict[object, list[_model.Slot]] = {}
    for slot in slots.values():
        group = holders.setdefault(_model.memory(slot.weight), [])
        if not any(slot.module is other.module and slot.attribute == other.attribute for other in group):
            group.append(slot)

    chosen: dict[str, list[_model.Slot]] = {}
    for module_name in names:
        name = f"{module_name}.weight" if module_name else "weight"
        if name not in slots:
            raise ValueError(
                f"SparseTuner: {name} is not a parameter of its module (parametrized?); leave it out with targets="
            )
        slot = slots[name]
        weight = slot.weight
        if any(hasattr(other.module, other.attribute + VALUES_SUFFIX) for other in holders[_model.memory(weight)]):
            raise ValueError(f"SparseTuner: {name} is already trained by a tuner; detach that one first")
        if weight.is_meta:
            raise ValueError(f"SparseTuner: {name} is on the meta device; give it its weights first")
        if weight.dtype not in _FLOATS:
            raise ValueError(
                f"SparseTuner: {name} must be float16, bfloat16, float32 or float64 to train, "
                f"got {dtype_name(weight.dtype)}"
            )
        if not weight.is_contiguous():
            raise ValueError(f"SparseTuner: {name} must be contiguous; {_model.stride_advice(name)}")
        group = holders[_model.memory(weight)]
        for other in group:
            same = isinstance(other.module, nn.Linear) and other.attribute == "weight" and other.weight is weight
            if not same:
                raise ValueError(
                    f"SparseTuner: {name} is tied to {other.name} ({type(other.module).__name__}), whose gradient is "
                    f"not sampled: training it would miss a part; leave it out with targets="
                )
        chosen.setdefault(group[0].name, group)
    return chosen


def _matching(
    modules: Mapping[str, nn.Module], linear: Sequence[str], targets: str | Sequence[str] | None
) -> list[str]:
    some = _model.some(name for name in linear if name)
    if targets is None:
        if not linear:
            raise ValueError("SparseTuner: the model has no nn.Linear")
        return list(linear)
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"SparseTuner: targets {targets!r} is no regular expression: {error}") from error
        names = [name for name in linear if pattern.search(name)]
        if not names:
            raise ValueError(f"SparseTuner: targets {targets!r} matches no nn.Linear; the model has {some}")
        return names
    found: dict[str, None] = {}
    for wanted in targets:
        names = [name for name in linear if name == wanted or name.endswith(f".{wanted}")]
        if not names:
            what = f"is a {type(modules[wanted]).__name__}, " if wanted in modules else ""
            raise ValueError(f"SparseTuner: target {wanted!r} {what}names no nn.Linear; the model has {some}")
        found.update(dict.fromkeys(names))
    if not found:
        raise ValueError(f"SparseTuner: targets is empty; the model has {some}")
    return [name for name in linear if name in found]
