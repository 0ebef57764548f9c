"""Process groups end before their processes do."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# One interpreter imports torch, and forks a child for each case, which ends as interpreters do.
_CODE = """
import atexit, json, os, sys
import torch.distributed as dist
codes = {}
for name, more in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), 1)
        atexit.register(lambda: print("up" if dist.is_initialized() else "left"))  # runs last
        import dino_lite.distributed
        exec(more)
        break
    codes[name] = os.waitstatus_to_exitcode(os.wait()[1])
else:
    print(json.dumps(codes))
"""
_GROUP = (
    "dist.init_process_group('gloo', f'file://{os.getcwd()}/{name}.meet', rank=0, world_size=1)"
)
_CASES = {
    "never joined": "",
    "joined": _GROUP,
    "left already": f"{_GROUP}; dist.destroy_process_group()",
    "forked": f"{_GROUP}\nif not os.fork(): sys.exit(0)\nassert os.wait()[1] == 0",
    "failed": f"{_GROUP}\nraise RuntimeError('lost')",
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str]]]:
    """Exit code of each case's process, and whether it was in a group at its end, as it printed."""
    folder = tmp_path_factory.mktemp("cases")
    line = [sys.executable, "-c", _CODE, json.dumps(_CASES)]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    return {name: (codes[name], (folder / name).read_text().splitlines()) for name in _CASES}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["never joined", "joined", "left already"])
def test_a_process_leaves_its_group_before_its_interpreter_ends(
    ended: dict[str, tuple[int, list[str]]], case: str
) -> None:
    """Gloo's threads would abort it, whatever it had done (exit code -6)."""
    assert ended[case] == (0, ["left"])


def test_a_forked_process_leaves_the_group_to_its_parent(
    ended: dict[str, tuple[int, list[str]]],
) -> None:
    """It has none of gloo's threads, and would wait for them for ever."""
    code, said = ended["forked"]
    assert (code, said[-1]) == (0, "left")


def test_after_an_error_nobody_waits_for_the_others(
    ended: dict[str, tuple[int, list[str]]],
) -> None:
    """What is under way with them may take half an hour to fail."""
    code, said = ended["failed"]
    assert code == 1
    assert said == ["up"]
