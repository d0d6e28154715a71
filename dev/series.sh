# shellcheck shell=bash
# Sourced by dev/miniseries.sh and dev/scaling_laws.sh, after they have set STAGES and row(), which says in what a run differs from the
# others: the settings that all runs of a series have, and train_row, which trains one base model.
# shellcheck disable=SC2046,SC2086 # $(row) and BASE_ARGS are several words, $(resume) is one or none
NPROC="${NPROC:-8}"
DEVICE_BATCH_SIZE="${DEVICE_BATCH_SIZE:-32}"
CORPUS="${CORPUS:-climbmix}"
WANDB_RUN="${WANDB_RUN:-dummy}"
BASE_ARGS="${BASE_ARGS:-}"
export OMP_NUM_THREADS=1

source dev/stages.sh
enter_venv
read -ra ranks <<<"${LAUNCHER:-torchrun --standalone --nproc_per_node=$NPROC}"

# train_row TAG: a base model of the series, unless it is finished.
train_row() {
  local tag="$1"
  something_ran="" # rows do not depend on each other
  stage base "base_train_$tag" "${ranks[@]}" -m scripts.base_train -- \
    $(row) --device-batch-size="$DEVICE_BATCH_SIZE" --corpus="$CORPUS" \
    --model-tag="$tag" --keep-last=1 --sample-every=-1 --run="$WANDB_RUN" $BASE_ARGS $(resume base "$tag")
}
