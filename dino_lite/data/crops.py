"""Multi-crop as DINO published it, worker side: PIL's 8-bit arithmetic to the last bit.

Two halves: `MultiCrop.draw` decides (boxes and parameters of all crops, from the counter hash, no
image needed) and `apply` makes one crop's pixels. Source: Caron et al. 2021, section 3.2, after
SwAV's multi-crop and BYOL's photometry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int, Int64, UInt8
from PIL import Image, ImageChops, ImageFilter

from dino_lite.contracts import Crops, UserError
from dino_lite.data import draws

# The parameters of a crop, in this order wherever they are stored, each with the value that says
# "not applied".
COLUMNS = {
    "flip": 0.0,  # 0 or 1, as gray and solarize
    "brightness": 1.0,  # factors
    "contrast": 1.0,
    "saturation": 1.0,
    "hue": 0.0,  # in turns of the color circle
    "order": 0.0,  # which of ORDERS
    "gray": 0.0,
    "blur": 0.0,  # radius in pixels of the crop
    "solarize": 0.0,
}
JITTER = ("brightness", "contrast", "saturation", "hue")
NO_JITTER = tuple(COLUMNS[name] for name in JITTER)
ORDERS = tuple(permutations(range(4)))  # the 24 sequences of JITTER

NUM_TRIES = 10  # boxes tried before the centered fallback
NUM_DRAWS = 2 * NUM_TRIES + 13  # uniforms of a crop: crop s owns draws s*NUM_DRAWS and on


class Photometric(NamedTuple):
    """How often one kind of crop is changed, and how strongly (half-widths of factors)."""

    flip_prob: float = 0.5
    jitter_prob: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray_prob: float = 0.2
    blur_prob: float = 0.5
    blur_radius: Sequence[float] = (0.1, 2.0)  # pixels
    solarize_prob: float = 0.0


GLOBAL_1 = Photometric(blur_prob=1.0)
GLOBAL_2 = Photometric(blur_prob=0.1, solarize_prob=0.2)
LOCAL = Photometric(blur_prob=0.5)


# ------------------------------------------------------------------------------- one crop's pixels


@cache
def _black(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size)


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """factor·image, clipped to 8 bits."""
    return Image.blend(_black(image.size), image, factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """factor·image + (1−factor)·m, m the rounded mean luma of the whole image."""
    luma = np.frombuffer(image.convert("L").tobytes(), np.uint8)
    mean = int(luma.sum(dtype=np.uint32) / luma.size + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    """factor·image + (1−factor)·luma."""
    return Image.blend(image.convert("L").convert("RGB"), image, factor)


def hue(image: Image.Image, shift: float) -> Image.Image:
    """Turn the color circle by trunc(255·shift) of 256 levels of 8-bit HSV."""
    levels = int(shift * 255) % 256
    turned = image.convert("HSV")
    if levels:
        turned = ImageChops.add_modulo(turned, Image.new("HSV", image.size, (levels, 0, 0)))
    return turned.convert("RGB")


def solarize(
    pixels: UInt8[np.ndarray, "h w 3"], threshold: int = 128
) -> UInt8[np.ndarray, "h w 3"]:
    """Invert the values from `threshold` up."""
    return np.where(pixels >= threshold, ~pixels, pixels)


OPERATIONS: tuple[Callable[[Image.Image, float], Image.Image], ...]
OPERATIONS = (brightness, contrast, saturation, hue)


def resized_crop(image: Image.Image, box: Sequence[int], size: int) -> Image.Image:
    """`box` (top, left, height, width in pixels) as size x size pixels, bicubic, antialiased.

    Cropped before it is resized: pixels outside the box have no part in it.
    """
    top, left, height, width = box
    crop = image.crop((left, top, left + width, top + height))
    return crop.resize((size, size), Image.Resampling.BICUBIC)


def augment(image: Image.Image, params: Sequence[float]) -> UInt8[np.ndarray, "h w 3"]:
    """An RGB image changed as `params`, the values of COLUMNS, say."""
    flip, *factors, order, gray, blur, invert = params
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for i in ORDERS[int(order)]:
        if factors[i] != NO_JITTER[i]:
            image = OPERATIONS[i](image, factors[i])
    if gray:
        image = image.convert("L")
    if blur > 0:
        image = image.filter(ImageFilter.GaussianBlur(blur))
    if gray:  # only now: to blur one channel takes a third of the time and gives the same
        image = image.convert("RGB")
    pixels: np.ndarray = np.asarray(image)
    return solarize(pixels) if invert else pixels


def apply(
    image: Image.Image, box: Sequence[int], params: Sequence[float], size: int
) -> UInt8[np.ndarray, "size size 3"]:
    """One crop of an RGB image: cut out and resized, then changed."""
    return augment(resized_crop(image, box, size), params)


# -------------------------------------------------------------------------------- all crops' draws


def _range(name: str, values: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """The two ends of a range, checked: low <= first <= second <= high."""
    if len(values) != 2 or not low <= values[0] <= values[1] <= high:
        raise UserError(
            f"augment.{name} is {list(values)}, but must be two rising numbers "
            f"between {low:g} and {high:g}."
        )
    return float(values[0]), float(values[1])


def _check(name: str, kind: Photometric) -> None:
    for field in ("flip_prob", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob"):
        value = getattr(kind, field)
        if not 0 <= value <= 1:
            raise UserError(f"augment.{name}.{field} is {value}, but must lie in [0, 1].")
    for field, high in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)):
        value = getattr(kind, field)
        if not 0 <= value <= high:
            raise UserError(f"augment.{name}.{field} is {value}, but must lie in [0, {high}].")
    _range(f"{name}.blur_radius", kind.blur_radius, 0.0, 1e3)


class MultiCrop:
    """Two global crops and `num_local` local ones of each image, all keyed by (seed, epoch, index).

    Sizes in pixels, scales as fractions of the image's area, `ratio` is width over height.
    Errors: UserError for values outside their range.
    """

    def __init__(
        self,
        global_size: int,
        local_size: int,
        num_local: int,
        global_scale: Sequence[float] = (0.4, 1.0),
        local_scale: Sequence[float] = (0.05, 0.4),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        global_1: Photometric = GLOBAL_1,
        global_2: Photometric = GLOBAL_2,
        local: Photometric = LOCAL,
        seed: int = 0,
    ) -> None:
        for name, value, low in (
            ("global_size", global_size, 1),
            ("local_size", local_size, 1),
            ("num_local", num_local, 0),
        ):
            if value < low:
                raise UserError(f"augment.{name} is {value}, but must be at least {low}.")
        tiny = 1e-6
        scales = 2 * [_range("global_scale", global_scale, tiny, 1.0)]
        scales += num_local * [_range("local_scale", local_scale, tiny, 1.0)]
        for name, kind in (("global_1", global_1), ("global_2", global_2), ("local", local)):
            _check(name, kind)
        self.global_size, self.local_size, self.num_local = global_size, local_size, num_local
        self.scales = np.array(scales)  # S 2
        self.ratio = _range("ratio", ratio, 1e-3, 1e3)
        self.kinds = [global_1, global_2] + num_local * [local]
        self.seed = seed

    def draw(
        self,
        epochs: Int[np.ndarray, "n"],
        indices: Int[np.ndarray, "n"],
        heights: Int[np.ndarray, "n"],
        widths: Int[np.ndarray, "n"],
    ) -> tuple[Int64[np.ndarray, "S n 4"], Float32[np.ndarray, "S n 9"]]:
        """Boxes (top, left, height, width in pixels) and COLUMNS of all crops of n images."""
        num_crops = len(self.kinds)
        u = draws.uniforms(self.seed, epochs, indices, num_crops * NUM_DRAWS)  # n S*U
        u = u.reshape(-1, num_crops, NUM_DRAWS).transpose(2, 1, 0)  # U S n
        split = 2 * NUM_TRIES + 2
        return self._boxes(u[:split].astype(np.float64), heights, widths), self._params(u[split:])

    def _boxes(
        self, u: np.ndarray, heights: Int[np.ndarray, "n"], widths: Int[np.ndarray, "n"]
    ) -> Int64[np.ndarray, "S n 4"]:
        """The first of the tried boxes that fits, else a centered one of clamped aspect."""
        low, high = self.scales[:, :1], self.scales[:, 1:]  # S 1
        log_ratio = np.log(self.ratio)
        area = (low + (high - low) * u[:NUM_TRIES]) * (heights * widths)  # tries S n
        aspect = np.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * u[NUM_TRIES:-2])
        width, height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (width > 0) & (width <= widths) & (height > 0) & (height <= heights)
        first = fits.argmax(0)[None]  # 1 S n
        found = fits.any(0)
        shape = widths / heights  # n
        fallback_width = np.where(shape > self.ratio[1], np.rint(heights * self.ratio[1]), widths)
        fallback_height = np.where(shape < self.ratio[0], np.rint(widths / self.ratio[0]), heights)
        width = np.where(found, np.take_along_axis(width, first, 0)[0], fallback_width)  # S n
        height = np.where(found, np.take_along_axis(height, first, 0)[0], fallback_height)
        spare_height, spare_width = heights - height, widths - width
        top = np.where(found, u[-2] * (spare_height + 1), spare_height / 2) // 1
        left = np.where(found, u[-1] * (spare_width + 1), spare_width / 2) // 1
        return np.stack([top, left, height, width], -1).astype(np.int64)

    def _params(self, u: Float32[np.ndarray, "11 S n"]) -> Float32[np.ndarray, "S n 9"]:
        """Eleven uniforms to the nine COLUMNS."""

        def each(field: str) -> Float32[np.ndarray, "S 1"]:
            return np.array([[getattr(kind, field)] for kind in self.kinds], np.float32)

        jittered = u[1] < each("jitter_prob")

        def factor(strength: str, neutral: float, uniform: np.ndarray) -> np.ndarray:
            return np.where(jittered, neutral + each(strength) * (2 * uniform - 1), neutral)

        radii = np.array([kind.blur_radius for kind in self.kinds], np.float32)  # S 2
        radius = radii[:, :1] + (radii[:, 1:] - radii[:, :1]) * u[9]
        columns = [
            u[0] < each("flip_prob"),
            factor("brightness", 1.0, u[2]),
            factor("contrast", 1.0, u[3]),
            factor("saturation", 1.0, u[4]),
            factor("hue", 0.0, u[5]),
            np.where(jittered, u[6] * len(ORDERS) // 1, 0),
            u[7] < each("gray_prob"),
            np.where(u[8] < each("blur_prob"), radius, 0),
            u[10] < each("solarize_prob"),
        ]
        return np.stack([column.astype(np.float32) for column in columns], -1)

    def __call__(
        self,
        images: Sequence[Image.Image],
        epochs: Int[np.ndarray, "n"],
        indices: Int[np.ndarray, "n"],
    ) -> Crops:
        """Crop n RGB images, each in its epoch. uint8, `index` as given, no labels.

        The pixels lie in memory as height, width, channel, as PIL has them; Normalize puts them in
        order on the device.
        """
        widths, heights = np.array([image.size for image in images]).T
        boxes, params = self.draw(epochs, indices, heights, widths)
        sizes = 2 * [self.global_size] + self.num_local * [self.local_size]
        n, large, small = len(images), self.global_size, self.local_size
        globals_ = np.empty((2, n, large, large, 3), np.uint8)
        locals_ = np.empty((self.num_local, n, small, small, 3), np.uint8)
        box_rows, param_rows = boxes.tolist(), params.tolist()  # Python numbers: faster one by one
        for i, image in enumerate(images):
            for s, size in enumerate(sizes):
                pixels = apply(image, box_rows[s][i], param_rows[s][i], size)
                (globals_ if s < 2 else locals_)[s if s < 2 else s - 2, i] = pixels
        sides = np.stack([heights, widths, heights, widths], -1)  # n 4
        return Crops(
            globals_=torch.from_numpy(globals_).permute(0, 1, 4, 2, 3),
            locals_=torch.from_numpy(locals_).permute(0, 1, 4, 2, 3) if self.num_local else None,
            index=torch.from_numpy(indices.astype(np.int64)),
            labels=None,
            boxes=torch.from_numpy((boxes / sides).astype(np.float32)),
            draws=torch.from_numpy(params),
        )
