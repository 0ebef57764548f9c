"""Boxes cut out and resized: bicubic (a = -1/2), antialiased, as in PIL, but much faster.

Image by image in the worker, or in batches on the device. Both round to integer levels between the
two directions, as PIL does, and are within one level of it (golden case A11).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, UInt8
from torch import Tensor

from dino_lite.contracts import Crops
from dino_lite.data.crops import Drawn


def make_crops(
    images: Sequence[UInt8[np.ndarray, "_ _ C"]],
    drawn: Drawn,
    out: Sequence[UInt8[np.ndarray, "n _ _ C"]],
) -> None:
    """Fill `out`, one array per crop, from n images: cut out and resize only.

    All other changes are made on the device, see `data.photometric`.
    """
    for i, pixels in enumerate(images):
        for crops, boxes in zip(out, drawn.boxes, strict=True):
            crops[i] = resized_crop(pixels, boxes[i].tolist(), crops.shape[1])


def resized_crop(
    image: UInt8[np.ndarray, "H W C"], box: Sequence[int], size: int
) -> UInt8[np.ndarray, "size size C"]:
    """`box` (top, left, height, width in pixels) as size x size pixels."""
    top, left, height, width = box
    # A contiguous copy of the box is faster to read.
    pixels = np.array(image[top : top + height, left : left + width], order="C")
    if (height, width) == (size, size):
        return pixels
    # Not pixels[None]: from its strides torch does not recognize channels-last memory, and takes
    # twice as long.
    batch = torch.from_numpy(pixels.reshape(1, *pixels.shape)).permute(0, 3, 1, 2)
    crop = F.interpolate(batch, size=(size, size), mode="bicubic", antialias=True)
    return crop[0].permute(1, 2, 0).numpy()


def fill(
    crops: Crops,
    images: UInt8[Tensor, "N H W C"],
    groups: Sequence[tuple[int, int]],
    gram_size: int | None = None,
) -> Crops:
    """Make the pixels of crops from whole images of one size on the same device.

    `groups`: number and size in pixels of the global crops, and of the local ones if there are any;
    `gram_size`: size of the additional global crops, if any.
    """
    whole = images[crops.index].permute(0, 3, 1, 2).float().contiguous()  # n C H W
    height, width = whole.shape[-2:]
    sides = (height, width, height, width)
    boxes = torch.stack(
        [part * n for part, n in zip(crops.boxes.unbind(-1), sides, strict=True)], -1
    )
    boxes, num = boxes.round(), groups[0][0]
    made = [
        resized_crops(whole, part, size)
        for part, (_, size) in zip((boxes[:num], boxes[num:]), groups, strict=False)
    ]
    gram = {} if gram_size is None else {"gram": resized_crops(whole, boxes[:num], gram_size)}
    locals_ = made[1] if len(made) > 1 else None
    return crops._replace(globals_=made[0], locals_=locals_, extra=crops.extra | gram)


def resized_crops(
    images: Float32[Tensor, "n C H W"], boxes: Float32[Tensor, "s n 4"], size: int
) -> Float32[Tensor, "s n C size size"]:
    """s boxes (top, left, height, width in pixels) of each image as size x size pixels, by a matrix
    from the left and another from the right.

    For small images: the cost is proportional to H·W·size, independent of the boxes.
    """
    height, width = images.shape[-2:]
    top, left, high, wide = boxes.unbind(-1)  # s n each
    across = weights(left, wide, size, width).transpose(-1, -2)  # s n W size
    down = weights(top, high, size, height)  # s n size H
    rows = torch.matmul(images.flatten(1, 2), across)  # s n C*H size
    rows = to_levels(rows).view(*rows.shape[:2], -1, height, size)  # s n C H size
    return to_levels(torch.matmul(down[:, :, None], rows))


def weights(
    start: Float32[Tensor, "*n"], length: Float32[Tensor, "*n"], size: int, full: int
) -> Float32[Tensor, "*n size full"]:
    """Weights of `full` input pixels for each of `size` output pixels, which cover `length` of
    them.

    The kernel is stretched when downsampling; its part outside the box is cut off and the rest
    normalized.
    """
    start, length = start[..., None, None], length[..., None, None]
    scale = length / size
    centers = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    pixels = torch.arange(full, device=start.device) + 0.5
    kernel = bicubic((pixels - centers).div_(scale.clamp(min=1)))
    kernel *= (pixels > start) & (pixels < start + length)
    return kernel.div_(kernel.sum(-1, keepdim=True))


def bicubic(x: Float32[Tensor, "*n"]) -> Float32[Tensor, "*n"]:
    """Keys' kernel with a = -1/2: 1 at 0, 0 at 1 and from 2 on. Source: Keys 1981, equation 4.

    Both cubics, factored: u²(u−1)/2 + v²(1−2v), with u = 2−|x| and v = 1−|x|, clamped at 0.
    """
    u = (2 - x.abs()).clamp_(min=0)
    w = u - 1
    v = w.clamp(min=0)
    return u.square_().mul_(w).mul_(0.5).addcmul_(v * v, 1 - 2 * v)


def to_levels(x: Float32[Tensor, "*n"]) -> Float32[Tensor, "*n"]:
    """Round to 0 … 255, ties up."""
    return x.add(0.5).floor_().clamp_(0, 255)
