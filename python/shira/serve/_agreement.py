"""How the ranks of a sharded model act as one: every call of a `Switcher` succeeds on all of them or on none.

A rank does its part of a call, and then all tell each other in one small collective whether it went well, and what was
called (`Ranks.together`). Where it went well everywhere, that is all. Otherwise each takes its part back, and all raise
the same error. A model that is not sharded knows nothing of this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from shira import _granules, _model, _shards
from shira._granules import WORD, signed
from shira._live import LOCK, SwitchError
from shira._text import AdapterError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class _Word(NamedTuple):
    """What a rank tells the others of a call, when not all is well."""

    caller: str
    call: str
    state: str
    about: str
    # The error, if there is one: whether it is about an adapter, and what it says.
    of_adapter: bool
    error: str | None
    interrupt: bool


class _Refused(Exception):
    """An exchange within a call has shown that it did not go well everywhere."""


class _Lost(Exception):
    """An exchange has failed: a rank has died, or does not answer."""


@dataclass(eq=False)
class Step:
    """A call that all ranks make together."""

    ranks: Ranks
    caller: Caller
    call: str
    state: str
    # What this rank works on, where it must be the same on all of them.
    about: str = ""
    told: bool = field(default=False, init=False)

    def agree(self, about: str = "") -> None:
        """Go on only if all has gone well so far on every rank, and all have the same ``about``."""
        self.about = about
        self._exchange(None)

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """Numbers of every rank, equally many on each, by rank of the group."""
        try:
            return self.ranks.gather(numbers)
        except Exception as error:
            raise _Lost(str(error)) from error

    def add(self, words: Tensor, mesh: DeviceMesh) -> None:
        """Add up numbers, in place, over the ranks of a mesh."""
        from torch import distributed

        try:
            for dim in range(mesh.ndim):
                distributed.all_reduce(words, group=mesh.get_group(dim))
        except Exception as error:
            raise _Lost(str(error)) from error

    def _exchange(self, error: BaseException | None) -> None:
        called = f"{self.caller}: {self.call}"
        words = [int(error is not None), *(_digest(text) for text in (called, self.state, self.about))]
        rows = self.gather(words)
        if any(row != rows[0] or row[0] for row in rows):
            self.told = True
            raise _Refused


def call(name: str, arguments: Iterable[object], options: Mapping[str, object]) -> str:
    """A call, for messages; options that are None are left out."""
    given = [repr(dict(sorted(one.items(), key=str)) if isinstance(one, Mapping) else one) for one in arguments]
    given += [f"{key}={value!r}" for key, value in options.items() if value is not None]
    return f"{name}({', '.join(given)})"


def meshes_of(weights: Iterable[Tensor]) -> list[DeviceMesh]:
    """The device meshes of the sharded ones."""
    return [weight.device_mesh for weight in weights if _shards.is_dtensor(weight)]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


# How many callers were made for the same ranks, by these.
_made: dict[tuple[int, ...], int] = {}


@dataclass(eq=False)
class Caller:
    """A `Switcher` or `Overlay`. Each rank makes its own, all in the same order, and so they are told apart."""

    kind: str
    number: int = 0

    def ranks(self, meshes: Iterable[DeviceMesh]) -> Ranks | None:
        """`Ranks.of` these device meshes; the first time it gets its number among the callers of the same ranks."""
        found = Ranks.of(self.kind, meshes)
        if found is not None and not self.number:
            members = tuple(found.members)
            self.number = _made[members] = _made.get(members, 0) + 1
        return found

    def __str__(self) -> str:
        return f"{self.kind} number {self.number}"


@dataclass(eq=False)
class Ranks:
    """The ranks that hold a sharded model together."""

    group: ProcessGroup
    # The ranks of the whole program that are in the group, in the group's order.
    members: list[int]
    device: torch.device

    @staticmethod
    def of(who: str, meshes: Iterable[DeviceMesh]) -> Ranks | None:
        """Those of these device meshes; None if there is none.

        Raises:
            ValueError: no process group is known that has exactly those ranks.
        """
        meshes = list(dict.fromkeys(meshes))
        if not meshes:
            return None
        from torch import distributed

        members = sorted({rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()})
        world = distributed.group.WORLD
        group: Any = world if world is not None and distributed.get_world_size() == len(members) else None
        for mesh in meshes if group is None else ():
            if mesh.size() == len(members):
                group = mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()
        if group is None:
            raise ValueError(
                f"{who}: the model's weights are on {len(meshes)} device meshes, and none of them has all of the "
                f"ranks {members}; make them parts of one mesh"
            )
        kind = meshes[0].device_type
        kinds = {device.type for device in group._device_types}
        at = "cpu" if "cpu" in kinds else kind
        device = torch.device("cpu") if at == "cpu" else torch.device(at, torch.accelerator.current_device_index())
        return Ranks(group, distributed.get_process_group_ranks(group), device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    @property
    def size(self) -> int:
        return len(self.members)

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """See `Step.gather`."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        every = mine.new_empty(self.size, len(numbers))
        # What torch.distributed.all_gather calls: its own checks and logs take longer than this exchange.
        self.group.allgather([list(every.unbind())], [mine]).wait()
        found: list[list[int]] = every.tolist()
        return found

    def fingerprints(self, weights: Sequence[Any], read: Callable[[], Sequence[Tensor]], step: Step) -> list[int]:
        """The fingerprints of whole weights (DTensors) of which each rank has in its part what it reads."""
        from torch.distributed.tensor import DTensor

        contents = read()
        shares = [
            _shards.fingerprint(content, _shards.Box.of(weight)) if _shards.is_first(weight) else 0
            for weight, content in zip(weights, contents, strict=True)
        ]
        step.agree(step.about)  # every rank has read its part
        count = len(shares)
        rows = step.gather([*(signed(share or 0) for share in shares), *(share is None for share in shares)])
        found = []
        for at, (weight, content) in enumerate(zip(weights, contents, strict=True)):
            own = set(weight.device_mesh.mesh.flatten().tolist())
            mine = [row for row, rank in zip(rows, self.members, strict=True) if rank in own]
            if not any(row[count + at] for row in mine):
                found.append(sum(row[at] for row in mine) & WORD)
                continue
            # A cut goes through a 64-bit word: such weights are small and odd.
            whole = DTensor.from_local(
                content.detach(), weight.device_mesh, weight.placements, run_check=False, shape=weight.shape,
                stride=weight.stride(),
            ).full_tensor()  # fmt: skip
            found.append(_granules.fingerprint(whole.contiguous()))  # torch 2.11 gathers columns in another order
        return found

    def known_fingerprints(
        self, weights: Sequence[Any], known: Sequence[int | None], read: Callable[[], Sequence[Tensor]], step: Step
    ) -> list[int]:
        """The same; nothing is read where every rank knows all of them already. The ranks must just have agreed."""
        if not weights:
            return []
        words = [signed(number or 0) for number in known]
        if all(all(row) and row == words for row in step.gather(words)):
            return [number & WORD for number in words]
        return self.fingerprints(weights, read, step)

    # ---- calls -----------------------------------------------------------------------------------------------

    @contextmanager
    def together(
        self, caller: Caller, call: str, prepare: Callable[[], None], state: Callable[[], str], undo: Callable[[], None]
    ) -> Iterator[Step]:
        """A call that all ranks make: it succeeds on all of them, or on none.

        Args:
            caller: who calls, which must be the same on every rank.
            call: what is called, as it must be on every rank.
            prepare: comes first.
            state: says what is on the weights now, as the end of a message.
            undo: goes back to what was before the call; does nothing where the call itself has done so.
        """
        with LOCK:
            step, mine = Step(self, caller, call, state()), None
            try:
                prepare()
                yield step
            except BaseException as error:
                mine = error
            try:
                if isinstance(mine, _Lost):
                    raise mine
                if not step.told:
                    step._exchange(mine)
            except _Refused:
                pass
            except Exception as error:
                raise self._lost(step, state, undo, error) from error
            if step.told:
                self._refuse(step, None if isinstance(mine, _Refused) else mine, state, undo)

    def _refuse(
        self, step: Step, mine: BaseException | None, state: Callable[[], str], undo: Callable[[], None]
    ) -> None:
        """Take back what this rank has done, and raise what all ranks raise."""
        error = None if mine is None else str(mine) or type(mine).__name__
        interrupt = mine is not None and not isinstance(mine, Exception)
        word = _Word(
            str(step.caller), step.call, step.state, step.about, isinstance(mine, AdapterError), error, interrupt
        )
        try:
            words = self._tell(word)
            if mine is not None and not interrupt and all(other == word for other in words):
                raise mine  # the same everywhere
            failed = _done(undo)
            told = self._tell((failed, state()))
        except Exception as lost:
            if lost is mine:
                raise
            raise self._lost(step, state, undo, lost) from lost
        if mine is not None and interrupt:
            raise mine
        kind = AdapterError if any(word.of_adapter for word in words) else SwitchError
        raise kind(f"{step.caller.kind}: {self._sentence(words, told)}") from mine

    def _tell(self, word: Any) -> list[Any]:
        from torch import distributed

        words: list[Any] = [None] * self.size
        distributed.all_gather_object(words, word, group=self.group)
        return words

    def _sentence(self, words: list[_Word], told: list[tuple[str | None, str]]) -> str:
        failed = [rank for rank, word in enumerate(words) if word.error is not None]
        if failed:
            first = failed[0]
            others = f" (and {_model.some(map(str, failed[1:]))})" if failed[1:] else ""
            what = f"{words[first].call} failed on rank {first} of {self.size}{others}"
            why = f". Rank {first}: {words[first].error}"
        else:
            differ = next(at for at in _ADVICE if len({getattr(word, at) for word in words}) > 1)
            what = "the ranks did not agree on what to do"
            each = ", ".join(f"rank {rank}: {getattr(word, differ)}" for rank, word in _different(words, differ))
            why = f". {each}. {_ADVICE[differ]}"
        torn = [rank for rank, (error, _) in enumerate(told) if error is not None]
        if torn:
            return f"{what}, and taking it back failed on rank {_model.some(map(str, torn))}: {told[torn[0]][0]}{why}"
        if any(state != word.state for (_, state), word in zip(told, words, strict=True)):
            now = "; ".join(f"rank {rank}: {state}" for rank, (_, state) in enumerate(told))
            return f"{what}, and the ranks hold different things now: {now}{why}"
        states = dict.fromkeys(state for _, state in told)
        now = next(iter(states)) if len(states) == 1 else "each has what it had before"
        return f"{what}, and nothing has changed on any: {now}{why}"

    def _lost(
        self, step: Step, state: Callable[[], str], undo: Callable[[], None], cause: BaseException
    ) -> SwitchError:
        """The error of a rank that does not hear from all others."""
        failed = _done(undo)
        here = f"it is as it was before the call: {state()}" if failed is None else f"taking it back failed: {failed}"
        return SwitchError(
            f"{step.caller.kind}: {step.call}: the ranks could not agree, since one has died or did not answer in "
            f"time. On this rank {here}; what the others hold is not known. Start the program again, or make the "
            f"process groups and the {step.caller.kind} anew. Cause: {cause}"
        )


_ADVICE = {
    "caller": "They are numbered as they were made for these ranks: make and use them in the same order on every rank",
    "call": "Make the same calls in the same order on every rank",
    "state": "Make the same calls in the same order on every rank",
    "about": "Give every rank the same adapter",
}


def _different(words: list[_Word], field: str) -> list[tuple[int, _Word]]:
    """The first rank, and the first that differs from it."""
    other = next(rank for rank, word in enumerate(words) if getattr(word, field) != getattr(words[0], field))
    return [(0, words[0]), (other, words[other])]


def _done(undo: Callable[[], None]) -> str | None:
    """Take a call back; what went wrong, if it did."""
    try:
        undo()
    except Exception as error:
        return str(error)
    return None
