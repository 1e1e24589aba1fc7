"""Builds touch.cpp on first use and registers torch.ops.shira_bench, which measures the machine's own limits.

The library is only for benchmarks, so it is not part of the package. g++ compiles it in seconds into build/, which git
ignores, under a name that changes with the source, the flags and torch.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("touch.cpp")
BUILD = Path(__file__).parent.parent / "build"
FLAGS = ["-O3", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020B000000000000"]  # the stable ABI of torch 2.11, as in the package's own build


def load() -> None:
    """Registers torch.ops.shira_bench; compiles it first where needed."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    key = repr((compiler, FLAGS, torch.__version__)).encode() + SOURCE.read_bytes()
    library = BUILD / f"touch-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if not library.exists():
        BUILD.mkdir(exist_ok=True)
        include = [f"-isystem{path}" for path in cpp_extension.include_paths()]
        torch_lib = Path(torch.__file__).parent / "lib"
        with tempfile.TemporaryDirectory(
            dir=BUILD
        ) as scratch:  # renamed when complete, since two processes may build at once
            made = Path(scratch) / "touch.so"
            command = [*compiler, *FLAGS, *include, str(SOURCE), "-o", str(made), f"-L{torch_lib}", "-ltorch_cpu"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"benchmarks: touch.cpp does not compile\n{done.stderr}")
            made.replace(library)
    torch.ops.load_library(str(library))
