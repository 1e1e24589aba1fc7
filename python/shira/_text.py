"""Names and numbers as users give them and as messages show them. Without torch."""

from __future__ import annotations

import numbers
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any


class AdapterError(ValueError):
    """An adapter, or its file, that is refused. The message says which file, which weight and what."""


_short = reprlib.Repr()
_short.maxlist = _short.maxtuple = _short.maxdict = 8
_short.maxlevel, _short.maxstring, _short.maxother = 3, 60, 80


def shown(value: object, most: int = 80) -> str:
    """A value as a message shows it: its repr, or the beginning of that, in no time however large the value is."""
    if isinstance(value, str):
        return repr(value) if len(value) <= most else f"{value[:most]!r}... ({len(value):,} characters)"
    if isinstance(value, int) and value.bit_length() > 256:  # an int of thousands of digits has no repr
        return f"an int of {value.bit_length():,} bits"
    try:
        text = _short.repr(value)
    except ValueError:  # one inside
        return f"a {type(value).__name__}"
    return text if len(text) <= most else text[:most] + "..."


def named(name: object) -> str:
    """The name of a weight or a tensor as a message shows it."""
    return shown(name, 200)


def hex_word(value: int | None) -> str | None:
    """A 64-bit word as the file writes it."""
    return None if value is None else f"{value & (2**64 - 1):016x}"


# Strengths are rounded to float32 first: one that it has no room for would act as infinite.
_LARGEST_STRENGTH = 3.4028234663852886e38


def strength(what: str, value: object) -> float:
    """A strength (``alpha``) as a float; ``what`` names it in the refusal. One rule for files, calls and commands."""
    number: Any = value
    real: bool = isinstance(number, numbers.Real)
    if not real or value is True or value is False or not abs(number) <= _LARGEST_STRENGTH:
        raise AdapterError(f"{what} must be a finite number (of float32), got {shown(value)}")
    return float(number)


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
