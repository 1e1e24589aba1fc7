"""SparseTuner on real models of transformers, with random weights: gradients, transformers.Trainer, accelerate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import shira
from shira import AdamW, Adapter, SparseTuner, Switcher, masks
from tuning import VALUES, bits, check_gradients, dense_gradients, same_bits

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
# Of torch and accelerate themselves.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

VOCABULARY, LENGTH = 64, 8
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "max_position_embeddings": 16, "pad_token_id": 0}  # fmt: skip


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    # Else the loss is found with a warning, and a warning breaks a graph.
    model.loss_type = "ForCausalLM"
    return model


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1))


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)
    # The fast ones have no float64.
    config._experts_implementation = "eager"
    return transformers.MixtralForCausalLM(config)


def bert() -> nn.Module:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, **dropout))


# Model, targets, whole.
MODELS: dict[str, tuple[Callable[[], nn.Module], str | None, str | None]] = {
    "gpt2": (gpt2, r"attn|mlp|wte|wpe", None),
    "gpt2, default": (gpt2, None, None),
    "llama": (llama, r"(q|v)_proj$|embed_tokens|norm\.weight", r"lm_head"),
    "mixtral": (mixtral, r"experts|gate|[qkvo]_proj$", None),
    "bert": (bert, r"query|value|embeddings", r"classifier\..*"),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    # accelerate keeps one state for the process.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]()


def tune(model: nn.Module, name: str, **options: Any) -> SparseTuner:
    _, targets, whole = MODELS[name]
    return SparseTuner(model, masks.Rand(density=0.1), targets, whole=whole, **options)


def batch(name: str, seed: int = 1, rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (rows, LENGTH), generator=generator)
    labels = ids[:, 0] % 2 if name == "bert" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_of(model: nn.Module, name: str, seed: int = 1) -> Tensor:
    loss: Tensor = model(**batch(name, seed)).loss
    return loss


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("gradient", ["sampled", "dense"])
def test_gradients_and_the_way_back(name: str, gradient: str) -> None:
    model = build(name).double()
    wanted = dense_gradients(model, lambda module: loss_of(module, name))
    before = bits(model)
    with tune(model, name, gradient=gradient) as tuner:
        for times in (1, 2):
            loss_of(model, name).backward()
            check_gradients(tuner, wanted, times)
        AdamW(tuner, lr=0.1).step()
        assert not same_bits(model, before)
    assert same_bits(model, before)


def test_tied_embedding_and_head_are_one_target_under_both_names() -> None:
    model = build("gpt2")
    with tune(model, "gpt2, default") as tuner:
        names = [name for name, _ in tuner.named_parameters()]
        assert len(names) == 8
        assert all("c_attn" in n or "c_proj" in n or "c_fc" in n for n in names)
        assert tuner.summary().splitlines()[-1] == "left out: lm_head, the output head"
    with SparseTuner(model, masks.Rand(density=0.1), targets="lm_head") as tuner:
        assert [name for name, _ in tuner.named_parameters()] == ["transformer.wte.weight" + VALUES]
        assert "lm_head.weight" in tuner.summary().splitlines()[1]
        assert tuner.adapter().weights["transformer.wte.weight"].aliases == ("lm_head.weight",)


@pytest.mark.parametrize("name", MODELS)
def test_the_adapter_serves_and_goes_on(name: str, tmp_path: Path) -> None:
    """Train, save; serve it from the file on another copy; go on training from the file."""
    model, other = build(name), build(name)
    before = bits(model)
    with tune(model, name) as tuner:
        optimizer = AdamW(tuner, lr=0.05)
        for seed in range(3):
            loss_of(model, name, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
        tuner.adapter().save(tmp_path / "a.safetensors")
        wanted, loss = bits(model), loss_of(model, name).detach()
    switcher = Switcher(other)
    switcher.add("a", tmp_path / "a.safetensors")
    switcher.activate("a")
    assert torch.equal(loss_of(other, name).detach(), loss)
    switcher.deactivate()
    assert same_bits(model, before)
    with SparseTuner.from_adapter(other, tmp_path / "a.safetensors") as again:
        assert same_bits(other, wanted)
        loss_of(other, name).backward()
        AdamW(again, lr=0.05).step()
        assert not same_bits(other, wanted)
    assert same_bits(other, before)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_compiles_whole(name: str) -> None:
    model = build(name)
    with tune(model, name) as tuner:
        loss_of(model, name).backward()
        eager = [values.grad.clone() for values in tuner.parameters()]
        model.zero_grad()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        loss_of(compiled, name).backward()
        torch._dynamo.reset()
        for a, b in zip(eager, tuner.parameters(), strict=True):
            torch.testing.assert_close(a, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = build(name).double().train()
    wanted = dense_gradients(model, lambda module: loss_of(module, name))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with tune(model, name) as tuner:
        if reentrant:
            model.enable_input_require_grads()
        loss_of(model, name).backward()
        check_gradients(tuner, wanted)


# transformers enables gradients of the input itself; here nobody does.
def test_reentrant_checkpointing_without_an_input_that_requires_grad_is_not_silent() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with SparseTuner(model, masks.Rand(density=0.5)) as tuner:
        optimizer = AdamW(tuner)
        model[1](checkpoint(model[0], torch.ones(2, 4), use_reentrant=True)).sum().backward()
        with pytest.raises(RuntimeError, match=r"no gradient reached 0\.weight; .* use_reentrant=True"):
            optimizer.step()


# transformers.Trainer


def arguments(folder: Path, **options: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=2,
        learning_rate=1e-2, logging_strategy="no", **{"max_steps": 4, "save_strategy": "no", **options},
    )  # fmt: skip


def rows(name: str, count: int = 12) -> list[dict[str, Tensor]]:
    whole = batch(name, rows=count)
    return [{key: value[row] for key, value in whole.items()} for row in range(count)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}),
        ("llama", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
        ("mixtral", {"optim": "adafactor"}),
        ("bert", {"bf16": True, "weight_decay": 0.1, "lr_scheduler_type": "cosine"}),
    ],
)
def test_transformers_trainer(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = build(name)
    before = bits(model)
    loss = float(loss_of(model.eval(), name, 1).detach())
    with tune(model, name) as tuner:
        data = rows(name)
        trainer = transformers.Trainer(model, arguments(tmp_path, max_steps=25, **options), train_dataset=data)
        trainer.train()
        assert float(loss_of(model.eval(), name, 1).detach()) < loss
        moved = tuner.adapter()
        assert all((entry.values != 0).any() for entry in moved.weights.values())
    assert same_bits(model, before)


def test_transformers_trainer_with_our_optimizer_is_the_plain_loop(tmp_path: Path) -> None:
    results = []
    for theirs in (True, False):
        model = build("gpt2")
        tuner = tune(model, "gpt2")
        optimizer = AdamW(tuner, lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 6)
        data = rows("gpt2")
        if theirs:
            options = arguments(tmp_path, max_steps=6, train_sampling_strategy="sequential", max_grad_norm=0.3)
            transformers.Trainer(model, options, train_dataset=data, optimizers=(optimizer, schedule)).train()
        else:
            model.train()
            for at in range(0, 12, 2):
                both = {key: torch.stack([row[key] for row in data[at : at + 2]]) for key in data[0]}
                model(**both).loss.backward()
                nn.utils.clip_grad_norm_(tuner.parameters(), 0.3)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        results.append([values.detach().clone() for values in tuner.parameters()])
        assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_transformers_trainer_resumes_from_its_checkpoint(name: str, tmp_path: Path) -> None:
    """Tied weights and all: its checkpoints hold the values, and loading them writes the weights."""

    def run(steps: int, resume: bool) -> list[Tensor]:
        model = build(name)
        tuner = tune(model, name)
        # One schedule for all of them, whatever the number of steps.
        optimizer = AdamW(tuner, lr=1e-2)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        options = arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=3)
        trainer = transformers.Trainer(model, options, train_dataset=rows(name), optimizers=(optimizer, schedule))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        tuner.sync()
        return [values.detach().clone() for values in tuner.parameters()] + list(bits(model).values())

    wanted = run(6, resume=False)
    run(3, resume=False)
    given = run(6, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(wanted, given, strict=True))


# accelerate


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str) -> None:
    results = []
    for theirs in (True, False):
        model = build("llama").train()
        tuner = tune(model, "llama")
        optimizer = AdamW(tuner, lr=1e-2)
        loader: Any = DataLoader(rows("llama"), 2)
        called: Any = model
        if theirs:
            accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
            called, prepared, loader = accelerator.prepare(model, optimizer, loader)
            for inputs in loader:
                with accelerator.accumulate(called):
                    accelerator.backward(called(**inputs).loss)
                    accelerator.clip_grad_norm_(called.parameters(), 1.0)
                    prepared.step()
                    prepared.zero_grad()
        else:
            for count, inputs in enumerate(loader, 1):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    loss = model(**inputs).loss / 2
                loss.backward()
                if count % 2 == 0:
                    nn.utils.clip_grad_norm_(tuner.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
        results.append([values.detach().clone() for values in tuner.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_model_that_accelerate_offloads_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    accelerate.cpu_offload(model)
    with pytest.raises(ValueError, match=r"0\.weight is offloaded: accelerate keeps it elsewhere"):
        SparseTuner(model, masks.Rand(density=0.25))


def test_our_trainer_on_a_language_model() -> None:
    model = build("llama")
    before = bits(model)
    with tune(model, "llama") as tuner:
        data = [batch("llama", seed) for seed in (1, 2)]
        trainer = shira.Trainer(tuner, data, evaluation=data, progress=False)
        first = trainer.evaluate()
        trainer.optimizer.param_groups[0]["lr"] = 1e-2
        assert trainer.fit(epochs=10).evaluate() < first - 0.1
    assert same_bits(model, before)


def test_adapters_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    model = build("llama")
    with tune(model, "llama") as tuner:
        adapter = tuner.adapter()
    before = bits(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("model.layers.1.self_attn.v_proj.weight")[0, 0] += 1
    for wrong, says in (
        (other, r"made for another base: .*model\.layers\.1\.self_attn\.v_proj\.weight"),
        (build("bert"), r"'model\.embed_tokens\.weight' is not in the model"),
    ):
        with pytest.raises(shira.AdapterError, match=says):
            SparseTuner.from_adapter(wrong, adapter)
        assert not any(p.requires_grad is False for p in wrong.parameters())
    assert same_bits(model, before)
    assert isinstance(adapter, Adapter)
