"""What happens to pixels on the device: bytes become normalized floats."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dino_lite.contracts import Crops, UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """(x/255 - mean)/std per channel, x bytes: what every network of the project sees.

    `mean` and `std` are float64 on the host and no buffers: checkpoints do not repeat them.
    """

    def __init__(
        self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
    ) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise UserError(
                f"The normalization has mean {list(mean)} and std {list(std)}, but needs one of "
                "each per channel, and every std above 0."
            )
        self.mean = torch.tensor(mean, dtype=torch.float64)
        self.std = torch.tensor(std, dtype=torch.float64)
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(
        self, images: UInt8[Tensor, "*lead C H W"], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "*lead C H W"]:
        """Normalize in at least float32, then round to `dtype`. The result is contiguous."""
        exact = torch.promote_types(dtype, torch.float32)
        scale, shift = self._scale_and_shift(images.device, exact)
        floats = images.to(exact, memory_format=torch.contiguous_format)
        return floats.mul_(scale).add_(shift).to(dtype)

    def crops(self, crops: Crops, dtype: torch.dtype = torch.float32) -> Crops:
        """The same crops, normalized."""
        return crops._replace(
            globals_=self(crops.globals_, dtype),
            locals_=None if crops.locals_ is None else self(crops.locals_, dtype),
            extra={name: self(images, dtype) for name, images in crops.extra.items()},
        )

    def _scale_and_shift(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x*scale + shift, kept per device: a copy from the host each step would wait for it."""
        key = (device, dtype)
        if key not in self._constants:
            scale, shift = 1 / (255 * self.std), -self.mean / self.std
            self._constants[key] = (
                scale.to(dtype).to(device).view(-1, 1, 1),
                shift.to(dtype).to(device).view(-1, 1, 1),
            )
        return self._constants[key]
