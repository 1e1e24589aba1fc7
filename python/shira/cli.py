"""The command line: ``shira demo`` and ``shira inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ImportError as error:
    raise SystemExit("The command line needs typer and rich. Run: pip install 'shira-ops[cli]'") from error


def _inspect(path: Path, as_json: bool) -> None:
    """What a file says of itself, checked, read without torch."""
    from shira._file import AdapterError, open_adapter

    try:
        with open_adapter(path, "numpy") as (_, header):
            pass
    except (AdapterError, OSError) as error:
        raise SystemExit(f"shira inspect: {error}") from error
    size = path.stat().st_size
    if as_json:
        weights = {
            name: {
                "shape": list(weight.shape), "dtype": weight.dtype, "granule": weight.granule, "nnz": weight.nnz,
                "indices": weight.indices, "aliases": list(weight.aliases),
            }
            for name, weight in header.weights.items()
        }  # fmt: skip
        about: dict[str, Any] = {
            "file": str(path), "bytes": size, "nnz": header.nnz, "density": header.density, "alpha": header.alpha,
            "delta": header.delta, "mask": header.mask, "provenance": header.provenance, "weights": weights,
        }  # fmt: skip
        print(json.dumps(about, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table(title=str(path), title_justify="left", show_header=False)
    facts.add_row("entries", f"{header.nnz:,} ({header.density:.2%} of {len(header.weights)} weights)")
    facts.add_row("bytes", f"{size:,} ({size / header.nnz:.2f} an entry)" if header.nnz else f"{size:,}")
    facts.add_row(
        "kind", "delta: values are added to the base" if header.delta else "overwrite: values replace the base"
    )
    facts.add_row("alpha", f"{header.alpha:g}")
    facts.add_row("mask", json.dumps(header.mask))
    facts.add_row("provenance", json.dumps(header.provenance))
    console.print(facts)
    table = Table()
    for heading in ("weight", "shape", "dtype", "granule", "entries", "density", "indices"):
        table.add_column(heading)
    for name, weight in header.weights.items():
        share = f"{weight.nnz / weight.numel:.2%}" if weight.numel else "-"
        shape = " x ".join(map(str, weight.shape))
        table.add_row(name, shape, weight.dtype, str(weight.granule), f"{weight.nnz:,}", share, weight.indices)
    console.print(table)


app = typer.Typer(
    help="Sparse weight deltas: train a few entries of a model, switch them in place, take them back bit for bit.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the adapters and the picture.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Seed of split, model and training.")] = 0,
) -> None:
    """Train two adapters on real digits, save, switch, fuse and revert them."""
    from shira.demo import run

    run(out, seed)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="An adapter file.")],
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say what an adapter file holds; every part of its header is checked, torch is not needed."""
    _inspect(file, as_json)


def main() -> None:
    """The entry point ``shira``."""
    app()


if __name__ == "__main__":
    main()
