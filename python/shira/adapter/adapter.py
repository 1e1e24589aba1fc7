"""`Adapter`: the changed entries of a model's weights, and how they are saved, loaded, converted and fused."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import shira_ops
from shira import _fit, _granules, _text
from shira._granules import dtype_name, index_dtype, refine, signed
from shira._text import AdapterError, named
from shira.adapter import _difference, _file
from shira.adapter._checkpoint import Checkpoint, Source, open_checkpoint, ties
from shira.adapter._entry import Entry

if TYPE_CHECKING:
    from shira.adapter._checkpoint import Progress
    from shira.adapter._entry import Report

__all__ = ["Adapter", "AdapterError", "Entry"]


class Adapter:
    """The changed entries of a model's weights: sparse, exact, independent of the model they came from.

    Made by `SparseTuner.adapter`, read by `Adapter.load`, or built from `Entry` objects. An adapter never changes after
    it is made; do not change its tensors either.

    Args:
        weights: parameter name, as in ``model.named_parameters()``, to `Entry`.
        alpha: the strength to use unless ``activate(alpha=)`` gives another.
        delta: whether values are added to the base; otherwise they replace it, which is exact.
        mask: a description of the mask, in JSON's types (`Mask.describe`), or None.
        provenance: anything worth keeping, in JSON's types: data, hyper-parameters, versions. Both are kept as they
            come back from a file: tuples as lists, keys as strings; NaN and infinity are refused.
        report: what was left out, if it was made from something larger. It is not saved.
    """

    def __init__(
        self,
        weights: Mapping[str, Entry],
        *,
        alpha: float = 1.0,
        delta: bool = False,
        mask: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        report: Report | None = None,
    ) -> None:
        for name, entry in weights.items():
            entry.check(f"weight {named(name)}")
        _file.check_names("", {name: entry.aliases for name, entry in weights.items()})
        self.weights: Mapping[str, Entry] = MappingProxyType(dict(weights))
        self.alpha = _text.strength("alpha", alpha)
        self.delta = bool(delta)
        self.mask = None if mask is None else _file.json_object("mask", mask)
        self.provenance = _file.json_object("provenance", provenance)
        self.report = report

    @property
    def nnz(self) -> int:
        """Entries that change, over all weights."""
        return sum(entry.nnz for entry in self.weights.values())

    @property
    def density(self) -> float:
        """The share of entries that it changes, among those of the weights it touches."""
        numel = sum(entry.numel for entry in self.weights.values())
        return self.nnz / numel if numel else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its indices and values take."""
        return sum(entry.indices.nbytes + entry.values.nbytes for entry in self.weights.values())

    def __len__(self) -> int:
        return len(self.weights)

    def check_finite(self) -> None:
        """Raise `AdapterError` if any values are NaN or infinite; it names the weight and says how many there are."""
        for name, entry in self.weights.items():
            entry.check_finite(f"weight {named(name)}")

    # A read-only mapping cannot be pickled.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weights": dict(self.weights)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, weights=MappingProxyType(state["weights"]))

    def __repr__(self) -> str:
        kind = "delta, " if self.delta else ""
        plural = "" if len(self) == 1 else "s"
        return (
            f"Adapter({len(self)} weight{plural}, {self.nnz:,} entries ({self.density:.2%}), {kind}"
            f"alpha {self.alpha:g}, {self.nbytes:,} bytes)"
        )

    def save(self, path: str | os.PathLike[str], *, seeds: bool = False, version: int | None = None) -> None:
        """Write the adapter as one safetensors file (docs/format.md describes its layout).

        The file is written under another name and then renamed, so that a reader never sees a half-written one.

        Args:
            path: where to write; an existing file is replaced.
            seeds: leave out indices that follow from a seed (those of `masks.Rand`). The file is smaller, and reading
                it draws the mask again.
            version: of the file. 1 can be read by every version of this library; 2 has a shorter code of indices, most
                of all below 1 %. None: 2 where that makes the file at least a twentieth smaller.
        """
        self._save(path, seeds, version, {})

    def _save(
        self,
        path: str | os.PathLike[str],
        seeds: bool,
        version: int | None,
        values: Mapping[str, tuple[_file.Part, int]],
    ) -> None:
        path = Path(path)
        if version not in (None, *_file.VERSIONS):
            raise ValueError(f"Adapter.save: version must be 1, 2 or None, got {_text.shown(version)}")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"the folder {str(path.parent)!r} to write {path.name!r} into does not exist")
        with _file.replacing(path) as temporary:
            self.write(temporary, seeds=seeds, version=version, values=values)

    def write(
        self,
        path: Path,
        *,
        seeds: bool = False,
        version: int | None = None,
        values: Mapping[str, tuple[_file.Part, int]] = MappingProxyType({}),
    ) -> None:
        """Write the bytes of `save` to this path itself, which may hold half of them if that is interrupted.

        ``values``: see `write_entries`.
        """
        about = {
            "alpha": self.alpha,
            "delta": self.delta,
            "mask": self.mask,
            "density": self.density,
            "provenance": self.provenance,
        }
        write_entries(path, self.weights, about, seeds=seeds, version=version, values=values)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, checksums: bool = True) -> Adapter:
        """Read a file: map it, check all of it, execute nothing.

        The values stay in the mapped file. Writing to them does not change the file, and the file may be replaced at
        any time (as `save` does). It must not be shortened in place: the system kills a process that reads past its
        end.

        Args:
            path: the file; it is opened once.
            checksums: compare the values and indices with the checksums in the file, so that a damaged file is refused.
                With False the values are not read before they are used.

        Raises `AdapterError` with the file, the weight and what is wrong.
        """
        header, entries = read_entries(path, checksums=checksums)
        coded = next((name for name, weight in header.weights.items() if weight.difference), None)
        if coded is not None:
            raise AdapterError(
                f"{os.fspath(path)}: weight {named(coded)}: its values are differences from the entries that they "
                f"replace: this is an update, which shira.sync.Update.load and Receiver.stage read"
            )
        return cls(entries, alpha=header.alpha, delta=header.delta, mask=header.mask, provenance=header.provenance)

    @classmethod
    def from_difference(
        cls,
        base: Source,
        tuned: Source,
        *,
        density: float | None = None,
        granule: int = 1,
        alpha: float = 1.0,
        provenance: Mapping[str, Any] | None = None,
        rename: _text.Rename = None,
        added: bool = False,
        progress: Progress | None = None,
    ) -> Adapter:
        """What fine-tuning changed, as an adapter of new entries.

        Without ``density`` it is exact: put on the base, it gives the tuned weights bit for bit, NaNs and the sign of
        zero included. A weight that changed nearly everywhere is kept whole, where that is smaller. Files are mapped
        and compared in chunks, so neither model is ever in memory. Values of whole weights stay in the tuned file,
        which must not be written to while the adapter is in use.

        Args:
            base, tuned: each a path (a ``.safetensors`` file, a folder with one or with shards and their index, or a
                folder of ``torch.distributed.checkpoint``, of which one weight at a time is read), a state dict, or a
                module, with the same shapes and dtypes. Tied tensors of ``base`` become aliases. Names
                may differ where it is certain what belongs together: prefixes of wrappers (``_orig_mod.``,
                ``module.``), a prefix that only one of them has (``transformer.``, ``0.auto_model.``), and a tied
                weight that only one of them holds twice. The values of a `SparseTuner` are left out. The report's
                ``notes`` say what was done. Buffers (running statistics) count as weights; tensors of dtypes that an
                adapter cannot hold must be unchanged.
            density: keep at most ``max(1, round(density * numel / granule))`` granules of each weight, those with the
                largest sum of ``|tuned - base|`` (NaN counts as the largest; of equal ones, the lower index).
            granule: how many consecutive entries an index stands for; must divide the last dimension of every weight
                that changed.
            alpha, provenance: as in `Adapter`.
            rename: how the tuned names become the base's, instead of the guess about prefixes: patterns (`re.sub`) and
                their replacements, or a function.
            added: take tensors that only ``tuned`` has, such as a new classifier head, as whole parameters; else they
                are refused.
            progress: called with a weight's name, the bytes of the base done so far, and the bytes in all.

        The adapter's ``report`` says, for each weight and in total, how many entries changed, how many were kept, and
        what share of the squared difference was lost. Raises `AdapterError`, which lists the names, shapes and dtypes
        that differ.
        """
        from shira.adapter.difference import difference

        made = difference(base, tuned, density=density, granule=granule, rename=rename, added=added, progress=progress)
        return cls(made.weights, alpha=alpha, mask=made.mask, provenance=provenance, report=made.report)

    @classmethod
    def from_peft(
        cls,
        folder: str | os.PathLike[str],
        base: Source | None = None,
        *,
        density: float | None = None,
        granule: int = 1,
        autocast_adapter_dtype: bool = True,
        rename: _text.Rename = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Adapter:
        """A delta adapter from PEFT's SHiRA, or from PEFT's LoRA as the largest entries of ``scaling * B @ A``.

        An adapter of `shira.integrations.peft.SparseConfig` is read like a SHiRA. At alpha 1 both give the same weights
        as PEFT's merge on a CPU, bit for bit, and so does a LoRA with ``density=1``. With a lower density a LoRA is
        cut: the adapter's ``report`` says what share of the squared ``B @ A`` was lost, for each weight and in total.
        Nothing in the folder is executed, not even its regular expressions.

        Args:
            folder: PEFT's folder, or a repository's name on the Hub.
            base: the base checkpoint, as in `from_difference`. PEFT's files do not say the weights' shapes and dtypes,
                and the adapter keeps the base's fingerprints. None: the folder that the adapter names as its base.
            density: for LoRA, the share of each weight's entries to keep, by ``|B @ A|``.
            granule: for LoRA, how many consecutive entries an index stands for.
            autocast_adapter_dtype: as PEFT has it. True: an adapter of a bfloat16 or float16 base is added in float32,
                as by ``PeftModel.from_pretrained``. False: it is rounded to the base's dtype first, as PEFT does with
                ``autocast_adapter_dtype=False`` or ``low_cpu_mem_usage=True``, and transformers' ``load_adapter``.
            rename: how the folder's names become the base's, where they differ: regular expressions and their
                replacements, as ``{r"^transformer\\.": ""}``, or a function.
            revision, token: for the Hub.

        Raises `AdapterError` for what has no sparse form (DoRA, embeddings, biases and whole modules that changed,
        pickles), for LoRAs that change the base before they train (PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA), for a
        weight that is tied to another, and for a square matrix that may belong to a ``Conv1D`` or to a ``Linear``: give
        the model itself as ``base`` then.
        """
        from shira.adapter._peft import from_peft

        made = from_peft(
            folder,
            base,
            density=density,
            granule=granule,
            autocast_adapter_dtype=autocast_adapter_dtype,
            rename=rename,
            revision=revision,
            token=token,
        )
        return cls(**made._asdict())

    def to_peft(
        self,
        folder: str | os.PathLike[str],
        base: Source | None = None,
        *,
        base_model: str | None = None,
        task_type: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write a folder that ``peft.PeftModel.from_pretrained`` opens and that gives the same outputs.

        PEFT adds float32 values and does not store a strength: the values are multiplied by the adapter's alpha,
        granules become single entries, and each weight is padded with zeros to the ``r * (rows + columns)`` entries
        that PEFT expects, with one ``r`` for all weights.

        How exact it is: a delta adapter gives the same bits in PEFT as here. An adapter that replaces entries becomes
        ``new - base`` in float32, and PEFT's ``base + (new - base)`` is ``new`` up to 2^-23 of the larger of the two:
        in bfloat16 and float16 these are the same bits, unless an entry became more than 2^12 times smaller. With
        ``low_cpu_mem_usage=True``, ``autocast_adapter_dtype=False`` or transformers' ``load_adapter``, PEFT first
        rounds what it adds to the base's dtype, and the result may differ by one rounding (in bfloat16: 2^-7 of the
        larger).

        Args:
            folder: where to write; created if it does not exist. Its other files stay.
            base: the base checkpoint, as in `from_difference`; needed unless the adapter is a delta.
            base_model, task_type: for PEFT's configuration.
            overwrite: replace a PEFT adapter that is in the folder. Whoever reads it meanwhile, or after a crash, finds
                the old one, the new one or none, but never a mixture.

        Raises `AdapterError` for what PEFT cannot hold (whole parameters, weights of layers that are not linear, tied
        weights), and `FileExistsError` if the folder already holds an adapter.
        """
        from shira.adapter._peft import to_peft

        to_peft(self, folder, base, base_model=base_model, task_type=task_type, overwrite=overwrite)

    @classmethod
    def from_pretrained(
        cls,
        where: str | os.PathLike[str],
        *,
        filename: str = "shira_adapter.safetensors",
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Adapter:
        """Read an adapter from a folder, or from a repository on the Hugging Face Hub (needs ``shira-ops[hub]``).

        Args:
            where: a folder, the path of a file, or a repository's name such as ``"user/style"``.
            filename: the name of the adapter's file in it.
            revision: a branch, tag or commit of the repository.
            token: an access token for it.
        """
        from shira.adapter import hub

        return cls.load(hub.locate(os.fspath(where), filename=filename, revision=revision, token=token))

    def push_to_hub(
        self,
        repo: str,
        *,
        base_model: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        message: str | None = None,
        seeds: bool = False,
    ) -> str:
        """Upload the adapter with a model card to the Hugging Face Hub (needs ``shira-ops[hub]``), in one commit.

        Args:
            repo: the repository's name, ``"user/style"``; created if it does not exist.
            base_model: the base's name on the Hub, for the card; None: the one in the provenance.
            private, token, revision, message: as in ``huggingface_hub``.
            seeds: as in `save`.

        Returns the URL of the commit.
        """
        from shira.adapter import hub

        return hub.push(
            self,
            repo,
            base_model=base_model or self.provenance.get("base_model_name_or_path"),
            private=private,
            token=token,
            revision=revision,
            message=message,
            seeds=seeds,
        )

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, base_model: str | None = None, seeds: bool = False
    ) -> None:
        """Write the file and its model card into a folder, as `push_to_hub` uploads them."""
        from shira.adapter import hub

        base_model = base_model or self.provenance.get("base_model_name_or_path")
        hub.save(self, Path(folder), Path(folder).resolve().name, base_model, seeds)

    def to_delta(self, base: Source | Checkpoint) -> Adapter:
        """The same change as values to add: ``new - base``, in fp32 (fp64 for fp64 weights).

        Deltas can be summed, and still make sense on a base that was trained further, whereas new values are exact. At
        alpha 1 a delta gives the new entries up to the rounding of ``base + (new - base)``; a revert is exact in any
        case. A delta adapter is returned as it is.

        Args:
            base: the checkpoint it was made for, as in `from_difference`. Weights with a fingerprint are read whole,
                others only at the adapter's entries. Another base is refused with `AdapterError`.
        """
        if self.delta:
            return self
        entries = {}
        for name, entry, weight in _on_base(self, base):
            if dtype_name(entry.dtype) not in _file.ARITHMETIC:
                raise AdapterError(f"weight {named(name)}: {dtype_name(entry.dtype)} entries have no deltas in float32")
            compute = torch.float64 if entry.dtype == torch.float64 else torch.float32
            old = shira_ops.gather(weight, entry.indices.cpu(), granule=entry.granule).to(compute)
            entries[name] = replace(entry, values=entry.values.detach().cpu().to(compute) - old, checked=True)
        return Adapter(entries, alpha=self.alpha, delta=True, mask=self.mask, provenance=self.provenance)

    def to(self, dtype: torch.dtype | None, base: Source | None = None) -> Adapter:
        """The same adapter for the model in another dtype: one trained in float32, say, to be used in bfloat16.

        New entries are rounded as ``model.to(dtype)`` rounds weights: at alpha 1 the cast model with the adapter has
        the same bits as the tuned model after the cast. Values to be added (a delta) stay in float32, or float64 for
        float64 weights, and are rounded once, when they are applied. Integers stay as they are.

        A cast weight has other bits, so the adapter loses its fingerprint, and with it the check against a wrong base,
        unless ``base`` is given: then it gets the fingerprints of that one. Whether ``base`` is the right model can
        only be checked by names, shapes and dtypes. The provenance lists the casts under ``"casts"``.

        Args:
            dtype: the floating-point dtype of the model's weights; None: for each weight the one it has in ``base``.
            base: the model to use it on, as in `from_difference`; the result fits only this one.

        Raises `AdapterError` for a dtype or a base that does not fit, for 8-bit floats (their meaning depends on scales
        that are stored elsewhere), and for values that are too large for the dtype.
        """
        if dtype is None and base is None:
            raise AdapterError("to: give a dtype, or a base whose dtypes to take")
        if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype_name(dtype) not in _file.ARITHMETIC):
            raise AdapterError(f"to: dtype must be one of {', '.join(_file.ARITHMETIC)}, got {_text.shown(dtype)}")
        source = None if base is None else open_checkpoint(base, "base")
        entries, wanted = {}, {}
        for name, entry in self.weights.items():
            stored = None if source is None else source.find((name, *entry.aliases))
            own = getattr(torch, stored.dtype) if stored and stored.dtype in _file.ARITHMETIC else entry.dtype
            cast = _cast(f"to: weight {named(name)}", entry, dtype or own, self.delta)
            # A parameter that is replaced as a whole, such as a new head, may have any content in the base.
            new = entry.whole and not self.delta
            if stored is not None or not new:
                wanted[name] = replace(cast, fingerprint=None) if new else cast
            entries[name] = cast if stored is None else replace(cast, fingerprint=stored.fingerprint())
        if source is not None:
            _fit.fit("to: the adapter", wanted, source, where="this base")
        was = {dtype_name(old.dtype) for name, old in self.weights.items() if entries[name].dtype != old.dtype}
        now = {dtype_name(new.dtype) for name, new in entries.items() if self.weights[name].dtype != new.dtype}
        provenance = self.provenance
        if was:
            casts = provenance.get("casts")
            told = {"from": sorted(was), "to": sorted(now), "fingerprints": "dropped" if source is None else "new"}
            provenance = {**provenance, "casts": [*(casts if isinstance(casts, list) else []), told]}
        return Adapter(entries, alpha=self.alpha, delta=self.delta, mask=self.mask, provenance=provenance)

    @classmethod
    def fuse(
        cls,
        adapters: Iterable[tuple[Adapter, float]],
        base: Source,
        *,
        alpha: float = 1.0,
        provenance: Mapping[str, Any] | None = None,
        check_finite: bool = True,
    ) -> Adapter:
        """Fuse several adapters, each with its strength, into one adapter of new entries for their base.

        ``new = base + sum_k alpha_k * d_k`` at the union of their entries: the same bits as `Switcher.activate` with
        the same adapters, order and strengths (`shira_ops.fuse_`). Where the granules of a weight differ, the result
        has their greatest common divisor. Only these entries of the base are held in memory.

        Args:
            adapters: pairs of an adapter and its strength, summed in this order.
            base: the checkpoint they were made for, as in `from_difference`. Another base is refused with
                `AdapterError`; but a weight that one adapter alone replaces as a whole, at strength 1, may hold
                anything there, such as a head with fresh random entries.
            alpha, provenance: as in `Adapter`.
            check_finite: refuse NaN and infinity in the adapters and in the result.
        """
        given = [
            (adapter, _text.strength(f"fuse: the strength of adapter {number}", strength))
            for number, (adapter, strength) in enumerate(adapters, 1)
        ]
        source = open_checkpoint(base, "base")
        found: dict[str, list[tuple[Adapter, float, Entry]]] = {}
        weights: dict[str, Tensor] = {}
        first = ties(source)
        for number, (adapter, strength) in enumerate(given, 1):
            # A weight that is replaced as a whole comes out the same on any base; at strength 0 it stays the base's.
            anything = _fit.indifferent(adapter.weights, adapter.delta, strength or 1.0)
            for name, entry, weight in _on_base(adapter, source, anything):
                if check_finite:
                    entry.check_finite(f"fuse: weight {named(name)} of adapter {number}")
                stored = source.find((name, *entry.aliases))
                assert stored is not None
                # Adapters may know a tied weight by different names.
                kept = first[stored.name]
                others = tuple(other for other in (name, *entry.aliases) if other != kept)
                found.setdefault(kept, []).append((adapter, strength, replace(entry, aliases=others)))
                weights[kept] = weight
        for name, parts in found.items():
            both = next((other for _, _, entry in parts for other in entry.aliases if other in found), None)
            if both is not None:
                raise AdapterError(
                    f"fuse: {named(both)} and {named(name)} are one (tied) weight in one adapter and two in another, "
                    f"and the base holds two copies of it; give a base that ties them, such as the model itself"
                )
        entries = {
            name: _fused(weights[name], parts, _fingerprint_of_base(name, weights[name], parts))
            for name, parts in found.items()
        }
        if check_finite:
            for name, entry in entries.items():
                entry.check_finite(f"fuse: weight {named(name)}, fused")
        return cls(entries, alpha=alpha, provenance=provenance)


class _Code(NamedTuple):
    """The code of a weight's indices, in memory or made again when it is written."""

    nbytes: int
    print: int
    pieces: Callable[[], list[Any]]

    @staticmethod
    def of(indices: Tensor, version: int, keep: bool) -> _Code:
        def made() -> Tensor:
            return shira_ops.encode_indices(indices.cpu(), version=version)

        code = made()
        pieces = [code.numpy()]
        return _Code(
            code.numel(), _granules.fingerprint(code), (lambda: pieces) if keep else (lambda: [made().numpy()])
        )


def write_entries(
    path: Path,
    weights: Mapping[str, Entry],
    about: Mapping[str, Any],
    *,
    seeds: bool = False,
    version: int | None = None,
    differences: Mapping[str, tuple[Tensor, int | None]] = MappingProxyType({}),
    after: Mapping[str, int] | None = None,
    values: Mapping[str, tuple[_file.Part, int]] = MappingProxyType({}),
) -> None:
    """Write an adapter's file.

    Args:
        about: the JSON object of `shira.adapter`.
        version: the newest that may be written; None: 2 where that makes the file at least a twentieth smaller.
        differences: of weights whose values are written so, the differences and the fingerprint of the values.
        after: of an update, the fingerprints of the weights afterwards. The file has version 2 then, and is packed.
        values: of weights whose values are not in memory (those of their entries are on the meta device), what gives
            them when they are written, in the order of the file, and their fingerprint. Then indices are coded a
            second time instead of being kept until then.
    """
    codes, newer = _codes(weights, seeds=seeds, version=version, keep=not values)
    parts: list[tuple[str, _file.Part]] = []
    packed: dict[str, list[_file.Part]] = {}
    headers: dict[str, Any] = {}
    prints: list[tuple[int, int]] = []
    for name, entry in weights.items():
        code = codes.get(name)
        printed = None
        if name in values:
            part, word = values[name]
        else:
            tensor = entry.values
            if name in differences:
                numbers, printed = differences[name]
                tensor = _difference.encode(numbers)
            part = _file.tensor_part(tensor)
            word = _granules.fingerprint(tensor.detach().cpu().contiguous())
        coded = [] if code is None else [_file.Part("U8", (code.nbytes,), code.nbytes, code.pieces)]
        if name in differences:
            packed[name] = [*coded, part]
        else:
            packed[name] = coded
            parts.append((f"{name}.values", part))
        if after is None:
            parts += ((f"{name}.indices", one) for one in coded)
        headers[name] = {
            "shape": list(entry.shape),
            "dtype": dtype_name(entry.dtype),
            "granule": entry.granule,
            "count": entry.indices.numel(),
            "indices": "code" if code is not None else "whole" if entry.whole else "seed",
            "seed": _text.hex_word(entry.seed),
            "fingerprint": _text.hex_word(entry.fingerprint),
            **({"aliases": list(entry.aliases)} if entry.aliases else {}),
            **({"values": "difference"} if name in differences else {}),
            **({} if printed is None else {"print": _text.hex_word(printed)}),
            **({} if after is None else {"after": _text.hex_word(after[name])}),
        }
        prints.append((word, 0 if code is None else code.print))
    metadata = {
        "format": "pt",
        _file.VERSION_KEY: "2" if newer or after is not None else "1",
        _file.ADAPTER_KEY: _file.jsoned(about),
    }
    if after is not None:
        parts += _file.Packed.parts(metadata, headers, packed, prints).items()
    else:
        metadata[_file.WEIGHTS_KEY] = _file.jsoned(headers)
        metadata[_file.CHECKSUMS_KEY] = _file.hexed(_file.checksums(metadata, b"", prints))
    # Tensors of wide entries come first, so that each is aligned to its entries; otherwise the adapter's order.
    parts.sort(key=lambda one: -_file.ITEM_BYTES[one[1].dtype])
    _file.write_safetensors(path, dict(parts), metadata, _file.MAX_ADAPTER_HEADER)


def _codes(
    weights: Mapping[str, Entry], *, seeds: bool, version: int | None, keep: bool
) -> tuple[dict[str, _Code], bool]:
    """The code of each weight's indices that a file is to hold, and whether any of them takes version 2."""
    codes: dict[str, _Code] = {}
    newer: dict[str, _Code] = {}
    for name, entry in weights.items():
        where = f"weight {named(name)}"
        entry.check_indices(where)
        if entry.whole:
            continue
        if seeds and entry.seed is not None:
            drawn = _drawn(entry.numel, entry.indices.numel(), entry.seed, entry.granule)
            if not torch.equal(drawn, entry.indices.cpu().to(drawn.dtype)):
                raise AdapterError(f"{where}: its indices are not those its seed draws; save it without seeds=True")
            continue
        codes[name] = _Code.of(entry.indices, 1, keep=keep)
        if version != 1:
            newer[name] = _Code.of(entry.indices, 2, keep=keep)
    spared = sum(codes[name].nbytes - newer[name].nbytes for name in newer)
    size = sum(code.nbytes for code in codes.values()) + sum(entry.values.nbytes for entry in weights.values())
    if version == 2 or 20 * spared >= size:
        return codes | newer, spared > 0
    return codes, False


def read_entries(path: str | os.PathLike[str], *, checksums: bool = True) -> tuple[_file.Header, dict[str, Entry]]:
    """What `Adapter.load` reads. Values that are differences are whole numbers of the weight's size."""
    with _file.opened_adapter(path) as (header, file):
        mapped = file.map()

    def read(name: str, dtype: torch.dtype) -> Tensor:
        place = file.places[name]
        raw = torch.from_numpy(mapped[place.begin : place.end])
        # Other programs may write tensors that are not aligned, which the ops need.
        return (raw.clone() if place.begin % dtype.itemsize else raw).view(dtype)

    entries: dict[str, Entry] = {}
    for name, weight in header.weights.items():
        if weight.indices == "code":
            try:
                indices = shira_ops.decode_indices(
                    read(f"{name}.indices", torch.uint8),
                    weight.count,
                    weight.numel,
                    index_dtype(weight.numel // weight.granule),
                    granule=weight.granule,
                )
            except RuntimeError as error:
                raise AdapterError(_file.bad_code(path, name, error)) from error
        elif weight.indices == "seed":
            assert weight.seed is not None
            indices = _drawn(weight.numel, weight.count, weight.seed, weight.granule)
        else:
            indices = torch.zeros(1, dtype=torch.int32, device="cpu")
        kind = getattr(torch, weight.values_dtype)
        if weight.difference:
            place = file.places[f"{name}.values"]
            try:
                values = _difference.decode(mapped[place.begin : place.end], weight.nnz, kind)
            except ValueError as error:
                raise AdapterError(_file.bad_values(path, name, error)) from error
        else:
            values = read(f"{name}.values", kind)
        entries[name] = Entry(
            indices,
            values,
            weight.shape,
            getattr(torch, weight.dtype),
            weight.granule,
            weight.fingerprint,
            weight.seed,
            weight.aliases,
            checked=True,
        )
    if checksums:
        _file.check_checksums(file, header, mapped)
    return header, entries


def _on_base(
    adapter: Adapter, base: Source | Checkpoint, anything: Container[str] = ()
) -> Iterator[tuple[str, Entry, Tensor]]:
    """Each entry with the base's weight, flat and on the CPU. Refuses a base that the adapter was not made for, except
    for the content of weights in ``anything``."""
    source = base if isinstance(base, Checkpoint) else open_checkpoint(base, "base")
    found = _fit.fit("the adapter", adapter.weights, source, where="this base", anything=anything)
    for name, places in found.items():
        entry = adapter.weights[name]
        entry.check_indices(f"weight {named(name)}")
        yield name, entry, places[0].tensor()


def _cast(where: str, entry: Entry, dtype: torch.dtype, delta: bool) -> Entry:
    """An entry for its weight in another dtype, without the fingerprint, which was that of the weight before."""
    if dtype == entry.dtype or not entry.dtype.is_floating_point:
        return entry
    if dtype_name(entry.dtype) not in _file.ARITHMETIC:
        raise AdapterError(f"{where}: {dtype_name(entry.dtype)} entries depend on scales, so they cannot be cast")
    values = entry.values.detach()
    if not delta:
        cast = values.to(dtype)
    elif values.dtype in (dtype, torch.float32):
        cast = values
    else:
        cast = values.to(torch.float32)
    beyond = int((cast.isinf() & ~values.isinf()).sum())
    if beyond:
        raise AdapterError(f"{where}: {beyond:,} of its values are beyond {dtype_name(cast.dtype)}")
    return replace(entry, values=cast, dtype=dtype, fingerprint=None)


def _fingerprint_of_base(name: str, weight: Tensor, parts: list[tuple[Adapter, float, Entry]]) -> int:
    """The fingerprint of the base's weight. Where it is not that of a part, which replaces the weight as a whole, this
    part cannot be summed with others."""
    known = {entry.fingerprint for _, _, entry in parts if entry.fingerprint is not None}
    if known and not any(entry.whole and not adapter.delta for adapter, _, entry in parts):
        return known.pop()  # compared with the base already
    actual = _granules.fingerprint(weight)
    if known - {actual} and sum(strength != 0 for _, strength, _ in parts) > 1:
        raise AdapterError(
            f"fuse: an adapter replaces {named(name)} as a whole, and was made where the content there was another (by "
            f"fingerprint), so it cannot be summed with another adapter that changes it too"
        )
    return actual


def _fused(weight: Tensor, parts: list[tuple[Adapter, float, Entry]], fingerprint: int) -> Entry:
    """Several adapters' entries of one weight as one entry, by the op that also fuses on live models."""
    first = parts[0][2]
    if dtype_name(first.dtype) not in _file.ARITHMETIC:
        raise AdapterError(f"only {', '.join(_file.ARITHMETIC)} entries can be fused, got {dtype_name(first.dtype)}")
    granule = math.gcd(*(entry.granule for _, _, entry in parts))
    lists = [refine(entry.indices.cpu(), entry.granule, granule, weight.numel()) for _, _, entry in parts]
    indices, offsets, sources, members = shira_ops.fuse_plan(lists, granule=granule)
    # The base's entries of the union, side by side, are a small weight of their own: the op needs nothing else.
    entries = shira_ops.gather(weight, indices, granule=granule)
    values = [entry.values.detach().cpu() for _, _, entry in parts]
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if len({value.dtype for value in values}) > 1:
        values = [value.to(compute) for value in values]  # exact: the wider dtype holds every value of the narrower
    shira_ops.fuse_(
        entries,
        torch.empty_like(entries),
        torch.arange(indices.numel(), dtype=indices.dtype, device="cpu"),
        offsets,
        sources,
        members,
        values,
        torch.tensor([strength for _, strength, _ in parts], dtype=compute, device="cpu"),
        delta=[adapter.delta for adapter, _, _ in parts],
        granule=granule,
    )
    aliases = dict.fromkeys(name for _, _, entry in parts for name in entry.aliases)
    whole = indices.numel() * granule == weight.numel()
    return Entry(
        torch.zeros(1, dtype=torch.int32, device="cpu") if whole else indices,
        entries,
        first.shape,
        first.dtype,
        weight.numel() if whole else granule,
        fingerprint,
        None,
        tuple(aliases),
        checked=True,
    )


def _drawn(numel: int, count: int, seed: int, granule: int) -> Tensor:
    """The indices that a seed draws."""
    return shira_ops.select_random(numel, count, signed(seed), device=torch.device("cpu"), granule=granule)
