"""Pixels of files that are easily misread: ../shared/cases/pixels.json by its ids, and HEIF.

Right values are computed here with NumPy alone.
"""

from __future__ import annotations

import io
import os
import signal
import struct
import sys
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_lite.contracts import UserError
from dino_lite.data import pil
from dino_lite.data import quiet as quiet_module
from dino_lite.data.auto import open_auto
from dino_lite.data.decode import decode, look, upright_size
from dino_lite.data.facts import read_facts
from dino_lite.data.findings import judge_pixels
from dino_lite.data.folder import open_folder
from dino_lite.data.inspection import inspect
from dino_lite.data.npz import open_npz
from dino_lite.data.pixels import Pixels
from dino_lite.data.statistics import describe
from dino_lite.data.suffixes import FORMATS, KNOWN, SUFFIXES
from test_image_zoo import difference, read, seen
from zoo import chunk, gradient, luma, npy, png, saved, tiff

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def the_same_numbers_whatever_ran_before() -> None:
    """Tests are divided among processes in any order."""
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


WHITE = Pixels(background="white")


def decoded(data: bytes, **settings: Any) -> np.ndarray[Any, Any]:
    """Pixels of a file; the size in its header is theirs."""
    pixels = decode(io.BytesIO(data), Pixels(**settings))
    if not settings.get("truncated"):
        assert upright_size(io.BytesIO(data)) == pixels.shape[:2]
    return pixels


def reason(data: bytes, **settings: Any) -> str:
    """Why a file cannot be read."""
    with pytest.raises((OSError, ValueError)) as caught:
        decode(io.BytesIO(data), Pixels(**settings))
    return str(caught.value)


def levels(values: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """8 bits of the whole range of `bits`, as RGB."""
    scaled = np.round(values.astype(float) * 255 / (2**bits - 1))
    return np.repeat(scaled[..., None], 3, 2) if scaled.ndim == 2 else scaled


def mapped(values: np.ndarray[Any, Any], low: float, high: float) -> np.ndarray[Any, Any]:
    """8 bits of `low` to `high`, as RGB."""
    scaled = np.clip(np.round((values.astype(float) - low) * 255 / (high - low)), 0, 255)
    return np.repeat(scaled[..., None], 3, 2) if scaled.ndim == 2 else scaled


def on(color: Any, pixels: np.ndarray[Any, Any], alpha: np.ndarray[Any, Any]) -> Any:
    """Composed with alpha in [0, 1]."""
    return np.round(pixels * alpha[..., None] + np.asarray(color) * (1 - alpha[..., None]))


# ---------------------------------------------------------------- TIFF: kinds, bits, alpha, planes


def test_miniswhite16() -> None:
    """Zero is white at every depth, in either byte order."""
    for order in "<>":
        values = np.array([[0, 15420, 30840, 46260]], np.uint16)
        data = tiff(values, photometric="miniswhite", byteorder=order)
        assert decoded(data)[0, :, 0].tolist() == [255, 195, 135, 75]


@pytest.mark.parametrize(
    ("bits", "most"), [(8, 255), (8, 65535), (16, 65535)], ids=["palette_of_255", "8", "palette16"]
)
def test_palettes(bits: int, most: int) -> None:
    """A map of at most 255 is of 8 bits, as libtiff takes it; others are of 16."""
    colors = RNG.integers(0, most + 1, (3, 2**bits)).astype(np.uint16)
    index = RNG.integers(0, 2**bits, (6, 8)).astype(f"u{bits // 8}")
    data = tiff(index, photometric="palette", colormap=colors)
    right = np.moveaxis(colors[:, index] / (1 if most == 255 else 257), 0, -1)
    assert np.abs(decoded(data) - right).max() <= (0 if most == 255 else 1)


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 10, 12, 14, 16])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_depth_1_to_16(bits: int, photometric: str) -> None:
    """White is 255, whatever the bits of a sample; so are the levels between."""
    if bits not in (1, 8, 16):
        pytest.importorskip("imagecodecs")
    values = RNG.integers(0, 2**bits, (4, 8))
    values[0] = 0 if photometric == "miniswhite" else 2**bits - 1
    stored = values.astype(bool if bits == 1 else np.uint8 if bits <= 8 else np.uint16)
    options = {} if bits in (1, 8, 16) else {"bitspersample": bits}
    found = decoded(tiff(stored, photometric=photometric, byteorder="<", **options))
    right = levels(values, bits)
    right = 255 - right if photometric == "miniswhite" else right
    assert (found[0] == 255).all()
    assert np.abs(found - right).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_gray_alpha_16(dtype: Any, planar: str, compression: str | None) -> None:
    """Alpha of every kind is dropped, or puts the image on a background; colors of every number are
    those that are stored.
    """
    bits = 8 * np.dtype(dtype).itemsize
    kinds = [("minisblack", 1), ("miniswhite", 1), ("rgb", 3), ("separated", 4)]
    for photometric, num in kinds:
        for extra in ("unassalpha", "assocalpha", "unspecified"):
            stored = RNG.integers(0, 2**bits, (6, 8, num + 1)).astype(dtype)
            stored[0, 0, 0], stored[0, 0, -1] = 2, 1  # no color multiplied by alpha is above it
            data = tiff(
                stored if planar == "contig" else stored.transpose(2, 0, 1),
                photometric=photometric,
                planarconfig=planar,
                extrasamples=(extra,),
                compression=compression,
                predictor=bool(compression),
            )
            right = levels(stored[..., :num] if num > 1 else stored[..., 0], bits)
            if photometric == "miniswhite":
                right = 255 - right
            if photometric == "separated":
                right = 255 * (1 - right[..., :3] / 255) * (1 - right[..., 3:] / 255)
            assert np.abs(decoded(data) - right).max() <= 2, (photometric, extra)
            if extra == "unassalpha" and num < 4:
                right = on(255, right, stored[..., -1] / (2**bits - 1))
                assert np.abs(decoded(data, background="white") - right).max() <= 2, photometric


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_multiplied_colors_are_divided_by_alpha(dtype: Any) -> None:
    """With gray and RGB alike, up to the rounding of what is stored."""
    most = np.iinfo(dtype).max
    color = RNG.integers(0, most + 1, (6, 8, 3)).astype(dtype)
    alpha = RNG.integers(most // 2, most + 1, (6, 8, 1)).astype(dtype)
    stored = np.dstack([(color.astype(float) * alpha / most).astype(dtype), alpha])
    data = tiff(stored, photometric="rgb", extrasamples=("assocalpha",))
    assert np.abs(decoded(data) - levels(color, 8 * color.itemsize)).max() <= 3
    data = tiff(stored[..., [0, 3]], photometric="minisblack", extrasamples=("assocalpha",))
    assert np.abs(decoded(data) - levels(color[..., 0], 8 * color.itemsize)).max() <= 3


# ----------------------------------------------------------------------------------- orientation


def turned_by(kind: int, value: bytes, num: int = 1) -> bytes:
    """A JPEG with the EXIF tag of orientation, of the TIFF type `kind`."""
    entry = struct.pack("<HHI", 274, kind, num) + value.ljust(4, b"\0")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)
    return saved(gradient(), "JPEG", quality=97, subsampling=0, exif=exif)


ORIENTED = {
    "BYTE": (1, b"\x06", 1, 6),
    "ASCII": (2, b"6\0", 2, 1),
    "SHORT": (3, b"\x06\0", 1, 6),
    "LONG": (4, b"\x06\0\0\0", 1, 6),
    "UNDEFINED": (7, b"\x06", 1, 1),
    "orientation_9": (3, b"\x09\0", 1, 1),
}


@pytest.mark.parametrize("kind", ORIENTED)
def test_orientation_as_text(kind: str, tmp_path: Path) -> None:
    """Numbers turn the picture, text does not; nor does a number that means nothing."""
    *tag, orientation = ORIENTED[kind]
    data = turned_by(*tag)
    assert difference(decoded(data), seen(gradient(), orientation)) <= 4
    (tmp_path / "a.jpg").write_bytes(data)
    row = inspect(open_folder(tmp_path).train, np.arange(1), hashing=False).rows[0]
    assert (row["height"], row["width"]) == seen(gradient(), orientation).shape[:2]
    assert bool(row["rotated"]) == (orientation > 1)


def test_orientation_after_the_pixels_of_a_png() -> None:
    """Header and pixels agree on it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(gradient(), "PNG")
    data = data[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + data[-12:]
    assert np.array_equal(decoded(data), seen(gradient(), 6))


# ---------------------------------------------------------------------------- damage and endings


@pytest.mark.parametrize("kind", ["zTXt", "iCCP"])
def test_png_large_text(kind: str) -> None:
    """Metadata never makes a picture unreadable: too much of it, or damaged."""
    text = kind.encode() + b"\0\0" + zlib.compress(bytes(2 << 20))
    data = saved(gradient(), "PNG")
    large = data[:33] + chunk(kind.encode(), text) + data[33:]
    assert np.array_equal(decoded(large), gradient())
    damaged = data[:33] + chunk(kind.encode(), b"x")[:-1] + b"?" + data[33:]
    assert np.array_equal(decoded(damaged), gradient())


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_last_bytes(progressive: bool) -> None:
    """Without its end marker a JPEG is whole; a file that lacks rows is refused, unless it may."""
    noise = RNG.integers(-30, 30, (96, 144, 3))
    image = np.clip(gradient(96, 144) + noise, 0, 255).astype(np.uint8)
    data = saved(image, "JPEG", progressive=progressive)
    whole = decoded(data)
    for cut in (1, 2):
        assert np.array_equal(decoded(data[:-cut]), whole)
        half = decode(io.BytesIO(data[:-cut]), 3, 48 * 72)
        assert np.array_equal(half, decode(io.BytesIO(data), 3, 48 * 72))
        assert half.shape == (48, 72, 3)
    for cut in (len(data) // 50, len(data) // 4, len(data) // 2):
        for min_pixels in (None, 48 * 72):
            with pytest.raises(OSError, match="truncated"):
                decode(io.BytesIO(data[:-cut]), 3, min_pixels)
    found = decoded(data[: -len(data) // 4], truncated=True)
    assert found.shape == whole.shape
    if not progressive:
        assert np.abs(found[:48].astype(int) - whole[:48]).max() <= 2


def test_a_progressive_jpeg_without_its_last_scan_is_incomplete() -> None:
    """It shows all rows, but not all that there was."""
    data = saved(gradient(64, 64), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    for place in (last, data.rindex(b"\xff\xc4") if b"\xff\xc4" in data[:last] else last):
        assert "truncated" in reason(data[:place])


@pytest.mark.parametrize("format_", ["PNG", "GIF", "TIFF", "WEBP", "PPM", "BMP"])
def test_what_is_there_of_a_truncated_file_is_read_on_request(format_: str) -> None:
    """Some rows as they were; nothing of it otherwise."""
    noise = RNG.integers(-30, 30, (96, 144, 3))
    image = Image.fromarray(np.clip(gradient(96, 144) + noise, 0, 255).astype(np.uint8))
    image, options = (image.quantize(64), {"interlace": 0}) if format_ == "GIF" else (image, {})
    data = saved(image, format_, **options)
    cut = data[: len(data) * 3 // 4]
    assert reason(cut)
    found, whole = decoded(cut, truncated=True), decoded(data)
    rows = slice(48, None) if format_ == "BMP" else slice(48)  # which begins with the last row
    assert np.abs(found[rows].astype(int) - whole[rows]).max() <= 3


# ---------------------------------------------------------------------------- alpha, backgrounds


def drawing(mode: str = "RGBA") -> Image.Image:
    """A black square on transparency."""
    image = Image.new("RGBA", (12, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (3, 2, 7, 6))
    return image.convert(mode)


@pytest.mark.parametrize("format_", ["PNG", "WEBP", "TIFF"])
def test_black_on_alpha(format_: str, tmp_path: Path) -> None:
    """On white it is seen; without alpha it is not, which check and pretrain say."""
    options: dict[str, Any] = {"lossless": True} if format_ == "WEBP" else {}
    for mode in ("RGBA",) if format_ == "WEBP" else ("RGBA", "LA"):
        data = saved(drawing(mode), format_, **options)
        right = np.full((8, 12, 3), 255)
        right[2:6, 3:7] = 0
        assert decoded(data).max() == 0
        assert np.array_equal(decoded(data, background="white"), right)
        right[right == 255] = 9
        assert np.array_equal(decoded(data, background=[9, 9, 9]), right)
        assert decoded(data, channels=1, background="white").max() == 255
    (tmp_path / f"a.{format_.lower()}").write_bytes(data)
    assert "data.background=white" in warned(tmp_path)
    assert warned(tmp_path, background="white") == ""


def warned(folder: Path, **settings: Any) -> str:
    """What pretrain says of the pixels, which is what check says."""
    splits = open_auto(folder, **settings)
    source = splits.train
    found = describe(source, inspect(source, np.arange(len(source)), hashing=False), 0)
    findings = [finding.text for finding in judge_pixels(found, 1, 0)]
    told = [text for text in findings if "data.range" in text or "data.background" in text]
    assert tuple(told) == read_facts(splits).warnings
    assert not any("remove them" in text for text in findings if told)  # not as blank images
    return " ".join(told)


def test_alpha_without_which_something_is_seen_is_no_warning(tmp_path: Path) -> None:
    """Photographs, and drawings whose hidden pixels are white."""
    Image.fromarray(np.dstack([gradient(), luma(gradient())])).save(tmp_path / "a.png")
    white = Image.new("RGBA", (12, 8), (255, 255, 255, 0))
    white.paste((0, 0, 0, 255), (3, 2, 7, 6))
    white.save(tmp_path / "b.png")
    assert warned(tmp_path) == ""


def packed(values: np.ndarray[Any, Any], bits: int) -> bytes:
    """Rows of a PNG."""
    places = (values.reshape(len(values), -1, 1) >> np.arange(bits)[::-1]) & 1
    return b"".join(b"\0" + np.packbits(row.astype(np.uint8)).tobytes() for row in places)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind", [0, 2, 3])
@pytest.mark.parametrize("is_largest", [False, True])
def test_the_transparent_color_of_a_png_is_hidden(bits: int, kind: int, is_largest: bool) -> None:
    """Of gray, of RGB, and of a palette, at each depth that PNG has, from 0 to the largest."""
    if (kind == 2 and bits < 8) or (kind == 3 and bits == 16):
        return
    rng = np.random.default_rng([bits, kind])
    values = rng.integers(0, 2**bits, (6, 8, 3) if kind == 2 else (6, 8))
    values[0, 0] = (2**bits - 1) * is_largest
    values[1] = values[0, 0]
    alpha = (values != values[0, 0]).astype(float)
    alpha = alpha.max(-1) if kind == 2 else alpha
    key = b"".join(int(value).to_bytes(2, "big") for value in np.ravel(values[0, 0]))
    right, palette = levels(values, bits), b""
    if kind == 3:
        colors, shown = rng.integers(0, 256, (2**bits, 3)), rng.integers(0, 256, 2**bits)
        right, alpha = colors[values], shown[values] / 255
        key, palette = bytes(shown.tolist()), chunk(b"PLTE", bytes(colors.ravel().tolist()))
    header = struct.pack(">IIBBBBB", 8, 6, bits, kind, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + chunk(b"tRNS", key)
    data += chunk(b"IDAT", zlib.compress(packed(values, bits))) + chunk(b"IEND", b"")
    assert np.abs(decoded(data) - right).max() <= 1
    assert np.abs(decoded(data, background=[200, 0, 9]) - on([200, 0, 9], right, alpha)).max() <= 1


# ------------------------------------------------------------------------------------------ range

RANGES = [
    (np.uint16, 0, 4095),
    (np.int16, -1000, 400),
    (np.float32, 0, 1),
    (np.float64, -2, 2),
    (np.int32, -5, 70_000),
    (np.uint32, 0, 70_000),
    (np.int8, -100, 100),
]


@pytest.mark.parametrize(("dtype", "low", "high"), RANGES)
def test_twelve_in_sixteen(dtype: Any, low: float, high: float) -> None:
    """A range maps values to 0..255 and clips them, in TIFF and arrays, gray and RGB; without one
    those of unknown range are refused with its name.
    """
    for shape in ((6, 8), (6, 8, 3)):
        values = low + (RNG.random(shape) * 1.2 - 0.1) * (high - low)
        if np.dtype(dtype).kind in "iu":
            values = np.clip(values, np.iinfo(dtype).min, np.iinfo(dtype).max)
        values = values.astype(dtype)
        kinds = ("minisblack", "miniswhite") if len(shape) == 2 else ("rgb",)
        right = mapped(values, low, high)
        for photometric in kinds:
            data = tiff(values, photometric=photometric)
            found = decoded(data, range=[low, high]).astype(int)
            found = 255 - found if photometric == "miniswhite" else found
            assert np.abs(found - right).max() <= 1, photometric
            if dtype is not np.uint16:
                assert "data.range=[low, high]" in reason(data)
        assert np.abs(decoded(npy(values), range=[low, high]) - right).max() <= 1
        if dtype is not np.uint16:
            assert "data.range=[low, high]" in reason(npy(values))


@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_a_range_of_png_and_pnm_of_16_bits(num: int) -> None:
    """With all of their bits, also where Pillow reduces them to 8."""
    values = RNG.integers(0, 5000, (6, 8, num)).astype(np.uint16)
    colors = values[..., : num - 1 if num in (2, 4) else num]
    right = mapped(colors[..., 0] if colors.shape[2] == 1 else colors, 0, 4095)
    assert np.abs(decoded(png(values), range=[0, 4095]) - right).max() <= 1
    if num in (2, 4):
        shown = on(255, right, values[..., -1] / 65535)
        found = decoded(png(values), range=[0, 4095], background="white")
        assert np.abs(found - shown).max() <= 1
        return
    for most in (5000, 65535):
        kind = b"P5" if num == 1 else b"P6"
        data = kind + b" 8 6 %d\n" % most + values.astype(">u2").tobytes()
        assert np.abs(decoded(data, range=[0, 4095]) - right).max() <= 1


def test_a_range_leaves_8_bits_alone() -> None:
    """In a set of both, photographs stay as they are."""
    assert np.array_equal(decoded(saved(gradient(), "PNG"), range=[0, 4095]), gradient())


@pytest.mark.parametrize("num", [1, 3])
def test_check_and_pretrain_name_the_range_of_dark_images(tmp_path: Path, num: int) -> None:
    """Where the largest value is below 1/8 of what its bits hold."""
    values = RNG.integers(0, 4000, (6, 8, num)).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(png(values))
    Image.fromarray(gradient()).save(tmp_path / "b.png")
    assert "data.range=[0,4095]" in warned(tmp_path)
    assert warned(tmp_path, range=[0, 4095]) == ""
    (tmp_path / "c.png").write_bytes(png(values * 16))
    assert warned(tmp_path) == ""


def test_an_npz_of_floats_has_a_range(tmp_path: Path) -> None:
    """It is refused without."""
    values = RNG.random((3, 5, 4, 3)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x_train=values)
    with pytest.raises(UserError, match=r"data\.range=\[low, high\]"):
        open_npz(tmp_path / "a.npz")
    source = open_auto(tmp_path / "a.npz", range=[0, 1]).train
    assert np.abs(source.read(1) - mapped(values[1], 0, 1)).max() <= 1


# ------------------------------------------------------------------------------------------ noise


def damaged_tiffs() -> list[bytes]:
    """Files whose strips do not decompress."""
    noise = RNG.integers(0, 256, (64, 64, 3), np.uint8)
    files = []
    for compression in ("tiff_adobe_deflate", "tiff_lzw", "packbits"):
        data = bytearray(saved(noise, "TIFF", compression=compression))
        data[40:2000:7] = bytes(255 for _ in data[40:2000:7])
        files.append(bytes(data))
    deep = tiff(noise.astype(np.uint16)[..., :2], extrasamples=("unassalpha",), compression="zlib")
    return [*files, deep[:-200], tiff(noise)[:200]]


def test_libtiff_noise(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing on the terminal; what libtiff has to say is the reason, in each thread its own."""
    told: dict[int, list[str]] = {}

    def run(number: int) -> None:
        told[number] = []
        for data in damaged_tiffs():
            try:
                decode(io.BytesIO(data))
            except (OSError, ValueError) as error:
                told[number].append(str(error))

    before = warnings.filters[:]
    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capfd.readouterr() == ("", "")
    assert all("Decod" in " ".join(reasons) for reasons in told.values())
    assert all(len(reasons) >= 3 for reasons in told.values())
    assert warnings.filters == before


# ------------------------------------------------------------------------------------------- HEIF


def heic(orientation: int) -> bytes:
    """The gradient as a phone stores it: turned by the container, and EXIF says so too."""
    pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(Image.fromarray(gradient(64, 96)), "HEIF", exif=exif.tobytes(), quality=95)


@pytest.mark.parametrize("orientation", [1, 6])
def test_heic_is_turned_once(orientation: int) -> None:
    """By the container; EXIF repeats it."""
    data = heic(orientation)
    found = np.abs(read(data).astype(int) - seen(gradient(64, 96), orientation))
    assert found.mean() < 3
    assert look(io.BytesIO(data)).header.format == "HEIF"


def test_heic_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the reason of bad_files.csv."""
    data = heic(1)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    pil._heif_format.cache_clear()
    assert "pip install 'dino-lite[heif]'" in reason(data)


def test_suffixes_are_read_or_known() -> None:
    """None is both."""
    assert not KNOWN.keys() & set(SUFFIXES)
    assert {b".heic", b".heif"} <= KNOWN.keys() | set(SUFFIXES)
    assert tuple(sorted(suffix.encode() for suffix in FORMATS)) == SUFFIXES


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_worker_forked_while_a_thread_decodes_can_decode() -> None:
    """Locks of the parent's other threads do not exist in the child."""
    entered, leave = threading.Event(), threading.Event()

    def decoding() -> None:
        with quiet_module._lock:
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=decoding)
    thread.start()
    entered.wait(60)
    if (child := os.fork()) == 0:
        signal.alarm(20)  # ends the child, should it wait
        with quiet_module.quiet():
            os._exit(7)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("suffix", ["tif", "npy"])
def test_values_that_are_no_numbers_are_within_the_range(tmp_path: Path, suffix: str) -> None:
    """NaN becomes the lowest, infinities the ends."""
    values = np.array([[0, 0.5, 1, np.nan], [np.inf, -np.inf, 2, -1]], np.float32)
    file = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        np.save(file, values)
    else:
        Image.fromarray(values, "F").save(file)
    shown = decode(io.BytesIO(file.read_bytes()), Pixels(1, [0, 1]))[..., 0]
    assert shown.tolist() == [[0, 128, 255, 0], [255, 0, 255, 0]]
