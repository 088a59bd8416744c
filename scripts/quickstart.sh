#!/usr/bin/env bash
# Install what is missing into .venv, then run e2e_rlhf.py with the given arguments:
#
#   bash scripts/quickstart.sh [arguments of e2e_rlhf.py]
#
# It may be started from any folder, and repeatedly: what is installed is kept, and needs no network.
set -euo pipefail

source "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"

prepare_venv demo
say "running e2e_rlhf.py $*"
exec "$VENV_PYTHON" "$ROOT/e2e_rlhf.py" "$@"
