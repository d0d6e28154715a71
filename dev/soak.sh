#!/usr/bin/env bash
# The long tier: what the suite tests once, often and on the slow paths. About half an hour on two cores; extra words go to pytest.
#
#   bash dev/soak.sh
#   bash dev/soak.sh -k compiled
set -euo pipefail
case "${1:-}" in -h | --help) exec sed -nE '2,${/^#/!q; s/^# ?//p;}' "$0" ;; esac
cd "$(dirname "$0")/.."
bash dev/setup.sh dev
if command -v valgrind >/dev/null; then
  log=$(mktemp)
  PYTHONMALLOC=malloc valgrind --leak-check=no --log-file="$log" .venv/bin/python tests/valgrind_border.py
  if grep -E 'lib_native|rustbpe_|\.rs:' "$log"; then # the interpreter and its libraries have findings of their own
    echo "valgrind: the lines above are ours; all of it is in $log" >&2
    exit 1
  fi
  echo "valgrind: no error on the border to Rust"
  rm "$log"
else
  echo "valgrind is not here: memory errors on the border to Rust were not looked for" >&2
fi
.venv/bin/python -m pytest -m soak "$@"
