#!/usr/bin/env bash
# Create .venv with the pinned versions, or reuse it while the pins are the same; compile DeepSpeed's CPU ops once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $1" >&2; exit 1; }

python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || fail "$python is missing; install Python 3.11 or set PYTHON to it"
command -v "${CXX:-c++}" >/dev/null || fail "no C++ compiler (${CXX:-c++}); DeepSpeed compiles its CPU ops: install g++"

"$python" - <<'PY' || fail "$python cannot make environments or compile extensions; install python3.11-venv and python3.11-dev"
import ensurepip, os, sys, sysconfig, venv

sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
PY

pins=$(sha256sum <launch/requirements.lock)
if [ "$(cat .venv/.pins 2>/dev/null)" != "$pins" ]; then
  echo "setup: installing into .venv (a few minutes)"
  "$python" -m venv --clear .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r launch/requirements.lock
  echo "$pins" >.venv/.pins
fi
project=$(sha256sum <pyproject.toml)
if [ "$(cat .venv/.project 2>/dev/null)" != "$project" ]; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
  echo "$project" >.venv/.project
fi

# On GPUs the ops that a config needs are compiled on first use.
if ! command -v nvidia-smi >/dev/null && [ ! -f .venv/ops/complete ]; then
  echo "setup: compiling DeepSpeed's CPU ops (a minute or two)"
  rm -rf .venv/ops  # an interrupted compilation leaves its lock, for which this one would wait for ever
  PATH="$PWD/.venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$PWD/.venv/ops" DS_ACCELERATOR=cpu .venv/bin/python - <<'PY' >.venv/ops.log 2>&1 || fail "see .venv/ops.log"
from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, ShareMemCommBuilder

for builder in (CPUAdamBuilder, ShareMemCommBuilder):
    builder().load()
PY
  touch .venv/ops/complete
fi
