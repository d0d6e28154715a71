#!/usr/bin/env bash
# From nothing to a model that you can talk to, on a laptop without a GPU and without internet (once installed), in 15 minutes or as many
# as you give it.
#
#   bash dev/runcpu.sh                      # English documentation that is already on this machine
#   MINUTES=45 bash dev/runcpu.sh           # a better model
#   CORPUS=climbmix bash dev/runcpu.sh      # pretrain on web text instead (about 1 GB to download)
#   STAGES="sft eval" bash dev/runcpu.sh    # some of: tok base mid sft rl eval report
#   DRY_RUN=1 bash dev/runcpu.sh            # what would run
#
# NANOCHAT_BASE_DIR says where everything goes (default ~/.cache/nanochat). A stage that is finished is skipped on the next call, one that
# was stopped goes on.
# shellcheck disable=SC2046 # $(resume) is a word or none
set -euo pipefail
cd "$(dirname "$0")/.."
TAG=laptop
CORPUS="${CORPUS:-docs}"      # what the base model reads
MINUTES="${MINUTES:-15}"      # for everything but the installation
source dev/stages.sh # STAGES="sft eval report" runs a part of them

# Text, compiling, trial steps and evaluations take about 4 minutes, whatever the budget. The rest is shared out over the stages that
# train, each of which turns its minutes into steps at the pace of this machine.
[[ "$MINUTES" =~ ^[1-9][0-9]{0,5}$ && "$MINUTES" -gt 4 ]] || mistake "MINUTES=$MINUTES: expected a whole number, 5 to 999999"
share() { echo "$(((MINUTES - 4) * $1 / 100)).$(printf '%02d' $(((MINUTES - 4) * $1 % 100)))"; } # PERCENT
BASE="$(share 28)" MID="$(share 33)" SFT="$(share 25)" RL="$(share 14)"
echo "plan for MINUTES=$MINUTES: train base for $BASE, mid for $MID, SFT for $SFT, RL for $RL; 4 for everything else"
check_inputs
enter_venv

# 1. Text. docs: about 20 MB of documentation strings of Python and its libraries. Questions about it are part of the chat stages,
#    whatever the base model reads; so are words to spell and conversations about the model itself, which are made here.
stage tok,base,mid,sft docs python -m nanochat.dataset --source=docs
if [ "$CORPUS" != docs ]; then
  stage tok,base text python -m nanochat.dataset --source="$CORPUS" -n 2
fi
stage mid,sft,eval words python -m dev.gen_words --corpus=docs
stage mid,sft,eval identity python -m dev.gen_identity

# 2. Tokenizer. 4,096 tokens and not 65,536: at this size the head would be 90 % of the arithmetic.
stage tok tok_train python -m scripts.tok_train --corpus="$CORPUS" --vocab-size=4096 --max-chars=100000000
stage tok tok_eval python -m scripts.tok_eval --corpus="$CORPUS"

# 3. Base model, then its score against byte frequencies and xz -9.
stage base base_train python -m scripts.base_train dev/configs/fast.py --minutes="$BASE" --corpus="$CORPUS" --model-tag=laptop $(resume base)
stage eval base_loss python -m scripts.base_loss --corpus="$CORPUS" --model-tag=laptop --split-tokens=262144

# 4. Chat: the format, spelling and arithmetic with a tool; then answers alone; then harder problems by trial and error.
stage mid mid_train python -m scripts.mid_train dev/configs/laptop_mid.py --minutes="$MID" --model-tag=laptop $(resume mid)
stage eval mid_eval python -m scripts.chat_eval -i mid -a offline --model-tag=laptop --max-new-tokens=128
stage sft chat_sft python -m scripts.chat_sft dev/configs/laptop_sft.py --minutes="$SFT" --model-tag=laptop $(resume sft)
stage eval sft_eval python -m scripts.chat_eval -i sft -a offline --model-tag=laptop --max-new-tokens=128
stage rl chat_rl python -m scripts.chat_rl dev/configs/laptop_rl.py --minutes="$RL" --model-tag=laptop $(resume rl)
stage eval rl_eval python -m scripts.chat_eval -i rl -a offline --model-tag=laptop --max-new-tokens=128

# 5. Who is it? And the report.
trained sft && stage report hello python -m scripts.chat_cli --model-tag=laptop -p "Who are you?" </dev/null
stage report report python -m nanochat.report generate ${DOLLARS_PER_HOUR:+--dollars-per-hour="$DOLLARS_PER_HOUR"}
! trained sft || echo Talk to it, after: source .venv/bin/activate, with: python -m scripts.chat_web
