"""The paper's figures measured again (arXiv 2406.13175v2): Fig. 7, Tables 5 and 6. For Table 7 see bench_training.py.

Fig. 7: the time to fuse a LoRA over the time to switch, for square weights from 512 to 8192, the mean of many weights
of a size. The paper's pair is W + A B over Tensor.scatter_; the fast pair beside it is addmm_ over swap_.

Tables 5 and 6: load, fuse, unfuse and unload on the shapes of SDXL's attention (560 weights) and of LLaMA2-7B's q, k,
v, up and down (160 weights), in bf16, the adapter's file in the page cache. A share of the layers is measured, and
larger shares beside it show that the seconds grow in proportion.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.speed import common
from benchmarks.speed.bench_peers import switched_on
from benchmarks.speed.common import BF16, FP32, Report, Steps, compare, settings, sweep

pytest.importorskip("peft")
from benchmarks.speed import peers

shira = torch.ops.shira
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP32], ids=common.dtype_name)
MOST = 50  # weights of each size, as many as in the paper
DENSITY, RANK = 0.01, 32


def densities() -> list[float]:
    return [0.01, 0.02, 0.05] if settings.full else [DENSITY]


def ranks() -> list[int]:
    return [8, RANK, 128] if settings.full else [RANK]


class Square:
    """A weight, a mask of each density, a LoRA of each rank."""

    def __init__(self, side: int, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 0.02) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype).normal_(0, scale, generator=generator)

        numel = side * side
        self.weight = normal(side, side)
        self.fused = self.weight.clone()  # a weight of its own: a LoRA is never taken out again, so it drifts
        self.indices = {
            density: shira.select_random(numel, max(1, round(density * numel)), seed) for density in densities()
        }
        self.indices64 = {density: one.to(torch.int64) for density, one in self.indices.items()}
        self.values = {density: normal(len(one)) for density, one in self.indices.items()}
        self.lora = {rank: (normal(side, rank, scale=1e-3), normal(rank, side, scale=1e-3)) for rank in ranks()}

    def swap(self, density: float) -> None:
        shira.swap_(self.weight, self.indices[density], self.values[density])

    def scatter(self, density: float) -> None:
        self.weight.view(-1).scatter_(0, self.indices64[density], self.values[density])

    def addmm(self, rank: int) -> None:
        self.fused.addmm_(*self.lora[rank])

    def sum(self, rank: int) -> None:
        b, a = self.lora[rank]
        self.fused += b @ a

    def prove(self) -> None:
        base, values = self.weight.clone(), {density: one.clone() for density, one in self.values.items()}
        for density in self.indices:
            self.swap(density)
            swapped = self.weight.clone()
            assert torch.equal(self.values[density], base.view(-1)[self.indices64[density]])
            self.values[density].copy_(values[density])
            self.weight.copy_(base)
            self.scatter(density)
            assert torch.equal(self.weight, swapped)
            self.weight.copy_(base)
        for rank, (b, a) in self.lora.items():
            expected = base.float() + b.float() @ a.float()
            for way in (self.addmm, self.sum):
                self.fused.copy_(base)
                way(rank)
                torch.testing.assert_close(self.fused.float(), expected, rtol=2e-2, atol=1e-3)
        self.fused.copy_(base)


@pytest.mark.parametrize("side", [512, 1024, 2048, 4096, 8192])
@DTYPES
def bench_fig7(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype, side: int) -> None:
    size = side * side * dtype.itemsize
    actual = max(8, side // 16) if settings.quick else side
    count = 2 if settings.quick else min(MOST, max(2, settings.working_set // (2 * size)))
    some = [Square(actual, dtype, seed) for seed in range(count)]
    some[0].prove()
    switches = {f"swap_ {d:.0%}": sweep(Square.swap, [(one, d) for one in some]) for d in densities()}
    ways = {f"scatter_ {d:.0%}": sweep(Square.scatter, [(one, d) for one in some]) for d in densities()}
    for rank in ranks():
        ways[f"addmm_ r={rank}"] = sweep(Square.addmm, [(one, rank) for one in some])
        ways[f"W += B @ A r={rank}"] = sweep(Square.sum, [(one, rank) for one in some])
    subject = f"swap_ {DENSITY:.0%}"
    run = switches.pop(subject)
    timing = compare(benchmark, (subject, run), {**switches, **ways}, rounds=settings.few(7))
    name = common.dtype_name(dtype)
    report = Report(benchmark, threads, dtype=name, side=side, weights=len(some))
    report.seconds(timing, len(some))
    for density in densities():
        for rank in ranks():
            variant = f"{side}, {name}, r={rank}, {density:.0%}"
            report.ratio(
                "fig. 7, the paper's pair", variant, timing, f"W += B @ A r={rank}", of=f"scatter_ {density:.0%}"
            )
            report.ratio("fig. 7, the fast pair", variant, timing, f"addmm_ r={rank}", of=f"swap_ {density:.0%}")


def sdxl() -> list[tuple[int, int]]:
    """One tenth of the attention of SDXL's UNet: to_q, to_k, to_v and to_out of self- and cross-attention.

    7 of its 70 transformer layers: 1 of the 10 that are 640 wide, 6 of the 60 that are 1280 wide. Text is 2048 wide.
    """
    shapes = []
    for wide in (640, *[1280] * 6):
        shapes += [(wide, wide)] * 6 + [(wide, 2048)] * 2
    return shapes


def llama() -> list[tuple[int, int]]:
    """q, k, v, up and down of one of LLaMA2-7B's 32 layers."""
    return [(4096, 4096)] * 3 + [(11008, 4096), (4096, 11008)]


# The layers of one share, how many shares make up the model, and the rank: those of the paper for pictures and text.
MODELS = {"SDXL": (sdxl, 10, 64), "LLaMA2-7B": (llama, 32, 32)}
CASES = [
    pytest.param(model, parts, id=f"{model}-{parts} of {MODELS[model][1]}", marks=[pytest.mark.full] if full else [])
    for model, parts, full in (
        ("SDXL", 1, False),
        ("SDXL", 2, False),
        ("SDXL", 5, True),
        ("LLaMA2-7B", 1, False),
        ("LLaMA2-7B", 2, True),
        ("LLaMA2-7B", 4, True),
    )
]


@pytest.mark.parametrize(("model", "parts"), CASES)
def bench_end_to_end(benchmark: BenchmarkFixture, threads: int, model: str, parts: int, tmp_path: Path) -> None:
    part, of, rank = MODELS[model]
    shapes = part()[:8] if settings.quick else part()
    generator = torch.Generator().manual_seed(0)
    shrunk = 16 if settings.quick else 1
    weights = [
        torch.empty(m // shrunk, n // shrunk, dtype=BF16).normal_(0, 0.02, generator=generator)
        for m, n in shapes * parts
    ]
    # A Switcher reads a base again if anyone else has written to it, and a LoRA does not leave a base as it was: each
    # way has its own.
    fresh, others_own = ([weight.clone() for weight in weights] for _ in range(2))
    made = peers.adapter(weights)
    wanted = peers.adapted(weights, made)
    ours = peers.our_cycle(weights, made, tmp_path / "ours")
    first = peers.our_cycle(fresh, made, tmp_path / "first", first=True)
    plain = peers.plain_cycle(others_own, made, tmp_path / "plain")
    for cycle, where in ((ours, weights), (first, fresh), (plain, others_own)):
        peers.prove_cycle(cycle, where, wanted)
    del wanted
    others = {
        "shira, first adapter": first,
        "safetensors + index_copy_": plain,
        "addmm_": peers.addmm_cycle(others_own, rank, tmp_path / "addmm"),
        peers.LORA: peers.peft_cycle(peers.LORA, others_own, rank, tmp_path / "lora"),
    }
    peers.prove_cycle(others["addmm_"], others_own, None)
    peers.prove_cycle(others[peers.LORA], others_own, None)
    ways: dict[str, Callable[[], None]] = {name: Steps(cycle.steps()) for name, cycle in others.items()}
    timing = compare(benchmark, ("shira", Steps(ours.steps())), ways, rounds=settings.few(7))
    share = Fraction(parts, of)
    report = Report(
        benchmark,
        threads,
        model=model,
        share=[parts, of],
        rank=rank,
        shapes=[list(weight.shape) for weight in weights],
        weight_bytes=sum(weight.nbytes for weight in weights),
        nnz=made.nnz,
        file_bytes={name: one.file_bytes for name, one in {"shira": ours, **others}.items()},
    )
    for name in ("shira", *others):
        timing.samples[name] = switched_on(timing, name)
    report.seconds(timing)
    for name in ways:
        report.ratio("end to end", f"{model}, {share} of it, over {name}", timing, name)
