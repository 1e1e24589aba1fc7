"""Builds shira_ops._C (the ops) against the torch that is installed, and shira._codec, which needs no torch.

SHIRA_CUDA=auto|0|1    whether to compile the CUDA kernels. auto, the default: for the GPUs of this machine, if there is
                       a toolkit and torch has CUDA. 0: not at all. 1: for every GPU that is supported, as a wheel for
                       other machines needs; that takes many minutes
TORCH_CUDA_ARCH_LIST   the GPUs to compile for instead, as in "9.0" or "8.0;9.0+PTX"
SHIRA_SANITIZE=1       build the CPU code, and only that, under the address and undefined-behaviour sanitizers, or with
                       SHIRA_SANITIZE=thread under the thread sanitizer
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zlib
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import setuptools
from setuptools import Extension, setup

HERE = Path(__file__).resolve().parent
TORCH_TARGET = "0x020B000000000000"  # the stable ABI of torch 2.11: the library loads under every torch from it on
TORCH_MINIMUM = (2, 11)
SETUPTOOLS_MINIMUM = 77  # the first that reads the licence in pyproject.toml; a new .venv of Python 3.11 comes with 65
CUDA_TARGETS = "8.0;9.0;10.0;12.0+PTX"
CUDA_OLDEST = (8, 0)


def stop(reason: str, *what_to_do: str) -> NoReturn:
    raise SystemExit("\n".join(["", f"shira-ops: {reason}", *(f"    {line}" for line in what_to_do), ""]))


INSTALL = (
    "pip install 'torch>=2.11' 'setuptools>=77' wheel ninja pybind11",
    "pip install --no-build-isolation .",
)


def no_torch(error: ImportError) -> NoReturn:
    """Says what to do. Unless they are told otherwise, pip, build and uv all build in an environment of their own, from
    which an installed torch cannot be seen."""
    needed = "the kernels are compiled against the torch you use"
    if not any(re.search(r"build-env-|[/\\]builds-v\d", place) for place in (sys.prefix, *sys.path)):
        stop(f"{needed}, and there is none here ({error}). Run", *INSTALL)
    here = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]  # of the Python that pip runs under
    hidden = next((f"torch {found.version}" for found in metadata.distributions(name="torch", path=here)), "one")
    stop(
        f"{needed}, and this build cannot see {hidden}: it runs in an environment of its own (build isolation). Run",
        *INSTALL,
        "(for the command build: --no-isolation)",
    )


if 0 < int(setuptools.__version__.split(".")[0]) < SETUPTOOLS_MINIMUM:  # 0 where it does not know its own version
    stop(f"setuptools {SETUPTOOLS_MINIMUM} or newer is needed, this is {setuptools.__version__}. Run", *INSTALL)
try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    no_torch(error)
if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < TORCH_MINIMUM:
    stop(f"torch 2.11 or newer is needed, this is {torch.__version__}. Run", *INSTALL)


def compiler() -> None:
    wanted = os.environ.get("CXX", "g++").split()[0]
    if not any(shutil.which(name) for name in (wanted, "c++", "clang++")):
        stop(
            f"no C++ compiler was found (looked for {wanted}, c++ and clang++). Install one, for example",
            "apt-get install g++        # Debian, Ubuntu",
            "dnf install gcc-c++        # Fedora, RHEL",
        )


def pybind_include() -> str:
    try:
        import pybind11

        return str(pybind11.get_include())
    except ImportError:  # torch carries the same headers
        return cpp_extension.include_paths()[0]


def cuda_toolkit() -> Path | None:
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    for candidate in filter(None, candidates):  # an nvcc on PATH may be a wrapper script: a toolkit has headers as well
        home = Path(candidate)
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def targets_here(home: Path) -> str:
    """The GPUs of this machine, as TORCH_CUDA_ARCH_LIST writes them. Empty if the kernels run on none of them."""
    said = subprocess.run([home / "bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    known = sorted((int(n[:-1]), int(n[-1])) for n in re.findall(r"^compute_(\d+)$", said, re.MULTILINE))
    found = {torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())}
    targets = []
    for capability in sorted(found):
        if capability < CUDA_OLDEST:
            continue
        # The driver compiles the newest instructions that an older toolkit knows.
        older = [one for one in known if one <= capability]
        nearest = older[-1] if older else capability
        targets.append("{}.{}".format(*nearest) + ("" if nearest == capability else "+PTX"))
    return ";".join(targets)


mode = os.environ.get("SHIRA_CUDA", "auto")
if mode not in ("auto", "0", "1"):
    stop(f"SHIRA_CUDA must be auto, 0 or 1, got {mode!r}")
checks = os.environ.get("SHIRA_SANITIZE") or "0"
if checks not in ("0", "1", "thread"):
    stop(f"SHIRA_SANITIZE must be 0, 1 or thread, got {checks!r}")
sanitize = {"0": "", "1": "address,undefined", "thread": "thread"}[checks]
cuda_sources = sorted((HERE / "csrc/cuda").glob("*.cu"))
toolkit = None if mode == "0" or sanitize else cuda_toolkit()
no_cuda = "none"
if mode == "1" and toolkit is None and not sanitize:
    stop(
        "SHIRA_CUDA=1 asks for the CUDA kernels, and no CUDA toolkit was found. Set CUDA_HOME, or build without:",
        "SHIRA_CUDA=0 pip install --no-build-isolation .",
    )
if mode == "auto" and toolkit is not None and torch.version.cuda is None:
    # The kernels would load, but nothing could call them: minutes of compiling for nothing.
    no_cuda = "left out, since this torch was built without CUDA (SHIRA_CUDA=1 compiles them all the same)"
    toolkit = None
building = bool({"build_ext", "bdist_wheel", "develop", "install", "editable_wheel"} & set(sys.argv))
targets = os.environ.get("TORCH_CUDA_ARCH_LIST") or (CUDA_TARGETS if mode == "1" else "")
if building and toolkit is not None and not targets:
    targets = targets_here(toolkit)
    if not targets:
        no_cuda = (
            f"left out, since no GPU of compute capability {'.'.join(map(str, CUDA_OLDEST))} or newer is here "
            f"(for another machine, set TORCH_CUDA_ARCH_LIST, as 9.0 for an H100, or SHIRA_CUDA=1 for {CUDA_TARGETS})"
        )
        toolkit = None
if building:
    compiler()
    cuda = f"of {toolkit} for {targets}, in minutes (SHIRA_CUDA=0 leaves them out)" if toolkit else no_cuda
    print(f"shira-ops: compiling for torch {torch.__version__}; CUDA kernels: {cuda}", file=sys.stderr, flush=True)

# Contractions (fused multiply-add) would make the bits depend on the machine.
cxx = ["-O3", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# Nothing here reads errno or the floating-point exception flags. Without them, square roots and conditional arithmetic
# can be vectorised; no bit of a result changes.
cxx += ["-fno-math-errno", "-fno-trapping-math"]
link = []
if sanitize:
    cxx += ["-O1", "-g", f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"]
    cxx += ["-fno-sanitize-recover=undefined"]
    link += [f"-fsanitize={sanitize}"]
else:
    # Most Pythons hand down their own -g, which takes six sevenths of the file and some of the time to compile.
    cxx.append("-g0")
headers_key = 0
for header in sorted((HERE / "csrc").rglob("*.h")):
    headers_key = zlib.crc32(header.read_bytes(), headers_key)

sources = [str(path.relative_to(HERE)) for path in sorted((HERE / "csrc/cpu").glob("*.cpp"))] + ["csrc/library.cpp"]
macros: list[tuple[str, str | None]] = [("TORCH_TARGET_VERSION", TORCH_TARGET)]
library_dirs: list[str] = []
# cpp_extension's own -ltorch comes earlier and Debian's ld drops it; DT_NEEDED libtorch.so is what brings
# libtorch_cuda.so into scope for the weak CUDA symbols.
ops_link = [*link, "-Wl,--push-state,--no-as-needed", "-ltorch", "-Wl,--pop-state"]
nvcc = ["-O3", "-std=c++20", "--threads=2", "-fmad=false", "-Xcompiler=-fvisibility=hidden,-ffp-contract=off"]
nvcc += ["-diag-suppress=20012", "-Xfatbin=-compress-all"]
if toolkit is not None:
    cpp_extension.CUDA_HOME = str(toolkit)  # None under a CPU torch
    os.environ["TORCH_CUDA_ARCH_LIST"] = targets
    macros.append(("SHIRA_WITH_CUDA", "1"))
    sources += [str(path.relative_to(HERE)) for path in cuda_sources]
    # Under a CPU torch nvcc writes no dependency file: a checksum of the headers in its command makes
    # ninja rebuild when one changes.
    nvcc.append(f"-DSHIRA_HEADERS_KEY={headers_key}")
    runtime = next(
        (d for d in ("lib64", "lib", "targets/x86_64-linux/lib") if (toolkit / d / "libcudart_static.a").exists()),
        "lib64",
    )
    library_dirs.append(str(toolkit / runtime))
    # The CUDA runtime is linked statically and kept private: torch's own may be another version.
    ops_link += ["-l:libcudart_static.a", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]

ops = cpp_extension.CppExtension(
    "shira_ops._C",
    sources,
    py_limited_api=True,
    define_macros=macros,
    library_dirs=library_dirs,
    extra_compile_args={"cxx": cxx, "nvcc": nvcc},
    extra_link_args=ops_link,
)
codec = Extension(
    "shira._codec",
    ["csrc/python/codec.cpp"],
    include_dirs=[pybind_include()],
    language="c++",
    extra_compile_args={"cxx": cxx},
    extra_link_args=link,
)

setup(ext_modules=[ops, codec], cmdclass={"build_ext": cpp_extension.BuildExtension})
