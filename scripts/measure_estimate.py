#!/usr/bin/env python3
"""Compare the estimate from a run's first steps with the speed of its later steps.

    scripts/measure_estimate.py [--json FILE] [--only NAME ...] [--seconds 60] [--data DIR]

Each case is a run of `dino-lite pretrain` on the embedded set (or the images in DIR) in a separate
process, without evaluations, as there are ten of them even in a short run. The ratio is predicted
steps/s over the steps/s measured after the estimate. It must be within 0.75 and 1.25; otherwise the
exit status is 1. Varying load of the machine changes the ratio.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from step_process import machine

BAR = (0.75, 1.25)
CASES: dict[str, list[str]] = {
    "dino_vit_shapes": ["data=shapes"],
    "dino_vit_64": ["data=shapes", "data.image_size=64", "backbone=vit", "augment.global_size=64"],
    "dino_convnet": ["data=shapes", "backbone=convnet"],
    "dinov2_shapes": ["data=shapes", "method=dinov2"],
    "dinov3_shapes": ["data=shapes", "method=dinov3"],
}


def measure(name: str, seconds: float, data: Path | None) -> dict[str, Any]:
    """Run a case; returns its estimate and the speed of the steps after it."""
    overrides = CASES[name]
    if data is not None:
        overrides = [f"data.root={data}", *(o for o in overrides if not o.startswith("data"))]
    with tempfile.TemporaryDirectory() as scratch:
        options = [f"runs_dir={scratch}", "name=run", f"trainer.max_time={seconds}s"]
        options += ["callbacks.online_eval=null"]
        line = [sys.executable, "-m", "dino_lite.commands.pretrain", *overrides, *options]
        ran = subprocess.run(
            [*line, "baselines=false"], capture_output=True, text=True, check=False
        )
        if ran.returncode:
            raise SystemExit(f"{name}: {ran.stderr or ran.stdout}")
        results = json.loads((Path(scratch) / "run" / "results.json").read_text())
    told = results["estimate"]
    step, spent = told["measured_at"]
    predicted = (told["steps"] - step) / (told["seconds"] - spent)
    followed = (results["steps"] - step) / (results["train_seconds"] - spent)
    said = [text for text in ran.stdout.splitlines() if text.startswith("estimate: ")]
    return {
        "name": name,
        "steps": results["steps"],
        "steps_predicted": told["steps"],
        "steps_per_second": followed,
        "steps_per_second_predicted": predicted,
        "ratio": predicted / followed,
        "line": said[0],
        "estimate": told,
        "seconds": results["train_seconds"],
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--only", nargs="+", choices=list(CASES), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=60.0, help="training time per case")
    parser.add_argument("--data", type=Path, metavar="DIR", help="images to train on")
    options = parser.parse_args()
    print(machine(), "", "| run | steps/s | predicted | ratio | after |", sep="\n")
    print("| --- | --- | --- | --- | --- |")
    found = []
    for name in options.only or CASES:
        row = measure(name, options.seconds, options.data)
        found.append(row)
        step, spent = row["estimate"]["measured_at"]
        print(
            f"| {name} | {row['steps_per_second']:.2f} | {row['steps_per_second_predicted']:.2f} "
            f"| **{row['ratio']:.2f}** | {step} steps, {spent:.0f} s |",
            flush=True,
        )
    if options.json:
        content = {"machine": machine(), "runs": found}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if all(BAR[0] <= row["ratio"] <= BAR[1] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
