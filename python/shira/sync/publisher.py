"""`Publisher`: what has changed in a model's weights since the last call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import shira_ops
from shira import _granules, _live, _model
from shira._granules import WORD, index_dtype
from shira.adapter._entry import Entry
from shira.sync._weights import Weight, by_call, fingerprints, refuse_added, refuse_moved, weights_of
from shira.sync.update import SyncError, Update, bits, shown_version, version_of
from shira.train.tuner import SparseTuner

__all__ = ["Publisher"]

# Indices, values, their granule, the weight's fingerprint now, and the entries before, where they are known.
_Change = tuple[Tensor, Tensor, int, int, Tensor | None]
_ANEW = "make a new Publisher, whose receivers start from a copy of the model"


@dataclass(eq=False)
class _Sent:
    """A weight whose changing entries are known: where they are, and what was last sent for them."""

    indices: Tensor
    values: Tensor
    granule: int
    # What the words that they touch added to the weight's fingerprint.
    share: int


class Publisher:
    """Finds what has changed in a model's weights since the last call, as an `Update`.

    From a **model**, whatever trains it: a copy of every weight is kept (the snapshot), and `publish` compares both,
    bit by bit, and brings the copy up to date in the same pass (`shira_ops.diff_`), as fast as memory is read.
    From a **SparseTuner**, whose entries are known: there is no copy of the model, and `publish` looks at these entries
    alone. What else may change then (persistent buffers, parameters that were unfrozen) is compared as above; weights
    that are frozen must stay as they are, and one that was written to is refused.

    Entries whose bits did not change are not sent: in bfloat16 that is almost all of them after one step. Adapters that
    a `Switcher` has on the model are in its weights and are sent too; inside ``switcher.disabled()`` they are not.

    Call it between two steps. A receiver must start from the same weights: both sides compute the first `version` from
    them, so nothing has to be exchanged for that.

    Args:
        source: the model, or the tuner on it.
        granule: entries that are sent together where one of them changed; 1 sends the fewest bytes. It must divide the
            number of entries of every weight. A tuner's entries are sent one by one.
        snapshot: the device to keep the copy on, such as ``"cpu"`` where an accelerator has no room for it; each
            weight's own unless given.
        exclude: a regular expression; weights whose names it is found in are left out, here and at the receivers.
    """

    def __init__(
        self,
        source: nn.Module | SparseTuner,
        *,
        granule: int = 1,
        snapshot: str | torch.device | None = None,
        exclude: str | None = None,
    ) -> None:
        self._tuner = source if isinstance(source, SparseTuner) else None
        if self._tuner is None and not isinstance(source, nn.Module):
            raise TypeError(
                f"Publisher: source must be a torch.nn.Module or a SparseTuner, got {type(source).__name__}"
            )
        if self._tuner is not None and self._tuner.overlay:
            raise ValueError(
                "Publisher: a tuner with overlay=True writes no weights, so there is nothing to publish; send its "
                "adapter, tuner.adapter(), to an Overlay"
            )
        if type(granule) is not int or granule < 1:
            raise ValueError(f"Publisher: granule must be a whole number of at least 1, got {granule!r}")
        self.model = _model.unwrap(self._tuner.model if self._tuner is not None else source)  # type: ignore[arg-type]
        self._device = None if snapshot is None else torch.device(snapshot)
        self._granule, self._exclude = granule, exclude
        if self._device is not None and self._device.type == "meta":
            raise ValueError("Publisher: snapshot must be a device that keeps content, got 'meta'")
        self.step = 0
        # The fingerprints before a `publish` that began and was interrupted.
        self._torn: dict[Weight, int] | None = None
        if self._tuner is not None:
            self._tuner.sync()
        with _live.LOCK, torch.no_grad():
            self._weights = weights_of("Publisher", self.model, exclude)
            self._sent: dict[str, _Sent] = {}
            if self._tuner is not None:
                self._note_known(self._tuner)
            compared = [weight for name, weight in self._weights.items() if self._is_compared(name, weight)]
            for weight in compared:
                numel = weight.tensor.numel()
                if numel % granule:
                    raise ValueError(
                        f"Publisher: granule must divide the {numel} entries of {weight.name}, got {granule}; take a "
                        f"smaller one, or leave the weight out with exclude="
                    )
            # Copies of weights with one name each: those without entries never change.
            self._snapshots = {
                weight.name: weight.tensor.to(self._device or weight.tensor.device, copy=True)
                for weight in compared
                if weight.tensor.numel()
            }

    @property
    def version(self) -> int:
        """The version of the weights as they were last published; see `Update`."""
        return version_of(fingerprints(self._weights))

    @property
    def shapes(self) -> dict[str, Tensor]:
        """What is published, by all of its names: tensors without content (on the meta device), for `Plan.record`."""
        return {
            slot.name: torch.empty_like(slot.weight, device="meta", requires_grad=False)
            for weight in self._weights.values()
            for slot in weight.slots
        }

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A shallow copy would share the snapshot, and what one of them publishes the other would never see.
        raise TypeError("Publisher: a publisher cannot be copied or pickled; make another one for a copy of the model")

    def __repr__(self) -> str:
        nbytes = sum(tensor.nbytes for tensor in self._snapshots.values())
        return (
            f"Publisher(step {self.step}, version {shown_version(self.version)}, {len(self._weights)} weights, "
            f"snapshot of {nbytes:,} bytes)"
        )

    def publish(self) -> Update:
        """What has changed since the last call, or since the Publisher was made; an update without weights if nothing.

        The tensors of the update are its own. Raises `SyncError`, with nothing noted as published, where a weight was
        moved or replaced, or written to although it is frozen, or where the model has new weights. Where it fails half
        way (memory, an interrupt), the next call sends the weights that changed since the last update as a whole.
        """
        if self._tuner is not None:
            self._tuner.sync()
        refuse_moved("Publisher", self.model, self._weights.values(), _ANEW)
        refuse_added("Publisher", self.model, self._exclude, self._weights.values(), _ANEW)
        with _live.LOCK, torch.no_grad():
            torn = self._torn is not None
            for weight, fingerprint in (self._torn or {}).items():
                weight.fingerprint = fingerprint
            self._refuse_frozen()
            self._torn = {weight: weight.fingerprint for weight in self._weights.values()}
            start = self.version
            found = self._all_changes() if torn else self._known_changes() | self._compared_changes()
            weights: dict[str, Entry] = {}
            after: dict[str, int] = {}
            before: dict[str, Tensor] = {}
            for name, weight in self._weights.items():  # in the model's order
                if name not in found:
                    continue
                indices, values, granule, fingerprint, known = found[name]
                tensor = weight.tensor
                weights[name] = Entry(
                    indices, values, tuple(tensor.shape), tensor.dtype, granule, weight.fingerprint, None,
                    weight.aliases, checked=True,
                )  # fmt: skip
                if known is not None:
                    before[name] = known
                after[name] = weight.fingerprint = fingerprint
                weight.note()
            update = Update(weights, after, start, self.step + 1, before)
            self.step, self._torn = update.step, None
        return update

    def verify(self) -> None:
        """Read all weights and compare them with what was published; `SyncError` names those that differ.

        Right after `publish`, this finds what a Publisher of a tuner does not look at: entries of a tuned weight that
        the tuner does not train, and that somebody wrote to.
        """
        with _live.LOCK, torch.no_grad():
            refuse_moved("Publisher", self.model, self._weights.values(), _ANEW)
            different = [
                name
                for name, weight in self._weights.items()
                if _granules.fingerprint(weight.tensor) != weight.fingerprint
            ]
        if different:
            raise SyncError(f"Publisher: {_model.some(different)} changed since the last publish; {_ANEW}")

    # ---- entries that are known -----------------------------------------------------------------------------

    def _note_known(self, tuner: SparseTuner) -> None:
        names = {slot.name: weight for weight in self._weights.values() for slot in weight.slots}
        for name, entry in tuner.adapter().weights.items():
            weight = names.get(name)
            if weight is None:
                continue  # excluded
            share = _granules.fingerprint_at(weight.tensor, entry.indices, entry.granule)
            self._sent[weight.name] = _Sent(entry.indices, entry.values, entry.granule, share)

    def _known_changes(self) -> dict[str, _Change]:
        found: dict[str, _Change] = {}
        for name, sent in self._sent.items():
            weight = self._weights[name]
            values = shira_ops.gather(weight.tensor, sent.indices, granule=sent.granule)
            changed = (bits(values) != bits(sent.values)).nonzero().view(-1)
            if not changed.numel():
                continue
            share = _granules.fingerprint_at(weight.tensor, sent.indices, sent.granule)
            granules = sent.indices[changed // sent.granule].to(torch.int64)
            indices = granules * sent.granule + changed % sent.granule
            kind = index_dtype(weight.tensor.numel())
            fingerprint = (weight.fingerprint + share - sent.share) & WORD
            found[name] = (indices.to(kind), values[changed], 1, fingerprint, sent.values[changed])
            self._sent[name] = replace(sent, values=values, share=share)
        return found

    def _refuse_frozen(self) -> None:
        for name, weight in self._weights.items():
            if name in self._sent or name in self._snapshots or not weight.touched():
                continue
            if _granules.fingerprint(weight.tensor) != weight.fingerprint:
                raise SyncError(
                    f"Publisher: {name} is frozen, so a Publisher of a tuner keeps no copy of it, and it was written "
                    f"to; unfreeze it before the Publisher is made, or make one of the model: Publisher(tuner.model)"
                )
            weight.note()

    # ---- entries that are looked for -------------------------------------------------------------------------

    def _is_compared(self, name: str, weight: Weight) -> bool:
        if self._tuner is None:
            return True
        owner = weight.slots[0]
        frozen = isinstance(owner.weight, nn.Parameter) and not owner.weight.requires_grad
        return name not in self._sent and not frozen

    def _compared_changes(self) -> dict[str, _Change]:
        found: dict[str, _Change] = {}
        compared = [(self._weights[name], self._granule) for name in self._snapshots]
        for weights, granule in by_call(compared):
            snapshots = [self._snapshots[weight.name] for weight in weights]
            tensors = [weight.tensor.to(copy.device) for weight, copy in zip(weights, snapshots, strict=True)]
            changes = shira_ops.foreach_diff_(snapshots, tensors, granule=granule, before=True)
            for weight, tensor, indices, before in zip(weights, tensors, *changes, strict=True):
                if indices.numel():
                    values = shira_ops.gather(tensor, indices, granule=granule)
                    found[weight.name] = (indices, values, granule, _granules.fingerprint(tensor), before)
        return found

    # ---- after a call that failed half way -------------------------------------------------------------------

    def _all_changes(self) -> dict[str, _Change]:
        """The weights that changed, as a whole: some of what changed in them was noted, and never sent."""
        found: dict[str, _Change] = {}
        for name, weight in self._weights.items():
            tensor = weight.tensor
            fingerprint = _granules.fingerprint(tensor)
            sent, snapshot = self._sent.get(name), self._snapshots.get(name)
            if sent is not None:
                values = shira_ops.gather(tensor, sent.indices, granule=sent.granule)
                share = _granules.fingerprint_at(tensor, sent.indices, sent.granule)
                self._sent[name] = replace(sent, values=values, share=share)
            if snapshot is not None:
                snapshot.copy_(tensor)
            if fingerprint != weight.fingerprint:
                granule = 1 if snapshot is None else self._granule
                count = tensor.numel() // granule
                indices = torch.arange(count, dtype=index_dtype(count), device=tensor.device)
                found[name] = (indices, tensor.flatten().clone(), granule, fingerprint, None)
        return found
