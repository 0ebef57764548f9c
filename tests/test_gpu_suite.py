"""scripts/gpu_suite.sh without a GPU, and with a stand-in for Python that pretends to have one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


def suite(root: Path, python: Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(root / "scripts" / "gpu_suite.sh"), *arguments],
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def pretender(tmp_path: Path) -> Path:
    """An interpreter that writes down what it is asked to run, and fails at pytest."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(
        "#!/usr/bin/env bash\n"
        'if [ "$1" = - ]; then cat > /dev/null; fi\n'
        f'echo "$*" >> "{log}"\n'
        'case "$*" in "-m pytest "*) exit 3 ;; esac\n'
    )
    python.chmod(0o755)
    return python


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence(root: Path, tmp_path: Path) -> None:
    """Exit status 2, and nothing is written."""
    done = suite(root, sys.executable, str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["out", "7"], ["out", "1", "two"]])
def test_wrong_arguments_are_a_sentence(
    root: Path, tmp_path: Path, pretender: Path, arguments: list[str]
) -> None:
    """Which parts there are, before anything runs."""
    done = suite(root, pretender, *arguments)
    assert done.returncode == 2
    assert "1 to 6" in done.stderr
    assert not (tmp_path / "log").exists()


def test_a_part_that_fails_stops_no_other(root: Path, tmp_path: Path, pretender: Path) -> None:
    """The other parts run, the failed one is named, and the exit status is 1."""
    done = suite(root, pretender, str(tmp_path / "out"), "2", "1", "3")
    assert done.returncode == 1
    assert done.stdout.rstrip().endswith("parts that failed: 1")
    log = (tmp_path / "log").read_text()
    assert log.index("step_small.json") < log.index("-m pytest") < log.index("step_large.json")
    notes = [line.split()[2:4] for line in log.splitlines() if "suite.json" in line]
    assert notes == [["2", "0"], ["1", "3"], ["3", "0"]]


def test_without_parts_all_of_them_run(root: Path, tmp_path: Path, pretender: Path) -> None:
    """Six parts, among them one that fails and one whose results are not there."""
    done = suite(root, pretender, str(tmp_path / "out"))
    assert done.stdout.count("== part ") == 6
    assert done.stdout.rstrip().endswith("parts that failed: 1 5")


def test_every_configuration_that_it_names_is_known(
    root: Path, tmp_path: Path, pretender: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bench_step.py takes the names that the suite hands to it."""
    monkeypatch.syspath_prepend(root / "scripts")
    from bench_step import chosen

    suite(root, pretender, str(tmp_path / "out"), "2", "3")
    for line in (tmp_path / "log").read_text().splitlines():
        if "--config" in line:
            assert chosen(line.partition("--config ")[2].split(), batch=1)


def test_an_atlas_gives_the_images_back(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many, in order, with their labels, and nearly the same pixels."""
    monkeypatch.syspath_prepend(root / "scripts")
    import image_atlas

    ramp = np.arange(8, dtype=np.uint8)[:, None, None] * 20
    x_train = np.stack([np.broadcast_to(ramp + i % 100, (8, 8, 3)) for i in range(5003)])
    arrays = {"x_train": x_train, "y_train": np.arange(5003) % 7}
    arrays |= {"x_test": x_train[:9], "y_test": np.arange(9)}
    np.savez(tmp_path / "small.npz", **arrays)
    for do, source, out in (("pack", "small", "atlas"), ("unpack", "atlas", "back")):
        files = [str(tmp_path / f"{name}.npz") for name in (source, out)]
        assert image_atlas.main([do, *files]) == 0
    atlas, back = (np.load(tmp_path / f"{name}.npz") for name in ("atlas", "back"))
    assert "train_jpeg_01" in atlas.files
    assert sorted(back.files) == sorted(arrays)
    for key, value in arrays.items():
        assert back[key].shape == value.shape
        assert np.abs(back[key].astype(int) - value.astype(int)).max() <= (3 if "x" in key else 0)
    assert image_atlas.main(["pack", str(tmp_path / "none.npz"), str(tmp_path / "x.npz")]) == 2
