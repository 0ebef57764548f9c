"""Hugging Face `datasets`: by name, or as Parquet, Arrow or `save_to_disk` folders.

Map style reads what `datasets` has prepared, memory-mapped. `streaming` prepares and copies
nothing: Parquet files are read in place, one row group at a time (`row_groups`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from dino_lite.contracts import Splits, UserError
from dino_lite.data.byte_ranges import names_below
from dino_lite.data.columns import image_column, label_column
from dino_lite.data.labels import NO_LABELS, encode_known
from dino_lite.data.layout import read_layout, split_files
from dino_lite.data.pixels import Background, Bounds, Pixels
from dino_lite.data.roots import is_url
from dino_lite.data.row_groups import RowGroups
from dino_lite.data.rows import Rows, RowSource, Table
from dino_lite.data.selection import Patterns, Selection, select
from dino_lite.data.sources import expand
from dino_lite.settings.kinds import Size


def open_huggingface(
    root: str | Path | None = None,
    config: str | None = None,
    train: Patterns = None,
    test: Patterns = None,
    image: str | None = None,
    label: str | None = None,
    streaming: bool = False,
    download: bool = False,
    channels: Size = 3,
    range: Bounds | None = None,
    background: Background | None = None,
    truncated: bool = False,
) -> Splits:
    """A data set on the Hub by name, or a local folder or file of Parquet or Arrow.

    The names of the splits, or of a folder's files, say which is train and which is test, see
    `layout.read_layout`; `train` and `test` say otherwise, as in `open_folder`. `image`: None takes
    the first column of images, encoded as such, as bytes or as a struct with bytes. `label`: None
    takes the first ClassLabel, else the column `label`; "none" ignores labels. A set on the Hub is
    downloaded (or, with `streaming`, read over the network) only with `download`; otherwise it must
    be in the cache.
    """
    _require()
    text = str(root or "")
    local = not is_url(text) and expand(root).exists()
    text = str(expand(root)) if local else text
    if not local and not is_url(text) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text):
        raise UserError(
            f"data.root={text} is neither a file or folder nor the name of a set on the Hub: give "
            "one."
        )
    on_hub = not local and not is_url(text)
    if on_hub and streaming and not download:
        raise UserError(
            f"data.streaming=true reads {text} over the network: allow it with data.download=true."
        )
    chosen = select(None if train == "train" else train, test)
    files: dict[str, list[str]] = {}
    left_out: list[str] = []
    if not on_hub and not is_saved(text):
        files, left_out = _files(text, config, chosen)
        chosen = Selection()  # the files are chosen
    opened = (
        _row_groups(text, config, files) if streaming else _datasets(text, config, files, download)
    )
    found = _choose(text, opened, chosen)
    name = text.rstrip("/").rpartition("/")[2]
    name = Path(name).stem if name.endswith((".parquet", ".arrow")) else name
    pixels = Pixels(channels, range, background, truncated)
    splits = _splits(name, *found[:2], image, label, pixels)
    return splits._replace(left_out=tuple(left_out + found[2]))


def is_saved(root: str) -> bool:
    """Whether `root` was written by `Dataset.save_to_disk` or that of a DatasetDict."""
    names = ("dataset_dict.json", "state.json")
    return any(os.path.isfile(os.path.join(root, name)) for name in names)


def _require() -> None:
    try:
        import datasets  # noqa: F401 - slow to import, and seldom needed
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError("data=huggingface needs datasets: pip install 'dino-lite[hf]'.") from error


# ------------------------------------------------------------------------------------- splits


def _datasets(
    root: str, config: str | None, files: dict[str, list[str]], download: bool
) -> dict[str, Table]:
    """Each split as a Dataset of `datasets`, memory-mapped; `files` of a local set, by split."""
    import datasets

    try:
        if files:
            kind = "parquet" if _is_parquet(files["train"][0]) else "arrow"
            found = datasets.load_dataset(kind, data_files=files)
        elif is_saved(root):
            found = datasets.load_from_disk(root)
        elif download:
            found = datasets.load_dataset(root, config)
        else:
            found = _from_cache(root, config)
    except UserError:
        raise
    except Exception as error:  # the kind depends on file format, protocol and cause
        raise UserError(_not_opened(root, error)) from error
    splits = {"train": found} if isinstance(found, datasets.Dataset) else found
    return {str(split): Rows(splits[split]) for split in splits}


def _from_cache(root: str, config: str | None) -> Any:
    """A Hub data set prepared earlier: `datasets` itself would contact the Hub first."""
    from datasets.packaged_modules.cache.cache import Cache

    try:
        builder = Cache(
            dataset_name=root.rpartition("/")[2],
            repo_id=root,
            config_name=config,
            version="auto",
            hash="auto",
        )
        return builder.as_dataset()
    except Exception as error:
        raise UserError(
            f"{root} is neither a local path nor a set of the Hub in the cache "
            f"({_one_line(error)}): check data.root and data.config, or set data.download=true."
        ) from error


def _row_groups(root: str, config: str | None, files: dict[str, list[str]]) -> dict[str, Table]:
    """Each split as the row groups of its Parquet files, which are the Hub's without `files`."""
    try:
        if not files and not is_saved(root):
            from datasets import load_dataset_builder

            found = load_dataset_builder(root, config).config.data_files or {}
            files = {str(split): [str(file) for file in found[split]] for split in found}
        others = [file for part in files.values() for file in part if not _is_parquet(file)]
        if others or not files:
            raise UserError(
                f"{root} is not in Parquet ({(others or ['no file'])[0]}), which streaming needs: "
                "set data.streaming=false."
            )
        return {split: RowGroups(part) for split, part in files.items()}
    except UserError:
        raise
    except Exception as error:
        raise UserError(_not_opened(root, error)) from error


def _is_parquet(file: str) -> bool:
    return file.partition("?")[0].lower().endswith(".parquet")


def _files(
    root: str, config: str | None, chosen: Selection
) -> tuple[dict[str, list[str]], list[str]]:
    """Parquet files, or else Arrow files, of each split, and sentences that count the others."""
    if root.lower().endswith((".parquet", ".arrow")):
        return {"train": [root]}, []
    base = f"{root.rstrip('/')}/{config}" if config else root.rstrip("/")
    names = names_below(base, ".parquet") or names_below(base, ".arrow")
    if not names:
        raise UserError(
            f"{base} holds no .parquet or .arrow file: check data.root and data.config."
        )
    counts = dict.fromkeys(names, 1)
    train, test, left_out = split_files(counts, chosen.train, chosen.test)
    if left_out and not is_url(base):
        counts = {name: num_rows(Path(base, name)) for name in names}
        left_out = split_files(counts, chosen.train, chosen.test)[2]
    if not train:
        asked = ",".join(chosen.train or [])
        raise UserError(f"data.train={asked} names no file of {base}, which has {names[0]} …")
    parts = {"train": train, "test": test}
    found = {split: [f"{base}/{name}" for name in part] for split, part in parts.items() if part}
    return found, left_out


def num_rows(path: Path) -> int:
    """The number of rows of a Parquet or Arrow file; 0 if it cannot be read."""
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        if _is_parquet(str(path)):
            return int(parquet.read_metadata(path).num_rows)
        with pyarrow.memory_map(str(path)) as file:
            return sum(batch.num_rows for batch in ipc.open_stream(file))
    except (OSError, ValueError):
        return 0


def _choose(
    root: str, tables: dict[str, Table], chosen: Selection
) -> tuple[Table, Table | None, list[str]]:
    """Train, the test split if it exists, and sentences that count the others."""
    counts = {name: len(table) for name, table in tables.items()}
    found = read_layout(counts, train=chosen.train, test=chosen.test, exclude=False)
    for key, part, wanted in (("train", found.train, True), ("test", found.test, chosen.test)):
        if len(part) > 1 or (wanted and not part):
            given = getattr(chosen, key)
            asked = f"data.{key}={','.join(given)}" if given else f"data.{key}"
            raise UserError(
                f"{root} has the splits {', '.join(tables)}: {asked} must name one of them."
            )
    test = next(iter(found.test), None)
    return (
        tables[next(iter(found.train))],
        None if test is None else tables[test],
        list(found.left_out),
    )


# ------------------------------------------------------------------------------------ columns


def _splits(
    name: str,
    train: Table,
    test: Table | None,
    image: str | None,
    label: str | None,
    pixels: Pixels,
) -> Splits:
    if len(train) == 0:
        raise UserError(f"{name} has no row in its train split: check data.root and data.train.")
    column = image_column(name, train.features, image)
    labels, named = NO_LABELS, label_column(name, train.features, label)
    if named is not None:
        classes = getattr(train.features[named], "names", None) or ()
        of_train, of_test = _names(train, named), [] if test is None else _names(test, named)
        if all(isinstance(value, Hashable) for value in of_train + of_test):
            labels = encode_known(of_train, of_test, classes, f"the column {named}")
        else:
            labels = NO_LABELS._replace(
                origin=f"the column {named} holds several for an image, which eval.multilabel "
                "measures (eval.multilabel.targets=FILE.csv)"
            )
    return Splits(
        RowSource(train, column, labels.train, labels.classes, f"{name}/train", pixels),
        None
        if test is None
        else RowSource(test, column, labels.test, labels.classes, f"{name}/test", pixels),
        name,
        labels_from=labels.origin or "no column is called label",
    )


def _names(table: Table, column: str) -> list[Any]:
    """All labels; `datasets` uses -1 for a missing one."""
    return [None if value == -1 else value for value in table.column(column)]


def _not_opened(root: str, error: Exception) -> str:
    return (
        f"{root} cannot be opened ({_one_line(error)}): check data.root and data.config, and your "
        "access to it."
    )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(".")
