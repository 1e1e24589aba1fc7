"""What an import needs and brings, what serves the ops, and that nothing of the contract is forgotten."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import cases
import shira_ops
import shira_ops.reference
from cases import OPS

TESTS = Path(__file__).parent


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Another process with the same import path."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, check=False
    )


def said(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# The contract is whole


def test_every_op_has_a_case_and_a_reference() -> None:
    assert set(cases.op_names()) == set(OPS)
    assert set(shira_ops.reference.OPS) == set(OPS)
    for op in OPS:
        assert shira_ops.reference.OPS[op] is cases.REFERENCE.find(op)


@pytest.mark.parametrize("op", [op for op in OPS if "." not in op])
def test_public_functions(op: str) -> None:
    """One per op: named, documented, with the schema's arguments in its order, and its defaults."""
    function = getattr(shira_ops, op)
    assert op in shira_ops.__all__
    assert inspect.getdoc(function)
    parameters = inspect.signature(function).parameters
    schema = cases.schema_of(op).arguments
    assert list(parameters) == [a.name for a in schema]
    for a in schema:
        p = parameters[a.name]
        assert (p.kind is inspect.Parameter.KEYWORD_ONLY) == a.kwarg_only, a.name
        assert p.annotation is not inspect.Parameter.empty
        if a.has_default_value():
            assert p.default == a.default_value, a.name


@pytest.mark.parametrize("op", OPS)
def test_references_take_the_schemas_arguments(op: str) -> None:
    parameters = inspect.signature(cases.REFERENCE.find(op)).parameters
    schema = cases.schema_of(op).arguments
    assert list(parameters) == [a.name for a in schema]
    for a in schema:
        assert (parameters[a.name].kind is inspect.Parameter.KEYWORD_ONLY) == a.kwarg_only, a.name
        if a.has_default_value():
            assert parameters[a.name].default == a.default_value, a.name


def test_public_names_exist() -> None:
    assert sorted(set(shira_ops.__all__)) == sorted(shira_ops.__all__)
    assert all(hasattr(shira_ops, name) for name in shira_ops.__all__)


def test_every_schema_ends_in_granule() -> None:
    """Options that came later follow it by name."""
    for op in OPS:
        names = [argument.name for argument in cases.schema_of(op).arguments]
        later = cases.schema_of(op).arguments[names.index("granule") + 1 :]
        assert cases.schema_of(op).arguments[names.index("granule")].default_value == 1, op
        assert all(one.kwarg_only and one.has_default_value() for one in later), op


# What serves them


def test_backends() -> None:
    """Every op, both devices, and a reason. Asked for the references, they serve everything."""
    served = shira_ops.backends()
    assert set(served) == set(OPS)
    for op, devices in served.items():
        assert set(devices) == {"cpu", "cuda"}, op
        for device, backend in devices.items():
            assert backend.name in ("compiled", "triton", "reference", "none"), (op, device)
            assert backend.why
        if os.environ.get("SHIRA_BACKEND") == "reference":
            assert devices["cpu"].name == "reference"
        else:
            assert devices["cpu"].name in ("compiled", "reference")
    served.clear()
    assert shira_ops.backends()


def test_the_switch_family_is_compiled_on_the_cpu() -> None:
    if os.environ.get("SHIRA_BACKEND") == "reference":
        pytest.skip("the references were asked for")
    served = shira_ops.backends()
    switch = ("gather", "scatter_", "swap_", "apply_", "switch_", "scatter_add_", "check_indices")
    for op in (*switch, *(f for f in cases.FOREACH_OPS if f.removeprefix("foreach_") in switch)):
        assert served[op]["cpu"].name == "compiled", op


def test_references_serve_every_op() -> None:
    """A process with SHIRA_BACKEND=reference runs a subset of these tests through the dispatcher."""
    chosen = "dispatcher or test_opcheck"
    files = ("switch", "fuse", "gradient", "optimize", "select", "fingerprint", "refusals", "autograd", "compile")
    arguments = ["-q", "-x", "-m", "subset", "-k", chosen, "-p", "no:cacheprovider", "-p", "no:xdist"]
    arguments += [str(TESTS / "ops" / f"test_{name}.py") for name in files]
    arguments += [f"{TESTS / 'test_import.py'}::test_backends"]
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    environment = {"SHIRA_BACKEND": "reference", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    result = python(code, *arguments, **environment)
    assert result.returncode == 0, result.stdout[-4000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) > 500
    assert "skipped" not in result.stdout.splitlines()[-1]


def test_an_unknown_backend_is_refused() -> None:
    result = python("import shira_ops", SHIRA_BACKEND="fast")
    assert result.returncode != 0
    wanted = "SHIRA_BACKEND must be one of cuda, triton, reference or not set, got 'fast'"
    assert wanted in result.stderr


@pytest.mark.parametrize("choice", ["cuda", "triton", ""])
def test_other_backends_leave_the_cpu_alone(choice: str) -> None:
    code = "import shira_ops; print(shira_ops.backends()['swap_']['cpu'].name)"
    assert said(python(code, SHIRA_BACKEND=choice)) == "compiled"


# What an import needs


_BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in blocked:
            raise ImportError(f'{name} is not there')

blocked = set(sys.argv[1:])
sys.meta_path.insert(0, Block())
"""


def required_by(*distributions: str) -> set[str]:
    """These distributions and all that they require, whether installed or not."""
    needed: set[str] = set()
    waiting = list(distributions)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in needed:
            continue
        needed.add(name)
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [re.match(r"[\w.-]+", r)[0] for r in requires if "extra ==" not in r]
    return needed


def not_needed_by(*distributions: str) -> list[str]:
    """Top-level modules of everything installed that these distributions do not require."""
    needed = required_by(*distributions)
    blocked = []
    for module, owners in metadata.packages_distributions().items():
        names = {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}
        if not names & {*needed, "shira-ops"} and not module.startswith("_"):
            blocked.append(module)
    return blocked


def test_shira_ops_needs_torch_and_numpy_alone() -> None:
    blocked = not_needed_by("torch", "numpy")
    assert "pytest" in blocked
    assert "numpy" not in blocked
    code = f"{_BLOCK}import torch, shira_ops\nw = torch.zeros(4)\nv = torch.ones(1)\n"
    code += "shira_ops.swap_(w, torch.tensor([2]), v)\nprint(w.tolist(), 'shira' in sys.modules)"
    assert said(python(code, *blocked)) == "[0.0, 0.0, 1.0, 0.0] False"


def test_import_shira_does_not_import_torch() -> None:
    """Reading a file or asking for help does not wait for torch."""
    code = "import sys, shira; print(sorted({'torch', 'shira_ops', 'numpy', 'safetensors'} & set(sys.modules)))"
    assert said(python(code)) == "[]"


def test_import_gives_no_warning() -> None:
    assert said(python("import warnings; warnings.simplefilter('error'); import shira_ops; print('quiet')")) == "quiet"


def test_dir_of_shira_is_its_public_names() -> None:
    """Before anything of it was used, and without what the module imports for itself."""
    code = "import shira; print(sorted(set(shira.__all__) ^ {name for name in dir(shira) if name[0] != '_'}))\n"
    code += "import shira.integrations; print('integrations' in dir(shira), 'sys' in dir(shira), shira.__version__)"
    assert said(python(code)) == f"[]\nTrue False {metadata.version('shira-ops')}"
