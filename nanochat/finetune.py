"""The training loop of midtraining and SFT, which differ in their settings, their conversations and in what is
supervised.

A function of its settings, the mixture and the checkpoint it starts from: any number of ranks sees the same rows in the
same order, and a run that was stopped continues as if it had not been (bit for bit on CPU). The loss of a step is
divided by its number of supervised tokens over all ranks, so that every token weighs the same, however they are spread
over rows and ranks; a step without one changes nothing. Ends early, after saving, when a signal asks for it.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from nanochat import train
from nanochat.checkpoint_manager import (
    checkpoint_path,
    find_checkpoint,
    find_resume,
    is_best,
    mark_best,
    open_model,
    restore_model,
    restore_optimizers,
    save_checkpoint,
)
from nanochat.common import Stopped, print0
from nanochat.compute import compute_cleanup, compute_init, peak_memory_bytes
from nanochat.conversation import Conversations, fingerprint
from nanochat.dataloader import ChatPosition, chat_stream
from nanochat.guard import SaveClock, SignalWatch, Spikes
from nanochat.loss_eval import evaluate_chats
from nanochat.record import open_record
from nanochat.schedule import plan_batches
from nanochat.sharding import held_bytes, placement
from nanochat.sizing import choose_device_batch


def fine_tune(
    stage: str,
    settings: dict[str, Any],
    conversations: Conversations,
    held_out: Conversations,
    all_tokens: bool,
    questions: Sequence[str],
) -> None:
    """Run stage "mid" or "sft" to its end, with the settings of its script. all_tokens trains on what everybody says,
    else only on what the assistant does; `questions` are asked at the end.
    """
    s = SimpleNamespace(**settings)
    compute = compute_init(s.device_type, s.dtype, s.seed)
    start = find_checkpoint(s.source, s.model_tag, s.step)
    model, tokenizer = open_model(start, compute.device, "train", placement(compute, s.shard, s.offload))
    model.recompute = s.recompute
    print0(f"mixture {s.mixture}: {len(conversations):,} conversations, {len(held_out):,} to validate on")
    if s.compile:
        train.compile_model(model, compute.device)

    # The batch, and what a checkpoint and the run that continues it must agree on
    T = train.row_length(model, s.max_seq_len)
    rows = choose_device_batch(s.device_batch_size, model, s.total_batch_size, T, compute, s.compile)
    batch = plan_batches(s.total_batch_size, rows, T, compute.world_size)
    print0(f"batch: {batch} (asked for {s.total_batch_size:,})")
    identity = {"model_config": model.config_dict(), "rows_per_step": batch.rows, "row_length": T, "seed": s.seed}
    identity |= {"conversations": fingerprint(conversations), "started_from": start.identity}
    how = (s.resume, s.resume_from_step, s.fresh, compute)
    checkpoint = None if s.dry_run else find_resume(stage, start.tag, identity, *how)

    # The horizon: a run that goes on keeps its own, unless it is given a new number of steps
    if checkpoint and s.num_iterations is None:
        num_steps, formula = checkpoint.meta["num_steps"], "as planned at the start"
    else:
        horizon = (s.num_iterations, s.minutes)
        num_steps, formula = train.plan_chats(*horizon, conversations, tokenizer, all_tokens, model, batch, compute)
    print0(f"horizon: {num_steps:,} steps, {num_steps * batch.tokens:,} tokens ({formula})")

    # Weights, optimizers, position: from the start's checkpoint or from this run's own
    rates = [rate * s.init_lr_frac for rate in (s.matrix_lr, s.embedding_lr, s.unembedding_lr)]
    optimizers = model.setup_optimizers(rates[0], rates[1], rates[2], s.weight_decay, compute.dtype)
    meter, spikes = train.Meter(model.estimate_flops(), num_steps, compute, batch.tokens), Spikes()
    position = ChatPosition()
    if checkpoint or s.minutes is not None:  # trial steps have changed the weights
        restore_model(model, checkpoint or start)
    if checkpoint or s.warm_start:
        restore_optimizers(optimizers, checkpoint or start)
    if checkpoint:
        position = ChatPosition.from_json(train.restore_loop(checkpoint, meter, spikes))
        if meter.steps >= num_steps:
            print0(f"this run is finished; more steps: --resume --num-iterations={2 * num_steps}")
            compute_cleanup()
            return
    first_step = meter.steps
    record = open_record(stage, start.tag, settings, **compute.about())
    record.write("data", name=s.mixture, conversations=len(conversations), started_from=start.identity)
    record.write(
        "plan",
        first_step=first_step,
        num_steps=num_steps,
        formula=formula,
        batch=str(batch),
        parameters=model.num_params(),
        flops_per_token=model.estimate_flops(),
        parameter_bytes=held_bytes(model),
        optimizer_state_bytes=sum(optimizer.state_bytes() for optimizer in optimizers),
    )
    wandb_run = train.open_wandb(s.run, stage, settings, checkpoint)
    stream = chat_stream(conversations, tokenizer, batch, compute, all_tokens, s.seed, position)

    def save() -> None:
        """The state after the last whole step, whatever has happened since."""
        loop = train.loop_state(num_steps, position.to_json(), meter, spikes, wandb_run)
        meta = {**identity, **loop, "settings": settings}
        if not s.dry_run:
            path = checkpoint_path(stage, start.tag, meter.steps)
            save_checkpoint(path, model, optimizers, tokenizer, meta, compute, s.keep_last)

    clock = SaveClock(s.save_every, s.save_minutes, compute)
    with (
        SignalWatch(compute) as watch,
        train.whole_steps(f"{stage}-{start.tag}", meter, model, optimizers, record, compute, save),
        train.progress_bar(num_steps, first_step) as bar,
    ):
        for done in range(first_step + 1, num_steps + 1):
            meter.start()
            sums = train.accumulate(model, stream, position, batch.grad_accum_steps, compute)
            multipliers = train.rates_at(done - 1, num_steps, s.warmup_ratio, s.warmdown_ratio, s.final_lr_frac)
            result = train.update(optimizers, sums, multipliers, compute, watch.received, spikes, s.skip_spikes)
            position = sums.position
            logged = meter.tick(result)
            record.write("step", step=done - 1, lr=round(multipliers.lr, 6), **logged)
            train.show_progress(bar, meter, logged)
            if wandb_run:
                wandb_run.log({"step": done - 1, "lr": multipliers.lr, **logged, **meter.summary()})
            if result.stop_signal:
                raise Stopped(result.stop_signal)
            if clock.due(done) or done == num_steps:
                save()
            if train.every(s.eval_every, done) or done == num_steps:
                val_loss = evaluate_chats(model, held_out, tokenizer, batch, compute, all_tokens, watch.poll)
                record.write("eval", step=done, val_loss=val_loss)
                print0(f"step {done:,}: validation loss {val_loss:.4f}")
                if s.save_best and not s.dry_run and is_best(stage, start.tag, val_loss):
                    save()
                    mark_best(stage, start.tag, done, val_loss, compute)

    train.show_chats(questions, model, tokenizer, compute, record, num_steps)
    memory = peak_memory_bytes(compute.device)
    record.write("end", **meter.summary(), **spikes.summary(), peak_memory_bytes=memory, text=position.describe())
    print0(f"conversations: {position.describe()}")
    print0(f"speed: {train.describe_rates(meter)}, {meter.train_seconds:,.0f} s, {memory / 1e9:.1f} GB at most")
    if wandb_run:
        wandb_run.finish()
    record.close()
    compute_cleanup()
