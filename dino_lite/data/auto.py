"""A data set by what `data.root` is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dino_lite.contracts import Splits, UserError
from dino_lite.data.builtin import CIFAR10_FOLDER, open_builtin
from dino_lite.data.byte_ranges import is_url
from dino_lite.data.folder import SUFFIXES, open_folder
from dino_lite.data.huggingface import holds_images, open_huggingface
from dino_lite.data.npz import open_npz
from dino_lite.data.shapes import open_shapes
from dino_lite.data.shards import open_shards
from dino_lite.data.sources import expand

_SAVED_TO_DISK = ("dataset_dict.json", "state.json")


def open_auto(
    root: str | Path | None = None, labels: str | None = "auto", channels: int = 3
) -> Splits:
    """Without `root` the embedded shapes; else what it is: an .npz file, CIFAR-10, tar shards,
    Parquet or Arrow with images, or a folder.

    `labels` is for folders, see `open_folder`; others bring their own, which `none` takes away.
    """
    if root is None:
        splits = open_shapes()
    elif (path := expand(root)).suffix.lower() == ".npz":
        splits = open_npz(root)
    elif path.name == CIFAR10_FOLDER or (path / CIFAR10_FOLDER).is_dir():
        splits = open_builtin("cifar10", root, channels=channels)
    elif (kind := _kind(root, path)) == "shards":
        splits = open_shards(root, channels)
    elif kind == "huggingface":
        splits = open_huggingface(root, channels=channels)
    elif path.is_file():
        raise UserError(
            f"data.root={path} is a file of no known kind: give a folder of images, an .npz file, "
            f"tar shards, Parquet with images, or torchvision's {CIFAR10_FOLDER}."
        )
    else:
        return open_folder(root, labels, channels)
    if labels in (None, "none"):
        for source in (splits.train, splits.test):
            if source is not None:
                source.labels, source.classes = None, []
    elif labels != "auto":
        raise UserError(
            f"data.labels={labels} is for folders of images, but {splits.name} brings its own: "
            "leave it out."
        )
    return splits


def _kind(root: str | Path, path: Path) -> str:
    """What reads a file or folder, as its names tell: shards, huggingface or "" (neither)."""
    if str(root).lower().endswith((".tar", ".tar.gz", ".tgz")) or is_url(str(root)):
        return "shards"
    if path.suffix.lower() == ".parquet" and path.is_file():
        return "huggingface" if holds_images(path) else ""
    if path.suffix.lower() == ".arrow" and path.is_file():
        return "huggingface"
    if not path.is_dir():
        return ""
    if any((path / name).is_file() for name in _SAVED_TO_DISK):
        return "huggingface"
    found = dict(_first_of_each_suffix(path))
    if any(suffix.encode() in SUFFIXES for suffix in found):
        return ""
    if ".tar" in found:
        return "shards"
    tables = [found[suffix] for suffix in (".parquet", ".arrow") if suffix in found]
    return "huggingface" if any(map(holds_images, tables)) else ""


def _first_of_each_suffix(path: Path) -> Iterator[tuple[str, Path]]:
    """A file of each suffix in the folder and the folders in it; no further than to an image."""
    folders = [path]
    for folder in folders:  # which grows while it is gone through
        try:
            for file in folder.iterdir():
                suffix = file.suffix.lower()
                if file.name.startswith("."):
                    continue
                if folder == path and file.is_dir():
                    folders.append(file)
                elif suffix and file.is_file():
                    yield suffix, file
                    if suffix.encode() in SUFFIXES:
                        return
        except OSError:  # the one who opens it will say why
            continue
