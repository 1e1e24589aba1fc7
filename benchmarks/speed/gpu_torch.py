"""What torch builds on the ops, on a device: opcheck, graphs that torch.compile makes, and streams.

The tests prove the first two on CPU tensors. That an op runs on the current stream only a GPU can show: its arguments
are written on a stream that is late, and a call on any other would read what was there before.

python -m benchmarks.speed.gpu_torch
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

import shira_ops.reference as reference
from benchmarks.speed.gpu_ops import Arguments, calls, left, op, placed, run, same, tensors
from benchmarks.speed.gpu_proofs import Proof, prove

LATE = 50_000_000  # cycles of a GPU: some hundredths of a second


def opchecked(name: str, given: Arguments, device: str) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name != "foreach_diff_":  # writes its arguments and gives lists, which torch cannot trace
        checks.append("test_aot_dispatch_dynamic")
    with torch.enable_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.library.opcheck(op(name), (), placed(given, device), test_utils=checks)


def compiled(given: Arguments, device: str) -> None:
    """What is read before a change keeps the old numbers, what is read after it has the new ones."""

    def graph(weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, saved: torch.Tensor) -> Any:
        before = weight + 1
        torch.ops.shira.apply_(weight, indices, values * 2, saved, alpha=0.5)
        middle = torch.ops.shira.gather(weight, indices) + 1
        torch.ops.shira.scatter_(weight, indices, saved)
        return before, middle, weight * 1

    names = ("weight", "indices", "values", "saved")
    eager, own = ([placed(given, device)[name] for name in names] for _ in range(2))
    wanted, found = graph(*eager), torch.compile(graph, fullgraph=True)(*own)
    if not all(same(a.cpu(), b.cpu()) for a, b in zip((*found, *own), (*wanted, *eager), strict=True)):
        raise AssertionError("a graph of torch.compile differs from eager calls")


def on_a_late_stream(name: str, given: Arguments, device: str) -> None:
    own, fresh = placed(given, device), placed(given, device)
    for one in tensors(own):
        one.zero_()
    stream: Any = nullcontext()
    if device == "cuda":
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
    with torch.cuda.stream(stream) if device == "cuda" else stream:
        if device == "cuda":
            torch.cuda._sleep(LATE)
        for late, written in zip(tensors(own), tensors(fresh), strict=True):
            late.copy_(written)
        found = left(op(name)(**own), own)
    wanted = run(reference.OPS[name], given, "cpu")
    if not all(same(*pair) for pair in zip(found, wanted, strict=True)):
        raise AssertionError("a call on a stream that is late differs from the reference")


def proofs(device: str, once: bool) -> Iterator[Proof]:
    given = calls(torch.bfloat16, 16, 24, 80)
    for name in reference.OPS:
        yield f"late stream: {name}", functools.partial(on_a_late_stream, name, given[name], device)
    if not once:
        for name in reference.OPS:
            yield f"opcheck: {name}", functools.partial(opchecked, name, given[name], device)
        yield "torch.compile", functools.partial(compiled, calls(torch.float32, 1, 24, 80)["apply_"], device)


if __name__ == "__main__":
    prove(__doc__, proofs)
