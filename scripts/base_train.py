"""Pretrain a base model on a corpus.

    python -m scripts.base_train dev/configs/laptop.py --minutes=5
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20 --target-param-data-ratio=20

One dial: --depth decides width, heads and parameters. The run is a function of its settings, the corpus and the
tokenizer: any number of ranks sees the same rows in the same order, and a run that was stopped continues with --resume
as if it had not been (bit for bit on CPU). Ends with exit code 130 or 143 when Ctrl-C or SIGTERM stopped it, after
saving; with 3 when a loss or gradient is not finite, without having updated anything with it.
"""

from typing import Literal

from nanochat.configurator import configure

# Run
run = "dummy"  # wandb run name; dummy = no wandb
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # what matmuls compute in; master weights are always fp32
compile = True  # torch.compile the blocks and the loss; without a C++ compiler the run is eager and says so
seed = 42  # of the weights and of the order of the rows
# Text
corpus: str | None = None  # directory name in $NANOCHAT_BASE_DIR/data (None = the only one there)
packing: Literal["bos", "flat"] = "bos"  # bos: every row starts with BOS, best fit; flat: one long stream cut into rows
# Model
depth = 20  # number of Transformer layers; width and heads follow from it
aspect_ratio = 64  # width / depth
head_dim: int | None = None  # channels per attention head (None = 128, or 64 for models narrower than 512)
kv_heads: int | None = None  # key/value heads (None = as many as query heads; fewer = grouped-query attention)
max_seq_len = 2048  # context in tokens
window_pattern = "L"  # tiled over the layers: L sees the full context, S half of it; the last layer is always L
# Horizon: at most one of these four; none = 20 tokens per parameter (Chinchilla)
num_iterations: int | None = None  # optimizer steps (the only one that changes the plan of a resumed run)
target_flops: float | None = None  # training FLOPs, for scaling laws
target_param_data_ratio: float | None = None  # tokens per parameter
minutes: float | None = (
    None  # training time, turned into steps once at the start; evaluation, saving and compiling not counted
)
# Batch
device_batch_size: int | Literal["auto"] = 32  # rows per rank and micro-batch (auto = the most that fit)
total_batch_size = (
    524288  # tokens per step over all ranks, by accumulating micro-batches (rounded to whole ones, which is printed)
)
# Optimizers
matrix_lr = 0.02  # Muon, for the matrices in the blocks
embedding_lr = 0.2  # AdamW, for the embedding; scales with (width / 768)^-0.5
unembedding_lr = 0.004  # AdamW, for the head; scales likewise
weight_decay = 0.0  # Muon's cautious weight decay; falls to 0 along a cosine
warmup_ratio = 0.0  # share of the run in which learning rates rise from 0
warmdown_ratio = 0.4  # share of the run in which they fall to final_lr_frac
final_lr_frac = 0.0  # where they end
skip_spikes = False  # no update by a step whose loss or gradient norm is 6 standard deviations too high
# Memory (python -m scripts.plan says what fits without)
shard = False  # FSDP2: weights, gradients and optimizer state in parts on all ranks; slower, same checkpoints
offload = False  # with --shard: these parts in the host's memory, and on the GPU only while they are used
recompute = False  # keep only each block's input, and compute the rest again in the backward pass; a third more FLOPs
# Evaluation
eval_every = 250  # steps between quick validations (-1 = never)
eval_tokens = 20 * 524288  # tokens of each validation, quick or final; a smaller validation set is scored whole
sample_every = 2000  # steps between samples (-1 = never)
core_metric_every = -1  # steps between evaluations of CORE (-1 = never); the tasks: nanochat.dataset --prefetch=eval
core_metric_max_per_task = 500  # items of each of its tasks
# Checkpoints
model_tag: str | None = None  # name of the checkpoint directory (None = d<depth>)
save_every = -1  # steps between checkpoints (-1 = only at the end)
save_minutes = -1.0  # minutes between checkpoints (-1 = by steps alone); both may be given
save_best = False  # save after each quick validation that is the best so far, and never delete that one
keep_last = -1  # checkpoints to keep, older ones are deleted (-1 = all)
resume = False  # continue from the newest whole checkpoint of this tag
resume_from_step: int | None = None  # continue from this step
fresh = False  # start over although this tag has checkpoints; they are kept under another name
settings = configure(__name__)

from collections.abc import Callable, Sequence
from typing import Any

from nanochat import train
from nanochat.checkpoint_manager import (
    checkpoint_path,
    find_resume,
    is_best,
    mark_best,
    restore_model,
    restore_optimizers,
    save_checkpoint,
)
from nanochat.common import Stopped, UserError, print0, run_main
from nanochat.compute import Compute, compute_cleanup, compute_init, peak_memory_bytes
from nanochat.core_eval import CoreTask, GPTScorer, evaluate_task, find_bundle, load_tasks
from nanochat.corpus import Corpus, iter_text, load_corpus
from nanochat.dataloader import Position, training_stream
from nanochat.engine import Sampling
from nanochat.gpt import GPT, config_from_depth
from nanochat.guard import SaveClock, SignalWatch, Spikes
from nanochat.loss_eval import BitsPerByte, evaluate_bpb, validation_windows
from nanochat.model import build_model
from nanochat.record import Record, open_record
from nanochat.schedule import BatchPlan, plan_batches, plan_horizon
from nanochat.sharding import held_bytes, placement
from nanochat.sizing import choose_device_batch
from nanochat.task_eval import mean_centred
from nanochat.tokenizer import Tokenizer, get_tokenizer

PROMPTS = (
    "The",
    "If the file does not exist,",
    "The capital of France is",
    "Once upon a time",
    "Returns the number of",
)


def main() -> None:
    compute = compute_init(device_type, dtype, seed)
    text, tokenizer = load_corpus(corpus), get_tokenizer()
    tag = model_tag or f"d{depth}"

    core_tasks = load_tasks(find_bundle()) if core_metric_every > 0 else []  # missing ones are found here

    # The model
    vocab_size = tokenizer.get_vocab_size()
    config = config_from_depth(depth, vocab_size, max_seq_len, aspect_ratio, head_dim, kv_heads, window_pattern)
    model = build_model(config, compute.device, seed, placement(compute, shard, offload))
    model.recompute = recompute
    flops = model.estimate_flops()
    heads = f"{config.n_head} heads of {config.head_dim}"
    print0(f"model {tag}: {depth} layers x {aspect_ratio} = width {config.n_embd}, {heads}, vocabulary {vocab_size:,}")
    print0(
        f"parameters: {model.num_params():,}, of them {model.num_matmul_params():,} in matmuls; {flops:,} FLOPs/token"
    )
    if compile:
        train.compile_model(model, compute.device)

    # The batch, and what a checkpoint and the run that continues it must agree on
    rows = choose_device_batch(device_batch_size, model, total_batch_size, max_seq_len, compute, compile)
    batch = plan_batches(total_batch_size, rows, max_seq_len, compute.world_size)
    print0(f"batch: {batch} (asked for {total_batch_size:,})")
    identity = {"model_config": model.config_dict(), "rows_per_step": batch.rows, "packing": packing, "seed": seed}
    identity |= {"corpus": text.fingerprint, "tokenizer": tokenizer.fingerprint}
    checkpoint = find_resume("base", tag, identity, resume, resume_from_step, fresh, compute)

    # The horizon: a run that goes on keeps its own, unless it is given a new number of steps
    if checkpoint and num_iterations is None:
        num_steps, formula = checkpoint.meta["num_steps"], "as planned at the start"
    else:
        num_steps, formula = plan_steps(model, text, tokenizer, batch, compute)
    tokens = num_steps * batch.tokens
    print0(f"horizon: {num_steps:,} steps, {tokens:,} tokens, {tokens * flops:.3g} FLOPs ({formula})")

    # Weights, optimizers, position: new or restored
    optimizers = model.setup_optimizers(matrix_lr, embedding_lr, unembedding_lr, weight_decay, compute.dtype)
    meter, spikes, position = train.Meter(flops, num_steps, compute), Spikes(), Position()
    if checkpoint:
        restore_model(model, checkpoint)
        restore_optimizers(optimizers, checkpoint)
        position = Position.from_json(train.restore_loop(checkpoint, meter, spikes))
        if meter.steps >= num_steps:
            print0(
                f"this run is finished; its score: python -m scripts.base_loss --model-tag={tag}; more steps: --resume "
                f"--num-iterations={2 * num_steps}"
            )
            compute_cleanup()
            return
    first_step = meter.steps
    record = open_record("base", tag, settings, **compute.about())
    record.write("corpus", name=text.name, fingerprint=text.fingerprint)
    record.write(
        "plan",
        first_step=first_step,
        num_steps=num_steps,
        formula=formula,
        batch=str(batch),
        parameters=model.num_params(),
        matmul_parameters=model.num_matmul_params(),
        flops_per_token=flops,
        parameter_bytes=held_bytes(model),
        optimizer_state_bytes=sum(optimizer.state_bytes() for optimizer in optimizers),
    )
    wandb_run = train.open_wandb(run, "base", settings, checkpoint)
    stream = open_stream(text, tokenizer, batch, compute, position)

    def save() -> None:
        """The state after the last whole step, whatever has happened since."""
        loop = train.loop_state(num_steps, position.to_json(), meter, spikes, wandb_run)
        meta = {**identity, **loop, "settings": settings}
        path = checkpoint_path("base", tag, meter.steps)
        save_checkpoint(path, model, optimizers, tokenizer, meta, compute, keep_last)

    clock = SaveClock(save_every, save_minutes, compute)
    with (
        SignalWatch(compute) as watch,
        train.whole_steps(f"base-{tag}", meter, model, optimizers, record, compute, save),
        train.progress_bar(num_steps, first_step) as bar,
    ):
        for step in range(first_step, num_steps):
            meter.start()
            sums = train.accumulate(model, stream, position, batch.grad_accum_steps, compute)
            rates = train.rates_at(step, num_steps, warmup_ratio, warmdown_ratio, final_lr_frac)
            result = train.update(optimizers, sums, rates, compute, watch.received, spikes, skip_spikes)
            position = sums.position
            logged = meter.tick(result)
            record.write("step", step=step, lr=round(rates.lr, 6), **logged)
            train.show_progress(bar, meter, logged)
            if wandb_run:
                wandb_run.log({"step": step, "lr": rates.lr, **logged, **meter.summary()})
            if result.stop_signal:
                raise Stopped(result.stop_signal)

            # Saves come before everything that may fail or take long.
            done = step + 1
            if clock.due(done) or done == num_steps:
                save()
            if train.every(eval_every, done) or (eval_every > 0 and done == num_steps):
                quick = validate(model, text, tokenizer, batch, compute, max_seq_len, watch.poll).bpb
                record.write("eval", step=done, val_bpb_quick=quick)
                print0(f"step {done:,}: quick val bpb {quick:.4f}")
                if save_best and is_best("base", tag, quick):
                    save()
                    mark_best("base", tag, done, quick, compute)
            if train.every(sample_every, done) or (sample_every > 0 and done == num_steps):
                show_samples(model, tokenizer, compute, record, done)
            if train.every(core_metric_every, done) or (core_metric_every > 0 and done == num_steps):
                evaluate_core(model, tokenizer, core_tasks, compute, record, done, watch)

    # The end: the honest validation, and the figures
    val = validate(model, text, tokenizer, batch, compute, stride=max(1, max_seq_len // 2))
    record.write("eval", step=num_steps, val_bpb=val.bpb, val_bpb_stderr=val.stderr, documents=val.documents)
    memory = peak_memory_bytes(compute.device)
    record.write("end", **meter.summary(), **spikes.summary(), peak_memory_bytes=memory, text=position.describe())
    print0(f"text: {position.describe()}")
    print0(
        f"speed: {train.describe_rates(meter)}, {meter.train_seconds:,.0f} s of training, {memory / 1e9:.1f} GB at most"
    )
    error = "" if val.stderr is None else f" +- {val.stderr:.4f}"
    print0(f"val bpb {val.bpb:.4f}{error} after {num_steps:,} steps, {val.documents:,} documents")
    if wandb_run:
        wandb_run.log({"step": num_steps, "val_bpb": val.bpb})
        wandb_run.finish()
    record.close()
    compute_cleanup()


def open_stream(
    text: Corpus, tokenizer: Tokenizer, batch: BatchPlan, compute: Compute, start: Position
) -> train.Stream[Position]:
    """The training rows of this rank, from a position on."""
    return training_stream(text.train, tokenizer, batch, compute, packing, seed, start)


def plan_steps(model: GPT, text: Corpus, tokenizer: Tokenizer, batch: BatchPlan, compute: Compute) -> tuple[int, str]:
    """The number of steps and where it comes from. For --minutes a few real steps are timed on the model and then
    undone.
    """
    horizons: dict[str, float | None] = {
        "num_iterations": num_iterations,
        "target_flops": target_flops,
        "target_param_data_ratio": target_param_data_ratio,
        "minutes": minutes,
    }
    given = {name: value for name, value in horizons.items() if value is not None and value != -1}
    if len(given) > 1 or any(value <= 0 for value in given.values()):
        flags = " ".join(f"--{name.replace('_', '-')}={value}" for name, value in given.items())
        raise UserError(f"{flags}: give at most one horizon, and more than 0")
    if minutes is None:
        horizon: dict[str, Any] = given or {"target_param_data_ratio": 20}
        return plan_horizon(batch.tokens, model.estimate_flops(), model.num_params(), **horizon)
    stream = open_stream(text, tokenizer, batch, compute, Position())
    num_steps, formula = train.steps_for_minutes(minutes, model, stream, batch, compute)
    model.init_weights(seed)
    return num_steps, formula


def validate(
    model: GPT,
    text: Corpus,
    tokenizer: Tokenizer,
    batch: BatchPlan,
    compute: Compute,
    stride: int,
    poll: Callable[[], None] | None = None,
) -> BitsPerByte:
    """Bits per byte of the first eval_tokens of validation: stride max_seq_len is quick, half of it the honest one.
    `poll` is called between batches and may end it.
    """
    windows = validation_windows(iter_text(text.val), tokenizer, max_seq_len, stride, eval_tokens)
    return evaluate_bpb(model, windows, tokenizer, compute, batch.device_batch_size, poll)


def evaluate_core(
    model: GPT,
    tokenizer: Tokenizer,
    tasks: Sequence[CoreTask],
    compute: Compute,
    record: Record,
    step: int,
    watch: SignalWatch,
) -> None:
    """CORE on some items of every task that the bundle has; called partial where it has not all."""
    scorer = GPTScorer(model, tokenizer, compute)
    here = [task for task in tasks if task.path.is_file()]
    scores = []
    for task in here:
        watch.poll()
        scores.append(evaluate_task(task, scorer, compute, core_metric_max_per_task))
    value, error = mean_centred((score.accuracy, score.stderr, score.baseline) for score in scores)
    partial = len(here) < len(tasks)
    record.write("core", step=step, value=value, stderr=error, partial=partial, tasks=[task.label for task in here])
    print0(f"step {step:,}: {'partial ' if partial else ''}CORE {value:.4f} +- {error:.4f} on {len(here)} tasks")


def show_samples(model: GPT, tokenizer: Tokenizer, compute: Compute, record: Record, step: int) -> None:
    """What the model writes after a few fixed beginnings; from rank 0, with a copy of the weights, called by all."""
    engine = train.engine_on_master(model, None, compute)
    if not engine:
        return
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, prepend="<|bos|>")
        samples, _ = engine.generate_batch([ids], Sampling(max_tokens=48, temperature=0.7, top_k=50))
        text = tokenizer.decode(samples[0])
        record.write("sample", step=step, prompt=prompt, text=text)
        print0(f"  {prompt!r} -> {text!r}")


if __name__ == "__main__":
    run_main(main)
