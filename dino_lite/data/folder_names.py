"""The words in names of folders that name splits, images, and masks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import translate
from functools import cache
from typing import Literal

Kind = Literal["train", "val", "test"]

_WORDS: dict[str, Kind] = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Camel case, digits and separators divide a name: train2017, SegmentationClass, seg_train.
_TOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+")
_NUMBERED = re.compile(r"[-_.]\d+[-_]of[-_]\d+.*")  # -00000-of-00004-0123abcd
_IMAGES = re.compile(r"images?|imgs?|photos?|pictures?|pics|rgb|jpe?gs?")
# What belongs to photographs and is none, if photographs are beside it.
_MASKS = re.compile(
    r"masks?|\w*annot|annots|annotations?|trimaps?|labels?|segmentations?|gt|groundtruths?|truths?|"
    r"semantic|instances?|panoptic|depths?|normals?|mattes?|thumbnails?|thumbs?|previews?"
)
_MASK_STEM = re.compile(r"[-_. ]+(?:gt|seg|l|\w*(?:mask|label|annot|trimap|segment|thumb)\w*)$")
JUNK = frozenset(
    (
        *("@eadir", "#recycle", "@recycle", "$recycle.bin", "recycler", "lost+found"),
        *("system volume information", "__macosx", "__pycache__"),
    )
)


def tokens_of(name: str) -> list[str]:
    """The words and numbers in a name, in lower case."""
    return [token.lower() for token in _TOKEN.findall(name)]


def is_mask(name: str) -> bool:
    """Whether a folder of this name may hold masks, annotations or thumbnails."""
    return any(_MASKS.fullmatch(token) for token in tokens_of(name))


def is_images(name: str) -> bool:
    """Whether a folder of this name holds the photographs among other kinds of images."""
    return any(_IMAGES.fullmatch(token) for token in tokens_of(name))


def without_mask(name: str) -> list[str]:
    """The words of a folder's name without those of a mask."""
    rest = [token for token in tokens_of(name) if not _MASKS.fullmatch(token)]
    return rest or [name.lower().removesuffix("annot")]


def of_photograph(stem: str) -> str:
    """The stem of the photograph that a mask with this stem belongs to."""
    return _MASK_STEM.sub("", stem)


def is_junk(name: str) -> bool:
    """Whether a folder of this name belongs to an operating system or a disk station."""
    return name.lower() in JUNK


def split_of(name: str) -> tuple[Kind, tuple[str, ...]] | None:
    """The split that `name` says, and its other words, which must be equal in the names of all
    splits (`seg_train`, `seg_test`); None if it says none. Numbers behind the word are dropped.
    """
    tokens = tokens_of(_NUMBERED.sub("", name))
    places = [i for i, token in enumerate(tokens) if token in _WORDS]
    kinds = {_WORDS[tokens[i]] for i in places}
    adjacent = bool(places) and places[-1] - places[0] < len(places)
    if not adjacent or kinds == {"train", "test"} or len(kinds) > 2:
        return None
    kind: Kind = "train" if "train" in kinds else "test" if "test" in kinds else "val"
    before, behind = tokens[: places[0]], tokens[places[-1] + 1 :]
    return kind, (*before, *(token for token in behind if not token.isdecimal()))


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether `path`, or a folder that it is in, matches a pattern. `*` also matches slashes, case
    is ignored, and a pattern without a slash, as `masks` or `masks/**`, matches at any depth. "."
    matches everything.
    """
    return _compiled(tuple(patterns)).fullmatch(path.lower()) is not None


@cache
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    forms = []
    for pattern in patterns:
        form = re.sub(r"(/\*{1,2})+$", "", pattern.lower().removeprefix("./").rstrip("/"))
        if form in (".", ""):
            return re.compile("(?s:.*)")
        anywhere = "" if "/" in form else "(?s:.*/)?"
        forms.append(f"{anywhere}{translate(form)[:-2]}(?s:/.*)?")  # without its \\Z
    return re.compile("|".join(forms) or "(?!)")
