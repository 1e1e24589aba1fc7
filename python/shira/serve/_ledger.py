"""The ledger of a `Switcher`: the weights that its adapters are for, what is on them, and whether that is still so."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import shira_ops
from shira import _fit, _granules, _live, _model, _places, _shards
from shira._live import SwitchError, Weight
from shira._text import AdapterError
from shira.adapter.adapter import Adapter
from shira.serve._layout import BASE, Layout, Part, State, Way
from shira.serve._streams import Events, mark, wait
from shira.serve._watch import Watch

if TYPE_CHECKING:
    from shira.serve._agreement import Step

# For how many sets of strengths a part remembers what it adds to its weight's fingerprint.
_MOST_DIFFERENCES = 64


class Ledger:
    """The weights that adapters were added for, and what this Switcher has put on them.

    A weight belongs to the Switcher that has adapters on it (`_live.Hold`); a weight without adapters is free for all.
    Whether someone else has written to a weight is told by its version; where that has moved, the content decides, by
    fingerprint.

    Args:
        me: refers to the Switcher. It marks the weights that have its adapters on them.
    """

    def __init__(self, me: weakref.ref[object]) -> None:
        self.me = me
        # By their memory.
        self.weights: dict[object, Weight] = {}
        # What is on the model.
        self.state: State = BASE
        # When the last change of the weights is done, on GPUs.
        self.written: Events = {}
        # Of parameters that FSDP has sharded, by id: its entry, which has the tensor that layers compute with.
        self.gathered: dict[int, Any] = {}

    def wait(self) -> None:
        """Let the caller's streams wait for the last change of the weights."""
        wait(self.written)

    # ---- the weights that adapters are for -------------------------------------------------------------------

    def weight(self, tensor: Tensor) -> Weight | None:
        """The weight in this tensor's memory."""
        return self.weights.get(_model.memory(tensor))

    def take(self, places: Mapping[str, list[tuple[_model.Slot, ...]]], *, verify: bool) -> dict[Weight, str]:
        """The weights in these places, and what an adapter calls each; several may be one (tied) weight in the adapter.

        With `verify`, all of each has been read. Nothing is added to the ledger (`keep`).
        """
        self._refuse_moved(group for groups in places.values() for group in groups)
        taken: dict[Weight, str] = {}
        for name, groups in places.items():
            taken.update(dict.fromkeys([self._take(group, verify) for group in groups], name))
        return taken

    def keep(self, weights: Iterable[Weight]) -> None:
        """Add weights that were taken."""
        self.weights.update((weight.key, weight) for weight in weights)

    def keep_only(self, used: set[Weight]) -> None:
        """Forget all other weights."""
        for key in [key for key, weight in self.weights.items() if weight not in used]:
            del self.weights[key]

    def _refuse_moved(self, groups: Iterable[tuple[_model.Slot, ...]]) -> None:
        """Refuse places whose weight the ledger knows in other memory."""
        known = {(place.module, place.attribute): weight for weight in self.weights.values() for place in weight.places}
        found = [known.get((place.module, place.attribute)) for group in groups for place in group]
        _live.refuse_first([weight for weight in found if weight is not None], Weight.moved)

    def refuse_different(self, where: str, weights: list[Weight]) -> None:
        """Refuse weights that are one in the adapter, unless they have the same content, which must be known."""
        for weight in weights[1:]:
            if weight.base != weights[0].base:
                raise AdapterError(_fit.two_that_differ(where, _places.WHERE, weight.name, weights[0].name))

    def _take(self, places: tuple[_model.Slot, ...], verify: bool) -> Weight:
        weight = self.weight(places[0].weight) or Weight.of(places, self.me, verify)
        self.examine([weight])
        if verify and weight.record.base is None:
            self._read_base(weight)
        return weight

    def compare_base(self, where: str, adapter: Adapter, weights: Mapping[Weight, str]) -> tuple[str, ...]:
        """Compare the content of the base with the base that the adapter was made for, by fingerprint.

        Returns the names of weights whose content differs and may, since all of it is replaced.
        """
        fingerprints = {weight: adapter.weights[name].fingerprint for weight, name in weights.items()}
        wanted = {weight: fingerprint for weight, fingerprint in fingerprints.items() if fingerprint is not None}
        other = [weight for weight, fingerprint in wanted.items() if weight.base != fingerprint]
        wrong = [weight.name for weight in other if adapter.delta or not adapter.weights[weights[weight]].whole]
        if wrong:
            raise AdapterError(_fit.made_for_another(where, wrong, len(wanted)))
        return tuple(weight.name for weight in other)

    # ---- whether anything has happened to them ---------------------------------------------------------------

    def look(self, watch: Watch, verify: bool = True) -> list[Weight]:
        """`examine` the weights unless one quick look at all of them shows that nothing has happened."""
        return [] if watch.undisturbed(self.me) else self.examine(watch.weights, verify)

    def examine(self, weights: list[Weight], verify: bool = True) -> list[Weight]:
        """Refuse weights that were moved, are trained, have another Switcher's adapters or were changed by others.

        Without `verify`, weights that others changed are not refused but returned.
        """
        _live.refuse_first(weights, Weight.place)
        _live.refuse_first(weights, lambda weight: weight.held(self.me))
        for weight in weights if verify else ():
            if weight.changed():
                # Where a version has moved, the content decides.
                if weight.record.base is None or not self._is_right(weight):
                    raise self._foreign(weight)
                weight.note()
        return [weight for weight in weights if weight.changed()]

    def verify(self, layouts: Iterable[Layout], *, full: bool) -> None:
        """Compare the entries of these layouts with what they should be, or with `full` the whole weights; see
        `Switcher.verify`."""
        _live.refuse_first(self.weights.values(), Weight.place)
        self.wait()
        # Weights with adapters of another Switcher are for that one to judge.
        others = {weight for weight in self.weights.values() if weight.held(self.me) is not None}
        wrong: dict[str, None] = {}
        read = dict.fromkeys(self.weights.values() if full else ())
        for layout in layouts:
            wait(layout.ready)
            for weight, part in layout.parts.items():
                if not part.has_base:
                    read[weight] = None
                elif weight not in others and not self._holds(part):
                    wrong[weight.name] = None
        read = {weight: None for weight in read if weight not in others}
        for weight in read:
            if weight.record.base is None:
                self._read_base(weight)
            if not self._is_right(weight):
                wrong[weight.name] = None
        if wrong:
            raise SwitchError(
                f"Switcher: {len(wrong)} weight(s) do not hold {self.state.content()}: {_model.some(wrong)}"
            )
        for weight in read:
            weight.note()

    def _foreign(self, weight: Weight) -> SwitchError:
        advice = (
            "deactivate(verify=False) puts the base's entries back all the same"
            if self.state.strengths
            else "load the base again, or remove the adapters and add those of the new base"
        )
        return SwitchError(
            f"Switcher: {weight.name} was changed by someone else since the Switcher last wrote or read it; "
            f"{self.state.told()}. {advice}"
        )

    # ---- their content ---------------------------------------------------------------------------------------

    def fingerprint(self, weight: Weight) -> int:
        """The fingerprint that the weight should have now."""
        _live.refuse_first([weight], Weight.place)
        self.wait()
        base = self.base_fingerprint(weight)
        part = self.state.part(weight)
        if part is None:
            return base
        strengths = tuple(self.state.strengths[name] for name in part.adapters)
        if strengths not in part.differences:
            if len(part.differences) >= _MOST_DIFFERENCES:
                part.differences.clear()
            with quiet():
                part.differences[strengths] = self._difference(weight, part)
        return (base + part.differences[strengths]) & _granules.WORD

    def base_fingerprint(self, weight: Weight) -> int:
        """The fingerprint of the base, which is read if it is not known."""
        if weight.record.base is None:
            self._read_base(weight)
        assert weight.record.base is not None
        return weight.record.base

    def know(self, weights: Sequence[Weight], about: str, step: Step | None) -> None:
        """Read the base's fingerprint of these weights, where it is not known.

        Of sharded weights the ranks add it up, once they agree on what they add an adapter for (``about``).
        """
        for weight in weights:
            if weight.record.base is None:
                self._read_base(weight)
        if step is None:
            return
        step.agree(about)
        sharded = [weight for weight in weights if weight.box is not None]

        def read() -> list[Tensor]:
            parts = [self.state.part(weight) for weight in sharded]
            return [
                weight.tensor if part is None else part.base_copy() for weight, part in zip(sharded, parts, strict=True)
            ]

        known = [weight.record.whole for weight in sharded]
        found = step.ranks.known_fingerprints([weight.slot.weight for weight in sharded], known, read, step)
        for weight, whole in zip(sharded, found, strict=True):
            weight.record.whole = whole

    def whole_fingerprint(self, slot: _model.Slot, weight: Weight | None, step: Step) -> int:
        """The fingerprint that a sharded weight should have now; added up by all ranks."""
        if weight is None:
            return step.ranks.fingerprints([slot.weight], lambda: [_shards.local(slot.weight)], step)[0]
        _live.refuse_first([weight], Weight.place)
        self.wait()
        part = self.state.part(weight)
        here = weight.tensor
        if part is not None:
            here = self._shown_base(weight, part)
            shira_ops.scatter_(here, part.indices, self.state.expected(part), granule=part.granule)
        return step.ranks.fingerprints([slot.weight], lambda: [here], step)[0]

    def _shown_base(self, weight: Weight, part: Part) -> Tensor:
        """A copy that is shown to be the base."""
        copy = part.base_copy()
        if weight.record.base is not None and _granules.fingerprint(copy) != weight.record.base:
            raise self._foreign(weight)
        return copy

    def _difference(self, weight: Weight, part: Part) -> int:
        """What an active part adds to the base's fingerprint.

        Computed on a copy that is shown to be the base, so that what others may have done to the weight does not count.
        """
        copy = self._shown_base(weight, part)
        before = _granules.fingerprint_at(copy, part.indices, part.granule)
        shira_ops.scatter_(copy, part.indices, self.state.expected(part), granule=part.granule)
        return (_granules.fingerprint_at(copy, part.indices, part.granule) - before) & _granules.WORD

    def _read_base(self, weight: Weight) -> None:
        """Read the base's fingerprint; from a copy, where adapters are on the weight."""
        part = self.state.part(weight)
        with quiet():
            weight.record.base = _granules.fingerprint(weight.tensor if part is None else part.base_copy())

    def _is_right(self, weight: Weight) -> bool:
        """Whether all of the weight is the base plus what is active."""
        part = self.state.part(weight)
        if part is None:
            return weight.fingerprint() == weight.record.base
        return _granules.fingerprint(part.base_copy()) == weight.record.base and self._holds(part)

    def _holds(self, part: Part) -> bool:
        """Whether the weight has the part's entries, bit for bit; for a part that is not active, the base's entries."""
        expected = self.state.expected(part) if self.state.part(part.weight) is part else part.saved
        return _equal(shira_ops.gather(part.weight.tensor.detach(), part.indices, granule=part.granule), expected)

    # ---- after writes ----------------------------------------------------------------------------------------

    def settle(self, way: Way, state: State, changed: Iterable[Weight] = ()) -> None:
        """The weights of a way have been written: note their versions, and what is on the model now.

        Weights that someone else ``changed`` before stay suspect until their content is found to be right.
        """
        self._wrote(way.watch.weights)
        way.watch.left(self.me, state.layout.parts)
        for weight in changed:
            weight.distrust()
        self.written = mark([*way.before.devices, *way.after.devices])
        for layout in (way.before, way.after):
            layout.used.update(self.written)
        self.state = state

    def _wrote(self, weights: Iterable[Weight]) -> None:
        """Have torch refuse a backward pass through what was computed with sharded weights before they were written.

        What autograd has saved is the parameter, or what FSDP had gathered of it, and the ops saw only the local
        tensor.
        """
        saved: list[Tensor] = []
        for weight in weights:
            if weight.box is not None:
                saved.append(weight.slot.weight)
                twin = getattr(self.gathered.get(id(weight.slot.weight)), "_unsharded_param", None)
                saved += [] if twin is None else [twin]
        if saved:
            torch.autograd.graph.increment_version(saved)

    def rebase(self, bases: Mapping[object, int]) -> None:
        """Where no adapter is active: weights, by their memory, hold another base now, with these fingerprints."""
        for key, weight in self.weights.items():
            if key in bases:
                _live.refuse_first([weight], Weight.place)
                weight.record.base = bases[key]
                weight.note()

    def write_back(self, layout: Layout) -> None:
        """Put the base's entries of a layout to wherever its weights are now, whatever is there."""
        targets: list[tuple[Tensor, Part]] = []
        _live.refuse_first(layout.parts, Weight.tuned)
        for weight, part in layout.parts.items():
            places = {id(place.weight): place for place in weight.now() if part.has_base}
            for place in places.values():
                problem = _places.misfit(place, weight.shape, weight.dtype)
                if problem is not None:
                    raise SwitchError(f"Switcher: {place.name} {problem}; {self.state.told()}")
                divided = weight.divided(place)
                if divided is not None:
                    raise SwitchError(f"Switcher: {divided}")
                targets.append((_shards.local(place.weight), part))
        wait(layout.ready)
        try:
            for tensor, part in targets:
                saved, indices = part.saved.to(tensor.device), part.indices.to(tensor.device)
                shira_ops.scatter_(tensor, indices, saved, granule=part.granule)
        except Exception as error:
            raise SwitchError(
                f"Switcher: putting the base's entries back failed, and some may be back already; the same call again "
                f"puts all of them back; {self.state.told()}. Cause: {error}"
            ) from error
        finally:
            torch.clear_autocast_cache()
        self._wrote(layout.parts)
        for weight in layout.parts:
            weight.hold.holder = None
            weight.distrust()
        self.state = BASE
        self.written = mark(tensor.device for tensor, _ in targets)

    # ---- weights that were moved -----------------------------------------------------------------------------

    def refuse_gone(self, model: nn.Module) -> None:
        """Refuse weights of modules that are not in the model any more: what is written there has no effect."""
        gone = _model.gone(model, (place for weight in self.weights.values() for place in weight.places))
        if gone:
            raise SwitchError(
                f"Switcher: the module of {_model.some(gone)} is no longer a part of the model: it was replaced after "
                f"an adapter for it was added; {self.state.told()}. Put it back, or load the base and make a "
                f"new Switcher"
            )

    def moved(self) -> dict[Weight, Weight]:
        """The weights that are in other memory than they were, and what is in their places now.

        Refuses what cannot take their place: the content must be the same.
        """
        moved = [weight for weight in self.weights.values() if weight.moved() is not None]
        _live.refuse_first(moved, lambda weight: weight.held(self.me))
        found = {weight: self._in_its_places(weight) for weight in moved}
        there: dict[object, str] = {}
        for weight in self.weights.values():
            name = there.setdefault(found.get(weight, weight).key, weight.name)
            if name != weight.name:
                raise SwitchError(f"Switcher: {weight.name} and {name} were two weights, and are one now")
        slots = [fresh.slot for fresh in found.values()]
        problem = _places.overlap(slots, besides=set(moved)) or _places.sealed(slots)
        if problem is not None:
            raise SwitchError(f"Switcher: {problem}")
        wrong = [weight.name for weight, fresh in found.items() if not self._has_content_of(weight, fresh)]
        if wrong:
            raise SwitchError(
                f"Switcher: {len(wrong)} weight(s) do not hold {self.state.content()} where they are now: "
                f"{_model.some(wrong)}"
            )
        return found

    def rebind(self, moved: Mapping[Weight, Weight]) -> None:
        """Go on with what `moved` found."""
        for weight, fresh in moved.items():
            weight.rebind(fresh)
        weights = list(self.weights.values())
        self.weights.clear()
        self.keep(weights)

    def _in_its_places(self, weight: Weight) -> Weight:
        places = weight.now()
        for place in places:
            if _model.memory(place.weight) != _model.memory(places[0].weight):
                raise SwitchError(
                    f"Switcher: {places[0].name} and {place.name} were one (tied) weight and are two now; tie them"
                )
        _live.refuse_first([weight], Weight.tuned)
        problem = _places.misfit(places[0], weight.shape, weight.dtype)
        if problem is not None:
            raise SwitchError(f"Switcher: {weight.name} {problem}")
        divided = weight.divided(places[0])
        if divided is not None:
            raise SwitchError(f"Switcher: {divided}")
        return Weight.of(places, self.me, False)

    def _has_content_of(self, weight: Weight, fresh: Weight) -> bool:
        """Whether the memory where a weight is now has the content that the weight should have."""
        part, now = self.state.part(weight), fresh.tensor.detach()
        if part is None:
            return weight.record.base in (None, _granules.fingerprint(now))
        indices = part.indices.to(now.device)
        entries = shira_ops.gather(now, indices, granule=part.granule)
        if not _equal(entries, self.state.expected(part).to(now.device)):
            return False
        base = now.clone()
        shira_ops.scatter_(base, indices, part.saved.to(now.device), granule=part.granule)
        return weight.record.base in (None, _granules.fingerprint(base))


@contextmanager
def quiet() -> Iterator[None]:
    """Weights that require grad may be written inside, and what is made is not an inference tensor, whoever calls."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether all bits are the same."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
