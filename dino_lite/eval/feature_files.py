"""Writes features to .npy, Parquet or safetensors, a part of a data set at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_IMODE
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dino_lite.contracts import UserError

FileFormat = Literal["npy", "parquet", "safetensors"]
SUFFIXES: dict[FileFormat, str] = {
    "npy": "",  # a folder of arrays
    "parquet": ".parquet",
    "safetensors": ".safetensors",
}
_FULL = 2**20  # bytes


class Part(NamedTuple):
    """Images `start` to `stop` (exclusive) of a split."""

    split: str
    number: int
    total: int
    start: int
    stop: int

    @property
    def title(self) -> str:
        """train-00003-of-00012."""
        return f"{self.split}-{self.number:05d}-of-{self.total:05d}"


class Table(NamedTuple):
    """The readable images of a part, in the source's order: full names, indices in the split,
    labels (-1: none) with their classes, and features by name.
    """

    split: str
    name: list[str]
    index: Int[np.ndarray, "n"]  # type: ignore[assignment]  # hides tuple.index
    label: Int[np.ndarray, "n"]
    classes: Sequence[str]
    features: dict[str, Shaped[np.ndarray, "n *S"]]


def write_table(table: Table, path: Path, form: FileFormat) -> None:
    """Write `table` to `path` atomically; the same table gives the same bytes."""
    atomically(path, lambda part: _WRITERS[form](table, part))


def atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill `.NAME.part` beside `path`, a file or a folder, then rename that to `path`.

    Raises UserError if it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        write(part)
        if path.is_dir():  # which cannot be replaced
            _remove(path)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        told = getattr(error, "strerror", None) or error
        with suppress(OSError):
            if shutil.disk_usage(path.parent).free < _FULL:  # numpy tells only numbers of items
                told = "the disk is full"
            _remove(part)
        raise UserError(
            f"{path} cannot be written ({told}): the parts written before are kept, and the same "
            "command goes on after them."
        ) from error


def check_installed(form: FileFormat) -> None:
    """Raise UserError if the library that writes the format is missing."""
    if form == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UserError(
                "file_format=parquet needs pyarrow: pip install 'dino-lite[parquet]', or use "
                "file_format=npy."
            ) from error


def _remove(path: Path) -> None:
    """Remove a file, or a folder with its files, that may be missing."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _write_npy(table: Table, folder: Path) -> None:
    """A folder of arrays: name.npy, index.npy, label.npy and one for each feature."""
    folder.mkdir()
    columns = {"name": np.array(table.name, dtype=np.str_), "index": table.index}
    for name, values in (columns | {"label": table.label} | table.features).items():
        np.save(folder / f"{name}.npy", values, allow_pickle=False)


def _write_safetensors(table: Table, path: Path) -> None:
    """index, label and features as tensors; the names as a JSON list in the metadata."""
    tensors = {"index": table.index, "label": table.label} | table.features
    whole = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    # One key only: the library writes several in random order.
    path.touch()
    usual = path.stat().st_mode  # the library lets nobody else read its files
    save_file(whole, path, metadata={"name": json.dumps(table.name)})
    path.chmod(S_IMODE(usual))


def _write_parquet(table: Table, path: Path) -> None:
    """A row for each image; features are lists of fixed size (of patches: nested)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    classes = [str(table.classes[i]) if i >= 0 else None for i in table.label.tolist()]
    columns = {
        "name": pa.array(table.name, pa.string()),
        "index": pa.array(table.index),
        "split": pa.array([table.split] * len(table.name), pa.string()),
        "label": pa.array(table.label),
        "class_name": pa.array(classes, pa.string()),
    }
    for name, values in table.features.items():
        column = pa.array(values.reshape(-1))
        for size in reversed(values.shape[1:]):
            column = pa.FixedSizeListArray.from_arrays(column, size)
        columns[name] = column
    words = ["split", "class_name"]
    pq.write_table(pa.table(columns), path, compression="none", use_dictionary=words)


_WRITERS: dict[FileFormat, Callable[[Table, Path], None]] = {
    "npy": _write_npy,
    "parquet": _write_parquet,
    "safetensors": _write_safetensors,
}
