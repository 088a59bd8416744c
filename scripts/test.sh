#!/usr/bin/env bash
# Install what is missing into .venv, then run the tests:
#
#   bash scripts/test.sh [arguments of pytest]      # -m slow: the tests that take minutes
#
# Without arguments, the unit tests run in one process and the tests that launch runs in another.
set -euo pipefail

source "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"

prepare_venv test
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false
# No test needs the hub. A test that asks for it should fail at once and not wait.
export HF_HUB_OFFLINE=1
cd -- "$ROOT"
if (($# == 0)); then
    set -- -n 2
fi
exec "$VENV_PYTHON" -m pytest "$@"
