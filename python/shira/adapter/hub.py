"""Adapters on the Hugging Face Hub: read from a repository or a folder, and pushed with a model card.

Only repositories need ``huggingface_hub``: ``pip install 'shira-ops[hub]'``.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira import _text
from shira._text import AdapterError
from shira.adapter import _file

if TYPE_CHECKING:
    from shira.adapter.adapter import Adapter

FILE = "shira_adapter.safetensors"
CARD = "README.md"


def client() -> Any:
    """The client library; without it, an `AdapterError` that says how to get it."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise AdapterError("the Hub needs its client. Run: pip install 'shira-ops[hub]'") from error
    return huggingface_hub


@contextmanager
def _sentences(repo: str, doing: str) -> Iterator[None]:
    """Turns errors of the client into a single line that names the repository."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise AdapterError(f"{repo}: {doing} failed: {' '.join(lines)[:400]}") from error


def download(repo: str, filename: str, *, revision: str | None, token: str | bool | None) -> str:
    """Downloads a file of a repository; returns its path in the client's cache."""
    if revision is not None:
        _text.text("revision", revision)
    hub = client()
    with _sentences(repo, f"fetching {filename}"):
        path: str = hub.hf_hub_download(repo, filename, revision=revision, token=token)
    return path


def fetch(where: str, files: Sequence[str], *, revision: str | None, token: str | bool | None) -> list[str]:
    """Downloads some files of a repository whose name is not that of anything here; returns their paths."""
    try:
        return [download(where, filename, revision=revision, token=token) for filename in files]
    except AdapterError as error:
        raise AdapterError(f"{where}: there is no such file or folder, and as a name on the Hub: {error}") from error


def locate(where: str, *, filename: str, revision: str | None, token: str | bool | None) -> str:
    """The path of the adapter's file, given a folder, the file itself, or a repository."""
    _text.text("filename", filename)
    if os.path.isdir(where):
        path = os.path.join(where, filename)
        if os.path.exists(path):
            return path
        if os.path.exists(os.path.join(where, "adapter_config.json")):
            raise AdapterError(f"{where}: this is a PEFT adapter; read it with Adapter.from_peft (shira convert)")
        raise AdapterError(f"{where}: the folder has no {filename}")
    if os.path.isfile(where):
        return where
    return fetch(where, [filename], revision=revision, token=token)[0]


def _cell(text: str) -> str:
    """The text of a table's cell: on one line, with its bars escaped."""
    return " ".join(text.split()).replace("|", r"\|")


def card(adapter: Adapter, repo: str, base_model: str | None) -> str:
    """The model card: the adapter's base, what it changes, and how to load it."""
    front = ["---", "library_name: shira-ops", "tags:", "- shira", "- sparse-adapter"]
    if base_model:
        # A string of JSON is one of YAML, too.
        front += [f"base_model: {json.dumps(base_model)}", "base_model_relation: adapter"]
    dtypes = sorted({str(entry.dtype).removeprefix("torch.") for entry in adapter.weights.values()})
    rows = [
        ("base model", base_model or "not stated"),
        ("weights", f"{len(adapter):,}"),
        ("entries changed", f"{adapter.nnz:,} ({adapter.density:.2%} of these weights)"),
        ("dtype", ", ".join(dtypes) or "none"),
        ("kind", "delta: values are added" if adapter.delta else "overwrite: values replace the base's, exactly"),
        ("strength", f"{adapter.alpha:g}"),
        ("mask", f"`{json.dumps(adapter.mask)}`" if adapter.mask else "not stated"),
    ]
    table = ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows)]
    if adapter.provenance:
        provenance = ["", "## Provenance", "", "```json", json.dumps(adapter.provenance, indent=2), "```"]
    else:
        provenance = []
    known = all(entry.fingerprint is not None for entry in adapter.weights.values())
    told = "refused on another base" if known else "for its base alone: another one cannot be told"
    usage = [
        "```python",
        "import shira",
        "",
        "switcher = shira.Switcher(model)  # the base model, loaded as usual",
        f'switcher.add("this", shira.Adapter.from_pretrained({json.dumps(repo)}))  # {told}',
        'switcher.activate("this")',
        "switcher.deactivate()  # the base is back, bit for bit",
        "```",
    ]
    title = f"# {repo.rsplit('/', 1)[-1]}"
    about = "A sparse adapter ([SHiRA](https://arxiv.org/abs/2406.13175)): a few entries of the base's own weights."
    parts = [*front, "---", "", title, "", about, "", *table, "", "## Use", "", *usage, *provenance, ""]
    return "\n".join(parts)


def save(adapter: Adapter, folder: Path, repo: str, base_model: str | None, seeds: bool) -> None:
    """Write the adapter's file and its card into a folder."""
    base_model = _text.said("base_model", base_model, adapter.provenance.get("base_model_name_or_path"))
    folder.mkdir(parents=True, exist_ok=True)
    adapter.save(folder / FILE, seeds=seeds)
    with _file.replacing(folder / CARD) as temporary:
        temporary.write_text(card(adapter, repo, base_model), encoding="utf-8")


def push(
    adapter: Adapter,
    repo: str,
    *,
    base_model: str | None,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    message: str | None,
    seeds: bool,
) -> str:
    """Upload the adapter's file and its card in one commit; returns the URL of the commit."""
    _text.text("push_to_hub: repo", repo)
    hub = client()
    with tempfile.TemporaryDirectory() as folder, _sentences(repo, "the upload"):
        save(adapter, Path(folder), repo, base_model, seeds)
        api = hub.HfApi(token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=message or f"Sparse adapter of {adapter.nnz:,} entries",
        )
    return str(done.commit_url)
