"""Whole files: an adapter made from two checkpoints, and part of a large model's adapter from its file onto the model.

difference   1 GB of bf16 weights and the same with 1 % changed, both in the page cache and mapped anew each time,
             beside the fastest plain loop that reads both files, mapped anew too. Also the memory it takes
             in addition to the files' pages.
load         16 layers of 4096 x 4096, 1 %, bf16, onto a model whose base is known, beside what has to be done in
             any case: the file's bytes read once and the weights' cache lines touched once.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from safetensors.torch import save_file
from torch import nn

import shira
import shira_ops
from benchmarks.speed import common
from benchmarks.speed.bench_switch import TOUCH, machine
from benchmarks.speed.common import BF16, Report, compare, settings
from shira.adapter import _checkpoint

READ = {"read, plain": False, "read, fetching ahead": True}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    side, count = settings.side, 2 if settings.quick else 30
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"{i}.weight": torch.empty(side, side, dtype=BF16).normal_(0, 0.02, generator=generator) for i in range(count)
    }
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    save_file(weights, paths[0])
    for number, weight in enumerate(weights.values()):
        indices = shira_ops.select_random(weight.numel(), weight.numel() // 100, number)
        weight.view(torch.int16).view(-1)[indices.long()] ^= 1
    save_file(weights, paths[1])
    yield paths
    for path in paths:
        path.unlink()


def anonymous() -> int:
    """Bytes of this process that are not pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    return 0


def peak_memory(call: Callable[[], object]) -> int:
    """How far `call` raises this process's own memory, watched every 2 ms."""
    # Memory that earlier calls left in the heap would hide what this one takes.
    ctypes.CDLL(None).malloc_trim(0)
    done, seen, before = threading.Event(), [0], anonymous()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        seen.append(anonymous())
        done.set()
        watcher.join()
    return max(seen) - before


def bench_difference(benchmark: BenchmarkFixture, threads: int, checkpoints: tuple[Path, Path]) -> None:
    base, tuned = map(str, checkpoints)
    made: list[shira.Adapter] = []

    def extract() -> None:
        made.append(shira.Adapter.from_difference(base, tuned))
        del made[:-1]

    def read(ahead: bool) -> None:
        for path in (base, tuned):
            lines = Path(path).stat().st_size // common.LINE
            machine.read(torch.from_file(path, size=lines * common.LINE, dtype=torch.uint8), ahead)

    extract()
    for name, entry in made[0].weights.items():
        one = _checkpoint.map_file(base).tensors[name].tensor().clone()
        two = _checkpoint.map_file(tuned).tensors[name].tensor()
        shira_ops.scatter_(one, entry.indices, entry.values)
        assert torch.equal(one, two)
        assert entry.indices.numel() == one.numel() // 100

    reads = {name: partial(read, ahead) for name, ahead in READ.items()}
    timing = compare(benchmark, ("difference", extract), reads, cold=False, rounds=settings.few(9))
    timing.best("read", list(READ))
    moved = sum(path.stat().st_size for path in checkpoints)
    report = Report(benchmark, threads, bytes_of_files=moved)
    report.seconds(timing)
    report.bandwidth(timing, "difference", moved)
    report.bandwidth(timing, "read", moved)
    report.ratio("difference", "bf16, 1 % changed", timing, "read")
    peaks = []
    for _ in range(3):
        made.clear()
        peaks.append(peak_memory(extract) / 1e6)
    report.result("difference memory", "bf16, 1 % changed", peaks, min(peaks))


class Layers(nn.Module):
    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in weights)


def bench_load_share(benchmark: BenchmarkFixture, threads: int, tmp_path: Path) -> None:
    count = 2 if settings.quick else 16
    layers = (common.layers(BF16) * count)[:count]
    weights = [layer.weight.clone() for layer in layers]
    model = Layers(weights)
    path = tmp_path / "adapter.safetensors"
    entries = {
        f"weights.{i}": shira.Entry(
            layer.indices,
            layer.values,
            tuple(weight.shape),
            BF16,
            fingerprint=int(shira_ops.fingerprint(weight)) % 2**64,
        )
        for i, (layer, weight) in enumerate(zip(layers, weights, strict=True))
    }
    shira.Adapter(entries).save(path)
    switcher = shira.Switcher(model)
    switcher.add("before", path)  # the base's fingerprints are known from here on

    def load() -> None:
        switcher.add("style", path)
        switcher.activate("style")

    def back() -> None:
        if "style" in switcher.adapters:
            switcher.remove("style")

    load()
    for weight, layer in zip(weights, layers, strict=True):
        expected = layer.weight.view(-1).index_copy(0, layer.indices64, layer.values)
        assert torch.equal(weight.view(-1), expected)
    back()
    assert all(torch.equal(weight, layer.weight) for weight, layer in zip(weights, layers, strict=True))

    room = bytearray(path.stat().st_size)

    def read_and_touch(ahead: int) -> None:
        with path.open("rb", buffering=0) as file:
            assert file.readinto(room) == len(room)
        for weight, layer in zip(weights, layers, strict=True):
            machine.touch_(weight, layer.lines, ahead)

    bounds = {name: partial(read_and_touch, ahead) for name, ahead in TOUCH.items()}
    timing = compare(benchmark, ("load", load), bounds, reset=back)
    timing.best("bound", list(TOUCH))
    report = Report(benchmark, threads, layers=count, file_bytes=len(room))
    report.seconds(timing)
    report.ratio("load of bound", "bf16, 1 %", timing, "load", of="bound")
