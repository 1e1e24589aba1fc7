"""SparseTuner on every kind of layer: gradients against autograd's dense one in fp64, and the base back bit for bit."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import shira_ops
from shira import SGD, SparseTuner, masks
from shira.train._layers import Attach, options
from tuning import bits, check_gradients, dense_gradients, indices_of, randomize, same_bits


class Scaled(nn.Linear):
    """A linear layer with a forward of its own: only autograd knows its gradient."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.weight, self.bias)


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


class PaddedConv(nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight * 2, bias)


class Experts(nn.Module):
    """A mixture of experts as transformers keep them: all experts in one 3-D parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(3, 6))
        self.up_proj = nn.Parameter(torch.zeros(3, 8, 6))
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        share = F.softmax(x @ self.gate.T, -1)
        return torch.einsum("bi,eoi,be->bo", x, self.up_proj, share) * self.scale


class Attention(nn.Module):
    def __init__(self, **options: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.k_dim = options.get("kdim", 8)

    def forward(self, x: Tensor) -> Tensor:
        other = x[..., : self.k_dim]
        y: Tensor = self.attention(x, other, other, need_weights=False)[0]
        return y


class Tied(nn.Module):
    """Embedding and head share a weight; only some of the rows are looked up, all of them are scored."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.middle(self.embedding(ids)).tanh())
        return y


class HalfTied(Tied):
    """Tied to a layer whose gradient cannot be sampled: then none of the uses is."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = ScaledEmbedding(12, 8)
        self.head.weight = self.embedding.weight


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


IDS = torch.tensor([[0, 3, 3], [7, 0, 9]])


class Kind(NamedTuple):
    make: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    targets: str
    dense: bool
    granules: tuple[int, ...] = (1,)


def conv(kind: type[nn.Module], shape: tuple[int, ...], **options: object) -> Kind:
    return Kind(lambda: kind(4, 6, 3, **options), lambda: randn(*shape), "weight", False, (1, 3))


KINDS = {
    "linear": Kind(lambda: nn.Linear(8, 6), lambda: randn(5, 8), "weight", False, (1, 4, 8)),
    "linear 4-D": Kind(lambda: nn.Linear(8, 6), lambda: randn(2, 3, 4, 8), "weight", False),
    "linear 1-D": Kind(lambda: nn.Linear(8, 6), lambda: randn(8), "weight", False),
    "linear strided": Kind(lambda: nn.Linear(8, 6), lambda: randn(8, 5).T, "weight", False),
    "linear bias": Kind(lambda: nn.Linear(8, 6), lambda: randn(5, 8), "bias", True),
    "linear, own forward": Kind(lambda: Scaled(8, 6), lambda: randn(5, 8), "weight", True, (1, 4)),
    "transformers' Conv1D": Kind(lambda: Conv1D(6, 8), lambda: randn(2, 5, 8), "weight", False, (1, 3, 6)),
    "conv1d": conv(nn.Conv1d, (2, 4, 9)),
    "conv1d, no batch": conv(nn.Conv1d, (4, 9), padding=1),
    "conv1d, own forward": Kind(lambda: PaddedConv(4, 6, 3), lambda: randn(2, 4, 9), "weight", True),
    "conv2d": conv(nn.Conv2d, (2, 4, 9, 8)),
    "conv2d, stride and dilation": conv(nn.Conv2d, (2, 4, 9, 8), stride=2, dilation=(2, 1), padding=(1, 2)),
    "conv2d, groups": conv(nn.Conv2d, (2, 4, 9, 8), groups=2, bias=False),
    "conv2d, circular": conv(nn.Conv2d, (2, 4, 9, 8), padding=2, padding_mode="circular"),
    "conv2d, reflect": conv(nn.Conv2d, (2, 4, 9, 8), padding=(1, 2), padding_mode="reflect"),
    "conv2d, same": conv(nn.Conv2d, (2, 4, 9, 8), padding="same", dilation=3),
    "conv2d, valid": conv(nn.Conv2d, (2, 4, 9, 8), padding="valid"),
    "conv3d": conv(nn.Conv3d, (1, 4, 5, 4, 6), stride=2),
    "transposed convolution": Kind(lambda: nn.ConvTranspose2d(4, 6, 3), lambda: randn(2, 4, 5, 5), "weight", True),
    "embedding": Kind(lambda: nn.Embedding(10, 8), lambda: IDS, "weight", False, (1, 2, 8)),
    "embedding, padding": Kind(lambda: nn.Embedding(10, 8, padding_idx=3), lambda: IDS, "weight", False),
    "embedding, last row pads": Kind(lambda: nn.Embedding(10, 8, padding_idx=-1), lambda: IDS, "weight", False),
    "embedding, sparse=True": Kind(lambda: nn.Embedding(10, 8, sparse=True), lambda: IDS, "weight", False),
    "embedding, by frequency": Kind(
        lambda: nn.Embedding(10, 8, scale_grad_by_freq=True), lambda: IDS, "weight", True
    ),
    "embedding, own forward": Kind(lambda: ScaledEmbedding(10, 8), lambda: IDS, "weight", True),
    "embedding bag": Kind(lambda: nn.EmbeddingBag(10, 8), lambda: IDS, "weight", True),
    "attention": Kind(Attention, lambda: randn(2, 5, 8), "attention$", True, (1, 4)),
    "attention, other keys": Kind(lambda: Attention(kdim=4, vdim=4), lambda: randn(2, 5, 8), "attention$", True),
    "experts": Kind(Experts, lambda: randn(7, 6), "gate$|up_proj$", True, (1, 3)),
    "scalar": Kind(Experts, lambda: randn(7, 6), "scale$", True),
    "lstm": Kind(lambda: nn.LSTM(8, 4, batch_first=True), lambda: randn(2, 5, 8), "weight", True),
    "layer norm": Kind(lambda: nn.LayerNorm(8), lambda: randn(5, 8), "weight|bias", True),
    "tied": Kind(Tied, lambda: IDS, "embedding$|middle$", False, (1, 4)),
    "half tied": Kind(HalfTied, lambda: IDS, "head$", True),
}  # fmt: skip
EVERY = [(name, granule) for name, kind in KINDS.items() for granule in kind.granules]


def build(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    kind = KINDS[name]
    model = randomize(kind.make().double())
    input = kind.input()

    def loss(module: nn.Module) -> Tensor:
        output = module(input)
        output = output[0] if isinstance(output, tuple) else output
        return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sin().sum()

    return model, loss


def tune(model: nn.Module, name: str, granule: int = 1, gradient: str = "sampled") -> SparseTuner:
    return SparseTuner(model, masks.Rand(density=0.4, granule=granule, seed=3), KINDS[name].targets, gradient=gradient)


@pytest.mark.parametrize("gradient", ["sampled", "dense"])
@pytest.mark.parametrize(("name", "granule"), EVERY)
def test_gradient_is_the_dense_gradient_at_the_mask(name: str, granule: int, gradient: str) -> None:
    """And accumulates over backward passes, and starts afresh after either kind of zero_grad."""
    model, loss = build(name)
    wanted = dense_gradients(model, loss)
    before = bits(model)
    with tune(model, name, granule, gradient) as tuner:
        dense = KINDS[name].dense or gradient == "dense"
        assert all(tuned.target.site.dense == dense for tuned in tuner._tuned)
        loss(model).backward()
        check_gradients(tuner, wanted)
        (loss(model) + loss(model)).backward()
        check_gradients(tuner, wanted, times=3)
        model.zero_grad(set_to_none=False)
        assert not any(values.grad.any() for values in tuner.parameters() if values.grad is not None)
        loss(model).backward()
        check_gradients(tuner, wanted)
        model.zero_grad(set_to_none=True)
        loss(model).backward()
        check_gradients(tuner, wanted)
    assert same_bits(model, before)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_moves_the_mask_alone_and_detach_restores_every_bit(name: str, dtype: torch.dtype) -> None:
    model, _ = build(name)
    model.to(dtype)
    input = KINDS[name].input()
    input = input.to(dtype) if input.is_floating_point() else input
    before, modes = bits(model), [p.requires_grad for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]
    tuner = tune(model, name)
    optimizer = SGD(tuner, lr=0.5)
    for _ in range(2):
        output = model(input)
        output = output[0] if isinstance(output, tuple) else output
        output.float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = 0
    for values_name, values in tuner.named_parameters():
        at = indices_of(model, values_name).long()
        weight_name = values_name.removesuffix("_shira_values")
        weight = model.get_parameter(weight_name).detach().view(-1)
        was = before[weight_name].view(dtype)
        assert torch.equal(weight[at], values.detach().to(dtype))
        rest = torch.ones_like(weight, dtype=torch.bool).index_fill(0, at, False)
        assert torch.equal(weight[rest], was[rest])
        moved += int((weight[at] != was[at]).sum())
    assert moved
    tuner.detach()
    assert same_bits(model, before)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert [p.requires_grad for p in model.parameters()] == modes
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._load_state_dict_post_hooks
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


@pytest.mark.parametrize("name", ["linear", "transformers' Conv1D", "conv1d", "conv2d, same", "embedding"])
def test_gradcheck_through_attach(name: str) -> None:
    """The layer as a function of its output's source and of the values, against finite differences."""
    layer, _ = build(name)
    assert layer.weight.dtype == torch.float64
    rule = {"l": "linear", "t": "transposed", "c": "conv", "e": "embedding"}[name[0]]
    input = KINDS[name].input()
    indices = torch.tensor([0, 1, 5, 8, 29, 40], dtype=torch.int32)
    weight = layer.weight.detach().clone()

    def function(values: Tensor, shift: Tensor) -> Tensor:
        with torch.no_grad():
            layer.weight.copy_(weight)
            shira_ops.scatter_(layer.weight, indices, values.detach())
            raw = layer(input)
        return Attach.apply(raw + shift, values, input, indices, 1, rule, options(rule, layer))

    values = weight.view(-1)[indices.long()].clone().requires_grad_()
    with torch.no_grad():
        shift = torch.zeros_like(layer(input))
    assert gradcheck(function, (values, shift.requires_grad_()))


@pytest.mark.parametrize("name", ["linear", "transformers' Conv1D", "conv2d", "embedding", "attention", "experts"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(name: str, reentrant: bool) -> None:
    model, _ = build(name)
    input = KINDS[name].input()

    def loss(module: nn.Module) -> Tensor:
        # Reentrant checkpoints need an input that requires grad.
        x = torch.zeros((), dtype=torch.float64, requires_grad=True)

        def part(x: Tensor) -> Tensor:
            return module(input + x if input.is_floating_point() else input) + x

        y: Tensor = checkpoint(part, x, use_reentrant=reentrant).square().sum()
        return y

    wanted = dense_gradients(model, lambda module: (module(input)).square().sum())
    with tune(model, name) as tuner:
        for times in (1, 2):
            loss(model).backward()
            check_gradients(tuner, wanted, times)


@pytest.mark.parametrize("name", ["linear", "transformers' Conv1D", "conv2d", "embedding", "attention", "tied"])
def test_autocast_and_a_scaler(name: str) -> None:
    """bfloat16 compute over fp32 weights: gradients arrive in fp32, and close to those without."""
    model, _ = build(name)
    model.float()
    input = KINDS[name].input()
    input = input.float() if input.is_floating_point() else input
    wanted = dense_gradients(model, lambda module: module(input).float().square().sum())
    with tune(model, name) as tuner:
        optimizer = SGD(tuner, lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input).float().square().sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        for values in tuner.parameters():
            assert values.grad.dtype == torch.float32
        largest = max(gradient.abs().max().item() for gradient in wanted.values())
        check_gradients(tuner, wanted, rtol=0.1, atol=0.02 * largest)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 64.0
        next(tuner.parameters()).grad.fill_(float("inf"))
        before = bits(model)
        scaler.step(optimizer)  # skipped
        scaler.update()
        assert scaler.get_scale() == 32.0
        assert same_bits(model, before)


def test_input_is_kept_in_the_dtype_the_layer_computed_in() -> None:
    model = nn.Linear(8, 8)
    with SparseTuner(model, masks.Rand(density=0.5)), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.randn(4, 8))
    assert output.grad_fn.saved_tensors[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["linear", "transformers' Conv1D", "conv2d, circular", "embedding", "attention",
                                  "tied", "experts"])  # fmt: skip
def test_compiles_whole(name: str) -> None:
    layer, loss = build(name)
    # In a model: torch itself runs the hooks of what is compiled outside of the graph.
    model = nn.Sequential(layer)
    wanted = dense_gradients(model, loss)
    with SparseTuner(model, masks.Rand(density=0.4), KINDS[name].targets) as tuner:
        torch._dynamo.reset()
        explained = torch._dynamo.explain(model)(KINDS[name].input())
        assert (explained.graph_count, explained.graph_break_count) == (1, 0)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        loss(compiled).backward()
        check_gradients(tuner, wanted)
        loss(compiled).backward()
        check_gradients(tuner, wanted, times=2)


def test_hooks_of_others_come_after() -> None:
    """A user's hook may change the output: the gradient is of what the layer itself computes."""
    model = nn.Sequential(nn.Linear(8, 6)).double()
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    x = randn(5, 8)
    wanted = dense_gradients(model, lambda module: module(x).square().sum())
    with SparseTuner(model, masks.Rand(density=0.4)) as tuner:
        model(x).square().sum().backward()
        check_gradients(tuner, wanted)


@pytest.mark.parametrize(("name", "key"), [("linear", "input"), ("transformers' Conv1D", "x"), ("embedding", "input")])
def test_keyword_input(name: str, key: str) -> None:
    model, _ = build(name)
    input = KINDS[name].input()
    wanted = dense_gradients(model, lambda module: module(input).square().sum())
    with tune(model, name) as tuner:
        model(**{key: input}).square().sum().backward()
        check_gradients(tuner, wanted)


def test_no_tokens_is_no_gradient() -> None:
    model = nn.Embedding(10, 8)
    with SparseTuner(model, masks.Rand(density=0.5), "weight") as tuner:
        model(torch.zeros(0, dtype=torch.long)).sum().backward()
        (values,) = tuner.parameters()
        assert torch.equal(values.grad, torch.zeros_like(values))


def test_an_embedding_makes_no_dense_gradient() -> None:
    """Memory follows the tokens, not the rows."""
    model = nn.Embedding(2**17, 64)
    with SparseTuner(model, masks.Rand(density=0.001), "weight"):
        loss = model(torch.tensor([1, 5, 1])).sum()
        with torch.profiler.profile(profile_memory=True) as profile:
            loss.backward()
        largest = max(event.cpu_memory_usage for event in profile.events())
        assert 0 < largest < model.weight.nbytes // 8


# Autograd is never silently wrong


def test_second_derivatives_are_refused_or_right() -> None:
    """Through a sampled gradient they would miss what flows through the weight; through a dense one they are right."""
    x = randn(5, 8).requires_grad_()

    def penalty(module: nn.Module) -> Tensor:
        (grad,) = torch.autograd.grad(module(x).tanh().sum(), x, create_graph=True)
        return grad.square().sum()

    says = r'sampled gradient cannot be differentiated again .*gradient="dense"'
    for model in (build("linear")[0], nn.Sequential(build("linear")[0], nn.Linear(6, 3).double())):
        wanted = dense_gradients(model, penalty)
        with SparseTuner(model, masks.Rand(density=0.4)), pytest.raises(RuntimeError, match=says):
            penalty(model)
        with SparseTuner(model, masks.Rand(density=0.4), gradient="dense") as tuner:
            penalty(model).backward()
            check_gradients(tuner, wanted)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
def test_a_gradient_with_a_graph_goes_on_through_the_gather() -> None:
    model, loss = build("linear, own forward")
    twin = copy.deepcopy(model)
    first = torch.autograd.grad(loss(twin), twin.weight, create_graph=True)[0]
    with tune(model, "linear, own forward") as tuner:
        (values,) = tuner.parameters()
        at = indices_of(model, "weight_shira_values").long()
        loss(model).backward(create_graph=True)
        (wanted,) = torch.autograd.grad(first.view(-1)[at].square().sum(), twin.weight)
        gradient, values.grad = values.grad, None
        gradient.square().sum().backward()
        torch.testing.assert_close(values.grad, wanted.view(-1)[at])


@pytest.mark.parametrize("name", ["linear", "transformers' Conv1D", "conv2d"])
def test_a_stale_backward_is_refused(name: str) -> None:
    """The input changed between forward and backward."""
    model, _ = build(name)
    with tune(model, name):
        input = KINDS[name].input().clone()
        loss = model(input).sum()
        input.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("gradient", ["sampled", "dense"])
def test_values_changed_between_forward_and_backward(gradient: str) -> None:
    """Before they are written, the gradient is that of the forward; after, the layers below refuse the stale weight."""
    model = randomize(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double())
    x = randn(5, 8)

    def loss(module: nn.Module) -> Tensor:
        y: Tensor = module(x).square().sum()
        return y

    wanted = dense_gradients(model, loss)
    with SparseTuner(model, masks.Rand(density=0.4), gradient=gradient) as tuner:
        stale, later = loss(model), loss(model)
        with torch.no_grad():
            for values in tuner.parameters():
                values.add_(1.0)
        stale.backward()
        check_gradients(tuner, wanted)
        tuner.sync()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            later.backward()


def test_torch_func_is_refused_and_functional_call_is_right() -> None:
    model, _ = build("linear")
    with tune(model, "linear") as tuner:
        ((name, values),) = tuner.named_parameters()
        x = KINDS["linear"].input()

        def at(v: Tensor) -> Tensor:
            y: Tensor = torch.func.functional_call(model, {name: v}, (x,)).square().sum()
            return y

        before = bits(model)
        for transform in (torch.func.grad(at), torch.func.vmap(at)):
            with pytest.raises(RuntimeError, match=r"torch\.func cannot follow"):
                transform(values.detach().expand(2, -1) if transform is not torch.func.grad else values)
        assert same_bits(model, before)

        other = (values.detach() + 1).requires_grad_()
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.get_parameter(name).add_(1.0)
        result = at(other)
        assert torch.equal(result, twin(x).square().sum())
        (given,) = torch.autograd.grad(result, other)
        wanted = 2 * (twin(x).detach().T @ x).view(-1)[indices_of(model, name).long()]
        torch.testing.assert_close(given, wanted)
        # Its own values are back with the next forward.
        model(x)
        assert same_bits(model, before)


def test_frozen_values_train_no_more() -> None:
    for name in ("linear", "attention"):
        model, loss = build(name)
        with tune(model, name) as tuner:
            first, *rest = tuner.parameters()
            first.requires_grad_(False)
            if rest:
                loss(model).backward()
                assert all(values.grad is not None for values in rest)
            assert first.grad is None
            assert all(p.grad is None for n, p in model.named_parameters() if not n.endswith("_shira_values"))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own use of it
@pytest.mark.parametrize("gradient", ["sampled", "dense"])
@pytest.mark.parametrize("grad", [True, False])
def test_values_with_a_tangent_are_refused(gradient: str, grad: bool) -> None:
    """A write into a weight would lose it."""
    model, _ = build("linear")
    with tune(model, "linear", gradient=gradient) as tuner:
        ((name, values),) = tuner.named_parameters()
        with forward_ad.dual_level(), torch.set_grad_enabled(grad):
            dual = forward_ad.make_dual(values.detach(), torch.ones_like(values))
            with pytest.raises(RuntimeError, match="has a tangent, and values are written into weights"):
                torch.func.functional_call(model, {name: dual}, (KINDS["linear"].input(),))


def test_a_functional_call_whose_dense_gradient_would_go_elsewhere_is_refused() -> None:
    model, _ = build("linear")
    with tune(model, "linear", gradient="dense") as tuner:
        ((name, values),) = tuner.named_parameters()
        x = KINDS["linear"].input()
        other = values.detach() + 1
        with pytest.raises(RuntimeError, match=r"functional_call gave .* would go to the model's own"):
            torch.func.functional_call(model, {name: other.clone().requires_grad_()}, (x,))
        given = torch.func.functional_call(model, {name: other}, (x,))
        with torch.no_grad():
            values.copy_(other)
        assert torch.equal(given, model(x))


@pytest.mark.parametrize("compiled", ["nothing", "the model", "around it"])
@pytest.mark.parametrize("overlay", [False, True])
def test_hooks_that_are_put_before_the_tuners_go_after_them(overlay: bool, compiled: str) -> None:
    """What they make of a layer's output reaches the gradient, however often the model runs."""
    model = randomize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double())
    plain, x = copy.deepcopy(model), torch.randn(3, 8, dtype=torch.float64)

    def tripled(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * 3

    def loss(model: nn.Module) -> Tensor:
        return model(x).square().sum()

    with SparseTuner(model, masks.Rand(density=0.25, seed=1), overlay=overlay) as tuner:
        if compiled == "the model":
            model.compile(backend="eager")
        compute = torch.compile(loss, backend="eager") if compiled == "around it" else loss
        compute(model)
        for layer in (*model, *plain):
            layer.register_forward_hook(tripled, prepend=True)
        wanted = dense_gradients(plain, loss)
        for times in (1, 2):
            compute(model).backward()
            check_gradients(tuner, wanted, times)


@pytest.mark.parametrize("overlay", [False, True])
def test_hooks_of_all_modules_are_refused(overlay: bool) -> None:
    """They come before every other. Torch's own return nothing."""
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    with SparseTuner(model, masks.Rand(density=0.25, seed=1), overlay=overlay):
        handle = register_module_forward_hook(lambda module, args, output: output * 3)
        with pytest.raises(RuntimeError, match=r"a forward hook of all modules .* runs before the hook of 0\.weight"):
            model(x)
        handle.remove()
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        assert "Sequential.0" in counter.get_flop_counts()


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d"])
def test_compiled_autograd(name: str) -> None:
    model, _ = build(name)
    x = KINDS[name].input()
    model = nn.Sequential(model, nn.Linear(model(x).shape[-1], 4).double())  # the input of this one requires grad
    wanted = dense_gradients(model, lambda module: module(x).square().sum())
    with SparseTuner(model, masks.Rand(density=0.4), targets="weight") as tuner:
        loss = model(x).square().sum()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        check_gradients(tuner, wanted)


def test_a_convolution_of_its_own_is_dense() -> None:
    layer = nn.Conv1d(4, 4, 3)
    plain = nn.Conv1d(4, 4, 3)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 9)
    F.conv1d(x, plain.weight * 2, plain.bias).square().sum().backward()
    layer._conv_forward = lambda input, weight, bias: F.conv1d(input, weight * 2, bias)  # type: ignore[method-assign]
    with SparseTuner(layer, masks.Rand(density=1), targets="weight") as tuner:
        layer(x).square().sum().backward()
        (values,) = tuner.parameters()
        torch.testing.assert_close(values.grad, plain.weight.grad.view(-1))  # type: ignore[union-attr]


@pytest.mark.parametrize("setting", ["_conv_forward", "scale_grad_by_freq", "max_norm"])
def test_a_setting_that_is_changed_under_a_tuner_is_refused(setting: str) -> None:
    conv = setting == "_conv_forward"
    layer = nn.Conv1d(4, 4, 3) if conv else nn.Embedding(8, 4)
    x = torch.randn(2, 4, 9) if conv else torch.tensor([1, 1, 2])
    model = nn.Sequential(layer)
    with SparseTuner(model, masks.Rand(density=0.25), targets="0"):
        layer.__dict__[setting] = (lambda input, weight, bias: F.conv1d(input, weight * 2, bias)) if conv else True
        with pytest.raises(RuntimeError, match=rf"the .*{setting}.* was replaced after the tuner was attached"):
            model(x)


@pytest.mark.parametrize("overlay", [False, True])
@pytest.mark.parametrize("how", ["instance", "class"])
def test_a_forward_that_is_replaced_under_a_tuner_is_refused(overlay: bool, how: str) -> None:
    """Its rule is for the forward that the layer had."""

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight * 2, self.bias)

    class Same(nn.Linear):
        pass

    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer)
    x = torch.randn(3, 8)
    with SparseTuner(model, masks.Rand(density=0.25, seed=1), overlay=overlay) as tuner:
        layer.__class__ = Same
        wanted = model(x)
        if how == "class":
            layer.__class__ = Doubled
        else:
            layer.forward = types.MethodType(Doubled.forward, layer)  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match=r"was replaced after the tuner was attached, so it is not known"):
            model(x)
        layer.__class__ = nn.Linear
        vars(layer).pop("forward", None)
        assert torch.equal(model(x), wanted)
        tuner.verify()
