"""Rows of Parquet files, local or by URL, read a row group at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from dino_lite.contracts import UserError
from dino_lite.data import order
from dino_lite.data.byte_ranges import filesystem
from dino_lite.data.roots import is_url

_NUM_CONNECTIONS = 8  # footers read at once over a network


class Cell(NamedTuple):
    """An image in a table: its bytes, its path ("": unknown), or both."""

    content: bytes | None
    path: str

    @classmethod
    def of(cls, value: Any) -> Cell:
        """From bytes, or from `datasets`' struct of bytes and path."""
        if isinstance(value, dict):
            return cls(value.get("bytes"), value.get("path") or "")
        return cls(value, "")


class RowGroups:
    """The rows of Parquet files in order. Row group g holds rows groups[g] to groups[g+1].

    A process caches the row groups of one window of the sampler's order (4096 images, or four
    groups), and reads only the needed column. Each worker has its own cache.
    """

    def __init__(self, files: Sequence[str]) -> None:
        from datasets import Features

        with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
            footers = list(pool.map(_footer, files))
        self.files = list(files)
        self.features: Any = Features.from_arrow_schema(footers[0][0])
        sizes = [sizes for _, sizes in footers]
        for file, (schema, _) in zip(files, footers, strict=True):
            if schema.names != footers[0][0].names:
                raise UserError(
                    f"{file} has other columns than {files[0]}: give files of one kind, or a split "
                    "by its name."
                )
        self.groups = np.cumsum([0, *(size for part in sizes for size in part)], dtype=np.int64)
        # file of each group, and its index there
        self._place = [(f, g) for f, part in enumerate(sizes) for g in range(len(part))]
        self._kept: OrderedDict[tuple[str, int], Any] = OrderedDict()  # most recently used last

    def __len__(self) -> int:
        return int(self.groups[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}

    def cell(self, column: str, row: int) -> Cell:
        """An image. Raises OSError or ValueError if its row group cannot be read."""
        group = int(np.searchsorted(self.groups, row, "right")) - 1
        cells = self._kept.pop((column, group), None)
        if cells is None:
            cells = self._read(column, group)
        self._kept[column, group] = cells
        while len(self._kept) > order.groups_per_window(self.groups):
            self._kept.popitem(last=False)
        return Cell.of(cells[row - int(self.groups[group])].as_py())

    def column(self, name: str) -> list[Any]:
        """All values of a column; for small values."""
        import pyarrow.parquet as pq

        def values(file: str) -> list[Any]:
            with _opened(file) as handle:
                found: list[Any] = pq.ParquetFile(handle).read([name]).column(0).to_pylist()
            return found

        with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
            return [value for part in pool.map(values, self.files) for value in part]

    def _read(self, column: str, group: int) -> Any:
        import pyarrow.parquet as pq

        file, number = self._place[group]
        with _opened(self.files[file]) as handle:
            try:
                table = pq.ParquetFile(handle).read_row_group(number, [column], use_threads=False)
            except (OSError, ValueError):
                raise
            except Exception as error:  # any exception of the protocol's package
                raise OSError(f"{self.files[file]}: {type(error).__name__}: {error}") from error
        return table.column(0)


def _footer(file: str) -> tuple[Any, list[int]]:
    """The schema, and the rows of each row group."""
    import pyarrow.parquet as pq

    with _opened(file) as handle:
        parquet = pq.ParquetFile(handle)
        about = parquet.metadata
        return parquet.schema_arrow, [
            about.row_group(g).num_rows for g in range(about.num_row_groups)
        ]


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    fs, path = filesystem(file) if is_url(file) else (None, file)
    with open(path, "rb") if fs is None else fs.open(path, "rb") as handle:
        yield handle
