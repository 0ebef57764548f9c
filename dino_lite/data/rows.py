"""Images in the rows of a table, independent of the table's reader."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
from jaxtyping import Int, Int64, UInt8

from dino_lite.contracts import Source
from dino_lite.data.decode import decode, upright_size
from dino_lite.data.pixels import Pixels, as_pixels
from dino_lite.data.row_groups import Cell
from dino_lite.data.sources import digest

_NUM_LOOKED_AT = 8  # images covered by a digest, in addition to all labels
_MAGIC = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}


@runtime_checkable
class Table(Protocol):
    """Rows with columns. `features` are those of `datasets`, by column; `groups` are the bounds of
    rows that are read together, None if each is read alone.
    """

    features: Any
    files: list[str]

    @property
    def groups(self) -> Int64[np.ndarray, "bounds"] | None: ...

    def __len__(self) -> int: ...

    def cell(self, column: str, row: int) -> Cell:
        """An image. Raises OSError or ValueError if it cannot be read."""
        ...

    def column(self, name: str) -> list[Any]:
        """All values of a column; for small values."""
        ...


class Rows:
    """A Dataset of `datasets`, which is memory-mapped."""

    groups = None

    def __init__(self, dataset: Any) -> None:
        self.features = dataset.features
        self.files = [part["filename"] for part in dataset.cache_files]
        self.dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def cell(self, column: str, row: int) -> Cell:
        """An image, not decoded."""
        return Cell.of(self.dataset[row].column(column)[0].as_py())

    def column(self, name: str) -> list[Any]:
        """All values of a column; for small values."""
        values: list[Any] = self.dataset.select_columns([name])[:].column(name).to_pylist()
        return values


@final
class RowSource(Source):
    """Images in a column of a table; `groups` are the table's."""

    def __init__(
        self,
        table: Table,
        image: str,
        labels: Int[np.ndarray, "N"] | None,
        classes: list[str],
        title: str,
        pixels: Pixels | int = 3,
    ) -> None:
        self.table, self.image, self.title = table, image, title
        self.labels, self.classes, self.pixels = labels, classes, as_pixels(pixels)
        self.channels = self.pixels.channels
        self.groups = table.groups

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int, min_pixels: int | None = None) -> UInt8[np.ndarray, "H W C"]:
        """Image `index`, as `decode` gives it."""
        return decode(io.BytesIO(self.encoded(index)[0]), self.pixels, min_pixels)

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index`, from its header. Raises as `read` does."""
        return upright_size(io.BytesIO(self.encoded(index)[0]))

    def encoded(self, index: int) -> tuple[bytes, str]:
        """The file in the row, or that it names, and its suffix. Raises OSError or ValueError."""
        content, path = self.table.cell(self.image, index)
        if content is None:
            if not path:
                raise ValueError("the row holds no image")
            content = Path(path).read_bytes()
        found = (suffix for magic, suffix in _MAGIC.items() if content.startswith(magic))
        return content, os.path.splitext(path)[1] or next(found, ".img")

    def name(self, index: int) -> str:
        """The set's title and the row: `cats/train[17]`."""
        return f"{self.title}[{index}]"

    def data_files(self) -> list[str]:
        """The paths or URLs of the files that hold the rows."""
        return list(self.table.files)

    def digest(self) -> str:
        """16 hex digits over the labels, and the bytes of a few evenly spaced images."""
        labels = b"" if self.labels is None else self.labels.tobytes()
        chosen = np.linspace(0, len(self) - 1, min(len(self), _NUM_LOOKED_AT)).astype(int).tolist()
        contents = [self.table.cell(self.image, index).content or b"" for index in chosen]
        return digest([str(len(self)).encode(), labels, *contents])
