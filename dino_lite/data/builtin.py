"""Data sets that torchvision knows, read from its own files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dino_lite.contracts import Splits, UserError
from dino_lite.data.sources import ArraySource, expand

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

CIFAR10_FOLDER = "cifar-10-batches-py"


def open_cifar10(root: str | Path | None = None, download: bool = False) -> Splits:
    """CIFAR-10 from `root/cifar-10-batches-py`, or from `root` if that is its name.

    torchvision compares the files' checksums before it unpickles them.
    """
    from torchvision.datasets import CIFAR10  # here, because importing it takes seconds

    folder = expand(root)
    if folder.name == CIFAR10_FOLDER:
        folder = folder.parent
    try:
        train, test = (
            CIFAR10(str(folder), train=part == "train", download=download)
            for part in ("train", "test")
        )
    except (RuntimeError, OSError) as error:  # missing or altered files; no network
        raise UserError(
            f"CIFAR-10 is not whole in {folder / CIFAR10_FOLDER}: unpack cifar-10-python.tar.gz "
            f"there, or set data.download=true ({error})."
        ) from error
    return Splits(_source(train, "train"), _source(test, "test"), "cifar10")


def _source(part: CIFAR10, name: str) -> ArraySource:
    labels = np.array(part.targets, np.int64)
    return ArraySource(torch.from_numpy(part.data), labels, list(part.classes), f"cifar10/{name}")
