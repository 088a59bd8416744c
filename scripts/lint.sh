#!/usr/bin/env bash
# Check format, lint and types as CI does:
#
#   bash scripts/lint.sh         # check
#   bash scripts/lint.sh --fix   # format, and fix what ruff can fix
set -euo pipefail

source "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"

prepare_venv test
cd -- "$ROOT"
if [[ "${1:-}" == --fix ]]; then
    "$VENV_PYTHON" -m ruff format .
    "$VENV_PYTHON" -m ruff check --fix .
fi
failed=()
"$VENV_PYTHON" -m ruff format --check . || failed+=("format")
"$VENV_PYTHON" -m ruff check . || failed+=("lint")
"$VENV_PYTHON" -m mypy || failed+=("types")
"$VENV_PYTHON" -m mypy --config-file mypy-rooms.ini --cache-dir .mypy_cache/rooms ||
    failed+=("types of rooms")
if ((${#failed[@]})); then
    fail "${failed[*]} failed. Run scripts/lint.sh --fix, then fix what is left by hand."
fi
say "format, lint and types: clean"
