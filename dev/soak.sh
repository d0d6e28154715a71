#!/usr/bin/env bash
# The long tier: what the suite tests once, often and on the slow paths. About half an hour on two cores; extra words go to pytest.
#
#   bash dev/soak.sh
#   bash dev/soak.sh -k compiled
set -euo pipefail
cd "$(dirname "$0")/.."
bash dev/setup.sh dev
.venv/bin/python -m pytest -m soak "$@"
