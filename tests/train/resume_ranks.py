"""Two ranks go on with a checkpoint that four ranks of `sharded_ranks` wrote: a program for ``ranks.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parent))

from sharded_ranks import LINEAR, OPTIMIZERS, RAND, base_is_back, loss_of, my, net, same, shard

from shira import Adapter, SparseTuner


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
    Path(f"done.{dist.get_rank()}").touch()


if __name__ == "__main__":
    main()
