"""What a tuner finds, keeps and refuses: targets by name, states, saved adapters, copies, several processes."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

from shira import AdamW, Adapter, AdapterError, Entry, SparseTuner, masks
from tuning import VALUES, bits, indices_of, randomize, same_bits

RAND = masks.Rand(density=0.25, seed=1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = nn.ParameterDict(
            {"up": nn.Parameter(torch.zeros(2, 8, 8)), "bias": nn.Parameter(torch.zeros(8))}
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.q_proj(x))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        y: Tensor = h + torch.einsum("bti,eoi->bto", h, self.experts["up"]) + self.experts["bias"]
        return y


class Model(nn.Module):
    """Something of everything; the head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(12, 8), nn.ModuleList([Block(), Block()])
        self.head, self.classifier = nn.Linear(8, 12, bias=False), nn.Linear(12, 3)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.classifier(self.head(x).tanh())
        return y


IDS = torch.arange(10).view(2, 5)
EVERYTHING = r"q_proj|attention|experts|embed"


def model_of(seed: int = 0) -> Model:
    model = randomize(Model(), seed)
    assert isinstance(model, Model)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        model(IDS).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


# Targets


def names(targets: Any, whole: Any = None) -> list[str]:
    with SparseTuner(model_of(), RAND, targets, whole=whole) as tuner:
        return [name.removesuffix(VALUES) for name, _ in tuner.named_parameters()]


def test_names_and_patterns() -> None:
    q = ["layers.0.q_proj.weight", "layers.1.q_proj.weight"]
    out = [f"layers.{n}.attention.out_proj.weight" for n in (0, 1)]
    within = [f"layers.{n}.attention.in_proj_weight" for n in (0, 1)]
    up = [f"layers.{n}.experts.up" for n in (0, 1)]
    usual = ["embed.weight", q[0], out[0], up[0], q[1], out[1], up[1], "classifier.weight"]
    assert names(None) == names("all-linear") == usual
    # A module's name means its weights, and not the biases and norms that come along.
    assert names("q_proj") == names(["q_proj"]) == q
    assert sorted(names("attention")) == sorted(names(["attention"])) == sorted(within + out)
    assert names("experts") == names(["experts"]) == up
    assert names(r"layers\.0\.") == [q[0], within[0], out[0], up[0]]
    # A parameter's name means that parameter.
    assert names(r"up$") == names(["up"]) == up
    assert names(r"q_proj\.bias$") == ["layers.0.q_proj.bias", "layers.1.q_proj.bias"]
    assert names(["layers.1.norm.weight"]) == ["layers.1.norm.weight"]
    # A tied weight goes by its first name, whichever is asked for.
    assert names("head$") == names(["embed"]) == ["embed.weight"]
    assert names("q_proj", r"^classifier\.") == [*q, "classifier.weight", "classifier.bias"]
    norms = ["layers.0.norm.bias", "layers.1.norm.bias"]
    assert names("q_proj", ["classifier", "norm.bias"]) == [*q, *norms, "classifier.weight", "classifier.bias"]
    # What trains as a whole is not a sparse target, too.
    assert names(None, "classifier|head").count("classifier.weight") == 1
    assert names([], "classifier") == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"targets": "nothing"}, r"'nothing' matches no module with weights and no parameter; the model has embed"),
        ({"targets": ["nothing"]}, "target 'nothing' names no weight"),
        ({"targets": ["norm"]}, "target 'norm' is a LayerNorm and names no weight"),
        ({"targets": "("}, "is not a regular expression"),
        ({"targets": []}, "targets is empty, so nothing would train"),
        ({"whole": "nothing"}, "whole 'nothing' matches no parameter"),
        ({"whole": ["nothing"]}, "whole 'nothing' names no parameter"),
        ({"overlay": "yes"}, "overlay must be True or False, got 'yes'"),
        ({"gradient": "exact"}, 'gradient must be "sampled" or "dense", got \'exact\''),
        ({"mask": masks.Rand(density=0.1, granule=16)}, r"granule 16 must divide .* embed\.weight \[12, 8\]"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_changes(arguments: dict[str, Any], says: str) -> None:
    model = model_of()
    before = bits(model)
    with pytest.raises((ValueError, TypeError), match=says):
        SparseTuner(model, arguments.pop("mask", RAND), **arguments)
    assert same_bits(model, before)
    assert all(p.requires_grad for p in model.parameters())


def layer(weight: Any = None, kind: Any = nn.Linear, **options: Any) -> nn.Sequential:
    module = kind(8, 8, **options)
    if weight is not None:
        module.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    return nn.Sequential(module)


def with_gradient() -> nn.Sequential:
    model = layer()
    model(torch.ones(1, 8)).sum().backward()
    return model


def views() -> nn.Sequential:
    one, two = nn.Linear(8, 8), nn.Linear(8, 8)
    two.weight = nn.Parameter(one.weight.detach())
    return nn.Sequential(one, two)


CANNOT = {
    "int8": (lambda: layer(torch.zeros(8, 8, dtype=torch.int8)), r"0\.weight must be .* got int8: the codes"),
    "fp8": (lambda: layer(torch.zeros(8, 8).to(torch.float8_e4m3fn)), r"0\.weight must be .* got float8_e4m3fn; leave"),
    "complex": (lambda: layer(torch.zeros(8, 8, dtype=torch.complex64)), r"0\.weight must be .* got complex64"),
    "meta": (lambda: layer(torch.zeros(8, 8, device="meta")), r"0\.weight is on the meta device"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(8)), r"0\.weight has no shape yet; run the model once"),
    "strided": (lambda: layer(torch.zeros(8, 16)[:, :8]), r"0\.weight must be contiguous; make it so with"),
    "stale gradient": (with_gradient, r"0\.weight still has a gradient of earlier training; call model\.zero_grad"),
    "parametrized": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8))),
        r"0\.weight is not a parameter of its module \(parametrized",
    ),
    "max_norm": (lambda: layer(kind=nn.Embedding, max_norm=1.0), r"0\.weight is changed by .* \(max_norm=1\)"),
    "one memory": (views, r"0\.weight and 1\.weight are two parameters in one memory"),
    "empty": (lambda: nn.Sequential(nn.Linear(8, 0)), r"no weight may be empty, got 0\.weight \[0, 8\]"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning", "ignore:Initializing zero-element:UserWarning")
@pytest.mark.parametrize("what", CANNOT)
def test_weights_that_cannot_train_are_named(what: str) -> None:
    make, says = CANNOT[what]
    with pytest.raises(ValueError, match=says):
        SparseTuner(make(), RAND, ["0"])


def test_a_parametrized_weight_trains_by_its_original() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)))
    before = bits(model)
    with SparseTuner(model, RAND, "original1$") as tuner:
        model(torch.ones(2, 8)).square().sum().backward()
        AdamW(tuner, lr=0.1).step()
        assert not same_bits(model, before)
    assert same_bits(model, before)


# States


def test_summary_is_a_table() -> None:
    with SparseTuner(model_of(), RAND, EVERYTHING, whole="classifier") as tuner:
        lines = tuner.summary().splitlines()
    cells = [line.split() for line in lines]
    assert cells[0] == ["weight", "weights", "shape", "entries", "density", "granule", "gradient", "tied", "to"]
    assert cells[1] == ["embed.weight", "1", "12x8", "24", "25.00%", "1", "sampled", "head.weight"]
    assert cells[2] == ["layers.*.q_proj.weight", "2", "8x8", "16", "25.00%", "1", "sampled"]
    assert ["layers.*.experts.up", "2", "2x8x8", "32", "25.00%", "1", "dense"] in cells
    assert ["classifier.bias", "1", "3", "3", "100.00%", "whole", "dense"] in cells
    assert lines[-1].startswith("287 trainable entries: ")
    assert len({line.index("sampled") for line in lines if "sampled" in line}) == 1


def test_whole_parameters_are_part_of_the_adapter(tmp_path: Path) -> None:
    model = model_of()
    before = bits(model)
    with SparseTuner(model, RAND, "q_proj", whole="classifier") as tuner:
        train(model, AdamW(tuner, lr=0.1))
        adapter = tuner.adapter()
        adapter.save(tmp_path / "a.safetensors")
        loaded = Adapter.load(tmp_path / "a.safetensors")
        for name in ("classifier.weight", "classifier.bias"):
            entry = loaded.weights[name]
            assert entry.whole
            assert torch.equal(entry.values.view(entry.shape), model.get_parameter(name).detach())
            assert not torch.equal(bits(model)[name], before[name])
        assert not loaded.weights["layers.0.q_proj.weight"].whole
    assert same_bits(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_on_from_an_adapter(dtype: torch.dtype) -> None:
    model = model_of().to(dtype)
    before = bits(model)
    tuner = SparseTuner(model, RAND, EVERYTHING, whole="classifier")
    train(model, AdamW(tuner, lr=0.1))
    adapter = tuner.adapter(alpha=0.5)
    tuned = bits(model)
    tuner.detach()
    with SparseTuner.from_adapter(model, adapter) as again:
        assert same_bits(model, {**bits(model), **{n: t for n, t in tuned.items() if "shira" not in n}})
        assert again.mask is None
        unchanged = again.adapter()
        assert unchanged.alpha == 0.5
        assert unchanged.mask == adapter.mask
        for name, entry in adapter.weights.items():
            other = unchanged.weights[name]
            assert torch.equal(entry.indices, other.indices)
            assert torch.equal(entry.values, other.values)
            assert (entry.fingerprint, entry.seed, entry.aliases, entry.granule) == (
                other.fingerprint, other.seed, other.aliases, other.granule)  # fmt: skip
        train(model, AdamW(again, lr=0.1))
        assert not torch.equal(again.adapter().weights["embed.weight"].values, adapter.weights["embed.weight"].values)
    assert same_bits(model, before)


def test_a_delta_starts_at_base_plus_delta() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    base = model[0].weight.detach().clone().view(-1)
    entry = Entry(torch.tensor([1, 6]), torch.tensor([0.5, -2.0]), (4, 4), torch.float32)
    with SparseTuner.from_adapter(model, Adapter({"0.weight": entry}, delta=True)) as tuner:
        (values,) = tuner.parameters()
        assert torch.equal(values.detach(), base[[1, 6]] + entry.values)
        assert torch.equal(model[0].weight.detach().view(-1)[[1, 6]], values.detach())
        assert not tuner.adapter().delta
    with pytest.raises(AdapterError, match="changes no weight"):
        SparseTuner.from_adapter(model, Adapter({}))


def test_a_tuners_state_continues_bit_for_bit() -> None:
    results = []
    for stop in (False, True):
        model = model_of().bfloat16()
        tuner = SparseTuner(model, RAND, EVERYTHING, whole="classifier")
        optimizer = AdamW(tuner, lr=0.01)
        train(model, optimizer)
        if stop:
            buffer = io.BytesIO()
            torch.save([tuner.state_dict(), optimizer.state_dict()], buffer)
            buffer.seek(0)
            state, inner = torch.load(buffer, weights_only=True)
            model = model_of().bfloat16()
            tuner = SparseTuner(model, RAND, EVERYTHING, whole="classifier")
            tuner.load_state_dict(state)
            optimizer = AdamW(tuner, lr=0.01)
            optimizer.load_state_dict(inner)
        train(model, optimizer)
        results.append(bits(model))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_states_of_others_are_refused_and_change_nothing() -> None:
    def tuner_of(mask: Any = RAND, targets: Any = EVERYTHING, seed: int = 0) -> SparseTuner:
        return SparseTuner(model_of(seed), mask, targets)

    state = tuner_of().state_dict()
    for other, says in (
        (tuner_of(masks.Rand(density=0.25, seed=2)), r"embed\.weight has other entries \(another mask\)"),
        (tuner_of(masks.Rand(density=0.25, granule=2)), r"embed\.weight has another granule"),
        (tuner_of(seed=1), r"embed\.weight has another base"),
        (tuner_of(targets="q_proj|classifier"), r"it lacks classifier\.weight, and also has embed\.weight"),
    ):
        before = bits(other.model)
        with pytest.raises(ValueError, match=says):
            other.load_state_dict(state)
        assert same_bits(other.model, before)
    with pytest.raises(ValueError, match="this is not a state of a tuner"):
        tuner_of().load_state_dict({"model": 1})


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loaded_model_state_writes_the_weights(compiled: bool) -> None:
    """Also where the weight that came along is another one, and where a compiled forward would check no version."""
    model, other = model_of(), model_of()
    tuner, other_tuner = (SparseTuner(m, RAND, EVERYTHING) for m in (model, other))
    train(model, AdamW(tuner, lr=0.1))
    called = torch.compile(other, backend="eager") if compiled else other
    if compiled:
        called(IDS)
    state = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(VALUES)}
    other.load_state_dict(state, strict=False)
    for name, values in other_tuner.named_parameters():
        weight = other.get_parameter(name.removesuffix(VALUES)).detach().view(-1)
        assert torch.equal(weight[indices_of(other, name).long()], values.detach())
    with torch.no_grad():
        torch.testing.assert_close(called(IDS), model(IDS))
    for one in (tuner, other_tuner):
        one.detach()


def test_replacing_the_values_is_refused() -> None:
    model = model_of()
    SparseTuner(model, RAND, "q_proj")
    with pytest.raises(RuntimeError, match=r"q_proj\.weight_shira_values was replaced, .*assign=False"):
        model.load_state_dict(model.state_dict(), assign=True)


def test_other_memory_under_the_values_is_followed() -> None:
    """It moves no version: torch's own ``vector_to_parameters`` does it."""
    model = nn.Linear(8, 8)
    tuner = SparseTuner(model, masks.Rand(density=0.2))
    nn.utils.vector_to_parameters(torch.arange(1.0, tuner.nnz + 1), tuner.parameters())
    model(torch.randn(1, 8))
    at = model.get_buffer("weight_shira_indices").long()
    assert model.weight.view(-1)[at].tolist() == list(range(1, tuner.nnz + 1))


def test_edits_by_hand_are_followed() -> None:
    model = model_of()
    with SparseTuner(model, RAND, EVERYTHING) as tuner, torch.no_grad():
        for values in tuner.parameters():
            values.add_(1.0)
        model(IDS)
        for name, values in tuner.named_parameters():
            weight = model.get_parameter(name.removesuffix(VALUES)).view(-1)
            assert torch.equal(weight[indices_of(model, name).long()], values)


def test_copies_and_pickles_compute_and_sampled_ones_train() -> None:
    model = model_of()
    tuner = SparseTuner(model, RAND, "q_proj|embed")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(IDS), model(IDS))
        with torch.no_grad():
            other.get_parameter("embed.weight" + VALUES).add_(1.0)
        assert not torch.equal(other(IDS), model(IDS))
        before = bits(model)
        values = [p for n, p in other.named_parameters() if n.endswith(VALUES)]
        was = other(IDS).detach()
        train(other, torch.optim.SGD(values, lr=0.1), 1)
        assert not torch.equal(other(IDS), was)
        assert same_bits(model, before)
    tuner.detach()


def test_a_copy_whose_dense_weight_would_train_is_refused() -> None:
    model = model_of()
    says = r"dense gradient of layers\.0\.experts\.up would train all of it"
    with SparseTuner(model, RAND, "experts"), pytest.raises(RuntimeError, match=says):
        copy.deepcopy(model)(IDS)


def test_a_sampled_weight_that_was_unfrozen_is_refused() -> None:
    """All of it would train: the adapter would lack most of that, and detaching would not give the base back."""
    model = nn.Sequential(nn.Linear(8, 4))
    with SparseTuner(model, masks.Rand(density=0.2)):
        model[0].bias.requires_grad_(True)  # what no tuner trains may be trained beside it
        model(torch.randn(2, 8))
        model.requires_grad_(True)
        with pytest.raises(RuntimeError, match=r"dense gradient of 0\.weight would train all of it.*were unfrozen"):
            model(torch.randn(2, 8))


def test_tied_weights_come_back_trainable() -> None:
    """They are met under two names and remembered once."""
    model = model_of()
    with SparseTuner(model, RAND, "embed"):
        assert not model.embed.weight.requires_grad
    assert model.embed.weight.requires_grad


@pytest.mark.parametrize("gradient", ["sampled", "dense"])
@pytest.mark.parametrize("first", [True, False])
def test_tuners_of_one_model_may_go_in_any_order(first: bool, gradient: str) -> None:
    """While one is left, all of the model except what it trains stays frozen; after the last it is as it was."""
    model = randomize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    model[0].bias.requires_grad_(False)
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    before = bits(model)
    tuners = [SparseTuner(model, masks.Rand(density=0.2), targets=[name], gradient=gradient) for name in ("0", "1")]
    gone, left = tuners if first else reversed(tuners)
    gone.detach()
    optimizer = AdamW(left, lr=0.1)
    model(torch.randn(3, 8)).square().mean().backward()
    optimizer.step()
    trained = {id(p) for p in left.parameters()}
    assert [name for name, p in model.named_parameters() if p.grad is not None and id(p) not in trained] == []
    left.detach()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert same_bits(model, before)


def test_a_tuner_is_neither_copied_nor_pickled() -> None:
    """A copy would know the first one's modules, and hand out their entries as its own."""
    tuner = SparseTuner(nn.Linear(8, 4), masks.Rand(density=0.2))
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled; keep tuner\.state_dict\(\)"):
            attempt(tuner)


def test_inference_mode_is_refused_by_name() -> None:
    with torch.inference_mode():
        made = nn.Linear(8, 4)
        with pytest.raises(RuntimeError, match=r"under torch\.inference_mode cannot train"):
            SparseTuner(nn.Linear(8, 4), masks.Rand(density=0.2))
    with pytest.raises(ValueError, match=r"SparseTuner: weight was made under torch\.inference_mode"):
        SparseTuner(made, masks.Rand(density=0.2))


def test_two_tuners_train_side_by_side() -> None:
    model = model_of()
    before = bits(model)
    first, second = SparseTuner(model, RAND, "experts|embed"), SparseTuner(model, RAND, "q_proj")
    with pytest.raises(ValueError, match=r"head\.weight is already trained by a tuner"):
        SparseTuner(model, RAND, "head")
    train(model, AdamW([*first.parameters(), *second.parameters()], lr=0.1))
    for tuner in (first, second):
        assert all((values.detach() != tuned.plan.saved).any() for tuned in tuner._tuned for values in [tuned.values])
    second.detach()
    train(model, AdamW(first, lr=0.1))
    first.detach()
    assert same_bits(model, before)
    assert all(p.requires_grad for p in model.parameters())


# Several processes


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # Not a TCPStore: its thread may outlive the rank that serves it, and abort the process.
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = model_of()
    tuner = SparseTuner(model, RAND, EVERYTHING, whole="classifier")
    if rank:
        with torch.no_grad():  # the first one's values are everybody's
            for values in tuner.parameters():
                values.add_(1.0)
    wrapped = DistributedDataParallel(model)
    optimizer = AdamW(tuner, lr=0.01)
    for _ in range(3):
        (wrapped(IDS[rank : rank + 1]).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(bits(model), f"{folder}/{rank}.pt")
    tuner.detach()
    _refused(rank, wrapped)
    torch.distributed.destroy_process_group()


def test_what_distributed_data_parallel_leaves_alone() -> None:
    """Under every name it may look for: of a tied weight both, of a compiled module, of the root's own."""
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    model._ddp_params_and_buffers_to_ignore = ["1.bias"]
    dense, root = SparseTuner(model, RAND, "0", gradient="dense"), nn.Linear(8, 8)
    weights = {
        f"{outer}{name}" for outer in ("", "_orig_mod.") for name in ("0.weight", "1.weight", "0.weight_shira_indices")
    }
    assert set(model._ddp_params_and_buffers_to_ignore) == {"1.bias", *weights}
    dense.detach()
    assert model._ddp_params_and_buffers_to_ignore == ["1.bias"]
    with SparseTuner(root, RAND):
        names = {"weight_shira_indices", ".weight_shira_indices", "_orig_mod.weight_shira_indices"}
        assert set(root._ddp_params_and_buffers_to_ignore) == names
    assert not hasattr(root, "_ddp_params_and_buffers_to_ignore")


def _refused(rank: int, wrapped: DistributedDataParallel) -> None:
    """Ranks that would drift apart are stopped at their first step, all of them, and have their base back."""

    def step(tuner: SparseTuner, wrapped: nn.Module) -> None:
        (wrapped(IDS).square().sum()).backward()
        AdamW(tuner, lr=0.01).step()

    with pytest.raises(
        ValueError, match=r"model is already in DistributedDataParallel, .* attach the tuner to the mod"
    ):
        SparseTuner(wrapped)
    with pytest.raises(ValueError, match=r"SparseTuner: 0 is already in DistributedDataParallel"):
        SparseTuner(nn.Sequential(wrapped))
    late = SparseTuner(wrapped.module, RAND, "q_proj")
    with pytest.raises(
        RuntimeError, match=r"was wrapped in DistributedDataParallel before .* values of layers\.0\.q_pr"
    ):
        step(late, wrapped)
    step(late, DistributedDataParallel(wrapped.module))
    with SparseTuner(model_of(), RAND, "up$") as dense, pytest.raises(RuntimeError, match=r"is wrapped \(Sequential\)"):
        step(dense, DistributedDataParallel(nn.Sequential(dense.model)))
    with SparseTuner(model_of(), RAND, "up$") as dense:
        seeking = DistributedDataParallel(dense.model, find_unused_parameters=True)
        with pytest.raises(RuntimeError, match=r"find_unused_parameters=True\) takes the values of .* for unused"):
            step(dense, seeking)
    for outer in (False, True):  # inside another module DDP does overwrite the indices
        model = model_of()
        before = bits(model)
        tuner = SparseTuner(model, masks.Rand(density=0.2, seed=rank), "q_proj")
        with pytest.raises(RuntimeError, match=r"ranks have different masks for layers\.0\.q_proj\.weight, layers"):
            step(tuner, DistributedDataParallel(nn.Sequential(model) if outer else model))
        tuner.detach()
        assert same_bits(model, before)
        assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
    tuner = SparseTuner(model_of(seed=rank), RAND, "q_proj")
    with pytest.raises(RuntimeError, match=r"ranks have different base weights for layers\.0\.q_proj\.weight, layers"):
        step(tuner, DistributedDataParallel(tuner.model))


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Two processes, one sample each: what one process does with both. Sampled, dense and whole ones alike."""
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    given = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    model = model_of()
    optimizer = AdamW(SparseTuner(model, RAND, EVERYTHING, whole="classifier"), lr=0.01)
    for _ in range(3):
        (model(IDS).square().sum() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, expected in bits(model).items():
        assert torch.equal(given[0][name], given[1][name]), name
        if "indices" not in name:
            torch.testing.assert_close(
                given[0][name].view(torch.float32), expected.view(torch.float32), rtol=1e-4, atol=1e-5, msg=name
            )
