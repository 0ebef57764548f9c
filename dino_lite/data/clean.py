"""Images for evaluation: deterministic, one view per image, every image once and in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from dino_lite.contracts import Source, Splits, UserError
from dino_lite.data.photometric import Normalize
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.sources import reason
from dino_lite.data.workers import worker_context


def clean(
    image: UInt8[np.ndarray, "H W C"], how: Preprocessing
) -> UInt8[np.ndarray, "rows columns C"]:
    """The image resized and cropped as `how` says."""
    height, width = image.shape[:2]
    if how.rule == "dino_lite" and (height, width) == how.size:
        return image
    (rows, columns), size = how.resized(height, width), how.size
    top, left = how.corner(rows, columns)
    method = Image.Resampling[how.interpolation.upper()]
    found = by_channel(
        image,
        lambda part: part.resize((columns, rows), method).crop(
            (left, top, left + size[1], top + size[0])
        ),
    )
    if not how.border:
        return found
    filled = np.empty_like(found)
    filled[:] = [round(255 * value) for value in how.mean]
    inside = (slice(max(-top, 0), rows - top), slice(max(-left, 0), columns - left))
    filled[inside] = found[inside]
    return filled


def write_png(image: UInt8[np.ndarray, "H W C"], path: Path) -> None:
    """Write an image of one or three channels, without loss."""
    shown = image[..., 0] if image.shape[2] == 1 else image
    Image.fromarray(np.ascontiguousarray(shown)).save(path, format="PNG", compress_level=1)


def preprocessing_of(size: int, normalize: Normalize) -> Preprocessing:
    """The published protocol at `size` x `size` pixels with the normalization of a run."""
    mean, std = (tuple(values.tolist()) for values in (normalize.mean, normalize.std))
    return Preprocessing((size, size), mean, std)


def by_channel(
    image: UInt8[np.ndarray, "H W C"], change: Callable[[Image.Image], Image.Image]
) -> UInt8[np.ndarray, "h w C"]:
    """Apply a per-channel PIL operation to an image with any number of channels."""
    if image.shape[2] == 3:
        return np.asarray(change(Image.fromarray(image)))
    parts = [change(Image.fromarray(image[..., i])) for i in range(image.shape[2])]
    return np.stack([np.asarray(part) for part in parts], axis=-1)


class Batch(NamedTuple):
    """A worker's result: the readable images of those requested, and index and reason of the
    others.
    """

    images: UInt8[Tensor, "b C H W"]
    labels: Int[Tensor, "b"]
    index: Int[Tensor, "b"]  # type: ignore[assignment]  # hides tuple.index, which is unused
    bad: list[tuple[int, str]]


class CleanImages(Dataset[Batch]):
    """Reads a list of images at a time and applies `clean`. Labels are -1 for unlabeled sources."""

    def __init__(self, source: Source, preprocessing: Preprocessing) -> None:
        self.source, self.preprocessing = source, preprocessing

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        images, labels, read, bad = [], [], [], []
        self.source.prefetch(indices)
        for index in indices:
            try:
                images.append(clean(self.source.read(index), self.preprocessing))
            except (OSError, ValueError) as error:
                bad.append((index, reason(error)))
                continue
            read.append(index)
            labels.append(-1 if self.source.labels is None else int(self.source.labels[index]))
        pixels = (
            np.stack(images) if images else np.empty((0, *self.preprocessing.size, 1), np.uint8)
        )
        channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        rows = torch.tensor([labels, read], dtype=torch.int64)
        return Batch(channels_first, rows[0], rows[1], bad)


class CleanData:
    """A data set as evaluations read it.

    Unreadable images are skipped and recorded in `bad` (name: reason).
    """

    def __init__(
        self, splits: Splits, preprocessing: Preprocessing, batch_size: int, num_workers: int = 0
    ) -> None:
        if min(*preprocessing.size, batch_size) < 1 or num_workers < 0:
            raise UserError(
                f"An evaluation at size {preprocessing.pixels}, batch_size {batch_size} and "
                f"num_workers {num_workers} is impossible: the first two must be above 0, the last "
                "not below."
            )
        self.splits, self.preprocessing = splits, preprocessing
        self.normalize = Normalize(preprocessing.mean, preprocessing.std)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.bad: dict[str, str] = {}

    def batches(
        self, source: Source, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Iterator[tuple[Float[Tensor, "b C H W"], Int[Tensor, "b"]]]:
        """Normalized images and labels (-1: none), in the source's order, each image once."""
        for images, labels, _ in self.indexed(source, device, dtype):
            yield images, labels

    def indexed(
        self,
        source: Source,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        order: Iterable[list[int]] | None = None,
    ) -> Iterator[tuple[Float[Tensor, "b C H W"], Int[Tensor, "b"], Int[Tensor, "b"]]]:
        """As `batches`, and the index of each image in the source, on the host. `order`: the
        indices of each batch, if not those of the whole source.
        """
        pin = device.type == "cuda"
        for images, labels, index, _ in self.read(source, pin, order):
            images = images.to(device, non_blocking=pin)
            yield self.normalize(images, dtype), labels.to(device, non_blocking=pin), index

    def read(
        self, source: Source, pin: bool = False, order: Iterable[list[int]] | None = None
    ) -> Iterator[Batch]:
        """uint8 images on the host, in order; batches without a readable image are skipped."""
        if order is None:
            order = BatchSampler(range(len(source)), self.batch_size, drop_last=False)
        loader = DataLoader(
            CleanImages(source, self.preprocessing),
            batch_sampler=order,
            num_workers=self.num_workers,
            multiprocessing_context=worker_context(self.num_workers),
            collate_fn=as_read,
            pin_memory=pin,
        )
        for batch in loader:
            self.bad.update((source.name(i), reason) for i, reason in batch.bad)
            if len(batch.images):
                yield batch


def as_read(batch: Any) -> Any:
    """Collate function: `__getitems__` already returns a batch."""
    return batch
