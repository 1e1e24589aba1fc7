"""The command line ``shira``. What a command needs is imported when it runs, so that those without torch stay fast."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

try:
    import typer
except ImportError as error:
    raise SystemExit("The command line needs typer and rich. Run: pip install 'shira-ops[cli]'") from error

if TYPE_CHECKING:
    from shira._file import Header
    from shira.adapter import Adapter

_Arguments = ParamSpec("_Arguments")

app = typer.Typer(
    help="Sparse weight deltas: train a few entries of a model, switch them in place, take them back bit for bit.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there under that name.")]
AdapterFile = Annotated[Path, typer.Argument(help="An adapter file.", show_default=False)]


def _sentence(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return " ".join(str(error).split())


def command(run: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Register a command. What it refuses is one sentence on stderr, and the exit code is 1."""

    @functools.wraps(run)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        # AdapterError is a ValueError. Anything else is a defect of ours, and keeps its traceback.
        try:
            run(*args, **kwargs)
        except (OSError, ValueError) as error:
            typer.echo(f"shira {run.__name__}: {_sentence(error)}", err=True)
            raise typer.Exit(1) from error

    app.command()(wrapped)
    return wrapped


@contextmanager
def _progress(what: str, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on a terminal's stderr, or nothing."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda name, done, total: bar.update(task, completed=done, total=total)


def _plain(name: str) -> str:
    """A name from a file, without what would steer the terminal."""
    from rich.markup import escape

    return escape("".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in name))


def _free(out: Path, overwrite: bool) -> None:
    """Refuse a target that is there, or whose folder is not, before any work is done."""
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} is there already; give another name, or add --overwrite")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder {str(out.parent)!r} to write {out.name!r} into does not exist")


def _facts(path: Path, header: Header) -> dict[str, Any]:
    weights = {
        name: {
            "shape": list(weight.shape),
            "dtype": weight.dtype,
            "granule": weight.granule,
            "nnz": weight.nnz,
            "indices": weight.indices,
            "fingerprint": None if weight.fingerprint is None else f"{weight.fingerprint:016x}",
            "aliases": list(weight.aliases),
        }
        for name, weight in header.weights.items()
    }
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "nnz": header.nnz,
        "density": header.density,
        "alpha": header.alpha,
        "delta": header.delta,
        "mask": header.mask,
        "provenance": header.provenance,
        "weights": weights,
    }


def _wrote(out: Path, adapter: Adapter, as_json: bool) -> None:
    """Say what an adapter that was just written is, and what making it lost."""
    report = adapter.report
    size = os.path.getsize(out) if out.is_file() else sum(file.stat().st_size for file in out.iterdir())
    if as_json:
        found: dict[str, Any] = {
            "out": str(out),
            "bytes": size,
            "nnz": adapter.nnz,
            "density": adapter.density,
            "weights": len(adapter),
        }
        if report is not None:
            found |= {
                "changed": report.changed,
                "kept": report.kept,
                "lost": report.lost,
                "lost_by_weight": {name: weight.lost for name, weight in report.weights.items()},
            }
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"{out}: {adapter.nnz:,} entries of {len(adapter)} weights ({adapter.density:.2%}), {size:,} bytes")
    if report is not None:
        typer.echo(str(report))


@command
def inspect(file: AdapterFile, as_json: Json = False) -> None:
    """Say what an adapter file holds. Its header is checked; torch is not needed."""
    from shira._file import read_header

    facts = _facts(file, read_header(file))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    nnz, weights = facts["nnz"], facts["weights"]
    table = Table(title=escape(str(file)), title_justify="left", show_header=False)
    table.add_row("entries", f"{nnz:,} ({facts['density']:.2%} of {len(weights)} weights)")
    table.add_row("bytes", f"{facts['bytes']:,}" + (f" ({facts['bytes'] / nnz:.2f} an entry)" if nnz else ""))
    kind = "delta: values are added to the base" if facts["delta"] else "overwrite: values replace the base"
    table.add_row("kind", kind)
    table.add_row("alpha", f"{facts['alpha']:g}")
    table.add_row("mask", escape(json.dumps(facts["mask"])))
    table.add_row("provenance", escape(json.dumps(facts["provenance"])))
    console.print(table)
    table = Table()
    for heading in ("weight", "shape", "dtype", "granule", "entries", "density", "indices"):
        table.add_column(heading, overflow="fold")
    for name, weight in weights.items():
        numel = 1
        for size in weight["shape"]:
            numel *= size
        share = f"{weight['nnz'] / numel:.2%}" if numel else "-"
        shape = " x ".join(map(str, weight["shape"])) or "scalar"
        names = _plain(", ".join([name, *weight["aliases"]]))
        table.add_row(
            names,
            shape,
            weight["dtype"],
            str(weight["granule"]),
            f"{weight['nnz']:,}",
            share,
            weight["indices"],
        )
    console.print(table)


@command
def verify(
    file: AdapterFile,
    base: Annotated[
        Path | None, typer.Argument(help="The base it should fit: a checkpoint's file or folder.", show_default=False)
    ] = None,
    header: Annotated[bool, typer.Option("--header", help="Only the header, not the indices.")] = False,
    as_json: Json = False,
) -> None:
    """Check an adapter file: all of it, or its header alone, or also against the content of a base."""
    from shira._file import AdapterError, read_header, read_whole

    if header and base is not None:
        raise ValueError("a base is compared by content: leave --header out")
    found = read_header(file) if header else read_whole(file)
    unknown = [name for name, weight in found.weights.items() if weight.fingerprint is None]
    if base is not None:
        from shira._checkpoint import misfits, open_checkpoint

        problems = misfits(
            {
                name: (weight.shape, weight.dtype, weight.fingerprint, weight.aliases)
                for name, weight in found.weights.items()
            },
            open_checkpoint(base, "base"),
        )
        if problems:
            more = f" ({len(problems)} problems in all)" if len(problems) > 5 else ""
            raise AdapterError(f"{file} was not made for {base}: {'; '.join(problems[:5])}{more}")
    checked = "header" if header else "file" if base is None else "file and base"
    if as_json:
        typer.echo(json.dumps({"file": str(file), "checked": checked, "good": True, "without_fingerprint": unknown}))
        return
    typer.echo(f"{file}: good ({checked}; {len(found.weights)} weights, {found.nnz:,} entries)")
    if base is not None and unknown:
        typer.echo(f"{len(unknown)} weights have no fingerprint, so only their names, shapes and dtypes were compared")


@command
def extract(
    base: Annotated[Path, typer.Argument(help="The base checkpoint: a file or a folder.", show_default=False)],
    tuned: Annotated[Path, typer.Argument(help="The tuned checkpoint of the same model.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The adapter file to write.", show_default=False)],
    density: Annotated[
        float | None,
        typer.Option(help="Keep this share of each weight's entries, the largest differences; else all.", min=0, max=1),
    ] = None,
    granule: Annotated[int, typer.Option(help="Entries that an index stands for.", min=1)] = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make an adapter of what fine-tuning changed: exactly, or its largest part."""
    _free(out, overwrite)
    from shira.adapter import Adapter

    with _progress("comparing", as_json) as progress:
        adapter = Adapter.from_difference(base, tuned, density=density, granule=granule, progress=progress)
    if not adapter.weights:
        raise ValueError(f"{base} and {tuned} are the same: there is nothing to extract")
    adapter.save(out)
    _wrote(out, adapter, as_json)


@command
def apply(
    file: AdapterFile,
    base: Annotated[Path, typer.Argument(help="The base checkpoint: a file or a folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The merged checkpoint to write.", show_default=False)],
    alpha: Annotated[float | None, typer.Option(help="The strength; else the file's own.", show_default=False)] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the base with an adapter on, sharded as the base is; whole or not at all."""
    from shira.adapter import Adapter
    from shira.merge import merge

    adapter = Adapter.load(file)
    with _progress("writing", as_json) as progress:
        written = merge(adapter, base, out, alpha=alpha, overwrite=overwrite, progress=progress)
    strength = adapter.alpha if alpha is None else alpha
    if as_json:
        typer.echo(json.dumps({"out": str(out), "bytes": written, "alpha": strength, "entries": adapter.nnz}))
    else:
        typer.echo(f"{out}: {written:,} bytes of tensors, {adapter.nnz:,} entries changed at strength {strength:g}")


def _with_strength(text: str) -> tuple[Path, float | None]:
    """``FILE`` or ``FILE=STRENGTH``."""
    path, sign, number = text.rpartition("=")
    if not sign or Path(text).exists():
        return Path(text), None
    try:
        return Path(path), float(number)
    except ValueError as error:
        raise ValueError(f"{text}: a strength is a number, as in {path}=0.7") from error


@command
def fuse(
    adapters: Annotated[
        list[str], typer.Argument(metavar="FILE[=STRENGTH]...", help="Adapters, in order.", show_default=False)
    ],
    base: Annotated[Path, typer.Option(help="The base checkpoint they were made for.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The adapter file to write.", show_default=False)],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make one adapter of several: base + the sum of strength x change."""
    _free(out, overwrite)
    from shira.adapter import Adapter

    pairs, origin = [], []
    for path, strength in map(_with_strength, adapters):
        adapter = Adapter.load(path)
        pairs.append((adapter, adapter.alpha if strength is None else strength))
        origin.append({"file": path.name, "strength": pairs[-1][1]})
    fused = Adapter.fuse(pairs, base, provenance={"fused": origin})
    fused.save(out)
    _wrote(out, fused, as_json)


@command
def convert(
    source: Annotated[Path, typer.Argument(help="A PEFT folder, or an adapter file.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="An adapter file, or a PEFT folder.", show_default=False)],
    base: Annotated[
        Path | None, typer.Option(help="The base checkpoint; not needed for a delta to PEFT.", show_default=False)
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="For a LoRA: the share of each weight's entries to keep.", min=0, max=1)
    ] = None,
    granule: Annotated[int, typer.Option(help="For a LoRA: entries that an index stands for.", min=1)] = 1,
    base_model: Annotated[str | None, typer.Option(help="For PEFT: the base's name.", show_default=False)] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Turn a PEFT folder (SHiRA or LoRA) into an adapter file, or an adapter file into a PEFT folder."""
    _free(out, overwrite)
    from shira.adapter import Adapter

    if source.is_dir():
        adapter = Adapter.from_peft(source, base, density=density, granule=granule)
        adapter.save(out)
    else:
        if density is not None or granule != 1:
            raise ValueError("--density and --granule are for a LoRA, and this is an adapter file")
        adapter = Adapter.load(source)
        adapter.to_peft(out, base, base_model=base_model, overwrite=overwrite)
    _wrote(out, adapter, as_json)


@command
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the adapters and the picture.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Seed of split, model and training.")] = 0,
) -> None:
    """Train two adapters on real digits, save, switch, fuse and revert them."""
    from shira.demo import run

    run(out, seed)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    report: Annotated[
        Path | None, typer.Option(help="Folder for a page about the run, and its plots.", show_default=False)
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option("--from", help="With --report: results of an earlier run, nothing is run.", show_default=False),
    ] = None,
) -> None:
    """Run the speed benchmarks, if the repository is at hand; further arguments go to pytest."""
    import subprocess

    here = (Path.cwd(), Path(__file__).resolve().parents[2])
    folder = next((place / "benchmarks" / "speed" for place in here if (place / "benchmarks" / "speed").is_dir()), None)
    if folder is None:
        typer.echo(
            "shira bench: the benchmarks are not in the installed package; they are in the repository's folder "
            "benchmarks/speed: run this there, or `make bench`",
            err=True,
        )
        raise typer.Exit(1)
    if results is not None and (report is None or context.args):
        typer.echo("shira bench: --from is for --report alone: it takes the results as they are", err=True)
        raise typer.Exit(1)
    arguments = context.args
    if results is None:
        if report is not None:
            report.mkdir(parents=True, exist_ok=True)
            results = report / "results.json"
            arguments = [*arguments, f"--benchmark-json={results}"]
        code = subprocess.call([sys.executable, "-m", "pytest", str(folder), *arguments])
        if code or report is None:
            raise typer.Exit(code)
    page = [sys.executable, str(folder / "report.py"), str(results), "--out", str(report)]
    raise typer.Exit(subprocess.call(page))


def main() -> None:
    """The entry point ``shira``."""
    app()


if __name__ == "__main__":
    main()
