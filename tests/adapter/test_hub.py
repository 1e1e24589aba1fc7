"""Adapters and the Hugging Face Hub: from folders without it, and over HTTP to a server that stands in for it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

import shira_ops
from shira import Adapter, AdapterError, Entry
from shira.adapter import hub as hub_module

hub = pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def adapter_of() -> Adapter:
    torch.manual_seed(0)
    indices = shira_ops.select_random(64 * 32, 41, 1)
    entry = Entry(indices, torch.randn(41).bfloat16(), (64, 32), torch.bfloat16, fingerprint=5)
    return Adapter(
        {"layers.0.weight": entry},
        alpha=0.5,
        mask={"name": "Rand", "density": 0.02},
        provenance={"base_model_name_or_path": "some/base", "data": "made up"},
    )


def same(one: Adapter, two: Adapter) -> bool:
    a, b = one.weights["layers.0.weight"], two.weights["layers.0.weight"]
    return torch.equal(a.indices, b.indices) and torch.equal(a.values, b.values) and one.alpha == two.alpha


class Hub(ThreadingHTTPServer):
    """The part of the Hub's HTTP interface that reading and writing a model's small files takes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.created: dict[str, object] = {}
        self.commits: list[str] = []
        self.tokens: set[str | None] = set()
        self.revisions: set[str] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        match = re.fullmatch(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>[^?]+)", self.path)
        if match is None or match["repo"] != "me/style":
            self.answer(404, X_Error_Code="RepoNotFound")
        elif match["file"] not in self.server.files:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            self.server.revisions.add(match["revision"])
            data = self.server.files[match["file"]]
            etag = hashlib.sha1(data).hexdigest()
            self.answer(200, data, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        body = self.body()
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            found: dict[str, object] = {"url": f"{self.server.address}/me/style", "id": "1", "name": "me/style"}
        elif self.path == "/api/validate-yaml":
            found = {"errors": [], "warnings": []}
        elif self.path.startswith("/api/models/me/style/preupload/"):
            files = json.loads(body)["files"]
            found = {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]}
        elif self.path.startswith("/api/models/me/style/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.server.commits.append(line["value"]["summary"])
                else:
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            found = {"commitUrl": f"{self.server.address}/me/style/commit/{COMMIT}", "commitOid": COMMIT}
        else:
            self.answer(404)
            return
        self.answer(200, json.dumps(found).encode(), Content_Type="application/json")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub of its own, an empty cache, and no tokens except those the test gives."""
    served = Hub()
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    for module in (hub.constants, hub.file_download, hub.hf_api):
        for name, value in {
            "ENDPOINT": served.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": served.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
        }.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def test_a_folder_needs_no_hub(tmp_path: Path) -> None:
    adapter = adapter_of()
    adapter.save_pretrained(tmp_path / "style")
    assert sorted(path.name for path in (tmp_path / "style").iterdir()) == ["README.md", "shira_adapter.safetensors"]
    assert same(Adapter.from_pretrained(tmp_path / "style"), adapter)
    assert same(Adapter.from_pretrained(str(tmp_path / "style" / "shira_adapter.safetensors")), adapter)
    with pytest.raises(AdapterError, match=r"the folder has no other.safetensors"):
        Adapter.from_pretrained(tmp_path / "style", filename="other.safetensors")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="this is a PEFT adapter; read it with"):
        Adapter.from_pretrained(tmp_path / "peft")


def test_the_card_says_what_it_is_and_how_to_load_it() -> None:
    text = hub_module.card(adapter_of(), "me/style", "some/base")
    meta = hub.ModelCard(text).data
    assert meta.base_model == "some/base"
    assert "shira" in meta.tags
    for part in ("# style", "41 (2.00% of these weights)", "bfloat16", "overwrite", "0.5", "Rand", "made up"):
        assert part in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    compile(code[1], "card", "exec")
    assert 'Adapter.from_pretrained("me/style")' in code[1]


def test_the_card_says_only_what_is_so() -> None:
    text = hub_module.card(adapter_of(), "me/style", "a|b\n---\nlicense: mit")
    assert hub.ModelCard(text).data.base_model == "a|b\n---\nlicense: mit"
    assert r"| base model | a\|b --- license: mit |" in text
    assert "# refused on another base" in text
    entry = Entry(torch.tensor([0]), torch.zeros(1), (4,), torch.float32)  # of an unknown base
    assert "# for its base alone: another one cannot be told" in hub_module.card(Adapter({"w": entry}), "me/x", None)


def test_push_and_read(server: Hub) -> None:
    adapter = adapter_of()
    address = adapter.push_to_hub("me/style", private=True, token="hf_secret", message="first")
    assert address.endswith(COMMIT)
    # Clients differ in how they say it.
    assert server.created.get("private") is True or server.created.get("visibility") == "private"
    assert server.commits == ["first"]
    assert 'base_model: "some/base"' in server.files["README.md"].decode()
    assert "Bearer hf_secret" in server.tokens
    assert same(Adapter.from_pretrained("me/style", token="hf_secret"), adapter)
    assert same(Adapter.from_pretrained("me/style", revision="v1", token="hf_secret"), adapter)
    assert {"main", "v1"} <= server.revisions
    assert "hf_secret" not in server.files["README.md"].decode()


def test_peft_from_the_hub(server: Hub, tmp_path: Path) -> None:
    indices = shira_ops.select_random(64 * 32, 192, 1)
    entry = Entry(indices, torch.randn(192), (64, 32), torch.float32)
    adapter = Adapter({"0.weight": entry}, delta=True)
    adapter.to_peft(tmp_path / "peft")
    for path in (tmp_path / "peft").iterdir():
        server.files[path.name] = path.read_bytes()
    found = Adapter.from_peft("me/style", nn.Sequential(nn.Linear(32, 64)))
    assert torch.equal(found.weights["0.weight"].indices, indices)
    assert torch.equal(found.weights["0.weight"].values, entry.values)


def test_what_is_not_there_is_one_sentence(server: Hub) -> None:
    for repo in ("me/other", "me/style", "a/b/c"):  # no repository, no such file in it, no name of one
        with pytest.raises(AdapterError, match=f"{repo}: fetching shira_adapter.safetensors failed: .") as error:
            Adapter.from_pretrained(repo, token=False)
        assert "\n" not in str(error.value)


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(AdapterError, match=r"pip install 'shira-ops\[hub\]'"):
        Adapter.from_pretrained("me/style")
    with pytest.raises(AdapterError, match=r"^nowhere: there is no such file or folder, and as a name on"):
        Adapter.from_peft("nowhere")
