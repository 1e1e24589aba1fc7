"""The weight follows its values: however they were written, compiled or not, and back to the base for a while."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shira import SGD, AdamW, SparseTuner, masks
from shira.train import _sites
from tuning import VALUES, bits, check_gradients, dense_gradients, indices_of, randomize, same_bits

GRADIENTS = pytest.mark.parametrize("gradient", ["sampled", "dense"])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x).tanh())
        return y


class Around(nn.Module):
    """What is compiled is not the tuner's model but something that has it in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x) * 2
        return y


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))


def net(dtype: torch.dtype = torch.float32) -> Net:
    model = randomize(Net()).to(dtype)
    assert isinstance(model, Net)
    return model


def tune(model: nn.Module, gradient: str = "sampled") -> SparseTuner:
    return SparseTuner(model, masks.Rand(density=0.3, seed=1), gradient=gradient)


def follows(tuner: SparseTuner) -> bool:
    """Whether every weight holds its values."""
    for name, values in tuner.named_parameters():
        weight = tuner.model.get_parameter(name.removesuffix(VALUES)).detach()
        if not torch.equal(weight.view(-1)[indices_of(tuner.model, name).long()], values.detach().to(weight.dtype)):
            return False
    return True


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def by_data(p: nn.Parameter, to: Tensor) -> None:
    p.data.copy_(to)


def by_numpy(p: nn.Parameter, to: Tensor) -> None:
    p.detach().numpy()[:] = to.numpy()


def by_copy(p: nn.Parameter, to: Tensor) -> None:
    with torch.no_grad():
        p.copy_(to)


def by_memory(p: nn.Parameter, to: Tensor) -> None:
    p.data = to.clone()


WRITES = pytest.mark.parametrize("put", [by_data, by_numpy, by_copy, by_memory])


@WRITES
@GRADIENTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_of_the_values_is_computed_with_and_taken_back(
    put: Callable[[nn.Parameter, Tensor], None], gradient: str, dtype: torch.dtype
) -> None:
    """As diffusers' EMAModel does: store, copy_to, evaluate, restore. Most ways of writing move no version."""
    model, x = net(dtype), X.to(dtype)
    tuner = tune(model, gradient)
    optimizer = AdamW(tuner, lr=0.1)
    model(x).float().square().sum().backward()
    optimizer.step()
    averages = [values.detach() + 1 for values in tuner.parameters()]
    trained, wanted = [values.detach().clone() for values in tuner.parameters()], bits(model)
    twin = copy.deepcopy(model)
    for values, average in zip((p for n, p in twin.named_parameters() if n.endswith(VALUES)), averages, strict=True):
        by_copy(values, average)
    with torch.no_grad():
        before = model(x)
        for values, average in zip(tuner.parameters(), averages, strict=True):
            put(values, average)
        assert torch.equal(model(x), twin(x))
        assert follows(tuner)
        for values, old in zip(tuner.parameters(), trained, strict=True):
            put(values, old)
        assert torch.equal(model(x), before)
        # Or by hand, with nothing computed meanwhile.
        for values, average in zip(tuner.parameters(), averages, strict=True):
            put(values, average)
        tuner.sync()
        for values, old in zip(tuner.parameters(), trained, strict=True):
            put(values, old)
        assert torch.equal(model(x), before)
    assert same_bits(model, wanted)


def test_a_layer_that_is_called_by_itself_follows_too() -> None:
    model = net()
    with tune(model) as tuner, torch.no_grad():
        model(X)
        for values in tuner.parameters():
            values.data.add_(1.0)
        model.first(X)
        model.last(torch.ones(1, 16))
        assert follows(tuner)


def test_a_weight_that_others_wrote_to_follows() -> None:
    model = net()
    with tune(model) as tuner, torch.no_grad():
        model.first.weight.zero_()
        model(X)
        assert follows(tuner)


@GRADIENTS
def test_forwards_before_one_backward(gradient: str) -> None:
    """A look at the values writes nothing where nothing changed: the graphs of earlier forwards stay good."""
    model = net(torch.float64)
    x = X.double()
    wanted = dense_gradients(model, lambda module: module(x).square().sum())
    with tune(model, gradient) as tuner:
        first, second = model(x).square().sum(), model(x).square().sum()
        with torch.no_grad():
            model(x)
        (first + second).backward()
        check_gradients(tuner, wanted, times=2)


@GRADIENTS
def test_where_content_cannot_be_told_the_values_are_written(gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a look would make the host wait. Graphs of earlier forwards stay good."""
    monkeypatch.setattr(_sites.Site, "same_content", lambda site, values: None)
    model = net(torch.float64)
    x = X.double()
    wanted = dense_gradients(model, lambda module: module(x).square().sum())
    with tune(model, gradient) as tuner:
        versions = [p._version for p in model.parameters()]
        first, second = model(x).square().sum(), model(x).square().sum()
        with torch.no_grad():
            model.last(model.first(x))
        (first + second).backward()
        check_gradients(tuner, wanted, times=2)
        assert [p._version for p in model.parameters()] == versions
        for values in tuner.parameters():
            values.data.add_(1.0)
        model(x)
        assert follows(tuner)
        with tuner.disabled(), torch.no_grad():
            assert torch.equal(model(x), net(torch.float64)(x))


def test_weights_that_lag_behind_are_not_exported() -> None:
    model = net()
    with tune(model) as tuner, torch.no_grad():
        for values in tuner.parameters():
            values.data.add_(1.0)
        with pytest.raises(
            RuntimeError, match=r"first\.weight_shira_values was changed .* call tuner\.sync\(\) before"
        ):
            torch.export.export(model, (X,))


# Compiled


def compiled_of(model: Net, how: str) -> Callable[[Tensor], Tensor]:
    # Of writes inside a graph AOTAutograd has to make sense; what happens outside is the same for every backend.
    options: dict[str, object] = {"fullgraph": True, "backend": "aot_eager" if how == "around" else "eager"}
    if how == "torch.compile":
        return torch.compile(model, **options)
    if how == "model.compile":
        model.compile(**options)
        return model
    if how == "around":
        inside = torch.compile(Around(model), **options)
        return lambda x: inside(x) / 2
    return torch.compile(lambda x: model(x), **options)


HOW = ["torch.compile", "model.compile", "around", "function"]


@pytest.mark.parametrize("how", HOW)
def test_a_compiled_model_follows_in_evaluation(how: str) -> None:
    model, plain = net(), net()
    with tune(model) as tuner, tune(plain) as other, torch.no_grad():
        called = compiled_of(model, how)
        called(X)
        for shift, put in ((1.0, by_data), (-2.0, by_copy), (0.5, by_memory)):
            for values, twins in zip(tuner.parameters(), other.parameters(), strict=True):
                put(values, values.detach() + shift)
                put(twins, twins.detach() + shift)
            torch.testing.assert_close(called(X), plain(X))
            assert follows(tuner)


@pytest.mark.parametrize(("how", "gradient"), list(zip(HOW[:3], ["sampled", "dense", "sampled"], strict=True)))
def test_a_compiled_model_follows_in_training_or_says_that_it_cannot(how: str, gradient: str) -> None:
    """What a line search does, and SAM: evaluate, edit the parameters, evaluate again, all in one step."""
    model = net()
    with tune(model, gradient) as tuner:
        called = compiled_of(model, how)
        called(X).square().sum().backward()
        model.zero_grad()
        with torch.no_grad():
            for values in tuner.parameters():
                values.add_(1.0)
        if how in ("around", "function"):
            with pytest.raises(RuntimeError, match=r"shira_values was changed outside .* Call tuner\.sync\(\)"):
                called(X).square().sum().backward()
            model.zero_grad()
            tuner.sync()
        called(X).square().sum().backward()
        wanted = dense_gradients(model, lambda module: plain(module, X).square().sum())
        check_gradients(tuner, wanted, rtol=1e-4, atol=1e-5)
        # Several graphs before a backward pass, and the steps of an ordinary loop.
        model.zero_grad()
        (called(X).square().sum() + called(X).square().sum()).backward()
        check_gradients(tuner, wanted, times=2, rtol=1e-4, atol=1e-5)
        optimizer = SGD(tuner, lr=0.1)
        for _ in range(2):
            called(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert follows(tuner)


def plain(module: nn.Module, x: Tensor) -> Tensor:
    """What the weights as they are compute, past all hooks."""
    assert isinstance(module, Net)
    hidden = F.linear(x, module.first.weight, module.first.bias).tanh()
    return F.linear(hidden, module.last.weight, module.last.bias)


@pytest.mark.parametrize("how", ["eager", "torch.compile"])
def test_a_line_search_finds_what_it_finds_without_a_tuner(how: str) -> None:
    """LBFGS over the whole weights of an ordinary model, and over a tuner that trains the same."""
    one, two = net(torch.float64), net(torch.float64)
    x = X.double()
    for p in (one.first.bias, one.last.bias):
        p.requires_grad_(False)
    tuner = SparseTuner(two, masks.Rand(density=1.0))
    losses = []
    for model, parameters in ((one, [one.first.weight, one.last.weight]), (two, list(tuner.parameters()))):
        called = model if how == "eager" or model is one else compiled_of(two, how)
        optimizer = torch.optim.LBFGS(parameters, lr=0.5, max_iter=4, line_search_fn="strong_wolfe")

        def closure(model=model, called=called, optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = (called(x) - 1).square().mean()
            loss.backward()
            return loss

        losses.append([float(optimizer.step(closure).detach()) for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    torch.testing.assert_close(one.first.weight, two.first.weight, rtol=1e-7, atol=1e-9)


# The base for a while


@GRADIENTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_within_a_block(gradient: str, dtype: torch.dtype) -> None:
    model, x = net(dtype), X.to(dtype)
    with torch.no_grad():
        base = model(x)
    tuner = tune(model, gradient)
    optimizer = AdamW(tuner, lr=0.1)
    model(x).float().square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    trained, versions = bits(model), [p._version for p in model.parameters()]
    with torch.no_grad():
        tuned = model(x)
        with tuner.disabled() as same:
            assert same is tuner
            assert torch.equal(model(x), base)
            with tuner.disabled():
                assert torch.equal(model(x), base)
            assert torch.equal(model(x), base)
            assert torch.equal(model.first(x), net(dtype).first(x))
        assert torch.equal(model(x), tuned)
    assert not torch.equal(tuned, base)
    assert same_bits(model, trained)
    assert [p._version for p in model.parameters()] == versions
    with pytest.raises(ZeroDivisionError), tuner.disabled():
        raise ZeroDivisionError
    assert same_bits(model, trained)
    # What is computed inside, with gradients on, is the base's, and gives the values none.
    with tuner.disabled():
        output = model(x.clone().requires_grad_())
        assert torch.equal(output.detach(), base)
        output.float().square().sum().backward()
        assert all(values.grad is None for values in tuner.parameters())
    assert all(p.requires_grad == (gradient == "dense") for p in (model.first.weight, model.last.weight))
    # Values that were edited before or inside the block are followed as ever.
    with torch.no_grad():
        for edit in ("before", "inside"):
            if edit == "before":
                next(tuner.parameters()).data.add_(1.0)
            with tuner.disabled():
                assert torch.equal(model(x), base)
                if edit == "inside":
                    next(tuner.parameters()).data.add_(1.0)
            model(x)
            assert follows(tuner)
    tuner.detach()
    with pytest.raises(RuntimeError, match="detached"), tuner.disabled():
        pass


@pytest.mark.parametrize(("gradient", "how"), [("sampled", ""), ("dense", ""), ("sampled", "around")])
def test_the_base_between_a_forward_and_its_backward(gradient: str, how: str) -> None:
    """The reference of DPO after the policy: the policy's gradient is what it would be without the block."""
    model = net(torch.float64)
    x = X.double()
    tuner = tune(model, gradient)
    optimizer = AdamW(tuner, lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    wanted = dense_gradients(model, lambda module: plain(module, x).square().sum())
    called = compiled_of(model, how) if how else model
    before = called(x)
    with tuner.disabled(), torch.no_grad():
        torch.testing.assert_close(called(x), net(torch.float64)(x))
    (before.square().sum() + called(x).square().sum()).backward()
    check_gradients(tuner, wanted, times=2)


@GRADIENTS
def test_a_backward_that_would_mix_base_and_policy_is_refused(gradient: str) -> None:
    model = net()
    tuner = tune(model, gradient)
    says = "modified by an inplace operation"
    loss = model(X).square().sum()
    with tuner.disabled(), pytest.raises(RuntimeError, match=says):
        loss.backward()
    with tuner.disabled():
        loss = model(X.clone().requires_grad_()).square().sum()
    for _ in range(3):  # whatever is written afterwards
        with pytest.raises(RuntimeError, match=says):
            loss.backward(retain_graph=True)
        tuner.sync()


def test_what_cannot_be_done_while_the_model_is_the_base() -> None:
    model = net()
    tuner = tune(model)
    state = tuner.state_dict()
    model(X).sum().backward()
    trained = bits(model)
    with tuner.disabled():
        for attempt in (tuner.sync, tuner.adapter, tuner.verify, tuner.detach, lambda: tuner.load_state_dict(state)):
            with pytest.raises(RuntimeError, match=r"not inside `with tuner\.disabled\(\)`"):
                attempt()
        for optimizer in (AdamW(tuner), torch.optim.SGD(tuner.parameters(), lr=0.1)):
            with pytest.raises(RuntimeError, match=r"cannot step inside `with tuner\.disabled\(\)`"):
                optimizer.step()
        with pytest.raises(RuntimeError, match=r"cannot be loaded inside `with tuner\.disabled\(\)`"):
            model.load_state_dict(model.state_dict())
        assert copy.deepcopy(model)(X).shape == (5, 4)
    assert same_bits(model, trained)
    other = copy.deepcopy(model)
    with tuner.disabled():
        twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(X), other(X))


def test_writes_inside_autocast_are_seen() -> None:
    """It keeps the casts of weights that require grad: those of dense targets."""
    model = net()
    with tune(model, "dense") as tuner, torch.autocast("cpu", torch.bfloat16):
        before = model(X)
        with torch.no_grad():
            for values in tuner.parameters():
                values.add_(1.0)
        assert not torch.equal(model(X), before)
        with tuner.disabled():
            base = model(X)
        assert torch.equal(base, net()(X))
        tuner.sync()
        assert not torch.equal(model(X), base)


def test_an_interrupted_forward_hides_no_edit() -> None:
    """Ctrl-C is not an Exception, so torch calls no forward hook then."""

    class Interrupted(nn.Module):
        now = False

        def forward(self, x: Tensor) -> Tensor:
            if self.now:
                raise KeyboardInterrupt
            return x

    stop = Interrupted()
    model = nn.Sequential(net(), stop)
    with tune(model) as tuner:
        stop.now = True
        with pytest.raises(KeyboardInterrupt):
            model(X)
        stop.now = False
        for values in tuner.parameters():
            values.data.mul_(3)
        model(X)
        assert follows(tuner)


@GRADIENTS
def test_blocks_of_generators_may_end_in_any_order(gradient: str) -> None:
    model = net()
    base = model(X).detach()
    with tune(model, gradient) as tuner:
        with torch.no_grad():
            for values in tuner.parameters():
                values.mul_(3)
        policy = model(X).detach()
        assert not torch.equal(policy, base)

        def references() -> Iterator[Tensor]:
            with tuner.disabled():
                while True:
                    yield model(X).detach()

        one, other = references(), references()
        assert torch.equal(next(one), base)
        assert torch.equal(next(other), base)
        one.close()  # type: ignore[attr-defined]
        assert torch.equal(next(other), base)
        other.close()  # type: ignore[attr-defined]
        assert torch.equal(model(X), policy)
        tuner.adapter()  # which a block would refuse


@GRADIENTS
def test_frozen_as_a_whole_and_then_the_values_unfrozen(gradient: str) -> None:
    model = net()
    with tune(model, gradient) as tuner:
        model(X).square().sum().backward()
        wanted = [values.grad for values in tuner.parameters()]
        tuner.model.zero_grad()
        model.requires_grad_(False)
        for values in tuner.parameters():
            values.requires_grad_(True)
        model(X).square().sum().backward()
        for values, one in zip(tuner.parameters(), wanted, strict=True):
            assert values.grad is not None
            assert one is not None
            assert torch.equal(values.grad, one)


def test_blocks_of_threads_may_begin_and_end_together() -> None:
    model = net()
    base = model(X).detach()
    with tune(model) as tuner:
        with torch.no_grad():
            for values in tuner.parameters():
                values.mul_(3)
        policy = model(X).detach()

        def references(_: int) -> list[bool]:
            found = []
            for _ in range(50):
                with tuner.disabled():
                    found.append(torch.equal(model(X), base))
            return found

        with ThreadPoolExecutor(3) as pool:
            assert all(all(found) for found in pool.map(references, range(3)))
        assert torch.equal(model(X), policy)
