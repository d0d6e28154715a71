#!/usr/bin/env bash
# The speedrun: a 561 M parameter base model (d20) on one node of 8xH100. Not yet timed with this code; nanochat's published run of the
# same size took 3 h 51 min with its chat stages, about $100.
#
#   bash speedrun.sh
#   WANDB_RUN=speedrun NPROC=8 bash speedrun.sh        # log to Weights & Biases
#   screen -L -Logfile speedrun.log -S speedrun bash speedrun.sh
#
# It is also the table of contents of the project: read it, then scripts/base_train.py, then nanochat/gpt.py.
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1 # eight ranks share the cores; their loaders each use one
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
NPROC="${NPROC:-8}"             # GPUs
WANDB_RUN="${WANDB_RUN:-dummy}" # dummy = no wandb

bash dev/setup.sh
source .venv/bin/activate

# -----------------------------------------------------------------------------
# Text for the tokenizer: 8 shards of about 250 M characters (100 MB compressed) hold the 2 B characters it trains on.
# Then, in the background, the text for the model:
#   561 M parameters x 20 tokens per parameter (Chinchilla) = 11.2 B tokens
#   11.2 B tokens x about 4.8 characters per token          = 54 B characters
#   54 B characters / 250 M per shard                       = 216 shards, 240 with a reserve; 24 GB on disk
python -m nanochat.dataset -n 8

# -----------------------------------------------------------------------------
# Tokenizer: 65,536 tokens (2^16, so that ids fit 16 bits), nine of them special.
if [ ! -f "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json" ]; then
  python -m scripts.tok_train --max-chars=2000000000 --vocab-size=65536
fi
python -m scripts.tok_eval
python -m nanochat.dataset -n 240

# -----------------------------------------------------------------------------
# Base model. depth 20 -> width 20 x 64 = 1,280, 10 heads of 128.
#   parameters: 2 x 65,536 x 1,280 (embedding, head) + 20 x 12 x 1,280^2 (blocks) = 561 M
#   batch: 32 rows x 2,048 tokens x 8 GPUs = 524,288 tokens, no accumulation
#   horizon: 20 x 561 M / 524,288 = 21,400 steps
# A run that was stopped goes on from its last checkpoint; a finished one has nothing to do.
resume=""
if compgen -G "$NANOCHAT_BASE_DIR/base_checkpoints/d20/step_*/meta.json" >/dev/null; then
  resume="--resume"
fi
torchrun --standalone --nproc_per_node="$NPROC" -m scripts.base_train -- \
  --depth=20 --target-param-data-ratio=20 --device-batch-size=32 --save-every=2000 --run="$WANDB_RUN" $resume
torchrun --standalone --nproc_per_node="$NPROC" -m scripts.base_loss -- --model-tag=d20 --no-baselines

# -----------------------------------------------------------------------------
python -m scripts.chat_cli --source=base --model-tag=d20 -p "The capital of France is"
python -m nanochat.report generate
