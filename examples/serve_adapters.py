"""Serve many adapters from one model: switch, mix and check them, and see where their memory is.

    python examples/serve_adapters.py

It makes everything it needs: a small model with random weights, and three adapters that change 2 % of its attention
weights each. With a model of your own, train adapters with `shira.SparseTuner`, or extract them from a fine-tuned
checkpoint with `shira.Adapter.from_difference`.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import shira


class Block(nn.Module):
    """Enough of a transformer to have something to adapt."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return x + self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v))


def make_adapter(model: nn.Module, seed: int, path: Path) -> None:
    """What training leaves behind, with values that are drawn instead of learnt."""
    mask = shira.masks.Rand(density=0.02, seed=seed)
    with shira.SparseTuner(model, mask, targets=r"(q|v)_proj$") as tuner:
        with torch.no_grad():
            for values in tuner.parameters():
                values.add_(torch.randn(values.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
        tuner.adapter().save(path)


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(256) for _ in range(4))).to(torch.bfloat16).eval()
    x = torch.randn(1, 16, 256, dtype=torch.bfloat16)

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        files = {name: Path(folder) / f"{name}.safetensors" for name in ("formal", "poetic", "brief")}
        for seed, file in enumerate(files.values()):
            make_adapter(model, seed, file)
        base = model(x)

        # One switcher for the model's life. An adapter that was made for another base is refused.
        switcher = shira.Switcher(model)
        for name, file in files.items():
            switcher.add(name, file)

        # A request wants one adapter: it is on until the next one is.
        for name in files:
            start = time.perf_counter()
            switcher.activate(name)
            took = time.perf_counter() - start
            moved = (model(x) - base).abs().mean()
            print(f"{name:<8} on in {took * 1e3:.2f} ms, outputs move by {moved:.4f}")

        # Or several at once, each at a strength of its own; other strengths are one more pass.
        switcher.activate({"formal": 0.7, "brief": 0.5})
        switcher.activate({"formal": 0.2, "brief": 1.0})
        with switcher.using("poetic", alpha=0.5):
            print("within the block:", switcher.active)
        print("after it:        ", switcher.active)

        # Merged once by TIES, then an adapter like any other. Merging reads the base.
        switcher.deactivate()
        adapters = switcher.adapters
        switcher.add("merged", shira.combine.ties([adapters["formal"], adapters["poetic"]], model, density=0.5))
        switcher.activate({"merged": 1.0, "brief": 0.5})

        # The weights are what they should be: entries compared, or all memory hashed.
        switcher.verify()
        switcher.verify(full=True)
        print(f"fingerprint of 0.q_proj.weight: {switcher.fingerprint('0.q_proj.weight'):016x}")

        for name, memory in switcher.memory().items():
            print(f"{name:<15} {memory.device:>8,} bytes ready to switch, {memory.disk:>7,} in its file")

        switcher.deactivate()
        print("the base is back, bit for bit:", torch.equal(model(x), base))


if __name__ == "__main__":
    main()
