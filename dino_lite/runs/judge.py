"""How good the features of several networks are on one collection, measured on the same images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dino_lite.callbacks.online_eval import in_memory
from dino_lite.contracts import Backbone, Source, Splits
from dino_lite.data.clean import CleanData
from dino_lite.data.order import permutation
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.stage_data import HELD_OUT, Halves, halves
from dino_lite.data.subset import Subset, spread
from dino_lite.eval.features import Features, check_finite, device_of, dtype_of, extract
from dino_lite.eval.knn import knn_answers
from dino_lite.eval.neighbors import indices_of_nearest
from dino_lite.eval.results import percent
from dino_lite.eval.tradeoff import agreement

K, _TEMPERATURE = 20, 0.07  # as the headline of `eval.knn`
_BATCH_SIZE = 256
_MOST_BYTES = 2**30  # of the decoded images of a part
_MOST_ESTIMATED = 10_000  # images for statistics of batch normalization


class Judged(NamedTuple):
    """Features of the two halves of train, from one network."""

    bank: Features
    held: Features


class Judge:
    """Scores of networks on one collection, in percent, one for each image held out of train.

    With labels: whether weighted k-NN (k = 20) in the rest of train classifies it rightly. Without:
    how many of its 20 nearest neighbors there are also those of the start. At most `most` images
    of train are used. Each part is decoded once if it fits in memory.
    """

    def __init__(
        self, splits: Splits, how: Preprocessing, seed: int, most: int, num_workers: int = 0
    ) -> None:
        self.splits = splits
        self.data = CleanData(splits, how, _BATCH_SIZE, num_workers)
        parts = halves(splits.train, seed)
        self.labeled = parts is not None
        few = _few(parts or _any_halves(len(splits.train), seed), most)
        self.bank, self.held = (self._part(splits.train, rows) for rows in few)
        self.test: Source | None = None
        labels = None if splits.test is None else splits.test.labels
        if self.labeled and splits.test is not None and labels is not None:
            known = np.flatnonzero(labels >= 0)
            self.test = self._part(splits.test, known) if len(known) else None

    @property
    def metric(self) -> str:
        """What the scores measure."""
        return (
            f"k-NN top-1 (k={K})" if self.labeled else f"agreement of {K} neighbors with the start"
        )

    @property
    def judged_on(self) -> str:
        """The images of the last table."""
        return "images held out of train" if self.test is None else "test images"

    def features(self, network: Backbone) -> Judged:
        """Features of both halves."""
        return Judged(*(self._extract(network, part) for part in (self.bank, self.held)))

    def scores(self, judged: Judged, of_start: Judged) -> Float[Tensor, "n"]:
        """The score of each image that is held out."""
        if self.labeled:
            return _right(judged.held, judged.bank)
        return agreement(*(_neighbors(each.held, each.bank) for each in (judged, of_start)))

    def test_scores(
        self, network: Backbone, judged: Judged, of_start: Judged
    ) -> Float[Tensor, "n"]:
        """The score of each test image with all of train, if they have labels; else `scores`."""
        if self.test is None:
            return self.scores(judged, of_start)
        both = zip(judged.bank[:2], judged.held[:2], strict=True)
        bank = Features(*(torch.cat(parts) for parts in both))
        return _right(self._extract(network, self.test), bank)

    def batches(self, network: Backbone, seed: int) -> Iterator[Float[Tensor, "n C H W"]]:
        """Images of the bank for `network`, at most 10,000, in random batches of about 256."""
        device, dtype = device_of(network), dtype_of(network)
        rows = permutation(seed, 0, len(self.bank))[:_MOST_ESTIMATED]
        order = np.array_split(rows, math.ceil(len(rows) / _BATCH_SIZE))
        lists = [part.tolist() for part in order]
        for images, _, _ in self.data.indexed(self.bank, device, dtype, lists):
            yield images

    def _part(self, source: Source, rows: np.ndarray) -> Source:
        how = self.data.preprocessing
        part = Subset(source, rows)
        fits = len(part) * len(how.mean) * math.prod(how.size) <= _MOST_BYTES
        return in_memory(part, self.data) if fits and how.rule == "dino_lite" else part

    def _extract(self, network: Backbone, part: Source) -> Features:
        found = extract(network, self.data, part, device_of(network), "features")
        check_finite("adapt", found.features)
        return found


def _any_halves(num: int, seed: int) -> Halves:
    """A tenth of all images, at least one, and the others (of a single image, the same)."""
    order = permutation(seed, 0, num)
    held = max(1, round(HELD_OUT * num))
    return Halves(np.sort(order[held:] if num > 1 else order), np.sort(order[:held]))


def _few(parts: Halves, most: int) -> Halves:
    """At most `most` images, in the same proportion."""
    held = max(1, round(HELD_OUT * most))
    limits = (max(1, most - held), held)
    pairs = zip(parts, limits, strict=True)
    return Halves(*(rows[spread(len(rows), limit)] for rows, limit in pairs))


def _right(queries: Features, bank: Features) -> Float[Tensor, "n"]:
    """100 for each query that its neighbors classify rightly, else 0."""
    k = min(K, len(bank.labels))
    return percent(knn_answers(queries, bank, [k], _TEMPERATURE)[k].correct())


def _neighbors(queries: Features, bank: Features) -> Int[Tensor, "n k"]:
    """Indices of the nearest neighbors in the bank."""
    return indices_of_nearest(queries.features, bank.features, min(K, len(bank.labels)))
