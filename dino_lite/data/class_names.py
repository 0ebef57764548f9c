"""The class of each folder: a part of its path below the split."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

from dino_lite.data.folder_names import is_photographs

Folder = TypeVar("Folder", bound=Hashable)
Parts = Mapping[Folder, list[str]]  # parts of each folder's path that may name its class


def name_classes(
    train: Parts[Folder], test: Parts[Folder], level: int = 0
) -> tuple[dict[Folder, str | None], dict[Folder, str | None]]:
    """The class of each folder, None if it has none: the part of its path at `level`, 0 for the
    first below the split and -1 for the last. Folders around everything else do not count.
    """
    named = _named(_unwrapped(train, frozenset()), level)
    return named, _named(_unwrapped(test, frozenset(named.values())), level)


def _unwrapped(folders: Parts[Folder], kept: frozenset[str | None]) -> dict[Folder, list[str]]:
    """`folders` without the leading parts that all have, unless nothing would be left of one, or
    the part is in `kept`.
    """
    parts = list(folders.values())
    depth = 0
    while parts and all(len(p) > depth + 1 and p[depth] == parts[0][depth] for p in parts):
        if parts[0][depth] in kept:
            break
        depth += 1
    return {path: p[depth:] for path, p in folders.items()}


def _named(folders: Parts[Folder], level: int) -> dict[Folder, str | None]:
    named: dict[Folder, str | None] = {}
    for path, parts in folders.items():
        if level < 0 and len(parts) > 1 and is_photographs(parts[-1]):
            parts = parts[:-1]  # cat/images
        within = -len(parts) <= level < len(parts)
        named[path] = parts[level] if within else None
    return named
