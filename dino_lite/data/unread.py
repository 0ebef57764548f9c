"""What a folder holds besides the images that are read, and why there may be none."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dino_lite.contracts import UserError
from dino_lite.data.folder_names import HELD_OUT, split_of
from dino_lite.data.labels import listed
from dino_lite.data.layout import Layout, were
from dino_lite.data.path_layout import key_of
from dino_lite.data.roots import Top
from dino_lite.data.selection import Selection
from dino_lite.data.suffixes import FETCH, KNOWN, POINTER
from dino_lite.data.walk import ARCHIVES, Found
from dino_lite.wording import count


def check_not_empty(
    whose: Sequence[tuple[Top, Found]], layouts: Sequence[Layout], chosen: Selection
) -> None:
    """Raise UserError if a split that the user names holds no image, or if the images of train are
    missing, or in an archive, beside a folder that is held out.
    """
    for key in ("train", "test"):
        wanted = getattr(chosen, key)
        if wanted and not any(getattr(layout, key) for layout in layouts):
            folders = {key_of(f) or "." for _, each in whose for f in each.images.folders()}
            raise UserError(
                f"data.{key}={','.join(wanted)} matches no folder with images in "
                f"{whose[0][0].folder}, which has {listed(folders)}: name one, or a pattern."
            )
    for (top, each), layout in zip(whose, layouts, strict=True):
        firsts = {key_of(folder).partition("/")[0] for folder in each.images.folders()}
        held_out = [name for name in sorted(firsts) if _kind(name) in HELD_OUT]
        if layout.test or not held_out or top.files is not None or chosen.train:
            continue
        with os.scandir(top.folder) as listing:
            folders = {entry.name for entry in listing if entry.is_dir()} - firsts
        packed = [f for files in each.others.values() for f in files if "/" not in f]
        for name in sorted([*folders, *packed]):
            if _kind(name.partition(".")[0]) == "train":
                what = "is not unpacked" if name in packed else "holds no image file"
                raise UserError(
                    f"{os.path.join(top.folder, name)} {what}, but {held_out[0]} beside it holds "
                    "images: check data.root, or say data.train=. to train on them."
                )


def _kind(name: str) -> str:
    found = split_of(name)
    return found[0] if found else ""


def why_empty(top: Top, found: Found, chosen: Selection) -> str:
    """Why a root has no image, with what it holds instead."""
    why = f"{top.folder} holds no image file"
    tables = [file for kind in (".parquet", ".arrow") for file in found.others.get(kind, [])]
    for table in tables[:1]:
        with open(os.path.join(top.folder, table), "rb") as file:
            fetched = file.read(len(POINTER)) != POINTER
        return f"{why}, and {table} {'holds no column of images' if fetched else FETCH}."
    if archives := _archives(found):
        them = "it" if len(archives) == 1 else "them"
        return f"{why}, but {_compressed(archives)}: unpack {them}."
    if unread := describe_unread(found):
        return f"{why} that can be read: {unread[0]}"
    if chosen.exclude:
        return f"{why} besides those of data.exclude={','.join(chosen.exclude)}: check both keys."
    return f"{why} (.jpg, .png …; hidden ones do not count): check data.root."


def describe_unread(found: Found) -> list[str]:
    """Sentences that count images of a kind that is not read here, archives, folders of runs, and
    those without access.
    """
    sentences = []
    for cure in dict.fromkeys(KNOWN.values()):
        kinds = {
            suffix: len(found.others[suffix])
            for suffix in sorted(map(bytes.decode, KNOWN))
            if KNOWN[suffix.encode()] == cure and suffix in found.others
        }
        if kinds:
            excluded = ",".join(f"*{suffix}" for suffix in kinds)
            sentences.append(
                f"{were(sum(kinds.values()))} left out, as {', '.join(kinds)} is not read here: "
                f"{cure or 'convert them'}, or data.exclude='[{excluded}]' if they do not matter."
            )
    if archives := _archives(found):
        suffixes = ",".join(sorted({f"*{os.path.splitext(name)[1]}" for name in archives}))
        sentences.append(
            f"{_compressed(archives)} {'was' if len(archives) == 1 else 'were'} left out: unpack "
            f"what should be read, or say data.exclude='[{suffixes}]'."
        )
    if found.own:
        was = "was" if len(found.own) == 1 else "were"
        sentences.append(
            f"{count(len(found.own), 'folder')} of runs or checks ({listed(found.own)}) {was} left "
            "out: data.exclude=none takes their pictures in."
        )
    if found.unlisted:
        name, why = next(iter(found.unlisted.items()))
        num = len(found.unlisted)
        sentences.append(
            f"{count(num, 'folder')} {'was' if num == 1 else 'were'} left out, as {name} cannot be "
            f"listed ({why}): change its permissions, or say data.exclude={name}."
        )
    return sentences


def _archives(found: Found) -> list[str]:
    return [file for suffix in ARCHIVES for file in found.others.get(suffix, [])]


def _compressed(archives: Sequence[str]) -> str:
    return f"{count(len(archives), 'compressed archive')} ({listed(archives)})"
