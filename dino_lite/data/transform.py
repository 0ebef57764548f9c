"""Images as a backbone expects them, from whatever a program holds them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from dino_lite.contracts import UserError
from dino_lite.data.clean import clean
from dino_lite.data.decode import decode, decode_image
from dino_lite.data.photometric import Normalize
from dino_lite.data.pixels import to_8_bits, to_channels
from dino_lite.data.preprocessing import Preprocessing


class Transform:
    """Prepares images as an evaluation does: read, upright, resized, cropped and normalized.

    An image is a path, a PIL image, an array "H W" or "H W C", or a tensor "C H W" as torchvision
    reads them; arrays and tensors are uint8, or uint16, which is scaled by its bits. Gray images
    become RGB and RGB gray as the backbone takes them, and alpha is dropped.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._normalize = Normalize(preprocessing.mean, preprocessing.std)

    @torch.no_grad()
    def __call__(self, images: Any) -> Float[Tensor, "n C H W"]:
        """One image or a list of them (or a batch as one tensor "n C H W" or array "n H W C"), as
        one float32 batch on the CPU. Raises UserError for what is no image.
        """
        several = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
        batch = list(images) if several else [images]
        if not batch:
            raise UserError("transform needs at least one image.")
        pixels = [clean(self._read(image, i), self.preprocessing) for i, image in enumerate(batch)]
        normalized: Tensor = self._normalize(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))
        return normalized

    def __repr__(self) -> str:
        how = self.preprocessing
        return f"Transform({how.said()}; mean {[*how.mean]}, std {[*how.std]})"

    def _read(self, image: object, number: int) -> UInt8[np.ndarray, "H W C"]:
        """The image's pixels, upright; `number` is its place in the batch, for messages."""
        channels, name = len(self.preprocessing.mean), f"image {number}"
        try:
            if isinstance(image, str | Path):
                name = str(image)
                with Path(image).expanduser().open("rb") as file:
                    return decode(file, channels)
            if isinstance(image, Image.Image | np.ndarray | Tensor):
                return pixels_of(image, channels)
        except (OSError, ValueError) as error:
            raise UserError(f"transform: {name} cannot be used: {error}.") from error
        raise UserError(
            f"transform: {name} is a {type(image).__name__}: give paths, PIL images, arrays of "
            "rows, columns and channels, or tensors of channels, rows and columns."
        )


def pixels_of(
    image: Image.Image | np.ndarray | Tensor, channels: int = 3
) -> UInt8[np.ndarray, "H W C"]:
    """A PIL image, an array "H W" or "H W C", or a tensor "H W" or "C H W", as `decode` would give
    it. Raises OSError or ValueError.
    """
    if isinstance(image, Image.Image):
        return decode_image(image, channels)
    if isinstance(image, Tensor):
        values = image.detach().cpu()
        image = (values.permute(1, 2, 0) if values.ndim == 3 else values).numpy()
    pixels = to_8_bits(image)
    if pixels.ndim == 3 and channels in (1, 3) and pixels.shape[2] in (2, 4):
        pixels = pixels[..., :-1]  # gray or RGB with alpha
    return to_channels(pixels, channels)
