#!/usr/bin/env bash
# A d20 on six Radeon RX 7900 XTX of 24 GB, or on any number of AMD cards from one on. docs/how-to/amd.md. Not yet run on such cards.
#
#   bash launch_6x_amd_xtx.sh
#   STAGES="sft eval report" bash launch_6x_amd_xtx.sh     # some of: tok base mid sft rl eval report
#   NPROC=4 DEVICE_BATCH_SIZE=7 bash launch_6x_amd_xtx.sh  # fewer cards; other rows per card than the most that fit
#   DEPTH=32 MEMORY_ARGS="--shard --recompute" bash launch_6x_amd_xtx.sh
#
# Stages and variables are those of speedrun.sh (bash speedrun.sh --help). Other defaults here: NPROC as many
# cards as there are, DEVICE_BATCH_SIZE=auto, TOTAL_BATCH_SIZE=368640. Whatever this file exports can be set from outside.
set -euo pipefail
cd "$(dirname "$0")"

# ROCm and RCCL on a desktop board: cards on PCIe, one node, no InfiniBand. No card is hidden: HIP_VISIBLE_DEVICES is yours to set.
export HSA_FORCE_FINE_GRAIN_PCIE="${HSA_FORCE_FINE_GRAIN_PCIE:-1}" # memory that cards may read from each other over PCIe
export HSA_ENABLE_INTERRUPT="${HSA_ENABLE_INTERRUPT:-1}" HSA_XNACK="${HSA_XNACK:-0}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}" NCCL_IB_DISABLE="${NCCL_IB_DISABLE:-1}"
export NCCL_P2P_LEVEL="${NCCL_P2P_LEVEL:-PHB}" NCCL_DMABUF_ENABLE="${NCCL_DMABUF_ENABLE:-1}" NCCL_BUFFSIZE="${NCCL_BUFFSIZE:-33554432}"
export NCCL_NTHREADS="${NCCL_NTHREADS:-128}" NCCL_MIN_NCHANNELS="${NCCL_MIN_NCHANNELS:-16}" NCCL_MAX_NCHANNELS="${NCCL_MAX_NCHANNELS:-32}"
export RCCL_MSCCL_ENABLE="${RCCL_MSCCL_ENABLE:-0}" RCCL_MSCCLPP_ENABLE="${RCCL_MSCCLPP_ENABLE:-0}"
# Without this, attention on RDNA 3 stores all T x T scores.
export TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL="${TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL:-1}"
source dev/stages.sh # STAGES, mistake, enter_venv
case "${PYTORCH_ALLOC_CONF:-}${PYTORCH_HIP_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}" in
  *expandable_segments:True*) mistake "PYTORCH_*ALLOC_CONF asks for expandable_segments, which these cards do not have; unset it" ;;
esac
export TORCH_BUILD="${TORCH_BUILD:-rocm7.2}" NANOCHAT_VENV
enter_venv

# Cards: those that torch sees, else those that rocm-smi sees, else NPROC, which is 6.
query='import torch; n = torch.cuda.device_count(); gb = torch.cuda.get_device_properties(0).total_memory / 2**30 if n else 0
print(torch.__version__, torch.version.hip or "none", n, round(gb))'
seen="$(python -c "$query")"
read -r version hip cards gb <<<"$seen"
[ "$hip" != none ] || mistake "torch $version is not a build for ROCm; install one with: TORCH_BUILD=rocm7.2 bash dev/setup.sh"
[ "$cards" -gt 0 ] || cards="$(rocm-smi --showproductname 2>/dev/null | grep -ciE 'GPU\[[0-9]+\].*card series')" || true
[ "$cards" -eq 0 ] || [ "${NPROC:-0}" -le "$cards" ] ||
  mistake "NPROC=$NPROC, but there are $cards cards; look at rocm-smi, HIP_VISIBLE_DEVICES, power, risers, or use NPROC=$cards"

# Rows per card: as many as fit. 6 of a d20 fit into 24 GB: six cards take 5 micro-batches of 6 x 6 x 2,048 = 73,728 tokens for a step of
# 368,640, and other numbers of cards come near to it. On 7900 XTX cards 6 rows took 15 GB with an older nanochat, 7 took 17 and 9 took 22.
export NPROC="${NPROC:-${cards/#0/6}}" DEVICE_BATCH_SIZE="${DEVICE_BATCH_SIZE:-auto}" TOTAL_BATCH_SIZE="${TOTAL_BATCH_SIZE:-368640}"
# shellcheck disable=SC2086 # MEMORY_ARGS are several words
[ "$gb" -eq 0 ] || python -m scripts.plan --depth="${DEPTH:-20}" --gpus="$NPROC" --vram-gb="$gb" \
  --device-batch-size="$DEVICE_BATCH_SIZE" --total-batch-size="$TOTAL_BATCH_SIZE" ${MEMORY_ARGS:-} # a model of which no row fits ends here
exec bash speedrun.sh
