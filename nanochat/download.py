"""Files from the Hugging Face hub and from plain addresses, fetched whole or not at all.

    listing = list_repository("openai/gsm8k")              # one commit: {path: RemoteFile}, and its name
    with locked(folder), closing(fetch_files([(file, folder / "train.parquet")], workers=4)) as fetched:
        for path in fetched: ...                           # each as soon as it is whole

Connection, token and switches are the hub client's own: HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean here
what they mean to it, and a file that lies in its cache is copied. The transfer is ours, because the client
(huggingface_hub 2.4) begins a file anew after a failed attempt.

Promises: a file has its name only when its size and hash are those that the hub has for it; what has arrived of a file
is kept, over attempts and processes, and continued from its end; a hub that asks to wait (Retry-After) is waited for;
everything that ends in failure is one UserError. Does not: check a file for which the server publishes no hash (that is
printed), nor keep two machines apart on a shared file system that does not honour locks: they then do the work twice.
"""

import email.utils
import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.files import flush, sha256_file

ATTEMPTS = 4  # in a row without a new byte
RETRY_SECONDS = 1.0  # wait before the second attempt, doubled each time
LONGEST_WAIT = 600  # seconds that a server may ask for; its rate limits are for windows of 5 minutes
LIST_SECONDS = 30  # a list of 6,543 files with their hashes takes the hub a while
CONNECT_SECONDS = 5
PROGRESS_SECONDS = 10  # between lines while no file ends
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no room; EFBIG also by ulimit -f


@dataclass(frozen=True)
class RemoteFile:
    """A published file: its name to people, and what the server says about its bytes (None = nothing)."""

    name: str
    url: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None  # of b"blob <size>\0" and the content: what the hub has for small files
    etag: str | None = None  # plain addresses: tells whether the rest still belongs to what is here
    cached: str | None = None  # a copy in the client's own cache


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit, by path."""

    repository: str
    revision: str
    files: dict[str, RemoteFile]


# -----------------------------------------------------------------------------
# Asking


def list_repository(repository: str, revision: str | None = None) -> Listing:
    """What a data set repository holds at a commit (None = where its main branch stands now)."""
    from huggingface_hub import HfApi, hf_hub_url, try_to_load_from_cache

    api = HfApi()

    def ask() -> Any:
        check_reachable(api.endpoint)
        return api.dataset_info(repository, revision=revision, files_metadata=True, timeout=LIST_SECONDS)

    info = persist(ask, f"the list of {repository}")
    files = {}
    for entry in info.siblings or ():
        name = entry.rfilename
        cached = try_to_load_from_cache(repository, name, revision=info.sha, repo_type="dataset")
        files[name] = RemoteFile(
            name=f"{name} of {repository}",
            url=hf_hub_url(repository, name, repo_type="dataset", revision=info.sha, endpoint=api.endpoint),
            size=entry.size,
            sha256=entry.lfs.sha256 if entry.lfs else None,
            git_sha1=None if entry.lfs else entry.blob_id,
            cached=cached if isinstance(cached, str) else None,
        )
    return Listing(repository, str(info.sha), files)


def describe_url(url: str) -> RemoteFile:
    """A file at a plain address, by its headers."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    def ask() -> Any:
        check_reachable(url)
        response = get_session().head(url, headers={"Accept-Encoding": "identity"}, timeout=LIST_SECONDS)
        hf_raise_for_status(response)
        return response

    headers = persist(ask, url).headers
    size = headers.get("Content-Length", "")
    return RemoteFile(url, url, size=int(size) if size.isdigit() else None, etag=headers.get("ETag"))


def check_reachable(url: str) -> None:
    """Raise OSError after a few seconds where nothing answers: the client would wait for as long as a list may take. At
    once where HF_HUB_OFFLINE is set, also since the client was imported, which reads it then and never again.
    """
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import OfflineModeIsEnabled

    if is_offline_mode() or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
    if not getproxies():
        address = urlsplit(url)
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=CONNECT_SECONDS).close()


# -----------------------------------------------------------------------------
# Trying again


def persist(ask: Callable[[], Any], what: str) -> Any:
    """The result of a request, after several attempts where they can help; UserError where it fails for good."""
    for failures in range(1, ATTEMPTS + 1):
        try:
            return ask()
        except Exception as error:  # the client lets through the errors of the HTTP library under it
            time.sleep(pause_after(error, failures, what))
    raise AssertionError("pause_after ends the last attempt")


def pause_after(error: Exception, failures: int, what: str) -> float:
    """Seconds to wait before the next attempt, which is announced. Raises UserError where there is to be none: the disk
    is full, the server's answer is final, or this was the last of ATTEMPTS failures.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    reason = reason_of(error)
    status = status_of(error)
    if isinstance(error, OSError) and error.errno in FULL:
        raise UserError(
            f"no room for {what} ({error.strerror}); what is here is kept: make room, then run the same command"
        ) from None
    if isinstance(error, OfflineModeIsEnabled):
        raise UserError(f"cannot get {what}: HF_HUB_OFFLINE is set; fetch it where there is a network") from None
    final = status is not None and status < 500 and status not in (408, 416, 429)
    if final or failures >= ATTEMPTS:
        raise UserError(f"cannot get {what} ({reason}); what is here is kept, run the same command to go on") from None
    seconds = asked_to_wait(error)
    if seconds is None:
        seconds = RETRY_SECONDS * 2 ** (failures - 1)
    if seconds > LONGEST_WAIT:
        raise UserError(
            f"cannot get {what} ({reason}): the server asks to wait {seconds:,.0f} s; then run the same command"
        ) from None
    print(f"{what}: attempt {failures} of {ATTEMPTS} failed ({reason}); again in {seconds:.0f} s", flush=True)
    return seconds


def reason_of(error: Exception) -> str:
    """An exception in one line: its class, and the first line of its message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]]).rstrip(".")


def status_of(error: Exception) -> int | None:
    """The HTTP status that an exception carries, if any."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def asked_to_wait(error: Exception) -> float | None:
    """Seconds that the server's answer asks to wait: Retry-After in either form (RFC 9110), or the hub's rate limit."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = getattr(getattr(error, "response", None), "headers", {})
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    if value:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return None
    limit = parse_ratelimit_headers(headers) if status_of(error) == 429 else None
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else None


# -----------------------------------------------------------------------------
# Fetching


def fetch_files(wanted: Sequence[tuple[RemoteFile, Path]], workers: int) -> Generator[Path]:
    """Fetch files to their places, several at a time, and yield each place once its file is whole. Close it
    (contextlib's closing) to stop the transfers. The first file that fails for good ends it all with UserError.
    """
    check_free_space(wanted)
    unchecked = [file.name for file, _ in wanted if not (file.sha256 or file.git_sha1)]
    if unchecked:
        print(f"no hash is published for {len(unchecked):,} files, such as {unchecked[0]}", flush=True)
    stop = threading.Event()
    received = dict.fromkeys((target for _, target in wanted), 0)
    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(fetch_file, file, target, received, stop): target for file, target in wanted}
        try:
            pending, done = set(jobs), 0
            while pending:
                finished, pending = wait(pending, PROGRESS_SECONDS, FIRST_COMPLETED)
                for job in finished:
                    job.result()
                done += len(finished)
                seconds = time.perf_counter() - started
                print(progress_line(wanted, done, sum(received.values()), seconds), flush=True)
                yield from (jobs[job] for job in finished)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def fetch_all(wanted: Sequence[tuple[RemoteFile, Path]], workers: int) -> None:
    """fetch_files() to its end."""
    with closing(fetch_files(wanted, workers)) as fetched:
        for _ in fetched:
            pass


def progress_line(wanted: Sequence[tuple[RemoteFile, Path]], done: int, received: int, seconds: float) -> str:
    """How far a download is: files, MB that arrived in this run, MB/s, minutes left (by bytes where they are known)."""
    rate = received / max(seconds, 1e-3)
    line = f"{done:,} of {len(wanted):,} files, {received / 1e6:,.1f} MB at {rate / 1e6:.1f} MB/s"
    left = sum((file.size or 0) - size_of(target) - size_of(partial_path(file, target)) for file, target in wanted)
    return f"{line}, {left / rate / 60:,.0f} min left" if rate and left > 0 else line


def check_free_space(wanted: Sequence[tuple[RemoteFile, Path]]) -> None:
    """Refuse to begin what cannot end for want of room; UserError with the bytes needed and free."""
    needed = sum(
        (file.size or 0) - size_of(partial_path(file, target)) for file, target in wanted if not target.exists()
    )
    for folder in {target.parent for _, target in wanted}:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"{folder}: {needed:,} bytes to fetch and {free:,} bytes free; make room, or choose another place: "
                "export NANOCHAT_BASE_DIR=DIR"
            )


def fetch_file(file: RemoteFile, target: Path, received: dict[Path, int], stop: threading.Event) -> None:
    """Bring one file to its place; what is there already is kept if it is the published file, else replaced. Counts the
    bytes that arrive in `received[target]`. Raises UserError when it cannot be had.
    """
    if target.is_file() and not mismatch(file, target):
        return
    partial = partial_path(file, target)
    failures = 0
    while True:
        before = size_of(partial)
        try:
            transfer(file, partial, target, received, stop)
            wrong = mismatch(file, partial)
            if wrong:
                partial.unlink()
                raise ConnectionError(wrong)
            os.replace(partial, target)
            flush(target.parent)
            return
        except Exception as error:  # see persist()
            if stop.is_set():
                raise
            failures = 1 if size_of(partial) > before else failures + 1
            seconds = pause_after(error, failures, file.name)
        if stop.wait(seconds):
            raise InterruptedError(f"{file.name}: stopped")


def transfer(file: RemoteFile, partial: Path, target: Path, received: dict[Path, int], stop: threading.Event) -> None:
    """Append what is missing to a partial file. Returns at the end of the stream, raises when it breaks off."""
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import get_session, hf_raise_for_status

    if file.cached and not partial.exists():
        shutil.copyfile(file.cached, partial)
    have = size_of(partial)
    if have and have == file.size:
        return
    if file.size is not None and have > file.size:
        partial.unlink()
        have = 0
    stream = get_session().stream("GET", file.url, headers=headers_for(file, have), timeout=HF_HUB_DOWNLOAD_TIMEOUT)
    with stream as response, open(partial, "ab") as output:
        if response.status_code == 416:  # what is here is longer than the file
            output.truncate(0)
        hf_raise_for_status(response)
        if response.status_code != 206:  # the whole file, whatever was asked for
            output.truncate(0)
            have = 0
        announced = response.headers.get("Content-Length", "")
        if file.size is not None and announced.isdigit() and have + int(announced) != file.size:
            raise ConnectionError(f"{have + int(announced):,} bytes are sent, not the {file.size:,} that are listed")
        for chunk in response.iter_raw():
            output.write(chunk)
            received[target] += len(chunk)
            if stop.is_set():
                raise InterruptedError(f"{file.name}: stopped")
        output.flush()
        os.fsync(output.fileno())


def headers_for(file: RemoteFile, have: int) -> dict[str, str]:
    """What to ask with: the hub's token for the hub alone, and only for the bytes that are missing."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers() if file.url.startswith(f"{HfApi().endpoint}/") else {}
    headers["Accept-Encoding"] = "identity"  # bytes are counted as they are stored
    if have:
        headers["Range"] = f"bytes={have}-"
        if file.etag:
            headers["If-Range"] = file.etag  # a file that was changed since is sent whole
    return headers


def partial_path(file: RemoteFile, target: Path) -> Path:
    """Where a file grows: beside its place, under a name that another version of it does not have."""
    identity = file.sha256 or file.git_sha1 or hashlib.sha256((file.etag or file.url).encode()).hexdigest()
    return target.with_name(f".{target.name}.{identity[:12]}.partial")


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def mismatch(file: RemoteFile, path: Path) -> str:
    """What differs between a file on disk and the published one; empty where nothing does."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"{size:,} bytes arrived, not the {file.size:,} that are listed"
    if file.sha256 and sha256_file(path) != file.sha256:
        return "its sha256 is not the one that is listed"
    if file.git_sha1 and git_blob_sha1(path) != file.git_sha1:
        return "its git hash is not the one that is listed"
    return ""


def git_blob_sha1(path: Path) -> str:
    """Git's name for a file's content: sha1 over b"blob <size>\\0" and the bytes (git-scm.com, Git Objects)."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
