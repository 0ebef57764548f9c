#!/usr/bin/env bash
# pack_gpu.sh [CIFAR.npz]: puts what gpu_suite.sh may miss on a machine without network into .whl/ (ignored by git):
# wheels of the pure Python packages beside torch, and CIFAR-10 as JPEG atlases (46 MiB) where it is given or in ../shared.
# Then take the checkout with .whl/ there and run scripts/gpu_suite.sh OUT. PYTHON names the interpreter.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
cifar="${1:-$root/../shared/data/cifar10_webp.npz}"

"$python" -m pip wheel -q --no-deps --wheel-dir "$root/.whl" -c "$root/constraints.txt" \
    hydra-core omegaconf antlr4-python3-runtime jaxtyping wadler-lindig beartype
if [ -f "$cifar" ]; then
    "$python" "$root/scripts/image_atlas.py" pack "$cifar" "$root/.whl/cifar10.npz"
elif [ $# -gt 0 ]; then
    echo "pack_gpu.sh: $cifar is not there." >&2
    exit 2
fi
du -sh "$root/.whl"
