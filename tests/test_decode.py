"""Whatever a file holds becomes upright RGB, or a reason why not."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_lite.data import decode
from dino_lite.data.folder import open_folder
from images import GREEN, fill


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
    assert open_folder(tmp_path).train.size(0) == (6, 4)


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
    """Pillow's limit, which is the whole program's, does not count; beyond ours one is refused."""
    fill(tmp_path, "a.png")  # 24 pixels
    source = open_folder(tmp_path).train
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert source.read(0).shape == (4, 6, 3)
    assert Image.MAX_IMAGE_PIXELS == 10
    monkeypatch.setattr(decode, "MAX_PIXELS", 23)
    with pytest.raises(ValueError, match="too large"):
        source.read(0)
