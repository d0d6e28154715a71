#!/usr/bin/env bash
# Make .venv: Python, what requirements.lock has (a file with another sha256 is refused), the torch build that fits this
# machine, and rustbpe. The second call does nothing.
#
#   bash dev/setup.sh                      # what a run needs
#   bash dev/setup.sh dev                  # and what dev/test.sh needs
#   TORCH_BUILD=cu130 bash dev/setup.sh    # for another machine than this one: cpu, cu126, cu130, rocm7.2,
#                                          # or default (what the usual package index has)
#   PYTHON=python3.12 bash dev/setup.sh    # another Python (where there is no .venv yet)
#
# Uses uv where there is one, venv and pip where not. When something is missing: one line that says what to do, exit
# code 2; .venv/setup.log has what the last step said.
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
  have "$python" || fail "$python is missing; install Python 3.11 to 3.14, or uv (https://docs.astral.sh/uv)"
  "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' ||
    fail "$("$python" --version) is not in requirements.lock; install 3.11 to 3.14 and call: PYTHON=python3.11 bash dev/setup.sh"
fi

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

crate=$(find rustbpe \( -name target -o -name _native \) -prune -o \( -name '*.rs' -o -name '*.toml' -o -name '*.py' \) -print)
stamp=$(echo "$PWD $installer $build" | cat - pyproject.toml requirements.lock dev/setup.sh $(sort <<<"$crate") | cksum)
stamp_file=.venv/.stamp${extras:+-dev}
if [ -x .venv/bin/python ] && [ "$(cat "$stamp_file" 2>/dev/null)" = "$stamp" ]; then
  echo "setup: .venv is ready: $(<.venv/.ready)"
  exit
fi

# -----------------------------------------------------------------------------
# Installing

cargo --version >/dev/null 2>&1 || fail "cargo is missing, and rustbpe is compiled here; install Rust (https://rustup.rs)"

make_venv() {
  local free=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1000000))
  [ "$free" -ge "$gigabytes" ] ||
    fail "$free GB are free in $PWD, the $build build needs about $gigabytes GB; make room or move the checkout"
  echo "setup: making .venv with $installer for the $build build of torch ($why); the first time takes minutes"
  rm -rf .venv
  if [ $installer = uv ]; then
    uv venv --quiet --python "${PYTHON:->=3.11,<3.15}" .venv || fail "uv could not make .venv"
  else
    "$python" -m venv .venv >/dev/null ||
      fail "$python -m venv .venv failed; on Debian and Ubuntu: apt install python3-venv"
  fi
  echo "$build $why" >.venv/.torch-build
}

install() { # WHAT ARGUMENTS...
  local what=$1 command=(.venv/bin/python -m pip install --no-input --no-compile)
  [ $installer = pip ] || command=(uv pip install --python .venv/bin/python)
  "${command[@]}" "${@:2}" >"$log" 2>&1 && return
  local line
  line=$(grep -iE '^ *error[:[]' "$log" | grep -v 'subprocess-exited' | head -n 1 | sed 's/^ *//') || true
  case $(<"$log") in
    *"DO NOT MATCH THE HASHES"* | *"ash mismatch for"*)
      what=$(sed -nE 's/^ +([^ ]+==[^ ]+)[: ].*from .*/\1/p; s/.*ash mismatch for `([^`]+)`.*/\1/p' "$log" | head -n 1)
      fail "$what is not a file that requirements.lock knows: its sha256 differs, so it was not installed. Was it changed, or is" \
        "this a mirror with files of its own? See $log" ;;
    *"No space left"*) fail "the disk is full; the $build build of torch and the rest need about $gigabytes GB in $PWD" ;;
    *"No matching dist"* | *"onnection"* | *"conflicting dep"* | *"No solution"* | *"ailed to fetch"* | *"dns error"*)
      fail "no package index has $what, or none answers: check the network, or name an index (PIP_INDEX_URL for pip," \
        "UV_INDEX_URL for uv). See $log" ;;
  esac
  fail "installing $what failed: ${line:-nothing said why}. See $log"
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

install_locked() { # WHAT "SECTIONS" ARGUMENTS...: what stands under these headings of requirements.lock
  awk -v want=" $2 " '/^# [a-z]+:/ { on = index(want, " " substr($2, 1, length($2) - 1) " ") } on' requirements.lock |
    sed "s/^torch==[^ ]*/$torch/" >.venv/locked.txt
  install "$1" --no-deps --require-hashes "${@:3}" -r .venv/locked.txt
}

# Torch comes first and alone, from PyTorch's index; the rest, its dependencies too, from the usual one. Of a build whose
# files dev/lock.sh could not see there the version is pinned and the origin trusted, as that of ROCm's own libraries.
install_torch() {
  local index="https://download.pytorch.org/whl/$build" deps="--no-deps"
  if compgen -G ".venv/lib/python3*/site-packages/${torch/==/-}*/RECORD" >/dev/null; then
    return
  elif [ "$build" != default ] && reachable "$index/torch/"; then
    torch+="+$build"
    if grep -q "^# torch:.* $build\b" requirements.lock; then
      install_locked "$torch" torch --index-url "$index"
    else
      [[ $build != rocm* ]] || deps=""
      install "$torch" $deps --index-url "$index" "$torch"
    fi
  elif [[ $build = cu126 || $build = rocm* ]]; then
    fail "$index does not answer, and the $build build is nowhere else; go online, or: TORCH_BUILD=cpu bash dev/setup.sh"
  else # a mirror or a folder of wheels may have the very build; the plain one, on Linux for CUDA 13, runs on CPUs too
    [ "$build" = default ] || why+="; PyTorch's index does not answer, so from the usual one"
    { [ "$build" != default ] && (torch+="+$build" && install_locked "$torch" torch) 2>/dev/null; } || install_locked "$torch" torch
  fi
}

# A half-made .venv, or one that `uv sync` made, is completed; one for another build is made anew.
made_for=$(cut -d ' ' -f 1 .venv/.torch-build 2>/dev/null || true)
[ $installer = uv ] && tool=python || tool=pip
if [ ! -x .venv/bin/$tool ] || [ "${made_for:-$build}" != "$build" ]; then
  make_venv
fi
export PIP_CONSTRAINT="" UV_CONSTRAINT="" PIP_DISABLE_PIP_VERSION_CHECK=1 PATH="$PWD/.venv/bin:$PATH"
torch=$(grep '^torch==' constraints.txt)
install_torch
echo "$build $why" >.venv/.torch-build
case $(compgen -G ".venv/lib/python3*/site-packages/torch-*.dist-info") in
  *+cpu.* | *+rocm*) cuda="" ;;
  *+cu126.*) cuda="" && install "CUDA's libraries" --constraint constraints.txt torch ;; # torch itself pins them
  *) cuda=cuda ;;
esac
install_locked "the dependencies" "run $cuda ${extras:+dev}"
install nanochat --no-deps --no-build-isolation -e .
install rustbpe --no-deps --no-build-isolation --force-reinstall ./rustbpe
if [ -n "$extras" ]; then # the tests' oracle has the import name of ours, so it stays out of .venv's own packages
  install_locked "the rustbpe that tests compare with" oracle --upgrade --target .venv/oracle
fi
have "${CXX:-c++}" || have g++ || have clang++ ||
  echo "setup: no C++ compiler: torch.compile is off and training slower; Debian and Ubuntu: apt install g++"

.venv/bin/python - "$why" >.venv/.ready <<'PYTHON'
import platform, sys
from importlib.metadata import version

ours = version("nanochat-rustbpe")
print(f"Python {platform.python_version()}, torch {version('torch')} ({sys.argv[1]}), rustbpe {ours}")
PYTHON
[ -z "$extras" ] || echo "$stamp" >.venv/.stamp
echo "$stamp" >"$stamp_file"
echo "setup: .venv is ready: $(<.venv/.ready), by $installer in $((SECONDS - start)) s"
