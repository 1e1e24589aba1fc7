"""Names and numbers, as users give them and as messages show them. Nothing here needs torch."""

from __future__ import annotations

import math
import numbers
import os
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


def real(value: object) -> float:
    """A real number of Python or numpy as a float; NaN for anything else, such as True."""
    number: Any = value
    try:
        return float(number) if isinstance(number, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an int of hundreds of digits
        return math.inf


# Strengths are rounded to float32 first, where a larger number would become infinite.
_LARGEST_STRENGTH = 3.4028234663852886e38


def strength(what: str, value: object) -> float:
    """A strength (``alpha``) as a float. ``what`` names it in the refusal: files, calls and commands share one rule."""
    number = real(value)
    if not abs(number) <= _LARGEST_STRENGTH:
        raise AdapterError(f"{what} must be a finite number (of float32), got {shown(value)}")
    return number


def share(what: str, value: object) -> float:
    """A density as a float. ``what`` names it in the refusal, here and below: "ties: density"."""
    number = real(value)
    if not 0 < number <= 1:
        raise ValueError(f"{what} must be above 0 and at most 1, got {shown(value)}")
    return number


def whole(what: str, value: object, least: int | None = None) -> int:
    """A whole number: a granule, a seed, a count."""
    # type(), not isinstance(): True is not a count.
    if type(value) is not int or (least is not None and value < least):
        wanted = "a whole number" if least is None else f"a whole number of at least {least}"
        raise ValueError(f"{what} must be {wanted}, got {shown(value)}")
    return value


def text(what: str, value: object) -> str:
    """A name that files can hold: not empty, and without halves of characters, which UTF-8 cannot write."""
    if not isinstance(value, str):
        raise TypeError(f"{what} must be text, got {type(value).__name__}")
    if not value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{what} must be text that UTF-8 can write, and not empty, got {shown(value)}")
    return value


def said(what: str, given: object, known: object) -> str | None:
    """A name for others to read: what is given or, where nothing is, what a file says, if that is a name."""
    if given is not None:
        return text(what, given)
    return known if isinstance(known, str) and known else None


def path(what: str, value: object) -> str:
    """A path as text. Whether there is anything at it is not asked."""
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(found, str):
        raise TypeError(f"{what} must be a path (a str or a pathlib.Path), got {type(value).__name__}")
    try:
        good = b"\0" not in os.fsencode(found)
    except UnicodeEncodeError:
        good = False
    if not found or not good:
        raise ValueError(f"{what} must be a path that this system can write, and not empty, got {shown(found)}")
    return found


def function(what: str, value: object) -> None:
    """Refuse what cannot be called; None is fine."""
    if value is not None and not callable(value):
        raise TypeError(f"{what} must be a function or None, got {type(value).__name__}")


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
