#!/usr/bin/env bash
# What must hold before a commit besides the tests: formatting, lint, types. Needs: bash dev/setup.sh dev
set -euo pipefail
case "${1:-}" in -h | --help) exec sed -nE '2,${/^#/!q; s/^# ?//p;}' "$0" ;; esac
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
cargo() { command cargo "$1" --manifest-path rustbpe/Cargo.toml "${@:2}"; }

ruff format --check .
ruff check .
mypy
cargo fmt --check
cargo clippy --quiet --all-targets -- -D warnings
cargo test --quiet
