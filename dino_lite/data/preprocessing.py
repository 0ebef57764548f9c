"""How a photograph becomes the input of a network at evaluation: size, crop and normalization."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Rule = Literal["dino_lite", "timm", "hugging_face"]


class Preprocessing(NamedTuple):
    """Resize the shorter side to size / `crop`, crop the center, scale pixels to [0, 1], normalize.

    `size` is (rows, columns) in pixels; `mean` and `std` have one value per channel. The default
    `crop` is the published protocol, 256 to 224 pixels (Caron et al. 2021, appendix). With
    `squash`, resize to size / `crop` without keeping the aspect ratio. With `border`, resize the
    longer side, and fill what is missing with the mean color.

    `rule` says how size / crop and the center are rounded: "dino_lite" to the nearest pixel, and an
    image of exactly `size` is left as it is; "timm" rounds size / crop down; "hugging_face" rounds
    the center down, and crops `size` from a shorter side of min(size) / crop.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: float = 224 / 256
    squash: bool = False
    interpolation: Interpolation = "bicubic"
    border: bool = False
    rule: Rule = "dino_lite"

    @property
    def pixels(self) -> int | str:
        """The size in results: one number for a square, else "rows x columns"."""
        rows, columns = self.size
        return rows if rows == columns else f"{rows}x{columns}"

    @property
    def geometry(self) -> tuple[float | bool | str, ...]:
        """What else decides the pixels, besides `size`: empty for the default."""
        told, usual = self[3:], Preprocessing(self.size)[3:]
        return () if told == usual else told

    @classmethod
    def read(cls, told: dict[str, Any]) -> Preprocessing:
        """From `_asdict()` as JSON has it, with lists for tuples. Raises TypeError for others."""
        found: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
        return cls(**found)

    def said(self) -> str:
        """What is done, as a clause."""
        rows, columns = self.resized(*self.size)
        whole = f"{rows}x{columns}"
        if not self.squash:
            side = "longer" if self.border else "shorter"
            whole = f"the {side} side of {min(rows, columns)} pixels"
        same = (rows, columns) == self.size and self.squash
        crop = "" if same else f", then the center of {self.size[0]}x{self.size[1]}"
        return f"resized to {whole} ({self.interpolation}){crop}"

    def at(self, size: int | tuple[int, int]) -> Preprocessing:
        """The same for images of another size, with the same ratio of crop to image."""
        return self._replace(size=(size, size) if isinstance(size, int) else size)

    def always_resized(self) -> Preprocessing:
        """The same by timm's rule, which also resizes an image of exactly `size`. `crop` is such
        that size / `crop`, rounded down, is what it was.
        """
        if self.rule == "timm":
            return self
        rows, columns = self._replace(squash=True).resized(*self.size)
        highest = min(self.size[0] / rows, self.size[1] / columns)
        lowest = max(self.size[0] / (rows + 1), self.size[1] / (columns + 1))
        keep = lowest < self.crop <= highest or lowest >= highest  # the latter: none fits both
        return self._replace(crop=self.crop if keep else highest - 1e-9, rule="timm")

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns to which an image is resized before it is cropped."""
        whole = math.floor if self.rule == "timm" else round
        rows, columns = (whole(side / self.crop) for side in self.size)
        if self.squash:
            return rows, columns
        if self.border or (rows != columns and self.rule != "hugging_face"):
            ratio = (max if self.border else min)(height / rows, width / columns)
            return round(height / ratio), round(width / ratio)
        # The longer side is rounded down, as in torchvision's Resize.
        target, shorter = min(rows, columns), min(height, width)
        return target * height // shorter, target * width // shorter

    def corner(self, rows: int, columns: int) -> tuple[int, int]:
        """Top and left of the crop in an image of that size; negative where it is padded."""
        top, left = (self._before(rows, self.size[0]), self._before(columns, self.size[1]))
        return top, left

    def _before(self, found: int, wanted: int) -> int:
        if found < wanted:
            return -((wanted - found) // 2)
        return (found - wanted) // 2 if self.rule == "hugging_face" else round((found - wanted) / 2)
