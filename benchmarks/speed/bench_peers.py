"""Every other way to put an adapter into weights, beside `swap_`: each by its name, and each actually run.

A mask of 1 % on layers of 4096 x 4096, or a LoRA of as many parameters. Those of plain torch keep the base's entries,
as swap_ does, and can bring them back. All others add to the base, and no subtraction brings its bits back: they do
less, and are listed separately.

index_copy_, put_, index_put_, scatter_    plain torch; index_select keeps what they overwrite
W += COO, W += CSR    adding one of torch's sparse tensors, which holds the difference
addmm_                W.addmm_(B, A, alpha=s): the LoRA fuse in place, without a temporary
W += s * (B @ A)      the LoRA fuse as it is usually written
PEFT ...              merge_adapter and unmerge_adapter of its LoRA, its SHiRA and its Super-Tuning
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.speed import common
from benchmarks.speed.bench_switch import touch
from benchmarks.speed.common import BF16, FP32, Layer, Report, Steps, compare, settings, sweep

pytest.importorskip("peft")
from benchmarks.speed import peers

shira = torch.ops.shira
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP32], ids=common.dtype_name)
LAYERS = 4  # PEFT is slow, and each of its models needs its own weights
SCALE = 0.01  # of a LoRA
LORA_WAYS = ["addmm_", "W += s * (B @ A)", f"{peers.LORA}: merge"]


def keeping(write: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]) -> Callable[[Layer], None]:
    def way(layer: Layer) -> None:
        flat = layer.weight.view(-1)
        torch.index_select(flat, 0, layer.indices64, out=layer.saved)
        write(flat, layer.indices64, layer.values)

    return way


PLAIN = {
    "index_copy_": keeping(lambda flat, indices, values: flat.index_copy_(0, indices, values)),
    "put_": keeping(lambda flat, indices, values: flat.put_(indices, values)),
    "index_put_": keeping(lambda flat, indices, values: flat.index_put_((indices,), values)),
    "scatter_": keeping(lambda flat, indices, values: flat.scatter_(0, indices, values)),
}


def textbook(layer: Layer) -> None:
    layer.weight += (layer.lora_b @ layer.lora_a) * SCALE


def sparse(layer: Layer) -> torch.Tensor:
    """The difference that the adapter makes."""
    difference = layer.values - layer.weight.view(-1)[layer.indices64]
    at = torch.stack([layer.indices64 // layer.weight.shape[1], layer.indices64 % layer.weight.shape[1]])
    return torch.sparse_coo_tensor(at, difference, layer.weight.shape, is_coalesced=True, check_invariants=True)


def prove(layer: Layer, differences: dict[str, torch.Tensor]) -> None:
    """All of plain torch gives swap_'s bits; the sparse sums and the usual LoRA fuse agree up to their roundings."""
    base, values = layer.weight.clone(), layer.values.clone()
    shira.swap_(layer.weight, layer.indices, layer.values)
    wanted, kept = layer.weight.clone(), layer.values.clone()
    assert not torch.equal(wanted, base)
    layer.values.copy_(values)
    for way in PLAIN.values():
        layer.weight.copy_(base)
        way(layer)
        assert torch.equal(layer.weight, wanted)
        assert torch.equal(layer.saved, kept)
    for difference in differences.values():
        layer.weight.copy_(base)
        layer.weight.add_(difference)
        torch.testing.assert_close(layer.weight, wanted, rtol=2e-2, atol=1e-3)
    layer.weight.copy_(base)
    textbook(layer)
    expected = base.float() + SCALE * (layer.lora_b.float() @ layer.lora_a.float())
    torch.testing.assert_close(layer.weight, expected.to(base.dtype), rtol=2e-2, atol=1e-4)
    layer.weight.copy_(base)


@pytest.mark.filterwarnings("ignore:Sparse")
@DTYPES
def bench_ways(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype) -> None:
    # Other values for each number of threads: those of the case before may still be in the weights.
    generator = torch.Generator().manual_seed(threads)
    some = [
        Layer(**{**vars(one), "values": torch.empty_like(one.values).normal_(0, 0.02, generator=generator)})
        for one in common.layers(dtype)[:LAYERS]
    ]
    coo = [sparse(one) for one in some]
    csr = [one.to_sparse_csr() for one in coo]
    prove(some[0], {"COO": coo[0], "CSR": csr[0]})
    ways: dict[str, Callable[[], None]] = {name: sweep(way, [(one,) for one in some]) for name, way in PLAIN.items()}
    for name, differences in (("W += COO", coo), ("W += CSR", csr)):
        # It has its own weights, since it does not take back what it adds.
        weights = [one.weight.clone() for one in some]
        ways[name] = sweep(torch.Tensor.add_, list(zip(weights, differences, strict=True)))
    drifting = [Layer(**{**vars(one), "weight": one.weight.clone()}) for one in some]
    ways["addmm_"] = sweep(lambda one: one.weight.addmm_(one.lora_b, one.lora_a, alpha=SCALE), [(o,) for o in drifting])
    ways["W += s * (B @ A)"] = sweep(textbook, [(one,) for one in drifting])
    for kind in (peers.LORA, peers.SHIRA, peers.SUPER):
        made = peers.model(kind, [one.weight.clone() for one in some], common.lora_rank())
        peers.shrink(made)
        peers.prove_merge(made)
        ways[kind] = Steps({"merge": made.base_model.merge_adapter, "unmerge": made.base_model.unmerge_adapter})
    swaps = sweep(shira.swap_, [(one.weight, one.indices, one.values) for one in some])
    bounds = touch(some)
    timing = compare(benchmark, ("swap_", swaps), {**ways, **bounds}, rounds=settings.few(9))
    timing.best("touch", list(bounds))
    name = common.dtype_name(dtype)
    report = Report(benchmark, threads, dtype=name, layers=len(some), nnz=some[0].values.numel(),
                    lora_rank=common.lora_rank())  # fmt: skip
    report.seconds(timing, len(some))
    others = [way for way in timing.samples if way != "swap_" and way not in bounds]
    single = [way for way in others if not isinstance(ways.get(way), Steps)]
    for way in single:
        report.ratio(f"swap_ over ways {name}", way, timing, way)
    best = {"exact": list(PLAIN), "LoRA": LORA_WAYS, "lossy": [way for way in single if way not in PLAIN]}
    for kind, candidates in best.items():
        timing.best(kind, candidates)
        report.ratio(f"swap_ over best {kind} {name}", "", timing, kind)
    report.info["fastest"] = dict(timing.aliases)


@DTYPES
def bench_warm(benchmark: BenchmarkFixture, threads: int, dtype: torch.dtype) -> None:
    """A layer so small that the caches hold it, switched again and again. All other cases here are on cold caches."""
    side, calls = 512, settings.calls // 10
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 0.02) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype).normal_(0, scale, generator=generator)

    indices = shira.select_random(side * side, side * side // 100, 0)
    rank = max(1, side // 200)
    layer = Layer(
        weight=normal(side, side),
        indices=indices,
        indices64=indices.to(torch.int64),
        values=normal(len(indices)),
        saved=normal(len(indices)),
        lines=indices[:0],
        lora_b=normal(side, rank, scale=1e-3),
        lora_a=normal(rank, side, scale=1e-3),
        granule=1,
    )
    prove(layer, {})
    drifting = layer.weight.clone()
    repeated = [(layer,)] * calls
    ways: dict[str, Callable[[], None]] = {name: sweep(way, repeated) for name, way in PLAIN.items()}
    ways["addmm_"] = sweep(lambda one: drifting.addmm_(one.lora_b, one.lora_a, alpha=SCALE), repeated)
    swaps = sweep(shira.swap_, [(layer.weight, layer.indices, layer.values)] * calls)
    timing = compare(benchmark, ("swap_", swaps), ways, cold=False)
    timing.best("exact", list(PLAIN))
    name = common.dtype_name(dtype)
    report = Report(benchmark, threads, dtype=name, side=side, nnz=len(indices), lora_rank=rank, calls=calls)
    report.seconds(timing, calls)
    report.ratio(f"warm swap_ over best exact {name}", f"{side} x {side}", timing, "exact")
    report.ratio(f"warm swap_ over fuse {name}", f"{side} x {side}", timing, "addmm_")


@pytest.mark.filterwarnings("ignore:Sparse")
def bench_loads(benchmark: BenchmarkFixture, threads: int, tmp_path: Path) -> None:
    """From a file onto the weights and off again, in bf16. For PEFT's SHiRA see bench_load.py.

    Hotswapping replaces the adapter of a LoRA that is not merged: each forward pass still pays for two more products.
    """
    from peft.utils.hotswap import hotswap_adapter

    some = [one.weight for one in common.layers(BF16)[:2]]
    rank = common.lora_rank()
    drifting = [weight.clone() for weight in some]
    made = peers.adapter(some)
    ours = peers.our_cycle(some, made, tmp_path / "ours")
    peers.prove_cycle(ours, some, peers.adapted(some, made))
    others = {
        "addmm_": peers.addmm_cycle(drifting, rank, tmp_path / "addmm"),
        peers.LORA: peers.peft_cycle(peers.LORA, drifting, rank, tmp_path / "lora"),
        peers.SUPER: peers.peft_cycle(peers.SUPER, drifting, rank, tmp_path / "super"),
    }
    for cycle in others.values():
        peers.prove_cycle(cycle, drifting, None)
    hot = peers.model(peers.LORA, drifting, rank)
    before = [parameter.detach().clone() for parameter in hot.parameters() if parameter.requires_grad]

    def hotswap() -> None:
        hotswap_adapter(hot, str(tmp_path / "lora"), "default", torch_device="cpu")

    hotswap()
    after = [parameter for name, parameter in hot.named_parameters() if "lora_" in name]
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    ways: dict[str, Callable[[], None]] = {name: Steps(cycle.steps()) for name, cycle in others.items()}
    ways["PEFT LoRA hotswap, not merged"] = hotswap
    timing = compare(benchmark, ("shira", Steps(ours.steps())), ways, rounds=settings.few(9))
    sizes = {name: cycle.file_bytes for name, cycle in {"shira": ours, **others}.items()}
    report = Report(benchmark, threads, layers=len(some), rank=rank, file_bytes=sizes)
    for name in ("shira", *others):
        timing.samples[name] = switched_on(timing, name)
    report.seconds(timing)
    for name in ways:
        report.ratio("load over ways", name, timing, name)


def switched_on(timing: common.Timing, way: str) -> list[float]:
    """Seconds to load and fuse, round by round."""
    return [a + b for a, b in zip(timing.of(f"{way}: load"), timing.of(f"{way}: fuse"), strict=True)]
