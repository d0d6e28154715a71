"""Programs that a model wrote: right ones pass, everything else fails soon and leaves nothing behind."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat import execution
from nanochat.execution import MAX_OUTPUT, execute_code

LIMIT = 0.6  # seconds for the programs that use all they get


def test_a_program_that_reaches_its_end_succeeds() -> None:
    result = execute_code("import sys\nassert 1 + 1 == 2\nprint('out')\nprint('err', file=sys.stderr)")
    assert (result.success, result.stdout, result.stderr, result.exit_code) == (True, "out\n", "err\n", 0)
    assert not result.timed_out and not result.output_exceeded


HONEST = {
    "is main": "assert __name__ == '__main__'",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nassert A(1).x == 1",
    "silenced stdout": "import io, sys\nsys.stdout = io.StringIO()\nprint('x')",
    "closed stdout": "import os\nos.close(1)\nos.close(2)",
    "scratch file": "open('a', 'w').write('x')\nassert open('a').read() == 'x'",
    "unicode": "assert len('é€😀') == 3\nprint('é€😀')",
    "future": "from __future__ import annotations\n",
    "empty": "",
}


@pytest.mark.parametrize("code", HONEST.values(), ids=HONEST)
def test_honest_programs_pass(code: str) -> None:
    result = execute_code(code)
    assert result.success, result.stderr


FAILING = {
    "sys.exit(0) before the tests": "import sys\nsys.exit(0)\nassert False",
    "os._exit(0) before the tests": "import os\nos._exit(0)\nassert False",
    "exit in a thread's place": "raise SystemExit",
    "failed test": "assert False",
    "syntax error": "def f(:",
    "unclosed string": "'''",
    "kills itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "reads stdin": "input()",
    "more memory than there is": "x = bytearray(10**11)",
    "large file": "open('x', 'wb').write(bytes(10**8))",
    "many open files": "files = [open('x%d' % i, 'w') for i in range(1000)]",
    "recursion": "def f(): f()\nf()",
    "prints a guess": "print('success')\nimport os\nos._exit(0)",
    "NUL byte": "a\0b",
    "half a character": "'\ud800'",
}


@pytest.mark.parametrize("code", FAILING.values(), ids=FAILING)
def test_programs_that_do_not_reach_their_end_fail(code: str) -> None:
    result = execute_code(code)
    assert not result.success
    assert not result.timed_out


@pytest.mark.parametrize(
    "code",
    [
        "import time\ntime.sleep(60)",
        "while True: pass",
        "import os, time\nos.close(1)\nos.close(2)\ntime.sleep(60)",
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)",
    ],
)
def test_time_runs_out(code: str) -> None:
    result = execute_code(code, timeout=LIMIT)
    assert (result.success, result.timed_out) == (False, True)


def test_work_that_ends_after_its_success_is_still_cut_off() -> None:
    """A thread that never ends keeps the interpreter from ending; where threads are not allowed it fails at once."""
    code = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()"
    assert not execute_code(code, timeout=LIMIT).success


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output_ends_the_program_and_is_not_kept(stream: str) -> None:
    result = execute_code(f"import sys\nwhile True: sys.{stream}.write('x' * 10000)")
    assert (result.success, result.timed_out, result.output_exceeded) == (False, False, True)
    assert len(getattr(result, stream)) == MAX_OUTPUT


def test_memory_is_limited() -> None:
    result = execute_code("x = bytearray(300 << 20)", memory_bytes=200 << 20)
    assert "MemoryError" in result.stderr
    assert execute_code("x = bytearray(1 << 20)", memory_bytes=200 << 20).success


def is_running(pid: int) -> bool:
    """Whether a process exists and is more than an entry that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
@pytest.mark.parametrize("after", ["", "import time\ntime.sleep(60)"])
def test_children_do_not_survive(after: str) -> None:
    """Also those of a program that ended before them. (Where processes are not allowed there are none.)"""
    code = f"import os, time\npid = os.fork()\nif not pid:\n    time.sleep(60)\nprint(pid, flush=True)\n{after}"
    result = execute_code(code, timeout=LIMIT)
    children = [int(word) for word in result.stdout.split()]
    assert children or "BlockingIOError" in result.stderr
    for _ in range(100):
        if not any(map(is_running, children)):
            return
        time.sleep(0.05)
    pytest.fail(f"{children} still run")


@pytest.mark.skipif(os.geteuid() == 0, reason="RLIMIT_NPROC does not hold for root")
def test_processes_are_not_allowed() -> None:
    assert "BlockingIOError" in execute_code("import os\nos.fork()").stderr


def test_nothing_of_the_callers_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "x")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    result = execute_code("import os, sys\nprint(sorted(os.environ))\nprint(os.listdir(), sys.argv, '' in sys.path)")
    names, rest = result.stdout.splitlines()
    assert "SECRET_KEY" not in names and "PYTHONPATH" not in names
    assert rest == "['program.py'] ['program.py'] False"


def test_the_temporary_directory_goes() -> None:
    assert not Path(execute_code("import os\nprint(os.getcwd())").stdout.strip()).exists()


def test_no_pipe_is_left_open() -> None:
    count = len(os.listdir("/dev/fd"))
    for code in ("pass", "1 / 0", "while True: print('x' * 10000)"):
        execute_code(code)
    assert len(os.listdir("/dev/fd")) == count


def test_works_in_threads() -> None:
    before = threading.active_count()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: execute_code(f"print({i})\nassert {i} % 2 == 0"), range(12)))
    assert [result.success for result in results] == [i % 2 == 0 for i in range(12)]
    assert [result.stdout for result in results] == [f"{i}\n" for i in range(12)]
    assert threading.active_count() == before


def test_a_secret_of_another_run_is_worth_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written into the verdict's pipe must be this run's secret."""
    forged = execution.CHILD.replace("os.read(secret, 64)", "bytes(32)")
    assert forged != execution.CHILD
    monkeypatch.setattr(execution, "CHILD", forged)
    assert not execute_code("pass").success
