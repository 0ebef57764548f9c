"""Folders of small images, and what a source says of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_lite.contracts import Source, UserError

GREEN = (0, 255, 0)


def fill(root: Path, *names: str) -> Path:
    """A folder with a small green image of each name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), GREEN).save(root / name)
    return root


class Broken(Source):
    """Another source, some of whose images raise `error` when they are read."""

    def __init__(
        self, source: Source, bad: Callable[[int], bool], error: Exception | None = None
    ) -> None:
        self.source, self.bad = source, bad
        self.error = error or OSError("truncated")
        self.labels, self.classes = source.labels, source.classes

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int, min_pixels: int | None = None) -> np.ndarray:
        if self.bad(index):
            raise self.error
        return self.source.read(index, min_pixels)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def digest(self) -> str:
        return self.source.digest()


def names(source: Source | None) -> list[str]:
    """File names, in order."""
    assert source is not None
    return [os.path.basename(source.name(i)) for i in range(len(source))]


def classes(source: Source | None) -> list[str] | None:
    """The class of each image, in order."""
    assert source is not None
    return None if source.labels is None else [source.classes[i] for i in source.labels]


def sentence(call: Any, *args: Any, **kwargs: Any) -> str:
    """What the user is told."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)
