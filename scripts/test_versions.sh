#!/usr/bin/env bash
# test_versions.sh [oldest|newest] [ARGS]: runs the tests with the oldest versions of the dependencies that pyproject.toml
# allows, or with the newest available; by default with both, one after the other.
#
# Each environment (6 GB) is created in a temporary folder in TMPDIR and removed afterwards. ARGS are passed to pytest:
#   scripts/test_versions.sh newest -k "step or vit"
# PYTHON names the interpreter as for install.sh; the oldest versions have wheels for 3.11.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
kinds=(oldest newest)
case "${1:-}" in oldest | newest) kinds=("$1"); shift ;; esac
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
export DINO_LITE_VENV="$folder/venv" DINO_LITE_CONSTRAINTS="$folder/constraints.txt"
export PIP_CONSTRAINT="$DINO_LITE_CONSTRAINTS" # overrides one in pip's own configuration

failed=0
for kind in "${kinds[@]}"; do
    : >"$DINO_LITE_CONSTRAINTS"
    if [ "$kind" = oldest ]; then # pin the dependencies of the package, not those of the tests, to their lower bounds
        sed -n '/^dependencies = \[/,/^\]/p' "$root/pyproject.toml" | sed -nE 's/^ *"([A-Za-z0-9_-]+)(\[.*\])?>=([0-9.]+).*/\1==\3/p' >"$DINO_LITE_CONSTRAINTS"
    fi
    python="$("$root/scripts/install.sh" test)"
    echo "$kind:" $("$python" -m pip freeze | grep -E '^(numpy|pytorch-lightning|timm|torch|torchvision)==')
    (cd "$root" && "$python" -m pytest -q "$@") || { echo "test_versions.sh: failed with the $kind versions" >&2; failed=1; }
    rm -rf "$DINO_LITE_VENV"
done
exit "$failed"
