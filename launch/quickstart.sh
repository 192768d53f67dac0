#!/usr/bin/env bash
# The main job: teach a real 134.5M-parameter model the handbook of an invented company, on two CPU ranks.
# Further arguments are settings: bash launch/quickstart.sh train.max_steps=10
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
.venv/bin/python launch/prepare_model.py
NUM_RANKS=2 bash launch/train.sh configs/demonstration.yaml "$@"

# Options given above may have moved the run folder; without them it is this one.
[ $# -gt 0 ] || .venv/bin/python launch/reload_adapter.py runs/quickstart
