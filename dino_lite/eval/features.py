"""Features of all images of a source, in order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dino_lite.contracts import Backbone, Source, UserError
from dino_lite.data.clean import CleanData
from dino_lite.meter import meter


class Features(NamedTuple):
    """A row for each readable image in the source's order, float32 on the host; label -1: none.

    `index` holds the images' indices in their source.
    """

    features: Float[Tensor, "N D"]
    labels: Int[Tensor, "N"]
    index: Int[Tensor, "N"] | None = None  # type: ignore[assignment]  # hides tuple.index

    @property
    def num_classes(self) -> int:
        """The number of different labels, without -1."""
        return len(set(self.labels.tolist()))

    @property
    def places(self) -> Int[Tensor, "N"]:
        """`index`, or 0 … n-1 if it is not given."""
        return torch.arange(len(self.labels)) if self.index is None else self.index

    def labeled(self) -> Features:
        """The labeled rows."""
        known = self.labels >= 0
        return self if bool(known.all()) else self.rows(known)

    def rows(self, chosen: Tensor) -> Features:
        """The rows at `chosen`, indices or a mask."""
        index = None if self.index is None else self.index[chosen]
        return Features(self.features[chosen], self.labels[chosen], index)


class Pooled(NamedTuple):
    """Pooled tokens of each readable image, float32 on the host: class tokens of the last n blocks,
    each through the last norm, oldest first, and the mean of the last block's patch tokens.
    """

    cls: Float[Tensor, "N n D"]
    patches: Float[Tensor, "N E"]
    labels: Int[Tensor, "N"]
    index: Int[Tensor, "N"]  # type: ignore[assignment]

    def features(self, num_blocks: int = 1, patches: bool = False) -> Features:
        """Class tokens of the last `num_blocks` concatenated, with `patches` followed by the mean
        patch token (DINO, appendix F.2; DINOv2, section 7.1).
        """
        parts = [self.cls[:, -num_blocks:].flatten(1)] + ([self.patches] if patches else [])
        return Features(torch.cat(parts, dim=1), self.labels, self.index)

    def rows(self, chosen: Tensor) -> Pooled:
        """The rows at `chosen`, indices or a mask."""
        return Pooled(*(part[chosen] for part in self))


def extract(
    backbone: Backbone, data: CleanData, source: Source, device: torch.device, title: str = ""
) -> Features:
    """CLS features of every image of `source`, without gradient, dropout or drop path; with a meter
    if `title` is given.
    """
    rows, labels, index = [], [], []
    dtype = dtype_of(backbone)
    with frozen(backbone), meter(len(source), title) as advance:
        for images, image_labels, numbers in data.indexed(source, device, dtype):
            rows.append(backbone(images, cls_only=True).cls.float().cpu())
            labels.append(image_labels.cpu())
            index.append(numbers)
            advance(len(images))
    if not rows:
        raise UserError(_NOTHING)
    return Features(torch.cat(rows), torch.cat(labels), torch.cat(index))


def extract_pooled(
    backbone: Backbone,
    data: CleanData,
    source: Source,
    device: torch.device,
    num_blocks: int = 1,
    title: str = "",
) -> Pooled:
    """As `extract`, of the last `num_blocks` blocks, with a meter if `title` is given.

    Empty if no image could be read: other ranks may have some.
    """
    dtype, found = dtype_of(backbone), []
    wanted = list(range(-num_blocks, 0))
    with frozen(backbone), meter(len(source), title) as advance:
        for images, labels, index in data.indexed(source, device, dtype):
            blocks = backbone.intermediate(images, wanted)
            cls = torch.stack([tokens.cls for tokens in blocks], dim=1).float().cpu()
            found.append((cls, blocks[-1].patches.mean(dim=1).float().cpu(), labels.cpu(), index))
            advance(len(images))
    if not found:
        none = torch.zeros(0, dtype=torch.int64)
        return Pooled(torch.zeros(0, num_blocks, 0), torch.zeros(0, 0), none, none)
    return Pooled(*(torch.cat(parts) for parts in zip(*found, strict=True)))


@contextmanager
def frozen(backbone: Backbone) -> Iterator[None]:
    """Context with the backbone in eval mode and without gradients; restores each module's mode."""
    modes = [(module, module.training) for module in backbone.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def dtype_of(backbone: Backbone) -> torch.dtype:
    """The dtype of the backbone's weights, which its images must have."""
    return _first_tensor(backbone).dtype


def device_of(backbone: Backbone) -> torch.device:
    """The device of the backbone."""
    return _first_tensor(backbone).device


def _first_tensor(backbone: Backbone) -> Tensor:
    found = next(backbone.parameters(), None)
    return next(backbone.buffers()) if found is None else found


_NOTHING = "The evaluation found no image it could read; check data.root."


def check_finite(what: str, *features: Tensor) -> None:
    """Raise UserError for features that are not finite; `what` names the evaluation."""
    for each in features:
        if each.numel() and not all(map(math.isfinite, torch.aminmax(each))):
            raise UserError(
                f"{what} got features that are not finite: the network has diverged; evaluate an "
                "earlier checkpoint, or train again with a lower optim.rate."
            )
