"""The machine: device, ranks, dtype, seeds; and what the ranks agree on.

Nothing is probed on import. Without torchrun there is one rank and a collective is a no-op; CPUs talk gloo, GPUs NCCL /
RCCL. On CPU every run is deterministic: same machine type, same versions, same thread count, same bits.
"""

import contextlib
import ctypes
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import UserError, print0
from nanochat.files import one_line

# At the start and in every collective; longer than anything one rank does alone while the others wait. Rank 0 hashes a
# checkpoint before --resume and writes and hashes one at a save, each 5.2 GB for a d20 and 20 GB for a d32, which takes
# 3 minutes on a disk of 100 MB/s; ranks compile at different speeds, and import torch from a cold network disk.
# Downloads come before the ranks meet.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Compute:
    """Where this process runs: one of `world_size` ranks, on `device`, computing in `dtype` from fp32 weights."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1

    @property
    def is_master(self) -> bool:
        return self.rank == 0

    def about(self) -> dict[str, Any]:
        """What a record says of the machine: the device's name, and how many of them."""
        return {"device": "cpu" if self.device.type == "cpu" else device_name(self.device), "ranks": self.world_size}

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on every rank; values may live on any device and come back to theirs."""
        if self.world_size == 1:
            return values
        total = values.to(self.device, copy=True)
        with collective():
            dist.all_reduce(total)
            return total.to(values.device)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on one rank or more; the same answer on every rank."""
        return bool(self.sum(torch.tensor(flag, dtype=torch.int32)).item())

    def seed_step(self, seed: int, step: int) -> None:
        """Seed torch's generators, which dropout draws from, anew: each rank and step has numbers of its own, whatever
        came before, so there is no state to save. 32 bits of a hash, because the CPU's generator takes no more.
        """
        torch.manual_seed(int(np.random.SeedSequence([seed, step, self.rank]).generate_state(1)[0]))

    def gather(self, value: Any) -> list[Any]:
        """What each rank gives, any object that pickle takes, in rank order, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            with collective():
                dist.all_gather_object(values, value)
        return values


def compute_init(device_type: str = "auto", dtype: str = "auto", seed: int = 42) -> Compute:
    """Join the other ranks, pick device and dtype, seed everything, make CPU runs deterministic. Prints what it chose.
    Raises UserError for a device that is not there. Pair with compute_cleanup().
    """
    tasks = first_number("SLURM_STEP_NUM_TASKS") or 1
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        commands = "for one run srun bash dev/slurm/rank.sh -m scripts.base_train, for that many WORLD_SIZE=1 srun"
        raise UserError(f"srun started {tasks} tasks without WORLD_SIZE; {commands}")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    device = open_device(device_type, first_number("LOCAL_RANK", "SLURM_LOCALID") if world_size > 1 else 0)
    if world_size > 1:
        join_ranks(device)
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    if device.type == "cpu":
        # The backward pass of a compiled graph is not deterministic without this. Its habit of filling new memory with
        # NaN costs 13 % of an eager step and guards only against reading uninitialised memory, so it is off.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        keep_freed_memory()
    compute = Compute(device, choose_dtype(dtype, device), int(os.environ.get("RANK", "0")), world_size)
    name = device_name(device) + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")
    print0(f"device: {world_size} x {device.type} ({name}), computing in {str(compute.dtype).removeprefix('torch.')}")
    return compute


def first_number(*names: str) -> int | None:
    """What the first of these environment variables that is a plain number says; None where none is."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), None)


def local_world_size() -> int:
    """How many ranks share this machine, as torchrun or srun says; 1 where neither does."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"  # also in a job whose tasks srun could start
    return 1 if alone else first_number("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE") or 1


def keep_freed_memory() -> None:
    """Tell glibc, where there is one, to keep freed memory. Else each large tensor goes back to the kernel, and comes
    again page by page, zeroed: 64,000 page faults a step at d4, a third of its time (287 -> 191 ms; 5 % more memory).
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc and hasattr(libc, "mallopt"):
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # from malloc.h
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most it takes: larger blocks are always mapped
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 64 << 20)


def open_device(device_type: str, local_rank: int | None) -> torch.device:
    """A device of this machine, with "auto" the best kind that torch sees; of its GPUs the one numbered local_rank."""
    kinds = ("cuda", "mps", "xpu", "cpu")  # the best first. ROCm builds of torch call their devices cuda
    seen = [kind for kind in kinds if torch.get_device_module(kind).is_available()]
    if device_type not in ("auto", *seen):
        sees = f"torch {torch.__version__} sees {', '.join(seen)} here"
        raise UserError(f"--device-type={device_type}: {sees}; try --device-type={seen[0]}")
    device_type = seen[0] if device_type == "auto" else device_type
    if device_type != "cuda":
        return torch.device(device_type)
    if local_rank is None:
        needed = "needs LOCAL_RANK (torchrun sets it) or SLURM_LOCALID (srun does), or all ranks would take GPU 0"
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} {needed}")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(f"rank {local_rank} has no GPU: torchrun --nproc_per_node={count} fits this machine")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def join_ranks(device: torch.device) -> None:
    """Wait for all ranks at MASTER_ADDR:MASTER_PORT. Raises UserError when some do not come in COLLECTIVE_TIMEOUT."""
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"several ranks need cuda or cpu devices, not {device.type}; start without torchrun")
    given = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")}
    missing = [name for name, value in given.items() if not value]
    if missing:
        raise UserError(f"WORLD_SIZE={given['WORLD_SIZE']} needs {' and '.join(missing)} too; torchrun sets them")
    backend, device_id = ("gloo", None) if device.type == "cpu" else ("nccl", device)
    try:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, device_id=device_id)
    except RuntimeError as error:  # DistError, and what gloo raises
        place = f"MASTER_ADDR={given['MASTER_ADDR']} MASTER_PORT={given['MASTER_PORT']}"
        why = f"ranks did not meet at {place} within {COLLECTIVE_TIMEOUT.seconds} s ({one_line(error)})"
        raise UserError(f"{given['WORLD_SIZE']} {why}; start all of them with the same") from None
    if device.type == "cpu":
        share_cores()


def share_cores() -> None:
    """As many threads as there are cores for each rank; torchrun sets one, right from as many ranks as cores on."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size()))


@contextlib.contextmanager
def collective() -> Iterator[None]:
    """Around every collective, such as a pass through a sharded model: raises UserError on this rank when the link to
    another is lost, or none answers within COLLECTIVE_TIMEOUT. Any other failure passes through as it is. Under NCCL a
    rank that dies makes no error but a wait: the launcher ends it, or after the timeout torch's watchdog does.
    """
    try:
        yield
    except RuntimeError as error:
        gloo = ("gloo/transport", "pair closure")  # in its errors, which have no type of their own
        if not (isinstance(error, dist.DistError) or any(words in str(error) for words in gloo)):
            raise
        why = f"a collective failed: another rank ended or hangs ({one_line(error)})"
        raise UserError(f"{why}; resume with --resume") from None


def compute_cleanup() -> None:
    """Leave the other ranks; safe to call without any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """With "auto" bfloat16 where the hardware multiplies it, on CPUs twice to five times as fast as float32."""
    if dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[dtype]
    native, cpuinfo = False, Path("/proc/cpuinfo")
    if device.type == "cuda":  # sm_80 is Ampere; RDNA3 and CDNA report 9 and above
        native = torch.cuda.get_device_capability(device)[0] >= 8
    elif device.type == "cpu" and cpuinfo.exists():
        native = not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpuinfo.read_text().split())
    return torch.bfloat16 if native else torch.float32


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what its backend needs: on a CPU a C++ compiler."""
    return device.type != "cpu" or any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock can be read."""
    torch.get_device_module(device).synchronize()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
