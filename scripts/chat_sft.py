"""
Supervised fine-tuning: teach a model to answer, on what the assistant says in conversations and nothing else.

    python -m scripts.chat_sft dev/configs/laptop_sft.py
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --device-batch-size=4 --run=sft

The loss of a step is divided by its number of supervised tokens over all ranks, so that every token weighs the same,
however they are spread over rows and ranks; a step without one changes nothing.

The run is a function of its settings, the mixture and the checkpoint it starts from: any number of ranks sees the same
rows in the same order, and a run that was stopped continues with --resume as if it had not been (bit for bit on CPU).
"""

from typing import Literal

from nanochat.configurator import configure

SHORT = {"i": "source", "g": "model_tag", "s": "step"}

# Run
run = "dummy"  # wandb run name; dummy = no wandb
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # what matmuls compute in; master weights are always fp32
compile = True  # torch.compile the blocks and the loss; without a C++ compiler the run is eager and says so
seed = 42  # of the order of the rows
dry_run = False  # train, but write no checkpoint
# Start
source: Literal["base", "mid", "sft"] = "mid"  # stage of the checkpoint to start from
model_tag: str | None = None  # name of its directory, and of the new one (None = the one saved last)
step: int | None = None  # step of the checkpoint to start from (None = the last)
warm_start = True  # take over the optimizers' moments
# Conversations
mixture = "default"  # default: nanochat's, downloaded; offline: generated here; or a file of your own (jsonl)
max_seq_len: int | None = None  # tokens per row (None = the model's context); longer conversations are cut
# Horizon: at most one of these two; none = one epoch
num_iterations: int | None = None  # optimizer steps (the only one that changes the plan of a resumed run)
minutes: float | None = None  # training time, turned into steps once; evaluation, saving, compiling not counted
# Batch
device_batch_size = 4  # rows per rank and micro-batch: lower it until the model fits
total_batch_size = 65536  # tokens per step over all ranks, rounded to whole micro-batches
# Optimizers
matrix_lr = 0.02  # Muon, for the matrices in the blocks
embedding_lr = 0.2  # AdamW, for the embedding; scales with (width / 768)^-0.5
unembedding_lr = 0.004  # AdamW, for the head; scales likewise
init_lr_frac = 0.02  # share of these rates to begin with
weight_decay = 0.0  # Muon's cautious weight decay; falls to 0 along a cosine
warmup_ratio = 0.0  # share of the run in which learning rates rise from 0
warmdown_ratio = 1.0  # share of the run in which they fall to final_lr_frac
final_lr_frac = 0.0  # where they end
# Evaluation
eval_every = 100  # steps between validations on held-out conversations (-1 = only at the end)
# Checkpoints
save_every = -1  # steps between checkpoints (-1 = only at the end)
resume = False  # continue from the newest checkpoint of this tag
resume_from_step: int | None = None  # continue from this step
fresh = False  # start over although this tag has checkpoints; they are kept under another name
settings = configure(__name__)

from nanochat import train
from nanochat.checkpoint_manager import (
    find_checkpoint,
    find_resume,
    open_model,
    restore_model,
    restore_optimizers,
    save_checkpoint,
)
from nanochat.common import open_record, print0, run_main
from nanochat.compute import compute_cleanup, compute_init, peak_memory_bytes
from nanochat.dataloader import ChatPosition, chat_stream
from nanochat.loss_eval import evaluate_chats
from nanochat.schedule import plan_batches
from tasks.mixtures import SAMPLES, sft_mixture

ALL_TOKENS = False  # only what the assistant says and asks its tool


def main() -> None:
    compute = compute_init(device_type, dtype, seed)
    start = find_checkpoint(source, model_tag, step)
    model, tokenizer = open_model(start, compute.device, "train")
    conversations, held_out = sft_mixture(mixture, "train"), sft_mixture(mixture, "dev")
    print0(f"mixture {mixture}: {len(conversations):,} conversations, {len(held_out):,} to validate on")
    if compile:
        train.compile_model(model, compute.device)

    # The batch, and what a checkpoint and the run that continues it must agree on
    T = train.row_length(model, max_seq_len)
    batch = plan_batches(total_batch_size, device_batch_size, T, compute.world_size)
    print0(f"batch: {batch} (asked for {total_batch_size:,})")
    identity = {"model_config": model.config_dict(), "rows_per_step": batch.rows, "row_length": T, "seed": seed}
    identity |= {"mixture": mixture, "conversations": len(conversations), "started_from": start.name}
    checkpoint = find_resume("sft", start.tag, identity, resume, resume_from_step, fresh, compute)

    # The horizon: a run that goes on keeps its own, unless it is given a new number of steps
    if checkpoint and num_iterations is None:
        num_steps, formula = checkpoint.meta["num_steps"], "as planned at the start"
    else:
        horizon = (num_iterations, minutes)
        num_steps, formula = train.plan_chats(*horizon, conversations, tokenizer, ALL_TOKENS, model, batch, compute)
    print0(f"horizon: {num_steps:,} steps, {num_steps * batch.tokens:,} tokens ({formula})")

    # Weights, optimizers, position: from the start's checkpoint or from this run's own
    rates = [rate * init_lr_frac for rate in (matrix_lr, embedding_lr, unembedding_lr)]
    optimizers = model.setup_optimizers(rates[0], rates[1], rates[2], weight_decay, compute.dtype)
    meter = train.Meter(model.estimate_flops(), num_steps, compute, batch.tokens)
    first_step, position = 0, ChatPosition()
    restore_model(model, checkpoint or start)
    if checkpoint or warm_start:
        restore_optimizers(optimizers, checkpoint or start)
    if checkpoint:
        meter.restore(checkpoint.meta["meter"])
        first_step, position = checkpoint.step, ChatPosition.from_json(checkpoint.meta["position"])
        print0(f"resumed from {checkpoint.path}")
        if first_step >= num_steps:
            print0(f"this run is finished; more steps: --resume --num-iterations={2 * num_steps}")
            compute_cleanup()
            return
    record = open_record("sft", start.tag, settings)
    record.write("data", name=mixture, conversations=len(conversations), started_from=start.name)
    record.write(
        "plan",
        first_step=first_step,
        num_steps=num_steps,
        formula=formula,
        batch=str(batch),
        parameters=model.num_params(),
        flops_per_token=model.estimate_flops(),
    )
    wandb_run = train.open_wandb(run, "sft", settings)
    stream = chat_stream(conversations, tokenizer, device_batch_size, T, compute, ALL_TOKENS, seed, position)

    with train.SignalWatch() as watch, train.progress_bar(num_steps, first_step) as bar:
        for done in range(first_step + 1, num_steps + 1):
            meter.start()
            totals, position = train.accumulate(model, stream, batch.grad_accum_steps, compute)
            multipliers = train.rates_at(done - 1, num_steps, warmup_ratio, warmdown_ratio, final_lr_frac)
            result = train.update(optimizers, totals, multipliers, compute, watch.received)
            logged = meter.tick(result)
            record.write("step", step=done - 1, lr=round(multipliers.lr, 6), **logged)
            train.show_progress(bar, meter, logged)
            if wandb_run:
                wandb_run.log({"step": done - 1, "lr": multipliers.lr, **logged, **meter.summary()})
            if not dry_run and (done == num_steps or result.stop_signal or train.every(save_every, done)):
                state = {"num_steps": num_steps, "position": position.to_json(), "meter": meter.state()}
                meta = {**identity, **state, "settings": settings}
                path = save_checkpoint("sft", start.tag, done, model, optimizers, tokenizer, meta, compute)
                print0(f"saved {path}")
            if result.stop_signal:
                record.write("stopped", step=done, signal=result.stop_signal)
                record.close()
                train.leave(result.stop_signal)
            if train.every(eval_every, done) or done == num_steps:
                val_loss = evaluate_chats(model, held_out, tokenizer, compute, device_batch_size, T, ALL_TOKENS)
                record.write("eval", step=done, val_loss=val_loss)
                print0(f"step {done:,}: validation loss {val_loss:.4f}")

    train.show_chats(SAMPLES, model, tokenizer, compute, record, num_steps)
    memory = peak_memory_bytes(compute.device)
    record.write("end", **meter.summary(), peak_memory_bytes=memory, text=position.describe())
    print0(f"conversations: {position.describe()}")
    print0(f"speed: {train.describe_rates(meter)}, {meter.train_seconds:,.0f} s, {memory / 1e9:.1f} GB at most")
    if wandb_run:
        wandb_run.finish()
    record.close()
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
