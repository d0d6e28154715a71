#!/usr/bin/env bash
# On the login node of a Slurm cluster, once: the environment for the GPUs of the compute nodes. docs/how-to/slurm.md
#
#   export NANOCHAT_BASE_DIR=/scratch/$USER/nanochat MODULES="python/3.12 cuda/12.6"
#   bash dev/slurm/setup_hpc.sh
#   TORCH_BUILD=cu130 bash dev/slurm/setup_hpc.sh    # for drivers that know CUDA 13, and cards after Hopper; rocm7.2 for AMD
#
# Writes .venv in the checkout, and nothing else outside NANOCHAT_BASE_DIR.
set -euo pipefail
cd "$(dirname "$0")/../.."
source dev/slurm/env.sh
load_modules

# A login node rarely has a GPU to tell by. The build for CUDA 12.6 runs with drivers for CUDA 12 and 13, on cards up to Hopper.
if [ ! -f .venv/.torch-build ] && ! nvidia-smi >/dev/null 2>&1; then
  export TORCH_BUILD="${TORCH_BUILD:-cu126}"
fi
bash dev/setup.sh
mkdir -p "$XDG_CACHE_HOME"
df -Ph "$NANOCHAT_BASE_DIR" | awk 'NR == 2 { print $4 " are free in '"$NANOCHAT_BASE_DIR"', where data, caches, checkpoints and logs go" }'
cat <<TEXT
Next, in the same shell:
  1. bash dev/slurm/prefetch.sh       all that needs internet
  2. sbatch dev/slurm/job.slurm       the run; account and partition as your cluster wants them
TEXT
