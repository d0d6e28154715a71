#!/usr/bin/env bash
# The first hour on a card: does all run there, which kernels compute attention, how fast are training and decoding, as a page.
# Not yet run on a card.
#
#   bash dev/gpu_day.sh                     # writes docs/reference/gpu.md
#   bash dev/gpu_day.sh ../nanochat         # with karpathy/nanochat (92d63d4) beside it
#   DRY_RUN=1 bash dev/gpu_day.sh           # what would run; so does --dry-run
#   DEPTHS=12 ROWS=4,8 bash dev/gpu_day.sh  # on a card of 24 GB
#
# The page has a section for each part, also for one that failed: the next runs all the same. What finished on this card with this commit
# is not run again. Logs, traces and text are in gpu_day/ of $NANOCHAT_BASE_DIR.
set -euo pipefail
DRY_RUN="${DRY_RUN:-}" PEER=""
[ "${1:-}" != --dry-run ] || { DRY_RUN=1 && shift; }
case "${1:-}" in "" | -*) ;; *) PEER="$(realpath -m "$1")" && shift ;; esac
cd "$(dirname "$0")/.."
DEPTHS="${DEPTHS:-12 20}"          # models, of the shapes that base_train gives them
ROWS="${ROWS:-8,16,32}"            # rows of a step, as many batches; but for training alone, the last
CONTEXT="${CONTEXT:-2048}"         # tokens of a row
VOCAB_SIZE="${VOCAB_SIZE:-32768}"  # tokens of the vocabulary: nanochat's
BATCHES="${BATCHES:-1,8,32,128}"   # continuations that are decoded at once
DEVICE_TYPE="${DEVICE_TYPE:-cuda}" # cpu: to try this script, in small; the page stays with the logs
source dev/stages.sh
[ -z "$PEER" ] || [ -f "$PEER/scripts/base_train.py" ] || mistake "$PEER has no scripts/base_train.py; name a checkout of nanochat"
[ "$DEVICE_TYPE$DRY_RUN" != cuda ] || [ -e /dev/kfd ] || command -v nvidia-smi >/dev/null ||
  mistake "no GPU here, for there is no nvidia-smi and no /dev/kfd; take a machine with one, or DRY_RUN=1 to see what would run"
[ -n "${NANOCHAT_VENV:-}$DRY_RUN" ] || { bash dev/setup.sh dev && NANOCHAT_VENV="$PWD/.venv"; } # dev: what the tests need
enter_venv

card="$DEVICE_TYPE" commit="$(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
git diff --quiet HEAD -- nanochat scripts dev 2>/dev/null || commit+=-changed
[ "$DEVICE_TYPE$DRY_RUN" != cuda ] ||
  card="$(python -c 'import torch; print(torch.cuda.get_device_name(), "with torch", torch.__version__)' 2>/dev/null)" ||
  mistake "torch sees no GPU; python -m scripts.doctor says why"
export NANOCHAT_BASE_DIR="$NANOCHAT_BASE_DIR/gpu_day/$commit-${card//[^A-Za-z0-9.]/-}" # nothing of yours is touched
[ -n "$DRY_RUN" ] || mkdir -p "$NANOCHAT_BASE_DIR/logs"
PAGE="$PWD/docs/reference/gpu.md"
[ "$DEVICE_TYPE" = cuda ] || PAGE="$NANOCHAT_BASE_DIR/gpu.md"

parts=() failed=()
part() { # NAME COMMAND...: runs for at most 20 minutes; the page has what is there so far
  local name="$1" out="$NANOCHAT_BASE_DIR/$1" code
  parts+=("$1") && shift
  if [ -n "$DRY_RUN" ]; then
    echo "== $name: would run $*"
    [ -z "${VIRTUAL_ENV:-}" ] || [ "$name" = tests ] || python -m dev.check_settings "$@" || exit
    return
  elif [ "0 $*" = "$(cat "$out.end" 2>/dev/null)" ]; then
    echo "== $name: finished earlier"
  else
    say "$name: $*"
    set +e
    timeout --foreground -k 10 20m "$@" 2>&1 | (trap '' HUP INT TERM && exec tee "$out.log")
    code=${PIPESTATUS[0]}
    set -e
    [ -z "$stopped" ] || exit "$stopped"
    echo "$code $*" >"$out.end"
    [ "$code" -eq 0 ] || { failed+=("$name") && say "$name: ended with exit code $code"; }
  fi
  python -m dev.gpu_page --folder="$NANOCHAT_BASE_DIR" --parts="${parts[*]}" --about="$card, commit $commit" --page="$PAGE" >/dev/null ||
    failed+=(page)
}
each() { # NAME COMMAND...: a part for each depth
  local name="$1" depth
  shift
  for depth in $DEPTHS; do part "$name-d$depth" "${@//DEPTH/$depth}" --depth="$depth" --device-type="$DEVICE_TYPE"; done
}

most="${ROWS##*,}"
part doctor python -m scripts.doctor # attention of all kernels beside fp64 on a CPU, the compiler, ranks
part tests python -m pytest -q tests/test_gpu.py
each attention python -m dev.bench_attention --max-seq-len="$CONTEXT" --device-batch-size="$most"
each training python -m scripts.bench --max-seq-len="$CONTEXT" --rows="$ROWS" --vocab-size="$VOCAB_SIZE"
each profile python -m scripts.bench --max-seq-len="$CONTEXT" --rows="$most" --vocab-size="$VOCAB_SIZE" \
  --profile="$NANOCHAT_BASE_DIR/profile-dDEPTH.json"
each decoding python -m dev.bench_infer --vocab-size="$VOCAB_SIZE" --batches="$BATCHES" --dtype=bfloat16 ${PEER:+--peer="$PEER"}
if [ -n "$PEER" ]; then # dev/bench_train.py races on a CPU alone, so nanochat's own base_train says how fast it is
  part text python -m nanochat.dataset --source=docs
  part tokenizer python -m scripts.tok_train --vocab-size="$VOCAB_SIZE"
  each beside-ours python -m scripts.bench --data=real --max-seq-len="$CONTEXT" --rows="$most"
  each beside-nanochat python -m dev.peer_pace --peer="$PEER" --max-seq-len="$CONTEXT" --device-batch-size="$most"
fi
[ -n "$DRY_RUN" ] || echo "== written to $PAGE${failed[*]:+; failed: ${failed[*]}, which run again when this does}"
[ ${#failed[@]} -eq 0 ]
