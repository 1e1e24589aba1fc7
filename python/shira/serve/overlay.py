"""`Overlay`: adapters laid over a model whose weights are never written, another one for each sample of a batch.

Here are the public calls, and what is known about the layers that adapters are for; `_laying` has the sums.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shira import _fit, _linears, _live, _model, _places, _shards, _text
from shira._granules import dtype_name
from shira._live import LOCK, SwitchError
from shira._text import AdapterError
from shira.adapter import _file
from shira.adapter.adapter import Adapter
from shira.serve import _agreement, _shelf
from shira.serve._agreement import Caller, Ranks, Step
from shira.serve._laying import EXPERTS, Biases, Current, Delta, Entrance, Group, Hook, Rows, Selection, Strengths
from shira.serve._ledger import quiet
from shira.serve._shelf import Memory, Stored
from shira.serve._spots import (
    Place,
    SharedSpot,
    Spot,
    Spots,
    Watched,
    base_entries,
    compute_dtype,
    deltas_of,
    estimate,
    know,
)  # fmt: skip

__all__ = ["Overlay"]

Which = str | Mapping[str, float] | None
"""What a sample gets: an adapter, several with their strengths, or none."""


@dataclass(eq=False, kw_only=True)
class _Laid(Stored):
    """An adapter that was added."""

    # For each of its weights, by its own name for it, the places in the model.
    spots: dict[str, list[Spot]]
    # Whether its values replace the base's entries, so that what is laid is their differences from this base.
    replaces: bool
    # By module, for its weight and its bias; None while the adapter is not on the device.
    deltas: dict[nn.Module, dict[bool, Delta]] | None = None

    @cached_property
    def all_spots(self) -> list[Spot]:
        return [spot for spots in self.spots.values() for spot in spots]

    @cached_property
    def modules(self) -> list[nn.Module]:
        return list(dict.fromkeys(spot.layer.module for spot in self.all_spots))

    @property
    def weight_names(self) -> list[str]:
        return [spot.name for spot in self.all_spots]

    @cached_property
    def experts(self) -> list[str]:
        """The weights of its layers that are given some of the tokens, in an order of their own."""
        return [name for name in self.weight_names if EXPERTS.search(name)]

    @cached_property
    def shared(self) -> list[SharedSpot]:
        """Those that ranks hold together."""
        return [spot for spot in self.all_spots if isinstance(spot, SharedSpot)]

    def is_elsewhere(self) -> bool:
        """Whether a weight is on another device than what is added to it."""
        if self.deltas is None:
            return False
        return any(spot.device != self.deltas[spot.layer.module][spot.is_bias].values.device for spot in self.all_spots)

    def tensors(self) -> dict[int, int]:
        """The memory that it keeps on the devices: addresses and bytes."""
        found: dict[int, int] = {}
        for deltas in (self.deltas or {}).values():
            for delta in deltas.values():
                found |= {tensor.data_ptr(): tensor.nbytes for tensor in delta.tensors()}
        return found

    @property
    def nbytes(self) -> int:
        return sum(self.tensors().values())


@dataclass(eq=False)
class _Home:
    """Where a layer is in the model, and how to remove its hook."""

    handle: RemovableHandle
    parent: nn.Module | None
    key: str


class Overlay:
    """Adapters laid over a model: each layer's output gets ``alpha * (values - base entries) @ input`` added.

    - **No weight is ever written.** It works on weights that cannot be written, that are shared, or whose bits somebody
      relies on. State dicts stay as they are.
    - **A batch may hold requests for different adapters**: ``using(["style", None, "edges"])``. It costs what unmerged
      LoRA of as many parameters costs; `Switcher` is the way where one adapter serves many tokens.
    - **The result** is that of the weights with the adapters fused, but for roundings. In float32 the difference is at
      most 1e-5 of ``|weights| @ |input|``, the sum of the magnitudes that an output adds up. In bfloat16 and float16 an
      output is rounded twice: as the layer rounds its own, and once after all adapters were added in float32, so it is
      within half a unit in the last place of the base's output plus half a unit of its own from the exact sum. A
      sample without an adapter keeps every bit of the base's output.
    - **Adapters that replace entries** become differences once, at `add`, in float32 (float64 for float64 weights).
      They stay relative to the base, also beside an active `Switcher`: the sum is then base + the Switcher's changes
      + the Overlay's, each as if it was alone on the base.
    - **Layers** are recognised by what they compute: ``nn.Linear``, transformers' ``Conv1D``, ``nn.Embedding``, layers
      of quantized weights; biases of linear layers too, and weights that are replaced as a whole. Adapters with entries
      of anything else are refused. Where a model uses a layer's weight without running the layer, the adapter has no
      effect; a warning names layers that did not run.
    - **Sharded models**: layers of FSDP2 compute with whole weights, so each rank has the whole adapter and selects for
      its own batch. Layers of tensor parallelism (``ColwiseParallel``, ``RowwiseParallel``) add what this rank's part
      of the adapter gives, to partial sums before those are added up; the ranks must select the same, which they
      compare, and it is for inference, not compiled. All ranks call `add` and `verify` together; there is no
      ``budget``.
    - **It trains through**: gradients of inputs are right, also by ``torch.func`` and in forward mode, with one
      restriction: no gradient checkpointing (it runs layers again when other adapters may be selected; `SwitchError`).
    - **Compiled models** (``torch.compile(model, fullgraph=True)``) take other selections without being compiled again,
      as long as the number of samples and of adapters that were added stay. A compiled model knows one selection for
      the whole process, that of the block opened last; otherwise each thread and task has its own blocks. A CUDA graph
      that is captured keeps the selection of its capture.
    - A copy of the model (``copy.deepcopy``) keeps what was active; copy the Overlay to have one for the copy
      (``copy.deepcopy(overlay).model``).

    The layers hold the Overlay by forward hooks. `detach`, or leaving a ``with`` block around it, removes them.

    Args:
        model: any module; it may be compiled, and spread over devices.
        budget: bytes that adapters may keep on the weights' devices (`memory`). When more is needed, the least
            recently used adapters leave, to their files or to host memory; they come back when they are selected.
    """

    def __init__(self, model: nn.Module, *, budget: int | None = None) -> None:
        self.model = _model.unwrap(model)
        self.budget = budget
        self._added: dict[str, _Laid] = {}
        # The adapters on the devices, the least recently used first.
        self._recent: dict[str, None] = {}
        self._watched: dict[Place, Watched] = {}
        self._current = Current()
        self._homes: dict[nn.Module, _Home] = {}
        self._entrances: dict[nn.Module, list[RemovableHandle]] = {}
        # Whether the entrances are there that a list of samples needs.
        self._surveyed = False
        # The ranks that compute with parts of the same layers, once they are known.
        self._partnered: tuple[Ranks | None] | None = None
        self._caller = Caller("Overlay")
        self._ranks()
        _live.overlays.add(self)

    @property
    def budget(self) -> int | None:
        """The bytes that adapters may keep on the weights' devices, or None. A change counts from the next call."""
        return self._budget

    @budget.setter
    def budget(self, budget: int | None) -> None:
        if budget is not None and budget < 0:
            raise ValueError(f"Overlay: budget must be a number of bytes or None, got {budget}")
        self._budget = budget

    @property
    def active(self) -> Strengths | list[Strengths]:
        """The active adapters and their strengths; within ``using([...])`` a list of such, one for each sample."""
        selection = self._current.now()
        if selection is None:
            return {}
        given = [dict(one) for one in selection.given]
        return given if selection.listed else given[0]

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The added adapters by name, in the order in which they were added; those with a file are read again."""
        with LOCK:
            return {name: laid.read() for name, laid in self._added.items()}

    def add(
        self,
        name: str,
        adapter: str | os.PathLike[str] | Adapter,
        *,
        verify: bool = True,
        check_finite: bool = True,
        rename: _text.Rename = None,
    ) -> None:
        """Make an adapter ready under a name; refuses one that was made for another base. Only reads the weights.

        Args:
            name: what to call it.
            adapter: an `Adapter`, whose tensors must not change while it is in use, or the path of its file. The file
                is read now, and again if the adapter had to leave for lack of room; then it must still be the same.
            verify: compare the base's content by fingerprint. The first adapter for a weight costs one read of that
                weight; the result is kept. Without it, only names, shapes and dtypes must fit.
            check_finite: refuse values with NaN or infinity among them.
            rename: what the model calls the adapter's weights, as in `Switcher.add`.

        Raises `AdapterError` if it does not fit the model, has entries of weights that nothing can be laid over, or
        needs more than the budget; and `SwitchError` if someone else has changed the base since. Nothing is added then.
        """
        with self._together(self._ranks(), "add", name, verify=verify) as step:
            given = _shelf.given(name, adapter, check_finite=check_finite)
            with LOCK, quiet():
                self._add(name, given, verify, rename, step)

    def _add(self, name: str, given: _shelf.Given, verify: bool, rename: _text.Rename, step: Step | None) -> None:
        if name in self._added:
            raise AdapterError(f"an adapter {name!r} was already added; remove it first")
        laid, watched = self._find(name, given, verify, rename, step)
        self._check([laid])
        needed = estimate(given.adapter)
        if self._budget is not None and laid.shared:
            raise AdapterError(
                f"{given.where} changes {laid.shared[0].name}, which ranks hold together, and there an Overlay takes "
                f"no budget: what an adapter adds is computed by all ranks, when it is added"
            )
        if self._budget is not None and needed > self._budget:
            raise AdapterError(f"{given.where} needs {needed:,} bytes, more than the budget of {self._budget:,}")
        if self._make_room(needed, keep=self._in_use()):
            bases = base_entries(given.adapter, laid.spots, step) if step is not None else {}
            laid.deltas = deltas_of(given.adapter, laid.spots, bases)
        # From here on nothing fails.
        self._watched |= watched
        self._added[name] = laid
        self._partnered = None
        self._arrived(laid)

    def remove(self, name: str) -> None:
        """Forget an adapter. If it is active it is taken off; others that are active with it stay."""
        with LOCK, quiet():
            laid = _shelf.known(self._added, name)
            if any(name in block.selection.names for block in self._current.blocks):
                raise SwitchError(
                    f"Overlay: {name!r} is in use by an open using() block; remove it when that has ended"
                )
            del self._added[name]
            self._recent.pop(name, None)
            self._partnered = None
            laid.deltas = None
            active = self._current.active
            if active is not None and name in active.mentioned:
                rest = [{other: alpha for other, alpha in one.items() if other != name} for one in active.given]
                self._current.active = Selection(rest) if any(rest) else None
            used = {spot.place for other in self._added.values() for spot in other.all_spots}
            self._watched = {place: watched for place, watched in self._watched.items() if place in used}
            self._regroup(laid.modules)

    def activate(self, which: str | Mapping[str, float], alpha: float | None = None) -> None:
        """Lay one adapter, or several at once, over every sample, in place of what was active.

        Within a block of `using`, until its end.

        Args:
            which: a name; or names with their strengths, for adapters that are summed.
            alpha: the strength of a single adapter; None is the adapter's own.
        """
        with LOCK, quiet(), self._together(self._partners(), "activate", which, alpha=alpha):
            if isinstance(which, Mapping) and not which and alpha is None:
                raise ValueError("name at least one adapter; deactivate() gives the base")
            self._current.select(self._select(which, alpha))

    def deactivate(self) -> None:
        """The base for every sample."""
        with LOCK, self._together(self._partners(), "deactivate"):
            self._current.select(None)

    @contextmanager
    def using(self, which: Which | Sequence[Which], alpha: float | None = None) -> Iterator[Overlay]:
        """Select adapters within a ``with`` block; afterwards what was active before is active again.

        Blocks nest, and each thread, task and generator has its own: generators that wait at a yield inside a block may
        take turns. A forward pass in another thread or task than the block's, such as one that a streamer of tokens
        starts, does not see it, and warns once.

        Args:
            which: a name, a mapping of names to strengths, or None (the base) for every sample; or a list of these, one
                for each sample of the batch. The batch is the first dimension of the model's first argument (or of
                ``input_ids`` and the like), and may hold every sample several times in a row, as ``generate`` makes it
                for beams and ``num_return_sequences``. Where two batches are put one behind the other, as for
                classifier-free guidance, list the samples of both.
            alpha: the strength of a single adapter.

        Inside a forward pass with a list, a layer that gets rows of which it is not known to which sample they belong
        raises `SwitchError`: those of position embeddings that all samples share, for instance.
        """
        with LOCK, quiet():
            with self._together(self._partners(), "using", which, alpha=alpha):
                selection = self._select(which, alpha) or Selection([{}])
            block = self._current.enter(selection)
        try:
            yield self
        finally:
            with LOCK:
                self._current.leave(block)

    def verify(self) -> None:
        """Read all weights that adapters were added for; raise `SwitchError`, naming them, unless they are the base.

        Changes that move version counters are noticed whenever adapters are selected. This finds the others too: writes
        through ``weight.data`` or by another process. What a `Switcher` has put on the weights counts as unchanged.
        """
        with LOCK, quiet(), self._together(self._ranks(), "verify"):
            self._refuse_gone()
            wrong = [watched.spot.name for watched in dict.fromkeys(self._watched.values()) if not watched.holds()]
            if wrong:
                raise SwitchError(
                    f"Overlay: {len(wrong)} weight(s) are not what they were when adapters for them were added: "
                    f"{_model.some(wrong)}"
                )

    def replacing(self, tensors: Iterable[Tensor]) -> list[str]:
        """The adapters in use, in whatever thread, whose differences would be wrong if these weights became others:
        those that replace entries of them."""
        memories = {_model.memory(tensor) for tensor in tensors}

        def is_there(spot: Spot) -> bool:
            tensor = spot.parameter()
            return tensor is not None and _model.memory(tensor) in memories

        with LOCK:
            used = [self._added[name] for name in dict.fromkeys(self._in_use())]
            return [laid.name for laid in used if laid.replaces and any(map(is_there, laid.all_spots))]

    def memory(self) -> dict[str, Memory]:
        """The bytes that each adapter keeps, by name."""
        with LOCK:
            found = {}
            for name, laid in self._added.items():
                there = laid.tensors()
                entries = [] if laid.adapter is None else laid.adapter.weights.values()
                besides = {t.data_ptr(): t.nbytes for entry in entries for t in (entry.indices, entry.values)}
                host = sum(nbytes for pointer, nbytes in besides.items() if pointer not in there)
                found[name] = Memory(laid.nbytes, host, laid.on_disk)
            return found

    def detach(self) -> None:
        """Remove the hooks, and forget all adapters."""
        with LOCK:
            handles = [home.handle for home in self._homes.values()]
            for handle in [*handles, *(handle for pair in self._entrances.values() for handle in pair)]:
                handle.remove()
            for known in (self._homes, self._entrances, self._added, self._recent, self._watched, self._current.hooks):
                known.clear()
            self._current.active = None
            for block in self._current.blocks:
                block.selection = Selection([{}])
            self._current.share()

    def __enter__(self) -> Overlay:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Overlay:
        """An Overlay of a copy of the model; both share the adapters, which never change."""
        new = memo[id(self)] = object.__new__(type(self))
        with LOCK:
            memo |= {id(laid.adapter): laid.adapter for laid in self._added.values() if laid.adapter is not None}
            new.__dict__.update(copy.deepcopy(self.__dict__, memo))
            for watched in new._watched.values():
                watched.distrust()
        _live.overlays.add(new)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._current.__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return f"Overlay(adapters={list(self._added)}, active={self.active})"

    # ---- sharded models ------------------------------------------------------------------------------------------

    def _ranks(self) -> Ranks | None:
        """The ranks that hold the model together, if it is sharded."""
        _shards.reshard(_shards.fsdp_modules(self.model))
        return self._caller.ranks(_agreement.meshes_of(self.model.parameters()))

    def _partners(self) -> Ranks | None:
        """The ranks that compute with parts of the same layers, and must select the same; None where none do."""
        if self._partnered is None:
            divisions = (spot.division for laid in self._added.values() for spot in laid.shared)
            meshes = [division[0] for division in divisions if division is not None]
            self._partnered = (self._caller.ranks(meshes),)
        return self._partnered[0]

    def _together(
        self, ranks: Ranks | None, call: str, *arguments: object, **options: object
    ) -> AbstractContextManager[Step | None]:
        """A call that these ranks make together, or none."""
        if ranks is None:
            return nullcontext()
        added, block, before = set(self._added), self._current.block(), self._current.now()

        def undo() -> None:
            for name in self._added.keys() - added:
                self.remove(name)
            if self._current.block() is block and self._current.now() is not before:
                self._current.select(before)

        def state() -> str:
            active = self.active
            return f"active is {active}" if active else "no adapter is active"

        return ranks.together(self._caller, _agreement.call(call, arguments, options), lambda: None, state, undo)

    # ---- selections ----------------------------------------------------------------------------------------------

    def _select(self, which: Which | Sequence[Which], alpha: float | None) -> Selection | None:
        """The selection that a user asks for, with its adapters on the devices. Refuses before anything changes."""
        listed = not isinstance(which, (str, Mapping)) and which is not None
        if listed:
            if not isinstance(which, (list, tuple)):
                raise TypeError(
                    f"give an adapter's name, a mapping of names to strengths, None, or a list of these, one for each "
                    f"sample; got {type(which).__name__}"
                )
            if alpha is not None:
                raise ValueError("alpha is for a single adapter; give each sample a mapping of names to strengths")
            if not which:
                raise ValueError("name an adapter or None for each sample of the batch, got an empty list")
            samples = [self._strengths(one) for one in which]
        else:
            assert which is None or isinstance(which, (str, Mapping))
            samples = [self._strengths(which, alpha)]
        for sample in samples:
            _shelf.allow(self._added, sample)
        selection = Selection(samples, listed=listed)
        if not selection.listed and not selection.mentioned:
            return None
        self._settle([name for name in self._added if name in selection.names])
        if selection.count > 1:
            self._refuse_order(selection)
        return self._current.ready(selection)

    def _strengths(self, which: Which, alpha: float | None = None) -> Strengths:
        return {} if which is None else _shelf.strengths(self._added, which, alpha)

    def _refuse_order(self, selection: Selection) -> None:
        """Refuse models and layers in which the rows of a sample are not where they are looked for."""
        if not self._surveyed:
            for name, module in self.model.named_modules():
                if getattr(module, "batch_first", True) is False:
                    raise SwitchError(
                        f"Overlay: {name or 'the model'} is a {type(module).__name__} with batch_first=False, so the "
                        f"batch may be the second dimension here; select the same adapters for every sample"
                    )
            self._install_entrances()
            self._surveyed = True
        for name in selection.names:
            experts = self._added[name].experts
            if experts:
                raise SwitchError(
                    f"Overlay: {name!r} changes {_model.some(experts, 2)}, which get some of the tokens in an order of "
                    f"their own; select the same adapters for every sample, or leave the experts out of the adapter"
                )

    # ---- adapters and where they are -------------------------------------------------------------------------------

    def _find(
        self, name: str, given: _shelf.Given, verify: bool, rename: _text.Rename, step: Step | None
    ) -> tuple[_Laid, dict[Place, Watched]]:
        """Find an adapter's weights in the model, and compare the base; refuses what does not fit."""
        base = Spots(self.model, self._watched)
        weights = _fit.renamed(given.adapter.weights, rename)
        advice = (lambda rule: f"rename={rule!r}") if rename is None else None
        places = _fit.places(given.where, weights, base, where=_places.WHERE, kind="model", advice=advice)
        spots: dict[str, list[Spot]] = {}
        for own, found in zip(given.adapter.weights, places.values(), strict=True):
            spots[own] = [other for spot in found for other in base.sharing(spot)]
            for spot in spots[own]:
                attribute = "bias" if spot.is_bias else spot.layer.attribute
                if attribute + _model.VALUES_SUFFIX in spot.layer.module._parameters:
                    raise SwitchError(
                        f"Overlay: {spot.name} is being tuned by a SparseTuner; detach it first (shira.detach(model))"
                    )
            dtype = dtype_name(given.adapter.weights[own].dtype)
            if dtype not in _file.ARITHMETIC:
                raise AdapterError(
                    f"{given.where}: {spots[own][0].name} has entries of {dtype}, which have no difference in float32"
                )
        if step is not None:
            names = (spot.name for several in places.values() for spot in several)
            read = [spot for several in places.values() if verify or len(several) > 1 for spot in several]
            know(read, _shelf.content(given.adapter, names), step)
        # What is replaced as a whole may be anything at strength 1; copies of a tied weight must be alike in any case.
        anything = _fit.indifferent(weights, given.adapter.delta, 1.0)
        unread = anything if verify else weights.keys()
        _fit.check_content(given.where, weights, places, where=_places.WHERE, kind="model", anything=unread)
        elsewhere = [
            spot.name
            for key in (anything if verify else ())
            for spot in places[key]
            if weights[key].fingerprint not in (None, spot.fingerprint())
        ]
        laid = _Laid(
            name=name,
            alpha=given.alpha,
            adapter=given.adapter,
            file=given.file,
            stamp=given.stamp,
            elsewhere=tuple(elsewhere),
            spots=spots,
            replaces=not given.adapter.delta,
        )
        watched: dict[Place, Watched] = {}
        first: dict[object, Watched] = {}
        for spot in laid.all_spots:
            known = self._watched.get(spot.place) or first.get(spot.one) or Watched(spot, None)
            watched[spot.place] = first[spot.one] = known
            if isinstance(spot, SharedSpot) and spot.whole is not None:
                known.whole = spot.whole
            if verify and known.fingerprint is None and not known.changed():
                known.fingerprint = spot.own()
        return laid, watched

    def _settle(self, names: Sequence[str]) -> None:
        """Bring adapters to the devices, on the base that they were added for."""
        settled = [self._added[name] for name in names]
        changed = self._check(settled)
        self._refuse_replaced(dict.fromkeys(module for laid in settled for module in laid.modules))
        for name, laid in zip(names, settled, strict=True):
            if changed and laid.shared and laid.is_elsewhere():
                raise SwitchError(
                    f"Overlay: {laid.shared[0].name} was moved to another device since {name!r} was added, and ranks "
                    f"hold it together; remove the adapter and add it again, on all ranks"
                )
            if changed and laid.is_elsewhere():
                self._leave(name)  # the model was moved
            if laid.deltas is None:
                adapter = laid.read()
                needed = estimate(adapter)
                if not self._make_room(needed, keep=[*self._in_use(), *names]):
                    raise SwitchError(
                        f"Overlay: {name!r} would need {needed:,} bytes on the device beside what is in use, and the "
                        f"budget is {self._budget:,}: set overlay.budget to more"
                    )
                laid.deltas, laid.adapter = deltas_of(adapter, laid.spots, {}), adapter
                self._arrived(laid)
            self._recent[name] = self._recent.pop(name, None)

    def _arrived(self, laid: _Laid) -> None:
        if laid.deltas is not None:
            self._recent[laid.name] = self._recent.pop(laid.name, None)
        if laid.file is not None:
            laid.adapter = None  # it can be read again
        self._regroup(laid.modules)

    def _leave(self, name: str) -> None:
        laid = self._added[name]
        laid.deltas = None
        self._recent.pop(name, None)
        self._regroup(laid.modules)

    def _in_use(self) -> list[str]:
        return [name for selection in self._current.selections() for name in selection.names]

    def _make_room(self, nbytes: int, keep: Iterable[str]) -> bool:
        """Let adapters leave until there is room for this many bytes more. Returns whether there is; if not, none has
        left."""
        if self._budget is None:
            return True
        kept = set(keep)
        sizes = {name: self._added[name].nbytes for name in self._recent}
        excess = sum(sizes.values()) + nbytes - self._budget
        if excess > sum(size for name, size in sizes.items() if name not in kept):
            return False
        for name, size in sizes.items():
            if excess > 0 and name not in kept:
                self._leave(name)
                excess -= size
        return True

    # ---- the base ----------------------------------------------------------------------------------------------------

    def _check(self, adapters: Iterable[_Laid]) -> bool:
        """Refuse weights that someone has changed since adapters were added for them.

        Returns whether anything has happened to them, such as a move to another device.
        """
        there = (self._watched.get(spot.place) for laid in adapters for spot in laid.all_spots)
        changed = [watched.refuse_changed() for watched in dict.fromkeys(there) if watched is not None]
        return any(changed)

    def _refuse_replaced(self, modules: Iterable[nn.Module]) -> None:
        """Refuse layers that are not in the model any more."""
        for module in modules:
            home = self._homes.get(module)
            if home is not None and home.parent is not None and home.parent._modules.get(home.key) is not module:
                self._refuse_gone()  # or they were wrapped
                break

    def _refuse_gone(self) -> None:
        there = set(self.model.modules())
        gone = [hook.name for module, hook in self._current.hooks.items() if module not in there]
        if gone:
            raise SwitchError(
                f"Overlay: the module of {_model.some(gone)} is no longer a part of the model: it was replaced after "
                f"an adapter for it was added; put it back, or make a new Overlay"
            )

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def _regroup(self, modules: Iterable[nn.Module]) -> None:
        """Make the groups of these layers from the adapters that are on the devices."""
        spots = [spot for laid in self._added.values() for spot in laid.all_spots]
        layers = {spot.layer.module: spot.layer for spot in spots}
        divided = {spot.layer.module for spot in spots if spot.division is not None}
        divisions = {spot.layer.module: spot.division for spot in spots if not spot.is_bias}
        for module in modules:
            layer = layers.get(module)
            if layer is None:
                if module in self._homes:
                    self._homes.pop(module).handle.remove()
                    del self._current.hooks[module]
                continue
            if module not in self._homes:
                self._install(layer)
                self._surveyed = False
            hook = self._current.hooks[module]
            hook.groups, hook.biased = self._groups(layer)
            hook.divided, hook.division = module in divided, divisions.get(module)
        self._current.regrouped()
        self._current.share()

    def _groups(self, layer: _linears.Layer) -> tuple[list[Group], bool]:
        """The groups of a layer's weight and of its bias, and whether there is one of its bias."""
        kinds: dict[tuple[bool, int], dict[str, Delta]] = {}
        for name, laid in self._added.items():
            for bias, delta in ((laid.deltas or {}).get(layer.module) or {}).items():
                kinds.setdefault((bias, delta.granule), {})[name] = delta
        compute = compute_dtype(layer.dtype)
        kind = Rows if layer.kind == _linears.EMBEDDING else Group
        weights = [kind(deltas, layer.transposed, compute) for (bias, _), deltas in kinds.items() if not bias]
        biases = [Biases(deltas, layer.transposed, compute) for (bias, _), deltas in kinds.items() if bias]
        return [*weights, *biases], bool(biases)

    def _install(self, layer: _linears.Layer) -> None:
        hook = self._current.hooks[layer.module] = Hook(self._current, layer)
        # Before all other hooks: they see what the layer would compute if the adapters were in its weight.
        handle = layer.module.register_forward_hook(hook, with_kwargs=True, prepend=True)
        where = ((p, key) for p in self.model.modules() for key, child in p._modules.items() if child is layer.module)
        parent, key = next(where, (None, ""))
        self._homes[layer.module] = _Home(handle, parent, key)
        self._enter(self.model)

    def _install_entrances(self) -> None:
        """Hooks on the modules that may be called from outside: all around the layers, but for members of lists."""
        names = {name for name, module in self.model.named_modules(remove_duplicate=False) if module in self._homes}
        around = {""}
        for name in names:
            parts = name.split(".")
            around |= {".".join(parts[:end]) for end in range(1, len(parts)) if not any(map(str.isdigit, parts[:end]))}
        for name in around:
            self._enter(self.model.get_submodule(name))

    def _enter(self, module: nn.Module) -> None:
        if module not in self._entrances:
            entrance = Entrance(self._current, whole=module is self.model)
            self._entrances[module] = [
                module.register_forward_pre_hook(entrance.before, with_kwargs=True, prepend=True),
                module.register_forward_hook(entrance.after, with_kwargs=True, always_call=True),
            ]
