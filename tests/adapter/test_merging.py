"""TIES and DARE against their papers' formulas on dense task vectors, in plain torch."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from shira import Adapter, AdapterError, Entry, Switcher
from shira._granules import fnv1a64, splitmix64
from shira.adapter import combine as merging

PARTS = {"0.weight": (1, 0.3), "1.weight": (4, 0.4), "1.bias": (1, 1.0)}


def model_of(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def adapter_of(model, seed, names=tuple(PARTS), alpha=1.0, granule=None):
    generator = torch.Generator().manual_seed(seed)
    entries = {}
    for name in names:
        weight = model.get_parameter(name).detach()
        size, density = PARTS[name]
        size = granule or size
        limit = weight.numel() // size
        count = max(1, round(density * limit))
        indices = torch.randperm(limit, generator=generator)[:count].sort().values.to(torch.int32)
        values = torch.randn(count * size, generator=generator).to(weight.dtype)
        fingerprint = int(torch.ops.shira.fingerprint(weight)) % 2**64
        entries[name] = Entry(indices, values, tuple(weight.shape), weight.dtype, size, fingerprint)
    return Adapter(entries, alpha=alpha)


def dense(adapter, model, name):
    """The task vector and where it has entries, as large as the weight."""
    weight = model.get_parameter(name).detach().flatten()
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    tau, mask = torch.zeros(weight.shape, dtype=compute), torch.zeros(weight.shape, dtype=torch.bool)
    entry = adapter.weights.get(name)
    if entry is not None:
        at = (entry.indices.long()[:, None] * entry.granule + torch.arange(entry.granule)).flatten()
        new = entry.values.to(compute)
        tau[at] = new if adapter.delta else new - weight[at].to(compute)
        mask[at] = True
    return tau, mask


def all_of(adapters, model):
    """Task vectors [adapters, entries of the whole model], and their masks."""
    rows = [[dense(adapter, model, name) for name, _ in model.named_parameters()] for adapter in adapters]
    return (torch.stack([torch.cat([part[i] for part in row]) for row in rows]) for i in (0, 1))


def ties_reference(tau, mask, weights, density):
    trimmed = torch.zeros_like(tau)
    for t in range(len(tau)):
        k = max(1, round(density * int(mask[t].sum())))
        top = torch.topk(tau[t].abs(), k).indices  # random numbers, so there are no ties
        trimmed[t, top] = tau[t, top]
    return elected(trimmed * torch.tensor(weights, dtype=tau.dtype)[:, None])


def elected(tau):
    gamma = torch.sign(tau.sum(0))
    result = torch.zeros_like(gamma)
    for p in range(tau.shape[1]):
        agreeing = [float(v) for v in tau[:, p] if torch.sign(v) == gamma[p]]
        result[p] = torch.tensor(agreeing, dtype=tau.dtype).sum() / max(1, len(agreeing))
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("density", "weights"), [(1.0, None), (0.3, (1.0, 1.0, 1.0)), (0.5, (1.0, -0.5, 2.0))])
def test_ties_is_the_paper(dtype, density, weights):
    model = model_of(dtype)
    adapters = [adapter_of(model, 1), adapter_of(model, 2, ("0.weight", "1.bias"), alpha=0.5), adapter_of(model, 3)]
    merged = merging.ties(adapters, model, weights, density=density)
    tau, mask = all_of(adapters, model)
    used = weights or (1.0, 0.5, 1.0)
    torch.testing.assert_close(next(all_of([merged], model))[0], ties_reference(tau, mask, used, density))
    assert merged.delta
    assert merged.provenance["merge"]["method"] == "ties"
    assert all(entry.values.dtype == tau.dtype for entry in merged.weights.values())


def test_signs_that_cancel_and_granules_that_differ():
    model = model_of()
    shape = tuple(model[0].weight.shape)
    plus = Adapter(
        {"0.weight": Entry(torch.tensor([0, 2]), torch.tensor([1.0, 5.0]), shape, torch.float32)}, delta=True
    )
    values = torch.tensor([-1.0, 2.0, 0.0, 0.0])
    minus = Adapter({"0.weight": Entry(torch.tensor([0]), values, shape, torch.float32, 4)}, delta=True)
    entry = merging.ties([plus, minus], model, density=1.0).weights["0.weight"]
    # 0: +1 - 1 cancels; 1: 2 alone; 2: 5 alone (a zero agrees with no sign); 3: nothing.
    assert entry.granule == 1
    assert entry.indices.tolist() == [1, 2]
    assert entry.values.tolist() == [2.0, 5.0]


def test_ties_trims_over_all_weights_and_equals_go_by_order():
    model = model_of()
    entries = {
        "0.weight": Entry(torch.arange(4), torch.tensor([1.0, 2.0, 2.0, 2.0]), (16, 12), torch.float32),
        "1.bias": Entry(torch.arange(4), torch.tensor([3.0, 2.0, 0.5, 2.0]), (8,), torch.float32),
    }
    merged = merging.ties([Adapter(entries, delta=True)], model, density=0.375)  # 3 of 8: the 3, and the first two 2s
    assert merged.weights["0.weight"].indices.tolist() == [1, 2]
    assert merged.weights["1.bias"].indices.tolist() == [0]


@pytest.mark.parametrize("elect", [False, True])
def test_dare_is_the_paper(elect):
    model = model_of()
    adapters = [adapter_of(model, 1), adapter_of(model, 2)]
    drop, weights = 0.4, (1.0, 0.5)
    merged = merging.dare(adapters, model, weights, drop=drop, seed=5, elect=elect)
    # Each alone shows what was dropped of it: the first place in the list is its own draw.
    tau, _ = all_of(adapters, model)
    alone, _ = all_of([merging.dare(adapters[:1], model, (1.0,), drop=drop, seed=5)], model)
    kept = alone[0] != 0
    torch.testing.assert_close(alone[0][kept], tau[0][kept] / (1 - drop))
    share = float(kept[tau[0] != 0].float().mean())
    assert 0.35 < share < 0.85  # 0.6 of 124 entries
    entries = {name: replace(entry, values=entry.values * 0) for name, entry in adapters[0].weights.items()}
    silent = Adapter(entries, delta=True)
    second, _ = all_of([merging.dare([silent, adapters[1]], model, (1.0, 1.0), drop=drop, seed=5)], model)
    rows = torch.stack([alone[0], weights[1] * second[0]])
    torch.testing.assert_close(next(all_of([merged], model))[0], elected(rows) if elect else rows.sum(0))
    assert not torch.equal(alone[0] != 0, second[0] != 0)


def overlapping(model, seeds, dtype=torch.float32):
    """Deltas of the same entries, as PEFT's task tensors are of the same matrices; a third of them cancel in pairs."""
    first = adapter_of(model, seeds[0]).to_delta(model)
    generator = torch.Generator().manual_seed(99)
    deltas = []
    for number, _ in enumerate(seeds):
        entries = {}
        for name, entry in first.weights.items():
            values = torch.randn(entry.nnz, generator=generator, dtype=entry.values.dtype)
            # Two of them sum to exactly zero; no two in one are as large.
            values[::3] = (-1.0) ** number * torch.linspace(1, 2, len(values[::3]))
            entries[name] = replace(entry, values=values)
        deltas.append(Adapter(entries, delta=True))
    return deltas


def peft_formulas():
    """PEFT's module of merges, which needs torch alone; importing PEFT takes seconds."""
    found = importlib.util.find_spec("peft")
    if found is None:
        pytest.skip("needs peft")
    path = Path(found.submodule_search_locations[0], "utils", "merge_utils.py")
    spec = importlib.util.spec_from_file_location("peft_merge_utils", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_peft(deltas, function, weights, **options):
    """PEFT's merge of each weight's values."""
    dtype = next(iter(deltas[0].weights.values())).values.dtype
    return {
        name: function([delta.weights[name].values for delta in deltas], torch.tensor(weights, dtype=dtype), **options)
        for name in deltas[0].weights
    }


def values_like(merged, reference):
    """A merged adapter's values where another has entries, with zeros for what it left out."""
    found = {}
    for name, entry in reference.weights.items():
        full = torch.zeros(entry.numel // entry.granule, entry.granule, dtype=entry.values.dtype)
        if name in merged.weights:
            mine = merged.weights[name]
            full[mine.indices.long()] = mine.values.view(-1, mine.granule)
        found[name] = full[entry.indices.long()].view(-1)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
def test_as_peft_merges(dtype, weights):
    peft = peft_formulas()
    model = model_of(dtype)
    deltas = overlapping(model, (1, 2))
    for ours, theirs in (
        (merging.ties(deltas, model, weights, density=0.55, style="peft"), peft.ties),
        (merging.magnitude_prune(deltas, model, weights, density=0.55), peft.magnitude_prune),
    ):
        found = values_like(ours, deltas[0])
        for name, expected in by_peft(deltas, theirs, weights, density=0.55).items():
            assert (found[name] != 0).any()
            torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=0)


def test_a_draw_is_the_bases_in_the_paper_and_positive_in_peft():
    model = model_of()
    deltas = overlapping(model, (1, 2))
    paper = values_like(merging.ties(deltas, model, density=1.0), deltas[0])
    peft = values_like(merging.ties(deltas, model, density=1.0, style="peft"), deltas[0])
    for name, values in paper.items():
        assert (values[::3] == 0).all()
        assert torch.equal(peft[name][::3], deltas[0].weights[name].values[::3])
    # A negative weight: the paper's election hears it, PEFT's does not.
    one, two = deltas
    strong = Adapter({n: replace(e, values=e.values * 10) for n, e in two.weights.items()}, delta=True)
    heard = values_like(merging.ties([one, strong], model, (1.0, -1.0), density=1.0), one)["1.bias"]
    unheard = values_like(merging.ties([one, strong], model, (1.0, -1.0), density=1.0, style="peft"), one)["1.bias"]
    large = strong.weights["1.bias"].values
    assert torch.equal(heard.sign(), -large.sign())
    assert torch.equal(unheard.sign(), -large.sign())
    a, b = one.weights["1.bias"].values[0], large[0]  # +1 and -10: of 1 + 10 both agree; of 1 - 10 the second alone
    assert (float(a), float(b)) == (1.0, -10.0)
    assert float(heard[0]) == 5.5
    assert float(unheard[0]) == 10.0


@pytest.mark.parametrize("elect", [False, True])
def test_dare_as_peft_merges_what_is_left(elect):
    """PEFT draws from torch's generator, so that what is compared is what comes after the draw."""
    peft = peft_formulas()
    model = model_of()
    deltas, weights = overlapping(model, (1, 2)), (0.8, 0.5)
    silent = [Adapter({n: replace(e, values=e.values * 0) for n, e in d.weights.items()}, delta=True) for d in deltas]
    pruned = [
        values_like(merging.dare([deltas[0], silent[1]], model, (1.0, 1.0), drop=0.3, seed=4), deltas[0]),
        values_like(merging.dare([silent[0], deltas[1]], model, (1.0, 1.0), drop=0.3, seed=4), deltas[0]),
    ]
    found = values_like(merging.dare(deltas, model, weights, drop=0.3, seed=4, elect=elect, style="peft"), deltas[0])
    for name, values in found.items():
        rows = torch.stack([one[name] for one in pruned])
        weighted = rows * torch.tensor(weights)[:, None]
        mask = peft.calculate_majority_sign_mask(rows)
        expected = peft.disjoint_merge(weighted, mask) if elect else weighted.sum(0)
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)


NAN = float("nan")


@pytest.mark.parametrize("merge", [merging.ties, merging.dare, merging.magnitude_prune])
def test_values_that_are_not_finite(merge):
    model = model_of()
    good, bad = overlapping(model, (1, 2))
    values = bad.weights["1.bias"].values.clone()
    values[1], values[2], values[4] = NAN, float("inf"), -float("inf")
    bad = Adapter({**bad.weights, "1.bias": replace(bad.weights["1.bias"], values=values)}, delta=True)
    options = {"drop": 0.0} if merge is merging.dare else {"density": 1.0}
    says = (
        rf"{merge.__name__}: weight '1\.bias' of adapter 2: 3 of its 8 values are not finite "
        r"\(1 NaN and 2 infinite\); check_finite=False \(--allow-nonfinite\) lets them through"
    )
    with pytest.raises(AdapterError, match=says):
        merge([good, bad], model, **options)
    assert merge([good, bad], model, check_finite=False, **options).weights["1.bias"].values.isinf().any()
    # Finite ones whose sum is not.
    huge = Adapter({n: replace(e, values=torch.full_like(e.values, 3e38)) for n, e in good.weights.items()}, delta=True)
    with pytest.raises(AdapterError, match=rf"{merge.__name__}: weight '0\.weight', merged: .* infinite\)"):
        merge([huge, huge], model, (1.0, 1.0), **options)


def test_dare_keeps_the_expected_share_and_mean():
    model = nn.Linear(256, 256, bias=False)
    values = torch.ones(65536)
    whole = Adapter({"weight": Entry(torch.zeros(1, dtype=torch.int32), values, (256, 256), torch.float32, 65536)},
                    delta=True)  # fmt: skip
    for drop in (0.0, 0.5, 0.9):
        found = merging.dare([whole], model, drop=drop, seed=3).weights["weight"]
        dropped = found.values.view(-1)
        share = float((dropped != 0).float().mean())
        assert abs(share - (1 - drop)) < 0.01
        assert abs(float(dropped.mean()) - 1) < 0.05
        again = merging.dare([whole], model, drop=drop, seed=3).weights["weight"]
        assert torch.equal(found.values, again.values)
    other = merging.dare([whole], model, drop=0.9, seed=4).weights["weight"]
    assert not torch.equal(other.values, found.values)
    # Frozen: a seed stands for a draw. Here in whole numbers: SplitMix64's outputs from the key on.
    kept = merging.dare([whole], model, drop=0.9, seed=7).weights["weight"].values.nonzero().view(-1)
    key = splitmix64(splitmix64(7 ^ fnv1a64("weight")) ^ 1)
    draws = [splitmix64((key + entry * 0x9E3779B97F4A7C15) % 2**64) >> 11 for entry in range(256)]
    assert [entry for entry, draw in enumerate(draws) if draw * 2.0**-53 >= 0.9] == kept[kept < 256].tolist()
    assert kept[:6].tolist() == [3, 31, 38, 44, 46, 48]


def test_a_merged_adapter_mixes_like_any_other():
    model = model_of(torch.bfloat16)
    base = [parameter.detach().clone() for parameter in model.parameters()]
    adapters = [adapter_of(model, 1), adapter_of(model, 2)]
    switcher = Switcher(model)
    switcher.add("one", adapters[0])
    switcher.add("both", merging.ties(adapters, model, density=0.5))
    switcher.activate({"one": 0.5, "both": 0.5})
    switcher.verify(full=True)
    switcher.activate("both", alpha=0.3)
    tau = dense(switcher.adapters["both"], model, "0.weight")[0]
    expected = (base[0].float() + torch.tensor(0.3) * tau.view(16, 12)).to(torch.bfloat16)
    mask = (tau != 0).view(16, 12)
    assert torch.equal(model[0].weight.detach(), torch.where(mask, expected, base[0]))
    switcher.deactivate()
    assert all(torch.equal(parameter, one) for parameter, one in zip(model.parameters(), base, strict=True))


def test_refusals():
    model = model_of()
    adapter = adapter_of(model, 1)
    for call, says in (
        (lambda: merging.ties([], model), "ties: give at least one adapter"),
        (lambda: merging.ties([adapter], model, density=0), "density must be above 0 and at most 1, got 0"),
        (lambda: merging.dare([adapter], model, drop=1.0), r"drop must be at least 0 and below 1, got 1\.0"),
        (lambda: merging.dare([adapter], model, (1.0, 2.0)), r"weights must be 1 numbers, .* got \[1\.0, 2\.0\]"),
        (lambda: merging.dare([adapter], model, (float("nan"),)), "the weight of adapter 1 must be a finite number"),
        (lambda: merging.ties([adapter], model, (1e39,)), r"ties: the weight of adapter 1 must .* got 1e\+39"),
        (lambda: merging.ties([adapter], model, alpha=float("inf")), "alpha must be a finite number"),
        (lambda: merging.magnitude_prune([adapter], model, density=1.5), "magnitude_prune: density must be above 0"),
        (lambda: merging.ties([adapter], model, style="Peft"), "ties: style must be 'paper' or 'peft', got 'Peft'"),
        (lambda: merging.dare([adapter], model, style=""), "dare: style must be 'paper' or 'peft', got ''"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(AdapterError, match=r"0\.weight"):
        merging.ties([adapter], model)
