"""`Switcher.activate` from one adapter to another on a live model, beside the ways of LoRA and of PEFT.

addmm_ twice   a LoRA switch: take one adapter out of the weights and fold the next in, W.addmm_(B, A) each, of rank r
               with r * (m + n) <= nnz. It does not restore the base's bits, as `Switcher` does
addmm_ once    both in one pass over the weight: addmm_ of the two adapters side by side, of rank 2 r
PEFT LoRA      unmerge_adapter and merge_adapter, the same rank
PEFT SHiRA     the same calls, with as many entries
fingerprint    `Switcher.fingerprint` of every weight after the switch: what keeping them known costs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from benchmarks.speed import common
from benchmarks.speed.common import BF16, Layer, Report, compare, settings

pytest.importorskip("peft")
shira = pytest.importorskip("shira")
from benchmarks.speed import peers  # noqa: E402
from benchmarks.speed.peers import Layers  # noqa: E402

TWICE, ONCE = "addmm_ twice", "addmm_ once"
PEFT_LAYERS = 4


def adapter_of(model: nn.Module, some: list[Layer], seed: int) -> Any:
    mask, generator = shira.masks.Rand(density=0.01, seed=seed), torch.Generator().manual_seed(seed)
    entries = {}
    for (name, weight), layer in zip(model.named_parameters(), some, strict=True):
        values = torch.empty_like(layer.values).normal_(0, 0.02, generator=generator)
        indices = mask(name, weight.detach())[: len(values)]
        fingerprint = int(torch.ops.shira.fingerprint(weight.detach())) % 2**64
        entries[name] = shira.Entry(indices, values, tuple(weight.shape), weight.dtype, 1, fingerprint)
    return shira.Adapter(entries)


def switcher_of(some: list[Layer]) -> Any:
    model = Layers([one.weight for one in some])
    switcher = shira.Switcher(model)
    for seed, name in enumerate("ab"):
        switcher.add(name, adapter_of(model, some, seed))
    return switcher


def to_and_fro(switch: Callable[[str, str], object]) -> Callable[[], None]:
    """Switches from one to the other and back, in turns."""
    names = ["a", "b"]

    def run() -> None:
        switch(*names)
        names.reverse()

    return run


def prove(switcher: Any, some: list[Layer]) -> None:
    """Each state is the base with the adapter's values, and in the end the base comes back."""
    base = [one.weight.clone() for one in some]
    for name in ("a", "b", "a"):
        switcher.activate(name)
        for one, original, entry in zip(some, base, switcher.adapters[name].weights.values(), strict=True):
            expected = original.view(-1).index_copy(0, entry.indices.to(torch.int64), entry.values)
            assert torch.equal(one.weight.view(-1), expected)
    switcher.deactivate()
    assert all(torch.equal(one.weight, original) for one, original in zip(some, base, strict=True))


def prove_once(layer: Layer) -> None:
    """One pass takes the one LoRA out and folds the other in, as two passes do."""
    b, a = layer.lora_b.flip(0), layer.lora_a.flip(0)
    weight = layer.weight.clone().addmm_(torch.cat([b, layer.lora_b], 1), torch.cat([-a, layer.lora_a]), alpha=0.01)
    expected = layer.weight.float() + 0.01 * (layer.lora_b.float() @ layer.lora_a.float() - b.float() @ a.float())
    torch.testing.assert_close(weight, expected.to(weight.dtype))


def about(some: list[Layer]) -> dict[str, object]:
    return {"shape": list(some[0].weight.shape), "layers": len(some), "nnz": some[0].values.numel(),
            "lora_rank": common.lora_rank()}  # fmt: skip


def bench_switcher(benchmark: BenchmarkFixture, threads: int) -> None:
    some = common.layers(BF16)
    switcher = switcher_of(some)
    prove(switcher, some)
    names = list(switcher.adapters["a"].weights)

    def known() -> None:
        for name in names:
            switcher.fingerprint(name)

    for name in "ab":
        switcher.activate(name)
        known()
        assert switcher.fingerprint(names[0]) == int(torch.ops.shira.fingerprint(some[0].weight)) % 2**64

    def twice() -> None:  # on their own weights, since they drift
        for one, weight in zip(some, drifting, strict=True):
            weight.addmm_(one.lora_b, one.lora_a, alpha=-0.01)
            weight.addmm_(one.lora_b, one.lora_a, alpha=0.01)

    def once() -> None:
        for one, (b, a), weight in zip(some, others, drifting, strict=True):
            weight.addmm_(torch.cat([b, one.lora_b], 1), torch.cat([-a, one.lora_a]), alpha=0.01)

    drifting = [one.weight.clone() for one in some]
    others = [(one.lora_b.flip(0), one.lora_a.flip(0)) for one in some]
    prove_once(some[0])
    switch = to_and_fro(lambda _, name: switcher.activate(name))
    timing = compare(benchmark, ("activate", switch), {TWICE: twice, ONCE: once, "fingerprint": known})
    switcher.deactivate()
    switcher.verify(full=True)
    report = Report(benchmark, threads, **about(some))
    report.seconds(timing, len(some))
    timing.best("addmm_", [TWICE, ONCE])
    report.ratio("switcher over addmm_", f"{settings.side} x {settings.side}", timing, "addmm_")
    shares = [100 * ratio for ratio in timing.ratios("fingerprint")]
    best = 100 * min(timing.of("fingerprint")) / min(timing.of("activate"))
    report.result("fingerprint share", f"{settings.side} x {settings.side}", shares, best)


def peft_model(kind: str, some: list[Layer]) -> Any:
    """Two adapters as large as ours, on copies of the weights."""
    made = peers.model(kind, [one.weight.clone() for one in some], common.lora_rank())
    made.add_adapter("two", peers.config(kind, common.lora_rank(), seed=2), autocast_adapter_dtype=False)
    made.base_model.merge_adapter(["default"])
    return made.base_model


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("kind", [peers.LORA, peers.SHIRA, peers.SUPER])
def bench_switcher_over_peft(benchmark: BenchmarkFixture, threads: int, kind: str) -> None:
    some = common.layers(BF16)[:PEFT_LAYERS]
    switcher, theirs = switcher_of(some), peft_model(kind, some)
    prove(switcher, some)
    switcher.activate("a")

    def merge(_: str, name: str) -> None:
        theirs.unmerge_adapter()
        theirs.merge_adapter(["default" if name == "a" else "two"])

    ours = to_and_fro(lambda _, name: switcher.activate(name))
    timing = compare(benchmark, ("activate", ours), {kind: to_and_fro(merge)}, rounds=settings.few(11))
    switcher.deactivate()
    switcher.verify(full=True)
    report = Report(benchmark, threads, **about(some))
    report.seconds(timing, len(some))
    report.ratio(f"switcher over {kind}", f"{settings.side} x {settings.side}", timing, kind)
