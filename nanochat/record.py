"""What is known of a run: where it came from, its events (the only source of reports), its running figures."""

import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from nanochat.common import UserError, get_base_dir, get_rank, print0

EVALUATIONS = ("tok_eval", "base_loss", "base_eval", "chat_eval", "lm_eval")


def provenance() -> dict[str, Any]:
    """Where a number came from: command line, git commit, Python, platform and library versions."""
    packages = ("torch", "numpy", "pyarrow", "safetensors", "nanochat-rustbpe")
    versions = {name: next((d.version for d in metadata.distributions(name=name)), "absent") for name in packages}
    machine = {"platform": platform.platform(), "cpu": cpu_name(), "cpu_count": os.cpu_count()}
    return {"argv": sys.argv, "git": git_state(), "python": platform.python_version(), **machine, "versions": versions}


def git_state() -> str:
    """The checkout's commit, with "+dirty" where tracked files were changed; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--abbrev=12"]
    try:
        run = subprocess.run([*command, "--dirty=+dirty"], capture_output=True, text=True, check=True, timeout=10)
        return run.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def cpu_name() -> str:
    """The processor's marketing name, from /proc/cpuinfo where there is one."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


class Record:
    """An append-only event log, `records/<stage>-<tag>-<time>.jsonl`. Each line is one JSON object with `event` and
    `time`; the first is `start` with the settings and provenance(). Lines are flushed as written: a killed run keeps
    its record.
    """

    def __init__(self, file: TextIO | None):
        self.file = file
        self.path = Path(file.name) if file else None

    def write(self, event: str, **values: Any) -> None:
        """Append one event. Does nothing on ranks other than 0, which have no file. JSON has no infinity: a number that
        is not finite is null. Raises UserError on a full disk.
        """
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
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
    """Start a record for one run of one stage (rank 0 writes; other ranks get a silent one, and so does an evaluation
    where none can be written, such as of somebody else's models). Its first event says the settings, where it comes
    from, and what else is known `about` the run, such as Compute.about().
    """
    if get_rank() != 0:
        return Record(None)
    folder = get_base_dir() / "records"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    paths = (folder / f"{stage}-{tag}-{stamp}{attempt}.jsonl" for attempt in ("", *(f"-{n}" for n in range(1, 1000))))
    path = next(path for path in paths if not path.exists())  # two runs within one second must not share a file
    try:
        folder.mkdir(exist_ok=True)
        record = Record(open(path, "x", encoding="utf-8"))  # noqa: SIM115  # lives as long as the run
    except OSError as error:
        if stage not in EVALUATIONS:
            raise
        print0(f"{error.filename}: {error.strerror}; this evaluation goes on without a record")
        return Record(None)
    record.write("start", stage=stage, tag=tag, settings=settings, **provenance(), **about)
    return record


def open_wandb(stage: str, settings: dict[str, Any], run_id: str | None) -> Any:
    """A wandb run, continued where its id is known, or None for --run=dummy and on other ranks. wandb itself respects
    WANDB_MODE=offline.
    """
    if (run := settings["run"]) == "dummy" or get_rank() != 0:
        return None
    try:
        import wandb
    except ImportError:
        raise UserError(f"--run={run} needs wandb: pip install wandb, or --run=dummy to do without") from None
    project = "nanochat" if stage == "base" else f"nanochat-{stage}"
    return wandb.init(project=project, name=run, config=settings, id=run_id, resume="allow")


# -----------------------------------------------------------------------------
# Figures of the loop


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on every rank."""

    loss: float  # mean nats per counted token, over all ranks and micro-batches
    tokens: int  # counted tokens
    grad_norm: float  # of the mean gradient, before the update
    stop_signal: int  # a signal number when any rank was asked to stop, else 0
    spike: bool = False  # loss or gradient norm far above those of the steps before


@dataclass
class Meter:
    """Running figures: smoothed loss, time per step, tokens/s, FLOP/s, MFU where the card's peak is known, time left.

    The first `SKIP` steps after a start (compilation, caches) count in no rate. smooth_loss is an exponential mean with
    its start-up bias removed: after one step it is that step's loss. `state()` is what must survive a resume.
    """

    flops_per_token: int
    num_steps: int
    peak_flops: float | None = None  # of all ranks' cards together, dense bf16; None where it is unknown: no MFU
    tokens_per_step: int | None = None  # that the model computes; None = those that count in the loss
    smooth: float = 0.0
    steps: int = 0  # in the whole run
    train_seconds: float = 0.0  # optimizer-loop time of the whole run, evaluations and saves excluded
    timed_steps: int = 0
    timed_seconds: float = 0.0
    timed_tokens: int = 0
    here: int = 0  # steps since this process started
    started: float = field(default_factory=time.perf_counter)

    BETA, SKIP = 0.9, 3

    def start(self) -> None:
        """Call right before a step; what happens between steps is nobody's training time."""
        self.started = time.perf_counter()

    def tick(self, result: StepResult) -> dict[str, Any]:
        """Account for one finished step, whose device is idle; returns what is logged."""
        seconds = time.perf_counter() - self.started
        self.steps += 1
        self.here += 1
        self.train_seconds += seconds
        self.smooth = self.BETA * self.smooth + (1 - self.BETA) * result.loss
        if self.here > self.SKIP:
            self.timed_steps += 1
            self.timed_seconds += seconds
            self.timed_tokens += self.tokens_per_step or result.tokens
        figures = {"loss": result.loss, "smooth_loss": self.smooth_loss, "grad_norm": result.grad_norm}
        rounded = {name: round(value, 6) for name, value in figures.items()}
        spike = {"spike": True} if result.spike else {}
        return {**rounded, "tokens": result.tokens, "seconds": round(seconds, 4), **spike}

    @property
    def smooth_loss(self) -> float:
        return self.smooth / (1 - self.BETA**self.steps) if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.timed_tokens / self.timed_seconds if self.timed_seconds else 0.0

    @property
    def flops_per_second(self) -> float:
        return self.tokens_per_second * self.flops_per_token

    @property
    def mfu(self) -> float | None:
        """Share of the cards' peak that the model's FLOPs use."""
        return self.flops_per_second / self.peak_flops if self.peak_flops else None

    @property
    def eta_seconds(self) -> float:
        return (self.num_steps - self.steps) * self.timed_seconds / self.timed_steps if self.timed_steps else 0.0

    def describe(self) -> str:
        """Speed: tokens/s, then MFU where known or FLOP/s where not; no number before the first step that is timed."""
        if not self.timed_steps:
            return "warming up"
        mfu = f"MFU {self.mfu:.1%}" if self.mfu else f"{self.flops_per_second / 1e9:,.0f} GFLOP/s"
        return f"{self.tokens_per_second:,.0f} tok/s, {mfu}"

    def summary(self) -> dict[str, Any]:
        trained = {"train_seconds": round(self.train_seconds, 2)}
        if not self.timed_steps:
            return trained
        rates = {"tokens_per_second": round(self.tokens_per_second), "flops_per_second": round(self.flops_per_second)}
        return {**rates, "mfu": self.mfu and round(self.mfu, 4), **trained}

    def state(self) -> dict[str, float]:
        return {"smooth": self.smooth, "steps": self.steps, "train_seconds": self.train_seconds}

    def restore(self, state: dict[str, float]) -> None:
        self.smooth, self.steps, self.train_seconds = state["smooth"], int(state["steps"]), state["train_seconds"]
