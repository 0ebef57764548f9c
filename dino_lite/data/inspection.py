"""Inspects file, header and pixels of every image of a source in one pass."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int, Shaped, UInt8
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dino_lite.contracts import Source
from dino_lite.data.decode import BLANK_STD, look
from dino_lite.data.sources import reason
from dino_lite.data.suffixes import FORMATS
from dino_lite.data.workers import worker_context

MIN_PIXELS = 256 * 256  # large JPEGs are decoded smaller, which suffices here
GRAY_DIFFERENCE = 2.0  # mean difference of adjacent channels, out of 255: below, there is no color
_PART_SIZE = 64  # images per item of work
_NUM_SAMPLED = 128 * 128  # at most, pixels of an image in its statistics

# One image. "digest" covers the file's bytes, or without a file shape and pixels; "hash" is
# perceptual. 61 bytes.
ROW = np.dtype(
    [
        ("digest", np.uint64),
        ("hash", np.uint64),
        ("num_bytes", np.int64),
        ("height", np.int32),
        ("width", np.int32),
        ("format", "S9"),
        ("mode", "S14"),
        ("readable", np.bool_),
        ("rotated", np.bool_),
        ("misnamed", np.bool_),  # the suffix belongs to another format
        ("gray", np.bool_),
        ("blank", np.bool_),
        ("vanishes", np.bool_),  # it shows one color since alpha is dropped
        ("largest", np.uint16),  # value, of an image of more than 8 bits
        ("full", np.uint16),  # the largest that its bits can be; 0 up to 8 bits
    ]
)


class Inspected(NamedTuple):
    """A ROW per image, why some are unreadable, and sums over the readable ones."""

    rows: Shaped[np.ndarray, "n"]
    bad: list[tuple[int, str]]  # index in the source, reason
    sums: Float64[np.ndarray, "2 C"]  # of the images' means and mean squares, values in [0, 1]

    def moments(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, weighting images equally; empty if none is
        readable.
        """
        num = int(self.rows["readable"].sum())
        if not num:
            return [], []
        mean, square = self.sums / num
        std = np.sqrt(np.maximum(square - mean**2, 0))
        return mean.round(4).tolist(), std.round(4).tolist()


def inspect(
    source: Source,
    indices: Int[np.ndarray, "n"],
    num_workers: int = 0,
    hashing: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> Inspected:
    """Read and decode each image of `indices` once, in this process or in workers.

    `hashing`: compute perceptual hashes too (needs `imagehash`). `progress` is called with the
    number of images just done.
    """
    if hashing:
        import imagehash  # noqa: F401 - imported once, before workers fork
    loader = DataLoader(
        InspectedImages(source, hashing),
        batch_size=_PART_SIZE,
        sampler=indices.tolist(),
        num_workers=num_workers,
        multiprocessing_context=worker_context(num_workers),
        collate_fn=_as_found,
        generator=torch.Generator(),  # leaves the global generator alone
    )
    rows, bad, sums = np.zeros(len(indices), ROW), [], np.zeros((2, 1))
    seen = 0
    for part in loader:
        rows[seen : seen + len(part.rows)] = part.rows
        seen += len(part.rows)
        bad += part.bad
        sums = sums + part.sums
        if progress is not None:
            progress(len(part.rows))
    return Inspected(rows, bad, sums)


class InspectedImages(Dataset[Inspected]):
    """Inspects a list of images at a time."""

    def __init__(self, source: Source, hashing: bool = True) -> None:
        self.source, self.hashing = source, hashing

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> Inspected:
        self.source.prefetch(indices)
        rows, bad, sums = np.zeros(len(indices), ROW), [], np.zeros((2, 1))
        for row, index in zip(rows, indices, strict=True):
            try:
                pixels = read_into(row, self.source, index)
            except (OSError, ValueError) as error:
                bad.append((index, reason(error)))
                continue
            sums = sums + look_at(row, pixels, self.hashing)
        return Inspected(rows, bad, sums)


def read_into(row: Any, source: Source, index: int) -> UInt8[np.ndarray, "h w C"]:
    """The pixels of an image, perhaps downscaled; facts about its file go into `row`.

    A file is opened once. Images without a file have neither format nor mode.
    """
    stored = source.encoded(index)
    if stored is None:
        pixels = source.read(index)
        row["height"], row["width"] = pixels.shape[:2]
        row["digest"] = _digest(repr(pixels.shape).encode() + pixels.tobytes())
        return pixels
    content, suffix = stored
    row["num_bytes"], row["digest"] = len(content), _digest(content)
    found = look(io.BytesIO(content), source.pixels or source.channels, MIN_PIXELS)
    header = found.header
    row["height"], row["width"] = header.size
    row["format"], row["mode"], row["rotated"] = header.format, header.mode, header.orientation > 1
    row["largest"], row["full"], row["vanishes"] = found.largest, found.full, found.vanishes
    named = FORMATS.get(suffix.lower())
    row["misnamed"] = named is not None and named != header.format
    return found.pixels


def look_at(
    row: Any, pixels: UInt8[np.ndarray, "h w C"], hashing: bool
) -> Float64[np.ndarray, "2 C"]:
    """Mean and mean square of each channel; facts about the pixels go into `row`."""
    height, width, num_channels = pixels.shape
    stride = math.ceil((height * width / _NUM_SAMPLED) ** 0.5)
    sampled = pixels[::stride, ::stride].reshape(-1, num_channels).T.astype(np.float32, order="C")
    sampled /= 255  # C P: reductions over contiguous memory are ten times as fast
    num_sampled = sampled.shape[1]
    steps = np.abs(sampled[1:] - sampled[:-1]).sum() / (max(num_channels - 1, 1) * num_sampled)
    row["gray"] = num_channels in (1, 3) and steps * 255 < GRAY_DIFFERENCE
    row["blank"] = sampled.mean(0).std() * 255 < BLANK_STD
    if hashing:
        row["hash"] = perceptual_hash(pixels)
    row["readable"] = True
    squares = np.einsum("cp,cp->c", sampled, sampled) / num_sampled
    return np.stack([sampled.mean(1), squares]).astype(np.float64)


def perceptual_hash(pixels: UInt8[np.ndarray, "h w C"]) -> int:
    """64 bits that are robust to small changes: `imagehash.phash` of the luma."""
    from imagehash import phash

    if pixels.shape[2] == 3:
        luma = Image.fromarray(pixels).convert("L")
    else:
        luma = Image.fromarray(pixels.mean(2).astype(np.uint8))
    # phash resizes to 32 pixels, slowly; averaging blocks first is five times as fast.
    luma = luma.reduce(max(1, min(luma.size) // 64))
    return int.from_bytes(np.packbits(phash(luma).hash).tobytes(), "big")


def _digest(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def _as_found(part: Any) -> Any:
    """Collate function: `__getitems__` already returns a batch."""
    return part
