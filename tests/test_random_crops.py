"""Random crops of images with labels: keyed, whole epochs, bad files left out."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from dino_lite.data import random_crops as module
from dino_lite.data.random_crops import RandomCrops, random_batches
from pooled import shades
from test_features import half_broken, images


def test_a_crop_depends_on_seed_epoch_and_image_alone() -> None:
    """Not on what else is in the batch."""
    source = images(6)
    crops = RandomCrops(source, 8, (0.2, 1.0), seed=0)
    both = crops.__getitems__([(0, 1), (3, 4)])
    assert both.images.shape == (2, 3, 8, 8)
    assert both.labels.tolist() == both.index.tolist() == [1, 4]
    assert torch.equal(crops.__getitems__([(3, 4)]).images[0], both.images[1])
    assert not torch.equal(crops.__getitems__([(2, 4)]).images[0], both.images[1])
    other = RandomCrops(source, 8, (0.2, 1.0), seed=1)
    assert not torch.equal(other.__getitems__([(3, 4)]).images[0], both.images[1])


def test_whole_images_are_mirrored_half_the_time() -> None:
    """At scale 1 nothing is cut out of a square."""
    source = images(2)
    crops = RandomCrops(source, 16, (1.0, 1.0), seed=0)
    own = source.images[0].permute(2, 0, 1)
    seen = {0: 0, 1: 0}
    for epoch in range(60):
        crop = crops.__getitems__([(epoch, 0)]).images[0]
        whole = [torch.equal(crop, own), torch.equal(crop, own.flip(2))]
        seen[0], seen[1] = seen[0] + whole[0], seen[1] + whole[1]
    assert min(seen.values()) >= 8


def test_epochs_are_shuffled_and_workers_change_nothing() -> None:
    """Each image once an epoch, but those that fill no batch; the global generator is left."""
    state = torch.random.get_rng_state()
    crops = RandomCrops(shades(10), 8, (0.5, 1.0), seed=0)
    batches = list(random_batches(crops, 4, 2, seed=0))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(batches) == 4
    assert len(set(torch.cat([b.index for b in batches[:2]]).tolist())) == 8
    assert batches[0].index.tolist() != batches[2].index.tolist()
    again = list(random_batches(crops, 4, 2, seed=0, num_workers=1))
    for one, two in zip(batches, again, strict=True):
        assert torch.equal(one.images, two.images)


def test_images_that_cannot_be_read_are_told() -> None:
    """A batch of them alone is empty."""
    crops = RandomCrops(images(6, half_broken), 8, (0.5, 1.0), seed=0)
    batch = crops.__getitems__([(0, 0), (0, 1)])
    assert batch.index.tolist() == [1]
    assert batch.bad == [(0, "truncated")]
    assert len(crops.__getitems__([(0, 3)]).images) == 0


def test_spawned_workers_can_load_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes a batch can be pickled."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "DataLoader", lambda *_, **kwargs: made.append(kwargs) or [])
    list(random_batches(RandomCrops(shades(4), 8, (0.5, 1.0), seed=0), 2, 1, seed=0))
    assert pickle.loads(pickle.dumps(made[0]["collate_fn"])) is made[0]["collate_fn"]
