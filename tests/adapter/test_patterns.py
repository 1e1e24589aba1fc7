"""Patterns from strangers' files: they match what Python's do, and never take long."""

from __future__ import annotations

import random
import re

import pytest

from shira.adapter._patterns import Pattern


def wanted(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj", "layers.0.q_proj", r"layers\.\d+\.q_proj", r"^model\.layers\.[0-3]\.(q|v)_proj", "^q_proj", ".*",
        r"[^.]+", "(?:q|k)_proj$", r".*layers\.(0|1)\..*", r"layers\.\d{1,2}\.(self_attn\.)?[qv]_proj", "q_pro", "",
        "a|b",
    ],
)  # fmt: skip
def test_patterns_as_people_write_them(pattern: str) -> None:
    names = [
        "q_proj",
        "model.layers.0.q_proj",
        "model.layers.12.self_attn.v_proj",
        "layers.0.k_proj",
        "xq_proj",
        "a",
        "",
    ]
    assert [Pattern(pattern).ends(name) for name in names] == [wanted(pattern, name) for name in names]


def drawn(chance: random.Random, depth: int = 0) -> str:
    def inner() -> str:
        return drawn(chance, depth + 1)

    kind = chance.randrange(8 if depth < 4 else 4)
    if kind < 2:
        return chance.choice("abq.")
    if kind == 2:
        return chance.choice([r"\.", r"\d", "[ab]", "[^a]", r"\w", "[0-2]", "[]a]", r"[\]b]", "_"])
    if kind == 3:
        return chance.choice(["^", "$", "q", ""])
    if kind == 4:
        return f"({inner()}|{inner()})"
    if kind == 5:
        return f"({inner()}{inner()})" + chance.choice(["*", "+", "?", "{1,2}", "{2}", "{0,3}", "*?", "{2,}", ""])
    return inner() + inner()


def test_drawn_patterns_match_as_pythons_do() -> None:
    chance, hits = random.Random(1), 0
    for _ in range(1500):
        pattern = drawn(chance)
        name = "".join(chance.choice("abq.0_]") for _ in range(chance.randrange(7)))
        hits += wanted(pattern, name)
        assert Pattern(pattern).ends(name) == wanted(pattern, name), (pattern, name)
    assert hits > 100


# Each of these keeps Python's own matcher busy for longer than anybody waits.
@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b", "(a|a)*b", "((((a*)*)*)*)*b", "(a?){4000000}b", "a?" * 40 + "a" * 40 + "b", "(.*)" * 40 + "x",
        "(" * 19 + "a" + ")*" * 19 + "b", "(a|a)" * 60 + "b",
    ],
)  # fmt: skip
def test_patterns_that_explode_end(pattern: str) -> None:
    assert not Pattern(pattern).ends("a" * 60)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(a", r"a \( has no \)"), ("a)", r"a \) has no \("), ("[a", r"a \[ has no \]"), ("*a", r"nothing before a \*"),
        ("a**", "a repeat follows a repeat"), ("a{3,1}", "counts down"), ("(?=a)", r"only \(\?:\.\.\.\) is known"),
        (r"(a)\1", r"escape \\1 is not known"), ("a\\", "escape"), ("[z-a]", "bad character range"),
        ("a" * 1001, "more than 1,000 characters"), ("(" * 500 + ")" * 500, "more than 20 groups"),
    ],
)  # fmt: skip
def test_patterns_that_are_refused(pattern: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Pattern(pattern)


def test_a_match_has_a_budget() -> None:
    with pytest.raises(ValueError, match="it takes too long"):
        Pattern("(.*)*" * 150).ends("a." * 3000)
