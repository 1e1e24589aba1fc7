"""What gpu.py measures: each op, proved first, beside the best of plain torch and beside what the memory allows.

gpu_lab.py says how a comparison is measured.

python -m benchmarks.speed.gpu_bench --lines FILE [--device cpu --quick] [--only swap copy ...]
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import shira_ops
from benchmarks.speed import gpu_training
from benchmarks.speed.gpu import DEVICE_LOST, NAMES
from benchmarks.speed.gpu_lab import (
    BF16,
    DENSITY,
    DOWN,
    GATE,
    SECTOR,
    Bench,
    Call,
    Found,
    Mask,
    captured,
    clear,
    entries_of,
)
from benchmarks.speed.gpu_ops import ADAMW, same

shira = torch.ops.shira
ADAPTERS = 8
HANGS = 100  # seconds after which a measurement hangs

# The measurements, the most important first


def copy(bench: Bench) -> Found:
    n = 1 << 20 if bench.quick else 1 << 31
    source, target = (torch.zeros(n, dtype=torch.uint8, device=bench.device) for _ in range(2))
    return Found("", bench.time({"copy_": lambda: target.copy_(source)}), {"copy_": 2 * n})


def _swap(bench: Bench, granule: int) -> Found:
    model = bench.model
    mask = Mask.of(bench, range(len(model.weights)), granule)
    entries = [entries_of(one, granule) for one in mask.indices[:7]]

    def swap() -> None:
        shira.foreach_swap_(mask.weights, mask.indices, mask.values, granule)

    # All entries of a layer of each shape; and everywhere that twice is the identity.
    before = [weight.clone() for weight in mask.weights[:7]]
    given = [one.clone() for one in mask.values]
    swap()
    for weight, old, entry, new, kept in zip(mask.weights, before, entries, given, mask.values, strict=False):
        if not same(kept, old.view(-1)[entry]):
            raise AssertionError("foreach_swap_: values differ from index_select's")
        if not same(weight, old.view(-1).index_copy_(0, entry, new).view_as(old)):
            raise AssertionError("foreach_swap_: the weight differs from index_copy_'s")
    swap()
    if not all(same(one, old) for one, old in zip(mask.values, given, strict=True)):
        raise AssertionError("foreach_swap_ twice is not the identity")
    del before, given, entries

    ranks = [max(1, int(DENSITY * m * n / (m + n))) for m, n in model.shapes]
    factors = [
        (bench.normal(m, r, scale=1e-3), bench.normal(r, n, scale=1e-3))
        for (m, n), r in zip(model.shapes, ranks, strict=True)
    ]

    def fuse() -> None:
        for weight, (b, a) in zip(mask.weights, factors, strict=True):
            weight.addmm_(b, a, alpha=1e-3)

    sectors, pairs = mask.pieces(bench, SECTOR), mask.pieces(bench, 2 * SECTOR)
    by_sectors, touch = bench.touch(model.memory, sectors, SECTOR)
    by_pairs, touch_pairs = bench.touch(model.memory, pairs, 2 * SECTOR)
    lora = captured(fuse) if bench.cuda else fuse
    ways = bench.captured({"foreach_swap_": swap})
    ways |= {"touch": touch, "touch of 64-byte pairs": touch_pairs, "LoRA addmm_, captured": lora}
    lists = mask.lists + 2 * mask.nnz * BF16.itemsize
    moved = dict.fromkeys((one for one in ways if "swap" in one), 2 * SECTOR * len(sectors) + lists)
    moved["touch"] = 2 * SECTOR * len(sectors) + sectors.nbytes
    moved["touch of 64-byte pairs"] = 4 * SECTOR * len(pairs) + pairs.nbytes
    moved["LoRA addmm_, captured"] = 2 * model.memory.nbytes + sum(b.nbytes + a.nbytes for b, a in factors)
    found = Found("index_copy_'s bits on a layer of each shape; twice the identity on all", bench.time(ways), moved)
    found.facts = {
        "parameters": model.memory.numel(),
        "nnz": mask.nnz,
        "LoRA parameters": sum(b.numel() + a.numel() for b, a in factors),
        "share of sectors": SECTOR * len(sectors) / model.memory.nbytes,
        "share of pairs": 2 * SECTOR * len(pairs) / model.memory.nbytes,
        "touch": {"sectors": by_sectors, "pairs": by_pairs},
    }
    subject = "foreach_swap_, captured" if bench.cuda else "foreach_swap_"
    return found.over("foreach_swap_", "touch", "LoRA addmm_, captured").over(
        subject, "touch", "touch of 64-byte pairs", "LoRA addmm_, captured"
    )


def swap(bench: Bench) -> Found:
    """Llama-3-8B, 1 % of single entries."""
    return _swap(bench, 1)


def swap_granule_16(bench: Bench) -> Found:
    """Llama-3-8B, 1 % in runs of 16: one sector each."""
    return _swap(bench, 16)


def fetch(bench: Bench) -> Found:
    """Llama-3-8B, 1 % of single entries, where the L2 cache may fetch 32, 64 or 128 bytes at a time: a hint, which a
    driver may ignore. The fact is what it was in all other measurements."""
    mask = Mask.of(bench, range(len(bench.model.weights)))
    sectors = mask.pieces(bench, SECTOR)
    by, touch = bench.touch(bench.model.memory, sectors, SECTOR)

    def swap() -> None:
        shira.foreach_swap_(mask.weights, mask.indices, mask.values, 1)

    given = captured(swap) if bench.cuda else swap
    found = Found("proved by `swap`", {}, facts={"touch": by, "fetch granularity": bench.fetch_granularity()})
    lists = {"touch": sectors.nbytes, "foreach_swap_": mask.lists + 2 * mask.nnz * BF16.itemsize}
    try:
        for size in (32, 64, 128):
            bench.fetch_granularity(size)
            timed = bench.time({"touch": touch, "foreach_swap_": given})
            found.seconds |= {f"{way}, {size} bytes": took for way, took in timed.items()}
            found.bytes |= {f"{way}, {size} bytes": 2 * SECTOR * len(sectors) + lists[way] for way in timed}
    finally:
        bench.fetch_granularity(found.facts["fetch granularity"])
    return found


def adamw(bench: Bench) -> Found:
    """1 % of the linear weights of four decoder layers; stock is the fused AdamW on the values, and index_copy_."""
    parity = bench.prove("adamw_", "foreach_adamw_")
    mask = Mask.of(bench, bench.model.some)
    masters = [one.float() for one in mask.values]
    first, second = ([torch.zeros_like(one) for one in masters] for _ in range(2))
    grads = [torch.randn_like(one) for one in masters]

    def step() -> None:
        shira.foreach_adamw_(mask.weights, mask.indices, masters, first, second, grads, step=3, **ADAMW)

    parameters = [one.clone().requires_grad_() for one in masters]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True, capturable=bench.cuda)
    wide = [one.long() for one in mask.indices]

    def stock() -> None:
        optimizer.step()
        for weight, index, parameter in zip(mask.weights, wide, parameters, strict=True):
            weight.view(-1).index_copy_(0, index, parameter.detach().to(BF16))

    sectors = mask.pieces(bench, SECTOR)
    ways = bench.captured({"foreach_adamw_": step, "stock": stock})
    moved = 2 * SECTOR * len(sectors) + mask.lists + mask.nnz * (2 * 3 + 1) * 4
    found = Found(parity, bench.time(ways), {one: moved for one in ways if "adamw" in one}, {"nnz": mask.nnz})
    found.over("foreach_adamw_", "stock")
    return found.over("foreach_adamw_, captured", "stock, captured") if bench.cuda else found


def _sampled_grad(bench: Bench, weight: torch.Tensor, tokens: int) -> Found:
    (rows, columns), tokens = weight.shape, 32 if bench.quick else tokens
    # Small integers: their products add up exactly, in any order.
    grad_output, x = (torch.randint(-4, 5, (tokens, n), device=bench.device).to(BF16) for n in (rows, columns))
    indices = bench.mask(weight.numel())
    wide = indices.long()
    master = weight.view(-1)[wide].float()
    state = (torch.zeros_like(master), torch.zeros_like(master))

    def sampled() -> torch.Tensor:
        return shira.sampled_grad(grad_output, x, indices)

    def dense() -> torch.Tensor:
        return grad_output.T @ x

    def gathered() -> torch.Tensor:
        return dense().view(-1).index_select(0, wide).float()

    def stepped(gradient: Callable[[], torch.Tensor]) -> None:
        shira.adamw_(weight, indices, master, *state, gradient(), step=3, **ADAMW)

    given = sampled()
    some = torch.linspace(0, len(indices) - 1, min(len(indices), 1000)).long().to(bench.device)
    at = wide[some]
    wanted = (grad_output[:, at // columns].double() * x[:, at % columns].double()).sum(0)
    if not torch.equal(given[some], wanted.float()):
        raise AssertionError("sampled_grad differs from the exact sum")
    # bf16 rounds the dense gradient, and torch may add up parts of it that are rounded to bf16 before.
    torch.testing.assert_close(gathered(), given, rtol=2**-7, atol=2**-7 * float(given.abs().max()))
    ways: dict[str, Call] = {
        "sampled_grad": sampled,
        "sampled_grad + adamw_": lambda: stepped(sampled),
        "dense gradient": dense,
        "dense gradient + gather + adamw_": lambda: stepped(gathered),
    }
    found = Found("exact against fp64", bench.time(ways, None if bench.quick else 9))
    found.facts = {"tokens": tokens, "nnz": len(indices), "shape": [rows, columns]}
    return found.over("dense gradient", *(way for way in ways if way != "dense gradient"))


def sampled_grad(bench: Bench) -> Found:
    """A gate projection, 14336 x 4096, 8192 tokens: beside the dense weight gradient, alone and with the step."""
    return _sampled_grad(bench, bench.model.weights[GATE], 8192)


def sampled_grad_14336_columns(bench: Bench) -> Found:
    """A down projection, 4096 x 14336: its width is not a power of two."""
    return _sampled_grad(bench, bench.model.weights[DOWN], 8192)


def sampled_grad_3072_columns(bench: Bench) -> Found:
    """A gate projection of Llama-3.2-3B, 8192 x 3072."""
    shape = (128, 48) if bench.quick else (8192, 3072)
    return _sampled_grad(bench, bench.normal(*shape), 8192)


def sampled_grad_64_tokens(bench: Bench) -> Found:
    """The gate projection with so few tokens that reading the entries' rows and columns may beat the dense product."""
    return _sampled_grad(bench, bench.model.weights[GATE], 64)


def select_top(bench: Bench) -> Found:
    """1 % of 16.8 million entries."""
    weight = bench.model.weights[0]
    grad, k = bench.normal(*weight.shape), max(1, weight.numel() // 100)

    def stock(score: torch.Tensor) -> torch.Tensor:
        return score.view(-1).topk(k, sorted=False).indices.sort().values

    ways: dict[str, Call] = {
        "select_top magnitude": lambda: shira.select_top(weight, None, k, score="magnitude"),
        "topk magnitude": lambda: stock(weight.abs()),
        "select_top snip": lambda: shira.select_top(weight, grad, k, score="snip"),
        "topk snip": lambda: stock((weight.float() * grad.float()).abs()),
    }
    for name, score in (("magnitude", weight.float().abs()), ("snip", (weight.float() * grad.float()).abs())):
        order = score.view(-1).sort(descending=True, stable=True).indices[:k].sort().values
        if not torch.equal(ways[f"select_top {name}"]().long(), order):  # type: ignore[attr-defined]
            raise AssertionError(f"select_top {name} differs from a stable sort")
    moved = {"select_top magnitude": weight.nbytes, "select_top snip": 2 * weight.nbytes}
    found = Found("a full stable sort's", bench.time(ways), moved, {"numel": weight.numel(), "k": k})
    return found.over("select_top magnitude", "topk magnitude").over("select_top snip", "topk snip")


def decode_indices(bench: Bench) -> Found:
    """1 % of a weight of 2^30 entries."""
    limit = 1 << (16 if bench.quick else 30)
    indices = bench.mask(limit)
    code = shira.encode_indices(indices.cpu()).to(bench.device)

    def decode() -> torch.Tensor:
        return shira.decode_indices(code, len(indices), limit, torch.int32)

    if not torch.equal(decode(), indices):
        raise AssertionError("decode_indices(encode_indices(x)) is not x")
    found = Found("decodes what was encoded", bench.time({"decode_indices": decode}))
    found.bytes = {"decode_indices": code.nbytes + indices.nbytes}
    rate = len(indices) / found.median("decode_indices") / 1e9
    found.facts = {"indices": len(indices), "bits an index": 8 * code.nbytes / len(indices), "G indices/s": rate}
    return found


def fuse(bench: Bench) -> Found:
    """Eight adapters of 1 % into a layer of 14336 x 4096; stock adds them one after the other."""
    parity = bench.prove("fuse_plan", "fuse_")
    masks = [Mask.of(bench, range(GATE, GATE + 1)) for _ in range(ADAPTERS)]
    weight, values = masks[0].weights[0], [one.values[0] for one in masks]
    plan = shira.fuse_plan([one.indices[0] for one in masks])
    saved = torch.empty_like(weight.view(-1)[plan[0].long()])
    alphas = torch.full((ADAPTERS,), 1e-3, device=bench.device)
    wide = [one.indices[0].long() for one in masks]

    def fuse(refuse: bool) -> None:
        given = (weight, saved, *plan, values, alphas)
        shira.fuse_(*given, delta=[True] * ADAPTERS, refuse=refuse)

    def stock() -> None:
        for index, value in zip(wide, values, strict=True):
            weight.view(-1).index_add_(0, index, value, alpha=1e-3)

    sectors = masks[0].pieces(bench, SECTOR, *masks[1:])
    by, touch = bench.touch(bench.model.memory, sectors, SECTOR)
    ways = bench.captured({"fuse_": lambda: fuse(False), "fuse_ refuse": lambda: fuse(True), "index_add_": stock})
    ways["touch of the union"] = touch
    streamed = sum(one.nbytes for one in (*plan, *values, saved))
    moved = {one: 2 * SECTOR * len(sectors) + streamed for one in ways if one.startswith("fuse_")}
    moved["touch of the union"] = 2 * SECTOR * len(sectors) + sectors.nbytes
    found = Found(parity, bench.time(ways), moved, {"union": len(saved), "touch": by})
    found.over("fuse_", "index_add_", "fuse_ refuse")
    return found.over("touch of the union", "fuse_", "fuse_ refuse")


def switch(bench: Bench) -> Found:
    """From 1 % to another 1 % of the linear weights of four decoder layers, beside a revert and an apply."""
    parity = bench.prove("switch_", "foreach_switch_")
    out, into = (Mask.of(bench, bench.model.some) for _ in range(2))
    saved = [torch.empty_like(one) for one in into.values]

    def one() -> None:
        shira.foreach_switch_(out.weights, out.indices, out.values, into.indices, into.values, saved)

    def two() -> None:
        shira.foreach_scatter_(out.weights, out.indices, out.values)
        shira.foreach_apply_(into.weights, into.indices, into.values, saved)

    sectors = out.pieces(bench, SECTOR, into)
    by, touch = bench.touch(bench.model.memory, sectors, SECTOR)
    ways = bench.captured({"foreach_switch_": one, "revert + apply_": two})
    ways["touch of the union"] = touch
    lists = out.lists + into.lists + (out.nnz + 2 * into.nnz) * BF16.itemsize
    moved = {name: 2 * SECTOR * len(sectors) + lists for name in ways if "switch" in name}
    moved["touch of the union"] = 2 * SECTOR * len(sectors) + sectors.nbytes
    found = Found(parity, bench.time(ways), moved, {"nnz": [out.nnz, into.nnz], "touch": by})
    return found.over("foreach_switch_", "revert + apply_").over("touch of the union", "foreach_switch_")


def fingerprint(bench: Bench) -> Found:
    """2 GiB of weights beside plain reads of them."""
    weight = bench.model.memory[: min(1 << 30, bench.model.memory.numel() & ~1)]
    part = weight[: 1 << 26]
    if not torch.equal(shira.fingerprint(part).cpu(), shira.fingerprint(part.cpu())):
        raise AssertionError("fingerprint differs from the CPU's")
    ways: dict[str, Call] = {
        "fingerprint": lambda: shira.fingerprint(weight),
        "sum": lambda: weight.view(torch.float32).sum(),
        "amax": lambda: weight.view(torch.int32).amax(),
    }
    found = Found("the CPU's", bench.time(ways), dict.fromkeys(ways, weight.nbytes))
    found.facts["of read bandwidth"] = min(found.median("sum"), found.median("amax")) / found.median("fingerprint")
    return found


def training(bench: Bench) -> Found:
    """Steps and peak memory of a Llama of 1.2 billion parameters, 4096 tokens, beside a LoRA of as many parameters."""
    bench.__dict__.pop("model", None)  # makes room
    clear()
    parity, seconds, facts = gpu_training.measure(bench)
    return Found(parity, seconds, facts=facts)


MEASUREMENTS: dict[str, Callable[[Bench], Found]] = {name: globals()[name] for name in NAMES}


def run(bench: Bench, names: Iterable[str], write: Callable[[dict[str, Any]], None]) -> bool:
    """Measures one after the other, and writes each result; returns whether all went well."""
    bandwidth, well = 0.0, True
    for name in ("copy", *(one for one in names if one != "copy")):
        start = time.perf_counter()
        told: dict[str, Any] = {"name": name}
        faulthandler.dump_traceback_later(HANGS, exit=True)
        try:
            found = MEASUREMENTS[name](bench)
            if name == "copy":
                bandwidth = found.bytes["copy_"] / found.median("copy_")
            told |= {"parity": found.parity, "seconds": found.seconds, "bytes": found.bytes, **found.facts}
            told["share of copy"] = {
                way: moved / found.median(way) / bandwidth for way, moved in found.bytes.items() if bandwidth
            }
        except Exception as error:  # reported, and the others are measured all the same
            well = False
            told["error"] = f"{type(error).__name__}: {error}"
            told["traceback"] = traceback.format_exc(limit=-4)
        faulthandler.cancel_dump_traceback_later()
        told["took"] = round(time.perf_counter() - start, 1)
        write(told)
        if "error" in told and bench.cuda:
            try:
                torch.cuda.synchronize()
            except RuntimeError:  # nothing works in this process any more, so gpu.py starts another for the rest
                sys.exit(DEVICE_LOST)
        clear()
    return well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to see whether everything runs")
    parser.add_argument("--only", nargs="*", choices=list(MEASUREMENTS), default=list(MEASUREMENTS))
    parser.add_argument(
        "--lines", type=Path, required=True, help="a file that gets a line, a JSON object, for each measurement"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)

    def write(told: dict[str, Any]) -> None:
        with arguments.lines.open("a") as lines:
            lines.write(json.dumps(told) + "\n")

    assert shira_ops.backends()  # the ops are registered
    sys.exit(not run(Bench(arguments.device, arguments.quick), arguments.only, write))


if __name__ == "__main__":
    main()
