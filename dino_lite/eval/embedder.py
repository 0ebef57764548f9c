"""The features of a frozen backbone that other programs ask for: which, of which blocks, in which
form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dino_lite.backbones.compact import Compact
from dino_lite.contracts import Backbone, Tokens, UserError
from dino_lite.eval.features import check_finite, device_of, dtype_of, frozen
from dino_lite.settings.validate import checked

Feature = Literal["cls", "mean_patch", "patches"]
Dtype = Literal["float32", "float16"]


class Column(NamedTuple):
    """One feature of one block, for n images an array "n D", or "n P D" of patches."""

    name: str  # "cls"; of an earlier block "cls_block_3", counted from 0
    feature: Feature
    block: int
    shape: tuple[int, ...] = ()  # of one image
    grid: tuple[int, int] = (0, 0)  # rows and columns of patches


class Embedder:
    """Computes `features` of `blocks` (from 0; negative: from the end) of a backbone, one or more.

    `size`: rows and columns of the images in pixels. With `unit_length` each vector is divided by
    its length. With `bf16` matrix products are computed in bfloat16. Raises UserError if the
    backbone does not have them.
    """

    @checked
    def __init__(
        self,
        backbone: Backbone,
        size: tuple[int, int],
        features: Feature | Sequence[Feature],
        blocks: int | Sequence[int] = -1,
        unit_length: bool = False,
        dtype: Dtype = "float32",
        bf16: bool = False,
    ) -> None:
        self.backbone, self.unit_length, self.bf16 = backbone, unit_length, bf16
        self.dtype: torch.dtype = getattr(torch, dtype)
        last = backbone.num_blocks - 1
        wanted: Sequence[Any] = [features] if isinstance(features, str) else features
        of = [blocks] if isinstance(blocks, int) else blocks
        numbers = [_number(block, backbone) for block in of]
        asked = [
            Column(feature if number == last else f"{feature}_block_{number}", feature, number)
            for number in dict.fromkeys(numbers)
            for feature in dict.fromkeys(wanted)
        ]
        if not asked:
            key = "blocks" if wanted else "features"
            raise UserError(f"{key}=[]: name at least one, as in {_EXAMPLES[key]}.")
        self.columns = asked
        self.blocks = list(dict.fromkeys(column.block for column in asked))
        self.cls_only = {column.feature for column in asked} == {"cls"}
        self._refuse_unfitted()
        self.columns = self._with_shapes(size)

    def __call__(self, images: Float[Tensor, "n C H W"]) -> dict[str, Tensor]:
        """Each column of normalized images, float32 on their device. Use inside `frozen`."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            tokens = self._tokens(images)
        found = {}
        for column in self.columns:
            values = _of(tokens[column.block], column.feature).float()
            found[column.name] = F.normalize(values, dim=-1) if self.unit_length else values
        return found

    def to_host(self, found: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """The columns as arrays of `dtype`. Raises UserError if a number is not finite in it."""
        arrays = {}
        for name, values in found.items():
            cast = values.to(self.dtype)
            if not bool(torch.isfinite(cast).all()):
                check_finite("embed", values)
                raise UserError(
                    f"dtype=float16: {name} has numbers above 65,504, the largest of float16; use "
                    "dtype=float32 or unit_length=true."
                )
            arrays[name] = cast.cpu().numpy()
        return arrays

    def _tokens(self, images: Float[Tensor, "n C H W"]) -> dict[int, Tokens]:
        if self.blocks == [self.backbone.num_blocks - 1]:
            return {self.blocks[0]: self.backbone(images, cls_only=self.cls_only)}
        found = self.backbone.intermediate(images, self.blocks)
        return dict(zip(self.blocks, found, strict=True))

    def _refuse_unfitted(self) -> None:
        for column in self.columns:
            earlier = column.block != self.backbone.num_blocks - 1
            if isinstance(self.backbone, Compact) and column.feature == "cls" and earlier:
                raise UserError(
                    f"{column.name}: the class token of this export is reduced by principal "
                    "components of the last block (compact=), which do not fit an earlier one; "
                    "leave blocks out, or embed the whole backbone."
                )

    def _with_shapes(self, size: tuple[int, int]) -> list[Column]:
        """The columns with the shapes that the backbone gives for a black image."""
        backbone = self.backbone
        black = torch.zeros(
            (1, backbone.in_chans, *size), dtype=dtype_of(backbone), device=device_of(backbone)
        )
        try:
            with frozen(backbone):
                tokens = self._tokens(black)
        except NotImplementedError as error:
            raise UserError(
                f"blocks={self.blocks}: {type(backbone).__qualname__} gives no features of its "
                "blocks; leave blocks out."
            ) from error
        columns = []
        for column in self.columns:
            of_block = tokens[column.block]
            if column.feature != "cls" and not of_block.patches.shape[1]:
                raise UserError(
                    f"features={column.feature}: {type(backbone).__qualname__} gives no patch "
                    "tokens; ask for features=cls."
                )
            shape = tuple(_of(of_block, column.feature).shape[1:])
            columns.append(column._replace(shape=shape, grid=of_block.grid))
        return columns

    def about(self) -> dict[str, Any]:
        """Shape, block and grid of each column, as plain JSON."""
        return {
            column.name: {"shape": [*column.shape], "block": column.block}
            | ({"grid": [*column.grid]} if column.feature == "patches" else {})
            for column in self.columns
        }

    @property
    def image_bytes(self) -> int:
        """Bytes of one image's features."""
        return self.dtype.itemsize * sum(math.prod(column.shape) for column in self.columns)


_EXAMPLES = {"features": "features=cls", "blocks": "'blocks=[-1]'"}


def _of(tokens: Tokens, feature: Feature) -> Tensor:
    if feature == "cls":
        return tokens.cls
    return tokens.patches.float().mean(dim=1) if feature == "mean_patch" else tokens.patches


def _number(block: int, backbone: Backbone) -> int:
    """A block's number from 0."""
    num = backbone.num_blocks
    if not -num <= block < num:
        raise UserError(
            f"blocks={block}: the network has {num} blocks, so a number from {-num} to {num - 1}."
        )
    return block % num
