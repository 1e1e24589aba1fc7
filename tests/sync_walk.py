"""Random publish, stage, fail, commit, rollback and switch operations, each state compared bit for bit with a model of
which every version was copied: tests/sync takes a few hundred steps, soak.py ten thousand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import reduce

import pytest
import torch
from torch import Tensor

import shira_ops
from shira import AdapterError, Switcher, _granules
from shira.sync import Publisher, Receiver, SyncError, Update, compose
from switcher_walk import NAMES, STRENGTHS, adapter_of, bits, differing, model_of, restore


class Failing:
    """Stands for an op whose n-th call fails, before it writes or after; all others work."""

    def __init__(self, op: Callable[..., object], at: int, after: bool, error: type[BaseException]) -> None:
        self.op, self.left, self.after, self.error, self.failed = op, at, after, error, False

    def __call__(self, *args: object, **options: object) -> object:
        fails, self.left = self.left == 0, self.left - 1
        done = self.op(*args, **options) if not fails or self.after else None
        if fails:
            self.failed = True
            raise self.error("no memory")
        return done


class SyncWalk:
    """A trained model, one that follows it with a Switcher on it, and a copy of every version there was."""

    def __init__(self, dtype: torch.dtype, seed: int, budget: int | None = None) -> None:
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.trained, self.served, self.fresh = model_of(dtype), model_of(dtype), model_of(dtype)
        self.adapters = {name: adapter_of(self.served, name) for name in NAMES}
        self.switcher = Switcher(self.served, budget=budget)
        for name, adapter in self.adapters.items():
            self.switcher.add(name, adapter)
        self.publisher, self.receiver = Publisher(self.trained), Receiver(self.served)
        self.copies: dict[int, Tensor] = {self.publisher.version: bits(self.trained)}
        self.log: dict[int, Update] = {}
        self.undo = False
        self.pointers = [parameter.data_ptr() for parameter in self.served.parameters()]
        self.counts: dict[str, int] = {}

    def expected(self) -> Tensor:
        """The active adapters, activated once, on the copy of the version that the receiver says it has."""
        restore(self.fresh, self.copies[self.receiver.version])
        strengths = self.switcher.active
        if strengths:
            switcher = Switcher(self.fresh)
            for name in NAMES:
                if name in strengths:
                    switcher.add(name, self.adapters[name], verify=False)
            switcher.activate(strengths)
        found = bits(self.fresh)
        if strengths:
            switcher.deactivate()
        return found

    def step(self) -> None:
        """One operation, and the proof."""
        operations: list[Callable[[], None]] = [self.publish, self.switch, self.switch, self.off]
        if self.following(self.receiver.version) is not None:
            operations += [self.stage, self.stage, self.damaged, self.out_of_order]
        if self.receiver.staged is not None:
            operations += [self.commit, self.commit, self.commit_fails, self.written, self.inside, self.unstage]
        if self.undo:
            operations += [self.rollback, self.rollback_fails]
        if self.random.random() < 0.02:
            operations = [self.anew]
        operation = self.random.choice(operations)
        operation()
        self.counts[operation.__name__] = self.counts.get(operation.__name__, 0) + 1
        self.same(operation.__name__)

    def same(self, when: str) -> None:
        wrong = differing(bits(self.served), self.expected())
        assert wrong == 0, f"{wrong} bytes differ after {when} with {self.switcher.active}"

    def following(self, version: int) -> Update | None:
        staged = self.receiver.staged
        return self.log.get(version if staged is None else staged.end)

    # ---- the trainer -------------------------------------------------------------------------------------------

    def publish(self) -> None:
        with torch.no_grad():
            for parameter in self.trained.parameters():
                share = self.random.choice((0, 0.02, 0.1, 1.0))
                chosen = torch.rand(parameter.shape, generator=self.generator) < share
                new = torch.randn(parameter.shape, generator=self.generator).to(parameter.dtype)
                new.view(-1)[::9] = self.random.choice((0.0, -0.0, torch.inf))
                parameter[chosen] = new[chosen]
        update = self.publisher.publish()
        assert update.end == self.publisher.version
        if update.end != update.start:
            assert update.end not in self.copies
            self.log[update.start] = update
            self.copies[update.end] = bits(self.trained)

    # ---- updates -------------------------------------------------------------------------------------------------

    def stage(self) -> None:
        updates: list[Update | bytes] = []
        update = self.following(self.receiver.version)
        while update is not None and len(updates) < self.random.randint(1, 3):
            updates.append(update if self.random.random() < 0.5 else update.to_bytes())
            update = self.log.get(update.end)
        if self.random.random() < 0.3:  # as one, whichever of them have differences
            read = [Update.from_bytes(one) if isinstance(one, bytes) else one for one in updates]
            updates = [reduce(compose, read)]
        self.receiver.stage(*updates)

    def unstage(self) -> None:
        self.receiver.unstage()

    def damaged(self) -> None:
        update = self.following(self.receiver.version)
        if update is None:
            return
        sound = update.to_bytes()
        data = bytearray(sound)
        data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        with refused():
            self.receiver.stage(bytes(data[: -self.random.randint(1, 99)]))
        with suppress(AdapterError):
            read = Update.from_bytes(data)
            # Some bits say nothing: the header's padding, or which program wrote the file.
            assert (read.start, read.after) == (update.start, update.after)
            whole = Update.from_bytes(sound)
            assert (read.prints, read.weights.keys()) == (whole.prints, whole.weights.keys())
            for name, entry in read.weights.items():
                other = whole.weights[name]
                assert torch.equal(entry.indices, other.indices)
                assert differing(entry.values.view(torch.uint8), other.values.view(torch.uint8)) == 0

    def out_of_order(self) -> None:
        staged = self.receiver.staged
        at = self.receiver.version if staged is None else staged.end
        update = self.random.choice(list(self.log.values()))
        if update.start != at:
            with refused():
                self.receiver.stage(update)

    def commit(self) -> None:
        self.receiver.commit(verify=self.random.random() < 0.5)
        self.undo = True

    def inside(self) -> None:
        with self.switcher.using(self.strengths()):
            self.commit()
            self.same("commit in a block")

    def rollback(self) -> None:
        self.receiver.rollback()
        self.undo = False

    def commit_fails(self) -> None:
        if self.fails(lambda: self.receiver.commit(verify=self.random.random() < 0.5)):
            self.undo = True

    def rollback_fails(self) -> None:
        if self.fails(self.receiver.rollback):
            self.undo = False

    def fails(self, call: Callable[[], None]) -> bool:
        """With an op that fails somewhere; whether the version is another all the same."""
        before = self.receiver.version
        module, name = self.random.choice(((shira_ops, "swap_"), (shira_ops, "foreach_swap_"), (_granules, "swap_")))
        error = self.random.choice((RuntimeError, KeyboardInterrupt))
        failing = Failing(getattr(module, name), self.random.randrange(3), self.random.random() < 0.5, error)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, failing)
            try:
                call()
            except (SyncError, KeyboardInterrupt):
                assert failing.failed
        return self.receiver.version != before

    def written(self) -> None:
        """Somebody writes to an entry that changes, without moving a version; and takes it back."""
        assert self.receiver.staged is not None
        self.switcher.deactivate()
        name, entry = self.random.choice(list(self.receiver.staged.weights.items()))
        weight, at = self.served.get_parameter(name).data.view(-1), int(entry.indices[0])
        kept = weight[at].clone()
        weight[at] = 77
        with refused():
            self.receiver.commit()
        assert weight[at] == 77
        weight[at] = kept

    def anew(self) -> None:
        """The server starts again, with the weights that are there."""
        version = self.receiver.version
        self.receiver, self.undo = Receiver(self.served), False
        assert self.receiver.version == version

    # ---- adapters ------------------------------------------------------------------------------------------------

    def strengths(self) -> dict[str, float]:
        chosen = self.random.sample(NAMES, self.random.randint(1, len(NAMES)))
        return {name: self.random.choice(STRENGTHS) for name in NAMES if name in chosen}

    def switch(self) -> None:
        self.switcher.activate(self.strengths())

    def off(self) -> None:
        self.switcher.deactivate()

    def finish(self) -> None:
        """Everything that is known is right, and nothing has moved."""
        self.receiver.verify()
        self.switcher.verify(full=True)
        self.switcher.deactivate()
        self.same("the end")
        assert [parameter.data_ptr() for parameter in self.served.parameters()] == self.pointers


@contextmanager
def refused() -> Iterator[None]:
    try:
        yield
    except (AdapterError, SyncError):
        return
    raise AssertionError("it was not refused")
