"""`shira.estimate`, against what real steps have in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import shira
from shira.train.estimate import _Count

transformers = pytest.importorskip("transformers")


def llama(**more: Any) -> Any:
    sizes = {"vocab_size": 997, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, **more}
    return transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)


class Block(nn.Module):
    """A convolution, and a weight that trains by its dense gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.head = nn.Parameter(torch.randn(32, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().mean((2, 3)) @ self.head


def measured(model: nn.Module, batch: Any, mask: Any, targets: Any = None) -> tuple[int, int]:
    """The trained entries, and the most bytes that a second step has in memory: of the model, the tuner, the optimizer
    and everything on its way."""
    tuner = shira.SparseTuner(model, mask, targets)
    optimizer = shira.AdamW(tuner, lr=1e-3)

    def step(count: Any = None) -> None:
        output = model(**batch) if isinstance(batch, dict) else model(batch).square().mean()
        (output if isinstance(output, Tensor) else output.loss).backward()

    step()
    optimizer.step()
    optimizer.zero_grad()
    plans = [tuned.plan for tuned in tuner._tuned]
    kept = [*model.parameters(), *model.buffers(), *(plan.saved for plan in plans)]
    kept += [t for state in optimizer.state.values() for t in tree_leaves(state) if isinstance(t, Tensor) and t.dim()]
    counted = _Count(kept)
    with counted:
        step()
    pieces = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    nnz = tuner.nnz
    tuner.detach()
    return nnz, sum(pieces.values()) + counted.most


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("mask", [None, shira.masks.Rand(density=0.05)], ids=["default", "single entries"])
def test_a_language_model(tied: bool, checkpointing: bool, mask: Any) -> None:
    model = transformers.LlamaForCausalLM(llama(tie_word_embeddings=tied)).to(torch.bfloat16).train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    told = shira.estimate(model, mask, (2, 64))
    ids = torch.randint(0, 997, (2, 64))
    nnz, most = measured(model, {"input_ids": ids, "labels": ids, "use_cache": False}, mask)
    assert told.nnz == nnz
    assert told.parameters == model.num_parameters()
    assert abs(told.peak / most - 1) < 0.1
    assert told.values == 4 * nnz
    assert told.moments == 8 * nnz


def test_other_models_and_losses() -> None:
    model, batch = Block(), torch.randn(4, 3, 20, 20)
    mask = shira.masks.Rand(density=0.1)
    told = shira.estimate(
        model, mask, batch=batch, targets=["conv", "head"], loss=lambda model, x: model(x).square().mean()
    )
    nnz, most = measured(model, batch, mask, ["conv", "head"])
    assert told.nnz == nnz
    assert abs(told.peak / most - 1) < 0.1


def test_a_config_is_as_its_model() -> None:
    model = transformers.AutoModelForCausalLM.from_config(llama(), dtype=torch.bfloat16).train()
    assert shira.estimate(llama(), tokens=64) == shira.estimate(model, tokens=64)


def test_nothing_changes() -> None:
    model = transformers.LlamaForCausalLM(llama()).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shira.estimate(model, tokens=8)
    assert not model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_ranks() -> None:
    one, four = (shira.estimate(llama(), tokens=64, world_size=ranks) for ranks in (1, 4))
    assert four.weights * 4 == pytest.approx(one.weights, abs=4)
    assert four.values * 4 == pytest.approx(one.values, abs=4)
    assert four.activations == one.activations
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(llama())
    block = 2 * sum(p.numel() for p in model.model.layers[0].parameters())
    rest = 2 * sum(p.numel() for name, p in model.named_parameters() if ".layers." not in name)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert four.gathered == 2 * block + rest + buffers
    assert (one.sent_weights, one.sent_training, one.gathered) == (0, 0, 0)
    assert four.sent_training == round(one.nnz * 6 * 3 / 4)  # a float32 gradient and a bfloat16 value for each entry
    assert four.sent_weights == round(2 * one.weights * 3 / 4)
    assert "each of 4 ranks" in str(four)
    assert f"{four.peak / 1e9:,.3f} GB" in str(four)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"model": "a/name"},
            TypeError,
            "model must be a torch.nn.Module or the config of a transformers model, got str",
        ),
        ({"tokens": 0}, ValueError, r"tokens must be a length or \(sequences, length\), of at least 1, got 0"),
        ({"tokens": (2, 0)}, ValueError, r"of at least 1, got \(2, 0\)"),
        ({"world_size": 0}, ValueError, "world_size must be a whole number of at least 1, got 0"),
        ({"targets": "nothing"}, ValueError, "'nothing' matches no module"),
        ({"model": nn.Sequential(nn.Linear(4, 4))}, ValueError, "Sequential did not run on tensors without content"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_refused(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        shira.estimate(**{"model": llama(), **arguments})
