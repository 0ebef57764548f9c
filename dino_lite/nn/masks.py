"""The masked patches of a batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dino_lite.contracts import Crops
from dino_lite.distributed import rank, world_size
from dino_lite.nn.masking import BlockMasking


class Masks(NamedTuple):
    """Masks of the G global crops of n images, and the M masked patches, image by image."""

    mask: Bool[Tensor, "G n P"]
    rows: Int[Tensor, "M"]  # indices into "G*n*P"
    bounds: tuple[int, ...]  # n+1: image i has the masked patches bounds[i] to bounds[i+1]
    weight: Float[Tensor, "M"]  # 1 / (masked patches of its crop) / (G·n)

    def part(self, start: int, stop: int) -> Masks:
        """Images start to stop (exclusive), their weights as in the whole batch."""
        first, last = self.bounds[start], self.bounds[stop]
        _, num_images, num_patches = self.mask.shape
        rows = self.rows[first:last]
        crop = rows // (num_images * num_patches)
        before = crop * (num_images - (stop - start)) + start  # omitted images before a row
        return Masks(
            self.mask[:, start:stop],
            rows - before * num_patches,
            tuple(bound - first for bound in self.bounds[start : stop + 1]),
            self.weight[first:last],
        )

    def select(self, patches: Float[Tensor, "_ P D"]) -> Float[Tensor, "M D"]:
        """The masked ones of the patches of all crops, which are crop-major: "G*n P D"."""
        return patches.flatten(0, 1)[self.rows]


def masks_of(mask: Bool[np.ndarray, "G n P"], like: Tensor) -> Masks:
    """`Masks` from masks on the host, on the device of `like`, with weights in its precision (at
    least float32). Does not synchronize.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    counts = mask.sum(-1).T  # n G
    image, crop, patch = np.nonzero(mask.transpose(1, 0, 2))
    rows = (crop * mask.shape[1] + image) * mask.shape[2] + patch
    bounds = (0, *np.cumsum(counts.sum(1)).tolist())
    weight = np.repeat(1.0 / np.maximum(counts, 1).ravel() / counts.size, counts.ravel())
    if wide != torch.float64:  # some devices do not support float64
        weight = weight.astype(np.float32)

    def send(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(like.device, non_blocking=True)

    return Masks(send(mask), send(rows), bounds, send(weight))


def draw_masks(masking: BlockMasking, crops: Crops, grid: tuple[int, int], step: int) -> Masks:
    """This rank's part of the masks of all ranks' global crops, which are those of a single-process
    run.
    """
    num_crops, num_images = crops.globals_.shape[:2]
    num_all, first = num_images * world_size(), num_images * rank()
    drawn = masking.draw(num_crops * num_all, grid, step)  # G*B rows columns
    drawn = drawn.reshape(num_crops, num_all, -1)
    return masks_of(drawn[:, first : first + num_images], crops.globals_)
