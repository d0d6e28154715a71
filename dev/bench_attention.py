"""Time the attention of training at a model's shape: full context and windows of half of it, and which kernels do it.

    python -m dev.bench_attention --depth=20 --device-batch-size=16
    python -m dev.bench_attention --depth=2 --device-batch-size=1 --max-seq-len=256 --device-type=cpu

Milliseconds of one layer for all rows, medians, eager; and the costliest kernels of forward and backward together, by
torch.profiler. The last line is one JSON object.
"""

from typing import Literal

from nanochat.configurator import Positive, Seed, configure

device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of queries, keys and values
depth: Positive = 12  # layers of the model; its heads follow
max_seq_len: Positive = 2048  # context in tokens
device_batch_size: Positive = 16  # rows of so many tokens
repeats: Positive = 20  # that are timed, after three that are not
seed: Seed = 42  # of the numbers in them
settings = configure(__name__)

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanochat.attention import causal_attention
from nanochat.common import print0, run_main
from nanochat.compute import compute_cleanup, compute_init, device_name, synchronize
from nanochat.gpt import config_from_depth


def main() -> None:
    compute = compute_init(device_type, dtype, seed)
    config = config_from_depth(depth, 1024, max_seq_len)
    shape = device_batch_size, config.n_head, max_seq_len, config.head_dim
    qkv = [torch.randn(shape, device=compute.device, dtype=compute.dtype, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(shape, device=compute.device, dtype=compute.dtype)
    said: dict[str, Any] = dict(zip(("rows", "heads", "context", "head_dim"), shape, strict=True))
    for name, window in (("full", max_seq_len), ("windows", max(1, max_seq_len // 2))):
        forward = partial(causal_attention, *qkv, window)
        both = partial(forward_and_backward, forward, qkv, gradient)
        said |= {f"{name}, forward ms": measure(forward, compute.device)}
        said |= {f"{name}, forward and backward ms": measure(both, compute.device)}
        said |= {f"{name}, kernels": costliest(both, compute.device)}
        print0(", ".join(f"{key}: {value}" for key, value in said.items() if key.startswith(name)))
    print0(json.dumps(said | {"device": device_name(compute.device), "dtype": str(compute.dtype).rpartition(".")[2]}))
    compute_cleanup()


def forward_and_backward(forward: Callable[[], Tensor], qkv: list[Tensor], gradient: Tensor) -> None:
    torch.autograd.grad(forward(), qkv, gradient)


def measure(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call, the median."""
    times = []
    for _ in range(3 + repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return round(1000 * statistics.median(times[3:]), 3)


def costliest(call: Callable[[], object], device: torch.device, most: int = 2) -> str:
    """Names of the kernels, of a CPU the operators, that take the most time of a call."""
    with torch.profiler.profile() as profiler:
        call()
        synchronize(device)
    kind = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, kind))
    return " and ".join(event.key.removeprefix("void ").partition("<")[0][:60] for event in events[:most])


if __name__ == "__main__":
    run_main(main)
