"""The adapter file, versions 1 and 2: its layout, and every check that does not need torch.

An adapter is one safetensors file. For each weight ``NAME`` it holds ``NAME.values`` and, unless the mask follows from
a seed or the parameter is whole, ``NAME.indices`` (a uint8 code, see ``shira_ops.encode_indices``). The metadata holds
the rest, as strings:

- ``shira.version``: ``"1"`` or ``"2"``.
- ``shira.adapter``: JSON with ``alpha``, ``delta``, ``mask``, ``density`` and ``provenance``.
- ``shira.weights``: JSON, name to ``shape``, ``dtype``, ``granule``, ``count``, ``indices`` (``"code"``, ``"seed"`` or
  ``"whole"``), ``seed``, ``fingerprint`` (16 hex digits, or null) and, where there are any, ``aliases``.
- ``shira.checksums``: 16 hex digits for the two JSON texts above, then 16 for the tensors of each weight, in order.

In version 2 the index code may be of version 2 too, and ``values`` may say ``"difference"``: then the values are a
uint8 code of differences from the entries that they replace, and ``print`` the fingerprint of the values themselves.
Codes lie in one tensor, and what the file says of its weights takes some 50 bytes for each: see `Packed`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import struct
import sys
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, TypeGuard

from shira import _text
from shira._text import AdapterError, named, shown, strength

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    Bytes: TypeAlias = npt.NDArray[np.uint8]

VERSIONS = (1, 2)
VERSION_KEY, ADAPTER_KEY, WEIGHTS_KEY = "shira.version", "shira.adapter", "shira.weights"
CHECKSUMS_KEY = "shira.checksums"

# torch's name of a dtype -> (safetensors' name, bytes)
DTYPES: dict[str, tuple[str, int]] = {
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float32": ("F32", 4),
    "float64": ("F64", 8),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "int16": ("I16", 2),
    "int32": ("I32", 4),
    "int64": ("I64", 8),
}
# Bits per entry of every dtype that a checkpoint may have.
BITS = {name: 8 * size for name, size in DTYPES.values()} | {
    "BOOL": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "U32": 32, "U64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
ITEM_BYTES = dict(DTYPES.values())
ARITHMETIC = ("float16", "bfloat16", "float32", "float64")
# Values of these may be differences, which are whole numbers of the same size.
DIFFERENCES = {
    name: f"int{8 * size}" for name, (_, size) in DTYPES.items() if name.startswith("float") or name == "bfloat16"
}
MAX_NUMEL = 2**62
MAX_DIMS = 64  # torch's limit
MAX_HEADER = 100_000_000  # bytes, the stock library's limit
MAX_ADAPTER_HEADER = 50_000_000  # the header of an adapter for 70,000 weights takes 35 MB
# Roughly the numbers, strings, lists and objects in a JSON text: Python needs some hundred bytes for each.
MAX_JSON_VALUES = 4_000_000
MAX_JSON_DEPTH = 64


@dataclass(frozen=True)
class WeightHeader:
    """What a file says about one weight, checked against the tensors in the file."""

    shape: tuple[int, ...]
    dtype: str
    granule: int
    count: int
    indices: str
    seed: int | None
    fingerprint: int | None
    aliases: tuple[str, ...]
    values_dtype: str
    code_bytes: int
    # Whether the values are a code of differences from the entries that they replace, and the fingerprint of the values
    # themselves, where it is known.
    difference: bool = False
    print: int | None = None
    # Of an update: the weight's fingerprint afterwards.
    after: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nnz(self) -> int:
        return self.count * self.granule

    @property
    def whole(self) -> bool:
        return self.indices == "whole"


@dataclass(frozen=True)
class Header:
    """What a file says about its adapter."""

    alpha: float
    delta: bool
    mask: dict[str, Any] | None
    provenance: dict[str, Any]
    weights: dict[str, WeightHeader]
    checksums: bool  # whether the file has any
    version: int = 1

    @property
    def nnz(self) -> int:
        return sum(weight.nnz for weight in self.weights.values())

    @property
    def density(self) -> float:
        """The share of entries that it changes, among those of the weights it touches."""
        numel = sum(weight.numel for weight in self.weights.values())
        return self.nnz / numel if numel else 0.0


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{shown(key)} stands there twice")
        found[key] = value
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{shown(text)} is not a finite number")
    return number


def _check_values(text: str | bytes) -> None:
    """Refuse a JSON text whose values would take far more memory than the text. Counts separators, before parsing."""
    marks = (b",", b":", b"[", b"{") if isinstance(text, bytes) else (",", ":", "[", "{")
    values = sum(map(text.count, marks))  # type: ignore[arg-type]
    if values > MAX_JSON_VALUES:
        raise ValueError(f"{values:,} values are more than the {MAX_JSON_VALUES:,} that are read")


def parsed(text: str) -> Any:
    """The value of a JSON text. Raises ValueError or RecursionError for what JSON or the stock safetensors library
    refuses.

    Python's parser alone would accept repeated keys, NaN, infinity, ``1e999`` and lone surrogates.
    """
    _check_values(text)
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_float)
    if "\\u" in text:  # only an escape can stand for a lone surrogate, which UTF-8 cannot write
        json.dumps(value, ensure_ascii=False).encode()
    return value


def jsoned(value: object) -> str:
    """A value as JSON text; equal values give equal texts."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)


def json_object(what: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    """A mapping as it comes back from a file, so that what is given, written and read is the same.

    Tuples become lists, and keys become strings. Raises `AdapterError` for what JSON cannot express (tensors, NaN and
    infinity, lone surrogates, two keys with the same text) and for what is nested too deeply.
    """
    try:
        text = jsoned({} if value is None else value)
        text.encode()
        found = parsed(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterError(f"{what} must be made of JSON's types: {error}") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{what} must be a JSON object, got {shown(value)}")
    level: list[Any] = [found]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    if level:
        raise AdapterError(f"{what} must be nested at most {MAX_JSON_DEPTH} deep")
    return found


def _object(path: str, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    if key not in metadata:
        raise AdapterError(f"{path}: the metadata has no {key}")
    try:
        value = parsed(metadata[key])
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: the metadata's {key} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: the metadata's {key} must be a JSON object, got {type(value).__name__}")
    return value


def _integer(where: str, entry: Mapping[str, Any], key: str, least: int) -> int:
    value = entry.get(key)
    # type(), not isinstance(): True is not a count.
    if type(value) is not int or value < least:
        raise AdapterError(f"{where}: {key} must be a whole number of at least {least}, got {shown(value)}")
    return value


def _word(where: str, entry: Mapping[str, Any], key: str) -> int | None:
    value = entry.get(key)
    if value is None:
        return None
    digits = set("0123456789abcdef")
    if not isinstance(value, str) or len(value) != 16 or not digits.issuperset(value):
        raise AdapterError(f"{where}: {key} must be 16 hex digits or null, got {shown(value)}")
    return int(value, 16)


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a safetensors file, in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def entries_of(shape: Sequence[int]) -> int:
    """The product of the sizes; beyond 2^63 any number above it, since products of thousands of digits are slow."""
    if 0 in shape:
        return 0
    numel = 1
    for size in shape:
        numel *= size
        if numel > 2**63:
            break
    return numel


def _sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _place(name: str, entry: Any, at: int) -> Place:
    """One tensor of a header. Raises ValueError that says what is wrong."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{named(name)} must have dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for what, sizes in (("shape", shape), ("data_offsets", offsets)):
        if not _sizes(sizes):
            raise ValueError(f"{named(name)}: {what} must be a list of sizes, got {shown(sizes)}")
    if len(shape) > MAX_DIMS:
        raise ValueError(f"{named(name)}: shape must have at most {MAX_DIMS} sizes, got {len(shape):,}")
    if not isinstance(dtype, str) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(
            f"{named(name)}: dtype must be a name and data_offsets a range, got {shown(dtype)}, {shown(offsets)}"
        )
    bits = BITS.get(dtype)
    if bits is None:
        raise ValueError(f"{named(name)}: the dtype {shown(dtype, 40)} is not known")
    numel = entries_of(shape)
    if numel > 2**63:
        raise ValueError(f"{named(name)}: shape {shown(shape)} has more than 2^63 entries")
    if numel * bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"{named(name)}: {numel} entries of {dtype} do not take {offsets[1] - offsets[0]} bytes")
    return Place(dtype, tuple(shape), at + offsets[0], at + offsets[1])


@dataclass(frozen=True, eq=False)
class Opened:
    """An open safetensors file: its header, which was checked, and its bytes."""

    path: str
    file: BinaryIO
    metadata: dict[str, str]
    places: dict[str, Place]  # in the order of the tensors in the file
    packed: bool = False  # whether the metadata and the places of codes were unpacked: see `Packed`
    words: bytes = b""

    def map(self, *, unchanged: bool = False) -> Bytes:
        """Map the whole file as an array. Nothing is read before it is used, and the path is not looked up again.

        Writing to the array copies the page and never changes the file. Memory for such copies is not reserved, so the
        file may be larger than memory. Where the system insists on reserving it (``vm.overcommit_memory=2``,
        ``ulimit -d``), an array that is to stay `unchanged` is mapped read-only; writing to it then kills the process.

        The file must not be shortened while the array is in use: the system kills a process that reads past the end of
        a mapped file. Replacing the file by another one, as this library does, is safe. Raises OSError with the file's
        name.
        """
        import numpy as np

        size = os.fstat(self.file.fileno()).st_size
        end = max((place.end for place in self.places.values()), default=0)
        if size < end:
            raise AdapterError(f"{self.path}: the file was shortened while it was read")
        if os.name != "posix":
            import mmap

            return np.frombuffer(mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
        try:
            return np.asarray(_Mapping(self.file.fileno(), size, writable=True))
        except OSError as error:
            if unchanged and error.errno == errno.ENOMEM:
                with suppress(OSError):
                    return np.asarray(_Mapping(self.file.fileno(), size, writable=False))
            reason = f"mapping its {size:,} bytes failed: {error.strerror}"
            raise OSError(error.errno, reason, self.path) from error


@cache
def _libc() -> Any:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


class _Mapping:
    """A mapped file that numpy reads through the array interface. It is unmapped when the last array over it is gone.

    Python's own mmap keeps a file descriptor open for each mapping, and a server may hold thousands of adapters. The
    arrays claim to be writable even where the memory is not, since torch warns about every tensor made of others.
    """

    def __init__(self, descriptor: int, size: int, *, writable: bool) -> None:
        import ctypes
        import mmap

        # Python has this constant only since 3.13.
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
        rights = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        address = _libc().mmap(None, size, rights, mmap.MAP_PRIVATE | no_reserve, descriptor, 0)
        if address == ctypes.c_void_p(-1).value:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self.__array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}
        # Not at exit, when others may still read it: then the system unmaps it.
        weakref.finalize(self, _libc().munmap, address, size).atexit = False


def _for_reading(path: str, flags: int) -> int:
    # Something else may have replaced the file since it was checked, and opening a pipe would wait for its writer.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@contextmanager
def opened(path: str | os.PathLike[str], most: int = MAX_HEADER) -> Iterator[Opened]:
    """Open a safetensors file and check its header, which may have at most ``most`` bytes.

    The checks are those of the stock library: the tensors fill the file from the header to its end, without gaps or
    overlaps. Neither numpy nor torch is imported, so reading a header is quick.
    """
    path = _text.path("the file", path)
    check_regular(path)
    with open(path, "rb", opener=_for_reading) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise AdapterError(f"{path}: the file was replaced while it was opened")
        try:
            metadata, places = _layout(file, most)
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{path}: this is not a whole safetensors file: {error}") from error
        yield Opened(path, file, metadata, places)


# How other files begin that are given by mistake. Read as the length of a header, all of these are beyond any file.
_OTHER_FILES = (
    (b"PK\3\4", "a file of torch.save (or another zip), which is not read; what torch.load returns can be saved again"),
    (b"version ", "a pointer of Git LFS to the file, which is still to be fetched: git lfs pull"),
    (b'{"', "JSON; of a checkpoint in shards give the folder"),
    (b"{\n", "JSON; of a checkpoint in shards give the folder"),
    (b"GGUF", "a GGUF file, which is not read"),
)


def _layout(file: BinaryIO, most: int) -> tuple[dict[str, str], dict[str, Place]]:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    for begin, what in _OTHER_FILES:
        if start.startswith(begin):
            raise ValueError(f"it begins like {what}")
    if len(start) < 8 or length > size - 8:
        raise ValueError(f"a header of {length:,} bytes does not fit {size:,} bytes")
    if length > most:
        raise ValueError(f"a header of {length:,} bytes is longer than the {most:,} that are read")
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise ValueError("the header must be a JSON object")
    header = parsed(raw.decode())
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must be an object of strings")
    places = {name: _place(name, entry, 8 + length) for name, entry in header.items()}
    places = dict(sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)))
    at = 8 + length
    for name, place in places.items():
        if place.begin != at:
            raise ValueError(f"{named(name)} must start at byte {at}, where the last tensor ends, got {place.begin}")
        at = place.end
    if at != size:
        raise ValueError(f"the tensors end at byte {at:,}, and the file at {size:,}")
    return metadata, places


def read_layout(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Place]]:
    """The metadata of a safetensors file, and where its tensors are, in their order. Checked as in `opened`."""
    with opened(path) as file:
        return file.metadata, file.places


def _tensor(
    where: str, places: Mapping[str, Place], key: str, dtypes: Mapping[str, str], length: int | None
) -> tuple[str, int]:
    """Check a tensor's dtype and length by the header alone. Returns torch's name of the dtype, and the length."""
    if key not in places:
        raise AdapterError(f"{where}: the tensor {named(key)} is missing")
    dtype, shape = places[key].dtype, list(places[key].shape)
    if dtype not in dtypes:
        raise AdapterError(f"{where}: {named(key)} must be {' or '.join(dtypes)}, got {dtype}")
    if len(shape) != 1 or (length is not None and shape[0] != length):
        wanted = "1-D" if length is None else f"of shape [{length}]"
        raise AdapterError(f"{where}: {named(key)} must be {wanted}, got shape {shown(shape)}")
    return dtypes[dtype], shape[0]


def _weight(where: str, name: str, entry: Any, places: Mapping[str, Place], version: int) -> WeightHeader:
    if not isinstance(entry, dict):
        raise AdapterError(f"{where}: its metadata must be a JSON object, got {type(entry).__name__}")
    shape = entry.get("shape")
    if not _sizes(shape) or len(shape) > MAX_DIMS:
        raise AdapterError(f"{where}: shape must be a list of sizes, got {shown(shape)}")
    numel = entries_of(shape)
    if numel > MAX_NUMEL:
        raise AdapterError(f"{where}: shape {shown(shape)} has more than 2^62 entries")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise AdapterError(f"{where}: dtype must be one of {', '.join(DTYPES)}, got {shown(dtype)}")
    granule = _integer(where, entry, "granule", 1)
    if numel % granule or granule > max(numel, 1):
        raise AdapterError(f"{where}: granule must divide its {numel} entries, got {shown(granule)}")
    count = _integer(where, entry, "count", 0)
    if count > numel // granule:
        most = f"its {numel // granule} granules of {granule}"
        raise AdapterError(f"{where}: count must be at most {most}, got {shown(count)}")
    seed, fingerprint = _word(where, entry, "seed"), _word(where, entry, "fingerprint")
    aliases = entry.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(alias, str) and alias for alias in aliases):
        raise AdapterError(f"{where}: aliases must be a list of names, got {shown(aliases)}")

    form = entry.get("values", "plain") if version > 1 else "plain"
    printed: int | None = None
    if form == "difference":
        printed = _word(where, entry, "print")
        if dtype not in DIFFERENCES:
            raise AdapterError(f"{where}: values that are differences must be of floats, got dtype {dtype}")
        _tensor(where, places, f"{name}.values", {"U8": "uint8"}, None)
        values_dtype = DIFFERENCES[dtype]
    elif form == "plain":
        allowed = {DTYPES[dtype][0]: dtype}
        if dtype in ARITHMETIC:
            allowed["F32"] = "float32"
        values_dtype, _ = _tensor(where, places, f"{name}.values", allowed, count * granule)
    else:
        raise AdapterError(f"{where}: values must be plain or difference, got {shown(form)}")

    kind, code_bytes = entry.get("indices"), 0
    if kind == "code":
        _, code_bytes = _tensor(where, places, f"{name}.indices", {"U8": "uint8"}, None)
    elif kind == "seed":
        if seed is None:
            raise AdapterError(f"{where}: its indices should follow from a seed, but seed is null")
    elif kind == "whole":
        if granule != numel or count != 1:
            raise AdapterError(
                f"{where}: a whole parameter is one granule of all its {numel} entries, got {count} of {granule}"
            )
    else:
        raise AdapterError(f"{where}: indices must be code, seed or whole, got {shown(kind)}")
    return WeightHeader(
        tuple(shape),
        dtype,
        granule,
        count,
        kind,
        seed,
        fingerprint,
        tuple(aliases),
        values_dtype,
        code_bytes,
        form == "difference",
        printed,
        _word(where, entry, "after") if version > 1 else None,
    )


@contextmanager
def opened_adapter(path: str | os.PathLike[str]) -> Iterator[tuple[Header, Opened]]:
    """Open an adapter's file and check all it says about its adapter, without torch and without reading tensors."""
    with opened(path, MAX_ADAPTER_HEADER) as file:
        if file.metadata.get(VERSION_KEY) == "2" and WEIGHTS_KEY in file.places:
            try:
                file = Packed.unpacked(file)
            except (ValueError, RecursionError, zlib.error) as error:
                raise AdapterError(f"{file.path}: its packed header cannot be read: {error}") from error
        yield _header(file), file


def read_header(path: str | os.PathLike[str]) -> Header:
    """What the file says about its adapter; all of it is checked, without torch and without reading tensors."""
    with opened_adapter(path) as (header, _):
        return header


class Packed:
    """The layout of version 2: what version 1 says with some 350 bytes a weight, in some 50.

    - The tensor ``shira.weights``, uint8: the JSON text of ``shira.weights``, deflated (zlib). Its objects leave out
      what is as usual (`DEFAULTS`), and say with ``bytes`` how long the weight's codes are, with ``words`` which keys
      have a 64-bit word.
    - ``shira.words``, int64: those words, weight after weight.
    - ``shira.codes``, uint8: of each weight its index code and its code of differences, where it has them.
    - ``shira.checksums``, int64: a word for what the file says of itself, then one for each weight.

    Unpacked, the metadata and places of a file are those that version 1 would have.
    """

    DEFAULTS: Mapping[str, Any] = {"granule": 1, "indices": "code", "seed": None, "fingerprint": None}
    WORDS, CODES = "shira.words", "shira.codes"
    KEYS = ("seed", "fingerprint", "print", "after")

    @classmethod
    def unpacked(cls, file: Opened) -> Opened:
        """The file with the metadata and places of its weights."""
        for key in (WEIGHTS_KEY, CHECKSUMS_KEY):
            if key in file.metadata:
                raise ValueError(f"{key} must be metadata or a tensor, not both")
        places, metadata = dict(file.places), dict(file.metadata)

        def take(name: str, dtype: str, most: int | None = None) -> Place:
            place = places.pop(name, None)
            if place is None or place.dtype != dtype or len(place.shape) != 1:
                raise ValueError(f"the tensor {named(name)} must be there, {dtype} and 1-D")
            if most is not None and place.end - place.begin > most:
                raise ValueError(f"{named(name)} must have at most {most:,} bytes, got {place.end - place.begin:,}")
            return place

        def read(place: Place) -> bytes:
            file.file.seek(place.begin)
            return file.file.read(place.end - place.begin)

        inflater = zlib.decompressobj()
        text = inflater.decompress(read(take(WEIGHTS_KEY, "U8", MAX_ADAPTER_HEADER)), MAX_ADAPTER_HEADER + 1)
        if len(text) > MAX_ADAPTER_HEADER:
            raise ValueError(f"{WEIGHTS_KEY} must have at most {MAX_ADAPTER_HEADER:,} bytes when it is inflated")
        if not inflater.eof or inflater.unused_data:
            raise ValueError(f"{WEIGHTS_KEY} must be one whole zlib stream")
        metadata[WEIGHTS_KEY] = text.decode()
        weights = _object(file.path, metadata, WEIGHTS_KEY)
        codes = take(cls.CODES, "U8") if cls.CODES in places else None
        begin = 0 if codes is None else codes.begin
        for name, entry in weights.items():
            for tensor, size in cls._sizes(name, entry).items():
                if tensor in places:
                    raise ValueError(f"the tensor {named(tensor)} must be in {cls.CODES} alone")
                places[tensor] = Place("U8", (size,), begin, begin + size)
                begin += size
        if begin != (0 if codes is None else codes.end):
            raise ValueError(f"the codes of the weights must fill {cls.CODES} exactly")
        words = read(take(cls.WORDS, "I64", 8 * len(cls.KEYS) * len(weights))) if cls.WORDS in places else b""
        if CHECKSUMS_KEY in places:
            checks = read(take(CHECKSUMS_KEY, "I64", 8 * (1 + len(weights))))
            metadata[CHECKSUMS_KEY] = hexed(word for (word,) in struct.iter_unpack("<Q", checks))
        return replace(file, metadata=metadata, places=places, packed=True, words=words)

    @staticmethod
    def _sizes(name: str, entry: Any) -> dict[str, int]:
        """The codes of a weight, in their order, and how long they are."""
        if not isinstance(entry, dict):
            return {}
        tensors = [f"{name}.indices"] if entry.get("indices", "code") == "code" else []
        tensors += [f"{name}.values"] if entry.get("values") == "difference" else []
        sizes = entry.get("bytes", [])
        if not _sizes(sizes) or len(sizes) != len(tensors):
            raise ValueError(f"{named(name)}: bytes must be {len(tensors)} sizes, got {shown(sizes)}")
        return dict(zip(tensors, sizes, strict=True))

    @classmethod
    def entries(cls, file: Opened, weights: dict[str, Any]) -> dict[str, Any]:
        """The objects of the weights as version 1 has them."""
        words = (word for (word,) in struct.iter_unpack("<Q", file.words))
        found: dict[str, Any] = {}
        for name, entry in weights.items():
            if isinstance(entry, dict):
                keys = entry.get("words", [])
                if not isinstance(keys, list) or not all(key in cls.KEYS and key not in entry for key in keys):
                    raise AdapterError(
                        f"{file.path}: weight {named(name)}: words must be some of {', '.join(cls.KEYS)}, which its "
                        f"object does not have, got {shown(keys)}"
                    )
                try:
                    entry = {**cls.DEFAULTS, **entry, **{key: f"{next(words):016x}" for key in keys}}
                except StopIteration:
                    raise AdapterError(f"{file.path}: {cls.WORDS} ends before the words of {named(name)}") from None
            found[name] = entry
        if next(words, None) is not None:
            raise AdapterError(f"{file.path}: {cls.WORDS} has more words than its weights")
        return found

    @classmethod
    def parts(
        cls,
        metadata: Mapping[str, str],
        headers: Mapping[str, Mapping[str, Any]],
        codes: Mapping[str, Sequence[Part]],
        prints: Iterable[tuple[int, int]],
    ) -> dict[str, Part]:
        """What a file has beside plain values: of objects as version 1 has them, the codes and their fingerprints."""
        objects: dict[str, Any] = {}
        words: list[int] = []
        for name, header in headers.items():
            keys = [key for key in cls.KEYS if header.get(key) is not None]
            words += (int(header[key], 16) for key in keys)
            objects[name] = {
                key: value
                for key, value in header.items()
                if key not in cls.KEYS and (key not in cls.DEFAULTS or value != cls.DEFAULTS[key])
            }
            objects[name] |= {"bytes": [code.nbytes for code in codes[name]]} if codes[name] else {}
            objects[name] |= {"words": keys} if keys else {}
        text, said = jsoned(objects), struct.pack(f"<{len(words)}Q", *words)
        checks = checksums({**metadata, WEIGHTS_KEY: text}, said, prints)
        flat = [code for some in codes.values() for code in some]
        nbytes = sum(code.nbytes for code in flat)
        return {
            cls.WORDS: _bytes_part("I64", [said]),
            CHECKSUMS_KEY: _bytes_part("I64", [struct.pack(f"<{len(checks)}Q", *checks)]),
            WEIGHTS_KEY: _bytes_part("U8", [zlib.compress(text.encode(), 9)]),
            cls.CODES: Part("U8", (nbytes,), nbytes, lambda: chain.from_iterable(code.pieces() for code in flat)),
        }


def _header(file: Opened) -> Header:
    path, metadata, places = file.path, file.metadata, file.places
    if VERSION_KEY not in metadata:
        raise AdapterError(f"{path}: the metadata has no {VERSION_KEY}, so this is not a SHiRA adapter")
    if metadata[VERSION_KEY] not in map(str, VERSIONS):
        known = " and ".join(map(str, VERSIONS))
        raise AdapterError(
            f"{path}: version {shown(metadata[VERSION_KEY], 40)} is not known; this library reads versions {known}"
        )
    version = int(metadata[VERSION_KEY])
    adapter = _object(path, metadata, ADAPTER_KEY)
    alpha, delta = strength(f"{path}: alpha", adapter.get("alpha")), adapter.get("delta")
    if type(delta) is not bool:
        raise AdapterError(f"{path}: delta must be true or false, got {shown(delta)}")
    mask, provenance = adapter.get("mask"), adapter.get("provenance", {})
    if mask is not None and not isinstance(mask, dict):
        raise AdapterError(f"{path}: mask must be a JSON object or null, got {shown(mask)}")
    if not isinstance(provenance, dict):
        raise AdapterError(f"{path}: provenance must be a JSON object, got {shown(provenance)}")
    mask = None if mask is None else json_object(f"{path}: mask", mask)
    provenance = json_object(f"{path}: provenance", provenance)

    expected: set[str] = set()
    weights: dict[str, WeightHeader] = {}
    entries = _object(path, metadata, WEIGHTS_KEY)
    for name, entry in (Packed.entries(file, entries) if file.packed else entries).items():
        if not name:
            raise AdapterError(f"{path}: weight '': the name is empty")
        weights[name] = _weight(f"{path}: weight {named(name)}", name, entry, places, version)
        expected.add(f"{name}.values")
        if weights[name].indices == "code":
            expected.add(f"{name}.indices")
    check_names(f"{path}: ", {name: weight.aliases for name, weight in weights.items()})
    extra = sorted(places.keys() - expected)
    if extra:
        raise AdapterError(
            f"{path}: {len(extra)} tensor(s) belong to no weight of the metadata: {', '.join(map(shown, extra[:5]))}"
        )
    return Header(alpha, delta, mask, provenance, weights, CHECKSUMS_KEY in metadata, version)


def check_names(where: str, aliases: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse names that a file cannot hold, and one name for two weights."""
    owner = {name: name for name in aliases}
    for name, others in aliases.items():
        for one in (name, *others):
            if not isinstance(one, str):
                raise AdapterError(f"{where}the name of a weight must be text, got {named(one)}")
            if not one:
                raise AdapterError(f"{where}weight {named(name)}: the name is empty")
            try:
                one.encode()
            except UnicodeEncodeError:
                raise AdapterError(f"{where}weight {named(one)}: UTF-8 cannot write this name") from None
        for other in others:
            if other in owner:
                raise AdapterError(
                    f"{where}weight {named(name)}: its alias {named(other)} is also a name of {named(owner[other])}"
                )
            owner[other] = name


def check_regular(path: str) -> None:
    """Refuse folders, and pipes and devices, which may never end."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise AdapterError(f"{path}: this is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise AdapterError(f"{path}: this is a pipe or a device, not a file")


def fingerprint(data: Any) -> int:
    """The fingerprint of some bytes (`shira_ops.fingerprint`) as an unsigned number. Does not need torch."""
    from shira import _codec

    return _codec.fingerprint(data) & (2**64 - 1)


def checksums(metadata: Mapping[str, str], words: bytes, weights: Iterable[tuple[int, int]]) -> list[int]:
    """The checksums that tell whether an adapter file is as it was written.

    One for the metadata and, in version 2, the weights' words; then one for each weight, in the order of the metadata.
    ``weights`` are the fingerprints of each weight's values and of its code (0 if it has none).
    """
    import numpy as np

    said = np.frombuffer((metadata[ADAPTER_KEY] + metadata[WEIGHTS_KEY]).encode() + words, np.uint8)
    return [fingerprint(said), *(fingerprint(np.array(pair, np.uint64)) for pair in weights)]


def hexed(words: Iterable[int]) -> str:
    """64-bit words as the metadata has several: 16 hex digits each."""
    return "".join(f"{word:016x}" for word in words)


def check_checksums(file: Opened, header: Header, data: Bytes) -> None:
    """Refuse a file in which any bit is not as it was written. `data` is all of it. Old files have no checksums."""
    said = file.metadata.get(CHECKSUMS_KEY)
    if said is None:
        return

    def printed(name: str) -> int:
        place = file.places.get(name)
        return 0 if place is None else fingerprint(data[place.begin : place.end])

    prints = ((printed(f"{name}.values"), printed(f"{name}.indices")) for name in header.weights)
    found = hexed(checksums(file.metadata, file.words, prints))
    if found == said:
        return
    if len(found) != len(said) or found[:16] != said[:16]:
        raise AdapterError(
            f"{file.path}: its metadata is not as it was written, by the checksum; if it was changed on purpose, take "
            f"{CHECKSUMS_KEY} out of it"
        )
    damaged = [name for at, name in enumerate(header.weights, 1) if found[16 * at :][:16] != said[16 * at :][:16]]
    raise AdapterError(
        f"{file.path}: weight {named(damaged[0])}: its values or indices are not as they were written, by the checksum "
        f"({len(damaged)} of {len(header.weights)} weights differ); the file is damaged, get it again"
    )


def read_whole(path: str | os.PathLike[str]) -> Header:
    """Check all of a file without torch, index codes and checksums too. Returns what it says about its adapter."""
    import numpy as np

    from shira import _codec

    with opened_adapter(path) as (header, file):
        data = file.map(unchanged=True)
        for name, weight in header.weights.items():
            if weight.difference:
                place = file.places[f"{name}.values"]
                try:
                    _codec.decode_numbers(data[place.begin : place.end], weight.nnz, weight.values_dtype)
                except ValueError as error:
                    raise AdapterError(bad_values(path, name, error)) from error
            if weight.indices != "code":
                continue
            dtype = np.int32 if weight.numel // weight.granule < 2**31 else np.int64
            place = file.places[f"{name}.indices"]
            try:
                _codec.decode(data[place.begin : place.end], weight.count, weight.numel, dtype, weight.granule)
            except ValueError as error:
                raise AdapterError(bad_code(path, name, error)) from error
        check_checksums(file, header, data)
    return header


def bad_code(path: str | os.PathLike[str], name: str, error: Exception) -> str:
    """The sentence for indices that cannot be decoded."""
    return f"{os.fspath(path)}: weight {named(name)}: its indices do not decode: {error}"


def bad_values(path: str | os.PathLike[str], name: str, error: Exception) -> str:
    """The sentence for differences that cannot be decoded."""
    return f"{os.fspath(path)}: weight {named(name)}: its values do not decode: {error}"


@dataclass(frozen=True)
class Part:
    """A tensor to write: safetensors' name of its dtype, its shape, and a function that yields its bytes in pieces."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterable[Any]]


def tensor_part(tensor: Tensor) -> Part:
    """A tensor of torch, to be written. It is moved and copied only while it is written."""

    def pieces() -> list[Any]:
        import torch

        flat = tensor.detach().cpu().contiguous().view(-1)
        return [flat.view(torch.uint8).numpy()] if flat.numel() else []

    dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")][0]
    return Part(dtype, tuple(tensor.shape), tensor.nbytes, pieces)


def _bytes_part(dtype: str, pieces: Sequence[Any]) -> Part:
    """A 1-D tensor of these bytes, to be written."""
    nbytes = sum(memoryview(piece).nbytes for piece in pieces)
    return Part(dtype, (nbytes // ITEM_BYTES[dtype],), nbytes, lambda: pieces)


def write_safetensors(
    path: Path, parts: Mapping[str, Part], metadata: Mapping[str, str], most: int = MAX_HEADER
) -> None:
    """Write a safetensors file: the tensors in the given order, each in memory only while it is written.

    Refuses a header of more than `most` bytes, and one that `opened` would not read for another reason.

    The same arguments give the same bytes. For aligned tensors give those with the widest entries first.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, part in parts.items():
        header[name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [at, at + part.nbytes]}
        at += part.nbytes
    text = jsoned(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > most:
        raise AdapterError(f"{path.name}: a header of {len(text):,} bytes is longer than the {most:,} that are read")
    try:
        _check_values(text)
    except ValueError as error:
        raise AdapterError(f"{path.name}: the header is too large: {error}") from error
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, part in parts.items():
            written = sum(file.write(piece) for piece in part.pieces())
            if written != part.nbytes:
                raise AdapterError(f"{path.name}: {named(name)} must have {part.nbytes} bytes, got {written}")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``. On success the file that was written there replaces ``path``.

    A symbolic link stays one: the file that it points to is replaced. What killed runs have left behind is deleted
    first (`sweep`). Errors of the disk name the file.
    """
    target = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    if target.exists():
        check_regular(os.fspath(target))  # a device could be replaced, too
    sweep(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        fsync(temporary, os.O_RDWR)
        os.replace(temporary, target)
    except OSError as error:
        # The error of a full disk names no file; that of a read-only one names the temporary file.
        if error.errno is not None and error.filename in (None, os.fspath(temporary)):
            raise OSError(error.errno, error.strerror, os.fspath(target)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def fsync(path: Path, flags: int) -> None:
    """Wait until what was written to a file or folder is on the disk; ``flags`` are those it is opened with."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Errors of file systems that cannot sync a folder, such as network shares. The rename is done by then.
_NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM, errno.EBADF}


def sync_folder(folder: Path) -> None:
    """Write a folder's new names to disk, too, if the file system can."""
    if os.name != "posix":
        return
    try:
        fsync(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


_OLD = 24 * 3600  # seconds; until then a process on another machine that shares the folder may still be writing


def sweep(target: Path) -> None:
    """Delete the files and folders that killed runs left beside ``target``: ``.NAME.PID.HEX.tmp`` and ``.old``.

    Only if the name is that of this target, the process is gone, and nothing was written for a day. An ``.old`` stays
    if the target is missing: it may be the only copy.
    """
    if os.name != "posix":
        return
    ours = re.compile(re.escape(f".{target.name}.") + r"(\d{1,9})\.[0-9a-f]{8}\.(tmp|old)")
    try:
        names = os.listdir(target.parent)
    except OSError:
        return
    for name in names:
        match = ours.fullmatch(name)
        if match is None or lives(int(match[1])) or (match[2] == "old" and not os.path.lexists(target)):
            continue
        path = target.with_name(name)
        with suppress(OSError):
            status = path.lstat()
            if time.time() - status.st_mtime < _OLD:
                continue
            if stat.S_ISDIR(status.st_mode):
                import shutil

                shutil.rmtree(path)
            else:
                path.unlink()


def lives(process: int) -> bool:
    """Whether this machine has a process of this number. Only for POSIX."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's process, or not the number of one
        pass
    return True
