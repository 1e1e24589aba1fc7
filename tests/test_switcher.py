"""Switcher: exact, atomic, and only on the base an adapter was made for."""

import random

import pytest
import torch
from torch import nn

from shira import Adapter, AdapterError, Entry, SparseTuner, Switcher, masks


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 8)).to(dtype)


def adapter_of(model, mask, seed, targets=None, delta=False):
    generator = torch.Generator().manual_seed(seed)
    with SparseTuner(model, mask, targets) as tuner:
        with torch.no_grad():
            for values in tuner.parameters():
                values.copy_(torch.randn(values.shape, generator=generator))
        return tuner.adapter()


def bits(model):
    return [p.detach().clone().contiguous().view(torch.uint8) for p in model.parameters()]


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def switcher_of(dtype=torch.float32):
    model = model_of(dtype)
    switcher = Switcher(model)
    switcher.add("a", adapter_of(model, masks.Rand(density=0.1, seed=1), 1))
    switcher.add("b", adapter_of(model, masks.Rand(density=0.1, seed=2), 2))
    switcher.add("wide", adapter_of(model, masks.WeightMagnitude(density=0.2, granule=8), 3, r"^[02]$"))
    switcher.add("late", adapter_of(model, masks.Struct(density=0.3), 4, r"^3$"))
    return model, switcher


def expected(switcher, base, strengths, dtype):
    """The definition, in plain torch."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    names = [name for name in switcher.adapters if name in strengths]
    found = {}
    for weight_name, weight in base.items():
        flat = weight.view(-1)
        parts = []
        for name in names:
            entry = switcher.adapters[name].weights.get(weight_name)
            if entry is None or strengths[name] == 0:
                continue
            dense, mask = torch.zeros_like(flat), torch.zeros(flat.shape, dtype=torch.bool)
            rows = entry.indices.long()
            dense.view(-1, entry.granule)[rows] = entry.values.view(-1, entry.granule)
            mask.view(-1, entry.granule)[rows] = True
            parts.append((dense, mask, strengths[name]))
        total = flat.to(compute)
        for dense, mask, alpha in parts:
            alpha = torch.tensor(alpha, dtype=compute)
            total = torch.where(mask, total + alpha * (dense.to(compute) - flat.to(compute)), total)
        result = torch.where(sum(mask for _, mask, _ in parts) > 0, total.to(dtype), flat) if parts else flat
        for dense, mask, alpha in parts:
            alone = mask & (sum(m.int() for _, m, _ in parts) == 1)
            if alpha == 1:
                result = torch.where(alone, dense, result)
        found[weight_name] = result.view(weight.shape)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_state_is_the_definition_bit_for_bit(dtype):
    model, switcher = switcher_of(dtype)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    for strengths in ({"a": 1.0}, {"a": 0.3}, {"b": -1.5}, {"wide": 0.5}, {"a": 1.0, "b": 1.0}, {"b": 0.5, "a": 0.25},
                      {"a": 0.7, "wide": 0.7, "late": 1.0}, {"a": 0.0, "b": 1.0}, {"late": 0.0}):  # fmt: skip
        switcher.activate(strengths)
        want = expected(switcher, base, strengths, dtype)
        for name, p in model.named_parameters():
            assert torch.equal(p.detach(), want[name]), (strengths, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_walks_end_at_the_base(dtype):
    model, switcher = switcher_of(dtype)
    base, pointers = bits(model), [p.data_ptr() for p in model.parameters()]
    choose = random.Random(0)
    fresh = {}
    for _ in range(300):
        names = choose.sample(["a", "b", "wide", "late"], choose.choice([0, 1, 1, 2, 3]))
        strengths = {name: choose.choice([1.0, 0.5, -0.25]) for name in sorted(names)}
        if strengths:
            switcher.activate(strengths)
        else:
            switcher.deactivate()
            assert equal(bits(model), base)
        state = bits(model)
        assert equal(fresh.setdefault(tuple(strengths.items()), state), state)
    switcher.deactivate()
    assert equal(bits(model), base)
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_file_alpha_using_and_remove(tmp_path):
    model, switcher = switcher_of()
    base = bits(model)
    entry = switcher.adapters["a"].weights
    Adapter(entry, alpha=0.25).save(tmp_path / "quarter.safetensors")
    switcher.add("quarter", tmp_path / "quarter.safetensors")
    switcher.activate("a", alpha=0.25)
    by_hand = bits(model)
    switcher.activate("quarter")
    assert equal(bits(model), by_hand)
    assert switcher.active == {"quarter": 0.25}
    with switcher.using({"a": 1.0, "b": 1.0}) as inside:
        assert inside.active == {"a": 1.0, "b": 1.0}
    assert equal(bits(model), by_hand)
    with pytest.raises(ZeroDivisionError), switcher.using("b"):
        raise ZeroDivisionError
    assert equal(bits(model), by_hand)
    switcher.remove("quarter")
    assert switcher.active == {}
    assert equal(bits(model), base)
    assert "quarter" not in switcher.adapters


def test_another_base_is_refused_and_nothing_changes():
    model, switcher = switcher_of()
    base = bits(model)
    good = switcher.adapters["a"]
    other = model_of()
    with torch.no_grad():
        other[2].weight[3, 5] += 1
    stranger = adapter_of(other, masks.Rand(density=0.1), 9)
    with pytest.raises(AdapterError, match=r"another base: the content of 1 of 3 weights differs .*2\.weight"):
        switcher.add("x", stranger)
    switcher.add("x", stranger, verify=False)
    entry = good.weights["0.weight"]

    def changed(name="0.weight", **fields):
        return Adapter({name: Entry(**{**{f: getattr(entry, f) for f in (
            "indices", "values", "shape", "dtype", "granule", "fingerprint")}, **fields})})  # fmt: skip

    cases = [
        (changed(name="9.weight"), "'9.weight' is not in the model"),
        (changed(shape=(64, 33)), r"must have shape \[64, 33\], got \[64, 32\]"),
        (changed(dtype=torch.float64, values=entry.values.double()), "must have dtype float64, got float32"),
        (changed(indices=entry.indices.flip(0)), "strictly increasing"),
        (changed(indices=entry.indices + 2000), "strictly increasing"),
    ]
    for adapter, says in cases:
        with pytest.raises(AdapterError, match=says):
            switcher.add("bad", adapter)
        assert "bad" not in switcher.adapters
    assert equal(bits(model), base)


def test_bad_calls_change_nothing():
    model, switcher = switcher_of()
    switcher.activate("a")
    state = bits(model)
    for call, kind, says in (
        (lambda: switcher.activate("nobody"), AdapterError, "no adapter 'nobody'"),
        (lambda: switcher.activate({}), ValueError, "at least one"),
        (lambda: switcher.activate("b", alpha=float("nan")), ValueError, "finite"),
        (lambda: switcher.activate({"a": 1.0}, alpha=1.0), ValueError, "alpha is for a single"),
        (lambda: switcher.add("a", switcher.adapters["b"]), AdapterError, "already added"),
        (lambda: switcher.remove("nobody"), AdapterError, "no adapter"),
    ):
        with pytest.raises(kind, match=says):
            call()
        assert equal(bits(model), state)
        assert switcher.active == {"a": 1.0}


def test_adding_while_another_is_active():
    model, switcher = switcher_of()
    late = adapter_of(model_of(), masks.Rand(density=0.1, seed=8), 8)
    switcher.activate("a")
    state = bits(model)
    switcher.add("later", late)
    assert equal(bits(model), state)


def test_a_replaced_parameter_is_noticed():
    model, switcher = switcher_of()
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"0\.weight is no longer the parameter"):
        switcher.activate("a")


def test_tied_and_channels_last():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    adapter = adapter_of(model, masks.Rand(density=0.2), 1)
    switcher = Switcher(model)
    base = bits(model)
    switcher.add("a", adapter)
    switcher.activate("a")
    switcher.deactivate()
    assert equal(bits(model), base)

    conv = nn.Conv2d(4, 4, 3)
    entry = Entry(torch.tensor([1]), torch.zeros(1), (4, 4, 3, 3), torch.float32)
    conv = conv.to(memory_format=torch.channels_last)
    with pytest.raises(AdapterError, match=r"weight 'weight' must be contiguous; make it so with"):
        Switcher(conv).add("a", Adapter({"weight": entry}))
