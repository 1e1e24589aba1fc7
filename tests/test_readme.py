"""The README as a reader takes it, and what all pages point to and quote."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shira import Adapter

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks of a language, each with the number of its first line."""
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        yield README.count("\n", 0, found.start(1)) + 1, found[1]


def test_readme_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    session: dict[str, Any] = {"__name__": "readme"}
    for line, block in blocks("python"):
        # Line breaks in front, so that a traceback names the README's own lines.
        exec(compile("\n" * (line - 1) + block, str(ROOT / "README.md"), "exec"), session)
    assert session["switcher"].active == {}
    assert Adapter.load("style.safetensors").nnz > 0


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Files that are there, and headings of them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        if path.startswith("pictures/"):  # drawn while the site is built, which checks them
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page}: {target}"


def said() -> str:
    """What the packages can say: the pieces of split strings joined, what is filled in left out."""
    files = sorted(file for folder in ("python/shira", "shira_ops") for file in (ROOT / folder).rglob("*.py"))
    files.append(ROOT / "setup.py")
    text = "".join(file.read_text(encoding="utf-8") for file in files).replace("`", "")
    return re.sub(r"\{[^{}]*\}", "...", re.sub(r"([\"'])\s*\n\s*f?\1", "", text))


# What torch and Python say, not we.
OTHERS = r".*autograd says|KeyError:"


def test_refusals_that_are_quoted_are_said() -> None:
    """The first column of each table: the message is in the source, with an ellipsis for what is filled in."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    first = re.findall(r"^\| (.+?) \| ", page, re.MULTILINE)
    quoted = [cell.replace("`", "") for cell in first if cell != "message" and not re.match(OTHERS, cell)]
    assert len(quoted) > 60
    source = said()
    assert [message for message in quoted if message not in source] == []
