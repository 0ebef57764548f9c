"""A data set by what `data.root` is."""

from __future__ import annotations

from pathlib import Path

from dino_lite.contracts import Splits, UserError
from dino_lite.data import files
from dino_lite.data.builtin import CIFAR10_FOLDER, open_cifar10
from dino_lite.data.files import open_files
from dino_lite.data.folder import open_folder
from dino_lite.data.npz import open_npz
from dino_lite.data.roots import Root, is_pattern, is_url, several
from dino_lite.data.shapes import open_shapes
from dino_lite.data.sources import expand


def open_auto(root: Root | None = None, labels: str | None = "auto", channels: int = 3) -> Splits:
    """Without `root` the embedded shapes; else what it is.

    A list of files (.csv, .tsv, .parquet, .txt; a path or URL), an .npz file, CIFAR-10; or a
    folder, several of them, or a pattern. `labels` and `channels` are for folders and lists; others
    bring their own labels, which `none` takes away.
    """
    if root is None:
        return _with_own_labels(open_shapes(channels=channels), labels)
    if several(root) is not None or is_pattern(root):
        return open_folder(root, labels, channels)
    assert isinstance(root, str | Path)
    path = Path(str(root)) if is_url(root) else expand(root)
    if path.is_dir():
        if path.name == CIFAR10_FOLDER or (path / CIFAR10_FOLDER).is_dir():
            return _with_own_labels(open_cifar10(root), labels)
        return open_folder(root, labels, channels)
    suffix = files.suffix_of(str(root))
    if suffix in files.SUFFIXES:
        return open_files(root, labels, channels)
    if suffix == ".npz":
        return _with_own_labels(open_npz(root, channels), labels)
    if path.is_file():
        raise UserError(
            f"data.root={root} is a file of no known kind: give a folder of images, a list of them "
            f"({', '.join(files.SUFFIXES)}), an .npz file, or torchvision's {CIFAR10_FOLDER}."
        )
    return open_folder(root, labels, channels)


def _with_own_labels(splits: Splits, labels: str | None) -> Splits:
    """What brings its labels keeps them, or loses them."""
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
