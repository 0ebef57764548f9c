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
from dino_lite.data.pixels import Background, Bounds, Pixels
from dino_lite.data.roots import is_url
from dino_lite.data.row_groups import RowGroups
from dino_lite.data.rows import Rows, RowSource, Table
from dino_lite.data.shards import split_names
from dino_lite.data.sources import expand
from dino_lite.settings.kinds import Size

_TESTS = ("validation", "val", "valid", "test")  # names of a test split, the first that exists


def open_huggingface(
    root: str | Path | None = None,
    config: str | None = None,
    train: str = "train",
    test: str | None = None,
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

    `test`: None takes validation or else test, if it exists. `image`: None takes the first column
    of images, encoded as such, as bytes or as a struct with bytes. `label`: None takes the first
    ClassLabel, else the column `label`; "none" ignores labels. A set on the Hub is downloaded (or,
    with `streaming`, read over the network) only with `download`; otherwise it must be in the
    cache.
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
    tables = (
        _row_groups(text, config, on_hub, train, test)
        if streaming
        else _datasets(text, config, on_hub, download, train, test)
    )
    chosen = _choose(text, tables, train, test)
    name = text.rstrip("/").rpartition("/")[2]
    name = Path(name).stem if name.endswith((".parquet", ".arrow")) else name
    pixels = Pixels(channels, range, background, truncated)
    return _splits(name, *chosen, image, label, pixels)


def _require() -> None:
    try:
        import datasets  # noqa: F401 - slow to import, and seldom needed
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError("data=huggingface needs datasets: pip install 'dino-lite[hf]'.") from error


# ------------------------------------------------------------------------------------- splits


def _datasets(
    root: str, config: str | None, on_hub: bool, download: bool, train: str, test: str | None
) -> dict[str, Table]:
    """Each split as a Dataset of `datasets`, memory-mapped."""
    import datasets

    try:
        if on_hub and not download:
            found = _from_cache(root, config)
        elif on_hub:
            found = datasets.load_dataset(root, config)
        elif os.path.isfile(os.path.join(root, "dataset_dict.json")) or os.path.isfile(
            os.path.join(root, "state.json")
        ):
            found = datasets.load_from_disk(root)
        else:
            files, kind = _files(root, config, train, test)
            found = datasets.load_dataset(kind, data_files=files)
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


def _row_groups(
    root: str, config: str | None, on_hub: bool, train: str, test: str | None
) -> dict[str, Table]:
    """Each split as the row groups of its Parquet files."""
    try:
        if on_hub:
            from datasets import load_dataset_builder

            found = load_dataset_builder(root, config).config.data_files or {}
            files = {str(split): [str(file) for file in found[split]] for split in found}
        else:
            files = _files(root, config, train, test)[0]
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
    root: str, config: str | None, train: str, test: str | None
) -> tuple[dict[str, list[str]], str]:
    """Parquet files, or else Arrow files, of each split, assigned by name, and their format."""
    if root.lower().endswith((".parquet", ".arrow")):
        return {"train": [root]}, "parquet" if _is_parquet(root) else "arrow"
    base = f"{root.rstrip('/')}/{config}" if config else root.rstrip("/")
    names: list[str] = []
    for kind in ("parquet", "arrow"):
        names = names or names_below(base, f".{kind}")
        if names:
            break
    else:
        raise UserError(
            f"{base} holds no .parquet or .arrow file: check data.root and data.config."
        )
    words = dict.fromkeys([train, *([test] if test else _TESTS)])
    of_split = {word: [name for name in names if _has_word(name, word)] for word in words}
    if test is None and train == "train":
        found = split_names(names)
        of_split = {"train": found[0], "test": found[1]}
    return {
        split: [f"{base}/{name}" for name in part] for split, part in of_split.items() if part
    }, kind


def _has_word(name: str, word: str) -> bool:
    return re.search(rf"(?<![a-z]){re.escape(word.lower())}(?![a-z])", name.lower()) is not None


def _choose(
    root: str, tables: dict[str, Table], train: str, test: str | None
) -> tuple[Table, Table | None]:
    """Train, and the test split if it exists."""
    for key, split in (("train", train), ("test", test)):
        if split is not None and split not in tables:
            raise UserError(
                f"{root} has no split data.{key}={split}, but {', '.join(tables)}: choose of these."
            )
    second = test or next((name for name in _TESTS if name in tables and name != train), None)
    return tables[train], tables[second] if second else None


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
    labels, named, why = NO_LABELS, label_column(name, train.features, label), ""
    if named is not None:
        classes = getattr(train.features[named], "names", None) or ()
        of_train, of_test = _names(train, named), [] if test is None else _names(test, named)
        if all(isinstance(value, Hashable) for value in of_train + of_test):
            labels = encode_known(of_train, of_test, classes)
        else:
            why = (
                f"no labels: the column {named} holds several for an image, which eval.multilabel "
                "measures (eval.multilabel.targets=FILE.csv)"
            )
    return Splits(
        RowSource(train, column, labels.train, labels.classes, f"{name}/train", pixels),
        None
        if test is None
        else RowSource(test, column, labels.test, labels.classes, f"{name}/test", pixels),
        name,
        labels_from=why,
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
