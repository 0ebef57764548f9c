"""Splits and labels of a list of files, by its columns or by the folders of its paths."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from dino_lite.contracts import UserError
from dino_lite.data.class_names import name_classes
from dino_lite.data.folder_names import HELD_OUT, matches, split_of
from dino_lite.data.labels import Labels, Named, encode, encode_auto
from dino_lite.data.layout import were
from dino_lite.data.path_layout import key_of, layout_of
from dino_lite.data.paths import Paths
from dino_lite.data.selection import Selection
from dino_lite.data.sources import text


class Listed(NamedTuple):
    """The rows of a list: paths, labels, and the values of its column of splits, if it has one."""

    paths: Paths
    labels: Named
    splits: Named | None


class Parts(NamedTuple):
    """The paths of train and of test, their labels, and sentences that count the others."""

    train: Paths
    test: Paths | None
    labels: Labels
    left_out: list[str]


def split_listed(where: str, rows: Listed, chosen: Selection) -> Parts:
    """Split the rows of the list `where` by its column of splits, or else by the folders of the
    paths. Raises UserError if train is empty, or if a split is labeled in part.
    """
    if rows.splits is None:
        of = layout_of(rows.paths, chosen)
        train, test, left_out = of.train, of.test, list(of.layout.left_out)
    else:
        train, test, left_out = _by_column(where, rows.splits, chosen)
    if not train.any():
        asked = f"data.train={','.join(chosen.train)}" if chosen.train else "data.test=."
        raise UserError(f"{asked} leaves no image of {where} to train on: check it.")
    named = _labels_of(where, rows.labels, train), _labels_of(where, rows.labels, test)
    paths = rows.paths.where(train)[0], rows.paths.where(test)[0]
    if named[0] is not None:
        labels = encode(named[0], named[1] if test.any() else None, "the list's column of labels")
    else:
        folders = [[key_of(folder) for folder in part.folders()] for part in paths]
        if rows.splits is None:
            inner = [of.layout.train, of.layout.test]
        else:
            inner = [{f: f.split("/") if f else [] for f in each} for each in folders]
        classes = name_classes(inner[0], inner[1], chosen.class_level)
        labels = _by_folder(paths, folders, classes, bool(test.any()))
    return Parts(paths[0], paths[1] if test.any() else None, labels, left_out)


def _by_column(
    where: str, splits: Named, chosen: Selection
) -> tuple[Bool[np.ndarray, "N"], Bool[np.ndarray, "N"], list[str]]:
    """Rows of train and of test by a column of splits, and a sentence that counts the others."""
    values = [str(name) for name in splits.names]
    kinds = {value: (split_of(value) or [""])[0] for value in values}
    first = next((kind for kind in HELD_OUT if kind in kinds.values()), None)
    of_train = [value for value in values if kinds[value] == "train"]
    of_test = [value for value in values if first and kinds[value] == first]
    if chosen.train is not None:
        of_train = [value for value in values if matches(value, chosen.train)]
    if chosen.test is not None:
        of_test = [value for value in values if matches(value, chosen.test)]
    of_test = [value for value in of_test if chosen.train is None or value not in of_train]
    of_train = [value for value in of_train if value not in of_test]
    for key, found, wanted in (("train", of_train, [""]), ("test", of_test, chosen.test)):
        if wanted and not found:
            has = ", ".join(map(repr, values))
            raise UserError(
                f"{where} lists no image of the split {key}, as its column has {has}: "
                f"data.{key}=VALUE names it."
            )

    def rows(taken: list[str]) -> Bool[np.ndarray, "N"]:
        found: np.ndarray = np.array([value in taken for value in values], bool)[splits.codes]
        return found

    train, test = rows(of_train), rows(of_test)
    others = [value for value in values if value not in (*of_train, *of_test)]
    if not others:
        return train, test, []
    left = f"{were(int((~(train | test)).sum()))} left out (split {', '.join(others)})"
    key = f"data.train='[{','.join([*of_train, *others])}]'"
    if any(kinds[value] in HELD_OUT for value in others):
        key = f"data.test={next(value for value in others if kinds[value] in HELD_OUT)}"
    read = f"{', '.join(of_train)} is train" + f" and {', '.join(of_test)} test" * bool(of_test)
    return train, test, [f"{left}, as {read}: {key} takes in another."]


def _labels_of(where: str, labels: Named, rows: Bool[np.ndarray, "N"]) -> Named | None:
    """The labels of a split, None if no image has one. All must have one if any has: otherwise some
    were forgotten.
    """
    codes = labels.codes[rows]
    lost = int((codes < 0).sum())
    if 0 < lost < len(codes):
        raise UserError(
            f"{where} has no label for {lost} of {len(codes)} images of a split, the "
            f"first being its image {int(np.argmax(codes < 0)) + 1}: name them all, or "
            "choose data.labels=none."
        )
    return Named(codes, labels.names) if len(codes) and not lost else None


def _by_folder(
    paths: tuple[Paths, Paths],
    folders: list[list[str]],
    classes: tuple[dict[str, str | None], dict[str, str | None]],
    has_test: bool,
) -> Labels:
    named = []
    for part, keys, of in zip(paths, folders, classes, strict=True):
        by_folder = Named.collect(of.get(key) for key in keys)
        named.append(Named(by_folder.codes[part.folder_of], by_folder.names))
    test = named[1] if has_test else None
    return encode_auto(named[0], test, lambda row: text(paths[0][row]))
