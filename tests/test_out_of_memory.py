"""Out of memory in a run's first steps: smaller micro-batches, or a sentence."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_lite import pretrain
from dino_lite.config import load
from dino_lite.contracts import Crops, Progress, UserError
from dino_lite.methods import clock
from dino_lite.methods.dino import DINO
from dino_lite.methods.step import Step
from dino_lite.runs import pretraining as command
from test_pretrain import assert_same
from tiny import checkpoint, tiny_command, train

pytestmark = pytest.mark.slow


def without_memory(
    monkeypatch: pytest.MonkeyPatch, most: int, error: BaseException | None = None
) -> None:
    """Steps fail where a micro-batch has more than `most` images."""
    accumulate = Step._accumulate

    def scarce(self: Step, crops: Crops, *rest: Any) -> dict[str, Tensor]:
        if (self.micro_batch_size or crops.num_images) > most:
            raise error or torch.OutOfMemoryError("CUDA out of memory")
        return accumulate(self, crops, *rest)

    monkeypatch.setattr(Step, "_accumulate", scarce)


AUTO = "trainer.micro_batch_size=auto"
DROPS = "backbone.drop_path=0.2"  # paths are drawn anew for each micro-batch


@pytest.mark.parametrize(
    "error",
    [
        None,
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_out_of_memory_halves_the_micro_batch_and_begins_anew(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: BaseException | None,
) -> None:
    """Until it fits: to the last bit the run that had that size from the beginning."""
    expected = train(tmp_path / "given", "trainer.micro_batch_size=2", DROPS, "name=run")
    without_memory(monkeypatch, 3, error)
    run = train(tmp_path / "auto", AUTO, DROPS, "name=run")
    told = [line for line in capfd.readouterr().out.splitlines() if line.startswith("Out of mem")]
    assert len(told) == 2
    assert "micro-batches of 8 images: restarting with trainer.micro_batch_size=4" in told[0]
    assert "micro-batches of 4 images: restarting with trainer.micro_batch_size=2" in told[1]
    assert "stochastic depth is drawn" in told[1]
    assert load(run / "config.yaml")["trainer"]["micro_batch_size"] == 2
    a, b = checkpoint(expected), checkpoint(run)
    assert_same(a["state_dict"], b["state_dict"])
    assert_same(a["optimizer_states"], b["optimizer_states"])
    metrics = [(folder / "metrics.csv").read_text().count("\n") for folder in (expected, run)]
    assert metrics[0] == metrics[1]


def test_the_first_try_is_freed_before_the_second_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is short, two modules would need twice as much."""
    build, alive, modules = command.build, [], []

    def counted(*arguments: Any) -> Any:
        alive.append(sum(module() is not None for module in modules))
        built = build(*arguments)
        modules.append(weakref.ref(built[1]))
        return built

    monkeypatch.setattr(command, "build", counted)
    without_memory(monkeypatch, 4)
    train(tmp_path, AUTO)
    assert alive == [0, 0]


def test_a_smaller_micro_batch_is_kept_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The resumed run does not try the whole batch again, and equals one that was not stopped."""
    expected = train(tmp_path / "given", "trainer.micro_batch_size=4", "name=run")
    without_memory(monkeypatch, 4)
    stop = "callbacks.stop={_target_: tiny.StopAt, step: 4}"
    with pytest.raises(UserError, match="run the same command to resume"):
        train(tmp_path / "auto", AUTO, "name=run", stop)
    capfd.readouterr()
    run = train(tmp_path / "auto", AUTO, "name=run")
    assert "Out of memory" not in capfd.readouterr().out
    assert load(run / "config.yaml")["trainer"]["micro_batch_size"] == 4
    assert_same(checkpoint(expected)["state_dict"], checkpoint(run)["state_dict"])


def test_out_of_memory_on_resume_goes_on_from_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a smaller device: not from the seed."""
    stop = "callbacks.stop={_target_: tiny.StopAt, step: 4}"
    with pytest.raises(UserError, match="run the same command to resume"):
        train(tmp_path, AUTO, "name=run", stop)
    without_memory(monkeypatch, 4)
    run = train(tmp_path, AUTO, "name=run")
    assert checkpoint(run)["global_step"] == 8
    rows = (run / "metrics.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows[1:]][-1] == "7"


@pytest.mark.parametrize(
    ("options", "most", "said"),
    [
        ([AUTO, "method=dinov2"], 4, r"KoLeo .* so trainer\.micro_batch_size=4 would change"),
        ([AUTO, "method.head.batch_norm=true"], 4, r"trainer\.micro_batch_size=4 would change"),
        (["trainer.micro_batch_size=8"], 4, r"of 8 images: set a smaller trainer\.micro_batch"),
        ([AUTO], 0, r"of 1 image: set a smaller trainer\.micro_batch_size"),
    ],
)
def test_where_half_would_not_do_it_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], most: int, said: str
) -> None:
    """Images that are looked at together, a size that was asked for, a single image."""
    without_memory(monkeypatch, most)
    with pytest.raises(UserError, match=said) as caught:
        pretrain(*tiny_command(tmp_path, *options))
    assert "\n" not in str(caught.value)


def test_out_of_memory_later_in_a_run_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was trained is kept."""

    def late(method: DINO, at: Progress, ok: Tensor) -> None:
        method.step += 1
        if at.step == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(clock, "_WARM_UP", (1, 1, 0.0))
    monkeypatch.setattr(clock, "_MEASURED", (2, 0.0))
    monkeypatch.setattr(DINO, "after_step", late)
    with pytest.raises(UserError, match=r"run ran out of memory: set trainer\.memory=low"):
        train(tmp_path, AUTO, "callbacks.checkpoints.every_n_steps=4", "name=run")
    assert checkpoint(tmp_path / "run")["global_step"] == 4


def test_another_error_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for a lack of memory."""
    without_memory(monkeypatch, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(tmp_path, AUTO)
