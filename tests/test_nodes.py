"""Two machines, as two network namespaces joined by a cable, that train one model with the commands of
docs/how-to/several-nodes.md; and which GPU and how many neighbours a rank has, whoever started it.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanochat import compute
from nanochat.common import UserError
from tests import tiny
from tests.test_peers import DEATH, PROMISE, launch, two_machines

STEPS = 40
# The later of two equal options holds.
FLAGS = [*tiny.RUN, *tiny.EAGER, f"--num-iterations={STEPS}", "--eval-every=-1", "--save-every=5"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base_dir = tmp_path_factory.mktemp("nodes")
    tiny.prepare(base_dir)
    return base_dir


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    with two_machines() as names:
        yield names
        for name in names:
            kill_all(name)


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
    folder.mkdir()
    processes = []
    for node, words in enumerate(commands):
        start = ["ip", "netns", "exec", machines[node], sys.executable, "-m", "torch.distributed.run"]
        command = [*start, *(here.get(word, word) for word in words), *FLAGS, *flags]
        # gloo listens where the name of the machine leads, which on both is loopback.
        where = {"NANOCHAT_BASE_DIR": home, "GLOO_SOCKET_IFNAME": "eth"}
        processes.append(launch(folder, str(node), command, **where))
    return processes


def wait_for_checkpoint(home: Path, tag: str, folder: Path) -> None:
    deadline = time.monotonic() + 4 * PROMISE
    while not (home / f"base_checkpoints/{tag}/step_000005/meta.json").exists():
        errors = "".join(path.read_text() for path in folder.glob("err*"))
        assert time.monotonic() < deadline and "Traceback" not in errors, errors
        time.sleep(0.02)


def kill_node(machines: tuple[str, str], nodes: list[subprocess.Popen[bytes]], dead: int, err: Path) -> None:
    """End all of one node: the other ends within PROMISE, one line says why, and nothing is left."""
    kill_all(machines[dead])
    codes = [node.wait(PROMISE) for node in nodes]
    assert codes[dead] == -signal.SIGKILL and codes[1 - dead] == 1  # torchrun's code, whatever that of its ranks
    text = err.read_text()
    deaths = [match for line in text.splitlines() if (match := DEATH.fullmatch(line))]
    assert len(deaths) == 1 and int(deaths[0][1]) * 2 // int(deaths[0][2]) == dead, text
    assert text.count("Traceback") == 1 and "base_train.py" not in text, text  # it is torchrun's own
    assert not pids(machines[0]) and not pids(machines[1])


def finish_again(machines: tuple[str, str], home: Path, tag: str, folder: Path) -> None:
    """Both nodes started again; the model is that of four ranks that nothing has happened to."""
    nodes = start_nodes(machines, home, folder, 2, f"--model-tag={tag}", "--resume")
    assert [node.wait(4 * PROMISE) for node in nodes] == [0, 0], (folder / "err0").read_text()
    assert "resumed from" in (folder / "out0").read_text()
    if not (home / "base_checkpoints/whole").exists():
        tiny.torchrun(home, 4, "scripts.base_train", "--", *FLAGS, "--model-tag=whole")
    assert tiny.weights(home, tag, STEPS) == tiny.weights(home, "whole", STEPS)


# -----------------------------------------------------------------------------
# A node that dies


def test_a_node_that_dies_ends_the_other(machines, home, tmp_path):
    nodes = start_nodes(machines, home, tmp_path / "run", 1, "--model-tag=short")
    wait_for_checkpoint(home, "short", tmp_path / "run")
    kill_node(machines, nodes, 1, tmp_path / "run/err0")


@pytest.mark.soak
@pytest.mark.parametrize("dead", [0, 1])
@pytest.mark.parametrize("fault", ["killed", "without_power"])
def test_two_nodes_of_which_one_dies_go_on_when_started_again(machines, home, tmp_path, fault, dead):
    """Of processes that are killed the kernel tells the other node; of a machine without power nobody does."""
    nodes = start_nodes(machines, home, tmp_path / "run", 2, f"--model-tag={fault}{dead}")
    wait_for_checkpoint(home, f"{fault}{dead}", tmp_path / "run")
    if fault == "without_power":
        subprocess.run(["ip", "-n", machines[dead], "link", "set", "eth", "down"], check=True)
    kill_node(machines, nodes, dead, tmp_path / f"run/err{1 - dead}")
    if fault == "without_power":
        subprocess.run(["ip", "-n", machines[dead], "link", "set", "eth", "up"], check=True)
    finish_again(machines, home, f"{fault}{dead}", tmp_path / "again")


@pytest.mark.soak
@pytest.mark.parametrize("node", [0, 1])
def test_sigterm_to_the_torchrun_of_one_node_stops_both_after_saving(machines, home, tmp_path, node):
    nodes = start_nodes(machines, home, tmp_path / "run", 2, f"--model-tag=stopped{node}")
    wait_for_checkpoint(home, f"stopped{node}", tmp_path / "run")
    nodes[node].terminate()
    assert 0 not in [process.wait(2 * PROMISE) for process in nodes]
    assert (tmp_path / "run/err0").read_text().count("stopped by SIGTERM") == 1
    assert not pids(machines[0]) and not pids(machines[1])
    finish_again(machines, home, f"stopped{node}", tmp_path / "again")


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
