"""What a run needs, before anything is rented: parameters, text, memory, the batch that fits, time, disk, dollars.

    python -m scripts.plan --depth=20 --gpus=6 --vram-gb=24
    python -m scripts.plan --depth=20 --gpus=8 --card=H100
    python -m scripts.plan --table --gpus=6 --card="RX 7900 XTX"     # d4 to d32, one line each

Arithmetic alone, without torch, a GPU or data; settings with a name of base_train's mean the same there. The memory is
measured arithmetic (docs/how-to/choose-a-machine.md), the time rests on an assumed share of the card's peak, printed
with it. The last line is the command that starts the run.
"""

from typing import Literal

from nanochat.configurator import configure, read_block

# Machine
gpus = 1  # ranks, one per GPU
card: str | None = None  # its name, such as "RTX 4090": memory and peak come from the table (None = vram_gb decides)
vram_gb: float | None = None  # memory of one GPU, or of the machine without one, in GB (None = the card's)
device_type: Literal["cuda", "cpu"] = "cuda"  # cuda also stands for AMD's ROCm
dtype: Literal["bfloat16", "float32"] = "bfloat16"  # what matmuls compute in
compile = True  # torch.compile, as base_train does it; eager training keeps more
mfu: float | None = None  # assumed share of the cards' peak that training reaches (None = show 0.4 and 0.1)
dollars_per_hour: float | None = None  # of one GPU, or of a machine without (None = known for H100, A100 and V100)
# Model
depth = 20  # number of Transformer layers; width and heads follow from it
aspect_ratio = 64  # width / depth
head_dim: int | None = None  # channels per attention head (None = 128, or 64 for models narrower than 512)
kv_heads: int | None = None  # key/value heads (None = as many as query heads; fewer = grouped-query attention)
vocab_size = 65536  # tokens in the vocabulary
max_seq_len = 2048  # context in tokens
window_pattern = "L"  # tiled over the layers: L sees the full context, S half of it; the last layer is always L
# Horizon: at most one of these three; none = 20 tokens per parameter (Chinchilla)
num_iterations: int | None = None  # optimizer steps
target_flops: float | None = None  # training FLOPs
target_param_data_ratio: float | None = None  # tokens per parameter
# Batch
device_batch_size: int | Literal["auto"] = "auto"  # rows per rank and micro-batch (auto = the most that fit)
total_batch_size = 524288  # tokens per step over all ranks (rounded to whole micro-batches, which is printed)
# Memory
shard = False  # base_train --shard: weights, gradients and optimizer state in parts on all ranks
offload = False  # base_train --offload: these parts in the host's memory
recompute = False  # base_train --recompute: activations are computed again in the backward pass; a third more FLOPs
# Checkpoints
keep_last = 2  # checkpoints on the disk at a time
# Output
table = False  # one line for each depth from 4 to 32 instead
settings = configure(__name__)

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat.common import UserError, print0, run_main
from nanochat.schedule import BatchPlan, plan_batches, plan_horizon
from nanochat.sizing import (
    CARDS,
    MARGIN,
    GPTConfig,
    Memory,
    Setup,
    choose_batch,
    config_from_depth,
    count_parameters,
    find_card,
    flops_per_token,
    memory,
    most_rows,
    optimizer_bytes,
    part_bytes,
)

DEPTHS = (4, 6, 8, 10, 12, 16, 20, 24, 26, 32)  # of the table
# ClimbMix: 4.8 characters per token at a vocabulary of 65,536; shards of 250 M characters, 100 MB on disk; a reserve of
# a tenth, because rows that begin with a document cut some of the text away.
CHARS_PER_TOKEN, SHARD_CHARS, SHARD_BYTES, RESERVE, MOST_SHARDS = 4.8, 250e6, 100e6, 1.1, 6542


@dataclass(frozen=True)
class Machine:
    """One GPU, or the machine without one: what is known of it."""

    name: str
    gigabytes: float | None
    tflops: float | None

    @property
    def budget(self) -> float | None:
        """Bytes that a run may use."""
        return self.gigabytes * 1e9 * (1 - MARGIN) if self.gigabytes else None


@dataclass(frozen=True)
class Plan:
    """One run."""

    config: GPTConfig
    parameters: dict[str, int]
    flops: int  # per token
    most: int | None  # rows per micro-batch that fit; None where the memory is not known
    batch: BatchPlan
    need: Memory
    steps: int
    formula: str

    @property
    def tokens(self) -> int:
        return self.steps * self.batch.tokens

    @property
    def shards(self) -> int:
        return math.ceil(self.tokens * CHARS_PER_TOKEN / SHARD_CHARS * RESERVE)

    @property
    def checkpoint_bytes(self) -> int:
        return 4 * sum(self.parameters.values()) + optimizer_bytes(self.config, 1)

    def hours(self, tflops: float, share: float) -> float:
        return self.tokens * self.flops / (tflops * 1e12 * share * gpus) / 3600


def main() -> None:
    check_settings()
    machine = find_machine()
    if table:
        show_table(machine)
    else:
        show_plan(make_plan(depth, machine), machine)


def check_settings() -> None:
    counts = {"gpus": gpus, "vocab_size": vocab_size, "total_batch_size": total_batch_size, "keep_last": keep_last}
    for name, value in {**counts, "vram_gb": vram_gb, "device_batch_size": device_batch_size, "mfu": mfu}.items():
        if value not in (None, "auto") and value <= 0:
            raise UserError(f"--{name.replace('_', '-')}={value}: expected more than 0")
    if mfu is not None and mfu > 1:
        raise UserError(f"--mfu={mfu}: expected a share of the peak, at most 1")
    if dollars_per_hour is not None and dollars_per_hour < 0:
        raise UserError(f"--dollars-per-hour={dollars_per_hour}: expected a price of 0 or more")


def find_machine() -> Machine:
    """The card by its name in the table, and the memory as given. No name is guessed."""
    if card is None:
        return Machine("GPU" if device_type == "cuda" else "CPU", vram_gb, None)
    found = find_card(card)
    if not found:
        names = ", ".join(known.name for known in CARDS)
        raise UserError(f"--card={card!r} is not in the table; give --vram-gb=GB, or one of: {names}")
    return Machine(found.name, vram_gb or found.gb, found.tflops)


def make_plan(layers: int, machine: Machine) -> Plan:
    """Raises UserError where not a single row fits, or more than one horizon is given."""
    config = config_from_depth(layers, vocab_size, max_seq_len, aspect_ratio, head_dim, kv_heads, window_pattern)
    parameters, flops = count_parameters(config), flops_per_token(config)
    sharded = shard and gpus > 1
    how = Setup(
        world_size=gpus,
        size=2 if dtype == "bfloat16" else 4,
        compiled=compile,
        cpu=device_type == "cpu",
        shard=sharded,
        offload=offload and sharded,
        recompute=recompute,
    )
    most = most_rows(config, machine.budget, how) if machine.budget else None
    if most == 0:
        need = memory(config, 1, how).total / 1e9
        raise UserError(
            f"d{layers} with one row of {max_seq_len} tokens needs {need:.1f} GB on each of {gpus}, and "
            f"{1 - MARGIN:.0%} of {machine.gigabytes:g} GB may be used; try {how.untried}"
        )
    if device_batch_size != "auto" or not most:
        rows = 32 if device_batch_size == "auto" else device_batch_size
        batch = plan_batches(total_batch_size, rows, max_seq_len, gpus)
    else:
        batch = choose_batch(total_batch_size, most, max_seq_len, gpus)
    horizons = {
        "num_iterations": num_iterations,
        "target_flops": target_flops,
        "target_param_data_ratio": target_param_data_ratio,
    }
    given = {name: value for name, value in horizons.items() if value not in (None, -1)} or {
        "target_param_data_ratio": 20
    }
    steps, formula = plan_horizon(batch.tokens, flops, sum(parameters.values()), **given)
    need = memory(config, batch.device_batch_size, how)
    return Plan(config, parameters, flops, most, batch, need, steps, formula)


# -----------------------------------------------------------------------------
# One run


def show_plan(plan: Plan, machine: Machine) -> None:
    config, batch, total = plan.config, plan.batch, sum(plan.parameters.values())
    where = f"{gpus} x {machine.name}" + (f" with {machine.gigabytes:g} GB" if machine.gigabytes else "")
    print0(f"machine: {where}" + (f", {machine.tflops:g} TFLOP/s in bf16 by data sheet" if machine.tflops else ""))
    heads = f"{config.n_head} heads of {config.head_dim}" + f", {config.n_kv_head} for keys and values" * bool(kv_heads)
    print0(
        f"model: d{config.n_layer}, width {config.n_embd}, {heads}, vocabulary {vocab_size:,}, context {max_seq_len}"
    )
    parts = " + ".join(f"{part} {count:,}" for part, count in plan.parameters.items())
    print0(f"parameters: {total:,} = {parts}")
    show_memory(plan, machine)
    off = batch.tokens / total_batch_size - 1
    print0(f"batch: {batch} (asked for {total_batch_size:,}: {describe_rounding(off)})")
    print0(f"horizon: {plan.steps:,} steps, {plan.tokens:,} tokens ({plan.formula})")
    print0(f"compute: {plan.tokens * plan.flops:.3g} FLOPs = {plan.flops:,} per token x {plan.tokens:,} tokens")
    show_time(plan, machine)
    show_disk(plan)
    print0(f"start: {command(plan)}")


def describe_rounding(off: float) -> str:
    """How far a step is from what was asked for."""
    return "exactly" if off == 0 else f"{abs(off):.1%} {'more' if off > 0 else 'fewer'}"


def show_memory(plan: Plan, machine: Machine) -> None:
    """Each part, the sum, and what fits."""
    need, rows = plan.need, plan.batch.device_batch_size
    compiled = "compiled" if compile else "eager"
    print0(f"memory of each rank, {compiled}, {dtype}, {rows} rows of {max_seq_len} tokens:")
    sharded, part = shard and gpus > 1, f", 1/{gpus} of it"
    labels = {
        "weights": "weights, fp32" + part * sharded,
        "optimizer": "optimizer state, fp32" + part * (gpus > 1),
        "gradients": "gradients, fp32" + part * sharded,
        "copies": "gathered: embedding, head, three blocks" if sharded else f"copies of the blocks' weights in {dtype}",
        "activations": f"activations, {need.activations / rows / 1e9:.3f} GB a row",
        "head": "loss: a slice of logits, the head's gradient",
        "update": "optimizer step, after the three above are freed",
    }
    for part, size in asdict(need).items():
        print0(f"  {size / 1e9:8.2f} GB  {labels[part]}")
    print0(f"  {need.total / 1e9:8.2f} GB  at the fullest moment")
    if offload and sharded:
        host = 2 * part_bytes(plan.config, gpus) + optimizer_bytes(plan.config, gpus)
        print0(f"  {host / 1e9:8.2f} GB  of the host's memory for each rank: weights, gradients, optimizer state")
    if machine.budget and plan.most:
        print0(
            f"fits: {plan.most} rows in {machine.budget / 1e9:.1f} GB, {machine.gigabytes:g} less {MARGIN:.0%} for "
            "driver, libraries, buffers and fragments"
        )
        if rows > plan.most:
            print0(f"warning: --device-batch-size={rows} does not fit; at most --device-batch-size={plan.most}")


def show_time(plan: Plan, machine: Machine) -> None:
    """Hours, and dollars where a price is known, at an assumed share of the peak."""
    names = (machine.name,) if machine.tflops else ("H100", "A100", "RTX 4090", "7900 XTX")
    cards = [card for card in CARDS if card.name in names] if machine.tflops or device_type == "cuda" else []
    if not cards:
        print0("time: not known without a peak; base_train --minutes=5 measures its pace and says what fits")
    for name, _, tflops, known in cards:
        price = dollars_per_hour if dollars_per_hour is not None else known
        for share in (mfu,) if mfu else (0.4, 0.1):
            hours = plan.hours(tflops, share)
            rate = plan.tokens / hours / 3600
            cost = f", {hours * gpus * price:,.0f} dollars at {price:g} an hour and card" if price is not None else ""
            print0(
                f"time: {hours:,.1f} hours on {gpus} x {name} at {rate:,.0f} tokens/s, assumed {share:.0%} MFU{cost}"
            )


def show_disk(plan: Plan) -> None:
    kept = keep_last * plan.checkpoint_bytes / 1e9
    text = min(plan.shards, MOST_SHARDS)
    epochs = f"; all there are: {plan.shards / MOST_SHARDS:.1f} epochs" if plan.shards > MOST_SHARDS else ""
    print0(f"text: python -m nanochat.dataset -n {text}   # at {CHARS_PER_TOKEN} characters per token{epochs}")
    print0(
        f"disk: {text * SHARD_BYTES / 1e9 + kept:.1f} GB = {text * SHARD_BYTES / 1e9:.1f} of text + {keep_last} "
        f"checkpoints of {plan.checkpoint_bytes / 1e9:.2f}; one more while saving"
    )


def command(plan: Plan) -> str:
    """What starts this run: every setting that is base_train's and not its default."""
    start = "python -m scripts.base_train"
    if gpus > 1:
        start = f"torchrun --standalone --nproc_per_node={gpus} -m scripts.base_train --"
    names = (
        "aspect_ratio head_dim kv_heads max_seq_len window_pattern num_iterations target_flops target_param_data_ratio "
        "shard offload recompute"
    )
    defaults = {name: setting.default for name, setting in read_block(Path(__file__)).settings.items()}
    changed = {name: settings[name] for name in names.split() if settings[name] != defaults[name]}
    asked = {"depth": plan.config.n_layer, "device_batch_size": plan.batch.device_batch_size}
    asked |= {"total_batch_size": total_batch_size, **changed, "keep_last": keep_last}
    return " ".join([start, *(f"--{name.replace('_', '-')}={value}" for name, value in asked.items())])


# -----------------------------------------------------------------------------
# Many


def show_table(machine: Machine) -> None:
    """A line for each depth; a dash where not one row fits."""
    print0("depth  width   parameters    GB   rows x micro-batches   tokens/step      steps   tokens  shards     FLOPs")
    for layers in DEPTHS:
        try:
            plan = make_plan(layers, machine)
        except UserError as error:
            print0(f"d{layers:<5} -  {error}")
            continue
        total, batch = sum(plan.parameters.values()), plan.batch
        print0(
            f"d{layers:<5} {plan.config.n_embd:5} {total:12,} {plan.need.total / 1e9:5.1f} "
            f"{batch.device_batch_size:6} x {batch.grad_accum_steps:<13} {batch.tokens:12,} {plan.steps:10,} "
            f"{plan.tokens / 1e9:6.1f}B {plan.shards:7,} {plan.tokens * plan.flops:9.2e}"
        )


if __name__ == "__main__":
    run_main(main)
