"""What every speed benchmark shares: layers that do not fit the caches, and honest comparisons.

How a comparison is measured
- The op and what it is compared with run in the same process, on torch's own threads, one after the other in every
  round, so that a change of the machine's speed hits both. The ratio is the median of the rounds' own ratios.
- One sample is a sweep over several layers with a mask each, together over 300 MB of weights. Before every sweep the
  caches are filled with modified lines of a buffer twice their size, so that each call finds its weight, indices and
  values in memory, and the caches as the layer before left them.
- Before anything is timed, the answer of the op is compared with plain torch's, bit for bit, and uncounted rounds
  are run until the heap has grown to what all ways need: see heap.py.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import shira_ops  # noqa: F401  (registers torch.ops.shira)
from benchmarks.speed import heap, native
from benchmarks.speed.samples import spread

native.load()

LINE = 64  # bytes of a cache line
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass
class Settings:
    """How much is measured: set by conftest.py from the command line."""

    quick: bool = False
    full: bool = False
    samples: int | None = None  # from the command line

    @property
    def rounds(self) -> int:
        """The least number of samples of a comparison."""
        return self.few(19)

    def few(self, count: int) -> int:
        """The number of samples of a slow comparison: `count`, unless the command line says how many."""
        return self.samples or (min(3, count) if self.quick else count)

    @property
    def side(self) -> int:
        """Rows and columns of a layer."""
        return 256 if self.quick else 4096

    @property
    def working_set(self) -> int:
        """The least number of bytes of weights in one sweep."""
        return 1 << 20 if self.quick else 384 << 20

    @property
    def calls(self) -> int:
        """Calls in one sample of a benchmark of call overhead."""
        return 20 if self.quick else 2000


settings = Settings()
CORES = len(os.sched_getaffinity(0))
THREADS = sorted({min(1 << i, CORES) for i in range(CORES.bit_length() + 1)})  # 1, 2, 4 ... and all


def dtype_name(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP32: "fp32"}[dtype]


# Layers


@dataclass
class Layer:
    """A weight, an adapter for it, and what the baselines need: a LoRA of the same size and the cache lines."""

    weight: torch.Tensor
    indices: torch.Tensor  # int32, of granules
    indices64: torch.Tensor  # the same for plain torch, which takes only int64
    values: torch.Tensor
    saved: torch.Tensor
    lines: torch.Tensor  # int32: the cache lines that the entries lie in
    lora_b: torch.Tensor
    lora_a: torch.Tensor
    granule: int

    @property
    def granules(self) -> torch.Tensor:
        """The weight as plain torch wants it: a vector, or a row for each granule."""
        return self.weight.view(-1) if self.granule == 1 else self.weight.view(-1, self.granule)

    def shaped(self, entries: torch.Tensor) -> torch.Tensor:
        """`values` or `saved` in the shape that goes with `granules`."""
        return entries if self.granule == 1 else entries.view(-1, self.granule)


def random_indices(rng: np.random.Generator, limit: int, count: int) -> torch.Tensor:
    chosen = rng.choice(limit, size=count, replace=False, shuffle=False)
    return torch.from_numpy(np.sort(chosen).astype(np.int32))


def line_numbers(indices: torch.Tensor, granule: int, itemsize: int) -> torch.Tensor:
    first = indices.to(torch.int64) * (granule * itemsize)
    starts = [(first + at) // LINE for at in range(0, granule * itemsize, LINE)] or [first // LINE]
    ends = (first + granule * itemsize - 1) // LINE
    return torch.unique(torch.cat([*starts, ends])).to(torch.int32)


def whole_lines(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, without those of a last cache line that is not full."""
    flat = tensor.view(torch.uint8)
    return flat[: len(flat) // LINE * LINE]


@functools.cache
def weights(dtype: torch.dtype, side: int, working_set: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = max(2, -(-working_set // (side * side * dtype.itemsize)))
    return [torch.empty(side, side, dtype=dtype).normal_(0, 0.02, generator=generator) for _ in range(count)]


@functools.cache
def layers(dtype: torch.dtype, granule: int = 1, density: float = 0.01) -> list[Layer]:
    """Layers with together at least `settings.working_set` bytes of weights, each with a random mask of its own."""
    rng = np.random.default_rng(granule)
    generator = torch.Generator().manual_seed(granule)
    side = settings.side
    rank = lora_rank(density)
    made = []
    for weight in weights(dtype, side, settings.working_set):
        limit = weight.numel() // granule
        indices = random_indices(rng, limit, max(1, round(density * limit)))
        nnz = len(indices) * granule
        made.append(
            Layer(
                weight=weight,
                indices=indices,
                indices64=indices.to(torch.int64),
                values=torch.empty(nnz, dtype=dtype).normal_(0, 0.02, generator=generator),
                saved=torch.zeros(nnz, dtype=dtype),
                lines=line_numbers(indices, granule, dtype.itemsize),
                lora_b=torch.empty(side, rank, dtype=dtype).normal_(0, 0.01, generator=generator),
                lora_a=torch.empty(rank, side, dtype=dtype).normal_(0, 0.01, generator=generator),
                granule=granule,
            )
        )
    return made


def lora_rank(density: float = 0.01) -> int:
    """The largest LoRA rank with no more parameters, r * (m + n) <= density * m * n: 20 for 1 % of 4096 x 4096."""
    return max(1, int(density * settings.side / 2))


def switched_bytes(some: list[Layer]) -> int:
    """The bytes that a switch of these layers has to move: touched lines in and out; indices, values and saved once."""
    return sum(
        2 * LINE * len(layer.lines)
        + sum(t.numel() * t.element_size() for t in (layer.indices, layer.values, layer.saved))
        for layer in some
    )


# Timing


@functools.cache
def cache_bytes() -> int:
    """The size of the largest cache that a core can use; 32 MB where the machine does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=32 << 20)


@functools.cache
def scratch() -> torch.Tensor:
    return torch.zeros(1 << 14 if settings.quick else 2 * cache_bytes(), dtype=torch.uint8)


def chill() -> None:
    """Fills every cache with modified lines of other data."""
    torch.ops.shira_bench.chill_(scratch())


def sweep(call: Callable[..., object], arguments: Iterable[tuple[Any, ...]]) -> Callable[[], None]:
    """A function that calls `call` with each of `arguments`: one sample."""
    prepared = list(arguments)

    def run() -> None:
        for one in prepared:
            call(*one)

    return run


@dataclass
class Steps:
    """Calls that follow one another, timed together and one by one: load, then fuse, then take it out again."""

    calls: dict[str, Callable[[], object]]
    seconds: dict[str, list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self.seconds = {name: [] for name in self.calls}

    def __call__(self) -> None:
        for name, call in self.calls.items():
            start = time.perf_counter()
            call()
            self.seconds[name].append(time.perf_counter() - start)


@dataclass
class Timing:
    """Seconds of the interleaved samples of one comparison: the i-th samples of all names are of the same round."""

    samples: dict[str, list[float]]
    subject: str
    faults: dict[str, list[int]] = field(default_factory=dict)
    on_cpu: dict[str, list[float]] = field(default_factory=dict)  # the share of its time that a sample was running
    aliases: dict[str, str] = field(default_factory=dict)

    def of(self, name: str) -> list[float]:
        return self.samples[self.aliases.get(name, name)]

    def best(self, name: str, candidates: list[str]) -> None:
        """From now on `name` means the fastest of the candidates."""
        fastest = min(candidates, key=lambda one: statistics.median(self.samples[one]))
        self.aliases[name] = fastest

    def ratios(self, name: str, of: str | None = None) -> list[float]:
        """How many times as long as the subject (or `of`) `name` took, round by round."""
        return [a / b for a, b in zip(self.of(name), self.of(of or self.subject), strict=True)]


WARM_UPS = 6  # the most rounds that do not count
FAULT = 2e-6  # seconds that a page fault costs
CHEAP, MOST = 1.0, 49  # quick comparisons get as many samples as fit into a second, up to MOST


def warm_up(one_round: Callable[[], object]) -> float:
    """Rounds that do not count, until page faults take less than a hundredth of one: then the heap has grown.

    A way that maps a file anew each time has faults in every round; it gets all of these rounds. Returns the seconds
    of the last one.
    """
    seconds = 0.0
    for _ in range(1 if settings.quick else min(WARM_UPS, settings.samples or WARM_UPS)):
        before, start = heap.faults(), time.perf_counter()
        one_round()
        seconds = time.perf_counter() - start
        if FAULT * (heap.faults() - before) < 0.01 * seconds:
            break
    return seconds


def compare(
    benchmark: BenchmarkFixture,
    subject: tuple[str, Callable[[], None]],
    baselines: dict[str, Callable[[], None]],
    *,
    cold: bool = True,
    rounds: int | None = None,
    reset: Callable[[], None] | None = None,
) -> Timing:
    """Runs the subject under pytest-benchmark; the baselines are timed in the set-up of each round, so all take turns.

    `reset`, untimed, takes back what the subject did. Where a way is `Steps`, each step is timed too, as "way: step".
    """
    name, run = subject
    ways = {name: run, **baselines}
    samples: dict[str, list[float]] = {one: [] for one in baselines}
    faults: dict[str, list[int]] = {one: [] for one in ways}
    on_cpu: dict[str, list[float]] = {one: [] for one in ways}
    order = list(baselines)

    def counted(way: str) -> None:
        before, ran, start = heap.faults(), time.thread_time(), time.perf_counter()
        ways[way]()
        on_cpu[way].append((time.thread_time() - ran) / (time.perf_counter() - start))
        faults[way].append(heap.faults() - before)

    def baselines_first() -> None:
        if reset is not None:
            reset()
        order.append(order.pop(0)) if order else None  # so that none always follows the same one
        for one in order:
            if cold:
                chill()
            start = time.perf_counter()
            counted(one)
            samples[one].append(time.perf_counter() - start)
        if cold:
            chill()

    def one_round() -> None:
        baselines_first()
        counted(name)

    seconds = warm_up(one_round)
    count = rounds or settings.rounds
    if settings.samples is None and not settings.quick:
        count = max(count, min(MOST, int(CHEAP / seconds)))
    steps = {way: call for way, call in ways.items() if isinstance(call, Steps)}
    for lists in (samples, faults, on_cpu, *(call.seconds for call in steps.values())):
        for one in lists.values():
            one.clear()
    benchmark.pedantic(counted, args=(name,), setup=baselines_first, rounds=count)
    if benchmark.stats is None:
        pytest.skip("--benchmark-disable: nothing was measured")
    timed = {name: list(benchmark.stats.stats.data), **samples}
    for way, call in steps.items():
        timed |= {f"{way}: {step}": taken for step, taken in call.seconds.items()}
    return Timing(timed, name, faults, on_cpu)


class Report:
    """What a benchmark found. It is kept in `extra_info`, and so in the JSON: see summary.py."""

    def __init__(self, benchmark: BenchmarkFixture, threads: int, **about: object) -> None:
        self.info = benchmark.extra_info
        self.info.update(
            threads=threads, quick=settings.quick, load=os.getloadavg()[0], results=[], seconds={}, **about
        )

    def seconds(self, timing: Timing, calls: int = 1) -> None:
        """Seconds per call, for everything that was timed."""
        for name, samples in timing.samples.items():
            self.info["seconds"][name] = spread([sample / calls for sample in samples])
        self.info["page_faults"] = {name: statistics.median(found) / calls for name, found in timing.faults.items()}
        if timing.on_cpu:
            self.info["on_cpu"] = min(map(statistics.fmean, timing.on_cpu.values()))
        self.info["fastest"] = dict(timing.aliases)

    def bandwidth(self, timing: Timing, name: str, moved: int) -> None:
        self.info.setdefault("bytes", {})[name] = moved
        self.info.setdefault("gigabytes_per_second", {})[name] = moved / statistics.median(timing.of(name)) / 1e9

    def ratio(self, line: str, variant: str, timing: Timing, name: str, of: str | None = None) -> None:
        """How many times as long as the subject (or `of`) `name` took. Also the ratio of the
        fastest rounds, which are the least disturbed on a busy machine."""
        best = min(timing.of(name)) / min(timing.of(of or timing.subject))
        self.result(line, variant, timing.ratios(name, of), best)

    def share(self, line: str, variant: str, timing: Timing, whole: str) -> None:
        """The subject in percent of `whole`."""
        best = 100 * min(timing.of(timing.subject)) / min(timing.of(whole))
        self.result(line, variant, [100 / ratio for ratio in timing.ratios(whole)], best)

    def result(self, line: str, variant: str, samples: list[float], best: float) -> None:
        """A measured value for one of summary.LINES."""
        self.info["results"].append({"line": line, "variant": variant, "best": best, **spread(samples)})
