"""`SparseTuner`: train a few entries of a model's weights, in place.

The weight itself holds the trained entries, so forward does no added work. The trainable parameters are the ``values``:
one 1-D parameter for each weight, fp32 (fp64 for fp64 weights), registered on the module that owns the weight as
``<weight>_shira_values``. They are the truth and the weight follows: after every optimizer step a hook writes them.

Their gradients come in one of two ways, chosen for each weight:

- *sampled*: a forward hook of the layer, ``output = Attach.apply(output, values, input, ...)``: an identity whose
  backward gives the values the layer's weight gradient at their indices alone. For linear, convolution and embedding
  layers.
- *dense*: autograd makes the weight's dense gradient, and as soon as it is there a hook of the weight gathers it at the
  indices, hands that to the values, and frees it. Right for every use of a weight: of ``nn.MultiheadAttention``, of
  layers with a forward of their own, of plain parameters of any shape, of parameters that train as a whole.
"""

from __future__ import annotations

import os
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
from shira import _layers, _live, _model, _ranks, _targets
from shira._file import hex_word
from shira._layers import Attach
from shira._targets import INDICES_SUFFIX, VALUES_SUFFIX
from shira.adapter import Adapter, AdapterError, Entry, dtype_name
from shira.mask import AUTO_GRANULE, Given, Mask, default
from shira.switcher import fitted

__all__ = ["Attach", "SparseTuner"]


@dataclass(eq=False)
class Site:
    """How one weight is trained. Plain data, so that a model can be copied and pickled with it."""

    name: str
    attribute: str
    granule: int
    dtype: torch.dtype
    # Whether the weight's dense gradient is made and gathered; else every layer that uses it samples its own.
    dense: bool
    # The values, their memory and its version, that the weight was last written from: anything else that is found is
    # written. Some put other memory under a parameter (`.data =`, as `vector_to_parameters` does): no version moves.
    written: tuple[weakref.ref[Tensor], int, int] | None = None
    # Whether a gradient has ever reached the values; if not, a step is refused unless that is allowed.
    reached: bool = False
    allow_unused: bool = False

    @property
    def values_name(self) -> str:
        return self.attribute + VALUES_SUFFIX

    @property
    def indices_name(self) -> str:
        return self.attribute + INDICES_SUFFIX

    def is_written(self, values: Tensor) -> bool:
        """Whether the weight holds these values."""
        if self.written is None:
            return False
        known, memory, version = self.written
        same = known() is values and values.untyped_storage()._cdata == memory
        return same and (values.is_inference() or values._version == version)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model has values of its own, that nobody has compared with its weights.
        return {**self.__dict__, "written": None}


@dataclass(eq=False)
class Target:
    """A site, the module it is on while that lives, and the base's entries."""

    site: Site
    owner: weakref.ref[nn.Module]
    saved: Tensor
    indices: Tensor  # the tuner's own copy
    compared: bool = False  # with the other ranks

    def tensors(self) -> tuple[nn.Parameter, Tensor, nn.Parameter]:
        """weight, indices and values; refuses values that have lost their precision, a weight in another order."""
        module = self.owner()
        if module is None:
            raise RuntimeError(f"the module that held {self.site.name} no longer exists")
        return _tensors(self.site, module)


# From a values parameter to what it trains, None once its tuner is detached. Weak: an optimizer may outlive a tuner,
# and a model both.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# A weight to how many attached tuners freeze it, and whether it required grad before the first of them.
_frozen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_optimizer_hooks: list[RemovableHandle] = []


def target_of(parameter: Tensor) -> Target | None:
    """What a parameter trains, if it is the values of an attached tuner."""
    found: Target | None = _known.get(parameter)
    return found


def is_detached(parameter: Tensor) -> bool:
    """Whether a parameter was the values of a tuner that is now detached."""
    return parameter in _known and _known[parameter] is None


def _tensors(site: Site, owner: nn.Module) -> tuple[nn.Parameter, Tensor, nn.Parameter]:
    if "_is_replica" in owner.__dict__:
        raise RuntimeError(
            "SparseTuner: DataParallel runs copies of the model on several devices, which values are not written into; "
            "use DistributedDataParallel, or one device (CUDA_VISIBLE_DEVICES)"
        )
    values = getattr(owner, site.values_name)
    if values.dtype != site.dtype:
        raise RuntimeError(
            f"{site.name}{VALUES_SUFFIX} must stay {dtype_name(site.dtype)}, got {dtype_name(values.dtype)}: the model "
            f"was cast after the tuner was attached; cast it first, or detach the tuner, cast, and attach again"
        )
    weight: nn.Parameter = getattr(owner, site.attribute)
    if not weight.is_contiguous():
        raise RuntimeError(
            f"SparseTuner: {site.name} is no longer contiguous, as the tuner found it and as its values are written; "
            f"{_model.stride_advice(site.name, weight)}"
        )
    return weight, getattr(owner, site.indices_name), values


# ---- hooks of modules and weights ----------------------------------------------------------------------------
# They reach values and indices through the module that owns them, so that they work in a copied model too.


def _attach(
    site: Site,
    owner: nn.Module | None,
    rule: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
) -> Any:
    """The forward hook of a layer that samples; ``owner`` is None where that is the layer itself."""
    _, indices, values = _tensors(site, owner or module)
    if not torch.is_grad_enabled() or not values.requires_grad:
        return None
    input = args[0] if args else next(iter(kwargs.values()))
    return _layers.attach(rule, module, output, values, input, indices, site.granule)


def _follow(sites: Sequence[tuple[Site, nn.Module | None]], module: nn.Module, args: tuple[Any, ...]) -> None:
    """The forward pre-hook: write values that were edited outside an optimizer step."""
    if torch.compiler.is_compiling():
        # A version check would break the graph; there, the optimizer's hook, loading and sync() write.
        return
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "SparseTuner: values are written into weights, which torch.func cannot follow; use torch.autograd"
        )
    for site, owner in sites:
        weight, indices, values = _tensors(site, owner or module)
        if weight.requires_grad and not getattr(weight, "_post_accumulate_grad_hooks", None):
            raise RuntimeError(
                f"SparseTuner: the dense gradient of {site.name} would train all of it: the model was copied while a "
                f"tuner was attached, or its weights were unfrozen; detach the copy's source first, or give them "
                f"requires_grad=False"
            )
        if not site.is_written(values):
            _write([(site, weight, indices, values)])


def _loaded(site: Site, module: nn.Module, _: Any) -> None:
    """After a state dict was loaded: the weight follows the values, whatever came for either."""
    weight, indices, values = _tensors(site, module)
    known = site.written[0]() if site.written is not None else values
    if known is not values:
        raise RuntimeError(
            f"SparseTuner: {site.name}{VALUES_SUFFIX} was replaced, so that no optimizer trains it; load into the "
            f"parameter itself (load_state_dict with assign=False)"
        )
    _write([(site, weight, indices, values)])


def _gathered(target: Target, weight: Tensor) -> None:
    """The hook of a weight whose dense gradient has just been made: keep the mask's entries, free the rest."""
    grad, weight.grad = weight.grad, None
    _, indices, values = target.tensors()
    if grad is None or not values.requires_grad:
        return
    dense = grad.to_dense() if grad.is_sparse else grad
    at_mask = shira_ops.gather(dense.contiguous(), indices, granule=target.site.granule).to(values.dtype)
    # Through autograd and not by hand: so it accumulates, and hooks of the values and of DDP run, as for any parameter.
    torch.autograd.backward(values, at_mask, create_graph=torch.is_grad_enabled())


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
    version = -1 if values.is_inference() else values._version
    site.written = weakref.ref(values), values.untyped_storage()._cdata, version


# ---- hooks of optimizers -------------------------------------------------------------------------------------


def _targets_in(optimizer: Optimizer) -> list[tuple[Tensor, Target]]:
    if not len(_known):
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
            f"SparseTuner: no gradient reached {_model.some(missing)}; either there was no backward pass, or the loss "
            f"does not depend on it, or checkpointing with use_reentrant=True got no input that requires grad "
            f"(use_reentrant=False needs none). Leave it out with targets=, or, if it is used only in some steps, pass "
            f"allow_unused=True"
        )


def _compare_ranks(targets: Sequence[Target]) -> None:
    """At their first step. A collective call, at a place that all ranks of a model come to together."""
    trained = []
    for target in targets:
        weight, _, values = target.tensors()
        owner, site = target.owner(), target.site
        assert owner is not None
        dense = weight if site.dense else None
        trained.append(_ranks.Trained(site.name, owner, site.granule, target.indices, values, target.saved, dense))
    _ranks.compare(trained)
    for target in targets:
        target.compared = True


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # args holds the optimizer itself first; with a closure the gradients are yet to come.
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    targets = _targets_in(optimizer)
    _compare_ranks([target for _, target in targets if not target.compared])
    if closure is None:
        _check_reached(targets)


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
    if all(target is None for target in _known.values()):
        for handle in _optimizer_hooks:
            handle.remove()
        _optimizer_hooks.clear()


# ---- the tuner -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Plan:
    """What will be put on the model for one weight; making it changes nothing."""

    name: str
    slots: list[_model.Slot]
    indices: Tensor
    granule: int
    saved: Tensor
    fingerprint: int
    seed: int | None = None
    start: Tensor | None = None


@dataclass(eq=False)
class _Tuned:
    """One weight a tuner trains, and all that takes it back."""

    plan: _Plan
    target: Target
    handles: list[RemovableHandle]

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def owner(self) -> nn.Module:
        return self.plan.slots[0].module

    @property
    def whole(self) -> bool:
        return self.plan.granule == self.plan.slots[0].weight.numel()

    @property
    def values(self) -> nn.Parameter:
        parameter: nn.Parameter = getattr(self.owner, self.target.site.values_name)
        return parameter


class SparseTuner:
    """Train the entries that a mask selects of a model's weights; everything else is frozen.

    From here on ``model.parameters()`` holds, with ``requires_grad``, the values (and the weights of *dense* targets,
    whose gradients are gathered and freed during backward, so that optimizers, clipping and scalers never see one); so
    DDP, clipping, accumulation, schedulers and checkpoints find the values by themselves, and any optimizer over
    ``tuner.parameters()`` trains them (`shira.AdamW` does step and write in one pass). Use it as a context manager to
    have the base back at the end.

    A tied weight (an embedding and the head that shares it) is one target: the gradients of its uses are summed.
    Who counts the model's parameters counts the values beside the weights they are in; `nnz` is what trains.
    Buffers, such as the running statistics of batch normalisation, are neither trained nor put back: keep such layers
    in ``eval()``. The model must not be copied and the copy trained while a tuner is attached; a tuner is not copied or
    pickled, `state_dict` and `adapter` are for that. Several tuners may train different weights of one model, and be
    detached in any order.

    Args:
        model: the model; its weights are changed in place, their storage stays. Wrap it in DistributedDataParallel
            afterwards, with the same mask on every rank (the first step compares them).
        mask: one of ``shira.masks``; or 0/1 tensors by the weights' names, or a function of a weight's name and the
            weight that gives one (`shira.masks.Given`). None: ``shira.masks.default()``, random granules, 1 % of every
            weight, the same ones every time (`shira.masks.Rand` says when to give another seed).
        targets: which weights. A regular expression searched in names: of modules with weights (linear, convolution,
            embedding and attention modules; for any other its own matrices), or of parameters. Or a list of such names,
            whole or their last parts (``"q_proj"``). None or ``"all-linear"``: every ``nn.Linear`` and transformers'
            ``Conv1D``, and 3-D weights of experts, but nothing of the model's output head (what
            ``get_output_embeddings()`` or timm's ``get_classifier()`` gives, and ``score`` and ``classifier`` of
            transformers' models); with masks by name just the weights these name.
        exclude: what to leave out of the targets: a regular expression searched in names of modules and parameters, or
            a list of such names. A module's name means all that is in it; of a tied weight any name will do.
        whole: parameters to train as a whole, such as a new head: a regular expression searched in parameter names, or
            a list of names of parameters or modules. They become part of the adapter, and `detach` puts them back.
        gradient: ``"sampled"`` takes the gradient at the mask alone wherever the layer allows it; ``"dense"`` makes the
            full gradient of every target and masks it, as in the paper (arXiv 2406.13175, section 3.2). A sampled
            gradient is that of the calls of its layers alone: a weight that is also used without them, as in
            ``F.linear(x, self.embedding.weight)``, needs ``"dense"``, and nothing can tell.
        calibration: batches for a mask by gradients (`shira.masks.Grad`, `shira.masks.Snip`): a batch is what the model
            is called with, a mapping, a tuple, a list or a tensor. The model is as before afterwards.
        loss: ``loss(model, batch)`` gives the scalar for calibration; None: the model's own ``output.loss``.
        allow_unused: accept targets that get no gradient in the first step (layers that run only now and then).
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Mask | Mapping[str, Tensor] | Callable[[str, Tensor], Tensor] | None = None,
        targets: str | Sequence[str] | None = None,
        *,
        exclude: str | Sequence[str] | None = None,
        whole: str | Sequence[str] | None = None,
        gradient: str = "sampled",
        calibration: Iterable[Any] | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        allow_unused: bool = False,
    ) -> None:
        mask = default() if mask is None else Given.of(mask)
        self._open(model, gradient, mask, mask.describe())
        names = _targets.Names(self.model)
        entire = names.whole(whole)
        if targets is None and isinstance(mask, Given) and mask.names is not None:
            targets = "|".join(f"^{re.escape(name)}$" for name in mask.names)
        chosen = {name: group for name, group in names.targets(targets, exclude).items() if name not in entire}
        if not chosen and not entire:
            raise ValueError("SparseTuner: targets is empty, so nothing would train")
        _targets.check_apart([*chosen.values(), *entire.values()])
        mask.check({name: group[0].weight for name, group in chosen.items()})
        places = {name: [(slot.module, slot.attribute) for slot in group] for name, group in chosen.items()}
        mask.prepare(self.model, places, calibration, loss)
        sparse = [self._masked(mask, name, group) for name, group in chosen.items()]
        self._install([*sparse, *(self._entire(name, group) for name, group in entire.items())], allow_unused)
        if mask.granule == "auto":
            finer = [plan.name for plan in sparse if plan.granule < AUTO_GRANULE]
            if finer:
                what = "1 weight has" if len(finer) == 1 else f"{len(finer)} weights have"
                self._notes.append(
                    f"{what} granules of less than {AUTO_GRANULE} entries, since {AUTO_GRANULE} does not divide their "
                    f"last dimension: {_model.some(finer)}"
                )
        if targets in (None, _targets.ALL_LINEAR):
            heads = [name for name in names.heads() if not any(one.startswith(f"{name}.") for one in entire)]
            if heads:
                self._notes.append(f"left out: {_model.some(heads)}, the output head")

    @classmethod
    def from_adapter(
        cls,
        model: nn.Module,
        adapter: Adapter | str | os.PathLike[str],
        *,
        gradient: str = "sampled",
        allow_unused: bool = False,
    ) -> SparseTuner:
        """Go on training a saved adapter: its entries are the mask, and the values start where it ended.

        The model must be at the base the adapter was made for (refused by fingerprint otherwise), and `detach` gives
        that base back. The strength ``alpha`` plays no part in training; `adapter` keeps it.

        Args:
            model: the model, at the base.
            adapter: an `Adapter`, or the path of its file. A delta adapter starts at base + delta, and what is trained
                is saved as an overwriting one.
            gradient: as for `SparseTuner`.
            allow_unused: as for `SparseTuner`.
        """
        tuner = cls.__new__(cls)
        tuner._open(model, gradient, None, None)
        names = _targets.Names(tuner.model)
        # A switcher knows what an adapter needs of a model, and says what does not fit.
        adapter, places = fitted(tuner.model, adapter)
        if not adapter.weights:
            raise AdapterError("SparseTuner: the adapter changes no weight, so nothing would train")
        tuner._about, tuner._alpha = adapter.mask, adapter.alpha
        plans = []
        for name, entry in adapter.weights.items():
            slot = places[name]
            group = names.of(slot)
            _targets.check_trainable(slot.name, group)
            indices = entry.indices.to(slot.weight.device)
            plan = tuner._plan(group[0].name, group, indices, entry.granule, entry.seed)
            start = entry.values.detach().to(device=slot.weight.device, dtype=_master_dtype(slot.weight))
            plan.start = plan.saved.to(start.dtype) + start if adapter.delta else start
            plans.append(plan)
        tuner._install(plans, allow_unused)
        return tuner

    # ---- putting on ------------------------------------------------------------------------------------------

    def _open(self, model: nn.Module, gradient: str, mask: Mask | None, about: Mapping[str, Any] | None) -> None:
        if gradient not in ("sampled", "dense"):
            raise ValueError(f'SparseTuner: gradient must be "sampled" or "dense", got {gradient!r}')
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "SparseTuner: what is made under torch.inference_mode cannot train; leave that mode first"
            )
        if isinstance(model, nn.Module):
            _targets.check_model(model)
        self.model = _model.unwrap(model)
        self.mask, self._about = mask, about
        self._gradient = gradient
        self._alpha = 1.0
        self._tuned: list[_Tuned] = []
        self._froze: list[nn.Parameter] = []
        self._root: list[RemovableHandle] = []
        self._ignored: list[str] = []  # what DistributedDataParallel leaves alone
        self._notes: list[str] = []  # what `summary` says besides

    def _masked(self, mask: Mask, name: str, group: list[_model.Slot]) -> _Plan:
        weight = group[0].weight.detach()
        indices, granule = mask(name, weight), mask.granule_of(weight)
        try:
            shira_ops.check_indices(indices, weight.numel(), granule=granule)
        except RuntimeError as error:
            raise ValueError(f"SparseTuner: {mask!r} gave {name} bad indices: {error}") from error
        return self._plan(name, group, indices, granule, mask.seed_for(name))

    def _entire(self, name: str, group: list[_model.Slot]) -> _Plan:
        weight = group[0].weight
        if not weight.numel():
            raise ValueError(f"SparseTuner: {name} has no entries to train")
        # As in a file: one granule of all its entries.
        indices = torch.zeros(1, dtype=torch.int32, device=weight.device)
        return self._plan(name, group, indices, weight.numel(), None)

    def _plan(self, name: str, group: list[_model.Slot], indices: Tensor, granule: int, seed: int | None) -> _Plan:
        weight = group[0].weight.detach()
        saved = shira_ops.gather(weight, indices, granule=granule)
        return _Plan(name, group, indices, granule, saved, _live.fingerprint(weight), seed)

    def _install(self, plans: Sequence[_Plan], allow_unused: bool) -> None:
        """Everything is checked: from here on the model changes."""
        slots = _model.slots(self.model)
        # Once each: a tied weight that was met a second time would be remembered as frozen.
        base = {id(slot.weight): slot.weight for name, slot in slots.items() if not name.endswith(VALUES_SUFFIX)}
        # What another tuner trains is its own affair.
        others = {id(slot.weight) for slot in slots.values() if hasattr(slot.module, slot.attribute + VALUES_SUFFIX)}
        for weight in base.values():
            tuners, required = _frozen.get(weight, (0, weight.requires_grad))
            _frozen[weight] = tuners + 1, required
            self._froze.append(weight)
            if id(weight) not in others:
                weight.requires_grad_(False)
        for plan in plans:
            self._tuned.append(self._put(plan, allow_unused))
        dense = [tuned for tuned in self._tuned if tuned.target.site.dense]
        if dense:
            # Their modules' forward may not run, so the model's own looks after them.
            sites = [(tuned.target.site, tuned.owner) for tuned in dense]
            self._root.append(self.model.register_forward_pre_hook(partial(_follow, sites)))
        weights = [tuned.plan.slots[0].weight for tuned in dense]
        indices = [getattr(tuned.owner, tuned.target.site.indices_name) for tuned in self._tuned]
        self._ignored = _ranks.ignore(self.model, [*weights, *indices])
        if any(plan.start is not None for plan in plans):
            self.sync()
        _watch_optimizers()

    def _put(self, plan: _Plan, allow_unused: bool) -> _Tuned:
        owner, weight = plan.slots[0].module, plan.slots[0].weight
        rules: list[str | None] = [None] * len(plan.slots)
        if self._gradient == "sampled" and plan.granule < weight.numel():
            rules = _targets.rules(plan.slots, plan.granule)
        dense = rules[0] is None
        dtype = _master_dtype(weight)
        start = plan.saved if plan.start is None else plan.start
        values = nn.Parameter(start.to(dtype, copy=True))
        site = Site(plan.name, plan.slots[0].attribute, plan.granule, dtype, dense, allow_unused=allow_unused)
        # On the first owner alone: under several names it would be one more tied weight to those who save models.
        owner.register_parameter(site.values_name, values)
        owner.register_buffer(site.indices_name, plan.indices, persistent=False)
        # Buffers are everybody's: DistributedDataParallel overwrites them, averages of models average them. The way
        # back must not depend on them.
        plan.indices = plan.indices.to("cpu", copy=True)
        target = Target(site, weakref.ref(owner), plan.saved, plan.indices)
        handles: list[RemovableHandle] = [owner.register_load_state_dict_post_hook(partial(_loaded, site))]
        if dense:
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(partial(_gathered, target)))
        for slot, rule in zip(plan.slots, rules, strict=True):
            elsewhere = None if slot.module is owner else owner
            handles.append(slot.module.register_forward_pre_hook(partial(_follow, [(site, elsewhere)])))
            if rule is not None:
                # First of all hooks: others may change the output, and this one needs the layer's own.
                hook = partial(_attach, site, elsewhere, rule)
                handles.append(slot.module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        mark_written(site, values)
        _known[values] = target
        return _Tuned(plan, target, handles)

    # ---- while it trains -------------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable values, one parameter for each weight."""
        return (tuned.values for tuned in self._attached())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable values under their names in the model, ``<weight>_shira_values``."""
        return ((tuned.name + VALUES_SUFFIX, tuned.values) for tuned in self._attached())

    def _trained(self) -> Iterator[nn.Parameter]:
        """The values and the weights that follow them: what a tuner's state stands for."""
        for tuned in self._attached():
            yield tuned.values
            yield getattr(tuned.owner, tuned.target.site.attribute)

    def sync(self) -> None:
        """Write the values into the weights. Optimizer steps do it by themselves; edits by hand may need it."""
        _write((tuned.target.site, *tuned.target.tensors()) for tuned in self._attached())

    def adapter(self, *, alpha: float | None = None, provenance: Mapping[str, Any] | None = None) -> Adapter:
        """The trained entries as an `Adapter`: exactly what the weights now hold, in the weights' dtype.

        Args:
            alpha: the strength it will have unless another is asked for: 1, or that of the adapter this went on from.
            provenance: anything worth keeping, in JSON's types.
        """
        self.sync()
        entries: dict[str, Entry] = {}
        for tuned in self._tuned:
            weight, indices, _ = tuned.target.tensors()
            plan = tuned.plan
            with torch.no_grad():
                values = shira_ops.gather(weight, indices, granule=plan.granule)
            entries[tuned.name] = Entry(
                indices.clone(),
                values,
                tuple(weight.shape),
                weight.dtype,
                plan.granule,
                plan.fingerprint,
                plan.seed,
                tuple(slot.name for slot in plan.slots[1:]),
                checked=True,
            )
        alpha = self._alpha if alpha is None else alpha
        return Adapter(entries, alpha=alpha, mask=self._about, provenance=provenance)

    def state_dict(self) -> dict[str, Any]:
        """The values in full precision, and what they belong to: to go on later, where `adapter` is to use.

        Tensors, strings and numbers only, so ``torch.load(weights_only=True)`` reads it.
        """
        weights = {}
        for tuned in self._attached():
            weights[tuned.name] = {**_identity(tuned), "values": tuned.values.detach().clone()}
        return {"version": 1, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take values from a `state_dict`; refuses, with nothing changed, that of another base, mask or model."""
        self.check_state_dict(state)
        with torch.no_grad():
            for tuned in self._attached():
                tuned.values.copy_(state["weights"][tuned.name]["values"])
        self.sync()

    def check_state_dict(self, state: Any) -> None:
        """Raise the `ValueError` that `load_state_dict` would raise, and take nothing."""
        known = state.get("version") if isinstance(state, Mapping) else None
        if type(known) is not int or known != 1 or not isinstance(state.get("weights"), Mapping):
            raise ValueError(f"SparseTuner: this is no state of a tuner (version {known!r:.80})")
        weights, tuned_here = state["weights"], {tuned.name: tuned for tuned in self._attached()}
        missing, foreign = tuned_here.keys() - weights.keys(), weights.keys() - tuned_here.keys()
        if missing or foreign:
            raise ValueError(
                f"SparseTuner: the state is of another adapter: it has not {_model.some(sorted(missing))}, "
                f"and has {_model.some(sorted(map(str, foreign)))} besides"
            )
        what = {
            "shape": "another shape", "granule": "another granule", "indices": "other entries (another mask)",
            "fingerprint": "another base",
        }  # fmt: skip
        for name, tuned in tuned_here.items():
            entry = weights[name]
            if not isinstance(entry, Mapping) or not isinstance(entry.get("values"), Tensor):
                raise ValueError(f"SparseTuner: the state has no values of {name}")
            for key, wanted in _identity(tuned).items():
                if repr(entry.get(key)) != repr(wanted):  # of whatever a broken file holds
                    raise ValueError(f"SparseTuner: the state is of another adapter: {name} has {what[key]}")
            if entry["values"].shape != tuned.values.shape:
                raise ValueError(f"SparseTuner: the state's values of {name} have the wrong length")
            if not entry["values"].is_floating_point():
                raise ValueError(f"SparseTuner: the state's values of {name} must be floats")

    # ---- taking off ------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Raise `RuntimeError`, naming the weights, where an entry that does not train has changed since the start.

        Then something else has written to the model: `detach` would not give the base back, and `adapter` would not
        hold all of the change. Puts the base's entries in for as long as it reads a weight, so no forward may run
        meanwhile, nor wait for its backward.
        """
        wrong = []
        for tuned in self._attached():
            weight, indices, _ = tuned.target.tensors()
            plan, other = tuned.plan, tuned.plan.saved.to(weight.device, copy=True)
            with torch.no_grad():
                shira_ops.swap_(weight, indices, other, granule=plan.granule)
                try:
                    now = _live.fingerprint(weight)
                finally:
                    shira_ops.swap_(weight, indices, other, granule=plan.granule)
            if now != plan.fingerprint:
                wrong.append(tuned.name)
        if wrong:
            raise RuntimeError(
                f"SparseTuner: {len(wrong)} weight(s) have changed where nothing trains: {_model.some(wrong)}; "
                "something else wrote to them"
            )

    def detach(self) -> None:
        """Give the base back, bit for bit, and remove everything the tuner put on the model. Twice is once.

        Only the entries that train are written: what anything else changed meanwhile stays (`verify` tells).
        """
        groups: dict[tuple[torch.device, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
        for tuned in self._tuned:
            site = tuned.target.site
            weight: nn.Parameter = getattr(tuned.owner, site.attribute)
            indices = tuned.plan.indices.to(weight.device)
            # The model may have moved, or been cast, since: a cast base has the cast of these entries.
            saved = tuned.plan.saved.to(device=weight.device, dtype=weight.dtype)
            if not weight.is_contiguous():  # put into another order since, as by model.to(memory_format=...)
                whole = weight.detach().contiguous()
                shira_ops.scatter_(whole, indices, saved, granule=site.granule)
                weight.detach().copy_(whole)
                continue
            groups.setdefault((weight.device, site.granule), []).append((weight, indices, saved))
        with torch.no_grad():
            for (_, granule), items in groups.items():
                weights, indices_list, saved_list = (list(column) for column in zip(*items, strict=True))
                shira_ops.foreach_scatter_(weights, indices_list, saved_list, granule=granule)
        for tuned in self._tuned:
            site = tuned.target.site
            _known[tuned.values] = None
            for handle in tuned.handles:
                handle.remove()
            delattr(tuned.owner, site.values_name)
            delattr(tuned.owner, site.indices_name)
        for handle in self._root:
            handle.remove()
        _ranks.unignore(self.model, self._ignored)
        for tuned in self._tuned:
            getattr(tuned.owner, tuned.target.site.attribute).requires_grad_(False)
        for weight in self._froze:
            tuners, required = _frozen.pop(weight)
            if tuners > 1:  # the last tuner to go gives back what was before the first
                _frozen[weight] = tuners - 1, required
            else:
                weight.requires_grad_(required)
        self._tuned.clear()
        self._froze.clear()
        self._ignored.clear()
        self._root.clear()
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

    # ---- what it is ------------------------------------------------------------------------------------------

    @property
    def nnz(self) -> int:
        """Trainable entries."""
        return sum(tuned.plan.saved.numel() for tuned in self._tuned)

    @property
    def density(self) -> float:
        """Share of the targeted weights' entries that train."""
        return self.nnz / max(1, sum(tuned.plan.slots[0].weight.numel() for tuned in self._tuned))

    def summary(self) -> str:
        """A table of what trains: names, shape, entries, density, granule, and how the gradient is taken.

        Layers that differ in their number alone share a row, ``*`` for the number.
        """
        kinds: dict[tuple[str, ...], list[str]] = {}
        for tuned in self._attached():
            weight, plan = tuned.plan.slots[0].weight, tuned.plan
            entries = plan.saved.numel()
            row = (
                re.sub(r"(?<![^.])\d+(?=\.)", "*", tuned.name),
                "x".join(map(str, weight.shape)) or "scalar",
                f"{entries:,}",
                f"{entries / weight.numel():.2%}",
                "whole" if tuned.whole else str(plan.granule),
                "dense" if tuned.target.site.dense else "sampled",
                ", ".join(slot.name for slot in plan.slots[1:]),
            )
            kinds.setdefault(row, []).append(tuned.name)
        rows: list[tuple[str, ...]] = [
            ("weight", "weights", "shape", "entries", "density", "granule", "gradient", "tied to")
        ]
        for (pattern, *rest), names in kinds.items():
            rows.append((names[0] if len(names) == 1 else pattern, str(len(names)), *rest))
        if not any(row[-1] for row in rows[1:]):
            rows = [row[:-1] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        share = self.nnz / max(1, sum(weight.numel() for weight in self._froze))
        lines.append(
            f"{self.nnz:,} trainable entries: {self.density:.2%} of {len(self._tuned)} weights, "
            f"{share:.2%} of the model"
        )
        return "\n".join([*lines, *self._notes])

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy would write into the weights of the first one's model.
        raise TypeError(
            "SparseTuner: a tuner cannot be copied or pickled; keep tuner.state_dict() or tuner.adapter(), and attach "
            "another tuner to a copy of the base"
        )

    def __repr__(self) -> str:
        if not self._tuned:
            return "SparseTuner(detached)"
        mask = "no mask" if self._about is None else self._about.get("name", "a mask")
        return f"SparseTuner({mask}, {len(self._tuned)} weights, {self.nnz:,} entries, {self.density:.2%})"


def _master_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _identity(tuned: _Tuned) -> dict[str, Any]:
    """What values belong to: a state whose identity differs is another adapter's."""
    return {
        "shape": list(tuned.plan.slots[0].weight.shape),
        "granule": tuned.plan.granule,
        "indices": hex_word(_live.fingerprint(tuned.plan.indices.to(torch.int64))),
        "fingerprint": hex_word(tuned.plan.fingerprint),
    }
