"""The grid of patches that a file's learned positions belong to."""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import Any, NamedTuple

from dino_lite.formats.owner import Tensors

STEM = "patch_embed.proj.weight"  # "D C p p": the only weight that depends on image channels


class Grid(NamedTuple):
    """Rows and columns of patches, whether the class token has a position, and, where the number of
    positions allows another grid too, one clause that says so.
    """

    rows: int
    columns: int
    with_class: bool = True
    doubt: str = ""


def told_sizes(about: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Image sizes (rows, columns) that `about` names, the most reliable first: our own spec's, that
    of timm's model_args, Hugging Face's image_size, timm's input_size, and `expected_size`.
    """
    timms, flat = about.get("pretrained_cfg") or {}, about.get("input_size")
    for told in (
        (about.get("spec") or {}).get("image_size"),
        (about.get("model_args") or {}).get("img_size"),
        about.get("image_size"),
        timms.get("input_size") or flat,
        about.get("expected_size"),
    ):
        if isinstance(told, dict):
            told = [told.get("height"), told.get("width")]
        two = [told, told] if isinstance(told, int) else list(told or ())[-2:]
        if len(two) == 2 and all(isinstance(side, int) and side > 0 for side in two):
            yield two[0], two[1]


def grid_of(
    weights: Tensors, about: dict[str, Any], class_position: bool | None = True
) -> Grid | None:
    """The grid of "pos_embed" in `weights`: of the size that `about` names if the number of
    positions agrees, else a square one; None if there is none, or it may as well be oblong.
    `class_position` is whether its owner's class tokens have a position; None: some have, and then
    a square without one is only of networks with LayerScale (DeiT III).
    """
    if "pos_embed" not in weights or STEM not in weights:
        return None
    num, patch = weights["pos_embed"].shape[1], weights[STEM].shape[-2:]
    either = {True: (num - 1,), False: (num,), None: (num - 1, num)}[class_position]
    for size in told_sizes(about):
        rows, columns = (side // one for side, one in zip(size, patch, strict=True))
        if rows * columns in either:
            return Grid(rows, columns, rows * columns == num - 1)
    for cells in either:
        side = isqrt(cells)
        if side * side != cells or not cells:
            continue
        if cells == num - 1 or class_position is False:
            return Grid(side, side, cells == num - 1)
        if "blocks.0.ls1.gamma" in weights:
            return Grid(
                side,
                side,
                False,
                f"its {num} positions are taken for a grid of {side}x{side} without one for the "
                f"class token, not for {side - 1}x{side + 1} with one, which "
                '{"image_size": [ROWS, COLUMNS]} in NAME.json next to the file NAME would say',
            )
    return None
