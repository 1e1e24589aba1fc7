"""How docstrings become Markdown: they are written for `help()`, where `::` announces a block of code."""

from __future__ import annotations

import re
from typing import Any

import griffe


def markdown(text: str) -> str:
    """A paragraph that ends in `::` ends in a colon, and a table drawn with `=` is shown as it was drawn."""
    text = re.sub(r"^::\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return re.sub(r"^=+ =.*?^=+ =[= ]*\n(?:.*?^=+ =[= ]*$)", _drawn, text, flags=re.MULTILINE | re.DOTALL)


def _drawn(table: re.Match[str]) -> str:
    return "\n".join(f"    {line}" for line in table[0].splitlines())


class Markdown(griffe.Extension):
    """Turns the docstring of every object."""

    def on_instance(self, *, obj: griffe.Object, **others: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
