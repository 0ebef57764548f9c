"""Features of a whole source of images, in order: what every evaluation starts from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dino_lite.contracts import Backbone, Source, UserError
from dino_lite.data.clean import CleanData


class Features(NamedTuple):
    """A row for each image in the source's order, float32 on the host; label -1: there is none."""

    features: Float[Tensor, "N D"]
    labels: Int[Tensor, "N"]

    @property
    def num_classes(self) -> int:
        """How many different labels there are; none is one of them."""
        return len(set(self.labels.tolist()))

    def labeled(self) -> Features:
        """The rows that have a label."""
        known = self.labels >= 0
        return self if bool(known.all()) else Features(self.features[known], self.labels[known])


def extract(backbone: Backbone, data: CleanData, source: Source, device: torch.device) -> Features:
    """CLS features of every image of `source`, without gradient, dropout or drop path."""
    rows, labels = [], []
    dtype = dtype_of(backbone)
    with frozen(backbone):
        for images, image_labels in data.batches(source, device, dtype):
            rows.append(backbone(images).cls.float().cpu())
            labels.append(image_labels.cpu())
    return _join(rows, labels)


def pixel_features(data: CleanData, size: int = 32) -> tuple[Features, Features | None]:
    """What needs no learning: pixels of train and test at size x size, less train's mean image."""
    splits = data.splits
    train = _pixels(data, splits.train, size)
    mean = train.features.mean(dim=0)
    train = train._replace(features=train.features - mean)
    if splits.test is None:
        return train, None
    test = _pixels(data, splits.test, size)
    return train, test._replace(features=test.features - mean)


@contextmanager
def frozen(backbone: Backbone) -> Iterator[None]:
    """The backbone in eval mode, nothing recorded; each module gets its own mode back."""
    modes = [(module, module.training) for module in cast(nn.Module, backbone).modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def dtype_of(backbone: Backbone) -> torch.dtype:
    """What the backbone's weights are held in, and its images must be."""
    return next(cast(nn.Module, backbone).parameters()).dtype


def device_of(backbone: Backbone) -> torch.device:
    """Where the backbone lives."""
    return next(cast(nn.Module, backbone).parameters()).device


def _pixels(data: CleanData, source: Source, size: int) -> Features:
    rows, labels = [], []
    # The mean image takes Normalize's mean away again; its scale per channel has to be undone here.
    scale = data.normalize.std.float().cpu().reshape(1, -1, 1, 1)
    for images, image_labels in data.batches(source, torch.device("cpu"), torch.float32):
        small = F.interpolate(images * scale, size=(size, size), mode="bilinear", antialias=True)
        rows.append(small.flatten(1))
        labels.append(image_labels.cpu())
    return _join(rows, labels)


def _join(rows: list[Tensor], labels: list[Tensor]) -> Features:
    if not rows:
        raise UserError("The evaluation found no image it could read; check data.root.")
    return Features(torch.cat(rows), torch.cat(labels))
