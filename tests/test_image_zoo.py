"""Images as they are: every encoding, orientation, size and damage, up to their crops."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from dino_lite.data.clean import clean
from dino_lite.data.crops import MultiCrop
from dino_lite.data.decode import decode, upright_size
from dino_lite.data.exact import make_crops
from dino_lite.data.preprocessing import Preprocessing
from zoo import Encoded, chunk, gradient, luma, saved, tiff, zoo

ZOO = sorted(zoo())
encoded = cache(zoo)


def read(data: bytes, channels: int = 3, min_pixels: int | None = None) -> np.ndarray[Any, Any]:
    """Pixels of a file, with its size from the header held against them."""
    pixels = decode(io.BytesIO(data), channels, min_pixels)
    if min_pixels is None:
        assert upright_size(io.BytesIO(data)) == pixels.shape[:2]
    return pixels


def difference(one: np.ndarray[Any, Any], two: np.ndarray[Any, Any]) -> int:
    assert one.shape == two.shape
    return int(np.abs(one.astype(int) - two.astype(int)).max())


@pytest.mark.parametrize("name", ZOO)
def test_every_encoding_shows_the_same_picture(name: str) -> None:
    """RGB and luma of the first frame, and the size from the header alone."""
    file: Encoded = encoded()[name]
    assert difference(read(file.data), file.pixels) <= file.within
    assert difference(read(file.data, 1)[..., 0], luma(file.pixels)) <= file.within


def test_avif_where_this_pillow_has_it() -> None:
    """Newer Pillows do."""
    Image.init()
    if "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow writes no AVIF")
    assert difference(read(saved(gradient(), "AVIF", quality=95)), gradient()) <= 16


# ------------------------------------------------------------------------------------ orientation


def seen(stored: np.ndarray[Any, Any], orientation: int) -> np.ndarray[Any, Any]:
    """EXIF's own words: at which side of the image as seen the first row and column are stored."""
    rows, columns = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    height, width = stored.shape[:2]
    lying = rows in ("left", "right")
    upright = np.empty_like(stored, shape=(width, height, 3) if lying else stored.shape)
    for row in range(height):
        for column in range(width):
            from_rows = row if rows in ("top", "left") else height - 1 - row
            from_columns = column if columns in ("top", "left") else width - 1 - column
            place = (from_columns, from_rows) if lying else (from_rows, from_columns)
            upright[place] = stored[row, column]
    return upright


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_undone(format_: str, orientation: int) -> None:
    """As a camera was held, in each format that says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 97, "subsampling": 0}, "WEBP": {"lossless": True}}
    data = saved(gradient(), format_, exif=exif, **options.get(format_, {}))
    assert difference(read(data), seen(gradient(), orientation)) <= (4 if format_ == "JPEG" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_many_channels_is_undone(orientation: int) -> None:
    """Which Pillow does not read."""
    stored = np.dstack([gradient()[..., :1], gradient()])
    tag = (274, "H", 1, orientation, True)
    data = tiff(np.dstack([stored, stored]), planarconfig="contig", extratags=[tag])
    found = read(data, 8)
    assert np.array_equal(found[..., 1:4], seen(gradient(), orientation))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_unknown_orientation_is_none(value: int) -> None:
    """Some programs write 0."""
    exif = Image.Exif()
    exif[0x0112] = value
    assert np.array_equal(read(saved(gradient(), "PNG", exif=exif)), gradient())


@pytest.mark.parametrize(
    "junk", [b"", b"junk", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff"]
)
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_costs_no_image(format_: str, junk: bytes) -> None:
    """It is read as it is stored."""
    data = saved(gradient(), format_, exif=b"Exif\0\0" + junk)
    assert difference(read(data), gradient()) <= 60
    assert read(data).shape == gradient().shape


# ---------------------------------------------------------------------------------- large images


@cache
def photo(height: int = 480, width: int = 640) -> Image.Image:
    """Many blocks, with shapes in it, softer than one."""
    image = Image.fromarray(gradient(height, width))
    draw = ImageDraw.Draw(image)
    for i in range(8):
        box = (70 * i + 10, 50 * i + 15, 70 * i + 190, 50 * i + 120)
        draw.ellipse(box, fill=(30 * i, 250 - 30 * i, 128))
    return image.reduce(8).resize(image.size, Image.Resampling.BICUBIC)


KINDS: dict[str, dict[str, Any]] = {
    "RGB": {"subsampling": 0},
    "RGB subsampled": {},
    "RGB progressive": {"progressive": True},
    "L": {},
    "CMYK": {},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_comes_reduced(kind: str, scale: int, orientation: int) -> None:
    """The smallest of the scales that leaves enough, as a full decode made smaller would look."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(photo().convert(kind.split()[0]), "JPEG", quality=95, exif=exif, **KINDS[kind])
    whole = Image.fromarray(read(data))
    needed = whole.width * whole.height // scale**2
    small = read(data, 3, needed)
    away = np.abs(small.astype(int) - np.asarray(whole.reduce(scale)))  # of the same shape
    assert away.mean() < 2
    assert np.percentile(away, 99) < 12
    assert difference(read(data, 1, needed)[..., 0], luma(small)) <= 1
    if scale > 1:
        assert read(data, 3, needed + 1).shape[0] == small.shape[0] * 2


@pytest.mark.parametrize(("height", "width"), [(97, 101), (9, 15), (63, 64), (3, 500), (1, 1)])
def test_a_reduced_jpeg_has_pixels_enough(height: int, width: int) -> None:
    """Whatever the remainders of its sides."""
    data = saved(gradient(height, width), "JPEG")
    for min_pixels in range(1, height * width + 2, max(1, height * width // 50)):
        found = read(data, 3, min_pixels).shape
        assert found[0] * found[1] >= min(min_pixels, height * width)
        assert found[:2] in [(-(-height // s), -(-width // s)) for s in (1, 2, 4, 8)]


@pytest.mark.parametrize("format_", ["PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_only_jpegs_come_reduced(format_: str) -> None:
    """No other format can leave out work, so none loses anything."""
    data = saved(photo(), format_)
    assert np.array_equal(read(data, 3, 10), read(data))


def test_a_long_image_keeps_the_detail_of_its_shorter_side() -> None:
    """A panorama has pixels enough, but no crop of it could have them all."""
    data = saved(gradient(100, 3000), "JPEG")
    assert read(data, 3, 200 * 200).shape == (100, 3000, 3)
    assert read(data, 3, 50 * 50).shape == (50, 1500, 3)


# ------------------------------------------------------------------------- odd sizes, up to crops

CROPS = MultiCrop(32, 16, 2, global_scale=(0.25, 1.0))


def cropped(pixels: np.ndarray[Any, Any], index: int = 0) -> list[np.ndarray[Any, Any]]:
    """All crops of one image."""
    height, width, channels = pixels.shape
    where = [np.array([number]) for number in (0, index, height, width)]
    drawn = CROPS.draw(*where)
    for top, left, tall, wide in drawn.boxes[:, 0].tolist():
        assert 0 <= top <= top + tall <= height
        assert 0 <= left <= left + wide <= width
        assert min(tall, wide) > 0
    out = [np.full((1, size, size, channels), 77, np.uint8) for size in CROPS.sizes]
    make_crops([pixels], drawn, out)
    return out


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 2), (2, 1), (1, 5000), (5000, 1), (2, 3), (3, 20_000), (7, 5), (1, 60_000)],
)
def test_tiny_and_long_images_are_cropped(height: int, width: int, channels: int) -> None:
    """From the file through the whole multi-crop and into an evaluation."""
    data = saved(gradient(height, width), "PNG")
    pixels = read(data, channels)
    assert pixels.shape == (height, width, channels)
    for index in range(20):
        cropped(pixels, index)
    assert clean(pixels, Preprocessing((16, 16))).shape == (16, 16, channels)


def test_a_crop_of_one_pixel_has_its_color() -> None:
    """Enlarged to any size; nothing of the array around it is left."""
    plain = MultiCrop(8, 4, 1, global_1=_PLAIN, global_2=_PLAIN, local=_PLAIN)
    one = [np.array([number]) for number in (0, 0, 1, 1)]
    out = [np.empty((1, size, size, 3), np.uint8) for size in plain.sizes]
    make_crops([np.full((1, 1, 3), (9, 99, 199), np.uint8)], plain.draw(*one), out)
    assert all((crops == (9, 99, 199)).all() for crops in out)


_PLAIN = MultiCrop(8, 4, 1).kinds[0]._replace(jitter_prob=0.0, gray_prob=0.0, blur_prob=0.0)

SIDES = st.integers(1, 70)
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("L", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB"),
}


@settings(max_examples=100)
@given(
    st.sampled_from([(format_, mode) for format_, modes in MODES.items() for mode in modes]),
    st.tuples(SIDES, SIDES) | st.tuples(st.just(1), st.integers(1, 3000)),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from([None, 1, 50, 10_000]),
    st.sampled_from([1, 3]),
)
def test_any_size_and_mode_can_be_decoded_and_cropped(
    kind: tuple[str, str],
    size: tuple[int, int],
    orientation: int,
    tall: bool,
    min_pixels: int | None,
    channels: int,
) -> None:
    """The right shape, kind of numbers and channels, whatever was stored, and crops of it."""
    format_, mode = kind
    height, width = size[::-1] if tall else size
    image = Image.fromarray(gradient(height, width))
    if mode == "I;16":
        image = Image.fromarray(luma(gradient(height, width)).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = format_ in ("JPEG", "PNG", "WEBP", "TIFF")
    image = image if mode == "I;16" else image.convert(mode)
    data = saved(image, format_, **({"exif": exif} if turns else {}))
    pixels = read(data, channels)
    upright = (width, height) if turns and orientation > 4 else (height, width)
    assert (pixels.shape, pixels.dtype) == ((*upright, channels), np.uint8)
    reduced = read(data, channels, min_pixels)
    assert reduced.size // channels >= min(min_pixels or 0, height * width)
    assert [crops.shape[3] for crops in cropped(reduced)] == [channels] * 4


# ------------------------------------------------------------------------------------------ damage


def refusal(read_: Callable[..., Any], data: bytes, *channels: int) -> str:
    """Why bytes cannot be read; empty where they can, and then the pixels are of the right kind."""
    try:
        found, why = read_(io.BytesIO(data), *channels), ""
    except (OSError, ValueError) as error:
        found, why = None, f"cannot be read: {error}"
    assert "TypeCheckError" not in why  # that were a mistake of ours
    if channels and not why:
        assert (found.dtype, found.shape[2]) == (np.uint8, *channels)
    return why


@pytest.mark.parametrize("name", ZOO)
def test_damage_is_a_reason_or_an_image(name: str) -> None:
    """Random bytes changed or the end cut off: OSError, ValueError, or pixels of the right kind."""
    data, rng = encoded()[name].data, np.random.default_rng(len(name))
    refusals = []
    for turn in range(40):
        spoiled = bytearray(data)
        early = min(len(data), 200) if turn % 2 else len(data)  # headers do more harm
        for place in rng.integers(0, early, rng.integers(1, 6)).tolist():
            spoiled[place] = int(rng.integers(256))
        if turn % 4 == 0:
            del spoiled[int(rng.integers(len(data))) :]
        refusals += [refusal(decode, bytes(spoiled), channels) for channels in (1, 3, 4)]
        refusal(upright_size, bytes(spoiled))
    assert any(refusals)


@settings(max_examples=200)
@given(st.binary(max_size=300) | st.sampled_from(ZOO).map(lambda name: encoded()[name].data[:99]))
def test_any_bytes_are_refused_with_a_reason(data: bytes) -> None:
    """What is no image, or no more than its beginning."""
    refusal(decode, data, 3)
    refusal(upright_size, data)


def test_postscript_is_not_handed_to_another_program() -> None:
    """Whatever the file is called."""
    with pytest.raises(OSError, match="no image of a known format"):
        decode(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"))


def test_the_size_of_a_bomb_is_told_without_setting_it_off() -> None:
    """A header of 12,000 x 12,000 pixels, and not a pixel behind it."""
    header = (12_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    assert upright_size(io.BytesIO(bomb)) == (12_000, 12_000)
    with pytest.raises((OSError, ValueError)):
        decode(io.BytesIO(bomb))
