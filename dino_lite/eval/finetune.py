"""Fine-tuning: the whole network is trained with labels, and tested.

AdamW with layer-wise rate decay (Bao et al. 2021, appendix; He et al. 2022, appendix A.1).
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dino_lite.contracts import Backbone, Evaluation, Progress, Source, UserError
from dino_lite.data.random_crops import RandomCrops, random_batches
from dino_lite.data.subset import Subset, hold_out
from dino_lite.eval.features import device_of
from dino_lite.eval.holdout import OUT_OF_TRAIN, TEST_SHARE, check_classes
from dino_lite.eval.metrics import mean_per_class
from dino_lite.eval.results import percent, reduced, result
from dino_lite.eval.store import FeatureStore, demand_labels
from dino_lite.meter import meter, metered
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


class Finetune(Evaluation):
    """Evaluation by fine-tuning: a copy of the backbone and a linear layer on its class token are
    trained for `num_epochs`; reports the last epoch's accuracy on test, without model selection.

    `rate` is per 256 images, and applies to the linear layer and the last norm; each block has
    `layer_decay` times the rate of the layer above. `mixup` and `cutmix` are the parameters of
    their Beta distributions, 0: off; with both, one is chosen at random for each batch.
    """

    @checked
    def __init__(
        self,
        num_epochs: Size = 30,
        batch_size: Size = 64,
        rate: Positive = 1e-3,
        layer_decay: Share = 0.75,
        weight_decay: NonNegative = 0.05,
        warmup: Span = 0.1,
        scale: Shares = (0.25, 1.0),
        mixup: NonNegative = 0.0,
        cutmix: NonNegative = 0.0,
        seed: Count = 0,
    ) -> None:
        self.num_epochs, self.batch_size, self.rate = num_epochs, batch_size, rate
        self.layer_decay, self.weight_decay = layer_decay, weight_decay
        self.warmup, self.scale = warmup, list(scale)
        self.mixup, self.cutmix, self.seed = mixup, cutmix, seed

    def __call__(self, backbone: Backbone, store: FeatureStore) -> dict[str, Any]:
        """Accuracy on test; does not modify the given backbone."""
        labeled = find_labeled(store)
        network, head = self._train(backbone, store, labeled)
        correct, labels = _test(network, head, store, labeled)
        mixed = " and ".join(name for name in ("mixup", "cutmix") if getattr(self, name))
        return result(
            "fine-tuned top-1",
            float(percent(correct).mean()),
            protocol=(
                f"fine-tuned end to end, AdamW, layer decay {self.layer_decay:g}, random crops and "
                f"flips{', ' + mixed if mixed else ''}, last of {self.num_epochs} epochs; "
                f"{len(labeled.train):,} images of train, tested on {len(correct):,} "
                f"{labeled.where}"
            ),
            settings={"rate": self.rate, "batch": self._batch(labeled), "epochs": self.num_epochs},
            num_train=len(labeled.train),
            num_test=len(correct),
            scores=percent(correct),
            notes=reduced("batch", [self.batch_size], self._batch(labeled), "all training images"),
            mean_per_class=mean_per_class(correct, labels),
        )

    def _batch(self, labeled: Labeled) -> int:
        return min(self.batch_size, len(labeled.train))

    def _train(
        self, backbone: Backbone, store: FeatureStore, labeled: Labeled
    ) -> tuple[Backbone, nn.Linear]:
        """The copy and its head after the last epoch."""
        device, data = device_of(backbone), store.data
        network = copy.deepcopy(backbone)
        network.float().requires_grad_().eval()  # eval: no drop path
        width = network.embed_dim
        head = nn.Linear(width, len(labeled.classes), device="meta").to_empty(device=device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        batch_size = self._batch(labeled)
        per_epoch = len(labeled.train) // batch_size
        total = per_epoch * self.num_epochs
        whole = nn.ModuleDict({"backbone": network, "head": head})
        groups = param_groups(whole, layer_decay=self.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=0.0)
        base = scale_rate(self.rate, batch_size, "linear")
        schedule = Cosine(base, 0.0, warmup=self.warmup)
        if (size := data.preprocessing.size[0]) != data.preprocessing.size[1]:
            raise UserError(
                f"finetune takes square crops, and these weights images of "
                f"{data.preprocessing.pixels} pixels: give the side in pixels as image_size=."
            )
        crops = RandomCrops(labeled.train, size, self.scale, self.seed)
        generator = np.random.default_rng(self.seed)
        batches = random_batches(crops, batch_size, self.num_epochs, self.seed, data.num_workers)
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
            loss = F.cross_entropy(head(network(images, cls_only=True).cls), wanted)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        return network, head


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


def mix(
    images: Float[Tensor, "b C H W"],
    wanted: Float[Tensor, "b K"],
    mixup: float,
    cutmix: float,
    generator: np.random.Generator,
) -> tuple[Float[Tensor, "b C H W"], Float[Tensor, "b K"]]:
    """Mix each image and its label with the previous one in the batch: all pixels (Zhang et al.
    2018), or a pasted box (Yun et al. 2019).
    """
    if not mixup and not cutmix:
        return images, wanted
    boxes = bool(cutmix) and (not mixup or generator.random() < 0.5)
    alpha = cutmix if boxes else mixup
    share = float(generator.beta(alpha, alpha))  # weight of the image itself
    others = images.roll(1, dims=0)
    if boxes:
        height, width = images.shape[-2:]
        cut = (1 - share) ** 0.5
        top, bottom = _cut(cut, height, generator)
        left, right = _cut(cut, width, generator)
        images = images.clone()
        images[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        images = share * images + (1 - share) * others
    return images, share * wanted + (1 - share) * wanted.roll(1, dims=0)


def _cut(part: float, length: int, generator: np.random.Generator) -> tuple[int, int]:
    """Bounds of `part` of a side around a random pixel, clipped at the edges."""
    middle, half = int(generator.integers(length)), round(part * length) // 2
    return max(0, middle - half), min(length, middle + half)


def _test(
    network: Backbone, head: nn.Module, store: FeatureStore, labeled: Labeled
) -> tuple[Bool[Tensor, "n"], Int[Tensor, "n"]]:
    """Whether each readable test image is classified correctly, and the labels; on the host."""
    hits, labels = [], []
    with torch.inference_mode(), meter(len(labeled.test), "test") as advance:
        for images, known in store.data.batches(labeled.test, device_of(network)):
            numbers = torch.searchsorted(labeled.classes, known.cpu())
            predicted = head(network(images, cls_only=True).cls).argmax(dim=1).cpu()
            hits.append(predicted == numbers)
            labels.append(numbers)
            advance(len(images))
    if not hits:
        raise UserError("Fine-tuning found no test image it could read; check data.root.")
    return torch.cat(hits), torch.cat(labels)


def _labels(source: Source) -> Int[Tensor, "N"]:
    return torch.as_tensor(np.asarray(source.labels), dtype=torch.int64)


def _known(source: Source) -> Source:
    """The labeled images."""
    rows = np.flatnonzero(cast(np.ndarray, source.labels) >= 0)
    return source if len(rows) == len(source) else Subset(source, rows)
