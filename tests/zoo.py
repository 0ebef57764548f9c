"""One picture in every format that people keep pictures in, and what is to be seen of it."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tifffile
from PIL import Image

HEIGHT, WIDTH = 24, 36
# The passes of an interlaced PNG: first row and column, and the steps to the next.
ADAM7 = (
    *((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)),
    *((2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)),
)


class Encoded(NamedTuple):
    """A file, and its upright RGB; `within` levels, as a lossy format goes."""

    data: bytes
    pixels: np.ndarray[Any, Any]
    within: int = 0


def gradient(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray[Any, Any]:
    """A smooth picture, different in every corner."""
    y, x = np.mgrid[:height, :width]
    down, right = y / max(1, height - 1), x / max(1, width - 1)
    channels = (40 + 180 * down, 220 - 160 * right, 30 + 100 * down * right)
    return np.stack(channels, -1).astype(np.uint8)


def luma(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """ITU-R 601, rounded."""
    weighed = pixels.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    return (weighed + 0.5).astype(np.uint8)


def gray(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Luma as RGB."""
    return np.repeat(luma(pixels)[..., None], 3, axis=2)


def saved(image: Image.Image | np.ndarray[Any, Any], format_: str, **options: Any) -> bytes:
    """The bytes of Pillow's file."""
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, format_, **options)
    return file.getvalue()


def tiff(pixels: np.ndarray[Any, Any], **options: Any) -> bytes:
    """The bytes of tifffile's file."""
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def npy(array: np.ndarray[Any, Any]) -> bytes:
    """The bytes of NumPy's file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def png(pixels: np.ndarray[Any, Any], interlaced: bool = False) -> bytes:
    """A PNG of 8 or 16 bits, gray or RGB, with or without alpha, as Pillow does not write them."""
    height, width, num = pixels.shape
    depth, kind = 8 * pixels.itemsize, {1: 0, 2: 4, 3: 2, 4: 6}[num]
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    parts = [pixels[top::down, left::right] for top, left, down, right in passes]
    rows = [
        b"\0" + row.astype(f">u{pixels.itemsize}").tobytes() for p in parts if p.size for row in p
    ]
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"".join(rows)))
        + chunk(b"IEND", b"")
    )


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def zoo() -> dict[str, Encoded]:
    """The picture in every encoding, by name."""
    rgb = gradient()
    image, bright = Image.fromarray(rgb), luma(rgb)
    palette = image.quantize(32)
    seen = np.asarray(palette.convert("RGB"))
    bilevel = Image.fromarray(bright).convert("1", dither=Image.Dither.NONE)
    black = np.asarray(bilevel.convert("RGB"))
    planes: dict[str, Any] = {"photometric": "rgb", "planarconfig": "separate"}
    alpha = np.dstack([rgb, 255 - bright])  # pixels that are half to be seen
    gray_alpha = np.dstack([bright, 255 - bright])
    other = Image.new("RGB", image.size)
    sharp: dict[str, Any] = {"quality": 97, "subsampling": 0}
    frames: dict[str, Any] = {"save_all": True, "append_images": [other]}
    deep = rgb.astype(np.uint16) * 257
    deep_gray = bright.astype(np.uint16) * 257
    return {
        "jpeg": Encoded(saved(image, "JPEG", **sharp), rgb, 4),
        "jpeg progressive": Encoded(saved(image, "JPEG", progressive=True, **sharp), rgb, 4),
        "jpeg subsampled": Encoded(saved(image, "JPEG", quality=95), rgb, 12),
        "jpeg gray": Encoded(saved(bright, "JPEG", quality=97), gray(rgb), 4),
        "jpeg cmyk": Encoded(saved(image.convert("CMYK"), "JPEG", **sharp), rgb, 8),
        "png": Encoded(saved(image, "PNG"), rgb),
        "png gray": Encoded(saved(bright, "PNG"), gray(rgb)),
        "png alpha": Encoded(saved(alpha, "PNG"), rgb),
        "png gray alpha": Encoded(saved(gray_alpha, "PNG"), gray(rgb)),
        "png black and white": Encoded(saved(bilevel, "PNG"), black),
        "png palette": Encoded(saved(palette, "PNG"), seen),
        "png palette transparent": Encoded(saved(palette, "PNG", transparency=0), seen),
        "png palette alphas": Encoded(saved(palette, "PNG", transparency=bytes(range(32))), seen),
        "png 16 bit gray": Encoded(saved(deep_gray, "PNG"), gray(rgb)),
        "png 16 bit": Encoded(png(deep), rgb),
        "png 16 bit alpha": Encoded(png(np.dstack([deep, deep[..., 0]])), rgb),
        "png interlaced": Encoded(png(rgb, interlaced=True), rgb),
        "png 16 bit interlaced": Encoded(png(deep, interlaced=True), rgb),
        "apng": Encoded(saved(image, "PNG", **frames), rgb),
        "webp": Encoded(saved(image, "WEBP", quality=95), rgb, 12),
        "webp lossless": Encoded(saved(image, "WEBP", lossless=True), rgb),
        "webp alpha": Encoded(saved(alpha, "WEBP", lossless=True, exact=True), rgb),
        "webp animated": Encoded(saved(image, "WEBP", lossless=True, **frames), rgb),
        "tiff": Encoded(saved(image, "TIFF"), rgb),
        "tiff lzw": Encoded(saved(image, "TIFF", compression="tiff_lzw"), rgb),
        "tiff deflate": Encoded(saved(image, "TIFF", compression="tiff_adobe_deflate"), rgb),
        "tiff pages": Encoded(saved(image, "TIFF", **frames), rgb),
        "tiff gray": Encoded(saved(bright, "TIFF"), gray(rgb)),
        "tiff black and white": Encoded(saved(bilevel, "TIFF", compression="group4"), black),
        "tiff palette": Encoded(saved(palette, "TIFF"), seen),
        "tiff cmyk": Encoded(saved(image.convert("CMYK"), "TIFF"), rgb, 1),
        "tiff alpha": Encoded(saved(alpha, "TIFF"), rgb),
        "tiff 16 bit gray": Encoded(saved(deep_gray, "TIFF"), gray(rgb)),
        "tiff 16 bit big endian": Encoded(tiff(deep_gray, byteorder=">"), gray(rgb)),
        "tiff 12 bit": Encoded(twelve_bits(deep_gray), gray(rgb), 1),
        "tiff 16 bit": Encoded(tiff(deep, photometric="rgb"), rgb),
        "tiff planes": Encoded(tiff(rgb.transpose(2, 0, 1), **planes), rgb),
        "tiff 16 bit planes": Encoded(tiff(deep.transpose(2, 0, 1), **planes), rgb),
        "bigtiff": Encoded(tiff(rgb, photometric="rgb", bigtiff=True), rgb),
        "bmp": Encoded(saved(image, "BMP"), rgb),
        "bmp palette": Encoded(saved(palette, "BMP"), seen),
        "bmp gray": Encoded(saved(bright, "BMP"), gray(rgb)),
        "bmp black and white": Encoded(saved(bilevel, "BMP"), black),
        "gif": Encoded(saved(palette, "GIF"), seen),
        "gif animated": Encoded(saved(palette, "GIF", save_all=True, append_images=[other]), seen),
        "ppm": Encoded(saved(image, "PPM"), rgb),
        "pgm 16 bit": Encoded(b"P5 36 24 65535\n" + deep_gray.astype(">u2").tobytes(), gray(rgb)),
        "tga": Encoded(saved(image, "TGA"), rgb),
        "jpeg 2000": Encoded(saved(image, "JPEG2000", irreversible=False), rgb),
        "npy": Encoded(npy(rgb), rgb),
        "npy 16 bit": Encoded(npy(deep), rgb),
        "npy gray": Encoded(npy(bright), gray(rgb)),
        "npy columns first": Encoded(npy(np.asfortranarray(rgb)), rgb),
    }  # fmt: skip


def twelve_bits(pixels: np.ndarray[Any, Any]) -> bytes:
    """A gray TIFF of 12 bits a pixel, two of them in three bytes; the width is even."""
    values = (pixels >> 4).astype(np.uint32).reshape(-1, 2)
    pairs = (values[:, 0] << 12) | values[:, 1]
    data = np.stack([pairs >> 16, pairs >> 8 & 255, pairs & 255], 1).astype(np.uint8).tobytes()
    height, width = pixels.shape
    tags: Sequence[tuple[int, int]] = (
        (256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1),
        (278, height), (279, len(data)),
    )  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory
