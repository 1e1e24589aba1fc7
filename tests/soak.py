"""Random operations on a Switcher, a million of them, and ten thousand on a model that follows a trainer: `make soak`,
or `python tests/soak.py --operations 100000`.

After every operation the weights are compared, bit for bit, with those of a fresh activation on an untouched model, and
with the base when nothing is active. What the operations are stands in switcher_walk.py and sync_walk.py.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import torch

from switcher_walk import Walk
from sync_walk import SyncWalk

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Without a budget, and with one under which adapters leave and come back.
BUDGETS = (None, 12_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--operations", type=int, default=1_000_000, help="in all (default: 1,000,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=10_000, help="of a model that follows one (default: 10,000)")
    given = parser.parse_args()
    torch.set_num_threads(1)  # the weights are tiny
    soak("operations on a Switcher", Walk, given.operations, given.seed)
    soak("operations with updates", SyncWalk, given.updates, given.seed)


def soak(what: str, kind: type[Walk] | type[SyncWalk], operations: int, seed: int) -> None:
    start = told = time.monotonic()
    counts: Counter[str] = Counter()
    done, runs = 0, [(dtype, budget) for dtype in DTYPES for budget in BUDGETS]
    for number, (dtype, budget) in enumerate(runs):
        walk = kind(dtype, seed + number, budget)
        while done < operations * (number + 1) // len(runs):
            walk.step()
            done += 1
            if time.monotonic() - told > 5:
                told = time.monotonic()
                print(f"{done:>9,} of {operations:,} {what}, {told - start:.0f} s, {dtype}", flush=True)
        walk.finish()
        counts.update(walk.counts)
    print(f"{done:,} {what} in {time.monotonic() - start:.0f} s, 0 bits differ: {dict(counts)}")


if __name__ == "__main__":
    main()
