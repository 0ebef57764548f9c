"""Torchvision's named data sets, read from torchvision's own files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from dino_lite.contracts import Source, Splits, UserError
from dino_lite.data.decode import to_channels
from dino_lite.data.folder import open_folder
from dino_lite.data.paths import PathList
from dino_lite.data.sources import ArraySource, PathSource, expand
from dino_lite.settings.kinds import Size

CIFAR10_FOLDER = "cifar-10-batches-py"


class Known(NamedTuple):
    """Name of the class in torchvision.datasets, its folder below `root`, and the constructor
    arguments of each split; several per split are concatenated.
    """

    kind: str
    folder: str
    train: tuple[dict[str, Any], ...]
    test: tuple[dict[str, Any], ...]


def _split(*names: str, **others: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"split": name, **others} for name in names)


_TRAIN, _TEST = ({"train": True},), ({"train": False},)
_WHOLE: tuple[dict[str, Any], ...] = ({},)
# If test labels are few or withheld, val is the test split; if both are labeled, val is added to
# the training split, as in the sets' own protocols.
SETS = {
    "aircraft": Known("FGVCAircraft", "fgvc-aircraft-2013b", _split("trainval"), _split("test")),
    "caltech101": Known("Caltech101", "caltech101", _WHOLE, ()),
    "cars": Known("StanfordCars", "stanford_cars", _split("train"), _split("test")),
    "cifar10": Known("CIFAR10", CIFAR10_FOLDER, _TRAIN, _TEST),
    "cifar100": Known("CIFAR100", "cifar-100-python", _TRAIN, _TEST),
    "dtd": Known("DTD", "dtd", _split("train", "val"), _split("test")),
    "eurosat": Known("EuroSAT", "eurosat", _WHOLE, ()),
    "fashion_mnist": Known("FashionMNIST", "FashionMNIST", _TRAIN, _TEST),
    "flowers102": Known("Flowers102", "flowers-102", _split("train", "val"), _split("test")),
    "food101": Known("Food101", "food-101", _split("train"), _split("test")),
    "gtsrb": Known("GTSRB", "gtsrb", _split("train"), _split("test")),
    "imagenet": Known("ImageNet", "", (), ()),  # see `_open_imagenet`
    "imagenette": Known("Imagenette", "imagenette2", _split("train"), _split("val")),
    "imagenette_160": Known(
        "Imagenette", "imagenette2-160", _split("train", size="160px"), _split("val", size="160px")
    ),
    "imagenette_320": Known(
        "Imagenette", "imagenette2-320", _split("train", size="320px"), _split("val", size="320px")
    ),
    "mnist": Known("MNIST", "MNIST", _TRAIN, _TEST),
    "pets": Known("OxfordIIITPet", "oxford-iiit-pet", _split("trainval"), _split("test")),
    "stl10": Known("STL10", "stl10_binary", _split("train+unlabeled"), _split("test")),
    "svhn": Known("SVHN", "", _split("train"), _split("test")),
}


def open_builtin(
    name: str | None = None,
    root: str | Path | None = None,
    download: bool = False,
    channels: Size = 3,
) -> Splits:
    """The set `name` of SETS from torchvision's files below `root`, or from its own folder there.

    Small images are held in memory; image files are read on demand. Labels are the set's own, -1
    for unlabeled images (STL-10's 100,000, which are part of train). `channels`: every image is
    converted to that many, see `decode`.
    """
    if name is None or name not in SETS:
        what = "data.name is not set" if name is None else f"data.name={name} is not a known set"
        raise UserError(f"{what}: choose one of {', '.join(SETS)}.")
    known = SETS[name]
    base = expand(root)
    if name == "imagenet":
        return _open_imagenet(base, download, channels)
    if known.folder and base.name == known.folder:
        base = base.parent
    if not download and not (base / known.folder).is_dir():
        raise UserError(_missing(name, base, "the folder does not exist"))
    train, *test = (
        _source(
            name, base, part, [_load(name, base, args, download) for args in arguments], channels
        )
        for part, arguments in (("train", known.train), ("test", known.test))
        if arguments
    )
    return Splits(train, test[0] if test else None, name)


def _missing(name: str, base: Path, why: object) -> str:
    """The message for a set that cannot be opened."""
    folder = base / SETS[name].folder
    return (
        f"{SETS[name].kind} is incomplete in {folder}: unpack its files as torchvision does, or "
        f"set data.download=true ({' '.join(str(why).split()).rstrip('.')})."
    )


def _load(name: str, base: Path, arguments: dict[str, Any], download: bool) -> Any:
    """The torchvision object; torchvision verifies checksums before unpickling."""
    from torchvision import datasets  # slow to import

    try:
        return getattr(datasets, SETS[name].kind)(str(base), **arguments, download=download)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{SETS[name].kind} needs {error.name}: pip install 'dino-lite[builtin]'."
        ) from error
    except (RuntimeError, OSError, ValueError, LookupError, EOFError, AssertionError) as error:
        # missing, changed or partly unpacked files; no network
        raise UserError(_missing(name, base, error)) from error


def _source(name: str, base: Path, part: str, loaded: list[Any], channels: int) -> Source:
    """The source of one split, from its torchvision objects."""
    found = getattr(loaded[0], "classes", getattr(loaded[0], "categories", []))
    classes = [
        name if isinstance(name, str) else name[0] for name in found
    ]  # or a tuple of synonyms
    if hasattr(loaded[0], "data"):
        (one,) = loaded
        targets = one.targets if hasattr(one, "targets") else one.labels
        images = _to_channels(_channels_last(torch.as_tensor(one.data)), channels)
        labels = np.asarray(targets, np.int64)
        return ArraySource(images, labels, classes or _numbered(labels), f"{name}/{part}")
    files = [pair for one in loaded for pair in _files(one)]
    labels = np.array([label for _, label in files], np.int64)
    paths = PathList()
    for path, _ in files:
        paths.add(os.fsencode(os.path.relpath(path, base)))
    names = classes or _numbered(labels)
    return PathSource(os.fsencode(base), paths.paths(), labels, names, channels)


def _numbered(labels: Int[np.ndarray, "N"]) -> list[str]:
    return [str(i) for i in range(int(labels.max(initial=-1)) + 1)]


def _files(loaded: Any) -> Iterable[tuple[str | Path, int]]:
    """Path and label of each image, as listed by the torchvision object."""
    if hasattr(loaded, "index"):  # Caltech101 stores image numbers
        folder = Path(loaded.root, "101_ObjectCategories")
        return [
            (folder / loaded.categories[label] / f"image_{number:04d}.jpg", label)
            for number, label in zip(loaded.index, loaded.y, strict=True)
        ]
    for name in ("_samples", "samples"):
        if hasattr(loaded, name):
            samples: list[tuple[str, int]] = getattr(loaded, name)
            return samples
    files = loaded._image_files if hasattr(loaded, "_image_files") else loaded._images
    return zip(files, loaded._labels, strict=True)


def _channels_last(pixels: UInt8[Tensor, "N ..."]) -> UInt8[Tensor, "N H W C"]:
    if pixels.ndim == 3:
        return pixels[..., None]
    return pixels if pixels.shape[3] == 3 else pixels.permute(0, 2, 3, 1).contiguous()


def _to_channels(pixels: UInt8[Tensor, "N H W C"], channels: int) -> UInt8[Tensor, "N H W D"]:
    """Convert the number of channels as `decode` does."""
    if pixels.shape[3] == channels:
        return pixels
    try:
        return torch.from_numpy(np.stack([to_channels(x, channels) for x in pixels.numpy()]))
    except ValueError as error:
        raise UserError(f"data.channels={channels}: each image {error}; choose 1 or 3.") from error


def _open_imagenet(base: Path, download: bool, channels: int) -> Splits:
    """ImageNet's class folders (n01440764 …) in `root/train` and `root/val`.

    torchvision's class also requires the devkit, which is often missing.
    """
    advice = "torchvision.datasets.ImageNet(root, split) makes the folders of the archives"
    if download:
        raise UserError(
            f"ImageNet cannot be downloaded without an account on image-net.org: get it; {advice}."
        )
    if not (base / "train").is_dir() or not (base / "val").is_dir():
        raise UserError(
            f"{base} is not ImageNet, as it has no folders train and val: check data.root; "
            f"{advice}."
        )
    splits = open_folder(base, "folder", channels)
    if splits.test is None or splits.test.labels is None:
        raise UserError(
            f"The images in {base / 'val'} do not lie in class folders (n01440764 …): sort them; "
            f"{advice}."
        )
    return splits._replace(name="imagenet")
