"""Which columns of a table are images and labels, judged by names and types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dino_lite.contracts import UserError

# Names of a column of images, if its bytes could be something else.
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "image_bytes", "bytes", "picture", "photo")


def holds_images(path: Path) -> bool:
    """Whether an Arrow file, or a Parquet file according to its schema, holds images, not paths."""
    if path.suffix.lower() == ".arrow":
        return True
    try:
        from pyarrow import parquet, types

        kinds = [field.type for field in parquet.read_schema(path)]
    except (ImportError, OSError, ValueError):  # reported when it is opened
        return False
    # Lists of images too: `open_huggingface` says what to do about them.
    kinds += [kind.value_type for kind in kinds if types.is_list(kind) or types.is_large_list(kind)]
    return any(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)
        for kind in kinds
    )


def image_column(name: str, features: Any, asked: str | None) -> str:
    """The requested column of images; else the first of those that are known to be images, by type
    or by name, or the first of bytes.
    """
    found = [column for column, feature in features.items() if _is_image(feature)]
    lists = [column for column, feature in features.items() if _is_image(_item(feature))]
    known = [column for column in found if not _is_bytes(features[column])]
    if asked in lists or (lists and asked is None and not known):
        raise UserError(
            f"{name} has several images a row in its column {lists[0]}: write one image a row "
            "(explode the list), as a struct with bytes."
        )
    found.sort(key=lambda column: (_is_bytes(features[column]), column.lower() not in _IMAGES))
    if asked is not None and asked not in found:
        raise UserError(
            f"data.image={asked} is not a column of images in {name}, which has "
            f"{', '.join(found) or 'none'}: choose of these."
        )
    if not found:
        raise UserError(
            f"{name} has no column of images or of their bytes, but {', '.join(features)}; a list "
            "of paths is for data=files."
        )
    return asked or found[0]


def label_column(name: str, features: Any, asked: str | None) -> str | None:
    """The requested column of labels; else the first ClassLabel, `label` or `labels`, if any."""
    if asked == "none":
        return None
    if asked is not None and asked not in features:
        raise UserError(
            f"data.label={asked} is not a column of {name}, which has {', '.join(features)}: "
            "choose one of these, or none."
        )
    named = [column for column, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    return asked or next((c for c in (*named, "label", "labels") if c in features), None)


def _is_image(feature: Any) -> bool:
    return (
        type(feature).__name__ == "Image"
        or _is_bytes(feature)
        or (isinstance(feature, dict) and "bytes" in feature)
    )


def _is_bytes(feature: Any) -> bool:
    """Plain bytes, which may be an image or something else."""
    return getattr(feature, "dtype", "") in ("binary", "large_binary")


def _item(feature: Any) -> Any:
    """What a list holds; None for another kind of column."""
    if isinstance(feature, list):  # in older versions of `datasets`
        return feature[0]
    return getattr(feature, "feature", None)
