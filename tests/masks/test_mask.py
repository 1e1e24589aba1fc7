"""Masks: the paper's definitions, written again and slowly, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch

import shira
import shira_ops
from shira import masks
from shira._granules import fnv1a64, signed, splitmix64
from shira.masks.masks import from_description

SHAPES = [(8, 8), (24, 16), (16, 48), (1, 16), (64, 8)]


def granules(mask, weight, name="w"):
    indices = mask(name, weight)
    shira_ops.check_indices(indices, weight.numel(), granule=mask.granule)
    return indices.long()


@pytest.mark.parametrize("granule", [1, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [masks.Rand, masks.WeightMagnitude])
def test_budget(kind, shape, granule):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for density in (0.001, 0.1, 0.5, 1.0):
        k = max(1, round(density * weight.numel() / granule))
        assert len(granules(kind(density=density, granule=granule), weight)) == k
    r = 1
    k = min(max(1, round(r * sum(shape) / granule)), weight.numel() // granule)
    assert len(granules(kind(r=r, granule=granule), weight)) == k


def test_rand_follows_from_seed_and_name():
    weight = torch.zeros(64, 64)
    mask = masks.Rand(density=0.1, seed=5)
    seed = splitmix64(5 ^ fnv1a64("layer.weight"))
    drawn = shira_ops.select_random(4096, 410, signed(seed))
    assert torch.equal(mask("layer.weight", weight), drawn)
    assert mask.seed_for("layer.weight") == seed
    assert not torch.equal(mask("other.weight", weight), drawn)
    assert not torch.equal(masks.Rand(density=0.1, seed=6)("layer.weight", weight), drawn)


def test_hashes_are_the_published_ones():
    assert fnv1a64("") == 0xCBF29CE484222325
    assert fnv1a64("a") == 0xAF63DC4C8601EC8C
    assert splitmix64(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("granule", [1, 4])
def test_weight_magnitude_is_the_top(granule):
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    chosen = granules(masks.WeightMagnitude(density=0.1, granule=granule), weight)
    score = weight.abs().view(-1, granule).double().sum(1).numpy()
    k = len(chosen)
    assert set(chosen.tolist()) == set(np.argsort(-score, kind="stable")[:k].tolist())


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("granule", [1, 4])
@pytest.mark.parametrize("shape", [(40, 48), (96, 16), (24, 3, 8)])
def test_principal_is_the_top_of_the_approximation_of_low_rank(shape, granule, balanced):
    """The approximation is that of the exact decomposition; the mask is WeightMagnitude of the approximation."""
    generator = torch.Generator().manual_seed(4)
    m, n = shape[0], math.prod(shape[1:])
    # Singular values that fall quickly, as those of trained weights do.
    u, v = (torch.linalg.qr(torch.randn(size, min(m, n), generator=generator)).Q for size in (m, n))
    weight = ((u * 0.7 ** torch.arange(min(m, n))) @ v.T).view(shape)
    mask = masks.Principal(density=0.1, granule=granule, rank=4, balanced=balanced)
    u, s, vh = torch.linalg.svd(weight.view(m, n).double(), full_matrices=False)
    exact = ((u[:, :4] * s[:4]) @ vh[:4]).view(shape)
    found = mask.approximation("w", weight)
    assert torch.allclose(found.double(), exact, atol=1e-5)
    magnitude = masks.WeightMagnitude(density=0.1, granule=granule, balanced=balanced)
    assert torch.equal(mask("w", weight), magnitude("w", found))
    assert not torch.equal(mask("w", weight), magnitude("w", weight))


def test_principal_of_full_rank_is_weight_magnitude():
    weight = torch.randn(16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for rank in (16, 100):
        mask = masks.Principal(density=0.1, rank=rank)
        assert torch.equal(mask("w", weight), masks.WeightMagnitude(density=0.1)("w", weight))
    assert torch.equal(masks.Principal(density=0.2)("b", weight[0]), masks.WeightMagnitude(density=0.2)("b", weight[0]))


def test_principal_is_the_same_again_and_leaves_random_numbers_alone():
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(6)).bfloat16()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    chosen = masks.Principal(density=0.05, rank=3)("w", weight)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(masks.Principal(density=0.05, rank=3)("w", weight), chosen)
    weight[3, 4] = math.inf
    with pytest.raises(ValueError, match=r"every entry of a weight must be finite; not so for layer\.weight"):
        masks.Principal(density=0.05, rank=3)("layer.weight", weight)


def row_by_row(score, k, taken):
    """The granules that ``balanced`` takes, by its definition: round after round the best that each row has left."""
    rows, width = score.shape
    left = [
        sorted((-score[r, c], c) for c in range(width) if r * width + c not in taken) for r in range(rows)
    ]  # fmt: skip
    chosen = []
    while len(chosen) < k:
        heads = sorted((row[0][0], r) for r, row in enumerate(left) if row)
        chosen += [r * width + left[r].pop(0)[1] for _, r in heads[: k - len(chosen)]]
    return sorted(chosen)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("granule", [1, 4])
@pytest.mark.parametrize("shape", [*SHAPES, (6, 3, 8), (48,)])
def test_balanced_takes_as_many_of_every_row(shape, granule, ties):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(shape, generator=generator)
    weight = weight.mul(2).round() if ties else weight
    weight.view(-1)[5] = math.nan
    rows = shape[0] if len(shape) > 1 else 1
    score = weight.abs().view(-1, granule).sum(1).nan_to_num(-1).view(rows, -1).numpy()
    some = torch.randperm(score.size, generator=generator)[: score.size // 3].sort().values
    # A row with nothing left, and one with a single granule.
    most = torch.cat([some, torch.arange(score.shape[1] * 2 - 1)]).unique() if rows > 3 else some
    for density in (0.001, 0.05, 0.3, 0.5):
        for taken in (some[:0], some, most):
            skip = [adapter_of(taken, weight, granule)] if len(taken) else []
            mask = masks.WeightMagnitude(density=density, granule=granule, balanced=True, skip=skip)
            k = max(1, round(density * score.size))
            if k <= score.size - len(taken):
                assert granules(mask, weight).tolist() == row_by_row(score, k, set(taken.tolist()))


@pytest.mark.parametrize("kind", [masks.Grad, masks.Snip])
def test_balanced_masks_by_gradients(kind):
    torch.manual_seed(3)
    model, batches = torch.nn.Sequential(torch.nn.Linear(16, 8)), [torch.randn(4, 16) for _ in range(3)]

    def loss(model, batch):
        return model(batch).square().sum() * torch.arange(1.0, 4)[len(batch) % 3]

    gradient = sum(torch.autograd.grad(loss(model, batch), model[0].weight)[0] for batch in batches)
    score = (gradient if kind is masks.Grad else gradient * model[0].weight).abs().view(8, 4, 4).sum(2)
    with shira.SparseTuner(model, kind(density=0.5, granule=4, balanced=True), calibration=batches, loss=loss) as tuner:
        chosen = tuner.adapter().weights["0.weight"].indices
    assert chosen.tolist() == row_by_row(score.detach().numpy(), 16, set())
    assert torch.bincount(chosen // 4).tolist() == [2] * 8


@pytest.mark.parametrize("lines", ["rows", "columns"])
@pytest.mark.parametrize("granule", [1, 4])
@pytest.mark.parametrize("shape", [(8, 8), (24, 16), (16, 48)])
def test_struct_is_lines_and_diagonal(shape, granule, lines):
    m, n = shape
    weight, mask = torch.zeros(shape), masks.Struct(density=0.4, granule=granule, lines=lines)

    def definition(f):
        entries = {(j * m // n, j) for j in range(n)}
        entries |= {(i, j) for i in range(m) for j in range(n) if (i if lines == "rows" else j) % f == 0}
        return sorted({(i * n + j) // granule for i, j in entries})

    budget = max(1, round(0.4 * m * n / granule))
    most = m if lines == "rows" else n
    f = next((f for f in range(1, most + 1) if len(definition(f)) <= budget), most)
    assert granules(mask, weight).tolist() == definition(f)


@pytest.mark.parametrize("offset", [1, 3, 50])
@pytest.mark.parametrize("lines", ["rows", "columns"])
def test_struct_with_an_offset(lines, offset):
    m, n = 24, 16
    mask = masks.Struct(density=0.3, lines=lines, offset=offset)

    def definition(f):
        entries = {(j * m // n, j) for j in range(n)}
        entries |= {(i, j) for i in range(m) for j in range(n) if (i if lines == "rows" else j) % f == offset % f}
        return sorted(i * n + j for i, j in entries)

    most = m if lines == "rows" else n
    f = next((f for f in range(1, most + 1) if len(definition(f)) <= round(0.3 * m * n)), most)
    assert mask.step("w", torch.zeros(m, n)) == f
    assert granules(mask, torch.zeros(m, n)).tolist() == definition(f)


# Densities by name


def test_the_first_pattern_that_is_found_counts():
    mask = masks.Rand(density={r"q_proj": 0.5, r"layers\.0": 0.25, ".*": 0.125})
    weight = torch.zeros(8, 8)
    for name, density in (
        ("layers.0.q_proj.weight", 0.5),
        ("layers.0.v_proj.weight", 0.25),
        ("layers.10.v_proj.weight", 0.125),
    ):
        assert mask.density_of(name) == density
        assert len(granules(mask, weight, name)) == density * 64


def test_a_weight_that_no_pattern_is_found_in_is_named():
    mask = masks.WeightMagnitude(density={"q_proj": 0.5, "^v_proj": 0.1})
    weights = {name: torch.zeros(4, 4) for name in ("q_proj.weight", "x.v_proj.weight", "o_proj.weight")}
    with pytest.raises(ValueError, match=r"found in x.v_proj.weight, o_proj.weight; it has 'q_proj', '\^v_proj'"):
        mask.check(weights)
    with pytest.raises(ValueError, match=r"found in o_proj\.weight"):
        mask("o_proj.weight", torch.zeros(4, 4))


# Left out


def entries(indices, granule):
    return {i * granule + at for i in indices.tolist() for at in range(granule)}


def adapter_of(indices, weight, granule, name="w"):
    values = torch.zeros(len(indices) * granule)
    return shira.Adapter({name: shira.Entry(indices, values, tuple(weight.shape), weight.dtype, granule)})


@pytest.mark.parametrize(("dtype", "powers"), [(torch.float32, (30, 125, -60)), (torch.float64, (900, -900))])
def test_principal_of_numbers_whose_squares_are_infinite_or_zero(dtype: torch.dtype, powers: tuple[int, ...]) -> None:
    """Everything is scaled by a power of two: the same bits of the approximation, and the same mask."""
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    mask = masks.Principal(density=0.2, rank=3)
    for power in powers:
        scale = torch.tensor(2.0, dtype=torch.float64).pow(power).to(dtype)
        assert torch.equal(mask.approximation("w", weight * scale), mask.approximation("w", weight) * scale)
        assert torch.equal(mask("w", weight * scale), mask("w", weight))
    smallest = torch.full((4, 8), torch.finfo(dtype).smallest_normal / 4, dtype=dtype)
    assert mask("w", smallest).numel() == 6


@pytest.mark.parametrize("kind", ["Rand", "WeightMagnitude", "Principal", "Grad", "Snip", "Struct"])
@pytest.mark.parametrize("other", [1, 2, 8])
@pytest.mark.parametrize("granule", [1, 4, 8])
def test_skip(kind, granule, other):
    """The same mask among the granules that hold none of the entries left out, for an adapter and for a mask."""
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(2))
    gradient = torch.randn(16, 24, generator=torch.Generator().manual_seed(3))
    first = masks.WeightMagnitude(density=0.2, granule=other)
    indices = granules(first, weight)
    out = entries(indices, other)
    free = [g for g in range(weight.numel() // granule) if not entries(torch.tensor([g]), granule) & out]
    chosen = []
    for skip in (first, adapter_of(indices, weight, other), [first, adapter_of(indices[:3], weight, other)]):
        options = {"rank": 2} if kind == "Principal" else {}
        mask = getattr(masks, kind)(density=0.1, granule=granule, skip=skip, **options)
        if kind in ("Grad", "Snip"):
            mask._selected["w"] = mask._choose("w", weight, gradient)
        chosen.append(granules(mask, weight).tolist())
        assert set(chosen[-1]) <= set(free)
        assert mask.seed_for("w") is None
    assert chosen[0] == chosen[1] == chosen[2]
    if kind == "Struct":
        whole = granules(masks.Struct(density=0.1, granule=granule), weight).tolist()
        assert chosen[0] == [g for g in whole if g in set(free)]
        return
    k = max(1, round(0.1 * weight.numel() / granule))
    assert len(chosen[0]) == k
    if kind == "Rand":
        drawn = shira_ops.select_random(
            len(free) * granule, k, signed(masks.Rand(density=0.1)._seed("w")), granule=granule
        )
        assert chosen[0] == [free[j] for j in drawn.tolist()]
    else:
        score = {"WeightMagnitude": weight, "Grad": gradient, "Snip": weight * gradient}
        score["Principal"] = masks.Principal(density=0.1, rank=2).approximation("w", weight)
        score = score[kind].abs()
        score = score.view(-1, granule).double().sum(1)
        assert set(chosen[0]) == set(sorted(free, key=lambda g: (-float(score[g]), g))[:k])


def test_the_next_one_percent():
    """The paper's non-overlap variant of WM: one mask after another is the ranking itself, ties to the lower index."""
    weight = torch.from_numpy(np.random.default_rng(0).integers(-3, 4, (20, 20))).float()
    order = weight.abs().view(-1).sort(descending=True, stable=True).indices
    parts = []
    for _ in range(4):
        parts.append(masks.WeightMagnitude(density=0.25, skip=list(parts)))
        at = 100 * (len(parts) - 1)
        assert granules(parts[-1], weight).tolist() == order[at : at + 100].sort().values.tolist()


def test_rand_without_overlap_spans_everything():
    weight = torch.zeros(10, 10)
    first = masks.Rand(density=0.5, seed=1)
    second = masks.Rand(density=0.5, seed=1, skip=first)
    both = torch.cat([granules(first, weight), granules(second, weight)])
    assert both.sort().values.tolist() == list(range(100))
    assert first.seed_for("w") is not None


def test_skip_goes_by_aliases_and_leaves_other_weights_alone():
    weight = torch.randn(4, 8)
    entry = shira.Entry(torch.arange(16), torch.zeros(16), (4, 8), torch.float32, 1, aliases=("tied",))
    adapter = shira.Adapter({"w": entry})
    mask = masks.Rand(density=0.5, skip=adapter)
    for name in ("w", "tied"):
        assert granules(mask, weight, name).tolist() == list(range(16, 32))
    assert mask.taken("other", weight) is None
    assert torch.equal(mask("other", weight), masks.Rand(density=0.5)("other", weight))


def test_skip_by_gradients_is_calibrated_with_the_mask():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    first = masks.Snip(density=0.25)
    batches = [torch.randn(4, 8)]

    def loss(model, batch):
        return model(batch).square().sum()

    with shira.SparseTuner(model, first, calibration=batches, loss=loss):
        best = model[0].weight_shira_indices.tolist()
    for kind in (masks.Snip, masks.Grad, masks.WeightMagnitude, masks.Rand):
        mask = kind(density=0.5, skip=masks.Snip(density=0.25))
        with shira.SparseTuner(model, mask, calibration=batches, loss=loss) as tuner:
            rest = model[0].weight_shira_indices.tolist()
            assert tuner.adapter().weights["0.weight"].seed is None
        assert len(rest) == 32
        assert not set(rest) & set(best)
        with pytest.raises(ValueError, match="needs calibration batches"):
            shira.SparseTuner(model, kind(density=0.5, skip=masks.Snip(density=0.25)))


@pytest.mark.parametrize("kind", ["Rand", "WeightMagnitude", "Struct"])
def test_too_few_are_left(kind):
    weight = torch.randn(8, 8)
    skip = adapter_of(torch.arange(40), weight, 1)
    if kind == "Struct":
        skip = adapter_of(torch.arange(64), weight, 1)
    says = (
        "Struct: skip leaves 0 granules of w, and the mask takes 1" if kind == "Struct" else "leaves 24 granules of w"
    )
    with pytest.raises(ValueError, match=says):
        getattr(masks, kind)(density=0.5, skip=skip)("w", weight)
    assert len(masks.WeightMagnitude(density=0.375, skip=skip if kind != "Struct" else ())("w", weight)) == 24


def test_skip_of_another_shape_is_refused():
    skip = adapter_of(torch.arange(4), torch.zeros(4, 4), 1)
    with pytest.raises(ValueError, match=r"skip has an adapter for w of shape \[4, 4\], and the weight's is \[2, 8\]"):
        masks.Rand(density=0.1, skip=skip)("w", torch.zeros(2, 8))


# Descriptions


@pytest.mark.parametrize(
    "mask",
    [
        masks.Rand(r=4, seed=9, granule=8),
        masks.Struct(density=0.1, lines="columns", offset=2),
        masks.WeightMagnitude(density={"q": 0.02, ".*": 0.01}),
        masks.Grad(density=0.3),
        masks.WeightMagnitude(density=0.3, balanced=True),
        masks.Principal(density=0.3, balanced=True, rank=3, seed=-2),
        masks.Snip(r=2, skip=[masks.Rand(density=0.1, skip=masks.Struct(density=0.2)), masks.Grad(r=1)]),
    ],
    ids=lambda mask: type(mask).__name__,
)
def test_a_description_makes_the_mask_again(mask):
    description = json.loads(json.dumps(mask.describe()))
    again = from_description(description)
    assert again == mask
    assert hash(again) == hash(mask)
    assert again.describe() == description
    assert repr(again) == repr(mask)


def test_a_skipped_adapter_is_told_by_a_digest():
    weight = torch.zeros(4, 4)
    a, b, c = (adapter_of(torch.tensor(indices), weight, 1) for indices in ([1, 2], [1, 2], [1, 3]))
    assert masks.Rand(density=0.1, skip=a) == masks.Rand(density=0.1, skip=b) != masks.Rand(density=0.1, skip=c)
    assert masks.Rand(density=0.1, skip=a).describe()["skip"][0]["nnz"] == 2
    with pytest.raises(ValueError, match=r"must name one of shira\.masks"):
        from_description(masks.Rand(density=0.1, skip=a).describe())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: masks.Rand(density=0.0), "density must be above 0"),
        (lambda: masks.Rand(density="0.1"), "density must be above 0 and at most 1, got '0.1'"),
        (lambda: masks.Rand(density=True), "density must be above 0 and at most 1, got True"),
        (lambda: masks.Rand(density=1.5), "at most 1, got 1.5"),
        (lambda: masks.Rand(), "give density or r"),
        (lambda: masks.Rand(density=0.1, r=2), "one of the two"),
        (lambda: masks.Rand(r=0), "r must be a whole number"),
        (lambda: masks.WeightMagnitude(density=0.1, granule=0), "granule must be a whole number"),
        (lambda: masks.Grad(density=0.1, balanced=1), "Grad: balanced must be True or False, got 1"),
        (lambda: masks.Principal(density=0.1, rank=0), "Principal: rank must be a whole number of at least 1, got 0"),
        (lambda: masks.Principal(density=0.1, seed=None), "Principal: seed must be a whole number, got None"),
        (lambda: masks.Struct(density=0.1, lines="diagonals"), "rows"),
        (lambda: masks.Struct(density=0.1, offset=-1), "offset must be a whole number of at least 0, got -1"),
        (lambda: masks.Rand(density={}), "density must name a pattern"),
        (lambda: masks.Rand(density={".*": 1.5}), "at most 1, got 1.5"),
        (lambda: masks.Rand(density={"(": 0.5}), r"density '\(' is not a regular expression"),
    ],
)
def test_refusals(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_skip_must_be_adapters_or_masks():
    with pytest.raises(TypeError, match="skip must be adapters or masks, got dict"):
        masks.Rand(density=0.1, skip={})


def test_one_error_lists_every_offending_weight():
    mask = masks.Rand(density=0.1, granule=16)
    with pytest.raises(ValueError, match=r"2 of 3: a \[4, 8\], c \[2, 24\]"):
        mask.check({"a": torch.zeros(4, 8), "b": torch.zeros(4, 32), "c": torch.zeros(2, 24)})


def test_equality_is_by_description():
    assert masks.Rand(density=0.1) == masks.Rand(density=0.1) != masks.Rand(density=0.1, seed=1)
    assert masks.Rand(density=0.1) != masks.WeightMagnitude(density=0.1)


# Budgets by name, seeds that are drawn


def test_r_by_name():
    mask = masks.Rand(r={r"q_proj": 2, ".*": 1}, granule=2)
    weight = torch.zeros(8, 24)
    assert len(mask("a.q_proj.weight", weight)) == 32
    assert len(mask("a.v_proj.weight", weight)) == 16
    assert mask.r_of("a.q_proj.weight") == 2
    assert from_description(json.loads(json.dumps(mask.describe()))) == mask
    with pytest.raises(
        ValueError, match=r"r has no pattern that is found in v\.weight; it has 'q_proj': add a last one"
    ):
        masks.Rand(r={"q_proj": 2}).check({"q_proj.weight": weight, "v.weight": weight})
    for bad, says in (
        ({}, "r must name a pattern"),
        ({".*": 0}, "r must be a whole number"),
        ({"(": 1}, "not a regular"),
    ):
        with pytest.raises(ValueError, match=says):
            masks.WeightMagnitude(r=bad)


def test_a_seed_that_is_drawn_is_kept():
    """By torch's own random numbers, whatever the default device is."""
    weight = torch.zeros(64, 64)
    torch.manual_seed(7)
    with torch.device("meta"):
        first, second = masks.Rand(density=0.1, seed=None), masks.Rand(density=0.1, seed=None)
    assert first.seed != second.seed
    assert not torch.equal(first("w", weight), second("w", weight))
    again = from_description(json.loads(json.dumps(first.describe())))
    assert torch.equal(again("w", weight), first("w", weight))
    torch.manual_seed(7)
    assert masks.Rand(density=0.1, seed=None) == first
    assert masks.default() == masks.default() == masks.Rand(density=0.01, granule="auto", seed=0)
    with pytest.raises(ValueError, match="seed must be a whole number or None"):
        masks.Rand(density=0.1, seed=0.5)


def test_struct_whatever_the_default_device_is():
    weight, mask = torch.zeros(8, 8), masks.Struct(density=0.4)
    expected = mask("w", weight)
    with torch.device("meta"):
        assert torch.equal(mask("w", weight), expected)


# Masks that are given


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granule", [1, 4, "auto"])
def test_given_is_what_is_marked(dtype, granule):
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    marked = weight > 1
    size = 8 if granule == "auto" else granule
    expected = [g for g, few in enumerate(marked.view(-1, size)) if few.any()]
    for given in ({"w": marked.to(dtype)}, {"_orig_mod.w": marked.to(dtype).t().contiguous().t()},
                  lambda name, weight: (weight > 1).to(dtype)):  # fmt: skip
        indices = masks.Given(given, granule=granule)("w", weight)
        assert indices.tolist() == expected
        assert indices.dtype == torch.int32
    left = masks.Given({"w": marked}, granule=granule, skip=adapter_of(torch.tensor(expected[:2]), weight, size))
    assert left("w", weight).tolist() == expected[2:]
    assert masks.Rand(density=0.1, granule=size, skip=left).taken("w", weight).tolist() == expected[2:]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"w": torch.ones(4, 8)}, r"the mask of w must be a tensor of shape \[8, 8\], got shape \[4, 8\]"),
        ({"w": torch.full((8, 8), 0.5)}, "the mask of w must hold nothing but 0 and 1"),
        ({"w": torch.full((8, 8), math.nan)}, "the mask of w must hold nothing but 0 and 1"),
        ({"w": torch.zeros(8, 8)}, "no entry of w is left to train; leave it out with exclude="),
        ({"v": torch.ones(8, 8)}, "there is no mask for w; there are masks for v; name just these with targets="),
        (lambda name, weight: None, r"the mask of w must be a tensor of shape \[8, 8\], got NoneType"),
    ],
)
def test_given_that_does_not_fit(given, says):
    with pytest.raises(ValueError, match=f"Given: {says}"):
        masks.Given(given)("w", torch.zeros(8, 8))


def test_a_tuner_takes_masks_by_name_and_functions():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    marked = {"1.weight": model[1].weight.detach() > 0}
    with shira.SparseTuner(model, marked) as tuner:
        adapter = tuner.adapter()
    assert list(adapter.weights) == ["1.weight"]
    assert adapter.weights["1.weight"].indices.tolist() == marked["1.weight"].view(-1).nonzero().view(-1).tolist()
    assert adapter.mask == masks.Given(marked).describe()
    assert masks.Given(marked) == masks.Given({name: mask.int() for name, mask in marked.items()})
    assert masks.Given(marked) != masks.Given({"1.weight": ~marked["1.weight"]})
    with pytest.raises(ValueError, match="a description of a Given mask does not hold its entries"):
        from_description(adapter.mask)
    with shira.SparseTuner(model, lambda name, weight: weight.abs() > 0.1) as tuner:
        for name, entry in tuner.adapter().weights.items():
            expected = (model.get_parameter(name).detach().abs() > 0.1).view(-1).nonzero().view(-1)
            assert entry.indices.tolist() == expected.tolist()
    one, two = masks.Given(lambda name, weight: weight > 0), masks.Given(lambda name, weight: weight < 0)
    assert one == one
    assert one != two
    with pytest.raises(ValueError, match=r"Given: has masks for 1\.weight, which are not targets"):
        shira.SparseTuner(model, {**marked, "0.weight": marked["1.weight"]}, targets="0")
    with pytest.raises(ValueError, match=r"Given: there is no mask for 0\.weight"):
        shira.SparseTuner(model, marked, targets="all-linear")
    for mask, says in ((masks.Rand, "got the class Rand: call it"), (0.01, "got float"), ({"w": 1}, "to int")):
        with pytest.raises(TypeError, match=says):
            shira.SparseTuner(model, mask)
