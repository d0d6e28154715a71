# shellcheck shell=bash
# For the launchers, which source it: run the stages of a pipeline one after the other, for the checkpoints called $TAG.
#
#   STAGES="base mid"                 switches: the groups of stages to run, with spaces or commas between; all where it is not set
#   DRY_RUN=1                         say what would run, refuse settings that a script would refuse, and run nothing
#   stage SWITCHES NAME COMMAND...    run a stage if one of SWITCHES (base,mid) is on, and append its output to logs/NAME.log in
#                                     $NANOCHAT_BASE_DIR. One that is finished is skipped, until an earlier one had to run again; the
#                                     first that fails ends the script with its exit code
#   trained STAGE                     whether base, mid, sft or rl has a checkpoint by now
#   resume STAGE                      "--resume" where there is one to go on from
#   check_inputs                      exit code 2 where a stage that is switched on lacks what one that is not would have made
#   enter_venv                        make the environment and enter it, or enter $NANOCHAT_VENV as it is
#
# A stage is finished when logs/NAME.done holds its command line; delete the file to run it again. What does not change a result is not
# part of it: the launcher with its number of ranks, --run and --resume. logs/run.log has a line with the time for each beginning and end.

mistake() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# A launcher takes variables and no arguments but --help: the comment that it begins with, and its variables. (It went to the
# checkout's root before this.)
variables() { sed -nE 's/^([A-Z_]+)="\$\{\1:-(.*)\}" +# (.*)/  \1=\2\t\3/p' "$1" | expand -t 40; }
[ $# -eq 0 ] || case "$1" in
  -h | --help)
    cd "$OLDPWD" && sed -nE '2,${/^#/!q; /^#SBATCH|^# shellcheck/d; s/^# ?//p;}' "$0" && variables "$0"
    exit
    ;;
  *) mistake "$* is not taken; settings are variables before the command, which --help shows" ;;
esac

NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-~/.cache/nanochat}"
if [[ "$NANOCHAT_BASE_DIR" =~ ^~[A-Za-z0-9._-]* ]]; then # in quotes, so that bash left it as it was; Python reads it like this
  eval "home=$BASH_REMATCH"
  NANOCHAT_BASE_DIR="$home${NANOCHAT_BASE_DIR#"$BASH_REMATCH"}"
fi
export NANOCHAT_BASE_DIR
export PYTHONUNBUFFERED=1 # the log is to be complete when a stage is killed
SWITCHES="tok base mid sft rl eval report"
STAGES="${STAGES-$SWITCHES}"
STAGES="${STAGES//,/ }"
for word in $STAGES; do
  [[ " $SWITCHES " == *" $word "* ]] || mistake "STAGES=\"$STAGES\": there is no $word, only: $SWITCHES"
done
[ -n "${STAGES// /}" ] || mistake "STAGES is empty, so there is nothing to run; name some of: $SWITCHES"
mkdir -p "$NANOCHAT_BASE_DIR/logs" 2>/dev/null ||
  mistake "NANOCHAT_BASE_DIR=$NANOCHAT_BASE_DIR cannot be written to; name another directory"

# -----------------------------------------------------------------------------
# What is on, and what is there

on() { [[ " $STAGES " =~ " "(${1//,/|})" " ]]; } # SWITCHES

checkpoints() { # STAGE: their directory, as nanochat/checkpoint_manager.py names it
  case "$1" in sft | rl) set -- "chat$1" ;; esac
  echo "$NANOCHAT_BASE_DIR/$1_checkpoints/$TAG"
}
saved() { compgen -G "$(checkpoints "$1")/step_*/meta.json" >/dev/null; }
trained() { on "$1" || saved "$1"; } # a stage that is on and comes before has run
resume() { ! saved "$1" || echo "--resume"; }

need() { # SWITCH, the stage that it starts from
  ! on "$1" || trained "$2" || echo "a checkpoint in $(checkpoints "$2"), which $1 starts from; add $2 to STAGES"
}
missing_inputs() {
  local tokenizer="$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json"
  ! on base || on tok || [ -f "$tokenizer" ] || echo "$tokenizer, which base starts from; add tok to STAGES"
  need mid base && need sft mid && need rl sft && need eval base
}
check_inputs() {
  local missing
  missing="$(missing_inputs)"
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

something_ran=""
stage() {
  local switches="$1" name="$2" log="$NANOCHAT_BASE_DIR/logs/$2.log" finished="$NANOCHAT_BASE_DIR/logs/$2.done" code began=$SECONDS what
  on "$switches" || return 0
  shift 2
  what="$(what_it_does "$@")"
  if [ -z "$something_ran" ] && [ "$switches" != report ] && [ "$what" = "$(cat "$finished" 2>/dev/null)" ]; then
    echo "== $name: finished earlier"
    return
  fi
  [ -z "$stopped" ] || exit "$stopped"
  something_ran=1
  if [ -n "${DRY_RUN:-}" ]; then
    echo "== $name: would run $*"
    [ -z "${VIRTUAL_ENV:-}" ] || python -m dev.check_settings "$@" || exit
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
  say "$name: took $(duration $((SECONDS - began))), $(duration "$SECONDS") in all"
  [ -z "$stopped" ] || exit "$stopped"
}

what_it_does() { # COMMAND... without what starts it, --run and --resume
  while [ "${1:--m}" != -m ]; do shift; done
  for word; do
    [[ "$word" == --run=* || "$word" == --resume || "$word" == -- ]] || printf '%s ' "$word"
  done
}
say() {
  echo "== $*"
  echo "$(date '+%F %T') $*" >>"$NANOCHAT_BASE_DIR/logs/run.log"
}
duration() { printf '%d:%02d:%02d' $(($1 / 3600)) $(($1 / 60 % 60)) $(($1 % 60)); }
