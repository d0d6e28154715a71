"""Pretrain a base model on a corpus.

    python -m scripts.base_train dev/configs/laptop.py --minutes=5
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20 --target-param-data-ratio=20

One dial: --depth decides width, heads and parameters. The run is a function of its settings, the corpus and the
tokenizer, and a run that was stopped continues with --resume as if it had not been (bit for bit on CPU). Exit codes:
130, 143 after a signal, with everything saved; 3 for a loss or gradient that is not finite, with nothing updated.
"""

from typing import Literal

from nanochat.configurator import Amount, Fraction, Interval, Minutes, Natural, Positive, Rate, Seed, Share, configure

# Run
run = "dummy"  # wandb run name; dummy = no wandb
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of matmuls; master weights are always fp32
compile = True  # torch.compile the blocks and the loss; without a C++ compiler the run is eager and says so
seed: Seed = 42  # of the weights and of the order of the rows
# Text
corpus: str | None = None  # directory name in $NANOCHAT_BASE_DIR/data (None = the only one there)
packing: Literal["bos", "flat"] = "bos"  # bos: every row starts with BOS, best fit; flat: one long stream cut into rows
# Model
arch: Literal["gpt", "fast", "gpt2", "llama"] = "gpt"  # architecture, by its file in nanochat/
depth: Positive = 20  # number of Transformer layers; width and heads follow from it
aspect_ratio: Positive = 64  # width / depth
head_dim: Positive | None = None  # channels per attention head (None = 128, or 64 for models narrower than 512)
kv_heads: Positive | None = None  # key/value heads (None = as many as query heads; fewer = grouped-query attention)
max_seq_len: Positive = 2048  # context in tokens
window_pattern: str | None = None  # tiled over the layers: L full context, S half of it; the last is L (None = L)
positions: Literal["learned", "alibi"] | None = None  # of a gpt2: a table, or ALiBi (None = learned)
bias: bool | None = None  # of a gpt2: biases in linear layers and norms (None = true)
dropout: Share | None = None  # of a gpt2: of embeddings, and of what attention and MLP add (None = 0)
init_from: str | None = None  # weights to start from: a Hugging Face folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl
eval_only = False  # score the first weights on the validation text, and end
# Horizon: at most one of these four; none = 20 tokens per parameter (Chinchilla)
num_iterations: Positive | None = None  # optimizer steps (the only one that changes the plan of a resumed run)
target_flops: Amount | None = None  # training FLOPs, for scaling laws
target_param_data_ratio: Amount | None = None  # tokens per parameter
ratio_counts: Literal["all", "matmuls"] = "all"  # parameters of the ratio: all, or without the embedding (nanochat: 12)
minutes: Amount | None = None  # training time, turned into steps once; evaluation, saving, compiling not counted
# Batch
device_batch_size: Positive | Literal["auto"] = 32  # rows per rank and micro-batch (auto = the most that fit)
total_batch_size: Positive = 524288  # tokens per step over all ranks, rounded to whole micro-batches
# Optimizers
optimizer: Literal["muon", "adamw"] = "muon"  # muon: Muon and AdamW at three rates; adamw: for everything, at one, lr
lr: Rate = 6e-4  # with --optimizer=adamw alone, and so are beta1 and beta2 (GPT-2's, for 124 M parameters)
beta1: Fraction = 0.9  # of its first moment
beta2: Fraction = 0.95  # of its second
matrix_lr: Rate = 0.02  # Muon, for the matrices in the blocks
embedding_lr: Rate = 0.2  # AdamW, for the embedding; scales with (width / 768)^-0.5
unembedding_lr: Rate = 0.004  # AdamW, for the head; scales likewise
weight_decay: Rate = 0.0  # Muon's, cautious, falls to 0 along a cosine; adamw's stays, of all but vectors (GPT-2: 0.1)
schedule: Literal["trapezoid", "cosine", "linear", "constant", "wsd", "range"] = "trapezoid"  # nanochat/schedule.py
warmup_ratio: Share = 0.0  # share of the run in which learning rates rise from 0
warmdown_ratio: Share = 0.4  # share of the run in which they fall to final_lr_frac; cosine and linear: all the rest
final_lr_frac: Share = 0.0  # where they end
clip: Literal["global", "parameter", "normalize"] = "global"  # whose gradient's norm is at most, or becomes, clip_norm
clip_norm: Amount | None = None  # None = gradients stay as they are (GPT-2: 1.0)
skip_spikes = False  # no update by a step whose loss or gradient norm is 6 standard deviations too high
# Memory (python -m scripts.plan says what fits without)
shard = False  # FSDP2: weights, gradients and optimizer state in parts on all ranks; slower, same checkpoints
offload = False  # with --shard: these parts in the host's memory, and on the GPU only while they are used
recompute = False  # keep only each block's input, and compute the rest again in the backward pass; a third more FLOPs
# Evaluation
eval_every: Interval = 250  # steps between quick validations (-1 = never)
eval_tokens: Positive = 20 * 524288  # tokens of each validation, quick or final; less text is scored whole
eval_train = False  # with each quick validation score as much of the training text
sample_every: Interval = 2000  # steps between samples (-1 = never)
core_metric_every: Interval = -1  # steps between CORE scores (-1 = never); its tasks: nanochat.dataset --prefetch=eval
core_metric_max_per_task: Interval = 500  # items of each of its tasks (-1 = all)
# Checkpoints
model_tag: str | None = None  # name of the checkpoint directory (None = d<depth>)
save_every: Interval = -1  # steps between checkpoints (-1 = only at the end)
save_minutes: Minutes = -1.0  # minutes between checkpoints (-1 = by steps alone); both may be given
save_best = False  # save after each quick validation that is the best so far, and never delete that one
keep_last: Interval = -1  # checkpoints to keep, older ones are deleted (-1 = all)
dry_run = False  # train, but write no checkpoint
resume = False  # continue from the newest whole checkpoint of this tag
resume_from_step: Natural | None = None  # continue from this step
fresh = False  # start over although this tag has checkpoints; they are kept under another name
settings = configure(__name__)

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

from nanochat.adamw import AdamW
from nanochat.common import UserError, print0, run_main
from nanochat.compute import Compute, compute_cleanup, compute_init
from nanochat.configurator import GIVEN
from nanochat.core_eval import CoreTask, GPTScorer, find_bundle, load_tasks, mean_centred, score_task
from nanochat.corpus import Corpus, Shards, load_corpus
from nanochat.dataloader import Position, training_stream
from nanochat.loss_eval import BitsPerByte, evaluate_bpb, validation_windows
from nanochat.model import LanguageModel, build_model, choose_config
from nanochat.muon import Muon
from nanochat.run import Run, open_run
from nanochat.schedule import BatchPlan, plan_batches, plan_horizon
from nanochat.sharding import is_sharded, placement
from nanochat.sizing import choose_device_batch
from nanochat.tokenizer import Tokenizer, get_tokenizer
from nanochat.train import (
    Spikes,
    Stream,
    accumulate,
    agree,
    compile_model,
    complete,
    every,
    fits,
    rates_at,
    steps_for_minutes,
    update,
)

STARTS = ("The", "If the file does not exist,", "The capital of France is", "Once upon a time", "Returns the number of")


def main() -> None:
    for name in sorted(GIVEN & {"lr", "beta1", "beta2"}) if optimizer == "muon" else ():
        print0(f"warning: {name} changes nothing without --optimizer=adamw")
    if eval_only and (resume or resume_from_step is not None):
        raise UserError("--eval-only scores the first weights; those of a checkpoint: python -m scripts.base_loss")
    compute = compute_init(device_type, dtype, seed)
    text = load_corpus(corpus)
    tokenizer = get_tokenizer(text.path)
    core_tasks = load_tasks(find_bundle()) if core_metric_every > 0 else []  # missing ones are found here

    # The model
    V = tokenizer.get_vocab_size()
    shape = {"head_dim": head_dim, "kv_heads": kv_heads, "window_pattern": window_pattern}
    shape |= {"positions": positions, "bias": bias, "dropout": dropout}
    if init_from:
        shape |= {name: settings[name] for name in ("arch", "depth", "aspect_ratio") if name in GIVEN}
        weights = import_module("nanochat.hf_import").open_weights(init_from, V, max_seq_len, **shape)
        model = build_model(weights.config, compute.device, place=placement(compute, shard, offload))
        weights.load_into(model)
    else:
        config = choose_config(arch, depth, V, max_seq_len, aspect_ratio=aspect_ratio, **shape)
        model = build_model(config, compute.device, seed, placement(compute, shard, offload))
    config, tag = model.config, model_tag or f"d{model.config.n_layer}"
    model.recompute = recompute
    flops = model.estimate_flops()
    heads = f"{config.n_head} heads of {config.n_embd // config.n_head}"
    width = f"x {aspect_ratio} = width" if not init_from else f"of {init_from}, width"
    print0(f"model {tag}: {config.n_layer} layers {width} {config.n_embd}, {heads}, vocabulary {config.vocab_size:,}")
    print0(f"parameters: {model.num_params():,}, {model.num_matmul_params():,} in matmuls; {flops:,} FLOPs/token")
    if compile:
        compile_model(model, compute.device)

    # The batch, and what a checkpoint and the run that continues it must agree on
    of_batch = (device_batch_size, model, total_batch_size, max_seq_len)
    device_rows = choose_device_batch(*of_batch, compute, compile, optimizer == "adamw")
    batch = plan_batches(total_batch_size, device_rows, max_seq_len, compute.world_size)
    print0(f"batch: {batch} (asked for {total_batch_size:,})")

    def validate(shards: Shards, stride: int, poll: Callable[[], None] | None = None) -> BitsPerByte:
        """Bits per byte of the first eval_tokens: stride max_seq_len is quick, half of it the honest one."""
        windows = validation_windows(shards, tokenizer, max_seq_len, stride, eval_tokens)
        return evaluate_bpb(model, windows, tokenizer, compute, batch.device_batch_size, poll)

    if eval_only:
        val = validate(text.val, stride=max(1, max_seq_len // 2))
        nats = val.figures(0.0)["val_nats"]
        print0(f"val bpb {val.bpb:.4f}, {nats:.4f} nats per token, {val.tokens:,} tokens, {val.documents:,} documents")
        compute_cleanup()
        return
    identity = {"model_config": model.config_dict(), "rows_per_step": batch.rows, "packing": packing, "seed": seed}
    identity |= {"corpus": text.fingerprint, "tokenizer": tokenizer.fingerprint}

    with open_run("base", tag, settings, identity, compute) as run:
        num_steps, formula = run.horizon or plan_steps(model, text, tokenizer, batch, compute)
        tokens = num_steps * batch.tokens
        print0(f"horizon: {num_steps:,} steps, {tokens:,} tokens, {tokens * flops:.3g} FLOPs ({formula})")
        optimizers, spikes = make_optimizers(model, compute), Spikes(compute.dtype)
        run.begin(model, optimizers, tokenizer, num_steps, spikes, formula=formula, batch=str(batch))
        if run.is_finished:
            print0(f"its score: python -m scripts.base_loss --model-tag={tag}")
            return
        run.record.write("corpus", name=text.name, fingerprint=text.fingerprint)
        stream = open_stream(text, tokenizer, batch, compute, Position.from_json(run.position))

        for step in run.steps():
            sums = accumulate(model, stream, batch.grad_accum_steps, compute, spikes.scale)
            agreed = agree(sums, run.watch.received, optimizers, compute)  # raises on every rank or on none
            rates = rates_at(step, num_steps, warmup_ratio, warmdown_ratio, final_lr_frac, schedule)
            result = update(optimizers, agreed, rates, compute, spikes, skip_spikes, (clip, clip_norm))
            run.end_step(result, sums.position, lr=round(rates.lr, 6))  # records it, saves when that is due

            done = step + 1
            if every(eval_every, done, num_steps):
                quick = validate(text.val, max_seq_len, run.watch.poll)
                print0(f"step {done:,}: quick val bpb {quick.bpb:.4f}")
                run.evaluated(quick.bpb, val_bpb_quick=quick.bpb, **quick.figures(run.meter.smooth_loss))
                if eval_train:
                    seen = validate(text.train, max_seq_len, run.watch.poll)
                    shares = {"accuracy": seen.right / seen.tokens, "exact": seen.exact / seen.documents}
                    run.record.write("eval_train", step=done, bpb=seen.bpb, **shares)
                    print0(f"  tokens right: {quick.right / quick.tokens:.1%}, {shares['accuracy']:.1%} in training")
            if every(sample_every, done, num_steps):
                show_samples(model, tokenizer, compute, run)
            if every(core_metric_every, done, num_steps):
                evaluate_core(model, tokenizer, core_tasks, compute, run)

        # The end: the honest validation, and the figures
        val = validate(text.val, stride=max(1, max_seq_len // 2))
        about = {"val_bpb": val.bpb, "val_bpb_stderr": val.stderr, "documents": val.documents}
        run.record.write("eval", step=num_steps, **about, **val.figures(run.meter.smooth_loss))
        run.finish(sums.position.describe(), val_bpb=val.bpb)
        error = "" if val.stderr is None else f" +- {val.stderr:.4f}"
        print0(f"val bpb {val.bpb:.4f}{error} after {num_steps:,} steps, {val.documents:,} documents")


def open_stream(text: Corpus, tokenizer: Tokenizer, batch: BatchPlan, compute: Compute, start: Position) -> Stream:
    """The training rows of this rank, from a position on."""
    return training_stream(text.train, tokenizer, batch, compute, packing, seed, start)


def plan_steps(
    model: LanguageModel, text: Corpus, tokenizer: Tokenizer, batch: BatchPlan, compute: Compute
) -> tuple[int, str]:
    """The number of steps and where it comes from. For --minutes real steps are timed that change nothing."""
    if minutes is None:
        counted = batch.tokens, model.estimate_flops(), model.ratio_params(ratio_counts)
        return plan_horizon(*counted, num_iterations, target_flops, target_param_data_ratio)
    stream = open_stream(text, tokenizer, batch, compute, Position())
    gradients = partial(accumulate, model, stream, batch.grad_accum_steps, compute)
    return steps_for_minutes(minutes, make_optimizers(model, compute), gradients, compute)


def make_optimizers(model: LanguageModel, compute: Compute) -> list[AdamW | Muon]:
    """As the settings say."""
    if optimizer == "adamw":
        return model.setup_adamw(lr, weight_decay, (beta1, beta2))
    return model.setup_optimizers(matrix_lr, embedding_lr, unembedding_lr, weight_decay, compute.dtype)


def evaluate_core(
    model: LanguageModel, tokenizer: Tokenizer, tasks: Sequence[CoreTask], compute: Compute, run: Run
) -> None:
    """CORE on some items of every task that the bundle has; called partial where it has not all."""
    scorer = GPTScorer(model, tokenizer, compute)
    here = [task for task in tasks if task.path.is_file()]
    scores = []
    for task in here:
        run.watch.poll()
        scores.append(score_task(task, scorer, compute, core_metric_max_per_task))
    value, error = mean_centred((score.accuracy, score.stderr, score.baseline) for score in scores)
    partial, labels = len(here) < len(tasks), [task.label for task in here]
    run.record.write("core", step=run.done, value=value, stderr=error, partial=partial, tasks=labels)
    print0(f"step {run.done:,}: {'partial ' if partial else ''}CORE {value:.4f} +- {error:.4f} on {len(here)} tasks")


def show_samples(model: LanguageModel, tokenizer: Tokenizer, compute: Compute, run: Run) -> None:
    """The likeliest text after a few fixed beginnings; from rank 0, with a copy of the weights, called by all."""
    copy = model.inference_copy(compute.dtype) if compute.is_master or is_sharded(model) else None
    if not copy or not compute.is_master:
        return
    for prompt in STARTS:
        try:
            ids = tokenizer.encode(prompt, prepend="<|bos|>")
        except UserError as error:  # a character that the text has not
            print0(f"  {prompt!r}: skipped, {error}")
            continue
        if not fits(ids, model, prompt):
            continue
        text = tokenizer.decode(complete(copy, ids, 48, compute.dtype))
        run.record.write("sample", step=run.done, prompt=prompt, text=text)
        print0(f"  {prompt!r} -> {text!r}")


if __name__ == "__main__":
    run_main(main)
