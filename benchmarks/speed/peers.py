"""Other ways to an adapted weight: PEFT's adapters on layers with given weights, and a LoRA folded in by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import shira

LORA, DORA, SHIRA, SUPER = "PEFT LoRA", "PEFT DoRA", "PEFT SHiRA", "PEFT Super-Tuning"
LINEARS = r"layers\.\d+"


class Layers(nn.Module):
    """Linear layers that hold the given weights without copying them."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for weight in weights:
            layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.layers.append(layer)


def config(kind: str, rank: int, seed: int = 1, targets: str = LINEARS, density: float = 0.01) -> Any:
    """Gives the adapters random values: PEFT's start at zero and would change nothing."""
    if kind in (LORA, DORA):
        return peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False, use_dora=kind == DORA)
    if kind == SHIRA:
        return peft.ShiraConfig(r=rank, target_modules=targets, init_weights=False, random_seed=seed)
    return peft.SupertuningConfig(sparsity=1 - density, target_modules=targets, init_weights=False)


def model(kind: str, weights: list[torch.Tensor], rank: int) -> Any:
    """A model with one adapter, in the weights' dtype: PEFT's default of fp32 makes merging into bf16 no faster."""
    return peft.get_peft_model(Layers(weights), config(kind, rank), autocast_adapter_dtype=False)


def linears(made: Any) -> list[Any]:
    """PEFT's adapted layers, in order."""
    return [layer for layer in made.modules() if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)]


def shrink(made: Any, scale: float = 0.01) -> None:
    """Scales random adapters to the size of trained ones."""
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.mul_(scale)


def prove_merge(made: Any) -> None:
    """Merging adds what PEFT says it adds, and not nothing; unmerging brings the base back up to roundings."""
    layer = linears(made)[0]
    name = layer.active_adapters[0]
    before, delta = layer.get_base_layer().weight.detach().clone(), layer.get_delta_weight(name).detach()
    delta = delta.to_dense() if delta.is_sparse else delta
    assert bool((delta != 0).any())
    made.base_model.merge_adapter()
    torch.testing.assert_close(
        layer.get_base_layer().weight.detach(), (before.float() + delta.float()).to(before.dtype), rtol=2e-2, atol=1e-3
    )
    made.base_model.unmerge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight.detach(), before, rtol=2e-2, atol=1e-3)


@dataclass
class Cycle:
    """One way from a file onto the weights and back: what a server does when a request names another adapter."""

    load: Callable[[], object]
    fuse: Callable[[], object]
    unfuse: Callable[[], object]
    unload: Callable[[], object]
    file_bytes: int

    def steps(self) -> dict[str, Callable[[], object]]:
        return {"load": self.load, "fuse": self.fuse, "unfuse": self.unfuse, "unload": self.unload}


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def peft_cycle(kind: str, weights: list[torch.Tensor], rank: int, folder: Path) -> Cycle:
    """load_adapter, merge_adapter, unmerge_adapter, delete_adapter on a model that PEFT has wrapped before."""
    donor = model(kind, weights, rank)
    shrink(donor)
    donor.save_pretrained(str(folder))
    donor.unload()
    served = peft.get_peft_model(Layers(weights), config(LORA if kind == DORA else kind, 1, density=0.001))

    def load() -> None:
        served.load_adapter(str(folder), "other", autocast_adapter_dtype=False, low_cpu_mem_usage=True)

    return Cycle(
        load,
        lambda: served.base_model.merge_adapter(["other"]),
        served.base_model.unmerge_adapter,
        lambda: served.delete_adapter("other"),
        size_of(folder),
    )


def addmm_cycle(weights: list[torch.Tensor], rank: int, folder: Path) -> Cycle:
    """The fastest LoRA: safetensors, and addmm_ in place. Taking it out again does not bring back the base's bits."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, weight in enumerate(weights):
        for name, shape in (("B", (weight.shape[0], rank)), ("A", (rank, weight.shape[1]))):
            made = torch.empty(shape, dtype=weight.dtype).normal_(0, 0.02 / math.sqrt(rank), generator=generator)
            tensors[f"{i}.{name}"] = made
    folder.mkdir()
    path = folder / "lora.safetensors"
    save_file(tensors, str(path))
    held: dict[str, torch.Tensor] = {}

    def fold(alpha: float) -> None:
        for i, weight in enumerate(weights):
            weight.addmm_(held[f"{i}.B"], held[f"{i}.A"], alpha=alpha)

    return Cycle(
        lambda: held.update(load_file(str(path))), lambda: fold(1.0), lambda: fold(-1.0), held.clear, size_of(folder)
    )


def adapter(weights: list[torch.Tensor], density: float = 0.01) -> shira.Adapter:
    """shira's adapter for `Layers(weights)`: a Rand mask, with values close to the base's."""
    mask, generator = shira.masks.Rand(density=density, seed=1), torch.Generator().manual_seed(1)
    entries = {}
    for name, weight in Layers(weights).named_parameters():
        indices = mask(name, weight.detach())
        values = torch.empty(len(indices), dtype=weight.dtype).normal_(0, 0.02, generator=generator)
        fingerprint = int(torch.ops.shira.fingerprint(weight.detach())) % 2**64
        entries[name] = shira.Entry(indices, values, tuple(weight.shape), weight.dtype, 1, fingerprint)
    return shira.Adapter(entries)


def plain_cycle(weights: list[torch.Tensor], made: shira.Adapter, folder: Path) -> Cycle:
    """The same adapter by stock safetensors and index_copy_: nothing is checked, and the base's entries are kept."""
    tensors = {}
    for i, entry in enumerate(made.weights.values()):
        tensors[f"{i}.indices"], tensors[f"{i}.values"] = entry.indices.to(torch.int64), entry.values
    folder.mkdir()
    path = folder / "plain.safetensors"
    save_file(tensors, str(path))
    held: dict[str, torch.Tensor] = {}

    def fuse() -> None:
        for i, weight in enumerate(weights):
            held[f"{i}.saved"] = weight.view(-1).index_select(0, held[f"{i}.indices"])
            weight.view(-1).index_copy_(0, held[f"{i}.indices"], held[f"{i}.values"])

    def unfuse() -> None:
        for i, weight in enumerate(weights):
            weight.view(-1).index_copy_(0, held[f"{i}.indices"], held[f"{i}.saved"])

    return Cycle(lambda: held.update(load_file(str(path))), fuse, unfuse, held.clear, size_of(folder))


def our_cycle(weights: list[torch.Tensor], made: shira.Adapter, folder: Path, *, first: bool = False) -> Cycle:
    """Switcher.add, activate, deactivate, remove. The base is known, except with `first`: then each adapter is the
    first of its Switcher, which reads all of the base to prove that the adapter is for it."""
    folder.mkdir()
    path = folder / "adapter.safetensors"
    made.save(path)
    held = Layers(weights)
    known = None if first else shira.Switcher(held)
    used: list[shira.Switcher] = []
    if known is not None:
        known.add("before", path)

    def load() -> None:
        used.append(known or shira.Switcher(held))
        used[-1].add("style", path)

    return Cycle(
        load,
        lambda: used[-1].activate("style"),
        lambda: used[-1].deactivate(),
        lambda: used.pop().remove("style"),
        size_of(folder),
    )


def prove_cycle(cycle: Cycle, weights: list[torch.Tensor], wanted: list[torch.Tensor] | None) -> None:
    """shira and plain torch give the wanted bits, then the base's; the others bring it back up to roundings."""
    base = [weight.clone() for weight in weights]
    cycle.load()
    cycle.fuse()
    if wanted is None:
        assert all(bool((weight != before).any()) for weight, before in zip(weights, base, strict=True))
    else:
        assert all(torch.equal(weight, one) for weight, one in zip(weights, wanted, strict=True))
    cycle.unfuse()
    cycle.unload()
    for weight, before in zip(weights, base, strict=True):
        if wanted is None:
            torch.testing.assert_close(weight, before, rtol=2e-2, atol=1e-2)
        else:
            assert torch.equal(weight, before)


def adapted(weights: list[torch.Tensor], made: shira.Adapter) -> list[torch.Tensor]:
    return [
        weight.view(-1).index_copy(0, entry.indices.to(torch.int64), entry.values).view_as(weight)
        for weight, entry in zip(weights, made.weights.values(), strict=True)
    ]
