"""Calibration: gradients against autograd's own, memory by counting tensors, and the model as it was before."""

import copy
import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import shira
from shira import masks
from shira.masks import calibration


def mlp(*widths, dtype=torch.float32):
    torch.manual_seed(0)
    layers = [layer for m, n in itertools.pairwise(widths) for layer in (nn.Linear(m, n), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def some(count, *shape, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(count)]


def square(model, batch):
    return model(batch).float().square().mean()


def places(model, *names):
    found = {}
    for name in names:
        owner, _, attribute = name.rpartition(".")
        found[name] = [(model.get_submodule(owner), attribute)]
    return found


def streamed(model, weights, batches, loss=square):
    found = {}

    def visit(name, gradient):
        assert name not in found
        found[name] = gradient.clone()

    calibration.stream(model, weights, batches, loss, visit)
    return found


def dense(model, names, batches, loss=square):
    """The sum that autograd itself makes, on a copy."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    for batch in batches:
        loss(twin, batch).backward()
    return {name: twin.get_parameter(name).grad for name in names}


def check(model, names, batches, loss=square, weights=None):
    given = streamed(model, weights or places(model, *names), batches, loss)
    wanted = dense(model, names, batches, loss)
    assert given.keys() == wanted.keys()
    for name, gradient in given.items():
        weight = model.get_parameter(name)
        assert gradient.dtype == (torch.float64 if weight.dtype == torch.float64 else torch.float32)
        assert gradient.shape == weight.shape
        # Sums in another order; narrow dtypes round autograd's gradient, and not this one.
        scale = float(wanted[name].abs().max())
        close = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}[weight.dtype]
        torch.testing.assert_close(gradient, wanted[name].to(gradient.dtype), rtol=0, atol=close * scale)
    return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_linear_gradients_are_autograds(count, tokens, dtype):
    """Few tokens are kept, many are accumulated; 3 over 5 batches begin as one and end as the other."""
    model = mlp(12, 20, 6, dtype=dtype)
    check(model, ["0.weight", "2.weight"], some(count, tokens, 12, dtype=dtype))


class Zoo(nn.Module):
    """Weights in every kind of place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.twice = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.plain = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight

    def forward(self, tokens, labels=None):
        x = self.embed(tokens)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = torch.relu_(self.twice(x))
        x = checkpoint(self.twice, x, use_reentrant=False) + x
        x = x + self.attention(x, x, x, need_weights=False)[0]
        logits = self.head(x @ self.plain)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"logits": logits, "loss": loss}


ZOO = [
    *("embed.weight", "conv.weight", "twice.weight", "attention.in_proj_weight", "attention.out_proj.weight"),
    *("plain",),
]


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_of_every_kind_of_weight(count):
    """Tied, shared, checkpointed, used by functions and plainly; the model's own loss, batches as mappings."""
    model = Zoo()
    tokens = [batch % 11 for batch in torch.arange(count * 10).view(count, 2, 5)]
    batches = [{"tokens": batch, "labels": batch.flip(1)} for batch in tokens]
    weights = places(model, *ZOO)
    weights["embed.weight"].append((model.head, "weight"))
    given = streamed(model, weights, batches, None)
    wanted = dense(model, ZOO, batches, lambda model, batch: model(**batch)["loss"])
    for name in ZOO:
        torch.testing.assert_close(given[name], wanted[name], rtol=1e-4, atol=1e-6)


def test_autocast_gives_the_layer_another_input():
    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return square(model, batch)

    model = mlp(16, 16, 16)
    given = streamed(model, places(model, "0.weight", "2.weight"), some(2, 8, 16), loss)
    wanted = dense(model, given, some(2, 8, 16), loss)
    for name in given:
        torch.testing.assert_close(given[name], wanted[name], rtol=0, atol=0.03 * float(wanted[name].abs().max()))


def test_batches_are_what_the_model_is_called_with():
    model = mlp(4, 4)
    model.register_forward_hook(lambda module, args, output: output.square().mean())
    (x,) = some(1, 5, 4)
    expected = dense(model, ["0.weight"], [x], lambda model, batch: model(batch))["0.weight"]
    for batch in (x, (x,), [x], {"input": x}):
        given = streamed(model, places(model, "0.weight"), iter([batch]), None)["0.weight"]
        torch.testing.assert_close(given, expected)


def test_a_reused_buffer_of_the_caller_does_no_harm():
    """A generator that writes every batch into one tensor: what is kept of a batch is a copy of it."""
    model, batches = mlp(8, 8, 8), some(3, 2, 8)

    def reused():
        # The stream looks one batch ahead, so two tensors take turns.
        buffers = [torch.empty(2, 8), torch.empty(2, 8)]
        for i, batch in enumerate(batches):
            yield buffers[i % 2].copy_(batch)

    given = streamed(model, places(model, "0.weight"), reused())
    torch.testing.assert_close(given["0.weight"], dense(model, ["0.weight"], batches)["0.weight"])


class Watch(TorchDispatchMode):
    """Counts, after every operation, the tensors alive that are as large as a weight; the weights aside."""

    def __init__(self, least, weights):
        super().__init__()
        self.least, self.weights, self.seen, self.most = least, {w.data_ptr() for w in weights}, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.nbytes >= self.least:
                self.seen.append(weakref.ref(one))
        alive = {one.data_ptr() for ref in self.seen if (one := ref()) is not None} - self.weights
        self.most = max(self.most, len(alive))
        return result


@pytest.mark.parametrize(
    ("kind", "count", "tokens", "most"),
    [
        ("linear", 1, 4, 1),
        ("linear", 1, 200, 1),  # of one batch, however large
        ("linear", 3, 4, 1),  # few tokens are kept as they are, and multiplied when their weight's turn comes
        ("linear", 3, 100, 4),  # more are added up: an accumulator for each of the four weights
        ("own", 1, 4, 1),
        ("own", 3, 4, 5),  # autograd's own gradient beside four accumulators
    ],
)
def test_dense_gradients_alive(kind, count, tokens, most):
    model = mlp(256, 256, 256, 256, 256)
    if kind == "own":
        for module in model:
            if isinstance(module, nn.Linear):
                module.__class__ = type("Own", (nn.Linear,), {})
    weights = places(model, "0.weight", "2.weight", "4.weight", "6.weight")
    watch = Watch(256 * 256 * 4, model.parameters())
    with watch:  # activations are smaller than a weight, and so not counted
        calibration.stream(model, weights, some(count, tokens, 256), square, lambda name, gradient: None)
    assert watch.most == most


def test_many_tokens_cost_one_accumulator_a_weight():
    """What is kept of a weight is never larger than its gradient: beyond that it is an accumulator."""
    model = mlp(64, 64, 64, 64)
    kept = []

    def watch(run, gradient, *rest):
        layer(run, gradient, *rest)
        held = sum(g.nbytes + x.nbytes for g, x, _ in gradient.pairs)
        kept.append((held, 0 if gradient.total is None else gradient.total.nbytes))

    layer = calibration._Run._layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration._Run, "_layer", watch)
        streamed(model, places(model, "0.weight", "2.weight", "4.weight"), some(6, 12, 64))
    limit = 64 * 64 * 4
    assert all(held + total <= limit for held, total in kept)
    assert any(held > 0 for held, _ in kept)
    assert any(total > 0 for _, total in kept)


def test_nothing_is_kept_afterwards():
    model = mlp(32, 32, 32)
    refs = []
    calibration.stream(
        model, places(model, "0.weight"), some(2, 3, 32), square, lambda _, g: refs.append(weakref.ref(g))
    )
    gc.collect()
    assert [ref() for ref in refs] == [None]


def state_of(model):
    return (
        {name: (p.detach().clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()},
        {name: b.clone() for name, b in model.named_buffers()},
        {name: (b, id(b)) for name, b in model.named_buffers()},
        {name: m.training for name, m in model.named_modules()},
        {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        torch.get_rng_state(),
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_as_before(training, fails):
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Conv1d(6, 6, 1), nn.Flatten())
    model.train(training)
    model[1].eval()
    model[1].train(training)
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones(6, 6)
    grad = model[0].weight.grad

    def loss(model, batch):
        x = model[2](model[1](model[0](batch)))
        model.train()
        if fails:
            raise KeyError("planted")
        return model[3](x[:, :, None]).square().mean() + torch.rand(())

    before = state_of(model)
    weights = places(model, "0.weight", "3.weight")
    if fails:
        with pytest.raises(KeyError, match="planted"):
            streamed(model, weights, some(2, 4, 6), loss)
    else:
        assert len(streamed(model, weights, some(2, 4, 6), loss)) == 2
    after = state_of(model)
    for name, (weight, requires_grad, kept) in before[0].items():
        assert torch.equal(after[0][name][0], weight)
        assert after[0][name][1] == requires_grad
        assert after[0][name][2] is kept
    assert model[0].weight.grad is grad
    assert torch.equal(grad, torch.ones(6, 6))
    assert all(torch.equal(after[1][name], buffer) for name, buffer in before[1].items())
    assert {name: at for name, (_, at) in after[2].items()} == {name: at for name, (_, at) in before[2].items()}
    assert after[3:5] == before[3:5]
    assert torch.equal(after[5], before[5])


def test_what_modules_remember_of_calibration_is_forgotten():
    """A cache in a buffer, and the length that the module notes for it, go back together."""

    class Cached(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.length, self.last = 0, None
            self.register_buffer("cache", torch.zeros(0), persistent=False)

        def forward(self, input):
            if input.shape[0] > self.length:
                self.length = input.shape[0]
                self.register_buffer("cache", torch.ones(self.length, 1), persistent=False)
            self.last = "called"
            return super().forward(input) * self.cache

    model = Cached()
    streamed(model, places(model, "weight"), some(2, 3, 4))
    assert (model.length, model.last, model.cache.shape) == (0, None, (0,))


def test_a_layer_whose_forward_was_replaced():
    model = mlp(4, 4, dtype=torch.float64)
    layer = model[0]
    layer.forward = lambda input: nn.functional.linear(input, layer.weight.square())
    batches = some(2, 3, 4, dtype=torch.float64)
    given = streamed(model, places(model, "0.weight"), batches)
    for batch in batches:
        square(model, batch).backward()
    torch.testing.assert_close(given["0.weight"], layer.weight.grad)


def test_a_hook_of_all_modules_is_refused():
    model = mlp(4, 4)
    handle = register_module_forward_hook(lambda module, args, output: output * 3)
    with pytest.raises(RuntimeError, match=r"calibration: a forward hook of all modules .* runs before"):
        streamed(model, places(model, "0.weight"), some(1, 3, 4))
    handle.remove()


# Masks by gradients


@pytest.mark.parametrize("granule", [1, 4])
@pytest.mark.parametrize("kind", [masks.Grad, masks.Snip])
def test_masks_are_the_top_of_the_scores(kind, granule):
    model, batches = mlp(16, 24, 8), some(3, 5, 16)
    mask = kind(density=0.1, granule=granule)
    gradients = dense(model, ["0.weight", "2.weight"], batches)
    tuner = shira.SparseTuner(model, mask, calibration=batches, loss=square)
    for name, gradient in gradients.items():
        weight = model.get_parameter(name).detach()
        score = (gradient if kind is masks.Grad else gradient * weight).abs().view(-1, granule).double().sum(1)
        k = max(1, round(0.1 * weight.numel() / granule))
        chosen = model.get_submodule(name.rpartition(".")[0]).weight_shira_indices.long()
        assert set(chosen.tolist()) == set(np.argsort(-score.numpy(), kind="stable")[:k].tolist())
    assert tuner.adapter().mask == mask.describe() == {"name": kind.__name__, "density": 0.1, "granule": granule}
    tuner.detach()


def test_signed_gradients_cancel():
    """Two batches whose gradients cancel in some entries: |sum| and not sum of |.|."""
    model = nn.Linear(2, 1, bias=False)
    batches = [torch.tensor([[5.0, 1.0]]), torch.tensor([[-5.0, 1.0]])]
    mask = masks.Grad(density=0.5)
    mask.prepare(model, {"weight": [(model, "weight")]}, batches, lambda model, batch: model(batch).sum())
    assert mask("weight", model.weight).tolist() == [1]


@pytest.mark.parametrize(
    ("mask", "options", "says"),
    [
        (masks.Snip(density=0.1), {}, "Snip: needs calibration batches"),
        (masks.Grad(density=0.1), {"loss": square}, "Grad: needs calibration batches"),
        (masks.Rand(density=0.1), {"calibration": some(1, 2, 4)}, "Rand: needs no calibration batches"),
        (masks.WeightMagnitude(density=0.1), {"loss": square}, "WeightMagnitude: needs no loss"),
        (masks.Snip(density=0.1), {"calibration": []}, "calibration has no batches"),
        (masks.Snip(density=0.1), {"calibration": torch.zeros(2, 4)}, "got one Tensor; put it in a list"),
        (masks.Snip(density=0.1), {"calibration": {"x": torch.zeros(2, 4)}}, "got one dict; put it in a list"),
        (masks.Snip(density=0.1), {"calibration": ["text"]}, "must be a mapping, a tuple, a list or a tensor, got str"),
        (
            masks.Snip(density=0.1),
            {"calibration": some(1, 2, 4)},
            r"batch 0 must be a scalar tensor, got shape \[2, 4\]",
        ),
        (
            masks.Snip(density=0.1),
            {"calibration": some(1, 2, 4), "loss": lambda model, batch: torch.zeros(())},
            "the loss of batch 0 depends on none of the targeted weights",
        ),
        (masks.Snip(density=0.1), {"calibration": [0], "loss": lambda model, batch: batch}, "scalar tensor, got int"),
    ],
)
def test_refusals(mask, options, says):
    model = mlp(4, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=says):
        shira.SparseTuner(model, mask, **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_weight_without_gradient_is_named():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "left": nn.Linear(4, 4), "plain": nn.Conv1d(4, 4, 1)})
    weights = places(model, "used.weight", "left.weight", "plain.weight")
    with pytest.raises(RuntimeError, match=r"no gradient reached left.weight, plain.weight in 2 batches"):
        streamed(model, weights, some(2, 2, 4), lambda model, batch: square(model["used"], batch))


def test_a_gradient_that_is_not_finite_is_named():
    model = mlp(4, 4, 4)
    weights = places(model, "0.weight", "2.weight")
    with pytest.raises(RuntimeError, match=r"gradient of 2.weight is not finite \(the loss of batch 1 is nan\)"):
        streamed(model, weights, [torch.ones(1, 4), torch.full((1, 4), float("nan"))])

    def steep(model, batch):  # a finite loss whose gradient is infinite
        return model[0](batch).square().mean() + (model[2](batch) * 0).abs().sqrt().sum()

    with pytest.raises(RuntimeError, match=r"gradient of 2.weight is not finite$"):
        streamed(model, weights, [torch.ones(1, 4)], steep)


def test_a_mask_by_gradients_alone_says_what_it_lacks():
    with pytest.raises(ValueError, match=r"Snip: has no gradient of fc.weight"):
        masks.Snip(density=0.1)("fc.weight", torch.zeros(4, 4))
