"""Signals that ask a run to stop: what is saved, what is told, and what workers do meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from dino_lite import pretrain
from dino_lite.callbacks import checkpoints
from dino_lite.callbacks.checkpoints import Checkpoints
from dino_lite.config import user_errors
from dino_lite.contracts import Interrupted, UserError
from dino_lite.data import workers
from dino_lite.data.workers import Worker
from dino_lite.interrupts import STOP_SIGNALS, Interrupt, interrupt, on_stop
from dino_lite.runs import pretraining
from dino_lite.runs.run import Run
from ranks import command
from test_callbacks import NUM_STEPS, At, Training, read
from test_pretrain import assert_same
from tiny import checkpoint, tiny_command, train


def send(number: int) -> None:
    """To this process; the handler has run when this returns."""
    os.kill(os.getpid(), number)


class SignalGroup(pl.Callback):
    """Sends SIGTERM twice to the whole process group in the middle of a step, as `timeout` does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Own group, before loaders start their workers."""
        os.setsid()

    def on_after_backward(self, trainer: pl.Trainer, *args: Any) -> None:
        """The last micro-batch of the step that follows `self.step` steps."""
        if trainer.global_step == self.step:
            for _ in range(2):
                os.killpg(0, signal.SIGTERM)
                time.sleep(0.05)  # workers that do not ignore it are dead by then


@pytest.mark.slow
def test_sigterm_to_the_process_group_loses_nothing(tmp_path: Path) -> None:
    """Two workers, and two signals in a row: the step is completed and saved, and the resumed run
    ends in the weights of an uninterrupted one.
    """
    options = ["trainer.max_steps=9", "callbacks.online_eval=null", "name=r"]
    whole = train(tmp_path / "whole", *options)
    stop = "+callbacks.stop={_target_: test_interrupts.SignalGroup, step: 4}"
    parts = tiny_command(
        tmp_path / "parts", *options, "loader.num_workers=2", "callbacks.pictures=null"
    )
    result = command("pretrain", *parts, stop)
    folder = tmp_path / "parts" / "r"
    assert result.returncode == 143, result.stderr[-2000:]
    last = result.stderr.strip().splitlines()[-1]
    assert last == (
        f"dino-lite: {folder} was interrupted by SIGTERM; run the same command to resume it "
        "after step 5."
    )
    assert "Traceback" not in result.stderr
    assert checkpoint(folder)["global_step"] == 5
    pretrain(*parts)
    assert_same(checkpoint(whole)["state_dict"], checkpoint(folder)["state_dict"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_between_steps_is_saved_at_once(tmp_path: Path, number: int) -> None:
    """An evaluation after step 3 may outlast the time until the system kills."""
    seen = []

    def during_evaluation(step: int) -> None:
        if step == 2:
            send(number)
            seen.append(read(tmp_path / "checkpoints" / "last.ckpt")["global_step"])

    with pytest.raises(SystemExit) as ended:
        Training(tmp_path, At(end=during_evaluation), Checkpoints(tmp_path)).fit()
    assert ended.value.code == 128 + number
    assert seen == [3]
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("number", "steps", "said"),
    [
        (signal.SIGTERM, [2, 3], ["SIGTERM: Stopping after this step and saving."]),
        (
            signal.SIGINT,
            [2],
            [
                "Stopping after this step and saving; press Ctrl-C again to stop at once.",
                "Stopping when the checkpoint is written.",
            ],
        ),
    ],
)
def test_a_signal_during_a_save_lets_it_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    steps: list[int],
    said: list[str],
) -> None:
    """The next step is the last; after a second Ctrl-C there is none."""
    monkeypatch.setattr(checkpoints, "_AGAIN", 0.0)
    run = Training(tmp_path, Checkpoints(tmp_path, every_n_steps=2))
    save, saved = run.trainer.strategy.save_checkpoint, []

    def slow(content: dict[str, Any], path: Path, storage_options: Any = None) -> None:
        if not saved:
            send(number)
            send(number)
        saved.append(content["global_step"])
        save(content, path, storage_options)

    monkeypatch.setattr(run.trainer.strategy, "save_checkpoint", slow)
    with pytest.raises(SystemExit):
        run.fit()
    assert saved == steps
    assert read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == steps[-1]
    assert [line for line in capsys.readouterr().err.splitlines() if "Stopping" in line] == said


def test_a_signal_at_the_end_keeps_the_final_state(tmp_path: Path) -> None:
    """During the evaluation of the final weights."""

    class AtEnd(pl.Callback):
        def on_train_end(self, *args: Any) -> None:
            send(signal.SIGTERM)

    with pytest.raises(SystemExit):
        Training(tmp_path, AtEnd(), Checkpoints(tmp_path)).fit()
    assert read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == NUM_STEPS


def test_before_the_first_step_the_run_ends_at_once(tmp_path: Path) -> None:
    """Compiling takes a minute, and nothing could be saved: the step is not completed."""
    run = Training(tmp_path, Checkpoints(tmp_path))
    run.method.targets = lambda *_: send(signal.SIGINT)  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        run.fit()
    assert run.trainer.global_step == 0
    assert not (tmp_path / "checkpoints").exists()


def test_an_interrupted_run_says_what_was_saved(tmp_path: Path) -> None:
    """Nothing before the first step."""
    stop = "callbacks.stop={_target_: test_interrupts.SignalAtStart}"
    with pytest.raises(Interrupted, match=r"before anything was saved; run the same command"):
        train(tmp_path, stop)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_a_trained_run_that_is_interrupted_says_so(tmp_path: Path) -> None:
    """While it is drawn or measured; the same command does the rest."""
    for number, by in ((signal.SIGTERM, " by SIGTERM"), (signal.SIGINT, "")):
        said = rf"interrupted{by}, but is trained and saved; run the same command to finish it\.$"
        with pytest.MonkeyPatch.context() as patch, on_stop(interrupt):
            patch.setattr(pretraining, "finish", lambda *_, number=number: send(number))
            with pytest.raises(Interrupted, match=said) as ended:
                train(tmp_path)
        assert ended.value.exit_code == 128 + number
    run = train(tmp_path)
    assert checkpoint(run)["global_step"] == 8
    assert Run(run).results()["finished"]


class SignalAtStart(pl.Callback):
    """Ctrl-C in the first step."""

    def on_after_backward(self, *args: Any) -> None:
        send(signal.SIGINT)


def test_commands_end_with_the_signals_number(capsys: pytest.CaptureFixture[str]) -> None:
    """One line; 130 after Ctrl-C, 143 after SIGTERM."""
    for number, code, line in (
        (signal.SIGINT, 130, "dino-lite: interrupted.\n"),
        (signal.SIGTERM, 143, "dino-lite: interrupted by SIGTERM.\n"),
    ):
        with pytest.raises(SystemExit) as ended, user_errors(), on_stop(interrupt):
            send(number)
        assert ended.value.code == code
        assert capsys.readouterr().err == line


def test_ignored_signals_stay_ignored() -> None:
    """SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_stop(interrupt):
            send(signal.SIGHUP)
        with pytest.raises(Interrupt), on_stop(interrupt):
            send(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_ignore_signals_and_are_killed_at_the_end(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else multiprocessing would wait for a stuck worker forever."""
    start = multiprocessing.get_context(method).Process._Popen  # type: ignore[attr-defined]
    monkeypatch.setattr(Worker, "_Popen", staticmethod(start))
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: method)
    worker = Worker(target=time.sleep, args=(100,), daemon=True)
    worker.start()
    assert worker.pid is not None
    for number in STOP_SIGNALS:
        os.kill(worker.pid, number)
    worker.join(0.2)
    assert worker.is_alive()
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        workers._kill_workers()
    finally:
        signal.signal(signal.SIGCHLD, handler)
    worker.join(5)
    assert worker.exitcode == -signal.SIGKILL


def test_a_killed_worker_is_not_taken_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system kills one when memory runs out; torch then raises wherever the program is."""
    run = Training(tmp_path, Checkpoints(tmp_path, every_n_steps=2))
    save, errors = run.trainer.strategy.save_checkpoint, ["DataLoader worker (pid 7) is killed"]

    def fail(*args: Any, **kwargs: Any) -> None:
        if errors:
            raise RuntimeError(errors.pop())
        save(*args, **kwargs)

    monkeypatch.setattr(run.trainer.strategy, "save_checkpoint", fail)
    with pytest.raises(RuntimeError, match="DataLoader worker") as caught:
        run.fit()
    assert not isinstance(caught.value, UserError)
    assert read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2
