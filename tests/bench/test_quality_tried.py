"""Masks and training that were tried beside the library's: each does what the page says of it."""

import dataclasses

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from benchmarks.quality import task as task_module
from benchmarks.quality import tasks, tried
from benchmarks.quality.methods import CALIBRATION_SEED, Moving, Shira, carried, train
from benchmarks.quality.tasks import digits, rl
from shira import Entry, masks

NAMES = ["first.weight", "second.weight", "third.weight"]


@pytest.fixture
def task(monkeypatch, tmp_path):
    monkeypatch.setattr(task_module, "CACHE", tmp_path)
    monkeypatch.setattr(task_module, "_memory", {})
    monkeypatch.setattr(digits, "PRETRAIN_STEPS", 20)
    tasks.tasks.cache_clear()
    yield tasks.task("digits-mlp-128/rotated-90")
    tasks.tasks.cache_clear()


def test_a_mask_of_which_nothing_moves_trains_the_same_bits(task):
    plain = train(task, Shira(r=1, granule=4), 0.1, 0, 6)
    stayed = train(task, Moving(r=1, granule=4, share=0.0), 0.1, 0, 6)
    assert plain.record == stayed.record
    for name, entry in plain.adapter.weights.items():
        assert torch.equal(entry.values, stayed.adapter.weights[name].values)
    moved = train(task, Moving(r=1, granule=4), 0.1, 0, 6)
    assert moved.record["nnz"] == plain.record["nnz"]
    assert any(not torch.equal(e.indices, moved.adapter.weights[n].indices) for n, e in plain.adapter.weights.items())


@pytest.mark.parametrize("rows", [False, True])
def test_what_is_nearest_to_the_base_makes_way_for_the_largest_gradients(task, rows):
    method = Moving(r=1, granule=4, share=0.25, rows=rows)
    adapter = train(task, Shira(r=1, granule=4), 0.1, 0, 5).adapter
    (batch,) = task.batches(7, 1)
    model = task.base()
    now = method.moved(model, task, adapter, batch)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), task.base().parameters(), strict=True))
    adapted = task.base().requires_grad_(True)
    with torch.no_grad():
        for name, entry in adapter.weights.items():
            adapted.get_parameter(name).view(-1, 4)[entry.indices.long()] = entry.values.view(-1, 4)
    task.loss(adapted, batch).backward()
    for name, entry in adapter.weights.items():
        new, base = now.weights[name], model.get_parameter(name).detach().view(-1, 4)
        change = (entry.values.view(-1, 4) - base[entry.indices.long()]).abs().sum(1)
        leaving = round(0.25 * len(change))
        assert leaving > 0
        left = ~torch.isin(entry.indices, new.indices)
        assert int(left.sum()) == leaving
        assert change[left].max() <= change[~left].min()
        grown = ~torch.isin(new.indices, entry.indices)
        assert torch.equal(new.values.view(-1, 4)[grown], base[new.indices.long()[grown]])
        stayed = new.values.view(-1, 4)[~grown]
        assert torch.equal(stayed, entry.values.view(-1, 4)[~left])
        gradient = adapted.get_parameter(name).grad.view(-1, 4).abs().sum(1)
        free = torch.ones(len(base), dtype=torch.bool)
        free[entry.indices.long()[~left]] = False
        at = new.indices.long()[grown]
        if rows:
            across = model.get_parameter(name).shape[1] // 4
            counts = torch.bincount(at // across, minlength=len(base) // across)
            assert counts.max() - counts.min() <= 1
        else:
            free[at] = False
            assert gradient[at].min() >= gradient[free].max()


def test_what_stays_keeps_its_averages():
    before = Entry(torch.tensor([1, 4, 6]), torch.zeros(6), (4, 4), torch.float32, 2)
    now = dataclasses.replace(before, indices=torch.tensor([0, 4, 7]))
    state = {"step": torch.tensor(3.0), "exp_avg": torch.arange(6.0), "exp_avg_sq": torch.arange(6.0)}
    found = carried(state, before, now)
    assert found["step"] == 3
    assert found["exp_avg"].tolist() == [0, 0, 2, 3, 0, 0]
    assert found["exp_avg_sq"].tolist() == [2.5, 2.5, 2, 3, 2.5, 2.5]


def test_tried_masks_take_what_they_say(task):
    model = task.base()
    batches = list(task.batches(CALIBRATION_SEED, 2))
    norms = tried.norms(model, task, NAMES, batches)
    pixels = torch.cat([batch[0] for batch in batches]).flatten(1)
    assert torch.allclose(norms["first.weight"], pixels.norm(dim=0), rtol=1e-5)
    weight = model.get_parameter("second.weight")
    chosen = tried.Activation(r=1, norms=norms)("second.weight", weight)
    scores = weight.detach().abs() * norms["second.weight"]
    assert torch.equal(chosen, masks.WeightMagnitude(r=1, balanced=True)("second.weight", scores))
    for granule in (1, 4):
        gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        top = tried.TopRows(r=1, granule=granule, seed=0)._choose("w", weight, gradient).long()
        order = gradient.abs().sum(1).argsort(descending=True)[: len(weight) // 2]
        assert set((top * granule // weight.shape[1]).tolist()) <= set(order.tolist())
        assert len(top) == masks.Rand(r=1, granule=granule).count("w", weight)
        half = tried.HalfSnip(r=2, granule=granule, seed=0)._choose("w", weight, gradient)
        snip = masks.Snip(r=1, granule=granule, balanced=True)._choose("w", weight, gradient)
        assert torch.isin(snip, half).all()
        assert len(half) == 2 * len(snip) == masks.Rand(r=2, granule=granule).count("w", weight)


class Table(nn.Module):
    """Says the next byte by the last one, and is called like a language model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(256, 256)

    def forward(self, input_ids, use_cache):
        assert not use_cache
        return type("Output", (), {"logits": self.table(input_ids)})


def test_rewards_alone_teach_what_is_right():
    task, model = rl.Verified("rl", "last"), Table()
    seen = {split: {bytes(p.tolist()).decode() for p in rl.data("last", split)[0]} for split in ("train", "test")}
    assert {tuple(sorted(filter(str.isdigit, p[:9]))) for p in seen["train"]}.isdisjoint(
        tuple(sorted(filter(str.isdigit, p[:9]))) for p in seen["test"]
    )
    for prompt, answer in zip(*rl.data("last", "test"), strict=True):
        assert str(eval(bytes(prompt.tolist()).decode().removesuffix(" == "))) == chr(answer)
    # The policy gradient, an answer at a time.
    prompts, answers, seed = batch = next(task.batches(0, 1))
    loss = task.loss(model, batch)
    (found,) = torch.autograd.grad(loss, model.table.weight)
    likely = model.table.weight[prompts[:, -1]].log_softmax(1)
    said = torch.multinomial(
        likely.detach().exp(), rl.SAMPLES, replacement=True, generator=torch.Generator().manual_seed(seed)
    )
    total = 0.0
    for row, right in enumerate(answers):
        rewards = [float(one == right) for one in said[row]]
        for one, reward in zip(said[row], rewards, strict=True):
            total = total - (reward - sum(rewards) / len(rewards)) * likely[row, one] / said.numel()
    (wanted,) = torch.autograd.grad(total, model.table.weight)
    assert torch.allclose(found, wanted, atol=1e-7)
    # Every prompt ends alike, so the table can only learn which digits are likely; it has to be shown none of them.
    before = task.score(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.2)
    for batch in task.batches(0, 60):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    assert before < 0.02
    assert task.score(model) > 0.05
