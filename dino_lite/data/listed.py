"""Splits and labels of a list of files, by its columns or by the folders of its paths."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dino_lite.contracts import UserError
from dino_lite.data.class_names import name_classes
from dino_lite.data.folder_names import matches, split_of
from dino_lite.data.labels import Labels, Named, encode, encode_auto
from dino_lite.data.layout import Layout, read_layout, were
from dino_lite.data.paths import Paths
from dino_lite.data.selection import Selection
from dino_lite.data.sources import text


class Parts(NamedTuple):
    """The paths of train and of test, their labels, and sentences that count the others."""

    train: Paths
    test: Paths | None
    labels: Labels
    left_out: list[str]


def split_listed(
    where: str,
    listed: Mapping[str | None, tuple[Paths, Named]],
    chosen: Selection,
    class_level: int = 0,
) -> Parts:
    """Split the paths of the list `where`, given by the value in its column of splits (None: it has
    no such column). Raises UserError if train is empty, or if a split is labeled in part.
    """
    if None in listed:
        return _by_folder(where, *listed[None], chosen, class_level)
    values = {str(value): len(paths) for value, (paths, _) in listed.items()}
    of_train, of_test = _values(where, values, chosen)
    train, test = listed[of_train], None if of_test is None else listed[of_test]
    others = {value: num for value, num in values.items() if value not in (of_train, of_test)}
    left_out = []
    if others:
        key = f"data.test={next(iter(others))}"
        left_out = [
            f"{were(sum(others.values()))} left out (split {', '.join(others)}), as {of_train} is "
            f"train and {of_test} is test: {key} takes it instead."
        ]
    layout = Layout({}, "", {}, "", [])
    if (train[1].codes < 0).all():
        folders = [_folders(paths) for paths in (train[0], test[0] if test else None)]
        parts = [{f: f.split("/") if f else [] for f in each} for each in folders]
        layout = Layout(parts[0], "", parts[1], "", [])
    labels = _labels(where, train, test, layout, class_level)
    return Parts(train[0], test[0] if test else None, labels, left_out)


def _values(where: str, values: Mapping[str, int], chosen: Selection) -> tuple[str, str | None]:
    """The values of train and test in a column of splits."""
    kinds = {value: (split_of(value) or [""])[0] for value in values}
    taken: list[str | None] = []
    for key, words, wanted in (
        ("train", ("train",), chosen.train),
        ("test", ("val", "test"), chosen.test),
    ):
        found = [v for word in words for v, kind in kinds.items() if kind == word]
        if wanted is not None:
            found = [value for value in values if matches(value, wanted)]
        if not found and (key == "train" or wanted):
            has = ", ".join(repr(value) for value in values)
            raise UserError(
                f"{where} lists no image of the split {key}, as its column has {has}: "
                f"data.{key}=VALUE names it."
            )
        taken.append(found[0] if found else None)
    return str(taken[0]), taken[1]


def _by_folder(
    where: str, paths: Paths, named: Named, chosen: Selection, class_level: int
) -> Parts:
    keys = [_key(folder) for folder in paths.folders()]
    counts: dict[str, int] = {}
    for key, num in zip(keys, paths.num_in_folders().tolist(), strict=True):
        counts[key] = counts.get(key, 0) + num

    def stems(folder: str) -> list[str]:
        names = [name for i, key in enumerate(keys) if key == folder for name in paths.names_in(i)]
        return [os.path.splitext(os.fsdecode(name))[0] for name in names]

    layout = read_layout(counts, stems, chosen.train, chosen.test, chosen.automatic)
    if not layout.train:
        asked = ",".join(chosen.train or [])
        raise UserError(f"data.train={asked} names no folder of the paths in {where}: check it.")

    def part(folders: dict[str, list[str]]) -> tuple[Paths, Named]:
        numbers = [i for i, key in enumerate(keys) if key in folders]
        rows = np.isin(paths.folder_of, numbers)
        return paths.select(numbers), Named(named.codes[rows], named.names)

    train, test = part(layout.train), part(layout.test) if layout.test else None
    labels = _labels(where, train, test, layout, class_level)
    return Parts(train[0], test[0] if test else None, labels, layout.left_out)


def _labels(
    where: str,
    train: tuple[Paths, Named],
    test: tuple[Paths, Named] | None,
    layout: Layout,
    class_level: int,
) -> Labels:
    """Labels of the list, or else of the folders. Either all images of a split have a class or none
    has: otherwise some were forgotten.
    """
    for _, named in (train, *([test] if test else [])):
        lost = int((named.codes < 0).sum())
        if 0 < lost < len(named.codes):
            raise UserError(
                f"{where} has no label for {lost} of {len(named.codes)} images of a split, the "
                f"first being its image {int(np.argmax(named.codes < 0)) + 1}: name them all, or "
                "choose data.labels=none."
            )
    if not (train[1].codes < 0).all():
        return encode(train[1], test[1] if test else None, "the list's column of labels")
    classes = name_classes(layout.train, layout.test, class_level)
    by_folder = []
    for split, of in zip((train, test), classes, strict=True):
        if split is not None:
            named = Named.collect(of.get(_key(folder)) for folder in split[0].folders())
            by_folder.append(Named(named.codes[split[0].folder_of], named.names))
    of_test = by_folder[1] if test else None
    return encode_auto(by_folder[0], of_test, lambda row: text(train[0][row]))


def _folders(paths: Paths | None) -> list[str]:
    return [] if paths is None else [_key(folder) for folder in paths.folders()]


def _key(folder: bytes) -> str:
    """A folder of a path or URL as `read_layout` names it: "bucket/train"."""
    return os.fsdecode(folder).replace("://", "/").strip("/")
