"""Checkpoints, read tensor by tensor: safetensors files (mapped, without torch), state dicts and modules.

A checkpoint on disk is a ``.safetensors`` file, a folder that holds one, a folder with shards and their
``*.safetensors.index.json``, or a folder of ``torch.distributed.checkpoint``. A tensor is not read before it is used.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shira import _text
from shira._text import AdapterError
from shira.adapter import _file

if TYPE_CHECKING:
    from torch import Tensor, nn

Source: TypeAlias = "str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module"
Bytes: TypeAlias = npt.NDArray[np.uint8]
Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with a tensor's name, the bytes done so far and the bytes in all."""

DCP_METADATA = ".metadata"
INDEX_SUFFIX = ".safetensors.index.json"
_MOST_INDEX_BYTES = 256 << 20
# Dtypes that an adapter cannot hold: such tensors are only compared and copied.
_OTHERS = {
    "BOOL": "bool", "U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
_TORCH_NAMES = {name: torch_name for torch_name, (name, _) in _file.DTYPES.items()} | _OTHERS
_FILE_NAMES = {torch_name: name for name, torch_name in _TORCH_NAMES.items()}


@dataclass(eq=False)
class Stored:
    """One tensor of a checkpoint."""

    name: str  # the model's name for it; a shard knows it by its name in the file
    dtype: str  # torch's name where an adapter can hold it, else safetensors' in lower case
    shape: tuple[int, ...]
    nbytes: int
    # The bytes of the mapped file, the tensor in memory, or a function that reads the tensor.
    data: Any = field(repr=False)
    # Equal for two names of one tensor.
    memory: object = None
    # Why its bytes cannot be read (see `_model.foreign`), or None.
    foreign: str | None = None
    # `_fit.Found` asks for it. A checkpoint's tensor is only read, so nothing else can stand in the way.
    obstacle: None = field(default=None, init=False, repr=False)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def supported(self) -> bool:
        """Whether an adapter can hold entries of this dtype."""
        return self.dtype in _file.DTYPES

    @property
    def on_disk(self) -> bool:
        """Whether it is read from a file, so that nobody else writes to what was read."""
        return isinstance(self.data, np.ndarray) or callable(self.data)

    @property
    def file_dtype(self) -> str:
        """safetensors' name of its dtype."""
        return _FILE_NAMES.get(self.dtype, self.dtype.upper())

    @property
    def one(self) -> object:
        """A key that is equal for two names of one tensor."""
        return self if self.memory is None else self.memory

    def bytes(self) -> Bytes:
        """Its bytes in row-major order; a view of the file if it is mapped."""
        if isinstance(self.data, np.ndarray):
            return self.data
        if self.foreign is not None:
            raise AdapterError(f"{self.name!r} {self.foreign}")
        import torch

        data = self.data() if callable(self.data) else self.data
        flat = data.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
        found: Bytes = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
        return found

    def fingerprint(self) -> int:
        """The fingerprint of its bytes, as an unsigned number. Reads all of them."""
        return _file.fingerprint(self.bytes())

    def equal(self, other: Stored) -> bool:
        """Whether dtype, shape and all bits are the same."""
        return self.dtype == other.dtype and self.shape == other.shape and equal_bytes(self.bytes(), other.bytes())

    def tensor(self) -> Tensor:
        """The flat tensor on the CPU; a view of the file if it is mapped and aligned."""
        import torch

        data = self.bytes()
        dtype = getattr(torch, self.dtype)
        if data.size == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        if data.ctypes.data % dtype.itemsize:
            data = data.copy()  # other programs may write tensors that are not aligned
        return torch.from_numpy(data).view(dtype)


@dataclass(eq=False)
class Shard:
    """One mapped safetensors file."""

    path: str
    metadata: dict[str, str]
    tensors: dict[str, Stored]  # by the names in the file


@dataclass(eq=False)
class Checkpoint:
    """The tensors of a checkpoint by name, and where it came from."""

    where: str
    tensors: dict[str, Stored]
    shards: list[Shard] = field(default_factory=list)  # of a checkpoint on disk
    folder: str | None = None
    index: dict[str, Any] | None = None
    index_name: str | None = None
    model: Any = None  # the module it is of, if it was given as one
    prefix: str = ""  # what all names begin with in the files, and is left out here

    def get(self, name: str) -> Stored | None:
        """The tensor under a name, with or without the prefix of the files."""
        return self.tensors.get(name.removeprefix(self.prefix))

    def names(self) -> Iterable[str]:
        """The names that its tensors have here."""
        return self.tensors

    def find(self, names: tuple[str, ...]) -> Stored | None:
        """The tensor with the first of these names that exists."""
        return next((stored for stored in map(self.get, names) if stored is not None), None)


def map_file(path: str) -> Shard:
    """Map a safetensors file and check its header. The file may be larger than memory."""
    with _file.opened(path) as file:
        whole = file.map(unchanged=True)
    tensors = {}
    for name, place in file.places.items():
        dtype = _TORCH_NAMES.get(place.dtype, place.dtype.lower())
        nbytes = place.end - place.begin
        tensors[name] = Stored(name, dtype, place.shape, nbytes, whole[place.begin : place.end])
    return Shard(path, file.metadata, tensors)


def _sharded(folder: str, index_path: str) -> Checkpoint:
    if os.path.getsize(index_path) > _MOST_INDEX_BYTES:
        raise AdapterError(f"{index_path}: an index of more than {_MOST_INDEX_BYTES >> 20} MB is not read")
    try:
        with open(index_path, encoding="utf-8") as file:
            index = json.load(file)
        places = dict(index["weight_map"])
        if not all(isinstance(place, str) for place in places.values()):
            raise TypeError("weight_map must map names to names of files")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{index_path}: the index cannot be read: {type(error).__name__}: {error}") from error
    if any(not isinstance(name, str) for name in places.values()):
        raise AdapterError(f"{index_path}: the index must give each tensor the name of its file")
    names = sorted(set(places.values()))
    for name in names:
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise AdapterError(f"{index_path}: the index names the file {name!r}, which is not in its folder")
        if not os.path.exists(os.path.join(folder, name)):
            raise AdapterError(f"{index_path}: the index names the file {name!r}, which is missing")
    shards = {name: map_file(os.path.join(folder, name)) for name in names}
    tensors = {}
    for name, place in places.items():
        if name not in shards[place].tensors:
            raise AdapterError(f"{index_path}: the index says that {place!r} holds {name!r}, and it does not")
        tensors[name] = shards[place].tensors[name]
    known = {"folder": folder, "index": index, "index_name": os.path.basename(index_path)}
    return _named(folder, tensors, shards=list(shards.values()), **known)


def _named(where: str, tensors: Mapping[str, Stored], **rest: Any) -> Checkpoint:
    """A checkpoint of the tensors of a file or a state dict, under the names that the model itself uses."""
    # DistributedDataParallel puts this before every name.
    prefix = "module." if tensors and all(name.startswith("module.") for name in tensors) else ""
    found: dict[str, Stored] = {}
    before: dict[str, str] = {}
    for name, stored in tensors.items():
        stored.name = _text.clean(name).removeprefix(prefix)
        if before.setdefault(stored.name, name) != name:
            raise AdapterError(f"{where}: {before[stored.name]!r} and {name!r} are two names for {stored.name!r}")
        found[stored.name] = stored
    return Checkpoint(where, found, prefix=prefix, **rest)


def _on_disk(path: str) -> Checkpoint:
    owner, _, name = path.partition("/")
    if owner and name and "/" not in name and not os.path.lexists(path) and not os.path.isdir(owner):
        reason = "No such file or directory; a checkpoint on the Hub must be downloaded first"
        raise FileNotFoundError(errno.ENOENT, reason, path)
    if not os.path.isdir(path):
        shard = map_file(path)
        return _named(path, shard.tensors, shards=[shard])
    if os.path.isfile(os.path.join(path, DCP_METADATA)):
        return _distributed(path)
    files = sorted(os.listdir(path))
    indices = [name for name in files if name.endswith(INDEX_SUFFIX)]
    single = [name for name in files if name.endswith(".safetensors")]
    if "model" + INDEX_SUFFIX in indices:
        indices = ["model" + INDEX_SUFFIX]
    if len(indices) == 1:
        return _sharded(path, os.path.join(path, indices[0]))
    if "model.safetensors" in single:
        single = ["model.safetensors"]
    if len(single) != 1 or indices:
        found = f"{len(single)} .safetensors files and {len(indices)} indices"
        pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
        if pickles and not single:
            found += f"; {pickles[0]} could execute anything when it is read: save the model again as .safetensors"
        raise AdapterError(
            f"{path}: a checkpoint's folder holds model.safetensors or model{INDEX_SUFFIX} with its shards, got {found}"
        )
    shard = map_file(os.path.join(path, single[0]))
    return _named(path, shard.tensors, shards=[shard], folder=path)


def _distributed(folder: str) -> Checkpoint:
    import torch

    from shira.adapter import _dcp

    tensors = {}
    for name, (shape, dtype, read) in _dcp.find(folder, os.path.join(folder, DCP_METADATA)).items():
        size = getattr(torch, dtype).itemsize
        tensors[name] = Stored(name, dtype, shape, math.prod(shape) * size, read)
    return _named(folder, tensors, folder=folder)


def _in_memory(where: str, tensors: Mapping[str, Any], model: object) -> Checkpoint:
    import torch
    from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

    from shira import _linears, _model

    stored: dict[str, Stored] = {}
    opened: dict[str, Any] = {}
    for key, tensor in tensors.items():
        # Quantized weights by what they are made of.
        opened |= _linears.inner(tensor, key) if _linears.is_quantized(tensor) else {key: tensor}
    for key, tensor in opened.items():
        if not isinstance(key, str):
            raise TypeError(f"{where}: names must be strings, got {key!r:.80}")
        if not isinstance(tensor, torch.Tensor):
            if key.endswith("_extra_state"):
                continue  # what modules save besides their tensors
            raise TypeError(f"{where}: {key!r} must be a tensor, got {type(tensor).__name__}")
        if isinstance(tensor, (UninitializedBuffer, UninitializedParameter)):
            raise AdapterError(f"{where}: {key!r} has no shape yet; run the model once first")
        if tensor.is_meta:
            raise AdapterError(f"{where}: {key!r} is on the meta device, so it has no content")
        foreign = _model.foreign(tensor)
        if foreign is None and tensor.is_quantized:
            foreign = f"is {tensor.dtype}, whose entries share a scale; use the model before it was converted"
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if foreign is not None:
            stored[key] = Stored(key, dtype, shape, 0, tensor, (id(tensor),), foreign)
            continue
        memory = (_model.memory(tensor), shape, tensor.stride())
        if dtype == "float4_e2m1fn_x2":
            shape = (*shape[:-1], 2 * shape[-1])  # files count entries, of which a byte holds two
        stored[key] = Stored(key, dtype, shape, tensor.nbytes, tensor, memory)
    if model is not None:
        for name, one in stored.items():
            one.name = _text.clean(name)
        return Checkpoint(where, {one.name: one for one in stored.values()}, model=model)
    return _named(where, stored)


def open_checkpoint(source: object, role: str) -> Checkpoint:
    """Find the tensors of a checkpoint. ``role`` is its name in messages if it has no path."""
    if isinstance(source, (str, os.PathLike)):
        return _on_disk(_text.path(role, source))
    if isinstance(source, Mapping):
        return _in_memory(role, source, None)
    from torch import nn

    if not isinstance(source, nn.Module):
        raise TypeError(f"{role} must be a path, a state dict or a torch.nn.Module, got {type(source).__name__}")
    from shira import _model

    model = _model.unwrap(source)
    return _in_memory(role, model.state_dict(), model)


def ties(checkpoint: Checkpoint) -> dict[str, str]:
    """Maps each name to the first name of the same tensor."""
    first: dict[object, str] = {}
    return {
        name: name if stored.memory is None or not stored.nbytes else first.setdefault(stored.memory, name)
        for name, stored in checkpoint.tensors.items()
    }


_PIECE = 4 << 20


def equal_bytes(one: Bytes, two: Bytes) -> bool:
    """Whether the bytes are the same. Compared in pieces, which stay in the caches."""
    from shira import _codec

    starts = range(0, len(one), _PIECE)
    return len(one) == len(two) and not any(
        _codec.count_differing(one, two, 1, start, min(start + _PIECE, len(one))) for start in starts
    )


def companions(folder: str) -> Iterator[Path]:
    """The files beside a checkpoint's weights that a merged copy needs: configuration, tokenizer, and the folders of
    further modules that sentence-transformers has."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data")
    modules = _modules(folder)
    for path in sorted(Path(folder).iterdir()):
        small = path.is_file() and not path.name.startswith(".") and not path.name.endswith((*weights, ".index.json"))
        if small or (path.name in modules and path.is_dir()):
            yield path


def _modules(folder: str) -> set[str]:
    """The folders that sentence-transformers' ``modules.json`` names."""
    path = Path(folder) / "modules.json"
    try:
        if path.stat().st_size > _MOST_INDEX_BYTES:
            return set()
        found = {module["path"] for module in json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    return {name for name in found if isinstance(name, str) and name == os.path.basename(name) and name}
