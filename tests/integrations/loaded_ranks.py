"""What each of two ranks does in `test_trainers` with models that transformers divides while it loads them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

import shira
from sharding import three_steps
from shira import Adapter, AdapterError, Entry, Overlay, SparseTuner, Switcher, _granules, masks

IDS = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(1))
RAND = masks.Rand(density=0.1, granule=4)
SIZES = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def experts() -> Any:
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **EXPERTS)).eval()


def adapter(model: nn.Module, seed: int, *leaving: str) -> Adapter:
    """Random entries of every weight, but for those whose name has one of these parts."""
    generator, entries = torch.Generator().manual_seed(seed), {}
    for name, weight in model.named_parameters():
        if any(part in name for part in leaving):
            continue
        count = weight.numel() // 8
        indices = torch.randperm(count, generator=generator)[: max(1, count // 3)].sort().values.to(torch.int32)
        values = torch.randn(len(indices) * 8, generator=generator)
        entries[name] = Entry(indices, values, tuple(weight.shape), weight.dtype, 8,
                              fingerprint=_granules.fingerprint(weight))  # fmt: skip
    return Adapter(entries, alpha=0.75)


def same(model: nn.Module, wanted: nn.Module) -> None:
    there = model.state_dict()
    for name, tensor in wanted.state_dict().items():
        found = there[name]
        assert torch.equal(found.full_tensor() if isinstance(found, DTensor) else found, tensor), name


def outputs(model: nn.Module, base: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, base(IDS).logits, rtol=1e-3, atol=1e-3)


def switches(model: nn.Module, make: Any) -> None:
    base = make()
    pair = Switcher(model), Switcher(base)
    for each in pair:
        each.add("a", adapter(make(), 1))
        each.add("b", adapter(make(), 2))
    for which in ("a", {"a": 0.5, "b": 1.0}, {"b": 0.3}):
        for each in pair:
            each.activate(which)
        same(model, base)
        outputs(model, base)
    pair[0].verify(full=True)
    pair[0].deactivate()
    same(model, make())


def overlays(model: nn.Module, make: Any) -> None:
    base = make()
    pair = Overlay(model), Overlay(base)
    for each in pair:
        each.add("a", adapter(make(), 1, "norm", "embed"))
    for which in ("a", ["a", None]):
        with pair[0].using(which), pair[1].using(which):
            outputs(model, base)
    pair[0].detach()


def trains(model: nn.Module, make: Any, targets: str, **options: Any) -> None:
    def run(one: nn.Module) -> tuple[Tensor, Adapter]:
        tuner = SparseTuner(one.train(), RAND, targets, **options)
        found = three_steps(tuner, shira.AdamW(tuner, lr=0.01, eps=1e-4), lambda: one(IDS, labels=IDS).loss)
        tuner.detach()
        one.eval()
        return found

    (losses, got), (wanted_losses, wanted) = run(model), run(make())
    torch.testing.assert_close(losses, wanted_losses, rtol=1e-5, atol=1e-6)
    assert got.weights.keys() == wanted.weights.keys()
    for name, entry in wanted.weights.items():
        assert torch.equal(got.weights[name].indices, entry.indices)
        assert got.weights[name].fingerprint == entry.fingerprint
        torch.testing.assert_close(got.weights[name].values, entry.values, rtol=1e-4, atol=1e-5)
    same(model, make())


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for make in (llama, experts):
        if dist.get_rank() == 0:
            make().save_pretrained(make.__name__)
    dist.barrier()

    def load(make: Any, **how: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(make.__name__, **how).eval()

    # Tensor parallelism: transformers replaces the forward of layers.
    model = load(llama, tp_plan="auto")
    assert isinstance(model.lm_head.weight, DTensor)
    switches(model, llama)
    trains(model, llama, "proj|embed_tokens|lm_head")
    with pytest.raises(
        AdapterError, match=r"q_proj.weight' is a DTensor in a Linear, whose forward was replaced, as tra"
    ):
        Overlay(model).add("a", adapter(llama(), 1, "norm", "embed"))
    with pytest.raises(ValueError, match=r"norm\.weight is not sharded, but .* nothing says whether the ranks compute"):
        SparseTuner(model, RAND, "q_proj", whole="norm")
    # The experts' gate and up are one weight, of which a rank has a part of each.
    model = load(experts, tp_plan="auto")
    switches(model, experts)
    trains(model, experts, "q_proj|gate_up_proj|down_proj")
    # FSDP2; and experts on another mesh.
    model = load(llama, distributed_config=DistributedConfig(fsdp_size=2))
    switches(model, llama)
    overlays(model, llama)
    trains(model, llama, "proj|embed_tokens|lm_head", whole="norm")
    model = load(experts, distributed_config=DistributedConfig(fsdp_size=2, ep_size=2))
    switches(model, experts)
    trains(model, experts, "q_proj|v_proj")
    trains(model, experts, "gate_up_proj")
    with pytest.raises(ValueError, match=r"a tuner trains weights of one mesh: use a tuner for each"):
        SparseTuner(model, RAND, "q_proj|gate_up_proj")
    Path(f"done.{dist.get_rank()}").touch()


if __name__ == "__main__":
    main()
