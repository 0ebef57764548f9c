"""Image files as Pillow reads them, corrected where it misreads."""

from __future__ import annotations

import re
from functools import cache
from typing import IO, Any, cast

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, UnidentifiedImageError

from dino_lite.data.pixels import Pixels, check_dtype, straight, to_8_bits
from dino_lite.data.quiet import listen
from dino_lite.data.suffixes import HEIF
from dino_lite.data.tiff import ORIENTATION, Samples, from_palette

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEIF = re.compile(rb"(?s).{4}ftyp.{0,48}?(hei[cxms]|hev[cxms])")  # brands of HEVC's images
# Not all of Pillow's: EPS would start another program. TGA comes last since it has no signature.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "TGA")
# Tags of TIFF.
_WIDTH, _HEIGHT, _BITS, _KIND, _SAMPLES, _PLANAR, _EXTRA = 256, 257, 258, 262, 277, 284, 338
_COLORS, _SAMPLE_FORMAT = 320, 339
# Between the levels of a PNG's gray below 8 bits; of one bit, Pillow scales the transparent one.
_GRAY_STEPS = {"L;2": 85, "L;4": 17}
_BYTE = 1  # type of a tag


@cache
def _formats() -> tuple[str, ...]:
    """Those of _FORMATS that the installed Pillow supports."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@cache
def _heif_format() -> tuple[str, ...]:
    """HEIF, which pillow-heif adds to Pillow. It turns images itself, and resets EXIF's tag."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise ValueError(f"needs pillow-heif: {HEIF}") from error
    register_heif_opener()
    return ("HEIF",)


def open_image(file: Any, pixels: Pixels, start: bytes) -> Image.Image | None:
    """The image, header read, of a file with this start; None for a TIFF that tifffile must read.

    Pillow reads at most four samples, may take the first for the whole image, misreads planes
    of 16 bits or with alpha and signed values of 8 bits, and reduces colors of 16 bits to 8.
    """
    is_tiff = start[:4] in _TIFF
    if is_tiff:
        listen()
        if pixels.channels not in (1, 3):
            return None
    formats = _heif_format() if _HEIF.match(start) else _formats()
    try:
        image = Image.open(cast("IO[bytes]", file), formats=formats)
    except UnidentifiedImageError:
        if is_tiff:
            return None
        raise
    if not is_tiff:
        return image
    tags: Any = getattr(image, "tag_v2", {})
    num, bits = tags.get(_SAMPLES, 1), max(tags.get(_BITS, (1,)))
    planes = num if tags.get(_PLANAR) == 2 else 1
    with_alpha = set(tags.get(_EXTRA, ())) & {1, 2}
    if planes > 4 or (planes > 1 and (bits > 8 or with_alpha or tags.get(_KIND, 0) < 2)):
        return None
    if num > 1 and bits > 8 and pixels.range:
        return None
    signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == 2 and bits <= 8
    return None if signed or image.mode == "LAB" else image


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Height and width as stored; some versions swap `size` of a TIFF."""
    tags: Any = getattr(image, "tag_v2", {})
    return int(tags.get(_HEIGHT, image.height)), int(tags.get(_WIDTH, image.width))


def size_as_seen(image: Image.Image, file: Any) -> tuple[int, int]:
    """Height and width as seen."""
    size = stored_size(image)
    if image.format == "PNG" and "exif" not in image.info and size[0] != size[1]:
        file.seek(0)
        if b"eXIf" in file.read():  # after the pixels, so that Pillow must read these
            image.load()
    return upright(size, orientation(image))


def upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Height and width after turning."""
    return size[::-1] if orientation > 4 else size


def orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) without one, if it is no number or if EXIF is damaged."""
    try:
        # A PNG's `getexif` would decode the pixels to look for EXIF after them.
        exif = Image.Image.getexif(image)
        value = exif.get(ORIENTATION)
        if isinstance(value, bytes) and exif._info is not None:
            kind = exif._info.tagtype.get(ORIENTATION)
            value = value[0] if kind == _BYTE and len(value) == 1 else 1
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def format_and_mode(image: Any) -> tuple[str, str]:
    """Pillow's names, of the image before it is loaded; ";16" marks 16 bits.

    Pillow's mode of 16-bit RGB is "RGB"; only the raw mode of its tiles differs. "MPO" is a JPEG
    followed by a preview.
    """
    if image.format in ("JPEG", "MPO"):
        return "JPEG", image.mode
    deep = ";16" not in image.mode and any(";16" in str(tile[3]) for tile in image.tile)
    return image.format or "", image.mode + deep * ";16"


def reduce(image: Image.Image, min_pixels: int) -> None:
    """Set a JPEG's decoder to the smallest scale that leaves `min_pixels`.

    Scales are 1/2, 1/4 and 1/8, which skip coefficients of the 8x8 blocks (Pillow's `draft`). A
    longer side counts as at most twice the shorter one, since crops are roughly square.
    """
    if image.format not in ("JPEG", "MPO"):
        return
    shorter, longer = sorted(image.size)
    pixels = shorter * min(longer, 2 * shorter)
    scale = next((s for s in (8, 4, 2) if pixels >= min_pixels * s * s), 1)
    if scale > 1:
        image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))


def load(
    image: Any, file: Any, pixels: Pixels, with_alpha: bool, partial: bool
) -> tuple[Samples, int, int]:
    """Decode the pixels, or with `partial` those there are.

    Returns their orientation too, and the one that they still have: Pillow turns TIFFs itself.
    """
    tags: Any = getattr(image, "tag_v2", None)
    tiles = getattr(image, "tile", ())  # none, if it was not read from a file
    kinds = {str(tile[3][0] if isinstance(tile[3], tuple) else tile[3]) for tile in tiles}
    places = [tile[2] for tile in tiles if tile[0] in ("raw", "ppm")]
    if tags is None:
        stored: dict[int, Any] = {}
        multiplied = image.mode == "La"
        _load(image, partial)
        turn = left = orientation(image)
    else:
        stored, turn = dict(tags), orientation(image)
        left = 1 if stored.get(ORIENTATION) in range(2, 9) else turn
        multiplied = _as_stored(image)
        _load(image, partial)
    deep_png = image.format == "PNG" and bool(kinds & {"RGB;16B", "LA;16B", "RGBA;16B"})
    if deep_png and (pixels.range or (with_alpha and "transparency" in image.info)):
        return _deep_png(file, pixels, image.info.get("transparency")), turn, left
    values = _deep_ppm(image, file, places) if image.format == "PPM" and pixels.range else None
    if values is not None:
        return Samples(to_8_bits(values, 16, pixels.range)), turn, left
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_gray(image, file, pixels, stored), turn, left
    if pixels.channels not in (1, 3):
        if image.mode == "P" and ("transparency" in image.info or pixels.channels == 4):
            image = image.convert("RGBA")
        elif image.mode == "1" or (image.mode == "LA" and pixels.channels != 2):
            image = image.convert("L")
        return Samples(np.asarray(image)), turn, left
    colors, alpha = _colors(image, with_alpha, kinds, multiplied)
    if image.mode == "P" and _COLORS in stored and max(stored[_COLORS]) < 256:
        colors = from_palette(np.asarray(image), np.reshape(stored[_COLORS], (3, -1)))
    full = 2**16 - 1 if any(";16" in kind for kind in kinds) else 0
    # of the lower byte, which Pillow has dropped, only the most that it can be is known
    largest = int(colors.max()) * 256 + 255 if full and with_alpha else 0
    return Samples(colors, alpha, largest, full), turn, left


def _load(image: Image.Image, partial: bool) -> None:
    """Decode; with `partial` the rows that there are."""
    try:
        image.load()
    except Exception:
        if not partial or getattr(image, "_im", None) is None:
            raise
        image.tile = []  # type: ignore[attr-defined]
        image.load()


def _as_stored(image: Any) -> bool:
    """Let colors multiplied by alpha come so, since `straight` divides them; whether they are."""
    tiles = [
        tile._replace(args=(tile.args[0].replace("RGBa", "RGBA"), *tile.args[1:]))
        if "RGBa" in str(tile[3]) and hasattr(tile, "_replace")
        else tile
        for tile in image.tile
    ]
    changed = tiles != image.tile
    image.tile = tiles
    return bool(changed or image.mode == "La")


def _colors(
    image: Image.Image, with_alpha: bool, kinds: set[str], multiplied: bool
) -> tuple[UInt8[np.ndarray, "H W *C"], UInt8[np.ndarray, "H W"] | None]:
    """Gray or RGB of 8 bits, and alpha if it is asked for and there is any."""
    key = image.info.get("transparency")
    if image.mode == "PA" or (image.mode == "P" and key is not None):
        image = image.convert("RGBA")
    if image.mode in ("LA", "La", "RGBA") and (with_alpha or multiplied):
        bands = np.asarray(image)
        colors, alpha = bands[..., :-1], bands[..., -1]
        return straight(colors, alpha) if multiplied else colors, alpha if with_alpha else None
    colors = np.asarray(_as(image, "L" if image.mode in ("1", "L", "LA") else "RGB"))
    if key is None or not with_alpha or isinstance(key, bytes):
        return colors, None
    step = next((_GRAY_STEPS[kind] for kind in kinds if kind in _GRAY_STEPS), 1)
    hidden = colors == np.asarray(key) * step
    return colors, np.where(hidden.all(-1) if colors.ndim == 3 else hidden, 0, 255).astype(np.uint8)


def _deep_gray(image: Image.Image, file: Any, pixels: Pixels, stored: dict[int, Any]) -> Samples:
    """One channel of more than 8 bits."""
    values, bits = np.asarray(image), 16
    unsigned = stored.get(_SAMPLE_FORMAT, (1,))[0] in (1, 4)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values, bits = values.astype(np.uint16), stored.get(_BITS, (16,))[0]
    elif pixels.range is None:
        raise ValueError(
            "pixels are signed, floats or of 32 bits, of unknown range; store 8 or 16 unsigned "
            "bits, or set data.range=[low, high]"
        )
    else:
        check_dtype(values.dtype, pixels.range)
        values = values.view(np.uint32) if image.mode == "I" and unsigned else values
    key, alpha = image.info.get("transparency"), None
    if isinstance(key, int):
        alpha = np.where(values == key, 0, 255).astype(np.uint8)
    if image.format == "JPEG2000" and pixels.range:
        values = values >> (16 - _jp2_bits(file))
    shown = to_8_bits(values, bits, pixels.range)
    full = 2**bits - 1 if values.dtype == np.uint16 else 0
    largest = int(values.max()) if full else 0
    if stored.get(_KIND) == 0:  # white is zero
        shown, largest = 255 - shown, full - int(values.min()) if full else 0
    return Samples(shown, alpha, largest, full)


def _deep_png(file: Any, pixels: Pixels, key: Any) -> Samples:
    """Colors of 16 bits, which Pillow reduces to 8, by torchvision."""
    import torch
    from torchvision.io import ImageReadMode, decode_png

    from dino_lite.data.repair import essential_png

    file.seek(0)
    content = torch.frombuffer(bytearray(essential_png(file.read())), dtype=torch.uint8)
    values = decode_png(content, ImageReadMode.UNCHANGED).numpy().transpose(1, 2, 0)
    num = values.shape[2]
    if pixels.channels not in (1, 3):
        return Samples(to_8_bits(values, 16, pixels.range))
    alpha = None if num in (1, 3) else to_8_bits(values[..., -1])
    colors = values if alpha is None else values[..., :-1]
    if key is not None:
        alpha = np.where((colors == np.asarray(key)).all(-1), 0, 255).astype(np.uint8)
    return Samples(to_8_bits(colors, 16, pixels.range), alpha)


def _deep_ppm(image: Image.Image, file: Any, places: list[Any]) -> Shaped[np.ndarray, "..."] | None:
    """The values of a binary PGM or PPM of 16 bits, which Pillow scales by its largest one."""
    file.seek(0)
    content, num = file.read(), 1 if image.mode.startswith("I") else 3
    shape = (image.height, image.width, num)
    if not places or len(content) - places[0] < 2 * np.prod(shape):
        return None
    return (
        np.frombuffer(content, ">u2", int(np.prod(shape)), places[0])
        .reshape(shape)
        .astype(np.uint16)
    )


def _jp2_bits(file: Any) -> int:
    """Bits of the first component, from the codestream's SIZ marker."""
    file.seek(0)
    content = file.read()
    return int(content[content.index(b"\xff\x4f\xff\x51") + 42] & 0x7F) + 1


def _as(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # avoids a copy
