"""Engines that follow a trainer: vLLM's interface with a stand-in, SGLang's as it is, transformers' own loader."""

from __future__ import annotations

import errno
import importlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shira import AdapterError
from shira.sync import Plan, Publisher, Receiver, SyncError

HIDDEN, ROWS = 8, 12


def trainer() -> nn.Module:
    torch.manual_seed(0)
    attention = nn.ModuleDict({f"{which}_proj": nn.Linear(HIDDEN, HIDDEN) for which in "qkvo"})
    mlp = nn.ModuleDict(
        {"gate_proj": nn.Linear(HIDDEN, ROWS, bias=False), "up_proj": nn.Linear(HIDDEN, ROWS, bias=False)}
    )
    return nn.ModuleDict({"embed": nn.Embedding(10, HIDDEN), "attention": attention, "mlp": mlp}).bfloat16()


class Worker(nn.Module):
    """A rank of two: rows of a fused projection and of a fused MLP, columns of the output, all of the embedding."""

    FUSED = (("q_proj", "qkv", 0), ("k_proj", "qkv", 1), ("v_proj", "qkv", 2), ("gate_proj", "gate_up", 0),
             ("up_proj", "gate_up", 1))  # fmt: skip

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.embed = nn.Embedding(10, HIDDEN)
        half = HIDDEN // 2
        self.attention = nn.ModuleDict({"qkv": nn.Linear(HIDDEN, 3 * half), "o_proj": nn.Linear(half, HIDDEN)})
        self.mlp = nn.ModuleDict({"gate_up": nn.Linear(HIDDEN, ROWS, bias=False)})
        self.bfloat16()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        parameters = dict(self.named_parameters())
        done = set()
        for name, weight in weights:
            for part, whole, place in self.FUSED:
                if part in name:
                    parameter = parameters[name.replace(part, whole)]
                    size = weight.shape[0] // 2
                    parameter.data.narrow(0, place * size, size).copy_(weight.narrow(0, self.rank * size, size))
                    break
            else:
                parameter = parameters[name]
                if name == "attention.o_proj.weight":
                    weight = weight.narrow(1, self.rank * HIDDEN // 2, HIDDEN // 2)
                assert parameter.shape == weight.shape
                parameter.data.copy_(weight)
            done.add(name)
        return done


def workers(trained: nn.Module) -> list[Worker]:
    made = [Worker(rank) for rank in range(2)]
    for worker in made:
        worker.load_weights(trained.state_dict().items())
    return made


def step(trained: nn.Module) -> None:
    with torch.no_grad():
        for parameter in trained.parameters():
            where = torch.randperm(parameter.numel())[: 1 + parameter.numel() // 20]
            parameter.view(-1)[where] = torch.randn(len(where)).bfloat16()


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(tensor.view(torch.int16), mate.view(torch.int16)) for tensor, mate in pairs)


# ---- vLLM ------------------------------------------------------------------------------------------------------


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The integration, over the least of vLLM that it needs; and what it registers."""
    registered: dict[str, Any] = {}

    class Base:
        def __init__(self, config: Any, vllm_config: Any, device: Any, model: nn.Module) -> None:
            self.model = model

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.update_info_cls(**update_info))  # type: ignore[attr-defined]

    class Factory:
        @classmethod
        def register_engine(cls, name: str, module: str, class_name: str) -> None:
            if name in registered:
                raise ValueError(f"{name} is registered already")
            registered[name] = lambda: getattr(importlib.import_module(module), class_name)

    def module(name: str, **content: Any) -> None:
        made = ModuleType(name)
        made.__path__ = []  # type: ignore[attr-defined]
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)

    for name in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        module(name)
    infos = {f"WeightTransfer{which}Info": type(which, (), {}) for which in ("Init", "Update")}
    module("vllm.distributed.weight_transfer.base", WeightTransferEngine=Base, **infos)
    module("vllm.distributed.weight_transfer.factory", WeightTransferEngineFactory=Factory)
    sys.modules.pop("shira.integrations.vllm", None)
    try:
        yield importlib.import_module("shira.integrations.vllm"), registered
    finally:
        sys.modules.pop("shira.integrations.vllm", None)


class Client:
    """What vLLM's clients do: JSON to every worker."""

    def __init__(self, engines: list[Any]) -> None:
        self.engines = engines

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        for engine in self.engines:
            engine.init_transfer_engine(engine.init_info_cls(**json.loads(json.dumps(init_info))))

    def start_weight_update(self) -> None:
        for engine in self.engines:
            engine.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        for engine in self.engines:
            engine.update_weights(json.loads(json.dumps(update_info)))

    def finish_weight_update(self) -> None:
        for engine in self.engines:
            engine.finish_weight_update()


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("folder", [False, True])
def test_vllm(vllm: tuple[Any, dict[str, Any]], folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, registered = vllm
    module.register()
    module.register()  # as vLLM does in one process now and then
    engine = registered["shira"]()
    trained = trainer()
    served = workers(trained)
    engines = [engine(None, None, "cpu", worker) for worker in served]
    with pytest.raises(SyncError, match="init_weight_transfer_engine must be called first"):
        engines[0].start_weight_update()
    client = Client(engines)
    sender = module.Sender(client, Publisher(trained), folder=tmp_path if folder else None)
    for _ in range(3):
        step(trained)
        update = sender.send()
        assert all(map(equal, served, workers(trained)))
        assert {one.receiver.version for one in engines} == {update.end}
    # An update that is not finished changes nothing, and the next one does not trip over it.
    step(trained)
    before = workers(trained) if not folder else None
    client.engines = []
    lost = sender.send()
    client.engines = engines
    if folder:
        client.start_weight_update()
        client.update_weights({"data": None})
        step(trained)
        sender.send()  # both, in one commit
        assert all(map(equal, served, workers(trained)))
        # Nor is one lost for which there was no room.
        step(trained)
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", full)
            with pytest.raises(OSError, match="No space left"):
                sender.send()
        step(trained)
        sender.send()
        assert all(map(equal, served, workers(trained)))
    else:
        step(trained)
        with pytest.raises(SyncError, match=f"step {lost.step} is missing"):
            sender.send()
        assert before is not None
        assert not equal(served[0], before[0])
        with pytest.raises(SyncError, match="the update must be bytes in base64"):
            client.update_weights({"data": "?"})
        with pytest.raises(AdapterError, match="bytes of an update"):
            client.update_weights({"data": "AAAA"})
        with pytest.raises(SyncError, match="with its data, or with a folder"):
            client.update_weights({"data": None})
        client.finish_weight_update()
    with pytest.raises(NotImplementedError, match=r"use shira\.integrations\.vllm\.Sender"):
        engine.trainer_send_weights(iter(()), None)
    engines[0].shutdown()
    assert engines[0].receiver is None


def test_vllm_is_needed_and_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    sys.modules.pop("shira.integrations.vllm", None)
    with pytest.raises(ImportError, match="needs a vLLM that has weight transfer engines"):
        importlib.import_module("shira.integrations.vllm")


def test_vllm_finds_the_engine() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."vllm.general_plugins"]\nshira = "shira.integrations.vllm:register"\n' in text


# ---- SGLang ----------------------------------------------------------------------------------------------------


def test_sglang() -> None:
    from shira.integrations import sglang

    module, _, name = sglang.LOADER.rpartition(".")
    load = getattr(importlib.import_module(module), name)
    trained = trainer()
    served, publisher = workers(trained), Publisher(trained)
    step(trained)
    update = publisher.publish()
    with pytest.raises(SyncError, match="the trainer's description must come first"):
        load(served[0], sglang.message(update))
    trained = trainer()
    served, publisher = workers(trained), Publisher(trained)
    for worker in served:
        load(worker, sglang.description(publisher))
    for count in (1, 1, 2):
        updates = []
        for _ in range(count):
            step(trained)
            updates.append(publisher.publish())
        for worker in served:
            load(worker, sglang.message(*updates))
        assert all(map(equal, served, workers(trained)))
    before = workers(trained)
    step(trained)
    publisher.publish()
    step(trained)
    late = sglang.message(publisher.publish())
    for message, text in (
        (late, "is missing"),
        ([("weight", torch.zeros(2))], "a message of this loader has"),
        (
            [("shira.description", torch.zeros(3, dtype=torch.uint8))],
            "the description of the trainer's weights is not one",
        ),
    ):
        with pytest.raises(SyncError, match=text):
            load(served[0], message)
        assert equal(served[0], before[0])
    # After loading, an engine may lay weights out anew for its kernels, where its loader would not find them.
    (shuffled,) = workers(trained)[:1]
    shuffled.mlp["gate_up"].weight.data.copy_(shuffled.mlp["gate_up"].weight.flip(0))
    moved = Publisher(trained)
    with pytest.raises(
        SyncError, match=r"where its loader would put them: mlp\.gate_proj\.weight, mlp\.up_proj\.weight"
    ):
        load(shuffled, sglang.description(moved))
    step(trained)
    with pytest.raises(SyncError, match="changed since the last publish"):
        sglang.description(moved)
    with pytest.raises(SyncError, match="Linear does not have"):
        load(nn.Linear(2, 2), sglang.description(Publisher(trained)))
    with pytest.raises(TypeError, match="an update must be an Update, got int"):
        sglang.message(3)


# ---- transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_the_loader_of_transformers(kind: str, tmp_path: Path) -> None:
    """A checkpoint with its experts one by one, in a model that has them in a stack."""
    transformers = pytest.importorskip("transformers", minversion="5")
    safetensors = pytest.importorskip("safetensors.torch")
    from shira.integrations.transformers import weight_loader

    sizes = {
        "vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    config = (
        transformers.MixtralConfig(**sizes, num_local_experts=3)
        if kind == "mixtral"
        else transformers.Qwen2MoeConfig(
            **sizes, num_experts=3, moe_intermediate_size=4, shared_expert_intermediate_size=4, tie_word_embeddings=True
        )
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = safetensors.load_file(file)
    trained = nn.Module()
    for name, tensor in weights.items():
        *path, last = name.split(".")
        home = trained
        for part in path:
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = home._modules[part]
        home.register_parameter(last, nn.Parameter(tensor.clone()))
    publisher = Publisher(trained)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = Plan.record(model, weight_loader(model), publisher.shapes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (plan.problems, plan.nowhere, len(plan.boxes)) == ({}, (), len(weights))
    assert len(plan.boxes) > len(model.state_dict())
    receiver = Receiver(model, plan=plan)
    assert receiver.version == publisher.version
    for _ in range(2):
        step(trained)
        receiver.stage(publisher.publish().to_bytes())
        receiver.commit()
        receiver.verify()
    safetensors.save_file(trained.state_dict(), file, metadata={"format": "pt"})
    assert equal(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
