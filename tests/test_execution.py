"""Programs that a model wrote: right ones pass, everything else fails soon and leaves nothing behind."""

import gzip
import json
import os
import re
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nanochat import jail_stub
from nanochat.common import UserError
from nanochat.execution import MAX_OUTPUT, ExecutionResult, Jail, check_program, end, execute_code, follow
from tasks.humaneval import answer_program, checker_program
from tests import hostile

LIMIT = 0.6  # seconds for the programs that use all they get


def test_a_program_that_reaches_its_end_succeeds():
    result = execute_code("import sys\nassert 1 + 1 == 2\nprint('out')\nprint('err', file=sys.stderr)")
    assert (result.success, result.stdout, result.stderr) == (True, "out\n", "err\n")
    assert not result.timed_out and not result.output_exceeded


HONEST = {
    "is main": "assert __name__ == '__main__'",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nassert A(1).x == 1",
    "silenced stdout": "import io, sys\nsys.stdout = io.StringIO()\nprint('x')",
    "closed stdout": "import os\nos.close(1)\nos.close(2)",
    "unicode": "assert len('é€😀') == 3\nprint('é€😀')",
    "future": "from __future__ import annotations\n",
    "empty": "",
}


@pytest.mark.parametrize("code", HONEST.values(), ids=HONEST)
def test_honest_programs_pass(code):
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
    "a file": "open('x', 'w')",
    "many open files": "import os\nfiles = [open(os.__file__) for i in range(1000)]",
    "recursion": "def f(): f()\nf()",
    "prints a guess": "print('success')\nimport os\nos._exit(0)",
    "NUL byte": "a\0b",
    "half a character": "'\ud800'",
}


@pytest.mark.parametrize("code", FAILING.values(), ids=FAILING)
def test_programs_that_do_not_reach_their_end_fail(code):
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
def test_time_runs_out(code):
    result = execute_code(code, timeout=LIMIT)
    assert (result.success, result.timed_out) == (False, True)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output_ends_the_program_and_is_not_kept(stream):
    result = execute_code(f"import sys\nwhile True: sys.{stream}.write('x' * 10000)")
    assert (result.success, result.timed_out, result.output_exceeded) == (False, False, True)
    assert len(getattr(result, stream)) == MAX_OUTPUT


def test_memory_is_limited():
    result = execute_code("x = bytearray(300 << 20)", memory_bytes=200 << 20)
    assert "MemoryError" in result.stderr
    assert execute_code("x = bytearray(1 << 20)", memory_bytes=200 << 20).success


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os; os.fork()", "PermissionError"),
        ("import os; os.posix_spawn('/bin/true', ['true'], {})", "PermissionError"),
        ("import os; os.execv('/bin/true', ['true'])", "PermissionError"),
        ("import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()", "can't start new thread"),
    ],
)
def test_no_process_and_no_thread_is_started(code, says):
    result = execute_code(code)
    assert not result.success and says in result.stderr


def test_nothing_of_the_callers_environment_is_seen(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "x")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    result = execute_code("import os, sys\nprint(sorted(os.environ))\nprint(os.getcwd(), sys.argv, '' in sys.path)")
    assert result.stdout.splitlines() == ["['HOME', 'LC_CTYPE', 'PYTHONHASHSEED']", "/ ['program.py'] False"]


def test_no_pipe_is_left_open():
    count = len(os.listdir("/dev/fd"))
    for code in ("pass", "1 / 0", "while True: print('x' * 10000)"):
        execute_code(code)
    assert len(os.listdir("/dev/fd")) == count


def test_works_in_threads():
    before = threading.active_count()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: execute_code(f"print({i})\nassert {i} % 2 == 0"), range(12)))
    assert [result.success for result in results] == [i % 2 == 0 for i in range(12)]
    assert [result.stdout for result in results] == [f"{i}\n" for i in range(12)]
    assert threading.active_count() == before


# -----------------------------------------------------------------------------
# The verdict


def passes(program: str, tests: str) -> bool:
    return check_program(program, tests, "f").success


def test_the_tests_decide():
    right, wrong = "def f(x): return x + 1", "def f(x): return x"
    assert passes(right, "assert f(1) == 2") and not passes(wrong, "assert f(1) == 2")
    result = check_program(wrong, "assert f(1) == 2, 'not two'", "f")
    assert "not two" in result.stderr and not result.timed_out
    assert check_program("print('out')\n" + right, "f(1)", "f").stdout == "out\n"


VALUES = """None, True, 0, -1, 10**100, 1.5, 1e-300, 1e300 * 1e10, 1j, 'é', '\\ud800', b'\\0\\xff', [], (), {}, set(),
    [1, (2, {3: [4]})], {(1, 2): {3}, None: frozenset([4])}, ((),), [[[]]], 'a' * 1000"""


def test_values_arrive_as_they_were():
    tests = f"for value in ({VALUES}):\n    other = f(value, key=value)[1]\n    assert other == value, value\n"
    tests += "    assert type(other) is type(value)\nassert str(f(float('nan'))[0]) == 'nan'"
    result = check_program("def f(*args, key=None): return [args[0], key]", tests, "f")
    assert result.success, result.stderr


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("__import__('collections').Counter('aab')", "{'a': 2, 'b': 1}"),
        ("__import__('collections').namedtuple('P', 'x y')(1, 2)", "(1, 2)"),
        ("__import__('enum').IntEnum('E', 'a').a", "1"),
    ],
)
def test_subclasses_arrive_as_what_they_are_made_of(returned, expected):
    assert passes(f"def f(): return {returned}", f"assert f() == {expected} and type(f()) is type({expected})")


def test_exceptions_arrive_by_name():
    tests = "try: f('x')\nexcept ValueError as error: assert 'invalid literal' in str(error)\nelse: assert False"
    assert passes("def f(x): return int(x)", tests)
    tests = "try: f(0)\nexcept RuntimeError: pass\nelse: assert False"
    assert passes("class Mine(Exception): pass\ndef f(x): raise Mine", tests)


def test_a_raised_stop_iteration_is_no_end_of_a_loop():
    """It would end the test's map() early, and all() of nothing is true."""
    tests = "assert all(map(f, [1, 2]))"
    assert passes("def f(x): return True", tests)
    assert not passes("def f(x): raise StopIteration", tests)


def test_tests_cannot_catch_the_end_of_the_program():
    tests = "try: f(1)\nexcept BaseException: pass"
    assert passes("def f(x): 1 / 0", tests)
    for program in ("import os\ndef f(x): os._exit(0)", "def f(x): raise SystemExit", "g = 1", "def f(x"):
        assert not passes(program, tests)


# -----------------------------------------------------------------------------
# The jail: what this machine gives, and what is left where it gives less

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp are Linux's")


@LINUX
@pytest.mark.skipif(not Path("/usr/include/asm-generic/unistd.h").exists(), reason="no kernel headers")
@pytest.mark.parametrize(
    ("column", "header"),
    [(0, "x86_64-linux-gnu/asm/unistd_64.h"), (1, "asm-generic/unistd.h")],
    ids=["x86_64", "aarch64"],
)
def test_call_numbers_are_the_headers(column, header):
    path = Path("/usr/include", header)
    if not path.exists():
        pytest.skip(f"no {path}")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text()))
    for entry in (*jail_stub.REFUSED.split(","), *(entry for entry, *_ in jail_stub.REFUSED_ARGUMENTS)):
        name, word = entry.split()[0], entry.split()[1 + column]
        assert word == numbers.get(name, "-"), name


def in_other_process(code: str, *before: str, python: str = sys.executable) -> str:
    """What the code prints in a process of its own, started by `before`."""
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "PATH": os.environ["PATH"]}
    done = subprocess.run([*before, python, "-c", code], capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


FORBID = """
from nanochat import jail_stub
from nanochat.execution import *
machine = jail_stub.MACHINES[os.uname().machine]
def forbid(*refused):
    assert jail_stub.libc.prctl(jail_stub.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert jail_stub.install(jail_stub.build_filter(machine[0], list(refused), 1 << 29))
"""


@LINUX
def test_without_landlock_nothing_is_written(tmp_path):
    code = f"""{FORBID}
forbid((444, None))
print(active_layers())
print(execute_code("assert sum([1]) == 1; import decimal, json").success)
for line in ("open('a', 'w')", "open('{tmp_path}/a', 'a')", "import os; os.unlink('{tmp_path}/canary')"):
    print(execute_code(line).stderr.count("PermissionError"))
"""
    (tmp_path / "canary").touch()
    layers, *rest = in_other_process(code).splitlines()
    assert "seccomp" in layers and "Landlock" not in layers
    assert rest == ["True", "1", "1", "1"]
    assert os.listdir(tmp_path) == ["canary"]


@LINUX
def test_without_seccomp_it_refuses():
    code = f"""{FORBID}
column = machine[1]
forbid(((157, 167)[column], [0, 0xFFFFFFFF, "==", jail_stub.PR_SET_SECCOMP]))  # prctl
for call in ("active_layers()", "execute_code('1')", "check_program('def f(): 1', 'f()', 'f')"):
    try: eval(call)
    except UserError as error: print(error)
print(active_layers(unsafe=True))
print(execute_code("print('ran')", unsafe=True).stdout)
"""
    *refusals, layers, ran = in_other_process(code).splitlines()
    why = "this machine cannot lock in the programs that a model writes (the kernel refuses a seccomp filter"
    assert [line.startswith(why) and "--unsafe-exec" in line for line in refusals] == [True] * 3
    assert "seccomp" not in layers and ran == "ran"


def test_judge_that_refuses_before_the_runner_has_started_is_a_user_error():
    """On a busy machine this was "the jail for programs did not start"."""
    with ExitStack() as stack:
        jails = []
        for program in ("import os; os.write({}, b'[[], \"no seccomp\"]\\n')", "import time; time.sleep(60)"):
            reader, writer = os.pipe()
            process = subprocess.Popen(
                [sys.executable, "-c", program.format(writer)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[writer],
                start_new_session=True,
            )
            stack.callback(end, process)
            os.close(writer)
            report = stack.enter_context(os.fdopen(reader, "rb", 0))
            jails.append(Jail(process, (process.stdout, process.stderr, report)))
        with pytest.raises(UserError, match="no seccomp"):
            follow(jails, 5.0)


CHECKS = """
from nanochat.execution import *
print(active_layers())
print(check_program("import decimal, ssl\\ndef f(x): return x", "assert f([1]) == [1]", "f").success)
print(execute_code("print(open('/etc/passwd').read())").stderr.count("PermissionError"))
print(execute_code("import os; os.kill(os.getppid(), 9)").stderr.count("PermissionError"))
"""


@LINUX
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize(
    "before",
    [
        [],
        ["setpriv", "--bounding-set=-all", "--inh-caps=-all"],
        ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups"],
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"],
    ],
    ids=["root", "root without capabilities", "somebody", "nobody"],
)
def test_the_jail_holds_for_root_and_for_others(before):
    """With the system's Python, because ours may lie where only root may go."""
    python = "/usr/bin/python3"
    known = Path(python).exists() and subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"])
    if not known or known.returncode:
        pytest.skip("no Python 3.11 of the system")
    if subprocess.run([*before, "test", "-r", jail_stub.__file__]).returncode:
        pytest.skip("only this user may read the checkout")
    layers, *rest = in_other_process(CHECKS, *before, python=python).splitlines()
    assert rest == ["True", "1", "1"], layers
    assert ("user 65534" in layers) == (not before), layers


@LINUX
def test_root_becomes_nobody_and_its_python_can_still_be_read():
    if os.geteuid() != 0:
        pytest.skip("this is not root")
    code = "import os, decimal, wave, ctypes\nprint(os.getresuid(), os.getgroups())\nassert ctypes.CDLL(None).setuid(0)"
    result = execute_code(code)
    assert (result.success, result.stdout) == (True, "(65534, 65534, 65534) []\n"), result.stderr


# -----------------------------------------------------------------------------
# Hostile programs


class Outside:
    """What a program must not touch: files, listeners, this process. `check` says whether it was left alone."""

    def __init__(self, folder: Path):
        self.folder, self.token = folder, os.urandom(16).hex()
        self.guarded = folder / "guarded"
        (self.guarded / "empty").mkdir(parents=True)
        (self.guarded / "canary").write_text(self.token)
        os.environ["NANOCHAT_HOSTILE"] = self.token
        path = str(self.guarded / "socket")
        self.listeners = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
        self.listeners[1].bind(path)
        self.listeners[1].listen()
        port = self.listeners[0].getsockname()[1]
        self.listeners.append(socket.socket(type=socket.SOCK_DGRAM))
        self.listeners[2].bind(("127.0.0.1", port))
        self.places = {"SECRET": str(self.guarded / "canary"), "FOLDER": str(self.guarded), "PORT": str(port)}
        self.places["PARENT"] = str(os.getpid())
        self.before, self.ours = self.state(), self.children()  # such as the fork server of other tests

    @staticmethod
    def children() -> set[str]:
        return {child for path in Path("/proc/self/task").glob("*/children") for child in path.read_text().split()}

    def source(self, program: str) -> str:
        return re.sub("|".join(self.places), lambda match: self.places[match[0]], program)

    def state(self) -> list[Any]:
        paths = [self.guarded, *sorted(self.guarded.rglob("*"))]
        files = [(str(path), path.stat().st_mode, path.stat().st_uid, path.stat().st_mtime_ns) for path in paths]
        own = [os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0), resource.getrlimit(resource.RLIMIT_NOFILE)]
        return [*files, *own, (self.guarded / "canary").read_text()]

    def check(self, result: ExecutionResult) -> None:
        assert not result.success
        assert self.state() == self.before
        assert not select.select(self.listeners, [], [], 0)[0], "somebody called"
        assert self.children() <= self.ours, "a process survived"
        for forbidden in (self.token, "root:x:0:0", "[project]"):
            assert forbidden not in result.stdout + result.stderr, "it read what it should not"

    def close(self) -> None:
        del os.environ["NANOCHAT_HOSTILE"]
        for listener in self.listeners:
            listener.close()


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    """Orphans become children of this process while it lasts, so that they are seen."""
    place = Outside(tmp_path)
    for path in (tmp_path, *tmp_path.parents):  # nobody may pass, as in /tmp: the jail is to refuse, not the mode
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)
    (place.guarded / "canary").chmod(0o666)
    place.guarded.chmod(0o777)
    place.before = place.state()
    PR_SET_CHILD_SUBREAPER = 36
    assert jail_stub.libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield place
    jail_stub.libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    place.close()


def peak_bytes() -> int:
    """The most memory this process has held since the peak was reset."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]


def attack(outside: Outside, programs: list[tuple[str, str]]) -> None:
    tests = "assert f(3) == 10 and not f(3) != 10\nassert list(map(f, (1, 2))) == [2, 5]"
    assert check_program("def f(x): return x * x + 1", tests, "f").success
    slowest = 0.0
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    for name, program in programs:
        began = time.monotonic()
        result = check_program(outside.source(program), tests, "f", timeout=LIMIT)
        slowest = max(slowest, time.monotonic() - began)
        try:
            outside.check(result)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}; {result}\n{program[:1000]}") from None
    grown = peak_bytes() - before
    print(f"{len(programs)} programs, slowest {slowest:.2f} s of {LIMIT} s, grown by {grown >> 20} MB")
    assert grown < 100 << 20
    assert slowest < LIMIT + 20  # on an idle machine 0.2 s above the limit


@LINUX
def test_harm_would_be_seen(outside):
    """Done here by the test itself."""
    nothing = ExecutionResult(False, "", "", False, False)
    outside.check(nothing)
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        with pytest.raises(AssertionError, match="survived"):
            outside.check(nothing)
        sleeper.kill()
    (outside.guarded / "canary").chmod(0o600)
    with pytest.raises(AssertionError):
        outside.check(nothing)
    (outside.guarded / "canary").chmod(0o666)
    with pytest.raises(AssertionError, match="read"):
        outside.check(ExecutionResult(False, outside.token, "", False, False))
    outside.check(nothing)
    socket.create_connection(outside.listeners[0].getsockname()).close()
    with pytest.raises(AssertionError, match="called"):
        outside.check(nothing)


@LINUX
def test_hostile_programs_do_no_harm_and_are_not_right(outside):
    """About 60, of every family; the soak runs all."""
    programs = hostile.programs()
    attack(outside, [program for i, program in enumerate(programs) if i % 9 == 0 or program[0].endswith("-0")])


@LINUX
@pytest.mark.soak
def test_all_hostile_programs_do_no_harm_and_are_not_right(outside):
    programs = hostile.programs()
    assert len(programs) >= 300 and len(dict(programs)) == len(programs)
    attack(outside, programs)


# -----------------------------------------------------------------------------
# Honest programs


@pytest.mark.parametrize("step", [16, pytest.param(1, marks=pytest.mark.soak)])
def test_humanevals_own_solutions_pass(shared_data, step):
    with gzip.open(shared_data / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    assert len(items) == 164
    for item in items[::step]:
        program = answer_program(item, item["prompt"] + item["canonical_solution"])
        result = check_program(program, checker_program(item), item["entry_point"], timeout=20)
        assert result.success, (item["task_id"], result)
