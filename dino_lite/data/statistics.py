"""Statistics of a data set, computed from the inspection of each image."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int64, Shaped

from dino_lite.contracts import Source
from dino_lite.data.hashing import NEAR, equal_groups, near_groups
from dino_lite.data.inspection import Inspected

SIDES = (0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)  # pixels, lower bounds
ASPECTS = (
    0,
    0.25,
    0.5,
    0.75,
    1.34,
    2,
    4,
)  # width / height, lower bounds; 3:4 and 4:3 are in one bin
MIN_SIDE = 8  # pixels: perceptual hashes use the 8x8 lowest frequencies


def describe(source: Source, found: Inspected, global_size: int) -> dict[str, Any]:
    """One split: counts, formats, sizes, colors, and unreadable images. Plain JSON.

    `global_size`: images whose shorter side has fewer pixels count as small.
    """
    good = found.rows[found.rows["readable"]]
    height, width = good["height"].astype(np.int64), good["width"].astype(np.int64)
    shorter = np.minimum(height, width)
    mean, std = found.moments()
    return {
        "num_images": len(source),
        "num_looked_at": len(found.rows),
        "num_readable": len(good),
        "num_bytes": int(found.rows["num_bytes"].sum()),
        "formats": _by_name(good["format"]),
        "modes": _by_name(good["mode"]),
        "num_rotated": int(good["rotated"].sum()),
        "num_misnamed": int(good["misnamed"].sum()),
        "num_gray": int(good["gray"].sum()),
        "num_blank": int((good["blank"] & ~good["vanishes"]).sum()),
        "num_vanishing": int(good["vanishes"].sum()),
        "num_deep": int((good["full"] > 0).sum()),
        "largest_value": int(good["largest"].max(initial=0)),
        "largest_fraction": round(
            float((good["largest"] / np.maximum(good["full"], 1)).max(initial=0)), 4
        ),
        "num_small": int((shorter < global_size).sum()),
        "shorter_side": _spread(shorter) | {"histogram": _histogram(shorter, SIDES)},
        "longer_side": _spread(np.maximum(height, width)),
        "aspect": _spread(width / np.maximum(height, 1))
        | {"histogram": _histogram(width / np.maximum(height, 1), ASPECTS)},
        "megapixels": _spread(height * width / 1e6),
        "mean": mean,
        "std": std,
        "classes": describe_classes(source),
        "unreadable": [{"path": source.name(i), "reason": reason} for i, reason in found.bad],
    }


def describe_classes(source: Source) -> dict[str, Any] | None:
    """Number of images per class; None without labels."""
    if source.labels is None:
        return None
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
    order = np.argsort(counts, kind="stable")
    return {
        "num_classes": len(counts),
        **_spread(counts),
        "smallest": [[source.classes[i], int(counts[i])] for i in order[:3]],
        "largest": [[source.classes[i], int(counts[i])] for i in order[::-1][:3]],
        "num_with_one_image": int((counts == 1).sum()),
        "num_without_image": int((counts == 0).sum()),
    }


class Groups(NamedTuple):
    """For each row the position of the first equal one, and of the first similar one (equal, or
    linked by a chain of similar hashes); -1 for unreadable images.
    """

    equal: Int64[np.ndarray, "n"]
    alike: Int64[np.ndarray, "n"]


def find_groups(rows: Shaped[np.ndarray, "n"], hashing: bool) -> Groups:
    """Exact and near duplicates. Images of one color and strips a few pixels wide are only compared
    exactly, since their hashes carry no information.
    """
    usable = np.flatnonzero(rows["readable"])
    equal = np.full(len(rows), -1)
    equal[usable] = usable[equal_groups(rows["digest"][usable])]
    alike = equal.copy()
    if hashing:
        narrow = np.minimum(rows["height"], rows["width"]) < MIN_SIDE
        shown = usable[~(rows["blank"] | narrow)[usable]]
        alike[shown] = shown[near_groups(rows["hash"][shown])]
    return Groups(equal, alike)


def describe_duplicates(groups: Groups, num_train: int, hashing: bool) -> dict[str, Any]:
    """How many images repeat another, and how many of test repeat one of train; the first
    `num_train` rows are train's. Plain JSON; "near" excludes exact duplicates, and is None without
    hashes.
    """
    in_test = np.arange(len(groups.equal)) >= num_train
    exact, both = count_duplicates(groups.equal, in_test), count_duplicates(groups.alike, in_test)
    if not hashing:
        return {"exact": exact, "near": None}
    firsts = np.flatnonzero((groups.equal == np.arange(len(in_test))) & (groups.equal >= 0))
    near = {key: both[key] - exact[key] for key in exact}
    near["num_groups"] = int((np.bincount(groups.alike[firsts]) > 1).sum())
    return {"exact": exact, "near": near | {"distance": NEAR}}


def repeated(groups: Groups) -> list[tuple[int, str, int]]:
    """Group, kind and row of every image that has a duplicate, group by group. Kinds: first (of its
    group), exact (equals an earlier one) and near.
    """
    known = groups.alike >= 0
    sizes = np.bincount(groups.alike[known], minlength=1)
    rows = np.flatnonzero(known & (sizes[groups.alike] > 1))
    found = []
    for row in rows[np.argsort(groups.alike[rows], kind="stable")].tolist():
        group = int(groups.alike[row])
        kind = "first" if group == row else "exact" if groups.equal[row] != row else "near"
        found.append((group, kind, row))
    return found


def count_duplicates(
    groups: Int64[np.ndarray, "n"], in_test: Shaped[np.ndarray, "n"]
) -> dict[str, int]:
    """From the group of each row (-1: none): number of groups with several members, of images that
    could be removed, and of test images that are in train.
    """
    known = groups >= 0
    sizes = np.bincount(groups[known], minlength=1)
    from_train = np.bincount(groups[known & ~in_test], minlength=len(sizes))
    return {
        "num_groups": int((sizes > 1).sum()),
        "num_surplus": int(np.maximum(sizes - 1, 0).sum()),
        "num_test_images_in_train": int((from_train[groups[known & in_test]] > 0).sum()),
    }


def _spread(values: Int[np.ndarray, "n"] | Float[np.ndarray, "n"]) -> dict[str, float]:
    """Minimum, median and maximum; empty without values."""
    if not len(values):
        return {}
    points = {"min": values.min(), "median": np.median(values), "max": values.max()}
    return {name: round(float(value), 4) for name, value in points.items()}


def _histogram(values: Shaped[np.ndarray, "n"], starts: tuple[float, ...]) -> list[list[Any]]:
    """[from, to, count] of each nonempty bin; `to` is None for the last one."""
    counts = np.bincount(np.searchsorted(starts, values, side="right") - 1, minlength=len(starts))
    ends = [*starts[1:], None]
    return [[a, b, int(n)] for a, b, n in zip(starts, ends, counts, strict=True) if n]


def _by_name(names: Shaped[np.ndarray, "n"]) -> dict[str, int]:
    """Count of each name, most frequent first; images without a file have none."""
    values, counts = np.unique(names[names != b""], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {values[i].decode(): int(counts[i]) for i in order}
