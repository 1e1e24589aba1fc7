"""Checkpoints, read tensor by tensor: safetensors files (mapped, without torch), state dicts, modules.

A checkpoint on disk is a ``.safetensors`` file, or a folder that holds one, or a sharded one with its
``*.safetensors.index.json``. Nothing is read before it is asked for.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shira import _file
from shira._file import AdapterError

if TYPE_CHECKING:
    from torch import Tensor, nn

Source: TypeAlias = "str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module"
Bytes: TypeAlias = npt.NDArray[np.uint8]

INDEX_SUFFIX = ".safetensors.index.json"
_MOST_INDEX_BYTES = 256 << 20
_TORCH_NAMES = {name: torch_name for torch_name, (name, _) in _file.DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Stored:
    """One tensor of a checkpoint."""

    name: str
    dtype: str  # torch's name where an adapter can hold it, else safetensors' in lower case
    shape: tuple[int, ...]
    nbytes: int
    # The bytes in a mapped file, or the tensor in memory.
    data: Any = field(repr=False)
    # Equal for two names of one tensor.
    memory: object = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def supported(self) -> bool:
        """Whether an adapter can hold entries of this dtype."""
        return self.dtype in _file.DTYPES

    @property
    def mapped(self) -> bool:
        """Whether it lies in a mapped file."""
        return isinstance(self.data, np.ndarray)

    def bytes(self) -> Bytes:
        """Its bytes in row-major order; a view of the file where it is mapped."""
        if isinstance(self.data, np.ndarray):
            return self.data
        import torch

        flat = self.data.detach().cpu().contiguous().view(-1)
        found: Bytes = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
        return found

    def tensor(self) -> Tensor:
        """The tensor, flat, on the CPU; a view of the file where it is mapped and aligned."""
        import torch

        data = self.bytes()
        dtype = getattr(torch, self.dtype)
        if data.size == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        if data.ctypes.data % dtype.itemsize:
            data = data.copy()  # other writers may not align tensors in the file
        return torch.from_numpy(data).view(dtype)


@dataclass(eq=False)
class Shard:
    """One mapped safetensors file."""

    path: str
    metadata: dict[str, str]
    tensors: dict[str, Stored]


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

    def find(self, names: tuple[str, ...]) -> Stored | None:
        """The tensor under the first of the names that is there."""
        return next((self.tensors[name] for name in names if name in self.tensors), None)


def map_file(path: str) -> Shard:
    """Map a safetensors file, its header checked."""
    metadata, places = _file.read_layout(path)
    with open(path, "rb") as file:
        # Private, so that numpy and torch find it writable; nothing writes to it.
        whole = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
    tensors = {}
    for name, place in places.items():
        dtype = _TORCH_NAMES.get(place.dtype, place.dtype.lower())
        nbytes = place.end - place.begin
        tensors[name] = Stored(name, dtype, place.shape, nbytes, whole[place.begin : place.end])
    return Shard(path, metadata, tensors)


def _sharded(folder: str, index_path: str) -> Checkpoint:
    if os.path.getsize(index_path) > _MOST_INDEX_BYTES:
        raise AdapterError(f"{index_path}: an index of more than {_MOST_INDEX_BYTES >> 20} MB is not read")
    try:
        with open(index_path, encoding="utf-8") as file:
            index = json.load(file)
        places = dict(index["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{index_path}: the index cannot be read: {type(error).__name__}: {error}") from error
    names = sorted({str(name) for name in places.values()})
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
    return Checkpoint(folder, tensors, list(shards.values()), folder, index, os.path.basename(index_path))


def _on_disk(path: str) -> Checkpoint:
    if not os.path.isdir(path):
        shard = map_file(path)
        return Checkpoint(path, shard.tensors, [shard])
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
        raise AdapterError(
            f"{path}: a checkpoint's folder holds model.safetensors or model{INDEX_SUFFIX} with its shards, got {found}"
        )
    shard = map_file(os.path.join(path, single[0]))
    return Checkpoint(path, shard.tensors, [shard], path)


def _in_memory(where: str, tensors: Mapping[str, Any], model: object) -> Checkpoint:
    import torch

    from shira import _model

    stored = {}
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            if key.endswith("_extra_state"):
                continue  # what modules keep beside their tensors
            raise TypeError(f"{where}: {key!r} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_meta:
            raise AdapterError(f"{where}: {key!r} is on the meta device, so it has no content")
        if tensor.layout != torch.strided:
            raise AdapterError(f"{where}: {key!r} must be dense, got {tensor.layout}")
        name = _model.clean(key)
        memory = (_model.memory(tensor), tuple(tensor.shape), tensor.stride())
        dtype = str(tensor.dtype).removeprefix("torch.")
        stored[name] = Stored(name, dtype, tuple(tensor.shape), tensor.nbytes, tensor, memory)
    return Checkpoint(where, stored, model=model)


def open_checkpoint(source: object, role: str) -> Checkpoint:
    """Find a checkpoint's tensors; ``role`` names it in messages where it has no path."""
    if isinstance(source, (str, os.PathLike)):
        return _on_disk(os.fspath(source))
    if isinstance(source, Mapping):
        return _in_memory(role, source, None)
    from torch import nn

    if not isinstance(source, nn.Module):
        raise TypeError(f"{role} must be a path, a state dict or a torch.nn.Module, got {type(source).__name__}")
    from shira import _model

    model = _model.unwrap(source)
    return _in_memory(role, model.state_dict(), model)


def ties(checkpoint: Checkpoint) -> dict[str, str]:
    """Each name to the first name of the same tensor."""
    first: dict[object, str] = {}
    return {
        name: name if stored.memory is None or not stored.nbytes else first.setdefault(stored.memory, name)
        for name, stored in checkpoint.tensors.items()
    }


Wanted: TypeAlias = tuple[tuple[int, ...], str, "int | None", tuple[str, ...]]


def misfits(weights: Mapping[str, Wanted], base: Checkpoint) -> list[str]:
    """Why an adapter cannot go onto a base: weights by name, each its shape, dtype, fingerprint and aliases.

    Without torch where the base is on disk. A weight without a fingerprint is not read.
    """
    from shira import _codec

    problems = []
    owner: dict[object, str] = {}
    for name, (shape, dtype, fingerprint, aliases) in weights.items():
        stored = base.find((name, *aliases))
        if stored is None:
            problems.append(f"{name!r} is not in the base")
        elif stored.shape != shape:
            problems.append(f"{name!r} must have shape {list(shape)}, got {list(stored.shape)}")
        elif stored.dtype != dtype:
            problems.append(f"{name!r} must be {dtype}, got {stored.dtype}")
        elif owner.setdefault(stored.memory or stored.name, name) != name:
            problems.append(f"{name!r} is the same (tied) weight as {owner[stored.memory or stored.name]!r}")
        elif fingerprint is not None and _codec.fingerprint(stored.bytes()) & (2**64 - 1) != fingerprint:
            problems.append(f"{name!r} has other content (by fingerprint)")
    return problems


def companions(folder: str) -> Iterator[Path]:
    """The files beside a checkpoint's weights that a merged copy needs too: configuration, tokenizer."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data")
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith((*weights, ".index.json")):
            yield path
