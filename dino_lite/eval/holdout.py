"""Splits of labeled data: for training, model selection and testing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from dino_lite.contracts import Backbone, UserError
from dino_lite.data.subset import hold_out
from dino_lite.eval.features import Pooled, check_finite
from dino_lite.eval.store import FeatureStore

TEST_SHARE = 0.2  # of train, if there is no labeled test split
CHOICE_SHARE = (
    0.1  # of the training images, to choose hyperparameters (DINOv2, for logistic regression)
)

OUT_OF_TRAIN = "held out of train (no test split has labels)"  # origin of such a test split


class Task(NamedTuple):
    """Labeled features for training and testing; labels are 0 … num_classes-1 in both."""

    train: Pooled
    test: Pooled
    num_classes: int
    images: str  # their origin, in words


def classification(backbone: Backbone, store: FeatureStore, what: str, num_blocks: int = 1) -> Task:
    """The labeled images of train and test; if test has no labels, a fifth of train is held out.

    Raises UserError, naming `what`, if there is nothing to train or test on.
    """
    train, test = store.labeled(backbone, what, num_blocks)
    train = train.rows(train.labels >= 0)
    if test is None:
        kept, held = hold_out(train.labels, TEST_SHARE, seed=0)
        train, test = train.rows(kept), train.rows(held)
        source = OUT_OF_TRAIN
    else:
        test = test.rows(test.labels >= 0)
        source = "of test"
    check_classes(what, train.labels, test.labels)
    check_finite(what, train.cls, train.patches, test.cls, test.patches)
    classes, numbers = torch.unique(torch.cat([train.labels, test.labels]), return_inverse=True)
    own, asked = numbers.split([len(train.labels), len(test.labels)])
    images = f"{len(own):,} images of train, tested on {len(asked):,} {source}"
    return Task(train._replace(labels=own), test._replace(labels=asked), len(classes), images)


def check_classes(what: str, train: Int[Tensor, "N"], test: Int[Tensor, "n"]) -> None:
    """Raise UserError unless train has two classes and test an image."""
    if len(torch.unique(train)) < 2 or not len(test):
        raise UserError(
            f"{what} needs labeled training images of at least 2 classes and a labeled image to "
            "test on; see data.labels."
        )


def chooser(
    what: str, labels: Int[Tensor, "N"], seed: int
) -> tuple[Int[Tensor, "K"], Int[Tensor, "H"]]:
    """As `hold_out`, a tenth, to choose hyperparameters."""
    kept, held = hold_out(labels, CHOICE_SHARE, seed)
    if not len(held):
        raise UserError(
            f"{what} needs a class with two labeled training images, one of them to choose its "
            "settings by; see data.labels."
        )
    return kept, held
