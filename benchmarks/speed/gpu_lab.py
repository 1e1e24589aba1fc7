"""What the measurements on a GPU share: the device and its clock, a model's weights, adapters for them.

How a comparison is measured
- All ways of one comparison take turns in every round. Before each, untimed, more than the L2 cache holds is read,
  which also keeps the GPU busy while the next launch is prepared. Had it been written, the way that is timed would have
  to write it back. CUDA events take the time (on the CPU a clock).
- Bytes are what a way has to move: touched 32-byte sectors in and out, indices, values and saved once each. A share is
  of the bandwidth at which `copy_` moves 2 GiB, reading and writing counted, measured in the same process.
- "captured" is the same call replayed from a CUDA graph, so without the cost of launches on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.speed.gpu_ops import against_reference, calls
from benchmarks.speed.samples import spread

BF16 = torch.bfloat16
SECTOR = 32  # the least number of bytes that a GPU's memory moves
DENSITY = 0.01
L2_FETCH_LIMIT = 5  # CU_LIMIT_MAX_L2_FETCH_GRANULARITY of cuda.h
GATE, DOWN = 4, 6  # the places of two projections among the weights of a decoder layer
Call = Callable[[], object]


def captured(call: Call) -> Call:
    """The call as a CUDA graph. It is run a few times first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@dataclass
class Found:
    """One measurement: seconds of every way, the bytes it moves, what was proved first."""

    parity: str
    seconds: dict[str, dict[str, float]]
    bytes: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def median(self, way: str) -> float:
        return self.seconds[way]["median"]

    def over(self, subject: str, *ways: str) -> Found:
        """Adds how many times as long as the subject the ways took."""
        ratios = self.facts.setdefault("times as long", {})
        ratios.update({f"{way} / {subject}": self.median(way) / self.median(subject) for way in ways})
        return self


class Bench:
    """A device, its clock, and what is measured on it."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick, self.cuda = device, quick, device == "cuda"
        self.rounds = 3 if quick else 21
        self.scratch = torch.zeros(1 << 9 if quick else 64 << 20, dtype=torch.int64, device=device)

    def once(self, call: Call) -> float:
        """Seconds of one call."""
        self.scratch.amax()
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3

    def time(self, ways: dict[str, Call], rounds: int | None = None) -> dict[str, dict[str, float]]:
        samples: dict[str, list[float]] = {name: [] for name in ways}
        order = list(ways)
        for number in range(2 + (rounds or self.rounds)):  # the first two warm up
            order.append(order.pop(0))  # nobody always follows the same neighbour
            for name in order:
                took = self.once(ways[name])
                if number >= 2:
                    samples[name].append(took)
        return {name: spread(one) for name, one in samples.items()}

    def fastest(self, ways: dict[str, Call]) -> tuple[str, Call]:
        took = self.time(ways, rounds=3)
        name = min(ways, key=lambda one: took[one]["median"])
        return name, ways[name]

    def captured(self, ways: dict[str, Call]) -> dict[str, Call]:
        """The ways, and on a GPU each of them once more as a graph."""
        return {**ways, **({f"{name}, captured": captured(ways[name]) for name in ways} if self.cuda else {})}

    def touch(self, memory: torch.Tensor, pieces: torch.Tensor, size: int) -> tuple[str, Call]:
        """The fastest way to read and write pieces of memory, each once."""
        if not self.cuda or not find_spec("triton"):
            words = memory.view(torch.int64).view(-1, size // 8)
            wide = pieces.long()
            return "index_copy_", lambda: words.index_copy_(0, wide, words.index_select(0, wide))
        from benchmarks.speed.gpu_touch import touch

        ways: dict[str, Call] = {
            f"{words} words, block {block}": functools.partial(touch, memory, pieces, size, words, block)
            for words, block in itertools.product((1, size // 8), (256, 512, 1024, 2048))
        }
        return self.fastest(ways)

    def fetch_granularity(self, size: int | None = None) -> int | None:
        """The most bytes that the L2 cache fetches at once, after setting it to `size`; None without a GPU."""
        if not self.cuda:
            return None
        driver, limit, told = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(L2_FETCH_LIMIT), ctypes.c_size_t()
        torch.cuda.synchronize()  # this thread has torch's context from here on
        if size is not None and (error := driver.cuCtxSetLimit(limit, ctypes.c_size_t(size))):
            raise RuntimeError(f"cuCtxSetLimit(CU_LIMIT_MAX_L2_FETCH_GRANULARITY, {size}) returned {error}")
        if error := driver.cuCtxGetLimit(ctypes.byref(told), limit):
            raise RuntimeError(f"cuCtxGetLimit(CU_LIMIT_MAX_L2_FETCH_GRANULARITY) returned {error}")
        return told.value

    def mask(self, limit: int, density: float = DENSITY) -> torch.Tensor:
        """About `density * limit` ascending indices."""
        parts = []
        for start in range(0, limit, 1 << 28):
            length = min(1 << 28, limit - start)
            drawn = torch.rand(length, device=self.device) < density
            parts.append((drawn.nonzero().view(-1) + start).to(torch.int32))
        return torch.cat(parts)

    def normal(self, *shape: int, scale: float = 0.02) -> torch.Tensor:
        return torch.empty(*shape, dtype=BF16, device=self.device).normal_(0, scale)

    @functools.cached_property
    def model(self) -> Model:
        return Model(self)

    def prove(self, *names: str) -> str:
        """Compares the ops with the references, on more than one block."""
        for granule in (1, 16):
            given = calls(BF16, granule, 96, 208 if self.quick else 2080)
            for name in names:
                against_reference(name, given[name], self.device)
        return "the references' bits"


class Model:
    """The linear weights of Llama-3-8B (quick: 64 times narrower, two layers), as views of one piece of memory."""

    def __init__(self, bench: Bench) -> None:
        small, blocks = (64, 2) if bench.quick else (1, 32)
        wide, narrow, inner = 4096 // small, 1024 // small, 14336 // small
        block = [
            (wide, wide),
            (narrow, wide),
            (narrow, wide),
            (wide, wide),
            (inner, wide),
            (inner, wide),
            (wide, inner),
        ]
        self.shapes = block * blocks
        self.memory = torch.empty(sum(m * n for m, n in self.shapes), dtype=BF16, device=bench.device)
        self.weights, self.starts, start = [], [], 0
        for m, n in self.shapes:
            self.weights.append(self.memory[start : start + m * n].normal_(0, 0.02).view(m, n))
            self.starts.append(start)
            start += m * n
        self.some = range(len(block) * min(4, blocks))  # the layers for lists that need not be a whole model


@dataclass
class Mask:
    """An adapter for some of the model's layers."""

    layers: range
    weights: list[torch.Tensor]
    indices: list[torch.Tensor]
    values: list[torch.Tensor]
    granule: int

    @classmethod
    def of(cls, bench: Bench, layers: range, granule: int = 1) -> Mask:
        weights = [bench.model.weights[i] for i in layers]
        indices = [bench.mask(weight.numel() // granule) for weight in weights]
        values = [bench.normal(len(one) * granule) for one in indices]
        return cls(layers, weights, indices, values, granule)

    @property
    def nnz(self) -> int:
        return sum(map(torch.numel, self.values))

    @property
    def lists(self) -> int:
        """Bytes of the indices."""
        return sum(one.nbytes for one in self.indices)

    def pieces(self, bench: Bench, size: int, *more: Mask) -> torch.Tensor:
        """The pieces of the model's memory, of `size` bytes each, that this mask (and more of them) touches."""
        found = []
        for at, layer in enumerate(self.layers):
            first = bench.model.starts[layer] * BF16.itemsize
            own = [(one.indices[at].long() * one.granule * BF16.itemsize + first) // size for one in (self, *more)]
            found.append((own[0].unique_consecutive() if not more else torch.cat(own).unique()).to(torch.int32))
        return torch.cat(found)


def entries_of(index: torch.Tensor, granule: int) -> torch.Tensor:
    """The entries that granules cover, in order, as plain torch wants them."""
    return (index.long()[:, None] * granule + torch.arange(granule).to(index)).view(-1)


def clear() -> None:
    """Gives memory that nothing uses any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
