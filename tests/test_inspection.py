"""What is found in one image, and in a split of them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lite.data import inspection
from dino_lite.data.folder import open_folder
from dino_lite.data.inspection import InspectedImages, inspect
from dino_lite.data.sources import ArraySource
from dino_lite.data.statistics import (
    describe,
    describe_classes,
    describe_duplicates,
    find_groups,
    repeated,
)
from tiny import photos


def picture(seed: int = 0, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Smooth colors, as perceptual hashes like them."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def look(root: Path, **kwargs: Any) -> tuple[Any, Any]:
    """Source and what was found of a folder's train split."""
    source = open_folder(root).train
    return source, inspect(source, np.arange(len(source)), **kwargs)


def row(root: Path) -> Any:
    """Of the one image in a folder."""
    return look(root)[1].rows[0]


STORED: list[tuple[str, Any, str, str]] = [
    ("a.jpg", lambda p: p, "JPEG", "RGB"),
    ("a.jpg", lambda p: p.convert("L"), "JPEG", "L"),
    ("a.jpg", lambda p: p.convert("CMYK"), "JPEG", "CMYK"),
    ("a.png", lambda p: p.convert("P"), "PNG", "P"),
    ("a.png", lambda p: p.convert("RGBA"), "PNG", "RGBA"),
    ("a.png", lambda p: p.convert("LA"), "PNG", "LA"),
    ("a.png", lambda p: p.convert("1"), "PNG", "1"),
    (
        "a.png",
        lambda p: Image.fromarray(np.asarray(p.convert("L")).astype(np.uint16) * 257),
        "PNG",
        "I;16",
    ),
    ("a.tif", lambda p: p, "TIFF", "RGB"),
    ("a.webp", lambda p: p, "WEBP", "RGB"),
    ("a.bmp", lambda p: p, "BMP", "RGB"),
    ("a.gif", lambda p: p.convert("P"), "GIF", "P"),
    ("a.ppm", lambda p: p, "PPM", "RGB"),
]


@pytest.mark.parametrize(("name", "make", "kind", "mode"), STORED)
def test_format_mode_and_size_are_the_files_own(
    tmp_path: Path, name: str, make: Any, kind: str, mode: str
) -> None:
    """As stored, not as decoded."""
    make(picture()).save(tmp_path / name)
    found = row(tmp_path)
    assert (found["format"].decode(), found["mode"].decode()) == (kind, mode)
    assert (found["width"], found["height"]) == (64, 48)
    assert found["readable"]
    assert not found["misnamed"]
    assert found["num_bytes"] == (tmp_path / name).stat().st_size


def test_16_bit_rgb_is_told_from_8_bits(tmp_path: Path) -> None:
    """Pillow calls both RGB; how it is stored tells."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 4, 2, 16, 2, 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + bytes(range(24)) for _ in range(2)))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines)
    (tmp_path / "a.png").write_bytes(png + chunk(b"IEND", b""))
    assert row(tmp_path)["mode"] == b"RGB;16"


def test_numpy_file_has_its_dtype_as_mode(tmp_path: Path) -> None:
    """An .npy is an image too."""
    np.save(tmp_path / "a.npy", np.zeros((5, 7, 3), np.uint8))
    found = row(tmp_path)
    assert (found["format"], found["mode"]) == (b"NPY", b"uint8")
    assert (found["height"], found["width"]) == (5, 7)


def test_size_is_upright_and_whole_where_exif_turns_a_large_image(tmp_path: Path) -> None:
    """Neither the rotation nor the reduced decoding shows in the size."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(size=(1600, 1200)).save(tmp_path / "a.jpg", exif=exif)
    found = row(tmp_path)
    assert (found["height"], found["width"]) == (1600, 1200)
    assert found["rotated"]


def test_wrong_suffix_is_noted(tmp_path: Path) -> None:
    """A PNG that is called .jpg, and a .JPEG that is one."""
    picture().save(tmp_path / "a.jpg", "PNG")
    picture().save(tmp_path / "b.JPEG", "JPEG")
    assert look(tmp_path)[1].rows["misnamed"].tolist() == [True, False]


def test_unreadable_files_are_listed_with_reasons(tmp_path: Path) -> None:
    """Truncated within the pixels, empty, no image: the others are counted all the same."""
    picture(size=(640, 480)).save(tmp_path / "a.jpg", quality=95)
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no image")
    source, found = look(tmp_path)
    assert found.rows["readable"].tolist() == [True, False, False, False]
    assert [index for index, _ in found.bad] == [1, 2, 3]
    assert "truncated" in found.bad[0][1]
    described = describe(source, found, 32)
    assert described["num_readable"] == 1
    assert [Path(bad["path"]).name for bad in described["unreadable"]] == [
        "cut.jpg",
        "empty.png",
        "text.jpg",
    ]
    assert all(bad["reason"] for bad in described["unreadable"])


def test_a_vanished_file_is_unreadable(tmp_path: Path) -> None:
    """Gone between listing and reading."""
    source = open_folder(photos(tmp_path, ["a.png", "b.png"])).train
    os.remove(tmp_path / "a.png")
    found = inspect(source, np.arange(2))
    assert found.rows["readable"].tolist() == [False, True]


def test_gray_and_blank_are_seen_whatever_the_mode(tmp_path: Path) -> None:
    """A gray picture stored as RGB has no color; one color is blank; a color photograph neither."""
    picture().convert("L").convert("RGB").save(tmp_path / "a.jpg")
    Image.new("RGB", (50, 50), (200, 30, 30)).save(tmp_path / "b.png")
    picture().save(tmp_path / "c.jpg")
    rows = look(tmp_path)[1].rows
    assert rows["gray"].tolist() == [True, False, False]
    assert rows["blank"].tolist() == [False, True, False]


def test_mean_and_std_are_those_of_the_pixels(tmp_path: Path) -> None:
    """Each image counts alike, whatever its size."""
    Image.new("RGB", (10, 10), (255, 0, 51)).save(tmp_path / "a.png")
    Image.new("RGB", (90, 70), (0, 0, 51)).save(tmp_path / "b.png")
    mean, std = look(tmp_path)[1].moments()
    assert mean == pytest.approx([0.5, 0, 0.2], abs=1e-4)
    assert std == pytest.approx([0.5, 0, 0], abs=1e-3)


def test_workers_find_what_one_process_finds(tmp_path: Path) -> None:
    """Rows in the source's order, sums and reasons, through two workers."""
    photos(tmp_path, [f"{i:03}.png" for i in range(150)])
    (tmp_path / "070.png").write_bytes(b"")
    seen: list[int] = []
    _, alone = look(tmp_path)
    _, shared = look(tmp_path, num_workers=2, progress=seen.append)
    assert sum(seen) == 150
    assert alone.rows.tobytes() == shared.rows.tobytes()
    assert alone.bad == shared.bad
    np.testing.assert_allclose(alone.sums, shared.sums)


def test_what_workers_get_can_be_pickled(tmp_path: Path) -> None:
    """Where workers are spawned, the source and the look at it are sent to them."""
    source = open_folder(photos(tmp_path, ["a.png"])).train
    copy = pickle.loads(pickle.dumps(InspectedImages(source)))
    assert copy.__getitems__([0]).rows["readable"].all()


def test_each_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digest, header and pixels come from one read."""
    source = open_folder(photos(tmp_path, ["a.png", "b.png"])).train
    opened: list[int] = []
    real = source.encoded
    monkeypatch.setattr(source, "encoded", lambda index: opened.append(index) or real(index))
    monkeypatch.setattr(source, "read", lambda *_: pytest.fail("read twice"))
    inspect(source, np.arange(2))
    assert opened == [0, 1]


def test_images_over_a_network_are_asked_for_together(tmp_path: Path) -> None:
    """A source that can fetch ahead is told what comes next, a part at a time."""
    source: Any = open_folder(photos(tmp_path, [f"{i:03}.png" for i in range(70)])).train
    asked: list[int] = []
    source.prefetch = lambda indices: asked.append(len(indices))
    inspect(source, np.arange(70))
    assert asked == [64, 6]


def arrays(*images: np.ndarray, labels: np.ndarray | None = None) -> ArraySource:
    """Images in memory."""
    return ArraySource(torch.from_numpy(np.stack(images)), labels, ["a", "b", "c"], "set")


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_sources_without_files_work_with_any_number_of_channels(channels: int) -> None:
    """No format and no bytes, but size, moments, and duplicates of pixels."""
    generator = np.random.default_rng(0)
    one, other = generator.integers(0, 256, (2, 20, 30, channels), dtype=np.uint8)
    source = arrays(one, other, one)
    found = inspect(source, np.arange(3))
    described = describe(source, found, 32)
    assert described["formats"] == described["modes"] == {}
    assert described["shorter_side"]["median"] == 20
    assert described["num_small"] == 3
    assert len(described["mean"]) == channels
    assert described["num_gray"] == (3 if channels == 1 else 0)
    assert find_groups(found.rows, hashing=True).equal.tolist() == [0, 1, 0]


def test_histograms_count_every_image_once(tmp_path: Path) -> None:
    """Tiny and very long images have their bins too."""
    for i, size in enumerate([(1, 1), (40, 32), (5000, 2), (300, 300), (4500, 4096)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    source, found = look(tmp_path)
    described = describe(source, found, 32)
    assert described["shorter_side"]["histogram"] == [
        [0, 32, 2],
        [32, 64, 1],
        [256, 384, 1],
        [4096, None, 1],
    ]
    assert described["aspect"]["histogram"] == [[0.75, 1.34, 4], [4, None, 1]]
    assert described["shorter_side"]["max"] == 4096
    assert described["aspect"]["max"] == 2500


def test_classes_are_counted() -> None:
    """Least, median, most, and classes that have one image or none."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    source = arrays(*[pixels] * 4, labels=np.array([0, 0, 0, 1]))
    found = describe_classes(source)
    assert found is not None
    assert (found["min"], found["median"], found["max"]) == (0, 1, 3)
    assert (found["num_with_one_image"], found["num_without_image"]) == (1, 1)
    assert found["largest"][0] == ["a", 3]
    assert found["smallest"][0] == ["c", 0]


def test_duplicates_exact_and_near_and_across_splits(tmp_path: Path) -> None:
    """A copy, a recompressed and resized copy, and copies of train in test; others stay alone."""
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    for seed in range(4):
        picture(seed).save(tmp_path / "train" / f"{seed}.png")
    picture(0).save(tmp_path / "train" / "4_copy.png")
    picture(1).resize((100, 75)).save(tmp_path / "train" / "5_near.jpg", quality=80)
    picture(2).save(tmp_path / "test" / "0_copy.png")
    picture(3).save(tmp_path / "test" / "1_near.jpg", quality=80)
    picture(9).save(tmp_path / "test" / "2_other.png")
    splits = open_folder(tmp_path)
    assert splits.test is not None
    parts = [inspect(s, np.arange(len(s))).rows for s in (splits.train, splits.test)]
    groups = find_groups(np.concatenate(parts), hashing=True)
    found = describe_duplicates(groups, num_train=6, hashing=True)
    exact = {"num_groups": 2, "num_surplus": 2, "num_test_images_in_train": 1}
    assert found["exact"] == exact
    assert found["near"] == exact | {"distance": 4}
    assert repeated(groups) == [
        (0, "first", 0), (0, "exact", 4),
        (1, "first", 1), (1, "near", 5),
        (2, "first", 2), (2, "exact", 6),
        (3, "first", 3), (3, "near", 7),
    ]  # fmt: skip


def test_images_of_one_color_are_no_near_duplicates(tmp_path: Path) -> None:
    """Black and white are not alike, and neither are unreadable files of equal bytes."""
    for i, color in enumerate(["black", "white", "red", "red"]):
        Image.new("RGB", (20, 20), color).save(tmp_path / f"{i}.png")
    for i in range(2):
        (tmp_path / f"bad{i}.png").write_bytes(b"")
    rows = look(tmp_path)[1].rows
    groups = find_groups(rows, hashing=True)
    assert groups.alike.tolist() == [0, 1, 2, 2, -1, -1]
    assert describe_duplicates(groups, 6, hashing=True)["near"]["num_surplus"] == 0


def test_without_hashes_exact_duplicates_are_found_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """imagehash is not needed for them."""
    monkeypatch.setattr(inspection, "perceptual_hash", None)
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "b.png")
    rows = look(tmp_path, hashing=False)[1].rows
    groups = find_groups(rows, hashing=False)
    assert groups.alike.tolist() == [0, 0]
    assert describe_duplicates(groups, 2, hashing=False)["near"] is None
