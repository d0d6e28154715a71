# shellcheck shell=bash
# For the files beside it, which source it from the checkout's root: one root for everything that is written, and what a job needs.
#
#   NANOCHAT_BASE_DIR=/scratch/$USER/nanochat    required; on a file system that login and compute nodes share
#   MODULES="python/3.12 cuda/12.6"              environment modules to load, if the cluster has them
#   STAGES, DEPTH, TAG, CORPUS, SHARDS, ...      as in speedrun.sh
#   PIPELINE=run1000.sh                          another launcher than speedrun.sh (then SHARDS=800 as well)

case "${1:-}" in -h | --help) source dev/stages.sh ;; esac # which answers, and ends the script
if [ -z "${NANOCHAT_BASE_DIR:-}" ]; then
  echo "NANOCHAT_BASE_DIR is not set; name a directory that all nodes share: export NANOCHAT_BASE_DIR=/scratch/\$USER/nanochat" >&2
  exit 2
fi
case "$NANOCHAT_BASE_DIR/" in
  "$PWD"/* | [!/~]*)
    echo "NANOCHAT_BASE_DIR=$NANOCHAT_BASE_DIR lies in the checkout, of which each job takes a copy; name another directory" >&2
    exit 2
    ;;
esac

source dev/stages.sh
CORPUS="${CORPUS:-climbmix}"
SHARDS="${SHARDS:-240}"
TAG="${TAG:-d${DEPTH:-20}}"
export CORPUS SHARDS

# Every cache, whatever the site's profile says: home directories have quotas, and compute nodes may not write there.
export XDG_CACHE_HOME="$NANOCHAT_BASE_DIR/cache"
export HF_HOME="$XDG_CACHE_HOME/huggingface"
export TORCHINDUCTOR_CACHE_DIR="$XDG_CACHE_HOME/inductor"
export TRITON_CACHE_DIR="$XDG_CACHE_HOME/triton"
export UV_CACHE_DIR="$XDG_CACHE_HOME/uv"
export PIP_CACHE_DIR="$XDG_CACHE_HOME/pip"
export WANDB_DIR="$NANOCHAT_BASE_DIR"

load_modules() {
  local file
  [ -n "${MODULES:-}" ] || return 0
  set +u # they read variables that are not set
  for file in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh /etc/profile.d/z00_lmod.sh; do
    # shellcheck source=/dev/null
    command -v module >/dev/null || [ ! -f "$file" ] || source "$file"
  done
  command -v module >/dev/null || mistake "MODULES=\"$MODULES\", but this machine has no module command; unset MODULES"
  # shellcheck disable=SC2086 # several modules
  module load $MODULES || mistake "module load $MODULES failed; look for their names with: module avail"
  set -u
}

fetch_everything() { .venv/bin/python -m nanochat.dataset --prefetch=all --source="$CORPUS" -n "$SHARDS"; }

# Everything that a job needs and cannot fetch: a line for each thing that is missing, exit code 2 where one is.
preflight() {
  local missing
  missing="$(missing_inputs)"
  if [ ! -x .venv/bin/python ]; then
    missing+="${missing:+$'\n'}$PWD/.venv, without which the data cannot be looked at; make it with: bash dev/slurm/setup_hpc.sh"
  elif ! .venv/bin/python -m nanochat.dataset --prefetch=list --source="$CORPUS" -n "$SHARDS"; then
    missing+="${missing:+$'\n'}the data listed above; get it on a node with internet: bash dev/slurm/prefetch.sh"
  fi
  [ -z "$missing" ] || mistake "missing:"$'\n'"$missing"
}
