"""The site as a reader takes it: every block of Python of every page, in order, in a folder of its own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import shira
import shira_ops

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
# Blocks with these words take a compiler half a minute: tests/test_stacks.py runs them, with results to compare.
COMPILED = ("aoti_load_package", "freezing=True")
PEERS = ("peft", "transformers", "safetensors")


def blocks(text: str) -> list[tuple[int, str]]:
    """The fenced blocks of Python, each with the number of its first line."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, one.start(1)) + 1, one[1]) for one in found]


# What peers warn of among themselves.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:.*pin_memory:UserWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks((DOCS / page).read_text(encoding="utf-8"))])
def test_a_page_runs_as_it_stands(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for peer in PEERS:
        if f"import {peer}\n" in text:
            pytest.importorskip(peer)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    session: dict[str, Any] = {"__name__": "page"}
    for line, block in blocks(text):
        if any(word in block for word in COMPILED):
            continue
        # Line breaks in front, so that a traceback names the page's own lines.
        exec(compile("\n" * (line - 1) + block, str(DOCS / page), "exec"), session)


def test_start_is_fifteen_lines() -> None:
    (block,) = blocks((DOCS / "index.md").read_text(encoding="utf-8"))
    lines = [line for line in block[1].splitlines() if line.strip()]
    assert len(lines) <= 16  # the import, and fifteen


def test_commands_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the files that the page's Python wrote."""
    pytest.importorskip("transformers")
    testing = pytest.importorskip("typer.testing")
    from shira.cli import app

    monkeypatch.chdir(tmp_path)
    text = (DOCS / "guides/command-line.md").read_text(encoding="utf-8")
    session: dict[str, Any] = {"__name__": "page"}
    for _, block in blocks(text):
        exec(block, session)
    told = [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("shira ")]
    told = [command for command in told if command.split()[1] not in ("demo", "bench")]
    assert [command.split()[1] for command in told] == ["inspect", "verify", "extract", "apply", "fuse", "convert"]
    for command in told:
        result = testing.CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{command}: {result.output}"
    # "tuned" was saved with the second adapter on.
    found, trained = shira.Adapter.load("changes.safetensors"), shira.Adapter.load("edges.safetensors")
    assert found.weights.keys() == trained.weights.keys()
    assert 0 < found.nnz <= trained.nnz
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    told = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
    wanted = {f"shira.{name}" for name in shira.__all__} | {f"shira.masks.{name}" for name in shira.masks.__all__}
    wanted |= {f"shira.sync.{name}" for name in shira.sync.__all__}
    # Modules have pages of their own; merging is what combine was called before.
    assert wanted - told == {f"shira.{name}" for name in ("combine", "masks", "merging", "metrics", "sync")}
    assert {f"shira_ops.{name}" for name in shira_ops.__all__} - told == set()


def test_every_page_is_in_the_navigation() -> None:
    told = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page for page in PAGES if page not in told and not page.startswith("quality/")] == []
