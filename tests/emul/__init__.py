"""The CUDA sources compiled as C++, to run on CPU tensors: `library()` builds them on first use.

Every object is kept in `tests/emul/build`, under a hash of everything that went into it. So a change rebuilds only what
it must, and processes that need the library at the same time wait for the one that builds it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
BUILD = HERE / "build"
# -O1: most of the time goes into compiling. As everywhere, contraction would change the bits.
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DSHIRA_EMULATE=1"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020B000000000000", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += ["-DSHIRA_NAMESPACE=shira_emul"]  # beside torch.ops.shira
# SHIRA_SANITIZE=1: with the address sanitizer, which must be preloaded. It does not check stacks, since the emulator
# gives its threads their own.
ADDRESSES = os.environ.get("SHIRA_SANITIZE") == "1"
if ADDRESSES:
    FLAGS += ["-fsanitize=address", "-fno-omit-frame-pointer", "--param=asan-stack=0"]
# SHIRA_SANITIZE=thread: with the search for races of races.cpp, which the kernels call at every access. The options are
# those of gcc.
RACES = os.environ.get("SHIRA_SANITIZE") == "thread"
WATCHED = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]


def sources() -> list[Path]:
    return [*sorted((CSRC / "cuda").glob("*.cu")), *sorted(HERE.glob("*.cu")), *sorted(HERE.glob("*.cpp"))]


def own_flags(source: Path) -> list[str]:
    return WATCHED if RACES and source.suffix == ".cu" else []


def compiler() -> list[str]:
    command = os.environ.get("CXX", "g++").split()
    if shutil.which(command[0]) is None:
        pytest.skip(f"the emulator needs a C++ compiler, and there is no {command[0]}")
    return command


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def checked(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr[-6000:]}"


@cache
def library() -> None:
    """Loads torch.ops.shira_emul, and builds it first if needed."""
    cxx = compiler()
    command = [*cxx, *FLAGS, f"-I{HERE}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    headers = [*sorted(CSRC.rglob("*.h")), *sorted(HERE.glob("*.h"))]
    common = digest(
        " ".join(command).encode(),
        torch.__version__.encode(),
        subprocess.run([*cxx, "--version"], capture_output=True, check=True).stdout,
        *(header.read_bytes() for header in headers),
    )
    objects = {
        source: BUILD
        / f"{source.stem}-{digest(common.encode(), repr(own_flags(source)).encode(), source.read_bytes())}.o"
        for source in sources()
    }
    shared = BUILD / f"shira_emul-{digest(*(path.name.encode() for path in objects.values()))}.so"
    BUILD.mkdir(exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.exists():

            def build(source: Path) -> None:
                if not objects[source].exists():
                    unfinished = objects[source].with_suffix(".part")
                    checked([*command, *own_flags(source), "-x", "c++", "-c", str(source), "-o", str(unfinished)])
                    unfinished.rename(objects[source])

            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 2))) as pool:
                list(pool.map(build, sorted(objects, key=lambda source: -source.stat().st_size)))
            unfinished = shared.with_suffix(".part")
            links = [f"-L{path}" for path in cpp_extension.library_paths()]
            links += ["-fsanitize=address"] * ADDRESSES
            checked(
                [*cxx, "-shared", *map(str, objects.values()), "-o", str(unfinished), *links, "-ltorch_cpu", "-lc10"]
            )
            for old in {*BUILD.glob("*.o"), *BUILD.glob("*.so")} - {*objects.values()}:
                old.unlink()
            unfinished.rename(shared)
    torch.ops.load_library(str(shared))
