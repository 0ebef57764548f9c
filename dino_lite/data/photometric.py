"""Photometric changes of a batch of crops on the device, each crop with its own parameters.

PIL's 8-bit arithmetic in float32: values are integer gray levels from 0 to 255 after every
operation, equal to those of `data.exact` up to rounding (measured by golden cases A10, A11).
Nothing synchronizes with the device, and `change` compiles to a single graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float, Float32, Int, Shaped
from torch import Tensor, nn

from dino_lite.contracts import Crops, UserError
from dino_lite.data.crops import COLUMNS, JITTER, ORDERS
from dino_lite.data.resample import to_levels
from dino_lite.settings.kinds import Numbers, PositiveNumbers
from dino_lite.settings.validate import checked

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Images = Float32[Tensor, "n C h w"]
Operation = Callable[..., Tensor]
_ORDERS = torch.tensor(ORDERS)
_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # PIL's weights of R, G, B, exact in float32


def photometric(crops: Crops, turned: bool = True, blur_kernel: int | None = None) -> Crops:
    """Crops changed according to their `draws`; `turned` False skips vertical flips and rotations.

    `extra` holds global crops, to which only the geometry is applied.
    """
    num = crops.globals_.shape[0]

    def each(how: Callable[[Tensor, Tensor], Tensor], images: Tensor, draws: Tensor) -> Tensor:
        return how(images.flatten(0, 1), draws.flatten(0, 1)).view(images.shape)

    changed = partial(change, turned=turned, blur_kernel=blur_kernel)
    laid, locals_ = partial(lay, turned=turned), crops.locals_
    return crops._replace(
        globals_=each(changed, crops.globals_, crops.draws[:num]),
        locals_=None if locals_ is None else each(changed, locals_, crops.draws[num:]),
        extra={name: each(laid, more, crops.draws[:num]) for name, more in crops.extra.items()},
    )


def change(
    images: Shaped[Tensor, "n C h w"],
    params: Float32[Tensor, "n A"],
    turned: bool = True,
    blur_kernel: int | None = None,
) -> Images:
    """n square crops, uint8 or gray levels, changed by `params`, the values of COLUMNS.

    Saturation, hue and gray do not apply to crops without three channels.
    """
    column = dict(zip(COLUMNS, params.unbind(1), strict=True))
    x = lay(images, params, turned)
    first = list(COLUMNS).index(JITTER[0])
    x = jitter(x, params[:, first : first + len(JITTER)], column["order"])
    if x.shape[1] == 3:
        x = where(column["gray"] > 0, gray, x)
    blurred = blur if blur_kernel is None else partial(gaussian_blur, kernel=blur_kernel)
    x = where(column["blur"] > 0, blurred, x, column["blur"])
    return where(column["solarize"] > 0, solarize, x)


def lay(
    images: Shaped[Tensor, "n C h w"], params: Float32[Tensor, "n A"], turned: bool = True
) -> Images:
    """A copy in gray levels, flipped and rotated according to `params`."""
    column = dict(zip(COLUMNS, params.unbind(1), strict=True))
    x = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    x = where(column["flip"] > 0, _mirror, x)
    if turned:
        x = where(column["vertical"] > 0, _upside_down, x)
        for turns in (1, 2, 3):
            x = where(column["turns"] == turns, partial(torch.rot90, k=turns, dims=(2, 3)), x)
    return x


def where(mask: Bool[Tensor, "n"], operation: Operation, x: Images, *params: Tensor) -> Images:
    """Apply `operation` to the crops in `mask` only; may write to `x`. The result of an operation
    must be new memory, since the next one may write to it.

    On the CPU only those in the mask are computed. On other devices all are: counting them would
    synchronize, and a compiled graph needs static shapes.
    """
    if x.is_cpu and not torch.compiler.is_compiling():
        rows = mask.nonzero()[:, 0]
        if len(rows) == len(x):
            return operation(x, *params)
        if len(rows):
            changed = operation(x.index_select(0, rows), *(param[rows] for param in params))
            x.index_copy_(0, rows, changed)
        return x
    return torch.where(mask[:, None, None, None], operation(x, *params), x)


def jitter(x: Images, factors: Float32[Tensor, "n 4"], order: Float32[Tensor, "n"]) -> Images:
    """Brightness, contrast, saturation and hue, in each crop's own order."""
    kinds = _ORDERS.to(x.device, non_blocking=True)[order.long()]  # n 4: the order of operations
    has_color = x.shape[1] == 3
    for kind, value in zip(kinds.unbind(1), factors.gather(1, kinds).unbind(1), strict=True):
        blended = kind < 3 if has_color else kind < 2
        x = where(blended & (value != 1), blend, x, kind, value)
        if has_color:
            x = where((kind == 3) & (value != 0), hue, x, value)
    return x


def blend(x: Images, kind: Int[Tensor, "n"], factor: Float32[Tensor, "n"]) -> Images:
    """factor·x + (1−factor)·base, where base is black for brightness (kind 0), the rounded mean
    luma of the crop for contrast (1), its luma for saturation (2).

    Product and sum are rounded separately, as in PIL.
    """
    kind, factor = kind[:, None, None, None], factor[:, None, None, None]
    gray_levels = luma(x)
    mean = (gray_levels.mean((1, 2, 3), keepdim=True) + 0.5).floor_()
    base = torch.where(kind == 2, gray_levels, torch.where(kind == 1, mean, 0.0))
    return (x - base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def hue(x: Images, shift: Float32[Tensor, "n"]) -> Images:
    """Rotate hue by trunc(255·shift) of 256 levels; hue and saturation have 8 bits."""
    value, least = x.amax(1), x.amin(1)  # n h w
    spread = value - least
    red, green, blue = x.unbind(1)
    # Position of each pixel on the color circle, in sixths: red at 0, green at 2, blue at 4.
    from_red, from_green, from_blue = (
        green - blue,
        torch.add(blue - red, spread, alpha=2),
        torch.add(red - green, spread, alpha=4),
    )
    sixths = torch.where(green == value, from_green, from_blue)
    turn = torch.where(red == value, from_red, sixths).div_(spread.clamp(min=1)).div_(6)
    levels = turn.add_(turn < 0).mul_(255).floor_()
    levels += (255 * shift).trunc()[:, None, None]
    levels -= 256 * (levels / 256).floor_()
    strength = (255 * spread).div_(value.clamp(min=1)).floor_().mul_(1 / 255)
    sixths = levels.mul_(6 / 255)
    # Value minus channel: piecewise linear along the circle.
    lacks = torch.stack(
        [2 - (sixths - 3).abs_(), (sixths - 2).abs_() - 1, (sixths - 4).abs_() - 1], 1
    ).clamp_(0, 1)
    value = value[:, None]
    return torch.addcmul(value, value * strength[:, None], lacks, value=-1).add_(0.5).floor_()


def gray(x: Images) -> Images:
    """Luma in all channels."""
    return luma(x).repeat(1, 3, 1, 1)


def blur(x: Images, radius: Float32[Tensor, "n"]) -> Images:
    """PIL's Gaussian blur of standard deviation `radius` pixels: three box blurs in each direction.

    Each rounds to integer levels, so a small radius has no effect. The box's width follows Gwosdek
    et al. 2011, section 2.
    """
    size = x.shape[-1]
    if size == 1:
        return x
    box = box_blur(radius, size)  # n w w
    across, down = box.transpose(-1, -2), box[:, None]
    for _ in range(3):
        x = to_levels(torch.bmm(x.flatten(1, 2), across)).view(x.shape)
    for _ in range(3):
        x = to_levels(torch.matmul(down, x))
    return x


def box_blur(radius: Float32[Tensor, "n"], size: int) -> Float32[Tensor, "n size size"]:
    """One of three box filters that approximate a Gaussian of `radius`, as a matrix; edge pixels
    are repeated.

    A box of half-width R: weight 1 up to floor(R), the remainder on the next pixel, all / (2R+1).
    """
    variance = radius.square()[:, None, None] / 3
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    half = whole + rest / (6 * (variance - (whole + 1).square()))  # R
    pixels = torch.arange(size, device=radius.device, dtype=torch.float32)
    box = (half + 1 - (pixels[:, None] - pixels).abs()).clamp(0, 1)
    # The edge pixel is repeated: it gets the tail of the sum 1 + … + 1 + rest.
    first = (half[..., 0] + 1 - pixels).clamp(min=0)  # n size
    box[..., 0], box[..., -1] = first, first.flip(-1)
    # PIL's fixed-point weights add up to a little less than 1, so that ties are rounded down.
    return box * ((1 - 2.0**-21) / (2 * half + 1))


def gaussian_blur(x: Images, sigma: Float32[Tensor, "n"], kernel: int) -> Images:
    """Gaussian of `sigma` pixels, truncated to `kernel` pixels: `exact.gaussian_blur`."""
    size = x.shape[-1]
    if size == 1:
        return x
    pixels = torch.arange(size, device=x.device)
    offsets = torch.arange(kernel, device=x.device) - kernel // 2
    weights = (-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]).square()).exp()
    weights = weights / weights.sum(1, keepdim=True)  # n kernel
    # Reflect at the edges.
    source = size - 1 - ((pixels + offsets[:, None]) % (2 * size - 2) - (size - 1)).abs()
    spread = (source[..., None] == pixels).float().flatten(1)  # kernel size*size
    matrix = (weights @ spread).view(-1, size, size)
    x = torch.bmm(x.flatten(1, 2), matrix.transpose(-1, -2)).view(x.shape)
    return torch.matmul(matrix[:, None], x).round_()


def solarize(x: Images) -> Images:
    """Invert values of at least 128."""
    return torch.where(x >= 128, 255 - x, x)


def luma(x: Images) -> Float32[Tensor, "n 1 h w"]:
    """0.299 R + 0.587 G + 0.114 B in integer levels; without color, the mean of the channels."""
    if x.shape[1] == 1:
        return x
    if x.shape[1] != 3:
        return to_levels(x.mean(1, keepdim=True))
    r, g, b = (x[:, i : i + 1] * _LUMA[i] for i in range(3))
    return (r + g + b).add_(0.5).floor_()


def _mirror(x: Images) -> Images:
    return x.flip(3)


def _upside_down(x: Images) -> Images:
    return x.flip(2)


class Normalize(nn.Module):
    """(x/255 - mean)/std per channel, x from 0 to 255: the input of every network.

    `mean` and `std` are float64 on the host and not buffers, so checkpoints do not contain them.
    """

    @checked
    def __init__(self, mean: Numbers = IMAGENET_MEAN, std: PositiveNumbers = IMAGENET_STD) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise UserError(
                f"The normalization has mean {list(mean)} and std {list(std)}, but needs one of "
                "each per channel."
            )
        self.mean = torch.tensor(mean, dtype=torch.float64)
        self.std = torch.tensor(std, dtype=torch.float64)
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(
        self, images: Shaped[Tensor, "*lead C H W"], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "*lead C H W"]:
        """Normalize uint8, or gray levels in floats (overwritten), in at least float32; then round
        to `dtype`. The result is contiguous.
        """
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
        """Factors of x*scale + shift, cached per device: copying them from the host each step would
        synchronize.
        """
        key = (device, dtype)
        if key not in self._constants:
            scale, shift = 1 / (255 * self.std), -self.mean / self.std
            self._constants[key] = (
                scale.to(dtype).to(device).view(-1, 1, 1),
                shift.to(dtype).to(device).view(-1, 1, 1),
            )
        return self._constants[key]
