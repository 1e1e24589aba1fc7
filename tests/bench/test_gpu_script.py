"""`make gpu` still runs: all that a CPU can do of it, at tiny sizes. The figures mean nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import gpu, gpu_graph

ROOT = Path(__file__).parents[2]
NEEDS_A_GPU = (
    *("sanitizer", "captured graphs", "profile"),
    *("parity, triton", "captured graphs, triton", "measurements, triton"),
)


def told(tmp_path: Path, *options: str) -> dict[str, Any]:
    out = tmp_path / "told.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.gpu", "--device", "cpu", "--quick", "--out", str(out), *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    for name in found["sections"]:
        assert name in done.stdout
    return found


def test_everything_that_a_cpu_can(tmp_path: Path) -> None:
    found = told(tmp_path)
    assert set(NEEDS_A_GPU) < set(found["sections"])
    for name, section in found["sections"].items():
        assert section["state"] == ("skipped" if name in NEEDS_A_GPU else "passed"), (name, section)
        assert section["why"], name
    measured = found["measurements"]["compiled"]
    assert list(measured) == list(gpu.NAMES)
    for name, one in measured.items():
        assert one["seconds"], name
        assert one["parity"] or name == "copy", name
        assert set(one["bytes"]) == set(one["share of copy"]) <= set(one["seconds"]), name
    assert found["backends"]["swap_"]["cpu"]


def test_what_does_not_fit_the_time_is_told(tmp_path: Path) -> None:
    found = told(tmp_path, "--budget", "3")
    for name in ("build", "contract tests", "parity, compiled", "measurements, compiled"):
        assert found["sections"][name]["state"] == "skipped"
        assert "s were left" in found["sections"][name]["why"]
    assert not found["measurements"]


def test_a_lost_process_costs_one_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that dies, one that reports that it lost the device, and one that ends well."""
    run = gpu.Run("cpu", True, 100.0, tmp_path / "told.json")
    lives = iter([([], 1), (["swap"], gpu.DEVICE_LOST), (["adamw", "fuse"], 0)])

    def one(command: list[str], limit: float) -> gpu.Done:
        names, code = next(lives)
        lines = Path(command[command.index("--lines") + 1])
        lines.write_text("".join(json.dumps({"name": name, "seconds": {}}) + "\n" for name in names))
        return gpu.Done(code, "what it said", 0.1)

    monkeypatch.setattr(run, "one", one)
    section = gpu.measure(run, "compiled", ["copy", "swap", "adamw", "fuse"], 50.0)
    found = run.told["measurements"]["compiled"]
    assert section["state"] == "failed"
    assert [name for name, result in found.items() if "error" in result] == ["copy"]
    assert found["copy"]["traceback"] == "what it said"
    assert set(found) == {"copy", "swap", "adamw", "fuse"}


def test_what_was_measured_survives_a_process_that_was_ended(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    assert gpu.written(lines) == {}
    lines.write_text('{"name": "copy", "seconds": {}}\n{"name": "sw')
    assert gpu.written(lines) == {"copy": {"name": "copy", "seconds": {}}}


def test_captured_graphs_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's own logic, with plain calls in place of captured graphs."""

    def captured(call: Callable[[], object]) -> Callable[[], object]:
        call(), call()
        return call

    monkeypatch.setattr(gpu_graph, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_graph, "captured", captured)
    with torch.no_grad():
        assert gpu_graph.captured_calls().startswith("60 calls")
        assert gpu_graph.captured_inference()
        assert gpu_graph.captured_ops()
        monkeypatch.setattr(gpu_graph, "captured", lambda call: call() or (lambda: None))  # a graph that does nothing
        with pytest.raises(AssertionError, match="a replay differs from an eager call"):
            gpu_graph.captured_calls()


COUNTED = """\
==PROF== Connected to process 4711
"ID","Process ID","Kernel Name","dram__bytes_read.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed"
"","","","Gbyte","%"
"0","4711","void list_kernel<Walk, 1>(T1)","2.31","81.5"
"1","4711","void list_kernel<Walk, 1>(T1)","2.30","82"
==PROF== Disconnected
"""


def test_what_ncu_counted() -> None:
    first, second = gpu.counted(COUNTED)
    assert first["dram__bytes_read.sum"] == "2.31 Gbyte"
    assert second == {
        "Kernel Name": "void list_kernel<Walk, 1>(T1)",
        "dram__bytes_read.sum": "2.30 Gbyte",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed": "82 %",
    }
    assert gpu.counted("==ERROR== ERR_NVGPUCTRPERM") == []


UNINITIALIZED = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::reduce_kernel<(int)512, float>(T3)+0x70
=========     by thread (31,0,0) in block (1,0,0)
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: shira::sorted(at::Tensor const&) [0x9544e] in _C.abi3.so
=========
========= Uninitialized __global__ memory read of size 8 bytes
=========     at void shira::cuda::list_kernel<shira::cuda::Scan, (int)1>(T1)+0x150 in launch.h:120
=========     by thread (0,0,0) in block (0,0,0)
=========     Saved host backtrace up to driver entry point at kernel launch time
=========
========= Uninitialized __global__ memory read of size 2 bytes
=========     at __ldcs(const unsigned short *)+0x150 in sm_32_intrinsics.hpp:93
=========     by thread (0,0,0) in block (0,0,0)
=========     Device Frame:void shira::cuda::list_kernel<shira::cuda::Check, (int)1>(T1)+0x20 in indices.h:24
=========
========= Uninitialized access at 0x7f1 on access by cudaMemcpy source
=========     Saved host backtrace up to driver entry point at error
=========         Host Frame: shira::cuda::fetch(void*, void const*, long) [0x9] in _C.abi3.so
=========
========= ERROR SUMMARY: 4 errors
"""


def test_reads_of_what_nobody_wrote() -> None:
    """Reports about our kernels, inlined ones too, are told from those about torch's, which our host code may start."""
    assert gpu.ours(UNINITIALIZED) == 2
    assert gpu.ours("========= ERROR SUMMARY: 0 errors\n") == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("chosen", ["environment", "command line", "neither"])
def test_make_takes_the_python_it_is_given(tmp_path: Path, chosen: str) -> None:
    # The tests may be run by make themselves, and then have its variables.
    ours = ("PY", "PYTHON", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = ["make", "-n", "--no-print-directory", "-f", str(ROOT / "Makefile"), "gpu"]
    if chosen == "environment":
        environment["PY"] = "python-of-mine"
    elif chosen == "command line":
        command.append("PY=python-of-mine")
    # In an empty folder, so that there is no .venv.
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    wanted = "python3" if chosen == "neither" else "python-of-mine"
    assert done.stdout.split()[:3] == [wanted, "-m", "benchmarks.speed.gpu"]
