"""Files from the Hugging Face hub and from plain addresses, fetched whole or not at all.

    listing = list_repository("openai/gsm8k")  # one commit: the size and sha256 of each of its files
    with locked(folder), closing(fetch_files(listing, paths, folder, workers=4)) as fetched:
        for path in fetched: ...  # each as soon as it is whole

Transfers are huggingface_hub's: its variables (HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE), its cache, Xet, its
attempts and the waits that a busy hub asks for, which it announces.

Promises: a file has its name only when its size and sha256 are those that the hub lists for its commit; a file that is
whole stays, and is not fetched again; everything that ends in failure is one UserError. Does not: continue half a file
in another process, nor check a plain address for more than the announced size.
"""

import errno
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from nanochat.common import UserError
from nanochat.files import one_line, sha256_file, whole

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

Answer = TypeVar("Answer")

PAUSES = (1, 5)  # seconds before the second and the third attempt, where the server does not say how long to wait
LIST_SECONDS = 30  # a list of 6,543 files with their hashes takes the hub a while
ARRIVING = ".arriving"  # where files grow, in the folder that they are for
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no room; EFBIG also by ulimit -f


@dataclass(frozen=True)
class Listing:
    """The files of a data set repository at one commit, by path: their size, and sha256 where they are large."""

    repository: str
    revision: str
    files: "dict[str, RepoSibling]"


def list_repository(repository: str, revision: str | None = None) -> Listing:
    """What a data set repository holds at a commit (None = where its main branch stands now)."""
    from huggingface_hub import HfApi

    info = persist(
        lambda: HfApi().dataset_info(repository, revision=revision, files_metadata=True, timeout=LIST_SECONDS),
        f"the list of {repository}",
    )
    return Listing(repository, str(info.sha), {file.rfilename: file for file in info.siblings or ()})


def fetch_files(listing: Listing, paths: Sequence[str], folder: Path, workers: int) -> Generator[Path]:
    """Fetch files into a folder, which the caller has locked, several at a time, and yield each once it is whole. Close
    it (contextlib's closing) to begin no further ones. The first file that fails for good ends it with UserError.
    """
    from huggingface_hub.utils import tqdm

    missing = [path for path in paths if difference(listing.files[path], folder / path)]
    yield from (folder / path for path in paths if path not in missing)
    sizes = {path: listing.files[path].size or 0 for path in missing}
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {needed:,} bytes to fetch and {free:,} bytes free; make room, or choose another place: "
            "export NANOCHAT_BASE_DIR=DIR"
        )
    shutil.rmtree(folder / ARRIVING, ignore_errors=True)  # what a killed process left
    todo = deque(missing)
    ended: SimpleQueue[str | Exception] = SimpleQueue()

    def work() -> None:
        with suppress(IndexError):  # nothing is left to do
            while True:
                path = todo.popleft()
                try:
                    fetch_file(listing, path, folder)
                    ended.put(path)
                except Exception as error:  # raised where it is read
                    ended.put(error)

    # No pool: an interrupted process would wait for 100 MB more of each.
    threads = [threading.Thread(target=work, daemon=True, name="fetch") for _ in range(workers)]
    for thread in threads:
        thread.start()
    started, received = time.perf_counter(), 0
    try:
        for number in range(1, len(missing) + 1):
            path = ended.get()
            if isinstance(path, Exception):
                todo.clear()
                for thread in threads:  # what is under way becomes whole, and stays
                    thread.join()
                raise path
            received += sizes.pop(path)
            rate = received / (time.perf_counter() - started)
            left = f", {sum(sizes.values()) / rate / 60:,.0f} min left" if rate and sizes else ""
            line = f"{number:,} of {len(missing):,} files, {received / 1e6:,.1f} MB at {rate / 1e6:.1f} MB/s{left}"
            tqdm.write(line)  # above the client's bars, where there are some
            yield folder / path
    finally:
        todo.clear()
        shutil.rmtree(folder / ARRIVING, ignore_errors=True)


def fetch_file(listing: Listing, path: str, folder: Path) -> None:
    """Bring one file to its place; UserError where it cannot be had."""
    from huggingface_hub import hf_hub_download

    arriving = folder / ARRIVING

    def ask() -> None:
        hf_hub_download(listing.repository, path, repo_type="dataset", revision=listing.revision, local_dir=arriving)
        wrong = difference(listing.files[path], arriving / path)
        if wrong:
            (arriving / path).unlink()  # the client would take it for the right one
            raise ConnectionError(wrong)

    persist(ask, f"{path} of {listing.repository}")
    with whole(folder / path) as building:
        os.replace(arriving / path, building)


def fetch_url(url: str, target: Path) -> None:
    """Fetch a file from a plain address; UserError where it cannot be had."""
    from huggingface_hub.file_download import http_get

    def ask() -> None:
        with whole(target) as building, open(building, "wb") as output:
            http_get(url, output)

    persist(ask, url)


def persist(ask: Callable[[], Answer], what: str) -> Answer:
    """The result of a request, after several attempts where the client makes none and they can help; UserError where it
    fails for good.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    for pause in (*PAUSES, None):
        try:
            return ask()
        except Exception as error:  # the client lets through the errors of the HTTP library under it
            gave_up = isinstance(error, LocalEntryNotFoundError)  # after six attempts, or at once when it is offline
            cause = error.__cause__ if gave_up and error.__cause__ else error
        response = getattr(cause, "response", None)
        status = getattr(response, "status_code", 500)
        final = gave_up or isinstance(cause, ValueError) or (status < 500 and status not in (408, 429))
        if isinstance(cause, OSError) and cause.errno in FULL:
            raise UserError(f"no room for {what} ({cause.strerror}); make room, then run the same command")
        if isinstance(cause, OfflineModeIsEnabled):
            raise UserError(f"cannot get {what}: HF_HUB_OFFLINE is set; fetch it where there is a network")
        if pause is None or final:
            raise UserError(f"cannot get {what} ({one_line(cause)}); run the same command to go on, whole files stay")
        asked = str(getattr(response, "headers", {}).get("Retry-After", ""))
        seconds = int(asked) if asked.isdigit() else pause
        print(f"{what}: {one_line(cause)}; again in {seconds} s", flush=True)
        time.sleep(seconds)
    raise AssertionError("the last attempt returns or raises")


def difference(file: "RepoSibling", path: Path) -> str:
    """What differs between a file on disk and the published one; empty where nothing does."""
    size = path.stat().st_size if path.is_file() else -1
    if size < 0 or file.size not in (None, size):
        return f"{size:,} bytes arrived, not the {file.size or 0:,} that are listed"
    if file.lfs and sha256_file(path) != file.lfs.sha256:
        return "its sha256 is not the one that is listed"
    return ""
