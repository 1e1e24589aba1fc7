"""What a tuner trains when it is told little, what it leaves out, and the weights it cannot take."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shira
from shira import AdamW, SparseTuner, Switcher, _model, masks
from shira.masks import calibration
from tuning import VALUES, bits, same_bits

RAND = masks.Rand(density=0.2)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.bias = nn.Parameter(torch.randn(3, 8, 8)), nn.Parameter(torch.zeros(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eoi->...o", x, self.up) + self.bias.sum(0)


class Language(nn.Module):
    """Like transformers' models: a body, a head that a method names, a 3-D position, experts."""

    def __init__(self, tied: bool = False, layers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.position = nn.Embedding(16, 8), nn.Parameter(torch.randn(1, 4, 8))
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8), "experts": Experts()}) for _ in range(layers)
        )
        self.lm_head = nn.Linear(8, 16, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position
        for layer in self.layers:
            x = x + layer["experts"](layer["q_proj"](x))
        logits: Tensor = self.lm_head(x)
        return logits


class Vision(nn.Module):
    """Like timm's models."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 6, 3), nn.Linear(10, 6)
        self.head = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))

    def get_classifier(self) -> nn.Module:
        return self.head


class Classifier(nn.Module):
    """Like transformers' classification models: no output embeddings, and a head that is known by its name."""

    def __init__(self, body: bool = True) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8) if body else nn.Identity()
        self.classifier = nn.Linear(8, 2)

    def get_output_embeddings(self) -> None:
        return None


def names(model: nn.Module, targets: Any = None, **options: Any) -> list[str]:
    with SparseTuner(model, RAND, targets, **options) as tuner:
        return [name.removesuffix(VALUES) for name, _ in tuner.named_parameters()]


# Which ones


def test_the_output_head_is_left_out_and_experts_are_taken() -> None:
    inside = ["layers.0.q_proj.weight", "layers.0.experts.up"]
    for tied in (False, True):
        model = Language(tied)
        assert names(model) == names(model, "all-linear") == inside
        assert names(nn.ModuleDict({"policy": model})) == [f"policy.{name}" for name in inside]
        # It is trained if it is named.
        assert names(model, "lm_head") == ["embed.weight" if tied else "lm_head.weight"]
    assert names(Language(), None, whole="lm_head") == [*inside, "lm_head.weight"]
    assert names(Vision()) == ["mix.weight"]
    assert names(Classifier()) == ["body.weight"]
    # Nothing says that there is a head here.
    assert names(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))) == ["0.weight", "1.weight"]


def test_a_head_that_is_left_out_is_told() -> None:
    with SparseTuner(Language(), RAND) as tuner:
        assert tuner.summary().splitlines()[-1] == "left out: lm_head, the output head"
    for options in ({"whole": "lm_head"}, {"targets": "q_proj"}):
        with SparseTuner(Language(), RAND, **options) as tuner:
            assert "left out" not in tuner.summary()
    with pytest.raises(
        ValueError, match=r"only linear layer is its output head \(classifier\), which is left out unles"
    ):
        SparseTuner(Classifier(body=False), RAND)


def test_methods_of_another_meaning_tell_of_no_head() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    meanings: list[tuple[Any, list[str]]] = [
        (lambda: "1", ["0.weight", "1.weight"]),
        (lambda which: model[1], ["0.weight", "1.weight"]),
        (lambda: (None, model[1]), ["0.weight"]),
    ]
    for tell, left in meanings:
        model.get_classifier = tell
        assert names(model) == left


@pytest.mark.parametrize(
    ("targets", "exclude", "left"),
    [
        (None, r"layers\.0\.", ["layers.1.q_proj.weight", "layers.1.experts.up"]),
        (None, ["layers.0"], ["layers.1.q_proj.weight", "layers.1.experts.up"]),
        (None, "experts$", ["layers.0.q_proj.weight", "layers.1.q_proj.weight"]),
        ("all-linear", ["experts", "1.q_proj.weight"], ["layers.0.q_proj.weight"]),
        ("q_proj|embed", ["layers"], ["embed.weight"]),
        ("q_proj|embed", "lm_head", ["layers.0.q_proj.weight", "layers.1.q_proj.weight"]),  # tied
        (["up"], r"0\.experts\.up", ["layers.1.experts.up"]),
    ],
)
def test_exclude(targets: Any, exclude: Any, left: list[str]) -> None:
    assert names(Language(tied=True, layers=2), targets, exclude=exclude) == left


def test_exclude_takes_out_what_could_not_train() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError,
        match=r"0\.weight is not a parameter of its module .* leave it out with exclude=, or name .* has 0\.bias",
    ):
        SparseTuner(model, RAND)
    assert names(model, exclude=["0", "2"]) == ["1.weight"]


@pytest.mark.parametrize(
    ("exclude", "says"),
    [
        ("nothing", r"exclude 'nothing' names nothing; the model has position, embed"),
        (["q_proj", "nothing"], "exclude 'nothing' names nothing"),
        ("(", r"exclude '\(' is not a regular expression"),
        (5, "exclude must be a pattern or a list of names, got int"),
        (["layers"], r"exclude leaves none of the targets layers\.0\.q_proj\.weight, layers\.0\.experts\.up"),
    ],
)
def test_an_exclude_that_does_not_fit(exclude: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SparseTuner(Language(), RAND, exclude=exclude)


def test_a_compiled_layer_goes_by_its_own_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0] = torch.compile(model[0], backend="eager")
    assert names(model) == names(model, "weight") == ["0.weight", "1.weight"]


def test_a_wrapper_without_processes_is_looked_through() -> None:
    """Names are the module's own, and what the wrapper runs trains."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    wrapped = nn.DataParallel(model)
    before = bits(model)
    with SparseTuner(wrapped, RAND) as tuner:
        assert tuner.model is model
        assert list(tuner.adapter().weights) == ["0.weight", "1.weight"]
        wrapped(torch.ones(2, 8)).square().sum().backward()
        AdamW(tuner, lr=0.1).step()
        assert not same_bits(model, before)
        with pytest.raises(
            RuntimeError, match=r"DataParallel runs copies .* use DistributedDataParallel, or one device"
        ):
            model[0]._replicate_for_data_parallel()(torch.ones(2, 8))  # as it makes them for each device
    assert same_bits(model, before)


# Granules by weight


def test_the_default_mask_takes_of_each_weight_the_largest_granule_that_fits() -> None:
    model = nn.Sequential(
        nn.Linear(32, 4), nn.Linear(8, 4), nn.Linear(12, 4), nn.Linear(10, 4), nn.Conv2d(3, 4, 3), nn.Linear(48, 4)
    )
    mask = masks.default()
    with SparseTuner(model, targets="[0-5]") as tuner:
        given = dict(tuner.adapter().weights)
        assert [entry.granule for entry in given.values()] == [16, 8, 4, 2, 1, 16]
        says = (
            "4 weights have granules of less than 16 entries, since 16 does not divide their last dimension: 1.weight"
        )
        assert tuner.summary().splitlines()[-1].startswith(says)
        assert tuner.adapter().mask == {"name": "Rand", "density": 0.01, "granule": "auto", "seed": 0}
    for name, entry in given.items():
        weight = model.get_parameter(name).detach()
        expected = masks.Rand(density=0.01, granule=entry.granule)(name, weight)
        assert torch.equal(entry.indices, expected)
        assert torch.equal(mask(name, weight), expected)
    with SparseTuner(model, targets="0", whole=r"0\.bias") as tuner:
        assert "does not divide" not in tuner.summary()


@pytest.mark.parametrize("kind", [masks.WeightMagnitude, masks.Struct, masks.Rand])
def test_any_mask_takes_granules_by_weight(kind: Any) -> None:
    """And leaves out what another one has, whatever granules that has."""
    for shape, granule in (((8, 48), 16), ((8, 24), 8), ((8, 3), 1)):
        weight = torch.randn(shape)
        first = kind(density=0.3, granule="auto")
        assert torch.equal(first("w", weight), kind(density=0.3, granule=granule)("w", weight))
        rest = masks.Rand(density=0.2, granule="auto", skip=first)("w", weight)
        assert not set(rest.tolist()) & set(first("w", weight).tolist())


def test_an_explicit_granule_that_does_not_divide_says_what_to_do() -> None:
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(8)), nn.Linear(32, 4))
    with pytest.raises(ValueError, match=r"Rand: granule 16 must divide the last dimension of every weight") as caught:
        SparseTuner(model, masks.Rand(density=0.1, granule=16))
    shapes = ", ".join(f"{n}.weight [24, 24]" for n in range(6))
    assert str(caught.value).endswith(
        f'not so for 8 of 9: {shapes}, ... (8 in all); take granule="auto" (of each weight the largest up to 16 that '
        f"divides), or granule=8, or leave them out with exclude="
    )
    with pytest.raises(ValueError, match="granule must be a whole number of at least 1, or \"auto\", got 'most'"):
        masks.Rand(density=0.1, granule="most")  # type: ignore[arg-type]


# Tensors with no memory of their own


class Codes(Tensor):
    """As quantized weights are: wraps its codes, and swallows writes in place, for they go to a dequantized copy."""

    codes: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor) -> Codes:
        made: Codes = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.codes = codes
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Codes:
        return Codes(inner["codes"])

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten.detach.default:
            return Codes(args[0].codes)
        plain = [one.codes.float() if isinstance(one, Codes) else one for one in args]
        return op(*plain, **(kwargs or {}))


def quantized() -> nn.Parameter:
    return nn.Parameter(Codes(torch.randint(-8, 8, (8, 8), dtype=torch.int8)), requires_grad=False)


@pytest.fixture
def sharded() -> Iterator[nn.Parameter]:
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        yield nn.Parameter(distribute_tensor(torch.randn(8, 8), mesh, [Shard(0)]))
    finally:
        torch.distributed.destroy_process_group()


FOREIGN = {
    "quantized": r"is a Codes, a tensor that wraps others \(quantized\?\), so its entries cannot be changed in place",
    "sharded": r"is sharded \(a DTensor with placements \(Shard\(dim=0\),\)\), which is not supported yet",
    "sparse": r"must be dense, got torch\.sparse_coo",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_weight_without_memory_of_its_own_is_refused(kind: str, request: pytest.FixtureRequest) -> None:
    make: dict[str, Callable[[], nn.Parameter]] = {
        "quantized": quantized,
        "sharded": lambda: request.getfixturevalue("sharded"),
        "sparse": lambda: nn.Parameter(torch.randn(8, 8).relu().to_sparse()),
    }
    model, weight = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), make[kind]()
    model[0].weight = weight
    says = rf"0\.weight {FOREIGN[kind]}"
    # A tuner takes weights that are sharded, but all of them must be.
    tuner_says = r"1\.weight is not sharded, but 0\.weight is" if kind == "sharded" else says
    with pytest.raises(ValueError, match=f"SparseTuner: {tuner_says}"):
        SparseTuner(model, RAND)
    with pytest.raises(ValueError, match=f"SparseTuner: {tuner_says}"):
        SparseTuner(model, RAND, "1", whole=r"0\.weight")
    for mask in (RAND, masks.WeightMagnitude(density=0.1), masks.Given(lambda name, weight: weight > 0)):
        with pytest.raises(ValueError, match=f"{type(mask).__name__}: {says}"):
            mask("0.weight", weight)
    if kind == "sharded":  # calibration takes it, but the model itself does not run with plain inputs
        says = "mixed torch.Tensor and DTensor"
    with pytest.raises((ValueError, RuntimeError), match=says):
        calibration.stream(model, {"0.weight": [(model[0], "weight")]}, [torch.ones(1, 8)], None, lambda *_: None)
    # It does not get in the way of anything else.
    assert names(model, exclude=["0"]) == ["1.weight"]
    assert model[0].weight is weight


# Memory that overlaps, memory in another order


def test_weights_that_overlap_are_refused() -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(8, 24), "q": nn.Linear(8, 8), "out": nn.Linear(8, 8)})
    model["q"].weight = nn.Parameter(model["qkv"].weight.detach()[8:16])
    for targets in (None, "qkv", ["q"]):
        with pytest.raises(ValueError, match=r"qkv\.weight and q\.weight are different weights in overlapping memory"):
            SparseTuner(model, RAND, targets)
    assert names(model, "out") == ["out.weight"]
    assert names(model, exclude="q") == ["out.weight"]


def images() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))


def test_channels_last_is_refused_with_one_line_for_the_whole_model() -> None:
    model = images().to(memory_format=torch.channels_last)
    advice = "make it so with model.to(memory_format=torch.contiguous_format), which does the whole model"
    with pytest.raises(ValueError, match=r"0\.weight must be contiguous; ") as caught:
        SparseTuner(model, RAND, "[02]")
    assert str(caught.value).endswith(advice)
    plain = images()
    with SparseTuner(plain, RAND, "[02]") as tuner:
        adapter = tuner.adapter()
    with pytest.raises(shira.AdapterError, match=r"must be contiguous; ") as served:
        Switcher(model).add("a", adapter)
    assert advice in str(served.value)
    assert names(model.to(memory_format=torch.contiguous_format), "[02]") == ["0.weight", "2.weight"]


@pytest.mark.parametrize("gradient", ["sampled", "dense"])
def test_converted_to_channels_last_while_it_trains(gradient: str) -> None:
    """Every use is refused, and the way back is not."""
    model, x = images(), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    tuner = SparseTuner(model, RAND, "[02]", gradient=gradient)
    optimizer = AdamW(tuner, lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    model(x).square().sum().backward()
    model.to(memory_format=torch.channels_last)
    says = r"0\.weight is no longer contiguous, .*; make it so with model\.to\(memory_format=torch\.contig"
    uses: list[Callable[[], Any]] = [lambda: model(x), optimizer.step, tuner.sync, tuner.adapter]
    for use in uses:
        with pytest.raises(RuntimeError, match=says):
            use()
    with torch.no_grad(), pytest.raises(RuntimeError, match=says):
        model(x)
    tuner.detach()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_converted_and_back_trains_on() -> None:
    model, x = images(), torch.randn(2, 3, 8, 8)
    before = bits(model)
    tuner = SparseTuner(model, RAND, "[02]")
    optimizer = AdamW(tuner, lr=0.1)
    model.to(memory_format=torch.channels_last).to(memory_format=torch.contiguous_format)
    model(x).square().sum().backward()
    optimizer.step()
    tuner.verify()
    tuner.detach()
    assert same_bits(model, before)


def test_advice_for_a_weight_of_another_stride_names_it() -> None:
    says = _model.stride_advice("fc.weight", torch.zeros(4, 8).t())
    assert (
        says
        == "make it so with model.get_parameter('fc.weight').data = model.get_parameter('fc.weight').data.contiguous()"
    )
