"""Does an adapter fit this base? All the rules, and the sentences for what does not fit.

A base is a live model, a state dict or a checkpoint on disk. An adapter is in memory, or known only by the header of
its file. Two small protocols, `Wanted` and `Found`, say what the rules need to know about each, so that the switcher,
the tuner, the functions of `Adapter` and the command line all share them. Nothing here needs torch.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from shira import _text
from shira._text import AdapterError, dtype_name, named


class Wanted(Protocol):
    """What an adapter says about one weight: an `Entry`, or a `WeightHeader` from a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> object:
        """torch's dtype, or its name."""

    @property
    def fingerprint(self) -> int | None:
        """The fingerprint of the base weight that it was made for, if it is known."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """Further names of the same (tied) weight."""

    @property
    def whole(self) -> bool:
        """Whether the whole weight is replaced."""


class Found(Protocol):
    """A tensor of a base."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> object:
        """torch's dtype, or its name."""

    @property
    def one(self) -> object:
        """A key that is equal for two names of one tensor."""

    @property
    def foreign(self) -> str | None:
        """Why its entries cannot be read, as the rest of a sentence that begins with its name; or None."""

    @property
    def obstacle(self) -> str | None:
        """Why an adapter cannot be applied although shape and dtype are right, in the same form; or None."""

    def fingerprint(self) -> int:
        """The fingerprint of its content, as an unsigned number."""

    def equal(self, other: Any) -> bool:
        """Whether another tensor of this base has the same content."""


_F_co = TypeVar("_F_co", bound=Found, covariant=True)
_F = TypeVar("_F", bound=Found)
_W = TypeVar("_W", bound=Wanted)


class Base(Protocol[_F_co]):
    """A base: its tensors by name."""

    def get(self, name: str) -> _F_co | None: ...

    def names(self) -> Iterable[str]: ...


# ---- the rules -------------------------------------------------------------------------------------------------


def misfit(found: Found, shape: Sequence[int], dtype: object) -> str | None:
    """Why an entry for this shape and dtype cannot be applied to this tensor: the rest of a sentence, or None."""
    if found.foreign is not None:
        return found.foreign
    if tuple(found.shape) != tuple(shape):
        return f"must have shape {list(shape)}, got {list(found.shape)}"
    if dtype_name(found.dtype) != dtype_name(dtype):
        return f"must have dtype {dtype_name(dtype)}, got {dtype_name(found.dtype)}"
    return found.obstacle


def places(
    who: str,
    weights: Mapping[str, Wanted],
    base: Base[_F],
    *,
    where: str,
    kind: str = "base",
    new: Container[str] = (),
    advice: Callable[[dict[str, str]], str] | None = None,
) -> dict[str, tuple[_F, ...]]:
    """Find the tensors of the base that an adapter's weights stand for. One error lists everything that does not fit.

    Usually a weight stands for one tensor. It stands for several if it is tied in the adapter and not in the base
    (`check_content` then asks whether their content is the same), and for none if it is in ``new`` and the base does
    not have it. Nothing is read.

    Args:
        who: the adapter, as a sentence begins with it: "adapter 'a'".
        weights: the adapter's weights under their names in the base (see `renamed`).
        where: the base, as it ends the sentence "... does not fit WHERE".
        kind: "base" or "model".
        new: weights that the base may lack, since the adapter replaces them as a whole.
        advice: makes a hint for the user of a rule (for `renamed`) with which all names would fit. None if the user
            cannot rename, or has renamed already.
    """
    problems: list[str] = []
    found_at: dict[str, tuple[_F, ...]] = {}
    owner: dict[object, str] = {}
    near = _Near(base)
    absent = hinted = False
    for name, wanted in weights.items():
        known = {one: found for one in (name, *wanted.aliases) if (found := base.get(one)) is not None}
        if not known:
            other = near.find(name, wanted.shape)
            if other is None and name in new:
                found_at[name] = ()
                continue
            absent, hinted = True, hinted or other is not None
            has = "" if other is None else f", which has {named(other)}"
            problems.append(f"{named(name)} is not in the {kind}{has}")
            continue
        first = next(iter(known))
        problem = misfit(known[first], wanted.shape, wanted.dtype)
        problem = None if problem is None else f"{named(first)} {problem}"
        for alias, found in known.items():
            if problem is not None or alias == first:
                continue
            form = (tuple(found.shape), dtype_name(found.dtype))
            if found.foreign is None and form != (tuple(wanted.shape), dtype_name(wanted.dtype)):
                problem = _two(alias, first, kind)
            elif (why := misfit(found, wanted.shape, wanted.dtype)) is not None:
                problem = f"{named(alias)} {why}"
        copies = {found.one: found for found in reversed(known.values())}
        for key in copies:
            if owner.setdefault(key, name) != name and problem is None:
                problem = f"{named(name)} is the same (tied) weight as {named(owner[key])}"
        if problem is not None:
            problems.append(problem)
        found_at[name] = tuple(reversed(copies.values()))
    if problems:
        rule = _rule(weights, base) if absent and advice is not None else None
        how = ""
        if rule is not None and advice is not None:
            how = f"; with {advice(rule)} all of its names fit"
        elif hinted and advice is not None:
            how = "; rename them if they are one"
        refuse(f"{who} does not fit {where}", problems, how)
    return found_at


def check_content(
    who: str,
    weights: Mapping[str, Wanted],
    found_at: Mapping[str, Sequence[Found]],
    *,
    where: str,
    kind: str = "base",
    than: str = "",
    anything: Container[str] = (),
) -> None:
    """Refuse a base whose content, by fingerprint, is not what the adapter was made for.

    A weight without a fingerprint is read only to compare copies of it.

    Args:
        found_at: what `places` has found.
        than: words about the base that follow "made for another base".
        anything: weights that may have any content, since the result does not depend on it (see `indifferent`).
    """
    compared, other = 0, []
    for name, found in found_at.items():
        fingerprint = weights[name].fingerprint
        if found and fingerprint is not None and name not in anything:
            compared += 1
            if found[0].fingerprint() != fingerprint:
                other.append(found[0].name)
    if other:
        raise AdapterError(made_for_another(who, other, compared, than))
    problems = [
        _two(copy.name, found[0].name, kind)
        for found in found_at.values()
        for copy in found[1:]
        if not found[0].equal(copy)
    ]
    if problems:
        refuse(f"{who} does not fit {where}", problems)


def fit(
    who: str,
    weights: Mapping[str, Wanted],
    base: Base[_F],
    *,
    where: str,
    than: str = "",
    new: Container[str] = (),
    anything: Container[str] = (),
    advice: Callable[[dict[str, str]], str] | None = None,
) -> dict[str, tuple[_F, ...]]:
    """`places`, and then `check_content`, with their arguments."""
    found = places(who, weights, base, where=where, new=new, advice=advice)
    check_content(who, weights, found, where=where, than=than, anything=anything)
    return found


def indifferent(weights: Mapping[str, Wanted], delta: bool, alpha: float) -> set[str]:
    """The weights whose result does not depend on the base: those replaced as a whole, at strength 1."""
    return set() if delta or alpha != 1 else {name for name, weight in weights.items() if weight.whole}


# ---- the sentences ---------------------------------------------------------------------------------------------


def refuse(sentence: str, problems: Sequence[str], advice: str = "") -> None:
    """Raise an error with the first problems, their number, and what to do."""
    more = f" ({len(problems)} problems in all)" if len(problems) > 5 else ""
    raise AdapterError(f"{sentence}: {'; '.join(problems[:5])}{more}{advice}")


def made_for_another(who: str, names: Sequence[str], compared: int, than: str = "") -> str:
    """The sentence for a base with other content."""
    return (
        f"{who} was made for another base{than}: the content of {len(names)} of {compared} weights differs "
        f"(by fingerprint): {_text.some(map(named, names))}"
    )


def one_in_adapter(alias: str, name: str) -> str:
    """The beginning of a sentence, which goes on to say what they are in the base."""
    return f"{named(alias)} and {named(name)} are one (tied) weight in the adapter, and"


def _two(alias: str, name: str, kind: str) -> str:
    return f"{one_in_adapter(alias, name)} two that differ in the {kind}"


def two_that_differ(who: str, where: str, alias: str, name: str, kind: str = "model") -> str:
    """The sentence for a tied weight of the adapter that is two in the base."""
    return f"{who} does not fit {where}: {_two(alias, name, kind)}"


# ---- names -----------------------------------------------------------------------------------------------------


def renamed(weights: Mapping[str, _W], rename: _text.Rename) -> dict[str, _W]:
    """An adapter's weights, and their aliases, under other names, in the same order; refuses two under one name."""
    if rename is None:
        return dict(weights)
    new = _text.renamer(rename)
    found: dict[str, _W] = {}
    before: dict[str, str] = {}
    for name, weight in weights.items():
        for old in (name, *weight.aliases):
            if before.setdefault(new(old), old) != old:
                raise AdapterError(f"rename: {before[new(old)]!r} and {old!r} both become {new(old)!r}")
        aliases = tuple(new(alias) for alias in weight.aliases)
        found[new(name)] = replace(weight, aliases=aliases)  # type: ignore[type-var]
    return found


def flags(rule: Mapping[str, str]) -> str:
    """A rule of `renamed` as options of the command line."""
    return " ".join(f"--rename {shlex.quote(f'{pattern}={replacement}')}" for pattern, replacement in rule.items())


class _Near:
    """Finds the tensor of a base whose name differs from a given name only by a prefix, for a message."""

    def __init__(self, base: Base[Found]) -> None:
        self.base = base
        self.names: set[str] = set()
        self.ends: dict[str, str] = {}  # the base's names by each of their ends

    def find(self, name: str, shape: tuple[int, ...]) -> str | None:
        if not self.names:
            self.names.update(self.base.names())
            for known in self.base.names():
                rest = known
                while rest:
                    _, _, rest = rest.partition(".")
                    self.ends.setdefault(rest, known)
        near, rest = self.ends.get(name), name
        while near is None and rest:
            _, _, rest = rest.partition(".")
            near = rest if rest in self.names else None
        found = None if near is None else self.base.get(near)
        return near if found is not None and tuple(found.shape) == tuple(shape) else None


_WRAPPED = ".base_layer."


def _into_wrapped(rule: dict[str, str], names: Iterable[str], bare: Mapping[str, str]) -> list[dict[str, str]]:
    """The rule, extended so that it also leads into wrapped layers if all or some kinds of layers are wrapped."""
    rename = _text.renamer(rule)
    there = [name for name in map(rename, names) if name in bare]
    kinds: tuple[set[str], set[str]] = set(), set()  # as they are, and wrapped
    for name in there:
        kinds[_WRAPPED in bare[name]].add(name.rpartition(".")[0].rpartition(".")[2])
    if not kinds[True]:
        return [rule]
    if not kinds[False]:
        return [{**rule, r"\.(\w+)$": r".base_layer.\1"}]
    which = "|".join(map(re.escape, sorted(kinds[True])))
    return [{**rule, rf"(\.(?:{which}))\.(\w+)$": r"\1.base_layer.\2"}]


def _rule(weights: Mapping[str, Wanted], base: Base[Found]) -> dict[str, str] | None:
    """The change of prefix with which all names fit the base, if there is exactly one.

    In a model whose layers PEFT has wrapped, the ends of names change as well: there the layer itself is
        ``base_layer``.
    """
    names = list(base.names())
    bare = {name.replace(_WRAPPED, "."): name for name in names}
    absent = (name for name, wanted in weights.items() if not any(map(base.get, (name, *wanted.aliases))))
    first = next(absent).split(".")
    rules: dict[tuple[str, str], int] = {}
    for known in bare:
        parts = known.split(".")
        common = 0
        while common < min(len(first), len(parts)) and first[-1 - common] == parts[-1 - common]:
            common += 1
        if common:
            old, new = (".".join((*all_[: len(all_) - common], "")) for all_ in (first, parts))
            rules[old, new] = common
    longest = max(rules.values(), default=0)

    def fits(rule: dict[str, str]) -> bool:
        rename = _text.renamer(rule)
        for name, wanted in weights.items():
            found = next(filter(None, (base.get(rename(other)) for other in (name, *wanted.aliases))), None)
            if found is None or misfit(found, wanted.shape, wanted.dtype) is not None:
                return False
        return True

    longest_rules = [pair for pair, common in rules.items() if common == longest]
    candidates = [{f"^{re.escape(old)}": new} if old or new else {} for old, new in longest_rules]
    if len(bare) == len(names) and any(bare[name] != name for name in bare):
        candidates = [into for rule in candidates for into in _into_wrapped(rule, weights, bare)]
    fitting = [rule for rule in candidates if fits(rule)]
    return fitting[0] if len(fitting) == 1 else None
