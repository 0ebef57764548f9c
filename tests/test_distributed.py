"""Process groups end before their processes do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_CODE = """
import atexit, os, sys
import torch.distributed as dist
atexit.register(lambda: print("up" if dist.is_initialized() else "left"))  # runs last
import dino_lite.distributed
"""


_GROUP = "dist.init_process_group('gloo', 'file://MEET', rank=0, world_size=1)"


def run(tmp_path: Path, more: str) -> subprocess.CompletedProcess[str]:
    """A process that does `more` and tells at its end whether it is in a group."""
    code = (_CODE + more).replace("MEET", str(tmp_path / "meet"))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("more", ["", _GROUP, f"{_GROUP}; dist.destroy_process_group()"])
def test_a_process_leaves_its_group_before_its_interpreter_ends(tmp_path: Path, more: str) -> None:
    """Gloo's threads would abort it, whatever it had done (exit code -6)."""
    done = run(tmp_path, more)
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


def test_a_forked_process_leaves_the_group_to_its_parent(tmp_path: Path) -> None:
    """It has none of gloo's threads, and would wait for them for ever."""
    fork = f"{_GROUP}\nif not os.fork(): sys.exit(0)\nassert os.wait()[1] == 0"
    done = run(tmp_path, fork)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "left"), done.stderr


def test_after_an_error_nobody_waits_for_the_others(tmp_path: Path) -> None:
    """What is under way with them may take half an hour to fail."""
    done = run(tmp_path, f"{_GROUP}\nraise RuntimeError('lost')")
    assert done.returncode != 0
    assert done.stdout == "up\n"
