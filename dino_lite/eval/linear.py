"""The linear probe: a grid of linear classifiers on frozen features.

DINOv2's protocol (Oquab et al. 2023, section 7.1), with other settings DINO's (Caron et al. 2021,
appendix F.2), on features of images without augmentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from dino_lite.contracts import Backbone, Evaluation, UserError
from dino_lite.eval.features import Pooled, device_of
from dino_lite.eval.holdout import Task, chooser, classification
from dino_lite.eval.metrics import mean_per_class
from dino_lite.eval.probes import Head, LinearHeads, accuracy, choose, make_grid, train
from dino_lite.eval.results import percent, result
from dino_lite.eval.short_grid import CHOICE, ShortGrid
from dino_lite.eval.store import FeatureStore
from dino_lite.settings.kinds import Count, Must, PositiveNumbers, Size, Sizes
from dino_lite.settings.validate import checked
from dino_lite.wording import count

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
PUBLISHED_BATCH, PUBLISHED_STEPS = 1024, 12_500  # ten epochs of ImageNet
_SHORT = 2  # the short grid has every second of these rates
_AUTO_EPOCHS, _FEWEST_STEPS = 100, 1000  # if that is too few for the data


class Chosen(NamedTuple):
    """The outcome of a grid: a record per head, the index of the chosen one, which test images it
    classifies correctly, the images that chose it (None: those of test), and its number of steps.
    """

    records: list[dict[str, Any]]
    chosen: int
    right: Bool[Tensor, "n"]
    held: Pooled | None
    num_steps: int
    reference_choice: dict[str, Any] | None


class Linear(Evaluation):
    """Evaluation by a linear probe: the head that is most accurate on a held-out part of train is
    retrained on all of train and tested.

    With `choose="test"` nothing is held out and the best head on test is reported, as the
    references do, which is optimistic. `cosine`: rates are updated by step or by epoch; in the
    latter case with `choose="test"`, the best epoch on test is chosen too. `num_steps` and
    `batch_size` may be "auto", see the YAML.

    `grid`: "full", "short", or "auto", which is short on a CPU unless a reference's protocol is
    asked for. The short grid (`eval.short_grid`) has every second of the 13 default rates, and ends
    "auto" steps once the loss stands still.
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
        grid: Literal["auto", "short", "full"] = "full",
    ) -> None:
        published = choose == "test" or cosine == "epoch"
        if grid == "short" and published:
            raise UserError("eval.linear.grid=short needs choose=held_out and cosine=step.")
        self.grid = "full" if published else grid
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
        device = device or torch.device("cpu")
        short = self.grid == "short" or (self.grid == "auto" and device.type == "cpu")
        found = self._short(task, device) if short else self._full(task, device)
        chosen, held = found.records[found.chosen], found.held
        return result(
            "linear top-1",
            float(percent(found.right).mean()),
            protocol=self._protocol(task, len(found.records), held, short),
            settings={
                "features": chosen["features"],
                "rate": chosen["base_rate"],
                "batch": self.length(len(task.train.labels))[0],
                "steps": found.num_steps,
                "grid": "short" if short else "full",
            },
            num_train=len(task.train.labels),
            num_test=len(task.test.labels),
            scores=percent(found.right),
            mean_per_class=mean_per_class(found.right, task.test.labels),
            chosen=chosen,
            reference_choice=found.reference_choice,
            heads=found.records,
            table=_best_of_each(found, "test %" if held is None else "held out %"),
        )

    def _full(self, task: Task, device: torch.device) -> Chosen:
        """Every head, on the features as they are."""
        held, judged = None, None
        if self.choose == "held_out":
            kept, rest = chooser("The linear probe", task.train.labels, self.seed + 1)
            fit, held = task.train.rows(kept), task.train.rows(rest)
            judges = self._train(fit, task.num_classes, device, title="training to choose a head")
            chosen, judged = choose(*judges.measure(held))
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
        records = _records(heads.grid, accuracy(looks[-1]).tolist(), judged)
        reference_choice = {
            **records[favorite],
            "chosen_on": "test",
            "value": float(accuracy(looks[epoch])[favorite]),
            "epoch": epoch + 1 if each_epoch else None,
        }
        num_steps = self.length(len(task.train.labels))[1]
        return Chosen(records, chosen, right, held, num_steps, reference_choice)

    def _short(self, task: Task, device: torch.device) -> Chosen:
        """The short grid; only the chosen head is tested."""
        kept, rest = chooser("The linear probe", task.train.labels, self.seed + 1)
        fit, held = task.train.rows(kept), task.train.rows(rest)
        rates = self.rates[::_SHORT] if self.rates == list(RATES) else self.rates
        stops = self.num_steps == "auto" and self.num_epochs is None
        short = ShortGrid(rates, task.num_classes, self.length, stops, device, self.seed)
        kinds = make_grid(self._blocks(fit), self.patches, [1.0], 256)
        found = short.search(kinds, fit, held, task.train, task.test)
        tested: list[float | None] = [None] * len(found.grid)
        tested[found.chosen] = float(percent(found.right).mean())
        records = _records(found.grid, tested, found.judged)
        return Chosen(records, found.chosen, found.right, held, found.num_steps, None)

    def _train(
        self,
        fit: Pooled,
        num_classes: int,
        device: torch.device,
        look: Callable[[LinearHeads], None] | None = None,
        title: str = "training",
    ) -> LinearHeads:
        """The whole grid, trained on `fit`; `look` is called after each epoch."""
        batch_size, num_steps = self.length(len(fit.labels))
        grid = make_grid(self._blocks(fit), self.patches, self.rates, batch_size)
        heads = LinearHeads(grid, fit, num_classes, device, self.seed)
        every = None if look is None else partial(look, heads)
        train(heads, fit, batch_size, num_steps, self.seed, self.cosine, every, title)
        return heads

    def _blocks(self, pooled: Pooled) -> list[int]:
        return sorted({min(num, pooled.cls.shape[1]) for num in self.blocks})

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

    def _protocol(self, task: Task, num_heads: int, held: Pooled | None, short: bool) -> str:
        what, by = "one linear head", ""
        if num_heads > 1:
            what = f"{'one' if short else 'the best'} of {num_heads} linear heads"
            by = f" by {CHOICE}" if short else ""
        epochs = ", the best of its epochs" if self.cosine == "epoch" and held is None else ""
        judge = "the test images"
        if held is not None:
            lone = len(torch.unique(task.train.labels)) - len(torch.unique(held.labels))
            none = f", none of {count(lone, 'class')} with one image" if lone else ""
            judge = (
                f"{len(held.labels):,} images held out of train (a tenth of each class, at least "
                f"one{none}), then retrained on all of train"
            )
        return (
            f"{what}{' (short grid)' if short else ''} on frozen features{epochs} selected{by} on "
            f"{judge}; SGD, {task.images}; not augmented (the references train on random crops)"
        )


def _best(looks: Sequence[Tensor]) -> tuple[int, int]:
    """The most accurate epoch and head; ties go to the first."""
    means = torch.stack([accuracy(correct) for correct in looks])  # epochs H
    place = int(means.argmax())
    return place // means.shape[1], place % means.shape[1]


def _records(
    grid: Sequence[Head], tested: Sequence[float | None], judged: Tensor | None
) -> list[dict[str, Any]]:
    """One record per head, by its index in the grid."""
    return [
        {
            "head": i,
            "features": head.features,
            "base_rate": head.base_rate,
            "rate": head.rate,
            "held out %": None if judged is None else float(judged[i]),
            "test %": tested[i],
        }
        for i, head in enumerate(grid)
    ]


def _best_of_each(found: Chosen, by: str) -> list[dict[str, Any]]:
    """The most accurate head of each kind of features, or the chosen one of its kind, marked, for
    the terminal.
    """
    records, chosen = found.records, found.records[found.chosen]
    known = {key for record in records for key, value in record.items() if value is not None}
    shown = [key for key in records[0] if key in known - {"rate"}]
    best: dict[str, dict[str, Any]] = {}
    for record in records:
        before = best.get(record["features"])
        if before is None or record[by] > before[by]:
            best[record["features"]] = record
    best[chosen["features"]] = chosen
    return [
        {key: "" if record[key] is None else record[key] for key in shown}
        | {"chosen": "yes" if record is chosen else ""}
        for record in best.values()
    ]
