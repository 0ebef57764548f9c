"""A frozen network as a teacher: it is opened at first use, and no checkpoint holds its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dino_lite.contracts import Backbone, Tokens
from dino_lite.data.photometric import Normalize
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.nn.heads import DINOHead


class Network(NamedTuple):
    """A network in eval mode, how it expects images, and its projection heads ("head",
    "patch_head") as far as its file has any.
    """

    backbone: Backbone
    preprocessing: Preprocessing
    heads: dict[str, DINOHead]


class FrozenTeacher:
    """Tokens of a frozen network. Not an nn.Module: its weights are in no state dict.

    `source` names its file and `digest` identifies the content; checkpoints hold both. `open`
    opens it, and raises UserError if the content is another. `normalize` is that of the crops,
    which are normalized anew as the network expects.
    """

    def __init__(
        self, source: str, digest: str, open: Callable[[], Network], normalize: Normalize
    ) -> None:
        self.source, self.digest = source, digest
        self._open, self._normalize = open, normalize
        self._network: Network | None = None

    @property
    def network(self) -> Network:
        """The network, opened once."""
        if self._network is None:
            network = self._open()
            for part in (network.backbone, *network.heads.values()):
                part.eval().requires_grad_(False)
            self._network = network
        return self._network

    @torch.no_grad()
    def __call__(self, crops: Float[Tensor, "n C H W"], cls_only: bool = False) -> Tokens:
        """Tokens of normalized crops, on their device and in their dtype."""
        backbone, how = self.network.backbone, self.network.preprocessing
        for part in (backbone, *self.network.heads.values()):
            part.to(crops)
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (how.mean, how.std))
        scale, shift = self._normalize.std / std, (self._normalize.mean - mean) / std
        if not (scale == 1).all() or not (shift == 0).all():
            crops = crops * scale.to(crops)[:, None, None] + shift.to(crops)[:, None, None]
        tokens: Tokens = backbone(_whole_patches(crops, backbone), cls_only=cls_only)
        return tokens


def _whole_patches(crops: Float[Tensor, "n C H W"], backbone: Backbone) -> Tensor:
    """`crops`, resized to whole patches of a network that demands it: sides are rounded up."""
    patch, sides = backbone.patch_size, crops.shape[-2:]
    if not backbone.whole_patches or not any(side % patch for side in sides):
        return crops
    size = [-(-side // patch) * patch for side in sides]
    return F.interpolate(crops, size=size, mode="bicubic", antialias=True)


@torch.no_grad()
def patch_width(backbone: Backbone) -> int:
    """The width of a backbone's patch tokens, which may differ from that of its class token."""
    was_training, like = backbone.training, next(backbone.parameters())
    side = 2 * backbone.patch_size
    tokens: Tokens = backbone.eval()(like.new_zeros(1, backbone.in_chans, side, side))
    backbone.train(was_training)
    return tokens.patches.shape[2]
