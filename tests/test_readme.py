"""The README as a reader takes it: every block of Python in order, then the command line on the files they wrote."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shira import Adapter

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks of a language, each with the number of its first line."""
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        yield README.count("\n", 0, found.start(1)) + 1, found[1]


def commands() -> list[str]:
    section = README.split("\n## Command line\n")[1].split("\n## ")[0]
    block = section.split("```")[1]
    found = [line.split("#")[0].strip() for line in block.splitlines() if line.startswith("shira ")]
    return [command for command in found if command.split()[1] not in ("demo", "bench")]


def test_readme_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python first, then the commands: these work on the files that the blocks have written."""
    pytest.importorskip("transformers")
    testing = pytest.importorskip("typer.testing")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    session: dict[str, Any] = {"__name__": "readme"}
    python = list(blocks("python"))
    assert len(python) >= 4
    for line, block in python:
        # Line breaks in front, so that a traceback names the README's own lines.
        exec(compile("\n" * (line - 1) + block, str(ROOT / "README.md"), "exec"), session)

    assert session["loss"].isfinite()
    assert session["switcher"].active == {}
    assert Adapter.load("edges.safetensors").weights["lm_head.weight"].whole
    # What the fine-tuned checkpoint was made with is found again in it.
    trained, found = Adapter.load("style.safetensors"), session["tuned"]
    assert found.weights.keys() == trained.weights.keys()
    assert 0 < found.nnz <= trained.nnz

    from shira.cli import app

    told = commands()
    assert [command.split()[1] for command in told] == ["inspect", "verify", "extract", "apply", "fuse", "convert"]
    for command in told:
        result = testing.CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{command}: {result.output}"
    extracted = Adapter.load("changes.safetensors")
    for name, entry in found.weights.items():
        assert torch.equal(extracted.weights[name].values, entry.values)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Files that are there, and headings of them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
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


def test_refusals_that_are_quoted_are_said() -> None:
    """The first column of each table: the message is in the source, with an ellipsis for what is filled in."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    first = re.findall(r"^\| (.+?) \| ", page, re.MULTILINE)
    quoted = [cell.replace("`", "") for cell in first if cell != "message" and "autograd says" not in cell]
    assert len(quoted) > 60
    source = said()
    assert [message for message in quoted if message not in source] == []
