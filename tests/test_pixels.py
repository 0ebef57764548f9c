"""Pixels of files that are easily misread: each case of ../shared/cases/pixels.json, and HEIF."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_lite.data import decode, pil
from dino_lite.data.suffixes import FORMATS, KNOWN, SUFFIXES
from test_image_zoo import read, seen
from zoo import gradient, saved


def reason(data: bytes, **settings: Any) -> str:
    """Why a file cannot be read."""
    with pytest.raises((OSError, ValueError)) as caught:
        decode.decode(io.BytesIO(data), **settings)
    return str(caught.value)


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
