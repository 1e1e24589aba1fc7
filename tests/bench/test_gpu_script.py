"""`make gpu` still runs: all that a CPU can do of it, at tiny sizes. The figures mean nothing."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import gpu, gpu_graph, gpu_large, gpu_ops, gpu_torch

ROOT = Path(__file__).parents[2]
NEEDS_A_GPU = (
    *("sanitizer", "captured graphs", "profile"),
    *("parity, triton", "captured graphs, triton", "measurements, triton", "contract tests, triton"),
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
    for name in ("build", "contract tests", "parity, compiled", "torch", "measurements, compiled", "large weights"):
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
        proofs = dict(gpu_graph.proofs("cpu", False))
        proofs.pop("captured cold")
        assert len(proofs) == 63
        for proof in proofs.values():
            proof()
        monkeypatch.setattr(gpu_graph, "captured", lambda call: call() or (lambda: None))  # a graph that does nothing
        with pytest.raises(AssertionError, match="a replay differs from an eager call"):
            proofs["captured swap_, granule 16"]()


def test_an_op_that_is_wrong_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves out the last granule."""
    swap, take = torch.ops.shira.swap_, torch.ops.shira.gather
    wrong = {
        "swap_": lambda weight, indices, values, granule: swap(weight, indices[:-1], values[:-granule], granule),
        "gather": lambda weight, indices, granule: take(weight, indices[:-1], granule),
    }
    parity, late = (dict(one.proofs("cpu", False)) for one in (gpu_ops, gpu_torch))
    for module in (gpu_ops, gpu_torch):
        monkeypatch.setattr(module, "op", wrong.__getitem__)
    with pytest.raises(AssertionError, match="differs from the reference in"):
        parity["swap_, torch.bfloat16, granule 16, 24 x 80"]()
    with pytest.raises(AssertionError, match="differs from the reference"):
        late["late stream: gather"]()


def test_an_op_that_counts_in_too_few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Narrow:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch.ops.shira, name)

        def gather(self, weight: torch.Tensor, indices: torch.Tensor, granule: int) -> torch.Tensor:
            return (
                weight[: weight.numel() // granule * granule].view(-1, granule)[indices % (2**12 // granule)].view(-1)
            )

        def select_top(self, weight: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
            return torch.ops.shira.select_top(weight, *given, **more) % 2**8

        def fingerprint_at(self, weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
            return torch.ops.shira.fingerprint_at(weight, indices[:-1])

    proofs = dict(gpu_large.proofs("cpu", False))
    monkeypatch.setattr(gpu_large, "shira", Narrow())
    for name, said in {
        "switch, granule 1": "are not what they are alone",
        "select, granule 16": "does not find its largest granules",
        "fingerprint and diff": "does not follow its entries",
    }.items():
        with pytest.raises(AssertionError, match=said):
            proofs[name]()


LIVES = [  # the numbers of the proofs that ended, those that failed, and the exit status
    ([0, 1], [], -11),
    ([3, 4], [4], gpu.DEVICE_LOST),
    ([], [], 1),
    ([6], [], 0),
]


def test_a_lost_process_costs_one_proof(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One process crashes in number 2, one reports that number 4 lost the device, one ends in number 5."""
    run = gpu.Run("cpu", False, 100.0, tmp_path / "told.json")
    lives, firsts = iter(LIVES), list[int]()

    def one(command: list[str], limit: float, **environment: str) -> gpu.Done:
        firsts.append(int(command[command.index("--first") + 1]))
        ended, failed, code = next(lives)
        with Path(command[command.index("--lines") + 1]).open("a") as lines:
            for number in ended:
                error = {"error": "E", "traceback": "T"} if number in failed else {"said": "the bits"}
                lines.write(json.dumps({"name": f"proof {number}", "number": number, "of": 7, **error}) + "\n")
        return gpu.Done(code, f"said {len(firsts)}", 0.1)

    monkeypatch.setattr(run, "one", one)
    told = gpu.proofs(run, "gpu_ops", 50.0)
    assert firsts == [0, 3, 5, 6]
    assert told["state"] == "failed"
    assert told["why"] == "4 of 7 proofs hold; 3 failed; the bits"
    assert told["failed"] == ["proof 4", "proof number 2", "proof number 5"]
    assert "proof number 2: its process was lost: exit status -11: said 1" in told["output"]
    assert "proof number 5: its process was lost: exit status 1: said 3" in told["output"]

    monkeypatch.setattr(run, "one", lambda *given, **more: gpu.Done(1, "ModuleNotFoundError: shira_ops", 0.1))
    told = gpu.proofs(run, "gpu_ops", 50.0)
    assert (told["state"], told["why"]) == ("failed", "it did not start")
    assert told["output"] == "ModuleNotFoundError: shira_ops"


HANGING = """
import sys, threading
from benchmarks.speed import gpu_proofs
gpu_proofs.HANGS = 0.2
wait = threading.Event().wait
gpu_proofs.prove("", lambda device, once: [("one", lambda: "well"), ("two", wait), ("three", lambda: None)])
"""


def test_a_proof_that_hangs(tmp_path: Path) -> None:
    """It ends its process, and those before it are told."""
    run, lines = gpu.Run("cpu", True, 100.0, tmp_path / "told.json"), tmp_path / "lines"
    done = run.one(gpu.python("-c", HANGING, "--device", "cpu", "--lines", str(lines)), 60)
    assert done.code == 1
    assert "Timeout" in done.output
    assert gpu.written(lines) == {"one": {"name": "one", "number": 0, "of": 3, "said": "well"}}
    done = run.one(gpu.python("-c", HANGING, "--device", "cpu", "--lines", str(lines), "--first", "2"), 60)
    assert done.code == 0
    assert set(gpu.written(lines)) == {"one", "three"}


@pytest.mark.parametrize("fallback", [0, 1])
def test_a_build_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fallback: int) -> None:
    """Without CUDA kernels Triton serves, which needs the ops to be declared all the same."""
    run = gpu.Run("cuda", False, 400.0, tmp_path / "told.json")
    asked = list[tuple[str, str | None]]()

    def one(command: list[str], limit: float, **environment: str) -> gpu.Done:
        asked.append((command[1], environment.get("SHIRA_CUDA")))
        if command[1] == "setup.py":
            return gpu.Done(int("SHIRA_CUDA" not in environment) or fallback, "nvcc is unwell", 0.1)
        ready = asked[-2:-1] == [("setup.py", "0")] and not fallback
        return gpu.Done(int(not ready), '{"cuda kernels": false, "backends": {}}', 0.1)

    monkeypatch.setattr(run, "one", one)
    told = gpu.build(run)
    assert asked == [("-c", None), ("setup.py", None), ("setup.py", "0"), ("-c", None)]
    assert told["state"] == "failed"
    wanted = "nothing was built" if fallback else "without CUDA kernels: the rest is about Triton alone"
    assert told["why"] == wanted
    assert "exit status 1: nvcc is unwell" in told["output"]


def test_what_was_started_ends_with_the_run(tmp_path: Path) -> None:
    run = gpu.Run("cpu", True, 100.0, tmp_path / "told.json")
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(
            run.one, gpu.python("-c", "print(1, flush=True); __import__('threading').Event().wait()"), 60
        )
        while not run.running:
            pass
        run.end()
        assert waits.result().code == -9
    run.section("next", 0, lambda: {"state": "passed", "why": str(run.one(gpu.python("-c", ""), 60).code)})
    assert run.told["sections"]["next"]["why"] == "RuntimeError: the run was ended"


ABOUT = {"gpu": "A GPU", "capability": "9.0", "torch": "2.11", "cuda": "13.0", "triton": "3.6", "setuptools": "80"}
SAYS = {  # what a process of a run on a GPU says, by a word of its command
    "platform": json.dumps(ABOUT),
    "shira_ops.backends": json.dumps({"cuda kernels": True, "backends": {}}),
    "nvidia-smi": "580.159.04",
    "nvcc": "Cuda compilation tools, release 13.0, V13.0.88",
    "pytest": "\n2 skipped, 7 passed, 3 deselected in 1.5s\n",
    "ncu": 'says\n"ID","Kernel Name"\n"",""\n"0","swap"\n',
    "memcheck": "========= ERROR SUMMARY: 0 errors",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
    "synccheck": "========= ERROR SUMMARY: 0 errors",
    "initcheck": "========= ERROR SUMMARY: 0 errors",
}


@pytest.mark.parametrize("kernels", [True, False])
def test_a_run_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], kernels: bool
) -> None:
    """All sections in their order, with the processes' words instead of processes; without compiled kernels too."""
    measured = itertools.count()

    def say(run: gpu.Run, given: dict[str, list[str]], limit: float, **environment: str) -> dict[str, gpu.Done]:
        found = {}
        for name, command in given.items():
            assert 0 < limit <= run.budget
            text, code = " ".join(command), 0
            if "--lines" in command:
                names = command[command.index("--only") + 1 :] if "--only" in command else ["a"]
                if "gpu_bench" in command[2] and next(measured) == 0:
                    names, code = names[:3], None  # its time is up
                lines = [json.dumps({"name": one, "number": 0, "of": 1}) for one in names]
                Path(command[command.index("--lines") + 1]).write_text("\n".join(lines))
            said = SAYS.get(name) or next((said for word, said in SAYS.items() if word in text), "")
            found[name] = gpu.Done(code, said.replace("true", str(kernels).lower()), 0.1)
        return found

    monkeypatch.setattr(gpu.Run, "all", say)
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: name)
    monkeypatch.setattr(gpu.signal, "signal", lambda *given: None)
    out = tmp_path / "told.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(out), "--budget", "560"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == (0 if kernels else 1)
    sections = json.loads(out.read_text())["sections"]
    proved = {
        "parity, compiled",
        "captured graphs",
        "torch",
        "contract tests",
        "parity, triton",
        "captured graphs, triton",
    }
    assert set(list(sections)[2:8]) == proved
    assert list(sections)[8:] == [
        *("measurements, compiled", "large weights", "sanitizer", "profile"),
        *(["measurements, compiled, the rest"] if kernels else []),
        *("measurements, triton", "contract tests, triton"),
    ]
    compiled = {"parity, compiled", "captured graphs", "measurements, compiled", "sanitizer", "profile"}
    states = {name: section["state"] for name, section in sections.items()}
    if kernels:
        assert set(states.values()) == {"passed"}, sections
    else:
        assert states.pop("build") == "failed"
        assert {name for name, state in states.items() if state == "skipped"} == compiled
    assert "switch 7 passed; fuse 7 passed" in sections["contract tests"]["why"]
    said = capsys.readouterr().out
    assert said.rindex("In short:") > said.rindex("ms (quartiles)")
    assert all(f"{state:8}{name}" in said[said.rindex("In short:") :] for name, state in states.items())


TESTS = """
import pytest
def test_well(): pass
def test_unwell(): assert [1, 2] == [1, 3]
@pytest.mark.parametrize("n", range(50))
def test_many(n): pass
"""


@pytest.mark.parametrize(("seconds", "ran"), [("60", 52), ("0", 1)])
def test_the_tests_end_when_their_time_is_up(tmp_path: Path, seconds: str, ran: int) -> None:
    """Those that failed have been told by then."""
    (tmp_path / "test_it.py").write_text(TESTS)
    options = ["-q", "-p", "no:cacheprovider", "-p", "benchmarks.speed.pytest_gpu", "--seconds", seconds]
    run = gpu.Run("cpu", True, 100.0, tmp_path / "told.json")
    done = run.one(gpu.python("-m", "pytest", *options, f"--rootdir={tmp_path}", str(tmp_path)), 60, PYTEST_ADDOPTS="")
    assert sum(map(int, re.findall(r"(\d+) (?:passed|failed)", done.output))) == ran
    assert ("the time is up" in done.output) == (ran == 1)
    assert (done.code, done.output.count("assert [1, 2] == [1, 3]") > 0) == ((1, True) if ran > 1 else (2, False))


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
