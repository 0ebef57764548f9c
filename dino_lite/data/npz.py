"""Images and labels in one NumPy archive."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from dino_lite.contracts import Splits, UserError
from dino_lite.data.labels import encode_labels
from dino_lite.data.pixels import Bounds, to_8_bits, to_channels
from dino_lite.data.sources import ArraySource, expand
from dino_lite.settings.kinds import Size

KEYS = ("x_train", "y_train", "x_test", "y_test")


def open_npz(
    root: str | Path | None = None, channels: Size = 3, range: Bounds | None = None
) -> Splits:
    """An .npz with x_train and optionally y_train, x_test and y_test.

    Images: uint8, or other numbers with the `range` that becomes 0 to 255; N H W (gray) or N H W C;
    converted to `channels` as in `decode`. Labels: integers or text, N or N 1. Nothing is
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
    train = _images(path, "x_train", arrays["x_train"], channels, range)
    test = None
    if "x_test" in arrays:
        test = _images(path, "x_test", arrays["x_test"], channels, range)
    labels = encode_labels(
        _names(path, "y_train", arrays, len(train)),
        None if test is None else _names(path, "y_test", arrays, len(test)),
    )
    return Splits(
        ArraySource(train, labels.train, labels.classes, f"{path}/train"),
        None if test is None else ArraySource(test, labels.test, labels.classes, f"{path}/test"),
        path.stem,
    )


def _load(path: Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The arrays of the archive; of those with unknown names only the names."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is not a zip file")
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] if key in KEYS else np.empty(0) for key in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read as an .npz archive of plain arrays ({error}): "
            "write it again with numpy.savez."
        ) from error


def _images(
    path: Path, key: str, pixels: Shaped[np.ndarray, "..."], channels: int, bounds: Bounds | None
) -> UInt8[Tensor, "N H W C"]:
    """The array converted to `channels`, after checking dtype and shape."""
    known = pixels.dtype == np.uint8 or (bounds is not None and pixels.dtype.kind in "buif")
    if not known or pixels.ndim not in (3, 4):
        raise UserError(
            f"{key} in {path} is {_told(pixels)}: it must be uint8 of shape N H W or N H W C, or "
            "other numbers with data.range=[low, high]."
        )
    if 0 in pixels.shape:
        raise UserError(f"{key} in {path} is {_told(pixels)}: it holds no image.")
    try:
        images = [to_channels(to_8_bits(image, 0, bounds), channels) for image in pixels]
    except ValueError as error:
        raise UserError(f"{key} in {path} is {_told(pixels)}: each image {error}.") from error
    return torch.from_numpy(np.stack(images))  # a copy, since torch needs writable memory


def _names(
    path: Path, key: str, arrays: dict[str, Shaped[np.ndarray, "..."]], num: int
) -> list[int] | list[str] | None:
    """The labels as integers or text, one for each of `num` images; None without any."""
    if key not in arrays:
        return None
    labels = arrays[key]
    if labels.dtype.kind not in "iuU" or labels.shape not in ((num,), (num, 1)):
        raise UserError(
            f"{key} in {path} is {_told(labels)}: it must be integers or text, one for each of the "
            f"{num} images."
        )
    names: list[int] | list[str] = labels.ravel().tolist()
    return names


def _told(array: Shaped[np.ndarray, "..."]) -> str:
    return f"{array.dtype} of shape {array.shape}"
