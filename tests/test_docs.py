"""The README and the site as a reader takes them: every block of every page runs, and what pages say is so.

A page is read from top to bottom in an empty folder: its blocks of Python share one namespace, and the `shira` commands
of its shell blocks work on the files that were written before. The line above a block may be `<!-- needs NAME -->`: of a
package that is not among the tests' own, it runs where that is installed; or `<!-- run by TEST -->`, of tests/test_stacks.py.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import shira
import shira_ops
from shira import Adapter

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", *(page.relative_to(ROOT).as_posix() for page in SITE)]

# What shell blocks may tell besides the command line that is tested here: to set up, and what runs for long.
OTHER_COMMANDS = ("git clone", "make ", "pip install", "torchrun ", "accelerate launch", "shira demo", "shira bench")
# Languages of blocks that are not run: bytes, messages, output, shapes of files.
SHOWN = ("", "text", "json")


class Block(NamedTuple):
    line: int
    language: str
    needs: str
    test: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, each with the number of its first line."""
    text = (ROOT / page).read_text(encoding="utf-8")
    marks = r"(?:<!-- needs (?P<needs>\w+) -->\n)?(?:<!-- run by (?P<test>\w+) -->\n)?"
    fence = rf"^{marks}```(?P<language>\w*)\n(?P<text>.*?)^```$"
    for found in re.finditer(fence, text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, found.start("text")) + 1
        yield Block(line, found["language"], found["needs"] or "", found["test"] or "", found["text"])


RUNNING = [page for page in PAGES if any(block.language in ("python", "sh") for block in blocks(page))]


def run_python(page: str, block: Block, session: dict[str, Any]) -> None:
    # Line breaks in front, so that a traceback names the page's own lines.
    exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec"), session)


def run_commands(page: str, block: Block) -> None:
    """The `shira` commands, one a line; a backslash goes on with the next one."""
    from typer.testing import CliRunner

    from shira.cli import app

    for line in block.text.replace("\\\n", "").splitlines():
        command = line.split("#")[0].strip()
        if not command or command.startswith(OTHER_COMMANDS):
            continue
        assert command.startswith("shira "), f"{page}: {command}"
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{page}: {command}: {result.output}"


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, and nothing left of what a page sets up for the whole process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    with torch.random.fork_rng():
        yield tmp_path
    torch._dynamo.reset()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if importlib.util.find_spec("accelerate"):
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


# Compiling and exporting use what torch itself deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("page", RUNNING)
def test_page_runs_as_it_stands(page: str, apart: Path) -> None:
    used = "".join(block.text for block in blocks(page))
    for package, sign in (("transformers", "transformers"), ("peft", "import peft"), ("typer", "shira inspect")):
        if sign in used:
            pytest.importorskip(package)
    session: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.test or (block.needs and importlib.util.find_spec(block.needs) is None):
            continue
        if block.language == "python":
            run_python(page, block, session)
        elif block.language == "sh":
            run_commands(page, block)
    switcher = session.get("switcher")
    assert switcher is None or switcher.active == {}, "a page ends as a user should: on the base"


def test_few_blocks_need_what_is_not_here() -> None:
    every = [block for page in PAGES for block in blocks(page)]
    assert {block.language for block in every} <= {"python", "sh", *SHOWN}
    assert sum(block.language == "python" for block in every) > 40
    assert [block.needs for block in every if block.needs] == ["diffusers"] * 2
    stacks = (ROOT / "tests/test_stacks.py").read_text(encoding="utf-8")
    tests = [block.test for block in every if block.test]
    assert len(tests) == 2
    assert all(f'"{test}"' in stacks for test in tests)


# The README


def test_readme_is_short() -> None:
    assert README.count("\n") <= 150


def test_readme_leaves_what_it_says(apart: Path) -> None:
    pytest.importorskip("transformers")
    session: dict[str, Any] = {"__name__": "readme"}
    for block in blocks("README.md"):
        if block.language == "python":
            run_python("README.md", block, session)
    assert session["loss"].isfinite()
    assert session["switcher"].active == {}
    assert torch.equal(session["model"][0].weight, session["base"])
    assert Adapter.load("style.safetensors").nnz > 0


# The site


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Files that are there or that the site's build draws, and headings of them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    drawn = re.findall(r"^def (\w+)\(", (ROOT / "docs/pictures.py").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        if picture := re.fullmatch(r"(?:\.\./)?pictures/(\w+)\.svg", path):
            assert picture[1] in drawn, f"{page}: {target}"
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor and not anchor.startswith("shira"):
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page}: {target}"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_that_are_named_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:csrc|shira_ops|python|tests|benchmarks|docs)/[\w/.]+\.\w+)`", text)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2].partition("\n\n")[0]
    named = re.findall(r"[\w/-]+\.md", navigation)
    assert sorted(named) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in SITE)


def test_the_reference_has_every_public_name() -> None:
    from shira import combine, masks, metrics, sync
    from shira.integrations import transformers as integration

    modules = ("combine", "masks", "merging", "metrics", "sync")
    wanted = {f"shira.{name}" for name in shira.__all__ if name not in modules}
    for home, module in (("combine", combine), ("masks", masks), ("metrics", metrics), ("sync", sync)):
        wanted |= {f"shira.{home}.{name}" for name in module.__all__}
    wanted |= {f"shira_ops.{name}" for name in shira_ops.__all__}
    # Whole modules, with all that is in them.
    files = (ROOT / "python/shira/integrations").glob("[!_]*.py")
    wanted |= {f"shira.integrations.{file.stem}" for file in files}
    assert integration.__name__ in wanted
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").glob("*.md")]
    there = [name for page in pages for name in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)]
    assert len(there) == len(set(there))
    assert wanted <= set(there), wanted - set(there)


def test_docstrings_become_markdown() -> None:
    """`help()` shows `::` before a block of code; a page must not."""
    pytest.importorskip("griffe")
    specification = importlib.util.spec_from_file_location("docstrings", ROOT / "docs/docstrings.py")
    docstrings = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(docstrings)
    given = "The same::\n\n    a::b\n\n== ==\na  b\n== ==\n1  2\n== ==\n\nend"
    assert docstrings.markdown(given) == (
        "The same:\n\n    a::b\n\n    == ==\n    a  b\n    == ==\n    1  2\n    == ==\n\nend"
    )


# Troubleshooting


def said() -> str:
    """What the packages can say: the pieces of split strings joined, what is filled in left out."""
    files = sorted(file for folder in ("python/shira", "shira_ops") for file in (ROOT / folder).rglob("*.py"))
    files.append(ROOT / "setup.py")
    text = "".join(file.read_text(encoding="utf-8") for file in files).replace("`", "")
    return re.sub(r"\{[^{}]*\}", "...", re.sub(r"([\"'])\s*\n\s*f?\1", "", text))


def test_refusals_that_are_quoted_are_said() -> None:
    """The first column of each table: the message is in the source, with an ellipsis for what is filled in."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").partition("\n## What no message tells\n")[0]
    first = re.findall(r"^\| (.+?) \| ", page, re.MULTILINE)
    quoted = [cell.replace("`", "") for cell in first if cell != "message" and "autograd says" not in cell]
    assert len(quoted) > 60
    source = said()
    assert [message for message in quoted if message not in source] == []
