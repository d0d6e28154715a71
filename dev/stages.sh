# shellcheck shell=bash
# For the launchers, which source it: run the stages of a pipeline one after the other.
#
#   STAGES="base mid"                 switches: the groups of stages to run, with spaces or commas between; all where it is not set
#   DRY_RUN=1                         say what would run, and run nothing
#   on base mid                       whether one of these is switched on
#   stage SWITCH NAME COMMAND...      run a stage if SWITCH (or one of "base mid") is on, and append its output to logs/NAME.log in
#                                     $NANOCHAT_BASE_DIR. One that is finished is skipped, until an earlier one had to run again; the
#                                     first that fails ends the script with its exit code
#   trained STAGE TAG                 whether there is a checkpoint: STAGE is base, mid, chatsft or chatrl
#   resume STAGE TAG                  "--resume" where there is one to go on from
#   check_inputs TAG                  exit code 2 where a stage that is switched on lacks what one that is not would have made
#   enter_venv                        make the environment and enter it, or enter $NANOCHAT_VENV as it is
#
# A stage is finished when logs/NAME.done holds its command line; delete the file to run it again. What does not change a result is not
# part of it: the launcher with its number of ranks, --run and --resume. logs/run.log has a line with the time for each beginning and end.

export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
export PYTHONUNBUFFERED=1 # the log is to be complete when a stage is killed
something_ran=""

mistake() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# -----------------------------------------------------------------------------
# Switches

SWITCHES="tok base mid sft rl eval report"
STAGES="${STAGES-$SWITCHES}"
STAGES="${STAGES//,/ }"
for word in $STAGES; do
  [[ " $SWITCHES " == *" $word "* ]] || mistake "STAGES=\"$STAGES\": there is no $word, only: $SWITCHES"
done
[ -n "${STAGES// /}" ] || mistake "STAGES is empty, so there is nothing to run; name some of: $SWITCHES"
if [[ ! "${DOLLARS_PER_HOUR:-0}" =~ ^[0-9]+(\.[0-9]+)?$ ]]; then
  mistake "DOLLARS_PER_HOUR=$DOLLARS_PER_HOUR: expected a number such as 2.5, the price of one GPU"
fi
if ! mkdir -p "$NANOCHAT_BASE_DIR/logs" 2>/dev/null; then
  mistake "NANOCHAT_BASE_DIR=$NANOCHAT_BASE_DIR cannot be written to; name another directory"
fi

on() {
  local word
  for word; do
    [[ " $STAGES " != *" $word "* ]] || return 0
  done
  return 1
}

trained() { compgen -G "$NANOCHAT_BASE_DIR/$1_checkpoints/$2/step_*/meta.json" >/dev/null; }

resume() { if trained "$1" "$2"; then echo "--resume"; fi; }

missing_inputs() { # TAG
  if on base && ! on tok && [ ! -f "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json" ]; then
    echo "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json, which base starts from; add tok to STAGES"
  fi
  need mid base base "$1"
  need sft mid mid "$1"
  need rl sft chatsft "$1"
  need eval base base "$1"
}

need() { # SWITCH, the one before, the directory of its checkpoints, TAG
  if on "$1" && ! on "$2" && ! trained "$3" "$4"; then
    echo "a checkpoint in $NANOCHAT_BASE_DIR/$3_checkpoints/$4, which $1 starts from; add $2 to STAGES"
  fi
}

check_inputs() { # TAG
  local missing
  missing="$(missing_inputs "$1")"
  [ -z "$missing" ] || mistake "missing: ${missing//$'\n'/; }"
}

# Not in a pipeline, nor in $( ): a subshell would keep the activation to itself.
enter_venv() {
  if [ -z "${NANOCHAT_VENV:-}" ]; then
    [ -n "${DRY_RUN:-}" ] || bash dev/setup.sh
    NANOCHAT_VENV="$PWD/.venv"
  fi
  [ -z "${DRY_RUN:-}" ] || [ -f "$NANOCHAT_VENV/bin/activate" ] || return 0
  # shellcheck source=/dev/null
  source "$NANOCHAT_VENV/bin/activate"
}

# -----------------------------------------------------------------------------
# Running

# A signal to the whole group (Ctrl-C, a closed terminal, scancel) is the stage's to handle: it saves. The script waits for it, and ends.
# Commands do not inherit a trap.
stopped=""
trap 'stopped=129' HUP
trap 'stopped=130' INT
trap 'stopped=143' TERM

stage() {
  local switch="$1" name="$2" log="$NANOCHAT_BASE_DIR/logs/$2.log" finished="$NANOCHAT_BASE_DIR/logs/$2.done" code began=$SECONDS what
  # shellcheck disable=SC2086 # SWITCH may be several words
  on $switch || return 0
  shift 2
  what="$(what_it_does "$@")"
  if [ -z "$something_ran" ] && [ "$switch" != report ] && [ -f "$finished" ] && [ "$(cat "$finished")" = "$what" ]; then
    echo "== $name: finished earlier"
    return
  fi
  [ -z "$stopped" ] || exit "$stopped"
  something_ran=1
  if [ -n "${DRY_RUN:-}" ]; then
    echo "== $name: would run $*"
    return
  fi
  rm -f "$finished"
  say "$name: $*" | tee -a "$log"
  set +e
  "$@" 2>&1 | (trap '' HUP INT TERM && exec tee -a "$log")
  code=${PIPESTATUS[0]}
  set -e
  if [ "$code" -ne 0 ]; then
    say "$name: ended with exit code $code after $((SECONDS - began)) s" >/dev/null
    echo "$name ended with exit code $code after $((SECONDS - began)) s; its output is in $log. Run this script again to go on." >&2
    exit "$code"
  fi
  echo "$what" >"$finished"
  price="${price-$(dollars_per_hour)}"
  say "$name: took $(duration $((SECONDS - began))), $(duration "$SECONDS") in all$(spent "$SECONDS")"
  [ -z "$stopped" ] || exit "$stopped"
}

what_it_does() { # COMMAND... without what starts it, --run and --resume
  local words=""
  while [ "${1:--m}" != -m ]; do shift; done
  for word; do
    [[ "$word" == --run=* || "$word" == --resume || "$word" == -- ]] || words+="$word "
  done
  echo "$words"
}

say() {
  echo "== $*"
  echo "$(date '+%F %T') $*" >>"$NANOCHAT_BASE_DIR/logs/run.log"
}

duration() { printf '%d:%02d:%02d' $(($1 / 3600)) $(($1 / 60 % 60)) $(($1 % 60)); }

# -----------------------------------------------------------------------------
# Money: $DOLLARS_PER_HOUR for one GPU (or for a machine without), else what nanochat/report_runs.py knows of the card, else nothing.

dollars_per_hour() {
  local card
  if [ -n "${DOLLARS_PER_HOUR:-}" ]; then
    echo "$DOLLARS_PER_HOUR"
  elif card="$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null)"; then
    python -c 'import sys; from nanochat.report_runs import DOLLARS
print(next((price for name, price in DOLLARS.items() if name in sys.argv[1]), ""))' "$card" || true
  fi
}

priced() { # the same for the report
  [ -z "${DOLLARS_PER_HOUR:-}" ] || echo "--dollars-per-hour=$DOLLARS_PER_HOUR"
}

spent() { # SECONDS
  [ -z "$price" ] || awk "BEGIN { printf \", \$%.2f\", $1 / 3600 * $price * ${NPROC:-1} }"
}
