"""The command line: what each command does, what it says when it cannot, and that it starts without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import shira_ops
from shira import Adapter, AdapterError, Entry, Switcher, _file
from shira import merge as merge_module
from shira.merge import merge

typer = pytest.importorskip("typer")
from typer.testing import CliRunner  # noqa: E402

from shira.cli import app  # noqa: E402


def run(*arguments: object, code: int = 0) -> str:
    """The command's output; what went wrong, where it should."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def refused(*arguments: object) -> str:
    """One sentence, and nothing on stdout."""
    said = run(*arguments, code=1)
    assert said.startswith(f"shira {arguments[0]}: ")
    assert said.count("\n") == 1
    return said


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16)).bfloat16().requires_grad_(False)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """base/ in two shards with its small files, tuned.safetensors, and a.safetensors, exact."""
    base = dict(model_of().state_dict())
    folder = tmp_path / "base"
    folder.mkdir()
    names = list(base)
    shards = {"model-1.safetensors": names[:1], "model-2.safetensors": names[1:]}
    for shard, held in shards.items():
        save_file({name: base[name] for name in held}, folder / shard, {"format": "pt", "of": shard})
    where = {name: shard for shard, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"other weights")
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["0.weight"].view(-1)[::37] += 1
    tuned["1.bias"] += 1
    save_file(tuned, tmp_path / "tuned.safetensors")
    Adapter.from_difference(base, tuned).save(tmp_path / "a.safetensors")
    return tmp_path


def content(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    parts = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: tensor for part in parts for name, tensor in load_file(part).items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_inspect(files: Path) -> None:
    text = run("inspect", files / "a.safetensors")
    for part in ("0.weight", "48 x 32", "bfloat16", "1.bias", "whole", "overwrite"):
        assert part in text
    facts = json.loads(run("inspect", files / "a.safetensors", "--json"))
    assert facts["nnz"] == 42 + 16
    assert facts["weights"]["0.weight"]["indices"] == "code"
    assert facts["bytes"] == (files / "a.safetensors").stat().st_size


def test_names_cannot_steer_the_terminal(files: Path) -> None:
    entry = Entry(torch.tensor([1]), torch.tensor([1.0]), (4,), torch.float32)
    Adapter({"[red]a\x1b[2J\n": entry}).save(files / "b.safetensors")
    text = run("inspect", files / "b.safetensors")
    assert "[red]a\\x1b[2J\\x0a" in text
    assert "\x1b" not in text


def test_verify(files: Path) -> None:
    file = files / "a.safetensors"
    assert "good (header" in run("verify", file, "--header")
    assert "good (file;" in run("verify", file)
    assert "good (file and base" in run("verify", file, files / "base")
    assert json.loads(run("verify", file, files / "base", "--json"))["good"] is True
    said = refused("verify", file, files / "tuned.safetensors")
    assert "was not made for" in said
    assert "'0.weight' has other content (by fingerprint)" in said
    assert "leave --header out" in refused("verify", file, files / "base", "--header")


def test_verify_finds_what_the_header_does_not_show(files: Path) -> None:
    file = files / "a.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 0xFF
    file.write_bytes(raw)
    run("verify", file, "--header")
    assert "do not decode" in refused("verify", file)


def test_extract_and_apply_give_the_tuned_checkpoint(files: Path) -> None:
    out = files / "out.safetensors"
    said = run("extract", files / "base", files / "tuned.safetensors", out)
    assert "58 entries of 2 weights" in said
    assert "nothing lost" in said
    run("apply", out, files / "base", files / "merged")
    merged = files / "merged"
    assert same(content(merged), content(files / "tuned.safetensors"))
    names = ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
    assert sorted(path.name for path in merged.iterdir()) == names
    with safe_open(merged / "model-2.safetensors", "pt") as shard:
        assert shard.metadata() == {"format": "pt", "of": "model-2.safetensors"}


def test_extract_says_what_is_lost(files: Path) -> None:
    out = files / "out.safetensors"
    found = json.loads(
        run("extract", files / "base", files / "tuned.safetensors", out, "--density", 0.01, "--granule", 4, "--json")
    )
    assert 0 < found["lost"] < 1
    assert set(found["lost_by_weight"]) == {"0.weight", "1.bias"}
    assert found["bytes"] == out.stat().st_size
    assert Adapter.load(out).weights["0.weight"].granule == 4


def test_apply_with_a_strength_is_what_the_switcher_does(files: Path) -> None:
    single = files / "single.safetensors"
    save_file(dict(model_of().state_dict()), single)
    run("apply", files / "a.safetensors", single, files / "merged.safetensors", "--alpha", 0.3)
    model = model_of()
    switcher = Switcher(model)
    switcher.add("a", files / "a.safetensors")
    switcher.activate("a", alpha=0.3)
    assert same(content(files / "merged.safetensors"), dict(model.state_dict()))


def test_fuse(files: Path) -> None:
    weight = model_of().state_dict()["0.weight"]
    indices = shira_ops.select_random(weight.numel(), 50, 3)
    second = Adapter({"0.weight": Entry(indices, torch.ones(50).bfloat16(), (48, 32), torch.bfloat16)}, alpha=0.5)
    second.save(files / "b.safetensors")
    run(
        "fuse", f"{files / 'a.safetensors'}=0.7", files / "b.safetensors", "--base", files / "base",
        "--out", files / "fused.safetensors",
    )  # fmt: skip
    run("apply", files / "fused.safetensors", files / "base", files / "merged")
    model = model_of()
    switcher = Switcher(model)
    switcher.add("a", files / "a.safetensors")
    switcher.add("b", files / "b.safetensors")
    switcher.activate({"a": 0.7, "b": 0.5})
    assert same(content(files / "merged"), dict(model.state_dict()))
    expected = [{"file": "a.safetensors", "strength": 0.7}, {"file": "b.safetensors", "strength": 0.5}]
    assert Adapter.load(files / "fused.safetensors").provenance == {"fused": expected}
    out = ("--base", files / "base", "--out", files / "other.safetensors")
    assert "a strength is a number" in refused("fuse", f"{files / 'a.safetensors'}=strong", *out)


def test_convert_there_and_back(files: Path) -> None:
    indices = shira_ops.select_random(48 * 32, 80, 3)
    adapter = Adapter({"0.weight": Entry(indices, torch.ones(80).bfloat16(), (48, 32), torch.bfloat16)})
    adapter.save(files / "b.safetensors")
    assert "give base=" in refused("convert", files / "b.safetensors", files / "peft")
    run("convert", files / "b.safetensors", files / "peft", "--base", files / "base", "--base-model", "some/model")
    assert json.loads((files / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"
    (files / "peft" / "notes.txt").write_text("kept")
    run("convert", files / "b.safetensors", files / "peft", "--base", files / "base", "--overwrite")
    assert (files / "peft" / "notes.txt").read_text() == "kept"
    run("convert", files / "peft", files / "back.safetensors", "--base", files / "base")
    run("apply", files / "b.safetensors", files / "base", files / "one")
    run("apply", files / "back.safetensors", files / "base", files / "two")
    assert same(content(files / "one"), content(files / "two"))
    assert "are for a LoRA" in refused("convert", files / "b.safetensors", files / "x", "--density", 0.1)


def test_nothing_is_overwritten_unasked(files: Path) -> None:
    a, base, tuned = files / "a.safetensors", files / "base", files / "tuned.safetensors"
    before = tuned.read_bytes()
    for arguments in (("extract", base, a, tuned), ("fuse", a, "--base", base, "--out", tuned), ("convert", a, tuned)):
        assert "is there already" in refused(*arguments)
    run("apply", a, base, files / "merged")
    assert "is there already" in refused("apply", a, base, files / "merged")
    run("apply", a, base, files / "merged", "--alpha", 0, "--overwrite")
    assert same(content(files / "merged"), content(base))
    assert "is the base itself" in refused("apply", a, base, base, "--overwrite")
    assert "a file, and the merged checkpoint is a folder" in refused("apply", a, base, tuned, "--overwrite")
    assert tuned.read_bytes() == before
    assert not [path for path in files.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("target", ["merged", "merged.safetensors"])
def test_an_interrupted_write_leaves_nothing(files: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = files / "base"
    if target.endswith("safetensors"):
        base = files / "single.safetensors"
        save_file(dict(model_of().state_dict()), base)
    adapter = Adapter.load(files / "a.safetensors")
    listing = sorted(files.rglob("*"))

    def stop(name: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(adapter, base, files / target, progress=stop)
    assert sorted(files.rglob("*")) == listing

    merge(adapter, base, files / target)
    before = content(files / target)
    with pytest.raises(KeyboardInterrupt):
        merge(adapter, base, files / target, alpha=0.5, overwrite=True, progress=stop)
    assert same(content(files / target), before)
    # Also where the last step, the renaming of a folder, is what fails.
    replace, calls = os.replace, []

    def fail(source: object, goal: object) -> None:
        calls.append(goal)
        if goal == files / target and not str(source).endswith(".old"):
            raise OSError("no more")
        replace(source, goal)

    monkeypatch.setattr(merge_module.os, "replace", fail)
    with pytest.raises(OSError, match="no more"):
        merge(adapter, base, files / target, alpha=0.5, overwrite=True)
    monkeypatch.undo()
    assert calls
    assert same(content(files / target), before)
    assert not list(files.rglob(".*"))


def test_a_merge_streams(files: Path) -> None:
    seen: list[str] = []
    merge(
        Adapter.load(files / "a.safetensors"), files / "base", files / "m", progress=lambda name, *_: seen.append(name)
    )
    assert sorted(seen) == sorted(model_of().state_dict())


def test_merge_checks_first(files: Path) -> None:
    adapter = Adapter.load(files / "a.safetensors")
    with pytest.raises(AdapterError, match=r"'0.weight' has other content"):
        merge(adapter, files / "tuned.safetensors", files / "m.safetensors")
    whole = Adapter({"n": Entry(torch.tensor([1]), torch.tensor([5], dtype=torch.int8), (4,), torch.int8)})
    save_file({"n": torch.zeros(4, dtype=torch.int8)}, files / "n.safetensors")
    with pytest.raises(AdapterError, match="takes no strength other than 1"):
        merge(whole, files / "n.safetensors", files / "m.safetensors", alpha=0.5)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        merge(whole, files / "n.safetensors", files / "no" / "m.safetensors")
    assert not (files / "m.safetensors").exists()
    merge(whole, files / "n.safetensors", files / "m.safetensors")
    assert content(files / "m.safetensors")["n"].tolist() == [0, 5, 0, 0]


def test_tied_names_are_all_changed(files: Path) -> None:
    weight = torch.randn(6, 4)
    save_file({"embed": weight, "head": weight.clone()}, files / "tied.safetensors")
    entry = Entry(torch.tensor([2]), torch.tensor([9.0]), (6, 4), torch.float32, aliases=("head", "other"))
    merge(Adapter({"embed": entry}), files / "tied.safetensors", files / "m.safetensors")
    found = content(files / "m.safetensors")
    assert torch.equal(found["embed"], found["head"])
    assert found["head"].view(-1)[2] == 9


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("inspect", "none.safetensors"), "no such file or directory"),
        (("inspect", "base"), "this is a folder, not a file"),
        (("inspect", "base/config.json"), "this is no whole safetensors file"),
        (("inspect", "tuned.safetensors"), "this is no SHiRA adapter"),
        (("verify", "a.safetensors", "none"), "no such file or directory"),
        (("extract", "base", "base", "o.safetensors"), "are the same: there is nothing to extract"),
        (("extract", "base", "none", "o.safetensors"), "no such file or directory"),
        (("extract", "base", "a.safetensors", "o.safetensors"), "the checkpoints do not match"),
        (("extract", "base", "tuned.safetensors", "no/o.safetensors"), "does not exist"),
        (("apply", "a.safetensors", "tuned.safetensors", "o.safetensors"), "does not fit"),
        (("convert", "base", "o.safetensors"), "adapter_config.json: no such file"),
    ],
)
def test_errors_are_one_sentence(
    files: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(files)
    assert says in refused(*arguments)


def test_wrong_usage_has_its_own_code(files: Path) -> None:
    run("apply", files / "a.safetensors", code=2)
    run("extract", "a", "b", "c", "--density", "2", code=2)
    run("what", code=2)


def test_bench_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shira import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "a" / "b" / "cli.py"))
    assert "benchmarks/speed" in refused("bench")
    (tmp_path / "benchmarks" / "speed").mkdir(parents=True)
    (tmp_path / "benchmarks" / "speed" / "test_one.py").write_text("def test_one(): pass\n")
    run("bench", "-q", "-p", "no:cacheprovider")


def test_completion_is_there() -> None:
    assert "--install-completion" in run("--help")


WITHOUT_TORCH = """
import sys
from shira.cli import main
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
loaded = {"torch", "shira_ops"} & set(sys.modules)
assert not loaded, loaded
"""


@pytest.mark.parametrize(
    "arguments",
    [("inspect", "a.safetensors"), ("inspect", "a.safetensors", "--json"), ("verify", "a.safetensors", "--header"),
     ("verify", "a.safetensors"), ("verify", "a.safetensors", "base"), ("--help",)],
    ids=" ".join,
)  # fmt: skip
def test_torch_is_not_imported(files: Path, arguments: tuple[str, ...]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, cwd=files, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_headers_need_no_numpy(files: Path) -> None:
    code = (
        "import sys; from shira._file import read_header; read_header(sys.argv[1]); assert 'numpy' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(files / "a.safetensors")], check=True, env=environment)


def test_the_stock_library_says_the_same_of_a_layout(files: Path) -> None:
    for path in (files / "a.safetensors", files / "tuned.safetensors"):
        metadata, places = _file.read_layout(str(path))
        with safe_open(path, "pt") as stock:
            assert (stock.metadata() or {}) == metadata
            assert set(stock.keys()) == set(places)
            for name, place in places.items():
                assert tuple(stock.get_slice(name).get_shape()) == place.shape
                assert stock.get_slice(name).get_dtype() == place.dtype
                raw = path.read_bytes()[place.begin : place.end]
                assert bytes(stock.get_tensor(name).view(torch.uint8).view(-1).tolist()) == raw
