#!/usr/bin/env bash
# The miniseries: one model of each depth, each trained for 20 tokens per parameter, as one table. It shows whether a change helps at every
# size and not at one alone. d10 to d20 take 9e19 FLOPs, as much as 2.3 d20; not yet timed.
#
#   bash dev/miniseries.sh
#   DRY_RUN=1 bash dev/miniseries.sh                                       # what would run
#   SERIES=lr0.03 BASE_ARGS="--matrix-lr=0.03" bash dev/miniseries.sh      # another series, for comparison
#
# Needs text and a tokenizer: STAGES=tok bash speedrun.sh. Rows that are finished are skipped. Ends with report/SERIES.csv.
# shellcheck disable=SC2046,SC2086 # $(row) and BASE_ARGS are several words, $(resume) is one or none
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
SERIES="${SERIES:-mini}"
DEPTHS="${DEPTHS:-10 12 14 16 18 20}"
NPROC="${NPROC:-8}"
DEVICE_BATCH_SIZE="${DEVICE_BATCH_SIZE:-32}"
CORPUS="${CORPUS:-climbmix}"
WANDB_RUN="${WANDB_RUN:-dummy}"
BASE_ARGS="${BASE_ARGS:-}"
CORE_ARGS="${CORE_ARGS:---max-per-task=500}"

STAGES="${STAGES-base eval report}"
source dev/stages.sh
enter_venv
read -ra ranks <<<"${LAUNCHER:-torchrun --standalone --nproc_per_node=$NPROC}"

row() { echo "--depth=$depth"; }

for depth in $DEPTHS; do
  tag="$SERIES-d$depth"
  something_ran="" # rows do not depend on each other
  stage base "base_train_$tag" "${ranks[@]}" -m scripts.base_train -- \
    $(row) --target-param-data-ratio=20 --device-batch-size="$DEVICE_BATCH_SIZE" --corpus="$CORPUS" \
    --model-tag="$tag" --save-every=2000 --keep-last=1 --sample-every=-1 --run="$WANDB_RUN" $BASE_ARGS $(resume base "$tag")
  trained base "$tag" && stage eval "base_eval_$tag" "${ranks[@]}" -m scripts.base_eval -- --model-tag="$tag" $CORE_ARGS
done
stage report "$SERIES" python -m dev.series_table --prefix="$SERIES-"
