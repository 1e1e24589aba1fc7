"""The speed benchmarks still run, each of them once, on tiny layers. The figures mean nothing and are not checked."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="pip install -e '.[bench]'")
from benchmarks.speed import summary

ROOT = Path(__file__).parents[2]
SPEED = ROOT / "benchmarks" / "speed"


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pytest_benchmark", "peft"))), reason="pip install -e '.[bench]'"
)
def test_every_line_is_measured(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(SPEED),
        "-q",
        "--quick",
        "--full",
        "-k",
        "1thread or peers",  # peers share layers with the case of one thread before
        f"--benchmark-json={results}",
    ]
    # pytest-benchmark turns itself off under xdist, and takes the children of a worker for workers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())["benchmarks"]
    measured = {result["line"] for one in found for result in one["extra_info"]["results"]}

    table = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.summary", str(results), "--details"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert table.returncode == 0, table.stderr
    assert measured == set(summary.LINES)

    # New results make a page too, which says that they are of a quick run.
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.report", str(results), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "A --quick run" in (tmp_path / "report.html").read_text()
