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

import os
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub  # its parts load (a second) when they are used

from nanochat.common import FULL, UserError
from nanochat.files import one_line, sha256_file, whole

PAUSES = (1, 5)  # seconds before the second and the third attempt, where the server does not say how long to wait
ARRIVING = ".arriving"  # where files grow, in the folder that they are for


class Listing(NamedTuple):
    """The files of a data set repository at one commit."""

    repository: str
    revision: str
    files: dict[str, Any]  # by path, the hub's RepoSibling: size, and lfs.sha256 where the file is large


def list_repository(repository: str, revision: str | None = None) -> Listing:
    """What a data set repository holds at a commit (None = where its main branch stands now)."""
    seconds = 30  # a list of 6,543 files with their hashes takes the hub a while
    ask = partial(huggingface_hub.HfApi().dataset_info, revision=revision, timeout=seconds, files_metadata=True)
    info = persist(lambda: ask(repository), f"the list of {repository}")
    return Listing(repository, str(info.sha), {file.rfilename: file for file in info.siblings or ()})


def fetch_files(listing: Listing, paths: Sequence[str], folder: Path, workers: int) -> Generator[Path]:
    """Fetch files into a folder, which the caller has locked, several at a time, and yield each once it is whole. Close
    it (contextlib's closing) to begin no further ones. The first file that fails for good ends it with UserError.
    """
    from huggingface_hub.utils import tqdm

    sizes = {path: listing.files[path].size or 0 for path in paths if difference(listing.files[path], folder / path)}
    yield from (folder / path for path in paths if path not in sizes)
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if needed > free:
        room = "make room, or choose another place: export NANOCHAT_BASE_DIR=DIR"
        raise UserError(f"{folder}: {needed:,} bytes to fetch and {free:,} bytes free; {room}")
    shutil.rmtree(folder / ARRIVING, ignore_errors=True)  # what a killed process left
    pool = ThreadPool(workers)  # its threads are daemons: an interrupted process does not wait for 100 MB more of each
    arrived = pool.imap_unordered(partial(fetch_file, listing, folder), list(sizes))
    started, count, received = time.perf_counter(), len(sizes), 0
    try:
        for number, path in enumerate(arrived, 1):
            received += sizes.pop(path)
            rate = received / (time.perf_counter() - started)
            left = f", {sum(sizes.values()) / rate / 60:,.0f} min left" if rate and sizes else ""
            line = f"{number:,} of {count:,} files, {received / 1e6:,.1f} MB at {rate / 1e6:.1f} MB/s{left}"
            tqdm.write(line)  # above the client's bars, where there are some
            yield folder / path
    except UserError:
        pool.terminate()
        pool.join()  # what is under way becomes whole, and stays
        raise
    finally:
        pool.terminate()
        shutil.rmtree(folder / ARRIVING, ignore_errors=True)


def fetch_file(listing: Listing, folder: Path, path: str) -> str:
    """Bring one file to its place and return its path; UserError where it cannot be had."""
    name, commit, files = listing
    arriving = folder / ARRIVING

    def ask() -> None:
        huggingface_hub.hf_hub_download(name, path, repo_type="dataset", revision=commit, local_dir=arriving)
        if wrong := difference(files[path], arriving / path):
            (arriving / path).unlink()  # the client would take it for the right one
            raise ConnectionError(wrong)

    persist(ask, f"{path} of {name}")
    with whole(folder / path) as building:
        os.replace(arriving / path, building)
    return path


def fetch_url(url: str, target: Path) -> None:
    """Fetch a file from a plain address; UserError where it cannot be had."""
    from huggingface_hub.file_download import http_get

    def ask() -> None:
        with whole(target) as building, open(building, "wb") as output:
            http_get(url, output)

    persist(ask, url)


def persist(ask: Callable[[], Any], what: str) -> Any:
    """The result of a request, after several attempts where they can help; UserError where it fails for good."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    for pause in (*PAUSES, None):
        try:
            return ask()
        except Exception as error:  # the client lets through the errors of the HTTP library under it
            gave_up = isinstance(error, LocalEntryNotFoundError)  # after six attempts, or at once when it is offline
            cause = gave_up and error.__cause__ or error
        response = getattr(cause, "response", None)
        status = getattr(response, "status_code", 500)
        if isinstance(cause, OSError) and cause.errno in FULL:
            raise UserError(f"no room for {what} ({cause.strerror}); make room, then run the same command")
        if isinstance(cause, OfflineModeIsEnabled):
            raise UserError(f"cannot get {what}: HF_HUB_OFFLINE is set; fetch it where there is a network")
        final = gave_up or isinstance(cause, ValueError) or (status < 500 and status not in (408, 429))
        if pause is None or final:
            raise UserError(f"cannot get {what} ({one_line(cause)}); run the same command to go on, whole files stay")
        asked = str(getattr(response, "headers", {}).get("Retry-After", ""))
        seconds = int(asked) if asked.isdigit() else pause
        print(f"{what}: {one_line(cause)}; again in {seconds} s", flush=True)
        time.sleep(seconds)
    raise AssertionError("the last attempt returns or raises")


def difference(file: Any, path: Path) -> str:
    """What differs between a file on disk and the published one; empty where nothing does."""
    size = path.stat().st_size if path.is_file() else -1
    if size < 0 or file.size not in (None, size):
        return f"{size:,} bytes arrived, not the {file.size or 0:,} that are listed"
    if file.lfs and sha256_file(path) != file.lfs.sha256:
        return "its sha256 is not the one that is listed"
    return ""
