# shellcheck shell=bash
# Sourced by dev/miniseries.sh and dev/scaling_laws.sh: the settings that all runs of a series have, and train_row, which trains one.
# shellcheck disable=SC2046,SC2086 # RANKS and BASE_ARGS are several words, $(resume) is one or none
NPROC="${NPROC:-8}"
DEVICE_BATCH_SIZE="${DEVICE_BATCH_SIZE:-32}"
CORPUS="${CORPUS:-climbmix}"
WANDB_RUN="${WANDB_RUN:-dummy}"
export OMP_NUM_THREADS=1

source dev/stages.sh
enter_venv
RANKS="${LAUNCHER:-torchrun --standalone --nproc_per_node=$NPROC}"

train_row() { # TAG SETTINGS...: a base model of the series, unless it is finished
  TAG="$1"
  something_ran="" # rows do not depend on each other
  stage base "base_train_$TAG" $RANKS -m scripts.base_train -- \
    "${@:2}" --device-batch-size="$DEVICE_BATCH_SIZE" --corpus="$CORPUS" \
    --model-tag="$TAG" --keep-last=1 --sample-every=-1 --run="$WANDB_RUN" ${BASE_ARGS:-} $(resume base)
}
