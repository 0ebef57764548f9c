"""Multi-crop: the boxes and photometric parameters of all crops, drawn without looking at the
image.

`MultiCrop.draw` computes them from the counter hash. Pixels are made by `data.exact` (PIL, in the
worker) or by `data.resample` and `data.photometric` (batched, on the device). Source: Caron et al.
2021, section 3.2, after SwAV's multi-crop and BYOL's photometry.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Annotated, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int64

from dino_lite import draws
from dino_lite.settings.kinds import Count, Fraction, Must, Shares, Size, rising, within
from dino_lite.settings.validate import checked

# The parameters of a crop in the order they are stored, each with its neutral value.
COLUMNS = {
    "flip": 0.0,  # 0 or 1, as gray and solarize
    "brightness": 1.0,  # factors
    "contrast": 1.0,
    "saturation": 1.0,
    "hue": 0.0,  # fraction of the color circle
    "order": 0.0,  # which of ORDERS
    "gray": 0.0,
    "blur": 0.0,  # radius in pixels of the crop
    "solarize": 0.0,
    "vertical": 0.0,  # 0 or 1: upside down
    "turns": 0.0,  # quarter turns, counter-clockwise: 0 to 3
}
LAID = ("flip", "vertical", "turns")  # geometry; the others change color or sharpness
JITTER = ("brightness", "contrast", "saturation", "hue")
NO_JITTER = tuple(COLUMNS[name] for name in JITTER)
ORDERS = tuple(permutations(range(4)))  # the 24 sequences of JITTER

NUM_TRIES = 10  # attempts before the centered fallback
NUM_DRAWS = 2 * NUM_TRIES + 13  # uniforms per crop: crop s uses draws s*NUM_DRAWS onward


class Photometric(NamedTuple):
    """Probabilities and strengths (half-widths of factors) of one kind of crop."""

    flip_prob: Fraction = 0.5
    jitter_prob: Fraction = 0.8
    brightness: Fraction = 0.4
    contrast: Fraction = 0.4
    saturation: Fraction = 0.2
    hue: Annotated[float, within(0, 0.5)] = 0.1
    gray_prob: Fraction = 0.2
    blur_prob: Fraction = 0.5
    blur_radius: Annotated[Sequence[float], rising(0, 1000)] = (0.1, 2.0)  # pixels
    solarize_prob: Fraction = 0.0
    vertical_prob: Fraction = 0.0
    quarter_turns: bool = False  # uniform over the four rotations


class Drawn(NamedTuple):
    """Parameters of the S crops of n images: top, left, height, width in pixels, and COLUMNS."""

    boxes: Int64[np.ndarray, "S n 4"]
    params: Float32[np.ndarray, "S n 11"]


def plain_globals(drawn: Drawn) -> Drawn:
    """The two global crops with the same geometry, without changes of color or sharpness."""
    params = drawn.params[:2]
    kept = np.isin(list(COLUMNS), LAID)
    neutral = np.array(list(COLUMNS.values()), np.float32)
    return Drawn(drawn.boxes[:2], np.where(kept, params, neutral))


GLOBAL_1 = Photometric(blur_prob=1.0)
GLOBAL_2 = Photometric(blur_prob=0.1, solarize_prob=0.2)
LOCAL = Photometric(blur_prob=0.5)


# -------------------------------------------------------------------------------- all crops' draws


OddSize = Annotated[int, Must("an odd number of at least 1", lambda size: size > 0 and size % 2)]


class MultiCrop:
    """Two global crops and `num_local` local ones of each image, all keyed by (seed, epoch, index).

    Sizes in pixels, scales as fractions of the image's area, `ratio` is width over height. `where`:
    "worker" applies all changes with PIL, bit-exact; "device" cuts out boxes in the worker and does
    the rest on the device, many times faster and equal up to rounding. `blur_kernel` None: PIL's
    Gaussian blur of any radius; else a true Gaussian, truncated to that many pixels (DINOv2: 9).
    With `gram_size` the global crops are also made at that size, with their geometry only, for the
    Gram teacher (DINOv3, Siméoni et al. 2025, section 4.3).

    Raises UserError for values outside their range.
    """

    @checked
    def __init__(
        self,
        global_size: Size,
        local_size: Size,
        num_local: Count,
        global_scale: Shares = (0.4, 1.0),
        local_scale: Shares = (0.05, 0.4),
        ratio: Annotated[Sequence[float], rising(1e-3, 1e3)] = (3 / 4, 4 / 3),
        global_1: Photometric = GLOBAL_1,
        global_2: Photometric = GLOBAL_2,
        local: Photometric = LOCAL,
        blur_kernel: OddSize | None = None,
        gram_size: Size | None = None,
        where: Literal["worker", "device"] = "worker",
        seed: Count = 0,
    ) -> None:
        scales = 2 * [global_scale] + num_local * [local_scale]
        self.blur_kernel, self.gram_size = blur_kernel, gram_size
        self.global_size, self.local_size, self.num_local = global_size, local_size, num_local
        self.scales = np.array(scales, np.float64)  # S 2
        self.ratio = (float(ratio[0]), float(ratio[1]))
        self.kinds = [global_1, global_2] + num_local * [local]
        self.where, self.seed = where, seed
        self.turns = any(kind.vertical_prob > 0 or kind.quarter_turns for kind in self.kinds)

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Number and size of the global crops, then of the local ones if there are any."""
        groups = [(2, self.global_size), (self.num_local, self.local_size)]
        return groups if self.num_local else groups[:1]

    @property
    def sizes(self) -> list[int]:
        """Side in pixels of each of the S crops."""
        return [size for num, size in self.groups for _ in range(num)]

    @property
    def min_pixels(self) -> int:
        """Pixels an image needs so that even the smallest box of either kind is not upsampled.

        A box may be narrower than it is high; its width is then short by at most the aspect ratio.
        """
        aspect = max(self.ratio[1], 1 / self.ratio[0])
        sizes = np.array(self.sizes)
        sizes[:2] = np.maximum(sizes[:2], self.gram_size or 0)
        needed = np.square(sizes) / self.scales[:, 0] * aspect
        return int(np.ceil(needed.max()))

    def draw(
        self,
        epochs: Int[np.ndarray, "n"],
        indices: Int[np.ndarray, "n"],
        heights: Int[np.ndarray, "n"],
        widths: Int[np.ndarray, "n"],
    ) -> Drawn:
        """All crops of n images of the given sizes, each in its epoch."""
        num_crops = len(self.kinds)
        u = draws.uniforms(self.seed, epochs, indices, num_crops * NUM_DRAWS)  # n S*U
        u = u.reshape(-1, num_crops, NUM_DRAWS).transpose(2, 1, 0)  # U S n
        split = 2 * NUM_TRIES + 2
        boxes = self._boxes(u[:split].astype(np.float64), heights, widths)
        v = None
        if (
            self.turns
        ):  # a separate stream, so that crops without flips and turns do not depend on it
            v = draws.uniforms(self.seed, epochs, indices, num_crops * 2, draws.TURNS)
            v = v.reshape(-1, num_crops, 2).transpose(2, 1, 0)  # 2 S n
        return Drawn(boxes, self._params(u[split:], v))

    def _boxes(
        self, u: np.ndarray, heights: Int[np.ndarray, "n"], widths: Int[np.ndarray, "n"]
    ) -> Int64[np.ndarray, "S n 4"]:
        """The first attempt that fits, else a centered box of clamped aspect ratio."""
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

    def _params(
        self, u: Float32[np.ndarray, "11 S n"], v: Float32[np.ndarray, "2 S n"] | None
    ) -> Float32[np.ndarray, "S n 11"]:
        """Uniforms to COLUMNS; without `v` no crop is flipped vertically or rotated."""

        def each(field: str) -> Float32[np.ndarray, "S 1"]:
            return np.array([[getattr(kind, field)] for kind in self.kinds], np.float32)

        jittered = u[1] < each("jitter_prob")

        def factor(strength: str, neutral: float, uniform: np.ndarray) -> np.ndarray:
            return np.where(jittered, neutral + each(strength) * (2 * uniform - 1), neutral)

        radii = np.array([kind.blur_radius for kind in self.kinds], np.float32)  # S 2
        radius = radii[:, :1] + (radii[:, 1:] - radii[:, :1]) * u[9]
        columns = {
            "flip": u[0] < each("flip_prob"),
            "brightness": factor("brightness", 1.0, u[2]),
            "contrast": factor("contrast", 1.0, u[3]),
            "saturation": factor("saturation", 1.0, u[4]),
            "hue": factor("hue", 0.0, u[5]),
            "order": np.where(jittered, u[6] * len(ORDERS) // 1, 0),
            "gray": u[7] < each("gray_prob"),
            "blur": np.where(u[8] < each("blur_prob"), radius, 0),
            "solarize": u[10] < each("solarize_prob"),
            "vertical": 0 * u[0] if v is None else v[0] < each("vertical_prob"),
            "turns": 0 * u[0] if v is None else (v[1] * 4 // 1) * each("quarter_turns"),
        }
        return np.stack([columns[name].astype(np.float32) for name in COLUMNS], -1)
