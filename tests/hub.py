"""A Hugging Face hub on 127.0.0.1, as far as a download of data sets needs one, that fails in every way it is told to.

It answers /api/datasets/OWNER/NAME[/revision/COMMIT] and /datasets/OWNER/NAME/resolve/COMMIT/PATH, which redirects
large files (here .parquet) to another address, as the hub does; and /plain/NAME for files outside any repository.
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
from typing import Any

import pytest
from huggingface_hub import constants

from nanochat import download

COMMIT = "a" * 40


@dataclass
class Fault:
    """What goes wrong with one answer: a status, an early end of the connection, pauses, other bytes."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    seconds_per_chunk: float = 0
    whole: bool = False  # the Range header is not honoured
    content: bytes | None = None
    when: Callable[[], bool] | None = None  # the answer waits until this is true, at most 20 s


@dataclass
class Hub:
    """`files` by repository and path ("plain" for those outside); `faults` by path, used up one per request."""

    url: str = ""
    commit: str = COMMIT
    files: dict[str, dict[str, bytes]] = field(default_factory=lambda: defaultdict(dict))
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    listed: dict[str, dict[str, Any]] = field(default_factory=dict)  # by path: what the list says otherwise
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # method, path, headers

    def gets(self, path: str) -> list[str | None]:
        """The Range headers of the transfers of a file so far (redirects are not counted)."""
        return [
            headers.get("range")
            for method, address, headers in self.requests
            if method == "GET" and "/resolve/" not in address and address.endswith(f"/{path}")
        ]

    def lists(self) -> list[str]:
        return [path for _, path, _ in self.requests if path.startswith("/api/datasets/")]

    def describe(self, repository: str) -> bytes:
        siblings = []
        for path, content in self.files[repository].items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(content)}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if path.endswith(".parquet"):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            entry |= self.listed.get(path, {})
            siblings.append({key: value for key, value in entry.items() if value is not None})
        return json.dumps({"id": repository, "sha": self.commit, "siblings": siblings}).encode()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append((self.command, self.path, headers))
        address = self.path.partition("?")[0].strip("/").split("/")
        if address[:2] == ["api", "datasets"]:
            repository, path = "/".join(address[2:4]), "list"
            content = self.hub.describe(repository) if repository in self.hub.files else None
        else:
            repository, path, content = self.find(address)
        faults = self.hub.faults[path]
        if "resolve" in address and path.endswith(".parquet") and content is not None:
            self.answer(302, b"", {"Location": f"{self.hub.url}/lfs/{repository}/{path}"})
            return
        fault = faults.pop(0) if faults and self.command == "GET" else Fault()
        deadline = time.monotonic() + 20
        while fault.when and not fault.when() and time.monotonic() < deadline:
            time.sleep(0.01)
        if content is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif fault.status != 200:
            self.answer(fault.status, b"", fault.headers)
        else:
            wanted = None if fault.whole else headers.get("range")
            self.send_file(fault.content if fault.content is not None else content, fault, wanted)

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
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start >= len(content) and start:
            self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        rest = content[start:] if fault.cut is None else content[start : start + fault.cut]
        for place in range(0, len(rest), 1 << 16):
            self.wfile.write(rest[place : place + (1 << 16)])
            time.sleep(fault.seconds_per_chunk)
        if fault.cut is not None:
            self.close_connection = True

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what several tests are about."""


def use_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client in this process ask that hub, as with HF_ENDPOINT; failed attempts are repeated at once."""
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "RETRY_SECONDS", 0.01)


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
