"""How the library is built: which module may import which, and that the names of version 0.1 still lead there."""

from __future__ import annotations

import ast
import base64
import importlib
import pickle
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch

import shira
from shira import _moved
from test_import import python, said

LIBRARY = Path(shira.__file__).parent
# From the bottom up: what a module imports is in its own layer or below. Whatever is not named here is the base.
LAYERS = (("adapter",), ("masks",), ("train", "serve"), ("metrics", "integrations", "sync", "cli", "demo"))
APART = ("train", "serve")
# These lead to all others by name, and import nothing until they are asked.
FACES = ("shira", "shira._moved")


def sources() -> dict[str, str]:
    """Every module of the library by name; of a package, its ``__init__``; of a compiled one, its types."""
    found = {}
    for path in LIBRARY.rglob("*.py*"):
        if path.suffix not in (".py", ".pyi"):
            continue
        parts = [p for p in path.relative_to(LIBRARY).with_suffix("").parts if p != "__init__"]
        found[".".join(["shira", *parts])] = path.read_text(encoding="utf-8")
    return found


def wing(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def layer(module: str) -> int:
    return next((at for at, wings in enumerate(LAYERS, 1) if wing(module) in wings), 0)


class _Imports(ast.NodeVisitor):
    """What a source imports of the library, wherever in it: (module, its part or "", whether for types alone)."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str, bool]] = []
        self.computed = self.typing = False

    def visit_If(self, node: ast.If) -> None:
        before = self.typing
        self.typing = before or ast.unparse(node.test).removeprefix("typing.") == "TYPE_CHECKING"
        for inner in node.body:
            self.visit(inner)
        self.typing = before
        for inner in (node.test, *node.orelse):
            self.visit(inner)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(alias.name, "", self.typing) for alias in node.names if alias.name.startswith("shira")]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert not node.level, f"a relative import: {ast.unparse(node)}"
        self.found += [(node.module or "", alias.name, self.typing) for alias in node.names]

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        self.computed |= name in ("import_module", "__import__")
        self.generic_visit(node)


@cache
def imports(source: str) -> _Imports:
    visitor = _Imports()
    visitor.visit(ast.parse(source))
    return visitor


def imported(source: str, modules: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    """The modules of the library that a source imports, and whether for types alone."""
    for module, part, typing in imports(source).found:
        if module.partition(".")[0] == "shira":
            yield (f"{module}.{part}" if f"{module}.{part}" in modules else module), typing


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """One circle for each import that closes one."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> None:
        if module in way:
            found.append([*way[way.index(module) :], module])
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                walk(other, [*way, module])
            done.add(module)

    for module in graph:
        walk(module, [])
    return found


def wrong(modules: Mapping[str, str]) -> list[str]:
    """Every import that the layers forbid, as a sentence."""
    problems = []
    graph: dict[str, set[str]] = {}
    for module, source in modules.items():
        if module in FACES:
            continue
        for other, typing in imported(source, modules):
            if {wing(module), wing(other)} == set(APART):
                problems.append(f"{module} names {other}: {' and '.join(APART)} do not know each other")
            if typing:
                continue
            if other == "shira" and layer(module) < len(LAYERS):
                problems.append(f"{module} imports shira itself, which leads to everything; import from the module")
            if layer(other) > layer(module):
                problems.append(f"{module} imports {other}, which is above it")
            if other not in FACES:
                graph.setdefault(module, set()).add(other)
        if imports(source).computed:
            problems.append(f"{module} imports by a computed name, which nobody can follow")
    return [*problems, *(f"a circle: {' -> '.join(circle)}" for circle in circles(graph))]


def test_imports_run_downwards_and_never_in_a_circle() -> None:
    modules = sources()
    assert len(modules) > 30
    assert {wing(module) for module in modules} >= {"adapter", "masks", "train", "serve", "integrations"}
    assert wrong(modules) == []


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("shira._fit", "def f():\n    from shira.adapter import adapter", "_fit imports shira.adapter.adapter, which"),
        ("shira._fit", "from shira.adapter.adapter import Adapter", "imports shira.adapter.adapter, which is above it"),
        ("shira.adapter.hub", "with x:\n    import shira.masks.masks", "imports shira.masks.masks, which is above it"),
        ("shira.masks.masks", "from shira import Adapter", "shira.masks.masks imports shira itself"),
        ("shira.train.tuner", "from shira.serve.switcher import Switcher", "train and serve do not know each other"),
        ("shira.serve._shelf", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import shira.train.tuner",
         "shira.serve._shelf names shira.train.tuner"),
        ("shira.adapter._file", "def f():\n    from shira.adapter.adapter import Adapter", "a circle: "),
        ("shira._text", "import importlib\nimportlib.import_module('shira.adapter')", "by a computed name"),
    ],
)  # fmt: skip
def test_what_would_be_wrong_is_found(module: str, source: str, says: str) -> None:
    found = wrong({**sources(), module: source})
    assert any(says in problem for problem in found), found


def test_imports_for_types_may_look_up() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from shira.adapter.adapter import Adapter\n"
    assert wrong({**sources(), "shira._text": source}) == []
    assert wrong({**sources(), "shira._text": f"{source}else:\n    import shira.cli"}) != []


# Names of version 0.1


@pytest.mark.parametrize("name", sorted(_moved.NAMES))
def test_modules_of_version_0_1(name: str) -> None:
    old, new = importlib.import_module(name), importlib.import_module(_moved.NAMES[name])
    assert old is new or name == "shira.difference"
    assert getattr(shira, name.partition(".")[2]) is old
    assert set(getattr(new, "__all__", ())) <= set(dir(old))


def test_functions_of_version_0_1() -> None:
    """In a new process, each as it was imported then."""
    code = """
import shira
assert shira.optim.AdamW is shira.AdamW and shira.hub.FILE.endswith(".safetensors")
from shira.merge import merge
from shira.mask import Rand, from_description
from shira.peft import from_peft, to_peft
from shira.difference import Lost, Progress, Report, difference
from shira.adapter import Adapter, AdapterError, Entry
import shira.merging, shira.tuner, shira.masks, torch
made = difference({"w": torch.zeros(4)}, {"w": torch.tensor([0.0, 1, 0, 2])}, alpha=0.5)
print(type(made) is Adapter, made.nnz, made.alpha, shira.merging.ties is shira.combine.ties, Rand is shira.masks.Rand)
print(from_peft.__func__ is Adapter.from_peft.__func__, to_peft is Adapter.to_peft, shira.tuner.SparseTuner.__name__)
"""
    assert said(python(code)).split() == ["True", "2", "0.5", "True", "True", "True", "True", "SparseTuner"]


# Written by version 0.1: {"adapter": an Adapter of the weight "w", "mask": a Rand, "report": a Report}.
PICKLE = """
gASVygQAAAAAAAB9lCiMB2FkYXB0ZXKUjA1zaGlyYS5hZGFwdGVylIwHQWRhcHRlcpSTlCmBlH2UKIwHd2VpZ2h0c5R9lIwBd5RoAowFRW50cnmUk5Qp
gZR9lCiMB2luZGljZXOUjAx0b3JjaC5fdXRpbHOUjBJfcmVidWlsZF90ZW5zb3JfdjKUk5QojA10b3JjaC5zdG9yYWdllIwQX2xvYWRfZnJvbV9ieXRl
c5STlEIBAQAAgAKKCmz8nEb5IGqoUBkugAJN6QMugAJ9cQAoWBAAAABwcm90b2NvbF92ZXJzaW9ucQFN6QNYDQAAAGxpdHRsZV9lbmRpYW5xAohYCgAA
AHR5cGVfc2l6ZXNxA31xBChYBQAAAHNob3J0cQVLAlgDAAAAaW50cQZLBFgEAAAAbG9uZ3EHSwR1dS6AAihYBwAAAHN0b3JhZ2VxAGN0b3JjaApJbnRT
dG9yYWdlCnEBWA4AAAA5NDM3MTA3MDQxODExMnECWAMAAABjcHVxA0sCTnRxBFEugAJdcQBYDgAAADk0MzcxMDcwNDE4MTEycQFhLgIAAAAAAAAAAQAA
AAUAAACUhZRSlEsASwKFlEsBhZSJjAtjb2xsZWN0aW9uc5SMC09yZGVyZWREaWN0lJOUKVKUdJRSlIwGdmFsdWVzlGgRKGgUQgMBAACAAooKbPycRvkg
aqhQGS6AAk3pAy6AAn1xAChYEAAAAHByb3RvY29sX3ZlcnNpb25xAU3pA1gNAAAAbGl0dGxlX2VuZGlhbnECiFgKAAAAdHlwZV9zaXplc3EDfXEEKFgF
AAAAc2hvcnRxBUsCWAMAAABpbnRxBksEWAQAAABsb25ncQdLBHV1LoACKFgHAAAAc3RvcmFnZXEAY3RvcmNoCkZsb2F0U3RvcmFnZQpxAVgOAAAAOTQz
NzEwNjk3MDk3MjhxAlgDAAAAY3B1cQNLAk50cQRRLoACXXEAWA4AAAA5NDM3MTA2OTcwOTcyOHEBYS4CAAAAAAAAAAAAAD8AAEDAlIWUUpRLAEsChZRL
AYWUiWgcKVKUdJRSlIwFc2hhcGWUSwJLBIaUjAVkdHlwZZSMBXRvcmNolIwHZmxvYXQzMpSTlIwHZ3JhbnVsZZRLAYwLZmluZ2VycHJpbnSUigkBAAAA
AAAAgACMBHNlZWSUTowHYWxpYXNlc5SMC2hlYWQud2VpZ2h0lIWUjAdjaGVja2VklIl1YnOMBWFscGhhlEc/4AAAAAAAAIwFZGVsdGGUiIwEbWFza5R9
lIwEbmFtZZSMBFJhbmSUc4wKcHJvdmVuYW5jZZR9lIwBYZRdlEsBYXOMBnJlcG9ydJROdWJoOIwKc2hpcmEubWFza5SMBFJhbmSUk5QpgZR9lCiMB2Rl
bnNpdHmURz+5mZmZmZmajAFylE5oL0sEjARza2lwlCloMUsHdWJoQIwQc2hpcmEuZGlmZmVyZW5jZZSMBlJlcG9ydJSTlCmBlH2UKGgHfZRoCWhJjARM
b3N0lJOUKYGUfZQojAdlbnRyaWVzlEsIjAdjaGFuZ2VklEsDjARrZXB0lEsCjARsb3N0lEc/uZmZmZmZmowHc3F1YXJlZJRHQBAAAAAAAAB1YnOMBW5v
dGVzlIwGYSBub3RllIWUdWJ1Lg==
"""


def test_a_pickle_of_version_0_1() -> None:
    data = base64.b64decode(PICKLE)
    for path in (b"shira.adapter", b"shira.mask", b"shira.difference"):
        assert path + b"\n" in data or path in data
    found = pickle.loads(data)
    adapter, mask, report = found["adapter"], found["mask"], found["report"]
    assert type(adapter) is shira.Adapter
    assert type(adapter.weights["w"]) is shira.Entry
    assert adapter.weights["w"].indices.tolist() == [1, 5]
    assert torch.equal(adapter.weights["w"].values, torch.tensor([0.5, -3.0]))
    assert (adapter.alpha, adapter.delta, adapter.mask, adapter.provenance) == (0.5, True, {"name": "Rand"}, {"a": [1]})
    assert (adapter.weights["w"].shape, adapter.weights["w"].fingerprint) == ((2, 4), 2**63 + 1)
    assert adapter.weights["w"].aliases == ("head.weight",)
    assert type(mask) is shira.masks.Rand
    assert torch.equal(
        mask("w", torch.zeros(8, 16)), shira.masks.Rand(density=0.1, granule=4, seed=7)("w", torch.zeros(8, 16))
    )
    assert report.weights["w"].kept == 2
    assert str(report).startswith("3 entries changed in 1 weights, 2 kept")
    # And what is pickled now is read again.
    again = pickle.loads(pickle.dumps(found))
    assert torch.equal(again["adapter"].weights["w"].values, adapter.weights["w"].values)
