"""Whatever a file holds becomes upright RGB, or a reason why not."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_lite.data import decode
from dino_lite.data.folder import open_folder
from images import GREEN, fill
from zoo import gradient, luma, npy, saved, tiff


def read(path: Path) -> np.ndarray[Any, Any]:
    """The one image of the folder that `path` lies in, as a source reads it."""
    source = open_folder(path.parent).train
    assert len(source) == 1
    return source.read(0)


def test_exif_orientation(tmp_path: Path) -> None:
    """A camera held upright: the size is that of the image as seen, in the header too."""
    image = Image.new("RGB", (6, 4), GREEN)
    image.paste((255, 0, 0), (0, 0, 6, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright
    image.save(tmp_path / "a.png", exif=exif)
    pixels = read(tmp_path / "a.png")
    assert pixels.shape == (6, 4, 3)
    assert pixels[0, 3].tolist() == [255, 0, 0]
    assert pixels[0, 0].tolist() == [0, 255, 0]
    assert open_folder(tmp_path).train.image_size(0) == (6, 4)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    """0, 1/4, 1/2 and all of the range, in three formats."""
    deep = np.array([[0, 16384, 32768, 65535]], np.uint16)
    path = tmp_path / f"a.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 4 1 65535\n" + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(deep).save(path)
    assert read(path)[0].tolist() == [[v] * 3 for v in (0, 64, 128, 255)]


@pytest.mark.parametrize(
    ("mode", "color", "seen"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 7, (7, 7, 7)),
        ("LA", (7, 0), (7, 7, 7)),
        ("RGBA", (1, 2, 3, 0), (1, 2, 3)),
    ],
)
def test_other_modes_become_rgb(tmp_path: Path, mode: str, color: Any, seen: Any) -> None:
    """Gray is repeated, transparency dropped."""
    Image.new(mode, (3, 2), color).save(tmp_path / "a.png")
    assert tuple(read(tmp_path / "a.png")[0, 0]) == seen


def test_cmyk(tmp_path: Path) -> None:
    """Printers' JPEGs: no ink is white, cyan is not red."""
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.jpg")
    assert read(tmp_path / "a.jpg").min() > 250
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.jpg")
    assert read(tmp_path / "a.jpg")[0, 0, 0] < 5 < 250 < read(tmp_path / "a.jpg")[0, 0, 1]


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 255])])
def test_palette(tmp_path: Path, transparency: Any) -> None:
    """Palette images, with one transparent color or a table of them, and without a warning."""
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, *GREEN])
    keys = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a.png", **keys)
    assert tuple(read(tmp_path / "a.png")[0, 0]) == GREEN


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    """The others are not looked at."""
    frames = [Image.new("RGB", (4, 4), color) for color in (GREEN, (255, 0, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert tuple(read(tmp_path / "a.gif")[0, 0]) == GREEN


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG file of 8-bit gray from its parts."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def damaged(folder: Path) -> dict[str, bytes]:
    """Files that cannot be read, by name."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    good = {}
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tiff"):
        noise.save(folder / f"good.{suffix}")
        good[suffix] = (folder / f"good.{suffix}").read_bytes()
        (folder / f"good.{suffix}").unlink()
    deep = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    deep.save(folder / "good.tiff")
    floats = (folder / "good.tiff").read_bytes()
    (folder / "good.tiff").unlink()
    return {
        "empty.png": b"",
        "text.jpg": b"<html>not found</html>",
        "header.png": good["png"][:20],
        "checksum.png": good["png"][:60] + b"\0\0\0\0" + good["png"][64:],
        "unpacked.png": png(8, 8, b"no zlib stream"),
        "bomb.png": png(50_000, 50_000, zlib.compress(b"\0")),
        "floats.tiff": floats,
        **{f"half.{suffix}": data[: len(data) // 2] for suffix, data in good.items()},
    }


def test_damaged_files_raise_what_the_contract_says(tmp_path: Path) -> None:
    """OSError or ValueError with a reason, never another; here warnings are errors as well."""
    files = damaged(tmp_path)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    source = open_folder(tmp_path).train
    assert len(source) == len(files)
    for index in range(len(source)):
        with pytest.raises((OSError, ValueError)) as caught:
            source.read(index)
        assert len(str(caught.value)) > 10, source.name(index)


def test_a_file_that_goes_missing_is_unreadable(tmp_path: Path) -> None:
    """Deleted during the run."""
    source = open_folder(fill(tmp_path, "a.png")).train
    (tmp_path / "a.png").unlink()
    with pytest.raises(OSError, match=r"a\.png"):
        source.read(0)


def test_large_images_are_read_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow's warning is not for us; beyond our limit, or what a program sets, one is refused."""
    fill(tmp_path, "a.png")  # 24 pixels
    source = open_folder(tmp_path).train
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12)
    assert source.read(0).shape == (4, 6, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11)
    with pytest.raises(ValueError, match="too large"):
        source.read(0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert source.read(0).shape == (4, 6, 3)
    monkeypatch.setattr(decode, "MAX_PIXELS", 23)
    with pytest.raises(ValueError, match="too large"):
        source.read(0)


# --------------------------------------------------------------------------------- other channels

FIVE = np.random.default_rng(0).integers(0, 256, (6, 7, 5), np.uint8)
PLANES = FIVE.transpose(2, 0, 1)
STORED = {
    "npy": npy(FIVE),
    "npy, columns first": npy(np.asfortranarray(FIVE)),
    "npy, 16 bits": npy(FIVE.astype(np.uint16) * 257),
    "npy, 16 bits, big endian": npy(FIVE.astype(">u2") * 257),
    "tiff by pixel": tiff(FIVE, planarconfig="contig"),
    "tiff by pixel, deflated": tiff(FIVE, planarconfig="contig", compression="zlib"),
    "tiff by plane": tiff(PLANES, planarconfig="separate"),
    "tiff by plane, deflated": tiff(PLANES, planarconfig="separate", compression="zlib"),
    "tiff by page": tiff(PLANES, photometric="minisblack"),
    "tiff, 16 bits": tiff(FIVE.astype(np.uint16) * 257, planarconfig="contig"),
    "bigtiff": tiff(FIVE, planarconfig="contig", bigtiff=True),
}


def decoded(data: bytes, channels: int) -> np.ndarray[Any, Any]:
    return decode.decode(io.BytesIO(data), channels)


def reason(data: bytes, channels: int = 3) -> str:
    """Why it cannot be had."""
    with pytest.raises((OSError, ValueError)) as caught:
        decoded(data, channels)
    assert "TypeCheckError" not in str(caught.value)  # that were a mistake of ours
    return str(caught.value)


@pytest.mark.parametrize("name", STORED)
def test_more_channels_come_as_they_are_stored(name: str) -> None:
    """Whatever their order in the file; its header tells the size too."""
    found = decoded(STORED[name], 5)
    assert np.array_equal(found, FIVE)
    assert found.flags.c_contiguous
    assert decode.upright_size(io.BytesIO(STORED[name])) == (6, 7)


@pytest.mark.parametrize("name", sorted(set(STORED) - {"tiff by page"}))
@pytest.mark.parametrize("channels", [1, 3, 4, 6])
def test_another_number_of_channels_is_refused(name: str, channels: int) -> None:
    """No channel is guessed, none left out."""
    assert f"has 5 channels, not data.channels={channels}" in reason(STORED[name], channels)


def test_images_of_two_and_four_bands_come_as_they_are() -> None:
    """Gray with alpha, RGBA, CMYK, and palettes that have alpha; nothing else is made into them."""
    gray_alpha = np.dstack([luma(gradient()), 255 - luma(gradient())])
    rgba = np.dstack([gradient(), gradient()[..., 0]])
    cmyk = Image.fromarray(gradient()).convert("CMYK")
    for format_ in ("PNG", "TIFF"):
        assert np.array_equal(decoded(saved(rgba, format_), 4), rgba)
    assert np.array_equal(decoded(saved(gray_alpha, "PNG"), 2), gray_alpha)
    assert np.array_equal(decoded(saved(cmyk, "TIFF"), 4), np.asarray(cmyk))
    palette = Image.fromarray(gradient()).quantize(8)
    assert np.array_equal(
        decoded(saved(palette, "PNG"), 4)[..., :3], np.asarray(palette.convert("RGB"))
    )
    for image in (luma(gradient()), gradient()):
        for channels in (2, 4, 5):
            assert "channels" in reason(saved(image, "PNG"), channels)
    for channels in (2, 5):
        assert "channels" in reason(saved(palette, "PNG"), channels)
        assert "has 1 channel," in reason(saved(palette.convert("1"), "PNG"), channels)


def test_arrays_of_other_layouts_and_kinds_are_refused() -> None:
    """Each with what is wrong; a range that is not known is not guessed."""
    assert "an array is H W C, but this is (5, 6, 7)" in reason(npy(PLANES), 5)
    assert "an array is H W C, but this is (3, 6, 7)" in reason(npy(PLANES[:3]), 3)
    for shape in ((4,), (2, 3, 4, 5), (0, 4, 3), ()):
        assert "not that of an image, H W C" in reason(npy(np.zeros(shape, np.uint8)))
    for kind in (np.float32, np.int64, np.int8, bool, np.complex64, "U3", [("a", np.uint8)]):
        assert "store uint8 or uint16" in reason(npy(np.zeros((4, 5, 3), kind)))
        if kind in (np.float32, np.int8):
            assert "store uint8" in reason(
                tiff(np.zeros((4, 5, 5), kind), planarconfig="contig"), 5
            )
    assert "uint16" in reason(npy(np.array([[{}]], object)))
    assert "32 bits" in reason(saved(Image.new("I", (4, 4)), "TIFF"))
    assert "version" in reason(b"\x93NUMPY\3\0" + npy(FIVE)[8:], 5)


def test_bombs_are_refused_by_their_headers() -> None:
    """Numbers that would fill the memory are not even asked for."""
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': %s, }"
    for shape in ("(99999, 99999, 3)", "(3, 3, 999999999999)", "(2**40, 2**40, 3)"):
        text = (header % shape.replace("2**40", str(2**40))).encode().ljust(117) + b"\n"
        data = b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text
        assert "too large" in reason(data, 3)
    long = b"\x93NUMPY\2\0" + struct.pack("<I", 1 << 30) + b" " * 99
    assert len(reason(long)) > 10
    for data in (tiff(FIVE, planarconfig="contig"), saved(gradient(), "TIFF")):
        for tag in (256, 257):  # width and height
            entry = struct.pack("<HH", tag, 3)
            entry = entry if entry in data else struct.pack("<HH", tag, 4)
            at = data.index(entry) + 2
            bomb = data[:at] + struct.pack("<HII", 4, 1, 400_000_000) + data[at + 10 :]
            assert "too large" in reason(
                bomb, 3 if data[4:] == saved(gradient(), "TIFF")[4:] else 5
            )


def test_many_channels_of_a_tiff_need_tifffile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named with its extra; what Pillow reads does not need it."""
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert "pip install 'dino-lite[tiff]'" in reason(STORED["tiff by pixel"], 5)
    assert decoded(saved(gradient(), "TIFF"), 3).shape == gradient().shape
