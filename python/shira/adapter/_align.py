"""Which tensors of two checkpoints of one model belong together, if not all of their names are the same.

What is certain is done: a prefix that only one of them has, a tied weight that only one of them holds twice, and what a
`SparseTuner` keeps beside the weights. For the rest the user gives ``rename=``.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from shira import _model, _text
from shira._model import INDICES_SUFFIX, VALUES_SUFFIX
from shira._text import AdapterError
from shira.adapter._checkpoint import Checkpoint, Stored, ties

_MOST_CONFIG_BYTES = 16 << 20
# Buffers that older versions of transformers saved and newer ones compute.
_CONSTANTS = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq|attn\.masked_bias)$")
# Heads that transformers ties by default; a configuration does not mention it then.
_HEADS = ("lm_head.weight", "embed_out.weight", "output_projection.weight", "predictions.decoder.weight")


@dataclass
class Aligned:
    """The tensors of both checkpoints under the base's names, and notes that say what was done."""

    base: dict[str, Stored]
    tuned: dict[str, Stored]
    # The first name of each tensor by each of its names (`ties`), in the base or only in the tuned one.
    first: dict[str, str]
    notes: list[str] = field(default_factory=list)


def align(base: Checkpoint, tuned: Checkpoint, rename: _text.Rename) -> Aligned:
    """Match the names. What only one of the two has stays in it."""
    notes: list[str] = []
    one, two = _own(base, "base", notes), _own(tuned, "tuned", notes)
    two = _renamed(two, rename) if rename is not None else _without_prefix(one, two, notes)
    _leave_constants(one, two, (base, tuned), notes)
    first = {name: known for name, known in ties(base).items() if name in one}
    _tie_within(one, two, base, tuned, first, notes)
    return Aligned(one, two, first, notes)


def _own(checkpoint: Checkpoint, role: str, notes: list[str]) -> dict[str, Stored]:
    """The tensors without what training keeps beside weights: a tuner's values, the counter of an average."""
    names = checkpoint.tensors.keys()
    left = [
        name
        for name in names
        if name.endswith((VALUES_SUFFIX, INDICES_SUFFIX))
        and name.removesuffix(VALUES_SUFFIX).removesuffix(INDICES_SUFFIX) in names
    ]
    if "n_averaged" in names and all(name.startswith("module.") for name in names - {"n_averaged"}):
        left.append("n_averaged")  # the counter of torch's AveragedModel
    if left:
        notes.append(f"left out of the {role} checkpoint, since they are not weights: {_model.some(left, 3)}")
    gone = set(left)
    return {name: stored for name, stored in checkpoint.tensors.items() if name not in gone}


def _renamed(tensors: dict[str, Stored], rename: _text.Rename) -> dict[str, Stored]:
    new = _text.renamer(rename)
    before: dict[str, str] = {}
    for name in tensors:
        if before.setdefault(new(name), name) != name:
            raise AdapterError(f"rename: {before[new(name)]!r} and {name!r} both become {new(name)!r}")
    return {new(name): stored for name, stored in tensors.items()}


def _ends(name: str) -> Iterable[tuple[str, str]]:
    """``a.b.c`` as ``("a.", "b.c")`` and ``("a.b.", "c")``."""
    at = name.find(".")
    while at >= 0:
        yield name[: at + 1], name[at + 1 :]
        at = name.find(".", at + 1)


def _prefix(longer: set[str], shorter: set[str]) -> tuple[str, int]:
    """The prefix that most names of one add to names of the other, and how many do; none if two are equally good."""
    count = Counter(start for name in longer for start, end in _ends(name) if end in shorter)
    best = count.most_common(2)
    if not best or (len(best) > 1 and best[0][1] == best[1][1]):
        return "", 0
    return best[0]


def _without_prefix(base: dict[str, Stored], tuned: dict[str, Stored], notes: list[str]) -> dict[str, Stored]:
    """The tuned tensors with the base's prefix, if one model is a part of the other."""
    only_base, only_tuned = base.keys() - tuned.keys(), tuned.keys() - base.keys()
    off, on = _prefix(only_tuned, only_base), _prefix(only_base, only_tuned)
    if off[1] == on[1]:
        return tuned
    if off[1] > on[1]:
        prefix, new = off[0], {name: name.removeprefix(off[0]) for name in only_tuned if name.startswith(off[0])}
        notes.append(f"the tuned checkpoint's names were read without their prefix {prefix!r}")
    else:
        prefix, new = on[0], {name: on[0] + name for name in only_tuned}
        notes.append(f"the tuned checkpoint's names were read with the base's prefix {prefix!r}")
    return {new[name] if new.get(name) in only_base else name: stored for name, stored in tuned.items()}


def _leave_constants(
    one: dict[str, Stored], two: dict[str, Stored], given: Iterable[Checkpoint], notes: list[str]
) -> None:
    """Drop constants that only one of the two has saved, such as the causal masks of GPT-2."""
    rules = [_CONSTANTS]
    for checkpoint in given:
        known = getattr(checkpoint.model, "_keys_to_ignore_on_load_unexpected", None)
        rules += [re.compile(rule) for rule in known or () if isinstance(rule, str)]
    left = []
    for name in one.keys() ^ two.keys():
        shape = (one.get(name) or two[name]).shape
        mask = name.endswith("attn.bias") and len(shape) == 4
        if mask or any(rule.search(name) for rule in rules):
            left.append(name)
            (one if name in one else two).pop(name)
    if left:
        notes.append(f"constants that only one checkpoint has were left out: {_model.some(sorted(left), 3)}")


def _says_tied(checkpoint: Checkpoint) -> bool | None:
    """Whether the model's configuration says that embeddings are tied; None if it does not say, or there is none."""
    found: Any = getattr(getattr(checkpoint.model, "config", None), "tie_word_embeddings", None)
    if checkpoint.folder is not None:
        path = os.path.join(checkpoint.folder, "config.json")
        try:
            if os.path.getsize(path) > _MOST_CONFIG_BYTES:
                return None
            with open(path, encoding="utf-8") as file:
                config = json.load(file)
            found = config.get("tie_word_embeddings")
            if found is None and isinstance(config.get("text_config"), dict):
                found = config["text_config"].get("tie_word_embeddings")
        except (OSError, ValueError, AttributeError, RecursionError):
            return None
    return found if isinstance(found, bool) else None


def _has_config(checkpoint: Checkpoint) -> bool:
    return checkpoint.folder is not None and os.path.exists(os.path.join(checkpoint.folder, "config.json"))


def _twin(name: str, tensors: dict[str, Stored], common: Iterable[str], certain: bool) -> str | None:
    """Another name of the tensor in its own checkpoint: in the same memory or, if it is said to be tied, equal."""
    own = tensors[name]
    others = [other for other in common if tensors[other].one == own.one]
    if others:
        return others[0]
    if not certain or own.foreign is not None or not own.nbytes or len(own.shape) < 2:
        return None
    others = [
        other
        for other in common
        if tensors[other].shape == own.shape and tensors[other].foreign is None and tensors[other].equal(own)
    ]
    return others[0] if len({tensors[other].one for other in others}) == 1 else None


def _tie_within(
    one: dict[str, Stored],
    two: dict[str, Stored],
    base: Checkpoint,
    tuned: Checkpoint,
    first: dict[str, str],
    notes: list[str],
) -> None:
    """If one of the two has a second name for a weight that the other has once, make it an alias."""
    common = [name for name in one if name in two]
    said = {"base": _says_tied(base), "tuned": _says_tied(tuned)}
    for role, own, mine, theirs in (("tuned", tuned, two, one), ("base", base, one, two)):
        other, lacking = (base, "base") if role == "tuned" else (tuned, "tuned")
        for name in [name for name in mine if name not in theirs]:
            says = said[lacking] if said[lacking] is not None else said[role]
            if says is None:
                says = name.endswith(_HEADS) and (_has_config(other) or _has_config(own))
            twin = _twin(name, mine, common, says)
            if twin is None:
                continue
            first[name] = first[twin]
            if role == "tuned":
                del two[name]
            notes.append(f"{name!r} is only in the {role} checkpoint, which ties it to {twin!r}")
