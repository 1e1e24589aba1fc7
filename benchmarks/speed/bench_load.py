"""From a file to a switched model: shira beside PEFT's own SHiRA, with the same adapter on the same layers.

Both find their file in the page cache and their model in memory. shira reads, checks (the file, its indices and, for
the first adapter, the base's fingerprint) and switches on; PEFT loads and merges. The plain way checks nothing: stock
safetensors with int64 indices, and index_copy_. The bound of the first adapter is what has to be done in any case: the
file's bytes and the base read once, and the weights' cache lines touched once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.speed import common
from benchmarks.speed.common import BF16, FP32, Report, chill, settings, warm_up

peft = pytest.importorskip("peft")
shira = pytest.importorskip("shira")

LAYERS = 4
FIRST, LATER = "shira, first adapter", "shira, later adapter"
LOAD, MERGE, PEFT = "PEFT load_adapter", "PEFT merge", "PEFT load_adapter + merge"
PLAIN = "safetensors + index_copy_"
BOUNDS = {f"read and touch, {ahead} ahead": ahead for ahead in (0, 64, 96, 128)}
machine = torch.ops.shira_bench


class Layers(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        side = settings.side
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(side, side, bias=False, dtype=dtype) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Peft:
    """A PEFT model with an adapter on disk that is not loaded."""

    def __init__(self, dtype: torch.dtype, folder: Path) -> None:
        self.rank = common.lora_rank()
        config = peft.ShiraConfig(r=self.rank, target_modules=r"layers\.\d+", random_seed=1)
        made = peft.get_peft_model(Layers(dtype), config)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "shira_weight" in name:
                    parameter.normal_(0, 0.01)
        made.save_pretrained(str(folder))
        self.folder = str(folder)
        self.model = peft.get_peft_model(Layers(dtype), peft.ShiraConfig(r=1, target_modules=r"layers\.\d+"))
        self.tuned = [layer for layer in self.model.modules() if isinstance(layer, peft.tuners.shira.layer.Linear)]
        self.base = [layer.get_base_layer().weight.detach().clone() for layer in self.tuned]

    def switch(self) -> tuple[float, float]:
        """Seconds to load and to merge."""
        start = time.perf_counter()
        self.model.load_adapter(self.folder, "other")
        loaded = time.perf_counter()
        self.model.base_model.merge_adapter(["other"])
        return loaded - start, time.perf_counter() - loaded

    def entries(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The merged weights and the indices that changed them."""
        side = settings.side
        indices = []
        for layer in self.tuned:
            rows, columns = layer.shira_indices["other"].to(torch.int64)
            indices.append((rows * side + columns).sort().values)
        return [layer.get_base_layer().weight.detach().clone() for layer in self.tuned], indices

    def reset(self) -> None:
        for layer, base in zip(self.tuned, self.base, strict=True):
            layer.merged_adapters.clear()
            layer.get_base_layer().weight.data.copy_(base)  # since unmerge() leaves rounding errors
        self.model.delete_adapter("other")


def our_file(model: nn.Module, merged: list[torch.Tensor], indices: list[torch.Tensor], path: Path) -> None:
    weights = {}
    for (name, weight), tuned, index in zip(model.named_parameters(), merged, indices, strict=True):
        weights[name] = shira.Entry(
            indices=index.to(torch.int32),
            values=tuned.view(-1)[index],
            shape=tuple(weight.shape),
            dtype=weight.dtype,
            fingerprint=int(torch.ops.shira.fingerprint(weight.detach())) % 2**64,
        )
    shira.Adapter(weights).save(path)


def plain_file(merged: list[torch.Tensor], indices: list[torch.Tensor], path: Path) -> None:
    tensors = {}
    for number, (tuned, index) in enumerate(zip(merged, indices, strict=True)):
        tensors[f"{number}.indices"], tensors[f"{number}.values"] = index, tuned.view(-1)[index]
    save_file(tensors, str(path))


def plain_switch(model: nn.Module, path: Path) -> list[torch.Tensor]:
    """Keeps the base's entries, as every switch that can be taken back must."""
    tensors = load_file(str(path))
    saved = []
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            index, flat = tensors[f"{number}.indices"], weight.view(-1)
            saved.append(flat.index_select(0, index))
            flat.index_copy_(0, index, tensors[f"{number}.values"])
    return saved


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("dtype", [BF16, pytest.param(FP32, marks=pytest.mark.full)], ids=common.dtype_name)
def bench_load(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """The first adapter makes the Switcher and reads the base for its fingerprint; later ones find both there."""
    theirs = Peft(dtype, tmp_path / "peft")
    theirs.switch()
    merged, indices = theirs.entries()
    theirs.reset()
    model = Layers(dtype)
    base = [weight.detach().clone() for weight in model.parameters()]
    ours, plain = tmp_path / "ours.safetensors", tmp_path / "plain.safetensors"
    our_file(model, merged, indices, ours)
    plain_file(merged, indices, plain)

    # Fingerprints of a base are remembered while a Switcher on it is alive, so the later adapter has its own model.
    served = Layers(dtype)
    kept = shira.Switcher(served)
    kept.add("before", ours)
    used: list[shira.Switcher] = []

    def switch(switcher: shira.Switcher) -> None:
        used.append(switcher)
        switcher.add("style", ours)
        switcher.activate("style")

    def first() -> None:
        switch(shira.Switcher(model))

    def later() -> None:
        switch(kept)

    def back() -> None:
        while used:
            switcher = used.pop()
            switcher.deactivate()
            switcher.remove("style")

    def is_now(expected: list[torch.Tensor], where: nn.Module = model) -> bool:
        return all(torch.equal(weight, one) for weight, one in zip(where.parameters(), expected, strict=True))

    for way, where in ((first, model), (later, served)):  # the same weights as PEFT's, and then the base again
        way()
        assert is_now(merged, where)
        back()
        assert is_now(base, where)
    plain_switch(model, plain)
    assert is_now(merged)
    restore(model, base)

    lines = [common.line_numbers(one, 1, dtype.itemsize) for one in indices]
    room = bytearray(ours.stat().st_size)

    def read_and_touch(ahead: int) -> None:
        with ours.open("rb", buffering=0) as file:
            assert file.readinto(room) == len(room)
        for weight in model.parameters():
            machine.read(weight.detach().view(-1).view(torch.uint8), False)
        for weight, touched in zip(model.parameters(), lines, strict=True):
            machine.touch_(weight.detach(), touched, ahead)

    names = (FIRST, LATER, LOAD, MERGE, PEFT, PLAIN, *BOUNDS)
    seconds: dict[str, list[float]] = {name: [] for name in names if name != FIRST}

    def before() -> None:
        back()
        chill()
        load, merge = theirs.switch()
        seconds[LOAD].append(load)
        seconds[MERGE].append(merge)
        seconds[PEFT].append(load + merge)
        theirs.reset()
        chill()
        seconds[PLAIN].append(timed(lambda: plain_switch(model, plain)))
        for bound, ahead in BOUNDS.items():
            chill()
            seconds[bound].append(timed(partial(read_and_touch, ahead)))
        restore(model, base)
        chill()
        seconds[LATER].append(timed(later))
        back()
        chill()

    def one_round() -> None:
        before()
        first()

    warm_up(one_round)
    for samples in seconds.values():
        samples.clear()
    benchmark.pedantic(first, setup=before, rounds=settings.few(5))
    back()
    assert is_now(base)
    assert is_now(base, served)
    if benchmark.stats is None:
        pytest.skip("--benchmark-disable: nothing was measured")
    timing = common.Timing({FIRST: list(benchmark.stats.stats.data), **seconds}, FIRST)
    timing.best("bound", list(BOUNDS))
    report = Report(
        benchmark,
        threads,
        dtype=common.dtype_name(dtype),
        layers=LAYERS,
        rank=theirs.rank,
        nnz=len(indices[0]),
        file_bytes={
            "shira": ours.stat().st_size,
            "PEFT": sum(file.stat().st_size for file in (tmp_path / "peft").rglob("*.safetensors")),
            "plain": plain.stat().st_size,
        },
    )
    report.seconds(timing)
    name = common.dtype_name(dtype)
    report.ratio("first of bound", name, timing, FIRST, of="bound")
    for way, variant in ((FIRST, f"{name}, first adapter"), (LATER, f"{name}, later adapter")):
        report.ratio("load", variant, timing, PEFT, of=way)
        report.ratio("load over plain", variant, timing, PLAIN, of=way)


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def restore(model: nn.Module, base: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for weight, one in zip(model.parameters(), base, strict=True):
            weight.copy_(one)
