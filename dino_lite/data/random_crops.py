"""One random, possibly mirrored crop of each image, for supervised training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dino_lite.contracts import Source
from dino_lite.data.clean import Batch, as_read
from dino_lite.data.crops import MultiCrop, Photometric
from dino_lite.data.resample import resized_crop
from dino_lite.data.sources import reason
from dino_lite.data.workers import worker_context

_MIRRORED = Photometric(jitter_prob=0.0, gray_prob=0.0, blur_prob=0.0)
Key = tuple[int, int]  # epoch, index of the image


class RandomCrops(Dataset[Batch]):
    """Random crops with an area in `scale` of the image's, resized to size x size pixels.

    Keyed by (seed, epoch, index), so that the number of workers does not matter. Unreadable images
    are skipped.
    """

    def __init__(self, source: Source, size: int, scale: Sequence[float], seed: int) -> None:
        self.source = source
        self.crops = MultiCrop(
            size, size, 0, global_scale=scale, global_1=_MIRRORED, global_2=_MIRRORED, seed=seed
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        size, pixels, labels, read, bad = self.crops.global_size, [], [], [], []
        self.source.prefetch([index for _, index in keys])
        for epoch, index in keys:
            try:
                image = self.source.read(index)
            except (OSError, ValueError) as error:
                bad.append((index, reason(error)))
                continue
            drawn = self.crops.draw(
                *(np.array([value]) for value in (epoch, index, *image.shape[:2]))
            )
            crop = resized_crop(image, drawn.boxes[0, 0].tolist(), size)
            pixels.append(crop[:, ::-1] if drawn.params[0, 0, 0] else crop)  # COLUMNS: flip
            labels.append(-1 if self.source.labels is None else int(self.source.labels[index]))
            read.append(index)
        stacked = np.stack(pixels) if pixels else np.empty((0, size, size, 1), np.uint8)
        rows = torch.tensor([labels, read], dtype=torch.int64)
        return Batch(torch.from_numpy(stacked).permute(0, 3, 1, 2), rows[0], rows[1], bad)


def random_batches(
    crops: RandomCrops, batch_size: int, num_epochs: int, seed: int, num_workers: int = 0
) -> Iterator[Batch]:
    """Shuffled epochs of random crops; an incomplete last batch of an epoch is dropped."""
    generator = torch.Generator().manual_seed(seed)
    keys: list[list[Key]] = []
    for epoch in range(num_epochs):
        order = torch.randperm(len(crops), generator=generator).tolist()
        for start in range(0, len(order) - batch_size + 1, batch_size):
            keys.append([(epoch, index) for index in order[start : start + batch_size]])
    loader = DataLoader(
        crops,
        batch_sampler=keys,
        num_workers=num_workers,
        multiprocessing_context=worker_context(num_workers),
        collate_fn=as_read,
        generator=generator,  # otherwise it would draw from the global generator
    )
    yield from loader
