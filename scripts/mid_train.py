"""Midtraining: teach a base model the chat format, tools and a broad range of questions, on all tokens of
conversations.

    python -m scripts.mid_train dev/configs/laptop_mid.py
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train -- --device-batch-size=32 --run=mid

A run that was stopped continues with --resume, as nanochat/run.py says.
"""

from typing import Literal

from nanochat.configurator import Amount, Interval, Minutes, Natural, Positive, Rate, Seed, Share, configure

SHORT = {"i": "source", "g": "model_tag", "s": "step"}

# Run
run = "dummy"  # wandb run name; dummy = no wandb
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # what matmuls compute in; master weights are always fp32
compile = True  # torch.compile the blocks and the loss; without a C++ compiler the run is eager and says so
seed: Seed = 42  # of the order of the rows
dry_run = False  # train, but write no checkpoint
# Start
source: Literal["base", "mid", "sft"] = "base"  # stage of the checkpoint to start from
source_tag: str | None = None  # name of its directory (None = --model-tag, without that the one saved last)
step: Natural | None = None  # its step (None = the last)
warm_start = True  # take over the optimizers' moments (nanochat: slightly better)
# Conversations
mixture = "default"  # default: nanochat's, downloaded; offline: made here; or your own file (docs/how-to/own-data.md)
max_seq_len: Positive | None = None  # tokens per row (None = the model's context); longer conversations are cut
# Horizon: at most one of these two; none = one epoch
num_iterations: Positive | None = None  # optimizer steps (the only one that changes the plan of a resumed run)
minutes: Amount | None = None  # training time, turned into steps once; evaluation, saving, compiling not counted
# Batch
device_batch_size: Positive | Literal["auto"] = 32  # rows per rank and micro-batch (auto = the most that fit)
total_batch_size: Positive = 524288  # tokens per step over all ranks, rounded to whole micro-batches
# Optimizers
matrix_lr: Rate = 0.02  # Muon, for the matrices in the blocks
embedding_lr: Rate = 0.2  # AdamW, for the embedding; scales with (width / 768)^-0.5
unembedding_lr: Rate = 0.004  # AdamW, for the head; scales likewise
init_lr_frac: Rate = 1.0  # share of these rates to begin with
weight_decay: Rate = 0.0  # Muon's cautious weight decay; falls to 0 along a cosine
warmup_ratio: Share = 0.0  # share of the run in which learning rates rise from 0
warmdown_ratio: Share = 0.2  # share of the run in which they fall to final_lr_frac
final_lr_frac: Share = 0.0  # where they end
skip_spikes = False  # no update by a step whose loss or gradient norm is 6 standard deviations too high
# Memory
shard = False  # FSDP2: weights, gradients and optimizer state in parts on all ranks; slower, same checkpoints
offload = False  # with --shard: these parts in the host's memory, and on the GPU only while they are used
recompute = False  # keep only each block's input, and compute the rest again in the backward pass; a third more FLOPs
# Evaluation
eval_every: Interval = 150  # steps between validations on held-out conversations (-1 = only at the end)
# Checkpoints
model_tag: str | None = None  # name of the new directory (None = that of the checkpoint to start from)
save_every: Interval = -1  # steps between checkpoints (-1 = only at the end)
save_minutes: Minutes = -1.0  # minutes between checkpoints (-1 = by steps alone); both may be given
save_best = False  # save after each validation that is the best so far, and never delete that one
keep_last: Interval = -1  # checkpoints to keep, older ones are deleted (-1 = all)
resume = False  # continue from the newest whole checkpoint of this tag
resume_from_step: Natural | None = None  # continue from this step
fresh = False  # start over although this tag has checkpoints; they are kept under another name
settings = configure(__name__)

from nanochat.chat_train import (
    ChatPosition,
    chat_stream,
    evaluate_chats,
    find_start,
    plan_chats,
    row_length,
    rows_in_epoch,
    show_chats,
)
from nanochat.checkpoint_manager import open_model, restore_optimizers
from nanochat.common import print0, run_main
from nanochat.compute import Compute, compute_init
from nanochat.conversation import Conversations, fingerprint
from nanochat.run import open_run
from nanochat.schedule import BatchPlan, plan_batches
from nanochat.sharding import placement
from nanochat.sizing import choose_device_batch
from nanochat.tokenizer import Tokenizer
from nanochat.train import (
    Spikes,
    Stream,
    accumulate,
    agree,
    compile_model,
    every,
    rates_at,
    update,
)
from tasks.mixtures import SAMPLES, mid_mixture


def main() -> None:
    compute = compute_init(device_type, dtype, seed)
    start, tag = find_start("mid", source, source_tag, model_tag, step)
    model, tokenizer = open_model(start, compute.device, "train", placement(compute, shard, offload))
    model.recompute = recompute
    conversations, held_out = mid_mixture(mixture, "train"), mid_mixture(mixture, "dev")
    print0(f"mixture {mixture}: {len(conversations):,} conversations, {len(held_out):,} to validate on")
    if compile:
        compile_model(model, compute.device)

    # The batch, and what a checkpoint and the run that continues it must agree on
    T = row_length(model, max_seq_len)
    device_rows = choose_device_batch(device_batch_size, model, total_batch_size, T, compute, compile)
    batch = plan_batches(total_batch_size, device_rows, T, compute.world_size)
    print0(f"batch: {batch} (asked for {total_batch_size:,})")
    print0(f"validation: about {rows_in_epoch(held_out, tokenizer, T, all_tokens=True):,} rows")  # raises for none
    identity = {"model_config": model.config_dict(), "rows_per_step": batch.rows, "row_length": T, "seed": seed}
    identity |= {"conversations": fingerprint(conversations), "started_from": start.identity}

    with open_run("mid", tag, settings, identity, compute) as run:
        trial = open_stream(conversations, tokenizer, batch, compute, ChatPosition())
        epoch = rows_in_epoch(conversations, tokenizer, T, all_tokens=True)
        num_steps, formula = run.horizon or plan_chats(num_iterations, minutes, epoch, model, trial, batch, compute)
        print0(f"horizon: {num_steps:,} steps, {num_steps * batch.tokens:,} tokens ({formula})")
        rates = [rate * init_lr_frac for rate in (matrix_lr, embedding_lr, unembedding_lr)]
        optimizers = model.setup_optimizers(*rates, weight_decay, compute.dtype)
        if warm_start and not run.checkpoint:
            restore_optimizers(optimizers, start)
        spikes = Spikes()
        run.begin(model, optimizers, tokenizer, num_steps, spikes, batch.tokens, formula=formula, batch=str(batch))
        if run.is_finished:
            return
        run.record.write("data", name=mixture, conversations=len(conversations), started_from=start.identity)

        stream = open_stream(conversations, tokenizer, batch, compute, ChatPosition.from_json(run.position))
        for number in run.steps():
            sums = accumulate(model, stream, batch.grad_accum_steps, compute)
            agreed = agree(sums, run.watch.received, optimizers, compute)  # raises on every rank or on none
            multipliers = rates_at(number, num_steps, warmup_ratio, warmdown_ratio, final_lr_frac)
            result = update(optimizers, agreed, multipliers, compute, spikes, skip_spikes)
            run.end_step(result, sums.position, lr=round(multipliers.lr, 6))  # records it, saves when that is due

            if every(eval_every, run.done, num_steps) or run.done == num_steps:
                val_loss = evaluate_chats(model, held_out, tokenizer, batch, compute, True, run.watch.poll)
                print0(f"step {run.done:,}: validation loss {val_loss:.4f}")
                run.evaluated(val_loss, val_loss=val_loss)

        show_chats(SAMPLES, model, tokenizer, compute, run)
        run.finish(sums.position.describe())


def open_stream(
    conversations: Conversations, tokenizer: Tokenizer, batch: BatchPlan, compute: Compute, start: ChatPosition
) -> Stream:
    """The training rows of this rank, from a position on. What users say is trained too."""
    return chat_stream(conversations, tokenizer, batch, compute, all_tokens=True, seed=seed, start=start)


if __name__ == "__main__":
    run_main(main)
