"""Masks: the paper's definitions, written again and slowly, and what is refused."""

import numpy as np
import pytest
import torch

import shira_ops
from shira import masks
from shira.mask import fnv1a64, signed, splitmix64

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


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: masks.Rand(density=0.0), "density must be above 0"),
        (lambda: masks.Rand(density=1.5), "at most 1, got 1.5"),
        (lambda: masks.Rand(), "give density or r"),
        (lambda: masks.Rand(density=0.1, r=2), "one of the two"),
        (lambda: masks.Rand(r=0), "r must be a whole number"),
        (lambda: masks.WeightMagnitude(density=0.1, granule=0), "granule must be a whole number"),
        (lambda: masks.Struct(density=0.1, lines="diagonals"), "rows"),
    ],
)
def test_refusals(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_one_error_lists_every_offending_weight():
    mask = masks.Rand(density=0.1, granule=16)
    with pytest.raises(ValueError, match=r"2 of 3: a \[4, 8\], c \[2, 24\]"):
        mask.check({"a": torch.zeros(4, 8), "b": torch.zeros(4, 32), "c": torch.zeros(2, 24)})


def test_equality_is_by_description():
    assert masks.Rand(density=0.1) == masks.Rand(density=0.1) != masks.Rand(density=0.1, seed=1)
    assert masks.Rand(density=0.1) != masks.WeightMagnitude(density=0.1)
