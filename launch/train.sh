#!/usr/bin/env bash
# Train on one node: bash launch/train.sh CONFIG [key=value ...]
# Ranks: NUM_RANKS, else one for each GPU, else two. MASTER_PORT sets two runs on one machine apart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
ranks=${NUM_RANKS:-$gpus}
if [ "$ranks" -eq 0 ]; then ranks=2; fi

export PATH="$PWD/.venv/bin:$PATH"
if [ -d .venv/ops ]; then export TORCH_EXTENSIONS_DIR="$PWD/.venv/ops"; fi
exec deepspeed --no_local_rank --num_accelerators "$ranks" --master_port "${MASTER_PORT:-29500}" \
  --module mica_ds train "$@"
