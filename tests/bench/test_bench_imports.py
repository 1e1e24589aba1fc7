"""No module of the benchmarks imports itself through others, so each can be read after what it builds on."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imports(root: Path, package: str) -> dict[str, set[str]]:
    """For each module of the package, the others of it that it imports: at its top, in functions, for types."""
    files = {}
    for path in (root / package).rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        inside = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        names = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = inside[: len(inside) - node.level + 1] if node.level else []
                full = ".".join([*start, *filter(None, [node.module])])
                names += [f"{full}.{alias.name}" for alias in node.names]
        found[module] = set()
        for name in names:
            while name and name not in files:  # a name in a module counts as the module
                name = name.rpartition(".")[0]
            if name and name != module:
                found[module].add(name)
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, in order, or nothing."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_the_benchmarks_have_no_circle_of_imports() -> None:
    graph = imports(ROOT, "benchmarks")
    # The graph is not empty: two imports that are there are in it.
    assert "benchmarks.speed.summary" in graph["benchmarks.speed.results"]
    assert "benchmarks.quality.tables" in graph["benchmarks.quality.report"]
    assert circle(graph) == []


def test_speed_and_quality_do_not_import_each_other() -> None:
    graph = imports(ROOT, "benchmarks")
    for one, other in (("speed", "quality"), ("quality", "speed")):
        crossing = {
            (module, name)
            for module, names in graph.items()
            for name in names
            if module.startswith(f"benchmarks.{one}") and name.startswith(f"benchmarks.{other}")
        }
        assert not crossing


def test_what_runs_on_a_gpu_needs_no_other_package() -> None:
    """`make gpu` runs where there are torch, triton and numpy alone; others are imported where they are found."""
    graph, wanted, seen = imports(ROOT, "benchmarks"), ["benchmarks.speed.gpu"], set()
    wanted += [module for module in graph if module.startswith("benchmarks.speed.gpu_")]
    while wanted:
        module = wanted.pop()
        if module not in seen:
            seen.add(module)
            wanted += graph[module]
    assert "benchmarks.speed.samples" in seen
    allowed = {*sys.stdlib_module_names, "benchmarks", "numpy", "shira", "shira_ops", "torch", "triton"}
    for module in seen:
        path = ROOT / module.replace(".", "/")
        source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
        for node in ast.parse(source).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= allowed, module


def test_every_command_can_be_run_as_a_module() -> None:
    """A module with a `main` calls it when it is run with `python -m`."""
    commands = [path for path in (ROOT / "benchmarks").rglob("*.py") if "\ndef main(" in path.read_text()]
    assert len(commands) > 8
    for path in commands:
        assert re.search(r'\nif __name__ == "__main__":\n    (?:sys\.exit\()?main\(\)', path.read_text()), path


@pytest.mark.parametrize(
    ("second", "found"),
    [
        ("from made import first\n", True),
        ("def late():\n    from . import first\n", True),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import made.first\n", True),
        ("from .first import name\n", True),
        ("import first\n", False),  # a module of someone else
        ("", False),
    ],
    ids=["from the package", "in a function", "for types", "relative", "another's", "none"],
)
def test_a_circle_is_found(tmp_path: Path, second: str, found: bool) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "__init__.py").write_text("")
    (tmp_path / "made" / "first.py").write_text("import made.second\nname = 1\n")
    (tmp_path / "made" / "second.py").write_text(second)
    assert bool(circle(imports(tmp_path, "made"))) is found
