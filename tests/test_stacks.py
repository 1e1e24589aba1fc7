"""What `docs/stacks.md` says of compilers, exporters, torch.func and averages of weights: each claim, by its bits.

Two kinds of stack stand on a model: those that read its weights at every call, and so follow a switch, and those that
took a copy. Both are held to what the page says, so that a new torch that changes sides is noticed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shira
import shira_ops

# torch's own: TorchScript is deprecated, and compiling and exporting use what is.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def inductor() -> Iterator[None]:
    """Inductor with nothing of other tests, in this process alone, and without its trials of what g++ can vectorise."""
    import torch._inductor.config as config

    torch._dynamo.reset()
    with config.patch({"compile_threads": 1, "cpp.vec_isa_ok": True}):
        yield
    torch._dynamo.reset()


def linear() -> nn.Module:
    """Frozen, and without anything between its layers: Inductor then calls what is compiled already."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval().requires_grad_(False)


X = torch.linspace(-1, 1, 48).view(3, 16)


def adapter(model: nn.Module, targets: str | None = None) -> shira.Adapter:
    """An adapter that changes the outputs a lot."""
    with shira.SparseTuner(model, shira.masks.Rand(density=0.25, granule=1, seed=1), targets=targets) as tuner:
        with torch.no_grad():
            for values in tuner.parameters():
                values.add_(1)
        return tuner.adapter()


class Switched:
    """A model with an adapter, and what it computes without and with it."""

    def __init__(self, model: nn.Module, x: Tensor = X) -> None:
        self.model, self.x = model, x
        self.switcher = shira.Switcher(model)
        self.switcher.add("a", adapter(model, r"^\d$"))
        self.base = self.now()
        with self.switcher.using("a"):
            self.adapted = self.now()
        assert (self.adapted - self.base).abs().max() > 0.5

    def now(self) -> Tensor:
        with torch.no_grad():
            return self.model(self.x)


def same(given: Tensor, wanted: Tensor) -> bool:
    """Up to the order of sums, which a compiler may choose; what an adapter moves is ten thousand times as much."""
    return torch.allclose(given, wanted, atol=1e-5)


def run_from_the_page(test: str, **names: Any) -> dict[str, Any]:
    """Run the block of the page that says that this test runs it, and give the names that it leaves."""
    page = (Path(__file__).parent.parent / "docs/stacks.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"^<!-- run by {test} -->\n```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    session = {"torch": torch, **names}
    exec(compile(block, "docs/stacks.md", "exec"), session)
    return session


# ---- Inductor --------------------------------------------------------------------------------------------------


def test_compiled_follows_a_switch_and_frozen_does_not(inductor: None) -> None:
    import torch._inductor.config as config

    tried = Switched(linear())
    with torch.no_grad():
        compiled = torch.compile(tried.model)
        assert same(compiled(X), tried.base)
        tried.switcher.activate("a")
        assert same(compiled(X), tried.adapted)
        tried.switcher.deactivate()
        assert same(compiled(X), tried.base)

        torch._dynamo.reset()
        with config.patch(freezing=True):
            frozen = torch.compile(tried.model)
            assert same(frozen(X), tried.base)
            tried.switcher.activate("a")
            assert same(frozen(X), tried.base)  # not seen: the weights are constants of the graph
            tried.switcher.add("style", adapter(linear(), r"^\d$"))
            name = "test_compiled_follows_a_switch_and_frozen_does_not"
            page = run_from_the_page(name, switcher=tried.switcher, compiled=frozen, x=X)
            assert same(page["output"], tried.adapted)  # compiled again, and so frozen with the adapter on
            tried.switcher.deactivate()
            assert same(frozen(X), tried.adapted)


def test_frozen_evaluation_follows_the_steps_of_a_tuner(inductor: None) -> None:
    import torch._inductor.config as config

    model = linear()
    with shira.SparseTuner(model, shira.masks.Rand(density=0.25, granule=1)) as tuner, config.patch(freezing=True):
        optimizer = shira.SGD(tuner, lr=0.1)
        compiled = torch.compile(model)

        def evaluated() -> Tensor:
            with torch.no_grad():
                return compiled(X)

        before = evaluated()
        compiled(X).square().sum().backward()  # with gradients nothing is frozen: it trains
        optimizer.step()
        with torch.no_grad():
            after = model(X)
        assert not same(after, before)
        assert same(evaluated(), after)


AT = torch.arange(0, 16, 2, dtype=torch.int32)


def between(weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    torch.ops.shira.scatter_(weight, AT, first)
    kept = weight.clone()
    torch.ops.shira.scatter_(weight, AT, second)
    return kept


def between_with_a_sum(weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    torch.ops.shira.scatter_(weight, AT, first)
    kept = weight + 0
    torch.ops.shira.scatter_(weight, AT, second)
    return kept


def test_inductor_drops_a_clone_between_two_calls_in_place(inductor: None) -> None:
    """pytorch/pytorch#198031. Once this fails, the page and this test can go."""
    first, second = torch.full((8,), 1.0), torch.full((8,), 2.0)
    for function, kept in ((between, second), (between_with_a_sum, first)):
        assert torch.equal(function(torch.zeros(16), first, second)[::2], first)
        weight = torch.zeros(16)
        given = torch.compile(function, fullgraph=True)(weight, first, second)
        assert torch.equal(given[::2], kept)
        assert torch.equal(weight[::2], second)  # the weight itself is always right
        torch._dynamo.reset()
    given = torch.compile(between, fullgraph=True, backend="aot_eager")(torch.zeros(16), first, second)
    assert torch.equal(given[::2], first)  # so it is Inductor's


# ---- exported ----------------------------------------------------------------------------------------------------


def test_aot_inductor_follows_with_constants_that_the_user_manages(
    inductor: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = Switched(linear())
    exported = torch.export.export(tried.model, (X,))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    runner = torch._inductor.aoti_load_package(package)
    weights = dict(tried.model.named_parameters())

    tried.switcher.activate("a")
    assert same(exported.module()(X), tried.adapted)  # an exported program holds the parameters themselves
    assert same(runner(X), tried.base)  # a package holds copies
    runner.load_constants(weights, check_full_update=True)
    assert same(runner(X), tried.adapted)
    tried.switcher.deactivate()
    assert same(runner(X), tried.adapted)  # copies again: to be loaded after every switch

    monkeypatch.chdir(tmp_path)
    tried.switcher.add("style", adapter(tried.model, r"^\d$"))
    name = "test_aot_inductor_follows_with_constants_that_the_user_manages"
    runner = run_from_the_page(name, switcher=tried.switcher, model=tried.model, x=X)["runner"]
    assert same(runner(X), tried.adapted)
    tried.switcher.deactivate()
    for _ in range(2):
        assert same(runner(X), tried.base)
        tried.switcher.activate("a")
        assert same(runner(X), tried.adapted)
        tried.switcher.deactivate()


def test_torchscript_follows_where_nothing_is_folded() -> None:
    tried = Switched(linear())
    traced, scripted = torch.jit.trace(tried.model, X), torch.jit.script(tried.model)
    frozen = torch.jit.freeze(torch.jit.script(tried.model))
    with tried.switcher.using("a"):
        for module in (traced, scripted, frozen):
            assert torch.equal(module(X), tried.adapted)
    for module in (traced, scripted, frozen):
        assert torch.equal(module(X), tried.base)


def test_torchscript_frozen_folds_some_weights_and_then_follows_by_half() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 4)
    tried = Switched(nn.Sequential(*layers).eval().requires_grad_(False), torch.rand(2, 3, 2, 2))
    traced = torch.jit.trace(tried.model, tried.x)
    frozen, optimized = torch.jit.freeze(traced), torch.jit.optimize_for_inference(traced)
    for module in (frozen, optimized):
        assert same(module(tried.x), tried.base)
    tried.switcher.activate("a")
    assert torch.equal(traced(tried.x), tried.adapted)
    for module in (frozen, optimized):
        # The convolution is folded with the normalisation, the linear layer after it may not be.
        assert not same(module(tried.x), tried.adapted)
    with_it = torch.jit.freeze(torch.jit.trace(tried.model, tried.x))
    assert same(with_it(tried.x), tried.adapted)


# ---- torch.func --------------------------------------------------------------------------------------------------


def test_functional_call_reads_what_it_is_given() -> None:
    tried = Switched(linear())
    live = dict(tried.model.named_parameters())
    copies = {name: weight.clone() for name, weight in live.items()}
    with tried.switcher.using("a"):
        assert torch.equal(torch.func.functional_call(tried.model, live, (X,)), tried.adapted)
        assert torch.equal(torch.func.functional_call(tried.model, copies, (X,)), tried.base)


def test_func_transforms_follow_a_switch() -> None:
    tried = Switched(linear())
    with tried.switcher.using("a"):
        assert same(torch.func.vmap(tried.model)(X), tried.adapted)
        given = torch.func.grad(lambda x: tried.model(x).sum())(X)
        x = X.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(tried.model(x).sum(), x)
        assert torch.equal(given, wanted)


def test_vmap_over_adapters_takes_dense_copies() -> None:
    tried = Switched(linear())
    variants = []
    for names in ([], ["a"]):
        if names:
            tried.switcher.activate(dict.fromkeys(names, 1.0))
        variants.append({name: weight.clone() for name, weight in tried.model.named_parameters()})
    tried.switcher.deactivate()
    stacked = {name: torch.stack([variant[name] for variant in variants]) for name in variants[0]}
    both = torch.func.vmap(lambda weights: torch.func.functional_call(tried.model, weights, (X,)))(stacked)
    assert same(both[0], tried.base)
    assert same(both[1], tried.adapted)


@pytest.mark.parametrize("gradient", ["sampled", "dense"])
def test_func_transforms_over_a_tuned_model_are_refused(gradient: str) -> None:
    model = linear()
    with shira.SparseTuner(model, shira.masks.Rand(density=0.25, granule=1), gradient=gradient):
        for call in (
            lambda: torch.func.grad(lambda x: model(x).sum())(X),
            lambda: torch.func.vmap(model)(X),
            lambda: torch.func.jvp(model, (X,), (X,)),
        ):
            with pytest.raises(RuntimeError, match=r"torch\.func cannot follow; use torch\.autograd"):
                call()


def test_functional_call_with_values_trains_them_and_leaves_the_model() -> None:
    """As in MAML and hypernetworks: values from elsewhere for one call, with gradients to where they came from."""
    model = linear()
    base = model(X)
    with shira.SparseTuner(model, shira.masks.Rand(density=0.25, granule=1)) as tuner:
        shift = torch.tensor(1.0, requires_grad=True)
        moved = {name: values.detach() + shift for name, values in tuner.named_parameters()}
        given = torch.func.functional_call(model, moved, (X,))
        given.sum().backward()
        shifted = given.detach()
        gradient = shift.grad
        assert torch.equal(model(X), base)  # the tuner's own values again

        # The same by hand: the values themselves moved, and their gradients summed.
        with torch.no_grad():
            for values in tuner.parameters():
                values.add_(1)
        wanted = model(X)
        assert torch.equal(shifted, wanted)
        wanted.sum().backward()
        assert torch.allclose(gradient, sum(values.grad.sum() for values in tuner.parameters()))


# ---- averages of weights -----------------------------------------------------------------------------------------


def steps(model: nn.Module, tuner: shira.SparseTuner, count: int) -> Iterator[None]:
    optimizer = shira.SGD(tuner, lr=0.05)
    for _ in range(count):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def test_an_average_of_the_values_alone() -> None:
    """The cheap way: as many numbers as train. Evaluated, saved, and training goes on with the same bits."""
    model = linear()
    with shira.SparseTuner(model, shira.masks.Rand(density=0.25, granule=1)) as tuner:
        average = [values.detach().clone() for values in tuner.parameters()]
        for _ in steps(model, tuner, 3):
            torch._foreach_lerp_(average, [values.detach() for values in tuner.parameters()], 0.5)
        trained, kept = model(X).detach(), [values.detach().clone() for values in tuner.parameters()]
        with torch.no_grad():
            for values, one in zip(tuner.parameters(), average, strict=True):
                values.copy_(one)
        averaged = model(X).detach()
        assert not same(averaged, trained)
        saved = tuner.adapter()
        with torch.no_grad():
            for values, one in zip(tuner.parameters(), kept, strict=True):
                values.copy_(one)
        assert torch.equal(model(X), trained)

    switcher = shira.Switcher(model)
    switcher.add("averaged", saved)
    with switcher.using("averaged"):
        assert torch.equal(model(X), averaged)


def test_averaged_model_of_a_tuned_model() -> None:
    """torch's AveragedModel copies all of it: right, and dense in memory."""
    model = linear()
    with shira.SparseTuner(model, shira.masks.Rand(density=0.25, granule=1)) as tuner:
        averaged = torch.optim.swa_utils.AveragedModel(model)
        by_hand = []
        for _ in steps(model, tuner, 3):
            averaged.update_parameters(model)
            by_hand.append([values.detach().clone() for values in tuner.parameters()])
        wanted = [torch.stack(column).mean(0) for column in zip(*by_hand, strict=True)]
        with torch.no_grad():
            given = averaged(X)
            for values, one in zip(tuner.parameters(), wanted, strict=True):
                values.copy_(one)
            assert torch.allclose(given, model(X), atol=1e-6)


def test_a_copy_that_follows_as_in_gans_and_self_distillation() -> None:
    model = linear()
    with shira.SparseTuner(model, shira.masks.Rand(density=0.25, granule=1)) as tuner:
        teacher = copy.deepcopy(model)
        start = teacher[0].weight_shira_values.detach().clone()
        for _ in steps(model, tuner, 1):
            with torch.no_grad():
                for mine, theirs in zip(teacher.parameters(), model.parameters(), strict=True):
                    mine.lerp_(theirs, 0.5)
                teacher(X)
        half = torch.lerp(start, model[0].weight_shira_values.detach(), 0.5)
        indices = teacher[0].weight_shira_indices
        assert torch.equal(shira_ops.gather(teacher[0].weight, indices), half)
    assert torch.equal(shira_ops.gather(teacher[0].weight, indices), half)  # the model is the base, the copy stays


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_and_an_export_keep_the_selection_of_an_overlay() -> None:
    model = linear()
    overlay = shira.Overlay(model)
    overlay.add("a", adapter(model, r"^\d$"))
    base = model(X)
    with overlay.using(["a", None, "a"]):
        wanted = model(X)
        # Without a check of the trace, which runs it again.
        kept = [torch.jit.trace(model, X, check_trace=False), torch.export.export(model, (X,)).module()]
    assert same(wanted[1], base[1])
    assert (wanted[0] - base[0]).abs().max() > 0.5
    for one in kept:
        assert same(one(X), wanted)
    assert torch.equal(model(X), base)


# ---- LoRA that is merged ----------------------------------------------------------------------------------------


def test_lora_that_is_merged_under_an_adapter_is_found_by_verify_alone() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0", "1"], init_lora_weights=False)
    model = linear()
    base, switched = model[0].weight.clone(), Switched(model)
    switched.switcher.activate("a")
    tuned = peft.get_peft_model(model, config)
    tuned.merge_adapter()
    with pytest.raises(
        shira.SwitchError, match=r"2 weight\(s\) do not hold the base plus what is active: 0.weight, 1.weight"
    ):
        switched.switcher.verify(full=True)
    switched.switcher.deactivate()  # unseen, and the merged LoRA is gone from the adapter's entries alone
    here = switched.switcher.adapters["a"].weights["0.weight"].indices
    merged = model[0].base_layer.weight.flatten() != base.flatten()
    assert not merged[here.long()].any()
    assert merged.sum() > base.numel() // 2

    # An Overlay writes to no weight, so what is merged stays and its adapters are added.
    model = linear()
    with shira.Overlay(model) as overlay, torch.no_grad():
        overlay.add("a", adapter(model, r"^\d$"))
        tuned = peft.get_peft_model(model, config)
        with overlay.using("a"):
            wanted = tuned(X)
            tuned.merge_adapter()
            assert same(tuned(X), wanted)
