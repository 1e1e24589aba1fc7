"""Weights with more entries than 32 bits count, on a device: too large for the tests, 5 GB or 9 GB a proof.

A call on a few entries of a large weight must do what the same call does to these entries alone, and leave all others.

python -m benchmarks.speed.gpu_large        (--device cpu: at a small size, to see whether it runs)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

import shira_ops
from benchmarks.speed.gpu_lab import BF16, clear
from benchmarks.speed.gpu_ops import ADAMW, SGD, same
from benchmarks.speed.gpu_proofs import Proof, prove

Tensor = torch.Tensor
shira = torch.ops.shira
Call = Callable[[Tensor, Tensor, Callable[[], Tensor]], list[Tensor]]


def bits_of(device: str) -> int:
    return 31 if device == "cuda" else 12


def room(device: str, gigabytes: float) -> str | None:
    """Why there is no room for a proof."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        return f"skipped: the GPU has no {gigabytes:g} GB left"
    return None


def places(limit: int, granule: int, bits: int, device: str) -> Tensor:
    """Granules at both ends of the weight, and on both sides of entry 2^bits."""
    edge = (1 << bits) // granule
    return torch.tensor([0, 7, edge - 1, edge, limit - 1], device=device)


def changed(call: Call, granule: int, device: str) -> str | None:
    """`call` gets a weight, the indices, and a function that makes lists; it returns what it made and changed."""
    if short := room(device, 5):
        return short
    bits = bits_of(device)
    numel = (1 << bits) + 80
    at = places(numel // granule, granule, bits, device)
    entries = (at[:, None] * granule + torch.arange(granule, device=device)).view(-1)
    weight = torch.zeros(numel, dtype=BF16, device=device)
    weight[entries] = torch.randn(len(entries), device=device).to(BF16)
    alone, all_of_it = weight[entries], torch.arange(len(at), device=device)

    def lists(seed: int) -> Callable[[], Tensor]:
        random = torch.Generator().manual_seed(seed)
        return lambda: torch.randn(len(entries), generator=random).to(device)

    large, small = call(weight, at, lists(1)), call(alone, all_of_it, lists(1))
    if not all(same(a.cpu(), b.cpu()) for a, b in zip((*large, weight[entries]), (*small, alone), strict=True)):
        raise AssertionError("a few entries of a large weight are not what they are alone")
    weight[entries] = 0
    if weight.view(torch.int16).any():
        raise AssertionError("other entries of a large weight were written")
    return None


def switched(granule: int) -> Call:
    def call(weight: Tensor, at: Tensor, make: Callable[[], Tensor]) -> list[Tensor]:
        values, saved, others, kept = (make().to(BF16) for _ in range(4))
        shira.apply_(weight, at, values, saved, alpha=0.5, granule=granule)
        more = at[1:], values[granule:], kept[granule:]
        shira.switch_(weight, at, saved, *more, alpha=0.7, delta=True, granule=granule)
        shira.scatter_add_(weight, at, others, alpha=0.3, granule=granule)
        shira.swap_(weight, at, others, granule)
        shira.foreach_swap_([weight], [at[:2]], [values[: 2 * granule]], granule)
        return [values, saved, others, kept[granule:], shira.gather(weight, at, granule)]

    return call


def stepped(granule: int) -> Call:
    def call(weight: Tensor, at: Tensor, make: Callable[[], Tensor]) -> list[Tensor]:
        master, first, second, grad = (make() for _ in range(4))
        second.abs_()
        shira.adamw_(weight, at, master, first, second, grad, step=3, **ADAMW, granule=granule)
        shira.sgd_(weight, at, master, first, grad, **SGD, granule=granule)
        return [master, first, second]

    return call


def fused(granule: int) -> Call:
    def call(weight: Tensor, at: Tensor, make: Callable[[], Tensor]) -> list[Tensor]:
        lists = [at, at[1:], at[::2].contiguous()]
        values = [make().to(BF16)[: len(one) * granule] for one in lists]
        plan = shira.fuse_plan(lists, granule)
        saved = shira.gather(weight, plan[0], granule)
        alphas = torch.tensor([0.7, -0.25, 1.0], device=weight.device)
        deltas = [False, True, False]
        shira.fuse_(weight, saved, *plan, values, alphas, delta=deltas, refuse=False, granule=granule)
        return [saved]

    return call


def fingerprinted(device: str) -> str | None:
    if short := room(device, 9):
        return short
    bits = bits_of(device)
    weight = torch.zeros((1 << bits) + 80, dtype=BF16, device=device)
    at = places(weight.numel(), 1, bits, device)
    before, own = shira.fingerprint(weight), shira.fingerprint_at(weight, at)
    snapshot = weight.clone()
    weight[at] = 1
    after = before - own + shira.fingerprint_at(weight, at)
    if int(shira.fingerprint(weight)) != int(after) or int(before) == int(after):
        raise AssertionError("fingerprint of a large weight does not follow its entries")
    found, values = shira.diff_(snapshot, weight)
    if not torch.equal(found.long(), at) or not bool((values == 1).all()) or not torch.equal(snapshot, weight):
        raise AssertionError("diff_ of a large weight does not find its changes")
    return None


def selected(granule: int, device: str) -> str | None:
    if short := room(device, 6):
        return short
    bits = bits_of(device)
    weight = torch.zeros((1 << bits) + 80, dtype=BF16, device=device)
    at = places(weight.numel() // granule, granule, bits, device)
    weight[at * granule] = torch.tensor([1.0, 2.0, -3.0, 2.0, 0.5], device=device).to(BF16)
    if not torch.equal(shira.select_top(weight, None, len(at), score="magnitude", granule=granule).long(), at):
        raise AssertionError("select_top of a large weight does not find its largest granules")
    return None


def multiplied(granule: int, device: str) -> str | None:
    """Of a matrix of 65536 x 40000, which exists nowhere."""
    rows, columns = (65536, 40000) if device == "cuda" else (96, 48)
    random = torch.Generator().manual_seed(granule)
    limit = rows * columns // granule
    at = torch.unique(torch.cat([torch.randint(limit, (500,), generator=random), torch.tensor([0, limit - 1])]))

    def small(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=random).to(BF16)  # sums of products are exact, in any order

    x, y, values = small(3, columns), small(3, rows), small(len(at) * granule)
    entries = (at[:, None] * granule + torch.arange(granule)).view(-1)
    row, column = entries // columns, entries % columns
    wanted = {
        "sampled_grad": (y[:, row].float() * x[:, column].float()).sum(0),
        "sparse_linear": torch.zeros(3, rows).index_add_(1, row, values.float() * x[:, column].float()).to(BF16),
        "sparse_linear, transposed": torch.zeros(3, columns)
        .index_add_(1, column, values.float() * y[:, row].float())
        .to(BF16),
    }
    x, y, values, at = (one.to(device) for one in (x, y, values, at))
    found = {
        "sampled_grad": shira.sampled_grad(y, x, at, granule),
        "sparse_linear": shira.sparse_linear(x, at, values, rows, granule=granule),
        "sparse_linear, transposed": shira.sparse_linear(y, at, values, columns, transposed=True, granule=granule),
    }
    if shira_ops.backends()["sampled_grad"][device].name == "compiled" and device == "cuda":
        found["sampled_grad, dense"] = shira._sampled_grad(y, x, at, granule, "dense")
        wanted["sampled_grad, dense"] = wanted["sampled_grad"]
    bad = [name for name, one in found.items() if not torch.equal(one.cpu(), wanted[name])]
    if bad:
        raise AssertionError(f"{', '.join(bad)}: not the exact sums")
    return None


def cleared(proof: Callable[[], Any]) -> Any:
    try:
        return proof()
    finally:
        clear()


def proofs(device: str, once: bool) -> Iterator[Proof]:
    families = {"switch": switched, "optimize": stepped, "fuse": fused}
    for granule in (1, 16):
        found: dict[str, Callable[[], Any]] = {
            name: functools.partial(changed, family(granule), granule, device) for name, family in families.items()
        }
        found["select"] = functools.partial(selected, granule, device)
        found["gradient and overlay"] = functools.partial(multiplied, granule, device)
        for name, proof in found.items():
            yield f"{name}, granule {granule}", functools.partial(cleared, proof)
    yield "fingerprint and diff", functools.partial(cleared, functools.partial(fingerprinted, device))


if __name__ == "__main__":
    prove(__doc__, proofs)
