#!/usr/bin/env bash
# The $1,000 model: d32, 1.9 B parameters, on one node of 8xH100. Not yet run with this code; nanochat's published run took about 42 h and
# reached a CORE score of 0.31 (GPT-2 1.6 B has 0.2565).
#
#   WANDB_RUN=run1000 bash run1000.sh
#
# Stages and variables are those of speedrun.sh (bash speedrun.sh --help). What differs:
#   parameters: 2 x 65,536 x 2,048 (embedding, head) + 32 x 12 x 2,048^2 (blocks) = 1.88 B
#   batch: 8 rows fit into 80 GB; 8 x 2,048 x 8 GPUs = 131,072 tokens, so 4 micro-batches for 524,288
#   text: 20 x 1.88 B = 37.6 B tokens x about 4.8 characters = 180 B characters / 250 M per shard = 722 shards, 800 with a reserve; 80 GB
#   horizon: 20 x 1.88 B / 524,288 = 71,680 steps; a checkpoint every 2,000 is one every 70 minutes
set -euo pipefail
cd "$(dirname "$0")"
source dev/stages.sh # answers --help
export DEPTH="${DEPTH:-32}" DEVICE_BATCH_SIZE="${DEVICE_BATCH_SIZE:-8}" SHARDS="${SHARDS:-800}"
exec bash speedrun.sh
