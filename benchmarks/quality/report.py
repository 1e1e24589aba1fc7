"""The pages of the results: ``python -m benchmarks.quality.report`` writes ``docs/quality.md``, the pages and plots in
``docs/quality/``, and the table in the README.

The prose is in ``pages/``; a line ``{{single digits-mlp}}`` there becomes that table. Numbers come from the kept
results alone.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality import front, plots, style, tasks
from benchmarks.quality.experiments import single
from benchmarks.quality.findings import Results, mean
from benchmarks.quality.lab import Setting
from benchmarks.quality.language import LANGUAGE
from benchmarks.quality.methods import Dora, Full, Lora, Shira
from benchmarks.quality.sentences import SENTENCES
from benchmarks.quality.store import RESULTS
from benchmarks.quality.tables import TABLES
from benchmarks.quality.task import ROOT
from benchmarks.quality.verdict import VERDICT
from benchmarks.quality.words import number, table

TEMPLATES = Path(__file__).parent / "pages"
DOCS = ROOT / "docs"
FIRST = "quality.md"
"""The page with the verdict; all others, and the plots, are in a folder beside it."""


def place(template: Path, docs: Path = DOCS) -> Path:
    """The file that a template becomes."""
    return docs / FIRST if template.name == FIRST else docs / "quality" / template.name


def plot(results: Results, *about: str) -> str:
    """A plot of a family, or of all families, if there was something to draw; for the pages beside it."""
    name = "-".join(reversed(about))
    said = ", ".join([SHOWN[about[-1]], *about[:-1]])
    return f"![{said}]({name}.png)" if (DOCS / "quality" / f"{name}.png").exists() else ""


SHOWN = {
    "single": "Score by task and method",
    "front": "Score by switch time and by file size",
    "granules": "What granules lose, by how many of them a weight has",
    "fusion": "Score by the strength of fused adapters",
    "tradeoff": "What is learned and what is forgotten, by the learning rate",
    "metrics": "What fused adapters lose, by each metric",
}
"""What the plots show, for readers who do not see them."""

SHORT = {
    "minilm": "MiniLM, three tasks of text", "digits-vit": "digits, a small transformer, five shifts",
    "digits-mlp": "digits, an MLP, five shifts",
}  # fmt: skip

README = ROOT / "README.md"

MARKS = "<!-- quality: benchmarks/quality/report.py writes from here -->\n", "<!-- quality: to here -->"


def readme(text: str, results: Results) -> str:
    """The README with experiment 1 in short: means over the tasks, of the families of which everything was run."""
    rows = []
    for family, said in SHORT.items():
        r, names = single.rank(family), list(tasks.tasks(family))
        methods = (Shira("rand", r=r), Lora(r), Dora(r), Full())
        cells = [[results.scores(Setting(name, method)) for name in names] for method in methods]
        if all(all(cell) for cell in cells):
            rows.append([said, *(f"{number(family, mean(mean(one or ()) for one in cell))} %" for cell in cells)])
    heading = ["test accuracy, mean over the tasks", "SHiRA (`Rand`)", "LoRA", "DoRA", "full fine-tuning"]
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return before + MARKS[0] + table(heading, rows) + "\n" + MARKS[1] + after


MAKERS = {
    **TABLES,
    **VERDICT,
    **LANGUAGE,
    **SENTENCES,
    "plot": plot,
    "style": style.told,
}
"""What can stand in a template, by name."""


def page(template: str, results: Results) -> str:
    """The template with its tables filled in; in place of an empty table it says that nothing was run yet."""

    def filled(match: re.Match[str]) -> str:
        name, *arguments = match.group(1).split()
        families = [argument for argument in arguments if argument in tasks.FAMILIES]
        if families and not any(map(results.has, families)):
            return MISSING
        return MAKERS[name](results, *arguments) or MISSING

    return re.sub(r"\{\{(.+?)\}\}", filled, template)


MISSING = "*Not yet run.*"


def pages(results: Results, docs: Path = DOCS) -> dict[Path, str]:
    """Every page's file and its text."""
    templates = sorted(TEMPLATES.glob("*.md"))
    return {place(one, docs): page(one.read_text(encoding="utf-8"), results) for one in templates}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.report", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--out", type=Path, default=DOCS, help=f"folder of the pages (default: {DOCS.name})")
    given = parser.parse_args(arguments)
    results = Results(given.results)
    # First, since the pages show the plots that exist.
    plots.draw(results, given.out / "quality")
    for path, text in pages(results, given.out).items():
        path.write_text(text, encoding="utf-8")
    if given.out == DOCS:
        README.write_text(readme(README.read_text(encoding="utf-8"), results), encoding="utf-8")
        front.write(results)


if __name__ == "__main__":
    main()
