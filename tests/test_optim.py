"""shira.AdamW: a citizen of torch.optim whose step writes the weights."""

import copy

import pytest
import torch
from torch import nn

from shira import AdamW, SparseTuner, masks


def setup(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).to(dtype)
    return model, SparseTuner(model, masks.Rand(density=0.2))


def steps(model, optimizer, count, schedule=None):
    torch.manual_seed(1)
    for _ in range(count):
        x = torch.randn(4, 16)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        if schedule:
            schedule.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_against_torch(weight_decay):
    results = []
    for ours in (True, False):
        model, tuner = setup()
        make = AdamW if ours else torch.optim.AdamW
        optimizer = make(tuner if ours else tuner.parameters(), lr=1e-2, betas=(0.8, 0.99), weight_decay=weight_decay)
        steps(model, optimizer, 50, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50))
        results.append([values.detach().clone() for values in tuner.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_state_dict_continues_bit_for_bit():
    model, tuner = setup()
    optimizer = AdamW(tuner, lr=1e-2)
    steps(model, optimizer, 6)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    saved = copy.deepcopy(optimizer.state_dict())
    steps(model, optimizer, 6)
    expected = [values.detach().clone() for values in tuner.parameters()]

    other, other_tuner = setup()
    other.load_state_dict(state)
    again = AdamW(other_tuner, lr=1e-2)
    again.load_state_dict(saved)
    steps(other, again, 6)
    assert all(torch.equal(a, b) for a, b in zip(expected, other_tuner.parameters(), strict=True))


def test_groups_and_closure():
    model, tuner = setup()
    first, second = tuner.parameters()
    optimizer = AdamW([{"params": [first], "lr": 0.0}, {"params": [second]}], lr=1e-2, weight_decay=0.0)
    before = first.detach().clone(), second.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 16)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert torch.equal(first.detach(), before[0])
    assert not torch.equal(second.detach(), before[1])


def test_refusals():
    model, tuner = setup()
    with pytest.raises(ValueError, match="lr must be at least 0"):
        AdamW(tuner, lr=-1.0)
    with pytest.raises(ValueError, match="betas"):
        AdamW(tuner, betas=(1.0, 0.9))
    optimizer = AdamW(tuner)
    model(torch.ones(2, 16)).sum().backward()
    kept = list(tuner.parameters())
    tuner.detach()
    assert kept
    with pytest.raises(RuntimeError, match="detached"):
        optimizer.step()
