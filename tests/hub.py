"""A Hugging Face hub on 127.0.0.1, as far as data sets need one, that fails in every way it is told to.

It answers /api/datasets/OWNER/NAME[/revision/COMMIT], .../tree/COMMIT/FOLDER and .../paths-info/COMMIT, and
/datasets/OWNER/NAME/resolve/COMMIT/PATH, which redirects large files (here .parquet) to another host, as the hub does;
and /plain/NAME for files outside any repository.
"""

import hashlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import HfFileSystem, constants, file_download
from huggingface_hub.utils import _http

from nanochat import download

COMMIT = "a" * 40


@dataclass
class Fault:
    """What goes wrong with one answer: a status, an early end of the connection, pauses, other bytes."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    seconds_per_chunk: float = 0
    content: bytes | None = None
    when: Callable[[], bool] | None = None  # the answer waits until this is true, at most 20 s


@dataclass
class Hub:
    """`files` by repository and path ("plain" for those outside); `faults` by path ("list" for the API), used up one
    per request; `waits` are the seconds that a client in this process was asked or chose to wait.
    """

    url: str = ""
    commit: str = COMMIT
    files: dict[str, dict[str, bytes]] = field(default_factory=lambda: defaultdict(dict))
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    listed: dict[str, dict[str, Any]] = field(default_factory=dict)  # by path: what the list says otherwise
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # method, path, headers
    waits: list[float] = field(default_factory=list)

    def gets(self, path: str) -> list[str | None]:
        """The Range headers of the transfers of a file so far (redirects are not counted)."""
        return [
            headers.get("range")
            for method, address, headers in self.requests
            if method == "GET" and "/resolve/" not in address and address.endswith(f"/{path}")
        ]

    def lists(self) -> list[str]:
        return [path for _, path, _ in self.requests if path.startswith("/api/datasets/")]

    def describe(self, repository: str) -> list[dict[str, Any]]:
        """The files of a repository, as the hub lists them."""
        entries = []
        for path, content in self.files[repository].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "rfilename": path, "size": len(content)}
            entry["oid"] = entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if path.endswith(".parquet"):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 134}
            entry |= self.listed.get(path, {})
            entries.append({key: value for key, value in entry.items() if value is not None})
        return entries

    def api(self, repository: str, request: list[str], query: dict[str, list[str]]) -> Any:
        """What /api/datasets/<repository>/<request> says: of the repository, of a folder, or of some paths."""
        files = self.describe(repository)
        parents = {str(parent) for file in files for parent in PurePosixPath(file["path"]).parents}
        entries = files + [{"type": "directory", "path": path, "oid": COMMIT} for path in parents - {"."}]
        if request[:1] == ["paths-info"]:
            return [entry for entry in entries if entry["path"] in query["paths"]]
        if request[:1] == ["tree"]:
            folder = PurePosixPath(*request[2:])
            deep = query.get("recursive") == ["True"] or query.get("recursive") == ["true"]
            below = [(entry, PurePosixPath(entry["path"])) for entry in entries]
            return [
                entry for entry, path in below if path.parent == folder or deep and path.is_relative_to(folder)
            ] or None
        commit = request[1] if request[:1] == ["revision"] else self.commit
        return {"id": repository, "sha": commit, "siblings": files}


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append((self.command, self.path, headers))
        query = urlsplit(self.path).query or self.rfile.read(int(headers.get("content-length", 0))).decode()
        address = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if address[:2] == ["api", "datasets"]:
            repository, path, content = "/".join(address[2:4]), "list", None
            if repository in self.hub.files:
                said = self.hub.api(repository, address[4:], parse_qs(query))
                content = None if said is None else json.dumps(said).encode()
        else:
            repository, path, content = self.find(address)
        self.commit = address[4] if "resolve" in address else self.hub.commit
        about = {"X-Repo-Commit": self.commit}
        faults = self.hub.faults[path if self.command != "HEAD" else f"HEAD {path}"]
        redirected = "resolve" in address and path.endswith(".parquet") and content is not None
        fault = faults.pop(0) if faults and (self.command == "HEAD" or not redirected) else Fault()
        deadline = time.monotonic() + 20
        while fault.when and not fault.when() and time.monotonic() < deadline:
            time.sleep(0.01)
        if content is None:
            self.answer(404, about | {"X-Error-Code": "EntryNotFound"})
        elif fault.status != 200:
            self.answer(fault.status, fault.headers)
        elif redirected:
            elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
            about |= {"Location": f"{elsewhere}/lfs/{repository}/{path}", "X-Linked-Size": str(len(content))}
            self.answer(302, about | {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"'})
        else:
            self.send_file(fault.content if fault.content is not None else content, fault, headers.get("range"))

    def find(self, address: list[str]) -> tuple[str, str, bytes | None]:
        """(repository, path, content) of a file's address."""
        if address[0] == "plain":
            repository, path = "plain", "/".join(address[1:])
        elif address[0] == "lfs":
            repository, path = "/".join(address[1:3]), "/".join(address[3:])
        else:  # datasets/OWNER/NAME/resolve/COMMIT/PATH
            repository, path = "/".join(address[1:3]), "/".join(address[5:])
        return repository, path, self.hub.files.get(repository, {}).get(path)

    def send_file(self, content: bytes, fault: Fault, wanted: str | None) -> None:
        first, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last) + 1 if last else len(content), len(content))
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        rest = content[start : end if fault.cut is None else min(start + fault.cut, end)]
        for place in range(0, len(rest), 1 << 16):
            self.wfile.write(rest[place : place + (1 << 16)])
            time.sleep(fault.seconds_per_chunk)
        if fault.cut is not None:
            self.close_connection = True

    def answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what several tests are about."""


def use_hub(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clients in this process ask that hub, as with HF_ENDPOINT and HF_HOME; nobody waits before an attempt."""
    import datasets

    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    HfFileSystem.clear_instance_cache()
    clock = SimpleNamespace(sleep=hub.waits.append, perf_counter=time.perf_counter, monotonic=time.monotonic)
    for module in (_http, file_download, download):
        monkeypatch.setattr(module, "time", clock)


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub without files, for as long as the block runs."""
    hub = Hub()
    server = Server(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
