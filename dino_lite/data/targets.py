"""A table of numbers per image: attributes, measurements, several labels at once."""

from __future__ import annotations

import csv
import os
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from dino_lite.contracts import Source, UserError
from dino_lite.wording import count


class Targets(NamedTuple):
    """The table's values, the titles of its columns, and for each source the row of each image; -1:
    none.
    """

    values: Float64[np.ndarray, "R L"]
    titles: list[str]
    rows: list[Int64[np.ndarray, "_"]]


def read_targets(name: str, key: str, sources: Sequence[Source]) -> Targets:
    """Read the CSV file `name`: a header with `path`, then one row per image; other columns are
    numbers.

    A path is relative to the data's root, or any unique suffix of an image's name: `b.jpg` and
    `a/b.jpg` are suffixes of `/data/a/b.jpg`. `key` is the setting's name in messages.

    Raises UserError if the file is no such table, or if a row matches no image or several.
    """
    file = Path(os.path.expanduser(os.path.expandvars(name)))
    try:
        with open(file, newline="", encoding="utf-8-sig", errors="backslashreplace") as lines:
            paths, titles, values = _read(csv.reader(lines), f"{key}={name}")
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{key}={name} cannot be read as CSV ({reason}): name a file with a column path."
        ) from error
    table = {path: number for number, path in enumerate(paths)}
    if len(table) < len(paths):
        twice = next(path for number, path in enumerate(paths) if table[path] != number)
        raise UserError(f"{key}={name} has two rows of {twice}: keep one.")
    found = [_rows_of(source, table) for source in sources]
    times = np.bincount(np.concatenate([rows[rows >= 0] for rows in found]), minlength=len(paths))
    if (times != 1).any():
        wrong = int(np.flatnonzero(times != 1)[0])
        told = "no image" if times[wrong] == 0 else f"{times[wrong]} images"
        raise UserError(
            f"{key}={name}: the row of {paths[wrong]} matches {told} of the data; paths must "
            f"be relative to data.root ({int((times != 1).sum())} of {len(paths)} rows are wrong)."
        )
    return Targets(values, titles, found)


def _read(
    reader: Iterator[list[str]], where: str
) -> tuple[list[str], list[str], Float64[np.ndarray, "R L"]]:
    """Paths, titles of the other columns, and their values."""
    heading = [cell.strip() for cell in next(reader, [])]
    if "path" not in heading or len(heading) < 2:
        raise UserError(
            f"{where} needs a heading with path and the names of one or more columns of numbers."
        )
    place = heading.index("path")
    paths, values = [], []
    for number, row in enumerate(reader, start=2):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        path = cells.pop(place) if len(cells) == len(heading) else ""
        try:
            numbers = [float(cell) for cell in cells]
        except ValueError:
            numbers = []
        if not path or not numbers or not np.isfinite(numbers).all():
            raise UserError(
                f"Row {number} of {where} is not a path and "
                f"{count(len(heading) - 1, 'number')}: fix it."
            )
        paths.append(posixpath.normpath(path))
        values.append(numbers)
    if not paths:
        raise UserError(f"{where} has a heading only: there must be a row for each image.")
    return paths, [*heading[:place], *heading[place + 1 :]], np.array(values)


def _rows_of(source: Source, table: dict[str, int]) -> Int64[np.ndarray, "N"]:
    """Each image's row: that of the longest suffix of its name in the table."""
    rows = np.full(len(source), -1, np.int64)
    for i in range(len(source)):
        end: str = source.name(i)
        while end not in table and "/" in end:
            end = end.partition("/")[2]
        rows[i] = table.get(end, -1)
    return rows
