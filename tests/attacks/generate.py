"""Files that are wrong on purpose, each in its own way, made from one that is right.

    python tests/attacks/generate.py FOLDER

writes them and says what is wrong with each. The right one comes from plain Python and numpy, byte by byte, as
docs/format.md has it, and is not an output of the library that is tested.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COUNT, ROWS, COLUMNS = 300, 128, 64


def code_of(indices: list[int]) -> bytes:
    """The index code of one block, mode 0."""
    payload = bytearray()
    for before, here in itertools.pairwise(indices):
        gap = here - before - 1
        payload += b"\xff" * (gap // 255) + bytes([gap % 255])
    return struct.pack("<QQ", indices[0], 0) + bytes(payload)


@dataclass
class File:
    """A file in its parts; `header` has tensor entries, the metadata's JSON is apart."""

    header: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)

    def text(self) -> bytes:
        metadata = {
            **self.metadata,
            "shira.adapter": json.dumps(self.about),
            "shira.weights": json.dumps(self.weights),
        }
        return json.dumps({"__metadata__": metadata, **self.header}).encode()

    def bytes(self) -> bytes:
        return framed(self.text(), bytes(self.body))


def framed(text: bytes, body: bytes) -> bytes:
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def good() -> File:
    """Two weights: one of 300 entries of 128 x 64, bfloat16, and a whole bias of float32."""
    indices = [7 + 27 * i for i in range(COUNT)]
    code = code_of(indices)
    values = struct.pack(f"<{COUNT}H", *(0x3F80 + i for i in range(COUNT)))
    bias = struct.pack("<4f", 1.0, -2.0, 0.5, 0.0)
    file = File(metadata={"format": "pt", "shira.version": "1"})
    for name, dtype, data in (
        ("head.bias.values", "F32", bias),
        ("a.weight.values", "BF16", values),
        ("a.weight.indices", "U8", code),
    ):
        size = {"F32": 4, "BF16": 2, "U8": 1}[dtype]
        place = [len(file.body), len(file.body) + len(data)]
        file.header[name] = {"dtype": dtype, "shape": [len(data) // size], "data_offsets": place}
        file.body += data
    file.about = {"alpha": 1.0, "delta": False, "mask": None, "density": COUNT / (ROWS * COLUMNS), "provenance": {}}
    shared = {"seed": None, "fingerprint": "00000000000000ff", "aliases": []}
    file.weights = {
        "a.weight": {
            "shape": [ROWS, COLUMNS],
            "dtype": "bfloat16",
            "granule": 1,
            "count": COUNT,
            "indices": "code",
            **shared,
        },
        "head.bias": {"shape": [4], "dtype": "float32", "granule": 4, "count": 1, "indices": "whole", **shared},
    }
    return file


def _weight(**change: Any) -> Callable[[File], None]:
    return lambda file: file.weights["a.weight"].update(change)


def _about(**change: Any) -> Callable[[File], None]:
    return lambda file: file.about.update(change)


def _code(change: Callable[[bytearray], None]) -> Callable[[File], None]:
    def apply(file: File) -> None:
        begin, end = file.header["a.weight.indices"]["data_offsets"]
        code = file.body[begin:end]
        change(code)
        assert len(code) == end - begin
        file.body[begin:end] = code

    return apply


def _offsets(name: str, begin: int, end: int) -> Callable[[File], None]:
    return lambda file: file.header[name].update(data_offsets=[begin, end])


def _put(at: int, data: bytes) -> Callable[[bytearray], None]:
    def apply(code: bytearray) -> None:
        code[at : at + len(data)] = data

    return apply


def _deep(levels: int) -> Any:
    return {"a": _deep(levels - 1)} if levels else 1


def _rename(file: File) -> None:
    file.header["b.weight.values"] = file.header.pop("a.weight.values")


def _extra(file: File) -> None:
    file.header["evil"] = {"dtype": "U8", "shape": [4], "data_offsets": [len(file.body), len(file.body) + 4]}
    file.body += b"evil"


# What is wrong -> (how to make it so, a part of the refusal).
CHANGES: dict[str, tuple[Callable[[File], None], str]] = {
    "version_unknown": (lambda f: f.metadata.update({"shira.version": "3"}), "version '3' is not known"),
    "version_missing": (lambda f: f.metadata.pop("shira.version"), "this is not a SHiRA adapter"),
    "shape_smaller": (_weight(shape=[ROWS // 2, COLUMNS]), "do not decode"),
    "shape_negative": (_weight(shape=[-ROWS, -COLUMNS]), "shape must be a list of sizes"),
    "shape_absurd": (_weight(shape=[2**40, 2**40]), "more than 2^62 entries"),
    "shape_endless": (_weight(shape=[1] * 65), "shape must be a list of sizes"),
    "shape_of_floats": (_weight(shape=[128.0, 64.0]), "shape must be a list of sizes"),
    "shape_no_list": (_weight(shape="128"), "shape must be a list of sizes"),
    "dtype_other": (_weight(dtype="float16"), "must be F16 or F32, got BF16"),
    "dtype_unknown": (_weight(dtype="object"), "dtype must be one of"),
    "dtype_of_values": (lambda f: f.header["a.weight.values"].update(dtype="I16"), "must be BF16 or F32, got I16"),
    "granule_odd": (_weight(granule=3), "granule must divide"),
    "granule_zero": (_weight(granule=0), "granule must be a whole number"),
    "granule_absurd": (_weight(granule=2**63), "granule must divide"),
    "count_absurd": (_weight(count=2**62), "count must be at most"),
    "count_larger": (_weight(count=COUNT + 1), "must be of shape [301], got shape [300]"),
    "count_negative": (_weight(count=-1), "count must be a whole number"),
    "count_true": (_weight(count=True), "count must be a whole number"),
    "count_huge_text": (_weight(count="9" * 100_000), "count must be a whole number"),
    "seed_missing": (_weight(indices="seed"), "seed is null"),
    "seed_no_hex": (_weight(seed="0x12"), "seed must be 16 hex digits"),
    "fingerprint_number": (_weight(fingerprint=255), "fingerprint must be 16 hex digits"),
    "indices_pickled": (_weight(indices="pickle"), "indices must be code, seed or whole"),
    "whole_but_sparse": (_weight(indices="whole"), "a whole parameter is one granule"),
    "alias_of_another": (_weight(aliases=["head.bias"]), "its alias 'head.bias' is also a name"),
    "alias_twice": (_weight(aliases=["x", "x"]), "its alias 'x' is also a name"),
    "alias_no_name": (_weight(aliases=[3]), "aliases must be a list of names"),
    "weight_no_object": (lambda f: f.weights.update({"a.weight": 3}), "its metadata must be a JSON object"),
    "weight_unnamed": (lambda f: f.weights.update({"": f.weights.pop("a.weight")}), "the name is empty"),
    "weight_missing": (lambda f: f.weights.pop("a.weight"), "belong to no weight"),
    "weight_without_tensors": (lambda f: f.weights.update({"b": f.weights["a.weight"]}), "'b.values' is missing"),
    "tensor_renamed": (_rename, "'a.weight.values' is missing"),
    "tensor_extra": (_extra, "belong to no weight"),
    "alpha_text": (_about(alpha="1"), "alpha must be a finite number"),
    "alpha_infinite": (_about(alpha=float("inf")), "Infinity is not JSON"),
    "alpha_beyond_float32": (_about(alpha=1e308), "alpha must be a finite number (of float32), got 1e+308"),
    "alpha_true": (_about(alpha=True), "alpha must be a finite number (of float32), got True"),
    "alpha_beyond_floats": (_about(alpha=10**400), "alpha must be a finite number"),
    "delta_number": (_about(delta=1), "delta must be true or false"),
    "mask_list": (_about(mask=[1]), "mask must be a JSON object"),
    "provenance_list": (_about(provenance=[1]), "provenance must be a JSON object"),
    "provenance_nan": (_about(provenance={"loss": float("nan")}), "NaN is not JSON"),
    "provenance_infinite": (_about(provenance={"a": [{"b": -float("inf")}]}), "-Infinity is not JSON"),
    "provenance_surrogate": (_about(provenance={"data": "\ud800"}), "surrogates not allowed"),
    "provenance_deep": (_about(provenance=_deep(65)), "provenance must be nested at most 64 deep"),
    "mask_surrogate": (_about(mask={"\udfff": 1}), "surrogates not allowed"),
    "mask_deep": (_about(mask=_deep(65)), "mask must be nested at most 64 deep"),
    "alias_surrogate": (_weight(aliases=["\ud800"]), "surrogates not allowed"),
    "alias_empty": (_weight(aliases=[""]), "aliases must be a list of names"),
    "weight_of_a_long_name": (lambda f: f.weights.update({"x" * 200_000: 3}), "(200,000 characters): its metadata"),
    "tensor_of_a_long_name": (lambda f: f.header.update({"x" * 200_000: 3}), "(200,000 characters) must have dtype"),
    "granule_of_many_digits": (_weight(granule=10**4000), "got an int of 13,288 bits"),
    "count_of_many_digits": (_weight(count=10**4000), "got an int of 13,288 bits"),
    "shape_of_many_digits": (_weight(shape=[0, 10**4000]), "shape must be a list of sizes"),
    "shape_of_large_sizes": (_weight(shape=[2**62] * 64), "has more than 2^62 entries"),
    "tensor_of_many_sizes": (lambda f: f.header["a.weight.values"].update(shape=[3] * 50_000), "at most 64 sizes"),
    "tensor_of_large_sizes": (lambda f: f.header["a.weight.values"].update(shape=[2**62] * 64), "more than 2^63"),
    "checksums_of_another": (lambda f: f.metadata.update({"shira.checksums": "0" * 48}), "metadata is not as it was"),
    "checksums_no_hex": (lambda f: f.metadata.update({"shira.checksums": "no"}), "metadata is not as it was"),
    "tensors_overlap": (_offsets("a.weight.values", 0, 600), "not a whole safetensors file"),
    "tensors_apart": (_offsets("a.weight.values", 24, 624), "not a whole safetensors file"),
    "tensor_past_the_end": (_offsets("a.weight.indices", 616, 2**40), "not a whole safetensors file"),
    "tensor_backwards": (_offsets("a.weight.values", 616, 16), "not a whole safetensors file"),
    "code_first_past_the_end": (_code(_put(0, (ROWS * COLUMNS).to_bytes(8, "little"))), "do not decode"),
    "code_first_absurd": (_code(_put(0, b"\xff" * 8)), "do not decode"),
    "code_mode": (_code(_put(15, b"\x03")), "do not decode"),
    "code_payload_elsewhere": (_code(_put(8, b"\x10")), "do not decode"),
    "code_escapes_without_end": (_code(_put(200, b"\xff" * 115)), "do not decode"),
    "code_gap_past_the_end": (_code(_put(314, b"\xfe")), "do not decode"),
    "code_cut": (
        lambda f: f.header["a.weight.indices"].update(shape=[299], data_offsets=[616, 915]),
        "not a whole safetensors file",
    ),
}  # fmt: skip


def _raw() -> dict[str, tuple[bytes, str]]:
    """Files that are wrong below the parts of `File`."""
    file = good()
    whole, text, body = file.bytes(), file.text(), bytes(file.body)
    no_file = "not a whole safetensors file"
    deep = b'{"__metadata__":' + b'{"a":' * 5000 + b"1" + b"}" * 5001
    doubled = json.dumps(file.weights)[:-1] + ', "a.weight": ' + json.dumps(file.weights["a.weight"]) + "}"
    metadata = {"shira.version": "1", "shira.adapter": json.dumps(file.about), "shira.weights": doubled}
    nested = {**metadata, "shira.weights": "[" * 100_000}
    no_object = {**metadata, "shira.weights": "[]"}

    def headed(metadata: dict[str, Any]) -> bytes:
        return framed(json.dumps({"__metadata__": metadata, **file.header}).encode(), body)

    return {
        "empty": (b"", no_file),
        "length_alone": (whole[:8], no_file),
        "length_absurd": (struct.pack("<Q", 2**63) + whole[8:], no_file),
        "length_past_the_end": (struct.pack("<Q", len(whole)) + whole[8:], no_file),
        "header_no_json": (framed(b"\x00" * 64, body), no_file),
        "header_no_utf8": (framed(b'{"\xff\xfe":1}', body), no_file),
        "header_nested": (framed(deep, body), no_file),
        "header_list": (framed(b"[]", body), no_file),
        "header_cut": (framed(text[:-40], body), no_file),
        "body_cut": (whole[:-1], no_file),
        "body_longer": (whole + b"\x00", no_file),
        "body_missing": (framed(text, b""), no_file),
        "weight_named_twice": (headed(metadata), "stands there twice"),
        "weights_nested": (headed(nested), "cannot be read"),
        "weights_list": (headed(no_object), "JSON object"),
        "metadata_of_numbers": (headed({"a": 1}), no_file),
        "metadata_surrogate": (headed({"a": "\ud800"}), "surrogates not allowed"),
        "number_beyond_floats": (
            headed({**metadata, "shira.adapter": '{"alpha": 1e999}'}),
            "'1e999' is not a finite number",
        ),
        "number_of_many_digits": (headed({**metadata, "shira.adapter": "9" * 5000}), "cannot be read"),
        "pickle": (pickle.dumps({"weight": [1, 2, 3], "system": "echo"}), no_file),
        "zip_of_torch": (b"PK\x03\x04" + bytes(200), no_file),
        "zeros": (bytes(4096), no_file),
    }


def corpus(folder: Path) -> dict[str, str]:
    """Write every bad file; name to a part of the sentence it must be refused with."""
    says = {}
    for name, (change, refusal) in CHANGES.items():
        file = good()
        change(file)
        (folder / f"{name}.safetensors").write_bytes(file.bytes())
        says[name] = refusal
    for name, (data, refusal) in _raw().items():
        (folder / f"{name}.safetensors").write_bytes(data)
        says[name] = refusal
    return says


if __name__ == "__main__":
    target = Path(sys.argv[1])
    os.makedirs(target, exist_ok=True)
    (target / "good.safetensors").write_bytes(good().bytes())
    for one, refusal in corpus(target).items():
        print(f"{one:28} refused with: {refusal}")
