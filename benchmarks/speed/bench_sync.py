"""Live updates of a model of 4096 x 4096 layers in bf16, of which a share changes with every update.

touch   reads and writes each cache line that a commit writes once: see bench_switch.py
dense   an update the usual way: each weight is cloned, the clone gets the entries by `index_copy_`, and is copied back.
        Nothing is checked, and there is no way back
a run   the updates of a real training run (run.py), each of which is sent after one step in bf16 with a small rate
memory  what `stage` and `commit` take at the most beside the model and the update, and what clones of all weights take:
        those that a dense update can fail on without leaving the model half updated
read    reads all weights once, as fast as a plain loop can: what a publisher of a model, which keeps a snapshot, does
        twice, and once more for the weights that changed
"""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.speed import common, heap, run
from benchmarks.speed.bench_diff import READ
from benchmarks.speed.bench_switch import TOUCH, about, touch
from benchmarks.speed.common import BF16, Layer, Report, compare, layers, settings, sweep
from benchmarks.speed.peers import Layers

shira = pytest.importorskip("shira")
from shira.sync import Publisher, Receiver, Update  # noqa: E402
from shira.sync.receiver import _Moves  # noqa: E402

ops, machine = torch.ops.shira, torch.ops.shira_bench
DENSITIES = pytest.mark.parametrize("density", [0.01, 0.001], ids=["1 %", "0.1 %"])


def swap(some: list[Layer]) -> None:
    for one in some:
        ops.swap_(one.weight, one.indices, one.values)


@dataclass
class Turns:
    """A receiver, and the update that leads from its weights to others, and the one back."""

    receiver: Any
    updates: tuple[Any, Any]
    moves: _Moves = field(init=False)
    now: int = 0

    def __post_init__(self) -> None:
        self.moves = self.receiver._moves(self.updates[0])

    def stage(self) -> None:
        self.receiver.unstage()
        self.receiver.stage(self.updates[self.now])

    def commit(self, verify: bool) -> None:
        """Only that: what is swapped for the way there is what the way back takes."""
        before, after = (self.moves.after, self.moves.before) if self.now else (self.moves.before, self.moves.after)
        moves = replace(self.moves, update=self.updates[self.now], before=before, after=after)
        self.receiver._state = self.receiver._state._replace(staged=moves)
        self.receiver.commit(verify=verify)
        self.now = 1 - self.now

    def both(self) -> None:
        self.stage()
        self.receiver.commit()
        self.now = 1 - self.now


def words(some: list[Layer]) -> None:
    """What a verified commit does before it swaps, and again after it."""
    for one in some:
        ops.fingerprint_at(one.weight, one.indices)


def dense(some: list[Layer], back: bool) -> None:
    for one in some:
        staged = one.weight.clone()
        staged.view(-1).index_copy_(0, one.indices64, one.saved if back else one.values)
        one.weight.copy_(staged)


@DENSITIES
def bench_commit(benchmark: BenchmarkFixture, threads: int, density: float) -> None:
    some = layers(BF16, density=density)
    # What the other ways write must not move the versions of the model's weights, or commit would read them all.
    model = Layers([one.weight.data for one in some])
    publisher = Publisher(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    swap(some)
    update = publisher.publish()
    back = update.invert(before)
    after = [one.weight.clone() for one in some]
    swap(some)
    turns, alone = Turns(Receiver(model), (update, back)), Turns(Receiver(model), (update, back))
    for way in (turns.both, lambda: turns.commit(True), lambda: turns.commit(False)):
        for expected in (after, before.values()):
            way()
            assert all(torch.equal(one.weight, other) for one, other in zip(some, expected, strict=True))
    for one in some:
        one.saved.copy_(ops.gather(one.weight, one.indices))
    for back_again, expected in ((False, after), (True, before.values())):
        dense(some, back_again)
        assert all(torch.equal(one.weight, other) for one, other in zip(some, expected, strict=True))
    del after, before, publisher
    turns, alone = Turns(Receiver(model), (update, back)), Turns(Receiver(model), (update, back))

    def commit(verify: bool) -> None:
        turns.commit(verify)
        turns.commit(verify)

    def both() -> None:
        turns.both()
        turns.both()

    # There and back: two updates, so that every round starts from the same weights.
    ways = {
        "commit, verify=False": lambda: commit(False),
        "stage and commit": both,
        "stage": lambda: (alone.stage(), alone.stage()),
        "swap_": lambda: (swap(some), swap(some)),
        "fingerprint_at": lambda: (words(some), words(some)),
        "dense": lambda: (dense(some, False), dense(some, True)),
    }
    touched = {name: (lambda run=run: (run(), run())) for name, run in touch(some).items()}
    timing = compare(benchmark, ("commit", lambda: commit(True)), {**ways, **touched})
    timing.best("touch", list(TOUCH))
    report = Report(benchmark, threads, **about(some), density=density)
    report.seconds(timing, 2 * len(some))
    report.bandwidth(timing, "commit", 2 * common.switched_bytes(some))
    variant = f"{density:g} changed"
    report.ratio("commit of touch", variant, timing, "touch")
    report.ratio("commit, verify=False of touch", variant, timing, "touch", of="commit, verify=False")
    report.ratio("stage and commit over dense", variant, timing, "dense", of="stage and commit")


@DENSITIES
def bench_publish(benchmark: BenchmarkFixture, threads: int, density: float) -> None:
    some = layers(BF16, density=density)
    model, trained = Layers([one.weight for one in some]), Layers([one.weight.clone() for one in some])
    tuner = shira.SparseTuner(trained, shira.masks.Rand(density=density))
    of_model, of_tuner = Publisher(model), Publisher(tuner)
    follower = Receiver(Layers([one.weight.clone() for one in some]))
    swap(some)
    update = of_model.publish()
    data = update.to_bytes()
    follower.stage(Update.from_bytes(data))
    follower.commit()
    for one, layer in zip(some, follower.model.layers, strict=True):
        assert torch.equal(one.weight, layer.weight)
    del follower

    def train() -> None:
        with torch.no_grad():
            for values in tuner.parameters():
                values.neg_()
        tuner.sync()

    def publish() -> None:
        assert len(of_model.publish()) == len(some)

    def known() -> None:
        assert len(of_tuner.publish()) == len(some)

    # The changes are part of what is timed, beside the changes alone.
    ways = {
        "the changes, twice": lambda: (swap(some), swap(some)),
        "publish of a tuner": lambda: (train(), known()),
        "the tuner's changes, twice": lambda: (train(), train()),
        "to_bytes": update.to_bytes,
        "from_bytes": lambda: Update.from_bytes(data),
        **{name: sweep(machine.read, [(one.weight, ahead) for one in some]) for name, ahead in READ.items()},
    }
    timing = compare(benchmark, ("publish", lambda: (swap(some), publish())), ways)
    timing.best("read", list(READ))
    report = Report(benchmark, threads, **about(some), density=density, file_bytes=len(data), entries=update.nnz)
    report.seconds(timing, len(some))
    variant = f"{density:g} changed"
    report.ratio("publish over read", variant, timing, "publish", of="read")
    report.ratio("publish of a tuner over publish", variant, timing, "publish", of="publish of a tuner")


@pytest.mark.parametrize("rate", [1.5e-6, 1e-7], ids=str)
def bench_run(benchmark: BenchmarkFixture, threads: int, rate: float) -> None:
    if settings.quick and threads > 1:
        pytest.skip("one run is enough")
    steps = run.training(run.run(rate))
    trained = next(steps)
    start, served, plain = (copy.deepcopy(trained) for _ in range(3))
    publisher, receiver = Publisher(trained), Receiver(served)
    updates, files, shares, codes = [], [], [], []
    for _ in steps:
        update = publisher.publish()
        data = update.to_bytes()
        updates.append(update)
        files.append(len(data) / update.nnz)
        shares.append(update.nnz / sum(weight.numel() for weight in trained.parameters()))
        codes.append(code_of(update))
        receiver.stage(data)
        receiver.commit()
    # An update without what was there before is written with its values, in the same layout.
    values = [len(replace(update, before={}).to_bytes()) / update.nnz for update in updates]
    wanted = trained.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in served.state_dict().items())
    turns = {"receiver": receiver}
    calls = [
        (plain.get_parameter(name).data, entry.indices.long(), entry.values)
        for update in updates
        for name, entry in update.weights.items()
    ]

    def reset() -> None:
        served.load_state_dict(start.state_dict())
        turns["receiver"] = Receiver(served)

    def follow() -> None:
        for update in updates:
            turns["receiver"].stage(update)
            turns["receiver"].commit()

    def stage_densely(weight: torch.Tensor, indices: torch.Tensor, entries: torch.Tensor) -> None:
        staged = weight.clone()
        staged.view(-1).index_copy_(0, indices, entries)
        weight.copy_(staged)

    timing = compare(
        benchmark, ("stage and commit", follow), {"dense": sweep(stage_densely, calls)}, rounds=settings.few(5),
        reset=reset,
    )  # fmt: skip
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in served.state_dict().items())
    report = Report(benchmark, threads, updates=len(updates), weights=len(updates[-1]), share=shares)
    report.seconds(timing, len(updates))
    variant = f"{sum(shares) / len(shares):.1%} changed"
    report.result("bytes of a run", variant, files, min(files))
    report.result("bytes of a run, values", variant, values, min(values))
    report.result("index code of a run", variant, codes, min(codes))
    report.ratio("a run over dense", variant, timing, "dense")


def code_of(update: Update) -> float:
    """How long its index codes are, over the entropy of entries that are chosen independently in each weight."""
    found, wanted = 0, 0.0
    for entry in update.weights.values():
        found += 8 * ops.encode_indices(entry.indices, version=2).numel()
        share = entry.indices.numel() / (entry.numel // entry.granule)
        if share < 1:
            left = 1 - share
            wanted -= entry.numel * (share * math.log2(share) + left * math.log2(left))
    return found / wanted


@DENSITIES
def bench_memory(benchmark: BenchmarkFixture, threads: int, density: float) -> None:
    ways = {way: peak_alone(way, density) for way in ("stage and commit", "dense, all weights", "dense, one by one")}
    benchmark.pedantic(lambda: None, rounds=1)
    report = Report(benchmark, threads, density=density, peak_bytes=ways)
    for way in ("dense, all weights", "dense, one by one"):
        ratio = ways[way] / max(1, ways["stage and commit"])
        report.result(f"memory: {way}", f"{density:g} changed", [ratio], ratio)


@functools.cache
def peak_alone(way: str, density: float) -> int:
    """Measured in a process of its own: memory that another way has freed would not count again."""
    if settings.quick:
        return peak(way, density)
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak, way, density).result()


def peak(way: str, density: float) -> int:
    """Bytes beside the model and the update. A small weight comes first, for what is taken once in a process."""
    found = 0
    for some in ([small()], layers(BF16, density=density)):
        model = Layers([one.weight.data for one in some])
        publisher = Publisher(model)
        swap(some)
        update = publisher.publish()
        swap(some)
        del publisher
        receiver = Receiver(model)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = heap.resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is recorded anew
        take_over(way, receiver, update, some)
        found = heap.resident("VmHWM") - before
    return found


def take_over(way: str, receiver: Any, update: Any, some: list[Layer]) -> None:
    if way == "stage and commit":
        receiver.stage(update)
        receiver.commit()
    elif way == "dense, one by one":
        dense(some, False)
    else:
        dense_at_once(some)


def small() -> Layer:
    indices = torch.arange(0, 4096, 50, dtype=torch.int32)
    weight, nothing = torch.zeros(64, 64, dtype=BF16), torch.zeros(0)
    values = torch.ones(len(indices), dtype=BF16)
    return Layer(weight, indices, indices.long(), values, values.clone(), indices, nothing, nothing, 1)


def dense_at_once(some: list[Layer]) -> None:
    staged = [one.weight.clone() for one in some]
    for one, copied in zip(some, staged, strict=True):
        copied.view(-1).index_copy_(0, one.indices64, one.values)
    for one, copied in zip(some, staged, strict=True):
        one.weight.copy_(copied)
