"""A rank or a node that dies: torchrun on one machine, and on two, which are network namespaces joined by a cable, with
the commands of docs/how-to/several-nodes.md; and which GPU and how many neighbours a rank has, whoever started it.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from nanochat import compute
from nanochat.common import UserError
from tests import tiny
from tests.faults import Faults

PROMISE = 30  # seconds from a death to the end of the other ranks
LOST = "another rank ended or hangs"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
STEPS = 40
# The later of two equal options holds.
FLAGS = [*tiny.RUN, *tiny.EAGER, f"--num-iterations={STEPS}", "--eval-every=-1", "--save-every=5"]
SAME = {"num_iterations": STEPS, "save_every": 5}  # the same run in forked processes


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
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
        for name in names:
            kill_all(name)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def launch(folder: Path, name: str, home: Path, words: list[str], **variables: str) -> subprocess.Popen[bytes]:
    """Start a process whose output goes into files of the folder."""
    folder.mkdir(exist_ok=True)
    with open(folder / f"out{name}", "wb") as out, open(folder / f"err{name}", "wb") as err:
        env = {**tiny.environment(home), **variables}
        return subprocess.Popen(words, env=env, cwd=tiny.ROOT, stdout=out, stderr=err)


def pids(machine: str) -> list[int]:
    """The processes that run on a machine."""
    listed = subprocess.run(["ip", "netns", "pids", machine], capture_output=True, text=True, check=True)
    return [int(pid) for pid in listed.stdout.split()]


def kill_all(machine: str) -> None:
    """kill -9 for torchrun and all its ranks."""
    for pid in pids(machine):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def start_nodes(
    machines: tuple[str, str], home: Path, folder: Path, ranks: int, *flags: str
) -> list[subprocess.Popen[bytes]]:
    """The documented command on each machine, with so many ranks; what they print goes into the folder."""
    text = (tiny.ROOT / "docs/how-to/several-nodes.md").read_text()
    commands = [shlex.split(line)[1:] for line in re.findall(r"^torchrun .*", text, re.MULTILINE)]
    assert [words[:2] for words in commands] == [["--nnodes=2", f"--node_rank={node}"] for node in (0, 1)]
    here = {"--nproc_per_node=8": f"--nproc_per_node={ranks}", "--master_addr=10.0.0.1": "--master_addr=10.77.0.1"}
    processes = []
    for node, words in enumerate(commands):
        start = ["ip", "netns", "exec", machines[node], *TORCHRUN]
        command = [*start, *(here.get(word, word) for word in words), *FLAGS, *flags]
        # gloo listens where the name of the machine leads, which on both is loopback.
        processes.append(launch(folder, str(node), home, command, GLOO_SOCKET_IFNAME="eth"))
    return processes


def wait_for_checkpoint(home: Path, tag: str, folder: Path) -> None:
    deadline = time.monotonic() + 10 * PROMISE  # a step, not a promise: only a machine that is busy needs it
    while not (home / f"base_checkpoints/{tag}/step_000005/meta.json").exists():
        errors = "".join(path.read_text() for path in folder.glob("err*"))
        assert time.monotonic() < deadline and "Traceback" not in errors, errors
        time.sleep(0.02)


def check_end(err: Path, ranks: int) -> None:
    """Each of the ranks that lost another has said so in a line; the only traceback is torchrun's own."""
    text = err.read_text()
    assert text.count(LOST) == ranks and all("--resume" in line for line in text.splitlines() if LOST in line), text
    assert text.count("Traceback") == 1 and "base_train.py" not in text, text


def kill_node(machines: tuple[str, str], nodes: list[subprocess.Popen[bytes]], dead: int, folder: Path) -> None:
    """End all of one node: the other ends within PROMISE, its ranks say why, and nothing is left."""
    ranks = len(pids(machines[1 - dead])) - 1
    kill_all(machines[dead])
    codes = [node.wait(PROMISE) for node in nodes]
    assert codes[dead] == -signal.SIGKILL and codes[1 - dead] == 1  # torchrun's code, whatever that of its ranks
    check_end(folder / f"err{1 - dead}", ranks)
    assert not pids(machines[0]) and not pids(machines[1])


def finish_again(machines: tuple[str, str], home: Path, tag: str, folder: Path) -> None:
    """Both nodes started again."""
    nodes = start_nodes(machines, home, folder, 2, f"--model-tag={tag}", "--resume")
    assert [node.wait(4 * PROMISE) for node in nodes] == [0, 0], (folder / "err0").read_text()
    assert "resumed from" in (folder / "out0").read_text()


def check_weights(faults: Faults, tag: str, ranks: int) -> None:
    """They are those of as many ranks that nothing has happened to."""
    faults.train("base", {**SAME, "model_tag": f"whole{ranks}"}, ranks)
    assert tiny.weights(faults.base_dir, tag, STEPS) == tiny.weights(faults.base_dir, f"whole{ranks}", STEPS)


# -----------------------------------------------------------------------------
# A rank that dies, on one machine


@pytest.mark.parametrize("dead", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_rank_that_is_killed_ends_the_other_and_the_run_resumes(own_home, faults, tmp_path, dead):
    words = ["--standalone", "--nproc_per_node=2", "-m", "scripts.base_train", "--", *FLAGS, f"--model-tag=rank{dead}"]
    torchrun = launch(tmp_path, "", own_home, [*TORCHRUN, *words])
    wait_for_checkpoint(own_home, f"rank{dead}", tmp_path)
    # In the order of their start.
    ranks = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    assert len(ranks) == 2
    os.kill(int(ranks[dead]), signal.SIGKILL)
    assert torchrun.wait(PROMISE) == 1
    check_end(tmp_path / "err", 1)
    assert not Path(f"/proc/{ranks[1 - dead]}").exists()
    code, output = faults.run("base", {**SAME, "model_tag": f"rank{dead}", "resume": True}, 2)
    assert code == 0 and "resumed from" in output, output
    check_weights(faults, f"rank{dead}", 2)


def test_a_rank_that_never_comes_is_one_line(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(compute, "COLLECTIVE_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(
        UserError, match=r"2 ranks did not meet at MASTER_ADDR=127\.0\.0\.1 MASTER_PORT=0 within 1 s"
    ) as end:
        compute.compute_init("cpu")
    assert "\n" not in str(end.value)


def test_a_collective_that_fails_for_another_reason_keeps_its_error():
    with pytest.raises(RuntimeError, match="shape"), compute.collective():
        raise RuntimeError("a wrong shape")


# -----------------------------------------------------------------------------
# A node that dies. Of processes that are killed the kernel tells the other node; of a machine without power nobody
# does: the others wait for compute.COLLECTIVE_TIMEOUT, which no test does.


def test_a_node_that_dies_ends_the_other(machines, own_home, tmp_path):
    nodes = start_nodes(machines, own_home, tmp_path / "run", 1, "--model-tag=short")
    wait_for_checkpoint(own_home, "short", tmp_path / "run")
    kill_node(machines, nodes, 1, tmp_path / "run")


@pytest.mark.soak
@pytest.mark.parametrize("dead", [0, 1])
def test_two_nodes_of_which_one_dies_go_on_when_started_again(machines, own_home, faults, tmp_path, dead):
    nodes = start_nodes(machines, own_home, tmp_path / "run", 2, f"--model-tag=killed{dead}")
    wait_for_checkpoint(own_home, f"killed{dead}", tmp_path / "run")
    kill_node(machines, nodes, dead, tmp_path / "run")
    finish_again(machines, own_home, f"killed{dead}", tmp_path / "again")
    check_weights(faults, f"killed{dead}", 4)


@pytest.mark.soak
@pytest.mark.parametrize("node", [0, 1])
def test_sigterm_to_the_torchrun_of_one_node_stops_both_after_saving(machines, own_home, faults, tmp_path, node):
    nodes = start_nodes(machines, own_home, tmp_path / "run", 2, f"--model-tag=stopped{node}")
    wait_for_checkpoint(own_home, f"stopped{node}", tmp_path / "run")
    nodes[node].terminate()
    assert 0 not in [process.wait(2 * PROMISE) for process in nodes]
    assert (tmp_path / "run/err0").read_text().count("stopped by SIGTERM") == 1
    assert not pids(machines[0]) and not pids(machines[1])
    finish_again(machines, own_home, f"stopped{node}", tmp_path / "again")
    check_weights(faults, f"stopped{node}", 4)


# -----------------------------------------------------------------------------
# A rank's place on its machine


class TookGPU(Exception):
    """Instead of a GPU, which few machines have eight of."""


def gpu_of_rank(monkeypatch: pytest.MonkeyPatch, **variables: str) -> int:
    """The GPU that compute_init takes on a machine with eight, started with these variables."""

    def take(number: int) -> None:
        raise TookGPU(number)

    for name in ("WORLD_SIZE", "LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", take)
    with pytest.raises(TookGPU) as taken:
        compute.compute_init("cuda")
    return taken.value.args[0]


def test_ranks_that_plain_srun_starts_do_not_share_gpu_0(monkeypatch):
    assert gpu_of_rank(monkeypatch, WORLD_SIZE="16", SLURM_LOCALID="5") == 5
    assert gpu_of_rank(monkeypatch, WORLD_SIZE="16", SLURM_LOCALID="0", LOCAL_RANK="3") == 3  # torchrun in one task


def test_a_process_on_its_own_takes_the_first_gpu_it_sees(monkeypatch):
    assert gpu_of_rank(monkeypatch) == 0
    assert gpu_of_rank(monkeypatch, SLURM_LOCALID="3") == 0  # one of several single runs, each bound to a GPU


def test_a_rank_that_does_not_know_its_gpu_says_what_to_set(monkeypatch):
    with pytest.raises(UserError, match=r"WORLD_SIZE=2 .* LOCAL_RANK .* SLURM_LOCALID"):
        gpu_of_rank(monkeypatch, WORLD_SIZE="2")


def test_srun_without_ranks_does_not_start_the_same_run_many_times(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(UserError, match=r"srun started 8 tasks .* dev/slurm/rank\.sh"):
        compute.compute_init("cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert compute.compute_init("cpu").world_size == 1


@pytest.mark.parametrize(
    "variables, ranks",
    [
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "SLURM_NTASKS_PER_NODE": "1"}, 8),
        ({"WORLD_SIZE": "16", "SLURM_NTASKS_PER_NODE": "4"}, 4),
        ({"WORLD_SIZE": "16", "SLURM_NTASKS_PER_NODE": "4(x4)"}, 1),
        ({"SLURM_NTASKS_PER_NODE": "8"}, 1),  # one process in a job that may have eight
    ],
)
def test_ranks_share_the_cores_and_memory_of_their_machine(monkeypatch, variables, ranks):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert compute.local_world_size() == ranks
