"""The metrics of two adapters against their formulas on dense matrices, in plain torch."""

import math
import sys

import pytest
import torch
from torch import nn

from shira import Adapter, AdapterError, Entry, masks, metrics


class Two(nn.Module):
    """Two linear layers, one after the other, their weights plain parameters of modules."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = nn.Linear(24, 40, bias=False), nn.Linear(40, 8, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x):
        return self.b(self.a(x))


def fingerprint(weight):
    return int(torch.ops.shira.fingerprint(weight.detach())) % 2**64


def adapter_of(model, seed, density=0.1, granule=1, names=("a.weight", "b.weight"), values=None):
    """New values at random entries."""
    generator = torch.Generator().manual_seed(seed)
    entries = {}
    for name in names:
        weight = model.get_parameter(name).detach()
        indices = masks.Rand(density, seed=seed, granule=granule)(name, weight)
        new = torch.randn(len(indices) * granule, generator=generator) if values is None else values(weight, indices)
        entries[name] = Entry(indices, new, tuple(weight.shape), weight.dtype, granule, fingerprint(weight))
    return Adapter(entries)


def change(adapter, model, name):
    """The change that an adapter makes to a weight, dense, in float64."""
    weight, entry = model.get_parameter(name).detach(), adapter.weights[name]
    new = weight.flatten().clone()
    at = (entry.indices.long()[:, None] * entry.granule + torch.arange(entry.granule)).flatten()
    new[at] = entry.values
    return (new.view(weight.shape) - weight).double()


@pytest.mark.parametrize("granule", [1, 4])
def test_awom_and_awor_are_their_formulas(granule):
    model = Two()
    one, two = adapter_of(model, 1), adapter_of(model, 2, granule=granule)
    products = [change(one, model, name).t() @ change(two, model, name) for name in one.weights]
    norms = [float(torch.linalg.matrix_norm(product, 2)) for product in products]
    zeros = [1 - int(product.count_nonzero()) / product.numel() for product in products]
    assert metrics.awom(one, two, model) == pytest.approx(sum(norms) / 2, rel=1e-10)
    assert metrics.awor(one, two, model) == pytest.approx(sum(zeros) / 2, rel=1e-12)
    assert 0 < sum(zeros) / 2 < 1

    deltas = one.to_delta(model), two.to_delta(model)
    assert metrics.awom(*deltas) == metrics.awom(one, two, model)
    assert metrics.awor(*deltas) == metrics.awor(one, two, model)


def test_the_product_is_made_in_pieces(monkeypatch):
    model = Two()
    one, two = adapter_of(model, 1), adapter_of(model, 2)
    whole = metrics.awor(one, two, model)
    monkeypatch.setattr(metrics, "_CHUNK", 50)
    assert metrics.awor(one, two, model) == whole


def test_awom_of_many_columns_ends_where_the_norm_is_known():
    """More columns than Lanczos steps would need: the bound ends them."""
    model = nn.Linear(600, 200, bias=False)
    one, two = (adapter_of(model, seed, 0.05, names=("weight",)) for seed in (1, 2))
    product = change(one, model, "weight").t() @ change(two, model, "weight")
    assert metrics.awom(one, two, model) == pytest.approx(float(torch.linalg.matrix_norm(product, 2)), rel=1e-9)


def test_what_an_adapter_holds_but_does_not_change_is_zero():
    model = Two()
    one = adapter_of(model, 1)
    idle = adapter_of(model, 2, values=lambda weight, indices: weight.flatten()[indices.long()])
    assert metrics.awom(one, idle, model) == 0
    assert metrics.awor(one, idle, model) == 1


def test_disjoint_rows_are_orthogonal_and_shared_columns_are_not():
    def delta(row, column):
        index = torch.tensor([row * 8 + column], dtype=torch.int32)
        return Adapter({"w": Entry(index, torch.tensor([2.0]), (6, 8), torch.float32)}, delta=True)

    assert metrics.awom(delta(0, 3), delta(1, 3)) == 0
    assert metrics.awor(delta(0, 3), delta(1, 3)) == 1
    # A single entry (3, 5) of the 8 x 8 product, of 2 * 2: no entry is shared, and they are not orthogonal.
    assert metrics.awom(delta(0, 3), delta(0, 5)) == pytest.approx(4)
    assert metrics.awor(delta(0, 3), delta(0, 5)) == 1 - 1 / 64
    assert metrics.overlap(delta(0, 3), delta(0, 5)) == 0


def test_awor_cannot_see_overlap():
    """The same mask twice and two disjoint ones of a density: about as many zeros."""
    model = nn.Linear(64, 64, bias=False)
    mask = masks.Rand(0.05, seed=1)
    disjoint = masks.Rand(0.05, seed=2, skip=mask)
    generator = torch.Generator().manual_seed(3)

    def drawn(mask):
        indices = mask("weight", model.weight.detach())
        values = torch.randn(len(indices), generator=generator)
        return Adapter({"weight": Entry(indices, values, (64, 64), torch.float32)}, delta=True)

    first, same, other = drawn(mask), drawn(mask), drawn(disjoint)
    assert metrics.overlap(first, same) == 1
    assert metrics.overlap(first, other) == 0
    expected = (1 - 0.05**2) ** 64
    assert metrics.awor(first, same) == pytest.approx(expected, abs=0.04)
    assert metrics.awor(first, other) == pytest.approx(expected, abs=0.04)


def test_overlap_counts_entries_whatever_the_granules():
    def at(indices, granule, name="w", aliases=()):
        values = torch.zeros(len(indices) * granule)
        entry = Entry(torch.tensor(indices, dtype=torch.int32), values, (4, 6), torch.float32, granule, aliases=aliases)
        return Adapter({name: entry}, delta=True)

    first, second = at([0, 3], 2), at([0, 4], 3)  # entries 0 1 6 7, and 0 1 2 12 13 14
    assert metrics.overlap(first, second) == metrics.overlap(second, first) == 2 / 4
    assert metrics.overlap(first, first) == 1
    assert metrics.overlap(first, at([0], 24)) == 1  # a whole parameter has them all
    # A tied weight is one weight under each of its names.
    assert metrics.overlap(first, at([0, 3], 2, "v", ("w",))) == 1
    assert metrics.overlap(at([0, 3], 2, "v", ("w",)), first) == 1


def test_adapters_without_a_common_weight_have_nothing_to_do_with_each_other():
    model = Two()
    one, two = adapter_of(model, 1, names=("a.weight",)), adapter_of(model, 1, names=("b.weight",))
    assert (metrics.awom(one, two, model), metrics.awor(one, two, model), metrics.overlap(one, two)) == (0, 1, 0)


def test_interference_is_its_formula_and_leaves_the_model_alone():
    model = Two()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, two = adapter_of(model, 1), adapter_of(model, 2)
    data = [torch.randn(3, 24, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]

    def activations(adapters):
        a, b = (
            model.get_parameter(name).detach().double() + sum(change(adapter, model, name) for adapter in adapters)
            for name in one.weights
        )
        hidden = torch.cat(data).double() @ a.t()
        return torch.cat([hidden.flatten(), (hidden @ b.t()).flatten()])

    base, alone, both = activations([]), activations([one]), activations([one, two])
    expected = float((both - alone).norm() / (alone - base).norm())
    assert metrics.interference(model, one, two, data) == pytest.approx(expected, rel=1e-5)
    batches = [{"input": x} for x in data]
    assert metrics.interference(model, one, two, batches, forward=lambda m, b: m(b["input"])) == pytest.approx(
        expected, rel=1e-5
    )
    assert model.training
    assert not model.a._forward_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_on_inputs_that_are_never_active_does_not_interfere():
    """In the null space of the data: no change of activations, whatever the size of the values."""
    model = nn.Linear(8, 4, bias=False)

    def column(j, size):
        at = (torch.arange(4) * 8 + j).to(torch.int32)
        return Adapter({"weight": Entry(at, torch.full((4,), size), (4, 8), torch.float32)}, delta=True)

    x = torch.randn(5, 8)
    x[:, 6] = 0
    assert metrics.interference(model, column(1, 0.5), column(6, 100.0), [x]) == 0
    assert metrics.interference(model, column(1, 0.5), column(1, 0.5), [x]) == pytest.approx(1, rel=1e-4)


def test_refusals():
    model = Two()
    one, two = adapter_of(model, 1), adapter_of(model, 2)
    with pytest.raises(ValueError, match=r"^awom: an adapter of new values has no changes without its base; give base"):
        metrics.awom(one, two)
    with pytest.raises(ValueError, match=r"^awor: .*give base="):
        metrics.awor(one.to_delta(model), two)
    other = Adapter({"a.weight": Entry(torch.tensor([0]), torch.ones(1), (3, 3), torch.float32)}, delta=True)
    with pytest.raises(AdapterError, match=r"'a\.weight' has shape \[40, 24\] .* and \[3, 3\]"):
        metrics.overlap(one, other)
    with pytest.raises(ValueError, match="no batches"):
        metrics.interference(model, one, two, [])
    with pytest.raises(ValueError, match="none of the modules"):
        metrics.interference(model, one, two, [torch.ones(1)], forward=lambda model, batch: None)
    idle = adapter_of(model, 2, values=lambda weight, indices: weight.flatten()[indices.long()])
    with pytest.raises(ValueError, match="changes no activation"):
        metrics.interference(model, idle, one, [torch.ones(2, 24)])
    before = model.a.weight.detach().clone()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        metrics.interference(model, one, two, [torch.ones(2, 23)])
    assert torch.equal(model.a.weight, before)
    assert math.isfinite(metrics.interference(model, one, two, [torch.ones(2, 24)]))


def test_a_matrix_has_every_pair():
    model = Two()
    adapters = {"one": adapter_of(model, 1), "two": adapter_of(model, 2), "three": adapter_of(model, 3)}
    several = list(adapters.values())
    for metric, function in (
        ("overlap", metrics.overlap),
        ("awor", lambda a, b: metrics.awor(a, b, model)),
        ("awom", lambda a, b: metrics.awom(a, b, model)),
    ):
        found = metrics.matrix(adapters, metric, model)
        assert found.shape == (3, 3)
        assert found.dtype == torch.float64
        assert torch.equal(found, found.t())
        assert [found[i, j].item() for i in range(3) for j in range(i + 1)] == [
            function(several[i], several[j]) for i in range(3) for j in range(i + 1)
        ]
    # A function need not be symmetric: rows are what is given first.
    found = metrics.matrix(adapters, lambda a, b: several.index(a) - several.index(b))
    assert found.tolist() == [[0, -1, -2], [1, 0, -1], [2, 1, 0]]
    with pytest.raises(ValueError, match=r"^matrix: metric must be 'overlap', 'awor', 'awom' or a function, got 'x'"):
        metrics.matrix(adapters, "x")
    with pytest.raises(ValueError, match=r"^matrix: give at least one adapter"):
        metrics.matrix({})


def test_a_heat_map_shows_the_matrix(tmp_path):
    pytest.importorskip("matplotlib")
    model = Two()
    adapters = {"one": adapter_of(model, 1), "two": adapter_of(model, 2)}
    figure = metrics.heat_map(adapters, "awom", model)
    axes = figure.axes[0]
    expected = metrics.matrix(adapters, "awom", model)
    assert torch.equal(torch.tensor(axes.images[0].get_array()), expected)
    assert [text.get_text() for text in axes.texts] == [f"{number:.3g}" for number in expected.flatten().tolist()]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["one", "two"]
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("granule", [1, 2])
def test_a_mask_map_shows_where_the_entries_are(granule):
    pytest.importorskip("matplotlib")
    model = Two()
    adapter = adapter_of(model, 1, granule=granule)
    panels = metrics.mask_map(adapter, cells=64).axes
    assert [axes.get_title().split("\n")[0] for axes in panels] == ["a.weight", "b.weight"]
    entry = adapter.weights["a.weight"]
    mask = torch.zeros(40 * 24, dtype=torch.float64)
    mask[(entry.indices.long()[:, None] * granule + torch.arange(granule)).flatten()] = 1
    mask = mask.view(40, 24)
    assert torch.equal(torch.tensor(panels[0].images[0].get_array()), mask)
    # In fewer cells: the mean of what falls into each.
    (panel,) = metrics.mask_map(adapter, ["a.weight"], cells=8).axes
    expected = mask.view(8, 5, 8, 3).mean((1, 3))
    assert torch.allclose(torch.tensor(panel.images[0].get_array()), expected, rtol=1e-12)
    # Sides that the cells do not divide: nothing is lost.
    (panel,) = metrics.mask_map(adapter, ["a.weight"], cells=7).axes
    heights, widths = torch.bincount(torch.arange(40) * 7 // 40), torch.bincount(torch.arange(24) * 7 // 24)
    shares = torch.tensor(panel.images[0].get_array())
    assert float((shares * heights[:, None] * widths).sum()) == pytest.approx(entry.nnz)


def test_a_mask_map_leaves_out_what_is_replaced_as_a_whole():
    pytest.importorskip("matplotlib")
    whole = Entry(torch.zeros(1, dtype=torch.int32), torch.ones(4), (4,), torch.float32, 4)
    part = Entry(torch.tensor([1], dtype=torch.int32), torch.ones(1), (4, 2), torch.float32)
    figure = metrics.mask_map(Adapter({"bias": whole, "w": part}, delta=True))
    assert [axes.get_title().split("\n")[0] for axes in figure.axes] == ["w"]
    assert len(metrics.mask_map(Adapter({"bias": whole, "w": part}, delta=True), ["bias", "w"]).axes) == 2
    with pytest.raises(ValueError, match=r"^mask_map: the adapter has no weight to draw"):
        metrics.mask_map(Adapter({"bias": whole}, delta=True))
    with pytest.raises(ValueError, match=r"^mask_map: the adapter has no weight 'v'"):
        metrics.mask_map(Adapter({"w": part}, delta=True), ["v"])
    with pytest.raises(ValueError, match=r"^mask_map: cells must be a whole number of at least 1, got 0"):
        metrics.mask_map(Adapter({"w": part}, delta=True), cells=0)


def test_drawing_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model = Two()
    with pytest.raises(ImportError, match=r"^mask_map: drawing needs matplotlib .*pip install 'shira-ops\[demo\]'"):
        metrics.mask_map(adapter_of(model, 1))
    with pytest.raises(ImportError, match=r"^heat_map: drawing needs matplotlib"):
        metrics.heat_map({"one": adapter_of(model, 1)})
