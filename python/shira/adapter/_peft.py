"""Reads and writes PEFT's SHiRA adapters, and reads PEFT's LoRA adapters as the largest entries of ``B @ A``.

Reads those of our own PEFT method, too (`shira.integrations.peft.SparseConfig`).

A PEFT adapter is a folder with ``adapter_config.json`` and ``adapter_model.safetensors``. For each linear layer its
SHiRA holds ``shira_weight``, values that are added to the weight, and ``shira_indices``, their rows and columns. So
what is read becomes a delta adapter, and what is written is one too. PEFT itself is not needed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import shira_ops
from shira import _codec, _model, _text
from shira._granules import WORD, dtype_name, index_dtype
from shira._text import AdapterError, Rename
from shira.adapter import _file
from shira.adapter._checkpoint import Checkpoint, Source, Stored, map_file, open_checkpoint, ties
from shira.adapter._entry import Entry, Lost, Made, Report
from shira.adapter._patterns import Pattern

if TYPE_CHECKING:
    from shira.adapter.adapter import Adapter

__all__ = ["from_peft", "to_peft"]

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
METHOD = "SHIRA_OPS"
"""The ``peft_type`` of `shira.integrations.peft.SparseConfig`."""
_PARTS = {
    "SHIRA": ("shira_weight", "shira_indices"),
    METHOD: ("shira_ops_values", "shira_ops_indices"),
    "LORA": ("lora_A", "lora_B"),
}
_MOST_CONFIG_BYTES = 16 << 20
_AT_ONCE = 1 << 22
_KEY = re.compile(
    r"(?P<module>.+)\.(?:(?P<sparse>shira_weight|shira_indices|shira_ops_values|shira_ops_indices)(?:\.(?P<one>[^.]+))?"
    r"|(?P<lora>lora_[AB])(?:\.(?P<two>[^.]+))?\.weight)"
)
# Options that change what a LoRA's A and B mean.
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
# Initialisations of a LoRA that leave the base as it is. All others first subtract the initial B @ A from the base, so
# that the final B @ A is not the change of the base.
_KEEPS_BASE = ("", "gaussian", "eva", "orthogonal", "mica")
_CONVERTED = ("pissa", "olora", "corda", "lora_ga")


def _config(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, CONFIG)
    _file.check_regular(path)
    if os.path.getsize(path) > _MOST_CONFIG_BYTES:
        raise AdapterError(f"{path}: a configuration of more than {_MOST_CONFIG_BYTES >> 20} MB is not read")
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: this cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") not in _PARTS:
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterError(f"{path}: only SHIRA, LORA and {METHOD} can be read, got {kind!r:.80}")
    patterns = config.get("alpha_pattern")
    if not (patterns is None or isinstance(patterns, dict)):
        raise AdapterError(f"{path}: alpha_pattern must map patterns to numbers, got {patterns!r:.80}")
    return config


def _check_plain_lora(where: str, config: Mapping[str, Any]) -> None:
    special = [key for key in _NO_PLAIN_LORA if config.get(key)]
    if special:
        raise AdapterError(f"{where}: only plain LORA can be read, and this one has {', '.join(special)}")
    start = config.get("init_lora_weights", True)
    if not isinstance(start, (bool, str, type(None))) or (isinstance(start, str) and start.lower() not in _KEEPS_BASE):
        converts = isinstance(start, str) and start.lower().startswith(_CONVERTED)
        advice = "save it in PEFT with path_initial_model_for_weight_conversion=, which makes a plain LORA of it, or "
        raise AdapterError(
            f"{where}: with init_lora_weights={start!r:.80} PEFT changes the base before it trains, so that B @ A is "
            f"not what changed; {advice if converts else ''}merge it and take Adapter.from_difference(base, merged)"
        )


def _tensors(folder: str) -> dict[str, Stored]:
    path = os.path.join(folder, WEIGHTS)
    if not os.path.exists(path) and os.path.exists(os.path.join(folder, PICKLED)):
        raise AdapterError(
            f"{folder}: its weights are a pickle ({PICKLED}), which could execute anything; load it with PEFT and save "
            f"it again, which writes {WEIGHTS}"
        )
    return map_file(path).tensors


def _by_module(
    folder: str, kind: str, tensors: Mapping[str, Stored]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Stored]]:
    """The tensors of each module by their kind, and the tensors that do not belong to an adapter of this kind."""
    wanted = _PARTS[kind]
    modules: dict[str, dict[str, Tensor]] = {}
    names: set[str] = set()
    others, twice = {}, ""
    for key, stored in tensors.items():
        match = _KEY.fullmatch(key.removeprefix(PREFIX))
        what = (match["sparse"] or match["lora"]) if match else None
        if match is None or what not in wanted or not stored.supported:
            others[key] = stored
            continue
        names.add(match["one"] or match["two"] or "")
        parts = modules.setdefault(match["module"], {})
        twice = twice or (f"module {match['module']!r:.80} has {what} twice" if what in parts else "")
        parts[what] = stored.tensor().view(stored.shape)
    if len(names) > 1:
        raise AdapterError(f"{folder}: it holds several adapters ({_model.some(sorted(names))}); save one alone")
    if twice:
        raise AdapterError(f"{folder}: {twice}, once without {PREFIX!r}")
    for module, parts in modules.items():
        missing = [what for what in wanted if what not in parts]
        if missing:
            raise AdapterError(f"{folder}: module {module!r:.80} has no {missing[0]}")
    return modules, others


def _check_others(
    folder: str, kind: str, others: Mapping[str, Stored], base: Checkpoint, renamed: Callable[[str], str]
) -> None:
    """Refuse tensors that are not part of the adapter, unless they equal the base's.

    PEFT saves whole embeddings and heads beside an adapter that targets one, or when the vocabulary has grown, and all
    biases with ``bias="all"``.
    """
    strange: list[str] = []
    changed: list[str] = []
    for key, stored in others.items():
        name = key.removeprefix(PREFIX)
        there = base.find((renamed(name.replace(".base_layer.", ".")),))
        # PEFT copies a weight whose vocabulary has grown, too, under the base's own name.
        copied = ".base_layer." in name or (there is not None and there.shape != stored.shape)
        if there is None or not _equal(stored, there):
            (changed if copied else strange).append(key[:200])
    if changed:
        raise AdapterError(
            f"{folder}: its copies of the base's weights differ from the base: {_model.some(changed)}; give the base "
            f"that it was trained on (with a larger vocabulary?) as base="
        )
    if strange:
        raise AdapterError(
            f"{folder}: {len(strange)} tensors are not part of {kind} on linear layers (whole modules, embeddings, "
            f"biases and DoRA have no sparse form): {_model.some(strange)}"
        )


def _equal(one: Stored, two: Stored) -> bool:
    """Whether two tensors hold the same numbers, also in different float dtypes. Compares a part at a time."""
    if one.shape != two.shape:
        return False
    if one.dtype == two.dtype:
        first, second = torch.from_numpy(one.bytes()), torch.from_numpy(two.bytes())
    elif one.dtype in _file.ARITHMETIC and two.dtype in _file.ARITHMETIC:
        first, second = one.tensor(), two.tensor()
    else:
        return False
    parts = zip(first.split(_AT_ONCE), second.split(_AT_ONCE), strict=True)
    return all(torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.double(), b.double()) for a, b in parts)


def _base(folder: str, config: Mapping[str, Any], base: Source | None) -> Checkpoint:
    if base is not None:
        return open_checkpoint(base, "base")
    known = config.get("base_model_name_or_path")
    if isinstance(known, str) and os.path.isdir(known):
        return open_checkpoint(known, "base")
    raise AdapterError(
        f"{folder}: PEFT's files say nothing of the weights' shapes and dtypes, so the base is needed: give base= "
        f"(--base; a path, a state dict or the model); the adapter names {known!r:.200}, which is not a folder here"
    )


class _Weights:
    """The matrices of the base by module, and whether they are stored transposed."""

    def __init__(self, base: Checkpoint, turned: object, renamed: Callable[[str], str]) -> None:
        self._base, self._turned, self._renamed = base, turned, renamed
        groups: dict[str, list[str]] = {}
        for name, first in ties(base).items():
            groups.setdefault(first, []).append(name)
        self._tied = {name: group for group in groups.values() for name in group}
        self._slots = {} if base.model is None else _model.slots(base.model)

    def of(self, where: str, module: str) -> Stored:
        """The weight of a linear layer, which no other module may share."""
        name = self._renamed(f"{module}.weight")
        stored = self._base.find((name,))
        if stored is None:
            tied = (
                " (a checkpoint leaves out a head that is tied to the embedding)" if module.endswith("lm_head") else ""
            )
            raise AdapterError(
                f"{where}: the base has no weight {name!r:.200}{tied}; if it has another name there, give rename="
            )
        if len(stored.shape) != 2 or stored.dtype not in _file.ARITHMETIC:
            raise AdapterError(
                f"{where}: {stored.name!r} must be a float matrix in the base, got shape {list(stored.shape)} of "
                f"{stored.dtype}"
            )
        others = [other for other in self._tied.get(name, ()) if other != name]
        if others:
            raise AdapterError(
                f"{where}: {name!r} is tied to {others[0]!r} in the base: PEFT changes what this module alone "
                f"computes, and an adapter would change the other too; untie them first, each with a weight of its own"
            )
        return stored

    def is_turned(self, where: str, stored: Stored, shape: tuple[int, int]) -> bool:
        """Whether a layer's weight is ``shape`` (outputs x inputs) transposed, as in a ``Conv1D``.

        PEFT stores a single ``fan_in_fan_out`` for the whole folder: the last module's, where they differ.
        """
        if stored.shape not in (shape, shape[::-1]):
            raise AdapterError(f"{where}: B @ A has shape {list(shape)}, and the base's weight {list(stored.shape)}")
        if shape[0] != shape[1]:
            return stored.shape != shape
        slot = self._slots.get(stored.name)
        if slot is not None and isinstance(slot.module, torch.nn.Linear):
            return False
        if slot is not None and any(kind.__name__ == "Conv1D" for kind in type(slot.module).__mro__):
            return True
        bias = self._bias(stored)
        if bias is None:  # a Conv1D always has one
            return False
        flags = {layout for layout in map(self._layout, self._base.tensors.values()) if layout is not None}
        if flags == {bool(self._turned)}:
            return bool(self._turned)
        raise AdapterError(
            f"{where}: whether {stored.name!r} is a Linear's or transformers' Conv1D's cannot be told from its shape "
            f"{list(stored.shape)}; give the model itself as base="
        )

    def _bias(self, stored: Stored) -> Stored | None:
        return (
            self._base.find((stored.name.removesuffix("weight") + "bias",)) if stored.name.endswith("weight") else None
        )

    def _layout(self, stored: Stored) -> bool | None:
        """Whether a weight is transposed, if the length of its bias tells."""
        if len(stored.shape) != 2 or stored.shape[0] == stored.shape[1]:
            return None
        bias = self._bias(stored)
        length = bias.shape[0] if bias is not None and len(bias.shape) == 1 else -1
        return length == stored.shape[1] if length in stored.shape else None


def _entry(stored: Stored, indices: Tensor, values: Tensor, granule: int = 1) -> Entry:
    compute = torch.float64 if stored.dtype == "float64" else torch.float32
    return Entry(
        indices.to(index_dtype(stored.numel // granule)),
        values if dtype_name(values.dtype) == stored.dtype else values.to(compute),
        stored.shape,
        getattr(torch, stored.dtype),
        granule,
        _codec.fingerprint(stored.bytes()) & WORD,
    )


def _shira(where: str, stored: Stored, parts: Mapping[str, Tensor], cast: bool) -> Entry:
    places, values = parts["shira_indices"], parts["shira_weight"]
    if values.dim() != 1 or tuple(places.shape) != (2, len(values)) or dtype_name(values.dtype) not in _file.ARITHMETIC:
        raise AdapterError(
            f"{where}: shira_weight must be 1-D floats and shira_indices 2 x as many, got shapes "
            f"{list(values.shape)} and {list(places.shape)} of {dtype_name(values.dtype)}"
        )
    rows, columns = places.to(torch.int64)  # floats on Windows
    whole = torch.stack([rows, columns]).to(places.dtype) == places
    outside = (rows < 0) | (rows >= stored.shape[0]) | (columns < 0) | (columns >= stored.shape[1]) | ~whole.all(0)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise AdapterError(
            f"{where}: its entry ({places[0, at].item()}, {places[1, at].item()}) is outside the base's "
            f"{list(stored.shape)}"
        )
    indices, order = (rows * stored.shape[1] + columns).sort()
    if bool((indices[1:] == indices[:-1]).any()):
        raise AdapterError(f"{where}: an entry stands there twice")
    values = values[order]
    return _entry(stored, indices, values.to(getattr(torch, stored.dtype)) if cast else values)


def _granules(where: str, stored: Stored, parts: Mapping[str, Tensor], cast: bool) -> Entry:
    indices, values = parts["shira_ops_indices"], parts["shira_ops_values"]
    granule = len(values) // len(indices) if indices.dim() == values.dim() == 1 and len(indices) else 0
    floats = dtype_name(values.dtype) in _file.ARITHMETIC and indices.dtype in (torch.int32, torch.int64)
    if not granule or granule * len(indices) != len(values) or stored.numel % granule or not floats:
        raise AdapterError(
            f"{where}: shira_ops_values must be 1-D floats, a granule for each of the whole numbers in "
            f"shira_ops_indices, got shapes {list(values.shape)} of {dtype_name(values.dtype)} and "
            f"{list(indices.shape)} of {dtype_name(indices.dtype)}, for a weight of {stored.numel} entries"
        )
    indices = indices.contiguous()
    try:
        shira_ops.check_indices(indices, stored.numel // granule)
    except (RuntimeError, ValueError) as error:
        raise AdapterError(f"{where}: {error}") from error
    return _entry(stored, indices, values.to(getattr(torch, stored.dtype)) if cast else values, granule)


def _alpha(where: str, config: Mapping[str, Any], patterns: Mapping[str, Pattern], module: str) -> float:
    """The ``lora_alpha`` of a module: that of the first pattern that matches, or the general one."""
    alpha = config.get("lora_alpha", 8)
    for text, pattern in patterns.items():
        try:
            found = pattern.ends(module)
        except ValueError as error:
            raise AdapterError(f"{where}: alpha_pattern's {text!r:.80} cannot be used: {error}") from error
        if found:
            alpha = config["alpha_pattern"][text]
            break
    return _text.strength(f"{where}: lora_alpha", alpha)


def _patterns(where: str, config: Mapping[str, Any]) -> dict[str, Pattern]:
    patterns = {}
    for text in config.get("alpha_pattern") or {}:
        try:
            patterns[text] = Pattern(text)
        except ValueError as error:
            raise AdapterError(f"{where}: alpha_pattern's {text!r:.80} cannot be used: {error}") from error
    return patterns


def _factors(where: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    a, b = parts["lora_A"], parts["lora_B"]
    floats = all(dtype_name(part.dtype) in _file.ARITHMETIC for part in (a, b))
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0] or not floats:
        raise AdapterError(
            f"{where}: lora_A and lora_B must be float matrices that multiply, got {list(a.shape)} of "
            f"{dtype_name(a.dtype)}, {list(b.shape)} of {dtype_name(b.dtype)}"
        )
    return a, b


def _lora(
    where: str,
    stored: Stored,
    a: Tensor,
    b: Tensor,
    scaling: float,
    turned: bool,
    density: float,
    granule: int,
    cast: bool,
) -> tuple[Entry, Lost]:
    """The largest entries of ``scaling * B @ A``. Takes the memory of one dense weight."""
    if stored.shape[1] % granule:
        raise AdapterError(f"{where}: granule {granule} must divide the last dimension of {list(stored.shape)}")
    # The same arithmetic as PEFT's merge on a CPU, so that the bits are the same.
    dtype = getattr(torch, stored.dtype)
    compute = torch.float64 if stored.dtype == "float64" else torch.float32
    if cast:
        a, b = a.to(dtype), b.to(dtype)
    dense = (b.to(compute) @ a.to(compute)).mul_(scaling)
    dense = dense.to(dtype) if cast else dense
    dense = dense.T.contiguous() if turned else dense
    whole = float(dense.double().square().sum())
    if not math.isfinite(whole):
        raise AdapterError(f"{where}: its B @ A is not finite (NaN, or too large for {dtype_name(dense.dtype)})")
    count = min(max(1, round(density * stored.numel / granule)), stored.numel // granule)
    indices = shira_ops.select_top(dense, None, count, score="magnitude", granule=granule)
    values = shira_ops.gather(dense, indices, granule=granule)
    kept = float(values.double().square().sum())
    lost = max(0.0, 1.0 - kept / whole) if whole else 0.0
    changed = int(dense.count_nonzero())
    return _entry(stored, indices, values, granule), Lost(stored.numel, changed, values.numel(), lost, whole)


def from_peft(
    folder: str | os.PathLike[str],
    base: Source | None = None,
    *,
    density: float | None = None,
    granule: int = 1,
    autocast_adapter_dtype: bool = True,
    rename: Rename = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Made:
    """The parts of an adapter from PEFT's folder; `Adapter.from_peft` describes the arguments."""
    where = _text.path("from_peft: folder", folder)
    if not os.path.isdir(where):
        from shira.adapter import hub

        where = os.path.dirname(hub.fetch(where, [CONFIG, WEIGHTS], revision=revision, token=token)[0])
    config = _config(where)
    kind = config["peft_type"]
    if kind != "LORA" and (density is not None or granule != 1):
        what = "PEFT's SHiRA" if kind == "SHIRA" else kind
        raise AdapterError(f"{where}: {what} is sparse already: density and granule are for LoRA")
    if kind == "LORA":
        if density is None:
            raise AdapterError(f"{where}: a LoRA is dense: give density=, the share of each weight's entries to keep")
        density = _text.share("from_peft: density", density)
        _text.whole("from_peft: granule", granule, 1)
        _check_plain_lora(where, config)
    modules, others = _by_module(where, kind, _tensors(where))
    source = _base(where, config, base)
    renamed = _text.renamer(rename)
    weights = _Weights(source, config.get("fan_in_fan_out"), renamed)
    places: dict[str, Stored] = {}
    for module in modules:
        places[module] = weights.of(f"{where}: module {module!r:.200}", module)
    if len({stored.name for stored in places.values()}) < len(places):
        raise AdapterError(f"{where}: rename= gives two modules one weight")
    _check_others(where, kind, others, source, renamed)
    if not modules:
        raise AdapterError(f"{where}: it holds no weights")
    patterns = _patterns(where, config)
    entries: dict[str, Entry] = {}
    report: dict[str, Lost] = {}
    for module, parts in modules.items():
        here = f"{where}: module {module!r:.200}"
        stored = places[module]
        if kind == "SHIRA":
            entries[stored.name] = _shira(here, stored, parts, not autocast_adapter_dtype)
            continue
        if kind == METHOD:
            entries[stored.name] = _granules(here, stored, parts, not autocast_adapter_dtype)
            continue
        assert density is not None
        a, b = _factors(here, parts)
        # The shapes are compared before the product is made: two long vectors could make a matrix of any size.
        turned = weights.is_turned(here, stored, (b.shape[0], a.shape[1]))
        rank = len(a)
        scaling = _alpha(here, config, patterns, module) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        entries[stored.name], report[stored.name] = _lora(
            here, stored, a, b, scaling, turned, density, granule, not autocast_adapter_dtype
        )
    r = config.get("r")
    mask: dict[str, Any] = {"name": "PEFT", "peft_type": kind, "r": r if type(r) is int and abs(r) < 2**31 else None}
    if kind == "LORA":
        mask |= {"density": density, "granule": granule}
    known = {key: config.get(key) for key in ("base_model_name_or_path", "peft_version", "task_type")}
    provenance = {key: text for key, text in known.items() if text and isinstance(text, str) and _writable(text)}
    return Made(entries, mask, Report(report) if report else None, delta=True, provenance=provenance)


def _writable(text: str) -> bool:
    """Whether UTF-8 can write the text: JSON may hold lone halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_for_peft(adapter: Adapter, model: object) -> None:
    """Refuse what PEFT's SHiRA cannot hold, all of it in one error."""
    problems = []
    slots = _model.slots(model) if isinstance(model, torch.nn.Module) else {}
    for name, entry in adapter.weights.items():
        if entry.whole:
            problems.append(f"{name!r} is a whole parameter")
        elif not name.endswith(".weight") or len(entry.shape) != 2:
            problems.append(f"{name!r} of shape {list(entry.shape)} is not a linear layer's weight")
        elif dtype_name(entry.dtype) not in ("float16", "bfloat16", "float32"):
            problems.append(f"{name!r} is {dtype_name(entry.dtype)}, and its values are float32")
        elif entry.aliases:
            problems.append(f"{name!r} is tied to {entry.aliases[0]!r}, and PEFT would change one of them")
        elif isinstance(model, torch.nn.Module):
            slot = slots.get(name)
            if slot is None:
                problems.append(f"{name!r} is not in the base")
            elif not isinstance(owner := slot.module, torch.nn.Linear):
                problems.append(f"{name!r} is the weight of {type(owner).__name__}, not of Linear")
    if problems:
        raise AdapterError(f"PEFT's SHiRA cannot hold this adapter: {_model.some(problems)}")
    if not adapter.weights:
        raise AdapterError("PEFT's SHiRA cannot hold an adapter without weights")


def _padded(indices: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The entries, padded with zeros at the first free places to ``count`` of them."""
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
    overwrite: bool = False,
) -> None:
    """See `Adapter.to_peft`."""
    target = Path(_text.path("to_peft: folder", folder))
    known = adapter.provenance
    base_model = _text.said("to_peft: base_model", base_model, known.get("base_model_name_or_path"))
    task_type = _text.said("to_peft: task_type", task_type, known.get("task_type"))
    there = [name for name in (CONFIG, WEIGHTS, PICKLED) if (target / name).exists()]
    if there and not overwrite:
        raise FileExistsError(f"{target} holds an adapter already ({there[0]}); give another folder, or overwrite=True")
    source = None if base is None else open_checkpoint(base, "base")
    _check_for_peft(adapter, None if source is None else source.model)
    if not adapter.delta:
        if source is None:
            raise AdapterError("PEFT's SHiRA adds to the base, and this adapter replaces entries: give base= (--base)")
        adapter = adapter.to_delta(source)
    # PEFT makes r * (rows + columns) entries for every layer, with a single r.
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
        # PEFT does not store a strength, so the values are multiplied by it.
        values = entry.values.detach().cpu().to(torch.float32) * adapter.alpha
        if not bool(values.isfinite().all()):
            raise AdapterError(
                f"weight {name!r}: its values are NaN or infinite, or become so in float32 at strength "
                f"{adapter.alpha:g}, which is in the values of PEFT's files"
            )
        flat, values = _padded(flat, values, rank * sum(entry.shape))
        module = PREFIX + name.removesuffix(".weight")
        tensors[f"{module}.shira_weight"] = values
        tensors[f"{module}.shira_indices"] = torch.stack([flat // entry.shape[1], flat % entry.shape[1]]).to(
            torch.int32
        )
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        # PEFT draws a mask of this kind first; the indices that it then reads replace it.
        "mask_type": "random",
        "modules_to_save": None,
        "peft_type": "SHIRA",
        "r": rank,
        "random_seed": 0,
        "revision": None,
        # One expression, since a list would also match modules whose names merely end like this.
        "target_modules": "|".join(re.escape(name.removesuffix(".weight")) for name in adapter.weights),
        "task_type": task_type,
    }
    parts = {
        name: _file.tensor_part(tensor) for name, tensor in sorted(tensors.items(), key=lambda one: -one[1].itemsize)
    }
    _write(target, parts, json.dumps(config, indent=2) + "\n")


def _write(target: Path, parts: Mapping[str, _file.Part], config: str) -> None:
    """Write the weights first and the configuration last: PEFT finds no adapter without one, so it never reads a
    mixture.

    Both are on disk before anything of an earlier adapter is removed. All other files of the folder stay.
    """
    fresh = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with _file.replacing(target / CONFIG) as configuration:
            configuration.write_text(config, encoding="utf-8")
            with _file.replacing(target / WEIGHTS) as weights:
                _file.write_safetensors(weights, parts, {"format": "pt"})
                with open(weights, "rb+") as file:
                    os.fsync(file.fileno())
                (target / CONFIG).unlink(missing_ok=True)
    except BaseException:
        if fresh:
            with suppress(OSError):  # keep what others have put there meanwhile
                target.rmdir()
        raise
