"""One rank of a run in which something goes wrong; tests/test_peers.py starts several: `python -m tests.rank_faults
FAULT`

With STORE=FOLDER the ranks are watched and nothing else: no torch, a start in 0.1 s, and a main thread that waits for
the others as it does in a NCCL collective, which hangs when a rank is dead. Without it they compute with gloo.
"""

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

from nanochat import peers
from nanochat.common import UserError, get_rank, run_main
from nanochat.files import write_atomic


def do(fault: str) -> None:
    """The fault of one rank."""
    if fault == "kill_with_child" and os.fork() == 0:
        time.sleep(30)
        os._exit(0)
    if fault in ("kill", "kill_with_child"):
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "exit":
        os._exit(0)
    if fault == "traceback":
        raise RuntimeError("a bug on one rank")
    if fault == "leave":
        sys.exit(0)
    if fault == "hold_gil":
        pow(3, (1 << 9_000) + 1, (1 << 20_000) + 1)  # about 6 s in C without releasing the GIL
    if fault == "wait":
        time.sleep(60)
    if fault == "pause":
        time.sleep(3)


def mistake() -> None:
    time.sleep(0.3 * get_rank())
    raise UserError("--depth=0: expected 1 or more")


def ready_for(fault: str) -> None:
    if fault == "mistake":  # of every rank
        mistake()
    print("ready", flush=True)
    if get_rank() == int(os.environ["RANK_AT_FAULT"]):
        do(fault)


class FolderStore:
    """Notes in files, for ranks that share a disk."""

    def __init__(self, folder: Path):
        self.folder = folder

    def set(self, key: str, value: str) -> None:
        write_atomic(self.folder / key, value)

    def get(self, key: str) -> bytes:
        while not (self.folder / key).exists():
            time.sleep(0.01)
        return (self.folder / key).read_bytes()


def watch_only(fault: str, store: FolderStore) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    peers.watch(get_rank(), world_size, os.environ["MASTER_ADDR"], store)
    ready_for(fault)
    store.set(f"done/{get_rank()}", "")
    for rank in range(world_size):
        store.get(f"done/{rank}")
    peers.stop()
    assert threading.enumerate() == [threading.main_thread()] and count_sockets() == 0


def compute_together(fault: str) -> None:
    import torch

    from nanochat import compute as module

    if fault == "absent":
        module.MEETING_TIMEOUT = timedelta(seconds=1)
    compute = module.compute_init("cpu", "float32")
    n = compute.world_size
    if n == 1:
        assert threading.enumerate() == [threading.main_thread()] and count_sockets() == 0
    for step in range(10):
        assert compute.sum(torch.ones(1)).item() == n
        if step == 5:
            ready_for(fault)
        if fault == "wrong_shape":
            module.reduce_scatter(torch.ones(n + 1, 3))  # not a multiple of the ranks: torch refuses it
        assert module.reduce_scatter(torch.ones(n, 3)).wait().tolist() == [[n] * 3]
        assert module.all_gather(torch.tensor([[compute.rank]])).wait().flatten().tolist() == list(range(n))
        assert compute.any(compute.rank == n - 1) and not compute.any(False)
    compute.barrier()
    module.compute_cleanup()
    assert "peers" not in [thread.name for thread in threading.enumerate()]


def count_sockets() -> int:
    return sum(os.readlink(link).startswith("socket:") for link in Path("/proc/self/fd").glob("*") if link.is_symlink())


def main() -> None:
    if os.environ.get("STORE"):
        watch_only(sys.argv[1], FolderStore(Path(os.environ["STORE"])))
    else:
        compute_together(sys.argv[1])


if __name__ == "__main__":
    run_main(main)
