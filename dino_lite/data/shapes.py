"""The embedded data set: synthetic pictures of ten kinds, generated from a seed in a second.

It exists so that a first run shows self-supervised learning at work: raw pixels separate the kinds
badly, what crops of a picture share separates them well. Place, size, rotation and phase are drawn
for each picture or element, so that nearest neighbors in pixels share layout, not kind. Each
element has its own color from one palette, lighter or darker than the ground, so that brightness is
no cue; illumination varies less than under color jitter, so that no color identifies the crops of a
picture.

A picture is computed from each pixel's distance to the nearest edge: sums, products, roots and
comparisons in float32, and numbers from a counter hash. So its bytes are the same on every machine,
and a picture depends only on (seed, split, index), not on how many are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float32, Shaped, UInt8, UInt64

from dino_lite.contracts import Splits, UserError
from dino_lite.data.decode import to_channels
from dino_lite.data.sources import ArraySource
from dino_lite.draws import GOLDEN, hashed, mix
from dino_lite.settings.kinds import Count, Size, whole
from dino_lite.settings.validate import checked

PALETTE = np.array(
    [
        (246, 236, 210),  # cream
        (240, 196, 120),  # sand
        (226, 138, 120),  # coral
        (140, 190, 206),  # sky
        (34, 32, 66),  # night
        (30, 58, 70),  # pine
    ],
    np.float32,
)
GROUND = np.array([(84, 86, 118), (112, 92, 122)], np.float32)  # gradient from slate to mauve
LIGHT = (0.85, 1.1)  # brightness of a picture; DINO's color jitter has 0.6 to 1.4

HALF = np.float32(0.5)
COS = np.array([math.cos(math.pi * i / 128) for i in range(256)], np.float32)
SIN = np.array([math.sin(math.pi * i / 128) for i in range(256)], np.float32)

Keys = UInt64[np.ndarray, "..."]
Plane = Float32[np.ndarray, "..."]
# Maps a picture's key and positions, in periods, to the key of the element there and the distance
# to its edge, in periods, negative inside.
Kind = Callable[[Keys, Plane, Plane], tuple[Keys, Plane]]


@checked
def open_shapes(
    num_train: Size = 4000,
    num_test: Count = 1000,
    image_size: Annotated[int, whole(8)] = 32,
    seed: Count = 0,
    channels: Size = 3,
) -> Splits:
    """Two splits of square pictures, RGB or luma; any ten in a row have all ten kinds."""
    if channels not in (1, 3):
        raise UserError(f"data.channels={channels}: the embedded shapes have 3, or 1 as luma.")
    train = _source("train", num_train, image_size, seed, channels)
    test = _source("test", num_test, image_size, seed, channels) if num_test else None
    return Splits(train, test, "shapes")


def _source(split: str, num: int, size: int, seed: int, channels: int) -> ArraySource:
    keys = hashed(seed, ("train", "test").index(split), np.arange(num))
    kinds = list(KINDS)
    tens = _uniform(
        hashed(seed, 2 + ("train", "test").index(split), np.arange(-(-num // 10) * 10)), 0
    )
    labels = np.argsort(tens.reshape(-1, 10), axis=1, kind="stable").reshape(-1)[:num]
    images = np.empty((num, size, size, 3), np.uint8)
    for label, kind in enumerate(kinds):
        images[labels == label] = draw(KINDS[kind], keys[labels == label], size)
    if channels == 1:
        images = np.stack([to_channels(image, channels) for image in images])
    return ArraySource(torch.from_numpy(images), labels, kinds, f"shapes/{split}")


def draw(
    kind: Kind, keys: UInt64[np.ndarray, "n"], size: int
) -> UInt8[np.ndarray, "n {size} {size} 3"]:
    """One picture per key: colored elements on the ground, illuminated."""
    keys = keys[:, None, None]
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size) - np.float32(
        0.5
    )
    y, x = axis[:, None], axis[None, :]
    period = _uniform(keys, 0, 0.2, 0.34)
    u, v = _turn(keys, 1, x / period, y / period)
    elements, distance = kind(keys, u + _uniform(keys, 2), v + _uniform(keys, 3))
    cover = np.clip(np.float32(0.5) - distance * period * np.float32(size), 0, 1)[..., None]
    shade = np.clip(_turn(keys, 4, x, y)[0] + np.float32(0.5), 0, 1)[..., None]
    ground = GROUND[0] + (GROUND[1] - GROUND[0]) * shade
    paint = PALETTE[(mix(elements) % np.uint64(len(PALETTE))).astype(np.int64)]
    pixels = ground + (paint * (1 - np.float32(0.15) * shade) - ground) * cover
    pixels = pixels * _uniform(keys, 5, *LIGHT)[..., None] + HALF
    found: np.ndarray = np.clip(pixels, 0, 255).astype(np.uint8)
    return found


def _key(keys: Keys, *cells: Shaped[np.ndarray, "..."] | int) -> Keys:
    """The key of an element, from that of its picture and the numbers of its cell."""
    for cell in cells:
        keys = mix(keys + np.atleast_1d(cell).astype(np.int64).astype(np.uint64) * GOLDEN)
    return keys


def _uniform(keys: Keys, column: int, low: float = 0.0, high: float = 1.0) -> Plane:
    """Number `column` of each key, uniform in [low, high)."""
    unit = (_key(keys, column) >> np.uint64(40)).astype(np.float32)
    return np.float32(low) + unit * np.float32((high - low) / 2**24)


def _turn(keys: Keys, column: int, x: Plane, y: Plane) -> tuple[Plane, Plane]:
    """Positions rotated about the origin by angle `column` of each key."""
    angle = (_key(keys, column) >> np.uint64(56)).astype(np.int64)
    cos, sin = COS[angle], SIN[angle]
    return cos * x + sin * y, cos * y - sin * x


# ------------------------------------------------------------------------------------------- kinds


def _waves(keys: Keys, u: Plane, v: Plane) -> tuple[Keys, Plane]:
    """Bands that oscillate, by a cubic that approximates a sine."""
    t = v / np.float32(2.6)
    t = 4 * np.abs(t - np.floor(t) - HALF) - 1
    u = u + np.float32(0.55) * t * (np.float32(1.5) - HALF * t * t)
    band = np.floor(u)
    return _key(keys, band), np.abs(u - band - HALF) - np.float32(0.3)


def _checks(keys: Keys, u: Plane, v: Plane) -> tuple[Keys, Plane]:
    """Every other field of a checkerboard."""
    field = np.float32(0.85)
    column, row = np.floor(u / field), np.floor(v / field)
    out = np.maximum(np.abs(u / field - column - HALF), np.abs(v / field - row - HALF))
    return _key(keys, column, row), np.where(
        (column + row) % 2 == 0, out - np.float32(0.47), 1
    ) * field


def _arcs(keys: Keys, u: Plane, v: Plane) -> tuple[Keys, Plane]:
    """Truchet tiles: two quarter circles, around the one or the other pair of corners."""
    tile = np.float32(1.2)
    column, row = np.floor(u / tile), np.floor(v / tile)
    cell = _key(keys, column, row)
    a, b = u / tile - column, v / tile - row
    a = np.where(cell >> np.uint64(63) == 1, a, 1 - a)
    near, far = np.sqrt(a * a + b * b), np.sqrt((1 - a) ** 2 + (1 - b) ** 2)
    near, far = np.abs(near - HALF), np.abs(far - HALF)
    return _key(cell, np.where(near < far, 0, 1)), (np.minimum(near, far) - np.float32(0.17)) * tile


def _patchwork(keys: Keys, u: Plane, v: Plane) -> tuple[Keys, Plane]:
    """Squares of which one half, cut along a diagonal, is filled."""
    patch = np.float32(1.1)
    column, row = np.floor(u / patch), np.floor(v / patch)
    cell = _key(keys, column, row)
    a, b = u / patch - column - HALF, v / patch - row - HALF
    a = np.where(cell >> np.uint64(63) == 1, a, -a)
    b = np.where((cell >> np.uint64(62)) % 2 == 1, b, -b)
    seams = np.maximum(np.abs(a), np.abs(b)) - np.float32(0.45)
    return cell, np.maximum((a + b) * np.float32(0.7071) + np.float32(0.04), seams) * patch


def _mosaic(keys: Keys, u: Plane, v: Plane) -> tuple[Keys, Plane]:
    """Voronoi cells of jittered points, separated by seams."""
    column, row = np.floor(u), np.floor(v)
    nearest = np.full(u.shape, np.inf, np.float32)
    second, owner = nearest, np.zeros(u.shape, np.uint64)
    for right in (-1, 0, 1):
        for down in (-1, 0, 1):
            cell = _key(keys, column + right, row + down)
            across = column + right + _uniform(cell, 0, 0.1, 0.9) - u
            along = row + down + _uniform(cell, 1, 0.1, 0.9) - v
            far = np.sqrt(across * across + along * along)
            closer = far < nearest
            second = np.minimum(second, np.where(closer, nearest, far))
            owner = np.where(closer, cell, owner)
            nearest = np.minimum(nearest, far)
    return owner, np.float32(0.6) * (np.float32(0.16) - (second - nearest))


def _strewn(outline: Callable[[Plane, Plane], Plane]) -> Kind:
    """Objects with one outline (a distance function, radius 1), each rotated and scaled."""
    pitch = np.float32(1.75)

    def kind(keys: Keys, u: Plane, v: Plane) -> tuple[Keys, Plane]:
        u = u / pitch
        column = np.floor(u)
        v = v / pitch + HALF * (column % 2)  # columns are staggered
        row = np.floor(v)
        cell = _key(keys, column, row)
        radius = _uniform(cell, 0, 0.3, 0.47)  # of the cell's side, within which the object stays
        a = u - column - HALF - (HALF - radius) * _uniform(cell, 1, -1, 1)
        b = v - row - HALF - (HALF - radius) * _uniform(cell, 2, -1, 1)
        a, b = _turn(cell, 3, a / radius, b / radius)
        return cell, outline(a, b) * radius * pitch

    return kind


def _disc(a: Plane, b: Plane) -> Plane:
    distance: np.ndarray = np.sqrt(a * a + b * b) - 1
    return distance


def _target(a: Plane, b: Plane) -> Plane:
    """A ring around a dot."""
    far = np.sqrt(a * a + b * b)
    distance: np.ndarray = np.maximum(
        far - 1, np.minimum(np.float32(0.72) - far, far - np.float32(0.34))
    )
    return distance


def _cross(a: Plane, b: Plane) -> Plane:
    a, b = np.abs(a), np.abs(b)
    width, length = np.float32(0.34), np.float32(0.95)
    return np.minimum(np.maximum(a - width, b - length), np.maximum(a - length, b - width))


def _star(a: Plane, b: Plane) -> Plane:
    """Five points: inside at least four of the five lines that draw a pentagram."""
    turns = [(math.cos(0.4 * math.pi * k), math.sin(0.4 * math.pi * k)) for k in range(5)]
    lines = [np.float32(cos) * a + np.float32(sin) * b for cos, sin in turns]
    distance: np.ndarray = np.sort(np.stack(lines), axis=0)[3] - np.float32(0.36)
    return distance


def _moon(a: Plane, b: Plane) -> Plane:
    distance: np.ndarray = np.maximum(
        _disc(a, b), np.float32(0.8) - np.sqrt((a - np.float32(0.55)) ** 2 + b * b)
    )
    return distance


KINDS: dict[str, Kind] = {
    "waves": _waves,
    "checks": _checks,
    "arcs": _arcs,
    "patchwork": _patchwork,
    "mosaic": _mosaic,
    "targets": _strewn(_target),
    "dots": _strewn(_disc),
    "crosses": _strewn(_cross),
    "stars": _strewn(_star),
    "moons": _strewn(_moon),
}
