#!/usr/bin/env bash
# gpu_suite.sh [OUT]: what needs a GPU, correctness first; no network. Uses the python on PATH (or $PYTHON), which
# must have what pyproject.toml asks for. OUT (default: runs) takes the runs.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
out="${1:-$root/runs}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
cd "$root"

"$python" -c 'import torch; assert torch.cuda.is_available(), "torch finds no GPU"; print(torch.cuda.get_device_name())'
"$python" -m pytest -q -m gpu tests
"$python" -m dino_lite.commands.pretrain experiment=dino_shapes name=gpu_shapes trainer.max_time=1m runs_dir="$out"
"$python" -m dino_lite.commands.evaluate checkpoint="$out/gpu_shapes"
