"""Folders and files beside photographs that are none: masks, annotations, thumbnails."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from dino_lite.data.folder_names import (
    is_photographs,
    mask_strength,
    photograph_of,
    plain_photograph,
    tokens_of,
    without_mask,
)
from dino_lite.data.folder_tree import FolderNode

Names = Callable[[str], Iterable[str]]  # of the images directly in a folder
MASK_WORDS = (b"mask", b"gt", b"seg", b"trimap", b"annot", b"manual", b"thumb")
_MOST = 0.9


class _Held(NamedTuple):
    """The stems of all images in a folder, in lower case, and their suffixes."""

    stems: set[str]
    suffixes: set[str]


class MaskFinder:
    """Judges folders by their names and those of the folders and images beside them."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._known: dict[tuple[str, bool], _Held] = {}

    def is_mask(self, folder: FolderNode, beside: Sequence[FolderNode]) -> bool:
        """Whether `folder` holds masks of what is beside it: a folder called images or photos; or
        if most of its stems are those of one folder beside it, or of images in its parent.

        Stems that differ in their number only say something if the suffixes differ, if the names of
        the folders say that they belong together ("train", "train_masks"), or in a parent.
        """
        if not (strength := mask_strength(folder.name)):
            return False
        others = [other for other in beside if not mask_strength(other.name)]
        if any(is_photographs(other.name) for other in others):
            return True
        mine, parent = self._held(folder), folder.parent
        judge = _most_of if strength > 1 else self._alike
        if parent and parent.own and judge(mine, self._held(parent, own=True)):
            return True
        rest = without_mask(folder.name)
        related = [other for other in others if rest and tokens_of(other.name) == rest]
        if any(_most_of(mine, self._held(other)) for other in related):
            return True
        return strength > 1 and sum(self._alike(mine, self._held(o)) for o in others) == 1

    def _alike(self, mask: _Held, other: _Held) -> bool:
        numbered = len({re.sub(r"\d+", "", stem) for stem in mask.stems}) == 1
        if numbered and mask.suffixes == other.suffixes:
            return False
        return _most_of(mask, other)

    def _held(self, folder: FolderNode, own: bool = False) -> _Held:
        key = (folder.path, own)
        if key not in self._known:
            folders = [folder] if own else folder.walk()
            names = [name.lower() for each in folders for name in self._names(each.path)]
            parts = [os.path.splitext(name) for name in names]
            self._known[key] = _Held({stem for stem, _ in parts}, {suffix for _, suffix in parts})
        return self._known[key]


def _most_of(mask: _Held, other: _Held) -> bool:
    """Whether most stems of `mask` belong to photographs in `other`."""
    known = other.stems | {plain_photograph(stem) for stem in other.stems}
    hits = sum(stem in known or photograph_of(stem) in known for stem in mask.stems)
    return hits > len(mask.stems) / 2


def masks_among(names: Sequence[str]) -> list[int]:
    """Positions of the masks among the names of all images in one folder: `1_mask.png` beside
    `1.png`. None if this does not hold for nearly all names that end so.
    """
    stems = [os.path.splitext(name)[0].lower() for name in names]
    of = {
        i: photograph
        for i, stem in enumerate(stems)
        if (photograph := photograph_of(stem, True)) != stem
    }
    if not of:
        return []
    known = {plain_photograph(stem) for i, stem in enumerate(stems) if i not in of} | set(stems)
    found = [i for i, photograph in of.items() if photograph in known]
    return found if len(found) >= _MOST * len(of) else []
