"""Semantic segmentation with a linear head on frozen patch tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dino_lite.contracts import Backbone, Evaluation, UserError
from dino_lite.data.photometric import Normalize
from dino_lite.data.pixel_labels import MaskedImages, open_masks
from dino_lite.data.sources import expand
from dino_lite.data.subset import spread
from dino_lite.eval.features import check_finite, device_of, frozen
from dino_lite.eval.pictures_patches import segmentation_picture
from dino_lite.eval.results import resampled, result
from dino_lite.eval.segmenter import Pixels, Segmenter, draw_pixels, patch_features, train_heads
from dino_lite.eval.store import FeatureStore
from dino_lite.meter import metered
from dino_lite.settings.kinds import Count, NonNegative, PositiveNumbers, Size
from dino_lite.settings.validate import checked
from dino_lite.wording import count

_HELD_OUT = 5  # every fifth image is held out
_MOST_CLASSES = 256
_NUM_DRAWN = 4


class Scenes(NamedTuple):
    """Images for training the head and for testing it, and the class numbers that occur."""

    train: MaskedImages
    test: MaskedImages
    numbers: list[int]


class Segmentation(Evaluation):
    """Evaluation by mean IoU on images with masks at `root`, which are independent of the store's
    data.

    See `open_masks` for `root`. `ignore`: numbers in masks to treat as unlabeled; `classes`: names
    by number. `shorter`: images are resized so that their shorter side has this many pixels (None:
    no resizing). The head is trained on `num_pixels` pixels of train in total.
    """

    @checked
    def __init__(
        self,
        root: str | Path | None,
        ignore: int | Sequence[int] = 255,
        classes: Sequence[str] | None = None,
        shorter: Size | None = None,
        num_pixels: Size = 200_000,
        rates: PositiveNumbers = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        num_steps: Size = 2000,
        batch_size: Size = 2048,
        weight_decay: NonNegative = 1e-3,
        seed: Count = 0,
    ) -> None:
        if not root:
            raise UserError(
                "eval.segmentation.root is not set: name a folder with images/train, masks/train, "
                "images/val and masks/val."
            )
        self.root, self.classes, self.shorter = root, list(classes or []), shorter
        self.ignore = [ignore] if isinstance(ignore, int) else list(ignore)
        self.num_pixels, self.rates, self.seed = num_pixels, list(rates), seed
        self.num_steps, self.batch_size, self.weight_decay = num_steps, batch_size, weight_decay
        self._segmenters = WeakKeyDictionary[Backbone, Segmenter]()  # kept for `draw`

    def __call__(self, backbone: Backbone, store: FeatureStore) -> dict[str, Any]:
        """Mean IoU over the classes of the test masks, pixel accuracy, and IoU by class."""
        scenes, normalize = self.open(backbone.in_chans), store.data.normalize
        segmenter, rate = self.fit(backbone, normalize, scenes)
        self._segmenters[backbone] = segmenter
        confusions = self.confusions(backbone, normalize, segmenter, scenes)
        total = confusions.sum(dim=0).double()
        ious = 100 * iou(total)
        present = [i for i in range(len(ious)) if math.isfinite(ious[i])]
        return result(
            "mIoU",
            float(ious[present].mean()),
            protocol=self._protocol(len(present)),
            settings={"rate": rate, "steps": self.num_steps},
            num_train=len(scenes.train),
            num_test=len(scenes.test),
            interval=list(iou_interval(confusions, self.seed)),
            data=expand(self.root).name,  # not those of the store
            pixel_accuracy=float(100 * total.diagonal().sum() / total.sum()),
            table=[
                {
                    "class": self.name(scenes.numbers[i]),
                    "IoU %": float(ious[i]),
                    "pixels %": float(100 * total[i].sum() / total.sum()),
                }
                for i in present
            ],
        )

    def open(self, in_chans: int = 3) -> Scenes:
        """Images and masks; with one split, every fifth image is held out for testing."""
        train, test = open_masks(self.root, self.ignore, in_chans)
        if len(train) < (2 if test else 3):
            raise UserError(f"{expand(self.root)}: a head and its rate need more training images.")
        if test is None:
            train, test = _apart(train)
        learned = train.numbers()
        numbers = sorted({*learned, *test.numbers()})
        if len(learned) < 2 or len(numbers) > _MOST_CLASSES:
            raise UserError(
                f"{expand(self.root)}: the masks have {count(len(numbers), 'class')} (of train: "
                f"{len(learned)}), but 2 to {_MOST_CLASSES} are needed; check "
                f"eval.segmentation.ignore={self.ignore}."
            )
        return Scenes(train, test, numbers)

    def fit(
        self, backbone: Backbone, normalize: Normalize, scenes: Scenes
    ) -> tuple[Segmenter, float]:
        """The head and its rate: the best on every fifth training image, retrained on all."""
        numbers, num_pixels = scenes.numbers, self.num_pixels
        pixels = draw_pixels(
            backbone, scenes.train, numbers, normalize, num_pixels, self.shorter, self.seed
        )
        check_finite("segmentation", pixels.features)
        held = pixels.image % _HELD_OUT == min(_HELD_OUT, len(scenes.train)) - 1
        rate = self.rates[0]
        if len(self.rates) > 1:
            heads = self._train(pixels.rows(~held), len(numbers), self.rates, backbone)
            asked = pixels.rows(held)
            found = [_mean_iou(_asked(head, asked)) for head in heads]
            rate = self.rates[int(np.argmax(found))]
        return self._train(pixels, len(numbers), [rate], backbone)[0], rate

    def confusions(
        self, backbone: Backbone, normalize: Normalize, segmenter: Segmenter, scenes: Scenes
    ) -> Int[Tensor, "n C C"]:
        """Pixels of each test image by class (rows) and prediction (columns)."""
        found, num = [], len(scenes.test)
        with frozen(backbone):
            for i in metered(range(num), num, "test", "images"):
                image, classes = scenes.test.read(i)
                features = patch_features(backbone, image, normalize, self.shorter)
                predicted = segmenter.predict(features, classes.shape).cpu()
                truth = torch.from_numpy(_places(classes, scenes.numbers))
                known = truth >= 0
                found.append(confusion(truth[known], predicted[known], len(scenes.numbers)))
        return torch.stack(found)

    def draw(self, backbone: Backbone, store: FeatureStore, path: Path) -> None:
        """A few test images with their masks and predictions, by the head trained in `__call__`, or
        by a new one.
        """
        scenes, normalize = self.open(backbone.in_chans), store.data.normalize
        segmenter = self._segmenters.get(backbone)
        if segmenter is None:
            segmenter, _ = self.fit(backbone, normalize, scenes)
        some = scenes.test.part(spread(len(scenes.test), _NUM_DRAWN).tolist())
        images, truths, predictions = [], [], []
        with frozen(backbone):
            for i in range(len(some)):
                image, classes = some.read(i)
                features = patch_features(backbone, image, normalize, self.shorter)
                images.append(image)
                truths.append(_places(classes, scenes.numbers))
                predictions.append(segmenter.predict(features, classes.shape).cpu().numpy())
        names = [self.name(number) for number in scenes.numbers]
        segmentation_picture(images, truths, predictions, names, path)

    def name(self, number: int) -> str:
        """The name of class `number`."""
        return self.classes[number] if number < len(self.classes) else str(number)

    def _train(
        self, pixels: Pixels, num_classes: int, rates: Sequence[float], backbone: Backbone
    ) -> list[Segmenter]:
        sizes = (self.num_steps, self.batch_size, self.weight_decay)
        return train_heads(pixels, num_classes, rates, *sizes, device_of(backbone), self.seed)

    def _protocol(self, num_classes: int) -> str:
        size = "as they are" if self.shorter is None else f"of {self.shorter} px"
        return (
            f"linear head on the last block's patch tokens, bilinear to each pixel; images {size}, "
            f"learned from {self.num_pixels:,} pixels of train; AdamW, weight decay "
            f"{self.weight_decay:g}, rate chosen on every fifth image of train; mean over the "
            f"{num_classes} classes of the test masks, IoU of all test pixels"
        )


def confusion(
    truth: Int[Tensor, "n"], predicted: Int[Tensor, "n"], num_classes: int
) -> Int[Tensor, "C C"]:
    """Counts of true class r and predicted class c, at (r, c)."""
    both = truth * num_classes + predicted
    return torch.bincount(both, minlength=num_classes**2).reshape(num_classes, num_classes)


def iou(confusion: Float[Tensor, "*n C C"]) -> Float[Tensor, "*n C"]:
    """Intersection over union of each class; NaN, which the mean ignores, for a class without
    pixels: pixels wrongly predicted as it count against their true classes.
    """
    hits = confusion.diagonal(dim1=-2, dim2=-1)
    truth, predicted = confusion.sum(dim=-1), confusion.sum(dim=-2)
    return torch.where(truth > 0, hits / (truth + predicted - hits), torch.nan)


def iou_interval(confusions: Int[Tensor, "n C C"], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean IoU in percent, over 1,000 samples of images with
    replacement, whose confusion matrices are summed.

    The mean is always over the classes of the full set; a class absent from a sample keeps its IoU
    of all images there, since leaving it out would bias the mean.
    """
    flat = confusions.double().flatten(1)
    whole = iou(confusions.sum(dim=0).double())

    def mean(times: Float[Tensor, "m n"]) -> Float[Tensor, "m"]:
        found = iou((times @ flat).reshape(-1, *confusions.shape[1:]))
        return 100 * torch.where(found.isnan(), whole, found).nanmean(dim=1)

    return resampled(mean, len(confusions), seed)


def _places(classes: Int[np.ndarray, "H W"], numbers: Sequence[int]) -> Int[np.ndarray, "H W"]:
    """Class numbers as indices into a list of them; -1 stays."""
    return np.where(classes < 0, -1, np.searchsorted(numbers, classes))


def _mean_iou(confusion: Int[Tensor, "C C"]) -> float:
    return float(iou(confusion.double()).nanmean())


def _asked(head: Segmenter, pixels: Pixels) -> Int[Tensor, "C C"]:
    predicted = head.logits(pixels.features.to(head.weight.device)).argmax(dim=1).cpu()
    return confusion(pixels.classes, predicted, len(head.bias))


def _apart(images: MaskedImages) -> tuple[MaskedImages, MaskedImages]:
    """All but every fifth image (or the last of fewer), and these."""
    last = min(_HELD_OUT, len(images)) - 1
    rows = range(len(images))
    asked = [row for row in rows if row % _HELD_OUT == last]
    return images.part([row for row in rows if row % _HELD_OUT != last]), images.part(asked)
