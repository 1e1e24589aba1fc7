"""How long a switch takes, by density and granule: ``python -m benchmarks.quality.switching``, on a quiet machine.

`torch.ops.shira.swap_` on layers of 4096 x 4096 bfloat16 with random masks, one thread, caches
filled with other data before every sweep; beside it the fuse of a LoRA of as many parameters (``addmm_`` in place).
Medians of interleaved rounds. The layers of the experiments are far smaller: they give the accuracy, and this table
gives the cost at a realistic size.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import shira
import shira_ops
from benchmarks.quality.store import RESULTS

SIDE, LAYERS, ROUNDS = 4096, 6, 9
DENSITIES = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
GRANULES = (1, 4, 8, 16, 32)
PATH = RESULTS / "switching.json"


def measure(side: int = SIDE, layers: int = LAYERS, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Milliseconds per layer for every density and granule, and for LoRA."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(side, side, generator=generator).bfloat16() for _ in range(layers)]
    other = torch.zeros(96 << 20, dtype=torch.uint8)
    found = []
    for density in DENSITIES:
        jobs: dict[int, Callable[[int], object]] = {}  # by granule; 0 is LoRA
        for granule in GRANULES:
            mask = shira.masks.Rand(density, granule=granule)
            indices = [mask(str(number), weight) for number, weight in enumerate(weights)]
            values = [shira_ops.gather(w, i, granule=granule) for w, i in zip(weights, indices, strict=True)]

            def swap(layer: int, i: list[Tensor] = indices, v: list[Tensor] = values, granule: int = granule) -> None:
                torch.ops.shira.swap_(weights[layer], i[layer], v[layer], granule=granule)

            jobs[granule] = swap
        r = max(1, round(density * side / 2))
        shapes = ((side, r), (r, side))
        b, a = (torch.randn(*shape, generator=generator).mul_(0.1).bfloat16() for shape in shapes)
        signs = [1.0] * layers

        def fuse(layer: int, b: Tensor = b, a: Tensor = a, signs: list[float] = signs) -> None:
            # In, and out again the next time, as a server does; so the weights do not grow.
            weights[layer].addmm_(b, a, alpha=signs[layer])
            signs[layer] = -signs[layer]

        jobs[0] = fuse
        times: dict[int, list[float]] = {granule: [] for granule in jobs}
        for _ in range(rounds):
            for granule, job in jobs.items():
                other.add_(1)
                start = time.perf_counter()
                for layer in range(layers):
                    job(layer)
                times[granule].append((time.perf_counter() - start) / layers * 1e3)
        for granule, samples in times.items():
            what = {"granule": granule} if granule else {"rank": r}
            spread = [round(min(samples), 4), round(max(samples), 4)]
            found.append({"density": density, **what, "ms": round(statistics.median(samples), 4), "range": spread})
    return found


def main() -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        found = measure()
    about = {"side": SIDE, "dtype": "bfloat16", "threads": 1, "rounds": ROUNDS, "torch": torch.__version__}
    PATH.write_text(json.dumps({**about, "measured": found}, indent=1) + "\n")
    for one in found:
        print(one)


if __name__ == "__main__":
    main()
