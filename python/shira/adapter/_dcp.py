"""Checkpoints of ``torch.distributed.checkpoint`` (DCP): folders with a ``.metadata`` and the ranks' files.

The pieces of a tensor, one from each rank that had a part of it, are read when the tensor is asked for, and put
together to the whole, as it was stored. ``.metadata`` is a pickle: nothing but DCP's own records is made of it, and
nothing in it is executed.
"""

from __future__ import annotations

import io
import os
import pickle
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from shira import _model
from shira._granules import dtype_name
from shira._text import AdapterError
from shira.adapter import _file

_MOST_METADATA_BYTES = 1 << 30
# What the model's state dict is called within a checkpoint that holds more.
_MODELS = ("model", "model_state_dict", "module", "state_dict", "weights")
# What a .metadata is made of.
_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}  # fmt: skip


class _Unpickler(pickle._Unpickler):
    """Of Python's own reader in Python: that in C takes any memory that a few damaged bytes ask for, as for a table of
    4 billion objects."""

    dispatch: ClassVar[Any] = {
        code: read for code, read in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        known = name in _KNOWN.get(module, ())
        if not known and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            raise pickle.UnpicklingError(f"{module}.{name} is not a part of such a file")
        return super().find_class(module, name)


def find(folder: str, path: str) -> dict[str, Any]:
    """The tensors of the model in a checkpoint, by the path of its metadata: name to shape, dtype, and a function that
    reads all of it."""
    if os.path.getsize(path) > _MOST_METADATA_BYTES:
        raise AdapterError(f"{path}: a .metadata of more than {_MOST_METADATA_BYTES >> 30} GB is not read")
    try:
        with open(path, "rb") as file:
            metadata = _Unpickler(io.BytesIO(file.read())).load()
        records = {str(key): one for key, one in dict(metadata.state_dict_metadata).items()}
        tensors = {key: one for key, one in records.items() if hasattr(one, "chunks")}
        found = {key: (tuple(one.size), _dtype_of(one), _covers(one)) for key, one in tensors.items()}
        places = dict(metadata.storage_data)
        files = sorted({str(info.relative_path) for index, info in places.items() if index.fqn in found})
        nested = {key: tuple(map(str, at)) for key, at in dict(metadata.planner_data or {}).items()}
        paths = {key: nested.get(key, (key,)) for key in found}
        if () in paths.values():
            raise ValueError("a tensor has no name")
    except Exception as error:  # whatever a broken pickle brings up
        raise AdapterError(f"{path}: the metadata cannot be read: {type(error).__name__}: {error}") from error
    broken = [key for key, (_, _, covers) in found.items() if not covers]
    if broken:
        raise AdapterError(f"{path}: the pieces of {_model.some(broken)} are not the whole tensor")
    for name in files:
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise AdapterError(f"{path}: it names the file {name!r}, which is not in its folder")
        if not os.path.exists(os.path.join(folder, name)):
            raise AdapterError(f"{path}: it names the file {name!r}, which is missing")
        _file.check_regular(os.path.join(folder, name))
    names = _of_model(folder, paths)
    return {name: (*found[key][:2], partial(_read, folder, metadata, key)) for key, name in names.items()}


def _dtype_of(record: Any) -> str:
    dtype = record.properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"a dtype must be one of torch's, got {dtype!r:.80}")
    return dtype_name(dtype)


# Where a piece begins and ends in each dimension.
_Box: TypeAlias = tuple[tuple[int, int], ...]


def _covers(record: Any) -> bool:
    """Whether the pieces lie within the tensor, have as many entries, and none of them twice."""
    entries, boxes = 0, []
    for chunk in record.chunks:
        ends = [begin + size for begin, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        if min([*chunk.offsets, *chunk.sizes], default=0) < 0:
            return False
        if any(end > size for end, size in zip(ends, record.size, strict=True)):
            return False
        entries += chunk.sizes.numel()
        if chunk.sizes.numel():
            boxes.append(tuple(zip(chunk.offsets, ends, strict=True)))
    return bool(entries == record.size.numel()) and not _overlap(boxes)


def _overlap(boxes: list[_Box]) -> bool:
    """Whether two boxes have an entry in common."""
    if len(boxes) < 2 or not boxes[0]:
        return len(boxes) > 1
    # Along the dimension that is cut most, few are open at a time.
    along = max(range(len(boxes[0])), key=lambda dim: len({box[dim][0] for box in boxes}))
    beside: list[_Box] = []
    for box in sorted(boxes, key=lambda one: one[along][0]):
        beside = [one for one in beside if one[along][1] > box[along][0]]
        if any(all(a[0] < b[1] and b[0] < a[1] for a, b in zip(one, box, strict=True)) for one in beside):
            return True
        beside.append(box)
    return False


def _of_model(folder: str, paths: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """The keys of the model's tensors, and their names in it. A checkpoint may hold an optimizer's, too."""
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for key, path in paths.items():
        groups.setdefault(path[:-1], {})[key] = path[-1]
    if len(groups) > 1:
        chosen = [group for group in groups if group and group[-1] in _MODELS]
        if len(chosen) != 1:
            names = [".".join(group) or "no name" for group in (chosen or groups)]
            raise AdapterError(
                f"{folder}: the checkpoint must hold one model, under one of the names {', '.join(_MODELS)}, got "
                f"tensors under {_model.some(names)}; save the model's state dict alone, or under such a name"
            )
        return groups[chosen[0]]
    return next(iter(groups.values()), {})


def _read(folder: str, metadata: Any, key: str) -> Tensor:
    """One whole tensor, put together of its pieces, of which one at a time is in memory."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    record = metadata.state_dict_metadata[key]
    try:
        tensor = torch.zeros(record.size, dtype=record.properties.dtype, device="cpu")
        reader, planner = FileSystemReader(folder), DefaultLoadPlanner()
        reader.set_up_storage_reader(metadata, True)
        planner.set_up_planner({key: tensor}, metadata, True)
        reader.read_data(planner.create_local_plan(), planner).wait()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a broken file brings up
        raise AdapterError(f"{folder}: {key!r} cannot be read: {type(error).__name__}: {error}") from error
    return tensor
