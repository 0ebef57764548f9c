"""A source offers what its files hold: which images, in what order, of which class, in RGB."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lite.contracts import Source, Splits, UserError
from dino_lite.data import folder as folder_module
from dino_lite.data.auto import open_auto
from dino_lite.data.builtin import open_cifar10
from dino_lite.data.facts import read_facts
from dino_lite.data.folder import open_folder
from dino_lite.data.npz import open_npz
from dino_lite.data.sources import ArraySource

GREEN = (0, 255, 0)


def fill(root: Path, *names: str) -> Path:
    """A folder with a small green image of each name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), GREEN).save(root / name)
    return root


def names(source: Source | None) -> list[str]:
    """File names, in order."""
    assert source is not None
    return [os.path.basename(source.name(i)) for i in range(len(source))]


def classes(source: Source | None) -> list[str] | None:
    """The class of each image, in order."""
    assert source is not None
    return None if source.labels is None else [source.classes[i] for i in source.labels]


def read(path: Path) -> np.ndarray[Any, Any]:
    """The one image of the folder that `path` lies in, as a source reads it."""
    source = open_folder(path.parent).train
    assert len(source) == 1
    image = source.read(0)
    assert image.mode == "RGB"
    return np.asarray(image)


def sentence(call: Any, *args: Any, **kwargs: Any) -> str:
    """What the user is told."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------- which files, what order


def test_any_nesting_in_byte_order(tmp_path: Path) -> None:
    """Order is that of the paths' bytes: capitals first, é last, whatever the file system lists."""
    fill(tmp_path, "b.png", "a/z/y/x.JPG", "B.webp", "a-b/c.PNG", "é.bmp", "a/10.gif", "a/2.tiff")
    source = open_folder(tmp_path).train
    found = [source.name(i).removeprefix(f"{tmp_path}/") for i in range(len(source))]
    assert found == ["B.webp", "a-b/c.PNG", "a/10.gif", "a/2.tiff", "a/z/y/x.JPG", "b.png", "é.bmp"]


def test_what_is_hidden_or_no_image_is_left_out(tmp_path: Path) -> None:
    """Dot files, dot folders, other suffixes, folders that look like images, links to nothing."""
    fill(tmp_path, "a.png", ".b.png", ".cache/c.png", "d/._e.jpg", "f.png/g.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "png").write_text("x")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    assert names(open_folder(tmp_path).train) == ["a.png", "g.png"]


def test_links_are_followed_but_into_no_circle(tmp_path: Path) -> None:
    """A linked folder counts, one that leads back up does not."""
    fill(tmp_path / "store", "a.png")
    fill(tmp_path / "data", "b.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "linked" / "up").symlink_to(tmp_path / "data")
    assert names(open_folder(tmp_path / "data").train) == ["b.png", "a.png"]


@pytest.mark.parametrize("name", ["a b", "é", "a=b", "pics (1)", "[x],{y}", "x#y", "-n", "'"])
def test_odd_paths(tmp_path: Path, name: str) -> None:
    """Folders and files may be called what they like."""
    root = fill(tmp_path / name, f"{name}/{name}.png", f"{name}/2.png", f"c/{name}.png", "c/2.png")
    splits = open_auto(str(root))
    assert splits.name == name
    assert f"{name}.png" in names(splits.train)
    assert set(classes(splits.train) or []) == {name, "c"}
    assert splits.train.read(0).getpixel((0, 0)) == GREEN


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """Such a file is read, and has a name that can be printed."""
    source_file = fill(tmp_path, "a.png") / "a.png"
    try:
        os.rename(source_file, os.path.join(os.fsencode(tmp_path), b"\xff.png"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    source = open_folder(tmp_path).train
    assert source.read(0).size == (6, 4)
    assert source.name(0).encode().endswith(b"\\xff.png")


def test_tilde_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` and `$NAME` in root are expanded."""
    fill(tmp_path / "photos", "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PHOTOS", "photos")
    assert names(open_auto("~/photos").train) == ["a.png"]
    assert names(open_folder(f"{tmp_path}/${{PHOTOS}}").train) == ["a.png"]


def test_name_is_the_folders_also_for_a_dot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs are named after the data: a dot is no name."""
    monkeypatch.chdir(fill(tmp_path / "photos", "a.png"))
    assert open_folder(".").name == "photos"


def test_digest_is_of_the_list_not_of_its_place(tmp_path: Path) -> None:
    """A file more, less or renamed changes it, another folder does not; names are kept apart."""
    digests = [
        open_folder(fill(tmp_path / str(i), *files)).train.digest()
        for i, files in enumerate(
            [("a.png", "b.png"), ("a.png", "c.png"), ("a.png",), ("a.pngb.png",)]
        )
    ]
    assert len(set(digests)) == 4
    assert all(len(d) == 16 and int(d, 16) >= 0 for d in digests)
    assert open_folder(fill(tmp_path / "moved", "a.png", "b.png")).train.digest() == digests[0]


def test_a_source_survives_pickling_and_is_small(tmp_path: Path) -> None:
    """What spawned workers get: the same source, with no object for each file."""
    fill(tmp_path, *(f"{i:03}.png" for i in range(100)))
    source = open_folder(tmp_path).train
    sent = pickle.dumps(source)
    assert len(sent) < 100 * (len("000.png") + 8) + 1000
    copy = pickle.loads(sent)
    assert copy.digest() == source.digest()
    assert np.array_equal(copy.read(99), source.read(99))


# ------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("other", ["val", "test"])
def test_train_beside_val_or_test(tmp_path: Path, other: str) -> None:
    """Pretraining sees train alone; images outside of both are in neither."""
    fill(tmp_path, "train/a.png", f"{other}/b.png", "extra/c.png")
    splits = open_folder(tmp_path)
    assert (names(splits.train), names(splits.test)) == (["a.png"], ["b.png"])


def test_val_is_the_test_split_where_both_are(tmp_path: Path) -> None:
    """As in ImageNet, whose test has no labels."""
    fill(tmp_path, "train/a.png", "val/b.png", "test/c.png")
    assert names(open_folder(tmp_path).test) == ["b.png"]


def test_train_alone_is_a_split(tmp_path: Path) -> None:
    """Its folders are the classes then."""
    fill(tmp_path, "train/x/1.png", "train/x/2.png", "train/y/1.png", "train/y/2.png")
    splits = open_folder(tmp_path)
    assert classes(splits.train) == ["x", "x", "y", "y"]
    assert splits.test is None


def test_a_class_called_train_is_no_split(tmp_path: Path) -> None:
    """Beside other folders, without val or test, it is one of the classes."""
    fill(tmp_path, "train/1.png", "train/2.png", "car/1.png", "car/2.png")
    splits = open_folder(tmp_path)
    assert classes(splits.train) == ["car", "car", "train", "train"]
    assert splits.test is None


def test_without_train_nothing_is_test(tmp_path: Path) -> None:
    """A folder called test has no meaning of its own."""
    fill(tmp_path, "test/1.png", "b.png")
    splits = open_folder(tmp_path)
    assert len(splits.train) == 2
    assert splits.test is None


def test_empty_train_is_refused(tmp_path: Path) -> None:
    """Training on the test images instead would be no favor."""
    fill(tmp_path, "val/a.png")
    (tmp_path / "train").mkdir()
    assert "train holds no image" in sentence(open_folder, tmp_path)


# ------------------------------------------------------------------------------------------- labels


def test_class_is_the_first_folder_and_indices_agree(tmp_path: Path) -> None:
    """Train's classes sorted, then test's own; test may lack some."""
    fill(
        tmp_path,
        *("train/dog/1.png", "train/dog/deep/2.png", "train/cat/1.png", "train/cat/2.png"),
        *("val/ape/1.png", "val/dog/1.png"),
    )
    splits = open_folder(tmp_path)
    assert splits.test is not None
    assert splits.train.classes == splits.test.classes == ["cat", "dog", "ape"]
    assert classes(splits.train) == ["cat", "cat", "dog", "dog"]
    assert classes(splits.test) == ["ape", "dog"]


@pytest.mark.parametrize(
    "files",
    [
        ["a/1.png", "a/2.png", "b/1.png", "b/2.png", "stray.png"],
        ["a/1.png", "a/2.png", "b/1.png"],
        ["a/1.png", "a/2.png"],
        ["1.png", "2.png"],
    ],
    ids=["one image in no folder", "a class of one image", "one class", "no folder"],
)
def test_folders_that_are_no_classes(tmp_path: Path, files: list[str]) -> None:
    """Without being asked, labels are taken only where they make sense."""
    source = open_folder(fill(tmp_path, *files)).train
    assert source.labels is None
    assert source.classes == []
    assert open_folder(tmp_path, labels="none").train.labels is None


def test_test_split_without_folders_has_no_labels(tmp_path: Path) -> None:
    """Train keeps its own."""
    fill(tmp_path, *(f"train/{c}/{i}.png" for c in "ab" for i in "12"), "test/1.png")
    splits = open_folder(tmp_path)
    assert classes(splits.train) == ["a", "a", "b", "b"]
    assert splits.test is not None
    assert splits.test.labels is None


def test_labels_none(tmp_path: Path) -> None:
    """Folders need not be classes."""
    fill(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in "12"))
    assert open_folder(tmp_path, labels="none").train.labels is None
    assert open_folder(tmp_path, labels=None).train.labels is None


def test_labels_folder_takes_a_class_of_one_image(tmp_path: Path) -> None:
    """Who asks for them gets them."""
    fill(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    assert classes(open_folder(tmp_path, labels="folder").train) == ["a", "a", "b"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["a/1.png", "b/1.png", "stray.png"], "stray.png"),
        (["a/1.png", "a/2.png"], "the class a alone"),
        (["1.png", "2.png"], "no class"),
        ([*(f"train/{c}/1.png" for c in "ab"), "val/a/1.png", "val/2.png"], "val/2.png"),
    ],
)
def test_labels_folder_on_data_that_has_none(tmp_path: Path, files: list[str], told: str) -> None:
    """The sentence names what is in the way."""
    assert told in sentence(open_folder, fill(tmp_path, *files), labels="folder")


def test_labels_from_a_csv(tmp_path: Path) -> None:
    """Paths relative to root, a heading or none, quoted commas, more columns, rows of no image."""
    fill(tmp_path, "train/a.png", "train/x, y.png", "val/c.png")
    rows = 'path,label,who\n./train/a.png, two ,me\n"train/x, y.png",one\n'
    rows += "\nval/c.png,two\ngone.png,z\n"
    (tmp_path / "labels.csv").write_text(rows, encoding="utf-8-sig")
    splits = open_folder(tmp_path, labels="labels.csv")
    assert classes(splits.train) == ["two", "one"]
    assert classes(splits.test) == ["two"]
    assert splits.train.classes == ["one", "two"]
    (tmp_path / "bare.csv").write_text(rows.split("\n", 1)[1], encoding="utf-8")
    assert classes(open_folder(tmp_path, labels=str(tmp_path / "bare.csv")).train) == ["two", "one"]


def test_a_csv_may_leave_out_the_test_split(tmp_path: Path) -> None:
    """All of it or nothing."""
    fill(tmp_path, "train/a.png", "train/b.png", "val/c.png", "val/d.png")
    table = tmp_path / "labels.csv"
    table.write_text("train/a.png,1\ntrain/b.png,2\n")
    splits = open_folder(tmp_path, labels="labels.csv")
    assert classes(splits.train) == ["1", "2"]
    assert splits.test is not None
    assert splits.test.labels is None
    table.write_text("train/a.png,1\ntrain/b.png,2\nval/c.png,1\n")
    assert "val/d.png" in sentence(open_folder, tmp_path, labels="labels.csv")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("a.png,1\n", "b.png"),
        ("a.png,1\nb.png,1\n", "the class 1 alone"),
        ("a.png;1\nb.png;2\n", "Row 1"),
        ("a.png,1\nb.png,\n", "Row 2"),
        ("", "no class"),
    ],
)
def test_csv_that_does_not_fit(tmp_path: Path, rows: str, told: str) -> None:
    """The first image without a label, or the first row that is none, is named."""
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / "labels.csv").write_text(rows)
    assert told in sentence(open_folder, tmp_path, labels="labels.csv")


def test_labels_that_are_nothing_known(tmp_path: Path) -> None:
    """A misspelled word or a CSV that is not there."""
    fill(tmp_path, "a.png")
    assert "data.labels=folders" in sentence(open_folder, tmp_path, labels="folders")
    assert "data.labels=gone.csv" in sentence(open_folder, tmp_path, labels="gone.csv")


# ------------------------------------------------------------------------------------------ reading


def test_exif_orientation(tmp_path: Path) -> None:
    """A camera held upright: the size is that of the image as seen, in the header too."""
    image = Image.new("RGB", (6, 4), GREEN)
    image.paste((255, 0, 0), (0, 0, 6, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright
    image.save(tmp_path / "a.png", exif=exif)
    pixels = read(tmp_path / "a.png")
    assert pixels.shape == (6, 4, 3)
    assert pixels[0, 3].tolist() == [255, 0, 0]
    assert pixels[0, 0].tolist() == [0, 255, 0]
    assert open_folder(tmp_path).train.size(0) == (6, 4)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    """0, 1/4, 1/2 and all of the range, in three formats."""
    deep = np.array([[0, 16384, 32768, 65535]], np.uint16)
    path = tmp_path / f"a.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 4 1 65535\n" + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(deep).save(path)
    assert read(path)[0].tolist() == [[v] * 3 for v in (0, 64, 128, 255)]


@pytest.mark.parametrize(
    ("mode", "color", "seen"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 7, (7, 7, 7)),
        ("LA", (7, 0), (7, 7, 7)),
        ("RGBA", (1, 2, 3, 0), (1, 2, 3)),
    ],
)
def test_other_modes_become_rgb(tmp_path: Path, mode: str, color: Any, seen: Any) -> None:
    """Gray is repeated, transparency dropped."""
    Image.new(mode, (3, 2), color).save(tmp_path / "a.png")
    assert tuple(read(tmp_path / "a.png")[0, 0]) == seen


def test_cmyk(tmp_path: Path) -> None:
    """Printers' JPEGs: no ink is white, cyan is not red."""
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.jpg")
    assert read(tmp_path / "a.jpg").min() > 250
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.jpg")
    assert read(tmp_path / "a.jpg")[0, 0, 0] < 5 < 250 < read(tmp_path / "a.jpg")[0, 0, 1]


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 255])])
def test_palette(tmp_path: Path, transparency: Any) -> None:
    """Palette images, with one transparent color or a table of them, and without a warning."""
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, *GREEN])
    keys = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a.png", **keys)
    assert tuple(read(tmp_path / "a.png")[0, 0]) == GREEN


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    """The others are not looked at."""
    frames = [Image.new("RGB", (4, 4), color) for color in (GREEN, (255, 0, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert tuple(read(tmp_path / "a.gif")[0, 0]) == GREEN


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG file of 8-bit gray from its parts."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def damaged(folder: Path) -> dict[str, bytes]:
    """Files that cannot be read, by name."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    good = {}
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tiff"):
        noise.save(folder / f"good.{suffix}")
        good[suffix] = (folder / f"good.{suffix}").read_bytes()
        (folder / f"good.{suffix}").unlink()
    deep = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    deep.save(folder / "good.tiff")
    floats = (folder / "good.tiff").read_bytes()
    (folder / "good.tiff").unlink()
    return {
        "empty.png": b"",
        "text.jpg": b"<html>not found</html>",
        "header.png": good["png"][:20],
        "checksum.png": good["png"][:60] + b"\0\0\0\0" + good["png"][64:],
        "unpacked.png": png(8, 8, b"no zlib stream"),
        "bomb.png": png(50_000, 50_000, zlib.compress(b"\0")),
        "floats.tiff": floats,
        **{f"half.{suffix}": data[: len(data) // 2] for suffix, data in good.items()},
    }


def test_damaged_files_raise_what_the_contract_says(tmp_path: Path) -> None:
    """OSError or ValueError with a reason, never another; here warnings are errors as well."""
    files = damaged(tmp_path)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    source = open_folder(tmp_path).train
    assert len(source) == len(files)
    for index in range(len(source)):
        with pytest.raises((OSError, ValueError)) as caught:
            source.read(index)
        assert len(str(caught.value)) > 10, source.name(index)


def test_a_file_that_goes_missing_is_unreadable(tmp_path: Path) -> None:
    """Deleted during the run."""
    source = open_folder(fill(tmp_path, "a.png")).train
    (tmp_path / "a.png").unlink()
    with pytest.raises(OSError, match=r"a\.png"):
        source.read(0)


def test_large_images_are_read_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow warns from half of its limit on; beyond it an image is refused."""
    fill(tmp_path, "a.png")  # 24 pixels
    source = open_folder(tmp_path).train
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    assert source.read(0).size == (6, 4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="too large"):
        source.read(0)


# ----------------------------------------------------------------------------------------- mistakes


def test_no_such_folder(tmp_path: Path) -> None:
    """What is not there, not a folder, not set, or empty is named."""
    (tmp_path / "file.png").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "readme.txt").write_text("x")
    assert "does not exist" in sentence(open_folder, tmp_path / "nowhere")
    assert "is not a folder" in sentence(open_folder, tmp_path / "file.png")
    assert "data.root is not set" in sentence(open_folder)
    assert "data.root is not set" in sentence(open_folder, "")
    assert "holds no image file" in sentence(open_folder, tmp_path / "empty")
    assert "holds no image file" in sentence(open_folder, tmp_path / "text")


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the data must not be left out without a word."""
    fill(tmp_path, "a.png", "locked/b.png")
    scandir = os.scandir

    def locked(path: bytes) -> Any:
        if path.endswith(b"locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(folder_module.os, "scandir", locked)
    assert "locked cannot be listed (Permission denied)" in sentence(open_folder, tmp_path)


# ---------------------------------------------------------------------------------------------- npz


def archive(path: Path, **arrays: Any) -> Path:
    """An .npz with the arrays."""
    np.savez(path, **arrays)
    return path


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)


def test_npz_with_everything(tmp_path: Path) -> None:
    """Pixels as stored, labels in the order of numbers, not texts; test's own class comes last."""
    path = archive(
        tmp_path / "my set.npz",
        x_train=PIXELS[:4],
        y_train=np.array([[10], [2], [10], [2]], np.uint8),
        x_test=PIXELS[4:],
        y_test=np.array([2, 0]),
        class_names=np.array(["x"], object),  # of no interest, so not unpickled
    )
    splits = open_auto(path)
    assert splits.name == "my set"
    assert np.array_equal(splits.train.read(3), PIXELS[3])
    assert splits.test is not None
    assert splits.train.classes == splits.test.classes == ["2", "10", "0"]
    assert classes(splits.train) == ["10", "2", "10", "2"]
    assert classes(splits.test) == ["2", "0"]
    assert splits.train.name(3) == f"{path}/train[3]"


def test_npz_of_gray_images_alone(tmp_path: Path) -> None:
    """Labels and test are optional, and gray becomes RGB."""
    for i, shape in enumerate([(6, 5, 4), (6, 5, 4, 1)]):
        gray = PIXELS[..., 0].reshape(shape)
        splits = open_npz(archive(tmp_path / f"{i}.npz", x_train=gray))
        assert splits.test is None
        assert splits.train.labels is None
        assert np.array_equal(splits.train.read(1), np.repeat(PIXELS[1, ..., :1], 3, axis=-1))


def test_npz_of_one_class_has_no_labels(tmp_path: Path) -> None:
    """One class tells nothing apart."""
    path = archive(tmp_path / "a.npz", x_train=PIXELS, y_train=np.zeros(6, int))
    assert open_npz(path).train.labels is None


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"images": PIXELS}, "no x_train, but images"),
        ({}, "no x_train, but nothing"),
        ({"x_train": PIXELS / 255}, "float64 of shape (6, 5, 4, 3)"),
        ({"x_train": PIXELS[0, 0]}, "uint8 of shape (4, 3)"),
        ({"x_train": PIXELS.transpose(0, 3, 1, 2)}, "uint8 of shape (6, 3, 5, 4)"),
        ({"x_train": PIXELS[:0]}, "holds no image"),
        ({"x_train": PIXELS, "y_train": np.arange(5)}, "one for each of the 6 images"),
        ({"x_train": PIXELS, "y_train": np.eye(6)}, "float64 of shape (6, 6)"),
        ({"x_train": PIXELS, "x_test": PIXELS[0]}, "x_test"),
        ({"x_train": np.array([{}], object)}, "Object arrays cannot be loaded"),
    ],
)
def test_npz_that_does_not_fit(tmp_path: Path, arrays: dict[str, Any], told: str) -> None:
    """The sentence names the array and what it is."""
    if "x_test" in arrays:
        arrays = {**arrays, "x_test": arrays["x_test"].astype(np.float32)}
    assert told in sentence(open_npz, archive(tmp_path / "a.npz", **arrays))


def test_npz_that_is_none(tmp_path: Path) -> None:
    """Empty, other bytes, cut short, damaged, a lone array, not there, a folder."""
    whole = archive(tmp_path / "whole.npz", x_train=PIXELS).read_bytes()
    np.save(tmp_path / "array.npy", PIXELS)
    lone = (tmp_path / "array.npy").read_bytes()
    spoiled = whole.replace(PIXELS.tobytes()[:50], bytes(50))
    for i, data in enumerate([b"", b"junk" * 9, whole[: len(whole) // 2], spoiled, lone]):
        (tmp_path / f"{i}.npz").write_bytes(data)
        assert f"{i}.npz cannot be read" in sentence(open_npz, tmp_path / f"{i}.npz")
    assert "does not exist" in sentence(open_auto, tmp_path / "gone.npz")
    (tmp_path / "folder.npz").mkdir()
    assert "is a folder" in sentence(open_npz, tmp_path / "folder.npz")


def test_array_source_is_shared_with_workers_not_copied() -> None:
    """Its pixels are a tensor, and the digest follows every pixel."""
    source = ArraySource(torch.from_numpy(PIXELS.copy()), None, [], "x")
    before = source.digest()
    source.images[5, 4, 3, 2] ^= 1
    assert source.digest() != before
    assert isinstance(source.images, torch.Tensor)
    assert source.size(0) == (5, 4) == source.read(0).size[::-1]


# ----------------------------------------------------------------------------------------- CIFAR-10


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision's layout with two images a batch, its checksums set to those of these files."""
    torchvision_cifar = pytest.importorskip("torchvision.datasets").CIFAR10
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()

    def write(name: str, content: dict[str, Any]) -> list[str]:
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    def batch(first: int) -> dict[str, Any]:
        return {
            "data": (np.arange(2 * 3072).reshape(2, 3072) + first).astype(np.uint8),
            "labels": [first, 9],
        }

    trains = [write(f"data_batch_{i + 1}", batch(i)) for i in range(5)]
    tests = [write("test_batch", batch(7))]
    meta = write("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(torchvision_cifar, "train_list", trains)
    monkeypatch.setattr(torchvision_cifar, "test_list", tests)
    monkeypatch.setattr(
        torchvision_cifar,
        "meta",
        {"filename": meta[0], "key": "label_names", "md5": meta[1]},
    )
    return tmp_path


def test_cifar10_from_torchvisions_files(cifar: Path) -> None:
    """Planes of 1024 become pixels; the folder itself or the one around it may be named."""
    for opened in (
        open_cifar10(cifar),
        open_cifar10(cifar / "cifar-10-batches-py"),
        open_auto(cifar),
        open_auto(cifar / "cifar-10-batches-py"),
    ):
        assert opened.name == "cifar10"
        assert opened.test is not None
        assert (len(opened.train), len(opened.test)) == (10, 2)
        assert classes(opened.train) == [f"class {i}" for i in (0, 9, 1, 9, 2, 9, 3, 9, 4, 9)]
        stored = (np.arange(3072) + 1).astype(np.uint8).reshape(3, 32, 32)
        assert np.array_equal(opened.train.read(2), stored.transpose(1, 2, 0))


def test_cifar10_that_is_not_whole(cifar: Path, tmp_path: Path) -> None:
    """Missing and altered files are refused, the latter before they are unpickled."""
    assert "data.download=true" in sentence(open_cifar10, tmp_path / "elsewhere")
    file = cifar / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(file.read_bytes() + b"\0")
    assert "is not whole" in sentence(open_cifar10, cifar)


# --------------------------------------------------------------------------------------------- auto


def test_auto_without_root_is_the_embedded_set() -> None:
    """The first run needs no data."""
    splits = open_auto()
    assert splits.name == "shapes"
    assert splits.train.labels is not None
    assert open_auto(labels="none").train.labels is None
    assert "data.labels=folder" in sentence(open_auto, labels="folder")


def test_auto_refuses_other_files(tmp_path: Path) -> None:
    """One sentence for a single image, an archive, a thing that is not there."""
    image = fill(tmp_path, "a.png") / "a.png"
    assert "is a file of no known kind" in sentence(open_auto, image)
    assert "does not exist" in sentence(open_auto, tmp_path / "nowhere")


# -------------------------------------------------------------------------------------------- facts


def test_facts(tmp_path: Path) -> None:
    """Counts, and the median size of what can be opened."""
    for i, size in enumerate([(10, 20), (30, 20), (50, 60)]):
        for split in ("train", "val"):
            for name in "ab":
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", size).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "train" / "a" / "bad.png").write_bytes(b"")
    facts = read_facts(open_folder(tmp_path))
    assert facts == (7, 6, 2, 20, 30)
    assert facts._fields == ("num_images", "num_test", "num_classes", "height", "width")


def test_facts_look_at_few_of_many() -> None:
    """64 headers and one image, however many there are."""

    class Counting(ArraySource):
        opened = 0

        def read(self, index: int) -> Image.Image:
            Counting.opened += 1
            return super().read(index)

        def size(self, index: int) -> tuple[int, int]:
            Counting.opened += 1
            return super().size(index)

    many = Counting(torch.zeros(5000, 2, 3, 3, dtype=torch.uint8), None, [], "x")
    assert read_facts(Splits(many, None, "x")) == (5000, 0, 0, 2, 3)
    assert Counting.opened == 65


def test_the_one_readable_image_is_found(tmp_path: Path) -> None:
    """Also where it is none of those looked at; without one there is nothing to learn from."""
    for i in range(200):
        (tmp_path / f"{i:03}.jpg").write_bytes(b"no image")
    told = sentence(read_facts, open_folder(tmp_path))
    assert "None of the 200 images can be read" in told
    assert "000.jpg" in told
    fill(tmp_path, "101.png")
    assert read_facts(open_folder(tmp_path)) == (201, 0, 0, 4, 6)
