"""DoRA of which only a mask reaches the weights: gradients, files, states, and what is refused."""

from __future__ import annotations

import copy
import gc
import io
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import shira
from shira import Adapter, DoRATuner, Switcher, masks
from shira.train import _hooks
from tuning import bits, same_bits

MASK = masks.WeightMagnitude(density=0.1)
X = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)).to(dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.flip(-1)).square().mean()


def at(tuner: DoRATuner) -> list[Tensor]:
    """The flat positions of what each weight trains."""
    entries = tuner.adapter().weights.values()
    return [(e.indices.long()[:, None] * e.granule + torch.arange(e.granule)).view(-1) for e in entries]


def made(base: Tensor, where: Tensor, m: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The weight by the definition, dense."""
    whole = base + b.t() @ a
    dora = m[:, None] * whole / torch.linalg.vector_norm(whole, dim=1, keepdim=True).detach()
    chosen = torch.zeros(base.numel(), dtype=torch.bool).index_fill(0, where, True).view_as(base)
    return torch.where(chosen, dora, base)


@pytest.mark.parametrize("gradient", ["sampled", "dense"])
@pytest.mark.parametrize("granule", [1, 4])
def test_steps_are_those_of_the_definition(gradient: str, granule: int) -> None:
    """Against plain PyTorch in fp64: gradients, steps of torch's AdamW, clipping, two batches a step."""
    model, base = net(torch.float64), net(torch.float64)
    x = X.double()
    tuner = DoRATuner(model, masks.WeightMagnitude(density=0.1, granule=granule), rank=3, gradient=gradient)
    assert same_bits_of_weights(model, base)
    plain = [p.detach().clone().requires_grad_() for p in tuner.parameters()]
    places, weights = at(tuner), [base[0].weight.detach(), base[2].weight.detach()]
    ours, theirs = torch.optim.AdamW(tuner.parameters(), lr=0.05), torch.optim.AdamW(plain, lr=0.05)
    for _ in range(3):
        for part in x.chunk(2):
            loss = loss_of(model, part)
            loss.backward()
            first, second = (made(weights[k], places[k], *plain[3 * k : 3 * k + 3]) for k in (0, 1))
            hidden = nn.functional.gelu(nn.functional.linear(part, first, base[0].bias))
            wanted = (nn.functional.linear(hidden, second, base[2].bias) - part.flip(-1)).square().mean()
            wanted.backward()
            torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
        for mine, other in zip(tuner.parameters(), plain, strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-12)
        for parameters, optimizer in ((list(tuner.parameters()), ours), (plain, theirs)):
            nn.utils.clip_grad_norm_(parameters, 0.1)
            optimizer.step()
            optimizer.zero_grad()
    tuner.verify()
    for k, layer in enumerate((0, 2)):
        wanted = made(weights[k], places[k], *plain[3 * k : 3 * k + 3])
        torch.testing.assert_close(model[layer].weight.detach(), wanted.detach(), rtol=1e-9, atol=1e-12)
    assert all(values.grad is None for name, values in model.named_parameters() if name.endswith("weight_shira_values"))


def same_bits_of_weights(model: Any, base: Any) -> bool:
    return all(torch.equal(model[at].weight, base[at].weight) for at in (0, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_ends_in_an_ordinary_file(tmp_path: Path, dtype: torch.dtype) -> None:
    model, before = net(dtype), bits(net(dtype))
    x = X.to(dtype)
    first = loss_of(model, x).detach()
    with DoRATuner(model, MASK, rank=4) as tuner:
        optimizer = shira.AdamW(tuner, lr=0.05)
        trainer = shira.Trainer(tuner, [x], loss=loss_of, optimizer=optimizer, clip=1.0, progress=False)
        assert trainer.fit(20).evaluate([x]) < 0.9 * first
        assert "made by DoRA of rank 4, with 360 parameters to train" in tuner.summary()
        tuner.adapter().save(tmp_path / "dora.safetensors")
        trained = [model[at].weight.detach().clone() for at in (0, 2)]
        assert tuner.nnz == sum(entry.nnz for entry in tuner.adapter().weights.values())
    assert same_bits(model, before)
    fresh = net(dtype)
    switcher = Switcher(fresh)
    switcher.add("it", Adapter.load(tmp_path / "dora.safetensors"))
    switcher.activate("it")
    for layer, wanted, where in zip((0, 2), trained, at_file(tmp_path), strict=True):
        assert torch.equal(fresh[layer].weight, wanted)
        changed = (fresh[layer].weight != net(dtype)[layer].weight).view(-1).nonzero().view(-1)
        assert len(changed) > 10
        assert set(changed.tolist()) <= set(where.tolist())


def at_file(folder: Path) -> list[Tensor]:
    return [entry.indices.long() for entry in Adapter.load(folder / "dora.safetensors").weights.values()]


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    def run(steps: int, folder: str, resume: bool = False) -> dict[str, Tensor]:
        model = net()
        tuner = DoRATuner(model, MASK, rank=2)
        path = tmp_path / folder
        trainer = shira.Trainer(
            tuner, list(X.chunk(3)), loss=loss_of, optimizer=torch.optim.AdamW(tuner.parameters(), lr=0.02),
            checkpoint=path, progress=False,
        )  # fmt: skip
        if resume:
            trainer.resume(path)
        trainer.fit(steps)
        return bits(model)

    wanted = run(6, "whole")
    run(3, "halves")
    got = run(6, "halves", resume=True)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    state = torch.load(tmp_path / "halves", weights_only=True)["tuner"]
    other = DoRATuner(net(), MASK, rank=3)
    with pytest.raises(ValueError, match=r"the state has no a of 0\.weight with the shape \[3, 16\]"):
        other.load_state_dict(state)
    plain = shira.SparseTuner(net(), MASK)
    with pytest.raises(ValueError, match=r"the state has no magnitude of 0\.weight"):
        other.load_state_dict(plain.state_dict())


def test_edits_are_followed() -> None:
    model, other = net(), net()
    tuner = DoRATuner(model, MASK, rank=2)
    saved = {name: p.detach().clone() for name, p in tuner.named_parameters()}
    with torch.no_grad():
        for name, p in tuner.named_parameters():
            if "_b_" in name:
                p.add_(0.3)
    edited = model(X)
    assert not torch.equal(edited, other(X))
    twin = DoRATuner(other, MASK, rank=2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), edited)
    model.load_state_dict(saved, strict=False)
    with tuner.disabled():
        base = model(X)
    assert torch.equal(base, net()(X))
    torch.testing.assert_close(model(X), net()(X))
    assert tuner.adapter().nnz == twin.nnz
    with torch.no_grad():
        next(tuner.parameters()).data.mul_(1.5)  # moves no version
    doubled = model(X)
    assert not torch.equal(doubled, net()(X))
    copied = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="DoRATuner: this is a copy of the model that it trains"):
        copied(X)
    with torch.no_grad():
        assert torch.equal(copied(X), doubled)
    assert torch.equal(copied.eval()(X), doubled)
    shira.detach(copied)
    assert same_bits(copied, bits(net()))
    tuner.detach()
    assert same_bits(model, bits(net()))


@pytest.mark.parametrize("around", [False, True], ids=["the model", "a function with it"])
@pytest.mark.parametrize("grad", [True, False])
def test_edits_are_followed_by_compiled_models(around: bool, grad: bool) -> None:
    model = net()
    tuner = DoRATuner(model, MASK, rank=2)
    optimizer = shira.AdamW(tuner, lr=0.01)
    torch._dynamo.reset()
    compiled: Any = torch.compile((lambda x: model(x)) if around else model, backend="eager")
    with torch.set_grad_enabled(grad):
        for factor in (1.0, 1.5, 0.5):
            with torch.no_grad():
                for parameter in tuner.parameters():
                    parameter.mul_(factor).add_(0.01)
            found = compiled(X)
            assert torch.equal(found, model(X))
            if grad:
                found.square().mean().backward()
                found = [p.grad for p in tuner.parameters()]
                optimizer.zero_grad()
                model(X).square().mean().backward()
                assert all(map(torch.equal, found, [p.grad for p in tuner.parameters()]))
                optimizer.step()
                optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="DoRATuner: an export would hold the weights as they are now"):
        torch.export.export(model, (X,))


def moved(tuner: DoRATuner) -> None:
    """Move away from the base, at which `A` gets no gradient."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuner.sync()


def test_parameters_may_be_frozen() -> None:
    model = net()
    tuner = DoRATuner(model, MASK, rank=2)
    moved(tuner)
    loss_of(model, X).backward()
    parameters = list(tuner.parameters())
    wanted = [parameter.grad for parameter in parameters]
    for frozen in ([1], [0, 1, 2]):  # one of a weight's, and all of a weight's
        for at, parameter in enumerate(parameters):
            parameter.grad = None
            parameter.requires_grad_(at not in frozen)
        loss_of(model, X).backward()
        for at, parameter in enumerate(parameters):
            assert parameter.grad is None if at in frozen else torch.equal(parameter.grad, wanted[at])
    for parameter in parameters:
        parameter.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"all values \(0\.weight_shira_values and the rest\) are frozen"):
        model(X)
    x = X.clone().requires_grad_()
    model.eval()(x).sum().backward()
    assert x.grad is not None


def test_steps_inside_backward() -> None:
    model, twin = net(), net()
    tuner, other = DoRATuner(model, MASK, rank=2), DoRATuner(twin, MASK, rank=2)
    moved(tuner)
    other.load_state_dict(tuner.state_dict())
    one = torch.optim.SGD(other.parameters(), lr=0.1)
    for parameter in tuner.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        parameter.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: (optimizer.step(), None)[1])
    for _ in range(2):
        for each in (tuner, other):
            for parameter in each.parameters():
                parameter.grad = None
            loss_of(each.model, X).backward()
        one.step()
        assert all(map(torch.equal, tuner.parameters(), other.parameters()))
        assert torch.equal(model[0].weight, twin[0].weight)


def test_copies_and_pickles() -> None:
    model = net()
    tuner = DoRATuner(model, MASK, rank=2)
    moved(tuner)

    def pickled() -> nn.Module:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        found: nn.Module = torch.load(file, weights_only=False)
        return found

    for made in (pickled, lambda: copy.deepcopy(model)):
        copied = made()
        with pytest.raises(RuntimeError, match="DoRATuner: this is a copy of the model that it trains"):
            copied(X)
        assert torch.equal(copied.eval()(X), model(X))
        shira.detach(copied)
        assert torch.equal(copied.train()(X), net()(X))
        with torch.no_grad():
            next(tuner.parameters()).mul_(1.5)
        with pytest.raises(
            RuntimeError, match=r"would not follow that; call tuner\.sync\(\) before the model is copied"
        ):
            made()
        tuner.sync()


def test_a_model_that_nobody_has_is_freed() -> None:
    model = net()
    tuner = DoRATuner(model, MASK, rank=2)
    optimizer = shira.AdamW(tuner, lr=0.1)
    before = model(X).detach()
    reference = weakref.ref(tuner)
    del tuner
    gc.collect()
    loss_of(model, X).backward()  # with the model alone, training goes on
    optimizer.step()
    assert not torch.equal(model(X), before)
    del model, optimizer
    gc.collect()
    assert reference() is None


def test_what_would_train_something_else_is_refused() -> None:
    """Each is refused, and nothing is written: afterwards the tuner trains as before."""
    model: Any = net()
    tuner = DoRATuner(model, MASK, rank=2)
    moved(tuner)
    name, magnitude = next(tuner.named_parameters())
    weights = bits(model)

    loss = loss_of(model, X)
    with torch.no_grad():
        magnitude.mul_(2)
    with pytest.raises(
        RuntimeError, match=r"0\.weight is made of was changed between the forward and the backward pass"
    ):
        loss.backward()
    with torch.no_grad():
        magnitude.div_(2)
    other = {name: (2 * magnitude).detach().requires_grad_()}
    with pytest.raises(RuntimeError, match=f"{name} was replaced by another parameter"):
        torch.func.functional_call(model, other, (X,))
    with torch.no_grad():  # to compute with them alone is right
        assert not torch.equal(torch.func.functional_call(model, other, (X,)), model(X))
    for transform in (
        lambda: torch.func.vmap(model)(X),
        lambda: torch.func.grad(lambda p: torch.func.functional_call(model, p, (X,)).sum())(
            dict(tuner.named_parameters())
        ),
    ):
        with pytest.raises(RuntimeError, match=r"which torch\.func cannot follow"):
            transform()
    assert same_bits(model, weights)

    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    loss_of(model, X).backward()
    optimizer.step()
    kept = {name: magnitude.detach().clone()}
    model.load_state_dict(kept, strict=False, assign=True)
    for step in (lambda: model(X), optimizer.step, tuner.sync):
        with pytest.raises(RuntimeError, match=f"{name} was replaced by another parameter"):
            step()
    setattr(model[0], name.removeprefix("0."), magnitude)
    model(X)
    tuner.detach()
    assert same_bits(model, bits(net()))

    dense = DoRATuner(model, MASK, rank=2, gradient="dense")
    with pytest.raises(RuntimeError, match="DoRATuner: its gradients cannot be differentiated again"):
        loss_of(model, X).backward(create_graph=True)
    dense.detach()
    normed = DoRATuner(model, MASK, rank=2)
    optimizer = torch.optim.SGD(normed.parameters(), lr=0.1)
    nn.utils.parametrizations.weight_norm(model[0])
    loss_of(model, X).backward()
    with pytest.raises(RuntimeError, match=r"0\.weight was replaced by another parameter"):
        optimizer.step()


def test_refusals() -> None:
    model: Any = net()
    before = bits(model)
    for rank in (0, 2.0, True):
        with pytest.raises(ValueError, match=r"DoRATuner: rank must be a whole number of at least 1, got"):
            DoRATuner(model, rank=rank)
    with pytest.raises(
        ValueError, match=r"DoRATuner: weight is in a Embedding, and DoRA is for the weights of nn\.Lin"
    ):
        DoRATuner(nn.Embedding(4, 8), masks.Rand(density=0.5), "weight")
    with pytest.raises(TypeError, match=r"does not hold the magnitudes and factors .* go on with tuner\.state_dict"):
        DoRATuner.from_adapter(model, "file")
    zero = net()
    with torch.no_grad():
        zero[2].weight[3] = 0
    with pytest.raises(
        ValueError, match=r"DoRATuner: 2\.weight has outputs whose weights are all zero, and DoRA gives"
    ):
        DoRATuner(zero, MASK)
    assert not any(name.endswith("_shira_values") for name, _ in zero.named_parameters())
    tuner = DoRATuner(model, MASK, rank=2)
    values = torch.optim.SGD([tuned.values for tuned in tuner._tuned], lr=0.1)
    loss_of(model, X).backward()
    with pytest.raises(RuntimeError, match=r"this SGD has the values, .* make it from tuner\.parameters\(\)"):
        values.step()
    ours = torch.optim.SGD(tuner.parameters(), lr=0.1)
    with tuner.disabled(), pytest.raises(RuntimeError, match=r"not inside `with tuner\.disabled\(\)`"):
        ours.step()
    unused = net()
    late = DoRATuner(unused, MASK, rank=2)
    with pytest.raises(RuntimeError, match=r"no gradient reached .*0\.weight"):
        torch.optim.SGD(late.parameters(), lr=0.1).step()
    for p in late.parameters():
        p._dp_group = object()  # type: ignore[attr-defined]  # as a DeepSpeed engine does with what it trains
    with pytest.raises(
        RuntimeError, match=r"a DeepSpeed engine trains what 0\.weight is made of, and its steps cannot"
    ):
        unused(X)
    tuner.detach()
    assert same_bits(model, before)
    assert not any(name.endswith("_shira_values") for name, _ in model.named_parameters())


def test_threads_train_models_of_their_own() -> None:
    """Tuners come and go in one thread while optimizers step in others."""

    base = net()  # from torch's random numbers, which threads share

    def trained(kind: str) -> list[Tensor]:
        outputs = []
        for seed in range(3):
            model: Any = copy.deepcopy(base)
            generator = torch.Generator().manual_seed(seed)
            before = bits(model)
            tuner = DoRATuner(model, MASK, rank=2) if kind == "dora" else shira.SparseTuner(model, MASK)
            with torch.no_grad():
                for parameter in tuner.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            optimizer = torch.optim.SGD(tuner.parameters(), lr=0.05)
            for _ in range(4):
                loss_of(model, X).backward()
                optimizer.step()
                optimizer.zero_grad()
            outputs.append(model(X).detach().clone())
            tuner.detach()
            assert same_bits(model, before)
        return outputs

    kinds = ["dora", "sparse", "dora", "sparse"]
    wanted = {kind: trained(kind) for kind in set(kinds)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(kinds)) as pool:
            found = list(pool.map(trained, kinds))
    finally:
        sys.setswitchinterval(interval)
    for kind, outputs in zip(kinds, found, strict=True):
        assert all(map(torch.equal, outputs, wanted[kind]))


def test_hooks_of_optimizers_go_with_the_last_tuner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a step in another thread may be walking over them."""
    monkeypatch.setattr(_hooks, "known", {})  # tuners of other tests
    for threads in (2, 1):
        monkeypatch.setattr("threading.active_count", lambda threads=threads: threads)
        with DoRATuner(net(), MASK, rank=2), DoRATuner(net(), MASK, rank=2):
            assert list(_global_optimizer_pre_hooks.values()).count(_hooks._before) == 1
        assert list(_global_optimizer_pre_hooks.values()).count(_hooks._before) == threads - 1


def test_a_state_after_an_edit_has_the_values_of_the_parameters() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    x = torch.randn(3, 8)
    with DoRATuner(model, masks.Rand(density=0.5, seed=1), rank=2) as tuner:
        before = copy.deepcopy(tuner.state_dict())
        for parameter in tuner.parameters():
            parameter.data.add_(0.5)
        state = tuner.state_dict()
        wanted = model(x)
        tuner.load_state_dict(before)
        assert not torch.equal(model(x), wanted)
        tuner.load_state_dict(state)
        assert torch.equal(model(x), wanted)
