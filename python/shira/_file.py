"""The adapter file, version 1: what stands where, and every check that needs no torch.

One safetensors file. For each weight ``NAME`` it holds ``NAME.values`` and, unless the mask follows from a seed or
the parameter is whole, ``NAME.indices`` (a uint8 code, see ``shira_ops.encode_indices``). The metadata, strings as
safetensors wants them, says the rest:

- ``shira.version``: ``"1"``.
- ``shira.adapter``: JSON with ``alpha``, ``delta``, ``mask``, ``density`` and ``provenance``.
- ``shira.weights``: JSON, name to ``shape``, ``dtype``, ``granule``, ``count``, ``indices`` (``"code"``, ``"seed"`` or
  ``"whole"``), ``seed``, ``fingerprint`` (16 hex digits, or null) and ``aliases``.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
VERSION_KEY, ADAPTER_KEY, WEIGHTS_KEY = "shira.version", "shira.adapter", "shira.weights"

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
# What a tensor of any checkpoint may have: bits an entry.
BITS = {name: 8 * size for name, size in DTYPES.values()} | {
    "BOOL": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "U32": 32, "U64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
ITEM_BYTES = dict(DTYPES.values())
ARITHMETIC = ("float16", "bfloat16", "float32", "float64")
MAX_NUMEL = 2**62
MAX_HEADER = 100_000_000  # bytes, the stock library's limit


class AdapterError(ValueError):
    """An adapter, or its file, that is refused. The message says which file, which weight and what."""


# Strengths are rounded to float32 first: one that it has no room for would act as infinite.
_LARGEST_STRENGTH = 3.4028234663852886e38


def strength(what: str, value: object) -> float:
    """A strength (``alpha``) as a float; ``what`` names it in the refusal. One rule for files, calls and commands."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not abs(value) <= _LARGEST_STRENGTH:  # type: ignore[operator]
        # An int of thousands of digits has no repr.
        got = f"an int of {value.bit_length()} bits" if type(value) is int else f"{value!r:.80}"
        raise AdapterError(f"{what} must be a finite number (of float32), got {got}")
    return float(value)  # type: ignore[arg-type]


# What wrappers inside a model put into the names of its parameters: torch.compile, activation checkpointing.
_INFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.")


def clean(name: str) -> str:
    """A parameter's name as files have it: without what wrappers put into it."""
    for infix in _INFIXES:
        name = name.replace(infix, "")
    return name


Rename = Mapping[str, str] | Callable[[str], str] | None


def renamer(rename: Rename) -> Callable[[str], str]:
    """What an argument ``rename=`` does to a name: a function, or regular expressions and what takes their places.

    Patterns are searched in the mapping's order, each in what the one before it left (`re.sub`): ``{r"^model\\.": ""}``
    takes a prefix off, ``{"^": "model."}`` puts one on.
    """
    if rename is None:
        return lambda name: name
    if callable(rename):
        return lambda name: _new_name(name, rename(name))
    if not isinstance(rename, Mapping):
        raise ValueError(f"rename must map patterns to replacements, or be a function, got {type(rename).__name__}")
    rules = []
    for pattern, replacement in rename.items():
        if not isinstance(replacement, str):
            raise ValueError(f"rename {pattern!r}: what takes its place must be a string, got {replacement!r:.80}")
        try:
            rules.append((re.compile(pattern), replacement))
        except (re.error, TypeError) as error:
            raise ValueError(f"rename {pattern!r} is not a regular expression: {error}") from error

    def renamed(name: str) -> str:
        new = name
        for rule, replacement in rules:
            try:
                new = rule.sub(replacement, new)
            except re.error as error:  # a group that the pattern has not
                raise ValueError(f"rename {rule.pattern!r} to {replacement!r}: {error}") from error
        return _new_name(name, new)

    return renamed


def _new_name(old: str, new: object) -> str:
    if not isinstance(new, str) or not new:
        raise ValueError(f"rename must make a name of {old!r}, got {new!r:.80}")
    return new


@dataclass(frozen=True)
class WeightHeader:
    """What a file says of one weight, checked against the tensors it holds."""

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
    """What a file says of its adapter."""

    alpha: float
    delta: bool
    mask: dict[str, Any] | None
    provenance: dict[str, Any]
    weights: dict[str, WeightHeader]

    @property
    def nnz(self) -> int:
        return sum(weight.nnz for weight in self.weights.values())

    @property
    def density(self) -> float:
        """Share of the entries of the weights it touches that it changes."""
        numel = sum(weight.numel for weight in self.weights.values())
        return self.nnz / numel if numel else 0.0


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond every float
        return False


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} stands there twice")
        found[key] = value
    return found


def _object(path: str, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    if key not in metadata:
        raise AdapterError(f"{path}: the metadata has no {key}")
    try:
        value = json.loads(metadata[key], object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: the metadata's {key} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: the metadata's {key} must be a JSON object, got {type(value).__name__}")
    return value


def _integer(where: str, entry: Mapping[str, Any], key: str, least: int) -> int:
    value = entry.get(key)
    # type() and not isinstance(): True is no count.
    if type(value) is not int or value < least:
        raise AdapterError(f"{where}: {key} must be a whole number of at least {least}, got {value!r:.80}")
    return value


def _word(where: str, entry: Mapping[str, Any], key: str) -> int | None:
    value = entry.get(key)
    if value is None:
        return None
    digits = set("0123456789abcdef")
    if not isinstance(value, str) or len(value) != 16 or not digits.issuperset(value):
        raise AdapterError(f"{where}: {key} must be 16 hex digits or null, got {value!r:.80}")
    return int(value, 16)


def hex_word(value: int | None) -> str | None:
    """A 64-bit word as the file writes it."""
    return None if value is None else f"{value:016x}"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a safetensors file: bytes from its start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _place(name: str, entry: Any, at: int) -> Place:
    """One tensor of a header; ValueError with what is wrong."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} must have dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for what, sizes in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(sizes, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in sizes):
            raise ValueError(f"{name!r}: {what} must be a list of sizes, got {sizes!r:.80}")
    if not isinstance(dtype, str) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name!r}: dtype must be a name and data_offsets a range, got {dtype!r:.40}, {offsets!r:.80}")
    bits = BITS.get(dtype)
    if bits is None:
        raise ValueError(f"{name!r}: the dtype {dtype!r:.40} is not known")
    numel = math.prod(shape)
    if numel * bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"{name!r}: {numel} entries of {dtype} do not take {offsets[1] - offsets[0]} bytes")
    return Place(dtype, tuple(shape), at + offsets[0], at + offsets[1])


def read_layout(path: str) -> tuple[dict[str, str], dict[str, Place]]:
    """A safetensors file's metadata and where its tensors lie, in their order, all of it checked.

    The checks are the stock library's: tensors fill the file from the header to the end, without gaps and overlaps.
    Nothing is imported for them, so that a header can be read in no time.
    """
    check_regular(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, MAX_HEADER):
                raise ValueError(f"a header of {length:,} bytes does not fit {size:,} bytes")
            text = file.read(length)
        if not text.startswith(b"{"):
            raise ValueError("the header must be a JSON object")
        header = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=_no_constant)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ must be an object of strings")
        places = {name: _place(name, entry, 8 + length) for name, entry in header.items()}
        places = dict(sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)))
        at = 8 + length
        for name, place in places.items():
            if place.begin != at:
                raise ValueError(f"{name!r} must start at byte {at}, where the last tensor ends, got {place.begin}")
            at = place.end
        if at != size:
            raise ValueError(f"the tensors end at byte {at:,}, and the file at {size:,}")
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: this is no whole safetensors file: {error}") from error
    return metadata, places


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _tensor(
    where: str, places: Mapping[str, Place], key: str, dtypes: Mapping[str, str], length: int | None
) -> tuple[str, int]:
    """Check one tensor's dtype and length by the header alone; return torch's name of its dtype, and the length."""
    if key not in places:
        raise AdapterError(f"{where}: the tensor {key!r} is missing")
    dtype, shape = places[key].dtype, list(places[key].shape)
    if dtype not in dtypes:
        raise AdapterError(f"{where}: {key!r} must be {' or '.join(dtypes)}, got {dtype}")
    if len(shape) != 1 or (length is not None and shape[0] != length):
        wanted = "1-D" if length is None else f"of shape [{length}]"
        raise AdapterError(f"{where}: {key!r} must be {wanted}, got shape {shape!r:.80}")
    return dtypes[dtype], shape[0]


def _weight(where: str, name: str, entry: Any, places: Mapping[str, Place]) -> WeightHeader:
    if not isinstance(entry, dict):
        raise AdapterError(f"{where}: its metadata must be a JSON object, got {type(entry).__name__}")
    shape = entry.get("shape")
    if not isinstance(shape, list) or len(shape) > 64 or any(type(size) is not int or size < 0 for size in shape):
        raise AdapterError(f"{where}: shape must be a list of sizes, got {shape!r:.80}")
    numel = math.prod(shape)
    if numel > MAX_NUMEL:
        raise AdapterError(f"{where}: shape {shape!r:.80} has more than 2^62 entries")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise AdapterError(f"{where}: dtype must be one of {', '.join(DTYPES)}, got {dtype!r:.80}")
    granule = _integer(where, entry, "granule", 1)
    if numel % granule or granule > max(numel, 1):
        raise AdapterError(f"{where}: granule must divide its {numel} entries, got {granule!r:.80}")
    count = _integer(where, entry, "count", 0)
    if count > numel // granule:
        raise AdapterError(f"{where}: count must be at most its {numel // granule} granules of {granule}, got {count}")
    seed, fingerprint = _word(where, entry, "seed"), _word(where, entry, "fingerprint")
    aliases = entry.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(alias, str) and alias for alias in aliases):
        raise AdapterError(f"{where}: aliases must be a list of names, got {aliases!r:.80}")

    allowed = {DTYPES[dtype][0]: dtype}
    if dtype in ARITHMETIC:
        allowed["F32"] = "float32"
    values_dtype, _ = _tensor(where, places, f"{name}.values", allowed, count * granule)

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
        raise AdapterError(f"{where}: indices must be code, seed or whole, got {kind!r:.80}")
    return WeightHeader(
        tuple(shape), dtype, granule, count, kind, seed, fingerprint, tuple(aliases), values_dtype, code_bytes
    )


def read_adapter(path: str | os.PathLike[str]) -> tuple[Header, dict[str, Place]]:
    """What the file says of its adapter, and where its tensors lie, all of it checked, without torch and without
    reading the tensors."""
    where = os.fspath(path)
    metadata, places = read_layout(where)
    return _header(where, metadata, places), places


def read_header(path: str | os.PathLike[str]) -> Header:
    """What the file says of its adapter, all of it checked, without torch and without reading the tensors."""
    return read_adapter(path)[0]


def _header(path: str, metadata: Mapping[str, str], places: Mapping[str, Place]) -> Header:
    if VERSION_KEY not in metadata:
        raise AdapterError(f"{path}: the metadata has no {VERSION_KEY}, so this is no SHiRA adapter")
    if metadata[VERSION_KEY] != str(VERSION):
        raise AdapterError(
            f"{path}: version {metadata[VERSION_KEY]!r:.40} is not known; this library reads version {VERSION}"
        )
    adapter = _object(path, metadata, ADAPTER_KEY)
    alpha, delta = adapter.get("alpha"), adapter.get("delta")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not _finite(alpha):
        raise AdapterError(f"{path}: alpha must be a finite number, got {alpha!r:.80}")
    if type(delta) is not bool:
        raise AdapterError(f"{path}: delta must be true or false, got {delta!r:.80}")
    mask, provenance = adapter.get("mask"), adapter.get("provenance", {})
    if mask is not None and not isinstance(mask, dict):
        raise AdapterError(f"{path}: mask must be a JSON object or null, got {mask!r:.80}")
    if not isinstance(provenance, dict):
        raise AdapterError(f"{path}: provenance must be a JSON object, got {provenance!r:.80}")

    expected: set[str] = set()
    weights: dict[str, WeightHeader] = {}
    for name, entry in _object(path, metadata, WEIGHTS_KEY).items():
        where = f"{path}: weight {name!r}"
        if not name:
            raise AdapterError(f"{where}: the name is empty")
        weights[name] = _weight(where, name, entry, places)
        expected.add(f"{name}.values")
        if weights[name].indices == "code":
            expected.add(f"{name}.indices")
    check_aliases(f"{path}: ", {name: weight.aliases for name, weight in weights.items()})
    extra = sorted(places.keys() - expected)
    if extra:
        raise AdapterError(
            f"{path}: {len(extra)} tensor(s) belong to no weight of the metadata: {', '.join(map(repr, extra[:5]))}"
        )
    return Header(float(alpha), delta, mask, provenance, weights)


def check_aliases(where: str, aliases: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse one name for two weights."""
    owner = {name: name for name in aliases}
    for name, others in aliases.items():
        for other in others:
            if other in owner:
                raise AdapterError(f"{where}weight {name!r}: its alias {other!r} is also a name of {owner[other]!r}")
            owner[other] = name


def check_regular(path: str) -> None:
    """Refuse what is no file of its own: a folder, and pipes and devices, whose reading may never end."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise AdapterError(f"{path}: this is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise AdapterError(f"{path}: this is a pipe or a device, not a file")


def read_whole(path: str | os.PathLike[str]) -> Header:
    """Check everything a reader checks, the index codes included, without torch; what the file says of its adapter."""
    import numpy as np

    from shira import _codec

    header, places = read_adapter(path)
    with open(path, "rb") as file:
        for name, weight in header.weights.items():
            if weight.indices != "code":
                continue
            dtype = np.int32 if weight.numel // weight.granule < 2**31 else np.int64
            place = places[f"{name}.indices"]
            file.seek(place.begin)
            code = np.frombuffer(file.read(place.end - place.begin), np.uint8)
            try:
                _codec.decode(code, weight.count, weight.numel, dtype, weight.granule)
            except ValueError as error:
                raise AdapterError(bad_code(path, name, error)) from error
    return header


def bad_code(path: str | os.PathLike[str], name: str, error: Exception) -> str:
    """The sentence for indices that do not decode."""
    return f"{os.fspath(path)}: weight {name!r}: its indices do not decode: {error}"


@dataclass(frozen=True)
class Part:
    """A tensor to write: safetensors' name of its dtype, its shape, and its bytes in pieces, asked for when due."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterable[Any]]


def tensor_part(tensor: Tensor) -> Part:
    """A tensor of torch as a file holds it; it is moved and copied only while it is written."""

    def pieces() -> list[Any]:
        import torch

        flat = tensor.detach().cpu().contiguous().view(-1)
        return [flat.view(torch.uint8).numpy()] if flat.numel() else []

    dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")][0]
    return Part(dtype, tuple(tensor.shape), tensor.nbytes, pieces)


def write_safetensors(path: Path, parts: Mapping[str, Part], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, tensor after tensor in the order given, each in memory only while it is written.

    The bytes follow from the arguments alone. For aligned tensors give them by falling size of their entries.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, part in parts.items():
        header[name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [at, at + part.nbytes]}
        at += part.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise AdapterError(f"{path.name}: a header of {len(text):,} bytes is more than safetensors reads")
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, part in parts.items():
            written = sum(file.write(piece) for piece in part.pieces())
            if written != part.nbytes:
                raise AdapterError(f"{path.name}: {name!r} must have {part.nbytes} bytes, got {written}")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a fresh name in the folder of ``path``; on success the file written there takes its place, whole."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _fsync(temporary, os.O_RDWR)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        # The new name is only safe once the folder is on disk too.
        _fsync(target.parent, os.O_RDONLY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
