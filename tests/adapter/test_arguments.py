"""Whatever is given by mistake is refused in a sentence by every public function of adapters, before it writes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shira import Adapter, AdapterError, Entry, combine, metrics
from shira.adapter import _file
from shira.adapter.bake import bake

torch.manual_seed(0)
BASE = {"a.weight": torch.randn(8, 8), "b.weight": torch.randn(8, 8)}
TUNED = {name: weight + torch.eye(8) for name, weight in BASE.items()}
ADAPTER = Adapter.from_difference(BASE, TUNED)
DELTA = ADAPTER.to_delta(BASE)
ENTRY = ADAPTER.weights["a.weight"]
OUT = "out"

NO_ADAPTERS = [None, True, 1.5, "style.safetensors", Path("style.safetensors"), b"x", {}, object(), BASE]
NO_PATHS = [None, True, 1, np.float64(1), b"x", [], object(), ADAPTER, "", "a\0b", "a\ud800"]
NO_SHARES = [True, 0, -0.5, 1.5, float("nan"), np.float32("inf"), "0.5", b"x", [0.5], {}, torch.tensor(0.5), 1j]
NO_WHOLES = [None, True, 1.0, np.int64(1), "1", [1], torch.tensor(1), float("nan")]
NO_STRENGTHS = [None, True, "1", float("nan"), float("inf"), 10**400, 1e39, [1.0], torch.tensor(1.0), 1j, np.bool_(1)]
NO_TEXTS = [True, 1, float("nan"), np.float32(1), b"x", ["x"], {"x": 1}, "", "a\ud800"]


def entry(**changes: Any) -> Adapter:
    return Adapter({"a": replace(ENTRY, **changes)})


def combined(method: Callable[..., Adapter], adapters: Any = (ADAPTER,), base: Any = BASE, **options: Any) -> Adapter:
    return method(adapters, base, **options)


COMBINE = (combine.ties, combine.dare, combine.magnitude_prune)
REFUSED: list[tuple[str, Callable[[Any], object], list[Any], str]] = [
    ("Adapter", Adapter, [None, 1, [ENTRY], "a"], "^Adapter: weights must map names to Entry objects, got "),
    ("an entry", lambda v: Adapter({"a": v}), [None, 1, BASE, ADAPTER], "^Adapter: weight 'a' must be an Entry, got "),
    (
        "delta",
        lambda v: Adapter({}, delta=v),
        [None, 1, "no", torch.tensor([1, 2])],
        "^delta must be True or False, got ",
    ),
    ("alpha", lambda v: Adapter({}, alpha=v), NO_STRENGTHS, "^alpha must be a finite number"),
    ("mask", lambda v: Adapter({}, mask=v), [0, "", [], b"x", torch.tensor([1, 2])], "^mask must be "),
    ("provenance", lambda v: Adapter({}, provenance=v), [0, "", [], {"a": float("nan")}], "^provenance must be "),
    (
        "indices",
        lambda v: entry(indices=v),
        [None, [0, 1], np.arange(8)],
        "^weight 'a': indices must be a dense tensor",
    ),
    (
        "values",
        lambda v: entry(values=v),
        [None, 1.0, torch.ones(8).to_sparse()],
        "^weight 'a': values must be a dense",
    ),
    (
        "shape",
        lambda v: entry(shape=v),
        [None, 64, "88", (8.0, 8), (np.int64(8), 8), (-8, -8), (2**31, 2**31 + 1), (2**40, 2**40), (1,) * 65],
        "^weight 'a': shape must",
    ),
    (
        "dtype",
        lambda v: entry(dtype=v),
        [None, "float32", float, np.float32],
        "^weight 'a': dtype must be a torch.dtype",
    ),
    ("granule", lambda v: entry(granule=v), NO_WHOLES, "^weight 'a': granule must be a whole number"),
    (
        "fingerprint",
        lambda v: entry(fingerprint=v),
        [True, -1, 2**64, "ff", np.int64(1)],
        "^weight 'a': fingerprint must",
    ),
    ("seed", lambda v: entry(seed=v), [True, -1, 2**64, 1.0], "^weight 'a': seed must be a whole number below 2.64"),
    ("aliases", lambda v: entry(aliases=v), [None, "head", {"b"}], "^weight 'a': aliases must be a tuple of names"),
    ("save", ADAPTER.save, NO_PATHS, "^Adapter.save: path must be a path"),
    (
        "version",
        lambda v: ADAPTER.save(OUT, version=v),
        [True, 0, 3, "2", np.int64(1), torch.ones(2)],
        "version must be",
    ),
    ("load", Adapter.load, NO_PATHS, "^Adapter.load: path must be a path"),
    ("base", lambda v: Adapter.from_difference(v, TUNED), ["", "a\0b", None, 1, b"x", [BASE]], "^base must be a path"),
    ("tuned", lambda v: Adapter.from_difference(BASE, v), ["", None, 1, [BASE]], "^tuned must be a path"),
    (
        "density",
        lambda v: Adapter.from_difference(BASE, TUNED, density=v),
        NO_SHARES,
        "^from_difference: density must be",
    ),
    (
        "granules",
        lambda v: Adapter.from_difference(BASE, TUNED, granule=v),
        NO_WHOLES,
        "^from_difference: granule must be",
    ),
    (
        "progress",
        lambda v: Adapter.from_difference(BASE, TUNED, progress=v),
        [1, "x"],
        "^from_difference: progress must be",
    ),
    ("from_peft", Adapter.from_peft, NO_PATHS, "^from_peft: folder must be a path"),
    ("to_peft", DELTA.to_peft, NO_PATHS, "^to_peft: folder must be a path"),
    ("base_model", lambda v: DELTA.to_peft(OUT, base_model=v), NO_TEXTS, "^to_peft: base_model must be text"),
    ("task_type", lambda v: DELTA.to_peft(OUT, task_type=v), NO_TEXTS, "^to_peft: task_type must be text"),
    ("from_pretrained", Adapter.from_pretrained, NO_PATHS, "^from_pretrained: where must be a path"),
    ("filename", lambda v: Adapter.from_pretrained(".", filename=v), [None, *NO_TEXTS], "^filename must be text"),
    ("revision", lambda v: Adapter.from_pretrained("me/style", revision=v), NO_TEXTS, "revision must be text"),
    ("repo", ADAPTER.push_to_hub, [None, *NO_TEXTS], "^push_to_hub: repo must be text"),
    ("save_pretrained", ADAPTER.save_pretrained, NO_PATHS, "^save_pretrained: folder must be a path"),
    ("a card's base", lambda v: ADAPTER.save_pretrained(OUT, base_model=v), NO_TEXTS, "^base_model must be text"),
    ("to_delta", ADAPTER.to_delta, [None, 1, [BASE]], "^base must be a path, a state dict or a torch.nn.Module"),
    ("to", ADAPTER.to, ["float16", float, torch.int8, 1, [], "a\ud800"], "^to: dtype must be one of"),
    (
        "fuse",
        lambda v: Adapter.fuse(v, BASE),
        [None, 1, "x", ADAPTER, {"a": 1.0}, [ADAPTER], [(ADAPTER,)], [None]],
        "^fuse: adapters must be pairs of an Adapter and its strength, as",
    ),
    ("fuse none", lambda v: Adapter.fuse(v, BASE), [[], (), iter([])], "^fuse: give at least one adapter$"),
    ("a fused one", lambda v: Adapter.fuse([(v, 1.0)], BASE), NO_ADAPTERS, "^fuse: adapter 1 must be an Adapter, got "),
    (
        "its strength",
        lambda v: Adapter.fuse([(ADAPTER, v)], BASE),
        NO_STRENGTHS,
        "^fuse: the strength of adapter 1 must",
    ),
    ("bake", lambda v: bake(v, "base", OUT), NO_ADAPTERS, "^bake: adapter must be an Adapter, got "),
    ("its base", lambda v: bake(ADAPTER, v, OUT), NO_PATHS, "^bake: base must be a path"),
    ("its result", lambda v: bake(ADAPTER, "base", v), NO_PATHS, "^bake: out must be a path"),
    (
        "its inputs",
        lambda v: bake(ADAPTER, "base", OUT, inputs=v),
        [None, "x", Path("x"), [1]],
        "^bake: inputs must be",
    ),
    ("its progress", lambda v: bake(ADAPTER, "base", OUT, progress=v), [1, "x"], "^bake: progress must be a function"),
    ("awom", lambda v: metrics.awom(v, DELTA), NO_ADAPTERS, "^awom: first must be an Adapter, got "),
    ("awor", lambda v: metrics.awor(DELTA, v), NO_ADAPTERS, "^awor: second must be an Adapter, got "),
    ("overlap", lambda v: metrics.overlap(v, DELTA), NO_ADAPTERS, "^overlap: first must be an Adapter, got "),
    (
        "interference",
        lambda v: metrics.interference(torch.nn.Linear(8, 8), v, DELTA, []),
        NO_ADAPTERS,
        "^interference: first must be an Adapter, got ",
    ),
    (
        "its data",
        lambda v: metrics.interference(torch.nn.Linear(8, 8), DELTA, DELTA, v),
        [None, 1],
        "^interference: data",
    ),
    ("matrix", metrics.matrix, [None, [ADAPTER], ADAPTER], "^matrix: adapters must map names to them, got "),
    ("in a matrix", lambda v: metrics.matrix({"a": v}), NO_ADAPTERS, "^matrix: 'a' must be an Adapter, got "),
    ("metric", lambda v: metrics.matrix({"a": DELTA}, v), [None, 1, [], "cosine"], "^matrix: metric must be 'overlap'"),
    ("mask_map", metrics.mask_map, NO_ADAPTERS, "^mask_map: adapter must be an Adapter, got "),
    (
        "its names",
        lambda v: metrics.mask_map(DELTA, v),
        ["a.weight", 1, {"a.weight"}],
        "^mask_map: names must be a list",
    ),
    ("unknown names", lambda v: metrics.mask_map(DELTA, v), [["c"], [1], [[]]], "^mask_map: the adapter has no weight"),
    ("cells", lambda v: metrics.mask_map(DELTA, cells=v), [0, *NO_WHOLES], "^mask_map: cells must be a whole number"),
    (
        "drop",
        lambda v: combine.dare([DELTA], BASE, drop=v),
        [None, False, 1, -1, "0", float("nan"), []],
        "^dare: drop must",
    ),
    (
        "dare's seed",
        lambda v: combine.dare([DELTA], BASE, seed=v),
        NO_WHOLES,
        "^dare: seed must be a whole number, got ",
    ),
    *(
        case
        for method in COMBINE
        for name in [method.__name__]
        for case in (
            (
                f"{name}'s adapters",
                lambda v, method=method: combined(method, v),
                [None, 1, "x", ADAPTER, {"style": ADAPTER}],
                f"^{name}: adapters must be a list of them, got ",
            ),
            (
                f"none for {name}",
                lambda v, method=method: combined(method, v),
                [[], (), iter([])],
                f"^{name}: give at least one adapter$",
            ),
            (
                f"{name}'s adapter",
                lambda v, method=method: combined(method, [ADAPTER, v]),
                NO_ADAPTERS,
                f"^{name}: adapter 2 must be an Adapter, got ",
            ),
            (
                f"{name}'s weights",
                lambda v, method=method: combined(method, weights=v),
                [1.0, "x", b"x", [], [1.0, 2.0], {0: 1.0}],
                f"^{name}: weights must be 1 numbers",
            ),
            (
                f"{name}'s weight",
                lambda v, method=method: combined(method, weights=[v]),
                NO_STRENGTHS,
                f"^{name}: the weight of adapter 1 must be a finite number",
            ),
        )
    ),
    *(
        (
            f"{method.__name__}'s density",
            lambda v, method=method: combined(method, density=v),
            [None, *NO_SHARES],
            f"^{method.__name__}: density must be above 0 and at most 1, got ",
        )
        for method in (combine.ties, combine.magnitude_prune)
    ),
    *(
        (
            f"{method.__name__}'s style",
            lambda v, method=method: combined(method, style=v),
            [None, 1, [], "Paper"],
            f"^{method.__name__}: style must be 'paper' or 'peft'",
        )
        for method in (combine.ties, combine.dare)
    ),
]


@pytest.mark.parametrize(
    ("call", "values", "sentence"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_is_given_by_mistake_is_refused_in_a_sentence(
    call: Callable[[Any], object], values: list[Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in values:
        with pytest.raises((ValueError, TypeError), match=sentence):
            call(value)
    assert not os.listdir(tmp_path)


def test_numbers_of_every_kind_are_taken() -> None:
    """numpy's and Python's fractions are real numbers, and a generator is as good as a list."""
    plain = combine.ties([ADAPTER], BASE, [0.5], density=0.5)
    for half in (np.float64(0.5), np.float32(0.5), Fraction(1, 2)):
        same = combine.ties((one for one in [ADAPTER]), BASE, (weight for weight in [half]), density=half)
        for name, entry in plain.weights.items():
            assert torch.equal(same.weights[name].values, entry.values)
            assert torch.equal(same.weights[name].indices, entry.indices)
        assert same.provenance == plain.provenance
        assert Adapter({}, alpha=half).alpha == 0.5
        assert combine.dare([DELTA], BASE, drop=half).provenance["merge"]["drop"] == 0.5


def test_a_checkpoint_on_the_hub_is_not_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="a checkpoint on the Hub must be downloaded first: 'someone/model'"):
        ADAPTER.to_delta("someone/model")
    (tmp_path / "someone").mkdir()
    with pytest.raises(FileNotFoundError, match="No such file or directory: 'someone/model'"):
        ADAPTER.to_delta("someone/model")


def test_a_name_of_a_base_that_is_no_name_is_left_out(tmp_path: Path) -> None:
    """A file's provenance may hold anything."""
    for known in (7, ["x"], {"x": 1}, "", None):
        adapter = Adapter(DELTA.weights, delta=True, provenance={"base_model_name_or_path": known})
        adapter.save_pretrained(tmp_path / "style")
        assert "| base model | not stated |" in (tmp_path / "style" / "README.md").read_text(encoding="utf-8")


def test_the_check_of_an_entry_is_the_adapters() -> None:
    with pytest.raises(AdapterError, match=r"^weight 'a': shape must be a tuple of sizes, got "):
        Adapter({"a": Entry(ENTRY.indices, ENTRY.values, [8, "8"], ENTRY.dtype)})  # type: ignore[arg-type, list-item]


def test_other_files_are_known_by_how_they_begin(tmp_path: Path) -> None:
    torch.save(BASE, tmp_path / "model.bin")
    (tmp_path / "lfs").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    (tmp_path / "index.json").write_text('{\n  "weight_map": {}\n}')
    (tmp_path / "small.json").write_text('{"weight_map": {}}')
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    for name, what in (
        ("model.bin", r"a file of torch\.save"),
        ("lfs", r"a pointer of Git LFS to the file, which is still to be fetched: git lfs pull"),
        ("index.json", "JSON; of a checkpoint in shards give the folder"),
        ("small.json", "JSON; of a checkpoint in shards give the folder"),
        ("model.gguf", "a GGUF file"),
    ):
        for read in (Adapter.load, ADAPTER.to_delta):
            with pytest.raises(
                AdapterError, match=f"{name}: this is not a whole safetensors file: it begins like {what}"
            ):
                read(tmp_path / name)
    with pytest.raises(
        AdapterError, match=r"0 indices; model\.bin could execute anything when it is read: save the model"
    ):
        ADAPTER.to_delta(tmp_path)


def test_an_error_of_the_temporary_file_names_the_result(tmp_path: Path) -> None:
    """As on a file system that is read-only."""
    with (
        pytest.raises(OSError, match="Read-only file system") as refused,
        _file.replacing(tmp_path / "style.safetensors") as temporary,
    ):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(temporary))
    assert refused.value.filename == str(tmp_path / "style.safetensors")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("factor", "alpha"), [(float("nan"), 1.0), (float("-inf"), 1.0), (1e20, 1e30)])
def test_peft_is_not_given_what_is_not_finite(factor: float, alpha: float, tmp_path: Path) -> None:
    """The strength is multiplied into PEFT's values, which may become infinite by it."""
    weights = {name: replace(one, values=one.values * factor) for name, one in DELTA.weights.items()}
    for adapter in (Adapter(weights, delta=True, alpha=alpha), Adapter(weights, delta=True, alpha=-alpha)):
        with pytest.raises(AdapterError, match=r"^weight 'a.weight': its values are NaN or infinite, or become so in"):
            adapter.to_peft(tmp_path / "peft")
    assert not os.listdir(tmp_path)


def test_peft_is_given_a_model_without_these_weights(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8)})
    with pytest.raises(AdapterError, match=r"^PEFT's SHiRA cannot hold this adapter: 'b.weight' is not in the base$"):
        DELTA.to_peft(tmp_path / "peft", model)


def test_metrics_of_changes_that_are_not_finite_are_refused() -> None:
    weights = {name: replace(one, values=one.values / 0) for name, one in DELTA.weights.items()}
    for metric in (metrics.awom, metrics.awor):
        with pytest.raises(AdapterError, match=r"^aw..: changes of a weight of shape \[8, 8\] are NaN or infinite$"):
            metric(DELTA, Adapter(weights, delta=True))
    assert metrics.overlap(DELTA, Adapter(weights, delta=True)) == 1


def test_the_standard_output_is_not_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(BASE, "base.safetensors")
    with pytest.raises(ValueError, match=r"^the result is a file, and - would be the standard output"):
        bake(ADAPTER, "base.safetensors", "-")
    assert bake(ADAPTER, "base.safetensors", "./-").entries == ADAPTER.nnz
    assert sorted(os.listdir(tmp_path)) == ["-", "base.safetensors"]


def test_values_may_be_a_view_of_others(tmp_path: Path) -> None:
    """Such as every other entry of a tensor, or an imaginary part: the same everywhere as a tensor of its own."""
    indices = torch.tensor([1, 5, 9, 33])
    save_file(BASE, tmp_path / "base.safetensors")
    for values in (
        torch.randn(8)[::2],
        torch.ones(1).expand(4),
        torch.complex(torch.randn(4), torch.ones(4)).conj().imag,
    ):
        adapters = [
            Adapter({"a.weight": Entry(indices, one, (8, 8), torch.float32)})
            for one in (values, values.clone().resolve_neg())
        ]
        merged = []
        for number, adapter in enumerate(adapters):
            adapter.save(tmp_path / f"{number}.safetensors")
            bake(adapter, tmp_path / "base.safetensors", tmp_path / f"merged-{number}", alpha=0.5)
            fused = Adapter.fuse([(adapter, 0.7), (ADAPTER, 0.3)], BASE).weights["a.weight"]
            merged.append((fused.values, adapter.to_delta(BASE).weights["a.weight"].values))
        assert all(torch.equal(view, own) for view, own in zip(*merged, strict=True))
        for one, other in (("0.safetensors", "1.safetensors"), ("merged-0", "merged-1")):
            assert (tmp_path / one).read_bytes() == (tmp_path / other).read_bytes()
            (tmp_path / one).unlink()
            (tmp_path / other).unlink()
