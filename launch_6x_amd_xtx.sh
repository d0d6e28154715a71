#!/usr/bin/env bash
# A d20 on six Radeon RX 7900 XTX of 24 GB, or on any number of AMD cards from one on. docs/how-to/amd.md. Not yet run on such cards.
#
#   bash launch_6x_amd_xtx.sh
#   STAGES="sft eval report" bash launch_6x_amd_xtx.sh     # some of: tok base mid sft rl eval report
#   NPROC=4 DEVICE_BATCH_SIZE=7 bash launch_6x_amd_xtx.sh  # fewer cards; other rows per card than the plan's
#   DEPTH=32 MEMORY_ARGS="--shard --recompute" bash launch_6x_amd_xtx.sh
#
# The stages are those of speedrun.sh, in which every other variable means the same. Whatever is set below can be set from outside.
set -euo pipefail
cd "$(dirname "$0")"

# -----------------------------------------------------------------------------
# ROCm and RCCL on a desktop board: cards on PCIe, one node, no InfiniBand. No card is hidden: HIP_VISIBLE_DEVICES is yours to set.
export HSA_FORCE_FINE_GRAIN_PCIE="${HSA_FORCE_FINE_GRAIN_PCIE:-1}" # memory that cards may read from each other over PCIe
export HSA_ENABLE_INTERRUPT="${HSA_ENABLE_INTERRUPT:-1}"
export HSA_XNACK="${HSA_XNACK:-0}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}" NCCL_IB_DISABLE="${NCCL_IB_DISABLE:-1}"
export NCCL_P2P_LEVEL="${NCCL_P2P_LEVEL:-PHB}" NCCL_DMABUF_ENABLE="${NCCL_DMABUF_ENABLE:-1}"
export NCCL_BUFFSIZE="${NCCL_BUFFSIZE:-33554432}" NCCL_NTHREADS="${NCCL_NTHREADS:-128}"
export NCCL_MIN_NCHANNELS="${NCCL_MIN_NCHANNELS:-16}" NCCL_MAX_NCHANNELS="${NCCL_MAX_NCHANNELS:-32}"
export RCCL_MSCCL_ENABLE="${RCCL_MSCCL_ENABLE:-0}" RCCL_MSCCLPP_ENABLE="${RCCL_MSCCLPP_ENABLE:-0}"
# Without this, attention on RDNA 3 stores all T x T scores, which the plan below does not count with.
export TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL="${TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL:-1}"

source dev/stages.sh # STAGES, mistake, enter_venv
case "${PYTORCH_ALLOC_CONF:-}${PYTORCH_HIP_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}" in
  *expandable_segments:True*) mistake "PYTORCH_*ALLOC_CONF asks for expandable_segments, which these cards do not have; unset it" ;;
esac
export TORCH_BUILD="${TORCH_BUILD:-rocm7.2}"
enter_venv
export NANOCHAT_VENV

# -----------------------------------------------------------------------------
# Cards and their memory: what torch sees, else what rocm-smi sees, else NPROC (6) and VRAM_GB.
query='import torch
count = torch.cuda.device_count()
memory = torch.cuda.get_device_properties(0).total_memory if count else 0
print(torch.__version__, torch.version.hip or "none", count, -(-memory // 2**30))'
found="$(python -c "$query")"
read -r version hip count vram <<<"$found"
[ "$hip" != none ] || mistake "torch $version is not a build for ROCm; install one with: TORCH_BUILD=rocm7.2 bash dev/setup.sh"
if [ "$count" -eq 0 ] && command -v rocm-smi >/dev/null; then
  count="$(rocm-smi --showproductname | grep -ciE 'GPU\[[0-9]+\].*card series')" || true
fi
if [ "$count" -gt 0 ] && [ "${NPROC:-0}" -gt "$count" ]; then
  mistake "NPROC=$NPROC, but there are $count cards; look at rocm-smi, HIP_VISIBLE_DEVICES, power, risers, or use NPROC=$count"
fi
[ "$count" -gt 0 ] || count=6
export NPROC="${NPROC:-$count}"
vram="${VRAM_GB:-$vram}"
if [ "$vram" -eq 0 ]; then
  echo "warning: the cards do not say how much memory they have; VRAM_GB=24 is assumed" >&2
  vram=24
fi

# Rows per card: as many as fit, by arithmetic. 6 for a d20 with 24 GB; on 7900 XTX cards 6 rows took 15 GB with an older nanochat, 7 took
# 17 and 9 took 22.
sizes() { echo "--depth=${DEPTH:-20} --gpus=$NPROC --vram-gb=$vram ${MEMORY_ARGS:-}"; }
# shellcheck disable=SC2046 # they are several words
plan() { python -m scripts.plan $(sizes); }
if [ -z "${DEVICE_BATCH_SIZE:-}" ]; then
  plan="$(plan)"
  DEVICE_BATCH_SIZE="$(sed -n 's/^fits: \([0-9]*\) rows.*/\1/p' <<<"$plan")"
fi
export DEVICE_BATCH_SIZE

# Three quarters of speedrun.sh's tokens per step. Six cards with 6 rows take 5 micro-batches of 73,728, which is 368,640; any number of
# cards takes the nearest whole number of them.
export TOTAL_BATCH_SIZE="${TOTAL_BATCH_SIZE:-393216}"
echo "$NPROC cards of $vram GB: $DEVICE_BATCH_SIZE rows each, about $TOTAL_BATCH_SIZE tokens per step"
exec bash speedrun.sh
