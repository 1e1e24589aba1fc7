"""opcheck, and torch.compile(fullgraph=True) with the same results and the same visible changes as eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import cases
import shira_ops
from cases import DISPATCHER, MUTATING_OPS, OPS, Case, Setup, assert_same, build, of_namespace

# torch's own: compiling imports modules that still use what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

SIZED_BY_CONTENT = (
    "fuse_plan",
    "encode_indices",
    "diff_",
    "foreach_diff_",
)  # their results' sizes depend on the numbers
EAGER = ("foreach_diff_",)  # see test_what_cannot_be_traced


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """No test uses compiled code of another one."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


@pytest.mark.subset
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    """Schema, autograd registration, fake, and AOT dispatch with static and dynamic shapes."""
    for setup in (Setup(granule=4), Setup(dtype=torch.bfloat16, values=torch.float32, index=torch.int32)):
        if op in ("scatter_", "swap_", "foreach_scatter_", "foreach_swap_"):
            setup = Setup(dtype=setup.dtype, granule=setup.granule)  # values have weight's dtype
        args, kwargs = build(op, setup).clone().split()
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        every = (*checks, "test_aot_dispatch_dynamic")
        torch.library.opcheck(of_namespace("shira")(op), args, kwargs, test_utils=checks if op in EAGER else every)


def test_what_cannot_be_traced() -> None:
    """torch has no functional form of an op that writes its arguments and gives lists: it says so, and runs nothing."""
    case = build("foreach_diff_", Setup(granule=4)).clone()
    before = [one.clone() for one in case.args["snapshots"]]
    with pytest.raises(RuntimeError, match="alias annotations"):
        torch.compile(of_namespace("shira")("foreach_diff_"), fullgraph=True, backend="aot_eager")(**case.args)
    assert_same(case.args["snapshots"], before)


@pytest.mark.parametrize("op", ["gather", "foreach_gather", "sampled_grad", "sparse_linear"])
def test_opcheck_with_gradients(op: str) -> None:
    case = build(op, Setup(granule=4)).clone()
    for _, t in case.tensors():
        if t.is_floating_point():
            t.requires_grad_()
    torch.library.opcheck(of_namespace("shira")(op), *case.split())


def calling(op: str) -> Callable[[dict[str, Any]], Any]:
    """A graph around the op: what it changes is read before and after."""
    mutated = cases.mutated_names(op)
    function = of_namespace("shira")(op)

    def tensors(args: dict[str, Any]) -> list[torch.Tensor]:
        found = []
        for name in mutated:
            value = args[name]
            found += value if isinstance(value, list) else [value]
        return found

    def graph(args: dict[str, Any]) -> Any:
        before = [t + 1 for t in tensors(args)]
        result = function(**args)
        after = [t * 2 for t in tensors(args)]
        return result, before, after

    return graph


def same_as_eager(op: str, case: Case, backend: str) -> None:
    compiled = torch.compile(calling(op), fullgraph=True, backend=backend)
    ours, theirs = case.clone(), case.clone()
    wanted = calling(op)(theirs.args)
    given = compiled(ours.args)
    assert_same(list(given), [list(x) if isinstance(x, tuple) else x for x in wanted])
    assert_same(cases.without_device(ours.args), cases.without_device(theirs.args))


@pytest.mark.subset
@pytest.mark.parametrize("op", [op for op in OPS if op not in EAGER])
def test_compile(op: str) -> None:
    same_as_eager(op, build(op, Setup(granule=2)), "aot_eager")


@pytest.mark.subset
@pytest.mark.parametrize("op", [op for op in cases.FOREACH_OPS if op not in EAGER])
def test_empty_lists(op: str) -> None:
    """A model without targets: the public function takes it, in a graph too, and still checks the other arguments."""
    args = {k: [] if isinstance(v, list) else v for k, v in build(op).args.items()}
    function = getattr(shira_ops, op.partition(".")[0])
    compiled = torch.compile(lambda **given: function(**given), fullgraph=True, backend="aot_eager")
    for call in (function, compiled):
        assert call(**args) in ([], None)
        with pytest.raises(RuntimeError, match="granule must be at least 1, got 0"):
            call(**{**args, "granule": 0})


def test_compile_for_real() -> None:
    """Inductor, once: what is read before a change keeps the old numbers, what is read after has the new ones."""

    def graph(weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, saved: torch.Tensor) -> Any:
        before = weight.sum()
        torch.ops.shira.apply_(weight, indices, values * 2, saved, alpha=0.5)
        middle = torch.ops.shira.gather(weight, indices) + 1
        torch.ops.shira.scatter_(weight, indices, saved)
        return before, middle, weight.sum()

    args = [
        build("apply_", Setup(limit=100, count=30)).clone().args[k] for k in ("weight", "indices", "values", "saved")
    ]
    eager, compiled = ([t.clone() for t in args] for _ in range(2))
    wanted = graph(*eager)
    given = torch.compile(graph, fullgraph=True)(*compiled)
    assert_same([given[1], compiled], [wanted[1], eager])
    assert_same(compiled[0], args[0])
    assert_same(given[0], given[2])


@pytest.mark.parametrize("op", ["swap_", "apply_", "gather", "adamw_", "select_top", "fingerprint_at", "sampled_grad"])
def test_dynamic_shapes(op: str) -> None:
    """One graph for every size: the second and the third call compile nothing."""
    compiled = torch.compile(calling(op), fullgraph=True, backend="aot_eager", dynamic=True)
    for i, (limit, count) in enumerate(((60, 20), (90, 31), (131, 50))):
        count = 20 if op == "select_top" else count  # a plain int, as k, is part of the graph
        case = build(op, Setup(limit=limit, count=count, shape=(limit,)))
        if op == "sampled_grad":
            case.args |= {"grad_output": torch.ones(5 + i, 4 + i), "input": torch.ones(5 + i, limit)}
        ours, theirs = case.clone(), case.clone()
        wanted = calling(op)(theirs.args)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            given = compiled(ours.args)
        assert_same(list(given), list(wanted))
        assert_same(ours.args, theirs.args)


def test_compiled_gather_has_its_gradient() -> None:
    case = build("gather", Setup(granule=2)).clone()
    weight, indices = case.args["weight"].requires_grad_(), case.args["indices"]

    def loss(w: torch.Tensor) -> torch.Tensor:
        return (torch.ops.shira.gather(w * 3, indices, 2) ** 2).sum()

    (wanted,) = torch.autograd.grad(loss(weight), weight)
    (given,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(weight), weight)
    assert_same(given, wanted)


@pytest.mark.parametrize("op", MUTATING_OPS)
def test_compiled_code_refuses_what_requires_grad(op: str) -> None:
    """Grad mode counts when the graph is traced as it does in eager."""
    case = build(op).clone()
    name = next(name for name, t in case.tensors() if t.is_floating_point())
    case.get(name).requires_grad_()
    before = cases.bits(case.get(name)).clone()

    def graph(args: dict[str, Any]) -> None:
        of_namespace("shira")(op)(**args)

    with pytest.raises(RuntimeError, match="must not require grad while grad mode is on"):
        torch.compile(graph, fullgraph=True, backend="aot_eager")(case.args)
    assert torch.equal(cases.bits(case.get(name)), before)


def test_compiled_code_moves_versions() -> None:
    """A weight changed by compiled code between forward and backward is noticed too."""
    weight, at, values = torch.ones(4), torch.tensor([1]), torch.zeros(1)
    leaf = torch.ones(4, requires_grad=True)
    loss = (leaf * weight).sum()

    def graph(weight: torch.Tensor, at: torch.Tensor, values: torch.Tensor) -> None:
        torch.ops.shira.swap_(weight, at, values)

    torch.compile(graph, fullgraph=True, backend="aot_eager")(weight, at, values)
    assert weight.tolist() == [1, 0, 1, 1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_keeps_its_checks(backend: str) -> None:
    """check_indices has no result: a compiler must not drop it for that."""

    def graph(indices: torch.Tensor) -> torch.Tensor:
        torch.ops.shira.check_indices(indices, 10)
        return indices + 1

    compiled = torch.compile(graph, fullgraph=True, backend=backend)
    assert compiled(torch.tensor([1, 2])).tolist() == [2, 3]
    with pytest.raises(RuntimeError, match="check_indices: indices must be strictly increasing"):
        compiled(torch.tensor([2, 1]))


def test_fakes_refuse_as_the_ops_do() -> None:
    """Tracing tells what is wrong with the shapes, in the same words."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight, at = torch.empty(10, dtype=torch.bfloat16), torch.empty(3, dtype=torch.int64)
        with pytest.raises(
            RuntimeError, match=r"^swap_: values must have 3 entries \(3 indices of granule 1\), got 4$"
        ):
            DISPATCHER("swap_", weight=weight, indices=at, values=torch.empty(4, dtype=torch.bfloat16))
        with pytest.raises(RuntimeError, match=r"^gather: granule must divide weight's 10 entries, got 4$"):
            DISPATCHER("gather", weight=weight, indices=at, granule=4)


def test_fakes_give_the_real_shapes() -> None:
    """Dtype, shape, strides and device of every result."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for op in OPS:
        if op in SIZED_BY_CONTENT:
            continue
        case = build(op, Setup(granule=2)).clone()
        real = DISPATCHER(op, **case.args)
        with FakeTensorMode() as mode:
            fake = DISPATCHER(op, **cases.map_tensors(mode.from_tensor, case.args))
        real, fake = ([x] if not isinstance(x, (list, tuple)) else list(x) for x in (real, fake))
        assert len(real) == len(fake)
        for a, b in zip(real, fake, strict=True):
            if a is not None:
                assert (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device), op
