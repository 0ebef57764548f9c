"""How a run's processes are started: by srun, torchrun, or the command itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning_fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from dino_lite.commands import pretrain as pretrain_command
from dino_lite.contracts import UserError
from dino_lite.distributed import rank
from dino_lite.runs import training
from dino_lite.runs.trainer import _launcher, as_command, check_launcher

SLURM = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
IN_STEP = {**SLURM, "SLURM_STEP_NUM_TASKS": "2"}


def run(devices: int, num_nodes: int = 1) -> dict[str, dict[str, int]]:
    return {"trainer": {"devices": devices, "num_nodes": num_nodes}}


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable of a launcher, and those that a test sets are removed again."""
    for key in (*IN_STEP, "RANK", "LOCAL_RANK", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_NUM_NODES"):
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "number"),
    [
        ({}, 1, 1, 0),
        (SLURM, 1, 1, 0),  # within an allocation, without srun
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, 2, 1, 0),  # srun --pty bash
        (IN_STEP, 2, 1, 1),
        (IN_STEP, 1, 2, 1),  # two nodes of one device
        ({**IN_STEP, "RANK": "5", "LOCAL_RANK": "1"}, 4, 2, 5),  # torchrun in each of two tasks
    ],
)
def test_what_srun_started_is_what_the_run_has(
    slurm: pytest.MonkeyPatch, variables: dict[str, str], devices: int, nodes: int, number: int
) -> None:
    """Also each process's rank, before there is a group."""
    for key, value in variables.items():
        slurm.setenv(key, value)
    check_launcher(run(devices, nodes))
    assert rank() == number
    expected = SLURMEnvironment if variables is IN_STEP else LightningEnvironment
    assert isinstance(_launcher(devices), expected) or not variables


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_two_tasks_do_not_train_in_one_folder(slurm: pytest.MonkeyPatch, nodes: str) -> None:
    """The second would train without the lock."""
    for key, value in {**IN_STEP, "SLURM_STEP_NUM_NODES": nodes}.items():
        slurm.setenv(key, value)
    wanted = {"1": r"say trainer.devices=2,", "2": r"say trainer.devices=1 trainer.num_nodes=2,"}
    with pytest.raises(UserError, match=rf"srun started 2 tasks.*{wanted[nodes]}"):
        check_launcher(run(1))


def test_other_processes_run_the_command_and_not_the_program(slurm: pytest.MonkeyPatch) -> None:
    """`python -c` and notebooks cannot be run again; afterwards, all is as it was."""
    before, spec = sys.argv, sys.modules["__main__"].__spec__
    with as_command("dino_lite.commands.pretrain", ["seed=1"]):
        line = [sys.executable, "-m", "dino_lite.commands.pretrain", "seed=1"]
        assert [*_basic_subprocess_cmd()] == line
        slurm.setenv("LOCAL_RANK", "0")  # as Lightning does, which then starts no process
    assert sys.argv is before
    assert sys.modules["__main__"].__spec__ is spec
    assert rank() == 0
    assert "LOCAL_RANK" not in os.environ
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("given", "jobs"),
    [
        (["PATH", "seed=1"], [["seed=1", "data.root='PATH'"]]),
        (["seed=0,1", "trust=[p]", "-m"], [["seed=0", "trust=[p]"], ["seed=1", "trust=[p]"]]),
        (["-m", "data.root='PATH/a,b'", "seed=2"], [["data.root='PATH/a,b'", "seed=2"]]),
        (["--config-dir", "PATH", "seed=1"], [["seed=1", "--config-dir=PATH"]]),
    ],
)
def test_each_job_starts_its_other_processes_by_its_own_arguments(
    slurm: pytest.MonkeyPatch, tmp_path: Path, given: list[str], jobs: list[list[str]]
) -> None:
    """Without flags of the sweep; what Lightning would start is what the job's user would type."""
    lines = []

    def look(config: dict[str, Any]) -> dict[str, Any]:
        assert not HydraConfig.initialized()  # Lightning would go by that
        lines.append([*_basic_subprocess_cmd()])
        return {}

    slurm.setattr(pretrain_command, "run_pretrain", look)
    slurm.setattr(sys, "argv", ["", *(each.replace("PATH", str(tmp_path)) for each in given)])
    pretrain_command.main()
    start = [sys.executable, "-m", "dino_lite.commands.pretrain"]
    own = [[each.replace("PATH", str(tmp_path)) for each in job] for job in jobs]
    assert lines == [[*start, *job] for job in own]


def test_a_group_ends_with_the_program_that_fails(tmp_path: Path) -> None:
    """Else the next job of a sweep would train in the group of the one that has ended."""

    def fail() -> None:
        with as_command("dino_lite.commands.pretrain", []):
            dist.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
            raise UserError("it is wrong.")

    with pytest.raises(UserError):
        fail()
    assert not dist.is_initialized()


def test_the_exit_code_of_another_process_does_not_end_a_sweep() -> None:
    """Lightning's observer of those that it has started kills the program, seconds later."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), 2, 1)
    launcher.procs.append(other)
    with pytest.raises(UserError), training._others_end_too(launcher):
        raise UserError("it is wrong.")
    assert other.wait(5) == -signal.SIGKILL
    assert launcher.procs == []
