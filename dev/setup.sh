#!/usr/bin/env bash
# Make .venv: Python, the pinned dependencies with the torch build that fits this machine, and rustbpe. The second call does nothing.
#
#   bash dev/setup.sh                      # what a run needs
#   bash dev/setup.sh dev                  # and what dev/test.sh needs
#   TORCH_BUILD=cu130 bash dev/setup.sh    # for another machine than this one: cpu, cu126, cu130, rocm7.2, or default (the usual index)
#   PYTHON=python3.12 bash dev/setup.sh    # another Python
#
# Uses uv where there is one, venv and pip where not. Exit code 2 and one line when something is missing; all output is in .venv/setup.log.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
log=.venv/setup.log
start=$SECONDS

have() { command -v "$1" >/dev/null 2>&1; }
fail() {
  echo "setup: $*" >&2
  exit 2
}

# -----------------------------------------------------------------------------
# What is asked for, what is here

case "${1:-run}" in
  run) extras="" ;;
  dev) extras="[dev]" ;;
  *) fail "unknown argument $1; use: bash dev/setup.sh, or bash dev/setup.sh dev" ;;
esac
python="${PYTHON:-python3}"
if have uv; then
  installer=uv
else
  installer=pip
  have "$python" || fail "$python is missing; install Python 3.11 or later, or uv (https://docs.astral.sh/uv)"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old; install 3.11 or later and call: PYTHON=python3.11 bash dev/setup.sh"
fi
cargo --version >/dev/null 2>&1 || fail "cargo is missing, and rustbpe is compiled here; install Rust (https://rustup.rs)"

# The torch build. nvidia-smi prints the CUDA version that the driver knows: wheels for 13 need a driver that knows 13.
# A .venv that was made for a GPU stays so where none is seen (the login node of a cluster).
build="${TORCH_BUILD:-}" why="as TORCH_BUILD says"
if [ -z "$build" ]; then
  if [ "$(uname)" = Darwin ]; then
    build=default why="macOS"
  elif smi=$(nvidia-smi 2>/dev/null); then
    build=cu130 why="NVIDIA"
    [[ ! $smi =~ "CUDA Version: 12" ]] || build=cu126
  elif have rocm-smi || [ -e /dev/kfd ]; then
    build=rocm7.2 why="AMD"
  elif [ -f .venv/.torch-build ]; then
    read -r build why <.venv/.torch-build
  else
    build=cpu why="no GPU found"
  fi
fi
case $build in
  cpu | default) gigabytes=3 ;;
  cu126 | cu130) gigabytes=10 ;;
  rocm7.2) gigabytes=25 ;;
  *) fail "TORCH_BUILD=$build: expected cpu, cu126, cu130, rocm7.2 or default" ;;
esac

# -----------------------------------------------------------------------------
# Done already? One stamp for each mode: a checksum of everything that decides what is installed.

crate=$(find rustbpe -name target -prune -o -name '*.rs' -print -o -name '*.toml' -print -o -name '*.py' -print | LC_ALL=C sort)
stamp=$(echo "$PWD $installer $build" | cat - pyproject.toml constraints.txt dev/setup.sh $crate | cksum)
stamp_file=.venv/.stamp${extras:+-dev}
if [ -x .venv/bin/python ] && [ "$(cat "$stamp_file" 2>/dev/null)" = "$stamp" ]; then
  echo "setup: .venv is ready: $(<.venv/.ready)"
  exit
fi

# -----------------------------------------------------------------------------
# Installing

make_venv() {
  local free=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1000000))
  [ "$free" -ge "$gigabytes" ] || fail "$free GB are free in $PWD, the $build build needs about $gigabytes GB; make room or move the checkout"
  echo "setup: making .venv with $installer for the $build build of torch ($why); the first time takes minutes"
  rm -rf .venv
  if [ $installer = uv ]; then
    uv venv --quiet --python "${PYTHON:->=3.11}" .venv || fail "uv could not make .venv"
  else
    "$python" -m venv .venv >/dev/null || fail "$python -m venv .venv failed; on Debian and Ubuntu: apt install python3-venv"
  fi
}

install() { # WHAT ARGUMENTS...
  local what=$1 command=(.venv/bin/python -m pip install --no-input --no-compile)
  [ $installer = pip ] || command=(uv pip install --python .venv/bin/python)
  "${command[@]}" "${@:2}" >>"$log" 2>&1 && return
  local line
  line=$(grep -iE '^ *error[:[]' "$log" | grep -v 'subprocess-exited' | head -n 1 | sed 's/^ *//') || true
  case $(tail -n 40 "$log") in
    *"No space left"*) fail "the disk is full; the $build build of torch and the rest need about $gigabytes GB in $PWD" ;;
    *"No matching distribution"* | *"onnection"* | *"No solution found"* | *"ailed to fetch"* | *"dns error"*)
      fail "no package index has $what, or none answers: check the network, or name one with ${installer^^}_INDEX_URL (log: $log)" ;;
  esac
  fail "installing $what failed: ${line:-see $log} (log: $log)"
}

reachable() { # whether a server answers within 5 seconds, name lookup included
  .venv/bin/python - "$1" <<'PYTHON'
import os, sys, threading, urllib.request

threading.Timer(5, os._exit, [1]).start()
try:
    urllib.request.urlopen(sys.argv[1], timeout=5)
except OSError:
    os._exit(1)
os._exit(0)
PYTHON
}

# Torch comes first and alone, from PyTorch's index; everything else, its dependencies too, then comes pinned from the usual one.
# Only ROCm's own libraries are nowhere else.
install_torch() {
  local torch index="https://download.pytorch.org/whl/$build"
  torch=$(grep '^torch==' constraints.txt)
  if [ "$build" = default ] || compgen -G ".venv/lib/python3*/site-packages/${torch/==/-}*" >/dev/null; then
    return # the usual index has it, or it is here
  elif reachable "$index/torch/"; then
    [[ $build = rocm* ]] && local deps="" || local deps="--no-deps"
    PIP_CONSTRAINT="" UV_CONSTRAINT="" install "$torch+$build" $deps --index-url "$index" "$torch"
  elif [[ $build = rocm* ]]; then
    fail "$index does not answer, and torch for AMD is nowhere else; go online, or: TORCH_BUILD=cpu bash dev/setup.sh"
  else
    why+="; PyTorch's index does not answer, so from the usual one"
  fi
}

# A half-made .venv is completed; one for another build is made anew.
if [ ! -x .venv/bin/python ] || [ "$(cut -d ' ' -f 1 .venv/.torch-build 2>/dev/null)" != "$build" ]; then
  make_venv
fi
export PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt UV_CONSTRAINT=constraints.txt UV_BUILD_CONSTRAINT=constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK=1
: >"$log"
install_torch
echo "$build $why" >.venv/.torch-build
install "the dependencies" -e ".$extras"
install rustbpe --no-deps --force-reinstall ./rustbpe
if [ -n "$extras" ]; then # PyPI's rustbpe, the oracle of the tests: it has our import name, so it stays out of .venv's own packages
  install "the rustbpe that tests compare with" --no-deps --upgrade --target .venv/oracle rustbpe
fi
have "${CXX:-c++}" || have g++ || have clang++ ||
  echo "setup: no C++ compiler: torch.compile is off and training slower; Debian and Ubuntu: apt install g++"

.venv/bin/python - "$why" >.venv/.ready <<'PYTHON'
import platform, sys
from importlib.metadata import version

print(f"Python {platform.python_version()}, torch {version('torch')} ({sys.argv[1]}), rustbpe {version('nanochat-rustbpe')}")
PYTHON
[ -z "$extras" ] || echo "$stamp" >.venv/.stamp
echo "$stamp" >"$stamp_file"
echo "setup: .venv is ready: $(<.venv/.ready), by $installer in $((SECONDS - start)) s"
