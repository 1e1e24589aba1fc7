"""Runs the benchmarks, each file in a process of its own, so that none is affected by another; a stopped run goes on.

python -m benchmarks.speed.suite --out benchmarks/results/latest.json            # a selection; --full: all cases
python -m benchmarks.speed.suite --out latest.json --only scaling paper          # these files alone

The results of each finished file are kept in a folder beside `--out`. When all files are done they become one file, and
the folder is removed. A stopped run goes on with the file it was at, unless the arguments or the code have changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed import summary

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NOTHING_CHOSEN = 5  # pytest's exit status where no case was selected
CODE = (
    "benchmarks/speed/**/*.py",
    "benchmarks/speed/**/*.cpp",
    "shira_ops/*.py",
    "shira_ops/*.so",
    "python/shira/**/*.py",
)


def stamp(arguments: Sequence[str]) -> str:
    """A hash of what decides a result; results that were kept under another stamp are not used."""
    digest = hashlib.sha256(json.dumps(list(arguments)).encode())
    for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def measure(file: Path, part: Path, arguments: Sequence[str]) -> tuple[int, float, str]:
    """Runs one file: pytest's exit status, the largest memory of its process in GB, and what it printed."""
    fresh, log = part.with_suffix(".part"), part.with_suffix(".log")
    command = [sys.executable, "-m", "pytest", str(file), "-q", f"--benchmark-json={fresh}", *arguments]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    code = os.waitstatus_to_exitcode(status)
    process.returncode = code
    if code == 0:
        fresh.rename(part)  # so that the file is whole, or not there
    elif code == NOTHING_CHOSEN:
        part.write_text("null")
    return code, usage.ru_maxrss / 2**20, log.read_text()


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def run(files: Iterable[Path], out: Path, arguments: Sequence[str]) -> bool:
    """Measures what is still missing. Writes `out` and returns True if everything went well."""
    files, parts = list(files), out.with_suffix(".parts")
    mark = stamp([*arguments, *(file.name for file in files)])
    if not (parts / "stamp").exists() or (parts / "stamp").read_text() != mark:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        (parts / "stamp").write_text(mark)
    start, failed = time.monotonic(), []
    for number, file in enumerate(files, 1):
        part, name = parts / f"{file.stem}.json", f"[{number}/{len(files)}] {file.stem}"
        if part.exists():
            print(f"{name}: already done", flush=True)
            continue
        began = time.monotonic()
        code, memory, text = measure(file, part, arguments)
        now = time.monotonic()
        if code not in (0, NOTHING_CHOSEN):
            failed.append(file.stem)
            print(text)
        done = {0: "done", NOTHING_CHOSEN: "nothing selected"}.get(code, "FAILED")
        print(f"{name}: {done}, {clock(now - began)} of {clock(now - start)}, {memory:.1f} GB at most", flush=True)
    if failed:
        print(f"not written: {out}. Failed: {', '.join(failed)}; run the same command again to go on with them")
        return False
    found = [json.loads((parts / f"{file.stem}.json").read_text()) for file in files]
    out.write_text(json.dumps(joined(one for one in found if one is not None)))
    shutil.rmtree(parts)
    print(f"{out}: written, {clock(time.monotonic() - start)}")
    return True


def joined(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Several of pytest-benchmark's files, of one machine, as one."""
    first, *others = found
    return {**first, "benchmarks": [*first["benchmarks"], *(one for other in others for one in other["benchmarks"])]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="the JSON file of all results, as --benchmark-json writes it"
    )
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="run bench_FAMILY.py alone")
    known, arguments = parser.parse_known_args()  # the rest is pytest's
    files = sorted(HERE.glob("bench_*.py"))
    if known.only:
        names = {file.stem.removeprefix("bench_"): file for file in files}
        unknown = sorted(set(known.only) - set(names))
        if unknown:
            parser.error(f"no such family: {', '.join(unknown)}; there are {', '.join(names)}")
        files = [names[name] for name in known.only]
    if not run(files, known.out, arguments):
        return 1
    summary.show(json.loads(known.out.read_text())["benchmarks"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
