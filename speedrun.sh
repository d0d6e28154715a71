#!/usr/bin/env bash
# The speedrun: a 561 M parameter chat model (d20) on one node of 8xH100. Not yet timed with this code; nanochat's published run of the
# same size took 3 h 51 min, about $100.
#
#   bash speedrun.sh
#   WANDB_RUN=speedrun NPROC=8 bash speedrun.sh        # log to Weights & Biases
#   screen -L -Logfile speedrun.log -S speedrun bash speedrun.sh
#
# It is also the table of contents of the project: read it, then scripts/base_train.py, then nanochat/gpt.py.
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1 # eight ranks share the cores; their loaders each use one
NPROC="${NPROC:-8}"             # GPUs
WANDB_RUN="${WANDB_RUN:-dummy}" # dummy = no wandb

bash dev/setup.sh
source .venv/bin/activate
source dev/stage.sh # stage: run, log, skip what is finished, stop at the first failure

# -----------------------------------------------------------------------------
# Text for the tokenizer: 8 shards of about 250 M characters (100 MB compressed) hold the 2 B characters it trains on.
# Then, in the background, the text for the model:
#   561 M parameters x 20 tokens per parameter (Chinchilla) = 11.2 B tokens
#   11.2 B tokens x about 4.8 characters per token          = 54 B characters
#   54 B characters / 250 M per shard                       = 216 shards, 240 with a reserve; 24 GB on disk
stage text python -m nanochat.dataset -n 8

# -----------------------------------------------------------------------------
# Tokenizer: 65,536 tokens (2^16, so that ids fit 16 bits), nine of them special.
stage tok_train python -m scripts.tok_train --max-chars=2000000000 --vocab-size=65536
stage tok_eval python -m scripts.tok_eval
stage more_text python -m nanochat.dataset -n 240
stage task_data python -m nanochat.dataset --prefetch=tasks # for the chat stages: no GPU is to wait for a download

# -----------------------------------------------------------------------------
# Base model. depth 20 -> width 20 x 64 = 1,280, 10 heads of 128.
#   parameters: 2 x 65,536 x 1,280 (embedding, head) + 20 x 12 x 1,280^2 (blocks) = 561 M
#   batch: 32 rows x 2,048 tokens x 8 GPUs = 524,288 tokens, no accumulation
#   horizon: 20 x 561 M / 524,288 = 21,400 steps
# A run that was stopped goes on from its last checkpoint; a finished one has nothing to do.
stage base_train torchrun --standalone --nproc_per_node="$NPROC" -m scripts.base_train -- \
  --depth=20 --target-param-data-ratio=20 --device-batch-size=32 --save-every=2000 --keep-last=2 \
  --run="$WANDB_RUN" $(resume base d20)
stage base_loss torchrun --standalone --nproc_per_node="$NPROC" -m scripts.base_loss -- --model-tag=d20 --no-baselines

# -----------------------------------------------------------------------------
# Midtraining: conversations, multiple choice, arithmetic with a tool, spelling; 849,000 of them, all tokens, one epoch. Words
# and conversations about the model itself are made here.
stage words python -m dev.gen_words --min-count=20
stage identity python -m dev.gen_identity
stage mid_train torchrun --standalone --nproc_per_node="$NPROC" -m scripts.mid_train -- \
  --model-tag=d20 --device-batch-size=32 --run="$WANDB_RUN" $(resume mid d20)
stage mid_eval torchrun --standalone --nproc_per_node="$NPROC" -m scripts.chat_eval -- -i mid --model-tag=d20

# SFT: 22,000 conversations, what the assistant says in them, one epoch.
stage chat_sft torchrun --standalone --nproc_per_node="$NPROC" -m scripts.chat_sft -- \
  --model-tag=d20 --run="$WANDB_RUN" $(resume chatsft d20)
stage sft_eval torchrun --standalone --nproc_per_node="$NPROC" -m scripts.chat_eval -- -i sft --model-tag=d20

# RL on GSM8K: 7,000 problems, 16 a step, 16 answers to each.
stage chat_rl torchrun --standalone --nproc_per_node="$NPROC" -m scripts.chat_rl -- \
  --model-tag=d20 --run="$WANDB_RUN" $(resume chatrl d20)
stage rl_eval torchrun --standalone --nproc_per_node="$NPROC" -m scripts.chat_eval -- -i rl -a GSM8K --model-tag=d20

# -----------------------------------------------------------------------------
python -m scripts.chat_cli --model-tag=d20 -p "Why is the sky blue?"
python -m nanochat.report generate
echo Talk to it, after: source .venv/bin/activate, with: python -m scripts.chat_web
