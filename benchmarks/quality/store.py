"""Results that outlive the process: one JSON object per line, appended when a run ends, keyed by what was run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Run = dict[str, Any]
"""What was run, completely: two runs with the same description have the same result."""


def key(run: Run) -> str:
    return json.dumps(run, sort_keys=True)


def _plain(value: Any) -> Any:
    """JSON has neither infinities nor NaN: None stands for them. Seven digits are enough."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


class Store:
    """The results of one family, ``results/<family>.jsonl``.

    A process that was killed while it wrote leaves part of a line at the end. It is cut off, and the run is done again.
    """

    def __init__(self, family: str, folder: Path = RESULTS) -> None:
        self.path = folder / f"{family}.jsonl"
        self._found: dict[str, tuple[Run, dict[str, Any]]] = {}
        if self.path.exists():
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                with self.path.open("r+b") as file:
                    file.truncate(whole)
            for number, line in enumerate(content[:whole].decode().splitlines(), 1):
                try:
                    one = json.loads(line)
                    self._found[key(one["run"])] = one["run"], one["result"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{self.path}, line {number} is not a result: {error}") from error

    def get(self, run: Run) -> dict[str, Any] | None:
        found = self._found.get(key(run))
        return found[1] if found else None

    def add(self, run: Run, result: dict[str, Any]) -> dict[str, Any]:
        """Keeps a result, and returns it as it will be read later."""
        text = json.dumps({"run": run, "result": _plain(result)}, allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        one = json.loads(text)
        self._found[key(one["run"])] = one["run"], one["result"]
        kept: dict[str, Any] = one["result"]
        return kept

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[tuple[Run, dict[str, Any]]]:
        return iter(list(self._found.values()))
