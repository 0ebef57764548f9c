"""Folders of images, whatever their nesting."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from dino_lite.contracts import Splits, UserError
from dino_lite.data.class_names import name_classes
from dino_lite.data.folder_names import matches, split_of
from dino_lite.data.labels import Split, find_labels, listed
from dino_lite.data.layout import Layout, read_layout, were
from dino_lite.data.masks_beside import without_masks
from dino_lite.data.paths import PathList, Paths, joined
from dino_lite.data.pixels import Background, Bounds, Pixels
from dino_lite.data.roots import Root, Top, several, tops
from dino_lite.data.selection import Patterns, Selection, select
from dino_lite.data.sources import PathSource, text
from dino_lite.data.suffixes import FETCH, KNOWN, POINTER, SUFFIXES
from dino_lite.data.walk import ARCHIVES, Found, walk
from dino_lite.data.wording import count
from dino_lite.settings.kinds import Size


def open_folder(
    root: Root | None = None,
    labels: str | None = "auto",
    channels: Size = 3,
    range: Bounds | None = None,
    background: Background | None = None,
    truncated: bool = False,
    train: Patterns = None,
    test: Patterns = None,
    exclude: Patterns = None,
    class_level: int = 0,
) -> Splits:
    """The images below `root` in the byte order of their paths, without hidden files and folders.

    `root`: a folder; a pattern (`*`, `?`, `[]`, `**`) of folders or image files; or several of
    these, as a list or a text `[a,b]`, concatenated. See `roots.tops`.

    Splits and what is left out follow from the folders' names, see `layout.read_layout`; `train`,
    `test` and `exclude` say otherwise, see `selection`. Splits of several roots are
    determined for each and concatenated.

    Classes: the first folder below the split (`class_level` 0; -1 is the last), if plausible, or
    according to `labels`: auto, none, folder, or FILE.csv (path,label; paths relative to `root`).
    See `labels.find_labels`. `channels` to `truncated`: see `Pixels`.
    """
    chosen = select(train, test, exclude)
    found = [(top, look_through(top, chosen)) for top in tops(root)]
    pixels = Pixels(channels, range, background, truncated)
    return read_folders(found, several(root) is not None, labels, pixels, chosen, class_level)


def look_through(top: Top, chosen: Selection) -> Found:
    """The image files of `top`, relative to it, and what else may hold images."""
    if top.files is None:
        return walk(os.fsencode(top.folder), chosen.exclude, junk=not chosen.automatic)
    images = PathList()
    start = len(os.path.join(top.folder, ""))
    for file in (file[start:] for file in top.files):
        if os.fsencode(file).lower().endswith(SUFFIXES) and not matches(file, chosen.exclude):
            images.add(os.fsencode(file))
    return Found(images.paths(), {}, {})


def read_folders(
    found: Sequence[tuple[Top, Found]],
    all_needed: bool,
    labels: str | None,
    pixels: Pixels,
    chosen: Selection,
    class_level: int,
) -> Splits:
    """The data set of what `look_through` found; `all_needed`: each root must hold an image."""
    whose = [(top, each) for top, each in found if len(each.images)]
    empty = [(top, each) for top, each in found if not len(each.images)]
    if not whose or (empty and all_needed):
        raise UserError(_why_empty(*empty[0]))
    beside: list[str] = []
    if chosen.automatic:
        parted = [(top, each, *without_masks(each.images)) for top, each in whose]
        whose = [(top, each._replace(images=images)) for top, each, images, _ in parted]
        beside = [sentence for *_, sentence in parted if sentence]
    layouts = [_layout(top, each.images, chosen) for top, each in whose]
    _check_not_empty(whose, layouts, chosen)
    of_train, of_test = name_classes(
        {(i, path): parts for i, each in enumerate(layouts) for path, parts in each.train.items()},
        {(i, path): parts for i, each in enumerate(layouts) for path, parts in each.test.items()},
        class_level,
    )
    trains, tests = [], []
    for i, ((top, each), layout) in enumerate(zip(whose, layouts, strict=True)):
        split = partial(_split, os.fsencode(top.folder), each.images)
        classes = [
            {path: name for (j, path), name in of.items() if i == j} for of in (of_train, of_test)
        ]
        trains.append(split(layout.train_folder, classes[0]))
        if layout.test:
            tests.append(split(layout.test_folder, classes[1]))
    trains = [split for split in trains if len(split.paths)]
    named = find_labels(labels, trains, tests)
    name = os.path.basename(whose[0][0].folder) or "root"
    left_out = [sentence for layout in layouts for sentence in layout.left_out]
    return Splits(
        PathSource(*_together(trains), named.train, named.classes, pixels),
        PathSource(*_together(tests), named.test, named.classes, pixels) if tests else None,
        f"{name}+{len(whose) - 1}" if len(whose) > 1 else name,
        (*left_out, *beside, *(told for _, each in found for told in describe_unread(each))),
        named.origin,
    )


def _layout(top: Top, images: Paths, chosen: Selection) -> Layout:
    """The layout of one root."""
    folders = [_key(folder) for folder in images.folders()]
    number = {folder: i for i, folder in enumerate(folders)}

    def stems(folder: str) -> list[str]:
        if folder not in number:  # it holds folders only
            return []
        names = images.names_in(number[folder])
        return [os.path.splitext(os.fsdecode(name))[0] for name in names]

    counts = dict(zip(folders, images.num_in_folders().tolist(), strict=True))
    return read_layout(counts, stems, chosen.train, chosen.test, chosen.automatic)


def _key(folder: bytes) -> str:
    """A folder of `Paths` ("train/cat/") as `read_layout` names it ("train/cat")."""
    return os.fsdecode(folder.rstrip(b"/"))


def _split(top: bytes, images: Paths, folder: str, classes: dict[str, str | None]) -> Split:
    """The images in the folders of `classes`, with paths relative to `folder`."""
    below = os.fsencode(folder) + b"/" if folder else b""
    numbers = [i for i, name in enumerate(images.folders()) if _key(name) in classes]
    paths = images.select(numbers, below)
    named = [classes[_key(below + name)] for name in paths.folders()]
    return Split(top, below, paths, [name and text(os.fsencode(name)) for name in named])


def _check_not_empty(
    whose: Sequence[tuple[Top, Found]], layouts: Sequence[Layout], chosen: Selection
) -> None:
    """Raise UserError if a split that the user names holds no image, or `train` is empty beside a
    folder that is held out.
    """
    for key in ("train", "test"):
        wanted = getattr(chosen, key)
        if wanted and not any(getattr(layout, key) for layout in layouts):
            folders = {_key(f) or "." for _, each in whose for f in each.images.folders()}
            raise UserError(
                f"data.{key}={','.join(wanted)} matches no folder with images in "
                f"{whose[0][0].folder}, which has {listed(folders)}: name one, or a pattern."
            )
    for (top, each), layout in zip(whose, layouts, strict=True):
        firsts = {_key(folder).partition("/")[0] for folder in each.images.folders()}
        held_out = [
            name for name in sorted(firsts) if (split_of(name) or [""])[0] in ("val", "test")
        ]
        if layout.test or not held_out or top.files is not None or chosen.train:
            continue
        with os.scandir(top.folder) as listing:
            names = sorted(entry.name for entry in listing if entry.is_dir())
        for name in names:
            if name not in firsts and split_of(name) == ("train", ()):
                raise UserError(
                    f"{os.path.join(top.folder, name)} holds no image file, but {held_out[0]} "
                    "beside it does: check data.root."
                )


def _why_empty(top: Top, found: Found) -> str:
    """Why a root has no image, with what it holds instead."""
    why = f"{top.folder} holds no image file"
    archives = [file for suffix in ARCHIVES for file in found.others.get(suffix, [])]
    unread = describe_unread(found)
    tables = [file for kind in (".parquet", ".arrow") for file in found.others.get(kind, [])]
    for table in tables[:1]:
        with open(os.path.join(top.folder, table), "rb") as file:
            fetched = file.read(len(POINTER)) != POINTER
        cause = "holds no column of images" if fetched else FETCH
        return f"{why}, and {table} {cause}."
    if archives:
        return f"{why}, but {len(archives)} compressed archives ({listed(archives)}): unpack them."
    if unread:
        return f"{why} that can be read: {unread[0]}"
    return f"{why} (.jpg, .png …; hidden ones do not count): check data.root."


def describe_unread(found: Found) -> list[str]:
    """Sentences that count images of a kind that is not read here, and folders without access."""
    sentences = []
    for cure in dict.fromkeys(KNOWN.values()):
        kinds = {
            s.decode(): len(found.others.get(s.decode(), [])) for s in KNOWN if KNOWN[s] == cure
        }
        kinds = {suffix: num for suffix, num in sorted(kinds.items()) if num}
        if kinds:
            excluded = ",".join(f"*{suffix}" for suffix in kinds)
            sentences.append(
                f"{were(sum(kinds.values()))} left out, as {', '.join(kinds)} is not read here: "
                f"{cure or 'convert them'}, or data.exclude='[{excluded}]' if they do not matter."
            )
    if found.unlisted:
        name, why = next(iter(found.unlisted.items()))
        num = len(found.unlisted)
        what = f"{count(num, 'folder')} {'was' if num == 1 else 'were'}"
        sentences.append(
            f"{what} left out, as {name} cannot be listed ({why}): change its permissions, or say "
            f"data.exclude={name}."
        )
    return sentences


def _together(splits: Sequence[Split]) -> tuple[bytes, Paths]:
    """A common folder of the splits of all roots, and the paths below it."""
    if len(splits) == 1:
        split = splits[0]
        return os.path.join(split.top, split.folder.rstrip(b"/")), split.paths
    shared = os.path.commonpath([split.top for split in splits])
    start = len(os.path.join(shared, b""))
    return shared, joined([(os.path.join(s.top, b"")[start:] + s.folder, s.paths) for s in splits])
