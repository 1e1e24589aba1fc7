"""`Receiver`: takes updates over into a live model's weights, in place, and back."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import shira_ops
from shira import _granules, _live, _model
from shira._granules import WORD, WORD_BYTES, dtype_name, index_dtype
from shira._live import SwitchError
from shira._model import VALUES_SUFFIX
from shira._text import AdapterError, named
from shira.adapter._entry import Entry
from shira.serve.switcher import Switcher
from shira.sync._weights import Weight, by_call, fingerprints, refuse_moved, weights_of
from shira.sync.plan import Plan
from shira.sync.update import SyncError, Update, bits, bits_of, compose, shown_version, version_of

__all__ = ["Receiver"]

_ANEW = "make a new Receiver"


class _Entry(NamedTuple):
    """The entries of one weight: where they are, and what goes there next."""

    indices: Tensor
    values: Tensor
    granule: int


class _Words(NamedTuple):
    """The words that an update changes of one of the publisher's weights, wherever they are here."""

    name: str
    positions: Tensor
    # The words in parts that are here in one piece: whole words where it can be, and single entries where it must.
    part: torch.dtype
    # In which weight, where among the parts of these words (None: all, in their order), and where in the weight.
    places: list[tuple[Weight, Tensor | None, Tensor]]

    def share(self) -> Tensor:
        """What they add to the fingerprint of the publisher's weight, as they are now."""
        count, device = self.positions.numel() * (WORD_BYTES // self.part.itemsize), self.positions.device
        parts = torch.zeros(0, dtype=self.part, device=device)
        for weight, where, indices in self.places:
            here = shira_ops.gather(weight.tensor.view(-1).view(self.part), indices).to(device)
            if where is None:
                parts = here
            else:
                parts = parts if len(parts) else parts.new_zeros(count)
                parts[where] = here
        return _granules.share(parts.view(torch.int64), self.positions)


@dataclass(eq=False)
class _Moves:
    """What a commit swaps: afterwards the values are those from before, so that the same moves lead back."""

    update: Update
    entries: dict[Weight, _Entry]
    # What is swapped in, and the weights' fingerprints on either side; with a plan, a commit finds those afterwards.
    given: dict[Weight, Tensor]
    before: dict[Weight, int]
    after: dict[Weight, int]
    # With a plan: what of the publisher's weights can be compared with their fingerprints.
    words: list[_Words]

    def swap(self, *, check: bool) -> dict[Weight, int]:
        """Swap all entries. With `check`: by how much that changes each weight's fingerprint."""
        changes: list[tuple[list[Weight], Tensor]] = []
        for weights, granule in by_call((weight, entry.granule) for weight, entry in self.entries.items()):
            tensors = [weight.tensor for weight in weights]
            indices = [self.entries[weight].indices for weight in weights]
            values = [self.entries[weight].values for weight in weights]
            if check:
                changes.append((weights, _granules.swap_(tensors, indices, values, granule)))
            else:
                shira_ops.foreach_swap_(tensors, indices, values, granule=granule)
        # Only now: to read one waits for its device.
        return {
            weight: change for weights, found in changes for weight, change in zip(weights, found.tolist(), strict=True)
        }

    def restore(self, *, written: bool) -> None:
        """Put every weight on one side, wherever a swap of them all has stopped: with the update's values, or not."""
        for weight, entry in self.entries.items():
            # Where a weight has the update's values, its own are here. Where both are equal, any side will do.
            given = self.given[weight].to(entry.values.device)
            if torch.equal(bits(entry.values), bits(given)) == written:
                shira_ops.swap_(weight.tensor, entry.indices, entry.values, granule=entry.granule)

    def fingerprint(self, weight: Weight, *, written: bool) -> int:
        """A weight's fingerprint on either side."""
        return self.after[weight] if written else self.before[weight]


class _Torn(NamedTuple):
    """Moves that have begun."""

    moves: _Moves
    # Whether the update was written before they did, and whether Switchers may have been told that it is otherwise.
    written: bool
    told: bool = False


class _State(NamedTuple):
    """The state of a Receiver. It is replaced as a whole, so that an interrupt finds the old one or the new one."""

    # None: with a plan, before the first update, if the weights do not tell.
    version: int | None
    step: int | None = None
    staged: _Moves | None = None
    # The last commit, and the step before it.
    undo: tuple[_Moves, int | None] | None = None
    torn: _Torn | None = None


class Receiver:
    """Takes over, in place, what a `Publisher` finds has changed in a model's weights.

    - **Staged.** `stage` checks an update against the model and brings it to the weights' devices, O(its entries).
      Several may be staged, one after the other: `commit` writes each entry once.
    - **All or nothing.** `commit` swaps the update's entries with the weights', and keeps what was there: an error in
      between takes everything back, and `rollback` undoes the last commit bit for bit.
    - **In order.** An update starts at a version and leads to another; anything that does not start at the Receiver's
      own is refused, so updates that were lost, came twice or were made for other weights cannot be applied.
    - **Checked.** The words that change are compared with those the update was made on, by fingerprint; a weight whose
      version counter moved since the last commit is compared as a whole. `verify` compares all weights.
    - **Under adapters.** Where a `Switcher` has adapters on the model, they are taken off, the base is updated, and
      they are put back with the same strengths: an adapter that overwrites entries still does, one that adds still
      adds, and taking it off gives the new base. This goes for every Switcher on these weights. An `Overlay` goes on
      too, but one that replaces entries must not be in use meanwhile.
    - Storage never moves, as with a Switcher: compiled models and captured graphs stay as they are.
    - Call it between two forward passes; on a GPU the change is ordered by the caller's current streams.
    - **In another layout.** With a `Plan`, updates go where the model has their entries; versions are those of the
      publisher's weights as ever. Of weights that the model has whole, the words that change are compared with the
      update's fingerprints. Of parts of weights (tensor parallelism) no rank alone can compute these: there the version
      must be right, and nobody may have written to the model's weights since.

    Args:
        model: the module whose weights to update; at the first update they must be those the Publisher started from.
        exclude: as for `Publisher`, and the same. A plan has its own.
        plan: where the model has the entries of the publisher's weights, if its layout is another.
        version: with a plan, the publisher's version when the model was loaded. Where the model has all weights whole
            it is computed, and must be this one if one is given. Elsewhere it is taken as it is given; and if none is,
            the first update is taken to start from the model's weights if it starts from those that are here whole.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        exclude: str | None = None,
        plan: Plan | None = None,
        version: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Receiver: model must be a torch.nn.Module, got {type(model).__name__}")
        if plan is not None and not isinstance(plan, Plan):
            raise TypeError(f"Receiver: plan must be a Plan, got {type(plan).__name__}")
        if plan is None and version is not None:
            raise ValueError("Receiver: version is for a plan; without one, the weights tell their version")
        if plan is not None and exclude is not None:
            raise ValueError("Receiver: with a plan, exclude is what was given to Plan.record; leave it out here")
        self.plan = plan
        self.model = _model.unwrap(model)
        for name in _model.slots(self.model):
            if name.endswith(VALUES_SUFFIX):
                raise SyncError(
                    f"Receiver: a SparseTuner trains {name.removesuffix(VALUES_SUFFIX)}; detach it first "
                    f"(shira.detach(model)), or make a Publisher of it"
                )
        with _live.LOCK, torch.no_grad():
            tensors = [slot.weight for slot in _model.slots(self.model, buffers=True).values()]
            with _bare("the first look", tensors):
                self._weights = weights_of("Receiver", self.model, exclude if plan is None else plan.exclude)
                sealed = _model.read_only(weight.slots[0] for weight in self._weights.values())
                if sealed:
                    raise SyncError(f"Receiver: {sealed[0].name} {_model.read_only_advice(sealed[0])}")
                if plan is None:
                    version = version_of(fingerprints(self._weights))
                else:
                    plan.check("Receiver", self._weights)
                    found = plan.versions(self._weights)
                    if version is not None and found and version not in found:
                        raise SyncError(
                            f"Receiver: the weights must be at version {shown_version(version)}, as version= says, and "
                            f"are at {shown_version(found[0])}; load the Publisher's, and record the plan with "
                            f"publisher.shapes"
                        )
                    version = found[0] if version is None and found else version
        self._names = {slot.name: weight for weight in self._weights.values() for slot in weight.slots}
        self._state = _State(version)

    @property
    def version(self) -> int:
        """The version of the weights; see `Update`. With a plan it may not be known before the first update."""
        if self._state.version is None:
            raise SyncError(
                "Receiver: the version is not known before the first update, as the model does not have all weights "
                "whole; say what it was loaded from: Receiver(model, plan=plan, version=publisher.version)"
            )
        return self._state.version

    @property
    def step(self) -> int | None:
        """The step of the update it is at; None before the first one."""
        return self._state.step

    @property
    def staged(self) -> Update | None:
        """What `commit` would write: one update, whatever was staged."""
        moves = self._state.staged
        return None if moves is None else moves.update

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A shallow copy would write into the weights of the first one, which would still have the old version.
        raise TypeError("Receiver: a receiver cannot be copied or pickled; make another one for a copy of the model")

    def __repr__(self) -> str:
        staged = "nothing staged" if self.staged is None else f"staged: {self.staged!r}"
        version = "unknown" if self._state.version is None else shown_version(self._state.version)
        return f"Receiver(step {self.step}, version {version}, {staged})"

    def stage(self, *updates: Update | bytes | str | os.PathLike[str]) -> None:
        """Make updates ready, in their order; they go after what is staged already. Changes no weight.

        Args:
            updates: each an `Update`, its bytes, or the path of its file.

        Raises `SyncError` for an update that does not start where the one before it ends, and `AdapterError` for one
        that is damaged or is about weights that the model does not have. Then nothing new is staged.
        """
        with _live.LOCK, torch.no_grad():
            found = self.staged
            for given in updates:
                update = _read(given)
                at, step = (self._state.version, self.step) if found is None else (found.end, found.step)
                if at is not None and update.start != at:
                    raise SyncError(self._out_of_order(update, at, step, staged=found is not None))
                self._check(update)
                update = self._decoded(update, found)
                found = update if found is None else compose(found, update)
            if found is not None:
                self._state = self._state._replace(staged=self._moves(found))

    def unstage(self) -> None:
        """Forget what is staged."""
        with _live.LOCK:
            self._state = self._state._replace(staged=None)

    def commit(self, *, verify: bool = True) -> None:
        """Write what is staged; the weights have its version then.

        Args:
            verify: compare the words of the weights that change with those the update was made on. This finds what was
                written without moving a version counter (through ``weight.data``, say). On a CPU this takes place in
                the pass that swaps; elsewhere it costs two more passes over these words.

        Raises `SyncError` with every weight as it was, and what was staged still staged. So does an interrupt. Only
        where the adapters of a Switcher cannot be put back afterwards, the update is written and the base stands there
        alone: `version` tells.
        """
        with _live.LOCK, torch.no_grad():
            moves = self._state.staged
            if moves is None:
                raise SyncError("Receiver: nothing is staged; stage an update before commit")
            then = _State(moves.update.end, moves.update.step, undo=(moves, self.step))
            self._apply("commit", moves, then, verify=verify)

    def rollback(self) -> None:
        """Undo the last `commit`, bit for bit. Only the last one can be undone, and what is staged is forgotten.

        Raises `SyncError`, with nothing changed, where there is none or somebody wrote to the weights since.
        """
        with _live.LOCK, torch.no_grad():
            if self._state.undo is None:
                raise SyncError("Receiver: there is no commit to roll back: only the last one is kept, once")
            moves, step = self._state.undo
            self._apply("rollback", moves, _State(moves.update.start, step), verify=True, back=True)

    def verify(self) -> None:
        """Read all weights and compare them with what the updates say they are; `SyncError` names those that differ."""
        with _live.LOCK, torch.no_grad(), _bare("verify", self._tensors()) as switchers:
            refuse_moved("Receiver", self.model, self._weights.values(), _ANEW)
            self._heal(switchers)
            different = [
                name
                for name, weight in self._weights.items()
                if _granules.fingerprint(weight.tensor) != weight.fingerprint
            ]
            if different:
                raise SyncError(f"Receiver: {_model.some(different)} changed since the last commit; {_LOAD}")
            for weight in self._weights.values():
                weight.note()

    # ---- how ---------------------------------------------------------------------------------------------------

    def _tensors(self) -> list[Tensor]:
        return [weight.slots[0].weight for weight in self._weights.values()]

    def _check(self, update: Update) -> None:
        where = f"the update of step {update.step}"
        if self.plan is not None:
            try:
                self.plan.check_entries(update.weights)
            except AdapterError as error:
                raise AdapterError(f"{where}: {error}") from error
            return
        taken: dict[Weight, str] = {}
        for name, entry in update.weights.items():
            weights = {id(found): found for one in (name, *entry.aliases) if (found := self._names.get(one))}
            if not weights:
                raise AdapterError(f"{where}: {named(name)} is not among the weights of the model that are followed")
            if len(weights) > 1:
                names = " and ".join(weight.name for weight in weights.values())
                raise AdapterError(f"{where}: {names} are one (tied) weight at the publisher, and two here")
            (weight,) = weights.values()
            if taken.setdefault(weight, name) != name:
                raise AdapterError(f"{where}: {named(name)} and {named(taken[weight])} are one (tied) weight here")
            tensor = weight.tensor
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise AdapterError(
                    f"{where}: {named(name)} must have shape {list(tensor.shape)} and dtype "
                    f"{dtype_name(tensor.dtype)}, got {list(entry.shape)} and {dtype_name(entry.dtype)}"
                )
            entry.check_indices(f"{where}: weight {named(name)}")
        # The version starts from the names too: it fits only if every weight has the publisher's.
        for weight, name in taken.items():
            if weight.name != name:
                raise AdapterError(f"{where}: {named(name)} is called {named(weight.name)} here")

    def _decoded(self, update: Update, staged: Update | None) -> Update:
        """The update with its values, where a file has differences from the entries that it replaces.

        Of weights that are here in parts, with a plan, it has those parts only.
        """
        if not update.relative:
            return update
        if self._state.torn is not None:
            with _bare("stage", self._tensors()) as switchers:
                self._heal(switchers)
        holders: list[Switcher] = [switcher for switcher in _live.alive(_live.switchers) if switcher.active]

        def base(weight: Weight, indices: Tensor, granule: int) -> Tensor:
            tensor = weight.slots[0].weight
            holder = next((switcher for switcher in holders if switcher.knows([tensor])), None)
            if holder is None:
                return shira_ops.gather(tensor.detach(), indices, granule=granule)
            try:
                found: Tensor = holder.base_entries(tensor, indices, granule)
            except SwitchError as error:
                raise SyncError(f"Receiver: stage refused: {error}") from error
            return found

        def entries(name: str, entry: Entry) -> tuple[Tensor, Tensor | None]:
            if self.plan is None:
                weight = self._names[name]
                indices, granule, here = entry.indices.to(weight.tensor.device), entry.granule, None
                found = base(weight, indices, granule)
            else:
                indices, granule = _granules.refine(entry.indices, entry.granule, 1, entry.numel).to(torch.int64), 1
                found = torch.zeros(entry.nnz, dtype=entry.dtype, device=indices.device)
                here = torch.zeros(entry.nnz, dtype=torch.bool, device=indices.device)
                names = dict.fromkeys((name, *entry.aliases))
                for box in dict.fromkeys(box for one in names for box in self.plan.boxes.get(one, ())):
                    weight = self._names[box.weight]
                    if weight.tensor.dtype != entry.dtype:
                        raise SyncError(
                            f"Receiver: stage refused: {named(name)} is {dtype_name(entry.dtype)} at the publisher "
                            f"and {dtype_name(weight.tensor.dtype)} here, so differences from its entries cannot be "
                            f"added; send its values: update.to_bytes(differences=False)"
                        )
                    where, at = box.find(indices)
                    at, order = at.sort()
                    own = at.to(weight.tensor.device, index_dtype(weight.tensor.numel()))
                    bits(found)[where[order]] = bits(base(weight, own, 1)).to(found.device)
                    here[where] = True
            earlier = None if staged is None else staged.weights.get(name)
            if earlier is not None:
                others, values = earlier.indices.to(found.device), earlier.values.to(found.device)
                _granules.overlay_(found, indices, granule, others, values, earlier.granule, entry.numel)
            return found, here

        return update.decoded("Receiver.stage", entries, self._starts(update, staged))

    def _starts(self, update: Update, staged: Update | None) -> Callable[[str, Entry], bool]:
        """Whether a weight is as a whole what an update starts from that is staged after others: for differences whose
        print is not known. Of parts of weights, with a plan, no rank alone can tell: there the version counts."""
        names = [name for name, printed in update.prints.items() if printed is None]
        found: dict[str, int] = {}
        if names:
            with _bare("stage", self._tensors()) as switchers:
                self._heal(switchers)
                for name in names:
                    if self.plan is None:
                        found[name] = _granules.fingerprint(self._names[name].tensor)
                    elif name in self.plan.whole:
                        found[name] = _granules.fingerprint(self.plan.read(name, self._weights))

        def starts(name: str, entry: Entry) -> bool:
            earlier = None if staged is None else staged.weights.get(name)
            return name not in found or found[name] == (entry if earlier is None else earlier).fingerprint

        return starts

    def _moves(self, update: Update) -> _Moves:
        moves = _Moves(update, {}, {}, {}, {}, [])
        given: Mapping[str, Entry] = update.weights
        if self.plan is None:
            moves.after.update({self._names[name]: after for name, after in update.after.items()})
        else:
            try:
                given = self.plan.entries(update.weights)
            except AdapterError as error:
                raise AdapterError(f"the update of step {update.step}: {error}") from error
            moves.words.extend(
                self._words(self.plan, name, entry) for name, entry in update.weights.items() if name in self.plan.whole
            )
        for name, entry in given.items():
            weight = self._names[name]
            device = weight.tensor.device
            # The values are swapped with the weight's, so they must be nobody else's.
            values = entry.values.to(device, copy=True)
            moves.entries[weight] = _Entry(entry.indices.to(device), values, entry.granule)
            moves.given[weight] = entry.values
            moves.before[weight] = weight.fingerprint if entry.fingerprint is None else entry.fingerprint
        return moves

    # ---- with a plan -------------------------------------------------------------------------------------------

    def _words(self, plan: Plan, name: str, entry: Entry) -> _Words:
        per = WORD_BYTES // entry.dtype.itemsize
        positions = _granules.regranule(entry.indices, entry.granule, per).unique_consecutive()
        starts = (self._names[box.weight].tensor.storage_offset() for box in plan.boxes[name])
        granule = math.gcd(plan.granule(plan.boxes[name], per), entry.numel, *starts)
        parts = _granules.refine(positions, per, granule, entry.numel).to(torch.int64)
        # The last word may be longer than the weight.
        inside = parts[parts < entry.numel // granule]
        home = self._names[plan.boxes[name][0].weight].tensor.device
        places: list[tuple[Weight, Tensor | None, Tensor]] = []
        for weight, where, indices in plan.find(name, inside, granule):
            tensor = self._names[weight].tensor
            rising = bool((indices[1:] > indices[:-1]).all())
            if not rising:  # a layout that transposes
                indices, order = indices.sort()
                where = where[order]
            indices = indices.to(tensor.device, index_dtype(tensor.numel()))
            every = rising and len(where) == len(parts)
            places.append((self._names[weight], None if every else where.to(home), indices))
        return _Words(name, positions.to(home), bits_of(granule * entry.dtype.itemsize), places)

    def _refuse_other_start(self, plan: Plan, update: Update) -> None:
        """The first update of a Receiver that could not know its version."""
        other = [
            name
            for name, entry in update.weights.items()
            if name in plan.whole and _granules.fingerprint(plan.read(name, self._weights)) != entry.fingerprint
        ]
        if other:
            raise SyncError(
                f"Receiver: commit refused: {_model.some(other)} must be what the first update starts from, and has "
                f"other content here; {_LOAD}"
            )

    def _note_after(
        self,
        moves: _Moves,
        differences: dict[Weight, int],
        words: Sequence[_Words],
        before: Sequence[int],
        after: Sequence[int],
    ) -> None:
        """Where a commit with a plan has led to: where the publisher's fingerprints say, or it is refused."""
        for weight, fingerprint in moves.before.items():
            moves.after[weight] = (fingerprint + differences.get(weight, 0)) & WORD
        wrong = []
        for one, old, new in zip(words, before, after, strict=True):
            start = moves.update.weights[one.name].fingerprint or 0
            if (start + new - old) & WORD != moves.update.after[one.name]:
                wrong.append(one.name)
        _refuse("commit", wrong)

    def _apply(self, what: str, moves: _Moves, then: _State, *, verify: bool, back: bool = False) -> None:
        """Swap, all or nothing: the Receiver is at `then` afterwards, or everything is as it was."""
        refuse_moved("Receiver", self.model, self._weights.values(), _ANEW)
        self._refuse_tuned(what)
        self._refuse_overlaid(what, moves)
        with _bare(what, self._tensors()) as switchers:
            self._heal(switchers)
            for weight in self._weights.values():
                known = not weight.touched() or _live.base_of(weight.slots[0].weight) == weight.fingerprint
                if not known and _granules.fingerprint(weight.tensor) != weight.fingerprint:
                    raise SyncError(f"Receiver: {what} refused: {weight.name} was changed by someone else; {_LOAD}")
                weight.note()
            if self.plan is not None and self._state.version is None:
                self._refuse_other_start(self.plan, moves.update)
            # With a plan only a swap that is checked tells what the fingerprints are afterwards.
            learns = self.plan is not None and not back
            words = moves.words if learns and verify else []
            self._state = self._state._replace(torn=_Torn(moves, back))
            try:
                before = _shares(words)
                differences = moves.swap(check=verify or learns)
                if learns:
                    self._note_after(moves, differences, words, before, _shares(words))
                self._refuse_wrong(what, moves, differences, back)
                self._state = self._state._replace(torn=_Torn(moves, back, told=True))
                self._settle(moves, switchers, written=not back)
                self._state = then
            except BaseException as error:
                self._heal(switchers)
                if isinstance(error, SyncError) or not isinstance(error, Exception):
                    raise
                raise SyncError(f"Receiver: {what} failed and nothing has changed. Cause: {error}") from error

    def _refuse_wrong(self, what: str, moves: _Moves, differences: dict[Weight, int], back: bool) -> None:
        wrong = [
            weight.name
            for weight, difference in differences.items()
            if (weight.fingerprint + difference) & WORD != moves.fingerprint(weight, written=not back)
        ]
        _refuse(what, wrong)

    def _refuse_tuned(self, what: str) -> None:
        for weight in self._weights.values():
            for slot in weight.slots:
                if slot.tuned:
                    raise SyncError(
                        f"Receiver: {what} refused: a SparseTuner trains {slot.name}; detach it first "
                        f"(shira.detach(model))"
                    )

    def _refuse_overlaid(self, what: str, moves: _Moves) -> None:
        tensors = [weight.slots[0].weight for weight in moves.entries]
        names = [name for overlay in _live.alive(_live.overlays) for name in overlay.replacing(tensors)]
        if names:
            raise SyncError(
                f"Receiver: {what} refused: an Overlay has {_model.some(map(repr, names))} in use, which replaces "
                f"entries of these weights by their differences from the base as it is; overlay.deactivate() first, "
                f"and activate it again afterwards"
            )

    def _settle(self, moves: _Moves, switchers: Sequence[Switcher], *, written: bool) -> None:
        """The weights are on this side of the moves: note it, and tell the Switchers and all Overlays."""
        for weight in moves.entries:
            weight.fingerprint = moves.fingerprint(weight, written=written)
            weight.note()
        for one in (*switchers, *_live.alive(_live.overlays)):
            one.rebase({weight.slots[0].weight: weight.fingerprint for weight in moves.entries})

    def _heal(self, switchers: Sequence[Switcher]) -> None:
        """Take back moves that began and did not finish, wherever an error or an interrupt hit them."""
        if self._state.torn is not None:
            moves, written, told = self._state.torn
            moves.restore(written=written)
            self._settle(moves, switchers if told else (), written=written)
            self._state = self._state._replace(torn=None)

    def _out_of_order(self, update: Update, at: int, step: int | None, *, staged: bool) -> str:
        mine = "what is staged leads to" if staged else "the weights are at"
        told = f"version {shown_version(at)}" + ("" if step is None else f" (step {step})")
        text = (
            f"Receiver: the update of step {update.step} starts at version {shown_version(update.start)}, and {mine} "
            f"{told}"
        )
        if step is None:
            plan = "" if self.plan is None else ", and the plan be recorded with publisher.shapes"
            return f"{text}: the model must hold the weights that the Publisher started from{plan}"
        if update.step <= step:
            return f"{text}: it is older, or was committed already"
        missing = "is missing" if update.step == step + 2 else "are missing"
        between = f"step {step + 1}" if update.step == step + 2 else f"steps {step + 1} to {update.step - 1}"
        return f"{text}: {between} {missing}" if update.step > step + 1 else f"{text}: it is of other weights"


_LOAD = "load the weights again, and make a new Receiver"


def _refuse(what: str, wrong: Sequence[str]) -> None:
    if wrong:
        raise SyncError(
            f"Receiver: {what} refused and nothing has changed: {_model.some(wrong)} would not become what the "
            f"update says, so somebody wrote to it without moving its version counter; {_LOAD}"
        )


def _read(given: Update | bytes | str | os.PathLike[str]) -> Update:
    if isinstance(given, Update):
        return given
    if isinstance(given, (bytes, bytearray, memoryview)):
        return Update.from_bytes(given)
    if isinstance(given, (str, os.PathLike)):
        return Update.load(given)
    raise TypeError(f"Receiver.stage: an update must be an Update, its bytes or a path, got {type(given).__name__}")


def _shares(words: Sequence[_Words]) -> list[int]:
    """Their shares, waiting for the device once."""
    shares = [one.share() for one in words]
    found: list[int] = torch.stack([share.to(shares[0].device) for share in shares]).tolist() if shares else []
    return found


@contextmanager
def _bare(what: str, tensors: Sequence[Tensor]) -> Iterator[list[Switcher]]:
    """The base within the block, whatever adapters Switchers have on these weights; yields those Switchers."""
    known: list[Switcher] = [switcher for switcher in _live.alive(_live.switchers) if switcher.knows(tensors)]
    active = [(switcher, switcher.active) for switcher in known if switcher.active]
    off: list[tuple[Switcher, dict[str, float]]] = []
    try:
        try:
            for switcher, strengths in active:
                switcher.deactivate()
                off.append((switcher, strengths))
        except SwitchError as error:
            raise SyncError(
                f"Receiver: {what} refused: the adapters on the model cannot be taken off. {error}"
            ) from error
        yield known
    finally:
        for switcher, strengths in reversed(off):
            try:
                switcher.activate(strengths)
            except SwitchError as error:
                raise SyncError(
                    f"Receiver: after {what}, done or refused as a whole, the adapters that were active could "
                    f"not be put back: the model has the base alone. {error}"
                ) from error
