"""Sets that torchvision knows, from tiny files in the layouts that it downloads."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_lite.contracts import Splits
from dino_lite.data.auto import open_auto
from dino_lite.data.builtin import SETS, open_builtin
from images import classes, sentence

pytest.importorskip("torchvision.datasets")
RANDOM = np.random.default_rng(0)


def photo(path: Path, color: int) -> None:
    """A small image of one color, without loss whatever its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (color, 0, 0)).save(path, "PNG")


def text(path: Path, *lines: str) -> None:
    """A text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def unchecked(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Checksums of the real files are not those of tiny ones: it is enough that they are there."""
    for name in modules:
        module = importlib.import_module(f"torchvision.datasets.{name}")
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))


def colors(splits: Splits) -> tuple[list[int], list[int]]:
    """Of train's and test's images."""
    assert splits.test is not None
    train, test = (
        [int(source.read(i)[0, 0, 0]) for i in range(len(source))] for source in splits[:2]
    )
    return train, test


# ------------------------------------------------------------------------------- arrays in memory


def cifar(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> np.ndarray:
    """CIFAR-10 or 100 with two images a file, checksums set to those of these files."""
    known = getattr(importlib.import_module("torchvision.datasets"), kind)
    base = folder / known.base_folder
    base.mkdir(parents=True)
    label_key = "labels" if kind == "CIFAR10" else "fine_labels"

    def write(name: str, content: dict[str, Any]) -> list[str]:
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    pixels = RANDOM.integers(0, 256, (len(known.train_list) + 1, 2, 3072), np.uint8)
    lists = []
    for listed, first in ((known.train_list, 0), (known.test_list, len(known.train_list))):
        lists.append(
            [
                write(name, {"data": pixels[first + i], label_key: [first + i, 9]})
                for i, (name, _) in enumerate(listed)
            ]
        )
    monkeypatch.setattr(known, "train_list", lists[0])
    monkeypatch.setattr(known, "test_list", lists[1])
    name, key = known.meta["filename"], known.meta["key"]
    _, md5 = write(name, {key: [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(known, "meta", {"filename": name, "key": key, "md5": md5})
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


@pytest.mark.parametrize(("name", "num_train"), [("cifar10", 10), ("cifar100", 2)])
def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, num_train: int) -> None:
    """Planes of 1024 become pixels; the folder itself or the one around it may be named."""
    pixels = cifar(tmp_path, monkeypatch, name.upper())
    roots = [tmp_path, tmp_path / SETS[name].folder]
    opened = [open_builtin(name, root) for root in roots]
    if name == "cifar10":
        opened += [open_auto(root) for root in roots]
    for splits in opened:
        assert splits.name == name
        assert splits.test is not None
        assert (len(splits.train), len(splits.test)) == (num_train, 2)
        assert np.array_equal(splits.train.read(1), pixels[1])
        assert np.array_equal(splits.test.read(0), pixels[num_train])
        assert classes(splits.train)[:2] == ["class 0", "class 9"]  # type: ignore[index]
        assert splits.train.name(1) == f"{name}/train[1]"


def test_altered_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are unpickled."""
    cifar(tmp_path, monkeypatch, "CIFAR10")
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(file.read_bytes() + b"\0")
    assert "CIFAR10 is incomplete" in sentence(open_builtin, "cifar10", tmp_path)


def test_stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns come before rows in its files; unlabeled images are trained on, as such."""
    unchecked(monkeypatch, "stl10")
    base = tmp_path / "stl10_binary"
    base.mkdir()
    stored = {
        part: RANDOM.integers(0, 256, (3, 3, 96, 96), np.uint8)
        for part in ("train", "unlabeled", "test")
    }
    for part, pixels in stored.items():
        (base / f"{part}_X.bin").write_bytes(pixels.tobytes())
        (base / f"{part}_y.bin").write_bytes(bytes([1, 10, 2]))
    text(base / "class_names.txt", *(f"class {i}" for i in range(10)))
    splits = open_builtin("stl10", tmp_path)
    assert splits.train.labels is not None
    assert splits.train.labels.tolist() == [0, 9, 1, -1, -1, -1]
    assert np.array_equal(splits.train.read(4), stored["unlabeled"][1].transpose(2, 1, 0))
    assert classes(splits.test) == ["class 0", "class 9", "class 1"]


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its MATLAB files, where the digit 0 is called 10."""
    savemat = pytest.importorskip("scipy.io").savemat
    unchecked(monkeypatch, "svhn")
    pixels = RANDOM.integers(0, 256, (32, 32, 3, 4), np.uint8)
    for part in ("train", "test"):
        savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": np.array([[1], [10], [9], [1]])})
    splits = open_builtin("svhn", tmp_path)
    assert np.array_equal(splits.train.read(2), pixels[..., 2])
    assert classes(splits.train) == ["1", "0", "9", "1"]
    assert "is incomplete" in sentence(open_builtin, "svhn", tmp_path / "nowhere")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist(tmp_path: Path, name: str, channels: int) -> None:
    """Planes as one channel, or as three equal ones."""
    pixels = RANDOM.integers(0, 256, (3, 28, 28), np.uint8)
    raw = tmp_path / SETS[name].folder / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        head = struct.pack(">IIII", 0x803, *pixels.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        labels = struct.pack(">II", 0x801, 3) + bytes([5, 0, 9])
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    splits = open_builtin(name, tmp_path, channels=channels)
    assert splits.train.read(1).shape == (28, 28, channels)
    assert np.array_equal(splits.train.read(1), np.repeat(pixels[1, ..., None], channels, 2))
    assert splits.train.labels is not None
    assert splits.train.labels.tolist() == [5, 0, 9]
    assert len(splits.train.classes) == 10


def test_color_arrays_as_luma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One channel of three; other numbers are refused."""
    pixels = cifar(tmp_path, monkeypatch, "CIFAR10")
    found = open_builtin("cifar10", tmp_path, channels=1).train.read(1)
    wanted = np.asarray(Image.fromarray(pixels[1]).convert("L"))[..., None]
    assert np.array_equal(found, wanted)
    assert "data.channels=4" in sentence(open_builtin, "cifar10", tmp_path, channels=4)


# ----------------------------------------------------------------------------------- image files


def imagenette(root: Path, folder: str = "imagenette2") -> None:
    """Class folders in train and val."""
    for i, wnid in enumerate(("n01440764", "n02102040")):
        photo(root / folder / "train" / wnid / "a.jpeg", i)
        photo(root / folder / "val" / wnid / "b.jpeg", i + 10)


def flowers(root: Path) -> None:
    """Labels and splits in MATLAB files, counted from 1."""
    savemat = pytest.importorskip("scipy.io").savemat
    base = root / "flowers-102"
    for i in range(1, 7):
        photo(base / "jpg" / f"image_{i:05d}.jpg", i)
    savemat(base / "imagelabels.mat", {"labels": np.array([1, 2, 1, 2, 1, 102])})
    savemat(base / "setid.mat", {"trnid": [[3, 4]], "valid": [[1, 2]], "tstid": [[6, 5]]})


def pets(root: Path) -> None:
    """Lists of names, classes, species and breeds."""
    base = root / "oxford-iiit-pet"
    for i, name in enumerate(("Abyssinian_1", "great_pyrenees_2", "Abyssinian_3")):
        photo(base / "images" / f"{name}.jpg", i)
    text(base / "annotations/trainval.txt", "Abyssinian_1 1 1 1", "great_pyrenees_2 2 2 1")
    text(base / "annotations/test.txt", "Abyssinian_3 1 1 1")


def food(root: Path) -> None:
    """Lists by class in JSON."""
    base = root / "food-101"
    lists = {
        "train": {"pie": ["pie/1", "pie/2"], "apple": ["apple/3"]},
        "test": {"pie": ["pie/4"], "apple": ["apple/5"]},
    }
    for split, names in lists.items():
        text(base / "meta" / f"{split}.json", json.dumps(names))
        for name in (name for part in names.values() for name in part):
            photo(base / "images" / f"{name}.jpg", int(name[-1]))


def dtd(root: Path) -> None:
    """Lists of paths of partition 1; val is trained on."""
    base = root / "dtd" / "dtd"
    for i, split in enumerate(("train", "val", "test")):
        names = (f"banded/banded_{i}.jpg", f"zigzagged/zigzagged_{i}.jpg")
        text(base / "labels" / f"{split}1.txt", *names)
        for j, name in enumerate(names):
            photo(base / "images" / name, 2 * i + j)


def aircraft(root: Path) -> None:
    """Numbers and variants, which may hold spaces."""
    base = root / "fgvc-aircraft-2013b" / "data"
    text(base / "variants.txt", "707-320", "Cessna 172")
    text(base / "images_variant_trainval.txt", "0000001 Cessna 172", "0000002 707-320")
    text(base / "images_variant_test.txt", "0000003 707-320")
    for i in (1, 2, 3):
        photo(base / "images" / f"{i:07d}.jpg", i)


def gtsrb(root: Path) -> None:
    """Class folders in train, a table in test; the classes have no names."""
    base = root / "gtsrb"
    for i in range(2):
        path = base / "GTSRB" / "Training" / f"{i:05d}" / "0.ppm"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (6, 4), (i, 0, 0)).save(path)
    photo(base / "GTSRB" / "Final_Test" / "Images" / "00000.ppm", 9)
    text(base / "GT-final_test.csv", "Filename;Width;ClassId", "00000.ppm;6;1")


@pytest.mark.parametrize(
    ("write", "name", "train", "test", "labels", "names"),
    [
        (imagenette, "imagenette", [0, 1], [10, 11], ["tench", "English springer"], 2),
        (
            flowers,
            "flowers102",
            [3, 4, 1, 2],
            [6, 5],
            ["pink primrose", "hard-leaved pocket orchid"] * 2,
            102,
        ),
        (pets, "pets", [0, 1], [2], ["Abyssinian", "Great Pyrenees"], 2),
        (food, "food101", [1, 2, 3], [4, 5], ["pie", "pie", "apple"], 2),
        (dtd, "dtd", [0, 1, 2, 3], [4, 5], ["banded", "zigzagged"] * 2, 2),
        (aircraft, "aircraft", [1, 2], [3], ["Cessna 172", "707-320"], 2),
        (gtsrb, "gtsrb", [0, 1], [9], ["0", "1"], 2),
    ],
)
def test_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Any,
    name: str,
    train: list[int],
    test: list[int],
    labels: list[str],
    names: int,
) -> None:
    """Images, splits and classes by the set's own lists, read from their files when asked for."""
    unchecked(monkeypatch, "flowers102")
    write(tmp_path)
    for root in (tmp_path, tmp_path / SETS[name].folder):
        splits = open_builtin(name, root)
        assert colors(splits) == (train, test)
        assert classes(splits.train) == labels
        assert len(splits.train.classes) == names
        assert splits.name == name
    file = Path(splits.train.name(0))
    assert pickle.loads(pickle.dumps(splits.train)).encoded(0)[0] == file.read_bytes()
    file.unlink()
    with pytest.raises(OSError, match=file.name):
        splits.train.read(0)


def test_sets_of_one_split(tmp_path: Path) -> None:
    """EuroSAT and Caltech-101 have no test images of their own."""
    for i, place in enumerate(("Forest", "River")):
        photo(tmp_path / "eurosat" / "2750" / place / "a_1.jpg", i)
    assert classes(open_builtin("eurosat", tmp_path).train) == ["Forest", "River"]
    things = ("BACKGROUND_Google/image_0001", "ant/image_0001", "ant/image_0002", "yin/image_0001")
    for i, thing in enumerate(things):
        photo(tmp_path / "caltech101" / "101_ObjectCategories" / f"{thing}.jpg", i)
    splits = open_builtin("caltech101", tmp_path)
    assert splits.test is None
    assert classes(splits.train) == ["ant", "ant", "yin"]
    assert [splits.train.read(i)[0, 0, 0] for i in range(3)] == [1, 2, 3]


def test_sizes_of_imagenette(tmp_path: Path) -> None:
    """Each has its own name and folder."""
    imagenette(tmp_path, "imagenette2-160")
    assert len(open_builtin("imagenette_160", tmp_path).train) == 2
    assert "imagenette2-320" in sentence(open_builtin, "imagenette_320", tmp_path)


def test_imagenet_is_its_class_folders(tmp_path: Path) -> None:
    """The devkit is not needed; what is not in class folders is told."""
    for i, wnid in enumerate(("n01440764", "n02102040")):
        photo(tmp_path / "train" / wnid / "a.JPEG", i)
        photo(tmp_path / "val" / wnid / "b.JPEG", i + 10)
    splits = open_builtin("imagenet", tmp_path)
    assert splits.name == "imagenet"
    assert colors(splits) == ([0, 1], [10, 11])
    assert classes(splits.test) == ["n01440764", "n02102040"]
    assert "account" in sentence(open_builtin, "imagenet", tmp_path, download=True)
    assert "no folders train and val" in sentence(open_builtin, "imagenet", tmp_path / "val")
    for wnid in ("n01440764", "n02102040"):
        (tmp_path / "val" / wnid / "b.JPEG").rename(tmp_path / "val" / f"{wnid}.JPEG")
    assert "sort them" in sentence(open_builtin, "imagenet", tmp_path)


# -------------------------------------------------------------------------------- what is missing


@pytest.mark.parametrize("name", [name for name in SETS if name not in ("imagenet", "svhn")])
def test_missing_sets_are_told_and_nothing_is_made(tmp_path: Path, name: str) -> None:
    """One sentence that names the folder, and an empty folder stays empty."""
    told = sentence(open_builtin, name, tmp_path)
    assert "data.download=true" in told
    assert SETS[name].folder in told
    assert not list(tmp_path.iterdir())


def test_half_unpacked_sets_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder alone is not the set."""
    for name in ("pets", "food101", "dtd", "aircraft", "gtsrb", "imagenette", "mnist", "eurosat"):
        (tmp_path / SETS[name].folder).mkdir()
        assert "is incomplete" in sentence(open_builtin, name, tmp_path)


def test_without_scipy_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some sets have MATLAB files."""
    flowers(tmp_path)
    unchecked(monkeypatch, "flowers102")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "dino-lite[builtin]" in sentence(open_builtin, "flowers102", tmp_path)


def test_unknown_names_are_told() -> None:
    """With those that are known."""
    assert "imagenette" in sentence(open_builtin, "cifar-11", ".")
    assert "data.name is not set" in sentence(open_builtin)
