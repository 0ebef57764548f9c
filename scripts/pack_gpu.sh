#!/usr/bin/env bash
# pack_gpu.sh [CIFAR.npz]: prepares .whl/ (ignored by git) for gpu_suite.sh on a machine without network: wheels of the pure
# Python packages needed besides torch, and CIFAR-10 as JPEG atlases (46 MiB) if given or in ../shared.
# Then copy the checkout with .whl/ to that machine and run scripts/gpu_suite.sh OUT. PYTHON names the interpreter.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
cifar="${1:-$root/../shared/data/cifar10_webp.npz}"

"$python" -m pip wheel -q --no-deps --wheel-dir "$root/.whl" -c "$root/constraints.txt" \
    hydra-core omegaconf antlr4-python3-runtime jaxtyping wadler-lindig beartype
if [ -f "$cifar" ]; then
    "$python" "$root/scripts/image_atlas.py" pack "$cifar" "$root/.whl/cifar10.npz"
elif [ $# -gt 0 ]; then
    echo "pack_gpu.sh: $cifar does not exist." >&2
    exit 2
fi
du -sh "$root/.whl"
