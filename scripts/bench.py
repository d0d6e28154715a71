"""Time training steps: milliseconds, tokens per second, FLOP/s and MFU, for one batch or a sweep over several.

    python -m scripts.bench --depth=12 --max-seq-len=1024 --rows=8,16,32 --accumulation=1,4
    python -m scripts.bench --depth=4 --max-seq-len=256 --profile=trace.json    # chrome://tracing or ui.perfetto.dev
    torchrun --standalone --nproc_per_node=8 -m scripts.bench -- --depth=20

A step is base_train's: the same functions accumulate, agree and update. Settings with a name of base_train's mean the
same there; the optimizers have their usual rates. The first three steps, in which things are compiled, are not counted.
Nothing is saved. The last line is one JSON object, of the fastest batch.
"""

from typing import Literal

from nanochat.configurator import Positive, Seed, Several, configure

# Run
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of matmuls; master weights are always fp32
compile = True  # torch.compile the blocks and the loss; without a C++ compiler the run is eager and says so
seed: Seed = 42  # of weights and tokens
# Tokens
data: Literal["random", "real"] = "random"  # real: the corpus through the tokenizer and the loader of base_train
corpus: str | None = None  # of real ones: directory name in $NANOCHAT_BASE_DIR/data (None = the only one there)
vocab_size: Positive = 65536  # of random ones; real ones have the tokenizer's
# Model
arch: Literal["gpt", "fast", "gpt2", "llama"] = "gpt"  # architecture, by its file in nanochat/
depth: Positive = 12  # number of Transformer layers; width and heads follow from it
aspect_ratio: Positive = 64  # width / depth
head_dim: Several | None = None  # channels per attention head (None = 128, or 64 for models narrower than 512)
kv_heads: Positive | None = None  # key/value heads (None = as many as query heads; fewer = grouped-query attention)
max_seq_len: Positive = 2048  # context in tokens
window_pattern: str | None = None  # tiled over the layers: L full context, S half of it; the last is L (None = L)
recompute = False  # keep only each block's input, and compute the rest again in the backward pass
optimizer: Literal["muon", "adamw"] = "muon"  # muon: Muon and AdamW; adamw: for everything
# Batches: every pair of these
rows = "16"  # rows per rank and micro-batch: one number, or several with commas between
accumulation = "1"  # micro-batches per step, likewise
steps: Positive = 10  # that are timed of each batch
# Output
csv: str | None = None  # file for a line per batch
profile: str | None = None  # file for torch.profiler's trace of the last step of the last batch; prints the costliest
settings = configure(__name__)

import io
import itertools
import json
from collections.abc import Iterator
from csv import DictWriter
from pathlib import Path
from typing import Any

import torch

from nanochat.common import UserError, print0, run_main
from nanochat.compute import Compute, compute_cleanup, compute_init, device_name, peak_memory_bytes, synchronize
from nanochat.corpus import load_corpus
from nanochat.dataloader import training_stream
from nanochat.files import write_atomic
from nanochat.model import LanguageModel, build_model, choose_config
from nanochat.record import Meter, StepResult
from nanochat.schedule import BatchPlan
from nanochat.sizing import find_card
from nanochat.tokenizer import get_tokenizer
from nanochat.train import Rates, Spikes, Stream, accumulate, agree, compile_model, update

FLAT = Rates(lr=1.0, momentum=0.95, weight_decay=0.0)
CPU_FLOPS = 1e11  # per second, in fp32 by two cores or so, give or take a factor of two
HEAD = f"{'rows':>5} {'accumulation':>12} {'ms/step':>9} {'tokens/s':>11} {'GFLOP/s':>10} {'MFU':>6} {'peak GB':>8}"


def main() -> None:
    pairs = [*itertools.product(numbers("rows", rows), numbers("accumulation", accumulation))]
    compute = compute_init(device_type, dtype, seed)
    V = get_tokenizer(load_corpus(corpus).path).get_vocab_size() if data == "real" else vocab_size
    shape = {"aspect_ratio": aspect_ratio, "head_dim": head_dim, "kv_heads": kv_heads, "window_pattern": window_pattern}
    config = choose_config(arch, depth, V, max_seq_len, **shape)
    print0(HEAD)
    results = []
    for i, (B, count) in enumerate(pairs):
        batch = BatchPlan(B, max_seq_len, compute.world_size, count)
        results.append(measure(config, batch, compute, profile if i == len(pairs) - 1 else None))
        print0(line_of(results[-1]))
    if csv and compute.is_master:
        write_csv(Path(csv), results)
    print0(json.dumps(max(results, key=lambda result: result["tokens_per_second"] or 0)))
    compute_cleanup()


def numbers(name: str, text: str) -> list[int]:
    """The whole numbers of a setting like 4,8,16. Raises UserError for anything else."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--{name}={text}: expected whole numbers from 1 on with commas between, such as 4,8,16")
    return [int(word) for word in words]


def measure(config: Any, batch: BatchPlan, compute: Compute, trace: str | None) -> dict[str, Any]:
    """Figures of one batch; without times where it does not fit on the GPU."""
    torch.compiler.reset()  # each batch has all of dynamo's graphs to itself
    if compute.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of a CPU the peak is that of the process so far
    figures: dict[str, Any] = {"rows": batch.device_batch_size, "accumulation": batch.grad_accum_steps}
    figures |= {"tokens_per_step": batch.tokens}
    try:
        meter = time_steps(config, batch, compute, trace)
    except torch.OutOfMemoryError:
        meter = None
    summary = meter.summary() if meter else {}
    names = ("tokens_per_second", "flops_per_second", "mfu")
    ms = round(1000 * meter.timed_seconds / meter.timed_steps, 2) if meter else None
    memory = round(peak_memory_bytes(compute.device) / 1e9, 3)
    return {**figures, "ms_per_step": ms, **{name: summary.get(name) for name in names}, "peak_gb": memory}


def time_steps(config: Any, batch: BatchPlan, compute: Compute, trace: str | None) -> Meter:
    """Some steps of a new model, of which the meter counts those after the first three."""
    model = build_model(config, compute.device, seed)
    model.recompute = recompute
    if compile:
        compile_model(model, compute.device)
    adamw = optimizer == "adamw"
    optimizers = model.setup_adamw() if adamw else model.setup_optimizers(dtype=compute.dtype)
    stream, spikes = open_stream(model, batch, compute), Spikes(compute.dtype)
    if compute.device.type == "cpu":
        warn_of_hours(model.estimate_flops() * batch.tokens * (Meter.SKIP + steps))
    card = find_card(device_name(compute.device))
    meter = Meter(model.estimate_flops(), steps, card and card.tflops * 1e12 * compute.world_size)

    def step() -> StepResult:
        sums = accumulate(model, stream, batch.grad_accum_steps, compute, spikes.scale)
        result = update(optimizers, agree(sums, 0, optimizers, compute), FLAT, compute, spikes)
        synchronize(compute.device)
        return result

    for _ in range(Meter.SKIP + steps):
        meter.start()
        meter.tick(step())
    if trace:
        with torch.profiler.profile() as profiler:  # of all activities that this build of torch can see
            step()
        if compute.is_master:
            profiler.export_chrome_trace(trace)
            sort = "self_cpu_time_total" if compute.device.type == "cpu" else "self_device_time_total"
            print0(profiler.key_averages().table(sort_by=sort, row_limit=12, max_name_column_width=40))
    return meter


def warn_of_hours(flops: int) -> None:
    """The defaults are for a GPU; a CPU would be silent for an hour before the first line of the table."""
    minutes = flops / CPU_FLOPS / 60
    if minutes > 2:
        way = "shorter: --depth=4 --max-seq-len=256 --vocab-size=4096, or fewer --rows and --steps"
        print0(f"{flops:.1e} FLOPs to time this batch: {minutes:,.0f} minutes of a CPU that does 100 GFLOP/s; {way}")


def open_stream(model: LanguageModel, batch: BatchPlan, compute: Compute) -> Stream:
    """Micro-batches of this rank: base_train's, or one of random tokens again and again."""
    if data == "real":
        text = load_corpus(corpus)
        packing = "flat" if text.train.tokens.get("document", 0) is None else "bos"  # a .bin file is one stream of ids
        return training_stream(text.train, get_tokenizer(text.path), batch, compute, packing, seed)

    def again() -> Iterator[tuple[torch.Tensor, torch.Tensor, Any]]:
        generator = torch.Generator().manual_seed(seed + compute.rank)
        shape = (batch.device_batch_size, batch.sequence_len + 1)
        tokens = torch.randint(model.config.vocab_size, shape, generator=generator).to(compute.device)
        while True:
            yield tokens[:, :-1], tokens[:, 1:], None

    return again()


def line_of(figures: dict[str, Any]) -> str:
    """One batch as a line of the table."""
    start = f"{figures['rows']:5} {figures['accumulation']:12}"
    if figures["ms_per_step"] is None:
        return f"{start} does not fit"
    mfu = "-" if figures["mfu"] is None else f"{figures['mfu']:.1%}"
    speed = (
        f"{figures['ms_per_step']:9.2f} {figures['tokens_per_second']:11,} {figures['flops_per_second'] / 1e9:10,.1f}"
    )
    return f"{start} {speed} {mfu:>6} {figures['peak_gb']:8.2f}"


def write_csv(path: Path, results: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = DictWriter(text, list(results[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    write_atomic(path, text.getvalue())
    print0(f"written to {path}")


if __name__ == "__main__":
    run_main(main)
