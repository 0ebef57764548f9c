"""k-NN with a few labeled images per class, averaged over random draws."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dino_lite.contracts import Backbone, Evaluation, UserError
from dino_lite.eval.features import Features, check_finite, device_of
from dino_lite.eval.knn import knn_answers
from dino_lite.eval.results import percent, reduced, result
from dino_lite.eval.store import FeatureStore
from dino_lite.meter import metered
from dino_lite.settings.kinds import Positive, Size, Sizes
from dino_lite.settings.validate import checked


class Tries(NamedTuple):
    """Results of several banks of n images per class: percent correct in each try, and for each
    query its mean over the tries that included it.
    """

    k: int
    num_train: int
    top1: Float[Tensor, "tries"]
    scores: Float[Tensor, "n"]

    def std(self) -> float:
        """Standard deviation over the tries; 0 for a single one."""
        return float(self.top1.std()) if len(self.top1) > 1 else 0.0


class FewShot(Evaluation):
    """Evaluation by k-NN: test images against n of train per class, for each n of `nums`; with one
    split the queries are the images that were not drawn. Try t draws from seed t, as DINOv2's k-NN
    does. Of a class with fewer images all are drawn, which a note says.
    """

    @checked
    def __init__(
        self,
        nums: Sizes = (1, 5, 10, 20),
        num_tries: Size = 5,
        k: Size = 20,
        temperature: Positive = 0.07,
    ) -> None:
        self.nums, self.num_tries = sorted(set(nums)), num_tries
        self.k, self.temperature = k, temperature

    def __call__(self, backbone: Backbone, store: FeatureStore) -> dict[str, Any]:
        """Top-1 for each number of images per class; the headline is that of the largest."""
        train, test = store.labeled(backbone, "Few-shot k-NN")
        asked = None if test is None else test.features()
        return self.score(train.features(), asked, device_of(backbone))

    def score(
        self, train: Features, test: Features | None, device: torch.device | None = None
    ) -> dict[str, Any]:
        """As `__call__`, from features."""
        train, test = train.labeled(), None if test is None else test.labeled()
        if train.num_classes < 2:
            raise UserError("Few-shot k-NN needs labeled training images of at least 2 classes.")
        if test is not None and len(test.labels) == 0:
            raise UserError("Few-shot k-NN found no labeled test image; see data.labels.")
        for part in (train, test):
            if part is not None:
                check_finite("Few-shot k-NN", part.features)
        nums, notes = self._numbers(train.labels, test is None)
        found = {num: self._tries(train, test, num, device) for num in nums}
        most = found[nums[-1]]
        whom = "the training images left over" if test is None else f"test ({len(test.labels)})"
        return result(
            "few-shot k-NN top-1",
            float(most.top1.mean()),
            protocol=(
                f"weighted k-NN, cosine, T={self.temperature:g}, CLS features, bank = n images "
                f"per class of train, drawn {self.num_tries} times, queries = {whom}; the "
                "interval is over queries, ± std over draws"
            ),
            settings={"n": nums[-1], "tries": self.num_tries, "k": most.k},
            num_train=most.num_train,
            num_test=len(most.scores),
            scores=most.scores,
            notes=notes,
            temperature=self.temperature,
            table=[
                {
                    "images a class": num,
                    "in all": tries.num_train,
                    "k": tries.k,
                    "top-1 %": float(tries.top1.mean()),
                    "± std": tries.std(),
                }
                for num, tries in found.items()
            ],
        )

    def _numbers(self, labels: Int[Tensor, "N"], one_split: bool) -> tuple[list[int], list[str]]:
        """The numbers of images per class that the largest class allows, and notes where a class
        gives fewer than asked for. With one split, that class keeps an image as a query.
        """
        counts = torch.unique(labels, return_counts=True)[1]
        most = int(counts.max()) - one_split
        if most < 1:
            raise UserError(
                "Few-shot k-NN finds one image per class, which leaves no query: add images, or a "
                "test split."
            )
        why = "less a query of the largest class" if one_split else "the size of the largest class"
        nums = sorted({min(num, most) for num in self.nums})
        few = {num: int((counts < num).sum()) for num in nums}
        rest = " and none is a query" if one_split else ""
        return nums, reduced("n", self.nums, most, why) + [
            f"n={num}: {few[num]:,} of {len(counts):,} classes have fewer; all their images were "
            f"used{rest}"
            for num in nums
            if few[num]
        ]

    def _tries(
        self, train: Features, test: Features | None, num: int, device: torch.device | None
    ) -> Tries:
        num_rows = len(train.labels if test is None else test.labels)
        right, times = torch.zeros(2, num_rows, dtype=torch.float64)
        top1, k, num_drawn = [], self.k, 0
        tries = range(self.num_tries)
        for seed in metered(tries, self.num_tries, f"{num} images per class", "draws"):
            drawn = draw_few(train.labels, num, seed)
            asked = torch.arange(num_rows)
            if test is None:
                asked = asked[~torch.isin(asked, drawn)]
            queries, bank = (train if test is None else test).rows(asked), train.rows(drawn)
            num_drawn, k = len(drawn), min(self.k, len(drawn))
            answers = knn_answers(queries, bank, [k], self.temperature, device=device)
            correct = percent(answers[k].correct())
            top1.append(correct.mean())
            right[asked] += correct
            times[asked] += 1
        seen = times > 0
        return Tries(k, num_drawn, torch.stack(top1), right[seen] / times[seen])


def draw_few(labels: Int[Tensor, "N"], num: int, seed: int) -> Int[Tensor, "n"]:
    """Rows of `num` images of each class (or all of a smaller class), class by class, from one
    stream of torch.randperm with `seed`: the same images as DINOv2's k-NN draws.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for label in torch.unique(labels).tolist():
        of_class = (labels == label).nonzero()[:, 0]
        rows.append(of_class[torch.randperm(len(of_class), generator=generator)[:num]])
    return torch.cat(rows)
