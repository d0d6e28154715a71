"""
What every stage needs and nothing else does: the user's mistakes, the base directory, whole files, the run record.

Promises: a file written here exists whole or not at all; one line per mistake. Imports only the standard library, so
`--help` and every mistake answer at once. Torch lives one layer up, in compute.py.
"""

import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

EXIT_RANK_DIED = 4  # another rank of the run is dead; one of those that ended prints which


class UserError(ValueError):
    """
    A mistake that the user can mend: one line with the value, what is allowed, and the command that mends it. One that
    every rank raises alike (`everywhere`) is printed by rank 0 alone.
    """

    exit_code = 2

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


class StepFailed(UserError):
    """
    A step that could not be finished, on every rank: the weights are those of the step before. `seen` is what is known
    of the step.
    """

    seen: Any = None


class NotFinite(StepFailed):
    """A step with a loss or a gradient that is NaN or infinite, or weights that are; ends the process with 3."""

    exit_code = 3


class Stopped(Exception):
    """The run was asked to stop by a signal and has saved what it had; ends the process with 128 + signal number."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def run_main(main: Callable[[], None]) -> None:
    """
    Run a script's main() and turn its end into an exit code: 0 done, 2 the user's mistake (one line, no traceback), 3
    numbers that are not finite, 130 Ctrl-C, 128 + n stopped by signal n after saving (and 4 another rank died, see
    peers.py). Every other exception is ours and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        say_why(str(error), error.everywhere)
        sys.exit(error.exit_code)
    except Stopped as stop:
        say_why(str(stop), everywhere=True)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        say_why("interrupted", everywhere=False)
        sys.exit(130)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        less = "Fewer rows (--device-batch-size) need less, python -m scripts.plan says what else; training: --resume"
        say_why(f"{str(error).splitlines()[0]} {less}", everywhere=False)
        sys.exit(2)


def say_why(reason: str, everywhere: bool) -> None:
    """The last line of a process, on stderr; of rank 0 alone where all ranks have the same to say."""
    if everywhere and get_rank() != 0:
        time.sleep(1)  # torchrun ends all when the first one ends; let rank 0 speak
        return
    try:
        print(f"{Path(sys.argv[0]).stem}: {reason}", file=sys.stderr, flush=True)
    except OSError:
        into_nothing(sys.stderr)


# -----------------------------------------------------------------------------
# Ranks, without torch: torchrun sets these before the process starts.


def get_rank() -> int:
    """This process's number among all that torchrun started; 0 when alone."""
    return int(os.environ.get("RANK", "0"))


def print0(*values: object, **options: Any) -> None:
    """
    print() on rank 0 only. A terminal that was closed or a reader that has gone (| head, a tee that was killed) does
    not end a run: from then on it prints into nothing.
    """
    if get_rank() == 0:
        try:
            print(*values, **options, flush=True)
        except OSError:
            into_nothing(sys.stdout)


def into_nothing(stream: TextIO) -> None:
    """Let a stream whose terminal or reader has gone lead nowhere; else its rest fails again when the process ends."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


# -----------------------------------------------------------------------------
# Files


def get_base_dir() -> Path:
    """$NANOCHAT_BASE_DIR, or ~/.cache/nanochat. Created if absent; raises UserError where that is impossible."""
    base_dir = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser().absolute()
    try:
        base_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create {base_dir} ({error.strerror}); choose another: export NANOCHAT_BASE_DIR=DIR"
        ) from None
    return base_dir


def fsync_dir(path: Path) -> None:
    """Make a rename inside `path` survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write a whole file: a temporary file beside it, fsync, rename. Readers see the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_file(path: Path | str) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(text: str) -> str:
    """The JSON text of an object with one more key at its end: the sha256 of all bytes before it."""
    body = text.rstrip().removesuffix("}").rstrip()
    return f'{body},\n"sha256":"{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def read_sealed(path: Path | str) -> dict[str, Any]:
    """
    The object in a JSON file that seal() made, without the seal. Raises ValueError when a single bit is not as it was
    written, OSError where the file can't be read.
    """
    data = Path(path).read_bytes()
    body, _, seal_of_file = data.rpartition(b',\n"sha256":"')
    if seal_of_file != f'{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode():
        raise ValueError("not as it was written (sha256 differs)")
    try:
        content: dict[str, Any] = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    del content["sha256"]
    return content


# -----------------------------------------------------------------------------
# Provenance and the run record: one JSON object per event, the only source for reports.


def provenance() -> dict[str, Any]:
    """Where a number came from: command line, git commit, Python, platform and library versions."""
    versions = {}
    for package in ("torch", "numpy", "pyarrow", "safetensors", "nanochat-rustbpe"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "argv": sys.argv,
        "git": git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "versions": versions,
    }


def git_state() -> str:
    """The checkout's commit, with "+dirty" where tracked files were changed; "unknown" outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def cpu_name() -> str:
    """The processor's marketing name, from /proc/cpuinfo where there is one."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class Record:
    """
    An append-only event log, `records/<stage>-<tag>-<time>.jsonl`. Each line is one JSON object with `event` and
    `time`; the first is `start` with the settings and provenance(). Lines are flushed as written: a killed run keeps
    its record.
    """

    def __init__(self, file: TextIO | None):
        self.file = file
        self.path = Path(file.name) if file else None

    def write(self, event: str, **values: Any) -> None:
        """
        Append one event. Does nothing on ranks other than 0, which have no file. Raises UserError on a full disk.
        """
        try:
            if self.file:
                self.file.write(json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n")
                self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write to {self.path} ({error.strerror}); make room, then go on") from None

    def close(self) -> None:
        """The end of the run; writing afterwards is an error."""
        if self.file:
            self.file.close()


def open_record(stage: str, tag: str, settings: dict[str, Any], **about: Any) -> Record:
    """
    Start a record for one run of one stage (rank 0 writes; other ranks get a silent one). Its first event says the
    settings, where it comes from, and what else is known `about` the run, such as Compute.about().
    """
    if get_rank() != 0:
        return Record(None)
    folder = get_base_dir() / "records"
    folder.mkdir(exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = folder / f"{stage}-{tag}-{stamp}.jsonl"
    attempt = 0
    while path.exists():  # two runs within one second must not share a file
        attempt += 1
        path = folder / f"{stage}-{tag}-{stamp}-{attempt}.jsonl"
    record = Record(open(path, "x", encoding="utf-8"))  # noqa: SIM115  # lives as long as the run
    record.write("start", stage=stage, tag=tag, settings=settings, **provenance(), **about)
    return record


def read_record(path: Path) -> list[dict[str, Any]]:
    """All events of a record. A last line cut short by a crash is left out; damage elsewhere raises ValueError."""
    lines = path.read_text(encoding="utf-8").splitlines()
    events = []
    for number, line in enumerate(lines, 1):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a JSON object; delete the record or mend the line") from None
    return events
