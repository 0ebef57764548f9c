"""The words in names of folders and files that name splits, photographs, and masks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import translate
from functools import cache
from typing import Literal

Kind = Literal["train", "val", "dev", "eval", "test"]
HELD_OUT: tuple[Kind, ...] = ("val", "dev", "eval", "test")  # the first that exists is test

_WORDS: dict[str, Kind] = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("eval", "evaluation"), "eval"),
    **dict.fromkeys(("test", "testing"), "test"),
    "dev": "dev",
}
# Camel case, digits and separators divide a name: train2017, SegmentationClass, seg_train.
_TOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+")
_NUMBERED = re.compile(r"[-_.]\d+[-_]of[-_]\d+.*")  # -00000-of-00004-0123abcd
_GLUED = (  # VOCtest, trainset
    re.compile(r"(?P<a>[A-Z]{2,})(?P<b>(?:trainval|train|val|test)(?![a-z]))"),
    re.compile(r"(?i)(?<![a-z])(?P<a>trainval|train|val|test)(?P<b>(?:sets?|data|images?|imgs?)$)"),
)
_PHOTOGRAPHS = re.compile(
    r"images?|imgs?|photos?|photographs?|pictures?|pics?|rgb|frames?|inputs?|jpe?gs?|sat"
)
_FILLER = re.compile(r"raw|originals?|resized|full|left|right|bit|part|hq|\d+")
# What belongs to photographs and is none. The weak words are often classes, too.
_MASKS = re.compile(
    r"masks?|annots?|annotations?|\w+annot|trimaps?|segmentations?|groundtruths?|thumbnails?|"
    r"thumbs?"
)
_WEAK = re.compile(
    r"labels?|gt|truths?|semantic|instances?|panoptic|depths?|normals?|mattes?|previews?|manual|"
    r"segmim"
)
_OF_MASK = re.compile(
    r"[-_. ]+(?:gt|seg|manual\d*|[^\W_]*(?:mask|annot|trimap|segment|thumb)[^\W_]*)(?:[-_]?\d+)?$"
)
_OF_LABEL = re.compile(r"[-_. ]+(?:l|[^\W_]*label[^\W_]*)$")
_OF_PHOTOGRAPH = re.compile(r"[-_. ]+(?:sat|image|img|rgb|photo|orig|original|training)$")
_JUNK = frozenset(
    (
        *("@eadir", "#recycle", "@recycle", "$recycle.bin", "recycler", "lost+found"),
        *("system volume information", "__macosx", "__pycache__"),
    )
)


def tokens_of(name: str) -> list[str]:
    """The words and numbers in a name, in lower case."""
    return [token.lower() for token in _TOKEN.findall(name)]


def is_junk(name: str) -> bool:
    """Whether a folder of this name is hidden, or of an operating system or a disk station."""
    return name.startswith(".") or name.lower() in _JUNK


def split_of(name: str) -> tuple[Kind, tuple[str, ...]] | None:
    """The split that `name` says, and its other words, which must be equal in the names of all
    splits (`seg_train`, `seg_test`); None if it says none. Numbers are dropped.
    """
    name = _NUMBERED.sub("", name)
    for pattern in _GLUED:
        name = pattern.sub(r"\g<a>_\g<b>", name)
    tokens = tokens_of(name)
    places = [i for i, token in enumerate(tokens) if token in _WORDS]
    kinds = {_WORDS[tokens[i]] for i in places}
    if not kinds or places[-1] - places[0] >= len(places):
        return None
    if kinds == {"train", "val"}:
        kinds = {"train"}
    if kinds == {"dev", "test"}:
        kinds = {"test"}
    if len(kinds) > 1:
        return None
    rest = tuple(token for token in tokens if token not in _WORDS and not token.isdecimal())
    return kinds.pop(), rest


def is_photographs(name: str) -> bool:
    """Whether a folder of this name holds the photographs of a set, as `train_images` does."""
    tokens = [t for t in tokens_of(name) if t not in _WORDS and not _FILLER.fullmatch(t)]
    return bool(tokens) and all(map(_PHOTOGRAPHS.fullmatch, tokens))


def mask_strength(name: str) -> int:
    """2 if a folder of this name may hold masks, annotations or thumbnails; 1 if its name is that
    of a class as often (`normal`, `label`); else 0.
    """
    tokens = tokens_of(name)
    if any(map(_MASKS.fullmatch, tokens)) or "groundtruth" in "".join(tokens):
        return 2
    is_weak = any(map(_WEAK.fullmatch, tokens)) and not any(map(_PHOTOGRAPHS.fullmatch, tokens))
    return int(is_weak)


def without_mask(name: str) -> list[str]:
    """The words of a folder's name without those of a mask."""
    name = re.sub(r"(?<=[a-z])annot\b", "", name)
    return [t for t in tokens_of(name) if not _MASKS.fullmatch(t) and not _WEAK.fullmatch(t)]


def photograph_of(stem: str, strict: bool = False) -> str:
    """The stem of the photograph that belongs to a mask with this stem in lower case, `1` of
    `1_mask`; the stem itself if it is none of a mask. `strict`: not for the endings of labels.
    """
    found = _OF_MASK.sub("", stem)
    return found if strict or found != stem else _OF_LABEL.sub("", stem)


def plain_photograph(stem: str) -> str:
    """The stem of a photograph without an ending such as `_image`."""
    return _OF_PHOTOGRAPH.sub("", stem)


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether `path`, or a folder that it is in, matches a pattern. `*` also matches slashes and
    case is ignored. A pattern with a slash starts at the root, as `./masks`; one without, as
    `masks` or `masks/**`, matches at any depth. "." matches everything.
    """
    return _compiled(tuple(patterns)).fullmatch(path.lower()) is not None


@cache
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    forms = []
    for pattern in patterns:
        form = re.sub(r"(/\*{1,2}|/)+$", "", pattern.lower())
        is_anchored = "/" in form
        form = form.removeprefix(".").lstrip("/") if form.startswith(("./", "/")) else form
        if form in (".", ""):
            return re.compile("(?s:.*)")
        anywhere = "" if is_anchored else "(?s:.*/)?"
        forms.append(f"{anywhere}{translate(form)[:-2]}(?s:/.*)?")  # without its \\Z
    return re.compile("|".join(forms) or "(?!)")
