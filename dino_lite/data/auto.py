"""A data set by what `data.root` is."""

from __future__ import annotations

from pathlib import Path

from dino_lite.contracts import Splits, UserError
from dino_lite.data.builtin import CIFAR10_FOLDER, open_cifar10
from dino_lite.data.folder import open_folder
from dino_lite.data.npz import open_npz
from dino_lite.data.shapes import open_shapes
from dino_lite.data.sources import expand


def open_auto(
    root: str | Path | None = None, labels: str | None = "auto", channels: int = 3
) -> Splits:
    """Without `root` the embedded shapes; else what it is: an .npz file, CIFAR-10, or a folder.

    `labels` is for folders, see `open_folder`; others bring their own, which `none` takes away.
    `channels`: what every image is made to have, see `decode`.
    """
    if root is None:
        splits = open_shapes(channels=channels)
    elif (path := expand(root)).suffix.lower() == ".npz":
        splits = open_npz(root, channels)
    elif path.name == CIFAR10_FOLDER or (path / CIFAR10_FOLDER).is_dir():
        splits = open_cifar10(root)
    elif path.is_file():
        raise UserError(
            f"data.root={path} is a file of no known kind: give a folder of images, an .npz file, "
            f"or torchvision's {CIFAR10_FOLDER}."
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
