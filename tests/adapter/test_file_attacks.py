"""Files from anywhere: each bad one is one sentence, from every reader, without a crash and without much memory."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import generate
from shira import Adapter, AdapterError, Entry, Switcher, _text
from shira.adapter import _file

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
from shira import Adapter, AdapterError
from shira.adapter import _file
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
    """No file of the corpus has a megabyte: 24 MB of fresh memory must be enough for each of them."""
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
    """Either a file that says something else, or one sentence; the same from both readers."""
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
        with pytest.raises(AdapterError, match=r"cut\.safetensors: this is not a whole safetensors file"):
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


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**400]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["code", "seed", "whole", "bfloat16", "int8", "f" * 16, "BF16", "U8", "F4"]),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def _places(value: object, path: tuple = ()) -> list[tuple]:
    """The paths to everything within a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += _places(inner, (*path, key))
    return found


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_anything_said_in_the_header(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Well-formed lies: any value in place of any other."""
    file = generate.good()
    said = {"weights": file.weights, "about": file.about, "header": file.header, "metadata": file.metadata}
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from([path for path in _places(said) if len(path) > 1]))
        place = said
        for key in path:
            place = place[key]
        place[last] = data.draw(VALUES)
    accepts_or_refuses(tmp_path_factory.getbasetemp() / "said.safetensors", file.bytes())


def test_an_empty_weight_in_absurd_granules(tmp_path: Path) -> None:
    file = generate.good()
    file.weights["a.weight"].update(shape=[0], granule=2**70, count=0)
    file.header["a.weight.values"].update(shape=[0], data_offsets=[16, 16])
    file.header["a.weight.indices"].update(shape=[0], data_offsets=[16, 16])
    del file.body[16:]
    path = tmp_path / "empty.safetensors"
    path.write_bytes(file.bytes())
    for reader in READERS.values():
        with pytest.raises(AdapterError, match="granule must divide its 0 entries"):
            reader(path)


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


def saved(path: Path) -> bytes:
    """A file with everything in it that is written, checksums too: a code, a seed, a whole parameter."""
    numel = 64
    entries = {
        "a": Entry(torch.tensor([1, 5, 40]), torch.tensor([1.0, -2.0, 3.0]).bfloat16(), (8, 8), torch.bfloat16, 1, 77),
        "s": Entry(torch.ops.shira.select_random(numel, 4, 9), torch.arange(4.0), (numel,), torch.float32, seed=9),
        "w": Entry(torch.zeros(1, dtype=torch.int32), torch.tensor([7, 8]), (2,), torch.int64, 2, aliases=("v",)),
    }
    Adapter(entries, alpha=0.5, provenance={"n": 1}).save(path, seeds=True)
    return path.read_bytes()


def content(adapter: Adapter) -> list[object]:
    weights = [
        (name, entry.indices.tolist(), entry.values.tolist(), entry.values.dtype, entry.shape, entry.dtype,
         entry.granule, entry.fingerprint, entry.seed, entry.aliases)
        for name, entry in adapter.weights.items()
    ]  # fmt: skip
    return [weights, adapter.alpha, adapter.delta, adapter.mask, adapter.provenance]


def test_no_bit_is_lost_in_silence(tmp_path: Path) -> None:
    """One bit of each byte of a file, the other way round: refused, or it changed nothing that the file says."""
    path = tmp_path / "a.safetensors"
    data = saved(path)
    good = content(Adapter.load(path))
    body = 8 + int.from_bytes(data[:8], "little")
    accepted = 0
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << (at % 8)
        path.write_bytes(changed)
        for reader in READERS.values():
            try:
                found = reader(path)
            except AdapterError:
                continue
            assert at < body
            accepted += 1
            if isinstance(found, Adapter):
                assert content(found) == good
    # The spaces at the header's end, the key "format" and its value, the name of the key that holds the checksums.
    assert accepted < 2 * 60


@pytest.mark.parametrize("bit", range(8))
def test_a_damaged_file_is_named(tmp_path: Path, bit: int) -> None:
    path = tmp_path / "a.safetensors"
    data = bytearray(saved(path))
    place = _file.read_layout(path)[1]["s.values"]
    data[place.end - 1] ^= 1 << bit
    path.write_bytes(data)
    says = r"a\.safetensors: weight 's': its values or indices are not as they were .* \(1 of 3 weights differ\)"
    for reader in READERS.values():
        with pytest.raises(AdapterError, match=says):
            reader(path)
    assert _file.read_header(path).checksums
    assert Adapter.load(path, checksums=False).weights["s"].values[:3].tolist() == [0.0, 1.0, 2.0]


def test_metadata_that_was_changed(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "a.safetensors"
    saved(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(tensors, path, metadata)
    assert Adapter.load(path).alpha == 0.5  # other bytes, the same content
    metadata["shira.adapter"] = metadata["shira.adapter"].replace('"alpha":0.5', '"alpha":0.25')
    save_file(tensors, path, metadata)
    for reader in READERS.values():
        with pytest.raises(AdapterError, match=r"changed on purpose, take shira\.checksums out of it"):
            reader(path)
    del metadata["shira.checksums"]
    save_file(tensors, path, metadata)
    assert Adapter.load(path).alpha == 0.25
    assert not _file.read_header(path).checksums


def test_headers_of_many_values(tmp_path: Path) -> None:
    """Refused before anything is made of them, inside the header's texts too."""
    path = tmp_path / "large.safetensors"
    many = _file.MAX_JSON_VALUES
    inner = generate.good()
    text = json.dumps({"__metadata__": {**inner.metadata, "shira.adapter": "@", "shira.weights": "{}"}}).encode()
    for data in (b"{" + b"[" * many, text.replace(b"@", b"[" + b"1," * (many // 2) + b"1,1]" + b" ," * (many // 2))):
        path.write_bytes(generate.framed(data, b""))
        for reader in (Adapter.load, _file.read_whole, _file.read_layout):
            tracemalloc.start()
            with pytest.raises(AdapterError, match="values are more than the 4,000,000 that are read"):
                reader(path)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 4 * len(data)


def test_headers_of_many_bytes(tmp_path: Path) -> None:
    """Refused by their length, unread; a checkpoint's may be as long as the stock library allows."""
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", 50_000_001) + b"{}")
    os.truncate(path, 8 + 100_000_002)
    for reader in READERS.values():
        with pytest.raises(AdapterError, match=r"a header of 50,000,001 bytes is longer than the 50,000,000 that are"):
            reader(path)
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{}")
    os.truncate(path, 8 + 100_000_002)
    with pytest.raises(AdapterError, match=r"a header of 100,000,001 bytes is longer than the 100,000,000 that are"):
        _file.read_layout(path)


def test_what_would_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = Adapter({}, provenance={"notes": ["a"] * 100})
    for limit, says in (
        ("MAX_JSON_VALUES", "values are more than the 50"),
        ("MAX_ADAPTER_HEADER", "longer than the 50"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(_file, limit, 50)
            with pytest.raises(AdapterError, match=says):
                adapter.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_messages_show_the_beginning() -> None:
    assert _text.shown("x" * 80) == repr("x" * 80)
    assert _text.shown("x" * 10**7) == f"'{'x' * 80}'... (10,000,000 characters)"
    assert _text.shown(10**5000) == "an int of 16,610 bits"
    assert _text.shown([10**5000]) == "a list"
    assert len(_text.shown([["x" * 10**6] * 10**6] * 100)) < 100
    assert len(_text.named("\0" * 10**7)) < 900
    assert _text.shown([300]) == "[300]"


def test_a_pipe_in_place_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put there after it was looked at: opening it must not wait for a writer."""
    path = tmp_path / "a.safetensors"
    os.mkfifo(path)
    monkeypatch.setattr(_file, "check_regular", lambda path: None)
    with pytest.raises(AdapterError, match="the file was replaced while it was opened"):
        Adapter.load(path)
