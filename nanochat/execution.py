"""Run Python programs that a model wrote, in a jail, and judge them by tests that they cannot see.

Covered, on Linux (x86_64, aarch64) with Landlock and seccomp: a program gets the standard library, an empty stdin, none
of the caller's environment, and limits on time, memory and output. It reads no other file and writes none, reaches no
network and no other process, and starts none, nor a thread. For root it runs as nobody and without capabilities. It is
killed at the end, and at most MAX_OUTPUT bytes of each stream are kept.
`check_program` runs the tests in a second jail, which hands it arguments and gets values back as text: nothing that a
program does to itself (patched builtins, objects that equal everything, sys.exit) reaches the verdict. Works in any
thread.

Without seccomp it refuses, unless told `unsafe`. Without Landlock (Linux before 5.13, some containers) a program reads
what this user may read, such as the tests if they lie on the disk.

Not covered: errors in the kernel and in the interpreter; timing and other side channels; names, sizes and times of
files outside (stat). `execute_code` has no tests: a program that looks for the pipe it reports on can say that it
reached its end. Who runs programs of strangers adds a virtual machine. docs/explanation/sandbox.md says why it is so.
"""

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import IO

from nanochat import jail_stub
from nanochat.common import UserError

MAX_OUTPUT = 1 << 20  # bytes of stdout, and of stderr; a program that writes more is ended
START_SECONDS = 30  # for a jail to be ready, about 15 ms on an idle machine; the program's time begins then


@dataclass(frozen=True)
class ExecutionResult:
    """What became of a program. `success`: it ran to its end, or passed its tests, within the limits."""

    success: bool
    stdout: str
    stderr: str  # with tests: the program's, then what the tests say
    timed_out: bool
    output_exceeded: bool


@dataclass(frozen=True)
class Jail:
    """A running program, its streams (stdout, stderr, the stub's report), and what was read from each."""

    process: subprocess.Popen[bytes]
    streams: tuple[IO[bytes], ...]
    outputs: tuple[bytearray, ...] = field(default_factory=lambda: tuple(bytearray() for _ in range(3)))

    def exceeds(self) -> bool:
        return max(map(len, self.outputs)) > MAX_OUTPUT

    def report(self) -> list[bytes]:
        return bytes(self.outputs[2]).split(b"\n")[:-1]  # whole lines


def execute_code(
    code: str, timeout: float = 5.0, memory_bytes: int = 512 << 20, unsafe: bool = False
) -> ExecutionResult:
    """Run `code` for at most `timeout` seconds of wall clock and with at most `memory_bytes` of address space.
    UserError where the machine gives too little to lock it in and `unsafe` does not say that this is all right.
    """
    with ExitStack() as stack:
        return follow([start(stack, code, "program.py", resource_limits(timeout, memory_bytes), unsafe, {})], timeout)


def check_program(
    program: str,
    tests: str,
    entry_point: str,
    timeout: float = 5.0,
    memory_bytes: int = 512 << 20,
    unsafe: bool = False,
) -> ExecutionResult:
    """Whether `tests` (trusted) reach their end, where the function `entry_point` is the one that `program` (not
    trusted) defines. Arguments and values are copied: numbers, strings, bytes, bools, None and lists, tuples, sets and
    dicts of them. A value of another type, such as a generator or a Fraction, is a TypeError, a change to an argument
    is not seen by the tests, and of an exception they see the type, if it is a built-in one. Integers: 4,300 digits at
    most.
    """
    with ExitStack() as stack:
        with ExitStack() as ends:  # closed here once both have theirs: each sees when the other is gone
            (call_reader, call_writer), (answer_reader, answer_writer) = open_pipe(ends), open_pipe(ends)
            limits = resource_limits(timeout, memory_bytes)
            asking = {"call": (entry_point, call_writer, answer_reader)}
            answering = {"serve": (entry_point, call_reader, answer_writer)}
            checker = start(stack, tests, "tests.py", limits, unsafe, asking)
            runner = start(stack, program, "program.py", limits, unsafe, answering)
        return follow([checker, runner], timeout)


def active_layers(unsafe: bool = False) -> list[str]:
    """What keeps programs in on this machine, in words. UserError where that is too little."""
    with ExitStack() as stack:
        jail = start(stack, "", "program.py", resource_limits(5.0, 512 << 20), unsafe, {})
        follow([jail], 5.0)
        layers: list[str] = json.loads(jail.report()[0])[0]
        return layers


def start(
    stack: ExitStack, code: str, name: str, limits: dict[str, int], unsafe: bool, link: dict[str, tuple[str, int, int]]
) -> Jail:
    """A jail in which `code` runs; it ends with the stack. `link`: see jail_stub."""
    report, report_writer = os.pipe()
    report_stream = stack.enter_context(os.fdopen(report, "rb", 0))
    environment = {"HOME": "/", "PYTHONHASHSEED": "0"}
    if library_path := os.environ.get("LD_LIBRARY_PATH"):  # some installations of Python do not start without
        environment["LD_LIBRARY_PATH"] = library_path
    with os.fdopen(report_writer, "wb", 0):
        process = subprocess.Popen(
            # what -I does, but with the environment above: with hashes that are the same in every run, so are verdicts;
            # -u: what a program wrote before it is killed is not lost
            [sys.executable, "-s", "-P", "-S", "-B", "-u", "-X", "utf8", jail_stub.__file__],
            cwd="/",
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[report_writer, *(fd for _, *pair in link.values() for fd in pair)],
            start_new_session=True,
        )
    stack.callback(end, process)
    assert process.stdin and process.stdout and process.stderr
    job = {"code": code, "name": name, "limits": limits, "unsafe": unsafe, "report": report_writer, **link}
    with suppress(BrokenPipeError), process.stdin:
        process.stdin.write(json.dumps(job).encode())
    return Jail(process, (process.stdout, process.stderr, report_stream))


def open_pipe(stack: ExitStack) -> tuple[int, int]:
    """(reading end, writing end) of a pipe, closed with the stack."""
    ends = os.pipe()
    for fd in ends:
        stack.callback(os.close, fd)
    return ends


def resource_limits(timeout: float, memory_bytes: int) -> dict[str, int]:
    """By their names in the module `resource`. No processes and no threads: 0 more of them than the user has."""
    return {
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_CPU": math.ceil(timeout) + 1,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
    }


def follow(jails: Sequence[Jail], timeout: float) -> ExecutionResult:
    """Read what the programs write until the first of them, the judge, has ended, one has written too much, or time is
    up: `timeout` seconds from when all jails are ready. RuntimeError where one does not get ready.
    """
    judge, runner = jails[0], jails[-1]
    ready = exceeded = False
    deadline = time.monotonic() + START_SECONDS
    with selectors.DefaultSelector() as selector:
        for jail in jails:
            for stream, output in zip(jail.streams, jail.outputs, strict=True):
                selector.register(stream, selectors.EVENT_READ, output)
        while not exceeded and (remaining := deadline - time.monotonic()) > 0:
            ended = judge.streams[2] not in selector.get_map()  # all that it wrote is in the pipes by then
            if not read_some(selector, 0 if ended else remaining) and ended:
                break
            exceeded = any(jail.exceeds() for jail in jails)
            if not ready and (reports := [jail.report()[0] for jail in jails if jail.report()]):
                require_locked_in(reports)  # a judge that refuses ends, perhaps before the other has started
                if ready := len(reports) == len(jails):
                    deadline = time.monotonic() + timeout
    if not ready and not exceeded:
        raise RuntimeError(f"the jail for programs did not start: {runner.outputs[1].decode('utf-8', 'replace')}")
    with suppress(subprocess.TimeoutExpired):
        judge.process.wait(0 if exceeded else max(0, deadline - time.monotonic()))
    stderr = b"".join(jail.outputs[1][:MAX_OUTPUT] for jail in reversed(jails))
    return ExecutionResult(
        success=judge.report()[1:] == [b"passed"] and judge.process.returncode == 0 and not exceeded,
        stdout=runner.outputs[0][:MAX_OUTPUT].decode("utf-8", "replace"),
        stderr=stderr.decode("utf-8", "replace"),
        timed_out=judge.process.returncode is None and not exceeded,
        output_exceeded=exceeded,
    )


def read_some(selector: selectors.BaseSelector, seconds: float) -> bool:
    """Add to each output what its stream has, after at most `seconds`; whether any had something, or its end."""
    ready = selector.select(seconds)
    for key, _ in ready:
        data = os.read(key.fd, 1 << 16)
        key.data.extend(data)
        if not data:
            selector.unregister(key.fileobj)
    return bool(ready)


def require_locked_in(reports: Sequence[bytes]) -> None:
    """UserError where a stub refused to run its program."""
    for report in reports:
        if missing := json.loads(report)[1]:
            what = f"this machine cannot lock in the programs that a model writes ({missing})"
            raise UserError(f"{what}; --unsafe-exec runs them with all the rights of this user")


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a program and whatever is left of its group."""
    with process, suppress(ProcessLookupError, PermissionError):  # macOS refuses where only a zombie is left
        process.kill()
        os.killpg(process.pid, signal.SIGKILL)
