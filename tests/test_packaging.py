"""What is packed and what is built: the source distribution is whole, and setup.py says what it does and leaves out.

`make compat` installs from the source distribution in earnest, under several versions of torch.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath

import pytest
import torch

import shira_ops
from test_import import python

ROOT = Path(__file__).resolve().parents[1]

# setup.py sees this torch: its version, its GPUs by capability, and what becomes of the extension.
STUB = """
import os
__version__ = "2.11.0"
class version:
    cuda = os.environ.get("STUB_CUDA") or None
class cuda:
    gpus = [tuple(map(int, one.split("."))) for one in os.environ["STUB_GPUS"].split()]
    device_count = staticmethod(lambda: len(cuda.gpus))
    get_device_capability = staticmethod(lambda number: cuda.gpus[number])
"""
STUB_EXTENSION = """
import os
from setuptools import Extension
from setuptools.command.build_ext import build_ext as BuildExtension
include_paths = lambda: ["."]
def CppExtension(name, sources, **options):
    print("targets", os.environ.get("TORCH_CUDA_ARCH_LIST"), "sources", sum(s.endswith(".cu") for s in sources))
    return Extension(name, sources)
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


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
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def test_the_source_distribution_is_whole(sdist: Path) -> None:
    """All of csrc, every module, the types, the tests and their files; nothing that a build leaves."""
    wanted = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "CHANGELOG.md", "CONTRIBUTING.md"}
    for folder in ("csrc", "shira_ops", "python/shira", "tests"):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT)
            built = path.suffix in (".so", ".o", ".pyc", ".part") or "build" in name.parts or path.name == "lock"
            if path.is_file() and not built:
                wanted.add(name.as_posix())
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


# What setup.py decides


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A CUDA toolkit that only says which GPUs it knows."""
    home = tmp_path / "cuda"
    nvcc = write(home / "bin/nvcc", "#!/bin/sh\nprintf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_100\\n'\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    write(home / "include/cuda_runtime.h", "")
    return home


def decided(toolkit: Path, gpus: str, cuda: str = "13.0", **environment: str) -> tuple[str, str]:
    """What setup.py prints before it compiles, and the GPU targets and sources that it would compile."""
    stub = toolkit.parent / "stub"
    write(stub / "torch/__init__.py", STUB)
    write(stub / "torch/utils/__init__.py", "")
    write(stub / "torch/utils/cpp_extension.py", STUB_EXTENSION)
    clean = {name: value for name, value in os.environ.items() if name not in ("TORCH_CUDA_ARCH_LIST", "SHIRA_CUDA")}
    env = {**clean, "PYTHONPATH": str(stub), "CUDA_HOME": str(toolkit), "STUB_GPUS": gpus, "STUB_CUDA": cuda}
    command = [sys.executable, "setup.py", "build_ext", "--help"]
    result = subprocess.run(command, cwd=ROOT, env={**env, **environment}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (said,) = (line for line in result.stderr.splitlines() if line.startswith("shira-ops:"))
    (built,) = (line for line in result.stdout.splitlines() if line.startswith("targets"))
    return said.removeprefix("shira-ops: compiling for torch 2.11.0; CUDA kernels: "), built


@pytest.mark.parametrize(
    ("gpus", "targets"),
    [("9.0", "9.0"), ("9.0 7.0 8.0 9.0", "8.0;9.0"), ("8.9", "8.0+PTX"), ("12.0", "10.0+PTX")],
)
def test_cuda_kernels_for_the_gpus_that_are_here(toolkit: Path, gpus: str, targets: str) -> None:
    """As the toolkit knows them: a newer one than it knows is served by the newest instructions before."""
    said, built = decided(toolkit, gpus)
    assert said == f"of {toolkit} for {targets}, in minutes (SHIRA_CUDA=0 leaves them out)"
    assert built == f"targets {targets} sources {len(list((ROOT / 'csrc/cuda').glob('*.cu')))}"


def test_no_cuda_kernels_without_a_gpu(toolkit: Path) -> None:
    """Neither for a machine without one, nor for one that is too old, unless somebody asks for them."""
    for gpus in ("", "7.5"):
        said, built = decided(toolkit, gpus)
        assert said == (
            "left out, since no GPU of compute capability 8.0 or newer is here (for another machine, set "
            "TORCH_CUDA_ARCH_LIST, as 9.0 for an H100, or SHIRA_CUDA=1 for 8.0;9.0;10.0;12.0+PTX)"
        )
        assert built == "targets None sources 0"
    asked, built = decided(toolkit, "", TORCH_CUDA_ARCH_LIST="9.0+PTX")
    assert asked == f"of {toolkit} for 9.0+PTX, in minutes (SHIRA_CUDA=0 leaves them out)"
    assert built == f"targets 9.0+PTX sources {len(list((ROOT / 'csrc/cuda').glob('*.cu')))}"
    asked, built = decided(toolkit, "9.0", cuda="", SHIRA_CUDA="1")
    assert asked.startswith(f"of {toolkit} for 8.0;9.0;10.0;12.0+PTX")
    said, built = decided(toolkit, "9.0", SHIRA_CUDA="0")
    assert (said, built) == ("none", "targets None sources 0")


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
