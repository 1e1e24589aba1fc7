"""The site as a reader takes it: every block of Python of every page, in order, in a folder of its own.

A mark may stand in the line above a block: `<!-- needs NAME -->` for a package that is not among the tests' own (such a
block runs where that is installed), or `<!-- run by TEST -->` for one that takes a compiler half a minute, which a test
of tests/test_stacks.py runs, with results to compare.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import shira
import shira_ops

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
PEERS = ("accelerate", "peft", "safetensors", "transformers")


class Block(NamedTuple):
    line: int
    text: str
    needs: str
    test: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks of Python, each with the number of its first line and what its mark says."""
    marks = r"^(?:<!-- (?:needs (?P<needs>\w+)|run by (?P<test>\w+)) -->\n)?"
    found = re.finditer(marks + r"```python\n(?P<text>.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [
        Block(text.count("\n", 0, one.start("text")) + 1, one["text"], one["needs"] or "", one["test"] or "")
        for one in found
    ]


def run_commands(told: list[str]) -> None:
    if told:
        testing = pytest.importorskip("typer.testing")
        from shira.cli import app

        for command in told:
            result = testing.CliRunner().invoke(app, shlex.split(command)[1:])
            assert result.exit_code == 0, f"{command}: {result.output}"


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, and afterwards nothing of what a page sets up for the whole process."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if importlib.util.find_spec("accelerate"):
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


# What peers warn of among themselves.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:.*pin_memory:UserWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks((DOCS / page).read_text(encoding="utf-8"))])
def test_a_page_runs_as_it_stands(page: str, apart: Path) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for peer in PEERS:
        if f"import {peer}\n" in text:
            pytest.importorskip(peer)
    session: dict[str, Any] = {"__name__": "page"}
    for block in blocks(text):
        if block.test or (block.needs and importlib.util.find_spec(block.needs) is None):
            continue
        # Line breaks in front, so that a traceback names the page's own lines.
        exec(compile("\n" * (block.line - 1) + block.text, str(DOCS / page), "exec"), session)
    shell = "".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    run_commands(re.findall(r"^shira .*", shell, re.MULTILINE))
    switcher = session.get("switcher")
    assert switcher is None or switcher.active == {}, "a page ends as a user should: on the base"


def test_marks_are_few_and_true() -> None:
    every = [block for page in PAGES for block in blocks((DOCS / page).read_text(encoding="utf-8"))]
    assert len(every) > 60
    assert sorted(block.needs for block in every if block.needs) == ["bitsandbytes", "diffusers", "diffusers"]
    stacks = (ROOT / "tests/test_stacks.py").read_text(encoding="utf-8")
    tests = [block.test for block in every if block.test]
    assert len(tests) == 2
    assert all(f"def {test}(" in stacks and f'"{test}"' in stacks for test in tests)


def test_start_is_fifteen_lines() -> None:
    (block,) = blocks((DOCS / "index.md").read_text(encoding="utf-8"))
    lines = [line for line in block.text.splitlines() if line.strip()]
    assert len(lines) <= 16  # the import, and fifteen


def test_commands_run_as_they_stand(apart: Path) -> None:
    """On the files that the page's Python wrote."""
    pytest.importorskip("transformers")
    text = (DOCS / "guides/command-line.md").read_text(encoding="utf-8")
    session: dict[str, Any] = {"__name__": "page"}
    for block in blocks(text):
        exec(block.text, session)
    told = [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("shira ")]
    told = [command for command in told if command.split()[1] not in ("demo", "bench")]
    assert [command.split()[1] for command in told] == ["inspect", "verify", "extract", "apply", "fuse", "convert"]
    run_commands(told)
    # "tuned" was saved with the second adapter on.
    found, trained = shira.Adapter.load("changes.safetensors"), shira.Adapter.load("edges.safetensors")
    assert found.weights.keys() == trained.weights.keys()
    assert 0 < found.nnz <= trained.nnz
    assert (apart / "merged" / "model.safetensors").is_file()


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    told = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
    wanted = {f"shira.{name}" for name in shira.__all__} | {f"shira.masks.{name}" for name in shira.masks.__all__}
    for home, module in (("combine", shira.combine), ("metrics", shira.metrics), ("sync", shira.sync)):
        wanted |= {f"shira.{home}.{name}" for name in module.__all__}
    # Modules have pages of their own; merging is what combine was called before.
    assert wanted - told == {f"shira.{name}" for name in ("combine", "masks", "merging", "metrics", "sync")}
    assert {f"shira_ops.{name}" for name in shira_ops.__all__} - told == set()


def test_integrations_are_in_the_reference() -> None:
    page = (DOCS / "reference/integrations.md").read_text(encoding="utf-8")
    for file in (ROOT / "python/shira/integrations").glob("[!_]*"):
        assert f"::: shira.integrations.{file.stem}\n" in page


def test_docstrings_become_markdown() -> None:
    """`help()` shows `::` before a block of code, and tables as they were drawn; a page must not."""
    pytest.importorskip("griffe")
    specification = importlib.util.spec_from_file_location("docstrings", DOCS / "docstrings.py")
    docstrings = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(docstrings)
    given = "The same::\n\n    a::b\n\n==== ==\nstep b\n==== ==\n1    ``2`` and 3\n4    5\n==== ==\n\nend"
    wanted = "The same:\n\n    a::b\n\n| step | b |\n| --- | --- |\n| 1 | ``2`` and 3 |\n| 4 | 5 |\n\nend"
    assert docstrings.markdown(given) == wanted
    assert "| trim | over all weights together |" in docstrings.markdown(inspect.getdoc(shira.combine.ties))


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_that_are_named_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:csrc|shira_ops|python|tests|benchmarks|docs)/[\w/.]+)`", text)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    told = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page for page in PAGES if page not in told and not page.startswith("quality/")] == []
