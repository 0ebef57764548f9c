#!/usr/bin/env bash
# Installs what the tests need (once), then holds lint, types and tests. Arguments go to pytest:
#   scripts/test.sh -k knn
# DINO_LITE_VENV names an environment other than .venv.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$("$root/scripts/install.sh" test)"
DINO_LITE_VENV="$(dirname "$(dirname "$python")")"
export DINO_LITE_VENV # for the tests that run scripts
cd "$root"

# Say nothing unless it fails.
quietly() {
    local said
    said="$("$@" 2>&1)" || { printf '%s\n' "$said" >&2; echo "test.sh: failed: ${*:3}" >&2; exit 1; }
}

quietly "$python" -m ruff check .
quietly "$python" -m ruff format --check .
quietly "$python" -m mypy
exec "$python" -m pytest -q "$@"
