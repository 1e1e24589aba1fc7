"""Regular expressions from files that may not be trusted, matched in bounded time.

Python's matcher backtracks, and a pattern of twenty characters can keep it busy for years. This one goes over a pattern
once, and keeps the set of places in the text that it may have reached. It supports what names of modules need:
characters, escapes such as ``\\d``, ``.``, sets, groups, ``|``, ``*``, ``+``, ``?``, ``{m,n}``, ``^`` and ``$``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial

_MOST_CHARACTERS = 1000
_MOST_GROUPS = 20  # nested in one another
_MOST_PLACES = 1_000_000  # that are looked at for one text
_COUNTS = re.compile(r"\{(\d{0,9})(,?)(\d{0,9})\}")

Places = set[int]


class _Walk:
    """A text that is matched, and how much work is left."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.left = _MOST_PLACES

    def pay(self, places: Places) -> None:
        self.left -= len(places) + 1
        if self.left < 0:
            raise ValueError("it takes too long to match")


Step = Callable[[_Walk, Places], Places]


def _one(holds: Callable[[str], object], walk: _Walk, places: Places) -> Places:
    walk.pay(places)
    text = walk.text
    return {at + 1 for at in places if at < len(text) and holds(text[at])}


def _edge(last: bool, walk: _Walk, places: Places) -> Places:
    return places & {len(walk.text) if last else 0}


def _sequence(steps: list[Step], walk: _Walk, places: Places) -> Places:
    for step in steps:
        if not places:
            break
        places = step(walk, places)
    return places


def _either(options: list[Step], walk: _Walk, places: Places) -> Places:
    return set().union(*(option(walk, places) for option in options))


def _repeat(step: Step, least: int, most: int | None, walk: _Walk, places: Places) -> Places:
    # Even a step that matches nothing has reached all it can after as many rounds as there are characters.
    enough = len(walk.text) + 1
    for _ in range(min(least, enough)):
        places = step(walk, places)
    reached, new = set(places), places
    for _ in range(enough if most is None else min(most - least, enough)):
        walk.pay(new)
        new = step(walk, new) - reached
        if not new:
            break
        reached |= new
    return reached


class Pattern:
    """A pattern from a PEFT configuration. Raises `ValueError` with the reason if it cannot be used."""

    def __init__(self, pattern: str) -> None:
        if len(pattern) > _MOST_CHARACTERS:
            raise ValueError(f"it has more than {_MOST_CHARACTERS:,} characters")
        self._pattern, self._at = pattern, 0
        self._step = self._options(0)
        if self._at < len(pattern):
            raise ValueError("a ) has no (")

    def ends(self, name: str) -> bool:
        """Whether it matches the name, or its end after a dot: ``re.match(rf"(.*\\.)?({pattern})$", name)``."""
        starts = {0} | {at + 1 for at, character in enumerate(name) if character == "."}
        return len(name) in self._step(_Walk(name), starts)

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _options(self, depth: int) -> Step:
        if depth > _MOST_GROUPS:
            raise ValueError(f"it has more than {_MOST_GROUPS} groups within each other")
        options = [self._steps(depth)]
        while self._peek() == "|":
            self._at += 1
            options.append(self._steps(depth))
        return options[0] if len(options) == 1 else partial(_either, options)

    def _steps(self, depth: int) -> Step:
        steps: list[Step] = []
        while self._peek() not in ("", "|", ")"):
            steps.append(self._counted(self._atom(depth)))
        return partial(_sequence, steps)

    def _atom(self, depth: int) -> Step:
        character = self._peek()
        start, self._at = self._at, self._at + 1
        if character == "(":
            if self._peek() == "?":
                if self._pattern[self._at : self._at + 2] != "?:":
                    raise ValueError("of groups with a ?, only (?:...) is known")
                self._at += 2
            step = self._options(depth + 1)
            if self._peek() != ")":
                raise ValueError("a ( has no )")
            self._at += 1
            return step
        if character in "^$":
            return partial(_edge, character == "$")
        if character in "*+?":
            raise ValueError(f"there is nothing before a {character}")
        if character == "[":
            self._at += self._peek() == "^"
            self._at += self._peek() == "]"
            while self._peek() != "]":
                if not self._peek():
                    raise ValueError("a [ has no ]")
                self._at += 1 + (self._peek() == "\\")
            self._at += 1
        elif character == "\\":
            escaped = self._peek()
            if not escaped or (escaped.isalnum() and escaped not in "dDwWsS"):
                raise ValueError(f"the escape \\{escaped} is not known")
            self._at += 1
        elif character != ".":
            return partial(_one, character.__eq__)
        # Matches a single character, so Python's matcher cannot backtrack.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return partial(_one, re.compile(self._pattern[start : self._at]).match)
            except re.error as error:
                raise ValueError(str(error)) from error

    def _counted(self, step: Step) -> Step:
        """The step, repeated if a repeat follows it."""
        character = self._peek()
        counts = _COUNTS.match(self._pattern, self._at)
        if character and character in "*+?":
            least, most = int(character == "+"), 1 if character == "?" else None
            self._at += 1
        elif counts and (counts[1] or counts[2]):
            least = int(counts[1] or 0)
            most = least if not counts[2] else int(counts[3]) if counts[3] else None
            self._at = counts.end()
            if most is not None and most < least:
                raise ValueError(f"{counts[0]} counts down")
        else:
            return step
        if self._peek() == "?":  # a lazy repeat matches the same texts
            self._at += 1
        if self._peek() and self._peek() in "*+?":
            raise ValueError("a repeat follows a repeat")
        return partial(_repeat, step, least, most)
