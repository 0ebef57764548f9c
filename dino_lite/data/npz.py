"""Images and labels in one NumPy archive."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8

from dino_lite.contracts import Splits, UserError
from dino_lite.data.labels import encode_labels
from dino_lite.data.sources import ArraySource, expand

KEYS = ("x_train", "y_train", "x_test", "y_test")


def open_npz(root: str | None = None) -> Splits:
    """An .npz with x_train and, as far as it has them, y_train, x_test and y_test.

    Images: uint8, N H W (gray), N H W 1 or N H W 3. Labels: integers or text, N or N 1. Nothing is
    unpickled.
    """
    path = expand(root)
    if not path.is_file():
        what = "is a folder" if path.exists() else "does not exist"
        raise UserError(f"data.root={path} {what}: name an .npz file with {', '.join(KEYS)}.")
    arrays = _load(path)
    if "x_train" not in arrays:
        found = ", ".join(sorted(arrays)) or "nothing"
        raise UserError(f"{path} has no x_train, but {found}: name its arrays {', '.join(KEYS)}.")
    train = _images(path, "x_train", arrays["x_train"])
    test = _images(path, "x_test", arrays["x_test"]) if "x_test" in arrays else None
    labels = encode_labels(
        _names(path, "y_train", arrays, len(train)),
        None if test is None else _names(path, "y_test", arrays, len(test)),
    )
    return Splits(
        ArraySource(train, labels.train, labels.classes, f"{path}/train"),
        None
        if test is None
        else ArraySource(test, labels.test, labels.classes, f"{path}/test"),
        path.stem,
    )


def _load(path: Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The arrays of the archive that have a meaning here; of others the name and an empty array."""
    damage = (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {
                key: archive[key] if key in KEYS else np.empty(0) for key in archive.files
            }
    except (*damage, AttributeError) as error:  # AttributeError: a single array has no files
        raise UserError(
            f"{path} cannot be read as an .npz archive of plain arrays ({error}): write it anew with numpy.savez."
        ) from error
