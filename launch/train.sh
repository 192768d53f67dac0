#!/usr/bin/env bash
# Train on one node: bash launch/train.sh CONFIG [key=value ...]
# Ranks: NUM_RANKS, else one for each GPU of CUDA_VISIBLE_DEVICES, or of all, else two. MASTER_PORT sets two runs on one
# machine apart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

devices=(--num_accelerators "$ranks")
if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then # which DeepSpeed would ignore beside a number
  [[ "$CUDA_VISIBLE_DEVICES" =~ ^[0-9]+(,[0-9]+)*$ ]] ||
    fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES is no list of numbers: use launch/torchrun.sh"
  [ "$ranks" -le "$gpus" ] || fail "NUM_RANKS=$ranks, but CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names $gpus"
  devices=(--include "localhost:$(cut -d, -f"-$ranks" <<<"$CUDA_VISIBLE_DEVICES")")
  unset CUDA_VISIBLE_DEVICES
fi
exec deepspeed --no_local_rank "${devices[@]}" --master_port "${MASTER_PORT:-29500}" \
  --module mica_ds "$verb" "$@"
