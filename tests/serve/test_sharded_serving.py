"""Switcher and Overlay on weights that ranks hold together. What the ranks check is in `serve_ranks`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent


def run(count: int, folder: Path, *programs: Path) -> list[str]:
    """What the ranks print."""
    command = [sys.executable, str(TESTS / "ranks.py"), str(count), str(folder), *map(str, programs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    assert sorted(path.name for path in folder.glob("serve_ranks/done.*")) == [f"done.{rank}" for rank in range(count)]
    return done.stdout.splitlines()


def test_two_ranks_switch_as_one_process_does(tmp_path: Path) -> None:
    lines = run(2, tmp_path, TESTS.parent / "examples/serve_sharded.py", TESTS / "serve/serve_ranks.py")
    assert [line.split()[0] for line in lines[:4]] == ["formal", "brief", "formal", "base"]
    assert len({line.split()[-1] for line in lines[:4]}) == 4
    assert lines[4] == "the base is back, bit for bit: True"


def test_four_ranks_switch_as_one_process_does(tmp_path: Path) -> None:
    run(4, tmp_path, TESTS / "serve/serve_ranks.py")
