"""A backbone whose class token is reduced to fewer numbers, by PCA."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dino_lite.contracts import Backbone, Memory, Tokens, UserError

_SMALLEST = 1e-11  # variance of a direction, relative to the largest: below it is rounding


class Compact(Backbone):
    """The backbone `whole` with the linear map `reduce` on its class token; patches and registers
    stay as they are. Its spec names `whole` by that one's stored spec.
    """

    kind = "compact"

    def __init__(self, whole: Backbone, width: int) -> None:
        super().__init__()
        self.spec: dict[str, Any] = {"whole": whole.stored_spec(), "width": width}
        like = next(whole.parameters())
        self.whole = whole
        self.reduce = nn.Linear(whole.embed_dim, width, device=like.device, dtype=like.dtype)
        self.embed_dim, self.patch_size = width, whole.patch_size
        self.in_chans, self.num_blocks = whole.in_chans, whole.num_blocks
        self.takes_masks, self.any_size = whole.takes_masks, whole.any_size
        self.whole_patches = whole.whole_patches

    def forward(
        self,
        images: Float[Tensor, "n C H W"],
        mask: Bool[Tensor, "n P"] | None = None,
        cls_only: bool = False,
    ) -> Tokens:
        """The tokens of `whole`, with the class token reduced."""
        return self._reduced(self.whole(images, mask, cls_only))

    def intermediate(self, images: Float[Tensor, "n C H W"], blocks: list[int]) -> list[Tokens]:
        """As `forward`; the map was fitted to the last block."""
        return [self._reduced(tokens) for tokens in self.whole.intermediate(images, blocks)]

    def attention(self, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n heads N N"]:
        """Attention of `whole`."""
        return self.whole.attention(images)

    def depth_of(self, name: str) -> int:
        """Layer of the parameter `name`; the map comes after the last block."""
        part, _, rest = name.partition(".")
        return self.whole.depth_of(rest) if part == "whole" else self.num_blocks + 1

    def set_memory(self, memory: Memory, compiled: bool) -> None:
        """Set activation memory and compilation of `whole`."""
        self.whole.set_memory(memory, compiled)

    def disable_noise(self) -> None:
        """Disable randomness of `whole` in training mode."""
        self.whole.disable_noise()

    def fix_size(self, height: int, width: int) -> None:
        """Store what depends on the image size in `whole` as constants."""
        self.whole.fix_size(height, width)

    def _reduced(self, tokens: Tokens) -> Tokens:
        return Tokens(self.reduce(tokens.cls), tokens.patches, tokens.registers, tokens.grid)


def compacted(
    backbone: Backbone, features: Float[Tensor, "N D"], width: int, whiten: bool = False
) -> Compact:
    """`backbone` with class tokens of `width` numbers: their coordinates along the first principal
    components of `features`, its class tokens of training images.

    The mean is not subtracted, so that cosines stay. With `whiten` it is, and each coordinate is
    divided by its standard deviation. Raises UserError if `features` vary in fewer directions.
    """
    mean, rows = features.double().mean(dim=0), features.double()
    variance, axes = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    variance, axes = variance.flip(0), axes.flip(1)
    rank = int((variance > _SMALLEST * variance[0]).sum())
    if width > rank:
        raise UserError(
            f"compact={width}: the class tokens of {len(rows):,} training images vary in {rank:,} "
            f"directions only; set compact to at most {rank:,}, or give more images."
        )
    weight = axes[:, :width].T
    if whiten:
        weight = weight / variance[:width, None].sqrt()
    compact = Compact(backbone, width)
    with torch.no_grad():
        compact.reduce.weight.copy_(weight)
        compact.reduce.bias.copy_(-weight @ mean if whiten else torch.zeros(width))
    return compact.train(backbone.training)
