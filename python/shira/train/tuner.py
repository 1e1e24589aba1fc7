"""`SparseTuner`: train a few entries of a model's weights, in place.

The weight itself holds the trained entries, so a forward pass computes nothing more than before. The trainable
parameters are the ``values``: one 1-D parameter for each weight, fp32 (fp64 for fp64 weights), registered on the module
that owns the weight as ``<weight>_shira_values``. The weight follows them: a hook writes them after every step of an
optimizer (see `shira.train._hooks`), and a forward pass writes what was edited otherwise (see `shira.train._sites`).

Their gradients come in one of two ways, chosen for each weight:

- *sampled*: a forward hook of the layer, ``output = Attach.apply(output, values, input, ...)``: an identity whose
  backward computes the layer's weight gradient at the values' indices alone. For linear, convolution and embedding
  layers.
- *dense*: autograd makes the weight's dense gradient, and as soon as it is there a hook of the weight gathers it at the
  indices, passes that on to the values, and frees it. For every other use of a weight: in ``nn.MultiheadAttention``, in
  layers with a forward of their own, plain parameters of any shape, parameters that train as a whole.

With ``overlay=True`` the values are a delta instead, and no weight is written: a forward hook adds the delta's product
with the layer's input to its output, and autograd does the rest. So weights that are codes can be trained beside.
"""

from __future__ import annotations

import math
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import shira_ops
from shira import _fit, _granules, _linears, _live, _model, _shards
from shira._model import VALUES_SUFFIX
from shira._text import AdapterError, Rename, hex_word, named
from shira.adapter._entry import Entry
from shira.adapter.adapter import Adapter
from shira.masks.masks import AUTO_GRANULE, Given, Mask, default
from shira.train import _hooks, _ranks, _sharded, _targets
from shira.train._layers import RULES, Attach
from shira.train._sharded import Sharded
from shira.train._sites import (
    Group,
    Place,
    Site,
    Target,
    become_sharded,
    follow,
    is_detached,
    mark_written,
    put,
    scatter,
    settle,
    sites_of,
    take_off,
    target_of,
    uncover,
    whole_values,
    write,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Attach", "SparseTuner", "Target", "detach", "is_detached", "mark_written", "target_of"]

# On a model: the handles of the hooks that tuners put on the model itself.
_ROOT = "_shira_root"
# Added to the version of a weight inside `SparseTuner.disabled`, where it holds the base: outside it never has such a
# version.
_ASIDE = 2**30
# The attached tuners that are still referenced. What a tuner puts on a model works without the tuner.
_held: weakref.WeakSet[SparseTuner] = weakref.WeakSet()


# ---- the tuner -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Plan:
    """What will be put on the model for one weight; making a plan does not change the model."""

    name: str
    slots: list[_model.Slot]
    indices: Tensor
    granule: int
    # See `Site`.
    saved: Tensor
    fingerprint: int
    seed: int | None = None
    start: Tensor | None = None
    shard: Sharded | None = None
    # Of an overlay.
    layer: _linears.Layer | None = None

    @property
    def weight(self) -> Tensor:
        """The weight, or for an overlay what stands in for it: of its shape, dtype and device."""
        return self.slots[0].weight if self.layer is None else self.layer.stand_in()

    @property
    def nnz(self) -> int:
        return self.indices.numel() * self.granule


@dataclass(eq=False)
class _Tuned:
    """One weight that a tuner trains."""

    plan: _Plan
    target: Target

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def owner(self) -> nn.Module:
        return self.plan.slots[0].module

    @property
    def whole(self) -> bool:
        return self.plan.granule == self.plan.weight.numel()

    @property
    def values(self) -> nn.Parameter:
        parameter: nn.Parameter = getattr(self.owner, self.target.site.values_name)
        return parameter


class SparseTuner:
    """Train the entries that a mask selects of a model's weights; everything else is frozen.

    From here on ``model.parameters()`` holds, with ``requires_grad``, the values (and the weights of *dense* targets,
    whose gradients are gathered and freed during backward, so that optimizers, clipping and scalers never see them). So
    DDP, clipping, accumulation, schedulers and checkpoints find the values by themselves, and any optimizer over
    ``tuner.parameters()`` trains them (`shira.AdamW` takes the step and writes the weights in one pass). As a context
    manager it puts the base back at the end.

    A tied weight (an embedding and the head that shares it) is one target: the gradients of its uses are summed.
    Buffers, such as the running statistics of batch normalisation, are neither trained nor put back: keep such layers
    in ``eval()``. A tuner cannot be copied or pickled (use `state_dict` or `adapter`). A copy of the model computes
    what the model does, and `shira.detach` puts its base back. Several tuners may train different weights of one model,
    and be detached in any order. Anything that replaces or freezes parameters (``parallelize_module``, PEFT's
    ``get_peft_model``) must come before the tuner; after it, training is refused. A count of the model's parameters
    includes both the values and the weights that hold them; `nnz` is the number of trained entries.

    Weights may be sharded over ranks by FSDP2 (``fully_shard``), by tensor parallelism (``parallelize_module``, or
    DTensors made by hand), or by both. Then all ranks call the tuner together, with the same arguments; the values of a
    weight are one DTensor of `nnz` entries in the order of the adapter's file, divided evenly between all ranks; masks
    select what they select in one process; and every rank gets the same whole `adapter`. For `shira.masks.Grad` and
    `shira.masks.Snip` every rank gives its own batches, equally many, and the ranks of one tensor-parallel group the
    same ones. ``fully_shard`` on a mesh of one dimension may also follow the tuner, with the optimizer made from
    ``tuner.parameters()`` after it.

    Args:
        model: the model; its weights are changed in place, in the same storage. Wrap it in DistributedDataParallel
            afterwards, with the same mask on every rank (the first step compares them).
        mask: one of ``shira.masks``; or 0/1 tensors by the weights' names, or a function of a weight's name and the
            weight that gives one (`shira.masks.Given`). None: ``shira.masks.default()``, random granules, 1 % of every
            weight, the same ones every time (`shira.masks.Rand` says when to give another seed).
        targets: which weights. A regular expression searched in names: of modules with weights (linear, convolution,
            embedding and attention modules; for any other its own matrices), or of parameters. Or a list of such names,
            whole or their last parts (``"q_proj"``). None or ``"all-linear"``: every ``nn.Linear`` and transformers'
            ``Conv1D``, and 3-D weights of experts, but nothing of the model's output head (what
            ``get_output_embeddings()`` or timm's ``get_classifier()`` returns, and ``score`` and ``classifier`` of
            transformers' models), and no layers that PEFT added, such as LoRA's; with masks by name, the weights that
            they name.
        exclude: what to leave out of the targets: a regular expression searched in names of modules and parameters, or
            a list of such names. A module's name stands for all that is in it, any name of a tied weight for the
            weight.
        whole: parameters to train as a whole, such as a new head: a regular expression searched in parameter names, or
            a list of names of parameters or modules. They become part of the adapter, and `detach` puts them back.
        gradient: ``"sampled"`` computes the gradient at the mask alone wherever the layer allows it; ``"dense"`` makes
            the full gradient of every target and masks it, as in the paper (arXiv 2406.13175, section 3.2). A sampled
            gradient covers only the calls of the weight's layers: a weight that is also used without them, as in
            ``F.linear(x, self.embedding.weight)``, needs ``"dense"``. The first step refuses the signs of such a use:
            a target without a gradient, and a tied weight with a layer that did not run.
        calibration: batches for a mask by gradients (`shira.masks.Grad`, `shira.masks.Snip`): a batch is what the model
            is called with, a mapping, a tuple, a list or a tensor. Afterwards the model is as it was.
        loss: ``loss(model, batch)`` returns the scalar for calibration; None: the model's own ``output.loss``.
        allow_unused: accept targets that get no gradient in the first step (layers that run only now and then), and
            tied weights with a layer that did not run.
        overlay: train a delta beside weights that are not written, as those of quantized layers: the layer's output
            gets ``delta @ input`` added, which costs what an unmerged LoRA of as many parameters costs. The values are
            the delta and start at zero; `adapter` gives a delta adapter for this base, whose identity is what it
            stores: codes and scales. Linear layers (quantized ones too: those of bitsandbytes, torchao, optimum-quanto,
            and any module with ``in_features``, ``out_features`` and ``dequantize()``), ``Conv1D`` and ``Embedding``;
            any other target is refused by name. Masks that look at weights dequantize one layer at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Mask | Mapping[str, Tensor] | Callable[[str, Tensor], Tensor] | None = None,
        targets: str | Sequence[str] | None = None,
        *,
        exclude: str | Sequence[str] | None = None,
        whole: str | Sequence[str] | None = None,
        gradient: Literal["sampled", "dense"] = "sampled",
        calibration: Iterable[Any] | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        allow_unused: bool = False,
        overlay: bool = False,
    ) -> None:
        mask = default() if mask is None else Given.of(mask)
        self._open(model, gradient, mask, mask.describe(), overlay)
        if overlay and whole is not None:
            raise ValueError(
                "SparseTuner: whole= trains parameters themselves, and an overlay writes none: train them with a "
                "second tuner, without overlay"
            )
        names = _targets.Names(self.model, overlay)
        entire = names.whole(whole)
        if targets is None and isinstance(mask, Given) and mask.names is not None:
            targets = "|".join(f"^{re.escape(name)}$" for name in mask.names)
        chosen = {name: group for name, group in names.targets(targets, exclude).items() if name not in entire}
        if not chosen and not entire:
            raise ValueError("SparseTuner: targets is empty, so nothing would train")
        empty = [name for name, group in entire.items() if not group[0].weight.numel()]
        if empty:
            raise ValueError(f"SparseTuner: {_model.some(empty)} has no entries to train")
        layers: Mapping[str, _linears.Layer] = names.layers or {}
        sharded = _sharded.check_targets(self.model, {**chosen, **entire})
        mask.check({name: _stand_in(group, layers.get(name)) for name, group in chosen.items()})
        places = {name: [(slot.module, slot.attribute) for slot in group] for name, group in chosen.items()}
        if sharded:
            plans = self._together_planned(mask, chosen, entire, calibration, loss)
            sparse = plans[: len(chosen)]
        else:
            mask.prepare(self.model, places, calibration, loss)
            sparse = [self._masked(mask, name, group, layers.get(name)) for name, group in chosen.items()]
            plans = [*sparse, *(self._entire(name, group) for name, group in entire.items())]
        self._install(plans, allow_unused)
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
            experts = names.experts() if overlay else []
            if experts:
                self._notes.append(f"left out: {_model.some(experts)}, stacks of experts, which have no overlay")
            added = names.added()
            if added:
                self._notes.append(f"left out: {_model.some(added)}, which PEFT added to the model's own layers")

    @classmethod
    def from_adapter(
        cls,
        model: nn.Module,
        adapter: Adapter | str | os.PathLike[str],
        *,
        gradient: Literal["sampled", "dense"] = "sampled",
        allow_unused: bool = False,
        check_finite: bool = True,
        rename: Rename = None,
        overlay: bool = False,
    ) -> SparseTuner:
        """Continue to train a saved adapter: its entries are the mask, and the values start where it ended.

        The model must hold the base that the adapter was made for (any other is refused, by fingerprint), and `detach`
        puts that base back. The strength ``alpha`` has no effect on training; `adapter` keeps it.

        Args:
            model: the model, which holds the base.
            adapter: an `Adapter`, or the path of its file. A delta adapter starts at base + delta, and what is trained
                is saved as an overwriting one; with ``overlay`` it is the other way round.
            gradient, allow_unused, overlay: as for `SparseTuner`.
            check_finite, rename: as for `Switcher.add`. What is trained is saved under the model's names.
        """
        tuner = cls.__new__(cls)
        tuner._open(model, gradient, None, None, overlay)
        names = _targets.Names(tuner.model, overlay)
        who = "the adapter" if isinstance(adapter, Adapter) else os.fspath(adapter)
        adapter = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
        if not adapter.weights:
            raise AdapterError("SparseTuner: the adapter changes no weight, so nothing would train")
        for name, entry in adapter.weights.items():
            entry.check_indices(f"{who}: weight {named(name)}")
            if check_finite:
                entry.check_finite(f"{who}: weight {named(name)}")
        tuner._about, tuner._alpha = adapter.mask, adapter.alpha
        if names.layers is None:
            plans = tuner._plans_of(who, adapter, names, rename)
        else:
            plans = tuner._overlays_of(who, adapter, names, names.layers, rename)
        tuner._install(plans, allow_unused)
        return tuner

    def _plans_of(self, who: str, adapter: Adapter, names: _targets.Names, rename: Rename) -> list[_Plan]:
        places = _targets.of_adapter(who, adapter, self.model, rename)
        names.check_apart({names.of(place.slot)[0].name for place in places.values()})
        if any(_shards.is_dtensor(place.slot.weight) for place in places.values()):
            return self._plans_together(who, adapter, {name: names.of(place.slot) for name, place in places.items()})
        plans = []
        for name, entry in adapter.weights.items():
            slot = places[name].slot
            group = names.of(slot)
            names.check(slot.name, group)
            indices = entry.indices.to(slot.weight.device)
            plan = self._plan(group[0].name, group, indices, entry.granule, entry.seed, places[name].fingerprint())
            start = entry.values.detach().to(device=slot.weight.device, dtype=_master_dtype(slot.weight))
            plan.start = plan.saved.to(start.dtype) + start if adapter.delta else start
            plans.append(plan)
        return plans

    def _plans_together(self, who: str, adapter: Adapter, groups: Mapping[str, list[_model.Slot]]) -> list[_Plan]:
        """The same for weights that ranks hold together. A collective call."""
        _sharded.check_targets(self.model, {group[0].name: group for group in groups.values()})
        first: Any = next(iter(groups.values()))[0].weight
        ranks = _sharded.Ranks(first.device_mesh)
        _sharded.compare_adapters(ranks, adapter)
        plans = []
        for name, entry in adapter.weights.items():
            group = groups[name]
            plans.append(self._plan_together(group, ranks, entry.indices, entry.granule, entry.seed))
        self._know_together(ranks, plans)
        known = [(plan, entry) for plan, entry in zip(plans, adapter.weights.values(), strict=True)
                 if entry.fingerprint is not None]  # fmt: skip
        wrong = [plan.name for plan, entry in known if plan.fingerprint != entry.fingerprint]
        if wrong:
            raise AdapterError(_fit.made_for_another(who, wrong, len(known)))
        shards = [(plan.shard, plan.saved.to(_master_dtype(plan.saved))) for plan in plans if plan.shard is not None]
        bases = _sharded.spread(shards) if adapter.delta else [None] * len(plans)
        for plan, entry, base in zip(plans, adapter.weights.values(), bases, strict=True):
            begin, count = ranks.span(entry.nnz)
            own = entry.values.detach()[begin : begin + count].to(
                plan.saved.device, _master_dtype(plan.saved), copy=True
            )
            plan.start = ranks.values(own if base is None else base + own, entry.nnz)
        return plans

    def _overlays_of(
        self, who: str, adapter: Adapter, names: _targets.Names, layers: _linears.Layers, rename: Rename
    ) -> list[_Plan]:
        found = _targets.layers_of_adapter(who, adapter, layers, rename)
        plans = []
        for name, entry in adapter.weights.items():
            layer = found[name]
            group = names.of(names.slots[layer.name])
            names.check(layer.name, group)
            indices = entry.indices.to(layer.device)
            plan = self._overlay_plan(group[0].name, group, indices, entry.granule, entry.seed, layer)
            start = entry.values.detach().to(device=layer.device, dtype=_master_dtype(plan.weight))
            plan.start = start if adapter.delta else start - layer.entries(indices, entry.granule)
            plans.append(plan)
        return plans

    # ---- putting on ------------------------------------------------------------------------------------------

    def _open(
        self, model: nn.Module, gradient: str, mask: Mask | None, about: Mapping[str, Any] | None, overlay: bool
    ) -> None:
        if not isinstance(overlay, bool):
            raise TypeError(f"SparseTuner: overlay must be True or False, got {overlay!r}")
        if overlay and gradient == "dense":
            raise ValueError(
                'SparseTuner: an overlay has no gradient="dense": the weight that it is laid over gets no gradient'
            )
        if gradient not in ("sampled", "dense"):
            raise ValueError(f'SparseTuner: gradient must be "sampled" or "dense", got {gradient!r}')
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "SparseTuner: what is made under torch.inference_mode cannot train; leave that mode first"
            )
        if isinstance(model, nn.Module):
            _targets.check_model(model)
        self.model = _model.unwrap(model)
        _sharded.reshard(self.model)
        _live.refuse_active(self.model)
        self.mask, self._about = mask, about
        self._gradient, self.overlay = gradient, overlay
        self._alpha = 1.0
        self._tuned: list[_Tuned] = []
        self._froze: list[_model.Slot] = []
        self._root: list[RemovableHandle] = []
        self._group = Group(model=weakref.ref(self.model), take_over=weakref.WeakMethod(self._take_over_gathered))
        self._disabled = 0
        self._turn = threading.RLock()  # blocks of `disabled` may begin and end in several threads
        self._ignored: list[str] = []  # what DistributedDataParallel leaves alone
        self._notes: list[str] = []  # what `summary` says besides

    def _masked(self, mask: Mask, name: str, group: list[_model.Slot], layer: _linears.Layer | None) -> _Plan:
        if layer is None or not layer.quantized:
            weight = group[0].weight.detach()
        else:
            weight = layer.dense().contiguous() if mask.reads_weights else layer.stand_in()
        indices, granule = mask(name, weight), mask.granule_of(weight)
        try:
            shira_ops.check_indices(indices, weight.numel(), granule=granule)
        except RuntimeError as error:
            raise ValueError(f"SparseTuner: {mask!r} gave {name} bad indices: {error}") from error
        seed = mask.seed_for(name)
        if layer is not None:
            return self._overlay_plan(name, group, indices, granule, seed, layer)
        return self._plan(name, group, indices, granule, seed)

    def _overlay_plan(
        self,
        name: str,
        group: list[_model.Slot],
        indices: Tensor,
        granule: int,
        seed: int | None,
        layer: _linears.Layer,
    ) -> _Plan:
        fingerprint = layer.fingerprint()
        base = torch.tensor([_granules.signed(fingerprint)], dtype=torch.int64, device=layer.device)
        return _Plan(name, group, indices, granule, base, fingerprint, seed, layer=layer)

    def _together_planned(
        self,
        mask: Mask,
        chosen: Mapping[str, list[_model.Slot]],
        entire: Mapping[str, list[_model.Slot]],
        calibration: Iterable[Any] | None,
        loss: Callable[[nn.Module, Any], Tensor] | None,
    ) -> list[_Plan]:
        """The plans for weights that ranks hold together, the masked ones first. A collective call."""
        groups = {**chosen, **entire}
        first: Any = next(iter(groups.values()))[0].weight
        ranks = _sharded.Ranks(first.device_mesh)
        _sharded.compare_plans(ranks, list(groups), mask)
        _sharded.prepare(mask, self.model, chosen, calibration, loss, ranks)
        plans = []
        for name, group in groups.items():
            weight: Any = group[0].weight
            if name in entire:
                indices, granule, seed = _whole_indices(weight), weight.numel(), None
            else:
                indices, granule = _sharded.indices_of(mask, name, weight, ranks), mask.granule_of(weight)
                seed = mask.seed_for(name)
            shira_ops.check_indices(indices, weight.numel(), granule=granule)
            plans.append(self._plan_together(group, ranks, indices, granule, seed))
        _sharded.compare(ranks, {plan.name: (plan.indices, plan.granule, 0) for plan in plans})
        self._know_together(ranks, plans)
        return plans

    def _plan_together(
        self, group: list[_model.Slot], ranks: _sharded.Ranks, indices: Tensor, granule: int, seed: int | None
    ) -> _Plan:
        here = _shards.local(group[0].weight)
        indices = indices.to(here.device)
        shard = Sharded.of(self.model, group[0], ranks, indices, granule)
        saved = shira_ops.gather(here, shard.part.indices, granule=shard.part.granule)
        return _Plan(group[0].name, group, indices, granule, saved, 0, seed, shard=shard)

    def _know_together(self, ranks: _sharded.Ranks, plans: Sequence[_Plan]) -> None:
        """Add up the fingerprints of whole weights. A collective call."""
        weights: list[Any] = [plan.slots[0].weight for plan in plans]
        for plan, fingerprint in zip(plans, _sharded.fingerprints(ranks, weights), strict=True):
            plan.fingerprint = fingerprint
        self._notes.append(f"the values are divided between {ranks.size} ranks")

    def _entire(self, name: str, group: list[_model.Slot]) -> _Plan:
        weight = group[0].weight
        return self._plan(name, group, _whole_indices(weight), weight.numel(), None)

    def _plan(
        self,
        name: str,
        group: list[_model.Slot],
        indices: Tensor,
        granule: int,
        seed: int | None,
        fingerprint: int | None = None,
    ) -> _Plan:
        """``fingerprint``: the weight's, if it is known already."""
        weight = group[0].weight.detach()
        saved = shira_ops.gather(weight, indices, granule=granule)
        fingerprint = _granules.fingerprint(weight) if fingerprint is None else fingerprint
        return _Plan(name, group, indices, granule, saved, fingerprint, seed)

    def _install(self, plans: Sequence[_Plan], allow_unused: bool) -> None:
        """Put the plans, which have been checked, on the model. If that fails all the same, the model is as before."""
        try:
            self._put_on(plans, allow_unused)
        except BaseException:
            self._take_off()
            raise

    def _put_on(self, plans: Sequence[_Plan], allow_unused: bool) -> None:
        names = _targets.Names(self.model)
        slots = _model.slots(self.model)
        for slot in (slot for name, slot in slots.items() if not name.endswith(VALUES_SUFFIX)):
            kept = slot.module.__dict__.setdefault(_hooks.KEPT, {})
            tuners, required = kept.get(slot.attribute, (0, slot.weight.requires_grad))
            kept[slot.attribute] = tuners + 1, required
            self._froze.append(slot)
        for slot in self._froze:
            # Leave alone what another tuner trains.
            if not any(hasattr(one.module, one.attribute + VALUES_SUFFIX) for one in names.of(slot)):
                slot.weight.requires_grad_(False)
        continued = any(plan.start is not None for plan in plans)
        shards = [(plan.shard, plan) for plan in plans if plan.shard is not None and plan.start is None]
        saved = [(shard, plan.saved.to(_master_dtype(plan.saved))) for shard, plan in shards]
        for (shard, plan), chunk in zip(shards, _sharded.spread(saved), strict=True):
            plan.start = shard.ranks.values(chunk, shard.count)
        for plan in plans:
            self._put(plan, allow_unused)
        weights = [tuned.plan.slots[0].weight for tuned in self._tuned if tuned.target.site.dense]
        indices = [getattr(tuned.owner, tuned.target.site.indices_name) for tuned in self._tuned]
        self._ignored = _ranks.ignore(self.model, [*weights, *indices])
        # The forward of a module with a dense site may not run, so the model's own forward checks all sites.
        sites = [(tuned.target.site, tuned.owner) for tuned in self._tuned]
        self._keep_root(self.model.register_forward_pre_hook(partial(follow, sites, True), prepend=True))
        self._keep_root(self.model.register_forward_hook(partial(uncover, self._group), always_call=True))
        _held.add(self)
        if continued:
            self.sync()
        _hooks.watch_optimizers()

    def _keep_root(self, handle: RemovableHandle) -> None:
        """Note a hook of the model itself, on the model too, so that it can be taken off a copy."""
        self._root.append(handle)
        self.model.__dict__.setdefault(_ROOT, []).append(handle)

    def _put(self, plan: _Plan, allow_unused: bool) -> None:
        owner, weight = plan.slots[0].module, plan.weight
        laid = [] if plan.layer is None else _targets.laid(plan.slots)
        rules = [RULES[layer.kind] for layer in laid] or self._rules(plan.slots, plan.granule)
        dtype, start = _master_dtype(weight), plan.start
        if start is None:
            start = plan.saved if plan.layer is None else torch.zeros(plan.nnz, device=weight.device)
        values = nn.Parameter(start.to(dtype, copy=True) if plan.shard is None else start)
        places = [Place(slot.name, rule) for slot, rule in zip(plan.slots, rules, strict=True)]
        indices, granule = plan.indices, plan.granule
        if plan.shard is not None:
            indices, granule = plan.shard.part.indices, plan.shard.part.granule
        site = Site(
            plan.name, plan.slots[0].attribute, granule, dtype, rules[0] is None, plan.saved,
            indices.to("cpu", copy=True), self._group, places, allow_unused, plan.layer is not None,
            shard=plan.shard,
        )  # fmt: skip
        target = Target(site, weakref.ref(owner))
        self._tuned.append(_Tuned(plan, target))
        # On the first owner alone: under several names, libraries that save models would see one more tied weight.
        owner.register_parameter(site.values_name, values)
        owner.register_buffer(site.indices_name, plan.indices, persistent=False)
        plan.indices = site.indices if plan.shard is None else plan.indices.to("cpu", copy=True)
        site.handles += [kept for layer in laid if (kept := layer.keep()) is not None]
        put(target, [slot.module for slot in plan.slots], rules)

    def _rules(self, group: Sequence[_model.Slot], granule: int) -> list[str | None]:
        """How the gradient is taken in each place that holds the weight; None: by the dense gradient."""
        if self._gradient == "sampled" and granule < group[0].weight.numel():
            rules = _targets.rules(group, granule)
            # Of other layers it is not known what tensor parallelism makes each rank compute.
            if set(rules) == {"linear"} or not _sharded.is_tensor_parallel(self.model, group[0]):
                return rules
        return [None] * len(group)

    # ---- while it trains -------------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable values, one parameter for each weight."""
        return (tuned.values for tuned in self._attached())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable values under their names in the model, ``<weight>_shira_values``."""
        return ((tuned.name + VALUES_SUFFIX, tuned.values) for tuned in self._attached())

    def sync(self) -> None:
        """Write the values into the weights.

        Steps of optimizers do so by themselves, and after an edit by hand the next forward of the model does. It is
        needed when anything else reads the weights after an edit, and after an edit between two steps where the model
        is compiled as a part of something else (an error in backward says so).
        """
        self._enabled("sync")
        write((tuned.target.site, *tuned.target.tensors()) for tuned in self._written())

    def adapter(self, *, alpha: float | None = None, provenance: Mapping[str, Any] | None = None) -> Adapter:
        """The trained entries as an `Adapter`: exactly what the weights now hold, in the weights' dtype.

        Of an overlay it is a delta adapter, with the values in full precision.

        Args:
            alpha: the strength it will have unless another is asked for. None is 1, or the strength of the adapter from
                which training went on (`from_adapter`).
            provenance: anything worth keeping, in JSON's types.
        """
        self._enabled("adapter")
        self.sync()
        return self._adapter(self._together(master=False), alpha, provenance)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        alpha: float | None = None,
        provenance: Mapping[str, Any] | None = None,
        seeds: bool = False,
        version: int | None = None,
    ) -> None:
        """Write `adapter` to a file: the same bytes as ``tuner.adapter(...).save(path, ...)``.

        Of weights that ranks hold together all ranks call it, and the first one writes: it gets the values of one
        weight at a time, so that no rank ever holds all of them. If it cannot write the file, every rank raises.

        Args:
            path: where to write; an existing file is replaced.
            alpha, provenance: as for `adapter`.
            seeds, version: as for `Adapter.save`.
        """
        self._enabled("save")
        self.sync()
        shards = {tuned.name: (tuned.plan.shard, tuned.values) for tuned in self._tuned if tuned.plan.shard is not None}
        if not shards:
            self._adapter({}, alpha, provenance).save(path, seeds=seeds, version=version)
            return
        nothing = {
            name: torch.empty(shard.count, dtype=shard.stored().dtype, device="meta")
            for name, (shard, _) in shards.items()
        }
        adapter = self._adapter(nothing, alpha, provenance)
        _sharded.written_by_first(shards, partial(adapter._save, path, seeds, version), os.fspath(path))

    def _adapter(
        self, together: Mapping[str, Tensor], alpha: float | None, provenance: Mapping[str, Any] | None
    ) -> Adapter:
        """The adapter; ``together`` has the values of the weights that ranks hold together."""
        entries: dict[str, Entry] = {}
        for tuned in self._tuned:
            plan = tuned.plan
            if plan.layer is not None:
                indices, trained = tuned.target.trained()
                values = trained.detach().clone()
            elif plan.shard is not None:
                indices, values = plan.indices, together[tuned.name]
            else:
                weight, indices, _ = tuned.target.tensors()
                with torch.no_grad():
                    values = shira_ops.gather(weight, indices, granule=plan.granule)
            entries[tuned.name] = Entry(
                indices.clone(),
                values,
                tuple(plan.weight.shape),
                plan.weight.dtype,
                plan.granule,
                plan.fingerprint,
                plan.seed,
                tuple(slot.name for slot in plan.slots[1:]),
                checked=True,
            )
        alpha = self._alpha if alpha is None else alpha
        return Adapter(entries, alpha=alpha, delta=self.overlay, mask=self._about, provenance=provenance)

    def _together(self, master: bool) -> dict[str, Tensor]:
        """All values of the weights that ranks hold together: in fp32 (fp64), or in the weights' dtype."""
        sites = [(tuned.target.site, tuned.values) for tuned in self._attached() if tuned.plan.shard is not None]
        return {site.name: whole for (site, _), whole in zip(sites, whole_values(sites, master), strict=True)}

    def _trained(self) -> Iterator[nn.Parameter]:
        """The values and the weights that follow them, which a tuner's state covers."""
        for tuned in self._attached():
            yield tuned.values
            if tuned.plan.layer is None:
                yield getattr(tuned.owner, tuned.target.site.attribute)

    def state_dict(self) -> dict[str, Any]:
        """The values in full precision, and what they belong to, for continuing the training later.

        To use what was trained, save `adapter`. The state has only tensors, strings and numbers, so that
        ``torch.load(weights_only=True)`` reads it.
        """
        weights, together = {}, self._together(master=True)
        for tuned in self._attached():
            values = together[tuned.name] if tuned.name in together else tuned.values.detach().clone()
            weights[tuned.name] = {**_identity(tuned), "values": values}
        return {"version": 1, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the values of a `state_dict`. One of another base, mask or model is refused, with nothing changed."""
        self._enabled("load_state_dict")
        self.check_state_dict(state)
        with torch.no_grad():
            for tuned in self._attached():
                values = state["weights"][tuned.name]["values"]
                if tuned.plan.shard is None:
                    tuned.values.copy_(values)
                else:
                    begin, count = tuned.plan.shard.ranks.span(values.numel())
                    _shards.local(tuned.values).copy_(values[begin : begin + count])
        self.sync()

    def check_state_dict(self, state: Any) -> None:
        """Raise the `ValueError` that `load_state_dict` would raise, without taking anything."""
        version = state.get("version") if isinstance(state, Mapping) else None
        if type(version) is not int or version != 1 or not isinstance(state.get("weights"), Mapping):
            raise ValueError(f"SparseTuner: this is not a state of a tuner (version {version!r:.80})")
        weights, tuned_here = state["weights"], {tuned.name: tuned for tuned in self._attached()}
        missing, foreign = tuned_here.keys() - weights.keys(), weights.keys() - tuned_here.keys()
        if missing or foreign:
            raise ValueError(
                f"SparseTuner: the state is of another adapter: it lacks {_model.some(sorted(missing))}, "
                f"and also has {_model.some(sorted(map(str, foreign)))}"
            )
        what = {
            "shape": "another shape", "granule": "another granule", "indices": "other entries (another mask)",
            "fingerprint": "another base", "delta": "values of another kind (with or without overlay)",
        }  # fmt: skip
        for name, tuned in tuned_here.items():
            entry = weights[name]
            if not isinstance(entry, Mapping) or not isinstance(entry.get("values"), Tensor):
                raise ValueError(f"SparseTuner: the state has no values of {name}")
            for key, wanted in {"delta": None, **_identity(tuned)}.items():
                if repr(entry.get(key)) != repr(wanted):  # of whatever a broken file holds
                    raise ValueError(f"SparseTuner: the state is of another adapter: {name} has {what[key]}")
            if entry["values"].shape != tuned.values.shape:
                raise ValueError(f"SparseTuner: the state's values of {name} have the wrong length")
            if not entry["values"].is_floating_point():
                raise ValueError(f"SparseTuner: the state's values of {name} must be floats")

    # ---- taking off ------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Raise `RuntimeError`, naming the weights, if an entry that does not train has changed since the tuner was
        attached.

        Then something else has written to the model: `detach` would not put the base back, and `adapter` would not
        hold the whole change. While a weight is read it holds the base's entries, so no forward pass may run at the
        same time, and none may be waiting for its backward pass.
        """
        self._enabled("verify")
        wrong = [
            tuned.name
            for tuned in self._attached()
            if tuned.plan.layer is not None and tuned.plan.layer.fingerprint() != tuned.plan.fingerprint
        ]
        for tuned in self._written():
            weight, indices, _ = tuned.target.tensors()
            plan, granule = tuned.plan, tuned.target.site.granule
            other = plan.saved.to(weight.device, copy=True)
            with torch.no_grad():
                shira_ops.swap_(weight, indices, other, granule=granule)
                try:
                    now = self._fingerprint(plan, weight)
                finally:
                    shira_ops.swap_(weight, indices, other, granule=granule)
            if now != plan.fingerprint:
                wrong.append(tuned.name)
        if wrong:
            raise RuntimeError(
                f"SparseTuner: {len(wrong)} weight(s) have changed where nothing trains: {_model.some(wrong)}; "
                "something else wrote to them"
            )

    @staticmethod
    def _fingerprint(plan: _Plan, weight: Tensor) -> int:
        if plan.shard is None:
            return _granules.fingerprint(weight)
        stored: Any = plan.shard.stored()
        return _sharded.fingerprints(plan.shard.ranks, [stored])[0]

    def detach(self) -> None:
        """Put the base back, bit for bit, and remove everything that the tuner put on the model.

        Only the entries that train are written; what anything else has changed stays changed (`verify` tells). A second
        call does nothing.
        """
        self._enabled("detach")
        if self._tuned:
            self._take_over()
            self._take_off()

    def _take_off(self) -> None:
        """Undo `_put_on`, however far it came."""
        take_off([(tuned.target.site, tuned.owner) for tuned in self._tuned])
        for handle in self._root:
            handle.remove()
        _ranks.unignore(self.model, self._ignored)
        left = [handle for handle in self.model.__dict__.get(_ROOT, ()) if handle not in self._root]
        _keep(self.model, _ROOT, left)
        _held.discard(self)
        for slot in self._froze:
            kept = slot.module.__dict__[_hooks.KEPT]
            tuners, required = kept.pop(slot.attribute)
            if tuners > 1:  # the last tuner that goes restores what was there before the first
                kept[slot.attribute] = tuners - 1, required
            elif (weight := slot.now()) is not None:
                weight.requires_grad_(required)
            _keep(slot.module, _hooks.KEPT, kept)
        self._tuned.clear()
        self._froze.clear()
        self._ignored.clear()
        self._root.clear()
        _hooks.stop_watching()

    @contextmanager
    def disabled(self) -> Iterator[SparseTuner]:
        """The base within a ``with`` block, for reference logits, say; afterwards the trained weights, bit for bit.

        What is computed inside gives the values no gradient. Blocks may be nested, and those of generators that take
        turns may end in any order: the model is the base until the last one ends. A block may stand between a forward
        pass and its backward pass, since afterwards the weights are the same again, for autograd too; autograd refuses
        a backward pass inside the block that needs the trained weights. Optimizers cannot step inside. Keeps a copy of
        the trained entries meanwhile.
        """
        with self._turn:
            if not self._disabled:
                self._aside = self._as_base()
                self._aside.__enter__()
            self._disabled += 1
        try:
            yield self
        finally:
            # Blocks of generators and threads may end in any order, and each has the base until its own end.
            with self._turn:
                self._disabled -= 1
                if not self._disabled:
                    self._aside.__exit__(None, None, None)

    @contextmanager
    def _as_base(self) -> Iterator[None]:
        """Put the trained entries aside, until the last block of `disabled` ends."""
        # First let the weights hold the values: afterwards what they hold now is put back.
        _sharded.reshard(self.model)
        written = self._written()
        items = [(tuned.target.site, *tuned.target.tensors()) for tuned in written]
        settle(items)
        required = [site.identity(weight).requires_grad for site, weight, _, _ in items]
        with torch.no_grad():
            trained = [shira_ops.gather(weight, indices, granule=site.granule) for site, weight, indices, _ in items]
        before = [(weight, weight._version) for _, weight, _, _ in items]
        self._group.off = True
        try:
            scatter((site.granule, weight, at, site.saved.to(weight.device)) for site, weight, at, _ in items)
            # By the version autograd distinguishes what was saved inside from what was saved outside.
            _set_versions((weight, version + _ASIDE) for weight, version in before)
            for site, weight, _, _ in items:
                site.identity(weight).requires_grad_(False)
            yield
        finally:
            self._group.off = False
            # The weights that the model has by now.
            _sharded.reshard(self.model)
            now = [tuned.target.site.held(tuned.owner) for tuned in written]
            undisturbed = [
                (weight, version)
                for (weight, version), found in zip(before, now, strict=True)
                if weight is found and weight._version == version + _ASIDE
            ]
            scatter(
                (site.granule, weight, indices.to(weight.device), entries.to(weight.device, weight.dtype))
                for (site, _, indices, _), weight, entries in zip(items, now, trained, strict=True)
            )
            # The bits are those that autograd saved, so it may have their versions again.
            _set_versions(undisturbed)
            for (site, *_), weight, requires in zip(items, now, required, strict=True):
                site.identity(weight).requires_grad_(requires)

    def _enabled(self, what: str) -> None:
        if self._disabled:
            raise RuntimeError(
                f"SparseTuner: not inside `with tuner.disabled()`, where the model is the base: {what}()"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _attached(self) -> list[_Tuned]:
        if not self._tuned:
            raise RuntimeError("SparseTuner: the tuner is detached")
        self._take_over()
        return self._tuned

    def _take_over(self) -> None:
        """Go on with what ``fully_shard`` has made of the weights and values, if it came after the tuner."""
        replaced = [
            tuned
            for tuned in self._tuned
            if tuned.plan.shard is None and tuned.plan.layer is None
            and tuned.owner._parameters.get(tuned.target.site.attribute) is not None
            and tuned.owner._parameters[tuned.target.site.attribute] is not tuned.target.site.own_weight
        ]  # fmt: skip
        found = [_sharded.taken(self.model, tuned.target.site, tuned.owner) for tuned in replaced]
        takes = [one for one in found if one is not None]
        if not takes or len(takes) < len(self._tuned):
            return  # the next forward says what is wrong
        _sharded.reshard(self.model)
        first: Any = takes[0].weight
        ranks = _sharded.Ranks(first.device_mesh)
        for tuned, taken in zip(replaced, takes, strict=True):
            taken.release()
            plan, target = tuned.plan, tuned.target
            # What was there before is a whole weight, which nothing may keep.
            plan.slots = [replace(slot, weight=taken.weight) for slot in plan.slots]
            device = _shards.local(taken.weight).device
            plan.shard = Sharded.of(self.model, plan.slots[0], ranks, plan.indices.to(device), plan.granule)
            plan.shard.fingerprint, plan.shard.compared = plan.fingerprint, False
            plan.saved = plan.shard.part.of(plan.saved.to(device))
            become_sharded(target, plan.shard, plan.saved, taken.values)
        now = _model.slots(self.model)
        self._froze = [now.get(slot.name, slot) for slot in self._froze]

    def _take_over_gathered(self) -> None:
        """The same in a forward pass, for which FSDP has gathered some weights already."""
        gathered = _sharded.gathered_groups(self.model)
        self._take_over()
        for group in gathered:
            group.unshard()
            group.wait_for_unshard()

    def _written(self) -> list[_Tuned]:
        """Those whose values are written into the weight: all, or of an overlay none."""
        return [tuned for tuned in self._attached() if tuned.plan.layer is None]

    # ---- what it is ------------------------------------------------------------------------------------------

    @property
    def nnz(self) -> int:
        """The number of trainable entries."""
        return sum(tuned.plan.nnz for tuned in self._tuned)

    @property
    def sharded(self) -> bool:
        """Whether ranks hold the weights together, so that all of them must call a method at the same time."""
        return any(tuned.plan.shard is not None for tuned in self._attached())

    @property
    def density(self) -> float:
        """The share of the targeted weights' entries that train."""
        return self.nnz / max(1, sum(tuned.plan.weight.numel() for tuned in self._tuned))

    def summary(self) -> str:
        """A table of what trains: names, shape, entries, density, granule, and how the gradient is computed.

        Layers whose names differ only in a number share a row, with ``*`` for the number.
        """
        kinds: dict[tuple[str, ...], list[str]] = {}
        for tuned in self._attached():
            weight, plan, entries = tuned.plan.weight, tuned.plan, tuned.plan.nnz
            row = (
                re.sub(r"(?<![^.])\d+(?=\.)", "*", tuned.name),
                "x".join(map(str, weight.shape)) or "scalar",
                f"{entries:,}",
                f"{entries / weight.numel():.2%}",
                "whole" if tuned.whole else str(plan.granule),
                "dense" if tuned.target.site.dense else "overlay" if self.overlay else "sampled",
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
        sizes = {id(slot.weight): slot.weight.numel() for slot in self._froze}
        if self.overlay:  # two codes of 4 bits are one entry of what holds them
            layers = _linears.find(self.model).values()
            places = ((layer.module if layer.weight is None else layer.weight, layer.shape) for layer in layers)
            sizes |= {id(place): math.prod(shape) for place, shape in places}
        share = self.nnz / max(1, sum(sizes.values()))
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
            return f"{type(self).__name__}(detached)"
        mask = "no mask" if self._about is None else self._about.get("name", "a mask")
        return f"{type(self).__name__}({mask}, {len(self._tuned)} weights, {self.nnz:,} entries, {self.density:.2%})"


def detach(model: nn.Module) -> None:
    """Take every tuner off a model and put the base back, bit for bit; without a tuner, nothing happens.

    For when the tuner is no longer at hand; also for a copied or unpickled model, which has everything that a tuner put
    on the first model (that one stays as it is).
    """
    model = _model.unwrap(model)
    modules = list(model.modules())
    inside = {id(module) for module in modules}
    for tuner in _live.alive(_held):
        if id(tuner.model) in inside:
            tuner.detach()
        elif any(id(slot.module) in inside for slot in tuner._froze):
            raise RuntimeError(
                f"shira.detach: a tuner is on the {type(tuner.model).__name__} that has this module; detach it there"
            )
    left = sites_of(model)
    for site, _ in left:
        whole = None if site.group.model is None else site.group.model()
        if whole is not None and id(whole) not in inside:
            raise RuntimeError(
                f"shira.detach: a tuner is on the {type(whole).__name__} that has this module; detach it there"
            )
        if site.group.off:
            raise RuntimeError("shira.detach: not inside `with tuner.disabled()`, where the model is the base")
    take_off(left)
    for module in modules:
        for handle in module.__dict__.get(_ROOT, ()):
            handle.remove()
        for attribute, (_, required) in module.__dict__.get(_hooks.KEPT, {}).items():
            weight = _model.held(module, attribute)
            if weight is not None:
                weight.requires_grad_(required)
        _ranks.unignore(module)
        for name in (_ROOT, _hooks.KEPT):
            _keep(module, name, None)
    _hooks.stop_watching()


def _keep(module: nn.Module, name: str, content: Any) -> None:
    """Set an attribute of the module; remove it if there is nothing in it."""
    if content:
        setattr(module, name, content)
    elif name in module.__dict__:
        delattr(module, name)


def _set_versions(versions: Iterable[tuple[Tensor, int]]) -> None:
    for weight, version in versions:
        torch._C._autograd._unsafe_set_version_counter((weight,), (version,))


def _stand_in(group: Sequence[_model.Slot], layer: _linears.Layer | None) -> Tensor:
    """Of the shape, dtype and device of the weight as a whole."""
    if layer is not None:
        return layer.stand_in()
    return _sharded.stand_in(group[0].weight) if _shards.is_dtensor(group[0].weight) else group[0].weight


def _whole_indices(weight: Tensor) -> Tensor:
    """As in a file: one granule of all its entries."""
    return torch.zeros(1, dtype=torch.int32, device=_shards.local(weight).device)


def _master_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _identity(tuned: _Tuned) -> dict[str, Any]:
    """What values belong to. A state with another identity is the state of another adapter."""
    return {
        "shape": list(tuned.plan.weight.shape),
        "granule": tuned.plan.granule,
        "indices": hex_word(_granules.fingerprint(tuned.plan.indices.to(torch.int64))),
        "fingerprint": hex_word(tuned.plan.fingerprint),
        **({} if tuned.plan.layer is None else {"delta": True}),
    }
