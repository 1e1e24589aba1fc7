"""docs/format.md says what is so: its examples are read from the page."""

from __future__ import annotations

import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import shira_ops
from shira import Adapter, Entry, _codec
from shira._granules import signed
from shira.adapter import _difference
from shira.sync import Publisher, Update

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
WORD = 2**64 - 1


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading row."""
    lines = PAGE[PAGE.index(heading) :].splitlines()[2:]
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return found


def test_fingerprints() -> None:
    table = rows("| bytes | fingerprint |")
    assert len(table) == 4
    for data, expected in table:
        raw = b"" if data == "none" else bytes.fromhex(data)
        found = int(shira_ops.fingerprint(torch.tensor(list(raw), dtype=torch.uint8))) & WORD
        assert f"{found:016x}" == expected


def test_seeds() -> None:
    table = rows("| n | k | seed | indices |")
    assert len(table) == 3
    for n, k, seed, expected in table:
        found = shira_ops.select_random(int(n), int(k), signed(int(seed, 16)))
        assert found.tolist() == [int(number) for number in expected.split(",")]


def test_the_code() -> None:
    block = re.search(r"the indices 3, 4, 260, 770 .*?```\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    code = bytes.fromhex("".join(re.sub(r"   .*|;.*", "", line) for line in block[1].splitlines()[:2]) + "00ff00fffe")
    found = shira_ops.encode_indices(torch.tensor([3, 4, 260, 770]))
    assert bytes(found.tolist()) == code


def example(before: str) -> bytes:
    """The bytes of the first block of code after some words."""
    block = re.search(re.escape(before) + r".*?```\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    return bytes.fromhex("".join(re.sub(r"   .*", "", line) for line in block[1].splitlines()))


def test_the_code_of_version_2() -> None:
    found = shira_ops.encode_indices(torch.tensor([5, 306, 914, 1500]), version=2)
    assert bytes(found.tolist()) == example("the indices 5, 306, 914, 1500")
    table = rows("| density | entropy | version 1 | version 2 | over the entropy |")
    assert len(table) == 5
    for density, entropy, first, second, over in table:
        p = float(density.split()[0]) / 100
        bits = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) / p
        assert f"{bits:.2f}" == entropy
        uniform = np.random.default_rng(1).random(200_000)
        indices = np.cumsum(np.floor(np.log1p(-uniform) / math.log1p(-p)).astype(np.int64) + 1) - 1
        one, two = (8 * _codec.encode(indices, version=version).size / indices.size for version in (1, 2))
        assert one == pytest.approx(float(first), abs=0.02)
        assert two == pytest.approx(float(second), abs=0.02)
        assert 100 * (two / bits - 1) == pytest.approx(float(over.split()[0]), abs=0.3)


def test_the_number_code() -> None:
    numbers = np.array([1, -1, 1, 2, -1, 700, -3], dtype=np.int16)
    assert _codec.encode_numbers(numbers).tobytes() == example("1, -1, 1, 2, -1, 700, -3")


def test_differences() -> None:
    before, after = torch.tensor([1.0, -2.0, 0.0]).bfloat16(), torch.tensor([1.0078125, -2.015625, -0.0]).bfloat16()
    said = re.search(r"For example bfloat16 entries .*?differences (.*?)\.\n", PAGE, re.DOTALL)
    assert said is not None
    assert _difference.difference(before, after).tolist() == [int(number) for number in said[1].split(",")]
    words = re.findall(r"`([0-9a-f]{4})`", said[0])
    assert [f"{word & 0xFFFF:04x}" for word in torch.cat([before, after]).view(torch.int16).tolist()] == words


@pytest.fixture
def whole_file() -> bytes:
    header = re.search(r"```json\n(.*?)\n```", PAGE, re.DOTALL)
    body = re.search(r"The rest of the file:\n\n```\n(.*?)```", PAGE, re.DOTALL)
    assert header is not None
    assert body is not None
    text = header[1].encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(bytes.fromhex(line.split("   ")[0]) for line in body[1].splitlines())
    return len(text).to_bytes(8, "little") + text + data


def test_the_whole_file_reads(whole_file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "page.safetensors"
    path.write_bytes(whole_file)
    adapter = Adapter.load(path)
    weight, whole = adapter.weights["w"], adapter.weights["b"]
    assert weight.indices.tolist() == [1, 6]
    assert torch.equal(weight.values, torch.tensor([1.0, -2.0]).bfloat16())
    assert weight.fingerprint == int(shira_ops.fingerprint(torch.arange(8).bfloat16())) & WORD
    assert whole.whole
    assert whole.values.tolist() == [0.5, 0.25]
    assert whole.aliases == ("c",)
    assert adapter.provenance == {"data": "made up"}


def test_the_checksums(whole_file: bytes) -> None:
    """In plain Python, by the words of the page."""

    def splitmix64(x: int) -> int:
        z = (x + 0x9E3779B97F4A7C15) & WORD
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        return z ^ (z >> 31)

    def fingerprint(data: bytes) -> int:
        data += b"\0" * (-len(data) % 8)
        words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
        return sum(splitmix64(word ^ (at * 0x9E3779B97F4A7C15 & WORD)) for at, word in enumerate(words)) & WORD

    length = int.from_bytes(whole_file[:8], "little")
    header, body = json.loads(whole_file[8 : 8 + length]), whole_file[8 + length :]
    metadata = header["__metadata__"]
    words = [fingerprint((metadata["shira.adapter"] + metadata["shira.weights"]).encode())]
    for name in json.loads(metadata["shira.weights"]):
        prints = []
        for part in ("values", "indices"):
            begin, end = header.get(f"{name}.{part}", {"data_offsets": (0, 0)})["data_offsets"]
            prints.append(fingerprint(body[begin:end]).to_bytes(8, "little"))
        words.append(fingerprint(b"".join(prints)))
    assert metadata["shira.checksums"] == "".join(f"{word:016x}" for word in words)


def test_the_whole_file_is_what_is_written(whole_file: bytes, tmp_path: Path) -> None:
    base = torch.arange(8).bfloat16()
    entries = {
        "w": Entry(
            torch.tensor([1, 6], dtype=torch.int32),
            torch.tensor([1.0, -2.0]).bfloat16(),
            (2, 4),
            torch.bfloat16,
            fingerprint=int(shira_ops.fingerprint(base)) & WORD,
        ),
        "b": Entry(
            torch.zeros(1, dtype=torch.int32), torch.tensor([0.5, 0.25]), (2,), torch.float32, 2, aliases=("c",)
        ),
    }
    mask = {"name": "Struct", "granule": 1}
    Adapter(entries, mask=mask, provenance={"data": "made up"}).save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == whole_file


def test_a_packed_update() -> None:
    """All but the deflated text, of which the content counts, is what is written; and the page's bytes read."""
    found = r"The tensors, and the text:\n\n```\n(.*?)```\n\n```text\n(.*?)\n```\n\n`shira.adapter` is `(.*?)`"
    block = re.search(found, PAGE, re.DOTALL)
    assert block is not None
    lines = [bytes.fromhex(line.split("   ")[0]) for line in block[1].splitlines()]
    tensors = {
        "shira.words": b"".join(lines[:3]),
        "shira.checksums": b"".join(lines[3:5]),
        "shira.weights": zlib.compress(block[2].encode(), 1),
        "shira.codes": b"".join(lines[5:]),
    }
    metadata = {"shira.version": "2", "shira.adapter": block[3]}
    header, data = {"__metadata__": metadata}, b""
    for name, content in tensors.items():
        wide = name in ("shira.words", "shira.checksums")
        header[name] = {
            "dtype": "I64" if wide else "U8",
            "shape": [len(content) // 8 if wide else len(content)],
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    read = Update.from_bytes(len(text).to_bytes(8, "little") + text + data)

    model = nn.Module()
    model.w = nn.Parameter(torch.arange(8.0).bfloat16().view(2, 4))
    model.b = nn.Parameter(torch.zeros(2))
    publisher = Publisher(model)
    with torch.no_grad():
        model.w.view(-1)[[1, 6]] = torch.tensor([1.0078125, 5.96875]).bfloat16()
    update = publisher.publish()
    assert (read.start, read.end, read.step) == (update.start, update.end, 1)
    assert read.weights["w"].values.tolist() == [1, -1]
    assert read.weights["w"].indices.tolist() == [1, 6]
    written = update.to_bytes()
    assert read.to_bytes() == written
    length = int.from_bytes(written[:8], "little")
    header = json.loads(written[8 : 8 + length])
    assert {"format": "pt", **metadata} == header.pop("__metadata__")
    assert list(header) == list(tensors)
    for name, content in tensors.items():
        begin, end = header[name]["data_offsets"]
        found = written[8 + length + begin : 8 + length + end]
        if name == "shira.weights":
            found, content = zlib.decompress(found), zlib.decompress(content)
        assert found == content
