"""The number code: the format in the words of docs/format.md, round trips, and attacks on the decoder."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira import _codec
from shira.adapter import _difference

BLOCK = 4096
DTYPES = (np.int8, np.int16, np.int32, np.int64)


def padded(bits: list[int]) -> bytes:
    return sum(bit << place for place, bit in enumerate(bits)).to_bytes(-(-len(bits) // 8), "little")


def binary(number: int, width: int) -> list[int]:
    return [number >> place & 1 for place in range(width)]


def payload(numbers: list[int], low: int, zeros: bool) -> tuple[int, bytes]:
    """How many bits it has before it is padded, and it."""
    z = [(2 * d if d >= 0 else -2 * d - 1) - (not zeros) for d in numbers]
    above = [one >> low for one in z]
    lows = [bit for one in z for bit in binary(one, low)]
    lengths = [bit for v in above for bit in [0] * v.bit_length() + [1]]
    rest = [bit for v in above if v > 1 for bit in binary(v, v.bit_length() - 1)]
    return len(lows) + len(lengths) + len(rest), padded(lows) + padded(lengths) + padded(rest)


def written(numbers: list[int], bits: int) -> bytes:
    anchors, payloads = b"", b""
    for begin in range(0, len(numbers), BLOCK):
        block = numbers[begin : begin + BLOCK]
        zeros = 0 in block
        ways = [payload(block, low, zeros) for low in range(min(bits - 1, 56) + 1)]
        low = min(range(len(ways)), key=lambda low: ways[low][0])
        anchors += struct.pack("<Q", (low + 64 * (not zeros)) << 56 | len(payloads))
        payloads += ways[low][1]
    return anchors + payloads


def test_frozen() -> None:
    """Bytes that files hold: they may never change."""
    for numbers, dtype, code in (
        ([], np.int16, ""),
        ([0], np.int8, "0000000000000000" + "01"),
        # z is 1, 0, 1, 3, 0, 1399, 4; the low bits 1 0 1 1 0 1 0; lengths 0, 0, 0, 1, 0, 10, 2; the rest 699 - 512, 0.
        ([1, -1, 1, 2, -1, 700, -3], np.int16, "0000000000000041" + "2d" + "370009" + "bb00"),
        ([-32768, 32767], np.int16, "000000000000004f" + "fefffe3f" + "0a"),
    ):
        assert _codec.encode_numbers(np.array(numbers, dtype=dtype)).tobytes().hex() == code
        assert written(numbers, 8 * np.dtype(dtype).itemsize).hex() == code


@st.composite
def number_lists(draw: st.DrawFn) -> np.ndarray:
    """Mostly 1 and -1, some of any size, perhaps zeros; up to a few blocks."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.one_of(st.integers(1, 70), st.integers(1, 9000)))
    size = draw(st.integers(0, 8 * dtype.itemsize - 1))
    numbers = rng.integers(-(2**size), 2**size, count, dtype=np.int64).astype(dtype)
    ones = rng.random(count) < draw(st.sampled_from([0.0, 0.5, 0.95]))
    numbers[ones] = rng.choice([-1, 1], int(ones.sum()))
    edges = rng.random(count) < draw(st.sampled_from([0.0, 0.01]))
    numbers[edges] = rng.choice([np.iinfo(dtype).min, np.iinfo(dtype).max], int(edges.sum()))
    if draw(st.booleans()):
        numbers[numbers == 0] = 1
    return numbers


@settings(max_examples=50, deadline=None)
@given(number_lists())
def test_round_trip(numbers: np.ndarray) -> None:
    code = _codec.encode_numbers(numbers)
    if numbers.size < 3000:
        assert code.tobytes() == written(numbers.tolist(), 8 * numbers.itemsize)
    read = _codec.decode_numbers(code, numbers.size, numbers.dtype)
    assert read.dtype == numbers.dtype
    assert np.array_equal(read, numbers)


GOOD = np.tile(np.array([1, -1, 2, 6], dtype=np.int16), 1250)  # z: 1 0 3 11; one low bit; lengths 0 0 1 3
CODE = _codec.encode_numbers(GOOD).tobytes()
assert (CODE[7], CODE[15], len(CODE)) == (0x41, 0x41, 16 + (512 + 1024 + 256) + (113 + 226 + 57))


def patched(at: int, new: bytes) -> bytes:
    return CODE[:at] + new + CODE[at + len(new) :]


REFUSED = {
    "short": (CODE[:640], "at least 641 bytes for 5000 numbers, got 640"),
    "first offset": (patched(0, b"\1"), "have its first payload at offset 0, got 1 in block 0 (byte 0)"),
    "offset past the end": (
        patched(8, b"\xff" * 7),
        "have increasing payload offsets within its 2188 payload bytes, got 72057594037927935 after 0 in block 0",
    ),
    "mode": (patched(7, b"\x80"), "have modes of at most 15 low bits, got mode 128 in block 0 (byte 7)"),
    "more low bits than the dtype": (patched(7, b"\x10"), "have modes of at most 15 low bits, got mode 16 in block 0"),
    "low bits past the end": (
        patched(7, b"\x44"),
        "have at least 2560 bytes in a payload of 4096 numbers in mode 68, got 1792 in block 0 (byte 16)",
    ),
    "a long number": (patched(528, bytes(3)), "have numbers that fit int16, got one of "),
    "no ones": (CODE[:-283] + bytes(283), "have 904 numbers in a payload, got 0 by its end in block 1 (byte 2204)"),
    "more": (CODE + b"\0", "have 57 bytes in the last part of a payload, got 58 in block 1 (byte 2147)"),
    "cut": (CODE[:-1], "have 57 bytes in the last part of a payload, got 56 in block 1 (byte 2147)"),
    "padding of the end": (CODE[:-1] + b"\xff", "have zeros where a payload's parts are padded, got a one in block 1"),
}


@pytest.mark.parametrize("attack", REFUSED)
def test_refused(attack: str) -> None:
    code, says = REFUSED[attack]
    with pytest.raises(ValueError, match=r"^decode_numbers: code must ") as error:
        _codec.decode_numbers(code, GOOD.size, np.int16)
    assert says in str(error.value)


def test_refused_padding() -> None:
    """Each part of a payload ends within a byte."""
    code = _codec.encode_numbers(GOOD[:5]).tobytes()  # 5 bits, 9 bits, 2 bits
    assert len(code) == 8 + 1 + 2 + 1
    for at in (8, 10, 11):
        with pytest.raises(ValueError, match="zeros where a payload's parts are padded, got a one in block 0") as error:
            _codec.decode_numbers(code[:at] + bytes([code[at] | 0x80]) + code[at + 1 :], 5, np.int16)
        assert f"(byte {at})" in str(error.value)


def test_refused_where_a_number_wraps() -> None:
    """-32768 is the last one without a zero before it: one more does not fit."""
    code = _codec.encode_numbers(np.array([-32768], dtype=np.int16))
    assert code[7] >= 64
    ones = bytes(7) + bytes([64 + 15]) + b"\xff\x7f" + b"\x02"
    with pytest.raises(ValueError, match="numbers that fit int16, got one past them"):
        _codec.decode_numbers(ones, 1, np.int16)


def test_arguments() -> None:
    for call, says in (
        (lambda: _codec.encode_numbers(GOOD[::2]), "encode_numbers: numbers must be 1-D, contiguous and aligned"),
        (lambda: _codec.encode_numbers(GOOD.astype("u2")), "encode_numbers: dtype must be int8, int16, int32 or int64"),
        (lambda: _codec.decode_numbers(CODE, -1, "i2"), "decode_numbers: count must be at least 0, got -1"),
        (lambda: _codec.decode_numbers(b"\0", 0, "i2"), "decode_numbers: code must have 0 bytes for 0 numbers, got 1"),
        (lambda: _codec.decode_numbers(CODE, 2**62, "i2"), "decode_numbers: code must have at least "),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            call()


@settings(max_examples=200, deadline=None)
@given(number_lists(), st.integers(0, 2**32 - 1))
def test_arbitrary_bytes(numbers: np.ndarray, seed: int) -> None:
    """Numbers, or one sentence."""
    rng, count = np.random.default_rng(seed), numbers.size
    code = bytearray(_codec.encode_numbers(numbers).tobytes())
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(code))) if rng.random() < 0.5 else int(rng.integers(min(len(code), 24)))
        code[at] = int(rng.integers(256))
    if rng.random() < 0.3:
        code = code[: rng.integers(len(code))]
    try:
        assert _codec.decode_numbers(bytes(code), count, numbers.dtype).size == count
    except ValueError as error:
        assert str(error).startswith("decode_numbers: code must ")  # noqa: PT017


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_differences_are_exact(dtype: torch.dtype) -> None:
    """From any bits to any bits; neighbours in the order of floats differ by one."""
    generator, size = torch.Generator().manual_seed(1), dtype.itemsize
    before, after = (
        torch.randint(0, 256, (4096 * size,), dtype=torch.uint8, generator=generator).view(dtype) for _ in range(2)
    )
    numbers = _difference.difference(before, after)
    code = _difference.encode(numbers)
    again = _difference.decode(code.numpy(), numbers.numel(), numbers.dtype)
    assert torch.equal(again, numbers)
    assert torch.equal(_difference.add(before, again).view(torch.uint8), after.view(torch.uint8))
    if size > 1:
        values = torch.tensor([1.0, -2.5, 0.0, 1e-3, -0.0], dtype=dtype)
        up = torch.nextafter(values, torch.tensor(torch.inf, dtype=dtype))
        assert _difference.difference(values, up).tolist() == [1, 1, 1, 1, 2]  # -0.0, 0.0, and on
        assert _difference.difference(torch.tensor([-0.0], dtype=dtype), torch.zeros(1, dtype=dtype)).tolist() == [1]
