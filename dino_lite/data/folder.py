"""Folders of images, whatever their nesting."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

import numpy as np
from jaxtyping import Bool

from dino_lite.contracts import Splits, UserError
from dino_lite.data.class_names import name_classes
from dino_lite.data.folder_names import matches
from dino_lite.data.labels import Split, find_labels
from dino_lite.data.path_layout import layout_of
from dino_lite.data.paths import PathList, Paths, joined
from dino_lite.data.pixels import Background, Bounds, Pixels
from dino_lite.data.roots import Root, Top, several, tops
from dino_lite.data.selection import Patterns, Selection, select
from dino_lite.data.sources import PathSource, text
from dino_lite.data.suffixes import SUFFIXES
from dino_lite.data.unread import check_not_empty, describe_unread, why_empty
from dino_lite.data.walk import Found, walk
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
    chosen = select(train, test, exclude, class_level)
    found = [(top, look_through(top, chosen)) for top in tops(root)]
    pixels = Pixels(channels, range, background, truncated)
    return read_folders(found, several(root) is not None, labels, pixels, chosen)


def look_through(top: Top, chosen: Selection) -> Found:
    """The image files of `top`, relative to it, and what else may hold images."""
    if top.files is None:
        return walk(os.fsencode(top.folder), chosen.exclude, junk=not chosen.automatic)
    images = PathList()
    start = len(os.path.join(top.folder, ""))
    for file in (file[start:] for file in top.files):
        if os.fsencode(file).lower().endswith(SUFFIXES) and not matches(file, chosen.exclude):
            images.add(os.fsencode(file))
    return Found(images.paths(), {}, {}, [])


def read_folders(
    found: Sequence[tuple[Top, Found]],
    all_needed: bool,
    labels: str | None,
    pixels: Pixels,
    chosen: Selection,
) -> Splits:
    """The data set of what `look_through` found; `all_needed`: each root must hold an image."""
    whose = [(top, each) for top, each in found if len(each.images)]
    empty = [(top, each) for top, each in found if not len(each.images)]
    if not whose or (empty and all_needed):
        raise UserError(why_empty(*empty[0], chosen))
    read = [layout_of(each.images, chosen) for _, each in whose]
    layouts = [each.layout for each in read]
    check_not_empty(whose, layouts, chosen)
    classes = name_classes(
        {(i, path): parts for i, each in enumerate(layouts) for path, parts in each.train.items()},
        {(i, path): parts for i, each in enumerate(layouts) for path, parts in each.test.items()},
        chosen.class_level,
    )
    trains, tests = [], []
    for i, ((top, each), part) in enumerate(zip(whose, read, strict=True)):
        named = [[names.get((i, folder)) for folder in part.folders] for names in classes]
        split = partial(_split, os.fsencode(top.folder), each.images)
        if part.train.any():
            trains.append(split(part.train, part.layout.train_folder, named[0]))
        if part.test.any():
            tests.append(split(part.test, part.layout.test_folder, named[1]))
    if not trains:
        raise UserError(f"data.test={','.join(chosen.test or [])} leaves no image to train on.")
    of = find_labels(labels, trains, tests)
    name = os.path.basename(whose[0][0].folder) or "root"
    left_out = [sentence for layout in layouts for sentence in layout.left_out]
    return Splits(
        PathSource(*_together(trains), of.train, of.classes, pixels),
        PathSource(*_together(tests), of.test, of.classes, pixels) if tests else None,
        f"{name}+{len(whose) - 1}" if len(whose) > 1 else name,
        (*left_out, *(told for _, each in found for told in describe_unread(each))),
        of.origin,
    )


def _split(
    top: bytes,
    images: Paths,
    rows: Bool[np.ndarray, "N"],
    folder: str,
    classes: Sequence[str | None],
) -> Split:
    """The images of these rows, with paths relative to `folder`; `classes` are its folders'."""
    below = os.fsencode(folder) + b"/" if folder else b""
    paths, numbers = images.where(rows, below)
    named = [classes[number] for number in numbers]
    return Split(top, below, paths, [name and text(os.fsencode(name)) for name in named])


def _together(splits: Sequence[Split]) -> tuple[bytes, Paths]:
    """A common folder of the splits of all roots, and the paths below it."""
    if len(splits) == 1:
        split = splits[0]
        return os.path.join(split.top, split.folder.rstrip(b"/")), split.paths
    shared = os.path.commonpath([split.top for split in splits])
    start = len(os.path.join(shared, b""))
    return shared, joined([(os.path.join(s.top, b"")[start:] + s.folder, s.paths) for s in splits])
