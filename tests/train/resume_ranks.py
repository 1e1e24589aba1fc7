"""Two ranks go on with a checkpoint that four ranks of `sharded_ranks` wrote: a program for ``ranks.py``."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent))

from sharded_ranks import LINEAR, OPTIMIZERS, RAND, base_is_back, loss_of, my, net, same, shard

from shira import SGD, Adapter, SparseTuner


def compiled(mesh: DeviceMesh) -> None:
    """The hooks of sharded weights run between a compiled model's graphs."""

    def adapter(model: nn.Module, given: Tensor) -> Adapter:
        tuner = SparseTuner(model, RAND)
        optimizer = SGD(tuner, lr=0.1)
        for _ in range(2):
            model(given).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return tuner.adapter()

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), torch.randn(4, 8)
    wanted = adapter(copy.deepcopy(model), x)
    fully_shard(model, mesh=mesh)
    model.compile(backend="eager")
    same(adapter(model, my(mesh, x)), wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def main() -> None:
    before = Path("..") / "sharded_ranks"
    mesh = init_device_mesh("cpu", (2,))
    model = shard(net(), mesh)
    tuner = SparseTuner(model, RAND, LINEAR)
    optimizer = OPTIMIZERS["AdamW"](tuner)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"weights": weights, "moments": moments}, checkpoint_id=before / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    same(tuner.adapter(), Adapter.load(before / "1.safetensors"), exact=True)
    loss_of(model, my(mesh)).backward()
    optimizer.step()
    same(tuner.adapter(), Adapter.load(before / "2.safetensors"))
    tuner.verify()
    tuner.detach()
    base_is_back(model)
    compiled(mesh)
    Path(f"done.{dist.get_rank()}").touch()


if __name__ == "__main__":
    main()
