"""What each of two ranks does in `test_trainers`: the trainers that people use, around a tuner. For ``ranks.py``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import shira
from sharding import Block, three_steps
from shira import Adapter, DoRATuner, SparseTuner, masks
from shira.integrations.transformers import AdapterCallback, AdapterCheckpoints

RAND = masks.Rand(density=0.1, granule=4)
LINEAR = "up|down|head"
IDS = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(1))
ROWS = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]


class Net(nn.Module):
    """Returns its loss, as transformers' models do."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return {"loss": F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


# AdamW divides by the gradient's size: with its own eps the rounding of a tiny gradient would become a whole step.
OPTIMIZERS: dict[str, Callable[[SparseTuner], torch.optim.Optimizer]] = {
    "shira": lambda tuner: shira.AdamW(tuner, lr=0.01, eps=1e-4),
    "torch": lambda tuner: torch.optim.AdamW(tuner.parameters(), lr=0.01, eps=1e-4),
}


def one_process(
    mask: masks.Mask = RAND, kind: type[SparseTuner] = SparseTuner, **options: Any
) -> tuple[Tensor, Adapter]:
    model = net()
    tuner = kind(model, mask, LINEAR, **options)
    return three_steps(tuner, OPTIMIZERS["torch"](tuner), lambda: model(IDS)["loss"])


def own(ids: Tensor = IDS) -> Tensor:
    return ids.chunk(2)[dist.get_rank()]


def mean(loss: Tensor) -> Tensor:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total / 2


def same(got: Adapter, wanted: Adapter, exact: bool = False) -> None:
    assert got.weights.keys() == wanted.weights.keys()
    for name, entry in wanted.weights.items():
        other = got.weights[name]
        assert torch.equal(other.indices, entry.indices), name
        assert other.fingerprint == entry.fingerprint, name
        if exact:
            assert torch.equal(other.values, entry.values), name
        else:
            torch.testing.assert_close(other.values, entry.values, rtol=1e-6, atol=1e-7)


def base_is_back(model: nn.Module) -> None:
    state = {name.replace("._checkpoint_wrapped_module", ""): tensor for name, tensor in model.state_dict().items()}
    for name, wanted in net().state_dict().items():
        found = state[name]
        assert torch.equal(found.full_tensor() if isinstance(found, DTensor) else found, wanted), name


@contextmanager
def fsdp_on_cpus() -> Iterator[None]:
    """accelerate takes FSDP for accelerators alone, and DDP for CPUs. What it does for FSDP2 runs on CPUs too."""
    before: Any = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        before(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = before
        forget()


def forget() -> None:
    """accelerate keeps one state for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerator_of(accumulate: int = 1, precision: str = "no", **options: Any) -> Accelerator:
    forget()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **options)
    made = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=accumulate, mixed_precision=precision)
    assert made.is_fsdp2
    return made


# ---- accelerate ----------------------------------------------------------------------------------------------


def accelerate_prepares() -> None:
    for kind, accumulate, options in (
        ("torch", 1, {}),
        ("shira", 2, {"reshard_after_forward": False}),
        ("shira", 1, {"activation_checkpointing": True, "cpu_ram_efficient_loading": True}),
    ):
        accelerator = accelerator_of(accumulate, **options)
        model = net()
        whole = "norm" if accumulate == 2 else None
        losses, wanted = one_process(whole=whole)
        tuner = SparseTuner(model, RAND, LINEAR, whole=whole)
        prepared, optimizer = accelerator.prepare(model, OPTIMIZERS[kind](tuner))
        got = []
        for _ in range(3):
            total = torch.zeros(())
            for part in own().chunk(accumulate):
                with accelerator.accumulate(prepared):
                    loss = prepared(part)["loss"]
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(prepared.parameters(), 0.05)
                    optimizer.step()
                    optimizer.zero_grad()
                total += loss.detach() / accumulate
            got.append(mean(total))
        torch.testing.assert_close(torch.stack(got), losses, rtol=1e-6, atol=0)
        same(tuner.adapter(), wanted)
        assert all(isinstance(values, DTensor) for values in tuner.parameters())
        if accumulate == 1 and not options:
            goes_on_from_a_state(accelerator, prepared, tuner, optimizer)
        tuner.verify()
        tuner.detach()
        base_is_back(prepared)


def goes_on_from_a_state(accelerator: Accelerator, model: nn.Module, tuner: SparseTuner, optimizer: Any) -> None:
    accelerator.save_state("state")
    found = []
    for _ in range(2):
        accelerator.backward(model(own())["loss"])
        optimizer.step()
        optimizer.zero_grad()
        found.append(tuner.adapter())
        accelerator.load_state("state")
    same(found[1], found[0], exact=True)


def accelerate_computes_in_bf16() -> None:
    """The values and their gradients stay in fp32, also of weights that are kept in bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        accelerator = accelerator_of(precision="bf16")
        model: Any = net().to(dtype)
        tuner = SparseTuner(model, RAND, LINEAR)
        prepared, optimizer = accelerator.prepare(model, OPTIMIZERS["shira"](tuner))
        before = prepared(own())["loss"].detach()
        for _ in range(4):
            accelerator.backward(prepared(own())["loss"])
            assert all(values.grad.dtype == torch.float32 for values in tuner.parameters())
            optimizer.step()
            optimizer.zero_grad()
        assert mean(prepared(own())["loss"]) < mean(before)
        assert tuner.adapter().weights["head.weight"].dtype == dtype
        tuner.verify()
        tuner.detach()


# ---- transformers.Trainer ------------------------------------------------------------------------------------


class Trainer(AdapterCheckpoints, transformers.Trainer):
    pass


def train(
    folder: str, kept: str, resume: str | None = None, plain: bool = False, **options: Any
) -> tuple[Any, SparseTuner]:
    forget()
    model = net()
    tuner = SparseTuner(model, RAND, LINEAR)
    settings: dict[str, Any] = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, **options,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(
        folder, use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=1, learning_rate=0.01,
        adam_epsilon=1e-4, lr_scheduler_type="constant", logging_strategy="no", fsdp=True,
        fsdp_config={"version": 2, "state_dict_type": kept, "transformer_layer_cls_to_wrap": ["Block"]}, **settings,
    )  # fmt: skip
    if plain:
        trainer: Any = transformers.Trainer(model, arguments, train_dataset=ROWS, callbacks=[AdapterCallback(tuner)])
    else:
        trainer = Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:4], tuner=tuner)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, tuner


def names(folder: str) -> set[str]:
    dist.barrier()
    return {path.name for path in Path(folder).iterdir()}


def transformers_shards() -> None:
    ours = {"shira_adapter.safetensors", "shira_tuner.pt"}
    trainer, tuner = train("beside", "FULL_STATE_DICT", plain=True)
    assert type(trainer.model).__name__ == "FSDPNet"
    wanted = tuner.adapter()
    assert {*ours, "optimizer.bin", "pytorch_model_fsdp.bin"} <= names("beside/checkpoint-4")
    same(Adapter.from_pretrained("beside/checkpoint-4"), wanted, exact=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(SparseTuner, "adapter")  # the file is written a weight at a time
        trainer, tuner = train(
            "best", "SHARDED_STATE_DICT", load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
            metric_for_best_model="loss", greater_is_better=True,
        )  # fmt: skip
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")  # the largest loss
    same(tuner.adapter(), Adapter.from_pretrained("best/checkpoint-2"), exact=True)
    trainer.save_model("out")
    assert names("out") == {*ours, "training_args.bin"}
    tuner.verify()
    tuner.detach()
    base_is_back(trainer.model)
    for folder, kept, state in (
        ("beside", "FULL_STATE_DICT", "optimizer.bin"), ("best", "SHARDED_STATE_DICT", "optimizer_0"),
    ):  # fmt: skip
        _, tuner = train(f"after-{folder}", kept, f"{folder}/checkpoint-2")
        same(tuner.adapter(), wanted, exact=True)
        files = names(f"after-{folder}/checkpoint-4")
        assert {*ours, state, "scheduler.pt"} <= files
        assert not any("model" in name for name in files)


# ---- a loop as TorchTitan's ----------------------------------------------------------------------------------


def from_meta(tensor_parallel: bool) -> Net:
    """Parallelized on the meta device, made empty on the ranks' own, and then loaded."""
    mesh = init_device_mesh("cpu", (1, 2) if tensor_parallel else (2, 1), mesh_dim_names=("dp", "tp"))
    with torch.device("meta"):
        model = Net()
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    with pytest.raises(ValueError, match=r"is on the meta device; give it its weights first"):
        SparseTuner(model, RAND, "up|down")
    model.to_empty(device="cpu")
    set_model_state_dict(model, net().state_dict(), options=StateDictOptions(full_state_dict=True))
    return model


def as_torchtitan_does(tensor_parallel: bool) -> None:
    ids, kept = IDS if tensor_parallel else own(), f"dcp-{tensor_parallel}"

    def attached() -> tuple[Net, SparseTuner, torch.optim.Optimizer]:
        model = from_meta(tensor_parallel)
        tuner = SparseTuner(model, RAND, "up|down")
        return model, tuner, OPTIMIZERS["shira"](tuner)

    def steps(model: Net, tuner: SparseTuner, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            model(ids)["loss"].backward()
            nn.utils.clip_grad_norm_(tuner.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()

    def state_of(model: Net, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The values and the optimizer's state, without the base."""
        weights, moments = get_state_dict(model, optimizer)
        return {"values": {k: v for k, v in weights.items() if k.endswith("_shira_values")}, "optimizer": moments}

    model, tuner, optimizer = attached()
    steps(model, tuner, optimizer, 1)
    pending = dcp.async_save(state_of(model, optimizer), checkpoint_id=kept, process_group=dist.new_group())
    steps(model, tuner, optimizer, 2)  # while it is being written
    pending.result()
    wanted = tuner.adapter()
    tuner.detach()
    base_is_back(model)

    model, tuner, optimizer = attached()
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=kept)
    set_state_dict(
        model, optimizer, model_state_dict=state["values"], optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),
    )  # fmt: skip
    steps(model, tuner, optimizer, 2)
    same(tuner.adapter(), wanted, exact=True)
    trainer = shira.Trainer(tuner, [ids], loss=lambda model, ids: model(ids)["loss"], progress=False)
    trainer.fit(1)
    with pytest.raises(ValueError, match=r"Trainer: save has one file .* use torch\.distributed\.checkpoint"):
        trainer.save("run.pt")


# ---- DDP -----------------------------------------------------------------------------------------------------


def dora_in_ddp() -> None:
    model = net()
    wanted_losses, wanted = one_process(kind=DoRATuner)
    torch.manual_seed(0)
    net()  # the factors are drawn next, as in one process
    tuner = DoRATuner(model, RAND, LINEAR)
    parallel = DistributedDataParallel(model)
    optimizer, losses = OPTIMIZERS["torch"](tuner), []
    for _ in range(3):
        loss = parallel(own())["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(tuner.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss))
    torch.testing.assert_close(torch.stack(losses), wanted_losses, rtol=1e-6, atol=0)
    same(tuner.adapter(), wanted)
    with pytest.raises(ValueError, match=r"blocks\.0\.up\.weight is sharded, and its norms would need"):
        DoRATuner(from_meta(False), RAND, "up")
    later = net()
    tuner = DoRATuner(later, RAND, LINEAR)
    fully_shard(later)
    with pytest.raises(ValueError, match=r"DoRATuner: .* is sharded, and its norms would need the whole weight"):
        later(own())
    other = net()
    tuner = DoRATuner(other, masks.Rand(density=0.1, seed=dist.get_rank()), LINEAR)
    parallel = DistributedDataParallel(other)
    parallel(own())["loss"].backward()
    with pytest.raises(RuntimeError, match=r"the ranks have different masks for"):
        OPTIMIZERS["torch"](tuner).step()


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    with fsdp_on_cpus():
        accelerate_prepares()
        accelerate_computes_in_bf16()
        transformers_shards()
    as_torchtitan_does(tensor_parallel=False)
    as_torchtitan_does(tensor_parallel=True)
    dora_in_ddp()
    Path(f"done.{dist.get_rank()}").touch()


if __name__ == "__main__":
    main()
