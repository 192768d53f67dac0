#!/usr/bin/env bash
# Train on one node: bash launch/train.sh CONFIG [key=value ...]
# Ranks: NUM_RANKS, else one for each GPU, else two. MASTER_PORT sets two runs on one machine apart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

exec deepspeed --no_local_rank --num_accelerators "$ranks" --master_port "${MASTER_PORT:-29500}" \
  --module mica_ds "$verb" "$@"
