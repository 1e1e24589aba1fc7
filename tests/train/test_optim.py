"""shira.AdamW and shira.SGD: citizens of torch.optim whose step writes the weights."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shira import SGD, AdamW, SparseTuner, masks
from shira.train import _sites
from tuning import bits, indices_of, same_bits

ADAMW: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.0},
    {"betas": (0.8, 0.99), "weight_decay": 0.3, "eps": 1e-6},
    {"maximize": True},
]
SGDS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.8, "dampening": 0.5},
    {"weight_decay": 0.2, "maximize": True},
]
EVERY = [(AdamW, torch.optim.AdamW, o) for o in ADAMW] + [(SGD, torch.optim.SGD, o) for o in SGDS]


def setup(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Sequential, SparseTuner]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    return model, SparseTuner(model, masks.Rand(density=0.2), **options)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, schedule: Any = None, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(count):
        x = torch.randn(4, 16, generator=generator).to(dtype)
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
        if schedule:
            schedule.step()


def values_of(tuner: SparseTuner) -> list[Tensor]:
    return [values.detach().clone() for values in tuner.parameters()]


def close(one: list[Tensor], two: list[Tensor], relative: float = 1e-6) -> None:
    """To a share of the largest entry: single entries near zero have lost their digits in both."""
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=relative * b.abs().max().item())


@pytest.mark.parametrize(("ours", "theirs", "options"), EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_values_as_torch(ours: Any, theirs: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    """100 steps on the same gradients."""
    generator = torch.Generator().manual_seed(2)
    _, tuner = setup(dtype)
    twins = [nn.Parameter(values.detach().clone()) for values in tuner.parameters()]
    one, two = ours(tuner, lr=1e-2, **options), theirs(twins, lr=1e-2, **options)
    for _ in range(100):
        for values, twin in zip(tuner.parameters(), twins, strict=True):
            twin.grad = torch.randn(values.shape, generator=generator, dtype=dtype) * 0.1 + twin.detach() * 0.01
            values.grad = twin.grad.clone()
        one.step()
        two.step()
    close(values_of(tuner), [twin.detach() for twin in twins], 1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize(("ours", "theirs", "options"), EVERY)
def test_training_is_that_of_torch(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    """With a schedule, on a model in bfloat16: the master keeps what the weight rounds."""
    results = []
    for kind in (ours, theirs):
        model, tuner = setup(torch.bfloat16)
        optimizer = kind(tuner if kind is ours else tuner.parameters(), lr=1e-2, **options)
        steps(model, optimizer, 20, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20))
        results.append(values_of(tuner))
        for name, values in tuner.named_parameters():
            weight = model.get_parameter(name.removesuffix("_shira_values")).detach().view(-1)
            assert torch.equal(weight[indices_of(model, name).long()], values.detach().bfloat16())
    close(*results, relative=1e-5)


@pytest.mark.parametrize(("kind", "options"), [(AdamW, {}), (SGD, {"momentum": 0.9, "dampening": 0.1})])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_state_dict_continues_bit_for_bit(kind: Any, options: dict[str, Any], where: str) -> None:
    model, tuner = setup()
    optimizer = kind(tuner, lr=1e-2, **options)
    steps(model, optimizer, 6)
    state: dict[str, Any] = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    if where == "file":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    steps(model, optimizer, 6, seed=2)
    other, other_tuner = setup()
    other.load_state_dict(state["model"])
    again = kind(other_tuner, lr=1e-3, **options)
    again.load_state_dict(state["optimizer"])
    steps(other, again, 6, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(values_of(tuner), values_of(other_tuner), strict=True))
    assert same_bits(other, bits(model))


@pytest.mark.parametrize(("ours", "theirs", "options"), EVERY)
def test_states_pass_between_torch_and_us(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    results = []
    for first, second in ((ours, theirs), (theirs, ours), (theirs, theirs)):
        model, tuner = setup()
        optimizer = first(tuner.parameters(), lr=1e-2, **options)
        steps(model, optimizer, 5)
        other = second(tuner.parameters(), lr=1e-2, **options)
        other.load_state_dict(optimizer.state_dict())
        steps(model, other, 5, seed=2)
        results.append(values_of(tuner))
    close(results[0], results[2])
    close(results[1], results[2])


@pytest.mark.parametrize(("kind", "options"), [(AdamW, {}), (SGD, {"momentum": 0.9})])
def test_a_rate_in_a_tensor(kind: Any, options: dict[str, Any]) -> None:
    """The bits of a number; a scheduler fills it in place, so a captured graph would see it."""
    results = []
    for rate in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
        model, tuner = setup(whole=r"2\.bias")
        optimizer = kind(tuner, lr=rate, **options)
        steps(model, optimizer, 5)
        for group in optimizer.param_groups:
            if isinstance(rate, Tensor):
                assert group["lr"] is rate
                rate.fill_(3e-3)
            else:
                group["lr"] = 3e-3
        steps(model, optimizer, 5, seed=2)
        results.append(values_of(tuner))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    model, tuner = setup()
    rate = torch.tensor(1e-2)
    optimizer = kind(tuner, lr=rate, **options)
    steps(model, optimizer, 4, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 4))
    assert rate == 0


@pytest.mark.parametrize(
    ("kind", "options"),
    [(AdamW, {"foreach": True}), (AdamW, {"fused": True}), (AdamW, {"capturable": True}), (SGD, {"fused": True}),
     (SGD, {"foreach": True})],
)  # fmt: skip
def test_how_torch_steps_is_accepted(kind: Any, options: dict[str, Any]) -> None:
    """For the values it is the same one call, bit for bit; the parameter beside them gets torch's step of that kind."""
    results = []
    for given in ({}, options):
        model, tuner = setup()
        model[0].bias.requires_grad_(True)
        optimizer = kind([*tuner.parameters(), model[0].bias], lr=1e-2, **given)
        before = model[0].bias.detach().clone()
        steps(model, optimizer, 5)
        assert not torch.equal(before, model[0].bias)
        results.append([*values_of(tuner), model[0].bias.detach()])
    if options == {"capturable": True}:
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    close(*results)


def test_steps_are_counted_in_float32() -> None:
    """Whatever torch's default dtype and device are: in bfloat16 the 257th step would be the 256th again."""
    model, tuner = setup()
    model[0].bias.requires_grad_(True)
    parameters = [*tuner.parameters(), model[0].bias]
    optimizer = AdamW(parameters)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            for _ in range(258):
                for p in parameters:
                    p.grad = torch.ones_like(p)
                optimizer.step()
        assert {state["step"].item() for state in optimizer.state.values()} == {258.0}
        assert {state["step"].dtype for state in optimizer.state.values()} == {torch.float32}
        # A state that torch's own optimizer counted in bfloat16.
        state = optimizer.state_dict()
        for one in state["state"].values():
            one["step"] = torch.tensor(256.0)
        optimizer.load_state_dict(state)
        optimizer.step()
        assert {state["step"].item() for state in optimizer.state.values()} == {257.0}
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_a_step_inside_autocast_is_seen_by_the_next_forward(kind: Any) -> None:
    """Autocast keeps the cast of a weight that requires grad, as the weight of a dense target does."""
    model, tuner = setup(gradient="dense")
    optimizer, x = kind(tuner, lr=0.1), torch.ones(2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).float().square().sum().backward()
        optimizer.step()
        inside = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(inside, model(x))


def test_one_optimizer_for_several_tuners() -> None:
    """Groups of their own, a schedule over both, and one of them detached on the way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    first, second = (SparseTuner(model, masks.Rand(density=0.2), name) for name in (r"^0$", r"^1$"))
    twins = [nn.Parameter(values.detach().clone()) for values in (*first.parameters(), *second.parameters())]
    groups = [{"params": list(first.parameters())}, {"params": list(second.parameters()), "lr": 1e-3}]
    one = AdamW(groups, lr=1e-2)
    two = torch.optim.AdamW([{"params": twins[:1]}, {"params": twins[1:], "lr": 1e-3}], lr=1e-2)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.01], total_steps=8) for o in (one, two)]
    for _ in range(8):
        model(torch.ones(2, 16)).square().sum().backward()
        for twin, values in zip(twins, (*first.parameters(), *second.parameters()), strict=True):
            twin.grad = values.grad.clone()
        for optimizer, schedule in zip((one, two), schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    close([*values_of(first), *values_of(second)], [twin.detach() for twin in twins])


def test_decay_towards_the_base() -> None:
    """Against the formulas, in double."""
    rate, decay = 1e-2, 0.3
    for kind, adam in ((AdamW, True), (SGD, False)):
        for sign in (1, -1):
            _, tuner = setup(torch.float64)
            optimizer = kind(tuner, lr=rate, weight_decay=decay, decay_towards="base", maximize=sign < 0)
            base = values_of(tuner)
            twins = [b.clone() for b in base]
            plain = torch.optim.AdamW(twins, lr=rate, weight_decay=0.0) if adam else torch.optim.SGD(twins, lr=rate)
            generator = torch.Generator().manual_seed(3)
            for _ in range(20):
                for values, twin, b in zip(tuner.parameters(), twins, base, strict=True):
                    values.grad = torch.randn(values.shape, generator=generator, dtype=torch.float64)
                    if adam:
                        twin.sub_(rate * decay * (twin - b))
                        twin.grad = sign * values.grad
                    else:
                        twin.grad = sign * values.grad + decay * (twin - b)
                optimizer.step()
                plain.step()
            for values, twin in zip(tuner.parameters(), twins, strict=True):
                torch.testing.assert_close(values.detach(), twin, rtol=1e-12, atol=1e-13)


def test_without_gradients_everything_decays_to_the_base() -> None:
    model, tuner = setup(torch.bfloat16)
    before = bits(tuner.model)
    with torch.no_grad():
        for values in tuner.parameters():
            values.add_(1.0)
    tuner.sync()
    assert not same_bits(model, before)
    optimizer = AdamW(tuner, lr=torch.tensor(0.5), weight_decay=1.0, decay_towards="base")
    for _ in range(30):
        for values in tuner.parameters():
            values.grad = torch.zeros_like(values)
        optimizer.step()
    for name, p in model.named_parameters():
        if not name.endswith("_shira_values"):
            assert torch.equal(p.detach().view(-1).view(torch.uint8), before[name])


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_whole_parameters_and_others_share_one_optimizer(kind: Any) -> None:
    """A head as part of the adapter, and a parameter that was unfrozen by hand, which gets torch's own step."""
    theirs: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW if kind is AdamW else torch.optim.SGD
    options = {} if kind is AdamW else {"momentum": 0.9}
    results = []
    for make in (kind, theirs):
        model, _ = setup(targets=r"^0$", whole=r"^2\.")
        model[0].bias.requires_grad_(True)
        optimizer = make(model.parameters(), lr=1e-2, weight_decay=0.1, **options)
        before = bits(model)
        steps(model, optimizer, 10)
        after = bits(model)
        for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
            assert not torch.equal(before[name], after[name]), name
        results.append([p.detach().clone() for p in model.parameters()])
    close(*results)
    state = kind(model.parameters(), lr=1.0)
    assert len(state.state_dict()["param_groups"][0]["params"]) == len(list(model.parameters()))


def test_groups_and_closure() -> None:
    model, tuner = setup()
    first, second = tuner.parameters()
    optimizer = AdamW([{"params": [first], "lr": 0.0}, {"params": [second]}], lr=1e-2, weight_decay=0.0)
    before = first.detach().clone(), second.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(torch.ones(2, 16)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert torch.equal(first.detach(), before[0])
    assert not torch.equal(second.detach(), before[1])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.01, foreach=True),
        lambda p: torch.optim.Adam(p, lr=0.02, fused=True),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    ],
)
def test_any_optimizer_of_torch_writes_the_weights(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model, tuner = setup(torch.bfloat16, whole=r"2\.bias")
    optimizer = make(list(tuner.parameters()))
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(torch.ones(2, 16, dtype=torch.bfloat16)).float().square().sum()
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert losses[-1] < losses[0] / 2
    for name, values in tuner.named_parameters():
        weight = model.get_parameter(name.removesuffix("_shira_values")).detach().reshape(-1, values.numel() //
            indices_of(model, name).numel())  # fmt: skip
        assert torch.equal(weight[indices_of(model, name).long()].view(-1), values.detach().bfloat16())


def test_values_that_joined_later_have_their_own_count() -> None:
    """Steps are counted for each parameter, so a late group has the bias correction of its own first step."""
    _, tuner = setup()
    first, second = tuner.parameters()
    optimizer = AdamW([first], lr=1e-2)
    for _ in range(3):
        first.grad = torch.ones_like(first)
        optimizer.step()
    optimizer.add_param_group({"params": [second]})
    before = second.detach().clone()
    second.grad = torch.ones_like(second)
    optimizer.step()
    assert optimizer.state[first]["step"] == 4
    assert optimizer.state[second]["step"] == 1
    torch.testing.assert_close(second.detach(), before * (1 - 1e-4) - 1e-2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda t: AdamW(t, lr=-1.0), r"shira\.AdamW: lr must be at least 0 and finite, got -1\.0"),
        (lambda t: SGD(t, lr=-1.0), r"shira\.SGD: lr must be at least 0 and finite, got -1\.0"),
        (lambda t: AdamW(t, lr=torch.ones(2)), "lr must be a number or one float32 or float64 entry"),
        (lambda t: AdamW(t, lr=torch.tensor(1)), "lr must be a number or one float32 or float64 entry"),
        (lambda t: AdamW(t, betas=(1.0, 0.9)), r"betas must be in \[0, 1\), got \(1\.0, 0\.9\)"),
        (lambda t: AdamW(t, eps=-1e-8), "eps must be at least 0"),
        (lambda t: AdamW(t, weight_decay=float("nan")), "weight_decay must be at least 0 and finite, got nan"),
        (lambda t: AdamW(t, decay_towards="mean"), 'decay_towards must be "zero" or "base", got \'mean\''),
        (lambda t: SGD(t, momentum=-0.1), r"shira\.SGD: momentum must be at least 0"),
        (lambda t: SGD(t, nesterov=True), "nesterov needs momentum above 0 and dampening 0, got 0.0 and 0.0"),
        (lambda t: SGD(t, momentum=0.9, dampening=0.1, nesterov=True), "nesterov needs"),
        (lambda t: AdamW(t, lr=torch.tensor(-1.0)), r"shira\.AdamW: lr must be at least 0 and finite, got -1\.0"),
        (lambda t: SGD(t, lr=torch.tensor(float("nan"))), r"shira\.SGD: lr must be at least 0 and finite, got nan"),
        (lambda t: SGD(t, lr=None), "lr must be a number, got None"),
        (lambda t: SGD(t, momentum=torch.tensor(0.9)), r"momentum must be a number, got tensor\(0\.9"),
        (
            lambda t: AdamW(t, betas=(torch.tensor(0.9), 0.999)),
            r"betas must be two numbers \(no tensors\), got \(tensor",
        ),
        (lambda t: AdamW(t, betas=(torch.tensor(0.9), torch.tensor(0.999))), "betas must be two numbers"),
        (lambda t: AdamW(t, betas=(0.9,)), r"betas must be two numbers \(no tensors\), got \(0\.9,\)"),
        (
            lambda t: AdamW(t, 1e-3, (0.9, 0.999), 1e-8, 0.0, True),
            r"amsgrad is not supported; torch\.optim\.AdamW\(tun",
        ),
        (
            lambda t: AdamW(t, differentiable=True),
            "differentiable is not supported: a step is written into the weights",
        ),
        (lambda t: SGD(t, differentiable=True), r"shira\.SGD: differentiable is not supported"),
        (lambda t: AdamW(t, foreach=True, fused=True), "foreach and fused cannot be True together"),
        (
            lambda t: AdamW(t, lr=torch.tensor(0.1), foreach=True),
            "lr as a tensor with foreach=True needs capturable=True",
        ),
    ],
)
def test_refused_settings(make: Callable[[SparseTuner], Any], says: str) -> None:
    _, tuner = setup()
    with pytest.raises(ValueError, match=says):
        make(tuner)


@pytest.mark.parametrize("change", [{"lr": float("nan")}, {"lr": float("inf")}, {"weight_decay": float("inf")}])
def test_a_refused_step_has_changed_nothing(change: dict[str, float]) -> None:
    """Also where a group's numbers went wrong after it was made, as a scheduler can do."""
    model, tuner = setup()
    optimizer = AdamW(tuner, weight_decay=0.1, decay_towards="base")
    steps(model, optimizer, 2)
    before = bits(model)
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match="must be at least 0 and finite"):
        steps(model, optimizer, 1)
    assert same_bits(model, before)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_a_refused_group_does_not_stay() -> None:
    _, tuner = setup()
    first, second = tuner.parameters()
    optimizer = AdamW([first])
    with pytest.raises(ValueError, match="betas"):
        optimizer.add_param_group({"params": [second], "betas": (2.0, 0.9)})
    assert len(optimizer.param_groups) == 1


def test_states_that_do_not_fit() -> None:
    _, tuner = setup()
    state = torch.optim.AdamW(tuner.parameters(), amsgrad=True).state_dict()
    optimizer = AdamW(tuner)
    with pytest.raises(ValueError, match="amsgrad is not supported"):
        optimizer.load_state_dict(state)
    assert not optimizer.param_groups[0].get("amsgrad")
    state = torch.optim.Adam(tuner.parameters(), weight_decay=0.1).state_dict()
    with pytest.raises(ValueError, match=r"state is of torch\.optim\.Adam, whose weight decay is another"):
        optimizer.load_state_dict(state)
    optimizer.load_state_dict(torch.optim.Adam(tuner.parameters()).state_dict())


def test_refused_steps() -> None:
    model, tuner = setup()
    other = nn.Parameter(torch.zeros(3))
    optimizer = AdamW([*tuner.parameters(), other], decay_towards="base")
    before = bits(model)
    for p in (*tuner.parameters(), other):
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"decay_towards=\"base\" is for the values .* shape \[3\]"):
        optimizer.step()
    assert same_bits(model, before)
    optimizer = AdamW(tuner)
    kept = list(tuner.parameters())
    kept[0].grad = torch.ones_like(kept[0])
    tuner.detach()
    with pytest.raises(RuntimeError, match="the tuner of these parameters is detached"):
        optimizer.step()
    with pytest.raises(ValueError, match="the tuner of these parameters is detached"):
        SGD(kept)


@pytest.mark.parametrize("kind", [AdamW, SGD, torch.optim.AdamW])
def test_a_step_asks_once_what_each_parameter_trains(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tuner = setup()
    extra = nn.Parameter(torch.ones(3))
    optimizer = kind([*tuner.parameters(), extra], lr=0.1)
    steps(model, optimizer, 1)  # the first one also compares and remembers
    registry, asked = type(_sites.known), []

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def asking(self: Any, key: Any, *default: Any) -> Any:
            if self is _sites.known:
                asked.append(id(key))
            return method(self, key, *default)

        return asking

    for name in ("get", "__getitem__", "__contains__"):
        monkeypatch.setattr(registry, name, counted(getattr(registry, name)))
    model(torch.ones(1, 16)).sum().backward()
    asked.clear()
    optimizer.step()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(asked) == sorted(map(id, parameters))


@pytest.mark.parametrize("kind", [AdamW, torch.optim.SGD])
def test_a_tuner_may_be_detached_while_a_step_is_under_way(kind: Any) -> None:
    """By a hook of the user's, which runs before ours, or by a closure: what was asked before does not count then."""
    _, other = setup()  # keeps our hooks on
    model, tuner = setup()
    before, values = values_of(tuner), list(tuner.parameters())
    optimizer = kind(values, lr=0.1)
    model(torch.ones(1, 16)).sum().backward()
    optimizer.register_step_post_hook(lambda *_: tuner.detach())
    optimizer.step()
    assert not any(torch.equal(one, other) for one, other in zip(values, before, strict=True))
    base = bits(model)
    model, tuner = setup()
    optimizer = kind(tuner.parameters(), lr=0.1)
    model(torch.ones(1, 16)).sum().backward()
    if kind is AdamW:
        with pytest.raises(RuntimeError, match="the tuner of these parameters is detached"):
            optimizer.step(tuner.detach)
    else:
        optimizer.step(tuner.detach)
    assert same_bits(model, base)
    other.detach()


def test_a_refused_step_leaves_nothing_to_later_ones() -> None:
    model, tuner = setup()
    optimizer = AdamW(tuner, lr=0.1)
    model(torch.ones(1, 16)).sum().backward()
    with pytest.raises(RuntimeError, match="cannot step inside"), tuner.disabled():
        optimizer.step()
    tuner.detach()
    base = bits(model)
    with pytest.raises(RuntimeError, match="the tuner of these parameters is detached"):
        optimizer.step()
    assert same_bits(model, base)
