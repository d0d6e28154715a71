#!/usr/bin/env bash
# Every check and test, from an empty machine: bash dev/test.sh. Arguments go to pytest: bash dev/test.sh -k engine
set -euo pipefail
case "${1:-}" in -h | --help) exec sed -nE '2,${/^#/!q; s/^# ?//p;}' "$0" ;; esac
cd "$(dirname "$0")/.."
bash dev/setup.sh dev
bash dev/check.sh
export OMP_NUM_THREADS=1 # the models are tiny: a second thread costs more than it brings
.venv/bin/python -m pytest -q -n 2 --dist loadfile "$@" # a file's tests share what they train
