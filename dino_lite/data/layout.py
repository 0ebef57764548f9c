"""Splits, classes and what is left out, read from folder names and their numbers of images.

One rule for folders, lists, tar shards and tables: `read_layout` assigns every folder (or shard, or
folder of a tar's members) to train, to test or to neither; `name_classes` names the class of each.
Neither touches a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from dino_lite.data.folder_names import HELD_OUT, Kind, is_junk, matches, split_of
from dino_lite.data.folder_tree import FolderNode, folder_tree
from dino_lite.data.mask_folders import MaskFinder, Names
from dino_lite.wording import count

_NUM_NAMED = 3  # folders named in a sentence
_MOST_PATTERNS = 10  # in a key that a sentence names


class Layout(NamedTuple):
    """The folders of train and of test with the parts of their paths that may name their class, and
    sentences that count what is in neither.

    `train_folder`: the folder that names the split ("a/train"), "" if there is none or several;
    `test_folder` likewise.
    """

    train: dict[str, list[str]]
    test: dict[str, list[str]]
    train_folder: str = ""
    test_folder: str = ""
    left_out: Sequence[str] = ()


class _Place(NamedTuple):
    """Where the images of a folder go, and the folder that decides it."""

    kind: Literal["train", "test", "spare", "beside"]
    decided_by: str


def read_layout(
    folders: Mapping[str, int],
    names: Names = lambda _: (),
    train: Sequence[str] | None = None,
    test: Sequence[str] | None = None,
    exclude: bool = True,
) -> Layout:
    """Assign each of `folders` ("train/cat", "" for the top; with its number of images).

    Where names with a train word and a val or test word stand side by side, they are splits; all
    that is beside them, or beside folders around them, is left out. Of the held-out splits, val is
    the test split, or else dev, eval, test. Without such names all is train. Masks and the like are
    left out (if `exclude`), see `MaskFinder`, to which `names` gives the images of a folder.
    `train`, `test`: patterns of the folders that are a split instead, see `matches`; an empty list:
    none.
    """
    top = folder_tree(folders)
    wanted = [pattern for pattern in (*(train or ()), *(test or ())) if pattern != "."]
    left_out = _exclude(top, names, wanted) if exclude else []
    places, of_splits = _find_splits(top)
    asked = train is not None or test is not None
    _take(places, of_splits, train, test)
    left_out += _describe_left(folders, places, asked)

    def part(kind: str) -> dict[str, list[str]]:
        return {p: _class_parts(p, of_splits) for p, place in places.items() if place.kind == kind}

    def folder(kind: str) -> str:
        deciding = {place.decided_by for place in places.values() if place.kind == kind}
        return deciding.pop() if len(deciding) == 1 else ""

    return Layout(part("train"), part("test"), folder("train"), folder("test"), left_out)


def split_files(
    files: Mapping[str, int], train: Sequence[str] | None = None, test: Sequence[str] | None = None
) -> tuple[list[str], list[str], list[str]]:
    """Train and test among tar shards or tables, given with their numbers of images, by the words
    in their names and folders; and sentences that count the others. The pattern `val` also names
    `val-00000-of-00002.parquet`.
    """
    of = {file.rpartition(".")[0] or file: file for file in files}
    named = {name: files[file] for name, file in of.items()}

    def numbered(patterns: Sequence[str] | None) -> list[str] | None:
        if patterns is None:
            return None
        return [form for p in patterns for form in (p, f"{p}[-_.][0-9]*")]

    found = read_layout(named, train=numbered(train), test=numbered(test), exclude=False)
    parts = [[of[name] for name in of if name in part] for part in (found.train, found.test)]
    return parts[0], parts[1], list(found.left_out)


# ------------------------------------------------------------------------------------ exclusion


def _exclude(top: FolderNode, names: Names, wanted: Sequence[str]) -> list[str]:
    """Remove junk, and masks and the like, from the tree, save the folders that are `wanted` by
    name; sentences that count them.
    """
    removed: dict[str, list[tuple[str, int]]] = {}
    finder = MaskFinder(names)
    for node in top.walk():
        held = node.held()
        for child in held:
            what = ""
            if is_junk(child.name):
                what = "files of the system"
            elif finder.is_mask(child, [other for other in held if other is not child]):
                what = "masks or annotations"
            if what and not (matches(child.path, wanted) and not matches(node.path, wanted)):
                removed.setdefault(what, []).append((child.path, child.total))
                child.add(-child.total)
    return [
        f"{were(sum(num for _, num in found))} left out as {what} ({_shown(n for n, _ in found)}): "
        "data.exclude=none takes them in."
        for what, found in removed.items()
    ]


# ------------------------------------------------------------------------------------ splits


def _find_splits(top: FolderNode) -> tuple[dict[str, _Place], set[str]]:
    """The place of every folder with images, and the folders whose names are those of splits."""
    places: dict[str, _Place | None] = {}
    names: set[str] = set()
    around: set[str] = set()  # folders that splits are in
    waiting: list[tuple[FolderNode, _Place | None]] = [(top, None)]
    while waiting:
        node, place = waiting.pop()
        children = node.held()
        decided = {} if place else _places_of(children)
        if node.own:
            places[node.path] = place
        if decided:
            around.update(_around(node.path))
        names.update(decided)
        if len(children) > 1 and all(_is_bare(split_of(child.name)) for child in children):
            names.update(child.path for child in children)  # val and test, without train
        waiting.extend((child, place or decided.get(child.path)) for child in reversed(children))
    if not around:
        only = [child.name for child in top.held()] == ["train"] and not top.own
        whole = _Place("train", "train" if only else "")
        return dict.fromkeys(places, whole), names
    undecided = {p: next((a for a in _around(p) if a not in around), p) for p in places}
    return {p: place or _Place("beside", undecided[p]) for p, place in places.items()}, names


def _is_bare(found: tuple[Kind, tuple[str, ...]] | None) -> bool:
    """Whether a name says a split and nothing else."""
    return found is not None and not found[1]


def _places_of(siblings: Sequence[FolderNode]) -> dict[str, _Place]:
    """The place of each sibling by its path, if they are splits: the other words in the names of
    train and of a held-out split are equal, or all siblings name splits and one does without other
    words (`train_mini`, `val`). Else nothing.
    """
    said = {node.path: split_of(node.name) for node in siblings}
    kinds: dict[tuple[str, ...], set[Kind]] = {}
    for found in filter(None, said.values()):
        kinds.setdefault(found[1], set()).add(found[0])
    equal = {rest for rest, of in kinds.items() if "train" in of and len(of) > 1}
    if not equal:
        every = set().union(*kinds.values())
        complete = all(said.values()) and "train" in every and len(every) > 1
        if not complete or () not in kinds:
            return {}
        equal, kinds = set(kinds), dict.fromkeys(kinds, every)
    places = {}
    for path, split in said.items():
        if split is None or split[1] not in equal:
            places[path] = _Place("beside", path)
        elif split[0] == "train":
            places[path] = _Place("train", path)
        else:
            first = next(kind for kind in HELD_OUT if kind in kinds[split[1]])
            places[path] = _Place("test" if split[0] == first else "spare", path)
    return places


def _take(
    places: dict[str, _Place],
    names: set[str],
    train: Sequence[str] | None,
    test: Sequence[str] | None,
) -> None:
    """Replace the splits that the user names; the folders that match are names of splits."""
    patterns: dict[Literal["train", "test"], Sequence[str] | None] = {"train": train, "test": test}
    for path, place in places.items():
        for kind, wanted in patterns.items():
            if wanted is None:
                continue
            if (around := _first_match(path, wanted)) is not None:
                places[path] = _Place(kind, around)
                names.add(around)
            elif places[path].kind == kind:
                places[path] = _Place("beside", place.decided_by or path)


def _first_match(path: str, patterns: Sequence[str]) -> str | None:
    """The outermost folder of `path` that matches, "" if that is the top."""
    return next((around for around in _around(path) if matches(around, patterns)), None)


def _around(path: str) -> list[str]:
    """The top "", and every folder down to `path`."""
    parts = path.split("/") if path else []
    return ["/".join(parts[:depth]) for depth in range(len(parts) + 1)]


def _describe_left(folders: Mapping[str, int], places: dict[str, _Place], asked: bool) -> list[str]:
    """A sentence for each reason why images are in neither split."""
    deciding: dict[str, dict[str, int]] = {}  # by kind, the number of images by deciding folder
    for path, place in places.items():
        counts = deciding.setdefault(place.kind, {})
        counts[place.decided_by] = counts.get(place.decided_by, 0) + folders[path]
    found = []
    for kind in ("spare", "beside"):
        if kind not in deciding:
            continue
        left = f"{were(sum(deciding[kind].values()))} left out ({_shown(deciding[kind])})"
        train, test = (deciding.get(split, {}) for split in ("train", "test"))
        if asked:
            found.append(f"{left}, as neither data.train nor data.test names them.")
        elif kind == "spare":
            found.append(
                f"{left}, as {_shown(test)} is the test split: "
                f"data.test={_patterns(deciding[kind], places)} takes them instead."
            )
        else:
            loose = any(path in folders and path in deciding[kind] for path in _parents(train))
            taken = [*train, *deciding[kind]]
            is_simple = not loose and len(taken) <= _MOST_PATTERNS
            key = _patterns(taken, places) if is_simple else ". data.test=none"
            found.append(
                f"{left}, as they are beside the splits {_shown(train)} and {_shown(test)}: "
                f"data.train={key} takes them in."
            )
    return found


def _parents(paths: Iterable[str]) -> set[str]:
    return {around for path in paths for around in _around(path)[:-1]}


def _patterns(chosen: Iterable[str], places: Mapping[str, object]) -> str:
    """The value of a key that names these folders and no other: their names, or their paths."""
    inside = [path for path in chosen if path]
    names = list(dict.fromkeys(path.rpartition("/")[2] for path in inside))
    unsure = {path for path in places if matches(path, names)}
    if any(not set(_around(path)) & set(inside) for path in unsure):
        names = [f"./{path}" for path in inside]
    plain = [re.sub(r"""[][,'"*={}$\\ ]""", "?", name) for name in names]
    return plain[0] if len(plain) == 1 else f"'[{','.join(plain)}]'"


def _shown(names: Iterable[str]) -> str:
    """Some distinct names for a sentence."""
    distinct = list(dict.fromkeys(name or "the folder itself" for name in names))
    more = len(distinct) - _NUM_NAMED
    return ", ".join(distinct[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def were(num: int) -> str:
    """The number of images, as the beginning of a sentence."""
    return f"{count(num, 'image')} {'was' if num == 1 else 'were'}"


# ------------------------------------------------------------------------------------ classes


def _class_parts(path: str, names: set[str]) -> list[str]:
    """The parts of `path` that do not name splits."""
    return [around.rpartition("/")[2] for around in _around(path)[1:] if around not in names]
