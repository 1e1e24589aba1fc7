"""Plans: what a receiver with another layout holds is what its own loader would have made of the trained checkpoint."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import shira_ops
from shira import Adapter, AdapterError, Entry, Switcher
from shira.sync import Box, Plan, Publisher, Receiver, SyncError, compose

Loader = Callable[[Iterable[tuple[str, Tensor]]], object]


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().contiguous().view(-1).view(torch.uint8)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: bits(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def holder(weights: dict[str, Tensor]) -> nn.Module:
    """A module whose parameters have these names, dots and all."""
    root = nn.Module()
    for name, tensor in weights.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        if tensor.is_floating_point():
            module.register_parameter(last, nn.Parameter(tensor))
        else:
            module.register_buffer(last, tensor)
    return root


def disturb(model: nn.Module, generator: torch.Generator, share: float = 0.1) -> None:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            flat = tensor.view(-1)
            where = (torch.rand(flat.numel(), generator=generator) < share).nonzero().view(-1)
            flat[where] = (torch.randn(where.numel(), generator=generator) * 30).to(flat.dtype)


class Served:
    """A checkpoint, a model with a layout of its own, and the loader of that: views of a weight to views of another."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.checkpoint: dict[str, Tensor] = {}
        self.runtime: dict[str, Tensor] = {}
        self.moves: dict[str, list[tuple[Callable[[Tensor], Tensor], str, Callable[[Tensor], Tensor]]]] = {}

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator).mul(20).to(dtype or self.dtype)

    def move(
        self,
        name: str,
        to: str,
        there: Callable[[Tensor], Tensor] = lambda weight: weight,
        part: Callable[[Tensor], Tensor] = lambda weight: weight,
    ) -> None:
        self.moves.setdefault(name, []).append((part, to, there))

    def build(self) -> None:
        self.trained = holder({name: tensor.clone() for name, tensor in self.checkpoint.items()})
        self.model = holder(self.runtime)
        self.load_weights(self.checkpoint.items())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], model: nn.Module | None = None) -> None:
        home = dict((model or self.model).state_dict(keep_vars=True))
        for name, weight in weights:
            for part, to, there in self.moves.get(name, ()):
                there(home[to].data).copy_(part(weight))

    def loaded(self, model: nn.Module) -> dict[str, Tensor]:
        """What the loader makes of the trained weights, in a copy of the model."""
        other = copy.deepcopy(model)
        self.load_weights(self.trained.state_dict().items(), other)
        return state(other)

    def plan(self) -> Plan:
        return Plan.record(self.model, self.load_weights, self.trained.state_dict())


def random_layout(seed: int) -> Served:
    """One to three of each way in which servers keep weights."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn)
    served = Served(seed, dtypes[seed % 4])
    rows, columns = 2 * served.number(2, 9), 4 * served.number(1, 6)
    for layer in range(2):
        at = f"layers.{layer}."
        # q, k and v in one weight, of a rank's heads alone; the last dimension cut for another.
        sizes = [2 * served.number(1, 6) for _ in "qkv"]
        served.runtime[at + "qkv"] = served.tensor(sum(sizes) // 2, columns)
        begin = 0
        for which, size in zip("qkv", sizes, strict=True):
            served.checkpoint[at + which] = served.tensor(size, columns)
            half = size // 2
            served.move(
                at + which, at + "qkv",
                lambda w, b=begin, h=half: w.narrow(0, b, h), lambda w, h=half: w.narrow(0, h, h),
            )  # fmt: skip
            begin += half
        served.checkpoint[at + "o"] = served.tensor(rows, 2 * columns)
        served.runtime[at + "o"] = served.tensor(rows, columns)
        served.move(at + "o", at + "o", part=lambda w: w.narrow(1, columns, columns))
        # Experts in a stack, gate and up side by side or in turns, transposed.
        experts = served.number(1, 4)
        turns = bool(served.number(0, 2))
        served.runtime[at + "experts"] = served.tensor(experts, columns, 2 * rows)
        for expert in range(experts):
            for side, name in enumerate(("gate", "up")):
                full = f"{at}mlp.{expert}.{name}"
                served.checkpoint[full] = served.tensor(rows, columns)
                there = (
                    (lambda w, e=expert, s=side: w[e, :, s::2])
                    if turns
                    else (lambda w, e=expert, s=side: w[e].narrow(1, s * rows, rows))
                )
                served.move(full, at + "experts", there, lambda w: w.t())
    # One weight of the checkpoint in two of the model's; heads in another order; padding; a whole copy; one twice.
    served.checkpoint["fused"] = served.tensor(2 * rows, columns)
    for half in range(2):
        served.runtime[f"split.{half}"] = served.tensor(rows, columns)
        served.move("fused", f"split.{half}", part=lambda w, h=half: w.chunk(2)[h])
    served.checkpoint["rope"] = served.tensor(4 * rows, columns)
    served.runtime["rope"] = served.tensor(4 * rows, columns)
    served.move("rope", "rope", part=lambda w: w.view(2, 2, rows, columns).transpose(1, 2).reshape(4 * rows, columns))
    vocabulary = served.number(3, 40)
    served.checkpoint["embed"] = served.tensor(vocabulary, columns)
    served.runtime["embed"] = torch.zeros(vocabulary + 5, columns, dtype=served.dtype)
    served.move("embed", "embed", lambda w: w[:vocabulary])
    served.checkpoint["norm"] = served.tensor(columns)
    served.runtime["norm"] = served.tensor(columns)
    served.move("norm", "norm")
    served.checkpoint["bias"] = served.tensor(rows)
    served.runtime["twice"] = served.tensor(2 * rows)
    served.move("bias", "twice", lambda w: w[:rows])
    served.move("bias", "twice", lambda w: w[rows:])
    served.checkpoint["steps"] = torch.tensor([served.number(0, 100)])
    served.runtime["steps"] = torch.tensor([0])
    served.move("steps", "steps")
    served.checkpoint["elsewhere"] = served.tensor(3, 3)
    served.build()
    return served


@pytest.mark.parametrize("seed", range(8))
def test_any_layout(seed: int) -> None:
    served = random_layout(seed)
    before = state(served.model)
    pointers = [tensor.data_ptr() for tensor in served.model.state_dict().values()]
    versions = [tensor._version for tensor in served.model.state_dict(keep_vars=True).values()]
    plan = pickle.loads(pickle.dumps(served.plan()))
    assert same(state(served.model), before)
    assert versions == [tensor._version for tensor in served.model.state_dict(keep_vars=True).values()]
    assert plan.problems == {}
    assert plan.nowhere == ("elsewhere",)
    assert plan.shared == {}
    assert not {"layers.0.q", "layers.1.o", "elsewhere"} & plan.whole
    assert {"rope", "embed", "fused", "bias", "steps", "layers.1.mlp.0.up"} <= plan.whole
    assert {name: len(boxes) for name, boxes in plan.boxes.items() if len(boxes) > 1} == {"fused": 2, "bias": 2}
    granule = 2 if seed % 2 else 1
    publisher = Publisher(served.trained, granule=granule, exclude="^(steps|elsewhere)$" if granule > 1 else None)
    if granule > 1 and served.trained.get_buffer("steps").numel() % granule:
        assert publisher.granule if hasattr(publisher, "granule") else True
    receiver = Receiver(served.model, plan=plan)
    with pytest.raises(SyncError, match="the version is not known before the first update"):
        _ = receiver.version
    updates = []
    for _ in range(3):
        disturb(served.trained, served.generator)
        if granule > 1:
            served.trained.get_buffer("steps").copy_(served.checkpoint["steps"])
        updates.append(publisher.publish())
        receiver.stage(updates[-1].to_bytes())
        assert same(state(served.model), before)
        receiver.commit()
        assert same(state(served.model), served.loaded(served.model))
        assert receiver.version == publisher.version
        receiver.verify()
        before = state(served.model)
    receiver.rollback()
    receiver.stage(updates[-1])
    receiver.commit(verify=False)
    receiver.verify()
    assert same(state(served.model), before)
    assert pointers == [tensor.data_ptr() for tensor in served.model.state_dict().values()]
