"""What the experiments are built of: runs that are done once, learning rates that are tuned, adapters that are kept."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality import tasks
from benchmarks.quality.methods import Method, is_whole, train
from benchmarks.quality.store import RESULTS, Run, Store, key
from benchmarks.quality.task import CACHE, Task, measured
from shira import Adapter
from shira_ops import fingerprint

RATES = tuple(float(f"{digit}e{power}") for power in range(-5, 1) for digit in (1, 3))
"""The learning rates that are tried: 1e-5, 3e-5, ... 3."""

BETWEEN = tuple(float(f"{digit}e{power}") for power in range(-5, 1) for digit in (2, 5))
"""A rate between each of `RATES` and the next."""

FAILED = -1e9  # the score of a run that diverged: worse than every other, but finite, so that means exist

SLOWER = {
    "minilm": 1, "gpt-s": 1, "gpt-m": 1, "gpt-l": 1, "smollm2": 1, "smollm2-more": 1, "rl": 1, "style": 1,
}  # fmt: skip
"""How many steps below a method's usual start the search begins for a family; the same for all its methods."""


UNSTEADY = 0.03
"""The standard deviation of validation scores over seeds (accuracy as a fraction, or nats) above which the score of the
first seed may have been luck."""

COSTLY = {"smollm2": 3, "smollm2-more": 3, "smollm2-kin": 3, "rl": 3}
"""Families whose runs take long: every figure has at most so many seeds, and a rate is searched again only where some
seeds fail at it (`FAILING`)."""
FAILING = 0.5
"""The standard deviation of validation scores over seeds above which some of the runs have failed."""


KEPT = ("style",)
"""Families of which every adapter is kept when it is trained: they are small, and most are used again. Of the costly
ones, those of SHiRA are; the others are as large as the model."""


LOST = "lost"
"""In place of the fingerprint of a base that is nowhere any more."""


class Stop(Exception):
    """The time is over: everything that was finished is kept."""


class OtherBase(ValueError):
    """The results so far are of a base with other weights."""


def family_of(task: str) -> str:
    return task.partition("/")[0]


def print_of(task: Task) -> str:
    """A short fingerprint of the base's weights, the same for all tasks of a family."""
    found = hashlib.sha256()
    for name, weight in task.base().named_parameters():
        if not is_whole(task, name):
            found.update(f"{name} {int(fingerprint(weight.detach())):x}\n".encode())
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class Setting:
    """A method on a task, with everything but the learning rate and the seed."""

    task: str
    method: Method
    steps: int | None = None  # None: the task's own number
    fraction: float = 1.0
    budget: int = 6  # runs that the search for the learning rate may take

    def run(self, lr: float, seed: int) -> Run:
        run: Run = {"do": "train", "task": self.task, "method": self.method.describe(), "lr": lr, "seed": seed}
        if self.steps is not None:
            run["steps"] = self.steps
        if self.fraction != 1:
            run["fraction"] = self.fraction
        return run


@dataclass
class Lab:
    """Where runs are done and kept."""

    folder: Path = RESULTS
    seeds: Sequence[int] = range(5)
    until: float = math.inf
    tick: Callable[[str], None] = lambda what: None
    steps: int | None = None  # for tests: fewer steps, for every run
    cache: Path = CACHE / "adapters"
    _stores: dict[str, Store] = field(default_factory=dict)
    _same: set[str] = field(default_factory=set)

    def seeds_of(self, task: str) -> Sequence[int]:
        """The seeds of every figure about a task."""
        return self.seeds[: COSTLY.get(family_of(task), len(self.seeds))]

    def store(self, family: str) -> Store:
        if family not in self._stores:
            self._stores[family] = Store(family, self.folder)
        return self._stores[family]

    def done(self, run: Run, do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a run, done now unless it was done before."""
        store = self.store(family_of(run["task"]))
        found = store.get(run)
        if found is None:
            if time.time() >= self.until:
                raise Stop
            self.check_base(family_of(run["task"]))
            start = time.perf_counter()
            result = do()
            found = store.add(run, {**result, "seconds": round(time.perf_counter() - start, 2)})
        self.tick(f"{run['task']} {run['do']}")
        return found

    def check_base(self, family: str) -> None:
        """Refuse to add to results that are of another base; the first run of a family says which base is meant.

        A base that is pretrained here is another one on another processor, which rounds otherwise.
        """
        if family in self._same:
            return
        one = next(iter(tasks.tasks(family).values()))
        store, run = self.store(family), {"do": "weights", "task": one.name}
        kept = store.get(run)
        if kept == {"fingerprint": LOST}:
            raise OtherBase(
                f"the base of the results in {store.path} is lost: begin anew in another folder (--results)"
            )
        here = {"fingerprint": print_of(one)}
        if kept is None:
            store.add(run, here)
        elif kept != here:
            raise OtherBase(
                f"the results in {store.path} are of a base with other weights (fingerprint {kept['fingerprint']}) "
                f"than the one here ({here['fingerprint']}): go on where that base is, or begin anew in another folder "
                f"(--results)"
            )
        self._same.add(family)

    def base(self, task: str) -> dict[str, Any]:
        """The scores of the untouched base."""
        one = tasks.task(task)

        def do() -> dict[str, Any]:
            model = one.base()
            # Which text a task used that takes it from the Python installation.
            found: dict[str, Any] = {"data": one.provenance()} if hasattr(one, "provenance") else {}
            return found | measured(one, model)

        return self.done({"do": "base", "task": task}, do)

    def train(self, setting: Setting, lr: float, seed: int) -> dict[str, Any]:
        return self.done(setting.run(lr, seed), lambda: self._trained(setting, lr, seed)[1])

    def _trained(self, setting: Setting, lr: float, seed: int) -> tuple[Adapter, dict[str, Any]]:
        task: Task = tasks.task(setting.task)
        trained = train(task, setting.method, lr, seed, self.steps or setting.steps or task.steps, setting.fraction)
        if task.family in KEPT or (task.family in COSTLY and not trained.adapter.delta):
            self._keep(setting, lr, seed, trained.adapter)
        return trained.adapter, trained.record

    def _path(self, setting: Setting, lr: float, seed: int) -> Path:
        name = hashlib.sha256(f"{key(setting.run(lr, seed))}{self.steps}".encode()).hexdigest()[:24]
        return self.cache / f"{name}.safetensors"

    def _keep(self, setting: Setting, lr: float, seed: int, adapter: Adapter) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        adapter.save(self._path(setting, lr, seed))

    def adapter(self, setting: Setting, lr: float, seed: int) -> Adapter:
        """The adapter of a run, kept as a file under ``build/``."""
        path = self._path(setting, lr, seed)
        if path.exists():
            return Adapter.load(path)
        adapter, _ = self._trained(setting, lr, seed)
        self._keep(setting, lr, seed, adapter)
        return adapter

    def tuned(self, setting: Setting) -> float:
        """The learning rate of a setting: what the search found, or the next lower one where that is steadier.

        The search looks at the first seed. Where the seeds disagree about the rate that it found, the next lower one is
        trained with all of them too, and the better mean validation score decides.
        """
        lr = self.searched(setting)
        limit = UNSTEADY
        if family_of(setting.task) in COSTLY:
            store, limit = self.store(family_of(setting.task)), FAILING
            if not all(store.get(setting.run(lr, seed)) for seed in self.seeds_of(setting.task)):
                return lr  # the first seeds are compared before the others are run
        scores = self._validations(setting, lr)
        steady = len(scores) == 1 or statistics.pstdev(scores) <= limit
        if not steady and lr != RATES[0]:
            lower = RATES[RATES.index(lr) - 1]
            if statistics.fmean(self._validations(setting, lower)) > statistics.fmean(scores):
                return lower
        return lr

    def _validations(self, setting: Setting, lr: float) -> list[float]:
        found = [self.train(setting, lr, seed)["validation"] for seed in self.seeds_of(setting.task)]
        return [FAILED if score is None else score for score in found]

    def searched(self, setting: Setting) -> float:
        """The learning rate with the best validation score at the first seed; of equals, that with the lower loss."""
        scores = self._search(setting)
        return RATES[max(sorted(scores), key=scores.__getitem__)]

    def spared(self, setting: Setting) -> float:
        """The lowest rate of the search that is as good as the best one, to within `UNSTEADY` of its validation score:
        what changes less, forgets less and disturbs other adapters less."""
        scores = self._search(setting)
        best = max(scores.values())[0]
        return RATES[min(at for at, (validation, _) in scores.items() if validation >= best - UNSTEADY)]

    def refined(self, setting: Setting) -> float:
        """The better of the best rate and the two `BETWEEN` it and its neighbours, at the first seed."""
        best = RATES.index(self.searched(setting))
        scores = {}
        for rate in (RATES[best], *BETWEEN[max(0, best - 1) : best + 1]):
            found = self.train(setting, rate, self.seeds[0])["validation"]
            scores[rate] = FAILED if found is None else found
        return max(scores, key=scores.__getitem__)

    def _search(self, setting: Setting) -> dict[int, tuple[float, float]]:
        """Validation score and minus the loss at the first seed, by the number of the rate.

        The search goes both ways from the method's start, until a lower and a higher rate are worse than the best, or
        the budget, the same for every method, is spent. A best rate whose score is below the untouched base's does not
        count: the search then goes on to lower rates.
        """
        scores: dict[int, tuple[float, float]] = {}

        def score(at: int) -> None:
            found = self.train(setting, RATES[at], self.seeds[0])
            validation, loss = found["validation"], found["loss"]
            scores[at] = FAILED if validation is None else validation, FAILED if loss is None else -loss

        family = family_of(setting.task)
        low = high = RATES.index(setting.method.start) - SLOWER.get(family, 0)
        score(low)
        while len(scores) < setting.budget:
            best = max(sorted(scores), key=scores.__getitem__)
            if best == low and low > 0:
                low -= 1
                score(low)
            elif best == high and high < len(RATES) - 1:
                high += 1
                score(high)
            elif low > 0 and scores[best][0] < self.base(setting.task)["validation"]:
                low -= 1
                score(low)
            else:
                break
        return scores

    def study(self, setting: Setting) -> list[dict[str, Any]]:
        """The results of every seed, at the tuned learning rate."""
        lr = self.tuned(setting)
        return [self.train(setting, lr, seed) for seed in self.seeds_of(setting.task)]


@dataclass(frozen=True)
class Job:
    """Part of an experiment. ``rank`` 0 is done first; ``runs`` is roughly how many runs it takes."""

    rank: float
    runs: int
    do: Callable[[Lab], object]


def study(rank: float, setting: Setting, seeds: int) -> Job:
    return Job(rank, 4 + seeds - 1, lambda lab: lab.study(setting))


def bases(rank: float, names: Iterable[str]) -> Iterable[Job]:
    return (Job(rank, 1, lambda lab, name=name: lab.base(name)) for name in names)  # type: ignore[misc]
