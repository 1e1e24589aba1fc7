"""Random operations on a Switcher, each state compared bit for bit with a fresh activation: test_switcher.py takes a
few thousand steps, soak.py a million."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from shira import Adapter, Entry, Switcher

STRENGTHS = (1.0, -0.25, 0.0)
NAMES = ("a", "b", "c", "d", "e")
# (weight, granule, density) of each adapter: single entries and granules, parts of the model, a whole parameter, and
# two that share a mask.
PLANS: dict[str, list[tuple[str, int, float]]] = {
    "a": [("0.weight", 1, 0.1), ("1.weight", 1, 0.1)],
    "b": [("0.weight", 8, 0.2), ("2.weight", 1, 0.3)],
    "c": [("1.weight", 4, 0.3), ("2.bias", 5, 1.0)],
    "d": [("0.weight", 1, 0.1), ("1.weight", 6, 0.2), ("2.weight", 2, 0.2), ("2.bias", 1, 0.4)],
    "e": [("0.weight", 1, 0.1), ("1.weight", 1, 0.1)],
}


def model_of(dtype: torch.dtype) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 5)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def adapter_of(model: nn.Module, name: str) -> Adapter:
    # "e" has the mask of "a", and other values.
    masks = torch.Generator().manual_seed(1 + NAMES.index("a" if name == "e" else name))
    numbers = torch.Generator().manual_seed(100 + NAMES.index(name))
    entries = {}
    for weight_name, granule, density in PLANS[name]:
        weight = model.get_parameter(weight_name).detach()
        limit = weight.numel() // granule
        chosen = torch.randperm(limit, generator=masks)[: max(1, round(density * limit))].sort().values.to(torch.int32)
        # "d" keeps fp32 values for narrow weights, "b" adds.
        dtype = torch.float32 if name == "d" else weight.dtype
        values = torch.randn(len(chosen) * granule, generator=numbers).to(dtype)
        fingerprint = int(torch.ops.shira.fingerprint(weight)) % 2**64
        entries[weight_name] = Entry(chosen, values, tuple(weight.shape), weight.dtype, granule, fingerprint)
    return Adapter(entries, alpha=0.5 if name == "c" else 1.0, delta=name == "b")


def bits(model: nn.Module) -> Tensor:
    """A copy of all parameters, end to end, as bytes."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).view(torch.uint8)


def differing(one: Tensor, two: Tensor) -> int:
    """How many bytes differ."""
    return 0 if torch.equal(one, two) else int((one != two).sum())


def restore(model: nn.Module, content: Tensor) -> None:
    """Put `bits` back."""
    with torch.no_grad():
        parameters = list(model.parameters())
        flat = content.view(parameters[0].dtype)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(part.view(parameter.shape))


class Walk:
    """A live Switcher under random operations, and what each state must look like."""

    def __init__(self, dtype: torch.dtype, seed: int, budget: int | None = None) -> None:
        self.dtype, self.random = dtype, random.Random(seed)
        self.model, self.untouched = model_of(dtype), model_of(dtype)
        self.base = bits(self.model)
        self.adapters = {name: adapter_of(self.model, name) for name in NAMES}
        self.switcher = Switcher(self.model, budget=budget)
        for name, adapter in self.adapters.items():
            self.switcher.add(name, adapter)
        self.pointers = [parameter.data_ptr() for parameter in self.model.parameters()]
        self.fresh: dict[tuple[tuple[str, float], ...], Tensor] = {(): self.base}
        self.counts: dict[str, int] = {}

    def expected(self, strengths: dict[str, float]) -> Tensor:
        """The bits after one activation on an untouched model whose Switcher got the adapters in the same order."""
        key = tuple(strengths.items())
        if key not in self.fresh:
            switcher = Switcher(self.untouched)
            for name in strengths:
                switcher.add(name, self.adapters[name])
            switcher.activate(strengths)
            self.fresh[key] = bits(self.untouched)
            restore(self.untouched, self.base)  # not by switching
        return self.fresh[key]

    def step(self) -> None:
        """One operation, and the proof."""
        switcher, choose = self.switcher, self.random
        added, active = list(switcher.adapters), switcher.active
        operations: list[Callable[[], None]] = [self.deactivate, self.move]
        if added:
            operations += [self.single, self.single, self.several, self.several, self.remove, self.block]
        if active:
            operations += [self.reweight, self.reweight, self.take_off]
        if len(added) < len(NAMES):
            operations += [self.add, self.add]
        operation = choose.choice(operations)
        operation()
        self.counts[operation.__name__] = self.counts.get(operation.__name__, 0) + 1
        wrong = differing(bits(self.model), self.expected(switcher.active))
        assert wrong == 0, f"{wrong} bytes differ after {operation.__name__} with {switcher.active}"
        if choose.random() < 0.02:
            for name, parameter in self.model.named_parameters():
                assert switcher.fingerprint(name) == int(torch.ops.shira.fingerprint(parameter.detach())) % 2**64

    def strengths(self, names: list[str]) -> dict[str, float]:
        return {name: self.random.choice(STRENGTHS) for name in names}

    def single(self) -> None:
        name = self.random.choice(list(self.switcher.adapters))
        self.switcher.activate(name, self.random.choice((None, *STRENGTHS)))

    def several(self) -> None:
        added = list(self.switcher.adapters)
        self.switcher.activate(self.strengths(self.random.sample(added, self.random.randint(1, len(added)))))

    def reweight(self) -> None:
        self.switcher.activate(self.strengths(list(self.switcher.active)))

    def take_off(self) -> None:
        self.switcher.deactivate(self.random.choice(list(self.switcher.active)))

    def remove(self) -> None:
        self.switcher.remove(self.random.choice(list(self.switcher.adapters)))

    def add(self) -> None:
        name = self.random.choice([name for name in NAMES if name not in self.switcher.adapters])
        self.switcher.add(name, self.adapters[name])

    def block(self) -> None:
        added = list(self.switcher.adapters)
        chosen = self.random.sample(added, self.random.randint(0, len(added)))
        with self.switcher.using(self.strengths(chosen)):
            wrong = differing(bits(self.model), self.expected(self.switcher.active))
            assert wrong == 0, f"{wrong} bytes differ in a block with {self.switcher.active}"

    def move(self) -> None:
        for parameter in self.model.parameters():
            if self.random.random() < 0.5:
                parameter.data = parameter.data.clone()
        if self.random.random() < 0.5:
            self.switcher.deactivate(verify=False)
        self.switcher.rebind()
        self.pointers = [parameter.data_ptr() for parameter in self.model.parameters()]

    def deactivate(self) -> None:
        self.switcher.deactivate()
        assert self.switcher.active == {}

    def finish(self) -> None:
        """The base is there, in its place, and the switcher says so."""
        self.switcher.verify(full=True)
        self.switcher.deactivate()
        self.switcher.verify(full=True)
        assert differing(bits(self.model), self.base) == 0
        assert [parameter.data_ptr() for parameter in self.model.parameters()] == self.pointers
