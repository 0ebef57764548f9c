"""A list of image files, local or by URL, with their classes and splits."""

from __future__ import annotations

import codecs
import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dino_lite.contracts import Splits, UserError
from dino_lite.data.decode import File
from dino_lite.data.folder_names import matches
from dino_lite.data.labels import NO_LABELS, NameList
from dino_lite.data.list_columns import (
    Asked,
    Columns,
    encoder,
    find_columns,
    is_heading,
    missing_suffix,
    plain_columns,
    readable,
    separator_of,
)
from dino_lite.data.listed import Listed, split_listed
from dino_lite.data.paths import PathList, Paths
from dino_lite.data.pixels import Background, Bounds, Pixels
from dino_lite.data.remote import Remote
from dino_lite.data.roots import is_url
from dino_lite.data.selection import Patterns, select
from dino_lite.data.sources import PathSource, expand
from dino_lite.settings.kinds import Size

SUFFIXES = (".csv", ".tsv", ".parquet", ".txt")


class Row(NamedTuple):
    """One image of a list; `split` is None where the list has no such column."""

    path: bytes
    label: Any = None  # text or an integer
    split: str | None = None


class Rows(NamedTuple):
    """The rows of a list, and why they have no labels, if they have none."""

    rows: Iterator[Row]
    why_unlabeled: str


def open_files(
    root: str | Path | None = None,
    labels: str | None = "auto",
    channels: Size = 3,
    base: str | Path | None = None,
    storage_options: dict[str, Any] | None = None,
    range: Bounds | None = None,
    background: Background | None = None,
    truncated: bool = False,
    train: Patterns = None,
    test: Patterns = None,
    exclude: Patterns = None,
    class_level: int = 0,
    path_column: str | None = None,
    label_column: str | None = None,
) -> Splits:
    """The images in the list `root`: paths or URLs, in its order.

    `root` is itself a path or URL. CSV, TSV and Parquet have a column `path`, and optionally
    `label` and `split`, or other names that `list_columns` knows, or `path_column` and
    `label_column`; a CSV or TSV without a heading has these three in this order. A text file has
    one path per line; blank lines and those starting with # are ignored.

    Relative paths are relative to `base`, by default the folder of the list. Without a column of
    splits, or of labels, the folders of the paths serve instead, as in `open_folder`, which
    explains `train`, `test`, `exclude` and `class_level`. `labels`: auto, or `none` for none.
    `channels`, `range`, `background`, `truncated`: see `Pixels`. `storage_options`: see `Remote`.
    """
    if labels not in (None, "auto", "none"):
        raise UserError(
            f"data.labels={labels} is not auto or none: put a column label into {root}."
        )
    opener = Remote(storage_options)
    where = str(root) if is_url(root) else str(expand(root))
    suffix = suffix_of(where)
    if suffix not in SUFFIXES:
        raise UserError(
            f"data.root={where} is not a list of files: give one of {', '.join(SUFFIXES)}."
        )
    below, chosen = _base(where, base), select(train, test, exclude, class_level)
    asked = Asked(path_column, label_column)
    rows, why_unlabeled = _read_list(opener, where, below, asked, chosen.exclude)
    parts = split_listed(where, rows, chosen)
    for part in (parts.train, parts.test):
        _check_protocols(opener, below, part)
    pixels = Pixels(channels, range, background, truncated)
    of, origin = NO_LABELS, "data.labels=none"
    if labels == "auto":
        of, origin = parts.labels, parts.labels.origin
        if of.train is None and why_unlabeled:
            origin = f"{why_unlabeled}, and {origin}"
    return Splits(
        PathSource(below, parts.train, of.train, of.classes, pixels, opener),
        None
        if parts.test is None
        else PathSource(below, parts.test, of.test, of.classes, pixels, opener),
        PurePosixPath(_without_query(where)).stem,
        tuple(parts.left_out),
        origin,
    )


def _read_list(
    opener: Remote, where: str, below: bytes, asked: Asked, exclude: Sequence[str]
) -> tuple[Listed, str]:
    """The rows of the list, and why there are no labels if there are none."""
    paths, labels, splits = PathList(), NameList(), NameList()
    split = None
    try:
        with _open_list(opener, where) as file:
            found = _READERS[suffix_of(where)](file, where, asked, below)
            for path, label, split in found.rows:
                if exclude and matches(os.fsdecode(path), exclude):
                    continue
                paths.add(path)
                labels.add(label)
                splits.add(split)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{where} cannot be read as a list of files ({error}): check it."
        ) from error
    if not len(paths):
        raise UserError(f"{where} lists no image: check data.root.")
    named = None if split is None else splits.named()
    return Listed(paths.paths(), labels.named(), named), found.why_unlabeled


def suffix_of(root: str) -> str:
    """The lower-case suffix of a path or URL, without a URL's query."""
    return PurePosixPath(_without_query(root)).suffix.lower()


def _check_protocols(opener: Remote, base: bytes, paths: Paths | None) -> None:
    folders = set() if paths is None else {base, *paths.folders()}
    for protocol in sorted({f.partition(b"://")[0] for f in folders if b"://" in f}):
        opener.check(os.fsdecode(protocol))


def _open_list(opener: Remote, where: str) -> File:
    if not is_url(where) and not os.path.isfile(where):
        what = "is a folder" if os.path.isdir(where) else "does not exist"
        raise UserError(f"data.root={where} {what}: name a list of files.")
    return opener(os.fsencode(where))


def _base(where: str, base: str | Path | None) -> bytes:
    """The folder that relative paths are relative to, ending in a slash."""
    if base is not None:
        where = f"{base}/" if is_url(base) else str(expand(base)) + "/"
    return os.fsencode(where[: _without_query(where).rindex("/") + 1])


def _without_query(where: str) -> str:
    return where.partition("?")[0] if is_url(where) else where


def _text_rows(file: File, where: str, asked: Asked, base: bytes) -> Rows:
    lines = map(bytes.strip, file.read().removeprefix(codecs.BOM_UTF8).splitlines())
    rows = (Row(line) for line in lines if line and not line.startswith(b"#"))
    return Rows(_with_suffix(rows, where, base), "a text file has no labels")


def _csv_rows(file: File, where: str, asked: Asked, base: bytes) -> Rows:
    is_utf_16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    file.seek(0)
    lines: Iterator[str] = codecs.iterdecode(file, "utf-8-sig", "surrogateescape")
    if is_utf_16:
        lines = iter(file.read().decode("utf-16").splitlines(keepends=True))
    first = next((line for line in lines if line.strip() and not line.startswith("#")), "")
    reader = csv.reader(chain([first], lines), delimiter=separator_of(first, suffix_of(where)))
    numbered = ((reader.line_num, [cell.strip() for cell in row]) for row in reader)
    filled = (row for row in numbered if any(row[1]))
    top: list[tuple[int, list[str]]] = list(islice(filled, _NUM_SAMPLED))
    cells = [row for _, row in top]
    if not cells:
        return Rows(iter(()), "")
    if is_heading(cells[0], cells[1] if len(cells) > 1 else None):
        columns = find_columns(cells[0], cells[1:], where, asked)
        del top[0]
    else:
        columns = plain_columns(cells[0], where, asked)
    rows = _csv_cells(chain(top, filled), columns, where, base)
    return Rows(_with_suffix(rows, where, base), columns.why_unlabeled)


def _csv_cells(
    rows: Iterable[tuple[int, list[str]]], columns: Columns, where: str, base: bytes
) -> Iterator[Row]:
    needed = 1 + max(columns.path, columns.label or 0, columns.split or 0)
    encoded = encoder(base)
    for number, cells in rows:
        if len(cells) < needed:
            raise UserError(f"Row {number} of {where} ends after column {len(cells)}: fix it.")
        path, label, split = (None if i is None else cells[i] for i in columns[:3])
        if not path:
            raise UserError(f"Row {number} of {where} has no path: fix it.")
        yield Row(encoded(path), readable(label) if label else None, split)


def _parquet_rows(file: File, where: str, asked: Asked, base: bytes) -> Rows:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{where} needs pyarrow: pip install 'dino-lite[parquet]'.") from error
    table = parquet.ParquetFile(file)
    names = table.schema_arrow.names
    top: list[dict[str, Any]] = next(
        (batch.to_pylist() for batch in table.iter_batches(_NUM_SAMPLED)), []
    )
    sample = [[cell if isinstance(cell, str) else "" for cell in row.values()] for row in top]
    columns = find_columns(names, sample, where, asked)
    chosen = [None if i is None else names[i] for i in columns[:3]]

    def rows() -> Iterator[Row]:
        number = 0
        for batch in table.iter_batches(columns=[name for name in chosen if name]):
            empty = [None] * batch.num_rows
            read = [empty if name is None else batch.column(name).to_pylist() for name in chosen]
            for path, label, split in zip(*read, strict=True):
                number += 1
                if not path or not isinstance(path, str | bytes):
                    raise UserError(f"Row {number} of {where} has no path: fix it.")
                if label is not None and not isinstance(label, int):
                    label = str(label).strip() or None
                yield Row(os.fsencode(path), label, None if chosen[2] is None else str(split))

    return Rows(_with_suffix(rows(), where, base), columns.why_unlabeled)


def _with_suffix(rows: Iterator[Row], where: str, base: bytes) -> Iterator[Row]:
    """The rows, with the suffix that their paths lack."""
    suffix: bytes | None = None
    for row in rows:
        if suffix is None:
            suffix = missing_suffix(row.path, base, where)
        yield row._replace(path=row.path + suffix) if suffix else row


_NUM_SAMPLED = 50  # rows that are looked at to understand the columns
_READERS = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
}
