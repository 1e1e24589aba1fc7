"""How one weight trains: what a tuner puts on the module that owns it, the hooks there, and the writes of the weight.

The weight follows its values. Every forward checks that it still does: by identity, memory and version, and by content,
since many writes do not move a version (``p.data.copy_``, numpy, ``vector_to_parameters``). On a CPU a fingerprint of
the values tells, at memory speed. On a GPU the host would have to wait for it, so the values are simply written, once
for the whole model at the start of its forward.

Compilers: the check is Python code, outside of every graph. Where the model itself is compiled, torch runs its hooks
outside. Where the model is traced into the graph of something else, the graph writes the weights itself if it computes
no gradients, and `_came` refuses a gradient that was computed with other values.

Hooks and sites are plain data on modules, and find tensors through these, so that they work in a copied model too.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from types import FrameType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

import shira_ops
from shira import _granules, _linears, _model, _shards
from shira._granules import dtype_name
from shira._model import INDICES_SUFFIX, VALUES_SUFFIX
from shira.train import _layers, _ranks, _sharded
from shira.train._sharded import Sharded

# A module's own dictionary of the sites on it, by attribute.
SITES = "_shira_sites"


@dataclass(eq=False)
class Place:
    """One module that holds the weight; tied weights have several."""

    name: str
    # How its gradient is taken; see `shira.train._layers`.
    rule: str | None = None
    # Whether its own forward has ever run with gradients.
    ran: bool = False
    # The module's class; the class whose forward it runs, and whether that was replaced. The rule is for this forward.
    kind: type | None = None
    runs: tuple[type, bool] | None = None
    # What else of the module the rule was chosen by.
    settings: tuple[Any, ...] = ()


@dataclass(eq=False)
class Group:
    """What the sites of one tuner share."""

    # Inside `SparseTuner.disabled`: the weights hold the base and do not follow their values.
    off: bool = False
    # The model's own forward is running, and has checked the content of all values at its start.
    covered: bool = False
    # An optimizer has stepped inside a backward pass: the next forward checks what that pass did not reach.
    early: bool = False
    # Some optimizer has the values.
    served: bool = False
    sites: list[Site] = field(default_factory=list)
    model: weakref.ref[nn.Module] | None = None
    # Has the tuner go on with what ``fully_shard`` made of the model after it was attached.
    take_over: weakref.WeakMethod[Callable[[], None]] | None = None
    # Gradients of sharded weights that a backward pass under way has made, by the number of the pass.
    pending: dict[int, dict[Site, Tensor]] = field(default_factory=dict)

    def frozen(self) -> bool:
        """Whether none of the tuner's values requires grad; always False in a copied model, which has no tuner."""
        values = [site.own_values for site in self.sites]
        return bool(values) and not any(one is not None and one.requires_grad for one in values)

    def __getstate__(self) -> dict[str, Any]:
        # Copying one module must not copy all others with it.
        return Group().__dict__


class _Written(NamedTuple):
    """The last write of values into a weight. If any of this has changed since, the weight is written again."""

    values: weakref.ref[Tensor]
    weight: weakref.ref[Tensor]
    # Memory and version of both. Assigning to `.data` puts other memory under a parameter and moves no version.
    marks: tuple[int, int, int, int]
    # The fingerprint of the values, if they are on a CPU.
    content: int | None


@dataclass(eq=False)
class Site:
    """How one weight is trained. Plain data, so that a model can be copied and pickled with it."""

    name: str
    attribute: str
    granule: int
    dtype: torch.dtype
    # Whether autograd makes the weight's dense gradient, of which the mask's entries are gathered. Otherwise every
    # layer that uses the weight samples its own gradient.
    dense: bool
    # The base's entries, and the tuner's own copy of their indices. The base must not depend on the buffer with the
    # indices, which others write to: DistributedDataParallel overwrites it, averages of models average it.
    # An overlay never writes the base, and has its fingerprint here.
    saved: Tensor
    indices: Tensor
    group: Group
    places: list[Place]
    allow_unused: bool = False
    # Whether the values are a delta that the layers' outputs get, beside a weight that is not written.
    overlay: bool = False
    # Whether gradients from every place have ever reached the values; until then a step is refused.
    reached: bool = False
    # Whether the ranks have been compared, and train the same entries.
    compared: bool = False
    # Whether a compiled graph of something else has used the weight since the last gradient.
    traced: bool = False
    # The handles of the module hooks. Copied with a module, a handle belongs to the copy.
    handles: list[RemovableHandle | _linears.Kept] = field(default_factory=list)
    # The names of further parameters that are on the module for this weight.
    others: tuple[str, ...] = ()
    # The parameters it was made for; None in a copied model.
    values_ref: weakref.ref[Tensor] | None = None
    weight_ref: weakref.ref[Tensor] | None = None
    # The last write of the values into the weight, if it is known.
    written: _Written | None = None
    # Where ranks hold the weight together. Then `granule`, `saved` and `indices` are those of this rank's part of it,
    # and the values are divided in another way; see `shira.train._sharded`.
    shard: Sharded | None = None

    def __post_init__(self) -> None:
        # Read at every forward.
        self.values_name, self.indices_name = self.attribute + VALUES_SUFFIX, self.attribute + INDICES_SUFFIX

    @property
    def own_weight(self) -> Tensor | None:
        """The weight it was made for; None in a copied model."""
        return None if self.weight_ref is None else self.weight_ref()

    @property
    def own_values(self) -> Tensor | None:
        """The values it was made for; None in a copied model."""
        return None if self.values_ref is None else self.values_ref()

    def tensors(self, owner: nn.Module) -> tuple[Tensor, Tensor, nn.Parameter]:
        """weight, indices and values; refuses a module in which these can no longer be trained or written.

        Of a sharded weight they are its local tensor, the granules in that, and the values of all ranks.
        """
        indices, values = self.trained(owner)
        weight: nn.Parameter | None = _held(owner, self.attribute)
        if weight is None:
            raise self._converted(owner)
        if self.shard is not None:
            if not self.shard.is_holder_of(weight):
                refuse_replaced(self.name)
            return *self.shard.tensors(), values
        if not torch.compiler.is_compiling():
            for name, tensor in ((self.name, weight), (self.name + VALUES_SUFFIX, values)):
                if _shards.is_dtensor(tensor):
                    refuse_replaced(name)
                plain = type(tensor) in (nn.Parameter, Tensor) and not _model.is_partitioned(tensor)
                why = None if plain else _model.foreign(tensor)
                if why is not None:
                    raise RuntimeError(f"SparseTuner: {name} {why}; that happened after the tuner was attached")
        if not weight.is_contiguous():
            raise RuntimeError(
                f"SparseTuner: {self.name} is no longer contiguous, as the tuner found it and as its values are "
                f"written; {_model.stride_advice(self.name, weight)}"
            )
        return weight, indices, values

    def trained(self, owner: nn.Module) -> tuple[Tensor, nn.Parameter]:
        """indices and values; refuses a module in which these can no longer be trained."""
        if "_is_replica" in owner.__dict__:
            raise RuntimeError(
                "SparseTuner: DataParallel runs copies of the model on several devices, which values are not written "
                "into; use DistributedDataParallel, or one device (CUDA_VISIBLE_DEVICES)"
            )
        values, indices = _held(owner, self.values_name), owner._buffers.get(self.indices_name)
        if indices is None or values is None:
            raise self._converted(owner)
        if values.dtype != self.dtype:
            raise RuntimeError(
                f"{self.name}{VALUES_SUFFIX} must stay {dtype_name(self.dtype)}, got {dtype_name(values.dtype)}: the "
                f"model was cast after the tuner was attached; cast it first, or detach the tuner, cast, and attach "
                f"again"
            )
        return indices, values

    def _converted(self, owner: nn.Module) -> RuntimeError:
        return RuntimeError(
            f"SparseTuner: the module of {self.name} was converted into a {type(owner).__name__} of another kind "
            f"with a tuner on it; detach the tuner first (shira.detach(model)), then convert"
        )

    @property
    def idle(self) -> list[str]:
        """The names of places whose part of the gradient is still missing; none if no place ran (gradients were set by
        hand).

        A dense gradient covers every use of the weight, so nothing is missing. An embedding may exist only so that
        others share its weight, as ``shared`` in models like T5: it is not missing if another of them ran.
        """
        looked_up = any(place.ran and place.rule == "embedding" for place in self.places)
        idle = [place.name for place in self.places if not (place.ran or (looked_up and place.rule == "embedding"))]
        return [] if self.dense or len(idle) == len(self.places) else idle

    def note(self, values: Tensor) -> None:
        """Note whether the values have a gradient now."""
        self.reached = self.reached or (values.grad is not None and not self.idle)

    def same(self, weight: Tensor, values: Tensor) -> bool:
        """Whether the weight was written from these values, as far as versions tell."""
        known, weight = self.written, self.identity(weight)
        if known is None or known.values() is not values or known.weight() is not weight:
            return False
        return known.marks == _marks(weight, values)

    def held(self, owner: nn.Module) -> Tensor:
        """The weight that the module has now; of a sharded one, the local tensor."""
        found: Tensor = getattr(owner, self.attribute)
        return found if self.shard is None else self.shard.tensors()[0]

    def identity(self, weight: Tensor) -> Tensor:
        """The parameter that stands for a weight of `tensors`: of a sharded one that is not the local tensor."""
        return weight if self.shard is None else self.shard.stored()

    def settled(self, owner: nn.Module) -> bool:
        """Whether the forward of the whole model is running, and has checked this weight already."""
        if not self.group.covered:
            return False
        found = owner._parameters
        weight, values = found.get(self.attribute), found.get(self.values_name)
        return weight is not None and values is not None and self.same(weight, values)

    def same_content(self, values: Tensor) -> bool | None:
        """Whether the values have the content that was written; None if that is not known."""
        if self.written is None or self.written.content is None:
            return None
        return self.written.content == _granules.fingerprint(values)

    def __getstate__(self) -> dict[str, Any]:
        # A copied model has its own values, which nobody has compared with its weights.
        return {
            **self.__dict__,
            "values_ref": None,
            "weight_ref": None,
            "written": None,
            "traced": False,
            "compared": False,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        look_outside()


@dataclass(eq=False)
class Target:
    """A site and the module it is on, while that lives."""

    site: Site
    owner: weakref.ref[nn.Module]
    # The handles of the hooks of its tensors, which are not copied with a model.
    handles: list[RemovableHandle] = field(default_factory=list)

    @property
    def saved(self) -> Tensor:
        return self.site.saved

    def module(self) -> nn.Module:
        module = self.owner()
        if module is None:
            raise RuntimeError(f"the module that held {self.site.name} no longer exists")
        return module

    def tensors(self) -> tuple[Tensor, Tensor, nn.Parameter]:
        """weight, indices and values; see `Site.tensors`."""
        return self.site.tensors(self.module())

    def trained(self) -> tuple[Tensor, nn.Parameter]:
        """indices and values; see `Site.trained`."""
        return self.site.trained(self.module())


# A site, its weight, indices and values.
Item = tuple[Site, Tensor, Tensor, Tensor]

# The registry: from a values parameter to what it trains, or to None once its tuner is detached. Weak, since an
# optimizer may outlive a tuner, and a model both.
known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# The groups of the tuners that are attached.
groups: weakref.WeakSet[Group] = weakref.WeakSet()


def target_of(parameter: Tensor) -> Target | None:
    """What a parameter trains; None if it is not the values of an attached tuner."""
    found: Target | None = known.get(parameter)
    return found


def is_detached(parameter: Tensor) -> bool:
    """Whether a parameter was the values of a tuner that is now detached."""
    return parameter in known and known[parameter] is None


# ---- putting on and taking off -------------------------------------------------------------------------------


def put(target: Target, holders: Sequence[nn.Module], rules: Sequence[str | None]) -> None:
    """Put the hooks of a site on the modules that hold its weight; its tensors are on the first one already."""
    look_outside()
    site, owner = target.site, holders[0]
    _, values = site.trained(owner)
    weight: nn.Parameter | None = _held(owner, site.attribute)  # of an overlay, whatever the module has
    owner.__dict__.setdefault(SITES, {})[site.attribute] = site
    site.values_ref = weakref.ref(values)
    # torch moves quantized weights by `swap_tensors`, which refuses tensors with weak references.
    site.weight_ref = None if weight is None or site.overlay else weakref.ref(weight)
    known[values] = target
    target.handles.append(values.register_post_accumulate_grad_hook(partial(_came, target)))
    if site.dense and weight is not None:
        weight.requires_grad_(True)
        target.handles.append(weight.register_post_accumulate_grad_hook(partial(_gathered, target)))
    site.handles.append(owner.register_load_state_dict_post_hook(partial(_loaded, site)))
    for module, rule, place in zip(holders, rules, site.places, strict=True):
        elsewhere = None if module is owner else owner
        if not site.overlay:
            site.handles.append(module.register_forward_pre_hook(partial(follow, [(site, elsewhere)], False)))
        if rule is not None:
            place.kind, place.runs = type(module), _layers.runs(module)
            place.settings = _layers.settings(rule, module)
            # Before all other hooks, which may change the output: this one needs the layer's own.
            hook = partial(_lay if site.overlay else _attach, site, elsewhere, rule, place)
            site.handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
            if site.overlay:
                site.handles.append(module.register_forward_pre_hook(_keep_first))
    if site.overlay:
        site.handles.append(owner.register_state_dict_post_hook(partial(_saved, site.values_name)))
    else:
        mark_written(site, values)
    site.group.sites.append(site)
    groups.add(site.group)


def become_sharded(target: Target, shard: Sharded, saved: Tensor, values: nn.Parameter) -> None:
    """Go on with a weight that was sharded with its site on it."""
    site, weight = target.site, shard.stored()
    site.shard, site.saved, site.granule = shard, saved, shard.part.granule
    site.indices = shard.part.indices.to("cpu", copy=True)
    site.values_ref, site.weight_ref = weakref.ref(values), weakref.ref(weight)
    site.written = None
    known[values] = target
    if site.dense:
        target.handles.append(weight.register_post_accumulate_grad_hook(partial(_gathered, target)))


def take_off(placed: Sequence[tuple[Site, nn.Module]]) -> None:
    """Write the base's entries back and remove everything that `put` has put on modules."""
    written = [(site, owner) for site, owner in placed if not site.overlay]
    for model in {id(model): model for site, _ in written if (model := _whole(site)) is not None}.values():
        _sharded.reshard(model)
    for site, owner in written:
        if site.shard is not None and site.shard.is_holder_of(getattr(owner, site.attribute)):
            continue
        weight = getattr(owner, site.attribute)
        why = _model.foreign(weight)
        if why is None and _is_sharded(site):
            why = "was sharded by fully_shard after the tuner was attached"
        if why is not None:
            raise RuntimeError(f"SparseTuner: the base cannot be put back, since {site.name} {why}")
    items = []
    for site, owner in written:
        weight = site.held(owner)
        # The model may have been moved or cast since; then the base has the cast of these entries.
        saved = site.saved.to(device=weight.device, dtype=weight.dtype)
        indices = site.indices.to(weight.device)
        if weight.is_contiguous():
            items.append((site.granule, weight, indices, saved))
            continue
        # Its memory order was changed since, as by model.to(memory_format=torch.channels_last).
        with torch.no_grad():
            whole = weight.detach().contiguous()
            shira_ops.scatter_(whole, indices, saved, granule=site.granule)
            weight.copy_(whole)
    scatter(items)
    for site, owner in placed:
        values = site.own_values
        target = None if values is None else target_of(values)
        if values is not None and target is not None:
            known[values] = None
            for handle in target.handles:
                handle.remove()
        if not site.overlay:
            getattr(owner, site.attribute).requires_grad_(False)
        for each in site.handles:
            each.remove()
        groups.discard(site.group)
        # If `put` has failed, not all of them are there.
        for name in (site.values_name, site.indices_name, *site.others):
            if hasattr(owner, name):
                delattr(owner, name)
        sites = owner.__dict__.get(SITES, {})
        sites.pop(site.attribute, None)
        if not sites:
            owner.__dict__.pop(SITES, None)


def _whole(site: Site) -> nn.Module | None:
    """The model of a sharded weight."""
    return None if site.shard is None or site.group.model is None else site.group.model()


def _is_sharded(site: Site) -> bool:
    """Whether FSDP has taken over the weight; then the module may hold what FSDP gathers for a forward."""
    original, model = site.own_weight, None if site.group.model is None else site.group.model()
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if original is None or model is None or fsdp is None:
        return False
    replaced = not any(weight is original for weight in model.parameters())
    return replaced and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def sites_of(model: nn.Module) -> list[tuple[Site, nn.Module]]:
    """Every site on the model, with the module it is on."""
    return [(site, module) for module in model.modules() for site in module.__dict__.get(SITES, {}).values()]


# ---- hooks of modules and tensors ----------------------------------------------------------------------------


@_model.first
def _attach(
    site: Site,
    owner: nn.Module | None,
    rule: str,
    place: Place,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
) -> Any:
    """The forward hook of a layer that samples; ``owner`` is None where that is the layer itself."""
    if not torch.is_grad_enabled() or site.group.off:
        return None
    _, indices, values = site.tensors(owner or module)
    if not values.requires_grad:
        return None
    _model.check_first("SparseTuner", site.name, module)
    _refuse_other_forward(site, place, rule, module)
    place.ran = True
    input = args[0] if args else next(iter(kwargs.values()))
    if site.shard is not None:
        return site.shard.attach(site, rule, module, output, input)
    return _layers.attach(rule, module, output, values, input, indices, site.granule)


@_model.first
def _lay(
    site: Site,
    owner: nn.Module | None,
    rule: str,
    place: Place,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
) -> Any:
    """The forward hook of a layer under an overlay; ``owner`` is None where the values are on the layer itself."""
    if site.group.off:
        return None
    indices, values = site.trained(owner or module)
    _model.check_first("SparseTuner", site.name, module)
    _refuse_other_forward(site, place, rule, module)
    input = args[0] if args else next(iter(kwargs.values()))
    if torch.is_grad_enabled() and values.requires_grad:
        place.ran = True
        if input.requires_grad and not output.requires_grad:
            raise RuntimeError(
                f"SparseTuner: the {type(module).__name__} of {site.name} computes no gradient of its input, so the "
                f"layers before it would not train; leave them out with exclude="
            )
    return _layers.lay(rule, module, output, values, input, indices, site.granule)


def _keep_first(module: nn.Module, args: tuple[Any, ...]) -> None:
    """The forward pre-hook of a layer under an overlay."""
    if not torch.compiler.is_compiling():
        _model.keep_first(module)


def _refuse_other_forward(site: Site, place: Place, rule: str, module: nn.Module) -> None:
    """Refuse a layer whose forward was replaced after the tuner was attached: its rule may be wrong by now."""
    if _layers.settings(rule, module) != place.settings:
        what = _layers.SETTINGS[rule]
    elif (type(module) is place.kind and "forward" not in module.__dict__) or place.runs == _layers.runs(module):
        return
    else:
        what = "forward"
    raise RuntimeError(
        f"SparseTuner: the {what} of the {type(module).__name__} of {place.name} was replaced after the tuner was "
        f"attached, so it is not known how that uses {site.name}; replace it first and then attach the tuner"
    )


def follow(
    sites: Sequence[tuple[Site, nn.Module | None]], whole: bool, module: nn.Module, args: tuple[Any, ...]
) -> None:
    """The forward pre-hook: write values that were edited outside of an optimizer's step.

    ``whole`` is True for the hook of the model itself, which has all sites; other hooks have the sites of their module.
    """
    if not whole:
        _keep_first(module, args)
    if torch.compiler.is_compiling():
        _follow_in_graph(sites, whole, module)
    elif not whole and all(site.settled(owner or module) for site, owner in sites):
        return
    elif "torch._dynamo" in sys.modules:
        _follow_outside(sites, whole, module)
    else:
        _follow(sites, whole, module)


def uncover(group: Group, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The forward hook of the model itself: its forward is over."""
    if not torch.compiler.is_compiling():
        group.covered = False


def _follow_in_graph(sites: Sequence[tuple[Site, nn.Module | None]], whole: bool, module: nn.Module) -> None:
    """The model is traced into the graph of something else, where nothing can be checked.

    Without gradients the graph itself writes the weights. With gradients it must not, since a write would spoil the
    backward pass of an earlier forward; there `_came` checks the values that a gradient was computed with.
    """
    if torch.compiler.is_exporting():
        if not torch.compiler.is_dynamo_compiling():
            _check_export(sites)
        return
    # Sharded weights are written at every step.
    for site, owner in (one for one in sites if not one[0].overlay and one[0].shard is None):
        if torch.is_grad_enabled():
            site.traced = True
        elif not site.group.off and (site.dense or not whole):  # layers that sample write in their own hook
            weight, indices, values = site.tensors(owner or module)
            shira_ops.foreach_scatter_([weight], [indices], [values.detach().to(weight.dtype)], granule=site.granule)


def _check_export(sites: Sequence[tuple[Site, nn.Module | None]]) -> None:
    """An export takes the weights, so they must hold their values. The module's own tensors are fakes here."""
    with _disable_current_modes():
        for site, _ in sites:
            weight, values = site.own_weight, site.own_values
            if weight is None or values is None or site.group.off or site.overlay:
                continue
            if not site.same(weight, values) or site.same_content(values) is False:
                raise RuntimeError(
                    f"SparseTuner: {site.name}{VALUES_SUFFIX} was changed and is not written yet; call tuner.sync() "
                    f"before torch.export"
                )


def _follow(sites: Sequence[tuple[Site, nn.Module | None]], whole: bool, module: nn.Module) -> None:
    refuse_transforms()
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        if torch.is_grad_enabled() and any(site.trained(owner or module)[1].requires_grad for site, owner in sites):
            raise RuntimeError(
                "SparseTuner: torch.jit.trace cannot record how values train; trace the model under torch.no_grad(), "
                "to compute with it, or detach the tuner first"
            )
        # torch.jit.trace would record the check in its graph.
        tracing = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            _follow(sites, whole, module)
        finally:
            torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
        return
    if whole:
        # A forward that was interrupted, as by Ctrl-C, has not come to its end.
        sites[0][0].group.covered = False
        _take_over(*sites[0])
        _compare_in_engine(sites)
        for _, owner in sites:  # in a compiled model nothing else does
            if owner is not None:
                _model.keep_first(owner)
    items = []
    if whole and torch._C._current_graph_task_id() == -1:
        sites[0][0].group.pending.clear()  # of backward passes that have failed
    for site, owner in sites:
        if site.overlay:
            _check(site, _held(owner or module, site.attribute), site.trained(owner or module)[1], module.training)
            continue
        weight, indices, values = site.tensors(owner or module)
        if _check(site, weight, values, module.training) and not site.group.off:
            items.append((site, weight, indices, values))
    settle(items)
    if whole:
        sites[0][0].group.covered = True


_follow_outside = torch._disable_dynamo(_follow)  # type: ignore[attr-defined]


@cache
def look_outside(*more: FunctionType) -> None:
    """Keep torch from compiling the hooks, and `more` of them, which it runs outside of a compiled model's graph."""
    from torch._dynamo.eval_frame import skip_code

    hooks: tuple[Any, ...] = (follow, uncover, Site.settled, Site.same, Site.identity, _marks, _version)
    for function in (*hooks, *more):
        skip_code(function.__code__)


def _take_over(site: Site, owner: nn.Module | None) -> None:
    """If the weight was replaced, let the tuner see whether ``fully_shard`` did that, which it can go on with."""
    held = None if owner is None else owner._parameters.get(site.attribute)
    if site.shard is not None or site.overlay or held is None or held is site.own_weight:
        return
    take_over = None if site.group.take_over is None else site.group.take_over()
    if take_over is not None:
        take_over()


def _compare_in_engine(sites: Sequence[tuple[Site, nn.Module | None]]) -> None:
    """The steps of a DeepSpeed engine are those of parameters of its own, which no hook of optimizers knows; so what a
    first step compares is compared at a forward."""
    if sites[0][0].compared or _ranks.engine_of(sites[0][0].own_values) is None:
        return
    _ranks.compare_in_engine([
        trained_as(site, owner, values)
        for site, owner in sites
        if owner is not None and (values := site.own_values) is not None
    ])  # fmt: skip
    for site, _ in sites:
        site.compared = site.group.served = True


def trained_as(site: Site, owner: nn.Module, values: Tensor) -> _ranks.Trained:
    """What ranks compare of a weight; ``values`` stands for what a wrapper of the model must know."""
    dense = site.own_weight if site.dense else None
    return _ranks.Trained(site.name, owner, site.granule, site.indices, values, site.saved, dense)


def _check(site: Site, weight: Tensor | None, values: Tensor, training: bool) -> bool:
    """Refuse a forward that would train nothing. Returns whether the weight is the tuner's own, and so is written."""
    learns = torch.is_grad_enabled() and values.requires_grad
    weight = weight if weight is None else site.identity(weight)
    weight_ref = None if site.overlay else site.weight_ref
    for what, now, ref in (("", weight, weight_ref), (VALUES_SUFFIX, values, site.values_ref)):
        if learns and ref is not None and now is not ref() and isinstance(now, nn.Parameter) and not _is_functional():
            refuse_replaced(site.name + what)
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(values).tangent is not None:
        raise RuntimeError(
            f"SparseTuner: {site.name}{VALUES_SUFFIX} has a tangent, and values are written into weights, which "
            f"forward-mode differentiation cannot follow; use reverse mode (torch.autograd.grad)"
        )
    if learns and site.dense and not site.group.off:
        own = site.weight_ref is not None and weight is site.weight_ref()
        if own and site.values_ref is not None and values is not site.values_ref():
            raise RuntimeError(
                f"SparseTuner: a functional_call gave {site.name}{VALUES_SUFFIX} other values that require grad, and "
                f"the dense gradient of {site.name} would go to the model's own; give it values without "
                f'requires_grad, or the weight itself, or use gradient="sampled"'
            )
        if own and weight is not None and not weight.requires_grad:
            weight.requires_grad_(True)  # something froze the whole model, and then only the values were unfrozen
    unfrozen = weight is not None and weight.requires_grad
    if unfrozen and not getattr(weight, "_post_accumulate_grad_hooks", None) and torch.is_grad_enabled():
        raise RuntimeError(
            f"SparseTuner: the dense gradient of {site.name} would train all of it: the model was copied while a tuner "
            f"was attached, or its weights were unfrozen; detach the copy's source first, give them "
            f"requires_grad=False, or make the copy the base again with shira.detach(copy)"
        )
    group = site.group
    if training and torch.is_grad_enabled() and not values.requires_grad and not group.off and group.frozen():
        refuse_frozen(site)
    if group.early and torch.is_grad_enabled():
        group.early = False
        check_reached(group.sites)
    # In a torch.func.functional_call with a weight but no values, the caller's weight is the one to compute with.
    ours = site.weight_ref is None or weight is site.weight_ref()
    return ours or site.values_ref is None or values is not site.values_ref()


def _is_functional() -> bool:
    """Whether a ``functional_call`` is running, which replaces parameters until it returns."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_functional_call" and frame.f_globals.get("__name__") == "torch.nn.utils.stateless":
            return True
        frame = frame.f_back
    return False


def refuse_transforms() -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "SparseTuner: values are written into weights, which torch.func cannot follow; use torch.autograd"
        )


def refuse_replaced(name: str) -> None:
    raise RuntimeError(
        f"SparseTuner: {name} was replaced by another parameter after the tuner was attached, so what the model "
        f"computes with is not what the tuner and its optimizer train. fully_shard, conversions under "
        f"torch.__future__.set_overwrite_module_params_on_conversion and load_state_dict(assign=True) do so; do that "
        f"first and then attach the tuner, or detach it, do that, and attach again. After fully_shard of the "
        f"whole model on a mesh of one dimension the tuner goes on by itself, if the optimizer is made from "
        f"tuner.parameters() then"
    )


def refuse_frozen(site: Site) -> None:
    raise RuntimeError(
        f"SparseTuner: all values ({site.name}{VALUES_SUFFIX} and the rest) are frozen (requires_grad=False), so "
        f"training would change nothing. Something froze the whole model after the tuner was attached, as "
        f"model.requires_grad_(False) and PEFT's get_peft_model do: do that first and then attach the tuner, or give "
        f"the values requires_grad_(True) again. To compute with them frozen, use model.eval() or torch.no_grad()"
    )


def _loaded(site: Site, module: nn.Module, _: Any) -> None:
    """After a state dict was loaded: write the values into the weight, whatever was loaded for either."""
    _, values = site.trained(module)
    if site.shard is None and _shards.is_dtensor(values):
        return  # fully_shard was here, and the tuner has yet to take over what it made
    if site.values_ref is not None and site.values_ref() is not values:
        raise RuntimeError(
            f"SparseTuner: {site.name}{VALUES_SUFFIX} was replaced, so that no optimizer trains it; load into the "
            f"parameter itself (load_state_dict with assign=False)"
        )
    if site.group.off:
        raise RuntimeError("SparseTuner: a state cannot be loaded inside `with tuner.disabled()`; load it after that")
    if not site.overlay:
        write([(site, *site.tensors(module))])


def _saved(name: str, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """After a state dict was made: optimum-quanto's layers save nothing but their own parameters."""
    values = module._parameters.get(name)
    if values is not None:
        state.setdefault(prefix + name, values.detach())


def _gathered(target: Target, weight: Tensor) -> None:
    """The hook of a weight that has just got its dense gradient: keep the mask's entries, and free the rest."""
    grad, weight.grad = weight.grad, None
    _, indices, values = target.tensors()
    if grad is None or not values.requires_grad:
        return
    if target.site.shard is not None:
        target.site.shard.gathered(target.site, grad)
        return
    dense = grad.to_dense() if grad.is_sparse else grad
    at_mask = shira_ops.gather(dense.contiguous(), indices, granule=target.site.granule).to(values.dtype)
    # Through autograd: so it accumulates, and the hooks of the values and of DDP run, as for any parameter.
    try:
        torch.autograd.backward(values, at_mask, create_graph=torch.is_grad_enabled())
    except RuntimeError as error:
        if "mark a variable ready only once" not in str(error):
            raise
        raise RuntimeError(
            f"SparseTuner: DistributedDataParallel(find_unused_parameters=True) takes the values of {target.site.name} "
            f"for unused, since their gradient is gathered from the dense one; leave it out, as with transformers' "
            f"ddp_find_unused_parameters=False, or give static_graph=True"
        ) from error


def _came(target: Target, values: Tensor) -> None:
    """The hook of values that have just got a gradient: if a compiled graph of something else has computed it, refuse
    it unless it was computed with these values."""
    site = target.site
    if not site.traced:
        return
    site.traced = False
    weight, indices, now = target.tensors()
    if now is not values or site.group.off or (site.same(weight, values) and site.same_content(values) is not False):
        return
    with torch.no_grad():
        held = shira_ops.gather(weight, indices, granule=site.granule)
        if not torch.equal(held, values.detach().to(weight.dtype)):
            raise RuntimeError(
                f"SparseTuner: {site.name}{VALUES_SUFFIX} was changed outside of an optimizer's step, and a model that "
                f"is compiled as a part of something else cannot follow that: this gradient is that of the values "
                f"before. Call tuner.sync() after the change, or compile the model itself (model.compile())"
            )
    mark_written(site, values)


# ---- writing -------------------------------------------------------------------------------------------------


def settle(items: Iterable[Item]) -> None:
    """Write the values into weights that do not hold them, and into weights for which that is not known."""
    stale: list[Item] = []
    unsure: list[Item] = []
    for item in items:
        site, weight, _, values = item
        if not site.same(weight, values):
            stale.append(item)
        elif not site.group.covered and site.shard is None:
            content = site.same_content(values)
            if not content:
                (unsure if content is None else stale).append(item)
    if stale:
        write(stale)
    if unsure:
        # Mostly the bits are the same, and a backward pass may be waiting; so this write moves no version, like the
        # writes through `.data` for which it is there.
        with _unsafe_preserve_version_counter(tuple(one[1] for one in unsure if not one[1].is_inference())):
            _write(unsure)


def write(items: Iterable[Item]) -> None:
    """Write values into weights, and note it."""
    items = list(items)
    _write(items)
    for site, weight, _, values in items:
        mark_written(site, values, weight)


def _write(items: Iterable[Item]) -> None:
    items = list(items)
    scatter(
        (site.granule, weight, indices, values.detach().to(weight.dtype))
        for site, weight, indices, values in items
        if site.shard is None
    )
    sharded = [(site, site.shard, values) for site, _, _, values in items if site.shard is not None]
    sizes = [(shard.count, shard.stored().dtype) for _, shard, _ in sharded]
    for run in _sharded.runs([count for count, _ in sizes], [dtype for _, dtype in sizes]):
        wholes = whole_values([(site, values) for site, _, values in sharded[run]])
        scatter(
            entries
            for (site, shard, _), whole in zip(sharded[run], wholes, strict=True)
            for entries in shard.entries(site, whole)
        )


def whole_values(items: Sequence[tuple[Site, Tensor]], master: bool = False) -> list[Tensor]:
    """Of sharded weights, all values: in the weight's dtype, or (``master``) as they are. A collective call."""
    chunks, counts = [], []
    for site, values in items:
        assert site.shard is not None
        chunks.append(_shards.local(values).to(values.dtype if master else site.shard.stored().dtype))
        counts.append(site.shard.count)
    return items[0][0].shard.ranks.join(chunks, counts) if items else []  # type: ignore[union-attr]


def scatter(items: Iterable[tuple[int, Tensor, Tensor, Tensor]]) -> None:
    """Write entries into weights (granule, weight, indices, entries), one call for each device and granule."""
    groups: dict[tuple[torch.device, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for granule, weight, indices, entries in items:
        groups.setdefault((weight.device, granule), []).append((weight, indices, entries))
    with torch.no_grad():
        for (_, granule), group in groups.items():
            weights, indices_list, entries_list = (list(column) for column in zip(*group, strict=True))
            shira_ops.foreach_scatter_(weights, indices_list, entries_list, granule=granule)
    if groups:
        # autocast keeps casts of weights that require grad.
        torch.clear_autocast_cache()


def mark_written(site: Site, values: Tensor, weight: Tensor | None = None) -> None:
    """Note that the weight holds the values as they are now."""
    if weight is None:
        weight = site.own_weight
    if weight is None:
        site.written = None
        return
    weight = site.identity(weight)
    on_cpu = values.device.type == "cpu" and site.shard is None
    content = _granules.fingerprint(values) if on_cpu else None
    site.written = _Written(weakref.ref(values), weakref.ref(weight), _marks(weight, values), content)


def _marks(weight: Tensor, values: Tensor) -> tuple[int, int, int, int]:
    held, kept = _shards.local(weight), _shards.local(values)
    return held.data_ptr(), _version(weight), kept.data_ptr(), _version(values)


def _version(tensor: Tensor) -> int:
    if _shards.is_dtensor(tensor):  # an op may move that of the local tensor alone, or only its own
        return tensor._version + _shards.local(tensor)._version
    return -1 if tensor.is_inference() else tensor._version


def _held(owner: nn.Module, name: str) -> Any:
    """A parameter of a module, also if something else, such as a parametrization, has moved it."""
    found = owner._parameters.get(name)
    return getattr(owner, name, None) if found is None else found


# ---- what gradients reached ----------------------------------------------------------------------------------


def check_reached(sites: Iterable[Site]) -> None:
    """Refuse the first step if a target, or one place of a tied target, got no gradient, which nobody would notice."""
    here = [(site, values) for site in sites if (values := site.own_values) is not None]
    missing: list[Site] = []
    unvisited: list[Site] = []
    frozen: list[Site] = []
    first: list[Site] = []
    gone: list[str] = []
    for site, values in here:
        came, fresh = values.grad is not None, not site.reached
        site.note(values)
        if not came and not values.requires_grad:
            frozen += [site] if fresh else []
        elif not came and _is_gone(site):
            gone.append(site.name)
        elif fresh and not site.reached and not site.allow_unused:
            (unvisited if came else missing).append(site)
        elif fresh and site.reached and not site.dense:
            first.append(site)
    if frozen and len(frozen) == len(here) and frozen[0].group.frozen():
        refuse_frozen(frozen[0])
    if gone:
        raise RuntimeError(
            f"SparseTuner: the module of {_model.some(gone)} is no longer a part of the model: it was replaced after "
            f"the tuner was attached, as resize_token_embeddings does; do that first and then attach the tuner"
        )
    if missing:
        raise RuntimeError(
            f"SparseTuner: no gradient reached {_model.some(site.name for site in missing)}; either there was no "
            f"backward pass, or the loss does not depend on it, or checkpointing with use_reentrant=True got no input "
            f"that requires grad (use_reentrant=False needs none), or the weight is used without its layer, as in "
            f'F.linear(x, layer.weight), which needs gradient="dense". Leave it out with targets=, or, if it is used '
            f"only in some steps, pass allow_unused=True"
        )
    refuse_tied_since(first)
    for site in unvisited:
        tied, idle = _model.some(place.name for place in site.places), _model.some(site.idle)
        raise RuntimeError(
            f"SparseTuner: {tied} are one tied weight, and no forward ran the layer of {idle}: where the weight is "
            f"used without it, as in F.linear(x, lm_head.weight), that use is missing from a sampled gradient. Use "
            f'SparseTuner(..., gradient="dense"), which sees every use; or, if it is not used, or only in some steps, '
            f"pass allow_unused=True"
        )


def refuse_tied_since(sites: Sequence[Site]) -> None:
    """Refuse weights that further modules of the model hold now, whose uses a sampled gradient does not see."""
    for group in {id(site.group): site.group for site in sites}.values():
        model = None if group.model is None else group.model()
        held = {id(site.own_weight): site for site in sites if site.group is group and site.own_weight is not None}
        places: dict[int, dict[tuple[int, str], str]] = {}
        for slot in () if model is None else _model.slots(model).values():
            if id(slot.weight) in held:
                places.setdefault(id(slot.weight), {}).setdefault((id(slot.module), slot.attribute), slot.name)
        for key, found in places.items():
            known = {place.name for place in held[key].places}
            more = [name for name in found.values() if name not in known]
            if len(found) > len(known):
                raise RuntimeError(
                    f"SparseTuner: {_model.some(more)} and {held[key].name} were tied after the tuner was attached, so "
                    f"the gradient of {held[key].name} lacks a part; tie them first and then attach the tuner"
                )


def _is_gone(site: Site) -> bool:
    """Whether the model no longer has the module that the site is on."""
    model = None if site.group.model is None else site.group.model()
    return model is not None and not any(found is site for found, _ in sites_of(model))
