"""SparseTuner: gradients against autograd, the base back bit for bit, and every way a model may be used meanwhile."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from shira import AdamW, SparseTuner, masks


def network(dtype=torch.float32, seed=0, inplace=False):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(inplace=inplace), nn.Linear(32, 8)).to(dtype)


def bits(model):
    return {n: p.detach().clone().view(torch.uint8) for n, p in model.named_parameters()}


def same_bits(model, before):
    now = bits(model)
    return now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in now)


def dense_gradients(model, x):
    twin = copy.deepcopy(model)
    twin(x).square().sum().backward()
    return {n: p.grad for n, p in twin.named_parameters() if p.dim() == 2}


@pytest.mark.parametrize("granule", [1, 8])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_is_the_dense_gradient_at_the_mask(granule, shape, inplace):
    model, x = network(torch.float64, inplace=inplace), torch.randn(shape, dtype=torch.float64)
    expected = dense_gradients(model, x)
    with SparseTuner(model, masks.Rand(density=0.2, granule=granule)) as tuner:
        model(x).square().sum().backward()
        for name, values in tuner.named_parameters():
            weight = name.removesuffix("_shira_values")
            indices = model.get_buffer(f"{weight}_shira_indices").long()
            torch.testing.assert_close(
                values.grad, expected[weight].view(-1, granule)[indices].view(-1), rtol=1e-12, atol=1e-12
            )


def test_without_a_mask_the_default_is_trained():
    expected, trained = masks.default(), network()
    with SparseTuner(trained) as tuner:
        adapter = tuner.adapter()
    assert adapter.mask == expected.describe()
    for name, entry in adapter.weights.items():
        weight = trained.get_parameter(name)
        assert entry.granule == 16
        assert torch.equal(entry.indices, expected.select(name, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mask", [masks.Rand(density=0.1), masks.WeightMagnitude(density=0.1, granule=4),
                                  masks.Struct(density=0.4)])  # fmt: skip
def test_training_moves_only_the_mask_and_detach_restores_every_bit(dtype, mask):
    model = network(dtype)
    before, names = bits(model), dict(model.named_parameters()).keys()
    pointers = [p.data_ptr() for p in model.parameters()]
    tuner = SparseTuner(model, mask)
    optimizer = AdamW(tuner, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 16, dtype=dtype)).float().square().sum().backward()
        optimizer.step()
    for name, values in tuner.named_parameters():
        weight = model.get_parameter(name.removesuffix("_shira_values"))
        indices = model.get_buffer(name.replace("values", "indices")).long()
        rows = weight.detach().view(-1, mask.granule)
        assert torch.equal(rows[indices].view(-1), values.detach().to(dtype))
        changed = (weight.detach().view(torch.uint8) != before[name.removesuffix("_shira_values")]).view(
            rows.shape[0], -1).any(1)  # fmt: skip
        assert changed.any()
        assert not changed[[i for i in range(rows.shape[0]) if i not in set(indices.tolist())]].any()
    tuner.detach()
    assert same_bits(model, before)
    assert dict(model.named_parameters()).keys() == names
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(p.requires_grad for p in model.parameters())
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks
    assert not list(model.buffers())


def test_any_optimizer_writes_the_weights():
    one, two = network(), network()
    x = torch.randn(4, 16)
    for model, make in (
        (one, lambda t: AdamW(t, lr=0.01)),
        (two, lambda t: torch.optim.AdamW(t.parameters(), lr=0.01)),
    ):
        tuner = SparseTuner(model, masks.Rand(density=0.1))
        optimizer = make(tuner)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_checkpointing_autocast_and_a_module_used_twice():
    model, x = network(torch.float64), torch.randn(4, 16, dtype=torch.float64)
    with SparseTuner(model, masks.Rand(density=0.2)) as tuner:
        plain = torch.autograd.grad(model(x).square().sum(), list(tuner.parameters()))
        again = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), list(tuner.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
        twice = torch.autograd.grad(model(x).square().sum() + model(x).square().sum(), list(tuner.parameters()))
        for a, b in zip(plain, twice, strict=True):
            torch.testing.assert_close(2 * a, b)
    model = network()
    with SparseTuner(model, masks.Rand(density=0.2)) as tuner:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.randn(4, 16)).float().square().sum()
        loss.backward()
        assert all(values.grad.dtype == torch.float32 for values in tuner.parameters())


def test_compile_without_graph_breaks():
    model, x = network(torch.float64), torch.randn(4, 16, dtype=torch.float64)
    with SparseTuner(model, masks.Rand(density=0.2)) as tuner:
        eager = torch.autograd.grad(model(x).square().sum(), list(tuner.parameters()))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for a, b in zip(eager, torch.autograd.grad(compiled(x).square().sum(), list(tuner.parameters())), strict=True):
            torch.testing.assert_close(a, b)


def test_no_grad_forward_adds_nothing_and_edits_are_followed():
    model, x = network(), torch.randn(4, 16)
    with SparseTuner(model, masks.Rand(density=0.2)) as tuner:
        with torch.no_grad():
            before = model(x)
            for values in tuner.parameters():
                values.add_(1.0)
            after = model(x)
        assert not torch.equal(before, after)
        name, values = next(iter(tuner.named_parameters()))
        indices = model.get_buffer(name.replace("values", "indices")).long()
        weight = model.get_parameter(name.removesuffix("_shira_values"))
        assert torch.equal(weight.detach().view(-1)[indices], values.detach())


def test_values_are_where_everyone_looks():
    model = network()
    with SparseTuner(model, masks.Rand(density=0.1), targets=["0"]) as tuner:
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.weight_shira_values"]
        assert "0.weight_shira_values" in model.state_dict()
        assert "0.weight_shira_indices" not in model.state_dict()
        assert tuner.nnz == 51
        assert "0.weight" in tuner.summary()


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (r"nothing$", "matches no module with weights and no parameter; the model has 0.weight, 2.weight"),
        (["q_proj"], "target 'q_proj' names no weight"),
        ("(", "not a regular expression"),
        ([], "targets is empty"),
        (["1"], "target '1' is a ReLU and names no weight"),
        (5, "targets must be a pattern or a list of names, got int"),
        (["0", 2], r"targets must be a pattern or a list of names, got \['0', 2\]"),
    ],
)
def test_targets_that_do_not_fit(targets, says):
    model = network()
    before = bits(model)
    with pytest.raises(ValueError, match=says):
        SparseTuner(model, masks.Rand(density=0.1), targets=targets)
    assert same_bits(model, before)
    assert all(p.requires_grad for p in model.parameters())


def test_what_cannot_be_trained_is_named():
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        SparseTuner(nn.Conv2d(1, 1, 1), masks.Rand(density=0.1))
    with pytest.raises(ValueError, match=r"granule 16 must divide .* 1 of 1: 0.weight \[4, 8\]"):
        SparseTuner(nn.Sequential(nn.Linear(8, 4)), masks.Rand(density=0.1, granule=16))
    model = network()
    tuner = SparseTuner(model, masks.Rand(density=0.1))
    with pytest.raises(ValueError, match="already trained"):
        SparseTuner(model, masks.Rand(density=0.1))
    tuner.detach()
    tuner.detach()
    with pytest.raises(RuntimeError, match="detached"):
        tuner.adapter()


@pytest.mark.parametrize("granule", [1, 8])
def test_verify_tells_what_else_wrote_to_the_base(granule):
    model = network(torch.bfloat16)
    before = bits(model)
    tuner = SparseTuner(model, masks.Rand(density=0.2, granule=granule), whole=r"2\.bias")
    optimizer = AdamW(tuner, lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 16, dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()
    trained = bits(model)
    tuner.verify()
    assert same_bits(model, trained)
    # One bit of one entry that does not train.
    mine = model.get_buffer("0.weight_shira_indices").tolist()
    free = next(entry for entry in range(16 * 32) if entry // granule not in mine)
    entry = model[0].weight.detach().view(torch.int16).view(-1)[free]
    entry.bitwise_xor_(torch.tensor(1, dtype=torch.int16))
    with pytest.raises(RuntimeError, match=r"1 weight\(s\) have changed where nothing trains: '?0\.weight"):
        tuner.verify()
    entry.bitwise_xor_(torch.tensor(1, dtype=torch.int16))
    tuner.verify()
    tuner.detach()
    assert same_bits(model, before)
    with pytest.raises(RuntimeError, match="detached"):
        tuner.verify()


def test_a_cast_of_the_master_is_refused():
    model = network()
    SparseTuner(model, masks.Rand(density=0.1))
    model.bfloat16()
    with pytest.raises(RuntimeError, match=r"weight_shira_values must stay float32, got bfloat16"):
        model(torch.randn(4, 16, dtype=torch.bfloat16))


def test_a_target_that_got_no_gradient_is_named():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Skips()
    tuner = SparseTuner(model, masks.Rand(density=0.5))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    model(torch.randn(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"no gradient reached unused\.weight"):
        optimizer.step()


def test_tied_weights_are_one_entry():
    model = network()
    model[2] = nn.Linear(16, 32)
    model[2].weight = model[0].weight
    with SparseTuner(model, masks.Rand(density=0.1)) as tuner:
        adapter = tuner.adapter()
    assert list(adapter.weights) == ["0.weight"]
    assert adapter.weights["0.weight"].aliases == ("2.weight",)
