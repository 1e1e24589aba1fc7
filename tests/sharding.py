"""What the programs that run on several ranks share: a block, how it is divided, and the steps it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from shira import Adapter, SparseTuner


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def shard(model: Any, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def parallel(model: Any, mesh: DeviceMesh, sequence: bool = False) -> nn.Module:
    inside = Shard(1) if sequence else Replicate()
    for block in model.blocks:
        plan: dict[str, Any] = {
            "up": ColwiseParallel(input_layouts=inside),
            "down": RowwiseParallel(output_layouts=inside, use_local_output=not sequence),
        }
        if sequence:
            plan["norm"] = SequenceParallel()
        parallelize_module(block, mesh, plan)
        if sequence:
            into = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1))
            out = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())
            for style in (into, out):
                parallelize_module(block, mesh, style)
    return model


def three_steps(
    tuner: SparseTuner, optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]
) -> tuple[Tensor, Adapter]:
    """The losses of three steps in one process, and the adapter."""
    losses = []
    for _ in range(3):
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(tuner.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), tuner.adapter()
