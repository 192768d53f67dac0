#!/usr/bin/env bash
# All checks and tests. Further arguments go to pytest: bash launch/test.sh -k solver
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
.venv/bin/python launch/prepare_model.py
.venv/bin/python -m pytest "$@"
