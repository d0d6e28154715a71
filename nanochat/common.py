"""What every stage needs and nothing else does: the user's mistakes, the base directory, printing on rank 0.

Imports only the standard library, so that `--help` and every mistake answer at once.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO


class Stage(NamedTuple):
    """A stage that trains, as people and files call it."""

    folder: str  # of its checkpoints, in the base directory
    script: str
    title: str  # in reports


STAGES = {
    "base": Stage("base_checkpoints", "scripts.base_train", "base"),
    "mid": Stage("mid_checkpoints", "scripts.mid_train", "mid"),
    "sft": Stage("chatsft_checkpoints", "scripts.chat_sft", "SFT"),
    "rl": Stage("chatrl_checkpoints", "scripts.chat_rl", "RL"),
}


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the last by ulimit -f
CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}  # to this user


class UserError(ValueError):
    """A mistake that the user can mend: one line with the value, what is allowed, and the command that mends it. One
    that every rank raises alike (`everywhere`) is printed by rank 0 alone.
    """

    exit_code = 2

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


class StepFailed(UserError):
    """A step that could not be finished, on every rank: the weights are those of the step before."""

    seen: Any = None  # what is known of the step


class NotFinite(StepFailed):
    """A step with a loss or a gradient that is NaN or infinite, or weights that are; ends the process with 3."""

    exit_code = 3


class Stopped(Exception):
    """The run was asked to stop by a signal and has saved what it had; ends the process with 128 + signal number."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main() and turn its end into an exit code: 0 done, 2 the user's mistake or a full disk or missing
    rights (one line, no traceback), 3 numbers that are not finite, 130 Ctrl-C, 128 + n stopped by signal n after
    saving, 141 the reader of stdout has gone. Every other exception is ours and keeps its traceback.
    """
    try:
        main()
        print(end="", flush=True)
    except UserError as error:
        say_why(str(error), error.everywhere)
        sys.exit(error.exit_code)
    except Stopped as stop:
        say_why(str(stop), everywhere=True)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        say_why("interrupted", everywhere=False)
        sys.exit(130)
    except (OSError, RuntimeError) as error:
        reason = refusal(error)
        if not reason:
            raise
        say_why(reason, everywhere=False)
        sys.exit(2)


def refusal(error: OSError | RuntimeError) -> str:
    """Why the machine, not the program, failed, with what mends it; "" for any other error. Where that is because
    nobody reads stdout any more, the process ends at once and says nothing.
    """
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        less = "Fewer rows (--device-batch-size) need less, python -m scripts.plan says what else; training: --resume"
        return f"{str(error).splitlines()[0]} {less}"
    if not isinstance(error, OSError):
        return ""
    place, full = error.filename, error.errno in FULL
    try:
        if place is None:  # perhaps it was stdout, which has lost what it could not write: only a new line shows it
            print(flush=True)
    except OSError:
        into_nothing(sys.stdout)
        if error.errno == errno.EPIPE:
            sys.exit(128 + signal.SIGPIPE)
        place = "standard output"
    mend = "make room, then start again" if full else "mend that, or choose another: export NANOCHAT_BASE_DIR=DIR"
    return f"{place or get_base_dir()}: {error.strerror}; {mend}" if full or (place and error.errno in CLOSED) else ""


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
    """print() on rank 0 only. A terminal that was closed or a reader that has gone (| head, a tee that was killed) does
    not end a run: from then on it prints into nothing.
    """
    if get_rank() == 0:
        try:
            print(*values, **options, flush=True)
        except OSError:
            into_nothing(options.get("file") or sys.stdout)


def into_nothing(stream: TextIO) -> None:
    """Let a stream whose reader has gone lead nowhere; else its rest fails again when the process ends."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


def get_base_dir(create: bool = True) -> Path:
    """$NANOCHAT_BASE_DIR, or ~/.cache/nanochat. Created if absent, unless told not to."""
    base_dir = Path(os.path.expanduser(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat")).absolute()
    if create:
        base_dir.mkdir(parents=True, exist_ok=True)
    return base_dir
