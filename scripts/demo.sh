#!/usr/bin/env bash
# demo.sh [TIME]: installs dino_lite (once), pretrains DINO on the embedded data set for TIME (30s, 4m, …; default:
# $DINO_LITE_DEMO_TIME or 4m), exports the backbone, and prints its accuracy next to raw pixels and the untrained network.
# If the run exists already, it is not trained again. DINO_LITE_VENV names an environment other than .venv, DINO_LITE_RUNS a
# folder for runs other than runs/.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
budget="${1:-${DINO_LITE_DEMO_TIME:-4m}}"
python="$("$root/scripts/install.sh")"
dino_lite="$(dirname "$python")/dino-lite"
cd "$root"

runs="${DINO_LITE_RUNS:-$root/runs}"
name="demo_$budget"
run="$runs/$name"
"$dino_lite" pretrain experiment=dino_shapes name="$name" trainer.max_time="$budget" runs_dir="$runs"
"$dino_lite" evaluate checkpoint="$run"
"$dino_lite" export checkpoint="$run"

"$python" - "$run/results.json" <<'EOF_PYTHON'
import json, sys

results = json.load(open(sys.argv[1], encoding="utf-8"))
print(f"\nk-NN top-1 on the embedded data set, {results['train_seconds']:.0f} s of training")
for name in ("raw_pixels", "untrained", "trained"):
    print(f"  {name.replace('_', ' '):12s} {results['knn_' + name]:5.1f} %")
EOF_PYTHON
echo "Pictures and curves:   $run (crops, attention, neighbors, curves)"
echo "The exported backbone: $run/export/safetensors"
