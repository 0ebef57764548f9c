"""README's commands run, and its numbers and links are there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dino_lite.cli import COMMANDS
from dino_lite.config import compose
from dino_lite.overrides import quote_override

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_lead_somewhere() -> None:
    """Every relative link names a file of the repository."""
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_first_commands_are_the_two_scripts() -> None:
    """A new reader meets scripts/demo.sh and scripts/test.sh first, and both can be run."""
    commands = re.findall(r"^    (\S+)", README, flags=re.MULTILINE)[:2]
    assert commands == ["scripts/demo.sh", "scripts/test.sh"]
    assert all(os.access(ROOT / command, os.X_OK) for command in commands)


def test_every_override_in_the_readme_is_understood(tmp_path: Path) -> None:
    """Each KEY=VALUE that README shows composes."""
    shown = re.findall(r"`((?:trainer|backbone|loader|data|compat)[\w.]*=[^`]+)`", README)
    assert len(shown) >= 10
    for text in shown:
        compose("pretrain", [quote_override(part) for part in text.split()])


def test_every_command_in_the_readme_exists() -> None:
    """dino-lite COMMAND is one of the commands."""
    used = set(re.findall(r"dino-lite (\w+)", README))
    assert used
    assert used <= COMMANDS.keys()


@pytest.mark.slow
def test_demo_runs_shortened_and_prints_its_table(tmp_path: Path) -> None:
    """scripts/demo.sh in this environment: trains for seconds, prints three numbers, leaves
    pictures and an export.
    """
    venv = os.environ.get("DINO_LITE_VENV")
    if venv is None:
        pytest.skip("DINO_LITE_VENV names no environment: scripts/test.sh does")
    environment = os.environ | {"DINO_LITE_RUNS": str(tmp_path)}
    result = subprocess.run(
        ["bash", str(ROOT / "scripts" / "demo.sh"), "3s"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    run = tmp_path / "demo_3s"
    results = json.loads((run / "results.json").read_text())
    assert {"knn_raw_pixels", "knn_untrained", "knn_trained", "train_seconds"} <= results.keys()
    assert f"{results['knn_trained']:.1f} %" in result.stdout
    for name in ("crops.png", "curves.png", "attention.png", "neighbors.png"):
        assert (run / name).is_file(), name
    code = f"import dino_lite; dino_lite.load_backbone({str(run / 'export' / 'safetensors')!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
