# For dev/runcpu.sh and speedrun.sh, which source it: run the stages of a pipeline one after the other.
#
#   stage NAME COMMAND...     run a stage and keep its output in $NANOCHAT_BASE_DIR/logs/NAME.log. One that is finished is skipped, until
#                             an earlier one had to run again; the first that fails ends the script with its exit code
#   resume STAGE TAG          "--resume" where that training stage has a checkpoint to go on from
#
# A stage is finished when logs/NAME.done holds its command line; delete the file to run it again.

export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
export PYTHONUNBUFFERED=1 # the log is to be complete when a stage is killed
mkdir -p "$NANOCHAT_BASE_DIR/logs"
something_ran=""

stage() {
  local name="$1" log="$NANOCHAT_BASE_DIR/logs/$1.log" finished="$NANOCHAT_BASE_DIR/logs/$1.done" code began=$SECONDS
  shift
  local command="$*"
  command="${command// --resume/}" # the same stage, whether it goes on or begins
  if [ -z "$something_ran" ] && [ -f "$finished" ] && [ "$(cat "$finished")" = "$command" ]; then
    echo "== $name: finished earlier"
    return
  fi
  something_ran=1
  rm -f "$finished"
  echo "== $name: $*"
  set +e
  "$@" 2>&1 | tee "$log"
  code=${PIPESTATUS[0]}
  set -e
  if [ "$code" -ne 0 ]; then
    echo "$name ended with exit code $code after $((SECONDS - began)) s; its output is in $log. Run this script again to go on." >&2
    exit "$code"
  fi
  echo "$command" >"$finished"
}

resume() {
  if compgen -G "$NANOCHAT_BASE_DIR/$1_checkpoints/$2/step_*/meta.json" >/dev/null; then
    echo "--resume"
  fi
}
