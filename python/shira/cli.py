"""The command line ``shira``. A command imports what it needs when it runs, so that those without torch start fast."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

try:
    import typer
    from typer.core import TyperGroup
except ImportError as error:
    raise SystemExit("The command line needs typer and rich. Run: pip install 'shira-ops[cli]'") from error

if TYPE_CHECKING:
    from shira.adapter._file import Header
    from shira.adapter.adapter import Adapter

_Arguments = ParamSpec("_Arguments")

# The base class of all usage errors, from the click that typer uses.
_WrongUsage: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
_HOW = "add --overwrite"  # for messages about existing results


def _printable(text: str) -> str:
    """A name from a file or a folder, with characters escaped that would control the terminal or break the line."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)


def _failed(command: str, sentence: str, as_json: bool) -> None:
    """Print what went wrong, in one line."""
    if as_json:
        typer.echo(json.dumps({"error": sentence}))
    else:
        typer.echo(f"{command}: {_printable(sentence)}", err=True)


class _Commands(TyperGroup):
    """Wrong usage gives one sentence, too, and the exit code 2."""

    def main(self, *args: Any, **options: Any) -> Any:
        given = args[0] if args else options.pop("args", None)
        given = (sys.argv[1:] if given is None else list(given)) or ["--help"]
        alone = options.pop("standalone_mode", True)
        options["standalone_mode"] = False
        try:
            code = super().main(given, *args[1:], **options)
        except _WrongUsage as error:
            context = getattr(error, "ctx", None)
            where = "shira" if context is None or context.parent is None else f"shira {context.info_name}"
            said = " ".join(error.format_message().split()).removesuffix(".")
            _failed(where, f"{said} (see {where} --help)", "--json" in given)
            sys.exit(error.exit_code)
        except typer.Abort:
            sys.exit(1)
        if not alone:
            return code
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=_Commands,
    help="Sparse weight deltas: train a few entries of a model, switch them in place, take them back bit for bit.",
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Write NaN and infinity, which are refused otherwise.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result of that name.")]
AdapterFile = Annotated[
    str, typer.Argument(help="An adapter: a file, a folder, or a name on the Hub.", show_default=False)
]
Rename = Annotated[
    list[str],
    typer.Option(
        metavar="PATTERN=REPLACEMENT",
        help="How to change names: a regular expression and its replacement; can be repeated.",
        show_default=False,
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from shira import __version__

        typer.echo(f"shira-ops {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


def _sentence(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return " ".join(str(error).split())


def command(run: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Register a command. A refusal is one sentence on stderr, or JSON, and the exit code is 1."""

    @functools.wraps(run)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        # AdapterError is a ValueError. Anything else is a bug in this library, and keeps its traceback.
        try:
            run(*args, **kwargs)
        except BrokenPipeError:
            raise
        except (OSError, ValueError) as error:
            _failed(f"shira {run.__name__}", _sentence(error), bool(kwargs.get("as_json")))
            raise typer.Exit(1) from error

    app.command()(wrapped)
    return wrapped


@contextmanager
def _progress(what: str, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress bar on stderr, if that is a terminal."""
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
    """A name as a table can show it."""
    from rich.markup import escape

    return escape(_printable(name))


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def _find(adapter: str) -> Path:
    """The path of the adapter's file, which may be given itself, by its folder, or by a repository on the Hub."""
    from shira._text import AdapterError
    from shira.adapter import hub

    if not adapter:
        raise ValueError("an adapter needs a name, got an empty one")
    path = Path(adapter)
    if path.is_dir():
        if (path / hub.FILE).exists() or (path / "adapter_config.json").exists():
            return Path(hub.locate(adapter, filename=hub.FILE, revision=None, token=None))
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise AdapterError(f"{adapter}: the folder has no {hub.FILE}, and {len(files)} other .safetensors files")
        return files[0]
    on_hub = _HUB_NAME.fullmatch(adapter) and not adapter.endswith(".safetensors") and not path.parent.is_dir()
    if on_hub and not os.path.lexists(path):
        return Path(hub.locate(adapter, filename=hub.FILE, revision=None, token=None))
    return path


def _renames(rules: list[str]) -> dict[str, str] | None:
    """Parses ``PATTERN=REPLACEMENT``, in order. A pattern may contain ``=``."""
    found = {}
    for rule in rules:
        pattern, sign, replacement = rule.rpartition("=")
        if not sign or not pattern:
            raise ValueError(f"--rename is PATTERN=REPLACEMENT, as in '^model\\.=', got {rule!r}")
        if pattern in found:
            raise ValueError(f"--rename has two replacements for {pattern!r}")
        found[pattern] = replacement
    return found or None


def _adapter_out(out: Path, overwrite: bool, *inputs: str | Path | None) -> Path:
    """Where to write an adapter file. Refuses before any work is done."""
    from shira.adapter import _output

    return _output.destination(out, overwrite, [one for one in inputs if one], _output.no_adapter, _HOW)


def _save(adapter: Adapter, out: Path) -> None:
    from shira.adapter import _output

    with _output.named(out):
        adapter.save(out)


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
    """Print what was just written, and what was lost when the adapter was made."""
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
                "notes": list(report.notes),
            }
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(
        f"{_printable(str(out))}: {adapter.nnz:,} entries of {len(adapter)} weights ({adapter.density:.2%}), "
        f"{size:,} bytes"
    )
    if report is not None:
        typer.echo(_printable(str(report)))


@command
def inspect(file: AdapterFile, as_json: Json = False) -> None:
    """Show what an adapter file holds. Checks its header; needs no torch."""
    from shira.adapter._file import read_header

    path = _find(file)
    facts = _facts(path, read_header(path))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    nnz, weights = facts["nnz"], facts["weights"]
    table = Table(title=_plain(str(path)), title_justify="left", show_header=False)
    table.add_row("entries", f"{nnz:,} ({facts['density']:.2%} of {len(weights)} weights)")
    table.add_row("bytes", f"{facts['bytes']:,}" + (f" ({facts['bytes'] / nnz:.2f} an entry)" if nnz else ""))
    kind = "delta: values are added to the base" if facts["delta"] else "overwrite: values replace the base"
    table.add_row("kind", kind)
    table.add_row("alpha", f"{facts['alpha']:g}")
    table.add_row("mask", _plain(json.dumps(facts["mask"])))
    table.add_row("provenance", _plain(json.dumps(facts["provenance"])))
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
        Path | None,
        typer.Argument(help="The base it should fit: the file or folder of a checkpoint.", show_default=False),
    ] = None,
    header: Annotated[bool, typer.Option("--header", help="Check only the header.")] = False,
    rename: Rename = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Check an adapter file: all of it, only its header, or also whether it fits a base."""
    from shira.adapter._file import read_header, read_whole

    if base is None and rename:
        raise ValueError("--rename is for names in a base, and none is given")
    if header and base is not None:
        raise ValueError("a base is compared by content: leave --header out")
    path = _find(file)
    found = read_header(path) if header else read_whole(path)
    unknown = [name for name, weight in found.weights.items() if weight.fingerprint is None]
    added = [] if base is None else _compare(path, found, base, _renames(rename))
    checked = "header" if header else "file" if base is None else "file and base"
    if as_json:
        facts = {"file": str(path), "checked": checked, "good": True, "without_fingerprint": unknown, "added": added}
        typer.echo(json.dumps(facts))
        return
    typer.echo(f"{_printable(str(path))}: good ({checked}; {len(found.weights)} weights, {found.nnz:,} entries)")
    if base is not None and unknown:
        typer.echo(f"{len(unknown)} weights have no fingerprint, so only their names, shapes and dtypes were compared")
    if added:
        typer.echo(f"not in the base, and added by apply: {_printable(', '.join(added))}")


def _compare(path: Path, header: Header, base: Path, rename: dict[str, str] | None) -> list[str]:
    """Refuse a base that the adapter was not made for. Returns the whole parameters that the base does not have."""
    from shira import _fit
    from shira.adapter._checkpoint import open_checkpoint

    weights = _fit.renamed(header.weights, rename)
    whole = _fit.indifferent(weights, header.delta, header.alpha)
    who, where, checkpoint = str(path), str(base), open_checkpoint(base, "base")
    advice = _fit.flags if rename is None else None
    places = _fit.fit(
        who, weights, checkpoint, where=where, than=f" than {where}", new=whole, anything=whole, advice=advice
    )
    return [name for name, tensors in places.items() if not tensors]


@command
def extract(
    base: Annotated[Path, typer.Argument(help="The base checkpoint: a file or a folder.", show_default=False)],
    tuned: Annotated[Path, typer.Argument(help="The tuned checkpoint of the same model.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The adapter file to write.", show_default=False)],
    density: Annotated[
        float | None,
        typer.Option(
            help="Keep this share of each weight's entries, those that differ most; by default all.", min=0, max=1
        ),
    ] = None,
    granule: Annotated[int, typer.Option(help="How many consecutive entries an index stands for.", min=1)] = 1,
    rename: Rename = [],  # noqa: B006
    added: Annotated[
        bool, typer.Option("--added", help="Include what only the tuned one has, such as a new head.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make an adapter of what fine-tuning changed: all of it, or the largest changes."""
    rules = _renames(rename)
    target = _adapter_out(out, overwrite, base, tuned)
    from shira.adapter.adapter import Adapter

    with _progress("comparing", as_json) as progress:
        adapter = Adapter.from_difference(
            base, tuned, density=density, granule=granule, rename=rules, added=added, progress=progress
        )
    if not adapter.weights:
        raise ValueError(f"{base} and {tuned} are the same: there is nothing to extract")
    _save(adapter, target)
    _wrote(out, adapter, as_json)


@command
def apply(
    file: AdapterFile,
    base: Annotated[Path, typer.Argument(help="The base checkpoint: a file or a folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The merged checkpoint to write.", show_default=False)],
    alpha: Annotated[
        float | None, typer.Option(help="The strength; by default the one in the file.", show_default=False)
    ] = None,
    rename: Rename = [],  # noqa: B006
    allow_nonfinite: AllowNonfinite = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the base with an adapter applied, in the same shards; whole or not at all."""
    rules, path = _renames(rename), _find(file)
    from shira._text import strength as checked
    from shira.adapter.adapter import Adapter
    from shira.adapter.bake import bake

    given = None if alpha is None else checked("--alpha", alpha)
    adapter = Adapter.load(path)
    with _progress("writing", as_json) as progress:
        done = bake(
            adapter, base, out, alpha=given, overwrite=overwrite, rename=rules, check_finite=not allow_nonfinite,
            inputs=(path,), progress=progress,
        )  # fmt: skip
    strength = adapter.alpha if given is None else given
    if as_json:
        facts = {"out": str(out), "bytes": done.nbytes, "alpha": strength, "entries": done.entries}
        typer.echo(json.dumps({**facts, "tensors": list(done.tensors), "added": list(done.added)}))
        return
    typer.echo(
        f"{_printable(str(out))}: {done.nbytes:,} bytes of tensors, {done.entries:,} entries changed in "
        f"{len(done.tensors)} of them at strength {strength:g}"
    )
    if done.added:
        typer.echo(f"added, since the base has none: {_printable(', '.join(done.added))}")


def _with_strength(text: str) -> tuple[Path, float | None]:
    """``FILE`` or ``FILE=STRENGTH``."""
    from shira._text import strength

    path, sign, number = text.rpartition("=")
    if not sign or Path(text).exists():
        return _find(text), None
    try:
        value = float(number)
    except ValueError as error:
        raise ValueError(f"{text}: a strength is a number, as in {path}=0.7") from error
    return _find(path), strength(f"the strength of {path}", value)


@command
def fuse(
    adapters: Annotated[
        list[str], typer.Argument(metavar="FILE[=STRENGTH]...", help="Adapters, in order.", show_default=False)
    ],
    base: Annotated[Path, typer.Option(help="The base checkpoint they were made for.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The adapter file to write.", show_default=False)],
    allow_nonfinite: AllowNonfinite = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make one adapter of several: base + the sum of strength * change."""
    given = [_with_strength(text) for text in adapters]
    target = _adapter_out(out, overwrite, base, *(path for path, _ in given))
    from shira.adapter.adapter import Adapter

    pairs, origin = [], []
    for path, strength in given:
        adapter = Adapter.load(path)
        pairs.append((adapter, adapter.alpha if strength is None else strength))
        origin.append({"file": path.name, "strength": pairs[-1][1]})
    fused = Adapter.fuse(pairs, base, provenance={"fused": origin}, check_finite=not allow_nonfinite)
    _save(fused, target)
    _wrote(out, fused, as_json)


@command
def convert(
    source: Annotated[
        str, typer.Argument(help="A PEFT folder or an adapter, or a name on the Hub.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="An adapter file, or a PEFT folder.", show_default=False)],
    base: Annotated[
        Path | None,
        typer.Option(help="The base checkpoint; not needed to turn a delta into a PEFT folder.", show_default=False),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="For a LoRA: the share of each weight's entries to keep.", min=0, max=1)
    ] = None,
    granule: Annotated[
        int, typer.Option(help="For a LoRA: how many consecutive entries an index stands for.", min=1)
    ] = 1,
    base_model: Annotated[str | None, typer.Option(help="For PEFT: the name of the base.", show_default=False)] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Write an adapter file for a base of this dtype (bfloat16, ...).", show_default=False),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert a PEFT folder (SHiRA or LoRA) to an adapter file, an adapter to a PEFT folder, or its dtype."""
    from shira.adapter import _output, hub

    if dtype is not None:
        if density is not None or granule != 1 or base_model is not None:
            raise ValueError(
                "--density and --granule are for a LoRA and --base-model is for PEFT: leave them or --dtype out"
            )
        _recast(source, out, base, dtype, overwrite, as_json)
        return
    ours = os.path.exists(os.path.join(source, hub.FILE)) or len(list(Path(source).glob("*.safetensors"))) == 1
    folder = os.path.isdir(source) and (os.path.exists(os.path.join(source, "adapter_config.json")) or not ours)
    # A name on the Hub does not say what it holds, but the result's name does.
    if folder or (not os.path.lexists(source) and _HUB_NAME.fullmatch(source) and out.suffix == ".safetensors"):
        target = _adapter_out(out, overwrite, source, base)
        from shira.adapter.adapter import Adapter

        adapter = Adapter.from_peft(source, base, density=density, granule=granule)
        _save(adapter, target)
    else:
        if density is not None or granule != 1:
            raise ValueError("--density and --granule are for a LoRA, and this is an adapter file")
        path = _find(source)
        inputs: Iterable[str | Path] = [path] if base is None else [path, base]
        target = _output.destination(out, overwrite, inputs, _output.no_peft_folder, _HOW)
        from shira.adapter.adapter import Adapter

        adapter = Adapter.load(path)
        with _output.named(target):
            adapter.to_peft(target, base, base_model=base_model, overwrite=overwrite)
    _wrote(out, adapter, as_json)


def _recast(source: str, out: Path, base: Path | None, dtype: str, overwrite: bool, as_json: bool) -> None:
    """The adapter for a base of another dtype."""
    path = _find(source)
    target = _adapter_out(out, overwrite, path, base)
    import torch

    from shira.adapter._file import ARITHMETIC
    from shira.adapter.adapter import Adapter

    if dtype not in ARITHMETIC:
        raise ValueError(f"--dtype must be one of {', '.join(ARITHMETIC)}, got {dtype!r}")
    adapter = Adapter.load(path).to(getattr(torch, dtype), base)
    _save(adapter, target)
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
        Path | None, typer.Option(help="Folder for a page about the run, with plots.", show_default=False)
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--from", help="With --report: use results of an earlier run, and run nothing.", show_default=False
        ),
    ] = None,
) -> None:
    """Run the speed benchmarks of the repository; further arguments go to pytest."""
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
    assert report is not None
    assert results is not None
    page = [sys.executable, "-m", "benchmarks.speed.report", str(results.resolve()), "--out", str(report.resolve())]
    raise typer.Exit(subprocess.call(page, cwd=folder.parents[1]))


def main() -> None:
    """The entry point ``shira``."""
    # Python has None where the shell closed one (``>&-``), and files that are opened would take its number.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    # Clean up what a command was writing, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    app()


if __name__ == "__main__":
    main()
