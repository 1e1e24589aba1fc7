"""The codec family: the format bit for bit, round trips, attacks on the decoder, and the module without torch."""

from __future__ import annotations

import hashlib
import itertools
import math
import mmap
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
from cases import Backend
from shira import _codec

BLOCK, ANCHOR = 4096, 16
INDEX = {torch.int32: np.int32, torch.int64: np.int64}
MOST = {torch.int32: 2**31 - 1, torch.int64: 2**63 - 1}

# A decoder: (code, count, limit, dtype) to indices, or the sentence it refuses with.
Decoder = Callable[[bytes, int, int, torch.dtype], "np.ndarray | str"]


def tensor_of(data: bytes, offset: int = 0) -> torch.Tensor:
    """The bytes as a tensor whose memory starts `offset` bytes past an aligned address."""
    return torch.from_numpy(np.frombuffer(b"\0" * offset + data, dtype=np.uint8).copy())[offset:]


def op_decoder(backend: Backend) -> Decoder:
    def decode(code: bytes, count: int, limit: int, dtype: torch.dtype) -> np.ndarray | str:
        given = tensor_of(code, len(code) % 8).to(backend.device)
        try:
            return backend("decode_indices", code=given, count=count, limit=limit, dtype=dtype).cpu().numpy()
        except RuntimeError as error:
            return str(error)

    return decode


def module_decoder(width: str) -> Decoder:
    def decode(code: bytes, count: int, limit: int, dtype: torch.dtype) -> np.ndarray | str:
        try:
            return _codec.decode(code, count, limit, INDEX[dtype], width=width)
        except ValueError as error:
            return str(error)

    return decode


# Everything that decodes: the backends of the op, and every vector width of this processor.
DECODERS = {
    **{backend.name: op_decoder(backend) for backend in cases.BACKENDS},
    **{width: module_decoder(width) for width in _codec.widths()},
}


def encoders() -> dict[str, Callable[[np.ndarray, int], bytes]]:
    def op(backend: Backend) -> Callable[[np.ndarray, int], bytes]:
        def encode(indices: np.ndarray, version: int) -> bytes:
            given = torch.from_numpy(indices).to(backend.device)
            return backend("encode_indices", indices=given, version=version).cpu().numpy().tobytes()

        return encode

    def module(width: str) -> Callable[[np.ndarray, int], bytes]:
        return lambda indices, version: _codec.encode(indices, version=version, width=width).tobytes()

    backends = [b for b in cases.BACKENDS if b.has("encode_indices")]
    return {**{b.name: op(b) for b in backends}, **{w: module(w) for w in _codec.widths()}}


ENCODERS = encoders()


# The format, in the words of docs/format.md


def units(gap: int, most: int) -> list[int]:
    return [most] * (gap // most) + [gap % most]


def rice(gaps: list[int], low: int) -> bytes:
    """Mode 3 + low: the low bits, then a bitmap; numbers of any length are bits from the lowest on."""
    lows = sum((gap & (1 << low) - 1) << low * i for i, gap in enumerate(gaps))
    at, ones = -1, 0
    for gap in gaps:
        at += (gap >> low) + 1
        ones |= 1 << at
    return lows.to_bytes(-(-len(gaps) * low // 8), "little") + ones.to_bytes(at // 8 + 1, "little")


def written(indices: list[int], version: int = 1) -> bytes:
    anchors, payloads = b"", b""
    for begin in range(0, len(indices), BLOCK):
        block = indices[begin : begin + BLOCK]
        gaps = [b - a - 1 for a, b in itertools.pairwise(block)]
        small = b"".join(bytes(units(gap, 255)) for gap in gaps) if sum(gaps) < 2**24 else None
        shorts = [u for gap in gaps for u in units(gap, 65535)] if sum(gaps) < 2**40 else None
        if small is not None and len(small) <= 2 * len(block):
            mode, payload = 0, small
        elif shorts is not None and 2 * len(shorts) <= 8 * len(block):
            mode, payload = 1, struct.pack(f"<{len(shorts)}H", *shorts)
        else:
            mode, payload = 2, struct.pack(f"<{len(gaps)}Q", *gaps)
        if version == 2 and gaps and max(gaps) < 2**32:
            array = np.array(gaps)
            low = min(range(25), key=lambda low: len(gaps) * (1 + low) + int((array >> low).sum()))
            if -(-len(gaps) * low // 8) + (len(gaps) + int((array >> low).sum()) + 7) // 8 < len(payload):
                mode, payload = 3 + low, rice(gaps, low)
        anchors += struct.pack("<QQ", block[0], mode << 56 | len(payloads))
        payloads += payload
    return anchors + payloads


def mode_of(code: bytes, block: int = 0) -> int:
    return code[block * ANCHOR + 15]


def assert_code(indices: list[int], dtype: torch.dtype) -> bytes:
    """Every encoder writes the same bytes, and every decoder reads the indices back from them. Returns version 1."""
    array = np.array(indices, dtype=INDEX[dtype])
    limit = indices[-1] + 1 if indices and indices[-1] < 2**63 - 1 else 2**63 - 1
    for version in (2, 1):
        wanted = written(indices, version)
        for name, encode in ENCODERS.items():
            assert encode(array, version) == wanted, (name, version)
        if not indices or indices[-1] < limit:
            for name, decode in DECODERS.items():
                read = decode(wanted, len(indices), limit, dtype)
                assert not isinstance(read, str), f"{name}: {read}"
                assert read.dtype == array.dtype
                assert np.array_equal(read, array), (name, version)
    return wanted


def random_mask(seed: int, density: float, count: int) -> np.ndarray:
    """`count` indices of entries chosen independently: geometric gaps."""
    uniform = np.random.default_rng(seed).random(count)
    return np.cumsum(np.floor(np.log1p(-uniform) / math.log1p(-density)).astype(np.int64) + 1) - 1


@pytest.mark.parametrize("dtype", INDEX, ids=str)
def test_frozen(dtype: torch.dtype) -> None:
    """Bytes that files hold: they may never change."""
    assert assert_code([], dtype) == b""
    assert assert_code([7], dtype).hex() == "0700000000000000" + "0000000000000000"
    assert assert_code([3, 4, 260, 770], dtype).hex() == "0300000000000000" + "0000000000000000" + "00ff00fffe"
    shorts = [0, 65536, 65537 + 65535 * 2]
    assert assert_code(shorts, dtype).hex() == "0000000000000000" + "0000000000000001" + "ffff0000" + "ffffffff0000"
    words = [1, 2**31 - 1]
    assert assert_code(words, dtype).hex() == "0100000000000000" + "0000000000000002" + "fdffff7f00000000"
    two = assert_code([*range(5000)], dtype)
    anchors = "0000000000000000" + "0000000000000000" + "0010000000000000" + "ff0f000000000000"
    assert two == bytes.fromhex(anchors) + b"\0" * (4095 + 903)


@pytest.mark.parametrize("dtype", INDEX, ids=str)
def test_frozen_version_2(dtype: torch.dtype) -> None:
    """Bytes that files hold: they may never change."""
    for indices, code in (
        # The gaps 300, 607, 585: eight low bits each, 44 95 73; then 1, 2 and 2 zeros, each with a one after them.
        ([5, 306, 914, 1500], "0500000000000000" + "000000000000000b" + "2c5f49" + "92"),
        ([0, 1, 2, 3, 4], "0000000000000000" + "0000000000000003" + "0f"),
    ):
        assert written(indices, 2).hex() == code
        assert_code(indices, dtype)
    assert written([7], 2) == written([7])


@pytest.mark.parametrize(("density", "most"), [(0.0002, 1.02), (0.001, 1.02), (0.01, 1.01), (0.05, 1.02), (0.3, 1.03)])
def test_near_the_entropy(density: float, most: float) -> None:
    indices = random_mask(3, density, 40_960)
    code = _codec.encode(indices, version=2)
    entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) / density
    assert 8 * code.size / indices.size <= most * entropy
    assert code.tobytes() == written(indices.tolist(), 2)


@pytest.mark.parametrize(
    ("density", "entries", "bits", "digest"),
    [
        (0.01, 1_000_000, 8.8, "606e599c073c6eff"),
        (0.02, 1_000_000, 8.2, "354692205c102d2a"),
        (0.001, 5_000_000, 16.1, "0d0e675120307e4d"),
        (0.3, 100_000, 8.1, "35aeea6593900cbc"),
    ],
)
def test_frozen_masks(density: float, entries: int, bits: float, digest: str) -> None:
    indices = np.flatnonzero(np.random.Generator(np.random.PCG64(1)).random(entries) < density)
    code = assert_code(indices.tolist(), torch.int64)
    assert code == torch.ops.shira.encode_indices(torch.from_numpy(indices.astype(np.int32))).numpy().tobytes()
    assert hashlib.sha256(code).hexdigest()[:16] == digest
    assert 8 * len(code) / indices.size <= bits


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 18, 33, 4095, 4096, 4097, 4098, 8192, 8193, 12289, 65536, 70000])
def test_lengths(count: int) -> None:
    """Around vectors, blocks and the encoder's chunks."""
    for dtype in INDEX:
        assert_code(random_mask(count, 0.02, count).tolist(), dtype)


# Where a gap takes one unit more, in either unit, and where a vector path hands over.
EDGES = [0, 1, 253, 254, 255, 256, 508, 509, 510, 511, 764, 765, 766, 1018, 1019, 1020, 1021, 65534, 65535, 65536]


@pytest.mark.parametrize("edge", [*EDGES, 131069, 131070, 131071, 2**24, 2**29])
def test_edges(edge: int) -> None:
    for position in (0, 3, 15, 16, 40, 4090):
        gaps = np.full(4096, 5, dtype=np.int64)
        gaps[position] = edge
        indices = np.concatenate([[2], 2 + np.cumsum(gaps + 1)])
        assert_code(indices.tolist(), torch.int32)
    for count in (3, 20, 100):
        indices = np.concatenate([[0], np.cumsum(np.full(count, edge + 1, dtype=np.int64))])
        assert_code(indices.tolist(), torch.int64)


@pytest.mark.parametrize("n", [1, 2, 17, 300, 4096])
def test_mode_bounds(n: int) -> None:
    """Mode 0 up to 2 bytes per index, mode 1 up to 8: the last gap takes the payload to the bound, and past it."""
    for unit, most, bound in ((1, 255, 2 * n), (2, 65535, 8 * n)):
        if n == 1:
            assert mode_of(assert_code([9], torch.int64)) == 0
            continue
        for spare, mode in ((0, unit - 1), (1, unit)):
            escapes = (bound // unit - (n - 1)) + spare
            gaps = np.zeros(n - 1, dtype=np.int64)
            for at, part in enumerate(np.array_split(np.arange(escapes), n - 1)):
                gaps[at] = most * part.size
            code = assert_code([0, *np.cumsum(gaps + 1).tolist()], torch.int64)
            assert mode_of(code) == mode


def test_largest_numbers() -> None:
    most = 2**63 - 1
    assert_code([most - 1], torch.int64)
    assert_code([0, most - 1], torch.int64)
    assert_code([most - 5, most - 3, most - 1], torch.int64)
    assert_code([*range(2**31 - 5000, 2**31)], torch.int32)
    assert_code([0, 2**31 - 1], torch.int32)
    assert_code([0, *(2**32 + 70_000 * i for i in range(100))], torch.int64)
    # The largest index of all has no limit above it: encoded, but never decoded.
    assert_code([0, most], torch.int64)


@st.composite
def gap_lists(draw: st.DrawFn) -> list[int]:
    """Indices with gaps of a drawn scale and edges among them, up to a few blocks."""
    seed, scale = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([1, 4, 100, 400, 2000, 70_000, 2**40]))
    count = draw(st.one_of(st.integers(0, 70), st.integers(0, 9000)))
    rng = np.random.default_rng(seed)
    gaps = rng.integers(0, scale, count)
    gaps = np.where(rng.random(count) < draw(st.sampled_from([0.0, 0.02, 0.3])), rng.choice(EDGES, count), gaps)
    return (np.cumsum(gaps + 1) - 1 + draw(st.integers(0, 300))).tolist()


@settings(max_examples=60, deadline=None)
@given(gap_lists())
def test_round_trip(indices: list[int]) -> None:
    for dtype in INDEX:
        if not indices or indices[-1] <= MOST[dtype]:
            assert_code(indices, dtype)


def test_any_thread_count(threads: None) -> None:
    """The same bytes, the same indices and the same refusal from every number of threads."""
    indices = torch.from_numpy(random_mask(5, 0.01, 400_000)).int()
    seen = set()
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        code = torch.ops.shira.encode_indices(indices)
        back = torch.ops.shira.decode_indices(code, indices.numel(), int(indices[-1]) + 1, torch.int32)
        assert torch.equal(back, indices)
        bad = code.clone()
        for block in (90, 40, 70):  # the first one is named, whichever thread comes first
            bad[block * ANCHOR + 15] = 28
        with pytest.raises(RuntimeError) as raised:
            torch.ops.shira.decode_indices(bad, indices.numel(), int(indices[-1]) + 1, torch.int32)
        seen.add((code.numpy().tobytes(), str(raised.value)))
    assert len(seen) == 1
    assert "got 28 in block 40 (byte 655)" in next(iter(seen))[1]


def test_granule() -> None:
    """`limit` counts entries; the bound of an index is limit // granule."""
    code = written([0, 5])
    for backend in cases.BACKENDS:
        args: dict[str, Any] = {"code": tensor_of(code).to(backend.device), "count": 2, "dtype": torch.int32}
        assert backend("decode_indices", **args, limit=48, granule=8).tolist() == [0, 5]
        with pytest.raises(RuntimeError, match=r"in \[0, 5\), got a gap of 4 after index 0"):
            backend("decode_indices", **args, limit=40, granule=8)
    assert _codec.decode(code, 2, 48, "int32", 8).tolist() == [0, 5]
    with pytest.raises(RuntimeError, match="encode_indices: version must be 1 or 2, got 3"):
        torch.ops.shira.encode_indices(torch.arange(3), version=3)
    with pytest.raises(ValueError, match=r"in \[0, 5\), got a gap of 4 after index 0"):
        _codec.decode(code, 2, 40, "int32", granule=8)


# Attacks


def patched(code: bytes, *changes: tuple[int, bytes]) -> bytes:
    data = bytearray(code)
    for at, new in changes:
        data[at : at + len(new)] = new
    return bytes(data)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


GOOD = [*range(10, 10 + 2 * 5000, 2)]  # two blocks: 4096 and 904 indices, every gap 1
CODE = written(GOOD)  # 32 bytes of anchors, then 4095 + 903 of payload
LIMIT = 20_000
FULL = 2**31 - 1

REFUSED = {
    "empty": (b"", 5000, LIMIT, "code must have at least 5030 bytes for 5000 indices, got 0"),
    "short": (CODE[:5029], 5000, LIMIT, "code must have at least 5030 bytes for 5000 indices, got 5029"),
    "bytes of nothing": (b"\0", 0, LIMIT, "code must have 0 bytes for 0 indices, got 1"),
    "count of the end": (
        *(CODE, 2**63 - 1, LIMIT),
        "code must have at least 9257149034060054527 bytes for 9223372036854775807 indices, got 5030",
    ),
    "first offset": (
        *(patched(CODE, (8, u64(1))), 5000, LIMIT),
        "code must have its first payload at offset 0, got 1 in block 0 (byte 8)",
    ),
    "offset past the end": (
        *(patched(CODE, (24, u64(2**56 - 1))), 5000, LIMIT),
        "code must have increasing payload offsets within its 4998 payload bytes, "
        "got 72057594037927935 after 0 in block 1 (byte 24)",
    ),
    "offset that stands": (
        *(patched(CODE, (24, u64(0))), 5000, LIMIT),
        "code must have increasing payload offsets within its 4998 payload bytes, got 0 after 0 in block 1 (byte 24)",
    ),
    "offset too early": (
        *(patched(CODE, (24, u64(4094))), 5000, LIMIT),
        "code must have 4095 gaps in each payload of 4096 indices, got 4094 by its end in block 0 (byte 4126)",
    ),
    "offset too late": (
        *(patched(CODE, (24, u64(4097))), 5000, LIMIT),
        "code must have 4095 gaps in each payload of 4096 indices, got 2 bytes after them in block 0 (byte 4127)",
    ),
    "mode": (
        *(patched(CODE, (31, b"\x1c")), 5000, LIMIT),
        "code must have modes from 0 to 27, got 28 in block 1 (byte 31)",
    ),
    "other mode": (
        *(patched(CODE, (31, b"\x01")), 5000, 2**30),
        "code must have 903 gaps in each payload of 904 indices, got 451 by its end in block 1 (byte 5030)",
    ),
    "words that are none": (
        *(patched(CODE, (15, b"\x02"), (32, b"\0" * 4095)), 5000, LIMIT),
        "code must have 4095 gaps in each payload of 4096 indices, got 511 by its end in block 0 (byte 4127)",
    ),
    "escape without end": (
        *(patched(CODE, (5029, b"\xff")), 5000, LIMIT),
        "code must have 903 gaps in each payload of 904 indices, got 902 by its end in block 1 (byte 5030)",
    ),
    "more bytes": (
        *(CODE + b"\0", 5000, LIMIT),
        "code must have 903 gaps in each payload of 904 indices, got 1 bytes after them in block 1 (byte 5030)",
    ),
    "more escapes": (
        *(CODE + b"\xff" * 40, 5000, LIMIT),
        "code must have 903 gaps in each payload of 904 indices, got 40 bytes after them in block 1 (byte 5030)",
    ),
    "fewer asked for": (
        *(CODE, 4999, LIMIT),
        "code must have 902 gaps in each payload of 903 indices, got 1 bytes after them in block 1 (byte 5029)",
    ),
    "limit": (
        *(CODE, 5000, 10_008),
        "code must be strictly increasing in [0, 10008), got a gap of 1 after index 10006 in block 1 (byte 5029)",
    ),
    "no entries": (
        *(CODE, 5000, 0),
        "code must be strictly increasing in [0, 0), got first index 10 in block 0 (byte 0)",
    ),
    "block goes back": (
        *(patched(CODE, (16, u64(8200))), 5000, LIMIT),
        "code must be strictly increasing in [0, 20000), got first index 8200 after 8200 in block 1 (byte 16)",
    ),
    "first index past the limit": (
        *(patched(CODE, (16, u64(LIMIT))), 5000, LIMIT),
        "code must be strictly increasing in [0, 20000), got first index 20000 in block 1 (byte 16)",
    ),
    "first index past 2^63": (
        *(patched(CODE, (0, u64(2**64 - 1))), 5000, 2**63 - 1),
        "code must be strictly increasing in [0, 9223372036854775807), got first index 18446744073709551615 "
        "in block 0 (byte 0)",
    ),
    "gap that wraps": (
        *(patched(written([5, 2**62]), (16, u64(2**64 - 1))), 2, 2**63 - 1),
        "code must be strictly increasing in [0, 9223372036854775807), got a gap of 18446744073709551615 "
        "after index 5 in block 0 (byte 16)",
    ),
    "gap that comes back": (
        *(patched(written([5, 2**61, 2**62]), (16, u64(2**64 - 3) + u64(0))), 3, 100),
        "code must be strictly increasing in [0, 100), got a gap of 18446744073709551613 after index 5 "
        "in block 0 (byte 16)",
    ),
    "many escapes": (
        *(patched(CODE, (32 + 4095, b"\xff" * 902)), 5000, 2**30),
        "code must have 903 gaps in each payload of 904 indices, got 1 by its end in block 1 (byte 5030)",
    ),
}


# Version 2. Gaps of 900: nine low bits each (4607 bytes, one bit of padding), and a bitmap of 8190 bits (1024 bytes)
SPARSE = [*range(7, 7 + 901 * 5000, 901)]
RICE = written(SPARSE, 2)
RICE_LIMIT = SPARSE[-1] + 1
assert (RICE[15], RICE[31], len(RICE)) == (12, 12, 32 + 4607 + 1024 + 1016 + 226)
# Gaps of 1, without low bits: 8190 and 1806 bits
DENSE = written(GOOD, 2)
assert (DENSE[15], DENSE[31], len(DENSE)) == (3, 3, 32 + 1024 + 226)

REFUSED |= {
    "rice: short": (DENSE[:656], 5000, LIMIT, "code must have at least 657 bytes for 5000 indices, got 656"),
    "rice: no anchors": (DENSE[:31], 5000, LIMIT, "code must have at least 5030 bytes for 5000 indices, got 31"),
    "rice: another mode": (
        *(patched(DENSE, (31, b"\0")), 5000, LIMIT),
        "code must have at least 1447 bytes for 5000 indices, got 1282",
    ),
    "rice: more low bits": (
        *(patched(RICE, (15, b"\x0f")), 5000, RICE_LIMIT),
        "code must have at least 6655 bytes in a payload of 4096 indices in mode 15, got 5631 in block 0 (byte 32)",
    ),
    "rice: fewer low bits": (
        # The bitmap begins with 512 bytes of low bits: three ones in nine bits, then one in two.
        *(patched(RICE, (15, b"\x0b")), 5000, 2**40),
        "code must have 4095 gaps in each payload of 4096 indices, got 2732 bits after them in block 0 (byte 5321)",
    ),
    "rice: a one more": (
        *(patched(DENSE, (32 + 1023, b"\xaa")), 5000, LIMIT),
        "code must have 4095 gaps in each payload of 4096 indices, got 2 bits after them in block 0 (byte 1055)",
    ),
    "rice: a one less": (
        *(patched(DENSE, (32 + 5, b"\x8a")), 5000, LIMIT),
        "code must have 4095 gaps in each payload of 4096 indices, got 4094 by its end in block 0 (byte 1056)",
    ),
    "rice: no ones": (
        *(patched(DENSE, (32, bytes(1024))), 5000, LIMIT),
        "code must have 4095 gaps in each payload of 4096 indices, got 0 by its end in block 0 (byte 1056)",
    ),
    "rice: more zeros": (
        *(DENSE + b"\0", 5000, LIMIT),
        "code must have 903 gaps in each payload of 904 indices, got 10 bits after them in block 1 (byte 1282)",
    ),
    "rice: more ones": (
        *(DENSE + b"\xff" * 70, 5000, LIMIT),
        "code must have 903 gaps in each payload of 904 indices, got 562 bits after them in block 1 (byte 1282)",
    ),
    "rice: cut": (
        *(DENSE[:-1], 5000, LIMIT),
        "code must have 903 gaps in each payload of 904 indices, got 900 by its end in block 1 (byte 1281)",
    ),
    "rice: padding of the low bits": (
        *(patched(RICE, (32 + 4606, bytes([RICE[32 + 4606] | 0x80]))), 5000, RICE_LIMIT),
        "code must have zeros where a payload's low bits are padded, got a one in block 0 (byte 4638)",
    ),
    "rice: limit": (
        *(RICE, 5000, SPARSE[-1]),
        f"code must be strictly increasing in [0, {SPARSE[-1]}), got a gap of 900 after index {SPARSE[-2]} "
        "in block 1 (byte 6904)",
    ),
    "rice: block goes back": (
        *(patched(RICE, (16, u64(SPARSE[4095]))), 5000, RICE_LIMIT),
        f"code must be strictly increasing in [0, {RICE_LIMIT}), got first index {SPARSE[4095]} after {SPARSE[4095]} "
        "in block 1 (byte 16)",
    ),
    "rice: one index, and a payload": (
        *(patched(written([4]), (15, b"\x05")) + b"\x01", 1, LIMIT),
        "code must have 0 gaps in each payload of 1 indices, got 8 bits after them in block 0 (byte 16)",
    ),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("attack", REFUSED)
def test_refused(attack: str, decoder: str) -> None:
    code, count, limit, says = REFUSED[attack]
    for dtype in INDEX:
        assert DECODERS[decoder](code, count, limit, dtype) == f"decode_indices: {says}"


@pytest.mark.parametrize("decoder", DECODERS)
def test_refused_dtype(decoder: str) -> None:
    """Indices below the limit that int32 cannot hold, in every mode and as a first index."""
    decode = DECODERS[decoder]
    for indices, got in (
        ([2**31], "first index 2147483648 in block 0 (byte 0)"),
        ([2**31 - 1, 2**31], "a gap of 0 after index 2147483647 in block 0 (byte 16)"),
        ([2**31 - 1 - 300 * i for i in range(40, -1, -1)] + [2**31 + 7], f"a gap of 7 after index {FULL}"),
        ([2**31 - 1 - 900 * i for i in range(40, -1, -1)] + [2**31 + 7], f"a gap of 7 after index {FULL}"),
        ([0, 2**40], "a gap of 1099511627775 after index 0 in block 0 (byte 16)"),
    ):
        said = decode(written(indices), len(indices), 2**50, torch.int32)
        assert isinstance(said, str)
        assert said.startswith(f"decode_indices: code must have indices that fit int32, got {got}")
        assert np.array_equal(decode(written(indices), len(indices), 2**50, torch.int64), indices)


@pytest.mark.parametrize("decoder", DECODERS)
def test_payload_past_the_vector_paths(decoder: str) -> None:
    """Sums of a payload so long that 32-bit lanes would wrap: 17 MB of escapes before the last gap's end."""
    if decoder in ("emulator", "triton"):
        pytest.skip("a GPU's lanes have 64 bits, and its emulators take long for 17 MB")
    count, escapes = 3, 17_000_000
    code = u64(1) + u64(0) + b"\x04" + b"\xff" * escapes + b"\x02"
    last = 6 + 255 * escapes + 3
    read = DECODERS[decoder](code, count, 2**40, torch.int64)
    assert not isinstance(read, str)
    assert read.tolist() == [1, 6, last]
    said = DECODERS[decoder](code, count, last, torch.int64)
    assert said == (
        f"decode_indices: code must be strictly increasing in [0, {last}), "
        f"got a gap of {255 * escapes + 2} after index 6 in block 0 (byte 17)"
    )
    said = DECODERS[decoder](code, count, 2**40, torch.int32)
    assert isinstance(said, str)
    assert "fit int32" in said


@pytest.mark.parametrize("decoder", DECODERS)
def test_rice_past_the_vector_paths(decoder: str) -> None:
    """Runs of zeros longer than a byte can count, and gaps whose sum passes 32 bits."""
    rng = np.random.default_rng(4)
    for low in (0, 5, 20, 24):
        gaps = rng.integers(0, 3 << low, 200).tolist()
        gaps[50], gaps[90], gaps[120] = 255 << low, 256 << low, (700 << low) + 1
        indices = [3, *(4 + np.cumsum(np.array(gaps) + 1) - 1).tolist()]
        code = u64(3) + bytes(7) + bytes([3 + low]) + rice(gaps, low)
        limit = indices[-1] + 1
        read = DECODERS[decoder](code, len(indices), limit, torch.int64)
        assert not isinstance(read, str), read
        assert read.tolist() == indices
        said = DECODERS[decoder](code, len(indices), limit - 1, torch.int64)
        assert isinstance(said, str)
        assert f"in [0, {limit - 1}), got a gap of {gaps[-1]} after index {indices[-2]} in block 0" in said
        if limit > 2**31:
            said = DECODERS[decoder](code, len(indices), limit, torch.int32)
            assert isinstance(said, str)
            assert "fit int32" in said


@st.composite
def attacks(draw: st.DrawFn) -> tuple[bytes, int, int, torch.dtype]:
    """A code of a few blocks with some of its bytes, its length, its count or its limit changed."""
    indices = draw(gap_lists())
    code, count = bytearray(written(indices, draw(st.sampled_from([1, 2])))), len(indices)
    limit = draw(st.sampled_from([2**63 - 1, (indices[-1] if indices else 0) + draw(st.integers(0, 2))]))
    for _ in range(draw(st.integers(0, 3))):
        # A single byte matters most in the anchors.
        anchors = max(1, min(len(code), ANCHOR * -(-count // BLOCK)))
        at = draw(st.one_of(st.integers(0, anchors - 1), st.integers(0, max(0, len(code) - 1))))
        kind = draw(st.sampled_from(["byte", "escape", "word", "cut", "longer", "count", "random"]))
        if kind == "byte":
            code[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "escape":
            code[at : at + 1] = b"\xff"
        elif kind == "word":
            code[at : at + 8] = u64(draw(st.integers(0, 2**64 - 1)) >> draw(st.integers(0, 63)))
        elif kind == "cut":
            del code[at:]
        elif kind == "longer":
            code += draw(st.sampled_from([b"\0", b"\xff", b"\x07"])) * draw(st.integers(1, 70))
        elif kind == "count":
            count = draw(st.sampled_from([max(0, count - 1), count + 1, len(code), 2**62, 0]))
        else:
            code = bytearray(draw(st.binary(max_size=200)))
    return bytes(code), count, limit, draw(st.sampled_from(list(INDEX)))


@settings(max_examples=300, deadline=None)
@given(attacks())
def test_arbitrary_bytes(attack: tuple[bytes, int, int, torch.dtype]) -> None:
    """Every decoder gives the same indices, which keep the promise, or the same refusal of the code."""
    code, count, limit, dtype = attack
    wanted = DECODERS["reference"](code, count, limit, dtype)
    for name, decode in DECODERS.items():
        read = decode(code, count, limit, dtype)
        if isinstance(wanted, str):
            assert read == wanted, name
        else:
            assert not isinstance(read, str), f"{name}: {read}"
            assert np.array_equal(read, wanted), name
    if isinstance(wanted, str):
        assert wanted.startswith("decode_indices: code must ")
    else:
        assert wanted.size == count
        assert count == 0 or (wanted[0] >= 0 and wanted[-1] < limit)
        assert (wanted[1:] > wanted[:-1]).all()


@settings(max_examples=100, deadline=None)
@given(gap_lists(), st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_encoders_refuse_the_same(indices: list[int], seed: int, changes: int) -> None:
    """Unordered and negative numbers, including steps that wrap in 32 or 64 bits: every encoder says the same."""
    if not indices:
        return
    rng = np.random.default_rng(seed)
    for dtype, kind in INDEX.items():
        array = np.minimum(np.array(indices, dtype=np.int64), MOST[dtype]).astype(kind)
        for at in rng.integers(0, array.size, changes):
            array[at] = rng.choice([-1, 0, np.iinfo(kind).min, MOST[dtype], array[rng.integers(0, array.size)]])
        said = set()
        for encode in ENCODERS.values():
            try:
                said.add(encode(array, changes % 2 + 1))
            except (RuntimeError, ValueError) as error:
                said.add(str(error))
        assert len(said) == 1, said
        (only,) = said
        good = bool(array[0] >= 0 and (array[1:] > array[:-1]).all())
        assert isinstance(only, bytes) == good
        if not good:
            assert str(only).startswith("encode_indices: indices must be strictly increasing and at least 0, got ")


# The module without torch


def test_module_needs_no_torch() -> None:
    program = (
        "import sys; from shira import _codec; import numpy as np\n"
        "code = _codec.encode(np.arange(0, 50_000, 5)); back = _codec.decode(code, 10_000, 50_000, 'int64')\n"
        "assert (back == np.arange(0, 50_000, 5)).all() and _codec.fingerprint(b'') == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("width", _codec.widths())
def test_module_fingerprint(width: str) -> None:
    """The op's number, from any buffer at any alignment."""
    rng = np.random.default_rng(3)
    for size in (0, 1, 7, 8, 9, 63, 64, 65, 1000, 4103, 100_000):
        data = rng.integers(0, 256, size + 8, dtype=np.uint8)
        for offset in (0, 1, 7):
            weight = data[offset : offset + size]
            wanted = int(torch.ops.shira.fingerprint(torch.from_numpy(weight)))
            assert _codec.fingerprint(weight, width=width) == wanted
            assert _codec.fingerprint(weight.tobytes(), width=width) == wanted
    values = torch.randn(33, 5, dtype=torch.float64)
    assert _codec.fingerprint(values.numpy(), width=width) == int(torch.ops.shira.fingerprint(values))


@pytest.mark.parametrize("width", _codec.widths())
def test_module_fingerprint_of_a_part(width: str) -> None:
    data = np.random.default_rng(4).integers(0, 256, 4103, dtype=np.uint8)
    for size, place in itertools.product((0, 7, 8, 1000, 4103), ((3, 1, 7), (2**40, 9, 40), (5, 2**40, 2**62))):
        wanted = torch.ops.shira.fingerprint_part(torch.from_numpy(data[:size]), *place)
        assert _codec.fingerprint_part(data[:size], *place, width=width) == int(wanted)
    with pytest.raises(ValueError, match="fingerprint_part: first must be at least 0, and stride at least run"):
        _codec.fingerprint_part(data, 0, 4, 3, width=width)


def test_module_reads_mapped_files(tmp_path: Path) -> None:
    path = tmp_path / "code"
    path.write_bytes(b"xyz" + CODE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)[3:]
        assert _codec.decode(view, 5000, LIMIT, np.int32).tolist() == GOOD
        view.release()


def test_module_arguments() -> None:
    indices = np.arange(10, dtype=np.int64)
    code = _codec.encode(indices)
    memory = np.frombuffer(b"\0" * 9, dtype=np.uint8)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: _codec.encode(indices.astype(np.int16)), "encode_indices: indices must be int32 or int64, got int16"),
        (lambda: _codec.encode(indices[None]), "encode_indices: indices must be 1-D, got shape [1, 10]"),
        (
            lambda: _codec.encode(indices[::2]),
            "encode_indices: indices must be contiguous, got shape [5] with strides [2]",
        ),
        (
            lambda: _codec.encode(memory[1:].view(np.int64)),
            "encode_indices: indices must be aligned to their 8 bytes",
        ),
        (
            lambda: _codec.encode(indices[::-1].copy()),
            "encode_indices: indices must be strictly increasing and at least 0, got 8 after 9 at position 1",
        ),
        (lambda: _codec.decode(code, 10, 10, "f4"), "decode_indices: dtype must be int32 or int64, got float32"),
        (lambda: _codec.decode(code, -1, 10, "i4"), "decode_indices: count must be at least 0, got -1"),
        (lambda: _codec.decode(code, 10, 10, "i4", 0), "decode_indices: granule must be at least 1, got 0"),
        (
            lambda: _codec.decode(code, 10, 10, "i4", 3),
            "decode_indices: limit must be a multiple of granule 3 and not negative, got 10",
        ),
        (lambda: _codec.decode(code[::2], 5, 10, "i4"), "decode_indices: code must be contiguous"),
        (lambda: _codec.decode(code[None], 5, 10, "i4"), "decode_indices: code must be 1-D, got 2 dimensions"),
        (lambda: _codec.decode(indices, 5, 10, "i4"), "decode_indices: code must be uint8, got items of 8 bytes"),
        (lambda: _codec.fingerprint(indices[::2]), "fingerprint: weight must be contiguous"),
        (lambda: _codec.encode(indices, version=0), "encode_indices: version must be 1 or 2, got 0"),
        (lambda: _codec.encode(indices, width="wide"), "width must be one of widths(), got wide"),
    ]
    for call, says in calls:
        with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
            call()


def test_module_from_several_threads() -> None:
    """The GIL is released, and calls share nothing."""
    masks = [random_mask(seed, 0.01, 50_000).astype(np.int32) for seed in range(4)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            code = _codec.encode(masks[i])
            if not np.array_equal(_codec.decode(code, 50_000, int(masks[i][-1]) + 1, np.int32), masks[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
