"""Plans: what a receiver with another layout holds is what its own loader would have made of the trained checkpoint."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_sync_attacks import Interrupt
from torch import Tensor, nn

from shira import Adapter, AdapterError, Entry, Switcher
from shira.sync import Box, Plan, Publisher, Receiver, SyncError, Update
from states import same, state

Loader = Callable[[Iterable[tuple[str, Tensor]]], object]


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


@pytest.mark.parametrize("seed", range(6))
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


def fused() -> Served:
    """q and k in one weight, whole; an output that is transposed."""
    served = Served(7)
    served.checkpoint = {"a.q": served.tensor(6, 8), "a.k": served.tensor(3, 8), "b.o": served.tensor(5, 8)}
    served.runtime = {"a.qk": served.tensor(9, 8), "b.o": served.tensor(8, 5)}
    served.move("a.q", "a.qk", lambda w: w[:6])
    served.move("a.k", "a.qk", lambda w: w[6:])
    served.move("b.o", "b.o", part=lambda w: w.t())
    served.build()
    return served


def test_the_boxes_of_a_layout() -> None:
    plan = fused().plan()
    assert plan.boxes == {
        "a.q": (Box("a.qk", (48,), 0, (1,), 0, (1,)),),
        "a.k": (Box("a.qk", (24,), 0, (1,), 48, (1,)),),
        "b.o": (Box("b.o", (5, 8), 0, (8, 1), 0, (1, 5)),),
    }
    assert repr(plan) == "Plan(3 weights of the checkpoint in 3 boxes of 2 of the model)"
    assert plan.boxes["b.o"][0].numel == 40


def test_the_version_of_a_whole_model_is_the_publishers() -> None:
    served = fused()
    publisher, receiver = Publisher(served.trained), Receiver(served.model, plan=served.plan())
    assert receiver.version == publisher.version
    other = fused()
    other.model.get_parameter("a.qk").data[7, 1] += 1
    follower = Receiver(other.model, plan=served.plan())
    with pytest.raises(SyncError, match=r"must be at version [0-9a-f]{16}, as version= says, and are at"):
        Receiver(other.model, plan=served.plan(), version=publisher.version)
    disturb(served.trained, served.generator)
    with pytest.raises(SyncError, match="the model must hold the weights that the Publisher started from"):
        follower.stage(publisher.publish())
    # With parts of weights it shows at the first commit, in those that are whole.
    partly = random_layout(0)
    plan, publisher = partly.plan(), Publisher(partly.trained)
    partly.model.get_parameter("norm").data[0] += 1
    before = state(partly.model)
    receiver = Receiver(partly.model, plan=plan)
    assert "version unknown" in repr(receiver)
    disturb(partly.trained, partly.generator, 1.0)
    receiver.stage(publisher.publish())
    with pytest.raises(SyncError, match="commit refused: norm must be what the first update starts from"):
        receiver.commit()
    assert same(state(partly.model), before)


def test_refused_where_somebody_wrote() -> None:
    """As without a plan: by version counters, and in the words that change."""
    served = fused()
    publisher, receiver = Publisher(served.trained), Receiver(served.model, plan=served.plan())
    disturb(served.trained, served.generator)
    update = publisher.publish()
    receiver.stage(update)
    weight = served.model.get_parameter("b.o")
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1
    with pytest.raises(SyncError, match=r"commit refused: b\.o was changed by someone else"):
        receiver.commit()
    weight.data.copy_(kept)
    receiver.verify()
    changed = int(update.weights["b.o"].indices[0])
    weight.data[changed % 8, changed // 8] += 1  # no version moves
    before = state(served.model)
    with pytest.raises(SyncError, match=r"b\.o would not become what the update says"):
        receiver.commit()
    assert same(state(served.model), before)
    weight.data.copy_(kept)
    receiver.commit()
    assert same(state(served.model), served.loaded(served.model))
    weight.data[0, 0] += 1
    with pytest.raises(SyncError, match=r"b\.o changed since the last commit"):
        receiver.verify()


def test_refused_where_the_layout_changed() -> None:
    served = fused()
    plan, publisher = served.plan(), Publisher(served.trained)
    disturb(served.trained, served.generator)
    update = publisher.publish()
    other = holder({"a.qk": served.tensor(8, 9), "b.o": served.tensor(8, 5)})
    with pytest.raises(SyncError, match=r"another layout: a\.qk has shape \[8, 9\] .*had shape \[9, 8\]"):
        Receiver(other, plan=plan)
    with pytest.raises(SyncError, match=r"another layout: b\.o is not among the model's weights"):
        Receiver(holder({"a.qk": served.tensor(9, 8)}), plan=plan)
    with pytest.raises(SyncError, match=r"had shape .* and dtype bfloat16"):
        Receiver(fused().model.float(), plan=plan)
    receiver = Receiver(served.model, plan=plan)
    receiver.stage(update)
    weight = served.model.get_parameter("b.o")
    weight.data = weight.data.view(5, 8)
    with pytest.raises(SyncError, match=r"b\.o has another shape, dtype or order of its entries than it had"):
        receiver.commit()
    weight.data = weight.data.view(8, 5)
    receiver.commit()
    for change, text in (
        ({"b.o": replace(update.weights["b.o"], shape=(40,))}, r"must have shape \[5, 8\] .*, got shape \[40\]"),
        ({"c": update.weights["b.o"]}, "'c' is not among the weights that the plan was recorded with"),
        ({"b.o": replace(update.weights["b.o"], indices=update.weights["b.o"].indices + 40, checked=False)}, "indices"),
    ):
        after = dict.fromkeys(change, 0)
        changed = {"weights": change, "after": after, "before": {}, "start": receiver.version}
        with pytest.raises(AdapterError, match=text):
            receiver.stage(replace(update, **changed))
        with pytest.raises(AdapterError, match=text):
            plan.map(Adapter(change))
    for arguments, error in (
        ({"plan": 3}, TypeError),
        ({"version": 3}, ValueError),
        ({"plan": plan, "exclude": "x"}, ValueError),
    ):
        with pytest.raises(error, match="Receiver: "):
            Receiver(served.model, **arguments)


def test_under_adapters_and_over_several_updates() -> None:
    served = fused()
    plan, publisher = served.plan(), Publisher(served.trained)
    receiver, switcher = Receiver(served.model, plan=plan), Switcher(served.model)
    # An adapter for the checkpoint, on the server's own layout.
    indices = torch.tensor([0, 9, 17], dtype=torch.int32)
    entry = Entry(indices, torch.tensor([0.5, 2.0, -1.0]), (6, 8), torch.bfloat16)
    output = Entry(torch.tensor([1, 4], dtype=torch.int32), torch.ones(16), (5, 8), torch.bfloat16, 8)
    adapter = Adapter({"a.q": entry, "b.o": output}, alpha=0.5, delta=True, provenance={"by": "hand"})
    mapped = plan.map(adapter)
    assert (mapped.alpha, mapped.delta, mapped.provenance) == (0.5, True, {"by": "hand"})
    assert mapped.weights["a.qk"].indices.tolist() == [0, 9, 17]
    assert mapped.weights["b.o"].indices.tolist() == sorted(
        [1 + 5 * i for i in range(8)] + [4 + 5 * i for i in range(8)]
    )
    switcher.add("on", mapped)
    switcher.activate("on")
    before = state(served.model)
    record_again = served.plan()  # with an adapter on: what is there is put back
    assert record_again.boxes == plan.boxes
    assert same(state(served.model), before)
    for _ in range(3):
        disturb(served.trained, served.generator)
        receiver.stage(publisher.publish().to_bytes())
    receiver.commit()
    switcher.deactivate()
    assert same(state(served.model), served.loaded(served.model))
    receiver.verify()
    receiver.rollback()
    assert same(state(served.model), state(fused().model))


def test_an_adapter_keeps_its_granules_where_they_fit() -> None:
    served = fused()
    plan = served.plan()
    entry = Entry(torch.tensor([1, 2], dtype=torch.int32), torch.arange(16).bfloat16(), (3, 8), torch.bfloat16, 8)
    mapped = plan.map(Adapter({"a.k": entry})).weights["a.qk"]
    assert mapped.granule == 8
    assert mapped.indices.tolist() == [7, 8]
    assert torch.equal(mapped.values, entry.values)
    whole = Entry(torch.zeros(1, dtype=torch.int32), torch.arange(40).bfloat16(), (5, 8), torch.bfloat16, 40)
    turned = plan.map(Adapter({"b.o": whole})).weights["b.o"]
    assert torch.equal(turned.values, torch.arange(40).bfloat16().view(5, 8).t().reshape(-1))
    with pytest.raises(TypeError, match=r"Plan\.map: adapter must be an Adapter or an Update, got int"):
        plan.map(3)


def test_other_dtypes_are_rounded_as_the_loader_does() -> None:
    served = fused()
    for name in served.runtime:
        served.runtime[name] = served.runtime[name].double().div(3).float()
    served.checkpoint = {name: tensor.float().div(3) for name, tensor in served.checkpoint.items()}
    served.runtime = {name: tensor.bfloat16() for name, tensor in served.runtime.items()}
    served.build()
    plan = served.plan()
    assert plan.whole == frozenset()
    publisher, receiver = (
        Publisher(served.trained),
        Receiver(served.model, plan=plan, version=Publisher(served.trained).version),
    )
    disturb(served.trained, served.generator)
    update = publisher.publish()
    # Rounded entries are not those that a file's differences start from.
    with pytest.raises(SyncError, match=r"'a\.q' is float32 at the publisher and bfloat16 here, .*differences=False"):
        receiver.stage(update.to_bytes())
    with pytest.raises(SyncError, match=r"^Plan\.map: the values of the update of step 1 are differences"):
        plan.map(Update.from_bytes(update.to_bytes()))
    receiver.stage(update.to_bytes(differences=False))
    receiver.commit()
    assert same(state(served.model), served.loaded(served.model))


@pytest.mark.parametrize("tied", [True, False])
def test_two_names_for_one_memory(tied: bool) -> None:
    """The model has one weight for two names of the checkpoint, whether these are one weight to the trainer or not."""
    embed = torch.randn(6, 4).bfloat16()
    trained = holder({"embed": embed.clone(), "head": embed.clone()})
    if tied:
        trained._parameters["head"] = trained._parameters["embed"]
    model = holder({"embed": embed.clone()})
    model._parameters["head"] = model._parameters["embed"]

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            model._parameters[name].data.copy_(weight)

    plan = Plan.record(model, load, trained.state_dict())
    assert plan.shared == {"embed": frozenset({"head"}), "head": frozenset({"embed"})}
    publisher, receiver = Publisher(trained), Receiver(model, plan=plan, version=Publisher(trained).version)
    if tied:
        assert Receiver(model, plan=plan).version == publisher.version
    with torch.no_grad():
        trained._parameters["embed"][1, 2] = 7.0
        trained._parameters["head"][1, 2] = 7.0
    receiver.stage(publisher.publish())
    receiver.commit()
    assert torch.equal(model._parameters["head"], trained._parameters["embed"])
    # Beside a larger weight both are loaded in one run, where the second one is written over the first.
    model.register_parameter("large", nn.Parameter(torch.zeros(100).bfloat16()))
    shapes = {**trained.state_dict(), "large": torch.zeros(100).bfloat16()}
    assert Plan.record(model, load, shapes).shared == plan.shared
    if not tied:
        with torch.no_grad():
            trained._parameters["head"][0, 0] = 5.0
        with pytest.raises(AdapterError, match="'head' and 'embed' lie on top of each other in the model"):
            receiver.stage(publisher.publish())


def test_an_interrupt_anywhere() -> None:
    served = fused()
    plan, publisher = served.plan(), Publisher(served.trained)
    receiver = Receiver(served.model, plan=plan)
    states = {publisher.version: state(served.model)}
    disturb(served.trained, served.generator)
    update = publisher.publish()
    states[update.end] = served.loaded(served.model)
    hits = 0
    for what in ("commit", "rollback"):
        at = 0
        while True:
            if receiver.version == update.start and receiver.staged is None:
                receiver.stage(update)
            before = receiver.version
            try:
                with Interrupt("receiver.py", at) as interrupt:
                    receiver.commit() if what == "commit" else receiver.rollback()
            except KeyboardInterrupt:
                hits += 1
            assert same(state(served.model), states[receiver.version])
            receiver.verify()
            if not interrupt.hit:
                assert receiver.version != before
                break
            if receiver.version != before:  # the interrupt came when it was done
                if what == "commit":
                    receiver.rollback()
                else:
                    receiver.stage(update)
                    receiver.commit()
            at += 1
    assert hits > 50


# ---- loaders ---------------------------------------------------------------------------------------------------


class Strange:
    """A model, and loaders that are called for by the names of weights."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {"one": (6, 8), "two": (6, 8), "three": (800, 4), "few": (6,)}
        weights = {name: torch.randn(*shape, generator=generator).bfloat16() for name, shape in shapes.items()}
        self.model = holder({**weights, "mask": torch.ones(4, dtype=torch.bool)})
        self.kept: dict[str, Tensor] = {}
        self.calls = 0

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.model.get_parameter(name)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.calls += 1
        given = dict(weights)
        for name, weight in given.items():
            kind = name.rpartition(".")[2]
            if kind == "thread":
                with ThreadPoolExecutor(2) as pool:
                    list(pool.map(lambda at, w=weight: self["one"].data[at].copy_(w[at]), range(6)))
            elif kind == "numpy":  # on the way, not into the model
                self["two"].data.copy_(torch.from_numpy(weight.float().numpy().T.copy()))
            elif kind == "replaces":
                self.model.three = nn.Parameter(weight.flatten().view(800, 4).clone())
            elif kind == "data":
                self["three"].data = weight.clone()
            elif kind == "scaled":
                self["one"].data.copy_(weight * 0.5)
            elif kind == "added":
                self["few"].data.copy_(weight).add_(1)
            elif kind == "exp":
                self["few"].data.copy_(-weight.float().exp())
            elif kind == "whole_numbers":  # what a quantizer does; digits would not show it
                self["few"].data.copy_(weight.float().round())
            elif kind == "shuffled":
                self["three"].data.copy_(weight.view(-1)[torch.randperm(3200)].view(800, 4))
            elif kind == "order":
                order = torch.randperm(3200, generator=torch.Generator().manual_seed(1))
                self["three"].data.copy_(weight.view(-1)[order].view(800, 4))
            elif kind == "inference":
                with torch.inference_mode():
                    self["three"].copy_(weight * 1)
            elif kind == "buffer":
                del self.model.few
                self.model.register_buffer("few", weight.clone())
            elif kind == "part":
                self["two"].data.zero_()
                self["two"].data[1:, 2:5] = weight
            elif kind == "wrong":
                raise KeyError("no such weight")
            elif kind == "other_shape":
                self.model.few = nn.Parameter(torch.zeros(7))
            elif kind == "hidden":
                self["one"].detach().view(torch.int16).numpy()[...] = 0
        if {"l.q", "l.k", "l.v"} <= given.keys():
            self["two"].data.copy_(torch.cat([given["l.q"], given["l.k"], given["l.v"]]))
        if {"l.gate", "l.up"} <= given.keys():
            self["three"].data[::2, 1:3] = given["l.gate"]
            self["three"].data[1::2, 1:3] = given["l.up"]
        # Keeps what came in earlier calls.
        self.kept |= {name: weight for name, weight in given.items() if name.startswith("kept.")}
        if "kept.b" in given:
            self["two"].data.copy_(torch.cat([self.kept.get("kept.a", torch.zeros(2, 8)), given["kept.b"]]))


SHAPES = {
    "thread": (6, 8), "numpy": (8, 6), "replaces": (4, 800), "data": (800, 4), "scaled": (6, 8), "added": (6,),
    "exp": (6,), "whole_numbers": (6,), "order": (3200,), "shuffled": (3200,), "part": (5, 3), "wrong": (2, 2),
    "other_shape": (7,), "l.q": (2, 8), "l.k": (1, 8), "l.v": (3, 8), "l.gate": (400, 2), "l.up": (400, 2),
    "inference": (800, 4), "buffer": (6,), "kept.a": (2, 8), "kept.b": (4, 8), "nowhere": (3, 3), "empty": (0, 4),
}  # fmt: skip


def test_loaders_of_all_kinds() -> None:
    strange = Strange()
    before, parameters = state(strange.model), list(strange.model.parameters())
    shapes = {**SHAPES, "mask": torch.empty(4, dtype=torch.bool, device="meta")}
    plan = Plan.record(strange.model, strange.load, shapes, exclude="mask")
    assert same(state(strange.model), before)
    assert all(one is other for one, other in zip(strange.model.parameters(), parameters, strict=True))
    computed = "is not moved alone: the loader computes with its values"
    for name, text in {
        "scaled": computed, "added": computed, "exp": computed, "whole_numbers": computed, "shuffled": computed,
        "order": "lies in more than 1,024 pieces", "mask": "has dtype bool",
        "wrong": "is refused by the loader: KeyError: 'no such weight'",
        "other_shape": "the loader puts another kind of tensor in place of few",
    }.items():  # fmt: skip
        assert text in plan.problems[name], name
    assert len(plan.problems) == 9
    assert plan.nowhere == ("nowhere",)
    assert set(plan.boxes) == SHAPES.keys() - plan.problems.keys() - {"nowhere"}
    assert plan.boxes["empty"] == ()
    assert plan.boxes["part"] == (Box("two", (5, 3), 0, (3, 1), 10, (8, 1)),)
    assert plan.boxes["l.up"] == (Box("three", (400, 2), 0, (2, 1), 5, (8, 1)),)
    assert plan.boxes["kept.b"] == (Box("two", (32,), 0, (1,), 16, (1,)),)
    assert plan.boxes["kept.a"] == (Box("two", (16,), 0, (1,), 0, (1,)),)
    with pytest.raises(AdapterError, match="'exp' cannot be changed here: is not moved alone"):
        plan.map(Adapter({"exp": Entry(torch.tensor([0]), torch.ones(1).bfloat16(), (6,), torch.bfloat16)}))


def test_recordings_that_fail() -> None:
    strange = Strange()
    before = state(strange.model)
    with pytest.raises(SyncError, match=r"not one weight can be followed\. wrong is refused by the loader: KeyError"):
        Plan.record(strange.model, strange.load, {"wrong": (2, 2)}, exclude="mask")

    with pytest.raises(SyncError, match="the loader writes nothing to the model for nothing, either; give"):
        Plan.record(strange.model, strange.load, {"nothing": (2, 2), "either": (3,)}, exclude="mask")

    def stop(weights: Iterable[tuple[str, Tensor]]) -> None:
        strange.load(weights)
        if strange.calls > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Plan.record(strange.model, stop, {"part": (5, 3), "replaces": (4, 800)}, exclude="mask")
    assert same(state(strange.model), before)
    with pytest.raises(SyncError, match="the loader wrote to one in a way that torch does not show"):
        Plan.record(strange.model, strange.load, {"hidden": (6, 8)}, exclude="mask")
    for arguments, text in (
        ((nn.Linear(2, 2), 3, {}), "load_weights must be a function"),
        ((3, print, {}), r"model must be a torch\.nn\.Module"),
        ((nn.Linear(2, 2), print, [1]), "shapes must map names"),
        ((nn.Linear(2, 2), print, {"a": (2.0,)}), "shapes must map names"),
        ((nn.Linear(2, 2), print, {}), "shapes must have at least one weight"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            Plan.record(*arguments)


def test_a_loader_that_clamps_is_found_out_and_one_that_casts_is_not() -> None:
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
    for served in floats[:3]:
        model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(40, 50).to(served), requires_grad=False)})

        def load(weights: Iterable[tuple[str, Tensor]], model: nn.ParameterDict = model, most: float = 0) -> None:
            for name, given in weights:
                turned = given.t() if not most else given.t().float().clamp(-most, most)
                model["w"].data[20 * int(name) : 20 * int(name) + 20].copy_(turned)

        for trained in floats:
            shapes = {name: torch.empty(50, 20, dtype=trained, device="meta") for name in ("0", "1")}
            assert Plan.record(model, load, shapes).problems == {}
            # The largest number of float8_e4m3fn and more: far above any weight, and far below what bfloat16 holds.
            for most in (448, 60000) if trained == served == torch.bfloat16 else ():
                with pytest.raises(SyncError, match="0 is not moved alone: the loader computes with its values"):
                    Plan.record(model, partial(load, most=most), shapes)
