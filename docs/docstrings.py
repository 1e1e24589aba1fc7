"""How docstrings become Markdown: they are written for `help()`, where `::` announces a block of code."""

from __future__ import annotations

import re
from typing import Any

import griffe


def markdown(text: str) -> str:
    """A paragraph that ends in `::` ends in a colon, and a table that is drawn with `=` is a table."""
    text = re.sub(r"^::\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return re.sub(r"^=+ [= ]+\n(.+)\n=+ [= ]+\n((?:.+\n)*?)=+ [= ]+$", _table, text, flags=re.MULTILINE)


def _table(drawn: re.Match[str]) -> str:
    """The columns are where the rules are; the last one may be wider than its rule."""
    starts = [found.start() for found in re.finditer("=+", drawn[0].partition("\n")[0])]
    spans = list(zip(starts, [*starts[1:], None], strict=True))
    rows = [[line[begin:end].strip() for begin, end in spans] for line in (drawn[1], *drawn[2].splitlines())]
    rows.insert(1, ["---"] * len(spans))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


class Markdown(griffe.Extension):
    """Turns the docstring of every object."""

    def on_instance(self, *, obj: griffe.Object, **others: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
