#!/usr/bin/env bash
# Installs what the tests need (once), then runs lint, type checks and tests. Arguments are passed to pytest:
#   scripts/test.sh -k knn -x
#   scripts/test.sh -m 'not slow'    # for daily work: under three minutes on two cores
#   scripts/test.sh -n 0             # in one process (default: one per core)
# --browser as the first argument installs Debian's chromium if missing, for the tests that open pages in it; without it
# they are skipped with a message.
# DINO_LITE_VENV names an environment other than .venv.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$("$root/scripts/install.sh" test)"
DINO_LITE_VENV="$(dirname "$(dirname "$python")")"
export DINO_LITE_VENV # for the tests that run scripts
cd "$root"

# Print output only on failure.
quietly() {
    local said
    said="$("$@" 2>&1)" || { printf '%s\n' "$said" >&2; echo "test.sh: failed: ${*:3}" >&2; exit 1; }
}

if [ "${1:-}" = --browser ]; then
    shift
    if ! command -v chromium >/dev/null; then
        if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
            echo "test.sh: chromium can only be installed by root, with apt-get: its tests are skipped." >&2
        elif ! { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends \
            chromium fonts-dejavu-core; } >/dev/null 2>&1; then
            echo "test.sh: apt-get could not install chromium: its tests are skipped." >&2
        fi
    fi
fi

quietly "$python" -m ruff check .
quietly "$python" -m ruff format --check .
quietly "$python" -m mypy
# One process per core; idle processes take over tests of others.
parallel=(-n auto --maxprocesses 8 --dist worksteal)
case " $* " in *" -p no:xdist "* | *" -pno:xdist "*) parallel=() ;; esac
unset PYTHONDONTWRITEBYTECODE # otherwise every process started by a test compiles the package again
export OMP_NUM_THREADS=1
exec "$python" -m pytest -q --durations=10 ${parallel[@]+"${parallel[@]}"} "$@"
