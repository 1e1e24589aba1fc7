"""One command on a machine with an NVIDIA GPU and no network: it builds, proves, measures, and writes what it found.

python -m benchmarks.speed.gpu        (or: make gpu)

First it builds the package, unless that has been done for this torch; where the CUDA kernels do not compile, without
them, so that Triton serves. Then come the proofs, side by side: parity of every op with the references, captured
graphs, what torch builds on the ops, and the contract tests; parity and captured graphs of Triton's kernels. Then the
measurements (gpu_bench.py) of the compiled kernels for a part of the time left, large weights, compute-sanitizer, ncu's
counters, the other measurements, and those of Triton's kernels. Each runs in processes of its own: one that fails,
hangs or loses the device costs what it was at, and the others go on. A section that does not fit into the time left is
reported as skipped. Results are written as they come. The exit status is 1 where something failed.

`--device cpu --quick` runs, at tiny sizes, all that a CPU can, to see whether it works. The figures mean nothing then.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = (
    *("switch", "fuse", "gradient", "optimize", "select", "fingerprint", "codec", "diff", "overlay"),
    *("refusals", "autograd"),
)
COLD = 180  # seconds that a first import of torch may take
PROVING = 150  # seconds for the proofs that run side by side
LOST = 8  # how many processes of one program of proofs may be lost before it is given up
DEVICE_LOST = 3  # the exit status of programs that lost the device
KEPT = 40_000  # characters of an output that are kept
# The measurements, functions of gpu_bench.py, the most important first.
NAMES = (
    *("copy", "swap", "swap_granule_16", "adamw", "sampled_grad", "sampled_grad_14336_columns", "select_top"),
    *("sampled_grad_3072_columns", "sampled_grad_64_tokens", "decode_indices", "fuse", "switch", "fingerprint"),
    *("training", "fetch"),
)
# What ncu reads of a kernel: bytes of the memory, of L2 sectors, and of their peaks.
METRICS = (
    *("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"),
    *(
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "lts__t_sectors_op_read.sum",
        "lts__t_sectors_op_write.sum",
    ),
    *("sm__warps_active.avg.pct_of_peak_sustained_active", "launch__registers_per_thread"),
)
Told = dict[str, Any]

# Run in a process of its own, so that this one holds no memory of the GPU.
ABOUT = """
import json, platform, torch
from importlib.metadata import PackageNotFoundError, version
told = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
try:
    told["setuptools"] = version("setuptools")
except PackageNotFoundError:
    told["setuptools"] = None
try:
    import triton
    told["triton"] = triton.__version__
except ImportError:
    told["triton"] = None
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    told |= {"gpu": p.name, "capability": f"{p.major}.{p.minor}", "memory": p.total_memory}
    told |= {"multiprocessors": p.multi_processor_count, "l2": getattr(p, "L2_cache_size", None)}
print(json.dumps(told))
"""
BUILT = """
import json, torch, shira, shira_ops, shira._codec
print(json.dumps({"cuda kernels": bool(torch.ops.shira._build_info() & 1),
    "backends": {op: {device: served.name for device, served in devices.items()}
                 for op, devices in shira_ops.backends().items()}}))
"""


@dataclass
class Done:
    """A process that ended, or that was stopped."""

    code: int | None  # None: it was stopped at its time limit
    output: str
    took: float

    @property
    def tail(self) -> str:
        return self.output[-3000:]

    @property
    def ending(self) -> str:
        return "it did not end in time" if self.code is None else f"exit status {self.code}"


@dataclass
class Run:
    """The time left, the environment of every process, and the results so far."""

    device: str
    quick: bool
    budget: float
    out: Path
    start: float = field(default_factory=time.monotonic)
    told: Told = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)  # sections may run side by side
    running: set[subprocess.Popen[str]] = field(default_factory=set)
    over: bool = False

    def __post_init__(self) -> None:
        self.told |= {"device": self.device, "quick": self.quick, "sections": {}, "measurements": {}}

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.start)

    def environment(self, **more: str) -> dict[str, str]:
        # Children of a pytest-xdist worker would take themselves for workers, and wait for a controller.
        own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        paths = [str(ROOT), str(ROOT / "python"), own.get("PYTHONPATH", "")]
        # Compilers keep what they have made in the home folder, which may be read-only.
        caches = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDA_CACHE_PATH": "cuda"}
        kept = {name: str(ROOT / "build/gpu" / folder) for name, folder in caches.items()}
        return {**kept, **own, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}

    def all(self, commands: dict[str, Sequence[str]], limit: float, **environment: str) -> dict[str, Done]:
        """Runs commands side by side; those that take longer than `limit` seconds are stopped."""
        if self.over:
            raise RuntimeError("the run was ended")
        start, running, found = time.monotonic(), {}, {}
        with tempfile.TemporaryDirectory() as folder:
            try:
                for name, command in commands.items():
                    output = (Path(folder) / name).open("w+", encoding="utf-8", errors="replace")
                    process = subprocess.Popen(
                        command,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        cwd=ROOT,
                        env=self.environment(**environment),
                        start_new_session=True,
                        text=True,
                    )
                    self.running.add(process)
                    running[name] = process, output
                for name, (process, output) in running.items():
                    try:
                        code: int | None = process.wait(max(0.1, limit - (time.monotonic() - start)))
                    except subprocess.TimeoutExpired:
                        code = None
                        self.stop(process)
                    output.seek(0)
                    found[name] = Done(code, output.read(), time.monotonic() - start)
            finally:
                for process, output in running.values():
                    self.stop(process)
                    output.close()
        return found

    def stop(self, process: subprocess.Popen[str]) -> None:
        """Ends a process and all that it started."""
        self.running.discard(process)
        if process.poll() is not None:
            return
        os.killpg(process.pid, signal.SIGKILL)  # the session that was started for it
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs may hold it for good
            process.wait(10)

    def end(self) -> None:
        """Ends all that runs, and lets nothing start any more."""
        self.over = True
        for process in list(self.running):
            self.stop(process)

    def one(self, command: Sequence[str], limit: float, **environment: str) -> Done:
        return self.all({"one": command}, limit, **environment)["one"]

    def section(self, name: str, needs: float, body: Callable[[], Told]) -> None:
        """Runs a section and keeps its results; nothing that it raises ends the run."""
        begun = time.monotonic()
        if self.left() < needs:
            told: Told = {"state": "skipped", "why": f"{self.left():.0f} s were left, it needs {needs:.0f} s"}
        else:
            try:
                told = body()
            except Exception as error:  # recorded, since the other sections are still worth having
                told = {"state": "failed", "why": f"{type(error).__name__}: {error}"}
        told["seconds"] = round(time.monotonic() - begun, 1)
        with self.lock:
            self.told["sections"][name] = told
            why = f": {told['why']}" if told.get("why") else ""
            print(f"{told['state']:8}{name}, {told['seconds']:g} s{why}")
            if told["state"] == "failed" and told.get("output"):
                print("        | " + told["output"][-1500:].replace("\n", "\n        | "))
            sys.stdout.flush()
            self.write()

    def together(self, sections: dict[str, tuple[float, Callable[[], Told]]]) -> None:
        with ThreadPoolExecutor(len(sections)) as pool:
            for one in [pool.submit(self.section, name, *given) for name, given in sections.items()]:
                one.result()

    def write(self) -> None:
        self.told["seconds"] = round(time.monotonic() - self.start, 1)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.told, indent=1) + "\n")


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def skipped(why: str) -> Told:
    return {"state": "skipped", "why": why}


def last_line(done: Done) -> Told:
    """The JSON that a process printed last."""
    if done.code != 0:
        raise RuntimeError(done.tail)
    return dict(json.loads(done.output.strip().splitlines()[-1]))


# Sections


def first_import(run: Run, code: str) -> Done:
    """A process that imports torch. On a machine that has just started this may take minutes, and the first process may
    be stopped while the files are still being read; a second one finds them. It may take longer than the budget: what
    does not fit afterwards is skipped."""
    done = run.one(python("-c", code), COLD)
    return done if done.code is not None else run.one(python("-c", code), COLD)


def about(run: Run) -> Told:
    run.told["about"] = last_line(first_import(run, ABOUT))
    if run.cuda and "gpu" not in run.told["about"]:
        raise RuntimeError(f"the torch of {sys.executable} finds no GPU (PY=... make gpu takes another Python)")
    for tool, command in {
        "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        "nvcc": ["nvcc", "--version"],
    }.items():
        if run.cuda and shutil.which(command[0]):
            found = re.findall(r"\d+\.\d[\d.]*", run.one(command, 20).output)
            run.told["about"][tool] = found[-1] if found else None
    known = run.told["about"]
    words = [known.get("gpu", "cpu"), f"torch {known['torch']}", f"triton {known['triton']}", f"CUDA {known['cuda']}"]
    return {
        "state": "passed",
        "why": ", ".join([*words, f"driver {known.get('driver')}", f"setuptools {known['setuptools']}"]),
    }


def build(run: Run) -> Told:
    def built() -> bool:
        done = first_import(run, BUILT)
        if done.code == 0:
            run.told |= last_line(done)
        return done.code == 0 and (not run.cuda or bool(run.told["cuda kernels"]))

    if built():
        return {"state": "passed", "why": "it was built before"}
    if not run.cuda:
        return {"state": "failed", "why": "build the package first: make setup, or make build"}
    environment = {
        "MAX_JOBS": str(max(1, os.cpu_count() or 1)),
        "NVCC_APPEND_FLAGS": "-lineinfo",  # so that the sanitizer names lines; the machine code is the same
    }
    # In place: nothing is installed into this Python. setup.py compiles for the GPUs that it finds.
    command = python("setup.py", "-q", "build_ext", "--inplace")
    done = run.one(command, min(240, run.left() - 60), **environment)
    if done.code == 0 and built():
        return {"state": "passed", "why": f"in {done.took:.0f} s"}
    said = f"{done.ending}: {done.output}"
    # The ops are declared in the compiled part, so without it nothing is there for Triton to serve.
    done = run.one(command, min(240, run.left() - 60), **environment, SHIRA_CUDA="0")
    built()
    why = "without CUDA kernels: the rest is about Triton alone" if "backends" in run.told else "nothing was built"
    return {"state": "failed", "why": why, "output": (said + done.output * (done.code != 0))[-KEPT:]}


def tests(run: Run, **environment: str) -> Told:
    """The contract tests of every family on the device, the families side by side."""
    if not find_spec("pytest"):
        return skipped("pytest is not installed, so parity is all that is proved")
    families = ("switch",) if run.quick else FAMILIES
    chosen = "cuda" if run.cuda else "test_twice and dispatcher and float32"
    limit = min(PROVING, run.left() - 5)
    options = ["-q", "-k", chosen, "--maxfail=10", "-W", "default", "-p", "no:cacheprovider", "--tb=short"]
    options += ["-p", "benchmarks.speed.pytest_gpu", "--seconds", str(max(1, limit - 25))]
    commands = {name: python("-m", "pytest", *options, f"tests/ops/test_{name}.py") for name in families}
    told: Told = {"state": "passed", "families": {}}
    output, counts = "", []
    for name, done in run.all(commands, limit, **environment).items():
        lines = re.findall(
            r"^[= ]*(\d+ (?:passed|failed|error|skipped|deselected).* in [\d.]+s)", done.output, re.MULTILINE
        )
        said = lines[-1] if lines else done.output.strip()[-200:]
        missing = re.search(r"No module named '(\w+)'", done.output) if done.code in (2, 4) else None
        if missing:
            said = f"not run: there is no {missing[1]}"
        elif done.code is None:
            said = "did not end in time"
        elif done.code == 5:
            said = "no test of it names the device"
        # pytest ends with 2 where it was told that the time is up, too.
        short = done.code == 2 and "the time is up" in done.output and " failed" not in said and " error" not in said
        if done.code not in (0, 5) and not missing and not short:
            told["state"] = "failed"
            output += f"test_{name}.py:\n{done.output[-6000:]}\n"
        told["families"][name] = said
        passed = re.findall(r"\d+ passed", said)
        more = "".join(f", {one}" for one in re.findall(r"\d+ (?:failed|errors?)\b", said))
        counts.append(f"{name} {passed[0]}{more}{' in the time given' * short}" if passed else f"{name}: {said}")
    return {**told, "why": "; ".join(counts), "output": output[-KEPT:]}


def proofs(run: Run, program: str, limit: float, **environment: str) -> Told:
    """Runs a program of proofs. Where its process is lost, another goes on after the proof that lost it."""
    end, found, lost, first, of, tail = time.monotonic() + limit, dict[str, Told](), dict[int, str](), 0, -1, ""
    options = ["--device", run.device, *["--once"] * run.quick]
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines"
        while first != of and len(lost) < LOST and (rest := end - time.monotonic()) > 5:
            command = python(
                "-m", f"benchmarks.speed.{program}", *options, "--lines", str(lines), "--first", str(first)
            )
            done = run.one(command, rest, **environment)
            found, tail = written(lines), done.tail
            if not found:  # it did not start
                break
            ended = [one["number"] + 1 for one in found.values()]
            of, went = next(one["of"] for one in found.values()), max(first, *ended)
            if went != of and done.code is not None and (done.code != DEVICE_LOST or went == first):
                lost[went] = f"{done.ending}: {tail}"
                went += 1
            first = went
            if done.code is None:
                break
    errors = {name: one["traceback"] for name, one in found.items() if "error" in one}
    errors |= {f"proof number {number}": f"its process was lost: {why}" for number, why in lost.items()}
    good = sum("error" not in one for one in found.values())
    said = [one["said"] for one in found.values() if "said" in one]
    why = [f"{good} of {max(of, 0)} proofs hold"] if found else ["it did not start"]
    why += [f"{of - first} were not reached"] * (first != of and bool(found)) + [f"{len(errors)} failed"] * bool(errors)
    output = "".join(f"{name}: {text}\n" for name, text in errors.items()) or tail * (first != of)
    told: Told = {
        "state": "failed" if errors or not found else "passed",
        "why": "; ".join(why + list(dict.fromkeys(said))),
    }
    return {**told, "failed": list(errors), "output": output[-KEPT:] * (told["state"] == "failed" or first != of)}


def ours(reports: str) -> int:
    """How many reports of initcheck are about our kernels. The line after `Uninitialized` names the code that reads;
    where it was inlined, `Device Frame` lines name the code that it was inlined into. Frames of the host follow."""
    found = 0
    for report in re.split(r"^=+ +(?=Uninitialized )", reports, flags=re.MULTILINE)[1:]:
        device = re.split(r"^=+ +Saved host backtrace|^=+\s*$", report, maxsplit=1, flags=re.MULTILINE)[0]
        found += bool(re.search(r"^=+ +(?:at|Device Frame:).*shira", device, flags=re.MULTILINE))
    return found


def sanitizer(run: Run) -> Told:
    if not run.cuda:
        return skipped("compute-sanitizer needs a GPU")
    folders = os.pathsep.join(["/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"])
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=folders)
    if tool is None:
        return skipped("there is no compute-sanitizer")
    program = python("-m", "benchmarks.speed.gpu_ops", "--once")
    ours_alone = ["--kernel-name", "kernel_substring=shira", "--error-exitcode", "9"]
    options = {
        # Watches everything but API errors: torch itself makes calls that are meant to fail.
        "memcheck": ["--report-api-errors", "no", "--error-exitcode", "9"],
        # These watch our kernels, whose names contain shira.
        "racecheck": ours_alone,
        "synccheck": ours_alone,
        # Has to see everything that writes. torch's kernels may read memory that nobody wrote, however often; only
        # reports about ours count.
        "initcheck": ["--print-limit", "0"],
    }
    commands = {name: [tool, "--tool", name, *own, *program] for name, own in options.items()}
    found = run.all(commands, min(90, 0.6 * run.left()), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if all(done.code != 0 and "Device not supported" in done.output for done in found.values()):
        return skipped("compute-sanitizer does not work on this machine: Device not supported")
    said, bad = {}, []
    for name, done in found.items():
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", done.output)
        said[name] = summary[-1] if summary else f"exit {done.code}"
        if name == "initcheck":
            own = ours(done.output)
            said[name] += f", {own} of them in our kernels"
            bad += [name] * bool(own)
        if done.code is None:
            said[name] = "did not end in time"
        elif done.code != 0:
            bad.append(name)
    state = "failed" if bad else "passed" if any(done.code == 0 for done in found.values()) else "skipped"
    told = {"state": state, "why": "; ".join(f"{name}: {one}" for name, one in said.items())}
    return {**told, "output": "\n".join(found[name].output[-KEPT // 4 :] for name in dict.fromkeys(bad))}


def profile(run: Run) -> Told:
    """What ncu counts in the first swaps of a whole model."""
    if not run.cuda:
        return skipped("ncu needs a GPU")
    tool = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if tool is None:
        return skipped("there is no ncu")
    with tempfile.TemporaryDirectory() as folder:
        program = python("-m", "benchmarks.speed.gpu_bench", "--lines", f"{folder}/lines", "--only", "swap")
        chosen = ["--kernel-name-base", "demangled", "--kernel-name", "regex:shira", "--launch-count", "2"]
        # The clocks stay as they are.
        options = ["--csv", "--page", "raw", "--kill", "yes", "--clock-control", "none", "--metrics", ",".join(METRICS)]
        done = run.one([tool, *chosen, *options, *program], min(90, run.left()))
    for sign in ("ERR_NVGPUCTRPERM", "LibraryNotLoaded"):
        if sign in done.output:
            return skipped(f"the GPU's counters may not be read here ({sign})")
    kernels = counted(done.output)
    if not kernels:
        return {"state": "failed", "why": f"ncu told nothing (exit status {done.code})", "output": done.tail}
    why = "; ".join(f"{kernel['Kernel Name'][:60]}: {kernel.get(METRICS[3], 'not told')}" for kernel in kernels)
    return {"state": "passed", "why": f"of the memory's peak: {why}", "kernels": kernels}


def counted(output: str) -> list[dict[str, str]]:
    """The kernels of an output of `ncu --csv --page raw`: a head, the units, and a row for each kernel."""
    lines = output.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if head is None:
        return []
    table = csv.DictReader(line for line in lines[head:] if line.startswith('"'))
    units = next(table, {})
    kept = ("Kernel Name", *METRICS)
    return [
        {name: f"{kernel[name]} {units.get(name) or ''}".strip() for name in kept if kernel.get(name) is not None}
        for kernel in table
    ]


def written(lines: Path) -> dict[str, Told]:
    """The measurements that a process wrote; it may have been stopped in the middle of a line."""
    found = {}
    for line in lines.read_text().splitlines() if lines.exists() else []:
        try:
            one = json.loads(line)
        except ValueError:
            continue
        found[one["name"]] = one
    return found


def measure(run: Run, backend: str, names: Sequence[str], limit: float, **environment: str) -> Told:
    """Measures what there is time for; where a process is lost, another is started for the rest."""
    found: dict[str, Told] = run.told["measurements"].setdefault(backend, {})
    end, waiting = time.monotonic() + limit, list(names)
    # Beside the result, so that measurements are kept even if this process is stopped.
    lines = run.out.with_suffix(f".{backend}.lines")
    while waiting and (rest := end - time.monotonic()) > 5:
        lines.parent.mkdir(parents=True, exist_ok=True)
        lines.unlink(missing_ok=True)
        command = python("-m", "benchmarks.speed.gpu_bench", "--device", run.device, "--lines", str(lines))
        done = run.one([*command, *["--quick"] * run.quick, "--only", *waiting], rest, **environment)
        found.update(written(lines))
        run.write()
        lines.unlink(missing_ok=True)
        before, waiting = len(waiting), [name for name in waiting if name not in found]
        if done.code is None:
            break
        # Where the device was lost, the measurement that lost it has been reported already.
        if waiting and (done.code != DEVICE_LOST or len(waiting) == before):
            lost = waiting.pop(0)
            found[lost] = {"name": lost, "error": f"its process ended with {done.code}", "traceback": done.tail}
    found = {name: one for name, one in found.items() if name in names}
    bad = {name: one["error"] for name, one in found.items() if "error" in one}
    state = "failed" if bad or (not found and not waiting) else "skipped" if len(waiting) == len(names) else "passed"
    why = [f"{len(found) - len(bad)} measured"]
    why += [f"no time left for {', '.join(waiting)}"] * bool(waiting) + [f"{k}: {v}" for k, v in bad.items()]
    output = "\n".join(found[name].get("traceback", "") for name in bad)
    return {"state": state, "why": "; ".join(why), "not measured": waiting, "output": output}


# The table


def rows(measurements: dict[str, dict[str, Told]]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for backend, named in measurements.items():
        for name, one in named.items():
            if "error" in one:
                found.append((backend, name, "FAILED", one["error"].splitlines()[0][:60], "", "", ""))
            for way, seconds in one.get("seconds", {}).items():
                moved, share = one["bytes"].get(way), one["share of copy"].get(way)
                middle, low, high = (f"{seconds[k] * 1e3:.4g}" for k in ("median", "low", "high"))
                gigabytes = "" if moved is None else f"{moved / 1e9:.3g}"
                rate = "" if moved is None else f"{moved / seconds['median'] / 1e9:.4g}"
                found.append(
                    (backend, name, way, f"{middle} ({low}..{high})", gigabytes, rate, f"{share:.2f}" if share else "")
                )
    return found


def show(told: Told) -> None:
    head = ("backend", "measurement", "way", "ms (quartiles)", "GB moved", "GB/s", "of copy")
    table = [head, *rows(told["measurements"])]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    print("\nTiny sizes: the figures mean nothing." if told["quick"] else "")
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
    for backend, named in told["measurements"].items():
        for name, one in named.items():
            for ratio, value in one.get("times as long", {}).items():
                print(f"{backend}, {name}: {ratio} = {value:.3g}")
            for fact in ("G indices/s", "of read bandwidth", "share of sectors", "share of pairs", "steps/s"):
                if fact in one:
                    print(f"{backend}, {name}: {fact} {one[fact]}")
            if "left out" in one:
                print(f"{backend}, {name}: left out: {one['left out']}")
            if "peak bytes" in one:
                print(f"{backend}, {name}: peak bytes {one['peak bytes']}")
    print("\nIn short:")
    order = ("passed", "skipped", "failed")
    for name, one in sorted(told["sections"].items(), key=lambda item: order.index(item[1]["state"])):
        why = " ".join(one.get("why", "").split())
        print(f"{one['state']:8}{name}{': ' * bool(why)}{why[:400]}")
        for failed in one.get("failed", [])[:20]:
            print(f"            {failed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--budget", type=float, default=440, help="seconds for all of it (440)")
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES, help="measurements (all)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu-name>.json")
    given = parser.parse_args()
    run = Run(given.device, given.quick, given.budget, given.out or ROOT / "benchmarks/results/gpu.json")

    def ended(*_: object) -> None:
        run.end()
        sys.exit(143)

    signal.signal(signal.SIGTERM, ended)
    try:
        everything(run, given.only, named=given.out is not None)
    finally:
        run.end()
        show(run.told)
        print(f"\n{run.told.get('seconds', 0):g} s; written to {run.out}")
    sys.exit(any(one["state"] == "failed" for one in run.told["sections"].values()))


def everything(run: Run, names: Sequence[str], named: bool) -> None:
    run.section("about", 2, lambda: about(run))
    if not named:
        run.out.unlink(missing_ok=True)
    if run.told["sections"]["about"]["state"] != "passed":
        sys.exit(1)
    if not named:
        name = re.sub(r"[^a-z0-9]+", "-", run.told["about"].get("gpu", "cpu").lower()).strip("-")
        run.out = run.out.with_name(f"{name}.json")
    run.section("build", 60 if run.cuda else 4, lambda: build(run))
    # Why sections are left out: all that need the package, the compiled kernels, a GPU, Triton.
    nothing = compiled = triton = ""
    if "backends" not in run.told and run.told["sections"]["build"]["state"] != "skipped":
        nothing = compiled = triton = "nothing was built"
    if run.cuda and not run.told.get("cuda kernels"):
        compiled = compiled or "there are no compiled kernels"
    if not run.cuda:
        triton = "Triton's kernels need a GPU"
    elif not run.told["about"]["triton"]:
        triton = "there is no triton"
    graphs = "" if run.cuda else "CUDA graphs need a GPU"
    chosen = {"SHIRA_BACKEND": "triton"}

    def proving(needs: float, why_not: str, program: str, **more: str) -> tuple[float, Callable[[], Told]]:
        if why_not:
            return 0, lambda: skipped(why_not)
        return needs, lambda: proofs(run, program, min(PROVING, run.left() - 2), OMP_NUM_THREADS="2", **more)

    run.together(
        {
            "parity, compiled": proving(10, compiled, "gpu_ops"),
            "captured graphs": proving(15, compiled or graphs, "gpu_graph"),
            "torch": proving(15, nothing, "gpu_torch"),
            "contract tests": (20, lambda: skipped(nothing) if nothing else tests(run)),
            "parity, triton": proving(15, triton, "gpu_ops", **chosen),
            "captured graphs, triton": proving(15, triton, "gpu_graph", **chosen),
        }
    )

    def measuring(backend: str, why_not: str, names: Sequence[str], part: float, **more: str) -> None:
        name = f"measurements, {backend}"
        if name in run.told["sections"]:
            name += ", the rest"
        if not why_not and not names:
            return
        body = (lambda: skipped(why_not)) if why_not else lambda: measure(run, backend, names, limit, **more)
        limit = part * run.left() - 5
        run.section(name, 0 if why_not else 15, body)

    def waiting(backend: str) -> list[str]:
        return [name for name in names if name not in run.told["measurements"].get(backend, {})]

    measuring("compiled", compiled, names, 0.5 if run.cuda else 1)
    run.section("large weights", *proving(20, nothing, "gpu_large"))
    run.section("sanitizer", 30, lambda: skipped(compiled) if compiled else sanitizer(run))
    run.section("profile", 30, lambda: skipped(compiled) if compiled else profile(run))
    if not compiled and run.told["sections"]["measurements, compiled"]["state"] != "skipped":
        measuring("compiled", "", waiting("compiled"), 0.7)
    measuring("triton", triton, names, 0.7, **chosen)
    run.section("contract tests, triton", 30, lambda: skipped(triton) if triton else tests(run, **chosen))


if __name__ == "__main__":
    main()
