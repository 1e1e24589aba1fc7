"""Checkpoints of transformers' and Lightning's trainers that hold the adapter alone, and go on with the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from shira import AdamW, Adapter, DoRATuner, SparseTuner, Switcher, masks
from tuning import bits, same_bits

# Of torch and the trainers themselves.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Network(nn.Module):
    """With a buffer that training moves, dropout, and a head of which a part is unfrozen by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.Dropout(0.2), nn.Linear(256, 4))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.body(x) * self.scale, labels)}


def tune(model: nn.Module, seed: int = 0, **options: Any) -> SparseTuner:
    tuner = SparseTuner(model, masks.Rand(density=0.02, seed=seed), r"body\.0$", whole=r"body\.3\.", **options)
    model.scale.requires_grad_(True)
    return tuner


def rows(count: int = 24) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [{"x": torch.randn(256, generator=generator), "labels": torch.tensor(at % 4)} for at in range(count)]


# ---- transformers --------------------------------------------------------------------------------------------


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers, accelerate = pytest.importorskip("transformers"), pytest.importorskip("accelerate")
    yield transformers
    # accelerate keeps one state for the process.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def arguments(peer: Any, folder: Path, **options: Any) -> Any:
    return peer.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=4,
        logging_strategy="no", **{"max_steps": 6, "save_strategy": "steps", "save_steps": 2, **options},
    )  # fmt: skip


def trainer_of(peer: Any, model: nn.Module, tuner: SparseTuner, folder: Path, **options: Any) -> Any:
    from shira.integrations.transformers import AdapterCheckpoints

    class Trainer(AdapterCheckpoints, peer.Trainer):  # type: ignore[misc, name-defined]
        pass

    optimizer = AdamW([{"params": list(tuner.parameters())}, {"params": [model.scale]}], lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    data = rows()
    return Trainer(
        model, arguments(peer, folder, **options), train_dataset=data, eval_dataset=data[:8], tuner=tuner,
        optimizers=(optimizer, schedule),
    )  # fmt: skip


def test_transformers_goes_on_from_an_adapter_alone(peer: Any, tmp_path: Path) -> None:
    def run(folder: str, steps: int, resume: Any) -> nn.Module:
        model = Network()
        tuner = tune(model, gradient="dense")
        trainer_of(peer, model, tuner, tmp_path / folder, max_steps=steps).train(resume_from_checkpoint=resume)
        return model

    wanted = bits(run("whole", 6, None))
    run("halves", 4, None)
    model = run("halves", 6, True)  # from the last one
    assert same_bits(model, wanted)

    kept = tmp_path / "halves" / "checkpoint-4"
    names = {path.name for path in kept.iterdir()}
    assert {"shira_adapter.safetensors", "shira_tuner.pt", "optimizer.pt", "trainer_state.json"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin"}
    assert sum(path.stat().st_size for path in kept.iterdir()) < 4 * 256 * 256  # the body alone is more
    # The adapter of the last checkpoint is what was trained until there.
    adapter = Adapter.from_pretrained(tmp_path / "halves" / "checkpoint-6")
    base = Network()
    switcher = Switcher(base)
    switcher.add("it", adapter)
    switcher.activate("it")
    assert torch.equal(base.body[0].weight, model.body[0].weight)
    assert torch.equal(base.body[3].weight, model.body[3].weight)


def test_transformers_goes_on_with_a_dora(peer: Any, tmp_path: Path) -> None:
    from shira.integrations.transformers import AdapterCheckpoints

    class Trainer(AdapterCheckpoints, peer.Trainer):  # type: ignore[misc, name-defined]
        pass

    def run(steps: int, resume: Any) -> dict[str, Tensor]:
        model = Network()
        model.body[2].p = 0.0
        tuner = DoRATuner(model, masks.Rand(density=0.02), r"body\.(0|3)$", rank=2)
        options = arguments(peer, tmp_path, max_steps=steps, learning_rate=0.1, lr_scheduler_type="constant")
        Trainer(model, options, train_dataset=rows(), tuner=tuner).train(resume_from_checkpoint=resume)
        tuner.verify()
        assert not torch.equal(model.body[0].weight, Network().body[0].weight)
        return bits(model)

    wanted = run(4, None)
    got = run(4, str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_transformers_loads_the_best_and_saves_where_it_is_asked(peer: Any, tmp_path: Path) -> None:
    model = Network()
    tuner = tune(model)
    trainer = trainer_of(
        peer, model, tuner, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"  # the largest loss
    state = torch.load(best / "shira_tuner.pt", weights_only=True)
    for name, values in tuner.named_parameters():
        assert torch.equal(values, state["tuner"]["weights"][name.removesuffix("_shira_values")]["values"])
    assert torch.equal(model.body[1].running_mean, state["others"]["body.1.running_mean"])
    trainer.save_model(str(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "shira_adapter.safetensors", "shira_tuner.pt", "training_args.bin",
    }  # fmt: skip


def test_transformers_refuses_the_checkpoint_of_another_adapter(peer: Any, tmp_path: Path) -> None:
    model = Network()
    trainer_of(peer, model, tune(model), tmp_path, max_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    other = Network()
    trainer = trainer_of(peer, other, tune(other, seed=1), tmp_path)
    before = bits(other)
    with pytest.raises(ValueError, match=r"checkpoint-2.shira_tuner\.pt: .* body\.0\.weight has other entries"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert same_bits(other, before)
    (checkpoint / "shira_tuner.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"shira_tuner\.pt: this is not a whole state of a tuner"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_the_callback_puts_the_adapter_beside_the_model(peer: Any, tmp_path: Path) -> None:
    from shira.integrations.transformers import AdapterCallback

    model = Network()
    tuner = tune(model)
    options = arguments(peer, tmp_path, max_steps=2)
    peer.Trainer(model, options, train_dataset=rows(), callbacks=[AdapterCallback(tuner)]).train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"shira_adapter.safetensors", "shira_tuner.pt", "model.safetensors"} <= names
    adapter = Adapter.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(adapter.weights["body.0.weight"].values, tuner.adapter().weights["body.0.weight"].values)


def test_a_pretrained_models_configuration_is_kept(peer: Any, tmp_path: Path) -> None:
    from shira.integrations.transformers import AdapterCheckpoints

    class Trainer(AdapterCheckpoints, peer.Trainer):  # type: ignore[misc, name-defined]
        pass

    config = peer.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=32
    )
    model = peer.BertForSequenceClassification(config)
    tuner = SparseTuner(model, masks.Rand(density=0.1), r"query")
    data = [{"input_ids": torch.arange(4) + at, "labels": torch.tensor(at % 2)} for at in range(8)]
    Trainer(model, arguments(peer, tmp_path, max_steps=2), train_dataset=data, tuner=tuner).train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "config.json" in names
    assert "model.safetensors" not in names


# ---- Lightning -----------------------------------------------------------------------------------------------


def fit(folder: Path, steps: int, resume: str | None = None, seed: int = 0) -> tuple[nn.Module, Any]:
    lightning = pytest.importorskip("lightning.pytorch")
    from shira.integrations.lightning import AdapterCheckpoint

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = Network()
            self.tuner = tune(self.network, seed)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.network(*batch)["loss"]

        def configure_optimizers(self) -> Any:
            groups = [{"params": list(self.tuner.parameters())}, {"params": [self.network.scale]}]
            optimizer = AdamW(groups, lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    data = rows()
    loader = DataLoader(TensorDataset(*(torch.stack([row[key] for row in data]) for key in ("x", "labels"))), 4)
    module = Module()
    module.network.body[2].p = 0.0  # Lightning keeps no random states
    trainer = lightning.Trainer(
        max_epochs=steps // 6, callbacks=[AdapterCheckpoint(module.tuner)], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, loader, ckpt_path=resume, **({"weights_only": True} if resume else {}))
    return module.network, trainer


def test_lightning_goes_on_from_an_adapter_alone(tmp_path: Path) -> None:
    wanted = bits(fit(tmp_path, 12)[0])
    _, trainer = fit(tmp_path, 6)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    assert path.stat().st_size < 4 * 256 * 256
    kept = torch.load(path, weights_only=True)
    assert set(kept["state_dict"]) == {
        "network.scale", *(f"network.body.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")),
    }  # fmt: skip
    network, _ = fit(tmp_path, 12, str(path))
    assert same_bits(network, wanted)
    with pytest.raises(ValueError, match=r"AdapterCheckpoint: the checkpoint: .* has other entries"):
        fit(tmp_path, 12, str(path), seed=1)
    del kept["shira"]
    torch.save(kept, path)
    with pytest.raises(ValueError, match="it was written without this callback"):
        fit(tmp_path, 12, str(path))
