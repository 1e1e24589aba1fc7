"""What is packed and what is built: the source distribution and the wheel are whole, the wheel works where it is
installed, and setup.py says what it compiles and what it leaves out.

The wheel here is packed from the modules that are built in place already. `make wheel` builds one from the source
distribution, with its own compile, and runs the tests of the wheel on that (SHIRA_WHEEL names it); `make compat`
installs from the source distribution under several versions of torch.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pytest
import torch

import shira._codec
import shira_ops
from test_import import python, required_by

ROOT = Path(__file__).resolve().parents[1]
CUDA_SOURCES = len(list((ROOT / "csrc/cuda").glob("*.cu")))

# A torch for setup.py to see: its version, its GPUs by capability, and what becomes of the extension.
STUB = """
import os
__version__ = "2.11.0"
class version:
    cuda = os.environ.get("STUB_CUDA") or None
class cuda:
    gpus = [tuple(map(int, one.split("."))) for one in os.environ.get("STUB_GPUS", "").split()]
    device_count = staticmethod(lambda: len(cuda.gpus))
    get_device_capability = staticmethod(lambda number: cuda.gpus[number])
"""
STUB_EXTENSION = """
import json, os
from setuptools import Extension
from setuptools.command.build_ext import build_ext as BuildExtension
include_paths = lambda: ["."]
def CppExtension(name, sources, **options):
    targets = os.environ.get("TORCH_CUDA_ARCH_LIST")
    print("built", json.dumps({"targets": targets, "sources": sources, "flags": options["extra_compile_args"]}))
    return Extension(name, sources)
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def stub_torch(folder: Path) -> str:
    """The folder that PYTHONPATH must name for setup.py to see the torch above."""
    write(folder / "torch/__init__.py", STUB)
    write(folder / "torch/utils/__init__.py", "")
    write(folder / "torch/utils/cpp_extension.py", STUB_EXTENSION)
    return str(folder)


def files_under(folder: Path) -> set[str]:
    """The files of a folder, except those that a build leaves in it."""
    built = (".so", ".o", ".pyc", ".part")
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in built and "build" not in path.parts and path.name != "lock"
    }


# The source distribution


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder), "sdist", "-d", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        # Python 3.10 and 3.11 have the filter from their later patches on only.
        file.extractall(folder / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def test_the_source_distribution_is_whole(sdist: Path) -> None:
    """All of csrc, every module, the types, the tests and their files; nothing that a build leaves behind."""
    wanted = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "CHANGELOG.md", "CONTRIBUTING.md"}
    wanted |= {"build.toml", "CITATION.cff", "SECURITY.md"}
    for folder in ("csrc", "shira_ops", "python/shira", "tests"):
        wanted |= {f"{folder}/{name}" for name in files_under(ROOT / folder)}
    wanted = {name for name in wanted if not name.startswith("tests/bench/")}  # whose benchmarks are not packed
    packed = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    assert wanted - packed == set()
    assert [name for name in packed if PurePosixPath(name).suffix in (".so", ".o", ".pyc")] == []
    for name in wanted:
        assert (sdist / name).read_bytes() == (ROOT / name).read_bytes(), name


def test_every_header_that_is_included_is_packed(sdist: Path) -> None:
    sources = [path for kind in ("*.h", "*.cpp", "*.cu") for path in (sdist / "csrc").rglob(kind)]
    assert len(sources) > 40
    found = 0
    for source in sources:
        for header in re.findall(r'^#include "([^"]+)"', source.read_text(), re.MULTILINE):
            places = (source.parent / header, sdist / "tests/emul" / header)
            assert any(place.is_file() for place in places), f"{source.name} includes {header}"
            found += 1
    assert found > 80


# The wheel


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one that SHIRA_WHEEL names; without it one of the modules that are built in place, packed by setup.py."""
    if named := os.environ.get("SHIRA_WHEEL"):
        return Path(named).resolve(strict=True)
    folder = tmp_path_factory.mktemp("wheel")
    built = folder / "lib"
    for module in (shira_ops._C, shira._codec):
        place = built / module.__name__.partition(".")[0]
        place.mkdir(parents=True)
        shutil.copy(module.__file__, place)
    # Nothing is compiled here, so the stub serves: it is imported much faster than torch.
    environment = {
        **os.environ,
        "PYTHONPATH": stub_torch(folder / "stub"),
        "DIST_EXTRA_CONFIG": str(write(folder / "extra.cfg", f"[build]\nbuild_lib = {built}\n")),
        "SHIRA_CUDA": "0",
    }
    command = [sys.executable, "setup.py", "-q", "build_py", "bdist_wheel", "--skip-build", "-d", str(folder)]
    result = subprocess.run(command, cwd=sdist, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (packed,) = folder.glob("*.whl")
    return packed


def test_the_wheel_holds_the_packages_as_they_are(wheel: Path) -> None:
    """Every file of shira_ops and shira, and the two compiled modules; nothing else is installed."""
    wanted = {f"shira_ops/{name}" for name in files_under(ROOT / "shira_ops")}
    wanted |= {f"shira/{name}" for name in files_under(ROOT / "python/shira")}
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if ".dist-info/" not in name and name[-1] != "/"}
        for name in wanted & packed:
            source = ROOT / ("python" if name.startswith("shira/") else "") / name
            assert file.read(name) == source.read_bytes(), name
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert packed == wanted | {"shira_ops/_C.abi3.so", f"shira/_codec{suffix}"}


def lend(site: Path, *distributions: str) -> None:
    """Links what is installed here, and what it requires, into the site-packages of another environment."""
    for name in required_by(*distributions):
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another platform
            continue
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            (site / top).symlink_to(found.locate_file(top))


def test_the_wheel_works_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own that has torch and numpy, what these require, and nothing else."""
    venv.create(tmp_path / "venv", symlinks=True)
    interpreter = tmp_path / "venv/bin/python"
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    lend(site, "torch", "numpy")
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    # installed.py empties the PATH.
    command = [str(interpreter), "-I", "-W", "error", str(ROOT / "tests/installed.py")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("shira-ops works here: ")


# What setup.py decides


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A CUDA toolkit that only says which GPUs it knows."""
    home = tmp_path / "cuda"
    nvcc = write(home / "bin/nvcc", "#!/bin/sh\nprintf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_100\\n'\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    write(home / "include/cuda_runtime.h", "")
    return home


class Built(NamedTuple):
    """What setup.py would compile."""

    targets: str | None
    sources: list[str]
    flags: dict[str, list[str]]

    @property
    def cuda(self) -> tuple[str | None, int]:
        """The GPU targets, and the number of CUDA sources."""
        return self.targets, sum(source.endswith(".cu") for source in self.sources)


def decided(toolkit: Path, gpus: str, cuda: str = "13.0", **environment: str) -> tuple[str, Built]:
    """What setup.py prints before it compiles, and what it would compile."""
    stub = stub_torch(toolkit.parent / "stub")
    clean = {name: value for name, value in os.environ.items() if name not in ("TORCH_CUDA_ARCH_LIST", "SHIRA_CUDA")}
    env = {**clean, "PYTHONPATH": stub, "CUDA_HOME": str(toolkit), "STUB_GPUS": gpus, "STUB_CUDA": cuda}
    command = [sys.executable, "setup.py", "build_ext", "--help"]
    result = subprocess.run(command, cwd=ROOT, env={**env, **environment}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (said,) = (line for line in result.stderr.splitlines() if line.startswith("shira-ops:"))
    (built,) = (line for line in result.stdout.splitlines() if line.startswith("built"))
    said = said.removeprefix("shira-ops: compiling for torch 2.11.0; CUDA kernels: ")
    return said, Built(**json.loads(built.removeprefix("built ")))


@pytest.mark.parametrize(
    ("gpus", "targets"),
    [("9.0", "9.0"), ("9.0 7.0 8.0 9.0", "8.0;9.0"), ("8.9", "8.0+PTX"), ("12.0", "10.0+PTX")],
)
def test_cuda_kernels_for_the_gpus_that_are_here(toolkit: Path, gpus: str, targets: str) -> None:
    """As the toolkit knows them: a newer one than it knows is served by the newest instructions before."""
    said, built = decided(toolkit, gpus)
    assert said == f"of {toolkit} for {targets}, in minutes (SHIRA_CUDA=0 leaves them out)"
    assert built.cuda == (targets, CUDA_SOURCES)


def test_no_cuda_kernels_without_a_gpu(toolkit: Path) -> None:
    """Neither for a machine without one, nor for one that is too old, unless somebody asks for them."""
    for gpus in ("", "7.5"):
        said, built = decided(toolkit, gpus)
        assert said == (
            "left out, since no GPU of compute capability 8.0 or newer is here (for another machine, set "
            "TORCH_CUDA_ARCH_LIST, as 9.0 for an H100, or SHIRA_CUDA=1 for 8.0;9.0;10.0;12.0+PTX)"
        )
        assert built.cuda == (None, 0)
    asked, built = decided(toolkit, "", TORCH_CUDA_ARCH_LIST="9.0+PTX")
    assert asked == f"of {toolkit} for 9.0+PTX, in minutes (SHIRA_CUDA=0 leaves them out)"
    assert built.cuda == ("9.0+PTX", CUDA_SOURCES)
    asked, built = decided(toolkit, "9.0", cuda="", SHIRA_CUDA="1")
    assert asked.startswith(f"of {toolkit} for 8.0;9.0;10.0;12.0+PTX")
    said, built = decided(toolkit, "9.0", SHIRA_CUDA="0")
    assert (said, built.cuda) == ("none", (None, 0))


# The kernel builder


def kernel_config() -> dict[str, Any]:
    toml = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return toml.loads((ROOT / "build.toml").read_text())


def test_the_kernel_builder_compiles_what_setup_py_does(toolkit: Path) -> None:
    """The same sources, for the same GPUs, and every flag that decides about bits; a header that is not listed would be
    missing there."""
    config = kernel_config()
    torch_part, cpu, cuda = config["torch"], config["kernel"]["cpu"], config["kernel"]["cuda"]
    _, built = decided(toolkit, "", SHIRA_CUDA="1")

    listed = [Path(name) for name in torch_part["src"] + cuda["src"]]
    assert len(set(listed)) == len(listed)
    assert {str(path) for path in listed if path.suffix != ".h"} == set(built.sources)
    headers = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.h")}
    assert {path for path in listed if path.suffix == ".h"} == headers
    assert cpu["src"] == ["csrc/library.cpp"]
    assert ";".join(cuda["cuda-capabilities"]) == built.targets
    assert config["torch"]["stable-abi"] == {"cpu": "2.11", "cuda": "2.11"}

    namespace = "-DSHIRA_NAMESPACE=TORCH_EXTENSION_NAME"
    cxx = [flag for flag in built.flags["cxx"] if not flag.startswith(("-W", "-g"))]
    assert torch_part["cxx-flags"] == cpu["cxx-flags"] == [*cxx, namespace]
    assert cuda["cxx-flags"] == [*cxx, namespace, "-DSHIRA_WITH_CUDA=1"]
    nvcc = [flag for flag in built.flags["nvcc"] if not flag.startswith(("--threads", "-DSHIRA_HEADERS_KEY"))]
    assert cuda["cuda-flags"] == [*nvcc, namespace]


def test_the_namespace_is_named_in_one_place() -> None:
    """In csrc/stable.h and shira_ops/_ops.py, so that a build can have its own, as the emulator's has."""
    for path in (*(ROOT / "csrc").rglob("*.[ch]*"), *(ROOT / "tests/emul").glob("*.[ch]*")):
        if path.name != "stable.h" and path.suffix in (".h", ".cpp", ".cu"):
            registers = re.findall(r"STABLE_TORCH_LIBRARY\w*|\"shira\w*::", path.read_text())
            assert registers == [], f"{path.name}: SHIRA_LIBRARY, SHIRA_LIBRARY_IMPL and SHIRA_OP know the namespace"
    for path in (ROOT / "shira_ops").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if path.name != "_ops.py" else ():
            says = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            names = says == "shira" or "shira::" in says
            names |= isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops"
            assert not names, f"{path.name}, line {node.lineno}: shira_ops/_ops.py knows the namespace"


_WITHOUT_TORCH = """
import os, runpy, sys
sys.path = [place for place in sys.path if not place.endswith("-packages")] + [os.environ["ONLY"]]
sys.argv = ["setup.py", "egg_info"]
runpy.run_path("setup.py")
"""


@pytest.mark.parametrize("folder", ["pip-build-env-ab1c/overlay", "uv/builds-v0/.tmpAb1", "site"])
def test_a_build_that_sees_no_torch(tmp_path: Path, folder: str) -> None:
    """In an environment of its own it says so, instead of that there is no torch."""
    only = tmp_path / folder
    only.mkdir(parents=True)
    for package in ("setuptools", "_distutils_hack"):
        (only / package).symlink_to(Path(sys.modules["torch"].__file__).parents[1] / package)
    env = {**os.environ, "PYTHONPATH": "", "ONLY": str(only)}
    command = [sys.executable, "-c", _WITHOUT_TORCH]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    needed = "shira-ops: the kernels are compiled against the torch you use, and"
    if folder == "site":
        assert f"{needed} there is none here (No module named 'torch'). Run" in result.stderr
    else:
        hidden = f"this build cannot see torch {torch.__version__}"
        says = f"{needed} {hidden}: it runs in an environment of its own (build isolation). Run"
        assert says in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr


def test_an_old_setuptools_is_refused() -> None:
    """In a sentence: it would call the licence in pyproject.toml an invalid configuration."""
    code = "import runpy, setuptools; setuptools.__version__ = '65.5.0'; runpy.run_path('setup.py')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "shira-ops: setuptools 77 or newer is needed, this is 65.5.0. Run" in result.stderr
    assert "pip install 'torch>=2.11' 'setuptools>=77' wheel ninja pybind11" in result.stderr


_FIRST_ON_THE_PATH = """
import sys
sys.path[:0] = sys.argv[1:]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
"""
# What setuptools' finder does for an editable install.
_LENT = """
from importlib.machinery import PathFinder

class Lends:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "shira_ops._C":
            return PathFinder.find_spec(name, [sys.argv[2] + "/shira_ops"])

sys.meta_path.append(Lends)
"""


@pytest.mark.parametrize("editable", [False, True])
def test_sources_that_hide_the_installed_package(tmp_path: Path, editable: bool) -> None:
    """As in the checkout after `pip install .`: Python looks there first. An editable install of another checkout
    would even lend its compiled module."""
    source, installed = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(ROOT / "shira_ops", source / "shira_ops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    library = Path(shira_ops._C.__file__)
    (installed / "shira_ops").mkdir(parents=True)
    (installed / "shira_ops" / library.name).symlink_to(library)
    code = _FIRST_ON_THE_PATH if not editable else _FIRST_ON_THE_PATH + _LENT
    result = python(f"{code}\nimport shira_ops", str(source), str(installed))
    assert result.returncode == 1
    assert (
        f"This shira_ops is the source folder {source / 'shira_ops'}, which has no compiled module, and it hides the "
        f"installed one in {installed / 'shira_ops'}, since Python looks here first. Start Python in another folder"
    ) in result.stderr
