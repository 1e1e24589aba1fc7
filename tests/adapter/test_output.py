"""Merged checkpoints and the places they go to: nothing of the user's is lost, whatever is in the way or goes wrong."""

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

from shira import Adapter, AdapterError, Entry
from shira.adapter import _output
from shira.adapter.bake import merge

FLOAT = torch.float32


def entry(*values: float, at: tuple[int, ...] = (0,), shape: tuple[int, ...] = (4,), **rest: object) -> Entry:
    return Entry(torch.tensor(at), torch.tensor(values), shape, FLOAT, **rest)


def whole(*values: float, **rest: object) -> Entry:
    return Entry(torch.tensor([0], dtype=torch.int32), torch.tensor(values), (len(values),), FLOAT, len(values), **rest)


def shards(folder: Path, held: dict[str, dict[str, torch.Tensor]], index: dict[str, str] | None = None) -> Path:
    """A sharded checkpoint, its index by what each shard holds unless another is given."""
    folder.mkdir()
    for shard, tensors in held.items():
        save_file(tensors, folder / shard)
    where = {name: shard for shard, tensors in held.items() for name in tensors} if index is None else index
    size = sum(held[shard][name].nbytes for name, shard in where.items())
    metadata = {"total_size": size, "total_parameters": size // 4}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": metadata, "weight_map": where}))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return shards(
        tmp_path / "base", {"one.safetensors": {"a": torch.arange(4.0)}, "two.safetensors": {"b": torch.ones(4)}}
    )


@pytest.fixture
def adapter() -> Adapter:
    return Adapter({"a": entry(9.0, at=(1,))})


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, contents and links."""
    return {
        str(path.relative_to(folder)): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def refused(folder: Path, adapter: Adapter, base: Path, out: Path, says: str, **rest: object) -> None:
    before = tree(folder)
    with pytest.raises((AdapterError, OSError), match=says):
        merge(adapter, base, out, overwrite=True, **rest)
    assert tree(folder) == before


def test_only_an_earlier_result_is_overwritten(tmp_path: Path, base: Path, adapter: Adapter) -> None:
    out = tmp_path / "out"
    out.mkdir()
    merge(adapter, base, out, overwrite=True)  # an empty folder holds nothing that could be lost
    assert load_file(out / "one.safetensors")["a"].tolist() == [0, 9, 2, 3]
    merge(adapter, base, out, alpha=0, overwrite=True)
    assert load_file(out / "one.safetensors")["a"].tolist() == [0, 1, 2, 3]
    (out / "notes.txt").write_text("mine")
    refused(tmp_path, adapter, base, out, r"holds what was not written with it \('notes.txt'\)")
    (out / "notes.txt").unlink()
    (out / "sub").mkdir()
    refused(tmp_path, adapter, base, out, r"holds what was not written with it \('sub'\)")
    (out / "sub").rmdir()
    (out / _output.MARK).write_text("[")
    refused(tmp_path, adapter, base, out, "is not a merged checkpoint that was written here")
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("mine")
    refused(tmp_path, adapter, base, home, "is not a merged checkpoint that was written here")


def test_only_a_merged_file_is_overwritten(tmp_path: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file({"a": torch.arange(4.0)}, base, {"format": "pt"})
    merge(adapter, base, out)
    merge(adapter, base, out, alpha=0, overwrite=True)
    assert load_file(out)["a"].tolist() == [0, 1, 2, 3]
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", _output.MARK_KEY: "1"}
    for name, content in (("tuned.safetensors", base.read_bytes()), ("text", b"mine"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path, adapter, base, tmp_path / name, "is not a merged checkpoint that was written here")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(tmp_path, adapter, base, Path("."), "is the folder you are in")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path, adapter, base, tmp_path / "pipe", "is a pipe or a device")


def test_a_merged_file_opens_wherever_its_base_does(tmp_path: Path, adapter: Adapter) -> None:
    """Readers that take a file without metadata refuse metadata without a format."""
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    for metadata, merged in (
        (None, {"format": "pt"}),
        ({"format": "flax"}, {"format": "flax"}),
        ({"of": "me"}, {"format": "pt", "of": "me"}),
    ):
        save_file({"a": torch.arange(4.0)}, base, metadata)
        merge(adapter, base, out, overwrite=True)
        with safe_open(out, "pt") as file:
            assert file.metadata() == {**merged, _output.MARK_KEY: "1"}


def test_inputs_are_never_overwritten(tmp_path: Path, base: Path, adapter: Adapter) -> None:
    refused(tmp_path, adapter, base, base, "base itself, which is read")
    refused(tmp_path, adapter, base, base / "..", "is the folder that contains .*base, which is read")
    inside = tmp_path / "inside"
    merge(adapter, base, inside)
    single = inside / "one.safetensors"
    refused(tmp_path, adapter, single, inside, "is the folder that contains .*one.safetensors, which is read")
    hard = tmp_path / "hard.safetensors"
    os.link(single, hard)
    refused(tmp_path, adapter, single, hard, r"hard.safetensors is .*one.safetensors itself")
    linked = tmp_path / "linked"
    linked.symlink_to(base)
    refused(tmp_path, adapter, base, linked, "base itself, which is read")
    # A base whose files are links into what would be deleted, as the Hub's cache has them.
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "model.safetensors").symlink_to(single)
    refused(tmp_path, adapter, cache, inside, "is the folder that contains .*cache, which is read")
    file = tmp_path / "a.safetensors"
    adapter.save(file)
    refused(tmp_path, adapter, single, file, r"a.safetensors itself, which is read", inputs=(file,))


def test_what_comes_while_it_is_written_stays(tmp_path: Path, base: Path, adapter: Adapter) -> None:
    out = tmp_path / "out"

    def come(*rest: object) -> None:
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("mine")

    for overwrite, says in ((False, "has come there meanwhile"), (True, "is not a merged checkpoint")):
        with pytest.raises(FileExistsError, match=says):
            merge(adapter, base, out, overwrite=overwrite, progress=come)
        assert tree(out) == {"notes.txt": b"mine"}
        (out / "notes.txt").unlink()
        out.rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_folders_of_further_modules_are_copied(tmp_path: Path, base: Path, adapter: Adapter) -> None:
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "../up"}, {"path": "gone"}]
    (base / "modules.json").write_text(json.dumps(modules))
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    (base / "checkpoint-1").mkdir()
    (tmp_path / "up").mkdir()
    out = tmp_path / "out"
    merge(adapter, base, out)
    merge(adapter, base, out, overwrite=True)
    assert {"modules.json", "1_Pooling/config.json"} < set(tree(out))
    assert not (out / "checkpoint-1").exists()
    (out / "1_Pooling" / "mine").write_text("mine")
    refused(tmp_path, adapter, base, out, r"holds what was not written with it \('1_Pooling/mine'\)")


def test_links_are_followed(tmp_path: Path, base: Path, adapter: Adapter) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to("disk/out")
    merge(adapter, base, link)
    assert link.is_symlink()
    assert load_file(tmp_path / "disk" / "out" / "one.safetensors")["a"].tolist() == [0, 9, 2, 3]
    merge(adapter, base, link, alpha=0, overwrite=True)
    assert link.is_symlink()
    assert load_file(tmp_path / "disk" / "out" / "one.safetensors")["a"].tolist() == [0, 1, 2, 3]
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["out"]
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    refused(tmp_path, adapter, base, loop, "a link that leads in a circle")
    away = tmp_path / "away"
    away.symlink_to("nowhere/out")
    refused(tmp_path, adapter, base, away, "nowhere' to write 'out' into does not exist")


def test_mount_points_are_refused(
    tmp_path: Path, base: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(_output.os.path, "ismount", lambda path: path == str(out))
    refused(tmp_path, adapter, base, out, "is a mount point")


def test_a_stale_copy_is_neither_read_nor_changed(tmp_path: Path, adapter: Adapter) -> None:
    """Overlay shards: a later file holds a name anew, and the index says so."""
    old, new, other = torch.zeros(4), torch.arange(4.0), torch.ones(1)
    for number, (first, second) in enumerate((("one", "two"), ("two", "one"))):
        held = {f"{first}.safetensors": {"a": old, "b": other}, f"{second}.safetensors": {"a": new}}
        index = {"a": f"{second}.safetensors", "b": f"{first}.safetensors"}
        base = shards(tmp_path / f"base{number}", held, index)
        out = tmp_path / f"out{number}"
        merge(adapter, base, out)
        assert load_file(out / f"{second}.safetensors")["a"].tolist() == [0, 9, 2, 3]
        assert load_file(out / f"{first}.safetensors")["a"].tolist() == [0, 0, 0, 0]


def test_copies_of_a_tied_weight(tmp_path: Path) -> None:
    tied = Adapter({"embed": entry(9.0, aliases=("head", "other"))})
    out, path = tmp_path / "out.safetensors", tmp_path / "base.safetensors"
    base = {"embed": torch.arange(4.0), "head": torch.arange(4.0), "x": torch.zeros(2)}
    save_file(base, path)
    done = merge(tied, path, out)
    assert (done.entries, sorted(done.tensors), done.added) == (1, ["embed", "head"], ())
    found = load_file(out)
    assert found["embed"].tolist() == found["head"].tolist() == [9, 1, 2, 3]
    says = r"'head' and 'embed' are one \(tied\) weight in the adapter, and two that differ in the base"
    for other in (torch.arange(2.0), torch.arange(4.0).half(), -torch.arange(4.0), torch.arange(4.0).view(2, 2)):
        save_file({**base, "head": other}, path)
        refused(tmp_path, tied, path, tmp_path / "new.safetensors", says)
    # Zeros of both signs are equal, but their bits are not.
    save_file({**base, "head": torch.tensor([-0.0, 1.0, 2.0, 3.0])}, path)
    refused(tmp_path, tied, path, tmp_path / "new.safetensors", says)


def test_a_tied_weight_fused_under_the_name_that_the_base_has(tmp_path: Path) -> None:
    tied = Adapter({"embed": entry(9.0, aliases=("head",))})
    fused = Adapter.fuse([(tied, 1.0), (tied, 1.0)], {"head": torch.ones(4)})
    assert fused.weights["head"].aliases == ("embed",)
    assert fused.weights["head"].values.tolist() == [17]


def test_a_whole_overwrite_goes_onto_any_content(tmp_path: Path) -> None:
    path, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file({"a": torch.arange(4.0), "head": torch.zeros(2)}, path)
    made = Adapter({"head": whole(5.0, 6.0, fingerprint=123)})
    merge(made, path, out)
    assert load_file(out)["head"].tolist() == [5, 6]
    for adapter, alpha in ((made, 0.5), (Adapter({"head": whole(1.0, 1.0, fingerprint=123)}, delta=True), 1.0)):
        refused(tmp_path, adapter, path, tmp_path / "n.safetensors", "differs .by fingerprint.: 'head'", alpha=alpha)


def test_a_whole_parameter_that_the_base_lacks_is_added(tmp_path: Path, base: Path) -> None:
    made = Adapter({"a": entry(9.0), "head.weight": whole(5.0, 6.0), "head.bias": whole(7.0)})
    done = merge(made, base, tmp_path / "out")
    assert done.added == ("head.weight", "head.bias")
    assert done.nbytes == 4 * (4 + 4 + 2 + 1)
    last = load_file(tmp_path / "out" / "two.safetensors")
    assert {name: tensor.tolist() for name, tensor in last.items()} == {
        "b": [1, 1, 1, 1], "head.weight": [5, 6], "head.bias": [7]
    }  # fmt: skip
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 44, "total_parameters": 11}
    assert index["weight_map"] == {
        "a": "one.safetensors", "b": "two.safetensors", "head.weight": "two.safetensors", "head.bias": "two.safetensors"
    }  # fmt: skip
    again = Adapter.from_difference(tmp_path / "out", tmp_path / "out")
    assert not again.weights

    single = tmp_path / "single.safetensors"
    save_file({"module.a": torch.arange(4.0)}, single)
    merge(made, single, tmp_path / "m.safetensors")
    assert set(load_file(tmp_path / "m.safetensors")) == {"module.a", "module.head.bias", "module.head.weight"}

    wrapped = Adapter({f"module.{name}": entry for name, entry in made.weights.items()})
    merge(wrapped, single, tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()

    refused(tmp_path, made, base, tmp_path / "n", "'head.weight' is not in the base", alpha=0.5)
    near = Adapter({"model.a": whole(1.0, 2.0, 3.0, 4.0)})
    refused(tmp_path, near, base, tmp_path / "n", "'model.a' is not in the base, which has 'a'; with rename=")
    merge(near, base, tmp_path / "renamed", rename={r"^model\.": ""})
    assert load_file(tmp_path / "renamed" / "one.safetensors")["a"].tolist() == [1, 2, 3, 4]
    with pytest.raises(AdapterError, match=r"rename: 'head.weight' and 'head.bias' both become 'h'"):
        merge(made, base, tmp_path / "n", rename=lambda name: "h" if name != "a" else name)


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    path, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file({"a": torch.tensor([1.0, float("nan"), 3.0, 4.0]), "h": torch.zeros(4).half()}, path)
    bad = Adapter({"a": entry(float("nan"), float("inf"), at=(0, 2))})
    refused(tmp_path, bad, path, out, "weight 'a': .*NaN")
    merge(bad, path, out, check_finite=False)
    assert str(load_file(out)["a"].tolist()) == "[nan, nan, inf, 4.0]"
    out.unlink()
    much = Adapter({"a": entry(3e38, 3e38, at=(0, 1))}, delta=True)
    refused(tmp_path, much, path, out, r"'a': 1 entries would become inf or NaN in float32 at strength 2", alpha=2)
    half = Adapter({"h": Entry(torch.tensor([0]), torch.tensor([1e6]), (4,), torch.float16)})
    refused(tmp_path, half, path, out, r"'h': 1 entries would become inf or NaN in float16")
    for alpha in (float("nan"), float("inf"), 1e39, True, "1"):
        refused(tmp_path, much, path, out, "alpha must be a finite number", alpha=alpha)


KILLS = """
import json, os, resource, shutil, signal, sys
from pathlib import Path
from safetensors.torch import load_file
from shira import Adapter
from shira.adapter import _file, _output
from shira.merge import merge

folder = Path(sys.argv[1])
adapter = Adapter.load(folder / "a.safetensors")
jobs = {"base": "out", "single.safetensors": "out.safetensors"}
exchange = _output._exchange


def calls(limit):
    '''Die before or after the limit-th step that changes the disk.'''
    done = 0

    def counted(function):
        def run(*args, **kwargs):
            nonlocal done
            done += 1
            if done == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            done += 1
            if done == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return run

    for place, name in ((os, "rename"), (os, "replace"), (os, "mkdir"), (os, "unlink"), (_file, "fsync"),
                        (_output, "_exchange"), (shutil, "rmtree"), (shutil, "copyfile"), (_file, "write_safetensors")):
        setattr(place, name, counted(getattr(place, name)))


def child(work):
    pid = os.fork()
    if not pid:
        try:
            work()
        except OSError as error:
            print(error, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def value(out):
    path = folder / out
    return load_file(path / "one.safetensors" if path.is_dir() else path)["a"].tolist()


deaths = 0
for base, out in jobs.items():
    old = [0.0, 9.0, 2.0, 3.0]
    merge(adapter, folder / base, folder / out)
    for limit in range(1, 200):
        alpha = 0.0 if value(out) == old else 1.0
        allowed = (value(out), [0.0, 1.0 if alpha == 0 else 9.0, 2.0, 3.0])

        def work():
            calls(limit)
            merge(adapter, folder / base, folder / out, alpha=alpha, overwrite=True)

        status = child(work)
        assert value(out) in allowed, (limit, value(out))
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        deaths += 1
    for left in folder.glob(".*.tmp"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()

    before = value(out)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        merge(adapter, folder / base, folder / out, overwrite=True)

    assert os.WEXITSTATUS(child(full)) == 1
    assert value(out) == before
    assert not list(folder.glob(".*"))
print(deaths)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="kills as Linux has them")
def test_killed_at_any_step_there_is_the_old_or_the_new(tmp_path: Path, base: Path, adapter: Adapter) -> None:
    adapter.save(tmp_path / "a.safetensors")
    save_file({"a": torch.arange(4.0)}, tmp_path / "single.safetensors")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    *said, deaths = done.stdout.splitlines()
    assert int(deaths) > 20
    for out, sentence in zip(("out", "out.safetensors"), said, strict=True):
        assert sentence == f"[Errno 27] File too large: '{tmp_path / out}'"
