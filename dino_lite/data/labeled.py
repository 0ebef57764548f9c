"""Whether images have labels, and where these come from, in words."""

from __future__ import annotations

from dino_lite.contracts import Source, Splits

_NUM_NAMED = 5  # classes


def has_labels(source: Source) -> bool:
    """Whether any image has a label."""
    return source.labels is not None and bool((source.labels >= 0).any())


def labels_told(splits: Splits) -> str:
    """Where the labels of train come from, else their classes, or why there are none."""
    if splits.labels_from:
        return splits.labels_from
    if not has_labels(splits.train):
        return "the data has none"
    names = [str(name) for name in splits.train.classes]
    more = f" and {len(names) - _NUM_NAMED:,} more" if len(names) > _NUM_NAMED else ""
    return f"{', '.join(names[:_NUM_NAMED])}{more}"
