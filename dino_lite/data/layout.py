"""Splits, classes and what is left out, read from folder names and their numbers of images.

One rule for folders, lists, tar shards and tables: `read_layout` assigns every folder (or shard, or
folder of a tar's members) to train, to test or to neither; `name_classes` names the class of each.
Neither touches a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from dino_lite.data.folder_names import (
    Kind,
    is_images,
    is_junk,
    is_mask,
    matches,
    of_photograph,
    split_of,
    tokens_of,
    without_mask,
)
from dino_lite.data.folder_tree import FolderNode, folder_tree
from dino_lite.data.wording import count

Stems = Callable[
    [str], Iterable[str]
]  # names, without suffixes, of the images directly in a folder

_NUM_NAMED = 3  # folders named in a sentence


class Layout(NamedTuple):
    """The folders of train and of test, and sentences that count what is in neither.

    `train_folder`: the folder that names the split ("a/train"), "" if there is none or several;
    `test_folder` likewise.
    """

    train: dict[str, list[str]]  # parts of each folder's path that may name its class
    train_folder: str
    test: dict[str, list[str]]
    test_folder: str
    left_out: list[str]


class _Place(NamedTuple):
    """Where the images of a folder go, and the folder that decides it."""

    kind: Literal["train", "test", "spare", "beside"]
    decided_by: str


def read_layout(
    folders: Mapping[str, int],
    stems: Stems = lambda _: (),
    train: Sequence[str] | None = None,
    test: Sequence[str] | None = None,
    exclude: bool = True,
) -> Layout:
    """Assign each of `folders` ("train/cat", "" for the top; with its number of images).

    Where names with a train word and a val or test word stand side by side, they are splits, and
    what is beside them is left out; val is the test split, or else test. Without such names all is
    train. Masks, annotations and thumbnails are left out (if `exclude`) beside a folder of images,
    or if most of their stems equal those of a folder beside them. `train`, `test`: patterns of the
    folders that are a split instead, see `matches`; an empty list: none.
    """
    top = folder_tree(folders)
    named = [pattern for pattern in (*(train or ()), *(test or ())) if pattern != "."]
    left_out = _exclude(top, stems, named) if exclude else []
    places, names = _find_splits(top)
    asked = train is not None or test is not None
    _take(places, names, train, test)
    left_out += _describe_left(folders, places, asked)

    def part(kind: str) -> tuple[dict[str, list[str]], str]:
        deciding = {path: place.decided_by for path, place in places.items() if place.kind == kind}
        one = next(iter(deciding.values()), "")
        parts = {path: _class_parts(path, names) for path in deciding}
        return parts, one if all(name == one for name in deciding.values()) else ""

    return Layout(*part("train"), *part("test"), left_out)


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
    return parts[0], parts[1], found.left_out


# ------------------------------------------------------------------------------------ exclusion


def _exclude(top: FolderNode, stems: Stems, kept: Sequence[str]) -> list[str]:
    """Remove junk, and masks and the like, from the tree, save those that match `kept`; sentences
    that count them.
    """
    removed: dict[str, list[tuple[str, int]]] = {}
    for node in top.walk():
        children = node.held()
        others = [child for child in children if not is_mask(child.name)]
        images = any(is_images(other.name) for other in others)
        for child in children:
            what = "files of the system" if is_junk(child.name) else ""
            if child not in others and (images or _repeats(child, others, node, stems)):
                what = "masks or annotations"
            if what and not matches(child.path, kept):
                removed.setdefault(what, []).append((child.name, child.total))
                child.add(-child.total)
    return [
        f"{were(sum(num for _, num in found))} left out as {what} ({_names(n for n, _ in found)}): "
        "data.exclude=none takes them in."
        for what, found in removed.items()
    ]


def _repeats(
    mask: FolderNode, others: Sequence[FolderNode], parent: FolderNode, stems: Stems
) -> bool:
    """Whether most images of `mask` are called like those of one folder beside it, or of its
    parent. Where other folders are called alike too, names are numbers and say nothing, unless the
    names of the folders say that they belong together ("train", "train_masks").
    """

    def below(node: FolderNode) -> set[str]:
        return {stem.lower() for each in node.walk() for stem in stems(each.path)}

    mine = below(mask)
    mine |= {of_photograph(stem) for stem in mine}

    def alike(theirs: set[str]) -> bool:
        return bool(theirs) and len(mine & theirs) > mask.total / 2

    if parent.own and alike({stem.lower() for stem in stems(parent.path)}):
        return True
    found = [other for other in others if alike(below(other))]
    rest = without_mask(mask.name)
    return len(found) == 1 or any(tokens_of(other.name) == rest for other in found)


# ------------------------------------------------------------------------------------ splits


def _find_splits(top: FolderNode) -> tuple[dict[str, _Place], set[str]]:
    """The place of every folder with images, and the folders whose names are those of splits."""
    places: dict[str, _Place] = {}
    names: set[str] = set()
    waiting: list[tuple[FolderNode, _Place | None]] = [(top, None)]
    while waiting:
        node, place = waiting.pop()
        decided = {} if place else _places_of(node.held())
        if node.own:
            places[node.path] = place or _Place(
                *(("beside", node.path) if decided else ("train", ""))
            )
        children = node.held()
        names.update(decided)
        if len(children) > 1 and all(split_of(c.name) in _BARE for c in children):
            names.update(child.path for child in children)  # val beside test, without train
        waiting.extend((child, place or decided.get(child.path)) for child in reversed(children))
    if [child.name for child in top.held()] == ["train"] and not top.own and not names:
        places = dict.fromkeys(places, _Place("train", "train"))
    return places, names


_BARE: list[tuple[Kind, tuple[str, ...]]] = [("train", ()), ("val", ()), ("test", ())]


def _places_of(siblings: Sequence[FolderNode]) -> dict[str, _Place]:
    """The place of each sibling by its path, if a train word and a val or test word are there."""
    said = {node.path: split_of(node.name) for node in siblings}
    kinds: dict[tuple[str, ...], set[Kind]] = {}
    for found in said.values():
        if found:
            kinds.setdefault(found[1], set()).add(found[0])
    rests = {rest for rest, of in kinds.items() if "train" in of and len(of) > 1}
    if not rests:
        return {}
    places = {}
    for path, found in said.items():
        if found is None or found[1] not in rests:
            places[path] = _Place("beside", path)
        elif found[0] == "train":
            places[path] = _Place("train", path)
        else:
            second = "val" if "val" in kinds[found[1]] else "test"
            places[path] = _Place("test" if found[0] == second else "spare", path)
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

    def keys(kind: str) -> list[str]:
        return list(dict.fromkeys(name.rpartition("/")[2] or "." for name in deciding[kind]))

    found = []
    for kind in ("spare", "beside"):
        if kind not in deciding:
            continue
        left = f"{were(sum(deciding[kind].values()))} left out ({_names(deciding[kind])})"
        if asked:
            found.append(f"{left}, as neither data.train nor data.test names them.")
        elif kind == "spare":
            found.append(
                f"{left}, as {_names(deciding['test'])} is the test split: "
                f"data.test={_value(keys(kind))} takes them instead."
            )
        else:
            found.append(
                f"{left}, as they are beside the splits {_names(deciding['train'])} and "
                f"{_names(deciding['test'])}: "
                f"data.train={_value([*keys('train'), *keys(kind)])} takes them in."
            )
    return found


def _value(names: Sequence[str]) -> str:
    """Names as the value of a key on the command line."""
    if "." in names:
        return "."
    return names[0] if len(names) == 1 else f"'[{','.join(names)}]'"


def _names(names: Iterable[str]) -> str:
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
