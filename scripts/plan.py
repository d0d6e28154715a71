"""What a run needs, before anything is rented: parameters, text, memory, the batch that fits, time, disk, dollars.

    python -m scripts.plan --depth=20 --gpus=6 --vram-gb=24
    python -m scripts.plan --depth=20 --gpus=8 --card=H100
    python -m scripts.plan --table --gpus=6 --card="RX 7900 XTX"     # d4 to d32, one line each

Arithmetic alone, without a GPU or data; settings with a name of base_train's mean the same there. The memory is an
estimate (docs/how-to/choose-a-machine.md), the time rests on an assumed share of the card's peak. The last line is the
command that starts the run.
"""

from typing import Literal

from nanochat.configurator import Amount, Fraction, Positive, Rate, Several, configure, read_block

# Machine
gpus: Positive = 1  # ranks, one per GPU
card: str | None = None  # its name, such as "RTX 4090": memory and peak come from the table (None = vram_gb decides)
vram_gb: Amount | None = None  # memory of one GPU, or of the machine without one, in GB (None = the card's)
device_type: Literal["auto", "cuda", "cpu"] = "auto"  # auto = cuda, which also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # what matmuls compute in (auto = bfloat16)
compile = True  # torch.compile, as base_train does it; eager training keeps more
mfu: Fraction | None = None  # assumed share of the cards' peak that training reaches (None = show 0.4 and 0.1)
dollars_per_hour: Rate | None = None  # of one GPU, or of a machine without (None = known for H100, A100 and V100)
# Model
arch: Literal["gpt", "fast", "gpt2", "llama"] = "gpt"  # architecture, by its file in nanochat/
depth: Positive = 20  # number of Transformer layers; width and heads follow from it
aspect_ratio: Positive = 64  # width / depth
head_dim: Several | None = None  # channels per attention head (None = 128, or 64 for models narrower than 512)
kv_heads: Positive | None = None  # key/value heads (None = as many as query heads; fewer = grouped-query attention)
vocab_size: Positive = 65536  # tokens in the vocabulary
max_seq_len: Positive = 2048  # context in tokens
window_pattern: str | None = None  # tiled over the layers: L full context, S half of it; the last is L (None = L)
# Horizon: at most one of these three; none = 20 tokens per parameter (Chinchilla)
num_iterations: Positive | None = None  # optimizer steps
target_flops: Amount | None = None  # training FLOPs
target_param_data_ratio: Amount | None = None  # tokens per parameter
ratio_counts: Literal["all", "matmuls"] = "all"  # parameters of the ratio: all, or without the embedding (nanochat: 12)
# Batch
device_batch_size: Positive | Literal["auto"] = "auto"  # rows per rank and micro-batch (auto = the most that fit)
total_batch_size: Positive = 524288  # tokens per step over all ranks (rounded to whole micro-batches, which is printed)
# Memory
optimizer: Literal["muon", "adamw"] = "muon"  # adamw keeps two moments of everything, muon one of the matrices
shard = False  # base_train --shard: weights, gradients and optimizer state in parts on all ranks
offload = False  # base_train --offload: these parts in the host's memory
recompute = False  # base_train --recompute: activations are computed again in the backward pass; a third more FLOPs
# Checkpoints
keep_last: Positive = 2  # checkpoints on the disk at a time
# Output
table = False  # one line for each depth from 4 to 32 instead
settings = configure(__name__)

import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from nanochat import sizing
from nanochat.common import UserError, print0, run_main
from nanochat.model import LanguageModel, choose_config
from nanochat.schedule import BatchPlan, plan_batches, plan_horizon
from nanochat.sizing import CARDS, MARGIN, Card, Setup

DEPTHS = (4, 6, 8, 10, 12, 16, 20, 24, 26, 32)  # of the table
# ClimbMix: 4.8 characters per token at a vocabulary of 65,536; shards of 250 M characters, 100 MB on disk; a reserve of
# a tenth, because rows that begin with a document cut some of the text away.
CHARS_PER_TOKEN, SHARD_CHARS, SHARD_BYTES, RESERVE, MOST_SHARDS = 4.8, 250e6, 100e6, 1.1, 6542


class Plan(NamedTuple):
    """One run."""

    model: LanguageModel  # on "meta": shapes without numbers
    setup: Setup
    most: int | None  # rows per micro-batch that fit; None where the memory is not known
    batch: BatchPlan
    memory: dict[str, float]  # bytes on each rank
    steps: int
    formula: str

    @property
    def tokens(self) -> int:
        return self.steps * self.batch.tokens

    @property
    def flops(self) -> int:
        return self.tokens * self.model.estimate_flops()

    @property
    def shards(self) -> int:
        return math.ceil(self.tokens * CHARS_PER_TOKEN / SHARD_CHARS * RESERVE)


def main() -> None:
    machine = find_machine()
    if table:
        show_table(machine)
    else:
        show_plan(make_plan(depth, machine), machine)


def find_machine() -> Card:
    """The card as the table has it, with the memory as given; 0 for what is not known."""
    found = sizing.find_card(card) if card else Card("CPU" if device_type == "cpu" else "GPU", 0, 0)
    if not found:
        names = ", ".join(known.name for known in CARDS)
        raise UserError(f"--card={card!r} is not in the table; give --vram-gb=GB, or one of: {names}")
    return found._replace(gb=vram_gb or found.gb)


def make_plan(layers: int, machine: Card) -> Plan:
    """Raises UserError where not a single row fits."""
    shape = {"aspect_ratio": aspect_ratio, "head_dim": head_dim, "kv_heads": kv_heads, "window_pattern": window_pattern}
    config = choose_config(arch, layers, vocab_size, max_seq_len, **shape)
    with torch.device("meta"):
        model = config.build()
    sharded = shard and gpus > 1
    setup = Setup(
        world_size=gpus,
        itemsize=4 if dtype == "float32" else 2,
        compiled=compile,
        cpu=device_type == "cpu",
        adamw=optimizer == "adamw",
        shard=sharded,
        offload=offload and sharded,
        recompute=recompute,
    )
    most = sizing.most_rows(model, max_seq_len, setup, machine.gb * 1e9 * (1 - MARGIN)) if machine.gb else None
    if device_batch_size == "auto" and most:
        batch = sizing.choose_batch(total_batch_size, most, max_seq_len, gpus)
    else:
        rows = 32 if device_batch_size == "auto" else device_batch_size
        batch = plan_batches(total_batch_size, rows, max_seq_len, gpus)
    flops, params = model.estimate_flops(), model.ratio_params(ratio_counts)
    steps, formula = plan_horizon(batch.tokens, flops, params, num_iterations, target_flops, target_param_data_ratio)
    memory = sizing.estimate_memory(model, batch.device_batch_size, max_seq_len, setup)
    return Plan(model, setup, most, batch, memory, steps, formula)


def show_plan(plan: Plan, machine: Card) -> None:
    config, batch, parameters = plan.model.config, plan.batch, plan.model.num_params()
    memory = f" with {machine.gb:g} GB" if machine.gb else ""
    peak = f", {machine.tflops:g} TFLOP/s in bf16 by data sheet" if machine.tflops else ""
    print0(f"machine: {gpus} x {machine.name}{memory}{peak}")
    heads = (
        f"{config.n_head} heads of {config.n_embd // config.n_head}"
        + f", {config.n_kv_head} for keys and values" * bool(kv_heads)
    )
    sizes = f"vocabulary {vocab_size:,}, context {max_seq_len}"
    print0(f"model: d{config.n_layer}, width {config.n_embd}, {heads}, {sizes}")
    parts: Counter[str] = Counter()  # wte, each kind of part that the blocks have, lm_head
    for name, p in plan.model.named_parameters():
        parts[name.split(".")[2 if name.startswith("blocks.") else 0]] += p.numel()
    print0(f"parameters: {parameters:,} = {' + '.join(f'{part} {count:,}' for part, count in parts.items())}")
    show_memory(plan, machine)
    off = batch.tokens / total_batch_size - 1
    rounding = f"{abs(off):.1%} {'more' if off > 0 else 'fewer'}" if off else "exactly"
    print0(f"batch: {batch} (asked for {total_batch_size:,}: {rounding})")
    print0(f"horizon: {plan.steps:,} steps, {plan.tokens:,} tokens ({plan.formula})")
    print0(f"compute: {plan.flops:.3g} FLOPs = {plan.model.estimate_flops():,} per token x {plan.tokens:,} tokens")
    show_time(plan, machine)
    text = min(plan.shards, MOST_SHARDS)
    epochs = f"; all there are: {plan.shards / MOST_SHARDS:.1f} epochs" if plan.shards > MOST_SHARDS else ""
    print0(f"text: python -m nanochat.dataset -n {text}   # at {CHARS_PER_TOKEN} characters per token{epochs}")
    state_bytes = sizing.optimizer_bytes(plan.model, 1, plan.setup.adamw)
    text_gb, checkpoint_gb = text * SHARD_BYTES / 1e9, (4 * parameters + state_bytes) / 1e9
    disk_gb, checkpoints = text_gb + keep_last * checkpoint_gb, f"{keep_last} checkpoints of {checkpoint_gb:.2f}"
    print0(f"disk: {disk_gb:.1f} GB = {text_gb:.1f} of text + {checkpoints}; one more while saving")
    print0(f"start: {command(plan)}")


def show_memory(plan: Plan, machine: Card) -> None:
    """Each part, the sum, and what fits."""
    rows, setup = plan.batch.device_batch_size, plan.setup
    numbers = f"{'compiled' if compile else 'eager'}, {'bfloat16' if dtype == 'auto' else dtype}"
    print0(f"memory of each rank, about, {numbers}, {rows} rows of {max_seq_len} tokens:")
    part = f", 1/{gpus} of it" * setup.shard
    labels = {
        "weights": "weights, fp32" + part,
        "gradients": "gradients, fp32" + part,
        "optimizer": "optimizer state, fp32" + f", 1/{gpus} of it" * (gpus > 1),
        "copies": "gathered: embedding, head, three blocks" if setup.shard else "copies of the blocks' weights",
        "activations": f"activations, {plan.memory['activations'] / rows / 1e9:.3f} GB a row",
        "loss": "loss: a slice of logits, the head's gradient",
    }
    for name, size in plan.memory.items():
        print0(f"  {size / 1e9:8.2f} GB  {labels[name]}")
    print0(f"  {sum(plan.memory.values()) / 1e9:8.2f} GB  at the fullest moment")
    if setup.offload:
        host = 8 * plan.model.num_params() / gpus + sizing.optimizer_bytes(plan.model, gpus, setup.adamw)
        print0(f"  {host / 1e9:8.2f} GB  of the host's memory for each rank: weights, gradients, optimizer state")
    if plan.most:
        room = f"{machine.gb * (1 - MARGIN):.1f} GB, {machine.gb:g} less {MARGIN:.0%}"
        print0(f"fits: {plan.most} rows in {room} for driver, libraries, buffers and fragments")
        if rows > plan.most:
            print0(f"warning: --device-batch-size={rows} does not fit; at most --device-batch-size={plan.most}")


def show_time(plan: Plan, machine: Card) -> None:
    """Hours, and dollars where a price is known, at an assumed share of the peak."""
    if not machine.tflops and device_type == "cpu":
        print0("time: not known without a peak; base_train --minutes=5 measures its pace and says what fits")
        return
    names = (machine.name,) if machine.tflops else ("H100", "A100", "RTX 4090", "7900 XTX")
    for name, _, tflops, known in (card for card in CARDS if card.name in names):
        price = dollars_per_hour if dollars_per_hour is not None else known
        for share in (mfu,) if mfu else (0.4, 0.1):
            hours = plan.flops / (tflops * 1e12 * share * gpus) / 3600
            rate = plan.tokens / hours / 3600
            cost = f", {hours * gpus * price:,.0f} dollars at {price:g} an hour and card" if price is not None else ""
            pace = f"{rate:,.0f} tokens/s, assumed {share:.0%} MFU"
            print0(f"time: {hours:,.1f} hours on {gpus} x {name} at {pace}{cost}")


def command(plan: Plan) -> str:
    """What starts this run: the settings that base_train has too, without those that are its defaults."""
    start = f"torchrun --standalone --nproc_per_node={gpus}" if gpus > 1 else "python"
    theirs = read_block(Path(__file__).with_name("base_train.py")).settings
    ours = {**settings, "device_batch_size": plan.batch.device_batch_size}
    always = ("depth", "device_batch_size")
    told = [name for name in ours if name in theirs and (name in always or ours[name] != theirs[name].default)]
    flags = " ".join(f"--{name.replace('_', '-')}={ours[name]}" for name in told)
    return f"{start} -m scripts.base_train {'-- ' * (gpus > 1)}{flags}"


def show_table(machine: Card) -> None:
    """A line for each depth; what does not fit says what it needs."""
    print0("depth  width   parameters    GB   rows x micro-batches   tokens/step      steps   tokens  shards     FLOPs")
    for layers in DEPTHS:
        try:
            plan = make_plan(layers, machine)
        except UserError as error:
            print0(f"d{layers:<5} -  {error}")
            continue
        batch, gb = plan.batch, sum(plan.memory.values()) / 1e9
        size = f"d{layers:<5} {plan.model.config.n_embd:5} {plan.model.num_params():12,} {gb:5.1f}"
        step = f"{batch.device_batch_size:6} x {batch.grad_accum_steps:<13} {batch.tokens:12,}"
        print0(f"{size} {step} {plan.steps:10,} {plan.tokens / 1e9:6.1f}B {plan.shards:7,} {plan.flops:9.2e}")


if __name__ == "__main__":
    run_main(main)
