"""Observers watch real, tiny runs: they change nothing, and say and keep what they promise."""

from __future__ import annotations

import csv
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from dino_lite.backbones.vit import ViT
from dino_lite.callbacks import online_eval, throughput
from dino_lite.callbacks.checkpoints import Checkpoints
from dino_lite.callbacks.drawing import Pictures
from dino_lite.callbacks.health import Health
from dino_lite.callbacks.online_eval import OnlineEval
from dino_lite.callbacks.progress import RunProgress, duration
from dino_lite.callbacks.throughput import Throughput
from dino_lite.contracts import Splits, UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.crops import MultiCrop
from dino_lite.data.datamodule import DataModule
from dino_lite.data.photometric import Normalize
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.sources import ArraySource
from dino_lite.data.subset import spread
from dino_lite.eval.collapse import SKIPPED, rankme
from dino_lite.eval.features import extract
from dino_lite.eval.knn import knn_accuracy
from dino_lite.eval.ridge import ridge_correct
from dino_lite.losses.prototype import PrototypeLoss
from dino_lite.methods.clock import Clock
from dino_lite.methods.dino import DINO
from dino_lite.methods.module import PretrainModule
from dino_lite.methods.step import Step
from dino_lite.nn.heads import DINOHead
from dino_lite.optim.param_groups import param_groups
from dino_lite.optim.schedules import Constant
from dino_lite.runs.metrics_file import MetricsFile
from images import Broken

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*max_epochs. was not set.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*"),
]
NUM_STEPS, BATCH_SIZE = 6, 4


def images(num: int, labeled: bool = True) -> ArraySource:
    pixels = torch.randint(256, (num, 16, 16, 3), dtype=torch.uint8)
    labels = np.arange(num) % 3 if labeled else None
    return ArraySource(pixels, labels, ["a", "b", "c"] if labeled else [], f"set{num}")


def unreadable(source: ArraySource) -> Broken:
    """Stands for the test images: whoever reads them fails."""
    return Broken(source, lambda index: True, AssertionError("the test images were read"))


class Training:
    """A DINO run of a few steps on random images, on one thread."""

    def __init__(
        self,
        folder: Path,
        *callbacks: pl.Callback,
        labeled: bool = True,
        max_seconds: float | None = None,
        log_every: int = 1,
        groups: Callable[[nn.Module], list[dict[str, Any]]] = param_groups,
    ) -> None:
        torch.manual_seed(0)
        splits = Splits(images(30, labeled), unreadable(images(5, labeled)), "random")
        steps = None if max_seconds else NUM_STEPS
        self.data = DataModule(
            splits, MultiCrop(16, 8, 2), Normalize(), BATCH_SIZE, num_steps=steps
        )
        backbone = ViT(
            image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, drop_path=0.2
        )
        head = functools.partial(DINOHead, num_prototypes=12, hidden_dim=16, bottleneck_dim=8)
        self.method = DINO(backbone, head, momentum=Constant(0.9), teacher_temp=Constant(0.04))
        step = functools.partial(
            Step,
            losses={"dino": PrototypeLoss("cls", Constant(1.0), 0.1)},
            learning_rate=Constant(0.01),
            weight_decay=Constant(0.04),
        )
        optimizer = functools.partial(torch.optim.AdamW, fused=True)
        clock = Clock(steps, max_seconds, len(splits.train) / BATCH_SIZE)
        self.module = PretrainModule(self.method, step, optimizer, clock, groups)
        self.folder, self.metrics = folder, MetricsFile(folder / "metrics.csv")
        folder.mkdir(exist_ok=True)
        self.trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            max_steps=-1 if steps is None else steps,
            logger=[self.metrics],
            callbacks=list(callbacks),
            log_every_n_steps=log_every,
            enable_checkpointing=any(isinstance(c, Checkpoints) for c in callbacks),
            enable_progress_bar=any(isinstance(c, RunProgress) for c in callbacks),
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )

    def fit(self, checkpoint: Path | None = None) -> Training:
        self.trainer.fit(self.module, self.data, ckpt_path=checkpoint, weights_only=True)
        return self

    def column(self, name: str) -> dict[int, float]:
        """What metrics.csv has under `name`, by step."""
        with open(self.folder / "metrics.csv", newline="") as file:
            return {int(r["step"]): float(r[name]) for r in csv.DictReader(file) if r.get(name)}


class At(pl.Callback):
    """Does something before or after a step, counted from 0."""

    def __init__(
        self, start: Callable[[int], Any] | None = None, end: Callable[[int], Any] | None = None
    ) -> None:
        self.start, self.end = start, end

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.start:
            self.start(trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.end:
            self.end(trainer.global_step - 1)


def everyone(folder: Path) -> list[pl.Callback]:
    watching = [OnlineEval(0.3), Health(every_n_steps=1), Throughput()]
    return [*watching, Pictures(), RunProgress(), Checkpoints(folder, 1e-9)]


# ------------------------------------------------------------------------------------- all of them


def test_observers_change_no_weight(tmp_path: Path) -> None:
    """Bit-equal students, teachers and centers, with every callback and with none."""
    watched = Training(tmp_path / "a", *everyone(tmp_path / "a")).fit()
    alone = Training(tmp_path / "b").fit()
    for name, value in alone.method.state_dict().items():
        assert torch.equal(watched.method.state_dict()[name], value), name
    assert int(alone.method.step) == NUM_STEPS


def test_the_rate_that_is_logged_is_the_schedules(tmp_path: Path) -> None:
    """Whatever factor the first group of parameters has."""
    run = Training(tmp_path, groups=functools.partial(param_groups, layer_decay=0.5)).fit()
    assert run.module.configure_optimizers().param_groups[0]["rate_scale"] < 1
    assert list(run.column("learning_rate").values()) == pytest.approx([0.01] * NUM_STEPS)


def test_observers_leave_the_generators_alone(tmp_path: Path) -> None:
    """torch and numpy draw after a step's observers what they would have drawn before."""
    states: dict[str, list[Any]] = {"before": [], "after": []}

    def look(when: str) -> Callable[[int], None]:
        return lambda step: states[when].append(
            (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())  # noqa: NPY002
        )

    observers = [OnlineEval(every_n_steps=1), Health(every_n_steps=1), Throughput()]
    observers += [Pictures(), RunProgress()]
    Training(tmp_path, At(end=look("before")), *observers, At(end=look("after"))).fit()
    assert len(states["before"]) == NUM_STEPS
    assert states["before"] == states["after"]


@pytest.mark.parametrize(
    "build",
    [
        lambda: OnlineEval(every=0),
        lambda: OnlineEval(every_n_steps=0),
        lambda: OnlineEval(max_images=1),
        lambda: Health(every_n_steps=0),
        lambda: Health(on_collapse="panic"),
        lambda: Throughput(log_every=0),
        lambda: Pictures(num_images=0),
        lambda: Checkpoints(every_n_minutes=0),
        lambda: Checkpoints(every_n_steps=-1),
    ],
)
def test_impossible_settings_are_refused(build: Callable[[], pl.Callback]) -> None:
    """Each names its key."""
    with pytest.raises(UserError, match=r"^\w+\.\w+=.*: it must be"):
        build()


# ------------------------------------------------------------------------- the teacher's features


@pytest.mark.parametrize(
    ("when", "steps"),
    [
        ({"every": 0.5}, [2, 5]),
        ({"every": 1.0}, [5]),
        ({"every": 1e-3}, [0, 1, 2, 3, 4, 5]),
        ({"every_n_steps": 4}, [3, 5]),
    ],
)
def test_knn_is_asked_when_it_is_due_and_at_the_end(
    tmp_path: Path, when: dict[str, Any], steps: list[int]
) -> None:
    """By fraction of the run or by steps; each figure stands in the row of the step it followed."""
    run = Training(tmp_path, OnlineEval(**when), log_every=2).fit()
    for name in ("knn", "probe", "rankme", "feature_std"):
        assert list(run.column(name)) == steps
    for name in ("features_seconds", "knn_seconds", "probe_seconds"):
        assert list(run.column(name)) == steps


def test_knn_is_the_teachers_on_train_without_itself(tmp_path: Path) -> None:
    """The figure of the last step is that of an evaluation made apart; test images are not read."""
    run = Training(tmp_path, OnlineEval(k=5)).fit()
    source = run.data.splits.train
    data = CleanData(run.data.splits, Preprocessing((16, 16)), batch_size=7)
    bank = extract(run.method.export_backbone(), data, source, torch.device("cpu"))
    expected = knn_accuracy(bank, bank, [5], 0.07, leave_one_out=True)[5].top1
    assert run.column("knn")[NUM_STEPS - 1] == pytest.approx(expected)
    probe = 100 * float(ridge_correct(bank).double().mean())
    assert run.column("probe")[NUM_STEPS - 1] == pytest.approx(probe)
    assert run.column("rankme")[NUM_STEPS - 1] == pytest.approx(rankme(bank.features), rel=1e-3)
    assert float(run.trainer.callback_metrics["knn"]) == pytest.approx(expected)


def test_images_are_decoded_once_and_broken_ones_left_out() -> None:
    """The second evaluation reads nothing; both give what a fresh look at the images gives."""
    source, reads = images(40), []

    def read_image(index: int, min_pixels: int | None = None) -> np.ndarray:
        reads.append(index)
        if index == 7:
            raise OSError("truncated")
        return ArraySource.read(source, index)

    source.read = read_image  # type: ignore[method-assign]
    data = CleanData(Splits(source, None, "x"), Preprocessing((8, 8)), batch_size=7)
    vit = ViT(image_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    online = OnlineEval(k=3)
    found = [
        online.measure(online.features(vit, data, source), torch.device("cpu"))["knn"]
        for _ in range(2)
    ]
    assert reads == list(range(40))
    bank = extract(vit, data, source, torch.device("cpu"))
    assert len(bank.labels) == 39
    assert set(found) == {knn_accuracy(bank, bank, [3], 0.07, leave_one_out=True)[3].top1}


def test_a_batch_without_one_readable_image_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last batch is often small enough for that."""
    source = images(7)
    whole = source.read
    bad = {2, 3, 6}

    def read_image(index: int, min_pixels: int | None = None) -> np.ndarray:
        if index in bad:
            raise OSError("truncated")
        return whole(index)

    source.read = read_image  # type: ignore[method-assign]
    monkeypatch.setattr(online_eval, "_BATCH_SIZE", 2)
    kept = online_eval.in_memory(
        source, CleanData(Splits(source, None, "x"), Preprocessing((16, 16)), 2)
    )
    assert kept.labels is not None
    assert kept.labels.tolist() == [0, 1, 1, 2]
    assert all(np.array_equal(kept.read(i), whole(row)) for i, row in enumerate((0, 1, 4, 5)))


def test_without_labels_there_is_no_accuracy(tmp_path: Path) -> None:
    """No k-NN and no probe, and no best; the features' rank needs no labels."""
    observers = [OnlineEval(every_n_steps=1), Checkpoints(tmp_path)]
    run = Training(tmp_path, *observers, labeled=False).fit()
    assert run.column("knn") == run.column("probe") == {}
    assert len(run.column("rankme")) == len(run.column("feature_std")) == NUM_STEPS
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()


def test_a_diverged_teacher_has_no_knn(tmp_path: Path) -> None:
    """Features that are not finite give NaN, which is never the best; no such state is saved."""
    run = Training(tmp_path, OnlineEval(), Checkpoints(tmp_path))
    run.method.teachers.get_parameter("ema.module.backbone.norm.weight").data.fill_(torch.nan)
    with pytest.raises(UserError, match=r"backbone\.norm\.weight is not finite.*nothing was saved"):
        run.fit()
    assert np.isnan(run.column("knn")[NUM_STEPS - 1])
    assert np.isnan(run.column("probe")[NUM_STEPS - 1])
    assert run.column("rankme") == {}
    assert not [*tmp_path.glob("checkpoints/*")]


@pytest.mark.parametrize(("num_images", "most"), [(5, 10), (10, 10), (1000, 7), (50_000, 5000)])
def test_spread_takes_images_from_everywhere(num_images: int, most: int) -> None:
    """Distinct, in order, the same each time, at most two stretches apart."""
    rows = spread(num_images, most)
    assert len(rows) == min(num_images, most)
    assert np.array_equal(rows, spread(num_images, most))
    gaps = np.diff([-1, *rows, num_images])
    assert gaps.min() >= 1
    assert gaps.max() <= 2 * -(-num_images // len(rows))


def test_spread_meets_every_class_of_those_that_take_turns() -> None:
    """An even stride of 10 over labels 0..9, 0..9, … would meet one class alone."""
    labels = np.arange(50_000) % 10
    assert np.bincount(labels[spread(50_000, 5000)], minlength=10).min() > 400


# ------------------------------------------------------------------------------------ checkpoints


class Told(pl.Callback):
    """Claims these k-NN figures, one a step."""

    def __init__(self, *figures: float) -> None:
        self.figures = figures

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        figure = self.figures[min(trainer.global_step, len(self.figures)) - 1]
        trainer.callback_metrics["knn"] = torch.tensor(figure)


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def test_best_is_the_best_and_last_the_last(tmp_path: Path) -> None:
    """Both load with weights_only, hold whole steps, and leave no part of a file behind."""
    run = Training(tmp_path, Checkpoints(tmp_path), Told(10, 30, 20, 30, 29, 5)).fit()
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert read(folder / "best.ckpt")["global_step"] == 2  # 30 again is not better
    last = read(folder / "last.ckpt")
    assert last["global_step"] == int(last["state_dict"]["method.step"]) == NUM_STEPS
    for name, value in run.method.state_dict().items():
        assert torch.equal(last["state_dict"][f"method.{name}"], value)


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_resumed_run_goes_on_bit_equal_and_keeps_its_best(tmp_path: Path, stop_at: int) -> None:
    """From a checkpoint in the middle, at whatever step, to the same weights and the same best."""
    figures = [10.0, 60.0, 20.0, 30.0, 59.0, 5.0]
    whole = Training(tmp_path / "a", Told(*figures), Checkpoints(tmp_path / "a")).fit()
    folder = tmp_path / "b"

    def stop(step: int) -> None:
        if step == stop_at:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        Training(folder, Told(*figures), Checkpoints(folder, None, 1), At(start=stop)).fit()
    last = folder / "checkpoints" / "last.ckpt"
    assert read(last)["global_step"] == stop_at
    resumed = Training(folder, Told(*figures), Checkpoints(folder)).fit(last)
    assert int(resumed.method.step) == resumed.trainer.global_step == NUM_STEPS
    for name, value in whole.method.state_dict().items():
        assert torch.equal(resumed.method.state_dict()[name], value), name
    assert read(folder / "checkpoints" / "best.ckpt")["global_step"] == 2


def test_an_error_between_steps_is_survived_by_the_state(tmp_path: Path) -> None:
    """The loader fails at the fourth step: three steps are kept, and go on bit-equal."""
    whole = Training(tmp_path / "a").fit()
    run = Training(tmp_path, Checkpoints(tmp_path))
    read_image, count = run.data.splits.train.read, iter(range(100))

    def fail(index: int, min_pixels: int | None = None) -> np.ndarray:
        if next(count) >= 3 * BATCH_SIZE:
            raise RuntimeError("disk gone")
        return read_image(index)

    run.data.splits.train.read = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="disk gone"):
        run.fit()
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert read(last)["global_step"] == 3
    resumed = Training(tmp_path, Checkpoints(tmp_path)).fit(last)
    for name, value in whole.method.state_dict().items():
        assert torch.equal(resumed.method.state_dict()[name], value), name


def test_an_error_within_a_step_keeps_the_checkpoint_before_it(tmp_path: Path) -> None:
    """Half a step is no state: teacher and student would belong to different ones."""
    run = Training(tmp_path, Checkpoints(tmp_path, every_n_minutes=None, every_n_steps=2))
    after_step = run.method.after_step

    def fail(*args: Any) -> None:
        if run.trainer.global_step == 4:
            raise RuntimeError("half a step")
        after_step(*args)

    run.method.after_step = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="half a step"):
        run.fit()
    assert read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_ctrl_c_lets_the_step_end_and_saves(tmp_path: Path, capfd: Any) -> None:
    """An interrupt in the third step: three steps are kept, and Ctrl-C is what it was before."""

    def interrupt(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit):
        Training(tmp_path, Checkpoints(tmp_path), At(start=interrupt)).fit()
    last = read(tmp_path / "checkpoints" / "last.ckpt")
    assert last["global_step"] == int(last["state_dict"]["method.step"]) == 3
    assert "Stopping after this step" in capfd.readouterr().err


def test_a_request_to_terminate_saves_too(tmp_path: Path) -> None:
    """SIGTERM, as a cluster sends before it takes the machine away."""

    def terminate(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        Training(tmp_path, Checkpoints(tmp_path), At(start=terminate)).fit()
    assert read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 3


def test_ctrl_c_is_given_back(tmp_path: Path) -> None:
    """After a run, finished or failed, the handler is Python's own again."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    seen = []
    look = At(start=lambda step: seen.append(signal.getsignal(signal.SIGINT)))
    Training(tmp_path, Checkpoints(tmp_path), look).fit()
    assert seen[0] is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path, name: str) -> None:
    """The former checkpoint stays, and the run ends with the name of the tensor."""
    every = {"last.ckpt": 1, "best.ckpt": None}[name]
    run = Training(tmp_path, OnlineEval(every_n_steps=1), Checkpoints(tmp_path, None, every))
    run.method.register_buffer("mask", torch.tensor([-torch.inf, 0.0]))  # by construction

    def poison(step: int) -> None:
        if step == 3:
            run.trainer.callback_metrics["knn"] = torch.tensor(101.0)
            state = next(iter(run.trainer.optimizers[0].state.values()))
            state["exp_avg"].view(-1)[0] = torch.nan

    run.trainer.callbacks.insert(-1, At(end=poison))
    message = r"optimizer\.0\.exp_avg is not finite after step 4: .* (kept|saved); lower optim.rate"
    with pytest.raises(UserError, match=message):
        run.fit()
    if every:
        assert read(tmp_path / "checkpoints" / name)["global_step"] == 3
    for path in tmp_path.glob("checkpoints/*"):
        assert torch.isfinite(read(path)["optimizer_states"][0]["state"][0]["exp_avg"]).all()


def test_skipped_steps_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In metrics, in checkpoints, on the progress line and as a warning: said when the first is
    seen, kept as it is at the end. They are no collapse, which would end this run.
    """
    health = Health(every_n_steps=1, on_collapse="stop")
    run = Training(tmp_path, health, Checkpoints(tmp_path, None, every_n_steps=1))
    _poison(run, 1, 2)
    run.fit()
    assert [*run.column("skipped_total").values()] == [0, 1, 2, 2, 2, 2]
    assert read(tmp_path / "checkpoints" / "last.ckpt")["skipped_total"] == 2
    (warning,) = health.warnings
    assert warning["text"].startswith("2 of 6 steps so far had a gradient that is not finite")
    assert (warning["kind"], warning["step"]) == (SKIPPED, 6)
    assert capsys.readouterr().err.count("not finite") == 1
    assert "2 skipped" in RunProgress()._describe(run.trainer, run.module, 1.0)


def test_a_skipped_step_does_not_blind_health(tmp_path: Path) -> None:
    """It is no sample; those before and after it are counted together."""
    run = Training(tmp_path, Health(every_n_steps=1))
    _poison(run, 2)
    run.fit()
    values = run.column("prototype_perplexity")
    assert [*values] == [0, 1, 3, 4, 5]
    assert np.isfinite([*values.values()]).all()


def test_a_run_with_skipped_steps_can_be_resumed(tmp_path: Path) -> None:
    """A skipped step is no collapse, in the session that made it or a later one."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    first = Training(
        tmp_path,
        Health(every_n_steps=1, on_collapse="stop"),
        Checkpoints(tmp_path),
        At(end=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 3 else None),
    )
    _poison(first, 1)
    with pytest.raises(SystemExit):
        first.fit()
    health = Health(every_n_steps=4, on_collapse="stop")
    Training(tmp_path, health, Checkpoints(tmp_path)).fit(path)
    assert read(path)["global_step"] == NUM_STEPS
    assert health.warnings[0]["text"].startswith("1 of 6 steps")


def _poison(run: Training, *steps: int) -> None:
    """The teacher and the student see what is not finite in `steps`, counted from 0."""
    compare = run.method.compare

    def bad(*args: Any) -> Any:
        outputs = compare(*args)
        if run.trainer.global_step in steps:
            parts = {
                key: value._replace(z=value.z * torch.nan)
                for key, value in (
                    ("student", outputs["cls"].student),
                    ("target", outputs["cls"].target),
                )
            }
            return {key: match._replace(**parts) for key, match in outputs.items()}
        return outputs

    run.method.compare = bad  # type: ignore[method-assign]


def test_the_clock_makes_checkpoints_too(tmp_path: Path) -> None:
    """With almost no minutes between them there is one a step."""
    steps = []
    path = tmp_path / "checkpoints" / "last.ckpt"
    look = At(start=lambda step: steps.append(read(path)["global_step"] if step else 0))
    Training(tmp_path, Checkpoints(tmp_path, every_n_minutes=1e-9), look).fit()
    assert steps == list(range(NUM_STEPS))


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The former checkpoint stays whole, and no part of the new one."""
    run = Training(tmp_path, Checkpoints(tmp_path, None, every_n_steps=1))
    save = run.trainer.strategy.save_checkpoint

    def full(checkpoint: dict[str, Any], path: Path, storage_options: Any = None) -> None:
        if run.trainer.global_step < 2:
            return save(checkpoint, path, storage_options)
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.trainer.strategy, "save_checkpoint", full)
    with pytest.raises(UserError, match="No space left"):
        run.fit()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 1


# --------------------------------------------------------------- throughput, progress and pictures


def test_throughput_counts_images_and_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of four images in a window of one second, a quarter of it spent waiting."""
    clock = iter(range(1000))
    monkeypatch.setattr(throughput, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    waits = iter(range(1000))
    wait = property(lambda self: next(waits) // 2 * 0.25)
    monkeypatch.setattr(DataModule, "data_wait_seconds", wait)
    run = Training(tmp_path, Throughput(log_every=2)).fit()
    assert run.column("images_per_second") == {1: 8.0, 3: 8.0, 5: 8.0}
    assert set(run.column("data_wait")) == {1, 3, 5}
    assert all(0 <= share <= 1 for share in run.column("data_wait").values())


def test_progress_is_plain_lines_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line now and then, the last at 100 %, with loss, k-NN and speed; nothing on stderr."""
    monitors = [OnlineEval(every_n_steps=1), Throughput(), RunProgress(line_seconds=0)]
    Training(tmp_path, *monitors).fit()
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if "step" in line]
    assert len(lines) >= NUM_STEPS
    assert lines[-1].startswith("100 %")
    for word in ("loss", "k-NN", "images/s", "waiting for data", "in all"):
        assert word in lines[-1]
    assert "measuring" in lines[1]  # how long it takes
    assert "\r" not in out + err


def test_progress_is_quiet_between_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A short run says one thing: how it ended."""
    Training(tmp_path, RunProgress()).fit()
    assert sum("step" in line for line in capsys.readouterr().out.splitlines()) == 1


def test_progress_is_a_bar_in_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redrawn in place on stderr, in a run by the clock too, where nobody knows the steps."""
    monkeypatch.setattr(RunProgress, "_is_terminal", lambda self: True)
    run = Training(tmp_path, RunProgress(refresh_seconds=0), max_seconds=0.3).fit()
    err = capsys.readouterr().err
    assert "\r" in err
    assert "100 %|" in err.splitlines()[-1] or "100 %|" in err
    assert f"step {run.trainer.global_step:,}" in err


def test_disabled_progress_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning disables it on ranks other than 0."""
    progress = RunProgress(line_seconds=0)
    progress.disable()
    run = Training(tmp_path, progress)
    progress.print("nothing")
    run.fit()
    assert "step" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min"), (725, "12 min 5 s"), (11_225, "3 h 7 min")]
)
def test_durations_read_as_a_person_says_them(seconds: float, text: str) -> None:
    """Minutes and seconds, with hours where there are any."""
    assert duration(seconds) == text


def test_pictures_are_drawn_at_the_start_and_the_end(tmp_path: Path) -> None:
    """crops.png with the first step, curves.png with the last; a resumed run keeps its crops."""
    seen = []
    look = At(start=lambda step: seen.append(sorted(p.name for p in tmp_path.glob("*.png"))))
    Training(tmp_path, Pictures(), look).fit()
    assert seen[0] == ["crops.png"]
    assert (tmp_path / "curves.png").stat().st_size > 0
    before = (tmp_path / "crops.png").read_bytes()
    (tmp_path / "crops.png").write_bytes(b"kept")
    Training(tmp_path, Pictures()).fit()
    assert (tmp_path / "crops.png").read_bytes() == b"kept" != before


def test_a_picture_that_fails_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A place where nothing can be written costs a line, not the training."""
    (tmp_path / "file").write_text("")
    run = Training(tmp_path / "run", Pictures(tmp_path / "file")).fit()
    assert int(run.method.step) == NUM_STEPS
    assert capsys.readouterr().err.count("A picture was not drawn") == 2
