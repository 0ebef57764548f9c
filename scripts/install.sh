#!/usr/bin/env bash
# install.sh [EXTRA]: creates an environment with this checkout (editable) and prints the path of its Python.
#
# Fast and silent if it is up to date; an incomplete or broken environment is created from scratch.
#   DINO_LITE_VENV   its folder (default: .venv in the repository)
#   DINO_LITE_CONSTRAINTS   a constraints file for pip (default: constraints.txt in the repository)
#   PYTHON           the interpreter to create it with (default: the first suitable of python3.11 … python3)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${DINO_LITE_VENV:-$root/.venv}"
constraints="${DINO_LITE_CONSTRAINTS:-$root/constraints.txt}"
extra="${1:-}"
case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac
if [ -d "$venv" ]; then venv="$(cd "$venv" && pwd)"; fi # normalized, for comparison with the stamp
stamp="$venv/.dino_lite_stamp"    # what was installed; written last
making="$venv/.dino_lite_making"  # exists while the installation is incomplete

fail() { echo "install.sh: $*" >&2; exit 2; }

# Print the version of interpreter $1 as major.minor if it is supported and can create environments, else fail.
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

# Whether $venv can be used as it is.
works() {
    local version
    [ ! -e "$making" ] && version="$(version_of "$venv/bin/python")" &&
        { [ -z "${PYTHON:-}" ] || [ "$version" = "$(version_of "$PYTHON")" ]; }
}

# Print everything that an installation depends on, in one line.
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
        fail "$venv is in the way and was not created by this script: remove it or set DINO_LITE_VENV to another folder."
    fi
    rm -rf "$venv"
    mkdir -p "$venv"
    touch "$making"
    "$python" -m venv "$venv" || fail "$python could not create an environment in $venv."
fi

echo "Installing dino_lite into $venv (the first time: takes minutes and gigabytes) ..." >&2
rm -f "$stamp"
"$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
    --constraint "$constraints" --editable "$root${extra:+[$extra]}" 1>&2 ||
    fail "pip could not install dino_lite into $venv; see its message above."
wanted "$extra" >"$stamp"
rm -f "$making"
echo "$venv/bin/python"
