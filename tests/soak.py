"""Random operations on a Switcher, a million of them: `make soak`, or `python tests/soak.py --operations 100000`.

After every operation the weights are compared, bit for bit, with those of a fresh activation on an untouched model, and
with the base when nothing is active. What the operations are stands in switcher_walk.py.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import torch

from switcher_walk import Walk

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Without a budget, and with one under which adapters leave and come back.
BUDGETS = (None, 12_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--operations", type=int, default=1_000_000, help="in all (default: 1,000,000)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # the weights are tiny
    start = told = time.monotonic()
    counts: Counter[str] = Counter()
    done, runs = 0, [(dtype, budget) for dtype in DTYPES for budget in BUDGETS]
    for number, (dtype, budget) in enumerate(runs):
        walk = Walk(dtype, given.seed + number, budget)
        while done < given.operations * (number + 1) // len(runs):
            walk.step()
            done += 1
            if time.monotonic() - told > 5:
                told = time.monotonic()
                print(f"{done:>9,} of {given.operations:,} operations, {told - start:.0f} s, {dtype}", flush=True)
        walk.finish()
        counts.update(walk.counts)
    print(f"{done:,} operations in {time.monotonic() - start:.0f} s, 0 bits differ: {dict(counts)}")


if __name__ == "__main__":
    main()
