"""The command line: what each command does, what it says when it cannot, and that it starts without torch."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import shira_ops
from shira import Adapter, AdapterError, Entry, Switcher
from shira.adapter import _file, _output, hub
from shira.adapter.bake import merge

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


def test_a_closed_output(files: Path) -> None:
    """As ``shira inspect FILE >&-`` in a shell; a result is written all the same."""
    out = files / "closed.safetensors"
    for arguments, code in (
        (("inspect", files / "a.safetensors"), 0),
        (("apply", files / "a.safetensors", files / "base", out), 0),
        (("inspect", files / "none.safetensors"), 1),
    ):
        shell = ["sh", "-c", '"$@" >&-', "sh", sys.executable, "-m", "shira.cli", *map(str, arguments)]
        done = subprocess.run(shell, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
    assert out.exists()


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
    assert "was made for another base than" in said
    assert "the content of 1 of 1 weights differs (by fingerprint): '0.weight'" in said
    assert "leave --header out" in refused("verify", file, files / "base", "--header")
    save_file({f"model.{name}": one for name, one in content(files / "base").items()}, files / "wrapped.safetensors")
    said = refused("verify", file, files / "wrapped.safetensors")
    assert "'0.weight' is not in the base, which has 'model.0.weight'; " in said
    assert said.endswith("; with --rename '^=model.' all of its names fit\n")
    run("verify", file, files / "wrapped.safetensors", "--rename", "^=model.")


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
    names = [
        ".shira-merged.json",
        "config.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
    ]
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


def test_convert_to_another_dtype(files: Path) -> None:
    base = {name: tensor.float() for name, tensor in content(files / "base").items()}
    tuned = {name: tensor.float() for name, tensor in content(files / "tuned.safetensors").items()}
    save_file(base, files / "base32.safetensors")
    Adapter.from_difference(base, tuned).save(files / "a32.safetensors")
    out = files / "a16.safetensors"
    run("convert", files / "a32.safetensors", out, "--dtype", "bfloat16", "--base", files / "base")
    assert same_adapters(out, files / "a.safetensors")
    assert json.loads(run("verify", out, files / "base", "--json"))["without_fingerprint"] == []
    assert "is there already" in refused("convert", files / "a32.safetensors", out, "--dtype", "bfloat16")
    assert "must be one of float16, bfloat16" in refused("convert", out, files / "n", "--dtype", "int8")
    to_peft = ("--dtype", "bfloat16", "--density", 0.5)
    assert "--density and --granule are for a LoRA" in refused("convert", out, files / "n", *to_peft)


def test_nothing_is_overwritten_unasked(files: Path) -> None:
    a, base, tuned = files / "a.safetensors", files / "base", files / "tuned.safetensors"
    before = tuned.read_bytes()
    for arguments in (("extract", base, a, tuned), ("fuse", a, "--base", base, "--out", tuned), ("convert", a, tuned)):
        assert "is there already" in refused(*arguments)
    run("apply", a, base, files / "merged")
    assert "is there already" in refused("apply", a, base, files / "merged")
    run("apply", a, base, files / "merged", "--alpha", 0, "--overwrite")
    assert same(content(files / "merged"), content(base))
    assert f"is {base} itself, which is read" in refused("apply", a, base, base, "--overwrite")
    assert "is a file, and the merged checkpoint is a folder" in refused("apply", a, base, tuned, "--overwrite")
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

    # Also where the last step is what fails: with the exchange of two folders, and without.
    def fail(source: object, goal: object, *rest: object) -> None:
        if goal == files / target and not str(source).endswith(".old"):
            raise OSError("no more")
        move(source, goal)

    move = os.replace
    for exchange in (True, False):
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, fail)
        monkeypatch.setattr(_output, "_exchange", fail if exchange else lambda one, two: False)
        with pytest.raises(OSError, match="no more"):
            merge(adapter, base, files / target, alpha=0.5, overwrite=True)
        monkeypatch.undo()
        assert same(content(files / target), before)
        assert not [path for path in files.rglob(".*") if path.name != _output.MARK]


def test_a_merge_streams(files: Path) -> None:
    seen: list[str] = []
    merge(
        Adapter.load(files / "a.safetensors"), files / "base", files / "m", progress=lambda name, *_: seen.append(name)
    )
    assert sorted(seen) == sorted(model_of().state_dict())


def test_merge_checks_first(files: Path) -> None:
    adapter = Adapter.load(files / "a.safetensors")
    with pytest.raises(AdapterError, match=r"made for another base than .* \(by fingerprint\): '0.weight'"):
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
        (("inspect", "base"), "base: the folder has no shira_adapter.safetensors, and 2 other .safetensors files"),
        (("inspect", "base/config.json"), "this is not a whole safetensors file"),
        (("inspect", "tuned.safetensors"), "this is not a SHiRA adapter"),
        (("verify", "a.safetensors", "none"), "no such file or directory"),
        (("extract", "base", "base", "o.safetensors"), "are the same: there is nothing to extract"),
        (("extract", "base", "none", "o.safetensors"), "no such file or directory"),
        (("extract", "base", "a.safetensors", "o.safetensors"), "the checkpoints do not match"),
        (("extract", "base", "tuned.safetensors", "no/o.safetensors"), "does not exist"),
        (("apply", "a.safetensors", "tuned.safetensors", "o.safetensors"), "another base than tuned.safetensors"),
        (("convert", "base", "o.safetensors"), "adapter_config.json: no such file"),
    ],
)
def test_errors_are_one_sentence(
    files: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(files)
    assert says in refused(*arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("apply", "a.safetensors"), r"shira apply: Missing argument 'base' (see shira apply --help)"),
        (("extract", "a", "b", "c", "--density", "2"), "shira extract: Invalid value for '--density'"),
        (("what",), "shira: No such command 'what' (see shira --help)"),
        (("inspcet",), "Did you mean 'inspect'?"),
        (("--nonsense",), "shira: No such option"),
        (("apply", "a", "b", "c", "--alpha", "big"), "shira apply: Invalid value for '--alpha'"),
    ],
)
def test_wrong_usage_is_one_sentence_with_its_own_code(arguments: tuple[str, ...], says: str) -> None:
    said = run(*arguments, code=2)
    assert says in said
    assert said.count("\n") == 1
    if arguments[0] == "apply":
        result = CliRunner().invoke(app, [*arguments, "--json"])
        assert result.exit_code == 2
        assert f"shira apply: {json.loads(result.stdout)['error']}\n" == said


def test_without_arguments_there_is_help_and_a_version() -> None:
    assert "verify" in run()
    assert run("--version") == f"shira-ops {metadata.version('shira-ops')}\n"


def test_failures_in_json(files: Path) -> None:
    for arguments in (
        ("inspect", files / "none"),
        ("apply", files / "a.safetensors", files / "tuned.safetensors", "o"),
    ):
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert result.exit_code == 1
        assert not result.stderr
        assert f"shira {arguments[0]}: {json.loads(result.stdout)['error']}\n" == refused(*arguments)


def test_strange_names_stay_on_one_line(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    assert refused("inspect", "a\nb\x1b[2J") == "shira inspect: a\\x0ab\\x1b[2J: no such file or directory\n"
    assert refused("inspect", "-") == "shira inspect: -: no such file or directory\n"
    for name in ("-x\ny.safetensors", "ünï🙂.safetensors", "a=0.5", "[red]"):
        run("extract", "--", "base", "tuned.safetensors", name)
        assert run("inspect", "--", name).isprintable() is False  # lines of a table
        assert "\\x0a" in run("verify", "--", name) or "\n" not in name
        run("apply", "--", name, "base", f"out {name}")
        assert same(content(files / f"out {name}"), content(files / "tuned.safetensors"))


def test_folders_and_names_on_the_hub_go_wherever_a_file_goes(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    Adapter.load("a.safetensors").save_pretrained("saved")
    (files / "other").mkdir()
    Adapter.load("a.safetensors").save("other/mine.safetensors")
    asked = []

    def download(repo: str, filename: str, **rest: object) -> str:
        asked.append(repo)
        return "a.safetensors"

    monkeypatch.setattr(hub, "download", download)
    for number, given in enumerate(("saved", "other", "somebody/style")):
        assert json.loads(run("inspect", given, "--json"))["nnz"] == 58
        run("verify", given, "base")
        run("apply", given, "base", f"out{number}")
        assert same(content(files / f"out{number}"), content(files / "tuned.safetensors"))
        run("fuse", f"{given}=0.5", "--base", "base", "--out", f"fused{number}.safetensors")
    assert asked == ["somebody/style"] * 4
    assert "no such file or directory" in refused("inspect", "other/gone")  # a local folder is not a name
    monkeypatch.setattr(hub, "download", lambda *rest, **more: hub_missing())
    assert "there is no such file or folder, and as a name on the Hub: not there" in refused("inspect", "no/such")
    (files / "other" / "second.safetensors").write_bytes(b"")
    assert "no shira_adapter.safetensors, and 2 other" in refused("inspect", "other")


def hub_missing() -> None:
    raise AdapterError("not there")


def test_rename(files: Path) -> None:
    tuned = {f"model.{name}": tensor for name, tensor in content(files / "tuned.safetensors").items()}
    extra = {name.replace("0.", "first."): tensor for name, tensor in tuned.items()}
    save_file(extra, files / "other.safetensors")
    out = files / "out.safetensors"
    assert "brings names together" in refused("extract", files / "base", files / "other.safetensors", out)
    rules = ("--rename", r"^model\.=", "--rename", "(?=first)first=0")
    run("extract", files / "base", files / "other.safetensors", out, *rules)
    assert same_adapters(out, files / "a.safetensors")
    back = ("--rename", "^=model.", "--rename", r"\.0\.=.first.")
    run("verify", out, files / "other.safetensors", *back, code=1)
    base = {f"model.{name}".replace("0.", "first."): tensor for name, tensor in content(files / "base").items()}
    save_file(base, files / "other base.safetensors")
    run("verify", out, files / "other base.safetensors", *back)
    run("apply", out, files / "other base.safetensors", files / "merged.safetensors", *back)
    assert same(content(files / "merged.safetensors"), extra)
    assert "is not in the base, which has 'model.1.bias'" in refused("verify", out, files / "other base.safetensors")
    assert "PATTERN=REPLACEMENT" in refused("verify", out, files / "base", "--rename", "x")
    twice = ("--rename", "a=b", "--rename", "a=c")
    assert "two replacements for 'a'" in refused("verify", out, files / "base", *twice)
    assert "is not a regular expression" in refused("verify", out, files / "base", "--rename", "(=x")


def same_adapters(one: Path, two: Path) -> bool:
    first, second = Adapter.load(one).weights, Adapter.load(two).weights
    return first.keys() == second.keys() and all(
        torch.equal(first[name].indices, second[name].indices) and torch.equal(first[name].values, second[name].values)
        for name in first
    )


def test_strengths_are_finite(files: Path) -> None:
    a, base = files / "a.safetensors", files / "base"
    for alpha in ("nan", "inf", "1e39"):
        said = refused("apply", a, base, files / "m", "--alpha", alpha)
        assert "--alpha must be a finite number (of float32)" in said
        said = refused("fuse", f"{a}={alpha}", "--base", base, "--out", files / "f.safetensors")
        assert f"the strength of {a} must be a finite number" in said
    entry = Entry(torch.tensor([3]), torch.tensor([2.0]).bfloat16(), (48, 32), torch.bfloat16)
    Adapter({"0.weight": entry}, delta=True).save(files / "d.safetensors")
    much = ("apply", files / "d.safetensors", base, files / "m", "--alpha", "3e38")
    assert "'0.weight': 1 entries would become inf or NaN in bfloat16 at strength 3e+38" in refused(*much)
    assert not (files / "m").exists()
    run(*much, "--allow-nonfinite")
    assert content(files / "m")["0.weight"].view(-1)[3] == torch.inf
    fused = ("fuse", f"{files / 'd.safetensors'}=3e38", "--base", base, "--out", files / "f.safetensors")
    assert "1 of its 1 values are not finite (1 infinite); check_finite=False (--allow-nonfinite)" in refused(*fused)
    run(*fused, "--allow-nonfinite")
    assert Adapter.load(files / "f.safetensors").weights["0.weight"].values.tolist() == [torch.inf]


def test_verify_and_apply_agree_on_aliases_and_heads(files: Path) -> None:
    weight = model_of().state_dict()["0.weight"]
    base = {"embed": weight, "head": weight + 1}
    save_file(base, files / "base.safetensors")
    entry = Entry(torch.tensor([0]), torch.ones(1).bfloat16(), (48, 32), torch.bfloat16, aliases=("head",))
    score = Entry(torch.zeros(1, dtype=torch.int32), torch.ones(4), (4,), torch.float32, 4, fingerprint=7)
    Adapter({"embed": entry, "score": score}).save(files / "t.safetensors")
    says = "'head' and 'embed' are one (tied) weight in the adapter, and two that differ in the base"
    assert says in refused("verify", files / "t.safetensors", files / "base.safetensors")
    assert says in refused("apply", files / "t.safetensors", files / "base.safetensors", files / "m.safetensors")
    save_file({**base, "head": weight.clone()}, files / "base.safetensors")
    assert "added by apply: score" in run("verify", files / "t.safetensors", files / "base.safetensors")
    done = json.loads(
        run("apply", files / "t.safetensors", files / "base.safetensors", files / "m.safetensors", "--json")
    )
    assert (done["entries"], done["tensors"], done["added"]) == (5, ["embed", "head"], ["score"])
    found = content(files / "m.safetensors")
    assert found["score"].tolist() == [1] * 4
    assert torch.equal(found["embed"], found["head"])


def test_commands_overwrite_only_their_own(files: Path) -> None:
    a, base, tuned = files / "a.safetensors", files / "base", files / "tuned.safetensors"
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    shard, hard = base / "model-1.safetensors", files / "hard.safetensors"
    os.link(a, hard)
    fuse, peft = ("fuse", a, "--base", base, "--out"), ("--base", base, "--overwrite")
    for arguments, says in (
        (("extract", base, tuned, tuned), "tuned.safetensors itself, which is read"),
        (("extract", base, tuned, shard), "a part of"),
        (("extract", base, tuned, base), "base itself, which is read"),
        (("extract", base, base, tuned), "is not an adapter file"),
        ((*fuse, a), "a.safetensors itself, which is read"),
        ((*fuse, hard), "hard.safetensors is"),
        ((*fuse, shard), "a part of"),
        (("convert", a, a), "a.safetensors itself, which is read"),
        (("convert", a, tuned), "is a file, and PEFT's adapter is a folder"),
        (("convert", a, files), "is the folder that contains"),
        (("apply", a, base, a), "a.safetensors itself, which is read"),
        (("apply", a, base, files), "is the folder that contains"),
    ):
        more = peft if arguments[0] == "convert" else ("--overwrite",)
        assert says in refused(*arguments, *more)
    (files / "mine").mkdir()
    (files / "mine" / "notes").write_text("mine")
    assert "holds something else than an adapter of PEFT's SHiRA" in refused("convert", a, files / "mine", *peft)
    assert "is a folder, and the result is a file" in refused("extract", base, tuned, files / "mine", "--overwrite")
    assert all(path.read_bytes() == content for path, content in before.items())

    link = files / "link.safetensors"
    link.symlink_to("real.safetensors")
    run("extract", base, tuned, link)
    run("extract", base, tuned, link, "--overwrite")
    assert link.is_symlink()
    assert same_adapters(files / "real.safetensors", a)


def test_a_full_disk_names_the_file(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*rest: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    listing = sorted(files.rglob("*"))
    monkeypatch.setattr(_file, "write_safetensors", full)
    a, base = files / "a.safetensors", files / "base"
    for arguments in (("extract", base, files / "tuned.safetensors", files / "out"), ("apply", a, base, files / "out")):
        assert f"{files / 'out'}: no space left on device" in refused(*arguments)
    assert sorted(files.rglob("*")) == listing


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
    code = "import sys; from shira.adapter._file import read_header; read_header(sys.argv[1])"
    code += "; assert not {'numpy', 'torch'} & sys.modules.keys()"
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
