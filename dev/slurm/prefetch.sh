#!/usr/bin/env bash
# On a node with internet: everything that a job would fetch. Ends with the same check that a job begins with. docs/how-to/slurm.md
#
#   bash dev/slurm/prefetch.sh
#   SHARDS=800 bash dev/slurm/prefetch.sh                   # for run1000.sh
#   STAGES="tok base" bash dev/slurm/prefetch.sh            # checks what these stages start from
#   PREFETCH_TOKENIZER=1 bash dev/slurm/prefetch.sh         # trains the tokenizer here too, which needs a minute and no GPU
#
# It can be stopped and called again: finished files are kept.
set -euo pipefail
cd "$(dirname "$0")/../.."
source dev/slurm/env.sh
load_modules
[ -x .venv/bin/python ] || mistake "there is no $PWD/.venv; make it with: bash dev/slurm/setup_hpc.sh"

fetch_everything
if [ -n "${PREFETCH_TOKENIZER:-}" ]; then
  NANOCHAT_VENV="$PWD/.venv" STAGES=tok bash speedrun.sh
fi
preflight
echo "Everything is here. Next: sbatch dev/slurm/job.slurm"
