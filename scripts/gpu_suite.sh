#!/usr/bin/env bash
# gpu_suite.sh OUT [PART...]: tests and benchmarks that need a GPU, in parts of less than nine minutes each; no network.
#   1 correctness: tests marked gpu            2 step: ViT-S/16, 64 and 128 images, compared with the published one
#   3 step: ViT-S/16, 256 images; ViT-B/16     4 data: time waiting for data, with crops made on the GPU
#   5 CIFAR-10: a short training, k-NN         6 scaling of the step; estimates of runs
# Each part prints its table and writes JSON into OUT; OUT/suite.json records the exit status of each. If a part fails, the
# others still run, and the exit status is 1; it is 2 without a GPU.
#   PYTHON   the interpreter (default: python3), with torch, torchvision, timm and pytorch-lightning
#   CIFAR10  an .npz with x_train, y_train, x_test, y_test, or what image_atlas.py packed (default: .whl/cifar10.npz)
# Other missing packages are installed from the wheels in .whl/, which scripts/pack_gpu.sh creates.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
if [ $# -eq 0 ]; then
    echo "usage: gpu_suite.sh OUT [PART...], parts are 1 to 6" >&2
    exit 2
fi
out="$1"
shift
for part in "$@"; do
    case "$part" in [1-6]) ;; *) echo "gpu_suite.sh: there is no part $part; parts are 1 to 6." >&2; exit 2 ;; esac
done
if ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    echo "gpu_suite.sh: torch of $python finds no GPU here; run this on a machine that has one." >&2
    exit 2
fi
mkdir -p "$out"
out="$(cd "$out" && pwd)"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if ! "$python" -c 'import beartype, hydra, jaxtyping, omegaconf' 2>/dev/null; then
    if ! "$python" -m pip install -q --no-index --no-deps --no-compile --target "$scratch/site" .whl/*.whl; then
        echo "gpu_suite.sh: hydra-core, omegaconf, jaxtyping or beartype is missing; run scripts/pack_gpu.sh first." >&2
        exit 2
    fi
    export PYTHONPATH="$PYTHONPATH:$scratch/site"
fi
"$python" -c 'import datetime, torch
print(torch.cuda.get_device_name(), "torch", torch.__version__, datetime.datetime.now().isoformat(timespec="minutes"))'

correctness() {
    local files
    files="$(grep -l 'mark\.gpu' tests/test_*.py)" || return 1
    # shellcheck disable=SC2086  # one word per file. -W: warnings of another torch version are not errors
    timeout 520 "$python" -m pytest -q -m gpu -W default -p no:cacheprovider $files
}

step() {
    timeout 530 "$python" scripts/bench_step.py --rounds 8 --json "$out/$1.json" --config "${@:2}"
}

data() {
    # Photographs may not be available: images of the embedded set with added noise take as long to decode.
    "$python" - "$scratch/photos" <<'EOF_PYTHON' &&
import sys
from pathlib import Path
import numpy as np
from PIL import Image
from dino_lite.data.shapes import open_shapes

folder, grain = Path(sys.argv[1]), np.random.default_rng(0)
folder.mkdir()
source = open_shapes(num_train=512, num_test=0, image_size=500).train
for i in range(len(source)):
    pixels = source.read(i)[:375] + grain.normal(0, 12, (375, 500, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:04d}.jpg", quality=90)
EOF_PYTHON
    timeout 480 "$python" scripts/bench_step.py --whole --rounds 4 --photos "$scratch/photos" --json "$out/data.json"
}

cifar() {
    local packed="${CIFAR10:-$root/.whl/cifar10.npz}"
    "$python" scripts/image_atlas.py unpack "$packed" "$scratch/cifar10.npz" &&
        timeout 440 "$python" -m dino_lite.commands.pretrain experiment=dino_cifar10_speedrun \
            data.root="$scratch/cifar10.npz" name=cifar10 runs_dir="$scratch" baselines=false &&
        timeout 80 "$python" -m dino_lite.commands.evaluate checkpoint="$scratch/cifar10" &&
        cp "$scratch/cifar10/results.json" "$out/cifar10.json" &&
        cp "$scratch/cifar10/metrics.csv" "$out/cifar10_metrics.csv"
}

scaling() {
    timeout 400 "$python" scripts/measure_scaling.py --rounds 3 --json "$out/scaling.json" --plots "$out" || return 1
    timeout 130 "$python" scripts/measure_estimate.py --seconds 20 --only dino_vit_64 dinov2_shapes --json "$out/estimate.json"
}

# Adds part $1 with exit status $2 and seconds $3 to OUT/suite.json, which may exist from other calls.
note() {
    "$python" - "$out/suite.json" "$@" <<'EOF_PYTHON'
import json, sys, torch
from datetime import datetime
from pathlib import Path

file, part, status, seconds = Path(sys.argv[1]), *sys.argv[2:]
suite = json.loads(file.read_text()) if file.is_file() else {"parts": {}}
suite |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
ended = datetime.now().isoformat(timespec="seconds")
suite["parts"][part] = {"exit_status": int(status), "seconds": int(seconds), "ended": ended}
file.write_text(json.dumps(suite, indent=2) + "\n")
EOF_PYTHON
}

if [ $# -eq 0 ]; then set -- 1 2 3 4 5 6; fi
failed=""
for part in "$@"; do
    printf '\n== part %s\n' "$part"
    started=$SECONDS status=0
    case "$part" in
        1) correctness || status=$? ;;
        2) step step_small vit_small_16_224_b64 vit_small_16_224_b128 || status=$? ;;
        3) step step_large vit_small_16_224_b256 vit_base_16_224 || status=$? ;;
        4) data || status=$? ;;
        5) cifar || status=$? ;;
        6) scaling || status=$? ;;
    esac
    note "$part" "$status" "$((SECONDS - started))"
    if [ "$status" -ne 0 ]; then failed="$failed $part"; fi
done
if [ -n "$failed" ]; then
    printf '\nparts that failed:%s\n' "$failed"
    exit 1
fi
