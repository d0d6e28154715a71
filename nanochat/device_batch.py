"""The rows per rank and micro-batch that fit, when nobody has said how many: planned, and on a GPU tried."""

import gc
import os
from typing import Literal

import torch

from nanochat.common import UserError, print0
from nanochat.compute import Compute, local_world_size
from nanochat.gpt import GPT
from nanochat.sharding import is_sharded
from nanochat.sizing import MARGIN, GPTConfig, Setup, choose_batch, most_rows
from nanochat.train import Rates, Stream, accumulate, update


def choose_rows(
    asked: int | Literal["auto"], model: GPT, total_batch_size: int, sequence_len: int, compute: Compute, compiled: bool
) -> int:
    """What --device-batch-size says; for auto the most that fit."""
    if asked != "auto":
        return asked
    return find_device_batch(model, total_batch_size, sequence_len, compute, compiled)


def find_device_batch(model: GPT, total_batch_size: int, sequence_len: int, compute: Compute, compiled: bool) -> int:
    """Rows per micro-batch for a run on this machine: the plan's number; on a GPU one step with it is tried, and half
    as many when the memory does not suffice. The step keeps near total_batch_size in any case. The same on every rank,
    and the weights stay as they are. Raises UserError where not even one row fits.

    Not guarded: a rank that runs out of memory in the optimizer step alone, while the others wait for it. A sharded
    model is not tried, because there the ranks wait for each other everywhere: its number is the plan's.
    """
    budget, sharded = memory_budget(compute), is_sharded(model)
    config = GPTConfig(**{**model.config_dict(), "sequence_len": sequence_len})
    how = Setup(
        world_size=compute.world_size,
        size=compute.dtype.itemsize,
        compiled=compiled,
        cpu=compute.device.type == "cpu",
        shard=sharded,
        offload=model.wte.weight.device != model.device,
        recompute=model.recompute,
    )
    most = most_rows(config, budget, how)
    while most and compute.device.type == "cuda" and not sharded and not step_fits(model, most, sequence_len, compute):
        print0(f"device batch: {most} rows do not fit, trying {most // 2}")
        most //= 2
    if not most:
        raise UserError(
            f"not one row of {sequence_len} tokens fits into {budget / 1e9:.1f} GB; try {how.untried} "
            "(python -m scripts.plan says what they need)",
            everywhere=True,
        )
    rows = choose_batch(total_batch_size, most, sequence_len, compute.world_size).device_batch_size
    print0(f"device batch: {rows} rows, of at most {most} in {budget / 1e9:.1f} GB")
    return rows


def memory_budget(compute: Compute) -> float:
    """Bytes that a rank may use: nine tenths of the smallest GPU, or of what this machine has left, shared by its
    ranks.
    """
    if compute.device.type == "cuda":
        size: float = torch.cuda.get_device_properties(compute.device).total_memory
    else:
        size = available_memory() / local_world_size()
    sizes = torch.zeros(compute.world_size, dtype=torch.float64)
    sizes[compute.rank] = size
    return compute.sum(sizes).min().item() * (1 - MARGIN)


def available_memory() -> int:
    """Bytes that a new process may use without swapping, as Linux says; elsewhere all of the machine's memory."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def step_fits(model: GPT, rows: int, sequence_len: int, compute: Compute) -> bool:
    """Whether a step of two micro-batches and a validation batch after it fit, on every rank. Its optimizers are thrown
    away and have a learning rate of 0, so that the weights keep their bits.
    """
    enough = True
    try:
        optimizers = model.setup_optimizers(dtype=compute.dtype)
        sums = accumulate(model, random_rows(model, rows, sequence_len), None, 2, compute)
    except torch.OutOfMemoryError:
        enough = False
    if enough := not compute.any(not enough):
        try:
            update(optimizers, sums, Rates(lr=0.0, momentum=0.9, weight_decay=0.0), compute)
            inputs, targets, _ = next(random_rows(model, rows, sequence_len))
            with torch.no_grad():
                model(inputs, targets, loss_reduction="none", dtype=compute.dtype)
        except torch.OutOfMemoryError:
            enough = False
    model.zero_grad(set_to_none=True)
    optimizers = sums = None  # type: ignore[assignment]
    gc.collect()
    if compute.device.type == "cuda":
        torch.cuda.empty_cache()
    return not compute.any(not enough)


def random_rows(model: GPT, rows: int, sequence_len: int) -> Stream[None]:
    """Batches of random tokens, from a generator of their own: the run's random numbers are not touched."""
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(model.config.vocab_size, (rows, sequence_len + 1), generator=generator).to(model.device)
        yield tokens[:, :-1], tokens[:, 1:], None
