"""Training data: the same images in the same order for any workers, ranks and interruptions."""

from __future__ import annotations

import csv
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn

from dino_lite.contracts import Crops, Source, Splits, UserError
from dino_lite.data import exact
from dino_lite.data.crops import COLUMNS, MultiCrop, Photometric
from dino_lite.data.datamodule import DataModule
from dino_lite.data.exact import make_crops
from dino_lite.data.parts import CropData, append_rows, join
from dino_lite.data.photometric import Normalize
from dino_lite.data.sources import ArraySource

# Multiprocessing's, from Python 3.12 on, where libraries have started threads before.
fork_is_fine = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


class Pictures(Source):
    """A source of tiny images of differing sizes, of which some cannot be read."""

    classes = ("a", "b")

    def __init__(self, n: int = 10, bad: tuple[int, ...] = ()) -> None:
        self.n, self.bad = n, bad
        self.labels = np.arange(n) % 2

    def __len__(self) -> int:
        return self.n

    def read(self, index: int, min_pixels: int | None = None) -> np.ndarray:
        if index in self.bad:
            raise OSError("torn in two")
        rng = np.random.default_rng(index)
        return rng.integers(0, 256, (9 + index % 3, 12, 3), dtype=np.uint8)

    def name(self, index: int) -> str:
        return f"{index}.png"

    def digest(self) -> str:
        return "0"


def data_module(
    source: Pictures | ArraySource | None = None, where: str = "worker", **changed: Any
) -> DataModule:
    """Seven steps of 6 images of 10, unless said otherwise."""
    settings = {"batch_size": 6, "seed": 5, "num_steps": 7, **changed}
    splits = Splits(source or Pictures(), None, "pictures")
    return DataModule(splits, MultiCrop(8, 4, 2, seed=5, where=where), Normalize(), **settings)


def in_memory(n: int = 10) -> ArraySource:
    """n images of one size."""
    pixels = np.random.default_rng(1).integers(0, 256, (n, 11, 13, 3), dtype=np.uint8)
    return ArraySource(torch.from_numpy(pixels), np.arange(n) % 2, ["a", "b"], "set")


# Where crops are made: all in the worker; changed on the device; cut out there as well.
PATHS = {
    "worker": lambda: {"source": Pictures(), "where": "worker"},
    "device": lambda: {"source": Pictures(), "where": "device"},
    "whole": lambda: {"source": in_memory(), "where": "device"},
}
every_path = pytest.mark.parametrize("path", PATHS)


def all_steps(data: DataModule) -> list[Crops]:
    """What a run sees, without a trainer."""
    return [data.on_after_batch_transfer(parts, 0) for parts in data.train_dataloader()]


def same(a: Crops, b: Crops) -> bool:
    """Bit by bit, pixels and everything beside them."""
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) for x, y in pairs if isinstance(x, torch.Tensor))


# ----------------------------------------------------------------------------------------- order


@fork_is_fine
@every_path
def test_workers_change_nothing(path: str) -> None:
    """Crops, order, labels and boxes of 0 and 2 workers are equal; so is a second pass."""
    alone = all_steps(data_module(**PATHS[path]()))
    helped = data_module(**PATHS[path](), num_workers=2)
    first, second = all_steps(helped), all_steps(helped)
    assert len(alone) == len(first) == len(second) == 7
    for a, b, c in zip(alone, first, second, strict=True):
        assert same(a, b)
        assert same(a, c)


@every_path
def test_ranks_together_see_the_batch_of_one(path: str) -> None:
    """Three processes of two images each: the same crops in the same order."""
    alone = data_module(**PATHS[path]())
    ranks = [data_module(**PATHS[path]()) for _ in range(3)]
    loaders = [data.train_dataloader() for data in ranks]
    for rank, loader in enumerate(loaders):
        loader.sampler.rank, loader.sampler.num_ranks = rank, 3
    for whole, *parts in zip(all_steps(alone), *loaders, strict=True):
        made = [
            data.on_after_batch_transfer(part, 0) for data, part in zip(ranks, parts, strict=True)
        ]
        assert same(whole, join(made))


@pytest.mark.parametrize("path", ["device", "whole"])
def test_both_paths_make_the_same_crops(path: str) -> None:
    """The draws to the bit, the pixels to a gray level or so."""
    source = PATHS[path]()["source"]
    levels = Normalize((0, 0, 0), (1 / 255,) * 3)  # undoes nothing: gray levels as they are
    found, wanted = (data_module(source, where) for where in ("device", "worker"))
    found.normalize = wanted.normalize = levels
    for a, b in zip(all_steps(found), all_steps(wanted), strict=True):
        assert same(a._replace(globals_=b.globals_, locals_=b.locals_), b)
        assert a.locals_ is not None
        assert b.locals_ is not None
        for x, y in ((a.globals_, b.globals_), (a.locals_, b.locals_)):
            assert x.shape == y.shape
            assert (x - y).abs().mean() < 0.3
            assert (x - y).abs().quantile(0.99) <= 3


@every_path
def test_global_crops_are_made_once_more_for_gram(path: str) -> None:
    """Each is its box at the other size, mirrored and turned as it is, otherwise unchanged; all
    else is to the bit what it is without them.
    """
    data, normalize = data_module(**PATHS[path]()), Normalize()
    kind = Photometric(flip_prob=0.5, vertical_prob=0.5, quarter_turns=True, blur_prob=0.5)
    crops = {"global_1": kind, "global_2": kind, "local": kind, "seed": 5}
    where = data.multi_crop.where
    data.multi_crop = MultiCrop(8, 4, 2, **crops, where=where)
    plain = all_steps(data)
    data.multi_crop = MultiCrop(8, 4, 2, **crops, where=where, gram_size=12)
    found = all_steps(data)
    for a, b in zip(plain, found, strict=True):
        assert same(a, b)
        assert (list(a.extra), list(b.extra)) == ([], ["gram"])
        gram = b.extra["gram"]
        assert gram.shape == (2, 6, 3, 12, 12)
        for g, i in np.ndindex(2, 6):
            image = Image.fromarray(data.splits.train.read(int(b.index[i])))
            sides = np.array([image.height, image.width] * 2)
            box = np.rint(b.boxes[g, i].numpy() * sides).astype(int).tolist()
            row = dict(zip(COLUMNS, b.draws[g, i].tolist(), strict=True))
            lies = {key: row[key] for key in ("flip", "vertical", "turns")}
            pixels = exact.apply(image, box, list((COLUMNS | lies).values()), 12)
            wanted = normalize(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
            levels = (gram[g, i] - wanted).abs() * 255 * normalize.std.view(-1, 1, 1)
            assert levels.max() < (1.01 if where == "device" else 1e-3)
        assert torch.equal(b.part(2, 4).extra["gram"], gram[:, 2:4])
    drawn = torch.cat([crops.draws[:2].flatten(0, 1) for crops in found])
    column = dict(zip(COLUMNS, drawn.unbind(1), strict=True))
    assert {int(turns) for turns in column["turns"]} == {0, 1, 2, 3}
    assert 0 < column["flip"].mean() < 1


def test_small_images_in_memory_leave_the_worker_without_pixels() -> None:
    """Only what was drawn is sent; an image that is too large for matrices goes the usual way."""
    part = next(iter(data_module(in_memory(), "device").train_dataloader()))[0]
    assert part.globals_.numel() == 0
    large = ArraySource(torch.zeros(10, 65, 9, 3, dtype=torch.uint8), None, [], "large")
    assert next(iter(data_module(large, "device").train_dataloader()))[0].globals_.numel() > 0


def test_large_files_may_be_decoded_smaller() -> None:
    """The source is told what the crops need, unless `draft` is off."""
    asked: list[int | None] = []

    class Asked(Pictures):
        def read(self, index: int, min_pixels: int | None = None) -> np.ndarray:
            asked.append(min_pixels)
            return super().read(index)

    all_steps(data_module(Asked(), num_steps=1))
    all_steps(data_module(Asked(), num_steps=1, draft=False))
    assert set(asked) == {MultiCrop(8, 4, 2).min_pixels, None}


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels_goes_through_the_device(channels: int) -> None:
    """Finite crops with as many channels; of one channel they equal the worker's."""

    def images(where: str) -> list[Crops]:
        pixels = np.random.default_rng(1).integers(0, 256, (10, 70, 66, channels), dtype=np.uint8)
        source = ArraySource(torch.from_numpy(pixels), None, [], "set")
        data = data_module(source, where)
        data.normalize = Normalize([0.0] * channels, [1 / 255] * channels)
        return all_steps(data)

    for crops in images("device"):
        assert crops.globals_.shape == (2, 6, channels, 8, 8)
        assert torch.isfinite(crops.globals_).all()
    if channels == 1:
        for a, b in zip(images("device"), images("worker"), strict=True):
            assert (a.globals_ - b.globals_).abs().mean() < 0.3


def test_a_step_of_many_parts_is_one_batch() -> None:
    """150 images come in parts of 64, 64 and 22, and are joined in order."""
    data = data_module(Pictures(40), batch_size=150, num_steps=1)
    parts = next(iter(data.train_dataloader()))
    assert [part.num_images for part in parts] == [64, 64, 22]
    crops = data.on_after_batch_transfer(parts, 0)
    assert crops.locals_ is not None
    assert crops.globals_.shape == (2, 150, 3, 8, 8)
    assert crops.locals_.shape == (2, 150, 3, 4, 4)
    assert crops.boxes.shape == (4, 150, 4)
    assert crops.index.tolist() == [i for part in parts for i in part.index.tolist()]
    assert crops.labels is not None
    assert torch.equal(crops.labels, crops.index % 2)
    start, stop = 64, 128
    assert torch.equal(data.normalize(parts[1].globals_), crops.part(start, stop).globals_)


def test_join_keeps_what_is_missing_missing() -> None:
    """No local crops, no labels, and extra crops by name."""
    part = (
        CropData(Pictures(), MultiCrop(8, 4, 0), make_crops, max_bad=1).__getitems__([(0, 0)]).crops
    )
    assert part is not None
    part = part._replace(labels=None, extra={"large": part.globals_})
    joined = join([part, part, part])
    assert joined.locals_ is None
    assert joined.labels is None
    assert joined.extra["large"].shape == (2, 3, 3, 8, 8)


def test_images_appear_anew_in_the_next_epoch() -> None:
    """The crops of an image are keyed by its epoch."""
    first, second = all_steps(data_module(Pictures(4), batch_size=4, num_steps=2))
    again = [second.index.tolist().index(i) for i in first.index.tolist()]
    assert (first.boxes != second.boxes[:, again]).any(-1).any(0).all()


def test_crops_have_the_precision_of_the_run() -> None:
    """`dtype` is what the device gets."""
    data = data_module(num_steps=1)
    data.dtype = torch.float64
    crops = all_steps(data)[0]
    assert crops.locals_ is not None
    assert crops.globals_.dtype == crops.locals_.dtype == torch.float64


@fork_is_fine
def test_waiting_is_measured() -> None:
    """With no worker, all the work is waiting."""
    data = data_module()
    assert data.data_wait_seconds == 0
    all_steps(data)
    assert data.data_wait_seconds > 0


@fork_is_fine
def test_workers_end_with_the_pass() -> None:
    """Used up, left in the middle or failed: no process outlives the iteration."""
    data = data_module(num_workers=2)
    all_steps(data)
    assert not multiprocessing.active_children()
    steps = iter(data.train_dataloader())
    next(steps)
    assert len(multiprocessing.active_children()) == 2
    steps.close()
    assert not multiprocessing.active_children()
    failing = data_module(Pictures(bad=(1, 2)), max_bad_fraction=0.1, num_workers=2)
    with pytest.raises(UserError) as caught:
        all_steps(failing)
    assert caught.value.__traceback__ is not None  # which holds frames, and they their variables
    assert not multiprocessing.active_children()


def test_workers_may_be_started_afresh() -> None:
    """Where processes are not forked, the data set travels as a pickle."""
    fresh = CropData(Pictures(), MultiCrop(8, 4, 1), make_crops, max_bad=1)
    part = fresh.__getitems__([(0, 3)])
    copy = pickle.loads(pickle.dumps(fresh)).__getitems__([(0, 3)])
    assert part.crops is not None
    assert copy.crops is not None
    assert same(part.crops, copy.crops)


# ------------------------------------------------------------------------------------- Lightning


class Recorder(pl.LightningModule):
    """Optimizes by hand, as the project's module does, and notes what it was given."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[Crops] = []
        self.stop_at = stop_at

    def training_step(self, batch: Crops, batch_idx: int) -> None:
        if self.global_step == self.stop_at:
            raise InterruptedError
        self.seen.append(batch)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.weight * batch.globals_.mean())
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Saver(pl.Callback):
    """Saves after every step, as N.ckpt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def fit(
    module: Recorder, data: DataModule, folder: Path, start: int | None = None, max_steps: int = -1
) -> pl.Trainer:
    """Train on the CPU, from the checkpoint in `folder` after step `start`."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        max_steps=max_steps,
        logger=False,
        callbacks=[Saver(folder)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data, ckpt_path=None if start is None else folder / f"{start}.ckpt")
    return trainer


@fork_is_fine
@every_path
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_resumed_in_mid_epoch_sees_the_next_images(
    num_workers: int, path: str, tmp_path: Path
) -> None:
    """Interrupted in its sixth step, resumed from its fourth: the rest, exactly, and no more.

    Lightning counts batches of a resumed epoch against the loader's whole length.
    """
    whole, broken, rest = Recorder(), Recorder(stop_at=5), Recorder()
    fit(whole, data_module(**PATHS[path]()), tmp_path)
    with pytest.raises(InterruptedError):
        fit(broken, data_module(**PATHS[path](), num_workers=num_workers), tmp_path)
    trainer = fit(rest, data_module(**PATHS[path](), num_workers=num_workers), tmp_path, start=4)
    assert trainer.global_step == 7
    seen = broken.seen[:4] + rest.seen
    assert len(seen) == len(whole.seen) == 7
    assert all(same(a, b) for a, b in zip(seen, whole.seen, strict=True))
    assert torch.equal(whole.weight, rest.weight)


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    """Resumed from its last checkpoint, a run takes no step."""
    again = Recorder()
    fit(Recorder(), data_module(), tmp_path)
    fit(again, data_module(), tmp_path, start=7)
    assert again.seen == []


def test_an_endless_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Without num_steps the trainer decides: 3 steps, then from there on to 7."""
    whole, first, rest = Recorder(), Recorder(), Recorder()
    fit(whole, data_module(), tmp_path)
    fit(first, data_module(num_steps=None), tmp_path, max_steps=3)
    fit(rest, data_module(num_steps=None), tmp_path, start=3, max_steps=7)
    seen = first.seen + rest.seen
    assert len(seen) == len(whole.seen)
    assert all(same(a, b) for a, b in zip(seen, whole.seen, strict=True))


# ------------------------------------------------------------------------------------- bad files


@fork_is_fine
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_replaced_and_listed(num_workers: int, tmp_path: Path) -> None:
    """By the next readable one, crops keyed as asked; in the list it stands once."""
    source = Pictures(bad=(3, 4))
    path = tmp_path / "run" / "bad_files.csv"
    steps = all_steps(
        data_module(source, max_bad_fraction=0.2, bad_files=path, num_workers=num_workers)
    )
    for crops, wanted in zip(steps, all_steps(data_module()), strict=True):
        shown = [5 if i in (3, 4) else i for i in wanted.index.tolist()]
        assert crops.index.tolist() == shown
        assert crops.labels is not None
        assert torch.equal(crops.labels, crops.index % 2)
        assert torch.equal(crops.draws, wanted.draws)
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "reason"]
    assert sorted(rows[1:]) == [["3.png", "torn in two"], ["4.png", "torn in two"]]


@fork_is_fine
@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_images_stop_the_run(num_workers: int) -> None:
    """One sentence: how many, which limit, an example."""
    data = data_module(Pictures(bad=(1, 2, 8)), max_bad_fraction=0.2, num_workers=num_workers)
    with pytest.raises(UserError, match=r"^3 of the 10 .*max_bad_fraction=0.2.*\d\.png: torn"):
        all_steps(data)


def test_without_one_readable_image_the_run_stops() -> None:
    """Even where every image may be bad."""
    with pytest.raises(UserError, match=r"^None of the 10 images can be read"):
        all_steps(data_module(Pictures(bad=tuple(range(10))), max_bad_fraction=1.0))


def test_the_last_readable_image_can_stand_for_all() -> None:
    """If the user allows it."""
    steps = all_steps(data_module(Pictures(bad=tuple(range(9))), max_bad_fraction=1.0))
    assert {int(i) for crops in steps for i in crops.index} == {9}


def test_rows_of_several_processes_are_listed_once(tmp_path: Path) -> None:
    """A second rank, or a resumed run, adds only what is new; names may hold anything."""
    path, header = tmp_path / "bad.csv", ("path", "reason")
    append_rows(path, header, [("é,\n.png", "no"), ("\udcff.png", "no")])
    append_rows(path, header, [("\udcff.png", "no"), ("b.png", "no")])
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        names = [row[0] for row in csv.reader(file)]
    assert names == ["path", "é,\n.png", "\udcff.png", "b.png"]


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"num_workers": -1}, "num_workers"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_impossible_values_are_refused(changed: dict[str, Any], key: str) -> None:
    """One sentence that names the key."""
    with pytest.raises(UserError, match=key):
        data_module(**changed).train_dataloader()
