#!/usr/bin/env bash
# install.sh [EXTRA]: makes an environment that holds this checkout (editable) and prints the path of its Python.
#
# Quiet and quick where that is done already; an environment that is half-made or broken is made anew.
#   DINO_LITE_VENV   its folder (default: .venv in the repository)
#   DINO_LITE_CONSTRAINTS   a file of pip's with versions (default: constraints.txt in the repository)
#   PYTHON           the interpreter to make it with (default: the first of python3.11 … python3 that fits)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${DINO_LITE_VENV:-$root/.venv}"
constraints="${DINO_LITE_CONSTRAINTS:-$root/constraints.txt}"
extra="${1:-}"
case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac
if [ -d "$venv" ]; then venv="$(cd "$venv" && pwd)"; fi # one spelling, as the stamp holds it
stamp="$venv/.dino_lite_stamp"    # what was installed, written last
making="$venv/.dino_lite_making"  # there from the first moment until the installation is complete

fail() { echo "install.sh: $*" >&2; exit 2; }

# The version of interpreter $1 as major.minor, where that is one we run on and it can make environments.
version_of() {
    "$1" -c 'import sys, ensurepip, venv
v = sys.version_info[:2]
print("%d.%d" % v) if (3, 11) <= v < (3, 14) else sys.exit(1)' 2>/dev/null
}

find_python() {
    local candidate candidates=(python3.11 python3.12 python3.13 python3 python)
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if version_of "$candidate" >/dev/null; then echo "$candidate"; return; fi
    done
    fail "no Python 3.11, 3.12 or 3.13 with its venv module was found${PYTHON:+ at PYTHON=$PYTHON}:" \
        "install one (on Debian and Ubuntu python3-venv as well) or name it, PYTHON=/path/to/python3.11."
}

# Can $venv be used as it stands?
works() {
    local version
    [ ! -e "$making" ] && version="$(version_of "$venv/bin/python")" &&
        { [ -z "${PYTHON:-}" ] || [ "$version" = "$(version_of "$PYTHON")" ]; }
}

# Everything that an installation depends on, on one line.
wanted() {
    echo "$1 $(cat "$root/pyproject.toml" "$constraints" | cksum) $("$venv/bin/python" -V) $venv $root"
}

if works; then
    have="$(cat "$stamp" 2>/dev/null || true)"
    if [ "$have" = "$(wanted "$extra")" ] || [ "$have" = "$(wanted test)" ]; then
        echo "$venv/bin/python"
        exit
    fi
else
    python="$(find_python)"
    if [ -e "$venv" ] && [ "$venv" != "$root/.venv" ] && [ ! -e "$making" ] && [ ! -e "$stamp" ]; then
        fail "$venv is in the way and no environment that this script made: remove it or set DINO_LITE_VENV to another folder."
    fi
    rm -rf "$venv"
    mkdir -p "$venv"
    touch "$making"
    "$python" -m venv "$venv" || fail "$python could not make an environment in $venv."
fi

echo "Installing dino_lite into $venv (the first time: minutes and gigabytes) ..." >&2
rm -f "$stamp"
"$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
    --constraint "$constraints" --editable "$root${extra:+[$extra]}" 1>&2 ||
    fail "pip could not install dino_lite into $venv; its message stands above."
wanted "$extra" >"$stamp"
rm -f "$making"
echo "$venv/bin/python"
