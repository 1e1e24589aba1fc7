"""Autograd is never silently wrong, for calls straight to torch.ops.shira: what is changed moves its version, what
requires grad is refused before the write, and what has a formula has the right one. opcheck notices none of this."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import cases
import shira_ops
import shira_ops.backend
from cases import DISPATCHER, FLOAT_DTYPES, MUTATING_OPS, Backend, Case, Setup, assert_same, bits, build, map_tensors
from test_switch import id_of

# torch's own: what it decomposes for forward mode is scripted on first use.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

GRAD_MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.fixture(params=[b for b in cases.BACKENDS if b.dispatches], ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    """The dispatcher's ways: the reference, called as a function, and the emulator are below autograd."""
    return request.param


def fresh(backend: Backend, op: str, **setup: Any) -> Case:
    """A case on the backend's device, none of whose tensors is a view."""
    case = build(op, Setup(**setup))
    return Case(op, map_tensors(lambda t: t.to(backend.device).detach().clone(), case.args))


def title(op: str) -> str:
    return op.partition(".")[0]


def differentiable(case: Case) -> list[str]:
    """The arguments that can require grad."""
    return [name for name, t in case.tensors() if t.is_floating_point()]


# Versions


def unmoved(backend: Backend, case: Case) -> list[str]:
    """The mutated arguments whose version a call leaves as it was."""
    before = {name: t._version for name, t in case.mutated()}
    backend(case.op, **case.args)
    return [name for name, t in case.mutated() if t._version <= before[name]]


def test_mutating_ops_are_those_whose_schema_says_so() -> None:
    assert set(MUTATING_OPS) == {op for op in cases.op_names() if cases.mutated_names(op)}
    assert all(cases.schema_of(op).is_mutable for op in MUTATING_OPS)
    assert all(a.alias_info.is_write for op in MUTATING_OPS for a in cases.schema_of(op).arguments if a.alias_info)


@pytest.mark.subset
@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("op", MUTATING_OPS)
def test_versions_move(backend: Backend, op: str, mode: str) -> None:
    """Those of what is changed and no others, in every mode: a normal tensor may be saved for a later backward."""
    case = fresh(backend, op)
    mutated = {name for name, _ in case.mutated()}
    assert mutated
    before = {name: t._version for name, t in case.tensors()}
    with GRAD_MODES[mode]():
        assert unmoved(backend, case) == []
    for name, t in case.tensors():
        assert (t._version > before[name]) == (name in mutated), name


@pytest.mark.parametrize("op", MUTATING_OPS)
def test_a_refused_call_moves_no_version(backend: Backend, op: str) -> None:
    case = fresh(backend, op)
    before = [t._version for _, t in case.tensors()]
    case.args["granule"] = 0
    with pytest.raises(RuntimeError, match="granule must be at least 1"):
        backend(op, **case.args)
    assert [t._version for _, t in case.tensors()] == before


def test_a_view_moves_the_version_of_its_base(backend: Backend) -> None:
    base = torch.zeros(4, 6, device=backend.device)
    at, one = torch.tensor([0], device=backend.device), torch.ones(1, device=backend.device)
    before = base._version
    backend("scatter_", weight=base[1], indices=at, values=one)
    assert base._version > before


def test_ops_that_change_nothing_move_nothing(backend: Backend) -> None:
    for op in cases.OPS:
        if op in MUTATING_OPS:
            continue
        case = fresh(backend, op)
        before = [t._version for _, t in case.tensors()]
        backend(op, **case.args)
        assert [t._version for _, t in case.tensors()] == before, op


def stale_backwards(backend: Backend, case: Case) -> Iterator[tuple[str, Callable[[], None]]]:
    """For each mutated argument, the backward of a product that saved it before a call."""
    losses = []
    for name, t in case.mutated():
        if t.is_floating_point() and t.numel():
            leaf = torch.ones_like(t, requires_grad=True)
            losses.append((name, (leaf * t).sum()))
    backend(case.op, **case.args)
    for name, loss in losses:
        yield name, loss.backward


@pytest.mark.subset
@pytest.mark.parametrize("op", MUTATING_OPS)
def test_stale_backward_is_refused(backend: Backend, op: str) -> None:
    """A weight changed between forward and backward would give a wrong gradient: torch refuses it."""
    found = 0
    for _, backward in stale_backwards(backend, fresh(backend, op)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            backward()
        found += 1
    assert found >= 1


def test_stale_arguments_of_the_formulas(backend: Backend) -> None:
    """What gather and sampled_grad keep for their backward is kept by version too."""
    at = torch.tensor([1, 2], device=backend.device)
    weight = torch.ones(4, requires_grad=True, device=backend.device)
    loss = backend("gather", weight=weight, indices=at).sum()
    at.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    at = torch.tensor([1, 2], device=backend.device)
    a, b = (torch.ones(3, 2, requires_grad=True, device=backend.device) for _ in range(2))
    loss = backend("sampled_grad", grad_output=a, input=b, indices=at).sum()
    with torch.no_grad():
        backend("scatter_", weight=b, indices=at, values=torch.zeros(2, device=backend.device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Arguments that require grad


def refusal(backend: Backend, case: Case, requirement: str) -> None:
    """The call is refused with this text, before the write, and moves no version."""
    before = [(bits(t).clone(), t._version) for _, t in case.tensors()]
    with pytest.raises(RuntimeError) as raised:
        backend(case.op, **case.args)
    assert str(raised.value).startswith(f"{title(case.op)}: {requirement}")
    for (name, t), (was, version) in zip(case.tensors(), before, strict=True):
        assert torch.equal(bits(t), was), f"{name} was written"
        assert t._version == version, f"{name}'s version moved"


@pytest.mark.subset
@pytest.mark.parametrize("op", MUTATING_OPS)
def test_requires_grad_is_refused(backend: Backend, op: str) -> None:
    """Every argument that can require grad: leaves, non-leaves and views, while grad mode is on."""
    names = differentiable(fresh(backend, op))
    assert {name for name, _ in fresh(backend, op).mutated()} <= set(names)
    for name in names:
        text = f"{name} must not require grad while grad mode is on (run it under torch.no_grad())"
        case = fresh(backend, op)
        leaf = case.get(name).requires_grad_()
        refusal(backend, case, text)
        for other in (leaf * 1, leaf.view(leaf.shape), leaf.detach().clone().requires_grad_().exp()):
            case.set(name, other)
            refusal(backend, case, text)


@pytest.mark.subset
@pytest.mark.parametrize("mode", ["no_grad", "inference"])
@pytest.mark.parametrize("op", MUTATING_OPS)
def test_requires_grad_is_allowed_without_grad_mode(backend: Backend, op: str, mode: str) -> None:
    """All of them at once: the same bits, versions move, and a backward over what was changed is refused."""
    wanted = fresh(backend, op)
    backend(op, **wanted.args)
    case = fresh(backend, op)
    for name in differentiable(case):
        case.get(name).requires_grad_()
    losses = [(t * t).sum() for _, t in case.mutated() if t.numel()]
    with GRAD_MODES[mode]():
        assert unmoved(backend, case) == []
    assert_same(case.args, wanted.args)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
@pytest.mark.parametrize("op", MUTATING_OPS)
def test_forward_mode_tangents_are_refused(backend: Backend, op: str, mode: str) -> None:
    for name in differentiable(fresh(backend, op)):
        case = fresh(backend, op)
        with forward_ad.dual_level(), GRAD_MODES[mode]():
            primal = case.get(name)
            case.set(name, forward_ad.make_dual(primal, torch.ones_like(primal)))
            refusal(backend, case, f"{name} must not carry a forward-mode tangent")
        case = fresh(backend, op)
        with forward_ad.dual_level():  # without a tangent nothing is lost
            backend(op, **case.args)


def test_integer_weights_are_nobodys_gradient(backend: Backend) -> None:
    for op in ("scatter_", "swap_", "apply_", "switch_"):
        case = fresh(backend, op, dtype=torch.int8)
        assert unmoved(backend, case) == []


# Inference tensors


@pytest.mark.subset
@pytest.mark.parametrize("op", cases.OPS)
def test_inference_tensors(backend: Backend, op: str) -> None:
    """They have no version to move: the ops work on them, alone and mixed with normal ones."""
    wanted = fresh(backend, op)
    expected = backend(op, **wanted.args)
    expected = list(expected) if isinstance(expected, tuple) else expected
    with torch.inference_mode():
        case = fresh(backend, op)
        assert all(t.is_inference() for _, t in case.tensors())
        result = backend(op, **case.args)
        assert_same({"result": list(result) if isinstance(result, tuple) else result}, {"result": expected})
        assert_same(cases.without_device(case.args), cases.without_device(wanted.args))
        mixed = fresh(backend, op)
    for name, t in list(fresh(backend, op).tensors())[::2]:
        mixed.set(name, t)
    with torch.inference_mode():
        backend(op, **mixed.args)
    assert_same(cases.without_device(mixed.args), cases.without_device(wanted.args))
    for name, t in mixed.mutated():
        assert t.is_inference() or t._version > 0, name


# Formulas


@pytest.mark.parametrize("index", cases.INDEX_DTYPES, ids=id_of)
@pytest.mark.parametrize("granule", [1, 3, 8])
def test_gather_gradients(backend: Backend, granule: int, index: torch.dtype) -> None:
    for limit, count in ((7, 3), (5, 5), (4, 0)):
        case = fresh(backend, "gather", dtype=torch.float64, granule=granule, limit=limit, count=count, index=index)
        weight = case.args["weight"].requires_grad_()

        def function(w: torch.Tensor, case: Case = case) -> torch.Tensor:
            return backend("gather", **{**case.args, "weight": w})

        assert gradcheck(function, (weight,), check_forward_ad=True)
        assert gradgradcheck(lambda w: function(w) ** 3, (weight,))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_gather_gradient_is_exact(backend: Backend, dtype: torch.dtype) -> None:
    """The incoming gradient at the indices, zero elsewhere, in the weight's dtype and shape."""
    case = fresh(backend, "gather", dtype=dtype, granule=4, limit=9, count=4)
    weight = case.args["weight"].requires_grad_()
    incoming = cases.random_numbers(np.random.default_rng(1), 16, dtype).to(backend.device)
    backend("gather", **case.args).backward(incoming)
    wanted = torch.zeros(9, 4, dtype=dtype, device=backend.device)
    wanted[case.args["indices"].long()] = incoming.view(-1, 4)
    assert_same(weight.grad, wanted.view(weight.shape))
    weight.grad = None
    backend("gather", **case.args).sum().backward()  # an expanded gradient: one number in memory
    assert float(weight.grad.double().sum()) == 16


def test_gather_without_grad_has_no_graph(backend: Backend) -> None:
    case = fresh(backend, "gather")
    assert not backend("gather", **case.args).requires_grad
    case.args["weight"].requires_grad_()
    assert backend("gather", **case.args).grad_fn is not None
    with torch.no_grad():
        assert not backend("gather", **case.args).requires_grad


def test_gather_of_a_non_leaf(backend: Backend) -> None:
    leaf = torch.ones(6, requires_grad=True, device=backend.device)
    at = torch.tensor([1, 4], device=backend.device)
    backend("gather", weight=(leaf * 3).view(2, 3), indices=at).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [0, 3, 0, 0, 3, 0]


def test_foreach_gather_gradients(backend: Backend) -> None:
    """Some weights need a gradient and some do not."""
    case = fresh(backend, "foreach_gather", dtype=torch.float64, granule=2, limit=7, count=3)
    weights = case.args["weights"]
    weights[0].requires_grad_()
    weights[2].requires_grad_()

    def function(a: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = backend("foreach_gather", **{**case.args, "weights": [a, weights[1], c]})
        assert isinstance(given, list)
        return given[0], given[2]

    assert gradcheck(function, (weights[0], weights[2]))
    assert gradgradcheck(lambda a, c: tuple(x**3 for x in function(a, c)), (weights[0], weights[2]))
    second = backend("foreach_gather", **case.args)[1]
    assert not second.requires_grad or torch.autograd.grad(second.sum(), weights[0], allow_unused=True) == (None,)


@pytest.mark.parametrize("granule", [1, 3])
@pytest.mark.parametrize("leading", [(), (3,), (2, 2), (0,)], ids=str)
def test_sampled_grad_gradients(backend: Backend, leading: tuple[int, ...], granule: int) -> None:
    rng = np.random.default_rng(0)
    tokens = math.prod(leading)
    a, b = (
        cases.random_numbers(rng, tokens * n, torch.float64).view(*leading, n).to(backend.device).requires_grad_()
        for n in (3, 4)
    )
    indices = torch.tensor([0, 2, 3], device=backend.device)

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return backend("sampled_grad", grad_output=x, input=y, indices=indices, granule=granule)

    assert gradcheck(function, (a, b), check_forward_ad=True)
    assert gradgradcheck(function, (a, b))
    for x, y in ((a.detach(), b), (a, b.detach())):  # one of the two
        assert gradcheck(function, (x, y))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=id_of)
def test_sampled_grad_gradients_keep_the_dtype(backend: Backend, dtype: torch.dtype) -> None:
    a, b = (torch.ones(5, n, dtype=dtype, device=backend.device, requires_grad=True) for n in (2, 3))
    indices = torch.tensor([0, 4], device=backend.device)
    backend("sampled_grad", grad_output=a, input=b, indices=indices).sum().backward()
    assert_same(a.grad, torch.ones_like(a))
    assert_same(b.grad, torch.tensor([1, 1, 0], dtype=dtype).expand(5, 3))


@pytest.mark.parametrize("op", ["select_top", "fingerprint", "fingerprint_at"])
def test_integer_results_need_no_formula(backend: Backend, op: str) -> None:
    """For a weight that requires grad the answer has no graph (warnings are errors here)."""
    case = fresh(backend, op)
    wanted = backend(op, **case.args)
    for name in differentiable(case):
        case.get(name).requires_grad_()
    given = backend(op, **case.args)
    assert not given.requires_grad
    assert_same(given, wanted)


def test_training_step_by_hand(backend: Backend) -> None:
    """The values train through gather, the weight follows under no_grad, and the next forward sees it."""
    weight = torch.arange(6.0, device=backend.device).view(2, 3).requires_grad_()
    indices = torch.tensor([1, 5], device=backend.device)
    for _ in range(3):
        loss = (weight**2).sum()
        (grad,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            backend("scatter_add_", weight=weight, indices=indices, values=grad.view(-1)[indices], alpha=-0.5)
    assert weight.view(-1).tolist() == [0, 0, 2, 3, 4, 0]


# The negative of the negatives: what these tests say of an op that lacks the rules


@pytest.fixture(scope="module")
def careless() -> Iterator[Backend]:
    """The same ops as a library that only registers kernels, as torch lets one."""
    library = torch.library.Library("shira_careless", "FRAGMENT")
    for op in ("swap_", "apply_"):
        schema = str(torch._C._get_schema(f"shira::{op}", "")).partition("::")[2]
        library.define(schema)
        library.impl(op, shira_ops.backend._below_autograd(cases.REFERENCE.find(op)), "CPU")
    yield Backend("careless", "cpu", cases.of_namespace("shira_careless"))
    library._destroy()


@pytest.mark.parametrize("op", ["swap_", "apply_"])
def test_these_tests_can_fail(careless: Backend, op: str) -> None:
    """Without the rules versions stay, a stale backward passes, and grad is accepted: each check sees it."""
    assert "weight" in unmoved(careless, fresh(careless, op))
    for _, backward in stale_backwards(careless, fresh(careless, op)):
        backward()  # silently over changed numbers
    case = fresh(careless, op)
    case.args["weight"].requires_grad_()
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refusal(careless, case, "weight must not require grad")


def test_public_functions_keep_the_rules() -> None:
    """shira_ops.swap_ goes through the same kernels."""
    weight, values = torch.zeros(4), torch.ones(2)
    before = weight._version
    shira_ops.swap_(weight, torch.tensor([0, 1]), values)
    assert weight._version > before
    with pytest.raises(RuntimeError, match="values must not require grad"):
        shira_ops.swap_(weight, torch.tensor([0, 1]), values.requires_grad_())


def test_functional_transforms_never_lose_a_gradient() -> None:
    """torch.func tracks without a leaf that requires grad: what is tracked is refused there too."""
    at, weight, values = torch.tensor([0, 2]), torch.arange(4.0), torch.ones(2)

    def change(w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        w = w * 1
        DISPATCHER("scatter_", weight=w, indices=at, values=v)
        return (w * w).sum()

    for argnums, name in ((0, "weight"), (1, "values")):
        with pytest.raises(RuntimeError, match=f"scatter_: {name} must not require grad while grad mode is on"):
            torch.func.grad(change, argnums)(weight, values)
    with pytest.raises(RuntimeError, match="scatter_: values must not carry a forward-mode tangent"):
        torch.func.jvp(lambda v: change(weight, v), (values,), (values,))


def test_every_combination_of_alpha_and_delta_refuses() -> None:
    """The scalars do not offer a way around it."""
    for alpha, delta in itertools.product((0.0, 1.0, 0.5), (False, True)):
        case = fresh(DISPATCHER, "apply_")
        case.args |= {"alpha": alpha, "delta": delta}
        case.args["values"].requires_grad_()
        refusal(DISPATCHER, case, "values must not require grad while grad mode is on")


def test_a_lazily_conjugated_gradient() -> None:
    """As complex formulas hand it down: spread into the dense gradient by its numbers."""
    weight = torch.randn(6, dtype=torch.complex64, requires_grad=True)
    plain = weight.detach().clone().requires_grad_()
    at = torch.tensor([1, 4])
    up = torch.randn(2, dtype=torch.complex64)
    shira_ops.gather(weight, at).backward(up.conj())
    plain[at].backward(up.conj())
    assert torch.equal(weight.grad, plain.grad)
