"""Pictures of what a backbone has learned, by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dino_lite.contracts import Backbone, Source, Splits, UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.subset import Subset, spread
from dino_lite.distributed import alone, rank
from dino_lite.eval.features import Features, device_of, dtype_of
from dino_lite.eval.knn import knn_predict
from dino_lite.eval.pictures import attention_picture, neighbors_picture
from dino_lite.eval.pictures_classes import confusion_picture
from dino_lite.eval.pictures_map import map_picture
from dino_lite.eval.pictures_patches import pca_picture
from dino_lite.eval.segmentation import confusion
from dino_lite.eval.store import FeatureStore

Picture = Callable[[Backbone, FeatureStore, Path], None]

_PATCHES = 32  # per side, in the picture of components


def draw_all(
    backbone: Backbone,
    store: FeatureStore,
    folder: str | Path,
    pictures: Mapping[str, Picture] | None = None,
    say: Callable[[str], object] = lambda text: sys.stderr.write(f"{text}\n"),
) -> dict[str, Path]:
    """Draw `pictures` (default: all) as NAME.png into `folder`; returns the paths of those drawn.

    A failure skips only that picture; the exception's text, or else its type, is passed to `say`.
    """
    drawn = {}
    for name, picture in (PICTURES if pictures is None else pictures).items():
        path = Path(folder).expanduser() / f"{name}.png"
        try:
            picture(backbone, store, path)
        except Exception as error:  # a picture is never worth a run
            say(f"{path.name} was not drawn: {str(error) or type(error).__name__}")
            continue
        drawn[name] = path
    return drawn


def draw_on_all_ranks(
    backbone: Backbone,
    store: FeatureStore,
    folder: Path,
    pictures: Mapping[str, Picture],
    say: Callable[[str], object],
) -> dict[str, Path]:
    """`draw_all` on rank 0, once every rank has extracted its part of the features; the other
    ranks return nothing.
    """
    for source in store.data.splits[:2]:
        if source is not None:
            store.pooled(backbone, source)
    if rank() > 0:
        return {}
    with alone():
        return draw_all(backbone, store, folder, pictures, say)


def draw_attention(backbone: Backbone, store: FeatureStore, path: Path) -> None:
    """Attention maps of six images, at evaluation size."""
    images = some_images(backbone, store.data, 6, store.data.preprocessing)
    attention_picture(backbone, images, path, store.data.normalize)


def draw_components(backbone: Backbone, store: FeatureStore, path: Path) -> None:
    """Principal components of eight images with at least 32 patches per side."""
    data, least = store.data, _PATCHES * backbone.patch_size
    rows, columns = data.preprocessing.size
    large = data.preprocessing.at((max(rows, least), max(columns, least)))
    pca_picture(backbone, some_images(backbone, data, 8, large), path, data.normalize)


def draw_neighbors(backbone: Backbone, store: FeatureStore, path: Path) -> None:
    """Nearest neighbors of test images in train; with one split, within train."""
    bank, queries = _features(backbone, store)
    if len(bank.labels) < 2:
        raise UserError("one image has no neighbors.")
    neighbors_picture(bank, store.data, path, queries)


def draw_confusion(backbone: Backbone, store: FeatureStore, path: Path) -> None:
    """Confusion matrix of weighted k-NN, k = 20; with one split, by leave-one-out."""
    bank, queries = store.labeled(backbone, "a confusion matrix")
    known = bank.features().labeled()
    asked = known if queries is None else queries.features().labeled()
    k = min(20, len(known.labels) - (queries is None))
    found = knn_predict(asked, known, k, leave_one_out=queries is None, device=device_of(backbone))
    classes = store.data.splits.train.classes
    counts = confusion(asked.labels, found, len(classes))
    confusion_picture(counts, classes, path, f"k-NN, k={k}")


def draw_map(backbone: Backbone, store: FeatureStore, path: Path) -> None:
    """Map of the test images; with one split, of train."""
    bank, queries = _features(backbone, store)
    splits = store.data.splits
    if queries is None or splits.test is None:
        map_picture(bank, splits.train, path)
    else:
        map_picture(queries, splits.test, path)


def some_images(
    backbone: Backbone, data: CleanData, num: int, preprocessing: Preprocessing
) -> Float[Tensor, "n C H W"]:
    """Evenly spread images of test (with one split, of train), normalized."""
    source = asked(data.splits)
    part = Subset(source, spread(len(source), num))
    few = CleanData(Splits(part, None, data.splits.name), preprocessing, num)
    device = device_of(backbone)
    images = [images for images, _ in few.batches(part, device, dtype_of(backbone))]
    if not images:
        raise UserError("none of the chosen images can be read.")
    return torch.cat(images)


def asked(splits: Splits) -> Source:
    """The split of the queries: test, or else train."""
    return splits.train if splits.test is None else splits.test


def _features(backbone: Backbone, store: FeatureStore) -> tuple[Features, Features | None]:
    train, test = store.data.splits.train, store.data.splits.test
    bank = store.pooled(backbone, train).features()
    return bank, None if test is None else store.pooled(backbone, test).features()


QUICK: dict[str, Picture] = {  # these take seconds once features are extracted
    "attention": draw_attention,
    "pca": draw_components,
    "neighbors": draw_neighbors,
}
PICTURES: dict[str, Picture] = QUICK | {"confusion": draw_confusion, "map": draw_map}
