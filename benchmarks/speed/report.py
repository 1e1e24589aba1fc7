"""One page about one run: plots as PNG files, and an HTML page that needs no other file.

python -m benchmarks.speed.report benchmarks/results/cpu-zen4.json --out out/          # or: shira bench --report out/

Nothing is measured. A plot whose benchmarks are not in the results is left out. Results of benchmarks/quality, where
there are any, make the plot of accuracy beside switch time and file size: `--quality FILE`, by default
benchmarks/results/quality.json, a list under "front" of {"name", "task", "accuracy", "switch_seconds", "file_bytes"}.
"""

from __future__ import annotations

import argparse
import base64
import html
import re
from pathlib import Path
from typing import Any

from benchmarks.speed import plots, results, texts

QUALITY = results.FOLDER / "quality.json"


def inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)
    text = re.sub(r"(?<![\w*])\*([^*]+)\*(?![\w*])", r"<i>\1</i>", text)
    return re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text)


def to_html(markdown: str) -> str:
    """HTML of headings, paragraphs and tables, which is all that the templates use."""
    made = []
    for block in re.split(r"\n{2,}", markdown.strip()):
        lines = block.splitlines()
        if lines[0].startswith("#"):
            level = len(lines[0]) - len(lines[0].lstrip("#"))
            made.append(f"<h{level}>{inline(lines[0].lstrip('# '))}</h{level}>")
        elif lines[0].startswith("|"):
            rows = [[inline(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
            head = "".join(f"<th>{cell}</th>" for cell in rows[0])
            body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in one)}</tr>" for one in rows[2:])
            made.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        elif not lines[0].startswith("!["):  # the page has its own pictures
            made.append(f"<p>{inline(' '.join(lines))}</p>")
    return "\n".join(made)


CSS = """body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:13px}td,th{border-bottom:1px solid #ddd;padding:.25rem .6rem;
text-align:left}th{background:#f5f5f5}img{max-width:100%}code{background:#f3f3f3;padding:0 .2em}.warn{color:#c62828}"""


def page(found: dict[str, Any], drawn: dict[str, Path]) -> str:
    """The text of docs/speed.md where the run has all its figures, else only the table of what was measured."""
    f = texts.Figures(found)
    quick = any(one["extra_info"].get("quick") for one in found["benchmarks"])
    warning = '<p class="warn">A --quick run: tiny layers, the figures mean nothing.</p>' if quick else ""
    pictures = []
    for title, path in drawn.items():
        data = base64.b64encode(path.read_bytes()).decode()
        pictures.append(
            f'<h2>{html.escape(title)}</h2>\n<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
        )
    rest = f"# Speed\n\n## Everything that was measured\n\n{texts.everything(f)}"
    head, cut, rest = to_html(texts.page(f) if texts.complete(f) else rest).partition("<h2>")
    top = '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>shira-ops: speed</title>'
    return "\n".join([top, f"<style>{CSS}</style>", head, warning, *pictures, cut + rest, "</html>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON of a run, committed or as --benchmark-json writes it")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.html and the PNG files")
    parser.add_argument("--quality", type=Path, default=QUALITY, help="results of benchmarks/quality")
    arguments = parser.parse_args()
    found = results.trim(results.read(arguments.results), quick=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(found, arguments.out, arguments.quality)
    (arguments.out / "report.html").write_text(page(found, drawn))
    print(f"{arguments.out / 'report.html'}: {len(drawn)} plots, {len(found['benchmarks'])} benchmarks")


if __name__ == "__main__":
    main()
