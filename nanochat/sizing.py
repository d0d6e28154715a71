"""The cards, how much memory a run takes, and the rows that fit. torch is imported where it is used: cards need none.

The memory is an estimate: on the CPU, whose allocator can be asked, from 1 % below to 11 % above what 32 kinds of steps
of a gpt held, more for the others (docs/how-to/choose-a-machine.md). The margin is for what is not in it: the
interpreter and torch (0.5 GB of a CPU process), a GPU's driver and kernels, NCCL's buffers, fragments. On a GPU a real
step decides.
"""

import gc
import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from nanochat.common import UserError, print0
from nanochat.schedule import BatchPlan, plan_batches

if TYPE_CHECKING:
    from nanochat.compute import Compute
    from nanochat.model import LanguageModel

MARGIN = 0.1  # of the memory, left free
TOTAL_TOLERANCE = 0.03  # how far a step may be from the tokens asked for, to take fewer micro-batches


class Card(NamedTuple):
    """One device as torch sees it, by its vendor's data sheet."""

    name: str  # part of the device's own name
    gb: float
    tflops: float  # dense, in bf16; of a V100, which has no bf16, in fp32
    dollars: float | None = None  # for an hour, as nanochat reckons; None where no price is known


# Longer names first: find_card takes the first that a device's name holds.
CARDS = (
    Card("GB200", 186, 2500), Card("B200", 180, 2250), Card("H200", 141, 989), Card("H100 PCIe", 80, 756, 3.00),
    Card("H100 NVL", 94, 835, 3.00), Card("H100", 80, 989, 3.00), Card("H800", 80, 989), Card("A100", 80, 312, 1.79),
    Card("A800", 80, 312), Card("V100", 16, 15.7, 0.55), Card("L40S", 48, 362), Card("L4", 24, 121),
    Card("A40", 48, 149.7), Card("A10", 24, 125), Card("A6000", 48, 154.8), Card("6000 Ada", 48, 364),
    Card("RTX 5090", 32, 209.5), Card("RTX 4090", 24, 165.2), Card("RTX 4080", 16, 97.5), Card("RTX 3090", 24, 71),
    Card("MI355X", 288, 2500), Card("MI325X", 256, 1307), Card("MI300X", 192, 1307), Card("MI300A", 128, 981),
    Card("MI250X", 64, 191.5), Card("MI210", 64, 181), Card("7900 XTX", 24, 122.8), Card("7900 XT", 20, 103.2),
    Card("9070 XT", 16, 195),
)  # fmt: skip


def find_card(device_name: str) -> Card | None:
    """The card of a device by its own name, in any case; None when it is not in the table."""
    return next((card for card in CARDS if card.name.lower() in device_name.lower()), None)


# -----------------------------------------------------------------------------
# Memory


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a run computes, as far as its memory depends on it."""

    world_size: int = 1
    itemsize: int = 2  # of a number in the matmuls' dtype: 2 for bfloat16, 4 for float32
    compiled: bool = True
    cpu: bool = False
    adamw: bool = False  # --optimizer=adamw
    shard: bool = False  # --shard on several ranks
    offload: bool = False  # its parts in the host's memory, of which this counts nothing
    recompute: bool = False


def optimizer_bytes(model: "LanguageModel", world_size: int, adamw: bool = False) -> float:
    """Muon's momentum and AdamW's two moments, fp32: one rank's share."""
    matrices = model.num_matmul_params() - model.lm_head.weight.numel()
    return (8 * model.num_params() - (0 if adamw else 4) * matrices) / world_size


def estimate_memory(model: "LanguageModel", rows: int, sequence_len: int, setup: Setup) -> dict[str, float]:
    """{what: bytes on one rank} of a training step at its fullest moment: mostly the last loss, with all activations.

    Of each token the backward pass needs about 18 C numbers per layer: inputs and outputs of both norms 4, queries,
    keys and values 5, attention's output 1, MLP 8. Eager ones are a fifth more, because norms keep fp32. Attention
    without a kernel keeps scores, and keys and values once for every 128 queries.
    """
    config, size, tokens = model.config, setup.itemsize, rows * sequence_len
    C, L, V = config.n_embd, config.n_layer, config.vocab_size
    parameters, matrices = model.num_params(), model.num_matmul_params() - V * C
    cast = size if size < 4 else 0  # bytes of a number's copy in the matmuls' dtype
    layer = 18 * C * size * (1 if setup.compiled or not cast else 1.2)
    if setup.cpu and sequence_len <= 1024:  # see attention.causal_attention
        keys = (sequence_len + 128) / 2  # that a query sees
        layer += keys * (config.n_head * (4 + cast) + C * size / 64)
    logits = min(tokens, (16 if setup.cpu else 512) * 2**20 // (4 * V)) * V  # of a slice, see model.slice_rows
    loss = logits * (14 if setup.compiled else 24) + V * C * (4 + cast)
    blocks, copies = L * layer, cast * matrices
    if setup.recompute:  # every block's input, and one block after the loss
        blocks, copies = L * C * size + max(0, layer - loss / tokens), copies / L
    if setup.shard:  # what is gathered: embedding and head, the block at work, its buffer and the next
        copies = 4 * (parameters - matrices) + 3 * size * matrices / L
    activations = tokens * (blocks + 7 * C * size)
    update = (12 / setup.world_size if setup.shard else 2) * matrices  # buffers of the optimizer step
    weights = 0 if setup.offload else 4 * parameters / (setup.world_size if setup.shard else 1)
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": 0 if setup.offload else optimizer_bytes(model, setup.world_size, setup.adamw),
        "copies": copies,
        "activations": max(activations, update - copies - loss),  # they are gone when the update comes
        "loss": loss,
    }


# -----------------------------------------------------------------------------
# The batch


def most_rows(model: "LanguageModel", sequence_len: int, setup: Setup, budget: float) -> int:
    """The most rows per micro-batch whose memory is within `budget` bytes. Raises UserError where not even one is."""

    def need(rows: int) -> float:
        return sum(estimate_memory(model, rows, sequence_len, setup).values())

    most = bisect_right(range(1, 2**20), budget, key=need)
    if not most:
        saving = {"--recompute": setup.recompute, "--shard on several": setup.shard, "--offload": setup.offload}
        untried = "".join(f"{name}, " for name, used in saving.items() if not used)
        what = f"d{model.config.n_layer}: not one row of {sequence_len} tokens fits"
        lacks = f"it needs {need(1) / 1e9:.1f} of {budget / 1e9:.1f} GB on each of {setup.world_size}"
        raise UserError(f"{what}, {lacks}; try {untried}a smaller --depth or --max-seq-len", everywhere=True)
    return most


def choose_batch(total_batch_size: int, most: int, sequence_len: int, world_size: int) -> BatchPlan:
    """With at most `most` rows per micro-batch: the fewest micro-batches whose step is within TOTAL_TOLERANCE of the
    tokens asked for, and of these the nearest; where none is that close, the nearest of all.
    """

    def preference(plan: BatchPlan) -> tuple[float, int, float]:
        off = abs(plan.tokens / total_batch_size - 1)
        return max(off, TOTAL_TOLERANCE), plan.grad_accum_steps, off

    plans = [plan_batches(total_batch_size, rows, sequence_len, world_size) for rows in range(1, most + 1)]
    return min(plans, key=preference)


def choose_device_batch(
    asked: int | Literal["auto"],
    model: "LanguageModel",
    total_batch_size: int,
    sequence_len: int,
    compute: "Compute",
    compiled: bool,
    adamw: bool = False,
) -> int:
    """Rows per rank and micro-batch, the same on every rank: as asked, or for auto what the estimate has room for, and
    near total_batch_size a step. On a GPU a step is tried, and half the rows while it does not fit, but not of a
    sharded model, in whose passes ranks wait for each other. Raises UserError where not even one row fits.
    """
    if asked != "auto":
        return asked
    setup = Setup(
        world_size=compute.world_size,
        itemsize=compute.dtype.itemsize,
        compiled=compiled,
        cpu=compute.device.type == "cpu",
        adamw=adamw,
        shard=hasattr(model, "reshard"),
        offload=model.wte.weight.device != model.device,
        recompute=model.recompute,
    )
    budget = memory_budget(compute)
    most = most_rows(model, sequence_len, setup, budget)
    tried = compute.device.type == "cuda" and not setup.shard
    while tried and most > 1 and not step_fits(model, most, sequence_len, compute, adamw):
        print0(f"device batch: {most} rows do not fit, trying {most // 2}")
        most //= 2
    rows = choose_batch(total_batch_size, most, sequence_len, compute.world_size).device_batch_size
    print0(f"device batch: {rows} rows, of at most {most} in {budget / 1e9:.1f} GB")
    return rows


def memory_budget(compute: "Compute") -> float:
    """Bytes a rank may use: of the smallest GPU, or its share of what this machine has left, all but the margin."""
    import torch

    from nanochat.compute import local_world_size

    if compute.device.type == "cuda":
        size = float(torch.cuda.get_device_properties(compute.device).total_memory)
    else:
        size = available_memory() / local_world_size()
    return min(compute.gather(size)) * (1 - MARGIN)


def available_memory() -> int:
    """Bytes that a new process may use without swapping, as Linux says; elsewhere all of the machine's memory."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def step_fits(model: "LanguageModel", rows: int, sequence_len: int, compute: "Compute", adamw: bool) -> bool:
    """Whether a step of two micro-batches fits, on every rank. Its tokens have a generator of their own, its optimizers
    rates of 0: the weights keep their bits. Not guarded: a rank that runs out of memory in the optimizer step alone,
    while the others wait for it.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (rows, sequence_len + 1), generator=generator)
    optimizers: list[Any] = []

    def gradients() -> None:
        x = tokens.to(model.device)
        rates_of_0 = model.setup_adamw(0.0) if adamw else model.setup_optimizers(0.0, 0.0, 0.0, dtype=compute.dtype)
        optimizers.extend(rates_of_0)
        for _ in range(2):
            model(x[:, :-1], x[:, 1:], loss_reduction="sum", dtype=compute.dtype).backward()

    def update() -> None:
        for optimizer in optimizers:
            optimizer.reduce_gradients(2.0 * rows * sequence_len)
        for optimizer in optimizers:
            optimizer.step()

    def fits(part: Callable[[], None]) -> bool:
        try:
            part()
        except torch.OutOfMemoryError:
            return not compute.any(True)
        return not compute.any(False)

    fit = fits(gradients) and fits(update)
    model.zero_grad(set_to_none=True)
    optimizers.clear()
    torch.compiler.reset()  # the shapes of a run have all of dynamo's graphs to themselves
    gc.collect()
    if compute.device.type == "cuda":
        torch.cuda.empty_cache()
    return fit
