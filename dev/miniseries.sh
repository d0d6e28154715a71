#!/usr/bin/env bash
# The miniseries: one model of each depth, each trained for 20 tokens per parameter, as one table. It shows whether a change helps at every
# size and not at one alone. d10 to d20 take 9e19 FLOPs, as much as 2.3 d20; not yet timed.
#
#   bash dev/miniseries.sh
#   DRY_RUN=1 bash dev/miniseries.sh                                       # what would run
#   SERIES=lr0.03 BASE_ARGS="--matrix-lr=0.03" bash dev/miniseries.sh      # another series, for comparison
#
# Needs text and a tokenizer: STAGES=tok bash speedrun.sh. Rows that are finished are skipped. Ends with report/SERIES.csv.
# NPROC, DEVICE_BATCH_SIZE, CORPUS and WANDB_RUN are those of speedrun.sh; BASE_ARGS are more settings of base_train.
# shellcheck disable=SC2086 # RANKS and CORE_ARGS are several words
set -euo pipefail
cd "$(dirname "$0")/.."
SERIES="${SERIES:-mini}"                     # name of the table, and first part of the tags
DEPTHS="${DEPTHS:-10 12 14 16 18 20}"        # a model for each
CORE_ARGS="${CORE_ARGS:---max-per-task=500}" # settings of base_eval
STAGES="${STAGES-base eval report}"
source dev/series.sh # NPROC, DEVICE_BATCH_SIZE, CORPUS, WANDB_RUN, BASE_ARGS; train_row

for depth in $DEPTHS; do
  train_row "$SERIES-d$depth" --depth="$depth" --target-param-data-ratio=20 --save-every=2000
  trained base && stage eval "base_eval_$TAG" $RANKS -m scripts.base_eval -- --model-tag="$TAG" $CORE_ARGS
done
stage report "$SERIES" python -m dev.series_table --prefix="$SERIES-"
