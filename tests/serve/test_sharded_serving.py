"""Switcher and Overlay on weights that ranks hold together. What the ranks check is in `serve_ranks`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_switch_as_one_process_does(count: int, tmp_path: Path) -> None:
    command = [sys.executable, str(TESTS / "ranks.py"), str(count), str(tmp_path), str(TESTS / "serve/serve_ranks.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    assert sorted(path.name for path in tmp_path.glob("serve_ranks/done.*")) == [f"done.{n}" for n in range(count)]
