"""Weights that ranks hold together. Four ranks train them, and find what one process finds: see `sharded_ranks`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent


def test_four_ranks(tmp_path: Path) -> None:
    command = [sys.executable, str(TESTS / "ranks.py"), "4", str(tmp_path), str(TESTS / "train/sharded_ranks.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    assert sorted(path.name for path in tmp_path.glob("sharded_ranks/done.*")) == [f"done.{rank}" for rank in range(4)]
