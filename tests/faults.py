"""
Training stages in processes that are killed, signalled and lied to at chosen points.

    with Faults(base_dir) as faults:
        status, output = faults.run("base", {"num_iterations": 6}, kill_at=("loop", 40))

A server process imports torch and the scripts once and forks for every run: a run of ten steps takes about a second.
Points are lines of Python: `loop` counts those that main() or fine_tune() executes, `save` those of everything below
save_checkpoint(). The server itself never computes, so that a fork of it is as good as a new process.
"""

import atexit
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from tests import tiny

SCRIPTS = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}
FOLDERS = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
COMMON: dict[str, Any] = {"device_type": "cpu", "dtype": "float32", "eval_every": -1}
CHAT = {**COMMON, "source": "base", "compile": False, "device_batch_size": 2, "total_batch_size": 1024}
SETTINGS: dict[str, dict[str, Any]] = {
    "base": {
        **COMMON,
        **{"depth": 2, "aspect_ratio": 32, "head_dim": 16, "max_seq_len": 32, "compile": False, "eval_tokens": 500},
        **{"device_batch_size": 2, "total_batch_size": 256, "sample_every": -1},
    },
    "mid": CHAT,
    "sft": CHAT,
    "rl": {
        **COMMON,
        **{"source": "base", "task": "Arithmetic", "examples_per_step": 3, "num_samples": 4, "max_new_tokens": 12},
        **{"eval_examples": 2, "eval_samples": 2, "max_dead_steps": 100},
    },
}
# What `save` stands for: the functions whose lines are points, by file. Everything that runs below them counts too.
SAVING = {"checkpoint_manager.py", "tensors.py", "common.py", "tokenizer.py", "shutil.py", "tempfile.py"}


class Faults:
    """The server, from the test's side."""

    def __init__(self, base_dir: Path):
        self.base_dir = base_dir

    def __enter__(self) -> Self:
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults"],
            env=tiny.environment(self.base_dir),
            cwd=tiny.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.server:  # closes its pipes and waits
            pass

    def start(self, stage: str, settings: dict[str, Any], ranks: int = 1, **fault: Any) -> list[int]:
        """Begin a run; the process numbers of its ranks."""
        assert self.server.stdin and self.server.stdout
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {
            "stage": stage,
            "settings": {**SETTINGS[stage], **settings},
            "fault": fault,
            "ranks": ranks,
            "port": port,
        }
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        pids: list[int] = json.loads(self.server.stdout.readline())
        return pids

    def finish(self) -> tuple[list[int], str]:
        """Wait for the run; the exit code of each rank (negative: killed by that signal) and what they printed."""
        assert self.server.stdout
        answer = json.loads(self.server.stdout.readline())
        return answer["codes"], answer["output"]

    def run(self, stage: str, settings: dict[str, Any], **fault: Any) -> tuple[int, str]:
        """A run on one rank from beginning to end: exit code and output."""
        self.start(stage, settings, **fault)
        (code,), output = self.finish()
        return code, output


# -----------------------------------------------------------------------------
# The server's side


def serve() -> None:
    for name in SCRIPTS.values():
        importlib.import_module(f"scripts.{name}")
    importlib.import_module("torch._dynamo")  # which the first optimizer imports
    for line in sys.stdin:
        job = json.loads(line)
        log = Path(os.environ["NANOCHAT_BASE_DIR"]) / "faults.log"
        log.write_text("")
        pids = [fork(job, rank, log) for rank in range(job["ranks"])]
        print(json.dumps(pids), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps({"codes": codes, "output": log.read_text(errors="replace")}), flush=True)


def fork(job: dict[str, Any], rank: int, log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        run(job, rank)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for act in AT_END:
            act()
        atexit._run_exitfuncs()  # os._exit runs none, and peers.py says good-bye in one
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: dict[str, Any], rank: int) -> None:
    """A stage's main() with settings by name, as run_main would run it, with something that goes wrong."""
    from nanochat.common import run_main

    if job["ranks"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(job["ranks"])}
        os.environ |= {"WORLD_SIZE": str(job["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    script = importlib.import_module(f"scripts.{SCRIPTS[job['stage']]}")
    everything = {**script.settings, **job["settings"]}
    assert everything.keys() == script.settings.keys(), everything.keys() ^ script.settings.keys()
    for name, value in everything.items():
        setattr(script, name, value)
    script.settings = everything
    if job["stage"] == "rl":
        from tasks.arithmetic import Arithmetic
        from tests.rewarded_rl import even_length

        Arithmetic.evaluate = even_length  # type: ignore[method-assign]
    fault = dict(job["fault"])
    if fault.pop("rank", rank) == rank:
        for kind, value in fault.items():
            FAULTS[kind](value)
    run_main(script.main)


# -----------------------------------------------------------------------------
# What goes wrong


def at_point(place: str, number: int, act: Callable[[], None]) -> None:
    """Act when the number-th line of a place is about to run; with number -1 never, but count, and print the count."""
    seen = 0

    def on_line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == number:
                act()
        return on_line

    def on_call(frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if place == "loop":
            return on_line if code.co_name in ("main", "fine_tune") and in_project(code.co_filename) else None
        return on_line if below_save(frame) else None

    sys.settrace(on_call)
    if number == -1:
        AT_END.append(lambda: print(f"{place} has {seen} points"))


AT_END: list[Callable[[], None]] = []


def in_project(file: str) -> bool:
    return Path(file).parent.name in ("scripts", "nanochat")


def below_save(frame: FrameType | None) -> bool:
    if frame is None or os.path.basename(frame.f_code.co_filename) not in SAVING:
        return False
    while frame is not None:
        if frame.f_code.co_name == "save_checkpoint":
            return True
        frame = frame.f_back
    return False


def kill(point: tuple[str, int]) -> None:
    at_point(*point, lambda: os.kill(os.getpid(), signal.SIGKILL))


def send(point: tuple[str, int, int]) -> None:
    """A signal at a point: (place, number, signal)."""
    at_point(point[0], point[1], lambda: os.kill(os.getpid(), point[2]))


def count(place: str) -> None:
    at_point(place, -1, lambda: None)


def limit_file_size(size: int) -> None:
    """No file grows beyond `size` bytes: what a full disk looks like to a writer."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def spoil(where: tuple[str, int]) -> None:
    """NaN in the loss, a gradient or a parameter, at the given step (from 1) of this process."""
    import torch

    from nanochat import train

    kind, step = where
    accumulate, calls = train.accumulate, []

    def spoiled(model: Any, *values: Any) -> Any:
        calls.append(1)
        if len(calls) == step and kind == "parameter":
            with torch.no_grad():
                model.lm_head.weight[1, 1] = torch.nan
        sums = accumulate(model, *values)
        if len(calls) == step and kind == "loss":
            sums.totals[0] = torch.nan
        if len(calls) == step and kind == "gradient":
            model.lm_head.weight.grad[2, 3] = torch.inf
        return sums

    train.accumulate = spoiled


def sleep(seconds: float) -> None:
    time.sleep(seconds)


FAULTS: dict[str, Callable[[Any], None]] = {
    "kill_at": kill,
    "signal_at": send,
    "count": count,
    "limit_file_size": limit_file_size,
    "spoil": spoil,
    "sleep": sleep,
}

if __name__ == "__main__":
    serve()
