"""Fine-tuning: the whole network is trained with labels, and tested; on request again and again,
by its own predictions (Born-Again Networks).

AdamW with layer-wise rate decay (Bao et al. 2021, appendix; He et al. 2022, appendix A.1).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_lite.contracts import Backbone, Evaluation, Progress, Source, UserError
from dino_lite.data.mixing import mix
from dino_lite.data.random_crops import RandomCrops, random_batches
from dino_lite.data.subset import Subset, hold_out
from dino_lite.draws import derived_seed
from dino_lite.eval.baselines import untrained
from dino_lite.eval.born_again import BornAgain, Predictions, born_again_loss, generations_told
from dino_lite.eval.features import device_of
from dino_lite.eval.holdout import OUT_OF_TRAIN, TEST_SHARE, check_classes
from dino_lite.eval.metrics import mean_per_class
from dino_lite.eval.results import percent, reduced, result
from dino_lite.eval.store import FeatureStore, demand_labels
from dino_lite.meter import meter, metered, named
from dino_lite.optim.param_groups import param_groups
from dino_lite.optim.schedules import Cosine, Span, scale_rate
from dino_lite.settings.kinds import Count, NonNegative, Positive, Share, Shares, Size
from dino_lite.settings.validate import checked


class Labeled(NamedTuple):
    """Labeled images to train on and to test on; `classes` are their labels, sorted."""

    train: Source
    test: Source
    classes: Int[Tensor, "C"]
    where: str  # where the test images come from, in words


class Classifier(NamedTuple):
    """A network and the linear layer on its class token."""

    network: Backbone
    head: nn.Linear

    def __call__(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b C"]:
        """Logits of normalized images."""
        logits: Tensor = self.head(self.network(images, cls_only=True).cls)
        return logits


class Finetune(Evaluation):
    """Evaluation by fine-tuning: a copy of the backbone and a linear layer on its class token are
    trained for `num_epochs`; reports the last epoch's accuracy on test, without model selection.

    `rate` is per 256 images, and applies to the linear layer and the last norm; each block has
    `layer_decay` times the rate of the layer above. `mixup` and `cutmix` are the parameters of
    their Beta distributions, 0: off; with both, one is chosen at random for each batch.

    Of several `generations` (Born-Again Networks), each starts anew, with an order and crops of its
    own, and learns from its teacher, the one before, by the objective `born_again`
    (`eval.born_again.born_again_loss`), on the same mixed images; the result is that of the last.
    `from_scratch`: the networks start with new weights instead of the backbone's, and batch
    normalization learns its statistics. `layer_decay="auto"`: 0.75, or 1 with `from_scratch`.
    """

    @checked
    def __init__(
        self,
        num_epochs: Size = 30,
        batch_size: Size = 64,
        rate: Positive = 1e-3,
        layer_decay: Share | Literal["auto"] = "auto",
        weight_decay: NonNegative = 0.05,
        warmup: Span = 0.1,
        scale: Shares = (0.25, 1.0),
        mixup: NonNegative = 0.0,
        cutmix: NonNegative = 0.0,
        seed: Count = 0,
        generations: Size = 1,
        born_again: BornAgain = "labels+logits",
        temperature: Positive = 1.0,
        from_scratch: bool = False,
    ) -> None:
        self.num_epochs, self.batch_size, self.rate = num_epochs, batch_size, rate
        if layer_decay == "auto":
            layer_decay = 1.0 if from_scratch else 0.75
        self.layer_decay, self.weight_decay = layer_decay, weight_decay
        self.warmup, self.scale = warmup, list(scale)
        self.mixup, self.cutmix, self.seed = mixup, cutmix, seed
        self.generations, self.born_again = generations, born_again
        self.temperature, self.from_scratch = temperature, from_scratch

    def __call__(self, backbone: Backbone, store: FeatureStore) -> dict[str, Any]:
        """Accuracy on test; does not modify the given backbone."""
        labeled = find_labeled(store)
        made: list[Classifier] = []
        for generation in range(1, self.generations + 1):
            with named(f"generation {generation}") if self.generations > 1 else nullcontext():
                made.append(self._train(backbone, store, labeled, generation, made[-1:]))
        found = _test(made, store, labeled)
        correct = found.each[-1] == found.labels
        mixed = " and ".join(name for name in ("mixup", "cutmix") if getattr(self, name))
        begun = "trained from new weights" if self.from_scratch else "fine-tuned end to end"
        return result(
            "fine-tuned top-1",
            float(percent(correct).mean()),
            protocol=(
                f"{begun}, AdamW, layer decay {self.layer_decay:g}, random crops and "
                f"flips{', ' + mixed if mixed else ''}, last of {self.num_epochs} epochs; "
                f"{len(labeled.train):,} images of train, tested on {len(correct):,} "
                f"{labeled.where}{self._born_again()}"
            ),
            settings={"rate": self.rate, "batch": self._batch(labeled), "epochs": self.num_epochs},
            num_train=len(labeled.train),
            num_test=len(correct),
            scores=percent(correct),
            notes=reduced("batch", [self.batch_size], self._batch(labeled), "all training images"),
            mean_per_class=mean_per_class(correct, found.labels),
            **(generations_told(found) if self.generations > 1 else {}),
        )

    def _born_again(self) -> str:
        """The protocol of several generations."""
        if self.generations == 1:
            return ""
        how = {
            "labels+logits": "labels and the logits",
            "logits": "the logits",
            "cwtm": "labels, weighted by the confidence,",
            "dkpp": "the logits, permuted but for the largest,",
        }[self.born_again]
        warm = f" at temperature {self.temperature:g}" if self.temperature != 1 else ""
        return f"; generation {self.generations}, each trained with {how} of the one before{warm}"

    def _batch(self, labeled: Labeled) -> int:
        return min(self.batch_size, len(labeled.train))

    def _train(
        self,
        backbone: Backbone,
        store: FeatureStore,
        labeled: Labeled,
        generation: int = 1,
        teachers: Sequence[Classifier] = (),
    ) -> Classifier:
        """A generation after its last epoch; `teachers` are those it learns from, one or none."""
        data, seed = store.data, derived_seed(self.seed, generation)
        made = self._start(backbone, len(labeled.classes), seed)
        device = made.head.weight.device
        batch_size = self._batch(labeled)
        per_epoch = len(labeled.train) // batch_size
        total = per_epoch * self.num_epochs
        whole = nn.ModuleDict({"backbone": made.network, "head": made.head})
        groups = param_groups(whole, layer_decay=self.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=0.0)
        base = scale_rate(self.rate, batch_size, "linear")
        schedule = Cosine(base, 0.0, warmup=self.warmup)
        if (size := data.preprocessing.size[0]) != data.preprocessing.size[1]:
            raise UserError(
                f"finetune takes square crops, and these weights images of "
                f"{data.preprocessing.pixels} pixels: give the side in pixels as image_size=."
            )
        crops = RandomCrops(labeled.train, size, self.scale, seed)
        generator = np.random.default_rng(seed)
        batches = random_batches(crops, batch_size, self.num_epochs, seed, data.num_workers)
        for step, batch in enumerate(metered(batches, total, "training", "steps")):
            data.bad.update((labeled.train.name(i), why) for i, why in batch.bad)
            if not len(batch.images):
                continue
            rate = schedule(Progress(step, total, per_epoch))
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate_scale"]
                group["weight_decay"] = self.weight_decay if group["decay"] else 0.0
            images = data.normalize(batch.images.to(device))
            numbers = torch.searchsorted(labeled.classes, batch.labels)
            wanted = F.one_hot(numbers, len(labeled.classes)).float().to(device)
            images, wanted = mix(images, wanted, self.mixup, self.cutmix, generator)
            loss = self._loss(made(images), images, wanted, teachers, generator)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        made.network.eval()
        return made

    def _loss(
        self,
        logits: Float[Tensor, "b K"],
        images: Float[Tensor, "b C H W"],
        wanted: Float[Tensor, "b K"],
        teachers: Sequence[Classifier],
        generator: np.random.Generator,
    ) -> Float[Tensor, ""]:
        if not teachers:
            return F.cross_entropy(logits, wanted)
        with torch.no_grad():
            (told,) = (teacher(images) for teacher in teachers)
        return born_again_loss(logits, told, wanted, self.born_again, self.temperature, generator)

    def _start(self, backbone: Backbone, num_classes: int, seed: int) -> Classifier:
        """A copy of the backbone, or one with new weights, in float32, and a new head."""
        anew = self.from_scratch and any(True for _ in backbone.parameters())
        network = untrained(backbone, seed) if anew else copy.deepcopy(backbone)
        network.float().requires_grad_().eval()  # eval: no drop path
        for part in network.modules():
            if anew and isinstance(part, _BatchNorm):
                part.train()
        head = nn.Linear(network.embed_dim, num_classes, device="meta")
        head.to_empty(device=device_of(backbone))
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return Classifier(network, head)


def find_labeled(store: FeatureStore) -> Labeled:
    """The labeled images of train and test; if test has no labels, a fifth of train is held out."""
    train, test = store.data.splits[:2]
    demand_labels(store.data.splits, "Fine-tuning")
    train, where = _known(train), "of test"
    if test is None or test.labels is None:
        kept, held = hold_out(_labels(train), TEST_SHARE, seed=0)
        train, test = Subset(train, kept.numpy()), Subset(train, held.numpy())
        where = OUT_OF_TRAIN
    test = _known(test)
    known = _labels(train), _labels(test)
    check_classes("Fine-tuning", *known)
    return Labeled(train, test, torch.unique(torch.cat(known)), where)


def _test(made: Sequence[Classifier], store: FeatureStore, labeled: Labeled) -> Predictions:
    """What each of `made` predicts for the test images."""
    each, ensemble, labels = [], [], []
    device = made[0].head.weight.device
    with torch.inference_mode(), meter(len(labeled.test), "test") as advance:
        for images, known in store.data.batches(labeled.test, device):
            logits = torch.stack([classify(images) for classify in made])
            each.append(logits.argmax(dim=2).cpu())
            ensemble.append(logits.softmax(dim=2).mean(dim=0).argmax(dim=1).cpu())
            labels.append(torch.searchsorted(labeled.classes, known.cpu()))
            advance(len(images))
    if not labels:
        raise UserError("Fine-tuning found no test image it could read; check data.root.")
    return Predictions(torch.cat(each, dim=1), torch.cat(ensemble), torch.cat(labels))


def _labels(source: Source) -> Int[Tensor, "N"]:
    return torch.as_tensor(np.asarray(source.labels), dtype=torch.int64)


def _known(source: Source) -> Source:
    """The labeled images."""
    rows = np.flatnonzero(cast(np.ndarray, source.labels) >= 0)
    return source if len(rows) == len(source) else Subset(source, rows)
