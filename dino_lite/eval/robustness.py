"""k-NN accuracy on corrupted test images, with a clean bank.

After Hendrycks and Dietterich 2019, with four corruptions that need no further library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dino_lite.contracts import Backbone, Evaluation, Source, UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.subset import Subset, spread
from dino_lite.draws import uniforms
from dino_lite.eval.features import Features, device_of, dtype_of, frozen
from dino_lite.eval.knn import knn_predict
from dino_lite.eval.results import percent, result
from dino_lite.eval.store import FeatureStore
from dino_lite.settings.kinds import Positive, Size
from dino_lite.settings.validate import checked

Images = Float[Tensor, "n C H W"]  # from 0 (black) to 1
Corruption = Callable[[Images, Int[np.ndarray, "n"], float], Images]

_HELD_OUT = 5  # with one split, every fifth image is a query
_SEVERITIES = ("mild", "medium", "strong")


def blur(images: Images, numbers: Int[np.ndarray, "n"], share: float) -> Images:
    """Gaussian blur with a standard deviation of `share` of the shorter side."""
    for axis in (2, 3):
        images = _blurred(images, share * min(images.shape[2:]), axis)
    return images


def noise(images: Images, numbers: Int[np.ndarray, "n"], std: float) -> Images:
    """Gaussian noise, different for each image index."""
    drawn = []
    for number in numbers.tolist():
        generator = torch.Generator().manual_seed(int(number))
        drawn.append(torch.randn(images.shape[1:], generator=generator))
    return (images + std * torch.stack(drawn).to(images)).clamp(0, 1)


def crop(images: Images, numbers: Int[np.ndarray, "n"], side: float) -> Images:
    """A crop with sides of `side` of the image's, at a random position per image, resized to full
    size.
    """
    place = torch.from_numpy(uniforms(0, 0, numbers, 2)).to(images)
    theta = images.new_zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = (2 * place - 1) * (1 - side)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def color(images: Images, numbers: Int[np.ndarray, "n"], strength: float) -> Images:
    """Multiply each channel by a random factor from exp(-strength) to exp(strength)."""
    drawn = uniforms(0, 1, numbers, images.shape[1])
    factors = torch.from_numpy(2 * drawn - 1).to(images).mul(strength).exp()
    return (images * factors[:, :, None, None]).clamp(0, 1)


CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, float, float], str]] = {
    "blur": (blur, (0.015, 0.03, 0.06), "deviation, of the side"),
    "noise": (noise, (0.05, 0.1, 0.2), "deviation, white is 1"),
    "crop": (crop, (0.8, 0.6, 0.4), "sides that are left"),
    "color": (color, (0.25, 0.5, 1.0), "log of the factor by channel, at most"),
}


class Robustness(Evaluation):
    """Evaluation by weighted k-NN: mean accuracy over four corruptions of test images at three
    severities each, compared with the same images clean.

    `max_images`: at most this many test images are used, evenly spread.
    """

    @checked
    def __init__(self, k: Size = 20, temperature: Positive = 0.07, max_images: Size = 1000) -> None:
        self.k, self.temperature, self.max_images = k, temperature, max_images

    def __call__(self, backbone: Backbone, store: FeatureStore) -> dict[str, Any]:
        """The mean accuracy under corruption, `clean`, `drop`, and a row per corruption."""
        bank, source, rows, whence = self._parts(backbone, store)
        data, k = store.data, min(self.k, len(bank.labels))

        def hits(corruption: Corruption | None = None, strength: float = 0.0) -> Tensor:
            found = corrupted(backbone, data, source, rows, corruption, strength)
            found = found.labeled()
            if not len(found.labels):
                raise UserError("robustness found no labeled test image; see data.labels.")
            device = device_of(backbone)
            told = knn_predict(found, bank, k, self.temperature, device=device)
            return percent(told == found.labels)

        clean = hits()
        table = [_record("none", "", [float(clean.mean())] * 3, float(clean.mean()))]
        scores = []
        for name, (corruption, strengths, what) in CORRUPTIONS.items():
            found = [hits(corruption, strength) for strength in strengths]
            values = [float(score.mean()) for score in found]
            told = f"{', '.join(f'{strength:g}' for strength in strengths)}: {what}"
            table.append(_record(name, told, values, float(clean.mean())))
            scores += found
        mean = torch.stack(scores).mean(dim=0)
        return result(
            "k-NN top-1 under corruption",
            float(mean.mean()),
            protocol=(
                f"weighted k-NN, k={k}, T={self.temperature:g}, bank = train, clean "
                f"({len(bank.labels)} images), queries = {whence} ({len(clean)} images), "
                "corrupted; mean over 4 corruptions in 3 severities"
            ),
            settings={"k": k, "temperature": self.temperature},
            num_train=len(bank.labels),
            num_test=len(clean),
            scores=mean,
            clean=float(clean.mean()),
            drop=float(clean.mean() - mean.mean()),
            table=table,
        )

    def _parts(
        self, backbone: Backbone, store: FeatureStore
    ) -> tuple[Features, Source, Int[np.ndarray, "n"], str]:
        """The clean bank; the source and rows of the queries, and their description."""
        pooled, _ = store.labeled(backbone, "robustness")
        bank, (train, test) = pooled.features().labeled(), store.data.splits[:2]
        if test is not None and test.labels is not None:
            source, rows, whence = test, spread(len(test), self.max_images), "test"
        else:
            source, whence = train, "every fifth image of train, not in the bank"
            rows = np.arange(_HELD_OUT - 1, len(train), _HELD_OUT)
            bank = bank.rows(~torch.isin(bank.places, torch.from_numpy(rows)))
            rows = rows[spread(len(rows), self.max_images)]
        if bank.num_classes < 2 or not len(rows):
            raise UserError(
                "robustness needs labeled training images of at least 2 classes, and queries."
            )
        return bank, source, rows, whence


def corrupted(
    backbone: Backbone,
    data: CleanData,
    source: Source,
    rows: Int[np.ndarray, "n"],
    corruption: Corruption | None,
    strength: float,
) -> Features:
    """Features of images at `rows` of a source, each corrupted depending on its index."""
    normalize, device, dtype = data.normalize, device_of(backbone), dtype_of(backbone)
    features, labels = [], []
    with frozen(backbone):
        for images, image_labels, index in data.indexed(Subset(source, rows), device):
            if corruption is not None:
                shape = (-1, 1, 1)
                std = normalize.std.to(images).reshape(shape)
                mean = normalize.mean.to(images).reshape(shape)
                pixels = (images * std + mean).clamp(0, 1)
                images = (corruption(pixels, rows[index.numpy()], strength) - mean) / std
            features.append(backbone(images.to(dtype), cls_only=True).cls.float().cpu())
            labels.append(image_labels.cpu())
    if not features:
        raise UserError("robustness found no image it could read; check data.root.")
    return Features(torch.cat(features), torch.cat(labels))


def _record(name: str, told: str, values: Sequence[float], clean: float) -> dict[str, Any]:
    """A row of the table."""
    named = dict(zip(_SEVERITIES, values, strict=True))
    return {"corruption": name, **named, "drop": clean - sum(values) / len(values), "of": told}


def _blurred(images: Images, sigma: float, axis: int) -> Images:
    """Blur along one axis, with repeated edge pixels."""
    reach = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = (-0.5 * (offsets / max(sigma, 1e-6)) ** 2).exp()
    kernel = kernel / kernel.sum()
    width = images.shape[axis]
    places = torch.arange(width, device=images.device)
    found = torch.zeros_like(images)
    for offset, weight in zip(range(-reach, reach + 1), kernel, strict=True):
        found += weight * images.index_select(axis, (places + offset).clamp(0, width - 1))
    return found
