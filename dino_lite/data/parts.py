"""What workers deliver: the crops of a few images, and a list of unreadable images."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from dino_lite.contracts import Crops, Source, UserError
from dino_lite.data.crops import Drawn, MultiCrop, plain_globals
from dino_lite.data.sources import reason
from dino_lite.wording import count

try:
    import fcntl
except ImportError:  # Windows: no locking of bad_files.csv
    fcntl = None  # type: ignore[assignment]

Images = Sequence[UInt8[np.ndarray, "_ _ C"]]
# Fills one array per crop, "n s s C".
Pixels = Callable[[Images, Drawn, Sequence[UInt8[np.ndarray, "n _ _ C"]]], None]


class Part(NamedTuple):
    """A worker's result: the crops of ≤ 64 images and the images it could not read.

    `crops` is None if this worker alone met more bad images than are allowed.
    """

    crops: Crops | None
    bad: list[tuple[int, str]]


class CropData(Dataset[Part]):
    """Reads and crops the images of a part, in a worker or in process.

    An unreadable image is replaced by the next readable one of the source. Crops stay keyed by the
    requested index, so that the replacement's crops differ from its own; `Crops.index` and the
    label are the replacement's.
    """

    def __init__(
        self,
        source: Source,
        multi_crop: MultiCrop,
        make_crops: Pixels,
        max_bad: int,
        min_pixels: int | None = None,
    ) -> None:
        self.source, self.multi_crop, self.make_crops = source, multi_crop, make_crops
        self.max_bad, self.min_pixels = max_bad, min_pixels
        self.bad: dict[int, str] = {}  # unreadable images this worker has met

    def __getitems__(self, pairs: Sequence[tuple[int, int]]) -> Part:
        known = len(self.bad)
        self.source.prefetch([index for _, index in pairs])
        images, read = [], []
        for _, index in pairs:
            found = self._read(index)
            if found is None:
                return Part(None, list(self.bad.items()))
            images.append(found[0])
            read.append(found[1])
        epochs, asked = np.array(pairs).T
        sides = np.array([image.shape[:2] for image in images])
        drawn = self.multi_crop.draw(epochs, asked, *sides.T)
        pixels = self._make(images, drawn, self.multi_crop.groups)
        crops = to_crops(pixels, drawn, sides, np.array(read), self.source.labels)
        if self.multi_crop.gram_size is not None:
            again = self._make(images, plain_globals(drawn), [(2, self.multi_crop.gram_size)])
            crops = crops._replace(extra={"gram": _in_order(again[0])})
        return Part(crops, list(self.bad.items())[known:])

    def _make(
        self, images: Images, drawn: Drawn, groups: Sequence[tuple[int, int]]
    ) -> list[UInt8[np.ndarray, "_ n _ _ C"]]:
        """The pixels of each group of crops, given as (number of crops, size)."""
        num_images, channels = len(images), images[0].shape[2]
        pixels = [np.empty((num, num_images, s, s, channels), np.uint8) for num, s in groups]
        self.make_crops(images, drawn, [crop for kind in pixels for crop in kind])
        return pixels

    def _read(self, index: int) -> tuple[UInt8[np.ndarray, "H W C"], int] | None:
        """The first readable image from `index` on, and its index; None beyond `max_bad`."""
        while len(self.bad) <= self.max_bad:
            if index not in self.bad:
                try:
                    return self.source.read(index, self.min_pixels), index
                except (OSError, ValueError) as error:
                    self.bad[index] = reason(error)
            index = (index + 1) % len(self.source)
        return None


class DrawData(Dataset[Part]):
    """Draws the crops of images that are already on the device, without pixels.

    Crops have size 0 until `resample.fill` makes them.
    """

    def __init__(
        self,
        shape: Sequence[int],  # N H W C
        labels: Int[np.ndarray, "N"] | None,
        multi_crop: MultiCrop,
    ) -> None:
        self.labels, self.multi_crop = labels, multi_crop
        self.height, self.width, self.channels = shape[1:]

    def __getitems__(self, pairs: Sequence[tuple[int, int]]) -> Part:
        epochs, index = np.array(pairs).T
        sides = np.full((len(index), 2), (self.height, self.width))
        drawn = self.multi_crop.draw(epochs, index, *sides.T)
        pixels = [
            np.empty((num, len(index), 0, 0, self.channels), np.uint8)
            for num, _ in self.multi_crop.groups
        ]
        return Part(to_crops(pixels, drawn, sides, index, self.labels), [])


def to_crops(
    pixels: Sequence[UInt8[np.ndarray, "_ n _ _ C"]],
    drawn: Drawn,
    sides: Int[np.ndarray, "n 2"],
    index: Int[np.ndarray, "n"],
    labels: Int[np.ndarray, "N"] | None,
) -> Crops:
    """Assemble `Crops` from pixels.

    The pixels lie in memory as height, width, channel; they are made contiguous on the device.
    """
    globals_, *locals_ = map(_in_order, pixels)
    return Crops(
        globals_=globals_,
        locals_=locals_[0] if locals_ else None,
        index=torch.from_numpy(index.astype(np.int64)),
        labels=None if labels is None else torch.from_numpy(_of_images(labels, index)),
        boxes=torch.from_numpy((drawn.boxes / np.tile(sides, 2)).astype(np.float32)),
        draws=torch.from_numpy(drawn.params),
    )


def _of_images(labels: Int[np.ndarray, "N"], index: Int[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
    """The labels of images; -1 for numbers of N and more (`Source.turns`)."""
    found = np.full(len(index), -1, np.int64)
    known = index < len(labels)
    found[known] = labels[index[known]]
    return found


def _in_order(pixels: UInt8[np.ndarray, "_ n h w C"]) -> UInt8[Tensor, "_ n C h w"]:
    return torch.from_numpy(pixels).permute(0, 1, 4, 2, 3)


class BadFiles:
    """Counts the distinct images this rank could not read, and lists them in a CSV.

    Raises UserError if they are more than `max_fraction` of the source, or all of it.
    """

    def __init__(self, source: Source, max_fraction: float, path: Path | None) -> None:
        self.source, self.max_fraction, self.path = source, max_fraction, path
        self.reasons: dict[int, str] = {}

    @property
    def allowed(self) -> int:
        """The largest tolerated number of bad images; at least one image must be readable."""
        return min(int(self.max_fraction * len(self.source)), len(self.source) - 1)

    def add(self, found: Iterable[tuple[int, str]]) -> None:
        """Record the images that a worker reported."""
        new = {index: reason for index, reason in found if index not in self.reasons}
        if not new:
            return
        self.reasons |= new
        if self.path is not None:
            rows = [(self.source.name(index), reason) for index, reason in new.items()]
            append_rows(self.path, ("path", "reason"), rows)
        if len(self.reasons) > self.allowed:
            self._stop()

    def _stop(self) -> None:
        total, num_bad = len(self.source), len(self.reasons)
        if num_bad == total:
            what = f"None of the {count(total, 'image')} can be read"
        else:
            what = f"{num_bad} of the {total} images cannot be read, more than "
            what += f"loader.max_bad_fraction={self.max_fraction:g} allows"
        index, reason = next(iter(self.reasons.items()))
        listed = "" if self.path is None else f" (all in {self.path})"
        raise UserError(
            f"{what}, the first being {self.source.name(index)}: {reason}{listed}; "
            "repair or remove them."
        )


def append_rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Append rows whose first cell is not in the CSV yet; safe for concurrent processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", newline="", encoding="utf-8", errors="surrogateescape") as file:
        if fcntl is not None:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)  # released on close
        file.seek(0)
        known = {row[0] for row in csv.reader(file) if row}
        writer = csv.writer(file)
        if not known:
            writer.writerow(header)
        writer.writerows(row for row in rows if row[0] not in known)


def join(parts: Sequence[Crops]) -> Crops:
    """Concatenate the images of all parts, in order."""
    if len(parts) == 1:
        return parts[0]

    def along(dim: int, field: str) -> Any:  # a Tensor, or None if the parts have none
        tensors = [getattr(part, field) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors, dim)

    return Crops(
        globals_=along(1, "globals_"),
        locals_=along(1, "locals_"),
        index=along(0, "index"),
        labels=along(0, "labels"),
        boxes=along(1, "boxes"),
        draws=along(1, "draws"),
        extra={name: torch.cat([p.extra[name] for p in parts], 1) for name in parts[0].extra},
    )
