"""Runs of several ranks in which one dies: all others must end soon, with one line in all that says which it was.

Most runs are ranks that only watch each other (tests/rank_faults.py): they start without torch. The last ones compute.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanochat.common import EXIT_RANK_DIED
from tests.faults import Faults
from tests.tiny import ROOT

PROMISE = 30  # seconds
DEATH = re.compile(
    r"rank (\d) of (\d) \(pid (\d+) on (\S+)\) (.+); the others stop\. A training run continues with --resume"
)


@dataclass
class Run:
    """What the ranks, or torchrun, returned and said."""

    codes: list[int]
    out: str
    err: str

    @property
    def deaths(self) -> list[tuple[str, str]]:
        """(rank, how) of each line that names a dead rank."""
        return [(match[1], match[5]) for line in self.err.splitlines() if (match := DEATH.fullmatch(line))]


def launch(folder: Path, name: str, words: list[str], **variables: object) -> subprocess.Popen:
    """Start a process whose output goes into files of the folder."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env |= {key: str(value) for key, value in variables.items()}
    with open(folder / f"out{name}", "wb") as out, open(folder / f"err{name}", "wb") as err:
        return subprocess.Popen(words, env=env, cwd=ROOT, stdout=out, stderr=err)


def start(
    folder: Path, fault: str, ranks: int, at_fault: int = 1, machines: tuple[str, ...] = ()
) -> list[subprocess.Popen]:
    """The ranks, as srun or a person starts them; with `machines`, half of them in each network namespace."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for rank in range(ranks):
        words = ["ip", "netns", "exec", machines[2 * rank // ranks]] if machines else []
        words += [sys.executable, "-m", "tests.rank_faults", fault]
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
        place |= {"MASTER_ADDR": "10.77.0.1" if machines else "127.0.0.1", "MASTER_PORT": port}
        processes.append(launch(folder, str(rank), words, **place, STORE=folder / "store", RANK_AT_FAULT=at_fault))
    return processes


def finish(folder: Path, processes: list[subprocess.Popen], seconds: float = 2 * PROMISE) -> Run:
    """Wait for all; a process that does not end fails the test and is killed."""
    deadline = time.monotonic() + seconds
    try:
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    out, err = ("".join(path.read_text() for path in sorted(folder.glob(f"{kind}*"))) for kind in ("out", "err"))
    return Run(codes, out, err)


def torchrun(folder: Path, fault: str, ranks: int, at_fault: int = 1) -> Run:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return finish(folder, [launch(folder, "", [*words, "-m", "tests.rank_faults", fault], RANK_AT_FAULT=at_fault)])


def wait_until_ready(folder: Path) -> None:
    """Until every rank watches the others."""
    deadline = time.monotonic() + 2 * PROMISE
    while not all("ready" in path.read_text() for path in folder.glob("out*")):
        errors = "".join(path.read_text() for path in folder.glob("err*"))
        assert time.monotonic() < deadline and "Traceback" not in errors, errors
        time.sleep(0.02)


# -----------------------------------------------------------------------------
# Death


@pytest.mark.parametrize("fault", ["kill", "exit", "kill_with_child"])
@pytest.mark.parametrize("ranks, at_fault", [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (6, 0), (6, 4)])
def test_a_rank_that_dies_ends_the_others_with_one_line(tmp_path, fault, ranks, at_fault):
    """kill_with_child: a forked child holds copies of its parent's sockets, so the kernel would keep them open."""
    processes = start(tmp_path, fault, ranks, at_fault)
    run = finish(tmp_path, processes, PROMISE)
    line = f"rank {at_fault} of {ranks} (pid {processes[at_fault].pid} on {socket.gethostname()}) died; the others stop"
    assert run.err == f"{line}. A training run continues with --resume\n"
    expected = [EXIT_RANK_DIED] * ranks
    expected[at_fault] = 0 if fault == "exit" else -signal.SIGKILL
    assert run.codes == expected


@pytest.mark.soak
@pytest.mark.parametrize("at_fault", [0, 5])
def test_eight_ranks_always_print_one_line(tmp_path, at_fault):
    """Who prints is settled between processes that run in any order: 50 orders."""
    for i in range(50):
        folder = tmp_path / str(i)
        folder.mkdir()
        run = finish(folder, start(folder, "kill", 8, at_fault), PROMISE)
        assert run.deaths == [(str(at_fault), "died")] and run.err.count("\n") == 1, run.err


def test_rank_0_and_rank_1_die_at_once(tmp_path):
    processes = start(tmp_path, "wait", 4)
    wait_until_ready(tmp_path)
    for process in processes[:2]:
        process.kill()
    run = finish(tmp_path, processes, PROMISE)
    assert run.codes == [-signal.SIGKILL] * 2 + [EXIT_RANK_DIED] * 2
    assert run.deaths in ([("0", "died")], [("1", "died")]), run.err


@pytest.mark.parametrize("at_fault", [0, 1])
@pytest.mark.parametrize("fault, code", [("traceback", 1), ("leave", 0)])
def test_a_rank_that_ends_without_cleanup_is_missed(tmp_path, fault, code, at_fault):
    run = finish(tmp_path, start(tmp_path, fault, 3, at_fault), PROMISE)
    assert run.deaths == [(str(at_fault), "ended early")] and run.err.count("Traceback") == code, run.err
    assert sorted(run.codes) == sorted([code, EXIT_RANK_DIED, EXIT_RANK_DIED])


# -----------------------------------------------------------------------------
# Life


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_clean_end_says_nothing(tmp_path, ranks):
    run = finish(tmp_path, start(tmp_path, "none", ranks))
    assert run.codes == [0] * ranks and not run.err


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_same_mistake_on_all_ranks_is_no_death(tmp_path, ranks):
    run = finish(tmp_path, start(tmp_path, "mistake", ranks))
    assert run.codes == [2] * ranks
    assert run.err.splitlines() == ["rank_faults: --depth=0: expected 1 or more"] * ranks


def test_a_rank_that_holds_the_gil_for_long_is_alive(tmp_path):
    run = finish(tmp_path, start(tmp_path, "hold_gil", 2, at_fault=0))
    assert run.codes == [0, 0] and not run.err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_suspended_is_alive(tmp_path, rank):
    processes = start(tmp_path, "pause", 2, at_fault=rank)
    wait_until_ready(tmp_path)
    processes[rank].send_signal(signal.SIGSTOP)
    time.sleep(5)
    assert [process.poll() for process in processes] == [None, None]
    processes[rank].send_signal(signal.SIGCONT)
    run = finish(tmp_path, processes)
    assert run.codes == [0, 0] and not run.err


def test_importing_opens_nothing():
    code = (
        "import threading, os, nanochat.peers as p; print(len(os.listdir('/proc/self/fd')), threading.active_count())"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["4", "1"]  # stdin, stdout, stderr and the listing


# -----------------------------------------------------------------------------
# Two machines


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable, 10.77.0.1 and 10.77.0.2, each with its `eth`; skips where forbidden."""
    if not shutil.which("ip"):
        pytest.skip("no iproute2 to make network namespaces with")
    names = (f"nanochat-a-{os.getpid()}", f"nanochat-b-{os.getpid()}")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "eth", "netns", names[0], "type", "veth", "peer", "name", "eth", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces: {error.stderr.strip()}")
        for name, address in zip(names, ("10.77.0.1/24", "10.77.0.2/24"), strict=True):
            ip("-n", name, "address", "add", address, "dev", "eth")
            ip("-n", name, "link", "set", "eth", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.parametrize("at_fault", [0, 1, 3])
def test_a_rank_that_dies_on_one_of_two_machines(tmp_path, at_fault):
    with two_machines() as machines:
        run = finish(tmp_path, start(tmp_path, "kill", 4, at_fault, machines=machines), PROMISE)
    assert run.deaths == [(str(at_fault), "died")], run.err
    assert sorted(run.codes) == [-signal.SIGKILL, *[EXIT_RANK_DIED] * 3]


@pytest.mark.soak
@pytest.mark.parametrize("side", [0, 1])
def test_a_cut_cable_ends_both_sides_within_30_seconds(tmp_path, side):
    """Each side prints one line: neither can know that the other lives."""
    with two_machines() as machines:
        processes = start(tmp_path, "wait", 4, machines=machines)
        wait_until_ready(tmp_path)
        subprocess.run(["ip", "-n", machines[side], "link", "set", "eth", "down"], check=True)
        run = finish(tmp_path, processes, PROMISE)
    assert run.codes == [EXIT_RANK_DIED] * 4
    ranks, hows = zip(*run.deaths, strict=True)
    assert hows == ("cannot be reached any more",) * 2 and set(ranks) in ({"0", "2"}, {"0", "3"}), run.err


# -----------------------------------------------------------------------------
# Ranks that compute: torch is imported once for most of them


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    with Faults(tmp_path_factory.mktemp("faults")) as running:
        yield running


def collectives(faults: Faults, kind: str, ranks: int, at_fault: int = 1) -> Run:
    """Ranks that compute together until one of them has a fault; `err` is what they say beside where they are."""
    began = time.monotonic()
    faults.start("collectives", {}, ranks, kind=kind, rank=at_fault)
    codes, output = faults.finish()
    assert time.monotonic() - began < 2 * PROMISE, output
    usual = ("ready", "device: ")
    lines = [line for line in output.splitlines() if not line.startswith(usual)]
    return Run(codes, "", "\n".join(lines))


@pytest.mark.parametrize("at_fault", [0, 1])
def test_a_collective_with_a_dead_rank_has_no_traceback(faults, at_fault):
    run = collectives(faults, "kill", 3, at_fault)
    assert run.deaths == [(str(at_fault), "died")] and len(run.err.splitlines()) == 1, run.err
    assert sorted(run.codes) == [-signal.SIGKILL, EXIT_RANK_DIED, EXIT_RANK_DIED]


def test_a_rank_that_dies_under_torchrun(tmp_path):
    run = torchrun(tmp_path, "kill", 2)
    assert run.deaths == [("1", "died")], run.err
    assert "Connection closed by peer" not in run.err  # gloo's part of a traceback; torchrun prints one of its own


def test_a_traceback_on_one_rank_is_the_only_one(faults):
    """The others' collectives fail: no grace is waited for."""
    run = collectives(faults, "traceback", 3)
    assert run.err.count("Traceback") == run.err.count("RuntimeError: a bug on one rank") == 1, run.err
    assert run.deaths == [("1", "ended early")] and run.codes == [EXIT_RANK_DIED, 1, EXIT_RANK_DIED]


def test_a_collective_that_fails_for_another_reason_keeps_its_error(faults):
    run = collectives(faults, "wrong_shape", 2)
    assert "Traceback" in run.err and "reduce_scatter" in run.err and 1 in run.codes, run.err


def test_a_rank_that_never_comes_is_one_line(tmp_path):
    environment = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    words = [sys.executable, "-m", "tests.rank_faults", "absent"]
    run = finish(tmp_path, [launch(tmp_path, "", words, **environment)])
    assert run.codes == [2] and len(run.err.splitlines()) == 1, run.err
    assert "2 ranks did not meet at MASTER_ADDR=127.0.0.1" in run.err


def test_one_rank_opens_no_socket_and_starts_no_thread(faults):
    run = collectives(faults, "none", 1)
    assert run.codes == [0] and not run.err
