"""Masked patches as a list: order, weights, and parts of a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dino_lite.nn.masks import Masks, masks_of


def random_masks(num_images: int = 5, seed: int = 0) -> tuple[np.ndarray, Masks]:
    """Two crops of some images with six patches, one crop without a mask."""
    mask = np.random.default_rng(seed).random((2, num_images, 6)) < 0.4
    mask[0, 1] = False
    return mask, masks_of(mask, torch.zeros((), dtype=torch.float64))


def test_masked_patches_come_image_by_image() -> None:
    """Image, then crop, then patch, each with its share of its crop and of all crops."""
    mask, masks = random_masks()
    patches = torch.arange(2 * 5 * 6, dtype=torch.float64).view(10, 6, 1)
    wanted, weight = [], []
    for image in range(5):
        assert masks.bounds[image] == len(wanted)
        for crop in range(2):
            for patch in range(6):
                if mask[crop, image, patch]:
                    wanted.append((crop * 5 + image) * 6 + patch)
                    weight.append(1 / mask[crop, image].sum() / 10)
    assert masks.bounds[5] == len(wanted)
    assert masks.select(patches)[:, 0].tolist() == wanted
    assert masks.weight.tolist() == pytest.approx(weight, rel=1e-15)
    assert masks.weight.dtype == torch.float64
    assert torch.equal(masks.mask, torch.from_numpy(mask))


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (0, 2), (1, 2), (2, 5), (3, 3)])
def test_a_part_selects_the_same_patches_of_its_images(start: int, stop: int) -> None:
    """Of the crops of its images alone, with the weights of the whole batch."""
    _, masks = random_masks()
    patches = torch.randn(2, 5, 6, 3)
    whole, part = masks.select(patches.flatten(0, 1)), masks.part(start, stop)
    cut = slice(masks.bounds[start], masks.bounds[stop])
    assert torch.equal(part.select(patches[:, start:stop].flatten(0, 1)), whole[cut])
    assert torch.equal(part.weight, masks.weight[cut])
    assert part.bounds[0] == 0
    assert part.bounds[-1] == len(part.rows)
    assert torch.equal(part.mask, masks.mask[:, start:stop])


def test_parts_of_parts_are_parts() -> None:
    """Micro-batches of a rank's images of a batch."""
    _, masks = random_masks()
    once, twice = masks.part(2, 4), masks.part(1, 5).part(1, 3)
    assert once.bounds == twice.bounds
    assert torch.equal(once.rows, twice.rows)


def test_a_batch_without_masks_is_legal() -> None:
    """No rows, no weights, and nothing is divided by zero."""
    masks = masks_of(np.zeros((2, 3, 4), bool), torch.zeros(()))
    assert masks.bounds == (0, 0, 0, 0)
    assert masks.select(torch.zeros(6, 4, 2)).shape == (0, 2)
    assert masks.part(1, 2).weight.shape == (0,)
