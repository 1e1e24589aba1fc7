"""Reinforcement learning in two processes: one trains a small Llama, the other generates with its newest weights.

    python examples/follow_trainer.py
    python examples/follow_trainer.py --steps 200 --hidden 512

The task is to go on counting: after a digit come the next three. The engine (rank 1) samples answers. As servers do, it
has its queries, keys and values in one weight, and a loader that puts a checkpoint's there: a Plan of that loader leads
updates to the right places. The trainer (rank 0) rewards each right digit, takes a policy gradient step on a sparse
adapter, and sends what has changed in the weights. Half way the engine is killed. The trainer goes on and keeps its
updates in a folder; a new engine starts from the first weights, catches up in one commit, and follows again. At the end
it prints the bytes and milliseconds of an update, beside those of sending all weights and of applying an update through
dense buffers. Runs offline, on a CPU, in seconds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

import shira
from shira.integrations.torch_distributed import broadcast, catch_up
from shira.sync import Folder, Plan, Publisher, Receiver

DIGITS, ANSWER, BATCH = 10, 3, 40
TRAINER, ENGINE = 0, 1


def policy(hidden: int) -> Any:
    """The same weights in every process."""
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=DIGITS, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=8, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).bfloat16().eval()


def generate(model: Any) -> Tensor:
    """A digit, and what the policy says comes after it, for a batch of digits."""
    prompts = torch.arange(BATCH)[:, None] % DIGITS
    with torch.no_grad():
        answers: Tensor = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=ANSWER
        )
    return answers


def rewards(answers: Tensor) -> Tensor:
    """1 for each digit that comes after the one before."""
    return (answers[:, 1:] == (answers[:, :1] + torch.arange(1, ANSWER + 1)) % DIGITS).float()


def learn(model: Any, optimizer: torch.optim.Optimizer, answers: Tensor) -> None:
    """One step of policy gradient; each place's mean reward is its baseline."""
    gained = rewards(answers)
    chances = model(answers[:, :-1]).logits.float().log_softmax(-1)
    chosen = chances.gather(-1, answers[:, 1:, None]).squeeze(-1)
    (-(gained - gained.mean(0)) * chosen).sum(1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def join(folder: Path, name: str, rank: int) -> None:
    store = dist.FileStore(str(folder / name), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=1))


def milliseconds(since: float) -> float:
    return 1000 * (time.perf_counter() - since)


# ---- the trainer -----------------------------------------------------------------------------------------------------


def train(folder: Path, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model = policy(args.hidden)
    tuner = shira.SparseTuner(model, shira.masks.Rand(density=args.density), targets="_proj$|embed|lm_head")
    optimizer = shira.AdamW(tuner, lr=args.lr)
    publisher, updates = Publisher(tuner), Folder(folder / "updates")
    join(folder, "first", TRAINER)
    connected, alone, sent, took = True, 0, 0, []
    for step in range(1, args.steps + 1):
        start = time.perf_counter()
        update = publisher.publish()
        took.append(milliseconds(start))
        file = updates.put(update)
        sent = max(sent, file.stat().st_size)
        if connected:
            try:
                broadcast(update, TRAINER)
                answers = answered(publisher)
            except RuntimeError as error:
                print(f"step {step}: the engine is gone ({type(error).__name__}); going on without it", flush=True)
                dist.destroy_process_group()
                connected = False
        elif alone == 5:
            join(folder, "second", TRAINER)
            catch_up(None, updates, TRAINER)
            answers = answered(publisher)
            print(f"step {step}: the engine is back, with version {publisher.version:016x}", flush=True)
            connected = True
        if not connected:
            alone += 1
            answers = generate(model)
        if step == 1 or step % 10 == 0:
            print(f"step {step}: {rewards(answers).mean():.0%} of the digits are right", flush=True)
        learn(model, optimizer, answers)
    compare(model, publisher, sent, median(took))
    dist.destroy_process_group()


def answered(publisher: Publisher) -> Tensor:
    """The engine's answers, which must come from the newest weights."""
    answers, version = torch.empty(BATCH, 1 + ANSWER, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    dist.broadcast(answers, ENGINE)
    dist.broadcast(version, ENGINE)
    assert int(version) % 2**64 == publisher.version
    return answers


def compare(model: nn.Module, publisher: Publisher, sent: int, published: float) -> None:
    update = publisher.publish()
    broadcast(update, TRAINER)
    # What trains is the adapter's values; the weights themselves are frozen.
    flat = torch.cat([weight.flatten() for weight in model.parameters() if not weight.requires_grad])
    dist.broadcast(torch.tensor(flat.numel()), TRAINER)
    dist.broadcast(flat, TRAINER)
    sparse, dense, everything = engine_took()
    print(f"an update:   {sent:>12,} bytes, {published:7.2f} ms to publish, {sparse:7.2f} ms to stage and commit")
    print(f"all weights: {flat.nbytes:>12,} bytes, {everything:7.2f} ms to broadcast")
    print(f"the update through dense buffers: {dense:.2f} ms")


def engine_took() -> list[float]:
    took = torch.empty(3, dtype=torch.float64)
    dist.broadcast(took, ENGINE)
    found: list[float] = took.tolist()
    return found


# ---- the engine ------------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """A projection that is some rows of a larger one."""

    def __init__(self, whole: nn.Linear, begin: int, count: int) -> None:
        super().__init__()
        # In a tuple, the weight is not this module's too.
        self.whole, self.rows = (whole,), slice(begin, begin + count)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.whole[0].weight[self.rows])


class Served:
    """The policy as a server lays it out, and the loader for that."""

    def __init__(self, hidden: int) -> None:
        self.model = policy(hidden)
        checkpoint = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self.shapes = {name: weight.to("meta") for name, weight in checkpoint.items()}
        for layer in self.model.model.layers:
            attention, begin = layer.self_attn, 0
            parts = [getattr(attention, f"{which}_proj").weight for which in "qkv"]
            attention.qkv_proj = nn.Linear(hidden, sum(map(len, parts)), bias=False, dtype=torch.bfloat16)
            for which, part in zip("qkv", parts, strict=True):
                setattr(attention, f"{which}_proj", Rows(attention.qkv_proj, begin, len(part)))
                begin += len(part)
        self.load_weights(checkpoint.items())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            path = name.removesuffix(".weight")
            module = self.model.get_submodule(path)
            if isinstance(module, Rows):
                module.whole[0].weight.data[module.rows].copy_(weight)
            else:
                module.weight.data.copy_(weight)


def serve(folder: Path, args: argparse.Namespace, again: bool) -> None:
    torch.set_num_threads(1)
    served = Served(args.hidden)
    model = served.model
    plan = Plan.record(model, served.load_weights, served.shapes)
    receiver = Receiver(model, plan=plan)
    transformers.set_seed(1)
    step = 0
    if again:
        join(folder, "second", ENGINE)
        missed = catch_up(receiver.version, src=TRAINER)
        receiver.stage(*missed)
        receiver.commit()
        print(f"a new engine caught up over {len(missed)} updates in one commit", flush=True)
        step = receiver.step or 0
        answer(model, receiver)
    else:
        join(folder, "first", ENGINE)
    took = []
    while step < args.steps:
        step += 1
        update = broadcast(None, TRAINER)
        if step == args.steps // 2 and not again:
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.perf_counter()
        receiver.stage(update)
        receiver.commit()
        took.append(milliseconds(start))
        answer(model, receiver)
    report(model, plan, receiver, median(took))
    dist.destroy_process_group()


def answer(model: nn.Module, receiver: Receiver) -> None:
    version = receiver.version
    dist.broadcast(generate(model), ENGINE)
    dist.broadcast(torch.tensor([version - 2**64 if version >= 2**63 else version]), ENGINE)


def report(model: nn.Module, plan: Plan, receiver: Receiver, sparse: float) -> None:
    """The last update twice: into the model, and through dense buffers into a copy."""
    receiver.stage(broadcast(None, TRAINER))
    update = receiver.staged  # with the values that its differences lead to
    assert update is not None
    copy = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    start = time.perf_counter()
    through_buffers(copy, plan.map(update))
    dense = milliseconds(start)
    receiver.commit()
    assert all(torch.equal(copy[name], weight) for name, weight in model.named_parameters())
    length = torch.tensor(0)
    dist.broadcast(length, TRAINER)
    flat = torch.empty(int(length), dtype=torch.bfloat16)
    start = time.perf_counter()
    dist.broadcast(flat, TRAINER)
    everything = milliseconds(start)
    dist.broadcast(torch.tensor([sparse, dense, everything], dtype=torch.float64), ENGINE)


def through_buffers(weights: dict[str, Tensor], update: shira.Adapter) -> None:
    """Apply an update as is usual: each weight is copied, changed there, and copied back."""
    for name, weight in weights.items():
        staged = weight.clone()
        entry = update.weights.get(name)
        if entry is not None:
            staged.view(-1).index_copy_(0, entry.indices.long(), entry.values)
        weight.copy_(staged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--density", type=float, default=0.01, help="share of the entries that train")
    parser.add_argument("--lr", type=float, default=1e-2)
    args = parser.parse_args()
    # What was imported is there in a forked process at once.
    kinds = multiprocessing.get_all_start_methods()
    start = multiprocessing.get_context("fork" if "fork" in kinds else "spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainer = start.Process(target=train, args=(folder, args))
        engines = [start.Process(target=serve, args=(folder, args, again)) for again in (False, True)]
        trainer.start()
        for engine in engines:
            engine.start()
            engine.join()
        trainer.join()
    assert [engine.exitcode for engine in engines] == [-signal.SIGKILL, 0]
    assert trainer.exitcode == 0
    print("the engine ends with the trainer's version")


if __name__ == "__main__":
    main()
