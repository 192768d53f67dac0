#!/usr/bin/env bash
# Train by torchrun, on one node or on several: bash launch/torchrun.sh CONFIG [key=value ...]
# Ranks a node: NUM_RANKS, else one for each GPU, else two. On several nodes start it on each, with NUM_NODES, its
# NODE_RANK (0 is the first), and the first node's MASTER_ADDR.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

nodes=${NUM_NODES:-1}
[ "$nodes" -eq 1 ] || [ -n "${NODE_RANK:+${MASTER_ADDR:-}}" ] ||
  fail "NUM_NODES=$nodes needs NODE_RANK, this node's number from 0 on, and MASTER_ADDR, the first node's name"
exec torchrun --nnodes "$nodes" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$ranks" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" -m mica_ds "$verb" "$@"
