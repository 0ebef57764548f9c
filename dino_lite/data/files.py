"""A list of image files, local or by URL, with their classes and splits."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

import numpy as np

from dino_lite.contracts import Splits, UserError
from dino_lite.data.decode import File
from dino_lite.data.labels import NO_LABELS, Labels, Named, NameList, encode
from dino_lite.data.paths import PathList, Paths
from dino_lite.data.pixels import Background, Bounds, Pixels
from dino_lite.data.remote import Remote
from dino_lite.data.roots import is_url
from dino_lite.data.sources import PathSource, expand
from dino_lite.settings.kinds import Size

SUFFIXES = (".csv", ".tsv", ".parquet", ".txt")
COLUMNS = ("path", "label", "split")
SPLITS = ("train", "val", "test")


class Row(NamedTuple):
    """One image of a list."""

    path: bytes
    label: Any = None  # text or an integer
    split: str = "train"


def open_files(
    root: str | Path | None = None,
    labels: str | None = "auto",
    channels: Size = 3,
    base: str | Path | None = None,
    storage_options: dict[str, Any] | None = None,
    range: Bounds | None = None,
    background: Background | None = None,
    truncated: bool = False,
) -> Splits:
    """The images in the list `root`: paths or URLs, in its order.

    `root` is itself a path or URL. CSV, TSV and Parquet have a column `path`, and optionally
    `label` and `split`; a CSV or TSV without a header has these columns in this order. A text file
    has one path per line; blank lines and those starting with # are ignored.

    Relative paths are relative to `base`, by default the folder of the list. Splits: train, and val
    or else test; without a split column all is train. `labels`: auto takes the list's, `none`
    discards them. `channels`, `range`, `background`, `truncated`: see `Pixels`.
    `storage_options`: see `Remote`.
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
    collected = {name: (PathList(), NameList()) for name in SPLITS}
    try:
        with _open_list(opener, where) as file:
            for number, row in enumerate(_READERS[suffix](file, where), start=1):
                if row.split not in collected:
                    raise UserError(
                        f"Image {number} of {where} is of the split {row.split!r}: it must be "
                        "train, val or test."
                    )
                paths, names = collected[row.split]
                paths.add(row.path)
                names.add(row.label)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{where} cannot be read as a list of files ({error}): check it."
        ) from error
    pixels = Pixels(channels, range, background, truncated)
    return _splits(where, collected, labels, pixels, _base(where, base), opener)


def suffix_of(root: str) -> str:
    """The lower-case suffix of a path or URL, without a URL's query."""
    return PurePosixPath(_without_query(root)).suffix.lower()


def _splits(
    where: str,
    collected: dict[str, tuple[PathList, NameList]],
    labels: str | None,
    pixels: Pixels,
    base: bytes,
    opener: Remote,
) -> Splits:
    (train, of_train), *tests = collected.values()
    test, of_test = next((both for both in tests if len(both[0])), (None, None))
    if not len(train):
        what = "no image" if test is None else "no image of the split train"
        raise UserError(f"{where} lists {what}: check data.root.")
    found = NO_LABELS
    if labels == "auto":
        found = _labels(where, of_train.named(), of_test.named() if of_test else None)
    train_paths, test_paths = train.paths(), None if test is None else test.paths()
    for paths in (train_paths, test_paths):
        _check_protocols(opener, base, paths)
    return Splits(
        PathSource(base, train_paths, found.train, found.classes, pixels, opener),
        None
        if test_paths is None
        else PathSource(base, test_paths, found.test, found.classes, pixels, opener),
        PurePosixPath(_without_query(where)).stem,
    )


def _labels(where: str, train: Named, test: Named | None) -> Labels:
    """Either all images of a split have a class or none has: otherwise some were forgotten."""
    for split in (train, test):
        lost = 0 if split is None else int((split.codes < 0).sum())
        if split is not None and 0 < lost < len(split.codes):
            raise UserError(
                f"{where} has no label for {lost} of {len(split.codes)} images of a split, the "
                f"first being its image {int(np.argmax(split.codes < 0)) + 1}: name them all, or "
                "choose data.labels=none."
            )
    return encode(train, test)


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


def _text_rows(file: File, where: str) -> Iterator[Row]:
    for line in file.read().removeprefix(b"\xef\xbb\xbf").splitlines():
        path = line.strip()
        if path and not path.startswith(b"#"):
            yield Row(path)


def _csv_rows(file: File, where: str) -> Iterator[Row]:
    binary = cast("IO[bytes]", file)
    with io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t" if suffix_of(where) == ".tsv" else ",")
        columns: list[int | None] = []  # positions of path, label and split; None: missing
        num_needed = 0
        for number, row in enumerate(reader, start=1):
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if not columns:
                columns = _columns([cell.lower() for cell in cells], where)
                num_needed = 1 + max(column or 0 for column in columns)
                if "path" in map(str.lower, cells):
                    continue
            if len(cells) < num_needed:
                raise UserError(f"Row {number} of {where} ends after column {len(cells)}: fix it.")
            path, label, split = (None if column is None else cells[column] for column in columns)
            if not path:
                raise UserError(f"Row {number} of {where} has no path: fix it.")
            yield Row(os.fsencode(path), label or None, "train" if split is None else split)


def _columns(first: list[str], where: str) -> list[int | None]:
    """Positions of path, label and split according to the first row, a header or a row of data."""
    if "path" in first:
        return [first.index(name) if name in first else None for name in COLUMNS]
    if len(first) > len(COLUMNS) or set(first) & {"label", "split"}:
        raise UserError(
            f"{where} has no column path: give it a heading with path and, if you have them, label "
            "and split."
        )
    return [i if i < len(first) else None for i in range(len(COLUMNS))]


def _parquet_rows(file: File, where: str) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{where} needs pyarrow: pip install 'dino-lite[parquet]'.") from error
    table = parquet.ParquetFile(file)
    found = [name for name in COLUMNS if name in table.schema_arrow.names]
    if "path" not in found:
        raise UserError(f"{where} has no column path: it needs one, and may have label and split.")
    number = 0
    for batch in table.iter_batches(columns=found):
        columns: list[Iterable[Any]] = [batch.column(name).to_pylist() for name in found]
        for cells in zip(*columns, strict=True):
            number += 1
            row = dict(zip(found, cells, strict=True))
            path, label = row["path"], row.get("label")
            if not path or not isinstance(path, str | bytes):
                raise UserError(f"Row {number} of {where} has no path: fix it.")
            if label is not None and not isinstance(label, int):
                label = str(label).strip() or None
            yield Row(os.fsencode(path), label, str(row.get("split", "train")))


_READERS = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
}
