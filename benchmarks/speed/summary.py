"""The table at the end of the benchmarks: every line with its target, and what was measured.

python -m benchmarks.speed.summary benchmarks/results/latest.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Line:
    """Something that is measured, and its target. Without a target it is shown and not judged. A line that is not
    `guarded` says how slow others are, and may change without a change here, so `make bench-compare` ignores it."""

    text: str
    target: float | None
    unit: str = "x"
    at_least: bool = True
    guarded: bool = True

    @property
    def is_ratio(self) -> bool:
        """Whether it is measured against something else of the same run, and so can be compared with another day's."""
        return self.unit in ("x", "", " %")

    def met(self, value: float) -> bool | None:
        if self.target is None:
            return None
        return value >= self.target if self.at_least else value <= self.target

    def goal(self) -> str:
        if self.target is None:
            return ""
        return f"{'>=' if self.at_least else '<='} {self.target:g}{self.unit}"


LINES = {
    "limit, touch": Line("the machine: touch", None, " GB/s"),
    "limit, read": Line("the machine: read", None, " GB/s"),
    "limit, copy": Line("the machine: copy, in and out", None, " GB/s"),
    "limit, GEMM bf16": Line("the machine: GEMM bf16", None, " GFLOP/s"),
    "limit, GEMM fp32": Line("the machine: GEMM fp32", None, " GFLOP/s"),
    "swap_ of touch bf16": Line("swap_ 1 % bf16, of touch", 0.9, ""),
    "swap_ of touch fp32": Line("swap_ 1 % fp32, of touch", 0.9, ""),
    "apply_ of touch bf16": Line("apply_ 1 % bf16, of touch", 0.9, ""),
    "apply_ of touch fp32": Line("apply_ 1 % fp32, of touch", 0.85, ""),
    "swap_ over stock bf16": Line("swap_ 1 % bf16, over the best of plain torch", 1.5),
    "swap_ over stock fp32": Line("swap_ 1 % fp32, over the best of plain torch", 1.5),
    "swap_ over fuse bf16": Line("swap_ 1 % bf16, over addmm_ LoRA fuse", 3.3),
    "swap_ over fuse fp32": Line("swap_ 1 % fp32, over addmm_ LoRA fuse", 6.0),
    "granule 32 over fuse bf16": Line("swap_ granule 32 bf16, over addmm_ LoRA fuse", 60.0),
    "granule 32 of touch bf16": Line("swap_ granule 32 bf16, of touch", None, ""),
    "granule 32 over stock bf16": Line("swap_ granule 32 bf16, over the best of plain torch", None),
    "foreach_swap_ of touch bf16": Line("foreach_swap_ 1 % bf16, of touch", None, ""),
    "foreach_swap_ of touch fp32": Line("foreach_swap_ 1 % fp32, of touch", None, ""),
    "switch_ over two bf16": Line("switch_ 1 % to 1 % bf16, over revert + apply_", 1.1),
    "switch_ over two fp32": Line("switch_ 1 % to 1 % fp32, over revert + apply_", 1.05),
    "switch_ over two, one mask": Line("switch_ within one mask, over revert + apply_", 1.8),
    "touch over two, one mask": Line(
        "touch within one mask, over revert + apply_: the most that switch_ can reach", None
    ),
    "switch_ of touch, one mask": Line("switch_ within one mask, of touch", None, ""),
    "check share bf16": Line("index checking, share of swap_ bf16", 10.0, " %", at_least=False),
    "check share fp32": Line("index checking, share of swap_ fp32", 10.0, " %", at_least=False),
    "fuse_ in touches bf16": Line("fuse_ 8 x 1 % bf16, in touches of the union", 1.8, at_least=False),
    "fuse_ in touches fp32": Line("fuse_ 8 x 1 % fp32, in touches of the union", None, at_least=False),
    "fuse_ bytes in touches bf16": Line("the bytes of fuse_ 8 x 1 % bf16 alone, in touches of the union", None),
    "fuse_ bytes in touches fp32": Line("the bytes of fuse_ 8 x 1 % fp32 alone, in touches of the union", None),
    "fuse_ of bytes bf16": Line("fuse_ 8 x 1 % bf16, of moving its bytes alone", None, ""),
    "fuse_ of bytes fp32": Line("fuse_ 8 x 1 % fp32, of moving its bytes alone", None, ""),
    "fuse_ over scatter_add_ bf16": Line("fuse_ 8 x 1 % bf16, over eight scatter_add_", 3.5),
    "fuse_ over scatter_add_ fp32": Line("fuse_ 8 x 1 % fp32, over eight scatter_add_", None),
    "fuse_ in touches, granule 16": Line(
        "fuse_ 8 x 1 % bf16, granule 16, in touches of the union", None, at_least=False
    ),
    "fuse_ over scatter_add_, granule 16": Line("fuse_ 8 x 1 % bf16, granule 16, over eight scatter_add_", None),
    "refuse over fuse_ bf16": Line("fuse_ with refuse bf16, over fuse_", 1.0),
    "refuse over fuse_ fp32": Line("fuse_ with refuse fp32, over fuse_", 1.0),
    "fuse_plan": Line("fuse_plan 8 x 1 %, over torch.cat + torch.unique", None),
    "rows of fuse_plan": Line("rows of a fuse_plan 8 x 1 %, in the time of making it", None, at_least=False),
    "adamw_ over stock bf16": Line("adamw_ 1 % bf16, over fused AdamW on the values + write-back", 1.15),
    "adamw_ over stock fp32": Line("adamw_ 1 % fp32, over fused AdamW on the values + write-back", 1.15),
    "adamw_ over dense bf16": Line("adamw_ 1 % bf16, over masking and fused AdamW on the whole", 10.0),
    "adamw_ over dense fp32": Line("adamw_ 1 % fp32, over masking and fused AdamW on the whole", 10.0),
    "adamw_ over masked bf16": Line("adamw_ 1 % bf16, over fused AdamW on the whole alone", None),
    "adamw_ over masked fp32": Line("adamw_ 1 % fp32, over fused AdamW on the whole alone", None),
    "adamw_ of touch bf16": Line("adamw_ 1 % bf16, of touch (the weight's lines alone)", None, ""),
    "adamw_ of touch fp32": Line("adamw_ 1 % fp32, of touch (the weight's lines alone)", None, ""),
    "call": Line("a call on 64 entries", 10.0, " us", at_least=False),
    "call, inference tensors": Line("a call on 64 entries, inference tensors", 2.0, " us", at_least=False),
    "foreach_": Line("foreach_, a tensor above its work", 1.0, " us", at_least=False),
    "fingerprint": Line("fingerprint, of read bandwidth", 0.8, ""),
    "overlay of LoRA fp32, granule 16": Line(
        "sparse_linear_add_ fp32, granule 16, of LoRA's two products", 1.0, at_least=False
    ),
    "overlay of LoRA bf16, granule 16": Line(
        "sparse_linear_add_ bf16, granule 16, of LoRA's two products", 1.5, at_least=False
    ),
    "overlay of LoRA fp32, granule 1": Line("sparse_linear_add_ fp32, of LoRA's two products", 1.5, at_least=False),
    "overlay of LoRA bf16, granule 1": Line("sparse_linear_add_ bf16, of LoRA's two products", 2.5, at_least=False),
    "overlay of LoRA, other batches": Line("sparse_linear_add_, of LoRA's two products", None),
    "overlay, bound of LoRA": Line(
        "the multiply-adds of sparse_linear_add_ alone, of LoRA's two products", None, guarded=False
    ),
    "overlay, call and bound of LoRA": Line(
        "a call of sparse_linear_add_ with one granule and the multiply-adds, of LoRA's two products",
        None,
        guarded=False,
    ),
    "overlay, bound of stream": Line(
        "a call of sparse_linear_add_ with one granule and reading indices and values, of reading", None, guarded=False
    ),
    "overlay of stream": Line("sparse_linear_add_ 1 token, of reading indices and values", 1.3, at_least=False),
    "overlay of layer": Line("sparse_linear_add_, share of the layer's product", 6.0, " %", at_least=False),
    "overlay over mixed, granule 16": Line(
        "sparse_linear_add_ 32 adapters, granule 16, over PEFT LoRA's mixed batch", 5.0
    ),
    "overlay over mixed, granule 1": Line("sparse_linear_add_ 32 adapters, over PEFT LoRA's mixed batch", 1.5),
    "break-even": Line("tokens between two switches from which on an overlay costs more", None, " tokens"),
    "mixed overlay of stream": Line("sparse_linear_add_ 32 adapters, of reading indices and values", None),
    "mixed overlay, bound": Line(
        "reading indices and values of 32 adapters, over PEFT LoRA's mixed batch", None, guarded=False
    ),
    "mixed overlay: memory over mixed": Line(
        "peak memory of sparse_linear_add_ 32 adapters, of PEFT LoRA's mixed batch", None, at_least=False
    ),
    "diff_ of read": Line("diff_, of reading the weight and the snapshot", None, ""),
    "diff_ over torch": Line("diff_, over the same in plain torch", None),
    "commit of touch": Line("commit of a live update, of touch bandwidth", 0.85, ""),
    "commit, verify=False of touch": Line("commit(verify=False) of a live update, of touch bandwidth", 0.85, ""),
    "stage and commit over dense": Line("a live update staged and committed, over clone + index_copy_ + copy_", None),
    "bytes of a run": Line("bytes an entry of the updates of a real run", 1.6, " B", at_least=False),
    "bytes of a run, values": Line("bytes an entry of the same with plain values", None, " B", at_least=False),
    "index code of a run": Line("index code of the updates of a real run, over the entropy", 1.05, at_least=False),
    "a run over dense": Line("a real run's updates staged and committed, over clone + index_copy_ + copy_", None),
    "memory: dense, all weights": Line("memory of a dense update, staged as a whole, over ours", 50.0),
    "memory: dense, one by one": Line("memory of a dense update, weight by weight, over ours", None),
    "publish over read": Line("publish of a model, in reads of its weights", None, at_least=False),
    "publish of a tuner over publish": Line("publish of a tuner, over publish of a model", None),
    "sampled_grad fp32": Line("sampled_grad 1 % fp32, over dense gradient + gather", 8.0),
    "sampled_grad bf16": Line("sampled_grad 1 % bf16, over dense gradient + gather", 3.0),
    "sampled_grad masks fp32": Line("sampled_grad 1 % fp32, over a Rand mask's", 1.0),
    "sampled_grad masks bf16": Line("sampled_grad 1 % bf16, over a Rand mask's", 1.0),
    "sampled_grad density fp32": Line("sampled_grad fp32, over dense rows in blocks + gather", None),
    "sampled_grad density bf16": Line("sampled_grad bf16, over dense rows in blocks + gather", None),
    "training over LoRA": Line("a training step, of PEFT LoRA's time", 1.05, at_least=False),
    "training over SHiRA": Line("a training step, of PEFT SHiRA's time", 0.4, at_least=False),
    "training over DoRA": Line("a training step, of PEFT DoRA's time", 1.0, at_least=False),
    "training over Super-Tuning": Line("a training step, of PEFT Super-Tuning's time", 1.0, at_least=False),
    "training, bound": Line("the frozen model alone, forward and backward, of the step", None, "", guarded=False),
    "training memory over LoRA": Line("peak memory of training, of PEFT LoRA's", 1.05, at_least=False),
    "training memory over SHiRA": Line("peak memory of training, of PEFT SHiRA's", None, at_least=False),
    "training memory over DoRA": Line("peak memory of training, of PEFT DoRA's", 1.0, at_least=False),
    "training memory over Super-Tuning": Line("peak memory of training, of PEFT Super-Tuning's", 1.0, at_least=False),
    "accelerate over SHiRA": Line("a step of PEFT SHiRA after accelerate, of before", 0.6, at_least=False),
    "accelerate: memory over SHiRA": Line("peak memory of PEFT SHiRA after accelerate, of before", 0.6, at_least=False),
    "accelerate over Super-Tuning": Line(
        "a step of PEFT Super-Tuning after accelerate, of before", None, at_least=False
    ),
    "accelerate: memory over Super-Tuning": Line(
        "peak memory of PEFT Super-Tuning after accelerate, of before", None, at_least=False
    ),
    "accelerate over a tuner": Line(
        "a step of PEFT SHiRA after accelerate, of a SparseTuner's with overlay", 1.05, at_least=False
    ),
    "accelerate: memory over a tuner": Line(
        "peak memory of PEFT SHiRA after accelerate, of a SparseTuner's with overlay", None, at_least=False
    ),
    "accelerate, bound": Line(
        "the frozen model alone, forward and backward, of PEFT SHiRA's step", None, "", guarded=False
    ),
    "SparseConfig over LoRA": Line("a step with SparseConfig, of PEFT LoRA's", None, at_least=False),
    "SparseConfig: memory over LoRA": Line("peak memory with SparseConfig, of PEFT LoRA's", None, at_least=False),
    "SparseConfig, granule 16 over LoRA": Line(
        "a step with SparseConfig, granule 16, of PEFT LoRA's", None, at_least=False
    ),
    "SparseConfig, granule 16: memory over LoRA": Line(
        "peak memory with SparseConfig, granule 16, of PEFT LoRA's", None, at_least=False
    ),
    "encode": Line("encode_indices, a core", 1.0, " G/s"),
    "decode": Line("decode_indices, a core", 1.0, " G/s"),
    "encode over diff": Line("encode_indices, over numpy.diff to raw 16-bit gaps", None),
    "decode over cumsum": Line("decode_indices, over numpy.cumsum of raw 16-bit gaps", None),
    "code 1 over entropy": Line("bits an index, over the entropy of a random mask, version 1", None, at_least=False),
    "code 2 over entropy": Line("bits an index, over the entropy of a random mask, version 2", 1.05, at_least=False),
    "encode 1": Line("encode_indices int32, a core, version 1", None, " G/s"),
    "encode 2": Line("encode_indices int32, a core, version 2", None, " G/s"),
    "decode 1": Line("decode_indices int32, a core, version 1", 2.0, " G/s"),
    "decode 2": Line("decode_indices int32, a core, version 2", 2.0, " G/s"),
    "decode 1 of filling": Line("decode_indices int32, version 1, of filling as much memory", None, ""),
    "decode 2 of filling": Line("decode_indices int32, version 2, of filling as much memory", None, ""),
    "decode 1, warm": Line("decode_indices int32, a core, version 1, in the caches", None, " G/s"),
    "decode 2, warm": Line("decode_indices int32, a core, version 2, in the caches", 2.0, " G/s"),
    "select_top magnitude bf16": Line("select_top magnitude 1 % bf16, over abs().topk", 8.0),
    "select_top magnitude fp32": Line("select_top magnitude 1 % fp32, over abs().topk", 8.0),
    "select_top snip bf16": Line("select_top snip 1 % bf16, over the same with topk", 8.0),
    "select_top snip fp32": Line("select_top snip 1 % fp32, over the same with topk", 8.0),
    "select_random": Line("select_random 1 %, over randperm + sort", None),
    "select_random over numpy": Line("select_random 1 %, over numpy's Generator.choice + sort", None),
    "snip calibration bf16": Line("Snip calibration bf16, over plain forward and backward", 1.3, at_least=False),
    "snip calibration fp32": Line("Snip calibration fp32, over plain forward and backward", 1.3, at_least=False),
    "load": Line("load from disk and switch on, over PEFT's load_adapter + merge", 200.0),
    "load of bound": Line("load 16 layers and switch on, over reading and touching them", 1.3, at_least=False),
    "first of bound": Line("load a first adapter and switch it on, over reading it and the base and touching", None),
    "difference": Line("from_difference of mapped checkpoints, of read speed", 0.5, ""),
    "difference memory": Line("from_difference of 2 GB, memory of its own", 1000.0, " MB", at_least=False),
    "load over plain": Line("load from disk and switch on, over safetensors + index_copy_ unchecked", None),
    "sharded on in touches": Line(
        "Switcher.activate of ranks, in touches of each rank's own part", 1.1, at_least=False
    ),
    "sharded on in touches, on a processor": Line("the same, of its time on a processor", 1.1, at_least=False),
    "sharded on in ops": Line(
        "Switcher.activate of ranks, in times of foreach_apply_ on each rank's own part", 1.1, at_least=False
    ),
    "sharded on in ops, on a processor": Line("the same, of its time on a processor", 1.1, at_least=False),
    "sharded switch in touches": Line(
        "Switcher.activate A to B of ranks, in touches of each rank's own part", None, at_least=False
    ),
    "sharded switch in touches, on a processor": Line("the same, of its time on a processor", None, at_least=False),
    "sharded bytes in touches": Line(
        "the bytes of Switcher.activate of ranks alone, in touches of each rank's own part", None, at_least=False
    ),
    "sharded bytes in touches, on a processor": Line("the same, of its time on a processor", None, at_least=False),
    "ranks agree": Line("what ranks tell each other at a switch", None, " us", at_least=False),
    "switcher over addmm_": Line("Switcher.activate A to B, 1 % bf16, over LoRA unfuse and fuse (addmm_)", 4.0),
    "switcher over PEFT LoRA": Line("Switcher.activate A to B, 1 % bf16, over PEFT LoRA unmerge + merge", 25.0),
    "switcher over PEFT SHiRA": Line("Switcher.activate A to B, 1 % bf16, over PEFT SHiRA unmerge + merge", 10.0),
    "switcher over PEFT Super-Tuning": Line(
        "Switcher.activate A to B, 1 % bf16, over PEFT Super-Tuning unmerge + merge", 10.0
    ),
    "fingerprint share": Line("knowing all fingerprints, share of Switcher.activate", 10.0, " %", at_least=False),
    "swap_ over best LoRA bf16": Line("swap_ 1 % bf16, over the fastest LoRA fuse of all", 3.3),
    "swap_ over best LoRA fp32": Line("swap_ 1 % fp32, over the fastest LoRA fuse of all", 6.0),
    "swap_ over best exact bf16": Line("swap_ 1 % bf16, over the fastest other way that keeps the base", 1.5),
    "swap_ over best exact fp32": Line("swap_ 1 % fp32, over the fastest other way that keeps the base", 1.5),
    "swap_ over best lossy bf16": Line("swap_ 1 % bf16, over the fastest way that gives the base up", None),
    "swap_ over best lossy fp32": Line("swap_ 1 % fp32, over the fastest way that gives the base up", None),
    "swap_ over ways bf16": Line("swap_ 1 % bf16, over", None, guarded=False),
    "swap_ over ways fp32": Line("swap_ 1 % fp32, over", None, guarded=False),
    "warm swap_ over best exact bf16": Line("swap_ 1 % bf16 in the caches, over the fastest that keeps the base", None),
    "warm swap_ over best exact fp32": Line("swap_ 1 % fp32 in the caches, over the fastest that keeps the base", None),
    "warm swap_ over fuse bf16": Line("swap_ 1 % bf16 in the caches, over addmm_ LoRA fuse", None),
    "warm swap_ over fuse fp32": Line("swap_ 1 % fp32 in the caches, over addmm_ LoRA fuse", None),
    "load over ways": Line("load from a file and switch on, over", None, guarded=False),
    "end to end": Line("load from a file and switch on", None, guarded=False),
    "fig. 7, the paper's pair": Line("W += B @ A, over Tensor.scatter_", None, guarded=False),
    "fig. 7, the fast pair": Line("addmm_, over swap_", None),
    "scaling": Line("the cost of a byte at an axis's end, of its middle's", None, at_least=False, guarded=False),
}


def figures(result: dict[str, float]) -> str:
    low, high, best = (f"{result[key]:.3g}" for key in ("low", "high", "best"))
    return f"{result['median']:.3g} [dim]{low}..{high} ({best})[/dim]"


def is_disturbed(info: dict[str, Any]) -> bool:
    """Whether other processes ran for a measurable time where this benchmark should have. Unknown for several threads,
    since they wait for each other."""
    return info["threads"] == 1 and info.get("on_cpu", 1.0) < 0.97


def show(found: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Prints the table of the results kept in each benchmark's extra_info."""
    console = console or Console(width=150)
    rows: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    quick, load, disturbed = False, 0.0, []
    for one in found:
        info = one["extra_info"]
        quick |= bool(info.get("quick"))
        load = max(load, info.get("load", 0.0))
        if is_disturbed(info):
            disturbed.append(info["on_cpu"])
        for result in info.get("results", []):
            rows.setdefault((result["line"], result["variant"]), {})[info["threads"]] = result
    title = "Speed" + (" (--quick: tiny layers, the figures mean nothing)" if quick else "")
    caption = "median of the rounds, their quartiles, and in brackets the ratio of the fastest rounds"
    if load > 3:
        caption += (
            f"\n[red]the machine was busy (load {load:.1f}): these figures are unreliable, above all of 2 threads"
        )
    if disturbed:
        which = f"{len(disturbed)} benchmark{'s' * (len(disturbed) > 1)}"
        caption += (
            f"\n[red]other processes had the processor: {which} did not run all of the time, "
            f"one of them only {min(disturbed):.0%} of it"
        )
    table = Table(title=title, caption=caption)
    threads = sorted({n for row in rows.values() for n in row})
    table.add_column("line")
    table.add_column("variant")
    table.add_column("target", justify="right")
    for n in threads:
        table.add_column(f"{n} thread{'s' * (n > 1)}", justify="right")
    table.add_column("met")
    order = list(LINES)
    for (key, variant), row in sorted(rows.items(), key=lambda item: order.index(item[0][0])):
        line = LINES[key]
        cells = [figures(row[n]) if n in row else "" for n in threads]
        met = [line.met(one["median"]) for one in row.values()]
        verdict = "" if None in met else "[green]yes[/green]" if all(met) else "[red]no[/red]"
        table.add_row(line.text, variant, line.goal(), *cells, verdict)
    console.print(table)


def show_seconds(found: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Everything that the benchmarks timed: median microseconds per call, and bandwidths where they are known."""
    console = console or Console(width=150)
    table = Table(title="Microseconds a call (medians)")
    table.add_column("benchmark")
    table.add_column("timed")
    for one in found:
        info = one["extra_info"]
        times = [f"{name} {seconds['median'] * 1e6:.4g}" for name, seconds in info.get("seconds", {}).items()]
        rates = [f"{name} {rate:.3g} GB/s" for name, rate in info.get("gigabytes_per_second", {}).items()]
        table.add_row(one["name"], ", ".join(times) + ("; " if rates else "") + ", ".join(rates))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=argparse.FileType(), help="JSON written by --benchmark-json")
    parser.add_argument("--details", action="store_true", help="also what every benchmark timed")
    arguments = parser.parse_args()
    found = json.load(arguments.results)["benchmarks"]
    show(found)
    if arguments.details:
        show_seconds(found)


if __name__ == "__main__":
    main()
