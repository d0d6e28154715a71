#!/usr/bin/env bash
# From nothing to a model that writes, on a laptop without a GPU and without internet (once installed): about 10 minutes on two cores.
#
#   bash dev/runcpu.sh                      # English documentation that is already on this machine
#   CORPUS=climbmix bash dev/runcpu.sh      # web text instead (about 1 GB to download)
#
# NANOCHAT_BASE_DIR says where everything goes (default ~/.cache/nanochat). A stage that is finished is skipped on the next call,
# one that was stopped goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
bash dev/setup.sh
source .venv/bin/activate
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
CORPUS="${CORPUS:-docs}"

# 1. Text. docs: about 15 MB of documentation strings of Python and its libraries; the laptop reads less than half of it in 6 minutes.
if [ "$CORPUS" = docs ]; then
  python -m nanochat.dataset --source=docs
else
  python -m nanochat.dataset --source="$CORPUS" -n 2
fi

# 2. Tokenizer. 4,096 tokens and not 65,536: at this size the head would be 90 % of the arithmetic.
if [ ! -f "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json" ]; then
  python -m scripts.tok_train --corpus="$CORPUS" --vocab-size=4096 --max-chars=100000000
fi
python -m scripts.tok_eval --corpus="$CORPUS"

# 3. Base model, then its score against byte frequencies and xz -9.
resume=""
if compgen -G "$NANOCHAT_BASE_DIR/base_checkpoints/laptop/step_*/meta.json" >/dev/null; then
  resume="--resume"
fi
python -m scripts.base_train dev/configs/laptop.py --corpus="$CORPUS" --model-tag=laptop $resume
python -m scripts.base_loss --corpus="$CORPUS" --model-tag=laptop --split-tokens=262144

# 4. What it writes, and the report.
python -m scripts.chat_cli --source=base --model-tag=laptop -p "Return the number of"
python -m nanochat.report generate
