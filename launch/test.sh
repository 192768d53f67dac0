#!/usr/bin/env bash
# All checks and tests. Further arguments go to pytest: bash launch/test.sh -k solver
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
.venv/bin/python launch/prepare_model.py
# Two files of tests at a time, since a run of two ranks leaves much of two cores idle; `-n 0` for one.
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
