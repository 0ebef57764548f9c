"""The embedded data set: drawn pictures of ten kinds, made in a second from nothing but a seed.

It exists so that a first run shows self-supervision at work. Place, size, rotation and phase are
drawn for each picture, so pixels say little of its kind: the nearest neighbors in pixels share a
layout. Each element has a color of its own out of one palette, and a picture's light varies no
more than color jitter makes it: so no color tells the crops of a picture from those of another.

A picture is made of each pixel's distance to the nearest edge: sums, products, roots and
comparisons in float32, and numbers from a counter hash. So the bytes are the same everywhere, and
a picture depends on (seed, split, index) alone, not on how many are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8, UInt64

from dino_lite.contracts import Splits, UserError
from dino_lite.data.draws import GOLDEN, hashed, mix
from dino_lite.data.sources import ArraySource

PALETTE = np.array(
    [
        (255, 107, 94),  # coral
        (255, 190, 92),  # amber
        (250, 240, 214),  # cream
        (92, 214, 176),  # mint
        (84, 168, 240),  # sky
        (190, 140, 245),  # lilac
    ],
    np.float32,
)
INK = np.array([(24, 26, 54), (70, 44, 92)], np.float32)  # from one side of the picture to the other
LIGHT = (0.6, 1.35)  # brightness of a picture: the range of DINO's color jitter

HALF = np.float32(0.5)
COS = np.array([math.cos(math.pi * i / 128) for i in range(256)], np.float32)
SIN = np.array([math.sin(math.pi * i / 128) for i in range(256)], np.float32)

Keys = UInt64[np.ndarray, "..."]
Plane = Float32[np.ndarray, "..."]
# From a picture's key and places in it, in periods, to the element there (its key) and the distance
# to the edge, in periods, negative inside the element.
Kind = Callable[[Keys, Plane, Plane], tuple[Keys, Plane]]


def open_shapes(
    num_train: int = 4000, num_test: int = 1000, image_size: int = 32, seed: int = 0
) -> Splits:
    """Two splits of pictures of `image_size` pixels a side; each ten in a row have all ten kinds."""
    if num_train < 1 or num_test < 0 or image_size < 8:
        raise UserError(
            f"data=shapes cannot make num_train={num_train}, num_test={num_test} and "
            f"image_size={image_size}: they must be at least 1, 0 and 8."
        )
    train = _source("train", num_train, image_size, seed)
    test = _source("test", num_test, image_size, seed) if num_test else None
    return Splits(train, test, "shapes")


def _source(split: str, num: int, size: int, seed: int) -> ArraySource:
    keys = hashed(seed, ("train", "test").index(split), np.arange(num))
    kinds = list(KINDS)
    tens = _uniform(hashed(seed, 2 + ("train", "test").index(split), np.arange(-(-num // 10) * 10)), 0)
    labels = np.argsort(tens.reshape(-1, 10), axis=1, kind="stable").reshape(-1)[:num]
    images = np.empty((num, size, size, 3), np.uint8)
    for label, kind in enumerate(kinds):
        images[labels == label] = draw(KINDS[kind], keys[labels == label], size)
    return ArraySource(torch.from_numpy(images), labels, kinds, f"shapes/{split}")


def draw(
    kind: Kind, keys: UInt64[np.ndarray, "n"], size: int
) -> UInt8[np.ndarray, "n {size} {size} 3"]:
    """One picture for each key: elements in colors of their own, on ink, in the picture's light."""
    keys = keys[:, None, None]
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size) - np.float32(0.5)
    y, x = axis[:, None], axis[None, :]
    period = _uniform(keys, 0, 0.2, 0.34)
    u, v = _turn(keys, 1, x / period, y / period)
    elements, distance = kind(keys, u + _uniform(keys, 2), v + _uniform(keys, 3))
    cover = np.clip(np.float32(0.5) - distance * period * np.float32(size), 0, 1)[..., None]
    shade = np.clip(_turn(keys, 4, x, y)[0] + np.float32(0.5), 0, 1)[..., None]
    ink = INK[0] + (INK[1] - INK[0]) * shade
    paint = PALETTE[(mix(elements) % np.uint64(len(PALETTE))).astype(np.int64)]
    pixels = ink + (paint * (1 - np.float32(0.15) * shade) - ink) * cover
    pixels = pixels * (np.float32(0.75) * _uniform(keys, 5, *LIGHT)[..., None]) + np.float32(0.5)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _key(keys: Keys, *cells: Plane | int) -> Keys:
    """The key of an element: that of its picture, and the numbers of its cell."""
    for cell in cells:
        keys = mix(keys + np.atleast_1d(cell).astype(np.int64).astype(np.uint64) * GOLDEN)
    return keys


def _uniform(keys: Keys, column: int, low: float = 0.0, high: float = 1.0) -> Plane:
    """Number `column` of each key, uniform in [low, high)."""
    unit = (_key(keys, column) >> np.uint64(40)).astype(np.float32)
    return np.float32(low) + unit * np.float32((high - low) / 2**24)


def _turn(keys: Keys, column: int, x: Plane, y: Plane) -> tuple[Plane, Plane]:
    """Places turned about the origin by angle `column` of each key."""
    angle = (_key(keys, column) >> np.uint64(56)).astype(np.int64)
    cos, sin = COS[angle], SIN[angle]
    return cos * x + sin * y, cos * y - sin * x


# ------------------------------------------------------------------------------------------- kinds


def _stripes(keys: Keys, u: Plane, v: Plane) -> tuple[Keys, Plane]:
    """Straight bands."""
    band = np.floor(u)
    return _key(keys, band), np.abs(u - band - HALF) - np.float32(0.3)


def _waves(keys: Keys, u: Plane, v: Plane) -> tuple[Keys, Plane]:
    """Bands that swing to and fro: a sine's cubic likeness."""
    t = v / np.float32(2.6)
    t = 4 * np.abs(t - np.floor(t) - HALF) - 1
    return _stripes(keys, u + np.float32(0.55) * t * (np.float32(1.5) - HALF * t * t), v)


def _checks(keys: Keys, u: Plane, v: Plane) -> tuple[Keys, Plane]:
    """A chessboard whose fields of one color are of many."""
    u, v = u / np.float32(0.85), v / np.float32(0.85)
    column, row = np.floor(u), np.floor(v)
    inside = np.maximum(np.abs(u - column - HALF), np.abs(v - row - HALF)) - HALF
    filled = (column + row) % 2 == 0
    return _key(keys, column, row), np.where(filled, inside, -inside) * np.float32(0.85)


def _rings(keys: Keys, u: Plane, v: Plane) -> tuple[Keys, Plane]:
    """Circles about one center, which is in the picture or near it."""
    u, v = u - _uniform(keys, 10, -1.3, 1.3), v - _uniform(keys, 11, -1.3, 1.3)
    return _stripes(keys, np.sqrt(u * u + v * v) + _uniform(keys, 12), v)


def _mosaic(keys: Keys, u: Plane, v: Plane) -> tuple[Keys, Plane]:
    """Cobbles: what is nearest to one of many scattered points, with a seam between."""
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
    """Objects of one outline (a distance, for an object of radius 1), each turned and sized."""
    pitch = np.float32(1.75)

    def kind(keys: Keys, u: Plane, v: Plane) -> tuple[Keys, Plane]:
        u = u / pitch
        column = np.floor(u)
        v = v / pitch + HALF * (column % 2)  # columns are staggered
        row = np.floor(v)
        cell = _key(keys, column, row)
        radius = _uniform(cell, 0, 0.3, 0.47)  # of the cell's side, in which the object stays
        a = u - column - HALF - (HALF - radius) * _uniform(cell, 1, -1, 1)
        b = v - row - HALF - (HALF - radius) * _uniform(cell, 2, -1, 1)
        a, b = _turn(cell, 3, a / radius, b / radius)
        return cell, outline(a, b) * radius * pitch

    return kind


def _disc(a: Plane, b: Plane) -> Plane:
    return np.sqrt(a * a + b * b) - 1


def _triangle(a: Plane, b: Plane) -> Plane:
    return np.maximum(np.abs(a) * np.float32(0.8660254) + b * HALF, -b) - HALF


def _cross(a: Plane, b: Plane) -> Plane:
    a, b = np.abs(a), np.abs(b)
    width, length = np.float32(0.34), np.float32(0.95)
    return np.minimum(np.maximum(a - width, b - length), np.maximum(a - length, b - width))


def _star(a: Plane, b: Plane) -> Plane:
    """Five points: inside at least four of the five lines that draw a pentagram."""
    turns = [(math.cos(0.4 * math.pi * k), math.sin(0.4 * math.pi * k)) for k in range(5)]
    lines = [np.float32(cos) * a + np.float32(sin) * b for cos, sin in turns]
    return np.sort(np.stack(lines), axis=0)[3] - np.float32(0.36)


def _moon(a: Plane, b: Plane) -> Plane:
    return np.maximum(_disc(a, b), np.float32(0.8) - np.sqrt((a - np.float32(0.55)) ** 2 + b * b))


KINDS: dict[str, Kind] = {
    "stripes": _stripes,
    "waves": _waves,
    "checks": _checks,
    "rings": _rings,
    "mosaic": _mosaic,
    "dots": _strewn(_disc),
    "triangles": _strewn(_triangle),
    "crosses": _strewn(_cross),
    "stars": _strewn(_star),
    "moons": _strewn(_moon),
}
