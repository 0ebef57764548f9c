"""Process groups end before their processes do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_CODE = """
import atexit, os
import torch.distributed as dist
atexit.register(lambda: print("up" if dist.is_initialized() else "left"))  # runs last
import dino_lite.distributed
START
assert dist.is_initialized() is STARTED
"""


@pytest.mark.parametrize(
    ("start", "started"),
    [
        ("pass", False),
        ("dist.init_process_group('gloo', 'file://MEET', rank=0, world_size=1)", True),
    ],
)
def test_a_process_leaves_its_group_before_its_interpreter_ends(
    tmp_path: Path, start: str, started: bool
) -> None:
    """Gloo's threads would abort it, whatever it had done (exit code -6)."""
    code = _CODE.replace("STARTED", str(started)).replace("START", start)
    code = code.replace("MEET", str(tmp_path / "meet"))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr
