"""The linear probe: a grid of linear classifiers on frozen features.

DINOv2's protocol (Oquab et al. 2023, section 7.1), with other settings DINO's (Caron et al. 2021,
appendix F.2), on features of images without augmentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dino_lite.contracts import Backbone, Evaluation
from dino_lite.eval.features import Pooled, device_of
from dino_lite.eval.holdout import Task, chooser, classification
from dino_lite.eval.metrics import mean_per_class
from dino_lite.eval.probes import Head, LinearHeads, make_grid, train
from dino_lite.eval.results import percent, result
from dino_lite.eval.store import FeatureStore
from dino_lite.settings.kinds import Count, Must, PositiveNumbers, Size, Sizes
from dino_lite.settings.validate import checked

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
PUBLISHED_BATCH, PUBLISHED_STEPS = 1024, 12_500  # ten epochs of ImageNet
_AUTO_EPOCHS, _FEWEST_STEPS = 100, 1000  # if that is too few for the data


class Linear(Evaluation):
    """Evaluation by a linear probe: the head that is most accurate on a held-out part of train is
    retrained on all of train and tested.

    With `choose="test"` nothing is held out and the best head on test is reported, as the
    references do, which is optimistic. `cosine`: rates are updated by step or by epoch; in the
    latter case with `choose="test"`, the best epoch on test is chosen too. `num_steps` and
    `batch_size` may be "auto", see the YAML.
    """

    @checked
    def __init__(
        self,
        blocks: Sizes = (1, 4),
        patches: Annotated[Sequence[bool], Must("[true], [false] or both", bool)] = (False, True),
        rates: PositiveNumbers = RATES,
        batch_size: Size | Literal["auto"] = "auto",
        num_steps: Size | Literal["auto"] = "auto",
        num_epochs: Size | None = None,
        cosine: Literal["step", "epoch"] = "step",
        choose: Literal["held_out", "test"] = "held_out",
        seed: Count = 0,
    ) -> None:
        self.blocks, self.patches, self.rates = sorted(set(blocks)), list(patches), list(rates)
        self.batch_size, self.num_steps, self.num_epochs = batch_size, num_steps, num_epochs
        self.cosine, self.choose, self.seed = cosine, choose, seed
        self.num_blocks = max(blocks)

    def __call__(self, backbone: Backbone, store: FeatureStore) -> dict[str, Any]:
        """Accuracy of the chosen head; all heads under `heads`, and the best on test for comparison
        with the references.
        """
        task = classification(backbone, store, "The linear probe", self.num_blocks)
        return self.score(task, device_of(backbone))

    def score(self, task: Task, device: torch.device | None = None) -> dict[str, Any]:
        """As `__call__`, from features."""
        device, held, judged = device or torch.device("cpu"), None, None
        if self.choose == "held_out":
            kept, rest = chooser("The linear probe", task.train.labels, self.seed + 1)
            held = task.train.rows(rest)
            judges = self._train(task.train.rows(kept), task.num_classes, device)
            chosen, judged = _choose(*judges.measure(held))
        looks: list[
            Tensor
        ] = []  # per epoch, whether each head classifies each test image correctly, "n H"

        def look(heads: LinearHeads) -> None:
            looks.append(heads.measure(task.test)[0])

        each_epoch = self.cosine == "epoch" and held is None
        heads = self._train(task.train, task.num_classes, device, look if each_epoch else None)
        if not looks:
            look(heads)
        epoch, favorite = _best(looks)
        if held is None:
            chosen, right = favorite, looks[epoch][:, favorite]
        else:
            right = looks[-1][:, chosen]
        grid, (batch_size, num_steps) = heads.grid, self.length(len(task.train.labels))
        records, head = _records(grid, _accuracy(looks[-1]), judged), grid[chosen]
        return result(
            "linear top-1",
            float(percent(right).mean()),
            protocol=self._protocol(task, len(grid), held),
            settings={
                "features": _name(head),
                "rate": head.base_rate,
                "batch": batch_size,
                "steps": num_steps,
            },
            num_train=len(task.train.labels),
            num_test=len(task.test.labels),
            scores=percent(right),
            mean_per_class=mean_per_class(right, task.test.labels),
            chosen=records[chosen],
            reference_choice={
                **records[favorite],
                "chosen_on": "test",
                "value": float(_accuracy(looks[epoch])[favorite]),
                "epoch": epoch + 1 if each_epoch else None,
            },
            heads=records,
            table=_best_of_each(records, "test %" if held is None else "held out %"),
        )

    def _train(
        self,
        fit: Pooled,
        num_classes: int,
        device: torch.device,
        look: Callable[[LinearHeads], None] | None = None,
    ) -> LinearHeads:
        """The whole grid, trained on `fit`; `look` is called after each epoch."""
        batch_size, num_steps = self.length(len(fit.labels))
        blocks = sorted({min(num, fit.cls.shape[1]) for num in self.blocks})
        grid = make_grid(blocks, self.patches, self.rates, batch_size)
        heads = LinearHeads(grid, fit, num_classes, device, self.seed)
        every = None if look is None else partial(look, heads)
        train(heads, fit, batch_size, num_steps, self.seed, self.cosine, every)
        return heads

    def length(self, num_images: int) -> tuple[int, int]:
        """Batch size and number of steps for a number of training images, as in the YAML."""
        quarter = 2 ** int(math.log2(max(1.0, num_images / 4)))
        auto = min(PUBLISHED_BATCH, max(16, quarter))
        batch = min(num_images, self.batch_size if isinstance(self.batch_size, int) else auto)
        if isinstance(self.num_steps, int):
            return batch, self.num_steps
        epoch = num_images // batch
        if self.num_epochs is not None:
            return batch, self.num_epochs * epoch
        return batch, min(PUBLISHED_STEPS, max(_FEWEST_STEPS, _AUTO_EPOCHS * epoch))

    def _protocol(self, task: Task, num_heads: int, held: Pooled | None) -> str:
        what = "one linear head" if num_heads == 1 else f"the best of {num_heads} linear heads"
        epochs = ", the best of its epochs" if self.cosine == "epoch" and held is None else ""
        judge = "the test images"
        if held is not None:
            lone = len(torch.unique(task.train.labels)) - len(torch.unique(held.labels))
            none = f", none of {lone:,} classes with one image" if lone else ""
            judge = (
                f"{len(held.labels):,} images held out of train (a tenth of each class, at least "
                f"one{none}), then retrained on all of train"
            )
        return (
            f"{what} on frozen features{epochs} selected on {judge}; SGD, {task.images}; not "
            "augmented (the references train on random crops)"
        )


def _choose(
    correct: Bool[Tensor, "n H"], losses: Float[Tensor, "H"]
) -> tuple[int, Float[Tensor, "H"]]:
    """The most accurate head, and the accuracy of each.

    Ties are broken by the lowest loss; a head that has diverged comes last.
    """
    accuracy, losses = _accuracy(correct), losses.nan_to_num(nan=math.inf)
    order = sorted(range(len(losses)), key=lambda i: (-float(accuracy[i]), float(losses[i])))
    return order[0], accuracy


def _best(looks: Sequence[Tensor]) -> tuple[int, int]:
    """The most accurate epoch and head; ties go to the first."""
    means = torch.stack([_accuracy(correct) for correct in looks])  # epochs H
    place = int(means.argmax())
    return place // means.shape[1], place % means.shape[1]


def _accuracy(correct: Bool[Tensor, "n H"]) -> Float[Tensor, "H"]:
    """Percent correct of each head."""
    return (100.0 * correct.double()).mean(dim=0)


def _name(head: Head) -> str:
    """The features a head reads, in words."""
    classes = "CLS" if head.num_blocks == 1 else f"CLS of {head.num_blocks} blocks"
    return f"{classes} + mean patch" if head.patches else classes


def _records(grid: Sequence[Head], accuracy: Tensor, judged: Tensor | None) -> list[dict[str, Any]]:
    """One record per head, by its index in the grid."""
    return [
        {
            "head": i,
            "features": _name(head),
            "base_rate": head.base_rate,
            "rate": head.rate,
            "held out %": None if judged is None else float(judged[i]),
            "test %": float(accuracy[i]),
        }
        for i, head in enumerate(grid)
    ]


def _best_of_each(records: list[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """The best head of each kind of features, for the terminal."""
    shown = [key for key in records[0] if records[0][key] is not None and key != "rate"]
    best: dict[str, dict[str, Any]] = {}
    for record in records:
        before = best.get(record["features"])
        if before is None or record[by] > before[by]:
            best[record["features"]] = record
    return [{key: record[key] for key in shown} for record in best.values()]
