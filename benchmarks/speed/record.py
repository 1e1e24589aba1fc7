"""Makes a run the committed one, and writes the texts about it: the README's section, docs/speed.md and the plot.

python -m benchmarks.speed.record            # latest.json becomes cpu-zen4.json; the texts and the plot follow
python -m benchmarks.speed.record --texts    # the texts and the plot again, of the results that are committed
python -m benchmarks.speed.record --check    # writes nothing; fails where a text does not say what the results say
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.speed import plots, results, texts


def write_texts(found: dict[str, Any]) -> None:
    """The texts and the plot of these results; where the results lack a figure, an error, and nothing is written."""
    made = texts.made(texts.Figures(found))
    for path, text in made.items():
        path.write_text(text)
    plots.readme_plot(found, texts.PLOT)
    for path in (*made, texts.PLOT):
        print(f"{path.relative_to(texts.ROOT)}: written")


def record(latest: Path, name: str, again: Path | None = None) -> None:
    """Makes the committed file; where the README is about that file, also the texts and the plot.

    From a second run only the medians of its ratios are kept, each beside the first run's.
    """
    found = results.trim(results.read(latest))
    if again is not None:
        second = results.figures(results.trim(results.read(again)))
        for key, result in results.figures(found).items():
            if results.is_ratio(key) and key in second:
                result["again"] = second[key]["median"]
    if name == results.COMMITTED:
        write_texts(found)
    path = results.FOLDER / f"{name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{path.name}: written")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latest", type=Path, default=results.LATEST, help="JSON written by --benchmark-json")
    parser.add_argument("--again", type=Path, help="JSON of a second run")
    parser.add_argument(
        "--name", default=results.COMMITTED, help="name of the committed file, without .json; each machine has one"
    )
    parser.add_argument("--texts", action="store_true", help="only write the texts and the plot again")
    parser.add_argument("--check", action="store_true", help="only check the texts; exit with 1 if one is out of date")
    arguments = parser.parse_args()
    if not arguments.texts and not arguments.check:
        record(arguments.latest, arguments.name, arguments.again)
        return 0
    found = results.read(results.FOLDER / f"{results.COMMITTED}.json")
    if arguments.texts:
        write_texts(found)
        return 0
    old = texts.stale(found)
    for name in old:
        print(f"{name} does not say what {results.COMMITTED}.json says: `make bench-record`, or --texts, writes it")
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
