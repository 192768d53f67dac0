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
# bash lets what it starts in the background ignore interrupts.
heeding='import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])'
python -c "$heeding" deepspeed --no_local_rank "${devices[@]}" --master_port "${MASTER_PORT:-29500}" \
  --module mica_ds "$verb" "$@" &
launcher=$!

# The launcher (0.19.8) would end alone and leave its ranks behind. They get the signal themselves, save a checkpoint, and
# end it by their own end. An interrupt reaches all by the terminal.
pass() { # what has ended meanwhile is nothing to tell of
  local inner="" ranks=""
  read -r inner _ <"/proc/$launcher/task/$launcher/children" || true # it starts the ranks
  if [ -n "$inner" ]; then ranks=$(cat "/proc/$inner/task/$inner/children") || true; fi
  kill -s "$1" ${ranks:-$inner $launcher} || true
  [ -n "$ranks" ] || exit 75 # they had not begun
}
trap 'pass TERM 2>/dev/null' TERM
trap 'pass USR1 2>/dev/null' USR1
trap : INT
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || true; done # a trap ends a wait, too
code=0
wait "$launcher" || code=$?
exit "$code"
