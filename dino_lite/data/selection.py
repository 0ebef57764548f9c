"""What the user takes in and leaves out by name: `data.train`, `data.test`, `data.exclude`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dino_lite.contracts import UserError

Patterns = str | int | Sequence[str | int] | None


class Selection(NamedTuple):
    """Patterns of `folder_names.matches`, relative to the root.

    `train`, `test`: folders that are this split, None for what their names say. `exclude`: folders
    and files left out in addition to masks, annotations and thumbnails, which are not left out if
    not `automatic`. `class_level`: see `class_names.name_classes`.
    """

    train: list[str] | None = None
    test: list[str] | None = None
    exclude: list[str] = []  # noqa: RUF012 - a NamedTuple's default, never modified
    automatic: bool = True
    class_level: int = 0


def select(
    train: Patterns = None,
    test: Patterns = None,
    exclude: Patterns = None,
    class_level: int = 0,
) -> Selection:
    """The selection of these settings: a pattern or several, `none` for nothing (in `exclude`, also
    beside patterns: nothing else).
    """
    trains, tests, left = map(_listed, (train, test, exclude))
    if trains is not None and (not trains or "none" in trains):
        raise UserError(f"data.train={train} takes no image: name folders, or leave it out.")
    automatic = "none" not in (left or [])
    return Selection(
        trains,
        None if tests is None else [pattern for pattern in tests if pattern != "none"],
        [pattern for pattern in left or [] if pattern != "none"],
        automatic,
        class_level,
    )


def _listed(patterns: Patterns) -> list[str] | None:
    """A pattern, a list, or a list written as the text `[a,b]`."""
    if patterns is None or patterns == "":
        return None
    if isinstance(patterns, str | int):
        written = str(patterns)
        if written[:1] == "[" and written[-1:] == "]":
            return [part.strip().strip("'\"") for part in written[1:-1].split(",")]
        return [written]
    return [str(pattern) for pattern in patterns]
