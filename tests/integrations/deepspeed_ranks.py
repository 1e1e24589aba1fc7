"""What each of two ranks does in `test_trainers` with DeepSpeed: ZeRO-1 and ZeRO-2 as one process, ZeRO-3 refused."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import shira
from sharding import three_steps
from shira import Adapter, SparseTuner, masks

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
MASK = masks.Rand(density=0.2, granule=4)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


def loss_of(model: Any, x: Tensor) -> Tensor:
    return (model(x) - x.flip(-1)).square().mean()


def optimizer_of(tuner: SparseTuner, kind: str) -> torch.optim.Optimizer:
    if kind == "shira":
        return shira.AdamW(tuner, lr=0.01, eps=1e-4)
    return torch.optim.AdamW(tuner.parameters(), lr=0.01, eps=1e-4)


def one_process(kind: str) -> tuple[Tensor, Adapter]:
    model = net()
    tuner = SparseTuner(model, MASK)
    return three_steps(tuner, optimizer_of(tuner, kind), lambda: loss_of(model, X))


def engine_of(model: nn.Module, optimizer: Any, stage: int) -> Any:
    import deepspeed

    # It compiles an extension for collectives between processes of one machine, which nothing here needs.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    settings = {
        "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.05, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5000}, "steps_per_print": 10**9,
    }  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def main() -> None:
    warnings.simplefilter("ignore")
    own = X.chunk(2)[dist.get_rank()]
    for stage, kind, gradient in ((1, "torch", "sampled"), (2, "shira", "dense")):
        losses, wanted = one_process(kind)
        model, got = net(), []
        tuner = SparseTuner(model, MASK, gradient=gradient)
        engine = engine_of(model, optimizer_of(tuner, kind), stage)
        for _ in range(3):
            loss = loss_of(engine, own)
            engine.backward(loss)
            engine.step()
            total = loss.detach().clone()
            dist.all_reduce(total)
            got.append(total / 2)
        torch.testing.assert_close(torch.stack(got), losses, rtol=1e-6, atol=0)
        adapter = tuner.adapter()
        for name, entry in wanted.weights.items():
            assert torch.equal(adapter.weights[name].indices, entry.indices)
            torch.testing.assert_close(adapter.weights[name].values, entry.values, rtol=1e-6, atol=1e-7)
        with pytest.raises(ValueError, match=r"is already in a DeepSpeed engine"):
            SparseTuner(model, MASK, "nothing")
        tuner.verify()
        tuner.detach()
        assert all(
            torch.equal(a, b) for a, b in zip(net().state_dict().values(), model.state_dict().values(), strict=True)
        )
    model = net()
    tuner = SparseTuner(model, masks.Rand(density=0.2, seed=dist.get_rank()))
    engine = engine_of(model, optimizer_of(tuner, "torch"), 1)
    with pytest.raises(RuntimeError, match=r"the ranks have different masks for 0\.weight"):
        engine(own)
    model = net()
    tuner = SparseTuner(model, MASK)
    engine = engine_of(model, optimizer_of(tuner, "torch"), 3)
    with pytest.raises(RuntimeError, match=r"0\.weight is partitioned by DeepSpeed's ZeRO-3"):
        engine(own)
    Path(f"done.{dist.get_rank()}").touch()


if __name__ == "__main__":
    main()
