"""Folders of images, whatever their nesting."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby

from dino_lite.contracts import Splits, UserError
from dino_lite.data.labels import Split, find_labels
from dino_lite.data.paths import PathList, Paths, joined
from dino_lite.data.pixels import Background, Bounds, Pixels
from dino_lite.data.roots import Root, Top, several, tops
from dino_lite.data.sources import PathSource, text
from dino_lite.data.suffixes import SUFFIXES
from dino_lite.settings.kinds import Size


def open_folder(
    root: Root | None = None,
    labels: str | None = "auto",
    channels: Size = 3,
    range: Bounds | None = None,
    background: Background | None = None,
    truncated: bool = False,
) -> Splits:
    """The images below `root` in the byte order of their paths, without hidden files and folders.

    `root`: a folder; a pattern (`*`, `?`, `[]`, `**`) of folders or image files; or several of
    these, as a list or a text `[a,b]`, concatenated. See `roots.tops`.

    Splits: `root/train` with `root/val` or `root/test`, or alone. If both exist, val is the test
    split (ImageNet's `test` has no labels). Without such folders every image is train. Splits of
    several roots are determined for each and concatenated.

    Classes: the first folder below the split, if plausible, or according to `labels`: auto, none,
    folder, or FILE.csv (path,label; paths relative to `root`). See `labels.find_labels`.
    `channels` to `truncated`: see `Pixels`.
    """
    found = [(top, _listed(top)) for top in tops(root)]
    whose = [(top, paths) for top, paths in found if len(paths)]
    empty = next((top.folder for top, paths in found if not len(paths)), "")
    if not whose or (empty and several(root) is not None):
        raise UserError(
            f"{empty} holds no image file (.jpg, .png …; hidden ones do not count): check "
            "data.root."
        )
    splits = [_split(top, paths) for top, paths in whose]
    trains = [train for train, _ in splits]
    tests = [test for _, test in splits if test is not None]
    named = find_labels(labels, trains, tests)
    name = os.path.basename(whose[0][0].folder) or "root"
    pixels = Pixels(channels, range, background, truncated)
    return Splits(
        PathSource(*_together(trains), named.train, named.classes, pixels),
        PathSource(*_together(tests), named.test, named.classes, pixels) if tests else None,
        f"{name}+{len(whose) - 1}" if len(whose) > 1 else name,
    )


def _listed(top: Top) -> Paths:
    """The image files of `top`, relative to it."""
    if top.files is None:
        return _image_files(os.fsencode(top.folder))
    images = PathList()
    start = len(os.path.join(os.fsencode(top.folder), b""))
    for file in map(os.fsencode, top.files):
        if file.lower().endswith(SUFFIXES):
            images.add(file[start:])
    return images.paths()


def _image_files(root: bytes) -> Paths:
    """The image files below `root`, relative to it, in byte order.

    Symbolic links to folders are followed, except into a folder that contains them.
    """
    images = PathList()
    # A stack of folders to list, and of files that precede folders already listed.
    waiting: list[tuple[bytes, list[bytes], frozenset[tuple[int, int]]]]
    waiting = [(b"", [], frozenset())]
    while waiting:
        below, files, around = waiting.pop()
        if files:
            images.add_names(below, files)
            continue
        folder = os.path.join(root, below[:-1]) if below else root
        try:
            status = os.stat(folder)
            with os.scandir(folder) as listing:
                entries = [entry for entry in map(_entry, listing) if entry]
        except OSError as error:
            raise UserError(
                f"{text(folder)} cannot be listed ({error.strerror}): check its permissions."
            ) from error
        here = (status.st_dev, status.st_ino)
        if here in around:
            continue
        found: list[tuple[bytes, list[bytes], frozenset[tuple[int, int]]]] = []
        for is_folder, run in groupby(sorted(entries), lambda entry: entry.endswith(b"/")):
            if is_folder:
                found.extend((below + name, [], around | {here}) for name in run)
            else:
                found.append((below, list(run), around))
        waiting.extend(reversed(found))
    return images.paths()


def _entry(entry: os.DirEntry[bytes]) -> bytes | None:
    """A folder's name with a slash, an image's name, or None; only links need a system call."""
    if entry.name.startswith(b"."):
        return None
    try:
        if entry.is_dir():
            return entry.name + b"/"
        if entry.name.lower().endswith(SUFFIXES) and entry.is_file():
            return entry.name
    except OSError:  # a link to itself
        pass
    return None


def _split(top: Top, paths: Paths) -> tuple[Split, Split | None]:
    """Train and test among the `paths` of one root, according to its folders."""
    root = os.fsencode(top.folder)
    train, val, test = (Split(root, name, paths.below(name)) for name in _SPLITS)
    tests = [split for split in (val, test) if len(split.paths)]
    if not len(train.paths) and tests and os.path.isdir(os.path.join(root, b"train")):
        raise UserError(
            f"{os.path.join(top.folder, 'train')} holds no image file, but "
            f"{text(tests[0].folder[:-1])} beside it does: check data.root."
        )
    if len(train.paths) and (tests or len(train.paths) == len(paths)):
        return train, tests[0] if tests else None
    return Split(root, b"", paths), None


_SPLITS = (b"train/", b"val/", b"test/")


def _together(splits: Sequence[Split]) -> tuple[bytes, Paths]:
    """A common folder of the splits of all roots, and the paths below it."""
    if len(splits) == 1:
        top, folder, paths = splits[0]
        return os.path.join(top, folder.rstrip(b"/")), paths
    shared = os.path.commonpath([split.top for split in splits])
    start = len(os.path.join(shared, b""))
    return shared, joined([(os.path.join(s.top, b"")[start:] + s.folder, s.paths) for s in splits])
