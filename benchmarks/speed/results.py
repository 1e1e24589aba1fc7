"""Results of runs: read, looked up by line, compared with the committed ones or with a second run.

python -m benchmarks.speed.results compare   # latest.json beside cpu-zen4.json: what got worse?
python -m benchmarks.speed.results agree     # latest.json beside again.json: which ratios came out the same?

record.py makes a run the committed one.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed import summary

FOLDER = Path(__file__).parent.parent / "results"
LATEST, AGAIN = FOLDER / "latest.json", FOLDER / "again.json"
COMMITTED = "cpu-zen4"
WORSE = 1.2  # a ratio this many times as bad as it was is a regression
SAME = 1.1  # medians that are no further apart agree; quartiles further than this from their median lie wide
CPU = ("brand_raw", "family", "model", "stepping", "count", "hz_actual_friendly", "l2_cache_size", "l3_cache_size")


def trim(raw: dict[str, Any], *, quick: bool = False) -> dict[str, Any]:
    """What is kept of pytest-benchmark's output: the machine (not its name), and what each benchmark reported.

    Refuses a `--quick` run, whose figures mean nothing, unless `quick`. Trimming twice changes nothing more.
    """
    found = [one for one in raw["benchmarks"] if one["extra_info"]]
    if not found:
        raise ValueError("no benchmark reported anything")
    if not quick and any(one["extra_info"].get("quick") for one in found):
        raise ValueError("a --quick run: its figures mean nothing")
    machine = raw["machine_info"]
    return {
        "machine_info": {
            "python": machine.get("python_version", machine.get("python")),
            "cpu": {key: machine["cpu"][key] for key in CPU if key in machine["cpu"]},
            "torch": machine["torch"],
        },
        "benchmarks": [{"name": one["name"], "extra_info": one["extra_info"]} for one in found],
    }


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


Key = tuple[str, str, int]  # line, variant, threads


def figures(results: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """Every result, by its line, variant and threads."""
    found: dict[Key, dict[str, Any]] = {}
    for one in results["benchmarks"]:
        info = one["extra_info"]
        for result in info["results"]:
            key = (result["line"], result["variant"], info["threads"])
            if key in found:
                raise ValueError(f"{one['name']}: measured twice: {key}")
            found[key] = result
    return found


@dataclass(frozen=True)
class Regression:
    key: Key
    before: float
    now: float

    @property
    def factor(self) -> float:
        """How many times as bad as it was."""
        return max(self.before / self.now, self.now / self.before)

    def __str__(self) -> str:
        line, variant, threads = self.key
        case = ", ".join(filter(None, (variant, f"{threads} thread{'s' * (threads > 1)}")))
        text = f"{summary.LINES[line].text} ({case})"
        return f"{text}: {self.now:.3g}, was {self.before:.3g}: {self.factor:.2f} times as bad"


@dataclass(frozen=True)
class Comparison:
    worse: list[Regression]
    compared: int
    missing: list[Key]  # measured then, not now


def compare(before: dict[str, Any], now: dict[str, Any]) -> Comparison:
    """The guarded ratios that got worse by more than WORSE, both in the median and in the fastest rounds: disturbed
    rounds move only one of them. Seconds, rates and bytes are left out, since they differ from day to day."""
    then, fresh = figures(before), figures(now)
    worse, compared, missing = [], 0, []
    for key, result in then.items():
        line = summary.LINES.get(key[0])
        if line is None or not line.is_ratio or not line.guarded:
            continue
        if key not in fresh:
            missing.append(key)
            continue
        compared += 1
        pairs = [(result[name], fresh[key][name]) for name in ("median", "best")]
        if all((was / is_now if line.at_least else is_now / was) > WORSE for was, is_now in pairs):
            worse.append(Regression(key, *pairs[0]))
    return Comparison(sorted(worse, key=lambda one: -one.factor), compared, missing)


def is_ratio(key: Key) -> bool:
    return key[0] in summary.LINES and summary.LINES[key[0]].is_ratio


def distance(a: float, b: float) -> float:
    """How many times as large the larger is."""
    if a == b:
        return 1.0
    return max(a / b, b / a) if a > 0 and b > 0 else float("inf")


def apart(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[float, Key]]:
    """How far two runs disagree about each ratio, the largest first: 1.1 is 10 %."""
    then, fresh = figures(before), figures(now)
    keys = filter(is_ratio, then.keys() & fresh.keys())
    return sorted(((distance(then[key]["median"], fresh[key]["median"]), key) for key in keys), reverse=True)


def reach(result: dict[str, Any]) -> tuple[float, float]:
    """The range of a figure: the quartiles of its rounds, and a second run's median if there was one."""
    again = result.get("again", result["median"])
    return min(result["low"], again), max(result["high"], again)


def is_wide(result: dict[str, Any]) -> bool:
    """Whether the range reaches further than SAME from the median: then the second digit is uncertain."""
    return any(distance(result["median"], end) > SAME for end in reach(result))


def told(result: dict[str, Any]) -> str:
    return f"{result['median']:.3g} ({result['low']:.3g} to {result['high']:.3g})"


def agree(one: dict[str, Any], two: dict[str, Any]) -> tuple[list[str], int]:
    """A sentence for each ratio on which two runs disagree; and how many ratios they have in common."""
    first, second = figures(one), figures(two)
    found, said = apart(one, two), []
    for factor, key in found:
        if factor > SAME:
            a, b = first[key], second[key]
            why = "; the rounds themselves lie wide" if is_wide(a) or is_wide(b) else ""
            case = ", ".join(filter(None, (key[1], f"{key[2]} thread{'s' * (key[2] > 1)}")))
            line = summary.LINES[key[0]].text
            said.append(f"{factor - 1:4.0%} apart: {line} ({case}): {told(a)} and {told(b)}{why}")
    return said, len(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["compare", "agree"])
    parser.add_argument("--latest", type=Path, default=LATEST, help="JSON written by --benchmark-json")
    parser.add_argument("--again", type=Path, help="JSON of a second run, for agree")
    parser.add_argument(
        "--name", default=COMMITTED, help="name of the committed file, without .json; each machine has one"
    )
    arguments = parser.parse_args()
    if arguments.what == "agree":
        said, count = agree(*(trim(read(path)) for path in (arguments.latest, arguments.again or AGAIN)))
        for one in said:
            print(one)
        for path in (arguments.latest, arguments.again or AGAIN):
            infos = [one["extra_info"] for one in trim(read(path))["benchmarks"]]
            if disturbed := sum(map(summary.is_disturbed, infos)):
                print(f"{path.name}: other processes had the processor in {disturbed} of {len(infos)} benchmarks")
        print(f"{count - len(said)} of {count} ratios agree within {SAME - 1:.0%}")
        return 1 if said else 0
    before, now = read(FOLDER / f"{arguments.name}.json"), trim(read(arguments.latest))
    if before["machine_info"]["cpu"].get("model") != now["machine_info"]["cpu"].get("model"):
        print(f"this is not the processor of {arguments.name}.json, and ratios depend on the processor too")
    found = compare(before, now)
    for one in found.worse:
        print(f"worse: {one}")
    if found.missing:
        print(f"not measured this time: {len(found.missing)} of {len(found.missing) + found.compared} ratios")
    far = apart(before, now)
    within = sum(factor <= SAME for factor, _ in far)
    print(f"{found.compared} ratios compared: {len(found.worse)} worse by more than {WORSE - 1:.0%}, "
          f"{within} within 10 % of what they were")  # fmt: skip
    return 1 if found.worse else 0


if __name__ == "__main__":
    sys.exit(main())
