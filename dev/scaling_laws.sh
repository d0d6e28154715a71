#!/usr/bin/env bash
# Scaling laws: models of several depths, each trained with the same FLOPs, for several budgets. For each budget bits per byte have a
# minimum over depth, which says how many parameters and tokens such a budget is best spent on (Hoffmann et al., arXiv 2203.15556,
# approach 2). 24 runs of 1.1e20 FLOPs in all, as much as 2.8 d20; not yet timed.
#
#   bash dev/scaling_laws.sh
#   DRY_RUN=1 bash dev/scaling_laws.sh                     # what would run
#   BUDGETS="1e18" DEPTHS="6 8 10" bash dev/scaling_laws.sh
#
# Needs text and a tokenizer: STAGES=tok bash speedrun.sh. Rows that are finished are skipped. Ends with report/SERIES.csv.
# shellcheck disable=SC2046,SC2086 # $(row) and BASE_ARGS are several words, $(resume) is one or none
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
SERIES="${SERIES:-law}"
BUDGETS="${BUDGETS:-1e18 2e18 5e18 1e19}"
DEPTHS="${DEPTHS:-8 10 12 14 16 18}"
NPROC="${NPROC:-8}"
DEVICE_BATCH_SIZE="${DEVICE_BATCH_SIZE:-32}"
CORPUS="${CORPUS:-climbmix}"
WANDB_RUN="${WANDB_RUN:-dummy}"
BASE_ARGS="${BASE_ARGS:-}"

STAGES="${STAGES-base report}"
source dev/stages.sh
enter_venv
read -ra ranks <<<"${LAUNCHER:-torchrun --standalone --nproc_per_node=$NPROC}"

row() { echo "--depth=$depth --target-flops=$budget"; }

for budget in $BUDGETS; do
  for depth in $DEPTHS; do
    tag="$SERIES-$budget-d$depth"
    something_ran="" # rows do not depend on each other
    stage base "base_train_$tag" "${ranks[@]}" -m scripts.base_train -- \
      $(row) --device-batch-size="$DEVICE_BATCH_SIZE" --corpus="$CORPUS" \
      --model-tag="$tag" --keep-last=1 --sample-every=-1 --run="$WANDB_RUN" $BASE_ARGS $(resume base "$tag")
  done
done
stage report "$SERIES" python -m dev.series_table --prefix="$SERIES-"
