"""Nothing that happens around a tuner makes it train nothing, or something else, without a word."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shira
from shira import SGD, AdamW, Adapter, AdapterError, Entry, SparseTuner, Switcher, masks
from tuning import VALUES, bits, check_gradients, dense_gradients, randomize, same_bits

GRADIENTS = pytest.mark.parametrize("gradient", ["sampled", "dense"])
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))


def net() -> nn.Sequential:
    model = randomize(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))
    assert isinstance(model, nn.Sequential)
    return model


def tune(model: nn.Module, gradient: str = "sampled", **options: Any) -> SparseTuner:
    return SparseTuner(model, masks.Rand(density=0.3, seed=1), gradient=gradient, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


# Parameters that the tuner no longer knows


@GRADIENTS
def test_a_model_that_was_frozen_is_refused_in_training_alone(gradient: str) -> None:
    model = net()
    tuner = tune(model, gradient)
    optimizer = torch.optim.SGD([*tuner.parameters()], lr=0.1)
    model.requires_grad_(False)
    says = r"all values \(0\.weight_shira_values and the rest\) are frozen .*get_peft_model"
    with pytest.raises(RuntimeError, match=says):
        model(X)
    with torch.no_grad():
        model(X)
    model.eval()
    model(X)
    with pytest.raises(RuntimeError, match=says):
        optimizer.step()
    with tuner.disabled():
        model.train()(X)
    # Some may be frozen on purpose.
    model.train()
    for values in list(tuner.parameters())[1:]:
        values.requires_grad_(True)
    if gradient == "dense":
        model[2].weight.requires_grad_(True)
    train(model, optimizer)


@pytest.mark.parametrize("which", ["weight_shira_values", "weight"])
@GRADIENTS
def test_a_parameter_that_was_replaced_is_refused(which: str, gradient: str) -> None:
    model = net()
    tuner = tune(model, gradient)
    optimizer = AdamW(tuner, lr=0.1)
    old = getattr(model[2], which)
    setattr(model[2], which, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
    with pytest.raises(RuntimeError, match=rf"2\.{which} was replaced by another parameter .*fully_shard"):
        model(X)
    with pytest.raises(RuntimeError, match=rf"2\.{which} was replaced by another parameter"):
        optimizer.step()


def test_parameters_of_a_functional_call_are_no_replacement() -> None:
    model = net()
    with tune(model) as tuner:
        others = {name: nn.Parameter(p.detach() + 1) for name, p in tuner.named_parameters()}
        torch.func.functional_call(model, others, (X,)).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in others.values())
        train(model, AdamW(tuner))


def test_a_conversion_that_replaces_parameters_is_refused() -> None:
    model = net()
    tune(model)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model._apply(lambda t: t.clone())
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    with pytest.raises(RuntimeError, match=r"0\.weight was replaced .*set_overwrite_module_params_on_conversion"):
        model(X)


def test_a_conversion_that_swaps_parameters_is_refused_by_torch() -> None:
    model = net()
    before = bits(model)
    with tune(model):
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            with pytest.raises(RuntimeError, match=r"Couldn't swap Linear\.weight"):
                model.half()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
    assert same_bits(model, before)


def test_a_module_that_was_replaced_is_refused() -> None:
    model = net()
    tuner = tune(model)
    optimizer = AdamW(tuner)
    train(model, optimizer)
    model[2] = nn.Linear(16, 4)
    model(X).square().sum().backward()
    with pytest.raises(RuntimeError, match=r"the module of 2\.weight is no longer a part of the model"):
        optimizer.step()


def test_a_weight_that_was_tied_under_a_tuner_is_refused() -> None:
    """What the layer that joined adds to its gradient, nothing samples; a dense gradient has it all."""
    for gradient in ("sampled", "dense"):
        model = randomize(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)))
        tuner = SparseTuner(model, masks.Rand(density=0.25), targets="0", gradient=gradient)
        model[2].weight = model[0].weight
        model(X).square().sum().backward()
        optimizer = AdamW(tuner)
        if gradient == "dense":
            optimizer.step()
            continue
        with pytest.raises(RuntimeError, match=r"2\.weight and 0\.weight were tied after the tuner was attached"):
            optimizer.step()


@pytest.mark.parametrize("gradient", ["sampled", "dense"])
@pytest.mark.parametrize("part", [False, True])
def test_a_model_that_was_sharded(gradient: str, part: bool) -> None:
    """A tuner goes on with it if all of it was; an optimizer of what was there before is refused."""
    model = net()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    tuner = tune(model, gradient)
    optimizer = AdamW(tuner, lr=0.1)
    train(model, optimizer)
    output = model(X).detach()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(model[0] if part else model, mesh=mesh)
        if part:
            for call in (lambda: model(X), tuner.adapter):
                with pytest.raises(RuntimeError, match=r"0\.weight was replaced by another parameter .*fully_shard"):
                    call()
            with pytest.raises(RuntimeError, match=r"the base cannot be put back, since 0\.weight (was|is) sharded"):
                tuner.detach()
            return
        now = model(X)
        assert torch.equal(now, output)
        now.square().sum().backward()
        with pytest.raises(RuntimeError, match=r"was replaced by another parameter .* made from tuner\.parameters"):
            optimizer.step()
        AdamW(tuner, lr=0.1).step()
        assert not torch.equal(model(X), output)
        tuner.detach()
        bases: list[Any] = list(model.parameters())
        assert all(torch.equal(one.full_tensor(), base) for one, base in zip(bases, before, strict=True))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_module_that_was_converted_is_refused() -> None:
    model = net()
    tune(model)
    converted = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(RuntimeError, match=r"the module of 0\.weight was converted .*shira\.detach\(model\)"):
        converted(X)


# Tied weights


class Tied(nn.Module):
    """The head is read without its layer, as fused losses do."""

    def __init__(self, direct: bool) -> None:
        super().__init__()
        self.embed, self.head, self.direct = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False), direct
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).tanh()
        y: Tensor = F.linear(x, self.head.weight) if self.direct else self.head(x)
        return y


IDS = torch.arange(6)


def test_a_use_of_a_tied_weight_without_its_layer_is_refused() -> None:
    model = randomize(Tied(direct=True)).double()

    def loss(module: nn.Module) -> Tensor:
        y: Tensor = module(IDS).square().sum()
        return y

    says = r'embed\.weight, head\.weight are one tied weight, and no forward ran the layer of head\.weight.*"dense"'
    tuner = tune(model, targets="embed")
    loss(model).backward()
    for make in (AdamW, lambda t: torch.optim.SGD(t.parameters(), lr=0.1)):
        with pytest.raises(RuntimeError, match=says):
            make(tuner).step()
    tuner.detach()
    tuner = tune(model, targets="embed", allow_unused=True)
    loss(model).backward()
    AdamW(tuner).step()
    tuner.detach()
    wanted = dense_gradients(model, loss)
    with tune(model, "dense", targets="embed") as tuner:
        loss(model).backward()
        check_gradients(tuner, wanted)
        AdamW(tuner).step()
    model.direct = False
    with tune(model, targets="embed") as tuner:
        loss(model).backward()
        check_gradients(tuner, wanted)
        AdamW(tuner).step()


def test_a_compiled_model_knows_its_places_as_well() -> None:
    for direct in (True, False):
        torch._dynamo.reset()
        model = Tied(direct)
        tuner = tune(model, targets="embed")
        torch.compile(model, backend="eager", fullgraph=True)(IDS).sum().backward()
        if direct:
            with pytest.raises(RuntimeError, match=r"no forward ran the layer of head\.weight"):
                AdamW(tuner).step()
        else:
            AdamW(tuner).step()


def test_an_untied_weight_without_its_layer_is_told_of_dense_gradients() -> None:
    model = Tied(direct=True)
    model.head = nn.Linear(8, 12, bias=False)
    tuner = tune(model, targets="embed|head")
    model(IDS).sum().backward()
    with pytest.raises(RuntimeError, match=r'no gradient reached head\.weight.* F\.linear.* needs gradient="dense"'):
        AdamW(tuner).step()


# Adapters that are on


def test_a_model_with_an_active_adapter_is_refused() -> None:
    model = net()
    with tune(model) as tuner:
        train(model, SGD(tuner, lr=0.1))
        adapter = tuner.adapter()
    switcher = Switcher(model)
    switcher.add("a", adapter)
    switcher.activate("a")
    on = bits(model)
    with pytest.raises(RuntimeError, match=r"0\.weight has an active adapter of a Switcher.* switcher\.deactivate\(\)"):
        tune(model)
    assert same_bits(model, on)
    switcher.deactivate()
    with tune(model), pytest.raises(shira.SwitchError, match="is being tuned by a SparseTuner"):
        switcher.activate("a")
    switcher.activate("a")
    for move in (lambda p: p.share_memory_(), lambda p: setattr(p, "data", p.data.clone())):
        for parameter in model.parameters():
            move(parameter)
        with pytest.raises(RuntimeError, match=r"0\.weight has an active adapter of a Switcher"):
            tune(model)
        switcher.rebind()
    del switcher
    with pytest.raises(RuntimeError, match=r"a Switcher that no longer exists"):
        tune(model)


def test_an_adapter_that_comes_on_beside_a_tuner_is_refused_at_the_step() -> None:
    """Another weight's, and a buffer's: what trains would fit no base that anybody has."""
    model = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)).eval()
    base = bits(model)
    switcher = Switcher(model)
    for name, tensor in {"2.weight": model[2].weight, "1.running_mean": model[1].running_mean}.items():
        entry = Entry(torch.tensor([0], dtype=torch.int32), torch.tensor([5.0]), tuple(tensor.shape), tensor.dtype)
        switcher.add(name, Adapter({name: entry}))
        with tune(model, targets="^0$") as tuner:
            switcher.activate(name)
            model(torch.ones(4, 32)).square().sum().backward()
            on, values = bits(model), [one.clone() for one in tuner.parameters()]
            for kind in (AdamW, torch.optim.SGD):
                with pytest.raises(RuntimeError, match=rf"{name} has an active adapter of a Switcher"):
                    kind(tuner.parameters(), lr=0.1).step()
            assert same_bits(model, on)
            assert all(torch.equal(one, was) for one, was in zip(tuner.parameters(), values, strict=True))
            switcher.deactivate()
            AdamW(tuner, lr=0.1).step()
            assert not same_bits(model, on)
        assert same_bits(model, base)
        switcher.activate(name)
        with pytest.raises(RuntimeError, match=rf"{name} has an active adapter of a Switcher"):
            tune(model, targets="^0$")
        switcher.deactivate()
    assert same_bits(model, base)


def test_going_on_takes_what_add_takes() -> None:
    """Names that are others, values that are not finite; and refuses what the constructor refuses."""
    model = net()
    with tune(model, targets="^0$") as tuner:
        train(model, AdamW(tuner, lr=0.1))
        adapter, on = tuner.adapter(), bits(model)
    wrapped = Adapter({"m.0.weight": adapter.weights["0.weight"]})
    with pytest.raises(AdapterError, match=r"the adapter does not fit the model: .* with rename=\{'\^m\\\\.': ''\}"):
        SparseTuner.from_adapter(model, wrapped)
    with SparseTuner.from_adapter(model, wrapped, rename={r"^m\.": ""}) as tuner:
        assert same_bits(model, on)
        assert list(tuner.adapter().weights) == ["0.weight"]
    entry = adapter.weights["0.weight"]
    broken = Adapter({"0.weight": replace(entry, values=torch.full_like(entry.values, torch.nan))})
    with pytest.raises(
        AdapterError, match=r"values are not finite .* check_finite=False \(--allow-nonfinite\) lets them"
    ):
        SparseTuner.from_adapter(model, broken)
    with SparseTuner.from_adapter(model, broken, check_finite=False):
        assert int(model[0].weight.isnan().sum()) == entry.nnz
    fused = nn.ModuleDict({"qkv": nn.Linear(8, 24), "q": nn.Linear(8, 8)})
    fused["q"].weight = nn.Parameter(fused["qkv"].weight.detach()[8:16])
    one = Entry(torch.tensor([0], dtype=torch.int32), torch.tensor([5.0]), (24, 8), torch.float32)
    with pytest.raises(ValueError, match=r"qkv\.weight and q\.weight are different weights in overlapping memory"):
        SparseTuner.from_adapter(fused, Adapter({"qkv.weight": one}))


# Back to the base


@GRADIENTS
def test_a_tuner_that_nobody_holds_is_detached(gradient: str) -> None:
    model = net()
    before, required = bits(model), [p.requires_grad for p in model.parameters()]
    train(model, AdamW([*tune(model, gradient).parameters()], lr=0.1))
    SparseTuner(model, masks.Rand(density=0.5), targets=[], whole="bias")
    assert not same_bits(model, before)
    with pytest.raises(
        ValueError, match=r"already trained by a tuner; detach that one first \(shira\.detach\(model\)\)"
    ):
        tune(model)
    shira.detach(model)
    assert same_bits(model, before)
    assert [p.requires_grad for p in model.parameters()] == required
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._load_state_dict_post_hooks
        assert not [name for name in module.__dict__ if "shira" in name or "ddp" in name]
    shira.detach(model)
    tune(model).detach()


def test_a_model_is_freed_with_its_last_reference() -> None:
    """Also with a tuner on it that nobody holds: memory of a GPU does not wait for Python's collector."""
    gc.collect()
    gc.disable()
    try:
        model = net()
        tuner = tune(model, "dense")
        train(model, AdamW(tuner, lr=0.1))
        gone = weakref.ref(model)
        del tuner
        assert gone() is not None
        del model
        assert gone() is None
    finally:
        gc.enable()


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@GRADIENTS
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copied_model_gives_its_base_back(gradient: str, copied: Any) -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    required = [p.requires_grad for p in model.parameters()]
    before = bits(model)
    tuner = tune(model, gradient)
    train(model, AdamW(tuner, lr=0.1))
    trained, keys = bits(model), model.state_dict().keys()
    other = copied(model)
    assert same_bits(other, trained)
    assert other.state_dict().keys() == keys
    with torch.no_grad():
        assert torch.equal(other(X), model(X))
    shira.detach(other)
    assert same_bits(other, before)
    assert [p.requires_grad for p in other.parameters()] == required
    for module in other.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._load_state_dict_post_hooks
        assert not [name for name in module.__dict__ if "shira" in name or "ddp" in name]
    assert same_bits(model, trained)
    train(model, AdamW(tuner, lr=0.1))
    assert not same_bits(model, trained)
    with tune(other) as again:
        train(other, AdamW(again))
    assert same_bits(other, before)
    tuner.detach()
    assert same_bits(model, before)


def test_a_copied_part_of_a_model_brings_nothing_else_along() -> None:
    model = nn.Sequential(net(), net())
    before = bits(model[1])
    tuner = tune(model)
    train_inside = AdamW(tuner, lr=0.1)
    model[1](model[0](X).repeat(1, 2)).sum().backward()
    train_inside.step()
    part = copy.deepcopy(model[1])
    assert len(pickled_bytes(model[1])) < 1.2 * len(pickled_bytes(model)) / 2
    shira.detach(part)
    assert same_bits(part, before)
    with pytest.raises(RuntimeError, match=r"shira\.detach: a tuner is on the Sequential that has this module"):
        shira.detach(model[1])
    tuner.detach()
    assert same_bits(model[1], before)


def pickled_bytes(model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.getvalue()


# Steps inside backward


@GRADIENTS
def test_stepping_inside_backward_is_stepping_after_it(gradient: str) -> None:
    results = []
    for inside in (True, False):
        model = net()
        with tune(model, gradient) as tuner:
            optimizers = {p: torch.optim.Adam([p], lr=0.1) for p in tuner.parameters()}

            def step(p: Tensor, optimizers: Any = optimizers) -> None:
                optimizers[p].step()
                optimizers[p].zero_grad()

            if inside:
                for p in tuner.parameters():
                    p.register_post_accumulate_grad_hook(step)
            for _ in range(3):
                model(X).square().sum().backward()
                if not inside:
                    for p in tuner.parameters():
                        step(p)
                assert all(p.grad is None for p in model.parameters())
            for name, p in tuner.named_parameters():
                indices = model.get_buffer(name.replace("values", "indices")).long()
                weight = model.get_parameter(name.removesuffix(VALUES)).view(-1)
                assert torch.equal(weight[indices].detach(), p.detach())
            results.append(bits(model))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_what_steps_inside_backward_did_not_reach_is_refused_with_the_next_forward() -> None:
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    tuner = tune(model)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for p in tuner.parameters():
        p.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    model[0](X).sum().backward()
    with pytest.raises(RuntimeError, match=r"no gradient reached 1\.weight"):
        model[0](X)


def test_our_optimizers_say_that_they_cannot_step_inside_backward() -> None:
    model = net()
    with tune(model) as tuner:
        optimizer = AdamW(tuner)
        next(tuner.parameters()).register_post_accumulate_grad_hook(lambda p: optimizer.step())
        before = bits(model)
        with pytest.raises(RuntimeError, match=r"shira\.AdamW writes the weights, which .* use one of torch\.optim"):
            model(X).sum().backward()
        assert same_bits(model, before)


# ---- optimizers that were made before --------------------------------------------------------------------------

BEFORE = r"has parameters that the tuner froze .* make the optimizer after the tuner, over tuner\.parameters\(\)$"


@GRADIENTS
@pytest.mark.parametrize("kind", [torch.optim.SGD, SGD])
def test_an_optimizer_made_before_the_tuner_is_refused(gradient: str, kind: type[torch.optim.Optimizer]) -> None:
    model = net()
    unfinished = kind.__new__(kind)  # as one is whose constructor fails
    early, biases = (kind(held, lr=0.1) for held in (model.parameters(), [model[0].bias]))
    tuner = tune(model, gradient)
    before = bits(model)
    early.step()  # no gradients yet: nothing is missed
    for optimizer in (early, biases):
        model(X).square().sum().backward()
        with pytest.raises(RuntimeError, match=BEFORE):
            optimizer.step()
        for values in tuner.parameters():
            values.grad = None

    def closure() -> Tensor:
        loss: Tensor = model(X).square().sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=BEFORE):
        early.step(closure)
    assert same_bits(model, before)
    assert not hasattr(unfinished, "param_groups")
    late = kind(tuner.parameters(), lr=0.1)
    late.step()
    early.step()  # harmless beside one that trains
    assert not same_bits(model, before)
    tuner.detach()
    train(model, early)


def test_optimizers_of_other_things_may_be_of_any_age() -> None:
    """A GAN's two optimizers, a head of its own, matrices and vectors apart, frozen weights that nobody trains."""
    generator, critic, head = net(), nn.Linear(4, 1), nn.Linear(4, 4)
    of_critic, of_head = torch.optim.SGD(critic.parameters(), lr=0.1), torch.optim.SGD(head.parameters(), lr=0.1)
    idle = torch.optim.SGD(nn.Linear(2, 2).requires_grad_(False).parameters(), lr=0.1)
    model = nn.ModuleList([generator, head])
    tuner = tune(model, targets=r"^0\.")
    head.requires_grad_(True)
    matrices = torch.optim.SGD([p for p in model.parameters() if p.dim() == 2], lr=0.1)
    vectors = torch.optim.SGD([p for p in model.parameters() if p.dim() == 1], lr=0.1)
    before = [bits(one) for one in (generator, critic, head)]
    critic(head(generator(X))).square().sum().backward()
    for optimizer in (of_critic, of_head, idle, matrices, vectors):
        optimizer.step()
    assert not any(same_bits(one, was) for one, was in zip((generator, critic, head), before, strict=True))
    tuner.detach()


# ---- constructors that fail ------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", ["look_outside", "_loaded", "mark_written", "ignore", "follow", "watch_optimizers"])
@GRADIENTS
def test_a_constructor_that_fails_has_changed_nothing(
    late: str, gradient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    model[2].bias.requires_grad_(False)
    state = [(dict(m.__dict__), [p.requires_grad for p in m._parameters.values()]) for m in model.modules()]
    hooks = [[dict(found) for name, found in vars(m).items() if name.endswith("_hooks")] for m in model.modules()]
    before = bits(model)
    home = {"ignore": "shira.train._ranks", "follow": "shira.train.tuner", "watch_optimizers": "shira.train._hooks"}
    calls = 0

    def fail(*args: object, **options: object) -> None:
        nonlocal calls
        calls += 1
        if calls == (2 if late in ("look_outside", "mark_written") else 1):
            raise MemoryError("as it happens")

    with monkeypatch.context() as patch:
        if late == "_loaded":
            patch.setattr(nn.Linear, "register_load_state_dict_post_hook", fail)
        elif late == "follow":
            patch.setattr(nn.Sequential, "register_forward_hook", fail)
        else:
            patch.setattr(f"{home.get(late, 'shira.train._sites')}.{late}", fail)
        with pytest.raises(MemoryError, match="as it happens"):
            tune(model, gradient)
    assert same_bits(model, before)
    assert [(dict(m.__dict__), [p.requires_grad for p in m._parameters.values()]) for m in model.modules()] == state
    found = [[dict(found) for name, found in vars(m).items() if name.endswith("_hooks")] for m in model.modules()]
    assert found == hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    with tune(model, gradient) as tuner:
        train(model, SGD(tuner, lr=0.1))
        tuner.verify()
    assert same_bits(model, before)


# ---- TorchScript -----------------------------------------------------------------------------------------------

SCRIPT = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@SCRIPT
@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, X)])
def test_torchscript_is_refused_and_stays_as_it_is(make: Any) -> None:
    script = make(net())
    with pytest.raises(TypeError, match=r"made by torch\.jit\.script or torch\.jit\.trace.* it was made from"):
        tune(script)
    assert all(p.requires_grad for p in script.parameters())
    # As a part of a model it is left alone, and freed again.
    model = nn.ModuleDict({"plain": nn.Linear(8, 8), "script": script})
    with pytest.raises(ValueError, match=r"script\.0\.weight is in a module made by torch\.jit\.script"):
        tune(model, targets="weight")
    assert all(p.requires_grad for p in model.parameters())
    with tune(model, targets=["plain"]):
        assert not any(p.requires_grad for p in script.parameters())
    assert all(p.requires_grad for p in model.parameters())


@SCRIPT
def test_a_trace_of_a_model_with_a_tuner_computes_or_is_refused() -> None:
    model = net()
    with tune(model) as tuner:
        with pytest.raises(RuntimeError, match=r"trace the model under torch\.no_grad\(\)"):
            torch.jit.trace(model, X)
        with torch.no_grad():
            traced = torch.jit.trace(model, X)
        train(model, SGD(tuner, lr=0.1))
        assert torch.equal(traced(X), model(X))


# ---- pipelines, and weights that others share ------------------------------------------------------------------


class Pipeline:
    def __init__(self) -> None:
        self.name, self.vae, self.unet = "pipeline", nn.Linear(2, 2), net()


def test_a_pipeline_is_told_to_give_its_module() -> None:
    says = r"^model must be a torch\.nn\.Module, got Pipeline; give its module, such as pipeline\.unet$"
    for use in (tune, Switcher, shira.detach):
        with pytest.raises(TypeError, match=says):
            use(Pipeline())
    with pytest.raises(TypeError, match=r"got dict$"):
        Switcher({})  # type: ignore[arg-type]


class Shared(nn.Module):
    """As models like T5: ``shared`` holds the weight, and two embeddings look it up."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.encoder, self.decoder = (nn.Embedding(12, 8) for _ in range(3))
        self.encoder.weight = self.decoder.weight = self.shared.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.encoder(ids) * self.decoder(ids + 1)
        return y


def test_an_embedding_that_only_holds_the_weight_is_not_missed() -> None:
    model = randomize(Shared()).double()

    def loss(module: nn.Module) -> Tensor:
        y: Tensor = module(IDS).square().sum()
        return y

    wanted = dense_gradients(model, loss)
    with tune(model, targets=["shared"]) as tuner:
        loss(model).backward()
        check_gradients(tuner, wanted)
        AdamW(tuner).step()
