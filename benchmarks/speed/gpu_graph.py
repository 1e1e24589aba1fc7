"""Captured CUDA graphs and adapters: what a server needs that replays a captured model, proved bit for bit.

- a model's inference is captured once; a Switcher changes its weights between replays, and every replay gives the bits
  of an eager forward with the same adapter
- every op that a graph can hold is captured and replayed: the bits of an eager call
- the compiled kernels need no call before the first capture (Triton's are compiled in it)
- across replays: swap_ twice is the identity, and fuse_ follows strengths changed between replays

python -m benchmarks.speed.gpu_graph
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import shira
import shira_ops
from benchmarks.speed.gpu_lab import captured
from benchmarks.speed.gpu_ops import Arguments, calls, left, op, placed, run, same, tensors
from benchmarks.speed.gpu_proofs import Proof, prove

SIDE, DEVICE = 512, "cuda"
# These read the content on the host, so a graph cannot hold them.
LOOKS = ("check_indices", "fuse_plan", "encode_indices", "decode_indices", "diff_", "foreach_diff_")


def mask(numel: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.rand(numel, generator=random) < 0.02).nonzero().view(-1).to(torch.int32)


def adapter(model: nn.Module, seed: int) -> shira.Adapter:
    weights = {}
    for number, (name, weight) in enumerate(model.named_parameters()):
        indices = mask(weight.numel(), 10 * seed + number)
        values = torch.randn(len(indices), generator=torch.Generator().manual_seed(seed)).to(weight.dtype)
        weights[name] = shira.Entry(indices, values, tuple(weight.shape), weight.dtype)
    return shira.Adapter(weights)


def captured_cold() -> str:
    """Before any other op of this process: kernels are loaded while the graph is captured."""
    if shira_ops.backends()["swap_"]["cuda"].name != "compiled":
        return "no capture without a call before it: these kernels are not the compiled ones"
    weight, indices = torch.randn(SIDE, SIDE, device=DEVICE), mask(SIDE * SIDE, 3).to(DEVICE)
    values = torch.randn(len(indices), device=DEVICE)
    wanted = weight.view(-1).index_copy(0, indices.long(), values), weight.view(-1)[indices.long()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        shira_ops.swap_(weight, indices, values)
    graph.replay()
    if not same(weight.view(-1).cpu(), wanted[0].cpu()) or not same(values.cpu(), wanted[1].cpu()):
        raise AssertionError("swap_ captured on its first call differs from index_copy")
    return "swap_ captured on its first call: the bits of index_copy"


def model_and_input() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Linear(SIDE, SIDE, bias=False) for _ in range(4)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.GELU()))).to(DEVICE, torch.bfloat16)
    return model.requires_grad_(False), torch.randn(16, SIDE, device=DEVICE, dtype=torch.bfloat16)


def captured_overlay() -> str:
    model, x = model_and_input()
    overlay = shira.Overlay(model)
    for name, seed in (("one", 1), ("two", 2)):
        overlay.add(name, adapter(model, seed))
    base, out, seen = model(x).cpu(), torch.empty_like(x), []

    def replayed(what: str) -> None:
        wanted = model(x).cpu()
        replay = captured(lambda: out.copy_(model(x)))
        out.zero_()
        replay()
        if not same(out.cpu(), wanted):
            raise AssertionError(f"{what}: a replay differs from an eager forward")
        seen.append(wanted)

    for which in ("one", {"one": 0.7, "two": 0.5}):
        overlay.activate(which)
        replayed(str(which))
    one = seen[0]
    with overlay.using([None, "one"] * 8):
        replayed("an adapter for each row")
    overlay.detach()
    if any(same(one, base) for one in seen) or not same(model(x).cpu(), base):
        raise AssertionError("an overlay changed nothing, or left something behind")
    if not same(seen[2][0::2], base[0::2]) or not same(seen[2][1::2], one[1::2]):
        raise AssertionError("rows do not have their own adapters")
    return f"an overlay's forward, captured {len(seen)} times: the bits of eager forwards"


def captured_inference() -> str:
    model, x = model_and_input()
    switcher = shira.Switcher(model)
    for name, seed in (("one", 1), ("two", 2)):
        switcher.add(name, adapter(model, seed))
    pointers = [p.data_ptr() for p in model.parameters()]
    out = torch.empty_like(x)
    replay = captured(lambda: out.copy_(model(x)))
    seen = []
    for which in (None, "one", "two", {"one": 0.7, "two": 0.5}, "one", None):
        switcher.deactivate() if which is None else switcher.activate(which)
        replay()
        replayed = out.to("cpu", copy=True)
        if not same(replayed, model(x).cpu()):
            raise AssertionError(f"{which}: a replay differs from an eager forward")
        seen.append(replayed)
    if any(same(seen[i], seen[i + 1]) for i in range(len(seen) - 1)):
        raise AssertionError("a switch did not change the replay's result")
    if not same(seen[0], seen[-1]) or not same(seen[1], seen[4]):
        raise AssertionError("the same adapter gave other bits the second time")
    if pointers != [p.data_ptr() for p in model.parameters()]:
        raise AssertionError("a weight moved")
    return f"one capture, {len(seen)} replays with switches between them: the bits of eager forwards"


def captured_call(name: str, given: Arguments) -> None:
    """Replays the graph on the arguments as they were before its first call."""
    own, results = placed(given, DEVICE), list[Any]()
    replay = captured(lambda: results.append(op(name)(**own)))
    for kept, fresh in zip(tensors(own), tensors(placed(given, DEVICE)), strict=True):
        kept.copy_(fresh)
    replay()
    pairs = zip(left(results[-1], own), run(op(name), given, DEVICE), strict=True)
    if not all(same(*pair) for pair in pairs):
        raise AssertionError("a replay differs from an eager call")


def captured_ops() -> str:
    weight = torch.randn(SIDE, SIDE, device=DEVICE, dtype=torch.bfloat16)
    base, masks = weight.clone(), [mask(SIDE * SIDE, seed).to(DEVICE) for seed in (1, 2)]
    values = [torch.randn(len(one), device=DEVICE, dtype=torch.bfloat16) for one in masks]
    swapped = values[0].clone()
    replay = captured(lambda: shira_ops.swap_(weight, masks[0], swapped))
    before = weight.clone()
    replay()
    if same(weight.cpu(), before.cpu()):
        raise AssertionError("a replayed swap_ changed nothing")
    replay()
    if not same(weight.cpu(), before.cpu()):
        raise AssertionError("swap_ replayed twice is not the identity")

    weight.copy_(base)
    plan = shira_ops.fuse_plan(masks)
    saved, alphas = shira_ops.gather(weight, plan[0]), torch.tensor([0.5, 0.5], device=DEVICE)

    def fuse(into: torch.Tensor) -> None:
        shira_ops.fuse_(into, saved, *plan, values, alphas, delta=[False, True], refuse=True)

    replay = captured(lambda: fuse(weight))
    for strengths in ([1.0, 0.0], [0.3, -0.8]):
        alphas.copy_(torch.tensor(strengths))
        replay()
        eager = base.clone()
        fuse(eager)
        if not same(weight.cpu(), eager.cpu()):
            raise AssertionError(f"fuse_ replayed at {strengths} differs from eager")
    return "swap_ replayed twice is the identity; fuse_ follows strengths changed between replays"


def proofs(device: str, once: bool) -> Iterator[Proof]:
    """The first is only one if no other op was called before it in its process."""
    yield "captured cold", captured_cold
    yield "captured inference", captured_inference
    yield "captured overlay", captured_overlay
    yield "captured ops", captured_ops
    for granule in (1, 16):
        for name, given in calls(torch.bfloat16, granule, 24, 80).items():
            if name.partition(",")[0] not in LOOKS:
                yield f"captured {name}, granule {granule}", functools.partial(captured_call, name, given)


if __name__ == "__main__":
    prove(__doc__, proofs)
