"""Features that are as good as wanted, and images of a few shades, for evaluations of labels."""

from __future__ import annotations

import numpy as np
import torch

from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Splits
from dino_lite.data.clean import CleanData
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.sources import ArraySource
from dino_lite.eval.features import Pooled
from dino_lite.eval.holdout import Task
from dino_lite.eval.store import FeatureStore


def draw_pooled(
    num: int,
    num_classes: int = 3,
    noise: float = 0.3,
    seed: int = 0,
    num_blocks: int = 4,
    dim: int = 5,
) -> Pooled:
    """Each class around a point of its own, the same for every seed."""
    centers = torch.randn(num_classes, num_blocks + 1, dim, generator=generator(99))
    labels = torch.arange(num) % num_classes
    tokens = centers[labels] + noise * torch.randn(
        num, num_blocks + 1, dim, generator=generator(seed)
    )
    return Pooled(tokens[:, :-1], tokens[:, -1], labels, torch.arange(num))


def draw_task(num_train: int, num_test: int, num_classes: int = 3, noise: float = 0.3) -> Task:
    """Train and test of the same classes."""
    train = draw_pooled(num_train, num_classes, noise, seed=0)
    return Task(train, draw_pooled(num_test, num_classes, noise, seed=1), num_classes, "drawn")


def generator(seed: int) -> torch.Generator:
    """A fresh one."""
    return torch.Generator().manual_seed(seed)


def shades(num: int, labels: list[int] | None = None, side: int = 16, seed: int = 0) -> ArraySource:
    """Dark images of class 0, gray ones of class 1, bright ones of class 2, in turn."""
    own = np.arange(num) % 3 if labels is None else np.array(labels)
    noise = np.random.default_rng(seed).integers(0, 50, (num, side, side, 3))
    pixels = noise + 100 * (np.arange(num) % 3)[:, None, None, None]
    images = torch.from_numpy(pixels.astype(np.uint8))
    return ArraySource(images, own, ["dark", "gray", "bright"], f"shades{seed}")


def store_of(train: ArraySource, test: ArraySource | None = None) -> FeatureStore:
    """Features of them, in memory."""
    return FeatureStore(
        CleanData(Splits(train, test, "shades"), Preprocessing((16, 16)), batch_size=8)
    )


def small_vit(**changes: float) -> ViT:
    """Two blocks of 16."""
    return ViT(image_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, **changes)
