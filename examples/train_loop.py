"""Train a sparse adapter with a plain PyTorch loop, save it, and take it off again.

    python examples/train_loop.py --out adapter.safetensors

A small network first learns one task; then 5 % of its entries learn another one, and the first task comes back bit for
bit. Runs offline on a CPU in a few seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shira


def task(turned: bool, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points in a plane, labelled by the ring they lie in; in the other task by the quarter."""
    points = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    rings = (points.norm(dim=1) * 2).long().clamp(max=3)
    quarters = (points[:, 0] > 0).long() + 2 * (points[:, 1] > 0).long()
    return points, quarters if turned else rings


def train(model: nn.Module, optimizer: torch.optim.Optimizer, turned: bool, steps: int) -> None:
    for step in range(steps):
        points, labels = task(turned, 256, seed=step)
        loss = F.cross_entropy(model(points), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4}  loss {loss.item():.3f}")


@torch.no_grad()
def accuracy(model: nn.Module, turned: bool) -> float:
    points, labels = task(turned, 4096, seed=10**6)
    return (model(points).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("adapter.safetensors"), help="where to save the adapter")
    parser.add_argument("--density", type=float, default=0.05, help="share of the entries that train")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=2e-2)
    args = parser.parse_args()

    torch.set_num_threads(1)  # so small a network gains nothing from more
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    print("base: rings")
    train(model, torch.optim.AdamW(model.parameters(), lr=5e-3), turned=False, steps=300)
    model.zero_grad()
    base = [p.detach().clone() for p in model.parameters()]
    print(f"rings {accuracy(model, False):.1%}, quarters {accuracy(model, True):.1%}")

    # From here on only the adapter's entries train; the model itself holds them.
    tuner = shira.SparseTuner(model, shira.masks.WeightMagnitude(density=args.density), whole=r"^4\.")
    print(tuner.summary())
    print("adapter: quarters")
    train(model, shira.AdamW(tuner, lr=args.lr, weight_decay=0.0), turned=True, steps=args.steps)
    print(f"rings {accuracy(model, False):.1%}, quarters {accuracy(model, True):.1%}")
    tuner.adapter(provenance={"task": "quarters"}).save(args.out)

    tuner.detach()
    restored = all(torch.equal(p, q) for p, q in zip(model.parameters(), base, strict=True))
    print(f"detached: rings {accuracy(model, False):.1%}, base restored bit for bit: {restored}")

    switcher = shira.Switcher(model)
    switcher.add("quarters", args.out)
    with switcher.using("quarters"):
        print(f"from {args.out}: quarters {accuracy(model, True):.1%}")


if __name__ == "__main__":
    main()
