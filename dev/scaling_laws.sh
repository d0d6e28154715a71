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
# NPROC, DEVICE_BATCH_SIZE, CORPUS and WANDB_RUN are those of speedrun.sh; BASE_ARGS are more settings of base_train.
set -euo pipefail
cd "$(dirname "$0")/.."
SERIES="${SERIES:-law}"                  # name of the table, and first part of the tags
BUDGETS="${BUDGETS:-1e18 2e18 5e18 1e19}" # FLOPs
DEPTHS="${DEPTHS:-8 10 12 14 16 18}"     # a model for each, of each budget
STAGES="${STAGES-base report}"
source dev/series.sh # NPROC, DEVICE_BATCH_SIZE, CORPUS, WANDB_RUN, BASE_ARGS; train_row

for budget in $BUDGETS; do
  for depth in $DEPTHS; do
    train_row "$SERIES-$budget-d$depth" --depth="$depth" --target-flops="$budget"
  done
done
stage report "$SERIES" python -m dev.series_table --prefix="$SERIES-"
