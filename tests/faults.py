"""Stages in forked processes, on any number of ranks, that are killed, signalled and lied to at chosen points.

    code, output = faults.run("base", {"num_iterations": 6}, kill_at=("loop", 40))
    code, output = faults.run("base", {"num_iterations": 6}, ranks=3)

A server process, one for all tests, imports torch and the scripts once, which takes 4 s, and forks for every rank:
0.3 s and its steps.
Points are lines of Python: `loop` counts those of the script's main() and of run.py, `save` those of everything below
save_checkpoint(). The server itself never computes, so that a fork of it is as good as a new process.
"""

import importlib
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from nanochat.common import STAGES
from nanochat.gpt import GPTConfig
from tests import tiny

SCRIPTS = {name: stage.script.removeprefix("scripts.") for name, stage in STAGES.items()}
SCRIPTS |= {name: name for name in ("base_loss", "base_eval", "chat_eval")}
FOLDERS = {name: stage.folder for name, stage in STAGES.items()}
COMMON: dict[str, Any] = {"device_type": "cpu", "dtype": "float32", "eval_every": -1}
CHAT = {
    **COMMON,
    "source": "base",
    "source_tag": "t",
    "compile": False,
    "device_batch_size": 2,
    "total_batch_size": 1024,
}
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
        **{
            "source": "base",
            "source_tag": "t",
            "task": "Arithmetic",
            "examples_per_step": 3,
            "num_samples": 4,
            "max_new_tokens": 6,
        },
        **{"eval_examples": 2, "eval_samples": 2, "max_dead_steps": 100},
    },
    **{name: {"device_type": "cpu", "dtype": "float32"} for name in ("base_loss", "base_eval", "chat_eval")},
}
LIMIT = 300  # seconds of a run
STEPS = 20  # of runs that are compared with each other
# What `save` stands for: the functions whose lines are points, by file. Everything that runs below them counts too.
SAVING = {"checkpoint_manager.py", "files.py", "tokenizer.py", "shutil.py", "tempfile.py"}


def fork_server() -> subprocess.Popen[str]:
    """As a context it closes its pipes, at which it ends, and waits for that."""
    words, pipe = [sys.executable, "-m", "tests.faults"], subprocess.PIPE
    return subprocess.Popen(words, env=tiny.environment(Path()), cwd=tiny.ROOT, stdin=pipe, stdout=pipe, text=True)


@dataclass(frozen=True)
class Faults:
    """Runs in a base directory, from the test's side."""

    base_dir: Path
    server: subprocess.Popen[str]

    def start(self, stage: str, settings: dict[str, Any], ranks: int = 1, **fault: Any) -> list[int]:
        """Begin a run; the process numbers of its ranks."""
        assert self.server.stdin and self.server.stdout
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {"stage": stage, "settings": {**SETTINGS[stage], **settings}, "fault": fault}
        job |= {"ranks": ranks, "port": port, "base_dir": str(self.base_dir)}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        pids: list[int] = json.loads(self.server.stdout.readline())
        return pids

    def finish(self) -> tuple[list[int], str]:
        """Wait for the run; the exit code of each rank (negative: killed by that signal) and what they printed."""
        assert self.server.stdout
        answer = json.loads(self.server.stdout.readline())
        return answer["codes"], answer["output"]

    def run(self, stage: str, settings: dict[str, Any], ranks: int = 1, **fault: Any) -> tuple[int, str]:
        """A run from beginning to end: the exit code, which all ranks must share, and the output."""
        self.start(stage, settings, ranks, **fault)
        codes, output = self.finish()
        assert len(set(codes)) == 1, (codes, output)
        return codes[0], output

    def train(self, stage: str, settings: dict[str, Any], ranks: int = 1) -> dict[str, list[dict[str, Any]]]:
        """A run to its end, which happens once unless it resumes; {kind: events} of all runs under its tag."""
        tag = settings["model_tag"]
        if settings.get("resume") or not tiny.events(self.base_dir, stage, tag, "end"):
            code, output = self.run(stage, settings, ranks)
            assert code == 0, output
        return {kind: tiny.events(self.base_dir, stage, tag, kind) for kind in ("plan", "step", "eval", "sample")}

    def prepare_chats(self, **settings: Any) -> None:
        """What the chat stages start from: a base model `t` of 256 tokens' context, and chats.jsonl: 300 conversations
        with tools, and with uneven numbers of supervised tokens.
        """
        shape = {"max_seq_len": 256, "total_batch_size": 1024, "num_iterations": 8, "model_tag": "t"}
        code, output = self.run("base", {**shape, **settings})
        assert code == 0, output
        chats = []
        for i in range(300):
            word = tiny.WORDS[i % len(tiny.WORDS)]
            answer = [{"type": "text", "text": word}, {"type": "python", "text": f"{i}+1"}]
            answer += [{"type": "python_output", "text": f"{i + 1}"}, {"type": "text", "text": f"\n#### {i + 1}"}]
            question = {"role": "user", "content": f"Say {word} and add 1 to {i}" + "." * (i % 50)}
            chats.append([question, {"role": "assistant", "content": answer}])
        (self.base_dir / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))


def find_config(faults: Faults, stage: str, tag: str) -> GPTConfig:
    """The model's shape, as its newest checkpoint has it."""
    meta = max((faults.base_dir / FOLDERS[stage] / tag).glob("step_*/meta.json"))
    return GPTConfig(**json.loads(meta.read_text())["model_config"])


def optimizer_bytes(config: GPTConfig, ranks: int) -> int:
    """fp32 state of one rank. AdamW: two moments, by rows. Muon: a momentum, and a number per row or column, of those
    matrices of one shape that it was dealt.
    """
    C, G = config.n_embd, config.n_kv_head * config.head_dim
    shapes = Counter(config.n_layer * [(C, C), (G, C), (G, C), (C, C), (4 * C, C), (C, 4 * C)])
    muon = sum(math.ceil(n / ranks) * (rows * columns + max(rows, columns)) for (rows, columns), n in shapes.items())
    return 4 * muon + 2 * 8 * math.ceil(config.vocab_size / ranks) * C


def check_losses(one: list[dict[str, Any]], many: list[dict[str, Any]]) -> None:
    """The steps of two records are those of one run of STEPS."""
    by_step = {event["step"]: event for event in many}  # as trained last
    assert len(one) == len(by_step) == STEPS
    for a in one:
        b = by_step[a["step"]]
        assert a["tokens"] == b["tokens"] > 0 and b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


# -----------------------------------------------------------------------------
# The server's side


def serve() -> None:
    for name in SCRIPTS.values():
        importlib.import_module(f"scripts.{name}")
    for name in ("torch._dynamo", "torch.distributed.fsdp"):  # which optimizers and --shard import, in seconds
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        os.environ["NANOCHAT_BASE_DIR"] = job["base_dir"]
        log = Path(job["base_dir"]) / "faults.log"
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
    signal.alarm(LIMIT)  # ends a rank that hangs
    try:
        output = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for stream in (sys.stdout, sys.stderr):  # whole lines, also with PYTHONUNBUFFERED: ranks share the file
            stream.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]
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


def on_points(act: Callable[[str, int], None]) -> None:
    """Call act(place, number) before each line that is a point; numbers count from 1."""
    seen = {"loop": 0, "save": 0}

    def watch(place: str) -> Callable[[FrameType, str, object], Any]:
        def on_line(frame: FrameType, event: str, argument: object) -> Any:
            if event == "line":
                seen[place] += 1
                act(place, seen[place])
            return on_line

        return on_line

    def on_call(frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if in_loop_of(code):
            return in_loop
        return in_save if below_save(frame) else None

    in_loop, in_save = watch("loop"), watch("save")
    sys.settrace(on_call)


def at_point(place: str, number: int, act: Callable[[], None]) -> None:
    on_points(lambda *point: act() if point == (place, number) else None)


AT_END: list[Callable[[], None]] = []


def in_loop_of(code: CodeType) -> bool:
    file = Path(code.co_filename)
    return (code.co_name == "main" and file.parent.name == "scripts") or file.parts[-2:] == ("nanochat", "run.py")


def below_save(frame: FrameType | None) -> bool:
    if frame is None or os.path.basename(frame.f_code.co_filename) not in SAVING:
        return False
    while frame is not None:
        if frame.f_code.co_name == "save_checkpoint":
            return True
        frame = frame.f_back
    return False


def kill_at(point: tuple[str, int]) -> None:
    at_point(*point, lambda: os.kill(os.getpid(), signal.SIGKILL))


def signal_at(point: tuple[str, int, int]) -> None:
    """A signal at a point: (place, number, signal)."""
    at_point(point[0], point[1], lambda: os.kill(os.getpid(), point[2]))


def count(_: bool) -> None:
    """Nothing goes wrong, but in the end the number of points is printed."""
    last = {}
    on_points(lambda place, number: last.update({place: number}))
    AT_END.append(lambda: print(f"points: {json.dumps(last)}"))


def limit_file_size(size: int) -> None:
    """No file grows beyond `size` bytes: what a full disk looks like to a writer."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def at_step(number: int, instead: Callable[..., Any]) -> None:
    """In the given step (from 1) of this process, call instead(accumulate, model, stream, ...)."""
    from nanochat.train import accumulate

    calls = []

    def counted(*values: Any) -> Any:
        calls.append(1)
        return instead(accumulate, *values) if len(calls) == number else accumulate(*values)

    for name in ("base_train", "mid_train", "chat_sft"):
        sys.modules[f"scripts.{name}"].accumulate = counted  # type: ignore[attr-defined]


def spoil(where: tuple[str, int]) -> None:
    """NaN in the loss, a gradient or a parameter, at the given step."""
    import torch

    from nanochat.sharding import local

    kind, step = where

    def spoiled(accumulate: Any, model: Any, *values: Any) -> Any:
        if kind == "parameter":
            with torch.no_grad():
                local(model.lm_head.weight)[1, 1] = torch.nan
        sums = accumulate(model, *values)
        if kind == "loss":
            sums.totals[0] = torch.nan
        if kind == "gradient":
            local(model.lm_head.weight.grad)[2, 3] = torch.inf
        return sums

    at_step(step, spoiled)


def lose_text(where: tuple[int, int]) -> None:
    """What a damaged shard file does to its rank: no batch for the given micro-batch of a step (both from 1)."""
    from nanochat.common import UserError

    step, micro_batch = where

    def starved(accumulate: Any, model: Any, stream: Any, *values: Any) -> Any:
        def few() -> Any:
            for _ in range(micro_batch - 1):
                yield next(stream)
            raise UserError("shard_00003.parquet is damaged")

        return accumulate(model, few(), *values)

    at_step(step, starved)


def run_out_of_memory(step: int) -> None:
    """What a GPU says that is too small, during the given step."""
    import torch

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    at_step(step, full)


def interrupt_validation(batch: int) -> None:
    """A second Ctrl-C before the given batch of validation."""
    from nanochat import loss_eval

    window_rows, calls = loss_eval.window_rows, []

    def counted(*values: Any) -> Any:
        calls.append(1)
        if len(calls) == batch:
            raise KeyboardInterrupt
        return window_rows(*values)

    loss_eval.window_rows = counted


def leave_after(step: int) -> None:
    """SIGTERM during the given step: it is the last one of this process."""

    def told(accumulate: Any, *values: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return accumulate(*values)

    at_step(step, told)


def wait_for_file(where: tuple[int, str]) -> None:
    """In the given step, until a file is there."""
    step, path = where

    def patient(accumulate: Any, *values: Any) -> Any:
        while not Path(path).exists():
            time.sleep(0.01)
        return accumulate(*values)

    at_step(step, patient)


TROUBLES = (kill_at, signal_at, count, limit_file_size, spoil, lose_text, run_out_of_memory, interrupt_validation)
FAULTS: dict[str, Callable[[Any], None]] = {act.__name__: act for act in (*TROUBLES, leave_after, wait_for_file)}

if __name__ == "__main__":
    serve()
