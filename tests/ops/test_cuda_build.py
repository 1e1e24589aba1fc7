"""The CUDA sources under nvcc, where there is one: they compile for every GPU they are shipped for, and no kernel
spills registers or keeps arrays in local memory. Without a toolkit there is one in NVIDIA's wheels, for example

    pip install --no-deps --target toolkit nvidia-{cuda-nvcc,cuda-crt,cuda-runtime,cuda-cccl,nvvm}'==13.0.*'
    CUDA_HOME=$PWD/toolkit/nvidia/cu13 .venv/bin/python -m pytest -rP tests/ops/test_cuda_build.py

All of the targets of a wheel take minutes. By default this compiles for Hopper alone;
SHIRA_TEST_CUDA_ARCHS="80;90;100;120" names others. After a build with SHIRA_CUDA=1, which compiles for all of them, the
last test reads them from the library itself and lists every kernel:

    SHIRA_CUDA=1 make build && .venv/bin/python -m pytest -rP tests/ops/test_cuda_build.py -k finished
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import shira_ops

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHS = os.environ.get("SHIRA_TEST_CUDA_ARCHS", "90").split(";")


def nvcc() -> str:
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = shutil.which("nvcc")
    if found:
        candidates.append(str(Path(found).resolve().parents[1]))
    for home in filter(None, candidates):
        if (Path(home) / "bin/nvcc").exists() and (Path(home) / "include/cuda_runtime.h").exists():
            return str(Path(home) / "bin/nvcc")
    pytest.skip("no CUDA toolkit: set CUDA_HOME (the head of this file says where to get one)")


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    stack: int
    spills: int


_PROPERTIES = re.compile(
    r"Compiling entry function '(?P<name>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compiled(source: Path, arch: str, folder: Path) -> list[Kernel]:
    """What ptxas says of every kernel of a source."""
    flags = ["-std=c++20", "-O3", "-fmad=false", "-DTORCH_TARGET_VERSION=0x020B000000000000", "-diag-suppress=20012"]
    includes = [f"-isystem={path}" for path in cpp_extension.include_paths()]
    command = [nvcc(), *flags, *includes, f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v", str(source)]
    command += ["-o", str(folder / f"{source.stem}-{arch}.cubin")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-6000:]
    assert "warning" not in result.stderr, result.stderr[-6000:]
    return [
        Kernel(m["name"], int(m["registers"]), int(m["stack"]), int(m["stores"]) + int(m["loads"]))
        for m in _PROPERTIES.finditer(result.stderr)
    ]


def readable(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        return names
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"shira::(cuda::|core::)?|\(anonymous namespace\)::|^void ", "", line) for line in text.splitlines()]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_spills(source: Path, arch: str, tmp_path: Path) -> None:
    """`pytest -rP` prints the table."""
    kernels = compiled(source, arch, tmp_path)
    assert kernels
    print(f"{source.name} for sm_{arch}: registers, stack, spills")
    for kernel, name in sorted(zip(kernels, readable([k.name for k in kernels]), strict=True), key=lambda k: k[1]):
        print(f"{kernel.registers:4} {kernel.stack:4} {kernel.spills:4}  {name}")
    spilled = [kernel for kernel in kernels if kernel.spills or kernel.stack]
    assert not spilled, readable([kernel.name for kernel in spilled])
    # 256 threads of 128 registers: two blocks per multiprocessor; with fewer, latency shows.
    assert max(kernel.registers for kernel in kernels) <= 128


def cuobjdump() -> str:
    """The toolkit's, or the one that triton brings."""
    beside = Path(nvcc()).with_name("cuobjdump")
    spec = find_spec("triton")
    brought = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else beside
    for tool in (beside, brought):
        if tool.exists():
            return str(tool)
    pytest.skip("no cuobjdump: neither the toolkit nor triton has it")


@pytest.mark.skipif(not torch.ops.shira._build_info() & 1, reason="this build was compiled without CUDA")
def test_a_finished_build_spills_nowhere() -> None:
    library = shira_ops._C.__file__
    said = subprocess.run([cuobjdump(), "--dump-resource-usage", library], capture_output=True, text=True, check=True)
    found: dict[str, list[Kernel]] = {}
    arch = name = ""
    for line in said.stdout.splitlines():
        if target := re.search(r"arch = (sm_\d+)", line):
            arch = target[1]
        elif function := re.search(r"Function (\S+):", line):
            name = function[1]
        elif used := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            found.setdefault(arch, []).append(Kernel(name, *map(int, used.groups())))
    assert found
    assert len({len(kernels) for kernels in found.values()}) == 1
    for arch, kernels in found.items():
        print(f"{arch}: {len(kernels)} kernels; registers, stack, local")
        for kernel, text in sorted(zip(kernels, readable([k.name for k in kernels]), strict=True), key=lambda k: k[1]):
            print(f"{kernel.registers:4} {kernel.stack:4} {kernel.spills:4}  {text}")
        # Eight bytes of stack are a return address: float64 division and square root are calls on some targets.
        assert all(kernel.spills == 0 and kernel.stack <= 8 for kernel in kernels), arch
        assert max(kernel.registers for kernel in kernels) <= 128, arch


def test_every_family_on_the_cpu_compiles_for_cuda() -> None:
    """A family has the same name everywhere."""
    families = {path.stem for path in (ROOT / "csrc/cpu").glob("*.cpp")}
    assert {source.stem for source in SOURCES} <= families
