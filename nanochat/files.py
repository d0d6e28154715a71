"""Files and folders that exist whole or not at all, and JSON files that know when a bit of them has changed."""

import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` where the block writes a file or makes a folder. When the block ends well, every byte is
    flushed to the disk and the place is renamed to `path`; when it raises, nothing is left. Readers see what was there
    before or all of the new. (Of two folders: killed between two renames, neither; the old one is beside, hidden.)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".*@{os.uname().nodename}.{glob.escape(path.name)}.tmp"):  # by killed processes
        if not is_alive(int(left.name[1:].partition("@")[0])):
            remove(left)
    building = path.with_name(f".{os.getpid()}@{os.uname().nodename}.{path.name}.tmp")
    before = building.with_suffix(".before")
    try:
        yield building
        for written in [building, *(building.rglob("*") if building.is_dir() else ())]:
            if written.is_file():  # who may read the folder may read what is in it: safetensors gives its owner alone
                written.chmod(building.stat().st_mode & 0o666)
            flush(written)
        if path.is_dir():
            os.replace(path, before)
        os.replace(building, path)
        flush(path.parent)
    finally:
        if before.exists():
            os.replace(before, building if path.exists() else path)
        remove(building)


def is_alive(pid: int) -> bool:
    """Whether another process of this machine has that number. In containers all may have the number 7."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return pid != os.getpid()


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Make a file's bytes, or the names in a directory, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write a whole file; see whole()."""
    with whole(Path(path)) as building:
        building.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time work in a folder, which is created; the others wait. Not reentrant."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another process is at work there; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256_file(path: Path | str) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(text: str) -> str:
    """The JSON text of an object with one more key at its end: the sha256 of all bytes before it."""
    body = text.rstrip().removesuffix("}").rstrip()
    return f'{body},\n"sha256":"{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def read_sealed(path: Path | str) -> dict[str, Any]:
    """The object in a file that seal() made. Raises ValueError when a bit is not as it was written, and OSError."""
    data = Path(path).read_bytes()
    body, _, seal_of_file = data.rpartition(b',\n"sha256":"')
    if seal_of_file != f'{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode():
        raise ValueError("not as it was written (sha256 differs)")
    content: dict[str, Any] = json.loads(data)
    del content["sha256"]
    return content


def one_line(error: BaseException, length: int = 200) -> str:
    """Why a foreign library failed, as a message can hold it: on one line, printable, cut to `length` characters."""
    words = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in words)
    return text if len(text) <= length else f"{text[: length - 3]}..."
