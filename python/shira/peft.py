"""PEFT's adapters read and written: its SHiRA both ways, its LoRA as the largest entries of ``B @ A``.

PEFT keeps a folder: ``adapter_config.json`` and ``adapter_model.safetensors``. Its SHiRA holds for each linear layer
``shira_weight``, values that are added to the weight, and ``shira_indices``, their rows and columns; so what is read is
a delta adapter, and what is written one too. Neither direction needs PEFT itself.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import shira_ops
from shira import _codec, _file, _model
from shira._checkpoint import Checkpoint, Source, Stored, map_file, open_checkpoint
from shira._file import AdapterError
from shira.adapter import Adapter, Entry, dtype_name
from shira.difference import Lost, Report
from shira.mask import index_dtype

__all__ = ["from_peft", "to_peft"]

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_WORD = 2**64 - 1
_KEY = re.compile(
    r"(?P<module>.+)\.(?:(?P<shira>shira_weight|shira_indices)(?:\.(?P<one>[^.]+))?"
    r"|(?P<lora>lora_[AB])(?:\.(?P<two>[^.]+))?\.weight)"
)
# What changes the meaning of a LoRA's A and B, where it is set.
_NO_PLAIN_LORA = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)


def _config(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, CONFIG)
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: this cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") not in ("SHIRA", "LORA"):
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterError(f"{path}: only PEFT's SHIRA and LORA can be read, got {kind!r}")
    return config


def _tensors(folder: str) -> dict[str, Stored]:
    path = os.path.join(folder, WEIGHTS)
    if not os.path.exists(path) and os.path.exists(os.path.join(folder, PICKLED)):
        raise AdapterError(
            f"{folder}: its weights are a pickle ({PICKLED}), which could execute anything; load it with PEFT and save "
            f"it again, which writes {WEIGHTS}"
        )
    return map_file(path).tensors


def _by_module(folder: str, kind: str, tensors: Mapping[str, Stored]) -> dict[str, dict[str, Tensor]]:
    """Each module's tensors by what they are; refuses what is none of an adapter of this kind."""
    wanted = ("shira_weight", "shira_indices") if kind == "SHIRA" else ("lora_A", "lora_B")
    modules: dict[str, dict[str, Tensor]] = {}
    names: set[str] = set()
    strange = []
    for key, stored in tensors.items():
        match = _KEY.fullmatch(key.removeprefix(PREFIX))
        what = (match["shira"] or match["lora"]) if match else None
        if match is None or what not in wanted or not stored.supported:
            strange.append(key)
            continue
        names.add(match["one"] or match["two"] or "")
        shaped = stored.tensor().view(stored.shape)
        modules.setdefault(match["module"], {})[what] = shaped
    if strange:
        raise AdapterError(
            f"{folder}: {len(strange)} tensors are not part of {kind} on linear layers (whole modules, embeddings, "
            f"biases and DoRA have no sparse form): {_model.some(strange)}"
        )
    if len(names) > 1:
        raise AdapterError(f"{folder}: it holds several adapters ({', '.join(sorted(names))}); save one alone")
    for module, parts in modules.items():
        missing = [what for what in wanted if what not in parts]
        if missing:
            raise AdapterError(f"{folder}: module {module!r} has no {missing[0]}")
    if not modules:
        raise AdapterError(f"{folder}: it holds no weights")
    return modules


def _base(folder: str, config: Mapping[str, Any], base: Source | None) -> Checkpoint:
    if base is not None:
        return open_checkpoint(base, "base")
    known = config.get("base_model_name_or_path")
    if isinstance(known, str) and os.path.isdir(known):
        return open_checkpoint(known, "base")
    raise AdapterError(
        f"{folder}: PEFT's files say nothing of the weights' shapes and dtypes, so the base is needed: give base= "
        f"(a path, a state dict or the model); the adapter names {known!r}, which is no folder here"
    )


def _weight_of(where: str, base: Checkpoint, module: str) -> Stored:
    stored = base.find((f"{module}.weight",))
    if stored is None:
        raise AdapterError(f"{where}: the base has no weight {f'{module}.weight'!r}")
    if len(stored.shape) != 2 or stored.dtype not in _file.ARITHMETIC:
        raise AdapterError(
            f"{where}: {stored.name!r} must be a float matrix in the base, got shape {list(stored.shape)} of "
            f"{stored.dtype}"
        )
    return stored


def _entry(stored: Stored, indices: Tensor, values: Tensor, granule: int = 1) -> Entry:
    compute = torch.float64 if stored.dtype == "float64" else torch.float32
    return Entry(
        indices.to(index_dtype(stored.numel // granule)),
        values.to(compute),
        stored.shape,
        getattr(torch, stored.dtype),
        granule,
        _codec.fingerprint(stored.bytes()) & _WORD,
    )


def _shira(where: str, stored: Stored, parts: Mapping[str, Tensor]) -> Entry:
    places, values = parts["shira_indices"], parts["shira_weight"]
    if values.dim() != 1 or tuple(places.shape) != (2, len(values)) or not values.is_floating_point():
        raise AdapterError(
            f"{where}: shira_weight must be 1-D floats and shira_indices 2 x as many, got shapes "
            f"{list(values.shape)} and {list(places.shape)}"
        )
    rows, columns = places.to(torch.int64)  # floats on Windows
    outside = (rows < 0) | (rows >= stored.shape[0]) | (columns < 0) | (columns >= stored.shape[1])
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise AdapterError(
            f"{where}: its entry ({int(rows[at])}, {int(columns[at])}) is outside the base's {list(stored.shape)}"
        )
    indices, order = (rows * stored.shape[1] + columns).sort()
    if bool((indices[1:] == indices[:-1]).any()):
        raise AdapterError(f"{where}: an entry stands there twice")
    return _entry(stored, indices, values[order])


def _scaling(where: str, config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r), with the patterns for single modules."""
    alpha = config.get("lora_alpha", 8)
    for pattern, other in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = other
            break
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise AdapterError(f"{where}: lora_alpha must be a finite number, got {alpha!r:.80}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _lora(
    where: str, stored: Stored, parts: Mapping[str, Tensor], scaling: float, turned: bool, density: float, granule: int
) -> tuple[Entry, Lost]:
    """The largest entries of ``scaling * B @ A``; one dense weight in memory."""
    a, b = parts["lora_A"], parts["lora_B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{where}: lora_A and lora_B must be matrices that multiply, got {list(a.shape)}, {list(b.shape)}"
        )
    dense = (b.float() @ a.float()).mul_(scaling)
    dense = dense.T.contiguous() if turned else dense
    if tuple(dense.shape) != stored.shape:
        raise AdapterError(f"{where}: B @ A has shape {list(dense.shape)}, and the base's weight {list(stored.shape)}")
    if stored.shape[1] % granule:
        raise AdapterError(f"{where}: granule {granule} must divide the last dimension of {list(stored.shape)}")
    count = min(max(1, round(density * stored.numel / granule)), stored.numel // granule)
    indices = shira_ops.select_top(dense, None, count, score="magnitude", granule=granule)
    values = shira_ops.gather(dense, indices, granule=granule)
    whole, kept = float(dense.double().square().sum()), float(values.double().square().sum())
    lost = max(0.0, 1.0 - kept / whole) if whole else 0.0
    changed = int(dense.count_nonzero())
    return _entry(stored, indices, values, granule), Lost(stored.numel, changed, values.numel(), lost, whole)


def from_peft(
    folder: str | os.PathLike[str],
    base: Source | None = None,
    *,
    density: float | None = None,
    granule: int = 1,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Adapter:
    """See `Adapter.from_peft`."""
    where = os.fspath(folder)
    if not os.path.isdir(where):
        from shira import hub

        where = hub.snapshot(where, [CONFIG, WEIGHTS], revision=revision, token=token)
    config = _config(where)
    kind = config["peft_type"]
    if kind == "SHIRA" and (density is not None or granule != 1):
        raise AdapterError(f"{where}: PEFT's SHIRA is sparse already: density and granule are for LORA")
    if kind == "LORA":
        if density is None:
            raise AdapterError(f"{where}: a LORA is dense: give density=, the share of each weight's entries to keep")
        if not 0 < density <= 1:
            raise ValueError(f"from_peft: density must be above 0 and at most 1, got {density!r}")
        if type(granule) is not int or granule < 1:
            raise ValueError(f"from_peft: granule must be a whole number of at least 1, got {granule!r}")
        special = [key for key in _NO_PLAIN_LORA if config.get(key)]
        if special:
            raise AdapterError(f"{where}: only plain LORA can be read, and this one has {', '.join(special)}")
    modules = _by_module(where, kind, _tensors(where))
    source = _base(where, config, base)
    entries: dict[str, Entry] = {}
    report: dict[str, Lost] = {}
    for module, parts in modules.items():
        here = f"{where}: module {module!r}"
        stored = _weight_of(here, source, module)
        if kind == "SHIRA":
            entries[stored.name] = _shira(here, stored, parts)
            continue
        assert density is not None
        scaling = _scaling(here, config, module, parts["lora_A"].shape[0])
        entries[stored.name], report[stored.name] = _lora(
            here, stored, parts, scaling, bool(config.get("fan_in_fan_out")), density, granule
        )
    mask = {"name": "PEFT", "peft_type": kind, "r": config.get("r")}
    if kind == "LORA":
        mask |= {"density": density, "granule": granule}
    provenance = {
        key: config[key] for key in ("base_model_name_or_path", "peft_version", "task_type") if config.get(key)
    }
    return Adapter(entries, delta=True, mask=mask, provenance=provenance, report=Report(report) if report else None)


def _check_for_peft(adapter: Adapter, model: object) -> None:
    """Refuse, all in one error, what PEFT's SHiRA has no place for."""
    problems = []
    for name, entry in adapter.weights.items():
        if entry.whole:
            problems.append(f"{name!r} is a whole parameter")
        elif not name.endswith(".weight") or len(entry.shape) != 2:
            problems.append(f"{name!r} of shape {list(entry.shape)} is no linear layer's weight")
        elif dtype_name(entry.dtype) not in ("float16", "bfloat16", "float32"):
            problems.append(f"{name!r} is {dtype_name(entry.dtype)}, and its values are float32")
        elif entry.aliases:
            problems.append(f"{name!r} is tied to {entry.aliases[0]!r}, and PEFT would change one of them")
        elif isinstance(model, torch.nn.Module):
            owner = model.get_submodule(name.removesuffix(".weight"))
            if not isinstance(owner, torch.nn.Linear):
                problems.append(f"{name!r} is the weight of {type(owner).__name__}, not of Linear")
    if problems:
        raise AdapterError(f"PEFT's SHiRA cannot hold this adapter: {_model.some(problems)}")
    if not adapter.weights:
        raise AdapterError("PEFT's SHiRA cannot hold an adapter without weights")


def _padded(indices: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """With zeros at the first entries that are free, up to ``count``."""
    free = np.setdiff1d(np.arange(count), indices.numpy())[: count - len(indices)]
    indices = torch.cat([indices, torch.from_numpy(free)])
    values = torch.cat([values, values.new_zeros(len(free))])
    order = indices.argsort()
    return indices[order], values[order]


def to_peft(
    adapter: Adapter,
    folder: str | os.PathLike[str],
    base: Source | None = None,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """See `Adapter.to_peft`."""
    source = None if base is None else open_checkpoint(base, "base")
    _check_for_peft(adapter, None if source is None else source.model)
    if not adapter.delta:
        if source is None:
            raise AdapterError("PEFT's SHiRA adds to the base, and this adapter replaces entries: give base=")
        adapter = adapter.to_delta(source)
    # PEFT makes r * (rows + columns) entries of every layer, with one r.
    rank = max(-(-entry.nnz // sum(entry.shape)) for entry in adapter.weights.values())
    full = [
        f"{name!r} has {entry.numel} entries, and {rank * sum(entry.shape)} are needed"
        for name, entry in adapter.weights.items()
        if rank * sum(entry.shape) > entry.numel
    ]
    if full:
        raise AdapterError(
            f"PEFT's SHiRA takes r * (rows + columns) entries of each weight, r = {rank}: {_model.some(full)}"
        )
    tensors: dict[str, Tensor] = {}
    for name, entry in adapter.weights.items():
        entry.check_indices(f"weight {name!r}")
        within = torch.arange(entry.granule, device="cpu")
        flat = (entry.indices.cpu().to(torch.int64).unsqueeze(1) * entry.granule + within).view(-1)
        # PEFT keeps no strength: it goes into the values.
        values = entry.values.detach().cpu().to(torch.float32)
        flat, values = _padded(flat, values * adapter.alpha, rank * sum(entry.shape))
        module = PREFIX + name.removesuffix(".weight")
        tensors[f"{module}.shira_weight"] = values
        tensors[f"{module}.shira_indices"] = torch.stack([flat // entry.shape[1], flat % entry.shape[1]]).to(
            torch.int32
        )
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model or adapter.provenance.get("base_model_name_or_path"),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        # PEFT draws a mask of this kind before it reads the indices, which replace it.
        "mask_type": "random",
        "modules_to_save": None,
        "peft_type": "SHIRA",
        "r": rank,
        "random_seed": 0,
        "revision": None,
        # As one expression: a list would also match modules whose names only end so.
        "target_modules": "|".join(re.escape(name.removesuffix(".weight")) for name in adapter.weights),
        "task_type": task_type or adapter.provenance.get("task_type"),
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    parts = {
        name: _file.tensor_part(tensor) for name, tensor in sorted(tensors.items(), key=lambda one: -one[1].itemsize)
    }
    with _file.replacing(target / WEIGHTS) as temporary:
        _file.write_safetensors(temporary, parts, {"format": "pt"})
    with _file.replacing(target / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
