"""A stand-in for the Hugging Face hub on this machine: repositories are folders, and what goes
wrong is asked for.

    root/models/owner/name/config.json      root/datasets/owner/name/README.md

Large files (`LARGE`) are redirected to a second origin, the CDN, as the hub does. Digests and sizes
in headers are those of the files, whatever a fault makes of their bytes.
"""

from __future__ import annotations

import fnmatch
import hashlib
import http.server
import importlib.util
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

LARGE = (".safetensors", ".bin", ".gguf", ".parquet", ".arrow")
NOBODY = "http://127.0.0.1:9"  # the discard port: nobody listens
Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Fault:
    """What goes wrong with requests whose path matches; the first one that does counts.

    status: instead of the answer, with `headers`. change: of the bytes of a GET. announced: whether
    Content-Length is still that of the whole file. times: how often.
    """

    match: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    change: Callable[[bytes], bytes] | None = None
    announced: bool = False
    method: str = "*"
    times: int = 1_000_000


@dataclass
class Hub:
    """faults: see there. gated, disabled: names of repositories. requests: `GET /path` of both
    servers, in order.
    """

    root: Path
    faults: list[Fault] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    disabled: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    url: str = ""
    cdn: str = ""

    def model(self, name: str) -> Path:
        """The folder of a model."""
        return self.root / "models" / name

    def dataset(self, name: str) -> Path:
        """The folder of a data set."""
        return self.root / "datasets" / name

    def fetched(self) -> set[str]:
        """Names of the files that were sent."""
        paths = (line.removeprefix("GET ") for line in self.requests if line.startswith("GET "))
        return {path.rsplit("/", 1)[1] for path in paths if re.search(r"/(resolve|cdn)/", path)}

    def answer(self, method: str, path: str, body: bytes, query: dict[str, list[str]]) -> Answer:
        """Status, headers and body."""
        if found := re.fullmatch(r"/cdn/[0-9a-f]{64}/(.+)", path):
            return 200, {}, (self.root / found[1]).read_bytes()
        if found := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(\w[\w-]*)/(.+))?", path
        ):
            kind, name, verb, rest = found.groups()
            return self._repository(kind, name) or self._api(kind, name, verb, rest, body, query)
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, (name, revision, file) = (found[1] or "models/")[:-1], found.groups()[1:]
            return self._repository(kind, name) or self._file(kind, name, revision, file)
        return 404, {}, b""

    def _repository(self, kind: str, name: str) -> Answer | None:
        """Why a repository is refused; None if it is not."""
        if not (self.root / kind / name).is_dir():
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if name in self.disabled:
            return 403, {"X-Error-Message": "Access to this resource is disabled."}, b""
        return None

    def _commit(self, kind: str, name: str, revision: str) -> str | None:
        lines = (f"{path}{digest(path)}" for path in self._files(kind, name).values())
        commit = hashlib.sha1("".join(lines).encode()).hexdigest()
        return commit if revision in ("main", commit) else None

    def _files(self, kind: str, name: str) -> dict[str, Path]:
        folder = self.root / kind / name
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path for path in files}

    def _api(
        self,
        kind: str,
        name: str,
        verb: str | None,
        rest: str | None,
        body: bytes,
        query: dict[str, list[str]],
    ) -> Answer:
        revision, _, inside = (rest or "main").partition("/")
        commit = self._commit(kind, name, revision)
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self._files(kind, name)
        if verb in ("tree", "paths-info"):
            return self._tree(files, verb, inside, body, query)
        value = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

    def _tree(
        self, files: dict[str, Path], verb: str, inside: str, body: bytes, query: dict[str, Any]
    ) -> Answer:
        entries = {name: entry(name, path) for name, path in files.items()}
        for name in files:
            for parent in Path(name).parents[:-1]:
                folder = parent.as_posix()
                entries[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
        deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        if verb == "paths-info":
            named = (
                json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            )
            found = [entries[name] for name in named if name in entries]
        else:
            below = {n: e for n, e in entries.items() if not inside or n.startswith(inside + "/")}
            found = [e for n, e in below.items() if deep or "/" not in n[len(inside) :].strip("/")]
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()

    def _file(self, kind: str, name: str, revision: str, file: str) -> Answer:
        commit = self._commit(kind, name, revision)
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        headers = {"X-Repo-Commit": commit}
        if name in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        path = self._files(kind, name).get(file)
        if path is None:
            return 404, {"X-Error-Code": "EntryNotFound", **headers}, b""
        if path.suffix not in LARGE:
            return 200, {**headers, "ETag": f'"{digest(path)}"'}, path.read_bytes()
        place = f"{self.cdn}/cdn/{digest(path)}/{path.relative_to(self.root).as_posix()}"
        linked = {"X-Linked-ETag": f'"{digest(path)}"', "X-Linked-Size": str(path.stat().st_size)}
        return 302, {**headers, **linked, "Location": place}, b""

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            fits = fnmatch.fnmatch(path, fault.match) and fnmatch.fnmatch(method, fault.method)
            if fits and fault.times > 0:
                fault.times -= 1
                return fault
        return None


def digest(path: Path) -> str:
    """What the hub names a file by: SHA-256 of a large one, git's hash of another."""
    data = path.read_bytes()
    if path.suffix in LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(name: str, path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    found: dict[str, Any] = {"type": "file", "oid": "0" * 40, "size": size, "path": name}
    if path.suffix in LARGE:
        found["lfs"] = {"oid": digest(path), "size": size, "pointerSize": 134}
    return found


def _server(hub: Hub) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            path, query = unquote(address.path), parse_qs(address.query)
            hub.requests.append(f"{self.command} {path}")
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, body = hub.answer(self.command, path, sent, query)
            length = len(body)
            fault = hub.fault(self.command, path)
            if fault and fault.status is not None:
                status, headers, body, length = fault.status, fault.headers, b"", 0
            elif fault and fault.change and self.command != "HEAD":
                headers, body = {**headers, **fault.headers}, fault.change(body)
                length = length if fault.announced else len(body)
            ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if ranged and status == 200 and not fault:
                first, last = int(ranged[1]), min(int(ranged[2] or length), length - 1)
                status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{length}"
                body = body[first : last + 1]
                length = len(body)
            self.send_response_only(status)
            for key, value in {**headers, "Content-Length": str(length)}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
            self.close_connection = length != len(body)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    return server


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """The hub whose repositories are the folders of `root`."""
    hub = Hub(root)
    servers = [_server(hub), _server(hub)]
    hub.url, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        for server in servers
    ]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def point_at(url: str, monkeypatch: pytest.MonkeyPatch, home: Path | None = None) -> None:
    """Has this process's hub client and datasets ask another hub, and use other caches, both of
    which were read from the environment when they were imported; and sends its telemetry anew.
    """
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)  # at a third place
    telemetry = "huggingface_hub.utils._detect_agent"  # not in every release
    if importlib.util.find_spec(telemetry):
        monkeypatch.setattr(importlib.import_module(telemetry), "_registry", None)
    if home is not None:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / "agents"), raising=False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")


def copied(folder: Path, target: Path) -> Path:
    """A copy of a folder whose parents are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(folder, target))


def write_parquet(file: Path, columns: dict[str, list[Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


def wikitext(hub: Hub) -> Path:
    """A small data set of the name, layout and card of WikiText-2."""
    folder = hub.dataset("Salesforce/wikitext")
    name = "wikitext-2-raw-v1"
    (folder / name).mkdir(parents=True)
    for split in ("train", "test", "validation"):
        lines = [
            f" the {split} river runs through town {i} and then to the sea \n" for i in range(60)
        ]
        write_parquet(folder / name / f"{split}-00000-of-00001.parquet", {"text": lines})
    splits = "".join(
        f"  - split: {split}\n    path: {name}/{split}-*\n"
        for split in ("train", "test", "validation")
    )
    card = f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{splits}---\n"
    (folder / "README.md").write_text(card)
    return folder


def sst2(hub: Hub) -> Path:
    """A small data set of the name and columns of SST-2."""
    folder = hub.dataset("stanfordnlp/sst2")
    (folder / "data").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        texts = [f"a {'good' if i % 2 else 'bad'} {split} film number {i}" for i in range(24)]
        columns = {"sentence": texts, "label": [i % 2 for i in range(24)]}
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", columns)
    return folder
