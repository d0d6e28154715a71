"""
Run a Python program that a model wrote: a fresh interpreter with limits on time, memory and output.

Promises: the caller gets an answer within about `timeout` seconds and holds at most MAX_OUTPUT bytes of each stream;
the program runs in a process, session and empty temporary directory of its own, with an empty stdin and none of the
caller's environment; whatever is left of its process group is killed at the end; ending early, as with sys.exit(0),
is no success. Works in any thread.

Does not, yet: this is no security boundary. The program can read and write the user's files and use the network; a
child that starts a session of its own survives; a program that looks for the pipes it is judged by can declare itself
right. As root nothing stops it from starting processes (RLIMIT_NPROC does not hold for root), and limits that a system
lacks do not apply. Run models that you do not trust in a container or a virtual machine.
"""

import contextlib
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MAX_OUTPUT = 1 << 20  # bytes of stdout, and of stderr; a program that writes more is ended
MAX_FILE_BYTES = 10 << 20
MAX_OPEN_FILES = 64
POLL_SECONDS = 0.05  # how late we see the end of a program whose children keep its pipes open

# What the child runs: it limits itself, runs program.py as __main__, and hands back the secret when that has ended
# normally. A child process without preexec_fn is safe to start from a threaded parent.
CHILD = """
import os, resource, sys

def run():
    secret, verdict = int(sys.argv[1]), int(sys.argv[2])
    for word in sys.argv[3:]:
        name, _, value = word.partition("=")
        kind = getattr(resource, name, None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            limit = int(value) if hard == resource.RLIM_INFINITY else min(int(value), hard)
            try:
                resource.setrlimit(kind, (limit, limit))
            except (OSError, ValueError):  # macOS knows RLIMIT_AS and refuses it
                pass
    with open("program.py", "rb") as file:
        source = file.read()
    sys.argv[:] = ["program.py"]
    main = sys.modules["__main__"] = type(sys)("__main__")
    exec(compile(source, "program.py", "exec"), main.__dict__)
    os.write(verdict, os.read(secret, 64))

run()
"""


@dataclass(frozen=True)
class ExecutionResult:
    """What became of a program. `success`: it ran to its end without an exception, within the limits."""

    success: bool
    stdout: str
    stderr: str
    exit_code: int  # negative: the signal that ended it
    timed_out: bool
    output_exceeded: bool


def execute_code(code: str, timeout: float = 5.0, memory_bytes: int = 512 << 20) -> ExecutionResult:
    """
    Run `code` for at most `timeout` seconds of wall clock and with at most `memory_bytes` of address space. Put the
    tests at its end: success means that the last line was passed. It can start neither processes nor threads, unless
    this is root. Starting costs about 20 ms.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="nanochat-", ignore_cleanup_errors=True))
        Path(folder, "program.py").write_bytes(code.encode("utf-8", "surrogatepass"))
        secret_reader, secret_writer = open_pipe(stack)
        verdict_reader, verdict_writer = open_pipe(stack)
        secret = secrets.token_bytes(32)
        secret_writer.write(secret)
        command = [sys.executable, "-I", "-X", "utf8", "-c", CHILD]
        command += [str(secret_reader.fileno()), str(verdict_writer.fileno()), *limits(timeout, memory_bytes)]
        deadline = time.monotonic() + timeout
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(secret_reader.fileno(), verdict_writer.fileno()),
            start_new_session=True,
        )
        verdict_writer.close()  # the child's is now the only one: when it ends, so does the pipe
        with process:
            outputs, timed_out = follow(process, verdict_reader, deadline)
    stdout, stderr, verdict = outputs
    exceeded = max(map(len, outputs)) > MAX_OUTPUT
    return ExecutionResult(
        success=verdict == secret and process.returncode == 0 and not timed_out and not exceeded,
        stdout=stdout[:MAX_OUTPUT].decode("utf-8", "replace"),
        stderr=stderr[:MAX_OUTPUT].decode("utf-8", "replace"),
        exit_code=process.returncode,
        timed_out=timed_out,
        output_exceeded=exceeded,
    )


def open_pipe(stack: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """(reading end, writing end) of a pipe, unbuffered."""
    reader, writer = os.pipe()
    return stack.enter_context(open(reader, "rb", 0)), stack.enter_context(open(writer, "wb", 0))


def limits(timeout: float, memory_bytes: int) -> list[str]:
    """The child's resource limits. No processes and no threads: 0 more of them than the user has."""
    values = {
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_CPU": math.ceil(timeout) + 1,
        "RLIMIT_FSIZE": MAX_FILE_BYTES,
        "RLIMIT_NOFILE": MAX_OPEN_FILES,
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
    }
    return [f"{name}={value}" for name, value in values.items()]


def environment(folder: str) -> dict[str, str]:
    """All that the program sees of an environment. One thread, because numerical libraries start more on import."""
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def follow(
    process: subprocess.Popen[bytes], verdict: IO[bytes], deadline: float
) -> tuple[tuple[bytearray, bytearray, bytearray], bool]:
    """
    Read what a program writes until it has ended, written too much, or run out of time; then end all of its group.
    Returns ((stdout, stderr, verdict), whether time ran out); one that has more than MAX_OUTPUT bytes ended it.
    """
    assert process.stdout and process.stderr
    outputs = (bytearray(), bytearray(), bytearray())
    timed_out = False
    try:
        with selectors.DefaultSelector() as selector:
            for stream, output in zip((process.stdout, process.stderr, verdict), outputs, strict=True):
                selector.register(stream, selectors.EVENT_READ, output)
            while selector.get_map() and max(map(len, outputs)) <= MAX_OUTPUT:
                ended = process.poll() is not None  # asked first: then all that it wrote is in the pipes already
                remaining = deadline - time.monotonic()
                ready = selector.select(0 if ended else max(0, min(POLL_SECONDS, remaining)))
                if (ended and not ready) or remaining <= 0:
                    break
                for key, _ in ready:
                    data = os.read(key.fd, 1 << 16)
                    key.data.extend(data)
                    if not data:
                        selector.unregister(key.fileobj)
        if max(map(len, outputs)) <= MAX_OUTPUT:
            process.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses where only a zombie is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return outputs, timed_out
