"""Features come in order, from a network that is left as it was found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Source, Splits, UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.sources import ArraySource
from dino_lite.eval.features import extract
from images import Broken
from tiny import pixel_features

CPU = torch.device("cpu")


def half_broken(*args: Any) -> Broken:
    """Images in memory of which every third cannot be read."""
    return Broken(ArraySource(*args), lambda index: index % 3 == 0)


def images(num: int, kind: Callable[..., Any] = ArraySource, side: int = 16) -> Any:
    pixels = torch.randint(256, (num, side, side, 3), dtype=torch.uint8)
    return kind(pixels, np.arange(num), [str(i) for i in range(num)], f"set{num}")


def data_of(train: Source, test: Source | None = None, size: int = 16) -> CleanData:
    return CleanData(Splits(train, test, "set"), Preprocessing((size, size)), batch_size=4)


def vit(**kwargs: float) -> ViT:
    return ViT(image_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, **kwargs)


def test_features_are_those_of_each_image_alone() -> None:
    """Batches, the last of them smaller, change neither order nor values."""
    data, backbone = data_of(images(10)), vit().eval()
    found = extract(backbone, data, data.splits.train, CPU)
    pixels = data.splits.train.images.permute(0, 3, 1, 2)
    with torch.no_grad():
        alone = torch.cat([backbone(data.normalize(image[None])).cls for image in pixels])
    torch.testing.assert_close(found.features, alone)
    assert found.labels.tolist() == list(range(10))


def test_nothing_random_happens_and_modes_come_back() -> None:
    """A network in training mode with drop path gives its evaluation features, and stays so."""
    data, backbone = data_of(images(6)), vit(drop_path=0.9).train()
    backbone.blocks[0].eval()  # a mixed state is restored as such
    before = {name: part.training for name, part in backbone.named_modules()}
    first = extract(backbone, data, data.splits.train, CPU)
    second = extract(backbone, data, data.splits.train, CPU)
    assert torch.equal(first.features, second.features)
    assert {name: part.training for name, part in backbone.named_modules()} == before
    assert not first.features.requires_grad


def test_modes_come_back_after_an_error() -> None:
    """A run that goes on after a failed evaluation still trains with drop path."""
    data, backbone = data_of(images(6), size=15), vit().train()
    with pytest.raises(UserError, match="patches"):
        extract(backbone, data, data.splits.train, CPU)
    assert all(part.training for part in backbone.modules())


def test_features_of_a_float64_network_are_float32() -> None:
    """The images follow the network's precision, the features do not."""
    data, backbone = data_of(images(4)), vit().double()
    assert extract(backbone, data, data.splits.train, CPU).features.dtype == torch.float32


def test_unreadable_images_are_left_out_with_their_labels() -> None:
    """What could not be read takes no part, and rows stay beside their labels."""
    data = data_of(images(9, half_broken))
    found = extract(vit(), data, data.splits.train, CPU)
    assert found.labels.tolist() == [1, 2, 4, 5, 7, 8]
    assert len(found.features) == 6


def test_no_readable_image_is_a_sentence() -> None:
    """An evaluation of nothing is refused."""
    data = data_of(images(1, half_broken))
    with pytest.raises(UserError, match="no image it could read"):
        extract(vit(), data, data.splits.train, CPU)


def test_pixel_features_are_pixels_less_the_mean_of_train() -> None:
    """Train's mean image is taken from test too; Normalize leaves no trace."""
    data = data_of(images(5, side=32), images(3, side=32), size=32)
    train, test = pixel_features(data)
    pixels = [part.images.permute(0, 3, 1, 2).double() / 255 for part in data.splits[:2]]
    mean = pixels[0].mean(dim=0)
    assert test is not None
    for found, raw in zip((train, test), pixels, strict=True):
        torch.testing.assert_close(
            found.features.double(), (raw - mean).flatten(1), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("side", [16, 80])
def test_pixel_features_have_one_size(side: int) -> None:
    """Images of any size become 32x32 pixels, smoothed on the way down."""
    data = data_of(images(4, side=side), size=side)
    train, test = pixel_features(data)
    assert train.features.shape == (4, 3 * 32 * 32)
    assert test is None
    if side > 32:  # noise averages out; picking pixels would leave its spread as it was
        assert train.features.std() < 0.7 * pixel_features(data, size=side)[0].features.std()
