#!/usr/bin/env bash
# The speedrun: a 561 M parameter chat model (d20) on one node of 8xH100. Not yet timed with this code; nanochat's published run of the
# same size took 3 h 51 min, about $100.
#
#   bash speedrun.sh
#   WANDB_RUN=speedrun bash speedrun.sh                # log to Weights & Biases
#   NPROC=4 DEVICE_BATCH_SIZE=auto bash speedrun.sh    # four GPUs, of whatever memory
#   STAGES="sft rl eval report" bash speedrun.sh       # some of: tok base mid sft rl eval report
#   SFT_ARGS="--save-best" bash speedrun.sh            # more settings for one stage
#   DRY_RUN=1 bash speedrun.sh                         # what would run
#   screen -L -Logfile speedrun.log -S speedrun bash speedrun.sh
#
# It is also the table of contents of the project: read it, then scripts/base_train.py, then nanochat/gpt.py. The other launchers
# (run1000.sh, launch_6x_amd_xtx.sh, dev/slurm/job.slurm) set the variables below and call it.
# shellcheck disable=SC2046,SC2086 # RANKS and the ARGS are several words or none
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1 # the ranks share the cores; their loaders each use one

DEPTH="${DEPTH:-20}"                                # the one dial
TAG="${TAG:-d$DEPTH}"                               # name of the checkpoints
NPROC="${NPROC:-8}"                                 # GPUs of this node
DEVICE_BATCH_SIZE="${DEVICE_BATCH_SIZE:-32}"        # rows per GPU; auto = the most that fit
TOTAL_BATCH_SIZE="${TOTAL_BATCH_SIZE:-524288}"      # tokens per step; fewer GPUs take more micro-batches for it
HORIZON="${HORIZON:---target-param-data-ratio=20}"  # tokens per parameter, as in Chinchilla; for a trial --num-iterations=100
CORPUS="${CORPUS:-climbmix}"                        # web text; or fineweb-edu
SHARDS="${SHARDS:-240}"                             # files of it
VOCAB_SIZE="${VOCAB_SIZE:-65536}"                   # 2^16, so that ids fit 16 bits
WANDB_RUN="${WANDB_RUN:-dummy}"                     # dummy = no wandb
MEMORY_ARGS="${MEMORY_ARGS:-}"                      # --shard, --recompute for a model that does not fit (scripts/plan.py)
# More settings for one stage, which win over those below: BASE_ARGS CORE_ARGS MID_ARGS SFT_ARGS RL_ARGS EVAL_ARGS.

# From here on `stage base base_train COMMAND` runs a command when STAGES has base in it, with its output in logs/base_train.log too.
# What is finished is skipped, what was stopped goes on from its last checkpoint, and the first failure ends the script.
source dev/stages.sh
check_inputs
enter_venv
[ -n "${DRY_RUN:-}" ] || DRY_RUN=1 bash speedrun.sh >/dev/null # a wrong setting of the last stage ends the run now, not in hours
RANKS="${LAUNCHER:-torchrun --standalone --nproc_per_node=$NPROC}" # starts a process for each GPU

# -----------------------------------------------------------------------------
# Text. What d20 takes:
#   561 M parameters x 20 tokens per parameter       = 11.2 B tokens
#   11.2 B tokens x about 4.8 characters per token   = 54 B characters
#   54 B characters / 250 M per shard                = 216 shards, 240 with a reserve; 100 MB each on disk, 24 GB in all
# What the later stages read comes now as well: no GPU is to wait for a download. To have the text before that, on any machine:
# python -m nanochat.dataset -n 240
stage tok,base text python -m nanochat.dataset --source="$CORPUS" -n "$SHARDS"
stage mid,sft,rl,eval task_data python -m nanochat.dataset --prefetch=tasks
stage eval core_data python -m nanochat.dataset --prefetch=eval

# -----------------------------------------------------------------------------
# Tokenizer: 65,536 tokens, nine of them special, from 2 B characters, which are the first 8 shards.
stage tok tok_train python -m scripts.tok_train --corpus="$CORPUS" --max-chars=2000000000 --vocab-size="$VOCAB_SIZE"
stage tok tok_eval python -m scripts.tok_eval --corpus="$CORPUS"

# -----------------------------------------------------------------------------
# Base model. depth 20 -> width 20 x 64 = 1,280, 10 heads of 128.
#   parameters: 2 x 65,536 x 1,280 (embedding, head) + 20 x 12 x 1,280^2 (blocks) = 561 M
#   batch: 32 rows x 2,048 tokens x 8 GPUs = 524,288 tokens, no accumulation
#   horizon: 20 x 561 M / 524,288 = 21,400 steps
stage base base_train $RANKS -m scripts.base_train -- \
  --depth="$DEPTH" "$HORIZON" --device-batch-size="$DEVICE_BATCH_SIZE" --total-batch-size="$TOTAL_BATCH_SIZE" \
  --corpus="$CORPUS" --model-tag="$TAG" --save-every=2000 --keep-last=2 --run="$WANDB_RUN" \
  $MEMORY_ARGS ${BASE_ARGS:-} $(resume base)
stage eval base_loss $RANKS -m scripts.base_loss -- \
  --corpus="$CORPUS" --model-tag="$TAG" --device-batch-size="$DEVICE_BATCH_SIZE" --no-baselines
stage eval base_eval $RANKS -m scripts.base_eval -- --model-tag="$TAG" ${CORE_ARGS:-}

# -----------------------------------------------------------------------------
# Midtraining: conversations, multiple choice, arithmetic with a tool, spelling; 849,000 of them, all tokens, one epoch. Words
# and conversations about the model itself are made here.
stage mid,sft,eval words python -m dev.gen_words --corpus="$CORPUS" --min-count=20
stage mid,sft,eval identity python -m dev.gen_identity
stage mid mid_train $RANKS -m scripts.mid_train -- \
  --model-tag="$TAG" --device-batch-size="$DEVICE_BATCH_SIZE" --total-batch-size="$TOTAL_BATCH_SIZE" --run="$WANDB_RUN" \
  $MEMORY_ARGS ${MID_ARGS:-} $(resume mid)
trained mid && stage eval mid_eval $RANKS -m scripts.chat_eval -- -i mid --model-tag="$TAG" ${EVAL_ARGS:-}

# SFT: 22,000 conversations, what the assistant says in them, one epoch.
stage sft chat_sft $RANKS -m scripts.chat_sft -- --model-tag="$TAG" --run="$WANDB_RUN" $MEMORY_ARGS ${SFT_ARGS:-} $(resume sft)
trained sft && stage eval sft_eval $RANKS -m scripts.chat_eval -- -i sft --model-tag="$TAG" ${EVAL_ARGS:-}

# RL on GSM8K: 7,000 problems, 16 a step, 16 answers to each.
stage rl chat_rl $RANKS -m scripts.chat_rl -- --model-tag="$TAG" --run="$WANDB_RUN" ${RL_ARGS:-} $(resume rl)
trained rl && stage eval rl_eval $RANKS -m scripts.chat_eval -- -i rl -a GSM8K --model-tag="$TAG" ${EVAL_ARGS:-}

# -----------------------------------------------------------------------------
trained sft && stage report hello python -m scripts.chat_cli --model-tag="$TAG" -p "Why is the sky blue?" </dev/null
stage report report python -m nanochat.report generate ${DOLLARS_PER_HOUR:+--dollars-per-hour=$DOLLARS_PER_HOUR}
! trained sft || echo Talk to it, after: source .venv/bin/activate, with: python -m scripts.chat_web
