"""Files that are damaged, missing or no images are replaced, counted and listed; a run goes on."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_lite.contracts import Crops
from dino_lite.data.crops import MultiCrop
from dino_lite.data.datamodule import DataModule
from dino_lite.data.decode import File
from dino_lite.data.folder import open_folder
from dino_lite.data.photometric import Normalize
from dino_lite.data.remote import open_local
from images import sentence

# Multiprocessing's, from Python 3.12 on, where libraries have started threads before.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
NUM_GOOD = 6


def photo(path: Path, file_format: str | None = None) -> Path:
    """A noise image that takes kilobytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path, file_format)
    return path


def truncated(path: Path) -> None:
    """The second half of the file is missing, as after a broken download."""
    content = photo(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def half_written(path: Path) -> None:
    """The file has its length, but only zeros from the middle on, as after a crash.

    Of a JPEG a decoder makes an image that is gray from there on, and nobody can know.
    """
    content = photo(path).read_bytes()
    path.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))


def header_only(path: Path) -> None:
    """Nothing but the first bytes."""
    path.write_bytes(photo(path).read_bytes()[:20])


def empty(path: Path) -> None:
    """No byte at all."""
    path.touch()


def text(path: Path) -> None:
    """An error page that was saved as a picture."""
    path.write_text("<html>404</html>" * 100)


def good(path: Path) -> None:
    """Nothing is wrong."""
    photo(path)


def vanished(path: Path) -> None:
    """It is gone when it is to be read."""
    photo(path)


def a_folder_by_then(path: Path) -> None:
    """It is a folder when it is to be read."""
    photo(path)


def one_bad_file(
    folder: Path, spoil: Callable[[Path], None], suffix: str, num_workers: int
) -> tuple[DataModule, Path]:
    """A data module over good photographs and, in their midst, a spoiled one."""
    for i in range(NUM_GOOD):
        photo(folder / f"{i}.jpg")
    bad = folder / f"{NUM_GOOD // 2}-bad{suffix}"
    spoil(bad)
    splits = open_folder(folder)
    assert len(splits.train) == NUM_GOOD + 1
    if spoil in (vanished, a_folder_by_then):
        bad.unlink()
    if spoil is a_folder_by_then:
        bad.mkdir()
    data = DataModule(
        splits,
        MultiCrop(16, 8, 1),
        Normalize(),
        batch_size=7,
        num_workers=num_workers,
        max_bad_fraction=0.2,
        num_steps=2,
        bad_files=folder / "bad_files.csv",
    )
    return data, bad


def all_steps(data: DataModule) -> list[Crops]:
    """What a run sees, without a trainer."""
    return [data.on_after_batch_transfer(parts, 0) for parts in data.train_dataloader()]


def assert_replaced(data: DataModule, bad: Path) -> None:
    """Two epochs show every other image, the next one twice; the list has the bad one, once."""
    for crops in all_steps(data):
        at = NUM_GOOD // 2
        assert sorted(crops.index.tolist()) == [*range(at), at + 1, *range(at + 1, NUM_GOOD + 1)]
    assert len(data.bad_files.reasons) == 1
    with open(bad.parent / "bad_files.csv", newline="") as file:
        heading, *rows = csv.reader(file)
    assert heading == ["path", "reason"]
    assert [row[0] for row in rows] == [str(bad)]
    assert rows[0][1].strip()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("spoil", "suffix"),
    [
        (truncated, ".jpg"),
        (truncated, ".png"),
        (truncated, ".webp"),
        (half_written, ".png"),
        (header_only, ".jpg"),
        (empty, ".jpg"),
        (text, ".jpg"),
        (vanished, ".jpg"),
        (a_folder_by_then, ".jpg"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_bad_file_is_replaced_counted_and_listed(
    spoil: Callable[[Path], None], suffix: str, num_workers: int, tmp_path: Path
) -> None:
    """Whatever is wrong with it, and whoever reads it."""
    assert_replaced(*one_bad_file(tmp_path, spoil, suffix, num_workers))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_may_not_be_read(num_workers: int, tmp_path: Path) -> None:
    """Its permissions are as bad as damage."""

    def guarded(path: bytes) -> File:
        if path.endswith(b"-bad.jpg"):
            raise PermissionError(13, "Permission denied")
        return open_local(path)

    data, bad = one_bad_file(tmp_path, good, ".jpg", num_workers)
    data.splits.train.opener = guarded  # type: ignore[attr-defined]
    assert_replaced(data, bad)
    assert "Permission denied" in next(iter(data.bad_files.reasons.values()))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permissions(tmp_path: Path) -> None:
    """The same with a real file."""
    data, bad = one_bad_file(tmp_path, good, ".jpg", 0)
    bad.chmod(0)
    assert_replaced(data, bad)


def test_a_wrong_suffix_is_no_fault(tmp_path: Path) -> None:
    """A PNG called .jpg is read by its content."""
    data, _ = one_bad_file(tmp_path, lambda path: photo(path, "PNG") and None, ".jpg", 0)
    assert all(sorted(crops.index.tolist()) == [*range(7)] for crops in all_steps(data))
    assert not data.bad_files.reasons
    assert not (tmp_path / "bad_files.csv").exists()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_that_vanish_during_the_run(num_workers: int, tmp_path: Path) -> None:
    """Between two epochs: the rest stands in, until too many are gone."""
    data, _ = one_bad_file(tmp_path, good, ".jpg", num_workers)
    data.num_steps = 40
    steps = iter(data.train_dataloader())
    first = data.on_after_batch_transfer(next(steps), 0)
    assert sorted(first.index.tolist()) == [*range(7)]
    (tmp_path / "0.jpg").unlink()
    later = [data.on_after_batch_transfer(next(steps), 0) for _ in range(20)]
    assert 0 not in later[-1].index.tolist()
    assert [*data.bad_files.reasons] == [0]
    (tmp_path / "1.jpg").unlink()
    told = sentence(list, steps)
    assert "2 of the 7 images cannot be read" in told
    assert "0.jpg" in told


def test_a_pipe_in_a_list_is_not_waited_for(tmp_path: Path) -> None:
    """Nobody may ever write to it."""
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match="not a regular file"):
        open_local(os.fsencode(tmp_path / "pipe.png"))
