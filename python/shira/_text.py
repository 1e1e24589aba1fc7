"""Names and numbers, as users give them and as messages show them. Nothing here needs torch."""

from __future__ import annotations

import numbers
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class AdapterError(ValueError):
    """An adapter or its file is refused. The message says which file, which weight, and what is wrong."""


_short = reprlib.Repr()
_short.maxlist = _short.maxtuple = _short.maxdict = 8
_short.maxlevel, _short.maxstring, _short.maxother = 3, 60, 80


def shown(value: object, most: int = 80) -> str:
    """A value as a message shows it: its repr, or the beginning of it. Quick, however large the value is."""
    if isinstance(value, str):
        return repr(value) if len(value) <= most else f"{value[:most]!r}... ({len(value):,} characters)"
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses thousands of digits
        return f"an int of {value.bit_length():,} bits"
    try:
        text = _short.repr(value)
    except ValueError:  # such an int inside the value
        return f"a {type(value).__name__}"
    return text if len(text) <= most else text[:most] + "..."


def named(name: object) -> str:
    """The name of a weight or a tensor as a message shows it."""
    return shown(name, 200)


def some(names: Iterable[str], most: int = 6) -> str:
    """A few of the names, for a message."""
    listed = [name if len(name) <= 300 else f"{name[:300]}..." for name in names]
    more = f", ... ({len(listed)} in all)" if len(listed) > most else ""
    return (", ".join(listed[:most]) + more) if listed else "none"


def dtype_name(dtype: object) -> str:
    """torch's name of a dtype without ``torch.``; of a name, the name itself."""
    return str(dtype).removeprefix("torch.")


def hex_word(value: int | None) -> str | None:
    """A 64-bit word as the file writes it."""
    return None if value is None else f"{value & (2**64 - 1):016x}"


# Strengths are rounded to float32 first, where a larger number would become infinite.
_LARGEST_STRENGTH = 3.4028234663852886e38


def strength(what: str, value: object) -> float:
    """A strength (``alpha``) as a float. ``what`` names it in the refusal: files, calls and commands share one rule."""
    number: Any = value
    real: bool = isinstance(number, numbers.Real)
    if not real or value is True or value is False or not abs(number) <= _LARGEST_STRENGTH:
        raise AdapterError(f"{what} must be a finite number (of float32), got {shown(value)}")
    return float(number)


# What torch.compile and activation checkpointing insert into the names of parameters.
_INFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.")


def clean(name: str) -> str:
    """A parameter's name as files have it: without what wrappers insert."""
    for infix in _INFIXES:
        name = name.replace(infix, "")
    return name


Rename = Mapping[str, str] | Callable[[str], str] | None


def renamer(rename: Rename) -> Callable[[str], str]:
    """An argument ``rename=`` as a function of a name: it is one, or maps regular expressions to replacements.

    The patterns are applied in the mapping's order, each to the result of the one before (`re.sub`):
    ``{r"^model\\.": ""}`` removes a prefix, ``{"^": "model."}`` adds one.
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
            except re.error as error:  # a group that the pattern does not have
                raise ValueError(f"rename {rule.pattern!r} to {replacement!r}: {error}") from error
        return _new_name(name, new)

    return renamed


def _new_name(old: str, new: object) -> str:
    if not isinstance(new, str) or not new:
        raise ValueError(f"rename must make a name of {old!r}, got {new!r:.80}")
    return new
