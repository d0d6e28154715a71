"""Supervised fine-tuning: teach a model to answer, on what the assistant says in conversations and nothing else.

    python -m scripts.chat_sft dev/configs/laptop_sft.py
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --device-batch-size=4 --run=sft

The loop, which midtraining shares, is nanochat/finetune.py. A run that was stopped continues with --resume.

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
device_batch_size: int | Literal["auto"] = 4  # rows per rank and micro-batch (auto = the most that fit)
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
skip_spikes = False  # no update by a step whose loss or gradient norm is 6 standard deviations too high
# Memory
shard = False  # FSDP2: weights, gradients and optimizer state in parts on all ranks; slower, same checkpoints
offload = False  # with --shard: these parts in the host's memory, and on the GPU only while they are used
recompute = False  # keep only each block's input, and compute the rest again in the backward pass; a third more FLOPs
# Evaluation
eval_every = 100  # steps between validations on held-out conversations (-1 = only at the end)
# Checkpoints
save_every = -1  # steps between checkpoints (-1 = only at the end)
save_minutes = -1.0  # minutes between checkpoints (-1 = by steps alone); both may be given
save_best = False  # save after each validation that is the best so far, and never delete that one
keep_last = -1  # checkpoints to keep, older ones are deleted (-1 = all)
resume = False  # continue from the newest whole checkpoint of this tag
resume_from_step: int | None = None  # continue from this step
fresh = False  # start over although this tag has checkpoints; they are kept under another name
settings = configure(__name__)

from nanochat.common import run_main
from nanochat.finetune import fine_tune
from tasks.mixtures import SAMPLES, sft_mixture


def main() -> None:
    name = str(settings["mixture"])
    fine_tune(
        "sft", settings, sft_mixture(name, "train"), sft_mixture(name, "dev"), all_tokens=False, questions=SAMPLES
    )


if __name__ == "__main__":
    run_main(main)
