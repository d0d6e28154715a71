"""Provenance and the run record: one JSON object per event, the only source for reports."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from nanochat.common import UserError, get_base_dir, get_rank


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
    """An append-only event log, `records/<stage>-<tag>-<time>.jsonl`. Each line is one JSON object with `event` and
    `time`; the first is `start` with the settings and provenance(). Lines are flushed as written: a killed run keeps
    its record.
    """

    def __init__(self, file: TextIO | None):
        self.file = file
        self.path = Path(file.name) if file else None

    def write(self, event: str, **values: Any) -> None:
        """Append one event. Does nothing on ranks other than 0, which have no file. Raises UserError on a full disk."""
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
    """Start a record for one run of one stage (rank 0 writes; other ranks get a silent one). Its first event says the
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
