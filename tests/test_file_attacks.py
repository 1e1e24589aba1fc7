"""Files from anywhere: each bad one is one sentence, from every reader, without a crash and without much memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import generate
from shira import Adapter, AdapterError, Switcher, _file

GOOD = generate.good().bytes()
HEADER = 8 + int.from_bytes(GOOD[:8], "little")
READERS = {"load": Adapter.load, "without torch": _file.read_whole}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("attacks")
    return folder, generate.corpus(folder)


def test_the_good_file_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(GOOD)
    adapter = Adapter.load(path)
    assert adapter.weights["a.weight"].indices.tolist() == [7 + 27 * i for i in range(generate.COUNT)]
    assert adapter.weights["a.weight"].values.view(torch.int16)[5] == 0x3F85
    assert adapter.weights["head.bias"].whole
    assert adapter.weights["head.bias"].values.tolist() == [1.0, -2.0, 0.5, 0.0]
    assert _file.read_whole(path).nnz == generate.COUNT + 4


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", [*generate.CHANGES, *generate._raw()])
def test_each_is_one_sentence(corpus: tuple[Path, dict[str, str]], name: str, reader: str) -> None:
    folder, says = corpus
    path = folder / f"{name}.safetensors"
    with pytest.raises(AdapterError, match=re.escape(says[name])) as error:
        READERS[reader](path)
    message = str(error.value)
    assert path.name in message
    assert "\n" not in message
    assert len(message) < 600 + len(str(path))


LIMITED = """
import json, os, resource, sys
sys.path[:0] = json.loads(os.environ["SHIRA_TEST_PATH"])
import torch
from shira import Adapter, AdapterError, _file
_file.read_whole(sys.argv[1])
Adapter.load(sys.argv[1])
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20),) * 2)
for path in sys.argv[2:]:
    for reader in (Adapter.load, _file.read_whole):
        try:
            reader(path)
            raise SystemExit(f"{path} was accepted")
        except AdapterError:
            pass
print("refused", len(sys.argv) - 2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own memory")
def test_memory_is_bounded(corpus: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """No file of the corpus has a megabyte: 24 MB of fresh memory must do for all of them."""
    folder, says = corpus
    good = tmp_path / "good.safetensors"
    good.write_bytes(GOOD)
    paths = [str(folder / f"{name}.safetensors") for name in says]
    environment = {**os.environ, "SHIRA_TEST_PATH": json.dumps(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(good), *paths], capture_output=True, text=True, env=environment
    )
    assert done.stdout == f"refused {len(paths)}\n", done.stdout + done.stderr


def accepts_or_refuses(path: Path, data: bytes) -> None:
    """Either a file that says something else, or one sentence; from both readers alike."""
    path.write_bytes(data)
    verdicts = []
    for reader in READERS.values():
        try:
            reader(path)
            verdicts.append("")
        except AdapterError as error:
            verdicts.append(str(error))
    assert bool(verdicts[0]) == bool(verdicts[1]), verdicts
    assert "\n" not in "".join(verdicts)


def test_every_byte_of_the_header_flipped(tmp_path: Path) -> None:
    for at in range(HEADER):
        data = bytearray(GOOD)
        data[at] ^= 1 << (at % 8)
        accepts_or_refuses(tmp_path / "flipped.safetensors", bytes(data))


def test_every_byte_of_the_code_flipped(tmp_path: Path) -> None:
    for at in range(len(GOOD) - len(generate.code_of([7 + 27 * i for i in range(generate.COUNT)])), len(GOOD)):
        data = bytearray(GOOD)
        data[at] ^= 0x80 >> (at % 8)
        accepts_or_refuses(tmp_path / "flipped.safetensors", bytes(data))


@pytest.mark.parametrize("cut", range(0, len(GOOD), 61))
def test_cut_anywhere(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(GOOD[:cut])
    for reader in READERS.values():
        with pytest.raises(AdapterError, match=r"cut\.safetensors: this is no whole safetensors file"):
            reader(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_anything_written_anywhere(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    changed = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at : at + data.draw(st.integers(0, 6))] = data.draw(st.binary(max_size=6))
        if not changed:
            return
    accepts_or_refuses(tmp_path_factory.getbasetemp() / "written.safetensors", bytes(changed))


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    loop, other = tmp_path / "loop.safetensors", tmp_path / "other.safetensors"
    loop.symlink_to(other)
    other.symlink_to(loop)
    dangling = tmp_path / "dangling.safetensors"
    dangling.symlink_to(tmp_path / "nothing")
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    for reader in READERS.values():
        with pytest.raises(AdapterError, match="this is a folder, not a file"):
            reader(tmp_path)
        with pytest.raises(OSError, match="symbolic links"):
            reader(loop)
        with pytest.raises(FileNotFoundError, match="dangling"):
            reader(dangling)
        with pytest.raises(AdapterError, match="a pipe or a device"):
            reader(pipe)  # and does not wait for a writer
        with pytest.raises(AdapterError, match="a pipe or a device"):
            reader(Path("/dev/zero"))


def test_another_base_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(GOOD)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 128).bfloat16(), "head": torch.nn.Linear(3, 4)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match="made for another base"):
        Switcher(model).add("evil", path)
    with pytest.raises(AdapterError, match="must have dtype bfloat16, got float32"):
        Switcher(model.float()).add("evil", path)
    assert all(torch.equal(value, before[name].float()) for name, value in model.state_dict().items())
