#!/usr/bin/env python3
"""Compare dino_lite with golden numbers: `check_golden.py DIR [--only PREFIX]`.

DIR contains cases.json and the tensors it names. Each case runs the public code of dino_lite and
prints one line: its largest error and the tolerance. Exit code 1 if a case fails or a selected case
has no adapter.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

from golden.adapters_augmentation import a10, a11, b26  # noqa: E402
from golden.adapters_core import a01, a03, a04, a05, a06, a07, a08  # noqa: E402
from golden.adapters_dinov2 import b11, b12, b13  # noqa: E402
from golden.adapters_dinov2_steps import b18  # noqa: E402
from golden.adapters_eval import a09, d25  # noqa: E402
from golden.adapters_linear import d24  # noqa: E402
from golden.adapters_loss import a02  # noqa: E402
from golden.adapters_masking import b14, b14b  # noqa: E402
from golden.adapters_optim import b16, b17  # noqa: E402
from golden.adapters_vit import b15, b15b  # noqa: E402
from golden.check import Check  # noqa: E402

Adapter = Callable[[dict[str, Any], dict[str, Tensor], Path], Iterator[Check]]
ADAPTERS: dict[str, Adapter] = {
    "A01": a01,
    "A02": a02,
    "A03": a03,
    "A04": a04,
    "A05": a05,
    "A06": a06,
    "A07": a07,
    "A08": a08,
    "A09": a09,
    "A10": a10,
    "A11": a11,
    "B11": b11,
    "B12": b12,
    "B13": b13,
    "B14": b14,
    "B14b": b14b,
    "B15": b15,
    "B15b": b15b,
    "B16": b16,
    "B17": b17,
    "B18": b18,
    "B26": b26,
    "D25": d25,
    "D24": d24,
}


def nearness(check: Check) -> float:
    """Error divided by tolerance: the check fails if it is above 1 or NaN."""
    if check.error != check.error:
        return float("inf")
    if check.tolerance == 0:
        return 0.0 if check.error == 0 else float("inf")
    return check.error / check.tolerance


def run_case(case: dict[str, Any], folder: Path) -> tuple[bool, str]:
    """Run a case. Returns whether it passes, and a line about it."""
    adapter = ADAPTERS.get(case["id"].partition("_")[0])
    if adapter is None:
        return False, f"{case['id']:26s} not covered"
    started = time.monotonic()
    try:
        tensors = load_file(folder / case["file"]) if case.get("file") else {}
        checks = list(adapter(case, tensors, folder))
    except Exception as error:
        traceback.print_exc(limit=-4)
        return False, f"{case['id']:26s} FAILED  {type(error).__name__}: {error}"
    if not checks:
        return False, f"{case['id']:26s} FAILED  nothing was checked"
    failed = [check for check in checks if nearness(check) > 1]
    worst = max(checks, key=nearness)
    line = (
        f"{case['id']:26s} {'FAILED' if failed else 'ok':6s}  {worst.error:.2e} of "
        f"{worst.tolerance:.2e} allowed"
        f" ({worst.name}); {len(checks)} checks, {len(failed)} failed, "
        f"{time.monotonic() - started:.1f} s"
    )
    return not failed, line


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="contains cases.json")
    parser.add_argument(
        "--only", default="", metavar="PREFIX", help="prefix of case ids, e.g. A or B1"
    )
    options = parser.parse_args(arguments)
    try:
        content = json.loads((options.folder / "cases.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"{options.folder / 'cases.json'} cannot be read: {error}", file=sys.stderr)
        return 2
    selected = [case for case in content["cases"] if case["id"].startswith(options.only)]
    if not selected:
        print(f"no case begins with {options.only!r}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    torch.set_num_threads(1)  # for tiny tensors, more threads are slower
    held = []
    for case in selected:
        ok, line = run_case(case, options.folder)
        print(line, flush=True)
        held.append(ok)
    print(f"{sum(held)} of {len(held)} cases hold")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
