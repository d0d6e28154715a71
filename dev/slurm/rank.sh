#!/usr/bin/env bash
# One task of srun as one rank: srun bash dev/slurm/rank.sh -m scripts.base_train -- --depth=20
# exec, so that Slurm's signals reach Python itself. MASTER_ADDR and MASTER_PORT come from job.slurm.
export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"
export LOCAL_WORLD_SIZE="${SLURM_TASKS_PER_NODE%%[!0-9]*}" # "8(x2)" is eight on each of two nodes
exec python "$@"
