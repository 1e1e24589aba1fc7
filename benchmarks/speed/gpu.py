"""One command on a machine with an NVIDIA GPU and no network: it builds, proves, measures, and writes what it found.

python -m benchmarks.speed.gpu        (or: make gpu)

The sections, the most important first, are: build (unless the package is already built for this torch), parity of every
op with the references, captured graphs, measurements (gpu_bench.py) of the compiled kernels, contract tests, ncu's
counters, compute-sanitizer; then parity, captured graphs and measurements of Triton's kernels. Each runs in processes
of its own, so that a failure there does not end the run. A section that does not fit into the time left is reported as
skipped. Results are written as they come. The exit status is 1 where something failed.

`--device cpu --quick` runs, at tiny sizes, all that a CPU can, to see whether it works. The figures mean nothing then.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("switch", "fuse", "gradient", "optimize", "select", "fingerprint", "codec", "diff", "overlay", "refusals")
COLD = 180  # seconds that a first import of torch may take
DEVICE_LOST = 3  # the exit status of gpu_bench.py
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


@dataclass
class Run:
    """The time left, the environment of every process, and the results so far."""

    device: str
    quick: bool
    budget: float
    out: Path
    start: float = field(default_factory=time.monotonic)
    told: Told = field(default_factory=dict)

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
        return {**own, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}

    def all(self, commands: dict[str, Sequence[str]], limit: float, **environment: str) -> dict[str, Done]:
        """Runs commands side by side; those that take longer than `limit` seconds are stopped."""
        start, running, found = time.monotonic(), {}, {}
        with tempfile.TemporaryDirectory() as folder:
            for name, command in commands.items():
                output = (Path(folder) / name).open("w+")
                process = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=self.environment(**environment),
                    start_new_session=True,
                )
                running[name] = process, output
            for name, (process, output) in running.items():
                try:
                    code: int | None = process.wait(max(0.1, limit - (time.monotonic() - start)))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)  # the session that was started for it
                    process.wait()
                    code = None
                output.seek(0)
                found[name] = Done(code, output.read(), time.monotonic() - start)
                output.close()
        return found

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
        self.told["sections"][name] = told
        print(f"{told['state']:8}{name}, {told['seconds']:g} s{': ' if told.get('why') else ''}{told.get('why', '')}")
        if told["state"] == "failed" and told.get("output"):
            print("        | " + told["output"][-1500:].replace("\n", "\n        | "))
        sys.stdout.flush()
        self.write()

    def write(self) -> None:
        self.told["seconds"] = round(time.monotonic() - self.start, 1)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.told, indent=1) + "\n")


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def judged(done: Done, why: str = "") -> Told:
    """The result of a section of one process, which passed if its exit status is 0."""
    if done.code == 0:
        lines = done.output.strip().splitlines()
        return {"state": "passed", "why": why or (lines[-1] if lines else "")}
    why = "it did not end in time" if done.code is None else f"exit status {done.code}"
    return {"state": "failed", "why": why, "output": done.tail}


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
        "TORCH_CUDA_ARCH_LIST": run.told["about"]["capability"],
        "MAX_JOBS": str(max(1, os.cpu_count() or 1)),
        "NVCC_APPEND_FLAGS": "-lineinfo",  # so that the sanitizer names lines; the machine code is the same
    }
    pip = ["-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-build-isolation"]
    attempts = {
        "pip install -e .": python(*pip, "--no-deps", "-e", "."),
        # Where nothing may be installed into this Python.
        "setup.py build_ext --inplace": python("setup.py", "-q", "build_ext", "--inplace"),
    }
    said = ""
    for name, command in attempts.items():
        done = run.one(command, min(240, run.left() - 60), **environment)
        if done.code == 0 and built():
            return {"state": "passed", "why": name}
        said += f"{name}: {done.tail}\n"
    return {"state": "failed", "why": "without CUDA kernels the rest is about Triton alone", "output": said}


def tests(run: Run) -> Told:
    """The contract tests of every family on the device, the families side by side."""
    if not find_spec("pytest"):
        return skipped("pytest is not installed, so parity is all that is proved")
    families = ("switch",) if run.quick else FAMILIES
    chosen = "cuda" if run.cuda else "test_twice and dispatcher and float32"
    options = ["-q", "-k", chosen, "--maxfail=5", "-W", "default", "-p", "no:cacheprovider"]
    commands = {name: python("-m", "pytest", *options, f"tests/ops/test_{name}.py") for name in families}
    told: Told = {"state": "passed", "families": {}}
    output, counts = "", []
    for name, done in run.all(commands, min(110, 0.5 * run.left())).items():
        lines = done.output.strip().splitlines()
        said = lines[-1].strip("= ") if lines else ""
        missing = re.search(r"No module named '(\w+)'", done.output) if done.code in (2, 4) else None
        if missing:
            said = f"not run: there is no {missing[1]}"
        elif done.code is None:
            said = "did not end in time"
        elif done.code == 5:
            said = "no test of it names the device"
        if done.code not in (0, 5) and not missing:
            told["state"] = "failed"
            output += f"test_{name}.py:\n{done.output[-2500:]}\n"
        told["families"][name] = said
        counts.append(f"{name} {passed[0]}" if (passed := re.findall(r"\d+ passed", said)) else f"{name}: {said}")
    return {**told, "why": "; ".join(counts), "output": output}


def parity(run: Run, **environment: str) -> Told:
    command = python("-m", "benchmarks.speed.gpu_ops", "--device", run.device)
    return judged(run.one([*command, *["--once"] * run.quick], min(90, run.left()), **environment))


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
    options = {
        # Watches everything but API errors: torch itself makes calls that are meant to fail.
        "memcheck": ["--report-api-errors", "no", "--error-exitcode", "9"],
        # Watches our kernels, whose names contain shira.
        "racecheck": ["--kernel-name", "kernel_substring=shira", "--error-exitcode", "9"],
        # Has to see everything that writes. torch's kernels may read memory that nobody wrote, however often; only
        # reports about ours count.
        "initcheck": ["--print-limit", "0"],
    }
    commands = {name: [tool, "--tool", name, *own, *program] for name, own in options.items()}
    found = run.all(commands, min(90, 0.5 * run.left()), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
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
    return {**told, "output": "\n".join(found[name].tail for name in dict.fromkeys(bad))}


def graph(run: Run, **environment: str) -> Told:
    if not run.cuda:
        return skipped("CUDA graphs need a GPU")
    done = run.one(python("-m", "benchmarks.speed.gpu_graph"), min(60, run.left()), **environment)
    return judged(done, "; ".join(done.output.strip().splitlines()[-3:]))


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
        options = ["--csv", "--page", "raw", "--kill", "yes", "--metrics", ",".join(METRICS)]
        done = run.one([tool, *chosen, *options, *program], min(120, run.left()))
    if "ERR_NVGPUCTRPERM" in done.output:
        return skipped("this user may not read the GPU's counters")
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
    bad = {name: one["error"] for name, one in found.items() if "error" in one}
    state = "failed" if bad or not found else "skipped" if len(waiting) == len(names) else "passed"
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
            if "peak bytes" in one:
                print(f"{backend}, {name}: peak bytes {one['peak bytes']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--budget", type=float, default=440, help="seconds for all of it (440)")
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES, help="measurements (all)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu-name>.json")
    given = parser.parse_args()
    run = Run(given.device, given.quick, given.budget, given.out or ROOT / "benchmarks/results/gpu.json")
    run.section("about", 2, lambda: about(run))
    if given.out is None:
        run.out.unlink(missing_ok=True)
    if run.told["sections"]["about"]["state"] != "passed":
        sys.exit(1)
    if given.out is None:
        name = re.sub(r"[^a-z0-9]+", "-", run.told["about"].get("gpu", "cpu").lower()).strip("-")
        run.out = run.out.with_name(f"{name}.json")
    run.section("build", 60 if run.cuda else 4, lambda: build(run))
    run.section("parity, compiled", 10, lambda: parity(run))
    run.section("captured graphs", 15, lambda: graph(run))
    # First of all that takes long: tests, sanitizers and Triton have what time is left.
    run.section("measurements, compiled", 15, lambda: measure(run, "compiled", given.only, run.left() - 5))
    run.section("contract tests", 20, lambda: tests(run))
    run.section("profile", 30, lambda: profile(run))
    run.section("sanitizer", 30, lambda: sanitizer(run))
    if run.cuda and run.told["about"]["triton"] is not None:
        chosen = {"SHIRA_BACKEND": "triton"}
        run.section("parity, triton", 15, lambda: parity(run, **chosen))
        run.section("captured graphs, triton", 15, lambda: graph(run, **chosen))
        run.section("measurements, triton", 20, lambda: measure(run, "triton", given.only, run.left() - 5, **chosen))
    else:
        why = "there is no triton" if run.cuda else "Triton's kernels need a GPU"
        for name in ("parity, triton", "captured graphs, triton", "measurements, triton"):
            run.section(name, 0, lambda: skipped(why))
    show(run.told)
    print(f"\n{run.told['seconds']:g} s; written to {run.out}")
    sys.exit(any(one["state"] == "failed" for one in run.told["sections"].values()))


if __name__ == "__main__":
    main()
