"""Opens a data set according to what `data.root` points to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dino_lite.contracts import Splits, UserError
from dino_lite.data import files
from dino_lite.data.builtin import CIFAR10_FOLDER, open_builtin
from dino_lite.data.columns import holds_images
from dino_lite.data.files import open_files
from dino_lite.data.folder import look_through, open_folder, read_folders
from dino_lite.data.huggingface import is_saved, num_rows, open_huggingface
from dino_lite.data.layout import were
from dino_lite.data.npz import open_npz
from dino_lite.data.pixels import Background, Bounds, Pixels
from dino_lite.data.roots import Root, Top, is_pattern, is_url, several
from dino_lite.data.selection import Patterns, select
from dino_lite.data.shapes import open_shapes
from dino_lite.data.shards import num_packed, open_shards
from dino_lite.data.sources import expand
from dino_lite.data.walk import Found
from dino_lite.settings.kinds import Size

_OF_FOLDERS = ("exclude", "class_level")  # settings that tables do not have


def open_auto(
    root: Root | None = None,
    labels: str | None = "auto",
    channels: Size = 3,
    range: Bounds | None = None,
    background: Background | None = None,
    truncated: bool = False,
    train: Patterns = None,
    test: Patterns = None,
    exclude: Patterns = None,
    class_level: int = 0,
    path_column: str | None = None,
    label_column: str | None = None,
) -> Splits:
    """Open the data set at `root`; without `root`, the embedded shapes.

    `root` is a list of files (.csv, .tsv, .parquet, .txt; a path or URL), tar shards, Parquet or
    Arrow files with images, an .npz file, CIFAR-10, or one or several folders or a pattern. Of a
    folder with files, shards and tables, those that hold most images are read. `labels` applies to
    folders and lists; other formats use their own labels, which `none` discards. `channels` to
    `truncated`: see `Pixels`. `train` to `class_level`: see `open_folder`; columns: see
    `open_files`.
    """
    pixels = Pixels(channels, range, background, truncated)
    if root is None:
        return _with_own_labels(open_shapes(channels=channels), labels)
    settings = {"train": train, "test": test, "exclude": exclude, "class_level": class_level}
    way: dict[str, Any] = pixels._asdict() | settings
    if several(root) is not None or is_pattern(root):
        return open_folder(root, labels, **way)
    assert isinstance(root, str | Path)
    path = Path(str(root)) if is_url(root) else expand(root)
    if path.is_dir():
        return _open_in_folder(path, labels, way)
    suffix = files.suffix_of(str(root))
    if str(root).lower().endswith((".tar", ".tar.gz", ".tgz")):
        return _with_own_labels(open_shards(root, **way), labels)
    if suffix in (".parquet", ".arrow") and path.is_file() and holds_images(path):
        return _with_own_labels(open_huggingface(root, **pixels._asdict()), labels)
    if suffix in files.SUFFIXES:
        columns: dict[str, Any] = {"path_column": path_column, "label_column": label_column}
        return open_files(root, labels, **way, **columns)
    if suffix == ".npz":
        return _with_own_labels(open_npz(root, channels, range), labels)
    if path.is_file():
        raise UserError(
            f"data.root={root} is a file of no known kind: give a folder of images, a list of them "
            f"({', '.join(files.SUFFIXES)}), tar shards, an .npz file, or torchvision's "
            f"{CIFAR10_FOLDER}."
        )
    return open_folder(root, labels, **way)


def _open_in_folder(path: Path, labels: str | None, way: dict[str, Any]) -> Splits:
    """The files, tar shards or tables in a folder, whichever hold most images. `way`: the settings
    that `open_folder` and `open_shards` share.
    """
    of_table = {key: value for key, value in way.items() if key not in _OF_FOLDERS}
    if path.name == CIFAR10_FOLDER or (path / CIFAR10_FOLDER).is_dir():
        return _with_own_labels(open_builtin("cifar10", path, channels=way["channels"]), labels)
    if is_saved(str(path)):
        return _with_own_labels(open_huggingface(path, **of_table), labels)
    chosen = select(way["train"], way["test"], way["exclude"], way["class_level"])
    top = Top(str(path))
    held = look_through(top, chosen)
    kinds = _kinds(path, held)
    kind = max(kinds, key=lambda name: kinds[name][0]) if kinds else "folder"
    if kind == "shards":
        splits = open_shards(path, **way)
    elif kind == "huggingface":
        if way["class_level"]:
            raise UserError(
                f"data.class_level={way['class_level']} is for folders, lists and tar shards, but "
                f"{path} holds images in tables: leave it out."
            )
        splits = open_huggingface(path, **of_table)
    else:
        pixels = Pixels(**{field: way[field] for field in Pixels._fields})
        splits = read_folders([(top, held)], False, labels, pixels, chosen)
    others = tuple(
        f"{were(num)} left out ({example}), as data.root={path} holds more images of another "
        f"kind: data={other} reads these instead."
        for other, (num, example) in kinds.items()
        if other != kind and num
    )
    splits = splits._replace(left_out=splits.left_out + others)
    return splits if kind == "folder" else _with_own_labels(splits, labels)


def _kinds(path: Path, held: Found) -> dict[str, tuple[int, str]]:
    """Number of images and an example file of each kind in a folder, by the choice in conf/data.

    Nothing is counted if there is one kind only.
    """
    tables = [file for kind in (".parquet", ".arrow") for file in held.others.get(kind, [])]
    tables = [file for file in tables if holds_images(path / file)]
    tars = held.others.get(".tar", [])
    images = len(held.images)
    first = os.fsdecode(held.images[0]) if images else ""
    if not images and not (tars and tables):
        only = "shards" if tars else "huggingface"
        return {only: (1, (tars or tables)[0])} if tars or tables else {}
    kinds: dict[str, tuple[int, str]] = {"folder": (images, first)}
    if tars:
        kinds["shards"] = (num_packed(str(path), tars), tars[0])
    if tables:
        kinds["huggingface"] = (sum(num_rows(path / file) for file in tables), tables[0])
    return kinds


def _with_own_labels(splits: Splits, labels: str | None) -> Splits:
    """Keep or discard the labels of a format that has its own."""
    if labels in (None, "none"):
        for source in (splits.train, splits.test):
            if source is not None:
                source.labels, source.classes = None, []
        return splits._replace(labels_from="data.labels=none")
    if labels != "auto":
        raise UserError(
            f"data.labels={labels} is for folders of images, but {splits.name} brings its own: "
            "leave it out."
        )
    return splits
