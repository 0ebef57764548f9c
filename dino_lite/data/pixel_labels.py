"""Segmentation data: images with a class number for every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from dino_lite.contracts import Source, UserError
from dino_lite.data.clean import by_channel
from dino_lite.data.folder import open_folder
from dino_lite.data.sources import expand, reason

_MODES = ("1", "L", "P", "I;16")  # of PNG files that hold class numbers


class Masked(NamedTuple):
    """An image, and the class of each of its pixels (-1: none)."""

    image: UInt8[np.ndarray, "H W C"]
    classes: Int[np.ndarray, "H W"]


class MaskedImages:
    """Images of `source`, each with a mask in a file of its own.

    Class numbers are those in the files; those in `ignore` are treated as unlabeled.
    """

    def __init__(self, source: Source, masks: Sequence[Path], ignore: Sequence[int]) -> None:
        self.source, self.masks, self.ignore = source, list(masks), list(ignore)
        self.rows = list(range(len(source)))

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, rows: Sequence[int]) -> MaskedImages:
        """The images at `rows`."""
        found = MaskedImages(self.source, self.masks, self.ignore)
        found.rows = [self.rows[row] for row in rows]
        return found

    def read(self, index: int) -> Masked:
        """Image `index` and its mask. Raises UserError if either cannot be read."""
        row = self.rows[index]
        try:
            image = self.source.read(row)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.source.name(row)} cannot be read ({reason(error)}): repair it, or remove "
                "it and its mask."
            ) from error
        classes = self.classes(index)
        if image.shape[:2] != classes.shape:
            (height, width), (tall, wide) = image.shape[:2], classes.shape
            raise UserError(
                f"{self.masks[row]} has {wide}x{tall} pixels, but its image {width}x{height}: "
                "a mask needs a number for each pixel."
            )
        return Masked(image, classes)

    def classes(self, index: int) -> Int[np.ndarray, "H W"]:
        """The mask of image `index`, -1 for unlabeled pixels."""
        path = self.masks[self.rows[index]]
        try:
            with Image.open(path) as image:
                mode, numbers = image.mode, np.asarray(image).astype(np.int64)
        except (OSError, ValueError, SyntaxError) as error:
            why = reason(cast(Exception, error))
            raise UserError(f"{path} cannot be read as a mask ({why}): repair it.") from error
        if mode not in _MODES:
            raise UserError(
                f"{path} is an image of mode {mode}: a mask holds a class number in each pixel "
                "(one channel or a palette), not colors."
            )
        numbers[np.isin(numbers, self.ignore)] = -1
        return numbers

    def numbers(self) -> list[int]:
        """The class numbers that occur, sorted; reads every mask."""
        found: set[int] = set()
        for index in range(len(self)):
            found.update(np.unique(self.classes(index)).tolist())
        return sorted(found - {-1})


def open_masks(
    root: object, ignore: Sequence[int] = (), channels: int = 3
) -> tuple[MaskedImages, MaskedImages | None]:
    """Train and, if it exists, test of root/images/{train,val|test}; the mask of an image is the
    PNG with the same path in root/masks.
    """
    folder = expand(root)
    images, masks = folder / "images", folder / "masks"
    for part in (images, masks):
        if not part.is_dir():
            raise UserError(
                f"{folder} has no folder {part.name}: images/train and masks/train are needed, and "
                "images/val and masks/val (or test) may be there."
            )
    splits = open_folder(images, labels="none", channels=channels)

    def with_masks(source: Source) -> MaskedImages:
        paths = [_mask_of(source, i, images, masks) for i in range(len(source))]
        lost = [i for i, path in enumerate(paths) if not path.is_file()]
        if lost:
            raise UserError(
                f"{len(lost)} of {len(paths)} images have no mask, the first being "
                f"{source.name(lost[0])}: {paths[lost[0]]} does not exist."
            )
        return MaskedImages(source, paths, ignore)

    return with_masks(splits.train), None if splits.test is None else with_masks(splits.test)


def _mask_of(source: Source, index: int, images: Path, masks: Path) -> Path:
    return masks / Path(source.name(index)).relative_to(images).with_suffix(".png")


def fitted(
    image: UInt8[np.ndarray, "H W C"], patch_size: int, shorter: int | None = None
) -> UInt8[np.ndarray, "h w C"]:
    """The whole image resized so that patches divide its sides: to the nearest multiples, at least
    one.

    `shorter`: resize the shorter side to this many pixels first. Bicubic.
    """
    scale = 1.0 if shorter is None else shorter / min(image.shape[:2])
    height, width = (
        max(1, int(side * scale / patch_size + 0.5)) * patch_size for side in image.shape[:2]
    )
    if (height, width) == image.shape[:2]:
        return image
    return by_channel(image, lambda part: part.resize((width, height), Image.Resampling.BICUBIC))
