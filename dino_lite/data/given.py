"""Images that a caller hands over in Python: paths, folders, PIL images and arrays, as a source."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from dino_lite.contracts import Source, UserError
from dino_lite.data.auto import open_auto
from dino_lite.data.decode import decode
from dino_lite.data.remote import Remote
from dino_lite.data.roots import is_pattern, is_url
from dino_lite.data.sources import digest, expand
from dino_lite.data.suffixes import SUFFIXES
from dino_lite.data.transform import pixels_of

Given = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
_KINDS = (str, os.PathLike, Image.Image, np.ndarray, Tensor)
_Item = str | UInt8[np.ndarray, "H W C"] | tuple[Source, int]


def as_source(images: Given | Iterable[Any], channels: int = 3) -> Source:
    """One image or several as a source: paths and URLs of images, folders and whatever else
    `data.root` may be (all their images, of train and then of test), PIL images, and uint8 or
    uint16 arrays "H W C" (or "H W", or several "N H W C") or tensors "C H W" (or "N C H W").

    Raises UserError for anything else.
    """
    is_one = isinstance(images, _KINDS) or not isinstance(images, Iterable)
    each: list[Any] = [images] if is_one else [*images]  # type: ignore[misc]
    items = [item for i, image in enumerate(each) for item in _items(image, i, channels)]
    if not items:
        raise UserError("There is no image to embed: give at least one.")
    return GivenImages(items, channels)


@final
class GivenImages(Source):
    """Paths or URLs of images, pixels, and images of other sources, in the given order."""

    def __init__(self, items: list[_Item], channels: int = 3) -> None:
        self.items, self.channels, self.opener = items, channels, Remote()

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int, min_pixels: int | None = None) -> UInt8[np.ndarray, "H W C"]:
        """Image `index`. Raises OSError or ValueError."""
        item = self.items[index]
        if isinstance(item, tuple):
            return item[0].read(item[1], min_pixels)
        if isinstance(item, np.ndarray):
            return item
        with self.opener(os.fsencode(item)) as file:
            return decode(file, self.channels, min_pixels)

    def name(self, index: int) -> str:
        """The path or the other source's name; of pixels "images[17]"."""
        item = self.items[index]
        if isinstance(item, tuple):
            return item[0].name(item[1])
        return f"images[{index}]" if isinstance(item, np.ndarray) else item

    def digest(self) -> str:
        """16 hex digits over names and pixels."""
        return digest(
            item.tobytes() if isinstance(item, np.ndarray) else self.name(i).encode()
            for i, item in enumerate(self.items)
        )


def _items(image: Any, position: int, channels: int) -> list[_Item]:
    """What one of the given stands for."""
    if isinstance(image, str | os.PathLike):
        return _of_path(os.fspath(image), channels)
    if not isinstance(image, Image.Image | np.ndarray | Tensor):
        raise UserError(
            f"images[{position}] is of type {type(image).__name__}: give a path, a PIL image or an "
            "array of uint8, H W C."
        )
    arrays: Any = image if getattr(image, "ndim", 0) == 4 else [image]
    try:
        return [pixels_of(each, channels) for each in arrays]
    except ValueError as error:
        told = str(error).partition(";")[0].replace("data.channels=", "")
        raise UserError(
            f"images[{position}] {told}: give uint8, before any normalization."
        ) from error


def _of_path(path: str, channels: int) -> list[_Item]:
    is_image = Path(path).suffix.lower().encode() in SUFFIXES and not is_pattern(path)
    if is_image and (is_url(path) or not expand(path).is_dir()):
        return [path if is_url(path) else str(expand(path))]
    splits = open_auto(path, channels=channels)
    sources = [source for source in (splits.train, splits.test) if source is not None]
    return [(source, i) for source in sources for i in range(len(source))]
